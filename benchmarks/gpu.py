"""Everything that we want to know from a GPU, in one script of a few minutes: is it right, and is it fast?

    make gpu                                            # = python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --quick       # the same script on a CPU, in under a minute

Prints one table and writes one JSON file. Every part runs in its own process with a time budget; a part that fails or
takes too long is reported and does not stop the others. Nothing is downloaded. Owns the parts and the table; how a
training step, an answer or a loader is measured is in `training`, `inference` and `contenders`.
"""

import argparse
import contextlib
import datetime
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cells import CellSet, build, build_corpus
from benchmarks.contenders import Job, ours
from benchmarks.inference import cut, knock_out_rows, reading_rows
from benchmarks.loading import machine, versions
from benchmarks.trainees import MAIN, RECIPES, SIZES, TRAINER, USUAL, Recipe, Trainee, draw_batches
from benchmarks.training import row_of, timed

LABEL = "cell_type=B cell"
TOLERANCE = 1e-4  # largest difference between the answers of two devices in float32, relative to the largest answer
#: Padded, eager, in the precision that ours uses: the recipe that the goals are held against.
EAGER, VARLEN, FLASH = "usual recipe, bf16", "ours: packed, bf16 (varlen)", "ours: packed, bf16 (flash-attn)"
PLAIN = {"norm_position": "post", "bin_gain_range": 0}
MORE_RECIPES = {
    EAGER: Recipe(is_ours=False, bf16=True, settings=PLAIN),
    "padded SDPA, fused AdamW, bf16": Recipe(is_ours=False, attention="sdpa", bf16=True, settings=PLAIN),
    VARLEN: Recipe(bf16=True),
    FLASH: Recipe(bf16=True, settings={"attention_kernel": "flash"}),
}


