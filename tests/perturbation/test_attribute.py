"""`attribute` finds the genes that a label hangs on, and checks that by removing them."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from perturbgene.data_utils.data_collators import pack
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError
from perturbgene.inference.run import Run
from perturbgene.main import main
from perturbgene.model import GeneBertConfig, GeneBertForPhenotypicMLM
from perturbgene.perturbation import cells as cells_module
from perturbgene.perturbation.attribute import _without_top, attribute, label_question, support
from perturbgene.perturbation.cells import GroupedCells
from perturbgene.perturbation.readouts import sequences
from perturbgene.training.train import tokenizer_facts
from tests.nine_genes import GENES, a_tokenizer

TOKENIZER = a_tokenizer()


@pytest.fixture(scope="module")
def run() -> Run:
    """A model trained for a moment on cells whose type hangs on one gene each: G1 B, G4 NK, G7 T."""
    torch.manual_seed(0)
    config = GeneBertConfig(
        **tokenizer_facts(TOKENIZER), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        norm_position="branch", bin_gain_range=0, dropout=0.0, initializer_range=0.15, embedding_range=0.5,
    )  # fmt: skip
    model = GeneBertForPhenotypicMLM(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    random = np.random.default_rng(0)
    for _ in range(60):
        types_n = random.integers(0, 3, 16)
        rows = [genes_of(type_, random) for type_ in types_n]
        ids = torch.tensor([[0, 2, *[10] * 4, 1] for _ in rows])
        types = torch.tensor([[0, 1, *[3 + gene for gene in row], 0] for row in rows])
        labels = torch.full_like(ids, -100)
        labels[:, 1] = torch.from_numpy(4 + types_n)
        loss = model(ids, types, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.2
    return Run(model.eval(), TOKENIZER, "memory")


def genes_of(type_: int, random: np.random.Generator) -> list[int]:
    """Draw the genes of a cell: its marker and three that say nothing."""
    return sorted([[1, 4, 7][type_], *random.choice([0, 2, 3, 5, 6, 8], 3, replace=False)])


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    random = np.random.default_rng(1)
    values = np.zeros((30, 9), dtype=np.float32)
    for row in range(30):
        values[row, genes_of(row % 3, random)] = 2
    return ad.AnnData(sparse.csr_matrix(values), var=pd.DataFrame(index=GENES))


def test_the_marker_of_each_type_comes_first(run, cells):
    table = attribute(cells, run, ask="cell_type", num_check_cells=12)
    first = table[table["rank"] == 1].set_index("label")
    assert first["gene"].to_dict() == {"B cell": "G1", "NK cell": "G4", "T cell": "G7"}
    assert first["num_cells"].tolist() == [10, 10, 10]
    assert first["share_expressed"].tolist() == [1.0, 1.0, 1.0]
    second = table[table["rank"] == 2].set_index("label")
    assert (second["support"] < first["support"] / 2).all()
    np.testing.assert_allclose(table["support"], table["support_where_expressed"] * table["share_expressed"], atol=1e-6)


def test_cells_without_genes_count_for_no_label(run, cells, caplog):
    values = cells.X.toarray()
    empty = ad.AnnData(sparse.csr_matrix(np.concatenate([np.zeros((40, 9), np.float32), values])), var=cells.var)
    with_empty, alone = (attribute(some, run, ask="cell_type", num_check_cells=7) for some in (empty, cells))
    pd.testing.assert_frame_equal(with_empty, alone)
    assert "40 of 70 cells express no gene of the panel" in caplog.text
    assert np.isfinite(with_empty.attrs["areas"]["attributed"])
    assert attribute(empty, run, ask="cell_type", num_check_cells=20).attrs["num_check_cells"] < 20
    others = ad.AnnData(np.eye(40, 10, k=9, dtype=np.float32), var=pd.DataFrame(index=[*GENES, "no gene of the panel"]))
    with pytest.raises(InputError, match="no cell of 'AnnData' expresses a gene of the panel"):
        attribute(others, run, ask="cell_type")
    few = ad.AnnData(sparse.csr_matrix(np.concatenate([np.zeros((9, 9), np.float32), values[:2]])), var=cells.var)
    assert np.isfinite(attribute(few, run, ask="cell_type", num_check_cells=1).attrs["areas"]["random"])


def test_support_agrees_with_integrated_gradients_over_gates_that_let_genes_in(run, cells):
    """Captum is the oracle: a gate per gene token goes from shut to open, and its share of the log-odds is measured."""
    captum = pytest.importorskip("captum.attr")
    readout, _ = label_question(run, "cell_type", {})
    opened = GroupedCells.open(cells, run, readout, given={}, batch_size=30)
    asked = sequences(opened.read(np.arange(12)), TOKENIZER, readout)
    label_n, support_l = support(run, asked, readout, budget=1000)
    is_gene_l, batch = torch.from_numpy(np.isfinite(support_l)), pack(asked)

    def log_odds_of(gates: torch.Tensor) -> torch.Tensor:
        """Of all cells together, for one row of gates (1, m) of the gene tokens."""
        log_gate_l = torch.zeros(len(is_gene_l)).masked_scatter(is_gene_l, gates[0].log())
        logits_nk = readout.logits(run.model, {**batch, "key_log_gate": log_gate_l})
        return readout.log_odds(logits_nk, towards_n=torch.from_numpy(label_n)).sum()[None]

    gates = torch.ones(1, int(is_gene_l.sum()))
    oracle = captum.IntegratedGradients(log_odds_of)
    shares = oracle.attribute(gates, baselines=gates * 1e-3, n_steps=50, internal_batch_size=1)[0].numpy()
    assert np.corrcoef(shares, support_l[is_gene_l.numpy()])[0, 1] > 0.8


def test_removing_the_strongest_genes_first_costs_more_than_a_random_order(run, cells):
    table = attribute(cells, run, ask="cell_type", num_check_cells=30)
    curves = pd.DataFrame(table.attrs["deletion"])
    assert curves["attributed"][0] == curves["random"][0]
    assert curves["attributed"].iloc[-1] == pytest.approx(curves["random"].iloc[-1], abs=1e-5)
    assert table.attrs["areas"]["attributed"] < table.attrs["areas"]["random"] - 1


def test_the_share_with_the_highest_scores_leaves():
    block = TokenBlock(
        np.array([0, 10, 10, 10, 1, 0, 11, 1]), np.array([0, 3, 4, 5, 0, 0, 6, 0]), np.array([0, 5, 8]), np.arange(2)
    )
    score_l = np.array([np.nan, 1, 3, 2, np.nan, np.nan, 5, np.nan])
    left = _without_top(block, score_l, 0.5)  # two of three genes, one of one
    assert left.token_type_ids_l.tolist() == [0, 3, 0, 0, 0]
    assert left.offsets_n1.tolist() == [0, 3, 5]


@pytest.mark.usefixtures("drawn_figures")
def test_the_verb_writes_table_curves_and_origin(run, cells, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(cells_module, "PART_CELLS", 7)
    run.model.save_pretrained(tmp_path / "run")
    TOKENIZER.save_pretrained(tmp_path / "run")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    command = (
        f"attribute {tmp_path}/run {tmp_path}/cells.h5ad --output {tmp_path}/markers.csv --ask cell_type --device cpu"
    )
    assert main(command.split()) == 0
    assert pd.read_csv(tmp_path / "markers.csv")["gene"][0] == "G1"
    assert (tmp_path / "markers.png").stat().st_size > 5_000
    assert json.loads((tmp_path / "markers.json").read_text())["areas"].keys() == {"attributed", "random"}
    assert not list(tmp_path.glob(".markers*"))
    out = capsys.readouterr().out
    assert "B cell (10 cells): G1" in out and "area under the deletion curve" in out


def test_an_unknown_phenotype_is_refused(run, cells, tmp_path, capsys):
    run.model.save_pretrained(tmp_path / "run")
    TOKENIZER.save_pretrained(tmp_path / "run")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    command = f"attribute {tmp_path}/run {tmp_path}/cells.h5ad --output {tmp_path}/m.csv --ask cell_typ --device cpu"
    assert main(command.split()) == 2
    assert "cell_type" in capsys.readouterr().err
