"""The order of cells: complete, disjoint, reproducible, well mixed, and the same however it is cut."""

from dataclasses import replace
from itertools import zip_longest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbgene.data_utils.order import RowPlan, Share, cell_key, cells_of_rank, mix, runs_of, split_rows, unit

PLANS = st.builds(
    RowPlan,
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=5).map(tuple),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
    is_shuffled=st.booleans(),
    block_rows=st.integers(1, 9),
    buffer_rows=st.integers(1, 90),
)

GOLDEN_ORDER = [6, 9, 0, 5, 3, 4, 11, 8, 10, 1, 7, 2]
GOLDEN_HASHES = (14848367591780553279, 2092789425003139053)


def order_of(plan: RowPlan) -> np.ndarray:
    """Return all rows in order."""
    return np.concatenate([np.zeros(0, dtype=np.int64), *(rows for _, rows in plan.rounds())])


def relative_entropy(labels_n: np.ndarray, *, batch: int, last: int | None = None) -> float:
    """Return the mean label entropy of (the last) batches relative to that of a perfect shuffle of all cells."""

    def mean_entropy(order_n: np.ndarray) -> float:
        shares = [np.bincount(part) / len(part) for part in np.split(order_n, range(batch, len(order_n), batch))]
        return float(np.mean([-(p[p > 0] * np.log(p[p > 0])).sum() for p in shares]))

    return mean_entropy(labels_n[-(last or len(labels_n)) :]) / mean_entropy(
        np.random.default_rng(0).permutation(labels_n)
    )


@settings(max_examples=60, deadline=None)
@given(plan=PLANS)
def test_every_row_comes_exactly_once(plan: RowPlan) -> None:
    assert sorted(order_of(plan)) == list(range(sum(plan.sizes)))


@settings(max_examples=60, deadline=None)
@given(plan=PLANS)
def test_rounds_say_where_they_start(plan: RowPlan) -> None:
    rounds = list(plan.rounds())
    lengths = [len(rows) for _, rows in rounds]
    assert [start for start, _ in rounds] == np.cumsum([0, *lengths])[:-1].tolist()


@settings(max_examples=60, deadline=None)
@given(plan=PLANS, skip=st.integers(0, 320))
def test_skipping_gives_the_tail_of_the_same_order(plan: RowPlan, skip: int) -> None:
    tail = list(plan.rounds(skip=skip))
    whole = order_of(plan)
    start = tail[0][0] if tail else len(whole)
    assert start <= max(skip, 0) or not tail
    assert len(whole) <= skip or np.array_equal(np.concatenate([rows for _, rows in tail]), whole[start:])


@settings(max_examples=60, deadline=None)
@given(plan=PLANS)
def test_no_round_holds_more_than_the_buffer_or_one_block_per_lane(plan: RowPlan) -> None:
    most = max(plan.buffer_rows, 8 * plan.block_rows)
    assert all(0 < len(rows) <= most for _, rows in plan.rounds())


@settings(max_examples=30, deadline=None)
@given(num_cells=st.integers(0, 500), world_size=st.integers(1, 9))
def test_ranks_share_the_cells_completely_in_evaluation(num_cells: int, world_size: int) -> None:
    counts = [cells_of_rank(num_cells, rank=r, world_size=world_size, is_even=False) for r in range(world_size)]
    assert counts == [len(range(rank, num_cells, world_size)) for rank in range(world_size)]


@settings(max_examples=30, deadline=None)
@given(num_cells=st.integers(0, 500), world_size=st.integers(1, 9))
def test_ranks_share_the_cells_evenly_in_training(num_cells: int, world_size: int) -> None:
    counts = {cells_of_rank(num_cells, rank=r, world_size=world_size, is_even=True) for r in range(world_size)}
    assert counts == {num_cells // world_size}


def test_unshuffled_rows_keep_the_order_of_the_files() -> None:
    assert order_of(RowPlan((5, 0, 7), block_rows=2, buffer_rows=4)).tolist() == list(range(12))


def test_chosen_rows_take_part_and_no_others() -> None:
    plan = RowPlan((6, 6), is_shuffled=True, rows_n=np.array([1, 4, 7, 11]))
    assert len(plan) == 4
    assert sorted(order_of(plan)) == [1, 4, 7, 11]


def test_an_empty_plan_has_no_rounds() -> None:
    assert list(RowPlan((0, 0), is_shuffled=True).rounds()) == []


def test_the_same_seed_and_epoch_give_the_same_order() -> None:
    orders = [order_of(RowPlan((300,), seed=3, epoch=2, is_shuffled=True)) for _ in range(2)]
    assert np.array_equal(*orders)


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 1}])
def test_another_epoch_or_seed_gives_another_order(change: dict[str, int]) -> None:
    other = RowPlan((300,), is_shuffled=True, **change)
    assert not np.array_equal(order_of(RowPlan((300,), is_shuffled=True)), order_of(other))


def test_the_order_never_changes_between_versions() -> None:
    order = order_of(RowPlan((5, 7), seed=1, epoch=2, is_shuffled=True, block_rows=2, buffer_rows=8))
    assert order.tolist() == GOLDEN_ORDER


