"""Whether a run can tell the labels of a phenotype at all: its held-out score next to the most frequent label.

Owns reading that score from the run folder, whether its transformer was trained, and the line that says why p and q are
left out; leaves computing scores to `training` and `evaluate`.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perturbgene.configs import load_config
from perturbgene.errors import InputError
from perturbgene.files import read_json
from perturbgene.inference.run import Run

#: Where a run has scores of held-out cells: those of its training, then those of `evaluate`.
SCORE_FILES = ("metrics.json", "evaluation/metrics.json")


@dataclass(frozen=True)
class HeldOutScore:
    """How often a run is right about a phenotype of cells that it was not trained on."""

    category: str
    accuracy: float
    majority: float  # accuracy of answering the most frequent label for every cell
    num_cells: int

    def __str__(self) -> str:
        return (
            f"{self.category} of {self.num_cells:,} held-out cells: accuracy {self.accuracy:.3f}, "
            f"the most frequent label alone {self.majority:.3f}"
        )


def held_out_score(run: Run, category: str) -> HeldOutScore | None:
    """Return the score of a phenotype asked alone; None if the run folder has none, or not its majority baseline."""
    for name in SCORE_FILES:
        try:
            scores_of: Any = read_json(Path(run.path) / name)[category]
            scores = scores_of["classifier" if run.is_classifier else "alone"]
            share = scores["majority_share"] if "majority_share" in scores else scores_of["majority"]["accuracy"]
            found = HeldOutScore(category, float(scores["accuracy"]), float(share), int(scores["n"]))
        except (OSError, ValueError, KeyError, TypeError):  # no such file, phenotype or number (NaN is stored as null)
            continue
        if not scores.get("n_training_cells"):
            return found
    return None


def doubt_about(run: Run, category: str) -> str | None:
    """Say why the run's answers about a phenotype deserve no p and q; None if its held-out score supports them.

    It must be better than the most frequent label by two standard errors, or half of all meaningless labels would pass.
    """
    score = held_out_score(run, category)
    if score is None:
        return (
            f"{run.path} has no score of {category} on held-out cells next to the most frequent label "
            f"(`perturbgene evaluate {run.path}` computes it)"
        )
    if score.accuracy <= score.majority:
        return f"the run is not better than the most frequent label ({score})"
    if score.accuracy <= score.majority + 2 * math.sqrt(score.majority * (1 - score.majority) / score.num_cells):
        return f"the run is not better than the most frequent label by more than chance ({score})"
    return None


def about_untrained(run: str | Path) -> list[str]:
    """Say that answers about genes are random if the run's transformer has learned nothing; of other runs nothing."""
    with suppress(InputError, OSError):
        config = load_config(Path(run) / "run.yaml")
        if getattr(config, "train_only", None) == "votes" and not getattr(config, "pretrained_model_path", None):
            return [
                f"{run} was trained with --train_only votes, so its transformer is random, and so is what it says "
                "about genes: only its answers about phenotypes mean something. Train without --train_only."
            ]
    return []


def about_q(doubt: str, *, is_shown: bool) -> str:
    """Say in one line that p and q are left out, or shown all the same, and why they should not be trusted."""
    if is_shown:
        return f"Do not trust p and q, which --show_q asked for: {doubt}."
    return f"No p and q: {doubt}. --show_q gives them anyway."
