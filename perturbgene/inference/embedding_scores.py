"""How good an embedding of cells is: whether cells of one label lie together, and cells of different donors too.

Owns the three scores and the comparison with principal components of the same cells; leaves embedding to `Run.embed`.
Letters: n cells (m embedded ones), c coordinates, h hidden size, j neighbors, g genes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset, donors_of
from perturbgene.data_utils.tokenization import TokenBlock
from perturbgene.eval_utils import IntArray, Scores
from perturbgene.inference.baselines import classes_of, paired_difference, read_expression
from perturbgene.inference.classifiers import NUM_NEIGHBORS, principal_components, sample
from perturbgene.inference.run import Run

logger = logging.getLogger(__name__)

#: Most cells that are embedded; distances between all of them are computed.
MOST_CELLS = 2_000
#: Fewer labeled cells are no neighborhood: the 15 nearest would be most of them.
LEAST_CELLS = 3 * NUM_NEIGHBORS
#: What tables call the embedding of the run and that of principal components.
RUN, PCA = "run", "pca"


def neighbors_of(points_nc: np.ndarray, *, num_neighbors: int) -> IntArray:
    """Return the numbers of each cell's nearest other cells, nearest first, shape (n, j)."""
    search = NearestNeighbors(n_neighbors=num_neighbors).fit(points_nc)
    return np.asarray(search.kneighbors(return_distance=False), dtype=np.int64)


def purity(points_nc: np.ndarray, label_n: np.ndarray) -> np.ndarray:
    """Return the share of each cell's nearest cells that have its label, shape (n,).

    A cell looks at 15 cells, or at as many as its label has others, so that 1 can be reached; NaN if it has none.

    Example:
        >>> purity(np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [9.9]]), np.array([0, 0, 1, 1, 1, 2])).tolist()
        [1.0, 1.0, 0.0, 1.0, 0.5, nan]
    """
    _, label_n, size_k = np.unique(label_n, return_inverse=True, return_counts=True)
    nearest_nj = neighbors_of(points_nc, num_neighbors=min(NUM_NEIGHBORS, len(label_n) - 1))
    is_same_nj = label_n[nearest_nj] == label_n[:, None]
    is_near_nj = np.arange(nearest_nj.shape[1]) < (size_k[label_n] - 1)[:, None]
    num_near_n = is_near_nj.sum(axis=1)
    return np.where(num_near_n > 0, (is_same_nj & is_near_nj).sum(axis=1) / np.maximum(num_near_n, 1), np.nan)


