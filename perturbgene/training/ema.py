"""Averaged weights: an exponential moving average beside the trained ones, which is evaluated and delivered.

Owns the average, its file in checkpoints and swapping it in; leaves when that happens to the trainer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerState

EMA_FILE = "ema.safetensors"


def decay_at(step: int, decay: float) -> float:
    """Return how much of the average stays at a step, counted from 1: little at first, when weights are far from good.

    Example:
        >>> [round(decay_at(step, 0.999), 2) for step in (1, 10, 100_000)]
        [0.18, 0.55, 1.0]
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """The moving average of a model's trained parameters, in float32 on their device.

    Args:
        model: Whose parameters are followed, by name.
        decay: Share of the average that stays at each step, in (0, 1).
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self._trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.average = {name: weight.detach().float().clone() for name, weight in self._trained.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after a step, counted from 1."""
        weights = [weight.detach().float() for weight in self._trained.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay_at(step, self.decay))

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Put the average in place of the weights."""
        for name, weight in self._trained.items():
            weight.copy_(self.average[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the model hold the average for a while."""
        kept = {name: weight.detach().clone() for name, weight in self._trained.items()}
        self.copy_to_model()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in self._trained.items():
                    weight.copy_(kept[name])

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        save_file({name: value.cpu().contiguous() for name, value in self.average.items()}, folder / EMA_FILE)

    def load(self, folder: Path) -> None:
        """Continue the average of a checkpoint; one that was saved without starts at its weights."""
        path = folder / EMA_FILE
        saved = load_file(path) if path.is_file() else {name: weight.detach() for name, weight in self._trained.items()}
        for name, value in self.average.items():
            value.copy_(saved[name])


class FollowWeights(TrainerCallback):
    """Updates an average after each step."""

    def __init__(self, ema: Ema) -> None:
        self.ema = ema

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.ema.update(state.global_step)
