"""The C library's heap: which freed memory a process keeps for itself, and when it goes back to the system.

Owns the calls of glibc's mallopt(3) and malloc_trim(3), which do nothing elsewhere; leaves when to call them to verbs.
"""

import ctypes
import os
import sys
from typing import Any

#: Parameters of glibc's mallopt(3).
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


def _function(name: str) -> Any:
    """Return a function of the C library; None if it has none (macOS, Windows, musl)."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def set_heap(*parameters: tuple[int, int]) -> bool:
    """Make settings of mallopt; False if the C library has none (macOS, Windows, musl)."""
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    return all([bool(mallopt(name, value)) for name, value in parameters])


def keep_freed_memory() -> bool:
    """Let training reuse freed blocks of up to 256 MiB, as each step frees and allocates the same ones.

    The system zeroes every fresh page first; keeping them saves a tenth of the time. At most 2 GiB stay unused.
    """
    return set_heap((TRIM_THRESHOLD, (1 << 31) - 1), (MMAP_THRESHOLD, 1 << 28))


def return_large_pieces() -> bool:
    """Give every piece of at least 1 MiB a mapping of its own, which is returned to the system when it is freed.

    Batches differ a little in size, so freed pieces would leave holes in the heap that the next batch does not fit.
    Call this before torch is imported, which reads once whether it may use huge pages for fresh mappings.
    """
    if sys.platform.startswith("linux"):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch has no other switch for it
    return set_heap((MMAP_THRESHOLD, 1 << 20))


def return_freed_memory() -> bool:
    """Give all whole pages that are free back to the system; False if the C library cannot.

    Batches differ in size, so what earlier ones freed leaves holes that later ones do not fit: a heap that keeps freed
    memory grows from batch to batch. The next batch gets fresh pages, which takes about 0.2 s per GB.
    """
    trim = _function("malloc_trim")
    if trim is None:
        return False
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    trim(0)
    return True


def return_if_grown() -> int:
    """Return freed memory if this process holds a sixth more than after the last time.

    Returns:
        Bytes that it held after the last time, this one included.
    """
    import psutil  # here, because every start of the command line imports this module

    global _held_bytes
    process = psutil.Process()
    if process.memory_info().rss > 7 / 6 * _held_bytes:
        return_freed_memory()
        _held_bytes = int(process.memory_info().rss)
    return _held_bytes


#: What this process held when its heap last gave memory back.
_held_bytes = 0
