"""Read the headers of a tar archive that nobody vouches for (POSIX.1-2017 pax; ustar; GNU long names).

Python's tarfile reads headers without checking them, and hangs or throws on some: sizes of -1 or 10^14,
NUL in a path, global headers that rename every member. What is ambiguous or unusual is refused here.
"""

from __future__ import annotations

import enum
import functools
import re
import zlib
from collections.abc import Iterator
from typing import Protocol

from banger.errors import InvalidImage
from banger.images.layers.names import shown
from banger.model import Value

BLOCK = 512
LARGEST_FILE = 1 << 43
LARGEST_OWNER = 2**32 - 2
"""4294967295 is -1 to chown(2): leave as it is."""

LATEST = 2**32 - 1
"""Seconds since the epoch that a squashfs can hold; earlier than 0 and later than this is clamped."""

LARGEST_XATTR = 65536
LONGEST_XATTR_NAME = 255
_MOST_RECORDS = 1024
_ZEROS = bytes(BLOCK)
_XATTR = b"SCHILY.xattr."
_OURS = frozenset([b"path", b"linkpath", b"size", b"uid", b"gid", b"mtime"])
_SPARSE = (b"GNU.sparse.", b"SCHILY.realsize")
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_RECORD = re.compile(rb"([1-9][0-9]{0,7}) ([^=]+)=", re.DOTALL)
_WHOLE = re.compile(rb"[0-9]{1,20}")
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.[0-9]*)?")


class Kind(enum.IntEnum):
    """What an entry is: the digit is its tar type."""

    FILE = 0
    HARD_LINK = 1
    SYMLINK = 2
    CHAR_DEVICE = 3
    BLOCK_DEVICE = 4
    DIRECTORY = 5
    FIFO = 6


_KINDS = {str(int(kind)).encode(): kind for kind in Kind} | {b"\0": Kind.FILE, b"7": Kind.FILE}
_DEVICES = (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE)


class Entry(Value):
    """One entry as its header has it; `path` and `target` are not checked, all numbers are in range.

    `data` is where its `size` bytes begin in the stream; `mtime` is in whole seconds.
    """

    path: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    data: int
    target: bytes
    device: tuple[int, int]
    xattrs: dict[bytes, bytes]


class Stream(Protocol):
    """Where the archive comes from: both raise InvalidImage at its end."""

    position: int

    def read(self, size: int) -> bytes:
        """Read exactly so many bytes."""

    def skip(self, size: int) -> None:
        """Pass so many bytes."""


class _Said(Value):
    """What the extended headers before an entry said of it."""

    records: dict[bytes, bytes]
    name: bytes | None = None
    target: bytes | None = None
    size: int = 0


_NOTHING = _Said(records={})


def entries(stream: Stream, most_extra: int) -> Iterator[Entry]:
    """Give the entries of an archive up to its two blocks of zeros; what follows them is no entry.

    `most_extra` bytes may be in the extended headers of one entry. Raises InvalidImage.
    """
    said = _NOTHING
    while (header := stream.read(BLOCK)) != _ZEROS:
        _check_sum(header)
        flag = header[156:157]
        if flag in b"xgLK":
            said = _extended(stream, header, flag, said, most_extra)
            continue
        entry = _entry(header, said, stream.position)
        said = _NOTHING
        yield entry
        if entry.size:
            stream.skip(_padded(entry.size))
    if said.records or said.name or said.target:
        raise InvalidImage("An extended header is followed by no entry.")
    if stream.read(BLOCK) != _ZEROS:
        raise InvalidImage("Its end has only one block of zeros.")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check_sum(header: bytes) -> None:
    """Check a header's sum; some old programs summed the bytes as signed ones."""
    said = _octal(header[148:156], "checksum")
    # Adler-32's low half is one more than the sum of the bytes, exactly so for up to 256 of them.
    total = (zlib.adler32(header[:256]) & 0xFFFF) + (zlib.adler32(header[256:]) & 0xFFFF) - 2
    total += 8 * ord(" ") - sum(header[148:156])
    if said == total:
        return
    signed = total - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if said != signed:
        raise InvalidImage("A header's checksum is wrong.")


def _octal(field: bytes, what: str) -> int:
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise InvalidImage(f"The {what} {shown(field)} is not a number.")
    return int(match[1] or b"0", 8)


