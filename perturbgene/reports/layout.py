"""The map of cells: two coordinates in which cells with similar embeddings are near each other.

Owns the layout; leaves embeddings to `inference` and pictures to `plots` and the page. Letters: n cells, c coordinates
of the embedding, m pairs of neighbors.
"""

import numpy as np
from sklearn.decomposition import PCA

from perturbgene.inference.classifiers import NUM_NEIGHBORS
from perturbgene.inference.majority import neighbor_graph

NUM_ROUNDS = 200
#: Random cells that a cell is pushed away from, for each neighbor that pulls it.
NUM_PUSHES = 5
#: Pairs of a round are used in parts, since a cell that all its neighbors pull at once would overshoot.
NUM_PARTS = 4
#: Of the curve 1 / (1 + a d^(2 b)): what `umap-learn` fits for `min_dist` 0.3 and `spread` 1.
A, B = 0.9921756, 1.1122533


def umap_layout(points_nc: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Lay cells out as UMAP does, float32 (n, 2).

    This is the method of McInnes, Healy and Melville 2018 ("UMAP: Uniform Manifold Approximation and Projection",
    algorithms 1 to 5), in arrays, and from principal components (Kobak and Linderman 2021). `umap-learn` compiles for
    half a minute before the first cell. The same points and seed give the same layout on one machine.

    Args:
        points_nc: Embedding of each cell, finite, shape (n, c).
        seed: Of the random cells.
    """
    num_cells = len(points_nc)
    if num_cells < 3:
        return np.arange(2 * num_cells, dtype=np.float32).reshape(-1, 2)
    num_axes = min(2, points_nc.shape[1], num_cells - 1)
    with np.errstate(invalid="ignore"):  # equal cells have no variance to explain
        start_nx = PCA(num_axes, random_state=0).fit_transform(points_nc.astype(np.float64))
    place_n2 = np.zeros((num_cells, 2))
    place_n2[:, :num_axes] = 10 * start_nx / max(float(np.abs(start_nx).max()), 1e-12)
    if num_cells <= NUM_NEIGHBORS:
        return place_n2.astype(np.float32)
    rng = np.random.default_rng(seed)
    place_n2 += rng.normal(scale=1e-2, size=place_n2.shape)
    graph = neighbor_graph(points_nc)
    chance_m = graph.data / graph.data.max()
    for number in range(NUM_ROUNDS):
        drawn_m = rng.permutation(np.flatnonzero(rng.random(len(chance_m)) < chance_m))
        for part_m in np.array_split(drawn_m, NUM_PARTS):
            _move(place_n2, graph.row[part_m], graph.col[part_m], step=1 - number / NUM_ROUNDS, rng=rng)
    return place_n2.astype(np.float32)


def _move(place_n2: np.ndarray, from_m: np.ndarray, to_m: np.ndarray, *, step: float, rng: np.random.Generator) -> None:
    """Pull cells towards their neighbors and push them away from random cells, in place."""
    apart_m2 = place_n2[from_m] - place_n2[to_m]
    square_m = (apart_m2**2).sum(axis=1) + 1e-12
    pull_m = -2 * A * B * square_m ** (B - 1) / (1 + A * square_m**B)
    moved_m2 = np.clip(pull_m[:, None] * apart_m2, -4, 4)
    pushed_m = np.repeat(from_m, NUM_PUSHES)
    away_m2 = place_n2[pushed_m] - place_n2[rng.integers(len(place_n2), size=len(pushed_m))]
    square_m = (away_m2**2).sum(axis=1)
    push_m = 2 * B / ((1e-3 + square_m) * (1 + A * square_m**B))
    away_m2 = np.where(square_m[:, None] > 0, np.clip(push_m[:, None] * away_m2, -4, 4), 0)
    for axis in range(2):
        place_n2[:, axis] += step * (
            np.bincount(from_m, moved_m2[:, axis], len(place_n2))
            - np.bincount(to_m, moved_m2[:, axis], len(place_n2))
            + np.bincount(pushed_m, away_m2[:, axis], len(place_n2))
        )
