"""The encoder: embeddings without positions, transformer layers, and the model that packs a batch and runs them.

Owns what happens to hidden states; leaves attention's kernels to `attention` and everything of labels to `heads`.
Letters: n cells, l tokens, a tokens whose output is needed, h hidden size, d size of a head, v input ids.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging as bars
from transformers.utils.generic import can_return_tuple

from perturbgene.devices import has_bfloat16
from perturbgene.errors import InputError
from perturbgene.model.attention import AttentionFunction, attention, check_flash_installed
from perturbgene.model.config import GeneBertConfig
from perturbgene.model.packing import PackedCells, Packing, pack_cells

#: Initial LayerNorm gain of the feed-forward branch with "branch", so that attention dominates at first
#: (docs/experiments.md).
BRANCH_GAIN = 0.1
#: On a CPU, rows of a batch are rounded up to multiples of this, so that oneDNN compiles for few shapes.
BATCH_STEP = 64


class Dropout(nn.Dropout):
    """CPU dropout that draws one 64-bit integer per four elements (1.4 ms per million on one core instead of 7.5).

    The rate is met to 1/65,536, and values are scaled by the rate that was met. Other devices use PyTorch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p or input.device.type != "cpu":
            return super().forward(input)
        dropped = min(round(self.p * 2**15), 2**15 - 1)
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: input.numel()].view(input.shape)
        # 0..32767, less the rate: its sign, -1 or 0, and so 0 for a dropped element and 1 for a kept one
        kept = bits.bitwise_and_(2**15 - 1).sub_(dropped).bitwise_right_shift_(15).add_(1)
        return input * kept.to(input.dtype).mul_(2**15 / (2**15 - dropped))


class _OneDnnLinear(torch.autograd.Function):
    """x w^T + b in bfloat16 on the CPU by one call of oneDNN.

    PyTorch's own forward pass copies the bias to every row first, which takes up to 15 % longer for the same bits.
    """

    @staticmethod
    def forward(ctx: Any, x_li: Tensor, weight_oi: Tensor, bias_o: Tensor) -> Tensor:
        ctx.save_for_backward(x_li, weight_oi)
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x_li, weight_oi, bias_o, "none", [], ""))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lo: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_li, weight_oi = ctx.saved_tensors
        return grad_lo.mm(weight_oi), grad_lo.t().mm(x_li), grad_lo.sum(0)


def linear(x_li: Tensor, weight_oi: Tensor, bias_o: Tensor) -> Tensor:
    """Return x w^T + b, (l, i) -> (l, o), with the bits of ``F.linear``."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_li.dtype
    if x_li.device.type == "cpu" and dtype == torch.bfloat16 and has_bfloat16("cpu"):
        return cast(Tensor, _OneDnnLinear.apply(*(part.to(dtype) for part in (x_li, weight_oi, bias_o))))
    return F.linear(x_li, weight_oi, bias_o)


class Linear(nn.Linear):
    """A linear layer that calls ``linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def expression_levels(config: GeneBertConfig) -> tuple[float, ...]:
    """Return what each input id means for the direct path, length v: bins their level, ``[CLS]`` 1, other ids 0."""
    num_bins = config.vocab_size - config.first_bin_id
    levels = config.bin_levels or torch.linspace(0, 2, num_bins).tolist()
    return (1.0, *[0.0] * (config.first_bin_id - 1), 0.0, *levels[1:])


