"""The same cells with one phenotype changed: which genes does the model expect to rise or fall?

Owns the verb `counterfactual`: which cells and which combinations of phenotypes are asked, and the files; leaves
predictions to `contrast` and the table's numbers to `statistics`. Letters: n cells, c phenotypes of a combination, t
combinations of training cells.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbgene.cli.options import conditions
from perturbgene.cli.verbs import CounterfactualConfig
from perturbgene.counterfactuals.contrast import Contrast, GenePredictor, Sums, add_block
from perturbgene.counterfactuals.statistics import change_table, observed_agreement
from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM
from perturbgene.data_utils.h5ad_writing import write_adata
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset, columns_of
from perturbgene.data_utils.labels import ABSENT
from perturbgene.data_utils.opening import FileList, one_source, open_source
from perturbgene.data_utils.shards import ShardCache
from perturbgene.errors import InputError, did_you_mean, listed
from perturbgene.files import check_new, whole_files
from perturbgene.inference.held_out import HeldOutScore, about_q, about_untrained, doubt_about, held_out_score
from perturbgene.inference.run import Run, load_run, provenance
from perturbgene.inference.streaming import (
    ALONE,
    Given,
    Ranks,
    claimed_output,
    given_labels,
    open_cells,
    read_groups,
    reading_options,
    stream_batches,
    sum_over_ranks,
)
from perturbgene.plots import changes_figure, save_figure
from perturbgene.urls import shown_path

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

#: The null is computed on so many cells of each group.
NULL_CELLS = 256
#: The command prints the first groups only.
MOST_SHOWN = 6


# -- what may be asked --------------------------------------------------------------------------------------------


def training_combinations(run: Run, categories: Sequence[str]) -> np.ndarray:
    """Return the distinct combinations of labels among the run's training cells: input ids (t, c), -1 for missing.

    Raises:
        InputError: The run does not say which cells it was trained on, or they are no longer there.
    """
    try:
        settings: Any = run.settings
        if settings is None:
            raise InputError("it has no run.yaml")
        shards = ShardCache(
            run.own_files("train"), where=conditions(settings.where), missing_labels=settings.missing_labels,
            obs_columns=columns_of(settings.phenotypes), **run.tokenizer.shard_options(),
        )  # fmt: skip
        found = []
        for index in range(len(shards)):
            ids_nc = np.stack([shards[index].label_ids(category) for category in categories], axis=1)
            found.append(np.unique(ids_nc, axis=0))
        shards.close()
    except (InputError, OSError, AttributeError) as error:
        reason = error.__cause__ or error
        raise InputError(
            f"{run.path} does not say which cells it was trained on, or they cannot be read ({reason}), so these "
            "combinations of phenotypes cannot be checked. Put its corpus back in its place, or pass --force."
        ) from error
    return np.unique(np.concatenate(found), axis=0)


def unseen_combinations(asked_nc: np.ndarray, trained_tc: np.ndarray) -> np.ndarray:
    """Return the distinct combinations that no training cell has; a cell's missing label (-1) matches any."""
    distinct = np.unique(asked_nc, axis=0)
    is_seen = [((trained_tc == row) | (row == ABSENT)).all(axis=1).any() for row in distinct]
    return distinct[~np.array(is_seen, dtype=bool)]


@dataclass(frozen=True)
class CellSelection:
    """Which cells are changed, which have the label already, and their groups."""

    groups: list[str]
    group_n: np.ndarray  # (n,), -1 for cells without a group
    is_changed_n: np.ndarray  # has another label than the one to set
    has_label_n: np.ndarray  # has that label already
    is_null_n: np.ndarray  # is changed, and the null is computed on it


def choose_cells(
    dataset: IterableAnnDataset, contrast: Contrast, *, groupby: str | None, null_cells: int = NULL_CELLS
) -> CellSelection:
    """Sort cells by their own label, and draw those of each group on which the null is computed.

    Raises:
        InputError: No cell has another label that the vocabulary knows.
    """
    groups, group_n = read_groups(dataset, groupby)
    own_n = dataset.shards[0].label_ids(contrast.category)
    has_label_n = (own_n == contrast.label_id) & (group_n != ABSENT)
    is_changed_n = (own_n != contrast.label_id) & (own_n != ABSENT) & (group_n != ABSENT)
    if not is_changed_n.any():
        raise InputError(
            f"no cell has another known {contrast.category} than the one to set, so there is nothing to change. "
            "Choose another label with --set, or other cells."
        )
    draw_n = np.random.default_rng((contrast.seed, 2)).random(len(own_n))
    is_null_n = np.zeros(len(own_n), dtype=bool)
    for group in range(len(groups)):
        rows = np.flatnonzero(is_changed_n & (group_n == group))
        is_null_n[rows[np.argsort(draw_n[rows], kind="stable")[:null_cells]]] = True
    return CellSelection(groups, group_n, is_changed_n, has_label_n, is_null_n)


