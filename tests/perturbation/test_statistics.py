"""Effects are averaged and tested with the donor as unit."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from perturbgene.perturbation.statistics import against_null, agreement, mean_over_donors, welch_test

#: Mean effects and numbers of cells of two donors; donor 1 changes perturbation 1 in no cell.
SOME = (np.array([[2.0, 5.0], [4.0, np.nan]]), np.array([[2, 1], [1, 0]]))


def test_a_donor_counts_once_however_many_cells_it_has():
    table = mean_over_donors(*SOME, min_cells=1)
    assert table["effect"].tolist() == [3.0, 5.0]  # (2 + 4) / 2, not (2 + 2 + 4) / 3
    assert table["num_cells"].tolist() == [3, 1]
    assert table["num_donors"].tolist() == [2, 1]
    low, high = stats.t.interval(0.95, 1, loc=3.0, scale=stats.sem([2.0, 4.0]))
    assert (table["ci_low"][0], table["ci_high"][0]) == pytest.approx((low, high))
    assert np.isnan(table["ci_low"][1])


def test_donors_with_too_few_changed_cells_do_not_count():
    table = mean_over_donors(*SOME, min_cells=2)
    assert table["effect"][0] == 2.0
    assert np.isnan(table["effect"][1])


def null_of(effect_z: np.ndarray, num_cells_z: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"effect": effect_z, "num_cells": num_cells_z, "gene": range(len(effect_z))})


def a_null(num_genes: int = 200) -> pd.DataFrame:
    """Genes expressed in 1..200 cells, with effects that grow with frequency, and some noise."""
    noise = np.random.default_rng(0).normal(0, 0.1, num_genes)
    return null_of(np.arange(num_genes) / 50 + noise, np.arange(1, num_genes + 1))


def a_row(effect: float, *, error: float = 0.05, donors: int = 3, num_cells: int = 150, gene: int = -1) -> pd.DataFrame:
    columns = {"effect": effect, "standard_error": error, "num_donors": donors, "num_cells": num_cells, "gene": gene}
    return pd.DataFrame([columns])


def p_values(table: pd.DataFrame, null: pd.DataFrame, *, scale: float = 1.0) -> pd.DataFrame:
    return against_null(table, null, scale_q=np.full(len(table), scale))


def test_a_gene_is_held_against_genes_of_its_own_frequency():
    null = a_null()
    half = null["effect"][100:].mean()  # of the 100 genes with the most cells
    assert p_values(a_row(3.0, num_cells=200), null)["null_mean"][0] == pytest.approx(half)
    rare = p_values(a_row(3.0, num_cells=10), null)["p_value"][0]
    common = p_values(a_row(3.0, num_cells=150), null)["p_value"][0]
    assert rare < 0.05 < common


def test_the_gene_itself_is_no_part_of_its_null():
    null = null_of(np.array([9.0] + [0.0] * 20), np.full(21, 5))
    result = p_values(a_row(9.0, num_cells=5, gene=0), null)
    assert result["null_mean"][0] == 0.0


@pytest.mark.parametrize(("donors", "num_genes"), [(1, 200), (3, 9)])
def test_one_donor_or_too_few_genes_give_no_p_value(donors, num_genes):
    result = p_values(a_row(3.0, donors=donors), a_null(num_genes))
    assert result[["p_value", "q_value"]].isna().all(axis=None)


def test_a_null_is_brought_to_the_scale_of_the_effect():
    """An effect computed exactly is an ordinary one where exact effects are 3 times the screened ones."""
    null = null_of(np.random.default_rng(0).normal(1.0, 0.1, 100), np.full(100, 5))
    row = a_row(3.0, num_cells=5)
    assert p_values(row, null)["p_value"][0] < 1e-6
    result = p_values(row, null, scale=3.0)
    assert result["p_value"][0] > 0.5 and result["null_mean"][0] == pytest.approx(3.0, abs=0.1)
    assert p_values(row, null, scale=np.nan).isna().all(axis=None)


def test_random_genes_are_significant_no_more_often_than_promised():
    """1,000 genes of four donors, none different from the others: 5 % have p < 0.05, and none is left after q."""
    random = np.random.default_rng(1)
    means_dq = random.normal(0, 1, 1000) + random.normal(0, 0.3, (4, 1000))
    table = mean_over_donors(means_dq, np.full((4, 1000), 50), min_cells=5)
    table["gene"] = range(1000)
    result = p_values(table, table)
    assert 0.02 < (result["p_value"] < 0.05).mean() < 0.08
    assert (result["q_value"] < 0.05).sum() <= 1


def test_a_planted_gene_is_found_among_random_ones():
    random = np.random.default_rng(2)
    means_dq = random.normal(0, 0.1, 300) + random.normal(0, 0.05, (4, 300))
    means_dq[:, 17] += 1.0
    table = mean_over_donors(means_dq, np.full((4, 300), 50), min_cells=5)
    table["gene"] = range(300)
    assert np.flatnonzero(p_values(table, table)["q_value"] < 0.05).tolist() == [17]


def test_p_values_are_adjusted_after_benjamini_and_hochberg():
    wanted = np.array([0.01, 0.04, np.nan, 0.03])
    t_q = stats.t.isf(wanted / 2, 2)
    _, p_q, adjusted_q = welch_test(t_q, np.full((2, 4), 0.5), np.ones((2, 4)))
    np.testing.assert_allclose(p_q, wanted)
    np.testing.assert_allclose(adjusted_q, [0.03, 0.04, np.nan, 0.04])


def test_an_estimate_is_judged_by_order_and_by_what_it_finds():
    exact = np.arange(1.0, 17.0)
    found = {"spearman": pytest.approx(1.0), "recall": 1.0, "scale": 0.5, "num_genes": 16}
    assert agreement(exact, exact * 2) == found
    assert agreement(exact, -exact)["recall"] == 1.0  # strength has no sign
    assert agreement(exact, exact[::-1])["recall"] == 0.0
    assert np.isnan(agreement(exact[:2], exact[:2])["spearman"])
