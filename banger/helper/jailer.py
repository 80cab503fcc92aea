"""Jails by Firecracker's own jailer.

What is relied on of it (docs/jailer.md of Firecracker 1.5 to 1.13): it takes `--id` (letters, digits and
hyphens, at most 64), `--exec-file`, `--uid`, `--gid`, `--chroot-base-dir`, `--resource-limit` and, after
`--`, arguments for Firecracker. It works in `BASE/NAME OF THE PROGRAM/ID/root`, which may be there already
with files in it; it closes all descriptors but the first three and forgets its environment, copies the
program there, makes that directory its root in a mount namespace of its own (pivot_root(2)), makes the
nodes that Firecracker needs, gives them and `/`, `/dev`, `/dev/net` and `/run` to the uid, gives up root
and becomes the program, as the same process. `--daemonize` (standard output to /dev/null) and
`--new-pid-ns` (another process) are not used: the pid is the one that was started, and the console is kept.

Jailers before 1.13.2 and 1.14.1 follow a symbolic link at the program's place in the jail
(CVE-2026-1386). None is ever started in a directory that a jail's uid could write to before: each jail is
new, and root's until then. So they are not refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import grp
import os
import pwd
import re
import socket
import stat
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from banger.errors import HostLacks, ProgramFailed, Refused
from banger.helper import inmates, program, trees, wire
from banger.helper.beneath import open_beneath
from banger.helper.jails import API, CONSOLE_BYTES, UIDS, Door, Inmate, Jail, Version, door_path
from banger.helper.trusted import make_private, open_trusted

OLDEST = Version(1, 5, 0)
OPEN_FILES = 1024
CONNECT_S = 2.0
VERSION_S = 10.0

_FIRECRACKER = "firecracker"
_VERSION = re.compile(r"\A(?:Firecracker|Jailer) v?([0-9]{1,4})\.([0-9]{1,4})\.([0-9]{1,4})", re.ASCII)
_TUNSETIFF, _TUNSETOWNER = 0x400454CA, 0x400454CC  # linux/if_tun.h
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_UMOUNT_NOFOLLOW, _MNT_DETACH = 8, 2  # umount2(2)
_NO_COPY = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # copy_file_range(2)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OLD = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_libc = ctypes.CDLL(None, use_errno=True)


class Jailer:
    """The jails below `base`, made by `firecracker` and `jailer` of the directory `programs`.

    Both directories and all above them must be root's own. `base` is made when it is first needed.
    """

    def __init__(self, programs: str, base: str, uids: range = UIDS):
        self.uids = uids
        self._programs = programs
        self._base = base
        self._children: set[int] = set()
        self._consoles: dict[str, int] = {}
        self._versions: dict[tuple[int, int, int], Version] = {}

    def version(self) -> Version:
        """See `Jails`."""
        found = {name: self._version_of(name) for name in (_FIRECRACKER, "jailer")}
        version = found[_FIRECRACKER]
        if version != found["jailer"]:
            raise HostLacks(f"Firecracker is version {version}, its jailer {found['jailer']}.")
        if version < OLDEST:
            raise HostLacks(f"Firecracker is version {version}; {OLDEST} or newer is needed.")
        return version

    def spoken_for(self) -> Sequence[range]:
        """See `Jails`."""
        return [
            *_accounts("/etc/passwd", 2),
            *_accounts("/etc/group", 2),
            *_accounts("/etc/subuid", 1, counted=True),
            *_accounts("/etc/subgid", 1, counted=True),
            *(range(uid, uid + 1) for uid in inmates.live_uids(self.uids)),
        ]

    def is_known(self, uid: int) -> bool:
        """See `Jails`. A directory service may give its users uids from 200,000 up (sssd-ldap(5))."""
        for look in (pwd.getpwuid, grp.getgrgid):
            with contextlib.suppress(KeyError):
                look(uid)
                return True
        return False

    def jails(self) -> list[Jail]:
        """See `Jails`."""
        with self._above() as above:
            return [Jail(name, _read_mark(above, name)) for name in sorted(trees.entries(above))]

    def inmates(self, jail: str) -> list[Inmate]:
        """See `Jails`."""
        self._reap()
        with contextlib.suppress(FileNotFoundError), self._inside(jail) as root:
            return inmates.inmates(jail, root)
        return []

    def make(self, jail: str, mark: str) -> None:
        """See `Jails`."""
        with self._above() as above:
            try:
                os.mkdir(jail, 0o700, dir_fd=above)
            except FileExistsError:
                raise Refused(f"The jail {jail} exists already.") from None
            with _opened(jail, _DIRECTORY, above) as held:
                with _opened("mark", _NEW, held) as file:
                    os.write(file, mark.encode())
                os.mkdir("root", 0o700, dir_fd=held)

    def put_file(self, jail: str, name: str, fd: int, size: int, uid: int) -> None:
        """See `Jails`."""
        with self._inside(jail) as root, _opened(name, _NEW, root) as copy:
            os.fchmod(copy, 0o400)
            os.fchown(copy, uid, uid)
            if _copy(fd, copy, size) != size:
                raise Refused(f"The {name} became shorter while it was copied.")

    def put_device(self, jail: str, name: str, device: str, uid: int, read_only: bool) -> None:
        """See `Jails`."""
        number = Path(device).stat().st_rdev
        with self._inside(jail) as root:
            os.mknod(name, stat.S_IFBLK | (0o400 if read_only else 0o600), number, dir_fd=root)
            # Nobody but root can be in here yet: the jailer gives the directory away, and is not started.
            os.chown(name, uid, uid, dir_fd=root, follow_symlinks=False)

    def give_tap(self, tap: str, uid: int) -> None:
        """See `Jails`."""
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", tap.encode("ascii"), _IFF_TAP | _IFF_NO_PI))
            fcntl.ioctl(fd, _TUNSETOWNER, uid)
        finally:
            os.close(fd)

    def start(self, jail: str, uid: int, mark: str) -> None:
        """See `Jails`."""
        self.version()
        words = [
            self._trusted("jailer"),
            "--id", jail,
            "--exec-file", self._trusted(_FIRECRACKER),
            "--uid", str(uid),
            "--gid", str(uid),
            "--chroot-base-dir", self._base,
            "--resource-limit", f"no-file={OPEN_FILES}",
            "--",
            "--api-sock", door_path(API),
        ]  # fmt: skip
        console = _console(mark, CONSOLE_BYTES)
        self._forget(jail)
        self._consoles[jail] = console
        child = _spawn(words, console)
        self._children.add(child.pid)
        child.returncode = 0  # it outlives this object, and is waited for by `_reap`

    def signal(self, jail: str, inmate: Inmate, number: int) -> None:
        """See `Jails`."""
        with contextlib.suppress(FileNotFoundError), self._inside(jail) as root:
            inmates.send(jail, root, inmate, number)

    def ended(self, inmate: Inmate, timeout_s: float) -> bool:
        """See `Jails`."""
        return inmates.ended(inmate, timeout_s)

    def connect(self, jail: str, door: Door) -> int:
        """See `Jails`."""
        with (
            self._above() as above,
            _beneath(above, f"{jail}/root") as root,
            _beneath(root, door_path(door).lstrip("/")) as found,
        ):
            return _connect(found, os.fstat(root).st_uid)

    def console(self, jail: str) -> int | None:
        """See `Jails`."""
        held = self._consoles.get(jail)
        if held is not None:
            return os.open(f"/proc/self/fd/{held}", os.O_RDONLY | os.O_CLOEXEC)
        return next(
            (fd for inmate in self.inmates(jail) if (fd := _output_of(inmate, jail)) is not None), None
        )

    def remove(self, jail: str) -> None:
        """See `Jails`."""
        self._reap()
        self._forget(jail)
        with self._above() as above:
            _unmount(f"{self._base}/{_FIRECRACKER}/{jail}")
            trees.remove_tree(above, jail)

    @contextlib.contextmanager
    def _above(self) -> Iterator[int]:
        """Open the directory in which each jail has one: the jailer names it after the program."""
        base = make_private(self._base)
        try:
            _check_mount(base, self._base)
            with contextlib.suppress(FileExistsError):
                os.mkdir(_FIRECRACKER, 0o700, dir_fd=base)
            with _opened(_FIRECRACKER, _DIRECTORY, base) as above:
                yield above
        finally:
            os.close(base)

    @contextlib.contextmanager
    def _inside(self, jail: str) -> Iterator[int]:
        with (
            self._above() as above,
            _opened(jail, _DIRECTORY, above) as held,
            _opened("root", _DIRECTORY, held) as root,
        ):
            yield root

    def _trusted(self, name: str) -> str:
        """Give the path of one of the two programs, which nobody but root can put anything else at."""
        path = f"{self._programs}/{name}"
        fd = open_trusted(path)
        found = os.fstat(fd)
        os.close(fd)
        if not stat.S_ISREG(found.st_mode) or not found.st_mode & stat.S_IXUSR:
            raise HostLacks(f"{path} is not a program.")
        return path

    def _version_of(self, name: str) -> Version:
        path = self._trusted(name)
        found = Path(path).stat()
        key = (found.st_dev, found.st_ino, found.st_mtime_ns)
        if key not in self._versions:
            self._versions[key] = _ask_version(path)
        return self._versions[key]

    def _reap(self) -> None:
        """Wait for those that have ended: they stay zombies until their parent does so."""
        for pid in tuple(self._children):
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG)[0] == 0:
                    continue
            self._children.discard(pid)

    def _forget(self, jail: str) -> None:
        if (console := self._consoles.pop(jail, None)) is not None:
            os.close(console)


def _ask_version(path: str) -> Version:
    output = _console("version", 4096)
    try:
        with _spawn([path, "--version"], output) as child:
            try:
                child.wait(VERSION_S)
            except subprocess.TimeoutExpired:
                child.kill()  # our own unreaped child: its pid cannot be another's
        text = written(output)
    finally:
        os.close(output)
    if not (found := _VERSION.match(text)):
        raise HostLacks(f"{path} does not tell its version.")
    return Version(*map(int, found.groups()))


def written(console: int) -> str:
    """Give what was written to a console: it has its full size from the start, of zeros."""
    return os.pread(console, CONSOLE_BYTES, 0).rstrip(b"\0").decode("utf-8", "replace")


def _console(name: str, size: int) -> int:
    """Make a memory file that cannot grow: writing on past its end fails, and nobody is ended for it.

    A limit of file size (RLIMIT_FSIZE) would end Firecracker, whatever the guest wrote to its console;
    a pipe would stop its virtual CPU when nobody reads.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o444)  # an owner who is given a descriptor to read cannot make it one to write
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def _spawn(words: Sequence[str], output: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            words,
            close_fds=True,
            cwd="/",
            env=dict(program.ENVIRONMENT),
            shell=False,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            umask=0o077,
        )
    except OSError as error:
        raise ProgramFailed(f"{words[0]} cannot be run: {error.strerror}.") from None


