"""A run that started from another one is scored next to its start and, if asked for, to the same run from scratch."""

import json
import re
import shutil
from pathlib import Path

import anndata as ad
import pytest

from perturbgene.configs import load_config
from perturbgene.corpus.manifest import Corpus
from perturbgene.inference.evaluate import ROW_NAMES, evaluate
from perturbgene.inference.run import load_run
from perturbgene.main import main

SHORT = "--max_steps 2 --no_bf16 --use_cpu --report_to none --eval_strategy no"


@pytest.fixture(scope="module")
def fine_tuned(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `cls` that took two steps from `runs/mlm`, with its double from scratch; not to be changed."""
    folder = tmp_path_factory.mktemp("starts") / "cls"
    flags = f"--corpus {small_folder}/corpus --output_dir {folder} --phenotype_category cell_type --compare_scratch"
    start = f"--pretrained_model_path {small_folder}/runs/mlm"
    assert main(f"cls {flags} {start} {SHORT}".split()) == 0
    return folder


@pytest.fixture
def own_run(fine_tuned: Path, tmp_path: Path) -> Path:
    """A copy of the run, free to change."""
    shutil.copytree(fine_tuned, tmp_path / "run")
    return tmp_path / "run"


def scores_of(run: Path, corpus: Path) -> dict[str, dict]:
    """Score cell types on the run's held-out cells, next to its baselines."""
    files = Corpus.open(corpus)
    return evaluate(run, files.paths("eval"), train_paths=files.paths("train"), calibrate=False)["cell_type"]


def test_evaluate_shows_the_start_and_the_run_from_scratch(fine_tuned: Path, tmp_path: Path, capsys) -> None:
    assert main(f"evaluate {fine_tuned} --output {tmp_path}/scores --no_calibrate".split()) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "scores/metrics.json").read_text())["cell_type"]
    for name in ("start", "scratch"):
        [line] = [line for line in lines if ROW_NAMES[name] in line]
        assert f"{found[name]['accuracy']:.3f}" in line
    assert {found[name]["n"] for name in ("classifier", "start", "scratch")} == {found["ridge"]["n"]}


def test_the_start_is_a_regression_on_its_frozen_embedding(fine_tuned: Path, small_folder: Path, caplog) -> None:
    found = scores_of(fine_tuned, small_folder / "corpus")
    num_train = len(ad.read_h5ad(small_folder / "corpus/train/shard_00000.h5ad", backed="r"))
    assert found["start"]["n_train"] == num_train and found["start"]["accuracy"] > 0.9  # it has learned these types
    [line] = [line for line in caplog.messages if ROW_NAMES["start"].removeprefix("(baseline) ") in line]
    told = r"cell_type: the run is right in .+ in \d+\.\d %: training has not improved on its start, as far as"
    assert re.match(told, line)


def test_the_run_from_scratch_has_the_same_shape_and_no_start(fine_tuned: Path) -> None:
    then, scratch = (load_config(folder / "run.yaml") for folder in (fine_tuned, fine_tuned / "scratch"))
    assert scratch.pretrained_model_path is None and scratch.learning_rate > then.learning_rate
    shapes = [load_run(folder, device="cpu").model.state_dict() for folder in (fine_tuned, fine_tuned / "scratch")]
    assert {name: one.shape for name, one in shapes[0].items()} == {name: one.shape for name, one in shapes[1].items()}


def test_a_start_that_is_gone_is_a_line_and_no_failure(own_run: Path, small_folder: Path, caplog) -> None:
    text = (own_run / "run.yaml").read_text()
    (own_run / "run.yaml").write_text(text.replace(f"{small_folder}/runs/mlm", str(own_run / "gone")))
    shutil.rmtree(own_run / "scratch")
    found = scores_of(own_run, small_folder / "corpus")
    assert "start" not in found and "scratch" not in found and "ridge" in found
    told = f"no score of logistic regression on the start's embedding is shown: run {own_run}/gone does not exist"
    assert told in caplog.text


def test_a_run_without_a_start_has_no_such_rows(small_folder: Path) -> None:
    assert not {"start", "scratch"} & set(scores_of(small_folder / "runs/mlm", small_folder / "corpus"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--corpus {0}/corpus", "without a pretrained model the run is from scratch itself"),
        (
            "--train_data_paths {0}/corpus/train/*.h5ad --pretrained_model_path {0}/runs/mlm",
            "compare_scratch is given without a corpus",
        ),
    ],
    ids=["no start", "no corpus"],
)
def test_a_comparison_that_cannot_be_is_refused(flags: str, told: str, small_folder: Path, tmp_path, capsys) -> None:
    command = f"mlm {flags.format(small_folder)} --output_dir {tmp_path}/out --compare_scratch"
    assert main(command.split()) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()
