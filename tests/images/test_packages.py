from pathlib import Path

import pytest

from banger.errors import Cancelled, HostLacks
from banger.images import packages

OURS = """\
Types: deb
URIs: http://mirror.example/debian
Suites: {release} {release}-updates {release}-backports
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
OTHERS = """\
deb [signed-by=/usr/share/keyrings/vendor.gpg] https://vendor.example/debian {release} main
deb https://vendor.example/debian stable main
deb https://vendor.example/apt {release} main
deb https://vendor.example/debian {release} stable
# deb http://mirror.example/debian {release} main
"""


def apt(path: Path, ours: str = "", others: str = "") -> Path:
    parts = path / "sources.list.d"
    parts.mkdir()
    release = packages._codename()
    (parts / "debian.sources").write_text(ours.format(release=release))
    (parts / "others.list").write_text(others.format(release=release))
    return path


def test_only_debians_own_sources_are_used(tmp_path: Path) -> None:
    """Other vendors' entries and backports are left out; ours are written for the wanted release."""
    key = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    assert packages.sources("forky", apt(tmp_path, OURS, OTHERS)).splitlines() == [
        f"deb {key} http://mirror.example/debian forky main",
        f"deb {key} http://mirror.example/debian forky-updates main",
    ]


def test_a_machine_without_debians_sources_is_told(tmp_path: Path) -> None:
    """Vendors' entries alone are not enough to build from."""
    with pytest.raises(HostLacks):
        packages.sources("forky", apt(tmp_path, "", OTHERS))


@pytest.mark.slow
def test_a_cancelled_bootstrap_leaves_neither_files_nor_mounts(tmp_path: Path) -> None:
    """Killed while it installs, mmdebstrap leaves nothing but half an archive, and mounts nothing here."""

    def mounts() -> int:
        return Path("/proc/self/mountinfo").read_text().count(str(tmp_path))

    def working() -> bool:
        assert mounts() == 0
        return any(tmp_path.glob("*/*/var/lib/dpkg/info/*"))

    with pytest.raises(Cancelled):
        packages.bootstrap(
            tmp_path / "out.tar", suite="bookworm", variant="minbase", include=("make",), cancelled=working
        )
    assert {path.name for path in tmp_path.iterdir()} <= {"out.tar"}
    assert mounts() == 0
