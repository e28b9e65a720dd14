"""The two baselines next to every score: the majority class, and a logistic regression on expression.

Owns reading labels and expression for them and fitting them; leaves the arithmetic of scores to `eval_utils`. Letters:
n cells, g genes, k classes.
"""

import logging
import warnings

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.data_utils.labels import ABSENT
from perturbgene.data_utils.order import split_rows
from perturbgene.data_utils.scale import log_matrix
from perturbgene.eval_utils import Confusion, IntArray, Scores

logger = logging.getLogger(__name__)

#: Most training cells that the logistic regression sees; more cost minutes and hardly change it.
MOST_BASELINE_CELLS = 20_000
#: Scikit-learn's default. C from 0.1 to 10 moved accuracy by at most 0.003 on 700 PBMC.
INVERSE_PENALTY = 1.0
MOST_ITERATIONS = 2000
NUM_FOLDS = 3
MOST_CELLS_FOR_CHOOSING = 5000


def _majority(labels_n: IntArray) -> int:
    """Return the commonest known class, the first of equals; 0 without any."""
    known = labels_n[labels_n >= 0]
    return int(np.bincount(known).argmax()) if known.size else 0


def _scores(truth_n: IntArray, predicted_n: IntArray, *, num_classes: int) -> Scores:
    confusion = Confusion([str(number) for number in range(num_classes)])
    confusion.add(truth_n, predicted_n)
    return confusion.scores()


def majority_baseline(train_labels_n: ArrayLike, eval_labels_n: ArrayLike, *, num_classes: int) -> Scores:
    """Score the rule that predicts the commonest training class for every cell (the first of equals).

    Args:
        train_labels_n: Classes of the training cells; negative ones are left out.
        eval_labels_n: Classes of the evaluated cells; negative ones are left out.
        num_classes: k.
    """
    truth_n = np.asarray(eval_labels_n, dtype=np.int64)
    commonest = _majority(np.asarray(train_labels_n, dtype=np.int64))
    return _scores(truth_n, np.full(truth_n.shape, commonest), num_classes=num_classes)


def logistic_regression_baseline(
    train_ng: sparse.csr_matrix,
    train_labels_n: ArrayLike,
    eval_ng: sparse.csr_matrix,
    eval_labels_n: ArrayLike,
    *,
    num_classes: int,
    seed: int,
) -> tuple[Scores, IntArray]:
    """Score a multinomial logistic regression on expression, the baseline that a transformer has to beat.

    Genes enter as they are or divided by their standard deviation, whichever predicts better in three folds of the
    training cells (either one is the stronger baseline on some data); nothing is centered, so matrices stay sparse.

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
    labels_n, truth_n = np.asarray(train_labels_n, dtype=np.int64), np.asarray(eval_labels_n, dtype=np.int64)
    is_known_n = labels_n >= 0
    if eval_ng.shape[0] == 0 or np.unique(labels_n[is_known_n]).size < 2:
        predicted_n = np.full(truth_n.shape, _majority(labels_n))
    else:
        model = _fitted(train_ng[is_known_n], labels_n[is_known_n], seed=seed)
        predicted_n = np.asarray(model.predict(eval_ng), dtype=np.int64)
    return _scores(truth_n, predicted_n, num_classes=num_classes), predicted_n


def _fitted(train_ng: sparse.csr_matrix, labels_n: IntArray, *, seed: int) -> Pipeline:
    """Fit the regression with the better of both scalings."""
    classifier = LogisticRegression(C=INVERSE_PENALTY, max_iter=MOST_ITERATIONS, random_state=seed)
    model = Pipeline([("scale", "passthrough"), ("classify", classifier)])
    rows_n = np.random.default_rng(seed).permutation(labels_n.size)[:MOST_CELLS_FOR_CHOOSING]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A fold's training part must keep two classes, which two classes of three cells guarantee.
        if np.count_nonzero(np.bincount(labels_n[rows_n]) >= NUM_FOLDS) >= 2:
            folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
            choices = {"scale": ["passthrough", StandardScaler(with_mean=False)]}
            search = GridSearchCV(model, choices, scoring="accuracy", cv=folds, refit=False)
            model.set_params(**search.fit(train_ng[rows_n], labels_n[rows_n]).best_params_)
        model.fit(train_ng, labels_n)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        logger.warning("The logistic-regression baseline did not converge in %d iterations.", MOST_ITERATIONS)
    return model


def _labels_and_matrix(
    dataset: IterableAnnDataset, category: str, *, most: int, seed: int
) -> tuple[IntArray, sparse.csr_matrix]:
    """Read labels (n,) and log expression (n, g) of at most `most` cells, drawn evenly."""
    num_cells = sum(dataset.sizes)
    rows_n = np.arange(num_cells)
    if num_cells > most:
        rows_n = np.sort(np.random.default_rng(seed).choice(num_cells, size=most, replace=False))
    starts_f = np.concatenate([[0], np.cumsum(dataset.sizes)])[:-1]
    matrices, labels = [], []
    for file, rows in split_rows(rows_n, starts_f=starts_f):
        matrices.append(log_matrix(dataset.shards[file].read(rows)))
        labels.append(dataset.shards[file].label_ids(category)[rows])
    start, _ = dataset.tokenizer.vocabulary.id_range(category)
    ids_n = np.concatenate(labels)
    return np.where(ids_n == ABSENT, ABSENT, ids_n - start), sparse.vstack(matrices, format="csr")


def baselines(
    train: IterableAnnDataset, evaluation: IterableAnnDataset, category: str, *, seed: int = 0
) -> dict[str, Scores]:
    """Score the majority class and a logistic regression on the same cells as the model.

    Args:
        train, evaluation: Data sets of the training and evaluation cells; labels and expression are read from them.
        category: The phenotype.
        seed: Of the subsample, when there are more than `MOST_BASELINE_CELLS` training cells.
    """
    labels_n, matrix_ng = _labels_and_matrix(train, category, most=MOST_BASELINE_CELLS, seed=seed)
    eval_labels_n, eval_matrix_ng = _labels_and_matrix(evaluation, category, most=sum(evaluation.sizes), seed=seed)
    num_classes = len(train.tokenizer.phenotypes[category])
    scores, _ = logistic_regression_baseline(
        matrix_ng, labels_n, eval_matrix_ng, eval_labels_n, num_classes=num_classes, seed=seed
    )
    return {
        "majority": majority_baseline(labels_n, eval_labels_n, num_classes=num_classes),
        "logistic_regression": {**scores, "n_train": int((labels_n >= 0).sum())},
    }
