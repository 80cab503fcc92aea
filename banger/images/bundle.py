"""Get and make bundles: an image or a kernel in one file, pinned by its sha256.

A bundle is `NAME.tar.zst`: one zstd frame (RFC 8878) around a tar archive of regular files, first
`manifest.json`, then what it lists. An image's has `root.squashfs` or `root.ext4`; a kernel's has
`vmlinuz` or `vmlinux`, perhaps an `initrd`, perhaps `modules/NAME.ko` (from which an initrd is made).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import mmap
import os
import re
import secrets
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import msgspec
import zstandard

from banger import config
from banger.errors import Cancelled, InvalidImage, InvalidRequest
from banger.images import base, custom, magic, seed, store
from banger.images.cache import using
from banger.images.layers import inflate, tarstream
from banger.images.layers.names import shown
from banger.images.remote import download
from banger.images.remote.blobs import Blob
from banger.images.store import Details
from banger.model import Artifact, Value

VERSION = 2
"""Counts changes of what is made from a bundle; part of the digest."""

FORMAT: Literal[1] = 1
MANIFEST = "manifest.json"
ROOTS = ("root.squashfs", "root.ext4")
KERNELS = ("vmlinuz", "vmlinux")
INITRD = "initrd"
MODULES = "modules"
MANIFEST_BYTES = 1 << 20
LEVEL = 9

_MODULE = re.compile(rf"{MODULES}/[A-Za-z0-9][A-Za-z0-9._-]{{0,200}}\.ko(\.xz|\.zst|\.gz)?", re.ASCII)
_PIECE = 1 << 16
_ZEROS = bytes(_PIECE)
_MAGIC = b"\x28\xb5\x2f\xfd"
_MOST_BLOCKS = 1 << 22
_NO_RATIO = 1 << 40
_LAST_RECORD = 1 << 20

Kind = Literal["image", "kernel"]
_Key = Annotated[str, msgspec.Meta(max_length=64)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
Remarks = Annotated[dict[_Key, _Text], msgspec.Meta(max_length=64)]
"""What a bundle's maker says of it: data, never control."""


class Bundle(Value, tag="bundle"):
    """A bundle and what it must be: `size` in bytes, `sha256` in hex.

    `place` is an address or an absolute path, `origin` the address of the catalog that named it, if one did.
    """

    place: str
    sha256: str
    size: int
    origin: str | None = None

    def digest(self, kind: Kind, name: str) -> str:
        """Name what this bundle makes under a name."""
        parts = (VERSION, kind, name, self.sha256, custom.ours() if kind == "kernel" else "")
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


