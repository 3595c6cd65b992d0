"""How an epoch's data leave QEMU: the seam between capturing a checkpoint and reading it.

*Pull* is what there is: an NBD export of the checkpoint's view with its bitmap, which we read. A *push* (a job in QEMU
that copies the changed clusters into a file of ours) fits behind the same interface.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Protocol, Self

import trio

from qemu_remus.core.errors import QemuRemusError
from qemu_remus.core.model import PairName
from qemu_remus.nbd.batches import Batch
from qemu_remus.nbd.reader import BatchStream, read_allocated, read_dirty
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.epoch import Capture, CapturedDisk
from qemu_remus.qemu.exports import exported
from qemu_remus.qemu.nodes import export_id, live_export_id


class Transport(Protocol):
    """A way for disk contents out of QEMU. One disk at a time."""

    def read(self, capture: Capture, disk: CapturedDisk) -> AbstractAsyncContextManager[BatchStream]:
        """The contents of one disk's changed blocks at the checkpoint, in ascending order."""

    def read_live(self, index: int, disk: VmDisk) -> AbstractAsyncContextManager[BatchStream]:
        """The contents of a whole disk while the guest writes to it, in ascending order."""


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
    sources: Sequence[Callable[[], AbstractAsyncContextManager[BatchStream]]],
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
    async def read_live(self, index: int, disk: VmDisk) -> AsyncIterator[BatchStream]:
        """See :class:`Transport`."""
        export = live_export_id(self._pair, disk.name)
        async with (
            exported(self._client, export, disk.node),
            read_allocated(self._server, export, disk=index) as batches,
        ):
            yield batches
