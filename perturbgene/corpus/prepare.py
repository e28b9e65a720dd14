"""Raw h5ad files to a corpus: genes harmonised and ranked, bins and vocabulary fitted, donors split, shards shuffled.

Owns what is decided once for a data set, from its training cells alone, and writes it down in `manifest.json`; leaves
counting to `statistics`, writing to `spool`, and where they run to `workers`. Letters: n cells, g genes,
t tables of genes.

The steps, each the same whatever the order of the files and the number of processes:
    files -> survey_file -> FileSurvey        cells, donors, genes; the files are put in the order of their content
    parts of files -> fit_part -> Statistics  moments, value histogram, label counts of the training cells
    Statistics -> GeneTokenizer, Layout       panel, bins, vocabulary; where every cell goes
    parts of files -> spool_part              rows, sorted by shard
    shards -> finish_shard                    h5ad files in shuffled order
What a part or shard has given is listed in a journal beside it, so that the same command continues where it was ended.
"""

import dataclasses
import datetime
import hashlib
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from perturbgene import __version__
from perturbgene.corpus.journal import JOURNAL_FILE, Journal
from perturbgene.corpus.manifest import BY_CELL, MANIFEST_FILE, MANIFEST_VERSION
from perturbgene.corpus.spool import SPOOL_FOLDER, Layout, finish_shard, hashes_of, spool_part, tasks_of
from perturbgene.corpus.statistics import STATISTICS_FOLDER, FileSurvey, Statistics, fit_part, merged, survey_file
from perturbgene.corpus.survey import (
    PART_ROWS,
    SPLITS,
    HvgFlavor,
    Plan,
    PrepareOptions,
    close_files,
    digest_of,
    gene_names_of,
)
from perturbgene.corpus.workers import Workers, WorkStoppedError, available_cores, open_workers
from perturbgene.data_utils.binning import LOWEST_EDGE, ValueHistogram, read_edges
from perturbgene.data_utils.genes import GenePanel, clean_gene, gene_report, is_ensembl, read_panel
from perturbgene.data_utils.labels import Vocabulary, is_missing, label_text
from perturbgene.data_utils.opening import expand_paths
from perturbgene.data_utils.shards import ShardCache
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError, listed
from perturbgene.urls import shown_path

logger = logging.getLogger(__name__)

#: Columns of obs that name the donor, in the order they are tried when --split_by is not given.
DONOR_COLUMNS = ("donor_id", "donor", "individual", "patient", "sample")

#: Inputs smaller than this many bytes in all are prepared in this process: starting others would take longer.
SMALL_INPUT = 32_000_000

#: Options that change how the work is done but not what comes out.
_OPTIONS_OF_THE_RUN = ("overwrite", "num_processes", "scheduler")


# -- what the files hold ------------------------------------------------------------------------------------------


@dataclass
class Survey:
    """What all files say, in the order of their content.

    Args:
        sources, files: The files (or AnnData objects) and what each says.
        split_by: The obs column that is never split, or "cell".
        warnings: What a reader of the audit should know.
    """

    sources: list[Any]
    files: list[FileSurvey]
    split_by: str
    warnings: list[str] = field(default_factory=list)

    @property
    def num_cells(self) -> int:
        """Cells of all files."""
        return sum(file.num_cells for file in self.files)

    @property
    def units(self) -> Counter[str]:
        """Cells of each donor in all files."""
        return sum((file.units for file in self.files), Counter())

    def units_of_label(self, category: str) -> dict[str, set[str]]:
        """Label -> donors that have it."""
        found: dict[str, set[str]] = {}
        for file in self.files:
            for label, units in file.units_of_label.get(category, {}).items():
                found.setdefault(label, set()).update(units)
        return found

    def tables(self) -> tuple[list[int], np.ndarray]:
        """Return one file of each distinct table of genes, and each file's table, int64 of shape (files,)."""
        first_of: dict[str, int] = {}
        for index, file in enumerate(self.files):
            if file.num_cells or not self.num_cells:
                first_of.setdefault(file.genes, index)
        number_of = {genes: number for number, genes in enumerate(first_of)}
        return [*first_of.values()], np.array([number_of.get(file.genes, 0) for file in self.files])


