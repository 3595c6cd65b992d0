"""How an epoch's data leave QEMU: the seam between capturing a checkpoint and reading it.

*Pull*, the usual one: an NBD export of the checkpoint's view with its bitmap, which we read. *Push*, where an export
would be unsafe or is not to be had: a job in QEMU copies the changed clusters into a file of ours
(:mod:`qemu_remus.qemu.push`). One VM may have disks of both kinds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol, Self

import trio

from qemu_remus.core.errors import QemuRemusError
from qemu_remus.core.model import BitmapName, PairName
from qemu_remus.nbd.batches import Batch, Run
from qemu_remus.nbd.reader import BatchStream, find_dirty, read_allocated, read_dirty
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.epoch import BitmapLook, Capture, CapturedDisk
from qemu_remus.qemu.exports import exported
from qemu_remus.qemu.nodes import export_id, live_export_id
from qemu_remus.qemu.push import Push


class Transport(Protocol):
    """A way for disk contents out of QEMU. One disk at a time."""

    def enters_graph(self, disk: VmDisk) -> bool:
        """Whether it puts nodes over a disk to read it live."""

    def read(self, capture: Capture, disk: CapturedDisk) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """The contents of one disk's changed blocks at the checkpoint, in ascending order."""

    def read_live(
        self, index: int, disk: VmDisk, *, start: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """The contents of a whole disk while the guest writes to it, in ascending order.

        :param start: bytes from the disk's start that are left out, a multiple of 64 KiB.
        """

    def read_part(self, index: int, disk: VmDisk, part: Run) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """As :meth:`read_live`, of a part that is soon read."""

    async def find_dirty(self, disk: VmDisk, bitmap: BitmapName, part: Run, granularity: int) -> list[Run]:
        """What a bitmap that does not record names in a part of its disk, in ascending order."""

    def read_ahead(
        self, index: int, disk: VmDisk, bitmap: BitmapLook
    ) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """The contents of a bitmap's blocks while the guest writes to them, in ascending order."""


class _Batches:
    """The consumer's end of :func:`one_after_the_other`."""

    def __init__(self, receive: trio.MemoryReceiveChannel[Batch]) -> None:
        self._receive = receive
        self.failure: QemuRemusError | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        try:
            return await self._receive.receive()
        except trio.EndOfChannel:
            if self.failure is not None:
                raise self.failure from None
            raise StopAsyncIteration from None


@asynccontextmanager
async def one_after_the_other(
    sources: Sequence[Callable[[], AbstractAsyncContextManager[AsyncIterator[Batch]]]],
) -> AsyncIterator[AsyncIterator[Batch]]:
    """Several disks' batches as one stream. Each source is opened when the one before it is closed, in a task of its
    own, so that whoever consumes may leave the context at any moment."""
    send, receive = trio.open_memory_channel[Batch](0)
    batches = _Batches(receive)

    async def read() -> None:
        with send:
            try:
                for source in sources:
                    async with source() as stream:
                        async for batch in stream:
                            await send.send(batch)
            except QemuRemusError as error:
                batches.failure = error

    escaped: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        try:
            yield batches
        except BaseException as error:  # carried out by hand: the nursery would wrap it in a group
            escaped = error
        nursery.cancel_scope.cancel()
    if escaped is not None:
        raise escaped


class Pull:
    """Over NBD, from QEMU's own server.

    :param server: the Unix socket on which it listens.
    """

    def __init__(self, client: QmpClient, pair: PairName, server: Path) -> None:
        self._client = client
        self._pair = pair
        self._server = server

    def enters_graph(self, disk: VmDisk) -> bool:
        """See :class:`Transport`: an export is beside the guest's path."""
        return False

    @asynccontextmanager
    async def read(self, capture: Capture, disk: CapturedDisk) -> AsyncIterator[BatchStream]:
        """See :class:`Transport`. The epoch's bitmap is busy meanwhile: no merge, no removal."""
        bitmap = capture.finished.name
        export = export_id(self._pair, disk.disk.name, capture.epoch)
        async with (
            exported(self._client, export, disk.access, bitmaps=[(disk.disk.node, bitmap)]),
            read_dirty(
                self._server,
                export,
                bitmap,
                disk=disk.index,
                dirty_bytes=disk.dirty_bytes,
                granularity=disk.granularity,
            ) as batches,
        ):
            yield batches

    @asynccontextmanager
    async def read_live(self, index: int, disk: VmDisk, *, start: int = 0) -> AsyncIterator[BatchStream]:
        """See :class:`Transport`."""
        export = live_export_id(self._pair, disk.name)
        # The reader takes the disk's end as it finds it.
        within = Run(start, 1 << 62) if start else None
        async with (
            exported(self._client, export, disk.node),
            read_allocated(self._server, export, disk=index, within=within) as batches,
        ):
            yield batches

    @asynccontextmanager
    async def read_part(self, index: int, disk: VmDisk, part: Run) -> AsyncIterator[BatchStream]:
        """See :class:`Transport`."""
        export = live_export_id(self._pair, disk.name)
        async with (
            exported(self._client, export, disk.node),
            read_allocated(self._server, export, disk=index, within=part, connections=1) as batches,
        ):
            yield batches

    async def find_dirty(self, disk: VmDisk, bitmap: BitmapName, part: Run, granularity: int) -> list[Run]:
        """See :class:`Transport`. The bitmap is busy meanwhile."""
        export = live_export_id(self._pair, disk.name)
        async with exported(self._client, export, disk.node, bitmaps=[(disk.node, bitmap)]):
            return await find_dirty(self._server, export, bitmap, within=part, granularity=granularity)

    @asynccontextmanager
    async def read_ahead(self, index: int, disk: VmDisk, bitmap: BitmapLook) -> AsyncIterator[BatchStream]:
        """See :class:`Transport`. The bitmap is busy meanwhile."""
        export = live_export_id(self._pair, disk.name)
        async with (
            exported(self._client, export, disk.node, bitmaps=[(disk.node, bitmap.name)]),
            read_dirty(
                self._server,
                export,
                bitmap.name,
                disk=index,
                dirty_bytes=bitmap.count,
                granularity=bitmap.granularity,
            ) as batches,
        ):
            yield batches


class ByDisk:
    """Push for the disks that it serves, pull for the others.

    :param pull: None where every disk is read by push.
    """

    def __init__(self, pull: Pull | None, push: Push) -> None:
        self._pull = pull
        self._push = push

    def _way(self, disk: VmDisk) -> Transport:
        return self._push if self._pull is None or self._push.serves(disk) else self._pull

    def enters_graph(self, disk: VmDisk) -> bool:
        """See :class:`Transport`."""
        return self._way(disk).enters_graph(disk)

    def read(self, capture: Capture, disk: CapturedDisk) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """See :class:`Transport`."""
        return self._way(disk.disk).read(capture, disk)

    def read_live(
        self, index: int, disk: VmDisk, *, start: int = 0
    ) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """See :class:`Transport`."""
        return self._way(disk).read_live(index, disk, start=start)

    def read_part(self, index: int, disk: VmDisk, part: Run) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """See :class:`Transport`."""
        return self._way(disk).read_part(index, disk, part)

    async def find_dirty(self, disk: VmDisk, bitmap: BitmapName, part: Run, granularity: int) -> list[Run]:
        """See :class:`Transport`."""
        return await self._way(disk).find_dirty(disk, bitmap, part, granularity)

    def read_ahead(
        self, index: int, disk: VmDisk, bitmap: BitmapLook
    ) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """See :class:`Transport`."""
        return self._way(disk).read_ahead(index, disk, bitmap)
