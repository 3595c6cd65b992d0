"""Looks at one slice of a disk after the other for a verification: reads, asks, looks at the bitmap, repairs.

What may not enter: which slice is next and what its findings mean (:mod:`qemu_remus.core.verification`'s), and when
(the machine's).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Final, Protocol

import structlog
import trio

from qemu_remus.core import primary_machine as machine
from qemu_remus.core.comparison import blocks_at_once, digest_blocks, digest_zeroes, extents_in
from qemu_remus.core.errors import CommandInDoubt, GraphChanged, LinkError, QemuRemusError
from qemu_remus.core.extents import Extent, coalesce, split
from qemu_remus.core.verification import COARSE, FINE, SLICE_DATA_LEAST, Findings, sort_out
from qemu_remus.nbd.batches import BATCH_BYTES, Batch
from qemu_remus.primary.comparison import Comparison
from qemu_remus.primary.outgoing import OutgoingEpoch
from qemu_remus.qemu.attachment import Attachment
from qemu_remus.qemu.nodes import BitmapIdentity

PATIENCE: Final = 0.2
"""Seconds for which a slice may hold up a checkpoint that a timer asks for; a usual one takes a tenth of it."""

PATIENCE_MOST: Final = 1.0
"""The same after slices that did not come to their ends in time: something must come of them at last."""

READ_SECONDS: Final = 0.03
"""Seconds after which a slice reads no more, however little it has."""

_log = structlog.get_logger("work")


class Sender(Protocol):
    """What takes repairs; :class:`qemu_remus.primary.outgoing.OutgoingEpoch` is one."""

    async def send(self, extents: tuple[Extent, ...], data: bytes | bytearray) -> None: ...


class Verifier:
    """One slice at a time."""

    def __init__(self, attachment: Attachment, comparison: Comparison) -> None:
        self._attachment = attachment
        self._comparison = comparison
        self._scope = trio.CancelScope()
        self._patience = PATIENCE
        self.read_bytes = 0
        """That the last slice has read: what the next one waits for."""

    def interrupt(self, *, patient: bool) -> None:
        """Have the slice under way end at once, or soon."""
        if patient:
            self._scope.deadline = min(self._scope.deadline, trio.current_time() + self._patience)
        else:
            self._scope.cancel()

    def begin(self) -> None:
        """A slice is about to be looked at: from now on it can be interrupted."""
        self._scope = trio.CancelScope()

    async def look(
        self, effect: machine.VerifySlice, recording: BitmapIdentity, epoch: OutgoingEpoch
    ) -> machine.SliceVerified:
        """Look at a slice, until it has been looked at or is interrupted.

        :raise CommandInDoubt: what QEMU did with a bitmap is not known.
        """
        size = self._attachment.disks[effect.piece.extent.disk].size
        slice_ = _Slice(self._attachment, self._comparison, effect, recording, size)
        problem = ""
        with self._scope:
            try:
                await slice_.look()
                if effect.repair:
                    await slice_.repair(epoch)
            except CommandInDoubt:
                raise
            except LinkError as error:
                # The link itself tells the machine; the slice is looked at again.
                _log.debug("a slice was cut short", reason=str(error))
            except QemuRemusError as error:
                problem = str(error)
        in_time = slice_.findings.reached > effect.piece.extent.offset
        self._patience = PATIENCE if in_time else min(2 * self._patience, PATIENCE_MOST)
        self.read_bytes = slice_.read_bytes
        return machine.SliceVerified(epoch.opened, slice_.findings, problem)


class _Slice:
    def __init__(
        self,
        attachment: Attachment,
        comparison: Comparison,
        effect: machine.VerifySlice,
        recording: BitmapIdentity,
        size: int,
    ) -> None:
        self._attachment = attachment
        self._comparison = comparison
        self._piece = effect.piece
        self._recording = recording
        self._size = size
        self._content = _Content(effect.piece.extent, effect.piece.block)
        self.findings = Findings(effect.piece.extent.offset)

    @property
    def read_bytes(self) -> int:
        return self._content.held

    async def look(self) -> None:
        part = await self._read()
        suspected = await self._differing(part, [part], self._piece.block)
        if not suspected:
            self.findings = Findings(part.end)
            return
        # Not before it was read: see core.verification.
        dirty = await self._attachment.written(self._recording, part)
        wrong, written = sort_out(suspected, dirty)
        if self._piece.block == COARSE:
            wrong = tuple(await self._differing(part, wrong, FINE))
        self.findings = Findings(part.end, wrong, written)
        if wrong:
            _log.warning("the copy differs", ranges=len(wrong), bytes=sum(extent.length for extent in wrong))

    async def _read(self) -> Extent:
        """Read as much of the piece as a slice may; what was read, in whole blocks."""
        extent, block = self._piece.extent, self._piece.block
        enough = trio.current_time() + READ_SECONDS
        async with self._attachment.read_part(extent) as batches:
            async for batch in batches:
                self._content.add(batch)
                held = self._content.held
                late = held >= SLICE_DATA_LEAST and trio.current_time() > enough
                if held >= self._piece.data or late:
                    break
            else:
                self._see_whole()
        end = self._content.end
        if end < extent.end:
            end -= (end - extent.offset) % block
        return replace(extent, length=end - extent.offset)

    def _see_whole(self) -> None:
        """All of the piece was read, unless the disk ends before."""
        extent, end = self._piece.extent, self._content.end
        if end < extent.end:
            raise GraphChanged(
                f"disk {self._attachment.disks[extent.disk].name} ends at {end}; it had {self._size} bytes when we "
                "attached",
                safe="the VM goes on, and the secondary keeps its last checkpoint",
                hint="if the disk was resized, restart both controllers",
            )

    async def _differing(self, part: Extent, extents: Iterable[Extent], block: int) -> list[Extent]:
        """Which of these ranges the secondary's checkpoint does not hold as they were read."""
        found: list[Extent] = []
        for extent in extents:
            for question in split(extent, blocks_at_once(block) * block):
                digests = self._content.digests(question, block)
                differing = await self._comparison.ask(part.disk, question.offset, block, digests)
                found += extents_in(differing, part.disk, question.offset, block, question.end)
        return list(coalesce(found))

    async def repair(self, epoch: Sender) -> None:
        """Send what is wrong; the findings say at any moment how much of it was sent."""
        for extent in self.findings.wrong:
            for piece in split(extent, BATCH_BYTES):
                extents, data = self._content.pieces(piece)
                await epoch.send(extents, data)
                self.findings = replace(self.findings, sent=(*self.findings.sent, piece))


