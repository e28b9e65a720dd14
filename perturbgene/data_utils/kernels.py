"""The compiled loops over stored values and tokens: binning, laying out, gathering and padding.

Owns speed only: what the numbers mean is said where the functions are called (`tokenization`, `data_collators`). All
release the interpreter lock. Letters: n cells, l values or tokens, g genes, p phenotypes, e edges.
"""

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from perturbgene.data_utils.order import cell_key, mix

#: Whole counts below this get their bin from a table that is made once per cell.
TABLE_SIZE = 256

#: What `tokenize_rows` returns of a stored value at fault; `tokenization` has the words for each.
NO_FAULT, NOT_A_NUMBER, INFINITE, NEGATIVE, BAD_COLUMN, REPEATED = range(6)


@numba.njit(nogil=True, cache=True)
def _fill_table(
    edges_e: np.ndarray, scale: float, thresholds_e: np.ndarray, table: np.ndarray
) -> None:  # pragma: no cover
    """Scale the edges to one cell's values and note the bin of each small whole number."""
    for e in range(len(edges_e)):
        thresholds_e[e] = edges_e[e] * scale
    bin_ = 0
    for count in range(TABLE_SIZE):
        while bin_ < len(edges_e) and count >= thresholds_e[bin_]:
            bin_ += 1
        table[count] = bin_
    table[0] = 0  # not expressed, whatever the thresholds of a cell without counts


@numba.njit(nogil=True, cache=True)
def _fault_of(value: float) -> int:  # pragma: no cover
    if np.isnan(value):
        return NOT_A_NUMBER
    return NEGATIVE if value < 0 else INFINITE


@numba.njit(nogil=True, cache=True)
def _bin_row(
    values: np.ndarray, columns: np.ndarray, gene_of_column: np.ndarray, thresholds_ge: np.ndarray, scale: float,
    thresholds_e: np.ndarray, table: np.ndarray, genes: np.ndarray, bins: np.ndarray, positions: np.ndarray,
) -> tuple[int, int, bool]:  # fmt: skip  # pragma: no cover
    """Bin one cell; return (expressed panel genes, fault, are they in panel order)."""
    count, last_gene, is_sorted, bin_ = 0, -1, True, 0
    is_shared, num_columns, num_edges = len(thresholds_ge) == 1, len(gene_of_column), thresholds_ge.shape[1]
    for k in range(len(values)):
        value = float(values[k])
        if not (value >= 0.0 and value < np.inf):
            return k, _fault_of(value), False
        column = np.int64(columns[k])
        if column < 0 or column >= num_columns:
            return k, BAD_COLUMN, False
        gene = gene_of_column[column]
        if gene < 0 or value == 0.0:
            continue
        whole = int(value) if value < TABLE_SIZE else TABLE_SIZE
        if is_shared and whole < TABLE_SIZE and whole == value:
            bin_ = int(table[whole])
        else:
            bin_ = 0
            for e in range(num_edges):
                bin_ += value >= (thresholds_e[e] if is_shared else thresholds_ge[gene, e] * scale)
        if bin_ > 0:
            is_sorted &= gene > last_gene
            last_gene = gene
            genes[count], bins[count], positions[count] = gene, bin_, k
            count += 1
    return count, NO_FAULT, is_sorted


@numba.njit(nogil=True, cache=True)
def _sort_genes(
    genes: np.ndarray, bins: np.ndarray, positions: np.ndarray, count: int, mark: np.ndarray, slot: np.ndarray,
    spare: np.ndarray,
) -> int:  # fmt: skip  # pragma: no cover
    """Put one cell's genes in panel order through a byte map; return a repeated gene's position, or -1.

    `mark` (uint8, zero on entry and exit, a multiple of 8 long) and `slot` have a place for every gene.
    """
    for k in range(count):
        if mark[genes[k]]:
            for other in range(count):
                mark[genes[other]] = 0
            return int(positions[k])
        mark[genes[k]] = 1
        slot[genes[k]] = k
    words, out = mark.view(np.uint64), 0
    for word in range(len(words)):
        if words[word]:
            for gene in range(8 * word, 8 * word + 8):
                if mark[gene]:
                    spare[out] = slot[gene]
                    out += 1
            words[word] = 0
    for row in (genes, bins, positions):
        moved = row[spare[:count]]
        row[:count] = moved
    return -1


def _whole_below_table(value: Any) -> int:
    """Return a value that the table of bins has, as int64, or -1; compiled by the type of the value."""
    raise NotImplementedError


@overload(_whole_below_table, inline="always")
def _whole_below_table_of_type(value: Any) -> Any:  # pragma: no cover - compiled
    def of_integer(value: Any) -> Any:
        return np.int64(value) if 0 <= value < TABLE_SIZE else np.int64(-1)

    def of_float(value: Any) -> Any:
        if value >= 0.0 and value < TABLE_SIZE:
            whole = np.int64(value)
            if whole == value:
                return whole
        return np.int64(-1)

    return of_integer if isinstance(value, types.Integer) else of_float


