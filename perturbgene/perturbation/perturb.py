"""In-silico perturbation: which gene, knocked out or raised, moves cells, and where to.

Owns the verb `perturb`: which effects are screened, which are computed exactly, and the table with its statistics. How
a single knock-out is scored is in `readouts.exact_effects`; docs/perturbation.md defines every column. Letters: q
perturbations, m effects, k groups, u units (a donor's cells of a group).
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbgene.cli.verbs import PerturbationKind, PerturbConfig, Pooling
from perturbgene.data_utils.labels import label_text
from perturbgene.data_utils.opening import FileList
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.files import check_new
from perturbgene.inference.held_out import about_q, doubt_about, held_out_score
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
from perturbgene.perturbation.cells import GroupedCells, PartStore, sum_effects
from perturbgene.perturbation.edits import ALL_GENES, REMOVED, Perturbations, changed_pairs, perturbations_of
from perturbgene.perturbation.readouts import (
    LabelReadout,
    Readout,
    StateReadout,
    exact_effects,
    label_readout,
    sequences,
)
from perturbgene.perturbation.screening import screen_removals
from perturbgene.perturbation.statistics import against_null, agreement, mean_over_donors
from perturbgene.plots import effects_figure

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

#: Seed of the draw of control genes.
SEED = 0
#: Cells on which the screen is checked if its control genes are not computed in all cells.
CHECK_CELLS = 100
#: Settings that are no part of the question.
NOT_ASKED = ("run", "output", "overwrite", "report", "part")


@dataclass(frozen=True)
class Experiment:
    """Perturbations of cells, and how their effects are computed."""

    config: PerturbConfig
    run: Run
    cells: GroupedCells
    readout: Readout  # what of the cells is compared
    asked: Perturbations  # the perturbations that are asked for
    doubt: str | None = None  # why effects on a label deserve no p and q

    @classmethod
    def open(cls, source: Any, run: Run, config: PerturbConfig, given: Mapping[str, str | None]) -> "Experiment":
        """Check what is asked, and open the cells."""
        asked = perturbations_of(config.genes, run.tokenizer, kind=config.kind, level=config.bin)
        readout: Readout = StateReadout(config.embedding, tuple(given))
        if config.towards:
            readout = label_readout(run, towards=config.towards, away=config.from_, given=tuple(given))
        columns = {"donor": config.donor, "groupby": config.groupby}
        cells = GroupedCells.open(source, run, readout, given=given, **columns, **reading_options(config))
        doubt = None
        if isinstance(readout, LabelReadout):
            report_labels(cells, str(config.towards), config.from_)
            doubt = doubt_about(run, readout.category)
        if doubt and len(cells.donors) > 1:  # now, since the effects may take hours
            logger.warning(about_q(doubt, is_shown=config.show_q))
        return cls(config, run, cells, readout, asked, doubt)

    @property
    def is_all(self) -> bool:
        """True if every gene is asked for, False if genes are named."""
        return self.config.genes == [ALL_GENES]

    def means(self, sums_uq2: np.ndarray, group: int) -> pd.DataFrame:
        """Return mean effects over donors; a single donor with few cells counts if all of them are changed."""
        donors, min_cells = self.cells.donors, self.config.min_cells
        if len(donors) == 1:
            is_here_n = (self.cells.group_n == group) & (self.cells.donor_n == 0)
            min_cells = min(min_cells, max(1, int(is_here_n.sum())))
        counts_dq, sums_dq = np.zeros((2, len(donors), sums_uq2.shape[1]))
        is_here_u = self.cells.units_u2[:, 1] == group
        donor_u = self.cells.units_u2[is_here_u, 0]
        counts_dq[donor_u], sums_dq[donor_u] = sums_uq2[is_here_u, :, 0], sums_uq2[is_here_u, :, 1]
        means_dq = np.where(counts_dq > 0, sums_dq / np.maximum(counts_dq, 1), np.nan)
        return mean_over_donors(means_dq, counts_dq, min_cells=min_cells)

    def effects_kq(self, sums_uq2: np.ndarray) -> np.ndarray:
        """Return the mean effects of all groups, (k, q)."""
        return np.stack([self.means(sums_uq2, group)["effect"].to_numpy() for group in range(len(self.cells.groups))])

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


def report_labels(cells: GroupedCells, towards: str, from_: str | None) -> None:
    """Warn if cells that are already where `towards` leads, or not where `from_` starts, are perturbed with the others.

    Both options say what is compared. Neither chooses cells.
    """
    category, _, label = (part.strip() for part in (from_ or towards).partition("="))
    shard = cells.dataset.shards[0]
    if shard.obs_columns.get(category, category) not in shard.source.columns_of("obs"):
        return
    own_n = shard.label_column(category).map(label_text).astype(str).to_numpy()[cells.is_used_n]
    num_cells, num_there = len(own_n), int((own_n == label).sum())
    if from_ and num_there < num_cells:
        what = f"only {num_there:,} of {num_cells:,} cells have {from_}, the label of --from"
        rest = f'{category}="{label}"'
    elif not from_ and 0 < num_there < num_cells:
        others = pd.Series(own_n[(own_n != label) & (own_n != "")]).value_counts().index
        rest = " ".join(f'{category}="{other}"' for other in others[:3]) or f"{category}=..."
        what = f"{num_there:,} of {num_cells:,} cells have {towards}, the label of --towards, already"
    else:
        return
    logger.warning(
        "%s, but all of them are perturbed: --towards and --from say what is compared, not in which cells. "
        "Choose cells with --where, e.g. --where %s", what, rest,
    )  # fmt: skip


@dataclass(frozen=True)
class Effects:
    """Sums of effects over all cells."""

    computed: Perturbations  # what was computed exactly: asked for or chosen from the screen, and controls
    exact: np.ndarray  # sums of `computed`, (u, q, 2)
    controls: np.ndarray  # rows of `computed` that are random genes
    screened: np.ndarray | None = None  # sums of the screen of all genes
    agreement: dict[str, float] | None = None  # of the screen with exact effects of random genes


def compute(experiment: Experiment, *, store: PartStore | None = None, ranks: Ranks = ALONE) -> Effects | None:
    """Screen all genes, choose among them, and compute the chosen ones exactly; see `sum_effects` for the options.

    A job that computes one of several pieces returns None. It chooses only when all pieces have screened their cells,
    and else computes nothing exactly.
    """
    asked, cells, config = experiment.asked, experiment.cells, experiment.config
    every_gene = perturbations_of([ALL_GENES], experiment.run.tokenizer)
    is_tested = len(cells.donors) > 1  # then named genes need a null: the screen of all genes, or random genes
    screened, computed, controls = None, asked, np.empty(0, dtype=np.int64)
    is_screened = asked.new_id == REMOVED and not config.exact and (experiment.is_all or is_tested)
    if is_screened:
        screened = sum_effects(
            "screened", experiment.screened_effects, cells, len(every_gene), store=store, ranks=ranks
        )
        if screened is None and experiment.is_all:
            return None
    if screened is not None and experiment.is_all:
        strength_q = np.nan_to_num(np.abs(experiment.effects_kq(screened)), nan=-1.0).max(axis=0)  # in any group
        known = np.flatnonzero(strength_q >= 0)
        strongest = known[np.argsort(-strength_q[known], kind="stable")[: config.top_k]]
        drawn = _draw(known, config.num_controls)
        rows = np.union1d(strongest, drawn)
        computed, controls = asked.take(rows), np.flatnonzero(np.isin(rows, drawn))
    elif not experiment.is_all and is_tested:
        singles = asked.types_j[asked.offsets_q1[:-1]][np.diff(asked.offsets_q1) == 1]
        drawn = _draw(np.flatnonzero(~np.isin(every_gene.types_j, singles)), config.num_controls)
        if not is_screened:
            controls = len(asked) + np.arange(len(drawn))
            computed = replace(
                asked,
                names=(*asked.names, *every_gene.take(drawn).names),
                types_j=np.append(asked.types_j, every_gene.types_j[drawn]),
                offsets_q1=np.append(asked.offsets_q1, asked.offsets_q1[-1] + 1 + np.arange(len(drawn))),
            )
    exact_of = partial(experiment.exact_effects, perturbations=computed)
    exact = sum_effects(f"exact-{_digest(computed)}", exact_of, cells, len(computed), store=store, ranks=ranks)
    if exact is None or (store is not None and store.own):
        return None
    if screened is None:
        return Effects(computed, exact, controls)
    if experiment.is_all:
        exact_kq, screened_kq = experiment.effects_kq(exact)[:, controls], experiment.effects_kq(screened)[:, drawn]
        found = agreement(exact_kq.ravel(), screened_kq.ravel())
    else:
        found = _agreement_in_sample(experiment, every_gene, genes=drawn)
    return Effects(computed, exact, controls, screened, found)


def _digest(computed: Perturbations) -> str:
    """Return a short hash of perturbations; parts of others, chosen by a screen that was repeated, do not count."""
    return hashlib.sha256("\n".join(computed.names).encode()).hexdigest()[:8]


def _draw(genes: np.ndarray, count: int) -> np.ndarray:
    """Draw control genes, ascending."""
    return np.sort(np.random.default_rng(SEED).choice(genes, size=min(count, len(genes)), replace=False))


def _agreement_in_sample(experiment: Experiment, every_gene: Perturbations, *, genes: np.ndarray) -> dict[str, float]:
    """Compare the screen with exact effects of some genes, in cells spread evenly over the file."""
    cells, controls = experiment.cells, every_gene.take(genes)
    donor_n = np.full(len(cells), -1)  # which leaves a cell out
    donor_n[np.linspace(0, len(cells) - 1, min(CHECK_CELLS, len(cells))).astype(np.int64)] = 0
    cells = replace(cells, donors=[ALL], donor_n=donor_n, groups=[ALL], group_n=np.zeros_like(donor_n))
    sample = replace(experiment, cells=cells)
    exact_of = partial(sample.exact_effects, perturbations=controls)
    exact = sum_effects("exact controls", exact_of, cells, len(controls))
    screened = sum_effects("screened controls", sample.screened_effects, cells, len(every_gene))
    assert exact is not None and screened is not None  # without a store nothing is missing
    return agreement(sample.effects_kq(exact).ravel(), sample.effects_kq(screened)[:, genes].ravel())


# -- the table --------------------------------------------------------------------------------------------------------


def effect_table(experiment: Experiment, effects: Effects) -> pd.DataFrame:
    """Return the effects of all groups, strongest first; docs/perturbation.md defines the columns.

    Exact and screened effects are ranked together: screened ones as if they had the scale of exact ones.
    """
    scale, num_donors = 1.0, len(experiment.cells.donors)
    if effects.agreement is not None:
        scale = effects.agreement["scale"] if effects.agreement["scale"] > 0 else np.nan
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
    if experiment.doubt and not experiment.config.show_q:
        whole[["p_value", "q_value"]] = np.nan
    whole.attrs |= {"doubt": experiment.doubt, "screen": effects.agreement}
    return whole


def _group_table(experiment: Experiment, effects: Effects, group: int, *, scale: float) -> pd.DataFrame:
    """Return one row for each perturbation asked for: exact where it was computed, else screened."""
    computed, asked = effects.computed, experiment.asked
    gene_q = computed.types_j[computed.offsets_q1[:-1]] - experiment.run.tokenizer.first_gene_type
    gene_q = np.where(np.diff(computed.offsets_q1) == 1, gene_q, -1)  # -1 for combinations
    table = experiment.means(effects.exact, group).assign(method="exact", gene=gene_q)
    table.insert(0, "perturbation", computed.names)
    if effects.screened is None:
        null = table.iloc[effects.controls if len(effects.controls) else np.flatnonzero(gene_q >= 0)]
    else:
        screened = experiment.means(effects.screened, group)
        screened = screened.assign(method="screened", gene=np.arange(len(screened)))
        null = screened
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


# -- the verb ---------------------------------------------------------------------------------------------------------


def perturb(
    adata: "AnnData | str | Path",
    model: str | Path | Run,
    *,
    genes: Sequence[str] | str = ALL_GENES,
    kind: PerturbationKind = PerturbConfig.kind,
    bin: int | None = PerturbConfig.bin,
    towards: str | None = PerturbConfig.towards,
    from_: str | None = PerturbConfig.from_,
    given: Given | None = None,
    embedding: Pooling = PerturbConfig.embedding,
    donor: str | None = PerturbConfig.donor,
    groupby: str | None = PerturbConfig.groupby,
    exact: bool = PerturbConfig.exact,
    top_k: int = PerturbConfig.top_k,
    num_controls: int = PerturbConfig.num_controls,
    min_cells: int = PerturbConfig.min_cells,
    show_q: bool = PerturbConfig.show_q,
    device: str = PerturbConfig.device,
    batch_tokens: int | None = PerturbConfig.batch_tokens,
    **reading: Any,
) -> pd.DataFrame:
    """Return the effect of each perturbation on a set of cells.

    Args:
        adata: Cells, or the path of an h5ad file.
        model: Run folder, or a loaded run.
        genes: Ids or symbols, combinations joined by "+"; "all" for every gene that a cell expresses.
        kind, bin: "knock_out", "over_express", or "set_bin" with the bin.
        towards, from_: `category=label`: the effect is the change of the log-odds of the first label, against all
            others or against the second. Without them it is the cosine distance between the cell's states.
        given: Phenotype -> label of all cells, or None to read each cell's own from `obs`; all others are absent.
        embedding: State: "cls", or "mean" over gene tokens other than the perturbed gene's.
        donor: Column of `obs` with donors; None uses `donor_id` if there is one.
        groupby: Column of `obs`: effects of each of its groups.
        exact, top_k, num_controls, min_cells, show_q: As on the command line, see `PerturbConfig`.
        device, batch_tokens: How the model runs: "auto", "cpu" or "cuda", and the maximum number of tokens at once.
        reading: `where` (which cells are perturbed) and how they are read, as on the command line: `batch_size`,
            `layer`, `gene_id_column`, `normalization`, `missing_labels`, `min_gene_coverage`.

    Returns:
        A row per perturbation (and group), strongest first; docs/perturbation.md defines the columns.
        `attrs["screen"]` says how well the screen agrees with exact effects of random genes, and `attrs["doubt"]` why
        p and q of effects on a label are missing, if they are.

    Example:
        >>> import perturbgene as pg
        >>> table = pg.perturb("cells.h5ad", "runs/mlm", genes=["CD79A"], towards="cell_type=B cell")
        >>> table[["perturbation", "method", "num_cells", "num_donors"]].to_string(index=False, header=False)
        'CD79A  exact  101  4'
    """
    names = [genes] if isinstance(genes, str) else list(genes)
    config = PerturbConfig(
        run="loaded", input="in memory", output="returned.csv", genes=names, kind=kind, bin=bin, towards=towards,
        from_=from_, embedding=embedding, donor=donor, groupby=groupby, exact=exact, top_k=top_k,
        num_controls=num_controls, min_cells=min_cells, show_q=show_q, device=device, batch_tokens=batch_tokens,
        **reading,
    )  # fmt: skip
    experiment = Experiment.open(adata, load_run(model, device=device), config, given_labels(given))
    effects = compute(experiment)
    assert effects is not None  # only a job that computes a part has none
    return effect_table(experiment, effects)


def run_perturb(config: PerturbConfig) -> str | None:
    """Run the `perturb` verb: a table, a picture and a record; an interrupted run continues where it stopped."""
    ranks = Ranks.join(config.device)
    with claimed_output(config, ranks) as (path, target):
        check_new(target, target.with_suffix(".png"), target.with_suffix(".json"), overwrite=config.overwrite)
        run, settings = load_run(config.run, device=ranks.device(config.device)), config.to_dict()
        experiment = Experiment.open(FileList([path]), run, config, config.given_labels)
        num_cells = len(experiment.cells)
        store = PartStore.open(
            config, source=path, run=run, readout=experiment.readout, num_cells=num_cells, ranks=ranks
        )
        effects = compute(experiment, store=store, ranks=ranks)
        if not ranks.is_main or effects is None:
            return store.describe() if ranks.is_main else None
        table = effect_table(experiment, effects)
        question = {name: value for name, value in settings.items() if name not in NOT_ASKED}
        facts = provenance(run, question, coverage=experiment.cells.dataset.coverage)
        effect, aim = f"cosine distance of the state ({config.embedding})", "state"
        if config.towards:
            effect = f"change of the log-odds of the label of {config.towards.partition('=')[0].strip()} (nats)"
            aim = f"{config.towards} against {config.from_ or 'all other labels'}"
        num_donors, is_known = len(experiment.cells.donors), experiment.cells.donors != [ALL]
        donors = f"{num_donors} donors" if num_donors > 1 else "one donor" if is_known else "donors unknown"
        cells = f"{len(experiment.cells):,} cells, {donors}"
        figure = effects_figure(table, title=f"{config.kind.replace('_', ' ')}, {cells}\n{aim}", effect=effect)
        readout = experiment.readout
        score = held_out_score(run, readout.category) if isinstance(readout, LabelReadout) else None
        record = {"held_out": asdict(score) if score else None, **table.attrs, **facts, "effect": effect}
        record |= {"num_cells": int(experiment.cells.is_used_n.sum()), "num_donors": num_donors if is_known else 0}
        store.finish(target, table, figure, record)
        counts = table["method"].value_counts()
        first = (
            f"{cells}: {counts.get('exact', 0):,} exact and {counts.get('screened', 0):,} screened effects, written to "
            f"{target} and {target.with_suffix('.png').name}"
        )
        known = [str(score)] if score else []
        return "\n".join([*known, first, *_report(table, num_donors=num_donors, is_shown=config.show_q)])


def _report(table: pd.DataFrame, *, num_donors: int, is_shown: bool) -> list[str]:
    """Say how good the screen was, why there are no p-values, and which effects are the strongest."""
    lines, screen, doubt = [], table.attrs["screen"], table.attrs["doubt"]
    if screen is not None and np.isnan(screen["spearman"]):
        lines.append(f"The screen was not checked: effects of {screen['num_genes']} random genes have no ranks.")
    elif screen is not None:
        lines.append(
            "The screen, checked on {num_genes} random genes: rank correlation with the exact effects {spearman:.3f}; "
            "its top quarter contains {recall:.0%} of the exact top eighth (25% would be chance); exact effects are "
            "{scale:.2f} times as large".format(**screen)
        )
    if num_donors < 2:
        lines.append("No p-values: they need two donors or more (--donor), since cells of one donor are no replicates.")
    elif doubt:
        lines.append(about_q(doubt, is_shown=is_shown))
    dropped = ["standard_error", "null_mean", *(["p_value", "q_value"] if doubt and not is_shown else [])]
    shown = table.drop(columns=dropped).head(12)
    return [*lines, shown.to_string(index=False, float_format=lambda value: f"{value:.4g}", na_rep="")]
