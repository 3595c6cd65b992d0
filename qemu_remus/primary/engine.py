"""One event after another, whoever brings it: in the task that brings it where nothing is under way, else by a queue.

A turn of the scheduler costs as much as most steps do, and to hand an event to a task of its own takes one, or two.
What may not enter: what an event means.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

import trio

from qemu_remus.streams import put

QUEUE_LIMIT: Final = 64
"""Most events that wait."""

_E = TypeVar("_E")


class Engine(Generic[_E]):
    """Handles events in the order in which they were brought, one at a time.

    :param handle: does all that follows from an event. A cancellation of whoever brought it cuts that off, so that only
        tasks that end together with the engine may :meth:`give`.
    :param ended: nothing more is to be handled.
    """

    def __init__(self, handle: Callable[[_E], Awaitable[None]], ended: Callable[[], bool]) -> None:
        self._handle = handle
        self._ended = ended
        self._to_engine, self._events = trio.open_memory_channel[_E | None](QUEUE_LIMIT)
        self._runs = False
        # brought, and not yet handled to the end
        self._pending = 0
        self._elsewhere: trio.Event | None = None
        self._failure: Exception | None = None

    async def post(self, event: _E) -> None:
        """Leave it to the engine's task; waits for a place in the queue."""
        self._pending += 1
        try:
            await put(self._to_engine, event)
        except trio.Cancelled:
            self._pending -= 1
            raise

    async def give(self, event: _E) -> None:
        """Handle it here and now where nothing is under way; else as :meth:`post`.

        What goes wrong in handling it is no business of the caller's, and ends the engine.
        """
        if self._pending or not self._runs or self._over():
            await self.post(event)
            return
        self._pending += 1
        handled = self._elsewhere = trio.Event()
        try:
            await self._handle(event)
        except Exception as error:
            self._failure = error
        finally:
            self._pending -= 1
            self._elsewhere = None
            handled.set()
        if self._over():
            # Where the queue is full its task does not wait for it.
            with contextlib.suppress(trio.WouldBlock):
                self._to_engine.send_nowait(None)

    async def run(self) -> None:
        """Task: handle what is posted, until there is an end.

        :raise Exception: what the handling of any event has raised.
        """
        self._runs = True
        try:
            while not self._over():
                event = await self._events.receive()
                await self._wait_for_others()
                if event is not None and not self._over():
                    await self._handle(event)
                    self._pending -= 1
        finally:
            self._runs = False
        if self._failure is not None:
            raise self._failure

    async def _wait_for_others(self) -> None:
        # Once: with this event pending, nobody begins to handle another one.
        if self._elsewhere is not None:
            await self._elsewhere.wait()

    def _over(self) -> bool:
        return self._failure is not None or self._ended()
