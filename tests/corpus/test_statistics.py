"""Gene moments by hand on three genes, merged in any order, and Seurat's dispersion against scanpy's."""

from itertools import pairwise

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
from scipy import sparse

from perturbgene.corpus.statistics import CountTable, GeneMoments, smooth_curve


def moments_of(values_ng: np.ndarray) -> GeneMoments:
    """Add all stored values at once."""
    matrix = sparse.csr_matrix(values_ng)
    moments = GeneMoments(values_ng.shape[1])
    moments.add(matrix.data, matrix.indices, num_cells=len(values_ng))
    return moments


@pytest.fixture(scope="module")
def log_cells() -> ad.AnnData:
    """The log-normalised cells that ship inside scanpy."""
    return sc.datasets.pbmc68k_reduced().raw.to_adata()


@pytest.fixture(scope="module")
def seurat(log_cells: ad.AnnData) -> np.ndarray:
    """Scanpy's normalised dispersions, shape (g,)."""
    frame = sc.pp.highly_variable_genes(log_cells, flavor="seurat", inplace=False)
    return frame.loc[log_cells.var_names, "dispersions_norm"].to_numpy(dtype=np.float64)


def test_sums_count_every_cell_and_only_expressed_values() -> None:
    moments = moments_of(np.array([[1.0, 0.0, 2.0], [3.0, 0.0, 0.0]]))
    assert moments.num_cells == 2
    assert moments.sum_g.tolist() == [4, 0, 2]
    assert moments.sum_squares_g.tolist() == [10, 0, 4]
    assert moments.num_expressed_g.tolist() == [2, 0, 1]


def test_stored_zeros_are_not_expressed() -> None:
    moments = GeneMoments(2)
    moments.add(np.array([0.0, 3.0]), np.array([0, 1]), num_cells=1)
    assert moments.num_expressed_g.tolist() == [0, 1]


def test_merged_parts_are_the_whole() -> None:
    values_ng = np.random.default_rng(0).poisson(1.0, (20, 5)).astype(float)
    whole, parts = moments_of(values_ng), [moments_of(values_ng[:7]), moments_of(values_ng[7:])]
    parts[1].merge(parts[0].tensors())
    assert parts[1].num_cells == whole.num_cells
    assert all(
        np.allclose(getattr(parts[1], f), getattr(whole, f)) for f in ("sum_g", "sum_squares_g", "num_expressed_g")
    )


def test_dispersions_are_those_of_scanpy_gene_for_gene(log_cells: ad.AnnData, seurat: np.ndarray) -> None:
    ours = moments_of(np.expm1(log_cells.X.toarray().astype(np.float64))).normalized_dispersion()
    np.testing.assert_allclose(ours, seurat, atol=1e-4)


def test_genes_are_ranked_as_scanpy_ranks_them(log_cells: ad.AnnData, seurat: np.ndarray) -> None:
    rank_g = moments_of(np.expm1(log_cells.X.toarray().astype(np.float64))).rank()
    assert sorted(rank_g) == list(range(len(seurat)))
    assert np.diff(seurat[rank_g]).max() < 1e-4  # falls all the way, but for ties in float32


def test_genes_without_a_dispersion_come_last_by_how_many_cells_express_them() -> None:
    values_ng = np.array([[0.0, 5.0, 2.0, 1.0, 0.0], [0.0, 5.0, 9.0, 3.0, 0.0], [0.0, 5.0, 0.0, 2.0, 0.0]])
    assert moments_of(values_ng).rank().tolist()[-3:] == [1, 0, 4]


def test_moments_of_no_cell_rank_genes_in_their_order() -> None:
    assert GeneMoments(3).rank().tolist() == [0, 1, 2]


def test_asking_for_dispersions_leaves_the_sums_alone() -> None:
    moments = moments_of(np.array([[1.0, 0.0], [3.0, 0.0]]))
    moments.normalized_dispersion()
    assert moments.sum_g.tolist() == [4, 0]


# -- counts -------------------------------------------------------------------------------------------------------


