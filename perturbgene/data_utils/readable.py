"""Whether anndata can read all that a file of cells holds, found out before work is done that ends with a copy of it.

Owns reading a file as anndata does, but for large arrays, which are read in pieces; leaves opening it to `sources`.
"""

import warnings
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
from scipy import sparse

from perturbgene.data_utils.opening import open_source
from perturbgene.data_utils.sources import StoredCells, ZarrFile, reason_of
from perturbgene.data_utils.untrusted import check_claim, is_array, num_bytes_of, walk
from perturbgene.errors import InputError, raise_if_machine
from perturbgene.urls import is_url

#: Arrays with more bytes are read in pieces of about this size.
_PIECE_BYTES = 1 << 24


def check_readable(path: Any, *, source: str = "") -> None:
    """Raise an InputError that names what cannot be read in an h5ad file or zarr store.

    Nothing is looked for in other kinds of files, which are read whole when they are copied, nor in stores on the web.

    Args:
        path: The file.
        source: The file that it is a copy of, which the message names.
    """
    with closing(open_source(path)) as opened:
        if isinstance(opened, ZarrFile):
            opened.is_consolidated = False  # a copy is changed array by array
        if isinstance(opened, StoredCells) and not is_url(str(path)):
            _read_as_anndata(opened, source or opened.path)


def _read_as_anndata(cells: StoredCells, path: str) -> None:
    from anndata import AnnData
    from anndata.experimental import read_dispatched

    damaged: list[str] = []  # the innermost element that cannot be read, and those around it

    def read(function: Any, name: str, element: Any, *, iospec: Any) -> Any:
        try:
            if name.strip("/") == "":
                names = [key for key in element if not key.startswith("raw.")]
                return AnnData(**{key: read_dispatched(element[key], read) for key in names})
            if is_array(element) and name.strip("/") in ("obs", "var"):  # of anndata 0.6
                return cells.table(name.strip("/"))
            is_plain = iospec.encoding_type in ("array", "string-array") and not name.endswith("/categories")
            if is_plain and num_bytes_of(element) > _PIECE_BYTES:
                return _stand_in(element, is_text=iospec.encoding_type == "string-array")
            if iospec.encoding_type in ("csr_matrix", "csc_matrix") and num_bytes_of(element["data"]) > _PIECE_BYTES:
                for key in ("data", "indices", "indptr"):
                    _stand_in(element[key])
                return sparse.csr_matrix(tuple(int(length) for length in element.attrs["shape"]), dtype=np.int8)
            return function(element)
        except Exception:
            damaged.append(name.strip("/") or "the file")
            raise

    file = cells.file  # refused in its own words if it cannot be opened
    try:
        for array in filter(is_array, walk(file)):
            check_claim(array, array.name.strip("/"), path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that repeat, and of old formats
            read_dispatched(file, read)
    except InputError:
        raise
    except Exception as error:  # of h5py, zarr, numpy, pandas and anndata, of many kinds
        raise_if_machine(error)
        where = damaged[0] if damaged else "the file"
        raise InputError(
            f"{path}: {where} cannot be read ({reason_of(error)}), so no copy of the file could be. Write the file "
            "again, or without it."
        ) from error


def _pieces(array: Any) -> Iterator[slice]:
    """Cut an array along its first axis into pieces of whole chunks and about `_PIECE_BYTES`."""
    num_rows, row_bytes = array.shape[0], max(1, num_bytes_of(array) // max(1, array.shape[0]))
    chunk_rows = array.chunks[0] if array.chunks else 1
    step = max(1, _PIECE_BYTES // (row_bytes * chunk_rows)) * chunk_rows
    yield from (slice(start, min(num_rows, start + step)) for start in range(0, num_rows, step))


def _stand_in(array: Any, *, is_text: bool = False) -> Any:
    """Read an array in pieces, and return one of its shape that needs no memory."""
    as_read = array.asstr() if is_text and hasattr(array, "asstr") else array
    for piece in _pieces(array):
        as_read[piece]
    one = np.array("", dtype=object) if is_text else np.zeros((), dtype=array.dtype)
    return np.broadcast_to(one, array.shape)
