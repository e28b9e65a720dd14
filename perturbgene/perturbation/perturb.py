"""In-silico perturbation: which gene, knocked out or raised, moves cells, and where to.

Owns the verb `perturb`: which effects are screened, which are computed exactly, and the table with its statistics. How
a single knock-out is scored is in `readouts.exact_effects`; docs/perturbation.md defines every column. Letters: q
perturbations, m effects, u groups.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbgene.cli.verbs import PerturbationKind, PerturbConfig, Pooling, Precision
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.devices import check_bfloat16
from perturbgene.files import check_new, whole_files, write_json
from perturbgene.inference.run import Run, load_run, provenance
from perturbgene.inference.streaming import (
    ALL,
    ALONE,
    GeneTokens,
    Given,
    Ranks,
    claimed_output,
    given_labels,
    reading_options,
)
from perturbgene.perturbation.cells import EffectSums, GroupedCells, PartStore, sum_effects
from perturbgene.perturbation.edits import ALL_GENES, REMOVED, Perturbations, changed_pairs, perturbations_of
from perturbgene.perturbation.readouts import Readout, exact_effects, readout_of, sequences
from perturbgene.perturbation.screening import screen_removals
from perturbgene.perturbation.statistics import Agreement, Null, against_null, agreement, mean_over_donors
from perturbgene.plots import effects_figure, save_figure

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

#: Seed of the draw of control genes.
SEED = 0
#: Cells on which the screen is checked if its control genes are not computed in all cells.
CHECK_CELLS = 100


@dataclass(frozen=True)
class Experiment:
    """Perturbations of cells, and how their effects are computed.

    Args:
        config: The question and its options.
        run, cells, readout: The model, the cells, and what of them is compared.
        asked: The perturbations.
    """

    config: PerturbConfig
    run: Run
    cells: GroupedCells
    readout: Readout
    asked: Perturbations

    @classmethod
    def open(cls, source: Any, run: Run, config: PerturbConfig, given: Mapping[str, str | None]) -> "Experiment":
        """Check what is asked, and open the cells."""
        if config.precision == "bfloat16":
            check_bfloat16(run.model.device.type, flag="--precision bfloat16")
            run = Run(copy.deepcopy(run.model).bfloat16(), run.tokenizer, run.path)
        asked = perturbations_of(config.genes, run.tokenizer, kind=config.kind, level=config.bin)
        readout = readout_of(
            run, towards=config.towards, away=config.from_, given=tuple(given), embedding=config.embedding
        )
        columns = {"donor": config.donor, "groupby": config.groupby}
        cells = GroupedCells.open(source, run, readout, given=given, **columns, **reading_options(config))
        return cls(config, run, cells, readout, asked)

    @property
    def is_all(self) -> bool:
        """True if every gene is asked for, False if genes are named."""
        return self.config.genes == [ALL_GENES]

    def screened_effects(self, block: TokenBlock) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Estimate every knock-out: cell (row of the block), gene and effect, each of shape (m,)."""
        cells = sequences(block, self.run.tokenizer, self.readout)
        estimate_l = screen_removals(self.run, cells, self.readout, budget=self.config.batch_tokens)
        tokens = GeneTokens.of(cells, self.run.tokenizer)
        return tokens.cell_m, tokens.gene_m, estimate_l[tokens.position_m]

    def exact_effects(
        self, block: TokenBlock, perturbations: Perturbations
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compute perturbations: cell (row of the block), perturbation and effect, each of shape (m,)."""
        cells, budget = sequences(block, self.run.tokenizer, self.readout), self.config.batch_tokens
        pairs = changed_pairs(cells, perturbations, self.run.tokenizer)
        return *pairs, exact_effects(self.run, cells, perturbations, self.readout, pairs=pairs, budget=budget)


@dataclass(frozen=True)
class Effects:
    """Sums of effects over all cells.

    Args:
        computed: What was computed exactly: what was asked for, or chosen from the screen, and controls.
        exact: Sums of `computed`.
        controls: Rows of `computed` that are random genes.
        screened: Sums of the screen of all genes; None without a screen.
        agreement: How well the screen agrees with exact effects of random genes; None without a screen.
    """

    computed: Perturbations
    exact: EffectSums
    controls: np.ndarray
    screened: EffectSums | None = None
    agreement: Agreement | None = None


def compute(experiment: Experiment, *, store: PartStore | None = None, ranks: Ranks = ALONE) -> Effects:
    """Screen all genes, choose among them, and compute the chosen ones exactly.

    Args:
        experiment: What to compute.
        store, ranks: See `cells.sum_effects`.
    """
    asked, cells, config = experiment.asked, experiment.cells, experiment.config
    every_gene = perturbations_of([ALL_GENES], experiment.run.tokenizer)
    is_tested = len(cells.donors) > 1  # then named genes need a null: the screen of all genes, or random genes
    screened, computed, controls = None, asked, np.empty(0, dtype=np.int64)
    if asked.new_id == REMOVED and not config.exact and (experiment.is_all or is_tested):
        screened = sum_effects(
            "screened", experiment.screened_effects, cells, len(every_gene), store=store, ranks=ranks
        )
    if screened is not None and experiment.is_all:
        strongest, drawn = _chosen(experiment, screened)
        rows = np.union1d(strongest, drawn)
        computed, controls = asked.take(rows), np.flatnonzero(np.isin(rows, drawn))
    elif not experiment.is_all and is_tested:
        singles = asked.types_j[asked.offsets_q1[:-1]][np.diff(asked.offsets_q1) == 1]
        drawn = np.sort(_draw(np.flatnonzero(~np.isin(every_gene.types_j, singles)), config.num_controls))
        if screened is None:
            computed, controls = asked.joined(every_gene.take(drawn)), len(asked) + np.arange(len(drawn))
    exact_of = partial(experiment.exact_effects, perturbations=computed)
    exact = sum_effects("exact", exact_of, cells, len(computed), store=store, ranks=ranks)
    if screened is None:
        return Effects(computed, exact, controls)
    if experiment.is_all:
        found = _agreement(experiment, exact, screened, rows=controls, genes=rows[controls])
    else:
        found = _agreement_in_sample(experiment, every_gene, genes=drawn)
    return Effects(computed, exact, controls, screened, found)


def _draw(genes: np.ndarray, count: int) -> np.ndarray:
    return np.random.default_rng(SEED).choice(genes, size=min(count, len(genes)), replace=False)


def _chosen(experiment: Experiment, screened: EffectSums) -> tuple[np.ndarray, np.ndarray]:
    """Return the genes with the strongest screened effect in any group, and random ones as controls."""
    groups = range(len(experiment.cells.groups))
    effects_uq = np.stack([_means(experiment, screened, group)["effect"].to_numpy() for group in groups])
    strength_q = np.nan_to_num(np.abs(effects_uq), nan=-1.0).max(axis=0)
    known = np.flatnonzero(strength_q >= 0)
    strongest = known[np.argsort(-strength_q[known], kind="stable")[: experiment.config.top_k]]
    return strongest, _draw(known, experiment.config.num_controls)


def _agreement(
    experiment: Experiment, exact: EffectSums, screened: EffectSums, *, rows: np.ndarray, genes: np.ndarray
) -> Agreement:
    """Compare rows of the exact effects with the screen of the same genes, over all groups."""
    groups = range(len(experiment.cells.groups))
    exact_uq = [_means(experiment, exact, group)["effect"].to_numpy()[rows] for group in groups]
    screened_uq = [_means(experiment, screened, group)["effect"].to_numpy()[genes] for group in groups]
    return agreement(np.concatenate(exact_uq), np.concatenate(screened_uq))


def _agreement_in_sample(experiment: Experiment, every_gene: Perturbations, *, genes: np.ndarray) -> Agreement:
    """Compare the screen with exact effects of some genes, in cells spread evenly over the file."""
    cells, controls = experiment.cells, every_gene.take(genes)
    donor_n = np.full(len(cells), -1)  # which leaves a cell out
    donor_n[np.linspace(0, len(cells) - 1, min(CHECK_CELLS, len(cells))).astype(np.int64)] = 0
    cells = replace(cells, donors=[ALL], donor_n=donor_n, groups=[ALL], group_n=np.zeros_like(donor_n))
    sample = replace(experiment, cells=cells)
    exact_of = partial(sample.exact_effects, perturbations=controls)
    exact = sum_effects("exact controls", exact_of, cells, len(controls))
    screened = sum_effects("screened controls", sample.screened_effects, cells, len(every_gene))
    return _agreement(sample, exact, screened, rows=np.arange(len(genes)), genes=genes)


# -- the table --------------------------------------------------------------------------------------------------------


def effect_table(experiment: Experiment, effects: Effects) -> pd.DataFrame:
    """Return the effects of all groups, strongest first; docs/perturbation.md defines the columns.

    Exact and screened effects are ranked together: screened ones as if they had the scale of exact ones.
    """
    scale, num_donors = 1.0, len(experiment.cells.donors)
    if effects.agreement is not None:
        scale = effects.agreement.scale if effects.agreement.scale > 0 else np.nan
    if np.isnan(scale) and num_donors > 1:
        logger.warning("exact effects have no p-values: too few random genes were computed. Raise --num_controls.")
    tables = []
    for group, name in enumerate(experiment.cells.groups):
        table = _group_table(experiment, effects, group, scale=scale)
        table.insert(1, "group", name)
        is_scaled = (table["method"] == "screened").to_numpy() & (scale > 0)
        strength = table["effect"].abs().to_numpy() * np.where(is_scaled, scale, 1.0)
        tables.append(table.iloc[np.argsort(-strength, kind="stable")])
    whole = pd.concat(tables, ignore_index=True)
    if len(whole) and whole["effect"].isna().all():
        min_cells = experiment.config.min_cells
        logger.warning("no donor has %d cells in which a gene changes: lower --min_cells", min_cells)
    whole.attrs["screen"] = effects.agreement and asdict(effects.agreement)
    return whole


def _group_table(experiment: Experiment, effects: Effects, group: int, *, scale: float) -> pd.DataFrame:
    """Return one row for each perturbation asked for: exact where it was computed, else screened."""
    computed, asked = effects.computed, experiment.asked
    gene_q = computed.types_j[computed.offsets_q1[:-1]] - experiment.run.tokenizer.first_gene_type
    gene_q = np.where(np.diff(computed.offsets_q1) == 1, gene_q, -1)  # -1 for combinations
    table = _means(experiment, effects.exact, group).assign(method="exact", gene=gene_q)
    table.insert(0, "perturbation", computed.names)
    if effects.screened is None:
        null = _null(table.iloc[effects.controls if len(effects.controls) else np.flatnonzero(gene_q >= 0)])
    else:
        screened = _means(experiment, effects.screened, group)
        screened = screened.assign(method="screened", gene=np.arange(len(screened)))
        null = _null(screened)
        table["screened_effect"] = np.where(gene_q >= 0, screened["effect"].to_numpy()[gene_q], np.nan)
        if experiment.is_all:
            screened = screened.assign(perturbation=asked.names, screened_effect=screened["effect"])
            table = pd.concat([table, screened.drop(index=gene_q)], ignore_index=True)
    is_changing = table["num_cells"] > 0
    if experiment.is_all:
        table = table[is_changing]
    else:  # a named gene that no cell expresses has a row: its knock-out changes nothing
        table.loc[~is_changing, "effect"] = 0.0
        table = table[table["perturbation"].isin(asked.names)]
    table = table.reset_index(drop=True)
    is_tested = (table["gene"] >= 0) | (asked.new_id != REMOVED)  # single genes are no null for a pair
    scale_q = np.where(table["method"] == "screened", 1.0, scale)[is_tested]
    return table.join(against_null(table[is_tested], null, scale_q=scale_q)).drop(columns="gene")


def _means(experiment: Experiment, sums: EffectSums, group: int) -> pd.DataFrame:
    """Return mean effects over donors; a single donor with few cells counts if all of them are changed."""
    donors, min_cells = experiment.cells.donors, experiment.config.min_cells
    if len(donors) == 1:
        is_here_n = (experiment.cells.group_n == group) & (experiment.cells.donor_n == 0)
        min_cells = min(min_cells, max(1, int(is_here_n.sum())))
    return mean_over_donors(*sums.of_group(group, num_donors=len(donors)), min_cells=min_cells)


def _null(table: pd.DataFrame) -> Null:
    """Return the null made of the genes of a table that have an effect."""
    known = table[table["effect"].notna()]
    return Null(*(known[name].to_numpy() for name in ("effect", "num_cells", "gene")))


# -- the verb ---------------------------------------------------------------------------------------------------------


def perturb(
    adata: "AnnData | str | Path",
    model: str | Path | Run,
    *,
    genes: Sequence[str] | str = ALL_GENES,
    kind: PerturbationKind = PerturbConfig.kind,
    bin: int | None = PerturbConfig.bin,
    towards: str | None = PerturbConfig.towards,
    away: str | None = PerturbConfig.from_,
    given: Given | None = None,
    embedding: Pooling = PerturbConfig.embedding,
    donor: str | None = PerturbConfig.donor,
    groupby: str | None = PerturbConfig.groupby,
    exact: bool = PerturbConfig.exact,
    top_k: int = PerturbConfig.top_k,
    num_controls: int = PerturbConfig.num_controls,
    min_cells: int = PerturbConfig.min_cells,
    device: str = PerturbConfig.device,
    precision: Precision = PerturbConfig.precision,
    batch_tokens: int | None = PerturbConfig.batch_tokens,
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
        donor: Column of `obs` with donors; None uses `donor_id` if there is one.
        groupby: Column of `obs`: effects of each of its groups.
        exact, top_k, num_controls, min_cells: As on the command line, see `PerturbConfig`.
        device, precision, batch_tokens: How the model runs: "auto", "cpu", "cuda"; "float32" or "bfloat16".
        reading: `batch_size`, `layer`, `gene_id_column`, `min_gene_coverage`, as on the command line.

    Returns:
        A row per perturbation (and group), strongest first; docs/perturbation.md defines the columns.
        `attrs["screen"]` says how well the screen agrees with exact effects of random genes.

    Example:
        >>> import perturbgene as pg
        >>> table = pg.perturb("cells.h5ad", "runs/mlm", genes=["CD79A"], towards="cell_type=B cell")
        >>> table[["perturbation", "method", "num_cells", "num_donors"]].to_string(index=False, header=False)
        'CD79A  exact  101  4'
    """
    names = [genes] if isinstance(genes, str) else list(genes)
    config = PerturbConfig(
        run="loaded", input="in memory", output="returned.csv", genes=names, kind=kind, bin=bin, towards=towards,
        from_=away, embedding=embedding, donor=donor, groupby=groupby, exact=exact, top_k=top_k,
        num_controls=num_controls, min_cells=min_cells, device=device, precision=precision,
        batch_tokens=batch_tokens, **reading,
    )  # fmt: skip
    experiment = Experiment.open(adata, load_run(model, device=device), config, given_labels(given))
    return effect_table(experiment, compute(experiment))


def run_perturb(config: PerturbConfig) -> str | None:
    """Run the `perturb` verb: a table, a picture and a record; an interrupted run continues where it stopped."""
    ranks = Ranks.join(config.device)
    with claimed_output(config, ranks) as (path, target):
        png, record = target.with_suffix(".png"), target.with_suffix(".json")
        check_new(target, png, record, overwrite=config.overwrite)
        run = load_run(config.run, device=ranks.device(config.device))
        experiment = Experiment.open(path, run, config, config.given_labels)
        readout, settings = experiment.readout, config.to_dict()
        store = PartStore.open(target, source=path, run=run, readout=readout, settings=settings)
        effects = compute(experiment, store=store, ranks=ranks)
        if not ranks.is_main:
            return None
        table = effect_table(experiment, effects)
        question = {name: value for name, value in settings.items() if name not in ("run", "output", "overwrite")}
        facts = provenance(run, question, coverage=experiment.cells.dataset.coverage)
        label = f"{config.towards} against {config.from_ or 'all other labels'}" if config.towards else "state"
        cells = f"{len(experiment.cells):,} cells, {_donors(experiment.cells)}"
        title = f"{config.kind.replace('_', ' ')}, {cells}\n{label}"
        with whole_files(target, png, record) as folder:
            if target.suffix == ".parquet":
                table.to_parquet(folder / target.name, index=False)
            else:
                table.to_csv(folder / target.name, index=False)
            save_figure(effects_figure(table, title=title, effect=readout.effect_name), folder / png.name)
            write_json(folder / record.name, {**facts, "screen": table.attrs["screen"], "effect": readout.effect_name})
        store.remove()
        return _report(table, effects.agreement, experiment, target)


def _donors(cells: GroupedCells) -> str:
    if len(cells.donors) > 1:
        return f"{len(cells.donors)} donors"
    return "one donor" if cells.donors != [ALL] else "donors unknown"


def _report(table: pd.DataFrame, screen: Agreement | None, experiment: Experiment, target: Path) -> str:
    """Say what was done, how good the screen was, and which effects are the strongest."""
    cells, counts = experiment.cells, table["method"].value_counts()
    lines = [
        f"{len(cells):,} cells, {_donors(cells)}: {counts.get('exact', 0):,} exact and {counts.get('screened', 0):,} "
        f"screened effects, written to {target} and {target.with_suffix('.png').name}"
    ]
    if screen is not None:
        lines.append(
            f"The screen, checked on {screen.num_genes} random genes: rank correlation with the exact effects "
            f"{screen.spearman:.3f}; its top quarter contains {screen.recall:.0%} of the exact top eighth (25% would "
            f"be chance); exact effects are {screen.scale:.2f} times as large"
        )
    if len(cells.donors) < 2:
        lines.append("No p-values: they need two donors or more (--donor), since cells of one donor are no replicates.")
    shown = table.drop(columns=["standard_error", "null_mean"]).head(12)
    return "\n".join([*lines, shown.to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="")])
