"""The control socket: a QMP server over a Unix socket, in trio.

Owns connections, their bounds, and the commands that every controller has.  What the other commands do is the
controllers' business: they hand in a table of handlers.  Bytes are :mod:`qemu_remus.core.dialect`'s, types
:mod:`qemu_remus.core.commands`', the socket's file :mod:`qemu_remus.control_socket`'s.

Nothing that a client does or leaves undone may hold up a controller: what it does not read is bounded and then ends its
connection, and ``emit`` never waits.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog
import trio

from qemu_remus import __version__
from qemu_remus.control_socket import claim
from qemu_remus.core import dialect
from qemu_remus.core.commands import BUILT_IN, COMMANDS, EVENTS, CapabilitiesArguments, CommandName, EventName, Nothing
from qemu_remus.core.dialect import BadRequest, NeedData, Request, RequestReader
from qemu_remus.core.errors import CommandNotFound, ControlError, InternalError, QemuRemusError
from qemu_remus.core.qapi import UnexpectedMember, introspect, read_arguments, to_qmp
from qemu_remus.streams import receive, send_at_once

CLIENT_LIMIT: Final = 16
"""Most clients at once."""
QUEUE_LIMIT: Final = 256
"""Most replies and events that wait for one client; one more event and it is dropped."""
SEND_TIMEOUT: Final = 30.0
"""Seconds that a client may take to read anything at all while something waits for it."""
NEGOTIATION_TIMEOUT: Final = 60.0
"""Seconds that a client may take over ``qmp_capabilities``."""
_RECEIVE_SIZE: Final = 16 * 1024

Handler = Callable[[Any], Awaitable[object]]
"""Takes the arguments as the command's type in :data:`qemu_remus.core.commands.COMMANDS` says, checked; returns its
answer's type.  Errors of :mod:`qemu_remus.core.errors` become the error reply, of their ``control_class``.

It runs in its client's turn, so that the commands of one client are done one after another.  A client that goes away
does not end it."""

_log = structlog.get_logger("control")


class ControlServer:
    """Serves one controller's commands.

    :param path: of the socket.
    :param handlers: what this controller can do, by command name.
    :param now: the wall clock, for the events' timestamps: seconds since 1970.
    """

    def __init__(self, path: Path, handlers: Mapping[str, Handler], *, now: Callable[[], float] = time.time) -> None:
        unknown = handlers.keys() - COMMANDS.keys() | handlers.keys() & BUILT_IN
        if unknown:
            raise InternalError(f"the control interface has no commands {', '.join(sorted(unknown))} to handle")
        self._path = path
        self._now = now
        self._clients: set[_Client] = set()
        self._busy = 0
        self._rested = trio.Event()
        self._handlers: dict[str, Handler] = {
            **handlers,
            "query-version": self._query_version,
            "query-commands": self._query_commands,
            "query-qmp-schema": self._query_schema,
        }
        self._names = sorted({*self._handlers, "qmp_capabilities"})

    async def serve(self, *, task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started with the path once clients can connect.

        The socket's file goes on the way out.

        :raise ConfigError: when the socket cannot be made there, or somebody listens on it.
        """
        claimed = await trio.to_thread.run_sync(claim, self._path)
        try:
            listener = trio.SocketListener(trio.socket.from_stdlib_socket(claimed.listener))
            async with listener, trio.open_nursery() as clients:
                await clients.start(trio.serve_listeners, self._serve_client, [listener])
                task_status.started(self._path)
        finally:
            claimed.release()

    def emit(self, name: EventName, data: object) -> None:
        """Tell every client that has negotiated; never waits.

        :param data: a dataclass of :mod:`qemu_remus.core.commands`, the one that belongs to the name.
        """
        if not isinstance(data, EVENTS[name.value].data):
            raise InternalError(f"event {name} carries {type(data).__name__}")
        listening = [client for client in self._clients if client.negotiated]
        if listening:
            line = dialect.event(name.value, to_qmp(data), self._now())
            for client in listening:
                client.send_or_drop(line)

    async def finish(self, timeout: float) -> None:
        """Let the commands under way come to their end, see their answers off, and close every connection.

        :param timeout: seconds; what is not done then is given up.
        """
        with trio.move_on_after(timeout):
            while self._busy:
                await self._rest()
            for client in self._clients:
                client.finish()
            while self._clients:
                await self._rest()

    async def _rest(self) -> None:
        self._rested = trio.Event()
        await self._rested.wait()

    async def _serve_client(self, stream: trio.SocketStream) -> None:
        client = _Client(stream)
        if len(self._clients) >= CLIENT_LIMIT:
            client.send_or_drop(dialect.failed("GenericError", f"{CLIENT_LIMIT} clients are connected already", {}))
            client.finish()
            await client.write()
            return
        self._clients.add(client)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.write)
                await client.send(dialect.greeting(__version__, _PACKAGE))
                await self._converse(client)
                # What is still queued goes out before the connection does: a client may have sent its last request
                # and closed only its own direction.
                client.finish()
        finally:
            self._clients.discard(client)
            self._rested.set()

    async def _converse(self, client: _Client) -> None:
        reader = RequestReader()
        negotiation = trio.current_time() + NEGOTIATION_TIMEOUT
        while True:
            # A client that has negotiated may wait for events for as long as it likes.
            data = await client.receive(deadline=math.inf if client.negotiated else negotiation)
            if not data:
                return
            reader.receive_data(data)
            while not isinstance(event := reader.next_event(), NeedData):
                self._busy += 1
                try:
                    await client.send(await self._answer(client, event))
                finally:
                    self._busy -= 1
                    self._rested.set()
                if isinstance(event, BadRequest) and event.fatal:
                    return

    async def _answer(self, client: _Client, event: Request | BadRequest) -> bytes:
        if isinstance(event, BadRequest):
            return dialect.failed("GenericError", event.why, event.ident)
        try:
            return dialect.returned(to_qmp(await self._execute(client, event)), event.ident)
        except QemuRemusError as error:
            return dialect.failed(error.control_class, str(error), event.ident)
        except Exception:
            # A defect in answering must not end the protection of a VM.
            _log.exception("a control command failed inside", command=event.name)
            return dialect.failed("GenericError", f"Internal error in {event.name}; the log has it", event.ident)

    async def _execute(self, client: _Client, request: Request) -> object:
        if request.name == "qmp_capabilities":
            return self._negotiate(client, request)
        if not client.negotiated:
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        handler = self._handlers.get(request.name)
        if handler is None:
            raise CommandNotFound(f"The command {request.name} has not been found")
        arguments = _arguments(request)
        _log.debug("control command", command=request.name)
        return await handler(arguments)

    def _negotiate(self, client: _Client, request: Request) -> Nothing:
        if client.negotiated:
            raise CommandNotFound("Capabilities negotiation is already complete")
        wanted: CapabilitiesArguments = _arguments(request)
        if wanted.enable:
            raise ControlError(f"Capability {wanted.enable[0]} is not on offer")
        client.negotiated = True
        return Nothing()

    async def _query_version(self, _: Nothing) -> object:
        return dialect.version_info(__version__, _PACKAGE)

    async def _query_commands(self, _: Nothing) -> object:
        return tuple(CommandName(name) for name in self._names)

    async def _query_schema(self, _: Nothing) -> object:
        return introspect((COMMANDS[name] for name in self._names), EVENTS.values())


