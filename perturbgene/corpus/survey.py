"""Step one: what every file holds (cells, donors, labels, gene names, scale), and which cells are held out.

Owns the order of the files, the split, the cut into parts, and opening files in the process that reads them; leaves
counting to `statistics` and writing to `spool`. Letters: n cells, l values.
"""

import difflib
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from perturbgene.cli.options import conditions
from perturbgene.cli.verbs import HvgFlavor, PrepareConfig
from perturbgene.corpus.manifest import BY_CELL
from perturbgene.corpus.workers import Workers
from perturbgene.data_utils.chosen_cells import check_where
from perturbgene.data_utils.gene_map import read_gene_map
from perturbgene.data_utils.genes import GenePanel
from perturbgene.data_utils.labels import (
    Labels,
    Vocabulary,
    check_are_labels,
    is_missing,
    label_text,
    plain_spelling,
)  # fmt: skip
from perturbgene.data_utils.recognition import Scale, check_values
from perturbgene.data_utils.scale import ExpressionBlock
from perturbgene.data_utils.shards import Shard, ShardCache
from perturbgene.data_utils.sources import sampled_spans
from perturbgene.data_utils.values import warn_of_notes
from perturbgene.errors import InputError, listed
from perturbgene.urls import shown_path

SPLITS = ("train", "eval")

#: Columns of obs that name the donor, in the order in which they are tried if --split_by is not given.
DONOR_COLUMNS = ("donor_id", "donor", "individual", "patient", "sample")

#: Rows that a process reads, counts and spools as one task. Fixed: sums of parts are added in order, so that a corpus
#: does not depend on the number of processes.
PART_ROWS = 8192

_BLOCK_ROWS = 1024


def open_files(sources: Sequence[Any], config: PrepareConfig, panel: GenePanel | None = None) -> ShardCache:
    """Return files, each opened when it is used, aligned to a panel of genes if one is given."""
    return ShardCache(
        sources, layer=config.layer, panel=panel or GenePanel(("none",)), vocabulary=Vocabulary({}),
        normalization=config.normalization, gene_id_column=config.gene_id_column, where=conditions(config.where),
        gene_map=read_gene_map(config.gene_map),
    )  # fmt: skip


@dataclass(frozen=True)
class CellTable:
    """What obs says of the cells of one file, except their names, which are read part by part."""

    units: Labels  # what the split keeps whole, such as donors; one empty text when cells are split one by one
    labels: dict[str, Labels]  # of every phenotype; those that mean "not known" are ''
    missing: dict[str, Counter[str]]  # phenotype -> spelling -> cells, of labels that mean "not known"
    lacks: dict[str, str]  # columns of obs that were asked for and are not there -> one of a similar name, or ''

    @classmethod
    def of(cls, shard: Shard, config: PrepareConfig, split_by: str) -> "CellTable":
        """Read the table of one file; refuse repeated columns, and a phenotype that holds measurements."""
        columns = shard.source.columns_of("obs")
        known = set(columns)
        if repeated := sorted(name for name in known if columns.count(name) > 1):
            raise InputError(
                f"{shard.path}: obs has more than one column {listed(repeated)}. Rename all but one, or drop them."
            )
        units = Labels(np.zeros(len(shard), dtype=np.int8), ("",))
        if split_by in known and split_by != BY_CELL:
            units = Labels.of(shard.source.obs_column(split_by))
        labels, missing = dict[str, Labels](), dict[str, Counter[str]]()
        for category, column in config.column_of_phenotype.items():
            if column not in known:
                labels[category], missing[category] = Labels(np.zeros(len(shard), dtype=np.int8), ("",)), Counter()
                continue
            values_n = shard.source.obs_column(column)
            check_are_labels(values_n, category=category, column=column, path=shard.path)
            spelled = Labels.of(values_n)
            unknown = {text for text in spelled.texts if is_missing(text, config.missing_labels)}
            labels[category] = Labels(spelled.codes_n, tuple("" if text in unknown else text for text in spelled.texts))
            missing[category] = Counter({text: n for text, n in spelled.counts().items() if text in unknown})
        asked = {split_by, *config.column_of_phenotype.values()} - {BY_CELL}
        lacks = {column: _alike(column, columns, is_donor=column == split_by) for column in sorted(asked - known)}
        return cls(units, labels, missing, lacks)


