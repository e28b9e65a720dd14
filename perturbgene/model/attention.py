"""Attention within each cell of a packed batch, by the fastest kernel that the machine has.

Owns the choice of the kernel and the kernels; leaves projections and norms to `layers`. Letters: a queries, l tokens,
h heads here, d size of a head.
"""

import importlib.util
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from perturbgene.errors import InputError
from perturbgene.model.config import ATTENTION_KERNELS, check_choice
from perturbgene.model.packing import Packing

ROW_STEP = 32  # rows of a cell in explicit products are rounded up to multiples of this, see `_MatmulAttention`
GATE_FEATURES = 8  # flash kernels need head sizes in multiples of 8, so the gate's feature comes with seven zeros
AttentionFunction = Callable[..., Tensor]  # called like `attention`


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
    """Attend within each cell: softmax(q k / sqrt(d) + gate) v, (a, heads, d), without dropout.

    Args:
        q_ahd, k_lhd, v_lhd: Queries (a, heads, d), keys and values (l, heads, d).
        queries, keys: Boundaries of the cells among queries and keys; a cell may have fewer queries than keys.
        kernel: One of ``ATTENTION_KERNELS``.
        key_log_gate_l: Added to every query's logit for a token, (l,); finite, about -1e4 hides the token.

    Raises:
        InputError: The kernel is not installed, or does not support this device or precision.
    """
    head_size = q_ahd.shape[-1]
    scale = head_size**-0.5
    kernel = choose_kernel(kernel, q_ahd)
    if key_log_gate_l is not None:  # one more feature (key: gate, query: 1), which any kernel differentiates
        q_ahd = F.pad(F.pad(q_ahd, (0, 1), value=1 / scale), (0, GATE_FEATURES - 1))  # (a, h, d) -> (a, h, d + 8)
        gate_lh1 = key_log_gate_l.to(k_lhd.dtype)[:, None, None].expand(-1, k_lhd.shape[1], 1)
        k_lhd = F.pad(torch.cat([k_lhd, gate_lh1], dim=-1), (0, GATE_FEATURES - 1))
        v_lhd = F.pad(v_lhd, (0, GATE_FEATURES))
    bounds = (queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen, keys.max_seqlen)
    if kernel == "varlen":
        out_ahd = cast(Tensor, varlen_attn(q_ahd, k_lhd, v_lhd, *bounds, scale=scale))
    elif kernel == "flash":
        from flash_attn import flash_attn_varlen_func  # optional, and takes seconds to import

        out_ahd = cast(Tensor, flash_attn_varlen_func(q_ahd, k_lhd, v_lhd, *bounds, softmax_scale=scale))
    elif kernel == "sdpa":
        used_q, used_k = sum(queries.lengths), sum(keys.lengths)
        # Split, not sliced cell by cell: the gradient of a slice is a whole row of zeros, that of a split one `cat`.
        parts = (q_ahd[:used_q].split(queries.lengths), *(x[:used_k].split(keys.lengths) for x in (k_lhd, v_lhd)))
        outs = []
        for cell in zip(*parts, strict=True):  # one by one: no padded batch was faster on a CPU
            q_1had, k_1hld, v_1hld = (x.transpose(0, 1)[None] for x in cell)
            out_1had = F.scaled_dot_product_attention(q_1had, k_1hld, v_1hld, scale=scale)
            outs.append(out_1had[0].transpose(0, 1))
        outs.append(q_ahd.new_zeros(len(q_ahd) - used_q, *q_ahd.shape[1:]))  # rows outside of any cell
        out_ahd = torch.cat(outs)
    else:
        with torch.autocast(q_ahd.device.type, enabled=False):  # the softmax keeps the precision of its input
            out_ahd = cast(Tensor, _MatmulAttention.apply(q_ahd, k_lhd, v_lhd, queries, keys, scale))
    return out_ahd[..., :head_size] if key_log_gate_l is not None else out_ahd


def choose_kernel(kernel: str, q_ahd: Tensor) -> str:
    """Return the kernel to run: the given one, or for ``auto`` the fastest for device, precision and head size.

    ``auto`` follows the measurements in docs/experiments.md, "Attention on a CPU".

    Raises:
        InputError: The given kernel cannot run here.
    """
    check_choice("attention_kernel", kernel, ATTENTION_KERNELS)
    is_half = q_ahd.dtype in (torch.bfloat16, torch.float16)
    runs_flash = q_ahd.is_cuda and is_half and q_ahd.shape[-1] % 8 == 0 and q_ahd.shape[-1] + GATE_FEATURES <= 256
    if kernel == "auto":
        if runs_flash and torch.cuda.get_device_capability(q_ahd.device) >= (8, 0):
            return "varlen"
        return "matmul" if is_half and q_ahd.device.type == "cpu" else "sdpa"
    if kernel == "flash":
        check_flash_installed()
    if kernel in ("varlen", "flash") and not runs_flash:
        raise InputError(
            f"attention_kernel {kernel!r} needs bf16 or fp16 on CUDA and a head size in multiples of 8 up to 248, "
            f"but got {q_ahd.dtype} on {q_ahd.device.type} with heads of {q_ahd.shape[-1]}. "
            "Use 'auto', or train with --bf16."
        )
    return kernel


