"""The first layer's attention in copies of a cell without some tokens is what attention anew gives."""

import numpy as np
import pytest
import torch

from perturbgene.inference.run import Run
from perturbgene.perturbation import first_layer, readouts
from perturbgene.perturbation.edits import Perturbations, changed_pairs, perturbations_of
from perturbgene.perturbation.readouts import exact_effects, sequences
from tests.perturbation.test_screening import CELLS, READOUTS, TOKENIZER, a_run


def knock_outs(run: Run, name: str, genes: list[str], **options) -> np.ndarray:
    readout = READOUTS[name](run)
    asked = sequences(CELLS, TOKENIZER, readout)
    perturbations: Perturbations = perturbations_of(genes, TOKENIZER)
    pairs = changed_pairs(asked, perturbations, TOKENIZER)
    return exact_effects(run, asked, perturbations, readout, pairs=pairs, **options)


def test_without_a_token_the_others_share_its_attention():
    """Weights 1/2, 1/4, 1/4 over the values 8, 0, 4 give 5; without the first, 1/2 and 1/2 over 0 and 4 give 2."""
    q_hld, k_hld = torch.ones(1, 3, 1), torch.tensor([2.0, 1.0, 1.0]).log()[None, :, None]
    v_hld = torch.tensor([8.0, 0.0, 4.0])[None, :, None]
    log_sum_hl = torch.tensor(4.0).log().expand(1, 3)
    cell = first_layer._Cell(q_hld, k_hld, v_hld, torch.full((1, 3, 1), 5.0), log_sum_hl)
    out_lh = cell.without(torch.tensor([0]), torch.tensor([1, 2]))
    torch.testing.assert_close(out_lh, torch.tensor([[2.0], [2.0]]))
    assert cell.without(torch.tensor([0, 1, 2]), torch.tensor([1])) is None  # nothing is left to attend to


@pytest.mark.parametrize("norm_position", ["pre", "post", "branch"])
@pytest.mark.parametrize("name", READOUTS)
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_sharing_the_first_layer_changes_no_effect(monkeypatch, name, norm_position, budget):
    run = a_run(norm_position=norm_position)
    genes = ["G0", "G2", "G4+G7", "G1", "G8", "G0+G2+G4", "G7"]
    shared = knock_outs(run, name, genes, budget=budget)
    monkeypatch.setattr(readouts, "LEAST_COPIES", 1000)
    np.testing.assert_allclose(shared, knock_outs(run, name, genes, budget=budget), atol=1e-5)


def test_a_model_of_one_layer_shares_it_too(monkeypatch):
    run = a_run(num_layers=1)
    shared = knock_outs(run, "label", ["all"])
    monkeypatch.setattr(readouts, "LEAST_COPIES", 1000)
    np.testing.assert_allclose(shared, knock_outs(run, "label", ["all"]), atol=1e-5)


def test_the_first_layer_attends_once_in_each_cell(monkeypatch):
    """Queries are made of the 3 cells to begin with, then of each cell once; copies have none of their own."""
    run, lengths = a_run(), []
    layer = run.model.genebert.layers[0]
    original = layer.queries_keys_values
    monkeypatch.setattr(
        layer, "queries_keys_values", lambda x_lh, reads: (lengths.append(len(x_lh)), original(x_lh, reads))[1]
    )
    knock_outs(run, "label", ["all"])
    assert lengths == [64, 7, 9, 12]  # [CLS], [MASK] and [EOS] beside 4, 6 and 9 genes; a batch of 28 is rounded up
    assert "attend" not in vars(layer)


def test_where_little_attention_is_left_it_is_made_anew(monkeypatch):
    run = a_run()
    expected = knock_outs(run, "label", ["all"])
    monkeypatch.setattr(first_layer, "LEAST_REST", 2.0)
    np.testing.assert_allclose(knock_outs(run, "label", ["all"]), expected, atol=1e-5)


def test_long_cells_attend_some_queries_at_a_time(monkeypatch):
    run = a_run()
    expected = knock_outs(run, "label", ["all"])
    monkeypatch.setattr(first_layer, "MOST_WEIGHTS", {"cpu": 1})
    np.testing.assert_allclose(knock_outs(run, "label", ["all"]), expected, atol=5e-6)


def test_a_run_that_fails_leaves_the_first_layer_as_it_was():
    run = a_run()
    shared = first_layer.FirstLayer(run.model, CELLS)
    with pytest.raises(KeyError, match="stop"), shared.without(np.array([0]), [np.array([1])]):
        assert "attend" in vars(run.model.genebert.layers[0])
        raise KeyError("stop")
    assert "attend" not in vars(run.model.genebert.layers[0])
