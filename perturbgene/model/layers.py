"""GeneBERT: a transformer over the unordered tokens of a cell, and its two heads.

Owns the configuration, the layers, attention over packed cells, the heads and their losses; knows nothing of AnnData,
tokens' texts or training. Letters: n cells, l tokens, a queries, m read positions, h hidden size, d size of a head, v
input ids, k classes.

The road of a batch, types at the arrows:

1. ``pack_cells``: padded ``(n, l)`` or packed ``(l,)`` tensors -> ``PackedCells`` without padding.
2. ``PositionlessEmbeddings``: ids and types ``(l,)`` -> ``(l, h)``.
3. ``GeneBertLayer``, times the number of layers: ``(l, h)`` -> ``(l, h)``; the last one only where an output is read,
   ``(m, h)``.
4. A head: ``(m, h)`` -> logits ``(m, v)`` or ``(n, k)``, and the loss.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, ModelOutput, SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from perturbgene.errors import InputError, did_you_mean
from perturbgene.model.direct import DirectPath

varlen_attn: Callable[..., Any] | None
try:  # torch >= 2.10
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

ATTENTION_KERNELS = ("auto", "matmul", "sdpa", "varlen", "flash")
NORM_POSITIONS = ("pre", "post", "branch")
#: Where the feed-forward branch's LayerNorm gain starts with "branch": quiet against attention, which reads the cell.
BRANCH_GAIN = 0.1
IGNORED_LABEL = -100  # Hugging Face's and PyTorch's "no label here"
#: Rows of a cell in explicit products, and of a whole batch on the CPU, are rounded up to multiples of these.
ROW_STEP, BATCH_STEP = 32, 64
GATE_FEATURES = 8  # flash kernels want head sizes in multiples of 8, so the gate's feature brings seven zeros along


class GeneBertConfig(PreTrainedConfig):
    """All that is needed to build a GeneBERT model.

    Args:
        vocab_size: Number v of input ids: special tokens, then phenotype labels, then bins.
        type_vocab_size: Number of token types: 0 special, 1..P phenotype categories, then one per gene.
        hidden_size: Width h; a multiple of ``num_attention_heads``.
        num_hidden_layers: Number of transformer layers.
        num_attention_heads: Heads of each layer.
        intermediate_size: Width of the feed-forward part.
        hidden_act: Activation of the feed-forward part, by its Hugging Face name.
        dropout: On the embeddings and on both residual branches, in [0, 1); never on attention weights, which would
            force the slow path of every kernel.
        classifier_dropout: Before the classifier, in [0, 1).
        initializer_range: Standard deviation of fresh linear weights.
        embedding_range: Standard deviation of fresh embeddings; None means ``initializer_range``.
        layer_norm_eps: Epsilon of every LayerNorm.
        norm_position: ``"pre"`` normalises before each branch and once at the end; ``"post"`` is DistilBERT's own
            order; ``"branch"`` normalises what each branch adds and once at the end, and neither embeddings nor the
            input of attention, so that a gene's vector can stay short when the gene says little.
        bin_gain_range: 0 adds word and type embedding, as BERT does. Above 0, a gene's type embedding is first scaled
            by a learnt number of its bin, which starts at 1 + range * (level - 1): bins are ordered.
        bin_levels: How much expression each bin stands for, relative to the mean: 0 for ``bin_0``, then ascending; one
            number for each bin. None means evenly spaced from 0 to 2.
        direct_path: Let each expressed gene vote for each phenotype label beside the transformer, see ``DirectPath``.
        pad_token_id: Id of ``[PAD]``; only padded batches without an attention mask need it.
        first_bin_id: Id of ``bin_0``; ids below it are special tokens or phenotype labels.
        phenotype_id_ranges: For phenotype type 1, 2, ..., P in order, the ``[start, stop)`` range of its labels' ids.
        typed_softmax: A phenotype slot competes only among its category's labels, a gene only among bins.
        phenotype_loss_weight: Factor of the phenotype part of the masked loss.
        gene_loss_weight: Factor of the gene part of the masked loss.
        class_weights: One weight for each class of the classifier, or None for equal weights.
        phenotype_category: The phenotype that a classifier names, or None.
        tokenizer_fingerprint: Fingerprint of the tokenizer that the weights were trained with.
        attention_kernel: ``"auto"`` takes the fastest exact one for device and precision; ``"matmul"`` and ``"sdpa"``
            run cell by cell anywhere; ``"varlen"`` and ``"flash"`` need CUDA in half precision. It describes a machine,
            not the model, so it is not saved.

    Raises:
        InputError: A value is outside its allowed range.
    """

    model_type = "genebert"

    vocab_size: int = 16
    type_vocab_size: int = 16
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    hidden_act: str = "gelu"
    dropout: float | int = 0.1
    classifier_dropout: float | int = 0.1
    initializer_range: float = 0.02
    embedding_range: float | None = None
    layer_norm_eps: float = 1e-12
    norm_position: str = "pre"
    bin_gain_range: float | int = 0.0
    bin_levels: list[float] | None = None
    direct_path: bool = False
    pad_token_id: int = 3
    first_bin_id: int = 4
    phenotype_id_ranges: list[list[int]] = field(default_factory=list)
    typed_softmax: bool = True
    phenotype_loss_weight: float | int = 1.0
    gene_loss_weight: float | int = 1.0
    class_weights: list[float] | None = None
    phenotype_category: str | None = None
    tokenizer_fingerprint: str | None = None
    attention_kernel: str = "auto"
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Bring ranges to plain lists and check what the layers rely on."""
        self.phenotype_id_ranges = [[int(start), int(stop)] for start, stop in self.phenotype_id_ranges]
        super().__post_init__(**kwargs)
        _check_choice("norm_position", self.norm_position, NORM_POSITIONS)
        _check_choice("attention_kernel", self.attention_kernel, ATTENTION_KERNELS)
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} cannot be split into {self.num_attention_heads} attention heads. "
                "Choose --num_attention_heads that divides it."
            )
        if not 0 <= self.bin_gain_range <= 1:
            raise InputError(f"bin_gain_range is {self.bin_gain_range}, but must lie in 0..1. Choose 0 or 1.")
        if self.bin_levels is not None and len(self.bin_levels) != self.vocab_size - self.first_bin_id:
            raise InputError(
                f"bin_levels holds {len(self.bin_levels)} numbers for {self.vocab_size - self.first_bin_id} bins. "
                "Take the levels from the tokenizer."
            )
        for start, stop in self.phenotype_id_ranges:
            if not 0 <= start < stop <= self.first_bin_id:
                raise InputError(
                    f"phenotype_id_ranges holds [{start}, {stop}), which is empty or reaches beyond first_bin_id "
                    f"({self.first_bin_id}). Take the ranges from the tokenizer."
                )

    @property
    def first_label_id(self) -> int:
        """Id of the first phenotype label; those up to ``first_bin_id`` follow."""
        return min((start for start, _ in self.phenotype_id_ranges), default=self.first_bin_id)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings to save: all but the kernel, so that a GPU's run folder loads on a laptop."""
        settings = super().to_dict()
        settings.pop("attention_kernel", None)
        return settings


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{name} cannot be {value!r}. {did_you_mean(value, allowed)}")