#: A CPU gets this many times the budget of a part, since it may be busy with other work.
CPU_PATIENCE = 5


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        part, what: What was measured.
        value: The number, or a word.
        unit: Of the number.
        goal: In words; empty if there is none.
        is_met: Whether the goal was reached; None without a goal, or where it cannot be judged.
    """

    part: str
    what: str
    value: float | str
    unit: str = ""
    goal: str = ""
    is_met: bool | None = None


@dataclass(frozen=True)
class Setting:
    """What every part knows: the folder with cells, corpus and runs, the device, and whether to be quick."""

    folder: Path
    device: str
    is_quick: bool

    @property
    def flags(self) -> list[str]:
        """Flags of training that choose the device."""
        return ["--use_cpu"] if self.device == "cpu" else []


@dataclass(frozen=True)
class Part:
    """A function that yields rows, its name, and its budget in seconds on an H100."""

    name: str
    budget: float
    run: Callable[[Setting, list[Row]], Iterator[tuple[Any, ...]]]


def command(words: list[str]) -> None:
    """Run one of our commands in this process; its own messages go to the part's log.

    Raises:
        RuntimeError: It ended with another code than 0.
    """
    from perturbgene.main import main

    if code := main(words):
        raise RuntimeError(f"perturbgene {' '.join(words)} ended with code {code}")


# -- the parts ----------------------------------------------------------------------------------------------------


def draw_cells(num_cells: int, num_genes: int = 400) -> Any:
    """Draw counts of three cell types with ten marker genes each, 400 genes, four donors: learned in seconds."""
    import anndata as ad
    import pandas as pd
    from scipy import sparse

    draw = np.random.default_rng(0)
    types = np.array(["B cell", "T cell", "monocyte"])[draw.integers(3, size=num_cells)]
    mean_ng = np.full((num_cells, num_genes), 0.5)
    for number, name in enumerate(np.unique(types)):
        mean_ng[types == name, 10 * number : 10 * number + 10] = 5.0
    counts_ng = draw.poisson(mean_ng * draw.lognormal(0, 0.3, (num_cells, 1)))
    obs = pd.DataFrame({"cell_type": types, "tissue": np.array(["blood", "lung"])[draw.integers(2, size=num_cells)],
                        "donor_id": [f"D{donor}" for donor in draw.integers(4, size=num_cells)]})  # fmt: skip
    obs.index = [f"cell_{number}" for number in range(num_cells)]
    var = pd.DataFrame(index=[f"ENSG{number:011d}" for number in range(num_genes)])
    return ad.AnnData(sparse.csr_matrix(counts_ng.astype(np.float32)), obs=obs, var=var)


def set_up(setting: Setting, _: list[Row]) -> Iterator[tuple[Any, ...]]:
    """Write cells, a corpus and a run, trained on the CPU so that both devices are asked about the same weights."""
    cells, corpus = setting.folder / "cells.h5ad", str(setting.folder / "corpus")
    (draw_cells(160, num_genes=120) if setting.is_quick else draw_cells(1200)).write_h5ad(cells)
    command(
        ["prepare", str(cells), "--output", corpus, "--phenotypes", "cell_type", "tissue", "--split_by", "donor_id"]
    )
    small = ["--model_arch", "tiny", "--use_cpu", "--no_bf16", "--report_to", "none", "--eval_strategy", "no"]
    steps = ["--max_steps", "8" if setting.is_quick else "100"]
    command(["mlm", "--corpus", corpus, "--output_dir", str(setting.folder / "run"), *small, *steps])
    yield "cells, corpus and run", "made"


def run_tests(setting: Setting, _: list[Row]) -> Iterator[tuple[Any, ...]]:
    """Run the tests that need a GPU."""
    if setting.device == "cpu":
        yield "tests marked gpu", "skipped: no GPU"
        return
    call = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
    yield "tests marked gpu", last, "", "all pass", done.returncode == 0


def largest_difference(one: Any, other: Any) -> float:
    """Return the largest difference of two arrays, relative to their largest value (at least 1)."""
    one, other = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    assert one.shape == other.shape, f"answers of shapes {one.shape} and {other.shape}"
    assert (np.isnan(one) == np.isnan(other)).all(), "other answers are missing"
    return float(np.nanmax(np.abs(one - other)) / max(1.0, np.nanmax(np.abs(one))))


def by_name(table: Any, column: str) -> Any:
    """Return a column of effects ordered by name, since equal effects have no order of their own."""
    names = [name for name in ("label", "gene", "perturbation") if name in table]
    return table.sort_values(names)[column]


def losses(run: Path) -> list[float]:
    """Return the logged training losses of a run."""
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def agreement(setting: Setting, _: list[Row]) -> Iterator[tuple[Any, ...]]:
    """Compare the answers of the CPU and the device in float32; on a CPU, the second answers come in other batches."""
    import anndata as ad

    import perturbgene as pg

    corpus = str(setting.folder / "corpus")
    train = ["mlm", "--corpus", corpus, "--model_arch", "tiny", "--no_bf16", "--dropout", "0", "--max_steps", "8"]
    train += ["--logging_steps", "1", "--report_to", "none", "--eval_strategy", "no"]
    other = ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "16"]
    for name, flags in (("cpu", ["--use_cpu"]), ("device", setting.flags + other)):
        command([*train, "--output_dir", str(setting.folder / f"agree_{name}"), *flags])
    pairs = {"training loss": [losses(setting.folder / f"agree_{name}") for name in ("cpu", "device")]}
    cells = ad.read_h5ad(setting.folder / "cells.h5ad")[: 24 if setting.is_quick else 240]
    run = str(setting.folder / "run")
    label, lung = "predicted_cell_type_probability", {"tissue": "lung"}
    few, check = {"top_k": 4, "num_controls": 4}, {"num_check_cells": 2}
    answers: dict[str, Callable[..., Any]] = {
        "predict": lambda **how: pg.predict(cells, run, ask=["cell_type"], **how).obs[label],
        "embed": lambda **how: pg.embed(cells, run, **how).obsm["X_perturbgene"],
        "counterfactual": lambda **how: pg.counterfactual(cells, run, set=lung, num_null=0, **how)["change"],
        "perturb": lambda **how: by_name(pg.perturb(cells, run, genes=["all"], towards=LABEL, **few, **how), "effect"),
        "attribute": lambda **how: by_name(pg.attribute(cells, run, ask="cell_type", **check, **how), "support"),
    }
    for name, answer in answers.items():
        pairs[name] = [answer(device="cpu"), answer(device=setting.device, batch_size=32)]
    for name, (one, two) in pairs.items():
        difference = largest_difference(one, two)
        yield f"{name}, float32 against the CPU", difference, "", f"at most {TOLERANCE}", difference <= TOLERANCE


def precision(setting: Setting, _: list[Row]) -> Iterator[tuple[Any, ...]]:
    """Train with the demo's settings in float32 and bfloat16 and compare the losses."""
    from perturbgene.devices import has_bfloat16

    if not has_bfloat16(setting.device):
        yield "losses in bfloat16", "skipped: the device has none"
        return
    epochs = "2" if setting.is_quick else "24"
    train = ["mlm", "--corpus", str(setting.folder / "corpus"), "--model_arch", "tiny", "--num_hidden_layers", "1"]
    train += ["--num_train_epochs", epochs, "--learning_rate", "7.5e-4", "--gene_drop_prob", "0.9", "--logging_steps"]
    train += ["5", "--report_to", "none", "--eval_strategy", "no", *setting.flags]
    curves = {}
    for name in ("float32", "bfloat16"):
        run = setting.folder / f"precision_{name}"
        command([*train, "--output_dir", str(run), "--bf16" if name == "bfloat16" else "--no_bf16"])
        curves[name] = np.array(losses(run))
    gap = np.abs(curves["float32"] - curves["bfloat16"])
    for name, curve in curves.items():
        yield f"{name}, mean of the last five losses", float(curve[-5:].mean()), "nats"
    yield "largest difference of a logged loss", float(gap.max()), "nats"
    yield "mean difference of a logged loss", float(gap.mean()), "nats", "at most 0.02", bool(gap.mean() <= 0.02)


