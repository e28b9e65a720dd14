"""Files that are written: columns and matrices are added to a copy, and must fit its cells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.io import mmwrite

from perturbgene.data_utils import h5ad_writing
from perturbgene.errors import InputError
from tests.faults import full_disk


@pytest.mark.parametrize("end", ["h5ad", "zarr"])
def test_a_copy_gets_columns_and_a_matrix_that_is_in_a_file(write_h5ad, tmp_path, end):
    path, matrix = write_h5ad(np.eye(4)[:3]), np.arange(6, dtype=np.float32).reshape(3, 2)
    np.save(tmp_path / "matrix.npy", matrix)
    mapped = np.load(tmp_path / "matrix.npy", mmap_mode="r")
    label = pd.Categorical(["a", "b", "a"])
    target = tmp_path / f"out.{end}"
    h5ad_writing.write_copy(path, target, obs={"label": label}, obsm={"X_new": mapped}, uns={"run": "here"})
    copy = ad.read_h5ad(target) if end == "h5ad" else ad.read_zarr(target)
    assert copy.obs["label"].tolist() == ["a", "b", "a"]
    np.testing.assert_array_equal(copy.obsm["X_new"], matrix)


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


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_a_disk_that_is_full_at_any_byte_is_an_error_and_leaves_nothing(write_h5ad, make_adata, tmp_path, form):
    """HDF5 itself would end the process with SIGSEGV when it closes the file."""
    adata, source = make_adata(np.eye(4)[:3]), str(tmp_path / "in.zarr")
    if form == "zarr":
        adata.write_zarr(source)
    else:
        source = write_h5ad(adata)
    target, matrix = tmp_path / "out.h5ad", np.ones((3, 9000), dtype=np.float32)

    def write() -> None:
        h5ad_writing.write_copy(source, target, obs={"a": np.arange(3.0)}, obsm={"X_new": matrix}, uns={"run": "here"})

    write()
    size = target.stat().st_size
    target.unlink()
    for num_bytes in range(0, size, size // 23):
        with full_disk(num_bytes), pytest.raises(InputError, match="out.h5ad cannot be written .File too large"):
            write()
        assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


@pytest.fixture
def tenx_folder(write_h5ad, tmp_path):
    """A 10x matrix folder of three cells and four genes."""
    folder = tmp_path / "tenx"
    folder.mkdir()
    mmwrite(folder / "matrix.mtx", sparse.csc_matrix(np.eye(4)[:3].T))
    (folder / "barcodes.tsv").write_text("a\nb\nc\n")
    (folder / "features.tsv").write_text("".join(f"ENSG{g}\tgene_{g}\tGene Expression\n" for g in range(4)))
    return str(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
@pytest.mark.parametrize("form", ["h5ad", "zarr 2", "zarr 3", "10x folder"])
def test_the_ending_of_the_target_decides_the_form_whatever_the_source_is(
    write_h5ad, make_adata, tenx_folder, tmp_path, form, ending
):
    adata = make_adata(np.eye(4)[:3], obs={"sex": pd.Categorical(["m", "f", "m"])})
    source = {"h5ad": write_h5ad(adata), "10x folder": tenx_folder}.get(form, str(tmp_path / "in.zarr"))
    if form.startswith("zarr"):
        with ad.settings.override(zarr_write_format=int(form[-1])):
            adata.write_zarr(source)
    target = tmp_path / f"out.{ending}"
    for answer in (["x", "y", "z"], ["a", "b", "a"]):  # the second replaces the first
        h5ad_writing.write_copy(
            source, target, obs={"label": pd.Categorical(answer), "p": np.arange(3.0)},
            obsm={"X_new": np.arange(6.0).reshape(3, 2)}, uns={"run": "here"},
        )  # fmt: skip
    copy = ad.read_h5ad(target) if ending == "h5ad" else ad.read_zarr(target)
    assert [*copy.obs.columns] == [*(["sex"] if form != "10x folder" else []), "label", "p"]
    assert copy.obs["label"].tolist() == ["a", "b", "a"] and copy.uns["perturbgene"] == {"run": "here"}
    np.testing.assert_array_equal(copy.obsm["X_new"], np.arange(6.0).reshape(3, 2))
    np.testing.assert_array_equal(copy.X.toarray(), np.eye(4)[:3])
    assert not list(tmp_path.glob(".out*")), "no temporary file is left"