def load_preset(name: str) -> dict[str, Any]:
    """Return the size settings of a preset, ready for ``GeneBertConfig(**load_preset("tiny"), ...)``.

    Args:
        name: ``tiny``, ``small``, ``base`` or ``large``.

    Raises:
        InputError: There is no preset of that name.
    """
    folder = resources.files("perturbgene") / "presets"
    known = sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))
    if name not in known:
        raise InputError(f"--model_arch {name!r} is no preset. {did_you_mean(name, known)}")
    return cast(dict[str, Any], json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


# -------------------------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each cell lies in a packed row of tokens.

    Args:
        cu_seqlens: Start of each cell and the end of the last, int32, shape (n + 1,).
        max_seqlen: At least the length of the longest cell.
        known_lengths: Length of each cell on the host, when it is known without asking the device.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    known_lengths: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls, cu_seqlens: Tensor, *, max_seqlen: int | None = None, lengths: Sequence[int] | Tensor | None = None
    ) -> "Packing":
        """Describe packed cells; whatever is left out is read from ``cu_seqlens``."""
        known = tuple(lengths.tolist() if isinstance(lengths, Tensor) else lengths) if lengths is not None else None
        if max_seqlen is None:
            known = known if known is not None else tuple(cu_seqlens.diff().tolist())
            max_seqlen = max(known, default=0)
        return cls(cu_seqlens.to(torch.int32), int(max_seqlen), known)

    @classmethod
    def of_mask(cls, is_token_nl: Tensor) -> "Packing":
        """Describe the cells of a padded batch, shape (n, l), True where a token stands."""
        lengths = is_token_nl.sum(dim=1, dtype=torch.int32)
        known = tuple(lengths.tolist())
        if 0 in known:
            raise InputError(f"attention_mask leaves row {known.index(0)} without a token. Drop the empty cell.")
        return cls(F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)), max(known, default=0), known)

    @cached_property
    def lengths(self) -> list[int]:
        """Length of each cell; asks the device unless the batch brought the lengths along."""
        return list(self.known_lengths) if self.known_lengths is not None else self.cu_seqlens.diff().tolist()

    def at(self, read_positions_m: Tensor) -> "Packing":
        """Describe how many of the ascending flat positions, shape (m,), fall into each cell."""
        cu_reads = torch.searchsorted(read_positions_m, self.cu_seqlens.to(read_positions_m.dtype), out_int32=True)
        return Packing(cu_reads, self.max_seqlen)


@dataclass(frozen=True, eq=False)
class PackedCells:
    """A batch without padding, and the way back to its padded shape.

    Args:
        packing: Where each cell lies.
        input_ids: Shape (l,), or None when ``inputs_embeds`` is given.
        token_type_ids: Shape (l,), or None.
        inputs_embeds: Shape (l, h), or None.
        key_log_gate: Shape (l,), or None.
        padded_index: Flat place of each token in the padded batch, shape (l,); None when the batch came packed.
        padded_shape: Shape (n, l) of the padded batch; None when the batch came packed.
    """

    packing: Packing
    input_ids: Tensor | None = None
    token_type_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    key_log_gate: Tensor | None = None
    padded_index: Tensor | None = None
    padded_shape: tuple[int, int] | None = None

    def pack(self, values_nl: Tensor) -> Tensor:
        """Drop the padding of further per-token values; packed ones pass."""
        if self.padded_index is None or values_nl.ndim == 1:
            return values_nl
        return values_nl.flatten(0, 1).index_select(0, self.padded_index)  # (n, l) -> (l,)

    def repad(self, values_lx: Tensor) -> Tensor:
        """Give values the shape the batch came in, zeros at padding."""
        if self.padded_index is None or self.padded_shape is None:
            return values_lx
        n, length = self.padded_shape
        empty = values_lx.new_zeros((n * length, values_lx.shape[-1]))
        return empty.index_copy(0, self.padded_index, values_lx).view(n, length, -1)  # (l, x) -> (n, l, x)

    def model_inputs(self) -> dict[str, Any]:
        """Return the batch as packed arguments of ``GeneBertModel``."""
        return {
            "input_ids": self.input_ids,
            "token_type_ids": self.token_type_ids,
            "inputs_embeds": self.inputs_embeds,
            "key_log_gate": self.key_log_gate,
            "cu_seqlens": self.packing.cu_seqlens,
            "max_seqlen": self.packing.max_seqlen,
            "lengths": self.packing.known_lengths,
        }


TokenParts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
CellBounds = tuple[Tensor | None, int | None, Sequence[int] | Tensor | None]


def pack_cells(
    parts: TokenParts, *, cells: CellBounds, attention_mask: Tensor | None = None, pad_token_id: int = 3
) -> PackedCells:
    """Bring a batch into packed form, whichever form it came in.

    Args:
        parts: ``input_ids``, ``token_type_ids``, ``inputs_embeds`` and ``key_log_gate``, each None, padded (n, l, ...)
            or packed (l, ...).
        cells: ``cu_seqlens`` (n + 1,), which makes the batch a packed one, ``max_seqlen`` and ``lengths``; or Nones.
        attention_mask: Padded only, nonzero where a token stands; without it, wherever no ``[PAD]`` stands.
        pad_token_id: Id of ``[PAD]``.

    Raises:
        InputError: Inputs are missing, do not have one of these shapes, or a cell is empty.
    """
    input_ids, token_type_ids, inputs_embeds, _ = parts
    cu_seqlens, max_seqlen, lengths = cells
    tokens = input_ids if input_ids is not None else inputs_embeds
    if tokens is None:
        raise InputError("The model got neither input_ids nor inputs_embeds. Give one of them.")
    if inputs_embeds is None and token_type_ids is None:
        raise InputError("The model got input_ids without token_type_ids, which say whose value a token is. Give both.")
    if cu_seqlens is not None:
        return PackedCells(Packing.of(cu_seqlens, max_seqlen=max_seqlen, lengths=lengths), *parts)
    if tokens.ndim != (2 if input_ids is not None else 3):
        raise InputError(f"Tokens of shape {tuple(tokens.shape)} are no padded batch. A packed one needs cu_seqlens.")
    is_token_nl = _is_token(input_ids, tokens, attention_mask, pad_token_id)
    index = is_token_nl.flatten().nonzero().squeeze(1)
    shape = (tokens.shape[0], tokens.shape[1])
    frame = PackedCells(Packing.of_mask(is_token_nl), padded_index=index, padded_shape=shape)
    ids, types, embeds, gate = (None if part is None else frame.pack(part) for part in parts)
    return PackedCells(frame.packing, ids, types, embeds, gate, index, shape)


