"""Baselines that are given the same phenotypes as the run: frequencies of labels, alone and with logistic regression.

Owns counting labels among training cells; leaves reading, regression and scoring to `baselines`. Letters: n training
cells, m evaluated cells, s given phenotypes, k classes, c combinations of given labels.
"""

from dataclasses import dataclass

import numpy as np

from perturbgene.eval_utils import IntArray
from perturbgene.inference.classifiers import majority_class

#: What texts call these.
GIVEN_NAMES = {
    "majority": "the most frequent label among training cells with the same phenotypes",
    "logistic_regression": "logistic regression weighted by how frequent these phenotypes are with each label",
}


@dataclass(frozen=True)
class GivenLabels:
    """What training cells say about a phenotype if others are given.

    Args:
        combination_m: Number of each evaluated cell's combination of given labels.
        majority_c: Most frequent class of the training cells that have these labels, or of all if none has.
        log_frequency_ck: Logarithm of the share of each class's training cells that have these labels.
    """

    combination_m: IntArray
    majority_c: IntArray
    log_frequency_ck: np.ndarray

    @classmethod
    def fit(cls, labels_n: IntArray, given_ns: IntArray, given_ms: IntArray, *, num_classes: int) -> "GivenLabels":
        """Count training cells; a label of -1 is unknown, and then the phenotype is not given.

        The frequencies of several phenotypes are multiplied, as in naive Bayes, and each count is raised by 1.

        Args:
            labels_n, given_ns: Class and given labels of the training cells.
            given_ms: Given labels of the evaluated cells.
            num_classes: k.

        Example:
            >>> given_ns = np.array([[0], [0], [1], [1], [1]])
            >>> found = GivenLabels.fit(np.array([0, 0, 1, 1, 0]), given_ns, np.array([[1], [0], [-1]]), num_classes=2)
            >>> found.answers(np.arange(3)).tolist()
            [1, 0, 0]
            >>> np.exp(found.log_frequency_ck[found.combination_m]).round(2).tolist()
            [[0.4, 0.75], [0.6, 0.25], [1.0, 1.0]]
        """
        labels_cs, combination_m = np.unique(given_ms, axis=0, return_inverse=True)
        is_known_n, majority = labels_n >= 0, majority_class(labels_n)
        log_frequency_ck = np.zeros((len(labels_cs), num_classes))
        for number in range(given_ns.shape[1]):
            rows_n = np.flatnonzero(is_known_n & (given_ns[:, number] >= 0))
            num_labels = int(max(given_ns[:, number].max(initial=0), labels_cs[:, number].max(initial=0))) + 1
            counts_kv = np.ones((num_classes, num_labels))
            np.add.at(counts_kv, (labels_n[rows_n], given_ns[rows_n, number]), 1)
            shares_kv = np.log(counts_kv / counts_kv.sum(axis=1, keepdims=True))
            has_label_c = labels_cs[:, number] >= 0
            log_frequency_ck[has_label_c] += shares_kv[:, labels_cs[has_label_c, number]].T
        majority_c = np.full(len(labels_cs), majority)
        for number, labels_s in enumerate(labels_cs):
            is_same_n = is_known_n & ((given_ns == labels_s) | (labels_s < 0)).all(axis=1)
            if is_same_n.any():
                majority_c[number] = majority_class(labels_n[is_same_n])
        return cls(combination_m.ravel(), majority_c, log_frequency_ck)

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
        return (log_probability_mk + self.log_frequency_ck[combination_m]).argmax(axis=1)
