"""Serve clients on the daemon's socket."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
from collections.abc import Coroutine
from pathlib import Path

import msgspec
import structlog

from banger import log as logging
from banger.errors import BangerError, InvalidRequest, WrongState
from banger.events import queries
from banger.events.vocabulary import Recorded
from banger.guest.connections import Connections
from banger.rpc import exec as guest_exec
from banger.rpc import protocol as p
from banger.rpc import views
from banger.rpc.inside import Inside
from banger.rpc.service import Service
from banger.rpc.tail import Tail
from banger.rpc.watch import Tethers
from banger.rpc.workspace import in_workspace

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
        self._inside = Inside(service, connections)

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
                await _while_there(writer, self._follow(request, writer))
            case p.EventsTail():
                await _while_there(writer, self._events_tail(request, writer))
            case p.VmLogs():
                await _while_there(writer, self._logs(request, writer))
            case p.VmExec():
                await _while_there(writer, self._exec(request, reader, writer))
            case p.LooksInside():
                await _while_there(writer, self._look(request, writer))
            case p.VmTether():
                await self._tether(request, reader, writer)
            case p.VmTable(all=everything):
                writer.write(self._service.vm_table(everything=everything).encode())
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

    async def _events_tail(self, request: p.EventsTail, writer: asyncio.StreamWriter) -> None:
        async for row in self._tail.everything(request.after):
            await _tell(writer, row)

    async def _follow(self, request: p.OpsFollow, writer: asyncio.StreamWriter) -> None:
        summary = queries.find_op(self._service.log, request.op)
        async for row in self._tail.follow(summary.id, request.after):
            await _tell(writer, row)
        op = queries.whole_op(self._service.log, summary.id)
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

    async def _look(self, request: p.LooksInside, writer: asyncio.StreamWriter) -> None:
        writer.write(p.result(await self._inside.answer(request)))

    async def _exec(
        self, request: p.VmExec, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        target = self._service.target(request.vm)
        workspace = queries.find_vm(self._service.log, request.vm).workspace
        wanted = in_workspace(workspace, guest_exec.command(request))
        if request.plain and workspace is not None:
            raise WrongState("It has a workspace.")
        writer.write(p.result({}))
        try:
            await guest_exec.serve(request, wanted, self._connections, target, reader, writer)
        except BangerError as error:
            writer.write(guest_exec.frame(b"f", msgspec.json.encode(error.to_dict())))
        except (ValueError, OverflowError) as error:  # msgspec's DecodeError, UnicodeError: a bad frame
            bad = InvalidRequest(f"The frame is not valid: {error}")
            writer.write(guest_exec.frame(b"f", msgspec.json.encode(bad.to_dict())))
        # What is left of this connection is frames: none of it may be taken for a request.
        await writer.drain()
        writer.close()
        raise ConnectionResetError

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


async def _tell(writer: asyncio.StreamWriter, row: Recorded) -> None:
    """Send one event, and wait for a client that reads slowly."""
    writer.write(msgspec.json.encode({"event": views.event(row)}) + b"\n")
    await writer.drain()


async def _while_there(writer: asyncio.StreamWriter, streaming: Coroutine[None, None, None]) -> None:
    """Stream to a client, and stop at once when it has closed its connection.

    Its end is seen even while nobody reads from it or writes to it: an epoll of its own, asked for
    no event, still tells EPOLLHUP (epoll_ctl(2)); a client that only ends its sending is still there.
    """
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    sock: socket.socket = writer.get_extra_info("socket")
    copy = os.dup(sock.fileno())
    with select.epoll() as poll:
        poll.register(copy, 0)

        def hung_up() -> None:
            loop.remove_reader(poll.fileno())
            gone.set()

        loop.add_reader(poll.fileno(), hung_up)
        work = asyncio.create_task(streaming)
        watch = asyncio.create_task(gone.wait())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ConnectionResetError
            work.result()
        finally:
            loop.remove_reader(poll.fileno())
            os.close(copy)
            for task in (work, watch):
                task.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)


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
    """Find where the last `lines` lines begin, reading backwards: a guest may have written gigabytes."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return 0
    with file:
        end = position = file.seek(0, os.SEEK_END)
        wanted = lines
        while position > 0 and lines:
            start = max(0, position - CONSOLE_CHUNK)
            file.seek(start)
            block = file.read(position - start)
            if position == end and block.endswith(b"\n"):
                wanted += 1  # the newline at the very end begins no line
            while (cut := block.rfind(b"\n")) >= 0:
                wanted -= 1
                if wanted == 0:
                    return start + cut + 1
                block = block[:cut]
            position = start
    return 0 if lines else end
