"""Scores of embeddings: known purity and mixing of hand-made points, and a warning of components that are purer."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file, save_file

from perturbgene.cli.verbs import EvaluateConfig
from perturbgene.errors import InputError
from perturbgene.inference.embedding_scores import PCA, RUN, compare, mixing, purity
from perturbgene.inference.evaluate import evaluate, training_cells
from perturbgene.inference.run import load_run
from perturbgene.main import main

DOTS = np.random.default_rng(0).normal(size=(120, 2))
LABELS = np.repeat([0, 1, 2], 40)
APART = DOTS + 100 * LABELS[:, None]


# -- purity and mixing --------------------------------------------------------------------------------------------


def test_labels_that_lie_apart_are_pure():
    assert purity(APART, LABELS).tolist() == [1.0] * 120


def test_labels_without_a_place_of_their_own_are_as_pure_as_chance():
    labels_n = np.random.default_rng(1).permutation(LABELS)
    assert purity(DOTS, labels_n).mean() == pytest.approx(1 / 3, abs=0.04)


def test_a_label_with_few_cells_can_be_pure_too():
    labels_n = np.where(np.arange(120) < 4, 9, LABELS)
    points_n2 = np.where(labels_n[:, None] == 9, -500 + DOTS, APART)
    assert purity(points_n2, labels_n)[:4].tolist() == [1.0] * 4


def test_the_only_cell_of_a_label_is_not_counted():
    labels_n = np.where(np.arange(120) == 0, 9, LABELS)
    assert np.flatnonzero(np.isnan(purity(APART, labels_n))).tolist() == [0]
    assert compare({RUN: APART, PCA: DOTS}, labels_n, None, category="cell_type")[RUN]["n"] == 119


def test_donors_that_lie_apart_within_their_label_are_not_mixed():
    donors_n = np.tile(["A", "B"], 60)
    assert mixing(APART + 20 * (donors_n == "A")[:, None], LABELS, donors_n) == 0


def test_donors_drawn_by_chance_are_mixed_as_by_chance_however_uneven():
    donors_n = np.random.default_rng(2).permutation(np.repeat(["A", "B", "C"], [90, 20, 10]))
    assert mixing(APART, LABELS, donors_n) == pytest.approx(1, abs=0.15)


def test_a_donor_with_labels_of_its_own_is_no_lack_of_mixing():
    donors_n = np.where(LABELS == 2, "C", np.tile(["A", "B"], 60))
    is_shared_n = LABELS < 2
    found = mixing(APART, LABELS, donors_n)
    assert found == pytest.approx(mixing(APART[is_shared_n], LABELS[is_shared_n], donors_n[is_shared_n]))


def test_without_a_second_donor_nothing_is_said_about_mixing():
    assert np.isnan(mixing(APART, LABELS, np.full(120, "A")))
    assert "mixing" not in compare({RUN: APART, PCA: DOTS}, LABELS, np.full(120, "A"), category="cell_type")[RUN]


# -- the comparison -----------------------------------------------------------------------------------------------


def test_an_embedding_of_noise_is_warned_of(caplog):
    scores = compare({RUN: DOTS, PCA: APART}, LABELS, None, category="cell_type")
    assert scores[PCA]["best"] is True and "best" not in scores[RUN]
    assert "cell_type: in the run's embedding" in caplog.text and "cluster the components" in caplog.text


@pytest.mark.parametrize("own", [APART, APART + 1e-3 * DOTS], ids=["equal", "as pure"])
def test_an_embedding_that_is_as_pure_is_best_without_a_warning(own, caplog):
    scores = compare({RUN: own, PCA: APART}, LABELS, None, category="cell_type")
    assert scores[RUN]["best"] is True and "best" not in scores[PCA] and not caplog.messages
    assert scores[RUN]["silhouette"] > 0.9


def test_a_difference_within_one_standard_error_is_not_warned_of(caplog):
    one, two = APART.copy(), APART.copy()
    one[50], two[0], two[90] = 1000, 1000, -1000  # cells near another label
    scores = compare({RUN: two, PCA: one}, LABELS, None, category="cell_type")
    assert scores[PCA]["purity"] > scores[RUN]["purity"] and not caplog.messages


# -- evaluate -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells(small_folder: Path) -> ad.AnnData:
    return ad.read_h5ad(small_folder / "cells.h5ad")


def test_evaluate_prints_and_writes_the_embedding_next_to_components(small_folder, tmp_path, capsys):
    flags = ("--output", str(tmp_path / "scores"), "--no_baselines", "--no_calibrate")
    assert main(["evaluate", str(small_folder / "runs/mlm"), *flags]) == 0
    table = pd.read_csv(tmp_path / "scores/embedding.csv")
    assert table.columns.tolist() == ["phenotype", "embedding", "n", "purity", "silhouette", "mixing", "best"]
    [own, components] = table.to_dict("records")  # the held-out cells have one tissue
    assert (own["phenotype"], own["embedding"]) == ("cell_type", "run")
    assert components["embedding"] == "(baseline) principal components of the same cells"
    assert own["purity"] > 0.9 and components["purity"] > 0.9
    stored = json.loads((tmp_path / "scores/metrics.json").read_text())["embedding"]["cell_type"]
    assert stored["run"]["purity"] == pytest.approx(own["purity"]) and stored["pca"]["n"] == components["n"]
    assert "(baseline) principal components of the same cells" in capsys.readouterr().out


def test_a_run_whose_embedding_says_nothing_is_told_plainly(small_folder, cells, tmp_path, caplog):
    run = load_run(small_folder / "runs/mlm", device="cpu")
    weights = load_file(small_folder / "runs/mlm/model.safetensors")
    run.model.save_pretrained(tmp_path / "run")
    run.tokenizer.save_pretrained(tmp_path / "run")
    changed = {name: 0 * tensor if "genebert" in name else tensor for name, tensor in weights.items()}
    save_file(changed, tmp_path / "run/model.safetensors", {"format": "pt"})
    scores = evaluate(tmp_path / "run", cells, ask=["cell_type"])["embedding"]["cell_type"]
    assert scores["pca"]["best"] is True and "cluster the components" in caplog.text


def test_at_most_so_many_cells_are_embedded(small_folder, cells, monkeypatch):
    monkeypatch.setattr("perturbgene.inference.embedding_scores.MOST_CELLS", 60)
    run = load_run(small_folder / "runs/mlm", device="cpu")
    found = [evaluate(run, cells, ask=["cell_type"], batch_size=size)["embedding"]["cell_type"] for size in (256, 50)]
    assert found[0]["run"]["n"] == 60
    assert found[0]["run"] == pytest.approx(found[1]["run"], abs=0.01)


def test_cells_of_training_and_those_without_genes_or_labels_are_left_out(small_folder, cells):
    is_left_out_n = np.arange(255) % 5 == 0
    other = cells.copy()
    other.obs["cell_type"] = other.obs["cell_type"].astype(object).where(~is_left_out_n | (np.arange(255) > 150))
    other.X = other.X.multiply(~(is_left_out_n & (np.arange(255) > 150))[:, None]).tocsr()
    run = load_run(small_folder / "runs/mlm", device="cpu")
    scores = evaluate(run, other, ask=["cell_type"], calibrate=False)
    assert scores["embedding"]["cell_type"]["run"]["n"] == (~training_cells(run, cells) & ~is_left_out_n).sum()


def test_scib_metrics_are_higher_for_types_that_are_apart() -> None:
    pytest.importorskip("scib_metrics", reason="scib-metrics is not installed (pip install 'perturbgene[scib]')")
    donors_n = np.array(["A", "B"])[np.arange(len(LABELS)) % 2]
    scores = compare({RUN: APART, PCA: DOTS}, LABELS, donors_n, category="cell_type", has_scib=True)
    assert scores[RUN]["scib Bio conservation"] > scores[PCA]["scib Bio conservation"]
    assert {"scib Total", "scib Batch correction", "scib iLISI", "scib KMeans ARI"} <= set(scores[RUN])


def test_scib_without_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perturbgene.cli.verbs.find_spec", lambda name: None)
    with pytest.raises(InputError, match="scib needs the package scib-metrics. Install it with"):
        EvaluateConfig(run="runs/mlm", scib=True)
