"""A private banger: own state, runtime and configuration, the user's own cache; nothing left after."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from banger import config, proc
from banger.model import Process

DAEMON_GONE_S = 15.0


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
            [str(Path(sys.executable).with_name("banger")), *words],
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

    def __enter__(self) -> Home:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()
