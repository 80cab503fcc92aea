"""Opening below a held directory: what leads out is refused, and a race is never won."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from banger.errors import HostLacks, Refused
from banger.helper import beneath
from banger.helper.beneath import check_owned_file, open_beneath
from tests.helper.conftest import descriptors

RENAME_EXCHANGE = 2  # renameat2(2)
ROUNDS = 100_000


@pytest.fixture
def held(tmp_path: Path) -> Iterator[int]:
    """A directory's descriptor, with `a/b/file` below it and a secret beside it."""
    (tmp_path / "base/a/b").mkdir(parents=True)
    (tmp_path / "base/a/b/file").write_text("ours")
    (tmp_path / "secret").write_text("theirs")
    fd = os.open(tmp_path / "base", os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def test_what_is_below_is_opened(held: int) -> None:
    """A plain path leads to the file, with the flags that were asked for, not inherited."""
    fd = open_beneath(held, "a/b/file", os.O_RDONLY)
    assert os.read(fd, 10) == b"ours"
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "a/../../secret",
        "a/../a/b/file",
        "/etc/passwd",
        "a//b/file",
        "a/b/file/",
        "./a/b/file",
        "",
        "a/b/fi\0le",
        "a/" * 2500 + "file",
        "\udcff",
        "proc/self/root/etc/passwd",
        "/proc/self/root/etc/passwd",
        "/dev/fd/3",
        "nothing",
        "a" * 300,
    ],
)
def test_h42_a_path_that_is_not_plain_is_refused(held: int, path: str, refused: Callable[..., None]) -> None:
    """Dots, doubled slashes, absolute paths, NULs, too long ones, what is not text or not there."""
    before = descriptors()
    with pytest.raises(Refused) as caught:
        open_beneath(held, path)
    assert descriptors() == before
    refused("H42 path that is not plain", caught.value)


@pytest.mark.parametrize(
    ("link", "target", "path"),
    [
        ("last", "a/b/file", "last"),
        ("out", "../secret", "out"),
        ("absolute", "/etc/passwd", "absolute"),
        ("middle", "a", "middle/b/file"),
        ("magic", "/proc/self/fd", "magic/0"),
        ("loop", "loop", "loop/x"),
    ],
)
def test_h39_no_link_is_followed(
    held: int, tmp_path: Path, link: str, target: str, path: str, refused: Callable[..., None]
) -> None:
    """A symbolic link is refused at the end and in the middle, wherever it leads."""
    (tmp_path / "base" / link).symlink_to(target)
    with pytest.raises(Refused) as caught:
        open_beneath(held, path, os.O_RDONLY)
    refused("H39 symbolic link on the way", caught.value)


def test_h43_another_file_system_is_not_entered(refused: Callable[..., None]) -> None:
    """What is mounted below the held directory is not reached: /proc from /."""
    root = os.open("/", os.O_PATH)
    with pytest.raises(Refused) as caught:
        open_beneath(root, "proc/version", os.O_RDONLY)
    os.close(root)
    refused("H43 mount on the way", caught.value)


def test_a_kernel_without_openat2_is_refused(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no second-best way."""

    def absent(*_: object) -> int:
        ctypes.set_errno(errno.ENOSYS)
        return -1

    monkeypatch.setattr(beneath, "_syscall", absent)
    with pytest.raises(HostLacks):
        open_beneath(held, "a/b/file")


def test_h41_exchanging_names_meanwhile_never_wins(
    held: int, tmp_path: Path, refused: Callable[..., None]
) -> None:
    """Of 100,000 opens while another swaps a directory for a link to elsewhere, none leads there."""
    evil = tmp_path / "evil"
    evil.mkdir()
    (evil / "file").write_text("theirs")
    (tmp_path / "base/a/link").symlink_to(evil)
    stop, swapped = threading.Event(), [0]
    racer = threading.Thread(target=_swap, args=(tmp_path / "base/a", stop, swapped))
    racer.start()
    won, opened, began = 0, 0, time.monotonic()
    try:
        for _ in range(ROUNDS):
            try:
                fd = open_beneath(held, "a/b/file", os.O_RDONLY)
            except Refused:
                continue
            opened += 1
            won += os.read(fd, 6) != b"ours"
            os.close(fd)
            if time.monotonic() - began > 30:
                break
    finally:
        stop.set()
        racer.join()
    assert opened > 0
    assert swapped[0] > 1000
    refused(
        "H41 directory swapped meanwhile",
        f"{ROUNDS} tries during {swapped[0]} swaps: {opened} led to the file, {won} elsewhere",
        won,
    )


def _swap(directory: Path, stop: threading.Event, swapped: list[int]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    at = os.open(directory, os.O_PATH)
    while not stop.is_set():
        assert libc.renameat2(at, b"b", at, b"link", RENAME_EXCHANGE) == 0
        swapped[0] += 1
    os.close(at)


def test_h31_a_descriptor_is_taken_only_if_it_is_the_owners_one_file(
    tmp_path: Path, refused: Callable[..., None]
) -> None:
    """A directory, FIFO, device or socket, another's file, and one with two names are refused."""
    file, mine = tmp_path / "file", os.getuid()
    file.write_text("x")
    fd = os.open(file, os.O_RDONLY)
    assert check_owned_file(fd, mine).st_size == 1
    os.mkfifo(tmp_path / "fifo")
    others = [
        os.open(tmp_path, os.O_RDONLY),
        os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK),
        os.open("/dev/null", os.O_RDONLY),
        socket.socket(socket.AF_UNIX).detach(),
    ]
    for other in others:
        with pytest.raises(Refused, match="not a regular file") as caught:
            check_owned_file(other, mine)
        refused("H31 not a regular file", caught.value)
        os.close(other)
    with pytest.raises(Refused, match="not yours") as caught:
        check_owned_file(fd, mine + 1)
    refused("H31 another's file", caught.value)
    os.link(file, tmp_path / "second")
    with pytest.raises(Refused, match="one name") as caught:
        check_owned_file(fd, mine)
    refused("H31 file with two names", caught.value)
    os.close(fd)