def mixing(points_nc: np.ndarray, label_n: np.ndarray, donor_n: np.ndarray) -> float:
    """Return how often the nearest cells of the same label are of another donor, relative to chance.

    Each cell looks at its 15 nearest cells of its own label, or at a third of them where a label has few. Chance is the
    share of other donors among all other cells of the label.

    Args:
        points_nc: The embedding.
        label_n: Label of each cell.
        donor_n: Donor of each cell.

    Returns:
        1 if donors are mixed as by chance, 0 if every donor lies apart; NaN if no label has cells of two donors.

    Example:
        >>> points_n1 = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
        >>> mixing(points_n1, np.zeros(6), np.array([0, 0, 0, 1, 1, 1])), mixing(
        ...     points_n1, np.zeros(6), np.array([0, 1, 0, 1, 0, 1]))
        (0.0, 1.1111111111111112)
    """
    found = expected = 0.0
    for label in np.unique(label_n):
        rows_m = np.flatnonzero(label_n == label)
        _, donor_m, size_d = np.unique(donor_n[rows_m], return_inverse=True, return_counts=True)
        if len(size_d) < 2 or len(rows_m) < 3:
            continue
        nearest_mj = neighbors_of(points_nc[rows_m], num_neighbors=min(NUM_NEIGHBORS, len(rows_m) // 3))
        found += float((donor_m[nearest_mj] != donor_m[:, None]).mean(axis=1).sum())
        expected += float(((len(rows_m) - size_d[donor_m]) / (len(rows_m) - 1)).sum())
    return found / expected if expected else float("nan")


def scib_scores(points: dict[str, np.ndarray], label_n: np.ndarray, donor_n: np.ndarray) -> dict[str, Scores]:
    """Return the metrics of the single-cell integration benchmark for each embedding (Luecken et al. 2022).

    The package `scib-metrics` computes them, all but the comparison with principal components before integration. It
    compiles for minutes.

    Args:
        points: Embeddings by name, each (n, c).
        label_n: Label of each cell.
        donor_n: Donor of each cell, at least two.

    Returns:
        Embedding -> metric, under the package's own names, with `Bio conservation`, `Batch correction` and `Total`.
    """
    import anndata
    from scib_metrics.benchmark import BatchCorrection, Benchmarker
    from scib_metrics.nearest_neighbors import NeighborsResults

    def nearest(points_nc: np.ndarray, num_neighbors: int) -> Any:
        search = NearestNeighbors(n_neighbors=min(num_neighbors, len(points_nc))).fit(points_nc)
        distance_nj, neighbor_nj = search.kneighbors(points_nc)
        return NeighborsResults(indices=neighbor_nj, distances=distance_nj)

    obs = pd.DataFrame({"label": label_n.astype(str), "donor": donor_n.astype(str)}, dtype="category")
    obs.index = obs.index.astype(str)
    arrays = {name: points_nc.astype(np.float32) for name, points_nc in points.items()}
    cells = anndata.AnnData(np.zeros((len(obs), 1), dtype=np.float32), obs=obs, obsm=arrays)
    options = {"pre_integrated_embedding_obsm_key": PCA, "n_jobs": 1, "progress_bar": False}
    kinds = {"batch_correction_metrics": BatchCorrection(pcr_comparison=False)}
    benchmark = Benchmarker(cells, "donor", "label", list(points), **kinds, **options)
    benchmark.prepare(nearest)
    benchmark.benchmark()
    found = benchmark.get_results().drop(index="Metric Type")
    return {str(name): {str(key): float(value) for key, value in row.items()} for name, row in found.iterrows()}


def compare(
    points: dict[str, np.ndarray], label_n: np.ndarray, donor_n: np.ndarray | None, *, category: str,
    has_scib: bool = False,
) -> dict[str, Scores]:  # fmt: skip
    """Score the run's embedding and principal components on the same labeled cells, and mark the purer one.

    A warning says so if the run's is less pure by more than one standard error of the difference between the cells.

    Args:
        points: The embedding called `RUN` and that called `PCA`, each (n, c).
        label_n: Label of each cell.
        donor_n: Donor of each cell, or None.
        category: The phenotype, for the warning.
        has_scib: True adds `scib METRIC`, see `scib_scores`, if some label has cells of two donors.

    Returns:
        Embedding -> `n`, `purity`, `silhouette` and, if some label has cells of two donors, `mixing`. `best` is true
        for one of them, the run's if they are equally pure.
    """
    pure = {name: purity(points_nc, label_n) for name, points_nc in points.items()}
    pure = {name: pure_n[np.isfinite(pure_n)] for name, pure_n in pure.items()}  # the same cells: it depends on labels
    scores: dict[str, Scores] = {}
    for name, points_nc in points.items():
        scores[name] = {"n": len(pure[name]), "purity": float(pure[name].mean())}
        scores[name]["silhouette"] = float(silhouette_score(points_nc, label_n))
        if donor_n is not None and np.isfinite(mixed := mixing(points_nc, label_n, donor_n)):
            scores[name]["mixing"] = mixed
    if has_scib and donor_n is not None and "mixing" in scores[RUN]:
        for name, found in scib_scores(points, label_n, donor_n).items():
            scores[name] |= {f"scib {metric}": value for metric, value in found.items()}
    elif has_scib:
        logger.warning("%s: no label has cells of two donors, so there are no scIB metrics", category)
    scores[max((RUN, PCA), key=lambda name: scores[name]["purity"])]["best"] = True
    difference, error = paired_difference(pure[PCA], pure[RUN])
    if difference > error:
        logger.warning(
            "%s: in the run's embedding %.1f %% of a cell's nearest cells share its label, in %d principal components "
            "of these %s cells %.1f %%: cluster the components, or train the run better",
            category, 100 * pure[RUN].mean(), points[PCA].shape[1], f"{len(pure[PCA]):,}", 100 * pure[PCA].mean(),
        )  # fmt: skip
    return scores


@dataclass
class CellEmbeddings:
    """The run's embedding of some of the cells that stream by, as `embed` gives it when nothing is given."""

    run: Run
    rows_n: IntArray  # ascending numbers of the cells
    _parts: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _expression_mg: sparse.csr_matrix | None = None

    @classmethod
    def of(cls, run: Run, is_new_n: np.ndarray) -> "CellEmbeddings":
        """Draw at most `MOST_CELLS` of the new cells; none for a classifier of one label against the rest."""
        new_m = np.flatnonzero(is_new_n) if run.binary_label is None else np.zeros(0, dtype=np.int64)
        return cls(run, new_m[sample(len(new_m), most=MOST_CELLS, seed=0)])

    def add(self, block: TokenBlock) -> None:
        """Embed those cells of a block that are wanted."""
        block = block.take(np.flatnonzero(np.isin(block.cells_n, self.rows_n)))
        if len(block):
            states_nh = self.run.embed(block, pooling=self.run.default_pooling())
            self._parts.append((block.cells_n, states_nh))

    def joined(self) -> tuple[IntArray, np.ndarray]:
        """Return the numbers of the cells that express a gene of the panel, ascending (m,), and embeddings (m, h)."""
        if not self._parts:
            return np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=np.float32)
        cells_m, states_mh = (np.concatenate(arrays) for arrays in zip(*self._parts, strict=True))
        kept = [row for row in np.argsort(cells_m) if np.isfinite(states_mh[row, 0])]
        return cells_m[kept], states_mh[kept]

    def expression(self, dataset: IterableAnnDataset) -> sparse.csr_matrix:
        """Return log1p counts per 10,000 of the run's genes in the cells of `joined`, CSR of shape (m, g)."""
        if self._expression_mg is None:
            self._expression_mg = read_expression(dataset.shards, self.joined()[0], sizes=dataset.sizes)
        return self._expression_mg

    def scores(
        self,
        dataset: IterableAnnDataset,
        categories: Sequence[str],
        *,
        donor_column: str | None,
        has_scib: bool = False,
    ) -> dict[str, dict[str, Scores]]:
        """Compare the embedding with principal components of the same cells.

        Args:
            dataset: Where the cells came from; labels and the expression of the run's genes are read from it.
            categories: The phenotypes.
            donor_column: Column of obs with the donors.
            has_scib: See `compare`.

        Returns:
            Phenotype -> embedding -> scores, see `compare`. Phenotypes with fewer than `LEAST_CELLS` labeled cells that
            express a gene of the panel, or with one label, are left out.
        """
        cells_m, states_mh = self.joined()
        if not len(cells_m):
            return {}
        expression_mg = self.expression(dataset)
        donors_n, found = donors_of(dataset, donor_column), {}
        for category in categories:
            label_m = classes_of(dataset, category)[cells_m]
            rows = np.flatnonzero(label_m >= 0)
            size_k = np.unique(label_m[rows], return_counts=True)[1]
            if len(rows) < LEAST_CELLS or not 1 < len(size_k) < len(rows):
                continue
            if (components := principal_components(expression_mg[rows], seed=0)) is None:
                continue
            points = {RUN: states_mh[rows], PCA: components.transform(expression_mg[rows])}
            donor_m = None if donors_n is None else donors_n[cells_m[rows]]
            found[category] = compare(points, label_m[rows], donor_m, category=category, has_scib=has_scib)
        return found


def score_table(scores: dict[str, dict[str, Scores]]) -> pd.DataFrame:
    """Return a row for each phenotype and embedding."""
    names = {RUN: "run", PCA: "(baseline) principal components of the same cells"}
    rows = []
    for category, scores_of in scores.items():
        for name, one in scores_of.items():
            row: dict[str, Any] = {"phenotype": category, "embedding": names[name]}
            row |= {key: one.get(key, np.nan) for key in ("n", "purity", "silhouette", "mixing")}
            row |= {key: value for key, value in one.items() if key.startswith("scib ")}
            rows.append({**row, "best": "best" if one.get("best") else ""})
    return pd.DataFrame(rows)
