"""h5ad files as they are: paths, matrices by rows, columns of obs and var.

Owns everything HDF5 about reading; knows nothing of panels, tokens or phenotypes. Letters: n cells, m rows, c columns,
l values.
"""

import glob
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbgene.data_utils.decode import SpanReader
from perturbgene.data_utils.remote import expand_url, kind_of, local_path
from perturbgene.errors import InputError, did_you_mean, listed
from perturbgene.urls import is_url, shown_path, shown_text, url_identity

MOST_PATHS = 100_000


def expand_braces(pattern: str) -> list[str]:
    """Expand brace patterns.

    Example:
        >>> expand_braces("shard_{8..10}.h5ad")
        ['shard_8.h5ad', 'shard_9.h5ad', 'shard_10.h5ad']
    """
    options: list[Sequence[str]] = []
    num_paths = 1
    for index, piece in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        bounds = re.fullmatch(r"(\d+)\.\.(\d+)", piece) if index % 2 else None
        num_paths *= abs(int(bounds[2]) - int(bounds[1])) + 1 if bounds else 1
        if num_paths > MOST_PATHS:
            raise InputError(f"pattern {shown_text(pattern)!r} names more than {MOST_PATHS:,} files. Narrow it.")
        if bounds:
            width = len(bounds[1]) if bounds[1].startswith("0") else 0
            step = 1 if int(bounds[2]) >= int(bounds[1]) else -1
            numbers = range(int(bounds[1]), int(bounds[2]) + step, step)
            options.append([f"{number:0{width}d}" for number in numbers])
        else:
            options.append(piece.split(",") if index % 2 else [piece])
    return ["".join(parts) for parts in itertools.product(*options)]


def _natural_key(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]


def _files_of(path: str, *, given: str) -> list[str]:
    if is_url(path):
        return sorted(expand_url(path), key=_natural_key)
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.h5ad")), key=_natural_key)
        if not found:
            raise InputError(f"folder {path} (from {given!r}) holds no .h5ad file. Point to the folder of the shards.")
        return found
    if os.path.exists(path):
        return [path]
    found = sorted(glob.glob(path), key=_natural_key)
    if not found:
        raise InputError(f"{path} (from {given!r}) does not exist. Check the path and the pattern's bounds.")
    return [file for one in found for file in _files_of(one, given=given)]


class FileList(list[str]):
    """Files that `expand_paths` found, each once; every function that takes patterns takes this list as it is.

    Attributes:
        sizes: Cells of each file, if a corpus's manifest gave them; then files are opened only when they are read.
    """

    sizes: tuple[int, ...] | None = None


def expand_paths(patterns: str | Path | Sequence[str | Path]) -> FileList:
    """Return the files that paths, URLs, brace patterns, globs and folders name, each once.

    Web addresses are not visited here: one that leads nowhere is refused when its file is opened. A `FileList` has been
    expanded already and is returned as it is.

    Raises:
        InputError: A path does not exist, a pattern matches nothing or too much, or a file is named twice.
    """
    if isinstance(patterns, FileList):
        return patterns
    given = [patterns] if isinstance(patterns, str | Path) else list(patterns)
    if not given:
        raise InputError("no input file was given. Name at least one .h5ad file, pattern or folder.")
    paths = [path for item in given for raw in expand_braces(str(item)) for path in _files_of(raw, given=str(item))]
    first_of: dict[Any, str] = {}
    for path in paths:
        twin = first_of.setdefault(identity(path), path)
        if twin is not path:
            raise InputError(
                f"{shown_path(path)} is the same file as {shown_path(twin)}: its cells would count twice. "
                "Name each file once."
            )
    return FileList(paths)


def identity(path: str) -> Any:
    """Name a file by what it is, not by the way to it."""
    if is_url(path):
        return url_identity(path)
    try:
        status = os.stat(path)
    except OSError:  # whoever opens it says so
        return os.path.abspath(path)
    return status.st_dev, status.st_ino


