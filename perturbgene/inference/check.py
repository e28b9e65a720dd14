"""The verb `check`: what files hold, what would be done with them, and what should be looked at before the work.

Owns the report; everything in it is found by the functions that the other verbs call, and their own messages are its
lines. Letters: n cells, m rows of one block, l values.
"""

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from perturbgene.cli.base import ReadingConfig
from perturbgene.cli.verbs import CheckConfig, PrepareConfig
from perturbgene.corpus.manifest import BY_CELL
from perturbgene.corpus.prepare import rehearse
from perturbgene.corpus.survey import FileSurvey, check_block, donor_column, open_files, path_of, survey_file
from perturbgene.data_utils.labels import MOST_NUMERIC_LABELS, Labels, is_missing
from perturbgene.data_utils.opening import FileList, as_sources, open_source
from perturbgene.data_utils.readable import check_readable
from perturbgene.data_utils.shards import Shard
from perturbgene.data_utils.sources import MemoryFile, TenxFile, ZarrFile, sampled_spans
from perturbgene.errors import FilesRefusedError, InputError

if TYPE_CHECKING:
    from perturbgene.inference.run import Run

_BLOCK_ROWS = 1024

#: Columns of obs with more labels than this are names or measurements, which are not listed.
MOST_LABELS = 200


@dataclass
class FileReport:
    """What one file holds; None or empty where that could not be found out."""

    path: str
    form: str  # h5ad, zarr, 10x or memory
    cells: int = 0
    columns: int = 0
    matrix: str = ""  # which matrix is read, and how it is stored
    layers: list[str] = field(default_factory=list)
    scale: str = ""
    library_size: list[float] | None = None  # least, median, most
    genes_per_cell: list[float] | None = None  # of all cells if a run is given, else of sampled ones
    genes: str = ""  # how the columns were matched to the panel
    labels: dict[str, dict[str, int]] = field(default_factory=dict)  # column -> label -> cells; "" counts missing ones
    donors: dict[str, int] = field(default_factory=dict)  # cells of each donor


@dataclass
class CheckReport:
    """What `check` found."""

    target: str  # what the files were checked for: a run, or `prepare`
    files: list[FileReport] = field(default_factory=list)
    will: list[str] = field(default_factory=list)  # what would be done
    look_at: list[str] = field(default_factory=list)  # what should be looked at first
    refused: str | None = None  # why the files would be refused; None if they would not

    @property
    def ok(self) -> bool:
        return self.refused is None

    def to_json(self) -> str:
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=1, ensure_ascii=False)

    def __str__(self) -> str:
        lines = []
        for file in self.files:
            rows = [(name, text) for name, text in _rows_of(file) if text]
            width = max(15, *(len(name) + 1 for name, _ in rows)) if rows else 15
            lines += [f"{file.path} ({file.form})", *(f"  {name:<{width}}{text}" for name, text in rows)]
        for title, texts in (("Will be done", self.will), ("Should be looked at", self.look_at)):
            lines += ["", f"{title}:", *(f"  - {text}" for text in texts)] if texts else []
        verdict = f"REFUSED for {self.target}: {self.refused}" if self.refused else f"Accepted for {self.target}."
        return "\n".join([*lines, "", verdict])


def _rows_of(file: FileReport) -> Iterator[tuple[str, str]]:
    """Yield the rows of the table about one file."""
    yield "cells", f"{file.cells:,}" if file.matrix else ""
    yield "columns", f"{file.columns:,}" if file.matrix else ""
    yield "matrix", file.matrix + (f"; others: {', '.join(file.layers)}" if file.layers else "")
    yield "scale", file.scale
    for name, numbers in (("library size", file.library_size), ("genes per cell", file.genes_per_cell)):
        yield name, "{:,.0f} to {:,.0f}, median {:,.0f}".format(*np.array(numbers)[[0, 2, 1]]) if numbers else ""
    yield "genes", file.genes
    for column, counts in file.labels.items():
        yield f"obs {column}", _shown_counts(counts)
    yield "donors", _shown_counts(file.donors)


def _shown_counts(counts: dict[str, int], *, most: int = 4) -> str:
    """Say which values there are, the most frequent first."""
    known = sorted(((n, label) for label, n in counts.items() if label), key=lambda pair: (-pair[0], pair[1]))
    shown = ", ".join(f"{label} {n:,}" for n, label in known[:most])
    more = f" and {len(known) - most:,} more" if len(known) > most else ""
    missing = f"; missing in {counts['']:,} cells" if counts.get("") else ""
    return f"{len(known):,}: {shown}{more}{missing}" if counts else ""


