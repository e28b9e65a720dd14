"""Outputs: written whole or not at all, by one process at a time.

Owns temporary names, renaming, locks, formats' numbers and how many files may be open; knows nothing of what is
written. Every command that writes goes through here.
"""

import hashlib
import importlib
import json
import operator
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from perturbgene import __version__
from perturbgene.errors import InputError, NewerFormatError
from perturbgene.forms import misfit

#: First words of every page that `report` writes, by which an older one is known.
PAGE_MARKER = '<!DOCTYPE html>\n<meta name="generator" content="perturbgene report">'


def is_report(path: Path) -> bool:
    """Return whether a file is a page that `report` has written."""
    return path.read_bytes().startswith(PAGE_MARKER.encode())


def partial_path(path: str | Path) -> Path:
    """Return the name under which an output is written until it is whole.

    Example:
        >>> partial_path("runs/predicted.h5ad").as_posix()
        'runs/.predicted.h5ad.partial'
    """
    path = Path(path)
    return path.with_name(f".{path.name}.partial")


def version_of(path: str | Path) -> tuple[tuple[int, int], ...]:
    """Return size and time of a file, or of all files in a folder: what differs when one has been written again."""
    path = Path(path)
    states = [os.stat(file) for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return tuple((state.st_size, state.st_mtime_ns) for state in states)


def piece_path(output: str | Path, number: int, count: int) -> Path:
    """Return the folder of one piece of an output that several jobs compute, `number` in 1..count.

    Example:
        >>> piece_path("runs/predicted.h5ad", 3, 10).as_posix()
        'runs/predicted.h5ad.parts/part-03-of-10'
    """
    output = Path(output)
    return output.with_name(f"{output.name}.parts") / f"part-{number:0{len(str(count))}d}-of-{count}"


def open_file_limit(*, most: int | None = None) -> int:
    """Return how many descriptors this process may have, after raising the limit to `most` where that is allowed.

    macOS begins with 256 and Linux with 1,024, and any process may have more.
    """
    try:
        resource: Any = importlib.import_module("resource")
    except ImportError:  # Windows, where the C library's limit is higher
        return 8192
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (sys.maxsize if one == resource.RLIM_INFINITY else one for one in limits)
    if most is not None and soft < min(most, hard):
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, hard), limits[1]))
            return min(most, hard)
    return soft


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` when the block ends without an error.

    On an error the temporary file is deleted and an older file stays as it was. Callers that may run in several
    processes hold the output with `claimed`, so what a killed process left here can be overwritten.
    """
    temporary = partial_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as error:
        error.add_note(f"while writing {path}")
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder next to `path`; put it in the place of `path` at the end."""
    temporary, replaced = partial_path(path), Path(path).with_name(f".{Path(path).name}.replaced")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if os.path.isdir(path):
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(path, replaced)
        os.rename(temporary, path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_files(main: Path, *others: Path, flag: str = "output") -> Iterator[Path]:
    """Yield an empty folder for all files of one output, under their own names; move them into place at the end.

    `main` is moved last, and an older `main` is deleted before the others move: where `main` exists, the others belong
    to it. Of `others`, those that the block does not write stay as they were.

    Raises:
        InputError: A file cannot be written, or is a folder, which may hold what we did not write.
    """
    _check_no_folder(main, *others, flag=flag)
    staged = partial_path(main)
    try:
        shutil.rmtree(staged, ignore_errors=True)  # of a killed process
        with whole_folder(staged) as folder:
            yield folder
        main.unlink(missing_ok=True)
        for path in [path for path in (*others, main) if (staged / path.name).exists()]:
            os.replace(staged / path.name, path)
    except OSError as error:
        raise InputError(f"{main} cannot be written ({error.strerror or error}). Choose another --{flag}.") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_new(main: Path, *others: Path, overwrite: bool, flag: str = "output") -> None:
    """Refuse to replace the files of an output, unless `overwrite` says so or a killed `whole_files` left them.

    Raises:
        InputError: Names the first file that exists, or a folder in the place of a file, which nothing replaces.
    """
    _check_no_folder(main, *others, flag=flag)
    was_killed = partial_path(main).is_dir()  # all files were written, and some may have been moved
    for path in (main, *others):
        if path.exists() and not overwrite and not (was_killed and path != main):
            raise InputError(f"{path} exists. Choose another --{flag}, or pass --overwrite.")


def _check_no_folder(*paths: Path, flag: str) -> None:
    if folders := [path for path in paths if path.is_dir()]:
        raise InputError(f"{folders[0]} cannot be written (it is a folder). Choose another --{flag}.")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file, whole or not at all; NaN and infinity are refused, since JSON has no word for them."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a ValueError says why it is none, also where lists in lists would exhaust the stack."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half a character fits into no text that is written
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("its lists are nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, for which JSON has no word")


def check_format(source: object, written: Any, *, reads: int) -> int:
    """Return the number of the format in which a file of ours was written.

    Args:
        source: The file, for messages.
        written: What it says; None where it was written before it had a number, which is format 1.
        reads: The newest format that this version reads.

    Raises:
        NewerFormatError: A newer perturbgene wrote it.
        InputError: It is no number.
    """
    try:
        number = 1 if written is None else operator.index(written)  # numbers from HDF5 are numpy's
    except TypeError:
        number = 0
    if number < 1:
        raise InputError(f"{source} is damaged: its format is {written!r}. Restore it as it was written.")
    if number > reads:
        raise NewerFormatError(
            f"{source} has format {number}, but this perturbgene ({__version__}) reads formats up to {reads}. Update "
            "perturbgene: pip install -U perturbgene."
        )
    return number


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sums_of(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, by which it is known to be as it was written."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


#: Sums of a folder's files, by which a damaged one is known.
SUMS_FILE = "sums.json"
SUMS_FORMAT = 1


def _read_sums(folder: Path) -> dict[str, Any]:
    try:
        sums = read_json(folder / SUMS_FILE)
    except FileNotFoundError:  # a folder of before
        return {}
    except ValueError:
        sums = None
    sums = sums if isinstance(sums, dict) else {"": None}
    check_format(folder / SUMS_FILE, sums.pop("format_version", None), reads=SUMS_FORMAT)
    if misfit(sums, {str: {"bytes": int, "sha256": str}}):
        raise InputError(f"{folder / SUMS_FILE} is damaged. Restore the folder as it was written.")
    return sums


def _save_sums(folder: Path, sums: dict[str, Any]) -> None:
    write_json(folder / SUMS_FILE, {"format_version": SUMS_FORMAT, **sums})


def write_sums(folder: Path, paths: Iterable[Path]) -> None:
    """Write `sums.json` into a folder: size and SHA-256 of files that are, or will be, in it."""
    _save_sums(folder, {path.name: sums_of(path) for path in sorted(paths)})


@contextmanager
def renewed_sums(*paths: Path) -> Iterator[None]:
    """Write the sums of files of one folder again after the block has written them; until then they have none."""
    folder = paths[0].parent
    if sums := _read_sums(folder):
        names = {path.name for path in paths}
        _save_sums(folder, {name: one for name, one in sums.items() if name not in names})
    yield
    if sums:
        _save_sums(folder, sums | {path.name: sums_of(path) for path in paths if path.exists()})


def damaged_file(folder: Path) -> str | None:
    """Return which file of a folder is not what its `sums.json` says, and how; None if all are or there are no sums.

    Raises:
        InputError: `sums.json` itself is damaged, or of a newer perturbgene.
    """
    for name, expected in _read_sums(folder).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:  # before anything is read
            return f"{name} has {path.stat().st_size:,} bytes instead of {expected['bytes']:,}"
        if sums_of(path) != expected:
            return f"{name} is damaged: its content is not what was written"
    return None


@contextmanager
def claimed(path: str | Path, *, flag: str, is_inside: bool = False) -> Iterator[None]:
    """Hold an output for this process; the system releases it when the process ends, however it ends.

    Folders that are made for the lock and are still empty at the end, because the command was refused, are removed.

    Args:
        path: File or folder that will be written.
        flag: Flag that named it, for the message.
        is_inside: Put the lock into the folder `path` itself (``path/.lock``) instead of next to it.

    Raises:
        InputError: Another process holds it, or the folder cannot be written.
    """
    path = Path(path)
    lock_path = path / ".lock" if is_inside else path.with_name(f".{path.name}.lock")
    made = [folder for folder in lock_path.parents if not folder.exists()]
    try:
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path, timeout=0)
        lock.acquire()
    except Timeout as error:
        owner = ""
        with suppress(OSError):
            owner = lock_path.read_text(encoding="utf-8").strip()
        shown = f" ({owner})" if owner else ""
        raise InputError(
            f"{path} is being written by another process{shown}. Wait for it, stop it, or choose another --{flag}."
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}). Choose another --{flag}.") from error
    try:
        lock_path.write_text(f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        lock_path.unlink(missing_ok=True)  # while it is held: filelock tries again when its file is gone
        lock.release()
        with suppress(OSError):  # the first one that is not empty ends it
            for folder in made:
                folder.rmdir()
