"""A private banger: own state, runtime and configuration, the user's own cache; nothing left after."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from banger import config, proc
from banger.events import queries
from banger.events import vocabulary as ev
from banger.events.log import EventLog
from banger.model import Process
from banger.network import user

DAEMON_GONE_S = 15.0
ENDLESS = ("daemon.sock", "work.fifo", "events.fifo")
"""What stays in the runtime directory when no VM is left."""


class Home:
    """The directories of one banger that a test or benchmark has to itself.

    The cache is shared with the user's own banger, because kernels and images are costly to make.
    """

    def __init__(self, *, pipelines: str | None = None, cache: Path | None = None):
        # A short path, because sockets are made below it.
        self.path = Path(tempfile.mkdtemp(prefix="bg-"))
        (self.path / "run").mkdir(mode=0o700)
        self.environ = {
            **os.environ,
            "XDG_STATE_HOME": str(self.path / "state"),
            "XDG_RUNTIME_DIR": str(self.path / "run"),
            "XDG_CONFIG_HOME": str(self.path / "config"),
            **({"XDG_CACHE_HOME": str(cache)} if cache else {}),
            **({"BANGER_PIPELINES": pipelines} if pipelines else {}),
        }
        self.dirs = config.find_dirs(self.environ)

    def configure(self, text: str) -> None:
        """Write config.toml."""
        self.dirs.config.mkdir(parents=True, exist_ok=True)
        (self.dirs.config / "config.toml").write_text(text)

    def banger(self, *words: str, timeout_s: float = 180.0, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run the command line; output as text, standard input empty unless given."""
        more.setdefault("stdin", subprocess.DEVNULL) if "input" not in more else None
        return subprocess.run(
            self.argv(*words),
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            **more,
        )

    def json(self, *words: str, **more: Any) -> Any:
        """Run the command line with --json and decode its answer."""
        done = self.banger(*words, "--json", **more)
        try:
            return msgspec.json.decode(done.stdout)
        except msgspec.DecodeError:
            raise AssertionError(f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}") from None

    def start(self, *words: str, **more: Any) -> subprocess.Popen[bytes]:
        """Start the command line and come back; all three streams are pipes unless given."""
        for stream in ("stdin", "stdout", "stderr"):
            more.setdefault(stream, subprocess.PIPE)
        return subprocess.Popen(self.argv(*words), env=self.environ, **more)

    def argv(self, *words: str) -> list[str]:
        """Give the command line's whole argv."""
        return [str(Path(sys.executable).with_name("banger")), *words]

    def vmm(self, vm: str) -> Process:
        """Identify the process that runs a VM."""
        pid = self.json("vm", "show", vm)["vm"]["pid"]
        process = None if pid is None else proc.identify(pid)
        assert process is not None, f"{vm} does not run"
        return process

    def leftovers(self) -> list[str]:
        """List what is left of any VM here; see `leftovers`."""
        return leftovers(self.dirs)

    def daemon(self) -> int | None:
        """Give the pid of this home's daemon, if one runs."""
        try:
            pid = int(self.dirs.daemon_lock.read_text())
        except (FileNotFoundError, ValueError):
            return None
        mark = f"XDG_STATE_HOME={self.path / 'state'}".encode()
        try:
            ours = mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return None
        return pid if ours else None

    def processes(self) -> list[Process]:
        """List every process of this home: daemon, supervisor, workers, VMMs."""
        return proc.find_by_environ("XDG_STATE_HOME", str(self.path / "state"))

    def close(self) -> None:
        """End what still runs here and remove the directories."""
        while found := self.processes():
            for process in found:
                proc.kill(process)
        shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def leftovers(dirs: config.Dirs) -> list[str]:
    """List what is left of any VM: rows, ledger lines, work, files, sockets, VMMs, listeners."""
    owned = proc.find_by_environ("XDG_STATE_HOME", str(dirs.state.parent))
    left = [f"process {process.pid}" for process in owned if _runs_qemu(process)]
    if not dirs.database.exists():
        return left
    log = EventLog(dirs.database, dirs.work_bell, dirs.event_bell, "test")
    try:
        left += [f"vm {vm.spec.name}" for vm in queries.vms(log)]
        left += [f"{r.kind} {r.id} of {r.op}" for r in queries.resources(log) if r.kind != "artifact"]
        left += [f"work {op.id}" for op in queries.ops(log, limit=1000) if op.state != "ended"]
        ports = {row.event.ssh_port for row in log.read() if isinstance(row.event, ev.VmStarted)}
    finally:
        log.close()
    left += [str(path) for path in (dirs.state / "vms").iterdir()]
    left += [str(path) for path in dirs.runtime.iterdir() if path.name not in ENDLESS]
    return left + [f"listener on {port}" for port in sorted(ports) if _listens(port)]


def _runs_qemu(process: Process) -> bool:
    try:
        return Path(f"/proc/{process.pid}/exe").readlink().name.startswith("qemu-")
    except OSError:
        return False


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((user.HOST_ADDRESS, port)) == 0
