"""Where work runs: in this process, in a pool of processes on this machine, or on a Dask cluster.

Owns handing out tasks and collecting results; knows nothing of what they do. A task is a function of a context (the
same for all) and an item; its result must not depend on where or in which order it runs.
"""

import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from perturbgene.errors import InputError

#: Tasks handed out ahead of each process, so that none waits and none of thousands is held in memory.
_AHEAD = 2


class WorkStoppedError(InputError):
    """The work stopped half-way for a reason outside of it; what is finished stays and is used by the next run."""


class Workers:
    """Runs tasks, here or elsewhere.

    Args:
        executor: What runs them; None runs them in this process, one after the other.
        num_processes: How many run at once.
    """

    def __init__(self, executor: Executor | None = None, *, num_processes: int = 1) -> None:
        self.executor, self.num_processes = executor, num_processes

    def run(self, task: Callable[[Any, Any], Any], context: Any, items: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield (item, result) as results come, in any order."""
        if self.executor is None:
            for item in items:
                yield item, task(context, item)
            return
        waiting = iter(items)
        running: dict[Future[Any], Any] = {}
        try:
            while True:
                while len(running) < _AHEAD * self.num_processes and (item := next(waiting, None)) is not None:
                    running[self.executor.submit(task, context, item)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise WorkStoppedError(
                "a worker process was ended from outside, perhaps for want of memory. Run the same command again to "
                "continue from there, with a smaller --num_processes if memory is short. In a script of your own, call "
                "prepare under `if __name__ == '__main__':`, as each worker imports the script."
            ) from error
        finally:
            for future in running:
                future.cancel()


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone: a killed run must leave none behind."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def available_cores() -> int:
    """Count the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _process_pool(num_processes: int, *, preload: str) -> Iterator[Workers]:
    # Never fork: a child would share the parent's open HDF5 files and locks. A fork server has none of them.
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload(["__main__", preload])
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_end_with_parent)
    try:
        yield Workers(pool, num_processes=num_processes)
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _dask_cluster(address: str) -> Iterator[Workers]:
    try:
        distributed = importlib.import_module("distributed")
    except ImportError as error:
        raise InputError(
            f"--scheduler {address} needs Dask, which is not installed. Install it with "
            "`pip install perturbgene[cluster]`, or leave --scheduler out."
        ) from error
    try:
        client = distributed.Client(address, timeout="30s", set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(
            f"no Dask scheduler answers at {address} ({error}). Start one with `dask scheduler`, or check --scheduler."
        ) from error
    with client:
        num_threads = sum(client.nthreads().values())
        if not num_threads:
            raise InputError(f"the Dask scheduler at {address} has no workers. Start some: `dask worker {address}`.")
        executor = client.get_executor(pure=False, retries=3)
        try:
            yield Workers(executor, num_processes=num_threads)
        except distributed.KilledWorker as error:
            raise WorkStoppedError(
                f"workers of {address} died again and again on the same task ({error}). Give them more memory, then "
                "run the same command again to continue from there."
            ) from error
        finally:
            executor.shutdown(wait=False)


@contextmanager
def open_workers(*, scheduler: str | None, num_processes: int, preload: str) -> Iterator[Workers]:
    """Open the place where tasks run, and close it afterwards.

    Args:
        scheduler: Address of a Dask scheduler, or None for this machine.
        num_processes: Processes on this machine; 1 stays in this one.
        preload: Module that the tasks come from.

    Raises:
        InputError: Dask is not installed, or nothing answers at the address.
    """
    if scheduler:
        with _dask_cluster(scheduler) as workers:
            yield workers
    elif num_processes > 1:
        with _process_pool(num_processes, preload=preload) as workers:
            yield workers
    else:
        yield Workers()
