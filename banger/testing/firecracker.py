"""A stand-in for Firecracker, where there is none: its command line, its API, and real guests.

It takes the words that Firecracker takes, judges every request by Firecracker's own API description and
documented states (`firecracker_rules`), and runs the guest on QEMU (`firecracker_guest`). It is *not* a
proof that Firecracker boots anything: its devices, its boot protocol and its speed are QEMU's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

from banger.testing import firecracker_guest, firecracker_rules
from banger.testing.firecracker_guest import Guest
from banger.testing.firecracker_rules import Fault, Json, Rules, Shapes, memory_of
from banger.vmm import vsock

VERSION = os.environ.get("BANGER_FIRECRACKER_VERSION", "1.13.1")
RECORD = "BANGER_FIRECRACKER_RECORD"
"""A file to which each request and its status are appended, a JSON object a line."""

MAX_HEAD, MAX_BODY = 8192, 51200
BAD_ARGUMENTS = 153
"""Firecracker's exit status for a command line that it does not take."""

INSTANCE_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
HOST_PORT = 1 << 30
"""The first of the ports that Firecracker gives the host's ends of vsock connections."""


class Arguments(argparse.ArgumentParser):
    """Firecracker's words, as far as an owner may use them."""

    def __init__(self) -> None:
        super().__init__(prog="firecracker", allow_abbrev=False)
        self.add_argument("--id", default="anonymous-instance")
        self.add_argument("--api-sock", type=Path, default=Path("/run/firecracker.socket"))
        for word in ("--log-path", "--level", "--module", "--metrics-path", "--http-api-max-payload-size"):
            self.add_argument(word)
        for word in ("--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us"):
            self.add_argument(word, type=int)
        for word in ("--show-level", "--show-log-origin", "--boot-timer"):
            self.add_argument(word, action="store_true")
        filters = self.add_mutually_exclusive_group()
        filters.add_argument("--no-seccomp", action="store_true")
        filters.add_argument("--seccomp-filter", type=Path)
        self.add_argument("--version", action="version", version=f"Firecracker v{VERSION}")

    def error(self, message: str) -> NoReturn:
        """End as Firecracker does when it does not understand."""
        self.exit(BAD_ARGUMENTS, f"Arguments parsing error: {message}\n")


