"""What of the owner's home gets into a VM's /root, and what does not."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from pathlib import Path

import msgspec
import pytest

from banger import proc
from banger.config import Config, FileSync
from banger.errors import InvalidRequest
from banger.storage import archive, ext4, ext4_files
from banger.tasks import filesync

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ anna@desk"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with files of many kinds."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home" / ".config"))
    place = tmp_path / "home"
    (place / "tree" / "deep").mkdir(parents=True)
    (place / ".vimrc").write_text("set nu\n")
    (place / "tree" / "one").write_text("1")
    (place / "tree" / "deep" / "sp ace\n\udcff").write_text("2")
    (place / "tree" / "link").symlink_to("/etc/shadow")
    (place / "tree" / "directory-link").symlink_to("deep")
    os.mkfifo(place / "tree" / "pipe")
    (place / ".rc").symlink_to(".vimrc")
    (place / "out").symlink_to("/etc/hostname")
    (place / "id.pub").write_text(KEY + "\n")
    (place / "id").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    (place / ".gitconfig").write_text("[include]\n\tpath = more\n[core]\n\teditor = rm\n")
    (place / "more").write_text('[user]\n\tname = "An \\"na\\" \\\\ K"\n\temail = anna@example.org\n')
    return place


def image(path: Path, *members: tuple[str, bytes, str]) -> Path:
    """Write what an image has in /root: (name, type, content or target)."""
    with tarfile.open(path, "w") as tar:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.mode = kind, 0o755
            if kind == tarfile.REGTYPE:
                member.size = len(content)
            else:
                member.linkname = content
            tar.addfile(member, io.BytesIO(content.encode()) if kind == tarfile.REGTYPE else None)
    return path


def merged(content: Path, found: filesync.Gathered, out: Path) -> dict[str, archive.Entry]:
    with out.open("wb") as file:
        filesync.merge(content, found, file)
    return {os.fsdecode(entry.path): entry for entry in archive.entries(out)}


def test_trees_files_and_what_is_left_out(home: Path) -> None:
    """Directories come whole, with the mode asked for; links and pipes in them are named and left out."""
    config = Config(
        git_identity=False,
        file_sync=(
            FileSync(host="~/tree", guest="/root/copy"),
            FileSync(host=".rc", mode="0640"),
            FileSync(host="absent"),
            FileSync(host="out"),
        ),
    )
    found = filesync.gather(config, home)
    assert found.files == {
        "copy/one": (b"1", 0o600),
        "copy/deep/sp ace\n\udcff": (b"2", 0o600),
        ".rc": (b"set nu\n", 0o640),
    }
    assert list(found.parents()) == ["copy", "copy/deep"]
    assert found.skipped == [
        "'directory-link' (a link)",
        "'link' (a link)",
        "'pipe' (no file)",
        "absent (not there)",
        "out (it leads out of your home directory)",
    ]


@pytest.mark.parametrize(
    "sync",
    [
        {"host": "../other/.ssh"},
        {"host": "/etc/shadow"},
        {"host": "~anna/x"},
        {"host": "a/../../b"},
        {"host": "a//b"},
        {"host": ""},
        {"host": "x", "guest": "/etc/passwd"},
        {"host": "x", "guest": "/root/../etc/passwd"},
        {"host": "x", "guest": "/rootkit"},
        {"host": "x", "guest": "/root/"},
        {"host": "x", "guest": "a\0b"},
        {"host": "x", "mode": "4755"},
        {"host": "x", "mode": "rw"},
        {"host": "x", "owner": "me"},
    ],
)
def test_other_paths_are_refused(sync: dict[str, str]) -> None:
    """A path out of the home, or out of /root, is refused when the settings are read."""
    with pytest.raises(msgspec.ValidationError, match=r"file_sync\[0\]"):
        msgspec.convert({"file_sync": [sync]}, Config)


def test_git_identity(home: Path, tmp_path: Path) -> None:
    """Name and address are taken from wherever git finds them, and nothing else is; git reads them back."""
    written = tmp_path / "written"
    written.write_bytes(filesync.git_identity(home))
    said = proc.run(["git", "config", "--file", str(written), "--list"])
    assert said == 'user.email=anna@example.org\nuser.name=An "na" \\ K\n'
    (home / "more").unlink()
    assert filesync.git_identity(home) == b""
    (home / ".gitconfig").unlink()
    assert filesync.git_identity(home) == b""


def test_only_public_keys(home: Path) -> None:
    """A private key given for the public one is refused."""
    found = filesync.gather(Config(git_identity=False, ssh_key="~/id.pub"), home)
    assert found.files == {filesync.KEYS: (f"{KEY}\n".encode(), 0o600)}
    with pytest.raises(InvalidRequest, match="no public key"):
        filesync.gather(Config(ssh_key="~/id"), home)


def test_too_much_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tree of more bytes or files than is sensible is refused, and says where."""
    monkeypatch.setattr(filesync, "MOST_BYTES", 1)
    with pytest.raises(InvalidRequest, match="file_sync"):
        filesync.gather(Config(git_identity=False, file_sync=(FileSync(host="tree"),)), home)


def test_the_image_keeps_its_own(home: Path, tmp_path: Path) -> None:
    """What the image has stays beside it: its .gitconfig and its keys too; links in the way give way."""
    config = Config(
        ssh_key="id.pub", file_sync=(FileSync(host=".vimrc"), FileSync(host="tree", guest="etc/x"))
    )
    content = image(
        tmp_path / "seed.tar",
        ("root", tarfile.DIRTYPE, ""),
        ("root/.profile", tarfile.REGTYPE, "theirs"),
        ("root/.gitconfig", tarfile.REGTYPE, "theirs"),
        ("root/.vimrc", tarfile.REGTYPE, "theirs"),
        ("root/.vimrc.too", tarfile.LNKTYPE, "root/.vimrc"),
        ("root/.ssh", tarfile.DIRTYPE, ""),
        ("root/.ssh/authorized_keys", tarfile.REGTYPE, "ssh-rsa theirs"),
        ("root/etc", tarfile.SYMTYPE, "/etc"),
    )
    entries = merged(content, filesync.gather(config, home), tmp_path / "whole.tar")
    assert set(entries) == {
        "root",
        "root/.profile",
        "root/.gitconfig",
        "root/.vimrc",
        "root/.ssh",
        "root/.ssh/authorized_keys",
        "root/etc",
        "root/etc/x",
        "root/etc/x/one",
        "root/etc/x/deep",
        "root/etc/x/deep/sp ace\n\udcff",
    }
    assert stat.S_ISDIR(entries["root/etc"].mode), "a link of the image's leads nowhere"
    whole = (tmp_path / "whole.tar").read_bytes()
    text = {
        path: whole[entry.offset : entry.offset + entry.size].decode()
        for path, entry in entries.items()
        if stat.S_ISREG(entry.mode)
    }
    assert text["root/.gitconfig"] == "theirs"
    assert text["root/.vimrc"] == "set nu\n"
    assert text["root/.ssh/authorized_keys"] == f"ssh-rsa theirs\n{KEY}\n"

    disk = tmp_path / "work.ext4"
    ext4.make_home(disk, 64, seed=tmp_path / "whole.tar", below=b"root")
    assert ext4_files.read(disk, "/.vimrc") == b"set nu\n"
    owner = ext4_files.status(disk, "/etc/x/one")
    assert owner is not None
    assert (owner.uid, owner.gid, stat.S_IMODE(owner.mode)) == (0, 0, 0o600)
    ext4.check(disk)  # adds a lost+found
    assert ext4.check(disk) is False, "it is whole"
