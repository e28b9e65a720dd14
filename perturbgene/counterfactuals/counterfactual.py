"""The same cells with one phenotype changed: which genes does the model expect to rise or fall?

Owns which cells and which combinations of phenotypes are asked, and the files; leaves predictions to `contrast`,
statistics to `changes` and ranks to `parts`. (The verb's own name is a function of the package.) Letters: n cells, c
phenotypes of a combination, t combinations of training cells.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from perturbgene.cli.verbs import CounterfactualConfig
from perturbgene.configs import MlmConfig, load_config
from perturbgene.corpus.manifest import Corpus
from perturbgene.counterfactuals.contrast import Contrast, GenePredictor, Sums, add_block
from perturbgene.counterfactuals.statistics import change_table
from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.labels import ABSENT, Vocabulary
from perturbgene.data_utils.opening import H5adFile, expand_paths
from perturbgene.errors import InputError, did_you_mean, listed
from perturbgene.files import whole_file
from perturbgene.inference.run import Run, load_run, provenance
from perturbgene.inference.streaming import (
    ALONE,
    CellResults,
    Given,
    Ranks,
    cell_results,
    check_target,
    given_labels,
    has_genes,
    open_cells,
    read_groups,
    reading_options,
    stream_batches,
    unwritable,
)
from perturbgene.plots import changes_figure, save_figure

if TYPE_CHECKING:
    from anndata import AnnData


logger = logging.getLogger(__name__)


# -- what may be asked --------------------------------------------------------------------------------------------


def training_combinations(run: Run, categories: Sequence[str]) -> np.ndarray | None:
    """Return the distinct combinations of labels among the run's training cells.

    Args:
        run: Its `run.yaml` names the corpus or the files that it was trained on.
        categories: Phenotypes, in the order of the columns.

    Returns:
        Input ids, int32 of shape (combinations, categories), -1 where a label is missing; None when the run does not
        say what it was trained on, or that is no longer there.
    """
    try:
        settings: Any = load_config(Path(run.path) / "run.yaml")
        paths = (
            Corpus.open(settings.corpus).paths("train") if settings.corpus else expand_paths(settings.train_data_paths)
        )
        found = [_combinations_of(path, run.tokenizer.vocabulary, categories) for path in paths]
    except (InputError, OSError, AttributeError) as error:
        logger.warning("%s: its training cells cannot be read (%s)", run.path, error)
        return None
    return np.unique(np.concatenate(found), axis=0) if found else None


def _combinations_of(path: str, vocabulary: Vocabulary, categories: Sequence[str]) -> np.ndarray:
    file = H5adFile(path)
    known = file.columns_of("obs")
    absent_n = np.full(file.shape[0], ABSENT, dtype=np.int32)
    columns = [
        vocabulary.encode(category, file.obs_column(category))[0] if category in known else absent_n
        for category in categories
    ]
    file.close()
    return np.unique(np.stack(columns, axis=1), axis=0)


def unseen_combinations(asked_nc: np.ndarray, trained_tc: np.ndarray) -> np.ndarray:
    """Return the distinct combinations that no training cell agrees with; a missing label of a cell agrees with any.

    Args:
        asked_nc: Input ids, shape (n, categories), -1 where missing.
        trained_tc: Of `training_combinations`.
    """
    distinct = np.unique(asked_nc, axis=0)
    is_seen = [((trained_tc == row) | (row == ABSENT)).all(axis=1).any() for row in distinct]
    return distinct[~np.array(is_seen, dtype=bool)]


def check_combinations(run: Run, asked_nc: np.ndarray, categories: Sequence[str]) -> None:
    """Refuse combinations of phenotypes that the run has never seen: nothing it says of them is learnt.

    Raises:
        InputError: There is one, or nobody can say.
    """
    trained_tc = training_combinations(run, categories)
    if trained_tc is None:
        raise InputError(
            f"{run.path} does not say which cells it was trained on, so nobody knows whether it has seen these "
            "combinations of phenotypes. Put its corpus back in its place, or pass --force."
        )
    unseen = unseen_combinations(asked_nc, trained_tc)
    if len(unseen):
        texts = [
            " + ".join(run.tokenizer.vocabulary.label_of(int(id_))[1] for id_ in row if id_ != ABSENT) for row in unseen
        ]
        raise InputError(
            f"no training cell is {listed(texts)}, so the model has never seen what is asked. Give fewer phenotypes "
            "with --given, leave these cells out, or pass --force."
        )


@dataclass(frozen=True)
class CellSelection:
    """Which cells are changed, which have the label anyway, and their groups.

    Args:
        groups: Names of the groups.
        group_n: Group of each cell, (n,), -1 for cells without one.
        is_changed_n: True where the label is another than the one that is set, (n,).
        has_label_n: True where it is that one, (n,).
        is_null_n: True for changed cells that the null is computed on, (n,).
    """

    groups: list[str]
    group_n: np.ndarray
    is_changed_n: np.ndarray
    has_label_n: np.ndarray
    is_null_n: np.ndarray


def choose_cells(
    dataset: IterableAnnDataset, contrast: Contrast, *, groupby: str | None, null_cells: int
) -> CellSelection:  # fmt: skip
    """Sort cells by their own label, and draw those of each group that the null is computed on.

    Raises:
        InputError: No cell has another label that the vocabulary knows.
    """
    groups, group_n = read_groups(dataset, groupby)
    own_n = dataset.shards[0].label_ids(contrast.category)
    has_label_n = (own_n == contrast.label_id) & (group_n != ABSENT)
    is_changed_n = (own_n != contrast.label_id) & (own_n != ABSENT) & (group_n != ABSENT)
    if not is_changed_n.any():
        raise InputError(
            f"no cell has another known {contrast.category} than the one that is set, so there is nothing to change. "
            "Choose another label with --set, or other cells."
        )
    draw_n = np.random.default_rng((contrast.seed, 2)).random(len(own_n))
    is_null_n = np.zeros(len(own_n), dtype=bool)
    for group in range(len(groups)):
        rows = np.flatnonzero(is_changed_n & (group_n == group))
        is_null_n[rows[np.argsort(draw_n[rows], kind="stable")[:null_cells]]] = True
    return CellSelection(groups, group_n, is_changed_n, has_label_n, is_null_n)


def _given_of(data: "AnnData | str | Path", run: Run, category: str, given: Given | None) -> dict[str, str | None]:
    """Return the other phenotypes that are in the sequence: those named, or all of the run that `obs` has."""
    if given is not None:
        others = given_labels(given)
        if category in others:
            raise InputError(f"{category!r} is set, so it cannot be given too. Remove it from --given.")
        return others
    if isinstance(data, str | Path):
        file = H5adFile(str(data))
        known = set(file.columns_of("obs"))
        file.close()
    else:
        known = set(data.obs)
    return {name: None for name in run.tokenizer.included_phenotypes if name != category and name in known}


# -- prediction ---------------------------------------------------------------------------------------------------


def _collator_of(run: Run, dataset: IterableAnnDataset, *, gene_mask_prob: float | None, seed: int) -> Any:
    """Hide genes as the run's training did, or at another rate, and no phenotype."""
    path = Path(run.path) / "run.yaml"
    trained = load_config(path) if path.exists() else None
    rates = trained.mask_rates if isinstance(trained, MlmConfig) else {}
    rates |= {"phenotype_mask_prob": 0.0, "absent_prob": 0.0}
    if gene_mask_prob is not None:
        rates["gene_mask_prob"] = gene_mask_prob
    if rates.get("gene_mask_prob") == 0:
        raise InputError(f"{run.path} was trained without hiding genes, so it cannot predict them. Give another run.")
    return DataCollatorForPhenotypicMLM(dataset.tokenizer, packed=True, seed=seed, **rates)  # type: ignore[arg-type]


