"""What the primary sees beside its epochs: disks that change, and a QEMU that hangs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import trio
import trio.testing

from qemu_remus.core import primary_machine as machine
from qemu_remus.primary.watches import DISKS_REFRESH, watch_disks
from qemu_remus.qemu.attachment import Attachment
from qemu_remus.qemu.capabilities import query_capabilities
from qemu_remus.qemu.client import SILENCE_LIMIT
from qemu_remus.qemu.discover import discover
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.survey import Surveyor
from tests.fake_qemu import VIRTIO, FakeQemu


class Attached:
    """As much of an attachment as is looked at."""

    disks: tuple[VmDisk, ...] = ()


@asynccontextmanager
async def watched() -> AsyncIterator[tuple[FakeQemu, list[machine.Event]]]:
    told: list[machine.Event] = []

    async def post(event: machine.Event) -> None:
        await trio.lowlevel.checkpoint()
        told.append(event)

    with FakeQemu() as qemu:
        qemu.add_disk("a-node", VIRTIO.format("a"))
        async with qemu.connect() as client, trio.open_nursery() as nursery:
            capabilities = await query_capabilities(client)
            present = await discover(client, capabilities)
            surveyor = Surveyor(client, capabilities, cast(Attachment, Attached()), None, present)
            nursery.start_soon(watch_disks, client, surveyor, post)
            yield qemu, told
            nursery.cancel_scope.cancel()


async def test_a_disk_that_comes_is_told_of(autojump_clock: trio.testing.MockClock) -> None:
    async with watched() as (qemu, told):
        await trio.sleep(2.5 * DISKS_REFRESH)
        assert told == []
        qemu.add_disk("b-node", VIRTIO.format("b"))
        await trio.sleep(DISKS_REFRESH)
        assert told == [machine.DisksChanged()]


async def test_a_qemu_that_hangs_is_told_of_once_and_again_when_it_goes_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with watched() as (qemu, told):
        qemu.hang()
        await trio.sleep(6 * SILENCE_LIMIT)
        what = "QEMU at the fake does not answer: there was no reply within 10 s to query-block"
        assert told == [machine.QemuSilent(what)]
        qemu.go_on()
        await trio.sleep(2 * DISKS_REFRESH)
        assert told == [machine.QemuSilent(what), machine.QemuSilent("")]