def _unit_column(sources: Sequence[Any], options: PrepareOptions) -> str:
    if options.split_by:
        return options.split_by
    bare = ShardCache(sources, layer=options.layer, panel=GenePanel(("none",)), vocabulary=Vocabulary({}))
    with closing(bare):
        known = [set(bare[index].source.columns_of("obs")) for index in range(len(bare))]
        for column in DONOR_COLUMNS:
            units: set[str] = set()
            for index in range(len(bare)) if all(column in columns for columns in known) else ():
                texts = map(label_text, bare[index].source.obs_column(column).unique())
                units |= {text for text in texts if not is_missing(text)}
                if len(units) > 1:
                    return column
    return BY_CELL


def _survey(sources: Sequence[Any], options: PrepareOptions, workers: Workers) -> Survey:
    split_by = _unit_column(sources, options)
    context = (tuple(sources), options, split_by)
    found = dict(workers.run(survey_file, context, range(len(sources))))
    order = sorted(found, key=lambda index: (found[index].key, str(sources[index])))
    survey = Survey([sources[index] for index in order], [found[index] for index in order], split_by)
    if split_by == BY_CELL:
        survey.warnings.append(
            "split by cell: cells of one donor stand on both sides, so scores are optimistic; give --split_by donor_id"
        )
    elif num_missing := survey.units[""]:
        survey.warnings.append(f"{num_missing:,} cells have no {split_by}: they stay together, as if one {split_by}")
    return survey


def _id_and_symbol(name: object, id_: object, symbol: object) -> tuple[str, str]:
    """Choose a gene's id: the Ensembl id wherever the file keeps it, else the name of its column; '' if it has none."""
    own, other, known_as = clean_gene(name), clean_gene(id_), clean_gene(label_text(symbol))
    if is_ensembl(other) and not is_ensembl(own):
        return other, known_as or own
    # A number counts columns or rows of a table elsewhere: two files with a gene "17" need not mean the same one.
    chosen = next((text for text in (own, known_as, other) if text and not text.isdecimal()), "")
    return chosen, known_as or own


def _union_panel(survey: Survey, options: PrepareOptions) -> GenePanel:
    """Join the genes of all files, in order of first appearance; a gene known by id and by symbol is one gene."""
    symbol_of: dict[str, str] = {}
    kept_apart: set[str] = set()
    bare = ShardCache(survey.sources, layer=options.layer, panel=GenePanel(("none",)), vocabulary=Vocabulary({}))
    with closing(bare):
        for index in survey.tables()[0]:
            columns = gene_names_of(bare[index], options.gene_id_column)
            genes = dict(itertools.starmap(_id_and_symbol, zip(*columns, strict=True)))
            genes.pop("", None)
            kept_apart.update(symbol for gene, symbol in genes.items() if symbol != gene and symbol in genes)
            for gene, symbol in genes.items():
                if symbol_of.setdefault(gene, symbol) == gene:
                    symbol_of[gene] = symbol
    if not symbol_of:
        raise InputError(
            "the files hold no genes: no column has a name, or numbers for names. Name the column of var that holds "
            "them with --gene_id_column."
        )
    times = Counter(symbol for gene, symbol in symbol_of.items() if symbol != gene)
    aliases = {symbol for symbol, count in times.items() if count == 1 and not is_ensembl(symbol)} - kept_apart
    kept = {gene: symbol for gene, symbol in symbol_of.items() if gene not in aliases}
    return GenePanel(tuple(kept), tuple(kept.values()))


# -- who is held out ----------------------------------------------------------------------------------------------


