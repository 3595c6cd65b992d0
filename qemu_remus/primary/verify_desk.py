"""The commands ``verify`` and ``verify-cancel`` at the primary's control socket, and the pace of a verification.

What may not enter: what they are answered (:mod:`qemu_remus.core.primary_verify`'s).
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import trio

from qemu_remus.control import Handler
from qemu_remus.core import primary_machine as machine
from qemu_remus.core import toolstack_machine as toolstack
from qemu_remus.core.commands import Nothing, VerifyArguments, VerifyStarted
from qemu_remus.core.errors import TimedOut, UnknownDisk
from qemu_remus.core.verification import Order
from qemu_remus.primary.pace import Pace
from qemu_remus.primary.verifier import Verifier
from qemu_remus.qemu.attachment import Attachment

HOLD: Final = 1.0
"""Seconds for which no slice is begun after a toolstack has prepared a checkpoint, unless it takes that first."""

ANSWER_LIMIT: Final = 10.0
"""Seconds that the engine may take to answer."""


class VerifyDesk:
    """Hands requests to the engine and its replies to whoever asked, and says when the next slice's turn has come.

    :param post: gives the engine an event.
    :param default_rate: bytes a second where the request does not say.
    """

    def __init__(
        self,
        post: Callable[[toolstack.Event], Awaitable[None]],
        attachment: Attachment,
        verifier: Verifier,
        *,
        default_rate: float,
    ) -> None:
        self._post = post
        self._attachment = attachment
        self._verifier = verifier
        self._default_rate = default_rate
        self._pace = Pace(default_rate)
        self._paced = 0
        self._next = 1
        self._waiting: dict[int, _Slot] = {}
        self._timer = trio.CancelScope()
        self._wanted = trio.Event()
        self._not_before = -math.inf

    def handlers(self) -> Mapping[str, Handler]:
        """The commands, for the control server."""
        return {"verify": self._verify, "verify-cancel": self._cancel}

    def reply(self, answered: machine.VerifyAnswered) -> None:
        """The engine's answer. Never waits; of a request that nobody waits for any more it is dropped."""
        slot = self._waiting.get(answered.number)
        if slot is not None:
            slot.answered = answered
            slot.given.set()

    def schedule(self, effect: machine.ScheduleVerify) -> None:
        """Let the next slice begin at its time. Never waits."""
        self._timer.cancel()
        if effect.order.number != self._paced:
            self._paced = effect.order.number
            self._pace = Pace(effect.order.rate)
            self._verifier.read_bytes = 0
        self._not_before = trio.current_time() + HOLD if effect.held else -math.inf
        self._wanted.set()

    async def run(self) -> None:
        """Task: tell the engine when a slice is due."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            self._timer = trio.CancelScope()
            with self._timer:
                # Taken once: each epoch that ends begins the wait anew, and a long one must come to its end too.
                due = self._pace.take(self._verifier.read_bytes)
                self._verifier.read_bytes = 0
                await trio.sleep_until(max(self._not_before, due))
                await self._post(machine.VerifyDue())

    async def _verify(self, arguments: VerifyArguments) -> VerifyStarted:
        disks = self._attachment.disks
        places = {disk.name: place for place, disk in enumerate(disks)}
        for name in arguments.disks:
            if name not in places:
                raise UnknownDisk(
                    f"the pair has no disk {name}",
                    safe="nothing was changed",
                    hint=f"its disks are {', '.join(places)}",
                )
        chosen = tuple(dict.fromkeys(places[name] for name in arguments.disks or places))
        rate = float(arguments.rate or self._default_rate)
        number = self._take_number()
        sizes = tuple(disks[place].size for place in chosen)
        names = tuple(disks[place].name for place in chosen)
        order = Order(number, chosen, sizes, arguments.repair, rate, names)
        await self._ask(number, machine.VerifyRequested(order))
        return VerifyStarted(number, sum(sizes))

    async def _cancel(self, _: Nothing) -> Nothing:
        number = self._take_number()
        await self._ask(number, machine.VerifyCancelled(number))
        return Nothing()

    def _take_number(self) -> int:
        number, self._next = self._next, self._next + 1
        return number

    async def _ask(self, number: int, event: toolstack.Event) -> None:
        slot = self._waiting[number] = _Slot()
        try:
            await self._post(event)
            with trio.move_on_after(ANSWER_LIMIT):
                await slot.given.wait()
        finally:
            del self._waiting[number]
        if slot.answered is None:
            raise TimedOut(
                "the controller is ending, or busy",
                safe="replication goes on",
                hint="query-replication says whether a verification is under way",
            )
        if slot.answered.error is not None:
            raise slot.answered.error


class _Slot:
    """Where one request waits."""

    def __init__(self) -> None:
        self.given = trio.Event()
        self.answered: machine.VerifyAnswered | None = None
