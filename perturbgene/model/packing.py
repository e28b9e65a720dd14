"""Cells without padding: every batch becomes one row of tokens with the boundaries of its cells.

Owns the packed form of a batch and the way back to its padded shape; leaves what is computed on it to the layers.
Letters: n cells, l tokens, a queries, h hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perturbgene.errors import InputError


@dataclass(frozen=True, eq=False)
class Packing:
    """Boundaries of the cells in a packed row of tokens."""

    cu_seqlens: Tensor  # start of each cell and the end of the last, int32, (n + 1,)
    max_seqlen: int  # at least the length of the longest cell
    known_lengths: tuple[int, ...] | None = None  # of each cell, if known without a copy from the device
    positions: Tensor | None = None  # flat position of each token, (a,), if the row holds only some of another row's

    @classmethod
    def of(
        cls, cu_seqlens: Tensor, *, max_seqlen: int | None = None, lengths: Sequence[int] | Tensor | None = None
    ) -> "Packing":
        """Return the packing with these boundaries; what is left out is read from ``cu_seqlens``."""
        known = tuple(lengths.tolist() if isinstance(lengths, Tensor) else lengths) if lengths is not None else None
        if max_seqlen is None:
            known = known if known is not None else tuple(cu_seqlens.diff().tolist())
            max_seqlen = max(known, default=0)
        return cls(cu_seqlens.to(torch.int32), int(max_seqlen), known)

    @cached_property
    def lengths(self) -> list[int]:
        """Length of each cell; copied from the device unless the batch came with the lengths."""
        return list(self.known_lengths) if self.known_lengths is not None else self.cu_seqlens.diff().tolist()

    def at(self, positions_a: Tensor) -> "Packing":
        """Return the packing of only the tokens at ascending flat positions, shape (a,)."""
        cu_seqlens = torch.searchsorted(positions_a, self.cu_seqlens.to(positions_a.dtype), out_int32=True)
        return Packing(cu_seqlens, self.max_seqlen, positions=positions_a)


@dataclass(frozen=True, eq=False)
class PackedCells:
    """A batch without padding, and what it takes to restore its padded shape."""

    packing: Packing
    input_ids: Tensor | None = None  # (l,)
    token_type_ids: Tensor | None = None  # (l,)
    inputs_embeds: Tensor | None = None  # (l, h)
    key_log_gate: Tensor | None = None  # (l,)
    is_read: Tensor | None = None  # tokens that the transformer reads, (l,); None: what the model decides
    first_hidden: Tensor | None = None  # output of the first layer at the tokens that it reads; None: it runs
    padded_index: Tensor | None = None  # flat position of each token in the padded batch, (l,); None if it came packed
    padded_shape: tuple[int, int] | None = None  # (n, l) of the padded batch

    def is_among_first(self, count: int, *, first_gene_type: int) -> Tensor:
        """Return True for tokens that are no genes and for the first genes of each cell, (l,)."""
        assert self.token_type_ids is not None
        is_gene_l, starts_n1 = self.token_type_ids >= first_gene_type, self.packing.cu_seqlens.long()
        before_l1 = F.pad(is_gene_l.cumsum(0), (1, 0))
        before_l = before_l1[:-1] - before_l1[starts_n1[:-1]].repeat_interleave(starts_n1.diff())
        return ~is_gene_l | (before_l < count)

    def only(self, is_kept_l: Tensor) -> "PackedCells":
        """Return the cells with some of their tokens; its packing has the ``positions`` of these."""
        index = is_kept_l.nonzero().squeeze(1)
        parts = (self.input_ids, self.token_type_ids, self.inputs_embeds, self.key_log_gate)
        ids, types, embeds, gate = (None if part is None else part.index_select(0, index) for part in parts)
        return PackedCells(self.packing.at(index), ids, types, embeds, gate)

    def pack(self, values_nl: Tensor) -> Tensor:
        """Drop the padding of further per-token values; packed ones stay as they are."""
        if self.padded_index is None or values_nl.ndim == 1:
            return values_nl
        return values_nl.flatten(0, 1).index_select(0, self.padded_index)  # (n, l) -> (l,)

    def repad(self, values_lx: Tensor) -> Tensor:
        """Return values in the shape of the batch, with zeros at padding."""
        if self.padded_index is None or self.padded_shape is None:
            return values_lx
        n, length = self.padded_shape
        empty = values_lx.new_zeros((n * length, values_lx.shape[-1]))
        return empty.index_copy(0, self.padded_index, values_lx).view(n, length, -1)  # (l, x) -> (n, l, x)


def pack_cells(
    input_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    key_log_gate: Tensor | None = None,
    is_read: Tensor | None = None,
    first_hidden: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    pad_token_id: int = 3,
    **ignored: Any,
) -> PackedCells:
    """Return a batch in packed form; all models take these arguments.

    Args:
        input_ids: Padded (n, l), or packed (l,) together with ``cu_seqlens``.
        token_type_ids: Like ``input_ids``.
        attention_mask: Padded only, (n, l), nonzero at tokens; without it, everything but ``[PAD]`` is a token.
        inputs_embeds: Replaces the sum of word and type embedding, (n, l, h) or (l, h). The heads still need the ids.
        key_log_gate: Added to every query's attention logit for a token, in every layer; (n, l) or packed (l,). Zero
            changes nothing, -1e4 hides the token from all others; keep it finite.
        is_read: True for the tokens that the transformer reads, bool, (n, l) or packed (l,); the others only vote.
            Without it, ``GeneBertModel.encode`` decides.
        first_hidden: Packed only: output of the first of several layers at the tokens that are read, in their order;
            the encoder goes on from there.
        cu_seqlens: Packed only: start of each cell and end of the last, (n + 1,).
        max_seqlen: Packed only: length of the longest cell; saves a copy from the device.
        lengths: Packed only: length of each cell, on the host; saves a copy from the device.
        pad_token_id: Id of ``[PAD]``.
        **ignored: Further arguments of trainers and wrappers.

    Raises:
        InputError: Inputs are missing or have a wrong shape, or a cell is empty.
    """
    parts = (input_ids, token_type_ids, inputs_embeds, key_log_gate, is_read)
    tokens = input_ids if input_ids is not None else inputs_embeds
    if tokens is None:
        raise InputError("The model got neither input_ids nor inputs_embeds. Give one of them.")
    if inputs_embeds is None and token_type_ids is None:
        raise InputError("The model got input_ids without token_type_ids, which name each token's gene. Give both.")
    if cu_seqlens is not None:
        packing = Packing.of(cu_seqlens, max_seqlen=max_seqlen, lengths=lengths)
        return PackedCells(packing, *parts, first_hidden=first_hidden)
    if tokens.ndim != (2 if input_ids is not None else 3):
        raise InputError(f"Tokens of shape {tuple(tokens.shape)} are no padded batch. A packed one needs cu_seqlens.")
    if attention_mask is not None:
        is_token_nl = attention_mask.bool()
    elif input_ids is not None:
        is_token_nl = input_ids != pad_token_id
    else:
        is_token_nl = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    lengths_n = is_token_nl.sum(dim=1, dtype=torch.int32)
    known = lengths_n.tolist()
    if 0 in known:
        raise InputError(f"attention_mask leaves row {known.index(0)} without a token. Drop the empty cell.")
    packing = Packing.of(F.pad(lengths_n.cumsum(0, dtype=torch.int32), (1, 0)), lengths=known)
    index = is_token_nl.flatten().nonzero().squeeze(1)
    cells = PackedCells(packing, padded_index=index, padded_shape=(tokens.shape[0], tokens.shape[1]))
    ids, types, embeds, gate, read = (None if part is None else cells.pack(part) for part in parts)
    return replace(cells, input_ids=ids, token_type_ids=types, inputs_embeds=embeds, key_log_gate=gate, is_read=read)