class CellSource:
    """What an h5ad file and an AnnData in memory have in common: columns that are found by name.

    Attributes:
        path: The source, for messages.
        layer: Name of a layer, "raw" for `.raw`, or None for `X`.
    """

    path: str
    layer: str | None

    def columns_of(self, frame: str) -> list[str]:
        """Return the names of the columns of `obs`, `var` or `raw/var`."""
        raise NotImplementedError

    def _column(self, frame: str, column: str) -> pd.Series:
        raise NotImplementedError

    @property
    def var_frame(self) -> str:
        """Where the columns of the chosen matrix are named.

        Raises:
            InputError: `.raw` was chosen and there is none.
        """
        raise NotImplementedError

    def obs_column(self, column: str) -> pd.Series:
        """Return one column of `obs`, positional index.

        Raises:
            InputError: No such column, with the nearest name.
        """
        return self._known_column("obs", column)

    def var_column(self, column: str) -> pd.Series:
        """Return one column of `var` (or `raw/var`), positional index."""
        return self._known_column(self.var_frame, column)

    def _known_column(self, frame: str, column: str) -> pd.Series:
        known = self.columns_of(frame)
        if column not in known:
            name = "obs" if frame == "obs" else "var"
            raise InputError(f"{self.path} has no {name} column {column!r}. {did_you_mean(column, known)}")
        return self._column(frame, column).reset_index(drop=True)

    @property
    def layers(self) -> list[str]:
        """Names of all matrices other than `X`, as --layer takes them."""
        raise NotImplementedError

    def with_layer(self, layer: str | None) -> "CellSource":
        """Return the same cells with another matrix."""
        raise NotImplementedError

    def close(self) -> None:
        """Close what is open; the next access opens it again."""


