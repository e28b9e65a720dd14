"""How unusual a cell is: how far from the training cells of its label, and how doubtful that label is.

Owns the score, the statistics of training cells that it needs (`novelty.safetensors` in the run) and what is usual for
cells of as many genes; leaves logits to those who ask the model, percentiles and storing to `calibration`. Letters:
n cells, t token types, r principal components, k labels, p parts of the score.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from scipy import sparse
from scipy.special import logsumexp

from perturbgene.data_utils.iterable_ann_dataset import IterableAnnDataset
from perturbgene.eval_utils import true_labels
from perturbgene.files import whole_file
from perturbgene.inference.classifiers import principal_components
from perturbgene.inference.run import Run
from perturbgene.inference.streaming import stream_batches
from perturbgene.training.votes import expression_of

NOVELTY_FILE = "novelty.safetensors"
#: Chosen with the score itself by leaving types out (docs/experiments.md); 8 to 25 were nearly as good.
NUM_COMPONENTS = 15
#: Most training cells that are kept in memory, taken at even distances.
MOST_CELLS = 10_000
#: What is added to the covariance, relative to its mean variance.
RIDGE = 1e-3
#: Fewest evaluation cells that can say what is usual.
LEAST_CELLS = 20
#: Between which numbers of genes a trend is fitted: beyond, few cells would decide it.
QUANTILES_OF_DEPTH = (0.05, 0.95)
#: Of the logarithms of the distance and of the doubt: a probability of 1 has no logarithm of its doubt.
LOWEST = -50.0


def log_doubt(logits_nk: np.ndarray) -> np.ndarray:
    """Return the logarithm of the probability that another label than the most probable one is right, shape (n,).

    Example:
        >>> np.exp(log_doubt(np.log([[0.7, 0.2, 0.1], [0.1, 0.9, 0.0001]]))).round(2).tolist()
        [0.3, 0.1]
    """
    ascending_nk = np.sort(logits_nk.astype(np.float64), axis=1)
    if ascending_nk.shape[1] < 2:
        return np.full(len(ascending_nk), LOWEST)
    return np.maximum(logsumexp(ascending_nk[:, :-1], axis=1) - logsumexp(ascending_nk, axis=1), LOWEST)


# -- training cells -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingCells:
    """Where a run's training cells lie: one Gaussian for each label, all of the same covariance.

    Args:
        axes_tr: Principal axes of expression, a row per token type, float32.
        means_kr: Phenotype -> mean of each label's cells on the axes; NaN for a label without cells.
        precision_rr: Phenotype -> inverse of the covariance within labels.
    """

    axes_tr: np.ndarray
    means_kr: Mapping[str, np.ndarray]
    precision_rr: Mapping[str, np.ndarray]

    @classmethod
    def fit(
        cls, expression_nt: sparse.csr_matrix, labels: Mapping[str, np.ndarray], sizes: Mapping[str, int]
    ) -> "TrainingCells":
        """Fit axes to cells, and a Gaussian for each label of each phenotype.

        Args:
            expression_nt: Expression of the cells by token type.
            labels: Phenotype -> label of each cell, 0..k-1, or -1 where it is not known.
            sizes: Phenotype -> k.
        """
        components = principal_components(expression_nt, seed=0, most=NUM_COMPONENTS)
        axes_tr = np.zeros((expression_nt.shape[1], 1)) if components is None else components.components_.T
        points_nr, means, precisions = expression_nt @ axes_tr, {}, {}
        for name, label_n in labels.items():
            known_nr, label_n = points_nr[label_n >= 0], label_n[label_n >= 0]
            count_k = np.bincount(label_n, minlength=sizes[name])
            sum_kr = np.zeros((len(count_k), axes_tr.shape[1]))
            np.add.at(sum_kr, label_n, known_nr)
            with np.errstate(invalid="ignore"):
                means[name] = sum_kr / count_k[:, None]
            within_nr = known_nr - means[name][label_n]
            covariance_rr = within_nr.T @ within_nr / max(len(label_n) - np.count_nonzero(count_k), 1)
            ridge = max(RIDGE * np.trace(covariance_rr) / len(covariance_rr), 1e-9)
            precisions[name] = np.linalg.inv(covariance_rr + ridge * np.eye(len(covariance_rr)))
        return cls(axes_tr.astype(np.float32), means, precisions)

    def locate(self, expression_nt: sparse.csr_matrix) -> np.ndarray:
        """Return where cells lie on the axes, shape (n, r)."""
        return np.asarray(expression_nt @ self.axes_tr, dtype=np.float64)

    def parts(self, name: str, points_nr: np.ndarray, logits_nk: np.ndarray) -> np.ndarray:
        """Return the two parts of the score, shape (n, 2): logarithms of the squared distance and of the doubt.

        The distance (Mahalanobis; Lee et al. 2018, arXiv:1807.03888, section 2.1, there in a network's features and to
        the nearest class) is that to the most probable label, or to the nearest one if no training cell has that label.
        """
        means_kr, best_n = self.means_kr[name], logits_nk.argmax(axis=1)
        has_cells_k = ~np.isnan(means_kr[:, 0])
        squares_nk = np.full((len(points_nr), len(means_kr)), np.inf)
        for label in np.flatnonzero(has_cells_k):
            away_nr = points_nr - means_kr[label]
            squares_nk[:, label] = ((away_nr @ self.precision_rr[name]) * away_nr).sum(axis=1)
        own_n = squares_nk[np.arange(len(best_n)), best_n]
        square_n = np.where(has_cells_k[best_n], own_n, squares_nk.min(axis=1))
        return np.stack([np.log(np.clip(square_n, np.exp(LOWEST), 1e30)), log_doubt(logits_nk)], axis=1)

    def save(self, run: str | Path) -> None:
        """Write `novelty.safetensors` into a run folder."""
        arrays = {"axes": self.axes_tr}
        for name, means_kr in self.means_kr.items():
            arrays |= {f"means:{name}": means_kr, f"precision:{name}": self.precision_rr[name]}
        with whole_file(Path(run) / NOVELTY_FILE) as partial:
            partial.write_bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))

    @classmethod
    def read(cls, run: str | Path) -> "TrainingCells | None":
        """Return what `evaluate` stored in a run folder; None if it did not, or if the file is damaged."""
        try:
            arrays = load_file(Path(run) / NOVELTY_FILE)
            axes_tr = arrays.pop("axes")
        except (OSError, SafetensorError, KeyError):
            return None
        parts: dict[str, dict[str, np.ndarray]] = {"means": {}, "precision": {}}
        for key, array in arrays.items():
            kind, name = key.split(":", 1)
            parts[kind][name] = array
        return cls(axes_tr, parts["means"], parts["precision"])


def fit_training_cells(run: Run, cells: IterableAnnDataset) -> TrainingCells:
    """Read a run's training cells once and fit their statistics; of many cells, evenly chosen ones."""
    stride, parts = -(-max(1, cells.num_cells) // MOST_CELLS), []
    names = [run.category] if run.is_classifier else list(run.tokenizer.included_phenotypes)
    for block in stream_batches(cells, text="evaluate: training cells"):
        block = block.take(np.flatnonzero(block.cells_n % stride == 0))
        own = block.labels_n
        labels = {name: true_labels(block, run.tokenizer, name) if own is None else own for name in names}
        parts.append((expression_of(block, run.model.config), labels))
    sizes = {name: len(run.class_labels if run.is_classifier else run.tokenizer.phenotypes[name]) for name in names}
    joined = {name: np.concatenate([labels[name] for _, labels in parts]) for name in names}
    return TrainingCells.fit(sparse.vstack([part for part, _ in parts], format="csr"), joined, sizes)


# -- what is usual ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usual:
    """The parts of the score that held-out cells have, as quadratic functions of their log number of genes.

    Shallow cells are farther from all labels and more doubtful, which makes them no new type.
    """

    range_2: tuple[float, ...]  # 5 and 95 % quantile of the log number of genes; cells beyond are compared with these
    coefficients_p3: tuple[tuple[float, ...], ...]
    deviation_p: tuple[float, ...]

    @classmethod
    def fit(cls, parts_np: np.ndarray, num_genes_n: np.ndarray) -> "Usual | None":
        """Fit to cells that have genes; None if there are fewer than 20."""
        rows = np.flatnonzero((num_genes_n > 0) & np.isfinite(parts_np).all(axis=1))
        if len(rows) < LEAST_CELLS:
            return None
        depth_n = np.log(num_genes_n[rows])
        low, high = np.quantile(depth_n, QUANTILES_OF_DEPTH).tolist()
        powers_n3 = cls((low, high), (), ())._powers(num_genes_n[rows])
        coefficients_3p = np.linalg.lstsq(powers_n3, parts_np[rows], rcond=None)[0]
        deviation_p = np.maximum((parts_np[rows] - powers_n3 @ coefficients_3p).std(axis=0), 1e-6)
        return cls((low, high), tuple(map(tuple, coefficients_3p.T.tolist())), tuple(deviation_p.tolist()))

    def _powers(self, num_genes_n: np.ndarray) -> np.ndarray:
        low, high = self.range_2
        depth_n = np.clip(np.log(np.maximum(num_genes_n, 1)), low, high) - (low + high) / 2
        return np.stack([np.ones(len(depth_n)), depth_n, depth_n**2], axis=1)

    def score(self, parts_np: np.ndarray, num_genes_n: np.ndarray) -> np.ndarray:
        """Return the mean over the parts of how many standard deviations a cell is above the usual, shape (n,)."""
        usual_np = self._powers(num_genes_n) @ np.array(self.coefficients_p3).T
        return np.asarray(((parts_np - usual_np) / np.array(self.deviation_p)).mean(axis=1))