@lru_cache(maxsize=16)
def _levels_on(levels: tuple[float, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return torch.tensor(levels, device=device)


class PositionlessEmbeddings(nn.Module):
    """Word plus type embedding, LayerNorm, dropout: BERT's embeddings without positions, because tokens have no order.

    With ``bin_gain_range`` the type embedding is multiplied by a gain per input id, so that more of a gene weighs more
    from the first step on, as tabular transformers embed numbers (Gorishniy et al. 2021, arXiv:2106.11959). With
    ``norm_position="branch"`` there is no LayerNorm.
    """

    def __init__(self, config: GeneBertConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.type_gain = nn.Parameter(torch.ones(config.vocab_size)) if config.bin_gain_range else None
        has_norm = config.norm_position == "post"
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()
        self.dropout = Dropout(config.dropout)

    def init_own_weights(self) -> None:
        """Set the gains, unless they were loaded: bins by their levels, other ids to 1."""
        if self.type_gain is not None:
            gain_v = torch.ones_like(self.type_gain, requires_grad=False)
            bin_gain_b = gain_v[self.config.first_bin_id :]
            levels = torch.tensor(expression_levels(self.config)[self.config.first_bin_id :], device=gain_v.device)
            bin_gain_b.copy_(1 + self.config.bin_gain_range * (levels - 1))
            init.copy_(self.type_gain, gain_v)

    def summed(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Return word plus type embedding, any shape -> (..., h); ``inputs_embeds`` replaces it."""
        types = self.token_type_embeddings(token_type_ids)
        if self.type_gain is not None:
            types = types * self.type_gain[input_ids][..., None]  # (..., h) * (..., 1)
        return cast(Tensor, self.word_embeddings(input_ids) + types)

    def expression(self, cells: PackedCells) -> Tensor:
        """Return the expression of each token, (l,): the level of its bin, 1 for ``[CLS]`` and 0 for other ids."""
        ids_l = cells.input_ids
        if ids_l is None:
            raise InputError("The direct path needs input_ids next to inputs_embeds. Give them too.")
        level_l = _levels_on(expression_levels(self.config), ids_l.device)[ids_l]
        return level_l if cells.key_log_gate is None else level_l * cells.key_log_gate.exp()

    def forward(
        self, input_ids: Tensor | None = None, token_type_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Embed tokens of any shape (...) -> (..., h); ``inputs_embeds`` replaces word plus type embedding."""
        if inputs_embeds is None:
            assert input_ids is not None and token_type_ids is not None  # checked by pack_cells
            inputs_embeds = self.summed(input_ids, token_type_ids)
        return cast(Tensor, self.dropout(self.norm(inputs_embeds)))


class QuietLayerNorm(nn.LayerNorm):
    """LayerNorm of a branch that starts at ``BRANCH_GAIN``."""

    def init_own_weights(self) -> None:
        """Set the gain, unless it was loaded."""
        init.constant_(self.weight, BRANCH_GAIN)


class GeneBertLayer(GradientCheckpointingLayer):
    """Self-attention and a feed-forward part, each a residual branch with a LayerNorm.

    The LayerNorm is applied to the sum ("post", as in DistilBERT), or to what the branch adds ("branch", as in OLMo 2,
    arXiv:2501.00656, without its normalized queries and keys, which made no difference here).
    """

    def __init__(self, config: GeneBertConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.config = config
        self.attention: AttentionFunction = attention
        self.qkv: nn.Module = Linear(h, 3 * h)
        self.attention_out = Linear(h, h)
        self.attention_norm = nn.LayerNorm(h, eps=config.layer_norm_eps)
        self.ffn_in = Linear(h, config.intermediate_size)
        self.ffn_out = Linear(config.intermediate_size, h)
        norm_class = QuietLayerNorm if config.norm_position == "branch" else nn.LayerNorm
        self.ffn_norm = norm_class(h, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, hidden_lh: Tensor, keys: Packing, queries: Packing | None = None, key_log_gate: Tensor | None = None
    ) -> Tensor:
        """Transform (l, h) -> (l, h), or -> (a, h) at the positions of ``queries`` only."""
        h, heads = hidden_lh.shape[1], self.config.num_attention_heads
        where = {"queries": queries or keys, "keys": keys, "kernel": self.config.attention_kernel}
        if queries is None:
            q, k, v = self.qkv(hidden_lh).view(-1, 3, heads, h // heads).unbind(1)  # (l, 3 h) -> 3 of (l, heads, d)
        else:
            asked_ah = hidden_lh.index_select(0, cast(Tensor, queries.positions))
            if self._folds(asked_ah, keys):
                attended_ahd = self._attend_folded(hidden_lh, asked_ah, **where, key_log_gate_l=key_log_gate)
                return self.after_attention(asked_ah, attended_ahd.flatten(1))
            if isinstance(self.qkv, Linear):
                weight, bias = self.qkv.weight, self.qkv.bias
                q_ah, kv_lh = linear(asked_ah, weight[:h], bias[:h]), linear(hidden_lh, weight[h:], bias[h:])
            else:  # LoRA has wrapped it: its weights alone are not what it computes
                q_ah, kv_lh = self.qkv(asked_ah)[:, :h], self.qkv(hidden_lh)[:, h:]
            q = q_ah.reshape(-1, heads, h // heads)
            k, v = kv_lh.reshape(-1, 2, heads, h // heads).unbind(1)
        attended_ahd = self.attention(q, k, v, **where, key_log_gate_l=key_log_gate)
        # Selected once more, and here: gradients are added in this order, which decides their last bits.
        residual_ah = hidden_lh if queries is None else hidden_lh.index_select(0, cast(Tensor, queries.positions))
        return self.after_attention(residual_ah, attended_ahd.flatten(1))

    def _folds(self, asked_ah: Tensor, keys: Packing) -> bool:
        """Return whether cells have so few queries that their keys and values are better not computed."""
        if self.training or torch.is_grad_enabled() or self.attention is not attention:
            return False
        is_full = asked_ah.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        num_few = len(keys.lengths) * self.config.hidden_size // self.config.num_attention_heads
        return is_full and asked_ah.device.type == "cpu" and isinstance(self.qkv, Linear) and len(asked_ah) < num_few

    def _attend_folded(self, hidden_lh: Tensor, asked_ah: Tensor, **where: Any) -> Tensor:
        """Attend to hidden states in place of keys and values, (a, heads, d).

        For a token x, q (W_k x) = (W_k' q) x, and the bias of keys adds the same to all logits of a query. Values need
        one product too, since sum_j p_j W_v x_j = W_v sum_j p_j x_j.
        """
        h, heads = hidden_lh.shape[1], self.config.num_attention_heads
        qkv = cast(Linear, self.qkv)
        _, key_hdx, value_hdx = qkv.weight.view(3, heads, h // heads, h).unbind(0)
        q_ahd = linear(asked_ah, qkv.weight[:h], qkv.bias[:h]).view(-1, heads, h // heads)
        query_ahx = torch.einsum("ahd,hdx->ahx", q_ahd, key_hdx) * heads**0.5  # attention divides by sqrt(h)
        hidden_lhx = hidden_lh[:, None].expand(-1, heads, -1)
        mean_ahx = self.attention(query_ahx, hidden_lhx, hidden_lhx, **where)
        return torch.einsum("ahx,hdx->ahd", mean_ahx, value_hdx) + qkv.bias[2 * h :].view(heads, -1)

    def after_attention(self, residual_ah: Tensor, attended_ah: Tensor) -> Tensor:
        """Return the layer's output, (..., a, h), from its input and what its attention returned at the same tokens."""
        hidden_ah = self._add(residual_ah, self.attention_out(attended_ah), norm=self.attention_norm)
        inner_ai = self.ffn_in(hidden_ah)
        # In place where no gradient needs what was there: the largest array of all, and a third of the time it takes.
        inner_ai = F.gelu(inner_ai) if torch.is_grad_enabled() else torch.ops.aten.gelu_(inner_ai)
        return self._add(hidden_ah, self.ffn_out(inner_ai), norm=self.ffn_norm)

    def _add(self, residual_ah: Tensor, branch_ah: Tensor, *, norm: nn.Module) -> Tensor:
        if self.config.norm_position == "branch":
            return residual_ah + cast(Tensor, self.dropout(norm(branch_ah)))
        return cast(Tensor, norm(residual_ah + self.dropout(branch_ah)))


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide the bars of single files, "Loading weights" and "Writing model shards", which fill a notebook."""
    was_shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            bars.enable_progress_bar()


class GeneBertPreTrainedModel(PreTrainedModel):
    """What all models share: configuration class, prefix, initialization, choice of attention.

    Transformers' ``attn_implementation`` sets ``attention_kernel``: ``"flash_attention_2"`` means ``"flash"`` and
    ``"eager"`` means ``"matmul"``. ``"sdpa"``, its default, leaves ``attention_kernel`` as it is.
    """

    config: GeneBertConfig
    config_class = GeneBertConfig
    base_model_prefix = "genebert"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _no_split_modules = ["GeneBertLayer"]
    _input_embed_layer = "word_embeddings"

    def __init__(self, config: GeneBertConfig) -> None:
        if config._attn_implementation in ("flash_attention_2", "eager"):
            config.attention_kernel = "flash" if config._attn_implementation == "flash_attention_2" else "matmul"
            config._attn_implementation = "sdpa"  # transformers' own layers are not used, so its checks do not apply
        if config.attention_kernel == "flash":
            check_flash_installed()
        super().__init__(config)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers does, without bars."""
        with without_bars():
            return super().from_pretrained(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save a model as transformers does, without bars."""
        with without_bars():
            super().save_pretrained(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw fresh weights as transformers does, but embeddings with a spread of their own."""
        super()._init_weights(module)
        if isinstance(module, nn.Embedding) and self.config.embedding_range is not None:
            init.normal_(module.weight, std=self.config.embedding_range)
        own_initialization: Any = getattr(module, "init_own_weights", None)
        if own_initialization is not None:
            own_initialization()


class GeneBertModel(GeneBertPreTrainedModel):
    """Positionless embeddings and the encoder."""

    def __init__(self, config: GeneBertConfig) -> None:
        super().__init__(config)
        self.embeddings = PositionlessEmbeddings(config)
        self.layers = nn.ModuleList([GeneBertLayer(config) for _ in range(config.num_hidden_layers)])
        has_norm = config.norm_position == "branch"
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_norm else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        read_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **inputs: Any,
    ) -> BaseModelOutput:
        """Encode cells, padded or packed.

        Args:
            input_ids: As for ``pack_cells``; so are ``token_type_ids``, ``attention_mask`` and ``inputs``.
            read_positions: Ascending flat positions, among the tokens without padding, whose output is needed, (a,).
                The last layer computes only these, and returns (a, h) for padded batches too.
            output_hidden_states: Return the embeddings and each layer's output too; the last is ``last_hidden_state``.

        Returns:
            ``last_hidden_state`` of shape (n, l, h), zeros at padding; (l, h) for packed input; (a, h) with
            ``read_positions``.
        """
        pad_token_id = self.config.pad_token_id
        cells = pack_cells(input_ids, token_type_ids, attention_mask, pad_token_id=pad_token_id, **inputs)
        last, states = self.encode(cells, read_positions, output_hidden_states=output_hidden_states)
        last = last if read_positions is not None else cells.repad(last)
        return BaseModelOutput(last_hidden_state=last, hidden_states=states)

    def encode(
        self, cells: PackedCells, read_positions: Tensor | None = None, *, output_hidden_states: bool | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Return the last hidden states, packed, and on request all of them, in the batch's shape.

        Outside of training, the transformer reads only the first ``config.most_genes`` genes of a cell, as it did in
        training, unless the batch says what ``is_read``; and what is at ``read_positions``. Other states are 0.

        On a CPU the rows are rounded up to a multiple of ``BATCH_STEP``. Float32 does not need that, but draws the same
        dropout as bfloat16 with it.
        """
        whole, most, is_read_l = cells, self.config.most_genes, cells.is_read
        if self.training or most is None or cells.token_type_ids is None:
            most = cells.packing.max_seqlen
        if is_read_l is None and cells.packing.max_seqlen > most + 2:
            is_read_l = cells.is_among_first(most, first_gene_type=1 + len(self.config.phenotype_id_ranges))
        if is_read_l is not None:
            cells = cells.only(is_read_l if read_positions is None else is_read_l.index_fill(0, read_positions, True))
            if read_positions is not None:
                read_positions = torch.searchsorted(cast(Tensor, cells.packing.positions), read_positions)
        layers, hidden_lh = list(self.layers), whole.first_hidden
        if hidden_lh is None:
            hidden_lh = self.embeddings(cells.input_ids, cells.token_type_ids, cells.inputs_embeds)
        else:
            layers = layers[1:]
        gate_l, num_tokens = cells.key_log_gate, len(hidden_lh)
        step = BATCH_STEP if hidden_lh.device.type == "cpu" else 1
        if num_added := -num_tokens % step:  # rows outside of any cell
            hidden_lh = F.pad(hidden_lh, (0, 0, 0, num_added))
            gate_l = None if gate_l is None else F.pad(gate_l, (0, num_added))
        num_read, queries = num_tokens, None
        if read_positions is not None:
            num_read = len(read_positions)
            num_added = -num_read % step if num_read > step else 0  # reads the last token again
            queries = cells.packing.at(F.pad(read_positions, (0, num_added), value=num_tokens - 1))
        is_kept = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states: list[Tensor] = []

        def of_all(hidden_lh: Tensor) -> Tensor:
            if cells is whole:
                return hidden_lh
            index = cast(Tensor, cells.packing.positions)
            shape = (len(cast(Tensor, whole.token_type_ids)), hidden_lh.shape[1])
            return hidden_lh.new_zeros(shape).index_copy(0, index, hidden_lh)

        for layer in layers:
            if is_kept:
                states.append(whole.repad(of_all(hidden_lh[:num_tokens])))
            hidden_lh = layer(hidden_lh, cells.packing, queries if layer is self.layers[-1] else None, gate_l)
        last = self.final_norm(hidden_lh)[:num_read]
        last = of_all(last) if read_positions is None else last
        if is_kept:
            states.append(whole.repad(last) if read_positions is None else last)
        return last, tuple(states) if is_kept else None

    @contextmanager
    def attending_with(self, function: AttentionFunction) -> Iterator[None]:
        """Let every layer call another function in place of ``attention`` inside the block."""
        layers = [cast(GeneBertLayer, layer) for layer in self.layers]
        try:
            for layer in layers:
                layer.attention = function
            yield
        finally:
            for layer in layers:
                layer.attention = attention
