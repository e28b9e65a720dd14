"""`ShardedTrainer`: transformers' Trainer, except that each rank reads its own rows and counts its own tokens.

Owns the few overrides that streaming, two-part losses and resuming without replay need; leaves whole checkpoints and
signals to `SafeTrainer`, the loop and the optimiser to transformers and accelerate.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from perturbgene.data_utils.data_collators import IGNORED
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.errors import InputError
from perturbgene.eval_utils import Evaluator, run_evaluator
from perturbgene.training.callbacks import WithCells
from perturbgene.training.safe_trainer import SafeTrainer
from perturbgene.training.stopping import outlive_signals

logger = logging.getLogger(__name__)

_PARTS = ("loss_phenotypes", "loss_genes")


#: Entry of `trainer_state.json` that says which cells of the epoch are done.
POSITION_KEY = "StreamPosition"


class _KeepPosition(TrainerCallback):
    """Counts the batches of the running epoch, so that every checkpoint says which cells are done.

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
        _kept_by(state)[POSITION_KEY] = position
        # Trainer takes the batches of a resumed epoch for a whole epoch.
        left, whole = self.cells.num_batches(position["consumed"]), self.cells.num_batches()
        state.epoch = position["epoch"] + (whole - left) / whole


def _kept_by(state: TrainerState) -> dict[str, Any]:
    """Return what a trainer's state keeps for callbacks, a dict whatever its annotation says."""
    return cast(dict[str, Any], state.stateful_callbacks)


@dataclass(frozen=True)
class _Resumed:
    """Where a checkpoint stands.

    Args:
        state: Of the data set; see `IterableAnnDataset.state_dict`.
        step: Optimizer steps done.
        batches_left: Batches of this rank that are left in the epoch, more than none.
    """

    state: Mapping[str, Any]
    step: int
    batches_left: int

    @property
    def epoch(self) -> int:
        """The epoch under way."""
        return int(self.state["epoch"])


def trainer_state(checkpoint: str | Path) -> TrainerState:
    """Read what a checkpoint says of its run.

    Raises:
        InputError: The checkpoint is not complete.
    """
    path = Path(checkpoint) / TRAINER_STATE_NAME
    if not path.exists():
        raise InputError(f"checkpoint {checkpoint} is not complete ({path.name} is missing). Give an older one.")
    return TrainerState.load_from_json(str(path))


