"""What ends a command of several processes when one of them hangs: the others would wait for it for ever.

Owns the sign of life that each process gives, in the store in which `torchrun` lets processes meet, and the look at
those of the others; leaves how long a silence may be, and showing stacks, to `training.watchdog`.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from torch.distributed import TCPStore
from torch.nn.modules.module import register_module_forward_pre_hook

from perturbgene.errors import listed
from perturbgene.training import watchdog

T = TypeVar("T")

#: Seconds in which all processes must have started; a cluster starts them one after another.
LONGEST_START = 1800.0


@contextmanager
def meeting() -> Iterator[None]:
    """End this process if the others do not come while the block waits for them."""
    timer = threading.Timer(LONGEST_START, _nobody_came)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _nobody_came() -> None:
    watchdog.end_with_stacks(
        f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but after {LONGEST_START / 60:.3g} minutes not all processes have "
        "started. Let torchrun start them all, or run the command in one process without WORLD_SIZE."
    )


class Heartbeat:
    """Ends this process when it waits for one that gives no sign of life, or hangs itself.

    A process that opens or writes a large file is alive, however long that takes. One that is stopped, or whose machine
    or network is gone, is not; nor is one that computes, but finishes no batch and enters no layer of a model.

    Args:
        rank: Number of this process.
        size: Number of processes.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank = rank
        self._silent_parts = dict.fromkeys(range(size), 0)  # of the longest silence
        self._num_beats = self._num_moves = 0
        self._is_computing = self._is_waiting = False
        # A connection of its own: the one of torch may wait for long.
        self._store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
        register_module_forward_pre_hook(self._move)
        for run in (self._exchange, self._watch):
            threading.Thread(target=run, daemon=True).start()

    def _move(self, *_: Any) -> None:
        self._num_moves += 1

    def watched(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield batches, within which this process must show that it is alive."""
        self._is_computing = True
        try:
            for batch in batches:
                self._move()
                yield batch
        finally:
            self._is_computing = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Expect signs of life of the other processes while the block runs."""
        self._silent_parts = dict.fromkeys(self._silent_parts, 0)
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    def _exchange(self) -> None:
        """Give signs of life and read those of the others, until the process that has the store ends."""
        seen: dict[int, bytes] = {}
        with suppress(RuntimeError):
            while True:
                self._store.set(f"alive/{self._rank}", str(self._num_beats))
                for rank in self._silent_parts:
                    beat = self._store.get(f"alive/{rank}") if self._store.check([f"alive/{rank}"]) else b""
                    if rank != self._rank and beat != seen.get(rank, b""):
                        seen[rank], self._silent_parts[rank] = beat, 0
                time.sleep(watchdog.LONGEST_SILENCE / watchdog.NUM_PARTS / 2)

    def _watch(self) -> None:
        num_moves, minutes = 0, watchdog.LONGEST_SILENCE / 60
        while True:
            time.sleep(watchdog.LONGEST_SILENCE / watchdog.NUM_PARTS)
            for rank in self._silent_parts:
                self._silent_parts[rank] += 1
            if not self._is_computing or self._num_moves != num_moves:
                num_moves, self._num_beats, self._silent_parts[self._rank] = self._num_moves, self._num_beats + 1, 0
            silent = [rank for rank, parts in self._silent_parts.items() if parts >= watchdog.NUM_PARTS]
            if self._rank in silent:
                watchdog.end_with_stacks(
                    f"this process hangs: it has computed nothing for {minutes:.3g} minutes. Above is where it is. "
                    "If a disk or network did not answer, run the same command again."
                )
            elif silent and self._is_waiting:
                watchdog.end_with_stacks(
                    f"no sign of life of process {listed(silent)} for {minutes:.3g} minutes; this one waits for it. It "
                    "was stopped, or its machine or network does not answer. Run the same command again."
                )
