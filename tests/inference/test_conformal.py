"""Sets of labels: whose floors they have, how many cells of new donors they cover, what `predict` writes of them."""

import json
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import perturbgene as pg
from perturbgene.errors import InputError
from perturbgene.inference.calibration import CALIBRATION_FILE
from perturbgene.inference.conformal import LEVELS, coverage_by_donor, fit_floors, floor_at, label_sets
from perturbgene.main import main

TENTHS = np.arange(1, 11) / 10


# -- floors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "expected"), [(0.5, 0.5), (0.8, 0.2), (0.82, 0.1), (0.9, 0.1), (0.99, 0.1)])
def test_without_donors_the_floor_is_the_split_conformal_quantile(level, expected):
    """Of ten cells, the floor of level L is the ceil(11 L)-th highest probability, at most the tenth."""
    assert floor_at(fit_floors(TENTHS, np.arange(10)), level) == expected


def test_each_donor_counts_once_however_many_cells_it_has():
    """At 0.25, the 125th of a's cells is 0.9 and the 2nd of b's 0.8; at 0.5, their 250th and 3rd are 0.8 and 0.7."""
    probability_n = np.concatenate([np.tile([0.2, 0.7, 0.8, 0.9, 1.0], 100), [0.6, 0.6, 0.7, 0.8, 0.9], [0.05]])
    donors_n = np.repeat(["a", "b", "c"], [500, 5, 1])
    floors_q = fit_floors(probability_n, donors_n)
    assert [floor_at(floors_q, level) for level in (0.25, 0.5, 0.75, 0.8)] == [0.9, 0.7, 0.05, 0.05]


def test_a_level_is_rounded_up_to_the_next_stored_one():
    floors_q = tuple(range(len(LEVELS)))
    assert [floor_at(floors_q, level) for level in (0.9, 0.901, 0.905, 0.9999)] == [180, 181, 181, 200]


def test_a_higher_level_never_has_a_higher_floor():
    rng = np.random.default_rng(0)
    assert np.all(np.diff(fit_floors(rng.random(300), rng.integers(0, 12, 300))) <= 0)


# -- sets and coverage --------------------------------------------------------------------------------------------


def test_a_set_holds_what_is_not_below_the_floor_and_always_the_most_probable_label():
    probability_nk = np.array([[0.5, 0.3, 0.2], [0.4, 0.25, 0.35], [0.1, 0.1, 0.8]])
    assert label_sets(probability_nk, 0.3).tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 1]]
    assert label_sets(probability_nk, 0.99).tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert label_sets(probability_nk, 0.0).all()


def test_coverage_is_counted_for_each_donor():
    probability_nk = np.array([[0.6, 0.3, 0.1], [0.6, 0.3, 0.1], [0.9, 0.05, 0.05]])
    table = coverage_by_donor(probability_nk, np.array([1, 2, 0]), np.array(["b", "b", "a"]), 0.3)
    assert table.to_dict("list") == {
        "donor": ["a", "b"], "n": [1, 2], "coverage": [1.0, 0.5], "mean_set_size": [1.0, 2.0]
    }  # fmt: skip


