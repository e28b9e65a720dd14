"""Labels by majority: all cells of a cluster get the label that most of them are given.

Owns neighbors of cells, clusters of an embedding, and the votes; leaves answers to `predict`. Letters: n cells, m cells
that are clustered, c coordinates of an embedding, j neighbors, k labels, r clusters.
"""

import numpy as np
from scipy import sparse
from sklearn.neighbors import NearestNeighbors

from perturbgene.eval_utils import IntArray
from perturbgene.inference.classifiers import NUM_NEIGHBORS, sample

#: Value of --majority_by that clusters the embedding, and the column of `obs` that these clusters become.
BY_EMBEDDING, CLUSTER_COLUMN = "embedding", "perturbgene_cluster"
#: Most cells that are clustered; each further one joins the cluster of the nearest of them.
MOST_CLUSTERED = 50_000
#: Number of cells -> resolution of Leiden: many small clusters (CellTypist 1.7.1, `Classifier.over_cluster`).
RESOLUTIONS = {5_000: 5, 20_000: 10, 40_000: 15, 100_000: 20, 200_000: 25}
LARGEST_RESOLUTION = 30


def neighbor_graph(points_nc: np.ndarray) -> sparse.coo_matrix:
    """Return how sure it is that two cells are neighbors, in 0..1, each near its own scale, in either direction.

    Source: McInnes, Healy and Melville 2018, "UMAP", algorithms 2 and 3, with 15 neighbors.
    """
    search = NearestNeighbors(n_neighbors=NUM_NEIGHBORS).fit(points_nc)
    distance_nj, neighbor_nj = search.kneighbors()
    beyond_nj = np.maximum(distance_nj - distance_nj[:, :1], 0)
    low_n, high_n = np.zeros(len(points_nc)), np.full(len(points_nc), np.inf)
    scale_n = np.maximum(beyond_nj.mean(axis=1), 1e-12)
    for _ in range(40):  # the scale at which the sum is log2 of the number of neighbors
        is_large_n = np.exp(-beyond_nj / scale_n[:, None]).sum(axis=1) > np.log2(NUM_NEIGHBORS)
        high_n, low_n = np.where(is_large_n, scale_n, high_n), np.where(is_large_n, low_n, scale_n)
        scale_n = np.where(np.isinf(high_n), 2 * low_n, (low_n + np.minimum(high_n, 1e300)) / 2)
        scale_n = np.maximum(scale_n, 1e-12)
    weight_nj = np.exp(-beyond_nj / scale_n[:, None])
    starts = np.arange(0, neighbor_nj.size + 1, NUM_NEIGHBORS)
    one_way = sparse.csr_matrix((weight_nj.ravel(), neighbor_nj.ravel(), starts), shape=(len(points_nc),) * 2)
    return (one_way + one_way.T - one_way.multiply(one_way.T)).tocoo()


def clusters_of(points_nc: np.ndarray, *, seed: int = 0) -> IntArray:
    """Cluster cells by their embedding with Leiden, as finely as CellTypist does, the largest cluster first.

    Source: Traag, Waltman and van Eck 2019, "From Louvain to Leiden", in igraph, with CellTypist's resolutions.

    Args:
        points_nc: The embedding, shape (n, c); NaN for cells without one.
        seed: Of the sample of `MOST_CLUSTERED` cells, if there are more, and of Leiden.

    Returns:
        Number of each cell's cluster, shape (n,), and -1 for cells without an embedding.
    """
    import scanpy

    cells_n = np.flatnonzero(np.isfinite(points_nc).all(axis=1))
    found_n = np.full(len(points_nc), -1, dtype=np.int64)
    if len(cells_n) <= NUM_NEIGHBORS:
        found_n[cells_n] = 0
        return found_n
    chosen_m = cells_n[sample(len(cells_n), most=MOST_CLUSTERED, seed=seed)]
    resolution = next((it for most, it in RESOLUTIONS.items() if len(cells_n) < most), LARGEST_RESOLUTION)
    cells = scanpy.AnnData(shape=(len(chosen_m), 0))
    scanpy.tl.leiden(
        cells, resolution, adjacency=neighbor_graph(points_nc[chosen_m]).tocsr(), directed=False, flavor="igraph",
        n_iterations=2, random_state=seed,
    )  # fmt: skip
    found_n[chosen_m] = cells.obs["leiden"].cat.codes
    others = np.setdiff1d(cells_n, chosen_m)
    if len(others):
        nearest = NearestNeighbors(n_neighbors=1).fit(points_nc[chosen_m]).kneighbors(points_nc[others])[1][:, 0]
        found_n[others] = found_n[chosen_m[nearest]]
    return found_n


def majority(answer_n: IntArray, cluster_n: IntArray, *, num_labels: int) -> tuple[IntArray, np.ndarray]:
    """Return the label that most cells of each cell's cluster are given, and their share; of equals, the first label.

    Args:
        answer_n: Label of each cell, shape (n,); -1 for cells without an answer, which neither vote nor get a label.
        cluster_n: Cluster of each cell, shape (n,); a cell of no cluster, -1, keeps its own label.
        num_labels: k.

    Returns:
        Labels, shape (n,), and shares in 0..1, NaN where there is no answer.

    Example:
        >>> majority(np.array([0, 0, 1, 2, -1, 1]), np.array([0, 0, 0, 1, 1, -1]), num_labels=3)
        (array([ 0,  0,  0,  2, -1,  1]), array([0.66666667, 0.66666667, 0.66666667, 1.        ,        nan,
               1.        ]))
    """
    has_votes_n = (answer_n >= 0) & (cluster_n >= 0)
    num_clusters = int(cluster_n.max(initial=-1)) + 1
    flat_n = cluster_n[has_votes_n] * num_labels + answer_n[has_votes_n]
    votes_rk = np.bincount(flat_n, minlength=num_clusters * num_labels).reshape(num_clusters, num_labels)
    share_rk = votes_rk / np.maximum(votes_rk.sum(axis=1, keepdims=True), 1)
    label_n, share_n = answer_n.copy(), np.where(answer_n >= 0, 1.0, np.nan)
    of_cluster_n = cluster_n[has_votes_n]
    label_n[has_votes_n] = share_rk.argmax(axis=1)[of_cluster_n]
    share_n[has_votes_n] = share_rk.max(axis=1)[of_cluster_n]
    return label_n, share_n
