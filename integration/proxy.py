"""A TCP proxy that makes the link between two controllers slow, narrow, silent or broken.

Owns nothing of the replication protocol: bytes pass, late or never.
"""

from __future__ import annotations

import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

from integration.process import background

_CHUNK = 16 * 1024

#: Bytes that the kernel takes for us ahead of what we pass on: a link that stands still is to be felt soon.
_RECEIVE_BUFFER = 64 * 1024


class Proxy:
    """A link whose quality can be changed at any time. Made by :func:`start_proxy`.

    :ivar delay: seconds that every byte takes one way, from now on.
    :ivar bytes_per_second: in each direction and of each connection.
    :ivar passed: bytes passed on so far, both directions.
    """

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.delay = 0.0
        self.bytes_per_second = math.inf
        self.passed = 0
        self.address = ""
        self._open = trio.Event()
        self._open.set()
        self._refusing = False
        self._connections: set[trio.CancelScope] = set()

    def cut(self) -> None:
        """Break all connections; new ones are refused until :meth:`mend`."""
        self._refusing = True
        for scope in self._connections:
            scope.cancel()

    def freeze(self) -> None:
        """Pass nothing on until :meth:`mend`; connections stay open, as when a cable is pulled."""
        self._open = trio.Event()

    def mend(self) -> None:
        """Undo :meth:`cut` and :meth:`freeze`."""
        self._refusing = False
        self._open.set()

    async def _serve(self, client: trio.SocketStream) -> None:
        async with client:
            if self._refusing:
                return
            with trio.CancelScope() as scope, suppress(OSError, trio.BrokenResourceError):
                self._connections.add(scope)
                try:
                    server = await trio.open_tcp_stream(*self._target)
                    async with server, background() as nursery:
                        nursery.start_soon(self._pass, client, server, scope)
                        await self._pass(server, client, scope)
                finally:
                    self._connections.discard(scope)

    async def _pass(self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
        # as much as a link may hold under way, so that a delay does not become a limit of the rate
        sender, receiver = trio.open_memory_channel[tuple[float, bytes]](4096)
        async with background() as nursery:
            nursery.start_soon(self._deliver, receiver, sink)
            with suppress(trio.BrokenResourceError):
                while data := await source.receive_some(_CHUNK):
                    await sender.send((trio.current_time() + self.delay, data))
                    if self.bytes_per_second < math.inf:
                        await trio.sleep(len(data) / self.bytes_per_second)
            # either end closing ends the whole connection, as the replication link has no half-closed state
            scope.cancel()

    async def _deliver(self, receiver: trio.MemoryReceiveChannel[tuple[float, bytes]], sink: trio.SocketStream) -> None:
        async for due, data in receiver:
            await trio.sleep_until(due)
            await self._open.wait()
            try:
                await sink.send_all(data)
            except trio.BrokenResourceError:
                return
            self.passed += len(data)


@asynccontextmanager
async def start_proxy(target: str) -> AsyncIterator[Proxy]:
    """Run a proxy for the length of the block.

    :param target: ``HOST:PORT`` to connect to, anew for each connection.
    """
    proxy = Proxy(target)
    async with background() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        # what is accepted has it from its listener, before the first window is offered
        listeners[0].socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        proxy.address = f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.start_soon(trio.serve_listeners, proxy._serve, listeners)
        yield proxy
