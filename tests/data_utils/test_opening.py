"""Files as they come: paths and patterns, every way a matrix can be stored, and every way a file can be broken."""

import gzip
import os
import pickle
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from perturbgene.data_utils import sources
from perturbgene.data_utils.chosen_cells import ChosenCells
from perturbgene.data_utils.opening import expand_braces, expand_paths, open_source
from perturbgene.data_utils.sources import H5adFile, MemoryFile
from perturbgene.errors import InputError

Write = Callable[..., str]

VALUES = np.array([[1, 0, 2, 0], [0, 0, 0, 0], [0, 3, 0, 4]], dtype=np.float32)


def dense(rows: tuple[np.ndarray, np.ndarray, np.ndarray], num_columns: int = 4) -> list[list[float]]:
    """Spell CSR rows as a table."""
    values, columns, offsets = rows
    return sparse.csr_matrix((values, columns, offsets), shape=(len(offsets) - 1, num_columns)).toarray().tolist()


# -- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        pytest.param("a.h5ad", ["a.h5ad"], id="no brace"),
        pytest.param("s_{0..2}", ["s_0", "s_1", "s_2"], id="range"),
        pytest.param("s_{08..10}", ["s_08", "s_09", "s_10"], id="padded range"),
        pytest.param("s_{2..0}", ["s_2", "s_1", "s_0"], id="descending range"),
        pytest.param("{a,b}_{1..2}", ["a_1", "a_2", "b_1", "b_2"], id="two braces"),
        pytest.param("s_{x", ["s_{x"], id="open brace"),
    ],
)
def test_brace_patterns_expand_as_in_a_shell(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


@pytest.mark.parametrize("pattern", ["{0..999999999}", "{0..9999}{0..9999}"], ids=["one range", "a product"])
def test_a_pattern_of_too_many_files_is_refused_at_once(pattern: str) -> None:
    with pytest.raises(InputError, match="more than 100,000 files"):
        expand_braces(pattern)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("s_1.h5ad", "s_2.h5ad", "s_10.h5ad", "notes.txt"):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize("pattern", ["", "s_*.h5ad", "s_{1,2,10}.h5ad"], ids=["folder", "glob", "braces"])
def test_folders_globs_and_braces_give_shards_in_counting_order(folder: Path, pattern: str) -> None:
    assert [Path(path).name for path in expand_paths(folder / pattern)] == ["s_1.h5ad", "s_2.h5ad", "s_10.h5ad"]


def test_a_list_of_files_is_not_expanded_again(folder: Path) -> None:
    files = expand_paths(folder)
    (folder / "s_1.h5ad").unlink()
    assert expand_paths(files) is files


def test_a_glob_that_matches_folders_gives_their_shards(folder: Path) -> None:
    (folder / "train").mkdir()
    (folder / "s_1.h5ad").rename(folder / "train" / "s_1.h5ad")
    assert expand_paths(str(folder / "tr*n")) == [str(folder / "train" / "s_1.h5ad")]


def test_a_file_whose_name_looks_like_a_glob_is_taken_as_it_is(folder: Path) -> None:
    (folder / "a[1].h5ad").write_text("")
    assert expand_paths(folder / "a[1].h5ad") == [str(folder / "a[1].h5ad")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        pytest.param("none.h5ad", "none.h5ad .*does not exist", id="missing file"),
        pytest.param("s_{1..3}.h5ad", "s_3.h5ad .*does not exist", id="a brace beyond the last shard"),
        pytest.param("x*.h5ad", "does not exist", id="a glob that matches nothing"),
    ],
)
def test_the_first_missing_path_is_named(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        expand_paths(folder / pattern)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.h5ad file"):
        expand_paths(tmp_path)


def test_no_path_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="no input file was given"):
        expand_paths([])


