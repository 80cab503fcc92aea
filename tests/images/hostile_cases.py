"""The hostile images, each with what must come of it; the numbers are those of the threat list."""

from __future__ import annotations

import functools
import gzip
import struct
from collections.abc import Callable, Iterator

import zstandard

from banger.images.layers.flatten import Limits
from banger.model import Value
from tests.images.tarbytes import END, binary, d, device, f, gnu, h, head, padded, pax, raw_pax, record, s


class Blob(Value):
    """A layer whose packing is part of the case."""

    packed: bytes
    tar: bytes = b""


Given = bytes | Blob | Callable[[], bytes | Blob]
"""A layer; a large one is made when it is needed."""


class Case(Value):
    """Layers, oldest first, without their end; and either words of the refusal or all that is merged."""

    layers: list[Given]
    refused: str | None = None
    merged: dict[str, str] = {}  # noqa: RUF012 - msgspec copies it
    limits: Limits = Limits()
    ended: bool = True


MIB = 1 << 20
SMALL = Limits(entries=50_000)
PLAIN = {"etc": "d", "etc/x": "f x"}


def refuse(words: str, *layers: Given, limits: Limits = Limits(), ended: bool = True) -> Case:  # noqa: B008
    return Case(layers=list(layers), refused=words, limits=limits, ended=ended)


def merge(merged: dict[str, str], *layers: Given) -> Case:
    return Case(layers=list(layers), merged=merged)


def _zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(data)


def _zstd_bomb() -> bytes:
    packer = zstandard.ZstdCompressor(level=3).compressobj()
    return b"".join(packer.compress(bytes(MIB)) for _ in range(1024)) + packer.flush()


@functools.cache
def _gzip_bomb() -> bytes:
    return gzip.compress(bytes(64 * MIB), 9) * 16


def _skippable(data: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A50, len(data)) + data


def _window(log: int) -> bytes:
    """A zstd frame that asks for a window of 2^log bytes: header, then one raw block of one byte."""
    return b"\x28\xb5\x2f\xfd" + bytes([0, (log - 10) << 3]) + struct.pack("<I", 1 | 1 << 3)[:3] + b"x"


def _numbered(count: int) -> bytes:
    return b"".join(head(b"n%d" % number) for number in range(count))


def _ten_million() -> bytes:
    """Ten million links, the first million each with a name and a target of its own."""
    parts = [
        gzip.compress(
            b"".join(s(b"n%d" % (at + number), b"some/where/%d" % number) for number in range(50_000)), 1
        )
        for at in range(0, 1_050_000, 50_000)
    ]
    return b"".join([*parts, *parts[:1] * 180])


WHOLE = f(b"a", b"1" * 600) + d(b"b") + f(b"b/c") + END
PAXED = pax(("path", b"long/" * 30 + b"x")) + head(b"short", size=3) + padded(b"abc") + END
LOOPS = b"".join(s(b"l%d" % number, b"l%d" % (number + 1)) for number in range(41))
CHAIN_40 = b"".join(s(b"l%d" % number, b"l%d" % (number + 1)) for number in range(40))

