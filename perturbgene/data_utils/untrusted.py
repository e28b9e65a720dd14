"""What a file of cells may not do: lead to other files, or claim more than it holds.

Owns these checks for HDF5, zarr and 10x, before anything is read; leaves all other damage to `sources`.
"""

import gzip
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil

from perturbgene.errors import InputError, listed

#: A compressor cannot shrink zeros by more than about this (deflate: 1,032), so a file that claims more holds nothing.
MOST_COMPRESSION = 5_000
#: What may be claimed without being held; an array of zeros that was never written holds nothing.
FREE_BYTES = 10**9
#: Bytes of the shortest line of a `matrix.mtx`, with its line break.
_SHORTEST_LINE = 6
_DEFLATE = 1_032
_TEXTS_AT_ONCE = 1 << 20


def is_array(node: Any) -> bool:
    """True for an array of HDF5 or zarr, False for a group."""
    return hasattr(node, "dtype")


def text_of(name: Any) -> str:
    """Return a text of HDF5, which may be bytes."""
    return name.decode() if isinstance(name, bytes) else str(name)


def num_bytes_of(array: Any) -> int:
    """Return the bytes that an array of HDF5 or zarr has in memory, of texts those of their references."""
    return math.prod(array.shape or ()) * int(array.dtype.itemsize)


def walk(node: Any) -> Iterator[Any]:
    """Yield a group and all that is in it; `check_structure` has shown that this ends."""
    yield node
    if not is_array(node):
        for name in node:
            yield from walk(node[name])


def check_structure(file: h5py.File, path: str) -> list[h5py.Group | h5py.Dataset]:
    """Return the file and all that is in it.

    Raises:
        InputError: There is a link to elsewhere, a group in two places, data in another file, or a damaged type.
    """
    names: list[str] = []
    links: list[str] = []

    def look(name: bytes, link: Any) -> None:
        (names if link.type == h5py.h5l.TYPE_HARD else links).append(text_of(name))

    file.id.links.visit(look, info=True)
    if links:
        raise InputError(f"{path} links {listed(links)} to another place, which is refused. Copy the data in.")
    seen: set[int] = set()
    nodes = [file["/"], *map(file.__getitem__, names)]
    for name, node in zip(["/", *names], nodes, strict=True):
        if isinstance(node, h5py.Dataset) and (node.external or node.is_virtual):
            raise InputError(f"{path} keeps {name} in another file, which is refused. Copy the data in.")
        address = h5py.h5o.get_info(node.id).addr
        if isinstance(node, h5py.Group) and address in seen:
            raise InputError(f"{path} has the group {name} in two places, which is refused. Write the file again.")
        seen.add(address)
        attributes = (h5py.h5a.open(node.id, index=index) for index in range(h5py.h5a.get_num_attrs(node.id)))
        typed = [*attributes, *([node.id] if isinstance(node, h5py.Dataset) else [])]
        if any(_ends_the_process(one.get_type()) for one in typed):
            raise InputError(f"{path}: the type of {name} or an attribute of it is damaged. Write the file again.")
    return nodes


def _ends_the_process(kind: h5py.h5t.TypeID) -> bool:
    """True for a type of variable length that is neither text nor list: HDF5 crashes when it reads a value of it."""
    if isinstance(kind, h5py.h5t.TypeCompoundID):
        return any(_ends_the_process(kind.get_member_type(index)) for index in range(kind.get_nmembers()))
    if not isinstance(kind, h5py.h5t.TypeVlenID | h5py.h5t.TypeArrayID):
        return False
    is_unknown = kind.encode()[3] & 15 > 1  # behind two bytes of the encoding and that of the class: list 0, text 1
    return (isinstance(kind, h5py.h5t.TypeVlenID) and is_unknown) or _ends_the_process(kind.get_super())


def check_texts(nodes: list[Any], local: str, path: str) -> None:
    """Raise an InputError for a text that claims more bytes than its file has.

    HDF5 would fill as much memory with zeros, up to 4 GB, before it finds that out. Looked at are the arrays that a
    file has in one piece, as anndata writes them without compression.
    """
    size = os.path.getsize(local)
    for array in nodes:
        start = array.id.get_offset() if is_array(array) and array.dtype.kind == "O" and array.size else None
        if start is None:
            continue
        width = array.id.get_storage_size() // array.size
        reference = np.dtype({"names": ["length"], "formats": ["<u4"], "itemsize": width})
        for first in range(0, array.size, _TEXTS_AT_ONCE):
            count = min(_TEXTS_AT_ONCE, array.size - first)
            lengths = np.fromfile(local, reference, count=count, offset=start + first * width)["length"]
            if lengths.size and (longest := int(lengths.max())) > size:
                raise InputError(
                    f"{path}: a text of {array.name[1:]} claims {longest:,} bytes, but the file has {size:,}. It is "
                    "damaged. Download or write it again."
                )


def check_folder(folder: str, path: str) -> None:
    """Raise an InputError if a file or folder of a zarr store is a symbolic link that leaves the store."""
    root = os.path.realpath(folder)
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            place = os.path.join(parent, name)
            if os.path.islink(place) and not os.path.realpath(place).startswith(root + os.sep):
                raise InputError(
                    f"{path} keeps {os.path.relpath(place, root)} in another place, which is refused. Copy the data in "
                    "(cp -rL)."
                )


def check_claim(array: Any, name: str, path: str) -> None:
    """Raise an InputError if an array claims so much more memory than its file holds that it was made for that."""
    num_bytes = num_bytes_of(array)
    is_hdf5 = isinstance(array, h5py.Dataset)
    if num_bytes <= (FREE_BYTES if is_hdf5 else psutil.virtual_memory().total):  # what zarr holds must be listed
        return
    if num_bytes > MOST_COMPRESSION * max(1, array.id.get_storage_size() if is_hdf5 else array.nbytes_stored()):
        raise InputError(
            f"{path}: {name} claims {num_bytes / 1e9:,.0f} GB, but the file holds next to nothing. It is damaged or "
            "made to fill the memory. Write it again."
        )


def check_mtx(matrix: Path, *, num_genes: int, num_cells: int) -> None:
    """Raise a ValueError if the head of a `matrix.mtx` does not fit the tables next to it, or its own size."""
    opener: Any = gzip.open if matrix.suffix == ".gz" else open
    with opener(matrix, "rb") as stream:
        line = b"%"
        while line.startswith(b"%"):
            line = stream.readline(10_000)
    rows, columns, count = (int(word) for word in line.split())
    if (rows, columns) != (num_genes, num_cells):
        raise ValueError(f"matrix.mtx has {rows:,} x {columns:,} values of {num_genes:,} genes and {num_cells:,} cells")
    most = matrix.stat().st_size * (_DEFLATE if matrix.suffix == ".gz" else 1) // _SHORTEST_LINE
    if count > most:
        raise ValueError(f"matrix.mtx claims {count:,} values, but is too short for them")
