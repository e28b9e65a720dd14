"""In-silico perturbation: which gene, knocked out or raised, moves cells, and where to.

Owns the verb `perturb`: which effects are screened and which computed exactly, and the table with its statistics;
leaves running cells in parts to `effect_parts` and statistics to `effects`. docs/perturbation.md defines every column.
Letters: d donors, q perturbations, z genes of the null.
"""

import copy
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbgene.errors import InputError
from perturbgene.inference.asking import Given, given_labels
from perturbgene.inference.calibration import read_calibration, weights_hash
from perturbgene.inference.run import Run, load_run, provenance
from perturbgene.inference.streaming import Ranks, check_target, reading_options
from perturbgene.perturbation.cells_in_parts import ALONE, GroupedCells, PartFolder, Stage, run_stage, write_table
from perturbgene.perturbation.edits import ALL_GENES, Kind, Perturbations, perturbations_of
from perturbgene.perturbation.readouts import LabelReadout, Pooling, Readout, StateReadout, label_readout, token_budget
from perturbgene.perturbation.statistics import Agreement, Null, Tally, agreement, held_against_null, mean_over_donors
from perturbgene.plots import effects_figure, save_figure
from perturbgene.urls import is_url, shown_path

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbgene.configs import PerturbConfig

logger = logging.getLogger(__name__)

PART_CELLS = 1000
#: What draws the control genes.
SEED = 0


@dataclass(frozen=True)
class Choice:
    """Which effects are wanted and how they are computed.

    Args:
        exact: True computes all exactly.
        top_k: Genes of the screen that are computed exactly.
        num_controls: Random genes that are computed exactly beside them, or, without a screen, to make the null.
        min_cells: A donor counts for a gene that changes at least so many of its cells; a single donor with
            fewer cells in all when it changes all of them.
    """

    exact: bool = False
    top_k: int = 64
    num_controls: int = 64
    min_cells: int = 5


@dataclass(frozen=True)
class Results:
    """Sums of both passes.

    Args:
        asked: What the user asked for.
        computed: What was computed exactly: at least those asked for, or chosen from the screen.
        exact: Sums of `computed`.
        screened: Sums of the screen of all genes; None when nothing was screened.
        controls: Rows of `computed` that were drawn at random.
        is_all: True where all genes were asked for, not some by name.
    """

    asked: Perturbations
    computed: Perturbations
    exact: Tally
    screened: Tally | None
    controls: np.ndarray
    is_all: bool = False


def _wants_screen(asked: Perturbations, is_all: bool, cells: GroupedCells, choice: Choice) -> bool:
    """A screen ranks all genes; for a few named ones it is the null that donors are tested against."""
    return asked.new_id < 0 and not choice.exact and (is_all or len(cells.donors) > 1)


def compute(
    run: Run,
    cells: GroupedCells,
    readout: Readout,
    *,
    asked: Perturbations,
    is_all: bool,
    choice: Choice,
    part_cells: int = PART_CELLS,
    parts: PartFolder | None = None,
    ranks: Ranks = ALONE,
    budget: int | None = None,
) -> Results:
    """Screen all genes, choose, and compute what was chosen exactly.

    Args:
        run, cells, readout: What is asked of whom.
        asked: Perturbations; with `is_all` every gene that a cell expresses.
        choice: How they are computed.
        part_cells, parts, ranks: See `effect_parts.run_stage`.
        budget: Tokens that run at once; None takes what suits the device.
    """
    budget = token_budget(run.model) if budget is None else budget
    running: dict[str, Any] = {"part_cells": part_cells, "parts": parts, "ranks": ranks}
    every_gene = perturbations_of([ALL_GENES], run.tokenizer)
    screened = None
    if _wants_screen(asked, is_all, cells, choice):
        screened = run_stage(Stage("screened", run, readout, every_gene, budget=budget), cells, **running)
    if screened is not None and is_all:
        strongest, drawn = _chosen(screened, cells, choice)
        rows = np.union1d(strongest, drawn)
        computed, controls = asked.take(rows), np.flatnonzero(np.isin(rows, drawn))
    else:
        computed, controls = _with_controls(asked, every_gene, is_all=is_all, screened=screened, choice=choice)
    exact = run_stage(Stage("exact", run, readout, computed, budget=budget), cells, **running)
    return Results(asked, computed, exact, screened, controls, is_all)


