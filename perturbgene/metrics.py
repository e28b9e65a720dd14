"""Scores and baselines: label numbers in, counts and scores out.

Owns confusion counts, the scores read off them, and the two baselines every score stands beside (majority class,
logistic regression); knows nothing of files, tokens or models. Letters: n cells, g genes, k classes.
"""

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

logger = logging.getLogger(__name__)

IntArray = NDArray[np.int64]
Scores = dict[str, float]

# Which scaling is the stronger baseline depends on the panel, so it is chosen on training cells. Held-out accuracy and
# macro F1, unscaled against divided by the standard deviation: 0.826 / 0.679 against 0.846 / 0.706 on 700 PBMC x 765
# variable genes, 0.920 / 0.882 against 0.880 / 0.833 on 3,874 sorted PBMC x 16,791 genes. On the former, C from 0.1 to
# 10 moved the winner by at most 0.003 / 0.018, so scikit-learn's default of 1 stays.
INVERSE_PENALTY = 1.0
MOST_ITERATIONS = 2000
NUM_FOLDS = 3
MOST_CELLS_FOR_CHOOSING = 5000


class Confusion:
    """Counts of (true, predicted) pairs, filled batch by batch so that no logits need to be held.

    Example:
        >>> confusion = Confusion(["B", "NK", "T"])
        >>> confusion.add([0, 0, 1, -1], [0, 2, 1, 0])
        >>> confusion.counts_kk.tolist()
        [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
    """

    def __init__(self, labels: Sequence[str], *, counts_kk: IntArray | None = None) -> None:
        """Start at zero, or at the given counts.

        Args:
            labels: Name of each class, k in all.
            counts_kk: Counts so far, true classes as rows, shape (k, k).
        """
        self.labels: tuple[str, ...] = tuple(labels)
        shape = (len(self.labels), len(self.labels))
        self.counts_kk: IntArray = np.zeros(shape, dtype=np.int64) if counts_kk is None else counts_kk.astype(np.int64)
        assert self.counts_kk.shape == shape, f"counts of shape {self.counts_kk.shape} for {len(self.labels)} labels"

    def add(self, true_n: ArrayLike, predicted_n: ArrayLike) -> None:
        """Count more cells; a cell whose true label is negative (unknown) is left out.

        Args:
            true_n: True class of each cell, shape (n,), in -inf..k-1.
            predicted_n: Predicted class of each cell, shape (n,), in 0..k-1 wherever the truth is known.
        """
        true = np.asarray(true_n, dtype=np.int64).ravel()
        predicted = np.asarray(predicted_n, dtype=np.int64).ravel()
        assert true.shape == predicted.shape, f"{true.size} true labels but {predicted.size} predictions"
        is_known_n = true >= 0
        true, predicted = true[is_known_n], predicted[is_known_n]
        num_classes = len(self.labels)
        # Checked here because row * k + column would otherwise land, silently, in a neighbouring row.
        assert true.size == 0 or max(true.max(), predicted.max()) < num_classes, "a class number is not below k"
        assert true.size == 0 or predicted.min() >= 0, "a predicted class is negative"
        pairs = np.bincount(true * num_classes + predicted, minlength=num_classes**2)
        self.counts_kk += pairs.reshape(num_classes, num_classes)

    def merge(self, other: "Confusion") -> None:
        """Add the counts of another rank or file."""
        assert self.labels == other.labels, "only confusions over the same labels can be merged"
        self.counts_kk += other.counts_kk

    @classmethod
    def of(cls, labels: Sequence[str], true_n: ArrayLike, predicted_n: ArrayLike) -> "Confusion":
        """Count one set of cells in one go."""
        confusion = cls(labels)
        confusion.add(true_n, predicted_n)
        return confusion

    def scores(self) -> Scores:
        """Give the scores of `classification_scores` for the cells counted so far."""
        return classification_scores(self.counts_kk)


def classification_scores(counts_kk: ArrayLike) -> Scores:
    """Read the usual scores off a confusion matrix.

    Precision, recall and F1 of a class are 0 where their denominator is 0. The macro scores are plain means over the
    classes that occur among the true or the predicted labels (scikit-learn's default); macro F1 is the mean of
    per-class F1. Balanced accuracy is the mean recall over classes that have true cells.

    Args:
        counts_kk: Cells by true class (rows) and predicted class (columns), shape (k, k).

    Returns:
        `n`, `accuracy`, `macro_precision`, `macro_recall`, `macro_f1`, `balanced_accuracy`; all but `n` are NaN
        when no cell was counted.

    Example:
        >>> {name: round(value, 3) for name, value in classification_scores([[3, 1], [0, 4]]).items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'n': 8, 'accuracy': 0.875, 'macro_precision': 0.9, 'macro_recall': 0.875, 'macro_f1': 0.873,
         'balanced_accuracy': 0.875}
    """
    counts = np.asarray(counts_kk, dtype=np.float64)
    hits_k, true_k, predicted_k = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    num_cells = counts.sum()
    occurs_k = (true_k + predicted_k) > 0
    recall_k = _ratio(hits_k, true_k)
    return {
        "n": int(num_cells),
        "accuracy": float(hits_k.sum() / num_cells) if num_cells else float("nan"),
        "macro_precision": _mean(_ratio(hits_k, predicted_k)[occurs_k]),
        "macro_recall": _mean(recall_k[occurs_k]),
        "macro_f1": _mean(_ratio(2 * hits_k, true_k + predicted_k)[occurs_k]),
        "balanced_accuracy": _mean(recall_k[true_k > 0]),
    }


