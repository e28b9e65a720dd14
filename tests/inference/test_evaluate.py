"""Scores that cannot mislead: cells of the training corpus, labels under other names, runs whose corpus was moved."""

import json
import re
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from perturbgene.configs import EvaluateConfig, MlmConfig
from perturbgene.corpus.manifest import Corpus
from perturbgene.errors import InputError
from perturbgene.inference.calibration import CALIBRATION_FILE
from perturbgene.inference.evaluate import ROW_NAMES, evaluate, run_evaluate, training_cells
from perturbgene.inference.predict import predict
from perturbgene.inference.run import Run, load_run
from perturbgene.main import main
from perturbgene.training.data_files import DataFiles

ASK = ("--ask", "cell_type", "--no_baselines")


@pytest.fixture(scope="module")
def run(small_folder: Path) -> Run:
    return load_run(small_folder / "runs/mlm", device="cpu")


@pytest.fixture(scope="module")
def cells(small_folder: Path) -> ad.AnnData:
    """The 255 cells that the corpus was made from; not to be changed."""
    return ad.read_h5ad(small_folder / "cells.h5ad")


@pytest.fixture
def own_run(small_folder: Path, tmp_path: Path) -> Path:
    """A copy of the run, free to change, and as it was before somebody evaluated it."""
    written = shutil.ignore_patterns("calibration.json", "novelty.safetensors", "coverage.csv", "evaluation")
    shutil.copytree(small_folder / "runs/mlm", tmp_path / "run", ignore=written)
    return tmp_path / "run"


def names_of(corpus: Path, split: str) -> set[str]:
    return {name for path in Corpus.open(corpus).paths(split) for name in ad.read_h5ad(path).obs_names}


# -- cells of the training corpus ---------------------------------------------------------------------------------


def test_training_cells_are_found_by_what_they_express(run, cells, small_folder):
    train, held_out = (names_of(small_folder / "corpus", split) for split in ("train", "eval"))
    assert cells.obs_names[training_cells(run, cells)].tolist() == [name for name in cells.obs_names if name in train]
    assert not training_cells(run, cells[cells.obs_names.isin(held_out)].copy()).any()


def test_training_cells_are_found_under_other_names_columns_and_labels(run, cells):
    other = cells[::-1, ::-1].copy()
    other.obs_names = [f"cell {row}" for row in range(other.n_obs)]
    other.obs = other.obs[[]]
    np.testing.assert_array_equal(training_cells(run, other)[::-1], training_cells(run, cells))


def test_training_cells_are_found_in_a_file_with_fewer_genes(run, cells):
    is_kept_c = np.arange(cells.n_vars) % 3 > 0
    np.testing.assert_array_equal(training_cells(run, cells[:, is_kept_c].copy()), training_cells(run, cells))


def test_a_cell_with_few_genes_is_nobody_s_copy(run, cells):
    few = cells[:, :30].copy()
    few = few[np.asarray((few.X > 0).sum(axis=1)).ravel() < 9].copy()
    assert not training_cells(run, few, min_gene_coverage=0).any()


def test_scores_of_training_cells_say_how_many_they_are(run, cells, caplog):
    scores = evaluate(run, cells, ask=["cell_type"])["cell_type"]["alone"]
    num_seen = int(training_cells(run, cells).sum())
    assert (scores["n"], scores["n_training_cells"]) == (255, num_seen)
    assert f"{num_seen} of 255 cells are training cells of {run.path}" in caplog.text


def test_held_out_cells_say_nothing_of_training(run, small_folder, caplog):
    scores = evaluate(run, Corpus.open(small_folder / "corpus").paths("eval"), calibrate=False)
    assert "n_training_cells" not in scores["cell_type"]["alone"] and "training cells" not in caplog.text


def test_temperatures_are_fitted_on_unseen_cells_alone(own_run, cells):
    loaded = load_run(own_run, device="cpu")
    is_new_n = ~training_cells(loaded, cells)
    found = evaluate(loaded, cells, ask=["cell_type"], calibrate=True)["cell_type"]["alone"]["calibration"]
    expected = evaluate(loaded, cells[is_new_n].copy(), ask=["cell_type"], calibrate=True)["cell_type"]["alone"]
    assert (found["n_fitted"], found["temperature"]) == (
        expected["calibration"]["n_fitted"], pytest.approx(expected["calibration"]["temperature"], rel=1e-4),
    )  # fmt: skip


