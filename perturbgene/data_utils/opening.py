"""Every way to a file or an AnnData: patterns are expanded once, and one function opens what they name.

Owns paths, and deciding which reader of `sources` a file gets; what a file is that has no reader, `foreign` says.
"""

import glob
import itertools
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py

from perturbgene.data_utils.foreign import refused_object
from perturbgene.data_utils.remote import expand_url, local_path
from perturbgene.data_utils.sources import CellSource, H5adFile, MemoryFile, TenxFile, ZarrFile, mtx_prefix
from perturbgene.data_utils.untrusted import check_structure
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
    if is_url(path):
        return path.partition("?")[0].endswith(".zarr")
    return any(os.path.exists(os.path.join(path, name)) for name in ZARR_FILES)


def _files_of(path: str, *, given: str) -> list[str]:
    """Return the files that one path, glob, folder or URL names."""
    if is_url(path):
        is_store = is_zarr(path) and not re.search(r"[*?\[]", path)
        return [path.rstrip("/")] if is_store else sorted(expand_url(path), key=_natural_key)
    path = os.path.expanduser(path)
    if os.path.isdir(path) and not is_zarr(path) and mtx_prefix(Path(path)) is None:
        found = [file for end in ("h5ad", "zarr") for file in glob.glob(os.path.join(glob.escape(path), f"*.{end}"))]
        if found:
            return sorted(found, key=_natural_key)
        names = sorted(os.listdir(path))
        advice = ". Point to the folder of the shards."
        if tenx := [name for name in names if name.endswith((".h5", "_bc_matrix"))]:
            advice = f", but {listed(tenx, most=3)}. Name the file or folder that you mean."
        elif any("matrix.mtx" in name for name in names):
            advice = ", but several 10x matrices. Put each into a folder of its own, and name one."
        raise InputError(f"folder {path} (from {given!r}) holds no .h5ad file and no .zarr store{advice}")
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
        if not (hasattr(item, "obs_names") and hasattr(item, "var_names") and not hasattr(item, "mod")):
            raise refused_object(item)
    if is_one and len(items) > 1:
        raise refused_object(items)
    return items


def one_source(data: Any) -> Any:
    """Return the one path or AnnData that a function was given; see `as_sources`."""
    return as_sources(data, is_one=True)[0]


def open_source(given: Any, *, layer: str | None = None) -> CellSource:
    """Return a reader of one of `as_sources`, by what it holds; it opens the file when it is used."""
    if not isinstance(given, str | Path):
        return MemoryFile(given, layer)
    path = str(given)
    if is_zarr(path):
        return ZarrFile(path, layer)
    if os.path.isdir(path):
        return TenxFile(path, layer)
    if not path.partition("?")[0].endswith(".h5ad"):
        local = local_path(path)
        # `H5adFile` says what a damaged file is
        with suppress(OSError, RuntimeError, KeyError), h5py.File(local, "r") as file:
            check_structure(file, shown_path(path))
            groups = [node for node in file.values() if isinstance(node, h5py.Group)]
            # the groups of Cell Ranger 3 and later, or of Cell Ranger 2
            if "obs" not in file and any({"barcodes", "data", "indices", "indptr"} <= set(node) for node in groups):
                return TenxFile(path, layer)
    return H5adFile(path, layer)
