"""What every process that helps to prepare a corpus must know: the options, the files in order, who is held out.

Owns the options, the cut into parts, the table of a file's cells and opening files in the process that reads them;
leaves counting to `statistics` and writing to `spool`. Letters: n cells, l values.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from perturbgene.cli.options import named_values
from perturbgene.corpus.manifest import BY_CELL
from perturbgene.data_utils.genes import GenePanel, names_of
from perturbgene.data_utils.labels import Vocabulary, is_missing, label_text
from perturbgene.data_utils.opening import H5adFile
from perturbgene.data_utils.scale import ExpressionBlock, Normalization, check_values
from perturbgene.data_utils.shards import Shard, ShardCache
from perturbgene.errors import InputError

SPLITS = ("train", "eval")
HvgFlavor = Literal["auto", "seurat", "seurat_v3"]

#: A numeric obs column with more distinct values than this is a measurement, not a phenotype.
MOST_NUMERIC_LABELS = 50

#: Rows of one part: what a process reads, counts and spools as one task. Fixed, because sums of parts are added in
#: order, so that corpora do not depend on the number of processes.
PART_ROWS = 8192

_BLOCK_ROWS = 1024
_SAMPLE_ROWS = 64


@dataclass(frozen=True)
class PrepareOptions:
    """How a corpus is made; the fields of `configs.PrepareConfig` under the same names, where they are explained."""

    phenotypes: Sequence[str] = ()
    split_by: str | None = None
    eval_fraction: float = 0.2
    eval_donors: Sequence[str] = ()
    num_top_genes: int | None = None
    hvg_flavor: HvgFlavor = "auto"
    bin_edges: Sequence[float] | None = None
    bin_edges_path: str | None = None
    num_bins: int = 8
    per_gene_bins: bool = False
    normalization: Normalization = "auto"
    layer: str | None = None
    gene_id_column: str | None = None
    panel: str | None = None
    shard_size: int = 10_000
    min_genes: int = 1
    overwrite: bool = False
    num_processes: int = 0
    scheduler: str | None = None
    seed: int = 0

    @property
    def column_of_phenotype(self) -> dict[str, str]:
        """Phenotype -> obs column, from entries `name` or `name=column`."""
        return {name: column or name for name, column in named_values(self.phenotypes, flag="phenotypes").items()}


class Part(NamedTuple):
    """Neighbouring rows of one file."""

    number: int
    source: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of the files that hold what was made of it."""
        return f"part_{self.number:06d}.safetensors"


@dataclass(frozen=True)
class Plan:
    """The files in their final order and what is decided before any value is read.

    Args:
        key: Fingerprint of all that the corpus depends on.
        folder: Where parts and shards are written.
        sources, sizes: The files (or AnnData objects), and their cells.
        panel: The genes of all files.
        split_by: The obs column that is never split, or "cell".
        eval_units: Values of that column that are held out.
        highest_eval_key: When split by cell: cells whose key is at most this are held out.
        flavor: How genes are ranked.
    """

    key: str
    folder: str
    options: PrepareOptions
    sources: tuple[Any, ...]
    sizes: tuple[int, ...]
    panel: GenePanel
    split_by: str
    eval_units: frozenset[str] = frozenset()
    highest_eval_key: int = -1
    flavor: HvgFlavor = "seurat"

    def parts(self) -> list[Part]:
        """Cut all files into parts of at most `PART_ROWS` rows."""
        spans = [(s, a, min(a + PART_ROWS, n)) for s, n in enumerate(self.sizes) for a in range(0, n, PART_ROWS)]
        return [Part(number, *span) for number, span in enumerate(spans)]

    def cache(self) -> ShardCache:
        """Return the files, aligned to all genes; opened when used."""
        return ShardCache(
            self.sources, layer=self.options.layer, panel=self.panel, vocabulary=Vocabulary({}),
            normalization=self.options.normalization, gene_id_column=self.options.gene_id_column,
        )  # fmt: skip


