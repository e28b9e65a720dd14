"""The genes whose votes speak for a label."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import perturbgene as pg
from perturbgene.inference.markers import LEAST_CELLS, marker_table, support_of
from perturbgene.inference.run import Run, load_run
from perturbgene.model.heads import DirectPath


@pytest.fixture
def voting_run(small_folder: Path) -> Run:
    """A run in which CD79A votes for B cells, and another gene for all labels alike."""
    run = load_run(small_folder / "runs/mlm", device="cpu")
    config, tokenizer = run.model.config, run.tokenizer
    path = DirectPath(config.type_vocab_size, config.first_bin_id - config.first_label_id, num_phenotypes=2)
    start, stop = tokenizer.vocabulary.id_range("cell_type")
    first = tokenizer.first_gene_type
    label = start - config.first_label_id + list(tokenizer.phenotypes["cell_type"]).index("B cell")
    path.votes_tk[first + tokenizer.panel.genes.index("CD79A"), label] = 0.3
    path.votes_tk[first + tokenizer.panel.genes.index("NKG7"), start - config.first_label_id : stop] = 5.0
    run.model.direct_labels = path
    return run


def test_evaluate_writes_the_genes_that_vote_for_a_label(voting_run: Run, small_folder: Path, tmp_path: Path) -> None:
    pg.evaluate(voting_run, small_folder / "cells.h5ad", output=tmp_path, ask=["cell_type"])
    table = pd.read_csv(tmp_path / "markers.csv")
    [row] = table[table["label"] == "B cell"].to_dict("records")
    assert row["gene"] == "CD79A" and row["mean_in"] > row["mean_out"]
    assert row["support"] == pytest.approx(0.2 * (row["mean_in"] - row["mean_out"]), rel=1e-5)  # 0.3 less its mean
    assert "NKG7" not in set(table["gene"])


def test_supports_add_up_to_the_difference_of_mean_votes() -> None:
    rng = np.random.default_rng(0)
    votes_gk, cells_ng = rng.normal(size=(6, 3)), sparse.csr_matrix(rng.random((12, 6)))
    label_n = np.arange(12) % 3
    logits_nk = cells_ng @ votes_gk
    own_n = logits_nk[:, 1] - logits_nk.mean(axis=1)
    found = support_of(votes_gk, cells_ng, label_n, 1)
    assert found["support"].sum() == pytest.approx(own_n[label_n == 1].mean() - own_n[label_n != 1].mean())


def test_a_run_without_votes_and_a_label_of_few_cells_have_no_markers(voting_run: Run, small_folder: Path) -> None:
    labels, num_genes = ["a", "b", "c"], len(voting_run.tokenizer.panel)
    cells_ng, label_n = sparse.csr_matrix(np.ones((9, num_genes))), np.array([0] * (LEAST_CELLS - 1) + [-1] * 5)
    assert marker_table(voting_run, "cell_type", labels, cells_ng, label_n).empty
    without = load_run(small_folder / "runs/mlm", device="cpu")
    assert marker_table(without, "cell_type", labels, cells_ng, np.arange(9) % 3).empty
