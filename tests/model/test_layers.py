"""Embeddings, layers and the encoder: equal to DistilBERT's where they should be, and to their own other forms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DistilBertConfig,
)
from transformers.models.distilbert.modeling_distilbert import Transformer
from transformers.utils import logging as bars

from perturbgene.model.heads import (
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
)
from perturbgene.model.layers import BRANCH_GAIN, Dropout, GeneBertModel, linear
from tests.random_models import (
    FIRST_BIN,
    LENGTHS,
    NUM_IDS,
    PAD,
    assert_same_gradients,
    build,
    encoder_inputs,
    gradients,
    make_cells,
    packed,
    padded,
    tiny_config,
)


def test_post_norm_hidden_states_equal_distilberts_own_layers() -> None:
    model = build(GeneBertModel, norm_position="post").double()
    settings = DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, dropout=0.0, attention_dropout=0.0)
    settings._attn_implementation = "eager"
    theirs = Transformer(settings).double().eval()
    for ours, layer in zip(model.layers, theirs.layer, strict=True):
        attention_part = layer.attention
        for part, (weight, bias) in zip(
            (attention_part.q_lin, attention_part.k_lin, attention_part.v_lin),
            zip(ours.qkv.weight.chunk(3), ours.qkv.bias.chunk(3), strict=True),
            strict=True,
        ):
            part.load_state_dict({"weight": weight, "bias": bias})
        attention_part.out_lin.load_state_dict(ours.attention_out.state_dict())
        layer.sa_layer_norm.load_state_dict(ours.attention_norm.state_dict())
        layer.ffn.lin1.load_state_dict(ours.ffn_in.state_dict())
        layer.ffn.lin2.load_state_dict(ours.ffn_out.state_dict())
        layer.output_layer_norm.load_state_dict(ours.ffn_norm.state_dict())

    batch = encoder_inputs(padded(make_cells()))
    is_token_nl = batch["attention_mask"].bool()
    bias_n11l = torch.zeros(is_token_nl.shape).double().masked_fill(~is_token_nl, -1e30)[:, None, None]
    with torch.no_grad():
        embedded = model.embeddings(batch["input_ids"], batch["token_type_ids"])
        expected = theirs(embedded, bias_n11l).last_hidden_state
        hidden = model(**batch).last_hidden_state
    torch.testing.assert_close(hidden[is_token_nl], expected[is_token_nl], atol=1e-10, rtol=0)


def test_branch_norm_leaves_a_short_gene_vector_short_where_post_norm_does_not() -> None:
    cells = encoder_inputs(packed(make_cells()))
    moved = {}
    for norm_position in ("post", "branch"):
        model = build(GeneBertModel, norm_position=norm_position, num_hidden_layers=1)
        with torch.no_grad():
            before = model(**cells, read_positions=torch.tensor([0])).last_hidden_state
            gene = int(cells["token_type_ids"][4])  # a gene of the first cell
            embeds = model.embeddings.summed(cells["input_ids"], cells["token_type_ids"])
            embeds[4] *= 1e-3 / embeds[4].norm()
            cells_of_gene = {name: value for name, value in cells.items() if not name.endswith("_ids")}
            short = model(**cells_of_gene, inputs_embeds=embeds, read_positions=torch.tensor([0])).last_hidden_state
            embeds[4] *= -1
            turned = model(**cells_of_gene, inputs_embeds=embeds, read_positions=torch.tensor([0])).last_hidden_state
        assert gene >= 3 and not torch.equal(before, short)
        moved[norm_position] = float((short - turned).norm())
    assert moved["branch"] < 0.01 * moved["post"]


def test_a_bin_scales_its_gene_and_starts_on_a_ramp() -> None:
    torch.manual_seed(0)
    model = GeneBertModel(tiny_config(norm_position="branch", bin_gain_range=0.5))
    gains = model.embeddings.type_gain.detach()
    assert torch.equal(gains[:FIRST_BIN], torch.ones(FIRST_BIN))
    torch.testing.assert_close(gains[FIRST_BIN:], torch.linspace(0.5, 1.5, NUM_IDS - FIRST_BIN))
    ids, types = torch.tensor([FIRST_BIN, NUM_IDS - 1]), torch.tensor([5, 5])
    words, gene = model.embeddings.word_embeddings(ids), model.embeddings.token_type_embeddings(types)
    expected = words + torch.tensor([[0.5], [1.5]]) * gene
    torch.testing.assert_close(model.embeddings.eval()(ids, types), expected)


def test_gains_start_at_how_much_expression_a_bin_stands_for() -> None:
    levels = [0.0, 0.5, 0.75, 1.0, 1.75]
    model = GeneBertModel(tiny_config(bin_gain_range=0.5, bin_levels=levels))
    gains = model.embeddings.type_gain.detach()
    torch.testing.assert_close(gains[FIRST_BIN:], torch.tensor([0.5, 0.75, 0.875, 1.0, 1.375]))


def test_the_feed_forward_branch_starts_quiet_with_branch_norm_only() -> None:
    for norm_position, gain in (("branch", BRANCH_GAIN), ("post", 1.0)):
        layer = GeneBertModel(tiny_config(norm_position=norm_position)).layers[0]
        assert (layer.ffn_norm.weight == gain).all()
        assert (layer.attention_norm.weight == 1).all()


def test_learnt_gains_survive_saving(tmp_path: Path) -> None:
    model = GeneBertModel(tiny_config(bin_gain_range=0.5))
    with torch.no_grad():
        model.embeddings.type_gain.add_(torch.arange(NUM_IDS) / 7)
    model.save_pretrained(tmp_path)
    again = GeneBertModel.from_pretrained(tmp_path)
    assert torch.equal(again.embeddings.type_gain, model.embeddings.type_gain)
    assert "type_gain" in dict(
        GeneBertForClassification.from_pretrained(tmp_path).genebert.embeddings.named_parameters()
    )


@pytest.mark.parametrize("norm_position", ["post", "branch"])
@pytest.mark.parametrize("positions", [[0, 3, 7, 8, 30, 49], [20], []], ids=["some cells", "one token", "no token"])
def test_reading_at_positions_equals_reading_everywhere(norm_position: str, positions: list[int]) -> None:
    model, batch = build(GeneBertModel, norm_position=norm_position), encoder_inputs(packed(make_cells()))
    reads = torch.tensor(positions, dtype=torch.long)
    with torch.no_grad():
        everywhere = model(**batch).last_hidden_state
        there = model(**batch, read_positions=reads).last_hidden_state
    torch.testing.assert_close(there, everywhere[reads], atol=1e-5, rtol=0)


def test_hidden_states_start_with_the_embeddings_and_end_with_the_output() -> None:
    model, batch = build(GeneBertModel), encoder_inputs(padded(make_cells()))
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
        embedded = model.embeddings(batch["input_ids"], batch["token_type_ids"])
    is_token_nl = batch["attention_mask"].bool()
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(output.hidden_states[0][is_token_nl], embedded[is_token_nl])
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize("form", [padded, packed], ids=["padded", "packed"])
def test_inputs_embeds_stand_for_the_sum_of_word_and_type_embeddings(form: Callable[..., dict[str, Any]]) -> None:
    model, batch = build(GeneBertModel), encoder_inputs(form(make_cells()))
    embeds = model.embeddings.summed(batch["input_ids"], batch["token_type_ids"])
    bounds = {name: value for name, value in batch.items() if name not in ("input_ids", "token_type_ids")}
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        torch.testing.assert_close(model(**bounds, inputs_embeds=embeds).last_hidden_state, expected)


def test_gradient_checkpointing_keeps_loss_and_gradients() -> None:
    model, batch = build(GeneBertForPhenotypicMLM).train(), packed(make_cells())
    plain = model(**batch).loss
    plain_gradients = gradients(model, plain)
    enable = (
        getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    )  # 5.23 or 5.17
    enable()
    assert all(layer.gradient_checkpointing for layer in model.genebert.layers)
    checkpointed = model(**batch).loss
    torch.testing.assert_close(checkpointed, plain)
    assert_same_gradients(gradients(model, checkpointed), plain_gradients, atol=1e-6)


@pytest.mark.bf16
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("gate", [None, -0.5], ids=["plain", "gated"])
def test_rounding_a_batch_up_changes_no_result(
    monkeypatch: pytest.MonkeyPatch, gate: float | None, *, bf16: bool
) -> None:
    model, batch = build(GeneBertForPhenotypicMLM), packed(make_cells(LENGTHS * 3))
    assert len(batch["input_ids"]) % 64 and len(batch["labels"]) > 64
    if gate is not None:
        batch["key_log_gate"] = torch.full(batch["input_ids"].shape, gate)
    runs = []
    for step in (1, 64):
        monkeypatch.setattr("perturbgene.model.layers.BATCH_STEP", step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output = model(**batch, output_hidden_states=True)
        runs.append((output, gradients(model, output.loss)))
    (exact, exact_gradients), (rounded, rounded_gradients) = runs
    torch.testing.assert_close(rounded.logits, exact.logits)
    torch.testing.assert_close(rounded.hidden_states, exact.hidden_states)
    assert_same_gradients(rounded_gradients, exact_gradients, atol=2e-3)


@pytest.mark.bf16
@pytest.mark.parametrize("how", ["autocast", "bfloat16", "float32"])
def test_a_linear_layer_has_the_bits_of_pytorchs(how: str) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    parts = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((33, 32), (48, 32), (48,))]
    results = []
    for function in (linear, nn.functional.linear):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            out = function(*parts)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), parts)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("kernel", ["matmul", "sdpa"])
def test_hiding_a_token_with_the_gate_equals_deleting_it(num_layers: int, kernel: str) -> None:
    model = build(GeneBertModel, num_hidden_layers=num_layers, attention_kernel=kernel)
    cells = make_cells([7, 4, 9])
    batch = encoder_inputs(packed(cells))
    hidden_token = 7 + 4 + 5  # the sixth token of the third cell
    gate = torch.zeros(20)
    gate[hidden_token] = -1e4
    cells[2] = {name: torch.cat([value[:5], value[6:]]) for name, value in cells[2].items()}
    with torch.no_grad():
        gated = model(**batch, key_log_gate=gate).last_hidden_state
        deleted = model(**encoder_inputs(packed(cells))).last_hidden_state
    others = torch.arange(20) != hidden_token
    torch.testing.assert_close(gated[others], deleted, atol=1e-5, rtol=0)


@pytest.mark.bf16
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_its_share_and_keeps_the_mean(rate: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    ones = torch.ones(301, 1001, dtype=dtype)
    dropped = Dropout(rate)(ones)
    values, counts = dropped.unique(return_counts=True)
    assert len(values) == 2 and values[0] == 0 and dropped.dtype == dtype
    assert float(values[1]) == pytest.approx(1 / (1 - rate), rel=0.02)
    assert counts[0].item() / ones.numel() == pytest.approx(rate, abs=5 * (rate * (1 - rate) / ones.numel()) ** 0.5)


def test_dropout_is_fresh_each_time_the_same_for_a_seed_and_shared_with_the_gradient() -> None:
    ones, dropout = torch.ones(50, 7, requires_grad=True), Dropout(0.3)
    torch.manual_seed(5)
    first, second = dropout(ones), dropout(ones)
    torch.manual_seed(5)
    assert torch.equal(dropout(ones), first) and not torch.equal(first, second)
    (grad,) = torch.autograd.grad(first.sum(), ones)
    assert torch.equal(grad, first)


def test_dropout_passes_values_when_asked_or_without_a_rate() -> None:
    values = torch.randn(4, 3)
    assert torch.equal(Dropout(0.5).eval()(values), values)
    assert torch.equal(Dropout(0.0)(values), values)


def test_fresh_weights_are_small_and_norms_neutral() -> None:
    torch.manual_seed(0)
    model = GeneBertForPhenotypicMLM(tiny_config(initializer_range=0.02, hidden_size=64))
    weights = dict(model.named_parameters())
    assert weights["genebert.layers.0.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert (weights["genebert.layers.0.qkv.bias"] == 0).all()
    assert (weights["genebert.final_norm.weight"] == 1).all()
    assert (weights["genebert.embeddings.word_embeddings.weight"][PAD] == 0).all()


def test_models_are_saved_and_loaded_without_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bars, "_tqdm_active", True)  # the command line may have turned them off
    build(GeneBertModel).save_pretrained(tmp_path)
    GeneBertModel.from_pretrained(tmp_path)
    assert capsys.readouterr() == ("", "")
    assert bars.is_progress_bar_enabled()
