"""The stream of cells: the same for any number of workers, complete over ranks, and labelled by name."""

import itertools
import json
import logging
import pickle
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch.utils.data import DataLoader

from perturbgene.data_utils.data_collators import DataCollatorForPhenotypicMLM
from perturbgene.data_utils.iterable_ann_dataset import Cell, IterableAnnDataset
from perturbgene.data_utils.opening import FileList
from perturbgene.data_utils.scale import ExpressionBlock
from perturbgene.data_utils.shards import Shard
from perturbgene.data_utils.sources import H5adFile
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError
from tests.nine_genes import GENES, LABELS, a_tokenizer


def some_cells(num_cells: int, *, first: int = 0, genes: Sequence[str] = GENES) -> ad.AnnData:
    """Make cells of which every one differs: cell i holds the base-3 digits of its number over all genes."""
    digits_ng = (np.arange(first, first + num_cells)[:, None] + 1) // 3 ** np.arange(9) % 3 * 2.0
    columns = [GENES.index(gene) for gene in genes]
    names = [f"cell{first + i}" for i in range(num_cells)]
    cell_type = [LABELS["cell_type"][(first + i) % 3] for i in range(num_cells)]
    obs = pd.DataFrame({"cell_type": cell_type, "tissue": ["blood"] * num_cells}, index=names)
    matrix = sparse.csr_matrix(digits_ng[:, columns].astype(np.float32))
    return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=list(genes)))


def write(folder: Path, sizes: Sequence[int]) -> list[str]:
    """Write files of so many cells each, numbered through."""
    paths = []
    for number, size in enumerate(sizes):
        paths.append(str(folder / f"part{number}.h5ad"))
        some_cells(size, first=sum(sizes[:number])).write_h5ad(paths[-1])
    return paths


def indices(cells: Any) -> list[int]:
    """Return the numbers of the cells, in order."""
    return [cell.index for cell in cells]


def loaded(dataset: IterableAnnDataset, **options: Any) -> list[list[Cell]]:
    """Return the batches of a loader as lists of cells."""
    return list(DataLoader(dataset, batch_size=dataset.batch_size, collate_fn=list, **options))


