"""`banger vm cp`: files and directories into a VM, or out of one, as streams of a command in the guest."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import click

from banger import layout
from banger.errors import BangerError, InvalidRequest, NotFound, from_os_error
from banger.guest import unpack
from banger.guest.words import BUSYBOX
from banger_cli import session, wire
from banger_cli.commands import Leaf
from banger_cli.escape import escape
from banger_cli.inside import carried
from banger_cli.output import Out

RESUMED_FROM = 16 << 20
"""Bytes: a smaller file is sent again as fast as one finds out how much of it is there."""

TAIL = 1 << 20
"""Bytes before the cut that must be the same on both sides."""

_NOT_THERE = 3
_MOST_SAID = 64 << 10
_CHUNK = 1 << 20
_SHOWN_EVERY_S = 0.2
_PLACE = "/root"


class CutShort(BangerError):
    """The copy was cut off half-way; nothing stands at its destination."""

    code = "cut"
    default_hint = "The same command goes on where a large file was cut."


class Remote(NamedTuple):
    """A path in a VM."""

    vm: str
    path: str


class Progress:
    """Counts bytes, and shows them on a terminal."""

    def __init__(self, out: Out, total: int | None = None, done: int = 0):
        self.done = done
        self._total = total
        self.shows = sys.stderr.isatty() and not out.as_json
        self._began = self._last = time.monotonic()

    def add(self, count: int) -> None:
        """Count some more."""
        self.done += count
        now = time.monotonic()
        if self.shows and now - self._last > _SHOWN_EVERY_S:
            self._last = now
            of = "" if self._total is None else f" of {layout.size(self._total)}"
            print(f"\r\x1b[K{layout.size(self.done)}{of}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Take the line away."""
        if self.shows:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@click.command("cp", cls=Leaf, epilog="""\
Examples:
  banger vm cp notes.txt web:              into /root
  banger vm cp ./site web:/srv/            a directory; it becomes /srv/site
  banger vm cp web:/var/log/syslog .
  banger vm cp - web:/root/in < data       standard input; `web:FILE -` is standard output""")  # fmt: skip
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("-r", "recursive", is_flag=True, hidden=True, help="Always so; for the fingers.")
@click.option("--no-resume", is_flag=True, help="Begin anew, also when a large file was cut half-way before.")
@click.pass_obj
def cp(out: Out, source: str, target: str, recursive: bool, no_resume: bool) -> None:  # noqa: ARG001
    """Copy files and directories into a VM or out of it; one side is NAME:PATH.

    Modes, times and links are kept. Nothing stands at the destination before it is whole. A large
    file that was cut half-way goes on where it was.
    """
    there, here = _remote(source), _remote(target)
    if there and here:
        raise InvalidRequest(
            "Both sides are in VMs.",
            hint=f"`banger vm cp {source} - | banger vm cp - {target}` copies a file.",
        )
    try:
        if here is not None:
            done = _Up(out, here, resume=not no_resume).send(source)
        elif there is not None:
            done = _Down(out, there, resume=not no_resume).fetch(target)
        else:
            raise InvalidRequest("Neither side is in a VM.", hint="One side is NAME:PATH, as in web:/root/.")
    except FileNotFoundError as error:
        raise NotFound(f"There is no {error.filename} here.") from error
    except OSError as error:
        raise from_os_error(error) from error
    if target == "-":
        return
    out.show({"bytes": done, "source": os.fsencode(source).decode("utf-8", "replace"), "target": target}, [])


def _remote(word: str) -> Remote | None:
    """Read NAME:PATH; a path with a slash before its first colon is here."""
    vm, colon, path = word.partition(":")
    return Remote(vm, path or ".") if colon and vm and "/" not in vm else None


