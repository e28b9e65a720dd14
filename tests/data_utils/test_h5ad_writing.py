"""Files that are written: columns and matrices are added to a copy, block by block, and must fit its cells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from perturbgene.data_utils import h5ad_writing
from perturbgene.errors import InputError


def test_a_copy_gets_a_matrix_block_by_block_and_columns(write_h5ad, tmp_path, monkeypatch):
    monkeypatch.setattr(h5ad_writing, "COPIED_ROWS", 2)
    path, matrix = write_h5ad(np.eye(4)[:3]), np.arange(6, dtype=np.float32).reshape(3, 2)
    taken = []

    class Rows:
        shape, dtype = matrix.shape, matrix.dtype

        def __getitem__(self, rows):
            taken.append(rows)
            return matrix[rows]

    label = pd.Categorical(["a", "b", "a"])
    target = tmp_path / "out.h5ad"
    h5ad_writing.write_copy(path, target, obs={"label": label}, obsm={"X_new": Rows()}, uns={"run": "here"})
    copy = ad.read_h5ad(target)
    assert copy.obs["label"].tolist() == ["a", "b", "a"]
    np.testing.assert_array_equal(copy.obsm["X_new"], matrix)
    assert taken == [slice(0, 2), slice(2, 4)]


def test_a_matrix_must_fit_the_rows_of_the_file(write_h5ad, tmp_path):
    with pytest.raises(InputError, match="2 answers do not fit the 3 cells"):
        h5ad_writing.write_copy(
            write_h5ad(np.eye(4)[:3]), tmp_path / "out.h5ad", obsm={"X_new": np.zeros((2, 2))}, uns={}
        )


def test_a_column_must_fit_the_rows_of_the_file(write_h5ad, tmp_path):
    with pytest.raises(InputError, match="2 answers do not fit the 3 cells"):
        h5ad_writing.write_copy(
            write_h5ad(np.eye(4)[:3]), tmp_path / "out.h5ad", obs=pd.DataFrame({"a": np.zeros(2)}), uns={}
        )
    assert not list(tmp_path.glob("*out.h5ad*")), "neither the target nor a temporary file is left"
