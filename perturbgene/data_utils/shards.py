"""One file seen through a panel and a vocabulary: row numbers in, `ExpressionBlock` out.

Owns what is decided once per file about genes and labels; leaves values to `values`, binning to the tokenizer and the
order of rows to the plan. Letters: n cells, m rows asked for, p phenotypes, l values.
"""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from perturbgene.data_utils.chosen_cells import ChosenCells
from perturbgene.data_utils.gene_map import GeneMap, Renaming
from perturbgene.data_utils.genes import GeneAlignment, GenePanel, names_of, species_of
from perturbgene.data_utils.labels import ABSENT, Vocabulary, is_missing, label_text, plain_spelling
from perturbgene.data_utils.opening import open_source
from perturbgene.data_utils.scale import ExpressionBlock, Normalization
from perturbgene.data_utils.sources import CellSource
from perturbgene.data_utils.values import CellValues, one_per_cell
from perturbgene.errors import InputError, did_you_mean, listed
from perturbgene.files import open_file_limit

logger = logging.getLogger(__name__)

#: Column of obs that says which table of genes a cell was measured with; `measured_genes` has the tables.
SOURCE_COLUMN = "perturbgene_source"
MEASURED_KEY = "perturbgene_measured"

#: Open files of a list, fewer where a process may have few descriptors. A file takes three, or four at rest have one
#: each; three lists are used, and a quarter is left for everything else.
MOST_OPEN_FILES = 64
_DESCRIPTORS_PER_FILE = 16

#: Files at rest that count as one open file: each takes one descriptor, and kilobytes instead of megabytes.
_RESTING_PER_OPEN = 4

#: Files of a list, open or not, of which it is kept what they hold: some 10 bytes for each of their cells.
MOST_KNOWN_FILES = 1024