_PACKAGE: Final = f"qemu-remus {__version__}"


def _arguments(request: Request) -> Any:
    try:
        return read_arguments(COMMANDS[request.name].arguments, request.arguments)
    except UnexpectedMember as error:
        raise ControlError(str(error)) from error
    except msgspec.ValidationError as error:
        raise ControlError(f"Invalid arguments: {error}") from error


class _Client:
    """One connection: a bounded queue out, and its end by whoever finds it dead first."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.negotiated = False
        self._stream = stream
        self._lines: deque[bytes] = deque()
        self._news = trio.Event()
        self._room = trio.lowlevel.ParkingLot()
        self._finished = False
        self._dead = False
        self._sending = False
        self._writing = trio.CancelScope()

    async def receive(self, *, deadline: float) -> bytes | bytearray:
        """Bytes from the client; none when it, the connection, or its time has ended."""
        try:
            if deadline == math.inf:
                return await receive(self._stream, _RECEIVE_SIZE)
            with trio.move_on_at(deadline):
                return await receive(self._stream, _RECEIVE_SIZE)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        return b""

    async def send(self, line: bytes) -> None:
        """Send a reply, or queue it behind what waits already, if need be for a place there; lost if the client is."""
        while len(self._lines) >= QUEUE_LIMIT and not self._dead:
            await self._room.park()
        self._say(line)

    def send_or_drop(self, line: bytes) -> None:
        """Send or queue an event; a client without room for it is dropped, since it would not know what it missed."""
        if len(self._lines) < QUEUE_LIMIT:
            self._say(line)
        elif not self._dead:
            _log.warning("a control client does not read; its connection is closed", waiting=QUEUE_LIMIT)
            self.drop()

    def drop(self) -> None:
        """Close the connection without another word."""
        self._dead = True
        self._take()
        self._writing.cancel()

    def _say(self, line: bytes) -> None:
        if self._dead:
            return
        if not (self._lines or self._sending):
            line = line[send_at_once(self._stream, line) :]
        if line:
            self._lines.append(line)
            self._news.set()

    def _take(self) -> bytes:
        lines = b"".join(self._lines)
        self._lines.clear()
        self._room.unpark_all()
        return lines

    def finish(self) -> None:
        """Nothing more will be queued."""
        self._finished = True
        self._news.set()

    async def write(self) -> None:
        """Write the queue out until it ends or the client stops reading; then the connection is closed."""
        try:
            with self._writing:
                while self._lines or not self._finished:
                    if not self._lines:
                        self._news = trio.Event()
                        await self._news.wait()
                    elif lines := self._take():
                        self._sending = True
                        with trio.fail_after(SEND_TIMEOUT):
                            await self._stream.send_all(lines)
                        self._sending = False
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
            pass
        finally:
            self._dead = True
            self._take()
            await trio.aclose_forcefully(self._stream)
