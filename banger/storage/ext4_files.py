"""Files in the ext4 file system of an image file, by debugfs: no root, and it is never mounted.

debugfs reads commands a line at a time, tells errors by words alone (it exits with 0), and parses what a
guest may have written; so names that it could misread are refused, everything it says is looked at, each
change is read back, and it is another process. Program: debugfs(8).
"""

from __future__ import annotations

import re
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from banger import proc
from banger.errors import InvalidRequest, NotFound, ProgramFailed
from banger.model import Value

TIMEOUT_S = 60.0
MOST_READ = 16 << 20
LONGEST_PATH = 4095
LONGEST_NAME = 255

_TYPES = {
    "regular": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "character special": stat.S_IFCHR,
    "block special": stat.S_IFBLK,
    "FIFO": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
}
# The first three lines of `stat`; what follows may hold words of the guest's.
_STATUS = re.compile(
    r"Inode: (?P<inode>\d+)\s+Type: (?P<type>[a-zA-Z ]+?)\s+Mode:\s+(?P<mode>[0-7]+)\s.*\n"
    r".*\n"
    r"User:\s+(?P<uid>-?\d+)\s+Group:\s+(?P<gid>-?\d+)\s.*?Size: (?P<size>\d+)\n"
)
_NOT_FOUND = "File not found by ext2_lookup"
_HOST_FILE = "content"
_NEW = ".banger-new"


class Owner(Value):
    """Whose a file is, and its permissions (with setuid, setgid and sticky bits)."""

    mode: int
    uid: int = 0
    gid: int = 0


class Status(Value):
    """What an inode says. `mode` has type and permissions, as in st_mode; `size` is in bytes."""

    inode: int
    mode: int
    uid: int
    gid: int
    size: int

    @property
    def owner(self) -> Owner:
        """Whose it is."""
        return Owner(uid=self.uid, gid=self.gid, mode=stat.S_IMODE(self.mode))


def status(image: Path, path: str) -> Status | None:
    """Look at an inode; None when there is none at this absolute path. A link itself is looked at."""
    return _status(image, _word(path))


def make_directory(image: Path, path: str, owner: Owner) -> None:
    """Make it so that a directory of this owner is at `path`; what is above it has to be there.

    Raises InvalidRequest for a name that cannot be told to debugfs, NotFound, ProgramFailed.
    """
    word = _word(path)
    found = _status(image, word)
    if found is None:
        _parent(image, path)
        _change(image, [f"mkdir {word}"])
        found = _there(image, path)
    if not stat.S_ISDIR(found.mode):
        raise ProgramFailed(f"{path} in {image.name} is not a directory.")
    set_owner(image, path, owner)


def write(image: Path, path: str, content: bytes, owner: Owner) -> None:
    """Make it so that a file of this content and owner is at `path`; another file or link there goes.

    Raises InvalidRequest for a name that cannot be told to debugfs, NotFound, ProgramFailed.
    """
    word = _word(path)
    above = _parent(image, path)
    found = _status(image, word)
    if found is not None and stat.S_ISDIR(found.mode):
        raise ProgramFailed(f"{path} in {image.name} is a directory.")
    _add_new(image, above, content)
    # `ln` and `unlink` do not count links: together they move the name.
    moved = [f"ln {_NEW} {_quoted(path.rpartition('/')[2])}", f"unlink {_NEW}"]
    _change(image, [f"cd <{above}>", *([] if found is None else [f"rm {word}"]), *moved])
    set_owner(image, path, owner)
    if read(image, path, most_bytes=len(content)) != content:
        raise ProgramFailed(f"{path} in {image.name} is not what was written to it.")


def _add_new(image: Path, above: int, content: bytes) -> None:
    """Write a file beside the one that it will replace, or leave nothing of it."""
    within = f"cd <{above}>"  # `write` knows names in the current directory only
    if _NOT_FOUND not in _run(image, [within, f"stat {_NEW}"], writable=False):
        _change(image, [within, f"rm {_NEW}"])  # of one that was killed at it
    with tempfile.TemporaryDirectory(prefix="banger-") as beside:
        Path(beside, _HOST_FILE).write_bytes(content)
        try:
            _change(image, [within, f"write {_HOST_FILE} {_NEW}"], beside)
        except ProgramFailed:
            _run(image, [within, f"rm {_NEW}"], writable=True)
            raise


def read(image: Path, path: str, *, most_bytes: int = MOST_READ) -> bytes:
    """Read a file. Raises NotFound, and ProgramFailed for what is no file or is larger than `most_bytes`."""
    found = _there(image, path)
    if not stat.S_ISREG(found.mode):
        raise ProgramFailed(f"{path} in {image.name} is not a file.")
    if found.size > most_bytes:
        raise ProgramFailed(f"{path} in {image.name} has more than {most_bytes} bytes.")
    with tempfile.TemporaryDirectory(prefix="banger-") as beside:
        _change(image, [f"dump <{found.inode}> {_HOST_FILE}"], beside, writable=False)
        content = Path(beside, _HOST_FILE).read_bytes()
    if len(content) != found.size:
        raise ProgramFailed(f"{path} in {image.name} could not be read to its end.")
    return content