def test_fitting_temperatures_on_training_cells_alone_is_refused(own_run, small_folder, tmp_path, capsys):
    shard = small_folder / "corpus/train/shard_00000.h5ad"
    flags = ("--eval_data_paths", str(shard), "--calibrate", "--output", str(tmp_path / "scores"), *ASK)
    assert main(["evaluate", str(own_run), *flags]) == 2
    assert "all cells are training cells, so no temperature can be fitted" in capsys.readouterr().err
    assert not (own_run / CALIBRATION_FILE).exists() and not (tmp_path / "scores").exists()


def test_whether_cells_are_training_cells_may_not_be_known(own_run, cells, caplog):
    (own_run / "run.yaml").unlink()
    assert evaluate(own_run, cells[:20].copy(), ask=["cell_type"])["cell_type"]["alone"]["n"] == 20
    assert "whether the run was trained on these cells is not known" in caplog.text


# -- labels -------------------------------------------------------------------------------------------------------


def test_cells_that_changed_since_training_are_not_the_run_s_own_any_more(own_run, small_folder, tmp_path, caplog):
    corpus = Corpus.open(shutil.copytree(small_folder / "corpus", tmp_path / "corpus"))
    settings = (own_run / "run.yaml").read_text().replace(str(small_folder / "corpus"), str(corpus.folder))
    (own_run / "run.yaml").write_text(settings)
    paths = [*corpus.paths("train"), *corpus.paths("eval")]
    DataFiles(own_run, paths, corpus).check_start(may_change=False, is_resumed=False)
    evaluate(load_run(own_run, device="cpu"), corpus.paths("eval"), ask=["cell_type"])
    assert "changed since" not in caplog.text and (own_run / "calibration.json").exists()
    (own_run / "calibration.json").unlink()
    ad.read_h5ad(corpus.paths("train")[0])[:63].write_h5ad(corpus.paths("eval")[0])
    scores = evaluate(load_run(own_run, device="cpu"), corpus.paths("eval"), ask=["cell_type"])
    assert f"{corpus.paths('eval')[0]} changed since the run read it" in caplog.text
    assert scores["cell_type"]["alone"]["n_training_cells"] > 0 and not (own_run / "calibration.json").exists()


def test_a_folder_in_the_place_of_the_scores_is_found_before_any_work(run, small_folder, tmp_path):
    (tmp_path / "scores/metrics.json").mkdir(parents=True)
    with pytest.raises(InputError, match="metrics.json cannot be written .it is a folder.. Choose another --output"):
        evaluate(run, [small_folder / "no such file"], output=tmp_path / "scores")


def test_labels_of_another_spelling_are_refused_and_the_calibration_stays(own_run, cells, tmp_path, capsys):
    assert main(["evaluate", str(own_run), "--output", str(tmp_path / "own"), *ASK]) == 0
    before = (own_run / CALIBRATION_FILE).read_bytes()
    shouted = cells.copy()
    shouted.obs["cell_type"] = shouted.obs["cell_type"].astype(str).str.upper().str.replace(" ", "-")
    shouted.write_h5ad(tmp_path / "in.h5ad")
    flags = ("--eval_data_paths", str(tmp_path / "in.h5ad"), "--calibrate", "--output", str(tmp_path / "scores"), *ASK)
    assert main(["evaluate", str(own_run), *flags]) == 2
    error = capsys.readouterr().err
    assert "no cell of" in error and "'B-CELL'" in error and "They differ in case and punctuation" in error
    assert (own_run / CALIBRATION_FILE).read_bytes() == before and not (tmp_path / "scores").exists()


def test_a_missing_label_column_is_refused_with_the_nearest_name_and_the_flag(run, cells):
    other = cells.copy()
    other.obs = other.obs.rename(columns={"cell_type": "CellType"})
    with pytest.raises(
        InputError, match="Did you mean 'CellType'. Name the column with --phenotypes cell_type=CellTyp"
    ):
        evaluate(run, other, ask=["cell_type"])


