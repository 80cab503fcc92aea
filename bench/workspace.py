"""A repository's way into a guest: `vm workspace prepare` against `rsync -a` over the same SSH."""

from __future__ import annotations

import random
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from banger.testing.home import Home
from bench.figures import Figures, median

FILES = 5_000
SIZE_MIB = 200
PAIRS = 2
WORDS = b"the of and a to in is you that it he was for on are as with his they I at be this have".split()


def measure(figures: Figures) -> None:
    """Bring the same repository both ways, in turns, into the same guest, anew each time."""
    if shutil.which("rsync") is None:
        figures.skip("workspace prepare / rsync -a", "rsync is not installed")
        return
    with Home() as home, tempfile.TemporaryDirectory() as directory:
        home.configure("memory_mib = 1024\n")
        repository = Path(directory, "repository")
        make(repository)
        assert home.banger("vm", "create", "bench", "--wait").returncode == 0
        prepared, synced, files = [], [], []
        for _ in range(PAIRS):  # in turns, so that a busy moment hits all
            prepared.append(_prepare(home, repository))
            synced.append(_rsync(home, repository))
            files.append(_rsync(home, repository, "--exclude=/.git"))
        figures.add("workspace prepare, 5,000 files of 200 MiB", median(prepared), "s")
        figures.add("rsync -a of the same checkout, over the same SSH", median(synced), "s")
        figures.add("rsync -a of its files, without the .git", median(files), "s")
        figures.add("workspace export of it, one file edited", _export(home), "s")
        figures.add(
            "workspace prepare / rsync -a of the checkout", median(prepared) / median(synced), "times", 1.0
        )
        figures.add("workspace prepare / rsync -a of its files", median(prepared) / median(files), "times")


def make(repository: Path, files: int = FILES, size_mib: int = SIZE_MIB) -> None:
    """Make a repository with one commit, half text and half noise by size."""
    noise = random.Random(5)
    each = (size_mib << 20) // files
    for number in range(files):
        path = repository / f"d{number % 50}" / f"file-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = b" ".join(noise.choices(WORDS, k=each // 4))[:each]
        path.write_bytes(text if number % 2 else noise.randbytes(each))
    git = ["git", "-C", str(repository), "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)


def _prepare(home: Home, repository: Path) -> float:
    _inside(home, "rm -rf /root/repository /root/.banger; sync")
    began = time.perf_counter()
    done = home.banger("vm", "workspace", "prepare", "bench", str(repository), timeout_s=1800)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - began


def _export(home: Home) -> float:
    _prepare(home, Path(home.json("vm", "show", "bench")["vm"]["workspace"]["repository"]))
    _inside(home, "echo more >> /root/repository/d1/file-1")
    began = time.perf_counter()
    done = home.banger("vm", "workspace", "export", "bench", timeout_s=600, errors="replace")
    assert done.returncode == 0, done.stderr
    assert "d1/file-1" in done.stdout
    return time.perf_counter() - began


def _rsync(home: Home, repository: Path, *only: str) -> float:
    _inside(home, "rm -rf /root/repository /root/.banger; sync")
    program, *options = _ssh(home)
    began = time.perf_counter()
    subprocess.run(
        ["rsync", "-a", *only, "-e", " ".join([program, *options[:-1]]), f"{repository}/",
         f"{options[-1]}:/root/repository/"],
        check=True,
    )  # fmt: skip
    _inside(home, "sync")
    return time.perf_counter() - began


def _ssh(home: Home) -> list[str]:
    argv: list[str] = home.json("vm", "ssh", "bench")["argv"]
    return argv


def _inside(home: Home, script: str) -> None:
    subprocess.run([*_ssh(home), script], check=True, stdin=subprocess.DEVNULL)
