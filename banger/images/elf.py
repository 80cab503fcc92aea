"""Read what a program for x86-64 needs in order to run.

Format: System V ABI, "Object Files" and "Program Loading and Dynamic Linking"; 64-bit, little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from banger.errors import ProgramFailed

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_DYNAMIC_ENTRY = struct.Struct("<qQ")
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


def needed(program: bytes) -> list[str]:
    """List the shared libraries a program or library names (DT_NEEDED); none when it is static.

    Raises ProgramFailed when it is not a 64-bit little-endian ELF file.
    """
    segments = list(_segments(program))
    entries = [
        entry for kind, *place in segments if kind == _PT_DYNAMIC for entry in _entries(program, *place)
    ]
    tables = [value for tag, value in entries if tag == _DT_STRTAB]
    if not tables:
        return []
    strings = _offset(segments, tables[0])
    names = [strings + value for tag, value in entries if tag == _DT_NEEDED]
    return [program[start : program.index(b"\0", start)].decode("ascii") for start in names]


def _segments(program: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Give each segment's type, offset in the file, address and size in the file."""
    if program[:6] != b"\x7fELF\x02\x01":
        raise ProgramFailed("A program in the packages is not an ELF file for x86-64.")
    header = _HEADER.unpack_from(program)
    start, size, count = header[5], header[9], header[10]
    for index in range(count):
        kind, _, offset, address, _, in_file, _, _ = _SEGMENT.unpack_from(program, start + index * size)
        yield kind, offset, address, in_file


def _entries(program: bytes, offset: int, _: int, size: int) -> Iterator[tuple[int, int]]:
    for tag, value in _DYNAMIC_ENTRY.iter_unpack(program[offset : offset + size]):
        if tag == _DT_NULL:
            return
        yield tag, value


def _offset(segments: list[tuple[int, int, int, int]], address: int) -> int:
    """Find where in the file an address is loaded from."""
    for kind, offset, start, size in segments:
        if kind == _PT_LOAD and start <= address < start + size:
            return offset + address - start
    raise ProgramFailed("A program in the packages has no string table.")
