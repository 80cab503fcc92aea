"""The process that reads untrusted layers: `python -I -m banger.images.layers.flatten_child`.

Its job is on its standard input.

It opens what it needs, gives up every right to open more, and only then looks at the first byte. It answers
with one line of JSON: what it made, or the error that the parent is to raise.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import msgspec

from banger import config
from banger.errors import BangerError, InvalidImage, from_os_error
from banger.images.layers import inflate, sandbox
from banger.images.layers.tape import Tape
from banger.images.layers.tarstream import entries
from banger.images.layers.tarwriter import Writer
from banger.images.layers.tree import Tree
from banger.model import Value

MEMORY_BYTES = 1 << 30


class Limits(Value):
    """What an image may come to. Sizes are in bytes, unpacked, all layers together.

    `ratio` is how many times its own size a layer may unpack to once it gives more than `ratio_from`
    bytes; `text` bounds names, link targets and attributes; `extra` the extended headers of one entry.
    """

    entries: int = 1_000_000
    size: int = 32 << 30
    ratio: int = 250
    ratio_from: int = 128 << 20
    text: int = 32 << 20
    extra: int = 1 << 20
    timeout_s: float = 600.0

    @classmethod
    def of(cls, settings: config.Limits) -> Limits:
        """Give those that the user has set."""
        return cls(
            entries=settings.entries,
            size=settings.content_mib << 20,
            ratio=settings.ratio,
            ratio_from=settings.ratio_from_mib << 20,
            text=settings.names_mib << 20,
            extra=settings.headers_kib << 10,
            timeout_s=settings.reading_s,
        )


class Job(Value):
    """What the child is to do: blobs with their DiffIDs, oldest first, and the new file to write."""

    layers: list[tuple[str, str]]
    out: str
    limits: Limits


class Answer(Value):
    """What came of it: `warnings` counts the attributes that were dropped, by name; or an error."""

    entries: int = 0
    size: int = 0
    warnings: dict[str, int] = msgspec.field(default_factory=dict)
    error: dict[str, str | None] | None = None


class _Merge:
    """One merge: descriptors are opened first, then read."""

    def __init__(self, job: Job):
        self.limits = job.limits
        self.diff_ids = [diff_id for _, diff_id in job.layers]
        self.blobs = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path, _ in job.layers]
        self.spools = [
            _unnamed(Path(job.out).parent) if inflate.is_packed(blob) else None for blob in self.blobs
        ]
        self.out = os.open(job.out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.tree = Tree(self.limits.entries, self.limits.text)
        self.room = self.limits.size

    def run(self, ahead: Executor) -> Answer:
        for number in range(len(self.blobs)):
            try:
                self._read(number, ahead)
            except InvalidImage as error:
                message = f"Layer {number + 1} of the image is refused: {error.message}"
                raise InvalidImage(message, hint=error.hint) from None
        return self._write()

    def _read(self, number: int, ahead: Executor) -> None:
        """Read one layer into the tree, and check that it is the one the image names."""
        limits = self.limits
        bounds = inflate.Bounds(self.room, limits.ratio, limits.ratio_from)
        tape = Tape(inflate.chunks(self.blobs[number], bounds), ahead, self.spools[number])
        self.tree.begin_layer()
        for entry in entries(tape, limits.extra):
            self.tree.add(entry)
        self.tree.end_layer()
        if (found := tape.finish()) != self.diff_ids[number]:
            raise InvalidImage(f"Its content is {found}, not {self.diff_ids[number]} as the image says.")
        self.room -= bounds.given

    def _write(self) -> Answer:
        data = {
            number: spool if spool is not None else blob
            for number, (spool, blob) in enumerate(zip(self.spools, self.blobs, strict=True), 1)
        }
        writer, count = Writer(self.out, data, self.limits.size), 0
        for member in self.tree.members():
            writer.add(member)
            count += 1
        writer.finish()
        return Answer(entries=count, size=writer.written, warnings=self.tree.warnings)


def _unnamed(directory: Path) -> int:
    """Open a file without a name: it is gone with this process, whatever becomes of it."""
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        return os.dup(file.fileno())


def main() -> None:
    """Do the job on standard input; answer on standard output."""
    gc.disable()  # nothing here refers in circles, and a million entries are a lot to search for it
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    try:
        answer = _confined(job)
    except BangerError as error:
        answer = Answer(error=error.to_dict())
    except MemoryError:
        answer = Answer(error=InvalidImage("To read the image takes too much memory.").to_dict())
    except OSError as error:
        answer = Answer(error=from_os_error(error).to_dict())
    except Exception as error:  # a defect of ours that an image found: to its user, a refusal
        name = type(error).__name__
        answer = Answer(error=InvalidImage(f"The image cannot be read ({name}).").to_dict())
    sys.stdout.buffer.write(msgspec.json.encode(answer))


def _confined(job: Job) -> Answer:
    """Merge with nothing but the open descriptors, one more thread, and bounded resources."""
    merge = _Merge(job)
    sandbox.confine(read=[sys.prefix, sys.base_prefix])
    with ThreadPoolExecutor(1) as ahead:
        ahead.submit(int).result()  # begin the thread: under the limits there is no other
        sandbox.limit(
            file_bytes=job.limits.size, memory_bytes=MEMORY_BYTES, cpu_s=int(job.limits.timeout_s) + 1
        )
        return merge.run(ahead)


if __name__ == "__main__":
    main()
