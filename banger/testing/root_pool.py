"""A root helper over recorded kernels: the real socket, checks, store, queue and verbs; nothing of the host.

In a process of its own (`RootPool`), which can be killed and started again, or only its `Host`
(`recording_host`). The helper must be root, as its client insists on it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from banger.helper import client, serve, server, table
from banger.helper.host import SEAMS, Host
from banger.helper.requests import Ask, Request
from banger.testing.root_disks import RecordingDisks
from banger.testing.root_jails import RecordingJails
from banger.testing.root_net import RecordingNet
from banger.testing.root_resolver import RecordingResolver

START_S = 10.0
HOLD_LOOK_S = 0.01
TRUSTED = "/run"
"""A directory of which each part is root's own, unlike the one for temporary files."""


def recording_host(directory: Path | None = None) -> Host:
    """Give a host that is a record, in memory or, for the process after this one, in a directory."""
    return Host(
        net=RecordingNet(directory and directory / "net.json"),
        disks=RecordingDisks(directory),
        jails=RecordingJails(directory),
        resolver=RecordingResolver(directory),
    )


class RootPool:
    """A root helper in a process of its own, with private directories; killed and gone at the end."""

    def __init__(self, owners: Sequence[int] | None = None):
        self.path = Path(tempfile.mkdtemp(prefix="bgr-", dir=TRUSTED))
        self.path.chmod(0o755)
        self.kernel = self.path / "kernel"
        self.kernel.mkdir(mode=0o700)
        self.state = self.path / "state"
        self.socket = self.path / "run" / server.SOCKET
        self.owners = [os.getuid()] if owners is None else owners
        self._process: subprocess.Popen[str] | None = None
        self._asked = 0

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self.path)

    @property
    def process(self) -> subprocess.Popen[str]:
        """The helper that was started last."""
        assert self._process is not None
        return self._process

    def start(self, *more: str, env: dict[str, str] | None = None) -> None:
        """Start the helper, and wait until it listens."""
        owners = (word for uid in self.owners for word in ("--owner", str(uid)))
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-m", __name__, str(self.path), *owners, *more],
            env=env or dict(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("listening"), line

    def ask(
        self,
        ask: Ask,
        *,
        op: str = "op-1",
        step: str = "step",
        epoch: int = 1,
        key: str | None = None,
        fds: Sequence[int] = (),
        timeout_s: float = 30.0,
    ) -> client.Answer:
        """Ask the helper; with a key of its own unless one is given."""
        self._asked += 1
        asked = f"test/{os.getpid()}/{self._asked}"
        request = Request(op=op, step=step, epoch=epoch, key=key or asked, ask=ask)  # type: ignore[arg-type]  # one of AnyAsk
        return client.ask(self.socket, request, fds, timeout_s=timeout_s)

    def hold(self) -> None:
        """Make each effect on the recorded kernels wait for `let_go`."""
        (self.kernel / "hold").touch()

    def wait_held_up(self) -> None:
        """Wait until an effect waits."""
        deadline = time.monotonic() + START_S
        while not (self.kernel / "held-up").exists():
            assert time.monotonic() < deadline
            time.sleep(HOLD_LOOK_S)

    def let_go(self) -> None:
        """Let effects go on."""
        (self.kernel / "hold").unlink(missing_ok=True)
        (self.kernel / "held-up").unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL the helper, if it runs, and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self.wait()

    def stop(self) -> int:
        """End the helper as the service manager does; give its exit status."""
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Wait for the helper's end; give its exit status, minus a signal's number."""
        status = self.process.wait(START_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status


class Watched:
    """A seam whose effects can be held up, and at the n-th of which the helper is killed."""

    def __init__(self, seam: object, kernel: Path, deadly: Deadly):
        self._seam = seam
        self._hold = kernel / "hold"
        self._held_up = kernel / "held-up"
        self._deadly = deadly

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._seam, name)
        if not callable(found):
            return found

        def call(*words: Any, **named: Any) -> Any:
            while self._hold.exists():
                self._held_up.touch()
                time.sleep(HOLD_LOOK_S)
            self._deadly.at_boundary()
            result = found(*words, **named)
            self._deadly.at_boundary()
            return result

        return call


class Deadly:
    """Counts boundaries, before and after each call of a seam, and kills this process at one of them."""

    def __init__(self, at: int):
        self._left = at

    def at_boundary(self) -> None:
        """Count one more; at the last, this process is killed."""
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Serve over recorded kernels in a directory made by RootPool."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--owner", action="append", type=int, default=[])
    parser.add_argument("--die-at", type=int, default=0)
    options = parser.parse_args()
    notify = serve.settle()
    kernel, deadly = options.directory / "kernel", Deadly(options.die_at)
    host = recording_host(kernel)
    watched: dict[str, Any] = {name: Watched(getattr(host, name), kernel, deadly) for name in SEAMS}
    state, runtime = str(options.directory / "state"), str(options.directory / "run")
    place = serve.Place(state=state, runtime=runtime, owners=options.owner)
    serve.serve(place, table.verbs, Host(**watched), notify)


if __name__ == "__main__":
    main()
