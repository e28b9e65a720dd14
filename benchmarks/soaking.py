"""What `soak` watches in processes of their own: cells that are streamed, and a notebook that asks again and again.

Owns these two loops and files that are large or many; leaves watching to `watching` and bounds to `soak`. A loop writes
a line `N cells` to stderr now and then, so that whoever watches knows how far it is.

Run by `soak`: python -m benchmarks.soaking stream '{"source": ..., "workers": 2}'
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cells import CellSet, build, gene_names

BATCH = 128
BIN_EDGES = (1e-4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
CELLS_BETWEEN_LINES = 5_000


def stream(source: str, workers: int, most_cells: int = 0) -> None:
    """Draw an epoch (or its first cells) as training does: of a corpus, or of all h5ad files in a folder."""
    from torch.utils.data import DataLoader

    from perturbgene.corpus.manifest import Corpus
    from perturbgene.data_utils.data_collators import collate_fn_wrapper
    from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
    from perturbgene.data_utils.opening import open_source
    from perturbgene.data_utils.tokenization import GeneTokenizer

    if (Path(source) / "manifest.json").exists():
        paths: Any = Corpus.open(source).paths("train")
        tokenizer = GeneTokenizer.from_pretrained(source)
    else:
        paths = sorted(map(str, Path(source).glob("*.h5ad")))
        genes = list(open_source(paths[0]).var_names)
        tokenizer = GeneTokenizer(genes=genes, phenotypes={}, bin_edges=BIN_EDGES)
    dataset = IterableAnnDataset(paths, tokenizer, shuffle=True, batch_size=BATCH)
    cells, line = 0, 0
    print("0 cells", file=sys.stderr, flush=True)
    loader = DataLoader(dataset.batches(collate_fn_wrapper(tokenizer)), batch_size=None, num_workers=workers)
    for batch in loader:
        cells += len(batch["input_ids"])
        if cells >= line or cells >= most_cells > 0:
            print(f"{cells} cells", file=sys.stderr, flush=True)
            line = cells + CELLS_BETWEEN_LINES
        if cells >= most_cells > 0:
            break
    print(f"{cells} cells", file=sys.stderr, flush=True)


def notebook(run: str, cells: str, rounds: int, verb: str) -> None:
    """Call one function of the package again and again on other cells of one file, as in a notebook."""
    import anndata as ad

    import perturbgene as pg

    whole = ad.read_h5ad(cells)
    size = whole.n_obs // 4
    model = pg.load_run(run)
    for number in range(rounds):
        part = whole[number % 4 * size : number % 4 * size + size].copy()
        pg.predict(part, model=model, ask=["cell_type"]) if verb == "predict" else pg.embed(part, model=model)
        print(f"{(number + 1) * size} cells", file=sys.stderr, flush=True)


def many_files(folder: Path, *, count: int, distinct: int = 50) -> Path:
    """Write so many files of 10 cells, of which every 50th has the same cells; return their folder."""
    few = build(CellSet(shards=min(distinct, count), cells=10, genes=200, expressed=60), folder, compressions=("none",))
    home = folder / f"{count}_files"
    home.mkdir(parents=True, exist_ok=True)
    sources = sorted((few / "none").glob("*.h5ad"))
    for number in range(count):
        shutil.copyfile(sources[number % len(sources)], home / f"shard_{number:05d}.h5ad")
    return home


def large_file(folder: Path, *, cells: int, genes: int = 20_000, expressed: int = 3_000, rows: int = 64) -> Path:
    """Write one file of many cells in compressed chunks of 64 rows, all of them the same chunk; return it."""
    import zlib

    import anndata as ad
    import h5py
    import pandas as pd
    from scipy import sparse

    cells = cells // rows * rows
    path = folder / f"large_{cells}.h5ad"
    path.parent.mkdir(parents=True, exist_ok=True)
    types = pd.Categorical.from_codes(np.arange(cells) % 7, [f"type {number}" for number in range(7)])
    obs = pd.DataFrame({"cell_type": types}, index=[f"cell_{number}" for number in range(cells)])
    ad.AnnData(
        sparse.csr_matrix((cells, genes), dtype=np.float32), obs, pd.DataFrame(index=gene_names(genes))
    ).write_h5ad(path)
    rng = np.random.default_rng(0)
    columns = np.tile(np.sort(rng.permutation(genes)[:expressed]), rows).astype(np.int32)
    values = np.tile(1 + rng.poisson(1, expressed), rows).astype(np.float32)
    with h5py.File(path, "r+") as file:
        group = file["X"]
        for name, chunk in {"data": values, "indices": columns}.items():
            del group[name]
            data = group.create_dataset(
                name, shape=(cells * expressed,), dtype=chunk.dtype, chunks=(rows * expressed,), compression="gzip"
            )
            packed = zlib.compress(chunk.tobytes(), 4)
            for first in range(0, cells * expressed, rows * expressed):
                data.id.write_direct_chunk((first,), packed)
        del group["indptr"]
        group.create_dataset("indptr", data=np.arange(cells + 1, dtype=np.int64) * expressed)
    return path


if __name__ == "__main__":
    {"stream": stream, "notebook": notebook}[sys.argv[1]](**json.loads(sys.argv[2]))
