import io
import os
import re
import tarfile
from pathlib import Path

import pytest

from banger import proc
from banger.errors import InvalidRequest, ProgramFailed
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


def seed(path: Path, *, size: int = 5, owner: int = 4294967294) -> Path:
    """An archive of a home with one file, and of what is beside it."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("root", "root/a b", "rootkit"):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name == "root" else tarfile.REGTYPE
            member.mode, member.uid, member.gid = 0o4755, owner, 70000
            member.size = 0 if name == "root" else size
            member.pax_headers = {"SCHILY.xattr.user.a": "x" * (5000 if name == "root/a b" else 1)}
            tar.addfile(member, io.BytesIO(bytes(size)))
    return path


@pytest.mark.parametrize("size_mib", [64, 8192])
def test_a_home_is_filled_and_is_roots_own(tmp_path: Path, size_mib: int) -> None:
    """Its root is 0:0 0700 whatever the image says, its size is final, its label tells that it is filled."""
    disk = tmp_path / "disk"
    ext4.make_home(disk, size_mib, seed=seed(tmp_path / "seed.tar"), below=b"root")
    assert disk.stat().st_size == size_mib << 20
    assert disk.stat().st_blocks * 512 < 96 << 20
    about = debugfs(disk, "stat /")
    assert "Mode:  0700" in about
    assert re.search(r"User:\s+0\s+Group:\s+0\s", about)
    names = [line.split("/")[1:6] for line in debugfs(disk, "ls -p /").splitlines() if line]
    assert [(mode, uid, gid, name) for _, mode, uid, gid, name in names if name not in (".", "..")] == [
        ("104755", "-2", "70000", "a b"),
    ]
    assert "volume name:   home" in proc.run(["dumpe2fs", "-h", str(disk)])
    with disk.open("rb") as file:
        file.seek(286 * 4)  # where the guest looks: assets/stage2
        assert file.read(4) == ext4.HOME.encode()
    proc.run(["e2fsck", "-fn", str(disk)])  # fails when there is anything to mend
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "seed.tar"}


def test_a_home_that_is_there_stays(tmp_path: Path) -> None:
    """Making it so a second time does not touch what the guest wrote."""
    (disk := tmp_path / "disk").write_bytes(b"the guest's")
    ext4.make_home(disk, 64, seed=tmp_path / "none", below=b"root")
    assert disk.read_bytes() == b"the guest's"


def test_a_home_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """The error says how much there is and what to ask for; no file stays."""
    whole = seed(tmp_path / "seed.tar", size=70 << 20)
    with pytest.raises(InvalidRequest, match=r"71 MiB in /root.*64 MiB") as refused:
        ext4.make_home(tmp_path / "disk", 64, seed=whole, below=b"root")
    assert "--disk-size" in str(refused.value.hint)
    assert {path.name for path in tmp_path.iterdir()} == {"seed.tar"}


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
