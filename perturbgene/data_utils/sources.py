"""Cells as they are stored: matrices by rows, columns of obs and var, from files, zarr stores and memory.

Owns everything HDF5 and zarr about reading; knows nothing of panels, tokens or phenotypes. Letters: n cells, m rows,
c columns, l values.
"""

import csv
import itertools
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, cached_property, wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import h5py
import numpy as np
import pandas as pd
import psutil
from scipy import sparse

from perturbgene.data_utils.decode import ChunkReader, SpanReader
from perturbgene.data_utils.foreign import EXPECTED, kind_of, kind_of_store
from perturbgene.data_utils.guard import GuardedStream, guarded
from perturbgene.data_utils.remote import local_path
from perturbgene.data_utils.untrusted import (
    check_claim,
    check_folder,
    check_mtx,
    check_structure,
    check_texts,
    is_array,
    num_bytes_of,
    text_of,
    walk,
)
from perturbgene.errors import InputError, RunFailedError, did_you_mean, listed, raise_if_machine
from perturbgene.urls import is_url, parts_of, shown_path

#: Rows closer than this are fetched by one read, the ones between being thrown away.
READ_GAP_ROWS = 32

#: What HDF5 keeps of each array (chunks that neighboring rows share) and of each file (places of chunks, and texts).
#: By default it keeps 8 MiB and up to 32 MiB, in each of up to 64 open files and in every worker.
CHUNK_CACHE_BYTES, FILE_CACHE_BYTES = 1 << 20, 1 << 19

#: Rows of a matrix in memory that are compressed at a time.
_BLOCK_ROWS = 4096


_Result = TypeVar("_Result")


class Rows(NamedTuple):
    """Rows in CSR form: values and columns of shape (l,), offsets from 0 of shape (m + 1,)."""

    values_l: np.ndarray
    columns_l: np.ndarray
    offsets_m1: np.ndarray

    def keep(self, is_kept_l: np.ndarray) -> "Rows":
        """Return the rows with some of their values."""
        offsets_m1 = np.concatenate([[0], np.cumsum(is_kept_l)])[self.offsets_m1]
        return Rows(self.values_l[is_kept_l], self.columns_l[is_kept_l], offsets_m1)


class CellSource:
    """What all sources of cells have in common: a matrix by rows, and columns that are found by name.

    Attributes:
        path: The source, for messages.
        place: Path or URL from which it is read; empty in memory.
        layer: Name of a layer, "raw" for `.raw`, or None for `X`.
        format: How the matrix is stored: csr, csc or dense.
        is_held_whole: True if it is kept in memory as a whole while it is open.
        is_resting: True if only what reads more rows is open, see `rest`.
    """

    path: str
    place: str = ""
    layer: str | None
    format: str = "csr"
    is_held_whole: bool = False
    is_resting: bool = False

    def table(self, frame: str) -> pd.DataFrame:
        """Return `obs`, `var` or `raw/var`."""
        raise NotImplementedError

    def columns_of(self, frame: str) -> list[str]:
        """Return the names of the columns of `obs`, `var` or `raw/var`."""
        return [str(name) for name in self.table(frame).columns]

    def _column(self, frame: str, column: str) -> pd.Series:
        return self.table(frame)[column]

    def _index_of(self, frame: str) -> np.ndarray:
        return np.asarray(self.table(frame).index, dtype=object)

    def varm_array(self, name: str) -> np.ndarray | None:
        """Return one array of `varm`, or None where there is none of that name."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and columns of the chosen matrix."""
        raise NotImplementedError

    @property
    def layers(self) -> list[str]:
        """Names of all matrices other than `X`, as --layer takes them."""
        raise NotImplementedError

    def with_layer(self, layer: str | None) -> "CellSource":
        """Return the same cells with another matrix."""
        raise NotImplementedError

    @property
    def var_frame(self) -> str:
        """Where the columns of the chosen matrix are named; an InputError if `.raw` was chosen and there is none."""
        raise NotImplementedError

    def read_rows(self, start: int, stop: int) -> Rows:
        """Read the neighboring rows from `start` to `stop` - 1."""
        raise NotImplementedError

    def read(self, rows_m: np.ndarray) -> Rows:
        """Read rows, sorted ascending."""
        if not len(rows_m):
            return Rows(np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))
        runs = []
        for run in np.split(rows_m, np.flatnonzero(np.diff(rows_m) > READ_GAP_ROWS) + 1):
            rows = self.read_rows(int(run[0]), int(run[-1]) + 1)
            if len(run) < len(rows.offsets_m1) - 1:
                is_wanted_m = np.zeros(len(rows.offsets_m1) - 1, dtype=bool)
                is_wanted_m[run - run[0]] = True
                rows = rows.keep(np.repeat(is_wanted_m, np.diff(rows.offsets_m1)))
                rows = rows._replace(offsets_m1=rows.offsets_m1[np.append(run - run[0], -1)])
            runs.append(rows)
        if len(runs) == 1:
            return runs[0]
        lengths_m = np.concatenate([np.diff(rows.offsets_m1) for rows in runs])
        values_l, columns_l = (np.concatenate([rows[part] for rows in runs]) for part in range(2))
        return Rows(values_l, columns_l, np.concatenate([[0], np.cumsum(lengths_m)]))

    def to_adata(self) -> Any:
        """Return all cells as an AnnData in memory, or an InputError if it cannot be read or does not fit there."""
        raise NotImplementedError

    def close(self) -> None:
        """Close what is open; the next access opens it again."""

    def rest(self) -> None:
        """Close what is not needed to read more rows; whatever needs it opens it again."""

    @property
    def obs_names(self) -> np.ndarray:
        """Names of the cells, shape (n,)."""
        return self._index_of("obs")

    def cell_names(self, start: int, stop: int) -> np.ndarray:
        """Names of neighboring cells, shape (stop - start,)."""
        return self.obs_names[start:stop]

    @property
    def var_names(self) -> np.ndarray:
        """Names of the columns of the chosen matrix, shape (c,)."""
        return self._index_of(self.var_frame)

    def obs_column(self, column: str) -> pd.Series:
        """Return one column of `obs`, positional index; an InputError if there is none suggests the nearest name."""
        return self._known_column("obs", column)

    def var_column(self, column: str) -> pd.Series:
        """Return one column of `var` (or `raw/var`), positional index."""
        return self._known_column(self.var_frame, column)

    def _known_column(self, frame: str, column: str) -> pd.Series:
        known = self.columns_of(frame)
        if column not in known:
            name = "obs" if frame == "obs" else "var"
            raise InputError(f"{self.path} has no {name} column {column!r}. {did_you_mean(column, known)}")
        if frame == "obs" and known.count(column) > 1:
            raise InputError(f"{self.path} has more than one obs column {column!r}. Rename all but one, or drop them.")
        return self._column(frame, column).reset_index(drop=True)