# -- the table of cells -------------------------------------------------------------------------------------------


class Labels(NamedTuple):
    """One obs column: the number of each cell's text, int32 of shape (n,); '' is the text of missing ones."""

    codes_n: np.ndarray
    texts: tuple[str, ...]

    def ids_in(self, known: Sequence[str]) -> np.ndarray:
        """Return each cell's place in a list of texts, int32 of shape (n,), -1 where it is not listed."""
        place = {text: index for index, text in enumerate(known)}
        return np.array([place.get(text, -1) for text in self.texts], dtype=np.int32)[self.codes_n]

    def is_in(self, chosen: frozenset[str]) -> np.ndarray:
        """True for cells whose text is one of these, shape (n,)."""
        return np.array([text in chosen for text in self.texts], dtype=bool)[self.codes_n]


def labels_of(values_n: pd.Series) -> Labels:
    """Spell one obs column as labels."""
    factor = pd.Categorical(values_n)
    texts = (*map(label_text, factor.categories), "")
    return Labels(np.where(factor.codes < 0, len(texts) - 1, factor.codes).astype(np.int32), texts)


def phenotype_of(shard: Shard, category: str, column: str) -> Labels:
    """Read the labels of a phenotype; the spellings of "not known" count as missing.

    Raises:
        InputError: There is no such column, or it holds measurements.
    """
    values_n = shard.source.obs_column(column)
    kinds = values_n.cat.categories if isinstance(values_n.dtype, pd.CategoricalDtype) else values_n
    is_number = pd.api.types.is_numeric_dtype(kinds) and not pd.api.types.is_bool_dtype(kinds)
    if is_number and values_n.nunique() > MOST_NUMERIC_LABELS:
        raise InputError(
            f"{shard.path}: obs[{column!r}] holds {values_n.nunique():,} different numbers, too many to be labels of "
            f"{category!r}. Cut it into groups first, e.g. with pandas.cut."
        )
    labels = labels_of(values_n)
    return Labels(labels.codes_n, tuple("" if is_missing(text) else text for text in labels.texts))


@dataclass
class CellTable:
    """What obs says of the cells of one file.

    Args:
        shard: The file.
        phenotypes: Phenotype -> obs column.
        split_by: The obs column that is never split, or "cell".
        seed: What the keys of cells depend on.
    """

    shard: Shard
    phenotypes: dict[str, str]
    split_by: str
    seed: int

    @cached_property
    def labels(self) -> dict[str, Labels]:
        """The labels of every phenotype."""
        return {name: phenotype_of(self.shard, name, column) for name, column in self.phenotypes.items()}

    @cached_property
    def units(self) -> Labels:
        """What is never split, such as donors; nothing when cells are split one by one."""
        if self.split_by == BY_CELL:
            return Labels(np.zeros(len(self.shard), dtype=np.int32), ("",))
        return labels_of(self.shard.source.obs_column(self.split_by))

    @cached_property
    def names_n(self) -> np.ndarray:
        """Names of the cells, str objects of shape (n,)."""
        return np.asarray([str(name) for name in self.shard.source.obs_names], dtype=object)

    @cached_property
    def keys_n(self) -> np.ndarray:
        """Hash of each cell's name under the seed, uint64 of shape (n,)."""
        return pd.util.hash_array(self.names_n, hash_key=f"{self.seed:016d}"[-16:], categorize=False)

    def is_eval(self, plan: Plan) -> np.ndarray:
        """True for cells that are held out, shape (n,)."""
        if self.split_by != BY_CELL:
            return self.units.is_in(plan.eval_units)
        return self.keys_n <= np.uint64(plan.highest_eval_key) if plan.highest_eval_key >= 0 else self.keys_n < 0


# -- open files, per thread ---------------------------------------------------------------------------------------


@dataclass
class _Open:
    key: str
    shards: ShardCache
    table_of: dict[int, CellTable] = field(default_factory=dict)


