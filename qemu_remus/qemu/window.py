"""A look at a part of one live disk as it is at one moment: what :mod:`qemu_remus.qemu.push` reads live disks by.

As the capture of a checkpoint, and with the same care for the pause, but no bitmap of a checkpoint begins or ends.
"""

from __future__ import annotations

from typing import Any

from qemu_remus.core.errors import EpochLost, GraphChanged
from qemu_remus.core.model import NodeName
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.capture import Capturer
from qemu_remus.qemu.events import EventStream
from qemu_remus.qemu.nodes import BitmapIdentity, access_node, filter_node
from qemu_remus.qemu.pauses import KEPT, Look, Pause, done, first_problem


class WindowCapturer(Capturer):
    """As :class:`Capturer`, and for parts of live disks."""

    async def capture_window(self, index: int, window: BitmapIdentity) -> NodeName:
        """Make what a bitmap marks readable as it is at a moment from now on; :meth:`take_out` ends that.

        :param index: the disk's.
        :param window: a bitmap on it that records nothing.
        :return: the node to read from.
        :raise CheckpointVoid: when the VM was not paused throughout.
        :raise EpochLost: when QEMU refused a step.
        :raise GraphChanged: when the disk is not attached as it was.
        :raise QemuError: when QEMU does not answer.
        """
        disk = self._disks[index]
        with self._client.subscribe("STOP", "RESUME") as events:
            look = await self._look_at(index, window)
            if look.status != "running":
                await self._let_pass(events)
                look = await self._look_at(index, window)
            await self._fleece_room.choose(window, look.dirty)
            if look.status == "running":
                pause = await self._in_own_pause(window, look, events)
            else:
                pause = await self._look_in_their_pause(window, look, events)
        if pause.problem is not None:
            raise pause.problem
        device = (await self._devices())[commands.qom_path(disk.qdev)]
        if device.node != filter_node(self._pair, disk.name, window.epoch):
            raise GraphChanged(
                f"disk {disk.name}: the replication filter is not where it was put",
                safe=KEPT,
                hint="another tool changed the block graph at the same moment",
            )
        return access_node(self._pair, disk.name, window.epoch)

    async def _devices(self) -> epoch.Devices:
        return epoch.look_at_devices(await self._client.execute(commands.query_block()))

    async def _look_at(self, index: int, window: BitmapIdentity) -> Look:
        disk = self._disks[index]
        status, blocks = await self._client.execute_many([commands.query_status(), commands.query_block()])
        devices = epoch.look_at_devices(done(blocks).value)
        epoch.check_graph([disk], devices)
        dirty, _ = epoch.dirty_disks([disk], devices, window)
        if not dirty:
            raise EpochLost(f"disk {disk.name}: nothing is marked that could be read", safe="the VM goes on")
        answer: Any = done(status).value
        return Look(str(answer["status"]), {index: dirty[0]}, [], done(status).order, window=True)

    async def _look_in_their_pause(self, window: BitmapIdentity, look: Look, events: EventStream) -> Pause:
        steps = [*self._insertions(window, look.dirty, with_access=True), commands.query_status()]
        pause = Pause(ours=False, inserted=list(look.dirty))
        pause.problem = first_problem(await self._send(steps), events.drain(), after=look.order)
        return pause
