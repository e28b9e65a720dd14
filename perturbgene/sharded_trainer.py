"""`ShardedTrainer`: transformers' Trainer, except that each process reads its own rows and counts its own tokens.

Owns the overrides that streaming, two-part losses, whole checkpoints and resuming without replay need; leaves the files
of checkpoints to `training.checkpoints`, signals and the terminal to `training.callbacks`, and the loop and the
optimizer to transformers and accelerate.
"""

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput

from perturbgene.data_utils.data_collators import IGNORED
from perturbgene.data_utils.iterable_ann_dataset import BlockCollator, IterableAnnDataset
from perturbgene.errors import InputError, RunFailedError, did_you_mean, is_out_of_memory, listed
from perturbgene.eval_utils import Evaluator, run_evaluator
from perturbgene.files import damaged_file, partial_path
from perturbgene.heap import return_if_grown
from perturbgene.training import checkpoints
from perturbgene.training.callbacks import (
    POSITION_KEY,
    KeepPosition,
    Progress,
    Speed,
    StopEarly,
    StopOnSignal,
    WithCells,
    outlive_signals,
)
from perturbgene.training.trainable import LowRank
from perturbgene.training.transfer import quiet
from perturbgene.training.votes import without_votes
from perturbgene.training.watchdog import WatchDog, kill_workers_at_exit

logger = logging.getLogger(__name__)

LOADING_WEIGHTS = "transformers.trainer"
_PARTS = ("loss_phenotypes", "loss_genes")


class _Resumed(NamedTuple):
    """Where a checkpoint was saved: states of the trainer and of the data set, and the batches left in its epoch."""

    trained: TrainerState
    position: Mapping[str, Any]
    batches_left: int


