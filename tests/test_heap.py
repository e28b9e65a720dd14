"""Memory that was freed leaves the process, though small pieces that live on lie between."""

import subprocess
import sys

import pytest

#: Large pieces of growing size, a small one that stays behind each: what freed ones leave are holes between the small.
PROGRAM = """
import ctypes, sys
from perturbgene.heap import return_large_pieces

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def megabytes():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

assert return_large_pieces()
before = megabytes()
for number in range(3):
    large = []
    for size in range(40):
        piece = libc.malloc((2 << 20) + (size << 16))
        ctypes.memset(piece, 1, 2 << 20)
        large.append(piece)
        libc.malloc(50_000)
    held = megabytes() - before
    for piece in large:
        libc.free(piece)
print(held, megabytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a switch of glibc")
def test_freed_pieces_leave_no_holes_in_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    held, left = map(float, done.stdout.split())
    assert held > 80 and left < 5