def check_flash_installed() -> None:
    """Raise an InputError if flash-attn cannot be imported."""
    if importlib.util.find_spec("flash_attn") is None:
        raise InputError(
            "attention_kernel 'flash' needs the package flash_attn, which is not installed. Install flash-attn, or "
            "leave out --attn_implementation: 'auto' runs without padding too."
        )


def _cell_slices(*packings: Packing) -> Iterator[tuple[slice, ...]]:
    """Yield the rows of each cell in each packing."""
    bounds = [[0, *accumulate(packing.lengths)] for packing in packings]
    return zip(*(map(slice, ends, ends[1:]) for ends in bounds), strict=True)


class _MatmulAttention(torch.autograd.Function):
    """Attention by explicit matrix products, cell by cell, that saves only what its backward pass needs.

    Each cell is copied to contiguous blocks (heads, l, d), with l rounded up to a multiple of ``ROW_STEP``: products of
    strided views copy them each time, a softmax over odd lengths ends in a slow loop, and oneDNN compiles (0.6 ms) and
    keeps (0.6 MiB) code for every new shape. Keys added by rounding have the logit -inf; queries added by rounding are
    0, and so are their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, q_ahd: Tensor, k_lhd: Tensor, v_lhd: Tensor, queries: Packing, keys: Packing, scale: float
    ) -> Tensor:
        needs_grad, saved = any(ctx.needs_input_grad), []
        out_ahd = _empty_rows(q_ahd, num_used=sum(queries.lengths))
        for of_q, of_k in _cell_slices(queries, keys):
            q_had = _to_block(q_ahd[of_q]).mul_(scale)
            k_hld, v_hld = _to_block(k_lhd[of_k]), _to_block(v_lhd[of_k])
            logit_hal = torch.bmm(q_had, k_hld.transpose(1, 2))
            if (num_keys := of_k.stop - of_k.start) < logit_hal.shape[-1]:
                logit_hal[..., num_keys:].fill_(-torch.inf)
            weight_hal = torch.softmax(logit_hal, -1, out=logit_hal)  # in place, still in the cache for the product
            _write_product(out_ahd[of_q], weight_hal, v_hld)
            if needs_grad:
                saved += [q_had, k_hld, v_hld, weight_hal]
        ctx.save_for_backward(*saved)
        ctx.queries, ctx.keys, ctx.scale, ctx.num_keys = queries, keys, scale, len(k_lhd)
        return out_ahd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ahd: Tensor) -> tuple[Tensor | None, ...]:
        saved, num_used = ctx.saved_tensors, sum(ctx.keys.lengths)
        like_lhd = grad_ahd.new_empty(1, 1, 1).expand(ctx.num_keys, *grad_ahd.shape[1:])
        dq_ahd = _empty_rows(grad_ahd, num_used=sum(ctx.queries.lengths))
        dk_lhd, dv_lhd = _empty_rows(like_lhd, num_used=num_used), _empty_rows(like_lhd, num_used=num_used)
        cells = zip(_cell_slices(ctx.queries, ctx.keys), saved[::4], saved[1::4], saved[2::4], saved[3::4], strict=True)
        for (of_q, of_k), q_had, k_hld, v_hld, weight_hal in cells:
            grad_had = _to_block(grad_ahd[of_q])
            _write_product(dv_lhd[of_k], weight_hal.transpose(1, 2), grad_had)
            grad_weight = torch.bmm(grad_had, v_hld.transpose(1, 2))
            grad_logit = torch._softmax_backward_data(grad_weight, weight_hal, -1, weight_hal.dtype)
            _write_product(dq_ahd[of_q], grad_logit, k_hld)
            _write_product(dk_lhd[of_k], grad_logit.transpose(1, 2), q_had)
        return dq_ahd.mul_(ctx.scale), dk_lhd, dv_lhd, None, None, None


def _empty_rows(like_lhd: Tensor, *, num_used: int) -> Tensor:
    """Return a tensor of the same shape to write to; rows outside of any cell are 0."""
    rows_lhd = like_lhd.new_empty(like_lhd.shape)
    rows_lhd[num_used:].zero_()
    return rows_lhd


def _to_block(x_lhd: Tensor) -> Tensor:
    """Copy a cell's (l, heads, d) to contiguous (heads, l, d), with l rounded up by rows of 0."""
    x_hld = x_lhd.transpose(0, 1)
    num_added = -len(x_lhd) % ROW_STEP
    return F.pad(x_hld, (0, 0, 0, num_added)) if num_added else x_hld.clone(memory_format=torch.contiguous_format)


def _write_product(out_lhd: Tensor, left_hlx: Tensor, right_hxd: Tensor) -> None:
    """Write a product (heads, l, d) to the rows of a cell, without the rows added by rounding."""
    out_hld = out_lhd.transpose(0, 1)
    if left_hlx.shape[1] == len(out_lhd):
        torch.bmm(left_hlx, right_hxd, out=out_hld)
    else:
        out_hld.copy_(torch.bmm(left_hlx, right_hxd)[:, : len(out_lhd)])
