"""Padded and packed batches give the same answers; what is no batch is refused."""

from typing import Any

import pytest
import torch

from perturbgene.errors import InputError
from perturbgene.model.heads import (
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
)
from perturbgene.model.layers import GeneBertModel
from tests.random_models import build, encoder_inputs, make_cells, packed, padded


@pytest.mark.parametrize("norm_position", ["post", "branch"])
def test_packed_hidden_states_equal_padded_ones(norm_position: str) -> None:
    model, cells = build(GeneBertModel, norm_position=norm_position), make_cells()
    batch = padded(cells)
    with torch.no_grad():
        hidden_nlh = model(**encoder_inputs(batch)).last_hidden_state
        hidden_lh = model(**encoder_inputs(packed(cells))).last_hidden_state
    is_token_nl = batch["attention_mask"].bool()
    torch.testing.assert_close(hidden_lh, hidden_nlh[is_token_nl], atol=1e-5, rtol=0)
    assert (hidden_nlh[~is_token_nl] == 0).all()


def test_left_padding_changes_nothing_because_tokens_have_no_position() -> None:
    model, batch = build(GeneBertModel), encoder_inputs(padded(make_cells()))
    flipped = {name: value.flip(1) for name, value in batch.items()}
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
        hidden_flipped = model(**flipped).last_hidden_state
    torch.testing.assert_close(hidden, hidden_flipped.flip(1), atol=1e-5, rtol=0)


def test_a_batch_of_eight_equals_eight_batches_of_one() -> None:
    model, cells = build(GeneBertForPhenotypicMLM), make_cells()
    with torch.no_grad():
        together = model(**padded(cells)).logits
        for row, cell in enumerate(cells):
            alone = model(**padded([cell])).logits[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, atol=1e-5, rtol=1e-6)


def test_a_mask_that_is_left_out_is_read_from_the_padding() -> None:
    model, batch = build(GeneBertModel), encoder_inputs(padded(make_cells()))
    without = {name: value for name, value in batch.items() if name != "attention_mask"}
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, model(**without).last_hidden_state)


def test_lengths_that_are_left_out_are_read_from_cu_seqlens() -> None:
    model, batch = build(GeneBertModel), encoder_inputs(packed(make_cells()))
    bare = {name: batch[name] for name in ("input_ids", "token_type_ids", "cu_seqlens")}
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, model(**bare).last_hidden_state)


def test_a_padded_gate_equals_the_packed_one() -> None:
    model, cells = build(GeneBertForClassification), make_cells()
    batch = encoder_inputs(padded(cells))
    gate_nl = torch.randn(batch["input_ids"].shape)
    gate_l = gate_nl[batch["attention_mask"].bool()]
    with torch.no_grad():
        one = model(**batch, key_log_gate=gate_nl).logits
        other = model(**encoder_inputs(packed(cells)), key_log_gate=gate_l).logits
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "neither input_ids nor inputs_embeds"),
        ({"token_type_ids": None}, "without token_type_ids"),
        ({"input_ids": torch.zeros(5, dtype=torch.long)}, "needs cu_seqlens"),
        ({"attention_mask": torch.zeros(8, 12)}, "leaves row 0 without a token"),
    ],
    ids=["no tokens", "no types", "packed without bounds", "empty cell"],
)
def test_inputs_that_are_no_batch_are_refused(change: dict[str, Any], message: str) -> None:
    model, batch = build(GeneBertModel), encoder_inputs(padded(make_cells()))
    with pytest.raises(InputError, match=message):
        model(**{**batch, **change})
