"""Merge the layers of an image in memory: names and numbers only, nothing of it on any file system.

The rules are those of the OCI image specification (layer.md, "Applying Changesets"), with one more:
a path is followed inside the tree only, so a symbolic link may lead anywhere and reaches nothing of the host.

A million entries must fit into 256 MiB, so there is no object for each of them: a name is a key of one
dictionary, an inode is a row of a few arrays, and texts lie one behind another in one heap.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from banger.errors import InvalidImage
from banger.images.layers.names import DEEPEST, LONGEST_NAME, LONGEST_PATH, shown, split
from banger.images.layers.tarstream import Entry, Kind
from banger.images.layers.tarwriter import Member, record

MOST_LAYERS = 255
MOST_LINKS = 65_000
"""ext4's limit of names for one file."""

MOST_FOLLOWED = 40
"""Linux's limit of symbolic links on the way to a file (path_resolution(7))."""

DEVICES = frozenset(
    [
        *((1, minor) for minor in (3, 5, 7, 8, 9)),  # null, zero, full, random, urandom
        *((4, minor) for minor in range(64)),  # tty0 and on
        *((5, minor) for minor in (0, 1, 2)),  # tty, console, ptmx
        (10, 200),  # net/tun
        (10, 229),  # fuse
    ]
)
"""Character devices that any guest may have in its image: Linux' admin-guide/devices.txt. No block device."""

_ROOT = 0
_DIRECTORY_MODE = 0o755
_WHITEOUT = b".wh."
_META = b".wh..wh."  # of AUFS, as is the whole scheme
_OPAQUE = b".wh..wh..opq"
_STEPS_AN_ENTRY = 20  # directories on the way, on average; real images have 4 to 8
_LAYER_BITS = 8
_LAYER = (1 << _LAYER_BITS) - 1
_parent = struct.Struct(">I").pack


@dataclass(slots=True)
class _Place:
    """A directory that was reached: only its children of layer `floor` and later are there.

    `length` is its path's, in bytes; `trail` holds the same three of each directory above it.
    """

    inode: int
    floor: int
    length: int
    trail: list[tuple[int, int, int]]


