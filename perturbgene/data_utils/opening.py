"""Every way to a file or an AnnData: patterns are expanded once, and one function opens what they name.

Owns paths, and deciding which reader of `sources` a file gets; what a file is that has no reader, `foreign` says.
"""

import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py

from perturbgene.data_utils.foreign import refused_object
from perturbgene.data_utils.remote import expand_url, local_path
from perturbgene.data_utils.sources import CellSource, H5adFile, MemoryFile, TenxFile, ZarrFile, mtx_prefix
from perturbgene.errors import InputError, listed
from perturbgene.urls import is_url, shown_path, url_identity

MOST_PATHS = 100_000
ZARR_FILES = ("zarr.json", ".zgroup", ".zmetadata", ".zattrs")


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
            raise InputError(f"pattern {shown_path(pattern)!r} names more than {MOST_PATHS:,} files. Narrow it.")
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


def is_zarr(path: str) -> bool:
    """True for a zarr store: a folder that has the files of one, or a URL that ends in `.zarr`."""
    path = path.rstrip("/")
    return (
        path.partition("?")[0].endswith(".zarr")
        if is_url(path)
        else any(os.path.exists(os.path.join(path, name)) for name in ZARR_FILES)
    )


def _files_of(path: str, *, given: str) -> list[str]:
    if is_url(path):
        is_store = is_zarr(path) and not re.search(r"[*?\[]", path)
        return [path.rstrip("/")] if is_store else sorted(expand_url(path), key=_natural_key)
    path = os.path.expanduser(path)
    if os.path.isdir(path) and not is_zarr(path) and mtx_prefix(Path(path)) is None:
        found = [file for end in ("h5ad", "zarr") for file in glob.glob(os.path.join(glob.escape(path), f"*.{end}"))]
        if not found:
            raise _empty_folder(path, given)
        return sorted(found, key=_natural_key)
    if os.path.exists(path):
        return [path]
    found = sorted(glob.glob(path), key=_natural_key)
    if not found:
        raise InputError(f"{path} (from {given!r}) does not exist. Check the path and the pattern's bounds.")
    return [file for one in found for file in _files_of(one, given=given)]


def _empty_folder(path: str, given: str) -> InputError:
    """Say what a folder without cells holds."""
    names = sorted(os.listdir(path))
    text = f"folder {path} (from {given!r}) holds no .h5ad file and no .zarr store"
    if tenx := [name for name in names if name.endswith(".h5") or name.endswith("_bc_matrix")]:
        return InputError(f"{text}, but {listed(tenx, most=3)}. Name the file or folder that you mean.")
    if any("matrix.mtx" in name for name in names):
        return InputError(f"{text}, but several 10x matrices. Put each into a folder of its own, and name one.")
    return InputError(f"{text}. Point to the folder of the shards.")


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
        file = identity(path)
        if (twin := first_of.get(file)) is not None:
            raise InputError(
                f"{shown_path(path)} is the same file as {shown_path(twin)}: its cells would count twice. "
                "Name each file once."
            )
        first_of[file] = path
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


def as_sources(data: Any, *, is_one: bool = False) -> list[Any]:
    """Return the paths or the AnnData objects that a function was given, each of which `open_source` opens.

    Args:
        data: A path or pattern, an AnnData, or a list of either.
        is_one: Only one file or AnnData can be read.

    Raises:
        InputError: It is neither, a path leads nowhere, or there are several where one is read.
    """
    items = list(data) if isinstance(data, list | tuple) else [data]
    if all(isinstance(item, str | Path) for item in items):
        files = expand_paths(data if isinstance(data, FileList) else items)
        if is_one and len(files) > 1:
            named = f"{shown_path(data)} names" if isinstance(data, str | Path) else "These are"
            raise InputError(f"{named} {len(files):,} files, but one is read here. Name one file.")
        return files
    for item in items:
        if not _is_adata(item):
            raise refused_object(item)
    if is_one and len(items) > 1:
        raise refused_object(items)
    return items


def one_source(data: Any) -> Any:
    """Return the one path or AnnData that a function was given; see `as_sources`."""
    return as_sources(data, is_one=True)[0]


def _is_adata(data: Any) -> bool:
    return hasattr(data, "obs_names") and hasattr(data, "var_names") and not hasattr(data, "mod")


def open_source(given: Any, *, layer: str | None = None) -> CellSource:
    """Return a reader of a file, zarr store, 10x folder, URL or AnnData, by what it holds; it opens when it is used.

    Args:
        given: As `as_sources` returns it.
        layer: Which matrix to read: a layer, "raw", or None for X.
    """
    if not isinstance(given, str | Path):
        return MemoryFile(given, layer)
    path = str(given)
    if is_zarr(path):
        return ZarrFile(path, layer)
    if os.path.isdir(path):
        return TenxFile(path, layer)
    is_h5ad = path.partition("?")[0].endswith(".h5ad")
    return H5adFile(path, layer) if is_h5ad or not _is_tenx(local_path(path)) else TenxFile(path, layer)


def _is_tenx(path: str) -> bool:
    """True for an HDF5 file with the groups of Cell Ranger 3 and later, or of Cell Ranger 2."""
    try:
        with h5py.File(path, "r") as file:
            groups = [node for node in file.values() if isinstance(node, h5py.Group)]
            return "obs" not in file and any({"barcodes", "data", "indices", "indptr"} <= set(node) for node in groups)
    except OSError:  # whoever opens it says what it is
        return False