def names_of_cells(shard: Shard, start: int, stop: int) -> np.ndarray:
    """Return the names of neighboring cells, texts of shape (stop - start,)."""
    return np.asarray([str(name) for name in shard.source.cell_names(start, stop)], dtype=object)


def keys_of_cells(names_n: np.ndarray, config: PrepareConfig) -> np.ndarray:
    """Hash the names of cells under the seed, uint64 of shape (n,)."""
    return pd.util.hash_array(names_n, hash_key=f"{config.seed:016d}"[-16:], categorize=False)


def _alike(column: str, columns: Sequence[str], *, is_donor: bool) -> str:
    """Return the column whose name is most like that of another file, or ''."""
    spelled = {plain_spelling(name): name for name in reversed(columns)}
    near = difflib.get_close_matches(plain_spelling(column), spelled, n=1, cutoff=0.8)
    donors = [name for name in DONOR_COLUMNS if is_donor and name in columns]
    return spelled[near[0]] if near else donors[0] if donors else ""


@dataclass(frozen=True)
class FileSurvey:
    """What one file says of its cells and genes; `missing` and `lacks` as in `CellTable`."""

    num_cells: int
    key: str  # hash of its content, which decides the order of the files whatever their names
    state: tuple[int, int]  # size and time of change, which show that a file was replaced; zeros if it is not local
    genes: str  # hash of its gene names; files that agree share one table of genes
    scale: Scale
    notes: tuple[str, ...]  # what a user should know about how its values are read
    missing: dict[str, Counter[str]]
    units: Counter[str]  # cells of each donor, '' where missing, and for all cells when cells are split
    units_of_label: dict[str, dict[str, Counter[str]]]  # phenotype -> label -> donor -> cells
    lacks: dict[str, str]
    cell_keys_n: np.ndarray  # hash of each cell's name, uint64 of shape (n,); empty if the split needs none


@dataclass(frozen=True)
class Survey:
    """What all files say, in the order of their content; `units`, `missing` and `units_of_label` are sums."""

    sources: list[Any]
    files: list[FileSurvey]
    split_by: str  # the obs column that is kept whole, or "cell"
    num_cells: int
    units: Counter[str]
    missing: dict[str, Counter[str]]
    units_of_label: dict[str, dict[str, Counter[str]]]
    first_of_table: list[int]  # one file of each distinct table of genes
    table_of_source: np.ndarray  # each file's table of genes, int64 of shape (files,)

    def without_keys(self) -> "Survey":
        """Return the survey without what only `hold_out` needs: 8 bytes a cell."""
        return replace(self, files=[replace(file, cell_keys_n=np.zeros(0, dtype=np.uint64)) for file in self.files])


