"""The verb `download`: files behind URLs into a folder, resumed, checked, and never half under their final name.

Owns names, checksums and what is there already; fetching itself is in `remote`.
"""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from perturbgene.cli.verbs import DownloadConfig
from perturbgene.data_utils.opening import expand_paths
from perturbgene.data_utils.remote import Version, receive
from perturbgene.errors import InputError, listed
from perturbgene.files import claimed, sha256_of
from perturbgene.urls import is_http, is_url, parts_of, shown_url, url_identity

logger = logging.getLogger(__name__)


def run_download(config: DownloadConfig) -> list[Path]:
    """Run the `download` verb; see `download`."""
    return download(
        config.sources, output_dir=config.output_dir, checksums=config.checksums, retries=config.retries,
        overwrite=config.overwrite,
    )  # fmt: skip


def download(
    sources: str | Sequence[str], *, output_dir: str | Path = DownloadConfig.output_dir,
    checksums: str | Path | None = DownloadConfig.checksums, retries: int = DownloadConfig.retries,
    overwrite: bool = DownloadConfig.overwrite,
) -> list[Path]:  # fmt: skip
    """Fetch files into a folder, resuming where an earlier call stopped.

    Args:
        sources: URLs, with brace patterns.
        output_dir: Folder for the files; made when missing.
        checksums: File with lines `<sha256>  <name>`.
        retries: How many times in a row a try may fail without a new byte.
        overwrite: Fetch files again that are there already.

    Returns:
        The files, in the order of the sources.

    Raises:
        InputError: A source, the folder or a file cannot be used, or the server's answer is not the file.
    """
    urls = expand_paths(sources)
    if not_urls := [url for url in urls if not is_url(url)]:
        raise InputError(f"{not_urls[0]} is not the URL of one file. Write it as https://host/file.h5ad.")
    names = [_name_of(url, retries=retries) for url in urls]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"Two sources would be written to {repeated[0]!r}. Download them into different folders.")
    digests = read_checksums(Path(checksums)) if checksums else {}
    if checksums and (unlisted := [name for name in names if name not in digests]):
        raise InputError(f"{checksums} has no line for {listed(unlisted)}. Add it, or leave --checksums out.")
    targets = [Path(output_dir) / name for name in names]
    for url, target in zip(urls, targets, strict=True):
        with claimed(target, flag="output_dir"):
            check_or_fetch = _check_complete if target.exists() and not overwrite else _download
            check_or_fetch(url, target, digest=digests.get(target.name), retries=retries)
        logger.info("%s is complete (%s bytes)", target, f"{target.stat().st_size:,}")
    return targets


def _name_of(url: str, *, retries: int) -> str:
    """Return the last part of the URL, or what its server calls the file if that is no file name, as at figshare."""
    last = name = unquote(urlsplit(url).path.rpartition("/")[2])
    if re.fullmatch(r"[\w-]+(\.(php|aspx|cgi))?", last) and is_http(parts_of(url)):
        version, _ = receive(url, lambda version: None, retries=retries)
        name = re.split(r"[/\\]", version.name)[-1] or last
        logger.info("%s is called %s by its server", shown_url(url), name)
    if name in ("", ".", "..") or re.search(r"[/\\\x00-\x1f]", name):
        raise InputError(f"{shown_url(url)} is not the URL of one file. Write it as https://host/file.h5ad.")
    return name


def _download(url: str, target: Path, *, digest: str | None, retries: int) -> None:
    # Without the query, since the signature of a signed link changes from day to day.
    place = url_identity(url).partition("?")[0]

    def part_of(version: Version) -> Path:
        key = hashlib.sha256(f"{place}\n{version.size}\n{version.tag}".encode()).hexdigest()[:12]
        return target.with_name(f".{target.name}.{key}.part")

    _, part = receive(url, part_of, retries=retries)
    assert part is not None
    if digest is not None and (found := sha256_of(part)) != digest:
        part.unlink()
        raise InputError(
            f"{shown_url(url)} has sha256 {found}, but {digest} was expected; what was fetched is deleted. Run the "
            "same command again; if it happens again, the checksum or the file is out of date."
        )
    os.replace(part, target)
    for leftover in target.parent.iterdir():  # of other versions
        if re.fullmatch(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}\.part", leftover.name):
            leftover.unlink()


def _check_complete(url: str, target: Path, *, digest: str | None, retries: int) -> None:
    """Raise unless the file that is there is the remote one, by its checksum or else by its size."""
    advice = "Pass --overwrite to fetch it again, or another --output_dir."
    if not target.is_file():
        raise InputError(f"{target} is not a file. Give another --output_dir.")
    if digest is not None:
        if sha256_of(target) != digest:
            raise InputError(f"{target} exists and its sha256 is not {digest}. {advice}")
        return
    version, _ = receive(url, lambda version: None, retries=retries)
    if version.size is not None and version.size != target.stat().st_size:
        found = target.stat().st_size
        raise InputError(f"{target} exists with {found:,} bytes, but the remote file has {version.size:,}. {advice}")


def read_checksums(path: Path) -> dict[str, str]:
    """Read lines `<sha256>  <name>`, as `sha256sum` writes them, into name -> digest."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"checksums {path} cannot be read ({error}). Give a text file to --checksums.") from error
    digests = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{64})\s+\*?(.+?)\s*", line)
        if match is None:
            raise InputError(f"Line {number} of {path} is not '<sha256>  <name>': {line[:80]!r}. Correct it.")
        digests[Path(match[2]).name] = match[1].lower()
    return digests