@numba.njit(nogil=True, cache=True)
def _write_in_order(
    values: np.ndarray, columns: np.ndarray, gene_of_column: np.ndarray, thresholds_e: np.ndarray, table: np.ndarray,
    first_gene_type: int, first_bin_id: int, ids: np.ndarray, types: np.ndarray, at: int,
) -> tuple[int, bool]:  # fmt: skip  # pragma: no cover
    """Write the tokens of a cell whose columns stand in panel order; return (end, False) if not, or at a fault.

    Every value is written and the end moves on only past those that stay, which costs less than a branch that the
    processor cannot foresee.
    """
    last_gene, is_sorted, num_columns = -1, True, len(gene_of_column)
    for k in range(len(values)):
        column = np.int64(columns[k])
        if column < 0 or column >= num_columns:
            return at, False
        gene, bin_ = gene_of_column[column], np.int64(0)
        whole = _whole_below_table(values[k])
        if whole >= 0:
            bin_ = np.int64(table[whole])
        else:
            value = float(values[k])
            if not (value >= 0.0 and value < np.inf):
                return at, False
            for e in range(len(thresholds_e)):
                bin_ += np.int64(value >= thresholds_e[e])
        ids[at], types[at] = first_bin_id + bin_, first_gene_type + gene
        if gene >= 0 and bin_ > 0:
            is_sorted &= gene > last_gene
            last_gene = gene
            at += 1
    return at, is_sorted


@numba.njit(nogil=True, cache=True)
def _choose(
    genes: np.ndarray, values: np.ndarray, positions: np.ndarray, budget: int, rule: int, key: np.uint64
) -> np.ndarray:  # pragma: no cover
    """Return which `budget` of a long cell's genes (in panel order) stay, in panel order."""
    score = np.empty(len(genes))
    for k in range(len(genes)):
        hashed = float(mix(key, np.uint64(genes[k])) >> np.uint64(11))
        score[k] = -float(values[positions[k]]) if rule == 1 else hashed
    return np.sort(np.argsort(score, kind="mergesort")[:budget])


@numba.njit(nogil=True, cache=True)
def _write_chosen(
    genes: np.ndarray, bins: np.ndarray, values: np.ndarray, positions: np.ndarray, most: int, rule: int,
    key: np.uint64, first_gene_type: int, first_bin_id: int, ids: np.ndarray, types: np.ndarray,
) -> int:  # fmt: skip  # pragma: no cover
    """Write at most `most` of a cell's binned genes, which stand in panel order; return how many."""
    kept = min(len(genes), most)
    chosen = np.arange(kept)
    if kept < len(genes) and rule:
        chosen = _choose(genes, values, positions, kept, rule, key)
    for k in range(kept):
        ids[k], types[k] = first_bin_id + bins[chosen[k]], first_gene_type + genes[chosen[k]]
    return kept


@numba.njit(nogil=True, cache=True)
def scan_values(values_l: np.ndarray) -> tuple[bool, bool]:  # pragma: no cover
    """Say whether all values are finite and >= 0, and whether all are whole numbers."""
    num_bad, num_fractional = 0, 0
    for k in range(len(values_l)):  # counting, unlike leaving early, is done for many values at once
        value = values_l[k]
        num_bad += not (value >= 0.0 and value < np.inf)
        num_fractional += np.floor(value) != value
    return num_bad == 0, num_fractional == 0


@numba.njit(nogil=True, cache=True)
def find_count_rows(
    values_l: np.ndarray, offsets_n1: np.ndarray, highest_log: float, is_counts_n: np.ndarray
) -> None:  # pragma: no cover
    """Mark rows that surely hold counts: whole, and three or more that differ, or one above any logarithm."""
    for row in range(len(is_counts_n)):
        num_expressed, lowest, highest, is_whole = 0, np.inf, 0.0, True
        for k in range(offsets_n1[row], offsets_n1[row + 1]):
            value = float(values_l[k])
            if np.floor(value) != value:
                is_whole = False
                break
            if value > 0.0:
                num_expressed += 1
                lowest, highest = min(lowest, value), max(highest, value)
        is_counts_n[row] = is_whole and (highest > highest_log or (num_expressed >= 3 and highest > lowest))


@numba.njit(nogil=True, cache=True, fastmath={"reassoc"})
def sum_rows(values_l: np.ndarray, offsets_n1: np.ndarray, sums_n: np.ndarray) -> None:  # pragma: no cover
    """Write the sum of each row's values, in float64; exact for whole numbers, whatever the order of adding."""
    for row in range(len(sums_n)):
        total = 0.0
        for k in range(offsets_n1[row], offsets_n1[row + 1]):
            total += values_l[k]
        sums_n[row] = total


