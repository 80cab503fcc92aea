"""A daemon that speaks the protocol and runs `vm.exec` on this machine instead of in a guest."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Json = dict[str, Any]
Answer = Json | bytes | Iterable[Json] | Callable[[Json], Any]

_HEAD = struct.Struct(">cI")


class FakeDaemon:
    """Answers each method with what `answers` has for it, and remembers what it was asked.

    An answer is a result, bytes (sent as they are, then the connection ends), a list of reply
    lines, or a function of the params that gives one of these; None closes the connection.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.calls: list[tuple[str, Json]] = []
        self.answers: dict[str, Any] = {"hello": {"version": "0", "pid": os.getpid()}}
        self.untethered = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(path))
        self._socket.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def asked(self, method: str) -> list[Json]:
        """Give the params of every call of a method, in order."""
        return [params for name, params in self.calls if name == method]

    def close(self) -> None:
        """Let nobody in any more."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        tethered = False
        # A client may leave before the end, and with what it has not read.
        with client, client.makefile("rb") as lines, contextlib.suppress(ConnectionError):
            for line in lines:
                request = json.loads(line)
                method, params = request["method"], request["params"]
                self.calls.append((method, params))
                tethered = tethered or method == "vm.tether"
                if method == "vm.exec" and method not in self.answers:
                    _say(client, {"result": {}})
                    _execute(client, lines, params)
                    return
                if not self._answer(client, self.answers.get(method), params):
                    return
        if tethered:
            self.untethered.set()

    def _answer(self, client: socket.socket, answer: Any, params: Json) -> bool:
        if callable(answer):
            answer = answer(params)
        if answer is None:
            return False
        if isinstance(answer, bytes):
            client.sendall(answer)
            return False
        if isinstance(answer, dict):
            answer = [answer if "error" in answer else {"result": answer}]
        for line in answer:
            if line is None:
                return False
            _say(client, line)
        return True


def _say(client: socket.socket, line: Json) -> None:
    client.sendall(json.dumps(line).encode() + b"\n")


def _frame(client: socket.socket, lock: threading.Lock, kind: bytes, payload: bytes) -> None:
    with lock:
        client.sendall(_HEAD.pack(kind, len(payload)) + payload)


def _execute(client: socket.socket, frames: Any, params: Json) -> None:
    lock = threading.Lock()
    argv = params.get("argv") or [base64.b64decode(word) for word in params["raw"]]
    with contextlib.ExitStack() as streams:
        if params.get("tty"):
            master, slave = pty.openpty()
            streams.callback(os.close, master)
            termios.tcsetwinsize(slave, (params["rows"], params["cols"]))
            child = subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
            os.close(slave)
            sources, sink = [(b"o", master)], master
        else:
            child = streams.enter_context(_piped(argv))
            assert child.stdin
            assert child.stdout
            assert child.stderr
            sources = [(b"o", child.stdout.fileno()), (b"r", child.stderr.fileno())]
            sink = child.stdin.fileno()
        pumps = [threading.Thread(target=_pump, args=(client, lock, *each), daemon=True) for each in sources]
        pumps.append(
            threading.Thread(target=_obey, args=(frames, child, sink, params.get("tty", False)), daemon=True)
        )
        for pump in pumps:
            pump.start()
        code = child.wait()
        for pump in pumps[:-1]:
            pump.join()
        with contextlib.suppress(OSError):
            _frame(client, lock, b"x", json.dumps({"exit": code if code >= 0 else 128 - code}).encode())
        pumps[-1].join()


def _piped(argv: list[Any]) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)


def _pump(client: socket.socket, lock: threading.Lock, kind: bytes, fd: int) -> None:
    while True:
        try:
            data = os.read(fd, 65536)
        except OSError:
            return
        if not data:
            return
        try:
            _frame(client, lock, kind, data)
        except OSError:
            return


def _obey(frames: Any, child: subprocess.Popen[bytes], sink: int, tty: bool) -> None:
    with contextlib.suppress(OSError):  # the client or the command has gone
        while head := frames.read(_HEAD.size):
            kind, length = _HEAD.unpack(head)
            _obey_frame(child, sink, tty, kind, frames.read(length))
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)


def _obey_frame(child: subprocess.Popen[bytes], sink: int, tty: bool, kind: bytes, payload: bytes) -> None:
    if kind == b"i":
        with contextlib.suppress(OSError):  # a command that reads no more input is not at its end
            view = memoryview(payload)
            while view:
                view = view[os.write(sink, view) :]
    elif kind == b"e" and not tty:
        assert child.stdin
        child.stdin.close()
    elif kind == b"w":
        termios.tcsetwinsize(sink, tuple(json.loads(payload)))
    elif kind == b"s":
        os.killpg(child.pid, signal.Signals[f"SIG{payload.decode()}"])


def main() -> None:
    """Stand in for `python -P -m banger.rpc.daemon --ready-fd N`, and note how it was started."""
    where = Path(os.environ["XDG_RUNTIME_DIR"]) / "banger"
    if os.environ.get("FAKE_DIES"):
        sys.exit("the database is on fire")
    daemon = FakeDaemon(where / "daemon.sock")
    with (where / "started").open("a") as log:
        log.write(json.dumps({"argv": sys.argv[1:], "cwd": str(Path.cwd()), "sid": os.getsid(0)}) + "\n")
    daemon.answers["vm.list"] = {"vms": []}
    done = threading.Event()

    def stop(_: Json) -> Json:
        done.set()
        return {}

    daemon.answers["daemon.stop"] = stop
    os.write(int(sys.argv[-1]), b"1")
    done.wait(30)


if __name__ == "__main__":
    main()
