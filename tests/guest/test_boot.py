from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from banger import config, proc
from tests.guest.conftest import Boot

pytestmark = pytest.mark.guest

BUSYBOX = {"bin/busybox": "busybox", "bin/sh": "->busybox"}
BARE = {
    "busybox, no passwd": BUSYBOX,
    "busybox under the name of init": {**BUSYBOX, "sbin/init": "->/bin/busybox"},
    "passwd without root": {**BUSYBOX, "etc/passwd": "daemon:x:1:1::/:/bin/false\n"},
    "root without a usable shell": {**BUSYBOX, "etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\n"},
    "nothing to run at all": {"data": "none\n"},
}


def make_root(path: Path, files: dict[str, str]) -> Path:
    """Make a root file system of very few files: `busybox`, `->` a link, or text."""
    tree = path / "tree"
    for name, what in files.items():
        place = tree / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if what == "busybox":
            shutil.copy(proc.which("busybox", "busybox-static"), place)
        elif what.startswith("->"):
            place.symlink_to(what[2:])
        else:
            place.write_text(what)
    image = path / "root.ext4"
    proc.run(["mkfs.ext4", "-q", "-F", "-E", "root_owner=0:0", "-d", tree, image, "64M"])
    return image


@pytest.mark.parametrize("kind", BARE)
def test_any_image_answers_ssh_and_obeys_the_power_button(boot: Boot, tmp_path: Path, kind: str) -> None:
    """An image needs no SSH server, no libraries, no accounts and no shell."""
    guest = boot(make_root(tmp_path, BARE[kind]))
    done = guest.run("echo $HOME; exit 7")
    assert (done.stdout, done.returncode) == ("/root\n", 7), done.stderr
    guest.vmm.power_button(guest.paths)
    assert guest.gone()


def test_a_session_is_what_a_developer_expects(boot: Boot) -> None:
    """The usual PATH, a private home, bash with /dev/fd, and nothing of ours in the environment."""
    guest = boot()
    session = guest.run("env").stdout
    assert "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n" in session
    assert "HOME=/root\n" in session
    assert "LD_LIBRARY_PATH" not in session
    assert guest.run("cat <(echo hi)").stdout == "hi\n"
    assert guest.run("stat -c %a /root /root/.ssh /root/.ssh/authorized_keys").stdout == "700\n700\n600\n"
    assert guest.run("ls -A /root").stdout.split() == [".bashrc", ".profile", ".ssh"]
    assert guest.run("hostname; cat /etc/hostname").stdout == "web\nweb\n"


def test_orphans_are_reaped(boot: Boot) -> None:
    """A process whose parent is gone does not stay as a zombie."""
    guest = boot()
    guest.run("(sleep 0.1 &); (sleep 0.1 &)")
    assert guest.run("sleep 0.5; ps -eo stat= | grep -c Z").stdout == "0\n"


def test_switching_off_gives_programs_time_to_save_and_files_survive(boot: Boot) -> None:
    """Programs get TERM before the end; what they and the user wrote is there after the next start."""
    guest = boot()
    guest.run("echo mine >> /etc/hosts; echo '# another' >> /root/.ssh/authorized_keys")
    guest.run("(trap 'echo saved > /root/saved; exit' TERM; while :; do sleep 0.1; done) > /dev/null 2>&1 &")
    guest.run("/run/banger/bin/poweroff")
    assert guest.gone()
    guest.close()
    guest.start()
    assert guest.run("cat /root/saved; tail -n 1 /etc/hosts").stdout == "saved\nmine\n"
    assert guest.run("grep -c . /root/.ssh/authorized_keys").stdout == "2\n"


def test_two_guests_share_one_image(boot: Boot) -> None:
    """What one writes the other does not see."""
    one, two = boot(hostname="one"), boot(hostname="two")
    one.run("echo 1 > /etc/mark")
    assert two.run("ls /etc/mark").returncode != 0
    assert one.run("hostname; cat /etc/mark").stdout == "one\n1\n"


def test_files_are_copied_with_sftp(boot: Boot, dirs: config.Dirs, tmp_path: Path) -> None:
    """The default image has what sftp and scp need."""
    guest = boot()
    (tmp_path / "batch").write_text("put /etc/hostname /root/copy\n")
    words = [
        "sftp", "-F", "none", "-b", str(tmp_path / "batch"),
        "-i", str(dirs.user_key), "-P", str(guest.port),
        "-o", f"HostKeyAlias={guest.paths.vm}", "-o", f"UserKnownHostsFile={guest.paths.known_hosts}",
        "root@127.0.0.1",
    ]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    assert guest.run("cat /root/copy").stdout == Path("/etc/hostname").read_text()
