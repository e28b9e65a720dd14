"""Download h5ad files: resumable, checked, and never half under the final name.

Owns fetching over http(s) with retries, resume, checksums and progress; knows nothing of what lies inside the files.
An unfinished download lies in `NAME.part`, and what the server said of it in `NAME.part.json`.
"""

import base64
import errno
import hashlib
import http.client
import json
import logging
import os
import random
import re
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from tqdm import tqdm

from perturbgene.errors import InputError, did_you_mean, listed
from perturbgene.urls import shown_url

if TYPE_CHECKING:
    from perturbgene.configs import DownloadConfig

logger = logging.getLogger(__name__)

TABULA_SAPIENS = "tabula-sapiens"
SHARD_NAME = "tabula_sapiens_ranked_{number}.h5ad"
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
HDF5_SUFFIXES = (".h5ad", ".h5", ".hdf5")
TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
CHUNK_BYTES = 1 << 20
URL_SAFE = "/%?:@!$&'()*+,;=~"  # RFC 3986: what may stand in a path or query as it is
TIMEOUT_SECONDS = 60.0
LONGEST_WAIT_SECONDS = 60.0

T = TypeVar("T")

_jitter = random.Random()  # its own, so that waiting never moves the seeded global generator


@dataclass(frozen=True)
class RemoteFile:
    """One file to fetch: where it lies and what it will be called."""

    url: str
    name: str


@dataclass(frozen=True)
class Identity:
    """What tells one version of a remote file from another; None where the server is silent."""

    place: str
    size: int | None
    etag: str | None
    last_modified: str | None

    def condition(self) -> str | None:
        """Give the validator for If-Range; weak ETags are not allowed there (RFC 9110, section 13.1.5)."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def may_equal(self, other: "Identity") -> bool:
        """Tell whether nothing that both state differs."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return all(mine == theirs for mine, theirs in pairs if mine is not None and theirs is not None)