@dataclass
class H5adFile(CellSource):
    """One open h5ad file; opened lazily in the process that reads it, never handed across a fork.

    Args:
        path: The file, or its URL; with passwords and tokens masked from then on, for messages.
        layer: Name of a layer, "raw" for `.raw`, or None for `X`.
    """

    path: str
    layer: str | None = None
    _place: str = field(default="", repr=False)
    _file: h5py.File | None = field(default=None, repr=False)
    _pid: int = field(default=0, repr=False)
    _whole: Any = field(default=None, repr=False)
    _offsets: np.ndarray | None = field(default=None, repr=False)
    _readers: tuple[h5py.File, SpanReader, SpanReader] | None = field(default=None, repr=False)
    _checked: tuple[h5py.File, h5py.Group | h5py.Dataset, str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._place, self.path = self.path, shown_path(self.path)

    def __getstate__(self) -> dict[str, Any]:
        closed = dict.fromkeys(("_file", "_whole", "_offsets", "_readers", "_checked"))
        return {"path": self.path, "layer": self.layer, "_place": self._place, "_pid": 0, **closed}

    @property
    def file(self) -> h5py.File:
        """The open HDF5 file, reopened after a fork.

        Raises:
            InputError: It cannot be fetched or opened, keeps data in other files, or is no AnnData.
        """
        if self._file is None or self._pid != os.getpid():
            local = local_path(self._place)
            try:
                file = h5py.File(local, "r")
                self._check(file)
            except (OSError, RuntimeError) as error:
                raise _refusal(self.path, local, error) from error
            self._file, self._pid = file, os.getpid()
        return self._file

    def close(self) -> None:
        """Close the file; the next access opens it again."""
        if self._file is not None and self._pid == os.getpid():
            self._file.close()
        self._file = self._whole = self._offsets = self._readers = self._checked = None

    def _check(self, file: h5py.File) -> None:
        links: list[str] = []
        file.visititems_links(lambda name, link: None if isinstance(link, h5py.HardLink) else links.append(_text(name)))
        if links:
            raise InputError(f"{self.path} links {listed(links)} to another place, which is refused. Copy the data in.")
        missing = [f"/{name}" for name in ("obs", "var") if name not in file]
        if missing or ("mod" in file and "X" not in file):
            raise InputError(
                f"{self.path} has {'no ' + missing[0] if missing else '/mod but no /X'}: it is not a single AnnData "
                "(MuData and Loom files are not). Save the modality you want with AnnData.write_h5ad."
            )

    # -- the matrix ------------------------------------------------------------------------------------------------

    @property
    def matrix(self) -> h5py.Group | h5py.Dataset:
        """The chosen matrix.

        Raises:
            InputError: The file has no such matrix, stores it in an unknown form, or keeps it in another file.
        """
        return self._checked_matrix()[0]

    @property
    def format(self) -> str:
        """How the matrix is stored: csr, csc or dense."""
        return self._checked_matrix()[1]

    def _checked_matrix(self) -> tuple[h5py.Group | h5py.Dataset, str]:
        """Return the matrix and how it is stored, looked at once each time the file is opened."""
        if self._checked is not None and self._checked[0] is self.file:
            return self._checked[1:]
        name = self.matrix_name
        if name not in self.file:
            found = [*(["X"] if "X" in self.file else []), *self.layers]
            found_text = f"but has: {listed(found)}. Choose with --layer" if found else "nor any other. Add one"
            raise InputError(f"{self.path} has no matrix {name!r}, {found_text}.")
        node = self.file[name]
        format_ = _format_of(node)
        if format_ == "unknown":
            raise InputError(f"{self.path}: {name} is stored in a form that is no matrix. Re-save it with anndata.")
        for part in [node] if isinstance(node, h5py.Dataset) else [node[key] for key in ("data", "indices", "indptr")]:
            if part.external or part.is_virtual:
                raise InputError(
                    f"{self.path} keeps {part.name[1:]} in another file, which is refused. Copy the data in."
                )
        self._checked = (self.file, node, format_)
        return node, format_

    @property
    def layers(self) -> list[str]:
        """Names of all matrices other than `X`, as --layer takes them."""
        return [*(["raw"] if "raw/X" in self.file else []), *self.file.get("layers", {})]

    def with_layer(self, layer: str | None) -> "H5adFile":
        """Return the same file with another matrix."""
        return H5adFile(self._place, layer=layer)

    @property
    def matrix_name(self) -> str:
        """Path of the chosen matrix within the file."""
        return {None: "X", "raw": "raw/X"}.get(self.layer, f"layers/{self.layer}")

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and columns of the chosen matrix."""
        matrix = self.matrix
        if isinstance(matrix, h5py.Dataset):
            return int(matrix.shape[0]), int(matrix.shape[1])
        shape = matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape"))
        if shape is None or len(shape) != 2:
            raise InputError(f"{self.path}: {self.matrix_name} does not say its shape. Re-save it with anndata.")
        return int(shape[0]), int(shape[1])

    @property
    def offsets(self) -> np.ndarray:
        """Where each row's values start in a CSR matrix, int64 of shape (n + 1,).

        Raises:
            InputError: The offsets do not increase or do not fit the matrix.
        """
        if self._offsets is None:
            group = self.matrix
            offsets = np.asarray(group["indptr"][:], dtype=np.int64)
            length = min(len(group["data"]), len(group["indices"]))
            if not _are_sound(offsets, num_rows=self.shape[0], num_values=length):
                raise InputError(f"{self.path}: {self.matrix_name}/indptr is damaged. Write the file again.")
            self._offsets = offsets
        return self._offsets

    def _whole_csr(self) -> sparse.csr_matrix:
        if self._whole is None:
            group = self.matrix
            parts = (_supported(group["data"][:]), group["indices"][:], group["indptr"][:])
            try:
                self._whole = _checked_csr(sparse.csc_matrix(parts, shape=self.shape))
            except ValueError as error:
                raise InputError(f"{self.path}: {self.matrix_name} is damaged ({error}). Write it again.") from error
        return self._whole

    def _spans(self) -> tuple[SpanReader, SpanReader]:
        """Return readers of the values and columns of a CSR matrix, made again whenever the file is reopened."""
        if self._readers is None or self._readers[0] is not self.file:
            data, indices = (SpanReader(self.matrix[key], path=self.file.filename) for key in ("data", "indices"))
            self._readers = (self.file, data, indices)
        return self._readers[1:]

    def gather_rows(self, rows_m: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Read scattered rows as CSR where that costs no more than neighbouring ones, else return None."""
        if self.format != "csr" or not all(span.is_mapped for span in self._spans()):
            return None
        starts_m, stops_m = self.offsets[rows_m], self.offsets[rows_m + 1]
        values, columns = (span.gather(starts_m, stops_m) for span in self._spans())
        return values, columns, np.concatenate([[0], np.cumsum(stops_m - starts_m)])

    def read_rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read neighbouring rows as CSR: values (l,), columns (l,), offsets from 0 (stop - start + 1,).

        CSR is read straight from disk, dense rows are compressed as they are read. CSC is converted once, in memory.
        """
        try:
            if self.format == "dense":
                return _compress(self.matrix[start:stop])
            if self.format == "csc":
                rows = self._whole_csr()[start:stop]
                return rows.data, rows.indices, rows.indptr.astype(np.int64)
            offsets = self.offsets[start : stop + 1]
            first, last = int(offsets[0]), int(offsets[-1])
            data, indices = self._spans()
            return data.read(first, last), indices.read(first, last), offsets - offsets[0]
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{self.path}: rows {start}..{stop - 1} cannot be read ({error}). The file is damaged, or its "
                "compression needs a plugin (pip install hdf5plugin)."
            ) from error

    # -- obs and var -----------------------------------------------------------------------------------------------

    @property
    def var_frame(self) -> str:
        """Where the columns of the chosen matrix are named."""
        if self.layer != "raw":
            return "var"
        if "raw/var" not in self.file:
            raise InputError(f"{self.path} has no .raw with gene names. Choose another matrix with --layer.")
        return "raw/var"

    def columns_of(self, frame: str) -> list[str]:
        """Return the names of the columns of `obs`, `var` or `raw/var`."""
        node = self.file[frame]
        if isinstance(node, h5py.Group) and "column-order" in node.attrs:
            return [_text(name) for name in node.attrs["column-order"]]
        return [str(name) for name in self._frame(frame).columns]

    def _column(self, frame: str, column: str) -> pd.Series:
        node = self.file[frame]
        # Version 0.1 keeps the categories of all columns apart: a column read alone would be codes, not labels.
        is_self_contained = isinstance(node, h5py.Group) and node.attrs.get("encoding-version") == "0.2.0"
        if is_self_contained and column in node:
            return pd.Series(self._read_elem(f"{frame}/{column}"))
        return self._frame(frame)[column]

    def _frame(self, frame: str) -> pd.DataFrame:
        node = self.file[frame]
        return _frame_of_table(node, self.file) if isinstance(node, h5py.Dataset) else self._read_elem(frame)

    def _read_elem(self, name: str) -> Any:
        from anndata.io import read_elem

        try:
            return read_elem(self.file[name])
        except Exception as error:  # anndata raises many kinds here; all mean the same to a user
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{self.path}: {name} cannot be read ({reason}). Re-save it with anndata.") from error

    def _index_of(self, frame: str) -> np.ndarray:
        node = self.file[frame]
        if isinstance(node, h5py.Group) and "_index" in node.attrs and node.attrs["_index"] in node:
            return np.asarray(self._read_elem(f"{frame}/{node.attrs['_index']}"), dtype=object)
        return np.asarray(self._frame(frame).index, dtype=object)

    @property
    def obs_names(self) -> np.ndarray:
        """Names of the cells, shape (n,)."""
        return self._index_of("obs")

    @property
    def var_names(self) -> np.ndarray:
        """Names of the columns of the chosen matrix, shape (c,)."""
        return self._index_of(self.var_frame)

    def varm_array(self, name: str) -> np.ndarray | None:
        """Return one array of `varm`, or None where there is none of that name."""
        node = self.file.get(f"varm/{name}")
        return node[()] if isinstance(node, h5py.Dataset) and node.shape else None


def _refusal(path: str, local: str, error: Exception) -> InputError:
    """Say what an unreadable file really is."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} does not exist. Check the path.")
    if isinstance(error, PermissionError | BlockingIOError):
        return InputError(f"{path} cannot be opened ({error}): it is protected, or locked by a program that writes it.")
    if not os.path.isfile(local):
        return InputError(f"{path} cannot be read ({error}). Give an .h5ad file written by anndata.")
    with open(local, "rb") as stream:
        head = stream.read(64)
    if not head:
        return InputError(f"{path} is empty (0 bytes). Download or write it again.")
    return InputError(f"{path} is {kind_of(head)}: {error}. Give an .h5ad file written by anndata.")


