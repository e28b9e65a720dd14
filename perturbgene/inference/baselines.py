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


def majority_class(labels_n: ArrayLike) -> int:
    """Return the commonest known class, the first of equals; 0 without any. Negative labels are unknown."""
    ids_n = np.asarray(labels_n, dtype=np.int64)
    return int(np.bincount(ids_n[ids_n >= 0], minlength=1).argmax())


def logistic_regression(
    train_ng: sparse.csr_matrix, labels_n: ArrayLike, eval_ng: sparse.csr_matrix, *, seed: int
) -> IntArray:
    """Predict classes by a multinomial logistic regression on expression, the baseline that a transformer has to beat.

    Genes enter as they are or divided by their standard deviation, whichever predicts better in three folds of the
    training cells (either one is the stronger baseline on some data); nothing is centered, so matrices stay sparse.

    Args:
        train_ng: Log1p counts per 10,000 of the training cells, CSR.
        labels_n: Their classes; cells with a negative one are left out.
        eval_ng: The same genes of the evaluated cells, CSR.
        seed: Fixes the result, together with the cells.

    Returns:
        The class of each evaluated cell, shape (n,): the majority class if fewer than two are known in training.
    """
    known_n = np.asarray(labels_n, dtype=np.int64)
    train_ng, known_n = train_ng[known_n >= 0], known_n[known_n >= 0]
    if eval_ng.shape[0] == 0 or np.unique(known_n).size < 2:
        return np.full(eval_ng.shape[0], majority_class(known_n))
    classifier = LogisticRegression(C=INVERSE_PENALTY, max_iter=MOST_ITERATIONS, random_state=seed)
    model = Pipeline([("scale", "passthrough"), ("classify", classifier)])
    rows_n = np.random.default_rng(seed).permutation(known_n.size)[:MOST_CELLS_FOR_CHOOSING]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A fold's training part must keep two classes, which two classes of three cells guarantee.
        if np.count_nonzero(np.bincount(known_n[rows_n]) >= NUM_FOLDS) >= 2:
            folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
            choices = {"scale": ["passthrough", StandardScaler(with_mean=False)]}
            search = GridSearchCV(model, choices, scoring="accuracy", cv=folds, refit=False)
            model.set_params(**search.fit(train_ng[rows_n], known_n[rows_n]).best_params_)
        model.fit(train_ng, known_n)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        logger.warning("The logistic-regression baseline did not converge in %d iterations.", MOST_ITERATIONS)
    return np.asarray(model.predict(eval_ng), dtype=np.int64)


def baselines(
    train: IterableAnnDataset, evaluation: IterableAnnDataset, category: str, *, seed: int = 0
) -> dict[str, Scores]:
    """Score the majority class and a logistic regression on the same cells as the model.

    Args:
        train, evaluation: Data sets of the training and evaluation cells; labels and expression are read from them.
        category: The phenotype.
        seed: Of the subsample, when there are more than `MOST_BASELINE_CELLS` training cells.
    """
    matrices, labels = [], []
    for dataset, most in ((train, MOST_BASELINE_CELLS), (evaluation, sum(evaluation.sizes))):
        rows_n = np.arange(sum(dataset.sizes))
        if len(rows_n) > most:
            rows_n = np.sort(np.random.default_rng(seed).choice(len(rows_n), size=most, replace=False))
        starts_f = np.concatenate([[0], np.cumsum(dataset.sizes)])[:-1]
        start, parts, ids = dataset.tokenizer.vocabulary.id_range(category)[0], [], []
        for file, rows in split_rows(rows_n, starts_f=starts_f):
            parts.append(log_matrix(dataset.shards[file].read(rows)))
            ids.append(dataset.shards[file].label_ids(category)[rows])
        matrices.append(sparse.vstack(parts, format="csr"))
        labels.append(np.where(np.concatenate(ids) == ABSENT, ABSENT, np.concatenate(ids) - start))
    (train_ng, eval_ng), (labels_n, truth_n) = matrices, labels
    scores = {}
    for name, predicted_n in {
        "majority": np.full(truth_n.shape, majority_class(labels_n)),
        "logistic_regression": logistic_regression(train_ng, labels_n, eval_ng, seed=seed),
    }.items():
        confusion = Confusion(train.tokenizer.phenotypes[category])
        confusion.add(truth_n, predicted_n)
        scores[name] = confusion.scores()
    scores["logistic_regression"]["n_train"] = int((labels_n >= 0).sum())
    return scores