@pytest.mark.parametrize("link", [None, os.symlink, os.link], ids=["the same path", "symbolic link", "hard link"])
def test_the_same_file_twice_is_refused(folder: Path, link: Callable[[Path, Path], None] | None) -> None:
    twin = folder / "s_1.h5ad"
    if link is not None:
        twin = folder / "twin.h5ad"
        link(folder / "s_1.h5ad", twin)
    with pytest.raises(InputError, match="is the same file as"):
        expand_paths([folder / "s_1.h5ad", twin])


# -- matrices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def test_rows_are_read_alike_however_the_matrix_is_stored(write_h5ad: Write, make_adata: Any, kind: Any) -> None:
    adata = make_adata(VALUES)
    adata.X = kind(VALUES)
    file = H5adFile(write_h5ad(adata))
    assert file.shape == (3, 4)
    assert dense(file.read_rows(0, 3)) == VALUES.tolist()
    assert dense(file.read_rows(1, 3)) == VALUES[1:].tolist()


def test_an_empty_row_range_is_empty(write_h5ad: Write) -> None:
    values, columns, offsets = H5adFile(write_h5ad(VALUES)).read_rows(1, 1)
    assert (len(values), len(columns), offsets.tolist()) == (0, 0, [0])


@pytest.fixture
def layered(make_adata: Any) -> ad.AnnData:
    """X holds ones, the layer twos, and .raw threes over two more genes."""
    wide = make_adata(np.full((3, 6), 3.0), genes=[*"ABCDEF"])
    adata = wide[:, :4].copy()
    adata.raw = wide
    adata.X = np.ones((3, 4))
    adata.layers["counts"] = sparse.csr_matrix(np.full((3, 4), 2.0))
    return adata


@pytest.mark.parametrize(
    ("layer", "value", "genes"),
    [(None, 1.0, "ABCD"), ("counts", 2.0, "ABCD"), ("raw", 3.0, "ABCDEF")],
    ids=["X", "a layer", ".raw"],
)
@pytest.mark.parametrize("where", ["file", "memory", "backed"])
def test_the_layer_chooses_the_matrix_and_its_genes(
    write_h5ad: Write, layered: ad.AnnData, where: str, layer: str | None, value: float, genes: str
) -> None:
    path = write_h5ad(layered)
    sources = {"file": H5adFile(path, layer), "memory": MemoryFile(layered, layer)}
    source = sources[where] if where in sources else MemoryFile(ad.read_h5ad(path, backed="r"), layer)
    assert source.shape == (3, len(genes))
    assert "".join(source.var_names) == genes
    assert dense(source.read_rows(0, 3), len(genes)) == np.full((3, len(genes)), value).tolist()


def test_a_view_keeps_its_rows_in_raw_too(layered: ad.AnnData) -> None:
    layered.raw.X[2, 0] = 9.0
    assert dense(MemoryFile(layered[[2]], "raw").read_rows(0, 1), 6) == [[9.0, 3.0, 3.0, 3.0, 3.0, 3.0]]


@pytest.mark.parametrize("where", ["file", "memory"])
@pytest.mark.parametrize("layer", ["raw", "counts"])
def test_a_matrix_that_is_not_there_is_refused_from_the_first_question(
    write_h5ad: Write, make_adata: Any, where: str, layer: str
) -> None:
    source = H5adFile(write_h5ad(VALUES), layer) if where == "file" else MemoryFile(make_adata(VALUES), layer)
    for question in ("var_names", "shape"):
        with pytest.raises(InputError, match="has no"):
            getattr(source, question)
            source.read_rows(0, 1)


def test_a_file_without_x_names_the_layers_it_has(write_h5ad: Write, layered: ad.AnnData) -> None:
    layered.X = None
    with pytest.raises(InputError, match="has no matrix 'X', but has: 'raw', 'counts'"):
        H5adFile(write_h5ad(layered)).read_rows(0, 1)


def test_an_adata_without_x_is_refused(layered: ad.AnnData) -> None:
    layered.X = None
    with pytest.raises(InputError, match="it is None"):
        MemoryFile(layered).read_rows(0, 1)


