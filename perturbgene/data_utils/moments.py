"""Streamed statistics of genes: moments that merge over files, and the variability rank they give.

Owns sums over cells and Seurat's dispersion; knows nothing of files or tokens. Letters: g genes, l values.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

#: Number of mean-expression bins within which dispersions are standardised (Seurat's and scanpy's default).
NUM_MEAN_BINS = 20


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

    def rank(self) -> np.ndarray:
        """Return gene indices, most variable first; ties and undefined ones by number of expressing cells."""
        dispersion_g = np.nan_to_num(self.normalized_dispersion(), nan=-np.inf)
        return np.lexsort((np.arange(len(dispersion_g)), -self.num_expressed_g, -dispersion_g))
