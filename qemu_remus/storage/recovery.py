"""What a journal's segments say after a restart. It reads and judges; it writes nothing.

**Which segments count.** Each segment's header names the oldest one that still counted when it was begun; a TRIM record
names a later one before any older segment is used again.  The newest header or TRIM record therefore says exactly which
incarnations must be there, without a gap.

**What a bad record means.** A segment is begun only after everything in the one before it is durable; so only the
newest can end in something that was never acknowledged.  There, the first bad record and all behind it may be dropped,
unless something behind it proves that it had been durable: every record says up to which sequence number all was
durable when it was written.  Such a proof makes it damage.  So does a missing record in an older segment, and an end
before the superblock's floor.

**What is dropped.** Everything behind the last END, COMMIT, ABORT or TRIM: a bad tail, and the contents of an epoch
without an end.  The journal wipes it before it goes on there, so that none of it can come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qemu_remus.core.errors import FormatError
from qemu_remus.core.model import Base, EpochNumber
from qemu_remus.storage import format as fmt
from qemu_remus.storage.files import Files
from qemu_remus.storage.format import RecordHeader, RecordType, Totals
from qemu_remus.storage.segments import (
    EpochEntry,
    Identity,
    Record,
    Segment,
    damaged,
    find_headers,
    read_record,
    walk_headers,
)


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a journal holds.

    :param committed: the last committed epoch; None where there is none.
    :param unapplied: committed epochs that are not in the images yet, in the order in which to apply them.
    :param staged: epochs in doubt, whole and durable, oldest first.
    :param highest_epoch: the highest epoch number in any record, of dropped ones too; 0 without any.
    :param dropped_tail_bytes: from the end of what is kept to the last thing that can be recognised as ours.
    """

    committed: Base
    unapplied: tuple[EpochNumber, ...]
    staged: tuple[EpochNumber, ...]
    highest_epoch: int
    dropped_tail_bytes: int

    @property
    def in_doubt(self) -> Base:
        """The latest epoch in doubt."""
        return self.staged[-1] if self.staged else None


@dataclass(slots=True)
class Found:
    """A journal's state, for :class:`qemu_remus.storage.journal.Journal` to go on from.

    :param chain: segments that count, oldest first; the last is the one to go on in.
    :param spares: segments whose contents count no more.
    :param position: where in the last segment the next record goes.
    :param sequence: its number.
    :param wipe_to: up to this offset of the last segment there may be records that must not come back.
    """

    chain: list[Segment]
    spares: list[Segment]
    oldest: int
    committed: Base = None
    highest_epoch: int = 0
    position: int = fmt.BLOCK
    sequence: int = 1
    wipe_to: int = 0
    unapplied: dict[EpochNumber, EpochEntry] = field(default_factory=dict)
    staged: dict[EpochNumber, EpochEntry] = field(default_factory=dict)


def choose_chain(files: Files, segments: list[Segment], directory: Path) -> Found | None:
    """Tell the segments that count from the spare ones; None where no segment was ever begun.

    :raise JournalDamaged: one that counts is missing, or its header is damaged.
    """
    begun: dict[int, Segment] = {}
    for segment in segments:
        if segment.header is not None:
            if segment.incarnation in begun:
                raise damaged(f"{segment.path} and {begun[segment.incarnation].path} are the same segment")
            begun[segment.incarnation] = segment
    newest = max(begun, default=0)
    for segment in segments:
        if segment.header is None:
            _see_that_nothing_is_lost(files, segment, newest, segments)
    if not newest:
        return None
    oldest = _oldest_needed(files, begun[newest])
    missing = [incarnation for incarnation in range(oldest, newest + 1) if incarnation not in begun]
    if missing:
        raise damaged(f"segment {missing[0]} of the journal in {directory} is missing, or its header is damaged")
    chain = [begun[incarnation] for incarnation in range(oldest, newest + 1)]
    return Found(chain, [segment for segment in segments if segment not in chain], oldest)


def _see_that_nothing_is_lost(files: Files, segment: Segment, newest: int, segments: list[Segment]) -> None:
    """A header is durable before the first record behind it: a torn one has none of its own incarnation behind it."""
    known = [other.header for other in segments if other.header is not None]
    for record in find_headers(files, segment, 0):
        foreign = bool(known) and (record.pair, record.generation) != (known[0].pair, known[0].generation)
        if record.incarnation > newest and not foreign:
            raise damaged(f"the header of {segment.path} is damaged, and records follow it")


def _oldest_needed(files: Files, newest: Segment) -> int:
    assert newest.header is not None
    oldest = newest.header.oldest
    for header in walk_headers(files, newest):
        if header.type is RecordType.TRIM:
            record = read_record(files, newest, header.offset)
            if record is not None and record.payload is not None:
                oldest = max(oldest, fmt.unpack_trim(record.payload))
    return oldest


