"""Processes that begin as copies of the one that runs the tests, so that they import nothing again.

Owns starting them and collecting what they print; leaves what they do to the tests, as functions. Where a system cannot
fork safely, tests that need this are skipped.
"""

import logging
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

needs_fork = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes start by fork")


@dataclass(frozen=True)
class Ended:
    """How processes ended, and what all of them printed."""

    codes: list[int | None]
    printed: str


def start(run: Callable[[], object], *, output: Path | None = None, **environment: str) -> BaseProcess:
    """Run a function in a copy of this process; what it prints goes to a file, or to nobody."""
    process = multiprocessing.get_context("fork").Process(target=_begin, args=(run, output, environment))
    process.start()
    return process


def _begin(run: Callable[[], object], output: Path | None, environment: dict[str, str]) -> None:
    """Shed what belongs to the process of the tests: its output, its loggers and what it knows of other processes."""
    from accelerate.state import AcceleratorState, GradientState

    os.environ.update(environment)
    with open(os.devnull if output is None else output, "w", buffering=1) as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        sys.stdout = sys.stderr = stream
        logging.getLogger().handlers.clear()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        run()


def in_two_processes(words: Sequence[str], folder: Path, *, before: Callable[[], None] | None = None) -> Ended:
    """Run a command line in two processes that know of each other as under torchrun.

    Args:
        words: Of `perturbgene`.
        folder: Where their output goes.
        before: Called in each process at first.
    """
    from perturbgene.main import cli

    def run() -> None:
        if before is not None:
            before()
        sys.argv = ["perturbgene", *words]
        cli()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    folder.mkdir(exist_ok=True)
    outputs = [folder / f"output_{rank}.txt" for rank in range(2)]
    processes = [
        start(run, output=output, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank, output in enumerate(outputs)
    ]
    for process in processes:
        has_failed = any(one.exitcode for one in processes)
        process.join(timeout=15 if has_failed else 200)  # torchrun ends the others, too
        process.kill()
        process.join()
    return Ended([process.exitcode for process in processes], "".join(output.read_text() for output in outputs))
