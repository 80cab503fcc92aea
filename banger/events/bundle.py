"""One operation in one file: what a user attaches to a bug report, and a maintainer folds again.

It is made from a log that is only read, needs no daemon, and takes what there is of a damaged one.
Of a VM it has everything up to the operation's end, so that its state can be folded too.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from banger.config import Dirs
from banger.errors import BangerError, InvalidRequest, LogDamaged, NotFound
from banger.events import vocabulary as ev
from banger.events.database import only_read
from banger.events.fold import Op, Vm, fold_op, fold_vm
from banger.events.log import COLUMNS, decode
from banger.events.queries import OpSummary, op_word
from banger.events.redact import Redactor
from banger.events.vocabulary import Recorded

Json = dict[str, Any]

FORMAT = 1
MAX_LOG_LINES = 2000
MAX_LOG_BYTES = 4 << 20
MAX_FILE_BYTES = 64 << 20
_LAST = (1 << 63) - 1
_Micros = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]  # until the year 2255, as a client can show it


# -- making one -----------------------------------------------------------------------------


def _nothing(_: str) -> list[Json]:
    return []


def make(
    dirs: Dirs,
    short: str,
    host: Json,
    redactor: Redactor,
    by_root: Callable[[str], list[Json]] = _nothing,
) -> Json:
    """Make the bundle of an operation, redacted; its id may be shortened as everywhere.

    `host` says what it ran on, `by_root` what root tells of an operation. Raises NotFound,
    InvalidRequest when several operations fit, LogDamaged when nothing can be read.
    """
    with _opened(dirs.database) as rows:
        op = _find(rows, short)
        ops = _waited_for(rows, op)
        events = sorted(_events(rows, ops), key=lambda event: int(event["seq"]))
    lines, left_out = log_lines(log_files(dirs), ops)
    about = {**host, "schema": ev.SCHEMA, "accelerator": _accelerator(events), "damage": rows.damage}
    document = {"about": about, "events": events, "logs": lines, "root": by_root(op)}
    return {
        "format": FORMAT,
        "op": op,
        **redactor.redact(document),
        "logs_left_out": left_out,
        "redacted": dict(sorted(redactor.counts.items())),
    }


class _Rows:
    """The rows of a log. Where an index is damaged, the table is read as far as that goes."""

    def __init__(self, db: sqlite3.Connection):
        self._db = db
        self.damage: str | None = None

    def where(self, condition: str, *values: object) -> list[Json]:
        """Give the events that fit, in order."""
        try:
            return list(self._select("", condition, values))
        except sqlite3.DatabaseError as error:
            self.damage = str(error)
        readable: list[Json] = []
        with contextlib.suppress(sqlite3.DatabaseError):
            readable.extend(self._select("NOT INDEXED", condition, values))
        return readable

    def _select(self, hint: str, condition: str, values: Sequence[object]) -> Iterator[Json]:
        question = f"SELECT {COLUMNS} FROM event {hint} WHERE {condition} ORDER BY seq"  # noqa: S608  constants
        for row in self._db.execute(question, values):
            event = dict(zip(COLUMNS.split(", "), row, strict=True))
            try:
                for name in ("data", "actor"):
                    event[name] = msgspec.json.decode(event[name], type=Json)
            except msgspec.DecodeError as error:
                self.damage = f"row {event['seq']}: {error}"
            else:
                yield event


@contextlib.contextmanager
def _opened(database: Path) -> Iterator[_Rows]:
    with contextlib.ExitStack() as stack:
        try:
            db = stack.enter_context(only_read(database))
        except sqlite3.DatabaseError as error:
            raise LogDamaged(f"{database} cannot be opened: {error}.") from error
        db.execute("BEGIN")  # one moment of a log that may be in use
        yield _Rows(db)


def _find(rows: _Rows, short: str) -> str:
    """Do what `queries.find_op` does, without the projections."""
    word = op_word(short)
    if rows.where("stream = ? AND version = 1", f"op-{word}"):
        return f"op-{word}"
    # The inner question is answered from the index on (stream, version), without the rows.
    fits = rows.where(
        "seq IN (SELECT seq FROM event WHERE version = 1 AND (stream LIKE ? OR stream LIKE ?))",
        f"op-{word}%",
        f"op-%{word}",
    )
    if not fits and rows.damage is not None:
        raise LogDamaged(f"The event log cannot be read: {rows.damage}.")
    if not fits:
        raise NotFound(f"There is no operation {short}.", hint="`banger ops list` shows them.")
    if len(fits) > 1:
        raise InvalidRequest(f"Several operations fit {short!r}.", hint="Give more of the id.")
    return str(fits[0]["stream"])


def _waited_for(rows: _Rows, op: str) -> list[str]:
    """Give the operation and those it waited for, and those they waited for."""
    found = [op]
    for each in found:
        for event in rows.where("stream = ? AND type = 'op.parked'", each):
            if event["data"].get("on") not in (None, *found):
                found.append(event["data"]["on"])
    return found


def _events(rows: _Rows, ops: Sequence[str]) -> list[Json]:
    """Give the events of operations, and those of the first one's VM up to its end."""
    by_seq: dict[int, Json] = {}
    for op in ops:
        by_seq |= {event["seq"]: event for event in rows.where("op = ? OR stream = ?", op, op)}
    own = [event for event in by_seq.values() if event["stream"] == ops[0]]
    last = max(own, key=lambda event: int(event["seq"]), default=None)
    until = last["seq"] if last is not None and last["type"] in ("op.ended", "op.abandoned") else _LAST
    for vm in {event["data"].get("vm") for event in own if event["type"] == "op.requested"} - {None}:
        by_seq |= {event["seq"]: event for event in rows.where("stream = ? AND seq <= ?", vm, until)}
    return list(by_seq.values())