def replay(files: Files, found: Found, identity: Identity, applied: Base) -> None:
    """Read the chain and fill in ``found``.

    :param applied: epochs up to this one are in the images: nothing of them is needed or checked.
    :raise JournalDamaged: see the module's head.
    """
    first, last = found.chain[0].header, found.chain[-1]
    assert first is not None
    if (first.committed or 0) > (applied or 0):
        raise damaged(
            f"the journal begins behind epoch {first.committed}, but the images hold only epoch {applied or 'none'}"
        )
    book = _Bookkeeper(found, applied or 0)
    found.committed = first.committed
    found.highest_epoch = first.highest_epoch
    sequence = first.first_sequence
    for segment in found.chain:
        assert segment.header is not None
        if segment.header.first_sequence != sequence:
            raise damaged(
                f"the journal has a gap before {segment.path}: record {sequence} is missing or damaged, "
                f"and was durable when record {segment.header.first_sequence} was written"
            )
        found.position, found.sequence = fmt.BLOCK, sequence
        offset = fmt.BLOCK
        for record in _sound_records(files, segment, applied or 0):
            try:
                book.take(segment, record)
            except FormatError as error:
                raise damaged(f"{segment.path}, offset {record.header.offset}: {error.what}") from error
            offset, sequence = record.header.next_offset, sequence + 1
            if record.header.type not in fmt.OF_CONTENTS:
                found.position, found.sequence = offset, sequence
    try:
        book.finish()
    except FormatError as error:
        raise damaged(f"{last.path}: {error.what}") from error
    _judge_tail(files, last, found, identity, offset, sequence)


def _sound_records(files: Files, segment: Segment, applied: int) -> Iterator[Record]:
    """Records in order, up to the first bad one."""
    for header in walk_headers(files, segment):
        wanted = header.type not in fmt.OF_CONTENTS or header.epoch > applied
        record = read_record(files, segment, header.offset, with_payload=wanted)
        if record is None or (wanted and record.payload is None):
            return
        yield record


def _judge_tail(files: Files, last: Segment, found: Found, identity: Identity, offset: int, sequence: int) -> None:
    """Look behind the last sound record, which ends at ``offset``."""
    found.wipe_to = offset
    for record in find_headers(files, last, offset):
        if (record.pair, record.generation, record.incarnation) != (
            identity.pair,
            identity.generation,
            last.incarnation,
        ):
            continue
        if record.durable > sequence:
            raise damaged(
                f"{last.path} is damaged at offset {offset}: record {sequence} cannot be read, and was durable when "
                f"record {record.sequence} was written"
            )
        found.highest_epoch = max(found.highest_epoch, record.epoch)
        found.wipe_to = max(found.wipe_to, min(last.size, record.offset + fmt.record_size(record.length)))


class _Bookkeeper:
    """Replays records into a :class:`Found`."""

    def __init__(self, found: Found, applied: int) -> None:
        self._found = found
        self._applied = applied
        self._building: EpochEntry | None = None
        # Staged and not whole. That is no damage where the epoch is dropped further on: what it had in segments that
        # count no more is gone then.
        self._broken: dict[EpochNumber, str] = {}

    def finish(self) -> None:
        """There are no more records.

        :raise FormatError: an epoch in doubt is not whole.
        """
        for epoch in self._found.staged:
            if epoch in self._broken:
                raise FormatError(self._broken[epoch])

    def take(self, segment: Segment, record: Record) -> None:
        """One more record.

        :raise FormatError: it contradicts what stands before it.
        """
        header = record.header
        found = self._found
        found.highest_epoch = max(found.highest_epoch, header.epoch)
        epoch = EpochNumber(header.epoch)
        if header.type in fmt.OF_CONTENTS:
            self._contents(segment, header, record.payload, epoch)
        elif header.type is RecordType.END:
            assert record.payload is not None
            self._end(segment, fmt.unpack_totals(record.payload), epoch)
        elif header.type is RecordType.COMMIT:
            assert record.payload is not None
            self._commit(segment, fmt.unpack_totals(record.payload), epoch)
        elif header.type is RecordType.ABORT:
            found.staged.pop(epoch, None)

    def _contents(self, segment: Segment, header: RecordHeader, payload: bytes | None, epoch: EpochNumber) -> None:
        if payload is None:
            return
        if self._building is None or self._building.epoch != epoch:
            self._building = EpochEntry(epoch, Totals(None, 0, 0, 0))
        if header.type is RecordType.DISKS:
            self._building.disks = fmt.unpack_disks(payload)
            self._building.add(segment, header, 0, 0)
        else:
            self._building.add(segment, header, *fmt.data_length(payload))

    def _end(self, segment: Segment, totals: Totals, epoch: EpochNumber) -> None:
        if epoch > self._applied:
            self._found.staged[epoch] = self._ended(segment, totals, epoch)

    def _commit(self, segment: Segment, totals: Totals, epoch: EpochNumber) -> None:
        found = self._found
        if epoch <= (found.committed or 0):
            raise FormatError(f"epoch {epoch} is committed after epoch {found.committed}")
        if epoch > self._applied:
            if totals.base is not None and totals.base > (found.committed or 0):
                raise FormatError(f"epoch {epoch} builds on epoch {totals.base}, which is not there")
            entry = found.staged.pop(epoch, None) or self._ended(segment, totals, epoch)
            if epoch in self._broken:
                raise FormatError(self._broken[epoch])
            if entry.totals != totals:
                raise FormatError(f"the commit of epoch {epoch} does not fit what was staged")
            found.unapplied[epoch] = entry
        found.committed = epoch
        for older in [number for number in found.staged if number < epoch]:
            del found.staged[older]

    def _ended(self, segment: Segment, totals: Totals, epoch: EpochNumber) -> EpochEntry:
        """The epoch that was being built, with the totals that it must have."""
        entry, self._building = self._building, None
        if entry is None or entry.epoch != epoch:
            entry = EpochEntry(epoch, Totals(None, 0, 0, 0))
        counted = entry.totals
        if (counted.extents, counted.payload, counted.digest) != (totals.extents, totals.payload, totals.digest):
            self._broken[epoch] = f"epoch {epoch} is not whole: {counted.extents} of {totals.extents} extents are there"
        entry.totals = totals
        entry.touch(segment)
        return entry
