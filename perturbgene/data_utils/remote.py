"""Files behind a URL: fetched whole, once, and read from this machine's disk from then on.

Owns the network (retries, resuming, versions of a file) and the bounded cache of fetched files; knows nothing of HDF5,
cells or shards. `urls` says what may be shown of a URL.
"""

import atexit
import base64
import hashlib
import http.client
import itertools
import logging
import os
import random
import re
import shutil
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from email.message import Message
from functools import cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from filelock import FileLock
from tqdm import tqdm

from perturbgene.data_utils.foreign import HDF5_SIGNATURE, kind_of
from perturbgene.errors import InputError
from perturbgene.urls import SCHEMES, is_http, is_url, parts_of, shown_url, url_identity

logger = logging.getLogger(__name__)

MOST_CACHE_BYTES = 100 * 10**9
LEAST_FREE_BYTES = 10 * 10**9  # left on the disk by the cache
IDLE_SECONDS = 24 * 3600.0  # a cached file unused for this long may be deleted to make room

DEFAULT_RETRIES = 5
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
TIMEOUT_SECONDS = 60.0
RECHECK_SECONDS = 60.0  # a file that is opened again is looked at on the server this often
CHUNK_BYTES, BUCKET_CHUNK_BYTES = 1 << 20, 1 << 24
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
ADVICE_OF_STATUS = {
    401: "Put user and password into the URL (https://user:password@host/...).",
    403: "You may need permission, or the link has expired.",
}
URL_SAFE = "/%?:@!$&'()*+,;=~"  # RFC 3986: characters that a path or query may hold as they are
HDF5_SUFFIXES = (".h5ad", ".h5", ".hdf5")

_jitter = random.Random()  # its own, so that waiting never moves the seeded global generator


@dataclass(frozen=True)
class Version:
    """What distinguishes versions of a remote file; None where the server does not say."""

    size: int | None
    tag: str | None
    #: What the server calls the file (Content-Disposition), '' if it does not say.
    name: str = field(default="", compare=False)

    def may_equal(self, other: "Version") -> bool:
        """True unless something that both state differs."""
        pairs = (self.size, other.size), (self.tag, other.tag)
        return all(mine == theirs for mine, theirs in pairs if mine is not None and theirs is not None)


@dataclass(frozen=True)
class _Answer:
    """A server's answer: which version of the file, the position of the first byte sent, and the bytes."""

    version: Version
    start: int
    chunks: Iterator[bytes]


class _TransientError(Exception):
    """Worth another try after `wait` seconds; `is_stale` when the bytes that have arrived are of another version."""

    def __init__(self, reason: str, *, wait: float = 0.0, is_stale: bool = False) -> None:
        super().__init__(reason)
        self.wait, self.is_stale = wait, is_stale


# -- web servers --------------------------------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only, and never from https down to http."""

    def http_error_302(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message) -> Any:
        scheme = urlsplit(urljoin(req.full_url, headers.get("location") or headers.get("uri") or "")).scheme.lower()
        if scheme not in ("http", "https") or (req.type == "https" and scheme == "http"):
            raise InputError(
                f"{shown_url(req.full_url)} redirects to {scheme}://..., which is refused. Give the final https URL."
            )
        return super().http_error_302(req, fp, code, msg, headers)  # type: ignore[arg-type]

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _request(url: str, *, offset: int, known: Version | None) -> urllib.request.Request:
    """Build the request for a file from byte `offset` on, if it is still the version that is known."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    path, query = quote(parts.path, safe=URL_SAFE), quote(parts.query, safe=URL_SAFE)
    headers = {"User-Agent": "perturbgene", "Accept-Encoding": "identity"}
    if offset and known is not None:
        headers["Range"] = f"bytes={offset}-"
        if known.tag and not known.tag.startswith("W/"):  # RFC 9110, section 13.1.5: no weak ETag here
            headers["If-Range"] = known.tag
    plain_url = urlunsplit(parts._replace(netloc=host, path=path, query=query, fragment=""))
    request = urllib.request.Request(plain_url, headers=headers)
    if at:  # unredirected: a password must not follow a redirect to another host
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _fault_of_status(error: urllib.error.HTTPError, url: str) -> Exception:
    """Sort a status into a fault that is worth another try and a mistake of the user."""
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return _TransientError("the file on the server is shorter than what had arrived", is_stale=True)
    if error.code in TRANSIENT_STATUS:
        wait = error.headers.get("Retry-After", "")
        return _TransientError(f"status {error.code} {error.reason}", wait=float(wait) if wait.isdecimal() else 0.0)
    if 300 <= error.code < 400:
        return InputError(f"{shown_url(url)} redirects in a circle. Give the final URL.")
    advice = ADVICE_OF_STATUS.get(error.code, "Check the URL.")
    return InputError(f"{shown_url(url)} answers with status {error.code} {error.reason}. {advice}")


@contextmanager
def _ask_web(url: str, *, offset: int, known: Version | None) -> Iterator[_Answer]:
    """Open a file of a web server."""
    try:
        response = urllib.request.build_opener(_Redirects).open(
            _request(url, offset=offset, known=known), timeout=TIMEOUT_SECONDS
        )
    except urllib.error.HTTPError as error:
        with error:
            raise _fault_of_status(error, url) from error
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            text = f"The certificate of {shown_url(url)} is not trusted ({reason.verify_message}). Check the URL."
            raise InputError(text) from error
        raise _TransientError(f"no connection ({reason or type(reason).__name__})") from error
    with response:
        encoding = response.headers.get("Content-Encoding", "identity")
        if response.status not in (200, 206) or encoding.lower() != "identity":
            what = f"status {response.status}" if response.status not in (200, 206) else f"Content-Encoding {encoding}"
            raise InputError(f"{shown_url(url)} answers with {what} and not with the plain file. Check the URL.")
        start, size = 0, response.headers.get("Content-Length", "")
        if response.status == http.HTTPStatus.PARTIAL_CONTENT:
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
            start, size = (int(match[1]), match[2]) if match else (-1, "")
        tag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        version = Version(int(size) if size.isdecimal() else None, tag, response.headers.get_filename() or "")
        yield _Answer(version, start, _body(response))


def _body(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the bytes of an answer; a fault of the network is a transient one, unlike faults of the disk."""
    try:
        while chunk := response.read(CHUNK_BYTES):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(f"the connection broke ({error or type(error).__name__})") from error


