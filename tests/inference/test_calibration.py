"""Temperatures: what they do to probabilities, on whose cells they are fitted, and when they apply."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from perturbgene.inference.calibration import (
    LEAST_CELLS,
    Calibration,
    Temperature,
    calibration_error,
    fit,
    fit_temperature,
    log_loss,
    percentile,
    quantiles,
    read_calibration,
    split_halves,
    weights_hash,
)


def drawn(num_cells: int, *, sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from a softmax, and logits that are `sharpness` times too large."""
    rng = np.random.default_rng(0)
    logits_nk = rng.normal(size=(num_cells, 4)) * 1.5
    probability_nk = np.exp(logits_nk) / np.exp(logits_nk).sum(axis=1, keepdims=True)
    labels_n = (rng.random(num_cells)[:, None] > probability_nk.cumsum(axis=1)).sum(axis=1)
    return sharpness * logits_nk, labels_n


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_how_much_too_sure_a_model_is(sharpness: float) -> None:
    assert fit_temperature(*drawn(20_000, sharpness=sharpness)) == pytest.approx(sharpness, rel=0.05)


def test_log_loss_is_that_of_the_softened_probabilities() -> None:
    logits_nk = np.array([[np.log(9.0), 0.0]])
    assert log_loss(logits_nk, np.array([0]), temperature=2.0) == pytest.approx(-np.log(3 / 4))


def test_calibration_error_weighs_the_gap_of_each_bin_by_its_cells() -> None:
    logits_nk = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]]))
    assert calibration_error(logits_nk, np.array([0, 0, 0, 1])) == pytest.approx((2 * 0.1 + 2 * 0.1) / 4)


def test_a_fit_is_scored_on_the_cells_that_it_has_not_seen() -> None:
    logits_nk, labels_n = drawn(4000, sharpness=3.0)
    is_fitted_n = np.arange(4000) < 1000
    entry = fit(logits_nk, labels_n, is_fitted_n, phenotype="x", asked=["x"], given=[])
    assert (entry.num_cells, entry.scores["n"]) == (1000, 3000)
    assert entry.scores["log_loss_before"] == log_loss(logits_nk[1000:], labels_n[1000:])
    assert entry.scores["log_loss_after"] < entry.scores["log_loss_before"]
    assert entry.scores["ece_after"] < 0.03 < 0.1 < entry.scores["ece_before"]


def test_cells_without_a_label_are_not_fitted_on() -> None:
    logits_nk, labels_n = drawn(100, sharpness=1.0)
    labels_n[:40] = -1
    entry = fit(logits_nk, labels_n, np.arange(100) < 60, phenotype="x", asked=["x"], given=[])
    assert (entry.num_cells, entry.scores["n"]) == (20, 40)


def test_too_few_cells_fit_nothing() -> None:
    logits_nk, labels_n = drawn(LEAST_CELLS, sharpness=3.0)
    entry = fit(logits_nk, labels_n, np.arange(LEAST_CELLS) > 0, phenotype="x", asked=["x"], given=[])
    assert entry.temperature == 1.0


@pytest.mark.parametrize("num_cells", [50, 500])
def test_few_cells_that_are_all_answered_right_do_not_make_answers_certain(num_cells: int) -> None:
    logits_nk = np.repeat([[6.0, 0.0, 1.0]], num_cells, axis=0)
    temperature = fit_temperature(logits_nk, np.zeros(num_cells, dtype=int))
    assert 0.5 < temperature < 1, "the lowest log loss is at the least temperature, 0.05"


@pytest.mark.parametrize(("sharpness", "is_at_limit"), [(100.0, True), (0.01, True), (3.0, False)])
def test_a_temperature_at_the_limit_of_its_range_is_reported(
    sharpness: float, is_at_limit: bool, caplog: pytest.LogCaptureFixture
) -> None:
    logits_nk, labels_n = drawn(400, sharpness=sharpness)
    entry = fit(logits_nk, labels_n, np.arange(400) < 200, phenotype="x", asked=["x"], given=[])
    assert entry.is_at_limit == is_at_limit
    assert ("the limit of its range" in caplog.text) == ("the limit of its range" in entry.describe()) == is_at_limit


def test_donors_stay_whole_and_the_split_depends_on_their_names_alone() -> None:
    donors_n = np.array(["a", "b", "c", "d"] * 25, dtype=object)
    is_fitted_n, how = split_halves(donors_n, num_cells=100)
    order = np.random.default_rng(0).permutation(100)
    assert how == "donors"
    assert is_fitted_n.sum() == 50
    assert all(len(set(is_fitted_n[donors_n == donor])) == 1 for donor in "abcd")
    np.testing.assert_array_equal(split_halves(donors_n[order], num_cells=100)[0], is_fitted_n[order])


