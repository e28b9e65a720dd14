"""Running tasks that each write one file: in this process, in a pool of processes or on a Dask cluster.

Owns handing out tasks, and the journal of finished files from which an interrupted run continues; knows nothing of what
the files hold. What a task returns and writes must not depend on where or in which order it runs.
"""

import gc
import importlib
import json
import logging
import multiprocessing
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm.auto import tqdm

from perturbgene.errors import InputError, RunFailedError
from perturbgene.files import sums_of

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.jsonl"

#: Tasks submitted ahead for each process: none of them waits, and thousands of tasks are not held in memory.
_AHEAD = 2


class WorkStoppedError(RunFailedError):
    """The work stopped for a reason outside of it. Finished files stay, and the next run uses them."""


class Journal:
    """The finished files of one folder, one line each. The first line names what they were made from, as a key."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.path = folder / JOURNAL_FILE
        self.done: dict[str, dict[str, Any]] = {}  # file -> entry

    def begin(self) -> None:
        """Start an empty journal."""
        self.path.write_text(json.dumps({"key": self.key}) + "\n", encoding="utf-8")

    def resume(self) -> bool:
        """Read which files are finished and unchanged; return False if the journal is missing or has another key."""
        entries = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []:
            try:
                entries.append(json.loads(line))
            except (ValueError, RecursionError):  # a killed process wrote half of it
                break
        if not entries or entries[0].get("key") != self.key:
            return False
        self.begin()
        for entry in entries[1:]:
            path = self.folder / entry["file"]
            if path.is_file() and sums_of(path).items() <= entry.items():
                self.add(entry)
        return True

    def add(self, entry: dict[str, Any]) -> None:
        """List a finished file: its `file`, `bytes` and `sha256`, and what its task returned."""
        self.done[entry["file"]] = entry
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def _write_file(
    task: Callable[[Any, Any, Path], dict[str, Any]], context: Any, folder: Path, file_and_item: tuple[str, Any]
) -> dict[str, Any]:
    """Run a task that writes one file; return the journal entry of the file."""
    file, item = file_and_item
    # A cluster may run a task twice at once, if it has lost sight of a worker: each attempt has its own name.
    temporary = folder / f"{file}.{uuid.uuid4().hex}.tmp"
    try:
        facts = task(context, item, temporary)
        entry = {"file": file, **sums_of(temporary), **facts}
        temporary.replace(folder / file)
    except Exception as error:
        error.add_note(f"while writing {folder / file}")
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return entry


@dataclass(frozen=True)
class Workers:
    """What runs tasks."""

    executor: Executor | None = None  # None runs them in this process, one after the other
    num_processes: int = 1  # how many run at once
    losses: tuple[type[Exception], ...] = (BrokenExecutor,)  # errors that mean that a worker process has died

    def run(self, task: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield (item, result) as results come, in any order."""
        if self.executor is None:
            yield from ((item, task(item)) for item in items)
            return
        waiting, running = iter(items), dict[Future[Any], Any]()
        try:
            while True:
                while len(running) < _AHEAD * self.num_processes and (item := next(waiting, None)) is not None:
                    with _hidden_script():
                        running[self.executor.submit(task, item)] = item
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except self.losses as error:
            raise WorkStoppedError(
                f"a worker process was killed from outside, perhaps because memory ran out ({error}). Run the same "
                "command again to continue, with a smaller --num_processes or workers with more memory."
            ) from error
        finally:
            for future in running:
                future.cancel()

    def write_files(
        self, task: Callable[[Any, Any, Path], dict[str, Any]], context: Any, items: Mapping[str, Any], *,
        journal: Journal, cells: Mapping[str, int], text: str,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Write the files that the journal does not list yet; return the entries of all, in the order of `items`.

        Args:
            task: Writes one file: called with the context, an item and a path; returns what to note in the journal.
            items: File -> item.
            cells: File -> its number of cells, for the progress bar.
            text: Name of the step.
        """
        to_do = [(file, item) for file, item in items.items() if file not in journal.done]
        num_done = len(items) - len(to_do)
        if num_done:
            logger.info("%s: %d of %d files were finished by an earlier run", text, num_done, len(items))
        total, done = sum(cells.values()), sum(cells[file] for file in items if file in journal.done)
        with tqdm(total=total, initial=done, desc=text, unit=" cells", unit_scale=True, disable=None) as bar:
            for (file, _), entry in self.run(partial(_write_file, task, context, journal.folder), to_do):
                journal.add(entry)
                bar.update(cells[file])
        return [journal.done[file] for file in items]


@contextmanager
def open_workers(*, scheduler: str | None, num_processes: int, preload: str) -> Iterator[Workers]:
    """Open the place where tasks run (a Dask cluster, new processes or this one), and close it afterwards.

    Processes on this machine import the module `preload`, where the tasks come from, once.
    """
    with ExitStack() as stack:
        if scheduler:
            try:
                distributed = importlib.import_module("distributed")
                client = distributed.Client(scheduler, timeout="30s", set_as_default=False)
            except ImportError as error:
                raise InputError(
                    f"--scheduler {scheduler} needs Dask, which is not installed. Install it with "
                    "`pip install perturbgene[cluster]`, or leave --scheduler out."
                ) from error
            except (OSError, ValueError, TimeoutError) as error:
                raise InputError(
                    f"no Dask scheduler answers at {scheduler} ({error}). Start one with `dask scheduler`, or check "
                    "--scheduler."
                ) from error
            stack.enter_context(client)
            num_threads = sum(client.nthreads().values())
            if not num_threads:
                raise InputError(
                    f"the Dask scheduler at {scheduler} has no workers. Start some: `dask worker {scheduler}`."
                )
            executor: Executor = client.get_executor(pure=False, retries=3)
            stack.callback(executor.shutdown, wait=False)
            yield Workers(executor, num_threads, (distributed.KilledWorker,))
        elif num_processes > 1:
            # Never fork: a child would share this process's open HDF5 files and locks. A fork server has none of them.
            has_server = "forkserver" in multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context("forkserver" if has_server else "spawn")
            if has_server:
                context.set_forkserver_preload([preload])
            executor = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin)
            stack.callback(executor.shutdown, cancel_futures=True)
            yield Workers(executor, num_processes)
        else:
            yield Workers()


@contextmanager
def _hidden_script() -> Iterator[None]:
    """Hide the script of this process from processes that start: they would run it again, but need only our modules.

    So `prepare` works in notebooks, from standard input and in scripts without `if __name__ == "__main__"`.
    """
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _begin() -> None:
    """End this worker process when the process that started it is gone: a killed run must not leave any behind.

    What it has from the fork server is never garbage: looking for garbage there would copy the pages that they share.
    """
    gc.freeze()
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
