"""QEMU's events, by subscription: each with a bounded queue of its own, which never holds up the reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import trio


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """An event of QEMU.

    :param timestamp: seconds since 1970 by QEMU's host's clock.
    :param order: place in the sequence of all messages received on this connection.
    """

    name: str
    data: dict[str, Any]
    timestamp: float
    order: int


class EventStream:
    """Events of one subscription, oldest first; ends with the connection, or with the subscription."""

    def __init__(self, names: frozenset[str], capacity: int) -> None:
        self._names = names
        self._send, self._receive = trio.open_memory_channel[QmpEvent](capacity)
        self.overflowed = False
        """Events were dropped since nobody took them: what they announced must be queried instead."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> QmpEvent:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    def drain(self) -> list[QmpEvent]:
        """Everything that has arrived, without waiting."""
        events: list[QmpEvent] = []
        while True:
            try:
                events.append(self._receive.receive_nowait())
            except (trio.WouldBlock, trio.EndOfChannel):
                return events

    def offer(self, event: QmpEvent) -> None:
        """For the reader: something has happened; it is dropped where nobody has taken the ones before."""
        if self._names and event.name not in self._names:
            return
        try:
            self._send.send_nowait(event)
        except trio.WouldBlock:
            self.overflowed = True

    def end(self) -> None:
        """For the reader: nothing more comes."""
        self._send.close()
