"""The work-seed: what an image has in /root, taken when the image is made, for the work disks of its VMs.

It is an archive beside the base file, of what is below `root/`. Where the image has no such directory, or
a link to another, there is nothing below. It is read out of the base file. One that somebody else made is
read by a process that has no right to anything else, then checked and written anew as a layer is: the same
limits, the same refusals.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from banger import proc
from banger.errors import Cancelled, InvalidImage, ProgramFailed, TimedOut, from_dict
from banger.images.layers import flatten
from banger.images.magic import RootFormat
from banger.images.remote.oci import Layer
from banger.images.seed_child import NOTHING, SQFS2TAR, Answer, Job
from banger.model import Artifact

FILE = "seed.tar"
DIRECTORY = b"root"
"""What it has is below this."""

_CHILD = "banger.images.seed_child"
_NO_SUCH = "no such file or directory."
"""What sqfs2tar says of a directory that is not there: its status is that of every error."""


class Take(Protocol):
    """How a seed is taken: `take`, or what a recording host has for it."""

    def __call__(
        self,
        base: Path,
        form: RootFormat,
        target: Path,
        *,
        limits: flatten.Limits | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make `target` from what a base file has in /root."""


def take(
    base: Path,
    form: RootFormat,
    target: Path,
    *,
    limits: flatten.Limits | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Write what a base file has below /root to the tar archive `target`, whole or not at all.

    Raises InvalidImage with the reason, HostLacks, DiskFull or Cancelled.
    """
    if cancelled():
        raise Cancelled
    _take(base, form, target, limits or flatten.Limits(), cancelled)


def take_all(
    base: Path,
    target: Path,
    *,
    limits: flatten.Limits | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Do what `take` does with all that is in a squashfs."""
    _take(base, "squashfs", target, limits or flatten.Limits(), cancelled, whole=True)


def _take(
    base: Path,
    form: RootFormat,
    target: Path,
    limits: flatten.Limits,
    cancelled: Callable[[], bool],
    *,
    whole: bool = False,
) -> None:
    with tempfile.TemporaryDirectory(prefix=".seed-", dir=target.parent) as beside:
        raw = Path(beside, FILE)
        job = Job(base=str(base.resolve()), form=form, out=str(raw), limits=limits, whole=whole)
        _read(job, raw, cancelled)
        try:
            flatten.flatten([_as_layer(raw)], target, limits=limits, cancelled=cancelled)
        except InvalidImage as error:
            reason = error.message.removeprefix("Layer 1 of the image is refused: ")
            what = "What the image has" if whole else "What the image has in /root"
            raise InvalidImage(f"{what} is refused: {reason}", hint=error.hint) from None


def take_of_ours(base: Path, target: Path, *, cancelled: Callable[[], bool] = lambda: False) -> None:
    """Do what `take` does with a squashfs that we have made ourselves, from an archive that was checked."""
    script = ["sh", "-c", 'exec "$@" > "$0"']
    with tempfile.TemporaryDirectory(prefix=".seed-", dir=target.parent) as beside:
        raw = Path(beside, FILE)
        words = [proc.which("sqfs2tar", "squashfs-tools-ng"), *SQFS2TAR, str(base)]
        _run([*script, str(raw), *words], raw, flatten.Limits().timeout_s, cancelled)
        raw.replace(target)


def path_of(image: Artifact) -> Path | None:
    """Give an image's seed; None when it was made by a banger that took none."""
    seed = image.path / FILE
    return seed if seed.exists() else None


def _read(job: Job, raw: Path, cancelled: Callable[[], bool]) -> None:
    """Have a child of little rights read the base file."""
    if job.form == "squashfs":
        proc.which("sqfs2tar", "squashfs-tools-ng")
    words = [sys.executable, "-I", "-m", _CHILD]
    said = _run(words, raw, job.limits.timeout_s, cancelled, msgspec.json.encode(job))
    if said and (answer := msgspec.json.decode(said, type=Answer)).error is not None:
        raise from_dict(answer.error)


def _run(
    words: list[str], raw: Path, timeout_s: float, cancelled: Callable[[], bool], stdin: bytes = b""
) -> str:
    """Have a program write `raw`; give what it says. Raises InvalidImage when that cannot be done."""
    mark = str(raw.parent.parent)
    try:
        return proc.run(words, stdin=stdin, timeout_s=timeout_s, cancelled=cancelled, umask=0o077, mark=mark)
    except TimedOut:
        raise InvalidImage(f"The image's /root could not be read within {timeout_s:g} s.") from None
    except ProgramFailed as error:
        if not error.message.endswith(_NO_SUCH):
            raise InvalidImage(f"The image's /root cannot be read: {error.message[-200:]!a}.") from None
        raw.write_bytes(NOTHING)
        return ""


def _as_layer(raw: Path) -> Layer:
    with raw.open("rb") as file:
        digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    return Layer(media_type="tar", digest=digest, size=raw.stat().st_size, diff_id=digest, path=raw)
