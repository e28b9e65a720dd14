"""One file seen through a panel and a vocabulary: row numbers in, `ExpressionBlock` out.

Owns what is decided once per file (alignment, scale, labels) and reading scattered rows; leaves binning to the
tokenizer and the order of rows to the plan. Letters: n cells, m rows asked for, p phenotypes, l values.
"""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from perturbgene.data_utils.chosen_cells import ChosenCells, read_runs
from perturbgene.data_utils.genes import GeneAlignment, GenePanel, names_of
from perturbgene.data_utils.labels import ABSENT, Vocabulary, plain_spelling
from perturbgene.data_utils.opening import open_source
from perturbgene.data_utils.scale import (
    ExpressionBlock,
    Normalization,
    check_scale,
    library_sizes,
    needs_normalizing,
    recognize_counts,
)
from perturbgene.data_utils.sources import CellSource, sampled_spans
from perturbgene.errors import InputError, did_you_mean, listed

logger = logging.getLogger(__name__)

#: Column of obs in which `prepare` keeps each cell's total counts over all genes of its source file.
LIBRARY_SIZE_COLUMN = "perturbgene_library_size"

#: Column of obs that says which table of genes a cell was measured with; `measured_genes` has the tables.
SOURCE_COLUMN = "perturbgene_source"
MEASURED_KEY = "perturbgene_measured"

#: Open files per process.
MOST_OPEN_FILES = 64

#: Files compressed by columns that are kept in memory at a time.
MOST_WHOLE_FILES = 2

_SEARCH_ROWS = 1024


_TABLES_LOCK = threading.Lock()


class MeasuredGenes:
    """The tables of measured genes of a data set: the distinct sets of genes that its cells were measured with.

    Tables are only ever appended, so the number of a table stays valid; table 0 has all genes.
    """

    def __init__(self, num_genes: int) -> None:
        self.measured_tg = np.ones((1, num_genes), dtype=bool)
        self._table_of = {self.measured_tg[0].tobytes(): 0}

    def table_of(self, is_measured_g: np.ndarray) -> int:
        """Return the number of the table with these genes, appending it if it is new."""
        key = is_measured_g.tobytes()
        with _TABLES_LOCK:
            if key not in self._table_of:
                self.measured_tg = np.concatenate([self.measured_tg, is_measured_g[None]])
                self._table_of[key] = len(self.measured_tg) - 1
        return self._table_of[key]


