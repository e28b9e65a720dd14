"""What mean gene embeddings say about genes: which are alike within a group, and which differ between groups.

Owns nearest neighbours by cosine similarity, the graph made of them and the table of roles; leaves the means to
`embedding` and knows nothing of models. Letters: g genes, k groups, h hidden size, e links.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

if TYPE_CHECKING:
    import networkx

#: Rows of similarities in memory at once: 512 x 20,000 genes in float64 are 80 MB.
BLOCK_ROWS = 512


def unit_rows(vectors_gh: np.ndarray) -> np.ndarray:
    """Scale vectors of shape (..., h) to length 1, in float64; one without length stays 0."""
    vectors_gh = np.asarray(vectors_gh, dtype=np.float64)
    length_g1 = np.linalg.norm(vectors_gh, axis=-1, keepdims=True)
    return vectors_gh / np.where(length_g1 > 0, length_g1, 1.0)


def centred(vectors_gh: np.ndarray, counts_g: np.ndarray) -> np.ndarray:
    """Take away what all genes have in common: the mean over all their tokens.

    Contextual vectors share a large part, which alone makes every cosine high; without it the cosine tells genes apart
    (Mu & Viswanath 2018, "All-but-the-Top", arXiv:1702.01417, algorithm 1, step 1).

    Args:
        vectors_gh: Mean vector of each gene, shape (g, h); rows without a cell may hold anything.
        counts_g: Cells behind each, shape (g,).
    """
    weight_g = counts_g / max(1, counts_g.sum())
    filled_gh = np.where(counts_g[:, None] > 0, np.asarray(vectors_gh, dtype=np.float64), 0.0)
    return filled_gh - weight_g @ filled_gh


def nearest_genes(vectors_gh: np.ndarray, *, top_k: int, min_similarity: float = -1.0) -> sparse.csr_array:
    """Link each gene to its most similar genes.

    The g x g similarities are never in memory together, only `BLOCK_ROWS` rows of them.

    Args:
        vectors_gh: One vector per gene, shape (g, h).
        top_k: Most links that start from a gene; it may get more from others.
        min_similarity: Weaker links are left out.

    Returns:
        Cosine similarities, float32, symmetric, without a diagonal, shape (g, g).

    Example:
        >>> links = nearest_genes(np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]]), top_k=1)
        >>> [(int(a), int(b)) for a, b in zip(*links.nonzero())]
        [(0, 1), (1, 0), (2, 3), (3, 2)]
    """
    unit_gh = unit_rows(vectors_gh)
    num_genes = len(unit_gh)
    most = min(top_k, num_genes - 1)
    pairs, values = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    for start in range(0, num_genes if most > 0 else 0, BLOCK_ROWS):
        similarity_bg = unit_gh[start : start + BLOCK_ROWS] @ unit_gh.T
        own_b = np.arange(len(similarity_bg))
        similarity_bg[own_b, start + own_b] = -np.inf
        best_bm = np.argpartition(-similarity_bg, most - 1, axis=1)[:, :most]
        gene_b1 = (start + own_b)[:, None]
        pairs.append((np.minimum(gene_b1, best_bm) * num_genes + np.maximum(gene_b1, best_bm)).ravel())
        values.append(np.take_along_axis(similarity_bg, best_bm, axis=1).ravel())
    pair_e, first_e = np.unique(np.concatenate(pairs), return_index=True)
    value_e = np.concatenate(values)[first_e]
    is_kept_e = value_e >= min_similarity
    low_e, high_e = np.divmod(pair_e[is_kept_e], num_genes)
    places = (np.concatenate([low_e, high_e]), np.concatenate([high_e, low_e]))
    weights = np.tile(value_e[is_kept_e].astype(np.float32), 2)
    return sparse.csr_array((weights, places), shape=(num_genes, num_genes))


def link_graph(
    links_gg: sparse.csr_array, *, names: Sequence[str], nodes: Mapping[str, Sequence[object]]
) -> "networkx.Graph":
    """Turn links into a graph: genes as nodes, similarities as `weight` of the edges.

    Args:
        links_gg: Symmetric similarities, shape (g, g).
        names: Name of each gene, distinct.
        nodes: Further facts of each gene, by name of the fact, such as its symbol.
    """
    import networkx

    graph = networkx.Graph()
    for index, name in enumerate(names):
        graph.add_node(name, **{fact: _plain(values[index]) for fact, values in nodes.items()})
    upper = sparse.triu(links_gg).tocoo()
    graph.add_weighted_edges_from(
        (names[a], names[b], round(float(weight), 6)) for a, b, weight in zip(*upper.coords, upper.data, strict=True)
    )
    return graph


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def role_distances(vectors_kgh: np.ndarray, counts_kg: np.ndarray, *, min_cells: int) -> np.ndarray:
    """Return how far apart each gene's vectors lie in two groups: cosine distance, 0..2.

    Args:
        vectors_kgh: Centred mean vectors, shape (k, g, h).
        counts_kg: Cells behind each, shape (k, g).
        min_cells: Below this a vector is too noisy to count.

    Returns:
        Symmetric in the groups, shape (g, k, k); NaN where one of the two has too few cells.
    """
    unit_kgh = unit_rows(vectors_kgh)
    distance_gkk = 1.0 - np.einsum("agh,bgh->gab", unit_kgh, unit_kgh, optimize=True)
    is_known_gk = (counts_kg >= max(1, min_cells)).T
    distance_gkk[~(is_known_gk[:, :, None] & is_known_gk[:, None, :])] = np.nan
    return np.clip(distance_gkk, 0.0, 2.0)


def role_table(
    distance_gkk: np.ndarray, noise_kg: np.ndarray, *, genes: pd.DataFrame, groups: Sequence[str]
) -> pd.DataFrame:
    """Rank genes by how much their embedding differs between groups, beyond the noise of the means.

    A mean over n cells is itself uncertain. With D the distance between the means of two halves of a group's cells, two
    groups that do not differ lie (D_a + D_b) / 4 apart on average, as halves hold half of the cells each.

    Args:
        distance_gkk: Of `role_distances`.
        noise_kg: Distance between the two halves of each group, shape (k, g).
        genes: One row of facts per gene (`gene`, `symbol`), in order.
        groups: Names of the groups.

    Returns:
        For each gene that at least two groups express: `num_groups`, `mean_distance` over pairs of groups,
        `mean_noise` to expect of the same pairs, `excess` = distance - noise, and the two groups that lie furthest
        apart with their distance; by falling excess.
    """
    first, second = (np.array(side, dtype=np.int64) for side in zip(*combinations(range(len(groups)), 2), strict=True))
    pair_gp = distance_gkk[:, first, second]
    noise_gp = ((noise_kg[first] + noise_kg[second]) / 4).T
    is_known_gp = np.isfinite(pair_gp)
    rows = np.flatnonzero(is_known_gp.any(axis=1))
    pair_gp, noise_gp, is_known_gp = pair_gp[rows], noise_gp[rows], is_known_gp[rows]
    furthest = np.where(is_known_gp, pair_gp, -1.0).argmax(axis=1)
    names = np.array(groups, dtype=object)
    table = genes.iloc[rows].reset_index(drop=True)
    table["num_groups"] = np.isfinite(distance_gkk[rows]).any(axis=2).sum(axis=1)
    table["mean_distance"] = _known_mean(pair_gp)
    table["mean_noise"] = _known_mean(np.where(is_known_gp, noise_gp, np.nan))
    table["excess"] = table["mean_distance"] - table["mean_noise"]
    table["furthest_groups"] = [
        f"{a} | {b}" for a, b in zip(names[first[furthest]], names[second[furthest]], strict=True)
    ]
    table["furthest_distance"] = np.take_along_axis(pair_gp, furthest[:, None], axis=1)[:, 0]
    return table.sort_values("excess", ascending=False, kind="stable", ignore_index=True)


def _known_mean(values_gp: np.ndarray) -> np.ndarray:
    """Average the numbers of each row, shape (g,); NaN where a row has none."""
    count_g = np.isfinite(values_gp).sum(axis=1)
    return np.where(count_g > 0, np.nansum(values_gp, axis=1) / np.maximum(count_g, 1), np.nan)