def as_lists(cell: Cell) -> dict[str, list[int]]:
    """Return a cell's tensors as lists."""
    return {name: tensor.tolist() for name, tensor in cell.items()}


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Three files of 10, 0 and 27 cells."""
    return write(tmp_path, [10, 0, 27])


# -- one cell -----------------------------------------------------------------------------------------------------


def test_a_cell_is_a_dict_of_one_dimensional_long_tensors(paths: list[str]) -> None:
    cell = next(iter(IterableAnnDataset(paths, a_tokenizer())))
    assert as_lists(cell) == {
        "input_ids": [0, 4, 7, 10, 1],  # [CLS] B_cell blood G0=bin_1 [EOS]
        "token_type_ids": [0, 1, 2, 3, 0],
        "attention_mask": [1, 1, 1, 1, 1],
    }
    assert {tensor.dtype for tensor in cell.values()} == {torch.long}


def test_cells_are_numbered_over_all_files(paths: list[str]) -> None:
    assert indices(IterableAnnDataset(paths, a_tokenizer())) == list(range(37))


def test_anndata_objects_and_their_files_give_the_same_cells(paths: list[str]) -> None:
    objects = [ad.read_h5ad(path) for path in paths]
    from_files, from_memory = (IterableAnnDataset(given, a_tokenizer()) for given in (paths, objects))
    assert [*map(as_lists, from_files)] == [*map(as_lists, from_memory)]


def test_one_anndata_needs_no_list() -> None:
    assert len(list(IterableAnnDataset(some_cells(4), a_tokenizer()))) == 4


def test_column_order_and_missing_columns_never_change_the_genes_of_a_cell(tmp_path: Path) -> None:
    some_cells(5).write_h5ad(tmp_path / "a.h5ad")
    some_cells(5, genes=GENES[::-1]).write_h5ad(tmp_path / "b.h5ad")
    some_cells(5, genes=["G5", "G0", "G1", "G2", "G4"]).write_h5ad(tmp_path / "c.h5ad")
    cells = [*map(as_lists, IterableAnnDataset(tmp_path, a_tokenizer()))]
    assert cells[:5] == cells[5:10] == cells[10:]  # the first five cells express G0 and G1 only


def test_a_cell_knows_which_genes_its_file_measures(tmp_path: Path) -> None:
    some_cells(1).write_h5ad(tmp_path / "a.h5ad")
    some_cells(1, genes=["G5", "G0", "G1", "G2", "G4"]).write_h5ad(tmp_path / "b.h5ad")
    whole, part = IterableAnnDataset(tmp_path, a_tokenizer())
    assert whole.is_measured_g is None
    assert part.is_measured_g is not None
    assert np.flatnonzero(part.is_measured_g).tolist() == [0, 1, 2, 4, 5]


def test_files_of_known_sizes_are_opened_when_they_are_read(paths: list[str]) -> None:
    files = FileList(paths)
    files.sizes = sizes = IterableAnnDataset(paths, a_tokenizer()).sizes
    lazy = IterableAnnDataset(files, a_tokenizer())
    assert list(lazy.shards._open) == [0], "the first file speaks for all"
    assert indices(lazy) == list(range(sum(sizes)))


def test_a_file_that_changed_after_it_was_listed_is_refused(paths: list[str]) -> None:
    files, sizes = FileList(paths), IterableAnnDataset(paths, a_tokenizer()).sizes
    files.sizes = (*sizes[:-1], sizes[-1] + 1)
    stale = IterableAnnDataset(files, a_tokenizer())
    with pytest.raises(InputError, match=r"holds \d+ cells, not \d+: it was changed after it was "):
        list(stale)


def test_few_files_kept_whole_are_in_memory_while_threads_read_many(tmp_path: Path, monkeypatch: Any) -> None:
    paths = []
    for number in range(5):
        cells = some_cells(6, first=6 * number)
        cells.X = sparse.csc_matrix(cells.X)
        paths.append(str(tmp_path / f"{number}.h5ad"))
        cells.write_h5ad(paths[-1])
    loads: list[str] = []
    load = H5adFile._whole_csr

    def noted(file: H5adFile) -> Any:
        loads.extend([file.path] if file._whole is None else [])
        return load(file)

    stream = IterableAnnDataset(paths, a_tokenizer())
    monkeypatch.setattr(H5adFile, "_whole_csr", noted)
    assert indices(stream) == list(range(30))
    assert len(loads) == len(set(loads)), "no file is read whole twice in a round"


def test_the_thread_that_reads_ahead_ends_with_its_consumer(paths: list[str]) -> None:
    stream = iter(IterableAnnDataset(paths, a_tokenizer(), shuffle=True, block_rows=2, buffer_rows=16))
    next(stream)
    assert any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    del stream
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())


# -- order --------------------------------------------------------------------------------------------------------


def test_unshuffled_cells_come_in_file_order_also_by_batches(paths: list[str]) -> None:
    dataset = IterableAnnDataset(paths, a_tokenizer(), batch_size=4)
    assert [index for batch in loaded(dataset) for index in indices(batch)] == list(range(37))


def test_every_cell_comes_once_per_shuffled_epoch(paths: list[str]) -> None:
    order = indices(IterableAnnDataset(paths, a_tokenizer(), shuffle=True))
    assert order != list(range(37))
    assert sorted(order) == list(range(37))


def test_the_order_is_a_pure_function_of_seed_and_epoch(paths: list[str]) -> None:
    orders = {}
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        for _ in range(2):
            dataset = IterableAnnDataset(paths, a_tokenizer(), shuffle=True, seed=seed)
            dataset.set_epoch(epoch)
            orders.setdefault((seed, epoch), set()).add(tuple(indices(dataset)))
    assert [len(found) for found in orders.values()] == [1, 1, 1]
    assert len(set.union(*orders.values())) == 3


def test_a_small_buffer_still_gives_every_cell_its_own_tokens(paths: list[str]) -> None:
    plain = {cell.index: as_lists(cell) for cell in IterableAnnDataset(paths, a_tokenizer())}
    dataset = IterableAnnDataset(paths, a_tokenizer(), shuffle=True, block_rows=1, buffer_rows=8)
    assert {cell.index: as_lists(cell) for cell in dataset} == plain


@pytest.mark.parametrize("shuffle", [False, True], ids=["evaluation", "training"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_batches_are_the_same_for_any_number_of_workers(paths: list[str], num_workers: int, shuffle: bool) -> None:
    dataset = IterableAnnDataset(paths, a_tokenizer(), shuffle=shuffle, batch_size=4)
    assert [*map(indices, loaded(dataset, num_workers=num_workers))] == [*map(indices, loaded(dataset))]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("num_workers", [1, 3])
def test_masks_are_the_same_cell_by_cell_for_any_number_of_workers(paths: list[str], num_workers: int) -> None:
    tokenizer = a_tokenizer()
    dataset = IterableAnnDataset(paths, tokenizer, shuffle=True, batch_size=4)
    collator = DataCollatorForPhenotypicMLM(tokenizer, gene_mask_prob=0.5)
    plain = list(DataLoader(dataset, batch_size=4, collate_fn=collator))
    worked = list(DataLoader(dataset, batch_size=4, collate_fn=collator, num_workers=num_workers))
    assert len(plain) == len(worked) == 10
    assert all(torch.equal(a[name], b[name]) for a, b in zip(plain, worked, strict=True) for name in a)


def test_set_epoch_reaches_persistent_workers(paths: list[str]) -> None:
    dataset = IterableAnnDataset(paths, a_tokenizer(), shuffle=True, batch_size=8)
    expected = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        expected.append(indices(dataset))
    loader = DataLoader(dataset, batch_size=8, collate_fn=list, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert [index for batch in loader for index in indices(batch)] == expected[epoch]


def test_streaming_leaves_all_global_generators_alone(paths: list[str]) -> None:
    def states() -> tuple[Any, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore

    tokenizer, before = a_tokenizer(), states()
    collator = DataCollatorForPhenotypicMLM(tokenizer)
    collator(list(IterableAnnDataset(paths, tokenizer, shuffle=True)))
    assert states() == before


def test_a_pickled_dataset_yields_the_same_cells(paths: list[str]) -> None:
    dataset = IterableAnnDataset(paths, a_tokenizer(), shuffle=True, phenotype_category="cell_type")
    dataset.set_epoch(3)
    first = indices(dataset)
    assert indices(pickle.loads(pickle.dumps(dataset))) == first


# -- ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_see_each_cell_once_in_evaluation(paths: list[str], world_size: int) -> None:
    ranks = [IterableAnnDataset(paths, a_tokenizer(), rank=r, world_size=world_size) for r in range(world_size)]
    assert sorted(index for dataset in ranks for index in indices(dataset)) == list(range(37))


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_has_the_same_number_of_batches_in_training(paths: list[str], world_size: int) -> None:
    options = {"shuffle": True, "batch_size": 4, "world_size": world_size}
    counts = {len(loaded(IterableAnnDataset(paths, a_tokenizer(), rank=r, **options))) for r in range(world_size)}
    assert counts == {-(-(37 // world_size) // 4)}


@pytest.mark.parametrize("shuffle", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_length_is_the_number_of_cells_that_come(paths: list[str], world_size: int, shuffle: bool) -> None:
    for rank in range(world_size):
        dataset = IterableAnnDataset(paths, a_tokenizer(), shuffle=shuffle, rank=rank, world_size=world_size)
        assert len(dataset) == len(list(dataset))


def test_two_ranks_of_four_see_the_global_batches_of_one_rank_of_eight(paths: list[str]) -> None:
    alone = loaded(IterableAnnDataset(paths, a_tokenizer(), shuffle=True, batch_size=8))
    first, second = (
        loaded(IterableAnnDataset(paths, a_tokenizer(), shuffle=True, batch_size=4, rank=rank, world_size=2))
        for rank in range(2)
    )
    together = [sorted(indices(a + b)) for a, b in zip(first, second, strict=True)]
    assert together[:4] == [sorted(indices(batch)) for batch in alone[:4]]


def test_more_ranks_than_cells_leave_some_ranks_without_any_in_evaluation() -> None:
    counts = [len(list(IterableAnnDataset(some_cells(2), a_tokenizer(), rank=r, world_size=3))) for r in range(3)]
    assert counts == [1, 1, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_of_all_ranks_are_alike_in_number_in_training_and_complete_in_evaluation(
    paths: list[str], world_size: int
) -> None:
    tokenizer, collator = a_tokenizer(), Numbers()
    for shuffle in (False, True):
        ranks = [
            [*IterableAnnDataset(paths, tokenizer, shuffle=shuffle, batch_size=4, rank=rank, world_size=world_size)
             .batches(collator)]
            for rank in range(world_size)
        ]  # fmt: skip
        cells = [index for rank in ranks for batch in rank for index in batch["cells"]]
        assert len(cells) == len(set(cells)) == (37 // world_size * world_size if shuffle else 37)
        assert not shuffle or len({len(rank) for rank in ranks}) == 1


# -- resuming -----------------------------------------------------------------------------------------------------


class Numbers:
    """A collator that keeps only which cells a batch holds."""

    def collate_block(self, block: TokenBlock) -> dict[str, Any]:
        return {"cells": block.cells_n.tolist()}


def a_stream(paths: Sequence[str], **options: Any) -> IterableAnnDataset:
    """Make a shuffled data set of several rounds, in batches of 3."""
    small = {"shuffle": True, "seed": 5, "batch_size": 3, "block_rows": 2, "buffer_rows": 16}
    return IterableAnnDataset(list(paths), a_tokenizer(), **{**small, **options})


def numbers(stream: IterableAnnDataset, **options: Any) -> list[list[int]]:
    """Return the cells of each finished batch, as a loader gives them."""
    return [batch["cells"] for batch in DataLoader(stream.batches(Numbers()), batch_size=None, **options)]


def stopped_after(stream: IterableAnnDataset, num_batches: int) -> dict[str, Any]:
    """Use so many batches and return the state, as it comes back from a JSON file."""
    used = list(itertools.islice(stream.batches(Numbers()), num_batches))
    assert len(used) == num_batches
    return json.loads(json.dumps(stream.state_dict()))  # type: ignore[no-any-return]


@pytest.fixture
def rows_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the numbers of all cells that are read."""
    cells: list[int] = []
    read = Shard.read

    def read_and_note(shard: Shard, rows_m: np.ndarray, *, first_cell: int = 0, **options: Any) -> ExpressionBlock:
        cells.extend((rows_m + first_cell).tolist())
        return read(shard, rows_m, first_cell=first_cell, **options)

    monkeypatch.setattr(Shard, "read", read_and_note)
    return cells


