"""Exact effects are what re-running an edited cell gives, and the gradient screen estimates them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from perturbgene.data_utils.data_collators import pack
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError
from perturbgene.eval_utils import inference_mode
from perturbgene.inference.run import Run
from perturbgene.model import GeneBertConfig, GeneBertForClassification, GeneBertForPhenotypicMLM
from perturbgene.model.attention import attention
from perturbgene.model.layers import expression_levels
from perturbgene.perturbation import screening
from perturbgene.perturbation.edits import Perturbations, changed_pairs, perturbations_of
from perturbgene.perturbation.readouts import StateReadout, exact_effects, label_readout, sequences
from perturbgene.perturbation.screening import screen_removals
from perturbgene.training.train import tokenizer_facts
from tests.nine_genes import a_tokenizer

TOKENIZER = a_tokenizer()


def a_run(num_layers: int = 2, norm_position: str = "branch", *, classifier: bool = False) -> Run:
    """Make a run with random weights, large enough that attention differs between genes."""
    torch.manual_seed(0)
    config = GeneBertConfig(
        **tokenizer_facts(TOKENIZER), hidden_size=16, num_hidden_layers=num_layers, num_attention_heads=2,
        intermediate_size=32, norm_position=norm_position, initializer_range=0.3, embedding_range=0.5,
        direct_path=True,
    )  # fmt: skip
    if not classifier:
        return Run(with_votes(GeneBertForPhenotypicMLM(config)), TOKENIZER, "memory")
    config.num_labels, config.phenotype_category = 3, "cell_type"
    config.id2label = dict(enumerate(TOKENIZER.phenotypes["cell_type"]))
    return Run(with_votes(GeneBertForClassification(config)), TOKENIZER, "memory")


def with_votes(model: torch.nn.Module) -> torch.nn.Module:
    """Let genes vote, about as strongly as the transformer speaks."""
    for name, weight in model.named_buffers():
        if name.endswith("votes_tk"):
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def cells(*genes: list[int]) -> TokenBlock:
    """Make cells that express some of the nine genes, all at bin 1."""
    ids = [[0, *[10] * len(row), 1] for row in genes]
    types = [[0, *[3 + gene for gene in row], 0] for row in genes]
    offsets = np.cumsum([0, *map(len, ids)])
    return TokenBlock(np.concatenate(ids), np.concatenate(types), offsets, np.arange(len(genes)))


def effects(run: Run, block: TokenBlock, readout, genes: list[str], **options) -> tuple[Perturbations, np.ndarray]:
    asked = sequences(block, TOKENIZER, readout)
    perturbations = perturbations_of(genes, TOKENIZER)
    pairs = changed_pairs(asked, perturbations, TOKENIZER)
    return pairs, exact_effects(run, asked, perturbations, readout, pairs=pairs, **options)


@pytest.mark.parametrize("classifier", [False, True])
def test_genes_that_the_transformer_does_not_read_still_vote(classifier: bool) -> None:
    run, block = a_run(classifier=classifier), cells([0, 1, 2, 5, 8], [2, 3], [0, 1, 2])
    run.model.config.most_genes = 3
    readout = READOUTS["two_labels"](run)
    asked = sequences(block, TOKENIZER, readout)
    (cell_m, perturbation_m), exact = effects(run, block, readout, list(TOKENIZER.panel.genes))
    path = run.model.direct_classes if classifier else run.model.direct_labels
    first = TOKENIZER.vocabulary.id_range("cell_type")[0] - run.model.config.first_label_id
    column = {"B cell": 0, "NK cell": 1, "T cell": 2} if classifier else {"B cell": first, "T cell": first + 2}
    far = (perturbation_m >= 3) & (cell_m == 0)  # of the first cell's five genes, three are read
    votes_gk = path.votes_tk[TOKENIZER.first_gene_type :] * expression_levels(run.model.config)[10]
    expected_g = votes_gk[:, column["T cell"]] - votes_gk[:, column["B cell"]]
    np.testing.assert_allclose(exact[far], expected_g[perturbation_m[far]], atol=1e-5)
    screened_l = screen_removals(run, asked, readout)
    np.testing.assert_allclose(screened_l[: asked.offsets_n1[1]][-3:-1], exact[far], atol=1e-5)
    with inference_mode(run.model):
        whole = readout.log_odds(readout.logits(run.model, pack(asked)))
        path.votes_tk.zero_()
        cut = readout.log_odds(readout.logits(run.model, pack(asked.cut(asked.offsets_n1[1] - 2))))
        without = readout.log_odds(readout.logits(run.model, pack(asked)))
    np.testing.assert_allclose(without.numpy(), cut.numpy(), atol=1e-5)  # the transformer reads the same
    assert (whole - without).abs().min() > 1e-3
    read = [effects(run, cells(genes), readout, ["G1"])[1] for genes in ([0, 1, 2, 5, 8], [0, 1, 2])]
    np.testing.assert_allclose(*read, atol=1e-5)  # no other gene is read in place of the one that is knocked out


@pytest.mark.parametrize("genes", [[0, 3, 8], [0, 3]])
def test_a_gene_that_is_added_is_read_next_to_the_others(genes: list[int]) -> None:
    run, block = a_run(), cells(genes)
    readout, found = READOUTS["two_labels"](run), []
    asked = sequences(block, TOKENIZER, readout)
    perturbations = perturbations_of(["G1+G5"], TOKENIZER, kind="over_express")
    pairs = changed_pairs(asked, perturbations, TOKENIZER)
    for most in (None, 3):
        run.model.config.most_genes = most
        found.append(exact_effects(run, asked, perturbations, readout, pairs=pairs))
    np.testing.assert_allclose(*found, atol=1e-5)
    assert abs(found[0]).min() > 1e-3


@pytest.mark.bf16
@pytest.mark.parametrize("classifier", [False, True])
def test_what_a_gene_votes_is_screened_exactly(classifier: bool) -> None:
    run = a_run(classifier=classifier)
    for layer in run.model.genebert.layers:
        torch.nn.init.zeros_(layer.attention_norm.weight)  # attention says nothing: only votes depend on other tokens
    readout = READOUTS["two_labels"](run)
    genes = TOKENIZER.panel.genes
    (cell_m, perturbation_m), exact = effects(run, CELLS, readout, list(genes))
    asked = sequences(CELLS, TOKENIZER, readout)
    screened_l = screen_removals(run, asked, readout)
    is_gene_l = asked.token_type_ids_l >= TOKENIZER.first_gene_type
    order = np.lexsort((perturbation_m, cell_m))
    assert np.abs(exact).min() > 1e-3
    np.testing.assert_allclose(screened_l[is_gene_l], exact[order], atol=1e-5)
    assert not run.model.direct_classes._forward_hooks if classifier else not run.model.direct_labels._forward_hooks
    assert all(layer.attention is attention for layer in run.model.genebert.layers)


CELLS = cells([0, 2, 4, 7], [1, 2, 3, 5, 6, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8])
READOUTS = {
    "label": lambda run: label_readout(run, towards="cell_type=B cell"),
    "two_labels": lambda run: label_readout(run, towards="cell_type=B cell", away="cell_type=T cell"),
    "cls": lambda run: StateReadout("cls"),
    "mean": lambda run: StateReadout("mean"),
}


def test_the_effect_on_a_label_is_the_change_of_its_log_odds():
    run = a_run()
    _, found = effects(run, cells([0, 2]), READOUTS["label"](run), ["G2"])
    log_odds = []
    for types in ([0, 1, 3, 5, 0], [0, 1, 3, 0]):
        ids = torch.tensor([[0, 2, *[10] * (len(types) - 3), 1]])
        with inference_mode(run.model):
            logits = run.model(ids, torch.tensor([types])).logits[0, 1]
        chance = torch.softmax(logits[4:7], 0)[0]  # the labels of cell_type have ids 4, 5, 6
        log_odds.append(float(torch.log(chance / (1 - chance))))
    assert found[0] == pytest.approx(log_odds[1] - log_odds[0], abs=1e-5)


def test_between_two_labels_their_log_odds_are_compared():
    run = a_run()
    _, both = effects(run, CELLS, READOUTS["two_labels"](run), ["G2"])
    swapped = label_readout(run, towards="cell_type=T cell", away="cell_type=B cell")
    np.testing.assert_allclose(effects(run, CELLS, swapped, ["G2"])[1], -both, atol=1e-6)


def test_a_temperature_divides_the_effect_between_two_labels():
    run = a_run()
    warm = replace(READOUTS["two_labels"](run), temperature=2.0)
    found = [effects(run, CELLS, readout, ["G2"])[1] for readout in (READOUTS["two_labels"](run), warm)]
    np.testing.assert_allclose(found[1], found[0] / 2, atol=1e-6)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_effect_on_the_state_is_a_cosine_distance_without_the_genes_own_token(pooling):
    run = a_run()
    _, found = effects(run, cells([0, 2, 4]), StateReadout(pooling), ["G2"])
    states = []
    for types in ([0, 3, 5, 7, 0], [0, 3, 7, 0]):
        ids = torch.tensor([[0, *[10] * (len(types) - 2), 1]])
        with inference_mode(run.model):
            hidden_lh = run.model.genebert(ids, torch.tensor([types])).last_hidden_state[0]
        kept = [0] if pooling == "cls" else [at for at, type_ in enumerate(types) if type_ in (3, 7)]
        states.append(hidden_lh[kept].mean(0))
    assert found[0] == pytest.approx(float(1 - torch.cosine_similarity(*states, dim=0)), abs=1e-5)


def test_the_mean_state_of_a_cells_only_gene_has_no_effect_to_speak_of():
    run = a_run()
    assert np.isnan(effects(run, cells([2]), StateReadout("mean"), ["G2"])[1]).all()


@pytest.mark.parametrize("name", READOUTS)
def test_effects_do_not_depend_on_how_cells_are_batched(name):
    run = a_run()
    readout = READOUTS[name](run)
    pairs, together = effects(run, CELLS, readout, ["all"], budget=10_000)
    alone = effects(run, CELLS, readout, ["all"], budget=1)[1]
    assert len(pairs[0]) == 19
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("norm_position", ["post", "branch"])
@pytest.mark.parametrize("name", READOUTS)
def test_small_removals_are_screened_to_first_order(name, norm_position):
    """With queries and keys that hardly tell genes apart, one of many genes weighs little and the estimate is near."""
    run = a_run(num_layers=2, norm_position=norm_position)
    readout = READOUTS[name](run)
    asked = sequences(cells(list(range(9))), TOKENIZER, readout)
    _, exact = effects(run, cells(list(range(9))), readout, ["all"])
    screened = screen_removals(run, asked, readout, num_directions=16)
    screened = screened[np.isfinite(screened)]
    assert len(screened) == 9
    assert spearmanr(screened, exact).statistic > 0.6
    assert (np.sign(screened) == np.sign(exact)).mean() > 0.7


@pytest.mark.parametrize("name", ["cls", "mean"])
def test_few_directions_hold_most_of_the_shifts_of_a_state(name):
    """Of 16 dimensions 4 are followed, yet lengths come near those along all; unchosen ones would hold a quarter."""
    run = a_run()
    readout = READOUTS[name](run)
    asked = sequences(CELLS, TOKENIZER, readout)
    few_l, all_l = (screen_removals(run, asked, readout, num_directions=r, is_half=False) for r in (4, 16))
    is_gene_l = np.isfinite(all_l)
    assert 0.8 < few_l[is_gene_l].sum() / all_l[is_gene_l].sum() < 1
    assert spearmanr(few_l[is_gene_l], all_l[is_gene_l]).statistic > 0.9


def test_directions_are_orthonormal_and_across_the_state():
    run = a_run()
    batch = pack(sequences(CELLS, TOKENIZER, StateReadout("cls")))
    direction_nhr = screening._directions(run, batch, StateReadout("cls"), count=4)
    state_nh = StateReadout("cls").read(run.model, batch, is_counted_l=batch["token_type_ids"] >= 3)
    torch.testing.assert_close(direction_nhr.mT @ direction_nhr, torch.eye(4).expand(3, 4, 4), atol=1e-4, rtol=0)
    assert torch.einsum("nh,nhr->nr", state_nh, direction_nhr).abs().max() < 1e-4


def test_with_one_layer_and_one_read_the_screen_is_the_gradient_times_the_exact_change():
    """One layer, one read token: the screen is the gradient at attention's output times its exact change."""
    run = a_run(num_layers=1)
    torch.nn.init.zeros_(run.model.direct_labels.votes_tk)
    readout = READOUTS["label"](run)
    asked = sequences(cells([0, 2, 4, 7]), TOKENIZER, readout)
    screened = screen_removals(run, asked, readout, is_half=False)
    outs: list[torch.Tensor] = []
    handle = run.model.genebert.layers[0].attention_out.register_forward_pre_hook(
        lambda _, arguments: outs.append(arguments[0])
    )
    log_odds = []
    for types in ([0, 1, 3, 5, 7, 10, 0], [0, 1, 5, 7, 10, 0]):  # with G0 and without
        batch = {
            "input_ids": torch.tensor([0, 2, *[10] * (len(types) - 3), 1]),
            "token_type_ids": torch.tensor(types),
            "cu_seqlens": torch.tensor([0, len(types)]),
        }
        log_odds.append(readout.log_odds(readout.logits(run.model, batch))[0])
    handle.remove()
    gradient = torch.autograd.grad(log_odds[0], outs[0])[0]
    expected = (gradient * (outs[1] - outs[0])).sum().item()
    assert screened[2] == pytest.approx(expected, rel=1e-3)


