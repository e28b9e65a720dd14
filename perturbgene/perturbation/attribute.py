"""Which genes a model reads a label from: the verb `attribute`, its table of marker genes and a check of faithfulness.

Owns each gene's support for the label that a cell is predicted to have, and deletion curves; leaves the gradient pass
to `screening`. A gene's support is minus what its removal does to the label's log-odds, to first order. Letters: n
cells, l tokens, k labels, g genes, m effects.
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from perturbgene.cli.verbs import AttributeConfig
from perturbgene.data_utils.opening import FileList
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError, listed
from perturbgene.eval_utils import inference_mode
from perturbgene.files import check_new
from perturbgene.inference.run import Run, load_run, provenance
from perturbgene.inference.streaming import (
    ALONE,
    GeneTokens,
    Given,
    Ranks,
    claimed_output,
    given_labels,
    reading_options,
)
from perturbgene.perturbation.cells import GroupedCells, PartStore, sum_effects
from perturbgene.perturbation.readouts import LabelReadout, batches, label_readout, sequences
from perturbgene.perturbation.screening import screen_removals
from perturbgene.plots import deletion_figure

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

#: Settings that are no part of the question.
NOT_ASKED = ("run", "output", "overwrite", "part")
#: Shares of a cell's genes that are removed along a deletion curve.
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)


# -- support ----------------------------------------------------------------------------------------------------------


def label_logits(run: Run, cells: TokenBlock, readout: LabelReadout, *, budget: int | None = None) -> Tensor:
    """Return the logits of each cell's labels, on the CPU, (n, k)."""
    with inference_mode(run.model):
        found = [readout.logits(run.model, batch).cpu() for _, batch in batches(run.model, cells, budget=budget)]
    return torch.cat(found)


