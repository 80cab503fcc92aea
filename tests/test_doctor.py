from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest

from banger import doctor, proc
from banger.config import Config, Dirs, find_dirs
from banger.doctor import examine
from banger.doctor.findings import Check
from banger.vmm import kvm


def fresh(tmp_path: Path) -> Dirs:
    """Directories of an owner who has never run banger: none of them exists."""
    return find_dirs({"HOME": str(tmp_path / "home"), "XDG_RUNTIME_DIR": "/tmp/banger-none"})


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


def test_a_fresh_host_passes(tmp_path: Path) -> None:
    """Where everything is installed nothing fails, without a store, and nothing is made by looking."""
    checks = examine(fresh(tmp_path), Config())
    assert [check for check in checks if check.status == "fail"] == []
    assert list(tmp_path.iterdir()) == []


def test_the_network_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at the host opens no connection."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    examine(fresh(tmp_path), Config())


def test_whatever_is_not_right_has_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host that lacks every program each of them fails, naming the package to install."""
    monkeypatch.setattr(proc, "SEARCH_PATH", str(tmp_path))
    checks = examine(fresh(tmp_path), Config())
    failed = {check.name: check for check in checks if check.status == "fail"}
    for program, package, _ in doctor.PROGRAMS:
        assert failed[program].hint == f"apt-get install {package}"
    assert all(check.hint for check in checks if check.status != "pass")


def test_a_wrong_config_file_is_shown(tmp_path: Path) -> None:
    """A misspelt key fails its check and is named; the other checks still run."""
    dirs = fresh(tmp_path)
    dirs.config.mkdir(parents=True)
    (dirs.config / "config.toml").write_text("vcpus = 3\n")
    checks = examine(dirs, Config())
    assert named(checks, "config file").status == "fail"
    assert "vcpus" in named(checks, "config file").detail
    assert named(checks, "memory").detail


def test_kvm_that_is_demanded_and_broken_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is only slow under `auto` is a failure when the configuration insists on KVM."""
    monkeypatch.setattr(kvm, "DEVICE", tmp_path / "none")
    assert named(examine(fresh(tmp_path), Config()), "accelerator").status == "warn"
    assert named(examine(fresh(tmp_path), Config(accelerator="tcg")), "accelerator").status == "pass"
    assert named(examine(fresh(tmp_path), Config(accelerator="kvm")), "accelerator").status == "fail"


def test_a_deep_runtime_directory_fails(tmp_path: Path) -> None:
    """A directory in which no socket could be bound is found before a VM needs one."""
    deep = msgspec.structs.replace(fresh(tmp_path), runtime=tmp_path / ("x" * 90))
    check = named(examine(deep, Config()), "socket paths")
    assert check.status == "fail"
    assert check.hint is not None


def test_a_file_in_the_way_of_a_directory_fails(tmp_path: Path) -> None:
    """A state directory that cannot be made is told with the path that is in the way."""
    (tmp_path / "home").touch()
    check = named(examine(fresh(tmp_path), Config()), "state directory")
    assert check.status == "fail"
    assert str(tmp_path / "home") in check.detail


def test_a_full_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little space for the first image is told before it is downloaded."""
    monkeypatch.setattr(doctor, "NEEDED_CACHE_MIB", 1 << 40)
    assert named(examine(fresh(tmp_path), Config()), "space for images").status == "fail"
    assert named(examine(fresh(tmp_path), Config()), "space for VMs").status == "pass"


def test_sizes_tell_where_they_come_from(tmp_path: Path) -> None:
    """A default and a configured size are told apart."""
    detail = named(examine(fresh(tmp_path), Config(memory_mib=333)), "default sizes").detail
    assert "memory 333 MiB (from the config)" in detail
    assert "(from the host)" in detail


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("deb http://example.invalid/debian bookworm main\n", True),
        ("Types: deb\nURIs: http://example.invalid\n", True),
        ("# deb http://example.invalid\n", False),
        ("Types: deb-src\n", False),
        ("", False),
    ],
)
def test_an_apt_source_is_recognised(tmp_path: Path, text: str, found: bool) -> None:
    """Both formats of apt's sources count; comments and sources of source packages do not."""
    file = tmp_path / "debian.sources"
    file.write_text(text)
    assert doctor._has_source(file) is found


def test_a_subordinate_range_is_found_by_name(tmp_path: Path) -> None:
    """An ordinary user's entry is found by the whole name only."""
    file = tmp_path / "subuid"
    file.write_text("daisy2:100000:65536\n")
    assert doctor._has_entry(file, "daisy2")
    assert not doctor._has_entry(file, "daisy")
    assert not doctor._has_entry(tmp_path / "none", "daisy")
