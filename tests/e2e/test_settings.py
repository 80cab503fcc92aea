"""`vm set` on a real guest: more CPUs, memory and disk, and what was there stays."""

from __future__ import annotations

import re

import pytest

from banger.tasks import lost
from banger.testing.home import Home

pytestmark = pytest.mark.guest

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGJhbmdlcg anna@desk"
SIZES = "nproc; free -m | awk '/Mem/ {print $2}'; df -m /root | awk 'END {print $2}'; cat /root/kept"


def test_more_of_everything(home: Home, web: str) -> None:
    """CPUs and memory change at the next start, and both are shown till then; a stopped one's disk grows."""
    assert home.banger("vm", "ssh", web, "--", "sh", "-c", "echo kept > /root/kept").returncode == 0
    assert home.banger("vm", "set", web, "--vcpu", "4", "--memory", "512M").returncode == 0
    shown = home.banger("vm", "show", web).stdout
    assert re.search(r"^vcpu: +\d+ \(asked for: 4, from its next start\)$", shown, re.MULTILINE)
    assert re.search(r"^memory: +256MiB \(asked for: 512MiB, from its next start\)$", shown, re.MULTILINE)
    in_use = home.banger("vm", "set", web, "--disk-size", "9G")
    assert (in_use.returncode, "`banger vm stop web` first" in in_use.stderr) == (4, True)

    assert home.banger("vm", "stop", web).returncode == 0
    done = home.json("vm", "set", web, "--disk-size", "9G")
    assert done["fate"] == "done"
    assert home.banger("vm", "start", web).returncode == 0
    sizes = home.banger("vm", "ssh", web, "--", "sh", "-c", SIZES).stdout.split()
    assert sizes[0] == "4"
    assert 400 < int(sizes[1]) < 512
    assert 8800 < int(sizes[2]) < 9216
    assert sizes[3] == "kept"
    assert home.json("vm", "show", web)["vm"]["runs_with"] == {}
    record = lost.read(home.dirs.vm(done["vm"]))
    assert record is not None
    assert (record.spec.vcpu, record.spec.disk_mib) == (4, 9216), "it is known without the log, too"


def test_refusals(home: Home, web: str) -> None:
    """What cannot be is refused before anything is done: nothing, too much, less disk."""
    before = home.json("ops", "list")["ops"][0]["id"]
    for words, code in (
        ((), 2),
        (("--vcpu", "65"), 2),
        (("--vcpu", "0"), 2),
        (("--memory", "64M"), 2),
        (("--memory", "9999G"), 2),
        (("--disk-size", "1G"), 2),
        (("--disk-size", "99999T"), 2),
    ):
        assert home.banger("vm", "set", web, *words).returncode == code, words
    assert home.json("ops", "list")["ops"][0]["id"] == before


def test_a_disk_that_cannot_grow_stays_as_it_is(home: Home, web: str) -> None:
    """When the larger disk cannot be made, the operation is undone and the disk is the one there was."""
    assert home.banger("vm", "stop", web).returncode == 0
    vm = home.json("vm", "show", web)["vm"]
    work = home.dirs.vm(vm["id"]).work
    aside = work.rename(work.with_name("aside"))
    work.write_bytes(bytes(4096))  # no file system
    failed = home.banger("vm", "set", web, "--disk-size", str(vm["disk_mib"] + 1024), "--vcpu", "3")
    assert failed.returncode == 6, failed.stderr
    assert "work.ext4" in failed.stderr
    assert work.read_bytes() == bytes(4096)
    assert list(work.parent.glob(".work.ext4.*")) == []
    now = home.json("vm", "show", web)["vm"]
    assert (now["disk_mib"], now["vcpu"]) == (vm["disk_mib"], vm["vcpu"]), "all of it or nothing"
    aside.rename(work)


def test_files_of_the_owner_are_in_the_guest() -> None:
    """What [[file_sync]] names, who the owner is to git and their key are in /root before the first boot."""
    with Home() as home:
        place = home.path / "anna"
        (place / "tree").mkdir(parents=True)
        (place / "tree" / "a file").write_text("deep\n")
        (place / "tree" / "link").symlink_to("/etc/shadow")
        (place / ".vimrc").write_text("set nu\n")
        (place / "id.pub").write_text(f"{KEY}\n")
        (place / ".gitconfig").write_text("[user]\n\tname = Anna\n\temail = anna@example.org\n")
        home.environ |= {"HOME": str(place), "XDG_CACHE_HOME": str(home.dirs.cache.parent)}
        home.configure(
            'memory_mib = 256\nssh_key = "~/id.pub"\n'
            '[[file_sync]]\nhost = "~/.vimrc"\nmode = "0644"\n'
            '[[file_sync]]\nhost = "tree"\nguest = "/root/copy"\n'
            '[[file_sync]]\nhost = "absent"\n'
        )
        created = home.banger("vm", "create", "web", "--wait")
        assert created.returncode == 0, created.stderr
        look = "stat -c '%n %a %U' .vimrc copy copy/*; cat .vimrc copy/* .gitconfig .ssh/authorized_keys"
        said = home.banger("vm", "ssh", "web", "--", "sh", "-c", look).stdout.splitlines()
        assert said[:3] == [".vimrc 644 root", "copy 700 root", "copy/a file 600 root"]
        assert said[3:8] == ["set nu", "deep", "[user]", '\temail = "anna@example.org"', '\tname = "Anna"']
        assert said[8] == KEY
        assert len(said) == 10, "and banger's own key"
        told = home.banger(
            "events", "list", "--op", home.json("ops", "list")["ops"][-1]["id"], "--json"
        ).stdout
        assert "not taken along: 'link' (a link); absent (not there)" in told
        assert home.banger("vm", "delete", "web").returncode == 0


def test_a_wrong_setting_is_named() -> None:
    """A path that leads out of /root, or an age that is none, stops banger with the key's name."""
    with Home() as home:
        for text, key in (
            ('[[file_sync]]\nhost = "x"\nguest = "/etc/passwd"\n', "file_sync[0]"),
            ('auto_stop_stale_after = "soon"\n', "auto_stop_stale_after"),
        ):
            home.configure(text)
            done = home.banger("vm", "list", "-q")
            assert done.returncode == 2
            assert key in done.stderr
