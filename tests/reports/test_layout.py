"""The map puts similar cells near each other, whatever is odd about them."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from perturbgene.reports.layout import umap_layout


def groups() -> tuple[np.ndarray, np.ndarray]:
    """Return 120 cells of four groups in eight dimensions, and the group of each."""
    rng, group_n = np.random.default_rng(0), np.arange(120) % 4
    return 6 * np.eye(8)[group_n] + rng.normal(size=(120, 8)), group_n


def test_cells_of_one_group_lie_together_and_the_same_seed_gives_the_same_map():
    points_nc, group_n = groups()
    places_n2 = umap_layout(points_nc)
    near_nj = NearestNeighbors(n_neighbors=5).fit(places_n2).kneighbors(return_distance=False)
    assert (group_n[near_nj] == group_n[:, None]).mean() > 0.97
    np.testing.assert_array_equal(places_n2, umap_layout(points_nc))


@pytest.mark.parametrize("num_cells", [0, 1, 2, 3, 10, 16, 40])
def test_few_cells_have_finite_places(num_cells):
    places_n2 = umap_layout(groups()[0][:num_cells])
    assert places_n2.shape == (num_cells, 2) and np.isfinite(places_n2).all()


def test_equal_cells_have_finite_places():
    assert np.isfinite(umap_layout(np.ones((50, 3)))).all()
