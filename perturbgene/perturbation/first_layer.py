"""The first layer of edited copies of a cell, from that of the cell itself.

Owns the exact update of attention for tokens that are removed, changed or added; leaves the edits to `edits` and all
further layers to the model. In the first layer, a copy has the queries, keys and values of its cell at all tokens that
are not edited. A query with the output o = sum_j p_j v_j over the cell's keys has, without keys R and with new keys A,

    o' = (o - sum_R p_j v_j + sum_A p_j v_j) / (1 - sum_R p_j + sum_A p_j),    p_j = exp(q k_j - log sum_cell exp(q k))

This is exact, and takes one product for each token of the copy instead of one for each pair of tokens. Letters: m
copies, t their tokens, l tokens of the cell, a those and the new ones of all copies, r slots of a copy (all tokens of
the cell, then the copy's new ones), j its edited tokens, x edited tokens of all copies, d size of a head.
"""

from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor

from perturbgene.data_utils.data_collators import Batch
from perturbgene.data_utils.labels import SPECIAL_TOKENS
from perturbgene.model import GeneBertModel
from perturbgene.model.layers import GeneBertLayer

NUM_SPECIAL = len(SPECIAL_TOKENS)
#: Minimum share of attention that the removal of keys leaves. With less, rounding errors would grow by a factor of more
#: than 20, so the query attends to all tokens of its copy.
LEAST_REST = 0.05
#: Attention weights that are computed at once.
MOST_WEIGHTS = {"cpu": 1 << 20, "cuda": 1 << 26}