def _highest_eval_key(survey: Survey, options: PrepareOptions) -> int:
    """Return the hash up to which single cells are held out, so that `eval_fraction` of them are; -1 for none."""
    if options.eval_donors:
        raise InputError(
            f"eval_donors {listed(options.eval_donors)} need a split by donor, but cells are split one by one. Name "
            "the donor column with --split_by."
        )
    wanted = round(options.eval_fraction * survey.num_cells)
    if not wanted:
        return -1
    return int(np.partition(np.concatenate([file.cell_keys_n for file in survey.files]), wanted - 1)[wanted - 1])


def _eval_units(survey: Survey, options: PrepareOptions) -> list[str]:
    """Choose the donors to hold out: those named, or by hash up to about `eval_fraction` of the cells."""
    size_of = survey.units
    unknown = sorted(set(options.eval_donors) - set(size_of))
    if unknown:
        raise InputError(
            f"eval_donors {listed(unknown)} are not in obs[{survey.split_by!r}]. Known: {listed(size_of)}."
        )
    if len(size_of) < 2:
        raise InputError(
            f"obs[{survey.split_by!r}] holds one value ({listed(size_of)}), so nothing can be held out. Give another "
            "--split_by, or --split_by cell."
        )
    if set(options.eval_donors) == set(size_of):
        raise InputError(f"eval_donors name every {survey.split_by}, so nothing is left to train on. Name fewer.")
    wanted, chosen, held_out = options.eval_fraction * survey.num_cells, list(options.eval_donors), 0
    if chosen or not wanted:
        return chosen
    for unit in _rank_by_hash(list(size_of), options.seed):
        is_nearer = abs(held_out + size_of[unit] - wanted) < abs(held_out - wanted)
        if is_nearer and len(chosen) < len(size_of) - 1:
            chosen.append(unit)
            held_out += size_of[unit]
    return chosen or [min(sorted(size_of), key=size_of.__getitem__)]


def _rank_by_hash(texts: Sequence[str], seed: int) -> list[str]:
    return sorted(texts, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest())


# -- what is fitted on training cells -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ChosenPanel:
    """The genes of the corpus.

    Args:
        genes, symbols: In the order of the panel.
        union_g: Place of each among the genes of all files, -1 where no file has it.
    """

    genes: tuple[str, ...]
    symbols: tuple[str, ...]
    union_g: np.ndarray

    def first(self, most: int | None) -> "ChosenPanel":
        """Keep the first genes."""
        return ChosenPanel(self.genes[:most], self.symbols[:most], self.union_g[:most])

    def place_of(self, num_genes: int) -> np.ndarray:
        """Return each known gene's place in the panel, int64 of shape (num_genes,), -1 where it has none."""
        place = np.full(num_genes, -1, dtype=np.int64)
        is_known_g = self.union_g >= 0
        place[self.union_g[is_known_g]] = np.flatnonzero(is_known_g)
        return place


def _genes_of_union(union: GenePanel, union_g: np.ndarray) -> ChosenPanel:
    genes, symbols = (tuple(names[g] for g in union_g) for names in (union.genes, union.symbols))
    return ChosenPanel(genes, symbols, union_g)


def _given_panel(union: GenePanel, panel: str, warnings: list[str]) -> ChosenPanel:
    """Return a given panel, whole and in its order; genes of no file stay in it, unmeasured, and are counted."""
    path = Path(panel)
    symbols: tuple[str, ...] = ()
    try:
        if path.is_dir() or path.suffix == ".json":
            tokenizer = GeneTokenizer.from_pretrained(path)
            given, symbols = tuple(tokenizer.genes), tuple(tokenizer.gene_symbols)
        else:
            given = read_panel(path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"panel {panel} cannot be read ({error}). Give a text file of genes, or a run's folder."
        ) from error
    found = np.array([union.find(gene) for gene in given], dtype=np.int64)
    if symbols:
        found = np.array([g if g >= 0 else union.find(symbols[i]) for i, g in enumerate(found)], dtype=np.int64)
    num_missing = int((found < 0).sum())
    if 2 * num_missing > len(given) or not len(given):
        raise InputError(
            f"panel {panel}: {num_missing:,} of {len(given):,} genes are in no file. Give another --panel."
        )
    if num_missing:
        warnings.append(
            f"{num_missing:,} of {len(given):,} genes of panel {panel} are in no file: they stay, unmeasured"
        )
    if symbols:
        return ChosenPanel(given, symbols, found)
    names = [
        (union.genes[g], union.symbols[g]) if g >= 0 else (gene, gene) for gene, g in zip(given, found, strict=True)
    ]
    return ChosenPanel(tuple(gene for gene, _ in names), tuple(symbol for _, symbol in names), found)


