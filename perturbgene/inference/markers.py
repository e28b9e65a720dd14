"""Markers: the genes whose votes tell the cells of a label from the others, with their expression in both.

Owns what a vote adds to a label's logit; leaves solving votes to `training.votes`. `attribute` also counts what the
transformer adds, cell by cell, and takes longer. Letters: n cells, g genes, k labels.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from perturbgene.eval_utils import IntArray
from perturbgene.inference.run import Run
from perturbgene.training.votes import direct_path

#: Most genes of a label, and fewest cells of which it needs to have some.
MOST_MARKERS, LEAST_CELLS = 10, 5


def support_of(votes_gk: np.ndarray, expression_ng: sparse.csr_matrix, label_n: IntArray, label: int) -> pd.DataFrame:
    """Return what each gene adds to the logit of a label, more in cells of the label than in others.

    A vote counts relative to its mean over the labels, since what all labels get changes no probability. The sum over
    all genes is how much the mean vote for the label differs between its cells and the others.

    Args:
        votes_gk: Votes of genes for labels.
        expression_ng: Log1p counts per 10,000.
        label_n: Label of each cell.
        label: One that some but not all cells have.

    Returns:
        Row per gene: `support` in nats, and `mean_in` and `mean_out`, the mean expression in cells of the label and in
        all others.

    Example:
        >>> cells = sparse.csr_matrix([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0]])
        >>> support_of(np.array([[1.0, -1.0], [0.0, 4.0]]), cells, np.array([0, 1, 1]), 0).to_dict("list")
        {'support': [2.0, 2.0], 'mean_in': [2.0, 1.0], 'mean_out': [0.0, 2.0]}
    """
    is_in_n = label_n == label
    mean_in_g, mean_out_g = (np.asarray(expression_ng[rows].mean(axis=0)).ravel() for rows in (is_in_n, ~is_in_n))
    vote_g = votes_gk[:, label] - votes_gk.mean(axis=1)
    return pd.DataFrame({"support": vote_g * (mean_in_g - mean_out_g), "mean_in": mean_in_g, "mean_out": mean_out_g})


def votes_of(run: Run, category: str) -> np.ndarray | None:
    """Return the votes of the panel's genes for the labels of a phenotype, (g, k); None if the run has none."""
    if (path := direct_path(run.model)) is None:
        return None
    first, config = run.tokenizer.first_gene_type, run.model.config
    votes_gk = path.votes_tk[first : first + len(run.tokenizer.panel)].detach().cpu().double().numpy()
    if run.is_classifier:
        return votes_gk
    start, stop = run.tokenizer.vocabulary.id_range(category)
    return votes_gk[:, start - config.first_label_id : stop - config.first_label_id]


def marker_table(
    run: Run, category: str, labels: Sequence[str], expression_ng: sparse.csr_matrix, label_n: IntArray
) -> pd.DataFrame:
    """Return at most `MOST_MARKERS` genes that speak for each label, the strongest first.

    Args:
        run: Where the votes are; without votes the table is empty.
        category: The phenotype.
        labels: Its labels.
        expression_ng: Log1p counts per 10,000 of the panel's genes.
        label_n: Label of each cell, -1 where it is not known. A label of fewer than `LEAST_CELLS` cells is left out.

    Returns:
        `phenotype`, `label`, `num_cells`, `rank`, `gene`, `gene_id`, and those of `support_of`.
    """
    votes_gk, tables, panel = votes_of(run, category), [pd.DataFrame()], run.tokenizer.panel
    known_ng, label_n = expression_ng[label_n >= 0], label_n[label_n >= 0]
    for label, name in enumerate(labels):
        num_cells = int((label_n == label).sum())
        if votes_gk is None or not LEAST_CELLS <= num_cells < len(label_n):
            continue
        found = support_of(votes_gk, known_ng, label_n, label).nlargest(MOST_MARKERS, "support")
        found = found[found["support"] > 0]
        names = {
            "gene": [panel.display_name(gene) for gene in found.index],
            "gene_id": [panel.genes[gene] for gene in found.index],
        }
        facts = {"phenotype": category, "label": name, "num_cells": num_cells, "rank": np.arange(1, len(found) + 1)}
        tables.append(pd.concat([pd.DataFrame({**facts, **names}), found.reset_index(drop=True)], axis=1))
    return pd.concat(tables, ignore_index=True)
