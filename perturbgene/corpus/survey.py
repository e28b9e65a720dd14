"""Step one: what every file holds (cells, donors, labels, gene names, scale), and which cells are held out.

Owns the order of the files, the split, the cut into parts, and opening files in the process that reads them; leaves
counting to `statistics` and writing to `spool`. Letters: n cells, l values.
"""

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from perturbgene.cli.verbs import HvgFlavor, PrepareConfig
from perturbgene.corpus.manifest import BY_CELL
from perturbgene.corpus.workers import Workers
from perturbgene.data_utils.genes import GenePanel, names_of
from perturbgene.data_utils.labels import Vocabulary, is_missing, label_text
from perturbgene.data_utils.scale import ExpressionBlock, check_values
from perturbgene.data_utils.shards import Shard, ShardCache
from perturbgene.errors import InputError, listed

SPLITS = ("train", "eval")

#: Columns of obs that name the donor, in the order in which they are tried if --split_by is not given.
DONOR_COLUMNS = ("donor_id", "donor", "individual", "patient", "sample")

#: A numeric obs column with more distinct values than this is a measurement, not a phenotype.
MOST_NUMERIC_LABELS = 50

#: Rows that a process reads, counts and spools as one task. Fixed: sums of parts are added in order, so that a corpus
#: does not depend on the number of processes.
PART_ROWS = 8192

_BLOCK_ROWS = 1024
_SAMPLE_ROWS = 64


def open_files(sources: Sequence[Any], config: PrepareConfig, panel: GenePanel | None = None) -> ShardCache:
    """Return files, each opened when it is used, aligned to a panel of genes if one is given."""
    return ShardCache(
        sources, layer=config.layer, panel=panel or GenePanel(("none",)), vocabulary=Vocabulary({}),
        normalization=config.normalization, gene_id_column=config.gene_id_column,
    )  # fmt: skip


# -- the cells of one file ----------------------------------------------------------------------------------------


class Labels(NamedTuple):
    """One obs column: the number of each cell's text, int32 of shape (n,). The text of a missing label is ''."""

    codes_n: np.ndarray
    texts: tuple[str, ...]

    @classmethod
    def of(cls, values_n: pd.Series) -> "Labels":
        """Spell the values of a column as labels."""
        factor = pd.Categorical(values_n)
        texts = (*map(label_text, factor.categories), "")
        return cls(np.where(factor.codes < 0, len(texts) - 1, factor.codes).astype(np.int32), texts)

    def codes_in(self, known: Sequence[str]) -> np.ndarray:
        """Return each cell's place in a list of texts, int32 of shape (n,), -1 where it is not listed."""
        place = {text: index for index, text in enumerate(known)}
        return np.array([place.get(text, -1) for text in self.texts], dtype=np.int32)[self.codes_n]

    def counts(self, rows_n: np.ndarray | slice = slice(None)) -> Counter[str]:
        """Count the cells of each text, in all rows or in some."""
        counted: Counter[str] = Counter()
        counts = np.bincount(self.codes_n[rows_n], minlength=len(self.texts))
        for text, count in zip(self.texts, counts.tolist(), strict=True):
            counted[text] += count
        return +counted


@dataclass(frozen=True)
class CellTable:
    """What obs says of the cells of one file.

    Args:
        names_n: Names of the cells, str objects of shape (n,).
        keys_n: Hash of each cell's name under the seed, uint64 of shape (n,).
        units: What is kept whole by the split, such as donors; one empty text when cells are split one by one.
        labels: Labels of every phenotype; those that mean "not known" are ''.
        missing: Phenotype -> spelling -> cells, of labels that mean "not known".
    """

    names_n: np.ndarray
    keys_n: np.ndarray
    units: Labels
    labels: dict[str, Labels]
    missing: dict[str, Counter[str]]

    @classmethod
    def of(cls, shard: Shard, config: PrepareConfig, split_by: str) -> "CellTable":
        """Read the table of one file.

        Raises:
            InputError: There is no such column, or a phenotype holds measurements.
        """
        names_n = np.asarray([str(name) for name in shard.source.obs_names], dtype=object)
        keys_n = pd.util.hash_array(names_n, hash_key=f"{config.seed:016d}"[-16:], categorize=False)
        units = Labels(np.zeros(len(shard), dtype=np.int32), ("",))
        if split_by != BY_CELL:
            units = Labels.of(shard.source.obs_column(split_by))
        labels, missing = dict[str, Labels](), dict[str, Counter[str]]()
        for category, column in config.column_of_phenotype.items():
            values_n = shard.source.obs_column(column)
            kinds = values_n.cat.categories if isinstance(values_n.dtype, pd.CategoricalDtype) else values_n
            is_number = pd.api.types.is_numeric_dtype(kinds) and not pd.api.types.is_bool_dtype(kinds)
            if is_number and values_n.nunique() > MOST_NUMERIC_LABELS:
                raise InputError(
                    f"{shard.path}: obs[{column!r}] holds {values_n.nunique():,} different numbers, too many to be "
                    f"labels of {category!r}. Cut it into groups first, e.g. with pandas.cut."
                )
            spelled = Labels.of(values_n)
            unknown = {text for text in spelled.texts if is_missing(text, config.missing_labels)}
            labels[category] = Labels(spelled.codes_n, tuple("" if text in unknown else text for text in spelled.texts))
            counts = spelled.counts()
            missing[category] = Counter({text: counts[text] for text in counts.keys() & unknown})
        return cls(names_n, keys_n, units, labels, missing)


