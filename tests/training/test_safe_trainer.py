"""Killed at any moment, a run goes on from its last checkpoint and ends with the weights of an undisturbed run."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from unittest.mock import patch

import h5py
import pytest
import torch
from transformers import Trainer, TrainerCallback

from perturbgene.configs import parse_args
from perturbgene.corpus.manifest import Corpus
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError
from perturbgene.main import main
from perturbgene.sharded_trainer import ShardedTrainer
from perturbgene.training import watchdog
from perturbgene.training.callbacks import WithCells
from perturbgene.training.train import run_mlm
from tests.faults import Killed, die, plant
from tests.forked import needs_fork, start
from tests.small_training import STEPS, command, raise_killed, resume


@pytest.fixture
def corpus(training_corpus: Path) -> Path:
    """The shared corpus; what rewrites shards works on a copy."""
    return training_corpus


@pytest.fixture
def undisturbed(whole_weights: bytes) -> bytes:
    return whole_weights


WORKERS = "--dataloader_num_workers 2"


def log_of(run: Path) -> list[tuple[int, float]]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


FAULTS = [("save:optimizer", 4), ("save:manifest", 8), ("step", 10), ("rotate", 12), ("deliver", 14)]


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_weights_and_log(
    corpus: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    """Each kill at another phase; what is on disk then is what `kill -9` leaves."""
    out, more = tmp_path / "run", WORKERS
    for phase, step in FAULTS:
        with pytest.raises(Killed), plant(phase, step, raise_killed):
            main(command(corpus, out, more))
        more = f"--resume_from_checkpoint {WORKERS}"
    assert resume(corpus, out, WORKERS) == 0
    assert (out / "model.safetensors").read_bytes() == undisturbed
    assert [step for step, _ in log_of(out)] == list(range(1, STEPS + 1))
    left = [path.name for path in [*out.glob("*checkpoint*"), *out.glob(".*")]]
    assert len(left) == 2  # the newest and the best, and nothing half-done
    assert "checkpoint-14" in left


@needs_fork
def test_a_process_killed_while_it_writes_a_checkpoint_leaves_a_run_that_goes_on(
    corpus: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    """The real thing: the lock stays behind, and the process's loader workers lose their parent."""
    out = tmp_path / "run"

    def train_and_die() -> None:
        with plant("save:optimizer", 8, die):
            main(command(corpus, out, WORKERS))

    process = start(train_and_die)
    process.join(timeout=200)
    assert process.exitcode == -signal.SIGKILL
    assert (out / ".lock").exists()
    assert (out / ".checkpoint-8.partial" / "written_by_perturbgene").exists()
    assert resume(corpus, out) == 0
    assert (out / "model.safetensors").read_bytes() == undisturbed


def test_a_killed_run_that_samples_by_label_ends_with_the_same_weights(corpus: Path, tmp_path: Path) -> None:
    whole, out, sampled = tmp_path / "whole", tmp_path / "run", "--sample_by cell_type"
    assert main(command(corpus, whole, sampled)) == 0
    with pytest.raises(Killed), plant("step", 10, raise_killed):
        main(command(corpus, out, sampled))
    assert resume(corpus, out, sampled) == 0
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="sample_by was cell_type, is None"):
        run_mlm(parse_args([*command(corpus, out), "--resume_from_checkpoint"]))  # type: ignore[arg-type]


def test_a_torn_newest_checkpoint_is_set_aside_and_the_one_before_is_used(
    corpus: Path, undisturbed: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed), plant("step", 10, raise_killed):
        main(command(corpus, out))
    weights = out / "checkpoint-8" / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    assert resume(corpus, out) == 0
    assert "checkpoint-8 cannot be used: model.safetensors is damaged" in caplog.text
    assert (out / "model.safetensors").read_bytes() == undisturbed
    assert (out / "checkpoint-8.incomplete").is_dir()


def test_a_torn_checkpoint_given_by_name_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed), plant("step", 5, raise_killed):
        main(command(corpus, out))
    (out / "checkpoint-4" / "optimizer.pt").unlink()
    assert resume(corpus, out, f"{out}/checkpoint-4") == 2
    assert "checkpoint-4 cannot be used: optimizer.pt is missing" in capsys.readouterr().err


