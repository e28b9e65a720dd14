"""Pass two over the values: a keyed shuffle deals cells to their shards, part by part, then shard by shard.

Owns the shuffle, the spool files (one per part, its rows sorted by where they go) and writing shards from them; leaves
the layout of a shard's file to `data_utils.shards`. Letters: n cells, g genes, l values, k columns of labels, s shards,
t tables of genes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import sparse

from perturbgene.corpus.manifest import BY_CELL
from perturbgene.corpus.statistics import by_gene, per_10_000
from perturbgene.corpus.survey import SPLITS, Part, Plan, blocks_of, table_of
from perturbgene.data_utils.genes import GenePanel
from perturbgene.data_utils.order import mix
from perturbgene.data_utils.scale import TARGET_SUM
from perturbgene.data_utils.shards import LIBRARY_SIZE_COLUMN, SOURCE_COLUMN, write_shard

SPOOL_FOLDER = "spool"

#: Column of `var` with the rank by variability.
RANK_COLUMN = "highly_variable_rank"

_ROUNDS = 6

#: The shared hash as plain NumPy, for whole arrays.
_mix: Any = mix.py_func


@dataclass(frozen=True)
class Layout:
    """Where every cell goes and how it is written; decided after pass one.

    Args:
        plan: What was decided before.
        panel: The genes of the corpus.
        panel_of_union: Place in the panel of each gene of all files, -1 if it was not chosen.
        labels: Phenotype -> all its labels, in both splits.
        units: All values of the column that is kept whole.
        as_counts: True writes counts, False log1p counts per 10,000.
        num_cells: Split -> cells.
        first_of_part: Split -> how many of its cells come before each part.
        table_of_source: Each file's table of genes.
        measured_tg: True where a table has a gene of the panel, shape (t, g).
    """

    plan: Plan
    panel: GenePanel
    panel_of_union: np.ndarray
    labels: dict[str, list[str]]
    units: list[str]
    as_counts: bool
    num_cells: dict[str, int]
    first_of_part: dict[str, np.ndarray]
    table_of_source: np.ndarray
    measured_tg: np.ndarray

    def num_shards(self, split: str) -> int:
        """Count the shards of a split, including those from which all cells are dropped."""
        return -(-self.num_cells[split] // self.plan.config.shard_size)

    @property
    def label_columns(self) -> dict[str, list[str]]:
        """Column of obs -> its possible texts, in the order of the spool."""
        by = self.plan.split.by
        return dict(self.labels) if by == BY_CELL or by in self.labels else {by: self.units, **self.labels}


# -- the shuffle --------------------------------------------------------------------------------------------------


def shuffled_positions(numbers_n: np.ndarray, *, size: int, key: int) -> np.ndarray:
    """Return where a keyed shuffle of 0..size-1 puts each number, int64 of shape (n,), without holding the whole.

    A Feistel network is a permutation whatever its round function. Numbers that leave the range are permuted again
    until they are back in it ("cycle walking", Black and Rogaway 2002).

    Example:
        >>> sorted(shuffled_positions(np.arange(5), size=5, key=1).tolist())
        [0, 1, 2, 3, 4]
    """
    half_bits = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
    positions_n = _feistel(numbers_n.astype(np.uint64), half_bits=half_bits, key=key)
    while (is_outside_n := positions_n >= np.uint64(max(size, 1))).any():
        positions_n[is_outside_n] = _feistel(positions_n[is_outside_n], half_bits=half_bits, key=key)
    return positions_n.astype(np.int64)


def _feistel(numbers_n: np.ndarray, *, half_bits: int, key: int) -> np.ndarray:
    """Permute numbers of 2 * half_bits bits."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = numbers_n >> shift, numbers_n & mask
    for number in range(_ROUNDS):
        round_key = np.uint64((key * _ROUNDS + number) & 0xFFFFFFFFFFFFFFFF)
        left, right = right, left ^ (_mix(round_key, right) & mask)
    return np.asarray((left << shift) | right)


# -- parts to spool files -----------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """Rows as they are written: panel genes (n, g); library sizes and content hashes of the whole cells, both (n,)."""

    matrix: sparse.csr_matrix
    library_size_n: np.ndarray
    hash_n: np.ndarray


