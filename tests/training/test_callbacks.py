"""What a run shows is counted from its batches: one bar in a terminal, few lines in a log file."""

import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from perturbgene.training import callbacks
from perturbgene.training.callbacks import FewerEvaluations, Progress, Speed, StopOnSignal, show_figures
from tests.forked import needs_fork, start


class Clock:
    now = 0.0


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the clock until a test moves it."""
    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    Clock.now = 0.0


@pytest.fixture
def speed() -> Speed:
    speed = Speed()
    speed.start()
    return speed


def padded_batch() -> dict[str, object]:
    """Two cells of 4 and 2 tokens, padded to 4; numbers 7 and 9."""
    return {"input_ids": torch.zeros(2, 4), "cells": np.array([[7, 9], [4, 2]])}


def test_rates_are_counts_by_seconds(speed: Speed) -> None:
    speed.count([padded_batch(), padded_batch()])
    Clock.now = 2.0
    rates = speed.rates()
    assert (rates["cells_per_second"], rates["tokens_per_second"]) == (2, 6)


def test_counts_start_again_after_a_log(speed: Speed) -> None:
    speed.count([padded_batch()])
    Clock.now = 1.0
    speed.rates()
    Clock.now = 2.0
    assert speed.rates()["cells_per_second"] == 0


def test_the_time_of_an_evaluation_does_not_count(speed: Speed) -> None:
    speed.count([padded_batch()])
    with speed.paused():
        Clock.now = 99.0
    Clock.now = 100.0
    assert speed.rates()["cells_per_second"] == 2


def test_what_concerns_the_host_does_not_reach_the_model(speed: Speed) -> None:
    batch = padded_batch()
    speed.count([batch])
    assert "cells" not in batch
    assert speed.cells[0][0].tolist() == [7, 9]


def test_the_largest_batch_that_went_through_is_known(speed: Speed) -> None:
    speed.count([padded_batch()])
    assert speed.most_tokens == 0  # the model has not finished it yet
    speed.count([])
    assert speed.most_tokens == 6


def train(steps: int, *, seconds_per_step: float, is_terminal: bool = False) -> None:
    """Let a progress callback watch a run that logs every tenth step and evaluates at the end."""
    args = TrainingArguments("unused", disable_tqdm=not is_terminal, eval_strategy="epoch", logging_steps=10)
    state, control, progress = TrainerState(max_steps=steps), TrainerControl(), Progress()
    progress.on_train_begin(args, state, control)
    for step in range(1, steps + 1):
        Clock.now += seconds_per_step
        state.global_step = step
        progress.on_step_end(args, state, control)
        if step % 10 == 0:
            progress.on_log(args, state, control, logs={"loss": 2.5, "cells_per_second": 976.0})
    progress.on_log(args, state, control, logs={"eval_loss": 0.5})
    progress.close()


@pytest.mark.parametrize(
    ("steps", "seconds", "lines"), [(1200, 0.1, 2), (1200, 10.0, 10)], ids=["two minutes", "three hours"]
)
def test_a_log_file_gets_a_line_per_minute_or_tenth_whichever_is_rarer(
    steps: int, seconds: float, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="perturbgene"):
        train(steps, seconds_per_step=seconds)
    assert sum(record.message.startswith("step ") for record in caplog.records) == lines
    assert caplog.records[-2].message.startswith(f"step {steps}/{steps}")
    assert caplog.records[-1].message == f"evaluated at step {steps} · loss 0.5"


def test_the_time_that_a_run_takes_is_printed_after_its_first_steps(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="perturbgene"):
        train(1200, seconds_per_step=1.0)
    assert caplog.records[0].message == "training for 1,200 steps"
    assert caplog.records[1].message == "about 20 minutes for the remaining 1,196 steps, evaluations not counted"


def test_a_terminal_gets_one_bar_with_loss_speed_and_time_left(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level("INFO", logger="perturbgene"):
        train(100, seconds_per_step=1.0, is_terminal=True)
    assert not [record for record in caplog.records if record.message.startswith("step ")]
    last = capsys.readouterr().err.split("\r")[-1]
    assert "step 100/100" in last and last.endswith("left, loss 2.5, 976 cells/s\n")


def test_a_stopped_run_does_not_go_back_to_its_best_weights() -> None:
    args = TrainingArguments("unused", eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True)
    control, stop = TrainerControl(), StopOnSignal()
    stop._received = callbacks.SIGNALS[0]
    stop.on_step_end(args, TrainerState(epoch=0.5), control)
    assert control.should_save and control.should_training_stop and not args.load_best_model_at_end


def test_passes_between_evaluations_are_neither_scored_nor_saved_but_the_last_is() -> None:
    scored = []
    for epoch in range(1, 13):
        control = TrainerControl(should_training_stop=epoch == 12, should_evaluate=True, should_save=True)
        FewerEvaluations(5).on_epoch_end(None, TrainerState(epoch=epoch), control)
        assert control.should_evaluate == control.should_save
        scored += [epoch] * control.should_evaluate
    assert scored == [5, 10, 12]


def test_figures_are_shown_in_tensorboard_and_drawn_for_nobody_else(tmp_path) -> None:
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers.integrations import TensorBoardCallback

    asked = TensorBoardCallback()
    asked.logging_dir = str(tmp_path)
    show_figures(lambda: {"confusion/cell_type.alone": Figure((1, 1))}, [asked], step=7)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [one.step for one in events.Images("confusion/cell_type.alone")] == [7]
    show_figures(lambda: pytest.fail("nobody asked"), [], step=7)


def test_a_second_signal_acts_at_once() -> None:
    heard: list[int] = []
    before, stop = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number)), StopOnSignal()
    try:
        stop.on_train_begin()
        signal.raise_signal(signal.SIGTERM)
        assert heard == []
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        stop.give_back()
        signal.signal(signal.SIGTERM, before)


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    before, stop = signal.signal(signal.SIGHUP, signal.SIG_IGN), StopOnSignal()
    try:
        stop.on_train_begin()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == stop._note
    finally:
        stop.give_back()
        signal.signal(signal.SIGHUP, before)


@needs_fork
def test_a_loader_worker_shows_its_own_errors_but_not_that_the_trainer_went_away(tmp_path: Path) -> None:
    def work() -> None:
        callbacks.outlive_signals(0)
        for error in (ConnectionResetError("gone"), EOFError("gone"), KeyError("own")):
            sys.excepthook(type(error), error, None)

    process = start(work, output=tmp_path / "said")
    process.join(timeout=60)
    assert (process.exitcode, (tmp_path / "said").read_text()) == (0, "KeyError: 'own'\n")