def _accelerator(events: Sequence[Json]) -> str | None:
    used = [event["data"].get("accelerator") for event in events if event["type"] == "vm.started"]
    return used[-1] if used else None


# -- log lines ------------------------------------------------------------------------------


def log_files(dirs: Dirs) -> list[Path]:
    """List the log file and what it was rotated to (`.1` is the newest of these), the oldest first."""
    rotated = sorted(dirs.state.glob(f"{dirs.log_file.name}.*"), key=lambda path: (len(path.name), path.name))
    return [path for path in (*reversed(rotated), dirs.log_file) if path.is_file()]


def log_lines(files: Sequence[Path], ops: Sequence[str]) -> tuple[list[Json], int]:
    """Read the log lines of some operations: the newest that fit the bounds, and how many do not."""
    kept: deque[tuple[int, Json]] = deque()
    size = left_out = 0
    for length, line in _lines_of(files, ops):
        kept.append((length, line))
        size += length
        while len(kept) > MAX_LOG_LINES or size > MAX_LOG_BYTES:
            size -= kept.popleft()[0]
            left_out += 1
    return [line for _, line in kept], left_out


def _lines_of(files: Sequence[Path], ops: Sequence[str]) -> Iterator[tuple[int, Json]]:
    marks = [op.encode() for op in ops]
    for path in files:
        with path.open("rb") as file:
            for raw in file:
                if not any(mark in raw for mark in marks):
                    continue  # parsing costs more than looking
                with contextlib.suppress(msgspec.DecodeError, RecursionError):
                    line = msgspec.json.decode(raw)
                    if isinstance(line, dict) and line.get("op") in ops:
                        yield len(raw), line


# -- reading one ----------------------------------------------------------------------------