@numba.njit(nogil=True, cache=True)
def tokenize_rows(
    values_l: np.ndarray, columns_l: np.ndarray, offsets_n1: np.ndarray, gene_of_column: np.ndarray, num_genes: int,
    thresholds_ge: np.ndarray, scale_n: np.ndarray, label_ids_np: np.ndarray, label_types_p: np.ndarray,
    cells_n: np.ndarray, first_gene_type: int, first_bin_id: int, max_length: int, rule: int,
    seed: int, epoch: int, ids: np.ndarray, types: np.ndarray, out_offsets: np.ndarray,
) -> tuple[int, int, int]:  # fmt: skip  # pragma: no cover
    """Write the tokens of all rows; return (row, position, fault) of the first bad value, or (-1, 0, NO_FAULT).

    `rule` says which genes a cell longer than `max_length` keeps: 0 the first, 1 the highest, 2 a hash of the epoch.
    """
    longest = 0
    for row in range(len(scale_n)):
        longest = max(longest, offsets_n1[row + 1] - offsets_n1[row])
    genes, bins = np.empty(longest, np.int32), np.empty(longest, np.int32)
    positions, spare = np.empty(longest, np.int32), np.empty(longest, np.int32)
    mark, slot = np.zeros((num_genes + 7) // 8 * 8, np.uint8), np.empty(num_genes, np.int32)
    thresholds_e, table = np.empty(thresholds_ge.shape[1]), np.empty(TABLE_SIZE, np.uint16)
    at, is_shared = 0, len(thresholds_ge) == 1
    for row in range(len(scale_n)):
        values = values_l[offsets_n1[row] : offsets_n1[row + 1]]
        columns = columns_l[offsets_n1[row] : offsets_n1[row + 1]]
        _fill_table(thresholds_ge[0], scale_n[row], thresholds_e, table)
        start = at
        ids[at], types[at] = 0, 0
        at += 1
        for p in range(label_ids_np.shape[1]):
            if label_ids_np[row, p] >= 0:
                ids[at], types[at] = label_ids_np[row, p], label_types_p[p]
                at += 1
        first, most = at, max_length - 1 - (at - start)
        is_written = False
        if is_shared:
            at, is_written = _write_in_order(
                values, columns, gene_of_column, thresholds_e, table, first_gene_type, first_bin_id, ids, types, at
            )
        if not is_written or (rule and at - first > most):
            count, fault, is_sorted = _bin_row(
                values, columns, gene_of_column, thresholds_ge, scale_n[row], thresholds_e, table, genes, bins,
                positions,
            )  # fmt: skip
            if fault != NO_FAULT:
                return row, count, fault
            if not is_sorted:
                repeated = _sort_genes(genes, bins, positions, count, mark, slot, spare)
                if repeated >= 0:
                    return row, repeated, REPEATED
            key = cell_key(seed, epoch, cells_n[row])
            at = first + _write_chosen(
                genes[:count], bins, values, positions, most, rule, key, first_gene_type, first_bin_id, ids[first:],
                types[first:],
            )  # fmt: skip
        at = min(at, first + most)
        ids[at], types[at] = 1, 0
        at += 1
        out_offsets[row + 1] = at
    return -1, 0, NO_FAULT


@numba.njit(nogil=True, cache=True)
def gather_rows(
    ids_l: np.ndarray, types_l: np.ndarray, offsets_n1: np.ndarray, rows_m: np.ndarray, out_ids: np.ndarray,
    out_types: np.ndarray, out_offsets: np.ndarray,
) -> None:  # fmt: skip  # pragma: no cover
    """Copy the tokens of some rows, in the order named; `out_offsets` of shape (m + 1,) is given."""
    for m in range(len(rows_m)):
        start, stop = offsets_n1[rows_m[m]], offsets_n1[rows_m[m] + 1]
        out_ids[out_offsets[m] : out_offsets[m + 1]] = ids_l[start:stop]
        out_types[out_offsets[m] : out_offsets[m + 1]] = types_l[start:stop]


@numba.njit(nogil=True, cache=True)
def pad_rows(values_l: np.ndarray, offsets_n1: np.ndarray, filler: int, out_nl: np.ndarray) -> None:  # pragma: no cover
    """Lay ragged values out as rows, the rest of each row filled."""
    for row in range(len(offsets_n1) - 1):
        length = offsets_n1[row + 1] - offsets_n1[row]
        for k in range(length):
            out_nl[row, k] = values_l[offsets_n1[row] + k]
        for k in range(length, out_nl.shape[1]):
            out_nl[row, k] = filler