def _choose_panel(plan: Plan, statistics: Statistics, warnings: list[str]) -> ChosenPanel:
    """Choose the genes: a given panel's, or expressed ones by variability."""
    moments, options = statistics.moments, plan.options
    if options.panel:
        panel = _given_panel(plan.panel, options.panel, warnings)
    else:
        score_g = statistics.counts.normalized_variance(moments.num_cells) if statistics.counts else None
        ranked = moments.rank(score_g)
        panel = _genes_of_union(plan.panel, ranked[moments.num_expressed_g[ranked] > 0])
    if not len(panel.genes):
        raise InputError("no training cell expresses any gene: is X empty? Choose the matrix with --layer.")
    if options.num_top_genes and options.num_top_genes > len(panel.genes):
        raise InputError(
            f"num_top_genes {options.num_top_genes:,} exceeds the {len(panel.genes):,} expressed genes. Lower it."
        )
    return panel.first(options.num_top_genes)


def _choose_edges(statistics: Statistics, panel: ChosenPanel, options: PrepareOptions) -> Any:
    if options.bin_edges_path:
        return read_edges(options.bin_edges_path)
    if options.bin_edges:
        return list(options.bin_edges)
    if options.normalization == "none":
        raise InputError("--normalization none needs --bin_edges, because quantile bins are fitted on log1p_cp10k.")
    if not options.per_gene_bins:
        return statistics.histogram.quantile_edges(options.num_bins)
    rows = zip(panel.genes, panel.union_g.tolist(), strict=True)
    return {gene: _edges_of_gene(statistics.histogram, row, options.num_bins) for gene, row in rows}


def _edges_of_gene(histogram: ValueHistogram, row: int, num_bins: int) -> list[float]:
    """Quantile edges of one gene; coinciding quantiles are spread so that every gene has `num_bins` edges."""
    edges = (histogram.quantile_edges(num_bins, row=row) if row >= 0 else []) or [LOWEST_EDGE]
    step = histogram.top / histogram.counts_gr.shape[1]
    while len(edges) < num_bins:
        edges.append(round(edges[-1] + step, 6))
    return edges


def _choose_labels(statistics: Statistics, warnings: list[str]) -> dict[str, list[str]]:
    labels: dict[str, list[str]] = {}
    for category, of_split in statistics.labels.items():
        seen = set(of_split["train"]) - {""}
        if not seen:
            raise InputError(
                f"no training cell has a {category!r}. Leave it out of --phenotypes, or choose its column."
            )
        labels[category] = sorted(seen)
        if new := sorted(set(of_split["eval"]) - {"", *seen}):
            warnings.append(f"{category}: {listed(new)} occur in eval cells only and cannot be predicted")
    return labels


# -- genes of the files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneTables:
    """The distinct tables of genes of the files.

    Args:
        measured_tg: True where a table has a gene of the panel, shape (t, g).
        table_of_source: Each file's table, int64 of shape (files,).
        reports: What became of each table's genes; see `genes.gene_report`.
    """

    measured_tg: np.ndarray
    table_of_source: np.ndarray
    reports: list[dict[str, Any]]


