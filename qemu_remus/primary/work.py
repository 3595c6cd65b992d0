"""What takes long on the primary: copying, capturing, transferring, merging. One piece at a time.

It joins QEMU's side (:class:`qemu_remus.qemu.attachment.Attachment`) to the link and keeps the figures about it.
Order and consequences are the machine's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import structlog
import trio

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.errors import GraphChanged, QemuRemusError
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import DiskName, DiskSpec, PairName
from qemu_remus.core.report import PauseStatistics, SyncMeter, SyncProgress
from qemu_remus.nbd.batches import Batch
from qemu_remus.primary.comparison import BLOCK, Comparison
from qemu_remus.primary.marks import Marks
from qemu_remus.primary.outgoing import OutgoingEpoch
from qemu_remus.primary.pace import Pace
from qemu_remus.primary.verifier import Verifier
from qemu_remus.qemu.attachment import Attachment
from qemu_remus.qemu.epoch import Capture, Tracked
from qemu_remus.qemu.nodes import BitmapIdentity
from qemu_remus.qemu.survey import Surveyor

_Part = tuple[tuple[Extent, ...], bytes | bytearray]
"""Extents, and the data of those that are not zero."""

_log = structlog.get_logger("work")


class Work:
    """The pieces of work, and what they leave for the status report.

    :param send: hands a message to the link, with back-pressure; raises LinkError.
    :param resized: told what became of each resize.
    :param rate: bytes a second that are read at most for a copy or a comparison of whole disks; None: no limit.
    """

    def __init__(
        self,
        pair: PairName,
        attachment: Attachment,
        send: Callable[[m.Message], Awaitable[None]],
        surveyor: Surveyor,
        *,
        resized: Callable[[int, int | QemuRemusError], None] = lambda number, outcome: None,
        rate: float | None = None,
    ) -> None:
        self.comparison = Comparison(send)
        self.verifier = Verifier(attachment, self.comparison)
        self._pace = Pace(rate)
        self.pauses = PauseStatistics()
        self.captured_at = float("-inf")
        self.capture_started = float("-inf")
        self.pause_seconds = 0.0
        self.dirty_bytes = 0
        self.progress: SyncProgress | None = None
        self._pair = pair
        self._attachment = attachment
        self._send = send
        self._surveyor = surveyor
        self._resized = resized
        self._capture: Capture | None = None
        self._marks: Marks | None = None

    @property
    def _sizes(self) -> list[int]:
        return [disk.size for disk in self._attachment.disks]

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
        merged: list[machine.Merged] = []

        def into(tracked: Mapping[DiskName, tuple[Tracked, ...]]) -> BitmapIdentity:
            there = self._as_found(tracked)
            found = tuple(tuple(one for one in disk if one.recording in effect.old) for disk in there)
            base = None if effect.complete else machine.base_of(found, effect.generation)
            recording = machine.Recording(effect.generation, base, effect.epoch)
            merged.append(machine.Merged(recording, found))
            return self.identity(recording)

        await self._attachment.merge_back([self.identity(recording) for recording in effect.old], into)
        return merged[0]

    async def found(self) -> tuple[tuple[machine.Found, ...], ...]:
        """For each disk, the pair's bitmaps on it."""
        return self._as_found(await self._attachment.bitmaps())

    def _as_found(self, tracked: Mapping[DiskName, tuple[Tracked, ...]]) -> tuple[tuple[machine.Found, ...], ...]:
        return tuple(
            tuple(
                machine.Found(
                    machine.Recording(one.identity.generation, one.identity.base, one.identity.epoch), one.recording
                )
                for one in tracked.get(disk.name, ())
            )
            for disk in self._attachment.disks
        )

    async def survey(self, effect: machine.Survey) -> machine.Event:
        """Resize what is to be resized, then see which disks there are, and follow them."""
        # What is left of a checkpoint that failed goes first.
        await self._release()
        for wish in effect.resizes:
            try:
                self._resized(wish.number, await self._surveyor.resize(wish.disk, wish.size))
            except QemuRemusError as error:
                self._resized(wish.number, error)
        news = await self._surveyor.survey(effect.leave_out)
        disks = tuple(DiskSpec(disk.name, disk.size) for disk in self._attachment.disks)
        return machine.Surveyed(bool(news), disks, await self.found(), news)

    async def remove(self, recordings: tuple[machine.Recording, ...]) -> machine.Event:
        """Their epoch is committed."""
        await self._attachment.remove_bitmaps(*(self.identity(recording) for recording in recordings))
        return machine.BitmapRemoved()

    async def copy_ahead(self, effect: machine.CopyAhead) -> machine.Event:
        """Send what has gathered during an outage, as it is at this moment; what changes meanwhile is recorded anew."""
        following = self.identity(effect.following)
        if effect.finished is None:
            await self._attachment.start_tracking(following)
        else:
            await self._attachment.rotate(self.identity(effect.finished), following)
        epoch = OutgoingEpoch(effect.following.epoch, machine.Opened(), self._send)
        # What a disk has gained is compared like a disk of which nothing is known.
        ranges = [
            *((disk, 0) for disk in effect.compare),
            *((disk, held - held % BLOCK) for disk, held in effect.grown),
        ]
        compared = sum(self._sizes[disk] - start for disk, start in ranges)
        meter = SyncMeter(compared + self.dirty_bytes)
        done = 0
        self.progress = meter.update(trio.current_time(), 0)
        try:
            if effect.finished is not None:
                finished = self.identity(effect.finished)
                async with self._attachment.read_ahead(finished, skip=effect.compare) as batches:
                    async for batch in batches:
                        self._see_within(batch.extents)
                        await self._pace.spend(len(batch.data))
                        await epoch.send(batch.extents, batch.data)
                        done += sum(extent.length for extent in batch.extents)
                        self.progress = meter.update(trio.current_time(), min(done, meter.total_bytes))
            for disk, start in ranges:
                before = done - start
                async with self._differing(disk, start) as parts:
                    async for extents, data in parts:
                        await epoch.send(extents, data)
                        done = before + extents[-1].end
                        self.progress = meter.update(trio.current_time(), min(done, meter.total_bytes))
                done = before + self._sizes[disk]
        finally:
            self.progress = None
        return machine.CopiedAhead(epoch.opened)

    async def verify(self, effect: machine.VerifySlice) -> machine.Event:
        """Look at a slice of a verification."""
        epoch = OutgoingEpoch(effect.recording.epoch, effect.opened, self._send)
        return await self.verifier.look(effect, self.identity(effect.recording), epoch)

    @asynccontextmanager
    async def _differing(
        self, disk: int, start: int = 0, progress: Callable[[int], None] | None = None
    ) -> AsyncIterator[AsyncIterator[_Part]]:
        """Those parts of a live disk that are not the same on the secondary."""
        size = self._sizes[disk]
        async with (
            self._attachment.read_live(disk, start=start) as batches,
            self.comparison.differing(self._paced(batches), disk, size, start=start, progress=progress) as parts,
        ):
            yield parts

    @asynccontextmanager
    async def _whole(self, disk: int, start: int) -> AsyncIterator[AsyncIterator[_Part]]:
        """All of a live disk."""
        async with self._attachment.read_live(disk, start=start) as batches:
            yield ((batch.extents, batch.data) async for batch in self._paced(batches))

    def _see_within(self, extents: tuple[Extent, ...]) -> None:
        """A live disk may have become larger since the link's hello spoke of it."""
        for extent in extents:
            disk = self._attachment.disks[extent.disk]
            if extent.end > disk.size:
                raise GraphChanged(
                    f"disk {disk.name} has {extent.end} bytes or more, where it had {disk.size}",
                    safe="the VM goes on, and its changes stay recorded",
                )

    async def _paced(self, batches: AsyncIterator[Batch]) -> AsyncIterator[Batch]:
        async for batch in batches:
            await self._pace.spend(len(batch.data))
            if self._marks is not None:
                await self._marks.set_if_due()
            yield batch

    async def capture(self, effect: machine.Capture) -> machine.Event:
        """The paused part of a checkpoint."""
        self.capture_started = trio.current_time()
        if not effect.pause and not await self._attachment.vm_is_paused():
            return machine.NotCaptured("the VM runs, where it should have been paused")
        self._capture = await self._attachment.capture(
            self.identity(effect.finished), self.identity(effect.following), pause=effect.pause
        )
        self.captured_at = trio.current_time()
        self.pause_seconds = self._capture.pause_seconds
        self.pauses.add(self._capture.pause_seconds)
        self.dirty_bytes = self._capture.dirty_bytes
        if self._capture.disks or not self.comparison.settled:
            return machine.Captured()
        self._capture = None
        return machine.Captured(changed=False)

    async def hold(self, effect: machine.Hold) -> machine.Event:
        """Pause the VM for a switch-over."""
        return machine.Held(await self._attachment.hold.take(effect.seconds))

    async def stand(self, effect: machine.Stand) -> machine.Event:
        """Make that pause final, if the VM has written nothing since the last checkpoint."""
        await self._attachment.stand_still(self.identity(effect.recording))
        return machine.Standing()

    async def resume(self) -> None:
        """Let the VM run.

        :raise QemuError: it is not known that it does.
        """
        await self._attachment.hold.let_run()

    async def transfer(self, effect: machine.Transfer) -> machine.Event:
        """Send the epoch's extents, and take the filter out whatever happens."""
        assert self._capture is not None
        epoch = OutgoingEpoch(effect.finished.epoch, effect.opened, self._send)
        try:
            async with self._attachment.read(self._capture) as batches:
                async for batch in batches:
                    await epoch.send(batch.extents, batch.data)
        finally:
            await self._release()
        await self.comparison.settle()
        return machine.Transferred(epoch.opened)

    async def _release(self) -> None:
        capture, self._capture = self._capture, None
        if capture is not None:
            # Bounded inside; the guest's path must be free again also when this work was cancelled.
            with trio.CancelScope(shield=True):
                await self._attachment.release(capture)

    async def copy_live(self, effect: machine.CopyLive) -> machine.Event:
        """Read the live disks and send them: all of those whose targets are empty, of others what differs there."""
        if effect.start is None:
            await self._attachment.clear(self.identity(effect.recording))
        else:
            await self._see_recorded(effect.recording)
        fresh, start = effect.fresh, effect.start or 0
        total = sum(self._sizes)
        meter = SyncMeter(total)
        marks = self._marks = Marks(self._send, start, total)
        before = 0
        self.progress = meter.update(trio.current_time(), start)
        try:
            for disk, size in enumerate(self._sizes):
                first = max(0, start - before) // BLOCK * BLOCK
                if start - before < size:
                    reached = partial(_reached, marks, before, size)
                    whole = self._whole(disk, first) if fresh[disk] else self._differing(disk, first, reached)
                    async with whole as parts:
                        async for extents, data in parts:
                            self._see_within(extents)
                            wanted = tuple(extent for extent in extents if not (extent.zero and fresh[disk]))
                            if wanted:
                                await self._send(m.SyncExtents(wanted, memoryview(data)))
                            done = max((extent.end for extent in extents), default=0)
                            if fresh[disk]:
                                reached(done)
                            self.progress = meter.update(trio.current_time(), before + done)
                before += size
            await self.comparison.settle()
            self.progress = replace(meter.update(trio.current_time(), total), seconds_left=0.0)
        except BaseException:
            self.progress = None
            raise
        finally:
            self._marks = None
        return machine.SyncCopied()

    async def _see_recorded(self, recording: machine.Recording) -> None:
        """See that every disk still has the bitmap that an interrupted copy relies on.

        :raise GraphChanged: one has not.
        """
        for disk, found in zip(self._attachment.disks, await self.found(), strict=True):
            if machine.Found(recording) not in found:
                raise GraphChanged(
                    f"disk {disk.name} has lost its dirty bitmap: what changed since the copy began is not known",
                    safe="the VM goes on",
                    hint="nothing need be done: the copy begins anew, and compares what is there",
                )

    def flushed(self, token: int) -> None:
        """The secondary has made durable what a copy has sent up to there."""
        if self._marks is not None:
            self._marks.answered(token)


def _reached(marks: Marks, before: int, size: int, done: int) -> None:
    """So much of a disk is sent, or the same; what is in a block that is cut is read once more."""
    marks.position = before + (done if done >= size else done // BLOCK * BLOCK)
