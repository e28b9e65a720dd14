"""Files behind a URL: read by byte ranges, asked for again when the network fails, kept whole in a cache folder.

Owns everything fsspec, and what may be shown of a URL; knows nothing of HDF5, cells or shards. A file is first read by
ranges; once a quarter of it has travelled, it is fetched whole into the cache and read from there.
"""

import gc
import hashlib
import http
import io
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from perturbgene.errors import InputError
from perturbgene.urls import SCHEMES, is_http, is_masked, is_url, shown_url

logger = logging.getLogger(__name__)


BLOCK_BYTES = 1 << 18
MOST_BLOCKS = 32  # kept in memory per open file: 8 MiB
MOST_REQUEST_BYTES = 1 << 24
MOST_AHEAD_BLOCKS = 16
MOST_STREAMS = 8

#: Share of a file that travels by ranges before it is fetched whole.
CACHE_SHARE = 0.25
MOST_CACHE_BYTES = 100 * 10**9
LEAST_FREE_BYTES = 10 * 10**9  # left on the disk by the cache
IDLE_SECONDS = 24 * 3600.0  # a cached file unused for so long may make room for another

DEFAULT_RETRIES = 5
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
CONNECT_SECONDS, READ_SECONDS = 30.0, 60.0
RECHECK_SECONDS = 60.0
MOST_REDIRECTS = 10
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
REDIRECT_STATUS = {301, 302, 303, 307, 308}
URL_SAFE = "/%?:@!$&'()*+,;=~"  # RFC 3986: what may stand in a path or query as it is


T = TypeVar("T")

_jitter = random.Random()  # its own, so that waiting never moves the seeded global generator
_seen: dict[str, "Version"] = {}  # the version that this process, or the one it was forked from, saw first
_travelled: dict[str, int] = {}  # bytes read by ranges, per URL


# -- names --------------------------------------------------------------------------------------------------------


def url_identity(url: str) -> str:
    """Name what a URL leads to: without user, password and fragment, scheme and host in lower case.

    Example:
        >>> url_identity("HTTPS://ann:secret@Host/Cells.h5ad?id=1#top")
        'https://host/Cells.h5ad?id=1'
    """
    parts = _parts(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host.lower() if is_http(parts) else host, fragment=""))


def _parts(url: str) -> SplitResult:
    if is_masked(url):
        raise InputError(
            f"{url} is a URL as it is shown and stored: its user, password and query are not written down. Give the "
            "whole URL again, by its flag; flags win over --config and over the settings of a run."
        )
    try:
        parts = urlsplit(url)
        has_host = bool(parts.hostname) and url.isprintable() and (parts.port is None or parts.port > 0)
    except ValueError as error:
        raise InputError(f"A URL is malformed: {error}. Write it as https://host/file.h5ad.") from error
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise InputError(f"{shown_url(url)} cannot be read: {parts.scheme}:// is none of {known}. Give the plain path.")
    if not has_host:
        raise InputError(f"{shown_url(url)} names no host or bucket. Write it as {parts.scheme}://host/file.h5ad.")
    return parts


def expand_url(url: str) -> list[str]:
    """Turn a URL into file URLs: globs and folders are listed where the store can list.

    Raises:
        InputError: The URL is malformed, cannot be listed (http), or nothing is there.
    """
    parts = _parts(url)
    if is_http(parts):
        if "*" in parts.path or parts.path.endswith("/") or not parts.path:
            raise InputError(
                f"{shown_url(url)} cannot be listed, since web servers have no folders. Name the files one by one "
                "or with braces, such as shard_{0..43}.h5ad."
            )
        return [url]
    pattern = f"{url}*.h5ad" if url.endswith("/") else url
    if not re.search(r"[*?\[]", pattern):
        return [url]
    with _without_collection():
        try:
            names = _filesystem(parts.scheme).glob(pattern)
        except OSError as error:
            raise InputError(
                f"{shown_url(url)} cannot be listed ({error}). Check the rights and the network."
            ) from error
    if not names:
        raise InputError(f"{shown_url(url)} matches no file. Check bucket and pattern.")
    return [f"{parts.scheme}://{name.lstrip('/')}" for name in names]