#: Files compressed by columns that are kept in memory at a time.
MOST_WHOLE_FILES = 2

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
        gene_map: The user's own table of gene names.
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
    gene_map: GeneMap | None = None
    optional_labels: bool = True
    obs_columns: dict[str, str] = field(default_factory=dict)
    constant_labels: dict[str, int] = field(default_factory=dict)
    missing_labels: Sequence[str] = ()
    alignments: dict[bytes, GeneAlignment] = field(default_factory=dict)
    measured: MeasuredGenes = None  # type: ignore[assignment]  # tables of its own, see below

    def __post_init__(self) -> None:
        self.measured = self.measured or MeasuredGenes(len(self.panel))
        self.values = CellValues(self.source, self.normalization)
        #: True once rows were read, so that all is known of the file that reading more of them needs.
        self.was_read = False

    @property
    def path(self) -> str:
        """The file's path, for messages."""
        return self.source.path

    def __len__(self) -> int:
        return self.source.shape[0]

    @cached_property
    def is_held_whole(self) -> bool:
        """True if the file is kept in memory as a whole while it is open."""
        return self.source.is_held_whole

    @cached_property
    def renaming(self) -> Renaming:
        """What the file calls its genes, after the user's own table."""
        names = names_of(self.source, self.gene_id_column)
        return self.gene_map.rename(names) if self.gene_map else Renaming(names)

    @cached_property
    def alignment(self) -> GeneAlignment:
        """The file's columns in the panel."""
        names, ids, symbols = self.renaming.names
        others = [*ids, *symbols]
        key = hashlib.blake2b(repr([names_c.tolist() for names_c in (names, *others)]).encode()).digest()
        if key not in self.alignments:
            self.alignments[key] = self.panel.align(names, other_names_c=others, can_be_summed=True)
        alignment = self.alignments[key]
        if alignment.num_copies and not self.values.can_be_summed:
            alignment = self.panel.align(names, other_names_c=others)
        if len(names) != self.source.shape[1]:
            raise InputError(
                f"{self.path}: {len(names):,} gene names for {self.source.shape[1]:,} columns. Re-save it."
            )
        if alignment.duplicated and not self.values.can_be_summed:
            raise InputError(
                f"{self.path}: several columns are the same gene ({listed(alignment.duplicated)}) and values of "
                "unknown scale cannot be summed. Give raw counts with --layer, or keep one column of each gene."
            )
        return replace(alignment, renaming=self.renaming.text) if self.renaming.text else alignment

    @property
    def coverage(self) -> float:
        """Share of the panel's genes that its cells were measured with, in 0..1; the least if they differ."""
        tables = np.unique(self._table_n)
        return float(self.measured.measured_tg[tables].mean(axis=1).min()) if len(tables) else self.alignment.coverage

    @property
    def is_measured_g(self) -> np.ndarray:
        """True for genes of the panel that all of its cells were measured with, shape (g,)."""
        tables = np.unique(self._table_n)
        return self.measured.measured_tg[tables].all(axis=0)

    def check_genes(self, minimum: float) -> None:
        """Raise an InputError if the file has less than this share of the panel's genes, with the likely reason.

        A warning says if another matrix of the file has more of them.
        """
        alignment, other_case = self.alignment, self.alignment.other_case
        is_refused = alignment.coverage < minimum or not alignment.is_measured_g.any()
        is_strange = self.renaming.level > logging.INFO
        remedy = self.gene_remedy() if is_refused or alignment.coverage < 1 else ""
        remedy = "Correct the table of --gene_map." if is_refused and is_strange else remedy
        if is_refused:
            if not remedy and len(other_case) > alignment.is_measured_g.sum():
                remedy = (
                    f"{len(other_case):,} more differ in upper and lower case only ({listed(other_case, most=3)}), as "
                    "mouse symbols differ from human ones. If it is the same species, write them as the panel does "
                    "(var_names.str.upper()); else give a table of orthologs with --gene_map."
                )
            usual = "Name the right column with --gene_id_column, or lower --min_gene_coverage if the file really "
            raise InputError(
                f"{self.path}: {alignment.describe()}, under --min_gene_coverage {minimum:g}; its first names are "
                f"{listed(alignment.unknown, most=3) or 'blank'}. {remedy or f'{usual}measures so few of these genes.'}"
            )
        if is_strange:
            logger.warning("%s: %s", self.path, self.renaming.text)
        if remedy:
            logger.warning("%s: %s. %s", self.path, alignment.describe(), remedy)
        elif alignment.coverage < 0.5:
            logger.warning("%s: %s; cells are scored by what it measures", self.path, alignment.describe())

    def gene_remedy(self) -> str:
        """Say where more genes of the panel are, and which flag to give; '' if nothing in the file has more of them."""

        def coverage_of(names: np.ndarray) -> float:
            return self.panel.align(names).coverage

        least = self.alignment.coverage + 0.05
        if "raw" in self.source.layers and self.source.layer != "raw":
            with suppress(InputError), closing(self.source.with_layer("raw")) as raw:
                of_raw = names_of(raw)
                names, ids, symbols = self.gene_map.rename(of_raw).names if self.gene_map else of_raw
                found = self.panel.align(names, other_names_c=[*ids, *symbols]).coverage
                if found > least:
                    return f".raw has {found:.1%} of the panel: give --layer raw."
        if self.alignment.coverage >= 0.5:
            return ""
        if coverage_of(self.source.obs_names) > max(least, 0.2):
            return "Its obs_names are genes of the panel: cells and genes are swapped. Transpose it (adata.T)."
        frame = self.source.var_frame
        for column in self.source.columns_of(frame):
            names_c = self.source.var_column(column).astype(object).to_numpy()
            if any(isinstance(name, str) for name in names_c[:5]) and (found := coverage_of(names_c)) > least:
                return f"var[{column!r}] names {found:.1%} of the panel: give --gene_id_column {column}."
        own, other = species_of(self.panel.genes), species_of(self.alignment.unknown)
        if own and other and own != other:
            return f"Its ids are of another species ({other}) than the panel's ({own}): give orthologs with --gene_map."
        return ""

    def label_column(self, category: str) -> pd.Series:
        """Return the column of `obs` that holds a phenotype's labels; an InputError suggests the nearest name."""
        column, known = self.obs_columns.get(category, category), self.source.columns_of("obs")
        if column not in known:
            alike = [name for name in known if plain_spelling(name) == plain_spelling(column)]
            advice = f"Did you mean {alike[0]!r}?" if alike else did_you_mean(column, known)
            flag = f"--phenotypes {category}={alike[0] if alike else 'COLUMN'}"
            raise InputError(f"{self.path} has no obs column {column!r}. {advice} Name the column with {flag}.")
        return self.source.obs_column(column)

    def no_known_label(self, category: str) -> InputError:
        """Return the error for cells without a label that the vocabulary has: what obs has instead, and what to do."""
        texts = {label_text(value) for value in self.label_column(category).unique()}
        found = sorted(text for text in texts if not is_missing(text, self.missing_labels))
        known = self.vocabulary.phenotypes[category]
        if not found:
            return InputError(
                f"no cell of {self.path!r} has a {category!r}: its column in obs is empty. Give labeled cells; "
                "in a corpus, hold some of them out with `prepare --eval_donors`, or with `prepare --split_by cell`."
            )
        advice = f"Rename them, or name another column with --phenotypes {category}=COLUMN."
        if {plain_spelling(label) for label in found} & {plain_spelling(label) for label in known}:
            advice = "They differ in case and punctuation: rename them."
        return InputError(
            f"no cell of {self.path!r} has a known {category!r}: obs has {listed(found)}, the vocabulary "
            f"{listed(known)}. {advice}"
        )

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
        return one_per_cell(ids_n, self.values)

    @cached_property
    def label_ids_np(self) -> np.ndarray:
        """Input ids of the included phenotypes, int16 or int32 of shape (n, p), -1 where absent."""
        columns = [self.label_ids(category) for category in self.included_phenotypes]
        ids_np = np.stack(columns, axis=1) if columns else np.zeros((len(self), 0), dtype=np.int16)
        return _narrowed(ids_np, np.int16)

    @cached_property
    def _table_n(self) -> np.ndarray:
        """The table of measured genes of each cell, integers of shape (n,): as noted by `prepare`, else of the file."""
        measured_ct = self.source.varm_array(MEASURED_KEY) if self.source.var_frame == "var" else None
        num_columns = self.source.shape[1]
        if measured_ct is not None and not (
            measured_ct.dtype == np.uint8 and measured_ct.ndim == 2 and len(measured_ct) == num_columns
        ):
            raise InputError(
                f"{self.path}: varm[{MEASURED_KEY!r}] of shape {measured_ct.shape} and type {measured_ct.dtype} does "
                f"not say which of {num_columns:,} columns were measured. "
                "Make the file again with `perturbgene prepare`."
            )
        if measured_ct is None or SOURCE_COLUMN not in self.source.columns_of("obs"):
            table = np.int64(self.measured.table_of(self.alignment.is_measured_g))
            return np.broadcast_to(table, len(self))  # one number in memory, however many cells
        measured_tc = measured_ct.T.astype(bool)  # which columns each table of a corpus measured
        source_n = one_per_cell(self.source.obs_column(SOURCE_COLUMN).to_numpy(dtype=np.int64), self.values)
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
        return _narrowed(tables, np.uint8)[source_n]

    def read(self, rows_m: np.ndarray, *, first_cell: int = 0) -> ExpressionBlock:
        """Read rows, sorted ascending, as one block; `first_cell` is the number of the file's first in the data set.

        A cell of a prepared shard brings along which genes its own source measured, not which columns the shard has.
        """
        table_n = self._table_n[rows_m].astype(np.int64)  # before the tables are handed out: it may append one
        rows, library_size_m, is_linear = self.values.read(rows_m, is_summed=bool(self.alignment.duplicated))
        self.values.forget_sample()
        self.__dict__.pop("renaming", None)  # the names of all genes: megabytes of each file, and used no more
        self.was_read = True
        return ExpressionBlock(
            *rows,
            alignment=self.alignment,
            is_linear=is_linear,
            library_size_n=library_size_m,
            label_ids_np=self.label_ids_np[rows_m].astype(np.int32),
            cells_n=rows_m + first_cell,
            source=self.values.name,
            table_n=table_n,
            measured_tg=self.measured.measured_tg,
        )


