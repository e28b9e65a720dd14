"""The compiled loops over values and tokens: hashing, binning, masking, filling batches, gathering and padding.

Owns speed only; the callers (`tokenization`, `data_collators`, `order`) say what the numbers mean. Every loop releases
the interpreter lock. Letters: n cells, l values or tokens, g genes, p phenotypes, e edges, t tables of measured genes.
"""

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from perturbgene.data_utils.labels import MASK_ID

#: Label of a token that the loss ignores.
IGNORED = -100

# -- hashing ------------------------------------------------------------------------------------------------------

#: The constants of SplitMix64 (Steele et al. 2014, OOPSLA).
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)

_S30, _S27, _S31, _S11 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(11)
_UNIT = 1.0 / (1 << 53)


@numba.njit(inline="always")
def mix(key: np.uint64, value: np.uint64) -> np.uint64:  # pragma: no cover - compiled
    """Return the hash of a value under a key (the finalizer of SplitMix64)."""
    z = (key ^ value) + GOLDEN
    z = (z ^ (z >> _S30)) * MIX_1
    z = (z ^ (z >> _S27)) * MIX_2
    return z ^ (z >> _S31)


def mix_many(key: int | np.ndarray, values_m: np.ndarray) -> np.ndarray:
    """Return `mix` of many values under one key, or each under its own, uint64 of shape (m,)."""
    hash_of: Any = mix.py_func
    keys = np.uint64(key & 0xFFFFFFFFFFFFFFFF) if isinstance(key, int) else key.astype(np.uint64)
    return np.asarray(hash_of(keys, values_m.astype(np.uint64)))


@numba.njit(inline="always")
def unit(key: np.uint64) -> float:  # pragma: no cover - compiled
    """Turn a 64-bit hash into a number in [0, 1)."""
    return float(key >> _S11) * _UNIT


@numba.njit(cache=True)
def cell_key(seed: int, epoch: int, cell: int) -> np.uint64:  # pragma: no cover - compiled
    """Return the hash that all random decisions about one cell in one epoch start from."""
    return mix(mix(mix(np.uint64(0), np.uint64(seed)), np.uint64(epoch)), np.uint64(cell))


# -- values to tokens ---------------------------------------------------------------------------------------------

#: Whole counts below this get their bin from a table that is made once per cell.
TABLE_SIZE = 256

#: What `tokenize_rows` returns for a bad stored value; `tokenization` has the words for each.
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
    table[0] = 0  # not expressed, even in a cell without counts, whose thresholds are all 0


@numba.njit(nogil=True, cache=True)
def _fault_of(value: float, column: int, num_columns: int) -> int:  # pragma: no cover
    if np.isnan(value):
        return NOT_A_NUMBER
    if value < 0:
        return NEGATIVE
    return INFINITE if 0 <= column < num_columns else BAD_COLUMN


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
def _bin_row(
    values: np.ndarray, columns: np.ndarray, gene_of_column: np.ndarray, thresholds_ge: np.ndarray, scale: float,
    thresholds_e: np.ndarray, table: np.ndarray, first_gene_type: int, first_bin_id: int, ids: np.ndarray,
    types: np.ndarray, at: int,
) -> tuple[int, bool, int]:  # fmt: skip  # pragma: no cover
    """Write one cell's genes in stored order; return (end, are they in panel order, position of a bad value or -1).

    Every value is written, but the end moves only past those that stay: a branch there could not be predicted.
    """
    last_gene, is_sorted, num_columns = -1, True, len(gene_of_column)
    is_shared, num_edges = len(thresholds_ge) == 1, thresholds_ge.shape[1]
    for k in range(len(values)):
        column = np.int64(columns[k])
        if column < 0 or column >= num_columns:
            return at, is_sorted, k
        gene, bin_ = gene_of_column[column], np.int64(0)
        whole = _whole_below_table(values[k]) if is_shared else np.int64(-1)
        if whole >= 0:
            bin_ = np.int64(table[whole])
        else:
            value = float(values[k])
            if not (value >= 0.0 and value < np.inf):
                return at, is_sorted, k
            for e in range(num_edges):
                bin_ += np.int64(value >= (thresholds_e[e] if is_shared else thresholds_ge[gene, e] * scale))
            bin_ *= np.int64(value > 0.0)
        ids[at], types[at] = first_bin_id + bin_, first_gene_type + gene
        if gene >= 0 and bin_ > 0:
            is_sorted &= gene > last_gene
            last_gene = gene
            at += 1
    return at, is_sorted, -1