@dataclass
class Shard:
    """One file (or AnnData) aligned to a panel and a vocabulary.

    Args:
        source: The open file.
        panel, vocabulary: What the file is aligned to.
        included_phenotypes: Phenotypes whose labels are read, in this order.
        obs_columns: Phenotype -> obs column where the names differ.
        optional_labels: True lets label columns be missing (all absent); False refuses the file.
        constant_labels: Phenotype -> input id that every cell gets, whatever obs says.
        missing_labels: Labels that mean "not known", in addition to an empty one, NaN and `unknown`.
        alignments: Alignments of files seen before, by a hash of what they call their columns.
        measured: Tables of measured genes, which the files of a data set share.
    """

    source: CellSource
    panel: GenePanel
    vocabulary: Vocabulary
    included_phenotypes: Sequence[str] = ()
    normalization: Normalization = "auto"
    gene_id_column: str | None = None
    optional_labels: bool = True
    obs_columns: dict[str, str] = field(default_factory=dict)
    constant_labels: dict[str, int] = field(default_factory=dict)
    missing_labels: Sequence[str] = ()
    alignments: dict[bytes, GeneAlignment] = field(default_factory=dict)
    measured: MeasuredGenes | None = None

    def __post_init__(self) -> None:
        self.measured = self.measured or MeasuredGenes(len(self.panel))

    @property
    def path(self) -> str:
        """The file's path, for messages."""
        return self.source.path

    def __len__(self) -> int:
        return self.source.shape[0]

    @cached_property
    def alignment(self) -> GeneAlignment:
        """The file's columns in the panel.

        Raises:
            InputError: Several columns are one gene, and the values are logarithms, which cannot be summed.
        """
        names, ids, symbols = names_of(self.source, self.gene_id_column)
        others = [*ids, *symbols]
        key = _hash_of_names([names, *others])
        alignment = self.alignments.get(key) or self.panel.align(names, other_names_c=others)
        self.alignments[key] = alignment
        if len(names) != self.source.shape[1]:
            raise InputError(
                f"{self.path}: {len(names):,} gene names for {self.source.shape[1]:,} columns. Re-save it."
            )
        if alignment.duplicated and not self._can_be_summed:
            raise InputError(
                f"{self.path}: several columns are the same gene ({listed(alignment.duplicated)}) and the values are "
                "not counts, so they cannot be summed. Give raw counts with --layer, or keep one column of each gene."
            )
        return alignment

    @property
    def _where(self) -> str:
        return f"{self.path} ({self.source.layer or 'X'})"

    @property
    def _sample(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values (l,), offsets (m + 1,) and numbers (m,) of sampled rows, or of the first rows that hold values."""
        num_rows = len(self)
        spans = [np.arange(*span) for span in sampled_spans(num_rows)]
        searched = (np.arange(start, min(num_rows, start + _SEARCH_ROWS)) for start in range(0, num_rows, _SEARCH_ROWS))
        sample = np.zeros(0), np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
        for rows_m in (np.unique(np.concatenate(spans)), *searched) if num_rows else ():
            values_l, _, offsets_m1 = read_runs(self.source, rows_m)
            sample = values_l, offsets_m1, rows_m
            if values_l.any():
                break
        return sample

    @cached_property
    def is_counts(self) -> bool:
        """True when the values are counts that must be normalised; decided on sampled rows, checked on every block."""
        return needs_normalizing(*self._sample, normalization=self.normalization, source=self._where)

    @property
    def _can_be_summed(self) -> bool:
        return self.is_counts or recognize_counts(*self._sample, source=self._where)

    def _library_size(self, rows_m: np.ndarray, values_l: np.ndarray, offsets_m1: np.ndarray) -> np.ndarray | None:
        """Return totals of rows, float64 of shape (m,): as stored, else the sum of counts, else None."""
        stored_m = None if self._stored_library_size_n is None else self._stored_library_size_n[rows_m]
        if not self.is_counts:
            return stored_m
        summed_m = library_sizes(values_l, offsets_m1)
        if stored_m is None:
            return summed_m
        for at in np.flatnonzero(~(stored_m >= summed_m * (1 - 1e-6)) | ~np.isfinite(stored_m))[:1]:
            raise InputError(
                f"{self.path}: obs[{LIBRARY_SIZE_COLUMN!r}] of cell {rows_m[at]} is {stored_m[at]:g}, but its counts "
                f"sum to {summed_m[at]:g}. Remove the column if the matrix was changed after `prepare`."
            )
        return stored_m

    @cached_property
    def _stored_library_size_n(self) -> np.ndarray | None:
        if LIBRARY_SIZE_COLUMN not in self.source.columns_of("obs"):
            return None
        return self._one_per_cell(self.source.obs_column(LIBRARY_SIZE_COLUMN).to_numpy(dtype=np.float64))

    def _one_per_cell(self, values_n: np.ndarray) -> np.ndarray:
        if len(values_n) != len(self):
            raise InputError(
                f"{self._where} does not fit obs: {len(values_n):,} cells in obs for {len(self):,} rows. Re-save it."
            )
        return values_n

    def label_column(self, category: str) -> pd.Series:
        """Return the column of `obs` that holds a phenotype's labels, positional index.

        Raises:
            InputError: There is none; suggests the one with the nearest name.
        """
        column, known = self.obs_columns.get(category, category), self.source.columns_of("obs")
        if column not in known:
            alike = [name for name in known if plain_spelling(name) == plain_spelling(column)]
            advice = f"Did you mean {alike[0]!r}?" if alike else did_you_mean(column, known)
            flag = f"--phenotypes {category}={alike[0] if alike else 'COLUMN'}"
            raise InputError(f"{self.path} has no obs column {column!r}. {advice} Name the column with {flag}.")
        return self.source.obs_column(column)

    def label_ids(self, category: str) -> np.ndarray:
        """Return the input id of one phenotype for every cell, int32 of shape (n,), -1 where absent.

        Labels that are missing or that the vocabulary lacks are counted and logged once per file.
        """
        if category in self.constant_labels:
            return np.full(len(self), self.constant_labels[category], dtype=np.int32)
        column = self.obs_columns.get(category, category)
        if column not in self.source.columns_of("obs") and self.optional_labels:
            logger.info("%s has no obs column %r: %s is absent in all cells", self.path, column, category)
            return np.full(len(self), ABSENT, dtype=np.int32)
        values_n = self.label_column(category)
        ids_n, unknown = self.vocabulary.encode(category, values_n, missing_labels=self.missing_labels)
        if unknown:
            logger.warning(
                "%s: %d cells have a %s that the vocabulary lacks (%s); it counts as absent",
                self.path, sum(unknown.values()), category, listed(unknown),
            )  # fmt: skip
        missing = int((ids_n == ABSENT).sum()) - sum(unknown.values())
        if missing:
            logger.info("%s: %d of %d cells have no %s; it is absent there", self.path, missing, len(ids_n), category)
        return self._one_per_cell(ids_n)

    @cached_property
    def label_ids_np(self) -> np.ndarray:
        """Input ids of the included phenotypes, int32 of shape (n, p), -1 where absent."""
        columns = [self.label_ids(category) for category in self.included_phenotypes]
        return np.stack(columns, axis=1) if columns else np.zeros((len(self), 0), dtype=np.int32)

    @cached_property
    def _table_n(self) -> np.ndarray:
        """The table of measured genes of each cell: as `prepare` noted it, else the genes that the file has."""
        assert self.measured is not None
        measured_tc = _measured_columns(self.source) if self.source.var_frame == "var" else None
        if measured_tc is None or SOURCE_COLUMN not in self.source.columns_of("obs"):
            return np.full(len(self), self.measured.table_of(self.alignment.is_measured_g), dtype=np.int64)
        source_n = self._one_per_cell(self.source.obs_column(SOURCE_COLUMN).to_numpy(dtype=np.int64))
        if len(source_n) and not 0 <= source_n.min() <= source_n.max() < len(measured_tc):
            raise InputError(
                f"{self.path}: obs[{SOURCE_COLUMN!r}] names table {source_n.max()} of {len(measured_tc)} tables of "
                "genes. Make the file again with `perturbgene prepare`."
            )
        gene_of_column_c, tables = self.alignment.gene_of_column_c, np.zeros(len(measured_tc), dtype=np.int64)
        for source in np.unique(source_n):
            is_measured_g = np.zeros(self.alignment.num_genes, dtype=bool)
            is_measured_g[gene_of_column_c[measured_tc[source] & (gene_of_column_c >= 0)]] = True
            tables[source] = self.measured.table_of(is_measured_g)
        return tables[source_n]

    def read(self, rows_m: np.ndarray, *, first_cell: int = 0) -> ExpressionBlock:
        """Read rows, sorted ascending, as one block.

        A cell of a prepared shard brings along which genes its own source measured, not which columns the shard has.

        Args:
            rows_m: Row numbers within the file, int64 of shape (m,), m >= 1.
            first_cell: Number of the file's first cell in the data set.
        """
        assert self.measured is not None
        values_l, columns_l, offsets_m1 = read_runs(self.source, rows_m)
        table_n = self._table_n[rows_m]  # before the tables are handed out: it may append one
        if self.normalization == "auto":
            check_scale(values_l, offsets_m1, rows_m, is_counts=self.is_counts, source=self._where)
        return ExpressionBlock(
            values_l,
            columns_l,
            offsets_m1,
            alignment=self.alignment,
            is_counts=self.is_counts,
            library_size_n=self._library_size(rows_m, values_l, offsets_m1),
            label_ids_np=self.label_ids_np[rows_m],
            cells_n=rows_m + first_cell,
            source=self._where,
            table_n=table_n,
            measured_tg=self.measured.measured_tg,
        )


def _hash_of_names(names: Sequence[np.ndarray]) -> bytes:
    """Hash what a file calls its columns; a name that is no text counts by its text."""
    digest = hashlib.blake2b(digest_size=16)
    for names_c in names:
        digest.update(f"{len(names_c)}\0".encode())
        digest.update("\0".join(map(str, names_c.tolist())).encode("utf-8", "surrogatepass"))
    return digest.digest()


def _weight(shard: Shard) -> int:
    """How many ordinary files a file counts as: one compressed by columns is kept in memory as a whole."""
    return MOST_OPEN_FILES // MOST_WHOLE_FILES if shard.source.is_held_whole else 1


class ShardCache:
    """Keeps the last used shards of a list open, at most `MOST_OPEN_FILES`, of those kept whole `MOST_WHOLE_FILES`.

    Args:
        sources: Paths, or AnnData objects.
        options: Further arguments of every `Shard`.
        layer: Which matrix to read.
        where: Which cells to read, by columns of `obs`; None reads all.
    """

    def __init__(
        self, sources: Sequence[Any], *, layer: str | None = None, where: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.sources, self.layer, self.where, self.options = list(sources), layer, where, options
        self.options.setdefault("alignments", {})
        self.options.setdefault("measured", MeasuredGenes(len(options["panel"])))
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Shard:
        if index not in self._open:
            source = open_source(self.sources[index], layer=self.layer)
            self._open[index] = Shard(ChosenCells(source, self.where) if self.where else source, **self.options)
        self._open.move_to_end(index)
        while sum(map(_weight, self._open.values())) > MOST_OPEN_FILES and len(self._open) > 1:
            self._open.popitem(last=False)[1].source.close()
        return self._open[index]

    def close(self) -> None:
        """Close all files; they open again when used."""
        while self._open:
            self._open.popitem()[1].source.close()


def _measured_columns(source: CellSource) -> np.ndarray | None:
    """Return which columns each table of a corpus measured, bool of shape (t, c), or None where nothing says so."""
    measured_ct, num_columns = source.varm_array(MEASURED_KEY), source.shape[1]
    if measured_ct is None:
        return None
    if measured_ct.dtype != np.uint8 or measured_ct.ndim != 2 or len(measured_ct) != num_columns:
        raise InputError(
            f"{source.path}: varm[{MEASURED_KEY!r}] of shape {measured_ct.shape} and type {measured_ct.dtype} does not "
            f"say which of {num_columns:,} columns were measured. Make the file again with `perturbgene prepare`."
        )
    return measured_ct.T.astype(bool)
