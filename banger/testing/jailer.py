"""A stand-in for Firecracker's jailer, and the least of a Firecracker for it to start.

It takes the arguments that the jailer of Firecracker 1.5 to 1.13 takes and no others, and does what that
does, with the same calls in the same order: see `banger.helper.jailer`. Where it would execute a program
that is not there in the jail (a Python program needs its interpreter) it has loaded the program before and
calls its `main`, with the words that Firecracker would get. A program may have `before_chroot(root)`, which
is called as root, with the directory that is going to be the jail.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.machinery
import importlib.util
import json
import os
import re
import resource
import shutil
import socket
import stat
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

TESTED = "1.13.2"
_CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_SLAVE = 0x20000, 4096, 16384, 1 << 19
_MNT_DETACH, _PR_SET_DUMPABLE, _SYS_PIVOT_ROOT = 2, 4, {"x86_64": 155, "aarch64": 41}
_libc = ctypes.CDLL(None, use_errno=True)


def install(directory: Path, version: str = TESTED, jailer_version: str | None = None) -> None:
    """Write the two programs into a directory."""
    for name, call, which in (
        ("jailer", "jail(words)", jailer_version or version),
        ("firecracker", f"run_firecracker(words, {version!r})", version),
    ):
        path = directory / name
        path.write_text(
            f"#!{sys.executable} -I\n"
            "import sys\n\n"
            'if sys.argv[1:] == ["--version"]:\n'
            f"    sys.exit(print({f'{name.capitalize()} v{which}'!r}))\n\n"
            "from banger.testing.jailer import jail, run_firecracker\n\n"
            "def main(words):\n"
            f"    {call}\n\n"
            'if __name__ == "__main__":\n'
            "    main(sys.argv[1:])\n"
        )
        path.chmod(0o755)


# -- the jailer ----------------------------------------------------------------------------------


def jail(words: Sequence[str]) -> None:
    """Be the jailer: build the jail, enter it, give up root, become the program."""
    own, theirs = _split(words)
    asked = _parser().parse_args(own)
    if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", asked.id):
        sys.exit(f"Invalid instance ID: {asked.id}")
    program = Path(asked.exec_file).resolve(strict=True)
    if "firecracker" not in program.name:
        sys.exit(f"Invalid file name: {program.name}")
    os.closerange(3, 65536)
    os.environ.clear()
    began = time.monotonic_ns() // 1000
    root = Path(asked.chroot_base_dir, program.name, asked.id, "root")
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.copy(program, root / program.name)
    loaded = None if program.read_bytes().startswith(b"\x7fELF") else _load(program)
    for limit in asked.resource_limit or ():
        _limit(limit)
    if loaded is not None and hasattr(loaded, "before_chroot"):
        loaded.before_chroot(root)
    has_userfaultfd = "userfaultfd" in Path("/proc/misc").read_text()
    _enter(root)
    for folder in ("/", "/dev", "/dev/net", "/run"):
        Path(folder).mkdir(mode=0o700, exist_ok=True)
        Path(folder).chmod(0o700)
        os.chown(folder, asked.uid, asked.gid)
    nodes = {"/dev/net/tun": (10, 200), "/dev/kvm": (10, 232), "/dev/urandom": (1, 9)}
    for node, number in nodes.items() | ({("/dev/userfaultfd", (10, 126))} if has_userfaultfd else set()):
        os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(*number))
        os.chown(node, asked.uid, asked.gid)
    if asked.daemonize:
        _daemonize()
    os.setgroups([])
    os.setgid(asked.gid)
    os.setuid(asked.uid)
    given = [
        f"--id={asked.id}",
        f"--start-time-us={began}",
        "--start-time-cpu-us=0",
        "--parent-cpu-time-us=0",
    ]
    if loaded is None:
        os.execve(f"/{program.name}", [program.name, *given, *theirs], {})  # noqa: S606  what the jailer does
    _libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # as execve(2) would
    loaded.main([*given, *theirs])


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    words = list(words)
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="jailer", allow_abbrev=False)
    for name in ("--id", "--exec-file"):
        parser.add_argument(name, required=True)
    for name in ("--uid", "--gid"):
        parser.add_argument(name, required=True, type=int)
    parser.add_argument("--chroot-base-dir", default="/srv/jailer")
    for name in ("--cgroup", "--resource-limit"):
        parser.add_argument(name, action="append")
    for name in ("--cgroup-version", "--parent-cgroup", "--netns"):
        parser.add_argument(name)
    for name in ("--daemonize", "--new-pid-ns"):
        parser.add_argument(name, action="store_true")
    return parser


def _load(program: Path) -> types.ModuleType:
    sys.dont_write_bytecode = True
    loader = importlib.machinery.SourceFileLoader("program", str(program))
    spec = importlib.util.spec_from_loader("program", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _limit(text: str) -> None:
    name, _, value = text.partition("=")
    kind = {"no-file": resource.RLIMIT_NOFILE, "fsize": resource.RLIMIT_FSIZE}[name]
    resource.setrlimit(kind, (int(value), int(value)))


def _enter(root: Path) -> None:
    """Make a directory the root, in a mount namespace of its own; let go of all else (pivot_root(2))."""
    _do(_libc.unshare(_CLONE_NEWNS))
    _do(_libc.mount(None, b"/", None, _MS_SLAVE | _MS_REC, None))
    _do(_libc.mount(os.fsencode(root), os.fsencode(root), None, _MS_BIND | _MS_REC, None))
    os.chdir(root)
    Path("old_root").mkdir(mode=0o700)
    _do(_libc.syscall(_SYS_PIVOT_ROOT[os.uname().machine], b".", b"old_root"))
    os.chdir("/")
    _do(_libc.umount2(b"old_root", _MNT_DETACH))
    Path("old_root").rmdir()


def _do(result: int) -> None:
    if result != 0:
        sys.exit(f"jailer: {os.strerror(ctypes.get_errno())}")


def _daemonize() -> None:
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.setsid()


# -- the least of a Firecracker ------------------------------------------------------------------


def run_firecracker(words: Sequence[str], version: str) -> None:
    """Be a Firecracker that answers GET and nothing else: `/` as the real one, `/jail` what it can see.

    A `/kernel` that begins with one of these words makes it misbehave, as one would that a guest has
    taken over: FLOOD (writes without end), DIE (ends at once), HIDE (does not let itself be looked at),
    DEEP (leaves a very deep tree), PLANT (puts links to other places where its sockets are), DEAF (does
    not answer).
    """
    parser = argparse.ArgumentParser(prog="firecracker", allow_abbrev=False)
    for name in ("--id", "--api-sock", "--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us"):
        parser.add_argument(name, required=True)
    asked = parser.parse_args(list(words))
    sys.stdout.write(f"Running Firecracker v{version}\n")
    sys.stdout.flush()
    _misbehave(Path("/kernel").read_bytes()[:5].strip())
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(asked.api_sock)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            _answer(connection, asked.id, version)


def _misbehave(word: bytes) -> None:
    match word:
        case b"DIE":
            sys.exit("The kernel is no kernel.")
        case b"HIDE":
            _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
        case b"DEAF":
            time.sleep(3600)
        case b"FLOOD":
            with contextlib.suppress(OSError):
                while True:
                    os.write(1, b"y" * 65536)
        case b"PLANT":
            Path("/run/vsock.socket").symlink_to("/run/api.socket")
            Path("/firecracker").unlink()
            Path("/firecracker").symlink_to("/etc/passwd")
        case b"DEEP":
            for _ in range(3000):
                Path("d").mkdir()
                os.chdir("d")


def _answer(connection: socket.socket, name: str, version: str) -> None:
    request = connection.recv(4096).split(b" ")
    body = {
        b"/": {"app_name": "Firecracker", "id": name, "state": "Not started", "vmm_version": version},
        b"/jail": {"uids": os.getresuid(), "gids": os.getresgid(), "files": _seen("/")},
    }.get(request[1] if len(request) > 1 else b"")
    if body is not None:
        data = json.dumps(body)
        head = f"HTTP/1.1 200 \r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        connection.sendall((head + data).encode())


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(16).decode("latin-1")


def _seen(folder: str) -> dict[str, str]:
    """Tell of each file in the jail what it begins with, or why that is not known."""
    seen = {}
    for path in sorted(Path(folder).iterdir()):
        try:
            seen[path.name] = _beginning(path)
        except OSError as error:
            seen[path.name] = error.strerror or ""
    return seen
