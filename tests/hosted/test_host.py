"""The guest is the host that other tests take it for."""

from __future__ import annotations

import hashlib

import pytest

from banger.testing.hosted import Hosted
from banger.testing.hosted_install import BANGER, PLACE

pytestmark = pytest.mark.guest

MODULES = (
    "bridge",
    "dm_snapshot",
    "loop",
    "nf_tables",
    "nft_ct",
    "nft_masq",
    "overlay",
    "tun",
    "vhost_vsock",
)
SNAPSHOT = """
modprobe -a loop dm_snapshot
cd "$(mktemp -d /root/snapshot.XXXX)"
take_away() {
    umount view
    dmsetup remove web
    losetup --detach "$origin" "$changes"
    rm -r "$PWD"
}
trap take_away EXIT
truncate -s 32M origin
truncate -s 16M changes
mkfs.ext4 -q origin
sha256sum origin > before
origin=$(losetup --find --show --read-only origin)
changes=$(losetup --find --show changes)
dmsetup create web --table "0 $(blockdev --getsz "$origin") snapshot $origin $changes P 8"
mkdir view
mount /dev/mapper/web view
echo changed > view/file
umount view
sha256sum --check before
dmsetup status web
mount /dev/mapper/web view
cat view/file
"""
IMPORTS = """
import importlib, pkgutil, sys
import banger, banger_cli
for package in (banger, banger_cli):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.startswith("banger.testing"):
            importlib.import_module(module.name)
print(banger.__file__)
print([path for path in sys.path if not path.startswith(("/usr/lib", "/opt/banger"))])
"""


def test_systemd_is_its_init(hosted: Hosted) -> None:
    """Process 1 is systemd; it has started everything, and no unit failed."""
    assert hosted.output("cat /proc/1/comm; systemctl is-system-running") == "systemd\nrunning\n"


def test_it_has_the_modules_of_its_kernel(hosted: Hosted) -> None:
    """Each module that a host of VMs needs loads, and is then there."""
    loaded = hosted.output(f"modprobe -a {' '.join(MODULES)}; cut -d ' ' -f 1 /proc/modules").split()
    assert set(MODULES) - set(loaded) == set()
    assert hosted.run("modprobe no_such_module").returncode == 1


def test_device_mapper_makes_snapshots(hosted: Hosted) -> None:
    """A snapshot keeps what is written apart from its read-only origin, and goes without a trace."""
    checked, status, written = hosted.output(SNAPSHOT).splitlines()
    target, used = status.split()[2:4]
    assert (checked, target, written) == ("origin: OK", "snapshot", "changed")
    assert 0 < int(used.split("/")[0]) < 16 * 2048, "sectors of 512 bytes"
    assert hosted.output("dmsetup ls; losetup --list; ls /root") == "No devices found\n"


def test_banger_is_installed(hosted: Hosted) -> None:
    """All of banger and what it runs on loads in Python's isolated mode, from the installed place alone."""
    assert hosted.python(IMPORTS).splitlines() == [
        f"{PLACE}/lib/python3.11/site-packages/banger/__init__.py",
        "[]",
    ]
    assert hosted.output([BANGER, "--version"]).startswith("banger")


def test_only_root_may_change_what_is_installed(hosted: Hosted) -> None:
    """Nothing of the installed place belongs to another user or lets one write."""
    assert hosted.output(f"find {PLACE} ! -type l \\( ! -uid 0 -o ! -gid 0 -o -perm /022 \\)") == ""
    assert int(hosted.output(f"find {PLACE} -type f | wc -l")) > 500


def test_a_file_is_put_whole(hosted: Hosted) -> None:
    """What is put into the guest is there byte for byte, with its mode, and is root's."""
    content = bytes(range(256)) * 4096
    hosted.put("/run/put here/file", content, 0o640)
    assert hosted.output("stat -c '%a %u %s' '/run/put here/file'") == f"640 0 {len(content)}\n"
    check = "import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], 'rb'), 'sha256').hexdigest())"
    told = hosted.python(check, "/run/put here/file")
    assert told.strip() == hashlib.sha256(content).hexdigest()
    hosted.output("rm -r '/run/put here'")
