"""Floating point operations: how many a batch needs, and how many a second the machine can give.

Owns the count of the matrix products of a GeneBERT model and the measurement of a matmul peak; leaves clocks, logs and
the model itself to others. What is counted is what the batch *needs*, whatever was computed beside it: no padding, the
last layer and the head only at read tokens. So the share of the peak (MFU) of two ways to train can be compared.
Letters: l tokens, m read tokens, h hidden size, i size within the feed-forward part, v input ids.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from perturbgene.model import GeneBertConfig

#: Side of the square matrices that are multiplied: large enough to reach the peak, small enough for a few milliseconds.
PEAK_SIDES = {"cpu": 512, "cuda": 8192}


def forward_flops(config: "GeneBertConfig", lengths: Sequence[int], *, num_reads: int) -> float:
    """Count the operations of one forward pass, two for each multiply-add of a matrix product.

    A layer needs ``l (8 h h + 4 h i)`` for its projections and ``4 h len^2`` for the attention of a cell of ``len``
    tokens; the last layer makes keys and values of all tokens, ``4 h h l``, and the rest for its m reads only; the
    head needs ``m (2 h h + 2 h v)``. Norms, activations and look-ups are left out, as is usual.

    Args:
        config: Gives the sizes.
        lengths: Tokens of each cell, without padding.
        num_reads: Tokens whose output is read: the labelled ones in training, one for each cell in classification.
            They count as spread over the cells in proportion to their lengths.

    Example:
        >>> from perturbgene.model import GeneBertConfig
        >>> config = GeneBertConfig(
        ...     hidden_size=2, num_attention_heads=1, intermediate_size=3, num_hidden_layers=1, vocab_size=5
        ... )
        >>> forward_flops(config, [4], num_reads=1)  # 4*16 + 1*(16 + 24) + 1*8*4 + 1*(8 + 20)
        164.0
    """
    h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    num_tokens, num_pairs = sum(lengths), sum(length * length for length in lengths)
    if not num_tokens:
        return 0.0
    full_layer = num_tokens * (8 * h * h + 4 * h * i) + 4 * h * num_pairs
    read_pairs = num_reads * num_pairs / num_tokens
    last_layer = num_tokens * 4 * h * h + num_reads * (4 * h * h + 4 * h * i) + 4 * h * read_pairs
    head = num_reads * (2 * h * h + 2 * h * v)
    return float((config.num_hidden_layers - 1) * full_layer + last_layer + head)


def flops_of_batch(config: "GeneBertConfig", lengths: Sequence[int], *, num_reads: int) -> float:
    """Count the operations of a training step, forward and backward: three times the forward pass.

    Args:
        config: As for ``forward_flops``; so are the others.
        lengths: Tokens of each cell.
        num_reads: Tokens whose output is read.
    """
    return 3 * forward_flops(config, lengths, num_reads=num_reads)


def measured_peak(device: torch.device | str, dtype: torch.dtype, *, seconds: float = 0.5) -> float:
    """Measure the operations per second of a large matrix product: the fastest of those that fit into ``seconds``.

    Args:
        device: Where to measure; on the CPU with the threads that torch has now.
        dtype: Of the matrices; float32 as ``torch.get_float32_matmul_precision()`` says.
        seconds: How long to try, after one product to warm up.
    """
    device = torch.device(device)
    side = PEAK_SIDES.get(device.type, 2048)
    left, right = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    _seconds_of_product(left, right)
    until, times = time.perf_counter() + seconds, [_seconds_of_product(left, right)]
    while time.perf_counter() < until:
        times.append(_seconds_of_product(left, right))
    return 2 * side**3 / min(times)


def _seconds_of_product(left: torch.Tensor, right: torch.Tensor) -> float:
    _wait(left.device)
    started = time.perf_counter()
    torch.matmul(left, right)
    _wait(left.device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
