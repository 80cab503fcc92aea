"""The default image: a Debian root file system from the distribution's own packages."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from banger.images import base, packages, seed, store
from banger.model import Artifact, Value

VERSION = 3
"""Counts changes of how images are built; part of the digest."""


class Recipe(Value):
    """A Debian release and what is installed beside its essential packages."""

    name: str
    suite: str
    include: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Name what this recipe makes: sha256 over the recipe and how it is built."""
        return hashlib.sha256(msgspec.json.encode((VERSION, self))).hexdigest()


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="debian-12",
            suite="bookworm",
            include=(
                "ca-certificates",
                "curl",
                "git",
                "iproute2",
                "less",
                "make",
                "openssh-sftp-server",
                "procps",
                "python3",
                "rsync",
                "vim-tiny",
            ),
        ),
    )
}


def build(
    recipe: Recipe,
    cache: Path,
    *,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Make it so that the recipe's image is in the cache.

    Raises HostLacks, ProgramFailed, DiskFull or Cancelled, and leaves nothing behind then.
    """

    def make(staging: Path) -> dict[str, str | int | list[str]]:
        archive = staging / "root.tar"
        progress(f"installing {len(recipe.include)} packages and the base system")
        packages.bootstrap(
            archive, suite=recipe.suite, variant="minbase", include=recipe.include, cancelled=cancelled
        )
        progress("writing the file system")
        installed = _installed(archive)
        made = base.make(archive, staging / base.FILE, label=recipe.name, cancelled=cancelled)
        archive.unlink()
        seed.take_of_ours(staging / base.FILE, staging / seed.FILE, cancelled=cancelled)
        listing = "\n".join(installed).encode()
        sha256 = hashlib.sha256(listing).hexdigest()
        return {"format": made.format, "packages": installed, "packages_sha256": sha256}

    return store.build(cache, "image", recipe.name, recipe.digest, make, cancelled)


def _installed(archive: Path) -> list[str]:
    """List the packages in a root file system as `name=version` (dpkg's status file, deb822)."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile("./var/lib/dpkg/status")
        assert member is not None
        status = member.read().decode("utf-8")
    found = []
    for stanza in status.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
        if "Package" in fields and "Version" in fields:
            found.append(f"{fields['Package']}={fields['Version']}")
    return sorted(found)