def test_labels_are_read_from_the_named_column(run, cells, small_folder, tmp_path):
    expected = evaluate(run, cells, ask=["cell_type"])
    other = cells.copy()
    other.obs = other.obs.rename(columns={"cell_type": "CellType"})
    assert evaluate(run, other, ask=["cell_type"], phenotypes={"cell_type": "CellType"}) == expected
    other.write_h5ad(tmp_path / "in.h5ad")
    flags = ("--eval_data_paths", str(tmp_path / "in.h5ad"), "--phenotypes", "cell_type=CellType", *ASK)
    assert main(["evaluate", str(small_folder / "runs/mlm"), "--output", str(tmp_path / "scores"), *flags]) == 0
    found = json.loads((tmp_path / "scores/metrics.json").read_text())
    assert found["cell_type"]["alone"] == pytest.approx(expected["cell_type"]["alone"])


def test_a_phenotype_without_any_label_is_left_out_with_a_line(run, cells, caplog):
    other = cells.copy()
    other.obs = other.obs.drop(columns="tissue")
    assert set(evaluate(run, other)) == {"cell_type", "genes", "embedding"}
    assert "no cell has a tissue that the run knows, so it is not scored" in caplog.text


def test_too_few_labels_keep_the_temperature_that_was_fitted(own_run, cells, small_folder, caplog):
    evaluate(own_run, Corpus.open(small_folder / "corpus").paths("eval"), ask=["cell_type"])
    before = json.loads((own_run / CALIBRATION_FILE).read_text())["temperatures"]
    few = cells.copy()
    few.obs["cell_type"] = few.obs["cell_type"].astype(object).where(np.arange(255) < 30)
    evaluate(own_run, few, ask=["cell_type"], calibrate=True)
    assert json.loads((own_run / CALIBRATION_FILE).read_text())["temperatures"] == before
    assert "no temperature is fitted" in caplog.text


# -- baselines ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_baselines(small_folder: Path, tmp_path_factory) -> tuple[str, dict]:
    """What `evaluate` prints and writes about the run's own evaluation cells."""
    folder = tmp_path_factory.mktemp("scores")
    text = run_evaluate(EvaluateConfig(run=str(small_folder / "runs/mlm"), output=str(folder), calibrate=False))
    return text, json.loads((folder / "metrics.json").read_text())


def test_one_answer_of_each_phenotype_is_marked_as_the_best(with_baselines):
    text, metrics = with_baselines
    for category in ("cell_type", "tissue"):
        plain = {name: scores for name, scores in metrics[category].items() if name not in ("given_others", "together")}
        [best] = [name for name, scores in metrics[category].items() if scores.get("best")]
        assert plain[best]["accuracy"] == max(scores["accuracy"] for scores in plain.values())
        answers = text.split("\n\n")[0].splitlines()
        [line] = [line for line in answers if line.startswith(f"{category:>9} ") and line.endswith(" best")]
        assert ROW_NAMES[best] in line


def test_rows_of_baselines_say_how_many_genes_they_use(with_baselines):
    text, metrics = with_baselines
    assert "(baseline) ridge, 200 genes" in text and "(baseline) logistic regression, 200 genes" in text
    assert metrics["cell_type"]["nearest_neighbors"]["n_genes"] == 200


def test_files_with_more_genes_than_the_run_give_baselines_all_of_them(run, cells):
    scores = evaluate(run, cells[::2].copy(), train_paths=cells[1::2].copy(), ask=["cell_type"])["cell_type"]
    assert (scores["logistic_regression"]["n_genes"], scores["ridge"]["n_genes"]) == (200, cells.n_vars)
    assert scores["ridge"]["accuracy"] > 0.9


