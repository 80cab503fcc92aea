"""An image from a registry on loopback to what a VM boots from, beside skopeo, umoci and mkfs.ext4."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from banger.images import debian, packages
from banger.testing.home import Home
from banger.testing.registry import Registry
from bench.figures import Figures, median

ROUNDS = 3
MARGIN = 1.5
"""How much larger than its content a file system is made, as ours is."""

# Pulls in a process of its own, so that the kernel can tell the most memory that any of them had.
_ONCE = """
import resource, sys, tempfile
from pathlib import Path
from banger.config import Limits
from banger.images import pulled

quiet = {"limits": Limits(), "progress": lambda _: None, "cancelled": lambda: False}
with tempfile.TemporaryDirectory(dir=sys.argv[2]) as place:
    blobs = Path(place, "blobs")
    found = pulled.fetch(sys.argv[1], blobs, **quiet)
    pulled.make(found, Path(place), "bench", blobs=blobs, **quiet)
# Our own maxrss would be that of whoever forked us, before the exec (getrusage(2)); VmHWM is not.
own = next(line.split()[1] for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
print(max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


def measure(figures: Figures) -> None:
    """Pull a Debian root file system of one layer: ours and theirs in turns, then ours once more."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as directory:
        place = Path(directory)
        with Registry(place / "registry") as registry:
            size = _push(registry, place)
            reference = f"{registry.host}/debian:12"
            ours, again, theirs = [], [], []
            for _ in range(ROUNDS):
                first, second = _ours(reference, place)
                ours.append(first)
                again.append(second)
                theirs.append(_theirs(reference, place, size))
            peak_mib = _peak_kib(reference, place) / 1024
    note = f"{size >> 20} MiB of files"
    figures.add("pull to bootable", median(ours), "s", note=note)
    figures.add("skopeo + umoci + mkfs.ext4 -d", median(theirs), "s", note=note)
    figures.add("pull to bootable / theirs", median(ours) / median(theirs), "", 0.6)
    figures.add("second pull / first", median(again) / median(ours), "", 0.05)
    figures.add("pull, peak memory of a process", peak_mib, "MiB", 150.0)


def _push(registry: Registry, place: Path) -> int:
    """Push what the default image has, compressed as images are; give the size of its archive in bytes."""
    archive = place / "root.tar"
    recipe = debian.RECIPES["debian-12"]
    packages.bootstrap(
        archive, suite=recipe.suite, variant="minbase", include=recipe.include, cancelled=lambda: False
    )
    tar = archive.read_bytes()
    registry.image("debian", "12", tar, compress=True)
    archive.unlink()
    return len(tar)


def _ours(reference: str, place: Path) -> tuple[float, float]:
    """Pull through the real daemon into an empty cache, then again; give both times in seconds."""
    cache = place / "cache"
    with Home(cache=cache) as home:
        assert home.banger("daemon", "start").returncode == 0
        times = []
        for _ in range(2):
            began = time.perf_counter()
            done = home.banger("image", "pull", reference, "--name", "bench")
            times.append(time.perf_counter() - began)
            assert done.returncode == 0, done.stderr
    shutil.rmtree(cache)
    return times[0], times[1]


def _theirs(reference: str, place: Path, size: int) -> float:
    layout, bundle, disk = place / "layout", place / "bundle", place / "disk.ext4"
    mib = int(size * MARGIN) >> 20
    commands = (
        ["skopeo", "copy", "--quiet", "--src-tls-verify=false", f"docker://{reference}", f"oci:{layout}:12"],
        ["umoci", "unpack", "--image", f"{layout}:12", str(bundle)],
        ["mkfs.ext4", "-q", "-F", "-d", str(bundle / "rootfs"), str(disk), f"{mib}M"],
    )
    began = time.perf_counter()
    for words in commands:
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
    spent = time.perf_counter() - began
    for tree in (layout, bundle):
        shutil.rmtree(tree)
    disk.unlink()
    return spent


def _peak_kib(reference: str, place: Path) -> int:
    words = [sys.executable, "-c", _ONCE, reference, str(place)]
    return int(subprocess.run(words, check=True, capture_output=True, text=True, timeout=300).stdout)
