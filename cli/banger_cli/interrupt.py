"""Ctrl-C while operations are waited for: leave them alone, cancel them, or go on waiting."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

from banger.errors import BangerError, WrongState
from banger_cli import session, wire
from banger_cli.screen import Screen

DETACH, CANCEL, WAIT = "detach", "cancel", "wait"
_ANSWERS = {"": DETACH, **{key: word for word in (DETACH, CANCEL, WAIT) for key in (word, word[0])}}


class Detached(BangerError):
    """Detached; the operation goes on."""

    code: ClassVar[str] = "detached"
    exit_code: ClassVar[int] = 130

    def __init__(self, op: str, *, undoing: bool = False):
        shows = f"`banger ops follow {op}` shows it"
        if undoing:
            super().__init__("Detached; the undo goes on.", hint=f"{shows}.", op=op)
        else:
            super().__init__(hint=f"{shows}, `banger ops cancel {op}` undoes it.", op=op)


class Interruption:
    """What Ctrl-C does to operations that are waited for together.

    `choice` is DETACH or CANCEL; None asks where somebody can answer, and detaches elsewhere.
    """

    def __init__(self, screen: Screen, choice: str | None, *ops: str):
        self.cancelled = False
        """The operations were asked to stop because of a Ctrl-C."""
        self._screen = screen
        self._choice = choice
        self._ops = ops

    @classmethod
    def of(cls, screen: Screen, choice: str | None, *replies: dict[str, Any]) -> Interruption:
        """Meet Ctrl-C for what was asked for; one that was only joined is somebody else's to cancel."""
        own = [reply["op"] for reply in replies if not reply.get("joined")]
        return cls(screen, choice if own else DETACH, *own)

    def meet(self, op: str, *, undoing: bool) -> None:
        """Do what is wanted after a Ctrl-C while `op` was watched; return to go on waiting.

        `undoing` tells that it is on its way back already. Raises Detached to leave.
        """
        try:
            choice = self._choose(op, undoing=undoing)
            if choice == CANCEL:
                self._cancel()
        except KeyboardInterrupt:
            choice = DETACH
        if choice == DETACH:
            raise Detached(op, undoing=undoing or self.cancelled)

    def _choose(self, op: str, *, undoing: bool) -> str:
        if self.cancelled:
            return DETACH
        if self._choice is not None:
            return self._choice
        if undoing or not _somebody_answers():
            return DETACH
        return _ask(op if len(self._ops) == 1 else f"{len(self._ops)} operations", self._screen)

    def _cancel(self) -> None:
        with uncut():
            for op in self._ops:
                with contextlib.suppress(WrongState):  # it has ended: its result will tell how
                    wire.call("ops.cancel", op=op)
            self.cancelled = True
        self._screen.line("Cancelling; Ctrl-C again leaves the undo to itself.")


def _somebody_answers() -> bool:
    return session.stdin_is_terminal() and sys.stderr.isatty() and not _in_background()


def _in_background() -> bool:
    """Tell whether reading from the terminal would stop us instead (SIGTTIN)."""
    try:
        return os.tcgetpgrp(0) != os.getpgrp()
    except OSError:  # a terminal, but not the one that controls us: it stops nobody
        return False


def _ask(about: str, screen: Screen) -> str:
    """Ask until there is an answer; the end of input is one. Raises KeyboardInterrupt.

    Nothing typed before answers by mistake: a terminal throws that away at Ctrl-C.
    """
    try:
        while True:
            screen.prompt(f"{about}: leave running (detach), undo (cancel) or wait? [D/c/w] ")
            line = _typed()
            if not line.endswith("\n"):
                screen.line("")
                return DETACH
            if choice := _ANSWERS.get(line.strip().lower()):
                return choice
    except KeyboardInterrupt:
        screen.line("")
        raise


def _typed() -> str:
    """Read one line past Python's buffer: what follows it may be meant for a guest."""
    try:
        return os.read(0, 1024).decode("utf-8", "replace")
    except OSError:  # the terminal was hung up
        return ""


@contextlib.contextmanager
def uncut() -> Iterator[None]:
    """Put Ctrl-C off to the end of the block, so that it happens whole or not at all."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # it is ignored, as by a shell for what it runs in the background
        return
    caught: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if caught:
        raise KeyboardInterrupt
