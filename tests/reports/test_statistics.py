"""Numbers of a report against cases that are counted by hand."""

import numpy as np
import pytest

from perturbgene.inference.calibration import calibration_error
from perturbgene.reports.statistics import Thresholds, by_similarity, confused_pairs, donor_interval, reliability


def test_an_interval_over_donors_is_wide_where_donors_differ_and_cells_do_not():
    """Every draw of donors of 100 cells is a mean of their accuracies; half of 8 donors are all right."""
    donors_n = np.repeat([f"D{number}" for number in range(8)], 100)
    differ_n = np.repeat([1.0] * 4 + [0.0] * 4, 100)
    alike_n = np.tile([1.0, 0.0], 400)
    low, high = donor_interval(differ_n, donors_n)
    assert low == pytest.approx(0.125, abs=0.07) and high == pytest.approx(0.875, abs=0.07)
    assert donor_interval(alike_n, donors_n) == (0.5, 0.5)


def test_a_donor_with_more_cells_counts_more():
    donors_n = np.array(["a"] * 98 + ["b", "c"])
    low, _ = donor_interval(np.array([1.0] * 98 + [0.0, 0.0]), donors_n)
    assert low == 0.0  # one draw in 27 has only b and c
    assert donor_interval(np.ones(100), donors_n) == (1.0, 1.0)


def test_two_donors_have_no_interval():
    assert donor_interval(np.ones(4), np.array(["a", "a", "b", "b"])) is None


def test_a_threshold_leaves_the_cells_at_or_above_it():
    probability_n = np.array([0.99, 0.9, 0.9, 0.55, np.nan], dtype=np.float32)
    found = Thresholds.of(probability_n, np.array([1.0, 1.0, 0.0, 0.0, np.nan]))
    assert found.coverage_b[[0, 55, 56, 90, 91, 99]].tolist() == [0.8, 0.8, 0.6, 0.6, 0.2, 0.2]
    assert found.measured_b is not None and found.measured_b[[0, 90, 91]].tolist() == [0.5, 2 / 3, 1.0]
    assert found.expected_b[90] == pytest.approx((0.99 + 0.9 + 0.9) / 3)


def test_thresholds_without_known_labels_measure_nothing():
    found = Thresholds.of(np.array([0.2, 0.3]))
    assert found.measured_b is None and np.isnan(found.expected_b[31])


def test_reliability_has_the_calibration_error_of_the_temperature():
    rng = np.random.default_rng(0)
    logits_nk, labels_n = rng.normal(size=(500, 4)) * 2, rng.integers(4, size=500)
    probability_nk = np.exp(logits_nk) / np.exp(logits_nk).sum(axis=1, keepdims=True)
    _, error = reliability(probability_nk.max(axis=1), probability_nk.argmax(axis=1) == labels_n)
    assert error == pytest.approx(calibration_error(logits_nk, labels_n))


def test_confused_labels_become_neighbors():
    counts_kk = np.diag([50] * 6)
    counts_kk[0, 5] = counts_kk[5, 0] = 20
    counts_kk[2, 4] = 30
    place_k = np.argsort(by_similarity(counts_kk))
    assert abs(place_k[0] - place_k[5]) == 1 and abs(place_k[2] - place_k[4]) == 1


def test_the_most_confused_pair_comes_first_with_its_share_of_the_true_label():
    assert confused_pairs(np.array([[6, 4], [1, 0]])) == [(0, 1, 4, 0.4), (1, 0, 1, 1.0)]
