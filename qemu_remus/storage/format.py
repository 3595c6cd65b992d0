"""Every structure of our own on disk, as bytes. Pure: bytes in, values out; no file is opened here.

All integers are little endian; all checksums are CRC32C (RFC 3720, Castagnoli); epoch number 0 stands for "none".

Framed document (the superblock)::

    offset  size  field
         0     8  magic "QREMUSSB"
         8     4  version: 2; 1 is read as well (in it no disk is "gone" or has "room")
        12     4  length of the body in bytes
        16     4  CRC32C of the body
        20     4  CRC32C of bytes 0 to 19
        24     -  body: UTF-8 JSON, ended by a line feed

Segment header; the first block (4,096 bytes) of every journal segment holds it, and zeroes behind it::

    offset  size  field
         0     8  magic "QREMUSSG"
         8     4  version, 1
        12     4  block size, 4096
        16     8  size of the segment in bytes, this header included
        24     8  pair: the first 8 bytes of the SHA-256 of its name
        32    16  generation, as RFC 9562 orders its bytes
        48     8  incarnation: grows by one with each use of any segment of this journal; from 1
        56     8  sequence number of the first record in it; every earlier record is durable, or is dropped
        64     8  incarnation of the oldest segment that still counts
        72     8  last committed epoch when this segment was begun
        80     8  highest epoch seen when this segment was begun
        88     4  reserved, 0
        92     4  CRC32C of bytes 0 to 91

Record header; a record starts at a multiple of 8, and, behind one of any type but EXTENTS and DISKS, of 4,096::

    offset  size  field
         0     4  magic "QREC"
         4     1  type: 1 EXTENTS, 2 END, 3 COMMIT, 4 ABORT, 5 TRIM, 6 DISKS
         5     1  flags, 0
         6     2  reserved, 0
         8     4  length of the payload in bytes
        12     4  CRC32C of the payload
        16     8  pair, as in the segment header
        24    16  generation
        40     8  epoch
        48     8  incarnation of the segment
        56     8  sequence number: consecutive over all records of the journal, from 1
        64     8  durable: every record with a sequence number below this was durable when this one was written
        72     4  offset of this header in the segment, in bytes
        76     4  CRC32C of bytes 0 to 75
        80     -  payload, padded with zeroes to a multiple of 8

Payload of EXTENTS::

    offset  size  field
         0     4  number of extents
         4     4  reserved, 0
         8  24*n  extents
         -     -  contents of the extents that are not zero, one after the other

Extent::

    offset  size  field
         0     4  disk: index into the superblock's disks
         4     4  flags: bit 0 the range reads as zeroes
         8     8  offset in bytes
        16     8  length in bytes, more than 0

Payload of END (the epoch is staged), COMMIT (it counts) and ABORT (it is dropped)::

    offset  size  field
         0     8  base of the epoch
         8     8  number of extents
        16     8  bytes of data
        24     4  digest: CRC32C over the payload checksums of the epoch's EXTENTS and DISKS records, 4 bytes each, in
                  order
        28     4  reserved, 0

Payload of TRIM (epoch 0)::

    offset  size  field
         0     8  incarnation of the oldest segment that still counts

Payload of DISKS: the disks at the epoch's checkpoint.  An epoch without it has those of the epoch before it::

    offset  size  field
         0     4  number of disks
         4     4  reserved, 0
         8  16*n  disks, each: index into the superblock's disks 4; reserved, 0, 4; size in bytes 8
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final
from uuid import UUID

from qemu_remus.core.checksum import crc32c
from qemu_remus.core.errors import FormatError
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import Base, EpochNumber, Generation, PairName

BLOCK: Final = 4096
"""What storage is taken to write as a unit: no block that holds something durable is ever written again."""

VERSION: Final = 1
"""Of a segment."""

DOCUMENT_VERSION: Final = 2
DOCUMENT_VERSIONS: Final = (1, 2)
"""What is written, and what is read."""

DOCUMENT_HEADER_SIZE: Final = 24
SEGMENT_HEADER_SIZE: Final = 96
RECORD_HEADER_SIZE: Final = 80
RECORD_MAGIC: Final = b"QREC"

_DOCUMENT_MAGIC: Final = b"QREMUSSB"
_SEGMENT_MAGIC: Final = b"QREMUSSG"
_DOCUMENT = struct.Struct("<8sIII")
_SEGMENT = struct.Struct("<8sIIQ8s16sQQQQQ4x")
_RECORD = struct.Struct("<4sBBHII8s16sQQQQI")
_CHECKSUM = struct.Struct("<I")
_COUNT = struct.Struct("<II")
_EXTENT = struct.Struct("<IIQQ")
_TOTALS = struct.Struct("<QQQII")
_TRIM = struct.Struct("<Q")
_DISK = struct.Struct("<IIQ")
_ZERO_FLAG: Final = 1

DiskTable = tuple[tuple[int, int], ...]
"""The disks at a checkpoint: index into the superblock's disks, and size in bytes, more than 0; by index."""

