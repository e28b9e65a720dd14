"""A real server on 127.0.0.1 that misbehaves on request: the first part of a URL's path says how.

Owns counting requests and good answers; leaves each test file its own bad ones, as methods `serve_MANNER` of a
subclass of `Handler`.
"""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast


@dataclass
class Web:
    """A running server: its address, what it serves, and what it was asked.

    Args:
        content: What is served under every name that `files` does not hold.
        sidecar: Answer to names that end in .sha256; none by default.
        is_down: Whether `dies` has died.
    """

    url: str
    content: bytes = b""
    files: dict[str, bytes] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    headers: list[dict[str, str]] = field(default_factory=list)
    sidecar: bytes = b""
    is_down: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    """Serve what `Web` holds, in the manner asked for."""

    disable_nagle_algorithm = True

    def log_message(self, *args: object) -> None:
        """Stay quiet."""

    @property
    def web(self) -> Web:
        return cast("Web", self.server.web)  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        """Count the request and answer it in the manner that the path's first part names."""
        _, manner, name = self.path.partition("?")[0].split("/", 2)
        if name.endswith(".sha256"):
            self.answer(200 if self.web.sidecar else 404, self.web.sidecar)
            return
        with self.web.lock:
            self.web.seen[manner] += 1
            number = self.web.seen[manner]
            self.web.headers.append(dict(self.headers))
        self.content = self.web.files.get(name, self.web.content)
        getattr(self, f"serve_{manner}")(number)

    def answer(self, status: int, body: bytes = b"", *, stated: int | None = None, **headers: str) -> None:
        """Send a body, or the beginning of one that was stated to be longer."""
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if stated is None else stated))
        self.end_headers()
        self.wfile.write(body)
        if stated is not None and stated > len(body):
            self.close_connection = True

    def ranged(self, content: bytes | None = None, *, most: int | None = None, etag: str | None = '"one"') -> None:
        """Answer Range and If-Range as RFC 9110 has them, sending at most `most` bytes of what was announced."""
        content = self.content if content is None else content
        headers = {"ETag": etag} if etag else {}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or self.headers.get("If-Range", etag) != etag:
            self.answer(200, content[:most], stated=len(content), **headers)
            return
        start, stop = int(match[1]), min(int(match[2] or len(content)) + 1, len(content))
        if start >= len(content):
            self.answer(416, Content_Range=f"bytes */{len(content)}")
            return
        headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        self.answer(206, content[start:stop][:most], stated=stop - start, **headers)

    def serve_good(self, number: int) -> None:
        self.ranged()

    def serve_moved(self, number: int) -> None:
        self.answer(302, Location="/good/a.h5ad")

    def serve_moved_to_disk(self, number: int) -> None:
        self.answer(302, Location="file:///etc/passwd")

    def serve_private(self, number: int) -> None:
        is_known = self.headers.get("Authorization") == "Basic YW5uOnMzY3JldA=="  # ann:s3cret
        self.ranged() if is_known else self.answer(401)


@contextmanager
def serving(handler: type[Handler] = Handler, *, content: bytes = b"") -> Iterator[Web]:
    """Run a server while the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    web = server.web = Web(f"http://127.0.0.1:{server.server_port}", content)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
