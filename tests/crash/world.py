"""A banger whose steps have traps, and the oracle that says whether anything is left."""

from __future__ import annotations

import socket
from pathlib import Path

from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.model import VmSpec
from banger.tasks import monitor, network, snapshot
from banger.tasks.pipeline import Pipeline, Step
from banger.testing import crash
from banger.testing.crash import Point, Trap, Victim
from banger.testing.home import Home

_PLAIN = VmSpec(name="web", image="i", kernel="k", vcpu=1, memory_mib=256, disk_mib=64)
_NOT_FOR_IT = network.not_for(_PLAIN) | snapshot.not_for(_PLAIN) | monitor.LEFT_OUT["qemu"]


def steps_of(pipeline: Pipeline) -> list[Step]:
    """List the steps of an operation on a VM that needs nothing of root."""
    return [step for step in pipeline.steps if step.name not in _NOT_FOR_IT]


class World:
    """A banger whose steps have traps, and the oracle that says whether anything is left of a VM."""

    def __init__(self, home: Home, traps: Path):
        self.home = home
        self.traps = traps

    def create(self, *traps: Trap) -> str:
        """Make sure that there is no VM, then request one with traps set; see `run`."""
        self.home.banger("vm", "delete", "web")  # what a test that failed has left
        return self.run("vm", "create", "web", traps=traps)

    def run(self, *words: str, traps: tuple[Trap, ...] = ()) -> str:
        """Request an operation with traps set, see it to its end, and give its id."""
        for old in [*self.traps.glob("*.sprung"), *self.traps.glob("*.trap")]:
            old.unlink()
        crash.set_traps(self.traps, *traps)
        op = str(self.home.json(*words)["op"])
        for _ in range(6):  # the client starts a new daemon when the old one is gone
            self.home.banger("ops", "follow", op)
            if self.home.json("ops", "show", op)["op"]["state"] == "ended":
                break
        assert crash.unsprung(self.traps) == [], "every trap sprang"
        return op

    def fate(self, op: str) -> str:
        return str(self.home.json("ops", "show", op)["op"]["fate"])

    def claims(self, op: str) -> int:
        """Tell how many workers have had the operation: at least one more than deaths it has seen."""
        return int(self.home.json("ops", "show", op)["op"]["epoch"])

    def answers(self) -> None:
        done = self.home.banger("vm", "exec", "web", "--", "echo", "I am well")
        assert (done.stdout, done.returncode) == ("I am well\n", 0), done.stderr

    def delete(self) -> None:
        done = self.home.banger("vm", "delete", "web")
        assert done.returncode == 0, done.stderr

    def nothing_is_left(self) -> None:
        """Compare log, ledger, queue, files, processes and ports with a host that has no VM."""
        dirs = self.home.dirs
        audited = self.home.json("ops", "audit")
        assert (audited["held"], audited["leaked"], audited["missing"]) == (0, [], [])
        assert audited["acquired"] == audited["released"]
        log = EventLog(dirs.database, dirs.work_bell, self.home.path / "own.fifo", "test")
        try:
            assert queries.vms(log) == []
            left = [r for r in queries.resources(log) if r.kind != "artifact"]
            assert left == []
            assert queries.active_count(log) == 0
            ports = {row.event.ssh_port for row in log.read() if isinstance(row.event, ev.VmStarted)}
        finally:
            log.close()
        assert list((dirs.state / "vms").iterdir()) == []
        assert {path.name for path in dirs.runtime.iterdir()} <= {"daemon.sock", "work.fifo", "events.fifo"}
        marked = [process for process in self.home.processes() if _is_vmm(process.pid)]
        assert marked == []
        for port in ports:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", port)) != 0, "nobody listens on its port"

    def trap(
        self, step: str, point: Point, who: Victim, *, back: bool = False, kind: str = "vm.create"
    ) -> Trap:
        """Make a trap; `inside` is the middle of what the step did when nothing was in its way."""
        nth = 1
        if point == "inside":
            count = crash.counted(self.traps, kind, step, back=back)
            nth = max(1, count // 2)
            point = "inside" if count else "after"  # it does nothing that could be interrupted
        return Trap(kind=kind, step=step, point=point, who=who, back=back, nth=nth)


def _is_vmm(pid: int) -> bool:
    try:
        return "qemu" in Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return False