Buffer = bytes | bytearray | memoryview


class RecordType(IntEnum):
    """What a record says. The values are on disk: never change one, only add."""

    EXTENTS = 1
    END = 2
    COMMIT = 3
    ABORT = 4
    TRIM = 5
    DISKS = 6


OF_CONTENTS: Final = frozenset({RecordType.EXTENTS, RecordType.DISKS})
"""What an epoch consists of: it counts only with the END or COMMIT behind it, and no sync follows it."""

_KNOWN_TYPES: Final = frozenset(int(kind) for kind in RecordType)


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """First block of a segment; the fields are those of the table above.

    :param size: bytes, a multiple of :data:`BLOCK`.
    :param pair: see :func:`pair_hash`.
    """

    size: int
    pair: bytes
    generation: Generation
    incarnation: int
    first_sequence: int
    oldest: int
    committed: Base
    highest_epoch: int


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """Head of a record; the fields are those of the table above.

    :param epoch: 0 for a record that is about no epoch.
    """

    type: RecordType
    length: int
    checksum: int
    pair: bytes
    generation: Generation
    epoch: int
    incarnation: int
    sequence: int
    durable: int
    offset: int

    @property
    def next_offset(self) -> int:
        """Where the next record of the segment starts."""
        return next_offset(self.type, self.offset, self.length)


@dataclass(frozen=True, slots=True)
class Totals:
    """What an epoch amounts to; the fields are those of the table above."""

    base: Base
    extents: int
    payload: int
    digest: int


def checksum(*buffers: Buffer) -> int:
    """CRC32C of the buffers, one behind the other."""
    value = 0
    for buffer in buffers:
        value = crc32c(buffer, value)
    return value


def pair_hash(pair: PairName) -> bytes:
    """8 bytes that stand for a pair's name in segments and records."""
    return hashlib.sha256(pair.encode("ascii")).digest()[:8]


