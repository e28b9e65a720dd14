"""What a run shows while it trains, and how it stops: a progress bar or lines of a log, speed, signals.

Owns counting cells on the host and the agreement of all processes to stop after the same step; leaves saving to
`checkpoints` and exit codes to `main`. Letters: n cells of a batch.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import psutil
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback, WandbCallback

from perturbgene.data_utils.iterable_ann_dataset import BlockCollator, IterableAnnDataset
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.training.watchdog import show_stack_when_asked

if TYPE_CHECKING:
    from perturbgene.plots import Figure

logger = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
#: Seconds that a loader worker survives SIGTERM, so that the current step gets its cells.
_GRACE_SECONDS = 120
#: In a log file, lines are at least this many seconds and this share of all steps apart.
_SECONDS_BETWEEN_LINES, _SHARE_BETWEEN_LINES = 60.0, 0.1
#: Steps and seconds after which a run knows its speed; the first step is left out, since it compiles and opens files.
_MEASURED_STEPS, _MEASURED_SECONDS = 3, 2.0
#: Nobody has to plan for a rest that is shorter than this, in seconds.
_SHORT_REST = 10.0

Batch = dict[str, Any]


# -- speed --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WithCells:
    """A collator that adds `cells` (2, n) to a batch: the number and the length of each cell, kept on the host."""

    collator: BlockCollator

    def collate_block(self, block: TokenBlock) -> Batch:
        """Turn a block into a batch."""
        batch = self.collator.collate_block(block)
        lengths = batch["lengths"] if "lengths" in batch else batch["attention_mask"].sum(dim=1).numpy()
        return {**batch, "cells": np.stack([block.cells_n, lengths])}


@dataclass
class Speed:
    """Counts the cells and tokens of batches, and reports them per second, added over all processes."""

    sum_over_ranks: Callable[[list[float]], list[float]] = list
    cells: list[np.ndarray] = field(default_factory=list)  # of the step: numbers and lengths (2, n) of each batch
    most_tokens: int = 0  # of the largest batch that the model has finished
    _num_cells: int = 0
    _num_tokens: int = 0
    _since: float | None = None

    def count(self, batches: Sequence[Batch]) -> None:
        """Count the batches of a step, and remove from them what the model does not take."""
        self.most_tokens = max([self.most_tokens, *(int(cells_2n[1].sum()) for cells_2n in self.cells)])
        self.cells = [batch.pop("cells") for batch in batches if "cells" in batch]
        self._num_cells += sum(cells_2n.shape[1] for cells_2n in self.cells)
        self._num_tokens += sum(int(cells_2n[1].sum()) for cells_2n in self.cells)

    def start(self) -> None:
        """Start the clock, unless it runs: the first time that a batch is fetched."""
        self._since = time.monotonic() if self._since is None else self._since

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that something other than training takes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since = None if self._since is None else self._since + time.monotonic() - began

    def rates(self) -> dict[str, float]:
        """Return cells and tokens per second since the last call over all processes, and this one's memory in GB."""
        now = time.monotonic()
        seconds = max(now - (now if self._since is None else self._since), 1e-9)
        cells, tokens = self.sum_over_ranks([self._num_cells, self._num_tokens])
        self._num_cells, self._num_tokens, self._since = 0, 0, now
        rates = {
            "cells_per_second": round(cells / seconds, 1),
            "tokens_per_second": round(tokens / seconds, 1),
            "memory_gb": round(psutil.Process().memory_info().rss / 1e9, 3),
        }
        if torch.cuda.is_available():
            rates["cuda_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        return rates


# -- what is shown ------------------------------------------------------------------------------------------------


def rough_duration(seconds: float) -> str:
    """Write a duration as precisely as an estimate can be.

    Example:
        >>> [rough_duration(seconds) for seconds in (20, 200, 9000, 200_000)]
        ['20 seconds', '3.3 minutes', '2.5 hours', '2.3 days']
    """
    units = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
    name = next((name for name, size in units.items() if seconds >= 1.5 * size), "seconds")
    return f"{seconds / units[name]:.2g} {name}"


def training_line(logs: Mapping[str, Any], *, step: int, last_step: int, seconds_left: float | None = None) -> str:
    """Write the logged values of training in one line.

    Example:
        >>> logs = {"loss": 2.5, "loss_genes": 1.25, "epoch": 0.5, "learning_rate": 5e-4, "cells_per_second": 976.4}
        >>> training_line(logs, step=5, last_step=90, seconds_left=61)
        'step 5/90 · epoch 0.50 · loss 2.5 (genes 1.25) · lr 5.00e-04 · 976 cells/s · 01:01 left'
    """
    parts = [f"{name} {logs[f'loss_{name}']:.4g}" for name in ("phenotypes", "genes") if f"loss_{name}" in logs]
    values = [
        f"step {step}/{last_step}",
        f"epoch {logs.get('epoch', 0):.2f}",
        f"loss {logs['loss']:.4g}" + (f" ({', '.join(parts)})" if parts else ""),
    ]
    formats = {
        "learning_rate": "lr {:.2e}",
        "cells_per_second": "{:,.0f} cells/s",
        "tokens_per_second": "{:,.0f} tokens/s",
        "memory_gb": "RAM {:.1f} GB",
        "cuda_memory_gb": "GPU {:.1f} GB",
    }
    values += [text.format(logs[name]) for name, text in formats.items() if name in logs]
    left = [] if seconds_left is None else [f"{tqdm.format_interval(seconds_left)} left"]
    return " · ".join([*values, *left])


class Progress(TrainerCallback):
    """Shows one live progress bar in a terminal; in a log file, a line every so often. Evaluations get a line in both.

    `ProgressCallback` of transformers prints every log as a dictionary and does not know about cells.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._first_step: tuple[float, int] | None = None  # when the first step ended, and its number
        self._last_line = (0.0, 0)
        self._is_announced = False
        self.is_alone = False  # True while the transformer is scored without the genes' votes

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._first_step, self._last_line, self._is_announced = None, (time.monotonic(), state.global_step), False
        if not state.is_world_process_zero:
            return
        logger.info("training for %s steps", f"{state.max_steps - state.global_step:,}")
        if not args.disable_tqdm:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", dynamic_ncols=True,
                bar_format="{l_bar}{bar}| step {n_fmt}/{total_fmt} · {remaining} left{postfix}",
            )  # fmt: skip

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        if self._first_step is None:
            self._first_step = (time.monotonic(), state.global_step)
        seconds, steps = time.monotonic() - self._first_step[0], state.global_step - self._first_step[1]
        if not self._is_announced and steps >= _MEASURED_STEPS and seconds >= _MEASURED_SECONDS:
            self._is_announced = True
            steps_left, left = state.max_steps - state.global_step, self._seconds_left(state) or 0
            if state.is_world_process_zero and left >= _SHORT_REST:
                more = "" if args.eval_strategy == "no" else ", evaluations not counted"
                logger.info("about %s for the remaining %s steps%s", rough_duration(left), f"{steps_left:,}", more)

    def _seconds_left(self, state: TrainerState) -> float | None:
        if self._first_step is None or state.global_step == self._first_step[1]:
            return None
        seconds_per_step = (time.monotonic() - self._first_step[0]) / (state.global_step - self._first_step[1])
        return seconds_per_step * (state.max_steps - state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            # The loss, accuracies and macro F1; `trainer_state.json` has all scores.
            names = [x for x in logs if x.endswith(("accuracy", "macro_f1")) and x != "eval_balanced_accuracy"]
            shown = {name.removeprefix("eval_").replace("_", " "): logs[name] for name in ("eval_loss", *names)}
            scores = " · ".join(f"{name} {value:.4g}" for name, value in shown.items())
            alone = " (the transformer alone)" if self.is_alone else ""
            logger.info("evaluated at step %d%s · %s", state.global_step, alone, scores)
        elif "loss" in logs and self._bar is not None:
            self._bar.set_postfix_str(f"loss {logs['loss']:.4g}, {logs['cells_per_second']:,.0f} cells/s")
        elif "loss" in logs:
            seconds, steps = time.monotonic() - self._last_line[0], state.global_step - self._last_line[1]
            is_due = seconds >= _SECONDS_BETWEEN_LINES and steps >= _SHARE_BETWEEN_LINES * state.max_steps
            if is_due or state.global_step + args.logging_steps > state.max_steps:  # or the last one of the run
                self._last_line = (time.monotonic(), state.global_step)
                left, step, last_step = self._seconds_left(state), state.global_step, state.max_steps
                logger.info("%s", training_line(logs, step=step, last_step=last_step, seconds_left=left))

    def close(self) -> None:
        """Leave the bar as it is; what is printed next starts on a line of its own."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


# -- signals ------------------------------------------------------------------------------------------------------


def show_figures(draw: Callable[[], Mapping[str, "Figure"]], callbacks: Sequence[Any], *, step: int) -> None:
    """Show figures where the logs of a run go, if that is TensorBoard or an open run of W&B.

    Args:
        draw: Returns figures by name; called only if there is a place for them.
        callbacks: Those of the trainer.
        step: At which they are shown.
    """
    folders = [one.logging_dir for one in callbacks if isinstance(one, TensorBoardCallback) and one.logging_dir]
    has_wandb = any(isinstance(one, WandbCallback) for one in callbacks)
    if not folders and not has_wandb:
        return
    figures = draw()
    for folder in folders:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(folder) as writer:
            for name, figure in figures.items():
                writer.add_figure(name, figure, step, close=False)
    if has_wandb:
        import wandb

        if wandb.run is not None:
            wandb.run.log({name: wandb.Image(figure) for name, figure in figures.items()})


def outlive_signals(worker: int) -> None:
    """Keep a loader worker alive when its whole process group gets a signal: the trainer ends it after the step.

    A worker that hangs ends too: SIGTERM starts an alarm, and the watch-dog asks where it is. If the trainer goes away
    while it fetches a batch, that is not worth a traceback of each worker.
    """
    show_stack_when_asked()
    usual = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, ConnectionError | EOFError) else usual(kind, *rest)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


