"""Expression values: the block of cells that travels through the data path, and log1p counts per 10,000.

Owns the arithmetic, one function per transform; leaves recognizing a scale to `recognition` and knows nothing of files,
gene names or tokens. Letters: n cells, l stored values, e edges.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from scipy import sparse

from perturbgene.cli.base import Normalization
from perturbgene.data_utils.genes import GeneAlignment
from perturbgene.data_utils.kernels import sum_rows

NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)

#: Counts per 10,000: the target sum of log1p_cp10k (Seurat's and CELLxGENE's convention).
TARGET_SUM = 1e4


@dataclass(frozen=True)
class ExpressionBlock:
    """Rows of one file in CSR form, in the file's own columns, with all that tokenizing needs.

    Args:
        values_l: Stored values, shape (l,), any real dtype.
        columns_l: Column of each value, shape (l,).
        offsets_n1: Where each cell starts, int64 of shape (n + 1,).
        alignment: The file's columns in the panel.
        is_linear: True if values are counts, or in proportion to them, still to be divided by `library_size_n`.
        library_size_n: Total of the values of each whole cell, float64 of shape (n,), or None to sum them here.
        label_ids_np: Input id of each included phenotype, int32 of shape (n, p), -1 where absent.
        cells_n: Number of each cell in the data set, int64 of shape (n,): the identity that masks hang on.
        source: The file, for messages.
        measured_tg: True for the genes of the panel that each table of the data set measured, shape (t, g); None: all.
        table_n: Table of each cell, int64 of shape (n,); None if there are no tables.
    """

    values_l: np.ndarray
    columns_l: np.ndarray
    offsets_n1: np.ndarray
    alignment: GeneAlignment
    is_linear: bool
    library_size_n: np.ndarray | None
    label_ids_np: np.ndarray
    cells_n: np.ndarray
    source: str = "AnnData"
    measured_tg: np.ndarray | None = None
    table_n: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets_n1) - 1


#: Types of values that the compiled loops take as they are; any other is brought to float64 first.
KERNEL_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32), np.dtype(np.float64))


def native(values_l: np.ndarray) -> np.ndarray:
    """Return values in a type that the compiled loops take."""
    return values_l if values_l.dtype in KERNEL_DTYPES else values_l.astype(np.float64)


def library_sizes(values_l: np.ndarray, offsets_n1: np.ndarray) -> np.ndarray:
    """Sum the values of each cell, in float64, shape (n,); a cell without values has 0."""
    sums_n = np.zeros(len(offsets_n1) - 1)
    sum_rows(native(values_l), offsets_n1, sums_n)
    return sums_n


def log1p_cp10k(counts_l: np.ndarray, library_size_l: np.ndarray) -> np.ndarray:
    """Return the log1p counts per 10,000, log(1 + 10,000 * count / library size), of counts; float32 of shape (l,)."""
    return np.log1p(counts_l * (TARGET_SUM / library_size_l)).astype(np.float32)


def panel_matrix(block: ExpressionBlock) -> sparse.csr_matrix:
    """Return the values of a block's panel genes, columns of one gene summed, as float64 CSR of shape (n, g)."""
    gene_l = block.alignment.gene_of_column_c[block.columns_l]
    is_known_l = gene_l >= 0
    offsets = np.concatenate([[0], np.cumsum(is_known_l)])[block.offsets_n1]
    parts = (block.values_l[is_known_l].astype(np.float64), gene_l[is_known_l], offsets)
    matrix = sparse.csr_matrix(parts, shape=(len(block), block.alignment.num_genes))
    matrix.sum_duplicates()
    return matrix


def log_matrix(block: ExpressionBlock) -> sparse.csr_matrix:
    """Return a block's panel genes as log1p counts per 10,000 (log values as they are), CSR of shape (n, g)."""
    matrix = panel_matrix(block)
    if block.is_linear and block.library_size_n is not None:
        library_l = np.repeat(np.maximum(block.library_size_n, 1e-300), np.diff(matrix.indptr))
        matrix.data = log1p_cp10k(matrix.data, library_l)
    return matrix.astype(np.float32)


def count_thresholds(edges: np.ndarray) -> np.ndarray:
    """Turn edges in log1p counts per 10,000 into shares of the library: the count over library size that reaches each.

    log1p(1e4 * x / L) >= edge exactly when x >= L * expm1(edge) / 1e4. The slack of 1e-9 lets a count that reaches the
    edge in exact arithmetic join the upper bin whatever the rounding.
    """
    return np.expm1(edges) / TARGET_SUM * (1 - 1e-9)