# -- surveying files ----------------------------------------------------------------------------------------------


@dataclass
class FileSurvey:
    """What one file says of its cells and genes.

    Args:
        key: Hash of its content, which decides the order of the files whatever their names.
        state: Size and time of change, which show that a file was replaced; zeros if it is not a local file.
        genes: Hash of its gene names; files that agree share one table of genes.
        is_counts: True if its values are counts that are still to be normalized.
        missing: Phenotype -> spelling -> cells, of labels that mean "not known".
        units: Cells of each donor, '' where missing; empty when cells are split one by one.
        units_of_label: Phenotype -> label -> donors that have a cell of that label.
        cell_keys_n: Hash of each cell's name, uint64 of shape (n,); empty when donors are split.
    """

    num_cells: int
    key: str
    state: tuple[int, int]
    genes: str
    is_counts: bool
    missing: dict[str, Counter[str]]
    units: Counter[str] = field(default_factory=Counter)
    units_of_label: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    cell_keys_n: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))


@dataclass(frozen=True)
class _SurveyFile:
    """The task of surveying one file, by its number."""

    sources: tuple[Any, ...]
    config: PrepareConfig
    split_by: str

    def __call__(self, index: int) -> FileSurvey:
        source = self.sources[index]
        with closing(open_files([source], self.config)) as cache:
            shard = cache[0]
            table = CellTable.of(shard, self.config, self.split_by)
            genes = digest_of(*(str(column) for column in gene_names_of(shard, self.config.gene_id_column)))
            is_file = isinstance(source, str | Path) and os.path.exists(source)
            survey = FileSurvey(
                num_cells=len(shard),
                key=_content_key(shard, table, genes),
                state=(os.stat(source).st_size, os.stat(source).st_mtime_ns) if is_file else (0, 0),
                genes=genes,
                is_counts=shard.is_counts,
                missing=table.missing,
            )
            if self.split_by == BY_CELL:
                survey.cell_keys_n = table.keys_n
            else:
                survey.units = table.units.counts()
                survey.units_of_label = {
                    name: _units_of_label(labels, table.units) for name, labels in table.labels.items()
                }
        return survey


