"""Held-out scores: where they are read, and when they leave a doubt."""

import json
from pathlib import Path
from typing import Any

import pytest

from perturbgene.eval_utils import Confusion
from perturbgene.inference.held_out import doubt_about, held_out_score
from perturbgene.inference.run import Run
from tests.untrained import a_run, save_score


def run_in(folder: Path, kind: str = "mlm") -> Run:
    run = a_run(kind)
    return Run(run.model, run.tokenizer, str(folder))


def write(folder: Path, scores: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"tissue": scores}))


def test_the_majority_share_is_that_of_the_most_frequent_true_label() -> None:
    confusion = Confusion(["B", "NK", "T"])
    confusion.add([0, 0, 0, 1, 2], [2, 2, 2, 2, 2])
    assert confusion.scores()["majority_share"] == 3 / 5


def test_a_score_is_read_from_the_run(tmp_path: Path) -> None:
    save_score(tmp_path, "tissue", accuracy=0.7)
    score = held_out_score(run_in(tmp_path), "tissue")
    assert score is not None and (score.accuracy, score.majority, score.num_cells) == (0.7, 0.5, 100)
    assert held_out_score(run_in(tmp_path), "cell_type") is None


def test_a_classifier_has_a_score_of_its_own_question(tmp_path: Path) -> None:
    save_score(tmp_path, "cell_type", accuracy=0.7, question="classifier")
    assert held_out_score(run_in(tmp_path), "cell_type") is None
    assert held_out_score(run_in(tmp_path, "cls"), "cell_type") is not None


def test_a_run_without_its_majority_has_that_of_evaluate(tmp_path: Path) -> None:
    write(tmp_path, {"alone": {"n": 9, "accuracy": 0.9}})
    assert held_out_score(run_in(tmp_path), "tissue") is None
    evaluated = {"alone": {"n": 8, "accuracy": 0.6}, "majority": {"n": 8, "accuracy": 0.5}}
    write(tmp_path / "evaluation", evaluated)
    score = held_out_score(run_in(tmp_path), "tissue")
    assert score is not None and (score.accuracy, score.majority, score.num_cells) == (0.6, 0.5, 8)


def test_a_score_of_training_cells_is_none(tmp_path: Path) -> None:
    alone = {"n": 9, "accuracy": 0.9, "majority_share": 0.5, "n_training_cells": 4}
    write(tmp_path, {})
    write(tmp_path / "evaluation", {"alone": alone})
    assert held_out_score(run_in(tmp_path), "tissue") is None


@pytest.mark.parametrize("text", ["", "[]", '{"tissue": null}', '{"tissue": {"alone": {"n": 0, "accuracy": null}}}'])
def test_a_file_without_a_score_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.json").write_text(text)
    assert held_out_score(run_in(tmp_path), "tissue") is None


@pytest.mark.parametrize(
    ("accuracy", "doubt"),
    [
        (0.61, None),
        (0.59, "not better than the most frequent label by more than chance (tissue of 100 held-out cells"),
        (0.5, "not better than the most frequent label (tissue"),
        (None, "has no score of"),
    ],
)
def test_a_score_two_standard_errors_above_the_majority_leaves_no_doubt(
    tmp_path: Path, accuracy: float | None, doubt: str
) -> None:
    if accuracy is not None:
        save_score(tmp_path, "tissue", accuracy=accuracy)
    found = doubt_about(run_in(tmp_path), "tissue")
    assert found is None if doubt is None else doubt in (found or "")
