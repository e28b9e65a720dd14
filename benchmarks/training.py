"""How fast does the model train and answer? The usual recipe against ours, every option on and off, in one run.

Owns the rounds, the clock and the table; leaves models, batches and steps to `trainees`. All contenders of a setting
take turns, batch by batch, so that a busy machine slows all of them alike; ratios are medians over rounds. On the CPU
each has a process of its own, as what ours does to the C library's heap would help the others too.

Run from the repository root: python -m benchmarks.training --sizes 4x256 --lengths "~500" --rounds 2
"""

import argparse
import datetime
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.flops import flops_of_batch, forward_flops, measured_peak
from benchmarks.instructions import LIMITS, limit, limited_to
from benchmarks.loading import machine, versions
from benchmarks.trainees import LENGTHS, MAIN, RECIPES, SIZES, USUAL, Batch, Step, Trainee, draw_batches
from perturbgene.heap import keep_freed_memory

STEPS: dict[str, Step] = {"training": Trainee.train, "inference": Trainee.infer}


@dataclass
class Row:
    """What was measured of one contender in one setting.

    Args:
        name: Of the recipe.
        tokens: Tokens that are no padding, of all its batches.
        flops: Operations that these batches need, see `benchmarks.flops`.
        is_bf16: Whose peak it is compared with.
        seconds: Time for all its batches, one entry for each round.
        kept_kib: KiB kept for the backward pass, per token that is no padding; None for inference.
        peak_mib: Highest allocated GPU memory; None on the CPU.
    """

    name: str
    tokens: int
    flops: float
    is_bf16: bool
    seconds: list[float] = field(default_factory=list)
    kept_kib: float | None = None
    peak_mib: float | None = None

    @property
    def speed(self) -> float:
        """Tokens per second, the median of the rounds."""
        return self.tokens / statistics.median(self.seconds)

    def ratio(self, base: "Row") -> float:
        """Times as fast as another, the median of the rounds."""
        pairs = zip(self.seconds, base.seconds, strict=True)
        return statistics.median((self.tokens / own) / (base.tokens / other) for own, other in pairs)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock() -> float:
    """Give seconds: of this process's CPU time with one thread, which other work on the machine does not stretch."""
    is_alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if is_alone else time.perf_counter()


def timed(step: Step, trainee: Trainee, batch: Batch) -> float:
    """Return the seconds of one step."""
    _wait(trainee.device)
    started = clock()
    step(trainee, batch)
    _wait(trainee.device)
    return clock() - started


def row_of(trainee: Trainee, mode: str) -> Row:
    """Describe what a contender is going to do, and warm it up; on CUDA its memory is measured on the way."""
    count = flops_of_batch if mode == "training" else forward_flops
    is_cuda, batches = trainee.device.type == "cuda", trainee.batches
    flops = sum(
        count(trainee.config, batch.lengths, num_reads=batch.num_reads if mode == "training" else len(batch.cells))
        for batch in batches
    )
    row = Row(trainee.name, sum(sum(batch.lengths) for batch in batches), flops, trainee.recipe.bf16)
    largest = max(batches, key=lambda batch: max(batch.lengths))
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    if mode == "training":
        row.kept_kib = trainee.kept_bytes(largest) / 1024 / sum(largest.lengths)
    timed(STEPS[mode], trainee, largest)
    if is_cuda:
        row.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


class Contender(Protocol):
    """Something that takes turns."""

    row: Row
    num_batches: int

    def turn(self, k: int) -> float:
        """Return the seconds of a step on batch k."""


class Here:
    """A contender in this process."""

    def __init__(self, name: str, size: str, lengths: str, mode: str, options: argparse.Namespace) -> None:
        batches = draw_batches(lengths, cells=options.cells, batches=options.batches, device=options.device)
        self.trainee, self.mode = Trainee(name, size=size, batches=batches, is_training=mode == "training"), mode
        self.row, self.num_batches = row_of(self.trainee, mode), len(self.trainee.batches)

    def turn(self, k: int) -> float:
        """Take one step."""
        return timed(STEPS[self.mode], self.trainee, self.trainee.batches[k])


def serve(pipe: Connection, name: str, *setting: str, options: argparse.Namespace) -> None:
    """Be a contender for another process: send the row, then the seconds of each batch that it names, until None."""
    torch.set_num_threads(options.threads)
    if RECIPES[name].is_ours:
        keep_freed_memory()  # as our command line does
    contender = Here(name, *setting, options)
    pipe.send((contender.row, contender.num_batches))
    while (k := pipe.recv()) is not None:
        pipe.send(contender.turn(k))