@pytest.mark.parametrize("shuffle", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("num_batches", [0, 1, 5, 12, 13])
def test_a_resumed_stream_goes_on_with_the_next_batch_and_reads_nothing_before(
    paths: list[str], rows_read: list[int], num_batches: int, shuffle: bool
) -> None:
    whole = numbers(a_stream(paths, shuffle=shuffle))
    state = stopped_after(a_stream(paths, shuffle=shuffle), num_batches)
    resumed = a_stream(paths, shuffle=shuffle)
    resumed.load_state_dict(state)
    rows_read.clear()
    assert numbers(resumed) == whole[num_batches:]
    assert sorted(rows_read) == sorted(index for batch in whole[num_batches:] for index in batch)


def test_cell_by_cell_a_stream_resumes_within_a_batch(paths: list[str]) -> None:
    whole = indices(a_stream(paths))
    first = a_stream(paths)
    cells = iter(first)
    assert indices(next(cells) for _ in range(7)) == whole[:7]
    second = a_stream(paths)
    second.load_state_dict(first.state_dict())
    assert indices(second) == whole[7:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_a_stream_resumes_with_any_number_of_loader_workers(paths: list[str], num_workers: int) -> None:
    whole = numbers(a_stream(paths))
    resumed = a_stream(paths)
    resumed.load_state_dict(a_stream(paths).state_after(4))
    assert numbers(resumed, num_workers=num_workers) == whole[4:]


def test_live_workers_resume_and_then_see_the_whole_next_epoch(paths: list[str]) -> None:
    stream = a_stream(paths)
    loader = DataLoader(stream.batches(Numbers()), batch_size=None, num_workers=2, persistent_workers=True)
    whole = [batch["cells"] for batch in loader]
    stream.load_state_dict(stream.state_after(9))
    assert [batch["cells"] for batch in loader] == whole[9:]
    stream.set_epoch(1)
    other = a_stream(paths)
    other.set_epoch(1)
    assert [batch["cells"] for batch in loader] == numbers(other)


@pytest.mark.parametrize("keep_all", [True, False], ids=["evaluation", "training"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_another_number_of_ranks_shares_exactly_the_cells_that_are_left(
    paths: list[str], before: int, after: int, keep_all: bool
) -> None:
    options = {"keep_all": keep_all, "world_size": before}
    used = [numbers(a_stream(paths, rank=rank, **options))[:3] for rank in range(before)]
    state = stopped_after(a_stream(paths, rank=before - 1, **options), 3)
    ranks = []
    for rank in range(after):
        resumed = a_stream(paths, keep_all=keep_all, rank=rank, world_size=after)
        resumed.load_state_dict(state)
        ranks.append(numbers(resumed))
    done = [index for rank in used for batch in rank for index in batch]
    left = [index for rank in ranks for batch in rank for index in batch]
    assert len(set(done + left)) == len(done + left)
    assert len(done) == 9 * before
    assert len(left) == (37 - len(done) if keep_all else (37 - len(done)) // after * after)
    assert keep_all or len({len(rank) for rank in ranks}) == 1


def test_a_state_survives_several_stops_on_other_ranks(paths: list[str]) -> None:
    cells, state = [], a_stream(paths).state_dict()
    for world_size, num_batches in [(2, 2), (1, 3), (3, 1), (1, 9)]:
        for rank in range(world_size):
            stream = a_stream(paths, keep_all=True, rank=rank, world_size=world_size)
            stream.load_state_dict(state)
            batches = itertools.islice(stream.batches(Numbers()), num_batches)
            cells += [index for batch in batches for index in batch["cells"]]
        state = stream.state_after(num_batches)
    assert sorted(cells) == list(range(37))


def test_masks_of_a_resumed_stream_are_those_of_the_uninterrupted_one(paths: list[str]) -> None:
    collator = DataCollatorForPhenotypicMLM(a_tokenizer(), gene_mask_prob=0.5)
    whole = list(a_stream(paths).batches(collator))
    resumed = a_stream(paths)
    resumed.load_state_dict(a_stream(paths).state_after(6))
    pairs = list(zip(whole[6:], resumed.batches(collator), strict=True))
    assert len(pairs) == 7
    assert all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


def test_a_state_brings_its_epoch_along_and_ends_with_it(paths: list[str]) -> None:
    first = a_stream(paths)
    first.set_epoch(3)
    whole = numbers(first)
    second = a_stream(paths)
    second.load_state_dict(stopped_after(first, 10))
    second.set_epoch(3)
    assert (second.epoch, numbers(second), numbers(second)) == (3, whole[10:], whole)
    second.load_state_dict(first.state_after(10))
    second.set_epoch(4)
    assert len(numbers(second)) == len(whole)


def test_a_state_counts_labelled_cells_only() -> None:
    adata = with_labels(["T cell", None, "B cell", "B cell", None, "B cell", "B cell"])
    options: dict[str, Any] = {"phenotype_category": "cell_type", "batch_size": 2}
    first, second = (IterableAnnDataset(adata, a_tokenizer(), **options) for _ in range(2))
    second.load_state_dict(stopped_after(first, 1))
    assert indices(second) == [3, 5, 6]


def test_a_state_is_tiny(paths: list[str]) -> None:
    assert len(json.dumps(a_stream(paths).state_dict())) < 200


def test_the_length_is_of_the_whole_epoch_after_resuming_too(paths: list[str]) -> None:
    stream = a_stream(paths)
    stream.load_state_dict(stream.state_after(5))
    assert (len(stream), len(stream.batches(Numbers())), stream.num_batches(15)) == (37, 13, 8)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"shuffle": False}, r"another corpus \(37 cells.*shuffle, block_rows or buffer_rows differ. Give the same"),
        ({"block_rows": 3}, "another corpus"),
        ({"buffer_rows": 24}, "another corpus"),
        ({"seed": 6}, "drawn with seed 5, .* Give --seed 5"),
    ],
    ids=["order", "blocks", "buffer", "seed"],
)
def test_a_state_of_another_order_is_refused(paths: list[str], other: dict[str, Any], message: str) -> None:
    state = a_stream(paths).state_after(2)
    with pytest.raises(InputError, match=message):
        a_stream(paths, **other).load_state_dict(state)


def test_a_state_of_other_files_is_refused(paths: list[str]) -> None:
    state = a_stream(paths).state_after(2)
    with pytest.raises(InputError, match=r"another corpus \(37 cells, \w+\), not of .* \(37 cells"):
        a_stream(paths[::-1]).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 0}, "damaged: its format is 0"), ({"consumed": 38}, "38 of 37 cells done"), ({"consumed": -1}, "-1")],
)
def test_a_damaged_state_is_refused(paths: list[str], change: dict[str, int], message: str) -> None:
    state = {**a_stream(paths).state_dict(), **change}
    with pytest.raises(InputError, match=message):
        a_stream(paths).load_state_dict(state)


