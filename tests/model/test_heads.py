"""The masked head, the classifier, the linear term of both, and their losses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from perturbgene.errors import InputError
from perturbgene.model.heads import (
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    masked_loss,
    weighted_loss,
)
from tests.random_models import (
    FIRST_BIN,
    NUM_IDS,
    assert_same_gradients,
    build,
    encoder_inputs,
    gradients,
    make_cells,
    packed,
    padded,
    tiny_config,
)


def by_hand_cell(**more: Any) -> dict[str, Any]:
    """[CLS], a masked slot of the second category, a gene in bin 2, one in bin 0, a masked one, [EOS]."""
    ids = torch.tensor([0, 2, FIRST_BIN + 2, FIRST_BIN, 2, 1])
    types = torch.tensor([0, 2, 5, 6, 7, 0])
    return {"input_ids": ids, "token_type_ids": types, "cu_seqlens": torch.tensor([0, 6]), **more}


def test_only_expressed_genes_and_cls_vote_and_as_strongly_as_their_bin_counts() -> None:
    config = {"bin_gain_range": 1.0, "bin_levels": [0.0, 0.5, 0.75, 1.0, 1.75]}
    masked, classifier = (build(kind, **config) for kind in (GeneBertForPhenotypicMLM, GeneBertForClassification))
    for model, path in ((masked, masked.direct_labels), (classifier, classifier.direct_classes)):
        with torch.no_grad():
            model.genebert.embeddings.type_gain[FIRST_BIN:] = 3.0  # a gain that was learnt changes no vote
            with_votes = model(**by_hand_cell()).logits
            votes = path.votes_tk[0] + path.votes_tk[5] * 0.75
            path.votes_tk[[0, 5]] = 0
            without = model(**by_hand_cell()).logits
            path.votes_tk.zero_()
            assert torch.equal(model(**by_hand_cell()).logits, without)  # bin 0 and the masked gene say nothing
        if model is masked:
            assert torch.equal(with_votes[2:], without[2:])  # genes are not labels
            torch.testing.assert_close((with_votes - without)[1, 6:9], votes[2:])  # ids 6..8, the slot's own category
            assert torch.equal(with_votes[1, 4:6], without[1, 4:6])  # another category's stay out
        else:
            torch.testing.assert_close((with_votes - without)[0], votes)


def test_the_transformer_adds_its_share_to_the_votes_by_whether_a_phenotype_is_given() -> None:
    model, cell = build(GeneBertForPhenotypicMLM, bin_gain_range=1.0), by_hand_cell()
    given = {"input_ids": cell["input_ids"].clone(), "token_type_ids": cell["token_type_ids"].clone()}
    given = {name: torch.cat([tensor[:2], tensor.new_tensor([fill]), tensor[2:]])
             for (name, tensor), fill in zip(given.items(), (5, 1), strict=True)}  # fmt: skip
    given["cu_seqlens"] = torch.tensor([0, 7])
    with torch.no_grad():
        for batch, share in ((cell, 0.5), (given, 2.0)):
            answers = []
            for shares in ([[9.0, 9.0], [0.0, 0.0]], [[1.0, 1.0]] * 2, [[9.0, 9.0], [0.5, 2.0]]):
                model.direct_labels.share_p2[:] = torch.tensor(shares)
                answers.append(model(**batch).logits)
            votes, whole, joined = answers
            torch.testing.assert_close(joined[1, 6:9], votes[1, 6:9] + share * (whole - votes)[1, 6:9])
            assert torch.equal(joined[3:], whole[3:])  # genes are the transformer's own


def test_a_classifier_adds_its_share_to_the_votes() -> None:
    model = build(GeneBertForClassification)
    answers = []
    with torch.no_grad():
        for share in (0.0, 1.0, 0.25):
            model.direct_classes.share_p2[:] = share
            answers.append(model(**by_hand_cell()).logits)
    torch.testing.assert_close(answers[2], answers[0] + 0.25 * (answers[1] - answers[0]))


@pytest.mark.parametrize("kind", [GeneBertForPhenotypicMLM, GeneBertForClassification])
def test_a_transformer_that_adds_nothing_does_not_run_unless_it_is_asked_for_more(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, slot = build(kind), {}
    path = model.direct_labels if kind is GeneBertForPhenotypicMLM else model.direct_classes
    path.share_p2.zero_()
    if kind is GeneBertForPhenotypicMLM:
        slot = {"label_positions": torch.tensor([1])}
    with torch.no_grad():
        whole = model(**by_hand_cell(), **slot).logits
    with torch.inference_mode():
        states = model(**by_hand_cell(), **slot, output_hidden_states=True).hidden_states
        monkeypatch.setattr(model.genebert, "encode", None)
        assert torch.equal(model(**by_hand_cell(), **slot).logits, whole)
        assert states is not None
        path.share_p2[:] = 0.5
        with pytest.raises(TypeError):
            model(**by_hand_cell(), **slot)


def test_training_leaves_the_votes_out() -> None:
    for kind, name in ((GeneBertForPhenotypicMLM, "direct_labels"), (GeneBertForClassification, "direct_classes")):
        model = build(kind).train()
        with torch.no_grad():
            with_votes = model(**by_hand_cell()).logits
            getattr(model, name).votes_tk.zero_()
            assert torch.equal(model(**by_hand_cell()).logits, with_votes)
        assert name not in {weight.partition(".")[0] for weight, _ in model.named_parameters()}  # AdamW has none of it


@pytest.mark.parametrize("kind", [GeneBertForPhenotypicMLM, GeneBertForClassification])
def test_a_hidden_gene_has_no_vote(kind: type) -> None:
    model = build(kind, bin_gain_range=1.0)
    gate = torch.zeros(6)
    gate[2] = -1e4
    left_out = {name: value[[0, 1, 3, 4, 5]] for name, value in by_hand_cell().items() if name.endswith("_ids")}
    with torch.no_grad():
        hidden = model(**by_hand_cell(key_log_gate=gate)).logits
        deleted = model(**left_out, cu_seqlens=torch.tensor([0, 5])).logits
        kept = model(**by_hand_cell()).logits
    rows = [0, 1, 3, 4, 5] if kind is GeneBertForPhenotypicMLM else [0]
    torch.testing.assert_close(hidden[rows], deleted, atol=1e-5, rtol=0)
    assert not torch.allclose(kept[rows], deleted, atol=1e-3)


def test_a_vote_needs_the_ids_next_to_embeddings() -> None:
    model = build(GeneBertForPhenotypicMLM)
    cell = by_hand_cell()
    embeds = model.genebert.embeddings.summed(cell["input_ids"], cell["token_type_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**cell, inputs_embeds=embeds).logits, model(**cell).logits)
    with pytest.raises(InputError, match="direct path needs input_ids"):
        model(**{**cell, "input_ids": None}, inputs_embeds=embeds)


def test_fresh_models_let_no_gene_vote_yet_and_models_of_old_have_no_path() -> None:
    assert not GeneBertForPhenotypicMLM(tiny_config()).direct_labels.votes_tk.any()
    assert GeneBertForPhenotypicMLM(tiny_config(direct_path=False)).direct_labels is None
    assert GeneBertForClassification(tiny_config(direct_path=False)).direct_classes is None


def test_packed_masked_loss_and_gradients_equal_padded_ones() -> None:
    model, cells = build(GeneBertForPhenotypicMLM).train(), make_cells()
    from_padded, from_packed = model(**padded(cells)), model(**packed(cells))
    torch.testing.assert_close(from_padded.loss, from_packed.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(from_padded.logits, from_packed.logits, atol=1e-5, rtol=1e-6)
    assert_same_gradients(gradients(model, from_padded.loss), gradients(model, from_packed.loss), atol=1e-5)


def test_evaluation_returns_all_logits_and_the_same_loss_as_training() -> None:
    model, batch = build(GeneBertForPhenotypicMLM, direct_path=False), padded(make_cells())
    with torch.no_grad():
        evaluated, trained = model(**batch), model.train()(**batch)
    assert evaluated.logits.shape == (8, 12, NUM_IDS)
    torch.testing.assert_close(evaluated.loss, trained.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(evaluated.logits[batch["labels"] != -100], trained.logits, atol=1e-5, rtol=1e-6)


def test_packed_cells_without_labels_give_logits_where_they_are_read() -> None:
    model, batch = build(GeneBertForPhenotypicMLM), packed(make_cells())
    del batch["labels"]
    positions = batch.pop("label_positions")
    with torch.no_grad():
        everywhere = model(**batch)
        there = model(**batch, label_positions=positions)
    assert everywhere.logits.shape == (50, NUM_IDS) and there.loss is None
    torch.testing.assert_close(there.logits, everywhere.logits[positions], atol=1e-5, rtol=1e-6)


def test_a_token_competes_only_among_the_ids_of_its_type() -> None:
    model = build(GeneBertForPhenotypicMLM)
    types = torch.tensor([0, 1, 2, 3, 19])
    allowed = model.restrict_logits(torch.zeros(5, NUM_IDS), types) == 0
    assert allowed.int().tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1],
    ]


def test_returned_logits_leave_a_token_only_the_ids_of_its_type() -> None:
    batch = packed(make_cells())
    types = batch["token_type_ids"][batch["label_positions"]]
    with torch.no_grad():
        typed = build(GeneBertForPhenotypicMLM)(**batch).logits.softmax(-1)
    assert (typed[types == 1][:, [*range(4), *range(6, NUM_IDS)]] == 0).all()
    assert (typed[types == 1][:, 4:6] > 0).all()


def test_the_two_loss_parts_are_means_of_their_own_tokens() -> None:
    config = tiny_config(phenotype_loss_weight=2.0, gene_loss_weight=0.5)
    logits = torch.zeros(4, NUM_IDS)
    logits[0, :7] = torch.tensor([0, 0, 0, 0, 5.0, 0, 0])
    labels = torch.tensor([4, 10, 11, -100])
    loss, phenotypes, genes = masked_loss(logits, labels, config=config)
    uniform = torch.tensor(float(NUM_IDS)).log()
    expected = (torch.tensor(5.0).exp() + NUM_IDS - 1).log() - 5
    torch.testing.assert_close(phenotypes, expected)
    torch.testing.assert_close(genes, uniform)
    torch.testing.assert_close(loss, 2 * expected + 0.5 * uniform)


@pytest.mark.parametrize("form", [padded, packed], ids=["padded", "packed"])
@pytest.mark.parametrize("counts", ["two", "one"])
def test_one_batch_of_eight_equals_two_accumulated_of_four(form: Callable[..., dict[str, Any]], counts: str) -> None:
    model, cells = build(GeneBertForPhenotypicMLM).train(), make_cells()
    labels = torch.cat([cell["labels"] for cell in cells])
    of_parts = torch.stack([((labels >= 0) & (labels < FIRST_BIN)).sum(), (labels >= FIRST_BIN).sum()])
    items = of_parts if counts == "two" else of_parts.sum()
    whole = model(**form(cells), num_items_in_batch=items)
    halves = [model(**form(half), num_items_in_batch=items) for half in (cells[:4], cells[4:])]
    torch.testing.assert_close(halves[0].loss + halves[1].loss, whole.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(halves[0].loss_genes + halves[1].loss_genes, whole.loss_genes, atol=1e-6, rtol=1e-6)
    if counts == "two":
        torch.testing.assert_close(whole.loss, model(**form(cells)).loss, atol=1e-6, rtol=1e-6)
    summed = gradients(model, halves[0].loss + halves[1].loss)
    assert_same_gradients(summed, gradients(model, whole.loss), atol=1e-6)


@pytest.mark.parametrize("form", [padded, packed], ids=["padded", "packed"])
def test_a_batch_without_labels_to_learn_gives_zero_loss_and_finite_gradients(
    form: Callable[..., dict[str, Any]],
) -> None:
    model, cells = build(GeneBertForPhenotypicMLM).train(), make_cells()
    for cell in cells:
        cell["labels"].fill_(-100)
    output = model(**form(cells))
    assert output.loss.item() == 0
    grads = gradients(model, output.loss)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all((grad == 0).all() for grad in grads.values())


def test_phenotypes_without_genes_give_a_zero_gene_part() -> None:
    model, batch = build(GeneBertForPhenotypicMLM).train(), padded(make_cells())
    batch["labels"][:, 3:] = -100
    output = model(**batch)
    assert output.loss_genes.item() == 0
    torch.testing.assert_close(output.loss.detach(), output.loss_phenotypes)


def test_packed_classification_loss_and_gradients_equal_padded_ones() -> None:
    model, cells = build(GeneBertForClassification).train(), make_cells()
    labels = torch.arange(8) % 3
    one = model(**encoder_inputs(padded(cells)), labels=labels)
    other = model(**encoder_inputs(packed(cells)), labels=labels)
    assert one.logits.shape == (8, 3)
    torch.testing.assert_close(one.logits, other.logits, atol=1e-5, rtol=0)
    assert_same_gradients(gradients(model, one.loss), gradients(model, other.loss), atol=1e-5)


def test_class_weights_weigh_and_their_denominator_is_explicit() -> None:
    logits, labels = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1, -100])
    log_2, second = torch.tensor(2.0).log(), (torch.tensor(2.0).exp() + 1).log()
    weighted = 3 * log_2 + 1 * second
    torch.testing.assert_close(weighted_loss(logits, labels, class_weights=[3.0, 1.0]), weighted / 4)
    torch.testing.assert_close(
        weighted_loss(logits, labels, class_weights=[3.0, 1.0], num_items_in_batch=2), weighted / 2
    )
    torch.testing.assert_close(weighted_loss(logits, labels), (log_2 + second) / 2)
    assert weighted_loss(logits, torch.full((3,), -100)).item() == 0


def test_weighted_classification_of_eight_equals_two_accumulated_of_four() -> None:
    model, cells = build(GeneBertForClassification, class_weights=[0.5, 1.0, 3.0]).train(), make_cells()
    labels = torch.arange(8) % 3
    whole = model(**encoder_inputs(padded(cells)), labels=labels, num_items_in_batch=torch.tensor(8)).loss
    halves = [
        model(**encoder_inputs(padded(cells[half])), labels=labels[half], num_items_in_batch=torch.tensor(8)).loss
        for half in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(halves[0] + halves[1], whole, atol=1e-6, rtol=1e-6)
    summed = gradients(model, halves[0] + halves[1])
    assert_same_gradients(summed, gradients(model, whole), atol=1e-6)


def test_as_many_class_weights_as_classes_are_asked_for() -> None:
    with pytest.raises(InputError, match="2 weights for 3 classes"):
        GeneBertForClassification(tiny_config(class_weights=[1.0, 2.0]))
