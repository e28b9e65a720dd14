"""What verbs share: cells are divided, results are kept on disk and merged in row order, and targets are checked."""

import threading
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from perturbgene.configs import PredictConfig
from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.sources import CellSource
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.errors import InputError
from perturbgene.inference.streaming import (
    CellResults,
    Ranks,
    answered,
    cell_results,
    claimed_output,
    stream_batches,
)

CELLS = [[1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 0], [1.0, 1.0, 1.0, 0], [0, 0, 0, 3.0]]


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Ranks that are threads of this process and meet at a barrier of threads."""

    meeting: threading.Barrier | None = None

    def barrier(self) -> None:
        assert self.meeting is not None
        self.meeting.wait(timeout=20)


def a_block(lengths: list[int]) -> TokenBlock:
    ids = np.arange(sum(lengths))
    return TokenBlock(ids, ids, np.cumsum([0, *lengths]), np.arange(len(lengths)))


def test_a_process_that_nobody_launched_is_alone() -> None:
    ranks = Ranks.join()
    assert (ranks, ranks.is_main, ranks.device("auto")) == (Ranks(0, 1, 0), True, "auto")


@pytest.mark.parametrize(
    ("most", "expected"), [(100, [3]), (5, [2, 1]), (3, [1, 1, 1]), (1, [1, 1, 1]), (6, [2, 1]), (9, [3])]
)
def test_batches_hold_at_most_so_many_tokens_and_a_longer_cell_goes_alone(most: int, expected: list[int]) -> None:
    block = a_block([3, 2, 4])
    parts = {
        "__len__": lambda _: 3,
        "blocks": lambda _: iter([block]),
        "shards": [SimpleNamespace(source=CellSource())],
    }
    dataset = type("Dataset", (), parts)()
    batches = list(stream_batches(dataset, text="test", ranks=Ranks(), most_tokens=most))
    assert [len(batch) for batch in batches] == expected
    np.testing.assert_array_equal(np.concatenate([batch.input_ids_l for batch in batches]), np.arange(9))


def test_genes_of_each_cell_are_counted(make_adata, four_gene_tokenizer) -> None:
    (block,) = IterableAnnDataset(make_adata(CELLS), four_gene_tokenizer, batch_size=5).blocks()
    assert four_gene_tokenizer.num_genes(block).tolist() == [1, 1, 0, 3, 1]


def answer(block: TokenBlock) -> dict[str, np.ndarray]:
    """Answer with each cell's number and its number of tokens, thrice."""
    lengths_n = np.diff(block.offsets_n1).astype(np.float32)
    return {"cell": block.cells_n, "tokens": np.repeat(lengths_n[:, None], 3, axis=1)}


def of_rank(path: str, target: Path, tokenizer, ranks: Ranks) -> dict[str, np.ndarray]:
    dataset = IterableAnnDataset(path, tokenizer, batch_size=2, rank=ranks.rank, world_size=ranks.size)
    with answered(dataset, answer, text="test", target=target, ranks=ranks) as merged:
        return {name: np.array(array[:]) for name, array in merged.items()}


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_answers_of_chosen_cells_go_to_their_rows_and_the_others_are_missing(size: int, tmp_path) -> None:
    meeting, rows, merged = threading.Barrier(size), np.array([1, 3, 4, 7, 9]), {}

    def work(rank: int) -> None:
        ranks = ThreadRanks(rank, size, meeting=meeting)
        with cell_results(tmp_path / "out", num_cells=5, ranks=ranks, rows=(rows, 10)) as results:
            own = np.arange(rank, 5, size)
            for cells_m in [own[:1], own[1:]] if len(own) else []:
                results.write(cells_m, {"code": 10 * cells_m, "score_2": np.stack([cells_m, -cells_m], 1) / 4})
            merged[rank] = {name: np.array(values) for name, values in results.merge().items()}

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert merged[0]["code"].tolist() == [-1, 0, -1, 10, 20, -1, -1, 30, -1, 40]
    np.testing.assert_array_equal(np.isnan(merged[0]["score_2"][:, 1]), merged[0]["code"] < 0)
    np.testing.assert_array_equal(merged[0]["score_2"][rows, 1], -np.arange(5) / 4)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_several_processes_write_what_one_writes(size: int, write_h5ad, four_gene_tokenizer, tmp_path) -> None:
    path, meeting, results = write_h5ad(CELLS), threading.Barrier(size), {}
    alone = of_rank(path, tmp_path / "alone", four_gene_tokenizer, Ranks())

    def work(rank: int) -> None:
        ranks = ThreadRanks(rank, size, meeting=meeting)
        results[rank] = of_rank(path, tmp_path / "together", four_gene_tokenizer, ranks)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone["cell"].tolist() == [0, 1, 2, 3, 4]
    assert [results[rank] for rank in range(1, size)] == [{}] * (size - 1)
    for name, values in alone.items():
        np.testing.assert_array_equal(results[0][name], values)


