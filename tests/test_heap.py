"""Freed memory: kept where the next step needs it, and given back where it would only leave holes."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from perturbgene.heap import keep_freed_memory, return_freed_memory, return_large_pieces

needs_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")

#: Fresh pages of 4 KiB that the tenth round of writing and freeing 40 MB takes.
COUNT = """
import resource, sys
from perturbgene.heap import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * 40_000_000  # numpy would ask for huge pages
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def fresh_pages(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@needs_glibc
def test_a_large_block_is_used_again_without_fresh_pages() -> None:
    assert fresh_pages("as it comes") > 9_000
    assert fresh_pages("kept") < 100


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not keep_freed_memory() and not return_large_pieces() and not return_freed_memory()


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("looked for a library"))
    assert not keep_freed_memory() and not return_large_pieces() and not return_freed_memory()


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


@needs_glibc
def test_freed_pieces_leave_no_holes_in_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    held, left = map(float, done.stdout.split())
    assert held > 80 and left < 5


#: Pieces of growing size as batches have them, with small ones between, all but the small ones freed.
KEPT = """
import ctypes
import psutil
from perturbgene.heap import keep_freed_memory, return_if_grown

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
keep_freed_memory()
before = return_if_grown()
pieces = []
for size in range(60):
    piece = libc.malloc((4 << 20) + (size << 16))
    ctypes.memset(piece, 1, 4 << 20)
    pieces.append(piece)
    libc.malloc(50_000)
for piece in pieces:
    libc.free(piece)
grown = psutil.Process().memory_info().rss
print((grown - before) / 1e6, (return_if_grown() - before) / 1e6)
"""


@needs_glibc
def test_what_a_training_heap_keeps_is_given_back_on_request() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True, timeout=60)
    kept, left = map(float, done.stdout.split())
    assert kept > 200 and left < 20