# -- obs and var ---------------------------------------------------------------------------------------------------


def test_columns_come_with_their_dtypes(write_h5ad: Write) -> None:
    obs = {
        "label": pd.Categorical(["B", None, "T"]),
        "age": pd.array([1, pd.NA, 3], dtype="Int64"),
        "smoker": pd.array([True, pd.NA, False], dtype="boolean"),
        "score": [0.5, np.nan, 1.0],
    }
    file = H5adFile(write_h5ad(VALUES, obs=obs))
    assert file.columns_of("obs") == [*obs]
    for column, values in obs.items():
        pd.testing.assert_series_equal(file.obs_column(column), pd.Series(values), check_names=False)


def test_columns_of_every_form_are_those_that_anndata_reads(write_h5ad: Write) -> None:
    forms = {
        "whole": [3, 1, 2],
        "real": [0.5, np.nan, 2.0],
        "flag": [True, False, True],
        "text": ["B", "", "T \u00e9"],
        "labels": pd.Categorical(["T", None, "B"]),
        "ordered": pd.Categorical(["low", "high", "low"], categories=["low", "high"], ordered=True),
        "numbers": pd.Categorical([2, 1, 2]),
        "flags": pd.Categorical([True, False, True]),
        "no label": pd.Categorical([None, None, None], categories=["B"]),
        "nullable": pd.array([1, None, 2], dtype="Int64"),
        "nullable flag": pd.array([True, None, False], dtype="boolean"),
    }
    path = write_h5ad(VALUES, obs=forms)
    with closing(H5adFile(path)) as file:
        expected = ad.read_h5ad(path).obs
        for name in forms:
            pd.testing.assert_series_equal(
                file.obs_column(name), expected[name].reset_index(drop=True), check_names=False
            )
        assert file.obs_names.tolist() == expected.index.tolist()
        assert file.columns_of("obs") == [*forms]


def test_a_misspelt_column_names_the_nearest(write_h5ad: Write) -> None:
    with pytest.raises(InputError, match="no obs column 'celltype'. Did you mean 'cell_type'"):
        H5adFile(write_h5ad(VALUES, obs={"cell_type": ["B", "T", "B"]})).obs_column("celltype")


def test_one_of_two_columns_of_the_same_name_is_not_guessed() -> None:
    adata = ad.AnnData(VALUES, obs=pd.DataFrame({"cell_type": ["B", "T", "B"], "other": "x"}, index=list("abc")))
    adata.obs.columns = ["cell_type", "cell_type"]
    with pytest.raises(InputError, match="more than one obs column 'cell_type'. Rename all but one"):
        MemoryFile(adata).obs_column("cell_type")


def _as_encoding_0_1(path: str) -> None:
    """Rewrite obs["label"] as anndata 0.7 kept categories: codes, and `__categories` next to them."""
    with h5py.File(path, "r+") as file:
        del file["obs/label"]
        file["obs"].attrs["encoding-version"] = "0.1.0"
        file["obs/label"] = np.array([1, -1, 0], dtype=np.int8)
        file["obs/__categories/label"] = np.array([b"B", b"T"])
        file["obs/__categories/label"].attrs["ordered"] = False
        file["obs/label"].attrs["categories"] = file["obs/__categories/label"].ref


def test_categories_of_anndata_0_7_are_labels_and_not_codes(write_h5ad: Write) -> None:
    path = write_h5ad(VALUES, obs={"label": pd.Categorical(["T", None, "B"])})
    _as_encoding_0_1(path)
    assert H5adFile(path).obs_column("label").tolist() == ["T", np.nan, "B"]


