"""What a file or an object is that is not read here, and the line of code that makes AnnData of it.

Owns recognizing other formats by their first bytes, their name or the groups of HDF5; reads no cell.
"""

import re
from collections.abc import Container, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from perturbgene.errors import InputError, listed

HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
EXPECTED = "Give an .h5ad or .zarr file written by anndata, or a 10x .h5 file or matrix folder."


class Kind(NamedTuple):
    """A format: what a file of it is, how to convert `{path}` (`{stem}`: without endings), and how it is recognized."""

    what: str
    remedy: str
    suffixes: tuple[str, ...] = ()
    magic: tuple[bytes, ...] = ()


_TABLE = 'Convert it in Python: anndata.AnnData(pandas.{}).write_h5ad("{{stem}}.h5ad"), with .T if its rows are genes.'
_PARTS = (
    "Give the folder that also has barcodes.tsv and features.tsv; or in Python: adata = scanpy.read_mtx({path!r}).T, "
    'then set adata.obs_names and adata.var_names, and adata.write_h5ad("{stem}.h5ad").'
)
_LOAD = 'If you trust where it is from, load it yourself and write it with adata.write_h5ad("{stem}.h5ad").'
_FROM_R = (
    'Convert it in R: zellkonverter::writeH5AD(Seurat::as.SingleCellExperiment(readRDS("{path}")), "{stem}.h5ad"), '
    "without as.SingleCellExperiment if it is one already."
)

#: A file is of the first kind that fits its first bytes, or its name without a last `.gz`.
KINDS = (
    Kind("a web page (an error page, or a login form)", "Check its URL.", (), (b"<!doc", b"<htm")),
    Kind("a pointer of Git LFS and not the file itself", "Fetch it: git lfs pull.", (), (b"version https://git-lfs",)),
    Kind("an R object", _FROM_R, (".rds", ".rdata", ".rda"), (b"rdx", b"x\n\0\0")),
    Kind("a table of text", _TABLE.format('read_csv("{path}", index_col=0)'), (".csv",)),
    Kind("a table of text", _TABLE.format('read_table("{path}", index_col=0)'), (".tsv", ".tab", ".txt")),
    Kind("a table in Parquet", _TABLE.format('read_parquet("{path}")'), (".parquet",), (b"par1",)),
    Kind("a table in Arrow", _TABLE.format('read_feather("{path}")'), (".feather", ".arrow"), (b"arrow1",)),
    Kind("an Excel sheet", _TABLE.format('read_excel("{path}", index_col=0)'), (".xlsx", ".xls")),
    Kind("a matrix without names of cells and genes", _PARTS, (".mtx", ".npz", ".npy"), (b"%%matrix", b"\x93numpy")),
    Kind("a Python pickle, which may run code when it is loaded", _LOAD, (".pkl", ".pickle", ".joblib"),
         (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")),
    Kind("a file of PyTorch, which may run code when it is loaded", _LOAD, (".pt", ".pth")),
    Kind("an archive", "Unpack it with tar -xf {path}, and give what is inside.", (".tar", ".tgz")),
    Kind("a zip archive", "Unpack it with unzip {path}, and give what is inside.", (".zip",), (b"pk\x03\x04",)),
    Kind("compressed with gzip (unpack it with gunzip)", "Run: gunzip {path}.", (), (b"\x1f\x8b",)),
    Kind("compressed with bzip2, xz or zstd", "Unpack it with bunzip2, unxz or unzstd.", (),
         (b"bzh", b"\xfd7zxz", b"\x28\xb5\x2f\xfd")),
    Kind("an HDF5 file that is truncated or damaged", "Download or write it again.", (), (HDF5_SIGNATURE[:4].lower(),)),
)  # fmt: skip

#: Names at the top of an HDF5 file or zarr store, of which all are there -> its kind.
STORES = {
    ("mod",): Kind("a MuData file of several modalities", 'Save one in Python: mudata.read("{path}")["rna"]'
                   '.write_h5ad("{stem}.h5ad").'),
    ("matrix", "row_attrs", "col_attrs"): Kind("a Loom file", 'Convert it in Python: anndata.io.read_loom("{path}")'
                                               '.write_h5ad("{stem}.h5ad").'),
    ("assays", "cell.names"): Kind("a Seurat file", 'Convert it in R: SeuratDisk::Convert("{path}", dest = "h5ad").'),
    ("tables",): Kind("a SpatialData store", "Give a table inside it: {path}/tables/NAME."),
    ("matrix",): Kind("a 10x file by its content", "Rename it to end in .h5."),
    ("barcode_idx", "molecule_info"): Kind("Cell Ranger's file of molecules", "Give filtered_feature_bc_matrix.h5."),
}  # fmt: skip


def kind_of(head: bytes, path: str = "") -> Kind:
    """Say what a file is that begins with these bytes and has this name.

    Example:
        >>> kind_of(b"<!DOCTYPE html><html>").what
        'a web page (an error page, or a login form)'
    """
    begin, name = head.lstrip().lower(), PurePath(path).name.lower().removesuffix(".gz")
    for kind in KINDS:
        is_named = bool(kind.suffixes) and name.endswith(kind.suffixes) and not head.startswith(HDF5_SIGNATURE)
        if is_named or (kind.magic and begin.startswith(kind.magic)):
            return kind._replace(remedy=_filled(kind.remedy, path))
    return Kind(f"a file that begins with {head[:8]!r}", EXPECTED)


def kind_of_store(names: Container[str], path: str) -> Kind | None:
    """Say what an HDF5 file or zarr store is that has these names at its top; None if it has those of AnnData."""
    if "obs" in names and "var" in names and not ("mod" in names and "X" not in names):
        return None
    for tops, kind in STORES.items():
        if all(top in names for top in tops):
            return kind._replace(remedy=_filled(kind.remedy, path))
    missing = next(name for name in ("obs", "var") if name not in names)
    return Kind(f"not an AnnData (it has no /{missing})", EXPECTED)


def _filled(remedy: str, path: str) -> str:
    stem = re.sub(r"(\.[A-Za-z]\w{1,8}){1,2}$", "", PurePath(path).name) or "cells"
    return remedy.replace("{path!r}", f'"{path}"').replace("{path}", path).replace("{stem}", stem)


def refused_object(data: Any) -> InputError:
    """Return the error for an object in memory that is no AnnData."""
    kind, shape = type(data).__name__, getattr(data, "shape", None)
    if isinstance(getattr(data, "mod", None), Mapping):
        return InputError(f"a MuData of {listed(data.mod)} is no AnnData. Give one of its modalities: mdata[NAME].")
    if hasattr(data, "columns"):
        return InputError("a DataFrame is no AnnData. Make one of it: anndata.AnnData(table).")
    if isinstance(data, list | tuple) and data and all(hasattr(item, "obs_names") for item in data):
        return InputError(
            f"{len(data)} AnnData were given, but one is read. Join them with anndata.concat, or give one at a time."
        )
    if shape is not None and len(shape) == 2:
        return InputError(
            f"a matrix ({kind} of {shape[0]:,} x {shape[1]:,}) is no AnnData, since it does not name its genes. Make "
            "one: anndata.AnnData(matrix, var=pandas.DataFrame(index=gene_names))."
        )
    return InputError(f"{kind} is no AnnData, nor the path of a file. Give one of these.")
