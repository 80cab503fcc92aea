"""Where words go: results to standard output, everything else to standard error."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from banger.errors import BangerError
from banger_cli.escape import escape
from banger_cli.screen import Screen

SIGPIPE_EXIT = 141
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Out:
    """The two ways a command speaks: to people, or as JSON to programs.

    People's lines are escaped here and in `Screen`, so that no command can forget it.
    """

    def __init__(self, *, as_json: bool = False):
        self.as_json = as_json
        self.screen = Screen(sys.stderr)

    def show(self, document: Any, lines: Iterable[str]) -> None:
        """Print a result: the document to programs, the lines to people."""
        if self.as_json:
            self.document(document)
        else:
            self.lines(lines)

    def document(self, value: Any) -> None:
        """Print one JSON document, on one line."""
        print(json.dumps(value), flush=True)

    def lines(self, lines: Iterable[str]) -> None:
        """Print lines to people; nothing in JSON mode."""
        if self.as_json:
            return
        for line in lines:
            print(escape(line))
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Say something beside the result, on standard error."""
        self.screen.line(text)

    def error(self, error: BangerError) -> None:
        """Say what went wrong: a sentence, what to do next, the operation it belongs to."""
        if self.as_json:
            self.document({"error": error.to_dict()})
            return
        self.warn(error)

    def warn(self, error: BangerError) -> None:
        """Tell people of an error that does not decide the outcome."""
        first, *more = error.message.splitlines() or [""]
        self.screen.line(f"banger: {first}")
        for line in more:
            self.screen.line(f"  | {line}")
        if error.hint:
            self.screen.line(f"  hint: {error.hint}")
        if error.op:
            self.screen.line(f"  op: {error.op}")


def shortened(value: object) -> str:
    """Show a value in a table's cell; of a SHA-256 the first twelve digits are enough for people."""
    text = str(value)
    return text[:12] if _SHA256.fullmatch(text) else text


def wants_json(words: list[str]) -> bool:
    """Tell whether the words ask for JSON: needed when they cannot be parsed at all."""
    own = words[: words.index("--")] if "--" in words else words
    flags = zip(["", *own], own, strict=False)
    return any(
        word in ("--json", "-ojson", "--output=json") or (before in ("-o", "--output") and word == "json")
        for before, word in flags
    )


def prepare() -> None:
    """Let no encoding of the terminal turn a result into a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def hang_up() -> int:
    """End quietly when the reader of our output has gone; give the exit code of SIGPIPE."""
    # The interpreter flushes standard output once more at exit, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return SIGPIPE_EXIT
