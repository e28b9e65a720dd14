"""Simple classifiers of cells that a run is compared with: expression and classes in, a function that answers out.

Owns fitting them within bounded time and memory; leaves reading cells and scoring answers to `baselines`.
Letters: n cells, m cells of a part, g genes, k classes.
"""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.linalg import cho_factor, cho_solve
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from perturbgene.errors import InputError
from perturbgene.eval_utils import IntArray, Scores

logger = logging.getLogger(__name__)

#: From log1p counts per 10,000 of some cells, CSR of shape (n, g), to their classes, shape (n,).
Classifier = Callable[[sparse.csr_matrix], IntArray]

NUM_FOLDS = 3
#: Scikit-learn's default. C from 0.1 to 10 moved accuracy by at most 0.003 on 700 PBMC.
INVERSE_PENALTY = 1.0
MOST_ITERATIONS = 2000
MOST_CELLS_FOR_CHOOSING = 5000

#: Of the weights of ridge; targets are -1 and 1, and the losses of cells are summed.
PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10_000.0)
#: Most rows of the matrix that ridge factorizes, which has a row for each gene or for each cell, whichever are fewer.
MOST_ROWS = 4000

NUM_COMPONENTS = 50
NUM_NEIGHBORS = 15
#: Most cells that principal components are fitted on; all training cells are then neighbors.
MOST_CELLS_FOR_COMPONENTS = 5000

#: Most values that are dense at a time: 80 MB of float32.
MOST_DENSE_VALUES = 20_000_000
#: The same for CellTypist, which makes all of its training cells dense.
MOST_CELLTYPIST_VALUES = 100_000_000


def majority_class(labels_n: ArrayLike) -> int:
    """Return the commonest known class, the first of equals; 0 without any. Negative labels are unknown."""
    ids_n = np.asarray(labels_n, dtype=np.int64)
    return int(np.bincount(ids_n[ids_n >= 0], minlength=1).argmax())


def sample(num_cells: int, *, most: int, seed: int) -> IntArray:
    """Return ascending numbers of at most `most` of the cells."""
    if num_cells <= most:
        return np.arange(num_cells)
    return np.sort(np.random.default_rng(seed).choice(num_cells, size=most, replace=False))


# -- logistic regression ------------------------------------------------------------------------------------------


class LogisticAnswers:
    """Answers of a fitted logistic regression: a `Classifier` that also says how probable each class is.

    Args:
        model: What was fitted.
        folds: Training cells that were left out in turn to choose the scale, by number, and log-probabilities of the
            classes that were then fitted, (m,), (m, j) and (j,).
    """

    def __init__(self, model: Pipeline, folds: Sequence[tuple[IntArray, np.ndarray, IntArray]] = ()) -> None:
        self.model, self.folds = model, folds

    def __call__(self, cells_ng: sparse.csr_matrix) -> IntArray:
        return np.asarray(self.model.predict(cells_ng), dtype=np.int64)

    def log_probability(self, cells_ng: sparse.csr_matrix, *, num_classes: int) -> np.ndarray:
        """Return the log-probability of each class, -inf for 0 and for those without a training cell, shape (n, k)."""
        with np.errstate(divide="ignore"):
            log_probability_nj = self.model.predict_log_proba(cells_ng)
        return _of_all_classes(log_probability_nj, self.model.classes_, num_classes=num_classes)

    def left_out(self, *, num_classes: int) -> Iterator[tuple[IntArray, np.ndarray]]:
        """Yield numbers of training cells and their log-probabilities by a regression that was fitted without them."""
        for rows_m, log_probability_mj, classes_j in self.folds:
            yield rows_m, _of_all_classes(log_probability_mj, classes_j, num_classes=num_classes)


def _of_all_classes(log_probability_nj: np.ndarray, classes_j: IntArray, *, num_classes: int) -> np.ndarray:
    log_probability_nk = np.full((len(log_probability_nj), num_classes), -np.inf)
    log_probability_nk[:, classes_j] = log_probability_nj
    return log_probability_nk