class ShardedTrainer(Trainer):
    """A Trainer for `IterableAnnDataset`s that already hold the share of one process; it can be killed and resumed.

    Checkpoints are whole or not there. A resumed run does not read cells that are done. It continues with the cells
    that are left, also when the number of loader workers, ranks, cells or tokens per batch, or accumulated batches has
    changed.

    Args:
        evaluator: Counts scores batch by batch; its sums are added over ranks.
        final_evaluator: Scores the last step and the delivered weights; `evaluator` by default.
        early_stopping: Ends training when the metric no longer improves; None never does.
        before_scoring: Called with the model before its delivered weights are scored. If it is there, other weights are
            scored without the genes' votes for labels, so that the best are those whose transformer has learned most.
        before_saving: Called on the first process before a checkpoint or the final weights are written; may refuse it.
        adapters: LoRA's updates of the model, which are merged into the weights that are saved.
        *args, **kwargs: As for `transformers.Trainer`; `data_collator` makes training batches.

    Attributes:
        cells: The training cells.
        stop: Knows the signal that ended training, if one did.

    Raises:
        InputError: `--metric_for_best_model` is no score of the evaluator.
    """

    def __init__(
        self,
        *args: Any,
        evaluator: Evaluator | None = None,
        final_evaluator: Evaluator | None = None,
        early_stopping: StopEarly | None = None,
        before_scoring: Callable[[Any], None] | None = None,
        before_saving: Callable[[], None] | None = None,
        adapters: LowRank | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.evaluator, self.final_evaluator = evaluator, final_evaluator or evaluator
        metric = self.args.metric_for_best_model
        if metric and evaluator is not None:
            names = [f"eval_{name}" for name in evaluator.flat_metrics(loss_weights=(1.0, 1.0))]
            if f"eval_{metric.removeprefix('eval_')}" not in names:
                hint = f"{did_you_mean(metric, names)} Change --metric_for_best_model."
                raise InputError(f"metric_for_best_model is {metric!r}, which is no score of this run. {hint}")
        self.folder, self.cells = Path(str(self.args.output_dir)), cast(IterableAnnDataset, self.train_dataset)
        # `checkpoints.rotate` deletes, not Trainer.
        self._num_kept, self.args.save_total_limit = self.args.save_total_limit, None
        self._partial: Path | None = None  # where a checkpoint is being written
        self._unchecked: tuple[Any, int, list[np.ndarray]] | None = None  # norm, step and cells of the last step
        self._is_over = False  # True once nothing is left but to score the delivered weights
        self._scored_step: int | None = None  # the step that `final_evaluator` has scored
        self._parts: dict[str, torch.Tensor] = {}
        self._step_of_last_parts = 0
        self._resumed: _Resumed | None = None
        self.stop, self.progress, self.speed = StopOnSignal(), Progress(), Speed(self._sum_over_ranks)
        self.watchdog = WatchDog()
        self.early_stopping, self.before_scoring, self.adapters = early_stopping, before_scoring, adapters
        self.before_saving = before_saving
        for printer in (PrinterCallback, ProgressCallback):
            self.remove_callback(printer)
        for callback in (self.stop, self.progress, early_stopping, KeepPosition(self.cells), self.watchdog):
            if callback is not None:
                self.add_callback(callback)

    def _sum_over_ranks(self, numbers: Sequence[Any]) -> list[Any]:
        """Add numbers or arrays over all processes."""
        if self.args.world_size == 1:
            return list(numbers)
        tensors = [torch.as_tensor(np.asarray(number, dtype=np.float64)).to(self.args.device) for number in numbers]
        return [self.accelerator.reduce(tensor, reduction="sum").cpu().numpy() for tensor in tensors]

    # -- steps and resuming ---------------------------------------------------------------------------------------

    def _resumed_at(self, checkpoint: str) -> _Resumed:
        """Let the data set continue where a checkpoint was saved."""
        path = Path(checkpoint) / TRAINER_STATE_NAME
        trained = TrainerState.load_from_json(str(path)) if path.exists() else TrainerState()
        position = cast(dict[str, Any], trained.stateful_callbacks).get(POSITION_KEY)
        if position is None:
            raise InputError(f"checkpoint {checkpoint} does not say which cells are done. Give an older one.")
        self.cells.load_state_dict(position)
        left = self.cells.num_batches(position["consumed"])
        if left == 0:
            self.cells.set_epoch(position["epoch"] + 1)
            position, left = self.cells.state_dict(), self.cells.num_batches()
        return _Resumed(trained, position, left)

    def _has_stopped_early(self, state: TrainerState) -> bool:
        return self.early_stopping is not None and self.early_stopping.has_stopped(state)

    def _is_last(self, state: TrainerState) -> bool:
        """True if the run of a saved state has no step left to do; with a `max_steps` of 0, no run has."""
        if self.args.max_steps == 0:
            return True
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return state.global_step >= max_steps or self._has_stopped_early(state)

    def is_finished(self, checkpoint: str) -> bool:
        """True when a checkpoint has as many steps as this run wants, or stopped early; refuses what `train` does."""
        self._resumed = self._resumed_at(checkpoint)
        return self._is_last(self._resumed.trained)

    def is_delivered(self) -> bool:
        """True when the run folder already holds the weights after all steps of this run."""
        if not all((self.folder / name).is_file() for name in checkpoints.LAST_FILES):
            return False
        if damage := damaged_file(self.folder):
            logger.warning("%s: %s, so the final files are written again", self.folder, damage)
            return False
        try:
            state = TrainerState.load_from_json(str(self.folder / TRAINER_STATE_NAME))
        except (ValueError, TypeError):  # damaged, in a run of before, which has no sums
            return False
        return self._is_last(state)

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train, from a checkpoint on if one is named, after one batch of evaluation that shows whether it works.

        The terminal and the signal handlers are restored whatever happens.

        Raises:
            InputError: The checkpoint is not complete, or was trained on other cells; or memory runs out.
            RunFailedError: A checkpoint cannot be written, or a step is not a number.
        """
        self._resumed = self._resumed_at(resume_from_checkpoint) if resume_from_checkpoint else None
        self._step_of_last_parts = 0 if self._resumed is None else self._resumed.trained.global_step
        if self.args.eval_strategy != "no" and self._resumed is None and self.evaluator is not None:
            first_batch = islice(self.get_eval_dataloader(), 1)
            run_evaluator(self.evaluator, self.accelerator.unwrap_model(self.model), first_batch)
        try:
            with self.watchdog.watching(), nullcontext() if self.args.disable_tqdm else logging_redirect_tqdm():
                return super().train(resume_from_checkpoint, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not self.speed.cells:
                raise RunFailedError(
                    f"the memory of {self.args.device} ran out before the first batch. Free memory, or choose a "
                    "smaller model (--model_arch, --hidden_size)."
                ) from error
            wanted = sum(int(cells_2n[1].sum()) for cells_2n in self.speed.cells) // len(self.speed.cells)
            most, newest = self.speed.most_tokens, checkpoints.checkpoints(self.folder)[-1:]
            fits = f"the largest that fitted had {most:,}" if most else "none has fitted yet"
            advice = f"Give --tokens_per_batch {most}" if most else "Lower --tokens_per_batch"
            resume = f" Continue from {newest[0]} with --resume_from_checkpoint --allow_changed." if newest else ""
            raise InputError(
                f"the memory of {self.args.device} does not hold a batch of {wanted:,} tokens; {fits}. {advice}, or a "
                f"smaller --per_device_train_batch_size with more --gradient_accumulation_steps.{resume}"
            ) from error
        finally:
            self.progress.close()
            self.stop.give_back()

    def _num_steps(self, num_batches: int) -> int:
        """Count the optimizer steps that some batches make."""
        return max(1, -(-num_batches // self.args.gradient_accumulation_steps))

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        """Count epochs and steps one by one: planned epochs differ in length, and a resumed run may cut other batches.

        A plan takes about 0.2 s for a million cells; the schedule needs the exact end, also for exact resuming.
        """
        _, per_epoch, *others, _ = super().set_initial_training_values(args, dataloader)
        epochs, steps = 0, 0  # whole epochs, and the steps when they are done
        if self._resumed is not None:
            epochs = self._resumed.position["epoch"] + 1
            steps = self._resumed.trained.global_step + self._num_steps(self._resumed.batches_left)
        is_enough = (lambda: steps >= args.max_steps) if args.max_steps > 0 else lambda: epochs >= args.num_train_epochs
        while not is_enough():
            steps += self._num_steps(self.cells.num_batches(epoch=epochs))
            epochs += 1
        if args.max_steps > 0:
            return epochs, per_epoch, *others, args.max_steps
        last = self._num_steps(self.cells.num_batches(epoch=epochs - 1))
        surplus = math.floor((epochs - args.num_train_epochs) * last)
        return epochs, per_epoch, *others, steps - surplus

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Load the trainer's state; return the epoch to begin with, and that no batch has to be skipped."""
        epoch, batches = super()._init_training_state(max_steps, *args, **kwargs)
        if self._resumed is None:
            return epoch, batches
        trained = self._resumed.trained
        is_over = self._has_stopped_early(trained) or trained.global_step >= max_steps  # then no epoch is left to run
        return (self.state.num_train_epochs if is_over else int(self._resumed.position["epoch"])), 0

    def _run_epoch(self, **parts: Any) -> None:  # type: ignore[override]
        """Run an epoch, or what is left of the one in which the checkpoint was saved; Trainer assumes equal epochs."""
        self.cells.set_epoch(parts["epoch"])
        num_batches = len(parts["train_dataloader"])
        if self._resumed is not None and parts["epoch"] == self._resumed.position["epoch"]:
            self.cells.load_state_dict(self._resumed.position)
            num_batches = self._resumed.batches_left
        parts |= {"steps_in_epoch": num_batches, "num_update_steps_per_epoch": self._num_steps(num_batches)}
        super()._run_epoch(**parts)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load them, but keep the learning rate and its kin of now, where --allow_changed has changed them."""
        optimizer: Any = self.optimizer
        wanted = [] if checkpoint is None else [dict(group) for group in optimizer.param_groups]
        with checkpoints.only_data(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        for group, now in zip(optimizer.param_groups, wanted, strict=bool(wanted)):
            checkpoints.take_settings(group, now)
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if wanted and hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [now["initial_lr"] for now in wanted]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.only_data(checkpoint):
            super()._load_rng_state(checkpoint)

    # -- data -----------------------------------------------------------------------------------------------------

    def _own_generator(self) -> torch.Generator:
        """Loaders draw their workers' seed from this: from the global generator they would change the dropout."""
        return torch.Generator().manual_seed(self.args.seed)

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's training batches; accelerate's default would distribute the cells a second time."""
        workers = self.args.dataloader_num_workers
        if workers:
            kill_workers_at_exit()
        loader = DataLoader(
            self.cells.batches(WithCells(cast(BlockCollator, self.data_collator))),
            batch_size=None,
            num_workers=workers,
            persistent_workers=bool(workers) and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            generator=self._own_generator(),
            worker_init_fn=outlive_signals,
        )
        place = {"device": self.args.device, "num_processes": 1, "process_index": 0}
        return prepare_data_loader(loader, put_on_device=True, dispatch_batches=False, **place)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return this process's evaluation cells in lists, of which the evaluator makes batches for each question."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(dataset, IterableAnnDataset)
        return DataLoader(dataset, batch_size=dataset.batch_size, collate_fn=list, generator=self._own_generator())

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Fetch the batches of a step, and count their cells before the model sees them.

        Raises:
            RuntimeError: A loader worker was killed; torch says so too, unless its connection ends before it.
        """
        self.speed.start()
        try:
            batches, num_items = super().get_batch_samples(*args, **kwargs)
        except (ConnectionError, EOFError) as error:
            if not self.args.dataloader_num_workers or " in DataLoader worker process " in str(error):  # of the cells
                raise
            raise RuntimeError("a DataLoader worker (pid unknown) exited unexpectedly") from error
        self.speed.count(batches)
        return batches, num_items

    # -- loss and scores ------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Exclude the gains of bins from weight decay, like biases and norms: they rest at 1, not at 0.

        With LoRA, exclude the embeddings too: most of their rows must stay as they are.
        """
        rests = ("type_gain",) if self.adapters is None else ("type_gain", "_embeddings.weight")
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(rests)]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Count labeled tokens of the global batch: (phenotypes, genes) for MLM, cells for classes."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        first_bin_id: int = self.accelerator.unwrap_model(self.model).config.first_bin_id
        is_mlm = "label_positions" in batch_samples[0] or batch_samples[0]["labels"].dim() > 1
        labels = torch.cat([batch["labels"].reshape(-1) for batch in batch_samples])
        labels = labels[labels != IGNORED]
        parts = [labels < first_bin_id, labels >= first_bin_id]
        counts = torch.stack([part.sum() for part in parts]) if is_mlm else labels.ne(-1).sum()
        counts = counts.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return counts

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss, and keep its two parts for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        for name in _PARTS:
            part = outputs.get(name)
            if part is not None and model.training:
                self._parts[name] = self._parts.get(name, torch.zeros_like(part)) + part
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm, and keep it: it is looked at one step later, so that nobody waits for a GPU."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._check_last_step()
        if not self.args.fp16:  # there, the gradient scaler expects such steps and leaves them out
            self._unchecked = (norm, self.state.global_step + 1, self.speed.cells)
        return norm

    def _check_last_step(self) -> None:
        """Stop before anything is built on a step whose gradient was not a number."""
        (norm, step, cells), self._unchecked = self._unchecked or (0.0, 0, []), None
        if np.isfinite(float(norm)):
            return
        cells_n = np.concatenate([cells_2n[0] for cells_2n in cells]).astype(np.int64)
        starts_f = np.concatenate([[0], np.cumsum(self.cells.sizes)])
        files_n = np.searchsorted(starts_f, cells_n, side="right") - 1
        rows_n = cells_n - starts_f[files_n]
        places = [f"{self.cells.paths[file]} row {row}" for file, row in zip(files_n, rows_n, strict=True)]
        newest = checkpoints.checkpoints(self.folder)[-1:]
        raise RunFailedError(
            f"step {step} gave a gradient of norm {float(norm)}, so training stopped. Its {len(places)} cells: "
            f"{listed(places, most=3)}. Last good checkpoint: {newest[0] if newest else 'none'}. Look at these "
            "cells, or lower --learning_rate."
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add to what is logged of training the mean of each loss part since the last log, speed and memory."""
        self._check_last_step()
        if "loss" in logs and self._parts:
            steps = max(1, self.state.global_step - self._step_of_last_parts)
            totals = self._sum_over_ranks([float(total) for total in self._parts.values()])
            logs |= {name: round(float(total) / steps, 4) for name, total in zip(self._parts, totals, strict=True)}
            self._parts, self._step_of_last_parts = {}, self.state.global_step
        if "loss" in logs:
            return_if_grown()  # not in every step, which would take a sixth longer
            logs |= self.speed.rates()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Score each cell of all processes exactly once, counting batch by batch instead of gathering logits."""
        self._check_last_step()
        is_alone = self.before_scoring is not None and not self._is_over  # votes would hide what the transformer learns
        is_last = self._is_over or (not is_alone and self.state.global_step >= self.state.max_steps)
        dataset = cast(IterableAnnDataset, dataloader.dataset)
        evaluator = self.final_evaluator if is_last else self.evaluator
        assert evaluator is not None
        model = self.accelerator.unwrap_model(self.model)
        is_shown = self.is_world_process_zero() and not self.args.disable_tqdm
        batches = tqdm(
            dataloader, total=-(-len(dataset) // dataset.batch_size), desc="evaluating", unit=" batches", leave=False,
            dynamic_ncols=True, disable=not is_shown,
        )  # fmt: skip
        self.progress.is_alone = is_alone
        with self.speed.paused(), self.compute_loss_context_manager():
            if self.before_scoring is not None and not is_alone:
                with self.watchdog.paused():
                    self.before_scoring(model)
            with without_votes(model) if is_alone else nullcontext():
                run_evaluator(evaluator, model, self.watchdog.watched(batches))
        evaluator.set_sums(self._sum_over_ranks(evaluator.sums()))
        self._scored_step = self.state.global_step if is_last else None
        weights = (model.config.phenotype_loss_weight, model.config.gene_loss_weight)
        scores = evaluator.flat_metrics(loss_weights=weights)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in scores.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=evaluator.num_cells)  # type: ignore[arg-type]

    def final_results(self) -> dict[str, Any]:
        """Score the weights that are delivered; those of the last step have been scored already."""
        if self.eval_dataset is None or self.final_evaluator is None:
            return {}
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        is_last = best is None or Path(best).name == f"checkpoint-{self.state.global_step}"
        if not is_last or self._scored_step != self.state.global_step:
            self._is_over = True
            with self.watchdog.watching():
                self.evaluate()
            if self.before_scoring is not None:
                self.state.log_history.pop()  # the others are of the transformer alone: no curve has both
        return self.final_evaluator.results()

    # -- files ----------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        """Return where checkpoints are written: while one is, under another name."""
        return str(self._partial) if self._partial else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint under another name, seal it and rename it, since Trainer writes in place."""
        self._check_last_step()
        self._check_before_saving()
        name = f"checkpoint-{self.state.global_step}"
        self._partial, final = partial_path(self.folder / name), self.folder / name
        written = self._partial / name
        try:
            with self.speed.paused():
                if self.args.should_save:
                    checkpoints.mark(self._partial)
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(written):
                    self.state.best_model_checkpoint = str(final)
                self.accelerator.wait_for_everyone()  # each process has written its random states
                if self.args.should_save:
                    self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                    (written / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that may hold an access token
                    checkpoints.share(written)
                    checkpoints.seal(written, step=self.state.global_step, world_size=self.args.world_size)
                    checkpoints.commit(written, final)
                    checkpoints.rotate(self.folder, keep=self._num_kept, best=self.state.best_model_checkpoint)
                self.accelerator.wait_for_everyone()
        except Exception as error:  # of the system, torch or safetensors: a full disk has many names
            shutil.rmtree(self._partial, ignore_errors=True)
            if "DataLoader worker" in str(error):  # it died at this moment
                raise
            raise RunFailedError(
                f"checkpoint {final} could not be written ({self._reason(error)}). Older checkpoints are complete: "
                "make room and continue with --resume_from_checkpoint."
            ) from error
        finally:
            self._partial = None

    def _check_before_saving(self) -> None:
        if self.before_saving is not None and self.args.should_save:
            self.before_saving()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write weights that every verb can read, and next to them LoRA's updates, which they no longer show."""
        if self.adapters is not None:
            state_dict = self.adapters.merged_state()
        super()._save(output_dir, state_dict)
        if self.adapters is not None and self.args.should_save:
            self.adapters.save(Path(str(output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights of a checkpoint, and LoRA's updates."""
        with quiet(LOADING_WEIGHTS) if self.adapters is not None else nullcontext():  # it misses merged weights
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.adapters is not None:
            self.adapters.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load the best weights, and LoRA's updates."""
        with quiet(LOADING_WEIGHTS) if self.adapters is not None else nullcontext():
            super()._load_best_model()
        if self.adapters is not None:
            self.adapters.load(Path(str(self.state.best_model_checkpoint)))

    def merge_adapters(self) -> None:
        """Turn the trained model into a plain one, in place."""
        if self.adapters is not None:
            self.adapters.merge()
        self.adapters = None

    def deliver(self, write_more: Callable[[Path], None]) -> None:
        """Write final weights, settings, tokenizer and state into the run folder, each file whole.

        Args:
            write_more: Called on the first process with the folder in which files wait for their rename, to add some.

        Raises:
            RunFailedError: They cannot be written.
        """
        self._check_before_saving()
        waiting = partial_path(self.folder / "final")
        try:
            if self.args.should_save:
                checkpoints.mark(waiting)
            self.save_model(str(waiting), _internal_call=True)  # by all processes, over which weights may be sharded
            if self.args.should_save:
                (waiting / TRAINING_ARGS_NAME).unlink(missing_ok=True)
                self.state.save_to_json(str(waiting / TRAINER_STATE_NAME))
                write_more(waiting)
                checkpoints.share(waiting)
                checkpoints.seal_run(waiting)
                checkpoints.move_files(waiting, self.folder, last=checkpoints.LAST_FILES)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(waiting, ignore_errors=True)
            raise RunFailedError(
                f"the final weights could not be written to {self.folder} ({self._reason(error)}). Make room and "
                "finish with --resume_from_checkpoint."
            ) from error
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _reason(self, error: Exception) -> str:
        """Return the first line of an error, and the free space on the disk of the run."""
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{line}; {shutil.disk_usage(self.folder).free / 1e6:,.0f} MB free"
