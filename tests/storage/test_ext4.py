import io
import os
import tarfile
from pathlib import Path

import pytest

from banger import proc
from banger.errors import ProgramFailed
from banger.storage import ext4, ext4_files


def debugfs(path: Path, request: str) -> str:
    return proc.run(["debugfs", "-R", request, str(path)])


def test_a_disk_is_sparse_and_sound(tmp_path: Path) -> None:
    """8 GiB take a few MiB, e2fsck finds nothing to mend, and nothing else is in the directory."""
    disk = tmp_path / "disk"
    ext4.make(disk, 8192, label="work")
    assert disk.stat().st_size == 8 << 30
    assert disk.stat().st_blocks * 512 < 64 << 20
    assert ext4.check(disk) is False
    assert list(tmp_path.iterdir()) == [disk]


def test_a_disk_that_is_there_stays(tmp_path: Path) -> None:
    """Making it so a second time does not touch what the guest wrote."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"the guest's")
    ext4.make(disk, 64, label="work")
    assert disk.read_bytes() == b"the guest's"


def test_owners_modes_and_devices_are_those_of_the_archive(tmp_path: Path) -> None:
    """A setuid program, another owner's file and a device node come through, without root."""
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        for name, mode, owner, kind in (
            ("su", 0o4755, 0, tarfile.REGTYPE),
            ("mail", 0o640, 8, tarfile.REGTYPE),
            ("null", 0o666, 0, tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.mode, member.uid, member.gid, member.type, member.size = mode, owner, owner, kind, 0
            member.devmajor, member.devminor = 1, 3
            tar.addfile(member, io.BytesIO())
    disk = tmp_path / "disk"
    ext4.make_from_tar(disk, archive, label="image")
    assert "Mode:  04755" in debugfs(disk, "stat su")
    assert "User:     8   Group:     8" in debugfs(disk, "stat mail")
    assert "01:03" in debugfs(disk, "stat null")
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "disk"}


def damage(disk: Path, *requests: str) -> None:
    for request in requests:
        proc.run(["debugfs", "-w", "-R", request, str(disk)])


@pytest.mark.parametrize(
    "requests",
    [
        ["set_super_value free_blocks_count 1"],
        ["clri <2>"],
        ["set_inode_field /kept links_count 9"],
        ["set_inode_field /kept block[5] 77777777", "freei /kept"],
        ["freeb 1 4000"],
    ],
)
def test_damage_is_mended_and_told(tmp_path: Path, requests: list[str]) -> None:
    """What is wrong is corrected, once: the second look finds nothing."""
    disk = tmp_path / "disk"
    ext4.make(disk, 64, label="work")
    ext4_files.write(disk, "/kept", b"content", ext4_files.Owner(mode=0o644))
    damage(disk, *requests)
    assert ext4.check(disk) is True
    assert ext4.check(disk) is False


def test_a_lost_first_block_is_found_again(tmp_path: Path) -> None:
    """With the first superblock gone, a copy of it serves, and the files are there."""
    disk = tmp_path / "disk"
    ext4.make(disk, 256, label="work")
    ext4_files.write(disk, "/kept", b"content", ext4_files.Owner(mode=0o644))
    with disk.open("r+b") as file:
        file.write(bytes(4096))
    assert ext4.check(disk) is True
    assert ext4_files.read(disk, "/kept") == b"content"


@pytest.mark.parametrize("content", [bytes(1 << 20), b"", os.urandom(1 << 20)])
def test_what_is_no_file_system_cannot_be_mended(tmp_path: Path, content: bytes) -> None:
    """The error is a sentence with the file's name, and the file is left as it is."""
    disk = tmp_path / "disk"
    disk.write_bytes(content)
    with pytest.raises(ProgramFailed, match="The file system disk is damaged") as caught:
        ext4.check(disk)
    assert caught.value.message.isprintable()
    assert caught.value.status is not None
    assert caught.value.status >= 4
    assert disk.read_bytes() == content