def survey_files(
    sources: Sequence[Any], config: PrepareConfig, workers: Workers, *, found: dict[int, FileSurvey] | None = None
) -> Survey:
    """Survey all files, unless what they say is `found`, and put them in the order of their content."""
    if config.where:
        with closing(open_files(sources, config)) as cache:
            check_where((cache[index].source for index in range(len(cache))), conditions(config.where))
    split_by = config.split_by or donor_column(sources, config)
    if found is None:
        found = dict(workers.run(partial(_survey_file, tuple(sources), config, split_by), range(len(sources))))
    warn_of_notes((path_of(source), found[index].notes) for index, source in enumerate(sources))
    order = sorted(found, key=lambda index: (found[index].key, str(sources[index])))
    files: list[FileSurvey] = [found[index] for index in order]
    if nowhere := set.intersection(*(set(file.lacks) for file in files)):
        with closing(open_files(sources, config)) as cache:
            cache[0].source.obs_column(min(nowhere))  # refuses it, with the nearest name
    num_cells = sum(file.num_cells for file in files)
    first_of: dict[str, int] = {}
    units_of_label: dict[str, dict[str, Counter[str]]] = {category: {} for category in config.column_of_phenotype}
    for index, file in enumerate(files):
        if file.num_cells or not num_cells:
            first_of.setdefault(file.genes, index)
        for category, of_label in file.units_of_label.items():
            for label, units in of_label.items():
                units_of_label[category].setdefault(label, Counter()).update(units)
    table_of = {genes: table for table, genes in enumerate(first_of)}
    return Survey(
        sources=[sources[index] for index in order], files=files, split_by=split_by, num_cells=num_cells,
        units=sum((file.units for file in files), Counter()),
        missing={name: sum((file.missing[name] for file in files), Counter()) for name in units_of_label},
        units_of_label=units_of_label, first_of_table=[*first_of.values()],
        table_of_source=np.array([table_of.get(file.genes, 0) for file in files]),
    )  # fmt: skip


def _survey_file(sources: Sequence[Any], config: PrepareConfig, split_by: str, index: int) -> FileSurvey:
    """Open and survey one file, by its number."""
    with closing(open_files([sources[index]], config)) as cache:
        return survey_file(sources[index], cache[0], config, split_by)


def survey_file(source: Any, shard: Shard, config: PrepareConfig, split_by: str) -> FileSurvey:
    """Survey one file. Its key hashes genes, cells, labels and the values of sampled rows."""
    table = CellTable.of(shard, config, split_by)
    genes = digest_of(*(str(column) for column in gene_names_of(shard)))
    digest = hashlib.sha256(f"{genes} {shard.source.shape}".encode())
    keys = [np.zeros(0, dtype=np.uint64)]
    for start in range(0, len(shard), PART_ROWS):
        names_n = names_of_cells(shard, start, min(start + PART_ROWS, len(shard)))
        text = "\0".join(["", *names_n] if start else names_n)
        digest.update(text.encode("utf-8", errors="surrogatepass"))
        keys.append(keys_of_cells(names_n, config) if split_by == BY_CELL else keys[0])
    for labels in (table.units, *table.labels.values()):
        digest.update("\0".join(labels.texts).encode("utf-8", errors="surrogatepass"))
        digest.update(labels.codes_n.astype(np.int32).tobytes())
    for span in sampled_spans(len(shard)):
        values_l, columns_l, offsets = shard.source.read_rows(*span)
        for array in (values_l.astype(np.float64), columns_l.astype(np.int64), offsets.astype(np.int64)):
            digest.update(array.tobytes())
    units_of_label: dict[str, dict[str, Counter[str]]] = {}
    for category, labels in table.labels.items():
        of_label = units_of_label.setdefault(category, {})
        pair_n = labels.codes_n.astype(np.int64) * len(table.units.texts)
        pair_n += table.units.codes_n
        pairs, times = np.unique(pair_n, return_counts=True)
        for pair, count in zip(pairs.tolist(), times.tolist(), strict=True):
            label, unit = divmod(pair, len(table.units.texts))
            if labels.texts[label]:
                of_label.setdefault(labels.texts[label], Counter())[table.units.texts[unit]] += count
    is_file = isinstance(source, str | Path) and os.path.exists(source)
    return FileSurvey(
        num_cells=len(shard), key=digest.hexdigest(), genes=genes, scale=shard.values.scale,
        notes=tuple(shard.values.notes),
        state=(os.stat(source).st_size, os.stat(source).st_mtime_ns) if is_file else (0, 0),
        missing=table.missing, units=table.units.counts(), units_of_label=units_of_label, lacks=table.lacks,
        cell_keys_n=np.concatenate(keys),
    )  # fmt: skip