def _content_key(shard: Shard, table: CellTable, genes: str) -> str:
    """Hash what a file holds, whatever its name and storage: genes, cells, labels and the values of sampled rows."""
    source, num_rows = shard.source, len(shard)
    digest = hashlib.sha256(f"{genes} {source.shape}".encode())
    digest.update("\0".join(table.names_n).encode("utf-8", errors="surrogatepass"))
    for labels in (table.units, *table.labels.values()):
        digest.update("\0".join(labels.texts).encode("utf-8", errors="surrogatepass") + labels.codes_n.tobytes())
    for start in sorted({max(0, min(num_rows - _SAMPLE_ROWS, num_rows * spot // 4)) for spot in range(4)}):
        values_l, columns_l, offsets = source.read_rows(start, min(num_rows, start + _SAMPLE_ROWS))
        for array in (values_l.astype(np.float64), columns_l.astype(np.int64), offsets.astype(np.int64)):
            digest.update(array.tobytes())
    return digest.hexdigest()


def _units_of_label(labels: Labels, units: Labels) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for label, unit in np.unique(np.stack([labels.codes_n, units.codes_n]), axis=1).T.tolist():
        if labels.texts[label]:
            found.setdefault(labels.texts[label], set()).add(units.texts[unit])
    return found


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


@dataclass
class Survey:
    """What all files say, in the order of their content.

    Args:
        sources, files: The files (or AnnData objects) and what each of them says.
        split_by: The obs column that is kept whole, or "cell".
    """

    sources: list[Any]
    files: list[FileSurvey]
    split_by: str

    @property
    def num_cells(self) -> int:
        """Number of cells in all files."""
        return sum(file.num_cells for file in self.files)

    @property
    def units(self) -> Counter[str]:
        """Cells of each donor in all files."""
        return sum((file.units for file in self.files), Counter())

    def missing(self, category: str) -> Counter[str]:
        """Spelling -> cells, of a phenotype's labels that mean "not known"."""
        return sum((file.missing[category] for file in self.files), Counter())

    def units_of_label(self, category: str) -> dict[str, set[str]]:
        """Label -> donors that have it."""
        found: dict[str, set[str]] = {}
        for file in self.files:
            for label, units in file.units_of_label.get(category, {}).items():
                found.setdefault(label, set()).update(units)
        return found

    def gene_tables(self) -> tuple[list[int], np.ndarray]:
        """Return one file of each distinct table of genes, and each file's table, int64 of shape (files,)."""
        first_of: dict[str, int] = {}
        for index, file in enumerate(self.files):
            if file.num_cells or not self.num_cells:
                first_of.setdefault(file.genes, index)
        number_of = {genes: number for number, genes in enumerate(first_of)}
        return [*first_of.values()], np.array([number_of.get(file.genes, 0) for file in self.files])


def survey_files(sources: Sequence[Any], config: PrepareConfig, workers: Workers) -> Survey:
    """Survey all files and put them in the order of their content."""
    split_by = config.split_by or _donor_column(sources, config)
    found = dict(workers.run(_SurveyFile(tuple(sources), config, split_by), range(len(sources))))
    order = sorted(found, key=lambda index: (found[index].key, str(sources[index])))
    return Survey([sources[index] for index in order], [found[index] for index in order], split_by)


def _donor_column(sources: Sequence[Any], config: PrepareConfig) -> str:
    """Return the first donor column that all files have and that names at least two donors, else "cell"."""
    with closing(open_files(sources, config)) as cache:
        known = set.intersection(*(set(cache[index].source.columns_of("obs")) for index in range(len(cache))))
        for column in DONOR_COLUMNS:
            units: set[str] = set()
            for index in range(len(cache)) if column in known else ():
                texts = map(label_text, cache[index].source.obs_column(column).unique())
                units |= {text for text in texts if not is_missing(text)}
                if len(units) > 1:
                    return column
    return BY_CELL


# -- who is held out ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Which cells are held out for evaluation.

    Args:
        by: The obs column that is kept whole, or "cell".
        eval_units: Values of that column that are held out.
        highest_eval_key: When cells are split one by one: cells whose key is at most this are held out; -1 for none.
    """

    by: str
    eval_units: frozenset[str] = frozenset()
    highest_eval_key: int = -1

    def is_eval(self, table: CellTable) -> np.ndarray:
        """True for cells that are held out, shape (n,)."""
        if self.by != BY_CELL:
            return np.array([text in self.eval_units for text in table.units.texts], dtype=bool)[table.units.codes_n]
        if self.highest_eval_key < 0:
            return np.zeros(len(table.keys_n), dtype=bool)
        return table.keys_n <= np.uint64(self.highest_eval_key)


def hold_out(survey: Survey, config: PrepareConfig) -> Split:
    """Choose what is held out: the donors that are named, or about `eval_fraction` of the cells, chosen by a hash.

    Raises:
        InputError: The named donors are unknown, or nothing would be left on one side.
    """
    wanted = config.eval_fraction * survey.num_cells
    if survey.split_by != BY_CELL:
        return Split(survey.split_by, eval_units=frozenset(_eval_units(survey, config, wanted)))
    if config.eval_donors:
        raise InputError(
            f"eval_donors {listed(config.eval_donors)} need a split by donor, but cells are split one by one. Name the "
            "donor column with --split_by."
        )
    if not round(wanted):
        return Split(BY_CELL)
    keys_n = np.concatenate([file.cell_keys_n for file in survey.files])
    return Split(BY_CELL, highest_eval_key=int(np.partition(keys_n, round(wanted) - 1)[round(wanted) - 1]))


def _eval_units(survey: Survey, config: PrepareConfig, wanted: float) -> list[str]:
    """Return the donors to hold out, of which `wanted` cells are asked."""
    size_of, named = survey.units, list(config.eval_donors)
    if unknown := sorted(set(named) - set(size_of)):
        raise InputError(
            f"eval_donors {listed(unknown)} are not in obs[{survey.split_by!r}]. Known: {listed(size_of)}."
        )
    if len(size_of) < 2:
        raise InputError(
            f"obs[{survey.split_by!r}] holds one value ({listed(size_of)}), so nothing can be held out. Give another "
            "--split_by, or --split_by cell."
        )
    if set(named) == set(size_of):
        raise InputError(f"eval_donors name every {survey.split_by}, so nothing is left to train on. Name fewer.")
    if named or not wanted:
        return named
    chosen, num_chosen = list[str](), 0
    for unit in sorted(size_of, key=lambda text: hashlib.sha256(f"{config.seed}:{text}".encode()).digest()):
        is_nearer = abs(num_chosen + size_of[unit] - wanted) < abs(num_chosen - wanted)
        if is_nearer and len(chosen) < len(size_of) - 1:
            chosen.append(unit)
            num_chosen += size_of[unit]
    return chosen or [min(sorted(size_of), key=size_of.__getitem__)]


# -- parts of files, read in the process that needs them ----------------------------------------------------------


class Part(NamedTuple):
    """Neighboring rows of one file."""

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
    """What every process that reads files must know.

    Args:
        key: Fingerprint of all that the corpus depends on.
        folder: Where parts and shards are written.
        sources, sizes: The files (or AnnData objects) in their order, and their numbers of cells.
        union: The genes of all files.
        split: Which cells are held out.
        flavor: How genes are ranked.
    """

    key: str
    folder: Path
    config: PrepareConfig
    sources: tuple[Any, ...]
    sizes: tuple[int, ...]
    union: GenePanel
    split: Split
    flavor: HvgFlavor

    def parts(self) -> list[Part]:
        """Cut all files into parts of at most `PART_ROWS` rows."""
        spans = [(s, a, min(a + PART_ROWS, n)) for s, n in enumerate(self.sizes) for a in range(0, n, PART_ROWS)]
        return [Part(number, *span) for number, span in enumerate(spans)]


#: The plan's open files, and the table of the file used last. No thread shares its handles with another.
_OPEN = threading.local()


def _shard_of(plan: Plan, source: int) -> Shard:
    """Return one file of a plan. Files stay open from task to task."""
    if getattr(_OPEN, "key", None) != plan.key:
        _OPEN.key, _OPEN.shards, _OPEN.tables = plan.key, open_files(plan.sources, plan.config, plan.union), {}
    return _OPEN.shards[source]


def close_files() -> None:
    """Close the files that this thread has opened."""
    if getattr(_OPEN, "key", None) is not None:
        _OPEN.shards.close()
        _OPEN.__dict__.clear()


def table_of(plan: Plan, source: int) -> CellTable:
    """Return the table of one file's cells."""
    shard = _shard_of(plan, source)
    if source not in _OPEN.tables:
        _OPEN.tables = {source: CellTable.of(shard, plan.config, plan.split.by)}
    return _OPEN.tables[source]


def blocks_of(plan: Plan, part: Part, rows_n: np.ndarray) -> Iterator[ExpressionBlock]:
    """Read rows of a part (sorted, numbered within the file) in blocks, in one pass through the file.

    Raises:
        InputError: A value has no bin, or a column does not exist: the survey has seen a sample of rows only.
    """
    for first in range(0, len(rows_n), _BLOCK_ROWS):
        block = _shard_of(plan, part.source).read(rows_n[first : first + _BLOCK_ROWS])
        check_values(block.values_l, source=block.source)
        num_columns = len(block.alignment.gene_of_column_c)
        if len(block.columns_l) and not 0 <= block.columns_l.min() <= block.columns_l.max() < num_columns:
            raise InputError(
                f"{block.source} holds column indices outside its {num_columns:,} columns. Write it again."
            )
        yield block