class _Guest:
    """The guest's side: runs its script, with streams of ours."""

    def __init__(self, vm: str):
        self._vm = vm
        self._script = resources.files("banger.guest").joinpath("assets", "copy").read_text()

    def run(
        self, *words: str, stdin: int | None = None, stdout: session.Sink | None = None, raises: bool = True
    ) -> tuple[int, bytes, str]:
        """Give the exit code, the output (unless `stdout` takes it) and what went wrong in the guest."""
        said, errors = bytearray(), bytearray()
        argv = [BUSYBOX, "sh", "-c", self._script, "copy", *words]
        with wire.connect() as daemon:
            daemon.request("vm.exec", vm=self._vm, directory=_PLACE, tty=False, **carried(argv))
            code = session.Session(
                daemon, stdin=stdin, stdout=stdout or _little(said), stderr=_little(errors)
            ).run()
        told = escape(errors.decode("utf-8", "replace").strip().removeprefix("copy: "))
        if code and raises:
            raise _refused(code, told)
        return code, bytes(said), told


def _little(to: bytearray) -> session.Sink:
    return lambda data: to.extend(data[: _MOST_SAID - len(to)])


def _refused(code: int, told: str) -> BangerError:
    if code == _NOT_THERE:
        return NotFound(told or "There is no such file in the guest.")
    if code > 128:
        return CutShort()
    return BangerError(f"The guest could not: {told or f'exit {code}'}.")


class _Up:
    """From here into a guest."""

    def __init__(self, out: Out, to: Remote, *, resume: bool):
        self._out = out
        self._guest = _Guest(to.vm)
        self._to = to.path
        self._resume = resume

    def send(self, source: str) -> int:
        """Send a file, a directory, or standard input; give the bytes sent."""
        if source == "-":
            return self._stream()
        path = Path(source)
        found = path.stat()
        name = path.resolve().name if path.name in ("", "..") else path.name
        if stat.S_ISDIR(found.st_mode):
            return self._tree(path, name)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidRequest(f"{source} is neither a file nor a directory.")
        with path.open("rb") as file:
            return self._file(file.fileno(), name, os.fstat(file.fileno()))

    def _stream(self) -> int:
        """Send what has no size and no name before its end."""
        place = (self._to, "stdin", secrets.token_hex(8))
        counted = Progress(self._out)
        try:
            with _counted(0, counted) as fd:
                self._guest.run("take", *place, "0", "drop", stdin=fd)
            now = str(int(time.time()))
            self._guest.run("finish", *place, str(counted.done), "644", now)
        except BaseException:
            self._drop(place)
            raise
        return counted.done

    def _file(self, fd: int, name: str, found: os.stat_result) -> int:
        resume = self._resume and found.st_size >= RESUMED_FROM
        identity = f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns} {name}"
        key = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16] if resume else secrets.token_hex(8)
        place = (self._to, name, key)
        offset = self._had(fd, place) if resume else 0
        counted = Progress(self._out, found.st_size, offset)
        os.lseek(fd, offset, os.SEEK_SET)
        try:
            with _counted(fd, counted) if counted.shows else contextlib.nullcontext(fd) as carrying:
                kept = "keep" if resume else "drop"
                self._guest.run("take", *place, str(offset), kept, stdin=carrying)
            mode = f"{stat.S_IMODE(found.st_mode):o}"
            if (after := os.fstat(fd)).st_size != found.st_size or after.st_mtime_ns != found.st_mtime_ns:
                raise BangerError("The file has changed while it was copied.", hint="Copy it again.")
            self._guest.run("finish", *place, str(found.st_size), mode, str(int(found.st_mtime)))
        except BaseException as error:
            if not resume or not isinstance(error, (CutShort, wire.ConnectionLost, KeyboardInterrupt)):
                self._drop(place)
            raise
        return found.st_size

    def _had(self, fd: int, place: tuple[str, str, str]) -> int:
        """Tell from where on a file is wanted: what is there must end as ours does there."""
        _, said, _ = self._guest.run("had", *place, str(TAIL))
        size, _, known = said.decode("ascii", "replace").strip().partition(" ")
        if not size.isdigit() or int(size) > os.fstat(fd).st_size:
            return 0
        return int(size) if _hash(fd, int(size)) == known else 0

    def _drop(self, place: tuple[str, str, str]) -> None:
        with contextlib.suppress(BangerError, OSError):
            self._guest.run("drop", *place, raises=False)

    def _tree(self, path: Path, name: str) -> int:
        counted = Progress(self._out)
        with _piped(lambda fd: _pack(path, fd, counted, self._out)) as fd:
            self._guest.run("take-tree", self._to, name, secrets.token_hex(8), stdin=fd)
        return counted.done