class Elsewhere:
    """A contender in a process of its own."""

    def __init__(self, name: str, *setting: str, options: argparse.Namespace, stack: ExitStack) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        process = spawn.Process(target=serve, args=(theirs, name, *setting), kwargs={"options": options}, daemon=True)
        process.start()
        theirs.close()  # so that its end is noticed here
        stack.callback(process.join)
        stack.callback(self.pipe.send, None)
        self.row, self.num_batches = self.pipe.recv()

    def turn(self, k: int) -> float:
        """Let it take one step."""
        self.pipe.send(k)
        return float(self.pipe.recv())


def measure(contenders: Sequence[Contender], *, rounds: int) -> list[Row]:
    """Let the contenders take turns, batch by batch."""
    for _ in range(rounds):
        for contender in contenders:
            contender.row.seconds.append(0.0)
        for k in range(max(contender.num_batches for contender in contenders)):
            for contender in contenders:
                contender.row.seconds[-1] += contender.turn(k)
    return [contender.row for contender in contenders]


def table(rows: list[Row], *, title: str, peaks: dict[str, float]) -> str:
    """Render Markdown: one row for each contender, ratios to the first."""
    lines = [f"**{title}**", "",
             "| | tokens/s | x usual recipe | GFLOP/s | MFU | kept for backward, KiB/token | peak MiB |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        speed, peak = row.flops / statistics.median(row.seconds), peaks["bf16" if row.is_bf16 else "fp32"]
        kept, most = ("" if value is None else f"{value:,.0f}" for value in (row.kept_kib, row.peak_mib))
        lines.append(
            f"| {row.name} | {row.speed:,.0f} | {row.ratio(rows[0]):.1f} | {speed / 1e9:,.0f} | {speed / peak:.0%} "
            f"| {kept} | {most} |"
        )
    return "\n".join(lines) + "\n"


def about(options: argparse.Namespace, peaks: dict[str, float]) -> str:
    """Say when, where and against which peaks was measured."""
    cpu = f"{machine()}, {torch.get_num_threads()} used, {limited_to()} instructions"
    where = torch.cuda.get_device_name() if options.device == "cuda" else cpu
    found = ", ".join(f"{name} {peak / 1e9:,.0f}" for name, peak in peaks.items())
    return (
        f"{datetime.date.today()}; {where}; {versions()}; {platform.system()}; peak of a matrix product in GFLOP/s: "
        f"{found}; {options.cells} cells a step, {options.rounds} rounds\n"
    )


def run_setting(size: str, lengths: str, mode: str, options: argparse.Namespace) -> list[Row]:
    """Measure one size and distribution of lengths."""
    setting = (size, lengths, mode)
    if options.together or options.device == "cuda":
        return measure([Here(name, *setting, options) for name in options.recipes], rounds=options.rounds)
    with ExitStack() as stack:
        contenders = [Elsewhere(name, *setting, options=options, stack=stack) for name in options.recipes]
        return measure(contenders, rounds=options.rounds)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the flags."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--isa", choices=LIMITS, default="own", help="instructions of the CPU; avx2: as most laptops")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["4x256"], help="layers x width")
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--modes", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--recipes", nargs="+", choices=[*RECIPES, "main", "all"], default=["main"])
    parser.add_argument("--cells", type=int, default=8, help="cells a step (8 is Trainer's default)")
    parser.add_argument("--batches", type=int, default=4, help="different batches where lengths differ")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--together", action="store_true", help="all in one process, with the heap as it comes")
    parser.add_argument("--json", type=Path, help="write all figures there too")
    options = parser.parse_args(arguments)
    groups = {"main": list(MAIN), "all": list(RECIPES)}
    named = [name for entry in options.recipes for name in groups.get(entry, [entry])]
    options.recipes = list(dict.fromkeys([USUAL, *named]))
    return options


def main(arguments: list[str] | None = None) -> None:
    """Print a table for every setting."""
    options = parse(arguments)
    limit(options.isa, module="benchmarks.training")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here: skipped. On a machine that has one, the same line measures it.")
        return
    torch.set_num_threads(options.threads)
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    peaks = {name: measured_peak(options.device, dtype) for name, dtype in types.items()}
    print(about(options, peaks))
    results = []
    for size in options.sizes:
        for lengths in options.lengths:
            for mode in options.modes:
                rows = run_setting(size, lengths, mode, options)
                print(table(rows, title=f"{mode}, {size}, {lengths}", peaks=peaks), flush=True)
                results.append({"size": size, "lengths": lengths, "mode": mode, "rows": [asdict(row) for row in rows]})
    if options.json:
        options.json.write_text(json.dumps({"about": about(options, peaks), "peaks": peaks, "results": results}))


if __name__ == "__main__":
    main()
