"""`SafeTrainer`: transformers' Trainer, except that what it leaves on disk is whole at every moment.

Owns how checkpoints and final weights reach the disk and the stop on a signal; leaves what counts as whole to
`checkpoint`, and data and losses to `ShardedTrainer`.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from perturbgene import checkpoint as checkpoints
from perturbgene.errors import RunFailedError
from perturbgene.stopping import StopOnSignal

#: Final files whose presence tells other programs that a run is finished, in the order in which they appear.
_LAST_FILES = ("config.json", "model.safetensors", TRAINER_STATE_NAME)


class SafeTrainer(Trainer):
    """A Trainer whose checkpoints are whole or not there, and which stops in good order.

    Attributes:
        stop: Knows the signal that ended training, if one did.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unfinished: Path | None = None
        self.stop = StopOnSignal()
        self.add_callback(self.stop)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(str(self.args.output_dir))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and give the signal handlers back whatever happens."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.stop.give_back()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished) if self._unfinished else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let transformers write beside, then seal, rename, and delete what is too old."""
        step = self.state.global_step
        self._unfinished = checkpoints.unfinished_folder(self.folder, step)
        written, final = self._unfinished / f"checkpoint-{step}", self.folder / f"checkpoint-{step}"
        try:
            super()._save_checkpoint(model, trial)
            self._finish_checkpoint(written, final)
        except Exception as error:  # of the system, torch or safetensors: a full disk speaks in many ways
            shutil.rmtree(self._unfinished, ignore_errors=True)
            raise RunFailedError(
                f"checkpoint {final} could not be written ({_first_line(error)}; {_free_space(self.folder)} free). "
                "Older checkpoints are whole: make room and go on with --resume_from_checkpoint."
            ) from error
        finally:
            self._unfinished = None

    def _finish_checkpoint(self, written: Path, final: Path) -> None:
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
        self.accelerator.wait_for_everyone()  # each rank has written its random states
        if self.args.should_save:
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            checkpoints.seal(written, step=self.state.global_step, world_size=self.args.world_size)
            checkpoints.commit(written, final)
            self._rotate(self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _rotate(self, keep: int | None) -> None:
        checkpoints.rotate(self.folder, keep=keep, best=self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save weights, configuration and tokenizer, but not the arguments: a pickle that may hold an access token."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            Path(output_dir or self.folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push nothing before the run is finished: a push copies half-trained weights over the run folder."""

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """End training; transformers would now delete the newest checkpoint in favour of the best one."""
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        is_best_wanted, self.args.load_best_model_at_end = self.args.load_best_model_at_end, self._wants_best()
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = keep, is_best_wanted

    def _wants_best(self) -> bool:
        return bool(self.args.load_best_model_at_end) and not self.stop.stopped_by

    # -- the finished run -----------------------------------------------------------------------------------------

    def is_delivered(self) -> bool:
        """True when the run folder already holds the weights after all steps of this run."""
        if not all((self.folder / name).is_file() for name in _LAST_FILES):
            return False
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return TrainerState.load_from_json(str(self.folder / TRAINER_STATE_NAME)).global_step >= max_steps

    def withdraw(self) -> None:
        """Say that the run is not finished (any more): it is about to be trained."""
        (self.folder / TRAINER_STATE_NAME).unlink(missing_ok=True)

    def deliver(self, write_more: Callable[[Path], None]) -> None:
        """Write final weights, settings, tokenizer and state into the run folder, each file at once.

        Args:
            write_more: Called on the first rank with the folder in which files wait for their rename, to add some.

        Raises:
            RunFailedError: They cannot be written.
        """
        waiting = self.folder / "tmp-final"
        try:
            self.save_model(str(waiting), _internal_call=True)  # by all ranks: weights may be spread over them
            if self.args.should_save:
                self.state.save_to_json(str(waiting / TRAINER_STATE_NAME))
                write_more(waiting)
                checkpoints.move_files(waiting, self.folder, last=_LAST_FILES)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(waiting, ignore_errors=True)
            raise RunFailedError(
                f"the final weights could not be written to {self.folder} ({_first_line(error)}; "
                f"{_free_space(self.folder)} free). Make room and finish with --resume_from_checkpoint."
            ) from error
        if self.args.should_save:
            self._rotate(self.args.save_total_limit)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB"
