"""Which genes a model reads a label from: the verb `attribute`, its table of marker genes and a check of faithfulness.

Owns adding up each gene's support for the label that a cell is given, and deletion curves; leaves the gradient pass to
`screening` and parts to `effect_parts`. A gene's support is minus what its removal does to the label's log-odds, to
first order. Letters: n cells, l tokens, k labels, g genes, s steps of a deletion curve.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from perturbgene.data_utils.data_collators import pack
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError, listed
from perturbgene.eval_utils import inference_mode, model_device, to_device
from perturbgene.inference.asking import Given, given_labels
from perturbgene.inference.calibration import weights_hash
from perturbgene.inference.run import Run, load_run, provenance
from perturbgene.inference.streaming import Ranks, check_target, has_genes, reading_options
from perturbgene.perturbation.cells_in_parts import ALONE, GroupedCells, PartFolder, run_stage, write_table
from perturbgene.perturbation.perturb import PART_CELLS, file_identity, readout_of
from perturbgene.perturbation.readouts import LabelReadout, in_budget, sequences, token_budget
from perturbgene.perturbation.screening import screen_removals
from perturbgene.perturbation.statistics import Tally
from perturbgene.plots import deletion_figure, save_figure

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbgene.configs import AttributeConfig

logger = logging.getLogger(__name__)

#: Shares of a cell's genes that are removed along a deletion curve.
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)


def predicted_labels(run: Run, asked: TokenBlock, readout: LabelReadout, *, budget: int) -> np.ndarray:
    """Return the index of each cell's most probable label, int64 of shape (n,)."""
    return np.concatenate([logits.argmax(dim=1).cpu().numpy() for logits in _logits(run, asked, readout, budget)])


def log_odds(run: Run, asked: TokenBlock, readout: LabelReadout, towards_n: np.ndarray, *, budget: int) -> np.ndarray:
    """Return the log-odds of one label of each cell, in nats, float32 of shape (n,)."""
    values, start = [], 0
    for logits_nk in _logits(run, asked, readout, budget):
        wanted = torch.from_numpy(towards_n[start : start + len(logits_nk)]).to(logits_nk.device)
        values.append(readout.log_odds(logits_nk, towards_n=wanted).cpu().numpy())
        start += len(logits_nk)
    return np.concatenate(values)


def _logits(run: Run, asked: TokenBlock, readout: LabelReadout, budget: int) -> list[torch.Tensor]:
    found = []
    for piece in in_budget(np.diff(asked.offsets_n1), budget=budget):
        batch = to_device(pack(asked.take(np.arange(piece.start, piece.stop))), model_device(run.model))
        with inference_mode(run.model):
            found.append(readout.logits(run.model, batch))
    return found


@dataclass(frozen=True)
class Attributing:
    """A pass over the cells that adds up support: entry label * g + gene, and behind all of these one for each label.

    The last k entries count the cells of each label, without those that express no gene of the panel.
    """

    run: Run
    readout: LabelReadout
    budget: int
    name: str = "attributed"

    @property
    def num_effects(self) -> int:
        """k g + k."""
        return self.readout.num_labels * (len(self.run.tokenizer.panel) + 1)

    def effects(self, block: TokenBlock) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return cell, entry and support of every gene token, and a one for every cell that has genes."""
        asked = sequences(block, self.run.tokenizer, self.readout)
        label_n, support_l = support(self.run, asked, self.readout, budget=self.budget)
        num_genes, first = len(self.run.tokenizer.panel), self.run.tokenizer.first_gene_type
        is_gene_l = np.isfinite(support_l)
        cell_m = np.repeat(np.arange(len(asked)), np.diff(asked.offsets_n1))[is_gene_l]
        entry_m = label_n[cell_m] * num_genes + asked.token_type_ids_l[is_gene_l] - first
        # A cell without genes supports nothing, and is none of its label's cells.
        told = np.flatnonzero(has_genes(asked, self.run.tokenizer))
        return (
            np.concatenate([cell_m, told]),
            np.concatenate([entry_m, self.readout.num_labels * num_genes + label_n[told]]),
            np.concatenate([support_l[is_gene_l], np.ones(len(told), dtype=np.float32)]),
        )


def support(run: Run, asked: TokenBlock, readout: LabelReadout, *, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each cell's most probable label, (n,), and each gene token's support of it in nats, (l,), else NaN."""
    label_n = predicted_labels(run, asked, readout, budget=budget)
    return label_n, -screen_removals(run, asked, readout, towards_n=label_n, budget=budget)


