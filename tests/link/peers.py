"""Two links, or a link and a peer that does nothing by itself, and what they say.

Rules: no sleep as synchronisation (a sleep here is only virtual time passing); wait for an event, a message, or
``wait_all_tasks_blocked``.  The mock clock jumps while the kernel still carries bytes, so tests over TCP go without it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing

from qemu_remus.core import messages as m
from qemu_remus.core.connection import NEED_DATA, Connection, ConnectionClosed
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import EpochNumber, Role
from qemu_remus.link import Link, open_link
from tests.message_strategies import hello

Clock = trio.testing.MockClock
P, S = Role.PRIMARY, Role.SECONDARY
E5, E6 = EpochNumber(5), EpochNumber(6)
BEGIN = m.EpochBegin(E6, E5)
BLOCK = m.EpochExtents(E6, (Extent(0, 0, 200_000),), bytes(200_000))
GOODBYE = m.Goodbye(RefusalCode.SHUTTING_DOWN, "done")


class Peer:
    """The other end without a link: it does nothing by itself."""

    def __init__(self, stream: trio.abc.HalfCloseableStream, role: Role) -> None:
        self.stream = stream
        self.connection = Connection(role)

    async def start(self) -> None:
        await self.stream.send_all(self.connection.start())
        await self.say(hello(self.connection.role))

    async def say(self, message: m.Message) -> None:
        await self.stream.send_all(b"".join(self.connection.send(message)))

    async def hear(self, *, beats: bool = False) -> m.Message | ConnectionClosed:
        """The next message; heartbeats only if asked for."""
        while True:
            event = self.connection.next_event()
            if event is NEED_DATA:
                self.connection.receive_data(await self.stream.receive_some())
            elif beats or not isinstance(event, m.Heartbeat):
                assert not isinstance(event, type(NEED_DATA))
                return event


async def next_of(link: Link) -> m.Message:
    """The next message but heartbeats."""
    while isinstance(message := await link.receive(), m.Heartbeat):
        pass
    return message


async def greet(link: Link, role: Role) -> None:
    await link.send(hello(role))
    assert isinstance(await next_of(link), m.Hello)


async def meet(link: Link, peer: Peer) -> None:
    """Exchange hellos with a peer that takes its time for every byte."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.start)
        await link.send(hello(P))
        assert isinstance(await link.receive(), m.Hello)


@asynccontextmanager
async def two_links(**options: float) -> AsyncIterator[tuple[Link, Link]]:
    """Primary and secondary, past their hellos."""
    left, right = trio.testing.memory_stream_pair()
    async with (
        open_link(left, P, **options) as primary,  # type: ignore[arg-type]
        open_link(right, S, **options) as secondary,  # type: ignore[arg-type]
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(greet, primary, P)
            nursery.start_soon(greet, secondary, S)
        yield primary, secondary
