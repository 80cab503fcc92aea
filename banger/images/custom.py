"""Kernels that are not of our own recipe: checked, and given our initrd where they have none."""

from __future__ import annotations

import hashlib
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import msgspec
import zstandard

from banger.errors import InvalidImage
from banger.guest import cpio
from banger.images import kernel, magic, packages
from banger.images.layers import inflate
from banger.images.store import Details

KERNEL = kernel.VMLINUZ
INITRD = kernel.INITRD
LARGEST_MODULE = 64 << 20
_PROGRAMS = ("busybox-static", "dropbear-bin")
_WANTED = kernel.BOOT_MODULES + kernel.SQUASHFS_MODULES + kernel.LATER_MODULES
_MODULE = re.compile(r"(.+)\.ko(?:\.(xz|zst|gz))?")


def ours() -> str:
    """Name what our initrd is made of, whatever the kernel: a hex digest that changes with it."""
    assets = [resources.files("banger.guest").joinpath("assets", name).read_text() for name in kernel.ASSETS]
    return hashlib.sha256(msgspec.json.encode((kernel.VERSION, assets))).hexdigest()


def complete(staging: Path, modules: Path | None, cancelled: Callable[[], bool] = lambda: False) -> Details:
    """Check the kernel in a staging directory and make our initrd beside it unless one is there.

    `modules` is a directory with the kernel's modules, at any depth; without it the kernel must have what
    it boots with built in. Raises InvalidImage, HostLacks, ProgramFailed, DiskFull, Cancelled.
    """
    found, version = magic.kernel_format(staging / KERNEL), magic.kernel_version(staging / KERNEL)
    about: Details = {"format": found, "version": version}
    if (staging / INITRD).exists():
        return {**about, "initrd": "its own"}
    own = _Modules(modules, version)
    try:  # before anything is fetched
        kernel.load_order(own, version, _WANTED)
    except (RecursionError, UnicodeDecodeError):
        raise InvalidImage("The kernel's modules do not say what they depend on.") from None
    archive = staging / "packages.tar"
    suite = kernel.RECIPES["debian-12"].suite
    packages.bootstrap(archive, suite=suite, variant="extract", include=_PROGRAMS, cancelled=cancelled)
    with tarfile.open(archive) as tar:
        (staging / INITRD).write_bytes(cpio.archive(kernel.initrd(_Files(tar, own), version)))
    archive.unlink()
    return {**about, "initrd": "banger's", "modules": own.used}


class _Modules:
    """The modules in a directory of somebody else's, plain or compressed."""

    def __init__(self, directory: Path | None, version: str):
        self.used: list[str] = []
        self._version = version
        self._content: dict[str, bytes] = {}
        self._paths: dict[str, str] = {}
        for path in sorted(directory.rglob("*.ko*")) if directory else ():
            if (match := _MODULE.fullmatch(path.name)) and path.is_file():
                self._paths[match[1].replace("-", "_")] = str(path)

    def modules(self, version: str) -> dict[str, str]:  # noqa: ARG002  these are of one version
        """Map each module's name, with `_` for `-`, to its path."""
        return self._paths

    def read(self, path: str) -> bytes:
        """Read the module at a path; raises InvalidImage when it is another kernel's, or damaged."""
        if path not in self._content:
            self._content[path] = _unpacked(Path(path))
            self._check_version(Path(path).name, self._content[path])
            self.used.append(Path(path).name)
        return self._content[path]

    def has(self, path: str) -> bool:
        """Tell whether a path is one of these modules'."""
        return path in self._paths.values()

    def _check_version(self, name: str, content: bytes) -> None:
        found = re.search(rb"\0vermagic=([^ \0]+)", content)
        made_for = found[1].decode("ascii", "replace") if found else ""
        if self._version and made_for and made_for != self._version:
            raise InvalidImage(
                f"{name!r} is for the kernel {made_for!r}, not for {self._version!r}.",
                hint="A kernel needs the modules that were built with it.",
            )


class _Files(kernel.Files):
    """Programs from packages, modules from elsewhere."""

    def __init__(self, tar: tarfile.TarFile, own: _Modules):
        super().__init__(tar)
        self._own = own

    def modules(self, version: str) -> dict[str, str]:
        """Map each module's name, with `_` for `-`, to its path."""
        return self._own.modules(version)

    def read(self, path: str) -> bytes:
        """Read a module, or a file of the packages."""
        return self._own.read(path) if self._own.has(path) else super().read(path)


def _unpacked(path: Path) -> bytes:
    """Read a module that may be compressed. Raises InvalidImage when it is damaged or too large."""
    try:
        with path.open("rb") as file:
            packed = file.read(LARGEST_MODULE + 1)
        content = _PLAIN[path.suffix](packed) if path.suffix in _PLAIN else packed
    except (lzma.LZMAError, zlib.error, zstandard.ZstdError, EOFError) as error:
        raise InvalidImage(f"The module {path.name!r} is damaged ({error}).") from None
    if len(content) > LARGEST_MODULE:
        raise InvalidImage(f"The module {path.name!r} has more than {LARGEST_MODULE >> 20} MiB.")
    return content


def _plain_xz(packed: bytes) -> bytes:
    return lzma.LZMADecompressor(memlimit=2 * inflate.LARGEST_WINDOW).decompress(packed, LARGEST_MODULE + 1)


def _plain_zstd(packed: bytes) -> bytes:
    unpacker = zstandard.ZstdDecompressor(max_window_size=inflate.LARGEST_WINDOW)
    return unpacker.stream_reader(packed).read(LARGEST_MODULE + 1)


def _plain_gzip(packed: bytes) -> bytes:
    return zlib.decompressobj(16 + zlib.MAX_WBITS).decompress(packed, LARGEST_MODULE + 1)


_PLAIN: dict[str, Callable[[bytes], bytes]] = {".xz": _plain_xz, ".zst": _plain_zstd, ".gz": _plain_gzip}