def test_a_loader_worker_refuses_a_state(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = a_stream(paths)
    monkeypatch.setattr("perturbgene.data_utils.iterable_ann_dataset.get_worker_info", lambda: SimpleNamespace(id=0))
    with pytest.raises(InputError, match="Load it into the data set before the loader starts"):
        stream.load_state_dict(a_stream(paths).state_after(2))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("persistent_workers", [False, True])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_a_resumed_stream_is_whole_again_in_its_second_pass(
    paths: list[str], num_workers: int, persistent_workers: bool
) -> None:
    stream = a_stream(paths)
    whole = numbers(stream)
    stream.load_state_dict(stream.state_after(9))
    workers = {"num_workers": num_workers, "persistent_workers": persistent_workers}
    loader = DataLoader(stream.batches(Numbers()), batch_size=None, **workers)
    passes = [[batch["cells"] for batch in loader] for _ in range(3)]
    assert passes == [whole[9:], whole, whole]
    assert numbers(stream) == numbers(stream, num_workers=4) == whole


# -- batches under a budget of tokens --------------------------------------------------------------------------------

BUDGET = {"tokens_per_batch": 24}


class Lengths:
    """A collator that keeps only the tokens of each cell."""

    def collate_block(self, block: TokenBlock) -> dict[str, Any]:
        return {"lengths": np.diff(block.offsets_n1).tolist()}


def test_planned_batches_hold_every_cell_once_in_another_order_each_epoch(paths: list[str]) -> None:
    stream = a_stream(paths, **BUDGET)
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append(numbers(stream))
        assert len(orders[-1]) == len(stream.batches(Numbers())) == stream.num_batches(epoch=epoch)
        assert sorted(index for batch in orders[-1] for index in batch) == list(range(37))
    assert orders[0] == orders[2] != orders[1]


def test_no_batch_has_more_tokens_than_its_budget_and_most_are_full(paths: list[str]) -> None:
    stream = a_stream(paths, tokens_per_batch=24, buffer_rows=64)
    sums = [sum(batch["lengths"]) for batch in stream.batches(Lengths())]
    assert max(sums) <= 24
    assert len(sums) <= 1 + -(-sum(sums) // 24)
    assert sum(sums) == sum(len(cell["input_ids"]) for cell in a_stream(paths))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_planned_batches_are_the_same_for_any_number_of_workers(paths: list[str], num_workers: int) -> None:
    assert numbers(a_stream(paths, **BUDGET), num_workers=num_workers) == numbers(a_stream(paths, **BUDGET))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_take_planned_batches_in_turn_and_as_many_each(paths: list[str], world_size: int) -> None:
    alone = numbers(a_stream(paths, **BUDGET))
    ranks = [a_stream(paths, rank=rank, world_size=world_size, **BUDGET) for rank in range(world_size)]
    for rank, stream in enumerate(ranks):
        own = alone[rank::world_size][: len(alone) // world_size]
        assert numbers(stream) == own
        assert len(stream) == sum(map(len, own))
        assert stream.num_batches() == len(own)


@pytest.mark.parametrize("num_batches", [0, 1, 7])
def test_a_planned_stream_resumes_with_the_next_batch_and_reads_nothing_before(
    paths: list[str], rows_read: list[int], num_batches: int
) -> None:
    whole = numbers(a_stream(paths, **BUDGET))
    state = stopped_after(a_stream(paths, **BUDGET), num_batches)
    assert state == a_stream(paths, **BUDGET).state_after(num_batches)
    resumed = a_stream(paths, **BUDGET)
    resumed.load_state_dict(state)
    len(resumed)
    rows_read.clear()
    assert numbers(resumed) == whole[num_batches:]
    assert sorted(rows_read) == sorted(index for batch in whole[num_batches:] for index in batch)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("before", "after", "workers"), [(1, 2, 0), (2, 1, 2), (2, 3, 1), (3, 2, 0)])
def test_planned_batches_that_are_left_come_on_other_ranks_and_workers(
    paths: list[str], before: int, after: int, workers: int
) -> None:
    whole = numbers(a_stream(paths, **BUDGET))
    state = a_stream(paths, world_size=before, **BUDGET).state_after(2)
    ranks = []
    for rank in range(after):
        resumed = a_stream(paths, rank=rank, world_size=after, keep_all=True, **BUDGET)
        resumed.load_state_dict(state)
        ranks.append(numbers(resumed, num_workers=workers))
    left = [batch for turn in itertools.zip_longest(*ranks) for batch in turn if batch is not None]
    assert left == whole[2 * before :]


def test_cell_by_cell_a_planned_stream_resumes_at_the_batch_under_way(paths: list[str]) -> None:
    whole = numbers(a_stream(paths, tokens_per_batch=24))
    first = a_stream(paths, tokens_per_batch=24)
    used = len(whole[0]) + len(whole[1]) + 1
    assert indices(itertools.islice(iter(first), used)) == [index for batch in whole for index in batch][:used]
    second = a_stream(paths, tokens_per_batch=24)
    second.load_state_dict(first.state_dict())
    assert numbers(second) == whole[2:]


def test_cells_without_a_label_are_in_no_planned_batch() -> None:
    adata = with_labels(["T cell", None, "B cell", "B cell", None, "B cell", "B cell"])
    cells = IterableAnnDataset(adata, a_tokenizer(), shuffle=True, phenotype_category="cell_type", tokens_per_batch=16)
    assert sorted(indices(cells)) == [0, 2, 3, 5, 6]
    assert all(cell["labels"] >= 0 for cell in cells)


@pytest.mark.parametrize(
    ("saved", "loaded_by", "message"),
    [
        ({}, BUDGET, "counts cells, so it does not say which batches of 24 tokens are done. Give --tokens_per_batch"),
        (BUDGET, {}, "counts batches of 24 tokens, so it does not say which cells are done"),
        (
            BUDGET,
            {"tokens_per_batch": 48},
            "counts batches of 24 tokens, so it does not say which batches of 48 tokens",
        ),
    ],
)
def test_a_position_among_other_batches_is_refused(
    paths: list[str], saved: dict[str, Any], loaded_by: dict[str, Any], message: str
) -> None:
    state = a_stream(paths, **saved).state_after(2)
    with pytest.raises(InputError, match=message):
        a_stream(paths, **loaded_by).load_state_dict(state)


def test_planned_batches_of_other_values_are_refused_although_the_files_are_alike_in_size(tmp_path: Path) -> None:
    first, other = some_cells(12), some_cells(12, first=5)
    state = IterableAnnDataset(first, a_tokenizer(), shuffle=True, tokens_per_batch=24).state_after(1)
    with pytest.raises(InputError, match="another corpus"):
        IterableAnnDataset(other, a_tokenizer(), shuffle=True, tokens_per_batch=24).load_state_dict(state)


def test_a_budget_that_may_not_hold_a_single_cell_is_refused(paths: list[str]) -> None:
    with pytest.raises(InputError, match=r"tokens_per_batch is 15, but one cell may have max_length 16. Raise --tok"):
        a_stream(paths, tokens_per_batch=15)


# -- draws by label -----------------------------------------------------------------------------------------------


@pytest.fixture
def skewed(tmp_path: Path) -> list[str]:
    """Two files of 20 and 17 cells; a column `lineage` of obs, which is no phenotype, has 32 x a, 4 x b and nothing."""
    paths = []
    for number, (size, first) in enumerate(((20, 0), (17, 20))):
        cells = some_cells(size, first=first)
        cells.obs["lineage"] = [{3: "b", 7: "b", 25: "b", 30: "b", 36: ""}.get(first + i, "a") for i in range(size)]
        paths.append(str(tmp_path / f"skewed{number}.h5ad"))
        cells.write_h5ad(paths[-1])
    return paths


class Draws:
    """A collator that keeps the number of each cell and of its draw."""

    def collate_block(self, block: TokenBlock) -> dict[str, Any]:
        assert block.epochs_n is not None
        return {"draws": list(zip(block.cells_n.tolist(), block.epochs_n.tolist(), strict=True))}


def draws(stream: IterableAnnDataset, **options: Any) -> list[list[tuple[int, int]]]:
    """Return the draws of each finished batch."""
    batches = DataLoader(stream.batches(Draws()), batch_size=None, **options)
    return [[tuple(draw) for draw in batch["draws"]] for batch in batches]  # the loader has made lists of them


WITH_DRAWS: list[dict[str, Any]] = [{"sample_by": "lineage"}, {"sample_by": "lineage", **BUDGET}]


@pytest.mark.parametrize("options", WITH_DRAWS, ids=["cells", "budget"])
def test_rare_labels_are_drawn_by_the_square_root_of_their_cells(skewed: list[str], options: dict[str, Any]) -> None:
    stream, drawn = a_stream(skewed, **options), list[tuple[int, int]]()
    for epoch in range(12):
        stream.set_epoch(epoch)
        drawn += [draw for batch in draws(stream) for draw in batch]
    assert len(set(drawn)) == len(drawn)  # no draw of a cell has the masks of another
    times_n = np.bincount([cell for cell, _ in drawn], minlength=37)
    rate_b = 36 / (np.sqrt(32) + 2) / 2
    assert times_n[[3, 7, 25, 30]] == pytest.approx(12 * rate_b, abs=1)
    assert times_n[[0, 1, 35]] == pytest.approx(12 * rate_b * 2 / np.sqrt(32), abs=1)
    assert times_n[36] == 12


@pytest.mark.parametrize("options", WITH_DRAWS, ids=["cells", "budget"])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_draws_are_the_same_for_any_number_of_workers_and_after_resuming(
    skewed: list[str], options: dict[str, Any], num_workers: int
) -> None:
    stream = a_stream(skewed, **options)
    stream.set_epoch(3)
    whole = draws(stream)
    assert draws(stream, num_workers=num_workers) == whole
    resumed = a_stream(skewed, **options)
    resumed.load_state_dict(stream.state_after(4))
    assert draws(resumed, num_workers=num_workers) == whole[4:]


def test_ranks_share_the_draws(skewed: list[str]) -> None:
    ranks = [draws(a_stream(skewed, sample_by="lineage", rank=rank, world_size=2)) for rank in range(2)]
    together = [draw for rank in ranks for batch in rank for draw in batch]
    every = [draw for batch in draws(a_stream(skewed, sample_by="lineage")) for draw in batch]
    assert len(set(together)) == len(together) >= len(every) - 1
    assert set(together) <= set(every)


def test_a_repeated_cell_has_its_own_tokens_and_other_masks(skewed: list[str]) -> None:
    stream = a_stream(skewed, sample_by="lineage", batch_size=37, seed=1)
    cells = [cell for cell in stream if cell.index == 3]
    assert len(cells) == 2
    assert torch.equal(cells[0]["input_ids"], cells[1]["input_ids"])
    collator = DataCollatorForPhenotypicMLM(stream.tokenizer, gene_mask_prob=0.5)
    first, second = (collator([cell])["labels"].tolist() for cell in cells)
    assert first != second


def test_classes_are_counted_by_cells_or_by_draws(skewed: list[str]) -> None:
    stream = a_stream(skewed, sample_by="lineage", phenotype_category="cell_type")
    rate_n = stream.rate_n
    assert rate_n is not None
    assert stream.class_counts().tolist() == [13, 12, 12]
    assert stream.class_counts(per_draw=True) == pytest.approx([rate_n[first::3].sum() for first in range(3)])


def test_other_draws_are_another_order(skewed: list[str]) -> None:
    state = a_stream(skewed, sample_by="lineage").state_after(2)
    with pytest.raises(InputError, match="another corpus"):
        a_stream(skewed).load_state_dict(state)


def test_a_column_to_sample_by_that_no_file_has_is_refused(skewed: list[str]) -> None:
    with pytest.raises(InputError, match=r"sample_by is 'linage'.*Did you mean 'lineage'\?"):
        a_stream(skewed, sample_by="linage")


# -- labels -------------------------------------------------------------------------------------------------------


def with_labels(labels: Sequence[object]) -> ad.AnnData:
    """Make cells with these values of cell_type."""
    adata = some_cells(len(labels))
    adata.obs["cell_type"] = pd.Categorical(labels)
    return adata


def test_labels_are_the_positions_in_the_vocabulary() -> None:
    adata = with_labels(["T cell", "B cell", "NK cell"])
    cells = IterableAnnDataset(adata, a_tokenizer(), phenotype_category="cell_type")
    assert [cell["labels"].tolist() for cell in cells] == [2, 0, 1]


def test_the_binary_label_is_one_and_all_others_zero() -> None:
    adata = with_labels(["T cell", "B cell", "NK cell"])
    cells = IterableAnnDataset(adata, a_tokenizer(), phenotype_category="cell_type", binary_label="NK cell")
    assert [cell["labels"].tolist() for cell in cells] == [0, 0, 1]


def test_the_answer_never_stands_in_the_input_of_a_classifier() -> None:
    cells = IterableAnnDataset(some_cells(6), a_tokenizer(), phenotype_category="cell_type")
    assert all(1 not in cell["token_type_ids"] and 2 in cell["token_type_ids"] for cell in cells)


def test_cells_without_a_label_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    adata = with_labels(["T cell", None, "unknown", "B cell", "Monocyte"])
    with caplog.at_level(logging.WARNING):
        cells = IterableAnnDataset(adata, a_tokenizer(), phenotype_category="cell_type")
    assert "3 of 5 cells have no known cell_type and are left out" in caplog.text
    assert (indices(cells), len(cells)) == ([0, 3], 2)


def test_cells_left_out_do_not_unbalance_the_ranks() -> None:
    adata = with_labels(["T cell", None, "B cell", "B cell", None, "B cell", "B cell"])
    options = {"phenotype_category": "cell_type", "shuffle": True, "world_size": 2}
    ranks = [indices(IterableAnnDataset(adata, a_tokenizer(), rank=rank, **options)) for rank in range(2)]
    assert [len(ranks[0]), len(ranks[1]), len({*ranks[0], *ranks[1]})] == [2, 2, 4]


def test_class_counts_are_of_labelled_cells_of_all_ranks() -> None:
    adata = with_labels(["T cell", None, "B cell", "B cell"])
    cells = IterableAnnDataset(adata, a_tokenizer(), phenotype_category="cell_type", rank=1, world_size=2)
    assert cells.class_counts().tolist() == [2, 0, 1]


def test_a_label_column_of_another_name_is_read() -> None:
    adata = with_labels(["T cell", "B cell"])
    adata.obs = adata.obs.rename(columns={"cell_type": "bulk"})
    options = {"phenotype_category": "cell_type", "phenotypes": {"cell_type": "bulk"}}
    assert [cell["labels"].tolist() for cell in IterableAnnDataset(adata, a_tokenizer(), **options)] == [2, 0]


def test_another_phenotype_may_be_missing_from_the_file_of_a_classifier() -> None:
    adata = some_cells(3)
    del adata.obs["tissue"]
    cells = IterableAnnDataset(adata, a_tokenizer(), phenotype_category="cell_type")
    assert next(iter(cells))["input_ids"].tolist() == [0, 10, 1]


# -- refusals -----------------------------------------------------------------------------------------------------


def test_a_file_with_too_few_panel_genes_is_refused() -> None:
    with pytest.raises(InputError, match=r"3 of 9 panel genes.*under --min_gene_coverage 0.5"):
        IterableAnnDataset(some_cells(2, genes=GENES[:3]), a_tokenizer())


def test_a_file_with_few_panel_genes_passes_when_it_may() -> None:
    assert len(IterableAnnDataset(some_cells(2, genes=GENES[:3]), a_tokenizer(), min_gene_coverage=0.2)) == 2


def test_a_missing_label_column_is_refused_with_the_nearest_name() -> None:
    adata = some_cells(3)
    adata.obs = adata.obs.rename(columns={"cell_type": "cell_typ"})
    with pytest.raises(InputError, match=r"no obs column 'cell_type'. Did you mean 'cell_typ'"):
        IterableAnnDataset(adata, a_tokenizer(), phenotype_category="cell_type")


def test_cells_without_labels_are_no_data_set_of_a_classifier() -> None:
    with pytest.raises(InputError, match=r"no cell of 'AnnData' has a 'cell_type'.*hold some of them out"):
        IterableAnnDataset(with_labels(["", "unknown"]), a_tokenizer(), phenotype_category="cell_type")


def test_a_data_set_without_any_known_label_is_refused() -> None:
    with pytest.raises(InputError, match="no cell of 'AnnData' has a known 'cell_type'"):
        IterableAnnDataset(with_labels(["x", "y"]), a_tokenizer(), phenotype_category="cell_type")


def test_an_unknown_binary_label_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"binary_label 'Monocyte' is not a cell_type. Choose one of: 'B cell'"):
        IterableAnnDataset(some_cells(3), a_tokenizer(), phenotype_category="cell_type", binary_label="Monocyte")


def test_files_without_any_cell_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hold no cells"):
        IterableAnnDataset(write(tmp_path, [0]), a_tokenizer())


def test_a_phenotype_that_the_vocabulary_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="phenotype 'age' is not in the vocabulary"):
        IterableAnnDataset(some_cells(3), a_tokenizer(), phenotype_category="age")


