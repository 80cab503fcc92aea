"""One recording host on which operations are killed and recovered, one case after another.

A lane is at one path, because the database holds absolute paths. A case puts the host back to where
an operation was just requested, forks a worker that dies at its point, then forks workers that
recover as the daemon's do, until nothing is left to do.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal

import msgspec

from banger import config, proc
from banger.config import Config
from banger.events import queries, work
from banger.model import Value
from banger.rpc.service import Service
from banger.tasks.pipeline import Pipeline
from banger.tasks.saga import Saga
from banger.testing import oracle
from banger.testing.child import Child, Ending
from banger.testing.mortal import Fate, MortalLog, Point, Trouble
from banger.testing.oracle import Account
from banger.testing.recording import RecordingWorld
from banger.testing.recording_root import RecordingRoot
from banger.testing.scenes import IN_JAIL, SCENES, Deed

MEMORY = Path("/dev/shm")  # noqa: S108  where fsync costs nothing; another place does as well
ROUNDS = 12
"""So many workers may it take until an operation has ended, the one that dies among them."""

CONFIG = Config(dns=True, bridge_network="10.200.200.128/25")
"""With names of VMs to be routed, which is a step of its own, and addresses that are equally long."""

FATES = {None: "done", "before": "undone", "inside": "undone", "after": "stuck", "cancel": "cancelled"}
"""How an operation ends that meets a trouble."""

VmmWord = Literal["qemu", "firecracker"]

Found = tuple[int, int, bytes | str | None]
Tree = dict[Path, Found]
"""Each path below a directory with its mode, its time (ns), and a file's content or a link's target."""


class Case(Value):
    """One operation, what turns it back if anything does, and the deaths of its first workers, one each.

    With `reboot` the whole host goes down with the first of them. The first death may be that of
    who asks for the operation. An `open_ended` one may rightly end otherwise than the clean run,
    with nothing amiss all the same.
    """

    scene: str
    deaths: tuple[Point, ...]
    trouble: Trouble | None = None
    reboot: bool = False
    open_ended: bool = False


class Verdict(Value):
    """How often a worker was killed in a case, and what the oracle found."""

    case: Case
    kills: int
    differences: tuple[str, ...]


class Lane:
    """One recording host, and what it was like when each operation was just requested."""

    def __init__(self, known: Mapping[str, Pipeline]):
        self.home = Path(tempfile.mkdtemp(prefix="bg-", dir=MEMORY if MEMORY.is_dir() else None))
        self.known = known
        environ = {
            "HOME": str(self.home),
            **{f"XDG_{word}_HOME": str(self.home / word.lower()) for word in ("STATE", "CACHE", "CONFIG")},
            "XDG_RUNTIME_DIR": str(self.home / "run"),
        }
        self.dirs = config.find_dirs(environ)
        self.place = self.home / "vmms"
        self._before: dict[str, Tree] = {}
        self._requested: dict[str, tuple[Tree, str]] = {}
        self._clean: dict[tuple[str, Trouble | None, bool], tuple[Account, dict[str, int]]] = {}

    def __enter__(self) -> Lane:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        shutil.rmtree(self.home)

    # -- processes ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[MortalLog, RecordingWorld]]:
        """Open the log; nobody may fork meanwhile."""
        log = MortalLog(self.dirs.database, self.dirs.work_bell, self.dirs.event_bell, "test")
        try:
            yield log, RecordingWorld(self.dirs, CONFIG, self.place)
        finally:
            log.close()

    def work(self, death: Point | None = None, trouble: Trouble | None = None) -> Ending:
        """Have a worker of its own do what there is to do."""

        def job() -> bytes:
            with self.opened() as (log, world):
                log.fate = fate = Fate(self.home, death, trouble)
                known = fate.pipelines(self.known)
                work.reap(log)
                while (held := work.claim(log, proc.me())) is not None:
                    Saga(log, known, world, held).advance()
                return msgspec.json.encode(fate.counts)

        return Child(job).ended()

    def deed(self, deed: Deed, death: Point | None = None, *, vmm: VmmWord = "qemu") -> Ending:
        """Have a process of its own do a deed, for example ask for an operation."""

        def job() -> bytes:
            with self.opened() as (log, world):
                log.fate = Fate(self.home, death)
                deed(self._service(log, vmm), world)
            return b""

        return Child(job).ended()

    def until_quiet(self, trouble: Trouble | None, deaths: tuple[Point, ...] = ()) -> tuple[int, list[str]]:
        """Fork workers until no operation is left; give how many were killed, and what went wrong."""
        kills, wrong = 0, []
        for number in range(ROUNDS):
            ending = self.work(deaths[number] if number < len(deaths) else None, trouble)
            kills += ending.killed
            if ending.status != 0 and not ending.killed:
                wrong.append(f"a worker ended with {ending.status}: {ending.said.decode()}")
            if number == 0 and deaths and not ending.killed:
                wrong.append("nobody was killed")
            if number + 1 >= len(deaths) and not ending.killed and self._quiet():
                break
        return kills, wrong

    def _quiet(self) -> bool:
        """Have VMs buried whose VMM is gone, as the daemon does; tell whether nothing is left to do.

        One whose operation is stuck is left as it is, for a person to look at.
        """
        with self.opened() as (log, world):
            stuck = {op.vm for op in queries.stuck(log)}
            for vm in queries.vms(log):
                if vm.id not in stuck and vm.process is not None and not world.alive(vm.process):
                    self._service(log).bury(vm)
            return queries.active_count(log) == 0

    def _service(self, log: MortalLog, vmm: VmmWord = "qemu") -> Service:
        config = msgspec.structs.replace(CONFIG, vmm=vmm)
        root = RecordingRoot(self.place)
        return Service(self.dirs, config, log, since_us=0, stop=lambda: None, root=root)

    # -- states ------------------------------------------------------------------------------

    def request(self, scene: str) -> str:
        """Put the host where a scene's operation was just requested; give the operation's id."""
        if scene not in self._requested:
            self.before(scene)
            self.deed(SCENES[scene][-1], vmm=vmm_of(scene)).result()
            self._requested[scene] = (tree(self.home), self._newest())
        else:
            restore(self.home, self._requested[scene][0])
        return self._requested[scene][1]

    def pinned(self, scene: str) -> set[str]:
        """Give the names of the steps that a scene's operation has."""
        op = self.request(scene)
        with self.opened() as (log, _):
            return {step.name for step in queries.whole_op(log, op).steps}

    def before(self, scene: str) -> None:
        """Put the host where a scene's operation is about to be requested."""
        if scene not in self._before:
            self._play(SCENES[scene][:-1], vmm_of(scene))
            self._before[scene] = tree(self.home)
        else:
            restore(self.home, self._before[scene])

    def _newest(self) -> str:
        with self.opened() as (log, _):
            return queries.ops(log, limit=1)[0].id

    def _play(self, deeds: tuple[Deed, ...], vmm: VmmWord) -> None:
        """Do deeds on a new host, each to its end."""
        restore(self.home, {})
        self.dirs.make()
        self.place.mkdir(mode=0o700)
        for deed in deeds:
            self.deed(deed, vmm=vmm).result()
            self.work().result()

    def clean(
        self, scene: str, trouble: Trouble | None, *, reboot: bool = False
    ) -> tuple[Account, dict[str, int]]:
        """Give the account of an undisturbed run, and how many file operations each act took.

        With `reboot` the host goes down before the run begins.
        """
        key = (scene, trouble, reboot)
        if key not in self._clean:
            op = self.request(scene)
            if reboot:
                self._reboot()
            counts = msgspec.json.decode(self.work(trouble=trouble).result(), type=dict[str, int])
            self.until_quiet(trouble)
            found, wrong = self.look(op)
            fate = FATES[trouble.when if trouble is not None else None]
            if wrong or f"fate {fate}" not in found.lines:
                raise AssertionError(f"{scene} with {trouble} goes wrong undisturbed: {wrong}, {found}")
            self._clean[key] = (found, counts)
        return self._clean[key]

    def look(self, op: str) -> tuple[Account, list[str]]:
        """Ask the oracle."""
        with self.opened() as (log, world):
            return oracle.account(log, op, self.home), list(oracle.faults(log, world, op))

    def run(self, case: Case) -> Verdict:
        """Run one case."""
        clean, _ = self.clean(case.scene, case.trouble, reboot=case.reboot)
        if case.deaths[0].moment in ("requesting", "requested"):
            op, kills, wrong = self._killed_asking(case)
        elif case.reboot:
            op, kills, wrong = self._rebooted(case)
        else:
            op = self.request(case.scene)
            kills, wrong = self.until_quiet(case.trouble, case.deaths)
        found, faults = self.look(op)
        if not case.open_ended:
            wrong += oracle.differences(clean, found)
        return Verdict(case=case, kills=kills, differences=(*wrong, *faults))

    def _killed_asking(self, case: Case) -> tuple[str, int, list[str]]:
        """Kill who asks: before the commit nothing has happened, and the client asks again."""
        self.before(case.scene)
        first = self._last_seq()
        ending = self.deed(SCENES[case.scene][-1], case.deaths[0], vmm=vmm_of(case.scene))
        heard = self._last_seq() > first
        wrong = [] if heard == (case.deaths[0].moment == "requested") else [f"the request is there: {heard}"]
        if not heard:
            self.deed(SCENES[case.scene][-1], vmm=vmm_of(case.scene)).result()
        op = self._newest()
        more, also = self.until_quiet(case.trouble)
        return op, ending.killed + more, wrong + also

    def _last_seq(self) -> int:
        with self.opened() as (log, _):
            return log.last_seq()

    def _reboot(self) -> None:
        """Take everything down that does not outlive a reboot."""
        for gone in (self.dirs.runtime, self.place):
            shutil.rmtree(gone)
            gone.mkdir(mode=0o700)

    def _rebooted(self, case: Case) -> tuple[str, int, list[str]]:
        """Reboot together with the worker's death."""
        op = self.request(case.scene)
        ending = self.work(case.deaths[0], case.trouble)
        self._reboot()
        more, wrong = self.until_quiet(case.trouble)
        if not ending.killed:
            wrong.append("nobody was killed")
        return op, ending.killed + more, wrong


def vmm_of(scene: str) -> VmmWord:
    """Tell what config.toml has as `vmm` in a scene."""
    return "firecracker" if scene.endswith(IN_JAIL) else "qemu"


def tree(home: Path) -> Tree:
    """Read what is below a directory; pipes are made again by who needs them."""
    return {path: _what(path) for path in sorted(home.rglob("*")) if not path.is_fifo()}


def _what(path: Path) -> Found:
    if path.is_symlink():
        return 0, 0, str(path.readlink())
    about = path.stat()
    return about.st_mode & 0o7777, about.st_mtime_ns, None if path.is_dir() else path.read_bytes()


def restore(home: Path, wanted: Tree) -> None:
    """Make it so that this and nothing else is below a directory."""
    for path in home.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path, (mode, mtime_ns, content) in wanted.items():
        match content:
            case None:
                path.mkdir()
            case bytes():
                path.write_bytes(content)
            case str():
                path.symlink_to(content)
                continue
        path.chmod(mode)
        os.utime(path, ns=(mtime_ns, mtime_ns))
