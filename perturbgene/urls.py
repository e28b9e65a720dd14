"""URLs: which ones can be read, and what may be shown of them.

Owns recognizing and checking a URL and masking what is secret in it; fetching is in `data_utils.remote`.
"""

import re
from urllib.parse import SplitResult, urlsplit, urlunsplit

from perturbgene.errors import InputError

#: Scheme -> package to install for it; "" where none is needed.
SCHEMES = {"https": "", "http": "", "s3": "s3fs", "gs": "gcsfs"}

#: Shown in place of a secret.
MASK = "***"


def is_http(parts: SplitResult) -> bool:
    """True for the URLs of web servers."""
    return parts.scheme in ("http", "https")


def is_url(path: object) -> bool:
    """True for `scheme://...`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def parts_of(url: str) -> SplitResult:
    """Split a URL that can be read.

    Raises:
        InputError: It is malformed or masked, names no host, or has a scheme that is not in `SCHEMES`.
    """
    if is_url(url) and re.search(r"://\*{3}(@|$)|\?\*{3}$", url):  # as `shown_url` returns it
        raise InputError(
            f"{url} is a URL as it is shown and stored, without its user, password and query. Give the whole URL "
            "again with its flag; flags take precedence over --config and over the settings of a run."
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


def url_identity(url: str) -> str:
    """Return what a URL leads to: without user, password and fragment, scheme and host in lower case.

    Example:
        >>> url_identity("HTTPS://ann:secret@Host/Cells.h5ad?id=1#top")
        'https://host/Cells.h5ad?id=1'
    """
    parts = parts_of(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host.lower() if is_http(parts) else host, fragment=""))


def shown_url(url: str) -> str:
    """Return the URL for a message: user, password and query (where tokens are) are masked.

    In the URL of a bucket, a question mark without a value after it is a pattern for one character.

    Example:
        >>> shown_url("https://ann:secret@host/cells.h5ad?token=abc")
        'https://***@host/cells.h5ad?***'
        >>> shown_url("s3://cells/shard_?.h5ad")
        's3://cells/shard_?.h5ad'
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # host and password cannot be separated
        return f"{url.partition('://')[0]}://{MASK}"
    _, at, host = parts.netloc.rpartition("@")
    is_pattern = parts.scheme in SCHEMES and not is_http(parts) and "=" not in parts.query
    query = parts.query if is_pattern or not parts.query else MASK
    return urlunsplit(SplitResult(parts.scheme, f"{MASK}@{host}" if at else host, parts.path, query, ""))


def shown_path(path: object) -> str:
    """Return a path or any text for a message; from its first URL on it is shown as by `shown_url`.

    Example:
        >>> shown_path("{https://host/a.h5ad?token=1,https://host/b.h5ad?token=2}")
        '{https://host/a.h5ad?***'
    """
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://.*", lambda url: shown_url(url[0]), str(path), flags=re.DOTALL)