@dataclass(frozen=True)
class CounterfactualTask:
    """A question that has been checked: ready to be predicted."""

    config: CounterfactualConfig
    run: Run
    contrast: Contrast  # the phenotype and the label to set
    given: dict[str, str | None]  # the other phenotypes in the sequence
    dataset: IterableAnnDataset
    selection: CellSelection

    @classmethod
    def open(
        cls, source: Any, run: Run, config: CounterfactualConfig, given: Mapping[str, str | None] | None, *,
        ranks: Ranks = ALONE,
    ) -> "CounterfactualTask":  # fmt: skip
        """Check what is asked, and open the cells.

        Raises:
            InputError: The run is a classifier, a phenotype or label is unknown, no cell can be changed, or the model
                has never seen such cells.
        """
        [(category, label)] = config.set_label.items()
        run.require_mlm("genes")
        run.tokenizer.vocabulary.check_category(category)
        label_id = run.tokenizer.vocabulary.label_id(category, label)
        if label_id == ABSENT:
            hint = did_you_mean(label, run.tokenizer.phenotypes[category])
            raise InputError(f"{category}={label} is not in the run's vocabulary. {hint} Change --set.")
        contrast = Contrast(category, label_id, config.num_passes, config.num_null, config.seed)
        if given is None:
            file, column_of = open_source(one_source(source)), columns_of(config.phenotypes)
            known = file.columns_of("obs")
            names = [name for name in run.tokenizer.included_phenotypes if column_of.get(name, name) in known]
            others: dict[str, str | None] = {name: None for name in names if name != category}
            file.close()
        else:
            others = dict(given)
            if category in others:
                raise InputError(f"{category!r} is set, so it cannot be given too. Remove it from --given.")
        slots = {category: None, **others}
        dataset = open_cells(source, run, slots, ranks=ranks, **reading_options(config))
        selection = choose_cells(dataset, contrast, groupby=config.groupby)
        if not config.force:
            labels = [dataset.shards[0].label_ids(name)[selection.is_changed_n] for name in others]
            set_n = np.full(int(selection.is_changed_n.sum()), label_id, dtype=np.int32)
            unseen = unseen_combinations(np.stack([set_n, *labels], axis=1), training_combinations(run, list(slots)))
            label_of = run.tokenizer.vocabulary.label_of
            if names := [" + ".join(label_of(int(id_))[1] for id_ in row if id_ != ABSENT) for row in unseen]:
                raise InputError(
                    f"no training cell is {listed(names)}, so the model has never seen what is asked. Give fewer "
                    "phenotypes with --given, leave these cells out, or pass --force."
                )
        return cls(config, run, contrast, others, dataset, selection)


# -- prediction -------------------------------------------------------------------------------------------------------


def expected_changes(task: CounterfactualTask, *, target: Path | None = None, ranks: Ranks = ALONE) -> pd.DataFrame:
    """Predict the changes of all cells; only rank 0 gets those of all ranks, which meet next to `target`.

    `attrs["agreement"]` of the table says how each group agrees with cells that have the label, and `attrs["doubts"]`
    why the q-values of a group are not to be trusted. Without `--show_q` such a group has no p and q.
    """
    dataset, selection, contrast = task.dataset, task.selection, task.contrast
    tokenizer = dataset.tokenizer
    predictor = GenePredictor(task.run, contrast, tokenizer=tokenizer)
    rates: dict[str, Any] = {**task.run.mask_rates, "phenotype_mask_prob": 0.0, "absent_prob": 0.0}  # as in training
    if task.config.gene_mask_prob is not None:
        rates["gene_mask_prob"] = task.config.gene_mask_prob
    if not rates["gene_mask_prob"]:
        raise InputError(
            f"{task.run.path} was trained without hiding genes, so it cannot predict them. Give another run."
        )
    collator = DataCollatorForPhenotypicMLM(tokenizer, packed=True, seed=task.config.seed, **rates)
    sums = Sums.zeros(num_groups=len(selection.groups), num_genes=len(tokenizer.panel), num_null=contrast.num_null)
    values_gb, num_empty = tokenizer.bin_edges.values(), 0
    batch_tokens = task.config.batch_tokens
    for whole in stream_batches(dataset, text="counterfactual", ranks=ranks, most_tokens=batch_tokens):
        is_used_n = selection.is_changed_n[whole.cells_n] | selection.has_label_n[whole.cells_n]
        has_genes_n = tokenizer.num_genes(whole) > 0
        num_empty += int((is_used_n & ~has_genes_n).sum())
        block = whole.take(np.flatnonzero(is_used_n & has_genes_n))
        if not len(block):
            continue
        group_n, has_label_n = selection.group_n[block.cells_n], selection.has_label_n[block.cells_n]
        sums.add_cells(block, group_n=group_n, has_label_n=has_label_n, values_gb=values_gb, tokenizer=tokenizer)
        rows = np.flatnonzero(~has_label_n)
        if len(rows):
            is_null_n = selection.is_null_n[block.cells_n[rows]]
            add_block(sums, predictor, collator, block.take(rows), group_n=group_n[rows], is_null_n=is_null_n)
    own = [*vars(sums).values(), np.array(num_empty)]
    *arrays, empty = sum_over_ranks(own, target=target, ranks=ranks)
    for line in about_untrained(task.run.path) if ranks.is_main else []:
        logger.warning(line)
    if empty and ranks.is_main:
        logger.warning("%d cells express no gene of the panel and are left out", empty)
    table = change_table(Sums(*arrays), tokenizer.panel, groups=selection.groups)
    agreement = observed_agreement(table).to_dict(orient="records")
    doubts = doubts_of(task, agreement)
    table.attrs |= {"agreement": agreement, "doubts": doubts}
    if not task.config.show_q:
        table.loc[table["group"].isin(doubts), ["p_value", "q_value"]] = np.nan
    return table


