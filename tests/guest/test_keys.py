import stat
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncssh

from banger.guest import keys


def test_the_key_pair_is_private_and_fits_together(tmp_path: Path) -> None:
    """The private half is 0600, and asyncssh derives from it the public half beside it."""
    path = tmp_path / "id"
    pem = keys.make_key_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    derived = asyncssh.import_private_key(pem).export_public_key().decode().split()[:2]
    assert (tmp_path / "id.pub").read_text().split()[:2] == derived


def test_all_who_make_a_key_at_once_get_the_same(tmp_path: Path) -> None:
    """The first one's key wins, whole, and nothing else is left in the directory."""
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: keys.make_key_file(tmp_path / "id"), range(32)))
    assert len(made) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"id", "id.pub"}


def test_the_public_half_comes_back_when_it_is_lost(tmp_path: Path) -> None:
    """A crash between the two halves is mended by the next who asks."""
    pem = keys.make_key_file(tmp_path / "id")
    (tmp_path / "id.pub").unlink()
    keys.make_key_file(tmp_path / "id")
    assert (tmp_path / "id.pub").read_text() == keys.public_line(pem) + "\n"


def test_dropbear_gets_seed_and_public_half() -> None:
    """The key's own file format ends with the 32 bytes that the public line has, too."""
    pem = keys.make_key()
    form = keys.dropbear_form(pem)
    public = asyncssh.import_private_key(pem).public_data
    assert form[:19] == struct.pack(">I11sI", 11, b"ssh-ed25519", 64)
    assert len(form) == 19 + 64
    assert form[-32:] == public[-32:]


def test_known_hosts_pins_the_key_under_the_given_name() -> None:
    """An SSH client finds the key for that name and for no other."""
    pem = keys.make_key()
    known = asyncssh.import_known_hosts(keys.known_hosts_line("vm-1", pem))
    ours = asyncssh.import_private_key(pem).convert_to_public()
    assert known.match("vm-1", "", None)[0] == [ours]
    assert known.match("vm-2", "", None)[0] == []
