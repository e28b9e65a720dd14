"""URLs in messages and settings: what may be shown of them.

Owns recognizing a URL and masking what is secret in it; fetching is in `data_utils.remote`.
"""

import re
from urllib.parse import SplitResult, urlsplit, urlunsplit

#: Scheme -> package to install for it; "" where none is needed.
SCHEMES = {"https": "", "http": "", "s3": "s3fs", "gs": "gcsfs"}

#: Stands for what is not shown of a URL.
MASK = "***"


def is_http(parts: SplitResult) -> bool:
    return parts.scheme in ("http", "https")


def is_url(path: object) -> bool:
    """True for `scheme://...`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def shown_url(url: str) -> str:
    """Give the URL for a message: user, password and query (where tokens live) are masked.

    In a bucket, a question mark without a value behind it stands for any character.

    Example:
        >>> shown_url("https://ann:secret@host/cells.h5ad?token=abc")
        'https://***@host/cells.h5ad?***'
        >>> shown_url("s3://cells/shard_?.h5ad")
        's3://cells/shard_?.h5ad'
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # no host can be told from a password
        return f"{url.partition('://')[0]}://{MASK}"
    _, at, host = parts.netloc.rpartition("@")
    is_pattern = parts.scheme in SCHEMES and not is_http(parts) and "=" not in parts.query
    query = parts.query if is_pattern or not parts.query else MASK
    return urlunsplit(SplitResult(parts.scheme, f"{MASK}@{host}" if at else host, parts.path, query, ""))


def shown_path(path: object) -> str:
    """Give a path or URL for a message."""
    return shown_url(str(path)) if is_url(path) else str(path)


def shown_text(text: str) -> str:
    """Give text that may hold a URL: from the first one on it is shown as `shown_url` has it.

    Example:
        >>> shown_text("{https://host/a.h5ad?token=1,https://host/b.h5ad?token=2}")
        '{https://host/a.h5ad?***'
    """
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://.*", lambda url: shown_url(url[0]), text, flags=re.DOTALL)


def is_masked(path: object) -> bool:
    """True for a URL from which `shown_url` has taken something that is needed to read it.

    Example:
        >>> is_masked("https://host/cells.h5ad?***"), is_masked("https://host/cells.h5ad?token=abc")
        (True, False)
    """
    return is_url(path) and re.search(r"://\*{3}(@|$)|\?\*{3}$", str(path)) is not None
