"""What removing every gene of a cell would do, to first order: one forward and few backward passes for all genes.

Owns the gradient screen; leaves what is compared to `readouts`. docs/perturbation.md derives it. Letters: n cells, l
tokens, a queries, h hidden size, d size of a head, r directions.

In one layer and head, a query with weights p over the keys has the output o = sum_j p_j v_j. Without key i the softmax
renormalises, and the output is exactly (o - p_i v_i) / (1 - p_i), which differs by p_i / (1 - p_i) (o - v_i). The
screen adds up, over queries, heads and layers, the product of that difference with the gradient at o.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perturbgene.data_utils.data_collators import Batch, pack
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.eval_utils import model_device, to_device
from perturbgene.model import GeneBertLayer
from perturbgene.readouts import LabelReadout, Readout, in_budget, token_budget
from perturbgene.runs import Run

#: Random directions along which the length of a shift of the state is measured.
NUM_DIRECTIONS = 32
#: Below this share of attention left, a query looked at nothing but the removed token and its output is undefined.
LEAST_REST = 1e-3
#: Attention weights that are held at once: on a CPU so few that they stay in its cache (twice as fast at 1,000 genes).
MOST_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 26}
#: Bytes of gradients at the layers' outputs that are held at once.
MOST_GRADIENT_BYTES = 1 << 30


@dataclass
class _Trace:
    """What one layer did in the forward pass.

    Args:
        layer: The layer.
        hidden_lh: What went in.
        reads_a: Flat positions of the queries, ascending; None for all tokens.
        out_ah: Attention's output of all heads, before the output projection; part of the graph.
    """

    layer: GeneBertLayer
    hidden_lh: Tensor
    reads_a: Tensor | None
    out_ah: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def _traced(model: torch.nn.Module) -> Iterator[list[_Trace]]:
    """Keep what every layer's attention saw and gave, as long as the block lasts."""
    traces: list[_Trace] = []

    def enter(layer: Any, arguments: tuple[Any, ...]) -> None:
        hidden_lh, _, reads_a = arguments[:3]
        traces.append(_Trace(layer, hidden_lh, reads_a))

    def leave(_: Any, arguments: tuple[Any, ...]) -> None:
        traces[-1].out_ah = arguments[0]

    handles = []
    for layer in getattr(model, "genebert").layers:  # noqa: B009
        handles += [layer.register_forward_pre_hook(enter), layer.attention_out.register_forward_pre_hook(leave)]
    try:
        yield traces
    finally:
        for handle in handles:
            handle.remove()


def screen_removals(
    run: Run,
    block: TokenBlock,
    readout: Readout,
    *,
    num_directions: int = NUM_DIRECTIONS,
    towards_n: np.ndarray | None = None,
    budget: int | None = None,
) -> np.ndarray:
    """Estimate the effect of removing each gene of each cell, in the units of `readouts.exact_effects`.

    Args:
        run: The model and its tokenizer.
        block: From `readouts.sequences`.
        readout: What is compared.
        num_directions: For states: backward passes, each along a random direction; as many as the hidden size are exact
            to first order.
        towards_n: For labels: another label of interest for each cell, shape (n,).
        budget: Tokens that run at once; None takes what suits the device.

    Returns:
        float32 of shape (l,); missing (NaN) at tokens that are no genes.
    """
    budget = min(_most_tokens(run, readout, num_directions), token_budget(run.model) if budget is None else budget)
    scores = []
    for piece in in_budget(np.diff(block.offsets_n1), budget=budget):
        rows = np.arange(piece.start, piece.stop)
        batch = to_device(pack(block.take(rows)), model_device(run.model))
        wanted = None if towards_n is None else torch.from_numpy(towards_n[rows]).to(batch["input_ids"].device)
        scores.append(_screen_batch(run, batch, readout, num_directions=num_directions, towards_n=wanted))
    estimate_l = np.concatenate(scores).astype(np.float32)
    return np.where(block.token_type_ids_l >= run.tokenizer.first_gene_type, estimate_l, np.nan)