def logistic_regression(train_ng: sparse.csr_matrix, labels_n: IntArray, *, seed: int) -> LogisticAnswers:
    """Fit a multinomial logistic regression on expression, the baseline that a transformer has to beat.

    Genes enter as they are or divided by their standard deviation, whichever predicts better in three folds of the
    training cells (either one is the stronger baseline on some data); nothing is centered, so matrices stay sparse.

    Args:
        train_ng: Log1p counts per 10,000 of the training cells, CSR.
        labels_n: Their classes, at least two different ones.
        seed: Fixes the result, together with the cells.
    """
    classifier = LogisticRegression(C=INVERSE_PENALTY, max_iter=MOST_ITERATIONS, random_state=seed)
    model = Pipeline([("scale", "passthrough"), ("classify", classifier)])
    rows_n = np.random.default_rng(seed).permutation(labels_n.size)[:MOST_CELLS_FOR_CHOOSING]
    found: list[tuple[float, str | StandardScaler, list[tuple[IntArray, np.ndarray, IntArray]]]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # A fold's training part must keep two classes, which two classes of three cells guarantee.
        if np.count_nonzero(np.bincount(labels_n[rows_n]) >= NUM_FOLDS) >= 2:
            folds = list(StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed).split(rows_n, labels_n[rows_n]))
            for scale in ("passthrough", StandardScaler(with_mean=False)):
                accuracies, left_out = [], []
                for fitted_m, rest_m in folds:
                    part = clone(model).set_params(scale=scale)
                    part.fit(train_ng[rows_n[fitted_m]], labels_n[rows_n[fitted_m]])
                    log_probability_mj = part.predict_log_proba(train_ng[rows_n[rest_m]])
                    answers_m = part.classes_[log_probability_mj.argmax(axis=1)]
                    accuracies.append(float((answers_m == labels_n[rows_n[rest_m]]).mean()))
                    left_out.append((rows_n[rest_m], log_probability_mj, part.classes_))
                found.append((float(np.mean(accuracies)), scale, left_out))
            model.set_params(scale=max(found, key=lambda one: one[0])[1])  # of equals, the first
        model.fit(train_ng, labels_n)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        logger.warning("The logistic-regression baseline did not converge in %d iterations.", MOST_ITERATIONS)
    return LogisticAnswers(model, max(found, key=lambda one: one[0])[2] if found else ())


# -- ridge --------------------------------------------------------------------------------------------------------


