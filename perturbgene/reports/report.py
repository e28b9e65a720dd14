"""The verb `report`: one HTML page, with its figures, about what another verb has written.

Owns which page is made of what; leaves what pages say to `answers` and `effects`, and HTML to `page`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perturbgene.cli.base import ReadingConfig
from perturbgene.cli.verbs import CounterfactualConfig, EvaluateConfig, PerturbConfig, PredictConfig, ReportConfig
from perturbgene.configs import BaseConfig
from perturbgene.errors import InputError
from perturbgene.files import claimed
from perturbgene.inference.evaluated_cells import CELLS_FILE
from perturbgene.inference.streaming import reading_options
from perturbgene.reports.answers import of_evaluation, of_predictions
from perturbgene.reports.corpus import corpus_report, is_corpus
from perturbgene.reports.effects import of_changes, of_perturbation, read_changes
from perturbgene.reports.networks import of_networks, read_networks
from perturbgene.reports.page import Page, read_as_written, write_page


def report(source: str | Path, *, output: str | Path | None = None, device: str = "auto", **reading: Any) -> Path:
    """Write what a run or its answers are worth, or what a corpus holds, as one HTML page, with its figures as PNG.

    Args:
        source: Run folder that was evaluated, an output folder of `evaluate`, an output file of `predict`, `perturb`,
            `counterfactual` or `embed --network`, or a corpus.
        output: The page; None puts it next to what it is about. An older report is replaced.
        device: Where cells are embedded.
        reading: How cells of predictions were read, as `predict` takes it; the other verbs have written it down.

    Returns:
        The page.

    Raises:
        InputError: There is nothing to report, it was changed or damaged, or the page cannot be written.

    Example:
        >>> import perturbgene as pg
        >>> scores = pg.evaluate("runs/mlm", "cells.h5ad", ask=["cell_type"], output="scores")
        >>> pg.report("scores").as_posix()
        'scores/report.html'
    """
    given = Path(source)
    if is_corpus(given):
        return corpus_report(given, output=output)
    folder = next((it for it in (given, given / "evaluation") if (it / CELLS_FILE).is_file()), None)
    if folder is None and given.is_dir() and given.suffix != ".zarr":
        raise InputError(f"{given} holds no evaluated cells. Run `perturbgene evaluate {given}` first.")
    target = Path(output) if output else (folder / "report.html" if folder else given.with_suffix(".report.html"))
    with claimed(target, flag="output"):
        with read_as_written(folder or given, verb="evaluate" if folder else "its command"):
            page = of_evaluation(folder) if folder else _page_of_file(given, device=device, reading=reading)
        write_page(page, target)
    return target


def _page_of_file(path: Path, *, device: str, reading: Mapping[str, Any]) -> Page:
    """Return the page about an output file, by the verb that has written it."""
    if path.suffix in (".csv", ".parquet"):
        return of_perturbation(path, device=device)
    if edits := read_changes(path):
        return of_changes(edits, device=device)
    networks = read_networks(path)
    return of_networks(networks) if networks else of_predictions(path, device=device, reading=reading)


def run_report(config: ReportConfig) -> str:
    """Run the verb `report`."""
    reading = {declared.name: getattr(config, declared.name) for declared in dataclasses.fields(ReadingConfig)}
    return f"written to {report(config.source, output=config.output, device=config.device, **reading)}"


def report_of(config: BaseConfig) -> str:
    """Write the report of what a verb has just written."""
    if isinstance(config, EvaluateConfig):
        return f"report: {report(config.output or Path(config.run) / 'evaluation')}"
    assert isinstance(config, PredictConfig | PerturbConfig | CounterfactualConfig)
    return f"report: {report(config.output, device=config.device, **reading_options(config))}"