def per_class_scores(confusion: Confusion) -> pd.DataFrame:
    """Give precision, recall, F1 and the number of true cells of each class, one row per label.

    Undefined scores (no such true or predicted cell) are 0, as in `classification_scores`.
    """
    counts = confusion.counts_kk.astype(np.float64)
    hits_k, true_k, predicted_k = np.diag(counts), counts.sum(axis=1), counts.sum(axis=0)
    columns = {
        "precision": _ratio(hits_k, predicted_k),
        "recall": _ratio(hits_k, true_k),
        "f1": _ratio(2 * hits_k, true_k + predicted_k),
        "n": true_k.astype(np.int64),
    }
    return pd.DataFrame(columns, index=pd.Index(confusion.labels, name="label"))


def confusion_table(confusion: Confusion) -> pd.DataFrame:
    """Name the rows (true) and columns (predicted) of the counts, shape (k, k)."""
    return pd.DataFrame(
        confusion.counts_kk,
        index=pd.Index(confusion.labels, name="true"),
        columns=pd.Index(confusion.labels, name="predicted"),
    )


def majority_baseline(train_labels_n: ArrayLike, eval_labels_n: ArrayLike, *, num_classes: int) -> Scores:
    """Score the rule that calls every cell the commonest training class (the first of equals).

    Args:
        train_labels_n: Classes of the training cells; negative ones are left out.
        eval_labels_n: Classes of the evaluated cells; negative ones are left out.
        num_classes: k.
    """
    truth = np.asarray(eval_labels_n, dtype=np.int64)
    return _scores(truth, np.full(truth.shape, _majority(train_labels_n)), num_classes=num_classes)


def logistic_regression_baseline(
    train_ng: csr_matrix,
    train_labels_n: ArrayLike,
    eval_ng: csr_matrix,
    eval_labels_n: ArrayLike,
    *,
    num_classes: int,
    seed: int,
) -> tuple[Scores, IntArray]:
    """Score a multinomial logistic regression on expression, the baseline a transformer has to beat.

    Genes enter as they are or divided by their standard deviation, whichever predicts better in three folds of the
    training cells; nothing is centred, so the matrices stay sparse.

    Args:
        train_ng: Log1p counts per 10,000 of the training cells, CSR.
        train_labels_n: Their classes; cells with a negative one are left out.
        eval_ng: The same genes of the evaluated cells, CSR.
        eval_labels_n: Their classes; cells with a negative one are predicted but not scored.
        num_classes: k.
        seed: Fixes the result, together with the cells.

    Returns:
        The scores, and the predicted class of every evaluated cell, shape (n,). With fewer than two classes among the
        training cells this is the majority rule.
    """
    labels, truth = np.asarray(train_labels_n, dtype=np.int64), np.asarray(eval_labels_n, dtype=np.int64)
    is_known_n = labels >= 0
    if eval_ng.shape[0] == 0 or np.unique(labels[is_known_n]).size < 2:
        predicted_n = np.full(truth.shape, _majority(labels))
    else:
        predicted_n = _fit_and_predict(train_ng[is_known_n], labels[is_known_n], eval_ng, seed=seed)
    return _scores(truth, predicted_n, num_classes=num_classes), predicted_n


def _fit_and_predict(train_ng: csr_matrix, labels_n: IntArray, eval_ng: csr_matrix, *, seed: int) -> IntArray:
    classifier = LogisticRegression(C=INVERSE_PENALTY, max_iter=MOST_ITERATIONS, random_state=seed)
    model = Pipeline([("scale", "passthrough"), ("classify", classifier)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.set_params(scale=_better_scaling(model, train_ng, labels_n, seed=seed))
        model.fit(train_ng, labels_n)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        logger.warning("The logistic-regression baseline did not converge in %d iterations.", MOST_ITERATIONS)
    return np.asarray(model.predict(eval_ng), dtype=np.int64)


def _better_scaling(
    model: Pipeline, train_ng: csr_matrix, labels_n: IntArray, *, seed: int
) -> StandardScaler | Literal["passthrough"]:
    rows_n = np.random.default_rng(seed).permutation(labels_n.size)[:MOST_CELLS_FOR_CHOOSING]
    # A fold's training part must keep two classes, which two classes of three cells guarantee.
    if np.count_nonzero(np.bincount(labels_n[rows_n]) >= NUM_FOLDS) < 2:
        return "passthrough"
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    choices = {"scale": ["passthrough", StandardScaler(with_mean=False)]}
    search = GridSearchCV(model, choices, scoring="accuracy", cv=folds, refit=False)
    search.fit(train_ng[rows_n], labels_n[rows_n])
    scaling: StandardScaler | Literal["passthrough"] = search.best_params_["scale"]
    return scaling


def _scores(truth_n: IntArray, predicted_n: IntArray, *, num_classes: int) -> Scores:
    return Confusion.of([str(number) for number in range(num_classes)], truth_n, predicted_n).scores()


def _majority(labels_n: ArrayLike) -> int:
    labels = np.asarray(labels_n, dtype=np.int64)
    known = labels[labels >= 0]
    return int(np.bincount(known).argmax()) if known.size else 0


def _ratio(upper_k: NDArray[np.float64], lower_k: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(upper_k, lower_k, out=np.zeros_like(upper_k), where=lower_k > 0)


def _mean(values: Iterable[float]) -> float:
    array = np.asarray(list(values), dtype=np.float64)
    return float(array.mean()) if array.size else float("nan")
