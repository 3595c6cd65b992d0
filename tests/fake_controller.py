"""A control server for tests, its handlers played by the test: what the toolstack's commands are asked, and answered.

Nothing here sleeps: a handler that has to wait waits for an event.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from qemu_remus.control import ControlServer
from qemu_remus.core.commands import EpochDone, EpochStarted, FailoverResult, MemoryReceived, Nothing
from qemu_remus.core.errors import QemuRemusError
from qemu_remus.core.model import Connection, DiskState, EpochNumber, PairName, Replication, Role
from qemu_remus.core.report import Report

SEVEN = EpochNumber(7)
REPORT = Report(PairName("vm"), Role.PRIMARY, Connection.CONNECTED, DiskState.UP_TO_DATE, Replication.PROTECTED)
ANSWERS: dict[str, object] = {
    "query-replication": REPORT,
    "prepare-epoch": Nothing(),
    "start-new-epoch": EpochStarted(SEVEN, 8192, 2.5),
    "finish-disk-sync": EpochDone(SEVEN),
    "commit-epoch": EpochDone(SEVEN),
    "abort-epoch": EpochDone(SEVEN),
    "memory-received": MemoryReceived(SEVEN, committed=True),
    "failover": FailoverResult(SEVEN),
}

Behaviour = Callable[[], Awaitable[None]]


class Controller:
    """A control server that answers as ``answers`` says, but first does, once each, what a test puts in ``instead``.

    What is asked is noted in ``asked`` before it is answered, and its arguments, the newest, in ``arguments``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[str] = []
        self.arguments: dict[str, Any] = {}
        self.answers = dict(ANSWERS)
        self.instead: dict[str, list[QemuRemusError | Behaviour]] = {}
        self.server = self._server()

    def _server(self) -> ControlServer:
        return ControlServer(self.path, {name: partial(self._handle, name) for name in self.answers})

    async def _handle(self, name: str, arguments: object) -> object:
        self.asked.append(name)
        self.arguments[name] = arguments
        if planned := self.instead.get(name):
            behaviour = planned.pop(0)
            if isinstance(behaviour, QemuRemusError):
                raise behaviour
            await behaviour()
        return self.answers[name]

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[trio.Nursery]:
        self.server = self._server()
        async with trio.open_nursery() as nursery:
            await nursery.start(self.server.serve)
            yield nursery
            nursery.cancel_scope.cancel()


class Waiting:
    """A command's time at the controller, until the test ends it."""

    def __init__(self) -> None:
        self.begun = trio.Event()
        self.go_on = trio.Event()

    async def __call__(self) -> None:
        self.begun.set()
        await self.go_on.wait()


@contextmanager
def in_a_thread(controller: Controller) -> Iterator[None]:
    """Serve for those that are not in trio."""
    ready = threading.Event()
    stop: list[Callable[[], None]] = []

    async def serve() -> None:
        async with controller.serving() as nursery:
            stop.append(partial(trio.lowlevel.current_trio_token().run_sync_soon, nursery.cancel_scope.cancel))
            ready.set()
            await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert ready.wait(20)
    try:
        yield
    finally:
        stop[0]()
        thread.join(20)
        assert not thread.is_alive()