def _output_of(inmate: Inmate, jail: str) -> int | None:
    """Open the console that an inmate writes to, if that still is the one it was started with."""
    path = f"/proc/{inmate.pid}/fd/1"
    try:
        with inmates.seen_as(inmate.uid):
            if not inmates.is_console(str(Path(path).readlink()), jail):
                return None
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _connect(found: int, uid: int) -> int:
    """Connect to the socket that is open as `found`, where a process of this uid must be listening."""
    if not stat.S_ISSOCK(os.fstat(found).st_mode):
        raise Refused("What has the socket's name in the jail is no socket.")
    door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        door.settimeout(CONNECT_S)
        # By descriptor: no name can be exchanged, and no path is too long for an address (unix(7)).
        door.connect(f"/proc/self/fd/{found}")
        if wire.peer(door)[0] != uid:
            raise Refused("Another than the jail's own user listens there.")
        door.setblocking(True)
        return door.detach()
    except OSError as error:
        raise Refused(f"Nobody listens there: {error.strerror or error}.") from None
    finally:
        door.close()


@contextlib.contextmanager
def _beneath(directory: int, relative: str) -> Iterator[int]:
    fd = open_beneath(directory, relative)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened(name: str, flags: int, directory: int) -> Iterator[int]:
    fd = os.open(name, flags, 0o600, dir_fd=directory)
    try:
        yield fd
    finally:
        os.close(fd)