class SignalAt(TrainerCallback):
    """Sends this process a signal during a step."""

    number, step = signal.SIGTERM, 6

    def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == self.step - 1:  # type: ignore[attr-defined]
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("name", "step", "code"), [("SIGTERM", 3, 143), ("SIGUSR1", 6, 138), ("SIGINT", 8, 130), ("SIGHUP", 3, 129)]
)  # in the midst of an epoch, at its end, at a step that is saved anyway
def test_a_signal_ends_the_run_after_its_step_with_everything_saved(
    name: str, step: int, code: int, corpus: Path, undisturbed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    number = getattr(signal, name)
    if number == getattr(signal, "SIGHUP", None):
        signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    out, before = tmp_path / "run", signal.getsignal(number)
    monkeypatch.setattr(SignalAt, "number", getattr(signal, name))
    monkeypatch.setattr(SignalAt, "step", step)
    make = ShardedTrainer.__init__

    def make_and_add(trainer: ShardedTrainer, *args: object, **kwargs: object) -> None:
        make(trainer, *args, **kwargs)
        trainer.add_callback(SignalAt())

    with monkeypatch.context() as patched:
        patched.setattr(ShardedTrainer, "__init__", make_and_add)
        assert main(command(corpus, out)) == code
    message = capsys.readouterr().err
    assert f"stopped by {name} after step {step} of {STEPS}" in message
    assert "with --resume_from_checkpoint continues" in message
    assert signal.getsignal(getattr(signal, name)) is before
    assert not (out / ".lock").exists()
    assert resume(corpus, out) == 0
    assert (out / "model.safetensors").read_bytes() == undisturbed


def test_a_full_disk_gets_one_line_and_leaves_older_checkpoints_whole(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"

    def full() -> None:
        raise OSError(28, "No space left on device")

    with plant("save:optimizer", 8, full):
        assert main(command(corpus, out)) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: checkpoint")
    assert "No space left on device" in error
    assert sorted(path.name for path in out.glob("*checkpoint*")) == ["checkpoint-4"]


@pytest.mark.parametrize(("change", "message"), [("--learning_rate 1e-3", "learning_rate was 0.003, is 0.001")])
def test_other_settings_on_resuming_are_refused(
    change: str, message: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed), plant("step", 5, raise_killed):
        main(command(corpus, out))
    assert resume(corpus, out, change) == 2
    assert message in capsys.readouterr().err


def test_empty_settings_of_a_killed_run_are_named(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed), plant("step", 5, raise_killed):
        main(command(corpus, out))
    (out / "run.yaml").write_text("")
    assert resume(corpus, out) == 2
    assert f"{out}/run.yaml is empty or damaged" in capsys.readouterr().err


def rewrite(corpus: Path, *, order: int) -> Path:
    """Write the values of the first training shard in another order, into the same bytes of the file."""
    path = Path(Corpus.open(corpus).paths("train")[0])
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        values, start = file["X/data"][:], file["X/data"].id.get_offset()
    content[start : start + values.nbytes] = values[::order].tobytes()
    path.write_bytes(content)
    return path


def test_a_run_whose_shards_were_written_again_is_not_resumed(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, out = Path(shutil.copytree(corpus, tmp_path / "corpus")), tmp_path / "run"
    with pytest.raises(Killed), plant("step", 5, raise_killed):
        main(command(own, out))
    shard = rewrite(own, order=-1)
    assert resume(own, out) == 2
    assert f"{shard} changed since the run began: its content is another" in capsys.readouterr().err
    assert main(command(own, tmp_path / "new")) == 2
    assert f"{shard} changed since `prepare` wrote it" in capsys.readouterr().err
    assert resume(own, out, "--allow_changed --max_steps 5") == 0


def test_a_run_is_resumed_if_its_shards_are_copies_of_the_same_content(
    corpus: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    own, out = Path(shutil.copytree(corpus, tmp_path / "corpus")), tmp_path / "run"
    with pytest.raises(Killed), plant("step", 5, raise_killed):
        main(command(own, out))
    rewrite(own, order=1)
    assert resume(own, out) == 0
    assert (out / "model.safetensors").read_bytes() == undisturbed


def test_nothing_is_saved_after_a_shard_has_changed_during_the_run(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, out = Path(shutil.copytree(corpus, tmp_path / "corpus")), tmp_path / "run"
    with plant("step", 5, lambda: rewrite(own, order=-1)):
        assert main(command(own, out)) == 2
    assert "changed while the run read it: its content is another" in capsys.readouterr().err
    assert [path.name for path in sorted(out.glob("checkpoint-*"))] == ["checkpoint-4"]
    assert not (out / "model.safetensors").exists()


def test_no_pickle_of_the_arguments_is_left(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(command(corpus, out, "--max_steps 4")) == 0
    assert not list(out.rglob("training_args.bin"))


def test_a_step_that_is_no_number_stops_the_run_before_it_is_applied(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "run", ShardedTrainer.compute_loss

    def broken(trainer: ShardedTrainer, *args: object, **kwargs: object) -> object:
        loss = whole(trainer, *args, **kwargs)
        return loss * float("nan") if trainer.state.global_step == 5 else loss

    with monkeypatch.context() as patched:
        patched.setattr(ShardedTrainer, "compute_loss", broken)
        assert main(command(corpus, out)) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: step 6 gave a gradient of norm nan")
    assert "shard_00000.h5ad row" in error
    assert f"Last good checkpoint: {out}/checkpoint-4" in error
    assert "Its 16 cells: " in error


def test_a_device_whose_memory_is_full_hears_of_the_batch_that_fitted(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with plant("step", 2, full):
        assert main(command(corpus, tmp_path / "run")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"does not hold a batch of \d+ tokens; the largest that fitted had (\d+). .*_batch \1,", error)
    assert "--resume_from_checkpoint" not in error  # there is no checkpoint yet
    with plant("step", 9, full):
        assert main(command(corpus, tmp_path / "other")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"Continue from {tmp_path}/other/checkpoint-8 with --resume_from_checkpoint --allow_changed." in error


def test_memory_of_the_cpu_that_is_full_gets_the_same_advice(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with plant("step", 2, lambda: torch.empty(1 << 50, dtype=torch.uint8)):  # type: ignore[arg-type, return-value]
        assert main(command(corpus, tmp_path / "run")) == 2
    assert "the memory of cpu does not hold a batch of" in capsys.readouterr().err.splitlines()[-1]


def test_memory_that_ends_before_the_first_batch_is_the_machines_fault(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> torch.Tensor:
        return torch.empty(1 << 50, dtype=torch.uint8)

    with patch.object(ShardedTrainer, "get_batch_samples", full):
        assert main(command(corpus, tmp_path / "run", "--direct_path never")) == 3
    assert "the memory of cpu ran out before the first batch. Free memory, or choose" in capsys.readouterr().err


@needs_fork
def test_a_run_whose_loader_worker_hangs_ends_and_shows_where(corpus: Path, tmp_path: Path) -> None:
    whole, out = WithCells.collate_block, tmp_path / "run"

    def stuck_in_a_fetch(collator: WithCells, block: TokenBlock) -> dict[str, object]:
        if block.cells_n.min() < 4 and (out / "checkpoint-4").exists():
            time.sleep(600)
        return whole(collator, block)

    def train() -> None:
        with patch.object(WithCells, "collate_block", stuck_in_a_fetch), patch.object(watchdog, "LONGEST_SILENCE", 4):
            main(command(corpus, out, WORKERS))

    process = start(train, output=tmp_path / "said")
    process.join(timeout=100)
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 3, said
    assert "Loader worker" in said and "in stuck_in_a_fetch" in said and "in get_batch_samples" in said
    assert re.search(r"error: training hangs: nothing has happened for 0.0667 minutes after step \d+\. Above", said)
    assert resume(corpus, out, "--max_steps 5 --allow_changed") == 0


def test_a_loader_worker_that_is_killed_while_a_checkpoint_is_written_is_named(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed() -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    with plant("save:optimizer", 4, killed):
        assert main(command(corpus, tmp_path / "run")) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: mlm stopped: DataLoader worker (pid 7) is killed by signal: Killed. Look for")
    assert "continue with --resume_from_checkpoint." in error
    assert not list((tmp_path / "run").glob(".*checkpoint*"))


def test_a_loader_worker_that_is_killed_while_it_hands_over_a_batch_is_no_reader_that_went_away(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with patch.object(Trainer, "get_batch_samples", side_effect=BrokenPipeError(32, "Broken pipe")):
        assert main(command(corpus, tmp_path / "run", WORKERS)) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: mlm stopped: a DataLoader worker (pid unknown) exited unexpectedly. Look for")


def test_an_end_of_file_in_the_cells_is_not_taken_for_a_killed_worker(corpus: Path, tmp_path: Path) -> None:
    broken = EOFError("Caught EOFError in DataLoader worker process 0.\nTraceback ...\nEOFError: the shard ends")
    with patch.object(Trainer, "get_batch_samples", side_effect=broken), pytest.raises(EOFError):
        main(command(corpus, tmp_path / "run", WORKERS))


@needs_fork
def test_loader_workers_that_are_left_do_not_keep_a_run_from_ending(corpus: Path, tmp_path: Path) -> None:
    kept = []  # an error, and so the workers' loader, which would end them

    def train() -> None:
        with plant("step", 1, raise_killed):
            try:
                main(command(corpus, tmp_path / "run", WORKERS))
            except Killed as error:
                kept.append(error)
                assert multiprocessing.active_children()
                sys.exit(7)

    process = start(train, output=tmp_path / "said")
    process.join(timeout=60)
    was_stuck = process.is_alive()
    process.kill()
    assert not was_stuck and process.exitcode == 7, (tmp_path / "said").read_text()


def test_each_log_holds_speed_and_memory_and_the_last_one_is_printed(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    with caplog.at_level("INFO", logger="perturbgene"):
        assert main(command(corpus, out, "--max_steps 4")) == 0
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    first = next(entry for entry in history if "loss" in entry)
    wanted = {"grad_norm", "learning_rate", "loss_genes", "loss_phenotypes", "cells_per_second", "tokens_per_second"}
    assert wanted | {"memory_gb"} <= set(first)
    assert re.search(r"step 4/4 · epoch 0.67 · loss [\d.]+ \(phenotypes [\d.]+, genes [\d.]+\) · lr", caplog.text)
