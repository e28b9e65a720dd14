"""Clusters of cells, and the label that most cells of a cluster are given."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import perturbgene as pg
from perturbgene.cli.verbs import AnswerOptions
from perturbgene.errors import InputError
from perturbgene.inference.majority import clusters_of, majority
from perturbgene.main import main


def test_a_cell_without_answer_has_no_label_and_one_without_cluster_keeps_its_own() -> None:
    label_n, share_n = majority(np.array([1, 1, 0, -1, 2]), np.array([0, 0, 0, 0, -1]), num_labels=3)
    assert label_n.tolist() == [1, 1, 1, -1, 2]
    np.testing.assert_allclose(share_n, [2 / 3, 2 / 3, 2 / 3, np.nan, 1])


def test_of_equals_the_first_label_wins() -> None:
    assert majority(np.array([1, 0]), np.array([0, 0]), num_labels=2)[0].tolist() == [0, 0]


def blobs(num_cells: int) -> np.ndarray:
    """Return cells of three types far apart, shape (n, 5), in turn."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(num_cells, 5)) + 30 * (np.arange(num_cells) % 3)[:, None]


def test_no_cluster_mixes_cells_that_are_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("igraph")
    points_nc = blobs(300)
    points_nc[7] = np.nan
    found_n = clusters_of(points_nc)
    assert found_n[7] == -1 and found_n.min(initial=0, where=np.arange(300) != 7) == 0
    types_r = [set(np.flatnonzero(found_n == cluster) % 3) for cluster in range(found_n.max() + 1)]
    assert all(len(types) == 1 for types in types_r) and len(types_r) > 3
    np.testing.assert_array_equal(found_n, clusters_of(points_nc))
    monkeypatch.setattr("perturbgene.inference.majority.MOST_CLUSTERED", 100)
    sampled_n = clusters_of(points_nc)
    assert all(len(set(np.flatnonzero(sampled_n == one) % 3)) == 1 for one in range(sampled_n.max() + 1))
    assert (sampled_n >= 0).sum() == 299


def test_fewer_cells_than_neighbors_are_one_cluster() -> None:
    assert clusters_of(blobs(10)).tolist() == [0] * 10


# -- predict ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cells(small_folder: Path) -> ad.AnnData:
    """Cells with a column of clusters, one of them missing."""
    found = ad.read_h5ad(small_folder / "cells.h5ad")
    found.obs["my_clusters"] = found.obs["cell_type"].astype(str).replace({"B cell": "B/NK", "NK cell": "B/NK"})
    found.obs.loc[found.obs_names[:2], "my_clusters"] = None
    return found


def test_a_column_says_which_cells_vote_together(cells: ad.AnnData, small_folder: Path) -> None:
    found = pg.predict(cells, small_folder / "runs/mlm", ask=["cell_type"], majority_by="my_clusters").obs
    answers = found["predicted_cell_type"].astype(str)
    for name in ("B/NK", "monocyte"):
        rows = (found["my_clusters"] == name).to_numpy()
        counts = answers[rows].value_counts(normalize=True)
        assert set(found["majority_cell_type"][rows]) == {counts.index[0]}
        np.testing.assert_allclose(found["majority_cell_type_share"][rows], counts.iloc[0], rtol=1e-6)
    assert found["majority_cell_type"].astype(str)[:2].tolist() == answers[:2].tolist()


def test_cells_that_are_left_out_have_no_vote(cells: ad.AnnData, small_folder: Path, tmp_path: Path) -> None:
    cells.write_h5ad(tmp_path / "in.h5ad")
    words = ["predict", str(small_folder / "runs/mlm"), str(tmp_path / "in.h5ad"), "--ask", "cell_type"]
    words += ["--output", str(tmp_path / "out.h5ad"), "--where", "tissue=lung", "--abstain", "0.9"]
    assert main([*words, "--majority_by", "my_clusters"]) == 0
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    pd.testing.assert_series_equal(
        found.obs["majority_cell_type"].notna(), found.obs["tissue"] == "lung", check_names=False
    )
    assert "unknown" not in found.obs["majority_cell_type"].cat.categories
    assert found.uns["perturbgene"]["majority_by"] == "my_clusters"


def test_the_embedding_gives_clusters(cells: ad.AnnData, small_folder: Path) -> None:
    pytest.importorskip("igraph")
    found = pg.predict(cells, small_folder / "runs/mlm", ask=["cell_type"], majority_by="embedding").obs
    assert found.groupby("perturbgene_cluster", observed=True)["majority_cell_type"].nunique().eq(1).all()
    assert (found["majority_cell_type"].astype(str) == cells.obs["cell_type"].astype(str)).mean() > 0.9


def test_what_cannot_be_voted_on_is_refused(cells, small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no obs column 'my_cluster'. Did you mean 'my_clusters'?.*--majority_by"):
        pg.predict(cells, small_folder / "runs/mlm", majority_by="my_cluster")
    monkeypatch.setattr("perturbgene.cli.verbs.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package igraph. Install it with"):
        AnswerOptions(majority_by="embedding")
