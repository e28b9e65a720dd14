"""Library sizes and log1p counts per 10,000, checked against scanpy."""

import anndata as ad
import numpy as np
import scanpy
from scipy import sparse

from perturbgene.data_utils.scale import count_thresholds, library_sizes, log1p_cp10k


def test_library_sizes_sum_each_cell_also_when_cells_are_empty() -> None:
    sizes = library_sizes(np.array([1, 2, 3, 250, 250], np.uint8), np.array([0, 0, 3, 3, 5, 5]))
    assert sizes.tolist() == [0.0, 6.0, 0.0, 500.0, 0.0]


def test_no_cell_has_no_library_size() -> None:
    assert library_sizes(np.zeros(0), np.zeros(1, np.int64)).tolist() == []


def test_log1p_cp10k_is_what_scanpy_computes() -> None:
    counts_ng = np.random.default_rng(0).poisson(2.0, size=(9, 7)).astype(np.float64)
    cells = ad.AnnData(sparse.csr_matrix(counts_ng))
    scanpy.pp.normalize_total(cells, target_sum=1e4)
    scanpy.pp.log1p(cells)
    ours = log1p_cp10k(counts_ng, counts_ng.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(ours, cells.X.toarray(), rtol=1e-6)


def test_a_count_that_reaches_an_edge_in_exact_arithmetic_reaches_its_threshold() -> None:
    library_size, counts = 20_000.0, np.arange(1.0, 50.0)
    edges = np.log1p(counts * 1e4 / library_size)
    assert (counts >= count_thresholds(edges) * library_size).all()
    assert (counts - 1e-3 < count_thresholds(edges) * library_size).all()
