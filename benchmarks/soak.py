"""Does anything grow, leak or read too much under load? Loads L1 to L9, each a table of figures with their bounds.

Owns the loads and what is too much; leaves watching processes to `watching`, loops and large files to `soaking`, and
cells to `cells`. Exit code 1 means that a bound was missed, or a command failed.

Run from the repository root: python -m benchmarks.soak L3 --scale 0.01
"""

import argparse
import datetime
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.cells import CellSet, build
from benchmarks.loading import machine
from benchmarks.soaking import large_file, many_files
from benchmarks.watching import Sample, Watched, watch

#: Genes of the cells of most loads, and how many of them a cell expresses: memory depends on cells here, not on genes.
GENES, EXPRESSED = 2_000, 100
#: A model that costs little beside its cells.
TOY = (
    "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 1 --intermediate_size 16 --max_length 32 "
    "--learning_rate 1e-3 --report_to none"
)
#: Cells of L1; memory is compared between the last two.
SIZES = (20_000, 200_000, 1_000_000)
#: Memory may grow by so many MiB for each 100,000 cells in each process that reads: 8 bytes a cell say where its values
#: start. Between runs on different files, two peaks of the same load also differ by up to 20 MiB (seen), so by `NOISE`.
SLOPE, NOISE = 1.0, 2.5
#: Descriptors of batches on their way from workers: their number goes up and down by so many (seen: 169 to 185).
IN_FLIGHT = 10
#: With results that are columns of the user's file: these are in memory once, as text of labels and numbers.
SLOPE_OF_ANSWERS = 25.0


@dataclass(frozen=True)
class Row:
    """A figure and its bound; a bound of the whole scale does not judge a smaller one, where start-up prevails."""

    name: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def is_missed(self) -> bool:
        """True if the figure is beyond its bound."""
        is_above = self.at_most is not None and not self.value <= self.at_most
        return is_above or (self.at_least is not None and not self.value >= self.at_least)

    def markdown(self) -> str:
        """Return the row of a table."""
        bounds = {"at most": self.at_most, "at least": self.at_least}
        bound = ", ".join(f"{text} {number(value)}" for text, value in bounds.items() if value is not None)
        verdict = "**missed**" if self.is_missed else "kept" if bound else ""
        return f"| {self.name} | {number(self.value)} {self.unit} | {bound} | {verdict} |"


def number(value: float) -> str:
    """Write a number as people do.

    Example:
        >>> number(1234567.0), number(12.345), number(0.0123)
        ('1,234,567', '12.3', '0.012')
    """
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2g}"


def slope_of(points: Sequence[tuple[float, float]]) -> float:
    """Return by how much the second number grows for 100,000 of the first; 0 if the first does not differ.

    Example:
        >>> round(slope_of([(0, 100), (50_000, 101), (100_000, 102)]), 3)
        2.0
    """
    return 1e5 * float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len({first for first, _ in points}) > 1 else 0.0


def cells_of(line: Sample) -> int | None:
    """Return N of a line `N cells`, or of a line of training: `step N/...`."""
    words = line.line.split()
    if len(words) == 2 and words[1] == "cells":
        return int(words[0])
    return int(words[1].partition("/")[0]) if len(words) > 1 and words[0] == "step" else None


def progress(watched: Watched) -> list[tuple[int, Sample]]:
    """Return how far a command was, and what it held then."""
    return [(cells, line) for line in watched.lines if (cells := cells_of(line)) is not None]