class Limits(Value):
    """What a bundle may take, in bytes: as a file, and unpacked (an ext4's zeros take no disk)."""

    bundle_bytes: int = 20 << 30
    unpacked_bytes: int = 64 << 30

    @classmethod
    def of(cls, settings: config.Limits) -> Limits:
        """Give those that the user has set."""
        return cls(bundle_bytes=settings.bundle_mib << 20, unpacked_bytes=settings.bundle_content_mib << 20)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a bundle says of itself: its files with their sizes in bytes, and remarks of its maker."""

    format: Literal[1]
    kind: Kind
    files: dict[str, Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]]
    details: Remarks = {}


def install(
    bundle: Bundle,
    kind: Kind,
    name: str,
    cache: Path,
    *,
    limits: Limits | None = None,
    take_seed: seed.Take = seed.take,
    progress: Callable[[str], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Artifact:
    """Make it so that a bundle's image or kernel is in the cache, under this name.

    Raises InvalidImage (nothing of it stays), DownloadFailed or Cancelled (what came so far stays in
    `<cache>/bundles`), InvalidRequest, HostLacks, ProgramFailed, DiskFull.
    """
    limits = limits or Limits()

    def make(staging: Path) -> Details:
        with using(cache), _fetched(bundle, cache / "bundles", limits, progress, cancelled) as fd:
            progress("unpacking the bundle")
            manifest = unpack(fd, staging, kind, limits=limits, cancelled=cancelled)
            found = _finish_image(staging) if kind == "image" else _finish_kernel(staging, cancelled)
        if kind == "image":
            take_seed(
                staging / base.FILE,
                magic.root_format(staging / base.FILE),
                staging / seed.FILE,
                cancelled=cancelled,
            )
        return {**manifest.details, **found, "bundle": bundle.place, "bundle_sha256": bundle.sha256}

    return store.build(cache, kind, name, bundle.digest(kind, name), make, cancelled)


def unpack(
    fd: int, into: Path, kind: Kind, *, limits: Limits, cancelled: Callable[[], bool] = lambda: False
) -> Manifest:
    """Write a bundle's files into an empty private directory; only what bundles have, and each once.

    Raises InvalidImage, Cancelled, OSError.
    """
    _check_one_frame(fd)
    bounds = inflate.Bounds(limits.unpacked_bytes + MANIFEST_BYTES, _NO_RATIO, 0)
    stream = _Stream(inflate.chunks(fd, bounds), cancelled)
    manifest = _manifest(stream, stream.entry(), kind, limits)
    missing = dict(manifest.files)
    with _directory(into) as root:
        while (entry := stream.entry()) is not None:
            name = entry.path.decode("ascii", "replace")
            if entry.kind is not tarstream.Kind.FILE or missing.pop(name, None) != entry.size:
                raise InvalidImage(
                    f"{shown(entry.path)} is not listed in the bundle, or there twice, or no regular file, or"
                    " not as large as listed."
                )
            _write(stream, entry.size, name, root)
            stream.skip(-entry.size % tarstream.BLOCK)
    if missing:
        raise InvalidImage(f"The bundle does not have {next(iter(missing))!r}, which it lists.")
    stream.expect_only_zeros()
    return manifest


def write(
    directory: Path,
    target: Path,
    *,
    details: dict[str, str] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Bundle:
    """Make a bundle of what there is in a directory, whole or not at all; equal content, equal bytes.

    An artifact's directory has other names for its files; they are known, too. Raises InvalidRequest,
    Cancelled, OSError.
    """
    files = _content_of(directory)
    manifest = _listing(files, details or {})
    new = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with new.open("x+b") as out:
            _pack(out, manifest, files, cancelled)
            size = out.tell()
            out.seek(0)
            sha256 = hashlib.file_digest(out, "sha256").hexdigest()
        new.replace(target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return Bundle(place=str(target.absolute()), sha256=sha256, size=size)


# -- getting one ----------------------------------------------------------------------------


@contextlib.contextmanager
def _fetched(
    bundle: Bundle,
    into: Path,
    limits: Limits,
    progress: Callable[[str], None],
    cancelled: Callable[[], bool],
) -> Iterator[int]:
    """Open a bundle that is here and is what it must be; it goes when it was used, or is not right."""
    if bundle.size > limits.bundle_bytes:
        raise InvalidImage(
            f"The bundle has {bundle.size} bytes; {limits.bundle_bytes} are allowed.",
            hint="`bundle_mib` of `[limits]` in config.toml is the limit.",
        )
    fd = None
    while fd is None:  # the same bundle's image under another name may be done with it just now
        path = _get(bundle, into, progress, cancelled)
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    except InvalidImage:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    path.unlink(missing_ok=True)


def _get(bundle: Bundle, into: Path, progress: Callable[[str], None], cancelled: Callable[[], bool]) -> Path:
    blob = Blob(digest=f"sha256:{bundle.sha256}", size=bundle.size)
    if download.is_address(bundle.place):
        return download.fetch(
            bundle.place, into, blob, origin=bundle.origin, progress=progress, cancelled=cancelled
        )
    return download.copy(Path(bundle.place), into, blob, cancelled=cancelled)


def _check_one_frame(fd: int) -> None:
    """Refuse whatever is not exactly one zstd frame: nothing may hide before, after or between frames."""
    if os.fstat(fd).st_size < 4:
        raise InvalidImage("The bundle is not a zstd file.")
    with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != _MAGIC:
            raise InvalidImage("The bundle is not a zstd file.")
        try:
            window = zstandard.get_frame_parameters(data[:18]).window_size
        except zstandard.ZstdError:
            raise InvalidImage("The bundle's zstd header is damaged.") from None
        if window > inflate.LARGEST_WINDOW:
            raise InvalidImage(
                f"The bundle needs a window of {window >> 20} MiB to unpack;"
                f" {inflate.LARGEST_WINDOW >> 20} MiB are allowed.",
                hint="`zstd --long=27` makes one that fits.",
            )
        if _end_of_frame(data) != len(data):
            raise InvalidImage("The bundle is not one whole zstd frame: it is cut off, or something follows.")


def _end_of_frame(data: mmap.mmap) -> int:
    """Find where the first frame ends, by its blocks' headers (RFC 8878, section 3.1.1); -1 past the end."""
    at = zstandard.frame_header_size(data[:18])  # with the magic number
    checksum = 4 if data[4] & 4 else 0
    for _ in range(_MOST_BLOCKS):
        header = int.from_bytes(data[at : at + 3], "little")
        repeats_one_byte = header >> 1 & 3 == 1
        at += 3 + (1 if repeats_one_byte else header >> 3)
        if at > len(data):
            return -1
        if header & 1:
            return at + checksum
    return -1


