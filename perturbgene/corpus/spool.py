"""Pass two over the values: a keyed shuffle deals cells to their shards, part by part, then shard by shard.

Owns the shuffle, the spool files (one per part, its rows sorted by where they go) and writing shards from them; leaves
the layout of a shard's file to `data_utils.shards`. Letters: n cells, g genes, l values, k columns of labels, s shards,
t tables of genes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy import sparse

from perturbgene.corpus.panel import RANK_COLUMN, CorpusGenes
from perturbgene.corpus.statistics import by_gene, per_10_000
from perturbgene.corpus.survey import SPLITS, Part, Plan, blocks_of, cells_of, names_of_cells, opened
from perturbgene.data_utils.h5ad_writing import write_shard
from perturbgene.data_utils.kernels import mix_many
from perturbgene.data_utils.scale import TARGET_SUM
from perturbgene.data_utils.shards import SOURCE_COLUMN
from perturbgene.data_utils.values import LIBRARY_SIZE_COLUMN

SPOOL_FOLDER = "spool"

_ROUNDS = 6


@dataclass(frozen=True)
class Layout:
    """Where every cell goes and how it is written; decided after pass one."""

    plan: Plan
    genes: CorpusGenes
    texts: dict[str, list[str]]  # column of obs -> all its labels, in both splits
    num_cells: dict[str, int]  # split -> cells
    num_shards: dict[str, int]  # split -> shards, also those from which all cells are dropped
    first_of_part: dict[str, np.ndarray]  # split -> how many of its cells come before each part


def shuffled_positions(numbers_n: np.ndarray, *, size: int, key: int) -> np.ndarray:
    """Return where a keyed shuffle of 0..size-1 puts each number, int64 of shape (n,), without holding the whole.

    A Feistel network is a permutation whatever its round function. Numbers that leave the range are permuted again
    until they are back in it ("cycle walking", Black and Rogaway 2002).

    Example:
        >>> sorted(shuffled_positions(np.arange(5), size=5, key=1).tolist())
        [0, 1, 2, 3, 4]
    """
    half_bits = max(1, ((max(size, 2) - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    positions_n = numbers_n.astype(np.uint64)
    is_outside_n = np.ones(len(positions_n), dtype=bool)
    while is_outside_n.any():
        left, right = positions_n[is_outside_n] >> shift, positions_n[is_outside_n] & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix_many(key * _ROUNDS + number, right) & mask)
        positions_n[is_outside_n] = (left << shift) | right
        is_outside_n = positions_n >= np.uint64(max(size, 1))
    return positions_n.astype(np.int64)


def spool_part(layout: Layout, part: Part, path: Path) -> dict[str, Any]:
    """Write one part's rows sorted by their shards; return how many cells were dropped in each split."""
    config, (table, is_eval_n) = layout.plan.config, cells_of(layout.plan, part)
    matrix, library_size_n, hash_n = _rows_of(layout, part)
    shard_n, position_n = np.empty(len(is_eval_n), dtype=np.int64), np.empty(len(is_eval_n), dtype=np.int64)
    for number, split in enumerate(SPLITS):
        rows_n = np.flatnonzero(is_eval_n == (split == "eval"))
        cells_n = layout.first_of_part[split][part.number] + np.arange(len(rows_n))
        key = 2 * config.seed + number + 1
        position_n[rows_n] = shuffled_positions(cells_n, size=layout.num_cells[split], key=key)
        first_shard = layout.num_shards["train"] if split == "eval" else 0
        shard_n[rows_n] = first_shard + position_n[rows_n] // config.shard_size
    is_kept_n = np.diff(matrix.indptr) >= config.min_genes
    order = np.lexsort((position_n, shard_n))
    order = order[is_kept_n[order]]
    matrix = matrix[order]
    names_n = names_of_cells(opened(layout.plan, part.source)[0], part.start, part.stop)
    names = [name.encode("utf-8", errors="surrogatepass") for name in names_n[order]]
    codes_nk = np.empty((len(order), len(layout.texts)), dtype=np.int32)
    for column, (name, texts) in enumerate(layout.texts.items()):
        labels = table.labels.get(name, table.units)
        known = pd.Index(texts, dtype=object).get_indexer(pd.Index(labels.texts, dtype=object))
        codes_nk[:, column] = known[labels.codes_n[part.start + order]]
    tensors = {
        "bounds_s1": np.searchsorted(shard_n[order], np.arange(sum(layout.num_shards.values()) + 1)),
        "position_n": position_n[order],
        "offsets_n1": matrix.indptr.astype(np.int64),
        "values_l": matrix.data.astype(_smallest_type(matrix.data)),
        "columns_l": matrix.indices.astype(np.uint16 if matrix.shape[1] <= 1 << 16 else np.int32),
        "library_size_n": library_size_n[order],
        "hash_n": hash_n[order],
        "codes_nk": codes_nk,
        "name_offsets_n1": np.cumsum([0, *map(len, names)]),
        "name_bytes": np.frombuffer(b"".join(names), dtype=np.uint8),
    }
    save_file(tensors, path)
    return {"dropped": {split: int((~is_kept_n & (is_eval_n == (split == "eval"))).sum()) for split in SPLITS}}