def _gene_tables(plan: Plan, survey: Survey, panel: ChosenPanel) -> GeneTables:
    first_files, table_of_source = survey.tables()
    place, chosen = panel.place_of(len(plan.panel)), GenePanel(panel.genes, panel.symbols)
    measured_tg, reports = np.zeros((len(first_files), len(chosen)), dtype=bool), []
    with closing(plan.cache()) as cache:
        for table, index in enumerate(first_files):
            shard = cache[index]
            places = place[shard.alignment.is_measured_g]
            measured_tg[table, places[places >= 0]] = True
            names = gene_names_of(shard, plan.options.gene_id_column)[0]
            reports.append(gene_report(names, shard.alignment, panel_of_gene=place, panel=chosen))
            kinds = ", ".join(f"{report['count']:,} {kind}" for kind, report in reports[-1].items())
            logger.info("genes of %s: %s", shard.path, kinds)
            for kind in ("mapped", "summed", "unknown"):
                if reports[-1][kind]["count"]:
                    logger.info("  %s: %s", kind, ", ".join(reports[-1][kind]["examples"]))
    return GeneTables(measured_tg, table_of_source, reports)


def _unmeasured(tables: GeneTables, survey: Survey) -> list[str]:
    """Report panel genes that some file lacks: in the shards its cells have no counts there, as if not expressed."""
    num_tables_g = tables.measured_tg.sum(axis=0)
    lacks_g = (num_tables_g > 0) & (num_tables_g < len(tables.measured_tg))
    lacks_t = tables.measured_tg[:, lacks_g].sum(axis=1) < lacks_g.sum()
    files = [
        _path_of(source) for source, table in zip(survey.sources, tables.table_of_source, strict=True) if lacks_t[table]
    ]
    if not lacks_g.any():
        return []
    return [
        f"{lacks_g.sum():,} of {len(lacks_g):,} panel genes are not measured in all files "
        f"({listed(sorted(files), most=3)} lack some): there they count as not expressed"
    ]


def _path_of(source: Any) -> str:
    return shown_path(source) if isinstance(source, str | Path) else "AnnData"


# -- audit and manifest -------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What pass two has written.

    Args:
        shards: Split -> its shards, as the manifest lists them.
        hashes: Split -> content hash of every cell.
        dropped: Split -> cells with too few genes.
    """

    shards: dict[str, list[dict[str, Any]]]
    hashes: dict[str, np.ndarray]
    dropped: Counter[str]


def _audit(survey: Survey, outcome: Outcome, options: PrepareOptions) -> list[str]:
    """Return what may make scores dishonest: duplicate cells, confounded labels, donors on both sides."""
    findings, hashes = list(survey.warnings), outcome.hashes
    for name, values in hashes.items():
        if (copies := len(values) - len(np.unique(values))) > 0:
            findings.append(f"{copies:,} of {len(values):,} {name} cells are exact copies of another {name} cell")
    if (shared := np.isin(hashes["eval"], hashes["train"]).sum()) > 0:
        findings.append(f"{shared:,} of {len(hashes['eval']):,} eval cells are exact copies of a training cell")
    for name in SPLITS:
        if outcome.dropped[name]:
            findings.append(
                f"{outcome.dropped[name]:,} {name} cells express fewer than {options.min_genes} panel genes: dropped"
            )
    for category in options.column_of_phenotype if survey.split_by != BY_CELL else ():
        alone = sorted(label for label, units in survey.units_of_label(category).items() if len(units) == 1)
        if alone:
            findings.append(f"{category}: {listed(alone)} come from one {survey.split_by} only (confounded)")
    return findings


def _manifest(
    plan: Plan, survey: Survey, statistics: Statistics, tables: GeneTables, tokenizer: GeneTokenizer, outcome: Outcome,
    findings: Sequence[str], *, as_counts: bool,
) -> dict[str, Any]:  # fmt: skip
    units = {
        "train": sorted(set(survey.units) - plan.eval_units),
        "eval": sorted(plan.eval_units & set(survey.units)),
    }
    inputs = [
        {"path": _path_of(source), "cells": file.num_cells, "values": "counts" if file.is_counts else "log",
         "gene_table": int(table)}
        for source, file, table in zip(survey.sources, survey.files, tables.table_of_source, strict=True)
    ]  # fmt: skip
    return {
        "manifest_version": MANIFEST_VERSION,
        "perturbgene_version": __version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "inputs": inputs,
        "gene_tables": tables.reports,
        "values": "counts" if as_counts else "log1p_cp10k",
        "num_genes": len(tokenizer.panel),
        "hvg_flavor": "given" if plan.options.panel else plan.flavor,
        "bin_edges": tokenizer.bin_edges.to_json(tokenizer.genes) if tokenizer.bin_edges.is_shared else "per gene",
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "split": {
            "by": survey.split_by,
            "seed": plan.options.seed,
            "eval_fraction": plan.options.eval_fraction,
            **(units if survey.split_by != BY_CELL else {}),
        },
        "phenotypes": {
            category: {
                split: {label or "(missing)": count for label, count in sorted(counts.items())}
                for split, counts in of_split.items()
            }
            for category, of_split in statistics.labels.items()
        },
        "shards": outcome.shards,
        "audit": list(findings),
    }


# -- doing it, and continuing it ----------------------------------------------------------------------------------


@dataclass
class _Work:
    """Runs tasks that each write one file, but for those the journal lists."""

    workers: Workers
    journal: Journal

    def do(
        self, task: Callable[[Any, Any], dict[str, Any]], context: Any, items: Mapping[str, Any],
        *, cells: Mapping[str, int], text: str,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Return the journal entries of all files, in the order of `items` (file -> item)."""
        open_items = {item: file for file, item in items.items() if file not in self.journal}
        if len(open_items) < len(items):
            logger.info("%s: %d of %d are done already", text, len(items) - len(open_items), len(items))
        done = sum(cells[file] for file in items if file in self.journal)
        total = sum(cells.values())
        with tqdm(total=total, initial=done, desc=text, unit=" cells", unit_scale=True, disable=None) as bar:
            for item, entry in self.workers.run(task, context, list(open_items)):
                self.journal.add(entry)
                bar.update(cells[open_items[item]])
        return [self.journal[file] for file in items]


