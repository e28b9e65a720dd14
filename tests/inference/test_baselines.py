"""Scores are counted as by hand and as by scikit-learn; baselines see the genes and cells that they should."""

import logging
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support

from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.scale import log_matrix
from perturbgene.eval_utils import Confusion, Scores
from perturbgene.inference import baselines as module
from perturbgene.inference.baselines import (
    Answers,
    baselines,
    compare_with_regression,
    donors_of,
    mark_best,
    paired_difference,
)
from perturbgene.inference.classifiers import ridge
from tests.nine_genes import a_tokenizer

TRUE = [0, 0, 0, 0, 1, 1, 2, 2]
PREDICTED = [0, 0, 0, 1, 1, 2, 2, 2]


def counted(labels: list[str], true_n: ArrayLike, predicted_n: ArrayLike) -> Confusion:
    """Count some cells."""
    confusion = Confusion(labels)
    confusion.add(true_n, predicted_n)
    return confusion


def test_three_classes_are_counted_and_scored_as_by_hand() -> None:
    confusion = counted(["B", "NK", "T"], TRUE, PREDICTED)
    assert confusion.counts_kk.tolist() == [[3, 1, 0], [0, 1, 1], [0, 0, 2]]
    scores = confusion.scores()
    assert scores["n"] == 8
    assert scores["accuracy"] == pytest.approx(6 / 8)
    assert scores["macro_precision"] == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)
    assert scores["macro_recall"] == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert scores["macro_f1"] == pytest.approx((6 / 7 + 1 / 2 + 4 / 5) / 3)
    assert scores["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)


def test_macro_f1_is_the_mean_of_f1_and_not_the_f1_of_the_means() -> None:
    scores = counted(["B", "T"], [0] * 6 + [1] * 4, [0] * 9 + [1]).scores()
    assert scores["macro_f1"] == pytest.approx((12 / 15 + 2 / 5) / 2)
    precision, recall = scores["macro_precision"], scores["macro_recall"]
    assert scores["macro_f1"] != pytest.approx(2 * precision * recall / (precision + recall))


@settings(max_examples=40, deadline=None)
@given(
    pairs=arrays.arrays(np.int64, st.tuples(st.integers(1, 40), st.just(2)), elements=st.integers(0, 5)),
)
def test_scores_equal_scikit_learn_on_random_labels(pairs: np.ndarray) -> None:
    true_n, predicted_n = pairs[:, 0], pairs[:, 1]
    scores = counted([*"abcdef"], true_n, predicted_n).scores()
    precision, recall, f1, _ = precision_recall_fscore_support(true_n, predicted_n, average="macro", zero_division=0)
    assert scores["accuracy"] == pytest.approx(accuracy_score(true_n, predicted_n))
    assert (scores["macro_precision"], scores["macro_recall"]) == pytest.approx((precision, recall))
    assert scores["macro_f1"] == pytest.approx(f1)
    with warnings.catch_warnings(action="ignore"):  # scikit-learn warns of predicted classes without true cells
        assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true_n, predicted_n))


def test_counts_equal_scikit_learn_and_do_not_depend_on_the_batches() -> None:
    generator = np.random.default_rng(3)
    true_n, predicted_n = generator.integers(0, 4, 101), generator.integers(0, 4, 101)
    streamed = Confusion([*"abcd"])
    for start in range(0, 101, 7):
        streamed.add(true_n[start : start + 7], predicted_n[start : start + 7])
    assert np.array_equal(streamed.counts_kk, confusion_matrix(true_n, predicted_n, labels=range(4)))


def test_cells_of_unknown_true_class_are_left_out() -> None:
    confusion = counted(["B", "T"], [-1, 0, -100, 1], [1, 0, -1, 0])
    assert confusion.counts_kk.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(("true_n", "predicted_n"), [([0], [2]), ([2], [0]), ([0], [-1]), ([0, 1], [0])])
def test_labels_that_would_land_in_another_row_are_refused(true_n: list[int], predicted_n: list[int]) -> None:
    with pytest.raises(AssertionError, match=r"class|true labels"):
        Confusion(["B", "T"]).add(true_n, predicted_n)


def test_no_cells_give_nan_scores_and_a_zero_count() -> None:
    scores = Confusion(["B", "T"]).scores()
    assert scores.pop("n") == 0
    assert all(math.isnan(value) for value in scores.values())


