"""Pass one over the values: what training cells say of genes, values and labels, counted part by part.

Owns sums over cells that merge in a fixed order, and the two ways of ranking genes by variability; leaves choosing to
`panel` and `prepare`. Letters: n cells, g genes, l values, k small counts.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors.numpy import load_file, save_file
from scipy import sparse
from skmisc.loess import loess

from perturbgene.corpus.survey import SPLITS, Part, Plan, blocks_of, cells_of
from perturbgene.data_utils.binning import ValueHistogram
from perturbgene.data_utils.scale import TARGET_SUM, ExpressionBlock

logger = logging.getLogger(__name__)

STATISTICS_FOLDER = "statistics"

#: Number of mean-expression bins within which dispersions are standardized (Seurat's and scanpy's default).
NUM_MEAN_BINS = 20

#: Share of the genes in each neighborhood of the curve of variance over mean (scanpy's default).
_LOESS_SPAN = 0.3

#: scikit-misc cannot fit curves through fewer distinct means than this; three of them crash it.
_FEWEST_MEANS = 20


class GeneMoments:
    """Sums over cells of counts per 10,000 (x): cells seen, sums of x and of x^2, and cells with x > 0 of each gene."""

    def __init__(self, num_genes: int) -> None:
        self.num_cells, self.num_expressed_g = np.zeros(1, dtype=np.int64), np.zeros(num_genes, dtype=np.int64)
        self.sum_g, self.sum_squares_g = np.zeros((2, num_genes))

    def add(self, values_l: np.ndarray, genes_l: np.ndarray, *, num_cells: int) -> None:
        """Add the stored values (counts per 10,000, linear scale) of `num_cells` cells."""
        size = len(self.sum_g)
        self.num_cells += num_cells
        self.sum_g += np.bincount(genes_l, weights=values_l, minlength=size)
        self.sum_squares_g += np.bincount(genes_l, weights=values_l**2, minlength=size)
        self.num_expressed_g += np.bincount(genes_l[values_l > 0], minlength=size)

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the numbers as they are stored."""
        return vars(self)

    def merge(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Add the stored numbers of another part."""
        for name, own in self.tensors().items():
            own += tensors[name]

    def normalized_dispersion(self, num_cells_g: np.ndarray | None = None) -> np.ndarray:
        """Return Seurat's standardized log dispersion of each gene, NaN where it is undefined, shape (g,).

        Log of variance over mean, z-scored among genes of similar mean (Satija et al. 2015, Nat Biotechnol); a test
        compares it gene by gene with the `flavor="seurat"` of scanpy's `highly_variable_genes`. `num_cells_g` is the
        number of cells that measure each gene, by default all.
        """
        num_cells = self.num_cells if num_cells_g is None else num_cells_g
        mean_g = self.sum_g / np.maximum(1, num_cells)
        variance_g = (self.sum_squares_g - num_cells * mean_g**2) / np.maximum(1, num_cells - 1)
        mean_g[mean_g == 0] = 1e-12
        with np.errstate(divide="ignore", invalid="ignore"):
            dispersion_g = np.log(np.where(variance_g > 0, variance_g / mean_g, np.nan))
        frame = pd.DataFrame({"mean": np.log1p(mean_g), "dispersion": dispersion_g})
        groups = frame.groupby(pd.cut(frame["mean"], bins=NUM_MEAN_BINS), observed=True)["dispersion"]
        center, spread = groups.transform("mean"), groups.transform("std")
        is_alone = spread.isna()
        spread[is_alone], center[is_alone] = center[is_alone], 0.0
        return ((frame["dispersion"] - center) / spread).to_numpy()

    def rank(self, score_g: np.ndarray | None = None) -> np.ndarray:
        """Return gene indices, highest score (by default Seurat's dispersion) first; ties by expressing cells."""
        score_g = np.nan_to_num(self.normalized_dispersion() if score_g is None else score_g, nan=-np.inf)
        return np.lexsort((np.arange(len(score_g)), -self.num_expressed_g, -score_g))


class CountTable:
    """How often each gene has each count, in whole numbers: sums of it are exact in any order.

    Counts under `_FEW` have a table, larger ones are kept as pairs (gene, count). Of counts from 4,096 on only the 12
    leading binary digits are kept, so that there are few pairs however many cells there are.
    """

    _FEW = 16
    _EXACT_BITS = 12

    def __init__(self, num_genes: int) -> None:
        self.few_gk = np.zeros((num_genes, self._FEW), dtype=np.int64)
        self.keys = np.zeros(0, dtype=np.int64)
        self.times = np.zeros(0, dtype=np.int64)

    def add(self, counts_l: np.ndarray, genes_l: np.ndarray) -> None:
        """Add stored counts, whole numbers > 0."""
        whole_l = counts_l.astype(np.int64)
        is_few_l = whole_l < self._FEW
        cells = genes_l[is_few_l].astype(np.int64) * self._FEW + whole_l[is_few_l]
        few_gk = np.bincount(cells, minlength=self.few_gk.size)
        many, genes = whole_l[~is_few_l], genes_l[~is_few_l].astype(np.int64)
        shift = np.maximum(np.frexp(many.astype(np.float64))[1] - self._EXACT_BITS, 0)
        keys, times = np.unique((genes << 32) | (many >> shift << shift), return_counts=True)
        self.merge({"few_gk": few_gk.reshape(self.few_gk.shape), "count_keys": keys, "count_times": times})

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the numbers as they are stored."""
        return {"few_gk": self.few_gk, "count_keys": self.keys, "count_times": self.times}

    def merge(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Add the stored numbers of another part."""
        self.few_gk += tensors["few_gk"]
        keys = np.concatenate([self.keys, tensors["count_keys"]])
        self.keys, place = np.unique(keys, return_inverse=True)
        times = np.concatenate([self.times, tensors["count_times"]])
        self.times = np.zeros(len(self.keys), dtype=np.int64)
        np.add.at(self.times, place, times)

    def normalized_variance(self, num_cells: int | np.ndarray) -> np.ndarray:
        """Return each gene's variance over that expected from its mean, NaN where it is constant, shape (g,).

        The expected variance is a smooth curve; counts are clipped at sqrt(n) expected deviations above the mean
        (Stuart et al. 2019, Cell). A test compares it with `flavor="seurat_v3"` of scanpy's `highly_variable_genes`.
        `num_cells` (one number, or one for each gene) counts the cells that measure a gene, expressed or not.
        """
        sums_g, squares_g = self._sums(np.full(len(self.few_gk), np.inf))
        mean_g = sums_g / np.maximum(1, num_cells)
        variance_g = (squares_g - num_cells * mean_g**2) / np.maximum(1, num_cells - 1)
        varies_g = variance_g > 1e-12 * np.maximum(mean_g, 1e-300) ** 2
        expected_g = np.ones(len(mean_g))
        expected_g[varies_g] = 10 ** smooth_curve(np.log10(mean_g[varies_g]), np.log10(variance_g[varies_g]))
        sums_g, squares_g = self._sums(np.sqrt(expected_g * num_cells) + mean_g)
        spread_g = num_cells * mean_g**2 + squares_g - 2 * sums_g * mean_g
        return np.where(varies_g, spread_g / (np.maximum(1, num_cells - 1) * expected_g), np.nan)

    def _sums(self, highest_g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum counts and their squares per gene, each count taken as at most `highest_g`, float64 of shape (g,)."""
        few_gk = np.minimum(np.arange(self._FEW), highest_g[:, None])
        sums, squares = (self.few_gk * few_gk).sum(axis=1), (self.few_gk * few_gk**2).sum(axis=1)
        genes, many = self.keys >> 32, np.minimum(self.keys & 0xFFFFFFFF, highest_g[self.keys >> 32])
        sums = sums + np.bincount(genes, weights=self.times * many, minlength=len(sums))
        return sums, squares + np.bincount(genes, weights=self.times * many**2, minlength=len(sums))


def smooth_curve(x_g: np.ndarray, y_g: np.ndarray) -> np.ndarray:
    """Return a smooth curve of y over x at each point, shape (g,): loess, or a parabola where loess is impossible."""
    if len(np.unique(x_g)) >= _FEWEST_MEANS:
        try:
            model = loess(x_g, y_g, span=_LOESS_SPAN, degree=2)
            model.fit()
            return np.asarray(model.outputs.fitted_values)
        except ValueError as error:  # most genes have the same few means, as in a handful of cells
            logger.info("no loess curve fits %d genes (%s): they are ranked by a parabola", len(x_g), error)
    if not len(x_g):
        return x_g
    return np.polyval(np.polyfit(x_g, y_g, deg=min(2, len(np.unique(x_g)) - 1)), x_g)


def by_gene(block: ExpressionBlock) -> sparse.csr_matrix:
    """Return a block's values over the genes of all files, float64 of shape (n, g), columns of one gene summed."""
    genes_l = block.alignment.gene_of_column_c[block.columns_l]
    is_kept_l = (genes_l >= 0) & (block.values_l != 0)
    offsets = np.concatenate([[0], np.cumsum(is_kept_l)])[block.offsets_n1]
    parts = (block.values_l[is_kept_l].astype(np.float64), genes_l[is_kept_l], offsets)
    matrix = sparse.csr_matrix(parts, shape=(len(block), block.alignment.num_genes))
    if block.alignment.duplicated:
        matrix.sum_duplicates()
    return matrix


def per_10_000(block: ExpressionBlock, matrix: sparse.csr_matrix) -> np.ndarray:
    """Return each stored count of `by_gene` per 10,000 counts of its cell, shape (l,)."""
    assert block.library_size_n is not None
    return matrix.data * np.repeat(TARGET_SUM / np.maximum(block.library_size_n, 1e-300), np.diff(matrix.indptr))


@dataclass(frozen=True)
class Statistics:
    """What pass one finds in training cells, summed over parts."""

    moments: GeneMoments
    histogram: ValueHistogram
    counts: CountTable | None  # only for ranking by the variance of counts
    labels: dict[str, dict[str, Counter[str]]]  # phenotype -> split -> label -> cells, '' where missing
    num_cells: dict[str, int]  # split -> cells
    cells_of_table: np.ndarray  # training cells of each table of genes, int64 of shape (t,)
    first_of_part: dict[str, np.ndarray]  # split -> how many of its cells come before each part, shape (parts,)


def count_part(plan: Plan, part: Part, path: Path) -> dict[str, Any]:
    """Write the statistics of one part; return its cells and its label counts in both splits."""
    config, (table, is_eval_n) = plan.config, cells_of(plan, part)
    rows = {"train": part.start + np.flatnonzero(~is_eval_n), "eval": part.start + np.flatnonzero(is_eval_n)}
    moments, histogram = GeneMoments(len(plan.union)), ValueHistogram()
    counts = CountTable(len(plan.union)) if plan.flavor == "seurat_v3" else None
    for block in blocks_of(plan, part, rows["train"]):
        matrix = by_gene(block)
        if block.is_linear:
            linear_l = per_10_000(block, matrix)
        else:
            linear_l = matrix.data if config.normalization == "none" else np.expm1(matrix.data)
        moments.add(linear_l, matrix.indices, num_cells=len(block))
        if counts is not None:
            counts.add(matrix.data, matrix.indices)
        if not (config.bin_edges or config.bin_edges_path or config.like):
            histogram.add(np.log1p(linear_l))
    at = np.flatnonzero(histogram.counts_r)
    tensors = {**moments.tensors(), "histogram_at": at, "histogram": histogram.counts_r[at]}
    save_file(tensors | (counts.tensors() if counts else {}), path)
    labels = {
        category: {split: labels.counts(rows[split]) for split in SPLITS} for category, labels in table.labels.items()
    }
    return {"labels": labels, **{split: len(rows[split]) for split in SPLITS}}


def merge_parts(plan: Plan, entries: Sequence[Mapping[str, Any]]) -> Statistics:
    """Add up all parts in their order, so that rounding does not depend on who counted them."""
    moments, histogram = GeneMoments(len(plan.union)), ValueHistogram()
    counts = CountTable(len(plan.union)) if plan.flavor == "seurat_v3" else None
    labels = {name: {split: Counter[str]() for split in SPLITS} for name in plan.config.column_of_phenotype}
    for entry in entries:
        tensors = load_file(plan.folder / entry["file"])
        moments.merge(tensors)
        histogram.counts_r[tensors["histogram_at"]] += tensors["histogram"]
        if counts is not None:
            counts.merge(tensors)
        for category, of_split in entry["labels"].items():
            for split, found in of_split.items():
                labels[category][split].update(found)
    ends = {split: np.cumsum([0] + [entry[split] for entry in entries]) for split in SPLITS}
    num_cells = {split: int(ends[split][-1]) for split in SPLITS}
    cells_of_table = np.zeros(plan.table_of_source.max() + 1, dtype=np.int64)
    for part, entry in zip(plan.parts(), entries, strict=True):
        cells_of_table[plan.table_of_source[part.source]] += entry["train"]
    first_of_part = {split: ends[split][:-1] for split in SPLITS}
    return Statistics(moments, histogram, counts, labels, num_cells, cells_of_table, first_of_part)
