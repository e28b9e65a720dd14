"""Which devices compute in bfloat16, and on which of them that pays.

Owns these two questions, which every command and the model ask; torch is imported only to answer them.
"""

from functools import cache

from perturbgene.errors import InputError


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


def has_fast_bfloat16(device_type: str) -> bool:
    """Return whether bfloat16 is faster than float32; AVX-512 without its BF16 instructions only emulates it."""
    import torch

    is_emulated = device_type == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16", False)
    return has_bfloat16(device_type) and not is_emulated


def check_bfloat16(device_type: str, *, flag: str) -> None:
    """Raise an InputError that names the flag if a device has no bfloat16."""
    if not has_bfloat16(device_type):
        reason = (
            "it has no AVX-512, and takes over ten times as long as in float32" if device_type == "cpu" else "too old"
        )
        raise InputError(f"{flag} needs bfloat16, but this {device_type} has none ({reason}). Leave out {flag}.")