class Tree:
    """The tree that the layers make. Feed it entries with `add`, oldest layer first; read it with `members`.

    A name's value is its inode and the last layer that mentioned it, also as somebody's parent. A lower
    layer's subtree is hidden, not removed: an opaque directory shows only what its layer and later ones
    mentioned. That is why it does not matter where in a layer the marker stands.
    """

    def __init__(self, most_entries: int, most_text: int):
        self.warnings: dict[str, int] = {}
        self._room = most_entries
        self._most_entries = most_entries
        self._text_room = most_text
        self._steps = _STEPS_AN_ENTRY * most_entries
        self._layer = 0
        self._names: dict[bytes, int] = {}
        self._heap = bytearray()
        self._links_down: list[bytes] = []
        self._kind = array("B")
        self._mode = array("H")
        self._uid = array("I")
        self._gid = array("I")
        self._mtime = array("I")
        self._made = array("B")  # the layer whose metadata and data these are
        self._opaque = array("B")  # of a directory: the layer that hid what was below
        self._links = array("I")
        self._offset = array("Q")  # of data in its layer; of a target in the heap; of a device, its number
        self._size = array("Q")
        self._xattrs = array("Q")  # heap offset and length; 0 for none
        self._inode(Kind.DIRECTORY, _DIRECTORY_MODE)

    def begin_layer(self) -> None:
        """Begin the next layer. Raises InvalidImage for one too many."""
        self._layer += 1
        if self._layer > MOST_LAYERS:
            raise InvalidImage(f"It has more than {MOST_LAYERS} layers.")

    def add(self, entry: Entry) -> None:
        """Put an entry of the current layer into the tree. Raises InvalidImage."""
        self._count()
        parts = split(entry.path)
        if not parts:
            self._set_root(entry)
            return
        name = parts[-1]
        if b".wh." in entry.path and any(part.startswith(_WHITEOUT) for part in parts):
            self._whiteout(parts, name)
            return
        parent = self._walk(parts[:-1], create=True)
        assert parent is not None
        self._check_place(parent, name)
        if entry.kind is Kind.DIRECTORY:
            self._put_directory(parent, name, entry)
        elif entry.kind is Kind.HARD_LINK:
            self._put_link(parent, name, entry)
        else:
            self._name(parent.inode, name, self._new(entry))

    def end_layer(self) -> None:
        """Check what can be known only now: no link to a lower file that this layer removes."""
        for path in self._links_down:
            if self._find(split(path)) is None:
                raise InvalidImage(f"It links to {shown(path)}, which the same layer removes.")
        self._links_down.clear()

    def members(self) -> Iterator[Member]:
        """Give the merged tree: the root first, as `.`, parents before children, by name."""
        keys = sorted(self._names)
        # Where each inode's first name is, from 1 on. A path may have 4 KiB, a million of them do not fit.
        first = array("I", bytes(4 * len(self._kind)))
        yield self._member(b".", _ROOT, 0, None)
        pending = [(b"", _ROOT, self._opaque[_ROOT], bisect_left(keys, _parent(_ROOT)))]
        while pending:
            path, directory, floor, at = pending.pop()
            prefix = _parent(directory)
            while at < len(keys) and keys[at].startswith(prefix):
                key, at = keys[at], at + 1
                inode, layer = self._split(self._names[key])
                if layer < floor:
                    continue
                child = path + key[4:]
                known = _path(keys, first, inode) if first[inode] else None
                first[inode] = first[inode] or at
                yield self._member(child, inode, floor, known)
                if self._kind[inode] == Kind.DIRECTORY:
                    pending.append((path, directory, floor, at))
                    below = bisect_left(keys, _parent(inode))
                    pending.append((child + b"/", inode, max(floor, self._opaque[inode]), below))
                    break

    # Reading the tree

    def _member(self, path: bytes, inode: int, floor: int, first: bytes | None) -> Member:
        kind = Kind(self._kind[inode])
        offset, size = self._offset[inode], self._size[inode]
        # A directory of a hidden layer that a later one only passed through has lost what that layer said.
        plain = kind is Kind.DIRECTORY and self._made[inode] < floor
        return Member(
            path=path,
            kind=kind,
            mode=_DIRECTORY_MODE if plain else self._mode[inode],
            uid=0 if plain else self._uid[inode],
            gid=0 if plain else self._gid[inode],
            mtime=0 if plain else self._mtime[inode],
            size=size if kind is Kind.FILE else 0,
            layer=self._made[inode],
            offset=offset,
            target=bytes(self._heap[offset : offset + size]) if kind is Kind.SYMLINK else b"",
            device=(offset >> 32, offset & 0xFFFFFFFF) if kind is Kind.CHAR_DEVICE else (0, 0),
            xattrs=b"" if plain else self._text(self._xattrs[inode]),
            first=first,
        )

    def _text(self, place: int) -> bytes:
        start, size = place >> 32, place & 0xFFFFFFFF
        return bytes(self._heap[start : start + size])

    @staticmethod
    def _split(value: int) -> tuple[int, int]:
        return value >> _LAYER_BITS, value & _LAYER

    def _child(self, place: _Place, name: bytes) -> int | None:
        """Look a name up in a directory: its value, or None when it is not there or hidden."""
        value = self._names.get(_parent(place.inode) + name)
        return None if value is None or value & _LAYER < place.floor else value

    def _find(self, parts: list[bytes]) -> int | None:
        """Look a path up: the inode, or None. Links on the way are followed, the last part is not."""
        if not parts:
            return _ROOT
        place = self._walk(parts[:-1], create=False)
        value = self._child(place, parts[-1]) if place else None
        return None if value is None else value >> _LAYER_BITS

    def _walk(self, parts: list[bytes], *, create: bool) -> _Place | None:
        """Go to a directory as Linux would after chroot(2): `..` of the root is the root.

        With `create`, directories that are missing are made, and all on the way are mentioned by this
        layer; without, None for a way that does not exist.
        """
        place = _Place(_ROOT, self._opaque[_ROOT], 0, [])
        todo, followed = parts[::-1], 0
        while todo:
            part = todo.pop()
            self._step()
            if part == b"..":
                self._up(place)
                continue
            value = self._child(place, part)
            if value is None and create:
                value = self._imply(place, part)
            kind = None if value is None else self._kind[value >> _LAYER_BITS]
            if value is not None and kind == Kind.DIRECTORY:
                self._down(place, part, value, mention=create)
            elif value is not None and kind == Kind.SYMLINK and followed < MOST_FOLLOWED:
                followed += 1
                self._follow(place, value >> _LAYER_BITS, todo)
            elif create:
                raise InvalidImage(f"The path {shown(b'/'.join(parts))} leads through no directory.")
            else:
                return None
        return place

    def _imply(self, place: _Place, name: bytes) -> int:
        """Make a directory that the image needs and has no entry for; give its name's value."""
        self._count()
        self._check_place(place, name)
        return self._name(place.inode, name, self._inode(Kind.DIRECTORY, _DIRECTORY_MODE))

    def _down(self, place: _Place, name: bytes, value: int, *, mention: bool) -> None:
        """Go into a directory, by the value of its name."""
        inode = value >> _LAYER_BITS
        if mention and value & _LAYER != self._layer:
            self._names[_parent(place.inode) + name] = inode << _LAYER_BITS | self._layer
        place.trail.append((place.inode, place.floor, place.length))
        place.inode = inode
        place.length += len(name) + 1
        place.floor = max(place.floor, self._opaque[inode])

    @staticmethod
    def _up(place: _Place) -> None:
        if place.trail:
            place.inode, place.floor, place.length = place.trail.pop()

    def _follow(self, place: _Place, inode: int, todo: list[bytes]) -> None:
        target = bytes(self._heap[self._offset[inode] : self._offset[inode] + self._size[inode]])
        if target.startswith(b"/"):
            place.trail.clear()
            place.inode, place.floor, place.length = _ROOT, self._opaque[_ROOT], 0
        todo.extend(part for part in reversed(target.split(b"/")) if part and part != b".")

    # Changing it

    def _count(self) -> None:
        self._room -= 1
        if self._room < 0:
            raise InvalidImage(
                f"It has more than {self._most_entries} entries.",
                hint="The limit is a setting; raise it if you trust the image.",
            )

    def _step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise InvalidImage("Its paths are too deep, all of them together.")

    def _keep(self, text: bytes) -> int:
        """Put a text into the heap and give its offset."""
        self._charge(len(text))
        offset = len(self._heap)
        self._heap += text
        return offset

    def _charge(self, size: int) -> None:
        self._text_room -= size
        if self._text_room < 0:
            raise InvalidImage("Its names, link targets and attributes take too much memory.")

    @staticmethod
    def _check_place(place: _Place, name: bytes) -> None:
        """Refuse a name that is none, or lies too deep when links on the way are what they lead to."""
        if name.startswith(_WHITEOUT):
            raise InvalidImage(f"The marker {shown(name)} stands where a file's name should.")
        if len(name) > LONGEST_NAME:
            raise InvalidImage(f"The name {shown(name)} has more than {LONGEST_NAME} bytes.")
        if len(place.trail) >= DEEPEST or place.length + len(name) > LONGEST_PATH:
            raise InvalidImage(f"The name {shown(name)} lies too deep.")

    def _inode(self, kind: Kind, mode: int, uid: int = 0, gid: int = 0, mtime: int = 0) -> int:
        """Make an inode of this layer without a name."""
        inode = len(self._kind)
        self._kind.append(kind)
        self._mode.append(mode)
        self._uid.append(uid)
        self._gid.append(gid)
        self._mtime.append(mtime)
        self._made.append(self._layer)
        self._opaque.append(0)
        self._links.append(0)
        self._offset.append(0)
        self._size.append(0)
        self._xattrs.append(0)
        return inode

    def _name(self, directory: int, name: bytes, inode: int) -> int:
        """Give an inode a name, in place of whatever had it; return the name's value."""
        self._links[inode] += 1
        if self._links[inode] > MOST_LINKS:
            raise InvalidImage(f"A file has more than {MOST_LINKS} names, one of them {shown(name)}.")
        key = _parent(directory) + name
        old = self._names.get(key)
        if old is None:
            self._charge(len(name))
        else:
            self._links[old >> _LAYER_BITS] -= 1
        value = self._names[key] = inode << _LAYER_BITS | self._layer
        return value

    def _new(self, entry: Entry) -> int:
        """Make the inode of a file, link, device or pipe."""
        inode = self._inode(entry.kind, entry.mode, entry.uid, entry.gid, entry.mtime)
        if entry.kind is Kind.FILE:
            self._offset[inode], self._size[inode] = entry.data, entry.size
            self._set_xattrs(inode, entry)
        elif entry.kind is Kind.SYMLINK:
            self._offset[inode], self._size[inode] = self._keep(_link_target(entry)), len(entry.target)
        elif entry.kind is not Kind.FIFO:
            self._offset[inode] = _allowed_device(entry)
        return inode

    def _put_directory(self, parent: _Place, name: bytes, entry: Entry) -> None:
        """Make a directory, or give the one that is there new metadata and keep its content."""
        value = self._child(parent, name)
        if value is None or self._kind[value >> _LAYER_BITS] != Kind.DIRECTORY:
            inode = self._inode(Kind.DIRECTORY, _DIRECTORY_MODE)
            self._name(parent.inode, name, inode)
        else:
            inode = value >> _LAYER_BITS
            self._names[_parent(parent.inode) + name] = inode << _LAYER_BITS | self._layer
        self._set_directory(inode, entry)

    def _set_directory(self, inode: int, entry: Entry) -> None:
        self._mode[inode], self._mtime[inode] = entry.mode, entry.mtime
        self._uid[inode], self._gid[inode] = entry.uid, entry.gid
        self._made[inode] = self._layer
        self._set_xattrs(inode, entry)

    def _set_root(self, entry: Entry) -> None:
        if entry.kind is not Kind.DIRECTORY:
            raise InvalidImage(f"The root {shown(entry.path)} is no directory.")
        self._set_directory(_ROOT, entry)

    def _put_link(self, parent: _Place, name: bytes, entry: Entry) -> None:
        """Give another name to a file that is there; a symbolic link is copied, which is the same."""
        parts = split(entry.target)
        self._refuse_marker(parts)
        found = self._find(parts)
        if found is None:
            raise InvalidImage(f"{shown(entry.path)} links to {shown(entry.target)}, which is not there.")
        if self._made[found] < self._layer:
            self._charge(len(entry.target))
            self._links_down.append(entry.target)
        if self._kind[found] == Kind.FILE:
            self._relink(parent, name, found)
        elif self._kind[found] == Kind.SYMLINK:
            self._name(parent.inode, name, self._copy(found))
        else:
            raise InvalidImage(f"{shown(entry.path)} links to {shown(entry.target)}, which is no file.")

    def _relink(self, parent: _Place, name: bytes, inode: int) -> None:
        """Name a file again; a link to itself changes nothing but the layer that mentioned it."""
        value = self._child(parent, name)
        if value is not None and value >> _LAYER_BITS == inode:
            self._names[_parent(parent.inode) + name] = inode << _LAYER_BITS | self._layer
        else:
            self._name(parent.inode, name, inode)

    def _copy(self, link: int) -> int:
        inode = self._inode(
            Kind.SYMLINK, self._mode[link], self._uid[link], self._gid[link], self._mtime[link]
        )
        self._offset[inode], self._size[inode] = self._offset[link], self._size[link]
        return inode

    @staticmethod
    def _refuse_marker(parts: list[bytes]) -> None:
        for part in parts:
            if part.startswith(_WHITEOUT):
                raise InvalidImage(f"The marker {shown(part)} stands where a file's name should.")

    def _set_xattrs(self, inode: int, entry: Entry) -> None:
        """Keep the attributes that a guest may have, as the records that the merged archive has."""
        self._xattrs[inode] = 0
        if not entry.xattrs:
            return
        kept = b""
        for name, value in sorted(entry.xattrs.items()):
            allowed = name.startswith(b"user.") or (
                name == b"security.capability" and entry.kind is Kind.FILE
            )
            if allowed:
                kept += record(b"SCHILY.xattr." + name, value)
            else:
                self._drop(name)
        if kept:
            self._xattrs[inode] = self._keep(kept) << 32 | len(kept)

    def _drop(self, name: bytes) -> None:
        text = shown(name)
        if text in self.warnings or len(self.warnings) < 20:
            self.warnings[text] = self.warnings.get(text, 0) + 1

    # Whiteouts

    def _whiteout(self, parts: list[bytes], name: bytes) -> None:
        """Hide what lower layers have: one name, or all in a directory; what this layer has stays."""
        if any(part.startswith(_META) for part in parts[:-1]):
            return
        self._refuse_marker(parts[:-1])
        hidden = name[len(_WHITEOUT) :]
        if name != _OPAQUE and hidden in (b"", b".", b".."):
            raise InvalidImage(f"The whiteout {shown(name)} names no file.")
        if name.startswith(_META) and name != _OPAQUE:
            return
        place = self._walk(parts[:-1], create=False)
        if place is None:
            return
        if name == _OPAQUE:
            self._opaque[place.inode] = self._layer
        else:
            self._hide(place, hidden)

    def _hide(self, place: _Place, name: bytes) -> None:
        value = self._child(place, name)
        if value is None:
            return
        inode, layer = self._split(value)
        if layer < self._layer:
            self._links[inode] -= 1
            del self._names[_parent(place.inode) + name]
        elif self._kind[inode] == Kind.DIRECTORY:
            self._opaque[inode] = self._layer
            if self._made[inode] < self._layer:
                self._reset(inode)

    def _reset(self, inode: int) -> None:
        self._mode[inode], self._mtime[inode] = _DIRECTORY_MODE, 0
        self._uid[inode] = self._gid[inode] = self._xattrs[inode] = 0


def _path(keys: list[bytes], first: array[int], inode: int) -> bytes:
    """Put the first path of an inode together, from its name up to the root."""
    parts = []
    while inode != _ROOT:
        key = keys[first[inode] - 1]
        parts.append(key[4:])
        inode = int.from_bytes(key[:4], "big")
    return b"/".join(reversed(parts))


def _link_target(entry: Entry) -> bytes:
    """Check a symbolic link's target; it is stored as it is, wherever it leads."""
    if not 0 < len(entry.target) <= LONGEST_PATH or b"\0" in entry.target:
        raise InvalidImage(
            f"The target {shown(entry.target)} of {shown(entry.path)} is none that Linux takes."
        )
    return entry.target


def _allowed_device(entry: Entry) -> int:
    major, minor = entry.device
    if entry.kind is not Kind.CHAR_DEVICE or entry.device not in DEVICES:
        raise InvalidImage(
            f"The device {shown(entry.path)} ({major}:{minor}) is none that an image may have."
        )
    return major << 32 | minor