def _rows_of(layout: Layout, part: Part) -> tuple[sparse.csr_matrix, np.ndarray, np.ndarray]:
    """Read a part's rows over the panel, and the library size and content hash of each whole cell, both (n,)."""
    matrices, sizes, hashes = [], [], []
    for block in blocks_of(layout.plan, part, np.arange(part.start, part.stop)):
        whole = by_gene(block)
        # Cells with the same genes and values have the same sum of hashes; a cell without any has 0.
        hash_l = mix_many(whole.indices.astype(np.uint64) << np.uint64(40), (whole.data * 1024).astype(np.uint64))
        sums_n = np.add.reduceat(np.append(hash_l, np.uint64(0)), whole.indptr[:-1].astype(np.int64))
        hashes.append(np.where(np.diff(whole.indptr) > 0, sums_n, np.uint64(0)))
        if block.is_linear and not layout.plan.as_counts:
            whole.data = np.log1p(per_10_000(block, whole)).astype(np.float32)
        panel_l = layout.genes.panel_of_union[whole.indices]
        is_kept_l = panel_l >= 0
        offsets = np.concatenate([[0], np.cumsum(is_kept_l)])[whole.indptr]
        data_l = whole.data[is_kept_l]
        parts = (data_l.astype(_smallest_type(data_l)), panel_l[is_kept_l], offsets)
        matrices.append(sparse.csr_matrix(parts, shape=(len(block), len(layout.genes.panel))))
        matrices[-1].sort_indices()
        size_n = block.library_size_n
        sizes.append(size_n if size_n is not None else np.full(len(block), TARGET_SUM))
    return sparse.vstack(matrices, format="csr"), np.concatenate(sizes), np.concatenate(hashes)


def _smallest_type(values_l: np.ndarray) -> np.dtype:
    """Return the narrowest type that holds the values exactly: an unsigned integer, float32 or float64."""
    if not values_l.size or (values_l == np.floor(values_l)).all():
        return np.min_scalar_type(int(values_l.max(initial=0)))
    return np.dtype(np.float32 if (values_l.astype(np.float32) == values_l).all() else np.float64)


def read_spool(layout: Layout) -> dict[str, tuple[str, int]]:
    """Return the file of each shard that holds cells -> its split and number."""
    num_train = layout.num_shards["train"]
    counts_s = np.zeros(sum(layout.num_shards.values()), dtype=np.int64)
    for part in layout.plan.parts():
        with safe_open(layout.plan.folder / SPOOL_FOLDER / part.name, framework="np") as file:
            counts_s += np.diff(file.get_tensor("bounds_s1"))
    shards: dict[str, tuple[str, int]] = {}
    for split, numbers in zip(SPLITS, np.split(np.arange(len(counts_s)), [num_train]), strict=True):
        for name, number in enumerate(numbers[counts_s[numbers] > 0].tolist()):
            shards[f"{split}/shard_{name:05d}.h5ad"] = (split, number)
    return shards


def read_hashes(layout: Layout) -> dict[str, np.ndarray]:
    """Return split -> content hash of every cell that is kept, sorted: once in memory, 8 bytes a cell."""
    hashes = {split: np.empty(layout.num_cells[split], dtype=np.uint64) for split in SPLITS}
    filled = dict.fromkeys(SPLITS, 0)
    for part in layout.plan.parts():
        with safe_open(layout.plan.folder / SPOOL_FOLDER / part.name, framework="np") as file:
            num_train = file.get_tensor("bounds_s1")[layout.num_shards["train"]]
            for split, found_n in zip(SPLITS, np.split(file.get_tensor("hash_n"), [num_train]), strict=True):
                hashes[split][filled[split] : filled[split] + len(found_n)] = found_n
                filled[split] += len(found_n)
    for split, hash_n in hashes.items():
        hashes[split] = hash_n[: filled[split]]
        hashes[split].sort()
    return hashes


