"""What is there after an operation, in a form that two runs of it can be compared in, and what is wrong.

Three accounts must agree: the host after an undisturbed run, the host after this run, and what the
log says of it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from banger import proc
from banger.config import Dirs
from banger.events import queries, work
from banger.events import vocabulary as ev
from banger.events.fold import Op
from banger.events.log import EventLog
from banger.events.verify import stored_rows, verify
from banger.model import Value
from banger.tasks.audit import audit
from banger.tasks.context import World

# Beginnings of bundles stay for the next attempt, and are the cache's to prune.
_FURNITURE = re.compile(
    r".*/banger\.db[^/]*|root\.db[^/]*|vmms/root(/.*)?|.*\.(fifo|lock)|cache/banger/(images|kernels)|cache/banger/bundles(/sha256(/.*\.part)?)?"
)
"""The logs themselves, what stays wherever something was once waited for, and root's recorded kernel.

The last is compared by what root lists.
"""

_VM = re.compile(r"vm-[0-9a-z]{8}")
_BROUGHT = re.compile(r"(?<=workspace-)op-[0-9a-z]{8}|(?<=\"op\":\")op-[0-9a-z]{8}")
"""The operation that brought a workspace, by which its files are named."""

_ON_BRIDGE = re.compile(r"(?<=^ledger address )[0-9.]+|fc-[0-9a-f]{10}|(?<=^ledger jail )[0-9a-f-]+")
"""A VM's address, which is anyone's choice, and its tap, whose name is made from the VM's id."""

# What differs from run to run: which process, when, how it came to stop.
_VARIES = ("process", "created_us", "started_us", "ready_seconds", "reason", "host", "ssh_port", "address")


class Account(Value):
    """What one run left: each fact as a line, ids and ports replaced by their order."""

    lines: tuple[str, ...]


def account(log: EventLog, op: str, home: Path) -> Account:
    """Give an account of the host below `home`, of the projections, and of how the operation ended."""
    ended = queries.whole_op(log, op)
    lines = [
        f"fate {ended.fate}",
        *(f"step {step.name} {step.state}" for step in ended.steps),
        *(f"file {line}" for line in _files(home)),
        *(f"ledger {held.kind} {held.id} {held.state}" for held in queries.resources(log)),
        *(f"vm {_plain(vm)}" for vm in queries.vms(log)),
        *(f"artifact {known.kind} {known.name} {known.digest}" for known in _artifacts(log)),
    ]
    return Account(lines=tuple(sorted(_normal(log, lines))))


def _files(home: Path) -> Iterator[str]:
    """List every path below `home` with its type, permissions and, where it is fixed, its size."""
    for path in sorted(home.rglob("*")):
        if _FURNITURE.fullmatch(str(path.relative_to(home))):
            continue
        status = path.lstat()
        size = "" if path.is_dir() or path.suffix in (".log", ".vmm") else status.st_size
        yield f"{path.relative_to(home)} {status.st_mode:o} {size}"


def _plain(vm: Any) -> str:
    facts = {key: value for key, value in msgspec.to_builtins(vm).items() if key not in _VARIES}
    return msgspec.json.encode(facts, order="sorted").decode()


def _artifacts(log: EventLog) -> list[queries.ArtifactSummary]:
    return [*queries.artifacts(log, "image"), *queries.artifacts(log, "kernel")]


def _normal(log: EventLog, lines: list[str]) -> Iterator[str]:
    """Replace ids and ports by their order: they are of one run."""
    ports = sorted(queries.resource_ids(log, "port"))
    vms = sorted({vm for line in lines for vm in _VM.findall(line)})
    for line in lines:
        for number, port in enumerate(ports):
            line = line.replace(f"port {port} ", f"port #{number} ")
        line = _BROUGHT.sub("op-#", _ON_BRIDGE.sub("#", line))
        yield _VM.sub(lambda found: f"vm-#{vms.index(found[0])}", line)


def differences(clean: Account, found: Account) -> list[str]:
    """Tell what a run left that the clean one did not, and the other way round."""
    ours, theirs = Counter(found.lines), Counter(clean.lines)
    return [f"more: {line}" for line in (ours - theirs).elements()] + [
        f"less: {line}" for line in (theirs - ours).elements()
    ]


def faults(log: EventLog, world: World, op: str) -> Iterator[str]:
    """Tell what is wrong after an operation, whatever was asked for."""
    whole = queries.whole_op(log, op)
    yield from _unended(log, op, whole)
    if whole.fate != "stuck":  # then the host may be ahead of the ledger, and a person looks at it
        yield from strays(log, world)
    yield from _repeated(log)
    before = log.last_seq()
    if work.reap(log) or work.claim(log, proc.me()) is not None or log.last_seq() != before:
        yield "a second recovery finds something to do"
    if bad := log.rebuild():
        yield f"projections differ from the log: {', '.join(bad)}"
    verdict = verify(stored_rows(log.path))
    if verdict.bad_seq is not None:
        yield f"row {verdict.bad_seq} of the log: {verdict.why}"


def _unended(log: EventLog, op: str, whole: Op) -> Iterator[str]:
    ends = sum(isinstance(row.event, ev.OpEnded) for row in log.read(stream=op))
    if whole.state != "ended" or ends != 1:
        yield f"it is {whole.state} and ended {ends} times"
    if queries.active_count(log):
        yield f"{queries.active_count(log)} operations are left in the queue"


def strays(log: EventLog, world: World) -> Iterator[str]:
    """Tell, for each kind of resource, what is on the host or in the ledger and not on the other side."""
    found = audit(log, world.dirs, world.root, world.running)
    yield from (f"leaked: {each.kind} {each.id}" for each in found.leaked)
    yield from (f"missing: {each.kind} {each.id}" for each in found.missing)
    real, ours = set(_cached(world.dirs)), queries.resource_ids(log, "artifact")
    yield from (f"leaked: artifact {each}" for each in sorted(real - ours))
    yield from (f"missing: artifact {each}" for each in sorted(ours - real))


def _cached(dirs: Dirs) -> Iterator[str]:
    for kind in ("image", "kernel"):
        for place in (dirs.cache / f"{kind}s").glob("[!.]*"):
            yield f"{kind}:{place.name}"


def _repeated(log: EventLog) -> Iterator[str]:
    """Tell which steps are recorded as done, or as undone, more than once."""
    done = Counter(
        (row.stream, ev.type_of(row.event), row.event.name)
        for row in log.read()
        if isinstance(row.event, ev.StepDone | ev.UndoDone)
    )
    yield from (f"{' '.join(what)}: {times} times" for what, times in done.items() if times > 1)
