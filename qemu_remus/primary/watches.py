"""What the primary looks at now and then, beside its epochs: how much waits in the bitmaps, which disks there are."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from qemu_remus.core import primary_machine as machine
from qemu_remus.core.errors import QemuError
from qemu_remus.primary.work import Work
from qemu_remus.qemu.attachment import Attachment
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.survey import Surveyor

DIRTY_REFRESH: Final = 2.0
"""Seconds between looks at the recording bitmaps while no checkpoint counts them."""

ANSWER_WATCH: Final = 1.0
"""Most seconds between two looks at how long the secondary may take for its answer."""

DISKS_REFRESH: Final = 2.0
"""Seconds between looks at which disks the VM has."""


async def watch_dirty(work: Work, attachment: Attachment, wanted: Callable[[], bool]) -> None:
    """Task: keep the number of dirty bytes fresh.

    :param wanted: there are bitmaps, and nobody else counts.
    """
    while True:
        await trio.sleep(DIRTY_REFRESH)
        if wanted():
            with contextlib.suppress(QemuError):
                work.dirty_bytes = await attachment.dirty_bytes()


async def watch_disks(client: QmpClient, surveyor: Surveyor, post: Callable[[machine.Event], Awaitable[None]]) -> None:
    """Task: see disks that come, go and grow, and a QEMU that hangs; to a toolstack's next checkpoint it may be long.

    :param post: gives the engine an event.
    """
    told = ""
    with client.subscribe("DEVICE_DELETED") as deleted:
        while True:
            with trio.move_on_after(DISKS_REFRESH), contextlib.suppress(StopAsyncIteration):
                await anext(deleted)
            if client.closed.is_set():
                return
            with contextlib.suppress(QemuError):
                if await surveyor.changed():
                    await post(machine.DisksChanged())
            if client.silence != told:
                told = client.silence
                await post(machine.QemuSilent(told))


@dataclass(frozen=True, slots=True)
class Overdue:
    """The secondary has not answered by then, unless it just has."""

    due: float


async def watch_answers(due: Callable[[], float], post: Callable[[Overdue], Awaitable[None]]) -> None:
    """Task: say when the secondary's answer is overdue.

    Instead of a deadline around each wait of the engine, of which there are a dozen in every checkpoint.

    :param due: until when, in trio's time, the secondary may take for what it owes.
    """
    while True:
        moment = due()
        await trio.sleep_until(min(moment, trio.current_time() + ANSWER_WATCH))
        if trio.current_time() >= moment:
            await post(Overdue(moment))
            await trio.sleep(ANSWER_WATCH)
