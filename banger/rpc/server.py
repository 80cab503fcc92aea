"""Serve clients on the daemon's socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from pathlib import Path

import msgspec
import structlog

from banger import log as logging
from banger.errors import BangerError, WrongState
from banger.events import queries
from banger.events.fold import fold_op
from banger.guest.connections import Connections
from banger.rpc import exec as guest_exec
from banger.rpc import protocol as p
from banger.rpc import views
from banger.rpc.service import Service
from banger.rpc.tail import Tail
from banger.rpc.watch import Tethers

CONSOLE_LOOK_S = 0.2
CONSOLE_CHUNK = 64 * 1024
_UCRED = struct.Struct("3i")  # pid, uid, gid: socket(7), SO_PEERCRED


class Server:
    """Speaks the protocol with any number of clients at once."""

    def __init__(self, service: Service, tail: Tail, connections: Connections, tethers: Tethers):
        self._service = service
        self._tail = tail
        self._connections = connections
        self._tethers = tethers

    async def listen(self, path: Path) -> asyncio.Server:
        """Start serving on a socket that only its owner may open."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # a dead daemon's: this one holds the lock
        serving = await asyncio.start_unix_server(self._serve, path, limit=p.MAX_REQUEST)
        path.chmod(0o600)  # below a directory of 0700: nobody else could reach it meanwhile
        return serving

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with contextlib.AsyncExitStack() as tied:
                if _peer_uid(writer) == os.getuid():
                    while line := await reader.readline():
                        await self._one(line, reader, writer, tied)
                        await writer.drain()
        except (ConnectionError, ValueError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went away, its line has no end, or the daemon stops
        finally:
            writer.close()

    async def _one(
        self,
        line: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        tied: contextlib.AsyncExitStack,
    ) -> None:
        try:
            request = p.decode(line)
            with structlog.contextvars.bound_contextvars(method=request.method):
                await self._answer(request, reader, writer, tied)
        except BangerError as error:
            writer.write(p.failure(error))
        except ConnectionError:
            raise
        except Exception as error:
            logging.get().error("unexpected", exc_info=error)
            writer.write(p.failure(BangerError(f"{type(error).__name__}: {error}")))

    async def _answer(
        self,
        request: p.Request,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        tied: contextlib.AsyncExitStack,
    ) -> None:
        match request:
            case p.OpsFollow():
                await self._follow(request, writer)
            case p.EventsTail(after=after):
                async for row in self._tail.everything(after):
                    writer.write(msgspec.json.encode({"event": views.event(row)}) + b"\n")
                    await writer.drain()
            case p.VmLogs():
                await self._logs(request, writer)
            case p.VmExec():
                await self._exec(request, reader, writer)
            case p.VmTether():
                await self._tether(request, reader, writer)
            case p.VmTable(all=everything):
                rows = self._service.vm_views()
                shown = [row for row in rows if everything or row["state"] not in ("stopped", "failed")]
                writer.write(views.vm_table(shown).encode())
                await writer.drain()
                writer.close()
            case _:
                answer = self._service.answer(request)
                if "op" in answer and isinstance(answer["op"], str):
                    logging.get(op=answer["op"]).info("requested", pid=_peer_pid(writer))
                if isinstance(request, p.VmCreate) and request.ephemeral:
                    # Tied from its first moment: the client may die before it can ask for a tether.
                    vm = queries.find_vm(self._service.log, answer["vm"])
                    await tied.enter_async_context(self._tethers.tied(vm))
                writer.write(p.result(answer))

    async def _follow(self, request: p.OpsFollow, writer: asyncio.StreamWriter) -> None:
        summary = queries.find_op(self._service.log, request.op)
        async for row in self._tail.follow(summary.id, request.after):
            writer.write(msgspec.json.encode({"event": views.event(row)}) + b"\n")
            await writer.drain()
        op = fold_op(self._service.log.read(stream=summary.id))
        assert op is not None
        assert op.ended_boot_us is not None
        writer.write(
            p.result(
                {
                    "op": op.id,
                    "kind": op.kind,
                    "fate": op.fate,
                    "error": op.error,
                    "seconds": (op.ended_boot_us - op.started_boot_us) / 1e6,
                    "vm": op.vm,
                    "name": op.name,
                }
            )
        )

    async def _logs(self, request: p.VmLogs, writer: asyncio.StreamWriter) -> None:
        vm = queries.find_vm(self._service.log, request.vm)
        console = self._service.dirs.vm(vm.id).console
        offset = 0
        if request.tail is not None:
            offset = await asyncio.to_thread(_tail_offset, console, request.tail)
        while True:
            chunk = await asyncio.to_thread(_read_from, console, offset)
            if chunk:
                offset += len(chunk)
                writer.write(msgspec.json.encode({"chunk": chunk.decode("utf-8", "replace")}) + b"\n")
                await writer.drain()
                continue
            now = queries.vm(self._service.log, vm.id)
            if not request.follow or now is None or now.process is None or writer.is_closing():
                break
            # A file has no event that says it has grown without inotify; five looks a second
            # for as long as a person watches are cheaper than a dependency.
            await asyncio.sleep(CONSOLE_LOOK_S)
        writer.write(p.result({}))

    async def _exec(
        self, request: p.VmExec, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        connection = await self._connections.get(self._service.target(request.vm))
        writer.write(p.result({}))
        terminal = (request.term, request.rows, request.cols) if request.tty else None
        try:
            await guest_exec.run(connection, request.argv, terminal=terminal, reader=reader, writer=writer)
        except BangerError as error:
            writer.write(guest_exec.frame(b"f", msgspec.json.encode(error.to_dict())))
        await writer.drain()
        writer.close()

    async def _tether(
        self, request: p.VmTether, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        vm = queries.find_vm(self._service.log, request.vm)
        if not vm.spec.ephemeral:
            raise WrongState(f"{vm.spec.name} is not ephemeral.")
        async with self._tethers.tied(vm):
            writer.write(p.result({}))
            await writer.drain()
            await reader.read()


def _credentials(writer: asyncio.StreamWriter) -> tuple[int, int, int]:
    sock: socket.socket = writer.get_extra_info("socket")
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid, gid


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    return _credentials(writer)[1]


def _peer_pid(writer: asyncio.StreamWriter) -> int:
    return _credentials(writer)[0]


def _read_from(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(CONSOLE_CHUNK)
    except FileNotFoundError:
        return b""


def _tail_offset(path: Path, lines: int) -> int:
    """Find where the last `lines` lines begin."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return 0
    ends = [i + 1 for i, byte in enumerate(content[:-1]) if byte == 0x0A]
    return 0 if lines > len(ends) else ([*ends, len(content)][-lines - 1] if lines else len(content))