def _most_tokens(run: Run, readout: Readout, num_directions: int) -> int:
    """Return how many tokens' gradients fit into memory, one set for each backward pass."""
    config = run.model.config
    num_passes = 1 if isinstance(readout, LabelReadout) else num_directions
    return max(1, MOST_GRADIENT_BYTES // (4 * num_passes * config.num_hidden_layers * config.hidden_size))


def _screen_batch(
    run: Run, batch: Batch, readout: Readout, *, num_directions: int, towards_n: Tensor | None
) -> np.ndarray:
    is_gene_l = batch["token_type_ids"] >= run.tokenizer.first_gene_type
    was_training = run.model.training
    run.model.eval()
    try:
        with torch.enable_grad(), _traced(run.model) as traces:
            if isinstance(readout, LabelReadout):
                targets = readout.log_odds(readout.logits(run.model, batch), towards_n=towards_n).sum()[None]
                scale_n = None
            else:
                states_nh = readout.read(run.model, batch, is_counted_l=is_gene_l)
                targets, scale_n = _along_directions(states_nh, num_directions)
    finally:
        run.model.train(was_training)
    outs = [trace.out_ah for trace in traces]
    gradients = [
        torch.autograd.grad(target, outs, retain_graph=index + 1 < len(targets)) for index, target in enumerate(targets)
    ]
    change_lr = torch.zeros(len(is_gene_l), len(gradients), device=is_gene_l.device)
    with torch.no_grad():
        for trace, gradient_rah in zip(traces, zip(*gradients, strict=True), strict=True):
            _add_downdate(change_lr, trace, torch.stack(gradient_rah, dim=1), batch)
    if scale_n is None:
        return change_lr[:, 0].cpu().numpy()
    lengths = batch["cu_seqlens"].diff().long()
    return (change_lr.square().sum(dim=1) * scale_n.repeat_interleave(lengths)).cpu().numpy()


def _along_directions(states_nh: Tensor, num_directions: int) -> tuple[Tensor, Tensor]:
    """Return the states' sum along random orthonormal directions, (r,), and what turns squared shifts into distances.

    A small shift s of a state e has the cosine distance |s_|^2 / (2 |e|^2), where s_ is the part of s across e; its
    squared length is h / r times that along r of h orthonormal directions, on average.
    """
    h = states_nh.shape[1]
    count = min(num_directions, h)
    random_hh = torch.from_numpy(np.random.default_rng(0).standard_normal((h, h))).to(states_nh.device, torch.float32)
    direction_hr = torch.linalg.qr(random_hh).Q[:, :count]
    unit_nh = F.normalize(states_nh.detach(), dim=1)
    across_nhr = direction_hr[None] - unit_nh[:, :, None] * (unit_nh @ direction_hr)[:, None, :]
    scale_n = h / count / (2 * states_nh.detach().square().sum(dim=1))
    return torch.einsum("nh,nhr->r", states_nh, across_nhr), scale_n


def _add_downdate(change_lr: Tensor, trace: _Trace, gradient_arh: Tensor, batch: Batch) -> None:
    """Add what one layer contributes: the change of its outputs without each key, times the gradient there."""
    heads = trace.layer.config.num_attention_heads
    q_ahd, k_lhd, v_lhd = _queries_keys_values(trace, heads)
    starts = batch["cu_seqlens"].tolist()
    position_a = torch.arange(len(change_lr)) if trace.reads_a is None else trace.reads_a.cpu()
    bounds = torch.searchsorted(position_a, torch.tensor(starts)).tolist()
    for start, stop, first, last in zip(starts[:-1], starts[1:], bounds[:-1], bounds[1:], strict=True):
        out_ahd = trace.out_ah[first:last].unflatten(1, (heads, -1))
        gradient_arhd = gradient_arh[first:last].unflatten(2, (heads, -1))
        cell = (q_ahd[first:last], k_lhd[start:stop], v_lhd[start:stop])
        change_lr[start:stop] += _downdate(*cell, out_ahd, gradient_arhd, own_key_a=position_a[first:last] - start)


def _queries_keys_values(trace: _Trace, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what attention compared, of shapes (a, heads, d) and twice (l, heads, d)."""
    layer, hidden_lh = trace.layer, trace.hidden_lh
    x_lh = layer.attention_norm(hidden_lh) if layer.norm_position == "pre" else hidden_lh
    h, weight, bias = x_lh.shape[1], layer.qkv.weight, layer.qkv.bias
    asking_ah = x_lh if trace.reads_a is None else x_lh.index_select(0, trace.reads_a)
    q_ahd = F.linear(asking_ah, weight[:h], bias[:h]).unflatten(1, (heads, -1))
    k_lhd, v_lhd = F.linear(x_lh, weight[h:], bias[h:]).unflatten(1, (2, heads, -1)).unbind(1)
    return q_ahd, k_lhd, v_lhd


def _downdate(
    q_ahd: Tensor, k_lhd: Tensor, v_lhd: Tensor, out_ahd: Tensor, gradient_arhd: Tensor, *, own_key_a: Tensor
) -> Tensor:
    """Return the first-order change without each key of one cell, (l, r), a few heads and queries at a time."""
    num_queries, heads, length = len(q_ahd), q_ahd.shape[1], len(k_lhd)
    most = MOST_WEIGHTS["cpu" if q_ahd.device.type == "cpu" else "cuda"]
    heads_at_once = min(heads, max(1, most // (num_queries * length)))
    queries_at_once = min(num_queries, max(1, most // (heads_at_once * length)))
    change_lr = torch.zeros(length, gradient_arhd.shape[1], device=q_ahd.device)
    for head in range(0, heads, heads_at_once):
        few = slice(head, head + heads_at_once)
        for query in range(0, num_queries, queries_at_once):
            some = slice(query, query + queries_at_once)
            part = (q_ahd[some, few], k_lhd[:, few], v_lhd[:, few], out_ahd[some, few], gradient_arhd[some, :, few])
            change_lr += _downdate_heads(*part, own_key_a=own_key_a[some])
    return change_lr


def _downdate_heads(
    q_ahd: Tensor, k_lhd: Tensor, v_lhd: Tensor, out_ahd: Tensor, gradient_arhd: Tensor, *, own_key_a: Tensor
) -> Tensor:
    """Sum p / (1 - p) (G . o - G . v) over queries and heads: two products with the matrix of p / (1 - p).

    A query's own key is left out: when the token goes, so does what it asked, and nobody reads its output any more.
    """
    a, r, heads, d = gradient_arhd.shape
    scaled_had = (q_ahd * d**-0.5).transpose(0, 1)
    weight_hal = (scaled_had @ k_lhd.permute(1, 2, 0)).softmax(dim=-1)
    odds_hal = weight_hal.div_((1 - weight_hal).clamp_(min=LEAST_REST))
    odds_hal[:, torch.arange(a), own_key_a] = 0
    along_har = (gradient_arhd * out_ahd[:, None]).sum(dim=-1).permute(2, 0, 1)  # G . o
    gradient_haf = gradient_arhd.permute(2, 0, 1, 3).reshape(heads, a, r * d)
    summed_hlf = odds_hal.transpose(1, 2) @ torch.cat([gradient_haf, along_har], dim=2)
    across_hlr = (summed_hlf[..., : r * d].unflatten(2, (r, d)) * v_lhd.transpose(0, 1)[:, :, None]).sum(dim=-1)
    return (summed_hlf[..., r * d :] - across_hlr).sum(dim=0).float()