class _Down:
    """From a guest to here. What it says of itself is not believed: see `banger.guest.unpack`."""

    def __init__(self, out: Out, source: Remote, *, resume: bool):
        self._out = out
        self._guest = _Guest(source.vm)
        self._path = source.path
        self._resume = resume

    def fetch(self, target: str) -> int:
        """Fetch a file or a directory; give the bytes that came."""
        code, said, told = self._guest.run("about", self._path, raises=False)
        if code == _NOT_THERE:
            raise NotFound(f"There is no {escape(self._path)} in the guest.")
        if code:
            raise _refused(code, told)
        kind, size, mtime, mode = _about(said)
        if target == "-":
            return self._to_stdout(kind)
        to = Path(target)
        if to.is_dir():
            to /= _last_name(self._path)
        elif target.endswith("/"):
            raise NotFound(f"{target} is no directory.")
        if kind == "directory":
            return self._tree(to)
        if to.is_dir():
            raise InvalidRequest(f"{to} is a directory.")
        return self._file(to, size, mtime, mode)

    def _to_stdout(self, kind: str) -> int:
        if kind == "directory":
            raise InvalidRequest("A directory cannot go to standard output.")
        counted, write = Progress(self._out), session.write_to(1)

        def take(data: bytes) -> None:
            write(data)
            counted.add(len(data))

        self._guest.run("give", self._path, "0", stdout=take)
        counted.end()
        return counted.done

    def _file(self, to: Path, size: int, mtime: int, mode: int) -> int:
        resume = self._resume and size >= RESUMED_FROM
        identity = f"{self._guest._vm} {self._path} {size} {mtime}"
        key = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16] if resume else secrets.token_hex(8)
        part = to.parent / f".banger-{key}"
        if not resume:
            part.unlink(missing_ok=True)
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            counted = Progress(self._out, size, self._have(fd, size))
            os.ftruncate(fd, counted.done)
            os.lseek(fd, counted.done, os.SEEK_SET)
            write = session.write_to(fd)

            def take(data: bytes) -> None:
                if counted.done + len(data) > size:
                    raise BangerError("The file has changed while it was copied.", hint="Copy it again.")
                write(data)
                counted.add(len(data))

            self._guest.run("give", self._path, str(counted.done), stdout=take)
            counted.end()
            if counted.done != size:
                raise CutShort
            os.fchmod(fd, mode & 0o777)
            os.utime(fd, (mtime, mtime))
            part.replace(to)
        except BaseException as error:
            if not resume or not isinstance(error, (CutShort, wire.ConnectionLost, KeyboardInterrupt)):
                part.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return size

    def _have(self, fd: int, size: int) -> int:
        have = os.fstat(fd).st_size
        if not 0 < have <= size:
            return 0
        first = max(0, have - TAIL)
        _, said, _ = self._guest.run("hash", self._path, str(first), str(have - first))
        return have if said.decode("ascii", "replace").strip() == _hash(fd, have) else 0

    def _tree(self, to: Path) -> int:
        if to.exists() and not to.is_dir():
            raise InvalidRequest(f"{to} is there and is no directory.")
        part = to.parent / f".banger-{secrets.token_hex(8)}"
        part.mkdir(mode=0o700)
        counted = Progress(self._out)
        try:
            with _read_by(lambda fd: self._unpack(fd, part, counted)) as sink:
                self._guest.run("give-tree", self._path, stdout=sink)
            counted.end()
            _merge(part, to)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return counted.done

    def _unpack(self, fd: int, part: Path, counted: Progress) -> None:
        root = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in unpack.unpack(unpack.Pipe(fd, counted.add), root):
                self._out.note(f"banger: left out, no file, directory or link: {name}")
            while os.read(fd, _CHUNK):
                pass  # tar fills its last record with zeros
        finally:
            os.close(root)


