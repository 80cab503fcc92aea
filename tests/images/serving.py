"""A small web server that misbehaves as it is told, and notes what it was asked."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec


class Site(msgspec.Struct, kw_only=True):
    """Files and redirects by path, and how they are served.

    `cut_after`: bytes of content after which each connection breaks; `stall_after`: after which it falls
    silent. `sent` counts bytes of content.
    """

    address: str = ""
    files: dict[str, bytes] = {}
    redirects: dict[str, str] = {}
    ranges: bool = True
    told_length: int | None = None
    cut_after: int | None = None
    stall_after: int | None = None
    status: int = 200
    sent: int = 0
    asked: list[tuple[str, str | None, str | None]] = []
    stalled: threading.Event = msgspec.field(default_factory=threading.Event)
    gone: threading.Event = msgspec.field(default_factory=threading.Event)


@contextmanager
def serving() -> Iterator[Site]:
    """Serve a site on loopback."""
    site = Site(files={}, redirects={}, asked=[])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            _answer(site, self)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that hang up are expected
    site.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        site.gone.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _answer(site: Site, request: BaseHTTPRequestHandler) -> None:
    wanted = request.headers.get("Range")
    site.asked.append((request.path, wanted, request.headers.get("Authorization")))
    request.close_connection = True
    if request.path in site.redirects:
        request.send_response(302)
        request.send_header("Location", site.redirects[request.path])
        request.send_header("Content-Length", "0")
        request.send_header("Connection", "close")
        request.end_headers()
        return
    if site.status != 200 or request.path not in site.files:
        request.send_error(site.status if site.status != 200 else 404)
        return
    content = site.files[request.path]
    start = int(re.findall(r"bytes=(\d+)-", wanted)[0]) if wanted and site.ranges else 0
    request.send_response(206 if start else 200)
    if start:
        request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    length = len(content) - start if site.told_length is None else site.told_length
    request.send_header("Content-Length", str(length))
    request.send_header("Connection", "close")
    request.end_headers()
    _send(site, request, content[start:])


def _send(site: Site, request: BaseHTTPRequestHandler, content: bytes) -> None:
    limits = [limit for limit in (site.cut_after, site.stall_after) if limit is not None]
    part = content[: min(limits)] if limits else content
    request.wfile.write(part)
    request.wfile.flush()
    site.sent += len(part)
    if site.stall_after is not None and len(part) < len(content):
        site.stalled.set()
        site.gone.wait(30)
