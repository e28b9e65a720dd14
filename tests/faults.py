"""Faults at chosen moments of a training run: `plant("save:optimizer", 6, action)` acts while checkpoint 6 is written.

Owns where the moments are, and a disk that is full; the action is killing the process (`die`) or raising.
"""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

#: Phase -> (module, attribute) of the function at whose start the fault acts.
PHASES = {
    "step": ("perturbgene.sharded_trainer.ShardedTrainer", "training_step"),
    "save:model": ("perturbgene.sharded_trainer.ShardedTrainer", "_save"),
    "save:optimizer": ("perturbgene.sharded_trainer.ShardedTrainer", "_save_optimizer_and_scheduler"),
    "save:rng": ("perturbgene.sharded_trainer.ShardedTrainer", "_save_rng_state"),
    "save:manifest": ("perturbgene.training.checkpoints", "seal"),
    "commit": ("perturbgene.training.checkpoints", "commit"),
    "rotate": ("perturbgene.training.checkpoints", "rotate"),
    "deliver": ("perturbgene.training.checkpoints", "move_files"),
}


class Killed(BaseException):
    """What a test has instead of `kill -9`: nothing catches it, and what is on disk stays as it is."""


def die() -> None:
    """End this process as the kernel would."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Let every file of this process have at most so many bytes: the next byte fails, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _half(folder: Path, phase: str) -> None:
    """Leave what the interrupted function would have left: a file cut off in the middle."""
    if phase in ("save:model", "save:optimizer"):
        folder.mkdir(parents=True, exist_ok=True)
        name = "model.safetensors" if phase == "save:model" else "optimizer.pt"
        (folder / name).write_bytes(b"half")


@contextmanager
def plant(phase: str, step: int, action: Callable[[], None]) -> Iterator[None]:
    """Let `action` happen at a phase once `step` steps are done."""
    import importlib

    from perturbgene.sharded_trainer import ShardedTrainer
    from perturbgene.training.checkpoints import checkpoints

    owner_name, name = PHASES[phase]
    module, _, kind = owner_name.rpartition(".")
    owner = getattr(importlib.import_module(module), kind) if kind[0].isupper() else importlib.import_module(owner_name)
    whole, trainers = getattr(owner, name), []

    def note(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        trainers.append(trainer)
        return inner(trainer, *args, **kwargs)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        if trainers and trainers[-1].state.global_step == step:
            _half(Path(args[1]) if phase.startswith("save:") and phase != "save:manifest" else Path(), phase)
            if phase == "rotate":  # one file is gone already
                (checkpoints(args[0])[0] / "trainer_state.json").unlink(missing_ok=True)
            if phase == "deliver":  # the weights are new, what belongs to them is not
                os.replace(args[0] / "model.safetensors", args[1] / "model.safetensors")
            action()
        return whole(*args, **kwargs)

    inner = ShardedTrainer.get_batch_samples
    with patch.object(ShardedTrainer, "get_batch_samples", note), patch.object(owner, name, faulty):
        yield
