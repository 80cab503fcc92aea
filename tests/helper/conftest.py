"""What the root helper's tests share: root, places that only root can reach, and the table of refusals."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from banger.errors import BangerError
from banger.helper import store, wire
from banger.helper.store import Line
from banger.testing.child import Child
from banger.testing.root_pool import RootPool

NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="the root helper needs root")


class Refusals:
    """What was refused in this session: the case of the threat model, how, and what was done anyway."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, str, int]] = []

    def note(self, case: str, outcome: BangerError | str, effects: int = 0) -> None:
        """Add a row; nothing may have been done."""
        how = outcome if isinstance(outcome, str) else f"{outcome.code}: {outcome.message}"
        self._rows.append((case, how, effects))
        assert effects == 0, f"{case} had {effects} effects"

    def table(self) -> str:
        """Give all rows as text, in the order of the cases."""
        cases: dict[str, list[tuple[str, int]]] = {}
        for case, how, effects in sorted(self._rows, key=lambda row: (len(row[0].split()[0]), row[0])):
            cases.setdefault(case, []).append((how, effects))
        lines = [
            f"{case:<40} {len(rows):>5} {sum(effects for _, effects in rows):>7}  {rows[0][0][:100]}"
            for case, rows in cases.items()
        ]
        return "\n".join([f"{'case':<40} {'tried':>5} {'effects':>7}  outcome, of the first", *lines])


@pytest.fixture(scope="session")
def refusals() -> Iterator[Refusals]:
    """All rows; printed at the end of the session (`-s` shows it)."""
    kept = Refusals()
    yield kept
    sys.stdout.write(f"\n{kept.table()}\n")


@pytest.fixture
def refused(refusals: Refusals) -> Callable[..., None]:
    """`refused(case, outcome, effects=0)`: note that a case was refused; fails when it had effects."""
    return refusals.note


@pytest.fixture
def rooted() -> Iterator[Path]:
    """A directory, open to all, whose parents are all root's own; the tests' temporary ones are not."""
    path = Path(tempfile.mkdtemp(prefix="bgr-", dir="/run"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def pool() -> Iterator[RootPool]:
    """A root helper over recorded kernels, which serves this user and uid 1000; one for a file of tests."""
    if os.geteuid() != 0:
        pytest.skip("the root helper needs root")
    with RootPool([os.getuid(), 1000]) as running:
        yield running


def raw(pool: RootPool, data: bytes, fds: Sequence[int] = ()) -> dict[str, Any]:
    """Send any bytes as a packet, and give the answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        wire.connect(connection, str(pool.socket), 20)
        wire.send(connection, data, fds)
        packet = wire.receive(connection)
        wire.close_all(packet.fds)
        return dict(json.loads(packet.data))


def audit(pool: RootPool) -> list[Line]:
    """Read the audit log, as only root can."""
    db = store.connect(str(pool.state))
    try:
        return [Line(*row) for row in db.execute("SELECT * FROM audit ORDER BY seq")]
    finally:
        db.close()


def asked(pool: RootPool) -> list[Line]:
    """Give the lines of requests that were read, without those that count what was turned away."""
    return [line for line in audit(pool) if line.ask]


def recorded(pool: RootPool) -> dict[str, bytes]:
    """Give all that was done to the recorded kernels."""
    return {file.name: file.read_bytes() for file in pool.kernel.iterdir()}


def descriptors() -> int:
    """Count this process's descriptors."""
    return len(list(Path("/proc/self/fd").iterdir()))


def as_user(uid: int, job: Callable[[], bytes]) -> bytes:
    """Do something in a process of another user; give what it says."""

    def become() -> bytes:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        return job()

    return Child(become).ended().result()