def test_cells_are_screened_alike_in_any_batch():
    run = a_run()
    for readout in (READOUTS["label"](run), READOUTS["mean"](run)):
        asked = sequences(CELLS, TOKENIZER, readout)
        together = screen_removals(run, asked, readout, num_directions=4, budget=10_000, is_half=False)
        alone = screen_removals(run, asked, readout, num_directions=4, budget=1, is_half=False)
        np.testing.assert_allclose(together, alone, atol=1e-5, equal_nan=True)


def test_screening_leaves_the_model_as_it_was():
    run = a_run()
    run.model.train()
    frozen = run.model.genebert.layers[1].qkv.weight.requires_grad_(False)
    readout = READOUTS["label"](run)
    screen_removals(run, sequences(CELLS, TOKENIZER, readout), readout)
    assert run.model.training
    assert all(weight.grad is None for weight in run.model.parameters())
    assert [weight.requires_grad for weight in run.model.parameters()].count(False) == 1 and not frozen.requires_grad
    assert "attend" not in vars(run.model.genebert.layers[0])


def test_a_screen_that_fails_leaves_the_model_as_it_was(monkeypatch):
    run = a_run()
    readout = READOUTS["label"](run)
    asked = sequences(CELLS, TOKENIZER, readout)
    monkeypatch.setattr(run.model, "mlm_norm", None)
    with pytest.raises(TypeError, match="not callable"):
        screen_removals(run, asked, readout)
    assert all(weight.requires_grad for weight in run.model.parameters())
    assert "attend" not in vars(run.model.genebert.layers[0])


