"""Effects of perturbations from cells to donors to a table: means, confidence intervals, a null of random genes.

Owns adding up effects and their statistics; knows nothing of models, tokens or files. Cells of a donor are no
replicates, so a donor is the unit of every test. Letters: d donors, q perturbations, m effects, z genes of the null, k
keys of sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import stats

#: Genes nearest in expression frequency that a gene is held against.
NUM_MATCHED = 100
#: Fewer genes than this are no null.
LEAST_MATCHED = 10
#: Of the donors' mean effect.
CONFIDENCE = 0.95


@dataclass
class Tally:
    """Number of cells, sum of effects and sum of their squares, for every donor, group and perturbation.

    Args:
        num_perturbations: q.
        sums: (donor, group) -> float64 of shape (q, 3).
    """

    num_perturbations: int
    sums: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def add(
        self, effects_m: np.ndarray, *, donor_m: np.ndarray, group_m: np.ndarray, perturbation_m: np.ndarray
    ) -> None:
        """Count effects, each of shape (m,) beside its donor, group and perturbation; missing ones are left out."""
        is_known_m = np.isfinite(effects_m)
        for donor, group in np.unique(np.stack([donor_m, group_m])[:, is_known_m], axis=1).T.tolist():
            is_here_m = is_known_m & (donor_m == donor) & (group_m == group)
            sums_q3 = self._sums(donor, group)
            effects, rows = effects_m[is_here_m].astype(np.float64), perturbation_m[is_here_m]
            for column, values in enumerate((np.ones_like(effects), effects, effects**2)):
                sums_q3[:, column] += np.bincount(rows, weights=values, minlength=self.num_perturbations)

    def _sums(self, donor: int, group: int) -> np.ndarray:
        return self.sums.setdefault((donor, group), np.zeros((self.num_perturbations, 3)))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what is not zero as arrays for a file: `keys` (k, 3) of donor, group, perturbation; `sums` (k, 3)."""
        keys, sums = [np.zeros((0, 3), dtype=np.int64)], [np.zeros((0, 3))]
        for (donor, group), sums_q3 in sorted(self.sums.items()):
            rows = np.flatnonzero(sums_q3[:, 0])
            keys.append(np.stack([np.full_like(rows, donor), np.full_like(rows, group), rows], axis=1))
            sums.append(sums_q3[rows])
        return {"keys": np.concatenate(keys), "sums": np.concatenate(sums)}

    def add_arrays(self, keys_k3: np.ndarray, sums_k3: np.ndarray) -> None:
        """Add what `arrays` of another tally returned."""
        for donor, group in np.unique(keys_k3[:, :2], axis=0).tolist():
            is_here_k = (keys_k3[:, 0] == donor) & (keys_k3[:, 1] == group)
            self._sums(donor, group)[keys_k3[is_here_k, 2]] += sums_k3[is_here_k]

    def groups(self) -> list[int]:
        """Groups that hold an effect."""
        return sorted({group for _, group in self.sums})

    def of_group(self, group: int, *, num_donors: int) -> tuple[np.ndarray, np.ndarray]:
        """Return mean effect and number of cells of each donor, both (d, q); means are missing where no cell is."""
        counts_dq, sums_dq = np.zeros((2, num_donors, self.num_perturbations))
        for (donor, other), sums_q3 in self.sums.items():
            if other == group:
                counts_dq[donor], sums_dq[donor] = sums_q3[:, 0], sums_q3[:, 1]
        with np.errstate(invalid="ignore"):
            return np.where(counts_dq > 0, sums_dq / np.maximum(counts_dq, 1), np.nan), counts_dq


