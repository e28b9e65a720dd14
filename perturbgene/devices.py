"""Which devices compute in bfloat16, and on which of them that pays.

Owns these two questions, which every command and the model ask; torch is imported only to answer them.
"""

import time
from functools import cache

from perturbgene.errors import InputError

#: Products of this size are timed, that many of each precision: about 50 ms. Gains of 0.6 (a Xeon) and
#: 2.1 (Zen 4) were seen.
TIMED_SIZE, ROUNDS, LEAST_GAIN = 512, 8, 1.5
LEAST_HIDDEN_SIZE = 128  # 64 wide took as long in both on a CPU with AMX, in 1.6 times the memory


@cache
def has_bfloat16(device_type: str) -> bool:
    """Return whether a device multiplies bfloat16 natively.

    A CPU needs AVX-512 (or its ARM counterpart) for oneDNN's products. Without it PyTorch takes a loop that is 12 to 21
    times as slow as float32, and some of oneDNN's operators fail.

    Args:
        device_type: As in ``torch.device(...).type``: "cpu", "cuda", ...
    """
    import torch

    if device_type == "cpu":
        is_supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # private; missing in some builds
        return is_supported is not None and bool(is_supported())
    return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def has_fast_bfloat16(device_type: str, *, hidden_size: int | None = None) -> bool:
    """Return whether a model computes faster in bfloat16 than in float32.

    A GPU that multiplies bfloat16 is faster at it. For CPUs nothing that they say of themselves decides: AVX-512's BF16
    instructions double the speed of products on Zen 4 and cost a third on a Xeon whose AMX is switched off. So
    products are timed, once. A narrow model does little else than what is not a product, and gains nothing.

    Args:
        device_type: As in ``torch.device(...).type``.
        hidden_size: Size of a token's vector; None asks of large products.
    """
    if device_type != "cpu" or not has_bfloat16(device_type):
        return has_bfloat16(device_type)
    return (hidden_size is None or hidden_size >= LEAST_HIDDEN_SIZE) and _gain_of_bfloat16() >= LEAST_GAIN


@cache
def _gain_of_bfloat16() -> float:
    """Return how many times as fast this CPU multiplies matrices in bfloat16 as in float32, each at its best."""
    import torch

    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(ROUNDS):
        for dtype in best:  # in turns, so that other work on the machine slows both
            x = torch.ones(TIMED_SIZE, TIMED_SIZE, dtype=dtype)
            start = time.perf_counter()
            torch.mm(x, x)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def check_bfloat16(device_type: str, *, flag: str) -> None:
    """Raise an InputError that names the flag if a device has no bfloat16."""
    if not has_bfloat16(device_type):
        reason = (
            "it has no AVX-512, and takes over ten times as long as in float32" if device_type == "cpu" else "too old"
        )
        raise InputError(f"{flag} needs bfloat16, but this {device_type} has none ({reason}). Leave out {flag}.")