def _is_token(input_ids: Tensor | None, tokens: Tensor, attention_mask: Tensor | None, pad_token_id: int) -> Tensor:
    if attention_mask is not None:
        return attention_mask.bool()
    if input_ids is not None:
        return input_ids != pad_token_id
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


# ------------------------------------------------------------------------------------------------------------ attention


def attention(
    q_ahd: Tensor,
    k_lhd: Tensor,
    v_lhd: Tensor,
    *,
    queries: Packing,
    keys: Packing,
    kernel: str = "auto",
    key_log_gate_l: Tensor | None = None,
) -> Tensor:
    """Attend within each cell: softmax(q k / sqrt(d) + gate) v, without dropout.

    Args:
        q_ahd: Queries, shape (a, heads, d); a cell may ask fewer queries than it has keys.
        k_lhd: Keys, shape (l, heads, d).
        v_lhd: Values, shape (l, heads, d).
        queries: Where each cell's queries lie.
        keys: Where each cell's keys lie.
        kernel: One of ``ATTENTION_KERNELS``.
        key_log_gate_l: Added to every query's logit for a token, shape (l,); finite, about -1e4 hides the token.

    Returns:
        Shape (a, heads, d).

    Raises:
        InputError: The kernel cannot run on this device or precision, or is not installed.
    """
    head_size = q_ahd.shape[-1]
    scale = head_size**-0.5
    kernel = choose_kernel(kernel, q_ahd)
    if key_log_gate_l is not None:
        q_ahd, k_lhd, v_lhd = _with_gate(q_ahd, k_lhd, v_lhd, key_log_gate_l, scale=scale)
    out_ahd = _KERNELS[kernel](q_ahd, k_lhd, v_lhd, queries, keys, scale)
    return out_ahd[..., :head_size] if key_log_gate_l is not None else out_ahd


def choose_kernel(kernel: str, q_ahd: Tensor) -> str:
    """Name the kernel to run: the one asked for, or with ``auto`` the fastest for device, precision and head size.

    Raises:
        InputError: The kernel asked for cannot run here.
    """
    _check_choice("attention_kernel", kernel, ATTENTION_KERNELS)
    is_half = q_ahd.dtype in (torch.bfloat16, torch.float16)
    runs_flash = q_ahd.is_cuda and is_half and q_ahd.shape[-1] % 8 == 0 and q_ahd.shape[-1] + GATE_FEATURES <= 256
    if kernel == "auto":
        if runs_flash and varlen_attn is not None and torch.cuda.get_device_capability(q_ahd.device) >= (8, 0):
            return "varlen"
        return "matmul" if is_half and q_ahd.device.type == "cpu" else "sdpa"
    if kernel == "flash":
        check_flash_installed()
    if kernel == "varlen" and varlen_attn is None:
        raise InputError("attention_kernel 'varlen' needs torch 2.10 or newer. Update torch or use 'auto'.")
    if kernel in ("varlen", "flash") and not runs_flash:
        raise InputError(
            f"attention_kernel {kernel!r} needs bf16 or fp16 on CUDA and a head size in multiples of 8 up to 248, "
            f"but got {q_ahd.dtype} on {q_ahd.device.type} with heads of {q_ahd.shape[-1]}. "
            "Use 'auto', or train with --bf16."
        )
    return kernel


def check_flash_installed() -> None:
    """Raise an InputError when flash-attn cannot be imported."""
    if importlib.util.find_spec("flash_attn") is None:
        raise InputError(
            "attention_kernel 'flash' needs the package flash_attn, which is not installed. Install flash-attn, or "
            "leave out --use_flash_attn: 'auto' is as free of padding."
        )


def _with_gate(
    q_ahd: Tensor, k_lhd: Tensor, v_lhd: Tensor, gate_l: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the gate as one more key feature that every query weighs by 1: any kernel applies and differentiates it."""
    q = F.pad(F.pad(q_ahd, (0, 1), value=1 / scale), (0, GATE_FEATURES - 1))  # (a, heads, d) -> (a, heads, d + 8)
    gate = gate_l.to(k_lhd.dtype)[:, None, None].expand(-1, k_lhd.shape[1], 1)
    k = F.pad(torch.cat([k_lhd, gate], dim=-1), (0, GATE_FEATURES - 1))
    return q, k, F.pad(v_lhd, (0, GATE_FEATURES))


class _MatmulAttention(torch.autograd.Function):
    """Attention by explicit products, cell by cell, that keeps only what its backward pass needs.

    Each cell's heads lie one after another in a block of its own, whose length is a multiple of ``ROW_STEP``: products
    of strided views copy them each time, a softmax over other lengths ends in a slow loop, and oneDNN compiles (0.6 ms)
    and keeps (0.6 MiB) code for every shape it meets, of which cells of all lengths would bring thousands. Left-over
    keys have the logit -inf, left-over queries are 0 and so are their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, q_ahd: Tensor, k_lhd: Tensor, v_lhd: Tensor, queries: Packing, keys: Packing, scale: float
    ) -> Tensor:
        keeps, kept = any(ctx.needs_input_grad), []
        out_ahd = _rows_like(q_ahd, sum(queries.lengths))
        for of_q, of_k in _slices(queries, keys):
            q_had = _block(q_ahd[of_q]).mul_(scale)
            k_hld, v_hld = _block(k_lhd[of_k]), _block(v_lhd[of_k])
            weight_hal = _softmax_(torch.bmm(q_had, k_hld.transpose(1, 2)), of_k.stop - of_k.start)
            _put_product(out_ahd[of_q], weight_hal, v_hld)
            if keeps:
                kept += [q_had, k_hld, v_hld, weight_hal]
        ctx.save_for_backward(*kept)
        ctx.queries, ctx.keys, ctx.scale, ctx.num_keys = queries, keys, scale, len(k_lhd)
        return out_ahd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ahd: Tensor) -> tuple[Tensor | None, ...]:
        kept, used = ctx.saved_tensors, sum(ctx.keys.lengths)
        like_lhd = grad_ahd.new_empty(1, 1, 1).expand(ctx.num_keys, *grad_ahd.shape[1:])
        dq_ahd = _rows_like(grad_ahd, sum(ctx.queries.lengths))
        dk_lhd, dv_lhd = _rows_like(like_lhd, used), _rows_like(like_lhd, used)
        cells = zip(_slices(ctx.queries, ctx.keys), kept[::4], kept[1::4], kept[2::4], kept[3::4], strict=True)
        for (of_q, of_k), q_had, k_hld, v_hld, weight_hal in cells:
            grad_had = _block(grad_ahd[of_q])
            _put_product(dv_lhd[of_k], weight_hal.transpose(1, 2), grad_had)
            grad_weight = torch.bmm(grad_had, v_hld.transpose(1, 2))
            grad_logit = torch._softmax_backward_data(grad_weight, weight_hal, -1, weight_hal.dtype)
            _put_product(dq_ahd[of_q], grad_logit, k_hld)
            _put_product(dk_lhd[of_k], grad_logit.transpose(1, 2), q_had)
        return dq_ahd.mul_(ctx.scale), dk_lhd, dv_lhd, None, None, None