def _target(output: str | Path, *, overwrite: bool) -> tuple[Path, Path]:
    """Return the corpus folder and the folder beside it that is filled first.

    Raises:
        InputError: Either holds something that is not ours to replace, or cannot be made.
    """
    folder = Path(output).expanduser()
    folder = folder if folder.name else folder.resolve()
    if folder.exists() and not overwrite:
        is_empty = folder.is_dir() and not any(folder.iterdir())
        if not is_empty:
            raise InputError(f"{folder} exists and is not empty. Choose another --output, or pass --overwrite.")
    elif folder.exists() and not (folder / MANIFEST_FILE).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not a corpus ({MANIFEST_FILE} is missing), so --overwrite leaves it alone.")
    temporary = folder.with_name(folder.name + ".part")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error}). Choose another --output.") from error
    if any(temporary.iterdir()) and not (temporary / JOURNAL_FILE).exists():
        raise InputError(
            f"{temporary} is where unfinished work goes, but it holds something else. Move it away, or choose another "
            "--output."
        )
    return folder, temporary


def _begin(folder: Path, key: str) -> Journal:
    """Continue the work in a folder when it was begun with the same inputs and settings; otherwise start it again."""
    journal = Journal(folder, key)
    if journal.path.exists() and journal.resume():
        logger.info("%s: continuing, %d finished files are kept", folder, len(journal))
    else:
        if journal.path.exists():
            logger.warning("%s was begun with other inputs or settings: starting again", folder)
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        journal.begin()
    for name in (STATISTICS_FOLDER, SPOOL_FOLDER, *SPLITS):
        (folder / name).mkdir(exist_ok=True)
    return journal


def _key_of(survey: Survey, options: PrepareOptions) -> str:
    """Hash all that a corpus depends on: the settings, the files they name, and the inputs."""
    settings = {n: v for n, v in dataclasses.asdict(options).items() if n not in _OPTIONS_OF_THE_RUN}
    named = [Path(path) for path in (options.panel, options.bin_edges_path) if path]
    named = [path / "tokenizer.json" if path.is_dir() else path for path in named]
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "" for path in named]
    files = [(file.key, file.state) for file in survey.files]
    return digest_of(__version__, PART_ROWS, json.dumps(settings, default=list, sort_keys=True), contents, files)


