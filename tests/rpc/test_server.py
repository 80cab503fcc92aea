"""The daemon's socket, spoken to directly."""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from banger.rpc import protocol
from banger.rpc.names import random_name
from banger.testing.home import Home


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    with Home() as home:
        assert home.banger("daemon", "start").returncode == 0
        yield home


class Line:
    """One connection to the daemon."""

    def __init__(self, path: Path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")

    def ask(self, line: bytes) -> Any:
        self.socket.sendall(line + b"\n")
        return json.loads(self.file.readline())


@pytest.fixture
def line(home: Home) -> Iterator[Line]:
    line = Line(home.dirs.socket)
    yield line
    line.file.close()
    line.socket.close()


def test_the_socket_is_private(home: Home) -> None:
    """Only the owner may open it."""
    assert stat.S_IMODE(home.dirs.socket.stat().st_mode) == 0o600


def test_several_requests_on_one_connection(line: Line) -> None:
    """Each gets its own answer, in order."""
    for _ in range(3):
        assert line.ask(b'{"method": "hello"}')["result"]["version"]


@pytest.mark.parametrize(
    ("request_line", "code", "words"),
    [
        (b"not json", "invalid", "not valid"),
        (b"[]", "invalid", "not valid"),
        (b'{"method": "vm.explode"}', "invalid", "no method 'vm.explode'"),
        (b'{"method": "vm.create", "params": {"vcpus": 1}}', "invalid", "vcpus"),
        (b'{"method": "vm.create", "params": {"vcpu": "1"}}', "invalid", "vcpu"),
        (b'{"method": "vm.create", "params": {"vcpu": true}}', "invalid", "vcpu"),
        (b'{"method": "vm.create", "params": {"vcpu": 0}}', "invalid", "--vcpu 0"),
        (b'{"method": "vm.create", "params": {"vcpu": 65}}', "invalid", "--vcpu 65"),
        (b'{"method": "vm.create", "params": {"memory_mib": 1}}', "invalid", "--memory 1MiB"),
        (b'{"method": "vm.create", "params": {"disk_mib": -5}}', "invalid", "--disk-size"),
        (b'{"method": "vm.create", "params": {"name": "No_Label"}}', "invalid", "not a valid VM name"),
        (b'{"method": "vm.create", "params": {"name": "x\\n"}}', "invalid", "not a valid VM name"),
        (b'{"method": "vm.create", "params": {"image": "windows"}}', "not-found", "no image named 'windows'"),
        (b'{"method": "vm.create", "params": {"image": "../etc"}}', "invalid", "not the name of an image"),
        (b'{"method": "vm.create", "params": {"kernel": "none"}}', "not-found", "no kernel named 'none'"),
        (b'{"method": "vm.stop", "params": {"vm": "nobody"}}', "not-found", "no VM named 'nobody'"),
        (b'{"method": "ops.show", "params": {"op": "op-zzzz"}}', "not-found", "no operation op-zzzz"),
        (b'{"method": "ops.show", "params": {"op": "%"}}', "invalid", "not an operation id"),
        (b'{"method": "image.build", "params": {"image": "plan9"}}', "not-found", "no recipe"),
        (b'{"method": "hello", "params": ' + b"[" * 2000 + b"]" * 2000 + b"}", "invalid", "not valid"),
    ],
)
def test_a_bad_request_gets_a_sentence_and_leaves_nothing(
    line: Line, request_line: bytes, code: str, words: str
) -> None:
    """Refused by name, with no operation recorded; the connection goes on."""
    before = line.ask(b'{"method": "ops.list"}')["result"]["ops"]
    error = line.ask(request_line)["error"]
    assert error["code"] == code
    assert words in error["message"]
    assert line.ask(b'{"method": "ops.list"}')["result"]["ops"] == before
    assert line.ask(b'{"method": "vm.list"}')["result"]["vms"] == []


def test_a_line_without_end_is_cut_off(home: Home, line: Line) -> None:
    """More than MAX_REQUEST bytes without a newline close that connection and no other."""
    with pytest.raises((ConnectionError, json.JSONDecodeError)):
        line.ask(b"x" * (protocol.MAX_REQUEST * 2))
    assert home.banger("daemon", "status").returncode == 0


def test_every_method_is_documented_and_known() -> None:
    """Each method has a docstring that tells its answer, and none is there twice."""
    for name, request in protocol.METHODS.items():
        assert request.method == name
        assert "->" in (request.__doc__ or "") or name == "vm.table"


def test_a_random_name_is_a_dns_label_and_free() -> None:
    """Names are made anew until one is not taken."""
    from banger.model import check_vm_name

    taken: set[str] = set()
    for _ in range(200):
        name = random_name(taken)
        assert name not in taken
        taken.add(check_vm_name(name))