def table_of(values_ng: np.ndarray) -> CountTable:
    """Add all stored counts at once."""
    matrix = sparse.csr_matrix(values_ng)
    table = CountTable(values_ng.shape[1])
    table.add(matrix.data, matrix.indices)
    return table


@pytest.fixture(scope="module")
def counts_ng() -> np.ndarray:
    """Counts of 300 cells x 400 genes of all levels, some above 16 and some never seen."""
    generator = np.random.default_rng(0)
    level_g = np.exp(generator.normal(-1, 2, 400))
    level_g[:3] = 0
    return generator.poisson(level_g * generator.gamma(0.8, 1.25, (300, 400))).astype(float)


def test_variances_over_expectation_are_those_of_scanpys_seurat_v3_gene_for_gene(counts_ng: np.ndarray) -> None:
    adata = ad.AnnData(sparse.csr_matrix(counts_ng))
    frame = sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=100, inplace=False)
    ours = table_of(counts_ng).normalized_variance(len(counts_ng))
    varies_g = frame["variances"].to_numpy() > 0
    np.testing.assert_allclose(ours[varies_g], frame["variances_norm"].to_numpy()[varies_g], rtol=1e-8)
    rank_g = moments_of(counts_ng).rank(ours)[:100]
    assert set(rank_g) == set(np.flatnonzero(frame["highly_variable"].to_numpy()))


def test_tables_of_parts_merge_to_the_table_of_the_whole_in_any_order(counts_ng: np.ndarray) -> None:
    whole = table_of(counts_ng)
    for cuts in ((0, 100, 300), (0, 299, 300)):
        merged = CountTable(400)
        for first, last in reversed([*pairwise(cuts)]):
            merged.merge(table_of(counts_ng[first:last]).tensors())
        assert all(np.array_equal(merged.tensors()[name], whole.tensors()[name]) for name in whole.tensors())


def test_genes_that_do_not_vary_have_no_normalized_variance() -> None:
    found = table_of(np.array([[2.0, 0.0, 1.0, 3.0], [2.0, 0.0, 5.0, 2.0]])).normalized_variance(2)
    assert np.isnan(found).tolist() == [True, True, False, False]


# -- the curve of variance over mean ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_points", [5, 200], ids=["too few for loess", "loess"])
def test_a_parabola_is_its_own_curve_in_any_order_of_points(num_points: int) -> None:
    x_g = np.random.default_rng(0).permutation(np.linspace(-1, 2, num_points))
    np.testing.assert_allclose(smooth_curve(x_g, 3 * x_g**2 - x_g), 3 * x_g**2 - x_g, atol=1e-9)


@pytest.mark.parametrize("num_points", [0, 1, 2])
def test_a_few_points_are_their_own_curve(num_points: int) -> None:
    x_g = np.arange(num_points, dtype=float)
    np.testing.assert_allclose(smooth_curve(x_g, 5 - x_g), 5 - x_g)


def test_genes_of_a_handful_of_cells_are_ranked_although_loess_cannot_fit_them() -> None:
    generator = np.random.default_rng(0)
    counts_ng = generator.poisson(np.exp(generator.normal(-1, 2, 2000)) * generator.gamma(0.8, 1.25, (5, 2000)))
    score_g = table_of(counts_ng.astype(float)).normalized_variance(5)
    assert np.isfinite(score_g[counts_ng.var(axis=0) > 0]).all()


def test_cells_that_do_not_measure_a_gene_count_as_none_of_it() -> None:
    counts_ng = np.random.default_rng(0).poisson(3.0, (50, 40)).astype(float)
    padded_ng, measuring_g = np.vstack([counts_ng, np.zeros((30, 40))]), np.full(40, 50)
    expected = moments_of(counts_ng).normalized_dispersion()
    np.testing.assert_array_equal(moments_of(padded_ng).normalized_dispersion(measuring_g), expected)
    expected = table_of(counts_ng).normalized_variance(50)
    np.testing.assert_array_equal(table_of(padded_ng).normalized_variance(measuring_g), expected)
