"""One guest that is a whole host, shared by all tests of this room and ended after the last of them.

A test asks for `hosted` and is marked `guest`. In the guest it is root on Debian 12 with systemd:

    hosted.run("systemctl is-active dbus")     a script for `sh -eu`, or a list of words; gives the
                                               CompletedProcess, with text; TimeoutExpired after 2 min
    hosted.output("modprobe tun; lsmod")       the same for what has to succeed: gives its standard output
    hosted.put("/etc/systemd/system/a.service", b"...", 0o644)
    hosted.python("import banger; ...", "an argument")
                                               /opt/banger/bin/python3 -I: banger as it is in this working
                                               tree, in a place that only root writes to

There is no network but the loopback, devices are emulated, and a Python program takes a second or more to
begin: ask for much with one script. Tests run one after another on the same guest, so each takes away what
it made, and none reboots it. The first one waits half a minute for the guest, and once for its image.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from banger.testing import hosted as whole
from tests.vmm.conftest import tiny_kernel as tiny_kernel

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="package")
def hosted() -> Iterator[whole.Hosted]:
    """The guest; skips, with the reason, where this machine cannot make one."""
    if (reason := whole.lacking()) is not None:
        pytest.skip(reason)
    with whole.booted(CHECKOUT) as guest:
        yield guest
