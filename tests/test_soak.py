"""The soak: what is watched, when a bound is missed, and the loads themselves on few cells in this process."""

import contextlib
import io
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import soak, soaking
from benchmarks.soak import Row, progress
from benchmarks.watching import Watched, sample, watch
from perturbgene.main import main

SCRIPT = """
import os, subprocess, sys, time
held = bytearray(os.urandom(1)) * (60 << 20)
files = [open(os.devnull) for _ in range(50)]
child = subprocess.Popen([sys.executable, "-c", "held = b'x' * (40 << 20); import time; time.sleep(1.5)"])
time.sleep(1)
print("7 cells", file=sys.stderr, flush=True)
child.wait()
print("done")
sys.exit(3)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc of Linux")
def test_a_command_is_watched_with_its_children() -> None:
    watched = watch(["-c", SCRIPT])
    assert (watched.code, watched.output) == (3, "done\n")
    assert [cells for cells, _ in progress(watched)] == [7]
    (_, line), *_ = progress(watched)
    assert line.processes == watched.most("processes") == 2
    assert 100 <= line.mib <= watched.peak_mib < 160
    assert 50 < line.files < 70
    assert 0 < line.cpu_seconds <= watched.cpu_seconds + 0.05


def test_a_bound_is_missed_above_below_or_by_no_number() -> None:
    assert not Row("a", 2.0, at_most=2).is_missed and not Row("a", 2.0, at_least=2).is_missed
    assert Row("a", 2.1, at_most=2).is_missed and Row("a", 1.9, at_least=2).is_missed
    assert Row("a", float("nan"), at_most=2).is_missed
    assert "**missed**" in Row("a", 2.1, at_most=2).markdown()


class Lines(logging.Handler):
    """Keeps what is logged, as a process would print it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


def in_this_process(words: Sequence[str], *, log: Path | None = None) -> Watched:
    """Do what `watch` does without starting a process."""
    output, errors, started = io.StringIO(), io.StringIO(), time.perf_counter()
    handler, package = Lines(), logging.getLogger("perturbgene")
    package.addHandler(handler)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = run(words)
    finally:
        package.removeHandler(handler)
    now = sample(os.getpid())
    lines = [sample(os.getpid(), line=line) for line in errors.getvalue().splitlines()]
    return Watched(code, output.getvalue(), time.perf_counter() - started, 0.1, [now], lines)


def run(words: Sequence[str]) -> int:
    """Run `-m MODULE ...` or `-c SCRIPT`."""
    match list(words):
        case ["-m", "perturbgene.main", *rest]:
            return main(rest)
        case ["-m", "benchmarks.soaking", loop, arguments]:
            getattr(soaking, loop)(**soak.json.loads(arguments))
            return 0
        case ["-c", *_]:
            return 0
    raise AssertionError(words)


SLOW = [pytest.param(name, marks=pytest.mark.soak) for name in soak.LOADS if name != "L4"]


@pytest.mark.parametrize("load", ["L4", *SLOW])
def test_a_load_runs_on_few_cells(
    load: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "watch", in_this_process)
    monkeypatch.setattr(soak, "GENES", 200)
    code = soak.main([load, "--scale", "0.0001", "--folder", str(tmp_path)])
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    assert f"**{load}**" in printed.out and "all bounds kept" in printed.out


def test_a_command_that_fails_is_a_missed_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(soak, "watch", in_this_process)
    monkeypatch.setitem(soak.LOADS, "L3", lambda bench: bench.run("check", "check no-such-file"))
    monkeypatch.setattr(soak.LOADS["L3"], "__doc__", "L3: nothing.")
    assert soak.main(["L3", "--folder", str(tmp_path)]) == 1
    assert "| check: exit code | 2" in capsys.readouterr().out
