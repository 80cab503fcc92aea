"""Root file systems for guests, made entry by entry: a tar archive, then a published base file."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from banger import proc
from banger.images import base, store

BUSYBOX = Path(proc.which("busybox", "busybox-static"))

Tree = dict[str, str | bytes]
"""Names in the root: `->` a link, `/` a directory, bytes or any other text a file's content (0755)."""


def members(tree: Tree) -> Iterable[tuple[tarfile.TarInfo, bytes]]:
    """Give a tree's tar members, with directories before what is in them."""
    made: set[str] = set()
    for name, what in tree.items():
        for parent in reversed(Path(name).parents[:-1]):
            if str(parent) not in made | set(tree):
                made.add(str(parent))
                yield _member(str(parent), "/")
        yield _member(name, what)


def _member(name: str, what: str | bytes) -> tuple[tarfile.TarInfo, bytes]:
    member, content = tarfile.TarInfo(name), b""
    member.mode = 0o755
    if what == "/":
        member.type = tarfile.DIRTYPE
    elif isinstance(what, str) and what.startswith("->"):
        member.type, member.linkname, member.mode = tarfile.SYMTYPE, what[2:], 0o777
    else:
        content = what.encode() if isinstance(what, str) else what
        member.size = len(content)
    return member, content


def archive(path: Path, tree: Tree) -> Path:
    """Write a tree as a tar archive."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in members(tree):
            tar.addfile(member, io.BytesIO(content))
    return path


def publish(tar: Path, cache: Path, form: base.Format = "squashfs") -> Path:
    """Publish an image made of an archive; give its base file."""
    digest = hashlib.sha256(form.encode() + tar.read_bytes()).hexdigest()

    def make(staging: Path) -> dict[str, str | int | list[str]]:
        return {"format": base.make(tar, staging / base.FILE, label="test", format=form).format}

    return base.path_of(store.build(cache, "image", "test", digest, make, lambda: False))


def root(where: Path, tree: Tree, form: base.Format = "squashfs") -> Path:
    """Make and publish a tree below a private directory; give its base file."""
    return publish(archive(where / "root.tar", tree), where / "cache", form)
