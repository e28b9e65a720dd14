"""Cells that are written: shards of a corpus, and copies of a user's file or zarr store with new columns.

Owns the layout of both on disk; leaves reading to `sources` and `shards`. Letters: n cells, g genes, t tables of
measured genes.
"""

import io
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbgene.data_utils.opening import open_source
from perturbgene.data_utils.readable import check_readable
from perturbgene.data_utils.remote import local_path
from perturbgene.data_utils.shards import MEASURED_KEY
from perturbgene.data_utils.sources import CellSource, H5adFile, ZarrFile
from perturbgene.errors import InputError
from perturbgene.files import whole_file, whole_folder
from perturbgene.urls import is_url, shown_path

if TYPE_CHECKING:
    from anndata import AnnData


class _KeptFailure(io.FileIO):
    """A file that keeps the first failure to write, such as a full disk, instead of raising it.

    HDF5 that cannot write, or reads other metadata than it wrote, takes the whole process with it. So what is small
    stays in memory from then on, until HDF5 has closed the file.
    """

    _SMALL = 1 << 16  # bytes; metadata is smaller, and what is larger is never read again

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.failure: OSError | None = None
        self._kept: list[tuple[int, bytes]] = []

    def write(self, data: Any) -> int:
        """Write all bytes at the current position, and count them as written whatever happens."""
        rest, start = memoryview(data).cast("B"), self.tell()
        num_bytes = len(rest)
        try:
            while len(rest) and self.failure is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failure = error
        if len(rest):
            if num_bytes <= self._SMALL:
                self._kept.append((start, bytes(data)))
            self.seek(start + num_bytes)
        return num_bytes

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the current position on, with zeros where nothing was written."""
        view, start = memoryview(buffer).cast("B"), self.tell()
        num_read = super().readinto(view) or 0
        view[num_read:] = bytes(len(view) - num_read)
        for position, data in self._kept:
            first, last = max(position, start), min(position + len(data), start + len(view))
            if first < last:
                view[first - start : last - start] = data[first - position : last - position]
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        """Change the size of the file."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = self.failure or error
            return size or 0


@contextmanager
def writable_h5(path: Path, mode: str = "w") -> Iterator[h5py.File]:
    """Open an HDF5 file to write it ("w") or to change it ("r+").

    Raises:
        OSError: It could not be written, raised when HDF5 has closed it.
    """
    with _KeptFailure(path, "w+" if mode == "w" else mode) as stream:
        try:
            with h5py.File(stream, mode) as file:
                yield file
        except Exception as error:  # HDF5 does not find what it could not write
            raise stream.failure or error from error.__cause__
        if stream.failure is not None:
            raise stream.failure


def write_adata(adata: "AnnData", path: Path, **compression: Any) -> None:
    """Write an h5ad file as `AnnData.write_h5ad` does, but a full disk is an OSError."""
    from anndata.io import write_elem

    adata.strings_to_categoricals()
    if adata.raw is not None:
        adata.strings_to_categoricals(adata.raw.var)
    with writable_h5(path) as file:
        write_elem(file, "/", adata, dataset_kwargs=compression)
        if adata.raw is None and "raw" in file:
            del file["raw"]


def write_shard(
    path: Path, matrix: sparse.csr_matrix, *, obs: pd.DataFrame, var: pd.DataFrame, measured_tg: np.ndarray
) -> None:
    """Write cells as an h5ad file for streaming: uncompressed arrays of the narrowest types, whole or not at all.

    Rows are then read at the speed of memory: 1,420,000 cells/s in random blocks of 64 rows, against 57,000 from gzip
    with shuffle (10,000 cells x 1,390 values, one core, page cache).

    Args:
        matrix: Values over the panel, rows sorted by gene, shape (n, g).
        measured_tg: True where a table of genes has the gene, bool of shape (t, g).
    """
    import anndata
    from anndata.io import write_elem

    by_column = {MEASURED_KEY: np.ascontiguousarray(measured_tg.T, dtype=np.uint8)}  # varm follows its columns anywhere
    columns = np.uint16 if matrix.shape[1] <= 1 << 16 else np.int32
    # In memory first: HDF5 that cannot write to a full disk takes the whole process with it.
    with whole_file(path) as temporary, h5py.File(temporary, "w", driver="core", backing_store=False) as file:
        write_elem(file, "/", anndata.AnnData(obs=obs, var=var, varm=by_column))
        for name in {"X", "raw"} & set(file):  # anndata takes an empty `raw` for a table that is missing
            del file[name]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        group.attrs["shape"] = np.array(matrix.shape, dtype=np.int64)
        group.create_dataset("data", data=matrix.data)
        group.create_dataset("indices", data=matrix.indices.astype(columns))
        group.create_dataset("indptr", data=matrix.indptr.astype(np.int64))
        file.flush()
        temporary.write_bytes(file.id.get_file_image())


