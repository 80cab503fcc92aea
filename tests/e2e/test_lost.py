"""The log is lost: what is on the disk, and what runs, is found again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from banger.testing.home import Home

pytestmark = pytest.mark.guest


@pytest.fixture
def home() -> Iterator[Home]:
    with Home() as home:
        home.configure("memory_mib = 256\n")
        yield home


def lose_the_log(home: Home) -> None:
    assert home.banger("daemon", "stop").returncode == 0
    for path in home.dirs.state.glob("banger.db*"):
        path.unlink()


def settled(home: Home) -> dict[str, str]:
    """Wait for whatever is under way, and map each VM to its state."""
    for op in home.json("ops", "list")["ops"]:
        home.banger("ops", "follow", op["id"])
    return {vm["name"]: vm["state"] for vm in home.json("ps", "-a")["vms"]}


def test_vms_outlive_their_log(home: Home) -> None:
    """One that runs goes on and is reached, one that is stopped starts with its files; then both go."""
    for name in ("up", "down"):
        assert home.banger("vm", "create", name, "--wait").returncode == 0
    home.banger("vm", "exec", "down", "--", "sh", "-c", "echo kept > /root/file")
    assert home.banger("vm", "stop", "down").returncode == 0
    vmm = home.vmm("up")
    lose_the_log(home)
    assert settled(home) == {"up": "running", "down": "stopped"}
    assert home.vmm("up") == vmm
    assert home.banger("vm", "exec", "up", "--", "hostname").stdout == "up\n"
    assert home.banger("vm", "start", "down").returncode == 0
    assert home.banger("vm", "exec", "down", "--", "cat", "/root/file").stdout == "kept\n"
    assert [op["kind"] for op in home.json("vm", "history", "up")["ops"]] == ["vm.recover"]
    audited = home.json("ops", "audit")
    assert (audited["leaked"], audited["missing"]) == ([], [])
    assert home.banger("vm", "delete", "up", "down").returncode == 0
    assert home.leftovers() == []
    assert home.banger("daemon", "stop").returncode == 0
    assert settled(home) == {}, "what was deleted is not found again"


def test_a_lost_vm_waits_for_its_name(home: Home) -> None:
    """While another VM has its name it is left alone, by the sweep as well; then it comes back."""
    assert home.banger("vm", "create", "web", "--no-start", "--wait").returncode == 0
    lose_the_log(home)
    directory = next((home.dirs.state / "vms").iterdir())
    kept = directory.rename(home.path / directory.name)
    assert home.banger("vm", "create", "web", "--no-start", "--wait").returncode == 0
    kept.rename(directory)
    assert home.banger("daemon", "stop").returncode == 0
    assert list(settled(home)) == ["web"]
    assert home.banger("ops", "audit", "--fix").returncode == 0
    assert directory.exists()
    assert home.banger("vm", "delete", "web").returncode == 0
    assert home.banger("daemon", "stop").returncode == 0
    assert settled(home) == {"web": "stopped"}
    assert home.json("vm", "show", "web")["vm"]["id"] == directory.name


def test_half_a_vm_is_not_taken_for_a_whole_one(home: Home) -> None:
    """A directory without a readable record, or without its disks, is nobody's: the audit names it."""
    assert home.banger("vm", "create", "web", "--no-start", "--wait").returncode == 0
    lose_the_log(home)
    directory = next((home.dirs.state / "vms").iterdir())
    (directory / "vm.json").write_text('{"vm": "vm-other000"}')
    assert settled(home) == {}
    assert {each["id"] for each in home.json("ops", "audit")["leaked"]} > {str(directory)}
    assert home.banger("ops", "audit", "--fix").returncode == 0
    assert home.leftovers() == []
