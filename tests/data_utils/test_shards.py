"""A file through a panel: which rows, on which scale, with which labels, and what is said about the rest."""

import logging
import os
import resource
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from torch.utils.data import DataLoader, IterableDataset

from perturbgene.data_utils.genes import GenePanel
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset, donors_of
from perturbgene.data_utils.labels import Vocabulary
from perturbgene.data_utils.shards import MOST_WHOLE_FILES, Shard, ShardCache
from perturbgene.data_utils.sources import H5adFile, MemoryFile
from perturbgene.data_utils.values import LIBRARY_SIZE_COLUMN
from perturbgene.errors import InputError
from tests.forked import needs_fork, start

Write = Callable[..., str]

COUNTS = np.array([[1, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0, 4]], dtype=np.float32)
LOGS = np.array([[0.7, 0, 1.1, 0], [0, 0, 0, 0], [0, 1.4, 0, 1.6]], dtype=np.float32)
PANEL = GenePanel(("CD3E", "MS4A1", "NKG7", "LYZ"))
VOCABULARY = Vocabulary({"cell_type": ["B", "T"]})


def shard_of(source: Any, **options: Any) -> Shard:
    source = H5adFile(source) if isinstance(source, str) else MemoryFile(source)
    return Shard(source, **{"panel": PANEL, "vocabulary": VOCABULARY, **options})


# -- rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [[0], [1], [0, 2], [3, 4, 90, 91, 150], [*range(200)]],
    ids=["first", "empty cell", "a gap", "far apart", "all"],
)
def test_scattered_rows_are_the_rows_asked_for(write_h5ad: Write, rows: list[int]) -> None:
    values = np.random.default_rng(0).poisson(0.7, size=(200, 4)).astype(np.float32)
    values[1] = 0
    block = shard_of(write_h5ad(values)).read(np.array(rows), first_cell=1000)
    got = sparse.csr_matrix((block.values_l, block.columns_l, block.offsets_n1), shape=(len(rows), 4)).toarray()
    assert got.tolist() == values[rows].tolist()
    assert block.cells_n.tolist() == [1000 + row for row in rows]


def test_an_open_file_keeps_one_number_per_cell(tmp_path: Path, make_adata: Any) -> None:
    """Where the cell's values start, 4 bytes; a million cells are open at a time, in every worker."""
    num_cells, path = 100_000, tmp_path / "cells.h5ad"
    make_adata(sparse.eye(4, format="csr", dtype=np.float32)[np.arange(num_cells) % 4]).write_h5ad(path)
    cells = shard_of(str(path))
    cells.read(np.arange(0, 4))  # imports
    cells.source.close()
    tracemalloc.start()
    try:
        cells = shard_of(str(path))
        assert len(cells.read(np.arange(0, num_cells, 1_000))) == 100
        assert 4 * num_cells < tracemalloc.get_traced_memory()[0] < 5 * num_cells
    finally:
        tracemalloc.stop()
        cells.source.close()


# -- scale ---------------------------------------------------------------------------------------------------------


def test_counts_travel_with_the_total_of_their_cell(write_h5ad: Write) -> None:
    block = shard_of(write_h5ad(COUNTS)).read(np.arange(3))
    assert block.is_linear
    assert block.library_size_n is not None
    assert block.library_size_n.tolist() == [3.0, 0.0, 7.0]


def test_the_total_counts_genes_outside_the_panel(write_h5ad: Write) -> None:
    block = shard_of(write_h5ad(COUNTS), panel=GenePanel(("LYZ",))).read(np.arange(3))
    assert block.library_size_n is not None
    assert block.library_size_n.tolist() == [3.0, 0.0, 7.0]


def test_a_stored_total_replaces_the_sum(write_h5ad: Write) -> None:
    path = write_h5ad(COUNTS, obs={LIBRARY_SIZE_COLUMN: [30.0, 1.0, 70.0]})
    block = shard_of(path).read(np.array([0, 2]))
    assert block.library_size_n is not None
    assert block.library_size_n.tolist() == [30.0, 70.0]


@pytest.mark.parametrize(
    "totals",
    [[np.nan, 1.0, 70.0], [30.0, 1.0, 0.0], [30.0, 1.0, 6.0]],
    ids=["NaN", "zero among counts", "less than the counts"],
)
def test_a_stored_total_that_cannot_be_true_is_refused(write_h5ad: Write, totals: list[float]) -> None:
    path = write_h5ad(COUNTS, obs={LIBRARY_SIZE_COLUMN: totals})
    with pytest.raises(InputError, match="perturbgene_library_size"):
        shard_of(path).read(np.arange(3))


