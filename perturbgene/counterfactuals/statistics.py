"""From sums of a contrast to a table of changes: strata are weighted, groups pooled, and changes tested against a null.

Owns the statistics; leaves prediction to `contrast` and the choice of cells to `counterfactual`. Letters: g genes, k
groups, r null draws, s strata (cells that express the gene, cells that do not).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from perturbgene.counterfactuals.contrast import EXPRESSED, UNEXPRESSED, Sums
from perturbgene.data_utils.genes import GenePanel
from perturbgene.inference.streaming import ALL
from perturbgene.perturbation.statistics import welch_test

#: A gene gets no change if the strata with predictions have less than this share of a group's cells.
LEAST_SHARE = 0.5


def weigh_strata(sums_xskg: np.ndarray, counts_skg: np.ndarray, share_skg: np.ndarray) -> np.ndarray:
    """Average changes over the cells of each group: means within strata, weighted by their share of the cells.

    The weights are needed because only some of the genes that a cell does not express are drawn.

    Args:
        sums_xskg: Sums of changes, shape (..., s, k, g).
        counts_skg: Number of changes in each sum.
        share_skg: Share of the group's cells in each stratum.

    Returns:
        Shape (..., k, g); NaN where the strata with predictions have less than `LEAST_SHARE` of the cells.

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
    """Average groups, weighted by their changed cells, (..., k, g) -> (..., g); groups without a value do not count."""
    is_known = np.isfinite(values_xkg)
    weight = np.where(is_known, cells_k[:, None], 0.0)
    total = weight.sum(axis=-2)
    pooled = np.where(is_known, values_xkg, 0.0) * weight
    return np.where(total > 0, pooled.sum(axis=-2) / np.where(total > 0, total, 1.0), np.nan)


def squared_errors(sums: Sums, share_skg: np.ndarray) -> np.ndarray:
    """Return the squared standard error of each group's change, (k, g), over cells and masks.

    In a stratum with a single prediction, the square of that prediction is taken for the variance.
    """
    count_skg = np.maximum(sums.counts_skg, 1)
    mean_skg = np.where(sums.counts_skg > 1, sums.changes_2skg[0] / count_skg, 0.0)
    variance_skg = np.maximum(sums.squares_skg - count_skg * mean_skg**2, 0.0) / np.maximum(count_skg - 1, 1)
    weight_skg = np.where(sums.counts_skg > 0, share_skg, 0.0)
    total_kg = weight_skg.sum(axis=0)
    return (weight_skg**2 * variance_skg / count_skg).sum(axis=0) / np.where(total_kg > 0, total_kg, 1.0) ** 2


def against_null(change_g: np.ndarray, null_rg: np.ndarray, error_g: np.ndarray, count_g: np.ndarray) -> pd.DataFrame:
    """Test changes against those that meaningless changes of the label, of the same size, cause.

    Welch's t of a change, which has a standard error over cells and masks, against one more draw from the null:
    t = (change - mean) / sqrt(sd^2 (1 + 1 / r) + error^2), with r - 1 and n - 1 degrees of freedom.

    Args:
        change_g, null_rg: The changes, and those of the null.
        error_g, count_g: Standard error of each change, and the number of predictions n behind it.

    Returns:
        `null_mean`, `null_sd`, `t`, `p_value` (two-sided), `q_value` (Benjamini-Hochberg over the genes that have a
        p-value), a row per gene; all NaN without a null.
    """
    num_null, names = len(null_rg), ["null_mean", "null_sd", "t", "p_value", "q_value"]
    if num_null < 2:
        return pd.DataFrame(np.nan, index=range(len(change_g)), columns=names)
    mean_g, sd_g = null_rg.mean(axis=0), null_rg.std(axis=0, ddof=1)
    freedoms_2g = np.stack([np.full(len(count_g), num_null - 1.0), np.maximum(count_g - 1.0, 1.0)])
    errors_2g = np.stack([sd_g**2 * (1 + 1 / num_null), error_g**2])
    tested = welch_test(np.where(sd_g > 0, change_g - mean_g, np.nan), errors_2g, freedoms_2g)
    return pd.DataFrame(dict(zip(names, (mean_g, sd_g, *tested), strict=True)))