class _Stream:
    """The bundle's archive as it is unpacked, in order."""

    def __init__(self, chunks: Iterator[bytes], cancelled: Callable[[], bool]):
        self.position = 0
        self._chunks = chunks
        self._cancelled = cancelled
        self._chunk = memoryview(b"")

    def entry(self) -> tarstream.Entry | None:
        """Read the next header, where one must be; None at the archive's end.

        A reader of headers passes what is between them: each gets one only, as the content is read here.
        """
        return next(tarstream.entries(self, MANIFEST_BYTES), None)

    def read(self, size: int) -> bytes:
        """Read exactly so many bytes."""
        pieces = []
        while size:
            pieces.append(piece := self._some(size))
            size -= len(piece)
        return b"".join(pieces)

    def skip(self, size: int) -> None:
        """Pass so many bytes."""
        while size > 0:
            size -= len(self._some(size))

    def expect_only_zeros(self) -> None:
        """Pass what follows the archive's end, which is filled up with zeros to whole records."""
        passed = 0
        for piece in itertools.chain([bytes(self._chunk)], self._chunks):
            passed += len(piece)
            if passed > _LAST_RECORD or piece.strip(b"\0"):
                raise InvalidImage("Something follows the end of the bundle's archive.")

    def _some(self, most: int) -> memoryview:
        if not self._chunk:
            if self._cancelled():
                raise Cancelled
            self._chunk = memoryview(next(self._chunks, b""))
            if not self._chunk:
                raise InvalidImage("The bundle's archive is cut off.")
        piece, self._chunk = self._chunk[:most], self._chunk[most:]
        self.position += len(piece)
        return piece


def _manifest(stream: _Stream, entry: tarstream.Entry | None, kind: Kind, limits: Limits) -> Manifest:
    if entry is None or entry.path != MANIFEST.encode() or entry.kind is not tarstream.Kind.FILE:
        raise InvalidImage(f"The bundle does not begin with {MANIFEST}.")
    if entry.size > MANIFEST_BYTES:
        raise InvalidImage(f"The bundle's {MANIFEST} has more than {MANIFEST_BYTES} bytes.")
    try:
        manifest = msgspec.json.decode(stream.read(entry.size), type=Manifest)
        stream.skip(-entry.size % tarstream.BLOCK)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidImage(f"The bundle's {MANIFEST} is wrong: {str(error)!a}.") from None
    _check_listing(manifest, kind, limits)
    return manifest


def _check_listing(manifest: Manifest, kind: Kind, limits: Limits) -> None:
    """Refuse a manifest that lists something else than an image or kernel has."""
    if manifest.kind != kind:
        raise InvalidImage(f"It is a bundle of one {manifest.kind}, not of one {kind}.")
    main, others = (ROOTS, re.compile(r"(?!)")) if kind == "image" else (KERNELS, _MODULE)
    for name in manifest.files:
        if name not in main and not others.fullmatch(name) and (kind, name) != ("kernel", INITRD):
            raise InvalidImage(f"{name!a} is no part of a bundle of one {kind}.")
    if sum(name in main for name in manifest.files) != 1:
        raise InvalidImage(f"A bundle of one {kind} has exactly one of {' and '.join(main)}.")
    if sum(manifest.files.values()) > limits.unpacked_bytes:
        raise InvalidImage(
            f"The bundle unpacks to more than {limits.unpacked_bytes >> 20} MiB.",
            hint="`bundle_content_mib` of `[limits]` in config.toml is the limit.",
        )


