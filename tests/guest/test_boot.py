from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from banger import config
from banger.images import base
from tests.guest import roots
from tests.guest.conftest import Boot

pytestmark = pytest.mark.guest

BUSYBOX: roots.Tree = {"bin/busybox": roots.BUSYBOX.read_bytes(), "bin/sh": "->busybox"}
BARE: dict[str, roots.Tree] = {
    "busybox, no passwd": BUSYBOX,
    "busybox under the name of init": {**BUSYBOX, "sbin/init": "->/bin/busybox"},
    "passwd without root": {**BUSYBOX, "etc/passwd": "daemon:x:1:1::/:/bin/false\n"},
    "root without a usable shell": {**BUSYBOX, "etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\n"},
    "root with another home and id, without a last newline": {
        **BUSYBOX,
        "etc/passwd": "root:x:5:5:root:/elsewhere:/bin/sh",
    },
    "accounts that a library of the image's looks up": {
        **BUSYBOX,
        "etc/nsswitch.conf": "passwd: compat systemd\ngroup: compat\nshadow: compat\n",
    },
    "nothing to run at all": {"data": "none\n"},
    "an init that cannot be run": {**BUSYBOX, "sbin/init": "#!/no/such/program\n"},
    "files where directories belong": dict.fromkeys(
        ("dev", "proc", "sys", "run", "tmp", "root", "etc", "bin", "sbin", "var", "usr"), "a file\n"
    ),
    "directories where files belong": {
        **BUSYBOX,
        **dict.fromkeys(
            ("etc/passwd", "etc/group", "etc/shells", "etc/hosts", "etc/hostname", "etc/resolv.conf"), "/"
        ),
        "sbin/init": "/",
        "root/.ssh/authorized_keys": "/",
    },
    "links out of the image": {
        **BUSYBOX,
        **dict.fromkeys(("dev", "proc", "sys", "run"), "->/../../banger"),
        "etc": "->/banger",
        "tmp": "->../up",
        "root": "->/",
    },
    "links into the image": {
        **BUSYBOX,
        "etc": "->private/etc",
        "private/etc/passwd": "->../accounts",
        "private/accounts": "root:x:0:0:root:/root:/bin/sh\n",
        "private/home/kept": "yes\n",
        "root": "->/private/home",
        "tmp": "->private/tmp",
    },
}


@pytest.mark.parametrize("kind", BARE)
def test_any_image_answers_ssh_and_obeys_the_power_button(boot: Boot, tmp_path: Path, kind: str) -> None:
    """An image needs no SSH server, no libraries, no accounts, no shell, and no sane directories."""
    guest = boot(roots.root(tmp_path, BARE[kind]))
    done = guest.run("echo $HOME; cd /tmp && echo hi > mine && cat mine && exit 7")
    assert (done.stdout, done.returncode) == ("/root\nhi\n", 7), done.stderr
    assert guest.run("cat /etc/hostname; hostname").stdout == "web\nweb\n"
    guest.vmm.power_button(guest.paths)
    assert guest.gone()


def test_links_are_followed_in_the_image_only(boot: Boot, tmp_path: Path) -> None:
    """What is set for the VM goes where the image's links lead; a linked home's content is at /root."""
    guest = boot(roots.root(tmp_path, BARE["links into the image"]))
    assert guest.run("cat /private/etc/hostname").stdout == "web\n"
    assert guest.run("readlink /etc; cat /root/kept").stdout == "private/etc\nyes\n"
    assert guest.run("cat /private/accounts").stdout == "root:x:0:0:root:/root:/bin/sh\n"


def test_nothing_of_the_overlay_shows_in_the_guest(boot: Boot, tmp_path: Path) -> None:
    """The disk below the root is not mounted a second time, where a program could change it."""
    guest = boot(roots.root(tmp_path, BUSYBOX))
    mounted = guest.run("cut -d' ' -f2 /proc/mounts").stdout.split()
    assert sorted(mounted) == [
        "/", "/dev", "/dev/pts", "/dev/shm", "/proc", "/root", "/run", "/sys", "/tmp",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["squashfs", "ext4"])
def test_a_guest_boots_from_either_format(boot: Boot, tmp_path: Path, form: base.Format) -> None:
    """The guest finds out by itself what its base file is."""
    guest = boot(roots.root(tmp_path, BUSYBOX, form))
    assert guest.run("/bin/busybox true").returncode == 0
    assert guest.run("echo mine > /etc/new; cat /etc/new").stdout == "mine\n"


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