@dataclass
class Bench:
    """Where loads run, at which scale, and what they have measured."""

    folder: Path
    scale: float = 1.0
    rows: list[Row] = field(default_factory=list)

    def count(self, cells: int, *, least: int = 64) -> int:
        """Scale a number of cells, files or rounds."""
        return max(least, round(cells * self.scale))

    def row(self, name: str, value: float, unit: str = "", **bounds: float) -> None:
        """Keep a figure."""
        self.rows.append(Row(name, value, unit, **bounds))
        print(self.rows[-1].markdown(), flush=True)

    def at_full_scale(self, name: str, value: float, unit: str = "", **bounds: float) -> None:
        """Keep a figure that a small scale cannot judge."""
        self.row(name, value, unit, **(bounds if self.scale >= 0.2 else {}))

    def run(self, name: str, words: str, *, module: str = "perturbgene.main") -> Watched:
        """Run a command under observation; one that fails is a missed bound."""
        log = self.folder / "logs" / f"{name.replace(' ', '_').replace('/', '-')}.json"
        watched = watch(["-m", module, *words.split()], log=log)
        if watched.code:
            print(watched.output[-2000:], *(line.line for line in watched.lines[-20:]), sep="\n", file=sys.stderr)
            self.row(f"{name}: exit code", watched.code, at_most=0)
        return watched

    def soaking(self, name: str, loop: str, **arguments: str | int) -> Watched:
        """Run a loop of `soaking` under observation."""
        text = json.dumps(arguments, separators=(",", ":"))
        return self.run(name, f"{loop} {text}", module="benchmarks.soaking")

    def cells(self, cells: int, *, shards: int = 1) -> Path:
        """Write cells in so many files; return the folder of the set."""
        size = CellSet(shards=shards, cells=max(16, cells // shards), genes=GENES, expressed=EXPRESSED)
        return build(size, self.folder, compressions=("none",))

    def corpus(self, cells: int) -> Path:
        """Write a corpus of so many cells."""
        home = self.cells(cells, shards=10)
        if not (home / "corpus").exists():
            self.run(
                f"prepare {cells:,} cells",
                f"prepare {home}/none --output {home}/corpus --phenotypes cell_type --split_by donor_id --no_report",
            )
        return home / "corpus"

    @cached_property
    def toy(self) -> Path:
        """The folder of a run that has learned for a few steps."""
        corpus, home = self.corpus(self.count(20_000, least=600)), self.folder / "toy"
        if not (home / "config.json").exists():
            self.run("mlm of a toy", f"mlm --corpus {corpus} --output_dir {home} {TOY} --max_steps 20")
        return home


# -- the loads --------------------------------------------------------------------------------------------------------


def streaming(bench: Bench) -> None:
    """L1: memory while cells are streamed does not depend on how many there are."""
    sizes = [bench.count(size, least=640) for size in SIZES]
    for workers, kind in ((0, "files"), (2, "files"), (0, "corpus"), (2, "corpus")):
        what, peaks, watched = f"{kind}, {workers} workers", [], None
        for size in sizes:
            source = bench.cells(size, shards=10) / "none" if kind == "files" else bench.corpus(size)
            watched = bench.soaking(f"stream {what} {size:,}", "stream", source=str(source), workers=workers)
            peaks.append(watched.peak_mib)
            bench.row(f"{what}, {size:,} cells: peak", watched.peak_mib, "MiB")
        slope = slope_of([(sizes[1], peaks[1]), (sizes[2], peaks[2])])
        most = SLOPE * max(1, workers) + NOISE
        bench.at_full_scale(
            f"{what}: growth from {sizes[1]:,} to {sizes[2]:,} cells", slope, "MiB / 100k", at_most=most
        )
        assert watched is not None
        points = [(float(cells), line.mib) for cells, line in progress(watched)]
        later = slope_of(points[len(points) // 2 :])
        bench.at_full_scale(f"{what}: growth in the second half of an epoch", later, "MiB / 100k", at_most=SLOPE)
        rate = points[-1][0] / max(watched.cpu_seconds, 1e-3)  # of a corpus, training cells
        bench.row(f"{what}: cells per second of processor time, start included", rate)
    for verb in ("predict", "embed"):
        file = next((bench.cells(bench.count(20_000, least=600)) / "none").glob("*.h5ad"))
        rounds = bench.count(40, least=4)
        watched = bench.soaking(
            f"notebook {verb}", "notebook", run=str(bench.toy), cells=str(file), rounds=rounds, verb=verb
        )
        held = [line.mib for _, line in progress(watched)]
        early, late = median(held[rounds // 4 : rounds // 2] or held), median(held[-(rounds // 4) :])
        bench.row(f"pg.{verb} {rounds} times in one process: memory", late, "MiB")
        bench.at_full_scale(f"pg.{verb}: growth from the second quarter to the last", late - early, "MiB", at_most=10)


def training(bench: Bench) -> None:
    """L2: a long training is as fast at the end as at the start, and nothing piles up."""
    corpus = bench.corpus(bench.count(1_000_000, least=2_000))
    words = f"mlm --corpus {corpus} --output_dir {bench.folder}/soaked {TOY} --num_train_epochs 1 "
    words += "--per_device_train_batch_size 128 --dataloader_num_workers 2 --direct_path never --eval_strategy no "
    _long_training(bench, "soak", words + "--logging_steps 0.01")


def _long_training(bench: Bench, name: str, words: str) -> None:
    """Train; compare the first and the last quarter of the time between the first and the last line."""
    watched = bench.run(name, words)
    steps = progress(watched)
    first = next((it for it in steps if it[0] > 0), None)
    if first is None or len(steps) < 2:
        bench.at_full_scale(f"{name}: lines of training", len(steps), at_least=2)
        return
    within = [it for it in watched.samples if first[1].seconds <= it.seconds <= steps[-1][1].seconds]
    quarter = max(1, len(within) // 4)
    for field_name in ("mib", "files", "threads", "processes", "shm_mib"):
        early, late = (median(getattr(it, field_name) for it in part) for part in (within[:quarter], within[-quarter:]))
        allowed = max(20.0, 0.03 * early) if field_name.endswith("mib") else IN_FLIGHT if field_name == "files" else 0
        unit = "MiB" if field_name.endswith("mib") else ""
        bench.row(f"{name}: {field_name} in the first quarter", early, unit)
        bench.at_full_scale(f"{name}: more {field_name} in the last quarter", late - early, unit, at_most=allowed)
    rates = [
        (later - before) / max(to.cpu_seconds - since.cpu_seconds, 1e-3)
        for (before, since), (later, to) in pairwise(steps)
    ]
    third = max(1, len(rates) // 3)
    start, end = median(rates[:third]), median(rates[-third:])
    bench.row(f"{name}: steps per second of processor time at the start", start)
    bench.at_full_scale(f"{name}: speed at the end / at the start", end / start, at_least=0.95)


def many_shards(bench: Bench) -> None:
    """L3: ten thousand files of ten cells."""
    count = bench.count(10_000, least=20)
    home, vocabulary = many_files(bench.folder, count=count), bench.folder / "vocabulary.json"
    vocabulary.write_text(json.dumps({"cell_type": [f"type {label:02d}" for label in range(CellSet.cell_types)]}))
    for name, words in {
        "check": f"check {home}",
        "prepare": f"prepare {home} --output {home}_corpus --phenotypes cell_type --split_by donor_id --no_report",
        "mlm": f"mlm --corpus {home}_corpus --output_dir {home}_mlm {TOY} --max_steps 5 --eval_strategy no",
        "mlm of the files": f"mlm --train_data_paths {home} --included_phenotypes cell_type --vocab_path "
        f"{vocabulary} --output_dir {home}_mlm2 {TOY} --max_steps 5 --direct_path never "
        "--eval_strategy no --bin_edges 0.5 1 2 4",
    }.items():
        watched = bench.run(f"{name}, {count:,} files", words)
        bounds = {"at_most": 60.0} if name == "check" else {}
        bench.at_full_scale(f"{name} of {count:,} files: processor time", watched.cpu_seconds, "s", **bounds)
        bench.row(
            f"{name}: open descriptors per process",
            watched.most("files") / watched.most("processes"),
            at_most=300,  # two lists of 64 open files, with two descriptors each
        )
        bench.row(f"{name}: peak", watched.peak_mib, "MiB")
    shutil.rmtree(home)


def large(bench: Bench) -> None:
    """L4: of one large file only blocks are read."""
    cells = [bench.count(size, least=2_560) for size in (20_800, 208_000)]  # the latter are 5 GB
    peaks = []
    for size in cells:
        path = large_file(bench.folder / f"large_{size}", cells=size)
        most_cells = min(4_096, size // 4)
        watched = bench.soaking(
            f"stream of {size:,}", "stream", source=str(path.parent), workers=0, most_cells=most_cells
        )
        peaks.append(watched.peak_mib)
        steps, bytes_mib = progress(watched), path.stat().st_size / 2**20
        read = steps[-1][1].read_mib - steps[0][1].read_mib
        bench.row(f"{size * 3_000 * 8 / 1e9:.2g} GB in one file, {most_cells:,} cells streamed: peak", peaks[-1], "MiB")
        bench.row("its first round: share of the file that is read", read / bytes_mib)
        checked = bench.run(f"check of {size:,}", f"check {path}")
        bench.row("check: peak", checked.peak_mib, "MiB")
        bench.row("check: read, libraries included", checked.most("read_mib"), "MiB")
    bench.at_full_scale("share of the larger file that is read", read / bytes_mib, at_most=0.2)
    bench.at_full_scale("larger / smaller file: peak", peaks[1] / peaks[0], at_most=1.25)


def start_up(bench: Bench) -> None:
    """L5: what needs no model answers at once."""
    nothing = min(watch(["-c", "pass"]).cpu_seconds for _ in range(3))
    bench.row("python -c pass: processor time", nothing, "s")
    for words in ("--help", "predict --help"):
        took = min(bench.run(words, words).cpu_seconds for _ in range(3))
        bench.row(f"{words}: processor time", took, "s")
        bench.at_full_scale(f"{words} / python -c pass", took / nothing, at_most=25)
    files = many_files(bench.folder, count=bench.count(100, least=10))
    checked = bench.run("check of many", f"check {files}")
    bench.at_full_scale(
        f"check of {bench.count(100, least=10)} files: processor time", checked.cpu_seconds, "s", at_most=10
    )
    script = (
        "import sys; from perturbgene.main import main; "
        f"code = main(['check', {str(files)!r}]); sys.exit(code or 10 * ('torch' in sys.modules))"
    )
    bench.row("check: 10 if torch was imported", watch(["-c", script]).code, at_most=0)
    shutil.rmtree(files)


def answers(bench: Bench) -> None:
    """L6: predict and embed hold a constant part of the cells, and merge holds what they hold."""
    sizes = [bench.count(size, least=96) for size in (20_000, 100_000, 200_000)]
    for verb, more in (("predict", "--ask cell_type --no_report"), ("embed", "")):
        points = []
        for size in sizes:
            file, output = next((bench.cells(size) / "none").glob("*.h5ad")), bench.folder / f"{verb}_{size}.h5ad"
            words = f"{verb} {bench.toy} {file} --output {output} --overwrite {more}"
            watched = bench.run(f"{verb} {size:,}", words)
            points.append((float(size), watched.peak_mib))
            bench.row(f"{verb} {size:,} cells: peak", watched.peak_mib, "MiB")
            if size == sizes[1]:
                _merged(bench, verb, words, output, watched.peak_mib)
        bench.at_full_scale(f"{verb}: growth", slope_of(points), "MiB / 100k", at_most=SLOPE_OF_ANSWERS)


def _merged(bench: Bench, verb: str, words: str, output: Path, peak_mib: float) -> None:
    """Divide a command, and merge its parts to the same bytes."""
    whole = output.read_bytes()
    for part in ("1/2", "2/2"):
        bench.run(f"{verb} {part}", f"{words} --part {part}")
    merged = bench.run(f"merge {verb}", f"merge {output} --overwrite")
    bench.row(f"merge of {verb}: other bytes than of the whole command", output.read_bytes() != whole, at_most=0)
    bench.row(f"merge of {verb}: peak", merged.peak_mib, "MiB")
    bench.at_full_scale(f"merge / {verb}: peak", merged.peak_mib / peak_mib, at_most=1.1)


def report(bench: Bench) -> None:
    """L7: a page about a million cells stays small and says that it shows a sample."""
    size = bench.count(1_000_000, least=2_500)
    file, output = next((bench.cells(size) / "none").glob("*.h5ad")), bench.folder / "million.h5ad"
    predicted = bench.run(
        f"predict {size:,}", f"predict {bench.toy} {file} --output {output} --overwrite --ask cell_type --no_report"
    )
    bench.row(f"predict {size:,} cells: peak", predicted.peak_mib, "MiB")
    page = bench.folder / "page.html"
    watched = bench.run(f"report {size:,}", f"report {output} --output {page}")
    if watched.code:
        return
    text = page.read_text(encoding="utf-8")
    bench.row("page", len(text.encode()) / 2**20, "MiB", at_most=5)
    bench.row(
        "page: 1 if it says that it shows a sample", f"of {size:,} cells" in text and "a sample of" in text, at_least=1
    )
    bench.row(f"report about {size:,} cells: peak", watched.peak_mib, "MiB")
    bench.row("report: processor time", watched.cpu_seconds, "s")


def large_vocabulary(bench: Bench) -> None:
    """L8: figures for 60,000 genes, 5,000 labels and cells of 8,192 tokens."""
    genes = bench.count(60_000, least=400)
    labels = bench.count(5_500, least=20)
    many = CellSet(1, cells=bench.count(12_000, least=200), genes=genes, expressed=genes // 200, cell_types=labels)
    long = CellSet(1, cells=bench.count(256, least=16), genes=genes, expressed=genes // 6, cell_types=4, seed=0)
    files = [build(one, bench.folder, compressions=("none",)) / "none" for one in (many, long)]
    corpus, run, vocabulary = (bench.folder / name for name in ("wide_corpus", "wide", "wide_vocabulary.json"))
    vocabulary.write_text(json.dumps({"cell_type": [f"type {label:02d}" for label in range(labels)]}))
    for name, words in {
        "prepare": f"prepare {files[0]} {files[1]} --output {corpus} --phenotypes cell_type --split_by donor_id "
        "--no_report",
        "mlm, 5 steps of 2 cells": f"mlm --train_data_paths {files[1]} --vocab_path {vocabulary} --included_phenotypes "
        f"cell_type --bin_edges 0.5 1 2 4 --output_dir {run} --model_arch tiny --max_length 8192 --max_steps 5 "
        "--per_device_train_batch_size 2 --eval_strategy no --report_to none --logging_steps 1",
        "predict": f"predict {run} {next(files[1].iterdir())} --output {bench.folder}/wide.h5ad --ask cell_type "
        "--no_report --overwrite",
    }.items():
        watched = bench.run(name, words)
        bench.row(f"{name}: processor time", watched.cpu_seconds, "s")
        bench.row(f"{name}: peak", watched.peak_mib, "MiB")
        for line in watched.lines:
            if line.line.startswith("step"):
                print(line.line, file=sys.stderr)
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.stat().st_size > 2**20 * bench.scale:
            bench.row(f"size of {path.relative_to(run)}", path.stat().st_size / 2**20, "MiB")


def evaluations(bench: Bench) -> None:
    """L9: training does not grow from evaluation to evaluation."""
    corpus = bench.corpus(bench.count(20_000, least=600))
    steps = bench.count(400, least=20)
    words = f"mlm --corpus {corpus} --output_dir {bench.folder}/evaluated --model_arch tiny --report_to none "
    words += f"--max_length 128 --max_steps {steps} --eval_steps {steps // 20} --logging_steps {steps // 20} "
    watched = bench.run("evaluations", words)
    held = [line.mib for line in watched.lines if line.line.startswith("evaluated at")]
    bench.row("evaluations", len(held), at_least=10)
    bench.row("memory after the second evaluation", held[1], "MiB")
    bench.row("peak", watched.peak_mib, "MiB")
    grown = median(held[-5:]) - median(held[len(held) // 4 : len(held) // 2])
    bench.at_full_scale("growth from the second quarter of evaluations to the last", grown, "MiB", at_most=40)


LOADS: dict[str, Callable[[Bench], None]] = {
    "L1": streaming,
    "L2": training,
    "L3": many_shards,
    "L4": large,
    "L5": start_up,
    "L6": answers,
    "L7": report,
    "L8": large_vocabulary,
    "L9": evaluations,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run loads; return 1 if a bound was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("loads", nargs="*", metavar="LOAD", help=f"which of {' '.join(LOADS)} (default: all)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="1.0 is a million cells; below 0.2 growth is not judged"
    )
    parser.add_argument("--folder", type=Path, help="where cells are kept (default: a temporary folder, then deleted)")
    options = parser.parse_args(arguments)
    if unknown := set(options.loads) - LOADS.keys():
        parser.error(f"there is no load {', '.join(sorted(unknown))}; choose from {', '.join(LOADS)}")
    print(f"{datetime.date.today()}, {machine()}, scale {options.scale:g}")
    num_missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.loads or LOADS:
            started, bench = time.perf_counter(), Bench(options.folder or Path(temporary), options.scale)
            print(
                f"\n**{name}**: {LOADS[name].__doc__.partition(': ')[2]}\n\n| | measured | bound | |\n|---|---|---|---|"
            )
            LOADS[name](bench)
            num_missed += sum(row.is_missed for row in bench.rows)
            print(f"\n{time.perf_counter() - started:,.0f} s")
    print(f"\n{num_missed} bounds missed" if num_missed else "\nall bounds kept")
    return min(1, num_missed)


if __name__ == "__main__":
    sys.exit(main())
