"""`evaluate` asks for a phenotype with every set of the others given, and each answer has its own temperature."""

import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest

from perturbgene.eval_utils import further_questions
from perturbgene.inference import evaluate as module
from perturbgene.inference.calibration import CALIBRATION_FILE
from perturbgene.inference.evaluate import evaluate
from perturbgene.inference.given_baselines import GivenLabels
from perturbgene.inference.predict import predict
from perturbgene.reports.report import report
from tests.untrained import a_run, save, some_cells

LABELS = {"cell_type": ["B cell", "NK cell", "T cell"], "sex": ["female", "male"], "tissue": ["blood", "spleen"]}
NUM_CELLS = 160


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    """Cells whose type is known from tissue and sex together, and from neither alone; not to be changed."""
    cells, rng = some_cells(NUM_CELLS), np.random.default_rng(1)
    is_male_n, is_spleen_n = rng.integers(2, size=(2, NUM_CELLS)) == 1
    cells.obs["sex"] = np.where(is_male_n, "male", "female")
    cells.obs["tissue"] = np.where(is_spleen_n, "spleen", "blood")
    cells.obs["cell_type"] = np.where(is_male_n == is_spleen_n, "B cell", "T cell")
    cells.obs["donor_id"] = cells.obs.pop("donor")
    return cells


@pytest.fixture(scope="module")
def scored(cells: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An evaluated run of three phenotypes, and its scores."""
    folder = tmp_path_factory.mktemp("given")
    save(a_run(phenotypes=LABELS, included_phenotypes=list(LABELS)), folder / "run")
    options = {"train_paths": cells, "calibrate": True, "output": folder / "run/evaluation"}
    return folder / "run", evaluate(folder / "run", cells, **options)


@pytest.mark.parametrize(
    ("known", "given"),
    [
        (["a"], []),
        (["a", "b"], []),
        (["a", "b", "c", "d"], ["b", "c", "d", "b+c", "b+d", "c+d"]),
        (["a", "b", "c", "d", "e"], ["b", "c", "d", "e"]),
    ],
)
def test_every_set_of_up_to_four_phenotypes_is_given_and_each_one_of_more(known: list[str], given: list[str]) -> None:
    assert [question.name for question in further_questions(["a"], known)] == [f"given+{name}" for name in given]


def test_every_set_of_given_phenotypes_is_scored_in_order(scored: tuple[Path, dict[str, Any]]) -> None:
    names = [name for name in scored[1]["cell_type"] if name not in module.NAMES]
    assert names == ["alone", "given+sex", "given+tissue", "given_others", "together"]
    assert {scored[1]["sex"][name]["n"] for name in ("alone", "given+cell_type", "given+tissue")} == {NUM_CELLS}


def test_baselines_are_given_the_same_phenotypes(scored: tuple[Path, dict[str, Any]]) -> None:
    scores = scored[1]["cell_type"]
    given = {name: of["baselines"]["majority"]["accuracy"] for name, of in scores.items() if "baselines" in of}
    assert set(given) == {"given+sex", "given+tissue", "given_others"}
    assert given["given_others"] == 1 and max(given["given+sex"], given["given+tissue"]) < 0.7
    assert scores["given_others"]["baselines"]["logistic_regression"]["accuracy"] > 0.5


def test_a_run_that_makes_too_little_of_what_is_given_is_warned_of(scored, cells, caplog) -> None:
    evaluate(scored[0], cells, train_paths=cells, ask=["cell_type"], given=["sex", "tissue"], calibrate=False)
    [line] = [line for line in caplog.messages if "too little of what is given" in line]
    assert line.startswith("cell_type given sex, tissue: accuracy 0.5") and "same phenotypes has 1.000" in line


def test_frequencies_of_given_labels_weigh_a_regression() -> None:
    given_ns, labels_n = np.array([[0]] * 9 + [[1]] + [[1]] * 9 + [[0]]), np.repeat([0, 1], 10)
    counts = GivenLabels.fit(labels_n, given_ns, np.array([[1], [-1]]), num_classes=2)
    unsure_mk = np.log([[0.7, 0.3], [0.7, 0.3]])
    assert counts.answers(np.arange(2), unsure_mk).tolist() == [1, 0]  # the second cell has no label to be given


def test_predict_takes_the_temperature_of_its_own_given_set(scored: tuple[Path, dict[str, Any]], cells) -> None:
    run, results = scored
    for given, question in (["tissue"], "given+tissue"), (["sex", "tissue"], "given_others"), ([], "alone"):
        facts = predict(cells, run, ask=["cell_type"], given=given, device="cpu").uns["perturbgene"]
        temperature = results["cell_type"][question]["calibration"]["temperature"]
        assert f"temperature {temperature:.3f}" in facts["calibration"] and "nearest" not in facts["calibration"]


def test_a_run_that_was_evaluated_before_answers_with_the_nearest_temperature_and_says_so(scored, cells, tmp_path):
    run = a_run(phenotypes=LABELS, included_phenotypes=list(LABELS))
    save(run, tmp_path / "run")
    stored = json.loads((scored[0] / CALIBRATION_FILE).read_text())
    stored["temperatures"] = [one for one in stored["temperatures"] if len(one["given"]) != 1]
    (tmp_path / "run" / CALIBRATION_FILE).write_text(json.dumps(stored))
    facts = predict(cells, tmp_path / "run", ask=["cell_type"], given=["tissue"], device="cpu").uns["perturbgene"]
    assert "asked alone; the nearest question that was fitted" in facts["calibration"]


def test_of_many_cells_a_part_is_asked_with_some_phenotypes_given(scored, cells, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "MOST_FURTHER", 60)
    options = {"train_paths": cells, "calibrate": False, "ask": ["cell_type"], "output": tmp_path}
    with caplog.at_level("INFO"):
        scores = evaluate(scored[0], cells, **options)["cell_type"]
    assert (scores["given_others"]["n"], scores["given+sex"]["n"]) == (NUM_CELLS, 54)
    assert scores["given+sex"]["baselines"]["majority"]["n"] == 54
    assert "only one cell in 3 is asked about" in caplog.text
    obs = ad.read_h5ad(tmp_path / "cells.h5ad").obs
    np.testing.assert_array_equal(obs["predicted_cell_type.given+sex"].notna(), np.arange(NUM_CELLS) % 3 == 0)
    is_right_n = (obs["predicted_cell_type.given+sex"] == obs["cell_type"]).iloc[::3]
    assert is_right_n.mean() == pytest.approx(scores["given+sex"]["accuracy"])


def test_a_phenotype_without_labels_is_not_given(scored, cells) -> None:
    other = cells.copy()
    other.obs = other.obs.drop(columns="sex")
    scores = evaluate(scored[0], other, ask=["cell_type"], calibrate=False)["cell_type"]
    assert set(scores) == {"alone", "given_others"}


def test_the_report_shows_every_given_set_next_to_its_baselines(scored: tuple[Path, dict[str, Any]]) -> None:
    page = report(scored[0]).read_text()
    for name in ("nothing", "sex", "tissue", "cell_type", "all others"):
        assert f'<th scope="row">{name}</th>' in page, name
    assert "100.0 % <strong>(best)</strong>" in page
