"""Scores are checked against hand-counted three-class examples and against scikit-learn on random labels."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, precision_recall_fscore_support

from perturbgene.eval_utils import Confusion
from perturbgene.inference.baselines import logistic_regression, majority_class

TRUE = [0, 0, 0, 0, 1, 1, 2, 2]
PREDICTED = [0, 0, 0, 1, 1, 2, 2, 2]


def counted(labels: list[str], true_n: ArrayLike, predicted_n: ArrayLike) -> Confusion:
    """Count some cells."""
    confusion = Confusion(labels)
    confusion.add(true_n, predicted_n)
    return confusion


def two_blobs(num_cells: int, *, seed: int) -> tuple[csr_matrix, np.ndarray]:
    """Make cells of two classes of which class 1 expresses gene 0 more, shape (n, 6)."""
    generator = np.random.default_rng(seed)
    labels_n = np.arange(num_cells) % 2
    values_ng = generator.random((num_cells, 6)) * (generator.random((num_cells, 6)) < 0.7)
    values_ng[:, 0] += 3.0 * labels_n
    return csr_matrix(values_ng.astype(np.float32)), labels_n


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


@pytest.mark.parametrize(
    ("labels_n", "expected"), [([1, 1, 0, -1, -1, -1], 1), ([2, 0, 0, 2], 0), ([-1], 0), ([], 0)],
    ids=["most frequent", "first of equals", "nothing known", "no cell"],
)  # fmt: skip
def test_the_majority_is_the_most_frequent_known_class(labels_n: list[int], expected: int) -> None:
    assert majority_class(labels_n) == expected


def test_logistic_regression_learns_a_gene_and_is_repeatable() -> None:
    train_ng, train_n = two_blobs(60, seed=0)
    eval_ng, eval_n = two_blobs(30, seed=1)
    predicted_n = logistic_regression(train_ng, train_n, eval_ng, seed=0)
    assert (predicted_n == eval_n).mean() > 0.95
    assert np.array_equal(logistic_regression(train_ng, train_n, eval_ng, seed=0), predicted_n)


def test_logistic_regression_keeps_class_numbers_when_a_class_has_no_training_cells() -> None:
    train_ng, train_n = two_blobs(60, seed=0)
    eval_ng, _ = two_blobs(30, seed=1)
    assert set(logistic_regression(train_ng, train_n * 2, eval_ng, seed=0).tolist()) == {0, 2}


def test_logistic_regression_skips_unlabelled_training_cells() -> None:
    train_ng, train_n = two_blobs(60, seed=0)
    eval_ng, _ = two_blobs(30, seed=1)
    found_n = logistic_regression(train_ng, np.where(np.arange(60) < 10, -1, train_n), eval_ng, seed=0)
    assert np.array_equal(found_n, logistic_regression(train_ng[10:], train_n[10:], eval_ng, seed=0))


@pytest.mark.parametrize("train_label", [1, -1], ids=["one class", "no labelled cell"])
def test_logistic_regression_without_two_classes_is_the_majority_rule(train_label: int) -> None:
    train_ng, train_n = two_blobs(20, seed=0)
    eval_ng, _ = two_blobs(10, seed=1)
    predicted_n = logistic_regression(train_ng, np.full_like(train_n, train_label), eval_ng, seed=0)
    assert predicted_n.tolist() == [max(train_label, 0)] * 10


def test_logistic_regression_on_no_evaluated_cells_predicts_nothing() -> None:
    train_ng, train_n = two_blobs(20, seed=0)
    assert logistic_regression(train_ng, train_n, train_ng[:0], seed=0).shape == (0,)


def test_logistic_regression_of_no_training_cells_is_the_majority_rule() -> None:
    eval_ng, _ = two_blobs(10, seed=1)
    assert logistic_regression(eval_ng[:0], [], eval_ng, seed=0).tolist() == [0] * 10


def test_logistic_regression_takes_single_cells_of_every_class() -> None:
    train_ng, train_n = two_blobs(2, seed=0)
    assert logistic_regression(train_ng, train_n, train_ng, seed=0).tolist() == train_n.tolist()