@contextlib.contextmanager
def _directory(path: Path | str, beside: int | None = None) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=beside)
    try:
        yield fd
    finally:
        os.close(fd)


def _write(stream: _Stream, size: int, name: str, root: int) -> None:
    """Write a file that is not there yet; blocks of zeros become holes."""
    parent, _, leaf = name.rpartition("/")
    with contextlib.ExitStack() as stack:
        if parent:
            with contextlib.suppress(FileExistsError):
                os.mkdir(parent, 0o700, dir_fd=root)
            root = stack.enter_context(_directory(parent, root))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(leaf, flags, 0o600, dir_fd=root)
        stack.callback(os.close, fd)
        for at in range(0, size, _PIECE):
            piece = stream.read(min(_PIECE, size - at))
            if piece != _ZEROS[: len(piece)]:
                os.pwrite(fd, piece, at)
        os.ftruncate(fd, size)


def _finish_image(staging: Path) -> Details:
    """Give the root file system the name it has in the cache; it must be what its own name says."""
    (root,) = (staging / name for name in ROOTS if (staging / name).exists())
    found = magic.root_format(root)
    if root.suffix != f".{found}":
        raise InvalidImage(f"The bundle's {root.name} is {found}.")
    root.rename(staging / base.FILE)
    return {"format": found}


def _finish_kernel(staging: Path, cancelled: Callable[[], bool]) -> Details:
    """Give kernel and initrd the names they have in the cache."""
    modules = staging / MODULES
    for bundled, name in [*((name, custom.KERNEL) for name in KERNELS), (INITRD, custom.INITRD)]:
        if (staging / bundled).exists():
            (staging / bundled).rename(staging / name)
    found = custom.complete(staging, modules if modules.exists() else None, cancelled)
    shutil.rmtree(modules, ignore_errors=True)
    return found


# -- making one -----------------------------------------------------------------------------


def _content_of(directory: Path) -> dict[str, Path]:
    """Find what belongs into a bundle, under its names there."""
    names = {name: name for name in (*ROOTS, *KERNELS, INITRD)} | {custom.INITRD: INITRD}
    found = {known: directory / name for name, known in names.items() if (directory / name).is_file()}
    if (root := directory / base.FILE).is_file():
        found[f"root.{magic.root_format(root)}"] = root
    modules = sorted((directory / MODULES).glob("*.ko*"))
    return found | {f"{MODULES}/{path.name}": path for path in modules}


def _listing(files: dict[str, Path], details: dict[str, str]) -> Manifest:
    kind: Kind = "image" if any(name in ROOTS for name in files) else "kernel"
    sizes = {name: path.stat().st_size for name, path in files.items()}
    manifest = Manifest(format=FORMAT, kind=kind, files=sizes, details=details)
    try:
        _check_listing(manifest, kind, Limits())
    except InvalidImage as error:
        raise InvalidRequest(error.message) from None
    return manifest


def _pack(out: BinaryIO, manifest: Manifest, files: dict[str, Path], cancelled: Callable[[], bool]) -> None:
    packer = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
    with packer.stream_writer(out, closefd=False) as packed:
        about = msgspec.json.encode(manifest)
        _add(packed.write, MANIFEST, [about], len(about))
        for name, path in files.items():
            _add(packed.write, name, _pieces(path, cancelled), manifest.files[name])
        packed.write(bytes(2 * tarstream.BLOCK))
    out.flush()
    os.fsync(out.fileno())


def _pieces(path: Path, cancelled: Callable[[], bool]) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(inflate.CHUNK):
            if cancelled():
                raise Cancelled
            yield piece


def _add(put: Callable[[bytes], int], name: str, pieces: Iterator[bytes] | list[bytes], size: int) -> None:
    """Write one file into an archive: header, content, and zeros to a whole block."""
    header = tarfile.TarInfo(name)
    header.size = size
    put(header.tobuf(tarfile.GNU_FORMAT))
    written = 0
    for piece in pieces:
        put(piece)
        written += len(piece)
    if written != size:
        raise InvalidRequest(f"{name!r} changed while it was read.")
    put(bytes(-size % tarstream.BLOCK))
