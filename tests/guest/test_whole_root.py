"""Guests whose root is one ext4 disk, as a host with device-mapper joins it: here, a plain file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from banger import config
from banger.images import base, debian, whole
from banger.storage import ext4
from banger.vmm.driver import ROOT, Disk, Machine
from tests.guest.conftest import NAME, Guest

pytestmark = pytest.mark.guest


class Whole(Guest):
    """A guest without base and overlay; its root is written to."""

    def _machine(self, vmlinuz: Path) -> Machine:
        machine = super()._machine(vmlinuz)
        disks = (Disk(serial=ROOT, path=self.root), Disk(serial="work", path=self.paths.work))
        return msgspec.structs.replace(machine, disks=disks)


@pytest.fixture
def guest(dirs: config.Dirs, tmp_path: Path) -> Iterator[Whole]:
    """The default image, made ext4 as for root disks of this kind."""
    root = tmp_path / "root.ext4"
    squashfs = base.path_of(debian.build(debian.RECIPES[NAME], dirs.cache))
    whole.write(squashfs, root, label=NAME, least_mib=2048)
    guest = Whole(dirs, "vm-web", root, "web")
    yield guest
    guest.close()


def test_a_guest_lives_on_one_disk(guest: Whole) -> None:
    """It is itself from its first boot, what it changes is there after the next, and nothing is damaged."""
    guest.start()
    assert guest.run("grep ' / ' /proc/mounts").stdout.startswith("/dev/vd")
    guest.run("echo kept > /etc/kept; echo more >> /etc/debian_version")
    told = guest.run("stat -c '%u %a' /usr/bin/passwd /root /.banger; cat /.banger/seeded /etc/hostname")
    assert told.stdout.splitlines() == ["0 4755", "0 700", "0 755", "web", "web"]
    assert guest.run("ls /run/banger/up").stdout == ""
    guest.run("/run/banger/bin/poweroff")
    assert guest.gone()
    guest.close()
    ext4.check(guest.root)
    assert ext4.check(guest.root) is False
    guest.start()
    assert (
        guest.run("cat /etc/kept; tail -n 1 /etc/debian_version; cat /etc/hostname").stdout
        == "kept\nmore\nweb\n"
    )