def _chosen(screened: Tally, cells: GroupedCells, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
    """Return the genes with the strongest screened effect in any group, and a random control set."""
    tables = [_means(screened, cells, group, choice) for group in screened.groups()]
    effects_uq = np.stack([np.abs(table["effect"].to_numpy()) for table in tables] or [np.zeros(0)])
    strength_q = np.nan_to_num(effects_uq, nan=-1.0).max(axis=0)
    known = np.flatnonzero(strength_q >= 0)
    strongest = known[np.argsort(-strength_q[known], kind="stable")[: choice.top_k]]
    count = min(choice.num_controls, len(known))
    return strongest, np.random.default_rng(SEED).choice(known, size=count, replace=False)


def _with_controls(
    asked: Perturbations, every_gene: Perturbations, *, is_all: bool, screened: Tally | None, choice: Choice
) -> tuple[Perturbations, np.ndarray]:
    """Return what was asked, and behind it random genes when nothing else can be the null; and where these stand."""
    if is_all or screened is not None:
        return asked, np.empty(0, dtype=np.int64)
    singles = asked.types_j[asked.offsets_q1[:-1]][np.diff(asked.offsets_q1) == 1]
    others = np.flatnonzero(~np.isin(every_gene.types_j, singles))
    count = min(choice.num_controls, len(others))
    drawn = every_gene.take(np.sort(np.random.default_rng(SEED).choice(others, size=count, replace=False)))
    joined = replace(
        asked,
        names=(*asked.names, *drawn.names),
        types_j=np.concatenate([asked.types_j, drawn.types_j]),
        offsets_q1=np.concatenate([asked.offsets_q1, asked.offsets_q1[-1] + drawn.offsets_q1[1:]]),
    )
    return joined, len(asked) + np.arange(count)


# -- the table ------------------------------------------------------------------------------------------------------


def _means(tally: Tally, cells: GroupedCells, group: int, choice: Choice) -> pd.DataFrame:
    """Return the mean effects over donors; a single donor with few cells in all counts when these are changed."""
    means_dq, counts_dq = tally.of_group(group, num_donors=len(cells.donors))
    least = choice.min_cells
    if len(cells.donors) == 1:
        least = min(least, max(1, int(cells.cells_per_donor(group)[0])))
    return mean_over_donors(means_dq, counts_dq, min_cells=least)


def _genes_of(perturbations: Perturbations, first_gene_type: int) -> np.ndarray:
    """Return the panel index of each perturbation of one gene, -1 for combinations, shape (q,)."""
    gene_q = perturbations.types_j[perturbations.offsets_q1[:-1]] - first_gene_type
    return np.where(np.diff(perturbations.offsets_q1) == 1, gene_q, -1)


def _null(results: Results, means: Mapping[str, pd.DataFrame], first_gene_type: int) -> Null:
    """Return the genes to be held against: all screened ones, else all single genes computed, else the controls."""
    gene_q = _genes_of(results.computed, first_gene_type)
    table, rows = means["exact"], np.flatnonzero(gene_q >= 0)
    if results.screened is not None:
        table, gene_q = means["screened"], np.arange(len(means["screened"]))
        rows = gene_q
    elif len(results.controls):
        rows = results.controls
    rows = rows[np.isfinite(table["effect"].to_numpy()[rows])]
    return Null(table["effect"].to_numpy()[rows], table["num_cells"].to_numpy()[rows], gene_q[rows])


def _group_table(
    results: Results, cells: GroupedCells, group: int, choice: Choice, first_gene_type: int
) -> pd.DataFrame:
    """Return one row for each perturbation asked for, exact where it was computed, else screened."""
    means = {"exact": _means(results.exact, cells, group, choice).assign(method="exact")}
    gene_q = _genes_of(results.computed, first_gene_type)
    means["exact"].insert(0, "perturbation", results.computed.names)
    table = means["exact"].assign(gene=gene_q)
    if results.screened is not None:
        means["screened"] = _means(results.screened, cells, group, choice)
        estimate_q = means["screened"]["effect"].to_numpy()
        table["screened_effect"] = np.where(gene_q >= 0, estimate_q[gene_q], np.nan)
        if len(results.asked) > len(results.computed):
            rest = means["screened"].assign(method="screened", screened_effect=estimate_q)
            rest.insert(0, "perturbation", results.asked.names)
            table = pd.concat([table, rest.assign(gene=np.arange(len(rest))).drop(index=gene_q)], ignore_index=True)
    null = _null(results, means, first_gene_type)
    is_asked, is_changing = table["perturbation"].isin(results.asked.names), table["num_cells"] > 0
    if results.is_all:
        is_asked &= is_changing
    else:  # who names a gene gets its row: where no cell expresses it, nothing changes
        table.loc[~is_changing, "effect"] = 0.0
    table = table[is_asked].reset_index(drop=True)
    is_tested = (table["gene"] >= 0) if results.asked.new_id < 0 else np.ones(len(table), dtype=bool)
    tested = held_against_null(table[is_tested], null, gene_q=table["gene"][is_tested].tolist())
    return table.join(tested).drop(columns="gene")


def table_of(results: Results, cells: GroupedCells, *, choice: Choice, first_gene_type: int) -> pd.DataFrame:
    """Return the effects of all groups, strongest first; `docs/perturbation.md` defines the columns."""
    tables = []
    for group in range(len(cells.groups)):
        table = _group_table(results, cells, group, choice, first_gene_type)
        table.insert(1, "group", cells.groups[group])
        order = np.argsort(-table["effect"].abs().to_numpy(), kind="stable")
        tables.append(table.iloc[order])
    return pd.concat(tables, ignore_index=True)


def agreement_of(results: Results, cells: GroupedCells, *, choice: Choice, first_gene_type: int) -> Agreement | None:
    """Compare screened and exact effects of the control genes, over all groups; None without a screen of all genes."""
    if results.screened is None or not len(results.controls):
        return None
    gene_q = _genes_of(results.computed, first_gene_type)[results.controls]
    exact, estimated = [], []
    for group in range(len(cells.groups)):
        exact.append(_means(results.exact, cells, group, choice)["effect"].to_numpy()[results.controls])
        estimated.append(_means(results.screened, cells, group, choice)["effect"].to_numpy()[gene_q])
    return agreement(np.concatenate(exact), np.concatenate(estimated))


# -- the verb -------------------------------------------------------------------------------------------------------


def readout_of(
    run: Run, *, towards: str | None, away: str | None, given: Mapping[str, str | None], embedding: Pooling
) -> Readout:
    """Return what is compared: the state, or with `towards` the log-odds of a label, calibrated if `evaluate` ran.

    Raises:
        InputError: The label is unknown, or `away` stands without `towards`.
    """
    if towards is None:
        if away is not None:
            raise InputError("--from names a label to leave, but no label to go to. Give --towards as well.")
        return StateReadout(embedding, tuple(given))
    names = tuple(run.tokenizer.included_phenotypes) if run.is_classifier else tuple(given)
    readout = label_readout(run, towards=towards, away=away, given=names)
    fitted = read_calibration(run.path)
    nearest = fitted.nearest(readout.category, asked=(readout.category,), given=names) if fitted else None
    return replace(readout, temperature=nearest.temperature) if nearest else readout


def _in_precision(run: Run, precision: str) -> Run:
    if precision == "float32":
        return run
    return Run(copy.deepcopy(run.model).bfloat16(), run.tokenizer, run.path)


def perturb(
    adata: "AnnData | str | Path",
    model: str | Path | Run,
    *,
    genes: Sequence[str] | str = ALL_GENES,
    kind: Kind = "knock_out",
    bin: int | None = None,
    towards: str | None = None,
    away: str | None = None,
    given: Given | None = None,
    embedding: Pooling = "cls",
    donor: str | None = None,
    groupby: str | None = None,
    exact: bool = False,
    top_k: int = 64,
    num_controls: int = 64,
    min_cells: int = 5,
    device: str = "auto",
    precision: str = "float32",
    batch_tokens: int | None = None,
    **reading: Any,
) -> pd.DataFrame:
    """Return the effect of each perturbation on a set of cells.

    Args:
        adata: Cells, or the path of an h5ad file.
        model: Run folder, or a loaded run.
        genes: Ids or symbols, combinations joined by "+"; "all" for every gene that a cell expresses.
        kind, bin: "knock_out", "over_express", or "set_bin" with the bin.
        towards, away: `category=label`: the effect is the change of the log-odds of the first label, against all others
            or against the second. Without them it is the cosine distance between the cell's states.
        given: Phenotype -> label of all cells, or None to read each cell's own from `obs`; all others are absent.
        embedding: State: "cls", or "mean" over gene tokens other than the perturbed gene's.
        donor: Column of `obs` with donors; None takes `donor_id` where there is one.
        groupby: Column of `obs`: effects of each of its groups.
        exact, top_k, num_controls, min_cells: See `Choice`.
        device, precision, batch_tokens: How the model runs: "auto", "cpu", "cuda"; "float32" or "bfloat16".
        reading: `batch_size`, `layer`, `gene_id_column`, `min_gene_coverage` of `IterableAnnDataset`.

    Returns:
        A row per perturbation (and group), strongest first; `docs/perturbation.md` defines the columns.
        `attrs["screen"]` holds how well the screen ordered the control genes.

    Example:
        >>> import perturbgene as pg
        >>> named = pg.perturb("cells.h5ad", "runs/mlm", genes=["CD79A"], towards="cell_type=B cell")
        >>> named[["perturbation", "method", "num_cells", "num_donors"]].to_string(index=False, header=False)
        'CD79A  exact  101  4'
    """
    run = _in_precision(model if isinstance(model, Run) else load_run(model, device=device), precision)
    given = given_labels(given)
    names = [genes] if isinstance(genes, str) else list(genes)
    asked = perturbations_of(names, run.tokenizer, kind=kind, level=bin)
    choice = Choice(exact, top_k, num_controls, min_cells)
    readout = readout_of(run, towards=towards, away=away, given=given, embedding=embedding)
    reading = {"batch_size": 256, **reading}
    cells = GroupedCells.open(adata, run, readout, given=given, donor=donor, groupby=groupby, **reading)
    results = compute(run, cells, readout, asked=asked, is_all=names == [ALL_GENES], choice=choice, budget=batch_tokens)
    return _finished(results, cells, choice=choice, run=run)


def _finished(results: Results, cells: GroupedCells, *, choice: Choice, run: Run) -> pd.DataFrame:
    first = run.tokenizer.first_gene_type
    table = table_of(results, cells, choice=choice, first_gene_type=first)
    found = agreement_of(results, cells, choice=choice, first_gene_type=first)
    table.attrs["screen"] = None if found is None else vars(found)
    if len(table) and table["effect"].isna().all():
        logger.warning("no donor has %d cells in which a gene changes: give a lower min_cells", choice.min_cells)
    return table


def run_perturb(config: "PerturbConfig") -> str | None:
    """Run the `perturb` verb: a table and a picture; finished parts of an interrupted run are used again."""
    path, target = check_target(config.input, config.output, overwrite=config.overwrite, verb="perturb")
    _check_writable(target)
    ranks = Ranks.join(config.device)
    run = _in_precision(load_run(config.run, device=ranks.device(config.device)), config.precision)
    readout = readout_of(
        run, towards=config.towards, away=config.from_, given=config.given_labels, embedding=config.embedding
    )
    asked = perturbations_of(config.genes, run.tokenizer, kind=config.kind, level=config.bin)
    columns: dict[str, Any] = {"given": config.given_labels, "donor": config.donor, "groupby": config.groupby}
    cells = GroupedCells.open(path, run, readout, **columns, **reading_options(config))
    choice = Choice(config.exact, config.top_k, config.num_controls, config.min_cells)
    facts = {**config.to_dict(), "source": file_identity(path), "weights": weights_hash(run.path)}
    facts |= {"readout": readout, "fingerprint": run.tokenizer.fingerprint}
    tables = target.with_name(f"{target.stem}.cells") if config.per_cell else None
    parts = PartFolder.beside(target, facts, tables=tables)
    results = compute(
        run, cells, readout, asked=asked, is_all=config.genes == [ALL_GENES], choice=choice,
        part_cells=config.part_cells, parts=parts, ranks=ranks, budget=config.batch_tokens,
    )  # fmt: skip
    if not ranks.is_main:
        return None
    table = _finished(results, cells, choice=choice, run=run)
    _write(table, target, config=config, run=run, cells=cells, readout=readout)
    parts.remove()
    return _report(table, target, config=config, cells=cells)


def _check_writable(target: Path) -> None:
    if target.suffix not in (".csv", ".parquet"):
        raise InputError(f"output is {str(target)!r}, but a table ends in .csv or .parquet. Change --output.")
    if target.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401 - optional, seconds to import
        except ImportError as error:
            raise InputError(
                "a .parquet table needs pyarrow, which is not installed. Name a .csv, or pip install "
                "'perturbgene[parquet]'."
            ) from error


def file_identity(path: str | Path) -> Any:
    """Return what changes when a file does: its size and time."""
    if is_url(str(path)):
        return shown_path(str(path))
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def _effect_name(readout: Readout) -> str:
    if not isinstance(readout, LabelReadout):
        return f"cosine distance of the state ({getattr(readout, 'pooling', '')})"
    return f"change of the log-odds of the label of {readout.category} (nats)"


def _write(
    table: pd.DataFrame, target: Path, *, config: "PerturbConfig", run: Run, cells: GroupedCells, readout: Readout
) -> None:
    """Write the table, the picture and where it all came from."""
    write_table(table, target)
    title = f"{config.kind.replace('_', ' ')}, {len(cells):,} cells, {_donors(cells)}"
    label = f"{config.towards} against {config.from_ or 'all other labels'}" if config.towards else "state"
    figure = effects_figure(table, title=f"{title}\n{label}", effect=_effect_name(readout))
    save_figure(figure, target.with_suffix(".png"))
    question = {name: value for name, value in config.to_dict().items() if name not in ("run", "output", "overwrite")}
    facts = {**provenance(run, question, coverage=cells.dataset.coverage), "screen": table.attrs["screen"]}
    temporary = target.with_suffix(".json.tmp")
    temporary.write_text(json.dumps({**facts, "effect": _effect_name(readout)}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, target.with_suffix(".json"))


def _donors(cells: GroupedCells) -> str:
    if len(cells.donors) > 1:
        return f"{len(cells.donors)} donors"
    return "one donor" if cells.donors != ("all",) else "donors unknown"


def _report(table: pd.DataFrame, target: Path, *, config: "PerturbConfig", cells: GroupedCells) -> str:
    """Say what was done, how good the screen was, and what came first."""
    counts = table["method"].value_counts()
    lines = [
        f"{len(cells):,} cells, {_donors(cells)}: {counts.get('exact', 0):,} effects exact, "
        f"{counts.get('screened', 0):,} screened, written to {target} and {target.with_suffix('.png').name}"
    ]
    screen = table.attrs["screen"]
    if screen is not None:
        lines.append(
            f"screen against exact on {screen['num_genes']} random genes: rank correlation {screen['spearman']:.3f}, "
            f"{screen['recall']:.0%} of the exact top eighth in the screened top quarter (25% by chance)"
        )
    if len(cells.donors) < 2:
        lines.append(
            "no p-values: a test needs at least two donors (cells of one donor are no replicates); see --donor"
        )
    shown = table.drop(columns=["standard_error", "null_mean"]).head(12)
    return "\n".join([*lines, shown.to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="")])