def test_a_run_that_loses_to_a_baseline_is_told_plainly(own_run, cells, small_folder, caplog):
    weights = load_file(own_run / "model.safetensors")
    save_file({name: 0 * tensor for name, tensor in weights.items()}, own_run / "model.safetensors", {"format": "pt"})
    paths = {split: Corpus.open(small_folder / "corpus").paths(split) for split in ("train", "eval")}
    evaluate(own_run, paths["eval"], train_paths=paths["train"], ask=["cell_type"], calibrate=False)
    [line] = [line for line in caplog.messages if "is right in" in line]
    told = r"cell_type: (.+) is right in \d+\.\d % of these \d+ cells, the run in \d+\.\d %: use \1, or train"
    assert re.match(told, line)


def test_without_files_the_run_s_own_held_out_cells_are_scored_next_to_its_baselines(own_run, small_folder):
    scores = evaluate(own_run, ask=["cell_type"])["cell_type"]
    assert scores["alone"]["n"] == len(names_of(small_folder / "corpus", "eval"))
    assert {"calibration", "accuracy"} <= scores["alone"].keys() and "logistic_regression" in scores


def test_the_folder_of_held_out_cells_is_known_as_the_run_s_own(own_run, small_folder):
    assert "calibration" in evaluate(own_run, small_folder / "corpus/eval", ask=["cell_type"])["cell_type"]["alone"]


def test_nothing_is_marked_where_labels_are_given(run, small_folder):
    paths = {split: Corpus.open(small_folder / "corpus").paths(split) for split in ("train", "eval")}
    options = {"ask": ["cell_type"], "given": ["tissue"], "calibrate": False}
    scores = evaluate(run, paths["eval"], train_paths=paths["train"], **options)["cell_type"]
    assert "ridge" in scores and not any("best" in one for one in scores.values())


# -- a moved run --------------------------------------------------------------------------------------------------


def test_a_run_whose_corpus_is_not_there_is_refused_with_the_flag(own_run, capsys):
    MlmConfig(output_dir=str(own_run), corpus="corpus").save(own_run / "run.yaml")
    assert main(["evaluate", str(own_run)]) == 2
    assert "in its corpus 'corpus', as run.yaml says, but they are not there. Give --corpus" in capsys.readouterr().err
    assert not (own_run / "evaluation").exists()


def test_a_moved_run_is_scored_on_the_corpus_that_is_named(own_run, small_folder, tmp_path):
    MlmConfig(output_dir=str(own_run), corpus="corpus").save(own_run / "run.yaml")
    flags = ("--corpus", str(small_folder / "corpus"), "--output", str(tmp_path / "scores"), *ASK)
    assert main(["evaluate", str(own_run), *flags]) == 0


# -- a run that is not finished -----------------------------------------------------------------------------------


@pytest.fixture
def stopped_run(small_folder: Path, tmp_path: Path) -> Path:
    """A run of three steps whose final files are missing, as after a signal: checkpoints 1, 2 and 3."""
    flags = "--model_arch tiny --num_hidden_layers 1 --max_steps 3 --save_strategy steps --save_steps 1 --no_bf16"
    rest = "--eval_strategy no --report_to none"
    folder = tmp_path / "stopped"
    assert main(f"mlm --corpus {small_folder}/corpus --output_dir {folder} {flags} {rest}".split()) == 0
    for path in (folder / name for name in ("config.json", "model.safetensors")):
        path.unlink()
    return folder


def test_a_run_that_is_not_finished_is_read_from_its_newest_whole_checkpoint(stopped_run, cells, caplog):
    assert Path(load_run(stopped_run, device="cpu").path).name == "checkpoint-3"
    assert "reading its newest whole checkpoint, checkpoint-3" in caplog.text
    (stopped_run / "checkpoint-3/model.safetensors").write_bytes(b"half")
    loaded = load_run(stopped_run, device="cpu")
    assert Path(loaded.path).name == "checkpoint-2"
    assert loaded.settings.max_steps == 3 and training_cells(loaded, cells).any()
    answers = predict(cells[:5].copy(), stopped_run, ask=["cell_type"], device="cpu")
    assert answers.uns["perturbgene"]["run"].endswith("checkpoint-2")


def test_a_run_without_a_whole_checkpoint_is_refused(stopped_run):
    for checkpoint in stopped_run.glob("checkpoint-*"):
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(InputError, match="holds no finished run"):
        load_run(stopped_run)
