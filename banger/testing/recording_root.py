"""Root's pool of a host that is a record: for operations whose steps ask root."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from banger.helper import about, table
from banger.helper.client import Answer
from banger.helper.ledger import Ledger
from banger.helper.requests import Hello, Listing, Request
from banger.helper.verbs import Call, Caller, Verb
from banger.testing.root_pool import recording_host

VERBS = (*(verb for area in table.AREAS for verb in area.VERBS), Verb(ask=Hello, run=about.hello))


class RecordingRoot:
    """Root's pool without a socket: the real verbs on a recorded kernel, each request by itself.

    Who asks may be killed in the middle of a request, as root may. The ledger outlives a reboot.
    """

    def __init__(self, place: Path):
        self._place = place / "root"
        self._database = place.with_name("root.db")

    def ask(self, request: Request, fds: Sequence[int] = ()) -> Answer:
        """Have a request carried out; see `Root.ask`."""
        if isinstance(request.ask, Listing):
            return Answer(facts={"found": self._made()}, fds=(), audit=None)
        verb = next(verb for verb in VERBS if verb.ask is type(request.ask))
        caller = Caller(uid=os.getuid(), gid=os.getgid())
        call = Call(caller=caller, op=request.op, step=request.step, epoch=request.epoch, fds=tuple(fds))
        with contextlib.closing(self._ledger_db()) as db:
            facts = verb.run(recording_host(self._place), Ledger(db), call, request.ask)
        return Answer(facts=facts, fds=tuple(call.give), audit=None)

    def _made(self) -> list[dict[str, str]]:
        """List what is on the recorded host."""
        with contextlib.closing(self._ledger_db()) as db:
            host, ledger = recording_host(self._place), Ledger(db)
            return [each for area in table.AREAS for each in area.listing(host, ledger, os.getuid())]

    def _ledger_db(self) -> sqlite3.Connection:
        self._place.mkdir(exist_ok=True)
        db = sqlite3.connect(self._database, isolation_level=None)
        db.execute("PRAGMA synchronous = OFF")
        return db