def observed_agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Return how the changes of each group agree with what cells that have the label show.

    Returns:
        `group`, `spearman` (rank correlation of `change` and `observed`; NaN for fewer than three genes), `num_genes`.

    Example:
        >>> changes = {"group": "all", "change": [2.0, 1.0, -1.0, 0.5], "observed": [3.0, 0.1, -4.0, np.nan]}
        >>> observed_agreement(pd.DataFrame(changes)).to_dict("records")
        [{'group': 'all', 'spearman': 1.0, 'num_genes': 3}]
    """
    rows = []
    for group, part in table.groupby("group", sort=False):
        known = part[["change", "observed"]].dropna()
        is_ranked = len(known) > 2 and known.nunique().min() > 1
        rank = float(stats.spearmanr(known["change"], known["observed"]).statistic) if is_ranked else np.nan
        rows.append({"group": group, "spearman": rank, "num_genes": len(known)})
    return pd.DataFrame(rows, columns=["group", "spearman", "num_genes"])


def change_table(sums: Sums, panel: GenePanel, *, groups: Sequence[str]) -> pd.DataFrame:
    """Return one row per gene and group; with several groups also over all cells, as group "all"."""
    measured_kg, cells_k = sums.measured_2kg[0], sums.cells_k
    share_kg = np.where(measured_kg > 0, sums.expressed_2kg[0] / np.maximum(measured_kg, 1), 0.0)
    share_skg = np.stack([share_kg, np.where(measured_kg > 0, 1 - share_kg, 0.0)])
    change_2kg = weigh_strata(sums.changes_2skg, sums.counts_skg, share_skg)
    stratum_skg = np.where(sums.counts_skg > 0, sums.changes_2skg[0] / np.maximum(sums.counts_skg, 1), np.nan)
    # Observed: against cells that have the label, those of the group if it has any, else all.
    mean_2kg = np.where(sums.measured_2kg > 0, sums.values_2kg / np.maximum(sums.measured_2kg, 1), np.nan)
    value_g, num_measured_g = sums.values_2kg[1].sum(axis=0), sums.measured_2kg[1].sum(axis=0)
    all_g = np.where(num_measured_g > 0, value_g / np.maximum(num_measured_g, 1), np.nan)
    of_groups = {
        "change": change_2kg[0],
        "change_bins": change_2kg[1],
        "null": weigh_strata(sums.null_r2skg[:, 0], sums.null_counts_skg, share_skg),
        "observed": np.where(np.isfinite(mean_2kg[1]), mean_2kg[1], all_g) - mean_2kg[0],
        "change_expressed": stratum_skg[EXPRESSED],
        "change_unexpressed": stratum_skg[UNEXPRESSED],
        "share_expressed": share_skg[EXPRESSED],
    }
    squared_kg, count_kg = squared_errors(sums, share_skg), sums.counts_skg.sum(axis=0)
    tables = []
    if len(groups) > 1:
        weight_kg = np.where(np.isfinite(change_2kg[0]), cells_k[:, None], 0.0)
        squared_g = (weight_kg**2 * squared_kg).sum(axis=0) / np.maximum(weight_kg.sum(axis=0), 1.0) ** 2
        pooled = {name: pool_groups(values_xkg, cells_k) for name, values_xkg in of_groups.items()}
        tables.append(_group_table(ALL, panel, pooled, squared_g, count_kg.sum(axis=0), cells_k.sum()))
    for number, group in enumerate(groups):
        own = {name: values_xkg[..., number, :] for name, values_xkg in of_groups.items()}
        tables.append(_group_table(group, panel, own, squared_kg[number], count_kg[number], cells_k[number]))
    return pd.concat(tables, ignore_index=True)


def _group_table(
    group: str, panel: GenePanel, values: dict[str, np.ndarray], squared_g: np.ndarray, count_g: np.ndarray,
    num_cells: float,
) -> pd.DataFrame:  # fmt: skip
    """Return the rows of one group: genes that have a change, by falling change."""
    error_g = np.sqrt(squared_g)
    columns = {
        "group": group,
        "gene": list(panel.genes),
        "symbol": [panel.display_name(at) for at in range(len(panel))],
        "change": values["change"],
        "change_bins": values["change_bins"],
        "standard_error": error_g,
    }
    last = ("observed", "change_expressed", "change_unexpressed", "share_expressed")
    table = pd.concat(
        [
            pd.DataFrame(columns),
            against_null(values["change"], values["null"], error_g, count_g),
            pd.DataFrame({name: values[name] for name in last}).assign(n_cells=int(num_cells)),
        ],
        axis=1,
    )
    return table[table["change"].notna()].sort_values("change", ascending=False, kind="stable")
