"""The reader and the merge under headers that nobody thought of, and under sane ones that must come back."""

from __future__ import annotations

import io
import os
import random
import tarfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger.errors import InvalidImage
from banger.images.layers.tarstream import LARGEST_OWNER, LATEST, Entry, Kind, entries
from banger.images.layers.tarwriter import Member, header
from banger.images.layers.tree import Tree
from tests.images.tarbytes import END, gnu, head, pax, raw_pax, record

CASES = 100_000
MOST_EXTRA = 1 << 20


class Held:
    """A stream of bytes that are all here."""

    def __init__(self, data: bytes):
        self.data = data
        self.position = 0

    def read(self, size: int) -> bytes:
        assert 0 <= size <= MOST_EXTRA + 512, "more was asked for than any header may have"
        self.skip(size)
        return self.data[self.position - size : self.position]

    def skip(self, size: int) -> None:
        assert size >= 0
        if self.position + size > len(self.data):
            raise InvalidImage("It is cut off.")
        self.position += size


def members(*layers: bytes) -> list[Member]:
    return list(merged(layers, []).members())


def merged(layers: Sequence[bytes], seen: list[Entry]) -> Tree:
    """Merge layers; `seen` gets the entries that were reached, also before a refusal."""
    tree = Tree(10_000, 1 << 20)
    for layer in layers:
        tree.begin_layer()
        for entry in entries(Held(layer), MOST_EXTRA):
            seen.append(entry)
            tree.add(entry)
        tree.end_layer()
    return tree


def check(found: list[Member], *layers: bytes) -> None:
    """Check what must hold of every merged tree, whatever it was made from."""
    kinds = {member.path: member.kind for member in found}
    assert len(kinds) == len(found)
    assert found[0].path == b"."
    for member in found[1:]:
        parts = member.path.split(b"/")
        assert not {b"", b".", b".."} & set(parts)
        assert b"\0" not in member.path
        assert not any(part.startswith(b".wh.") or len(part) > 255 for part in parts)
        above, _, _ = member.path.rpartition(b"/")
        assert not above or kinds[above] is Kind.DIRECTORY
        assert member.first is None or kinds[member.first] is member.kind is Kind.FILE
        assert member.kind is not Kind.BLOCK_DEVICE
        assert member.mode <= 0o7777
        assert max(member.uid, member.gid) <= LARGEST_OWNER
        assert member.mtime <= LATEST
        assert member.offset + member.size <= len(layers[member.layer - 1]) or member.kind is not Kind.FILE
    with tarfile.open(fileobj=io.BytesIO(_written(found))) as tar:
        assert len(tar.getmembers()) == len(found)


