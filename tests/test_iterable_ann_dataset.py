"""The stream of cells: the same for any number of workers, complete over ranks, and labelled by name."""

import logging
import pickle
import random
from collections.abc import Sequence
from pathlib import Path
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


def test_random_truncation_draws_other_genes_in_another_epoch_and_the_same_in_the_same() -> None:
    tokenizer = a_tokenizer(max_length=5, truncation="random", included_phenotypes=[])
    adata = ad.AnnData(np.full((6, 9), 2.0, dtype=np.float32), var=pd.DataFrame(index=GENES))
    dataset = IterableAnnDataset(adata, tokenizer)
    drawn = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        drawn.append([cell["token_type_ids"].tolist() for cell in dataset])
    assert drawn[0] == drawn[2] != drawn[1]


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
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("num_workers", [1, 3])
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
    options = {"phenotype_category": "cell_type", "obs_columns": {"cell_type": "bulk"}}
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
    adata = some_cells(2)
    adata.X = sparse.csr_matrix((2, 9), dtype=np.float32)
    with caplog.at_level(logging.WARNING):
        assert [len(cell["input_ids"]) for cell in IterableAnnDataset(adata, a_tokenizer())] == [4, 4]
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
