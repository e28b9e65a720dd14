"""Freed memory is used again instead of coming fresh from the system; where that cannot be set, nothing happens."""

import ctypes
import subprocess
import sys
from types import SimpleNamespace

import pytest

from perturbgene.heap import keep_freed_memory

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


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_a_large_block_is_used_again_without_fresh_pages() -> None:
    assert fresh_pages("as it comes") > 9_000
    assert fresh_pages("kept") < 100


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not keep_freed_memory()


def test_another_system_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("looked for a library"))
    assert not keep_freed_memory()
