"""Baselines that are given the same phenotypes as the run: frequencies of labels, alone and with logistic regression.

Owns counting labels among training cells; leaves reading, regression and scoring to `baselines`. Letters: n training
cells, m evaluated cells, s given phenotypes, k classes, c combinations of given labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perturbgene.eval_utils import IntArray
from perturbgene.inference.classifiers import majority_class

#: What texts call these.
GIVEN_NAMES = {
    "majority": "the most frequent label among training cells with the same phenotypes",
    "logistic_regression": "logistic regression weighted by how frequent these phenotypes are with each label",
}


#: Powers of the frequencies, of which the one is chosen with which most training cells that were left out are right.
WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class GivenLabels:
    """What training cells say about a phenotype if others are given.

    Args:
        combination_m: Number of each evaluated cell's combination of given labels.
        majority_c: Most frequent class of the training cells that have these labels, or of all if none has.
        log_frequency_ck: See `log_frequencies`.
        weight: What it is multiplied by when it joins a regression.
    """

    combination_m: IntArray
    majority_c: IntArray
    log_frequency_ck: np.ndarray
    weight: float = 1.0

    @classmethod
    def fit(
        cls, labels_n: IntArray, given_ns: IntArray, given_ms: IntArray, *, num_classes: int,
        left_out: Sequence[tuple[IntArray, np.ndarray]] = (),
    ) -> "GivenLabels":  # fmt: skip
        """Count training cells; a label of -1 is unknown, and then the phenotype is not given.

        Args:
            labels_n, given_ns: Class and given labels of the training cells.
            given_ms: Given labels of the evaluated cells.
            num_classes: k.
            left_out: Numbers of training cells and log-probabilities of their classes by a regression that was fitted
                without them; they choose the weight.

        Example:
            >>> given_ns = np.array([[0], [0], [1], [1], [1]])
            >>> found = GivenLabels.fit(np.array([0, 0, 1, 1, 0]), given_ns, np.array([[1], [0], [-1]]), num_classes=2)
            >>> found.answers(np.arange(3)).tolist()
            [1, 0, 0]
        """
        labels_cs, combination_m = np.unique(given_ms, axis=0, return_inverse=True)
        is_known_n = labels_n >= 0
        majority_c = np.full(len(labels_cs), majority_class(labels_n))
        for number, labels_s in enumerate(labels_cs):
            is_same_n = is_known_n & ((given_ns == labels_s) | (labels_s < 0)).all(axis=1)
            if is_same_n.any():
                majority_c[number] = majority_class(labels_n[is_same_n])
        num_right_w, weight = np.zeros(len(WEIGHTS)), 1.0
        for rows_m, log_probability_mk in left_out:
            is_other_n = np.ones(len(labels_n), dtype=bool)
            is_other_n[rows_m] = False
            frequency_mk = log_frequencies(
                labels_n[is_other_n], given_ns[is_other_n], given_ns[rows_m], num_classes=num_classes
            )
            for at, weight in enumerate(WEIGHTS):
                answers_m = (log_probability_mk + weight * frequency_mk).argmax(axis=1)
                num_right_w[at] += (answers_m == labels_n[rows_m]).sum()
        if left_out:
            weight = WEIGHTS[num_right_w.argmax()]
        log_frequency_ck = log_frequencies(labels_n, given_ns, labels_cs, num_classes=num_classes)
        return cls(combination_m.ravel(), majority_c, log_frequency_ck, weight)

    def answers(self, cells_m: IntArray, log_probability_mk: np.ndarray | None = None) -> IntArray:
        """Return the class that each of some evaluated cells is given.

        Args:
            cells_m: Their numbers.
            log_probability_mk: Log-probabilities from a classifier that is not given the labels, to be multiplied by
                their frequencies; None answers with the most frequent label.
        """
        combination_m = self.combination_m[cells_m]
        if log_probability_mk is None:
            return self.majority_c[combination_m]
        return (log_probability_mk + self.weight * self.log_frequency_ck[combination_m]).argmax(axis=1)


def log_frequencies(labels_n: IntArray, given_ns: IntArray, given_ms: IntArray, *, num_classes: int) -> np.ndarray:
    """Return the logarithm of the share of each class's training cells that have the labels given to other cells.

    The shares of several phenotypes are multiplied, as in naive Bayes, and each count is raised by 1.

    Returns:
        Float64 of shape (m, k); 0 where nothing is given.

    Example:
        >>> given_ns = np.array([[0], [0], [1], [1], [1]])
        >>> found_mk = log_frequencies(np.array([0, 0, 1, 1, 0]), given_ns, np.array([[1], [0], [-1]]), num_classes=2)
        >>> np.exp(found_mk).round(2).tolist()
        [[0.4, 0.75], [0.6, 0.25], [1.0, 1.0]]
    """
    found_mk = np.zeros((len(given_ms), num_classes))
    for number in range(given_ns.shape[1]):
        rows_n = np.flatnonzero((labels_n >= 0) & (given_ns[:, number] >= 0))
        num_labels = int(max(given_ns[:, number].max(initial=0), given_ms[:, number].max(initial=0))) + 1
        counts_kv = np.ones((num_classes, num_labels))
        np.add.at(counts_kv, (labels_n[rows_n], given_ns[rows_n, number]), 1)
        shares_kv = np.log(counts_kv / counts_kv.sum(axis=1, keepdims=True))
        is_given_m = given_ms[:, number] >= 0
        found_mk[is_given_m] += shares_kv[:, given_ms[is_given_m, number]].T
    return found_mk