# -- stores -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Version:
    """What tells one version of a remote file from another; None where the server is silent."""

    size: int
    tag: str | None

    def differs(self, other: "Version") -> bool:
        """Tell whether something that both state differs."""
        return self.size != other.size or (None not in (self.tag, other.tag) and self.tag != other.tag)


class _TransientError(Exception):
    """Worth another try; `wait` is the number of seconds the server asked for."""

    def __init__(self, reason: str, *, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRangesError(Exception):
    """The server sends files only as a whole; `version` is what it says of this one, None where it states no length."""

    def __init__(self, version: Version | None = None) -> None:
        super().__init__("the server sent the whole file instead of a range")
        self.version = version


class _Store(Protocol):
    """One remote file."""

    def read(self, start: int, stop: int) -> tuple[bytes, Version]:
        """Read bytes start..stop, fewer at the end of the file."""

    def save(self, output: IO[bytes]) -> Version:
        """Write the whole file in one stream."""


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector still: h5py holds its lock while it reads through us, and a collection in fsspec's
    thread that meets an h5py object would wait for that lock for ever (h5py issue 2019)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _filesystem(scheme: str, **options: Any) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(scheme, **options)
    except ImportError as error:
        package = SCHEMES[scheme]
        raise InputError(f"{scheme}:// needs a package that is not installed. Run: pip install {package}") from error


class _WebStore:
    """A file of a web server. Every answer is checked for range, length and version, which fsspec leaves out."""

    def __init__(self, url: str) -> None:
        import aiohttp

        self.url = url
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}, "encoded": True}
        self._filesystem = _filesystem("http", **options)

    def read(self, start: int, stop: int) -> tuple[bytes, Version]:
        return self._sync(self._read, start, stop)

    def save(self, output: IO[bytes]) -> Version:
        return self._sync(self._save, output)

    def _sync(self, ask: Callable[..., Any], *given: Any) -> Any:
        import aiohttp
        from fsspec.asyn import sync

        try:
            with _without_collection():
                return sync(self._filesystem.loop, ask, *given)
        except aiohttp.ClientConnectorCertificateError as error:
            raise InputError(
                f"The certificate of {shown_url(self.url)} is not trusted ({error.certificate_error}). Check the URL."
            ) from error
        except (aiohttp.InvalidURL, UnicodeError) as error:
            raise InputError(f"{shown_url(self.url)} is malformed. Write it as https://host/file.h5ad.") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _TransientError(f"no answer: {type(error).__name__}") from error

    async def _read(self, start: int, stop: int) -> tuple[bytes, Version]:
        async with await self._ask(Range=f"bytes={start}-{stop - 1}") as answer:
            if answer.status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                match = re.fullmatch(r"bytes \*/(\d+)", answer.headers.get("Content-Range", "").strip())
                return b"", _web_version(answer, size=int(match[1]) if match else 0)
            match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", "").strip())
            if answer.status == http.HTTPStatus.OK or match is None or int(match[1]) != start:
                length = answer.headers.get("Content-Length", "") if answer.status == http.HTTPStatus.OK else ""
                answer.close()  # else the body nobody wants is read to its end
                raise _NoRangesError(_web_version(answer, size=int(length)) if length.isdecimal() else None)
            version = _web_version(answer, size=int(match[2]))
            body, wanted = await answer.read(), min(stop, version.size) - start
        if len(body) != wanted:
            raise _TransientError(f"{len(body):,} of {wanted:,} bytes came")
        return body, version

    async def _save(self, output: IO[bytes]) -> Version:
        async with await self._ask() as answer:
            output.seek(0)
            output.truncate()
            async for chunk in answer.content.iter_chunked(1 << 20):
                output.write(chunk)
            size = output.tell()
            stated = answer.headers.get("Content-Length", str(size))
            if int(stated) != size:
                raise _TransientError(f"{size:,} of {int(stated):,} bytes came")
            return _web_version(answer, size=size)

    async def _ask(self, **headers: str) -> Any:
        """Send one request; redirects lead to http(s) only, never from https down to http, and carry no password."""
        session = await self._filesystem.set_session()
        goal = self.url
        for _ in range(MOST_REDIRECTS):
            answer = await session.get(
                self._filesystem.encode_url(_quoted(goal)),
                headers={"User-Agent": "perturbgene", "Accept-Encoding": "identity", **headers},
                allow_redirects=False,
            )
            if answer.status not in REDIRECT_STATUS:
                _check_answer(answer, self.url)
                return answer
            answer.release()
            goal = _redirect(goal, answer.headers.get("Location", ""), asked=self.url)
        raise InputError(f"{shown_url(self.url)} redirects in a circle. Give the final URL.")


