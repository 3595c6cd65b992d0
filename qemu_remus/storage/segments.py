"""Segments of a journal as open files: finding them, reading records off them. Nothing is written here.

How damage is told from a tail that was never acknowledged: see :mod:`qemu_remus.storage.recovery`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from qemu_remus.core.errors import FormatError, JournalDamaged
from qemu_remus.core.model import EpochNumber, Generation, PairName
from qemu_remus.storage import format as fmt
from qemu_remus.storage.files import Files, Handle, storage_error
from qemu_remus.storage.format import RecordHeader, RecordType, SegmentHeader, Totals

SEGMENT_SUFFIX: Final = ".segment"

_PIECE: Final = 4 << 20
_HINT: Final = (
    "look at the host's kernel log for the device's errors and keep a copy of the store; the images and what is left "
    "of the journal are no checkpoint: synchronise this secondary again from a running primary"
)


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose records a journal holds."""

    pair: bytes
    generation: Generation

    @staticmethod
    def of(pair: PairName, generation: Generation) -> Identity:
        """As the records carry it."""
        return Identity(fmt.pair_hash(pair), generation)


@dataclass(slots=True, eq=False)
class Segment:
    """One file of the journal.

    :param size: bytes, its header included.
    :param header: None for a spare one: nothing in it counts.
    """

    path: Path
    handle: Handle
    size: int
    header: SegmentHeader | None = None

    @property
    def incarnation(self) -> int:
        """Of a segment in use; 0 for one that never was."""
        return 0 if self.header is None else self.header.incarnation


@dataclass(frozen=True, slots=True)
class Span:
    """A run of records in one segment.

    :param start: offset of the first record header.
    :param stop: offset behind the last record.
    """

    segment: Segment
    start: int
    stop: int


@dataclass(slots=True, eq=False)
class EpochEntry:
    """What the journal holds of one epoch.

    :param totals: complete once the epoch is staged or committed; its base counts only then.
    :param spans: where its EXTENTS are, in order; records of other epochs may stand between them.
    :param disks: the disks at its checkpoint, where it says so itself; else they are those of the one before it.
    :param oldest: incarnation of the first segment with something of it; None while there is nothing.
    """

    epoch: EpochNumber
    totals: Totals
    oldest: int | None = None
    spans: list[Span] = field(default_factory=list)
    disks: fmt.DiskTable | None = None

    def add(self, segment: Segment, record: RecordHeader, extents: int, payload: int) -> None:
        """Count one more EXTENTS record; or one of DISKS, which has no extents."""
        before = self.totals
        self.totals = Totals(
            before.base,
            before.extents + extents,
            before.payload + payload,
            fmt.extend_digest(before.digest, record.checksum),
        )
        self.touch(segment)
        start, stop = record.offset, record.next_offset
        if self.spans and self.spans[-1].segment is segment:
            start = self.spans.pop().start
        self.spans.append(Span(segment, start, stop))

    def touch(self, segment: Segment) -> None:
        """Something of the epoch is in this segment."""
        if self.oldest is None:
            self.oldest = segment.incarnation


@dataclass(frozen=True, slots=True)
class Record:
    """A record as found.

    :param payload: None where it was not wanted, or where its checksum is wrong.
    """

    header: RecordHeader
    payload: bytes | None


def damaged(what: str, *, safe: str = "nothing was changed") -> JournalDamaged:
    """The error, with what to do."""
    return JournalDamaged(what, safe=safe, hint=_HINT)


def read(files: Files, segment: Segment, length: int, offset: int) -> bytes:
    """Read from a segment; fewer bytes only at the file's end.

    :raise JournalDamaged: the device cannot read them.
    """
    try:
        return files.pread(segment.handle, length, offset)
    except OSError as error:
        raise damaged(f"{segment.path} cannot be read: {error.strerror or error}") from error


def open_segments(files: Files, directory: Path, identity: Identity) -> list[Segment]:
    """Open all segments, in no order; a file without a sound header comes without one.

    What a process left in the page cache may never have reached the device, and after a failed sync never will: it is
    synced now, and then read back from the device.

    :raise JournalDamaged: one belongs to another pair or generation, is of another format, or cannot be read.
    :raise StorageError: one cannot be opened or synced.
    """
    segments: list[Segment] = []
    try:
        for name in sorted(files.list(directory)):
            if name.endswith(SEGMENT_SUFFIX):
                segments.append(_open_segment(files, directory / name, identity))
    except BaseException:
        close_segments(files, segments)
        raise
    return segments


