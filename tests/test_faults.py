"""Faults of the machine, each with what docs/robustness.md promises: nothing is lost, mixed up or left behind.

`make test` runs few of them and `make faults` all. Faults whose test is in another file are listed with its name.
"""

import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import anndata as ad
import psutil
import pytest

from perturbgene.configs import parse_args
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils import remote
from perturbgene.errors import InputError
from perturbgene.files import claimed, sha256_of
from perturbgene.inference.streaming import Ranks
from perturbgene.main import main, write_report
from perturbgene.sharded_trainer import ShardedTrainer
from perturbgene.training import watchdog
from perturbgene.training.callbacks import WithCells
from perturbgene.training.checkpoints import checkpoints, damage_of
from tests.data_utils.test_remote import BadHandler
from tests.faults import PHASES, Killed, full_disk, plant
from tests.forked import in_two_processes, needs_fork, start
from tests.lines import Checked, params
from tests.small_training import STEPS, command, raise_killed, resume
from tests.web_server import serving

#: Command lines of the verbs that write, but for training; `{out}` is an empty folder.
VERBS = {
    "prepare": "prepare {cells} --output {out}/corpus --phenotypes cell_type --num_top_genes 50 --num_processes 1",
    "predict": "predict {run} {cells} --output {out}/out.h5ad --ask cell_type",
    "embed": "embed {run} {cells} --output {out}/out.h5ad",
    "embed-genes": "embed {run} {cells} --output {out}/out.h5ad --groupby cell_type --network --min_cells 2",
    "counterfactual": "counterfactual {run} {cells} --output {out}/out.h5ad --set tissue=lung --num_null 0",
    "perturb": "perturb {run} {cells} --output {out}/out.csv --genes CD79A CD79B --towards cell_type=monocyte "
    "--num_controls 4",
    "attribute": "attribute {run} {cells} --output {out}/out.csv --ask cell_type --num_check_cells 5",
    "evaluate": "evaluate {run} --eval_data_paths {cells} --output {out}/scores --no_calibrate --no_baselines "
    "--ask cell_type",
    "report": "report {corpus} --output {out}/page.html",
}
#: Those that ask a model about cells.
ASKED = ("predict", "embed", "embed-genes", "counterfactual", "perturb", "attribute")
#: Verbs with an option that leads to other outputs.
_OPTIONS = {"embed-genes": "embed --groupby"}
#: What is killed most often: one moment of each kind.
MOST_MOMENTS = 60


def _named(verb: str) -> str:
    return _OPTIONS.get(verb, verb)


@dataclass
class Shop:
    """A folder to work in, a run that is trained, a training, and short ways to say what should come of a fault."""

    folder: Path
    request: Any
    capsys: Any
    caplog: Any

    @property
    def corpus(self) -> Path:
        return self.request.getfixturevalue("training_corpus")

    @property
    def whole(self) -> bytes:
        """The weights of the training that nothing disturbs."""
        return self.request.getfixturevalue("whole_weights")

    @property
    def cells(self) -> Path:
        return self.request.getfixturevalue("few_cells")

    @property
    def run(self) -> Path:
        return self.request.getfixturevalue("small_folder") / "runs/mlm"

    def words(self, verb: str, out: Path, *, cells: Any = None) -> list[str]:
        """Return the command line of a verb."""
        out.mkdir(exist_ok=True)
        names = {"run": self.run, "corpus": self.run.parents[1] / "corpus", "cells": cells or self.cells}
        return VERBS[verb].format(out=out, **names).split()

    def call(self, words: list[str]) -> tuple[int, str]:
        """Run a command line; return its exit code and its last line, which must be the only one about an error."""
        self.capsys.readouterr()
        code, said = main(words), self.capsys.readouterr().err
        assert "Traceback" not in said
        assert len(re.findall("(?<!I/O )error: ", said)) == (code != 0), said
        return code, said.splitlines()[-1] if said else ""

    def undisturbed(self, verb: str) -> dict[str, str]:
        """Return the sums of what a verb writes when nothing disturbs it."""
        known = self.request.getfixturevalue("known_results")
        if verb not in known:
            out = self.folder / "undisturbed"
            assert main(self.words(verb, out)) == 0
            known[verb] = sums(out)
            shutil.rmtree(out)
        return known[verb]

    def is_finished_again(self, verb: str, out: Path) -> None:
        """Expect that the same command now gives what the undisturbed one gives, and leaves nothing else."""
        code, line = self.call(self.words(verb, out))
        assert code == 0 or (code == 2 and " exists" in line), line
        assert sums(out) == self.undisturbed(verb)

    def training_ends_alike(self, out: Path, more: str = "") -> None:
        """Expect that resuming ends with the weights of the undisturbed training, and leaves nothing half-done."""
        assert resume(self.corpus, out, more) == 0
        assert (out / "model.safetensors").read_bytes() == self.whole
        assert not list(out.glob(".*"))


