"""Root disks where the host cannot make them: what is asked for is refused at once, and nothing is left."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import pytest

from banger.errors import HostLacks
from banger.testing.bridged import Bridged
from banger.testing.home import Home

pytestmark = pytest.mark.guest


def _has_snapshots() -> bool:
    if not shutil.which("dmsetup"):
        return False
    asked = ["dmsetup", "target-version", "snapshot"]
    return subprocess.run(asked, capture_output=True, timeout=30, check=False).returncode == 0


@pytest.fixture
def without_helper() -> Iterator[Home]:
    with Home() as home:
        home.configure(f'root_socket = "{home.path}/none.sock"\n')
        yield home


@pytest.fixture
def without_device_mapper() -> Iterator[Home]:
    """A banger with a real root helper on a kernel that has no device-mapper."""
    if _has_snapshots():
        pytest.skip("this host can make snapshots")
    with Bridged() as home:
        yield home


@pytest.mark.parametrize(
    ("fixture", "sentence"),
    [
        ("without_helper", "Root makes dm-snapshots, and root's helper is not there."),
        ("without_device_mapper", "This host's kernel has no device-mapper that makes snapshots."),
    ],
)
def test_one_that_cannot_be_made_is_refused(
    request: pytest.FixtureRequest, fixture: str, sentence: str
) -> None:
    """With one sentence and a hint, before any operation: no VM, no file, no name is taken."""
    home: Home = request.getfixturevalue(fixture)
    done = home.banger("vm", "create", "web", "--root-disk", "snapshot", "--wait")
    assert done.returncode == HostLacks.exit_code
    assert sentence in done.stderr
    assert 'root_disk = "overlay"' in done.stderr
    assert home.json("ops", "list")["ops"] == []
    assert home.leftovers() == []