def test_log_values_are_not_counts(write_h5ad: Write) -> None:
    assert shard_of(write_h5ad(LOGS)).values.scale.is_binned_as_is


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param([[-1.04, 0, 0.3, 2.0]], r"\(X\) holds negative expression values", id="z-scores"),
        pytest.param([[np.nan, 0, 1, 2]], r"\(X\) holds NaN", id="NaN"),
        pytest.param([[np.inf, 0, 1, 2]], r"\(X\) holds NaN or infinite", id="infinite"),
    ],
)
def test_a_matrix_without_bins_is_refused_by_its_name(write_h5ad: Write, values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _ = shard_of(write_h5ad(values)).values.scale


def test_the_scale_is_not_guessed_from_cells_without_values(write_h5ad: Write) -> None:
    values = np.zeros((2_000, 4), dtype=np.float32)
    values[900] = LOGS[0]
    assert shard_of(write_h5ad(values)).values.scale.is_binned_as_is


@pytest.mark.parametrize(
    ("usual", "odd"),
    [
        pytest.param([1.0, 0, 2, 0], [0.5, 0, 1.7, 0], id="log values among counts"),
        pytest.param([0.5, 0, 1.7, 0], [300.0, 0, 0.5, 0], id="large values among logarithms"),
        pytest.param([0.5, 0, 1.7, 0], [3.0, 0, 1, 2], id="counts among logarithms"),
    ],
)
def test_a_file_that_mixes_scales_is_refused_where_it_does(
    write_h5ad: Write, usual: list[float], odd: list[float]
) -> None:
    values = np.tile(np.array(usual, dtype=np.float32), (2_000, 1))
    values[1_850] = odd
    shard = shard_of(write_h5ad(values))
    shard.read(np.arange(10))
    with pytest.raises(InputError, match="--normalization"):
        shard.read(np.arange(1_800, 1_900))


# -- genes ---------------------------------------------------------------------------------------------------------


def test_genes_are_found_through_feature_name(make_adata: Any) -> None:
    cells = make_adata(LOGS, genes=["g1", "g2", "g3", "g4"], var={"feature_name": ["LYZ", "NKG7", "MS4A1", "CD3E"]})
    assert shard_of(cells).alignment.gene_of_column_c.tolist() == [3, 2, 1, 0]


def test_genes_are_found_through_the_column_named(make_adata: Any) -> None:
    cells = make_adata(LOGS, genes=["g1", "g2", "g3", "g4"], var={"mine": ["LYZ", "NKG7", "MS4A1", "CD3E"]})
    assert shard_of(cells, gene_id_column="mine").alignment.gene_of_column_c.tolist() == [3, 2, 1, 0]


def test_several_columns_of_one_gene_are_refused_for_log_values(make_adata: Any) -> None:
    cells = make_adata(LOGS, genes=["CD3E", "CD3E", "NKG7", "LYZ"])
    with pytest.raises(InputError, match=r"several columns are the same gene \('CD3E'\).*cannot be summed"):
        _ = shard_of(cells).alignment


@pytest.mark.parametrize("normalization", ["auto", "none", "log1p_cp10k"])
def test_several_columns_of_one_gene_pass_for_counts(make_adata: Any, normalization: str) -> None:
    cells = make_adata(COUNTS, genes=["CD3E", "CD3E", "NKG7", "LYZ"])
    assert shard_of(cells, normalization=normalization).alignment.duplicated == ("CD3E",)


def test_more_names_than_columns_are_refused(write_h5ad: Write) -> None:
    path = write_h5ad(COUNTS)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = (3, 5)
    with pytest.raises(InputError, match="4 gene names for 5 columns"):
        _ = shard_of(path).alignment


# -- labels --------------------------------------------------------------------------------------------------------


def test_unknown_labels_are_absent_and_said_with_their_count(
    write_h5ad: Write, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_h5ad(COUNTS, obs={"cell_type": ["NK", "B", "NK"]})
    shard = shard_of(path, included_phenotypes=["cell_type"])
    with caplog.at_level(logging.WARNING):
        assert shard.read(np.arange(3)).label_ids_np.tolist() == [[-1], [4], [-1]]
        shard.read(np.arange(2))
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 2 cells have a cell_type that the vocabulary lacks ('NK'); it counts as absent"
    ]


def test_missing_labels_are_absent_and_said_with_their_count(make_adata: Any, caplog: pytest.LogCaptureFixture) -> None:
    cells = make_adata(COUNTS, obs={"cell_type": pd.Categorical(["T", None, "nan"])})
    with caplog.at_level(logging.INFO):
        assert shard_of(cells).label_ids("cell_type").tolist() == [5, -1, -1]
    assert "2 of 3 cells have no cell_type" in caplog.text


def test_a_missing_label_column_is_absent_everywhere_and_said(
    make_adata: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert shard_of(make_adata(COUNTS)).label_ids("cell_type").tolist() == [-1, -1, -1]
    assert "no obs column 'cell_type'" in caplog.text


def test_a_missing_label_column_is_refused_where_labels_are_needed(make_adata: Any) -> None:
    with pytest.raises(InputError, match="no obs column 'cell_type'. Did you mean 'celltype'"):
        shard_of(make_adata(COUNTS, obs={"celltype": [*"BTB"]}), optional_labels=False).label_ids("cell_type")


def test_labels_may_stand_in_a_column_of_another_name(make_adata: Any) -> None:
    cells = make_adata(COUNTS, obs={"bulk_labels": [*"BTB"]})
    assert shard_of(cells, obs_columns={"cell_type": "bulk_labels"}).label_ids("cell_type").tolist() == [4, 5, 4]


def test_labels_of_more_cells_than_the_matrix_has_are_refused(write_h5ad: Write) -> None:
    path = write_h5ad(COUNTS, obs={"cell_type": [*"BTB"]})
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = (2, 4)
        offsets = file["X/indptr"][:3]
        del file["X/indptr"]
        file["X/indptr"] = offsets
    with pytest.raises(InputError, match="3 cells in obs for 2 rows"):
        shard_of(path).label_ids("cell_type")


# -- many files ----------------------------------------------------------------------------------------------------


def open_h5ad_files() -> int:
    folder = Path("/proc/self/fd")
    names = [os.readlink(entry) for entry in folder.iterdir() if entry.is_symlink()]
    return len({name for name in names if name.endswith(".h5ad")})  # each file has several descriptors


def in_one_piece(path: str) -> str:
    """Write the matrix again as `prepare` does."""
    with h5py.File(path, "r+") as file:
        for name in ("data", "indices"):
            values = file[f"X/{name}"][:]
            del file[f"X/{name}"]
            file[f"X/{name}"] = values
    return path


@pytest.fixture
def copies(write_h5ad: Write, tmp_path: Path) -> list[str]:
    obs = {"cell_type": [*"BTB"], LIBRARY_SIZE_COLUMN: [3.0, 5.0, 7.0]}
    first = in_one_piece(write_h5ad(sparse.csr_matrix(COUNTS), obs=obs))
    return [str(shutil.copy(first, tmp_path / f"copy_{index}.h5ad")) for index in range(12)]


def cache_of(paths: list[str]) -> ShardCache:
    return ShardCache(paths, panel=PANEL, vocabulary=VOCABULARY, included_phenotypes=["cell_type"])


def test_a_cache_of_many_files_keeps_few_open(copies: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perturbgene.data_utils.shards.MOST_OPEN_FILES", 2)
    cache, open_before = cache_of(copies), open_h5ad_files()
    assert [cache[index].read(np.array([2])).values_l.sum() for index in range(12)] == [7.0] * 12
    assert open_h5ad_files() - open_before <= 2 * 4, "files at rest take a quarter"
    assert cache[0].read(np.array([2])).values_l.sum() == 7.0
    cache.close()
    assert open_h5ad_files() <= open_before + 2


def test_what_is_known_of_a_file_is_not_found_again(copies: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perturbgene.data_utils.shards.MOST_OPEN_FILES", 2)
    monkeypatch.setattr("perturbgene.data_utils.shards._RESTING_PER_OPEN", 1)
    cache = cache_of(copies)
    first = [cache[index].read(np.array([0, 2])) for index in range(12)]
    monkeypatch.setattr(H5adFile, "_read_elem", lambda *_: pytest.fail("a column was read again"))
    for index, block in enumerate(first):
        again = cache[index].read(np.array([0, 2]))
        for name in ("values_l", "columns_l", "label_ids_np", "library_size_n", "table_n"):
            assert getattr(again, name).dtype == getattr(block, name).dtype
            assert getattr(again, name).tolist() == getattr(block, name).tolist()


def test_a_file_that_was_read_rests_and_reads_on(copies: list[str]) -> None:
    cache = cache_of(copies[:2])
    cache[0].read(np.array([0]))
    assert not cache[0].source.is_resting, "another thread may still read it"
    cache[1].read(np.array([0]))
    assert cache[0].source.is_resting
    assert cache[0].source._file is None
    assert cache[0].read(np.array([0, 1, 2])).values_l.tolist() == [1, 2, 3, 4]
    assert len(cache[0]) == 3
    assert cache[0].source.obs_column("cell_type").tolist() == [*"BTB"], "whatever else is asked opens it again"


def test_a_file_of_which_only_the_values_are_in_one_piece_does_not_rest(copies: list[str]) -> None:
    with h5py.File(copies[0], "r+") as file:
        columns = file["X/indices"][:]
        del file["X/indices"]
        file.create_dataset("X/indices", data=columns, compression="gzip")
    cache = cache_of(copies[:2])
    for index in (0, 1, 0, 1):
        assert cache[index].read(np.array([0, 1, 2])).values_l.tolist() == [1, 2, 3, 4]
    assert not cache[0].source.is_resting


def test_names_and_sampled_rows_are_not_kept_once_rows_are_read(copies: list[str]) -> None:
    shard = cache_of(copies)[0]
    shard.check_genes(0.1)
    shard.values.check_has_values()
    assert {"renaming", "_sample"} <= shard.__dict__.keys() | shard.values.__dict__.keys()
    shard.read(np.array([0]))
    assert not {"renaming", "_sample"} & (shard.__dict__.keys() | shard.values.__dict__.keys())


def test_a_file_that_is_replaced_while_it_is_closed_is_refused(copies: list[str], write_h5ad: Write) -> None:
    cache = cache_of(copies)
    cache[0].read(np.array([0]))
    cache.close()
    os.replace(write_h5ad(COUNTS[::-1], name="new.h5ad"), copies[0])
    with pytest.raises(InputError, match="was changed while it was in use"):
        cache[0].read(np.array([0]))


@needs_fork
@pytest.mark.parametrize("rests, num_descriptors", [(False, 40), (True, 110)])
def test_three_lists_of_files_are_read_where_a_process_may_have_few_descriptors(
    write_h5ad: Write, tmp_path: Path, rests: bool, num_descriptors: int
) -> None:
    first = write_h5ad(sparse.csr_matrix(COUNTS), obs={"donor_id": list("abc")})
    if rests:  # then more are open at a time
        in_one_piece(first)
    paths = [shutil.copy(first, tmp_path / f"copy_{index}.h5ad") for index in range(70)]

    def run() -> None:
        most = len(os.listdir("/proc/self/fd")) + num_descriptors
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        caches = [ShardCache(paths, panel=PANEL, vocabulary=VOCABULARY) for _ in range(3)]
        assert [shard.read(np.array([2])).values_l.sum() for cache in caches for shard in cache] == [7.0] * 210
        donors = donors_of(SimpleNamespace(shards=caches[0]), "donor_id")  # type: ignore[arg-type]
        assert donors is not None and donors.tolist() == list("abc") * 70

    child = start(run, output=tmp_path / "log")
    child.join()
    assert child.exitcode == 0, (tmp_path / "log").read_text()


def test_files_that_name_the_same_columns_share_one_alignment(write_h5ad: Write) -> None:
    same = [write_h5ad(COUNTS, name=f"{name}.h5ad") for name in "ab"]
    other = write_h5ad(COUNTS[:, ::-1], name="c.h5ad", genes=PANEL.genes[::-1])
    cache = ShardCache([*same, other], panel=PANEL, vocabulary=VOCABULARY)
    assert cache[0].alignment is cache[1].alignment
    assert cache[2].alignment.gene_of_column_c.tolist() == cache[0].alignment.gene_of_column_c.tolist()[::-1]


def test_few_files_compressed_by_columns_are_kept_in_memory_at_a_time(write_h5ad: Write) -> None:
    paths = [write_h5ad(sparse.csc_matrix(COUNTS), name=f"{number}.h5ad") for number in range(4)]
    cache = ShardCache(paths, panel=PANEL, vocabulary=VOCABULARY)
    shards = [cache[index] for index in range(4)]
    assert [shard.read(np.array([2])).values_l.sum() for shard in shards] == [7.0] * 4
    assert len(cache._open) == MOST_WHOLE_FILES


class _Rows(IterableDataset[float]):
    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache

    def __iter__(self) -> Iterator[float]:
        for row in range(3):
            yield float(self.cache[0].read(np.array([row])).values_l.sum())


def test_a_cache_opened_in_the_parent_reads_on_in_a_loader_worker(write_h5ad: Write) -> None:
    rows = _Rows(ShardCache([write_h5ad(COUNTS)], panel=PANEL, vocabulary=VOCABULARY))
    assert [*rows] == [3.0, 0.0, 7.0]
    assert [*DataLoader(rows, batch_size=None, num_workers=1)] == [3.0, 0.0, 7.0]
    assert [*rows] == [3.0, 0.0, 7.0]


def test_a_gene_that_some_cells_were_not_measured_with_is_not_measured_by_all(
    four_gene_tokenizer, make_adata, tmp_path
):
    shard = make_adata([[1.0, 2.0, 0, 3.0]] * 2, obs={"perturbgene_source": [0, 1]})
    shard.varm["perturbgene_measured"] = np.array([[1, 1], [1, 0], [1, 1], [0, 1]], dtype=np.uint8)
    shard.write_h5ad(tmp_path / "shard.h5ad")
    data = IterableAnnDataset(str(tmp_path / "shard.h5ad"), four_gene_tokenizer)
    assert data.shards[0].is_measured_g.tolist() == [True, False, True, False]
