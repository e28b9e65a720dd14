"""Averaged weights follow the trained ones, and survive a checkpoint."""

from pathlib import Path

import pytest
import torch

from perturbgene.training.ema import Ema, decay_at


@pytest.fixture
def model() -> torch.nn.Module:
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    return model


def move_to(model: torch.nn.Module, value: float) -> None:
    torch.nn.init.constant_(model.weight, value)  # type: ignore[arg-type]


def test_the_average_moves_by_one_minus_the_decay(model: torch.nn.Module) -> None:
    ema = Ema(model, 0.25)  # below (1 + 8) / (10 + 8), so it holds from step 8 on
    move_to(model, 5.0)
    ema.update(8)
    assert ema.average["weight"].tolist() == [[4.0, 4.0]]  # 0.25 * 1 + 0.75 * 5


def test_first_steps_forget_the_start_fast() -> None:
    assert decay_at(1, 0.999) == pytest.approx(2 / 11)


def test_weights_come_back_after_the_average_was_swapped_in(model: torch.nn.Module) -> None:
    ema = Ema(model, 0.5)
    move_to(model, 3.0)
    with ema.swapped_in():
        assert model.weight.tolist() == [[1.0, 1.0]]
    assert model.weight.tolist() == [[3.0, 3.0]]


def test_a_loaded_average_is_the_saved_one(model: torch.nn.Module, tmp_path: Path) -> None:
    ema = Ema(model, 0.5)
    move_to(model, 3.0)
    ema.update(100)
    ema.save(tmp_path)
    other = Ema(model, 0.5)
    other.load(tmp_path)
    assert torch.equal(other.average["weight"], ema.average["weight"])


def test_a_checkpoint_without_an_average_starts_it_at_its_weights(model: torch.nn.Module, tmp_path: Path) -> None:
    ema = Ema(model, 0.5)
    move_to(model, 3.0)
    ema.load(tmp_path)
    assert ema.average["weight"].tolist() == [[3.0, 3.0]]