# -- h5ad files and zarr stores -----------------------------------------------------------------------------------


class _AtRest(NamedTuple):
    """What reads the rows of a contiguous CSR matrix without HDF5, whose handles take megabytes of each open file."""

    shape: tuple[int, int]
    offsets: np.ndarray
    readers: list[SpanReader]


def _refuses_damage(method: Callable[..., _Result]) -> Callable[..., _Result]:
    """Let a method of `StoredCells` turn whatever h5py, zarr or numpy make of a damaged file into an InputError."""

    @wraps(method)
    def guarded(self: "StoredCells", *args: Any) -> _Result:
        try:
            return method(self, *args)
        except (InputError, RunFailedError, MemoryError):
            raise
        except Exception as error:  # each of them raises many kinds, also KeyError and SystemError
            raise_if_machine(error)
            raise InputError(f"{self.path} is damaged ({reason_of(error)}). Download or write it again.") from error

    return guarded


class _Frame(NamedTuple):
    """What `obs` or `var` of a file is like."""

    columns: tuple[str, ...]
    is_self_contained: bool  # each column can be read alone
    num_rows: int | None  # None if the file does not say how many


class StoredCells(CellSource):
    """AnnData on disk; opened lazily in the process that reads it, never handed across a fork.

    HDF5 and zarr share the layout of groups and arrays, and the names of what is done with them.

    Args:
        path: The file, or its URL; with passwords and tokens masked from then on, for messages.
        layer: Name of a layer, "raw" for `.raw`, or None for `X`.
    """

    _state: tuple[int, ...] | None = None  # which file it was, and of what time, when it was first opened

    def __init__(self, path: str, layer: str | None = None) -> None:
        self.place, self.path, self.layer = path, shown_path(path), layer
        self._forget()

    def _forget(self) -> None:
        self._file: Any = None
        self._plain: Any = None  # the same HDF5 file without a guard, for its lock and its numbers
        self._pid = 0
        self._matrix: tuple[Any, str] | None = None
        self._whole: sparse.csr_matrix | None = None
        self._shape: tuple[int, int] | None = None
        self._frames: dict[str, _Frame] = {}
        self._offsets: np.ndarray | None = None
        self._names: np.ndarray | None = None
        self._readers: list[Any] = []
        self._resting: _AtRest | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "path": self.path, "layer": self.layer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _open(self) -> Any:
        """Open the root group and check it."""
        raise NotImplementedError

    def _read_whole(self) -> Any:
        raise NotImplementedError

    @property
    def file(self) -> Any:
        """The open root group, reopened after a fork; an InputError says what a file is that is not read."""
        if self._file is None or self._pid != os.getpid():
            offsets = self._offsets  # of before a fork, after which processes share their pages
            self._forget()
            self._file, self._pid = self._open(), os.getpid()
            self._offsets = offsets if self._state else None
        return self._file

    def close(self) -> None:
        if isinstance(self._file, h5py.File) and self._pid == os.getpid():
            self._file.close()
            self._plain.close()
        self._forget()

    def rest(self) -> None:
        if self._file is None or self._pid != os.getpid() or self.format != "csr":
            return
        if all(reader.is_contiguous for reader in self._spans()):
            resting = _AtRest(self.shape, self.offsets, self._spans())
            self.close()
            self._resting = resting

    def _check(self, file: Any, nodes: Iterable[Any]) -> None:
        """Raise an InputError if the file is no AnnData, or holds what anndata could not read back from a copy."""
        if kind := kind_of_store(file, self.path):
            raise InputError(f"{self.path} is {kind.what}. {kind.remedy}")
        known, nodes = _known_encodings(), list(nodes)
        for node in filter(is_array, nodes):
            if not re.match("/?(X|layers|raw/X)(/|$)", node.name):  # those are checked when they are chosen
                check_claim(node, node.name.lstrip("/"), self.path)
        for node in nodes:
            of_node, names = node.attrs, ("encoding-type", "encoding-version")
            encoding = tuple(text_of(of_node[name]) if name in of_node else "" for name in names)
            if encoding[0] and known and encoding not in known:
                raise InputError(
                    f"{self.path}: {node.name[1:] or 'the file'} was written by a newer anndata (encoding "
                    f"{' '.join(encoding)}). Update it (pip install -U anndata), or save the file with an older one."
                )
            if encoding[0] == "categorical" and {"codes", "categories"} <= set(node):
                codes, labels = node["codes"][:], node["categories"]
                num_labels = (labels if is_array(labels) else labels["values"]).shape[0]
                if len(codes) and not -1 <= codes.min() <= codes.max() < num_labels:
                    raise InputError(
                        f"{self.path}: {node.name[1:]} is damaged: codes from {codes.min()} to {codes.max()} for "
                        f"{num_labels:,} categories. Write the file again."
                    )

    # -- the matrix ------------------------------------------------------------------------------------------------

    @property
    def format(self) -> str:  # type: ignore[override]
        return "csr" if self._resting else self._checked_matrix()[1]

    @property
    def is_held_whole(self) -> bool:  # type: ignore[override]
        return self.format == "csc"  # it is converted in memory

    @_refuses_damage
    def _checked_matrix(self) -> tuple[Any, str]:
        """Return the matrix and how it is stored, checked once each time the file is opened."""
        file = self.file
        if self._matrix is not None:
            return self._matrix
        name = self.matrix_name
        if name not in file:
            found = [*(["X"] if "X" in file else []), *self.layers]
            found_text = f"but has: {listed(found)}. Choose with --layer" if found else "nor any other. Add one"
            raise InputError(f"{self.path} has no matrix {name!r}, {found_text}.")
        node, keys = file[name], ("data", "indices", "indptr")
        if is_array(node):
            format_, is_known = "dense", node.ndim == 2 and node.dtype.kind in "biuf"
        else:
            encoding = text_of(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
            format_ = encoding.removesuffix("_matrix")
            is_known = format_ in ("csr", "csc") and set(keys) <= set(node)
        if not is_known:
            raise InputError(f"{self.path}: {name} is stored in a form that is no matrix. Re-save it with anndata.")
        for part in [node] if format_ == "dense" else [node[key] for key in keys]:
            check_claim(part, name, self.path)
        self._matrix = (node, format_)
        return self._matrix

    @property
    def is_resting(self) -> bool:  # type: ignore[override]
        return self._resting is not None

    @property
    @_refuses_damage
    def layers(self) -> list[str]:
        return [*(["raw"] if "raw/X" in self.file else []), *self.file.get("layers", {})]

    def with_layer(self, layer: str | None) -> "StoredCells":
        return type(self)(self.place, layer=layer)

    @property
    def matrix_name(self) -> str:
        """Path of the chosen matrix within the file."""
        return {None: "X", "raw": "raw/X"}.get(self.layer, f"layers/{self.layer}")

    @property
    @_refuses_damage
    def shape(self) -> tuple[int, int]:
        if self._resting:
            return self._resting.shape
        matrix, _ = self._checked_matrix()
        if self._shape is not None:
            return self._shape
        shape = matrix.shape if is_array(matrix) else matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape"))
        if shape is None or len(shape) != 2:
            raise InputError(f"{self.path}: {self.matrix_name} does not say its shape. Re-save it with anndata.")
        self._shape = int(shape[0]), int(shape[1])
        return self._shape

    @property
    @_refuses_damage
    def offsets(self) -> np.ndarray:
        """Where each row's values start in a CSR matrix, uint32 (or int64, if need be) of shape (n + 1,)."""
        if self._resting:
            return self._resting.offsets
        group, _ = self._checked_matrix()
        if self._offsets is None:
            offsets = group["indptr"][:]
            offsets = offsets if offsets.dtype.kind in "iu" else offsets.astype(np.int64)
            length = min(group["data"].shape[0], group["indices"].shape[0])
            if not _are_sound(offsets, num_rows=self.shape[0], num_values=length):
                raise InputError(f"{self.path}: {self.matrix_name}/indptr is damaged. Write the file again.")
            self._offsets = offsets.astype(np.uint32 if offsets[-1] < 1 << 32 else np.int64)
        return self._offsets

    @_refuses_damage
    def _whole_csr(self) -> sparse.csr_matrix:
        group, _ = self._checked_matrix()
        if self._whole is None:
            parts = (_supported(group["data"][:]), group["indices"][:], group["indptr"][:])
            try:
                self._whole = _checked_csr(sparse.csc_matrix(parts, shape=self.shape))
            except ValueError as error:
                raise InputError(f"{self.path}: {self.matrix_name} is damaged ({error}). Write it again.") from error
        return self._whole

    @_refuses_damage
    def _spans(self) -> list[Any]:
        """Return readers of the values and columns of a CSR matrix, or of the rows of a dense one."""
        if self._resting:
            return self._resting.readers
        matrix, format_ = self._checked_matrix()
        if not self._readers:
            arrays = [matrix] if format_ == "dense" else [matrix["data"], matrix["indices"]]
            is_span = isinstance(matrix, h5py.Group)
            if self._plain is not None:
                arrays = [self._plain[array.name] if array.dtype.kind in "biuf" else array for array in arrays]
            readers: list[Any] = []
            for array in arrays:
                readers.append(SpanReader(array, *readers[:1]) if is_span else ChunkReader(array))
            self._readers = readers  # all at once, for other threads
        return self._readers

    @_refuses_damage
    def read(self, rows_m: np.ndarray) -> Rows:
        if not len(rows_m) or self.format != "csr" or not all(span.is_contiguous for span in self._spans()):
            return super().read(rows_m)
        starts_m, stops_m = (self.offsets[some_m].astype(np.int64) for some_m in (rows_m, rows_m + 1))
        try:
            values, columns = (span.gather(starts_m, stops_m) for span in self._spans())
        except OSError as error:
            raise self._unreadable(int(rows_m[0]), int(rows_m[-1]) + 1, error) from error
        return Rows(values, columns, np.concatenate([[0], np.cumsum(stops_m - starts_m)]))

    @_refuses_damage
    def read_rows(self, start: int, stop: int) -> Rows:
        try:
            if self.format == "dense":
                dense_mc = self._spans()[0].read(start, stop)
                is_stored_mc = dense_mc != 0
                offsets = np.concatenate([[0], np.cumsum(is_stored_mc.sum(axis=1))]).astype(np.int64)
                return Rows(dense_mc[is_stored_mc], np.nonzero(is_stored_mc)[1].astype(np.int32), offsets)
            if self.format == "csc":  # converted once, in memory
                rows = self._whole_csr()[start:stop]
                return Rows(rows.data, rows.indices, rows.indptr.astype(np.int64))
            offsets = self.offsets[start : stop + 1].astype(np.int64)
            data, indices = (span.read(int(offsets[0]), int(offsets[-1])) for span in self._spans())
            return Rows(data, indices, offsets - offsets[0])
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise self._unreadable(start, stop, error) from error

    def _unreadable(self, start: int, stop: int, error: Exception) -> InputError:
        """Return the error for rows that cannot be read; raise it if it is the machine's."""
        raise_if_machine(error)
        return InputError(
            f"{self.path}: rows {start}..{stop - 1} cannot be read ({reason_of(error)}). The file is damaged or "
            "changes while it is read, or its compression needs a plugin (pip install hdf5plugin)."
        )

    # -- obs and var -----------------------------------------------------------------------------------------------

    @property
    @_refuses_damage
    def var_frame(self) -> str:
        if self.layer != "raw":
            return "var"
        if "raw/var" not in self.file:
            raise InputError(f"{self.path} has no .raw with gene names. Choose another matrix with --layer.")
        return "raw/var"

    @_refuses_damage
    def columns_of(self, frame: str) -> list[str]:
        return list(self._frame(frame).columns)

    @_refuses_damage
    def _frame(self, frame: str) -> "_Frame":
        """Return what a table of the file is like, found out once each time the file is opened."""
        file = self.file
        if frame not in self._frames:
            node = file[frame]
            is_group = not is_array(node)
            is_listed = is_group and "column-order" in node.attrs
            names = map(text_of, node.attrs["column-order"]) if is_listed else super().columns_of(frame)
            # Version 0.1 keeps the categories of all columns apart: a column read alone would be codes, not labels.
            is_self_contained = is_group and node.attrs.get("encoding-version") == "0.2.0"
            index: Any = node.get(node.attrs.get("_index")) if is_self_contained else None
            num_rows = index.shape[0] if is_array(index) else None
            self._frames[frame] = _Frame(tuple(names), is_self_contained, num_rows)
        return self._frames[frame]

    @_refuses_damage
    def _column(self, frame: str, column: str) -> pd.Series:
        _, is_self_contained, num_rows = self._frame(frame)
        if not is_self_contained or column not in self.file[frame]:
            return super()._column(frame, column)
        values = pd.Series(self._read_elem(f"{frame}/{column}"))
        if num_rows not in (None, len(values)):
            raise InputError(
                f"{self.path}: {frame}/{column} has {len(values):,} values of {num_rows:,} rows. Write the file again."
            )
        return values

    @_refuses_damage
    def table(self, frame: str) -> pd.DataFrame:
        node = self.file[frame]
        return _frame_of_table(node, self.file) if isinstance(node, h5py.Dataset) else self._read_elem(frame)

    @_refuses_damage
    def element(self, name: str) -> Any:
        """Return what the file holds under a name such as `obsm/X_umap`, or None."""
        return self._read_elem(name) if name in self.file else None

    def _read_elem(self, name: str, *, texts: slice | None = None) -> Any:
        """Read an element of the file, or some texts of an array of texts."""
        from anndata.io import read_elem

        try:
            node = self.file[name]
            if texts is not None:
                return (node.asstr() if isinstance(node, h5py.Dataset) else node)[texts]
            plain = _read_plain(node) if isinstance(node, h5py.HLObject) else None
            return read_elem(node) if plain is None else plain
        except Exception as error:  # anndata raises many kinds here; all mean the same to a user
            raise_if_machine(error)
            raise InputError(
                f"{self.path}: {name} cannot be read ({reason_of(error)}). Re-save it with anndata."
            ) from error

    @_refuses_damage
    def _index_of(self, frame: str) -> np.ndarray:
        node = self.file[frame]
        if not is_array(node) and "_index" in node.attrs and node.attrs["_index"] in node:
            return np.asarray(self._read_elem(f"{frame}/{node.attrs['_index']}"), dtype=object)
        return super()._index_of(frame)

    @_refuses_damage
    def cell_names(self, start: int, stop: int) -> np.ndarray:
        node = self.file["obs"]
        index = None if is_array(node) else node.attrs.get("_index")
        if index and index in node and text_of(node[index].attrs.get("encoding-type", "")) == "string-array":
            return np.asarray(self._read_elem(f"obs/{index}", texts=slice(start, stop)), dtype=object)
        if self._names is None:  # they can be read as a whole only
            self._names = self.obs_names
        return self._names[start:stop]

    @_refuses_damage
    def varm_array(self, name: str) -> np.ndarray | None:
        node = self.file.get(f"varm/{name}")
        return np.asarray(node[...]) if node is not None and is_array(node) and node.shape else None

    def to_adata(self) -> Any:
        node = self.file.get("X")
        num_bytes = num_bytes_of(node) if is_array(node) else 0
        if num_bytes > (free := psutil.virtual_memory().available):
            raise InputError(
                f"{self.path}: X is stored dense and needs {num_bytes / 1e9:,.0f} GB of memory, of which "
                f"{free / 1e9:,.0f} GB are free. Use the command line, which reads parts, or save it with a sparse X."
            )
        try:
            return self._read_whole()
        except Exception as error:  # as above
            raise_if_machine(error)
            raise InputError(f"{self.path} cannot be read ({reason_of(error)}). Re-save it with anndata.") from error


#: Files that this process has checked, each as it was then: of many files, each is closed and opened several times.
_CHECKED: set[tuple[int, int, int, int]] = set()


class H5adFile(StoredCells):
    """One h5ad file, or the local copy of what a URL leads to."""

    def _open(self) -> h5py.File:
        local = local_path(self.place)
        try:
            plain = h5py.File(local, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)
            file = guarded(plain, rdcc_nbytes=CHUNK_CACHE_BYTES)
            for one in (plain, file):
                cache = one.id.get_mdc_config()
                cache.set_initial_size = True
                cache.initial_size = cache.min_size = cache.max_size = FILE_CACHE_BYTES
                one.id.set_mdc_config(cache)
            state = os.stat(local)
            key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
            if self._state not in (None, key):
                raise InputError(
                    f"{self.path} was changed while it was in use: the genes and labels that were found in it may be "
                    "others now. Start again, and write changes to another file."
                )
            if key not in _CHECKED:
                nodes = check_structure(file, self.path)
                check_texts(nodes, local, self.path)
                self._check(file, nodes)
                _CHECKED.add(key)
            self._plain, self._state = plain, key
        except (InputError, MemoryError):
            raise
        except Exception as error:  # h5py raises many kinds
            raise_if_machine(error)
            raise _refusal(self.path, local, error) from error
        return file

    def _read_whole(self) -> Any:
        import anndata

        with h5py.File(local_path(self.place), "r") as plain:
            return anndata.read_h5ad(GuardedStream(plain))


class ZarrFile(StoredCells):
    """One zarr store of version 2 or 3: a folder, or a URL, of which only those chunks are fetched that are read.

    Attributes:
        is_consolidated: False reads each array's own metadata instead of the copy of all that the store may have.
    """

    is_consolidated: bool | None = None

    def _open(self) -> Any:
        import zarr

        if is_url(self.place):
            parts_of(self.place)
            if "::" in self.place.partition("://")[2].partition("/")[2]:
                raise InputError(f"{self.path} leads from one address to another (::). Give one address.")
        else:
            check_folder(self.place, self.path)
        try:
            file = zarr.open_group(self.place, mode="r", use_consolidated=self.is_consolidated)
            self._check(file, walk(file))
        except InputError:
            raise
        except ImportError as error:
            raise InputError(f"{self.path} needs a package that is not installed: {error}.") from error
        except Exception as error:  # of zarr, fsspec and the stores behind it
            raise_if_machine(error)
            raise InputError(f"{self.path} cannot be read as zarr ({reason_of(error)}). {EXPECTED}") from error
        return file

    def _read_whole(self) -> Any:
        import anndata

        return anndata.read_zarr(self.file)


@cache
def _known_encodings() -> set[tuple[str, ...]]:
    """Return the type and version of each encoding that anndata reads; empty if it does not say."""
    with suppress(ImportError, AttributeError, ValueError):
        from anndata._io.specs.registry import _REGISTRY

        return {(spec.encoding_type, spec.encoding_version) for _, spec, _ in _REGISTRY.read}
    return set()


def _read_plain(node: h5py.Group | h5py.Dataset) -> Any:
    """Read numbers, texts or labels of HDF5 as anndata does, which takes four times as long; None for other forms."""
    kind = text_of(node.attrs.get("encoding-type", ""))
    if isinstance(node, h5py.Dataset):
        return node[()] if kind == "array" else node.asstr()[()] if kind == "string-array" else None
    if kind != "categorical":
        return None
    codes, texts = node["codes"], node["categories"]
    if not (is_array(codes) and is_array(texts) and h5py.check_string_dtype(texts.dtype)):
        return None
    return pd.Categorical.from_codes(codes[()], texts.asstr()[()], ordered=bool(node.attrs["ordered"]))


def reason_of(error: Exception) -> str:
    """Return the first line of an error, without secrets."""
    lines = str(error).strip().splitlines()
    return shown_path(lines[0]) if lines else type(error).__name__


def _refusal(path: str, local: str, error: Exception) -> InputError:
    """Say what an unreadable file really is."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} does not exist. Check the path.")
    if isinstance(error, PermissionError | BlockingIOError):
        return InputError(f"{path} cannot be opened ({error}): it is protected, or locked by a program that writes it.")
    if not os.path.isfile(local):
        return InputError(f"{path} cannot be read ({error}). {EXPECTED}")
    with open(local, "rb") as stream:
        head = stream.read(64)
    if not head:
        return InputError(f"{path} is empty (0 bytes). Download or write it again.")
    kind = kind_of(head, path)
    why = f" ({error})" if head.startswith(b"\x89HDF") else ""
    return InputError(f"{path} is {kind.what}{why}. {kind.remedy}")


# -- cells in memory ----------------------------------------------------------------------------------------------


class MemoryFile(CellSource):
    """An AnnData in memory, read in the same way as a file.

    Args:
        adata: The cells; may be backed or a view.
        layer: Name of a layer, "raw" for `.raw`, or None for `X`.
    """

    def __init__(self, adata: Any, layer: str | None = None, path: str = "AnnData") -> None:
        self.adata, self.layer, self.path = adata, layer, path
        self._csr: sparse.csr_matrix | None = None

    @property
    def _matrix(self) -> sparse.csr_matrix:
        if self._csr is None:
            layers = self.adata.layers
            if self.layer == "raw":
                chosen = self.adata.raw.X if self.shape[1] else None
            elif self.layer is not None and self.layer not in layers:
                raise InputError(f"{self.path} has no layer {self.layer!r}. {did_you_mean(self.layer, [*layers])}")
            else:
                chosen = self.adata.X if self.layer is None else layers[self.layer]
            self._csr = csr_of(chosen, source=f"{self.path} ({self.layer or 'X'})")
        return self._csr

    @property
    def layers(self) -> list[str]:
        return [*(["raw"] if self.adata.raw is not None else []), *self.adata.layers]

    def with_layer(self, layer: str | None) -> "MemoryFile":
        return MemoryFile(self.adata, layer, self.path)

    @property
    def shape(self) -> tuple[int, int]:
        return self.adata.n_obs, len(self.table(self.var_frame))

    def read_rows(self, start: int, stop: int) -> Rows:
        offsets = self._matrix.indptr[start : stop + 1].astype(np.int64)
        span = slice(int(offsets[0]), int(offsets[-1]))
        return Rows(self._matrix.data[span], self._matrix.indices[span], offsets - offsets[0])

    @property
    def var_frame(self) -> str:
        return "raw/var" if self.layer == "raw" else "var"

    def table(self, frame: str) -> pd.DataFrame:
        if frame == "raw/var" and self.adata.raw is None:
            raise InputError(f"{self.path} has no .raw. Choose another matrix with --layer.")
        return self.adata.raw.var if frame == "raw/var" else getattr(self.adata, frame)

    def cell_names(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self.adata.obs_names[start:stop], dtype=object)

    def varm_array(self, name: str) -> np.ndarray | None:
        found = self.adata.varm.get(name)
        return found if isinstance(found, np.ndarray) and found.shape else None

    def to_adata(self) -> Any:
        return self.adata

    def close(self) -> None:
        self._csr = None


class TenxFile(MemoryFile):
    """A 10x `.h5` file (also of CellBender) or matrix folder: read into memory by scanpy when it is used."""

    is_held_whole = True

    def __init__(self, path: str, layer: str | None = None) -> None:
        self.place, self.path, self.layer, self._csr = path, shown_path(path), layer, None

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "path": self.path, "layer": self.layer, "_csr": None}

    def close(self) -> None:
        super().close()
        self.__dict__.pop("adata", None)

    @cached_property
    def adata(self) -> Any:
        """The cells, with genes by symbol and their ids in `var["gene_ids"]`, as scanpy names them."""
        import scanpy

        local = local_path(self.place)
        try:
            if os.path.isdir(local):
                return read_mtx_folder(Path(local))
            with h5py.File(local, "r") as plain, guarded(plain) as file:
                nodes = check_structure(file, self.path)
                check_texts(nodes, local, self.path)
                for array in filter(is_array, nodes):
                    check_claim(array, array.name[1:], self.path)
                    if array.dtype.kind == "O":
                        array[()]  # scanpy opens the file without a guard
            return scanpy.read_10x_h5(local, gex_only=False)
        except InputError:
            raise
        except Exception as error:  # scanpy raises many kinds
            raise_if_machine(error)
            raise InputError(
                f"{self.path} looks like 10x, but cannot be read ({type(error).__name__}: {reason_of(error)}). "
                "Read it yourself, and save it with adata.write_h5ad."
            ) from error


def mtx_prefix(folder: Path) -> str | None:
    """Return what comes before `matrix.mtx` in a folder of 10x (or STARsolo); None if it is no such folder."""
    found = sorted(path.name for path in folder.glob("*matrix.mtx*") if path.name.endswith((".mtx", ".mtx.gz")))
    return found[0].partition("matrix.mtx")[0] if len(found) == 1 else None


def read_mtx_folder(folder: Path) -> Any:
    """Read `matrix.mtx`, `barcodes.tsv` and `features.tsv` (or `genes.tsv`), each of them compressed or not."""
    import anndata
    import scanpy

    def path_of(*names: str) -> Path:
        paths = [folder / f"{mtx_prefix(folder)}{name}{end}" for name in names for end in ("", ".gz")]
        if found := [path for path in paths if path.exists()]:
            return found[0]
        raise FileNotFoundError(f"{names[0]} is missing")

    def table(*names: str) -> pd.DataFrame:
        as_written = {"dtype": str, "keep_default_na": False, "quoting": csv.QUOTE_NONE}
        return pd.read_csv(path_of(*names), sep="\t", header=None, **as_written)

    features = table("features.tsv", "genes.tsv")
    columns = features.rename(columns={0: "gene_ids", 1: "symbols", 2: "feature_types"})
    var = columns.set_index("symbols" if "symbols" in columns else "gene_ids").rename_axis(None)
    obs = pd.DataFrame(index=table("barcodes.tsv")[0].to_numpy())
    check_mtx(path_of("matrix.mtx"), num_genes=len(var), num_cells=len(obs))
    matrix = sparse.csr_matrix(scanpy.read_mtx(path_of("matrix.mtx")).X.T)
    return anndata.AnnData(matrix, obs=obs, var=var[var.columns.intersection(["gene_ids", "feature_types"])])


# -- matrices -----------------------------------------------------------------------------------------------------


def csr_of(matrix: Any, *, source: str = "AnnData") -> sparse.csr_matrix:
    """Turn any in-memory or backed matrix (sparse, dense, HDF5, or Dask) into CSR without changing its values."""
    if matrix is None:
        raise InputError(f"{source} has no matrix there (it is None). Choose one with --layer.")
    if hasattr(matrix, "to_memory"):
        matrix = matrix.to_memory()
    try:
        if sparse.issparse(matrix):
            return _checked_csr(matrix)
        matrix = np.atleast_2d(matrix) if isinstance(matrix, np.ndarray) else matrix
        num_rows, is_lazy = matrix.shape[0], hasattr(matrix, "compute")
        bounds = np.cumsum([0, *matrix.chunks[0]]) if is_lazy else [*range(0, num_rows, _BLOCK_ROWS), num_rows]
        blocks = []
        for start, stop in list(itertools.pairwise(bounds)) or [(0, 0)]:
            block = matrix[start:stop].compute() if is_lazy else matrix[start:stop]
            if not sparse.issparse(block):
                block = np.asarray(block)
                if block.dtype.kind not in "biuf":
                    raise InputError(
                        f"{source} holds {block.dtype} instead of numbers. Choose another matrix with --layer."
                    )
                block = _supported(block)
            blocks.append(_checked_csr(block))
        return sparse.vstack(blocks, format="csr")
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source} is damaged ({error}). Build the matrix again.") from error


def _supported(values: np.ndarray) -> np.ndarray:
    """Return values in a dtype that scipy.sparse takes: native byte order, at least single precision."""
    native = values.dtype.newbyteorder("=")
    return values.astype(np.float32 if native == np.float16 else native, copy=False)


def _are_sound(offsets: np.ndarray, *, num_rows: int, num_values: int) -> bool:
    """True when offsets start at 0, never fall and stay within the values."""
    has_ends = len(offsets) == num_rows + 1 and offsets[0] == 0 and offsets[-1] <= num_values
    return bool(has_ends and (offsets[1:] >= offsets[:-1]).all())


def _checked_csr(matrix: Any) -> sparse.csr_matrix:
    """Turn any matrix into CSR; raise a ValueError where scipy would read or write outside of it."""
    if sparse.issparse(matrix) and matrix.format == "csr":
        # Column indices are checked where they are used; only the offsets could hide or mix cells.
        if not _are_sound(matrix.indptr, num_rows=matrix.shape[0], num_values=len(matrix.data)):
            raise ValueError("its row offsets do not increase or leave the matrix")
    elif sparse.issparse(matrix) and matrix.format == "csc":
        matrix.check_format(full_check=True)
        if len(matrix.indices) and not (matrix.indices.min() >= 0 and matrix.indices.max() < matrix.shape[0]):
            raise ValueError("a row index is outside the matrix")
    return sparse.csr_matrix(matrix)


def _frame_of_table(table: h5py.Dataset, file: h5py.File) -> pd.DataFrame:
    """Read `obs` or `var` as anndata 0.6 kept them: one compound table, categories in `uns`."""
    frame = pd.DataFrame({name: table[name] for name in table.dtype.names})
    for name in frame.columns:
        if frame[name].dtype == object:
            frame[name] = [text_of(value) for value in frame[name]]
        if f"uns/{name}_categories" in file:
            labels = [text_of(label) for label in file[f"uns/{name}_categories"][()]]
            frame[name] = pd.Categorical.from_codes(frame[name], labels)
    return frame.set_index(table.dtype.names[0])


def sampled_spans(num_rows: int, *, num_spots: int = 4, span_rows: int = 64) -> list[tuple[int, int]]:
    """Return spans of rows (start, stop) spread over a file, from which its scale and lengths are read.

    Example:
        >>> sampled_spans(1000)
        [(0, 64), (250, 314), (500, 564), (750, 814)]
    """
    starts = sorted({max(0, min(num_rows - span_rows, num_rows * spot // num_spots)) for spot in range(num_spots)})
    return [(start, min(num_rows, start + span_rows)) for start in starts]
