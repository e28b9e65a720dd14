"""Watch a command from outside: memory, open files, threads and processor time of it and all its children, over time.

Owns reading /proc and running a command under observation; leaves what to run and what is too much to `soak`.

Memory is what processes alone hold or share among them (PSS of anonymous and shared pages, MiB): the pages of files
are the system's, which takes them back when it needs them.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Samples are this far apart, or further where adding up memory takes long: watching must not slow down work.
SECONDS_BETWEEN, MOST_SHARE_OF_TIME = 0.25, 0.05
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """A process and its children at one moment."""

    seconds: float  # since the start
    mib: float
    files: int  # open descriptors
    threads: int
    processes: int
    read_mib: float  # by system calls, from the disk or the page cache
    cpu_seconds: float
    shm_mib: float  # all of /dev/shm, whoever wrote it
    line: str = ""  # what was printed at this moment


def tree(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for one in found:
        with suppress(OSError):
            for path in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (path / "children").read_text().split()]
    return found


def _numbers(path: str) -> dict[str, int]:
    """Read lines `name: number ...`."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def shm_mib() -> float:
    """Return how much of /dev/shm is used."""
    with suppress(OSError):
        room = os.statvfs("/dev/shm")
        return (room.f_blocks - room.f_bfree) * room.f_frsize / 2**20
    return 0.0


def sample(pid: int, *, started: float = 0.0, line: str = "") -> Sample:
    """Measure a process and its children; those that end meanwhile are left out."""
    kib = files = threads = processes = read = 0
    cpu = 0.0
    for one in tree(pid):
        with suppress(OSError, IndexError, KeyError):
            memory = _numbers(f"/proc/{one}/smaps_rollup")
            kib += memory["Pss_Anon"] + memory["Pss_Shmem"]
            processes += 1
            files += len(os.listdir(f"/proc/{one}/fd"))
            threads += _numbers(f"/proc/{one}/status")["Threads"]
            read += _numbers(f"/proc/{one}/io")["rchar"]
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            cpu += sum(map(int, fields[11:15])) / _TICKS  # its own, and of children that have ended
    now = time.perf_counter() - started
    return Sample(now, kib / 1024, files, threads, processes, read / 2**20, cpu, shm_mib(), line)


@dataclass(frozen=True)
class Watched:
    """How a command went."""

    code: int
    output: str
    seconds: float
    cpu_seconds: float
    samples: list[Sample]  # at regular times
    lines: list[Sample]  # at the lines that the command wrote

    @property
    def peak_mib(self) -> float:
        """The most memory that was seen."""
        return max((one.mib for one in self.samples), default=0.0)

    def most(self, name: str) -> float:
        """Return the largest value of a field of the samples."""
        return max((getattr(one, name) for one in self.samples), default=0.0)


def environment() -> dict[str, str]:
    """Return the environment of commands: one thread each, and this checkout first."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **dict.fromkeys(names, "1"), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}


def watch(words: Sequence[str], *, log: Path | None = None) -> Watched:
    """Run `python WORDS`, with what it prints as text; `log` keeps that and the samples.

    Its processor time counts its children too.
    """
    samples: list[Sample] = []
    lines: list[Sample] = []
    started = time.perf_counter()
    before = os.times()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=output, stderr=subprocess.PIPE, text=True, env=environment(),
            encoding="utf-8", errors="replace",
        )  # fmt: skip
        has_ended = threading.Event()

        def observe() -> None:
            while not has_ended.is_set():
                began = time.perf_counter()
                samples.append(sample(process.pid, started=started))
                has_ended.wait(max(SECONDS_BETWEEN, (time.perf_counter() - began) / MOST_SHARE_OF_TIME))

        observer = threading.Thread(target=observe)
        observer.start()
        try:
            assert process.stderr is not None
            with process.stderr:
                for line in process.stderr:
                    lines.append(sample(process.pid, started=started, line=line.rstrip()))
            code = process.wait()
        finally:
            has_ended.set()
            observer.join()
            process.kill()
        output.seek(0)
        text = output.read()
    after = os.times()
    ended = after.children_user + after.children_system - before.children_user - before.children_system
    cpu = max(ended, *(one.cpu_seconds for one in samples + lines), 0.0)  # workers that nobody waits for do not add up
    watched = Watched(code, text, time.perf_counter() - started, cpu, samples, lines)
    if log is not None:
        _keep(watched, log, words)
    return watched


def _keep(watched: Watched, log: Path, words: Sequence[str]) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    record: Mapping[str, Any] = {**asdict(watched), "words": list(words)}
    log.write_text(json.dumps(record, indent=0) + "\n", encoding="utf-8")