def gene_names_of(shard: Shard) -> tuple[tuple[object, ...], ...]:
    """Return what a file calls its genes: names, ids and symbols (the names where it has no such column)."""
    names = shard.renaming.names
    return tuple(map(tuple, (names.own_c, *((columns or (names.own_c,))[0] for columns in names[1:]))))


def path_of(source: Any) -> str:
    """Return the path of an input for a reader, without passwords."""
    return shown_path(source) if isinstance(source, str | Path) else "AnnData"


def digest_of(*texts: object) -> str:
    """Hash texts, each ended by a zero byte."""
    return hashlib.sha256("".join(f"{text}\0" for text in texts).encode("utf-8", errors="surrogatepass")).hexdigest()


def donor_column(sources: Sequence[Any], config: PrepareConfig, known: Sequence[Collection[str]] = ()) -> str:
    """Return the donor column that most files have, if it names at least two donors; else "cell".

    `known` may say which columns the obs of each file has.
    """
    with closing(open_files(sources, config)) as cache:
        known = known or [set(shard.source.columns_of("obs")) for shard in cache]
        times = Counter(column for columns in known for column in DONOR_COLUMNS if column in columns)
        for column in sorted(times, key=lambda name: (-times[name], DONOR_COLUMNS.index(name))):
            units: set[str] = set()
            for index in (index for index, columns in enumerate(known) if column in columns):
                texts = map(label_text, cache[index].source.obs_column(column).unique())
                units |= {text for text in texts if not is_missing(text)}
                if len(units) > 1:
                    return column
    return BY_CELL


def hold_out(survey: Survey, config: PrepareConfig) -> tuple[frozenset[str], int]:
    """Choose what is held out: the donors that are named, or about `eval_fraction` of the cells, chosen by a hash.

    Returns the donors. When cells are split one by one: the highest key of a cell that is held out, else -1.
    """
    by, size_of, named = survey.split_by, survey.units, config.eval_donors
    wanted = config.eval_fraction * survey.num_cells
    if by == BY_CELL and named:
        raise InputError(
            f"eval_donors {listed(named)} need a split by donor, but cells are split one by one. Name the donor column "
            "with --split_by."
        )
    if by == BY_CELL:
        keys_n, place = np.concatenate([file.cell_keys_n for file in survey.files]), round(wanted) - 1
        if place < 0:
            return frozenset(), -1
        keys_n.partition(place)
        return frozenset(), int(keys_n[place])
    if unknown := sorted(set(named) - set(size_of)):
        raise InputError(f"eval_donors {listed(unknown)} are not in obs[{by!r}]. Known: {listed(size_of)}.")
    if len(size_of) < 2:
        raise InputError(
            f"obs[{by!r}] holds one value ({listed(size_of)}), so nothing can be held out. Give another --split_by, or "
            "--split_by cell."
        )
    if set(named) == set(size_of):
        raise InputError(f"eval_donors name every {by}, so nothing is left to train on. Name fewer.")
    if named or not wanted:
        return frozenset(named), -1
    chosen, num_chosen = set[str](), 0
    for unit in sorted(size_of, key=lambda text: hashlib.sha256(f"{config.seed}:{text}".encode()).digest()):
        is_nearer = abs(num_chosen + size_of[unit] - wanted) < abs(num_chosen - wanted)
        if is_nearer and len(chosen) < len(size_of) - 1:
            chosen.add(unit)
            num_chosen += size_of[unit]
    return frozenset(chosen or {min(sorted(size_of), key=size_of.__getitem__)}), -1


# -- parts of files, read in the process that needs them ----------------------------------------------------------


class Part(NamedTuple):
    """Neighboring rows of one file, and the name of the files that hold what is made of them."""

    number: int
    source: int
    start: int
    stop: int
    name: str