def prepare(inputs: str | Path | Sequence[Any], output: str | Path, **options: Any) -> Path:
    """Make a corpus from h5ad files (or AnnData objects).

    The same inputs, in any order, and the same options give shards of the same bytes, on any number of processes or
    machines. When the work is cut short, the same call continues it: finished parts lie in a folder named like the
    corpus with `.part` behind it.

    Args:
        inputs: Files, patterns or folders; or AnnData objects.
        output: The corpus folder: `train/`, `eval/` (shards that scanpy opens), `tokenizer.json`, `manifest.json`.
        options: See `PrepareOptions` and `perturbgene prepare -h`.

    Returns:
        The corpus folder, complete; it appears by one rename.

    Raises:
        InputError: A file, column or option cannot be used; nothing is left behind.
        WorkStoppedError: Workers were ended from outside; what is finished stays.

    Example:
        >>> import perturbgene as pg
        >>> corpus = pg.prepare_corpus("cells.h5ad", "prepared", phenotypes=["cell_type"], num_top_genes=50)
        >>> sorted(path.name for path in corpus.iterdir())
        ['eval', 'manifest.json', 'tokenizer.json', 'train']
    """
    chosen = PrepareOptions(**options)
    folder, temporary = _target(output, overwrite=chosen.overwrite)
    was_begun = any(temporary.iterdir())
    try:
        _prepare(inputs, temporary, chosen)
    except InputError as error:
        if not was_begun and not isinstance(error, WorkStoppedError):
            shutil.rmtree(temporary)
        raise
    finally:
        close_files()
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)
    for name in (STATISTICS_FOLDER, SPOOL_FOLDER):
        shutil.rmtree(folder / name)
    (folder / JOURNAL_FILE).unlink()
    logger.info("corpus written to %s", folder)
    return folder


def _sources_of(inputs: Any) -> tuple[list[Any], bool]:
    """Return the files, or the AnnData objects and True."""
    if hasattr(inputs, "obs_names"):
        return [inputs], True
    if not isinstance(inputs, str | Path) and any(hasattr(item, "obs_names") for item in inputs):
        return list(inputs), True
    return expand_paths(inputs), False


def _num_processes(sources: Sequence[Any], options: PrepareOptions, *, is_memory: bool) -> int:
    """Decide how many processes work: those asked for, or every core when the files are worth it."""
    if is_memory or options.num_processes:
        return 1 if is_memory else options.num_processes
    sizes = [path.stat().st_size if (path := Path(source)).exists() else SMALL_INPUT for source in sources]
    return available_cores() if sum(sizes) >= SMALL_INPUT else 1