@dataclass(frozen=True)
class Null:
    """Effects of genes that others are held against.

    Args:
        effect_z: Mean effect over donors, shape (z,), all known.
        num_cells_z: Cells that each gene's removal changed, shape (z,): its expression frequency.
        gene_z: Which gene it is, so that none is held against itself.
    """

    effect_z: np.ndarray
    num_cells_z: np.ndarray
    gene_z: np.ndarray

    @cached_property
    def _order_z(self) -> np.ndarray:
        """Genes by frequency; those of one frequency in random order, so that each meets other neighbours."""
        shuffled = np.random.default_rng(0).permutation(len(self.gene_z))
        return shuffled[np.argsort(self.num_cells_z[shuffled], kind="stable")]

    @cached_property
    def _place_of_gene(self) -> dict[int, int]:
        return {int(gene): place for place, gene in enumerate(self.gene_z[self._order_z])}

    def matched(self, num_cells: float, *, gene: int) -> np.ndarray:
        """Return the effects of the `NUM_MATCHED` genes nearest in order of frequency, without the gene itself."""
        place = self._place_of_gene.get(gene)
        center = np.searchsorted(self.num_cells_z[self._order_z], num_cells) if place is None else place
        most = NUM_MATCHED + (place is not None)
        start = int(np.clip(center - most // 2, 0, max(0, len(self.gene_z) - most)))
        window = self._order_z[start : start + most]
        return np.asarray(self.effect_z[window[self.gene_z[window] != gene]])


def mean_over_donors(means_dq: np.ndarray, counts_dq: np.ndarray, *, min_cells: int) -> pd.DataFrame:
    """Return the mean effect over donors with its confidence interval.

    A donor counts for a perturbation when it changed at least `min_cells` of the donor's cells.

    Returns:
        A row per perturbation: `effect`, `ci_low`, `ci_high` (Student's t over donors, missing with one donor),
        `num_cells`, `num_donors`, and `standard_error` over donors.
    """
    means_dq = np.where(counts_dq >= min_cells, means_dq, np.nan)
    donors_q = np.isfinite(means_dq).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        effect_q = np.nansum(means_dq, axis=0) / np.where(donors_q, donors_q, np.nan)
        variance_q = np.nansum((means_dq - effect_q) ** 2, axis=0) / np.where(donors_q > 1, donors_q - 1, np.nan)
        error_q = np.sqrt(variance_q / np.where(donors_q > 1, donors_q, np.nan))
        width_q = error_q * stats.t.ppf((1 + CONFIDENCE) / 2, np.maximum(donors_q - 1, 1))
    return pd.DataFrame(
        {
            "effect": effect_q,
            "ci_low": effect_q - width_q,
            "ci_high": effect_q + width_q,
            "num_cells": counts_dq.sum(axis=0).astype(np.int64),
            "num_donors": donors_q,
            "standard_error": error_q,
        }
    )


def held_against_null(table: pd.DataFrame, null: Null, *, gene_q: Sequence[int]) -> pd.DataFrame:
    """Ask of every effect whether it is an outlier among random genes of the same expression frequency.

    Welch's t of the donors' mean against one more draw from the matched genes:
    `t = (effect - mean_z) / sqrt(se^2 + s_z^2 (1 + 1 / z))`, where `se` is the standard error over donors and `s_z` the
    standard deviation over the z matched genes' effects. The question is whether the gene is unlike a random one, not
    whether it is unlike their mean. The degrees of freedom are Welch's, with d - 1 and z - 1.

    Args:
        table: From `mean_over_donors`.
        null: Genes to be held against.
        gene_q: Which gene of the null each row is, -1 for none (then it is held against all matched ones).

    Returns:
        `null_mean`, `p_value` (two-sided; missing with fewer than two donors or fewer than ten genes), `q_value`
        (Benjamini-Hochberg over the rows that have a p).
    """
    rows = []
    for effect, error, donors, num_cells, gene in zip(
        table["effect"], table["standard_error"], table["num_donors"], table["num_cells"], gene_q, strict=True
    ):
        matched_z = null.matched(num_cells, gene=gene)
        if donors < 2 or len(matched_z) < LEAST_MATCHED:
            rows.append((np.nan, np.nan))
            continue
        spread = (error**2, matched_z.var(ddof=1) * (1 + 1 / len(matched_z)))
        freedom = sum(spread) ** 2 / (spread[0] ** 2 / (donors - 1) + spread[1] ** 2 / (len(matched_z) - 1) + 1e-300)
        t = (effect - matched_z.mean()) / np.sqrt(sum(spread) + 1e-300)
        rows.append((matched_z.mean(), 2 * stats.t.sf(abs(t), max(freedom, 1))))
    result = pd.DataFrame(rows, columns=["null_mean", "p_value"], index=table.index, dtype=float)
    return result.assign(q_value=adjusted(result["p_value"].to_numpy()))


def adjusted(p_q: np.ndarray) -> np.ndarray:
    """Adjust p-values after Benjamini and Hochberg (1995); missing ones stay missing.

    Example:
        >>> adjusted(np.array([0.01, np.nan, 0.04])).tolist()
        [0.02, nan, 0.04]
    """
    is_known_q = np.isfinite(p_q)
    result_q = np.full(len(p_q), np.nan)
    if is_known_q.any():
        result_q[is_known_q] = stats.false_discovery_control(p_q[is_known_q])
    return result_q


@dataclass(frozen=True)
class Agreement:
    """How well an estimate orders what was also computed exactly.

    Args:
        spearman: Rank correlation over the genes compared.
        recall: Share of the exact top eighth that lies in the estimated top quarter; 0.25 by chance.
        num_genes: Genes compared.
    """

    spearman: float
    recall: float
    num_genes: int


def agreement(exact_q: np.ndarray, estimated_q: np.ndarray) -> Agreement:
    """Compare exact and estimated effects of the same genes, shape (q,); strength is the absolute value."""
    is_known_q = np.isfinite(exact_q) & np.isfinite(estimated_q)
    exact_q, estimated_q = exact_q[is_known_q], estimated_q[is_known_q]
    count = len(exact_q)
    if count < 3:
        return Agreement(np.nan, np.nan, count)
    top = np.argsort(-np.abs(exact_q), kind="stable")[: max(1, count // 8)]
    candidates = np.argsort(-np.abs(estimated_q), kind="stable")[: max(1, count // 4)]
    return Agreement(
        float(stats.spearmanr(exact_q, estimated_q).statistic), float(np.isin(top, candidates).mean()), count
    )
