"""What a run tells while it trains: speed, padding, share of the machine's peak, memory, time left, and when it breaks.

Owns counting on the host, from the batches alone and without asking the device, and the lines on the terminal; leaves
the count of operations to `flops` and stopping to the trainer. Letters: n cells of a batch.
"""

import functools
import logging
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState

from perturbgene.data_utils.iterable_ann_dataset import BlockCollator
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.training.flops import flops_of_batch, measured_peak

logger = logging.getLogger(__name__)

#: A loss this many times the median of the last ones has exploded.
EXPLOSION = 10.0
_REMEMBERED, _FEWEST = 50, 10

Batch = dict[str, Any]


@functools.cache
def _peak(device_type: str, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product; the random numbers of training stay as they are."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device_type == "cuda" else []):
        return measured_peak(device_type, dtype)


@dataclass(frozen=True)
class WithCells:
    """A collator that adds `cells` (2, n): number and length of each cell, which stay on the host.

    Args:
        collator: Makes the batches.
    """

    collator: BlockCollator

    def collate_block(self, block: TokenBlock) -> Batch:
        """Turn a block into a batch."""
        batch = self.collator.collate_block(block)
        lengths = batch["lengths"] if "lengths" in batch else batch["attention_mask"].sum(dim=1).numpy()
        return {**batch, "cells": np.stack([block.cells_n, lengths])}


@dataclass
class Counts:
    """What went through the model since the last log."""

    num_cells: int = 0
    num_tokens: int = 0
    num_places: int = 0
    flops: float = 0.0

    def add(self, batch: Batch, cells_2n: np.ndarray, config: Any) -> None:
        """Count one batch of which number and length of each cell are known, shape (2, n)."""
        lengths = cells_2n[1].tolist()
        labels = batch.get("label_positions")
        self.num_cells += len(lengths)
        self.num_tokens += sum(lengths)
        self.num_places += batch["input_ids"].numel()
        num_reads = len(lengths) if labels is None else len(labels)
        self.flops += flops_of_batch(config, lengths, num_reads=num_reads)

    def as_list(self) -> list[float]:
        """All counts, to be added up over ranks."""
        return [self.num_cells, self.num_tokens, self.num_places, self.flops]


@dataclass
class Watch:
    """Counts batches as they come, and says at each log what that means per second.

    Args:
        config: Of the model, for its sizes.
        device: Where it trains.
        dtype: In which its matrices are multiplied.
        num_ranks: Processes that train together.
        sum_over_ranks: Adds numbers over ranks.
    """

    config: Any
    device: torch.device
    dtype: torch.dtype
    num_ranks: int = 1
    sum_over_ranks: Callable[[list[float]], list[float]] = list
    #: Cells of the present step: one array (2, n) of numbers and lengths per batch.
    cells: list[np.ndarray] = field(default_factory=list)
    #: Most tokens of a batch that has gone through.
    most_tokens: int = 0
    _counts: Counts = field(default_factory=Counts)
    _since: float = field(default_factory=time.monotonic)
    _began: tuple[float, int] | None = None
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    @property
    def is_idle(self) -> bool:
        """True before the first step."""
        return self._began is None

    def see(self, batches: Sequence[Batch]) -> None:
        """Count the batches of a step, and take out of them what only concerns the host."""
        self.most_tokens = max([self.most_tokens, *(int(cells_2n[1].sum()) for cells_2n in self.cells)])
        self.cells = []
        for batch in batches:
            cells_2n = batch.pop("cells", None)
            if cells_2n is not None:
                self.cells.append(cells_2n)
                self._counts.add(batch, cells_2n, self.config)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that something other than training takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - began

    def begin(self, step: int) -> None:
        """Start the clock at the first step of this process."""
        self._since, self._counts = time.monotonic(), Counts()
        self._began = (self._since, step)

    def rates(self, step: int, last_step: int) -> dict[str, float]:
        """Say what was done per second since the last call, over all ranks; and memory of this rank and time left.

        Returns:
            `cells_per_second`, `tokens_per_second`, `padding` (share of places that hold no token), `flops_per_second`
            and `mfu` (its share of a measured matmul peak), `memory_gb`, `cuda_memory_gb`, `seconds_left`.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        cells, tokens, places, flops = self.sum_over_ranks(self._counts.as_list())
        with self.paused():
            peak = _peak(self.device.type, self.dtype) * self.num_ranks
        self._counts, self._since = Counts(), time.monotonic()
        told = {
            "cells_per_second": round(cells / seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1),
            "padding": round(1 - tokens / max(places, 1), 4),
            "flops_per_second": float(f"{flops / seconds:.4g}"),
            "mfu": round(flops / seconds / peak, 4),
            "memory_gb": round(psutil.Process().memory_info().rss / 1e9, 3),
        }
        if self.device.type == "cuda":
            told["cuda_memory_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)
        if self._began is not None and step > self._began[1]:
            of_step = (time.monotonic() - self._began[0]) / (step - self._began[1])
            told["seconds_left"] = round(of_step * max(0, last_step - step), 1)
        return told

    def note_loss(self, loss: float, step: int) -> None:
        """Warn once when the loss has exploded; the median forgets slowly, so that it must stay up to become usual."""
        usual = statistics.median(self._losses) if len(self._losses) >= _FEWEST else math.inf
        if loss > EXPLOSION * usual:
            logger.warning(
                "the loss has exploded: %.4g at step %d, where %.4g was usual. Perhaps --learning_rate is too high",
                loss, step, usual,
            )  # fmt: skip
        self._losses.append(loss)


# -- lines --------------------------------------------------------------------------------------------------------


def short_number(value: float) -> str:
    """Write a large number with three digits and a letter.

    Example:
        >>> [short_number(value) for value in (7.25, 1234, 56_789_000, 3.1e12)]
        ['7.25', '1.23k', '56.8M', '3.1T']
    """
    power = min(4, max(0, int(math.log10(max(abs(value), 1)) // 3)))
    return f"{value / 1000**power:.3g}{' kMGT'[power].strip()}"


def duration(seconds: float) -> str:
    """Write seconds as hours, minutes and seconds.

    Example:
        >>> duration(3725.4)
        '1:02:05'
    """
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


_LOSS_PARTS = ("phenotypes", "genes")
_UNITS: dict[str, Callable[[float], str]] = {
    "grad_norm": lambda value: f"grad {value:.3g}",
    "learning_rate": lambda value: f"lr {value:.2e}",
    "cells_per_second": lambda value: f"{short_number(value)} cells/s",
    "tokens_per_second": lambda value: f"{short_number(value)} tokens/s",
    "padding": lambda value: f"padding {value:.0%}",
    "flops_per_second": lambda value: f"{short_number(value)}FLOP/s",
    "mfu": lambda value: f"MFU {value:.0%}",
    "memory_gb": lambda value: f"RAM {value:.1f} GB",
    "cuda_memory_gb": lambda value: f"GPU {value:.1f} GB",
    "seconds_left": lambda value: f"{duration(value)} left",
}


def training_line(logs: Mapping[str, Any], *, step: int, last_step: int) -> str:
    """Write what is logged of training in one line.

    Example:
        >>> logs = {"loss": 2.5, "loss_genes": 1.25, "epoch": 0.5, "learning_rate": 5e-4, "seconds_left": 61}
        >>> training_line(logs, step=5, last_step=90)
        'step 5/90 · epoch 0.50 · loss 2.5 (genes 1.25) · lr 5.00e-04 · 0:01:01 left'
    """
    parts = [f"{name} {logs[f'loss_{name}']:.4g}" for name in _LOSS_PARTS if f"loss_{name}" in logs]
    loss = f"loss {logs['loss']:.4g}" + (f" ({', '.join(parts)})" if parts else "")
    told = [write(logs[name]) for name, write in _UNITS.items() if name in logs]
    return " · ".join([f"step {step}/{last_step}", f"epoch {logs.get('epoch', 0):.2f}", loss, *told])


def evaluation_line(logs: Mapping[str, Any], *, step: int) -> str:
    """Write what an evaluation found in one line; times are left out.

    Example:
        >>> evaluation_line({"eval_loss": 0.5, "eval_cell_type_accuracy": 0.75, "eval_runtime": 3}, step=5)
        'evaluated at step 5 · loss 0.5 · cell type accuracy 0.75'
    """
    hidden = ("runtime", "per_second")
    names = [name for name in logs if name.startswith("eval_") and not name.endswith(hidden)]
    told = [f"{name.removeprefix('eval_').replace('_', ' ')} {logs[name]:.4g}" for name in names]
    return " · ".join([f"evaluated at step {step}", *told])


class Lines(TrainerCallback):
    """Writes one line per log and evaluation, above a progress bar where there is a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and not args.disable_tqdm and sys.stderr.isatty():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            self._write(training_line(logs, step=state.global_step, last_step=state.max_steps))
        elif "eval_loss" in logs:
            self._write(evaluation_line(logs, step=state.global_step))

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        logger.info("%s", line)
        if self._bar is not None:
            self._bar.refresh()

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step >= state.max_steps and self._bar is not None:
            self._bar.update(state.max_steps - self._bar.n)
        if self._bar is not None:
            self._bar.close()
        self._bar = None