CASES: dict[str, Case] = {
    # Path escape
    "I1 upwards": refuse("leads upwards", f(b"../evil")),
    "I2 absolute upwards": refuse("leads upwards", f(b"/../evil")),
    "I3 absolute": merge(PLAIN, f(b"/etc/x")),
    "I3 many slashes": merge(PLAIN, f(b"///etc//x")),
    "I4 up in the middle": refuse("leads upwards", f(b"a/../../evil")),
    "I4 up inside": refuse("leads upwards", f(b"a/../b")),
    "I4 up at the end": refuse("leads upwards", d(b"a/b/..")),
    "I4 up by prefix": refuse("leads upwards", head(b"evil", prefix=b"..")),
    "I4 up by pax": refuse("leads upwards", pax(("path", b"../evil")) + head(b"good")),
    "I4 up by GNU name": refuse("leads upwards", gnu(b"L", b"../evil") + head(b"good")),
    "I5 dots and slashes": merge({"a": "d", "a/b": "f 2"}, f(b"a/b", b"1") + f(b"./././a//b", b"2")),
    "I7 no name": refuse("empty", s(b"", b"/etc/")),
    "I7 no name, file": refuse("empty", f(b"")),
    "I8 the root as a link": refuse("is no directory", s(b".", b"/etc"), f(b"passwd")),
    "I8 the root as a link, absolute": refuse("is no directory", s(b"/.", b"/etc"), f(b"passwd")),
    "I8 the root as a file": refuse("is no directory", f(b"./")),
    "I8 the root as a hard link": refuse("is no directory", f(b"a") + h(b"/", b"a")),
    "I9 the parent as a link": refuse("leads upwards", s(b"..", b"/etc/")),
    "I10 a parent as a link": refuse("leads upwards", d(b"localetc/sub") + s(b"localetc/sub/..", b"/etc")),
    # Symlink ancestor
    "I11 through an absolute link": merge(
        {"etc2": "s /etc", "etc": "d", "etc/passwd": "f x"}, s(b"etc2", b"/etc") + f(b"etc2/passwd")
    ),
    "I12 through a link upwards": merge(
        {"x": "s ../../../../..", "tmp": "d", "tmp/p": "f x"}, s(b"x", b"../../../../..") + f(b"x/tmp/p")
    ),
    "I13 through a chain": merge(
        {"a": "s /dummy/etc", "dummy": "d", "dummy/etc": "s /etc", "etc": "d", "etc/p": "f x"},
        s(b"a", b"/dummy/etc") + s(b"dummy/etc", b"/etc") + f(b"a/p"),
    ),
    "I13 through a dead link": merge(
        {"a": "s /no/where", "no": "d", "no/where": "d", "no/where/p": "f x"},
        s(b"a", b"/no/where") + f(b"a/p"),
    ),
    "I15 breakout": merge(
        {
            "inner": "d",
            "inner/go_up": "s ..",
            "escape": "s ../victim",
            "victim": "d",
            "victim/newfile": "f x",
        },
        s(b"inner/go_up", b"..") + s(b"inner/go_up/escape", b"../victim") + f(b"inner/go_up/escape/newfile"),
    ),
    "I16 across layers": merge(
        {"app": "s /", "etc": "d", "etc/cron.d": "d", "etc/cron.d/x": "f x"},
        s(b"app", b"/"),
        f(b"app/etc/cron.d/x"),
    ),
    "I16 to this process's files": merge(
        {
            "a": "s /proc/self/root/tmp",
            "proc": "d",
            "proc/self": "d",
            "proc/self/root": "d",
            "proc/self/root/tmp": "d",
            "proc/self/root/tmp/p": "f x",
        },
        s(b"a", b"/proc/self/root/tmp") + f(b"a/p"),
    ),
    "I19 a loop": refuse("leads through", s(b"a", b"b") + s(b"b", b"a") + f(b"a/x")),
    "I19 a link to itself": refuse("leads through", s(b"a", b"a") + f(b"a/x")),
    "I19 a loop that grows": refuse("leads through", s(b"a", b"a/a") + f(b"a/x")),
    "I20 41 links": refuse("leads through", LOOPS + d(b"l41") + f(b"l0/x")),
    "I20 40 links": merge(
        {**{f"l{number}": f"s l{number + 1}" for number in range(40)}, "l40": "d", "l40/x": "f x"},
        CHAIN_40 + d(b"l40") + f(b"l0/x"),
    ),
    "I20 through a file": refuse("no directory", f(b"a") + f(b"a/x")),
    "I20 through a pipe": refuse("no directory", head(b"a", b"6") + f(b"a/x")),
    "I21 a target of 4,096 bytes": refuse("none that Linux takes", s(b"a", b"t" * 4096)),
    "I21 a target of 4,095 bytes": merge({"a": "s " + "t" * 4095}, s(b"a", b"t" * 4095)),
    "I21 NUL in a target": refuse("none that Linux takes", s(b"a", b"b\0c")),
    "I21 no target": refuse("none that Linux takes", s(b"a", b"")),
    "I21 newline in a target": merge({"a": "s b\nc"}, s(b"a", b"b\nc")),
    "I22 a dead link stays": merge({"bin": "d", "bin/sh": "s /missing"}, s(b"bin/sh", b"/missing")),
    # Hard link
    "I24 upwards": refuse("leads upwards", h(b"p", b"../victim/hello")),
    "I24 absolute upwards": refuse("leads upwards", h(b"p", b"/../victim/hello")),
    "I24 by pax": refuse("leads upwards", pax(("linkpath", b"../victim/hello")) + h(b"p", b"x")),
    "I24 by GNU name": refuse("leads upwards", gnu(b"K", b"../victim/hello") + h(b"p", b"x")),
    "I25 absolute, nothing there": refuse("not there", h(b"p", b"/etc/passwd")),
    "I25 absolute": merge(
        {"etc": "d", "etc/passwd": "f x", "p": "h etc/passwd"}, f(b"etc/passwd") + h(b"p", b"/etc/passwd")
    ),
    "I26 through a link": refuse("not there", s(b"d1", b"../../etc") + h(b"my", b"d1/passwd")),
    "I26 through a link, inside": merge(
        {"d1": "s ../../etc", "etc": "d", "etc/passwd": "f x", "my": "h etc/passwd"},
        s(b"d1", b"../../etc") + f(b"etc/passwd") + h(b"my", b"d1/passwd"),
    ),
    "I26 to a link": merge({"a": "s b", "c": "s b"}, s(b"a", b"b") + h(b"c", b"a")),
    "I26 to itself": refuse("not there", h(b"a", b"a")),
    "I26 to itself, there": merge({"a": "f x"}, f(b"a") + h(b"a", b"a")),
    "I26 no target": refuse("empty", h(b"a", b"")),
    "I29 to a directory": refuse("no file", d(b"a") + h(b"b", b"a")),
    "I29 to the root": refuse("no file", h(b"b", b"/")),
    "I30 to a device": refuse("no file", device(b"null", b"3", 1, 3) + h(b"b", b"null")),
    "I30 to a pipe": refuse("no file", head(b"p", b"6") + h(b"b", b"p")),
    "I30 to a whiteout": refuse("marker", f(b"a"), f(b".wh.a", b"") + h(b"b", b".wh.a")),
    "I31 to a file whited out before": refuse("not there", f(b"a"), f(b".wh.a", b"") + h(b"b", b"a")),
    "I31 to a file whited out after": refuse("removes", f(b"a"), h(b"b", b"a") + f(b".wh.a", b"")),
    "I31 to a file hidden after": refuse("removes", f(b"d/a"), h(b"b", b"d/a") + f(b"d/.wh..wh..opq", b"")),
    "I31 across layers": merge({"a": "f x", "b": "h a"}, f(b"a"), h(b"b", b"a")),
    "I31 first name removed later": merge({"b": "f x"}, f(b"a") + h(b"b", b"a"), f(b".wh.a", b"")),
    "I32 100,000 names": refuse(
        "more than 65000 names",
        lambda: f(b"a") + b"".join(h(b"h%d" % number, b"a") for number in range(100_000)),
    ),
    # Whiteouts
    "I34 of the directory itself": refuse("names no file", f(b".wh..", b"")),
    "I35 of the parent": refuse("names no file", f(b".wh...", b"")),
    "I35 of the parent, below": refuse("names no file", f(b"etc/.wh...", b"")),
    "I36 of nothing": refuse("names no file", f(b".wh.", b"")),
    "I36 of nothing, below": refuse("names no file", f(b"a/x"), f(b"a/.wh.", b"")),
    "I36 a directory of that name": refuse("marker", f(b".wh.a/b")),
    "I36 made by a link": refuse("marker", s(b"a", b".wh.b") + f(b"a/c")),
    "I37 through a link": merge(
        {"localetc": "s /etc", "etc": "d"},
        s(b"localetc", b"/etc") + f(b"etc/passwd"),
        f(b"localetc/.wh.passwd"),
    ),
    "I38 of a link": merge(PLAIN, s(b"localetc", b"/etc") + f(b"etc/x"), f(b".wh.localetc", b"")),
    "I39 opaque through a link": merge(
        {"l": "s etc", "etc": "d"}, s(b"l", b"etc") + f(b"etc/x"), f(b"l/.wh..wh..opq", b"")
    ),
    "I39 opaque outside": merge({"l": "s ../../victim"}, s(b"l", b"../../victim"), f(b"l/.wh..wh..opq", b"")),
    "I40 opaque last": merge(
        {"a": "d", "a/new": "f n"}, f(b"a/old", b"o"), f(b"a/new", b"n") + f(b"a/.wh..wh..opq", b"")
    ),
    "I40 opaque first": merge(
        {"a": "d", "a/new": "f n"}, f(b"a/old", b"o"), f(b"a/.wh..wh..opq", b"") + f(b"a/new", b"n")
    ),
    "I40 opaque of the root": merge(
        {"new": "f n"}, f(b"a/old", b"o"), f(b"new", b"n") + f(b".wh..wh..opq", b"")
    ),
    "I40 opaque above": merge(
        {"a": "d", "a/b": "d", "a/b/new": "f n"},
        f(b"a/b/old", b"o"),
        f(b"a/b/new", b"n") + f(b"a/.wh..wh..opq", b""),
    ),
    "I40 whiteout and again": merge({"a": "f 2"}, f(b"a/b", b"1"), f(b"a", b"2") + f(b".wh.a", b"")),
    "I40 whiteout, a directory again": merge(
        {"a": "d", "a/new": "f n"}, f(b"a/old"), d(b"a") + f(b"a/new", b"n") + f(b".wh.a", b"")
    ),
    "I40 removed, then made by a later layer": merge(
        {"a": "d", "a/new": "f n"}, f(b"a/old"), f(b".wh.a", b""), f(b"a/new", b"n")
    ),
    "I40 of what is not there": merge({"b": "f x"}, f(b"b"), f(b".wh.a", b"") + f(b"c/.wh.d", b"")),
    "I42 AUFS metadata": merge(
        {"a": "f x"}, f(b".wh..wh.plnk/123") + f(b".wh..wh.aufs", b"") + f(b"q/.wh..wh.orph") + f(b"a")
    ),
    "I45 an overlay whiteout": refuse("device", f(b"a"), device(b"a", b"3", 0, 0)),
    "I45 an overlay attribute": merge(
        {"a": "d", "a/b": "f x"}, f(b"a/b"), pax(("SCHILY.xattr.trusted.overlay.opaque", b"y")) + d(b"a")
    ),
    # Types and metadata
    "I46 memory": refuse("device", device(b"c", b"3", 1, 1)),
    "I46 a disk": refuse("device", device(b"sda", b"4", 8, 0)),
    "I46 a disk with a harmless number": refuse("device", device(b"null", b"4", 1, 3)),
    "I46 null": merge({"dev": "d", "dev/null": "c 1:3"}, device(b"dev/null", b"3", 1, 3)),
    "I46 huge numbers": refuse("out of range", head(b"x", b"3", major=binary(1 << 40, 8))),
    "I48 a pipe": merge({"p": "p"}, head(b"p", b"6")),
    "I49 unknown type": refuse("unknown type", f(b"a", flag=b"Z")),
    "I49 a socket's type": refuse("unknown type", f(b"a", flag=b"s")),
    "I49 a volume": refuse("unknown type", f(b"a", flag=b"V")),
    "I49 a continued file": refuse("unknown type", f(b"a", flag=b"M")),
    "I49 a sparse file": refuse("unknown type", f(b"a", flag=b"S")),
    "I49 a sparse file by pax": refuse("sparse", pax(("GNU.sparse.major", b"1")) + f(b"a")),
    "I49 a sparse file of star": refuse("sparse", pax(("SCHILY.realsize", b"9")) + f(b"a")),
    "I49 contiguous": merge({"a": "f x"}, f(b"a", flag=b"7")),
    "I49 old style": merge({"a": "f x", "b": "d"}, f(b"a", flag=b"\0") + head(b"b/", b"\0")),
    "I50 setuid": merge({"a": "f x"}, f(b"a", mode=b"0006755")),
    "I51 a name with NUL": refuse("attribute name", pax(("SCHILY.xattr.user.\0", b"y")) + f(b"a")),
    "I51 a long name": refuse("attribute name", pax(("SCHILY.xattr." + "u" * 256, b"y")) + f(b"a")),
    "I51 no name": refuse("attribute name", pax(("SCHILY.xattr.", b"y")) + f(b"a")),
    "I51 a large value": refuse("65536 bytes", pax(("SCHILY.xattr.user.a", b"y" * 65537)) + f(b"a")),
    "I52 owner -1": refuse("out of range", f(b"a", uid=binary(2**32 - 1, 8))),
    "I52 group -1": refuse("out of range", f(b"a", gid=binary(2**32 - 1, 8))),
    "I52 owner over 2^32": refuse("out of range", pax(("uid", b"4294967296")) + f(b"a")),
    "I52 negative": refuse("out of range", f(b"a", uid=binary(-1, 8))),
    "I52 negative by pax": refuse("not a number", pax(("gid", b"-1")) + f(b"a")),
    "I52 by name": refuse("not a number", pax(("uid", b"root")) + f(b"a")),
    "I52 in other digits": refuse("not a number", pax(("uid", "٣".encode())) + f(b"a")),
    "I52 the largest": merge({"a": "f x"}, f(b"a", uid=binary(2**32 - 2, 8))),
    "I52 10,000 digits": refuse("not a number", pax(("uid", b"1" * 10_000)) + f(b"a")),
    "I53 inf": refuse("not a number", pax(("mtime", b"inf")) + f(b"a")),
    "I53 nan": refuse("not a number", pax(("mtime", b"nan")) + f(b"a")),
    "I53 before 1970": merge({"a": "f x"}, pax(("mtime", b"-1.5")) + f(b"a")),
    "I53 before 1970, binary": merge({"a": "f x"}, f(b"a", mtime=binary(-5, 12))),
    "I53 year 10^9": merge({"a": "f x"}, pax(("mtime", b"31556952000000000.5")) + f(b"a")),
    "I53 an exponent": refuse("not a number", pax(("mtime", b"1e999")) + f(b"a")),
    # Names
    "I54 control characters": merge(
        {"a\nb": "f x", "\x1b]0;t\x07": "f x", "\r": "f x"}, f(b"a\nb") + f(b"\x1b]0;t\x07") + f(b"\r")
    ),
    "I54 a shell's": merge(
        dict.fromkeys(('"', "'", "`id`", "$(id)", "%s", "-rf", "a b", "\\", "*", "a\tb"), "f x"),
        b"".join(
            f(name) for name in (b'"', b"'", b"`id`", b"$(id)", b"%s", b"-rf", b"a b", b"\\", b"*", b"a\tb")
        ),
    ),
    "I54 escaped in the reason": refuse("\\x1b]0;t\\x07", f(b"\x1b]0;t\x07\r\n/../a")),
    "I55 no UTF-8": merge({"\udcff\udcfe": "f x"}, f(b"\xff\xfe")),
    "I55 overlong": merge({"\udcc0\udcaf": "f x"}, f(b"\xc0\xaf")),
    "I55 bidirectional": merge({"a\u202eb": "f x"}, f("a\u202eb".encode())),
    "I55 escaped in the reason": refuse("\\u202e\\udcff", f("\u202e".encode() + b"\xff/../a")),
    "I56 NUL by pax": refuse("NUL", pax(("path", b"../evil\0x")) + f(b"a")),
    "I56 NUL by GNU name": refuse("NUL", gnu(b"L", b"good\0/../evil") + f(b"a")),
    "I56 NUL in a hard link": refuse("NUL", f(b"a") + pax(("linkpath", b"a\0b")) + h(b"b", b"a")),
    "I57 a part of 256 bytes": refuse("255 bytes", f(b"n" * 256)),
    "I57 a part of 255 bytes": merge({"n" * 255: "f x"}, f(b"n" * 255)),
    "I57 a part of 256 bytes by a link": refuse("255 bytes", s(b"a", b"n" * 256) + f(b"a/x")),
    "I57 a path of 4,096 bytes": refuse("4095 bytes", f(b"abc/" * 1023 + b"abcd")),
    "I57 1,001 deep": refuse("deep", f(b"d/" * 1001 + b"f")),
    "I57 deep by links": refuse(
        "too deep", d(b"d/" * 800) + s(b"l", b"d/" * 800) + f(b"l/" + b"e/" * 300 + b"f")
    ),
    "I57 long by links": refuse(
        "too deep",
        d((b"d" * 200 + b"/") * 15)
        + s(b"l", (b"d" * 200 + b"/") * 15)
        + f(b"l/" + (b"e" * 200 + b"/") * 10 + b"f"),
    ),
    "I57 many long ways": refuse(
        "all of them together",
        lambda: b"".join(f(b"d/" * 999 + b"f%d" % number) for number in range(200)),
        limits=Limits(entries=5000),
    ),
    "I58 last wins": merge({"a": "f 2"}, f(b"a", b"1") + d(b"a") + s(b"a", b"/etc/passwd") + f(b"a", b"2")),
    "I58 not through a link": merge(
        {"a": "f 2", "etc": "d", "etc/x": "f x"}, f(b"etc/x") + s(b"a", b"etc/x") + f(b"a", b"2")
    ),
    "I58 a directory in place of a link": merge(
        {"a": "d", "a/y": "f x", "etc": "d", "etc/x": "f x"},
        f(b"etc/x") + s(b"a", b"etc"),
        d(b"a") + f(b"a/y"),
    ),
    "I58 a file in place of a directory": merge({"a": "f x"}, f(b"a/b/c"), f(b"a")),
    "I58 case is kept apart": merge({"A": "f 1", "a": "f 2"}, f(b"A", b"1") + f(b"a", b"2")),
    "I60 lost+found": merge({"lost+found": "d", "lost+found/a": "f x"}, f(b"lost+found/a")),
    "I60 lost+found as a file": merge({"lost+found": "f x"}, f(b"lost+found")),
    # Size and parser
    "I62 a size of 10^14": refuse("range", pax(("size", b"99999999999999")) + f(b"a")),
    "I62 a size that is not there": refuse("cut off", pax(("size", b"9999999999")) + f(b"a")),
    "I62 a size of -1": refuse("not a number", pax(("size", b"-1")) + f(b"a")),
    "I62 a negative binary size": refuse("range", head(b"a", size=binary(-1, 12))),
    "I62 the most negative size": refuse("range", head(b"a", size=b"\xff" + bytes(11))),
    "I62 a negative octal size": refuse("not a number", head(b"a", size=b"-0000000001")),
    "I62 a size with an underscore": refuse("not a number", head(b"a", size=b"000_0000001")),
    "I62 a size of no digits": refuse("not a number", head(b"a", size=b"0000000009z")),
    "I62 an extended header of -1": refuse("extended headers", head(b"p", b"x", size=binary(-512, 12))),
    "I62 a wrong checksum": refuse("checksum", head(b"a", chksum=b"000001\0 ")),
    "I62 no checksum": refuse("checksum", head(b"a", chksum=b"")),
    "I62 not a tar": refuse("not a number", b"\x7fELF" + b"\xee" * 2044, ended=False),
    "I62 nothing": refuse("cut off", b"", ended=False),
    "I62 text": refuse("cut off", b"hello", ended=False),
    "I64 1 GiB": refuse("extended headers", head(b"p", b"x", size=1 << 30)),
    "I64 a long name of 1 GiB": refuse("extended headers", head(b"p", b"L", size=1 << 30)),
    "I64 10^6 keys": refuse(
        "extended headers", lambda: raw_pax(b"".join(record(str(n), b"") for n in range(10**6)))
    ),
    "I64 10^4 keys": refuse("records", lambda: raw_pax(b"".join(record(str(n), b"") for n in range(10**4)))),
    "I64 many headers for one entry": refuse("extended headers", pax(("comment", b"c" * 1000)) * 1000),
    "I64 many global headers": refuse("extended headers", pax(("comment", b"c" * 1000), flag=b"g") * 1000),
    "I64 a global path": refuse("global", pax(("path", b"x"), flag=b"g") + f(b"a")),
    "I64 a global size": refuse("global", pax(("size", b"1"), flag=b"g") + f(b"a")),
    "I64 a global link path": refuse("global", pax(("linkpath", b"1"), flag=b"g") + f(b"a")),
    "I64 a global owner": refuse("global", pax(("uid", b"0"), flag=b"g") + f(b"a")),
    "I64 a global attribute": refuse("global", pax(("SCHILY.xattr.user.a", b"0"), flag=b"g") + f(b"a")),
    "I64 a global remark": merge({"a": "f x"}, pax(("comment", b"x"), flag=b"g") + f(b"a")),
    "I64 a record of length 0": refuse("malformed", raw_pax(b"0 a=b\n") + f(b"a")),
    "I64 a record too long": refuse("malformed", raw_pax(b"99 a=b\n") + f(b"a")),
    "I64 a record too short": refuse("malformed", raw_pax(b"3 a=b\n") + f(b"a")),
    "I64 a record without key": refuse("malformed", raw_pax(b"5 =b\n") + f(b"a")),
    "I64 a record of a huge length": refuse("malformed", raw_pax(b"9" * 5000 + b" a=b\n") + f(b"a")),
    "I64 a record without newline": refuse("malformed", raw_pax(b"6 a=bc") + f(b"a")),
    "I64 for no entry": refuse("followed by no entry", f(b"a") + pax(("path", b"x"))),
    "I64 two names": refuse("two names", gnu(b"L", b"x") + pax(("path", b"y")) + f(b"a")),
    "I65 zstd bomb": refuse("bomb", lambda: Blob(packed=_zstd_bomb())),
    "I65 zstd twice": refuse(
        "not a number", lambda: Blob(packed=_zstd(_zstd(bytes(1 << 26)).ljust(2048, b"\1")))
    ),
    "I65 gzip bomb": refuse("bomb", lambda: Blob(packed=_gzip_bomb())),
    "I65 a bomb in an upper layer": refuse("Layer 2", f(b"a"), lambda: Blob(packed=_gzip_bomb())),
    "I65 a bomb inside a file": refuse(
        "bomb", lambda: Blob(packed=gzip.compress(head(b"a", size=1 << 30)) + _gzip_bomb())
    ),
    "I65 more than the limit": refuse("more than 1 MiB", f(b"a", bytes(2 * MIB)), limits=Limits(size=MIB)),
    "I65 layers together": refuse(
        "Layer 2", f(b"a", bytes(600_000)), f(b"b", bytes(600_000)), limits=Limits(size=MIB)
    ),
    "I65 10^7 entries": refuse("more than 1000000 entries", lambda: Blob(packed=_ten_million())),
    "I65 too many entries": refuse("more than 50000 entries", lambda: _numbered(50_001), limits=SMALL),
    "I65 too many entries in all": refuse(
        "Layer 2", lambda: _numbered(30_000), lambda: _numbered(30_000), limits=SMALL
    ),
    "I65 too many entries nobody names": refuse(
        "more than 50000 entries",
        lambda: b"".join(f(b"%d/" % number + b"d/" * 400 + b"f") for number in range(130)),
        limits=SMALL,
    ),
    "I65 too much text": refuse(
        "memory",
        lambda: b"".join(s(b"%d" % number, b"t" * 4000) for number in range(300)),
        limits=Limits(text=MIB),
    ),
    "I65 gzip members": refuse("members", lambda: Blob(packed=gzip.compress(b"", 1) * 10**6)),
    "I65 gzip members of one byte": refuse("members", lambda: Blob(packed=gzip.compress(b"\0", 1) * 10**6)),
    "I65 members for each entry": Case(
        layers=[
            Blob(packed=b"".join(map(gzip.compress, (f(b"a"), f(b"b"), END))), tar=f(b"a") + f(b"b") + END)
        ],
        merged={"a": "f x", "b": "f x"},
    ),
    "I65 skippable frames": Case(
        layers=[
            Blob(packed=_skippable(b"junk") + _zstd(f(b"a") + END) + _skippable(b"more"), tar=f(b"a") + END)
        ],
        merged={"a": "f x"},
    ),
    "I65 10^6 skippable frames": refuse("cut off", lambda: Blob(packed=_skippable(b"") * 10**6)),
    "I65 a window of 2^31": refuse("zstd stream is damaged", Blob(packed=_window(31))),
    "I65 a window of 2^27": refuse("cut off", Blob(packed=_window(27))),
    "I65 garbage after gzip": refuse("gzip stream", Blob(packed=gzip.compress(f(b"a") + END) + b"junk" * 9)),
    "I65 garbage after zstd": refuse("zstd stream", Blob(packed=_zstd(f(b"a") + END) + b"junk" * 9)),
    "I65 a cut gzip": refuse("cut off", Blob(packed=gzip.compress(f(b"a") + END)[:-9])),
    "I65 a gzip with a wrong sum": refuse(
        "damaged", Blob(packed=gzip.compress(f(b"a") + END)[:-8] + bytes(8))
    ),
    "I65 a cut zstd": refuse("cut off", Blob(packed=_zstd(f(b"a", bytes(range(256)) * 99) + END)[:-90])),
    "I65 another content": refuse(
        "as the image says", Blob(packed=gzip.compress(f(b"a") + END), tar=f(b"b") + END)
    ),
    "I65 content after the end": merge({"a": "f x"}, f(b"a") + END + f(b"b")),
    "I65 one block of zeros": refuse("one block of zeros", f(b"a") + bytes(512) + f(b"b")),
}


def truncated() -> Iterator[tuple[str, Case]]:
    """Cut good archives at each of their blocks, also between the two blocks of zeros."""
    for name, tar in (("plain", WHOLE), ("pax", PAXED)):
        for block in range(len(tar) // 512):
            yield f"I62 {name} cut at block {block}", refuse("cut off", tar[: block * 512], ended=False)
            if block % 2:
                yield (
                    f"I62 {name} cut in block {block}",
                    refuse("cut off", tar[: block * 512 + 100], ended=False),
                )


CASES |= dict(truncated())