def _quoted(url: str) -> str:
    parts = urlsplit(url)
    path, query = quote(parts.path, safe=URL_SAFE), quote(parts.query, safe=URL_SAFE)
    return urlunsplit(parts._replace(path=path, query=query, fragment=""))


def _redirect(url: str, location: str, *, asked: str) -> str:
    goal = urljoin(url, location)
    scheme = urlsplit(goal).scheme.lower()
    if scheme not in ("http", "https") or (urlsplit(url).scheme == "https" and scheme == "http"):
        raise InputError(f"{shown_url(asked)} redirects to {scheme}://..., which is refused. Give the final https URL.")
    return goal


def _web_version(answer: Any, *, size: int) -> Version:
    return Version(size, answer.headers.get("ETag") or answer.headers.get("Last-Modified"))


def _check_answer(answer: Any, url: str) -> None:
    """Sort an answer's status into good, worth another try, and the user's mistake."""
    status = answer.status
    if status in (200, 206, 416):
        encoding = answer.headers.get("Content-Encoding", "identity").lower()
        if encoding != "identity":
            answer.close()
            raise InputError(f"{shown_url(url)} is sent with Content-Encoding {encoding}, unasked. Use another mirror.")
        return
    wait = answer.headers.get("Retry-After", "")
    answer.close()
    if status in TRANSIENT_STATUS:
        raise _TransientError(f"status {status} {answer.reason}", wait=float(wait) if wait.isdecimal() else 0.0)
    advice = {
        401: "Put user and password into the URL (https://user:password@host/...).",
        403: "You may need permission, or the link has expired.",
    }.get(status, "Check the URL.")
    raise InputError(f"{shown_url(url)} answers with status {status} {answer.reason}. {advice}")


class _ObjectStore:
    """An object of a bucket, through fsspec; its version is asked for now and then."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._filesystem = _filesystem(urlsplit(url).scheme)
        self._version, self._checked_at = Version(0, None), -float("inf")

    def read(self, start: int, stop: int) -> tuple[bytes, Version]:
        with self._faults(), _without_collection():
            if time.monotonic() - self._checked_at > RECHECK_SECONDS:
                self._filesystem.invalidate_cache()
                info = self._filesystem.info(self.url)
                tags = (info.get(name) for name in ("ETag", "etag", "generation", "LastModified", "updated", "created"))
                tag = next((str(tag) for tag in tags if tag is not None), None)
                self._version, self._checked_at = Version(int(info["size"]), tag), time.monotonic()
            stop = min(stop, self._version.size)
            body = self._filesystem.cat_file(self.url, start=start, end=stop) if start < stop else b""
        if len(body) != max(0, stop - start):
            raise _TransientError(f"{len(body):,} of {stop - start:,} bytes came")
        return body, self._version

    def save(self, output: IO[bytes]) -> Version:
        raise AssertionError("buckets always know ranges")

    @contextmanager
    def _faults(self) -> Iterator[None]:
        shown = shown_url(self.url)
        try:
            yield
        except FileNotFoundError as error:
            raise InputError(f"{shown} does not exist. Check the URL.") from error
        except PermissionError as error:
            raise InputError(f"{shown} may not be read ({error}). Check your credentials for this bucket.") from error
        except (OSError, TimeoutError) as error:
            raise _TransientError(f"{type(error).__name__}: {error}") from error
        except Exception as error:  # the stores' own kinds, such as missing credentials
            raise InputError(f"{shown} cannot be read ({type(error).__name__}: {error}). Check credentials.") from error


# -- the cache ----------------------------------------------------------------------------------------------------


def default_cache_dir() -> Path:
    """Return where opened shards are kept: `perturbgene` in the user's cache folder, by the XDG rule."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "perturbgene"
    try:
        return Path.home() / ".cache" / "perturbgene"
    except RuntimeError:  # no home
        return Path(tempfile.gettempdir()) / f"perturbgene-{os.getuid() if hasattr(os, 'getuid') else 0}"