def _read_mark(above: int, jail: str) -> str:
    try:
        with _opened(jail, _DIRECTORY, above) as held, _opened("mark", _OLD, held) as file:
            return os.read(file, 4096).decode("utf-8", "replace")
    except OSError:
        return ""


def _copy(source: int, target: int, size: int) -> int:
    """Copy up to `size` bytes from the beginning, in the kernel; share the blocks where it can."""
    done, share = 0, True
    while done < size:
        try:
            if share:
                count = os.copy_file_range(source, target, size - done, done)
            else:
                count = os.sendfile(target, source, done, size - done)
        except OSError as error:
            if not share or error.errno not in _NO_COPY:
                raise
            share = False
            continue
        if count == 0:
            break
        done += count
    return done


def _accounts(path: str, first: int, *, counted: bool = False) -> Iterator[range]:
    """Read ids out of a file of lines with colons: field `first`, and how many there are in the next."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with os.fdopen(fd, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            words = line.strip().split(":")
            with contextlib.suppress(ValueError, IndexError):
                start = int(words[first])
                yield range(start, start + (int(words[first + 1]) if counted else 1))


def _check_mount(base: int, path: str) -> None:
    flags = os.fstatvfs(base).f_flag
    if flags & (os.ST_NODEV | os.ST_NOEXEC):
        raise HostLacks(
            f"{path} is on a file system where programs or device nodes do not work.",
            hint="Firecracker's jails need one that is mounted without nodev and noexec.",
        )


def _unmount(jail: str) -> None:
    """Unmount what is mounted below a jail, deepest first.

    The jailer mounts in a namespace of its own; this is for what another might have left.
    """
    fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    with os.fdopen(fd, encoding="utf-8", errors="surrogateescape") as lines:
        points = [line.split(" ")[4] for line in lines]  # proc_pid_mountinfo(5): (5) mount point
    for point in sorted((p for p in points if p == jail or p.startswith(f"{jail}/")), key=len, reverse=True):
        where = re.sub(r"\\([0-7]{3})", lambda escaped: chr(int(escaped[1], 8)), point)
        _libc.umount2(os.fsencode(where), _UMOUNT_NOFOLLOW | _MNT_DETACH)
