"""Stopping at the end of a step: what a run does on SIGTERM, SIGINT and SIGUSR1, the signals of schedulers and people.

Owns the handlers and the agreement of all ranks on one step; leaves saving to the trainer and the exit code to the
command line.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
#: Seconds that a loader worker lives on after SIGTERM, so that the step under way gets its cells.
_GRACE_SECONDS = 120


def outlive_signals(worker: int) -> None:
    """Let a loader worker go on when its whole process group is signalled: the trainer ends it after the step.

    Also a worker that hangs is gone in the end: SIGTERM only gives it time.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE_SECONDS))


class StopOnSignal(TrainerCallback):
    """Ends training after the present step on a signal, with a checkpoint; a second signal acts at once.

    Attributes:
        stopped_by: Number of the signal on which all ranks have stopped; 0 while they go on.
    """

    def __init__(self) -> None:
        self._received = self.stopped_by = 0
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._received = self.stopped_by = 0
        if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # numbers of the host: no waiting for the device
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self.give_back()
        text = f"\n{signal.Signals(number).name}: finishing this step and saving; once more ends at once\n"
        os.write(2, text.encode())  # a logger may be at work at this very moment

    def give_back(self) -> None:
        """Put back the handlers of before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.give_back()

    def _agreed(self) -> int:
        """Return the signal that any rank has received: all must stop after the same step."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return self._received
        number = torch.tensor(self._received)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        return int(number)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.stopped_by = self._agreed()
        if self.stopped_by:
            control.should_training_stop = True
            control.should_save = control.should_save or not _is_whole(state.epoch)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let an epoch that has ended be evaluated and saved; stopped in its midst, it has not ended."""
        if self.stopped_by:
            is_over = _is_whole(state.epoch)
            control.should_save = is_over
            control.should_evaluate, control.should_log = control.should_evaluate and is_over, is_over


def _is_whole(epoch: float | None) -> bool:
    return epoch is not None and float(epoch).is_integer()
