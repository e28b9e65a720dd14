"""What a run tells of itself is counted from the batches, and breaks the run when it must."""

import time

import numpy as np
import pytest
import torch

from perturbgene.model import GeneBertConfig
from perturbgene.training import callbacks as watch_module
from perturbgene.training.callbacks import Watch

CONFIG = GeneBertConfig(hidden_size=2, num_attention_heads=1, intermediate_size=3, num_hidden_layers=1, vocab_size=5)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A watch whose clock stands still unless told, on a machine of 1,000 operations a second."""
    monkeypatch.setattr(watch_module, "_peak", lambda device, dtype: 1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    Clock.now = 0.0
    watch = Watch(CONFIG, torch.device("cpu"), torch.float32)
    watch.begin(0)
    return watch


class Clock:
    now = 0.0


def padded_batch() -> dict[str, object]:
    """Two cells of 4 and 2 tokens, padded to 4; numbers 7 and 9."""
    return {"input_ids": torch.zeros(2, 4), "cells": np.array([[7, 9], [4, 2]]), "label_positions": torch.tensor([1])}


def test_rates_are_counts_by_seconds(watch: Watch) -> None:
    watch.see([padded_batch(), padded_batch()])
    Clock.now = 2.0
    rates = watch.rates(1, 5)
    assert (rates["cells_per_second"], rates["tokens_per_second"], rates["padding"]) == (2, 6, 0.25)
    assert rates["seconds_left"] == 8


def test_the_share_of_the_peak_is_of_needed_operations(watch: Watch) -> None:
    watch.see([{"input_ids": torch.zeros(4), "cells": np.array([[7], [4]]), "label_positions": torch.tensor([1])}])
    Clock.now = 1.0
    rates = watch.rates(1, 5)
    assert rates["flops_per_second"] == 492  # three times the 164 of the example in `flops`
    assert rates["mfu"] == 0.492


def test_counts_start_anew_after_a_log(watch: Watch) -> None:
    watch.see([padded_batch()])
    Clock.now = 1.0
    watch.rates(1, 5)
    Clock.now = 2.0
    assert watch.rates(2, 5)["cells_per_second"] == 0


def test_the_time_of_an_evaluation_does_not_count(watch: Watch) -> None:
    watch.see([padded_batch()])
    with watch.paused():
        Clock.now = 99.0
    Clock.now = 100.0
    assert watch.rates(1, 5)["cells_per_second"] == 2


def test_what_concerns_the_host_does_not_reach_the_model(watch: Watch) -> None:
    batch = padded_batch()
    watch.see([batch])
    assert "cells" not in batch
    assert watch.cells[0][0].tolist() == [7, 9]


def test_the_largest_batch_that_went_through_is_known(watch: Watch) -> None:
    watch.see([padded_batch()])
    assert watch.most_tokens == 0  # it has not gone through yet
    watch.see([])
    assert watch.most_tokens == 6


def test_a_loss_of_more_than_ten_times_the_usual_is_told(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    for step in range(10):
        watch.note_loss(1.0, step)
    watch.note_loss(9.9, 10)
    assert not caplog.records
    watch.note_loss(10.1, 11)
    assert "exploded: 10.1 at step 11, where 1 was usual" in caplog.text


def test_measuring_the_peak_leaves_random_numbers_alone() -> None:
    before = torch.random.get_rng_state()
    watch_module._peak.__wrapped__("cpu", torch.float32)  # type: ignore[attr-defined]
    assert torch.equal(torch.random.get_rng_state(), before)