@dataclass
class MemoryFile(CellSource):
    """An AnnData in memory, read in the same way as a file.

    Args:
        adata: The cells; may be backed or a view.
        layer: Name of a layer, "raw" for `.raw`, or None for `X`.
    """

    adata: Any
    layer: str | None = None
    path: str = "AnnData"
    format: str = "csr"
    _csr: sparse.csr_matrix | None = field(default=None, repr=False)

    @property
    def _matrix(self) -> sparse.csr_matrix:
        if self._csr is None:
            if self.layer == "raw":
                chosen = self.adata.raw.X if len(self._var) else None
            elif self.layer is not None and self.layer not in self.adata.layers:
                raise InputError(
                    f"{self.path} has no layer {self.layer!r}. {did_you_mean(self.layer, [*self.adata.layers])}"
                )
            else:
                chosen = self.adata.X if self.layer is None else self.adata.layers[self.layer]
            self._csr = csr_of(chosen, source=f"{self.path} ({self.layer or 'X'})")
        return self._csr

    @property
    def layers(self) -> list[str]:
        """Names of all matrices other than `X`, as --layer takes them."""
        return [*(["raw"] if self.adata.raw is not None else []), *self.adata.layers]

    def with_layer(self, layer: str | None) -> "MemoryFile":
        """Return the same cells with another matrix."""
        return MemoryFile(self.adata, layer=layer)

    @property
    def shape(self) -> tuple[int, int]:
        """Cells and columns of the chosen matrix."""
        return self.adata.n_obs, len(self._var)

    def read_rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return neighbouring rows as CSR: values, columns, offsets from 0."""
        offsets = self._matrix.indptr[start : stop + 1].astype(np.int64)
        span = slice(int(offsets[0]), int(offsets[-1]))
        return self._matrix.data[span], self._matrix.indices[span], offsets - offsets[0]

    @property
    def _var(self) -> pd.DataFrame:
        if self.layer == "raw" and self.adata.raw is None:
            raise InputError(f"{self.path} has no .raw. Choose another matrix with --layer.")
        return self.adata.raw.var if self.layer == "raw" else self.adata.var

    @property
    def var_frame(self) -> str:
        """Where the columns of the chosen matrix are named."""
        return "raw/var" if self.layer == "raw" else "var"

    def columns_of(self, frame: str) -> list[str]:
        """Return the names of the columns of `obs` or `var`."""
        return [str(name) for name in (self.adata.obs if frame == "obs" else self._var).columns]

    def _column(self, frame: str, column: str) -> pd.Series:
        return (self.adata.obs if frame == "obs" else self._var)[column]

    @property
    def obs_names(self) -> np.ndarray:
        """Names of the cells, shape (n,)."""
        return np.asarray(self.adata.obs_names, dtype=object)

    @property
    def var_names(self) -> np.ndarray:
        """Names of the columns of the chosen matrix, shape (c,)."""
        return np.asarray(self._var.index, dtype=object)

    def varm_array(self, name: str) -> np.ndarray | None:
        """Return one array of `varm`, or None where there is none of that name."""
        found = self.adata.varm.get(name)
        return found if isinstance(found, np.ndarray) and found.shape else None


def _compress(dense_nc: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    is_stored_nc = dense_nc != 0
    offsets = np.concatenate([[0], np.cumsum(is_stored_nc.sum(axis=1))]).astype(np.int64)
    return dense_nc[is_stored_nc], np.nonzero(is_stored_nc)[1].astype(np.int32), offsets


def csr_of(matrix: Any, *, source: str = "AnnData") -> sparse.csr_matrix:
    """Turn any in-memory or backed matrix (CSR, CSC, COO, dense, HDF5) into CSR without changing its values."""
    if matrix is None:
        raise InputError(f"{source} has no matrix there (it is None). Choose one with --layer.")
    if hasattr(matrix, "to_memory"):
        matrix = matrix.to_memory()
    if not sparse.issparse(matrix):
        matrix = np.atleast_2d(np.asarray(matrix))
        if matrix.dtype.kind not in "biuf":
            raise InputError(f"{source} holds {matrix.dtype} instead of numbers. Choose another matrix with --layer.")
        matrix = _supported(matrix)
    try:
        return _checked_csr(matrix)
    except ValueError as error:
        raise InputError(f"{source} is damaged ({error}). Build the matrix again.") from error


def _supported(values: np.ndarray) -> np.ndarray:
    """Return values in a dtype that scipy.sparse takes: native byte order, at least single precision."""
    native = values.dtype.newbyteorder("=")
    return values.astype(np.float32 if native == np.float16 else native, copy=False)


def _are_sound(offsets: np.ndarray, *, num_rows: int, num_values: int) -> bool:
    """True when offsets start at 0, never fall and stay within the values."""
    has_ends = len(offsets) == num_rows + 1 and offsets[0] == 0 and offsets[-1] <= num_values
    return bool(has_ends and (np.diff(offsets) >= 0).all())


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


def _format_of(node: h5py.Group | h5py.Dataset) -> str:
    """Say how a matrix is stored: csr, csc, dense or unknown."""
    if isinstance(node, h5py.Dataset):
        return "dense" if node.ndim == 2 and node.dtype.kind in "biuf" else "unknown"
    kind = node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", ""))
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    kind = kind.removesuffix("_matrix") if {"data", "indices", "indptr"} <= set(node) else "unknown"
    return kind if kind in ("csr", "csc") else "unknown"


def _text(name: Any) -> str:
    return name.decode() if isinstance(name, bytes) else str(name)


def _frame_of_table(table: h5py.Dataset, file: h5py.File) -> pd.DataFrame:
    """Read `obs` or `var` as anndata 0.6 kept them: one compound table, categories in `uns`."""
    frame = pd.DataFrame({name: table[name] for name in table.dtype.names})
    for name in frame.columns:
        if frame[name].dtype == object:
            frame[name] = [_text(value) for value in frame[name]]
        if f"uns/{name}_categories" in file:
            labels = [_text(label) for label in file[f"uns/{name}_categories"][()]]
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
