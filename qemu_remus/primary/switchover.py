"""The command ``switchover`` at the primary's control socket: from a client's call to the machine and back.

Owns the time-out and who waits for which reply.  What may not enter: what the answer is
(:mod:`qemu_remus.core.switchover_machine`'s).
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping

import trio

from qemu_remus.control import Handler
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.commands import SwitchoverArguments, SwitchoverResult
from qemu_remus.core.errors import InternalError
from qemu_remus.core.model import Generation


class SwitchDesk:
    """Hands requests to the engine and its replies to whoever asked.

    :param post: gives the engine an event.
    """

    def __init__(self, post: Callable[[machine.Event], Awaitable[None]]) -> None:
        self._post = post
        self._next = 1
        self._waiting: dict[int, _Slot] = {}

    def handlers(self) -> Mapping[str, Handler]:
        """The command, for the control server."""
        return {"switchover": self._switch_over}

    def reply(self, reply: machine.SwitchReply) -> None:
        """The engine's answer. Never waits; of a request that nobody waits for any more it is dropped."""
        slot = self._waiting.get(reply.request)
        if slot is not None:
            slot.reply = reply
            slot.given.set()

    async def _switch_over(self, arguments: SwitchoverArguments) -> SwitchoverResult:
        number, self._next = self._next, self._next + 1
        slot = self._waiting[number] = _Slot()
        generation = Generation(uuid.uuid4())
        try:
            await self._post(machine.SwitchRequested(number, generation, arguments.timeout, arguments.epoch))
            with trio.move_on_after(arguments.timeout):
                await slot.given.wait()
            if slot.reply is None:
                await self._post(machine.SwitchTimeUp(number))
                await slot.given.wait()
        finally:
            del self._waiting[number]
        reply = slot.reply
        if reply is None:
            raise InternalError("switchover was answered with nothing")
        if reply.error is not None:
            raise reply.error
        if reply.handover is None:
            raise InternalError("switchover was answered without its checkpoint")
        return SwitchoverResult(reply.handover.target, reply.handover.generation, reply.complete)


class _Slot:
    """Where one request waits."""

    def __init__(self) -> None:
        self.given = trio.Event()
        self.reply: machine.SwitchReply | None = None
