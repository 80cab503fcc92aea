"""Flatten the layers of an image into one archive, without ever extracting them.

Nothing of an image gets a name on this host: its layers are read, checked and merged in memory by a
process that has no right to open a file, and what comes out is an archive of our own writing.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from banger import proc
from banger.errors import InvalidImage, ProgramFailed, TimedOut, from_dict
from banger.images.layers.flatten_child import Answer, Job
from banger.images.layers.flatten_child import Limits as Limits
from banger.images.remote.oci import Layer
from banger.model import Value

_WORK = ".flatten-"
_CHILD = "banger.images.layers.flatten_child"


class Flattened(Value):
    """What was written: its entries, its size in bytes, and what was left out, as sentences."""

    entries: int
    size: int
    warnings: tuple[str, ...]


def flatten(
    layers: Sequence[Layer],
    out: Path,
    *,
    limits: Limits | None = None,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Flattened:
    """Merge layers, oldest first, into the tar archive `out` (POSIX pax; a file that is there is replaced).

    Raises InvalidImage with the reason, DiskFull, TimedOut or Cancelled, and leaves nothing behind then.
    """
    limits = limits or Limits()
    progress(f"merging {len(layers)} layers")
    with _work_directory(out.parent) as work:
        merged = work / "root.tar"
        answer = _run_child(layers, merged, limits, cancelled)
        merged.replace(out)
    progress(f"merged {answer.entries} entries, {answer.size >> 20} MiB")
    return Flattened(
        entries=answer.entries,
        size=answer.size,
        warnings=tuple(
            f"The attribute {name} of {count} files was dropped." for name, count in answer.warnings.items()
        ),
    )


def _run_child(layers: Sequence[Layer], out: Path, limits: Limits, cancelled: Callable[[], bool]) -> Answer:
    """Let the child do it, and raise what it answers with."""
    job = Job(layers=[(str(layer.path), layer.diff_id) for layer in layers], out=str(out), limits=limits)
    try:
        text = proc.run(
            [sys.executable, "-I", "-m", _CHILD],
            stdin=msgspec.json.encode(job),
            timeout_s=limits.timeout_s,
            cancelled=cancelled,
            umask=0o077,
            mark=str(out.parent),
        )
    except TimedOut:
        raise InvalidImage(f"The image could not be read within {limits.timeout_s:g} s.") from None
    except ProgramFailed as error:
        if error.status is not None and error.status < 0:
            raise InvalidImage(f"Reading the image was ended by signal {-error.status}.") from None
        raise
    answer = msgspec.json.decode(text, type=Answer)
    if answer.error is not None:
        raise from_dict(answer.error)
    return answer


@contextlib.contextmanager
def _work_directory(parent: Path) -> Iterator[Path]:
    """Make a private directory for the time of one merge; remove those of dead ones.

    Its lock tells whether its owner lives: the kernel frees it with the process.
    """
    _sweep(parent)
    work = Path(tempfile.mkdtemp(prefix=_WORK, dir=parent))
    try:
        with _locked(work):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(parent: Path) -> None:
    for left in parent.glob(f"{_WORK}*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), _locked(left):
            proc.end_marked(str(left))
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory. Raises BlockingIOError when another process does."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)
