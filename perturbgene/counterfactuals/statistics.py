"""Sums of a contrast to a table of changes: strata weighed, groups pooled, and all of it held against a null.

Owns the statistics; leaves prediction to `contrast` and which cells are asked to `counterfactuals`. Letters: g genes,
k groups, r null draws, s strata (cells that express the gene, cells that do not).
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
from scipy import stats

from perturbgene.counterfactuals.contrast import EXPRESSED, UNEXPRESSED, Sums
from perturbgene.data_utils.genes import GenePanel
from perturbgene.inference.streaming import ALL
from perturbgene.perturbation.statistics import adjusted

#: A gene whose predictions cover less than this share of a group's cells gets no change.
LEAST_SHARE = 0.5


def weigh_strata(sums_xskg: np.ndarray, counts_skg: np.ndarray, share_skg: np.ndarray) -> np.ndarray:
    """Average changes over the cells of each group: means within strata, weighed by their share of the cells.

    Only some of the genes that a cell does not express are drawn, hence the weights.

    Args:
        sums_xskg: Sums of changes, shape (..., s, k, g).
        counts_skg: How many each is a sum of.
        share_skg: Share of the group's cells in each stratum.

    Returns:
        Shape (..., k, g); NaN where the strata with predictions hold less than `LEAST_SHARE` of the cells.

    Example:
        >>> share = np.array([0.25, 0.75]).reshape(2, 1, 1)
        >>> weigh_strata(np.array([4.0, 3.0]).reshape(2, 1, 1), np.array([2, 3]).reshape(2, 1, 1), share).item()
        1.25
    """
    weight_skg = np.where(counts_skg > 0, share_skg, 0.0)
    total_kg = weight_skg.sum(axis=0)
    mean_xskg = sums_xskg / np.maximum(counts_skg, 1)
    weighed_xkg = (mean_xskg * weight_skg).sum(axis=-3) / np.where(total_kg > 0, total_kg, 1.0)
    return np.where(total_kg >= LEAST_SHARE, weighed_xkg, np.nan)


def pool_groups(values_xkg: np.ndarray, cells_k: np.ndarray) -> np.ndarray:
    """Average groups by their changed cells, (..., k, g) -> (..., g); groups without a value drop out."""
    is_known = np.isfinite(values_xkg)
    weight = np.where(is_known, cells_k[:, None], 0.0)
    total = weight.sum(axis=-2)
    pooled = np.where(is_known, values_xkg, 0.0) * weight
    return np.where(total > 0, pooled.sum(axis=-2) / np.where(total > 0, total, 1.0), np.nan)


def _pool_errors(squared_kg: np.ndarray, cells_k: np.ndarray, is_known_kg: np.ndarray) -> np.ndarray:
    """Return the squared standard error of what `pool_groups` gives, (g,)."""
    weight_kg = np.where(is_known_kg, cells_k[:, None], 0.0)
    return (weight_kg**2 * squared_kg).sum(axis=0) / np.maximum(weight_kg.sum(axis=0), 1.0) ** 2


def squared_errors(sums: Sums, share_skg: np.ndarray) -> np.ndarray:
    """Return the squared standard error of each group's change, (k, g): cells differ, and each mask hides other genes.

    A stratum with a single prediction counts its square as its variance.
    """
    count_skg = np.maximum(sums.counts_skg, 1)
    mean_skg = np.where(sums.counts_skg > 1, sums.changes_2skg[0] / count_skg, 0.0)
    variance_skg = np.maximum(sums.squares_skg - count_skg * mean_skg**2, 0.0) / np.maximum(count_skg - 1, 1)
    weight_skg = np.where(sums.counts_skg > 0, share_skg, 0.0)
    total_kg = weight_skg.sum(axis=0)
    return (weight_skg**2 * variance_skg / count_skg).sum(axis=0) / np.where(total_kg > 0, total_kg, 1.0) ** 2


def against_null(change_g: np.ndarray, null_rg: np.ndarray, error_g: np.ndarray, count_g: np.ndarray) -> pd.DataFrame:
    """Compare changes with those that meaningless changes of the same size bring about.

    A change is one more draw under the null, known to its standard error:
    t = (change - mean) / sqrt(sd^2 (1 + 1 / r) + error^2), with Welch's degrees of freedom of r - 1 and n - 1. p is
    two-sided, q by Benjamini & Hochberg (1995) over the genes that have a p.

    Args:
        change_g, null_rg: The changes, and those of the null.
        error_g, count_g: Standard error of each change, and of how many predictions it is the mean.

    Returns:
        `null_mean`, `null_sd`, `t`, `p_value`, `q_value`, a row per gene; all NaN without a null.
    """
    num_null = len(null_rg)
    if num_null < 2:
        return pd.DataFrame(
            np.nan, index=range(len(change_g)), columns=["null_mean", "null_sd", "t", "p_value", "q_value"]
        )
    mean_g, sd_g = null_rg.mean(axis=0), null_rg.std(axis=0, ddof=1)
    spread_2g = np.stack([sd_g**2 * (1 + 1 / num_null), error_g**2])
    with np.errstate(divide="ignore", invalid="ignore"):
        t_g = np.where(sd_g > 0, (change_g - mean_g) / np.sqrt(spread_2g.sum(axis=0)), np.nan)
        freedom_2g = np.stack([np.full(len(count_g), num_null - 1.0), np.maximum(count_g - 1.0, 1.0)])
        freedom_g = spread_2g.sum(axis=0) ** 2 / (spread_2g**2 / freedom_2g).sum(axis=0)
    p_g = 2 * stats.t.sf(np.abs(t_g), np.maximum(freedom_g, 1))
    return pd.DataFrame({"null_mean": mean_g, "null_sd": sd_g, "t": t_g, "p_value": p_g, "q_value": adjusted(p_g)})


def _shares(sums: Sums) -> np.ndarray:
    """Share of the changed cells that express each gene, and of those that do not, (s, k, g)."""
    measured_kg, expressed_kg = sums.measured_2kg[0], sums.expressed_2kg[0]
    share_kg = np.where(measured_kg > 0, expressed_kg / np.maximum(measured_kg, 1), 0.0)
    return np.stack([share_kg, np.where(measured_kg > 0, 1 - share_kg, 0.0)])


def _observed(sums: Sums) -> np.ndarray:
    """Mean value of cells that have the label minus that of cells to be changed, (k, g).

    Within a group where it has cells of both kinds, else against all cells that have the label; NaN without any.
    """
    mean_2kg = np.where(sums.measured_2kg > 0, sums.values_2kg / np.maximum(sums.measured_2kg, 1), np.nan)
    value_g, measured_g = sums.values_2kg[1].sum(axis=0), sums.measured_2kg[1].sum(axis=0)
    all_g = np.where(measured_g > 0, value_g / np.maximum(measured_g, 1), np.nan)
    return np.where(np.isfinite(mean_2kg[1]), mean_2kg[1], all_g) - mean_2kg[0]


def change_table(sums: Sums, panel: GenePanel, *, groups: Sequence[str]) -> pd.DataFrame:
    """Lay out changes as one row per gene and group; with several groups also over all cells, as group "all"."""
    share_skg = _shares(sums)
    change_2kg = weigh_strata(sums.changes_2skg, sums.counts_skg, share_skg)
    null_rkg = weigh_strata(sums.null_r2skg[:, 0], sums.null_counts_skg, share_skg)
    observed_kg, count_skg = _observed(sums), sums.counts_skg
    squared_kg, count_kg = squared_errors(sums, share_skg), count_skg.sum(axis=0)
    stratum_skg = np.where(count_skg > 0, sums.changes_2skg[0] / np.maximum(count_skg, 1), np.nan)
    pool = partial(pool_groups, cells_k=sums.cells_k)
    rows: list[tuple[str, Callable[[np.ndarray], np.ndarray], np.ndarray, np.ndarray, float]] = []
    if len(groups) > 1:
        pooled_g = _pool_errors(squared_kg, sums.cells_k, np.isfinite(change_2kg[0]))
        rows.append((ALL, pool, pooled_g, count_kg.sum(axis=0), float(sums.cells_k.sum())))
    for number, group in enumerate(groups):
        take_group = partial(np.take, indices=number, axis=-2)
        rows.append((group, take_group, squared_kg[number], count_kg[number], float(sums.cells_k[number])))
    tables = []
    for group, take, squared_g, count_g, num_cells in rows:
        error_g = np.sqrt(squared_g)
        change_2g = take(change_2kg)
        table = pd.DataFrame({
            "group": group,
            "gene": list(panel.genes),
            "symbol": [panel.display_name(at) for at in range(len(panel))],
            "change": change_2g[0],
            "change_bins": change_2g[1],
            "standard_error": error_g,
        })  # fmt: skip
        held = against_null(change_2g[0], take(null_rkg), error_g, count_g)
        table = pd.concat([table, held], axis=1)
        table["observed"] = take(observed_kg)
        table["change_expressed"], table["change_unexpressed"] = (
            take(stratum_skg[EXPRESSED]),
            take(stratum_skg[UNEXPRESSED]),
        )
        table["share_expressed"], table["n_cells"] = take(share_skg[EXPRESSED]), int(num_cells)
        tables.append(table[table["change"].notna()].sort_values("change", ascending=False, kind="stable"))
    return pd.concat(tables, ignore_index=True)