def marker_table(tally: Tally, run: Run, labels: list[str]) -> pd.DataFrame:
    """Return each label's genes, most supporting first.

    Returns:
        `label`, `rank`, `gene`, `gene_id`, `support` (mean over all cells of the label, 0 where the gene is not
        expressed; nats), `support_where_expressed`, `share_expressed`, `num_cells`.
    """
    num_genes, panel = len(run.tokenizer.panel), run.tokenizer.panel
    sums_e3 = sum(tally.sums.values(), np.zeros((tally.num_perturbations, 3)))
    cells_k = sums_e3[len(labels) * num_genes :, 0]
    tables = []
    for index, label in enumerate(labels):
        counts_g, sums_g = sums_e3[index * num_genes : (index + 1) * num_genes, :2].T
        rows = np.flatnonzero(counts_g)
        rows = rows[np.argsort(-sums_g[rows], kind="stable")]
        tables.append(
            pd.DataFrame(
                {
                    "label": label,
                    "rank": np.arange(1, len(rows) + 1),
                    "gene": [panel.display_name(int(row)) for row in rows],
                    "gene_id": [panel.genes[row] for row in rows],
                    "support": sums_g[rows] / max(cells_k[index], 1),
                    "support_where_expressed": sums_g[rows] / counts_g[rows],
                    "share_expressed": counts_g[rows] / max(cells_k[index], 1),
                    "num_cells": int(cells_k[index]),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


# -- faithfulness ---------------------------------------------------------------------------------------------------


def deletion_curves(
    run: Run, cells: GroupedCells, readout: LabelReadout, *, num_cells: int, budget: int
) -> pd.DataFrame:
    """Remove genes step by step, the most supporting first and in random order, and follow the label's log-odds.

    Args:
        run, cells, readout: What is asked of whom.
        num_cells: So many cells, spread evenly over the file; those without genes are left out.
        budget: Tokens that run at once.

    Returns:
        `share_removed`, and the mean log-odds under `attributed` and `random` order, a row per step; `attrs["cells"]`
        is how many cells it is the mean of.
    """
    rows = np.unique(np.linspace(0, len(cells) - 1, min(num_cells, len(cells))).astype(np.int64))
    told = _with_genes(cells.read(rows), run)
    if not len(told):  # few cells have any
        told = next(block for block in (_with_genes(one, run) for one in cells.blocks(0, len(cells))) if len(block))
    asked = sequences(told.take(np.arange(min(num_cells, len(told)))), run.tokenizer, readout)
    label_n, support_l = support(run, asked, readout, budget=budget)
    random_l = np.random.default_rng(0).random(len(support_l))
    scores = {"attributed": support_l, "random": np.where(np.isfinite(support_l), random_l, np.nan)}
    curves: dict[str, Any] = {"share_removed": SHARES}
    for name, score_l in scores.items():
        curves[name] = [
            float(log_odds(run, _without_top(asked, score_l, share), readout, label_n, budget=budget).mean())
            for share in SHARES
        ]
    table = pd.DataFrame(curves)
    table.attrs["cells"] = len(asked)
    return table


def _with_genes(block: TokenBlock, run: Run) -> TokenBlock:
    return block.take(np.flatnonzero(has_genes(block, run.tokenizer)))


def _without_top(block: TokenBlock, score_l: np.ndarray, share: float) -> TokenBlock:
    """Drop the share of each cell's genes with the highest scores; tokens without a score stay."""
    is_kept_l = np.ones(len(score_l), dtype=bool)
    for start, stop in zip(block.offsets_n1[:-1], block.offsets_n1[1:], strict=True):
        genes = start + np.flatnonzero(np.isfinite(score_l[start:stop]))
        count = int(np.ceil(share * len(genes)))
        is_kept_l[genes[np.argsort(-score_l[genes], kind="stable")[:count]]] = False
    offsets = np.concatenate([[0], np.cumsum(is_kept_l)])[block.offsets_n1]
    return TokenBlock(block.input_ids_l[is_kept_l], block.token_type_ids_l[is_kept_l], offsets, block.cells_n)


def areas(curves: pd.DataFrame) -> dict[str, float]:
    """Return the area under each deletion curve, in nats; lower means that what was removed first mattered more."""
    return {name: float(np.trapezoid(curves[name], curves["share_removed"])) for name in ("attributed", "random")}


# -- the verb -------------------------------------------------------------------------------------------------------


def _readout(run: Run, ask: str, given: Mapping[str, str | None]) -> tuple[LabelReadout, list[str]]:
    if run.is_classifier:
        labels = run.class_labels
    else:
        run.tokenizer.vocabulary.check_category(ask)
        labels = list(run.tokenizer.phenotypes[ask])
    readout = readout_of(run, towards=f"{ask}={labels[0]}", away=None, given=given, embedding="cls")
    assert isinstance(readout, LabelReadout)
    return readout, labels


def attribute(
    adata: "AnnData | str | Path",
    model: str | Path | Run,
    *,
    ask: str,
    given: Given | None = None,
    num_check_cells: int = 50,
    device: str = "auto",
    batch_tokens: int | None = None,
    **reading: Any,
) -> pd.DataFrame:
    """Return the genes from which the model reads a phenotype, by predicted label.

    Args:
        adata: Cells, or the path of an h5ad file; no label column is needed.
        model: Run folder, or a loaded run.
        ask: The phenotype.
        given: Phenotype -> label of all cells, or None to read each cell's own from `obs`.
        num_check_cells: Cells of the deletion curves.
        device, batch_tokens: How the model runs.
        reading: `batch_size`, `layer`, `gene_id_column`, `min_gene_coverage` of `IterableAnnDataset`.

    Returns:
        See `marker_table`; `attrs["deletion"]` holds the curves and `attrs["areas"]` the areas under them.

    Example:
        >>> import perturbgene as pg
        >>> table = pg.attribute("cells.h5ad", "runs/mlm", ask="cell_type")
        >>> table.query("rank == 1")["label"].tolist()
        ['B cell', 'NK cell', 'monocyte']
        >>> table.attrs["areas"]["attributed"] < table.attrs["areas"]["random"]
        True
    """
    run = model if isinstance(model, Run) else load_run(model, device=device)
    given = given_labels(given)
    readout, labels = _readout(run, ask, given)
    reading = {"batch_size": 256, **reading}
    cells = GroupedCells.open(adata, run, readout, given=given, donor=None, groupby=None, **reading)
    budget = token_budget(run.model) if batch_tokens is None else batch_tokens
    return _attributed(run, cells, readout, labels, num_check_cells=num_check_cells, budget=budget)


def _attributed(
    run: Run, cells: GroupedCells, readout: LabelReadout, labels: list[str], *, num_check_cells: int, budget: int,
    part_cells: int = PART_CELLS, parts: PartFolder | None = None, ranks: Ranks = ALONE,
) -> pd.DataFrame:  # fmt: skip
    tally = run_stage(Attributing(run, readout, budget), cells, part_cells=part_cells, parts=parts, ranks=ranks)
    table = marker_table(tally, run, labels)
    num_told = int(table.groupby("label")["num_cells"].first().sum())
    if not num_told:
        raise InputError(f"no cell of {listed(cells.dataset.paths)} expresses a gene of the panel. Give other cells.")
    if num_told < len(cells):
        logger.warning(
            "%d of %d cells express no gene of the panel and are left out", len(cells) - num_told, len(cells)
        )
    curves = deletion_curves(run, cells, readout, num_cells=num_check_cells, budget=budget)
    table.attrs["deletion"] = curves.to_dict(orient="list")
    table.attrs["areas"], table.attrs["num_check_cells"] = areas(curves), curves.attrs["cells"]
    return table


def run_attribute(config: "AttributeConfig") -> str | None:
    """Run the `attribute` verb: a table of marker genes, and the deletion curves as a picture."""
    path, target = check_target(config.input, config.output, overwrite=config.overwrite, verb="attribute")
    if target.suffix != ".csv":
        raise InputError(f"output is {str(target)!r}, but the table is a .csv. Change --output.")
    ranks = Ranks.join(config.device)
    run = load_run(config.run, device=ranks.device(config.device))
    readout, labels = _readout(run, config.ask, config.given_labels)
    cells = GroupedCells.open(
        path, run, readout, given=config.given_labels, donor=None, groupby=None, **reading_options(config)
    )  # fmt: skip
    facts = {**config.to_dict(), "source": file_identity(path), "weights": weights_hash(run.path), "readout": readout}
    parts = PartFolder.beside(target, facts)
    table = _attributed(
        run, cells, readout, labels, num_check_cells=config.num_check_cells, budget=config.batch_tokens,
        part_cells=config.part_cells, parts=parts, ranks=ranks,
    )  # fmt: skip
    if not ranks.is_main:
        return None
    write_table(table, target)
    title = f"genes removed from {table.attrs['num_check_cells']:,} cells, {config.ask} asked"
    save_figure(deletion_figure(pd.DataFrame(table.attrs["deletion"]), title=title), target.with_suffix(".png"))
    question = {name: value for name, value in config.to_dict().items() if name not in ("run", "output", "overwrite")}
    facts = {**provenance(run, question, coverage=cells.dataset.coverage), **table.attrs}
    temporary = target.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, target.with_suffix(".json"))
    parts.remove()
    return _report(table, target)


def _report(table: pd.DataFrame, target: Path) -> str:
    """Say which genes come first for each label, and whether removing them matters."""
    lines = [f"{int(table.groupby('label')['num_cells'].first().sum()):,} cells, written to {target}"]
    for label, genes in table[table["rank"] <= 8].groupby("label", sort=False):
        lines.append(f"{label} ({genes['num_cells'].iloc[0]:,} cells): {', '.join(genes['gene'])}")
    found = table.attrs["areas"]
    lines.append(
        f"area under the deletion curve: {found['attributed']:.3f} nats with the most supporting genes first, "
        f"{found['random']:.3f} in random order (lower is more faithful)"
    )
    return "\n".join(lines)
