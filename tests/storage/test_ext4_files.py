from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from banger import proc
from banger.errors import BangerError, InvalidRequest, NotFound, ProgramFailed
from banger.storage import ext4, ext4_files
from banger.storage.ext4_files import Owner

OURS = Owner(mode=0o644)

UNSPEAKABLE = [
    "/a\nmkdir INJECTED",
    "/a\rb",
    "/\x1b]0;x",
    '/a" "b',
    "/\udcff",
    "/a\u2028b",
    "/\x00",
    "/a\tb",
    "/" + "x" * 256,
    "/" + "é" * 128,
    "/x" * 2048,
    "/../x",
    "/a/./b",
    "//x",
    "/x/",
    "x",
    "",
    "<2>",
]
ODD = ["/with space", "/-rf", "/<2>", "/$(x)", "/'", "/\\", "/#c", "/;", "/%s", "/é", "/~", "/" + "x" * 255]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small file system."""
    path = tmp_path / "an image.ext4"
    ext4.make(path, 64, label="test")
    return path


def sound(image: Path) -> bool:
    """Tell whether e2fsck finds nothing wrong."""
    proc.run(["e2fsck", "-f", "-n", str(image)])
    return True


def fingerprint(image: Path) -> str:
    return hashlib.sha256(image.read_bytes()).hexdigest()


@pytest.mark.parametrize("path", ODD)
def test_a_file_is_written_and_read_back(image: Path, path: str) -> None:
    """Content, owner and permissions of a file under an odd name are as asked for, and then replaced."""
    owner = Owner(uid=100000, gid=4294967294, mode=0o6750)
    for content in (b"", bytes(range(256)) * 100, b"less"):
        ext4_files.write(image, path, content, owner)
        assert ext4_files.read(image, path) == content
        found = ext4_files.status(image, path)
        assert found is not None
        assert (found.mode, found.owner, found.size) == (stat.S_IFREG | 0o6750, owner, len(content))
        assert sound(image)


def test_directories_are_made_and_made_again(image: Path) -> None:
    """A directory may be there already; then it gets the owner. What is above it has to be there."""
    for owner in (Owner(uid=5, gid=6, mode=0o1777), Owner(mode=0o700)):
        ext4_files.make_directory(image, "/a", owner)
        ext4_files.make_directory(image, "/a/b c", owner)
        found = ext4_files.status(image, "/a/b c")
        assert found is not None
        assert (stat.S_ISDIR(found.mode), found.owner) == (True, owner)
        assert sound(image)
    with pytest.raises(NotFound):
        ext4_files.make_directory(image, "/no/such", OURS)
    ext4_files.write(image, "/a/b c/file", b"deep", OURS)
    assert ext4_files.read(image, "/a/b c/file") == b"deep"
    assert ext4_files.status(image, "/file") is None
    assert sound(image)


def test_the_root_has_an_owner_too(image: Path) -> None:
    """`/` is a path like any other; what is in it stays."""
    ext4_files.write(image, "/file", b"x", OURS)
    ext4_files.set_owner(image, "/", Owner(uid=1000, gid=1000, mode=0o2750))
    found = ext4_files.status(image, "/")
    assert found is not None
    assert (found.inode, found.owner) == (2, Owner(uid=1000, gid=1000, mode=0o2750))
    assert ext4_files.read(image, "/file") == b"x"
    assert sound(image)


@pytest.mark.parametrize("path", UNSPEAKABLE)
def test_names_that_debugfs_could_misread_change_nothing(image: Path, path: str) -> None:
    """A name with a line's end, a quote, a control or `..` is refused before anything is run."""
    before = fingerprint(image)
    asked: list[Callable[[], object]] = [
        lambda: ext4_files.write(image, path, b"", OURS),
        lambda: ext4_files.make_directory(image, path, OURS),
        lambda: ext4_files.set_owner(image, path, OURS),
        lambda: ext4_files.read(image, path),
        lambda: ext4_files.status(image, path),
    ]
    for ask in asked:
        with pytest.raises(InvalidRequest) as caught:
            ask()
        assert caught.value.message.isprintable()
    assert fingerprint(image) == before