# -- buckets ------------------------------------------------------------------------------------------------------


@contextmanager
def _bucket(url: str) -> Iterator[Any]:
    """Yield the fsspec file system of a bucket; what goes wrong inside becomes one of our errors."""
    shown, scheme = shown_url(url), urlsplit(url).scheme
    try:
        import fsspec

        yield fsspec.filesystem(scheme)
    except (InputError, _TransientError):
        raise
    except ImportError as error:
        raise InputError(
            f"{scheme}:// needs a package that is not installed. Run: pip install {SCHEMES[scheme]}"
        ) from error
    except FileNotFoundError as error:
        raise InputError(f"{shown} does not exist. Check the URL.") from error
    except PermissionError as error:
        raise InputError(f"{shown} may not be read ({error}). Check your credentials for this bucket.") from error
    except (OSError, TimeoutError) as error:
        raise _TransientError(f"{type(error).__name__}: {error}") from error
    except Exception as error:  # the stores' own kinds, such as missing credentials
        raise InputError(f"{shown} cannot be read ({type(error).__name__}: {error}). Check credentials.") from error


def _version_in_bucket(url: str) -> Version:
    with _bucket(url) as store:
        store.invalidate_cache()
        info = store.info(url)
    tags = (info.get(name) for name in ("ETag", "etag", "generation", "LastModified", "updated", "created"))
    return Version(int(info["size"]), next((str(tag) for tag in tags if tag is not None), None))


@contextmanager
def _ask_bucket(url: str, *, offset: int, known: Version | None) -> Iterator[_Answer]:
    """Open an object of a bucket; it is read by ranges, so its version is looked at again in the end."""
    version = _version_in_bucket(url)
    assert version.size is not None
    size = version.size

    def chunks() -> Iterator[bytes]:
        for start in range(offset, size, BUCKET_CHUNK_BYTES):
            with _bucket(url) as store:
                chunk = store.cat_file(url, start=start, end=min(size, start + BUCKET_CHUNK_BYTES))
            yield chunk
        if _version_in_bucket(url) != version:
            raise _TransientError("the object was replaced while it was read", is_stale=True)

    yield _Answer(version, offset, chunks())


def expand_url(url: str) -> list[str]:
    """Return the URLs of the files that a URL names: globs and folders are listed in buckets, refused on the web."""
    parts = parts_of(url)
    if is_http(parts):
        if "*" in parts.path or parts.path.endswith("/") or not parts.path:
            raise InputError(
                f"{shown_url(url)} cannot be listed, since web servers have no folders. Name the files one by one "
                "or with braces, such as shard_{0..43}.h5ad."
            )
        return [url]
    patterns = [f"{url}*.h5ad", f"{url}*.zarr"] if url.endswith("/") else [url]
    if not re.search(r"[*?\[]", patterns[0]):
        return [url]
    try:
        with _bucket(url) as store:
            names = [name for pattern in patterns for name in store.glob(pattern)]
    except _TransientError as error:
        raise InputError(f"{shown_url(url)} cannot be listed ({error}). Check the rights and the network.") from error
    if not names:
        raise InputError(f"{shown_url(url)} matches no file. Check bucket and pattern.")
    return [f"{parts.scheme}://{name.lstrip('/')}" for name in names]


