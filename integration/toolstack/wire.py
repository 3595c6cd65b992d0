"""Frames between the protecting side and the backup's memory store, and in the store's files.  Pure.

A checkpoint's memory is a run of frames of one epoch: BEGIN, DEVICE ..., PAGES ..., END.  The backup writes them to a
file as they come; so the file's format is this one too.  Everything else is a question and its answer.

A frame, all numbers little-endian:

======  ====  ==========================================
offset  size
======  ====  ==========================================
0       4     magic ``QRM1``
4       1     kind, :class:`Kind`
5       3     zero
8       8     epoch; 0 where a kind has none
16      4     bytes of payload, at most :data:`PAYLOAD_LIMIT`
20      4     CRC32C of the payload
24            payload
======  ====  ==========================================
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from qemu_remus.core.checksum import crc32c

MAGIC: Final = b"QRM1"
HEADER: Final = struct.Struct("<4sB3xQII")
PAYLOAD_LIMIT: Final = 2 << 20
_BEGIN: Final = struct.Struct("<QQ")
_END: Final = struct.Struct("<Q")
_COUNT: Final = struct.Struct("<I")
_RUN: Final = struct.Struct("<QI")


class Kind(IntEnum):
    """What a frame is."""

    BEGIN = 1
    """The memory's size in bytes, and the epoch that the pages build on: 0 where they are all that is not zero."""
    DEVICE = 2
    """A piece of QEMU's device state."""
    PAGES = 3
    """A count, then for each run its offset (8) and length (4), then their contents one after the other."""
    END = 4
    """How many frames came before, BEGIN among them. Answered when the checkpoint is staged: durable."""
    COMPLETE = 5
    """The disks of this checkpoint are staged: it may be restored from now on."""
    COMMITTED = 6
    """This checkpoint counts: older ones may go."""
    DROP = 7
    """Forget this checkpoint, wherever it stands."""
    LIST = 8
    """Which checkpoints can be restored? Answered by their numbers, 8 bytes each, the newest first."""
    RESTORE = 9
    """Write this checkpoint out. The payload is two paths, the memory's and the device state's, with a zero between."""
    DONE = 10
    """The answer yes."""
    REFUSED = 11
    """The answer no; the payload says why."""


class WireError(Exception):
    """Bytes that are no frame, or frames that are no checkpoint."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame.

    :param raw: header and payload as they came.
    """

    kind: Kind
    epoch: int
    raw: bytes

    @property
    def payload(self) -> memoryview:
        """What it carries."""
        return memoryview(self.raw)[HEADER.size :]


def frame(kind: Kind, epoch: int = 0, payload: bytes = b"") -> bytes:
    """The bytes of a frame."""
    if len(payload) > PAYLOAD_LIMIT:
        raise ValueError(f"{len(payload)} bytes do not go into a frame")
    return HEADER.pack(MAGIC, kind, epoch, len(payload), crc32c(payload)) + payload


def payload_length(header: bytes) -> int:
    """Bytes that come after this header.

    :raise WireError: when it is none.
    """
    magic, _, _, length, _ = HEADER.unpack(header)
    if magic != MAGIC or length > PAYLOAD_LIMIT:
        raise WireError("no frame's header")
    return int(length)


def parse(raw: bytes) -> Frame:
    """One whole frame.

    :raise WireError: when it is not what was sent.
    """
    _, kind, epoch, _, crc = HEADER.unpack_from(raw)
    if payload_length(raw[: HEADER.size]) != len(raw) - HEADER.size or crc32c(raw[HEADER.size :]) != crc:
        raise WireError("a frame is damaged")
    try:
        return Frame(Kind(kind), epoch, raw)
    except ValueError as error:
        raise WireError(f"a frame of kind {kind}") from error


def begin(epoch: int, size: int, base: int | None) -> bytes:
    """The first frame of a checkpoint.

    :param size: the memory's, in bytes.
    :param base: the checkpoint that the pages build on; None: on zeroes.
    """
    return frame(Kind.BEGIN, epoch, _BEGIN.pack(size, base or 0))


def parse_begin(first: Frame) -> tuple[int, int | None]:
    """Size in bytes, and base.

    :raise WireError: when it is another frame.
    """
    if first.kind is not Kind.BEGIN or len(first.payload) != _BEGIN.size:
        raise WireError("a checkpoint without its beginning")
    size, base = _BEGIN.unpack(first.payload)
    return size, base or None


def end(epoch: int, count: int) -> bytes:
    """The last frame of a checkpoint of ``count`` frames before it."""
    return frame(Kind.END, epoch, _END.pack(count))


def parse_end(last: Frame) -> int:
    """How many frames came before.

    :raise WireError: when that is not said.
    """
    if last.kind is not Kind.END or len(last.payload) != _END.size:
        raise WireError("a checkpoint without its end")
    return int(_END.unpack(last.payload)[0])


def pages(epoch: int, runs: Sequence[tuple[int, memoryview]]) -> bytes:
    """A frame of memory: offsets and contents."""
    table = [_COUNT.pack(len(runs)), *(_RUN.pack(offset, len(data)) for offset, data in runs)]
    return frame(Kind.PAGES, epoch, b"".join((*table, *(data for _, data in runs))))


def parse_pages(found: Frame) -> Iterator[tuple[int, memoryview]]:
    """Offsets and contents.

    :raise WireError: when the table and what follows do not fit.
    """
    payload = found.payload
    if len(payload) < _COUNT.size:
        raise WireError("pages without a count")
    (count,) = _COUNT.unpack_from(payload)
    at = _COUNT.size + count * _RUN.size
    if at > len(payload):
        raise WireError("pages without a table")
    table = [_RUN.unpack_from(payload, _COUNT.size + index * _RUN.size) for index in range(count)]
    if at + sum(length for _, length in table) != len(payload):
        raise WireError("pages that do not fit their table")
    for offset, length in table:
        yield offset, payload[at : at + length]
        at += length


def numbers(epochs: Sequence[int]) -> bytes:
    """Payload of the answer to LIST."""
    return struct.pack(f"<{len(epochs)}Q", *epochs)


def parse_numbers(payload: memoryview) -> tuple[int, ...]:
    """The numbers in the answer to LIST."""
    if len(payload) % 8:
        raise WireError("a list of half numbers")
    return struct.unpack(f"<{len(payload) // 8}Q", payload)
