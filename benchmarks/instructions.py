"""Measure as on an ordinary CPU: `--isa avx2` limits every library to AVX2, as laptops without AVX-512 have it.

Owns the environment variables that do so. They count only if they are there before the libraries are loaded, so the
benchmark starts once more with them.
"""

import os
import sys

#: --isa -> environment variables of oneDNN, PyTorch's own kernels and MKL.
LIMITS = {
    "own": {},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


def limit(isa: str, *, module: str) -> None:
    """Replace this process by `python -m MODULE` with the same arguments and the limits, unless they hold already."""
    wanted = LIMITS[isa]
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | wanted)


def limited_to() -> str:
    """Return what to call the instructions that this process may use."""
    return next((isa for isa, wanted in LIMITS.items() if wanted and wanted.items() <= os.environ.items()), "own")
