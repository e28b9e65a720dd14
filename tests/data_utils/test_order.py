"""The order of cells: complete, disjoint, reproducible, well mixed, and the same however it is cut."""

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from perturbgene.data_utils.kernels import cell_key, mix, unit
from perturbgene.data_utils.order import (
    BudgetSampler,
    CellDraws,
    CellSampler,
    WorkerSampler,
    draw_rates,
    fill,
    gene_counts,
    genes_per_value,
    split_rows,
    stored_values,
)
from perturbgene.data_utils.shards import ShardCache
from perturbgene.data_utils.sources import H5adFile
from tests.nine_genes import GENES, a_tokenizer

PLANS = st.builds(
    CellSampler,
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=5).map(tuple),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
    is_shuffled=st.booleans(),
    block_rows=st.integers(1, 9),
    buffer_rows=st.integers(1, 90),
)

GOLDEN_ORDER = [6, 9, 0, 5, 3, 4, 11, 8, 10, 1, 7, 2]
GOLDEN_HASHES = (14848367591780553279, 2092789425003139053)


def order_of(plan: CellSampler) -> np.ndarray:
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
def test_every_row_comes_exactly_once(plan: CellSampler) -> None:
    assert sorted(order_of(plan)) == list(range(sum(plan.sizes)))


@settings(max_examples=60, deadline=None)
@given(plan=PLANS)
def test_rounds_say_where_they_start(plan: CellSampler) -> None:
    rounds = list(plan.rounds())
    lengths = [len(rows) for _, rows in rounds]
    assert [start for start, _ in rounds] == np.cumsum([0, *lengths])[:-1].tolist()


@settings(max_examples=60, deadline=None)
@given(plan=PLANS, skip=st.integers(0, 320))
def test_skipping_gives_the_tail_of_the_same_order(plan: CellSampler, skip: int) -> None:
    tail = list(plan.rounds(skip=skip))
    whole = order_of(plan)
    start = tail[0][0] if tail else len(whole)
    assert start <= max(skip, 0) or not tail
    assert len(whole) <= skip or np.array_equal(np.concatenate([rows for _, rows in tail]), whole[start:])


@settings(max_examples=60, deadline=None)
@given(plan=PLANS)
def test_no_round_holds_more_than_the_buffer_or_one_block_per_lane(plan: CellSampler) -> None:
    most = max(plan.buffer_rows, 8 * plan.block_rows)
    assert all(0 < len(rows) <= most for _, rows in plan.rounds())


@settings(max_examples=30, deadline=None)
@given(num_cells=st.integers(0, 500), world_size=st.integers(1, 9))
def test_ranks_share_the_cells_completely_in_evaluation(num_cells: int, world_size: int) -> None:
    counts = [len(WorkerSampler(num_cells, rank=r, world_size=world_size)) for r in range(world_size)]
    assert counts == [len(range(rank, num_cells, world_size)) for rank in range(world_size)]