# -- one file, whole ----------------------------------------------------------------------------------------------


def _ask(url: str, *, offset: int = 0, known: Version | None = None) -> AbstractContextManager[_Answer]:
    return (_ask_web if is_http(parts_of(url)) else _ask_bucket)(url, offset=offset, known=known)


def _num_bytes(part: Path | None) -> int:
    return part.stat().st_size if part is not None and part.exists() else 0


def receive(
    url: str, part_of: Callable[[Version], Path | None], *, retries: int = DEFAULT_RETRIES
) -> tuple[Version, Path | None]:
    """Fetch a remote file; what has arrived of it is kept, and a later call with the same `part_of` resumes there.

    Args:
        url: The file.
        part_of: Returns where the bytes of a version go; None where they are not needed.
        retries: How many times in a row a try may fail without a new byte.

    Returns:
        The version, and the path with all of its bytes.

    Raises:
        InputError: The URL cannot be read, the network fails for too long, or the disk is full.
    """
    known: Version | None = None
    part: Path | None = None
    failures = most = 0
    while True:
        try:
            offset = _num_bytes(part)
            if known is not None and offset and offset == known.size:
                return known, part
            with _ask(url, offset=offset, known=known) as answer:
                is_first = known is None
                if answer.start == 0:
                    if known != answer.version:
                        known, part = answer.version, part_of(answer.version)
                    if part is None:
                        return answer.version, None
                    if is_first and (most := _num_bytes(part)):
                        continue
                elif answer.start != offset or known is None or not known.may_equal(answer.version):
                    raise _TransientError(
                        "the file changed on the server, so what had arrived was dropped", is_stale=True
                    )
                assert known is not None and part is not None
                _write(answer, part, url=url)
            if known.size is None or _num_bytes(part) == known.size:
                return known, part
            raise _TransientError(f"the connection ended at {_num_bytes(part):,} of {known.size:,} bytes")
        except _TransientError as fault:
            failures = 1 if _num_bytes(part) > most else failures + 1
            most = max(most, _num_bytes(part))
            if fault.is_stale and part is not None:
                part.unlink(missing_ok=True)
                known = part = None
            if failures > retries:
                tries = f"{failures} {'try' if failures == 1 else 'tries in a row'}"
                num_kept = _num_bytes(part)
                kept = f" {num_kept:,} bytes are kept, so that the same command goes on from there." if num_kept else ""
                raise InputError(
                    f"{shown_url(url)} could not be fetched in {tries}: {fault}. Check the network and the server, "
                    f"then run it again.{kept}"
                ) from fault
            # Exponential back-off with jitter, so that many clients do not return at the same moment.
            wait = FIRST_WAIT_SECONDS * 2.0 ** (failures - 1) * _jitter.uniform(0.5, 1.0)
            wait = min(max(wait, fault.wait), LONGEST_WAIT_SECONDS)
            logger.warning("%s: %s; trying again in %.1f s", shown_url(url), fault, wait)
            time.sleep(wait)


def _write(answer: _Answer, part: Path, *, url: str) -> None:
    """Write an answer behind the first `answer.start` bytes of a part, with a progress bar."""
    free, size = shutil.disk_usage(part.parent).free, answer.version.size
    if size is not None and size - answer.start > free:
        raise InputError(
            f"{shown_url(url)} needs {size - answer.start:,} more bytes, but only {free:,} are free in {part.parent}. "
            "Make room there."
        )
    first = next(answer.chunks, b"")
    name = answer.version.name or unquote(urlsplit(url).path.rpartition("/")[2])
    if answer.start == 0 and (not first or size == 0):
        raise InputError(f"{shown_url(url)} is empty (0 bytes). Check the URL.")
    if answer.start == 0 and name.lower().endswith(HDF5_SUFFIXES) and not first.startswith(HDF5_SIGNATURE):
        raise InputError(f"{shown_url(url)} is {kind_of(first).what}, not an HDF5 file. Check the URL.")
    try:
        with (
            part.open("ab" if answer.start else "wb") as output,
            tqdm(total=size, initial=answer.start, unit="B", unit_scale=True, desc=name, disable=None) as bar,
        ):
            for chunk in itertools.chain([first], answer.chunks):
                output.write(chunk)
                bar.update(len(chunk))
    except OSError as error:
        raise InputError(f"{part.parent} cannot be written ({error.strerror or error}). Make room there.") from error