class Bundled(msgspec.Struct, frozen=True, kw_only=True):
    """One event in a bundle: its row in the log, without the hashes and the actor's uid."""

    seq: int
    stream: str
    version: int
    op: str | None
    type: str
    schema: int
    data: Json
    actor: Json
    time_us: _Micros
    boot_us: _Micros

    def recorded(self) -> Recorded:
        """Decode it as the log does, older schemas too."""
        row: Json = msgspec.structs.asdict(self)
        row["data"] = json.dumps({**self.data, "type": self.type})
        row["actor"] = json.dumps({**self.actor, "uid": -1})
        return decode(tuple(row[name] for name in COLUMNS.split(", ")))


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """The document, as far as it is replayed."""

    format: int
    op: str
    events: list[Bundled]


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle's events fold to. `op` is the operation that it was made for."""

    op: str
    ops: dict[str, Op]
    vm: Vm | None
    events: tuple[Recorded, ...]

    def find(self, short: str) -> str:
        """Find one of its operations by a beginning or end of its id. Raises NotFound."""
        word = short.removeprefix("op-").lower()
        for op in self.ops:
            if word and (op.startswith(f"op-{word}") or op.endswith(word)):
                return op
        raise NotFound(f"There is no operation {short} in it.", hint=f"It has {', '.join(self.ops)}.")

    def summary(self, op_id: str) -> OpSummary:
        """Give the line that the projection would have of an operation."""
        op = self.ops[op_id]
        ended, took_us = op.state == "ended", (op.ended_boot_us or 0) - op.started_boot_us
        return OpSummary(
            id=op.id,
            kind=op.kind,
            vm=op.vm,
            name=op.name,
            parent=op.parent,
            state=op.state,
            fate=op.fate,
            step=self._last_step(op_id),
            requested_us=op.requested_us,
            ended_us=op.ended_us,
            seconds=took_us / 1e6 if ended and took_us >= 0 else None,
            error=op.error if ended else None,
            reason=op.waits_for,
        )

    def _last_step(self, op_id: str) -> str | None:
        step: str | None = None
        for row in self.events:
            if row.stream == op_id and isinstance(row.event, ev.StepStarted | ev.UndoStarted):
                step = row.event.name
        return step


def read(path: Path) -> Json:
    """Read a bundle's document. Raises NotFound, InvalidRequest when the file is none."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise NotFound(f"There is no file {path}.") from None
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from None
    if len(text) > MAX_FILE_BYTES:
        raise InvalidRequest(f"{path} is too large for a bundle: over {MAX_FILE_BYTES >> 20} MiB.")
    try:
        document = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"{path} is not JSON, or not all of it is there: {error}.") from None
    if not isinstance(document, dict):
        raise InvalidRequest(f"{path} is not a bundle.")
    return document


def replay(document: Json) -> Replay:
    """Fold the events of a bundle as those of the log are folded. Raises InvalidRequest."""
    _check_version(document)
    try:
        bundle = msgspec.convert(document, Bundle)
        rows = sorted((event.recorded() for event in bundle.events), key=lambda row: row.seq)
        return _folded(bundle.op, rows)
    except BangerError:
        raise
    except Exception as error:  # a file from elsewhere: there is no end to what its events may not fit
        raise InvalidRequest(f"The bundle cannot be replayed: {type(error).__name__}: {error}.") from None


def _check_version(document: Json) -> None:
    if document.get("format") != FORMAT:
        stated = str(document.get("format"))[:20]
        raise InvalidRequest(f"The bundle has the format {stated}; this version of banger reads {FORMAT}.")
    about, events = document.get("about"), document.get("events")
    all_of_it = [about, *(events if isinstance(events, list) else ())]
    schemas = [each.get("schema") for each in all_of_it if isinstance(each, dict)]
    newest = max((schema for schema in schemas if isinstance(schema, int)), default=0)
    if newest > ev.SCHEMA:
        raise InvalidRequest(
            f"The bundle has events of schema {newest}; this version of banger knows {ev.SCHEMA}.",
            hint="A newer version of banger made it, and can replay it.",
        )


def _folded(op_id: str, rows: Sequence[Recorded]) -> Replay:
    ops: dict[str, Op] = {}
    for stream in dict.fromkeys(row.stream for row in rows if isinstance(row.event, ev.OpRequested)):
        op = fold_op(row for row in rows if row.stream == stream)
        assert op is not None
        _check_errors(op)
        ops[stream] = op
    if op_id not in ops:
        raise InvalidRequest(f"The bundle has no events of its operation {op_id}.")
    vm = fold_vm(row for row in rows if row.stream == ops[op_id].vm)
    return Replay(op=op_id, ops=ops, vm=vm, events=tuple(rows))


def _check_errors(op: Op) -> None:
    """Raise ValueError for an error without words: everything that shows one relies on them."""
    for error in (op.error, *op.undo_errors, *(step.error for step in op.steps)):
        if error is not None and not isinstance(error.get("message"), str):
            raise ValueError(f"an error of {op.id} says nothing")
