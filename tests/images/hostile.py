"""A registry that misbehaves as it is told to: each path has an answer, and what was asked is kept."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import ssl
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import msgspec

from banger.testing.registry import CONFIG, LAYER, MANIFEST


class Request(http.server.BaseHTTPRequestHandler):
    """One request; an answer gets it and writes what it likes."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        answer = self.server.answers.get(self.path.partition("?")[0])
        with contextlib.suppress(OSError):  # a client that was told enough goes away
            (answer or missing)(self)

    do_POST = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's name
        """Say nothing: what was asked is in `asked`."""

    def body(self) -> bytes:
        """Read what was posted."""
        return self.rfile.read(int(self.headers["Content-Length"]))

    @property
    def offset(self) -> int:
        """Where the range that is asked for begins."""
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
        assert found
        return int(found.group(1))

    def begin(self, status: int, headers: dict[str, Any]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def send(self, data: bytes) -> None:
        """Send a part of a blob, and count it."""
        self.wfile.write(data)
        self.server.sent[self.path] = self.server.sent.get(self.path, 0) + len(data)

    def cut(self) -> None:
        """End the connection after this answer, however much of it is missing."""
        self.close_connection = True


Answer = Callable[[Request], None]


class Server(http.server.ThreadingHTTPServer):
    """Answers on 127.0.0.1, in a thread; `host` is 127.0.0.1:PORT."""

    daemon_threads = False
    block_on_close = True

    def __init__(self, *, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.sent: dict[str, int] = {}
        self.over = threading.Event()
        self.host = f"127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        where: TracebackType | None = None,
    ) -> None:
        self.over.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that go away in the midst of TLS."""

    def image(self, *layers: bytes, config: bytes | None = None, **changes: Any) -> list[str]:
        """Offer an image as `x:1`; `changes` are to its manifest. Give the path of each layer's blob."""
        about = config or msgspec.json.encode(
            {
                "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
                "os": "linux",
                "architecture": "amd64",
            }
        )
        document = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": digest(about), "size": len(about)},
            "layers": [{"mediaType": LAYER, "digest": digest(layer), "size": len(layer)} for layer in layers],
            **changes,
        }
        self.document("1", msgspec.json.encode(document), document["mediaType"])
        for data in (about, *layers):
            self.answers[blob_path(data)] = whole(data)
        return [blob_path(layer) for layer in layers]

    def document(self, name: str, data: bytes, kind: str) -> str:
        """Offer a manifest or index under a tag and its digest; give the digest."""
        for known in (name, digest(data)):
            self.answers[f"/v2/x/manifests/{known}"] = plain(data, kind)
        return digest(data)

    def asked_of(self, path: str) -> list[dict[str, str]]:
        """Give the headers of each request for a path."""
        return [headers for asked, headers in self.asked if asked.partition("?")[0] == path]


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def blob_path(data: bytes) -> str:
    return f"/v2/x/blobs/{digest(data)}"


def missing(request: Request) -> None:
    plain(b"{}", "application/json", 404)(request)


def plain(data: bytes, kind: str, status: int = 200, **headers: str) -> Answer:
    """Answer with a small document."""

    def answer(request: Request) -> None:
        request.begin(status, {"Content-Type": kind, "Content-Length": len(data), **headers})
        request.wfile.write(data)

    return answer


def whole(data: bytes) -> Answer:
    """Answer with a blob, from where it was asked for."""
    return cut_after(data, len(data))


def cut_after(data: bytes, count: int) -> Answer:
    """Answer with at most `count` bytes from where was asked for, and cut the connection if that is less."""

    def answer(request: Request) -> None:
        start = request.offset
        headers = {"Content-Length": len(data) - start}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"  # type: ignore[assignment]
        request.begin(206 if start else 200, headers)
        request.send(data[start : start + count])
        if start + count < len(data):
            request.cut()

    return answer


def rangeless(data: bytes, *counts: int) -> Answer:
    """Answer with a blob from its beginning, whatever was asked; cut the first times after `counts` bytes."""
    left = list(counts)

    def answer(request: Request) -> None:
        count = left.pop(0) if left else len(data)
        request.begin(200, {"Content-Length": len(data)})
        request.send(data[:count])
        if count < len(data):
            request.cut()

    return answer


def endless(data: bytes) -> Answer:
    """Answer without telling a length, and end with the connection."""

    def answer(request: Request) -> None:
        request.begin(200, {"Connection": "close"})
        request.send(data)
        request.cut()

    return answer


def held(data: bytes, count: int) -> Answer:
    """Send `count` bytes from where was asked for, then nothing, until the test is over."""

    def answer(request: Request) -> None:
        cut_after(data, count)(request)
        request.wfile.flush()
        request.server.over.wait(60)
        request.cut()

    return answer


def trickle(data: bytes, pause_s: float) -> Answer:
    """Send one byte at a time."""

    def answer(request: Request) -> None:
        request.begin(200, {"Content-Length": len(data)})
        for byte in data:
            request.send(bytes([byte]))
            if request.server.over.wait(pause_s):
                return

    return answer


def redirect(url: str, status: int = 307, **headers: str) -> Answer:
    """Point to somewhere else."""
    return plain(b"", "text/plain", status, Location=url, **headers)


def challenged(challenge: str, wanted: str, then: Answer) -> Answer:
    """Ask for an Authorization header, and answer whoever has it."""

    def answer(request: Request) -> None:
        if request.headers.get("Authorization") == wanted:
            then(request)
        else:
            plain(b"{}", "application/json", 401, **{"WWW-Authenticate": challenge})(request)

    return answer
