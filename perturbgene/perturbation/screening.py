"""The effect of removing each gene of a cell, to first order: one forward and few backward passes for all genes.

Owns the gradient screen; leaves what is compared to `readouts`. docs/perturbation.md derives it. Letters: n cells, l
tokens, a queries, h hidden size, d size of a head, r directions.

In one layer and head, a query with weights p over the keys has the output o = sum_j p_j v_j. Without key i the softmax
renormalises, and the output is exactly (o - p_i v_i) / (1 - p_i), which differs by p_i / (1 - p_i) (o - v_i). The
screen adds up, over queries, heads and layers, the product of that difference with the gradient G at o. The backward
pass of the softmax makes nearly that: the gradient at the logit of key i is g_i = p_i (G . v_i - G . o), so that the
product is -g_i / (1 - p_i), and the screen costs one more sum over numbers that are there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from perturbgene.data_utils.data_collators import Batch, pack
from perturbgene.data_utils.order import in_budget
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.devices import has_fast_bfloat16
from perturbgene.eval_utils import inference_mode, model_device, to_device
from perturbgene.inference.run import Run
from perturbgene.model import DirectPath, GeneBertModel, PackedCells, Packing
from perturbgene.perturbation.first_layer import limit_on
from perturbgene.perturbation.readouts import LabelReadout, Readout, token_budget

#: Directions along which the length of a shift of the state is measured.
NUM_DIRECTIONS = 12
#: Standard deviation of what is added to the attention logits of genes to see how the state shifts.
FADE = 0.5
#: Minimum share of attention on other tokens; below it, a query attends to the removed token only.
LEAST_REST = 1e-3
#: Bytes of attention weights computed at once; on a CPU few enough to stay in its cache.
BYTES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 29}
#: Attention weights of a batch that are kept from the forward to the backward pass.
MOST_KEPT = {"cpu": 1 << 25, "cuda": 1 << 29}
#: A single cell may have this many times more; with still more, they are computed again in the backward pass.
KEPT_OF_LONG_CELL = 8


def screen_removals(
    run: Run, block: TokenBlock, readout: Readout, *, num_directions: int = NUM_DIRECTIONS,
    towards_n: np.ndarray | None = None, budget: int | None = None, is_half: bool | None = None,
) -> np.ndarray:  # fmt: skip
    """Estimate the effect of removing each gene of each cell, in the units of `readouts.exact_effects`.

    Args:
        run, readout: The model, and what is compared.
        block: From `readouts.sequences`.
        num_directions: For states: number of directions in which the state shifts most, with a forward and a backward
            pass each; with as many as the hidden size the result is exact to first order.
        towards_n: For labels: the label of each cell, in place of the readout's, shape (n,).
        budget: Maximum number of tokens that run at once; None takes what suits the device.
        is_half: True for products in bfloat16; None uses it where it is faster.

    Returns:
        float32 of shape (l,); NaN at tokens that are not genes.
    """
    device, budget = model_device(run.model), token_budget(run.model, budget)
    if is_half is None:  # one layer has too little to multiply for the conversions
        is_half = has_fast_bfloat16(device.type) and run.model.config.num_hidden_layers > 1
    num_maps = run.model.config.num_hidden_layers * run.model.config.num_attention_heads
    lengths_n, most = np.diff(block.offsets_n1).astype(np.int64), max(1, limit_on(device, MOST_KEPT) // num_maps)
    scores = []
    # A cell counts as its tokens, or as its share of the attention weights that may be kept, whichever is more.
    for piece in in_budget(np.maximum(lengths_n, -(-(lengths_n**2) * budget // most)), budget=budget):
        rows = np.arange(piece.start, piece.stop)
        batch = to_device(pack(block.take(rows)), device)
        wanted = None if towards_n is None else torch.from_numpy(towards_n[rows]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_half):
            scores.append(_screen_batch(run, batch, readout, num_directions=num_directions, towards_n=wanted))
    estimate_l = np.concatenate(scores).astype(np.float32)
    return np.where(block.token_type_ids_l >= run.tokenizer.first_gene_type, estimate_l, np.nan)


def _screen_batch(
    run: Run, batch: Batch, readout: Readout, *, num_directions: int, towards_n: Tensor | None
) -> np.ndarray:
    is_gene_l = batch["token_type_ids"] >= run.tokenizer.first_gene_type
    direction_nhr = scale_n = None
    if not isinstance(readout, LabelReadout):
        direction_nhr = _directions(run, batch, readout, count=num_directions)
    with torch.enable_grad(), _screening(run, batch) as sums:
        if isinstance(readout, LabelReadout):
            targets = readout.log_odds(readout.logits(run.model, batch), towards_n=towards_n).sum()[None]
        else:
            states_nh = readout.read(run.model, batch, is_counted_l=is_gene_l)
            targets = torch.einsum("nh,nhr->r", states_nh, direction_nhr)
            # a small shift s of a state e has the cosine distance |s_|^2 / (2 |e|^2), where s_ is the part across e
            scale_n = 0.5 / states_nh.detach().square().sum(dim=1)
    changes = []
    for index, target in enumerate(targets):
        torch.autograd.grad(target, sums.trigger, retain_graph=index + 1 < len(targets), allow_unused=True)
        changes.append(sums.change_l)
        sums.change_l = torch.zeros_like(sums.change_l)
    if scale_n is None:
        return changes[0].cpu().numpy()
    lengths = batch["cu_seqlens"].diff().long()
    return (torch.stack(changes).square().sum(dim=0) * scale_n.repeat_interleave(lengths)).cpu().numpy()


def _directions(run: Run, batch: Batch, readout: Readout, *, count: int) -> Tensor:
    """Return orthonormal directions across each state in which most of its shifts are, (n, h, r).

    Random sums of vectors span most of the space that holds most of them (Halko, Martinsson and Tropp 2011,
    arXiv:0909.4061, algorithm 4.1). Here a sum is where the state goes when some genes fade and all others gain, drawn
    by gene, so that a cell is screened alike in any batch.
    """
    types_l = batch["token_type_ids"]
    is_gene_l = types_l >= run.tokenizer.first_gene_type
    count = min(count, run.model.config.hidden_size)
    gates_rt = FADE * np.random.default_rng(0).standard_normal((count, run.model.config.type_vocab_size))
    gates_rl = torch.from_numpy(gates_rt).to(types_l.device, torch.float32)[:, types_l] * is_gene_l
    with inference_mode(run.model), torch.autocast(types_l.device.type, enabled=False):
        state_nh, *faded = (
            readout.read(run.model, {**batch, "key_log_gate": gate_l}, is_counted_l=is_gene_l)
            for gate_l in (torch.zeros_like(gates_rl[0]), *gates_rl)
        )
        unit_nh = F.normalize(state_nh, dim=1)
        shift_nhr = _across(torch.stack(faded, dim=2) - state_nh[:, :, None], unit_nh)
        direction_nhr = _across(torch.linalg.qr(shift_nhr).Q, unit_nh)
    return direction_nhr.clone()  # outside of inference mode: a gradient goes through it


def _across(shift_nhr: Tensor, unit_nh: Tensor) -> Tensor:
    """Return the part of shifts across a unit vector of each cell."""
    return shift_nhr - unit_nh[:, :, None] * torch.einsum("nh,nhr->nr", unit_nh, shift_nhr)[:, None, :]


# -- attention that sums the effect of each key's removal -----------------------------------------------------------


@dataclass
class _Sums:
    """The backward pass adds the effect of each token's removal to these sums."""

    change_l: Tensor  # the sum so far
    keeps: bool  # whether attention weights are kept for the backward pass
    trigger: Tensor  # a scalar without effect on which all attention depends, so that its gradient passes all layers