def set_owner(image: Path, path: str, owner: Owner) -> None:
    """Make it so that what is at `path` (`/` for the root) has this owner and these permissions.

    Raises InvalidRequest, NotFound, ProgramFailed.
    """
    if not (0 <= owner.uid < 1 << 32 and 0 <= owner.gid < 1 << 32 and 0 <= owner.mode <= 0o7777):
        raise InvalidRequest(f"{owner} is no owner of a file.")
    found = _there(image, path)
    if found.owner == owner:
        return
    inode = f"<{found.inode}>"
    mode = stat.S_IFMT(found.mode) | owner.mode
    _change(
        image,
        [
            f"set_inode_field {inode} uid {owner.uid}",
            f"set_inode_field {inode} gid {owner.gid}",
            f"set_inode_field {inode} mode 0{mode:o}",
        ],
    )
    if _there(image, path).owner != owner:
        raise ProgramFailed(f"The owner of {path} in {image.name} could not be set.")


def _there(image: Path, path: str) -> Status:
    found = _status(image, _word(path))
    if found is None:
        raise NotFound(f"There is no {path} in {image.name}.")
    return found


def _parent(image: Path, path: str) -> int:
    """Give the inode of the directory that `path` is in."""
    above = path.rpartition("/")[0] or "/"
    found = _there(image, above)
    if not stat.S_ISDIR(found.mode):
        raise ProgramFailed(f"{above} in {image.name} is not a directory.")
    return found.inode


def _word(path: str) -> str:
    """Write an absolute path as one word for debugfs. Raises InvalidRequest when that cannot be done."""
    parts = path.split("/")
    if parts[0] or parts == [""] or (path != "/" and "" in parts[1:]) or not {".", ".."}.isdisjoint(parts):
        raise InvalidRequest(f"{path!a} is not a plain absolute path.")
    if len(path.encode("utf-8", "surrogateescape")) > LONGEST_PATH:
        raise InvalidRequest(f"A path has more than {LONGEST_PATH} bytes.")
    return _quoted(path)


def _quoted(text: str) -> str:
    r"""Put text in quotes. In them debugfs takes everything but `"` and the line's end as it stands."""
    # What prints is what is written: no control, no line or paragraph end, no lone byte.
    if not text.isprintable() or '"' in text:
        raise InvalidRequest(f"{text!a} has characters that debugfs could misread.")
    if any(len(name.encode()) > LONGEST_NAME for name in text.split("/")):
        raise InvalidRequest(f"A name has more than {LONGEST_NAME} bytes.")
    return f'"{text}"'


def _status(image: Path, word: str) -> Status | None:
    said = _run(image, [f"stat {word}"], writable=False)
    match = _STATUS.match(said)
    if match is None:
        if said.rstrip().endswith(_NOT_FOUND):
            return None
        raise _failed(image, said)
    kind = _TYPES.get(match["type"])
    if kind is None:
        raise _failed(image, f"{word} is of type {match['type']}")
    return Status(
        inode=int(match["inode"]),
        mode=kind | int(match["mode"], 8),
        uid=int(match["uid"]) & 0xFFFFFFFF,  # it prints them as signed
        gid=int(match["gid"]) & 0xFFFFFFFF,
        size=int(match["size"]),
    )


def _change(image: Path, requests: Sequence[str], beside: str = "/", *, writable: bool = True) -> None:
    """Run requests that have nothing to say when they succeed, but for the number of a new inode."""
    said = _run(image, requests, beside, writable=writable)
    if re.sub(r"^Allocated inode: \d+\n", "", said, flags=re.MULTILINE).strip():
        raise _failed(image, said)


def _run(image: Path, requests: Sequence[str], beside: str = "/", *, writable: bool) -> str:
    """Give what debugfs says to requests, one a line, without its greeting and its echo of them."""
    # Its errors are on the other stream; files of the host are named relative to a directory of ours.
    script = 'cd "$0" && exec "$@" 2>&1'
    words = ["sh", "-c", script, beside, proc.which("debugfs", "e2fsprogs"), *(["-w"] if writable else [])]
    text = "".join(f"{request}\n" for request in requests)
    said = proc.run([*words, "-f", "-", str(image.absolute())], timeout_s=TIMEOUT_S, stdin=text.encode())
    echoes = {f"debugfs: {request}" for request in requests}
    kept = [line for line in said.splitlines(keepends=True) if line.rstrip("\n") not in echoes]
    return "".join(line for line in kept if not re.match(r"debugfs \d[\w.]* \(", line))


def _failed(image: Path, said: str) -> ProgramFailed:
    return ProgramFailed(f"{image.name} could not be worked on: {said.strip()[:200]!a}")