def sum_changes(
    run: Run, dataset: IterableAnnDataset, contrast: Contrast, cells: CellSelection, *, parts: CellResults,
    gene_mask_prob: float | None = None, batch_tokens: int = CounterfactualConfig.batch_tokens,
) -> Sums:  # fmt: skip
    """Stream the cells of all ranks into sums; only rank 0 gets those of all."""
    tokenizer = dataset.tokenizer
    predictor = GenePredictor(run, contrast, tokenizer=tokenizer)
    collator = _collator_of(run, dataset, gene_mask_prob=gene_mask_prob, seed=contrast.seed)
    sums = Sums.zeros(
        num_groups=len(cells.groups), num_genes=len(tokenizer.panel), num_null=contrast.num_null
    )  # fmt: skip
    values_gb, num_empty = tokenizer.bin_edges.values(), 0
    for whole in stream_batches(dataset, text="counterfactual", ranks=parts.ranks, most_tokens=batch_tokens):
        is_used_n = cells.is_changed_n[whole.cells_n] | cells.has_label_n[whole.cells_n]
        has_genes_n = has_genes(whole, tokenizer)
        num_empty += int((is_used_n & ~has_genes_n).sum())
        block = whole.take(np.flatnonzero(is_used_n & has_genes_n))
        if not len(block):
            continue
        group_n, has_label_n = cells.group_n[block.cells_n], cells.has_label_n[block.cells_n]
        sums.add_cells(block, group_n=group_n, has_label_n=has_label_n, values_gb=values_gb, tokenizer=tokenizer)
        rows = np.flatnonzero(~has_label_n)
        if len(rows):
            is_null_n = cells.is_null_n[block.cells_n[rows]]
            add_block(sums, predictor, collator, block.take(rows), group_n=group_n[rows], is_null_n=is_null_n)
    *arrays, empty = parts.sum_over_ranks([*sums.arrays().values(), np.array(num_empty)])
    if empty and parts.ranks.is_main:
        logger.warning("%d cells express no gene of the panel and are left out", empty)
    return Sums(*arrays)


