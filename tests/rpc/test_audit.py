"""`ops audit`: what is on the host and nobody's is found, named and removed, and nothing else is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator

import pytest

from banger import proc
from banger.testing.home import Home

pytestmark = pytest.mark.guest  # a VM is made, though none is booted


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    with Home() as home:
        assert home.banger("vm", "create", "web", "--no-start", "--wait", timeout_s=280).returncode == 0
        yield home


def stray_directory(home: Home) -> tuple[str, str]:
    paths = home.dirs.vm("vm-stray000")
    paths.directory.mkdir()
    return "directory", str(paths.directory)


def stray_file(home: Home) -> tuple[str, str]:
    vm = home.json("vm", "show", "web")["vm"]["id"]
    initrd = home.dirs.vm(vm).initrd
    initrd.write_text("nobody's: the VM does not run")
    return "file", str(initrd)


def stray_socket(home: Home) -> tuple[str, str]:
    path = home.dirs.vm("vm-stray000").qmp
    path.touch()
    return "socket", str(path)


def stray_process(home: Home) -> tuple[str, str]:
    subprocess.Popen(
        ["setsid", "--fork", "sh", "-c", f"sleep 300 # {home.dirs.runtime}"],
        env={**os.environ, "BANGER_VM": "vm-stray000"},
    ).wait()
    return "process", "vm-stray000"


@pytest.mark.parametrize("plant", [stray_directory, stray_file, stray_socket, stray_process])
def test_a_leak_of_each_kind_is_found_and_removed(
    home: Home, plant: Callable[[Home], tuple[str, str]]
) -> None:
    """It is named, the exit code tells, `--fix` removes it, and the VM beside it is whole."""
    assert home.banger("ops", "audit").returncode == 0
    kind, name = plant(home)
    found = home.json("ops", "audit")
    assert [(leak["kind"], leak["id"]) for leak in found["leaked"]] == [(kind, name)]
    assert home.banger("ops", "audit").returncode == 1
    fixed = home.json("ops", "audit", "--fix")
    assert (fixed["leaked"], fixed["missing"]) == ([], [])
    assert [leak["id"] for leak in fixed["removed"]] == [name]
    assert home.banger("ops", "audit").returncode == 0
    assert proc.find_by_environ("BANGER_VM", "vm-stray000") == []
    vm = home.json("vm", "show", "web")["vm"]
    assert vm["state"] == "stopped"
    assert home.dirs.vm(vm["id"]).overlay.exists()


def test_what_the_ledger_has_and_the_host_has_not_is_named(home: Home) -> None:
    """A disk that someone else deleted is missing, with the operation that made it."""
    vm = home.json("vm", "show", "web")["vm"]
    overlay = home.dirs.vm(vm["id"]).overlay
    aside = overlay.rename(overlay.with_suffix(".aside"))
    found = home.json("ops", "audit")
    assert [(gone["kind"], gone["id"]) for gone in found["missing"]] == [("file", str(overlay))]
    assert found["missing"][0]["op"] == vm["history"][0]["op"]
    aside.rename(overlay)
    assert home.banger("ops", "audit").returncode == 0


def test_after_all_is_deleted_as_much_is_released_as_was_acquired(home: Home) -> None:
    """The line an operator wants to see: acquired n, released n, leaked 0."""
    assert home.banger("vm", "delete", "web").returncode == 0
    found = home.json("ops", "audit")
    assert found["acquired"] == found["released"] > 0
    assert found["held"] == 0
    text = home.banger("ops", "audit").stdout
    n = found["acquired"]
    assert text == f"acquired {n}, released {n}, held 0, leaked 0, missing 0\n"