# -- the cache ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Copy:
    """A fetched file of this process, and when its server was last asked about it."""

    version: Version
    path: Path
    checked_at: float


#: URL -> copy that this process, or the one it was forked from, has fetched.
_fetched: dict[str, _Copy] = {}


def default_cache_dir() -> Path:
    """Return where fetched files are kept: `perturbgene` in the user's cache folder, by the XDG rule."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "perturbgene"
    try:
        return Path.home() / ".cache" / "perturbgene"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / f"perturbgene-{os.getuid() if hasattr(os, 'getuid') else 0}"


@cache
def _folder_of_process() -> Path:
    """Return a folder for copies that no later run may use; it is deleted when the process ends."""
    folder, owner = Path(tempfile.mkdtemp(prefix="perturbgene-")), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
    return folder


def has_room(folder: Path, size: int, *, most_bytes: int = MOST_CACHE_BYTES) -> bool:
    """Make room in the cache by deleting files that were not used for long; True when there is enough."""
    files = []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # renamed or deleted by another process
            files.append((file.stat(), file))
    used, free = sum(status.st_size for status, _ in files), shutil.disk_usage(folder).free
    excess, oldest = max(used + size - most_bytes, size + LEAST_FREE_BYTES - free), time.time() - IDLE_SECONDS
    for status, file in sorted(files, key=lambda pair: pair[0].st_mtime):
        if status.st_mtime < oldest and (excess > 0 or file.suffix in (".part", ".lock")):
            file.unlink(missing_ok=True)
            excess -= status.st_size
    return excess <= 0


@contextmanager
def _held(folder: Path, name: str) -> Iterator[Path]:
    """Yield the cache folder while other processes wait for the same file; the process's own where it is unusable."""
    lock = FileLock(folder / f"{name}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be used as cache (%s); files are fetched for this run only", folder, error)
        yield _folder_of_process()
        return
    try:
        yield folder
    finally:
        lock.release()


def fetch(url: str, cache_dir: str | Path | None = None, *, retries: int = DEFAULT_RETRIES) -> Path:
    """Return the path of a remote file on this machine; it is fetched unless the cache has the server's version.

    A file whose server states neither ETag nor date could be mistaken for an older one in a later run. It is kept until
    this process ends, as are files for which the cache has no room.

    Args:
        url: `https://`, `http://`, `s3://` or `gs://`.
        cache_dir: Folder of the cache; the user's own by default.
        retries: How many times in a row a try may fail without a new byte.

    Raises:
        InputError: The file cannot be fetched, or it is another version than before in this run.
    """
    key = url_identity(url)
    copy = _fetched.get(key)
    if copy is not None and copy.path.exists():
        if time.monotonic() >= copy.checked_at + RECHECK_SECONDS:
            try:
                with _ask(url) as answer:
                    _check_same(url, copy, answer.version)
            except _TransientError as fault:  # a server that is away changes nothing
                logger.info("%s: %s; the copy that was fetched is used", shown_url(url), fault)
            _fetched[key] = replace(copy, checked_at=time.monotonic())
        return copy.path
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    with _held(Path(cache_dir or default_cache_dir()), name) as folder:
        place = folder

        def part_of(version: Version) -> Path | None:
            nonlocal place
            _check_same(url, copy, version)
            digest = hashlib.sha256(f"{key}\n{version.size}\n{version.tag}".encode()).hexdigest()[:32]
            ending = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rpartition("/")[2])[-80:]
            place = folder / f"{digest}-{ending}"
            if version.size and version.tag is not None:
                if _num_bytes(place) == version.size:
                    os.utime(place)
                    return None
                if has_room(folder, version.size):
                    return place.with_name(f"{place.name}.part")
            place = _folder_of_process() / place.name
            return None if place.exists() else place.with_name(f"{place.name}.part")

        version, part = receive(url, part_of, retries=retries)
        if part is not None:
            os.replace(part, place)
            logger.info("%s: %s bytes fetched to %s", shown_url(url), f"{place.stat().st_size:,}", place)
    _fetched[key] = _Copy(version, place, time.monotonic())
    return place


def _check_same(url: str, copy: _Copy | None, version: Version) -> None:
    if copy is not None and not copy.version.may_equal(version):
        raise InputError(
            f"{shown_url(url)} changed during the run (from {copy.version.size} to {version.size} bytes, or its ETag): "
            "cells of two versions would mix. Start again with files that stay as they are."
        )


def local_path(path: str | Path) -> str:
    """Return the path itself, or that of the copy of what a URL leads to."""
    return str(fetch(str(path)) if is_url(path) else path)
