"""Tar archives byte by byte: no library, so that every field may be what no library would write."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

from banger.images.remote.oci import Layer

END = bytes(1024)


def head(
    name: bytes, flag: bytes = b"0", *, size: int | bytes = 0, target: bytes = b"", **fields: bytes
) -> bytes:
    """Make one header; `fields` are raw and padded with NUL, `chksum` is right unless given."""
    values = {
        "name": (0, 100, name),
        "mode": (100, 8, b"0000644"),
        "uid": (108, 8, b"0000000"),
        "gid": (116, 8, b"0000000"),
        "size": (124, 12, size if isinstance(size, bytes) else b"%011o" % size),
        "mtime": (136, 12, b"00000001000"),
        "flag": (156, 1, flag),
        "target": (157, 100, target),
        "magic": (257, 8, b"ustar\00000"),
        "major": (329, 8, b"0000000"),
        "minor": (337, 8, b"0000000"),
        "prefix": (345, 155, b""),
    }
    block = bytearray(512)
    for key, (start, length, value) in values.items():
        block[start : start + length] = fields.get(key, value)[:length].ljust(length, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = fields.get("chksum", b"%06o\0 " % sum(block))
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def f(name: bytes, data: bytes = b"x", **fields: bytes) -> bytes:
    """A file; one whose name is too long for a header gets an extended one."""
    return long_name(name) + head(name, size=len(data), **fields) + padded(data)


def d(name: bytes, **fields: bytes) -> bytes:
    return long_name(name) + head(name, b"5", **{"mode": b"0000755", **fields})


def s(name: bytes, target: bytes) -> bytes:
    extra = pax(("linkpath", target)) if len(target) > 100 or b"\0" in target else b""
    return long_name(name) + extra + head(name, b"2", target=target)


def h(name: bytes, target: bytes) -> bytes:
    extra = pax(("linkpath", target)) if len(target) > 100 else b""
    return long_name(name) + extra + head(name, b"1", target=target)


def device(name: bytes, kind: bytes, major: int, minor: int) -> bytes:
    return head(name, kind, major=b"%07o" % major, minor=b"%07o" % minor)


def record(key: str | bytes, value: bytes) -> bytes:
    """One pax record, with the length that counts itself."""
    rest = b" %b=%b\n" % (key.encode() if isinstance(key, str) else key, value)
    size = len(rest)
    while size != len(rest) + len(str(size)):
        size = len(rest) + len(str(size))
    return b"%d%b" % (size, rest)


def pax(*records: tuple[str | bytes, bytes], flag: bytes = b"x") -> bytes:
    """An extended header; one for all that follows with flag `g`."""
    return raw_pax(b"".join(record(key, value) for key, value in records), flag=flag)


def raw_pax(body: bytes, *, flag: bytes = b"x") -> bytes:
    return head(b"pax", flag, size=len(body)) + padded(body)


def gnu(flag: bytes, text: bytes) -> bytes:
    """A GNU long name (L) or long link target (K)."""
    return head(b"././@LongLink", flag, size=len(text) + 1) + padded(text + b"\0")


def long_name(name: bytes) -> bytes:
    return pax(("path", name)) if len(name) > 100 else b""


def binary(value: int, length: int) -> bytes:
    """GNU's numbers: big-endian, the first bit set; negative ones begin with 0xff."""
    if value < 0:
        return value.to_bytes(length, "big", signed=True)
    return (value | 1 << (8 * length - 1)).to_bytes(length, "big")


def layer_of(path: Path, tar: bytes, *, packed: bytes | None = None, diff_id: str | None = None) -> Layer:
    """Put a layer's blob at `path`, gzip unless `packed` gives it, with the DiffID of `tar` unless given."""
    blob = gzip.compress(tar, 1) if packed is None else packed
    path.write_bytes(blob)
    return Layer(
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        digest=f"sha256:{hashlib.sha256(blob).hexdigest()}",
        size=len(blob),
        diff_id=diff_id or f"sha256:{hashlib.sha256(tar).hexdigest()}",
        path=path,
    )