def _about(said: bytes) -> tuple[str, int, int, int]:
    """Read what the guest says of a path. Raises InvalidRequest unless it is a file or a directory."""
    try:
        kind, size, mtime, mode = said.decode("ascii").strip().split("|")
        numbers = int(size), min(max(int(mtime), 0), 2**32 - 1), int(mode, 8)
    except ValueError:
        raise BangerError("The guest does not say what the path is.") from None
    if kind != "directory" and not kind.startswith("regular"):
        raise InvalidRequest(f"It is neither a file nor a directory, but: {escape(kind[:40])}.")
    return kind, *numbers


def _last_name(path: str) -> str:
    name = path.rstrip("/").rpartition("/")[2]
    return "root" if name in ("", ".", "..") else name


def _hash(fd: int, end: int) -> str:
    """Hash the last bytes before a place in a file."""
    first = max(0, end - TAIL)
    return hashlib.sha256(os.pread(fd, end - first, first)).hexdigest()


def _merge(part: Path, to: Path) -> None:
    """Put what has arrived in its place; a directory that is there is added to, links in it not followed."""
    if to.is_symlink() or not to.is_dir():
        part.replace(to)
        return
    for entry in list(os.scandir(part)):
        below = to / entry.name
        if entry.is_dir(follow_symlinks=False) and below.is_dir() and not below.is_symlink():
            _merge(Path(entry.path), below)
        else:
            Path(entry.path).replace(below)


def _pack(path: Path, fd: int, counted: Progress, out: Out) -> None:
    """Write a directory as tar: `tree`, and at the end `whole`.

    Directories come a second time, the deepest first: what is written into one changes its time.
    """
    directories: list[tarfile.TarInfo] = []

    def own(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
            out.note(f"banger: left out, no file, directory or link: {escape(member.name)}")
            return None
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        counted.add(member.size)
        if member.isdir():
            directories.append(member)
        return member

    with (
        open(fd, "wb", buffering=0, closefd=False) as raw,
        tarfile.open(
            fileobj=raw, mode="w|", format=tarfile.GNU_FORMAT, errors="surrogateescape", encoding="utf-8",
            bufsize=_CHUNK,
        ) as archive,
    ):  # fmt: skip
        archive.add(path.resolve(), "tree", filter=own)
        for member in reversed(directories):
            archive.addfile(member)
        archive.addfile(tarfile.TarInfo("whole"))


@contextlib.contextmanager
def _piped(produce: Callable[[int], None]) -> Iterator[int]:
    """Give the reading end of a pipe that a thread fills; its error is raised at the end."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    failed: list[BaseException] = []

    def fill() -> None:
        try:
            produce(writing)
        except BaseException as error:
            failed.append(error)
        finally:
            os.close(writing)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        yield reading
    except BaseException as error:
        if failed and not isinstance(failed[0], BrokenPipeError):
            raise failed[0] from error
        raise
    finally:
        os.close(reading)
        thread.join()
    if failed:
        raise failed[0]


@contextlib.contextmanager
def _read_by(consume: Callable[[int], None]) -> Iterator[session.Sink]:
    """Give a sink whose bytes a thread consumes; its error is raised at the end."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    failed: list[BaseException] = []

    def drain() -> None:
        try:
            consume(reading)
        except BaseException as error:
            failed.append(error)
        finally:
            os.close(reading)

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    try:
        try:
            yield session.write_to(writing)
        finally:
            os.close(writing)
            thread.join()
    except BrokenPipeError:
        if not failed:
            raise
    except BangerError:  # the guest's own word on why it has ended comes before what that led to
        raise
    if failed:
        raise failed[0]


@contextlib.contextmanager
def _counted(fd: int, counted: Progress) -> Iterator[int]:
    """Give a descriptor to read from, counting what is read."""

    def fill(to: int) -> None:
        write = session.write_to(to)
        while data := os.read(fd, _CHUNK):
            write(data)
            counted.add(len(data))

    with _piped(fill) as reading:
        yield reading
    counted.end()
