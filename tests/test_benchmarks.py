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
from benchmarks.mixing import copied, mean_entropy, mixing
from benchmarks.trainees import RECIPES, SIZES, USUAL, Trainee, draw_batches, draw_cell, draw_lengths
from benchmarks.training import Row, run_setting
from benchmarks.training import main as measure_training
from benchmarks.training import parse as parse_training
from benchmarks.training import table as training_table
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
    "name",
    [
        pytest.param(name, marks=pytest.mark.soak) if "backed gzip" in name else name
        for name, c in CONTENDERS.items()
        if not (c.build or c.needs or c.workers or "AnnLoader" in name)
    ],
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


@pytest.mark.soak
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


def test_copies_are_other_files_with_the_same_content(tmp_path: Path) -> None:
    (tmp_path / "a.h5ad").write_bytes(b"x")
    names = copied([str(tmp_path / "a.h5ad")], tmp_path / "copied", copies=3)
    assert len(set(names)) == 3
    assert all(Path(name).read_bytes() == b"x" and not Path(name).samefile(tmp_path / "a.h5ad") for name in names)


# training


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size and a gene table that train in milliseconds."""
    monkeypatch.setitem(SIZES, "1x16", (1, 16, 2))
    monkeypatch.setattr("benchmarks.trainees.GENES", 1_200)
    monkeypatch.setattr("benchmarks.trainees.NUM_TYPES", 1_206)


def test_lengths_of_cells_are_near_500_on_average_and_under_the_maximum() -> None:
    drawn = np.array(draw_lengths("~500", 4_000, seed=0))
    assert drawn.mean() == pytest.approx(480, abs=25)  # the mean was 500 before long cells were cut
    assert drawn.max() == 1024 and drawn.std() > 150
    assert draw_lengths("full 512", 3, seed=0) == [512, 512, 512]


def test_a_drawn_cell_has_every_slot_once_and_hides_what_it_asks() -> None:
    cell = draw_cell(400, np.random.default_rng(0))
    types, ids, labels = (cell[name].numpy() for name in ("token_type_ids", "input_ids", "labels"))
    assert types[:6].tolist() == [0, 1, 2, 3, 4, 5] and (np.diff(types[:-1]) > 0).all() and types[-1] == 0
    assert ((ids == 2) == (labels != -100)).all()
    assert 30 < (labels != -100).sum() < 100


def test_padded_and_packed_batches_hold_the_same_tokens_and_labels() -> None:
    (batch,), _ = draw_batches("~500", cells=3, batches=1, device="cpu")
    is_token = batch.padded["attention_mask"].bool()
    for name in ("input_ids", "token_type_ids"):
        assert (batch.padded[name][is_token] == batch.packed[name]).all()
    labels = batch.padded["labels"][is_token]
    assert (labels[batch.packed["label_positions"]] == batch.packed["labels"]).all()
    assert batch.num_reads == (labels != -100).sum()


def test_bucketed_batches_are_padded_less() -> None:
    def share_of_padding(batches: list) -> float:  # type: ignore[type-arg]
        return 1 - sum(sum(b.lengths) for b in batches) / sum(len(b.cells) * max(b.lengths) for b in batches)

    mixed, bucketed = draw_batches("~500", cells=8, batches=4, device="cpu")
    assert share_of_padding(bucketed) < 0.1 < 0.3 < share_of_padding(mixed)


@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_lowers_its_loss_and_answers(name: str) -> None:
    batches = draw_batches("full 512", cells=1, batches=1, device="cpu")
    trainee = Trainee(name, size="1x16", batches=batches, is_training=True)
    (batch,) = trainee.batches
    for group in trainee.optimizer.param_groups:
        group["lr"] = 0.02
    before = trainee.loss(batch).item()
    for _ in range(4):
        trainee.train(batch)
    assert trainee.loss(batch).item() < before
    trainee.infer(batch)


@pytest.mark.usefixtures("small_sizes")
def test_packed_cells_keep_less_for_the_backward_pass_than_the_usual_recipe() -> None:
    batches = draw_batches("~500", cells=2, batches=1, device="cpu")
    kept = {
        name: Trainee(name, size="1x16", batches=batches, is_training=True).kept_bytes(batches[0][0])
        for name in (USUAL, "ours: packed, bf16")
    }
    assert 0 < kept["ours: packed, bf16"] < kept[USUAL] / 2


@pytest.mark.usefixtures("small_sizes")
def test_contenders_take_turns_for_the_asked_rounds() -> None:
    options = parse_training(["--rounds", "2", "--cells", "1", "--recipes", "ours: packed, bf16", "--together"])
    rows = run_setting("1x16", "full 512", "inference", options)
    assert [row.name for row in rows] == [USUAL, "ours: packed, bf16"]
    assert all(len(row.seconds) == 2 and min(row.seconds) > 0 and row.tokens == 512 for row in rows)


@pytest.mark.soak
def test_contenders_in_processes_of_their_own_report_what_they_did() -> None:
    options = parse_training(["--rounds", "1", "--cells", "1", "--recipes", "ours: packed, bf16"])
    rows = run_setting("4x256", "full 512", "inference", options)
    assert [(row.name, row.tokens, len(row.seconds)) for row in rows] == [
        (USUAL, 512, 1), ("ours: packed, bf16", 512, 1)
    ]  # fmt: skip
    assert min(rows[0].seconds + rows[1].seconds) > 0


def test_the_training_table_divides_by_the_first_row_round_by_round() -> None:
    slow = Row("slow", tokens=100, flops=4e9, is_bf16=False, seconds=[1.0, 2.0, 4.0], kept_kib=10.0)
    fast = Row("fast", tokens=50, flops=2e9, is_bf16=True, seconds=[0.1, 0.25, 0.5])
    lines = training_table([slow, fast], title="x", peaks={"fp32": 4e9, "bf16": 16e9}).splitlines()
    assert lines[4] == "| slow | 50 | 1.0 | 2 | 50% | 10 |  |"
    assert lines[5] == "| fast | 200 | 4.0 | 8 | 50% |  |  |"


def test_without_a_cuda_device_the_training_benchmark_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    measure_training(["--device", "cuda"])
    assert "no CUDA device here: skipped" in capsys.readouterr().out


def test_planted_swaps_give_a_share_of_cells_another_label_by_how_common_it_is() -> None:
    labels = np.repeat(["a", "b", "c"], [500, 400, 100])
    swapped, is_swapped = swap_labels(labels, share=0.2, seed=0)
    assert is_swapped.sum() == 200
    assert (swapped[is_swapped] != labels[is_swapped]).all() and (swapped[~is_swapped] == labels[~is_swapped]).all()
    of_a = swapped[is_swapped & (labels == "a")]
    assert 2 < (of_a == "b").sum() / (of_a == "c").sum() < 8
