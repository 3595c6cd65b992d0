"""The journal's lower half: records behind one another in segments that are preallocated and used again.

It owns the segment files, sequence numbers, syncs, space, and the refusal to go on after a failed write.  What an epoch
is may not enter: that is :mod:`qemu_remus.storage.journal`.

The rules that recovery (:mod:`qemu_remus.storage.recovery`) builds on:

- Only the newest segment ever has anything unsynced: it is synced before the next is begun.
- A segment's header is durable before the first record in it is written.
- No 4 KiB block that holds something durable is written again, so that a write torn by a power cut spoils only itself.
- A segment is used again only after a durable TRIM record, or segment header, says that it does not count any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu_remus.core.errors import ConfigError, InternalError, NoSpace, StorageError, WriteFailed
from qemu_remus.core.model import Base
from qemu_remus.storage import format as fmt
from qemu_remus.storage.files import Buffer, Files, storage_error, write_zeroes
from qemu_remus.storage.format import RecordHeader, RecordType, SegmentHeader
from qemu_remus.storage.recovery import Found
from qemu_remus.storage.segments import SEGMENT_SUFFIX, Identity, Segment, close_segments

MINIMUM_SEGMENT_SIZE: Final = 64 << 10

RESERVE: Final = 4 * fmt.BLOCK
"""Bytes at a segment's end for decisions on what is staged (COMMIT, ABORT) and for TRIM records."""

SAFE: Final = "every epoch that was acknowledged before stays in the journal"
_TRIM_RESERVE: Final = 2 * fmt.BLOCK
_REOPEN: Final = (
    "look at the kernel log for the device's errors; the journal is opened again by itself, and reads back what is "
    "really there"
)


@dataclass(frozen=True, slots=True)
class Marks:
    """What a segment's header says about the epochs at its time.

    :param oldest: incarnation of the oldest segment with something needed; None where nothing is.
    """

    oldest: int | None
    committed: Base
    highest_epoch: int


@dataclass(frozen=True, slots=True)
class Space:
    """How much the log may take.

    :param limit: bytes of all segments together.
    :param segment_size: bytes of a new segment.
    """

    limit: int
    segment_size: int

    def check(self) -> None:
        """See that the sizes make sense.

        :raise ConfigError: they do not.
        """
        size = self.segment_size
        if size < MINIMUM_SEGMENT_SIZE or size % fmt.BLOCK or size >= 1 << 32 or self.limit < 2 * size:
            raise ConfigError(
                f"a journal of {self.limit} bytes in segments of {size} cannot be",
                hint=f"a segment has a multiple of {fmt.BLOCK} bytes, from {MINIMUM_SEGMENT_SIZE} to under 4 GiB; "
                "the journal's limit is at least two of them",
            )

    @property
    def room(self) -> int:
        """Bytes of records that an empty segment takes."""
        return self.segment_size - RESERVE - fmt.BLOCK