def dense_products(matrix_ng: sparse.csr_matrix) -> np.ndarray:
    """Return the products of all pairs of columns, float32 of shape (g, g), of a matrix that is dense only in parts."""
    num_cells, num_genes = matrix_ng.shape
    products_gg = np.zeros((num_genes, num_genes), dtype=np.float32)
    step = max(1, MOST_DENSE_VALUES // max(1, num_genes))
    for start in range(0, num_cells, step):
        part_mg = matrix_ng[start : start + step].toarray()
        products_gg += part_mg.T @ part_mg
    return products_gg


def _solutions(products: np.ndarray, targets: np.ndarray, penalties: Sequence[float]) -> Iterator[np.ndarray]:
    """Yield the solution of (products + penalty * identity) @ solution = targets for each penalty."""
    for penalty in penalties:
        penalized = products.astype(np.float64)
        penalized[np.diag_indices_from(penalized)] += penalty
        yield cho_solve(cho_factor(penalized, lower=True, overwrite_a=True), targets)


class _RidgeByGenes:
    """Ridge from the products of genes: for fewer genes than cells."""

    def __init__(self, train_ng: sparse.csr_matrix, folds: Sequence[IntArray]) -> None:
        self.train_ng = train_ng
        self.products = [dense_products(train_ng[rows_m]) for rows_m in folds]
        self.folds = folds

    def fits(
        self, targets_nk: np.ndarray, penalties: Sequence[float], *, without: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield weights (g, k) and constants (k,) for each penalty, fitted on all folds but one."""
        kept = [fold for fold in range(len(self.folds)) if fold != without]
        rows_m = np.sort(np.concatenate([self.folds[fold] for fold in kept]))
        products_gg = np.sum([self.products[fold] for fold in kept], axis=0, dtype=np.float64)
        part_mg, targets_mk = self.train_ng[rows_m], targets_nk[rows_m]
        mean_g, mean_k = np.asarray(part_mg.mean(axis=0)).ravel(), targets_mk.mean(axis=0)
        products_gg -= len(rows_m) * np.outer(mean_g, mean_g)
        for weights_gk in _solutions(products_gg, part_mg.T @ (targets_mk - mean_k), penalties):
            yield weights_gk, mean_k - mean_g @ weights_gk


class _RidgeByCells:
    """Ridge from the products of cells: for fewer cells than genes."""

    def __init__(self, train_ng: sparse.csr_matrix, folds: Sequence[IntArray]) -> None:
        self.train_ng, self.folds = train_ng, folds
        self.products_nn = dense_products(train_ng.T.tocsr())

    def fits(
        self, targets_nk: np.ndarray, penalties: Sequence[float], *, without: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield weights (g, k) and constants (k,) for each penalty, fitted on all folds but one."""
        rows_m = np.sort(np.concatenate([rows for fold, rows in enumerate(self.folds) if fold != without]))
        products_mm, targets_mk = self.products_nn[np.ix_(rows_m, rows_m)].astype(np.float64), targets_nk[rows_m]
        mean_m, mean_k = products_mm.mean(axis=0), targets_mk.mean(axis=0)
        products_mm += mean_m.mean() - mean_m - mean_m[:, None]
        for shares_mk in _solutions(products_mm, targets_mk - mean_k, penalties):
            yield self.train_ng[rows_m].T @ shares_mk, mean_k - mean_m @ shares_mk


def ridge(
    train_ng: sparse.csr_matrix, labels_n: IntArray, *, groups_n: np.ndarray | None = None, seed: int
) -> tuple[Classifier, Scores]:
    """Fit ridge regression of -1 and 1 for each class; the class with the largest value is the answer.

    It is solved in closed form, and the penalty is the one of `PENALTIES` that predicts best in three folds: of the
    groups, if there are at least two, otherwise of the cells.

    Args:
        train_ng: Log1p counts per 10,000 of the training cells, CSR.
        labels_n: Their classes.
        groups_n: Names of their donors, or None.
        seed: Fixes the result, together with the cells.

    Returns:
        What answers, and its `penalty` and `n_train`, the cells that it was fitted on: if both cells and genes are more
        than `MOST_ROWS`, a sample of the cells.
    """
    if min(train_ng.shape) > MOST_ROWS:
        rows_n = sample(train_ng.shape[0], most=MOST_ROWS, seed=seed)
        logger.info("ridge is fitted to %s of %s cells", f"{len(rows_n):,}", f"{train_ng.shape[0]:,}")
        train_ng, labels_n = train_ng[rows_n], labels_n[rows_n]
        groups_n = None if groups_n is None else groups_n[rows_n]
    num_cells, num_groups = len(labels_n), 0 if groups_n is None else np.unique(groups_n).size
    classes_k, class_n = np.unique(labels_n, return_inverse=True)
    targets_nk = np.where(class_n[:, None] == np.arange(len(classes_k)), 1.0, -1.0)
    if num_groups >= 2:
        splits = GroupKFold(min(NUM_FOLDS, num_groups)).split(train_ng, groups=groups_n)
    else:
        splits = KFold(min(NUM_FOLDS, num_cells), shuffle=True, random_state=seed).split(train_ng)
    folds = [rows_m for _, rows_m in splits]
    solver = (_RidgeByGenes if train_ng.shape[1] < num_cells else _RidgeByCells)(train_ng, folds)
    scores = np.zeros((len(PENALTIES), 2))  # right answers; the negative sum of squares decides between equals
    for fold, rows_m in enumerate(folds):
        for at, (weights_gk, constant_k) in enumerate(solver.fits(targets_nk, PENALTIES, without=fold)):
            values_mk = train_ng[rows_m] @ weights_gk + constant_k
            is_right_m = values_mk.argmax(axis=1) == class_n[rows_m]
            scores[at] += is_right_m.sum(), -np.square(values_mk - targets_nk[rows_m]).sum()
    penalty = PENALTIES[max(range(len(PENALTIES)), key=lambda at: tuple(scores[at]))]
    [(weights_gk, constant_k)] = solver.fits(targets_nk, [penalty])
    facts: Scores = {"n_train": num_cells, "penalty": penalty}
    return lambda cells_ng: classes_k[(cells_ng @ weights_gk + constant_k).argmax(axis=1)], facts


# -- nearest neighbors --------------------------------------------------------------------------------------------


def principal_components(train_ng: sparse.csr_matrix, *, seed: int, most: int = NUM_COMPONENTS) -> PCA | None:
    """Return at most so many principal components of some of the cells; None if there are too few cells or genes."""
    num_components = min(most, min(train_ng.shape) - 1)
    if num_components < 1:
        return None
    part_ng = train_ng[sample(train_ng.shape[0], most=MOST_CELLS_FOR_COMPONENTS, seed=seed)]
    return PCA(num_components, svd_solver="arpack", random_state=seed).fit(part_ng)


def nearest_neighbors(points_nc: np.ndarray, labels_n: IntArray) -> Callable[[np.ndarray], IntArray]:
    """Return what answers with the commonest class among the nearest training cells, all of equal weight."""
    model = KNeighborsClassifier(min(NUM_NEIGHBORS, len(labels_n)), algorithm="brute").fit(points_nc, labels_n)
    return lambda cells_nc: np.asarray(model.predict(cells_nc), dtype=np.int64)


# -- CellTypist ---------------------------------------------------------------------------------------------------


def celltypist(train_ng: sparse.csr_matrix, labels_n: IntArray, *, seed: int) -> tuple[Classifier, Scores]:
    """Train CellTypist, which must be installed, with its own defaults.

    Returns:
        What answers, and `n_train`, the cells that it was trained on: few enough for a dense matrix of bounded size.

    Raises:
        InputError: It cannot be trained, for instance since it does not fit the installed scikit-learn.
    """
    num_genes = train_ng.shape[1]
    rows_n = sample(len(labels_n), most=max(2, MOST_CELLTYPIST_VALUES // num_genes), seed=seed)
    names_g = [f"gene {gene}" for gene in range(num_genes)]
    # Values are log1p counts per 10,000 of the whole cell, which its check does not see in a part of the genes.
    options = {"labels": labels_n[rows_n].astype(str), "genes": names_g, "check_expression": False}
    try:
        with warnings.catch_warnings():  # its import changes the filters of warnings
            package = importlib.import_module("celltypist")
        model = package.train(train_ng[rows_n], **options)
    except Exception as error:  # whatever another package raises, the scores of the others are not lost
        raise InputError(f"CellTypist cannot be trained here ({type(error).__name__}: {error})") from error

    def predict(cells_ng: sparse.csr_matrix) -> IntArray:
        found, step = [], max(1, MOST_DENSE_VALUES // num_genes)  # it makes the cells that it annotates dense
        for start in range(0, cells_ng.shape[0], step):
            cells = ad.AnnData(cells_ng[start : start + step], var=pd.DataFrame(index=names_g))
            found.append(package.annotate(cells, model=model).predicted_labels["predicted_labels"].astype(str))
        return np.concatenate(found).astype(np.int64)

    return predict, {"n_train": len(rows_n)}