@dataclass(frozen=True)
class _Tokens:
    """Tokens with what the first layer computes of them, attention over the cell's keys included; in float32."""

    residual_lh: Tensor
    q_lhd: Tensor  # scaled
    k_lhd: Tensor
    v_lhd: Tensor
    out_lhd: Tensor  # attention's output
    log_sum_lh: Tensor  # logarithm of the softmax's denominator

    def __add__(self, other: Self) -> Self:
        return type(self)(*(torch.cat(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))


class FirstLayer:
    """The first layer of one cell, and what it returns for edited copies of that cell.

    Args:
        base: The encoder, in evaluation mode and without gradients.
        input_ids_l, token_type_ids_l: The tokens of the cell that the encoder reads, shape (l,).
    """

    def __init__(self, base: GeneBertModel, input_ids_l: Tensor, token_type_ids_l: Tensor) -> None:
        self.base, self.layer = base, cast(GeneBertLayer, base.layers[0])
        self.input_ids_l = input_ids_l
        self.cell = self._tokens(input_ids_l, token_type_ids_l, cell=None)
        place_l = torch.arange(len(input_ids_l), device=input_ids_l.device)
        self.place_k = place_l.new_full((NUM_SPECIAL + base.config.type_vocab_size,), -1)
        self.place_k[_kind(input_ids_l, token_type_ids_l)] = place_l

    def of_copies(self, batch: Batch) -> Tensor:
        """Return the layer's output for a packed batch of copies, at the tokens that are read, (t, h)."""
        ids_t, types_t = batch["input_ids"], batch["token_type_ids"]
        num_copies, num_own = len(batch["lengths"]), len(self.input_ids_l)
        copy_t = torch.arange(num_copies, device=ids_t.device).repeat_interleave(batch["cu_seqlens"].diff().long())
        if "is_read" in batch:
            ids_t, types_t, copy_t = (values[batch["is_read"]] for values in (ids_t, types_t, copy_t))
        place_t = self.place_k[_kind(ids_t, types_t)]  # among the tokens of the cell, then (below) the new ones
        new_t = ((place_t < 0) | (self.input_ids_l[place_t] != ids_t)).nonzero().squeeze(1)
        tokens, slot_t = self.cell, place_t
        # A removed token keeps its slot until the end, so that copies differ from the cell by broadcasting alone.
        token_mr = torch.arange(num_own, device=ids_t.device).expand(num_copies, -1)
        if len(new_t):
            new_2c, new_e = torch.stack([ids_t[new_t], types_t[new_t]]).unique(dim=1, return_inverse=True)
            tokens = self.cell + self._tokens(*new_2c, cell=self.cell)
            place_t[new_t] = num_own + new_e
            rank_e, slot_t = _rank(copy_t[new_t]), place_t.clone()
            slot_t[new_t] = num_own + rank_e
            added_mx = token_mr.new_zeros(num_copies, int(rank_e.max()) + 1)
            added_mx[copy_t[new_t], rank_e] = place_t[new_t]
            token_mr = torch.cat([token_mr, added_mx], dim=1)
        is_here_ma = torch.zeros(num_copies, len(tokens.q_lhd), dtype=torch.bool, device=ids_t.device)
        is_here_ma[copy_t, place_t] = True
        attended_mrhd = self._attended(tokens, token_mr, is_here_ma, copy_t=copy_t, slot_t=slot_t)
        residual_mrh = tokens.residual_lh[token_mr] if len(new_t) else tokens.residual_lh
        attended_mrh = attended_mrhd.flatten(2).to(residual_mrh.dtype)
        hidden_mrh = self.layer.after_attention(residual_mrh, attended_mrh)
        return hidden_mrh.flatten(0, 1).index_select(0, copy_t * token_mr.shape[1] + slot_t)

    def _attended(
        self, tokens: _Tokens, token_mr: Tensor, is_here_ma: Tensor, *, copy_t: Tensor, slot_t: Tensor
    ) -> Tensor:
        """Return attention's output at the slots of the copies, (m, r, heads, d)."""
        num_own, (num_copies, num_slots) = len(self.input_ids_l), token_mr.shape
        is_edited_ma = is_here_ma.clone()
        is_edited_ma[:, :num_own] ^= True
        copy_x, place_x = is_edited_ma.nonzero().unbind(1)
        rank_x = _rank(copy_x)
        key_mj = token_mr.new_zeros(num_copies, int(rank_x.max()) + 1 if len(rank_x) else 1)
        sign_mj = tokens.q_lhd.new_zeros(key_mj.shape)
        key_mj[copy_x, rank_x] = place_x
        sign_mj[copy_x, rank_x] = torch.where(place_x < num_own, -1.0, 1.0)
        weight_mahj = torch.einsum("ahd,mjhd->mahj", tokens.q_lhd, tokens.k_lhd[key_mj])
        weight_mahj = (weight_mahj - tokens.log_sum_lh[..., None]).exp_() * sign_mj[:, None, None]
        if num_slots == num_own:  # only removals: all copies have the same slots
            weight_mrhj, out = weight_mahj, tokens.out_lhd.expand(num_copies, -1, -1, -1)
        else:
            weight_mrhj, out = weight_mahj[torch.arange(num_copies)[:, None], token_mr], tokens.out_lhd[token_mr]
        changed = torch.empty(out.shape, device=out.device)
        for index in range(key_mj.shape[1]):
            value_m1hd = tokens.v_lhd[key_mj[:, index]][:, None]
            out = torch.addcmul(out, weight_mrhj[..., index, None], value_m1hd, out=changed)
        rest_mrh = 1 + weight_mrhj.sum(dim=-1)
        out /= rest_mrh[..., None]
        is_sure_mr = ((rest_mrh >= LEAST_REST) & rest_mrh.isfinite()).all(dim=-1)
        unsure_t = (~is_sure_mr[copy_t, slot_t]).nonzero().squeeze(1)
        most = max(1, limit_on(copy_t.device, MOST_WEIGHTS) // (tokens.q_lhd.shape[1] * is_here_ma.shape[1]))
        for some in unsure_t.split(most):
            copy_s, slot_s = copy_t[some], slot_t[some]
            logit_sha = torch.einsum("shd,ahd->sha", tokens.q_lhd[token_mr[copy_s, slot_s]], tokens.k_lhd)
            logit_sha.masked_fill_(~is_here_ma[copy_s, None], -torch.inf)
            out[copy_s, slot_s] = torch.einsum("sha,ahd->shd", logit_sha.softmax(dim=-1), tokens.v_lhd)
        return out

    def _tokens(self, input_ids_a: Tensor, token_type_ids_a: Tensor, *, cell: _Tokens | None) -> _Tokens:
        """Compute tokens, with attention over the keys of a cell; None: these tokens are the cell."""
        heads = self.base.config.num_attention_heads
        hidden_ah = self.base.embeddings(input_ids_a, token_type_ids_a)
        q_ahd, k_ahd, v_ahd = self.layer.qkv(hidden_ah).float().view(len(hidden_ah), 3, heads, -1).unbind(1)
        q_ahd = q_ahd * q_ahd.shape[-1] ** -0.5
        k_lhd, v_lhd = (k_ahd, v_ahd) if cell is None else (cell.k_lhd, cell.v_lhd)
        outs, log_sums = [], []
        for some_ahd in q_ahd.split(max(1, limit_on(q_ahd.device, MOST_WEIGHTS) // (heads * len(k_lhd)))):
            logit_hal = torch.einsum("ahd,lhd->hal", some_ahd, k_lhd)
            log_sums.append(logit_hal.logsumexp(dim=-1))
            outs.append(torch.einsum("hal,lhd->ahd", logit_hal.sub_(log_sums[-1][..., None]).exp_(), v_lhd))
        return _Tokens(hidden_ah, q_ahd, k_ahd, v_ahd, torch.cat(outs), torch.cat(log_sums, dim=1).T)


def limit_on(device: torch.device, limits: dict[str, int]) -> int:
    """Return the limit for a device, of those for the CPU and for any other."""
    return limits["cpu" if device.type == "cpu" else "cuda"]


def _kind(input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
    """Return what a sequence has once: the token type, shifted, or the id of a special token, which all have type 0."""
    return torch.where(token_type_ids == 0, input_ids, token_type_ids + NUM_SPECIAL - 1)


def _rank(copy_e: Tensor) -> Tensor:
    """Return the rank of each entry among those of its copy; entries are in the order of copies."""
    return torch.arange(len(copy_e), device=copy_e.device) - torch.searchsorted(copy_e, copy_e)