# -- reports ------------------------------------------------------------------------------------------------------


def test_the_coverage_of_every_file_is_logged(paths: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        IterableAnnDataset(paths, a_tokenizer())
    assert caplog.text.count("9 of 9 panel genes found (100.0%)") == 3


def test_cells_that_express_nothing_are_yielded_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    adata = some_cells(3)
    adata.X = sparse.csr_matrix(([1.5], ([2], [0])), shape=(3, 9), dtype=np.float32)
    with caplog.at_level(logging.WARNING):
        assert [len(cell["input_ids"]) for cell in IterableAnnDataset(adata, a_tokenizer())] == [4, 4, 5]
    assert "2 cells express no gene of the panel" in caplog.text


@pytest.mark.parametrize(
    ("matrix", "how"),
    [(sparse.csc_matrix, "compressed by columns"), (lambda x: x.toarray(), "dense")],
    ids=["csc", "dense"],
)
def test_slow_formats_give_the_same_cells_and_a_hint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, matrix: Any, how: str
) -> None:
    adata = some_cells(6)
    expected = [*map(as_lists, IterableAnnDataset(adata, a_tokenizer()))]
    ad.AnnData(matrix(adata.X), obs=adata.obs, var=adata.var).write_h5ad(tmp_path / "slow.h5ad")
    with caplog.at_level(logging.INFO):
        assert [*map(as_lists, IterableAnnDataset(tmp_path / "slow.h5ad", a_tokenizer()))] == expected
    assert f"is stored {how}: slow; `perturbgene prepare` makes it fast" in caplog.text
