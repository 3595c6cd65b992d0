"""The secondary's commands that its machine answers: from a client's call to the engine and back.

Owns who waits for which answer.  What may not enter: what the answer is (:mod:`qemu_remus.core.secondary_machine`'s).
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping

import trio

from qemu_remus.control import Handler
from qemu_remus.core import secondary_machine as machine
from qemu_remus.core.commands import (
    FailoverArguments,
    FailoverResult,
    MemoryReceived,
    MemoryReceivedArguments,
    Nothing,
    StorageWorks,
)
from qemu_remus.core.errors import InternalError
from qemu_remus.core.model import DiskStanding, EpochNumber, Generation
from qemu_remus.core.report import Report


class RequestDesk:
    """Hands requests to the engine and its answers to whoever asked.

    :param post: gives the engine an event.
    :param report: the status as it is now.
    """

    def __init__(self, post: Callable[[machine.Event], Awaitable[None]], report: Callable[[], Report]) -> None:
        self._post = post
        self._report = report
        self._next = 1
        self._waiting: dict[int, _Slot] = {}

    def handlers(self) -> Mapping[str, Handler]:
        """The commands, for the control server."""
        return {
            "memory-received": self._memory_received,
            "failover": self._failover,
            "retry-storage": self._retry_storage,
        }

    def reply(self, answer: machine.Answer) -> None:
        """The engine's answer. Never waits; where nobody waits for it any more it is dropped."""
        slot = self._waiting.get(answer.request)
        if slot is not None:
            slot.answer = answer
            slot.given.set()

    async def _ask(self, event: Callable[[int], machine.Event]) -> EpochNumber | None:
        request, self._next = self._next, self._next + 1
        slot = self._waiting[request] = _Slot()
        try:
            await self._post(event(request))
            await slot.given.wait()
        finally:
            del self._waiting[request]
        if slot.answer is None:
            raise InternalError("a request was answered with nothing")
        if slot.answer.error is not None:
            raise slot.answer.error
        return slot.answer.checkpoint

    async def _memory_received(self, arguments: MemoryReceivedArguments) -> MemoryReceived:
        epoch = arguments.epoch
        committed = await self._ask(lambda request: machine.MemoryReceived(request, epoch))
        return MemoryReceived(epoch, committed is not None)

    async def _retry_storage(self, _: Nothing) -> StorageWorks:
        await self._ask(machine.RetryDue)
        report = self._report()
        return StorageWorks(report.disk, report.checkpoint.committed, report.checkpoint.applied)

    async def _failover(self, arguments: FailoverArguments) -> FailoverResult:
        generation = Generation(uuid.uuid4())
        checkpoint = await self._ask(
            lambda request: machine.FailoverRequested(
                request, arguments.checkpoints, arguments.last_committed, arguments.force, generation
            )
        )
        if checkpoint is None:
            raise InternalError("a failover was answered without its checkpoint")
        report = self._report()
        disks = tuple(disk for disk in report.disks if disk.state is DiskStanding.PROTECTED)
        return FailoverResult(checkpoint, report.generation, disks)


class _Slot:
    """Where one request waits."""

    def __init__(self) -> None:
        self.given = trio.Event()
        self.answer: machine.Answer | None = None
