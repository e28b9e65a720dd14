"""What recognizing the scale of values costs, next to reading the same blocks: a table with the share for each scale.

Owns the files (the cells of one benchmark set on several scales) and timing whole files with and without `check_cells`,
which looks at every value; a file's sample is recognized once, which is timed apart. Letters: l values.

Run from the repository root: python -m benchmarks.recognition --cells 8192
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import anndata as ad
import numpy as np
import pandas as pd

from benchmarks.cells import CellSet, draw_csr
from benchmarks.contenders import BIN_EDGES
from perturbgene.data_utils import values
from perturbgene.data_utils.iterable_ann_dataset import CHUNK_ROWS
from perturbgene.data_utils.sources import H5adFile
from perturbgene.data_utils.tokenization import GeneTokenizer

#: Name -> (counts, library size of each value) -> values.
FORMS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "counts": lambda counts_l, _: counts_l,
    "fractional counts": lambda counts_l, _: counts_l * 0.97,
    "log1p CP10k": lambda counts_l, size_l: np.log1p(counts_l / size_l * 1e4),
    "log1p CPM": lambda counts_l, size_l: np.log1p(counts_l / size_l * 1e6),
    "log2 CPM": lambda counts_l, size_l: np.log2(1 + counts_l / size_l * 1e6),
    "CPM": lambda counts_l, size_l: counts_l / size_l * 1e6,
}


def write_forms(folder: Path, cells: CellSet) -> dict[str, str]:
    """Write the same cells on every scale, uncompressed CSR; return form -> path."""
    counts, paths = draw_csr(cells, shard=0), {}
    size_l = np.repeat(np.asarray(counts.sum(axis=1)).ravel(), np.diff(counts.indptr))
    names = pd.DataFrame(index=[f"GENE{g}" for g in range(counts.shape[1])])
    for form, make in FORMS.items():
        matrix = counts.copy()
        matrix.data = make(counts.data.astype(np.float64), size_l).astype(np.float32)
        paths[form] = str(folder / f"{form.replace(' ', '_')}.h5ad")
        ad.AnnData(matrix, var=names).write_h5ad(paths[form])
    return paths


def measure(path: str, *, rounds: int = 7) -> dict[str, float]:
    """Return CPU seconds: of reading and tokenizing a file's blocks with and without recognition, and of its sample.

    Every block is read in both ways in turn, several times, and the least time of each counts, so that other work on
    the machine disturbs both alike.
    """
    source = H5adFile(path)
    tokenizer = GeneTokenizer(genes=list(source.var_names)[:10_000], phenotypes={}, bin_edges=BIN_EDGES)
    shard = tokenizer.open(source)
    _ = shard.alignment
    start = time.thread_time()
    _ = shard.values.scale
    sample, check, total = time.thread_time() - start, values.check_cells, np.zeros(2)
    tokenizer.tokenize_block(shard.read(np.arange(CHUNK_ROWS)))  # compiles
    try:
        for first in range(0, len(shard), CHUNK_ROWS):
            rows_m, seconds = np.arange(first, min(first + CHUNK_ROWS, len(shard))), np.empty((rounds, 2))
            for number in range(2 * rounds):
                values.check_cells = check if number % 2 else lambda *_, **__: None
                start = time.thread_time()
                tokenizer.tokenize_block(shard.read(rows_m))
                seconds[number // 2, number % 2] = time.thread_time() - start
            total += seconds.min(axis=0)
    finally:
        values.check_cells = check
        source.close()
    return {"without": float(total[0]), "with": float(total[1]), "sample": sample}


def table(results: dict[str, dict[str, float]], *, num_cells: int) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| scale | without, us per cell | with, us per cell | cost | a file's sample, ms |",
        "|---|---|---|---|---|",
    ]
    for form, row in results.items():
        each = [row[name] / num_cells * 1e6 for name in ("without", "with")]
        cost = row["with"] / row["without"] - 1
        lines.append(f"| {form} | {each[0]:.1f} | {each[1]:.1f} | {cost:+.1%} | {row['sample'] * 1e3:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=8192)
    parser.add_argument("--genes", type=int, default=30_000)
    num_cells, genes = vars(parser.parse_args()).values()
    with TemporaryDirectory() as folder:
        paths = write_forms(Path(folder), CellSet(shards=1, cells=num_cells, genes=genes))
        print(table({form: measure(path) for form, path in paths.items()}, num_cells=num_cells))


if __name__ == "__main__":
    main()