def cells_of_donors(num_donors: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw probabilities of 4 labels, true labels and donors, each of which shifts the labels in its own way."""
    donors_n = np.repeat(np.arange(num_donors), rng.integers(10, 60, num_donors))
    logits_nk = 2 * rng.normal(size=(len(donors_n), 4))
    of_donor_nk = logits_nk + rng.normal(size=(num_donors, 4))[donors_n]
    labels_n = (of_donor_nk + rng.gumbel(size=of_donor_nk.shape)).argmax(axis=1)
    return np.exp(logits_nk) / np.exp(logits_nk).sum(axis=1, keepdims=True), labels_n, donors_n


@pytest.mark.parametrize("level", [0.7, 0.8, 0.9])
def test_so_many_new_donors_have_so_many_cells_covered_while_a_quantile_of_all_cells_fails(level):
    is_covered, is_covered_by_pooling = [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        (probability_nk, labels_n, donors_n), new = cells_of_donors(19, rng), cells_of_donors(19, rng)
        true_n = probability_nk[np.arange(len(labels_n)), labels_n]
        for found, units_n in ((is_covered, donors_n), (is_covered_by_pooling, np.arange(len(true_n)))):
            floor = floor_at(fit_floors(true_n, units_n), level)
            found += (coverage_by_donor(*new, floor)["coverage"] >= level).tolist()
    assert level <= np.mean(is_covered) < level + 0.07
    assert np.mean(is_covered_by_pooling) < level - 0.05


# -- evaluate and predict -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(small_folder: Path, tmp_path_factory) -> Path:
    """A run whose sets were fitted on two donors and scored on the two others."""
    run = tmp_path_factory.mktemp("conformal") / "run"
    shutil.copytree(small_folder / "runs/mlm", run)
    cells = ad.read_h5ad(small_folder / "cells.h5ad")
    cells.X = cells.X.multiply(np.arange(cells.n_vars) % 3 > 0).tocsr()  # no longer cells that the run was trained on
    cells.write_h5ad(run / "new.h5ad")
    flags = ["--eval_data_paths", str(run / "new.h5ad"), "--calibrate", "--no_baselines"]
    assert main(["evaluate", str(run), *flags]) == 0
    return run


def test_evaluate_writes_the_coverage_of_donors_that_fitted_nothing(run):
    table = pd.read_csv(run / "evaluation/coverage.csv")
    assert len(table) == 2 * 3 * 4 * 2  # phenotypes, questions, levels, donors
    found = json.loads((run / "evaluation/metrics.json").read_text())["cell_type"]["alone"]["calibration"]
    shown = table.query("phenotype == 'cell_type' and question == 'alone' and level == 0.9")
    assert shown["n"].sum() == found["n"] and (shown["num_fitted"] == 2).all()
    assert found["coverage"] == pytest.approx(shown["coverage"].mean())
    assert found["lowest_coverage"] == pytest.approx(shown["coverage"].min())
    assert found["mean_set_size"] == pytest.approx(shown["mean_set_size"].mean())


def test_predict_writes_sets_with_the_labels_above_the_floor(run, small_folder):
    cells = pg.predict(ad.read_h5ad(small_folder / "cells.h5ad"), str(run), ask=["tissue"], conformal=0.6)
    floor = json.loads(cells.uns["perturbgene"]["conformal_floors"])["tissue"]
    is_in_nk = label_sets(cells.obsm["predicted_tissue_probabilities"], floor)
    labels = np.array(cells.uns["perturbgene"]["predicted_tissue_probabilities"])
    assert cells.obs["predicted_tissue_set"].tolist() == [" | ".join(labels[is_in_k]) for is_in_k in is_in_nk]
    assert cells.obs["predicted_tissue_set_size"].tolist() == is_in_nk.sum(axis=1).tolist()
    assert set(cells.obs["predicted_tissue_set_size"]) == {1, 2}


def test_the_command_line_writes_the_same_sets(run, small_folder, tmp_path):
    source, target = small_folder / "cells.h5ad", tmp_path / "out.h5ad"
    flags = ["--ask", "tissue", "--conformal", "0.6", "--where", "donor_id=D1"]
    assert main(["predict", str(run), str(source), "--output", str(target), *flags]) == 0
    found = ad.read_h5ad(target)
    is_asked_n = (found.obs["donor_id"] == "D1").to_numpy()
    expected = pg.predict(ad.read_h5ad(source), str(run), ask=["tissue"], conformal=0.6).obs[is_asked_n]
    for name in ("predicted_tissue_set", "predicted_tissue_set_size"):
        assert found.obs.loc[is_asked_n, name].tolist() == expected[name].tolist()
    assert found.obs.loc[~is_asked_n, "predicted_tissue_set"].isna().all()
    assert (found.obs.loc[~is_asked_n, "predicted_tissue_set_size"] == 0).all()


def test_a_run_without_calibration_is_refused_with_the_remedy(small_folder, tmp_path):
    run = shutil.copytree(small_folder / "runs/mlm", tmp_path / "run")
    (run / CALIBRATION_FILE).unlink(missing_ok=True)  # the examples of docstrings may have evaluated it
    with pytest.raises(InputError, match=rf"no sets of labels .* Run `perturbgene evaluate {run}`, or remove --conf"):
        pg.predict(str(small_folder / "cells.h5ad"), str(run), ask=["cell_type"], conformal=0.9)


def test_a_question_that_evaluate_did_not_ask_is_refused(run, small_folder, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / CALIBRATION_FILE).read_text())
    content["temperatures"] = [entry for entry in content["temperatures"] if not entry["given"]]
    (tmp_path / "run" / CALIBRATION_FILE).write_text(json.dumps(content))
    question = {"ask": ["cell_type"], "given": ["tissue"], "conformal": 0.9}
    with pytest.raises(InputError, match=r"Run `perturbgene evaluate \S+ --ask cell_type --given tissue`"):
        pg.predict(str(small_folder / "cells.h5ad"), str(tmp_path / "run"), **question)
    assert "predicted_cell_type_set" in pg.predict(str(small_folder / "cells.h5ad"), str(run), **question).obs


@pytest.mark.parametrize("wrong", ["0", "1", "1.5", "-0.1", "nan", "x"])
def test_a_level_that_is_no_share_is_refused(wrong, run, small_folder, tmp_path, capsys):
    output = tmp_path / "out.h5ad"
    flags = ["--output", str(output), "--conformal", wrong]
    assert main(["predict", str(run), str(small_folder / "cells.h5ad"), *flags]) == 2
    assert "conformal" in capsys.readouterr().err
    assert not output.exists()


def test_sets_need_temperatures(run, small_folder):
    with pytest.raises(InputError, match="Remove --no_calibrate or --conformal"):
        pg.predict(str(small_folder / "cells.h5ad"), str(run), conformal=0.9, calibrate=False)
