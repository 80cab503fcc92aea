"""Take the ELF kernel out of a bzImage: Firecracker boots nothing else.

Format: the kernel's Documentation/arch/x86/boot.rst, fields `setup_sects`, `payload_offset` and
`payload_length` (protocol 2.08). The payload is one compressed stream, then its length when it is
not compressed: 32 bits, little-endian.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import zstandard

from banger.errors import InvalidImage
from banger.images import magic

LONGEST = 512 << 20
"""Bytes; Debian's kernel has 60 MiB."""

_SECTOR = 512
_SETUP_SECTS, _VERSION, _PAYLOAD = 0x1F1, 0x206, 0x248
_PROTOCOL_2_08 = 0x208


def elf(kernel: Path) -> Path:
    """Make it so that the kernel is there as an ELF file, and give its path: itself, or one beside it.

    Raises InvalidImage when it is no kernel, or packed in a way that is not known.
    """
    if magic.kernel_format(kernel) == "ELF":
        return kernel
    beside = kernel.with_name(f"{kernel.name}.elf")
    if not beside.exists():
        _write(beside, unpack(kernel.read_bytes()))
    return beside


def unpack(bzimage: bytes) -> bytes:
    """Give the ELF kernel in a bzImage; takes seconds. Raises InvalidImage."""
    (version,) = struct.unpack_from("<H", bzimage, _VERSION)
    if version < _PROTOCOL_2_08:
        raise InvalidImage("The kernel is too old to tell where its compressed part is.")
    offset, length = struct.unpack_from("<II", bzimage, _PAYLOAD)
    start = ((bzimage[_SETUP_SECTS] or 4) + 1) * _SECTOR + offset
    payload = bzimage[start : start + length]
    if len(payload) != length or length < 8:
        raise InvalidImage("The kernel is cut off.")
    (size,) = struct.unpack("<I", payload[-4:])
    if size > LONGEST:
        raise InvalidImage(f"The kernel says that it unpacks to {size >> 20} MiB.")
    whole = _unpacked(payload[:-4], size)
    if len(whole) != size or whole[:6] != b"\x7fELF\x02\x01":
        raise InvalidImage("What the kernel unpacks to is not an ELF file.")
    return whole


def _unpacked(stream: bytes, size: int) -> bytes:
    for beginning, decompress in _FORMATS.items():
        if stream.startswith(beginning):
            try:
                return decompress(stream, size)
            except (zlib.error, lzma.LZMAError, OSError, EOFError, zstandard.ZstdError, IndexError) as error:
                raise InvalidImage(f"The kernel cannot be unpacked: {error}") from None
    raise InvalidImage("The kernel is compressed in a way that banger does not know.")


def _gzip(stream: bytes, size: int) -> bytes:
    return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(stream, size)


def _bzip2(stream: bytes, size: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(stream, size)


def _lzma(stream: bytes, size: int) -> bytes:
    return lzma.LZMADecompressor().decompress(stream, size)


def _zstd(stream: bytes, size: int) -> bytes:
    with zstandard.ZstdDecompressor().stream_reader(stream) as reader:
        return reader.read(size)


def _lz4(stream: bytes, size: int) -> bytes:
    """Read LZ4's legacy frame: a number, then blocks, each after its length (lz4_Frame_format.md)."""
    whole, place = bytearray(), 4
    while len(whole) < size:
        (length,) = struct.unpack("<I", stream[place : place + 4].ljust(4, b"\xff"))
        place += 4
        if length > len(stream) - place:
            raise EOFError("a block is cut off")
        whole += _lz4_block(stream[place : place + length], size - len(whole))
        place += length
    return bytes(whole)


def _lz4_block(block: bytes, longest: int) -> bytearray:
    """Read one block (lz4_Block_format.md): literals and copies of what came before, in turns."""
    out, place, end = bytearray(), 0, len(block)
    while place < end:
        token = block[place]
        place += 1
        length = token >> 4
        if length == 15:
            length, place = _lz4_length(block, place)
        out += block[place : place + length]
        place += length
        if place >= end:  # the last literals have no copy behind them
            break
        back = block[place] | block[place + 1] << 8
        place += 2
        length = token & 15
        if length == 15:
            length, place = _lz4_length(block, place)
        length += 4
        start = len(out) - back
        if start < 0 or back == 0 or len(out) + length > longest:
            raise EOFError("a block refers to what is not there")
        if length <= back:
            out += out[start : start + length]
        else:  # the copy runs into what it is itself writing
            out += (out[start:] * (length // back + 1))[:length]
    return out


def _lz4_length(block: bytes, place: int) -> tuple[int, int]:
    """Read a length of 15 or more: bytes are added up to the first that is not 255."""
    length = 15
    while (more := block[place]) == 255:
        length += 255
        place += 1
    return length + more, place + 1


_FORMATS: dict[bytes, Callable[[bytes, int], bytes]] = {
    b"\x1f\x8b": _gzip,
    b"\x02\x21\x4c\x18": _lz4,
    b"\x28\xb5\x2f\xfd": _zstd,
    b"\xfd7zXZ\0": _lzma,
    b"\x5d\0\0": _lzma,
    b"BZh": _bzip2,
}
"""How each compression that the kernel offers begins."""


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(content)
            file.flush()
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
