"""The default kernel: the distribution's own, with an initrd of ours that boots any image."""

from __future__ import annotations

import hashlib
import re
import stat
import tarfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Protocol

import msgspec

from banger.errors import ProgramFailed
from banger.guest import cpio
from banger.images import elf, packages, store
from banger.model import Artifact, Value

VERSION = 4
"""Counts changes of how bundles are built; part of the digest."""

VMLINUZ = "vmlinuz"
INITRD = "initrd.cpio"
ASSETS = ("init", "stage2", "services", "power-button")
INTERPRETER = b"/lib64/ld-linux-x86-64.so.2"
OUR_INTERPRETER = b"/run/banger/ld.so"
"""dropbear runs itself again for each connection, by its own path."""

ACCOUNTS = b"/etc/nsswitch.conf"
OUR_ACCOUNTS = b"/run/banger/nss"
"""A file that is not there: our libc then looks in /etc/passwd, and loads no library of the image's."""

# What it takes to find the disks, the network and the host; the rest of the kernel is built in.
BOOT_MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "virtio-rng", "overlay")
SQUASHFS_MODULES = ("squashfs",)  # only for a base file in this format
LATER_MODULES = ("button", "evdev")
LIBRARY_PLACES = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu")
LOADER = "ld-linux-x86-64.so.2"
LIBC = "libc.so.6"


class Recipe(Value):
    """A Debian release and the packages a kernel bundle is made of."""

    name: str
    suite: str
    include: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Name what this recipe makes: sha256 over the recipe, how it is built, and our own files."""
        own = [resources.files("banger.guest").joinpath("assets", name).read_text() for name in ASSETS]
        parts = (VERSION, self, own, BOOT_MODULES, SQUASHFS_MODULES, LATER_MODULES)
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="debian-12",
            suite="bookworm",
            include=("linux-image-cloud-amd64", "busybox-static", "dropbear-bin"),
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
    """Make it so that the recipe's kernel and initrd are in the cache.

    Raises HostLacks, ProgramFailed, DiskFull or Cancelled, and leaves nothing behind then.
    """

    def make(staging: Path) -> dict[str, str | int | list[str]]:
        archive = staging / "packages.tar"
        progress(f"unpacking {', '.join(recipe.include)}")
        packages.bootstrap(
            archive, suite=recipe.suite, variant="extract", include=recipe.include, cancelled=cancelled
        )
        progress("making the initrd")
        with tarfile.open(archive) as tar:
            files = Files(tar)
            version, vmlinuz = files.kernel()
            (staging / VMLINUZ).write_bytes(vmlinuz)
            (staging / INITRD).write_bytes(cpio.archive(initrd(files, version)))
        archive.unlink()
        return {"version": version, "modules": list(BOOT_MODULES + SQUASHFS_MODULES + LATER_MODULES)}

    return store.build(cache, "kernel", recipe.name, recipe.digest, make, cancelled)


def kernel_paths(kernel: Artifact) -> tuple[Path, Path]:
    """Give the paths of a bundle's kernel (bzImage) and initrd (newc, uncompressed)."""
    return kernel.path / VMLINUZ, kernel.path / INITRD


class Files:
    """The files of the unpacked packages, read from their archive as they are needed."""

    def __init__(self, tar: tarfile.TarFile):
        self._tar = tar
        self._members = {str(PurePosixPath("/", member.name)): member for member in tar}

    def read(self, path: str) -> bytes:
        """Read a file, through links."""
        for _ in range(8):
            member = self._members.get(path)
            if member is None:
                break
            if member.issym():
                path = _normal(PurePosixPath(path).parent / member.linkname)
                continue
            content = self._tar.extractfile(member)
            if content is not None:
                return content.read()
            break
        raise ProgramFailed(f"The packages have no file {path}.")

    def find(self, name: str, *places: str) -> bytes:
        """Read the file of this name in the first of the places that has it."""
        for place in places:
            if f"{place}/{name}" in self._members:
                return self.read(f"{place}/{name}")
        raise ProgramFailed(f"The packages have no file {name}.")

    def kernel(self) -> tuple[str, bytes]:
        """Give the kernel's version and its image."""
        for path in self._members:
            if match := re.fullmatch(r"/boot/vmlinuz-(.+)", path):
                return match[1], self.read(path)
        raise ProgramFailed("The packages have no kernel.")

    def modules(self, version: str) -> dict[str, str]:
        """Map each module's name to its path; `-` and `_` are the same in names."""
        below = re.compile(rf"(?:/usr)?/lib/modules/{re.escape(version)}/.+/([^/]+)\.ko")
        return {
            match[1].replace("-", "_"): path for path in self._members if (match := below.fullmatch(path))
        }


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        elif part != "/":
            parts.append(part)
    return "/" + "/".join(parts)


