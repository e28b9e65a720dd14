"""Statistics of effects: means over donors, confidence intervals, and a test against the effects of ordinary genes.

Owns the numbers only; knows nothing of models, tokens or files. Cells of one donor are no replicates, so a donor is the
unit of every test. Letters: d donors, q perturbations, z genes of the null.
"""

import numpy as np
import pandas as pd
from scipy import stats

#: A gene is compared with this many genes that are expressed about as often.
NUM_MATCHED = 100
#: With fewer genes than this there is no null.
LEAST_MATCHED = 10
CONFIDENCE = 0.95


def mean_over_donors(means_dq: np.ndarray, counts_dq: np.ndarray, *, min_cells: int) -> pd.DataFrame:
    """Return the mean effect over donors with its confidence interval.

    A donor counts for a perturbation if at least `min_cells` of the donor's cells were changed by it.

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


# -- tests ------------------------------------------------------------------------------------------------------------


def against_null(table: pd.DataFrame, null: pd.DataFrame, *, scale_q: np.ndarray) -> pd.DataFrame:
    """Test whether each effect is an outlier among the effects of genes that are expressed about as often.

    Welch's t of the donors' mean effect against one more draw from the `NUM_MATCHED` genes nearest in frequency (but
    not itself): `t = (effect - mean_z) / sqrt(se^2 + s_z^2 (1 + 1 / z))`, where `se` is the standard error over
    donors and `s_z` the standard deviation of the z matched effects, with d - 1 and z - 1 degrees of freedom. The
    question is whether the gene differs from a random gene, not whether it differs from the mean of all genes.

    Args:
        table: From `mean_over_donors`, with the panel index of each row's `gene`, -1 for none.
        null: Ordinary genes: `effect` (missing ones are left out), `num_cells` and `gene`.
        scale_q: What the null's effects are multiplied by for each row, so that both were computed the same way:
            1 for rows computed like the null, NaN if that factor is not known.

    Returns:
        `null_mean`, `p_value` (two-sided; missing with fewer than two donors or `LEAST_MATCHED` genes) and `q_value`
        (Benjamini-Hochberg over the rows that have a p-value).
    """
    null = null[null["effect"].notna()]
    shuffled = np.random.default_rng(0).permutation(len(null))  # genes of one frequency are neighbors at random
    order_z = shuffled[np.argsort(null["num_cells"].to_numpy()[shuffled], kind="stable")]
    effect_z, num_cells_z, gene_z = (null[name].to_numpy()[order_z] for name in ("effect", "num_cells", "gene"))
    mean_q, variance_q, count_q = np.full((3, len(table)), np.nan)
    for row, (num_cells, gene) in enumerate(zip(table["num_cells"], table["gene"], strict=True)):
        own = np.flatnonzero(gene_z == gene)
        center, most = own[0] if len(own) else np.searchsorted(num_cells_z, num_cells), NUM_MATCHED + len(own)
        start = int(np.clip(center - most // 2, 0, max(0, len(gene_z) - most)))
        near = slice(start, start + most)
        matched_z = effect_z[near][gene_z[near] != gene] * scale_q[row]
        if table["num_donors"].iloc[row] >= 2 and len(matched_z) >= LEAST_MATCHED:
            mean_q[row], variance_q[row], count_q[row] = matched_z.mean(), matched_z.var(ddof=1), len(matched_z)
    errors_2q = np.stack([table["standard_error"].to_numpy(dtype=float) ** 2, variance_q * (1 + 1 / count_q)])
    freedoms_2q = np.stack([table["num_donors"].to_numpy(dtype=float), count_q]) - 1
    _, p_q, adjusted_q = welch_test(table["effect"].to_numpy(dtype=float) - mean_q, errors_2q, freedoms_2q)
    columns = {"null_mean": mean_q, "p_value": p_q, "q_value": adjusted_q}
    return pd.DataFrame(columns, index=table.index, dtype=float)


def welch_test(
    difference_q: np.ndarray, squared_errors_2q: np.ndarray, freedoms_2q: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return Welch's t for differences of two means, its two-sided p-value and the q-value, (q,) each.

    The q-value is the p-value after Benjamini and Hochberg (1995); a missing difference has none and does not count.

    Args:
        difference_q: Difference of the means.
        squared_errors_2q: Squared standard error of each of the two means.
        freedoms_2q: Degrees of freedom of each.

    Example:
        >>> t, p, _ = welch_test(np.array([2.0]), np.array([[0.5], [0.5]]), np.array([[4.0], [4.0]]))
        >>> t.item(), round(p.item(), 4)
        (2.0, 0.0805)
    """
    least = 1e-300  # so that two means without any error differ by chance (0) or surely (infinity), not by 0 / 0
    squared_q = squared_errors_2q.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom_q = squared_q**2 / ((squared_errors_2q**2 / freedoms_2q).sum(axis=0) + least)
    t_q = difference_q / np.sqrt(squared_q + least)
    p_q = 2 * stats.t.sf(np.abs(t_q), np.maximum(freedom_q, 1))
    is_known_q, adjusted_q = np.isfinite(p_q), np.full(len(p_q), np.nan)
    if is_known_q.any():
        adjusted_q[is_known_q] = stats.false_discovery_control(p_q[is_known_q])
    return t_q, p_q, adjusted_q


# -- how good the screen is -------------------------------------------------------------------------------------------


def agreement(exact_q: np.ndarray, screened_q: np.ndarray) -> dict[str, float]:
    """Compare exact and screened effects of the same genes, shape (q,); an effect's strength is its absolute value.

    Returns:
        `spearman` (rank correlation), `recall` (share of the strongest eighth (exact) found in the strongest quarter of
        the screen; 0.25 by chance), `scale` (median of exact effect / screened effect), all NaN for fewer than three
        genes, and `num_genes`.
    """
    is_known_q = np.isfinite(exact_q) & np.isfinite(screened_q)
    exact_q, screened_q = exact_q[is_known_q], screened_q[is_known_q]
    count = len(exact_q)
    if count < 3:
        return {"spearman": np.nan, "recall": np.nan, "scale": np.nan, "num_genes": count}
    top = np.argsort(-np.abs(exact_q), kind="stable")[: max(1, count // 8)]
    candidates = np.argsort(-np.abs(screened_q), kind="stable")[: max(1, count // 4)]
    ratios = exact_q[screened_q != 0] / screened_q[screened_q != 0]
    return {
        "spearman": float(stats.spearmanr(exact_q, screened_q).statistic),
        "recall": float(np.isin(top, candidates).mean()),
        "scale": float(np.median(ratios)) if len(ratios) else np.nan,
        "num_genes": count,
    }