def _narrowed(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Return whole numbers in a smaller type, if all of them fit there."""
    limits = np.iinfo(dtype)
    fits = not values.size or limits.min <= values.min() <= values.max() <= limits.max
    return values.astype(dtype) if fits else values


def _cost_of(shard: Shard, most: int) -> int:
    """Return what an open file costs, in files at rest, if at most so many may be open."""
    if shard.is_held_whole:
        return most * _RESTING_PER_OPEN // MOST_WHOLE_FILES
    return 1 if shard.source.is_resting else _RESTING_PER_OPEN


class ShardCache:
    """Keeps the last used shards of a list open, at most `MOST_OPEN_FILES`, of those kept whole `MOST_WHOLE_FILES`.

    What was found in the last `MOST_KNOWN_FILES` (genes, labels, scale) is kept when they are closed: finding it takes
    ten times as long as opening them again. `sources` are paths or AnnData objects, `where` says which of their cells
    to read, `options` goes to every `Shard`.
    """

    def __init__(
        self, sources: Sequence[Any], *, layer: str | None = None, where: Mapping[str, Sequence[str]] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        self.sources, self.layer, self.where, self.options = list(sources), layer, where, options
        self.options.setdefault("alignments", {})
        self.options.setdefault("measured", MeasuredGenes(len(options["panel"])))
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._known: OrderedDict[int, Shard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_known": OrderedDict()}

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> Iterator[Shard]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Shard:
        if index not in self._known:
            source = open_source(self.sources[index], layer=self.layer)
            self._known[index] = Shard(ChosenCells(source, self.where) if self.where else source, **self.options)
        for number, other in self._open.items():
            if number != index and other.was_read:
                other.source.rest()
        shard = self._open[index] = self._known[index]
        self._known.move_to_end(index)
        if len(self._known) > MOST_KNOWN_FILES:
            self._known.popitem(last=False)
        self._open.move_to_end(index)
        most = max(MOST_WHOLE_FILES, min(MOST_OPEN_FILES, open_file_limit() // _DESCRIPTORS_PER_FILE))
        costs = {number: _cost_of(one, most) for number, one in self._open.items()}
        total = sum(costs.values())
        while len(self._open) > 1 and total > most * _RESTING_PER_OPEN:
            number, closed = self._open.popitem(last=False)
            total -= costs[number]
            closed.source.close()
        return shard

    def close(self) -> None:
        """Close all files; they open again when used."""
        self._open.clear()
        for shard in list(self._known.values()):  # also those that were opened again for what was not known of them
            shard.source.close()
