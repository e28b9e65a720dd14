"""`ShardedTrainer`: transformers' Trainer, except that each rank reads its own rows and counts its own tokens.

Owns the few overrides that streaming and two-part losses need; leaves the loop, optimiser, logging and checkpoints to
transformers and accelerate.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from perturbgene.data_utils.data_collators import IGNORED
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.eval_utils import Evaluator, run_evaluator

logger = logging.getLogger(__name__)

_PARTS = ("loss_phenotypes", "loss_genes")


class ShardedTrainer(Trainer):
    """A Trainer for `IterableAnnDataset`s that already hold one rank's share.

    Args:
        evaluator: Counts scores batch by batch; its sums are added over ranks.
        *args, **kwargs: As for `transformers.Trainer`; `data_collator` makes training batches.
    """

    def __init__(self, *args: Any, evaluator: Evaluator | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.evaluator = evaluator
        self._parts: dict[str, torch.Tensor] = {}

    def _loader(self, dataset: IterableAnnDataset, collate_fn: Any) -> DataLoader:
        """Wrap a data set without splitting it again: accelerate's default would deal out cells a second time."""
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            dataset.batches(collate_fn),
            batch_size=None,
            num_workers=workers,
            persistent_workers=bool(workers) and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            generator=self._own_generator(),
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
        assert isinstance(self.train_dataset, IterableAnnDataset)
        return self._loader(self.train_dataset, self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return this rank's evaluation cells, in lists: the evaluator lays batches out for each question."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        assert isinstance(dataset, IterableAnnDataset)
        return DataLoader(dataset, batch_size=dataset.batch_size, collate_fn=list, generator=self._own_generator())

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
        """Add the mean of each loss part since the last log."""
        if "loss" in logs and self._parts:
            steps = max(1, self.state.global_step - getattr(self, "_step_of_last_parts", 0))
            logs |= {name: round(float(total) / steps, 4) for name, total in self._parts.items()}
            self._parts, self._step_of_last_parts = {}, self.state.global_step
        super().log(logs, *args, **kwargs)

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
        with self.compute_loss_context_manager():
            run_evaluator(self.evaluator, model, dataloader)
        self.evaluator.set_numbers(self._sum_over_ranks(self.evaluator.numbers()))
        config = model.config
        weights = (config.phenotype_loss_weight, config.gene_loss_weight)
        metrics = {
            f"{metric_key_prefix}_{key}": value
            for key, value in self.evaluator.flat_metrics(loss_weights=weights).items()
        }
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=self.evaluator.num_cells)  # type: ignore[arg-type]
