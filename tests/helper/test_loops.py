"""Loop devices: the record and the kernel do the same, and neither touches what is not to be touched."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from banger.helper import loops
from banger.helper.disks import MAX_MARK, Backing, Loop, Loops
from banger.testing.root_disks import RecordingDisks

MARK = f"banger 4000000{os.getpid() % 1000:03} test op-loops"
SIZE = 2 << 20
DYING = """
import os, sys
from banger.helper.loops import KernelLoops
KernelLoops().attach(int(sys.argv[1]), sys.argv[2], True)
os.kill(os.getpid(), 9)
"""


def _lacks_loops() -> bool:
    try:
        os.close(os.open(loops.CONTROL, os.O_RDWR))
    except OSError:
        return True
    return False


@pytest.fixture(
    params=[
        RecordingDisks,
        pytest.param(
            loops.KernelLoops,
            marks=pytest.mark.skipif(
                _lacks_loops(), reason="only root has loop devices, where there are any"
            ),
        ),
    ]
)
def seam(request: pytest.FixtureRequest) -> Iterator[Loops]:
    """The record, then the kernel; what a test leaves attached is detached and makes it fail."""
    found: Loops = request.param()
    yield found
    left = _ours(found)
    for loop in left:
        found.detach(loop)
    assert left == []


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file to be attached, open to be read and written."""
    with _opened(tmp_path / "file") as fd:
        os.truncate(fd, SIZE)
        yield fd


def test_attached_to_exactly_the_file_of_the_descriptor(seam: Loops, file: int) -> None:
    """A loop device that was attached is listed, with the file's identity, its mark and its mode."""
    number = seam.attach(file, MARK, True)
    [loop] = _ours(seam)
    assert loop == Loop(number=number, backing=_backing(file), mark=MARK, read_only=True, leaving=False)
    seam.detach(loop)
    assert _ours(seam) == []


def test_h32_a_file_swapped_after_it_was_opened_is_not_attached(
    seam: Loops, file: int, tmp_path: Path
) -> None:
    """The file that was opened is attached, whatever has its name by now."""
    with _opened(tmp_path / "other") as other:
        os.truncate(other, SIZE)
        (tmp_path / "other").rename(tmp_path / "file")
        seam.attach(file, MARK, False)
        [loop] = _ours(seam)
        assert loop.backing == _backing(file) != _backing(other)
        assert not loop.read_only
        seam.detach(loop)


def test_each_attachment_has_a_device_of_its_own(seam: Loops, file: int) -> None:
    """One file below two devices is two devices; detaching one leaves the other."""
    numbers = {seam.attach(file, MARK, True), seam.attach(file, MARK, True)}
    first, second = _ours(seam)
    assert {first.number, second.number} == numbers
    seam.detach(first)
    assert _ours(seam) == [second]
    seam.detach(second)


def test_h29_a_device_on_another_file_stays(seam: Loops, file: int) -> None:
    """What has another file, or another mark, than is told is not detached; nor is it an error."""
    seam.attach(file, MARK, True)
    [loop] = _ours(seam)
    inode = Backing(loop.backing.device, loop.backing.inode + 1)
    seam.detach(replace(loop, backing=inode))
    seam.detach(replace(loop, backing=Backing(loop.backing.device + 1, loop.backing.inode)))
    seam.detach(replace(loop, mark="banger 1 somebody op-else"))
    assert _ours(seam) == [loop]
    seam.detach(loop)


def test_detaching_what_is_gone_is_no_error(seam: Loops, file: int) -> None:
    """A device that is detached already, or was never there, may be detached again."""
    seam.attach(file, MARK, True)
    [loop] = _ours(seam)
    seam.detach(loop)
    seam.detach(loop)
    seam.detach(replace(loop, number=1 << 19))
    assert _ours(seam) == []


def test_a_mark_that_does_not_fit_is_not_cut_off(seam: Loops, file: int) -> None:
    """63 bytes of mark are kept whole; with 64 nothing is attached."""
    longest = f"{MARK} ".ljust(MAX_MARK, "x")
    with pytest.raises(ValueError, match="mark"):
        seam.attach(file, longest + "x", True)
    assert _ours(seam) == []
    seam.attach(file, longest, True)
    [loop] = _ours(seam)
    assert loop.mark == longest
    seam.detach(loop)


def test_a_deleted_file_goes_with_its_device(seam: Loops, file: int, tmp_path: Path) -> None:
    """A device whose file has no name any more is listed all the same, and can be detached."""
    seam.attach(file, MARK, False)
    (tmp_path / "file").unlink()
    [loop] = _ours(seam)
    assert loop.backing == _backing(file)
    seam.detach(loop)


@pytest.mark.skipif(_lacks_loops(), reason="only root has loop devices, where there are any")
def test_one_that_is_open_leaves_when_it_is_let_go(file: int) -> None:
    """The kernel detaches a device that a program has open as soon as that program lets go, and says so."""
    kernel = loops.KernelLoops()
    number = kernel.attach(file, MARK, False)
    holder = os.open(f"/dev/loop{number}", os.O_RDONLY)
    try:
        [loop] = _ours(kernel)
        kernel.detach(loop)
        assert _ours(kernel) == [replace(loop, leaving=True)]
    finally:
        os.close(holder)
    assert _ours(kernel) == []


@pytest.mark.skipif(_lacks_loops(), reason="only root has loop devices, where there are any")
def test_what_is_written_is_in_the_file(file: int) -> None:
    """Bytes written through the kernel's device are in the file; a read-only one takes none."""
    kernel = loops.KernelLoops()
    for read_only in (False, True):
        number = kernel.attach(file, MARK, read_only)
        try:
            with contextlib.ExitStack() as stack:
                if read_only:
                    stack.enter_context(pytest.raises(PermissionError))
                device = os.open(f"/dev/loop{number}", os.O_RDWR)
                stack.callback(os.close, device)
                os.pwrite(device, b"through the device", 4096)
                os.fsync(device)
        finally:
            [loop] = _ours(kernel)
            kernel.detach(loop)
    assert os.pread(file, 18, 4096) == b"through the device"


@pytest.mark.skipif(_lacks_loops(), reason="only root has loop devices, where there are any")
def test_what_a_killed_process_attached_is_found_by_its_mark(file: int) -> None:
    """A device outlives the process that attached it, and the next one finds it and can detach it."""
    done = subprocess.run([sys.executable, "-c", DYING, str(file), MARK], pass_fds=[file], check=False)
    assert done.returncode == -9
    kernel = loops.KernelLoops()
    [loop] = _ours(kernel)
    assert (loop.backing, loop.leaving) == (_backing(file), False)
    kernel.detach(loop)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _backing(fd: int) -> Backing:
    found = os.fstat(fd)
    return Backing(found.st_dev, found.st_ino)


def _ours(seam: Loops) -> list[Loop]:
    return [loop for loop in seam.loops() if loop.mark.startswith(MARK)]