def test_one_class_alone_scores_one() -> None:
    scores = counted(["B"], [0, 0], [0, 0]).scores()
    assert scores == {"n": 2} | dict.fromkeys([*scores][1:], 1.0)


def test_tables_name_true_rows_and_predicted_columns() -> None:
    confusion = counted(["B", "NK", "T"], TRUE, PREDICTED)
    table = confusion.table()
    assert (table.index.name, table.columns.name) == ("true", "predicted")
    assert table.loc["B", "NK"] == 1 and table.loc["NK", "B"] == 0
    assert confusion.per_class().loc["NK"].tolist() == [0.5, 0.5, 0.5, 2]


# -- baselines of real files --------------------------------------------------------------------------------------

#: Genes of a file: the nine of the run, and two more.
FILE_GENES = [*(f"G{i}" for i in range(9)), "OTHER", "MORE"]


def cells(num_cells: int, *, marker: str, genes: list[str] = FILE_GENES, seed: int = 0) -> ad.AnnData:
    """Make counts of B and T cells of three donors that differ in one gene alone: five times as much in T cells."""
    generator, is_t_n = np.random.default_rng(seed), np.arange(num_cells) % 2 == 1
    counts_ng = generator.poisson(20, (num_cells, len(genes))).astype(np.float32)
    counts_ng[is_t_n, genes.index(marker)] *= 5
    donors = [f"D{cell // 2 % 3}" for cell in range(num_cells)]
    made = ad.AnnData(
        csr_matrix(counts_ng), obs={"cell_type": np.where(is_t_n, "T cell", "B cell"), "donor_id": donors}
    )
    made.var_names, made.obs_names = genes, [f"cell {seed} {cell}" for cell in range(num_cells)]
    return made


@pytest.fixture
def scored(tmp_path: Path) -> Callable[..., dict[str, Scores]]:
    """Return a function: training and evaluation cells -> scores of the baselines of `cell_type`."""

    def score(train: ad.AnnData, held_out: ad.AnnData, **options: Any) -> dict[str, Scores]:
        paths = []
        for name, adata in (("train", train), ("eval", held_out)):
            adata.write_h5ad(tmp_path / f"{name}.h5ad")
            paths.append(str(tmp_path / f"{name}.h5ad"))
        datasets = (IterableAnnDataset(path, a_tokenizer(normalization="auto"), **options) for path in paths)
        return {name: one.scores for name, one in baselines(*datasets, ["cell_type"])["cell_type"].items()}

    return score


def test_every_baseline_finds_a_gene_of_the_run(scored):
    scores = scored(cells(60, marker="G3"), cells(30, marker="G3", seed=1))
    assert list(scores) == ["majority", "logistic_regression", "ridge", "nearest_neighbors"]
    assert {name: one["accuracy"] for name, one in scores.items()} == {
        "majority": 0.5, "logistic_regression": 1.0, "ridge": 1.0, "nearest_neighbors": 1.0,
    }  # fmt: skip


def test_ridge_and_neighbors_use_genes_beyond_those_of_the_run(scored):
    scores = scored(cells(60, marker="OTHER"), cells(30, marker="OTHER", seed=1))
    assert [scores[name]["n_genes"] for name in ("logistic_regression", "ridge", "nearest_neighbors")] == [9, 11, 11]
    assert scores["ridge"]["accuracy"] == scores["nearest_neighbors"]["accuracy"] == 1


def test_genes_that_the_evaluated_cells_lack_are_left_out(scored):
    held_out = cells(30, marker="G3", seed=1)
    scores = scored(cells(60, marker="MORE"), held_out[:, ::-1][:, 1:].copy())  # another order, without MORE
    assert scores["ridge"]["n_genes"] == 10
    assert scores["ridge"]["accuracy"] < 0.9


def test_logistic_regression_does_not_rely_on_a_gene_that_the_evaluated_cells_lack(scored):
    train, held_out = cells(60, marker="G3"), cells(30, marker="G4", seed=1)
    train.X[1::2, FILE_GENES.index("G4")] *= 2  # in training, a weaker marker than G3
    scores = scored(train, held_out[:, [name != "G3" for name in FILE_GENES]].copy())
    assert (scores["logistic_regression"]["n_genes"], scores["logistic_regression"]["accuracy"]) == (8, 1.0)


