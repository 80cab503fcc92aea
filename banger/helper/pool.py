"""From a packet to its answer: understand it, let it in, have it carried out once, remember the answer."""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import threading
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from banger.errors import BangerError, DiskFull, HelperDown, InvalidRequest, Refused
from banger.helper import given, store
from banger.helper.flood import OTHERS, Flood
from banger.helper.host import Host
from banger.helper.ledger import Ledger
from banger.helper.queue import Queue
from banger.helper.requests import Ask, Request
from banger.helper.store import Admitted, Entry, Outcome, Store
from banger.helper.verbs import Call, Caller, Facts, Verb
from banger.helper.wire import Packet

CRASHED = 70
"""Exit status of a helper that could not go on (EX_SOFTWARE of sysexits.h)."""

OWNERS_LINES_S = 100
UNREAD_LINES_S = 1
"""Refusals a second of each caller that have a line of their own, read or unread."""

Verbs = Mapping[type[Ask], Verb]


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What goes back: facts or an error, the audit line's number, and descriptors beside it."""

    ok: Facts | None = None
    error: dict[str, Any] | None = None
    audit: int | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """A request that is queued or being carried out, and whoever waits for its answer."""

    admitted: Admitted
    request: Request
    digest: str
    verb: Verb
    call: Call
    ended: threading.Event = field(default_factory=threading.Event)
    answer: Answer = field(default_factory=Answer)


