"""Push: QEMU itself copies what is to be read into a file of ours, and nothing of the guest's disk is exported.

For disks of which an NBD export can end QEMU (:mod:`qemu_remus.qemu.faults`), and for a QEMU whose one NBD server is
somebody else's. The checkpoint is captured as ever. Then, with the guest running:

====================================================== =============================================================
what                                                   why so
====================================================== =============================================================
The epoch's bitmap is merged into a bitmap that is     QMP does not say which blocks are dirty. This is how a map of
stored in a file (:mod:`qemu_remus.qemu.bitmap_file`)  4 KiB blocks comes out, so that only these go over the link.
A ``blockdev-backup`` job copies the clusters of       The snapshot's node, never the guest's own: what fails in the
64 KiB that the map touches, from the                  job is the job's. It writes to a local file, waits for nobody,
``snapshot-access`` node into the staging file         and goes one cluster at a time, as QEMU 7.2 answers wrong
                                                       across two of them; for what it finds to be zero, too.
The file is read, and emptied                          No other reader of the snapshot is there, and none is needed.
====================================================== =============================================================

An epoch of more than :data:`SLICE` goes in several such turns, a bitmap of each going into QEMU by the same file. A
*live* disk, too, is read through a filter and a snapshot, of one slice at a time: put in within a pause of some
milliseconds, out again as soon as the job has ended, and only then sent. A node over a disk in an iothread can be added
in a pause only, and what is read must not be held up by whoever receives it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Final

import trio

from qemu_remus.core.errors import EpochLost, FleeceTooSmall, QemuError, SnapshotBroken
from qemu_remus.core.model import BitmapName, NodeName, PairName
from qemu_remus.nbd.batches import Batch, Run
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.bitmap_file import StoredBitmap
from qemu_remus.qemu.client import Done, QmpClient
from qemu_remus.qemu.commands import Command
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.epoch import CLUSTER, BitmapLook, Capture, CapturedDisk
from qemu_remus.qemu.fleeces import Fleeces
from qemu_remus.qemu.jobs import run_job
from qemu_remus.qemu.nodes import WINDOW, job_id, scratch_bitmap
from qemu_remus.qemu.staging import MAP, Slices, Staging, clusters_bytes, runs_of
from qemu_remus.qemu.stagings import Stagings
from qemu_remus.qemu.window import WindowCapturer

SLICE: Final = 64 << 20
"""Bytes that one job copies at most, unless it finds the disk nearly empty; bounds the staging file."""

PART: Final = 4 << 20
"""Bytes that one job copies at first where a part of a disk is looked at, of which not all may be wanted."""

_LARGEST_SLICE: Final = 256 << 20
"""Bytes for one job where most of them are zeroes, which take no space."""

_SMALLEST_SLICE: Final = 1 << 20
"""Bytes: with less room for staging an epoch is given up, unless it needs no more."""

_JOB_LIMIT: Final = 60.0
"""Seconds that a job may take over one slice."""

_ATTEMPTS: Final = 3
"""How often a slice of a live disk is begun whose snapshot breaks."""

_CLOSE_LIMIT: Final = 60.0
"""Seconds that ending a reading may take."""

_KEPT: Final = "the guest is not affected, and its changes stay recorded for the next epoch"


class Push:
    """See the module's docstring; fits :class:`qemu_remus.qemu.transport.Transport`.

    :param stagings: of the disks that are read in this way.
    """

    def __init__(
        self,
        client: QmpClient,
        pair: PairName,
        capturer: WindowCapturer,
        *,
        fleeces: Fleeces,
        stagings: Stagings,
    ) -> None:
        self._client = client
        self._pair = pair
        self._capturer = capturer
        self._fleeces = fleeces
        self._stagings = stagings

    def serves(self, disk: VmDisk) -> bool:
        """Whether a disk is read in this way."""
        return self._stagings.serves(disk)

    def enters_graph(self, disk: VmDisk) -> bool:
        """Whether it puts nodes over a disk to read it live."""
        return True

    @asynccontextmanager
    async def read(self, capture: Capture, disk: CapturedDisk) -> AsyncIterator[AsyncIterator[Batch]]:
        """The contents of one disk's changed blocks at the checkpoint, in ascending order."""
        async with _closing(self._epoch(capture, disk)) as batches:
            yield batches

    @asynccontextmanager
    async def read_live(self, index: int, disk: VmDisk, *, start: int = 0) -> AsyncIterator[AsyncIterator[Batch]]:
        """The contents of a whole disk while the guest writes to it, in ascending order.

        :param start: bytes from the disk's start that are left out, a multiple of 64 KiB.
        """
        rest = [Run(start, disk.size - start)] if start < disk.size else []
        async with _closing(self._live(index, disk, Slices(rest))) as batches:
            yield batches

    @asynccontextmanager
    async def read_part(self, index: int, disk: VmDisk, part: Run) -> AsyncIterator[AsyncIterator[Batch]]:
        """As :meth:`read_live`, of a part that is soon read."""
        async with _closing(self._live(index, disk, Slices([part]), PART)) as batches:
            yield batches

    async def find_dirty(self, disk: VmDisk, bitmap: BitmapName, part: Run, granularity: int) -> list[Run]:
        """What a bitmap that does not record names in a part of its disk, in ascending order."""
        staging = self._stagings.of(disk)
        marked = await self._stored(staging, bitmap, granularity)

        def within() -> list[Run]:
            pieces = ((max(run.offset, part.offset), min(run.end, part.end)) for run in runs_of(marked))
            return [Run(start, end - start) for start, end in pieces if start < end]

        return await trio.to_thread.run_sync(within)

    @asynccontextmanager
    async def read_ahead(self, index: int, disk: VmDisk, bitmap: BitmapLook) -> AsyncIterator[AsyncIterator[Batch]]:
        """The contents of a bitmap's blocks while the guest writes to them, in ascending order."""
        marked = await self._stored(self._stagings.of(disk), bitmap.name, bitmap.granularity)
        async with _closing(self._live(index, disk, Slices(runs_of(marked)))) as batches:
            yield batches

    # --- an epoch

    async def _epoch(self, capture: Capture, disk: CapturedDisk) -> AsyncGenerator[Batch, None]:
        staging = self._stagings.of(disk.disk)
        marked = await self._stored(staging, capture.finished.name, disk.granularity)
        room = await trio.to_thread.run_sync(self._room_beside, capture, disk, marked)
        slices = await trio.to_thread.run_sync(Slices, runs_of(marked))
        bitmap = scratch_bitmap(self._pair, capture.epoch).name
        part = await trio.to_thread.run_sync(slices.take, min(SLICE, room))
        # All of it at once is the usual case: no need to tell QEMU which part.
        whole = (disk.disk.node, capture.finished.name) if slices.exhausted else None
        while part:
            await self._copy(staging, disk.access, bitmap, part, whole)
            async with aclosing(self._staged(staging, disk.index, part)) as batches:
                async for batch in batches:
                    yield batch
            part = await trio.to_thread.run_sync(slices.take, min(SLICE, room))

    def _room_beside(self, capture: Capture, disk: CapturedDisk, marked: StoredBitmap) -> int:
        """Bytes that staging may take: what the fleeces may still come to need has to stay free. Blocks.

        :raise FleeceTooSmall: when that is too little.
        """
        needed = clusters_bytes(runs_of(marked))
        fleeces = 0
        if not self._capturer.fleeces_in_memory:
            fleeces = needed + sum(
                epoch.fleece_bound(other.disk.size, other.dirty_bytes, other.granularity)
                for other in capture.disks
                if other is not disk
            )
        taken = self._fleeces.allocated()
        return self._enough(self._fleeces.free_space() - max(0, fleeces - taken), needed)

    # --- a live disk

    async def _live(
        self, index: int, disk: VmDisk, slices: Slices, first: int | None = None
    ) -> AsyncGenerator[Batch, None]:
        """
        :param first: bytes of the first slice, and of all that are no larger; None: the usual.
        """
        staging = self._stagings.of(disk)
        usual = SLICE if first is None else first
        budget = usual
        while not slices.exhausted:
            # As much may go into the fleece.
            free = await trio.to_thread.run_sync(self._fleeces.free_space) // 2
            part = await trio.to_thread.run_sync(slices.take, min(budget, self._enough(free, disk.size)))
            await self._copy_live(index, disk, part)
            took = await trio.to_thread.run_sync(staging.data.allocated)
            budget = min(2 * budget, _LARGEST_SLICE) if took < budget // 8 else usual
            async with aclosing(self._staged(staging, index, part)) as batches:
                async for batch in batches:
                    yield batch

    async def _copy_live(self, index: int, disk: VmDisk, part: Sequence[Run]) -> None:
        for left in reversed(range(_ATTEMPTS)):
            try:
                await self._copy_window(index, disk, part)
            except SnapshotBroken:
                if not left:
                    raise
            else:
                return

    async def _copy_window(self, index: int, disk: VmDisk, part: Sequence[Run]) -> None:
        """Copy a part of a disk as it is at one moment from now on."""
        staging = self._stagings.of(disk)
        window = scratch_bitmap(self._pair, WINDOW)
        await trio.to_thread.run_sync(staging.offer_bitmap, part)
        try:
            await self._run(
                [
                    commands.bitmap_add(disk.node, window.name, granularity=CLUSTER, disabled=True),
                    *_merged_from_file(staging, disk.node, window.name),
                ]
            )
            access = await self._capturer.capture_window(index, window)
            await self._copy(staging, access, window.name, part, (disk.node, window.name))
        finally:
            if not self._client.closed.is_set():
                with trio.move_on_after(_CLOSE_LIMIT) as scope:
                    scope.shield = True
                    await self._take_out()

    async def _take_out(self) -> None:
        left = await self._capturer.take_out()
        if left:
            raise QemuError(
                f"{', '.join(left)}, put in to read the live disk, cannot be taken out of QEMU",
                safe="the VM goes on",
                hint="another tool uses it (a backup, a snapshot): let that end",
            )
        await trio.to_thread.run_sync(self._fleeces.empty)

    # --- both

    async def _stored(self, staging: Staging, bitmap: BitmapName, granularity: int) -> StoredBitmap:
        """What a bitmap of the disk marks."""
        node = staging.map_node
        await trio.to_thread.run_sync(staging.expect_bitmap)
        await self._run(
            [
                commands.blockdev_add_qcow2(node, file=staging.bitmaps_node),
                commands.bitmap_add(node, MAP, granularity=granularity, disabled=True, persistent=True),
                commands.bitmap_copy(node, MAP, (staging.disk.node, bitmap)),
                commands.blockdev_del(node),
            ]
        )
        return await trio.to_thread.run_sync(staging.stored_bitmap, granularity)

    async def _copy(
        self,
        staging: Staging,
        access: NodeName,
        bitmap: BitmapName,
        part: Sequence[Run],
        whole: tuple[NodeName, BitmapName] | None,
    ) -> None:
        """Have QEMU copy the clusters of some runs into the staging file.

        :param access: the node to copy from.
        :param bitmap: the name of one to make on it.
        :param whole: one of another node that marks just these clusters; None: there is none.
        :raise SnapshotBroken: when the filter gave up the snapshot.
        :raise EpochLost: when it could not be copied for another reason.
        """
        if whole is None:
            await trio.to_thread.run_sync(staging.offer_bitmap, part)
            merged = _merged_from_file(staging, access, bitmap)
        else:
            merged = [commands.bitmap_copy(access, bitmap, whole)]
        job = job_id(self._pair, staging.disk.name)
        error = await run_job(
            self._client,
            job,
            [
                commands.bitmap_add(access, bitmap, granularity=CLUSTER, disabled=True),
                *merged,
                commands.blockdev_backup(job, access, staging.data_node, bitmap, chunk=CLUSTER),
            ],
            limit=_JOB_LIMIT,
        )
        if error is not None:
            raise _failure(staging, error)
        await self._client.execute(commands.bitmap_remove(access, bitmap))

    async def _staged(self, staging: Staging, index: int, part: Sequence[Run]) -> AsyncGenerator[Batch, None]:
        """What a job has copied; the staging file is empty afterwards."""
        try:
            batches = staging.batches(part)
            while runs := await trio.to_thread.run_sync(next, batches, None):
                yield await trio.to_thread.run_sync(staging.read, index, runs)
        finally:
            # No time is lost to a cancellation that a thread would not see.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(staging.empty)

    async def _run(self, steps: Sequence[Command]) -> None:
        """Do all of the steps, sent in one write; raises what a lone one would have raised."""
        for outcome in await self._client.execute_many(steps):
            if not isinstance(outcome, Done):
                raise outcome.error

    def _enough(self, room: int, needed: int) -> int:
        if room < min(_SMALLEST_SLICE, needed):
            raise FleeceTooSmall(
                f"{max(room, 0)} bytes are left in the fleece directory for copying the disk's contents out of QEMU, "
                f"and {min(_SMALLEST_SLICE, needed)} are needed at least",
                safe=_KEPT,
                hint="free some space in the fleece directory, or name another one (--fleece-dir)",
            )
        return room