@dataclass(frozen=True)
class DiskCache:
    """Whole files in a folder, named by URL and version; several processes may share it.

    Args:
        folder: Made when needed, for its owner only.
        most_bytes: Size that the folder keeps below.
    """

    folder: Path
    most_bytes: int = MOST_CACHE_BYTES

    def path_of(self, url: str, version: Version) -> Path | None:
        """Name the cached file; None when the server gives no tag, so that an old copy could not be told."""
        if version.tag is None:
            return None
        digest = hashlib.sha256(f"{url_identity(url)}\n{version.size}\n{version.tag}".encode()).hexdigest()
        name = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rpartition("/")[2])[-80:]
        return self.folder / f"{digest[:32]}-{name}"

    def find(self, path: Path, version: Version) -> Path | None:
        """Return the cached file if it is there, and note that it was used."""
        try:
            if path.stat().st_size != version.size:
                return None
            os.utime(path)
        except OSError:
            return None
        return path

    def add(self, path: Path, size: int, save: Callable[[IO[bytes]], object]) -> Path | None:
        """Fetch a file under a temporary name and rename it; None when there is no room or the disk refuses."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _exclusive(path.with_name(f"{path.name}.lock")):
                if path.exists() and path.stat().st_size == size:  # another process was faster
                    return path
                if not self._has_room(size):
                    return None
                with temporary.open("wb") as output:
                    save(output)
                    output.flush()
                    os.fsync(output.fileno())
                temporary.replace(path)
                return path
        except OSError as error:
            logger.warning("%s cannot be used as cache (%s); reading goes on without it", self.folder, error)
            return None
        finally:
            with suppress(OSError):
                temporary.unlink()

    def _has_room(self, size: int) -> bool:
        """Make room by dropping what was not used for long; what a run still reads is never dropped for the next."""
        old = time.time() - IDLE_SECONDS
        files = []
        for file in self.folder.iterdir():
            with suppress(FileNotFoundError):  # renamed or removed by another process
                files.append((file.stat(), file))
        used = sum(status.st_size for status, _ in files)
        free = shutil.disk_usage(self.folder).free
        excess = max(used + size - self.most_bytes, size + LEAST_FREE_BYTES - free)
        for status, file in sorted(files, key=lambda pair: pair[0].st_mtime):
            if status.st_mtime < old and (excess > 0 or file.suffix in (".part", ".lock")):
                file.unlink(missing_ok=True)
                excess -= status.st_size
        return excess <= 0


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time fetch a file; the lock ends with its process. Without locks (Windows) all fetch it."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -- the file -----------------------------------------------------------------------------------------------------


class RemoteFile(io.RawIOBase):
    """A remote file as a seekable, read-only stream.

    Small reads go through blocks in memory, the last used ones being kept; reads in sequence fetch further and further
    ahead. Never shared by processes: open it again after a fork.

    Attributes:
        size: In bytes.
        local_path: The whole file in the cache, once it is there.
    """

    def __init__(
        self, url: str, cache: DiskCache | None, *, retries: int, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        super().__init__()
        self.url, self._retries, self._sleep = url, retries, sleep
        self._store: _Store = _WebStore(url) if is_http(_parts(url)) else _ObjectStore(url)
        self._cache, self._position, self._has_ranges = cache, 0, True
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._ahead: OrderedDict[int, int] = OrderedDict()  # where a sequence goes on -> blocks fetched last
        self._local: IO[bytes] | None = None
        self.local_path: Path | None = None
        self._version: Version | None = None
        try:
            head = self._range(0, BLOCK_BYTES)
        except _NoRangesError as answer:
            self._open_unranged(answer.version)
        else:
            self._blocks[0] = head
            self._use_cached()
        self._was_cached = self.local_path is not None

    # -- io.RawIOBase

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position, without asking the network."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; beyond the end of the file with zeros, since h5py does not look at the count."""
        view = memoryview(buffer).cast("B")
        data = self.read_range(self._position, min(self.size, self._position + len(view)))
        view[: len(data)] = data
        view[len(data) :] = bytes(len(view) - len(data))
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Forget what was read."""
        if self._local is not None:
            self._local.close()
        self._blocks.clear()
        super().close()

    # -- bytes

    @property
    def is_cached_since_opened(self) -> bool:
        """True once the file was brought into the cache after it was opened."""
        return self.local_path is not None and not self._was_cached

    @property
    def size(self) -> int:
        """Bytes of the file."""
        assert self._version is not None
        return self._version.size

    def read_range(self, start: int, stop: int) -> bytes:
        """Return bytes start..stop.

        Raises:
            InputError: They stay away after all tries, or the file is another one by now.
        """
        if start >= stop:
            return b""
        first, last = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        wanted = range(first, last + 1)
        missing = [block for block in wanted if block not in self._blocks]
        if missing and self._local is None:
            self._fetch_whole_if_worth_it()
        if self._local is not None:
            self._local.seek(start)
            return self._local.read(stop - start)
        parts = {block: self._blocks[block] for block in wanted if block in self._blocks}
        if missing:
            parts |= self._fetch(missing[0], missing[-1] + 1)
        for block in wanted[-MOST_BLOCKS:]:
            if block in self._blocks:
                self._blocks.move_to_end(block)
        data = b"".join(parts[block] for block in wanted)
        return data[start - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def _fetch(self, first: int, stop: int) -> dict[int, bytes]:
        """Fetch neighbouring blocks, and more of them when they go on where an earlier fetch ended."""
        ahead = min(MOST_AHEAD_BLOCKS, 2 * self._ahead.pop(first, 0))
        num_blocks = -(-self.size // BLOCK_BYTES)
        end = min(max(stop, first + ahead), num_blocks)
        self._ahead[end] = end - first
        while len(self._ahead) > MOST_STREAMS:
            self._ahead.popitem(last=False)
        fetched: dict[int, bytes] = {}
        for at in range(first * BLOCK_BYTES, end * BLOCK_BYTES, MOST_REQUEST_BYTES):
            body = self._range(at, min(at + MOST_REQUEST_BYTES, end * BLOCK_BYTES, self.size))
            for offset in range(0, len(body), BLOCK_BYTES):
                fetched[(at + offset) // BLOCK_BYTES] = body[offset : offset + BLOCK_BYTES]
        self._blocks |= dict([*fetched.items()][-MOST_BLOCKS:])
        while len(self._blocks) > MOST_BLOCKS:
            self._blocks.popitem(last=False)
        key = url_identity(self.url)
        _travelled[key] = _travelled.get(key, 0) + sum(map(len, fetched.values()))
        return fetched

    def _range(self, start: int, stop: int) -> bytes:
        body, version = self._patiently(lambda: self._store.read(start, stop), what=f"bytes {start}-{stop - 1}")
        self._check_version(version)
        return body

    def _patiently(self, ask: Callable[[], T], *, what: str) -> T:
        """Ask again after a fault of the network, each time waiting about twice as long."""
        shown = shown_url(self.url)
        for number in range(self._retries + 1):
            try:
                return ask()
            except _TransientError as fault:
                reason, wait = str(fault), fault.wait
            except _NoRangesError as fault:
                if self._version is None:
                    raise
                reason, wait = str(fault), 0.0  # a server that knew ranges a moment ago
            if number < self._retries:
                wait = min(LONGEST_WAIT_SECONDS, max(wait, FIRST_WAIT_SECONDS * 2**number * _jitter.uniform(0.5, 1)))
                logger.info("%s, %s: %s; asking again in %.1f s", shown, what, reason, wait)
                self._sleep(wait)
        raise InputError(
            f"{shown}: {what} could not be read in {self._retries + 1} tries ({reason}). Check the network and the "
            "server, then run it again."
        )

    def _check_version(self, version: Version) -> None:
        known = _seen.setdefault(url_identity(self.url), version)
        if known.differs(version):
            raise InputError(
                f"{shown_url(self.url)} changed during the run (from {known.size:,} to {version.size:,} bytes, or its "
                "ETag): cells of two versions would mix. Start again with files that stay as they are."
            )
        if version.size == 0:
            raise InputError(f"{shown_url(self.url)} is empty (0 bytes). Check the URL.")
        self._version = version

    # -- whole files

    def save(self, output: IO[bytes]) -> None:
        """Write the whole file, from the cache where it is there."""
        if self._local is not None:
            self._local.seek(0)
            shutil.copyfileobj(self._local, output, MOST_REQUEST_BYTES)
            return
        if not self._has_ranges:
            self._check_version(self._patiently(lambda: self._store.save(output), what="the whole file"))
            return
        for start in range(0, self.size, MOST_REQUEST_BYTES):
            output.write(self._range(start, min(start + MOST_REQUEST_BYTES, self.size)))

    def fetch_whole(self) -> None:
        """Bring the file into the cache, if there is one with room for it; else it is still read by ranges."""
        if self._cache is None or self._local is not None or self._version is None:
            return
        path = self._cache.path_of(self.url, self._version)
        if path is None or self._cache.add(path, self.size, self.save) is None:
            logger.info("%s is not cached; it is read by ranges", shown_url(self.url))
            self._cache = None
            return
        logger.info("%s: %s bytes cached in %s", shown_url(self.url), f"{self.size:,}", path)
        self._use_cached()

    def _fetch_whole_if_worth_it(self) -> None:
        if _travelled.get(url_identity(self.url), 0) >= CACHE_SHARE * self.size:
            self.fetch_whole()

    def _use_cached(self) -> None:
        if self._cache is None or self._version is None:
            return
        path = self._cache.path_of(self.url, self._version)
        self.local_path = self._cache.find(path, self._version) if path else None
        if self.local_path is not None:
            self._local = self.local_path.open("rb")
            self._blocks.clear()

    def _open_unranged(self, version: Version | None) -> None:
        """Fetch a file whose server knows no ranges, into the cache or else a temporary file."""
        logger.warning("%s: the server knows no byte ranges, so the whole file is fetched", shown_url(self.url))
        self._has_ranges = False
        if version is not None:
            self._check_version(version)
            self._use_cached()
            self.fetch_whole()
        if self._local is not None:
            return
        try:
            whole = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this object)
            self.save(whole)
        except OSError as error:
            raise InputError(
                f"{shown_url(self.url)} must be fetched whole, but {tempfile.gettempdir()} refuses it ({error}). "
                "Make room there."
            ) from error
        self._local = whole


def open_remote(
    url: str,
    cache_dir: Path | str | None = None,
    *,
    retries: int = DEFAULT_RETRIES,
    sleep: Callable[[float], None] = time.sleep,
) -> RemoteFile:
    """Open a remote file for reading.

    Args:
        url: `https://`, `http://`, `s3://` or `gs://`.
        cache_dir: Folder in which files that are read much are kept whole; None keeps nothing.
        retries: How many times a range is asked for again.
        sleep: Waits between tries.

    Raises:
        InputError: The URL cannot be read, stays away after all tries, or gives another file than before in this run.
    """
    return RemoteFile(url, DiskCache(Path(cache_dir)) if cache_dir else None, retries=retries, sleep=sleep)


def copy_file(source: str | Path, target: Path, *, cache_dir: Path | None = None) -> None:
    """Copy a file, or fetch what a URL leads to (from the cache where it is there)."""
    if not is_url(source):
        shutil.copyfile(source, target)
        return
    with open_remote(str(source), cache_dir or default_cache_dir()) as remote, target.open("wb") as output:
        remote.save(output)