def spool_part(layout: Layout, part: Part, path: Path) -> dict[str, Any]:
    """Write one part's rows sorted by their shards; return how many cells were dropped in each split."""
    plan = layout.plan
    table = table_of(plan, part.source)
    is_eval_n = plan.split.is_eval(table)[part.start : part.stop]
    rows = _rows_of(layout, part)
    shard_n, position_n = _destinations(layout, part, is_eval_n)
    is_kept_n = np.diff(rows.matrix.indptr) >= plan.config.min_genes
    order = np.lexsort((position_n, shard_n))
    order = order[is_kept_n[order]]
    matrix = rows.matrix[order]
    names = [str(name).encode("utf-8", errors="surrogatepass") for name in table.names_n[part.start + order]]
    codes = [
        table.labels.get(name, table.units).codes_in(texts)[part.start + order]
        for name, texts in layout.label_columns.items()
    ]
    tensors = {
        "bounds_s1": np.searchsorted(shard_n[order], np.arange(sum(map(layout.num_shards, SPLITS)) + 1)),
        "position_n": position_n[order],
        "offsets_n1": matrix.indptr.astype(np.int64),
        "values_l": matrix.data.astype(_smallest_type(matrix.data)),
        "columns_l": matrix.indices.astype(np.uint16 if len(layout.panel) <= 1 << 16 else np.int32),
        "library_size_n": rows.library_size_n[order],
        "hash_n": rows.hash_n[order],
        "codes_nk": np.stack(codes, axis=1) if codes else np.zeros((len(order), 0), dtype=np.int32),
        "name_offsets_n1": np.concatenate([[0], np.cumsum([len(name) for name in names])]).astype(np.int64),
        "name_bytes": np.frombuffer(b"".join(names), dtype=np.uint8),
        "table": layout.table_of_source[[part.source]].astype(np.int32),
    }
    save_file(tensors, path)
    return {"dropped": {split: int((~is_kept_n & (is_eval_n == (split == "eval"))).sum()) for split in SPLITS}}


def _rows_of(layout: Layout, part: Part) -> _Rows:
    """Read a part's rows over the panel, in its order, as counts or as log1p counts per 10,000."""
    matrices, sizes, hashes = [], [], []
    for block in blocks_of(layout.plan, part, np.arange(part.start, part.stop)):
        whole = by_gene(block)
        # Cells with the same genes and values have the same sum of hashes; a cell without any has 0.
        hash_l = _mix(whole.indices.astype(np.uint64) << np.uint64(40), (whole.data * 1024).astype(np.uint64))
        sums_n = np.add.reduceat(np.append(hash_l, np.uint64(0)), whole.indptr[:-1].astype(np.int64))
        hashes.append(np.where(np.diff(whole.indptr) > 0, sums_n, np.uint64(0)))
        if block.is_counts and not layout.as_counts:
            whole.data = np.log1p(per_10_000(block, whole)).astype(np.float32)
        panel_l = layout.panel_of_union[whole.indices]
        is_kept_l = panel_l >= 0
        offsets = np.concatenate([[0], np.cumsum(is_kept_l)])[whole.indptr]
        data_l = whole.data[is_kept_l]
        parts = (data_l.astype(_smallest_type(data_l)), panel_l[is_kept_l], offsets)
        matrices.append(sparse.csr_matrix(parts, shape=(len(block), len(layout.panel))))
        matrices[-1].sort_indices()
        size_n = block.library_size_n
        sizes.append(size_n if size_n is not None else np.full(len(block), TARGET_SUM))
    return _Rows(sparse.vstack(matrices, format="csr"), np.concatenate(sizes), np.concatenate(hashes))


def _smallest_type(values_l: np.ndarray) -> np.dtype:
    """Return the narrowest type that holds the values exactly: an unsigned integer, float32 or float64."""
    if not values_l.size or (values_l == np.floor(values_l)).all():
        return np.min_scalar_type(int(values_l.max(initial=0)))
    return np.dtype(np.float32 if (values_l.astype(np.float32) == values_l).all() else np.float64)