@settings(max_examples=30, deadline=None)
@given(num_cells=st.integers(0, 500), world_size=st.integers(1, 9))
def test_ranks_share_the_cells_evenly_in_training(num_cells: int, world_size: int) -> None:
    counts = {len(WorkerSampler(num_cells, rank=r, world_size=world_size, is_even=True)) for r in range(world_size)}
    assert counts == {num_cells // world_size}


def test_unshuffled_rows_keep_the_order_of_the_files() -> None:
    assert order_of(CellSampler((5, 0, 7), block_rows=2, buffer_rows=4)).tolist() == list(range(12))


def test_chosen_rows_take_part_and_no_others() -> None:
    plan = CellSampler((6, 6), is_shuffled=True, rows_n=np.array([1, 4, 7, 11]))
    assert len(plan) == 4
    assert sorted(order_of(plan)) == [1, 4, 7, 11]


def test_an_empty_plan_has_no_rounds() -> None:
    assert list(CellSampler((0, 0), is_shuffled=True).rounds()) == []


def test_the_same_seed_and_epoch_give_the_same_order() -> None:
    orders = [order_of(CellSampler((300,), seed=3, epoch=2, is_shuffled=True)) for _ in range(2)]
    assert np.array_equal(*orders)


@pytest.mark.parametrize("change", [{"epoch": 1}, {"seed": 1}])
def test_another_epoch_or_seed_gives_another_order(change: dict[str, int]) -> None:
    other = CellSampler((300,), is_shuffled=True, **change)
    assert not np.array_equal(order_of(CellSampler((300,), is_shuffled=True)), order_of(other))


def test_the_order_never_changes_between_versions() -> None:
    order = order_of(CellSampler((5, 7), seed=1, epoch=2, is_shuffled=True, block_rows=2, buffer_rows=8))
    assert order.tolist() == GOLDEN_ORDER


def test_drawing_an_order_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    order_of(CellSampler((300,), is_shuffled=True))
    assert np.array_equal(before, np.random.get_state()[1])  # type: ignore[index]


@pytest.mark.parametrize(
    ("num_cells", "batch"),
    [(700, 32), (5_000, 128), (20_000, 128), (16_384 + 100, 64), (120_000, 128)],
    ids=["small file", "one round", "two rounds", "just over one round", "many rounds"],
)
def test_cells_sorted_by_label_come_out_as_mixed_as_by_a_perfect_shuffle(num_cells: int, batch: int) -> None:
    labels_n = np.arange(num_cells) * 10 // num_cells
    assert relative_entropy(labels_n[order_of(CellSampler((num_cells,), is_shuffled=True))], batch=batch) >= 0.98


@pytest.mark.parametrize("num_cells", [700, 16_384 + 100])
def test_the_last_batches_of_an_epoch_are_mixed_too(num_cells: int) -> None:
    labels_n = (np.arange(num_cells) * 10 // num_cells)[order_of(CellSampler((num_cells,), is_shuffled=True))]
    assert relative_entropy(labels_n, batch=32, last=96) >= 0.9


def test_rows_are_grouped_by_file_and_empty_files_own_none() -> None:
    groups = split_rows(np.array([0, 2, 3, 7]), starts_f=np.array([0, 3, 3, 6]))
    assert [(file, rows.tolist()) for file, rows in groups] == [(0, [0, 2]), (2, [0]), (3, [1])]


def test_no_rows_belong_to_no_file() -> None:
    assert split_rows(np.zeros(0, dtype=np.int64), starts_f=np.array([0, 3])) == []


def test_the_hash_never_changes_between_versions() -> None:
    assert (int(cell_key(7, 1, 42)), int(mix(np.uint64(1), np.uint64(2)))) == GOLDEN_HASHES


def test_hashes_of_neighboring_cells_are_spread_evenly() -> None:
    keys = [np.uint64(cell_key(0, 0, cell)) for cell in range(4000)]
    draws_n = np.array([unit(np.uint64(mix(key, np.uint64(1)))) for key in keys])
    assert np.abs(np.histogram(draws_n, bins=8, range=(0, 1))[0] - 500).max() < 4 * np.sqrt(500 * 7 / 8)


# -- shares -----------------------------------------------------------------------------------------------------------

DEALS = st.builds(
    lambda world_size, num_workers, **same: [
        [
            WorkerSampler(rank=r, world_size=world_size, worker=w, num_workers=num_workers, **same)
            for w in range(num_workers)
        ]
        for r in range(world_size)
    ],
    world_size=st.integers(1, 4),
    num_workers=st.integers(1, 4),
    num_cells=st.integers(0, 90),
    begin=st.integers(0, 95),
    is_even=st.booleans(),
    batch_size=st.integers(1, 7),
)


def positions_of(share: WorkerSampler) -> list[int]:
    """Return the positions that a worker takes, in order."""
    return np.flatnonzero(share.holds(np.arange(share.num_cells))).tolist()


@settings(max_examples=100, deadline=None)
@given(deal=DEALS)
def test_shares_hold_each_position_from_the_begin_on_once(deal: list[list[WorkerSampler]]) -> None:
    first = deal[0][0]
    held = sorted(position for rank in deal for share in rank for position in positions_of(share))
    left = list(range(first.begin, first.num_cells))
    assert held == left[: len(left) // len(deal) * len(deal)] if first.is_even else held == left
    assert [len(rank[0]) for rank in deal] == [sum(len(positions_of(share)) for share in rank) for rank in deal]


@settings(max_examples=100, deadline=None)
@given(deal=DEALS)
def test_batches_of_workers_in_turn_are_the_batches_of_one_worker(deal: list[list[WorkerSampler]]) -> None:
    for rank in deal:
        size = rank[0].batch_size
        own = [positions_of(share) for share in rank]
        batches = [[held[at : at + size] for at in range(0, len(held), size)] for held in own]
        turns = [batch for turn in zip_longest(*batches, fillvalue=[]) for batch in turn]
        alone = positions_of(replace(rank[0], worker=0, num_workers=1))
        assert [position for batch in turns for position in batch] == alone


def test_a_share_written_out() -> None:
    share = WorkerSampler(20, begin=4, rank=1, world_size=2, batch_size=2, worker=1, num_workers=2)
    assert positions_of(share) == [9, 11, 17, 19]


# -- batches under a budget -------------------------------------------------------------------------------------------

LENGTHS = st.lists(st.integers(1, 50), max_size=80).map(np.array)


def log_normal_lengths(num_cells: int, *, longest: int = 1024) -> np.ndarray:
    """Return lengths as real cells have them: a median of 500, some as long as may be."""
    return np.minimum(np.random.default_rng(1).lognormal(np.log(500), 0.5, num_cells).astype(int) + 3, longest)


def batches_of(sampler: BudgetSampler, *, skip: int = 0) -> list[list[int]]:
    """Return the rows of each batch, from the first one of the round that holds batch `skip` on."""
    parts = [np.split(rows, np.cumsum(sizes)[:-1]) for _, rows, sizes in sampler.rounds(skip=skip)]
    return [part.tolist() for round_ in parts for part in round_]


def a_budget_sampler(num_cells: int = 500, **changes: Any) -> BudgetSampler:
    """Sample batches of log-normal cells in several rounds."""
    rows = CellSampler((num_cells,), is_shuffled=True, block_rows=2, buffer_rows=128)
    return replace(BudgetSampler(rows, log_normal_lengths(num_cells), budget=4096), **changes)


# -- batches under a budget -------------------------------------------------------------------------------------------


def test_a_cell_joins_the_fullest_batch_that_has_room() -> None:
    order_m, sizes_b = fill(np.array([5, 7, 3, 5]), budget=10)
    # 5 and 7 open two batches; 3 would fit both and joins 7, so that the other 5 has room next to the first
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


# -- batches of an epoch ----------------------------------------------------------------------------------------------


def test_batches_hold_every_cell_once_and_know_their_sizes() -> None:
    sampler = a_budget_sampler()
    batches = batches_of(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(500))
    assert [len(batch) for batch in batches] == sampler.sizes_b.tolist()
    assert len(sampler) == len(batches) > 50


def test_batches_are_a_pure_function_of_seed_and_epoch() -> None:
    def drawn(**changes: int) -> list[list[int]]:
        sampler = a_budget_sampler()
        return batches_of(replace(sampler, cells=replace(sampler.cells, **changes)))

    assert drawn() == drawn()
    assert drawn() != drawn(epoch=1) != drawn(seed=1) != drawn()


@pytest.mark.parametrize("skip", [0, 1, 40, 41, 1000])
def test_skipping_leaves_out_whole_rounds_before_a_batch(skip: int) -> None:
    sampler = a_budget_sampler()
    firsts = [first for first, *_ in sampler.rounds(skip=skip)]
    whole = batches_of(sampler)
    assert batches_of(sampler, skip=skip) == whole[firsts[0] :] if firsts else skip >= len(sampler)
    assert not firsts or firsts[0] <= skip


def test_batches_of_a_sorted_corpus_are_mixed_like_those_of_a_perfect_shuffle() -> None:
    num_cells, rng = 20_000, np.random.default_rng(0)
    labels_n = np.arange(num_cells) * 10 // num_cells
    sampler = BudgetSampler(CellSampler((num_cells,), is_shuffled=True), log_normal_lengths(num_cells), 16_384)

    def mean_entropy(label_of_row_n: np.ndarray) -> float:
        shares = [np.bincount(label_of_row_n[batch]) / len(batch) for batch in batches_of(sampler)]
        return float(np.mean([-(p[p > 0] * np.log(p[p > 0])).sum() for p in shares]))

    assert mean_entropy(labels_n) / mean_entropy(rng.permutation(labels_n)) >= 0.98


def test_cells_that_grow_longer_along_the_corpus_are_mixed_too() -> None:
    """Length then follows from a cell's place, so batches by length would be batches of neighbors."""
    num_cells = 4000
    length_n = np.sort(log_normal_lengths(num_cells))
    sampler = BudgetSampler(CellSampler((num_cells,), is_shuffled=True), length_n, 16_384)
    places = [np.mean(batch) / num_cells for batch in batches_of(sampler)]
    assert np.std(places) < 0.065  # 0.29 / sqrt(29 cells) = 0.054 of a perfect shuffle, 0.29 of neighbors
    assert 0.3 < min(places) < max(places) < 0.7  # not even the last batches of a round


# -- how long sequences are -------------------------------------------------------------------------------------------

# Cells of 3, 0 and 9 stored values; of the middle value of cell 0 no token is made (it is below the first edge, 1).
VALUES = np.array([[2.0, 0.5, 2.0, 0, 0, 0, 0, 0, 0], [0] * 9, [2.0] * 9], dtype=np.float32)


def shard_of(source: Any, **settings: Any) -> tuple[Any, Any]:
    """Return the first shard of a path or AnnData, and a nine-gene tokenizer."""
    tokenizer = a_tokenizer(**settings)
    return ShardCache([source], **tokenizer.shard_options())[0], tokenizer


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def test_stored_values_are_counted_for_every_form_of_matrix(
    make_adata: Callable[..., ad.AnnData], tmp_path: Path, form: Callable[..., Any]
) -> None:
    adata = make_adata(VALUES, genes=GENES)
    adata.X = form(adata.X.toarray())
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert stored_values(H5adFile(str(tmp_path / "cells.h5ad"))).tolist() == [3, 0, 9]


def test_counting_reads_no_value_of_a_csr_file(write_h5ad: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = H5adFile(write_h5ad(VALUES, genes=GENES))
    monkeypatch.setattr(H5adFile, "read_rows", lambda *_: pytest.fail("values were read"))
    assert stored_values(file).tolist() == [3, 0, 9]


def test_genes_are_the_stored_values_where_all_become_tokens(make_adata: Callable[..., ad.AnnData]) -> None:
    shard, tokenizer = shard_of(make_adata(VALUES * 2, genes=GENES))
    assert gene_counts(shard, tokenizer).tolist() == [3, 0, 9]


def test_genes_are_no_more_than_max_length_has_room_for(make_adata: Callable[..., ad.AnnData]) -> None:
    shard, tokenizer = shard_of(make_adata(VALUES * 2, genes=GENES), max_length=8)
    assert gene_counts(shard, tokenizer).tolist() == [3, 0, 4]  # [CLS], two phenotypes and [EOS] take four of 8


def test_columns_outside_the_panel_scale_all_cells_of_the_file_alike(make_adata: Callable[..., ad.AnnData]) -> None:
    adata = make_adata(np.full((40, 12), 2.0, dtype=np.float32), genes=[*GENES, "X1", "X2", "X3"])
    shard, tokenizer = shard_of(adata)
    assert genes_per_value(shard, tokenizer, np.full(40, 12)) == pytest.approx(9 / 12)
    assert gene_counts(shard, tokenizer).tolist() == [9] * 40


def test_values_below_the_first_edge_scale_too(make_adata: Callable[..., ad.AnnData]) -> None:
    shard, tokenizer = shard_of(make_adata(VALUES, genes=GENES))
    assert genes_per_value(shard, tokenizer, np.array([3, 0, 9])) == pytest.approx(11 / 12)


def test_the_fewer_cells_a_batch_has_the_more_room_is_left_for_error(make_adata: Callable[..., ad.AnnData]) -> None:
    """Cells differ in their share of the panel, and a batch of two may hold two of those with the most."""
    shard, tokenizer = shard_of(make_adata(VALUES, genes=GENES))
    stored_n = np.array([3, 0, 9])
    shares = [genes_per_value(shard, tokenizer, stored_n, cells_per_batch=cells) for cells in (1000, 100, 30, 1)]
    assert 11 / 12 < shares[0] < shares[1] < shares[2] < shares[3] == 1


def test_an_empty_file_has_no_lengths(make_adata: Callable[..., ad.AnnData]) -> None:
    shard, tokenizer = shard_of(make_adata(np.zeros((0, 9), dtype=np.float32), genes=GENES))
    assert gene_counts(shard, tokenizer).tolist() == []


# -- draws by label -----------------------------------------------------------------------------------------------

SKEWED_N = np.repeat([0, 1, -1], [900, 9, 91])  # two labels, and cells without one


def test_a_label_weighs_as_the_square_root_of_its_cells() -> None:
    rate_n = draw_rates(SKEWED_N)
    assert rate_n[900] / rate_n[0] == pytest.approx(10)
    assert rate_n.mean() == pytest.approx(1)
    assert (rate_n[909:] == 1).all()


def test_cells_are_drawn_at_their_rate_and_evenly_over_epochs() -> None:
    draws = CellDraws(draw_rates(SKEWED_N), seed=3)
    counts_en = np.stack([np.bincount(draws.rows(epoch) % 1000, minlength=1000) for epoch in range(20)])
    assert np.abs(counts_en.sum(axis=0) - 20 * draws.rate_n).max() < 1
    assert (np.abs(counts_en - draws.rate_n) < 1).all()
    assert np.abs(counts_en.sum(axis=1) - 1000).max() < 60  # every epoch is about as long as there are cells


def test_repetitions_of_a_row_differ_and_follow_all_first_draws() -> None:
    rows_m = CellDraws(np.array([0.0, 2.0, 1.0, 3.0])).rows(5)
    assert rows_m.tolist() == [1, 2, 3, 5, 7, 11]


def test_every_draw_of_a_cell_over_all_epochs_has_a_number_of_its_own() -> None:
    draws = CellDraws(draw_rates(SKEWED_N), seed=1)
    times_en = np.stack([draws.before(epoch) for epoch in range(6)])
    for epoch in range(5):
        rows_m, repetition_m = draws.rows(epoch) % 1000, draws.rows(epoch) // 1000
        numbers_m = times_en[epoch][rows_m] + repetition_m
        assert (numbers_m < times_en[epoch + 1][rows_m]).all()