@contextmanager
def _screening(run: Run, batch: Batch) -> Iterator[_Sums]:
    """Let attention and the direct path add to sums in their backward pass, and no weight need a gradient."""
    model, device = run.model, batch["input_ids"].device
    num_maps = model.config.num_hidden_layers * model.config.num_attention_heads
    num_weights = batch["cu_seqlens"].diff().long().square().sum().item() * num_maps
    keeps = num_weights <= limit_on(device, MOST_KEPT) * KEPT_OF_LONG_CELL
    change_l, trigger = torch.zeros(len(batch["input_ids"]), device=device), torch.zeros((), device=device)
    sums = _Sums(change_l, keeps, trigger.requires_grad_())
    was_training, learning = model.training, [weight for weight in model.parameters() if weight.requires_grad]
    paths = [module for module in model.modules() if isinstance(module, DirectPath)]
    hooks = [path.register_forward_hook(partial(_screen_linear_term, sums)) for path in paths]
    base: GeneBertModel = getattr(model, "genebert")  # noqa: B009 - typed as a module otherwise
    try:
        model.eval().requires_grad_(False)
        with base.attending_with(partial(_attend, sums)):
            yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for weight in learning:
            weight.requires_grad_(True)
        model.train(was_training)


def _attend(
    sums: _Sums, q_ahd: Tensor, k_lhd: Tensor, v_lhd: Tensor, *, queries: Packing, keys: Packing,
    key_log_gate_l: Tensor | None = None, **settings: Any,
) -> Tensor:  # fmt: skip
    """Attend like `model.attention.attention`, and add to `sums` in the backward pass."""
    assert key_log_gate_l is None  # nothing gates tokens here
    most = limit_on(q_ahd.device, BYTES_AT_ONCE) // q_ahd.element_size()
    pieces = list(_pieces(keys, queries.positions, heads=q_ahd.shape[1], most=most))
    with torch.autocast(q_ahd.device.type, enabled=False):
        out_ahd: Tensor = _ScreenedAttention.apply(q_ahd, k_lhd, v_lhd, sums.trigger, pieces, sums)
    return out_ahd