# -- the verb -----------------------------------------------------------------------------------------------------


def contrast_of(run: Run, wanted: Mapping[str, str], *, num_passes: int, num_null: int, seed: int) -> Contrast:
    """Check what is to be set.

    Raises:
        InputError: The run is a classifier, not one phenotype is set, or it or its label is unknown.
    """
    run.require_mlm("genes")
    if len(wanted) != 1:
        raise InputError(f"one phenotype is changed at a time, but {listed(wanted) or 'none'} are set. Set one.")
    [(category, label)] = wanted.items()
    label_id = run.tokenizer.vocabulary.label_id(category, label) if category in run.tokenizer.phenotypes else ABSENT
    run.tokenizer.vocabulary.check_category(category)
    if label_id == ABSENT:
        hint = did_you_mean(label, run.tokenizer.phenotypes[category])
        raise InputError(f"{category}={label} is not in the run's vocabulary. {hint} Change --set.")
    return Contrast(category, label_id, num_passes, num_null, seed)


@dataclass(frozen=True)
class CounterfactualTask:
    """A counterfactual that has been checked: ready to be predicted."""

    run: Run
    contrast: Contrast
    given: dict[str, str | None]
    dataset: IterableAnnDataset
    cells: CellSelection


def _question(
    data: Any, run: Run, contrast: Contrast, *, given: Given | None, groupby: str | None, null_cells: int, force: bool,
    ranks: Ranks = ALONE, **reading: Any,
) -> CounterfactualTask:  # fmt: skip
    others = _given_of(data, run, contrast.category, given)
    dataset = open_cells(data, run, {contrast.category: None, **others}, ranks=ranks, **reading)
    cells = choose_cells(dataset, contrast, groupby=groupby, null_cells=null_cells)
    if not force:
        labels = [dataset.shards[0].label_ids(name)[cells.is_changed_n] for name in others]
        set_n = np.full(int(cells.is_changed_n.sum()), contrast.label_id, dtype=np.int32)
        check_combinations(run, np.stack([set_n, *labels], axis=1), [contrast.category, *others])
    return CounterfactualTask(run, contrast, others, dataset, cells)


def _answer(
    question: CounterfactualTask, parts: CellResults, *, gene_mask_prob: float | None, batch_tokens: int
) -> pd.DataFrame:
    run = question.run
    sums = sum_changes(
        run, question.dataset, question.contrast, question.cells, parts=parts, gene_mask_prob=gene_mask_prob,
        batch_tokens=batch_tokens,
    )  # fmt: skip
    return change_table(sums, run.tokenizer.panel, groups=question.cells.groups)


def counterfactual(
    adata: "AnnData | str | Path",
    model: str | Path | Run,
    *,
    set: Mapping[str, str],
    given: Given | None = None,
    groupby: str | None = None,
    num_passes: int = 4,
    num_null: int = 20,
    null_cells: int = 256,
    gene_mask_prob: float | None = None,
    force: bool = False,
    seed: int = 0,
    device: str = "auto",
    batch_tokens: int = CounterfactualConfig.batch_tokens,
    **reading: Any,
) -> pd.DataFrame:
    """Return how the model expects each gene to change when one phenotype of the cells is set to a label.

    Args:
        adata: Cells (or the path of an h5ad file) with that phenotype in `obs`; those that have the label anyway serve
            for `observed`.
        model: Run folder of mlm, or a loaded run.
        set: One phenotype and its label, such as `{"disease": "normal"}`.
        given: Other phenotypes in the sequence -> label of all cells, or None to read `obs`; None in place of the
            mapping gives all of the run that `obs` has.
        groupby: Column of `obs` whose groups get changes of their own.
        num_passes: Masks per cell.
        num_null: Meaningless changes that the null is made of; 0 leaves t, p and q out.
        null_cells: Cells of each group that the null is computed on.
        gene_mask_prob: Share of genes that are hidden; None takes the run's own. The more is hidden, the more the
            model relies on the label.
        force: True asks about combinations of phenotypes that the run has never seen.
        seed: Of masks and null.
        device, batch_tokens, reading: As for `embed`.

    Returns:
        One row per gene and group, by falling change. `change` is the expected value (log1p counts per 10,000) with the
        label minus that with the cell's own, averaged over cells; `change_bins` the same in bins; `standard_error` that
        of `change` over cells and masks; `null_mean`, `null_sd`, `t`, `p_value`, `q_value` see `changes.against_null`;
        `observed` is the difference between cells that have the label and these cells; `change_expressed`,
        `change_unexpressed`, `share_expressed` tell the two strata apart; `n_cells`. Cells that express no gene of the
        panel are left out.

    Raises:
        InputError: See `contrast_of`, `choose_cells` and `check_combinations`.

    Example:
        >>> import perturbgene as pg
        >>> table = pg.counterfactual("cells.h5ad", "runs/mlm", set={"cell_type": "B cell"}, given={})
        >>> table["change"].is_monotonic_decreasing, bool(table["q_value"].between(0, 1).all())
        (True, True)
    """
    run = load_run(model, device=device)
    contrast = contrast_of(run, set, num_passes=num_passes, num_null=num_null, seed=seed)
    question = _question(
        adata, run, contrast, given=given, groupby=groupby, null_cells=null_cells, force=force, **reading
    )
    parts = CellResults(question.dataset.num_cells)
    return _answer(question, parts, gene_mask_prob=gene_mask_prob, batch_tokens=batch_tokens)