@pytest.fixture
def compound_path(tmp_path: Path) -> str:
    """A file as anndata 0.6 wrote it: obs and var are tables, categories lie in uns."""
    path = tmp_path / "old.h5ad"
    with h5py.File(path, "w") as file:
        file["X"] = VALUES
        file["obs"] = np.array([(b"c0", 1), (b"c1", -1), (b"c2", 0)], dtype=[("index", "S2"), ("label", "i1")])
        file["var"] = np.array([(b"A",), (b"B",), (b"C",), (b"D",)], dtype=[("index", "S1")])
        file["uns/label_categories"] = np.array([b"B", b"T"])
    return str(path)


def test_tables_of_anndata_0_6_give_names_and_labels(compound_path: str) -> None:
    file = H5adFile(compound_path)
    assert file.var_names.tolist() == [*"ABCD"]
    assert file.obs_names.tolist() == ["c0", "c1", "c2"]
    assert file.obs_column("label").tolist() == ["T", np.nan, "B"]


# -- broken files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", r"is empty \(0 bytes\)", id="empty file"),
        pytest.param(b"hello", "a file that begins with b'hello'", id="text"),
        pytest.param(gzip.compress(b"hello"), "unpack it with gunzip", id="gzip"),
        pytest.param(b"<!DOCTYPE html><title>404</title>", "a web page", id="web page"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "cells.h5ad"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        _ = H5adFile(str(path)).shape


def test_a_missing_file_is_not_called_broken(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        _ = H5adFile(str(tmp_path / "none.h5ad")).shape


def test_a_file_that_is_cut_off_while_it_is_read_is_refused(write_h5ad: Write) -> None:
    path = write_h5ad(np.ones((5000, 4), dtype=np.float32))
    with h5py.File(path, "r+") as file:
        for name in ("X/data", "X/indices"):  # without chunks, as in a corpus
            values = file[name][:]
            del file[name]
            file[name] = values
    with closing(H5adFile(path)) as source:
        assert source.read(np.array([0, 4999])).values_l.tolist() == [1.0] * 8
        os.truncate(path, 20_000)
        for rows in (np.array([0, 4999]), np.arange(4990, 5000)):
            with pytest.raises(InputError, match=r"rows \d+\.\.4999 cannot be read \(it ends before .*changes while"):
                source.read(rows)


def test_a_truncated_file_is_refused(write_h5ad: Write) -> None:
    path = Path(write_h5ad(VALUES))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="truncated or damaged"):
        _ = H5adFile(str(path)).shape


def _edit(path: str, change: Callable[[h5py.File], Any]) -> H5adFile:
    with h5py.File(path, "r+") as file:
        change(file)
    return H5adFile(path)


def _replace(name: str, values: Any) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        dtype = values.dtype if isinstance(values, np.ndarray) else file[name].dtype
        del file[name]
        file[name] = np.asarray(values, dtype=dtype)

    return change


def _external(name: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = h5py.ExternalLink("other.h5ad", name)

    return change


def _virtual(file: h5py.File) -> None:
    del file["X/data"]
    layout = h5py.VirtualLayout(shape=(4,), dtype="f4")
    layout[:] = h5py.VirtualSource("other.h5ad", "X/data", shape=(4,))
    file["X"].create_virtual_dataset("data", layout)


def _stored_outside(file: h5py.File) -> None:
    del file["X/data"]
    file["X"].create_dataset("data", shape=(4,), dtype="f4", external=[("/etc/hostname", 0, 16)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda file: file.pop("var"), "has no /var", id="no var"),
        pytest.param(lambda file: file.pop("obs"), "has no /obs", id="no obs"),
        pytest.param(lambda file: (file.pop("X"), file.create_group("mod/rna")), "MuData", id="MuData"),
        pytest.param(_external("X"), "links 'X' to another place", id="external link at the top"),
        pytest.param(_external("X/data"), "links 'X/data' to another place", id="external link within X"),
        pytest.param(_external("obs/_index"), "links 'obs/_index' to another place", id="external link within obs"),
        pytest.param(_virtual, "X/data.* in another file", id="virtual data set"),
        pytest.param(_stored_outside, "X/data.* in another file", id="external storage"),
        pytest.param(lambda file: file["X"].attrs.pop("shape"), "does not say its shape", id="no shape"),
        pytest.param(lambda file: file["X"].attrs.update({"encoding-type": "coo"}), "encoding coo 0.1.0", id="coo"),
        pytest.param(_replace("X/indptr", [0, 2, 1, 4]), "indptr is damaged", id="offsets that fall"),
        pytest.param(
            _replace("X/indptr", np.uint64([0, 2, 1, 4])), "indptr is damaged", id="unsigned offsets that fall"
        ),
        pytest.param(_replace("X/indptr", [0, 2, 2, 99]), "indptr is damaged", id="offsets beyond the data"),
        pytest.param(_replace("X/indptr", [0, 2, 2, -5]), "indptr is damaged", id="overflown offsets"),
        pytest.param(_replace("X/indptr", [0, 4]), "indptr is damaged", id="too few offsets"),
        pytest.param(_replace("X/indptr", []), "indptr is damaged", id="no offsets"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(write_h5ad: Write, change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _edit(write_h5ad(VALUES), change).read_rows(0, 3)


@pytest.mark.parametrize(
    ("indices", "indptr"),
    [
        pytest.param([0, 99, 0, 2], [0, 1, 2, 3, 4], id="row beyond the last"),
        pytest.param([0, -1, 0, 2], [0, 1, 2, 3, 4], id="negative row"),
        pytest.param([0, 2, 0, 2], [0, 3, 2, 3, 4], id="offsets that fall"),
    ],
)
def test_a_damaged_csc_matrix_is_refused(
    write_h5ad: Write, make_adata: Any, indices: list[int], indptr: list[int]
) -> None:
    adata = make_adata(VALUES)
    adata.X = sparse.csc_matrix(VALUES)
    path = write_h5ad(adata)
    file = _edit(path, lambda file: (_replace("X/indices", indices)(file), _replace("X/indptr", indptr)(file)))
    with pytest.raises(InputError, match="X is damaged"):
        file.read_rows(0, 3)


def test_a_csr_matrix_in_memory_with_falling_offsets_is_refused(make_adata: Any) -> None:
    adata = make_adata(VALUES)
    adata.X.indptr[1] = 3
    with pytest.raises(InputError, match="damaged"):
        MemoryFile(adata).read_rows(0, 3)


def test_a_broken_file_is_refused_every_time_it_is_asked(write_h5ad: Write) -> None:
    file = _edit(write_h5ad(VALUES), lambda file: file.pop("var"))
    for _ in range(2):
        with pytest.raises(InputError, match="has no /var"):
            file.read_rows(0, 1)


def test_a_corrupt_compressed_chunk_names_the_rows(tmp_path: Path, make_adata: Any) -> None:
    path = tmp_path / "cells.h5ad"
    values = np.random.default_rng(0).random((200, 4)).astype(np.float32)
    make_adata(values).write_h5ad(path, compression="gzip")
    with h5py.File(path) as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset + 20 : chunk.byte_offset + 60] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"rows 0\.\.9 cannot be read"):
        H5adFile(str(path)).read_rows(0, 10)


# -- processes -----------------------------------------------------------------------------------------------------


def test_a_file_opened_before_a_fork_is_opened_again_in_the_child(write_h5ad: Write) -> None:
    file = H5adFile(write_h5ad(VALUES))
    assert dense(file.read_rows(0, 3)) == VALUES.tolist()
    parent_handle = file.file
    child = os.fork()
    if child == 0:
        is_right = file.file is not parent_handle and dense(file.read_rows(0, 3)) == VALUES.tolist()
        os._exit(0 if is_right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert dense(file.read_rows(2, 3)) == VALUES[2:].tolist()


@pytest.mark.parametrize(
    ("ending", "names"),
    [
        pytest.param("h5ad", pd.Index([f"cell {n}" for n in range(9)]), id="h5ad"),
        pytest.param("zarr", pd.Index([f"cell {n}" for n in range(9)]), id="zarr"),
        pytest.param("h5ad", pd.CategoricalIndex([f"cell {n}" for n in range(9)]), id="labels, which are read whole"),
    ],
)
def test_names_of_some_cells_are_those_of_all_cells(tmp_path: Path, ending: str, names: pd.Index) -> None:
    obs = pd.DataFrame({"sex": pd.Categorical(["f", "m", "f"] * 3)}, index=names)
    adata, path = ad.AnnData(sparse.eye(9, 4, format="csr", dtype=np.float32), obs=obs), tmp_path / f"cells.{ending}"
    adata.write_zarr(path) if ending == "zarr" else adata.write_h5ad(path)
    stored = open_source(path)
    for source in (stored, MemoryFile(adata), ChosenCells(stored, {"sex": ["f"]})):
        whole = source.obs_names.tolist()
        assert whole == list(names if source.shape[0] == 9 else names[[0, 2, 3, 5, 6, 8]])
        spans = [(0, 2), (2, 5), (5, len(whole)), (3, 3)]
        assert [source.cell_names(*span).tolist() for span in spans] == [whole[slice(*span)] for span in spans]
    stored.close()


def test_hdf5_keeps_little_of_an_open_file(tmp_path: Path) -> None:
    """64 files are open at a time, in every worker; HDF5 itself would keep 8 MiB of each array, and up to 32 MiB."""
    path, names_n = tmp_path / "cells.h5ad", [f"a cell with a long name, number {number}" for number in range(20_000)]
    obs = pd.DataFrame({"label": names_n}, index=names_n)
    ad.AnnData(sparse.eye(20_000, 4, format="csr", dtype=np.float32), obs=obs).write_h5ad(path)
    cells = H5adFile(str(path))
    assert cells.obs_names.tolist() == cells.obs_column("label").tolist() == names_n
    num_bytes_allowed, _, num_bytes_kept, _ = cells.file.id.get_mdc_size()
    assert num_bytes_kept <= num_bytes_allowed <= 1 << 19
    assert cells.file["X/data"].id.get_access_plist().get_chunk_cache()[1] <= 1 << 20
    cells.close()


def test_a_file_is_checked_when_it_is_new_or_has_changed(write_h5ad: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than 64 files, each is closed and opened several times; checking takes longer than opening."""
    checked: list[str] = []
    monkeypatch.setattr(sources, "check_structure", lambda file, path: [checked.append(path)][1:])
    path = write_h5ad(VALUES)
    for _ in range(3):
        cells = H5adFile(path)
        assert dense(cells.read_rows(0, 3)) == VALUES.tolist()
        cells.close()
    assert checked == [path]
    write_h5ad(VALUES[:2])
    assert dense(H5adFile(path).read_rows(0, 2)) == VALUES[:2].tolist()
    assert checked == [path, path]


def test_an_open_file_travels_to_another_process_closed(write_h5ad: Write) -> None:
    file = H5adFile(write_h5ad(VALUES))
    file.read_rows(0, 1)
    assert dense(pickle.loads(pickle.dumps(file)).read_rows(0, 3)) == VALUES.tolist()


def test_a_closed_file_opens_again_when_asked(write_h5ad: Write) -> None:
    file = H5adFile(write_h5ad(VALUES))
    file.read_rows(0, 1)
    file.close()
    assert dense(file.read_rows(0, 3)) == VALUES.tolist()


def test_a_shape_that_is_no_number_is_refused_as_damage(write_h5ad: Callable[..., str]) -> None:
    path = write_h5ad([[1, 0, 2, 0]])
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = ["one", "four"]
    with pytest.raises(InputError, match="cells.h5ad is damaged .*Download or write it again"):
        H5adFile(path).shape  # noqa: B018
