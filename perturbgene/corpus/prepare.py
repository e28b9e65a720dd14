"""The verb `prepare`: survey the files, count training cells, choose genes and bins, write shuffled shards, audit.

Owns the order of the steps, and the output folder with what an interrupted run left of it; the steps are other modules.
The result does not depend on the order of the files or on the number of processes:

    files -> survey_files -> Survey        cells, donors, genes; the files are put in the order of their content
    parts -> count_part   -> Statistics    gene moments, value histogram, label counts of training cells
    Statistics -> choose_genes, tokenizer  panel, bins, vocabulary
    parts -> spool_part -> write_shuffled  rows sorted by shard, then shards in shuffled order
    all of it -> audit                     findings and manifest.json
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perturbgene import __version__
from perturbgene.cli.verbs import PrepareConfig
from perturbgene.corpus import audit
from perturbgene.corpus.manifest import BY_CELL, MANIFEST_FILE, REPORT_FILE
from perturbgene.corpus.panel import CorpusGenes, choose_genes, join_genes
from perturbgene.corpus.spool import (
    SPOOL_FOLDER,
    DealtCells,
    Layout,
    read_hashes,
    read_spool,
    spool_part,
    write_shuffled,
)  # fmt: skip
from perturbgene.corpus.statistics import STATISTICS_FOLDER, Statistics, count_part, merge_parts
from perturbgene.corpus.survey import (
    PART_ROWS,
    SPLITS,
    FileSurvey,
    Plan,
    Survey,
    close_files,
    digest_of,
    hold_out,
    path_of,
    survey_files,
)  # fmt: skip
from perturbgene.corpus.workers import JOURNAL_FILE, Journal, Workers, open_workers
from perturbgene.data_utils.binning import read_edges
from perturbgene.data_utils.genes import GenePanel
from perturbgene.data_utils.labels import with_new_labels
from perturbgene.data_utils.opening import FileList, as_sources
from perturbgene.data_utils.recognition import COUNTS
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError, listed
from perturbgene.files import claimed, is_report, read_json, sha256_of, write_json

logger = logging.getLogger(__name__)

#: Inputs smaller than this many bytes in all are prepared in this process: starting others would take longer.
SMALL_INPUT = 32_000_000

#: Options that change how the work is done but not what comes out.
_OPTIONS_OF_THE_RUN = ("inputs", "output", "overwrite", "report", "num_processes", "scheduler")

#: Where the new corpus grows, in the folder of unfinished work.
_NEW = "corpus"

# All that `prepare` writes: it deletes nothing else. What shows that a folder is ours comes last.
_CORPUS_FILES = (f"*{REPORT_FILE}*", "train/*shard_*", "eval/*shard_*", "*tokenizer.json*", f"*{MANIFEST_FILE}*")
_WORK_FILES = (f"{STATISTICS_FOLDER}/part_*", f"{SPOOL_FOLDER}/part_*",
               *(f"{_NEW}/{pattern}" for pattern in _CORPUS_FILES), JOURNAL_FILE)  # fmt: skip


def prepare(inputs: Any, output: str | Path, **options: Any) -> Path:
    """Make a corpus from h5ad files (or AnnData objects).

    The same inputs, in any order, and the same options give shards of the same bytes, on any number of processes or
    machines. If the work is cut short, the same call continues it: finished parts are kept in a folder that is named
    like the corpus, with `.part` at the end.

    Args:
        inputs: Files, patterns or folders; or AnnData objects.
        output: The corpus folder: `train/`, `eval/` (shards that scanpy opens), `tokenizer.json`, `manifest.json`.
        options: The other fields of `PrepareConfig`, which `perturbgene prepare -h` explains.

    Returns:
        The corpus folder, complete; it appears by one rename.

    Raises:
        InputError: A file, column or option cannot be used, or another process writes this corpus.
        WorkStoppedError: Workers were killed from outside; finished files stay.

    Example:
        >>> import perturbgene as pg
        >>> corpus = pg.prepare("cells.h5ad", "prepared", phenotypes=["cell_type"], num_top_genes=50)
        >>> sorted(path.name for path in corpus.iterdir())
        ['eval', 'manifest.json', 'tokenizer.json', 'train']
    """
    sources = as_sources(inputs)
    is_memory = not isinstance(sources, FileList)
    config = PrepareConfig(inputs=[path_of(source) for source in sources], output=str(output), **options)
    if is_memory and config.scheduler:
        raise InputError("--scheduler needs files that its workers can read, but AnnData objects were given.")
    # One process for every core, if the files are worth it.
    sizes = [0 if is_memory else _num_bytes(x) if os.path.exists(x) else SMALL_INPUT for x in sources]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    num_processes = 1 if is_memory else config.num_processes or (cores if sum(sizes) >= SMALL_INPUT else 1)
    folder = Path(output).expanduser()
    folder = folder if folder.name and not folder.is_symlink() else folder.resolve()
    with claimed(folder, flag="output"):
        work = folder.with_name(folder.name + ".part")
        _check_folders(folder, work, overwrite=config.overwrite)
        was_begun = work.exists()
        try:
            _run_steps(sources, config, work, num_processes=num_processes)
        except InputError:
            if not was_begun:
                _delete(work, _WORK_FILES)
            raise
        finally:
            close_files()
        if folder.exists():
            folder.rename(_replaced(folder))
        (work / _NEW).rename(folder)
        _delete(work, _WORK_FILES)
        _delete(_replaced(folder), _CORPUS_FILES)
    logger.info("corpus written to %s", folder)
    return folder


def _num_bytes(path: str) -> int:
    """Return the size of a file, or of all files of a zarr store or matrix folder."""
    return sum(file.stat().st_size for file in ([Path(path)] if os.path.isfile(path) else Path(path).rglob("*")))


def run_prepare(config: PrepareConfig) -> Path:
    """Run the `prepare` verb."""
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return prepare(options.pop("inputs"), options.pop("output"), **options)


# -- the steps ----------------------------------------------------------------------------------------------------


def _count(
    sources: Sequence[Any],
    config: PrepareConfig,
    work: Path,
    workers: Workers,
    *,
    found: dict[int, FileSurvey] | None = None,
) -> tuple[Survey, Plan, Journal, Statistics, CorpusGenes, GeneTokenizer]:
    """Do all that is decided before cells are dealt: survey, count the values of all cells, choose genes and bins."""
    like = GeneTokenizer.from_pretrained(config.like) if config.like else None
    if like and like.normalization != config.normalization and "none" in (like.normalization, config.normalization):
        raise InputError(
            f"like {config.like} was prepared with --normalization {like.normalization}, so its bins mean other values "
            f"than with {config.normalization}. Give --normalization {like.normalization}."
        )
    survey = survey_files(sources, config, workers, found=found)
    union, measured_tu = join_genes(survey, config)
    plan, survey = _plan(survey, union, config, work), survey.without_keys()
    journal = _continue(work, plan.key)
    entries = _run_parts(STATISTICS_FOLDER, count_part, plan, "genes and bins", plan, workers, journal)
    statistics = merge_parts(plan, entries)
    genes = choose_genes(plan, survey, statistics, measured_tu=measured_tu)
    return survey, plan, journal, statistics, genes, _tokenizer(statistics, genes, config, like=like)


def _run_parts(
    folder: str, task: Callable[..., Any], context: Any, text: str, plan: Plan, workers: Workers, journal: Journal
) -> list[dict[str, Any]]:
    """Let workers write one file for each part of the plan."""
    items = {f"{folder}/{part.name}": part for part in plan.parts()}
    cells = {file: part.stop - part.start for file, part in items.items()}
    return workers.write_files(task, context, items, journal=journal, cells=cells, text=text)


def rehearse(
    sources: Sequence[Any], config: PrepareConfig, work: Path, found: dict[int, FileSurvey]
) -> tuple[Survey, Plan, list[str]]:
    """Do what `prepare` does before it deals the cells, and return its findings; nothing is left but `work`.

    `found` are the surveys of all files, by their numbers.
    """
    try:
        survey, plan, _, statistics, genes, _ = _count(sources, config, work, Workers(), found=found)
    finally:
        close_files()
    return survey, plan, audit.find(plan, survey, statistics, genes, None)


def _run_steps(sources: Sequence[Any], config: PrepareConfig, work: Path, *, num_processes: int) -> None:
    """Fill the folder `corpus` in the folder of unfinished work."""
    module = "perturbgene.corpus.spool"
    with open_workers(scheduler=config.scheduler, num_processes=num_processes, preload=module) as workers:
        survey, plan, journal, statistics, genes, tokenizer = _count(sources, config, work, workers)
        texts = {name: sorted(set().union(*of.values()) - {""}) for name, of in statistics.labels.items()}
        if plan.split_by != BY_CELL:
            texts.setdefault(plan.split_by, sorted(set(survey.units) - {""}))
        num_shards = {split: -(-number // config.shard_size) for split, number in statistics.num_cells.items()}
        layout = Layout(plan, genes, texts, statistics.num_cells, num_shards, statistics.first_of_part)
        spooled = _run_parts(SPOOL_FOLDER, spool_part, layout, "dealing cells", plan, workers, journal)
        shards = read_spool(layout)
        items = {f"{_NEW}/{file}": shard for file, shard in shards.items()}
        cells = dict.fromkeys(items, config.shard_size)
        written = workers.write_files(
            write_shuffled, layout, items, journal=journal, cells=cells, text="writing shards"
        )
    dealt = DealtCells.of(plan, spooled, read_hashes(layout))  # now that no worker needs memory
    findings = audit.find(plan, survey, statistics, genes, dealt)
    for finding in findings:
        logger.warning("audit: %s", finding)
    tokenizer.save_pretrained(work / _NEW)
    listing: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for (file, (split, _)), entry in zip(shards.items(), written, strict=True):
        listing[split].append({"file": file, **{key: entry[key] for key in ("cells", "bytes", "sha256")}})
    manifest = audit.describe(plan, survey, statistics, genes, tokenizer, dealt, shards=listing, findings=findings)
    write_json(work / _NEW / MANIFEST_FILE, manifest, indent=1)


def _plan(survey: Survey, union: GenePanel, config: PrepareConfig, work: Path) -> Plan:
    """Decide what must be known before any value is read: the split, and how genes are ranked."""
    # `seurat_v3` needs raw counts, kept one by one.
    as_counts, flavor = all(file.scale == COUNTS for file in survey.files), config.hvg_flavor
    is_raw = as_counts and config.normalization == "auto"
    if flavor == "seurat_v3" and not is_raw:
        raise InputError(
            "--hvg_flavor seurat_v3 needs raw counts in every file, but some hold other values or are normalized on "
            "request. Choose the counts with --layer, or give --hvg_flavor seurat."
        )
    if flavor == "auto":
        flavor = "seurat_v3" if is_raw and not config.panel else "seurat"
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OPTIONS_OF_THE_RUN}
    named = [Path(path) for path in (config.panel, config.bin_edges_path, config.like, config.gene_map) if path]
    named = [path / "tokenizer.json" if path.is_dir() else path for path in named]
    contents = [sha256_of(path) if path.is_file() else "" for path in named]
    files = [(file.key, file.state) for file in survey.files]
    eval_units, highest_eval_key = hold_out(survey, config)
    if eval_units:
        num_held_out = sum(survey.units[unit] for unit in eval_units)
        logger.info(
            "held out for evaluation: %d of %d values of obs[%r] (%s), %s of %s cells", len(eval_units),
            len(survey.units), survey.split_by, listed(sorted(eval_units)), f"{num_held_out:,}",
            f"{survey.num_cells:,}",
        )  # fmt: skip
    return Plan(
        key=digest_of(PART_ROWS, __version__, json.dumps(settings, default=list, sort_keys=True), contents, files),
        folder=work, config=config, sources=survey.sources, sizes=[file.num_cells for file in survey.files],
        table_of_source=survey.table_of_source, as_counts=as_counts, union=union, split_by=survey.split_by,
        eval_units=eval_units, highest_eval_key=highest_eval_key, flavor=flavor,
    )  # fmt: skip


def _tokenizer(
    statistics: Statistics, genes: CorpusGenes, config: PrepareConfig, *, like: GeneTokenizer | None = None
) -> GeneTokenizer:
    """Return the tokenizer of the chosen genes, with the labels of training cells and the given or fitted bins.

    It has the bins of `like` and first its labels; new labels follow those of their phenotype.
    """
    labels = {category: sorted(set(of["train"]) - {""}) for category, of in statistics.labels.items()}
    if empty := [category for category, seen in labels.items() if not seen]:
        raise InputError(f"no training cell has a {empty[0]!r}. Leave it out of --phenotypes, or choose its column.")
    included = list(labels)
    if like:
        labels, edges_ge = with_new_labels(like.phenotypes, labels), like.bin_edges.edges_ge
        edges: Any = edges_ge[0].tolist()
        if not like.bin_edges.is_shared:  # a new gene gets the mean edges of the others
            edges = {gene: edges_ge.mean(axis=0).tolist() for gene in genes.panel.genes}
            edges |= like.bin_edges.to_json(like.genes)
    elif config.bin_edges_path:
        edges = read_edges(config.bin_edges_path)
    elif config.bin_edges:
        edges = list(config.bin_edges)
    elif config.normalization == "none":
        raise InputError("--normalization none needs --bin_edges, because quantile bins are fitted on log1p_cp10k.")
    else:
        edges = statistics.histogram.quantile_edges(config.num_bins)
    return GeneTokenizer(
        genes=list(genes.panel.genes), gene_symbols=list(genes.panel.symbols), phenotypes=labels, bin_edges=edges,
        included_phenotypes=included, normalization=like.normalization if like else config.normalization,
    )  # fmt: skip


# -- the folders --------------------------------------------------------------------------------------------------


def _replaced(folder: Path) -> Path:
    """Return where an old corpus is moved before the new one takes its name."""
    return folder.with_name(f".{folder.name}.replaced")


def _check_folders(folder: Path, work: Path, *, overwrite: bool) -> None:
    """Clear away what a run left that was killed at its very end, and refuse to touch anything that is not ours."""
    if _replaced(folder).exists() and not folder.exists():
        _replaced(folder).rename(folder)  # killed just before the new corpus took its place
    _delete(_replaced(folder), _CORPUS_FILES)
    if (work / JOURNAL_FILE).exists() and not (work / _NEW).exists():
        _delete(work, _WORK_FILES)  # killed just after
    if work.exists() and not any(path.is_file() for path in work.rglob("*")):
        _delete(work, ())  # killed while it removed empty folders
    if work.exists() and not (work / JOURNAL_FILE).exists():
        raise InputError(
            f"{work} is where unfinished work goes, but it holds something else. Move it away, or choose another "
            "--output."
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{folder} exists and is not empty. Choose another --output, or pass --overwrite.")
    try:
        is_corpus = "manifest_version" in read_json(folder / MANIFEST_FILE)
    except (OSError, ValueError, TypeError):
        is_corpus = False
    if not is_corpus:
        raise InputError(f"{folder} is not a corpus (no {MANIFEST_FILE} of ours), so --overwrite leaves it alone.")
    ours = {path for pattern in _CORPUS_FILES for path in folder.glob(pattern)}
    if (page := folder / REPORT_FILE).is_file() and not is_report(page):
        ours.discard(page)
    others = [str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir() and path not in ours]
    if others:
        raise InputError(
            f"{folder} holds files that prepare did not write ({listed(sorted(others))}), so --overwrite leaves it "
            "alone. Move them away, or choose another --output."
        )


def _delete(folder: Path, patterns: Sequence[str]) -> None:
    """Delete the files of a folder that match, in the order of the patterns, and then the folders that are empty."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _continue(work: Path, key: str) -> Journal:
    """Continue the work in a folder if it was begun with the same inputs and settings; otherwise start it again."""
    journal = Journal(work, key)
    if journal.resume():
        logger.info("%s: continuing, %d finished files are kept", work, len(journal.done))
    else:
        if journal.path.exists():
            logger.warning("%s was begun with other inputs or settings: starting again", work)
            _delete(work, _WORK_FILES)
        work.mkdir(exist_ok=True)
        journal.begin()
    for name in (STATISTICS_FOLDER, SPOOL_FOLDER, *(f"{_NEW}/{split}" for split in SPLITS)):
        (work / name).mkdir(parents=True, exist_ok=True)
    for path in [*work.rglob("*.tmp"), *work.rglob("*.partial")]:
        path.unlink()  # half a file, of a process that was killed
    return journal