def test_a_gene_is_found_under_its_symbol_in_the_other_file(scored):
    train, held_out = cells(60, marker="OTHER"), cells(30, marker="OTHER", seed=1)
    train.var["feature_name"] = train.var_names
    train.var_names = [*train.var_names[:9], "ENSG00000000009", "ENSG00000000010"]
    scores = scored(train, held_out)
    assert (scores["ridge"]["n_genes"], scores["ridge"]["accuracy"]) == (11, 1.0)


def test_a_further_gene_that_two_columns_claim_does_not_stop_the_scores(scored, caplog):
    caplog.set_level(logging.INFO, logger="perturbgene")
    train, held_out = cells(60, marker="G3"), cells(30, marker="G3", seed=1)
    train.X, held_out.X = train.X / 7.3, held_out.X / 7.3
    train.var_names = held_out.var_names = [*FILE_GENES[:9], "OTHER", "OTHER"]
    scores = scored(train, held_out, normalization="none")
    assert scores["ridge"]["n_genes"] == 9
    assert "baselines use the genes of the run alone" in caplog.text


def test_where_chooses_the_cells_of_baselines_too(scored):
    scores = scored(cells(60, marker="G3"), cells(60, marker="G3", seed=1), where={"donor_id": ["D0", "D1"]})
    assert (scores["ridge"]["n"], scores["ridge"]["n_train"]) == (40, 40)


def test_cells_without_a_label_are_neither_learnt_nor_scored(scored):
    train, held_out = cells(60, marker="G3"), cells(30, marker="G3", seed=1)
    for adata, known in ((train, 50), (held_out, 20)):
        adata.obs["cell_type"] = adata.obs["cell_type"].astype(object).where(np.arange(adata.n_obs) < known)
    scores = scored(train, held_out)
    assert {(one["n"], one["n_train"]) for one in scores.values()} == {(20, 50)}


def test_training_cells_of_one_label_leave_the_majority_alone(scored):
    train = cells(60, marker="G3")
    train.obs["cell_type"] = "B cell"
    scores = scored(train, cells(30, marker="G3", seed=1))
    assert {name: one["accuracy"] for name, one in scores.items()} == {"majority": 0.5}


def test_evaluated_cells_are_read_in_parts_without_a_change(scored, monkeypatch):
    given = cells(60, marker="G3"), cells(30, marker="OTHER", seed=1)
    whole = scored(*given)
    monkeypatch.setattr(module, "CELLS_AT_ONCE", 7)
    assert scored(*given) == whole


def test_ridge_divides_the_cells_by_the_donor_column(tmp_path):
    adata = cells(30, marker="G3", genes=FILE_GENES[:9], seed=0)
    adata.X[:, FILE_GENES.index("G3")] = 20  # nothing left to learn: the penalty depends on the folds
    adata.write_h5ad(tmp_path / "cells.h5ad")
    data = IterableAnnDataset(str(tmp_path / "cells.h5ad"), a_tokenizer(normalization="auto"))
    values_ng = log_matrix(data.shards[0].read(np.arange(30)))  # the genes of the run are those of the file
    labels_n, donors_n = np.arange(30) % 2, donors_of(data, "donor_id")
    by = {column: baselines(data, data, ["cell_type"], donor_column=column) for column in ("donor_id", "batch", None)}
    penalties = {column: found["cell_type"]["ridge"].scores["penalty"] for column, found in by.items()}
    by_donor, by_cell = (ridge(values_ng, labels_n, groups_n=given, seed=0)[1]["penalty"] for given in (donors_n, None))
    assert penalties == {"donor_id": by_donor, "batch": by_cell, None: by_cell}
    assert by_donor != by_cell


# -- who is best --------------------------------------------------------------------------------------------------


def marked(run: list[int], ridge: list[int], *, caplog: pytest.LogCaptureFixture) -> dict[str, Scores]:
    """Mark the best of a run and ridge, whose answers on 8 cells of known class 1 and an unlabeled one are given."""
    true_n = np.array([1] * 8 + [-1])
    scores_of = {}
    for name, predicted_n in (("alone", run), ("ridge", ridge)):
        scores_of[name] = counted(["B", "T"], true_n, [*predicted_n, 0]).scores()
    others = {"ridge": Answers(scores_of["ridge"], np.array([0, *ridge[::-1]]))}
    answers = (np.arange(9)[::-1], true_n, np.array([*run, 0]))  # the run saw the cells in the reverse order
    caplog.set_level(logging.WARNING, logger="perturbgene")
    mark_best(scores_of, others, answers, category="cell_type", run="alone")
    return scores_of