def resume(setting: Setting, _: list[Row]) -> Iterator[tuple[Any, ...]]:
    """Train undisturbed, and again from the middle checkpoint; compare the weights."""
    from safetensors.numpy import load_file

    half_steps = 2 if setting.is_quick else 10
    train = ["mlm", "--corpus", str(setting.folder / "corpus"), "--model_arch", "tiny", "--max_steps"]
    train += [
        str(2 * half_steps),
        "--save_steps",
        str(half_steps),
        "--report_to",
        "none",
        "--eval_strategy",
        "no",
        *setting.flags,
    ]
    whole, half = setting.folder / "resume_whole", setting.folder / "resume_half"
    command([*train, "--output_dir", str(whole)])
    half.mkdir()
    shutil.copytree(whole / f"checkpoint-{half_steps}", half / f"checkpoint-{half_steps}")
    command([*train, "--output_dir", str(half), "--resume_from_checkpoint"])
    sums = [hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest() for run in (whole, half)]
    one, two = load_file(whole / "model.safetensors"), load_file(half / "model.safetensors")
    gap = max(float(np.abs(one[name] - two[name]).max()) for name in one)
    is_same = sums[0] == sums[1]
    yield "resumed weights", "same bits" if is_same else f"differ by {gap:.1e}", "", "same bits", is_same


def training_recipes() -> list[str]:
    """Names of the recipes to train with: those of the usual benchmark, eager in bf16, and our kernels."""
    names = [*MAIN, EAGER, "padded SDPA, fused AdamW, bf16"]
    if torch.cuda.is_available():
        names += [VARLEN] + ([FLASH] if importlib.util.find_spec("flash_attn") else [])
    return [name for name in names if not (torch.cuda.is_available() and name == "ours: packed, bf16")]