class Pool:
    """Takes requests from any thread; one thread, which calls `work`, carries them out."""

    def __init__(self, state: str, verbs: Callable[[Store], Verbs], host: Host):
        self.store = Store(state)
        self._ledger_db = store.connect(state)
        self._ledger = Ledger(self._ledger_db)
        self._host = host
        self._verbs = dict(verbs(self.store))
        self._queue = Queue(state, self._carry_out)
        self._lock = threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._under_way: dict[tuple[int, str], Job] = {}
        self._lines: defaultdict[int, deque[int]] = defaultdict(deque)
        self._numbers = itertools.count(1)
        self._owners = Flood(OWNERS_LINES_S)
        self._unread = Flood(UNREAD_LINES_S)

    def recover(self) -> int:
        """Clean up after a helper that died; give the number of requests that it was at."""
        self._queue.drop_all()
        return self.store.recover()

    def answer(self, caller: Caller, packet: Packet) -> tuple[Answer, list[int]]:
        """Answer one packet, and give the descriptors that go with it. The packet's own stay open."""
        entry = None
        try:
            request = _decode(packet)
            entry = store.entry_of(caller.uid, request)
            verb = self._verbs[type(request.ask)]
            _check_fds(verb, request, packet)
            return self._ask(caller, entry, request, verb, packet.fds)
        except BangerError as error:
            return self.refuse(entry or store.raw_entry(caller.uid, packet.data), error), []

    def refuse(self, entry: Entry, error: BangerError) -> Answer:
        """Refuse an owner's request, with a line in the audit log unless there are too many."""
        seq = self._line(entry, "refused", error.message) if self._owners.lets_through(entry.uid) else None
        return Answer(error={**error.to_dict(), "op": error.op or entry.op or None}, audit=seq)

    def turn_away(self, uid: int, error: BangerError) -> Answer:
        """Refuse a connection of which nothing was read: one line a second, the rest is counted."""
        entry = Entry(store.now_us(), uid)
        seq = self._line(entry, "refused", error.message) if self._unread.lets_through(uid) else None
        return Answer(error=error.to_dict(), audit=seq)

    def note_floods(self) -> None:
        """Write down how many refusals were left out in the seconds before this one."""
        for uid, count in [*self._owners.take(), *self._unread.take()]:
            whose = "of many users " if uid == OTHERS else ""
            message = f"{count} more requests {whose}within a second."
            self._line(Entry(store.now_us(), uid), "refused", message)

    def work(self) -> None:
        """Carry out what is asked, one after another, until `stop`."""
        try:
            self._queue.work()
        except sqlite3.Error:
            crash()

    def stop(self) -> None:
        """Make `work` return when the request at hand is done."""
        self._queue.stop()

    def let_down(self) -> None:
        """Tell those whose requests were not begun; at the next start they are written down."""
        for number in list(self._jobs):
            if job := self._jobs.pop(number, None):
                job.answer = _failure(HelperDown("The root helper stops."), job)
                job.ended.set()

    def close(self) -> None:
        """Close what is open; nothing is asked any more."""
        self._queue.close()
        self._ledger_db.close()
        self.store.close()

    def _ask(
        self, caller: Caller, entry: Entry, request: Request, verb: Verb, fds: tuple[int, ...]
    ) -> tuple[Answer, list[int]]:
        while True:
            call = Call(caller=caller, op=request.op, step=request.step, epoch=request.epoch, fds=fds)
            placed = self._place(entry, request, verb, call)
            if isinstance(placed, Answer):
                return placed, []
            placed.ended.wait()
            if placed.call is call:
                return placed.answer, call.give
            if not placed.call.give:
                return self._repeated(entry, placed.answer), []
            # What it gave has gone to whom it was given: this one gets its own.

    def _place(self, entry: Entry, request: Request, verb: Verb, call: Call) -> Job | Answer:
        """Queue a request, or find the one under way that it repeats, or the answer it had before."""
        asked, whose = store.digest(request), (entry.uid, request.key)
        with self._lock:
            under_way = self._under_way.get(whose)
            if under_way is not None:
                if under_way.digest != asked:
                    raise Refused(f"The key {request.key!r} is in use for another request.")
                self.store.see(entry)
                return under_way
            admitted = self.store.admit(entry, request, reads=verb.reads)
            if admitted.facts is not None:
                return self._repeated(entry, Answer(ok=admitted.facts))
            job = Job(admitted=admitted, request=request, digest=asked, verb=verb, call=call)
            number = next(self._numbers)
            self._jobs[number] = job
            if not verb.reads:
                self._under_way[whose] = job
            line = self._lines[entry.uid]
            line.append(number)
            if len(line) == 1:
                self._queue.put(number)
        return job

    def _next_of(self, uid: int) -> None:
        """Queue an owner's next request: one at a time, so that nobody waits behind all of another's."""
        with self._lock:
            line = self._lines[uid]
            line.popleft()
            if line:
                self._queue.put(line[0])

    def _repeated(self, entry: Entry, first: Answer) -> Answer:
        outcome: Outcome = "ok" if first.error is None else "failed"
        seq = self._line(entry, outcome, "Asked again; answered as the first time.")
        return Answer(ok=first.ok, error=first.error, audit=seq)

    def _line(self, entry: Entry, outcome: Outcome, message: str) -> int | None:
        """Write a line for which nothing was done; a full disk does not stop the answer."""
        with contextlib.suppress(DiskFull):
            return self.store.note(entry, outcome, message)
        return None

    def _carry_out(self, number: int) -> None:
        """Run one handler and write down how it ended."""
        job = self._jobs.pop(number, None)
        if job is None:
            return  # a number of another life
        began = time.monotonic()
        try:
            answer, outcome = self._run(job)
            self._end(job, answer, outcome, time.monotonic() - began)
        except BaseException:
            crash()  # huey would swallow it, and the caller would wait for ever

    def _run(self, job: Job) -> tuple[Answer, Outcome]:
        try:
            return Answer(ok=job.verb.run(self._host, self._ledger, job.call, job.request.ask)), "ok"
        except sqlite3.OperationalError as error:
            full = store.told(error)
            if not isinstance(full, DiskFull):
                raise
            return _failure(full, job), "failed"
        except (Refused, InvalidRequest) as error:
            return _failure(error, job), "refused"
        except BangerError as error:
            return _failure(error, job), "failed"
        except Exception as error:
            traceback.print_exc()
            return _failure(BangerError(f"{type(error).__name__}: {error}"), job), "failed"

    def _end(self, job: Job, answer: Answer, outcome: Outcome, seconds: float) -> None:
        seq = self._write_down(job, answer, outcome, seconds)
        job.answer = Answer(ok=answer.ok, error=answer.error, audit=seq)
        with self._lock:
            if not job.verb.reads:
                del self._under_way[job.call.caller.uid, job.request.key]
        self._next_of(job.call.caller.uid)
        job.ended.set()

    def _write_down(self, job: Job, answer: Answer, outcome: Outcome, seconds: float) -> int | None:
        if job.verb.reads and answer.error is None:
            return None
        kept = (job.request.key, answer.ok) if answer.ok is not None and not job.call.give else None
        message = (answer.error or {}).get("message", "")
        # On a full disk it stays among what is running, and is written down at the next start.
        with contextlib.suppress(DiskFull):
            return self.store.finish(job.admitted, outcome, message, seconds, answer=kept)
        return None


# msgspec (0.22) looks at a type when it first decodes one, and two threads that do so at once crash it.
_REQUEST = msgspec.json.Decoder(Request)


def _decode(packet: Packet) -> Request:
    """Read a request. Raises InvalidRequest naming what is wrong with it."""
    if not packet.whole:
        raise InvalidRequest("The request is larger, or has more descriptors, than is allowed.")
    try:
        return _REQUEST.decode(packet.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The request is not valid: {error}") from None


def _failure(error: BangerError, job: Job) -> Answer:
    return Answer(error={**error.to_dict(), "op": error.op or job.request.op})


def _check_fds(verb: Verb, request: Request, packet: Packet) -> None:
    wanted = verb.fds(request.ask)
    if len(packet.fds) != wanted:
        raise InvalidRequest(f"The request brings {len(packet.fds)} descriptors, not {wanted}.")
    for fd in packet.fds:
        given.check_place(fd)


def crash() -> None:
    """End at once: a database that cannot be written may not be what it says (fsync(2) reports once)."""
    traceback.print_exc()
    os._exit(CRASHED)
