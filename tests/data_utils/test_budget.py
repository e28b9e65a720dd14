"""Batches under a budget: full, complete, mixed, never too long, and the same whenever they are planned again."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbgene.data_utils.budget import BatchPlan, BatchRule, by_length, fill
from perturbgene.data_utils.order import RowPlan

LENGTHS = st.lists(st.integers(1, 50), max_size=80).map(np.array)


def log_normal_lengths(num_cells: int, *, longest: int = 1024) -> np.ndarray:
    """Return lengths as real cells have them: a median of 500, some as long as may be."""
    return np.minimum(np.random.default_rng(1).lognormal(np.log(500), 0.5, num_cells).astype(int) + 3, longest)


def batches_of(plan: BatchPlan, *, skip: int = 0) -> list[list[int]]:
    """Return the rows of each batch, from the first one of the round that holds batch `skip` on."""
    parts = [np.split(rows, np.cumsum(sizes)[:-1]) for _, rows, sizes in plan.rounds(skip=skip)]
    return [part.tolist() for round_ in parts for part in round_]


def a_plan(num_cells: int = 500, **changes: Any) -> BatchPlan:
    """Plan batches of log-normal cells in several rounds."""
    rows = RowPlan((num_cells,), is_shuffled=True, block_rows=2, buffer_rows=128)
    return replace(BatchPlan(rows, log_normal_lengths(num_cells), rule=BatchRule(budget=4096)), **changes)


# -- filling ------------------------------------------------------------------------------------------------------


def test_a_cell_joins_the_fullest_batch_that_has_room() -> None:
    order_m, sizes_b = fill(np.array([5, 7, 3, 5]), budget=10)
    # 5 and 7 open two batches; 3 would fit both and joins 7, so that the other 5 has room beside the first
    assert [part.tolist() for part in np.split(order_m, np.cumsum(sizes_b)[:-1])] == [[0, 3], [1, 2]]


def test_a_cell_as_long_as_the_budget_is_a_batch_by_itself() -> None:
    assert fill(np.array([10, 10]), budget=10)[1].tolist() == [1, 1]


def test_no_cells_make_no_batches() -> None:
    assert [part.tolist() for part in fill(np.zeros(0, dtype=np.int64), budget=5)] == [[], []]


@settings(max_examples=100, deadline=None)
@given(length_m=LENGTHS, budget=st.integers(50, 200))
def test_no_batch_exceeds_the_budget_and_every_cell_comes_once(length_m: np.ndarray, budget: int) -> None:
    order_m, sizes_b = fill(length_m, budget=budget)
    assert sorted(order_m.tolist()) == list(range(len(length_m)))
    assert all(
        0 < length_m[part].sum() <= budget for part in np.split(order_m, np.cumsum(sizes_b)[:-1]) if len(order_m)
    )


@pytest.mark.parametrize(("budget", "least"), [(2048, 0.95), (4096, 0.97), (16384, 0.98)])
def test_batches_of_log_normal_cells_are_nearly_full(budget: int, least: float) -> None:
    length_m = log_normal_lengths(16_384)
    _, sizes_b = fill(length_m, budget=budget)
    assert length_m.sum() / (len(sizes_b) * budget) >= least


# -- like lengths -------------------------------------------------------------------------------------------------


def test_cells_of_like_length_share_a_batch_of_fixed_size() -> None:
    order_m, sizes_b = by_length(np.array([9, 1, 8, 2, 7]), batch_size=2)
    assert (order_m.tolist(), sizes_b.tolist()) == ([1, 3, 4, 2, 0], [2, 2, 1])


def test_sorting_by_length_leaves_little_padding() -> None:
    def padded(length_m: np.ndarray) -> int:
        return sum(len(part) * part.max() for part in np.split(length_m, range(32, len(length_m), 32)))

    length_m = log_normal_lengths(4096)
    order_m, _ = by_length(length_m, batch_size=32)
    assert 1 - length_m.sum() / padded(length_m) > 0.35
    assert 1 - length_m.sum() / padded(length_m[order_m]) < 0.05


# -- the plan of an epoch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [4096, None], ids=["budget", "like lengths"])
def test_a_plan_holds_every_cell_once_and_knows_its_sizes(budget: int | None) -> None:
    plan = a_plan(rule=BatchRule(7, budget))
    batches = batches_of(plan)
    assert sorted(row for batch in batches for row in batch) == list(range(500))
    assert [len(batch) for batch in batches] == plan.sizes_b.tolist()
    assert len(plan) == len(batches) > 50


def test_a_plan_is_a_pure_function_of_seed_and_epoch() -> None:
    def drawn(**changes: int) -> list[list[int]]:
        plan = a_plan()
        return batches_of(replace(plan, rows=replace(plan.rows, **changes)))

    assert drawn() == drawn()
    assert drawn() != drawn(epoch=1) != drawn(seed=1) != drawn()


@pytest.mark.parametrize("skip", [0, 1, 40, 41, 1000])
def test_skipping_leaves_out_whole_rounds_before_a_batch(skip: int) -> None:
    plan = a_plan()
    firsts = [first for first, *_ in plan.rounds(skip=skip)]
    whole = batches_of(plan)
    assert batches_of(plan, skip=skip) == whole[firsts[0] :] if firsts else skip >= len(plan)
    assert not firsts or firsts[0] <= skip


def test_batches_of_a_sorted_corpus_are_mixed_like_those_of_a_perfect_shuffle() -> None:
    num_cells, rng = 20_000, np.random.default_rng(0)
    labels_n = np.arange(num_cells) * 10 // num_cells
    plan = BatchPlan(RowPlan((num_cells,), is_shuffled=True), log_normal_lengths(num_cells), BatchRule(budget=16_384))

    def mean_entropy(label_of_row_n: np.ndarray) -> float:
        shares = [np.bincount(label_of_row_n[batch]) / len(batch) for batch in batches_of(plan)]
        return float(np.mean([-(p[p > 0] * np.log(p[p > 0])).sum() for p in shares]))

    assert mean_entropy(labels_n) / mean_entropy(rng.permutation(labels_n)) >= 0.98


def test_cells_that_grow_longer_along_the_corpus_are_mixed_too() -> None:
    """Length then tells where a cell stands, so batches by length would be batches of neighbours."""
    num_cells = 4000
    length_n = np.sort(log_normal_lengths(num_cells))
    plan = BatchPlan(RowPlan((num_cells,), is_shuffled=True), length_n, BatchRule(budget=16_384))
    places = [np.mean(batch) / num_cells for batch in batches_of(plan)]
    assert np.std(places) < 0.065  # 0.29 / sqrt(29 cells) = 0.054 of a perfect shuffle, 0.29 of neighbours
    assert 0.3 < min(places) < max(places) < 0.7  # not even the last batches of a round


# -- another rule in the midst of an epoch ------------------------------------------------------------------------


@pytest.mark.parametrize("num_kept", [0, 1, 17, 43, 10_000])
@pytest.mark.parametrize("rule", [BatchRule(budget=2048), BatchRule(budget=9000), BatchRule(batch_size=5)], ids=str)
def test_batches_that_are_done_stay_and_the_cells_of_the_others_are_cut_anew(rule: BatchRule, num_kept: int) -> None:
    first = a_plan()
    num_kept = min(num_kept, len(first))
    second = a_plan(rule=rule, earlier=first, num_kept=num_kept)
    before, after = batches_of(first), batches_of(second)
    assert after[:num_kept] == before[:num_kept]
    assert sorted(row for batch in after for row in batch) == list(range(500))
    assert [len(batch) for batch in after] == second.sizes_b.tolist()
    if rule.budget is not None:
        assert all(second.length_n[batch].sum() <= rule.budget for batch in after[num_kept:])
    third = a_plan(earlier=second, num_kept=min(num_kept + 3, len(second)))
    last = batches_of(third)
    assert last[: num_kept + 3] == after[: num_kept + 3]
    assert sorted(row for batch in last for row in batch) == list(range(500))
