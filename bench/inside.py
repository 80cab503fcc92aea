"""What it costs to run a command in a guest and to copy files, beside the ssh and scp programs."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from banger.testing.home import Home
from bench.figures import Figures, median

ROUNDS = 25
PAUSE_S = 0.5
"""As when a person or a script does something with the answer. In that time the next shell is started."""

COPIES = 3
COPY_MIB = 100


def measure(figures: Figures) -> None:
    """Time `vm exec` against ssh with a ControlMaster up, and `vm cp` against scp."""
    with Home() as home:
        home.configure("memory_mib = 512\n")
        done = home.banger("vm", "create", "web", "--wait")
        assert done.returncode == 0, done.stderr
        ssh = home.json("vm", "ssh", "web")["argv"]
        with _master(ssh, home.path / "control") as mastered:
            _commands(figures, home, mastered, pause_s=PAUSE_S, name="vm exec", target=1.0)
            _commands(figures, home, mastered, pause_s=0.0, name="vm exec, back to back", target=None)
        _copies(figures, home, ssh)


@contextlib.contextmanager
def _master(ssh: list[str], control: Path) -> Iterator[list[str]]:
    """Hold a connection up, and give the words of an ssh that uses it."""
    program, *rest = ssh
    path = ["-o", f"ControlPath={control}"]
    with subprocess.Popen([program, "-M", "-N", *path, *rest], stdin=subprocess.DEVNULL) as master:
        while not control.exists():
            assert master.poll() is None
            time.sleep(0.05)
        yield [program, *path, *rest]
        master.terminate()


def _commands(
    figures: Figures, home: Home, ssh: list[str], *, pause_s: float, name: str, target: float | None
) -> None:
    """Time each alone, not in turns: what one leaves running in the guest is its own affair."""
    times = {}
    for who, words in (("ssh", [*ssh, "true"]), ("banger", home.argv("vm", "exec", "web", "--", "true"))):
        _wall(words, home)
        times[who] = median([_wall(words, home, pause_s) for _ in range(ROUNDS)])
    figures.add(name, times["banger"] * 1e3, "ms")
    figures.add(f"{name} / ssh, ControlMaster", times["banger"] / times["ssh"], "times", target)


def _copies(figures: Figures, home: Home, ssh: list[str]) -> None:
    """Copy as large a file both ways, in turns; scp by its old protocol: dropbear has no SFTP."""
    source, back = home.path / "source", home.path / "back"
    source.write_bytes(os.urandom(COPY_MIB << 20))
    _, *options, there = ssh
    options[options.index("-p")] = "-P"
    scp = ["scp", "-q", "-O", *options]
    ways = {
        "up": ([*scp, str(source), f"{there}:/root/by-scp"], ("vm", "cp", str(source), "web:by-banger")),
        "down": ([*scp, f"{there}:/root/by-scp", str(back)], ("vm", "cp", "web:by-banger", str(back))),
    }
    for way, (theirs, ours) in ways.items():
        taken: dict[str, list[float]] = {"scp": [], "banger": []}
        for _ in range(COPIES):
            taken["scp"].append(_wall(theirs, home))
            taken["banger"].append(_wall(home.argv(*ours), home))
        figures.add(f"vm cp {way}, {COPY_MIB} MiB", median(taken["banger"]), "s")
        ratio = median(taken["banger"]) / median(taken["scp"])
        figures.add(f"vm cp {way} / scp -O", ratio, "times", 1.0)


def _wall(words: list[str], home: Home, pause_s: float = 0.0) -> float:
    time.sleep(pause_s)
    began = time.perf_counter()
    subprocess.run(words, env=home.environ, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began
