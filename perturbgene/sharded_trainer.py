"""`ShardedTrainer`: transformers' Trainer, except that each process reads its own rows and counts its own tokens.

Owns the few overrides that streaming, two-part losses and resuming without replay need; leaves whole checkpoints and
signals to `SafeTrainer`, and the loop and the optimizer to transformers and accelerate.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from perturbgene.data_utils.data_collators import IGNORED
from perturbgene.data_utils.iterable_ann_dataset import BlockCollator, IterableAnnDataset
from perturbgene.errors import InputError, did_you_mean
from perturbgene.eval_utils import Evaluator, run_evaluator
from perturbgene.training.callbacks import WithCells, outlive_signals
from perturbgene.training.checkpoints import SafeTrainer

logger = logging.getLogger(__name__)

_PARTS = ("loss_phenotypes", "loss_genes")
#: Entry of `trainer_state.json` that says which cells of the epoch are done.
POSITION_KEY = "StreamPosition"


class _KeepPosition(TrainerCallback):
    """Counts the batches of the current epoch, so that every checkpoint says which cells are done.

    The number of steps would not do: it means other cells once ranks, batch size or accumulation have changed.
    """

    def __init__(self, cells: IterableAnnDataset) -> None:
        self.cells, self.num_batches = cells, 0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.num_batches = 0

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self.num_batches += 1

    def on_step_end(self, args: Any, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        self.num_batches += 1
        position = self.cells.state_after(self.num_batches)
        cast(dict[str, Any], state.stateful_callbacks)[POSITION_KEY] = position  # a dict, whatever its annotation says
        # Trainer takes the batches of a resumed epoch for a whole epoch.
        left, whole = self.cells.num_batches(position["consumed"]), self.cells.num_batches()
        state.epoch = position["epoch"] + (whole - left) / whole


class StopEarly(EarlyStoppingCallback):
    """Ends training when the metric has not improved for some evaluations; a resumed run goes on counting.

    The count is an entry of `trainer_state.json` from the evaluation on, whatever is saved when.
    """

    KEY = "StopEarly"

    def _count(self, state: TrainerState) -> int:
        """Return how many evaluations in a row have not improved, from a state that was saved."""
        kept = cast(dict[str, Any], state.stateful_callbacks).get(self.KEY, {"attributes": {}})
        return int(kept["attributes"].get("early_stopping_patience_counter", 0))

    def has_stopped(self, state: TrainerState) -> bool:
        """Return whether a run with this state ended because it no longer improved."""
        return self._count(state) >= self.early_stopping_patience

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.early_stopping_patience_counter, self.is_training = self._count(state), True
        cast(dict[str, Any], state.stateful_callbacks)[self.KEY] = self.state()
        if not args.load_best_model_at_end:
            logger.warning(
                "--early_stopping_patience: the weights of the last step are kept, not the best ones. Save when "
                "evaluating to keep the best (--load_best_model_at_end)."
            )

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if not self.is_training:  # the final scores
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        cast(dict[str, Any], state.stateful_callbacks)[self.KEY] = self.state()
        if control.should_training_stop and self.early_stopping_patience_counter >= self.early_stopping_patience:
            logger.info(
                "training ends at step %d: %s has not improved for %d evaluations", state.global_step,
                args.metric_for_best_model, self.early_stopping_patience_counter,
            )  # fmt: skip

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.is_training = False


@dataclass(frozen=True)
class _Resumed:
    """Where a checkpoint was saved.

    Args:
        state: Of the data set; see `IterableAnnDataset.state_dict`.
        step: Optimizer steps done.
        batches_left: Batches of this process that are left in the epoch, more than none.
        epoch: The one that continues.
        has_stopped: Whether the run ended there because it no longer improved.
    """

    state: Mapping[str, Any]
    step: int
    batches_left: int
    epoch: int
    has_stopped: bool


class ShardedTrainer(SafeTrainer):
    """A Trainer for `IterableAnnDataset`s that already hold the share of one process.

    A resumed run does not read cells that are done, and continues with the cells that are left when the number of
    loader workers, ranks, cells or tokens per batch or accumulated batches has changed.

    Args:
        evaluator: Counts scores batch by batch; its sums are added over ranks.
        final_evaluator: Scores the last step and the delivered weights; `evaluator` by default.
        early_stopping: Ends training when the metric no longer improves; None never does.

    Raises:
        InputError: `--metric_for_best_model` is no score of the evaluator.
        *args, **kwargs: As for `transformers.Trainer`; `data_collator` makes training batches.
    """

    def __init__(
        self,
        *args: Any,
        evaluator: Evaluator | None = None,
        final_evaluator: Evaluator | None = None,
        early_stopping: StopEarly | None = None,
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
        self.early_stopping = early_stopping
        if early_stopping is not None:
            self.add_callback(early_stopping)
        self._is_over = False  # True once nothing is left but to score the delivered weights
        self._scored_step: int | None = None  # the step that `final_evaluator` has scored
        self._parts: dict[str, torch.Tensor] = {}
        self._step_of_last_parts = 0
        self._resumed: _Resumed | None = None
        if isinstance(self.train_dataset, IterableAnnDataset):
            self.add_callback(_KeepPosition(self.train_dataset))

    @property
    def cells(self) -> IterableAnnDataset:
        """The training cells."""
        assert isinstance(self.train_dataset, IterableAnnDataset)
        return self.train_dataset

    # -- steps and resuming ---------------------------------------------------------------------------------------

    def _resumed_at(self, checkpoint: str) -> _Resumed:
        """Let the data set continue where a checkpoint was saved."""
        path = Path(checkpoint) / TRAINER_STATE_NAME
        trained = TrainerState.load_from_json(str(path)) if path.exists() else TrainerState()
        state = cast(dict[str, Any], trained.stateful_callbacks).get(POSITION_KEY)
        if state is None:
            raise InputError(f"checkpoint {checkpoint} does not say which cells are done. Give an older one.")
        self.cells.load_state_dict(state)
        left = self.cells.num_batches(state["consumed"])
        if left == 0:
            self.cells.set_epoch(state["epoch"] + 1)
            state, left = self.cells.state_dict(), self.cells.num_batches()
        has_stopped = self.early_stopping is not None and self.early_stopping.has_stopped(trained)
        return _Resumed(state, trained.global_step, left, int(state["epoch"]), has_stopped)

    def is_over(self, state: TrainerState) -> bool:
        """True if the run of a saved state has no step left to do."""
        return super().is_over(state) or (self.early_stopping is not None and self.early_stopping.has_stopped(state))

    def is_finished(self, checkpoint: str) -> bool:
        """True when a checkpoint has as many steps as this run wants, or stopped early.

        Raises:
            InputError: The checkpoint is not complete, or was trained on other cells.
        """
        self._resumed = self._resumed_at(checkpoint)
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return self._resumed.has_stopped or self._resumed.step >= max_steps

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train, from a checkpoint on if one is named, after one batch of evaluation that shows whether it works.

        Raises:
            InputError: The checkpoint is not complete, or was trained on other cells.
            RunFailedError: A checkpoint cannot be written, or a step is not a number.
        """
        self._resumed = self._resumed_at(resume_from_checkpoint) if resume_from_checkpoint else None
        self._step_of_last_parts = 0 if self._resumed is None else self._resumed.step
        if self.args.eval_strategy != "no" and self._resumed is None and self.evaluator is not None:
            first_batch = islice(self.get_eval_dataloader(), 1)
            run_evaluator(self.evaluator, self.accelerator.unwrap_model(self.model), first_batch)
        return super().train(resume_from_checkpoint, *args, **kwargs)

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
            epochs, steps = self._resumed.epoch + 1, self._resumed.step + self._num_steps(self._resumed.batches_left)
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
        is_over = self._resumed.has_stopped or self._resumed.step >= max_steps  # then no epoch is left to run
        return (self.state.num_train_epochs if is_over else self._resumed.epoch), 0

    def _run_epoch(self, **parts: Any) -> None:  # type: ignore[override]
        """Run an epoch, or what is left of the one in which the checkpoint was saved; Trainer assumes equal epochs."""
        self.cells.set_epoch(parts["epoch"])
        num_batches = len(parts["train_dataloader"])
        if self._resumed is not None and parts["epoch"] == self._resumed.epoch:
            self.cells.load_state_dict(self._resumed.state)
            num_batches = self._resumed.batches_left
        parts |= {"steps_in_epoch": num_batches, "num_update_steps_per_epoch": self._num_steps(num_batches)}
        super()._run_epoch(**parts)

    # -- data -----------------------------------------------------------------------------------------------------

    def _own_generator(self) -> torch.Generator:
        """Loaders draw their workers' seed from this: from the global generator they would change the dropout."""
        return torch.Generator().manual_seed(self.args.seed)

    def get_train_dataloader(self) -> DataLoader:
        """Return this process's training batches; accelerate's default would distribute the cells a second time."""
        workers = self.args.dataloader_num_workers
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

    def places_of(self, cells_n: np.ndarray) -> list[str]:
        """Return the file and the row of each training cell, as text."""
        starts_f = np.concatenate([[0], np.cumsum(self.cells.sizes)])
        files_n = np.searchsorted(starts_f, cells_n, side="right") - 1
        rows_n = cells_n - starts_f[files_n]
        return [f"{self.cells.paths[file]} row {row}" for file, row in zip(files_n, rows_n, strict=True)]

    # -- loss and scores ------------------------------------------------------------------------------------------

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Exclude the gains of bins from weight decay, like biases and norms: they rest at 1, not at 0."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("type_gain")]

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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss part since the last log, over all processes."""
        if "loss" in logs and self._parts:
            steps = max(1, self.state.global_step - self._step_of_last_parts)
            totals = self._sum_over_ranks([float(total) for total in self._parts.values()])
            logs |= {name: round(float(total) / steps, 4) for name, total in zip(self._parts, totals, strict=True)}
            self._parts, self._step_of_last_parts = {}, self.state.global_step
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Score each cell of all processes exactly once, counting batch by batch instead of gathering logits."""
        self._check_last_step()
        is_last = self._is_over or self.state.global_step >= self.state.max_steps
        dataset = cast(IterableAnnDataset, dataloader.dataset)
        evaluator = self.final_evaluator if is_last else self.evaluator
        assert evaluator is not None
        model = self.accelerator.unwrap_model(self.model)
        is_shown = self.is_world_process_zero() and not self.args.disable_tqdm
        batches = tqdm(
            dataloader, total=-(-len(dataset) // dataset.batch_size), desc="evaluating", unit=" batches", leave=False,
            dynamic_ncols=True, disable=not is_shown,
        )  # fmt: skip
        with self.speed.paused(), self.compute_loss_context_manager():
            run_evaluator(evaluator, model, batches)
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
            self.evaluate()
        return self.final_evaluator.results()
