"""Expression values: their scale, and the block of cells that travels through the data path.

Owns recognizing counts (`recognize_counts`) and the arithmetic of log1p counts per 10,000, one function per transform;
knows nothing of files, gene names or tokens. Letters: n cells, l stored values, e edges.
"""

from dataclasses import dataclass
from typing import get_args

import numpy as np
from scipy import sparse

from perturbgene.cli.base import Normalization
from perturbgene.data_utils.genes import GeneAlignment
from perturbgene.data_utils.kernels import find_count_rows, scan_values, sum_rows
from perturbgene.errors import InputError, listed

NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)

#: Counts per 10,000: the target sum of log1p_cp10k (Seurat's and CELLxGENE's convention).
TARGET_SUM = 1e4

#: ln(1 + 10,000) is 9.2 and log2(1 + 10^6) is 19.9: above this, fractional values cannot be logarithms.
HIGHEST_LOG_VALUE = 50.0


@dataclass(frozen=True)
class ExpressionBlock:
    """Rows of one file in CSR form, in the file's own columns, with all that tokenizing needs.

    Args:
        values_l: Stored values, shape (l,), any real dtype.
        columns_l: Column of each value, shape (l,).
        offsets_n1: Where each cell starts, int64 of shape (n + 1,).
        alignment: The file's columns in the panel.
        is_counts: True when values are counts still to be normalized by `library_size_n`.
        library_size_n: Total counts per cell, float64 of shape (n,), or None to sum the values here.
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
    is_counts: bool
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


def recognize_counts(values_l: np.ndarray, offsets_n1: np.ndarray, rows_n: np.ndarray, *, source: str) -> bool:
    """Return True for raw counts (whole numbers), False for logarithms; the one place where scales are recognized.

    Args:
        values_l: Stored values, shape (l,).
        offsets_n1: Where each cell starts, shape (n + 1,).
        rows_n: Row number of each cell, for messages.
        source: The matrix, for messages.

    Raises:
        InputError: Values are negative, not finite, fractional and too large to be logarithms, or counts in some cells
            and fractional in others.
    """
    check_values(values_l, source=source)
    if values_l.dtype.kind in "bui" or not values_l.size or scan_values(native(values_l))[1]:
        return True
    if count_rows(values_l, offsets_n1).any():
        raise _mixed(values_l, offsets_n1, rows_n, source=source)
    if values_l.max() > HIGHEST_LOG_VALUE:
        raise InputError(
            f"{source} holds fractional values up to {values_l.max():g}: neither raw counts nor log-normalized. Give "
            "--normalization log1p_cp10k to normalize them, or --normalization none to bin them as they are."
        )
    return False


def count_rows(values_l: np.ndarray, offsets_n1: np.ndarray) -> np.ndarray:
    """Return True for cells that surely hold raw counts, bool of shape (n,).

    Their values are whole numbers, which differ and are three or more, or of which one is too large for a logarithm.
    Fewer could be whole by chance: log2(1 + x) is 1 or 2 for x = 1 or 3.
    """
    is_counts_n = np.zeros(len(offsets_n1) - 1, dtype=bool)
    find_count_rows(native(values_l), offsets_n1, HIGHEST_LOG_VALUE, is_counts_n)
    return is_counts_n


def _mixed(values_l: np.ndarray, offsets_n1: np.ndarray, rows_n: np.ndarray, *, source: str) -> InputError:
    """Say which cells hold counts and which fractional values."""
    is_fractional_l = values_l % 1 != 0
    is_fractional_n = np.diff(np.concatenate([[0], np.cumsum(is_fractional_l)])[offsets_n1]) > 0
    counts = listed(rows_n[~is_fractional_n & (np.diff(offsets_n1) > 0)].tolist(), most=3)
    fractional = listed(rows_n[is_fractional_n].tolist(), most=3)
    example = f" (such as {values_l[is_fractional_l][0]:g})" if fractional else ""
    return InputError(
        f"{source} mixes scales: rows {counts or 'elsewhere'} hold counts, rows {fractional or 'elsewhere'} fractional "
        f"values{example}. Bring all cells to one scale, or give --normalization log1p_cp10k to normalize all of them, "
        "or none to bin all as they are."
    )


def needs_normalizing(
    values_l: np.ndarray, offsets_n1: np.ndarray, rows_n: np.ndarray, *, normalization: Normalization, source: str
) -> bool:
    """Decide on sampled cells whether values must be divided by the cell's total and logged before binning."""
    if normalization == "auto":
        return recognize_counts(values_l, offsets_n1, rows_n, source=source)
    check_values(values_l, source=source)
    return normalization == "log1p_cp10k"


def check_scale(
    values_l: np.ndarray, offsets_n1: np.ndarray, rows_n: np.ndarray, *, is_counts: bool, source: str
) -> None:
    """Raise an InputError if cells contradict what was recognized on sampled cells of their file."""
    if values_l.dtype.kind != "f" or not values_l.size:
        return
    if is_counts and all(scan_values(native(values_l))):  # as nearly every block of counts
        return
    is_block_of_counts = recognize_counts(values_l, offsets_n1, rows_n, source=source)
    if is_block_of_counts != is_counts and (is_counts or count_rows(values_l, offsets_n1).any()):
        raise _mixed(values_l, offsets_n1, rows_n, source=source)


def log1p_cp10k(counts_l: np.ndarray, library_size_l: np.ndarray) -> np.ndarray:
    """Return the log1p counts per 10,000, log(1 + 10,000 * count / library size), of counts; float32 of shape (l,)."""
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
    """Turn edges in log1p counts per 10,000 into shares of the library: the count over library size that reaches each.

    log1p(1e4 * x / L) >= edge exactly when x >= L * expm1(edge) / 1e4. The slack of 1e-9 lets a count that reaches the
    edge in exact arithmetic join the upper bin whatever the rounding.
    """
    return np.expm1(edges) / TARGET_SUM * (1 - 1e-9)