def _rows_like(x_lhd: Tensor, used: int) -> Tensor:
    """Make room of the same shape; rows that belong to no cell are 0."""
    room_lhd = x_lhd.new_empty(x_lhd.shape)
    room_lhd[used:].zero_()
    return room_lhd


def _block(x_lhd: Tensor) -> Tensor:
    """Copy a cell's (l, heads, d) -> contiguous (heads, l, d), with l rounded up by rows of 0."""
    x_hld = x_lhd.transpose(0, 1)
    left_over = -len(x_lhd) % ROW_STEP
    return F.pad(x_hld, (0, 0, 0, left_over)) if left_over else x_hld.clone(memory_format=torch.contiguous_format)


def _softmax_(logit_hal: Tensor, num_keys: int) -> Tensor:
    """Turn logits into weights in place, where the next product finds them in the cache."""
    if num_keys < logit_hal.shape[-1]:
        logit_hal[..., num_keys:].fill_(-torch.inf)
    return torch.softmax(logit_hal, -1, out=logit_hal)


def _put_product(out_lhd: Tensor, left_hlx: Tensor, right_hxd: Tensor) -> None:
    """Write a product (heads, l, d) to a cell's place, without the rows by which its block was rounded up."""
    out_hld = out_lhd.transpose(0, 1)
    if left_hlx.shape[1] == len(out_lhd):
        torch.bmm(left_hlx, right_hxd, out=out_hld)
    else:
        out_hld.copy_(torch.bmm(left_hlx, right_hxd)[:, : len(out_lhd)])


def _slices(queries: Packing, keys: Packing) -> Iterator[tuple[slice, slice]]:
    """Yield where each cell's queries and keys lie."""
    q, k = 0, 0
    for num_queries, num_keys in zip(queries.lengths, keys.lengths, strict=True):
        yield slice(q, q + num_queries), slice(k, k + num_keys)
        q, k = q + num_queries, k + num_keys


def _matmul(q_ahd: Tensor, k_lhd: Tensor, v_lhd: Tensor, queries: Packing, keys: Packing, scale: float) -> Tensor:
    with torch.autocast(q_ahd.device.type, enabled=False):  # softmax stays in the precision of its input
        return cast(Tensor, _MatmulAttention.apply(q_ahd, k_lhd, v_lhd, queries, keys, scale))


def _sdpa_cell(q_had: Tensor, k_hld: Tensor, v_hld: Tensor, *, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q_had[None], k_hld[None], v_hld[None], scale=scale)[0]


def _sdpa(q_ahd: Tensor, k_lhd: Tensor, v_lhd: Tensor, queries: Packing, keys: Packing, scale: float) -> Tensor:
    """Run PyTorch's own attention on one cell after the other.

    Buckets of lengths within 10 %, padded to one call, and one padded batch were tried and never won. Forward and
    backward in ms on one core with AVX512-BF16, best of 12 interleaved runs, cell / bucket / one batch:

    - 32 cells of ~170 tokens, 4 heads of 16: float32 sdpa 22 / 25 / 32, bf16 matmul 28 / 28 / 40;
    - 8 cells of ~500, 4 heads of 64: float32 sdpa 133 / 134 / 330, bf16 matmul 73 / 89 / 299;
    - 8 cells of 512, 12 heads of 64: float32 sdpa 321 / 322 / 321, bf16 matmul 194 / 208 / 220.

    What "auto" chooses, forward and backward in ms, matmul / sdpa, best of 10 interleaved runs of one busy core:

    - bf16: 4 cells of ~500, 4 heads 35 / 71; 2 of 1,024 54 / 93; 2 of 512, 12 heads 44 / 83; 8 of 170 6.6 / 18.5;
    - float32: 63 / 61, 105 / 105, 81 / 80, 6.9 / 6.3; forward alone 22 / 18, 36 / 29, 28 / 22, 2.2 / 2.1.
    """
    outs = [
        _sdpa_cell(*(x.transpose(0, 1) for x in (q_ahd[of_q], k_lhd[of_k], v_lhd[of_k])), scale=scale).transpose(0, 1)
        for of_q, of_k in _slices(queries, keys)
    ]
    of_no_cell = q_ahd.new_zeros(len(q_ahd) - sum(queries.lengths), *q_ahd.shape[1:])
    return torch.cat([*outs, of_no_cell])


def _varlen(q_ahd: Tensor, k_lhd: Tensor, v_lhd: Tensor, queries: Packing, keys: Packing, scale: float) -> Tensor:
    assert varlen_attn is not None  # choose_kernel has seen to it
    cu, most = (queries.cu_seqlens, keys.cu_seqlens), (queries.max_seqlen, keys.max_seqlen)
    return cast(Tensor, varlen_attn(q_ahd, k_lhd, v_lhd, *cu, *most, scale=scale))


def _flash(q_ahd: Tensor, k_lhd: Tensor, v_lhd: Tensor, queries: Packing, keys: Packing, scale: float) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # optional, seconds to import

    cu, most = (queries.cu_seqlens, keys.cu_seqlens), (queries.max_seqlen, keys.max_seqlen)
    return cast(Tensor, flash_attn_varlen_func(q_ahd, k_lhd, v_lhd, *cu, *most, softmax_scale=scale))


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "matmul": _matmul,
    "sdpa": _sdpa,
    "varlen": _varlen,
    "flash": _flash,
}


# --------------------------------------------------------------------------------------------------------------- layers


class Dropout(nn.Dropout):
    """Dropout whose randomness is cheap on the CPU: 16 bits for each element, four of them cut from one drawn number.

    A million elements take 1.4 ms instead of 7.5 on one core. The rate is met to 1/65,536, and the scale is of the rate
    that was met. On other devices it is PyTorch's own.
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


class _BiasedProduct(torch.autograd.Function):
    """x w^T + b in half precision on the CPU by one call of oneDNN.

    PyTorch's own writes the bias to every row first and lets the product add to it, which takes up to 15 % longer for
    the same bits. The backward pass is PyTorch's own.
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
    """Return x w^T + b, (l, i) -> (l, o), the fastest way that gives PyTorch's result."""
    if _runs_onednn(x_li):
        return cast(Tensor, _BiasedProduct.apply(*(part.to(torch.bfloat16) for part in (x_li, weight_oi, bias_o))))
    return F.linear(x_li, weight_oi, bias_o)