def compared(donors: list[str], *, caplog: pytest.LogCaptureFixture) -> tuple[dict[str, float], list[str]]:
    """Compare a run and a regression whose answers on eight cells of class 1 and an unlabeled one are given."""
    regression = Answers({}, np.array([0, 1, 1, 1, 1, 0, 0, 1, 0]))
    answers = (np.arange(9)[::-1], np.array([1] * 8 + [-1]), np.array([1, 1, 1, 0, 1, 1, 1, 1, 0]))
    caplog.set_level(logging.INFO, logger="perturbgene")
    donors_n = np.array(["unlabeled", *donors])
    return compare_with_regression(regression, answers, donors_n, category="cell_type"), caplog.messages


def test_a_run_is_compared_with_logistic_regression_over_donors(caplog):
    # of cells 1 to 8, the run is right in all but 5, the regression in 1, 2, 3, 4 and 7; 7 and 8 have no donor
    difference, messages = compared(["a", "a", "b", "b", "c", "c", "nan", "nan"], caplog=caplog)
    half = 4.302653 * 0.5 / 3  # Student's t with two degrees of freedom, standard error of 0, 0 and 0.5
    assert difference == pytest.approx(
        {"mean": 0.5 / 3, "low": 0.5 / 3 - half, "high": 0.5 / 3 + half, "num_donors": 3}
    )
    assert messages == [
        "cell_type: accuracy of the run minus that of logistic regression, mean of 3 donors: +0.167 (95 % interval "
        "-0.550 to +0.884); without 2 cells of no known donor"
    ]


def test_a_difference_that_all_donors_share_is_not_called_certain(caplog):
    _, messages = compared(["a", "b", "c", "d", *["nan"] * 4], caplog=caplog)
    # without cells 5 to 8 the run and the regression are right in all four
    assert messages == [
        "cell_type: accuracy of the run minus that of logistic regression, mean of 4 donors: +0.000 (the same for each "
        "of them); without 4 cells of no known donor"
    ]


def test_two_donors_are_too_few_to_compare_and_without_donors_nothing_is_said(caplog):
    difference, messages = compared(["a"] * 4 + ["b"] * 4, caplog=caplog)
    assert difference == {}
    assert re.match("cell_type: the cells are of 2 donors, which does not show .* hold out 3 donors", messages[0])
    caplog.clear()
    assert compared(["nan"] * 8, caplog=caplog) == ({}, [])


def test_a_baseline_that_is_clearly_better_is_marked_and_named(caplog):
    scores_of = marked([1, 1, 1, 1, 0, 0, 0, 0], [1] * 8, caplog=caplog)
    assert scores_of["ridge"]["best"] is True and "best" not in scores_of["alone"]
    assert caplog.messages == [
        "cell_type: ridge is right in 100.0 % of these 8 cells, the run in 50.0 %: use ridge, or train the run better"
    ]


def test_a_baseline_that_is_better_by_chance_is_marked_without_a_warning(caplog):
    scores_of = marked([1, 1, 1, 1, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1, 1], caplog=caplog)
    assert scores_of["ridge"]["best"] is True
    assert caplog.messages == []


@pytest.mark.parametrize("run", [[1] * 8, [1] * 7 + [0]], ids=["better", "equal"])
def test_the_run_is_best_if_no_baseline_is_better(run, caplog):
    scores_of = marked(run, [0] + [1] * 7, caplog=caplog)
    assert scores_of["alone"]["best"] is True and "best" not in scores_of["ridge"]
    assert caplog.messages == []


def test_the_standard_error_is_that_of_paired_cells():
    is_right_n, other_n = np.array([1, 1, 1, 0, 1], dtype=bool), np.array([1, 0, 1, 0, 0], dtype=bool)
    difference, error = paired_difference(is_right_n, other_n)
    assert difference == pytest.approx(2 / 5)
    assert error == pytest.approx(np.std([0, 1, 0, 0, 1], ddof=1) / 5**0.5)
    assert paired_difference(is_right_n[:1], other_n[1:2])[1] == math.inf