class StopOnSignal(TrainerCallback):
    """Ends training after the current step on a signal, with a checkpoint; a second signal acts at once.

    Attributes:
        stopped_by: Number of the signal on which all processes stopped; 0 while they continue.
    """

    def __init__(self) -> None:
        self._received = self.stopped_by = 0
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._received = self.stopped_by = 0
        if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # host numbers: nobody waits for the device
        if threading.current_thread() is threading.main_thread():
            hangup = getattr(signal, "SIGHUP", None)
            is_deaf = hangup is not None and signal.getsignal(hangup) is signal.SIG_IGN  # under `nohup`
            heard = [number for number in SIGNALS if not (is_deaf and number == hangup)]
            self._previous = {number: signal.signal(number, self._note) for number in heard}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self.give_back()
        text = f"\n{signal.Signals(number).name}: finishing this step and saving; a second signal stops at once\n"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())  # a logger may be at work at this very moment

    def give_back(self) -> None:
        """Restore the signal handlers that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        number = torch.tensor(self._received)
        if dist.is_initialized() and dist.get_world_size() > 1:  # all processes must stop after the same step
            dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        self.stopped_by = int(number)
        if self.stopped_by:
            args.load_best_model_at_end = False  # training goes on later, from the newest weights
            control.should_training_stop = True
            control.should_save = control.should_save or not _is_whole(state.epoch)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Evaluate and save at the end of an epoch, but not where a signal has stopped an epoch halfway."""
        if self.stopped_by:
            is_over = _is_whole(state.epoch)
            control.should_save = is_over
            control.should_evaluate, control.should_log = control.should_evaluate and is_over, is_over


class FewerEvaluations(TrainerCallback):
    """Evaluates and saves only after every so many passes, and after the last one.

    Args:
        every: Number of passes between evaluations, at least 1.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if round(state.epoch or 0) % self.every and not control.should_training_stop:
            control.should_evaluate = control.should_save = False


def _is_whole(epoch: float | None) -> bool:
    return epoch is not None and float(epoch).is_integer()


# -- which cells are done, and when it is enough ------------------------------------------------------------------

#: Entry of `trainer_state.json` that says which cells of the epoch are done.
POSITION_KEY = "StreamPosition"


class KeepPosition(TrainerCallback):
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