def _screen_linear_term(sums: _Sums, path: DirectPath, inputs: tuple[PackedCells, Tensor], term_nk: Tensor) -> Tensor:
    """Forward hook of the direct path: without a gene its share is gone, whatever else is there."""
    cells, expression_l = inputs
    term_lk = path.votes_tk[cells.token_type_ids] * expression_l[:, None]
    screened: Tensor = _ScreenedLinearTerm.apply(term_nk, term_lk, sums.trigger, cells.packing.lengths, sums)
    return screened


class _ScreenedLinearTerm(torch.autograd.Function):
    """The linear term of cells, (n, k), whose backward pass adds the effect of losing each token to `sums`."""

    @staticmethod
    def forward(ctx: Any, term_nk: Tensor, term_lk: Tensor, _: Tensor, lengths: list[int], sums: _Sums) -> Tensor:
        ctx.save_for_backward(term_lk, torch.tensor(lengths, device=term_lk.device))
        ctx.sums = sums
        return term_nk.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nk: Tensor) -> tuple[None, ...]:
        term_lk, lengths_n = ctx.saved_tensors
        ctx.sums.change_l -= (term_lk * grad_nk.repeat_interleave(lengths_n, dim=0)).sum(dim=1)
        return (None,) * 5


@dataclass(frozen=True)
class _Piece:
    """Some heads and queries of one cell."""

    queries: tuple[slice, slice]  # index of heads and queries
    keys: tuple[slice, slice]  # index of heads and keys
    of_cell: slice | Tensor  # the places of the cell's keys in the whole batch
    own_a: Tensor  # each query's own place among the keys


