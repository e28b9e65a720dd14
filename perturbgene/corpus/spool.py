"""Pass two: cells dealt by a keyed shuffle to their shards, part by part, then shard by shard.

Owns the spool files (one per part, its rows sorted by where they go) and finishing shards from them; leaves the layout
of a shard's file to `shards`. Letters: n cells, g genes, l values, k columns of labels, s shards, t tables of genes.
"""

from collections.abc import Iterator, Sequence
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

from perturbgene.corpus.journal import entry_of, temporary_name
from perturbgene.corpus.manifest import BY_CELL
from perturbgene.corpus.shuffle import shuffled_positions
from perturbgene.corpus.statistics import by_gene, per_10_000
from perturbgene.corpus.survey import SPLITS, CellTable, Part, Plan, blocks_of, table_of
from perturbgene.data_utils.scale import TARGET_SUM, ExpressionBlock
from perturbgene.data_utils.shards import LIBRARY_SIZE_COLUMN, SOURCE_COLUMN, write_shard

SPOOL_FOLDER = "spool"

#: Column of `var` with the rank by variability; that of `tokenization`, which imports torch.
RANK_COLUMN = "highly_variable_rank"


@dataclass(frozen=True)
class Layout:
    """Where every cell goes and how it is written; decided after pass one.

    Args:
        plan: What was decided before.
        genes, symbols: The panel, in order.
        gene_to_panel: Place in the panel of each gene of the plan's panel, -1 where it was not chosen.
        labels: Phenotype -> all its labels, in both splits.
        units: All values of the column that is never split.
        as_counts: True writes counts, False log1p counts per 10,000.
        num_cells: Split -> cells.
        first_of_part: Split -> how many of its cells lie before each part.
        table_of_source: Which table of genes each file has.
        measured_tg: True where a table has a gene of the panel, shape (t, g).
    """

    plan: Plan
    genes: tuple[str, ...]
    symbols: tuple[str, ...]
    gene_to_panel: np.ndarray
    labels: dict[str, list[str]]
    units: list[str]
    as_counts: bool
    num_cells: dict[str, int]
    first_of_part: dict[str, np.ndarray]
    table_of_source: np.ndarray
    measured_tg: np.ndarray

    def num_shards(self, split: str) -> int:
        """Count the shards of a split, those included from which all cells are dropped."""
        return -(-self.num_cells[split] // self.plan.options.shard_size)

    @property
    def num_all_shards(self) -> int:
        """Count the shards of both splits."""
        return sum(map(self.num_shards, SPLITS))

    @property
    def label_columns(self) -> dict[str, list[str]]:
        """Column of obs -> its possible texts."""
        units = {} if self.plan.split_by == BY_CELL else {self.plan.split_by: self.units}
        return {**units, **self.labels} if self.plan.split_by not in self.labels else dict(self.labels)


class ShardTask(NamedTuple):
    """One shard to finish.

    Args:
        number: Its number among all shards of both splits, as in the spool.
        split: "train" or "eval".
        name: Its number among the shards of its split that hold cells.
    """

    number: int
    split: str
    name: int

    @property
    def file(self) -> str:
        """Path of the shard in the corpus."""
        return f"{self.split}/shard_{self.name:05d}.h5ad"


def _smallest_type(values_l: np.ndarray) -> np.dtype:
    """Return the narrowest type that holds the values exactly: an unsigned integer, float32 or float64."""
    if not values_l.size or (values_l == np.floor(values_l)).all():
        return np.min_scalar_type(int(values_l.max(initial=0)))
    return np.dtype(np.float32 if (values_l.astype(np.float32) == values_l).all() else np.float64)


def _content_hashes(matrix: sparse.csr_matrix) -> np.ndarray:
    """Hash the expressed genes and values of each cell, uint64 of shape (n,); equal cells have equal hashes."""
    key_l = matrix.indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    key_l ^= (matrix.data * 1024).astype(np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
    key_l = (key_l ^ (key_l >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    sums_n = np.add.reduceat(np.append(key_l, np.uint64(0)), matrix.indptr[:-1].astype(np.int64))
    return np.where(np.diff(matrix.indptr) > 0, sums_n, np.uint64(0))


class _Rows(NamedTuple):
    """Rows as they are written: panel genes (n, g), library sizes and hashes of the whole cells, both (n,)."""

    matrix: sparse.csr_matrix
    library_size_n: np.ndarray
    hash_n: np.ndarray


def _panel_rows(block: ExpressionBlock, layout: Layout) -> _Rows:
    """Return a block's panel genes, in panel order, as counts or as log1p counts per 10,000."""
    whole = by_gene(block)
    hash_n = _content_hashes(whole)
    if block.is_counts and not layout.as_counts:
        whole.data = np.log1p(per_10_000(block, whole)).astype(np.float32)
    panel_l = layout.gene_to_panel[whole.indices]
    is_kept_l = panel_l >= 0
    offsets = np.concatenate([[0], np.cumsum(is_kept_l)])[whole.indptr]
    data_l = whole.data[is_kept_l]
    parts = (data_l.astype(_smallest_type(data_l)), panel_l[is_kept_l], offsets)
    matrix = sparse.csr_matrix(parts, shape=(len(block), len(layout.genes)))
    matrix.sort_indices()
    size_n = block.library_size_n if block.library_size_n is not None else np.full(len(block), TARGET_SUM)
    return _Rows(matrix, size_n, hash_n)


def _stacked(blocks: Sequence[_Rows]) -> _Rows:
    matrix = sparse.vstack([rows.matrix for rows in blocks], format="csr")
    return _Rows(matrix, *(np.concatenate([rows[at] for rows in blocks]) for at in (1, 2)))


# -- spooling -----------------------------------------------------------------------------------------------------


def _destinations(layout: Layout, part: Part, is_eval_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shard (numbered over both splits) and the place in the shuffle of each row of a part."""
    shard_n, position_n = np.empty(len(is_eval_n), dtype=np.int64), np.empty(len(is_eval_n), dtype=np.int64)
    first_shard, options = 0, layout.plan.options
    for number, split in enumerate(SPLITS):
        rows_n = np.flatnonzero(is_eval_n == (split == "eval"))
        cells_n = layout.first_of_part[split][part.number] + np.arange(len(rows_n))
        size, key = layout.num_cells[split], 2 * options.seed + number + 1
        position_n[rows_n] = shuffled_positions(cells_n, size=size, key=key)
        shard_n[rows_n] = first_shard + position_n[rows_n] // options.shard_size
        first_shard += layout.num_shards(split)
    return shard_n, position_n


def _codes_of(layout: Layout, part: Part, table: CellTable) -> np.ndarray:
    """Return each row's labels as numbers into `layout.label_columns`, int32 of shape (n, k)."""
    columns = [
        table.labels.get(name, table.units).ids_in(texts)[part.start : part.stop]
        for name, texts in layout.label_columns.items()
    ]
    return np.stack(columns, axis=1) if columns else np.zeros((part.stop - part.start, 0), dtype=np.int32)


def spool_part(layout: Layout, part: Part) -> dict[str, Any]:
    """Write one part's rows sorted by their shards, and return its journal entry: how many cells were dropped."""
    plan = layout.plan
    table = table_of(plan, part.source)
    is_eval_n = table.is_eval(plan)[part.start : part.stop]
    rows = _stacked([_panel_rows(b, layout) for b in blocks_of(plan, part, np.arange(part.start, part.stop))])
    shard_n, position_n = _destinations(layout, part, is_eval_n)
    is_kept_n = np.diff(rows.matrix.indptr) >= plan.options.min_genes
    order = np.lexsort((position_n, shard_n))
    order = order[is_kept_n[order]]
    matrix = rows.matrix[order]
    names = [str(name).encode("utf-8", errors="surrogatepass") for name in table.names_n[part.start + order]]
    tensors = {
        "bounds_s1": np.searchsorted(shard_n[order], np.arange(layout.num_all_shards + 1)),
        "position_n": position_n[order],
        "offsets_n1": matrix.indptr.astype(np.int64),
        "values_l": matrix.data.astype(_smallest_type(matrix.data)),
        "columns_l": matrix.indices.astype(np.uint16 if len(layout.genes) <= 1 << 16 else np.int32),
        "library_size_n": rows.library_size_n[order],
        "hash_n": rows.hash_n[order],
        "codes_nk": np.ascontiguousarray(_codes_of(layout, part, table)[order]),
        "name_offsets_n1": np.concatenate([[0], np.cumsum([len(name) for name in names])]).astype(np.int64),
        "name_bytes": np.frombuffer(b"".join(names), dtype=np.uint8),
        "table": layout.table_of_source[[part.source]].astype(np.int32),
    }
    path = Path(plan.folder) / SPOOL_FOLDER / part.name
    temporary = temporary_name(path)
    save_file(tensors, temporary)
    temporary.replace(path)
    dropped = {split: int((~is_kept_n & (is_eval_n == (split == "eval"))).sum()) for split in SPLITS}
    return entry_of(path, Path(plan.folder), dropped=dropped)


# -- finishing shards ---------------------------------------------------------------------------------------------


def _slice(file: Any, name: str, first: int, last: int) -> np.ndarray:
    """Read neighbouring entries of a stored array; an empty slice is spelt out, as the format knows none."""
    stored = file.get_slice(name)
    return stored[first:last] if last > first else file.get_tensor(name)[:0]


class _Piece(NamedTuple):
    """What one part holds of one shard."""

    position_n: np.ndarray
    matrix: sparse.csr_matrix
    library_size_n: np.ndarray
    codes_nk: np.ndarray
    names: list[str]
    table: int


def _piece(file: Any, number: int, num_genes: int) -> _Piece | None:
    first, last = (int(bound) for bound in _slice(file, "bounds_s1", number, number + 2))
    if first == last:
        return None
    offsets, name_offsets = (_slice(file, name, first, last + 1) for name in ("offsets_n1", "name_offsets_n1"))
    values_l, columns_l = (_slice(file, name, int(offsets[0]), int(offsets[-1])) for name in ("values_l", "columns_l"))
    text = _slice(file, "name_bytes", int(name_offsets[0]), int(name_offsets[-1])).tobytes()
    bounds = (name_offsets - name_offsets[0]).tolist()
    names = [text[a:b].decode("utf-8", errors="surrogatepass") for a, b in pairwise(bounds)]
    matrix = sparse.csr_matrix((values_l, columns_l.astype(np.int32), offsets - offsets[0]), (last - first, num_genes))
    position_n, size_n, codes_nk = (
        _slice(file, name, first, last) for name in ("position_n", "library_size_n", "codes_nk")
    )
    return _Piece(position_n, matrix, size_n, codes_nk, names, int(file.get_tensor("table")[0]))


def _pieces(layout: Layout, number: int) -> Iterator[_Piece]:
    folder = Path(layout.plan.folder) / SPOOL_FOLDER
    for part in layout.plan.parts():
        with safe_open(folder / part.name, framework="np") as file:
            piece = _piece(file, number, len(layout.genes))
        if piece is not None:
            yield piece


def _obs(layout: Layout, pieces: Sequence[_Piece], order: np.ndarray) -> pd.DataFrame:
    codes_nk = np.concatenate([piece.codes_nk for piece in pieces])[order]
    table: dict[str, Any] = {}
    for column, (name, texts) in enumerate(layout.label_columns.items()):
        texts_n = np.array([*texts, None], dtype=object)[codes_nk[:, column]]
        table[name] = pd.Categorical(np.where(texts_n == "", None, texts_n))
    ordered = [name for name in (*layout.labels, layout.plan.split_by) if name in table]
    frame = {name: table[name] for name in dict.fromkeys(ordered)}
    frame[LIBRARY_SIZE_COLUMN] = np.concatenate([piece.library_size_n for piece in pieces])[order]
    sources_n = np.concatenate([np.full(len(piece.names), piece.table, dtype=np.int32) for piece in pieces])
    frame[SOURCE_COLUMN] = sources_n[order]
    names = np.array([name for piece in pieces for name in piece.names], dtype=object)[order]
    return pd.DataFrame(frame, index=ad.utils.make_index_unique(pd.Index(names.astype(str))))


def _var(layout: Layout) -> pd.DataFrame:
    symbols = layout.symbols or layout.genes
    frame = pd.DataFrame({"feature_name": symbols, RANK_COLUMN: np.arange(len(symbols))})
    return frame.set_axis(pd.Index(layout.genes, dtype=str))


def finish_shard(layout: Layout, task: ShardTask) -> dict[str, Any]:
    """Write one shard from the spool, its cells in the order of the shuffle, and return its journal entry."""
    pieces = list(_pieces(layout, task.number))
    order = np.argsort(np.concatenate([piece.position_n for piece in pieces]))
    matrix = sparse.vstack([piece.matrix for piece in pieces], format="csr")[order]
    matrix.data = matrix.data.astype(_smallest_type(matrix.data))
    path = Path(layout.plan.folder) / task.file
    obs = _obs(layout, pieces, order)
    write_shard(path, matrix, obs=obs, var=_var(layout), measured_tg=layout.measured_tg)
    return entry_of(path, Path(layout.plan.folder), cells=len(order))


def cells_of_shards(layout: Layout) -> np.ndarray:
    """Count the cells that each shard holds after dropping, int64 of shape (s,)."""
    counts_s = np.zeros(layout.num_all_shards, dtype=np.int64)
    for part in layout.plan.parts():
        with safe_open(Path(layout.plan.folder) / SPOOL_FOLDER / part.name, framework="np") as file:
            counts_s += np.diff(file.get_tensor("bounds_s1"))
    return counts_s


def tasks_of(layout: Layout) -> list[ShardTask]:
    """List the shards that hold cells."""
    counts_s, tasks, first = cells_of_shards(layout), [], 0
    for split in SPLITS:
        numbers = first + np.flatnonzero(counts_s[first : first + layout.num_shards(split)])
        tasks += [ShardTask(int(number), split, name) for name, number in enumerate(numbers)]
        first += layout.num_shards(split)
    return tasks


def hashes_of(layout: Layout) -> dict[str, np.ndarray]:
    """Return the content hash of every written cell of each split."""
    bound, found = layout.num_shards("train"), {split: [np.zeros(0, dtype=np.uint64)] for split in SPLITS}
    for part in layout.plan.parts():
        with safe_open(Path(layout.plan.folder) / SPOOL_FOLDER / part.name, framework="np") as file:
            cut, hash_n = int(file.get_tensor("bounds_s1")[bound]), file.get_tensor("hash_n")
        found["train"].append(hash_n[:cut])
        found["eval"].append(hash_n[cut:])
    return {split: np.concatenate(parts) for split, parts in found.items()}
