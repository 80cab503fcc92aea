"""A guest that is a whole Debian host, for what the machine under the tests may lack.

systemd is its init; its kernel has all of Debian's modules: device-mapper, loop, tun, nf_tables, vsock and,
since QEMU's emulated CPU has SVM, a KVM that works. banger is installed in it, in root's own place.
"""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from banger import proc
from banger.errors import HostLacks
from banger.images import base, packages, store
from banger.images import kernel as kernels
from banger.model import Artifact
from banger.testing import hosted_install
from banger.testing.home import Home
from banger.vmm import qemu

VERSION = 1
"""Counts changes of how the image is built; part of its digest."""

NAME = "hosted"
KERNEL = "debian-12"
SUITE = "bookworm"
MEMORY_MIB = 1024
VCPU = 2
BOOT_TIMEOUT_S = 180.0
# Debian's other makers of initrds compile one with every module: half a minute, and nobody boots it.
_INITRD_MAKER = "tiny-initramfs"
_PACKAGES = (
    "dbus",
    "dmsetup",
    "e2fsprogs",
    "iproute2",
    "kmod",
    "libnss-resolve",
    "nftables",
    "openssh-client",
    "procps",
    "python3",
    "python3-venv",
    "qemu-system-x86",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
)
# The SSH server is there before systemd is, and systemd listens before everything is started.
_SETTLED = "until [ -e /run/systemd/private ]; do sleep 0.1; done; systemctl is-system-running --wait"


class Hosted:
    """The host that a guest is. Tests share it: what one starts, loads or writes, it takes away again."""

    def __init__(self, home: Home):
        self._home = home

    def run(
        self, command: str | Sequence[str], timeout_s: float = 120.0, *, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root: words as they are, or a script for `sh -eu`.

        Gives its exit code and what it said, whatever that is. Raises TimeoutExpired.
        """
        words = ["sh", "-euc", command] if isinstance(command, str) else list(command)
        done = subprocess.run(
            self._home.argv("vm", "exec", NAME, "--", *words),
            env=self._home.environ,
            input=stdin,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
        said = (stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(words, done.returncode, *said)

    def output(self, command: str | Sequence[str], timeout_s: float = 120.0, *, stdin: bytes = b"") -> str:
        """Run a command that has to succeed; give its standard output. Raises AssertionError."""
        done = self.run(command, timeout_s, stdin=stdin)
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def python(self, source: str, *arguments: str, timeout_s: float = 120.0) -> str:
        """Run a program that has to succeed, as root, with banger's installed modules and nothing else."""
        return self.output([hosted_install.PYTHON, "-I", "-c", source, *arguments], timeout_s)

    def put(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Write a file, root's, and the directories above it."""
        script = 'mkdir -p "${1%/*}"; cat > "$1"; chmod "$2" "$1"'
        self.output(["sh", "-euc", script, "put", path, f"{mode:o}"], stdin=content)

    def install(self, checkout: Path) -> None:
        """Install banger as it is in a checkout; what it runs on is there already."""
        self.output(["tar", "x", "-C", "/"], stdin=hosted_install.pack(checkout))

    def settle(self) -> None:
        """Wait until systemd has started everything. Raises AssertionError when a unit failed."""
        done = self.run(_SETTLED, BOOT_TIMEOUT_S)
        assert done.returncode == 0, done.stdout + self.run("systemctl --failed").stdout


def lacking() -> str | None:
    """Tell why such a guest cannot be made on this machine; None when it can."""
    if sys.version_info[:2] != hosted_install.VERSION:
        return "The guest has Python 3.11, for which the libraries of this one are not compiled."
    try:
        proc.which(qemu.PROGRAM, qemu.PACKAGE)
        proc.which("mmdebstrap")
        proc.which("tar2sqfs", "squashfs-tools-ng")
        packages.sources(SUITE)
    except HostLacks as lack:
        return f"{lack.message} {lack.hint}"
    return None


def kernel(cache: Path) -> Artifact:
    """Make it so that the guest's kernel and initrd are in the cache, and give them."""
    return kernels.build(kernels.RECIPES[KERNEL], cache)


def image(cache: Path, checkout: Path) -> Path:
    """Make it so that the guest's root file system is in the cache; give its base file.

    It has the modules of exactly the kernel that banger boots and the libraries that are installed here:
    others make another image. Takes a minute. Raises HostLacks, ProgramFailed, DiskFull.
    """
    version = kernel(cache).details["version"]
    include = (_INITRD_MAKER, f"linux-image-{version}", *_PACKAGES)
    libraries = hosted_install.libraries(checkout)
    digest = hashlib.sha256(msgspec.json.encode((VERSION, include, libraries))).hexdigest()

    def make(staging: Path) -> store.Details:
        archive = staging / "root.tar"
        packages.bootstrap(archive, suite=SUITE, variant="minbase", include=include, cancelled=lambda: False)
        hosted_install.add_environment(archive, list(libraries))
        made = base.make(archive, staging / base.FILE, label=NAME)
        archive.unlink()
        return {"format": made.format, "kernel": version}

    return base.path_of(store.build(cache, "image", NAME, digest, make, lambda: False))


@contextlib.contextmanager
def booted(checkout: Path) -> Iterator[Hosted]:
    """Boot such a guest with banger itself, install a checkout in it, and end it."""
    with Home() as home:
        home.configure(f"memory_mib = {MEMORY_MIB}\nvcpu = {VCPU}\n")
        for words in (
            ["image", "register", NAME, str(image(home.dirs.cache, checkout))],
            ["vm", "create", NAME, "--image", NAME, "--kernel", KERNEL, "--wait"],
        ):
            done = home.banger(*words)
            assert done.returncode == 0, done.stderr
        guest = Hosted(home)
        guest.install(checkout)
        guest.settle()
        yield guest