def sums(folder: Path) -> dict[str, str]:
    """Return the sum of every file in a folder, also of hidden ones; a manifest is compared but for its time."""
    for path in folder.rglob("manifest.json"):
        path.write_text(re.sub('"created": "[^"]*"', '"created": ""', path.read_text()))
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Fault(Checked):
    """A line that says how the command ends, too."""

    exit: str = ""


FAULTS: list[Fault] = []


def fault(id: str, what: str, outcome: str, exit: str, *, is_sampled: bool = False) -> Callable[[Any], Any]:
    """Register the check of a fault."""

    def register(check: Callable[[Shop], object]) -> Callable[[Shop], object]:
        FAULTS.append(Fault(id, what, outcome, check=check, is_sampled=is_sampled, exit=exit))
        return check

    return register


def elsewhere(id: str, what: str, outcome: str, exit: str, test: str) -> None:
    """List a fault whose test is in another file."""
    FAULTS.append(Fault(id, what, outcome, test, is_sampled=True, exit=exit))


@pytest.fixture(scope="session")
def killed_training(training_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training killed at step 10, with checkpoints of steps 4 and 8."""
    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(Killed), plant("step", 10, raise_killed):
        main(command(training_corpus, out))
    return out


@pytest.fixture(scope="session")
def few_cells(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few") / "few.h5ad"
    ad.read_h5ad(small_folder / "cells.h5ad")[::6].write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def known_results() -> dict[str, Any]:
    return {}


@pytest.fixture
def shop(tmp_path: Path, request: pytest.FixtureRequest, capsys: Any, caplog: Any) -> Shop:
    caplog.set_level("INFO", logger="perturbgene")
    return Shop(tmp_path, request, capsys, caplog)


# -- F1 to F3: killed ---------------------------------------------------------------------------------------------


def _killed_in_phase(shop: Shop, *, phase: str) -> None:
    """Kill again and again, each time at the next step at which the phase comes."""
    out, more = shop.folder / "run", ""
    last = [STEPS] if phase != "step" else []
    steps = range(STEPS) if phase == "step" else [12, STEPS] if phase == "rotate" else [4, 8, 12, *last]
    for step in [STEPS] if phase == "deliver" else steps:
        with pytest.raises(Killed), plant(phase, step, raise_killed):
            main(command(shop.corpus, out, more))
        more = "--resume_from_checkpoint"
        if step > 4 and phase != "deliver":
            assert any(damage_of(path) is None for path in checkpoints(out))
    shop.training_ends_alike(out)


for _phase in PHASES:
    fault(
        f"{'F3' if _phase == 'rotate' else 'F1'}-training-{_phase}",
        "training killed while it deletes old checkpoints" if _phase == "rotate"
        else f"training killed at each step in the phase `{_phase}`",
        "`--resume_from_checkpoint`: the same weights, bit by bit; one whole checkpoint at any time", "137, then 0",
    )(partial(_killed_in_phase, phase=_phase))  # fmt: skip


def _kill_at(number: int, folder: Path) -> None:
    """Let this process be killed just before it changes something in a folder for the n-th time."""
    counted, prefix = [0], str(folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        if not isinstance(args[0], str | Path) or not str(args[0]).startswith(prefix):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        counted[0] += 1
        if counted[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 0:
            print("moment", flush=True)

    sys.addaudithook(hook)


def _killed_verb(shop: Shop, *, verb: str) -> None:
    expected, said = shop.undisturbed(verb), shop.folder / "said"

    def run(number: int, out: Path) -> None:
        _kill_at(number, out)
        sys.exit(main(shop.words(verb, out)))

    def ended(number: int, out: Path) -> int | None:
        process = start(partial(run, number, out), output=said)
        process.join(timeout=200)
        return process.exitcode

    assert ended(0, shop.folder / "counted") == 0 and sums(shop.folder / "counted") == expected
    num_moments = said.read_text().count("moment")
    assert num_moments > 3
    stride = max(1, num_moments / MOST_MOMENTS)
    for number in sorted({1 + int(stride * place) for place in range(MOST_MOMENTS)} | {num_moments}):
        if number <= num_moments:
            out = shop.folder / f"out_{number}"
            assert ended(number, out) == -signal.SIGKILL
            shop.is_finished_again(verb, out)


for _verb in VERBS:
    fault(
        f"F1-{_verb}", f"`{_named(_verb)}` killed before it opens, renames or deletes a file",
        "the same command gives the same bytes and removes what was left; no half output passes for a whole one",
        "137, then 0",
    )(partial(_killed_verb, verb=_verb))  # fmt: skip


@fault("F1-merge", "`merge` killed before it opens, renames or deletes a file", "the same command gives the bytes of "
       "the whole command, or says that they are there and what to delete", "137, then 0 or 2")  # fmt: skip
def _(shop: Shop) -> None:
    made, whole, said = shop.folder / "made", shop.folder / "whole", shop.folder / "said"
    for out, part in ((whole, []), (made, ["--part", "1/2"]), (made, ["--part", "2/2"])):
        assert main([*shop.words("predict", out), "--batch_size", "8", *part]) == 0
    expected = sums(whole)

    def ended(number: int, out: Path) -> int | None:
        def run() -> None:
            _kill_at(number, out)
            sys.exit(main(["merge", str(out / "out.h5ad")]))

        shutil.copytree(made, out)
        process = start(run, output=said)
        process.join(timeout=200)
        return process.exitcode

    assert ended(0, shop.folder / "counted") == 0 and sums(shop.folder / "counted") == expected
    num_moments, num_refused = said.read_text().count("moment"), 0
    for number in sorted({*range(1, num_moments, 4), *range(num_moments - 6, num_moments + 1)}):
        out = shop.folder / f"out_{number}"
        assert ended(number, out) == -signal.SIGKILL
        code, line = shop.call(["merge", str(out / "out.h5ad")])
        if code:
            parts = out / "out.h5ad.parts"
            assert code == 2 and f"{out}/out.h5ad exists" in line and (f"delete {parts}." in line) == parts.exists()
            shutil.rmtree(parts, ignore_errors=True)
            (out / ".out.h5ad.lock").unlink(missing_ok=True)
            num_refused += 1
        assert sums(out) == expected
    assert num_refused > 1


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
}
FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json",
         "manifest.json")  # fmt: skip


def _torn(shop: Shop, *, name: str, damage: str) -> None:
    out = Path(shutil.copytree(shop.request.getfixturevalue("killed_training"), shop.folder / "run"))
    path = out / "checkpoint-8" / name
    content = DAMAGES[damage](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    shop.training_ends_alike(out)
    assert (out / "checkpoint-8.incomplete").is_dir() and "checkpoint-8 cannot be used" in shop.caplog.text


for _name in FILES:
    for _damage in DAMAGES:
        fault(
            f"F2-{Path(_name).stem}-{_damage}", f"`{_name}` of the newest checkpoint {_damage}",
            "a warning; the checkpoint is set aside, the one before it is used: the same weights", "0",
        )(partial(_torn, name=_name, damage=_damage))  # fmt: skip

_TRAINING, _TRAIN = "tests/training/test_safe_trainer.py::", "tests/training/test_train.py::"
elsewhere("F2-by-name", "a torn checkpoint given by its name", "refused, the file is named", "2",
          f"{_TRAINING}test_a_torn_checkpoint_given_by_name_is_refused")  # fmt: skip
elsewhere("F2-finished-run", "weights or tokenizer of a finished run damaged", "every verb refuses the run and names "
          "the file", "2", f"{_TRAIN}test_a_run_with_a_damaged_file_is_refused")  # fmt: skip
elsewhere("F2-finished-again", "the same, resumed", "the final files are written again from the last checkpoint", "0",
          f"{_TRAIN}test_a_finished_run_with_damaged_weights_is_finished_again")  # fmt: skip
elsewhere("F1-prepare-steps", "`prepare` killed while it counts, deals and writes", "continues to the same bytes; "
          "finished parts are kept", "0",
          "tests/corpus/test_prepare.py::test_a_killed_run_continues_to_the_same_bytes")  # fmt: skip
elsewhere("F1-overwrite", "`prepare --overwrite` killed while it replaces a corpus", "one of the two corpora is "
          "whole; the same command ends", "0", "tests/corpus/test_prepare.py::test_an_overwrite_that_is_killed_between_"
          "its_two_renames_keeps_the_old_corpus_until_it_is_repeated")  # fmt: skip


# -- F4: two processes --------------------------------------------------------------------------------------------


def _two_processes(shop: Shop, *, verb: str) -> None:
    out = shop.folder / "out"
    words = command(shop.corpus, out / "run") if verb == "mlm" else shop.words(verb, out)
    target = Path(words[words.index("--output_dir" if verb == "mlm" else "--output") + 1])
    with claimed(target, flag="output", is_inside=verb in ("mlm", "evaluate")):
        code, line = shop.call(words)
    assert code == 2 and f"{target} is being written by another process" in line
    assert not list(out.rglob("*.*"))


for _verb in (*VERBS, "mlm"):
    fault(
        f"F4-{_verb}", f"a second process writes the output of `{_named(_verb)}`",
        "refused before any work, naming the process", "2", is_sampled=True,
    )(partial(_two_processes, verb=_verb))  # fmt: skip
elsewhere("F4-download", "two downloads of one file", "the second is refused", "2",
          "tests/data_utils/test_download.py::test_two_downloads_of_one_file_refuse_each_other")  # fmt: skip
elsewhere("F4-stale-lock", "the lock of a process that was killed", "taken over: the system released it", "0",
          "tests/test_files.py::test_a_second_process_is_refused_until_the_first_is_gone_even_killed")  # fmt: skip


# -- F5 to F9: signals, workers, processes ------------------------------------------------------------------------

for _signal, _code in (("SIGTERM", 143), ("SIGUSR1", 138), ("SIGINT", 130), ("SIGHUP", 129)):
    elsewhere(
        f"F5-{_signal}", f"{_signal} during training",
        "the step is finished and saved; resuming gives the same weights", str(_code),
        f"{_TRAINING}test_a_signal_ends_the_run_after_its_step_with_everything_saved",
    )  # fmt: skip
elsewhere("F5-twice", "a second signal during training", "acts at once, as without us", "128 + n",
          "tests/training/test_callbacks.py::test_a_second_signal_acts_at_once")  # fmt: skip
elsewhere("F5-nohup", "SIGHUP under `nohup`", "training goes on", "0",
          "tests/training/test_callbacks.py::test_a_run_under_nohup_outlives_its_terminal")  # fmt: skip


@fault("F6-worker-killed", "a loader worker killed", "ends in one line; can be resumed", "3")
def _(shop: Shop) -> None:
    out = shop.folder / "run"

    def kill_worker() -> None:
        psutil.Process().children()[-1].kill()

    def run() -> None:
        with plant("step", 1, kill_worker):
            sys.exit(main(command(shop.corpus, out, "--dataloader_num_workers 2")))

    process = start(run, output=shop.folder / "said")
    process.join(timeout=100)
    said = (shop.folder / "said").read_text()
    assert process.exitcode == 3 and "Traceback" not in said, said
    assert "DataLoader worker" in said.splitlines()[-1]
    shop.training_ends_alike(out, "--dataloader_num_workers 1")


@fault("F7-worker-error", "a bad cell that a loader worker finds", "one line, without the worker's traceback", "2")
def _(shop: Shop) -> None:
    def bad(*args: Any) -> Any:
        raise InputError("shard_00000.h5ad row 7: a value is NaN")

    with patch.object(WithCells, "collate_block", bad):
        code, line = shop.call(command(shop.corpus, shop.folder / "run", "--dataloader_num_workers 1"))
    assert (code, line) == (2, "error: shard_00000.h5ad row 7: a value is NaN")


@needs_fork
def _rank(shop: Shop, *, action: Callable[[], None], codes: tuple[int, ...], words: str) -> None:
    out = shop.folder / "run"

    def before() -> None:
        watchdog.LONGEST_SILENCE = 6.0
        whole = ShardedTrainer.training_step

        def faulty(trainer: ShardedTrainer, *args: Any, **kwargs: Any) -> Any:
            if os.environ["RANK"] == "1" and trainer.state.global_step == 5:
                action()
            return whole(trainer, *args, **kwargs)

        ShardedTrainer.training_step = faulty  # type: ignore[method-assign]

    done = in_two_processes(command(shop.corpus, out, "--gradient_accumulation_steps 1"), shop.folder, before=before)
    assert tuple(done.codes) == codes, done
    assert words in done.printed
    assert [path.name for path in checkpoints(out)] == ["checkpoint-4"]
    assert resume(shop.corpus, out, "--max_steps 6 --allow_changed") == 0


fault("F8-rank-killed", "one of two processes killed", "the other ends too; resumed by any number of processes", "3")(
    partial(_rank, action=lambda: os.kill(os.getpid(), signal.SIGKILL), codes=(3, -9), words="error: ")
)
fault(
    "F9-rank-hangs", "one of two processes hangs", "after an hour without a step: stacks of all threads and workers, "
    "one line", "3",
)(partial(_rank, action=lambda: time.sleep(600), codes=(3, 3), words="error: training hangs: nothing has"))  # fmt: skip


@needs_fork
def _process(shop: Shop, *, verb: str, action: Callable[[], None], codes: tuple[int, ...], words: str) -> None:
    def before() -> None:
        watchdog.LONGEST_SILENCE = 6.0
        whole = Ranks.watched

        def faulty(ranks: Ranks, batches: Any) -> Any:
            for batch in whole(ranks, batches):
                if ranks.rank == 1:
                    action()
                yield batch

        Ranks.watched = faulty  # type: ignore[method-assign]

    out = shop.folder / "out"
    done = in_two_processes([*shop.words(verb, out), "--device", "cpu"], shop.folder, before=before)
    assert tuple(done.codes) == codes, done
    assert words in done.printed
    shop.is_finished_again(verb, out)


for _verb in ASKED:
    fault(
        f"F8-{_verb}", f"one of two processes of `{_named(_verb)}` killed", "the other ends too; the same command "
        "then gives the same bytes", "3",
    )(partial(_process, verb=_verb, action=lambda: os.kill(os.getpid(), signal.SIGKILL), codes=(3, -9),
              words="error: "))  # fmt: skip
    fault(
        f"F9-{_verb}-stopped", f"one of two processes of `{_named(_verb)}` stopped", "after an hour without a sign of "
        "life: stacks of the one that waits, one line", "3",
    )(partial(_process, verb=_verb, action=lambda: os.kill(os.getpid(), signal.SIGSTOP), codes=(3, -9),
              words="error: no sign of life of process 1 for"))  # fmt: skip
    fault(
        f"F9-{_verb}-hangs", f"one of two processes of `{_named(_verb)}` hangs", "after an hour in which it computes "
        "nothing: its stacks, one line", "3",
    )(partial(_process, verb=_verb, action=lambda: time.sleep(600), codes=(3, 3),
              words="process 1: error: this process hangs: it has computed nothing for"))  # fmt: skip
elsewhere("F9-sign-of-life", "one of several processes gives no sign of life", "those that wait for it end", "3",
          "tests/inference/test_heartbeat.py::"
          "test_a_process_ends_if_it_waits_for_one_that_gives_no_sign_of_life")  # fmt: skip
elsewhere("F9-absent", "one of several processes never starts", "after half an hour the others end", "3",
          "tests/inference/test_heartbeat.py::test_a_process_ends_if_the_others_do_not_start")  # fmt: skip
elsewhere("F9-worker-hangs", "a loader worker hangs", "the same, with the worker's stack", "3",
          f"{_TRAINING}test_a_run_whose_loader_worker_hangs_ends_and_shows_where")  # fmt: skip


# -- F10 and F11: full disk, read-only ----------------------------------------------------------------------------


def _full(shop: Shop, *, verb: str) -> None:
    for number, num_bytes in enumerate((0, 3_000, 30_000)):
        out = shop.folder / f"out_{number}"
        words = shop.words(verb, out)
        with full_disk(num_bytes):
            code, line = shop.call(words)
        assert code == 3 or (code == 0 and num_bytes), line
        assert code == 0 or "File too large" in line
        shop.is_finished_again(verb, out)


for _verb in VERBS:
    fault(
        f"F10-{_verb}", f"a full disk under `{_named(_verb)}`",
        "one line that names the file; the same command then gives the same bytes", "3", is_sampled=_verb == "predict",
    )(partial(_full, verb=_verb))  # fmt: skip


@fault("F10-training", "a full disk under training", "one line; older checkpoints are whole, resuming gives the same "
       "weights", "3")  # fmt: skip
def _(shop: Shop) -> None:
    for number, num_bytes in enumerate((0, 3_000, 30_000, 70_000)):
        out = shop.folder / f"run_{number}"
        words = command(shop.corpus, out)  # the corpus is made when it is first asked for
        with full_disk(num_bytes):
            assert shop.call(words)[0] == 3
        shop.training_ends_alike(out)


@fault("F10-page", "a full disk under the page that a verb writes at its end", "a warning: the verb has done its work",
       "0")  # fmt: skip
def _(shop: Shop) -> None:
    words = shop.words("prepare", shop.folder / "out")
    assert shop.call(words)[0] == 0
    with full_disk(3_000):
        write_report(parse_args(words))
    assert "no report is written: " in shop.caplog.text and "File too large" in shop.caplog.text
    assert not (shop.folder / "out/corpus/report.html").exists()


elsewhere("F10-shared-memory", "too little shared memory (Docker)", "one line that says so", "3",
          "tests/test_main.py::test_an_error_of_the_machine_is_one_line_and_code_3")  # fmt: skip
elsewhere("F10-h5ad", "a disk that is full at any byte of an h5ad output", "one line, no crash of HDF5, nothing left",
          "3", "tests/data_utils/test_h5ad_writing.py::"
          "test_a_disk_that_is_full_at_any_byte_is_an_error_and_leaves_nothing")  # fmt: skip
elsewhere("F10-download", "a disk that fills up during a download", "named", "2",
          "tests/data_utils/test_download.py::test_a_disk_that_fills_up_on_the_way_is_named")  # fmt: skip


def _read_only(shop: Shop, *, verb: str) -> None:
    if os.geteuid() and sys.platform == "linux":
        folder = shop.folder / "mine"
        folder.mkdir(mode=0o500)
    else:  # permissions do not stop root
        folder = Path("/proc/mine")
    target = folder / "out"
    words = [*command(shop.corpus, target)] if verb == "mlm" else shop.words(verb, shop.folder / "unused")
    if verb != "mlm":
        given = Path(words[words.index("--output") + 1])
        words[words.index("--output") + 1] = str(target / given.name)
    code, line = shop.call(words)
    assert code == 2 and "cannot be written" in line


for _verb in (*VERBS, "mlm"):
    fault(
        f"F11-{_verb}", f"a place that cannot be written, for `{_named(_verb)}`",
        "refused before any work", "2", is_sampled=True,
    )(partial(_read_only, verb=_verb))  # fmt: skip


# -- F12 and F13: data that change, networks ----------------------------------------------------------------------


def _changed(shop: Shop, *, change: Callable[[Path], object]) -> None:
    own, out = Path(shutil.copytree(shop.corpus, shop.folder / "corpus")), shop.folder / "run"
    shard = Path(Corpus.open(own).paths("train")[0])
    with plant("step", 5, lambda: change(shard)):  # type: ignore[arg-type, return-value]
        code, line = shop.call(command(own, out))
    assert code == 2 and str(shard) in line
    assert not (out / "model.safetensors").exists() and checkpoints(out)


fault("F12-removed", "a shard deleted during training", "stops when it is needed again; the file is named", "2")(
    partial(_changed, change=Path.unlink)
)
fault("F12-appended", "bytes appended to a shard during training", "stops at the next save; the file is named", "2")(
    partial(_changed, change=lambda path: path.write_bytes(path.read_bytes() + b"more"))
)
fault("F12-truncated", "a shard cut off during training", "the file is named; no SIGBUS", "2")(
    partial(_changed, change=lambda path: os.truncate(path, 9000))
)
elsewhere("F12-rewritten", "a shard written again during training", "stops at the next save; the file is named", "2",
          f"{_TRAINING}test_nothing_is_saved_after_a_shard_has_changed_during_the_run")  # fmt: skip
elsewhere("F12-resume", "a shard written again before resuming", "refused; `--allow_changed` takes it", "2",
          f"{_TRAINING}test_a_run_whose_shards_were_written_again_is_not_resumed")  # fmt: skip
elsewhere("F12-copied", "shards copied: another time, the same content", "resumed, with the same weights", "0",
          f"{_TRAINING}test_a_run_is_resumed_if_its_shards_are_copies_of_the_same_content")  # fmt: skip
elsewhere("F12-evaluate", "cells of a run changed before it is evaluated", "a warning; they are compared with the "
          "training cells", "0", "tests/inference/test_evaluate.py::"
          "test_cells_that_changed_since_training_are_not_the_run_s_own_any_more")  # fmt: skip


def _replaced(shop: Shop, *, verb: str) -> None:
    """Replace the cells by the same ones in another order while the first batch is computed."""
    cells, out = Path(shutil.copy(shop.cells, shop.folder)), shop.folder / "out"
    whole = Ranks.watched

    def replacing(ranks: Ranks, batches: Any) -> Any:
        for batch in whole(ranks, batches):
            ad.read_h5ad(cells)[::-1].copy().write_h5ad(shop.folder / "new.h5ad")
            os.replace(shop.folder / "new.h5ad", cells)
            yield batch

    with patch.object(Ranks, "watched", replacing):
        code, line = shop.call(shop.words(verb, out, cells=cells))
    assert code == 2 and f"{cells} changed while it was read" in line
    assert not [path for path in out.iterdir() if not path.name.startswith(".")]


for _verb in ASKED:
    fault(
        f"F12-{_verb}", f"cells replaced while `{_named(_verb)}` reads them", "refused, the file is named", "2",
        is_sampled=_verb == "predict",
    )(partial(_replaced, verb=_verb))  # fmt: skip


@pytest.fixture
def quick_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A bad server, short waits between tries, and a cache of its own."""
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(remote, "_fetched", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with serving(BadHandler) as web:
        yield web


def _network(shop: Shop, *, verb: str, manner: str) -> None:
    web = shop.request.getfixturevalue("quick_network")
    web.files["few.h5ad"] = shop.cells.read_bytes()
    words = shop.words(verb, shop.folder / "out", cells=f"{web.url}/{manner}/few.h5ad")
    code, line = shop.call(words)
    if manner == "flaky":
        assert code == 0, line
    else:
        assert code == 2 and f"{web.url}/{manner}/few.h5ad" in line
        assert not list((shop.folder / "out").rglob("*.h5ad"))
    assert not list((shop.folder / "xdg").rglob("*.h5ad")) or manner == "flaky"


for _verb in [name for name, words in VERBS.items() if "{cells}" in words]:
    fault(
        f"F13-{_verb}", f"a server that drops connections, is busy and sends half a file, for `{_named(_verb)}`",
        "tried again, and continued at the byte where it broke", "0",
    )(partial(_network, verb=_verb, manner="flaky"))  # fmt: skip
    fault(
        f"F13-{_verb}-busy", f"a server that is always busy, for `{_named(_verb)}`",
        "after some tries the address is named; the cache holds no part that passes for a file", "2",
        is_sampled=_verb == "predict",
    )(partial(_network, verb=_verb, manner="busy"))  # fmt: skip
_REMOTE = "tests/data_utils/test_remote.py::"
elsewhere("F13-cut-short", "a fetch that was cut short", "continued by the next run", "0",
          f"{_REMOTE}test_a_fetch_that_was_cut_short_is_resumed_by_the_next_run")  # fmt: skip
elsewhere("F13-changes", "a file of a server that changes during a run", "stops the run", "2",
          f"{_REMOTE}test_a_file_that_changes_during_the_run_stops_it")  # fmt: skip
elsewhere("F13-away", "a network that goes away after the fetch", "no effect", "0",
          f"{_REMOTE}test_a_network_that_goes_away_does_not_stop_a_run_that_has_the_file")  # fmt: skip
elsewhere("F13-checksum", "a download with a wrong checksum", "deleted, the file is named", "2",
          "tests/data_utils/test_download.py::test_a_right_checksum_passes_and_a_wrong_one_drops_the_file")  # fmt: skip


# -- F14 to F20 ---------------------------------------------------------------------------------------------------

elsewhere("F14-nan", "a gradient that is not a number", "stops before it is applied; the cells are named", "3",
          f"{_TRAINING}test_a_step_that_is_no_number_stops_the_run_before_it_is_applied")  # fmt: skip
elsewhere("F15-batch", "memory that does not hold a batch", "one line: the batch, the largest that fitted, what to "
          "lower", "2", f"{_TRAINING}test_memory_of_the_cpu_that_is_full_gets_the_same_advice")  # fmt: skip


@needs_fork
def _short_of_memory(shop: Shop) -> None:
    def run(words: list[str], num_bytes: int) -> None:
        limit = psutil.Process().memory_info().vms + num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.exit(main(words))

    for number, num_bytes in enumerate((1 << 20, 1 << 23, 1 << 25)):
        words = shop.words("predict", shop.folder / f"out_{number}")
        process = start(partial(run, words, num_bytes), output=shop.folder / "said")
        process.join(timeout=60)
        said = (shop.folder / "said").read_text()
        assert process.exitcode in (0, 3), said
        assert "Traceback" not in said
        if process.exitcode:
            assert not list((shop.folder / f"out_{number}").iterdir())


fault("F15-limit", "no memory left (`ulimit -v`) for `predict`", "one line; no file is blamed, nothing is left", "3")(
    _short_of_memory
)
elsewhere("F16-finished", "a finished run resumed", "says so and does nothing", "0",
          f"{_TRAIN}test_resuming_a_finished_run_trains_no_further_step")  # fmt: skip
elsewhere("F17-settings", "resumed with other settings", "refused, listing them; `--allow_changed` takes those "
          "that fit the weights", "2", f"{_TRAINING}test_other_settings_on_resuming_are_refused")  # fmt: skip
elsewhere("F17-shape", "resumed with another model", "refused", "2",
          f"{_TRAIN}test_a_checkpoint_of_another_shape_is_refused")  # fmt: skip
elsewhere("F17-damaged-settings", "`run.yaml` empty or damaged", "refused", "2",
          f"{_TRAINING}test_empty_settings_of_a_killed_run_are_named")  # fmt: skip
elsewhere("F18-rows", "`predict` by several processes or interrupted", "every row once, in its place (F1-predict: the "
          "same command starts over)", "0",
          "tests/inference/test_streaming.py::test_several_processes_write_what_one_writes")  # fmt: skip


@fault("F19-bare", "locale C, no HOME, closed stdin, another time zone", "no effect", "0")
def _(shop: Shop) -> None:
    words = [sys.executable, "-m", "perturbgene.main", *shop.words("predict", shop.folder / "out"), "--no_report"]
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "Pacific/Kiritimati", "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(Path(__file__).parents[1])}  # fmt: skip
    done = subprocess.run(["bash", "-c", 'exec "$@" <&-', "bash", *words], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert sums(shop.folder / "out") == shop.undisturbed("predict")


@fault("F19-clock", "a clock that is set back an hour again and again during training", "the same weights", "0")
def _(shop: Shop) -> None:
    hours = itertools.count()
    with patch.object(time, "time", lambda: 1e9 - 3600 * next(hours)):
        assert main(command(shop.corpus, shop.folder / "run")) == 0
    assert next(hours) > 10
    assert (shop.folder / "run/model.safetensors").read_bytes() == shop.whole


@fault("F19-stdout", "closed stdout and stderr", "the output is written all the same", "0")
def _(shop: Shop) -> None:
    words = [sys.executable, "-m", "perturbgene.main", *shop.words("predict", shop.folder / "out"), "--no_report"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(["bash", "-c", 'exec "$@" >&- 2>&-', "bash", *words], env=environment)
    assert done.returncode == 0
    assert sums(shop.folder / "out") == shop.undisturbed("predict")


elsewhere("F19-reader-gone", "the reader of messages goes away (ssh, tee)", "the exit code stays", "as without",
          "tests/test_main.py::test_messages_that_nobody_reads_change_no_exit_code")  # fmt: skip
elsewhere("F19-pipe", "`perturbgene mlm -h` into `head`", "quiet", "141",
          "tests/test_main.py::test_a_closed_pipe_is_quiet")  # fmt: skip
elsewhere(
    "F20-fork", "a file opened before a fork", "opened again in the child", "0",
    "tests/data_utils/test_opening.py::test_a_file_opened_before_a_fork_is_opened_again_in_the_child",
)  # fmt: skip


@pytest.mark.parametrize("fault", params(FAULTS))
def test_faults(fault: Fault, shop: Shop) -> None:
    assert fault.check
    fault.check(shop)