def check(
    inputs: Any,
    run: "str | Path | Run | None" = None,
    *,
    split_by: str | None = CheckConfig.split_by,
    **reading: Any,
) -> CheckReport:
    """Return what files hold and what would be done with them; files that would be refused are no error here.

    Args:
        inputs: Paths, URLs, patterns or folders; or AnnData.
        run: The run that will be asked; without one, the files are checked for `prepare`.
        split_by: As in `prepare`.
        reading: `layer`, `normalization`, `phenotypes`, `where` and the other options of `ReadingConfig`.

    Example:
        >>> import perturbgene as pg
        >>> report = pg.check("cells.h5ad", "runs/mlm")
        >>> report.ok, report.files[0].cells, report.files[0].genes
        (True, 255, '200 of 200 panel genes found (100.0%), 565 columns not in the panel')
    """
    report = CheckReport(f"the run {getattr(run, 'path', run)}" if run else "prepare")
    with _messages() as (will, look_at):
        try:
            sources = as_sources(inputs)
            if run is None:
                _check_for_prepare(sources, report, split_by=split_by, reading=reading)
            else:
                from perturbgene.inference.run import load_run  # imports torch

                loaded = load_run(run, device="cpu")
                for source in sources:
                    _check_for_run(source, loaded, report, reading)
        except InputError as error:
            report.refused = " ".join(str(error).split())
    report.will += dict.fromkeys(will)
    report.look_at += [line for line in dict.fromkeys(look_at) if line not in report.look_at]
    return report


def run_check(config: CheckConfig) -> str:
    """Run the verb `check`; raise a FilesRefusedError if the files would be refused."""
    reading = {it.name: getattr(config, it.name) for it in fields(ReadingConfig)}
    found = check(config.inputs, config.run, split_by=config.split_by, **reading)
    text = found.to_json() if config.json else str(found)
    if found.refused:
        raise FilesRefusedError(found.refused, report=text)
    return text


@contextmanager
def _messages() -> Iterator[tuple[list[str], list[str]]]:
    """Collect what the package says meanwhile, instead of printing it: what it does, and what it warns of."""
    will, look_at = list[str](), list[str]()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            (look_at if record.levelno >= logging.WARNING else will).append(record.getMessage().strip())

    package = logging.getLogger("perturbgene")
    handler, before = Collector(logging.INFO), (package.propagate, package.level)
    package.addHandler(handler)
    package.propagate = False
    package.setLevel(logging.INFO)
    try:
        yield will, look_at
    finally:
        package.removeHandler(handler)
        package.propagate = before[0]
        package.setLevel(before[1])


def _check_for_run(source: Any, run: "Run", report: CheckReport, reading: dict[str, Any]) -> None:
    """Read all cells of one file as `predict` does."""
    from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset  # imports torch

    file, _ = _begun(source, report, reading.get("layer"))
    sources = FileList([source]) if isinstance(source, str) else source
    dataset = IterableAnnDataset(sources, run.tokenizer.reading([]), **{"batch_size": 256, **reading})
    check_readable(source)
    shard = dataset.shards[0]
    columns = {name: shard.obs_columns.get(name, name) for name in run.tokenizer.phenotypes}
    labels = dict[str, Counter[str]]()
    for name in [name for name, column in columns.items() if column in shard.source.columns_of("obs")]:
        shard.label_ids(name)  # warns of labels that the run does not know
        labels[name] = Labels.of(shard.source.obs_column(columns[name])).counts()
    blocks = []
    with tqdm(total=len(shard), desc="check", unit=" cells", unit_scale=True, disable=None) as bar:
        for start in range(0, len(shard), _BLOCK_ROWS):
            block = shard.read(np.arange(start, min(start + _BLOCK_ROWS, len(shard))))
            dataset.tokenizer.tokenize_block(block)
            blocks.append((block.library_size_n, np.diff(block.offsets_n1)))
            bar.update(len(block))
    _describe(file, shard, blocks, labels)
    file.genes = shard.alignment.describe()


