"""The compiled loops over stored values and tokens: binning, laying out, gathering and padding.

Owns speed only: what the numbers mean is said where the functions are called (`tokenization`, `data_collators`). All
release the interpreter lock. Letters: n cells, l values or tokens, g genes, p phenotypes, e edges.
"""

import numba
import numpy as np

from perturbgene.data_utils.partition import cell_key, mix

#: Whole counts below this get their bin from a table that is made once per cell.
TABLE_SIZE = 32

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
    thresholds_e, table = np.empty(thresholds_ge.shape[1]), np.empty(TABLE_SIZE, np.int64)
    at = 0
    for row in range(len(scale_n)):
        values = values_l[offsets_n1[row] : offsets_n1[row + 1]]
        _fill_table(thresholds_ge[0], scale_n[row], thresholds_e, table)
        count, fault, is_sorted = _bin_row(
            values, columns_l[offsets_n1[row] : offsets_n1[row + 1]], gene_of_column, thresholds_ge, scale_n[row],
            thresholds_e, table, genes, bins, positions,
        )  # fmt: skip
        if fault != NO_FAULT:
            return row, count, fault
        if not is_sorted:
            repeated = _sort_genes(genes, bins, positions, count, mark, slot, spare)
            if repeated >= 0:
                return row, repeated, REPEATED
        start = at
        ids[at], types[at] = 0, 0
        at += 1
        for p in range(label_ids_np.shape[1]):
            if label_ids_np[row, p] >= 0:
                ids[at], types[at] = label_ids_np[row, p], label_types_p[p]
                at += 1
        kept = min(count, max_length - 1 - (at - start))
        if kept < count and rule:
            chosen = _choose(genes[:count], values, positions, kept, rule, cell_key(seed, epoch, cells_n[row]))
            for k in range(kept):
                ids[at + k], types[at + k] = first_bin_id + bins[chosen[k]], first_gene_type + genes[chosen[k]]
        else:
            for k in range(kept):
                ids[at + k], types[at + k] = first_bin_id + bins[k], first_gene_type + genes[k]
        at += kept
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
        start, length = offsets_n1[rows_m[m]], out_offsets[m + 1] - out_offsets[m]
        for k in range(length):
            out_ids[out_offsets[m] + k] = ids_l[start + k]
            out_types[out_offsets[m] + k] = types_l[start + k]


@numba.njit(nogil=True, cache=True)
def pad_rows(values_l: np.ndarray, offsets_n1: np.ndarray, filler: int, out_nl: np.ndarray) -> None:  # pragma: no cover
    """Lay ragged values out as rows, the rest of each row filled."""
    for row in range(len(offsets_n1) - 1):
        length = offsets_n1[row + 1] - offsets_n1[row]
        for k in range(length):
            out_nl[row, k] = values_l[offsets_n1[row] + k]
        for k in range(length, out_nl.shape[1]):
            out_nl[row, k] = filler
