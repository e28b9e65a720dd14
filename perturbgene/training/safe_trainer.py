"""`SafeTrainer`: transformers' Trainer, except that it can be killed, watched and trusted.

Owns how checkpoints and final weights reach the disk, the stop on a signal or on a step that is no number, and averaged
weights; leaves what counts as whole to `checkpoint`, counting to `watch`, and data and losses to `ShardedTrainer`.
"""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

from perturbgene.errors import InputError, RunFailedError, listed
from perturbgene.training import checkpoints
from perturbgene.training.callbacks import Lines, Watch
from perturbgene.training.ema import Ema, FollowWeights
from perturbgene.training.stopping import StopOnSignal

#: Final files whose presence tells other programs that a run is finished, in the order in which they appear.
_LAST_FILES = ("config.json", "model.safetensors", TRAINER_STATE_NAME)


class SafeTrainer(Trainer):
    """A Trainer whose checkpoints are whole or not there, and which stops in good order.

    Args:
        ema_decay: Averages weights with this decay, evaluates and delivers the average; None trains as usual.
        *args, **kwargs: As for `transformers.Trainer`.

    Attributes:
        stop: Knows the signal that ended training, if one did.
        watch: Counts what goes through the model.
    """

    def __init__(self, *args: Any, ema_decay: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unfinished: Path | None = None
        self._losses: list[torch.Tensor] = []
        self._doubt: _Doubt | None = None
        self.stop = StopOnSignal()
        self.add_callback(self.stop)
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        self.add_callback(Lines())
        if ema_decay and self.is_fsdp_enabled:
            raise InputError("ema_decay needs whole weights on every process, which FSDP cuts. Remove --ema_decay.")
        self.ema = Ema(self.accelerator.unwrap_model(self.model), ema_decay) if ema_decay else None
        if self.ema is not None:
            self.add_callback(FollowWeights(self.ema))
        self.watch = Watch(
            self.accelerator.unwrap_model(self.model).config,
            self.args.device,
            torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32,
            self.args.world_size,
            self._sum_numbers,
        )

    def _sum_numbers(self, numbers: list[float]) -> list[float]:
        if self.args.world_size == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.args.device)
        return self.accelerator.reduce(tensor, reduction="sum").tolist()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(str(self.args.output_dir))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and give the signal handlers back whatever happens."""
        try:
            return super().train(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise InputError(self._memory_advice()) from error
        finally:
            self.stop.give_back()

    # -- every step -----------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Fetch the batches of a step, and count them."""
        if self.watch.is_idle:
            self.watch.begin(self.state.global_step)
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.watch.see(batches)
        self._losses = []
        return batches, num_items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Train on one batch, and keep its loss in case that something is wrong with it."""
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm; stop before a step is applied whose norm is no number.

        A GPU is not waited for: its optimizer leaves such a step out by itself, and it is reported one step later.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        self._settle_doubt()
        if self.args.fp16:  # the scaler of gradients expects such steps, and leaves them out
            return norm
        self._doubt = _Doubt(norm, self.state.global_step + 1, self._losses, self.watch.cells)
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        is_fused = all(group.get("fused") for group in optimizer.param_groups)
        if isinstance(norm, torch.Tensor) and norm.device.type != "cpu" and is_fused:
            optimizer.found_inf = (~torch.isfinite(norm)).float()
        else:
            self._settle_doubt()
        return norm

    def _settle_doubt(self) -> None:
        doubt, self._doubt = self._doubt, None
        if doubt is not None and not math.isfinite(float(doubt.norm)):
            raise RunFailedError(self._report(doubt))

    def _report(self, doubt: "_Doubt") -> str:
        """Write down which cells made a step no number; return a line about it."""
        losses = [float(loss) for loss in doubt.losses]
        numbers = [int(number) for cells_2n in doubt.cells for number in cells_2n[0]]
        places = self.places_of(np.array(numbers, dtype=np.int64))
        facts = {
            "step": doubt.step, "rank": self.args.process_index, "grad_norm": str(float(doubt.norm)),
            "loss_of_each_batch": [str(loss) for loss in losses],
            "cells": [{"cell": number, "place": place} for number, place in zip(numbers, places, strict=True)],
        }  # fmt: skip
        name = f"nan_report{f'_rank{self.args.process_index}' if self.args.process_index else ''}.json"
        checkpoints.replace_text(self.folder / name, json.dumps(facts, indent=1))
        good = checkpoints.newest_sealed(self.folder)
        return (
            f"step {doubt.step} gave a gradient of norm {float(doubt.norm)} (loss of its batches: "
            f"{', '.join(f'{loss:.4g}' for loss in losses)}); it was not applied. Its {len(numbers)} cells, "
            f"{listed(places, most=2)}, stand in {self.folder / name}. Last good checkpoint: {good or 'none'}. Look at "
            "these cells, or lower --learning_rate."
        )

    def places_of(self, cells_n: np.ndarray) -> list[str]:
        """Say where cells stand; what knows the files says more."""
        return [f"cell {number}" for number in cells_n]

    def _memory_advice(self) -> str:
        wanted = sum(int(cells_2n[1].sum()) for cells_2n in self.watch.cells) // max(1, len(self.watch.cells))
        most = self.watch.most_tokens
        fits = f"the largest that fitted had {most:,}" if most else "none has fitted yet"
        advice = f"Give --tokens_per_batch {most}" if most else "Lower --tokens_per_batch"
        good = checkpoints.newest_sealed(self.folder)
        go_on = f" Go on from {good} with --resume_from_checkpoint --allow_changed." if good else ""
        return (
            f"the memory of {self.args.device} does not hold a batch of {wanted:,} tokens; {fits}. {advice}, or a "
            f"smaller --per_device_train_batch_size with more --gradient_accumulation_steps.{go_on}"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add speed, memory and time left; stop on a loss that is no number."""
        if "loss" in logs:
            self._settle_doubt()
            self.watch.note_loss(logs["loss"], self.state.global_step)
            logs |= self.watch.rates(self.state.global_step, self.state.max_steps)
        super().log(logs, *args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch.paused():
            return super()._evaluate(*args, **kwargs)

    # -- averaged weights -----------------------------------------------------------------------------------------

    def averaged_weights(self) -> AbstractContextManager[None]:
        """Let the model hold the averaged weights while training is under way, if there are any."""
        return self.ema.swapped_in() if self.ema is not None and self.is_in_train else nullcontext()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        wanted = [dict(group) for group in self._param_groups] if checkpoint is not None else []
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, now in zip(self._param_groups, wanted, strict=bool(wanted)):
            _take_settings(group, now)
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if wanted and hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [now["initial_lr"] for now in wanted]
        if self.ema is not None and checkpoint is not None:
            self.ema.load(Path(checkpoint))

    @property
    def _param_groups(self) -> list[dict[str, Any]]:
        optimizer: Any = self.optimizer
        return list(optimizer.param_groups)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished) if self._unfinished else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let transformers write beside, then seal, rename, and delete what is too old."""
        step = self.state.global_step
        self._unfinished = checkpoints.unfinished_folder(self.folder, step)
        written, final = self._unfinished / f"checkpoint-{step}", self.folder / f"checkpoint-{step}"
        self._settle_doubt()
        try:
            with self.watch.paused():
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
            if self.ema is not None:
                self.ema.save(written)
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
        self._settle_doubt()
        try:
            done = super()._finalize_training(*args, **kwargs)
            if self.ema is not None and not self.stop.stopped_by:
                best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
                if best:
                    self.ema.load(Path(best))
                self.ema.copy_to_model()
            return done
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


@dataclass(frozen=True)
class _Doubt:
    """A step that may be no number, with what is needed to report it."""

    norm: Any
    step: int
    losses: list[torch.Tensor]
    cells: list[np.ndarray]


def _take_settings(group: dict[str, Any], now: dict[str, Any]) -> None:
    """Give a loaded group of parameters the settings of now: a checkpoint brings those of then along.

    Args:
        group: What was loaded; its learning rate is where the schedule stands, and is scaled.
        now: What the optimizer was made with.
    """
    group |= {name: now[name] for name in ("weight_decay", "betas", "eps") if name in group and name in now}
    then, wanted = group.get("initial_lr"), now.get("initial_lr")
    if then != wanted and then and wanted is not None:
        group |= {"lr": group["lr"] * wanted / then, "initial_lr": wanted}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB"