@numba.njit(nogil=True, cache=True)
def _sort_genes(
    ids: np.ndarray, types: np.ndarray, first_gene_type: int, mark: np.ndarray, id_of_gene: np.ndarray
) -> int:  # pragma: no cover
    """Put one cell's gene tokens in panel order through a byte map; return a repeated gene, or -1.

    `mark` (uint8, zero on entry and exit, a multiple of 8 long) and `id_of_gene` have a place for every gene.
    """
    for k in range(len(types)):
        gene = int(types[k]) - first_gene_type
        if mark[gene]:
            return gene
        mark[gene] = 1
        id_of_gene[gene] = ids[k]
    words, out = mark.view(np.uint64), 0
    for word in range(len(words)):
        if words[word]:
            for gene in range(8 * word, 8 * word + 8):
                if mark[gene]:
                    ids[out], types[out] = id_of_gene[gene], first_gene_type + gene
                    out += 1
            words[word] = 0
    return -1


@numba.njit(nogil=True, cache=True)
def tokenize_rows(
    values_l: np.ndarray, columns_l: np.ndarray, offsets_n1: np.ndarray, gene_of_column: np.ndarray, num_genes: int,
    thresholds_ge: np.ndarray, scale_n: np.ndarray, label_ids_np: np.ndarray, label_types_p: np.ndarray,
    first_gene_type: int, first_bin_id: int, max_length: int, ids: np.ndarray, types: np.ndarray,
    out_offsets: np.ndarray,
) -> tuple[int, int, int]:  # fmt: skip  # pragma: no cover
    """Write the tokens of all rows; return (row, position, fault) of the first bad value, or (-1, 0, NO_FAULT)."""
    mark, id_of_gene = np.zeros((num_genes + 7) // 8 * 8, np.uint8), np.empty(num_genes, ids.dtype)
    thresholds_e, table = np.empty(thresholds_ge.shape[1]), np.empty(TABLE_SIZE, np.uint16)
    at = 0
    for row in range(len(scale_n)):
        values = values_l[offsets_n1[row] : offsets_n1[row + 1]]
        columns = columns_l[offsets_n1[row] : offsets_n1[row + 1]]
        _fill_table(thresholds_ge[0], scale_n[row], thresholds_e, table)
        start = at
        ids[at], types[at] = 0, 0  # [CLS]
        at += 1
        for p in range(label_ids_np.shape[1]):
            if label_ids_np[row, p] >= 0:
                ids[at], types[at] = label_ids_np[row, p], label_types_p[p]
                at += 1
        first = at
        at, is_sorted, bad = _bin_row(
            values, columns, gene_of_column, thresholds_ge, scale_n[row], thresholds_e, table, first_gene_type,
            first_bin_id, ids, types, at,
        )  # fmt: skip
        if bad >= 0:
            return row, bad, _fault_of(float(values[bad]), int(columns[bad]), len(gene_of_column))
        if not is_sorted:
            repeated = _sort_genes(ids[first:at], types[first:at], first_gene_type, mark, id_of_gene)
            for k in range(len(values) if repeated >= 0 else 0):
                if gene_of_column[columns[k]] == repeated:
                    return row, k, REPEATED
        at = min(at, start + max_length - 1)
        ids[at], types[at] = 1, 0  # [EOS]
        at += 1
        out_offsets[row + 1] = at
    return -1, 0, NO_FAULT


@numba.njit(nogil=True, cache=True)
def scan_values(values_l: np.ndarray) -> tuple[bool, bool]:  # pragma: no cover
    """Say whether all values are finite and >= 0, and whether all are whole numbers."""
    num_bad, num_fractional = 0, 0
    for k in range(len(values_l)):  # no early return, so that the compiler checks many values at once
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
    """Write the sum of each row's values, in float64; exact for whole numbers in any order of adding."""
    for row in range(len(sums_n)):
        total = 0.0
        for k in range(offsets_n1[row], offsets_n1[row + 1]):
            total += values_l[k]
        sums_n[row] = total


#: Schraudolph (1999, Neural Computation): the bits of a float32 near exp(x) are a whole number linear in x.
_EXP_SLOPE, _EXP_OFFSET = np.float32((1 << 23) / np.log(2)), np.float32((127 << 23) - 366393)


@numba.njit(nogil=True, cache=True, fastmath={"reassoc"})
def scan_rows(
    values_l: np.ndarray, offsets_n1: np.ndarray, sums_n: np.ndarray
) -> tuple[bool, bool]:  # pragma: no cover
    """Write each row's sum; say whether all values are finite and >= 0, and whether all are whole numbers.

    Sums of differences, which are 0 for good values, cost less than counting bad ones.
    """
    are_sound, are_whole = True, True
    for row in range(len(sums_n)):
        values, total = values_l[offsets_n1[row] : offsets_n1[row + 1]], 0.0
        odd, fraction = np.float32(0.0), np.float32(0.0)
        for k in range(len(values)):
            total += values[k]
            odd += np.float32(np.abs(values[k]) - values[k])
            fraction += np.float32(values[k] - np.floor(values[k]))
        sums_n[row] = total
        are_sound &= odd == np.float32(0.0)
        are_whole &= fraction == np.float32(0.0)
    return are_sound, are_whole


@numba.njit(nogil=True, cache=True, fastmath={"reassoc"})
def exp_sums(
    values_l: np.ndarray, offsets_n1: np.ndarray, factor: float, sums_n: np.ndarray
) -> bool:  # pragma: no cover
    """Write each row's sum of exp(factor * value) - 1 within 4%; say whether all values are finite and >= 0."""
    longest, are_sound = 0, True
    for row in range(len(sums_n)):
        longest = max(longest, offsets_n1[row + 1] - offsets_n1[row])
    bits = np.empty(longest, np.int32)
    exps, slope = bits.view(np.float32), np.float32(factor) * _EXP_SLOPE
    for row in range(len(sums_n)):
        values = values_l[offsets_n1[row] : offsets_n1[row + 1]]
        odd, total = np.float32(0.0), np.float32(0.0)
        for k in range(len(values)):
            value = np.float32(values[k])
            odd += np.abs(value) - value
            bits[k] = np.int32(min(value * slope + _EXP_OFFSET, np.float32(2.1e9)))
        for k in range(len(values)):
            total += exps[k]
        sums_n[row] = float(total) - len(values)
        are_sound &= odd == np.float32(0.0)
    return are_sound


# -- tokens to batches --------------------------------------------------------------------------------------------


@numba.njit(nogil=True, cache=True)
def best_fit(
    length_m: np.ndarray, order_m: np.ndarray, budget: int, room_b: np.ndarray, name_b: np.ndarray, batch_m: np.ndarray,
    first_name: int,
) -> tuple[int, int]:  # fmt: skip  # pragma: no cover
    """Put cells, in an order, into the fullest open batch that has room; return (next unused name, batches open).

    If all batches are open and none has room, a new batch takes the place of the fullest.
    """
    used, name = 0, first_name
    for m in order_m:
        at = used
        for k in range(used):
            if room_b[k] >= length_m[m] and (at == used or room_b[k] < room_b[at]):
                at = k
        if at == used:
            if used < len(room_b):
                used += 1
            else:
                at = int(np.argmin(room_b))
            room_b[at], name_b[at] = budget, name
            name += 1
        room_b[at] -= length_m[m]
        batch_m[m] = name_b[at]
    return name, used


@numba.njit(nogil=True, cache=True)
def gather_rows(
    ids_l: np.ndarray, types_l: np.ndarray, offsets_n1: np.ndarray, rows_m: np.ndarray, out_ids: np.ndarray,
    out_types: np.ndarray, out_offsets: np.ndarray,
) -> None:  # fmt: skip  # pragma: no cover
    """Copy the tokens of some rows, in the order given; `out_offsets` of shape (m + 1,) is an input."""
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


# -- masking ------------------------------------------------------------------------------------------------------

# What each random decision about a cell is for; the numbers are part of the contract and never change.
_ABSENT, _ASKED, _GENE, _ROUNDING, _UNEXPRESSED, _MASKING = (np.uint64(n) for n in (1, 2, 3, 4, 5, 8))
_DROP, _DROP_SHARE = np.uint64(9), np.uint64(10)

# What becomes of a token: it stays as it is, is hidden behind [MASK], or leaves the sequence.
_KEPT, _HIDDEN, _DROPPED = np.uint8(0), np.uint8(1), np.uint8(2)

#: Draws per unexpressed gene that is wanted, before a cell that expresses nearly all of the panel goes without.
_TRIES = 8


@numba.njit(nogil=True, cache=True)
def _draw_unexpressed(  # type: ignore[no-untyped-def]
    types, wanted, num_genes, first_gene_type, max_length, key, stamp, stamp_value, is_measured_g, out
):  # fmt: skip  # pragma: no cover - compiled
    """Fill `out` with token types of genes that the cell surely does not express; return how many.

    A full cell may have lost genes behind its last one, so only genes before that are drawn.
    """
    limit = num_genes
    if len(types) >= max_length and len(types) > 1 and types[-2] >= first_gene_type:
        limit = types[-2] - first_gene_type
    for type_ in types:
        if type_ >= first_gene_type:
            stamp[type_ - first_gene_type] = stamp_value
    found, tries = 0, 0
    while found < wanted and tries < _TRIES * (wanted + 1) and limit > 0:
        gene = np.int64(mix(mix(key, _UNEXPRESSED), np.uint64(tries)) % np.uint64(limit))
        tries += 1
        if stamp[gene] != stamp_value and is_measured_g[gene]:
            stamp[gene] = stamp_value
            out[found] = first_gene_type + gene
            found += 1
    return found


@numba.njit(nogil=True, cache=True)
def _drop_genes(types, first_gene_type, most, key, fate):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    """Thin one cell: its genes leave with one share, drawn uniformly from [0, most); return how many left."""
    fate[: len(types)] = _KEPT
    if most == 0:
        return 0
    share, drop_key, count = unit(mix(key, _DROP_SHARE)) * most, mix(key, _DROP), 0
    for k in range(len(types)):
        if types[k] >= first_gene_type and unit(mix(drop_key, np.uint64(types[k]))) < share:
            fate[k] = _DROPPED
            count += 1
    return count


@numba.njit(nogil=True, cache=True)
def _mask_genes(types, first_gene_type, probability, key, fate, draws):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Choose the hidden genes of one cell among those that are left, at least one; return how many.

    Loops without branches: compilers then draw for eight tokens at once.
    """
    gene_key, count = mix(key, _GENE), 0
    for k in range(len(types)):
        draws[k] = unit(mix(gene_key, np.uint64(types[k])))
    for k in range(len(types)):
        is_hidden = (draws[k] < probability) & (types[k] >= first_gene_type) & (fate[k] != _DROPPED)
        fate[k] = _HIDDEN if is_hidden else fate[k]
        count += is_hidden
    if count > 0 or probability <= 0:
        return count
    best, lowest = -1, 2.0
    for k in range(len(types)):
        if types[k] >= first_gene_type and fate[k] != _DROPPED and draws[k] < lowest:
            best, lowest = k, draws[k]
    if best >= 0:
        fate[best] = _HIDDEN
    return int(best >= 0)


@numba.njit(nogil=True, cache=True)
def thin_rows(  # type: ignore[no-untyped-def]
    ids_l, types_l, offsets_n1, cells_n, epochs_n, seed, most, first_gene_type, out_ids, out_types, out_offsets
):  # fmt: skip  # pragma: no cover - compiled
    """Write what `_drop_genes` leaves of every cell."""
    fate, at = np.zeros(len(types_l) + 1, np.uint8), 0
    for row in range(len(cells_n)):
        ids, types = ids_l[offsets_n1[row] : offsets_n1[row + 1]], types_l[offsets_n1[row] : offsets_n1[row + 1]]
        _drop_genes(types, first_gene_type, most, mix(cell_key(seed, epochs_n[row], cells_n[row]), _MASKING), fate)
        for k in range(len(types)):
            if fate[k] == _KEPT:
                out_ids[at], out_types[at] = ids[k], types[k]
                at += 1
        out_offsets[row + 1] = at


@numba.njit(nogil=True, cache=True)
def _write_all(ids, types, fate, out_ids, out_types, labels, at):  # type: ignore[no-untyped-def]  # pragma: no cover
    """Write the genes of a cell that loses none, a few at once; return the end."""
    stop = at + len(ids)
    to_ids, to_types, to_labels = out_ids[at:stop], out_types[at:stop], labels[at:stop]
    for k in range(len(ids)):
        to_ids[k] = MASK_ID if fate[k] == _HIDDEN else ids[k]
    for k in range(len(ids)):
        to_types[k] = types[k]
    for k in range(len(ids)):
        to_labels[k] = np.int32(ids[k]) if fate[k] == _HIDDEN else np.int32(IGNORED)
    return stop


@numba.njit(nogil=True, cache=True)
def mask_rows(  # type: ignore[no-untyped-def]
    ids_l, types_l, offsets_n1, cells_n, epochs_n, seed, gene_prob, phenotype_prob, absent_prob,
    drop_prob, unexpressed_ratio, first_gene_type, first_bin_id, num_genes, max_length, measured_tg, table_n,
    out_ids, out_types, labels, out_offsets,
):  # fmt: skip  # pragma: no cover - compiled
    """Write the masked tokens and labels of all cells; see `DataCollatorForPhenotypicMLM`."""
    stamp = np.full(num_genes, -1, np.int32)
    longest = 0
    for row in range(len(cells_n)):
        longest = max(longest, offsets_n1[row + 1] - offsets_n1[row])
    fate, draws = np.zeros(longest, np.uint8), np.empty(longest)
    extra = np.empty(min(num_genes, int(unexpressed_ratio * longest) + 1), np.int64)
    at = 0
    for row in range(len(cells_n)):
        ids, types = ids_l[offsets_n1[row] : offsets_n1[row + 1]], types_l[offsets_n1[row] : offsets_n1[row + 1]]
        key = mix(cell_key(seed, epochs_n[row], cells_n[row]), _MASKING)
        dropped = _drop_genes(types, first_gene_type, drop_prob, key, fate)
        masked = _mask_genes(types, first_gene_type, gene_prob, key, fate, draws)
        wanted = min(int(unexpressed_ratio * masked + unit(mix(key, _ROUNDING))), num_genes)
        found = _draw_unexpressed(
            types, wanted, num_genes, first_gene_type, max_length, key, stamp, row, measured_tg[table_n[row]], extra
        )  # fmt: skip
        to_drop = max(0, len(types) - dropped + found - max_length)
        last_kept = len(types)
        while to_drop > 0 and last_kept > 0:
            last_kept -= 1
            to_drop -= types[last_kept] >= first_gene_type and fate[last_kept] == _KEPT
        found -= min(found, to_drop)
        first_gene, end = 0, len(types) - 1
        while first_gene < end and types[first_gene] < first_gene_type:
            type_, first_gene = types[first_gene], first_gene + 1
            out_ids[at], out_types[at], labels[at] = ids[first_gene - 1], type_, IGNORED
            if type_ > 0:
                if unit(mix(mix(key, _ABSENT), np.uint64(type_))) < absent_prob:
                    continue
                if unit(mix(mix(key, _ASKED), np.uint64(type_))) < phenotype_prob:
                    out_ids[at], labels[at] = MASK_ID, ids[first_gene - 1]
            at += 1
        if dropped == 0:
            sure = max(first_gene, min(last_kept, end))  # before here all genes stay
            genes = slice(first_gene, sure)
            at = _write_all(ids[genes], types[genes], fate[genes], out_ids, out_types, labels, at)
            first_gene = sure
        for k in range(first_gene, end):
            if fate[k] != _DROPPED and not (k >= last_kept and fate[k] == _KEPT):
                is_hidden = fate[k] == _HIDDEN
                out_ids[at], out_types[at] = MASK_ID if is_hidden else ids[k], types[k]
                labels[at] = ids[k] if is_hidden else IGNORED
                at += 1
        for k in range(found):
            out_ids[at], out_types[at], labels[at] = MASK_ID, extra[k], first_bin_id
            at += 1
        out_ids[at], out_types[at], labels[at] = ids[-1], types[-1], IGNORED
        at += 1
        out_offsets[row + 1] = at