def _open_segment(files: Files, path: Path, identity: Identity) -> Segment:
    try:
        handle = files.open(path)
    except OSError as error:
        raise storage_error(error, f"opening {path}") from error
    try:
        segment = Segment(path, handle, _settled_size(files, handle, path))
        header = _read_header(files, segment, identity)
        if header is not None:
            segment.header = header
            segment.size = header.size
    except BaseException:
        files.close(handle)
        raise
    return segment


def _settled_size(files: Files, handle: Handle, path: Path) -> int:
    """Sync, forget the page cache, and say how large the file is."""
    try:
        files.fsync(handle)
        files.drop_cache(handle)
        return files.size(handle)
    except OSError as error:
        raise storage_error(error, f"syncing {path}", safe="nothing was changed") from error


def _read_header(files: Files, segment: Segment, identity: Identity) -> SegmentHeader | None:
    try:
        header = fmt.unpack_segment_header(read(files, segment, fmt.SEGMENT_HEADER_SIZE, 0))
    except FormatError as error:
        raise damaged(f"{segment.path}: {error.what}") from error
    if header is not None and (header.pair, header.generation) != (identity.pair, identity.generation):
        raise damaged(f"{segment.path} belongs to another pair or generation ({header.generation})")
    return header


def close_segments(files: Files, segments: list[Segment]) -> None:
    """Close their files."""
    for segment in segments:
        files.close(segment.handle)


def read_record(files: Files, segment: Segment, offset: int, *, with_payload: bool = True) -> Record | None:
    """The record at ``offset``; None where there is none of this segment's incarnation.

    :raise JournalDamaged: the device cannot read it.
    """
    header = fmt.unpack_record_header(read(files, segment, fmt.RECORD_HEADER_SIZE, offset))
    if header is None or not _at_home(header, segment, offset):
        return None
    if not with_payload:
        return Record(header, None)
    payload = read(files, segment, header.length, offset + fmt.RECORD_HEADER_SIZE)
    sound = len(payload) == header.length and fmt.checksum(payload) == header.checksum
    return Record(header, payload if sound else None)


def _at_home(record: RecordHeader, segment: Segment, offset: int) -> bool:
    home = segment.header
    return (
        home is not None
        and record.offset == offset
        and record.incarnation == home.incarnation
        and (record.pair, record.generation) == (home.pair, home.generation)
        and offset + fmt.record_size(record.length) <= segment.size
    )


def walk_headers(files: Files, segment: Segment) -> Iterator[RecordHeader]:
    """Headers of a segment's records, in order, up to the first that is missing; payloads are not looked at."""
    assert segment.header is not None
    offset, sequence = fmt.BLOCK, segment.header.first_sequence
    while (record := read_record(files, segment, offset, with_payload=False)) is not None:
        if record.header.sequence != sequence:
            return
        yield record.header
        offset, sequence = record.header.next_offset, sequence + 1


def find_headers(files: Files, segment: Segment, start: int) -> Iterator[RecordHeader]:
    """All sound record headers at or behind ``start``, of any incarnation, wherever they stand.

    Each says its own offset, so that guest data that happen to hold a journal's records are not taken for ours.
    """
    overlap = fmt.RECORD_HEADER_SIZE - 1
    for base in range(start, segment.size, _PIECE):
        piece = read(files, segment, _PIECE + overlap, base)
        found = piece.find(fmt.RECORD_MAGIC)
        while 0 <= found < _PIECE:
            header = fmt.unpack_record_header(piece[found : found + fmt.RECORD_HEADER_SIZE])
            if header is not None and header.offset == base + found:
                yield header
            found = piece.find(fmt.RECORD_MAGIC, found + 1)


__all__ = [
    "SEGMENT_SUFFIX",
    "EpochEntry",
    "Identity",
    "Record",
    "RecordType",
    "Segment",
    "Span",
    "close_segments",
    "damaged",
    "find_headers",
    "open_segments",
    "read",
    "read_record",
    "walk_headers",
]