class ShardedTrainer(SafeTrainer):
    """A Trainer for `IterableAnnDataset`s that already hold one rank's share.

    A resumed run reads no cell of those that are done, and continues with the cells that are left when the number of
    loader workers, ranks, cells or tokens per batch or accumulated batches has changed.

    Args:
        evaluator: Counts scores batch by batch; its sums are added over ranks.
        *args, **kwargs: As for `transformers.Trainer`; `data_collator` makes training batches.
    """

    def __init__(self, *args: Any, evaluator: Evaluator | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.evaluator = evaluator
        self._parts: dict[str, torch.Tensor] = {}
        self._step_of_last_parts = 0
        self._resumed: _Resumed | None = None
        self._updates_by_epoch: dict[int, int] = {}
        if isinstance(self.train_dataset, IterableAnnDataset):
            self.add_callback(_KeepPosition(self.train_dataset))

    # -- resuming -------------------------------------------------------------------------------------------------

    def _resumed_at(self, checkpoint: str) -> _Resumed:
        cells, trained = self._cells, trainer_state(checkpoint)
        steps = trained.global_step
        state = _kept_by(trained).get(POSITION_KEY)
        if state is None:  # a checkpoint of older versions: its ranks and batches are taken to be those of now
            epoch, steps_of_epoch = divmod(steps, self._updates(cells.num_batches()))
            consumed = steps_of_epoch * self.args.gradient_accumulation_steps * cells.batch_size * cells.world_size
            state = {**cells.state_dict(), "epoch": epoch, "consumed": consumed}
        cells.load_state_dict(state)
        left = cells.num_batches(state["consumed"])
        if left == 0:
            cells.set_epoch(state["epoch"] + 1)
            state, left = cells.state_dict(), cells.num_batches()
        return _Resumed(state, steps, left)

    @property
    def _cells(self) -> IterableAnnDataset:
        assert isinstance(self.train_dataset, IterableAnnDataset)
        return self.train_dataset

    def _updates(self, num_batches: int) -> int:
        return -(-num_batches // self.args.gradient_accumulation_steps)

    def is_finished(self, checkpoint: str) -> bool:
        """True when a checkpoint has as many steps as this run wants.

        Raises:
            InputError: The checkpoint is not complete, or was trained on other cells.
        """
        self._resumed = self._resumed_at(checkpoint)
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return self._resumed.step >= max_steps

    def train(self, resume_from_checkpoint: str | None = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Train, from a checkpoint on if one is named; one that has all steps is trained no further.

        Raises:
            InputError: The checkpoint is not complete, or was trained on other cells.
            RunFailedError: A checkpoint cannot be written, or a step is no number.
        """
        self._resumed = self._resumed_at(resume_from_checkpoint) if resume_from_checkpoint else None
        self._step_of_last_parts = 0 if self._resumed is None else self._resumed.step
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def set_initial_training_values(self, args: Any, dataloader: DataLoader) -> Any:
        """Count epochs and steps.

        Steps done with other ranks or batches took other cells than steps of now, and epochs of planned batches differ
        in length: the steps of all epochs to come are counted one by one.
        """
        _, per_epoch, *others, _ = super().set_initial_training_values(args, dataloader)
        epochs, steps = 0, 0  # whole epochs, and the steps when they will be done
        if self._resumed is not None:
            epochs, steps = self._resumed.epoch + 1, self._resumed.step + self._updates(self._resumed.batches_left)
        if args.max_steps > 0:
            while steps < args.max_steps:
                epochs, steps = epochs + 1, steps + self._updates_of(epochs)
            return epochs, per_epoch, *others, args.max_steps
        while epochs < math.ceil(args.num_train_epochs):
            epochs, steps = epochs + 1, steps + self._updates_of(epochs)
        surplus = math.floor((epochs - args.num_train_epochs) * self._updates_of(epochs - 1))
        return epochs, per_epoch, *others, steps - surplus

    def _updates_of(self, epoch: int) -> int:
        """Count the steps of a whole epoch."""
        if not self._cells.has_planned_batches:
            return max(1, self._updates(self._cells.num_batches()))
        if epoch not in self._updates_by_epoch:
            self._updates_by_epoch[epoch] = max(1, self._updates(self._cells.num_batches(epoch=epoch)))
        return self._updates_by_epoch[epoch]

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Load the trainer's state; return the epoch to begin with and how many batches to replay: none."""
        epoch, batches = super()._init_training_state(max_steps, *args, **kwargs)
        if self._resumed is None:
            return epoch, batches
        is_over = self._resumed.step >= max_steps  # then no epoch is left to run
        return (self.state.num_train_epochs if is_over else self._resumed.epoch), 0

    def _run_epoch(self, **parts: Any) -> None:  # type: ignore[override]
        """Run an epoch, or what is left of the one in which the checkpoint was saved."""
        self._cells.set_epoch(parts["epoch"])
        steps_in_epoch = len(parts["train_dataloader"])  # of planned batches, another number in each epoch
        parts |= {"steps_in_epoch": steps_in_epoch, "num_update_steps_per_epoch": self._updates(steps_in_epoch)}
        if self._resumed is not None and parts["epoch"] == self._resumed.epoch:
            self._cells.load_state_dict(self._resumed.state)
            left = self._resumed.batches_left
            parts |= {"steps_in_epoch": left, "num_update_steps_per_epoch": self._updates(left)}
        super()._run_epoch(**parts)

    # -- data -----------------------------------------------------------------------------------------------------

    def _loader(self, dataset: IterableAnnDataset, collate_fn: Any) -> DataLoader:
        """Wrap a data set without splitting it again: accelerate's default would deal out cells a second time."""
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            dataset.batches(WithCells(collate_fn)),
            batch_size=None,
            num_workers=workers,
            persistent_workers=bool(workers) and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            generator=self._own_generator(),
            worker_init_fn=outlive_signals,
        )
        return prepare_data_loader(
            loader,
            device=self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def _own_generator(self) -> torch.Generator:
        """Loaders draw their workers' seed from this: from the global generator they would change the dropout."""
        return torch.Generator().manual_seed(self.args.seed)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Spare the gains of bins from weight decay, as biases and norms are: their rest is at 1, not at 0."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("type_gain")]

    def get_train_dataloader(self) -> DataLoader:
        """Return this rank's training batches."""
        return self._loader(self._cells, self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return this rank's evaluation cells, in lists: the evaluator lays batches out for each question."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(dataset, IterableAnnDataset)
        return DataLoader(dataset, batch_size=dataset.batch_size, collate_fn=list, generator=self._own_generator())

    # -- loss and scores ------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Count labelled tokens of the global batch: (phenotypes, genes) for MLM, cells for classes."""
        if not batch_samples or "labels" not in batch_samples[0]:
            return None
        first_bin_id: int = self.accelerator.unwrap_model(self.model).config.first_bin_id
        is_mlm = "label_positions" in batch_samples[0] or batch_samples[0]["labels"].dim() > 1
        labels = torch.cat([batch["labels"].reshape(-1) for batch in batch_samples])
        labels = labels[labels != IGNORED]
        counts = (
            torch.stack([(labels < first_bin_id).sum(), (labels >= first_bin_id).sum()])
            if is_mlm
            else labels.ne(-1).sum()
        )
        counts = counts.to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return counts

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss and keep its parts for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        for name in _PARTS:
            part = outputs.get(name)
            if part is not None and model.training:
                self._parts[name] = self._parts.get(name, torch.zeros_like(part)) + part
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each loss part since the last log, over all ranks."""
        if "loss" in logs and self._parts:
            steps = max(1, self.state.global_step - self._step_of_last_parts)
            totals = self._sum_numbers([float(total) for total in self._parts.values()])
            logs |= {name: round(total / steps, 4) for name, total in zip(self._parts, totals, strict=True)}
            self._parts, self._step_of_last_parts = {}, self.state.global_step
        super().log(logs, *args, **kwargs)

    def places_of(self, cells_n: np.ndarray) -> list[str]:
        """Say in which row of which file each cell of training stands."""
        starts_f = np.concatenate([[0], np.cumsum(self._cells.sizes)])
        files_n = np.searchsorted(starts_f, cells_n, side="right") - 1
        rows_n = cells_n - starts_f[files_n]
        return [f"{self._cells.paths[file]} row {row}" for file, row in zip(files_n, rows_n, strict=True)]

    def _sum_over_ranks(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self.args.world_size == 1:
            return list(arrays)
        tensors = [torch.from_numpy(np.asarray(array, dtype=np.float64)).to(self.args.device) for array in arrays]
        return [self.accelerator.reduce(tensor, reduction="sum").cpu().numpy() for tensor in tensors]

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Score each cell of all ranks exactly once, counting batch by batch instead of gathering logits."""
        assert self.evaluator is not None
        model = self.accelerator.unwrap_model(self.model)
        with self.compute_loss_context_manager(), self.averaged_weights():
            run_evaluator(self.evaluator, model, dataloader)
        self.evaluator.set_numbers(self._sum_over_ranks(self.evaluator.numbers()))
        config = model.config
        weights = (config.phenotype_loss_weight, config.gene_loss_weight)
        metrics = {
            f"{metric_key_prefix}_{key}": value
            for key, value in self.evaluator.flat_metrics(loss_weights=weights).items()
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=self.evaluator.num_cells)  # type: ignore[arg-type]
