"""A terminal, or what stands in for one: whole lines, and one line that is rewritten."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from banger_cli.escape import escape

GREEN, RED, YELLOW, DIM = "32", "31", "33", "2"
_ERASE = "\r\x1b[K"


class Screen:
    """Lines written to a stream; on a terminal with one live line below them."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = sys.stderr if stream is None else stream
        self.live = self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._colour = self.live and not os.environ.get("NO_COLOR")
        self._drawn = ""

    def line(self, text: str, colour: str | None = None) -> None:
        """Write a whole line, above the live one."""
        self._write(self._erased() + self._paint(escape(text), colour) + "\n")

    def status(self, text: str) -> None:
        """Draw the live line anew, cut to the terminal's width; nothing where there is none."""
        shown = escape(text)
        if not self.live or shown == self._drawn:
            return
        fits = shown[: self._width() - 1]
        self._drawn = shown  # before it is drawn: Ctrl-C in between must leave it erasable
        self._write(_ERASE + self._paint(fits, DIM))

    def prompt(self, text: str) -> None:
        """Write the beginning of a line that a person will end."""
        self._write(self._erased() + escape(text))

    def clear(self) -> None:
        """Take the live line away."""
        self._write(self._erased())

    def _erased(self) -> str:
        drawn, self._drawn = self._drawn, ""
        return _ERASE if drawn else ""

    def _paint(self, text: str, colour: str | None) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if colour and self._colour else text

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except OSError:
            return 80

    def _write(self, text: str) -> None:
        if text:
            self._stream.write(text)
            self._stream.flush()