@pytest.mark.parametrize("sizes", [[99, 1], [1, 99]], ids=["large first", "small first"])
def test_two_donors_of_any_size_fall_on_either_side(sizes: list[int]) -> None:
    is_fitted_n, how = split_halves(np.repeat(["a", "b"], sizes), num_cells=100)
    assert how == "donors" and 0 < is_fitted_n.sum() < 100


@pytest.mark.parametrize("donors_n", [None, np.array(["a"] * 11)], ids=["no donors", "one donor"])
def test_without_two_donors_cells_are_halved(donors_n: np.ndarray | None) -> None:
    is_fitted_n, how = split_halves(donors_n, num_cells=11)
    assert how == "cells" and is_fitted_n.sum() == 5


def test_percentiles_are_shares_of_the_cells_they_were_taken_from() -> None:
    values_n = np.random.default_rng(0).normal(size=1001)
    found_n = percentile(values_n, quantiles(values_n))
    expected_n = 100 * np.argsort(np.argsort(values_n)) / 1000
    np.testing.assert_allclose(found_n, expected_n, atol=0.6)
    assert np.isnan(percentile(np.array([np.nan]), quantiles(values_n))).all()
    assert np.isnan(percentile(values_n, quantiles(np.array([np.nan])))).all()


def entry(asked: list[str], given: list[str], *, temperature: float = 1.0) -> Temperature:
    return Temperature("a", tuple(asked), tuple(given), temperature, 50)


ALONE, GIVEN, TOGETHER = entry(["a"], []), entry(["a"], ["b", "c"]), entry(["a", "b", "c"], [])


@pytest.mark.parametrize(
    ("asked", "given", "expected"),
    [(["a"], [], ALONE), (["a"], ["c", "b"], GIVEN), (["c", "a", "b"], [], TOGETHER), (["a"], ["b", "c", "d"], GIVEN)],
)
def test_the_temperature_of_the_nearest_question_applies(asked, given, expected) -> None:
    assert Calibration((ALONE, GIVEN, TOGETHER)).nearest("a", asked=asked, given=given) == expected


def test_a_phenotype_that_was_not_fitted_has_no_temperature() -> None:
    assert Calibration((ALONE,)).nearest("b", asked=["b"], given=[]) is None


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def saved(folder: Path) -> Calibration:
    calibration = Calibration((ALONE, GIVEN), (-2.0, -1.0), "donors", weights_hash(folder))
    calibration.save(folder)
    return calibration


def test_a_saved_calibration_is_read_again(run_folder: Path) -> None:
    expected = saved(run_folder)
    assert read_calibration(run_folder) == expected
    assert sorted(path.name for path in run_folder.iterdir()) == ["calibration.json", "model.safetensors"]


def test_a_newer_fit_replaces_the_same_question_and_keeps_others(run_folder: Path) -> None:
    weights = weights_hash(run_folder)
    Calibration((ALONE, GIVEN), (1.0,), "cells", weights).save(run_folder)
    Calibration((entry(["a"], [], temperature=2.0),), (), "donors", weights).save(run_folder)
    found = read_calibration(run_folder)
    assert found.nearest("a", asked=["a"], given=[]).temperature == 2.0
    assert (len(found.temperatures), found.gene_quantiles, found.split) == (2, (1.0,), "donors")


def test_temperatures_of_other_weights_are_not_kept(run_folder: Path) -> None:
    Calibration((ALONE, GIVEN), (1.0,), "cells", "other weights").save(run_folder)
    newer = Calibration((), (), "cells", weights_hash(run_folder))
    newer.save(run_folder)
    assert read_calibration(run_folder) == newer


def test_a_run_without_calibration_has_none(run_folder: Path) -> None:
    assert read_calibration(run_folder) is None


def test_the_calibration_of_other_weights_is_not_used(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(run_folder)
    (run_folder / "model.safetensors").write_bytes(b"trained on")
    assert read_calibration(run_folder) is None
    assert "fitted for other weights" in caplog.text and "evaluate" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1, "temperatures": [1]}'])
def test_a_damaged_calibration_is_not_used(text: str, run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run_folder / "calibration.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_calibration(run_folder) is None
    assert "cannot be used" in caplog.text


def test_a_calibration_is_strict_json(run_folder: Path) -> None:
    saved(run_folder)
    content = json.loads((run_folder / "calibration.json").read_text())
    assert [entry["given"] for entry in content["temperatures"]] == [[], ["b", "c"]]