class Server:
    """One microVM, and who talks with it."""

    def __init__(self, instance: str, shapes: Shapes, guest: Guest):
        self._instance = instance
        self._rules = Rules(shapes)
        self._guest = guest
        self._turn = asyncio.Lock()  # Firecracker carries out one request after another
        self._ports = 0
        self._effects: dict[str, Callable[[Json], Awaitable[None]]] = {
            "/actions": self._act,
            "/vsock": self._make_vsock,
            "/vm": self._pause_or_resume,
            "/snapshot/create": self._save,
            "/snapshot/load": self._load,
        }

    async def run(self, path: Path) -> int:
        """Serve until the guest has ended; give the exit status."""
        await asyncio.start_unix_server(self._api, path, limit=MAX_HEAD)
        await self._guest.ended.wait()
        return int(self._guest.status != 0)

    async def _api(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            while True:
                method, path, body = await _request(reader)
                async with self._turn:
                    status, answer = await self._answer(method, path, body)
                _record(method, path, body, status)
                writer.write(_response(status, answer))
                await writer.drain()
        writer.close()

    async def _answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        try:
            if len(body) > MAX_BODY:
                raise Fault("The request's body is too long.")
            template, asked = self._rules.judge(method, path, body)
            if method == "GET":
                return 200, self._told(template)
            if effect := self._effects.get(template):
                await effect(asked)
            self._rules.keep(method, template, asked)
        except Fault as fault:
            return 400, {"fault_message": str(fault)}
        return 204, None

    def _told(self, template: str) -> Any:
        about = {
            "app_name": "Firecracker",
            "id": self._instance,
            "state": self._rules.state,
            "vmm_version": VERSION,
        }
        told: dict[str, Any] = {
            "/": about,
            "/version": {"firecracker_version": VERSION},
            "/machine-config": self._rules.machine,
            "/vm/config": self._rules.configuration(),
        }
        return told[template]

    async def _act(self, asked: Json) -> None:
        match asked["action_type"]:
            case "InstanceStart":
                await self._guest.start(self._rules)
            case "SendCtrlAltDel":
                await self._guest.execute("system_powerdown")
            case "FlushMetrics" if "metrics" in self._rules.devices:
                self._write_metrics(Path(self._rules.devices["metrics"]["metrics_path"]))

    def _write_metrics(self, path: Path) -> None:
        line = json.dumps({"utc_timestamp_ms": 0, "api_server": {"process_startup_time_us": 0}})
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_APPEND | os.O_CLOEXEC)
        with contextlib.suppress(BlockingIOError), os.fdopen(fd, "wb", buffering=0) as file:
            file.write(line.encode() + b"\n")

    async def _pause_or_resume(self, asked: Json) -> None:
        await self._guest.execute("stop" if asked["state"] == "Paused" else "cont")

    async def _save(self, asked: Json) -> None:
        await self._guest.save(asked["mem_file_path"])
        Path(asked["snapshot_path"]).write_text(json.dumps(self._rules.configuration()))

    async def _load(self, asked: Json) -> None:
        try:
            self._rules.take_over(json.loads(Path(asked["snapshot_path"]).read_bytes()))
        except (ValueError, KeyError):
            raise Fault("Failed to load the snapshot: its state is not readable.") from None
        if vsock_device := self._rules.devices.get("vsock"):
            await self._make_vsock(vsock_device)
        await self._guest.start(self._rules, incoming=memory_of(asked))
        if asked.get("resume_vm"):
            await self._guest.execute("cont")

    async def _make_vsock(self, asked: Json) -> None:
        await asyncio.start_unix_server(self._vsock, asked["uds_path"], limit=MAX_HEAD)

    async def _vsock(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Join a client with the agent's virtio-serial port, if the guest has it open."""
        with contextlib.suppress(asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, Fault):
            asked = await reader.readuntil(b"\n")
            if asked == b"CONNECT %d\n" % vsock.AGENT_PORT and await self._guest.listens():
                inner, outer = await asyncio.open_unix_connection(firecracker_guest.agent_address())
                self._ports += 1
                writer.write(b"OK %d\n" % (HOST_PORT + self._ports))
                await _join((reader, outer), (inner, writer))
        writer.close()


async def _join(*ways: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
    """Carry bytes both ways until one side has no more."""
    tasks = [asyncio.create_task(_carry(*way)) for way in ways]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    for _, writer in ways:
        writer.close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(MAX_HEAD):
            writer.write(piece)
            await writer.drain()


async def _request(reader: asyncio.StreamReader) -> tuple[str, str, bytes]:
    """Read one HTTP/1.1 request (RFC 9112): its method, its path and its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    method, path, _ = head.split("\r\n", 1)[0].split(" ")
    length = re.search(r"(?im)^content-length:\s*(\d+)\s*$", head)
    return method, path, await reader.readexactly(int(length[1])) if length else b""


def _response(status: int, answer: Any) -> bytes:
    body = b"" if answer is None else json.dumps(answer).encode()
    sizes = [f"Content-Length: {len(body)}", "Content-Type: application/json"] if body else []
    head = [f"HTTP/1.1 {status} ", "Server: Firecracker API", "Connection: keep-alive", *sizes, "", ""]
    return "\r\n".join(head).encode() + body


def _record(method: str, path: str, body: bytes, status: int) -> None:
    if place := os.environ.get(RECORD):
        line = {"method": method, "path": path, "body": body.decode("utf-8", "replace"), "status": status}
        with Path(place).open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> int:
    """Be Firecracker."""
    asked = Arguments().parse_args()
    if not INSTANCE_ID.fullmatch(asked.id):
        Arguments().error(f"Invalid instance ID: {asked.id}")
    if asked.api_sock.exists():
        sys.stderr.write(f"Failed to open the API socket at: {asked.api_sock}. Check that it is not used.\n")
        return 1
    path = firecracker_rules.description()
    if path is None:
        sys.stderr.write(f"This stand-in needs Firecracker's API description: {firecracker_rules.ENVIRON}.\n")
        return 1
    return asyncio.run(Server(asked.id, Shapes(path), Guest()).run(asked.api_sock))


if __name__ == "__main__":
    sys.exit(main())
