"""Streamed statistics of genes: moments that merge over files, and the variability rank they give.

Owns sums over cells and Seurat's dispersion; knows nothing of files or tokens. Letters: g genes, l values.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbgene.corpus.loess import loess

#: Number of mean-expression bins within which dispersions are standardised (Seurat's and scanpy's default).
NUM_MEAN_BINS = 20

#: Share of the genes in each neighbourhood of the curve of variance over mean (scanpy's default).
_LOESS_SPAN = 0.3


@dataclass
class GeneMoments:
    """Sums over cells of counts per 10,000, mergeable in any order.

    Args:
        num_cells: Cells seen, zeros included.
        sum_g, sum_squares_g: Sums of x and x^2, float64 of shape (g,).
        num_expressed_g: Cells with x > 0, int64 of shape (g,).
    """

    num_cells: int
    sum_g: np.ndarray
    sum_squares_g: np.ndarray
    num_expressed_g: np.ndarray

    @classmethod
    def zeros(cls, num_genes: int) -> "GeneMoments":
        """Moments of no cell."""
        return cls(0, np.zeros(num_genes), np.zeros(num_genes), np.zeros(num_genes, dtype=np.int64))

    def add(self, values_l: np.ndarray, genes_l: np.ndarray, *, num_cells: int) -> None:
        """Add the stored values (counts per 10,000, linear scale) of `num_cells` cells."""
        size = len(self.sum_g)
        self.num_cells += num_cells
        self.sum_g += np.bincount(genes_l, weights=values_l, minlength=size)
        self.sum_squares_g += np.bincount(genes_l, weights=values_l**2, minlength=size)
        self.num_expressed_g += np.bincount(genes_l[values_l > 0], minlength=size)

    def merge(self, other: "GeneMoments") -> None:
        """Add the cells of another part."""
        self.num_cells += other.num_cells
        self.sum_g += other.sum_g
        self.sum_squares_g += other.sum_squares_g
        self.num_expressed_g += other.num_expressed_g

    def normalized_dispersion(self) -> np.ndarray:
        """Return Seurat's standardised log dispersion of each gene, NaN where it is undefined, shape (g,).

        Log of variance over mean, z-scored among genes of similar mean (Satija et al. 2015, Nat Biotechnol; the
        `flavor="seurat"` of scanpy's `highly_variable_genes`, which our test compares with gene by gene).
        """
        mean_g = self.sum_g / max(1, self.num_cells)
        variance_g = (self.sum_squares_g - self.num_cells * mean_g**2) / max(1, self.num_cells - 1)
        mean_g[mean_g == 0] = 1e-12
        with np.errstate(divide="ignore", invalid="ignore"):
            dispersion_g = np.log(np.where(variance_g > 0, variance_g / mean_g, np.nan))
        frame = pd.DataFrame({"mean": np.log1p(mean_g), "dispersion": dispersion_g})
        groups = frame.groupby(pd.cut(frame["mean"], bins=NUM_MEAN_BINS), observed=True)["dispersion"]
        centre, spread = groups.transform("mean"), groups.transform("std")
        is_alone = spread.isna()
        spread[is_alone], centre[is_alone] = centre[is_alone], 0.0
        return ((frame["dispersion"] - centre) / spread).to_numpy()

    def rank(self, score_g: np.ndarray | None = None) -> np.ndarray:
        """Return gene indices, most variable first; ties and undefined ones by number of expressing cells.

        Args:
            score_g: What to rank by, shape (g,); by default Seurat's dispersion.
        """
        dispersion_g = np.nan_to_num(self.normalized_dispersion() if score_g is None else score_g, nan=-np.inf)
        return np.lexsort((np.arange(len(dispersion_g)), -self.num_expressed_g, -dispersion_g))


class CountTable:
    """How often each gene has each count, in whole numbers: sums of it are exact in any order.

    Counts under `_FEW` have a table, larger ones are kept as pairs (gene, count); of counts from 4,096 on, the 12
    leading binary digits are kept, so that the pairs stay few whatever the number of cells.

    Args:
        num_genes: Number of genes g.
    """

    _FEW = 16
    _EXACT_BITS = 12

    def __init__(self, num_genes: int) -> None:
        self.few_gv = np.zeros((num_genes, self._FEW), dtype=np.int64)
        self.keys = np.zeros(0, dtype=np.int64)
        self.times = np.zeros(0, dtype=np.int64)

    def add(self, counts_l: np.ndarray, genes_l: np.ndarray) -> None:
        """Add stored counts, whole numbers > 0."""
        whole_l = counts_l.astype(np.int64)
        is_few_l = whole_l < self._FEW
        cells = genes_l[is_few_l].astype(np.int64) * self._FEW + whole_l[is_few_l]
        self.few_gv += np.bincount(cells, minlength=self.few_gv.size).reshape(self.few_gv.shape)
        many, genes = whole_l[~is_few_l], genes_l[~is_few_l].astype(np.int64)
        shift = np.maximum(np.frexp(many.astype(np.float64))[1] - self._EXACT_BITS, 0)
        self._add_pairs(*np.unique((genes << 32) | (many >> shift << shift), return_counts=True))

    def _add_pairs(self, keys: np.ndarray, times: np.ndarray) -> None:
        both, place = np.unique(np.concatenate([self.keys, keys]), return_inverse=True)
        summed = np.zeros(len(both), dtype=np.int64)
        np.add.at(summed, place, np.concatenate([self.times, times]))
        self.keys, self.times = both, summed

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the numbers as they are stored."""
        return {"few_gv": self.few_gv, "count_keys": self.keys, "count_times": self.times}

    def merge(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Add the stored numbers of another part."""
        self.few_gv += tensors["few_gv"]
        self._add_pairs(tensors["count_keys"], tensors["count_times"])

    def normalized_variance(self, num_cells: int) -> np.ndarray:
        """Return each gene's variance over that expected from its mean, NaN where it is constant, shape (g,).

        The expected variance is a smooth curve; counts are clipped at sqrt(n) expected deviations above the mean
        (Stuart et al. 2019, Cell; the `flavor="seurat_v3"` of scanpy's `highly_variable_genes`, compared in our test).

        Args:
            num_cells: Cells counted, those without the gene included.
        """
        everything_g = np.full(len(self.few_gv), np.inf)
        sums_g, squares_g = self._sums(everything_g)
        mean_g = sums_g / max(1, num_cells)
        variance_g = (squares_g - num_cells * mean_g**2) / max(1, num_cells - 1)
        varies_g = variance_g > 1e-12 * np.maximum(mean_g, 1e-300) ** 2
        expected_g = np.ones(len(mean_g))
        smooth = loess(np.log10(mean_g[varies_g]), np.log10(variance_g[varies_g]), span=_LOESS_SPAN)
        expected_g[varies_g] = 10**smooth
        sums_g, squares_g = self._sums(np.sqrt(expected_g * num_cells) + mean_g)
        spread_g = num_cells * mean_g**2 + squares_g - 2 * sums_g * mean_g
        return np.where(varies_g, spread_g / (max(1, num_cells - 1) * expected_g), np.nan)

    def _sums(self, highest_g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum counts and their squares per gene, each count taken as at most `highest_g`, float64 of shape (g,)."""
        few_gv = np.minimum(np.arange(self._FEW), highest_g[:, None])
        sums, squares = (self.few_gv * few_gv).sum(axis=1), (self.few_gv * few_gv**2).sum(axis=1)
        genes, many = self.keys >> 32, np.minimum(self.keys & 0xFFFFFFFF, highest_g[self.keys >> 32])
        sums = sums + np.bincount(genes, weights=self.times * many, minlength=len(sums))
        return sums, squares + np.bincount(genes, weights=self.times * many**2, minlength=len(sums))
