"""The benchmark measures what it says: the set has its statistics, contenders agree on tokens, the table is whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cells import CellSet, build, build_corpus, draw_csr
from benchmarks.contenders import CONTENDERS, PLAIN, READS, Job
from benchmarks.loading import Result, checksum, num_cells, table
from benchmarks.mixing import linked, mean_entropy, mixing
from benchmarks.trust import swap_labels

TINY = CellSet(shards=2, cells=300, genes=400, expressed=60, cell_types=3, donors=3)
OURS = "ours: gzip h5ad, padded"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny set and its corpus."""
    folder = build(TINY, tmp_path_factory.mktemp("sets"))
    build_corpus(folder)
    return folder


def epoch_of(name: str, home: Path, *, max_length: int) -> tuple[int, int]:
    """Return cells and checksum of (at most) one epoch of 600 cells."""
    cells = total = 0
    for batch in CONTENDERS[name].epoch(Job(home, max_length=max_length))():
        cells, total = cells + num_cells(batch), total + checksum(batch)
        if cells >= 600:
            break
    return cells, total


def test_a_set_has_the_asked_genes_per_cell_and_whole_counts_in_sorted_columns() -> None:
    matrix = draw_csr(CellSet(cells=500, genes=4_000, expressed=300), shard=0)
    assert matrix.shape == (500, 4_000) and matrix.data.dtype == np.float32
    assert 250 < np.diff(matrix.indptr).mean() < 350
    assert (matrix.data >= 1).all() and (matrix.data == np.floor(matrix.data)).all()
    assert matrix.has_canonical_format


def test_the_same_set_gives_the_same_cells() -> None:
    first, second = draw_csr(TINY, shard=1), draw_csr(TINY, shard=1)
    assert (first != second).nnz == 0
    assert (first != draw_csr(TINY, shard=0)).nnz > 0


@pytest.mark.parametrize("max_length", [2048, 32], ids=["whole cells", "long cells cut"])
@pytest.mark.parametrize(
    "name",
    [
        "AnnCollection, in memory, tokenised",
        "scDataset, gzip h5ad, tokenised",
        "scDataset, uncompressed h5ad, tokenised",
        "ours: gzip h5ad, padded, cell by cell",
        "ours: uncompressed h5ad, padded",
    ],
)
def test_contenders_give_the_same_tokens(name: str, max_length: int, home: Path) -> None:
    if CONTENDERS[name].missing:
        pytest.skip("not installed")
    assert epoch_of(name, home, max_length=max_length) == epoch_of(OURS, home, max_length=max_length)


@pytest.mark.parametrize(
    "name", [name for name, c in CONTENDERS.items() if not (c.build or c.needs or c.workers or "AnnLoader" in name)]
)
def test_every_contender_yields_cells(name: str, home: Path) -> None:
    assert epoch_of(name, home, max_length=64)[0] >= 128


def test_the_table_has_a_row_for_every_contender() -> None:
    measured = [{"cells_per_s": 500.0, "cells_per_cpu_s": 600.0, "peak_mib": 100.0}]
    results = [
        Result(name, skipped="not installed: x" if contender.needs else "", rounds=[] if contender.needs else measured)
        for name, contender in CONTENDERS.items()
    ]
    text = table(results, title="today")
    assert all(f"| {name} |" in text for name in CONTENDERS)
    assert f"| {PLAIN} | 500 [500-500] | 1.00x |  | 600 | 100 |" in text


def test_the_command_prints_the_table_and_writes_json(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "benchmarks.loading", "--scale", "0.006", "--genes", "400", "--expressed", "60"]
    command += ["--folder", str(tmp_path), "--seconds", "0.05", "--rounds", "2", "--json", str(tmp_path / "r.json")]
    command += ["--only", READS["corpus"], "ours: prepared corpus, packed"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "| ours: prepared corpus, packed |" in done.stdout
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [len(result["rounds"]) for result in results] == [2, 2]
    assert all(entry["peak_mib"] > 10 for result in results for entry in result["rounds"])


def test_mixing_is_one_for_a_shuffle_and_near_zero_for_sorted_cells() -> None:
    labels_n = np.repeat(np.arange(4), 256)
    assert mean_entropy(np.array([0, 0, 1, 1]), batch=4) == pytest.approx(np.log(2))
    assert mixing(labels_n, np.arange(1024)) == 0
    assert mixing(labels_n, np.random.default_rng(1).permutation(1024)) == pytest.approx(1, abs=0.01)


def test_linked_names_are_further_names_of_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").write_bytes(b"x")
    names = linked([str(tmp_path / "a.h5ad")], tmp_path / "linked", copies=3)
    assert len(set(names)) == 3
    assert all(Path(name).samefile(tmp_path / "a.h5ad") for name in names)


def test_planted_swaps_give_a_share_of_cells_another_label_by_how_common_it_is() -> None:
    labels = np.repeat(["a", "b", "c"], [500, 400, 100])
    swapped, is_swapped = swap_labels(labels, share=0.2, seed=0)
    assert is_swapped.sum() == 200
    assert (swapped[is_swapped] != labels[is_swapped]).all() and (swapped[~is_swapped] == labels[~is_swapped]).all()
    of_a = swapped[is_swapped & (labels == "a")]
    assert 2 < (of_a == "b").sum() / (of_a == "c").sum() < 8