def test_drawing_an_order_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    order_of(RowPlan((300,), is_shuffled=True))
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("num_cells", "batch"),
    [(700, 32), (5_000, 128), (20_000, 128), (16_384 + 100, 64), (120_000, 128)],
    ids=["small file", "one round", "two rounds", "just over one round", "many rounds"],
)
def test_cells_sorted_by_label_come_out_as_mixed_as_by_a_perfect_shuffle(num_cells: int, batch: int) -> None:
    labels_n = np.arange(num_cells) * 10 // num_cells
    assert relative_entropy(labels_n[order_of(RowPlan((num_cells,), is_shuffled=True))], batch=batch) >= 0.98


@pytest.mark.parametrize("num_cells", [700, 16_384 + 100])
def test_the_last_batches_of_an_epoch_are_mixed_too(num_cells: int) -> None:
    labels_n = (np.arange(num_cells) * 10 // num_cells)[order_of(RowPlan((num_cells,), is_shuffled=True))]
    assert relative_entropy(labels_n, batch=32, last=96) >= 0.9


def test_rows_are_grouped_by_file_and_empty_files_own_none() -> None:
    groups = split_rows(np.array([0, 2, 3, 7]), starts_f=np.array([0, 3, 3, 6]))
    assert [(file, rows.tolist()) for file, rows in groups] == [(0, [0, 2]), (2, [0]), (3, [1])]


def test_no_rows_belong_to_no_file() -> None:
    assert split_rows(np.zeros(0, dtype=np.int64), starts_f=np.array([0, 3])) == []


def test_rows_within_the_gap_are_one_read() -> None:
    runs = runs_of(np.array([0, 1, 4, 9, 11]), gap=3)
    assert [run.tolist() for run in runs] == [[0, 1, 4], [9, 11]]


def test_no_rows_need_no_read() -> None:
    assert runs_of(np.zeros(0, dtype=np.int64), gap=3) == []


def test_the_hash_never_changes_between_versions() -> None:
    assert (int(cell_key(7, 1, 42)), int(mix(np.uint64(1), np.uint64(2)))) == GOLDEN_HASHES


def test_hashes_of_neighbouring_cells_are_spread_evenly() -> None:
    keys = [np.uint64(cell_key(0, 0, cell)) for cell in range(4000)]
    draws_n = np.array([unit(np.uint64(mix(key, np.uint64(1)))) for key in keys])
    assert np.abs(np.histogram(draws_n, bins=8, range=(0, 1))[0] - 500).max() < 4 * np.sqrt(500 * 7 / 8)


# -- shares --------------------------------------------------------------------------------------------------------

DEALS = st.builds(
    lambda world_size, num_workers, **same: [
        [Share(rank=r, world_size=world_size, worker=w, num_workers=num_workers, **same) for w in range(num_workers)]
        for r in range(world_size)
    ],
    world_size=st.integers(1, 4),
    num_workers=st.integers(1, 4),
    num_cells=st.integers(0, 90),
    begin=st.integers(0, 95),
    is_even=st.booleans(),
    batch_size=st.integers(1, 7),
)


def positions_of(share: Share) -> list[int]:
    """Return the positions that a worker takes, in order."""
    return np.flatnonzero(share.holds(np.arange(share.num_cells))).tolist()


@settings(max_examples=100, deadline=None)
@given(deal=DEALS)
def test_shares_hold_each_position_from_the_begin_on_once(deal: list[list[Share]]) -> None:
    first = deal[0][0]
    held = sorted(position for rank in deal for share in rank for position in positions_of(share))
    left = list(range(first.begin, first.num_cells))
    assert held == left[: len(left) // len(deal) * len(deal)] if first.is_even else held == left
    assert [len(rank[0]) for rank in deal] == [sum(len(positions_of(share)) for share in rank) for rank in deal]


@settings(max_examples=100, deadline=None)
@given(deal=DEALS)
def test_batches_of_workers_in_turn_are_the_batches_of_one_worker(deal: list[list[Share]]) -> None:
    for rank in deal:
        size = rank[0].batch_size
        own = [positions_of(share) for share in rank]
        batches = [[held[at : at + size] for at in range(0, len(held), size)] for held in own]
        turns = [batch for turn in zip_longest(*batches, fillvalue=[]) for batch in turn]
        alone = positions_of(replace(rank[0], worker=0, num_workers=1))
        assert [position for batch in turns for position in batch] == alone


@settings(max_examples=100, deadline=None)
@given(deal=DEALS)
def test_the_position_after_some_cells_has_those_cells_before_it(deal: list[list[Share]]) -> None:
    for share in (share for rank in deal for share in rank):
        held = positions_of(share)
        for done in range(len(held) + 1):
            position = share.position_after(done)
            assert share.cells_before(position) == done
            assert all((at < position) == (number < done) for number, at in enumerate(held))


def test_a_share_written_out() -> None:
    share = Share(20, begin=4, rank=1, world_size=2, batch_size=2, worker=1, num_workers=2)
    assert positions_of(share) == [9, 11, 17, 19]
    assert [share.position_after(done) for done in range(5)] == [4, 10, 12, 18, 20]
