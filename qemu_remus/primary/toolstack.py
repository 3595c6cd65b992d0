"""The toolstack's commands at the primary's control socket: from a client's call to the machine and back.

Owns the time-outs and who waits for which reply.  What may not enter: what a command is answered
(:mod:`qemu_remus.core.toolstack_machine`'s).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping

import trio

from qemu_remus.control import Handler
from qemu_remus.core import toolstack_machine as toolstack
from qemu_remus.core.commands import (
    AbortArguments,
    CommitArguments,
    EpochDone,
    EpochStarted,
    FinishArguments,
    Nothing,
    PrepareArguments,
    StartArguments,
)
from qemu_remus.core.errors import InternalError
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.toolstack_machine import Kind, Reply, Request, TimeUp


class ToolstackDesk:
    """Hands requests to the engine and its replies to whoever asked.

    :param post: gives the engine an event.
    :param figures: bytes and seconds of the newest capture: dirty bytes, pause.
    """

    def __init__(
        self, post: Callable[[toolstack.Event], Awaitable[None]], figures: Callable[[], tuple[int, float]]
    ) -> None:
        self._post = post
        self._figures = figures
        self._next = 1
        self._waiting: dict[int, _Slot] = {}
        self._alarm = trio.CancelScope()

    def handlers(self) -> Mapping[str, Handler]:
        """The commands, for the control server."""
        return {
            Kind.PREPARE.value: self._prepare,
            Kind.START.value: self._start,
            Kind.FINISH.value: self._finish,
            Kind.COMMIT.value: self._commit,
            Kind.ABORT.value: self._abort,
        }

    def reply(self, reply: Reply) -> None:
        """The engine's answer. Never waits; of a request that nobody waits for any more it is dropped."""
        slot = self._waiting.get(reply.number)
        if slot is not None:
            slot.reply = reply
            slot.figures = self._figures()
            slot.given.set()

    async def run(self) -> None:
        """Task: tell the engine whose time is up; one for all, which costs less than a deadline around each wait."""
        while True:
            with trio.CancelScope(deadline=self._first_due()) as self._alarm:
                await trio.sleep_forever()
            for number, slot in list(self._waiting.items()):
                if slot.due <= trio.current_time() and slot.reply is None:
                    slot.due = math.inf
                    await self._post(TimeUp(number))

    def _first_due(self) -> float:
        return min((slot.due for slot in self._waiting.values()), default=math.inf)

    async def _ask(
        self, kind: Kind, timeout: float, epoch: EpochNumber | None = None, *, pause: bool = False
    ) -> tuple[EpochNumber | None, tuple[int, float]]:
        number, self._next = self._next, self._next + 1
        slot = self._waiting[number] = _Slot(trio.current_time() + timeout)
        try:
            await self._post(Request(number, kind, epoch, pause))
            self._alarm.deadline = min(self._alarm.deadline, slot.due)
            if slot.reply is None:
                await slot.given.wait()
        finally:
            del self._waiting[number]
        if slot.reply is None:
            raise InternalError(f"{kind} was answered with nothing")
        if slot.reply.error is not None:
            raise slot.reply.error
        return slot.reply.epoch, slot.figures

    async def _about(self, kind: Kind, timeout: float, epoch: EpochNumber) -> EpochDone:
        await self._ask(kind, timeout, epoch)
        return EpochDone(epoch)

    async def _prepare(self, arguments: PrepareArguments) -> Nothing:
        await self._ask(Kind.PREPARE, arguments.timeout)
        return Nothing()

    async def _start(self, arguments: StartArguments) -> EpochStarted:
        epoch, (dirty_bytes, seconds) = await self._ask(Kind.START, arguments.timeout, pause=arguments.pause)
        if epoch is None:
            raise InternalError("an epoch was started without a number")
        return EpochStarted(epoch, dirty_bytes, round(seconds * 1000, 3))

    async def _finish(self, arguments: FinishArguments) -> EpochDone:
        return await self._about(Kind.FINISH, arguments.timeout, arguments.epoch)

    async def _commit(self, arguments: CommitArguments) -> EpochDone:
        return await self._about(Kind.COMMIT, arguments.timeout, arguments.epoch)

    async def _abort(self, arguments: AbortArguments) -> EpochDone:
        return await self._about(Kind.ABORT, arguments.timeout, arguments.epoch)


class _Slot:
    """Where one request waits."""

    def __init__(self, due: float) -> None:
        self.due = due
        self.given = trio.Event()
        self.reply: Reply | None = None
        self.figures = (0, 0.0)