@settings(max_examples=30, deadline=None)
@given(name=st.text(min_size=1, max_size=40))
def test_any_name_is_written_as_it_is_or_refused(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    """There is no text that makes debugfs do something else than asked."""
    image = tmp_path_factory.mktemp("any") / "image"
    ext4.make(image, 8, label="test")
    try:
        ext4_files.write(image, f"/{name}", b"content", OURS)
    except InvalidRequest:
        return
    except NotFound:
        assert "/" in name
        return
    assert ext4_files.read(image, f"/{name}") == b"content"
    listed = proc.run(["debugfs", "-R", "ls -p /", str(image)])
    assert {line.split("/")[5] for line in listed.split("\n") if line} == {".", "..", "lost+found", name}


def test_what_is_not_as_expected_is_told(image: Path) -> None:
    """A missing file, a wrong type, an impossible owner are errors, though debugfs exits with 0."""
    ext4_files.make_directory(image, "/dir", OURS)
    ext4_files.write(image, "/file", b"x", OURS)
    failing: dict[str, Callable[[], object]] = {
        "no /nothing": lambda: ext4_files.read(image, "/nothing"),
        "is not a file": lambda: ext4_files.read(image, "/dir"),
        "is a directory": lambda: ext4_files.write(image, "/dir", b"", OURS),
        "is not a directory": lambda: ext4_files.make_directory(image, "/file", OURS),
        "file in .* is not a directory": lambda: ext4_files.write(image, "/file/x", b"", OURS),
        "more than 0 bytes": lambda: ext4_files.read(image, "/file", most_bytes=0),
        "no owner": lambda: ext4_files.set_owner(image, "/file", Owner(uid=1 << 32, mode=0)),
    }
    for told, ask in failing.items():
        with pytest.raises(BangerError, match=told):
            ask()


def test_a_file_that_does_not_fit_leaves_the_old_one(image: Path) -> None:
    """A full file system is an error; nothing of the new file is left, and the old one is whole."""
    ext4_files.write(image, "/file", b"old", OURS)
    with pytest.raises(ProgramFailed, match="Could not allocate block"):
        ext4_files.write(image, "/file", os.urandom(80 << 20), OURS)
    assert ext4_files.read(image, "/file") == b"old"
    assert sound(image)
    ext4_files.write(image, "/file", os.urandom(30 << 20), OURS)
    ext4_files.write(image, "/file", os.urandom(20 << 20), OURS)
    assert sound(image)


def test_what_a_killed_one_left_is_no_obstacle(image: Path) -> None:
    """A file that was written and not yet named is replaced by the next."""
    proc.run(["debugfs", "-w", "-R", f"write {__file__} .banger-new", str(image)])
    ext4_files.write(image, "/file", b"new", OURS)
    assert ext4_files.read(image, "/file") == b"new"
    assert ext4_files.status(image, "/.banger-new") is None
    assert sound(image)


def test_a_file_that_is_no_file_system_is_told(tmp_path: Path) -> None:
    """Nothing is written to a file that debugfs cannot open."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with pytest.raises(ProgramFailed):
        ext4_files.write(image, "/x", b"x", OURS)
    assert image.read_bytes() == bytes(1 << 20)


def test_links_are_looked_at_and_replaced_not_followed(tmp_path: Path) -> None:
    """A link to a file of the host stays in the image: it is replaced, and the host's file is not touched."""
    tree, host, image = tmp_path / "tree", tmp_path / "host", tmp_path / "image"
    tree.mkdir()
    host.write_text("the host's")
    (tree / "link").symlink_to(host)
    proc.run(["mkfs.ext4", "-q", "-d", str(tree), str(image), "8M"])
    with pytest.raises(ProgramFailed, match="not a file"):
        ext4_files.read(image, "/link")
    ext4_files.write(image, "/link", b"ours", OURS)
    assert ext4_files.read(image, "/link") == b"ours"
    assert host.read_text() == "the host's"
    assert sound(image)
