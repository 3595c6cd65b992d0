"""The command ``resize`` at the primary's control socket: from a client's call to the engine and back.

Owns who waits for which answer, and for how long.  What may not enter: when a disk may be resized (the machine's), and
how (:mod:`qemu_remus.qemu.survey`'s).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import trio

from qemu_remus.control import Handler
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.commands import ResizeArguments, Resized
from qemu_remus.core.errors import InternalError, QemuRemusError, TimedOut
from qemu_remus.core.model import disk_name


class ResizeDesk:
    """Hands wishes to the engine and the outcomes to whoever asked.

    :param post: gives the engine an event.
    """

    def __init__(self, post: Callable[[machine.Event], Awaitable[None]]) -> None:
        self._post = post
        self._next = 1
        self._waiting: dict[int, _Slot] = {}

    def handlers(self) -> Mapping[str, Handler]:
        """The command, for the control server."""
        return {"resize": self._resize}

    def done(self, number: int, outcome: int | QemuRemusError) -> None:
        """The disk has so many bytes now, or why it was not resized. Never waits."""
        slot = self._waiting.get(number)
        if slot is not None:
            slot.outcome = outcome
            slot.given.set()

    async def _resize(self, arguments: ResizeArguments) -> Resized:
        disk = disk_name(arguments.disk)
        number, self._next = self._next, self._next + 1
        slot = self._waiting[number] = _Slot()
        try:
            await self._post(machine.Resize(number, disk, arguments.size))
            with trio.move_on_after(arguments.timeout):
                await slot.given.wait()
            if slot.outcome is None:
                await self._post(machine.ResizeDropped(number))
                raise TimedOut(
                    f"disk {disk} could not be resized in time: an epoch is under way",
                    safe="unless QEMU was at it already nothing was changed, and replication goes on",
                    hint="see with query-replication what it has to wait for and which size the disk has, then repeat "
                    "the command",
                )
        finally:
            del self._waiting[number]
        if isinstance(slot.outcome, QemuRemusError):
            raise slot.outcome
        if slot.outcome is None:
            raise InternalError("a resize was answered with nothing")
        return Resized(disk, slot.outcome)


class _Slot:
    """Where one request waits."""

    def __init__(self) -> None:
        self.given = trio.Event()
        self.outcome: int | QemuRemusError | None = None
