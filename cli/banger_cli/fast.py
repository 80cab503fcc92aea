"""The commands typed most, answered without importing anything that takes a millisecond.

The daemon renders the table; `_socket` is what `socket` wraps, at a fifth of its cost.
Whatever is out of the ordinary (no daemon, a slow one, an error) is left to the full command line.
"""

from __future__ import annotations

import os
import sys

from banger_cli import page

TYPE_CHECKING = False  # as typing has it, at no cost
if TYPE_CHECKING:
    import _socket

_LISTS = (["ps"], ["vm", "ps"], ["vm", "ls"], ["vm", "list"])
_ALL = ("-a", "--all")
_PATIENCE_S = 1.0
_LONG = 64 << 10


def answer(words: list[str]) -> str | None:
    """Give the whole output of a command, or None when it needs the full command line."""
    if not words or words in (["--help"], ["-h"], ["help"]):
        return page.TOP
    if words == ["--version"]:
        from banger import __version__

        return f"banger {__version__}\n"
    everything = words[-1] in _ALL
    plain = words[:-1] if everything else words
    return _table(everything=everything) if plain in _LISTS else None


def _table(*, everything: bool) -> str | None:
    import _socket

    from banger_cli import escape, place

    request = b'{"method": "vm.table", "params": {"all": %s}}\n' % (b"true" if everything else b"false")
    daemon = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    daemon.settimeout(_PATIENCE_S)
    try:
        daemon.connect(place.socket())
        daemon.send(request)
        reply = b"".join(iter(lambda: daemon.recv(65536), b""))
    except OSError:
        return None
    finally:
        daemon.close()
    # A connection that ends without a byte is a daemon that died under the question.
    return None if reply[:1] in (b"{", b"") else escape.escape_lines(reply.decode("utf-8", "replace"))


def execute(words: list[str]) -> int | None:
    """Run `vm exec NAME -- CMD...`; its exit code, or None when it needs the full command line.

    It does for options, a terminal, words that are no UTF-8 or long, a VM with a workspace, a refusal.
    """
    if len(words) < 5 or words[:2] != ["vm", "exec"] or words[3] != "--" or words[2].startswith("-"):
        return None
    from banger_cli import session

    keys = session.stdin_is_terminal()
    running = None if keys and os.isatty(1) else _Running.ask(words[2], words[4:])
    if running is None:
        return None
    streams = {"stdout": session.write_to(1), "stderr": session.write_to(2)}
    try:
        return session.Session(running, stdin=None if keys or sys.stdin is None else 0, **streams).run()
    except (Exception, KeyboardInterrupt) as error:
        from banger_cli import app

        return app.ended_by(error)
    finally:
        running.close()


class _Running:
    """A connection on which a command runs."""

    def __init__(self, daemon: _socket.socket, came: bytearray):
        self._daemon = daemon
        self._came = came

    @classmethod
    def ask(cls, vm: str, words: list[str]) -> _Running | None:
        """Ask for a command; None when it was not begun."""
        import _socket
        import json

        from banger_cli import place

        daemon = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        daemon.settimeout(_PATIENCE_S)
        asked = {"method": "vm.exec", "params": {"vm": vm, "argv": words, "plain": True}}
        try:
            line = json.dumps(asked, ensure_ascii=False).encode()
            if len(line) > _LONG:
                return None
            daemon.connect(place.socket())
            daemon.settimeout(None)  # once it is asked, to ask again could run the command twice
            daemon.sendall(line + b"\n")
            came = bytearray()
            while (end := came.find(b"\n")) < 0:
                more = daemon.recv(65536)
                if not more:
                    break
                came += more
            begun = end >= 0 and "result" in json.loads(came[:end])
        except (OSError, UnicodeError):
            begun = False
        if not begun:
            daemon.close()
            return None
        del came[: end + 1]
        return cls(daemon, came)

    def take(self) -> tuple[_socket.socket, bytearray]:
        """Give the socket and the bytes already read from it."""
        return self._daemon, self._came

    def close(self) -> None:
        """Leave the command."""
        self._daemon.close()
