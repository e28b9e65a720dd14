"""Copies of a cell that share its first layer have the effects of copies that are run whole."""

import numpy as np
import pytest
import torch

from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.inference.run import Run
from perturbgene.perturbation import first_layer
from perturbgene.perturbation.edits import Perturbations, changed_pairs, perturbations_of
from perturbgene.perturbation.readouts import _copies_by_cell, exact_effects, sequences
from tests.perturbation.test_screening import CELLS, READOUTS, TOKENIZER, a_run, cells

APART, SHARED = 10_000, 25  # tokens at once: more than all copies of a cell have, and two or three copies
EDITS = {
    "knock-outs": perturbations_of(["all"], TOKENIZER),
    "knock-outs of several": perturbations_of(["G0+G2", "G2", "G1+G4+G8"], TOKENIZER),
    "over-expression": perturbations_of(["G0", "G2+G5", "G3", "G8"], TOKENIZER, kind="over_express"),
    "another bin": perturbations_of(["G0", "G2+G5", "G3", "G8"], TOKENIZER, kind="set_bin", level=1),
}


def effects(run: Run, name: str, edits: Perturbations, *, budget: int, block: TokenBlock = CELLS) -> np.ndarray:
    readout = READOUTS[name](run)
    asked = sequences(block, TOKENIZER, readout)
    pairs = changed_pairs(asked, edits, TOKENIZER)
    return exact_effects(run, asked, edits, readout, pairs=pairs, budget=budget)


def assert_alike(run: Run, name: str, edits: Perturbations, *, atol: float = 1e-5) -> None:
    apart, shared = (effects(run, name, edits, budget=budget) for budget in (APART, SHARED))
    assert np.nanmax(np.abs(apart)) > 1e-3
    np.testing.assert_allclose(shared, apart, atol=atol)


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("name", ["label", "cls", "mean"])
def test_copies_that_share_the_first_layer_have_the_same_effects(name: str, kind: str) -> None:
    assert_alike(a_run(), name, EDITS[kind])


@pytest.mark.parametrize("kind", EDITS)
def test_so_they_have_if_the_transformer_does_not_read_all_genes(kind: str) -> None:
    run = a_run()
    run.model.config.most_genes = 3
    assert_alike(run, "label", EDITS[kind])


@pytest.mark.parametrize("options", [{"num_layers": 3}, {"norm_position": "post"}, {"classifier": True}])
def test_so_they_have_in_every_kind_of_model(options: dict) -> None:
    assert_alike(a_run(**options), "two_labels", EDITS["over-expression"])


@pytest.mark.parametrize("kind", ["knock-outs", "over-expression"])
def test_where_a_removed_gene_had_nearly_all_attention_it_is_computed_in_full(kind: str) -> None:
    run = a_run()
    with torch.no_grad():
        run.model.genebert.layers[0].qkv.weight[:32] *= 5  # queries and keys
        run.model.genebert.layers[0].qkv.weight[32:] /= 5
    asked = sequences(CELLS, TOKENIZER, READOUTS["label"](run))
    ids_l, types_l = (torch.from_numpy(values) for values in asked.cell(2))
    with torch.inference_mode():
        cell = first_layer.FirstLayer(run.model.genebert, ids_l, types_l).cell
        logit_ahl = torch.einsum("ahd,lhd->ahl", cell.q_lhd, cell.k_lhd)
    assert (logit_ahl.softmax(-1)[..., 2:-1] > 1 - 1e-3).any()  # on a gene
    assert_alike(run, "label", EDITS[kind])


def test_attention_in_full_is_what_the_update_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run()
    updated = effects(run, "mean", EDITS["over-expression"], budget=SHARED)
    monkeypatch.setattr(first_layer, "LEAST_REST", 1e9)
    monkeypatch.setitem(first_layer.MOST_WEIGHTS, "cpu", 50)  # a few queries at a time
    np.testing.assert_allclose(effects(run, "mean", EDITS["over-expression"], budget=SHARED), updated, atol=1e-6)


def test_the_copies_of_a_cell_share_if_they_fill_a_batch_and_there_is_another_layer() -> None:
    cell_m, length_m = np.array([0, 0, 1, 2, 2, 3]), np.array([9, 9, 20, 11, 11, 5])
    runs = list(_copies_by_cell(cell_m, length_m, budget=20))
    assert runs == [(None, slice(0, 3)), (2, slice(3, 5)), (None, slice(5, 6))]


def test_no_gene_is_read_in_place_of_one_that_is_knocked_out() -> None:
    run = a_run(classifier=True)
    torch.nn.init.zeros_(run.model.direct_classes.votes_tk)
    run.model.config.most_genes = 3
    one = perturbations_of(["G1"], TOKENIZER)
    found = [effects(run, "two_labels", one, budget=APART, block=cells(genes)) for genes in ([0, 1, 2], [0, 1, 2, 5])]
    np.testing.assert_allclose(*found, atol=1e-6)