def _written(found: list[Member]) -> bytes:
    """Write the members as an archive, their data left out."""
    return (
        b"".join(
            header(member) + bytes(-(-member.size // 512) * 512 if member.first is None else 0)
            for member in found
        )
        + END
    )


NAMES = [
    b"a", b"b", b"a/b", b"a/b/c", b"/etc/passwd", b"../x", b"a/../b", b".", b"", b"/", b"./", b"//a//", b"l",
    b"l/x", b".wh.a", b"a/.wh.b", b".wh..wh..opq", b"a/.wh..wh..opq", b".wh.", b".wh..", b".wh..wh.plnk/1",
    b"\xff\n\x1b", b"n" * 100, b"d/" * 40 + b"f",
]  # fmt: skip
TARGETS = [
    b"a",
    b"b",
    b"/",
    b"..",
    b"../../..",
    b"l",
    b"/etc/passwd",
    b"a/b",
    b"",
    b".",
    b"x" * 100,
    b".wh.a",
]
FIELDS = {
    "mode": [b"0000644", b"0006777", b"9999999", b"\xff" * 8, b"\x80" + bytes(7)],
    "uid": [b"0000000", b"7777777", b"\xff" * 8, b"\x80\0\0\0\xff\xff\xff\xff", b"-1", b" 12 "],
    "gid": [b"0000000", b"\x80\0\0\1\0\0\0\0", b"", b"0x1"],
    "size": [
        b"00000000000", b"00000000001", b"00000001000", b"77777777777", b"\xff" * 12, b"1_0",
        b"\x80" + b"\xff" * 11,
    ],
    "mtime": [b"00000001000", b"77777777777", b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"inf"],
    "magic": [b"ustar\00000", b"ustar  \0", bytes(8), b"ustar\x0099"],
    "prefix": [b"", b"..", b"a", b"p" * 155, b"/"],
    "major": [b"0000001", b"0000005", b"\xff" * 8],
    "minor": [b"0000003", b"0000000", b"7777777"],
    "chksum": [b"000000\0 ", b"", b"7777777"],
}  # fmt: skip
FLAGS = [
    b"0",
    b"0",
    b"1",
    b"2",
    b"2",
    b"3",
    b"4",
    b"5",
    b"5",
    b"6",
    b"7",
    b"\0",
    b"x",
    b"g",
    b"L",
    b"K",
    b"S",
    b"Z",
]
RECORDS = [
    ("path", b"a"), ("path", b"../x"), ("path", b"a\0b"), ("size", b"1"), ("size", b"-1"),
    ("size", b"9" * 14), ("linkpath", b"b"), ("linkpath", b"/../x"), ("uid", b"4294967295"),
    ("mtime", b"nan"), ("mtime", b"1.5"),
    ("SCHILY.xattr.user.a", b"1"), ("SCHILY.xattr.trusted.b", b"2"), ("GNU.sparse.size", b"3"),
    ("comment", b"c"),
]  # fmt: skip


def random_header(dice: random.Random) -> bytes:
    """Make a header with some odd fields, some bits flipped, or an extended one before it."""
    odd = {key: dice.choice(values) for key, values in FIELDS.items() if dice.random() < 0.02}
    data = bytearray(head(dice.choice(NAMES), dice.choice(FLAGS), target=dice.choice(TARGETS), **odd))
    if dice.random() < 0.05:
        for _ in range(dice.randrange(1, 9)):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    if dice.random() < 0.15:
        records = dice.sample(RECORDS, dice.randrange(1, 4))
        return pax(*records, flag=dice.choice([b"x", b"x", b"x", b"g"])) + bytes(data)
    return (
        gnu(dice.choice([b"L", b"K"]), dice.choice(NAMES)) + bytes(data)
        if dice.random() < 0.05
        else bytes(data)
    )


def random_layer(dice: random.Random) -> bytes:
    return b"".join(random_header(dice) for _ in range(dice.randrange(1, 6))) + END


def look(place: Path) -> list[tuple[str, os.stat_result]]:
    return [(str(path), path.lstat()) for path in [place, *sorted(place.rglob("*"))]]


def test_no_header_gets_further_than_the_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 100,000 odd headers makes a sane tree or a printable refusal; no file is touched."""
    (tmp_path / "work").mkdir()
    (tmp_path / "a").write_text("untouched")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text("untouched")
    monkeypatch.chdir(tmp_path / "work")
    before, seed, headers, refused, taken = look(tmp_path), 0, 0, 0, 0
    while headers < CASES:
        dice = random.Random(seed)
        seed += 1
        layers = [random_layer(dice) for _ in range(dice.randrange(1, 4))]
        seen: list[Entry] = []
        try:
            found = list(merged(layers, seen).members())
        except InvalidImage as error:
            printable = error.message.isprintable()
            refused += 1
        else:
            check(found, *layers)
            printable = True
            taken += 1
        assert printable, f"the refusal of seed {seed - 1}"
        headers += max(len(seen), 1)
    assert look(tmp_path) == before
    assert min(refused, taken) > CASES // 100, "the dice make only one kind"


def test_long_paths_are_not_kept() -> None:
    """Hard links to files in a directory of 4,000 bytes take no more memory than others."""
    long = b"/".join([b"n" * 250] * 15)
    tar = pax(("linkpath", long)) + head(b"m", b"2")
    tar += b"".join(head(b"m/%d" % n) + head(b"z%d" % n, b"1", target=b"m/%d" % n) for n in range(4000))
    tree = merged([tar + END], [])
    tracemalloc.start()
    linked = sum(member.first == long + b"/" + member.path[1:] for member in tree.members())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert linked == 4000
    assert peak < 2_000_000


names = st.lists(
    st.binary(min_size=1, max_size=255).filter(
        lambda name: (
            not {b"/", b"\0"} & {name[at : at + 1] for at in range(len(name))}
            and name not in (b".", b"..")
            and not name.startswith(b".wh.")
        )
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(
    parts=names,
    kind=st.sampled_from([Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK, Kind.FIFO]),
    mode=st.integers(0, 0o7777),
    owners=st.tuples(st.integers(0, LARGEST_OWNER), st.integers(0, LARGEST_OWNER)),
    mtime=st.integers(0, LATEST),
    target=st.binary(min_size=1, max_size=4095).filter(lambda target: b"\0" not in target),
    xattrs=st.dictionaries(
        st.binary(min_size=1, max_size=250).filter(lambda name: not {0, ord("=")} & set(name)),
        st.binary(max_size=2000),
    ),
)
def test_what_is_written_is_read_back(
    parts: list[bytes],
    kind: Kind,
    mode: int,
    owners: tuple[int, int],
    mtime: int,
    target: bytes,
    xattrs: dict[bytes, bytes],
) -> None:
    """Our reader finds in our writer's archive what was put in, and the same again the second time."""
    extra = [(b"SCHILY.xattr.user." + name, value) for name, value in sorted(xattrs.items())]
    link = target if kind is Kind.SYMLINK else b""
    tar = (
        raw_pax(b"".join(record(key, value) for key, value in [
            (b"path", b"/".join(parts)), (b"uid", b"%d" % owners[0]), (b"gid", b"%d" % owners[1]),
            (b"mtime", b"%d" % mtime), *([(b"linkpath", link)] if link else []), *extra,
        ]))
        + head(b"x", b"%d" % kind, mode=b"%07o" % mode)
        + END
    )  # fmt: skip
    once = members(tar)
    last = once[-1]
    assert (last.path, last.kind, last.mode, last.uid, last.gid) == (b"/".join(parts), kind, mode, *owners)
    assert (last.mtime, last.target) == (mtime, link)
    if kind in (Kind.FILE, Kind.DIRECTORY):
        assert last.xattrs == b"".join(record(key, value) for key, value in extra)
    assert [_plain(member) for member in members(_written(once))] == [_plain(member) for member in once]


def _plain(member: Member) -> tuple[object, ...]:
    """Leave out where the data is."""
    return (
        member.path, member.kind, member.mode, member.uid, member.gid, member.mtime, member.size,
        member.target if member.kind is Kind.SYMLINK else b"", member.device, member.xattrs, member.first,
    )  # fmt: skip