@functools.lru_cache(1024)  # most entries of an image share modes and owners
def _number(field: bytes, what: str) -> int:
    """Read a number: octal digits, or big-endian binary when the first bit is set (GNU)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big", signed=True)
        # 0x80 marks a positive one, 0xff a negative one; the mark is not part of the number.
        return value if field[0] == 0xFF else value + (1 << (8 * len(field) - 1))
    if (digits := field[:-1]).isdigit() and field[-1] == 0 and b"8" not in digits and b"9" not in digits:
        return int(digits, 8)
    return _octal(field, what)


def _within(value: int, most: int, what: str) -> int:
    if not 0 <= value <= most:
        raise InvalidImage(f"The {what} {value} is out of range.")
    return value


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _extended(stream: Stream, header: bytes, flag: bytes, said: _Said, most: int) -> _Said:
    """Read the body of an extended header and add what it says of the entry that follows."""
    size = _number(header[124:136], "size")
    if not 0 <= size <= most - said.size:
        raise InvalidImage(f"An entry's extended headers have more than {most} bytes.")
    body = stream.read(_padded(size))[:size]
    size += said.size + BLOCK
    if flag == b"g":
        _check_global(_records(body))
        return _Said(records=said.records, name=said.name, target=said.target, size=size)
    if flag == b"x":
        return _Said(records=said.records | _records(body), name=said.name, target=said.target, size=size)
    text = _long_name(body)
    if flag == b"L":
        return _Said(records=said.records, name=text, target=said.target, size=size)
    return _Said(records=said.records, name=said.name, target=text, size=size)


def _long_name(body: bytes) -> bytes:
    name = body.rstrip(b"\0")
    if b"\0" in name:
        raise InvalidImage(f"The name {shown(name)} holds a NUL byte.")
    return name


def _records(body: bytes) -> dict[bytes, bytes]:
    """Read pax records, `LENGTH KEY=VALUE newline`, where LENGTH counts all of it (pax, extended header)."""
    found: dict[bytes, bytes] = {}
    at = count = 0
    while at < len(body):
        match = _RECORD.match(body, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(body) or body[end - 1 : end] != b"\n":
            raise InvalidImage("An extended header is malformed.")
        found[match[2]] = body[match.end() : end - 1]
        at, count = end, count + 1
        if count > _MOST_RECORDS:
            raise InvalidImage(f"An extended header has more than {_MOST_RECORDS} records.")
    return found


def _check_global(records: dict[bytes, bytes]) -> None:
    """Refuse a global header that says of every entry what only its own header may say."""
    for key in records:
        if key in _OURS or key.startswith((_XATTR, *_SPARSE)):
            raise InvalidImage(f"A global header sets {shown(key)} for all entries.")


def _entry(header: bytes, said: _Said, data: int) -> Entry:
    """Put an entry together from its header and what was said before it."""
    records = said.records
    name, target = _header_names(header)
    path = _one_of(records.get(b"path"), said.name, name)
    kind = _kind(header[156:157], path)
    size = _size(header, records)
    return Entry(
        path=path,
        kind=kind,
        mode=_number(header[100:108], "mode") & 0o7777,
        uid=_owner(header[108:116], records.get(b"uid"), "uid"),
        gid=_owner(header[116:124], records.get(b"gid"), "gid"),
        mtime=_time(header[136:148], records.get(b"mtime")),
        # Only files have content: a size in another header is a remark (of a hard link's target, say).
        size=size if kind is Kind.FILE else 0,
        data=data,
        target=_one_of(records.get(b"linkpath"), said.target, target),
        device=_device(header) if kind in _DEVICES else (0, 0),
        xattrs=_xattrs(records) if records else {},
    )


def _header_names(header: bytes) -> tuple[bytes, bytes]:
    """Give a header's own path and link target; the prefix is only POSIX's, GNU keeps times there."""
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
        name = prefix + b"/" + name
    return name, _text(header[157:257])


def _one_of(pax: bytes | None, gnu: bytes | None, header: bytes) -> bytes:
    """Choose between three places for a name; two extended ones that differ are refused."""
    if pax and gnu and pax != gnu:
        raise InvalidImage(f"An entry has two names, {shown(pax)} and {shown(gnu)}.")
    return pax or gnu or header


def _kind(flag: bytes, path: bytes) -> Kind:
    kind = _KINDS.get(flag)
    if kind is None:
        raise InvalidImage(f"The entry {shown(path)} is of the unknown type {shown(flag)}.")
    # The first tar had no type for directories.
    return Kind.DIRECTORY if flag == b"\0" and path.endswith(b"/") else kind


def _size(header: bytes, records: dict[bytes, bytes]) -> int:
    for key in records:
        if key.startswith(_SPARSE):
            raise InvalidImage("It holds a sparse file, which no image format allows.")
    value = records.get(b"size")
    return _within(_whole(value, "size") if value else _number(header[124:136], "size"), LARGEST_FILE, "size")


def _whole(value: bytes, what: str) -> int:
    if not _WHOLE.fullmatch(value):
        raise InvalidImage(f"The {what} {shown(value)} is not a number.")
    return int(value)


def _owner(field: bytes, record: bytes | None, what: str) -> int:
    return _within(_whole(record, what) if record else _number(field, what), LARGEST_OWNER, what)


def _time(field: bytes, record: bytes | None) -> int:
    """Read a time in whole seconds, clamped to what file systems hold."""
    if not record:
        return min(max(_number(field, "time"), 0), LATEST)
    match = _TIME.fullmatch(record)
    if match is None:
        raise InvalidImage(f"The time {shown(record)} is not a number.")
    return 0 if match[1] else min(int(match[2]), LATEST)


def _device(header: bytes) -> tuple[int, int]:
    major, minor = _number(header[329:337], "device"), _number(header[337:345], "device")
    return _within(major, 0xFFF, "device"), _within(minor, 0xFFFFF, "device")


def _xattrs(records: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Give an entry's extended attributes by name."""
    found = {key[len(_XATTR) :]: value for key, value in records.items() if key.startswith(_XATTR)}
    for name, value in found.items():
        if not 0 < len(name) <= LONGEST_XATTR_NAME or b"\0" in name:
            raise InvalidImage(f"The attribute name {shown(name)} is none that Linux takes.")
        if len(value) > LARGEST_XATTR:
            raise InvalidImage(f"The attribute {shown(name)} has more than {LARGEST_XATTR} bytes.")
    return found