_LOCAL = threading.local()


def _opened(plan: Plan) -> _Open:
    """Return the files of a plan, kept open from task to task; no thread shares its handles."""
    known = getattr(_LOCAL, "open", None)
    if known is None or known.key != plan.key:
        known = _LOCAL.open = _Open(plan.key, plan.cache())
    return known


def close_files() -> None:
    """Forget the files that this thread has opened."""
    known = getattr(_LOCAL, "open", None)
    if known is not None:
        known.shards.close()
        _LOCAL.open = None


def table_of(plan: Plan, source: int) -> CellTable:
    """Return the table of one file's cells; the last one used is kept."""
    opened = _opened(plan)
    if source not in opened.table_of:
        options = plan.options
        table = CellTable(opened.shards[source], options.column_of_phenotype, plan.split_by, options.seed)
        opened.table_of = {source: table}
    return opened.table_of[source]


def blocks_of(plan: Plan, part: Part, rows_n: np.ndarray) -> Iterator[ExpressionBlock]:
    """Read rows of a part (sorted, numbered within the file) in blocks, in one pass through the file."""
    for first in range(0, len(rows_n), _BLOCK_ROWS):
        yield _checked(_opened(plan).shards[part.source].read(rows_n[first : first + _BLOCK_ROWS]))


def _checked(block: ExpressionBlock) -> ExpressionBlock:
    """Refuse values that have no bin and columns that do not exist: the door has seen a sample of rows only."""
    check_values(block.values_l, source=block.source)
    num_columns = len(block.alignment.gene_of_column_c)
    if len(block.columns_l) and not 0 <= block.columns_l.min() <= block.columns_l.max() < num_columns:
        raise InputError(f"{block.source} holds column indices outside its {num_columns:,} columns. Write it again.")
    return block


# -- what identifies a file ---------------------------------------------------------------------------------------


def gene_names_of(shard: Shard, gene_id_column: str | None) -> tuple[tuple[object, ...], ...]:
    """Return what a file calls its genes: names, ids and symbols (the names where it has no such column)."""
    names = names_of(shard.source, gene_id_column)
    return tuple(map(tuple, (names.own_c, *((columns or (names.own_c,))[0] for columns in names[1:]))))


def digest_of(*texts: object) -> str:
    """Hash texts, each ended by a zero byte."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(str(text).encode("utf-8", errors="surrogatepass") + b"\0")
    return digest.hexdigest()


def content_key(table: CellTable, genes: str) -> str:
    """Hash what a file holds, whatever its name and storage: genes, cells, labels and the values of sampled rows."""
    shard = table.shard
    digest = hashlib.sha256(f"{genes} {shard.source.shape}".encode())
    digest.update("\0".join(table.names_n).encode("utf-8", errors="surrogatepass"))
    for labels in (table.units, *table.labels.values()):
        digest.update("\0".join(labels.texts).encode("utf-8", errors="surrogatepass") + labels.codes_n.tobytes())
    num_rows = len(shard)
    for start in sorted({max(0, min(num_rows - _SAMPLE_ROWS, num_rows * spot // 4)) for spot in range(4)}):
        values_l, columns_l, offsets = shard.source.read_rows(start, min(num_rows, start + _SAMPLE_ROWS))
        for array in (values_l.astype(np.float64), columns_l.astype(np.int64), offsets.astype(np.int64)):
            digest.update(array.tobytes())
    return digest.hexdigest()


def state_of_file(source: Any) -> tuple[int, int]:
    """Return size and time of change of a local file, by which a later run sees that it was replaced."""
    if isinstance(source, str | Path) and os.path.exists(source):
        status = os.stat(source)
        return status.st_size, status.st_mtime_ns
    return (0, 0)


def close_source(shard: Shard) -> None:
    """Close the file of a shard that is read once."""
    if isinstance(shard.source, H5adFile):
        shard.source.close()