def _prepare(inputs: Any, folder: Path, options: PrepareOptions) -> None:
    sources, is_memory = _sources_of(inputs)
    if is_memory and options.scheduler:
        raise InputError("--scheduler needs files that its workers can read, but AnnData objects were given.")
    num_processes = _num_processes(sources, options, is_memory=is_memory)
    module = "perturbgene.corpus.spool"
    with open_workers(scheduler=options.scheduler, num_processes=num_processes, preload=module) as workers:
        survey = _survey(sources, options, workers)
        plan = _plan(survey, folder, options)
        work = _Work(workers, _begin(folder, plan.key))
        parts = plan.parts()
        cells = {f"{STATISTICS_FOLDER}/{part.name}": part.stop - part.start for part in parts}
        entries = work.do(fit_part, plan, dict(zip(cells, parts, strict=True)), cells=cells, text="genes and bins")
        statistics = merged(plan, entries)
        labels = _choose_labels(statistics, survey.warnings)
        panel = _choose_panel(plan, statistics, survey.warnings)
        tables = _gene_tables(plan, survey, panel)
        survey.warnings += _unmeasured(tables, survey)
        tokenizer = GeneTokenizer(
            genes=list(panel.genes),
            gene_symbols=list(panel.symbols),
            phenotypes=labels,
            bin_edges=_choose_edges(statistics, panel, options),
            included_phenotypes=list(labels),
            normalization=options.normalization,
        )
        layout = _layout(plan, survey, statistics, entries, panel, tables)
        outcome = _write(layout, work)
    findings = _audit(survey, outcome, options)
    for finding in findings:
        logger.warning("audit: %s", finding)
    tokenizer.save_pretrained(folder)
    manifest = _manifest(plan, survey, statistics, tables, tokenizer, outcome, findings, as_counts=layout.as_counts)
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _plan(survey: Survey, folder: Path, options: PrepareOptions) -> Plan:
    is_by_cell = survey.split_by == BY_CELL
    return Plan(
        key=_key_of(survey, options),
        folder=str(folder),
        options=options,
        sources=tuple(survey.sources),
        sizes=tuple(file.num_cells for file in survey.files),
        panel=_union_panel(survey, options),
        split_by=survey.split_by,
        eval_units=frozenset() if is_by_cell else frozenset(_eval_units(survey, options)),
        highest_eval_key=_highest_eval_key(survey, options) if is_by_cell else -1,
        flavor=_flavor(survey, options),
    )


def _flavor(survey: Survey, options: PrepareOptions) -> HvgFlavor:
    """Choose how genes are ranked: `seurat_v3` needs raw counts, kept one by one."""
    is_raw = all(file.is_counts for file in survey.files) and options.normalization == "auto"
    if options.hvg_flavor == "seurat_v3" and not is_raw:
        raise InputError(
            "--hvg_flavor seurat_v3 needs raw counts in every file, but some hold logarithms or are normalised on "
            "request. Choose the counts with --layer, or give --hvg_flavor seurat."
        )
    if options.hvg_flavor != "auto":
        return options.hvg_flavor
    return "seurat_v3" if is_raw and not options.panel else "seurat"


def _layout(
    plan: Plan, survey: Survey, statistics: Statistics, entries: Sequence[Mapping[str, Any]], panel: ChosenPanel,
    tables: GeneTables,
) -> Layout:  # fmt: skip
    return Layout(
        plan=plan,
        genes=panel.genes,
        symbols=panel.symbols,
        gene_to_panel=panel.place_of(len(plan.panel)),
        labels={name: sorted(set().union(*of_split.values()) - {""}) for name, of_split in statistics.labels.items()},
        units=sorted(set(survey.units) - {""}),
        as_counts=all(file.is_counts for file in survey.files),
        num_cells=dict(statistics.num_cells),
        first_of_part={split: np.cumsum([0] + [entry[split] for entry in entries])[:-1] for split in SPLITS},
        table_of_source=tables.table_of_source,
        measured_tg=tables.measured_tg,
    )


def _write(layout: Layout, work: _Work) -> Outcome:
    """Spool all parts, then finish all shards."""
    parts = layout.plan.parts()
    cells = {f"{SPOOL_FOLDER}/{part.name}": part.stop - part.start for part in parts}
    entries = work.do(spool_part, layout, dict(zip(cells, parts, strict=True)), cells=cells, text="dealing cells")
    tasks = {task.file: task for task in tasks_of(layout)}
    sizes = dict.fromkeys(tasks, layout.plan.options.shard_size)
    written = work.do(finish_shard, layout, tasks, cells=sizes, text="writing shards")
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for task, entry in zip(tasks.values(), written, strict=True):
        shards[task.split].append({name: entry[name] for name in ("file", "cells", "sha256")})
    dropped: Counter[str] = Counter()
    for entry in entries:
        dropped.update(entry["dropped"])
    return Outcome(shards, hashes_of(layout), dropped)


def run_prepare(config: Any) -> Path:
    """Run the `prepare` verb."""
    names = PrepareOptions.__dataclass_fields__
    return prepare(config.inputs, config.output, **{name: getattr(config, name) for name in names})


__all__ = ["PrepareOptions", "prepare", "run_prepare"]