def support(
    run: Run, cells: TokenBlock, readout: LabelReadout, *, budget: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return each cell's most probable label, (n,), and each gene token's support of it in nats, (l,), else NaN."""
    label_n = label_logits(run, cells, readout, budget=budget).argmax(dim=1).numpy()
    return label_n, -screen_removals(run, cells, readout, towards_n=label_n, budget=budget)


def support_by_label(
    block: TokenBlock, *, run: Run, readout: LabelReadout, budget: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return cell, entry and value of everything that is added up, each of shape (m,).

    Entry `label * g + gene` takes a gene's support of a label; k further entries take a one for every cell of a label
    that expresses a gene of the panel.
    """
    cells = sequences(block, run.tokenizer, readout)
    label_n, support_l = support(run, cells, readout, budget=budget)
    tokens, size = GeneTokens.of(cells, run.tokenizer), len(run.tokenizer.panel)
    counted = np.flatnonzero(run.tokenizer.num_genes(cells))
    return (
        np.concatenate([tokens.cell_m, counted]),
        np.concatenate([label_n[tokens.cell_m] * size + tokens.gene_m, readout.num_labels * size + label_n[counted]]),
        np.concatenate([support_l[tokens.position_m], np.ones(len(counted), dtype=np.float32)]),
    )


def marker_table(sums_uq2: np.ndarray, run: Run, labels: list[str]) -> pd.DataFrame:
    """Return each label's genes, most supporting first.

    Returns:
        `label`, `rank`, `gene`, `gene_id`, `support` (mean over all cells of the label, 0 where the gene is not
        expressed; nats), `support_where_expressed`, `share_expressed`, `num_cells`.
    """
    panel, size = run.tokenizer.panel, len(run.tokenizer.panel)
    sums_q2 = sums_uq2.sum(axis=0)
    tables = []
    for index, label in enumerate(labels):
        counts_g, sums_g = sums_q2[index * size : (index + 1) * size].T
        num_cells = sums_q2[len(labels) * size + index, 0]
        rows = np.flatnonzero(counts_g)
        rows = rows[np.argsort(-sums_g[rows], kind="stable")]
        columns = {
            "label": label,
            "rank": np.arange(1, len(rows) + 1),
            "gene": [panel.display_name(int(row)) for row in rows],
            "gene_id": [panel.genes[row] for row in rows],
            "support": sums_g[rows] / max(num_cells, 1),
            "support_where_expressed": sums_g[rows] / counts_g[rows],
            "share_expressed": counts_g[rows] / max(num_cells, 1),
            "num_cells": int(num_cells),
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


# -- faithfulness -----------------------------------------------------------------------------------------------------


def deletion_curves(
    run: Run, cells: GroupedCells, readout: LabelReadout, *, num_cells: int, budget: int | None = None
) -> pd.DataFrame:
    """Remove genes step by step, the most supporting first or in random order, and follow the label's log-odds.

    `num_cells` cells are taken, spread evenly over the file; those without genes are left out.

    Returns:
        `share_removed`, and the mean log-odds in `attributed` and `random` order, a row per step; `attrs["cells"]` is
        the number of cells.
    """

    def with_genes(block: TokenBlock) -> TokenBlock:
        return block.take(np.flatnonzero(run.tokenizer.num_genes(block)))

    rows = np.unique(np.linspace(0, len(cells) - 1, min(num_cells, len(cells))).astype(np.int64))
    block = with_genes(cells.read(rows))
    if not len(block):  # few cells have any
        block = next(some for some in map(with_genes, cells.blocks(0, len(cells))) if len(some))
    asked = sequences(block.take(np.arange(min(num_cells, len(block)))), run.tokenizer, readout)
    label_n, support_l = support(run, asked, readout, budget=budget)
    random_l = np.random.default_rng(0).random(len(support_l))
    curves: dict[str, Any] = {"share_removed": SHARES}
    scores = {"attributed": support_l, "random": np.where(np.isfinite(support_l), random_l, np.nan)}
    for name, score_l in scores.items():
        curves[name] = []
        for share in SHARES:
            logits_nk = label_logits(run, _without_top(asked, score_l, share), readout, budget=budget)
            curves[name].append(float(readout.log_odds(logits_nk, towards_n=torch.from_numpy(label_n)).mean()))
    table = pd.DataFrame(curves)
    table.attrs["cells"] = len(asked)
    return table


def _without_top(block: TokenBlock, score_l: np.ndarray, share: float) -> TokenBlock:
    """Drop the share of each cell's genes with the highest scores; tokens without a score stay."""
    is_kept_l = np.ones(len(score_l), dtype=bool)
    for start, stop in zip(block.offsets_n1[:-1], block.offsets_n1[1:], strict=True):
        genes = start + np.flatnonzero(np.isfinite(score_l[start:stop]))
        count = int(np.ceil(share * len(genes)))
        is_kept_l[genes[np.argsort(-score_l[genes], kind="stable")[:count]]] = False
    offsets = np.concatenate([[0], np.cumsum(is_kept_l)])[block.offsets_n1]
    return TokenBlock(block.input_ids_l[is_kept_l], block.token_type_ids_l[is_kept_l], offsets, block.cells_n)


# -- the verb ---------------------------------------------------------------------------------------------------------


def attribute(
    adata: "AnnData | str | Path",
    model: str | Path | Run,
    *,
    ask: str,
    given: Given | None = None,
    num_check_cells: int = AttributeConfig.num_check_cells,
    device: str = AttributeConfig.device,
    batch_tokens: int | None = AttributeConfig.batch_tokens,
    **reading: Any,
) -> pd.DataFrame:
    """Return the genes from which the model reads a phenotype, by predicted label.

    Args:
        adata: Cells, or the path of an h5ad file; no label column is needed.
        model: Run folder, or a loaded run.
        ask: The phenotype.
        given: Phenotype -> label of all cells, or None to read each cell's own from `obs`.
        num_check_cells: Number of cells of the deletion curves.
        device, batch_tokens: How the model runs.
        reading: `where` (which cells) and how they are read, as for `perturb`.

    Returns:
        See `marker_table`; `attrs["deletion"]` holds the curves and `attrs["areas"]` the areas under them, in nats.

    Example:
        >>> import perturbgene as pg
        >>> table = pg.attribute("cells.h5ad", "runs/mlm", ask="cell_type")
        >>> table.query("rank == 1")["label"].tolist()
        ['B cell', 'NK cell', 'monocyte']
        >>> table.attrs["areas"]["attributed"] < table.attrs["areas"]["random"]
        True
    """
    config = AttributeConfig(
        run="loaded", input="in memory", output="returned.csv", ask=ask, num_check_cells=num_check_cells, device=device,
        batch_tokens=batch_tokens, **reading,
    )  # fmt: skip
    run, given = load_run(model, device=device), given_labels(given)
    readout, labels = label_question(run, ask, given)
    cells = GroupedCells.open(adata, run, readout, given=given, **reading_options(config))
    table = _attribute(run, cells, readout, labels, config)
    assert table is not None  # only a job that computes a part has none
    return table


def run_attribute(config: AttributeConfig) -> str | None:
    """Run the `attribute` verb: a table of marker genes, the deletion curves as a picture, and a record."""
    ranks = Ranks.join(config.device)
    with claimed_output(config, ranks) as (path, target):
        check_new(target, target.with_suffix(".png"), target.with_suffix(".json"), overwrite=config.overwrite)
        run, settings = load_run(config.run, device=ranks.device(config.device)), config.to_dict()
        readout, labels = label_question(run, config.ask, config.given_labels)
        cells = GroupedCells.open(FileList([path]), run, readout, given=config.given_labels, **reading_options(config))
        store = PartStore.open(config, source=path, run=run, readout=readout, num_cells=len(cells), ranks=ranks)
        table = _attribute(run, cells, readout, labels, config, store=store, ranks=ranks)
        if not ranks.is_main or table is None:
            return store.describe() if ranks.is_main else None
        title = f"genes removed from {table.attrs['num_check_cells']:,} cells, {config.ask} asked"
        question = {name: value for name, value in settings.items() if name not in NOT_ASKED}
        facts = provenance(run, question, coverage=cells.dataset.coverage)
        figure = deletion_figure(pd.DataFrame(table.attrs["deletion"]), title=title)
        store.finish(target, table, figure, {**facts, **table.attrs})
        return _report(table, target)


def label_question(run: Run, ask: str, given: Mapping[str, str | None]) -> tuple[LabelReadout, list[str]]:
    """Return the readout of a phenotype, and its labels."""
    if not run.is_classifier:
        run.tokenizer.vocabulary.check_category(ask)
    labels = run.class_labels if run.is_classifier else list(run.tokenizer.phenotypes[ask])
    return label_readout(run, towards=f"{ask}={labels[0]}", given=tuple(given)), labels


def _attribute(
    run: Run, cells: GroupedCells, readout: LabelReadout, labels: list[str], config: AttributeConfig, *,
    store: PartStore | None = None, ranks: Ranks = ALONE,
) -> pd.DataFrame | None:  # fmt: skip
    """Return the table of markers with its check; None to a job that computes one of several pieces."""
    budget, num_entries = config.batch_tokens, len(labels) * (len(run.tokenizer.panel) + 1)
    effects_of = partial(support_by_label, run=run, readout=readout, budget=budget)
    sums = sum_effects("attributed", effects_of, cells, num_entries, store=store, ranks=ranks)
    if sums is None or (store is not None and store.own):
        return None
    table = marker_table(sums, run, labels)
    num_with_genes = int(table.groupby("label")["num_cells"].first().sum())
    if not num_with_genes:
        raise InputError(f"no cell of {listed(cells.dataset.paths)} expresses a gene of the panel. Give other cells.")
    if num_empty := len(cells) - num_with_genes:
        logger.warning("%d of %d cells express no gene of the panel and are left out", num_empty, len(cells))
    curves = deletion_curves(run, cells, readout, num_cells=config.num_check_cells, budget=budget)
    names = ("attributed", "random")
    areas = {name: float(np.trapezoid(curves[name], curves["share_removed"])) for name in names}
    table.attrs |= {"deletion": curves.to_dict(orient="list"), "areas": areas, "num_check_cells": curves.attrs["cells"]}
    return table


def _report(table: pd.DataFrame, target: Path) -> str:
    """Say which genes come first for each label, and whether removing them matters."""
    lines = [f"{int(table.groupby('label')['num_cells'].first().sum()):,} cells, written to {target}"]
    for label, genes in table[table["rank"] <= 8].groupby("label", sort=False):
        lines.append(f"{label} ({genes['num_cells'].iloc[0]:,} cells): {', '.join(genes['gene'])}")
    areas = table.attrs["areas"]
    lines.append(
        f"area under the deletion curve: {areas['attributed']:.3f} nats if the most supporting genes go first, "
        f"{areas['random']:.3f} in random order (the first should be lower)"
    )
    return "\n".join(lines)