def doubts_of(task: CounterfactualTask, agreement: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return why the changes of groups deserve no p and q; groups without a doubt are left out, and all without a null.

    The run must tell the phenotype on held-out cells, and cells that have the label must not contradict the changes.
    """
    if not task.contrast.num_null:
        return {}
    doubt, set_label = doubt_about(task.run, task.contrast.category), task.config.set
    if doubt is None and not task.selection.has_label_n.any():
        doubt = f"no cell here has {set_label}, so the changes cannot be checked (let --where include such cells)"
    doubts = {}
    for row in agreement:
        if doubt or not row["spearman"] > 0:
            doubts[row["group"]] = doubt or f"cells that have {set_label} contradict the changes of {row['group']}"
    return doubts


# -- the verb ---------------------------------------------------------------------------------------------------------


def counterfactual(
    adata: "AnnData | str | Path",
    model: str | Path | Run,
    *,
    set: Mapping[str, str],
    given: Given | None = None,
    groupby: str | None = CounterfactualConfig.groupby,
    num_passes: int = CounterfactualConfig.num_passes,
    num_null: int = CounterfactualConfig.num_null,
    gene_mask_prob: float | None = CounterfactualConfig.gene_mask_prob,
    force: bool = CounterfactualConfig.force,
    show_q: bool = CounterfactualConfig.show_q,
    seed: int = CounterfactualConfig.seed,
    device: str = CounterfactualConfig.device,
    batch_tokens: int = CounterfactualConfig.batch_tokens,
    **reading: Any,
) -> pd.DataFrame:
    """Return how the model expects each gene to change if one phenotype of the cells is set to a label.

    Args:
        adata: Cells (or the path of an h5ad file) with that phenotype in `obs`; cells that have the label already
            serve for `observed`.
        model: Run folder of mlm, or a loaded run.
        set: One phenotype and its label, such as `{"disease": "normal"}`.
        given: Other phenotypes in the sequence -> label of all cells, or None to read `obs`; None in place of the
            mapping gives all of the run that `obs` has.
        groupby: Column of `obs`: changes of each of its groups.
        num_passes: Masks per cell.
        num_null: Meaningless changes that make the null; 0 leaves t, p and q out.
        gene_mask_prob: Share of genes that are hidden; None uses the run's own. The more is hidden, the more the model
            relies on the label.
        force: True asks about combinations of phenotypes that the run has never seen.
        show_q: True gives p and q even where the run is not better than the most frequent label on held-out cells or
            has no such score, and where no cell has the label or those that have it contradict the changes.
        seed: Of masks and null.
        device, batch_tokens, reading: As for `embed`.

    Returns:
        One row per gene and group, by falling change. `change` is the expected value (log1p counts per 10,000) with the
        label minus that with the cell's own, averaged over cells; `change_bins` is the same in bins; `standard_error`
        is that of `change` over cells and masks; for `null_mean`, `null_sd`, `t`, `p_value` and `q_value` see
        `statistics.against_null`; `observed` is the difference between cells that have the label and these cells;
        `change_expressed`, `change_unexpressed` and `share_expressed` describe the cells that express the gene and
        those that do not; `n_cells`. Cells that express no gene of the panel are left out. See `expected_changes` for
        `attrs`.

    Raises:
        InputError: See `CounterfactualTask.open`.

    Example:
        >>> import perturbgene as pg
        >>> table = pg.counterfactual("cells.h5ad", "runs/mlm", set={"cell_type": "B cell"}, given={})
        >>> table["change"].is_monotonic_decreasing, bool(table["q_value"].between(0, 1).all())
        (True, True)
    """
    if len(set) != 1:
        raise InputError(f"one phenotype is changed at a time, but {listed(set) or 'none'} are set. Set one.")
    [(category, label)] = set.items()
    config = CounterfactualConfig(
        run="loaded", input="in memory", output="returned.h5ad", set=f"{category}={label}", groupby=groupby,
        num_passes=num_passes, num_null=num_null, gene_mask_prob=gene_mask_prob, force=force, show_q=show_q,
        seed=seed, device=device, batch_tokens=batch_tokens, **reading,
    )  # fmt: skip
    others = None if given is None else given_labels(given)
    task = CounterfactualTask.open(adata, load_run(model, device=device), config, others)
    table = expected_changes(task)
    for doubt in dict.fromkeys(table.attrs["doubts"].values()):
        logger.warning(about_q(doubt, is_shown=show_q))
    return table


def run_counterfactual(config: CounterfactualConfig) -> str | None:
    """Run the `counterfactual` verb: an h5ad file whose obs is the table, the same as CSV, and a figure."""
    import anndata

    ranks = Ranks.join(config.device)
    with claimed_output(config, ranks) as (source, target):
        csv, png = target.with_suffix(".csv"), target.with_suffix(".png")
        check_new(target, csv, png, overwrite=config.overwrite)
        run = load_run(config.run, device=ranks.device(config.device))
        task = CounterfactualTask.open(FileList([source]), run, config, config.given_labels, ranks=ranks)
        table = expected_changes(task, target=target, ranks=ranks)
        if not ranks.is_main:
            return None
        names = ("groupby", "num_passes", "num_null", "gene_mask_prob", "force", "show_q", "seed")
        question: dict[str, Any] = {"verb": config.verb, "set": config.set, "given": task.given}
        question |= {name: getattr(config, name) for name in names}
        question |= {"input": shown_path(config.input), "reading": reading_options(config)}
        question |= {"num_labeled": int(task.selection.has_label_n.sum())}
        score = held_out_score(run, task.contrast.category)
        question |= {"held_out": asdict(score) if score else None, "doubts": table.attrs["doubts"]}
        agreement = pd.DataFrame(table.attrs["agreement"])
        facts = {"agreement": agreement, **provenance(run, question, coverage=task.dataset.coverage)}
        rows = table.assign(**{name: pd.Categorical(table[name]) for name in ("group", "gene", "symbol")})
        rows.index = pd.Index(table["gene"] + "|" + table["group"])
        title = f"set to {config.set}; rank correlation with observed: {_ranks(agreement.head(1))}"
        figure = changes_figure(table, title=title, value="change of the expected value")
        with whole_files(target, csv, png) as folder:
            write_adata(anndata.AnnData(obs=rows, uns={"perturbgene": facts}), folder / target.name)
            table.to_csv(folder / csv.name, index=False)
            save_figure(figure, folder / png.name)
        return "\n".join([*_summary(table, task, score), f"written to {target}, {csv} and {png}"])


def _ranks(agreement: pd.DataFrame) -> str:
    known = [
        f"{group} {rank:.2f} over {num_genes:,} genes"
        for group, rank, num_genes in agreement.itertuples(index=False)
        if np.isfinite(rank)
    ]
    return "; ".join(known) or "not known"


def _summary(table: pd.DataFrame, task: CounterfactualTask, score: HeldOutScore | None) -> list[str]:
    """Say how changes agree with cells that have the label, how good the run is, and then what rises and falls."""
    set_label, num_labeled = task.config.set, int(task.selection.has_label_n.sum())
    agreement, doubts = pd.DataFrame(table.attrs["agreement"]).head(MOST_SHOWN), table.attrs["doubts"]
    lines = [f"agreement: not known, since no cell here has {set_label}"]
    if num_labeled:
        lines = [f"agreement with {num_labeled:,} cells that have {set_label} (rank correlation): {_ranks(agreement)}"]
    lines += [str(score)] if score else []
    lines += [about_q(doubt, is_shown=task.config.show_q) for doubt in dict.fromkeys(doubts.values())]
    lines.append(f"{int(table['n_cells'].max()) if len(table) else 0:,} cells set to {set_label}")
    for group, part in list(table.groupby("group", sort=False))[:MOST_SHOWN]:
        up = ", ".join(part["symbol"][part["change"] > 0].head(5)) or "none"
        down = ", ".join(part["symbol"][part["change"] < 0].tail(5)[::-1]) or "none"
        hits = f"{int((part['q_value'] < 0.05).sum()):,} of {len(part):,} genes with q < 0.05; "
        lines.append(f"{group}: {hits if part['q_value'].notna().any() else ''}up {up}; down {down}")
    return lines