class RecordLog:
    """Segments as one sequence of records. One thread writes; :meth:`reclaim` may come from another.

    :param lock: guards the lists of segments and whatever ``marks`` reads; re-entrant.
    :param marks: asked, under the lock, what the epochs need.
    """

    def __init__(
        self,
        files: Files,
        directory: Path,
        identity: Identity,
        space: Space,
        found: Found,
        lock: threading.RLock,
        marks: Callable[[], Marks],
    ) -> None:
        self._files = files
        self._directory = directory
        self._identity = identity
        self._space = space
        self._lock = lock
        self._marks = marks
        self._chain = found.chain
        self._spares = found.spares
        self._recorded_oldest = found.oldest
        self._position = found.position
        self._sequence = found.sequence
        self._durable = found.sequence
        self._failure: StorageError | None = None
        self._closed = False

    @property
    def active(self) -> Segment:
        """The segment that records go to."""
        return self._chain[-1]

    @property
    def failed(self) -> bool:
        """A write or sync failed: nothing more is written."""
        return self._failure is not None

    @property
    def free_bytes(self) -> int:
        """Bytes of records that fit at present."""
        with self._lock:
            self.reclaim()
            spares = sum(self._fits(spare) for spare in self._spares)
            new = max(0, self._space.limit - self._taken) // self._space.segment_size
            return (spares + new) * self._space.room + max(0, self.active.size - RESERVE - self._position)

    def check_usable(self) -> None:
        """See that writing makes sense.

        :raise WriteFailed: an earlier write or sync failed.
        """
        if self._failure is not None:
            raise WriteFailed(
                f"the journal takes nothing more since {self._failure.what}", safe=SAFE, hint=_REOPEN
            ) from self._failure
        if self._closed:
            raise InternalError("the journal is closed")

    def begin(self) -> None:
        """Begin the first segment of a new log.

        :raise NoSpace, WriteFailed: it cannot be made.
        """
        self._begin_segment(self._make_segment())

    def settle(self, wipe_to: int) -> None:
        """After recovery: make the end of what is kept the end of the log, durably.

        :param wipe_to: offset in the last segment up to which there may be records that must not come back.
        :raise NoSpace, WriteFailed: it cannot be written.
        """
        last = self.active
        try:
            if self._files.size(last.handle) < last.size:
                self._files.allocate(last.handle, last.size)
            if wipe_to > self._position:
                write_zeroes(self._files, last.handle, self._position, wipe_to - self._position)
            self._files.fsync(last.handle)
        except OSError as error:
            raise storage_error(error, f"wiping the end of {last.path}", safe=SAFE) from error
        self.reclaim()
        self._drop_unfit_spares()

    def write(
        self, kind: RecordType, epoch: int, payload: tuple[Buffer, ...], *, reserved: bool = False
    ) -> tuple[Segment, RecordHeader]:
        """Put a record behind the last one, in another segment where it does not fit; nothing is synced.

        :param reserved: it may use the reserve.
        :raise NoSpace: there is no segment to be had; nothing was written.
        :raise WriteFailed, NoSpace: it could not be written; the log has failed.
        """
        length = sum(len(part) for part in payload)
        size = fmt.record_size(length)
        if size > self._space.room:
            raise InternalError(f"a record of {size} bytes does not fit into a segment of the journal")
        if self._position + size > self.active.size - (0 if reserved else RESERVE):
            self._roll()
        return self._put(kind, epoch, payload, length)

    def sync(self) -> None:
        """Make all records durable.

        :raise WriteFailed, NoSpace: the log has failed.
        """
        try:
            self._files.fdatasync(self.active.handle)
        except OSError as error:
            raise self._fail(error, f"syncing {self.active.path}") from error
        self._durable = self._sequence

    def reclaim(self) -> int:
        """Make segments spare that hold nothing needed.

        :return: incarnation of the oldest one that counts.
        """
        with self._lock:
            needed = self._marks().oldest
            oldest = self.active.incarnation if needed is None else needed
            while self._chain[0].incarnation < oldest:
                self._spares.append(self._chain.pop(0))
            return oldest

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            if not self._closed:
                self._closed = True
                close_segments(self._files, [*self._chain, *self._spares])

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _taken(self) -> int:
        return sum(segment.size for segment in (*self._chain, *self._spares))

    def _fits(self, spare: Segment) -> bool:
        return spare.size == self._space.segment_size

    def _fail(self, error: OSError, what: str) -> StorageError:
        self._failure = storage_error(error, what, safe=SAFE, hint=_REOPEN)
        return self._failure

    def _put(
        self, kind: RecordType, epoch: int, payload: tuple[Buffer, ...], length: int
    ) -> tuple[Segment, RecordHeader]:
        segment = self.active
        record = RecordHeader(
            type=kind,
            length=length,
            checksum=fmt.checksum(*payload),
            pair=self._identity.pair,
            generation=self._identity.generation,
            epoch=epoch,
            incarnation=segment.incarnation,
            sequence=self._sequence,
            durable=self._durable,
            offset=self._position,
        )
        padding = bytes(fmt.record_size(length) - fmt.RECORD_HEADER_SIZE - length)
        try:
            self._files.pwrite(segment.handle, (fmt.pack_record_header(record), *payload, padding), self._position)
        except OSError as error:
            raise self._fail(error, f"writing {segment.path}") from error
        self._position = record.next_offset
        self._sequence += 1
        return segment, record

    def _roll(self) -> None:
        """Go on in another segment.

        :raise NoSpace: there is none to be had; the log can be used as before.
        """
        oldest = self.reclaim()
        self._drop_unfit_spares()
        segment = self._take_spare()
        if segment is None and self._spares and self._position <= self.active.size - _TRIM_RESERVE - fmt.BLOCK:
            # The spare segments there are became free after the last header was written. No later record may be needed
            # to know that, if the next header is torn.
            payload = (fmt.pack_trim(oldest),)
            self._put(RecordType.TRIM, 0, payload, len(payload[0]))
            self.sync()
            self._recorded_oldest = oldest
            self._drop_unfit_spares()
            segment = self._take_spare()
        if segment is None:
            segment = self._make_segment()
        try:
            if self._durable != self._sequence:
                self.sync()
        except BaseException:
            with self._lock:
                self._spares.append(segment)
            raise
        self._begin_segment(segment)

    def _drop_unfit_spares(self) -> None:
        """The settings may have changed since the spare segments were made."""
        with self._lock:
            for spare in [spare for spare in self._spares if spare.incarnation < self._recorded_oldest]:
                if not self._fits(spare) or self._taken > self._space.limit:
                    self._spares.remove(spare)
                    self._files.close(spare.handle)
                    with suppress(OSError):
                        self._files.unlink(spare.path)

    def _take_spare(self) -> Segment | None:
        """A segment that durably does not count."""
        with self._lock:
            for spare in self._spares:
                if spare.incarnation < self._recorded_oldest and self._fits(spare):
                    self._spares.remove(spare)
                    return spare
        return None

    def _make_segment(self) -> Segment:
        if self._taken + self._space.segment_size > self._space.limit:
            raise NoSpace(
                f"the journal in {self._directory} is full: its limit is {self._space.limit} bytes",
                safe=SAFE,
                hint="wait until committed epochs are applied, give the journal a higher limit, or send less at once",
            )
        try:
            names = set(self._files.list(self._directory))
            number = next(number for number in range(1, len(names) + 2) if _name(number) not in names)
            path = self._directory / _name(number)
            handle = self._files.open(path, create=True)
            try:
                self._files.allocate(handle, self._space.segment_size)
            except BaseException:
                self._files.close(handle)
                with suppress(OSError):
                    self._files.unlink(path)
                raise
        except OSError as error:
            raise storage_error(error, f"making a segment of the journal in {self._directory}", safe=SAFE) from error
        return Segment(path, handle, self._space.segment_size)

    def _begin_segment(self, segment: Segment) -> None:
        with self._lock:
            marks = self._marks()
            incarnation = self.active.incarnation + 1 if self._chain else 1
            header = SegmentHeader(
                size=segment.size,
                pair=self._identity.pair,
                generation=self._identity.generation,
                incarnation=incarnation,
                first_sequence=self._sequence,
                oldest=self._chain[0].incarnation if self._chain else incarnation,
                committed=marks.committed,
                highest_epoch=marks.highest_epoch,
            )
            segment.header = header
        try:
            self._files.pwrite(segment.handle, [fmt.pack_segment_header(header).ljust(fmt.BLOCK, b"\0")], 0)
            self._files.fsync(segment.handle)
            self._files.sync_directory(self._directory)
        except OSError as error:
            with self._lock:
                self._spares.append(segment)
            raise self._fail(error, f"beginning {segment.path}") from error
        with self._lock:
            self._chain.append(segment)
            self._position = fmt.BLOCK
            self._durable = self._sequence
            self._recorded_oldest = header.oldest


def _name(number: int) -> str:
    return f"{number:06d}{SEGMENT_SUFFIX}"
