import io
import tarfile
from pathlib import Path

import pytest

from banger import proc
from banger.errors import ProgramFailed
from banger.storage import ext4


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


def test_damage_is_mended_and_told(tmp_path: Path) -> None:
    """A wrong free-blocks count is corrected; a file that is no file system is an error."""
    disk = tmp_path / "disk"
    ext4.make(disk, 64, label="work")
    proc.run(["debugfs", "-w", "-R", "set_super_value free_blocks_count 1", str(disk)])
    proc.run(["debugfs", "-w", "-R", "clri <2>", str(disk)])
    assert ext4.check(disk) is True
    assert ext4.check(disk) is False
    disk.write_bytes(bytes(1 << 20))
    with pytest.raises(ProgramFailed):
        ext4.check(disk)