def _pieces(packing: Packing, reads_a: Tensor | None, *, heads: int, most: int) -> Iterator[_Piece]:
    """Cut attention so that about `most` weights are worked on at once."""
    position_a = torch.arange(sum(packing.lengths)) if reads_a is None else reads_a.cpu()
    starts = np.cumsum([0, *packing.lengths])
    bounds = torch.searchsorted(position_a, torch.from_numpy(starts)).tolist()
    for start, stop, first, last in zip(starts[:-1], starts[1:], bounds[:-1], bounds[1:], strict=True):
        length, count = int(stop - start), last - first
        heads_at_once = min(heads, max(1, most // max(1, count * length)))
        queries_at_once = max(1, most // (heads_at_once * length))
        for head in range(0, heads, heads_at_once):
            few = slice(head, head + heads_at_once)
            for query in range(first, last, queries_at_once):
                some = slice(query, min(query + queries_at_once, last))
                own_a = (position_a[some] - start).to(packing.cu_seqlens.device)
                of_cell = slice(start, stop)
                places = of_cell if packing.positions is None else packing.positions[of_cell]
                yield _Piece((few, some), (few, of_cell), places, own_a)


class _ScreenedAttention(torch.autograd.Function):
    """Attention that adds to `sums`, in its backward pass, what the removal of each key does to first order."""

    @staticmethod
    def forward(
        ctx: Any, q_ahd: Tensor, k_lhd: Tensor, v_lhd: Tensor, _: Tensor, pieces: list[_Piece], sums: _Sums
    ) -> Tensor:
        q_had, k_hld, v_hld = (x.transpose(0, 1).contiguous() for x in (q_ahd * q_ahd.shape[-1] ** -0.5, k_lhd, v_lhd))
        out_had, kept = torch.empty_like(q_had), []
        for piece in pieces:
            weight_hal = torch.bmm(q_had[piece.queries], k_hld[piece.keys].transpose(1, 2)).softmax(-1)
            out_had[piece.queries] = torch.bmm(weight_hal, v_hld[piece.keys])
            if sums.keeps:
                kept.append(weight_hal)
        ctx.save_for_backward(q_had, k_hld, v_hld, *kept)
        ctx.pieces, ctx.sums = pieces, sums
        return out_had.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ahd: Tensor) -> tuple[Tensor | None, ...]:
        q_had, k_hld, v_hld, *kept = ctx.saved_tensors
        grad_had = grad_ahd.transpose(0, 1).contiguous()
        is_wanted = any(ctx.needs_input_grad[:3])  # not in the first layer
        dq_had, dk_hld, dv_hld = torch.empty_like(q_had), torch.zeros_like(k_hld), torch.zeros_like(v_hld)
        for index, piece in enumerate(ctx.pieces):
            q, grad = q_had[piece.queries], grad_had[piece.queries]
            k, v = k_hld[piece.keys], v_hld[piece.keys]
            weight_hal = kept[index] if kept else torch.bmm(q, k.transpose(1, 2)).softmax(-1)
            grad_weight = torch.bmm(grad, v.transpose(1, 2))
            grad_logit = torch._softmax_backward_data(grad_weight, weight_hal, -1, weight_hal.dtype)
            ctx.sums.change_l[piece.of_cell] += _without_key(grad_logit, weight_hal, piece.own_a)
            if is_wanted:
                dq_had[piece.queries] = torch.bmm(grad_logit, k)
                dk_hld[piece.keys] += torch.bmm(grad_logit.transpose(1, 2), q)
                dv_hld[piece.keys] += torch.bmm(weight_hal.transpose(1, 2), grad)
        if not is_wanted:
            return (None,) * 6
        grads = (dq_had.mul_(q_had.shape[-1] ** -0.5), dk_hld, dv_hld)
        return *(grad.transpose(0, 1) for grad in grads), None, None, None


def _without_key(grad_logit_hal: Tensor, weight_hal: Tensor, own_a: Tensor) -> Tensor:
    """Sum -g / (1 - p) over queries and heads, (l,).

    A query's own key is left out: when the token goes, so does what it asked, and nobody reads its output any more.
    """
    rest_hal = (1 - weight_hal).clamp_(min=LEAST_REST)
    change_hal = torch.div(grad_logit_hal, rest_hal, out=rest_hal)
    change_hal[:, torch.arange(len(own_a), device=own_a.device), own_a] = 0
    return -change_hal.sum(dim=1).float().sum(dim=0)
