"""What takes long on the primary: copying, capturing, transferring, merging. One piece at a time.

It joins QEMU's side (:class:`qemu_remus.qemu.attachment.Attachment`) to the link and keeps the figures about it.
Order and consequences are the machine's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import structlog
import trio

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import PairName
from qemu_remus.core.report import PauseStatistics, SyncMeter, SyncProgress
from qemu_remus.core.wire import digest_update
from qemu_remus.qemu.attachment import Attachment
from qemu_remus.qemu.epoch import Capture
from qemu_remus.qemu.nodes import BitmapIdentity

_log = structlog.get_logger("work")


class Work:
    """The pieces of work, and what they leave for the status report.

    :param send: hands a message to the link, with back-pressure; raises LinkError.
    """

    def __init__(
        self, pair: PairName, attachment: Attachment, send: Callable[[m.Message], Awaitable[None]], sizes: list[int]
    ) -> None:
        self.pauses = PauseStatistics()
        self.captured_at = float("-inf")
        self.capture_started = float("-inf")
        self.dirty_bytes = 0
        self.progress: SyncProgress | None = None
        self._pair = pair
        self._attachment = attachment
        self._send = send
        self._sizes = sizes
        self._capture: Capture | None = None

    def identity(self, recording: machine.Recording) -> BitmapIdentity:
        """The bitmap's full identity."""
        return BitmapIdentity(self._pair, recording.generation, recording.base, recording.epoch)

    async def start_tracking(self, recording: machine.Recording) -> machine.Event:
        """A new recording bitmap on every disk."""
        await self._attachment.start_tracking(self.identity(recording))
        return machine.TrackingStarted()

    async def merge_back(self, effect: machine.MergeBack) -> machine.Event:
        """Take out what is left of a checkpoint, then fold the old bitmaps into a new recording one."""
        await self._release()
        old = [self.identity(recording) for recording in effect.old]
        await self._attachment.merge_back(old, self.identity(effect.into))
        return machine.Merged()

    async def remove(self, recording: machine.Recording) -> machine.Event:
        """Its epoch is committed."""
        await self._attachment.remove_bitmap(self.identity(recording))
        return machine.BitmapRemoved()

    async def capture(self, effect: machine.Capture) -> machine.Event:
        """The paused part of a checkpoint."""
        self.capture_started = trio.current_time()
        self._capture = await self._attachment.capture(
            self.identity(effect.finished), self.identity(effect.following), pause=True
        )
        self.captured_at = trio.current_time()
        self.pauses.add(self._capture.pause_seconds)
        self.dirty_bytes = self._capture.dirty_bytes
        return machine.Captured()

    async def transfer(self, recording: machine.Recording) -> machine.Event:
        """Send the epoch's extents, and take the filter out whatever happens."""
        assert self._capture is not None
        extents = payload = digest = 0
        try:
            async with self._attachment.read(self._capture) as batches:
                async for batch in batches:
                    message = m.EpochExtents(recording.epoch, batch.extents, memoryview(batch.data))
                    digest = digest_update(digest, message)
                    extents += len(batch.extents)
                    payload += len(batch.data)
                    await self._send(message)
        finally:
            await self._release()
        return machine.Transferred(extents, payload, digest)

    async def _release(self) -> None:
        capture, self._capture = self._capture, None
        if capture is not None:
            # Bounded inside; the guest's path must be free again also when this work was cancelled.
            with trio.CancelScope(shield=True):
                await self._attachment.release(capture)

    async def copy_live(self, fresh: tuple[bool, ...]) -> machine.Event:
        """Read the live disks and send them.

        :param fresh: for each disk, whether its zeroes may be left out.
        """
        total = sum(self._sizes)
        meter = SyncMeter(total)
        before = 0
        self.progress = meter.update(trio.current_time(), 0)
        try:
            for disk, size in enumerate(self._sizes):
                async with self._attachment.read_live(disk) as batches:
                    async for batch in batches:
                        await self._send_copy(batch.extents, batch.data, leave_zeroes_out=fresh[disk])
                        done = before + max((extent.end for extent in batch.extents), default=0)
                        self.progress = meter.update(trio.current_time(), done)
                before += size
            self.progress = replace(meter.update(trio.current_time(), total), seconds_left=0.0)
        except BaseException:
            self.progress = None
            raise
        return machine.SyncCopied()

    async def _send_copy(self, extents: tuple[Extent, ...], data: bytes | bytearray, *, leave_zeroes_out: bool) -> None:
        wanted = tuple(extent for extent in extents if not (extent.zero and leave_zeroes_out))
        if wanted:
            await self._send(m.SyncExtents(wanted, memoryview(data)))