def _merged_from_file(staging: Staging, node: NodeName, bitmap: BitmapName) -> list[Command]:
    """The commands that add what the map file holds to a bitmap."""
    return [
        commands.blockdev_add_qcow2(staging.map_node, file=staging.bitmaps_node, read_only=True),
        commands.bitmap_copy(node, bitmap, (staging.map_node, MAP)),
        commands.blockdev_del(staging.map_node),
    ]


def _failure(staging: Staging, error: str) -> EpochLost:
    """What a job's end means.

    :param error: QEMU's words, which are the host's for an error number.
    """
    what = f"QEMU could not copy the snapshot of disk {staging.disk.name}: {error}"
    if error == os.strerror(errno.EACCES):
        return SnapshotBroken(
            f"the snapshot of disk {staging.disk.name} broke while it was copied ({error})",
            safe=_KEPT,
            hint="if this repeats, see that the fleece directory has room and is fast enough",
        )
    if error == os.strerror(errno.ENOSPC):
        return FleeceTooSmall(
            what, safe=_KEPT, hint="free some space in the fleece directory, or name another one (--fleece-dir)"
        )
    return EpochLost(what, safe=_KEPT, hint="see QEMU's log, and the fleece directory")


@asynccontextmanager
async def _closing(batches: AsyncGenerator[Batch, None]) -> AsyncIterator[AsyncIterator[Batch]]:
    """The generator, ended with the context."""
    try:
        yield batches
    finally:
        with trio.move_on_after(_CLOSE_LIMIT) as scope:
            scope.shield = True
            await batches.aclose()
