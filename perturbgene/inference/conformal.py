"""Sets of labels that hold the true label in a chosen share of the cells of new donors: fitting, forming, scoring.

Owns the floors, the probability that a label needs to be in a set; leaves probabilities to those who ask the model, and
storing floors to `calibration`. Letters: n cells, k labels, u donors, q levels.

A set holds all labels whose probability is not below a floor (Sadinle, Lei and Wasserman 2019, "Least ambiguous
set-valued classifiers with bounded error levels"). Cells of one donor resemble each other, so whole donors, not cells,
are exchangeable with new ones. Each donor therefore counts as one value, the highest floor that covers `level` of its
cells, and the floor is the conformal quantile of these values: the same level serves within and across donors, in two
steps like the double conformal method of Dunn, Wasserman and Ramdas (2022, "Distribution-free prediction sets for
two-layer hierarchical models"). If donors are exchangeable, `level` of new donors have `level` of their cells covered.
"""

import numpy as np
import pandas as pd

#: Levels with a stored floor: 0, 0.005, ..., 1.
LEVELS = np.linspace(0, 1, 201)


def fit_floors(probability_n: np.ndarray, donors_n: np.ndarray) -> tuple[float, ...]:
    """Return for each of `LEVELS` the probability that a label needs to be in a set.

    With u donors, levels above u / (u + 1) take the floor of the worst one, which covers this share of new donors.

    Args:
        probability_n: Probability of each cell's true label, shape (n,).
        donors_n: Donor of each cell, shape (n,). With one cell per donor this is split conformal prediction.

    Example:
        >>> floors_q = fit_floors(np.array([0.9, 0.8, 0.1, 0.7, 0.2]), np.array(["a", "a", "a", "b", "b"]))
        >>> [floor_at(floors_q, level) for level in (0.3, 0.5, 0.9)]
        [0.9, 0.7, 0.1]
    """
    _, unit_n, num_cells_u = np.unique(donors_n, return_inverse=True, return_counts=True)
    descending_n = probability_n[np.lexsort((-probability_n, unit_n))]  # donor by donor
    first_u = np.cumsum(num_cells_u) - num_cells_u
    rank_uq = np.ceil(num_cells_u[:, None] * LEVELS - 1e-9).astype(np.int64)  # from 1
    floor_uq = -np.sort(-descending_n[first_u[:, None] + np.maximum(rank_uq, 1) - 1], axis=0)
    rank_q = np.ceil((len(first_u) + 1) * LEVELS - 1e-9).astype(np.int64)
    return tuple(floor_uq[np.clip(rank_q, 1, len(first_u)) - 1, np.arange(len(LEVELS))].tolist())


def floor_at(floors_q: tuple[float, ...], level: float) -> float:
    """Return the floor of a level, which is rounded up to the next of `LEVELS`."""
    return floors_q[int(np.searchsorted(LEVELS, level - 1e-9))]


def label_sets(probability_nk: np.ndarray, floor: float) -> np.ndarray:
    """Return which labels are in each cell's set, bool (n, k): those not below the floor and the most probable one."""
    is_in_nk = probability_nk >= floor
    is_in_nk[np.arange(len(probability_nk)), probability_nk.argmax(axis=1)] = True
    return is_in_nk


def coverage_by_donor(
    probability_nk: np.ndarray, labels_n: np.ndarray, donors_n: np.ndarray, floor: float
) -> pd.DataFrame:
    """Return the number of cells of each donor, the share whose set holds the true label, and the mean set size."""
    is_in_nk = label_sets(probability_nk, floor)
    is_covered_n = is_in_nk[np.arange(len(labels_n)), labels_n]
    cells = pd.DataFrame({"donor": donors_n, "coverage": is_covered_n, "mean_set_size": is_in_nk.sum(axis=1)})
    grouped = cells.groupby("donor", sort=True)
    return grouped.mean().assign(n=grouped.size()).reset_index()[["donor", "n", "coverage", "mean_set_size"]]