def test_results_are_on_disk_while_they_are_collected_and_nowhere_after(tmp_path) -> None:
    with cell_results(tmp_path / "out.h5ad", num_cells=2) as parts:
        parts.write(np.array([1, 0]), {"x": np.array([[5.0], [4.0]])})
        (stored,) = (tmp_path / ".out.h5ad.cells.partial").iterdir()
        assert np.load(stored).shape == (2, 1)
        assert parts.merge()["x"][:].tolist() == [[4.0], [5.0]]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path) -> None:
    (tmp_path / ".out.cells.partial").mkdir()
    (tmp_path / ".out.cells.partial/000.00001.npy").write_bytes(b"half")
    with cell_results(tmp_path / "out", num_cells=1):
        assert list((tmp_path / ".out.cells.partial").iterdir()) == []


def test_a_failure_leaves_no_results_behind(tmp_path) -> None:
    with pytest.raises(InputError, match="values"), cell_results(tmp_path / "out", num_cells=1):
        raise InputError("bad values")
    assert list(tmp_path.iterdir()) == []


def test_a_target_below_a_file_is_refused(tmp_path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="cannot be written .* Choose another --output"),
        cell_results(tmp_path / "file/out", num_cells=1),
    ):
        pass


def test_results_of_one_process_may_stay_in_memory() -> None:
    parts = CellResults(3)
    parts.write(np.array([2]), {"x": np.array([7])})
    parts.write(np.array([0, 1]), {"x": np.array([5, 6])})
    assert parts.merge()["x"][:].tolist() == [5, 6, 7]


def test_a_target_that_exists_or_is_the_input_or_several_inputs_are_refused(tmp_path) -> None:
    source, other = tmp_path / "in.h5ad", tmp_path / "out.h5ad"
    source.touch()
    other.touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/link.h5ad").symlink_to(source)

    def found(source: Path, target: Path, *, overwrite: bool) -> tuple[str, Path]:
        config = PredictConfig(run="run", input=str(source), output=str(target), overwrite=overwrite)
        with claimed_output(config) as paths:
            return paths

    with pytest.raises(InputError, match="exists. Choose another --output, or pass --overwrite"):
        found(source, other, overwrite=False)
    with pytest.raises(InputError, match="the input itself"):
        found(source, tmp_path / "other/link.h5ad", overwrite=True)
    with pytest.raises(InputError, match="2 files, but predict writes one"):
        found(tmp_path / "*.h5ad", tmp_path / "new.h5ad", overwrite=False)
    assert found(source, other, overwrite=True) == (str(source), other)


def test_a_matrix_of_zeros_is_refused_with_the_layers_that_hold_counts(make_adata, four_gene_tokenizer, tmp_path):
    empty = make_adata(np.zeros((3, 4)))
    with pytest.raises(InputError, match="X holds no value other than 0.* Add the counts to it"):
        IterableAnnDataset(empty, four_gene_tokenizer)
    empty.layers["counts"] = make_adata(CELLS[:3]).X
    empty.write_h5ad(tmp_path / "in.h5ad")
    for cells in (empty, str(tmp_path / "in.h5ad")):
        with pytest.raises(
            InputError, match="X holds no value other than 0.*Choose another matrix with --layer: 'coun"
        ):
            IterableAnnDataset(cells, four_gene_tokenizer)
        assert len(IterableAnnDataset(cells, four_gene_tokenizer, layer="counts")) == 3
