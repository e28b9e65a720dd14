"""How fast do cells arrive? One table: ours, the plain per-cell loader, every peer that is installed, and the limits.

Owns the rounds and the table; leaves the set to `cells` and each loader to `contenders`. Every contender runs in a
process of its own, which waits while the others have their turn: round 1 of all, round 2 of all, and so on.

Run from the repository root: python -m benchmarks.loading --scale 0.1
"""

import argparse
import datetime
import fnmatch
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cells import CellSet, build, build_corpus
from benchmarks.contenders import CONTENDERS, PLAIN, Contender, Job

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE = 3
PACKAGES = ("python", "numpy", "h5py", "anndata", "torch", "numba", "scDataset", "annbatch", "zarrs", "bionemo-scdl")


# -- inside a contender's process ---------------------------------------------------------------------------------


def num_cells(batch: Any) -> int:
    """Count the cells of a batch: a bare count, a packed batch or a padded one."""
    if isinstance(batch, int):
        return batch
    return len(batch["cu_seqlens"]) - 1 if "cu_seqlens" in batch else len(batch["input_ids"])


def checksum(batch: Any) -> int:
    """Sum of id x type over a batch: the same for the same cells in any order; 0 for bare counts."""
    return 0 if isinstance(batch, int) else int((batch["input_ids"] * batch["token_type_ids"]).sum())


def _children() -> list[int]:
    path = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def cpu_seconds() -> float:
    """CPU time of this process, its threads and its living children."""
    tick, total = os.sysconf("SC_CLK_TCK"), time.process_time()
    for pid in _children():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick
    return total


def peak_mib() -> float:
    """Peak resident memory of this process and its living children, in MiB; shared pages count for each."""
    peak = 0
    for pid in (os.getpid(), *_children()):
        status = Path(f"/proc/{pid}/status").read_text()
        peak += next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return peak / 1024


def measure(contender: Contender, batches: Iterator[Any], *, seconds: float) -> tuple[int, bool]:
    """Draw batches for so long (to the end of the epoch when buffered); return cells, and whether the epoch ended."""
    count, until = 0, time.perf_counter() + seconds
    for batch in batches:
        count += num_cells(batch)
        if not contender.is_buffered and time.perf_counter() >= until:
            return count, False
    return count, True


def turn(contender: Contender, epoch: Any, *, seconds: float) -> dict[str, float]:
    """Run one round: epochs until the time is up."""
    started, cpu, cells = time.perf_counter(), cpu_seconds(), 0
    while (left := seconds - (time.perf_counter() - started)) > 0:
        cells += measure(contender, epoch(), seconds=left)[0]
    wall = time.perf_counter() - started
    return {"cells_per_s": cells / wall, "cells_per_cpu_s": cells / (cpu_seconds() - cpu), "peak_mib": peak_mib()}


def serve(contender: Contender, job: Job, *, seconds: float, is_checked: bool) -> None:
    """Open, warm up, then answer each line of stdin with one round as JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if contender.build:
        _build_apart(contender, job)
    epoch = contender.epoch(job)
    if not contender.workers and contender.threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    total = 0
    for number, batch in enumerate(epoch()):
        total += checksum(batch)
        if not is_checked and number > 8:
            break
    print(json.dumps({"ready": True, "checksum": total}), file=answers)
    for _ in sys.stdin:
        print(json.dumps(turn(contender, epoch, seconds=seconds)), file=answers)
    if not contender.workers:
        answers.flush()
        os._exit(0)


def _build_apart(contender: Contender, job: Job) -> None:
    """Convert in a process of its own, so that its memory does not count."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert contender.build is not None
            contender.build(job)
            status = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"{contender.name}: its files could not be written")


# -- the rounds ---------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What became of one contender; `skipped` says why there are no rounds."""

    name: str
    skipped: str = ""
    checksum: int = 0
    is_ready: bool = False
    rounds: list[dict[str, float]] = field(default_factory=list)

    def median(self, key: str) -> float:
        """Median over rounds; for memory, the largest."""
        values = [entry[key] for entry in self.rounds]
        return max(values) if key == "peak_mib" else statistics.median(values)


def _environment(*, is_own_python: bool) -> dict[str, str]:
    paths = [str(ROOT), *([os.environ["PYTHONPATH"]] if is_own_python and "PYTHONPATH" in os.environ else [])]
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths)}


def _start(contender: Contender, job: Job, options: argparse.Namespace) -> subprocess.Popen[str]:
    python = sys.executable
    for peer, other in options.peer_python:
        python = other if peer in contender.name else python
    command = [python, "-m", "benchmarks.loading", "--serve", contender.name, "--folder", str(job.home)]
    command += ["--max_length", str(job.max_length), "--seconds", str(options.seconds)]
    command += ["--check"] * options.check
    return subprocess.Popen(
        command, cwd=ROOT, env=_environment(is_own_python=python == sys.executable), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL if options.quiet else None,
    )  # fmt: skip


def _answer(process: subprocess.Popen[str]) -> dict[str, Any] | None:
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line else None


def _await(result: Result, processes: dict[str, subprocess.Popen[str]]) -> None:
    """Wait until a contender is warm; forget it when it failed."""
    if result.is_ready or result.name not in processes:
        return
    if (ready := _answer(processes[result.name])) is None:
        result.skipped = "failed"
        processes.pop(result.name).communicate()
    else:
        result.checksum, result.is_ready = int(ready["checksum"]), True