def run_counterfactual(config: "CounterfactualConfig") -> str | None:
    """Run the `counterfactual` verb: an h5ad file whose obs is the table, the same as CSV, and a figure."""
    ranks = Ranks.join(config.device)
    source, target = check_target(config.input, config.output, overwrite=config.overwrite, verb="counterfactual")
    run = load_run(config.run, device=ranks.device(config.device))
    contrast = contrast_of(
        run, config.set_label, num_passes=config.num_passes, num_null=config.num_null, seed=config.seed
    )  # fmt: skip
    question = _question(
        source, run, contrast, given=config.given_labels, groupby=config.groupby, null_cells=config.null_cells,
        force=config.force, ranks=ranks, **reading_options(config),
    )  # fmt: skip
    with cell_results(target, num_cells=question.dataset.num_cells, ranks=ranks) as parts:
        rate = config.gene_mask_prob
        table = _answer(question, parts, gene_mask_prob=rate, batch_tokens=config.batch_tokens)
    return _write(table, question, config, target) if ranks.is_main else None


def _write(table: pd.DataFrame, question: CounterfactualTask, config: "CounterfactualConfig", target: Path) -> str:
    import anndata

    names = ("groupby", "num_passes", "num_null", "null_cells", "gene_mask_prob", "force", "seed")
    asked = {"verb": config.verb, "set": config.set, "given": question.given}
    asked |= {name: getattr(config, name) for name in names}
    facts = provenance(question.run, asked, coverage=question.dataset.coverage)
    rows = table.assign(**{name: pd.Categorical(table[name]) for name in ("group", "gene", "symbol")})
    rows.index = pd.Index(table["gene"] + "|" + table["group"])
    csv, png = target.with_suffix(".csv"), target.with_suffix(".png")
    try:
        with whole_file(csv) as temporary:
            table.to_csv(temporary, index=False)
        save_figure(changes_figure(table, title=f"set to {config.set}", value="change of the expected value"), png)
        with whole_file(target) as temporary:  # last: once it is there, so are the others
            anndata.AnnData(obs=rows, uns={"perturbgene": facts}).write_h5ad(temporary)
    except OSError as error:
        raise unwritable(target, error) from error
    return "\n".join([*_summary(table, question, config), f"written to {target}, {csv} and {png}"])


def _summary(table: pd.DataFrame, question: CounterfactualTask, config: "CounterfactualConfig") -> list[str]:
    """Say for the first groups what rises, what falls and how it compares to what is observed."""
    cells = question.cells
    num_changed = int(table["n_cells"].max()) if len(table) else 0
    lines = [f"{num_changed:,} cells set to {config.set}; {int(cells.has_label_n.sum()):,} have it"]
    for group, part in list(table.groupby("group", sort=False))[:6]:
        up, down = ", ".join(part["symbol"].head(5)), ", ".join(part["symbol"].tail(5)[::-1])
        hits = int((part["q_value"] < 0.05).sum())
        lines.append(f"{group}: {hits:,} of {len(part):,} genes with q < 0.05; up {up}; down {down}")
        known = part[["change", "observed"]].dropna()
        if len(known) > 2:
            rank = stats.spearmanr(known["change"], known["observed"]).statistic
            lines.append(f"  Spearman correlation with the observed difference {rank:.2f} over {len(known):,} genes")
    return lines