def _runs_onednn(x_lx: Tensor) -> bool:
    """True where products are computed in bfloat16 by oneDNN."""
    if x_lx.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x_lx.dtype == torch.bfloat16


class Linear(nn.Linear):
    """PyTorch's, by way of ``linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class PositionlessEmbeddings(nn.Module):
    """Word plus type embedding, LayerNorm, dropout: BERT's embeddings without positions, for tokens have no order.

    With ``bin_gain_range`` the type embedding is scaled by a number of the input id, so that more of a gene weighs more
    from the first step on (numbers times a vector of the feature, as tabular transformers embed them: Gorishniy et al.
    2021, arXiv:2106.11959). With ``norm_position="branch"`` there is no LayerNorm.
    """

    def __init__(self, config: GeneBertConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.type_gain = nn.Parameter(torch.ones(config.vocab_size)) if config.bin_gain_range else None
        is_normed = config.norm_position != "branch"
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if is_normed else nn.Identity()
        self.dropout = Dropout(config.dropout)

    def reset_gain(self) -> None:
        """Start the gains afresh, unless they were loaded: bins by their levels, all others at 1."""
        if self.type_gain is not None:
            gains_v, spread = torch.ones_like(self.type_gain, requires_grad=False), self.config.bin_gain_range
            bins_b = gains_v[self.config.first_bin_id :]
            levels = self.config.bin_levels or torch.linspace(0, 2, len(bins_b)).tolist()
            bins_b.copy_(1 + spread * (torch.tensor(levels, device=gains_v.device) - 1))
            init.copy_(self.type_gain, gains_v)

    def summed(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Return word plus type embedding, any shape -> (..., h): what ``inputs_embeds`` takes the place of."""
        types = self.token_type_embeddings(token_type_ids)
        if self.type_gain is not None:
            types = types * self.type_gain[input_ids][..., None]  # (..., h) * (..., 1)
        return cast(Tensor, self.word_embeddings(input_ids) + types)

    def expression(self, input_ids: Tensor) -> Tensor:
        """Return how much of a gene each token says was seen: the gain of its bin, 0 unless it is above ``bin_0``."""
        gains = torch.ones_like(input_ids, dtype=torch.float32) if self.type_gain is None else self.type_gain[input_ids]
        return gains * (input_ids > self.config.first_bin_id)

    def forward(
        self, input_ids: Tensor | None = None, token_type_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Embed tokens of any shape (...) -> (..., h); ``inputs_embeds`` stands for word plus type embedding."""
        if inputs_embeds is None:
            assert input_ids is not None and token_type_ids is not None  # pack_cells has seen to it
            inputs_embeds = self.summed(input_ids, token_type_ids)
        return cast(Tensor, self.dropout(self.norm(inputs_embeds)))


class FeedForwardNorm(nn.LayerNorm):
    """LayerNorm of a feed-forward branch, told apart so that it can start at ``BRANCH_GAIN``."""


class GeneBertLayer(GradientCheckpointingLayer):
    """Self-attention and a feed-forward part, each a residual branch with a LayerNorm.

    It stands before the branch ("pre"), after the sum ("post"), or on what the branch adds ("branch", as in OLMo 2,
    arXiv:2501.00656, without its normalised queries and keys, which made no difference here).
    """

    def __init__(self, config: GeneBertConfig) -> None:
        super().__init__()
        h = config.hidden_size
        self.config = config
        self.norm_position = config.norm_position
        self.qkv = Linear(h, 3 * h)
        self.attention_out = Linear(h, h)
        self.attention_norm = nn.LayerNorm(h, eps=config.layer_norm_eps)
        self.ffn_in = Linear(h, config.intermediate_size)
        self.ffn_out = Linear(config.intermediate_size, h)
        self.ffn_norm = FeedForwardNorm(h, eps=config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        hidden_lh: Tensor,
        packing: Packing,
        read_positions: Tensor | None = None,
        key_log_gate: Tensor | None = None,
    ) -> Tensor:
        """Transform (l, h) -> (l, h), or -> (m, h) at the ascending flat ``read_positions``, shape (m,)."""
        is_pre, is_branch = self.norm_position == "pre", self.norm_position == "branch"
        normed_lh = self.attention_norm(hidden_lh) if is_pre else hidden_lh
        attended = self.attend(normed_lh, packing, read_positions, key_log_gate)
        residual = (
            hidden_lh if read_positions is None else hidden_lh.index_select(0, read_positions)
        )  # (l, h) -> (m, h)
        if is_branch:
            hidden = residual + self.dropout(self.attention_norm(attended))
            return hidden + self.dropout(self.ffn_norm(self._feed_forward(hidden)))
        hidden = residual + self.dropout(attended)
        if is_pre:
            return hidden + self.dropout(self._feed_forward(self.ffn_norm(hidden)))
        hidden = self.attention_norm(hidden)
        return cast(Tensor, self.ffn_norm(hidden + self.dropout(self._feed_forward(hidden))))

    def attend(self, x_lh: Tensor, packing: Packing, read_positions: Tensor | None, gate_l: Tensor | None) -> Tensor:
        """Attend and project, (l, h) -> (a, h); `perturbation.screening` replaces it."""
        q, k, v = self.queries_keys_values(x_lh, read_positions)
        out_ahd = attention(
            q,
            k,
            v,
            queries=packing if read_positions is None else packing.at(read_positions),
            keys=packing,
            kernel=_kernel_wanted(self.config),
            key_log_gate_l=gate_l,
        )
        return cast(Tensor, self.attention_out(out_ahd.flatten(1)))  # (a, heads, d) -> (a, h)

    def queries_keys_values(self, x_lh: Tensor, read_positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return what attention compares, of shapes (a, heads, d) and twice (l, heads, d)."""
        h, heads = x_lh.shape[1], self.config.num_attention_heads
        if read_positions is None:
            q, k, v = self.qkv(x_lh).view(-1, 3, heads, h // heads).unbind(1)  # (l, 3 h) -> 3 of (l, heads, d)
            return q, k, v
        weight, bias = self.qkv.weight, self.qkv.bias
        q = linear(x_lh.index_select(0, read_positions), weight[:h], bias[:h])
        k, v = linear(x_lh, weight[h:], bias[h:]).view(-1, 2, heads, h // heads).unbind(1)
        return q.view(-1, heads, h // heads), k, v

    def _feed_forward(self, x_lh: Tensor) -> Tensor:
        return cast(Tensor, self.ffn_out(self.activation(self.ffn_in(x_lh))))


# --------------------------------------------------------------------------------------------------------------- models


def _kernel_wanted(config: GeneBertConfig) -> str:
    """Return the kernel of the configuration, or of ``attn_implementation`` when that is ``eager``."""
    return "matmul" if config._attn_implementation == "eager" else config.attention_kernel


def _repad_states(states: tuple[Tensor, ...], cells: PackedCells, *, is_last_read: bool) -> tuple[Tensor, ...]:
    """Give hidden states the batch's own shape; the last stays (m, h) when it was made at read positions only."""
    last = states[-1] if is_last_read else cells.repad(states[-1])
    return (*(cells.repad(state) for state in states[:-1]), last)


class GeneBertPreTrainedModel(PreTrainedModel):
    """What the three models share: configuration class, prefix, initialisation, choice of attention.

    Transformers' ``attn_implementation`` is understood: ``"flash_attention_2"`` sets ``attention_kernel="flash"``,
    ``"eager"`` means explicit matmuls; ``"sdpa"`` is transformers' default and leaves the choice to
    ``attention_kernel``.
    """

    config: GeneBertConfig
    config_class = GeneBertConfig
    base_model_prefix = "genebert"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _no_split_modules = ["GeneBertLayer"]

    def __init__(self, config: GeneBertConfig) -> None:
        if config._attn_implementation == "flash_attention_2":
            config.attention_kernel = "flash"
            config._attn_implementation = "sdpa"  # transformers' own layers are not used, so neither are its checks
        if config.attention_kernel == "flash":
            check_flash_installed()
        _check_choice("attention_kernel", config.attention_kernel, ATTENTION_KERNELS)
        super().__init__(config)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw fresh weights as transformers does, but embeddings with their own spread."""
        super()._init_weights(module)
        if isinstance(module, nn.Embedding) and self.config.embedding_range is not None:
            init.normal_(module.weight, std=self.config.embedding_range)
        if isinstance(module, PositionlessEmbeddings):
            module.reset_gain()
        if isinstance(module, DirectPath):
            init.zeros_(module.votes_tk)
        if isinstance(module, FeedForwardNorm) and self.config.norm_position == "branch":
            init.constant_(module.weight, BRANCH_GAIN)


class GeneBertModel(GeneBertPreTrainedModel):
    """Positionless embeddings and the encoder."""

    def __init__(self, config: GeneBertConfig) -> None:
        super().__init__(config)
        self.embeddings = PositionlessEmbeddings(config)
        self.layers = nn.ModuleList([GeneBertLayer(config) for _ in range(config.num_hidden_layers)])
        has_final_norm = config.norm_position != "post"
        self.final_norm = (
            nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if has_final_norm else nn.Identity()
        )
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.embeddings.word_embeddings = cast(nn.Embedding, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        read_positions: Tensor | None = None,
        key_log_gate: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Encode cells, padded or packed.

        Args:
            input_ids: Padded (n, l), or packed (l,) beside ``cu_seqlens``.
            token_type_ids: Like ``input_ids``.
            attention_mask: Padded only, (n, l); without it, everything that is not ``[PAD]`` counts.
            inputs_embeds: Stands for the sum of word and type embedding, before the LayerNorm: (n, l, h) or (l, h); the
                direct path of the heads still reads the ids beside it.
            cu_seqlens: Packed only: start of each cell and end of the last, (n + 1,).
            max_seqlen: Packed only: length of the longest cell; spares asking the device.
            lengths: Packed only: length of each cell, on the host; spares asking the device.
            read_positions: Where an output is read: ascending flat positions among the tokens without padding, (m,).
                The last layer works only there, and the hidden states it returns are (m, h), padded input or not.
            key_log_gate: Added to every query's attention logit for a token, in every layer; (n, l) or packed (l,).
                Zero changes nothing, -1e4 hides the token from all others; keep it finite.
            output_hidden_states: Return the embeddings' and each layer's output too; the last is ``last_hidden_state``.
            **kwargs: What trainers and wrappers add; ignored.

        Returns:
            ``last_hidden_state`` of shape (n, l, h), zeros at padding; (l, h) for packed input; (m, h) with read
            positions.
        """
        cells = pack_cells(
            (input_ids, token_type_ids, inputs_embeds, key_log_gate),
            attention_mask=attention_mask,
            cells=(cu_seqlens, max_seqlen, lengths),
            pad_token_id=self.config.pad_token_id,
        )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        last, earlier = self._encode(cells, read_positions, keep=bool(output_hidden_states))
        states = _repad_states((*earlier, last), cells, is_last_read=read_positions is not None)
        return BaseModelOutput(
            last_hidden_state=states[-1],
            hidden_states=states if output_hidden_states else None,
        )

    def votes(self, path: DirectPath, cells: PackedCells) -> Tensor:
        """Return what the genes of each cell say for each label without the transformer, (n, k)."""
        if cells.input_ids is None or cells.token_type_ids is None:
            raise InputError("The direct path needs input_ids and token_type_ids beside inputs_embeds. Give them too.")
        weight_l = self.embeddings.expression(cells.input_ids)
        if cells.key_log_gate is not None:
            weight_l = weight_l * cells.key_log_gate.exp()
        return cast(Tensor, path(cells.token_type_ids, weight_l, cells.packing.cu_seqlens))

    def _encode(self, cells: PackedCells, read_positions: Tensor | None, *, keep: bool) -> tuple[Tensor, list[Tensor]]:
        """Return the packed, normalised output and, with ``keep``, what went into each layer."""
        embedded, gate = self.embeddings(cells.input_ids, cells.token_type_ids, cells.inputs_embeds), cells.key_log_gate
        num_tokens, spare = len(embedded), _left_over(embedded)
        hidden = F.pad(embedded, (0, 0, 0, spare)) if spare else embedded  # rows of no cell, never read
        gate = F.pad(gate, (0, spare)) if gate is not None and spare else gate
        earlier = []
        for layer in self.layers:
            if keep:
                earlier.append(hidden[:num_tokens])
            reads = read_positions if layer is self.layers[-1] else None
            hidden = layer(hidden, cells.packing, _some_more(reads, num_tokens, embedded), gate)
        num_read = num_tokens if read_positions is None else len(read_positions)
        return self.final_norm(hidden)[:num_read], earlier


def _left_over(x_lx: Tensor) -> int:
    """Count the rows by which to round up on the CPU, so that oneDNN need not compile for every number of rows.

    Float32 does without oneDNN, but with the same rows it draws the same dropout as half precision.
    """
    return -len(x_lx) % BATCH_STEP if x_lx.device.type == "cpu" else 0


def _some_more(read_positions: Tensor | None, num_tokens: int, like: Tensor) -> Tensor | None:
    """Round many read positions up by reading the last token again, a few as they are."""
    if read_positions is None or len(read_positions) <= BATCH_STEP or not _left_over(like[:1]):
        return read_positions
    return F.pad(read_positions, (0, -len(read_positions) % BATCH_STEP), value=num_tokens - 1)


@dataclass
class PhenotypicMLMOutput(ModelOutput):
    """Output of ``GeneBertForPhenotypicMLM``.

    Args:
        loss: Weighted sum of the two parts, scalar.
        logits: Shape (n, l, v), (l, v) or (m, v), as ``forward`` says.
        loss_phenotypes: Phenotype part, unweighted and detached, scalar.
        loss_genes: Gene part, unweighted and detached, scalar.
        hidden_states: Embeddings and each layer's output, when asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loss_phenotypes: Tensor | None = None
    loss_genes: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class GeneBertForPhenotypicMLM(GeneBertPreTrainedModel):
    """Names masked phenotypes and expression bins: dense, gelu, LayerNorm, projection to input ids."""

    # Head parameters share no name with a top-level part of the base model: loading would swap them silently.
    def __init__(self, config: GeneBertConfig) -> None:
        super().__init__(config)
        self.genebert = GeneBertModel(config)
        self.mlm_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlm_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlm_projection = nn.Linear(config.hidden_size, config.vocab_size)
        num_labels = config.first_bin_id - config.first_label_id
        has_path = config.direct_path and num_labels > 0
        self.direct_labels = DirectPath(config.type_vocab_size, num_labels) if has_path else None
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the projection to input ids."""
        return self.mlm_projection

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the projection to input ids."""
        self.mlm_projection = cast(nn.Linear, new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        label_positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        key_log_gate: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> PhenotypicMLMOutput:
        """Score every input id at every read token.

        Args:
            input_ids: As for ``GeneBertModel``; so are the arguments not named here.
            token_type_ids: Like ``input_ids``; needed beside ``inputs_embeds`` too when ``typed_softmax`` is on.
            attention_mask: Padded only, (n, l).
            labels: Padded (n, l), or beside ``label_positions`` (m,): the true input id, -100 where there is none.
            label_positions: Where to read: ascending flat positions among the tokens without padding, (m,).
            cu_seqlens: Packed only, (n + 1,).
            max_seqlen: Packed only.
            lengths: Packed only.
            key_log_gate: (n, l) or packed (l,).
            inputs_embeds: (n, l, h) or (l, h).
            num_items_in_batch: Denominator of the loss, see ``masked_loss``.
            output_hidden_states: Return all hidden states too; with read positions the last is (m, h).
            **kwargs: What trainers and wrappers add; ignored.

        Returns:
            With ``label_positions``: logits (m, v). Without: logits of all tokens, (n, l, v) with zeros at padding or
            (l, v); except in training with ``labels``, where they are made at the labelled tokens only, (m, v) in row
            order. With ``typed_softmax`` the ids that cannot stand at a token have the lowest finite logit.
        """
        batch = pack_cells(
            (input_ids, token_type_ids, inputs_embeds, key_log_gate),
            attention_mask=attention_mask,
            cells=(cu_seqlens, max_seqlen, lengths),
            pad_token_id=self.config.pad_token_id,
        )
        reads, labels_r = self._reads(batch, labels, label_positions)
        encoded = self.genebert(**batch.model_inputs(), read_positions=reads, output_hidden_states=output_hidden_states)
        states = encoded.hidden_states
        logits_rv = self._logits(encoded.last_hidden_state, batch, reads)
        losses: tuple[Tensor | None, ...] = (None, None, None)
        if labels_r is not None:
            losses = masked_loss(logits_rv, labels_r, config=self.config, num_items_in_batch=num_items_in_batch)
        return PhenotypicMLMOutput(
            loss=losses[0],
            logits=batch.repad(logits_rv) if reads is None else logits_rv,
            loss_phenotypes=losses[1],
            loss_genes=losses[2],
            hidden_states=states and _repad_states(states, batch, is_last_read=reads is not None),
        )

    def _reads(
        self, batch: PackedCells, labels: Tensor | None, label_positions: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Choose the tokens to read, None for all, and the label of each."""
        if label_positions is not None or labels is None:
            return label_positions, labels
        labels_l = batch.pack(labels)
        if not self.training:
            return None, labels_l
        reads = (labels_l != IGNORED_LABEL).nonzero().squeeze(1)
        return reads, labels_l.index_select(0, reads)

    def _logits(self, hidden_rh: Tensor, batch: PackedCells, reads: Tensor | None) -> Tensor:
        """Apply the head, (r, h) -> (r, v), and leave each token only the ids of its type."""
        logits_rv = self.mlm_projection(self.mlm_norm(F.gelu(self.mlm_dense(hidden_rh))))
        if self.direct_labels is not None:
            logits_rv = self._with_votes(logits_rv, batch, reads)
        if not self.config.typed_softmax:
            return cast(Tensor, logits_rv)
        if batch.token_type_ids is None:
            raise InputError(
                "typed_softmax needs token_type_ids beside inputs_embeds. Give them, or switch typed_softmax off."
            )
        types_r = batch.token_type_ids if reads is None else batch.token_type_ids.index_select(0, reads)
        return self.restrict_logits(logits_rv, types_r)

    def _with_votes(self, logits_rv: Tensor, batch: PackedCells, reads: Tensor | None) -> Tensor:
        """Add, at phenotype slots, what the genes of the cell say for each label."""
        votes_nk = self.genebert.votes(cast(DirectPath, self.direct_labels), batch)
        ends_n = batch.packing.cu_seqlens[1:].long()
        reads = torch.arange(len(logits_rv), device=logits_rv.device) if reads is None else reads
        cell_r = torch.searchsorted(ends_n, reads, right=True)
        types_r = cast(Tensor, batch.token_type_ids)[reads]
        is_slot_r = (types_r > 0) & (types_r <= len(self.config.phenotype_id_ranges))
        around = (self.config.first_label_id, self.config.vocab_size - self.config.first_bin_id)
        votes_rv = F.pad(votes_nk, around)[cell_r] * is_slot_r[:, None]  # (n, k) -> (r, v)
        return logits_rv.float() + votes_rv

    def restrict_logits(self, logits_mv: Tensor, token_types_m: Tensor) -> Tensor:
        """Give ids that cannot stand at a token the lowest finite logit.

        Args:
            logits_mv: Shape (m, v).
            token_types_m: Token type of each row, shape (m,): type t in 1..P keeps the ids of its category, a higher
                one (a gene) the bins, 0 (special) everything.

        Returns:
            Shape (m, v).
        """
        v = self.config.vocab_size
        ranges = ((0, v), *map(tuple, self.config.phenotype_id_ranges), (self.config.first_bin_id, v))
        table = _on_device(ranges, logits_mv.device)
        bounds = table[token_types_m.clamp(max=len(ranges) - 1)]  # (m, 2)
        ids = torch.arange(v, device=logits_mv.device)
        is_foreign_mv = (ids < bounds[:, :1]) | (ids >= bounds[:, 1:])
        return logits_mv.masked_fill(is_foreign_mv, torch.finfo(logits_mv.dtype).min)


@lru_cache(maxsize=16)
def _on_device(rows: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Send a small table once: every copy from the host would let it wait for the GPU."""
    with torch.inference_mode(mode=False):
        return torch.tensor(rows, device=device)


def masked_loss(
    logits_mv: Tensor, labels_m: Tensor, *, config: GeneBertConfig, num_items_in_batch: Tensor | int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masked loss and its phenotype and gene parts.

    ``loss = phenotype_loss_weight * phenotypes + gene_loss_weight * genes`` in every case. A part is the sum of its
    tokens' cross entropies divided by

    - its own number of labelled tokens in this batch, when ``num_items_in_batch`` is None;
    - ``num_items_in_batch[0]`` (phenotypes) or ``[1]`` (genes), when it holds both counts of the whole global batch:
      then the parts of any cut into accumulation steps and ranks add up to the parts of the uncut batch;
    - ``num_items_in_batch``, when it is one number: a sum that is exact under accumulation, but in which the many genes
      weigh more than the few phenotypes.

    Args:
        logits_mv: Shape (m, v), any precision; the loss is computed in float32.
        labels_m: True input id, shape (m,); -100 is ignored. Ids below ``first_bin_id`` belong to the phenotype part.
        config: Gives the weights and ``first_bin_id``.
        num_items_in_batch: None, a tensor of shape (2,), or one number.

    Returns:
        The loss, and the two parts unweighted and detached. A part without labelled tokens is 0, with gradients of 0.
    """
    entropy_m = F.cross_entropy(logits_mv.float(), labels_m, ignore_index=IGNORED_LABEL, reduction="none")
    is_phenotype_m = (labels_m >= 0) & (labels_m < config.first_bin_id)
    is_part_2m = torch.stack([is_phenotype_m, labels_m >= config.first_bin_id]).to(entropy_m.dtype)
    counts_2 = is_part_2m.sum(1) if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(entropy_m)
    parts_2 = (is_part_2m * entropy_m).sum(1) / counts_2.clamp(min=1)
    loss = config.phenotype_loss_weight * parts_2[0] + config.gene_loss_weight * parts_2[1]
    return loss, parts_2[0].detach(), parts_2[1].detach()


class GeneBertForClassification(GeneBertPreTrainedModel):
    """Names the class of a cell from its first token: dense, gelu, dropout, classifier."""

    def __init__(self, config: GeneBertConfig) -> None:
        super().__init__(config)
        if config.class_weights is not None and len(config.class_weights) != config.num_labels:
            raise InputError(
                f"class_weights holds {len(config.class_weights)} weights for {config.num_labels} classes. "
                "Give one for each."
            )
        self.num_labels = cast(int, config.num_labels)
        self.genebert = GeneBertModel(config)
        self.pre_classifier = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier_dropout = Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.direct_classes = DirectPath(config.type_vocab_size, self.num_labels) if config.direct_path else None
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        key_log_gate: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | int | float | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Score the classes of each cell.

        Args:
            input_ids: As for ``GeneBertModel``; so are the arguments not named here.
            token_type_ids: Like ``input_ids``.
            attention_mask: Padded only, (n, l).
            labels: Class of each cell, (n,); -100 is ignored.
            cu_seqlens: Packed only, (n + 1,).
            max_seqlen: Packed only.
            lengths: Packed only.
            key_log_gate: (n, l) or packed (l,).
            inputs_embeds: (n, l, h) or (l, h).
            num_items_in_batch: Denominator of the loss, see ``weighted_loss``.
            output_hidden_states: Return all hidden states too; the last is that of the first tokens, (n, h).
            **kwargs: What trainers and wrappers add; ignored.

        Returns:
            ``logits`` of shape (n, k), and ``loss`` when labels are given.
        """
        batch = pack_cells(
            (input_ids, token_type_ids, inputs_embeds, key_log_gate),
            attention_mask=attention_mask,
            cells=(cu_seqlens, max_seqlen, lengths),
            pad_token_id=self.config.pad_token_id,
        )
        encoded = self.genebert(
            **batch.model_inputs(),
            read_positions=batch.packing.cu_seqlens[:-1].long(),  # first token of each cell
            output_hidden_states=output_hidden_states,
        )
        hidden_nh = F.gelu(self.pre_classifier(encoded.last_hidden_state))
        logits_nk = self.classifier(self.classifier_dropout(hidden_nh))
        if self.direct_classes is not None:
            logits_nk = logits_nk.float() + self.genebert.votes(self.direct_classes, batch)
        loss = None
        if labels is not None:
            weights = self.config.class_weights
            loss = weighted_loss(logits_nk, labels, class_weights=weights, num_items_in_batch=num_items_in_batch)
        states = encoded.hidden_states and _repad_states(encoded.hidden_states, batch, is_last_read=True)
        return SequenceClassifierOutput(loss=loss, logits=logits_nk, hidden_states=states)


def weighted_loss(
    logits_nk: Tensor,
    labels_n: Tensor,
    *,
    class_weights: Sequence[float] | None = None,
    num_items_in_batch: Tensor | int | float | None = None,
) -> Tensor:
    """Return the class-weighted cross entropy with an explicit denominator.

    ``sum(w * ce) / num_items_in_batch``, where the trainer gives the cells of the whole global batch, so that any cut
    of it into accumulation steps and ranks adds up to the same step; weights that average 1 over the training cells
    keep its scale. Without it ``sum(w * ce) / sum(w)``, the usual weighted mean of one batch, which cannot be summed
    over cuts.

    Args:
        logits_nk: Shape (n, k), any precision; the loss is computed in float32.
        labels_n: Shape (n,); -100 is ignored.
        class_weights: One weight for each class, length k; None means 1.
        num_items_in_batch: The denominator, or None.

    Returns:
        Scalar; 0 with gradients of 0 when no cell has a label.
    """
    logits_nk = logits_nk.float()
    entropy_n = F.cross_entropy(logits_nk, labels_n, ignore_index=IGNORED_LABEL, reduction="none")
    has_label_n = labels_n != IGNORED_LABEL
    weight_n = has_label_n.to(entropy_n.dtype)
    if class_weights is not None:
        weight_n = weight_n * logits_nk.new_tensor(class_weights)[labels_n.clamp(min=0)]
    weighed = (weight_n * entropy_n).sum()
    if num_items_in_batch is not None:
        return weighed / torch.as_tensor(num_items_in_batch).to(weighed)
    total = weight_n.sum()
    return weighed / torch.where(total > 0, total, torch.ones_like(total))


AutoConfig.register("genebert", GeneBertConfig, exist_ok=True)
AutoModel.register(GeneBertConfig, GeneBertModel, exist_ok=True)
AutoModelForMaskedLM.register(GeneBertConfig, GeneBertForPhenotypicMLM, exist_ok=True)
AutoModelForSequenceClassification.register(GeneBertConfig, GeneBertForClassification, exist_ok=True)