def run(chosen: list[Contender], job: Job, options: argparse.Namespace) -> list[Result]:
    """Start every contender, then let them take turns."""
    results: list[Result] = []
    processes: dict[str, subprocess.Popen[str]] = {}
    for contender in chosen:
        result = Result(contender.name)
        results.append(result)
        is_elsewhere = any(peer in contender.name for peer, _ in options.peer_python)
        if contender.missing and not is_elsewhere:
            result.skipped = f"not installed: {', '.join(contender.missing)}"
            continue
        processes[contender.name] = _start(contender, job, options)
        if len(processes) >= AT_ONCE:  # start-up is mostly imports: a few processes go through it together
            _await(results[len(results) - AT_ONCE], processes)
    for result in results:
        _await(result, processes)
    for number in range(options.rounds):
        for result in results:
            if result.name in processes:
                process = processes[result.name]
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
                if (answer := _answer(process)) is not None:
                    result.rounds.append(answer)
                    _say(f"round {number + 1}: {result.name}: {answer['cells_per_s']:,.0f} cells/s")
    for process in processes.values():  # all stop together: taking an interpreter down costs a second or two
        assert process.stdin is not None
        process.stdin.close()
    for process in processes.values():
        process.wait()
    for result in results:
        result.skipped = result.skipped or ("" if result.rounds else "failed")
    return results


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- the table ----------------------------------------------------------------------------------------------------


def machine() -> str:
    """CPU model and cores."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def versions() -> str:
    """Versions of what was measured, as far as this Python has it."""
    found = [f"python {platform.python_version()}"]
    for name in PACKAGES[1:]:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _ratio(value: float, base: float | None) -> str:
    if not base:
        return ""
    return f"{value / base:,.0f}x" if value >= 10 * base else f"{value / base:.2f}x"


def table(results: list[Result], *, title: str) -> str:
    """Render Markdown: one row per contender."""
    speed = {result.name: result.median("cells_per_s") for result in results if result.rounds}
    lines = [title, "",
             "| | cells/s, median [min-max] | x per-cell loader | x reading alone | cells/CPU-s | peak MiB |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for result in results:
        if result.skipped:
            lines.append(f"| {result.name} | {result.skipped} | | | | |")
            continue
        rates = [entry["cells_per_s"] for entry in result.rounds]
        own = speed[result.name]
        lines.append(
            f"| {result.name} | {own:,.0f} [{min(rates):,.0f}-{max(rates):,.0f}] | {_ratio(own, speed.get(PLAIN))} "
            f"| {_ratio(own, speed.get(CONTENDERS[result.name].limit))} | {result.median('cells_per_cpu_s'):,.0f} "
            f"| {result.median('peak_mib'):,.0f} |"
        )
    return "\n".join(lines)


# -- the command --------------------------------------------------------------------------------------------------


def _peer_python(text: str) -> tuple[str, str]:
    peer, _, path = text.partition("=")
    return peer, path


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", type=float, default=1.0, help="1.0 is 4 shards of 10,000 cells")
    parser.add_argument("--genes", type=int, help="columns of the files (default 58,604)")
    parser.add_argument("--expressed", type=int, help="expressed genes per cell (default about 2,400)")
    parser.add_argument("--folder", type=Path, help="where sets are kept (default: a temporary folder)")
    parser.add_argument("--seconds", type=float, default=2.0, help="per contender and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of names, e.g. 'ours*'")
    parser.add_argument("--peer_python", type=_peer_python, nargs="+", default=[], metavar="PEER=PYTHON",
                        help="another interpreter for a peer, e.g. annbatch=venv312/bin/python")  # fmt: skip
    parser.add_argument("--json", type=Path, help="write all rounds here")
    parser.add_argument("--check", action="store_true", help="compare the tokens of contenders on the same files")
    parser.add_argument("--quiet", action="store_true", help="hide the contenders' own messages")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Build the set, run the rounds, print the table."""
    options = parse(argv)
    if options.serve:
        job = Job(options.folder, max_length=options.max_length)
        serve(CONTENDERS[options.serve], job, seconds=options.seconds, is_checked=options.check)
        return
    with tempfile.TemporaryDirectory() as temporary:
        size = CellSet.scaled(options.scale)
        changes = {name: getattr(options, name) for name in ("genes", "expressed") if getattr(options, name)}
        size = CellSet(**{**asdict(size), **changes})
        _say(f"building {size}")
        home = build(size, options.folder or Path(temporary))
        build_corpus(home)
        chosen = [c for c in CONTENDERS.values() if any(fnmatch.fnmatch(c.name, p) for p in options.only)]
        results = run(chosen, Job(home, max_length=options.max_length), options)
    _report(results, size, options)


def _report(results: list[Result], size: CellSet, options: argparse.Namespace) -> None:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    title = (
        f"{today}, {machine()}; {versions()}.\n{size.shards} shards x {size.cells:,} cells x {size.genes:,} genes, "
        f"about {size.expressed:,} expressed; batches of 128, at most {options.max_length:,} tokens; "
        f"{options.rounds} rounds of {options.seconds:g} s."
    )
    print(table(results, title=title))
    if options.json:
        content = {"date": today, "machine": machine(), "versions": versions(), "set": asdict(size),
                   "max_length": options.max_length, "results": [asdict(result) for result in results]}  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