def training(setting: Setting, _: list[Row]) -> Iterator[tuple[Any, ...]]:
    """Measure training steps of every recipe: tokens/s, memory, and the share of the peak of a matrix product."""
    from benchmarks.flops import measured_peak

    if setting.device == "cpu":
        torch.set_num_threads(1)
    RECIPES.update(MORE_RECIPES)
    sizes, cells = (["1x32"], 2) if setting.is_quick else (["6x512", "12x768"], 16)
    SIZES.setdefault("1x32", (1, 32, 2))
    peaks = {
        name: measured_peak(setting.device, dtype)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    for name, peak in peaks.items():
        yield f"peak of a matrix product, {name}", peak / 1e12, "TFLOP/s"
    for size in sizes:
        for lengths in ("~500",) if setting.is_quick else ("~500", "full 1024"):
            batches = draw_batches(lengths, cells=cells, batches=2, device=setting.device)
            found: dict[str, Any] = {}
            for name in training_recipes():
                try:
                    found[name] = measure_recipe(name, size=size, batches=batches, rounds=1 if setting.is_quick else 3)
                except torch.cuda.OutOfMemoryError:
                    yield f"{size}, {lengths}, {name}", "out of memory"
                torch.cuda.empty_cache()
            yield from training_rows(found, f"{size}, {lengths}", peaks)


def measure_recipe(name: str, *, size: str, batches: Any, rounds: int) -> Any:
    """Time one recipe alone on the device, so that nothing else takes its memory."""
    trainee = Trainee(name, size=size, batches=batches, is_training=True)
    row = row_of(trainee, "training")
    for _ in range(rounds):
        row.seconds.append(sum(timed(Trainee.train, trainee, batch) for batch in trainee.batches))
    return row


def training_rows(found: dict[str, Any], where: str, peaks: dict[str, float]) -> Iterator[tuple[Any, ...]]:
    """Say how fast each recipe is, and whether ours reaches the goals against the padded eager one in bf16."""
    is_cuda = torch.cuda.is_available()
    for name, row in found.items():
        share = row.flops / statistics.median(row.seconds) / peaks["bf16" if row.is_bf16 else "fp32"]
        yield f"{where}, {name}", row.speed, "tokens/s"
        is_ours = name in (VARLEN, FLASH, "ours: packed, bf16")
        goal = ("at least 40 %", bool(share >= 0.4)) if is_ours and is_cuda else ()
        yield f"{where}, {name}, MFU", 100 * share, "%", *goal
        if row.peak_mib is not None:
            yield f"{where}, {name}, peak memory", 1024 * row.peak_mib / row.tokens, "KiB/token"
    best = max((name for name in found if name.startswith("ours")), key=lambda name: found[name].speed, default=None)
    if best is None:
        return
    for rival in (USUAL, EAGER, TRAINER):
        if rival in found:
            ratio = found[best].ratio(found[rival])
            goal = ("at least 3 times", bool(ratio >= 3)) if rival == EAGER and is_cuda else ()
            yield f"{where}, {best} against {rival}", ratio, "times as fast", *goal
    if is_cuda and EAGER in found:
        ratio = (found[best].peak_mib / found[best].tokens) / (found[EAGER].peak_mib / found[EAGER].tokens)
        yield f"{where}, memory per token against {EAGER}", ratio, "times", "at most 0.5", bool(ratio <= 0.5)


def loading(setting: Setting, _: list[Row]) -> Iterator[tuple[Any, ...]]:
    """Measure what the data path delivers from a prepared corpus, masked and packed, by number of loader workers."""
    cells = CellSet(shards=2, cells=200, genes=2_000, expressed=300) if setting.is_quick else CellSet.scaled(0.1)
    home = build(cells, setting.folder / "sets")
    build_corpus(home)
    for workers in (0, 1) if setting.is_quick else (0, 1, 2, 4):
        job = Job(home, max_length=1024)
        epoch = ours(job, variant="corpus", how="packed, masked", workers=workers, threads=1 if workers else 2)
        for _ in epoch():  # workers start, the page cache fills
            pass
        started, tokens, num_cells = time.perf_counter(), 0, 0
        for batch in epoch():
            tokens += int(batch["input_ids"].shape[0])
            num_cells += len(batch["cu_seqlens"]) - 1
        seconds = time.perf_counter() - started
        name = f"{workers} workers" if workers else "no workers, two threads"
        yield f"data path, {name}", num_cells / seconds, "cells/s"
        yield f"data path, {name}, tokens", tokens / seconds, "tokens/s"


def eaten(_: Setting, rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    """Compare what the data path delivers with what training consumes."""
    delivered = max((row.value for row in rows if row.part == "loading" and row.unit == "tokens/s"), default=None)
    for row in rows:
        if row.part == "training" and row.unit == "tokens/s" and ", ours: packed, bf16" in row.what and delivered:
            ratio = float(delivered) / float(row.value)
            yield f"data path against {row.what}", ratio, "times", "at least 1", ratio >= 1


def asking(setting: Setting, rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    """Measure predict, embed and knock-outs per second against one cell at a time, on a model of 6 layers x 512."""
    from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
    from perturbgene.inference.run import load_run

    if setting.device == "cpu":
        torch.set_num_threads(1)
    big, corpus = setting.folder / "big", str(setting.folder / "corpus")
    size = ("1", "32", "2") if setting.is_quick else ("6", "512", "8")
    sizes = ["--num_hidden_layers", size[0], "--hidden_size", size[1], "--num_attention_heads", size[2]]
    sizes += ["--intermediate_size", str(4 * int(size[1]))]
    more = ["--max_steps", "1", "--report_to", "none", "--eval_strategy", "no", *setting.flags]
    command(["mlm", "--corpus", corpus, "--output_dir", str(big), *sizes, *more])
    run = load_run(big, device=setting.device)
    bare = run.tokenizer.with_settings(included=[])
    dataset = IterableAnnDataset(str(setting.folder / "cells.h5ad"), bare, batch_size=256)
    started = time.perf_counter()
    num_cells = sum(len(block) for block in dataset.blocks())
    reading = num_cells / (time.perf_counter() - started)
    yield "reading and tokenizing the same file", reading, "cells/s"
    block = next(IterableAnnDataset(str(setting.folder / "cells.h5ad"), bare, batch_size=100_000).blocks())
    for found in reading_rows(run, block.take(np.arange(min(40 if setting.is_quick else 400, len(block)))), LABEL):
        is_judged = found["how"] == "ours" and torch.cuda.is_available()
        goal = ("no slower than loading", bool(found["cells/s"] >= reading)) if is_judged else ()
        yield f"{found['verb']}, {found['how']}", found["cells/s"], "cells/s", *goal
        yield f"{found['verb']}, {found['how']}, against one cell at a time", found["x"], "times as fast"
    num_genes = 60 if setting.is_quick else 120
    shorter = cut(block, run.tokenizer.first_gene_type, num_genes)
    shorter = shorter.take(np.arange(min(2 if setting.is_quick else 8, len(shorter))))
    for found in knock_out_rows(run, shorter, LABEL, num_genes=num_genes, sample=8 if setting.is_quick else 64):
        yield f"knock-outs, {found['how']}", num_genes * found["cells/s"], "knock-outs/s"
        yield f"knock-outs, {found['how']}, against one at a time", found["x"], "times as fast"


#: Budgets add up to eight minutes.
PARTS = (
    Part("set-up", 60, set_up),
    Part("tests", 50, run_tests),
    Part("agreement", 60, agreement),
    Part("precision", 55, precision),
    Part("resume", 40, resume),
    Part("training", 100, training),
    Part("loading", 50, loading),
    Part("data against GPU", 5, eaten),
    Part("asking", 60, asking),
)


# -- running them -------------------------------------------------------------------------------------------------


def work(pipe: Connection, part: Part, setting: Setting, rows: list[Row], log: Path) -> None:
    """Run a part in its own process: send its rows, then None; what it prints goes to a log file."""
    with log.open("w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(number, "wb", 0), write_through=True) for number in (1, 2))
        try:
            for found in part.run(setting, rows):
                pipe.send(Row(part.name, *found))
            pipe.send(None)
        except BaseException as error:
            traceback.print_exc()
            pipe.send(
                Row(part.name, "failed", " ".join(f"{type(error).__name__}: {error}".split())[:200], is_met=False)
            )
            pipe.send(None)


def run_part(part: Part, setting: Setting, rows: list[Row]) -> list[Row]:
    """Return the rows of a part, with one that says so if it failed, died, or ran out of time."""
    fork = multiprocessing.get_context("fork")  # torch is imported once; no part has touched the GPU before
    ours_end, theirs = fork.Pipe()
    log = setting.folder / f"{part.name.replace(' ', '_')}.log"
    process = fork.Process(target=work, args=(theirs, part, setting, rows, log))
    budget = part.budget * (CPU_PATIENCE if setting.device == "cpu" else 1)
    end, found = time.monotonic() + budget, []
    process.start()
    theirs.close()
    try:
        while ours_end.poll(max(0.0, end - time.monotonic())):
            if (row := ours_end.recv()) is None:
                break
            found.append(row)
        else:
            found.append(Row(part.name, "stopped", f"took longer than its {budget:.0f} s", is_met=False))
    except EOFError:
        found.append(Row(part.name, "died", f"see {log.name}", is_met=False))
    finally:
        process.join(2)
        if process.is_alive():
            process.kill()
            process.join()
    return found


def table(rows: list[Row]) -> str:
    """Render Markdown: one line per row."""
    lines = ["| part | what | value | goal | reached |", "|---|---|---|---|---|"]
    for row in rows:
        value = row.value
        if not isinstance(value, str):
            value = f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
        met = {True: "yes", False: "**no**", None: ""}[row.is_met]
        lines.append(f"| {row.part} | {row.what} | {' '.join([value, row.unit]).strip()} | {row.goal} | {met} |")
    return "\n".join(lines)


def about(device: str) -> str:
    """Say when, where and with what this was measured."""
    place = torch.cuda.get_device_name() if device == "cuda" else f"{machine()}, no GPU was used"
    return f"{datetime.date.today()}; {place}; {versions()}; Python {platform.python_version()}; {platform.system()}"


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; the exit code is 1 if one failed or missed a goal of correctness."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the script, measures nothing of use")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="parts to run, after set-up")
    parser.add_argument("--folder", type=Path, help="keep cells, runs and logs there")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="file for all rows")
    options = parser.parse_args(arguments)
    has_cuda = options.device != "cpu" and (
        subprocess.run(
            [sys.executable, "-c", "import torch, sys; sys.exit(not torch.cuda.is_available())"], check=False
        ).returncode
        == 0
    )  # asked elsewhere: a process that has touched the GPU cannot fork parts that use it
    device = options.device if options.device != "auto" else "cuda" if has_cuda else "cpu"
    if device == "cuda" and not has_cuda:
        print("There is no CUDA device here. Run this on a machine that has one, or with --device cpu --quick.")
        return 2
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        setting, rows = Setting(folder.resolve(), device, options.quick), []
        for module in ("training.train", "corpus.prepare", "inference.predict", "perturbation.perturb"):
            importlib.import_module(f"perturbgene.{module}")  # once, for all parts that are forked from here
        for part in PARTS:
            if options.only and part.name not in ("set-up", *options.only):
                continue
            started = time.monotonic()
            rows += run_part(part, setting, rows)
            print(f"{part.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print(f"{about(device)}\n\n{table(rows)}")
    options.json.write_text(
        json.dumps({"about": about(device), "rows": [asdict(row) for row in rows]}, indent=2), encoding="utf-8"
    )
    is_speed = [row.goal.startswith(("at least", "at most 0.5", "no slower")) for row in rows]
    return int(any(row.is_met is False and not is_goal for row, is_goal in zip(rows, is_speed, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