def write_copy(
    source: str,
    target: str | Path,
    *,
    uns: Mapping[str, Any],
    obs: Mapping[str, Any] | pd.DataFrame | None = None,
    obsm: Mapping[str, Any] | None = None,
    layer: str | None = None,
) -> None:
    """Copy cells and add columns to their `obs`, matrices to their `obsm` and entries to `uns["perturbgene"]`.

    The target's ending says whether it is an h5ad file or a zarr store. If the source is of the same kind, its matrix
    is copied unread. Otherwise memory holds all cells.

    Args:
        source: The file or store to copy, or its URL.
        target: Where the result goes, whole or not at all.
        uns: Entries, e.g. which run answered which question.
        obs: Name -> new column (it replaces one of the same name), one value per cell in the file's order.
        obsm: Name -> matrix, an array or a memmap.
        layer: The matrix that was read, since there may be no `X`.

    Raises:
        InputError: The target cannot be written, or not be read by anndata because a part of the source is damaged.
    """
    from anndata.io import write_elem

    target, is_zarr = Path(target), Path(target).suffix == ".zarr"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        writing = whole_folder(target) if is_zarr else whole_file(target)
        with writing as temporary, closing(open_source(source, layer=layer)) as known:
            _copy(known, source, temporary, is_zarr=is_zarr)
            with _opened(temporary, is_zarr=is_zarr) as file:
                if obs is not None and len(obs.keys()):
                    _add_columns(file, obs, known=known)
                for group in ("obsm", "uns"):
                    if group not in file:
                        write_elem(file, group, {})
                for name, matrix in (obsm or {}).items():
                    _check_rows(matrix.shape[0], known)
                    write_elem(file["obsm"], str(name), np.asarray(matrix))
                write_elem(file["uns"], "perturbgene", dict(uns))
            if is_url(str(source)):  # a file of this machine was read before the work
                check_readable(temporary, source=known.path)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror or error}). Choose another --output.") from error


def _copy(known: CellSource, source: str, target: Path, *, is_zarr: bool) -> None:
    """Copy cells to a file or an empty folder."""
    if isinstance(known, H5adFile) and not is_zarr:
        shutil.copyfile(local_path(source), target)
    elif isinstance(known, ZarrFile) and is_zarr and not is_url(source):
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        import anndata

        with warnings.catch_warnings(), anndata.settings.override(allow_write_nullable_strings=True):
            warnings.simplefilter("ignore")  # which version of zarr anndata will write by default
            adata = known.to_adata()
            adata.write_zarr(target) if is_zarr else write_adata(adata, Path(target))


@contextmanager
def _opened(path: Path, *, is_zarr: bool) -> Iterator[Any]:
    """Yield the root group of a copy, to be changed."""
    if not is_zarr:
        with writable_h5(path, "r+") as file:
            yield file
        return
    import zarr

    yield zarr.open_group(path, mode="r+", use_consolidated=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # version 3 has no standard for it yet
        zarr.consolidate_metadata(path)


def _check_rows(count: int, known: CellSource) -> None:
    if count != known.shape[0]:
        raise InputError(
            f"{count:,} answers do not fit the {known.shape[0]:,} cells of {shown_path(known.path)}. Ask again."
        )


def _add_columns(file: h5py.File, columns: Mapping[str, Any] | pd.DataFrame, *, known: CellSource) -> None:
    """Write columns into `obs` without rewriting the columns that are there, so that odd ones stay as they are."""
    import anndata
    from anndata.io import write_elem

    def values_of(values: Any) -> Any:
        if isinstance(values, pd.Series):
            values = values.array if values.dtype == "category" else values.to_numpy()
        _check_rows(len(values), known)
        return values

    node = file["obs"]
    if not isinstance(node, h5py.Dataset) and node.attrs.get("encoding-version") == "0.2.0":
        order = [name for name in known.columns_of("obs") if name not in columns]
        for name, column in columns.items():
            write_elem(node, str(name), values_of(column))
        if isinstance(node, h5py.Group):
            node.attrs.create("column-order", [*order, *columns], dtype=h5py.string_dtype())
        else:
            node.attrs["column-order"] = [*order, *map(str, columns)]
        return
    # Older anndata kept obs as one table, or categories apart from their columns: such an obs is rewritten.
    new = {name: values_of(column) for name, column in columns.items()}
    with anndata.settings.override(allow_write_nullable_strings=True):
        write_elem(file, "obs", known.table("obs").assign(**new))