@dataclass(frozen=True)
class Plan:
    """What every process that reads files must know."""

    key: str  # fingerprint of all that the corpus depends on
    folder: Path  # where parts and shards are written
    config: PrepareConfig
    sources: list[Any]  # files or AnnData objects
    sizes: list[int]  # number of cells of each
    table_of_source: np.ndarray
    as_counts: bool  # True writes counts, False log1p counts per 10,000
    union: GenePanel  # the genes of all files
    split_by: str
    eval_units: frozenset[str]  # what is held out, see `hold_out`
    highest_eval_key: int
    flavor: HvgFlavor

    def parts(self) -> list[Part]:
        """Cut all files into parts of at most `PART_ROWS` rows."""
        spans = [(s, a, min(a + PART_ROWS, n)) for s, n in enumerate(self.sizes) for a in range(0, n, PART_ROWS)]
        return [Part(number, *span, f"part_{number:06d}.safetensors") for number, span in enumerate(spans)]


#: The file of a plan that was used last, and the table of its cells. No thread shares its handles with another.
_OPEN = threading.local()


def opened(plan: Plan, source: int) -> tuple[Shard, CellTable]:
    """Return one file of a plan and the table of its cells; it stays open until a task needs another file."""
    if getattr(_OPEN, "key", None) != plan.key:
        _OPEN.key, _OPEN.shards, _OPEN.tables = plan.key, open_files(plan.sources, plan.config, plan.union), {}
    if source not in _OPEN.tables:
        _OPEN.shards.close()
        _OPEN.tables = {source: CellTable.of(_OPEN.shards[source], plan.config, plan.split_by)}
    return _OPEN.shards[source], _OPEN.tables[source]


def close_files() -> None:
    """Close the files that this thread has opened."""
    if getattr(_OPEN, "key", None) is not None:
        _OPEN.shards.close()
        _OPEN.__dict__.clear()


def cells_of(plan: Plan, part: Part) -> tuple[CellTable, np.ndarray]:
    """Return the table of a part's file, and which of the part's cells are held out, shape (n,)."""
    table = opened(plan, part.source)[1]
    if plan.split_by == BY_CELL:
        names_n = names_of_cells(opened(plan, part.source)[0], part.start, part.stop)
        return table, keys_of_cells(names_n, plan.config) <= plan.highest_eval_key  # all False for -1
    is_eval_k = np.array([text in plan.eval_units for text in table.units.texts])
    return table, is_eval_k[table.units.codes_n[part.start : part.stop]]


def check_block(block: ExpressionBlock, rows_m: np.ndarray) -> None:
    """Raise an InputError if `prepare` could not use what was read of rows."""
    check_values(block.values_l, source=block.source)
    num_columns = len(block.alignment.gene_of_column_c)
    if len(block.columns_l) and not 0 <= block.columns_l.min() <= block.columns_l.max() < num_columns:
        raise InputError(f"{block.source} holds column indices outside its {num_columns:,} columns. Write it again.")
    cell_l = np.repeat(np.arange(len(block)), np.diff(block.offsets_n1))
    places_l = cell_l * num_columns + block.columns_l
    if (np.diff(places_l) <= 0).any() and (twice := np.flatnonzero(np.diff(np.sort(places_l)) == 0)).size:
        cell, column = divmod(int(np.sort(places_l)[twice[0]]), num_columns)
        raise InputError(
            f"{block.source}: row {rows_m[cell]} has a second value in column {column}. Add the values of "
            "such columns up (scipy's sum_duplicates) and write the file again."
        )


def blocks_of(plan: Plan, part: Part, rows_n: np.ndarray) -> Iterator[ExpressionBlock]:
    """Read rows of a part (sorted, numbered within the file) in blocks, in one pass through the file.

    Every value is checked, because the survey has seen a sample of rows only.
    """
    for first in range(0, len(rows_n), _BLOCK_ROWS):
        block = opened(plan, part.source)[0].read(rows_n[first : first + _BLOCK_ROWS])
        check_block(block, rows_n[first : first + _BLOCK_ROWS])
        yield block
