"""Effects are summed by donor and tested with the donor as unit."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from perturbgene.perturbation.statistics import Null, Tally, adjusted, agreement, held_against_null, mean_over_donors


def a_tally() -> Tally:
    """Two donors, one group, two perturbations; donor 1 changes perturbation 1 only in one cell, which is missing."""
    tally = Tally(2)
    tally.add(
        np.array([1.0, 3.0, 5.0, 4.0, np.nan]),
        donor_m=np.array([0, 0, 0, 1, 1]),
        group_m=np.zeros(5, dtype=int),
        perturbation_m=np.array([0, 0, 1, 0, 1]),
    )
    return tally


def test_effects_are_averaged_within_donors_and_missing_ones_do_not_count():
    means_dq, counts_dq = a_tally().of_group(0, num_donors=2)
    np.testing.assert_array_equal(means_dq, [[2.0, 5.0], [4.0, np.nan]])
    np.testing.assert_array_equal(counts_dq, [[2, 1], [1, 0]])


def test_a_donor_counts_once_however_many_cells_it_has():
    table = mean_over_donors(*a_tally().of_group(0, num_donors=2), min_cells=1)
    assert table["effect"].tolist() == [3.0, 5.0]  # (2 + 4) / 2, not (1 + 3 + 4) / 3
    assert table["num_cells"].tolist() == [3, 1]
    assert table["num_donors"].tolist() == [2, 1]
    low, high = stats.t.interval(0.95, 1, loc=3.0, scale=stats.sem([2.0, 4.0]))
    assert (table["ci_low"][0], table["ci_high"][0]) == pytest.approx((low, high))
    assert np.isnan(table["ci_low"][1])


def test_donors_with_too_few_changed_cells_do_not_count():
    table = mean_over_donors(*a_tally().of_group(0, num_donors=2), min_cells=2)
    assert table["effect"][0] == 2.0
    assert np.isnan(table["effect"][1])


def test_sums_of_parts_are_the_sum_of_the_whole():
    whole, parts = a_tally(), Tally(2)
    whole.add(np.array([7.0]), donor_m=np.array([1]), group_m=np.array([3]), perturbation_m=np.array([1]))
    parts.add_arrays(**{f"{name}_k3": values for name, values in a_tally().arrays().items()})
    later = Tally(2)
    later.add(np.array([7.0]), donor_m=np.array([1]), group_m=np.array([3]), perturbation_m=np.array([1]))
    parts.add_arrays(**{f"{name}_k3": values for name, values in later.arrays().items()})
    for name in ("keys", "sums"):
        np.testing.assert_array_equal(parts.arrays()[name], whole.arrays()[name])
    assert whole.groups() == [0, 3]


def a_null(num_genes: int = 200) -> Null:
    """Genes expressed in 1..200 cells, with effects that grow with frequency, and some noise."""
    noise = np.random.default_rng(0).normal(0, 0.1, num_genes)
    return Null(np.arange(num_genes) / 50 + noise, np.arange(1, num_genes + 1), np.arange(num_genes))


def a_row(effect: float, *, error: float = 0.05, donors: int = 3, num_cells: int = 150) -> pd.DataFrame:
    return pd.DataFrame(
        {"effect": [effect], "standard_error": [error], "num_donors": [donors], "num_cells": [num_cells]}
    )


def test_a_gene_is_held_against_genes_of_its_own_frequency():
    null = a_null()
    assert min(null.matched(200, gene=-1)) > 1.5  # the rare genes' effects lie below
    assert len(null.matched(100, gene=99)) == 100
    rare = held_against_null(a_row(3.0, num_cells=10), null, gene_q=[-1])["p_value"][0]
    common = held_against_null(a_row(3.0, num_cells=150), null, gene_q=[-1])["p_value"][0]
    assert rare < 0.05 < common


def test_the_gene_itself_is_no_part_of_its_null():
    null = Null(np.array([9.0] + [0.0] * 20), np.full(21, 5), np.arange(21))
    result = held_against_null(a_row(9.0, num_cells=5), null, gene_q=[0])
    assert result["null_mean"][0] == 0.0


@pytest.mark.parametrize(("donors", "num_genes"), [(1, 200), (3, 9)])
def test_one_donor_or_too_few_genes_give_no_p_value(donors, num_genes):
    result = held_against_null(a_row(3.0, donors=donors), a_null(num_genes), gene_q=[-1])
    assert result[["p_value", "q_value"]].isna().all(axis=None)


def test_random_genes_are_significant_no_more_often_than_promised():
    """1,000 genes of four donors, none different from the others: 5 % have p < 0.05, and none is left after q."""
    random = np.random.default_rng(1)
    means_dq = random.normal(0, 1, 1000) + random.normal(0, 0.3, (4, 1000))
    table = mean_over_donors(means_dq, np.full((4, 1000), 50), min_cells=5)
    null = Null(table["effect"].to_numpy(), table["num_cells"].to_numpy(), np.arange(1000))
    result = held_against_null(table, null, gene_q=range(1000))
    assert 0.02 < (result["p_value"] < 0.05).mean() < 0.08
    assert (result["q_value"] < 0.05).sum() <= 1


def test_a_planted_gene_is_found_among_random_ones():
    random = np.random.default_rng(2)
    means_dq = random.normal(0, 0.1, 300) + random.normal(0, 0.05, (4, 300))
    means_dq[:, 17] += 1.0
    table = mean_over_donors(means_dq, np.full((4, 300), 50), min_cells=5)
    null = Null(table["effect"].to_numpy(), table["num_cells"].to_numpy(), np.arange(300))
    assert np.flatnonzero(held_against_null(table, null, gene_q=range(300))["q_value"] < 0.05).tolist() == [17]


def test_p_values_are_adjusted_after_benjamini_and_hochberg():
    np.testing.assert_allclose(adjusted(np.array([0.01, 0.04, np.nan, 0.03])), [0.03, 0.04, np.nan, 0.04])


def test_an_estimate_is_judged_by_order_and_by_what_it_finds():
    exact = np.arange(1.0, 17.0)
    assert vars(agreement(exact, exact * 2)) == {"spearman": pytest.approx(1.0), "recall": 1.0, "num_genes": 16}
    assert agreement(exact, -exact).recall == 1.0  # strength has no sign
    assert agreement(exact, exact[::-1]).recall == 0.0
    assert np.isnan(agreement(exact[:2], exact[:2]).spearman)