def align(offset: int, unit: int) -> int:
    """The next multiple of ``unit``, ``offset`` itself where it is one."""
    return -(-offset // unit) * unit


def record_size(length: int) -> int:
    """Bytes that a record with a payload of ``length`` bytes takes, padding included."""
    return align(RECORD_HEADER_SIZE + length, 8)


def next_offset(kind: RecordType, offset: int, length: int) -> int:
    """Where the record behind one of this type, place and payload length starts.

    A sync follows every record but those; what comes next must not touch a block that is durable.
    """
    end = offset + record_size(length)
    return end if kind in OF_CONTENTS else align(end, BLOCK)


def pack_document(body: bytes) -> bytes:
    """Frame a superblock's JSON."""
    head = _DOCUMENT.pack(_DOCUMENT_MAGIC, DOCUMENT_VERSION, len(body), crc32c(body))
    return head + _CHECKSUM.pack(crc32c(head)) + body


def unpack_document(data: bytes) -> bytes:
    """The JSON in a superblock's file.

    :raise FormatError: the file is cut, changed, of another version or something else altogether.
    """
    head = data[:DOCUMENT_HEADER_SIZE]
    if len(head) < DOCUMENT_HEADER_SIZE or not head.startswith(_DOCUMENT_MAGIC):
        raise FormatError("the file is not a superblock")
    if crc32c(head[:-4]) != _CHECKSUM.unpack(head[-4:])[0]:
        raise FormatError("the header's checksum is wrong")
    _, version, length, checksum = _DOCUMENT.unpack(head[:-4])
    if version not in DOCUMENT_VERSIONS:
        known = " and ".join(map(str, DOCUMENT_VERSIONS))
        raise FormatError(f"the file's format version is {version}; this program reads versions {known}")
    body = data[DOCUMENT_HEADER_SIZE:]
    if len(body) != length:
        raise FormatError(f"the file holds {len(body)} bytes where its header says {length}")
    if crc32c(body) != checksum:
        raise FormatError("the body's checksum is wrong")
    return body


def pack_segment_header(header: SegmentHeader) -> bytes:
    """The 96 bytes of a segment header."""
    head = _SEGMENT.pack(
        _SEGMENT_MAGIC,
        VERSION,
        BLOCK,
        header.size,
        header.pair,
        header.generation.bytes,
        header.incarnation,
        header.first_sequence,
        header.oldest,
        header.committed or 0,
        header.highest_epoch,
    )
    return head + _CHECKSUM.pack(crc32c(head))


def unpack_segment_header(data: bytes) -> SegmentHeader | None:
    """Read a segment header; None where these bytes are none.

    :raise FormatError: it is a sound header of another format version.
    """
    head = data[:SEGMENT_HEADER_SIZE]
    if len(head) < SEGMENT_HEADER_SIZE or not head.startswith(_SEGMENT_MAGIC):
        return None
    if crc32c(head[:-4]) != _CHECKSUM.unpack(head[-4:])[0]:
        return None
    _, version, block, size, pair, generation, incarnation, first, oldest, committed, highest = _SEGMENT.unpack(
        head[:-4]
    )
    if (version, block) != (VERSION, BLOCK):
        raise FormatError(f"the segment's format version is {version} (block size {block}), not {VERSION} ({BLOCK})")
    return SegmentHeader(
        size=size,
        pair=pair,
        generation=Generation(UUID(bytes=generation)),
        incarnation=incarnation,
        first_sequence=first,
        oldest=oldest,
        committed=EpochNumber(committed) if committed else None,
        highest_epoch=highest,
    )


def pack_record_header(header: RecordHeader) -> bytes:
    """The 80 bytes of a record header."""
    head = _RECORD.pack(
        RECORD_MAGIC,
        header.type,
        0,
        0,
        header.length,
        header.checksum,
        header.pair,
        header.generation.bytes,
        header.epoch,
        header.incarnation,
        header.sequence,
        header.durable,
        header.offset,
    )
    return head + _CHECKSUM.pack(crc32c(head))


def unpack_record_header(data: bytes) -> RecordHeader | None:
    """Read a record header; None where these bytes are none, or one that a newer format would write."""
    if len(data) < RECORD_HEADER_SIZE or not data.startswith(RECORD_MAGIC):
        return None
    head = data[: RECORD_HEADER_SIZE - 4]
    if crc32c(head) != _CHECKSUM.unpack_from(data, RECORD_HEADER_SIZE - 4)[0]:
        return None
    _, kind, flags, reserved, length, checksum, pair, generation, epoch, incarnation, sequence, durable, offset = (
        _RECORD.unpack(head)
    )
    if flags or reserved or kind not in _KNOWN_TYPES:
        return None
    return RecordHeader(
        type=RecordType(kind),
        length=length,
        checksum=checksum,
        pair=pair,
        generation=Generation(UUID(bytes=generation)),
        epoch=epoch,
        incarnation=incarnation,
        sequence=sequence,
        durable=durable,
        offset=offset,
    )


def pack_extents(extents: Sequence[Extent]) -> bytes:
    """Count and table of an EXTENTS payload; the data follow it."""
    pack = _EXTENT.pack
    parts = [_COUNT.pack(len(extents), 0)]
    parts += [pack(e.disk, _ZERO_FLAG if e.zero else 0, e.offset, e.length) for e in extents]
    return b"".join(parts)


def data_length(payload: bytes) -> tuple[int, int]:
    """Number of extents and bytes of data in an EXTENTS payload, from its head alone.

    :raise FormatError: the payload is too short for its table.
    """
    if len(payload) >= _COUNT.size:
        count, _ = _COUNT.unpack_from(payload)
        data = len(payload) - _COUNT.size - count * _EXTENT.size
        if data >= 0:
            return count, data
    raise FormatError("an extent table is cut short")


def unpack_extents(payload: bytes) -> tuple[tuple[Extent, ...], memoryview]:
    """Extents and data of an EXTENTS payload.

    :raise FormatError: the table does not fit the payload.
    """
    _, length = data_length(payload)
    table_end = len(payload) - length
    view = memoryview(payload)
    extents = tuple(
        Extent(disk, offset, length, bool(flags & _ZERO_FLAG))
        for disk, flags, offset, length in _EXTENT.iter_unpack(view[_COUNT.size : table_end])
    )
    data = view[table_end:]
    if sum(extent.payload for extent in extents) != len(data):
        raise FormatError("an extent table does not fit its data")
    return extents, data


def pack_totals(totals: Totals) -> bytes:
    """Payload of an END, COMMIT or ABORT record."""
    return _TOTALS.pack(totals.base or 0, totals.extents, totals.payload, totals.digest, 0)


def unpack_totals(payload: bytes) -> Totals:
    """Read the payload of an END, COMMIT or ABORT record.

    :raise FormatError: it has another length.
    """
    if len(payload) != _TOTALS.size:
        raise FormatError("an epoch's totals are cut short")
    base, extents, size, digest, _ = _TOTALS.unpack(payload)
    return Totals(EpochNumber(base) if base else None, extents, size, digest)


def pack_trim(oldest: int) -> bytes:
    """Payload of a TRIM record."""
    return _TRIM.pack(oldest)


def unpack_trim(payload: bytes) -> int:
    """Read the payload of a TRIM record.

    :raise FormatError: it has another length.
    """
    if len(payload) != _TRIM.size:
        raise FormatError("a trim record is cut short")
    return int(_TRIM.unpack(payload)[0])


def pack_disks(table: DiskTable) -> bytes:
    """Payload of a DISKS record."""
    return _COUNT.pack(len(table), 0) + b"".join(_DISK.pack(index, 0, size) for index, size in table)


def unpack_disks(payload: bytes) -> DiskTable:
    """Read the payload of a DISKS record.

    :raise FormatError: its length is not that of its table, or a disk is in it twice, out of order, or empty.
    """
    if len(payload) >= _COUNT.size:
        count, _ = _COUNT.unpack_from(payload)
        if len(payload) == _COUNT.size + count * _DISK.size:
            table = tuple((index, size) for index, _, size in _DISK.iter_unpack(memoryview(payload)[_COUNT.size :]))
            indices = [index for index, _ in table]
            if indices == sorted(set(indices)) and all(size for _, size in table):
                return table
    raise FormatError("a table of disks is cut short, or contradicts itself")


def extend_digest(digest: int, payload_checksum: int) -> int:
    """An epoch's digest after one more EXTENTS or DISKS record with this payload checksum."""
    return crc32c(_CHECKSUM.pack(payload_checksum), digest)