def test_a_classifier_is_screened_and_rerun_too():
    run = a_run(classifier=True)
    readout = label_readout(run, towards="cell_type=T cell")
    asked = sequences(CELLS, TOKENIZER, readout)
    assert (asked.token_type_ids_l != 1).all()  # no slot is asked
    screened = screen_removals(run, asked, readout)
    assert np.isfinite(screened).sum() == 19
    assert np.isfinite(effects(run, CELLS, readout, ["all"])[1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"towards": "cell_type"}, "--towards is 'cell_type', but it must read PHENOTYPE=LABEL"),
        (
            {"towards": "cell_type=Bcell"},
            "cell_type=Bcell is no label of the run. Did you mean 'B cell'\\? Change --towards",
        ),
        ({"towards": "organ=lung"}, "organ"),
        ({"towards": "cell_type=B cell", "away": "tissue=blood"}, "are not two labels of one phenotype"),
        ({"towards": "cell_type=B cell", "given": ("cell_type",)}, "given and asked at once"),
    ],
)
def test_labels_that_cannot_be_followed_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        label_readout(a_run(), **options)


@pytest.mark.parametrize(
    ("name", "limit"),
    [("BYTES_AT_ONCE", {"cpu": 1}), ("MOST_KEPT", {"cpu": 1}), ("MOST_KEPT", {"cpu": 2000})],
    ids=["few heads and queries at a time", "weights made again", "few cells at a time"],
)
def test_long_cells_are_screened_alike_in_little_memory(monkeypatch, name, limit):
    run = a_run()
    readout = READOUTS["mean"](run)
    asked = sequences(CELLS, TOKENIZER, readout)
    at_once = screen_removals(run, asked, readout, is_half=False)
    monkeypatch.setattr(screening, name, limit)
    found = screen_removals(run, asked, readout, is_half=False)
    np.testing.assert_allclose(found, at_once, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", READOUTS)
def test_the_screen_in_half_precision_is_the_screen(name):
    run = a_run()
    readout = READOUTS[name](run)
    asked = sequences(CELLS, TOKENIZER, readout)
    half_l, full_l = (screen_removals(run, asked, readout, is_half=is_half) for is_half in (True, False))
    is_gene_l = np.isfinite(full_l)
    assert (half_l[is_gene_l] != full_l[is_gene_l]).any()
    assert np.linalg.norm((half_l - full_l)[is_gene_l]) < 0.05 * np.linalg.norm(full_l[is_gene_l])
    assert spearmanr(half_l[is_gene_l], full_l[is_gene_l]).statistic > 0.95
