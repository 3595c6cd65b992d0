"""A proxy on the replication link that sees messages: a test is told of each one, before and after it is passed on.

Owns where one message ends and the next begins; what it is, :mod:`qemu_remus.core.wire` says. Bytes pass unchanged.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum

import trio

from integration.process import background
from qemu_remus.core import wire
from qemu_remus.core.model import Role

_CHUNK = 64 * 1024


class Moment(StrEnum):
    """Of a message that is passed on."""

    BEFORE = "before"
    AFTER = "after"
    """The receiver's kernel has it, or it is under way there."""


@dataclass(frozen=True, slots=True)
class Passing:
    """A message that comes by.

    :param sender: the side that says it.
    :param message: name of its type, such as ``EpochBegin``.
    :param epoch: the epoch that it is about, None where it is about none.
    """

    sender: Role
    message: str
    epoch: int | None
    moment: Moment


Hook = Callable[[Passing], Awaitable[None]]


class FrameProxy:
    """A link on which every message is announced. Made by :func:`start_frame_proxy`.

    :ivar address: ``HOST:PORT`` for the primary to connect to.
    """

    def __init__(self, target: str, hook: Hook) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._hook = hook
        self._cut = False
        self._connections: set[trio.CancelScope] = set()
        self.address = ""

    def cut(self) -> None:
        """Break all connections, and refuse new ones until :meth:`mend`; what was not passed on never is.

        Called in the hook before a message, it is the last that is not.
        """
        self._cut = True
        for scope in self._connections:
            scope.cancel()

    def mend(self) -> None:
        """Take connections again."""
        self._cut = False

    async def _serve(self, client: trio.SocketStream) -> None:
        async with client:
            if self._cut:
                return
            with trio.CancelScope() as scope:
                self._connections.add(scope)
                try:
                    try:
                        server = await trio.open_tcp_stream(*self._target)
                    except OSError:
                        return
                    async with server, background() as nursery:
                        nursery.start_soon(self._pass, client, server, Role.PRIMARY, scope)
                        await self._pass(server, client, Role.SECONDARY, scope)
                finally:
                    self._connections.discard(scope)

    async def _pass(
        self, source: trio.SocketStream, sink: trio.SocketStream, sender: Role, scope: trio.CancelScope
    ) -> None:
        frames = _Frames(source)
        while frame := await frames.receive():
            if frame.message:
                await self._announce(Passing(sender, frame.message, frame.epoch, Moment.BEFORE))
            try:
                await sink.send_all(frame.data)
            except trio.BrokenResourceError:
                break
            if frame.message:
                await self._announce(Passing(sender, frame.message, frame.epoch, Moment.AFTER))
        # either end closing ends the whole connection, as the replication link has no half-closed state
        scope.cancel()

    async def _announce(self, passing: Passing) -> None:
        # what the hook does, such as killing one of the ends, ends this connection: not before the hook has returned
        with trio.CancelScope(shield=True):
            await self._hook(passing)
        await trio.lowlevel.checkpoint_if_cancelled()


@dataclass(frozen=True, slots=True)
class _Frame:
    data: bytes
    message: str = ""
    epoch: int | None = None


class _Frames:
    """Takes a stream apart: first the banner, which is no message, then frames."""

    def __init__(self, source: trio.SocketStream) -> None:
        self._source = source
        self._buffer = bytearray()
        self._in_banner = True

    async def receive(self) -> _Frame | None:
        """The next one, None at the stream's end."""
        while (frame := self._take()) is None:
            try:
                data = await self._source.receive_some(_CHUNK)
            except trio.BrokenResourceError:
                return None
            if not data:
                return None
            self._buffer += data
        return frame

    def _take(self) -> _Frame | None:
        if self._in_banner:
            length = wire.parse_banner(self._buffer)
            if length is None:
                return None
            self._in_banner = False
            return _Frame(self._cut(length))
        if len(self._buffer) < wire.HEADER_SIZE:
            return None
        header = wire.decode_header(bytes(self._buffer[: wire.HEADER_SIZE]))
        if len(self._buffer) < wire.HEADER_SIZE + header.length:
            return None
        data = self._cut(wire.HEADER_SIZE + header.length)
        message = wire.decode(header, data[wire.HEADER_SIZE :])
        return _Frame(data, type(message).__name__, getattr(message, "epoch", None))

    def _cut(self, length: int) -> bytes:
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        return data


@asynccontextmanager
async def start_frame_proxy(target: str, hook: Hook) -> AsyncIterator[FrameProxy]:
    """Run a proxy for the length of the block.

    :param target: the secondary's ``HOST:PORT``, connected to anew for each connection.
    :param hook: awaited before and after each message is passed on; while it runs, that direction stands still, and
        the proxy cannot be ended: whatever it waits for must have a deadline.
    """
    proxy = FrameProxy(target, hook)
    async with background() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        proxy.address = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.start_soon(trio.serve_listeners, proxy._serve, listeners)
        yield proxy


__all__ = ["FrameProxy", "Hook", "Moment", "Passing", "start_frame_proxy"]