@dataclass(frozen=True)
class DealtCells:
    """What became of the cells when they were dealt to shards.

    Args:
        num_kept, num_dropped: Split -> cells; those that are dropped express too few genes of the panel.
        num_copies: Split -> cells that are exact copies of another cell of the split.
        num_shared: Eval cells that are exact copies of a training cell.
        dropped_of_file: Cells dropped from each file.
        sizes_of_file: Library sizes of each file, as `library_sizes` returns them.
    """

    num_kept: dict[str, int]
    num_dropped: dict[str, int]
    num_copies: dict[str, int]
    num_shared: int
    dropped_of_file: list[int]
    sizes_of_file: list[list[float]]

    @classmethod
    def of(cls, plan: Plan, entries: Sequence[Mapping[str, Any]], hashes: Mapping[str, np.ndarray]) -> "DealtCells":
        """Sum up what `spool_part` and `read_hashes` returned."""
        dropped_of_file, train_n, eval_n = [0] * len(plan.sources), hashes["train"], hashes["eval"]
        for part, entry in zip(plan.parts(), entries, strict=True):
            dropped_of_file[part.source] += sum(entry["dropped"].values())
        return cls(
            num_kept={split: len(hash_n) for split, hash_n in hashes.items()},
            num_dropped={split: sum(entry["dropped"][split] for entry in entries) for split in SPLITS},
            num_copies={split: int((hash_n[1:] == hash_n[:-1]).sum()) for split, hash_n in hashes.items()},
            num_shared=int((np.searchsorted(train_n, eval_n) < np.searchsorted(train_n, eval_n, side="right")).sum()),
            dropped_of_file=dropped_of_file, sizes_of_file=library_sizes(plan),
        )  # fmt: skip


def library_sizes(plan: Plan) -> list[list[float]]:
    """Return the lowest library size, the quartiles and the highest of each file's cells.

    Empty where the values do not tell them, such as logs, and where no cell is kept.
    """
    found: list[list[float]] = [[] for _ in plan.sources]
    for source, parts in groupby(plan.parts(), key=lambda part: part.source):
        sizes = []
        for part in parts:
            with safe_open(plan.folder / SPOOL_FOLDER / part.name, framework="np") as file:
                sizes.append(file.get_tensor("library_size_n"))
        size_n = np.concatenate(sizes)
        if len(size_n) and not np.allclose(size_n, TARGET_SUM, rtol=1e-6):
            found[source] = np.quantile(size_n, (0, 0.25, 0.5, 0.75, 1)).round(1).tolist()
    return found


def write_shuffled(layout: Layout, shard: tuple[str, int], path: Path) -> dict[str, Any]:
    """Write one shard from the spool, its cells in the order of the shuffle; return its number of cells."""
    panel, pieces = layout.genes.panel, list(_pieces_of(layout, shard[1]))
    matrix = sparse.vstack([piece.pop("matrix") for piece in pieces], format="csr")
    column = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    order = np.argsort(column["position_n"])
    matrix = matrix[order]
    matrix.data = matrix.data.astype(_smallest_type(matrix.data))
    obs = pd.DataFrame(index=ad.utils.make_index_unique(pd.Index(column["name_n"][order].astype(str))))
    for number, (name, texts) in enumerate(layout.texts.items()):
        texts_n = np.array([*texts, None], dtype=object)[column["codes_nk"][order, number]]
        obs[name] = pd.Categorical(np.where(texts_n == "", None, texts_n))
    obs[LIBRARY_SIZE_COLUMN] = column["library_size_n"][order]
    obs[SOURCE_COLUMN] = column["table_n"][order]
    symbols = panel.symbols or panel.genes
    var = pd.DataFrame({"feature_name": symbols, RANK_COLUMN: np.arange(len(symbols))})
    var.index = pd.Index(panel.genes, dtype=str)
    write_shard(path, matrix, obs=obs, var=var, measured_tg=layout.genes.measured_tg)
    return {"cells": len(order)}


def _pieces_of(layout: Layout, number: int) -> Iterator[dict[str, Any]]:
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
            names = [text[a:b].decode("utf-8", errors="surrogatepass") for a, b in pairwise(bounds)]
            parts = (values_l, columns_l.astype(np.int32), offsets - offsets[0])
            yield {
                "matrix": sparse.csr_matrix(parts, (last - first, len(layout.genes.panel))),
                "name_n": np.array(names, dtype=object),
                "table_n": np.full(last - first, layout.plan.table_of_source[part.source], dtype=np.int32),
                **{name: _slice(file, name, first, last) for name in ("position_n", "library_size_n", "codes_nk")},
            }


def _slice(file: Any, name: str, first: Any, last: Any) -> np.ndarray:
    """Read neighboring entries of a stored array; safetensors itself cannot read an empty slice."""
    return file.get_slice(name)[int(first) : int(last)] if last > first else file.get_tensor(name)[:0]
