"""Expression values: what scale they are on, and the block of cells that travels through the data path.

Owns recognising counts and the arithmetic of log1p counts per 10,000; knows nothing of files, genes' names or tokens.
Letters: n cells, l stored values, e edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import sparse

from perturbgene.data_utils.genes import GeneAlignment
from perturbgene.data_utils.kernels import scan_values, sum_rows
from perturbgene.errors import InputError

Normalization = Literal["auto", "none", "log1p_cp10k"]
NORMALIZATIONS: tuple[Normalization, ...] = ("auto", "none", "log1p_cp10k")

#: Counts per 10,000: the target sum of log1p_cp10k (Seurat's and CELLxGENE's convention).
TARGET_SUM = 1e4

#: ln(1 + 10,000) is 9.2 and log2(1 + 10^6) is 19.9: above this, fractional values cannot be logarithms.
HIGHEST_LOG_VALUE = 50.0


@dataclass(frozen=True)
class ExpressionBlock:
    """Rows of one file in CSR form, in the file's own columns, with all that tokenising needs.

    Args:
        values_l: Stored values, shape (l,), any real dtype.
        columns_l: Column of each value, shape (l,).
        offsets_n1: Where each cell starts, int64 of shape (n + 1,).
        alignment: The file's columns in the panel.
        is_counts: True when values are counts still to be normalised by `library_size_n`.
        library_size_n: Total counts per cell, float64 of shape (n,), or None to sum the values here.
        label_ids_np: Input id of each included phenotype, int32 of shape (n, p), -1 where absent.
        cells_n: Number of each cell in the data set, int64 of shape (n,): the identity that masks hang on.
        source: The file, for messages.
        measured: For each cell, True for genes of the panel that it was measured with, shape (g,), None for all; cells
            share these arrays. Empty means that every cell has the genes of the file.
    """

    values_l: np.ndarray
    columns_l: np.ndarray
    offsets_n1: np.ndarray
    alignment: GeneAlignment
    is_counts: bool
    library_size_n: np.ndarray | None
    label_ids_np: np.ndarray
    cells_n: np.ndarray
    source: str = "AnnData"
    measured: Sequence[np.ndarray | None] = ()

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


def check_values(values_l: np.ndarray, *, source: str) -> None:
    """Raise an InputError when a value is NaN, infinite or negative."""
    if values_l.dtype.kind in "bu" or not values_l.size or scan_values(native(values_l))[0]:
        return
    if values_l.dtype.kind == "f" and not np.isfinite(values_l).all():
        raise InputError(
            f"{source} holds NaN or infinite expression values, which have no bin. Clean the matrix, or choose another "
            "with --layer."
        )
    if values_l.min() < 0:
        raise InputError(
            f"{source} holds negative expression values (lowest {values_l.min():g}): they look scaled or z-scored, and "
            "bins need counts or log-normalised values. Choose the matrix with --layer NAME, or --layer raw for .raw."
        )


def looks_like_counts(values_l: np.ndarray, *, source: str) -> bool:
    """Recognise raw counts: non-negative whole numbers.

    Raises:
        InputError: Values are negative, not finite, or fractional and too large to be logarithms.
    """
    check_values(values_l, source=source)
    if values_l.dtype.kind in "bui" or not values_l.size:
        return True
    if scan_values(native(values_l))[1]:
        return True
    if values_l.max() > HIGHEST_LOG_VALUE:
        raise InputError(
            f"{source} holds fractional values up to {values_l.max():g}: neither raw counts nor log-normalised. Give "
            "--normalization log1p_cp10k to normalise them, or --normalization none to bin them as they are."
        )
    return False


def needs_normalizing(values_l: np.ndarray, *, normalization: Normalization, source: str) -> bool:
    """Decide whether values must be divided by the cell's total and logged before binning."""
    if normalization == "auto":
        return looks_like_counts(values_l, source=source)
    check_values(values_l, source=source)
    return normalization == "log1p_cp10k"


def check_scale(values_l: np.ndarray, *, is_counts: bool, source: str) -> None:
    """Raise an InputError when values contradict what `auto` decided for their file."""
    if values_l.dtype.kind != "f" or not values_l.size:
        return
    if is_counts and all(scan_values(native(values_l))):  # as nearly every block of counts
        return
    if is_counts == looks_like_counts(values_l, source=source) or not is_counts:
        return
    raise InputError(
        f"{source} holds counts in some cells and fractional values (such as {values_l[values_l % 1 != 0][0]:g}) in "
        "others. Give --normalization log1p_cp10k to normalise all, or none to bin all as they are."
    )


def log1p_cp10k(counts_l: np.ndarray, library_size_l: np.ndarray) -> np.ndarray:
    """Return log(1 + 10,000 * count / library size), in float32; shapes (l,)."""
    return np.log1p(counts_l * (TARGET_SUM / library_size_l)).astype(np.float32)


def log_matrix(block: ExpressionBlock) -> sparse.csr_matrix:
    """Return a block's panel genes as log1p counts per 10,000 (log values as they are), CSR of shape (n, g)."""
    genes_l = block.alignment.gene_of_column_c[block.columns_l]
    values_l = block.values_l.astype(np.float32)
    if block.is_counts and block.library_size_n is not None:
        library_l = np.repeat(np.maximum(block.library_size_n, 1e-300), np.diff(block.offsets_n1))
        values_l = log1p_cp10k(block.values_l, library_l)
    is_kept_l = genes_l >= 0
    offsets = np.concatenate([[0], np.cumsum(is_kept_l)])[block.offsets_n1]
    shape = (len(block), block.alignment.num_genes)
    matrix = sparse.csr_matrix((values_l[is_kept_l], genes_l[is_kept_l], offsets), shape=shape)
    matrix.sum_duplicates()
    return matrix


def count_thresholds(edges: np.ndarray) -> np.ndarray:
    """Turn edges on log1p_cp10k into the count, per count of library size, at which each is reached.

    log1p(1e4 * x / L) >= edge exactly when x >= L * expm1(edge) / 1e4. The slack of 1e-9 lets a count that reaches the
    edge in exact arithmetic join the upper bin whatever the rounding.
    """
    return np.expm1(edges) / TARGET_SUM * (1 - 1e-9)
