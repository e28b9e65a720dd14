"""The C heap of a process that reads many cells: large pieces of memory go back to the system when they are freed.

Owns one switch; knows nothing of cells. glibc serves pieces of up to 32 MB from one heap and, since the batches of a
model all differ a little in size, finds no hole that fits: over 50,000 cells a process grew to 3.4 GB, where 0.2 GB of
the heap were in use. Pieces with a mapping of their own leave no holes, but each of their pages is new to the process;
huge pages make that cheaper.
"""

import ctypes
import os
import sys

#: M_MMAP_THRESHOLD of glibc's malloc.h.
_MMAP_THRESHOLD = -3
#: Smaller pieces leave holes that others fit in.
LARGE_BYTES = 1 << 20


def return_large_pieces() -> bool:
    """Let every piece of at least `LARGE_BYTES` have a mapping of its own, for the rest of the process.

    Call it before torch is imported, which reads once whether its tensors may lie in huge pages.

    Returns:
        False where the C library is not glibc (macOS, Windows, musl): there nothing changes.
    """
    if sys.platform != "linux":
        return False
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's own switch, which it offers in no other form
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, LARGE_BYTES))
    except (OSError, AttributeError):
        return False