def _destinations(layout: Layout, part: Part, is_eval_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shard (numbered over both splits) and the place in the shuffle of each row of a part."""
    shard_n, position_n = np.empty(len(is_eval_n), dtype=np.int64), np.empty(len(is_eval_n), dtype=np.int64)
    first_shard, config = 0, layout.plan.config
    for number, split in enumerate(SPLITS):
        rows_n = np.flatnonzero(is_eval_n == (split == "eval"))
        cells_n = layout.first_of_part[split][part.number] + np.arange(len(rows_n))
        key = 2 * config.seed + number + 1
        position_n[rows_n] = shuffled_positions(cells_n, size=layout.num_cells[split], key=key)
        shard_n[rows_n] = first_shard + position_n[rows_n] // config.shard_size
        first_shard += layout.num_shards(split)
    return shard_n, position_n


# -- spool files to shards ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spool:
    """What the spool files hold in all.

    Args:
        shards: File of each shard that holds cells -> its split and its number over both splits.
        hashes: Split -> content hash of every cell.
    """

    shards: dict[str, tuple[str, int]]
    hashes: dict[str, np.ndarray]

    @classmethod
    def of(cls, layout: Layout) -> "Spool":
        """Read the spool files' bounds and hashes."""
        num_train = layout.num_shards("train")
        counts_s = np.zeros(num_train + layout.num_shards("eval"), dtype=np.int64)
        hashes: dict[str, list[np.ndarray]] = {split: [np.zeros(0, dtype=np.uint64)] for split in SPLITS}
        for part in layout.plan.parts():
            with safe_open(layout.plan.folder / SPOOL_FOLDER / part.name, framework="np") as file:
                bounds_s1, hash_n = file.get_tensor("bounds_s1"), file.get_tensor("hash_n")
            counts_s += np.diff(bounds_s1)
            hashes["train"].append(hash_n[: bounds_s1[num_train]])
            hashes["eval"].append(hash_n[bounds_s1[num_train] :])
        shards: dict[str, tuple[str, int]] = {}
        for split, numbers in zip(SPLITS, np.split(np.arange(len(counts_s)), [num_train]), strict=True):
            for name, number in enumerate(numbers[counts_s[numbers] > 0].tolist()):
                shards[f"{split}/shard_{name:05d}.h5ad"] = (split, number)
        return cls(shards, {split: np.concatenate(parts) for split, parts in hashes.items()})


class _Piece(NamedTuple):
    """What one part holds of one shard."""

    position_n: np.ndarray
    matrix: sparse.csr_matrix
    library_size_n: np.ndarray
    codes_nk: np.ndarray
    names: list[str]
    table: int


def write_shuffled(layout: Layout, shard: tuple[str, int], path: Path) -> dict[str, Any]:
    """Write one shard from the spool, its cells in the order of the shuffle; return its number of cells."""
    pieces = list(_pieces_of(layout, shard[1]))
    order = np.argsort(np.concatenate([piece.position_n for piece in pieces]))
    matrix = sparse.vstack([piece.matrix for piece in pieces], format="csr")[order]
    matrix.data = matrix.data.astype(_smallest_type(matrix.data))
    symbols = layout.panel.symbols or layout.panel.genes
    var = pd.DataFrame({"feature_name": symbols, RANK_COLUMN: np.arange(len(symbols))})
    var.index = pd.Index(layout.panel.genes, dtype=str)
    write_shard(path, matrix, obs=_obs_of(layout, pieces, order), var=var, measured_tg=layout.measured_tg)
    return {"cells": len(order)}


def _pieces_of(layout: Layout, number: int) -> Iterator[_Piece]:
    """Read what each part holds of a shard."""
    for part in layout.plan.parts():
        with safe_open(layout.plan.folder / SPOOL_FOLDER / part.name, framework="np") as file:
            first, last = (int(bound) for bound in _slice(file, "bounds_s1", number, number + 2))
            if first == last:
                continue
            offsets, name_offsets = (_slice(file, name, first, last + 1) for name in ("offsets_n1", "name_offsets_n1"))
            values_l, columns_l = (_slice(file, name, offsets[0], offsets[-1]) for name in ("values_l", "columns_l"))
            text = _slice(file, "name_bytes", name_offsets[0], name_offsets[-1]).tobytes()
            bounds = (name_offsets - name_offsets[0]).tolist()
            parts = (values_l, columns_l.astype(np.int32), offsets - offsets[0])
            yield _Piece(
                position_n=_slice(file, "position_n", first, last),
                matrix=sparse.csr_matrix(parts, (last - first, len(layout.panel))),
                library_size_n=_slice(file, "library_size_n", first, last),
                codes_nk=_slice(file, "codes_nk", first, last),
                names=[text[a:b].decode("utf-8", errors="surrogatepass") for a, b in pairwise(bounds)],
                table=int(file.get_tensor("table")[0]),
            )


def _slice(file: Any, name: str, first: Any, last: Any) -> np.ndarray:
    """Read neighboring entries of a stored array; safetensors itself cannot read an empty slice."""
    return file.get_slice(name)[int(first) : int(last)] if last > first else file.get_tensor(name)[:0]


def _obs_of(layout: Layout, pieces: list[_Piece], order: np.ndarray) -> pd.DataFrame:
    codes_nk = np.concatenate([piece.codes_nk for piece in pieces])[order]
    table: dict[str, Any] = {}
    for column, (name, texts) in enumerate(layout.label_columns.items()):
        texts_n = np.array([*texts, None], dtype=object)[codes_nk[:, column]]
        table[name] = pd.Categorical(np.where(texts_n == "", None, texts_n))
    ordered = dict.fromkeys(name for name in (*layout.labels, layout.plan.split.by) if name in table)
    frame = {name: table[name] for name in ordered}
    frame[LIBRARY_SIZE_COLUMN] = np.concatenate([piece.library_size_n for piece in pieces])[order]
    sources_n = np.concatenate([np.full(len(piece.names), piece.table, dtype=np.int32) for piece in pieces])
    frame[SOURCE_COLUMN] = sources_n[order]
    names = np.array([name for piece in pieces for name in piece.names], dtype=object)[order]
    return pd.DataFrame(frame, index=ad.utils.make_index_unique(pd.Index(names.astype(str))))
