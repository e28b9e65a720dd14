"""The model: packed cells, attention kernels, heads, losses, saving and loading."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
)
from transformers.models.distilbert.modeling_distilbert import Transformer

from perturbgene.configs import MlmConfig
from perturbgene.errors import InputError
from perturbgene.model.attention import attention
from perturbgene.model.config import GeneBertConfig, load_preset
from perturbgene.model.heads import (
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    masked_loss,
    weighted_loss,
)
from perturbgene.model.layers import BRANCH_GAIN, Dropout, GeneBertModel, linear
from perturbgene.model.packing import Packing

torch.set_num_threads(1)

PAD, FIRST_BIN, NUM_IDS, NUM_TYPES = 3, 9, 14, 20
LENGTHS = [7, 4, 9, 4, 5, 12, 3, 6]
PHENOTYPE_RANGES = [[4, 6], [6, 9]]  # two categories: ids 4..5 and 6..8; bins are 9..13


def tiny_config(**settings: Any) -> GeneBertConfig:
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "dropout": 0.0,
    }
    ids = {"vocab_size": NUM_IDS, "type_vocab_size": NUM_TYPES, "first_bin_id": FIRST_BIN}
    defaults = {
        "phenotype_id_ranges": PHENOTYPE_RANGES,
        "classifier_dropout": 0.0,
        "initializer_range": 0.3,
        "num_labels": 3,
        "bin_gain_range": 0,
        "direct_path": True,
    }
    return GeneBertConfig(**{**sizes, **ids, **defaults, **settings})


def build(model_class: type, **settings: Any) -> Any:
    """Make a model whose every weight, LayerNorms and biases included, is random and the same each time."""
    torch.manual_seed(0)
    model = model_class(tiny_config(**settings))
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            nn.init.normal_(weight, mean=1.0 if "norm.weight" in name else 0.0, std=0.2)
        if name.endswith("votes_tk"):
            nn.init.normal_(weight, std=0.2)
    return model.eval()


def make_cells(lengths: list[int] = LENGTHS) -> list[dict[str, Tensor]]:
    """Cells of [CLS], one slot of each category, and genes; the slots and every second gene are masked and labelled."""
    draw = torch.Generator().manual_seed(1)
    cells = []
    for length in lengths:
        genes = 3 + torch.randperm(NUM_TYPES - 3, generator=draw)[: length - 3].sort().values
        bins = torch.randint(FIRST_BIN, NUM_IDS, (length - 3,), generator=draw)
        types = torch.cat([torch.tensor([0, 1, 2]), genes])
        truth = torch.cat([torch.tensor([0, 4 + length % 2, 6 + length % 3]), bins])
        is_labelled = (torch.arange(length) > 0) & ((torch.arange(length) < 3) | (torch.arange(length) % 2 == 0))
        cells.append(
            {
                "input_ids": torch.where(is_labelled, 2, truth),
                "token_type_ids": types,
                "labels": torch.where(is_labelled, truth, -100),
            }
        )
    return cells


def padded(cells: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    fill = {"input_ids": PAD, "token_type_ids": 0, "labels": -100}
    batch = {
        name: nn.utils.rnn.pad_sequence([cell[name] for cell in cells], batch_first=True, padding_value=fill[name])
        for name in fill
    }
    return {**batch, "attention_mask": (batch["input_ids"] != PAD).long()}


def packed(cells: list[dict[str, Tensor]]) -> dict[str, Any]:
    lengths = [len(cell["input_ids"]) for cell in cells]
    labels = torch.cat([cell["labels"] for cell in cells])
    positions = (labels != -100).nonzero().squeeze(1)
    return {
        "input_ids": torch.cat([cell["input_ids"] for cell in cells]),
        "token_type_ids": torch.cat([cell["token_type_ids"] for cell in cells]),
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
        "max_seqlen": max(lengths),
        "lengths": lengths,
        "label_positions": positions,
        "labels": labels[positions],
    }


def encoder_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("labels", "label_positions")}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same_gradients(left: dict[str, Tensor], right: dict[str, Tensor], *, atol: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


# the encoder


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


def by_hand_cell(**more: Any) -> dict[str, Any]:
    """[CLS], a masked slot of the second category, a gene in bin 2, one in bin 0, a masked one, [EOS]."""
    ids = torch.tensor([0, 2, FIRST_BIN + 2, FIRST_BIN, 2, 1])
    types = torch.tensor([0, 2, 5, 6, 7, 0])
    return {"input_ids": ids, "token_type_ids": types, "cu_seqlens": torch.tensor([0, 6]), **more}


def test_only_expressed_genes_vote_and_as_strongly_as_their_bin_counts() -> None:
    config = {"bin_gain_range": 1.0, "bin_levels": [0.0, 0.5, 0.75, 1.0, 1.75]}
    masked, classifier = (build(kind, **config) for kind in (GeneBertForPhenotypicMLM, GeneBertForClassification))
    for model, path in ((masked, masked.direct_labels), (classifier, classifier.direct_classes)):
        with torch.no_grad():
            model.genebert.embeddings.type_gain[FIRST_BIN:] = torch.tensor(config["bin_levels"])
            with_votes = model(**by_hand_cell()).logits
            votes = path.votes_tk[5].clone() * 0.75
            path.votes_tk[5] = 0
            without = model(**by_hand_cell()).logits
            path.votes_tk.zero_()
            assert torch.equal(model(**by_hand_cell()).logits, without)  # bin 0, the masked gene and [CLS] say nothing
        if model is masked:
            assert torch.equal(with_votes[2:], without[2:])  # genes are not labels
            torch.testing.assert_close((with_votes - without)[1, 6:9], votes[2:])  # ids 6..8, the slot's own category
            assert torch.equal(with_votes[1, 4:6], without[1, 4:6])  # another category's stay out
        else:
            torch.testing.assert_close((with_votes - without)[0], votes)


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


def test_a_vote_needs_the_ids_beside_embeddings() -> None:
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


# attention


def random_qkv(lengths: list[int], *, heads: int = 2, head_size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    q, k, v = torch.randn(3, sum(lengths), heads, head_size).unbind(0)
    return q, k, v


def packing_of(lengths: list[int]) -> Packing:
    return Packing.of(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]), lengths=lengths)


def test_explicit_matmuls_equal_sdpa() -> None:
    (q, k, v), where = random_qkv(LENGTHS), packing_of(LENGTHS)
    gate = torch.randn(sum(LENGTHS))
    for gate_l in (None, gate):
        outs = [
            attention(q, k, v, queries=where, keys=where, kernel=kernel, key_log_gate_l=gate_l)
            for kernel in ("matmul", "sdpa")
        ]
        torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths", [[32, 64], [31, 33], [1, 65]], ids=["blocks", "beside blocks", "one token"])
def test_rounding_cells_up_to_blocks_changes_no_result(lengths: list[int]) -> None:
    parts, where = [part.requires_grad_() for part in random_qkv(lengths)], packing_of(lengths)
    outs = [attention(*parts, queries=where, keys=where, kernel=kernel) for kernel in ("matmul", "sdpa")]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=0)
    by_kernel = [torch.autograd.grad(out.square().sum(), parts) for out in outs]
    torch.testing.assert_close(by_kernel[0], by_kernel[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["matmul", "sdpa"])
def test_rows_of_no_cell_get_no_output_and_no_gradient(kernel: str) -> None:
    q, k, v = (part.requires_grad_() for part in random_qkv([5, 3, 4]))
    where = packing_of([5, 3])
    out = attention(q, k, v, queries=where, keys=where, kernel=kernel)
    assert (out[8:] == 0).all()
    for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert (gradient[8:] == 0).all()
        assert (gradient[:8] != 0).all()


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


def plain_attention(q: Tensor, k: Tensor, v: Tensor, *, queries: list[int], keys: list[int]) -> Tensor:
    """Attention of each cell by its formula, left to autograd."""
    outs = []
    for q_chd, k_chd, v_chd in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        logits = torch.einsum("qhd,khd->hqk", q_chd, k_chd) / q.shape[-1] ** 0.5
        outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v_chd))
    return torch.cat(outs)


@pytest.mark.parametrize("queries", [[3, 1, 5], [1, 0, 2]], ids=["every token asks", "some tokens ask, one cell none"])
def test_the_backward_pass_of_explicit_matmuls_is_that_of_the_formula(queries: list[int]) -> None:
    keys = [3, 1, 5]
    _, k, v = (part.double().requires_grad_() for part in random_qkv(keys, head_size=4))
    q = torch.randn(sum(queries), 2, 4, dtype=torch.double, requires_grad=True)
    gate = torch.randn(sum(keys), dtype=torch.double, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        asks, knows = packing_of(queries), packing_of(keys)
        return attention(q, k, v, queries=asks, keys=knows, kernel="matmul", key_log_gate_l=gate)

    assert torch.autograd.gradcheck(attend, (q, k, v, gate))
    ours = torch.autograd.grad(attend(q, k, v, torch.zeros_like(gate)).square().sum(), (q, k, v))
    theirs = torch.autograd.grad(plain_attention(q, k, v, queries=queries, keys=keys).square().sum(), (q, k, v))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, atol=1e-12, rtol=1e-10)


@pytest.mark.bf16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_explicit_matmuls_equal_those_of_sdpa(dtype: torch.dtype) -> None:
    parts, where = [part.to(dtype).requires_grad_() for part in random_qkv(LENGTHS)], packing_of(LENGTHS)
    by_kernel = []
    for kernel in ("matmul", "sdpa"):
        out = attention(*parts, queries=where, keys=where, kernel=kernel)
        by_kernel.append(torch.autograd.grad(out.square().sum(), parts))
    for ours, theirs in zip(*by_kernel, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)


def test_a_gate_alone_gets_its_gradient_from_explicit_matmuls() -> None:
    (q, k, v), where = random_qkv(LENGTHS), packing_of(LENGTHS)
    gate = torch.zeros(sum(LENGTHS), requires_grad=True)
    out = attention(q, k, v, queries=where, keys=where, kernel="matmul", key_log_gate_l=gate)
    (screen,) = torch.autograd.grad(out.square().sum(), gate)
    assert screen.shape == gate.shape and screen.abs().sum() > 0


def test_attention_of_one_cell_by_hand() -> None:
    q = torch.tensor([[[1.0]]])
    k = torch.tensor([[[0.0]], [[2.0]]]).log1p()  # logits log(1) and log(3)
    v = torch.tensor([[[4.0]], [[8.0]]])
    one, two = packing_of([1]), packing_of([2])
    assert attention(q, k, v, queries=one, keys=two).item() == pytest.approx(0.25 * 4 + 0.75 * 8)
    gate = torch.tensor([3.0, 1.0]).log()  # equal odds
    assert attention(q, k, v, queries=one, keys=two, key_log_gate_l=gate).item() == pytest.approx(6.0)


@pytest.mark.parametrize("kernel", ["matmul", "sdpa"])
def test_the_gate_is_differentiable_and_zero_has_no_effect(kernel: str) -> None:
    (q, k, v), where = random_qkv([3, 5]), packing_of([3, 5])
    gate = torch.zeros(8, requires_grad=True)
    gated = attention(q, k, v, queries=where, keys=where, kernel=kernel, key_log_gate_l=gate)
    torch.testing.assert_close(gated, attention(q, k, v, queries=where, keys=where, kernel=kernel), atol=1e-6, rtol=0)
    gated.square().sum().backward()
    assert gate.grad is not None and (gate.grad != 0).all()
    step = torch.zeros(8)
    step[4] = 1e-2
    sums = [
        attention(q, k, v, queries=where, keys=where, kernel=kernel, key_log_gate_l=sign * step).square().sum()
        for sign in (1, -1)
    ]
    assert gate.grad[4].item() == pytest.approx(((sums[0] - sums[1]) / 2e-2).item(), rel=1e-2)


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


def test_a_padded_gate_equals_the_packed_one() -> None:
    model, cells = build(GeneBertForClassification), make_cells()
    batch = encoder_inputs(padded(cells))
    gate_nl = torch.randn(batch["input_ids"].shape)
    gate_l = gate_nl[batch["attention_mask"].bool()]
    with torch.no_grad():
        one = model(**batch, key_log_gate=gate_nl).logits
        other = model(**encoder_inputs(packed(cells)), key_log_gate=gate_l).logits
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.bf16
def test_bf16_autocast_stays_close_to_float32_and_takes_explicit_matmuls() -> None:
    model, batch = build(GeneBertForPhenotypicMLM, initializer_range=0.05), packed(make_cells())
    with torch.no_grad():
        exact = model(**batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(**batch)
    assert rough.loss.dtype == torch.float32
    torch.testing.assert_close(rough.loss, exact.loss, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("kernel", "message"), [("xyz", "Known: 'auto'"), ("varlem", "Did you mean 'varlen'")], ids=["unknown", "typo"]
)
def test_an_unknown_attention_kernel_is_refused(kernel: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_config(attention_kernel=kernel)


def test_a_gpu_kernel_on_cpu_says_what_to_use_instead() -> None:
    model = build(GeneBertModel, attention_kernel="varlen")
    with pytest.raises(InputError, match="Use 'auto'"):
        model(**encoder_inputs(packed(make_cells())))


def test_flash_without_flash_attn_is_refused_when_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="flash_attn, which is not installed"):
        GeneBertModel(tiny_config(attention_kernel="flash"))
    with pytest.raises(InputError, match="flash_attn, which is not installed"):
        GeneBertModel(tiny_config(attn_implementation="flash_attention_2"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_varlen_on_a_gpu_equals_sdpa(gated: bool) -> None:
    q, k, v = (part.cuda().bfloat16() for part in random_qkv(LENGTHS))
    where = Packing.of(packing_of(LENGTHS).cu_seqlens.cuda(), lengths=LENGTHS)
    gate = torch.randn(sum(LENGTHS), device="cuda") if gated else None
    outs = [
        attention(q, k, v, queries=where, keys=where, kernel=kernel, key_log_gate_l=gate)
        for kernel in ("varlen", "sdpa")
    ]
    torch.testing.assert_close(outs[0], outs[1], atol=2e-2, rtol=2e-2)


# dropout


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


# the masked head


def test_packed_masked_loss_and_gradients_equal_padded_ones() -> None:
    model, cells = build(GeneBertForPhenotypicMLM).train(), make_cells()
    from_padded, from_packed = model(**padded(cells)), model(**packed(cells))
    torch.testing.assert_close(from_padded.loss, from_packed.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(from_padded.logits, from_packed.logits, atol=1e-5, rtol=1e-6)
    assert_same_gradients(gradients(model, from_padded.loss), gradients(model, from_packed.loss), atol=1e-5)


def test_evaluation_returns_all_logits_and_the_same_loss_as_training() -> None:
    model, batch = build(GeneBertForPhenotypicMLM), padded(make_cells())
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


# the classifier


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


# configuration, saving and loading


@pytest.mark.parametrize(
    ("model_class", "auto_class"),
    [
        (GeneBertModel, AutoModel),
        (GeneBertForPhenotypicMLM, AutoModelForMaskedLM),
        (GeneBertForClassification, AutoModelForSequenceClassification),
    ],
)
@pytest.mark.parametrize("norm_position", ["post", "branch"])
def test_a_loaded_model_equals_the_saved_one(
    model_class: type, auto_class: Any, norm_position: str, tmp_path: Path
) -> None:
    saved = build(model_class, norm_position=norm_position)
    saved.save_pretrained(tmp_path)
    batch = encoder_inputs(padded(make_cells()))
    for loader in (model_class, auto_class):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is model_class
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for name, weight in saved.state_dict().items():
            assert torch.equal(weight, loaded.state_dict()[name]), name
        with torch.no_grad():
            assert torch.equal(saved(**batch)[0], loaded.eval()(**batch)[0])


def test_a_classifier_takes_the_encoder_of_a_masked_model(tmp_path: Path) -> None:
    masked = build(GeneBertForPhenotypicMLM)
    masked.save_pretrained(tmp_path)
    classifier = GeneBertForClassification.from_pretrained(tmp_path, num_labels=4)
    for name, weight in masked.genebert.state_dict().items():
        assert torch.equal(weight, classifier.genebert.state_dict()[name]), name
    assert classifier.classifier.out_features == 4


def test_the_configuration_survives_saving_but_for_the_kernel(tmp_path: Path) -> None:
    names = {0: "B", 1: "T"}
    config = tiny_config(attention_kernel="sdpa", class_weights=[1.0, 2.0, 3.0], tokenizer_fingerprint="ab12")
    config.id2label, config.label2id = names, {"B": 0, "T": 1}
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, GeneBertConfig)
    assert loaded.attention_kernel == "auto"
    assert loaded.id2label == names and loaded.num_labels == 2
    for name, value in config.to_dict().items():
        assert name == "_name_or_path" or loaded.to_dict()[name] == value, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bin_gain_range": 1.5}, "bin_gain_range is 1.5"),
        ({"bin_levels": [0.0, 1.0]}, "bin_levels holds 2 numbers for 5 bins"),
        ({"norm_position": "pre"}, "norm_position cannot be 'pre'"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "cannot be split into 4 attention heads"),
        ({"phenotype_id_ranges": [[4, 6], [6, 99]]}, "reaches beyond first_bin_id"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny_config(**settings)


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads"),
    [("tiny", 2, 64, 4), ("small", 4, 256, 4), ("base", 12, 768, 12), ("large", 24, 1024, 16)],
)
def test_presets_have_the_original_sizes(name: str, layers: int, width: int, heads: int) -> None:
    config = GeneBertConfig(**load_preset(name))
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)


def test_a_default_configuration_is_what_presets_and_commands_train() -> None:
    config = GeneBertConfig()
    for name in ("tiny", "small", "base", "large"):
        preset = load_preset(name)
        assert (config.norm_position, config.bin_gain_range) == (preset["norm_position"], preset["bin_gain_range"])
    assert config.gene_loss_weight == MlmConfig.gene_loss_weight
    assert config.phenotype_loss_weight == MlmConfig.phenotype_loss_weight


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'small'"):
        load_preset("smal")


def test_fresh_weights_are_small_and_norms_neutral() -> None:
    torch.manual_seed(0)
    model = GeneBertForPhenotypicMLM(tiny_config(initializer_range=0.02, hidden_size=64))
    weights = dict(model.named_parameters())
    assert weights["genebert.layers.0.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert (weights["genebert.layers.0.qkv.bias"] == 0).all()
    assert (weights["genebert.final_norm.weight"] == 1).all()
    assert (weights["genebert.embeddings.word_embeddings.weight"][PAD] == 0).all()


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