class _TransientError(Exception):
    """Worth another try; `wait` is the number of seconds the server asked for."""

    def __init__(self, reason: str, *, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _RangeRefusedError(Exception):
    """Status 416: the server has no bytes from there on; `size` is the size it states."""

    def __init__(self, size: int | None) -> None:
        super().__init__(size)
        self.size = size


def run_download(config: "DownloadConfig") -> list[Path]:
    """Do what `perturbgene download` asks; see `download`."""
    return download(
        config.sources,
        output_dir=config.output_dir,
        base_url=config.base_url,
        num_shards=config.num_shards,
        checksums=config.checksums,
        retries=config.retries,
        overwrite=config.overwrite,
    )


def download(
    sources: Sequence[str],
    *,
    output_dir: Path | str,
    base_url: str | None = None,
    num_shards: int = 48,
    checksums: Path | str | None = None,
    retries: int = 5,
    overwrite: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Path]:
    """Fetch files into a folder, going on where an earlier call stopped.

    Args:
        sources: `tabula-sapiens` (the ranked shards below `base_url`) or http(s) URLs.
        output_dir: Folder for the files; made when missing.
        base_url: Where the `tabula-sapiens` shards lie.
        num_shards: How many shards, counted from 0.
        checksums: File with lines `<sha256>  <name>`. Without it, `NAME.sha256` beside each URL is used if it exists.
        retries: How many times in a row a file may fail without a new byte.
        overwrite: Fetch files again that lie there already.
        sleep: Waits between tries.

    Returns:
        The files, in the order of the sources.

    Raises:
        InputError: A source, the folder or a file cannot be used, or the server's answer is not the file.
    """
    if retries < 0:
        raise InputError(f"--retries must be 0 or more, but is {retries}.")
    files = plan_files(sources, base_url=base_url, num_shards=num_shards)
    digests = read_checksums(Path(checksums)) if checksums else None
    unlisted = [file.name for file in files if digests is not None and file.name not in digests]
    if unlisted:
        raise InputError(f"{checksums} has no line for {listed(unlisted)}. Add it or leave --checksums out.")
    folder = _made_folder(Path(output_dir))
    fetcher = _Fetcher(folder=folder, retries=retries, overwrite=overwrite, sleep=sleep)
    return [fetcher.get(file, digest=(digests or {}).get(file.name)) for file in files]


def plan_files(sources: Sequence[str], *, base_url: str | None = None, num_shards: int = 48) -> list[RemoteFile]:
    """List what to fetch, without asking the network.

    Raises:
        InputError: No source; one that is neither a known set nor an http(s) URL; two files of one name.

    Example:
        >>> plan_files(["https://host/a/cells%20one.h5ad?token=x"])[0].name
        'cells one.h5ad'
    """
    if not sources:
        raise InputError(f"Nothing to download. Name {TABULA_SAPIENS!r} or one or more URLs.")
    files: list[RemoteFile] = []
    for source in sources:
        if source == TABULA_SAPIENS:
            files += _tabula_sapiens(base_url, num_shards=num_shards)
        else:
            files.append(RemoteFile(source, _file_name(source)))
    names = [file.name for file in files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"Two sources would be written to {listed(twice)}. Download them into different folders.")
    return files


def read_checksums(path: Path) -> dict[str, str]:
    """Read lines `<sha256>  <name>` (as `sha256sum` writes them) into name -> digest.

    Raises:
        InputError: The file cannot be read, or a line has another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read --checksums {path}: {error}. Give a text file.") from error
    digests = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64})\s+\*?(.+?)\s*", line)
        if match is None:
            raise InputError(f"Line {number} of {path} is not '<sha256>  <name>': {line[:80]!r}. Write it so.")
        digests[Path(match[2]).name] = match[1].lower()
    return digests


@dataclass(frozen=True)
class _Fetcher:
    """The folder and the patience that all files of one call share."""

    folder: Path
    retries: int
    overwrite: bool
    sleep: Callable[[float], None]

    def get(self, file: RemoteFile, *, digest: str | None) -> Path:
        target = self.folder / file.name
        if target.exists() and not self.overwrite:
            self._check_is_complete(target, file, digest=digest)
            logger.info("%s is complete already.", target)
            return target
        partial = _Partial(target.with_name(f"{target.name}.part"))
        try:
            self._patiently(lambda: _fetch(file, partial), url=file.url, progress=partial.size)
        except InputError as error:
            note = f" {partial.size():,} bytes are kept; run the same command to go on." if partial.size() else ""
            raise InputError(f"{error}{note}") from error
        _check_digest(partial, digest or self._digest_beside(file.url), url=file.url)
        partial.finish(target)
        logger.info("%s is complete (%s bytes).", target, f"{target.stat().st_size:,}")
        return target

    def _check_is_complete(self, target: Path, file: RemoteFile, *, digest: str | None) -> None:
        """Raise unless the file that lies there is the remote one, by checksum or else by size."""
        advice = "Pass --overwrite to fetch it again, or another --output_dir."
        if not target.is_file():
            raise InputError(f"{target} is not a file. Give another --output_dir.")
        if digest is not None:
            if _sha256(target) != digest:
                raise InputError(f"{target} exists and its sha256 is not {digest}. {advice}")
            return
        size = self._patiently(lambda: _remote_size(file.url), url=file.url)
        if size is None:
            logger.warning("%s exists; %s does not state its size: kept.", target, shown_url(file.url))
        elif size != target.stat().st_size:
            found = target.stat().st_size
            raise InputError(f"{target} exists with {found:,} bytes, but the remote file has {size:,}. {advice}")

    def _digest_beside(self, url: str) -> str | None:
        """Ask for `NAME.sha256` beside the file; None when there is none."""
        parts = urlsplit(url)
        beside = urlunsplit(parts._replace(path=f"{parts.path}.sha256"))
        try:
            head = self._patiently(lambda: _read_head(beside), url=beside)
        except InputError:
            return None
        match = re.match(rb"([0-9a-fA-F]{64})(\s|$)", head)
        return match[1].decode().lower() if match else None

    def _patiently(self, action: Callable[[], T], *, url: str, progress: Callable[[], int] = lambda: 0) -> T:
        """Repeat after transient faults; only failures in a row without a new byte count against the retries."""
        failures, best = 0, progress()
        while True:
            try:
                return action()
            except _TransientError as fault:
                failures = 0 if progress() > best else failures
                best = max(best, progress())
                failures += 1
                if failures > self.retries:
                    tries = f"after {failures} {'try' if failures == 1 else 'tries'} in a row"
                    raise InputError(f"Cannot download {shown_url(url)} {tries}: {fault}.") from fault
                # Exponential back-off with jitter, so that many clients do not return at the same moment.
                wait = min(2.0 ** (failures - 1) * _jitter.uniform(0.5, 1.0), LONGEST_WAIT_SECONDS)
                wait = max(wait, min(fault.wait, LONGEST_WAIT_SECONDS))
                logger.warning("%s: %s; trying again in %.1f s.", shown_url(url), fault, wait)
                self.sleep(wait)


@dataclass(frozen=True)
class _Partial:
    """`NAME.part` and, beside it, the identity of the remote file that its bytes came from."""

    path: Path

    @property
    def _note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.json")

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def identity(self) -> Identity | None:
        try:
            return Identity(**json.loads(self._note.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None  # without a readable note nobody knows what the bytes are: start anew

    def note(self, identity: Identity) -> None:
        self._note.write_text(json.dumps(asdict(identity)), encoding="utf-8")

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def finish(self, target: Path) -> None:
        with self.path.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(self.path, target)
        self._note.unlink(missing_ok=True)


def _fetch(file: RemoteFile, partial: _Partial) -> None:
    """Bring `partial` to its full length, or raise; what arrived until then stays."""
    known = partial.identity()
    if known is None or known.place != _place(file.url):
        partial.discard()
        known = None
    offset = partial.size()
    try:
        response = _open(file.url, headers=_range_headers(offset, known))
    except _RangeRefusedError as refusal:
        # With If-Range a changed file is sent whole, so a refusal at exactly the end means that nothing is missing.
        if offset and refusal.size == offset:
            return
        partial.discard()
        raise _TransientError("the server refused to go on from the bytes kept, so they were dropped") from None
    with response:
        found = _identity_of(response, file.url)
        start = _start_of(response)
        if start != 0 and (start != offset or known is None or not found.may_equal(known)):
            partial.discard()
            raise _TransientError("the file changed on the server, so the bytes kept were dropped")
        _check_space(partial.path.parent, needed=None if found.size is None else found.size - start, url=file.url)
        if start == 0:
            _refuse_encoded(response, file.url)
        _copy(response, partial, identity=found, start=start, file=file)


def _copy(
    response: http.client.HTTPResponse, partial: _Partial, *, identity: Identity, start: int, file: RemoteFile
) -> None:
    """Write the body behind the first `start` bytes of the partial file, with a progress bar."""
    try:
        with (
            partial.path.open("ab" if start else "wb") as output,
            tqdm(total=identity.size, initial=start, unit="B", unit_scale=True, desc=file.name, disable=None) as bar,
        ):
            partial.note(identity)
            for number, chunk in enumerate(_chunks(response)):
                if number == 0 and start == 0:
                    _check_signature(chunk, response, file=file, partial=partial)
                output.write(chunk)
                bar.update(len(chunk))
    except OSError as error:
        raise InputError(_disk_message(error, partial.path.parent)) from error
    written = partial.size()
    if identity.size is not None and written != identity.size:
        raise _TransientError(f"the connection ended at {written:,} of {identity.size:,} bytes")
    if written == 0:
        partial.discard()
        raise InputError(f"{shown_url(file.url)} is empty. Check the URL.")


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the body; a fault of the network becomes a transient one, apart from faults of the disk."""
    while True:
        try:
            chunk = response.read(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _TransientError(f"the connection broke ({error or type(error).__name__})") from error
        if not chunk:
            return
        yield chunk


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http(s) only, and never from https down to http."""

    def http_error_302(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message) -> Any:
        goal = urljoin(req.full_url, headers.get("location") or headers.get("uri") or "")
        scheme = urlsplit(goal).scheme.lower()
        if scheme not in ("http", "https") or (req.type == "https" and scheme == "http"):
            raise InputError(
                f"{shown_url(req.full_url)} redirects to {scheme}://..., which is refused. Give the final https URL."
            )
        return super().http_error_302(req, fp, code, msg, headers)  # type: ignore[arg-type]

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _opener() -> urllib.request.OpenerDirector:
    """Build an opener without urllib's handlers for file:, ftp: and data:."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def _open(url: str, *, headers: dict[str, str] | None = None) -> http.client.HTTPResponse:
    """Ask for a URL; sort what goes wrong into the user's mistakes and faults worth another try."""
    request = _request(url, headers=headers or {})
    try:
        response = _opener().open(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            raise _fault_of_status(error, url) from error
    except (urllib.error.URLError, OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            text = f"The certificate of {shown_url(url)} is not trusted ({reason.verify_message}). Check the URL."
            raise InputError(text) from error
        raise _TransientError(f"no connection ({reason or type(reason).__name__})") from error
    if response.status not in (200, 206):
        response.close()
        raise InputError(f"{shown_url(url)} answers with status {response.status} and no file. Check the URL.")
    return response


def _request(url: str, *, headers: dict[str, str]) -> urllib.request.Request:
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    path, query = quote(parts.path, safe=URL_SAFE), quote(parts.query, safe=URL_SAFE)
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host, path=path, query=query, fragment="")))
    request.add_header("User-Agent", "perturbgene")
    request.add_header("Accept-Encoding", "identity")
    for name, value in headers.items():
        request.add_header(name, value)
    if at:
        # Unredirected: a password must not follow a redirect to another host.
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _fault_of_status(error: urllib.error.HTTPError, url: str) -> Exception:
    if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        match = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", "").strip())
        return _RangeRefusedError(int(match[1]) if match else None)
    if error.code in TRANSIENT_STATUS:
        wait = error.headers.get("Retry-After", "")
        return _TransientError(f"status {error.code} {error.reason}", wait=float(wait) if wait.isdecimal() else 0.0)
    advice = {
        401: "Put user and password into the URL (https://user:password@host/...).",
        403: "You may need permission, or the link has expired.",
        404: "Check the URL (for a set: --base_url and --num_shards).",
    }.get(error.code, "Check the URL.")
    return InputError(f"{shown_url(url)} answers with status {error.code} {error.reason}. {advice}")


def _range_headers(offset: int, known: Identity | None) -> dict[str, str]:
    if not offset or known is None:
        return {}
    condition = known.condition()
    return {"Range": f"bytes={offset}-"} | ({"If-Range": condition} if condition else {})


def _content_range(response: http.client.HTTPResponse) -> tuple[int, int | None] | None:
    """Read `Content-Range: bytes first-last/size` as (first, size)."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    if response.status != http.HTTPStatus.PARTIAL_CONTENT or match is None:
        return None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _start_of(response: http.client.HTTPResponse) -> int:
    """Give the position of the body's first byte in the file; a server that ignores ranges starts at 0."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0
    content_range = _content_range(response)
    return content_range[0] if content_range else -1


def _identity_of(response: http.client.HTTPResponse, url: str) -> Identity:
    content_range = _content_range(response)
    length = response.headers.get("Content-Length", "")
    whole = int(length) if response.status == http.HTTPStatus.OK and length.isdecimal() else None
    return Identity(
        place=_place(url),
        size=content_range[1] if content_range else whole,
        etag=response.headers.get("ETag"),
        last_modified=response.headers.get("Last-Modified"),
    )


def _place(url: str) -> str:
    """Name the remote file without its query, since a signed link changes its signature from day to day."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _remote_size(url: str) -> int | None:
    # A GET whose body is left unread: some hosts refuse HEAD, signed links nearly always do.
    with _open(url) as response:
        return _identity_of(response, url).size


def _read_head(url: str) -> bytes:
    with _open(url) as response:
        try:
            return response.read(200)
        except (OSError, http.client.HTTPException) as error:
            raise _TransientError("the connection broke") from error


def _check_signature(head: bytes, response: http.client.HTTPResponse, *, file: RemoteFile, partial: _Partial) -> None:
    """Refuse a web page (a login form, an error page with status 200) where an HDF5 file was asked for."""
    if not file.name.lower().endswith(HDF5_SUFFIXES) or head.startswith(HDF5_SIGNATURE):
        return
    partial.discard()
    is_page = "html" in response.headers.get("Content-Type", "") or head.lstrip()[:1] == b"<"
    what = "a web page" if is_page else f"something that starts with {head[:8]!r}"
    raise InputError(
        f"{shown_url(file.url)} gives {what}, not an HDF5 file. Open it in a browser: it may ask for a login, or the "
        "direct link may be another one."
    )


def _refuse_encoded(response: http.client.HTTPResponse, url: str) -> None:
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise InputError(f"{shown_url(url)} is sent with Content-Encoding {encoding}, unasked. Use another mirror.")


def _check_digest(partial: _Partial, digest: str | None, *, url: str) -> None:
    if digest is None:
        return
    found = _sha256(partial.path)
    if found != digest:
        partial.discard()
        raise InputError(
            f"{shown_url(url)} has sha256 {found}, but {digest} was expected; the download was dropped. "
            "Run the same command once more; if it happens again, the checksum or the file is out of date."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check_space(folder: Path, *, needed: int | None, url: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed is not None and needed > free:
        raise InputError(
            f"{shown_url(url)} needs {needed:,} more bytes, but only {free:,} are free in {folder}. "
            "Make room or give another --output_dir."
        )


def _disk_message(error: OSError, folder: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk of {folder} is full. Make room or give another --output_dir."
    return f"Cannot write into {folder}: {error.strerror or error}. Give another --output_dir."


def _made_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(_disk_message(error, folder)) from error
    return folder


def _tabula_sapiens(base_url: str | None, *, num_shards: int) -> list[RemoteFile]:
    if num_shards < 1:
        raise InputError(f"--num_shards must be 1 or more, but is {num_shards}.")
    if base_url is None:
        raise InputError(
            f"{TABULA_SAPIENS} has no public default host. Pass --base_url with the folder that holds "
            f"{SHARD_NAME.format(number='{0..' + str(num_shards - 1) + '}')}."
        )
    parts = _http_parts(base_url)
    names = [SHARD_NAME.format(number=number) for number in range(num_shards)]
    folder = parts.path.rstrip("/")
    return [RemoteFile(urlunsplit(parts._replace(path=f"{folder}/{name}")), name) for name in names]


def _file_name(url: str) -> str:
    name = unquote(_http_parts(url).path.rpartition("/")[2])
    if name in ("", ".", "..") or re.search(r"[/\\\x00-\x1f]", name):
        raise InputError(f"{shown_url(url)} does not end in a file name. Give the URL of one file.")
    return name


def _http_parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        has_host = (
            bool(parts.hostname)
            and url.isprintable()
            and parts.netloc.isascii()
            and (parts.port is None or parts.port > 0)
        )
    except ValueError as error:
        raise InputError(f"A URL is malformed: {error}. Write it as https://host/file.h5ad.") from error
    if not parts.scheme or (not parts.netloc and "/" not in url):
        raise InputError(f"{url!r} is neither a known set nor a URL. {did_you_mean(url, [TABULA_SAPIENS])}")
    if parts.scheme.lower() not in ("http", "https") or not has_host:
        raise InputError(f"{shown_url(url)} is not an http(s) URL. Write it as https://host/file.h5ad.")
    return parts
