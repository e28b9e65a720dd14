"""What ends a run that hangs: a process or a loader worker that has stopped would let all others wait for ever.

Owns how long a run may be silent, and showing where it hangs; leaves killing the other processes to `torchrun`, which
does so when one of them ends.
"""

import faulthandler
import multiprocessing
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from transformers import TrainerCallback, TrainerState

from perturbgene.errors import EXIT_FAILED

T = TypeVar("T")

#: Seconds in which a run must finish a batch, a step, a checkpoint or an evaluation; within one, a large file may have
#: to be fetched.
LONGEST_SILENCE = 3600.0
#: The silence is counted in so many parts, so that a machine that sleeps and a job that is stopped lose one at most.
NUM_PARTS = 20
#: Seconds in which loader workers write where they are.
_SECONDS_FOR_STACKS = 1.0


def show_stack_when_asked() -> None:
    """Let this process write where it is when it gets SIGUSR2; where there is no such signal, nothing happens."""
    if hasattr(signal, "SIGUSR2"):
        faulthandler.register(signal.SIGUSR2, file=2)  # sys.stderr of a notebook is no file


def end_with_stacks(text: str) -> None:
    """Write where all threads and loader workers are, and a line; then end with exit code 3.

    An interactive session, such as a notebook, is only told.
    """
    workers = multiprocessing.active_children()
    with suppress(OSError):  # nobody reads stderr
        faulthandler.dump_traceback(file=2)
        for worker in workers:
            os.write(2, f"\nLoader worker {worker.pid}:\n".encode())
            if worker.pid is not None and hasattr(signal, "SIGUSR2"):
                os.kill(worker.pid, signal.SIGUSR2)
                time.sleep(_SECONDS_FOR_STACKS)
        rank = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""
        os.write(2, f"\n{rank}error: {text}\n".encode())
    if not hasattr(sys, "ps1"):
        _kill(workers)
        os._exit(EXIT_FAILED)


def _kill(workers: Iterable[Any]) -> None:
    for worker in workers:
        worker.kill()


def kill_workers_at_exit() -> None:
    """Let no loader worker keep this process from ending: they outlive the SIGTERM by which Python would end them."""

    def kill() -> None:
        with suppress(AttributeError, ValueError):  # Windows has no such signal; not the main thread
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise an error for each
        _kill(worker for worker in multiprocessing.active_children() if worker.daemon)

    multiprocessing.util.Finalize(None, kill, exitpriority=0)


class WatchDog(TrainerCallback):
    """Ends the process, after its stacks and those of its loader workers, when nothing happens."""

    def __init__(self) -> None:
        self._has_moved, self._num_pauses, self._step = True, 0, 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs."""
        self._has_moved, is_over = True, threading.Event()
        thread = threading.Thread(target=self._watch, args=(is_over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time that something without steps takes."""
        self._num_pauses += 1
        try:
            yield
        finally:
            self._num_pauses -= 1

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches, each of which shows that the process is alive."""
        for batch in batches:
            self._has_moved = True
            yield batch

    def _watch(self, is_over: threading.Event) -> None:
        num_parts = 0
        while not is_over.wait(LONGEST_SILENCE / NUM_PARTS):
            num_parts = 0 if self._has_moved or self._num_pauses else num_parts + 1
            self._has_moved = False
            if num_parts >= NUM_PARTS:
                num_parts = 0
                end_with_stacks(
                    f"training hangs: nothing has happened for {LONGEST_SILENCE / 60:.3g} minutes after step "
                    f"{self._step}. Above is where this process and its loader workers are. Another process may have "
                    "stopped, or a disk or network does not answer; then continue with --resume_from_checkpoint."
                )

    def _move(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._has_moved, self._step = True, state.global_step

    on_step_begin = on_substep_end = on_step_end = on_evaluate = on_save = on_log = _move
