"""Every form in which cells come: read with the tokens of the plain h5ad file, or refused by what it is."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse
from scipy.io import mmwrite

from perturbgene.data_utils.opening import as_sources, expand_paths, one_source, open_source
from perturbgene.data_utils.sources import H5adFile, StoredCells, TenxFile, ZarrFile
from perturbgene.data_utils.tokenization import GeneTokenizer
from perturbgene.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def counts() -> ad.AnnData:
    """Forty cells with counts of the four genes, named as Cell Ranger does."""
    values = np.random.default_rng(0).poisson(1.5, size=(40, 4)).astype(np.float32)
    values[3] = 0
    names = [f"CELL{row:02d}-1" for row in range(40)]
    obs = pd.DataFrame({"sex": pd.Categorical(["male", "female"] * 20)}, index=names)
    var = pd.DataFrame({"gene_ids": [f"ENSG0000000000{g}" for g in range(4)]}, index=["CD3E", "MS4A1", "NKG7", "LYZ"])
    return ad.AnnData(sparse.csr_matrix(values), obs=obs, var=var.assign(feature_types="Gene Expression"))


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., GeneTokenizer]) -> GeneTokenizer:
    return make_tokenizer(normalization="log1p_cp10k", bin_edges=[7.5, 8.0, 8.5])


def tokens(source: Any, tokenizer: GeneTokenizer) -> tuple[list[int], list[int], list[int]]:
    """Return the tokens, types and offsets of all cells of a source, labels included where it has some."""
    shard = tokenizer.open(source if hasattr(source, "read_rows") else open_source(source))
    block = tokenizer.tokenize_block(shard.read(np.arange(len(shard))))
    return block.input_ids_l.tolist(), block.token_type_ids_l.tolist(), block.offsets_n1.tolist()


def write_10x(path: Path, adata: ad.AnnData, *, version: int = 3, **features: Any) -> None:
    """Write what Cell Ranger 3 (or 2) writes."""
    with h5py.File(path, "w") as file:
        group, matrix = file.create_group("matrix" if version == 3 else "GRCh38"), sparse.csr_matrix(adata.X)
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"], group["barcodes"] = np.array(matrix.shape[::-1]), np.array(adata.obs_names, dtype="S")
        ids, names = np.array(adata.var["gene_ids"], dtype="S"), np.array(adata.var_names, dtype="S")
        if version == 2:
            group["genes"], group["gene_names"] = ids, names
            return
        kinds = {"id": ids, "name": names, "feature_type": np.array(adata.var["feature_types"], dtype="S")}
        for name, values in {**kinds, "genome": np.array(["GRCh38"] * len(ids), dtype="S"), **features}.items():
            group[f"features/{name}"] = values


def write_mtx(folder: Path, adata: ad.AnnData, *, end: str = "", genes: str = "features.tsv", columns: int = 3) -> None:
    """Write a 10x matrix folder, compressed as by Cell Ranger 3 or plain as by STARsolo and Cell Ranger 2."""
    folder.mkdir()
    rows = list(zip(adata.var["gene_ids"], adata.var_names, adata.var["feature_types"], strict=True))
    rows = [(name,) for _, name, _ in rows] if columns == 1 else [row[:columns] for row in rows]
    mmwrite(folder / "matrix.mtx", sparse.csc_matrix(adata.X.T).astype(int))
    texts = {"barcodes.tsv": "\n".join(adata.obs_names) + "\n", genes: "".join("\t".join(row) + "\n" for row in rows)}
    for name, text in {"matrix.mtx": (folder / "matrix.mtx").read_text(), **texts}.items():
        (folder / name).unlink(missing_ok=True)
        (folder / f"{name}{end}").write_bytes(gzip.compress(text.encode()) if end else text.encode())


# -- the same tokens, however the cells come -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
@pytest.mark.parametrize(
    ("version", "shards"), [(2, None), (3, None), (3, 64)], ids=["zarr 2", "zarr 3", "zarr 3, sharded"]
)
def test_a_zarr_store_gives_the_tokens_of_the_h5ad_file(
    counts: ad.AnnData, tokenizer: GeneTokenizer, tmp_path: Path, version: int, shards: int | None, kind: Any
) -> None:
    counts.write_h5ad(tmp_path / "in.h5ad")
    counts.X = kind(counts.X.toarray())
    with ad.settings.override(zarr_write_format=version):
        if shards is None:
            counts.write_zarr(tmp_path / "in.zarr")
        else:
            write_sharded(tmp_path / "in.zarr", counts)
    expected = tokens(tmp_path / "in.h5ad", tokenizer)
    assert tokens(tmp_path / "in.zarr", tokenizer) == expected
    source = open_source(tmp_path / "in.zarr")
    assert isinstance(source, ZarrFile) and source.shape == (40, 4)
    pieces = [source.read_rows(start, start + 7)[0] for start in (33, 0, 7, 14, 5)]
    plain = H5adFile(str(tmp_path / "in.h5ad"))
    assert [piece.tolist() for piece in pieces] == [
        plain.read_rows(start, start + 7)[0].tolist() for start in (33, 0, 7, 14, 5)
    ]


def write_sharded(path: Path, adata: ad.AnnData) -> None:
    """Write a zarr store of version 3 with several chunks in each shard."""

    def sharded(write: Any, store: Any, name: str, elem: Any, dataset_kwargs: Any, iospec: Any) -> None:
        options = {"chunks": (4,), "shards": (16,)} if name.endswith(("X", "data", "indices")) else {}
        is_flat = getattr(elem, "ndim", 1) == 1 or sparse.issparse(elem)
        write(store, name, elem, dataset_kwargs=options if is_flat else {"chunks": (2, 4), "shards": (4, 4)})

    with ad.settings.override(zarr_write_format=3):
        ad.experimental.write_dispatched(zarr.open_group(path, mode="w", zarr_format=3), "/", adata, sharded)


@pytest.mark.parametrize("version", [2, 3])
def test_a_10x_file_gives_the_tokens_of_the_h5ad_file(
    counts: ad.AnnData, tokenizer: GeneTokenizer, tmp_path: Path, version: int
) -> None:
    write_10x(tmp_path / "filtered.h5", counts, version=version)
    source = open_source(tmp_path / "filtered.h5")
    assert isinstance(source, TenxFile)
    del counts.obs["sex"]
    counts.write_h5ad(tmp_path / "in.h5ad")
    assert tokens(source, tokenizer) == tokens(tmp_path / "in.h5ad", tokenizer)
    source.close()
    assert source.obs_names.tolist() == counts.obs_names.tolist()


def test_a_file_of_cellbender_is_read_as_10x(counts: ad.AnnData, tokenizer: GeneTokenizer, tmp_path: Path) -> None:
    write_10x(tmp_path / "out_filtered.h5", counts)
    with h5py.File(tmp_path / "out_filtered.h5", "r+") as file:
        file["droplet_latents/cell_probability"] = np.ones(40)
        file["global_latents/ambient_expression"] = np.full(4, 0.25)
        file["metadata/learning_curve_train_elbo"] = np.ones(3)
    assert tokens(tmp_path / "out_filtered.h5", tokenizer) == tokens(counts[:, :], without_labels(tokenizer))


def without_labels(tokenizer: GeneTokenizer) -> GeneTokenizer:
    return tokenizer.reading([])


@pytest.mark.parametrize(
    ("end", "genes", "columns"),
    [
        pytest.param(".gz", "features.tsv", 3, id="Cell Ranger 3"),
        pytest.param("", "genes.tsv", 2, id="Cell Ranger 2"),
        pytest.param("", "features.tsv", 3, id="STARsolo"),
        pytest.param("", "features.tsv", 1, id="names alone"),
    ],
)
def test_a_10x_matrix_folder_gives_the_tokens_of_the_h5ad_file(
    counts: ad.AnnData, tokenizer: GeneTokenizer, tmp_path: Path, end: str, genes: str, columns: int
) -> None:
    write_mtx(tmp_path / "matrix", counts, end=end, genes=genes, columns=columns)
    assert expand_paths(tmp_path / "matrix") == [str(tmp_path / "matrix")]
    assert tokens(tmp_path / "matrix", tokenizer) == tokens(counts, without_labels(tokenizer))


@pytest.mark.parametrize("where", ["X", "layer"])
@pytest.mark.parametrize(
    "form", ["dense", "CSR", "CSC", "csr_array", "csc_array", "float16", "dask dense", "dask CSR", "dask CSC"]
)
def test_cells_in_memory_give_the_tokens_of_the_h5ad_file(
    counts: ad.AnnData, tokenizer: GeneTokenizer, form: str, where: str
) -> None:
    expected, values = tokens(counts, tokenizer), counts.X.toarray()
    matrix = {
        "dense": lambda: values,
        "CSR": lambda: sparse.csr_matrix(values),
        "CSC": lambda: sparse.csc_matrix(values),
        "csr_array": lambda: sparse.csr_array(values),
        "csc_array": lambda: sparse.csc_array(values),
        "float16": lambda: values.astype(np.float16),
        "dask dense": lambda: lazy(values),
        "dask CSR": lambda: lazy(values).map_blocks(sparse.csr_matrix),
        "dask CSC": lambda: lazy(values).map_blocks(sparse.csc_matrix),
    }[form]()
    if where == "layer":
        counts.layers["counts"], counts.X = matrix, None
        assert tokens(open_source(counts, layer="counts"), tokenizer) == expected
        return
    counts.X = matrix
    assert tokens(counts, tokenizer) == expected
    assert tokens(counts[np.arange(40)], tokenizer) == expected, "a view"


def lazy(values: np.ndarray) -> Any:
    array = pytest.importorskip("dask.array")
    return array.from_array(values, chunks=(15, -1))


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def test_backed_cells_give_the_tokens_of_the_h5ad_file(
    counts: ad.AnnData, tokenizer: GeneTokenizer, tmp_path: Path, kind: Any
) -> None:
    expected = tokens(counts, tokenizer)
    counts.X = kind(counts.X.toarray())
    counts.write_h5ad(tmp_path / "in.h5ad")
    backed = ad.read_h5ad(tmp_path / "in.h5ad", backed="r")
    assert tokens(backed, tokenizer) == expected
    assert tokens(backed[np.arange(40)], tokenizer) == expected, "a view of a backed file"


def test_every_source_gives_all_its_cells_as_anndata(counts: ad.AnnData, tmp_path: Path) -> None:
    counts.write_h5ad(tmp_path / "in.h5ad")
    counts.write_zarr(tmp_path / "in.zarr")
    write_10x(tmp_path / "in.h5", counts)
    write_mtx(tmp_path / "in", counts)
    for name in ("in.h5ad", "in.zarr", "in.h5", "in"):
        cells = open_source(one_source(tmp_path / name)).to_adata()
        assert (cells.X != counts.X).nnz == 0 and [*cells.var_names] == [*counts.var_names], name


# -- paths ---------------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_h5ad_files_and_zarr_stores(counts: ad.AnnData, tmp_path: Path) -> None:
    counts.write_h5ad(tmp_path / "s_2.h5ad")
    counts.write_zarr(tmp_path / "s_1.zarr")
    for pattern in ("", "s_*", "{s_1.zarr,s_2.h5ad}"):
        assert [Path(path).name for path in expand_paths(tmp_path / pattern)] == ["s_1.zarr", "s_2.h5ad"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param(["filtered_feature_bc_matrix.h5"], "but 'filtered_feature_bc_matrix.h5'", id="Cell Ranger's outs"),
        pytest.param(
            ["a_matrix.mtx.gz", "b_matrix.mtx.gz"], "but several 10x matrices", id="matrices of several samples"
        ),
    ],
)
def test_a_folder_of_something_else_says_what_it_holds(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match=f"holds no .h5ad file and no .zarr store, {message}"):
        expand_paths(tmp_path)


# -- refused by what it is -----------------------------------------------------------------------------------------


def _loom(file: h5py.File) -> None:
    file["matrix"] = np.eye(3)
    file.create_group("row_attrs"), file.create_group("col_attrs")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.h5ad.gz", gzip.compress(b"x"), "compressed with gzip.* gunzip .*a.h5ad.gz", id="gzipped h5ad"),
        pytest.param("a.csv", b"cell,CD3E\nc,1\n", 'table of text.*read_csv.*"a.h5ad"', id="csv"),
        pytest.param("a.csv.gz", gzip.compress(b"cell,CD3E\n"), "table of text.*read_csv", id="gzipped csv"),
        pytest.param("a.tsv", b"cell\tCD3E\n", "table of text.*read_table", id="tsv"),
        pytest.param("a.parquet", b"PAR1....PAR1", "Parquet.*read_parquet", id="parquet"),
        pytest.param("a.rds", gzip.compress(b"X\n\0\0\0\3"), "an R object.*readRDS", id="rds"),
        pytest.param("a.RData", b"RDX3\nX\n", "an R object.*readRDS", id="RData"),
        pytest.param("a.pkl", b"\x80\x04\x95", "pickle, which may run code", id="pickle"),
        pytest.param("cells.bin", b"\x80\x05\x95", "pickle, which may run code", id="pickle by its bytes"),
        pytest.param("a.pt", b"PK\x03\x04", "a file of PyTorch", id="PyTorch"),
        pytest.param("m.mtx", b"%%MatrixMarket matrix", "without names.*barcodes.tsv.*read_mtx", id="matrix alone"),
        pytest.param("m.mtx.gz", gzip.compress(b"%%MatrixMarket"), "without names.*read_mtx", id="gzipped matrix"),
        pytest.param("a.npz", b"PK\x03\x04", "without names of cells and genes", id="npz"),
        pytest.param("a.xlsx", b"PK\x03\x04", "an Excel sheet.*read_excel", id="Excel"),
        pytest.param("a.zarr.zip", b"PK\x03\x04", "a zip archive.*unzip", id="zipped zarr"),
        pytest.param("a.tar.gz", gzip.compress(b"x"), "an archive.*tar -xf", id="tar"),
        pytest.param("a.h5ad", b"version https://git-lfs.github.com/spec/v1", "Git LFS.*git lfs pull", id="LFS"),
        pytest.param("a.h5ad", b"<!DOCTYPE html><title>404", "a web page", id="web page"),
        pytest.param("a.h5", b"<html>", "a web page", id="web page called h5"),
        pytest.param("a.h5ad", b"", r"is empty \(0 bytes\)", id="empty"),
        pytest.param("a.h5ad", b"\x89HDF\r\n\x1a\n" + bytes(40), "truncated or damaged", id="truncated"),
        pytest.param("a.loom", _loom, "a Loom file.*read_loom", id="loom"),
        pytest.param("a.h5mu", lambda file: file.create_group("mod/rna"), "MuData.*mudata.read", id="h5mu"),
        pytest.param("a.h5seurat", lambda f: f.create_group("assays/RNA") and f.create_group("cell.names"),
                     "a Seurat file.*Convert", id="h5seurat"),
        pytest.param("a.h5", lambda file: file.create_group("images"), "not an AnnData .it has no /obs", id="other h5"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused_with_what_converts_it(
    tmp_path: Path, name: str, content: Any, message: str
) -> None:
    path = tmp_path / name
    if callable(content):
        with h5py.File(path, "w") as file:
            content(file)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        _ = open_source(one_source(path)).shape


def test_a_10x_file_without_types_of_features_is_refused_in_one_line(counts: ad.AnnData, tmp_path: Path) -> None:
    write_10x(tmp_path / "filtered.h5", counts)
    with h5py.File(tmp_path / "filtered.h5", "r+") as file:
        del file["matrix/features/feature_type"]
    with pytest.raises(InputError, match="looks like 10x, but cannot be read"):
        _ = open_source(tmp_path / "filtered.h5").shape


def test_a_10x_file_under_the_name_of_an_h5ad_file_is_named(counts: ad.AnnData, tmp_path: Path) -> None:
    write_10x(tmp_path / "filtered.h5ad", counts)
    with pytest.raises(InputError, match="is a 10x file by its content. Rename it to end in .h5"):
        _ = open_source(tmp_path / "filtered.h5ad").shape


@pytest.mark.parametrize(
    ("tops", "message"),
    [
        (["mod"], "MuData"),
        (["tables", "images"], "SpatialData store. Give a table inside it"),
        (["a"], "not an AnnData"),
    ],
    ids=["MuData", "SpatialData", "something else"],
)
def test_a_zarr_store_of_another_kind_is_refused(tmp_path: Path, tops: list[str], message: str) -> None:
    root = zarr.open_group(tmp_path / "a.zarr", mode="w")
    for top in tops:
        root.create_group(top)
    with pytest.raises(InputError, match=message):
        _ = open_source(one_source(tmp_path / "a.zarr")).shape


class MuData:
    """What is seen of a MuData from outside."""

    mod = {"rna": None, "prot": None}
    obs_names = var_names = ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(np.eye(3), r"a matrix \(ndarray of 3 x 3\) is no AnnData", id="numpy"),
        pytest.param(sparse.csr_matrix(np.eye(3)), r"a matrix \(csr_matrix of 3 x 3\)", id="sparse"),
        pytest.param(pd.DataFrame({"a": [1]}), r"a DataFrame is no AnnData.*anndata.AnnData\(table\)", id="DataFrame"),
        pytest.param(MuData(), r"MuData of 'rna', 'prot' is no AnnData.*mdata\[NAME\]", id="MuData"),
        pytest.param([ad.AnnData(np.eye(3)), "a.h5ad"], "str is no AnnData", id="AnnData and a path"),
        pytest.param([ad.AnnData(np.eye(3)), None], "NoneType is no AnnData", id="AnnData and nothing"),
        pytest.param(None, "NoneType is no AnnData, nor the path", id="nothing"),
        pytest.param(7, "int is no AnnData", id="a number"),
    ],
)
def test_an_object_that_is_no_anndata_is_refused_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_sources(data)


def test_several_anndata_are_sources_but_not_one_source() -> None:
    several = [ad.AnnData(np.eye(3)), ad.AnnData(np.eye(3))]
    assert as_sources(several) == several
    with pytest.raises(InputError, match="2 AnnData were given, but one is read. Join them with anndata.concat"):
        one_source(several)


# -- files that could not be written back, or would fill the memory ------------------------------------------------


def edited(counts: ad.AnnData, path: Path, change: Callable[[Any], Any]) -> StoredCells:
    """Write the cells, change the file, and return it unopened."""
    if path.suffix == ".zarr":
        counts.write_zarr(path)
        change(zarr.open_group(path, mode="r+", use_consolidated=False))
        zarr.consolidate_metadata(path)
        return ZarrFile(str(path))
    counts.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        change(file)
    return H5adFile(str(path))


def _from_the_future(file: Any) -> None:
    file["uns"].attrs["encoding-version"] = "9.0.0"


def _code_out_of_range(file: Any) -> None:
    file["obs/sex/codes"][3] = 7


@pytest.mark.parametrize("name", ["in.h5ad", "in.zarr"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_from_the_future, r"uns was written by a newer anndata \(encoding dict 9.0.0", id="B8 future"),
        pytest.param(_code_out_of_range, "obs/sex is damaged: codes from 0 to 7 for 2 categories", id="B47 codes"),
    ],
)
def test_what_no_one_could_read_back_is_refused_when_it_is_opened(
    counts: ad.AnnData, tmp_path: Path, name: str, change: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        _ = edited(counts, tmp_path / name, change).columns_of("obs")


def test_a_dense_matrix_that_claims_more_than_memory_is_refused_before_it_is_allocated(
    counts: ad.AnnData, tmp_path: Path
) -> None:
    def huge(file: h5py.File) -> None:
        del file["X"]
        file.create_dataset("X", shape=(10**7, 10**7), dtype="f4", chunks=(1000, 1000), fillvalue=1.0)

    path = tmp_path / "in.h5ad"
    file = edited(counts, path, huge)
    with pytest.raises(InputError, match="X claims 400,000 GB, but the file holds next to nothing"):
        file.read_rows(0, 1)
    with pytest.raises(InputError, match="X is stored dense and needs 400,000 GB of memory"):
        file.to_adata()
    assert path.stat().st_size < 1e6
