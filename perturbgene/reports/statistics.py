"""Numbers of a report that no verb has counted: intervals over donors, thresholds, reliability, and confused labels.

Owns the arithmetic; leaves texts and pages to `labels` and `page`. Letters: n cells, d donors, b bins, k labels.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from perturbgene.inference.calibration import NUM_BINS

#: Bins of probabilities, and so steps of the threshold: 0, 0.01, ..., 0.99.
NUM_STEPS = 100
#: With fewer donors an interval over donors says nothing.
LEAST_DONORS = 3
NUM_RESAMPLES = 2_000


def donor_interval(is_right_n: np.ndarray, donor_n: np.ndarray, *, seed: int = 0) -> tuple[float, float] | None:
    """Return the 95 % interval of the accuracy, by drawing as many donors with replacement (percentile bootstrap).

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13; whole donors are drawn because
    cells of one donor resemble each other.

    Returns:
        Lower and upper end, or None with fewer than `LEAST_DONORS` donors.

    Example:
        >>> donor_interval(np.array([1, 1, 1, 1, 0, 0]) == 1, np.array(["a", "a", "b", "b", "c", "c"]))
        (0.0, 1.0)
        >>> donor_interval(np.array([True, False]), np.array(["a", "b"])) is None
        True
    """
    _, of_donor_n, size_d = np.unique(donor_n.astype(str), return_inverse=True, return_counts=True)
    if len(size_d) < LEAST_DONORS:
        return None
    right_d = np.bincount(of_donor_n, weights=is_right_n)
    drawn_rd = np.random.default_rng(seed).integers(len(size_d), size=(NUM_RESAMPLES, len(size_d)))
    low, high = np.quantile(right_d[drawn_rd].sum(axis=1) / size_d[drawn_rd].sum(axis=1), (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class Thresholds:
    """What stays if labels below a probability are left out, for the thresholds 0, 0.01, ..., 0.99.

    Args:
        count_b: Number of cells whose probability is in a bin of width 0.01.
        coverage_b: Share of all cells that stay.
        expected_b: Mean probability of those that stay: their accuracy, if probabilities are calibrated; NaN of none.
        measured_b: Share of those with a known label that is right; None if no label is known.
    """

    count_b: np.ndarray
    coverage_b: np.ndarray
    expected_b: np.ndarray
    measured_b: np.ndarray | None

    @classmethod
    def of(cls, probability_n: np.ndarray, is_right_n: np.ndarray | None = None) -> "Thresholds":
        """Count cells; a probability of NaN is no answer, and `is_right_n` is NaN where the label is not known.

        Example:
            >>> found = Thresholds.of(np.array([0.95, 0.9, 0.6, 0.5]), np.array([1.0, 1.0, 0.0, np.nan]))
            >>> [found.coverage_b[t].round(2).item() for t in (0, 55, 90)], found.measured_b[90].item()
            ([1.0, 0.75, 0.5], 1.0)
        """
        has_answer_n = np.isfinite(probability_n)
        step_n = steps_of(probability_n[has_answer_n])
        count_b = np.bincount(step_n, minlength=NUM_STEPS)
        sum_b = np.bincount(step_n, weights=probability_n[has_answer_n], minlength=NUM_STEPS)
        measured_b = None
        if is_right_n is not None:
            right_n = is_right_n[has_answer_n]
            known_b = np.bincount(step_n, weights=np.isfinite(right_n), minlength=NUM_STEPS)
            measured_b = _share(
                _from_above(np.bincount(step_n, np.nan_to_num(right_n), NUM_STEPS)), _from_above(known_b)
            )
        kept_b = _from_above(count_b)
        return cls(count_b, kept_b / max(len(probability_n), 1), _share(_from_above(sum_b), kept_b), measured_b)


def steps_of(probability_n: np.ndarray) -> np.ndarray:
    """Return the bin of width 0.01 of each probability, in 0..99; the last one includes 1."""
    return np.clip(np.floor(probability_n.astype(np.float64) * NUM_STEPS + 1e-5), 0, NUM_STEPS - 1).astype(np.int64)


def _from_above(values_b: np.ndarray) -> np.ndarray:
    return np.cumsum(values_b[::-1])[::-1]


def _share(part_b: np.ndarray, whole_b: np.ndarray) -> np.ndarray:
    return np.divide(part_b, whole_b, out=np.full(len(whole_b), np.nan), where=whole_b > 0)


def reliability(probability_n: np.ndarray, is_right_n: np.ndarray) -> tuple[pd.DataFrame, float]:
    """Return what a reliability diagram shows, and the expected calibration error (Guo et al. 2017, equation 3).

    Returns:
        A row for each of 15 bins of equal width that has cells: their number `n`, mean `probability` and `accuracy`;
        and the error, in 0..1.

    Example:
        >>> table, error = reliability(np.array([0.8] * 5 + [0.3] * 2), np.array([1, 1, 1, 1, 1, 0, 0]))
        >>> table.round(3).to_dict("list"), round(error, 4)
        ({'n': [2, 5], 'probability': [0.3, 0.8], 'accuracy': [0.0, 1.0]}, 0.2286)
    """
    bin_n = np.minimum((probability_n * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    cells = pd.DataFrame({"probability": probability_n, "accuracy": is_right_n.astype(np.float64)})
    grouped = cells.groupby(bin_n)
    table = grouped.mean().assign(n=grouped.size()).reset_index(drop=True)[["n", "probability", "accuracy"]]
    gap = (table["probability"] - table["accuracy"]).abs()
    return table, float((gap * table["n"]).sum() / max(len(probability_n), 1))


def by_similarity(counts_kk: np.ndarray) -> np.ndarray:
    """Return the order of labels in which those that are confused with each other are neighbors, shape (k,).

    Average linkage of 1 - the mean share of either label's cells that is called the other.

    Example:
        >>> by_similarity(np.array([[9, 0, 1, 0], [0, 9, 0, 1], [1, 0, 9, 0], [0, 1, 0, 9]])).tolist()
        [0, 2, 3, 1]
    """
    if len(counts_kk) < 3:
        return np.arange(len(counts_kk))
    share_kk = counts_kk / np.maximum(counts_kk.sum(axis=1, keepdims=True), 1)
    distance_kk = 1 - (share_kk + share_kk.T) / 2
    np.fill_diagonal(distance_kk, 0)
    return leaves_list(linkage(squareform(distance_kk, checks=False), method="average", optimal_ordering=True))


def confused_pairs(counts_kk: np.ndarray, *, most: int = 10) -> list[tuple[int, int, int, float]]:
    """Return the true label, the answer, the number of cells and their share of the true label, most cells first.

    Example:
        >>> confused_pairs(np.array([[8, 2, 0], [1, 9, 0], [0, 5, 5]]), most=2)
        [(2, 1, 5, 0.5), (0, 1, 2, 0.2)]
    """
    wrong_kk = counts_kk - np.diag(np.diag(counts_kk))
    rows, columns = np.nonzero(wrong_kk)
    order = np.argsort(-wrong_kk[rows, columns], kind="stable")[:most]
    total_k = counts_kk.sum(axis=1)
    pairs = [(int(rows[at]), int(columns[at])) for at in order]
    return [
        (true, said, int(counts_kk[true, said]), float(counts_kk[true, said] / total_k[true])) for true, said in pairs
    ]