def _check_for_prepare(
    sources: list[Any], report: CheckReport, *, split_by: str | None, reading: dict[str, Any]
) -> None:
    """Do the first steps of `prepare` in a folder that is deleted."""
    begun = [_begun(source, report, reading.get("layer")) for source in sources]
    files, columns = [file for file, _ in begun], [names for _, names in begun]
    with tempfile.TemporaryDirectory(prefix="perturbgene-check-") as folder:
        inputs = [path_of(source) for source in sources]
        config = PrepareConfig(inputs=inputs, output=folder, split_by=split_by, **reading)
        found, refused = dict[int, FileSurvey](), list[InputError]()
        with closing(open_files(sources, config)) as cache:
            split_by = split_by or donor_column(sources, config, columns)
            for index, (file, shard) in enumerate(zip(files, cache, strict=True)):
                spans = [np.arange(*span) for span in sampled_spans(len(shard)) if len(shard)]
                sampled = [shard.read(rows_m) for rows_m in spans]
                for block, rows_m in zip(sampled, spans, strict=True):
                    check_block(block, rows_m)
                blocks = [(block.library_size_n, np.diff(block.offsets_n1)) for block in sampled]
                _describe(file, shard, blocks, _labels_of(shard, config))
                try:  # while it is open; the other files are described nevertheless
                    found[index] = survey_file(sources[index], shard, config, split_by)
                except InputError as error:
                    refused.append(error)
                cache.close()  # it is not needed again, and HDF5 closes a file sooner if few others are open
        if refused:
            raise refused[0]
        survey, plan, findings = rehearse(sources, replace(config, split_by=split_by), Path(folder) / "work", found)
    for file, source in zip(files, sources, strict=True):
        at = next(index for index, one in enumerate(survey.sources) if one is source)
        file.donors = dict(survey.files[at].units) if survey.split_by != BY_CELL else {}
    held_out = f"{len(plan.eval_units):,} of {len(survey.units):,} {survey.split_by}" if plan.eval_units else "cells"
    report.will += [f"hold out {held_out} for evaluation", f"rank {len(plan.union):,} genes by {plan.flavor}"]
    report.look_at += findings


def _begun(source: Any, report: CheckReport, layer: str | None) -> tuple[FileReport, list[str]]:
    """Add the report of a file, with what is known once it is open; return it and the columns of obs."""
    opened = open_source(source, layer=layer)
    form = {MemoryFile: "memory", TenxFile: "10x", ZarrFile: "zarr"}.get(type(opened), "h5ad")
    file = FileReport(opened.path, form)
    report.files.append(file)
    with closing(opened):
        file.layers = [it for it in opened.layers if it != layer]
        file.cells, file.columns = opened.shape
        file.matrix = f"{layer or 'X'}, {opened.format}"
        return file, opened.columns_of("obs")


def _labels_of(shard: Shard, config: PrepareConfig) -> dict[str, Counter[str]]:
    """Count the labels of the phenotypes, or else of each column of obs that could be one: text or few numbers."""
    found, known = dict[str, Counter[str]](), shard.source.columns_of("obs")
    asked = {name: column for name, column in config.column_of_phenotype.items() if column in known}
    for name, column in (asked or dict(zip(known, known, strict=True))).items():
        values_n = shard.source.obs_column(column)
        is_number = pd.api.types.is_numeric_dtype(values_n) and not pd.api.types.is_bool_dtype(values_n)
        if asked or 1 < values_n.nunique() <= (MOST_NUMERIC_LABELS if is_number else MOST_LABELS):
            found[name] = Labels.of(values_n).counts()
    return found


def _describe(
    file: FileReport,
    shard: Shard,
    blocks: list[tuple[np.ndarray | None, np.ndarray]],
    labels: dict[str, Counter[str]],
) -> None:
    """Fill in what the cells of a file are like; of each block, the library sizes and the numbers of values."""
    file.scale = shard.values.scale.name
    file.cells = len(shard)  # those that --where has chosen
    file.library_size = _quantiles([sizes_m for sizes_m, _ in blocks if sizes_m is not None])
    file.genes_per_cell = _quantiles([num_m for _, num_m in blocks])
    for name, texts in labels.items():
        counts = Counter[str]()
        for text, count in texts.items():
            counts["" if is_missing(text, shard.missing_labels) else text] += count
        file.labels[name] = dict(counts)


def _quantiles(values: list[np.ndarray]) -> list[float] | None:
    return [float(value) for value in np.quantile(np.concatenate(values), [0, 0.5, 1])] if values else None