def initrd(files: Files, version: str) -> Iterator[cpio.Entry]:
    """Give the initrd's entries: busybox, modules, our scripts, and what lives on in the guest."""
    for name in ("proc", "sys", "dev", "base", "up", "root"):
        yield cpio.directory(name)
    # The kernel opens /dev/console for the first program before anyone can mount /dev.
    yield cpio.Entry(path="dev/console", mode=stat.S_IFCHR | 0o600, device=(5, 1))
    busybox = files.find("busybox", "/bin", "/usr/bin")
    yield cpio.file("bin/busybox", busybox, 0o755)
    yield cpio.file("init", _asset("init"), 0o755)
    yield from _modules(files, version, "modules", BOOT_MODULES)
    yield from _modules(files, version, "modules/squashfs", SQUASHFS_MODULES)
    yield from _modules(files, version, "assets/modules", LATER_MODULES)
    yield cpio.file("assets/bin/busybox", busybox, 0o755)
    for applet in ("sh", "poweroff", "reboot"):
        yield cpio.link(f"assets/bin/{applet}", "busybox")
    for name in ASSETS[1:]:
        yield cpio.file(f"assets/{name}", _asset(name), 0o755)
    dropbear = files.read("/usr/sbin/dropbear")
    yield cpio.file("assets/bin/dropbear", _patched(dropbear, INTERPRETER, OUR_INTERPRETER), 0o755)
    for library, content in _libraries(files, dropbear).items():
        if library == LIBC:
            content = _patched(content, ACCOUNTS, OUR_ACCOUNTS)
        yield cpio.file("assets/ld.so" if library == LOADER else f"assets/lib/{library}", content, 0o755)


def _libraries(files: Files, program: bytes) -> dict[str, bytes]:
    """Give the libraries a program needs, and those that they need: the image may have none of them."""
    found: dict[str, bytes] = {}
    wanted = elf.needed(program)
    while wanted:
        name = wanted.pop()
        if name not in found:
            found[name] = files.find(name, *LIBRARY_PLACES)
            wanted += elf.needed(found[name])
    return found


def _asset(name: str) -> bytes:
    return resources.files("banger.guest").joinpath("assets", name).read_bytes()


def _patched(content: bytes, path: bytes, ours: bytes) -> bytes:
    """Make a program or library use our file: the path that is in it, once, becomes a shorter one."""
    if content.count(path + b"\0") != 1 or len(ours) > len(path):
        raise ProgramFailed(f"A file of the packages does not name {path.decode()} once.")
    return content.replace(path + b"\0", ours.ljust(len(path) + 1, b"\0"))


def _modules(files: Files, version: str, place: str, wanted: tuple[str, ...]) -> Iterator[cpio.Entry]:
    """Give modules and what they depend on, and the order in which to load them."""
    ordered = load_order(files, version, wanted)
    for name, content in ordered.items():
        yield cpio.file(f"{place}/{name}.ko", content)
    order = "".join(f"{name}.ko\n" for name in ordered)
    yield cpio.file(f"{place}/order", order.encode())


class ModuleSource(Protocol):
    """Where modules come from."""

    def modules(self, version: str) -> dict[str, str]:
        """Map each module's name, with `_` for `-`, to its path."""

    def read(self, path: str) -> bytes:
        """Read the module at a path."""


def load_order(source: ModuleSource, version: str, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """Give the modules that are wanted and there, by name, each after what it depends on."""
    paths = source.modules(version)
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        name = name.replace("-", "_")
        if name in ordered or name not in paths:  # it is there already, or built in
            return
        content = source.read(paths[name])
        for dependency in _depends(content):
            add(dependency)
        ordered[name] = content

    for name in wanted:
        add(name)
    return ordered


def _depends(module: bytes) -> list[str]:
    """Read what a module needs from its `.modinfo` section (NUL-terminated key=value)."""
    match = re.search(rb"\0depends=([^\0]*)\0", module)
    return [] if match is None else [name for name in match[1].decode("ascii").split(",") if name]
