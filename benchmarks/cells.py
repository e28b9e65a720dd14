"""Synthetic cells that weigh what real ones weigh: the set on which every loader is measured.

Owns drawing and writing them, never dense, and the tokenizers that go with them; leaves the measuring to `loading`.
Letters: n cells, g genes, l values.

Expressed genes per cell are log-normal, gene frequencies follow Zipf's law with a flattened head, and the columns are
in no order of frequency, as with Ensembl ids. Values are counts, geometric, the higher the more frequent the gene,
stored as float32 as CELLxGENE stores them. The cells of each file are sorted by cell type, then by donor.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

GENES = 58_604
EXPRESSED = 2_400
SHARDS = 4
CELLS = 10_000
BIN_EDGES = (1e-4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
COMPRESSIONS = {"gzip": "gzip", "lzf": "lzf", "none": None}

_DRAWS_PER_CHUNK = 4_000_000
_TABLE = 1 << 20


@dataclass(frozen=True)
class CellSet:
    """Size and seed of a set; the same fields give the same files."""

    shards: int = SHARDS
    cells: int = CELLS
    genes: int = GENES
    expressed: int = EXPRESSED
    cell_types: int = 20
    donors: int = 16
    seed: int = 0

    @classmethod
    def scaled(cls, scale: float) -> "CellSet":
        """The full set with fewer cells per shard; genes per cell stay, as they decide the cost of a cell."""
        return cls(cells=max(64, round(CELLS * scale)))


def _frequencies(genes: int) -> np.ndarray:
    weights_g = 1.0 / (np.arange(genes) + 300.0) ** 1.3
    return weights_g / weights_g.sum()


def _draws_for(expressed_n: np.ndarray, weights_g: np.ndarray) -> np.ndarray:
    """Return how many draws with replacement give the wanted number of distinct genes, int64 of shape (n,)."""
    draws = np.geomspace(1, 60 * len(weights_g), 64)
    distinct = [-np.expm1(-count * weights_g).sum() for count in draws]
    return np.interp(expressed_n, distinct, draws).astype(np.int64) + 1


def _columns(draws_n: np.ndarray, gene_of_draw: np.ndarray, genes: int, rng: np.random.Generator) -> np.ndarray:
    """Return sorted keys `cell * genes + column`, one per expressed gene."""
    rows = np.repeat(np.arange(len(draws_n), dtype=np.int64), draws_n)
    keys = rows * genes + gene_of_draw[rng.integers(0, _TABLE, len(rows), dtype=np.int32)]
    keys.sort()
    return keys[np.concatenate([[True], np.diff(keys) > 0])]


def draw_csr(cells: CellSet, *, shard: int) -> Any:
    """Draw one shard's matrix: float32 counts, CSR of shape (cells, genes), columns ascending in each row."""
    from scipy import sparse

    rng = np.random.default_rng((cells.seed, shard))
    column_of_gene = np.random.default_rng(cells.seed).permutation(cells.genes)
    weights_g = _frequencies(cells.genes)
    gene_of_draw = column_of_gene[np.searchsorted(np.cumsum(weights_g), (np.arange(_TABLE) + 0.5) / _TABLE)]
    mean_count_g = np.empty(cells.genes, dtype=np.float32)
    mean_count_g[column_of_gene] = 0.8 + 12.0 * weights_g / weights_g[0]
    wanted_n = rng.lognormal(np.log(cells.expressed) - 0.08, 0.4, cells.cells).clip(1, 0.8 * cells.genes)
    draws_n = _draws_for(wanted_n, weights_g)
    rows = max(1, int(_DRAWS_PER_CHUNK // draws_n.mean()))
    data, indices, lengths = [], [], []
    for first in range(0, cells.cells, rows):
        keys = _columns(draws_n[first : first + rows], gene_of_draw, cells.genes, rng)
        columns = (keys % cells.genes).astype(np.int32)
        extra = rng.standard_exponential(len(keys), dtype=np.float32) * mean_count_g[columns]
        data.append(np.floor(extra) + np.float32(1))
        indices.append(columns)
        lengths.append(np.bincount(keys // cells.genes, minlength=len(draws_n[first : first + rows])))
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return sparse.csr_matrix((np.concatenate(data), np.concatenate(indices), indptr), (cells.cells, cells.genes))


def gene_names(count: int) -> list[str]:
    """Ensembl-like names, in column order."""
    return [f"ENSG{number:011d}" for number in range(count)]


def _write_shard(cells: CellSet, folder: Path, *, shard: int, compressions: Sequence[str]) -> None:
    import anndata as ad
    import pandas as pd

    matrix = draw_csr(cells, shard=shard)
    rng = np.random.default_rng((cells.seed, shard, 1))
    order = np.sort(rng.integers(0, cells.cell_types * cells.donors, cells.cells))
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([f"type {code // cells.donors:02d}" for code in order]),
            "donor_id": pd.Categorical([f"donor {code % cells.donors:02d}" for code in order]),
        },
        index=[f"cell_{shard}_{number}" for number in range(cells.cells)],
    )
    adata = ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=gene_names(cells.genes)))
    for name in compressions:
        path = folder / name / f"shard_{shard}.h5ad"
        path.parent.mkdir(parents=True, exist_ok=True)
        adata.write_h5ad(path, compression=COMPRESSIONS[name])


def build(cells: CellSet, folder: Path, *, compressions: Sequence[str] = tuple(COMPRESSIONS)) -> Path:
    """Write the set below `folder` unless it is there already; return its own folder."""
    home = folder / "_".join(f"{name}{value}" for name, value in asdict(cells).items())
    if not (home / "set.json").exists():
        started = time.perf_counter()
        for shard in range(cells.shards):
            _write_shard(cells, home, shard=shard, compressions=compressions)
        seconds = round(time.perf_counter() - started, 1)
        (home / "set.json").write_text(json.dumps({**asdict(cells), "seconds": seconds}) + "\n", encoding="utf-8")
    return home


def build_corpus(home: Path) -> Path:
    """Run `prepare` on the uncompressed files of a set unless its corpus is there already; return the corpus."""
    from perturbgene.corpus.prepare import prepare

    corpus = home / "corpus"
    if not corpus.exists():
        started = time.perf_counter()
        options = {"phenotypes": ["cell_type"], "eval_donors": ["donor 00"], "bin_edges": BIN_EDGES}
        prepare(str(home / "none" / "*.h5ad"), corpus, **options)
        (home / "prepare.json").write_text(
            json.dumps({"seconds": round(time.perf_counter() - started, 1)}), encoding="utf-8"
        )
    return corpus


def shards(home: Path, name: str) -> list[str]:
    """Return the files of one variant: a compression, or the training part of the corpus."""
    return sorted(str(path) for path in (home / "corpus" / "train" if name == "corpus" else home / name).glob("*.h5ad"))
