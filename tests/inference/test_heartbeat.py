"""Of several processes, one that gives no sign of life ends those that wait for it, and one that hangs ends itself."""

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.distributed import TCPStore

from perturbgene.inference import heartbeat
from perturbgene.inference.heartbeat import Heartbeat
from perturbgene.inference.streaming import Ranks
from perturbgene.training import watchdog
from tests.forked import needs_fork, start

SILENCE = 0.6


@pytest.fixture
def first(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Process 0 of two, with what ended it; the test gives the signs of life of process 1."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    said, handles = list[str](), list[Any]()

    def register(hook: Callable[..., None]) -> None:
        handles.append(torch.nn.modules.module.register_module_forward_pre_hook(hook))

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(watchdog, "LONGEST_SILENCE", SILENCE)
    monkeypatch.setattr(watchdog, "end_with_stacks", said.append)
    monkeypatch.setattr(heartbeat, "register_module_forward_pre_hook", register)
    process = Heartbeat(0, 2)
    yield SimpleNamespace(process=process, said=said, beat=lambda: store.set("alive/1", str(time.monotonic())))
    handles[0].remove()
    process._store = Mock(set=Mock(side_effect=RuntimeError))  # ends the thread that asks the store
    time.sleep(SILENCE / 10)


def for_long(do: Callable[[], object] = lambda: None) -> None:
    """Do something again and again for longer than a process may be silent."""
    end = time.monotonic() + 1.5 * SILENCE
    while time.monotonic() < end:
        do()
        time.sleep(SILENCE / 50)


def test_a_process_ends_if_it_waits_for_one_that_gives_no_sign_of_life(first: Any) -> None:
    for_long()  # it does not wait
    with first.process.waiting():
        for_long(first.beat)
        assert first.said == []
        for_long()
    assert first.said[0].startswith("no sign of life of process 1 for 0.01 minutes; this one waits for it.")


def test_a_process_ends_if_it_computes_nothing_within_a_batch(first: Any) -> None:
    layer = torch.nn.Linear(1, 1)
    for _ in first.process.watched([1]):
        for_long(lambda: layer(torch.ones(1)))
        assert first.said == []
        for_long()
    assert first.said[0].startswith("this process hangs: it has computed nothing for 0.01 minutes.")


@needs_fork
def test_a_process_ends_if_the_others_do_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "LONGEST_START", 1.0)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    process = start(lambda: Ranks.join("cpu"), output=tmp_path / "said", **place)
    process.join(timeout=60)
    process.kill()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 3, said
    assert "in join" in said
    assert "process 0: error: WORLD_SIZE is 2, but after 0.0167 minutes not all processes have started. Let" in said