class _Content:
    """What was read of a range, without the blocks that are all zero."""

    def __init__(self, extent: Extent, block: int) -> None:
        self._start = extent.offset
        self._limit = extent.end
        self._block = block
        self._blocks: dict[int, bytearray] = {}
        self.end = extent.offset
        self.held = 0

    def add(self, batch: Batch) -> None:
        """Take in the next batch."""
        view = memoryview(batch.data)
        at = 0
        for extent in batch.extents:
            if not extent.zero:
                self._store(extent.offset, view[at : at + extent.length])
                at += extent.length
            self.end = extent.end
        self.held += len(batch.data)

    def _store(self, offset: int, data: memoryview) -> None:
        at = 0
        while at < len(data):
            number, within = divmod(offset + at - self._start, self._block)
            start = self._start + number * self._block
            block = self._blocks.setdefault(number, bytearray(min(self._block, self._limit - start)))
            length = min(len(block) - within, len(data) - at)
            block[within : within + length] = data[at : at + length]
            at += length

    def digests(self, extent: Extent, block: int) -> bytes:
        """Of the blocks of this size in a range."""
        found = []
        for piece in split(extent, block):
            data = self._at(piece)
            found.append(digest_zeroes(piece.length) if data is None else digest_blocks(data, block))
        return b"".join(found)

    def _at(self, piece: Extent) -> memoryview | None:
        """A range within one block; None where the block is all zero."""
        number, within = divmod(piece.offset - self._start, self._block)
        block = self._blocks.get(number)
        return None if block is None else memoryview(block)[within : within + piece.length]

    def pieces(self, extent: Extent) -> tuple[tuple[Extent, ...], bytes]:
        """A range as extents, zeroes told apart, and the data of the others."""
        found = [*self._cut(extent)]
        data = b"".join(part for _, part in found if part is not None)
        return tuple(coalesce(replace(piece, zero=part is None) for piece, part in found)), data

    def _cut(self, extent: Extent) -> Iterator[tuple[Extent, memoryview | None]]:
        for piece in split(extent, FINE):
            data = self._at(piece)
            yield piece, None if data is None or data == bytes(piece.length) else data
