"""How messages look in bytes: the replication protocol between the two controllers, version 1.

It owns layouts, limits and checksums.  What may not enter: I/O, and any opinion on when a message may be sent, which is
:mod:`qemu_remus.core.connection`'s.

All numbers are big-endian and unsigned.  Each direction of a link begins with one line of ASCII, at most 64 bytes, so
that a person who meets it in a capture or a terminal knows what it is::

    QEMU-REMUS/1 replication\\r\\n

Then frames follow, one behind the other::

    offset  size  frame header
         0     4  magic "QRMF"
         4     1  type, see below
         5     1  flags, 0
         6     2  reserved, 0
         8     4  payload length in bytes: at most 4 MiB for the types 18 and 33, 64 KiB for the others
        12     4  CRC32C of the payload
        16     8  sequence number: 0, 1, 2, ... in each direction
        24     4  CRC32C of the bytes 0 to 23
        28        payload

    type  payload (size of each field; "base": 8, an epoch number, 0 for none; epoch numbers begin at 1)
       1  Hello         text pair, role 1 (1 primary, 2 secondary), instance UUID 16, session 8,
                        generation UUID 16 (all zero for none), disks, committed base, staged base, highest epoch 8,
                        disk state 1 (1 inconsistent, 2 consistent, 3 up-to-date, 4 outdated, 5 failed),
                        history: count 1, then each: generation 16, epoch 8,
                        generation begun 8, checkpoint decided 8 (seconds since 1970, 0 where not known)
       2  Heartbeat     captured base, staged base, committed base, applied base, backlog 8
       3  Goodbye       code text, text
      16  SyncBegin     generation UUID 16, disks
      17  SyncReady     count 2, then each: 1 (0 or 1)
      18  SyncExtents   extents
      19  SyncFlush     token 8
      20  SyncFlushed   token 8
      32  EpochBegin    epoch 8, base
      33  EpochExtents  extents
      34  EpochEnd      epoch 8, number of extents 8, bytes of data 8, digest 4, commit 1 (0 or 1)
      35  EpochStaged   epoch 8
      36  CommitEpoch   epoch 8
      37  Committed     epoch 8
      38  AbortEpoch    epoch 8
      39  EpochAborted  epoch 8
      40  EpochRefused  epoch 8, code text, text

      48  CompareBlocks disk 2, offset 8, block size 4, digests: 16 each, to the payload's end
      49  BlocksDiffer  disk 2, offset 8, bitmap: to the payload's end

      50  HandOver      epoch 8, generation UUID 16
      51  HandedOver    epoch 8, generation UUID 16
      52  HandoverRefused  epoch 8, code text, text
      70  SyncResume    generation UUID 16, disks
      71  SyncResumed   resumed 1 (0 or 1), position 8, count 2, then each: 1 (0 or 1)

    names and codes: length 1, then ASCII; text: length 2, then at most 4,096 bytes of UTF-8 without control characters
    but line feed; disks: count 2 (at most 256), then each: name, size in bytes 8, base

    offset  size  extents
         0     8  epoch; 0 in SyncExtents
         8     4  number of extents n, at most 16,384
        12  20*n  table, one entry each:
                     0  2  disk, an index into the hello's disks
                     2  2  flags: bit 0: zero, no data travel; the others 0
                     4  8  offset in bytes
                    12  8  length in bytes, at least 1; offset + length < 2^63
     12+20*n      data of the entries without "zero", one after the other, to the payload's end

A question about blocks begins at a multiple of the block size, a power of two from 4 KiB to 1 MiB; it has 1 to 1,024
digests and is about at most 64 MiB.  Digests and bitmaps are :mod:`qemu_remus.core.comparison`'s.

The digest of an epoch is the CRC32C over the payloads of its EpochExtents frames, chained in order, from 0.  A payload
is a function of its message alone, so that both sides and the journal can compute it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import construct as c

from qemu_remus.core import messages as m
from qemu_remus.core import wire_fields as f
from qemu_remus.core.checksum import crc32c
from qemu_remus.core.comparison import blocks_at_once, count_blocks
from qemu_remus.core.errors import ConfigError, LocalProtocolError, RemoteProtocolError, VersionMismatch
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import EpochNumber, InstanceId, pair_name

Buffer = bytes | bytearray | memoryview

VERSION: Final = 1
BANNER: Final = f"QEMU-REMUS/{VERSION} replication\r\n".encode("ascii")
BANNER_LIMIT: Final = 64
PAYLOAD_LIMIT: Final = 4 << 20
"""Most bytes of one payload, extent table included."""
CONTROL_LIMIT: Final = 64 << 10
"""Most bytes of the payload of a message without extents."""
EXTENTS_LIMIT: Final = 16384
"""Most extents in one message."""

_MAGIC: Final = b"QRMF"


# --- the banner ------------------------------------------------------------------------------------------------------

_BANNER_START: Final = b"QEMU-REMUS/"
_BANNER_LINE: Final = re.compile(rb"QEMU-REMUS/([0-9]{1,4})(?: [ -~]*)?\r?\n\Z")


def parse_banner(received: bytes | bytearray) -> int | None:
    """Look for the peer's banner at the start of what it sent.

    :return: the banner's length, or None where more bytes are needed.
    :raise VersionMismatch: when the peer speaks another version.
    :raise RemoteProtocolError: when this is not our protocol.
    """
    start = bytes(received[: len(_BANNER_START)])
    if start != _BANNER_START[: len(start)]:
        raise _not_ours(received)
    length = received.find(b"\n", 0, BANNER_LIMIT) + 1
    if not length:
        if len(received) >= BANNER_LIMIT:
            raise _not_ours(received)
        return None
    line = bytes(received[:length])
    match = _BANNER_LINE.match(line)
    if match is None:
        raise _not_ours(received)
    if (version := int(match[1])) != VERSION:
        raise VersionMismatch(
            f"the peer speaks version {version} of the replication protocol, this side version {VERSION}",
            safe="nothing was sent or changed",
            hint="run the same release of qemu-remus on both hosts",
        )
    if line != BANNER:
        raise _not_ours(received)
    return length


def _not_ours(received: bytes | bytearray) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"the peer does not speak the replication protocol; it sent {bytes(received[:32])!r}",
        safe="nothing was used of it",
        hint="check that --peer is the secondary's --listen address, and that nothing else connects there",
    )


# --- control messages ------------------------------------------------------------------------------------------------


def _layout(*checks: Callable[[Any], bool], **members: Any) -> Any:
    """These members, in this order, about all of which the checks must hold."""
    named = (name / member for name, member in members.items())
    return c.Struct(*named, *(c.Check(check) for check in checks), c.Terminated)


def _is_question(message: Any) -> bool:
    """Whether the blocks are where blocks can be, and are few enough."""
    blocks = count_blocks(message.digests)
    end = message.offset + blocks * message.block_size
    return message.offset % message.block_size == 0 and blocks <= blocks_at_once(message.block_size) and end < 2**63


_CONTROL: Final[Mapping[type, tuple[int, Any]]] = {
    m.Hello: (
        1,
        _layout(
            pair=f.name(pair_name),
            role=f.ROLE,
            instance=f.uuid(InstanceId),
            session=f.NUMBER,
            generation=f.OPTIONAL_GENERATION,
            disks=f.DISKS,
            committed=f.BASE,
            staged=f.BASE,
            highest_epoch=f.NUMBER,
            disk_state=f.DISK_STATE,
            history=f.HISTORY,
            begun=f.NUMBER,
            decided=f.NUMBER,
        ),
    ),
    m.Heartbeat: (2, _layout(captured=f.BASE, staged=f.BASE, committed=f.BASE, applied=f.BASE, backlog=f.NUMBER)),
    m.Goodbye: (3, _layout(code=f.CODE, text=f.TEXT)),
    m.SyncBegin: (16, _layout(generation=f.GENERATION, disks=f.DISKS)),
    m.SyncReady: (17, _layout(fresh=f.FRESH)),
    m.SyncResume: (70, _layout(generation=f.GENERATION, disks=f.DISKS)),
    m.SyncResumed: (71, _layout(resumed=f.FLAG, position=f.NUMBER, fresh=f.FRESH)),
    m.SyncFlush: (19, _layout(token=f.NUMBER)),
    m.SyncFlushed: (20, _layout(token=f.NUMBER)),
    m.EpochBegin: (32, _layout(epoch=f.EPOCH, base=f.BASE)),
    m.EpochEnd: (34, _layout(epoch=f.EPOCH, extents=f.NUMBER, payload=f.NUMBER, digest=c.Int32ub, commit=f.FLAG)),
    m.EpochStaged: (35, _layout(epoch=f.EPOCH)),
    m.CommitEpoch: (36, _layout(epoch=f.EPOCH)),
    m.Committed: (37, _layout(epoch=f.EPOCH)),
    m.AbortEpoch: (38, _layout(epoch=f.EPOCH)),
    m.EpochAborted: (39, _layout(epoch=f.EPOCH)),
    m.EpochRefused: (40, _layout(epoch=f.EPOCH, code=f.CODE, text=f.TEXT)),
    m.CompareBlocks: (
        48,
        _layout(_is_question, disk=f.DISK, offset=f.NUMBER, block_size=f.BLOCK_SIZE, digests=f.DIGESTS),
    ),
    m.BlocksDiffer: (49, _layout(disk=f.DISK, offset=f.NUMBER, differing=f.BITMAP)),
    m.HandOver: (50, _layout(epoch=f.EPOCH, generation=f.GENERATION)),
    m.HandedOver: (51, _layout(epoch=f.EPOCH, generation=f.GENERATION)),
    m.HandoverRefused: (52, _layout(epoch=f.EPOCH, code=f.CODE, text=f.TEXT)),
}
_SYNC_EXTENTS: Final = 18
_EPOCH_EXTENTS: Final = 33
_BY_NUMBER: Final = {number: (kind, layout) for kind, (number, layout) in _CONTROL.items()}
_FIELDS: Final = {kind: tuple(field.name for field in fields(kind)) for kind in _CONTROL}


# --- extents ---------------------------------------------------------------------------------------------------------

_TABLE_HEAD: Final = struct.Struct(">QI")
_ENTRY: Final = struct.Struct(">HHQQ")


def _pack_table(message: m.SyncExtents | m.EpochExtents) -> bytes:
    """Everything of the payload but the data, which are checked to fit it."""
    extents = message.extents
    epoch = message.epoch if isinstance(message, m.EpochExtents) else 0
    if len(extents) > EXTENTS_LIMIT:
        raise LocalProtocolError(f"{len(extents)} extents are too many for one message")
    if isinstance(message, m.EpochExtents) and not 1 <= epoch <= f.NUMBER_LIMIT:
        raise LocalProtocolError(f"{epoch} is no epoch number")
    table = bytearray(_TABLE_HEAD.size + len(extents) * _ENTRY.size)
    _TABLE_HEAD.pack_into(table, 0, epoch, len(extents))
    position = _TABLE_HEAD.size
    expected = 0
    for extent in extents:
        offset, length = extent.offset, extent.length
        if not (0 <= extent.disk < f.DISKS_LIMIT and offset >= 0 and length > 0 and offset + length <= f.NUMBER_LIMIT):
            raise LocalProtocolError(f"{extent} cannot be sent")
        _ENTRY.pack_into(table, position, extent.disk, extent.zero, offset, length)
        position += _ENTRY.size
        if not extent.zero:
            expected += length
    if expected != (size := memoryview(message.data).nbytes):
        raise LocalProtocolError(f"the extents want {expected} bytes of data, the message has {size}")
    if position + size > PAYLOAD_LIMIT:
        raise LocalProtocolError(f"a payload of {position + size} bytes is too big for one message")
    return bytes(table)


def _unpack_extents(kind: int, payload: bytes) -> m.SyncExtents | m.EpochExtents:
    if len(payload) < _TABLE_HEAD.size:
        f.bad("the table is cut off")
    epoch, count = _TABLE_HEAD.unpack_from(payload)
    data_start = _TABLE_HEAD.size + count * _ENTRY.size
    if count > EXTENTS_LIMIT or data_start > len(payload):
        f.bad(f"{count} extents are too many")
    view = memoryview(payload)
    extents = []
    expected = 0
    for disk, flags, offset, length in _ENTRY.iter_unpack(view[_TABLE_HEAD.size : data_start]):
        if flags > 1 or disk >= f.DISKS_LIMIT or length == 0 or offset + length > f.NUMBER_LIMIT:
            f.bad(f"an extent is disk {disk}, offset {offset}, length {length}, flags {flags}")
        if not flags:
            expected += length
        extents.append(Extent(disk, offset, length, flags == 1))
    data = view[data_start:]
    if expected != len(data):
        f.bad(f"the extents want {expected} bytes of data, there are {len(data)}")
    if kind == _SYNC_EXTENTS:
        return m.SyncExtents(tuple(extents), data) if epoch == 0 else f.bad("an epoch number where there is none")
    return m.EpochExtents(EpochNumber(f.number(epoch, 1)), tuple(extents), data)


def digest_update(digest: int, message: m.EpochExtents) -> int:
    """Carry an epoch's digest on over one more message; it begins with 0.

    :raise LocalProtocolError: when the message cannot be encoded.
    """
    return crc32c(message.data, crc32c(_pack_table(message), digest))


# --- frames ----------------------------------------------------------------------------------------------------------

# Each message has one, and the other library takes ten times as long for it.
_HEADER: Final = struct.Struct(">4sBBHIIQ")
_HEADER_CRC: Final = struct.Struct(">I")
_CHECKED: Final = _HEADER.size
HEADER_SIZE: Final = _CHECKED + _HEADER_CRC.size


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A frame's header that has passed all checks that need no more than itself.

    :param kind: the message type's number.
    :param length: bytes of payload that follow.
    :param checksum: CRC32C that they must have.
    """

    kind: int
    length: int
    checksum: int
    sequence: int


def encode(message: m.Message, sequence: int) -> list[Buffer]:
    """One message as a frame, in pieces to be sent one after the other; its data are not copied.

    Texts for people are cleaned and cut to their limit: a reason must never be lost because it is too long.

    :param sequence: the frame's number in its direction, from 0.
    :raise LocalProtocolError: when the message breaks a limit.
    """
    if isinstance(message, m.SyncExtents | m.EpochExtents):
        number = _SYNC_EXTENTS if isinstance(message, m.SyncExtents) else _EPOCH_EXTENTS
        payload: bytes = _pack_table(message)
        data = memoryview(message.data)
        header = _pack_header(number, len(payload) + data.nbytes, crc32c(message.data, crc32c(payload)), sequence)
        return [header + payload, message.data] if data.nbytes else [header + payload]
    number, layout = _CONTROL[type(message)]
    try:
        payload = layout.build({name: getattr(message, name) for name in _FIELDS[type(message)]})
    except (c.ConstructError, ValueError, ConfigError) as error:
        raise LocalProtocolError(f"{type(message).__name__} cannot be sent: {_one_line(error)}") from error
    if len(payload) > CONTROL_LIMIT:
        raise LocalProtocolError(f"{type(message).__name__} is too big to be sent: {len(payload)} bytes")
    return [_pack_header(number, len(payload), crc32c(payload), sequence) + payload]


def _pack_header(number: int, length: int, checksum: int, sequence: int) -> bytes:
    head = _HEADER.pack(_MAGIC, number, 0, 0, length, checksum, sequence)
    return head + _HEADER_CRC.pack(crc32c(head))


def decode_header(raw: bytes) -> FrameHeader:
    """Read and check a frame's first ``HEADER_SIZE`` bytes.

    :raise RemoteProtocolError: when they are not a header, are damaged, or announce what this version does not know.
    """
    if raw[:4] != _MAGIC:
        raise _broken(f"a frame begins with {raw[:16]!r}")
    if _HEADER_CRC.unpack_from(raw, _CHECKED)[0] != crc32c(raw[:_CHECKED]):
        raise _broken("a frame header's checksum is wrong")
    _, kind, flags, reserved, length, checksum, sequence = _HEADER.unpack_from(raw)
    extents = kind in (_SYNC_EXTENTS, _EPOCH_EXTENTS)
    if flags or reserved or not (extents or kind in _BY_NUMBER):
        raise _broken(f"a frame of unknown type {kind}, flags {flags:#x}, {reserved:#x}")
    if length > (PAYLOAD_LIMIT if extents else CONTROL_LIMIT):
        raise _broken(f"a frame of type {kind} announces {length} bytes")
    return FrameHeader(kind, length, checksum, sequence)


def decode(header: FrameHeader, payload: bytes) -> m.Message:
    """Read a frame's payload. Extents' data are views into it.

    :raise RemoteProtocolError: when it is damaged or breaks a rule of its layout.
    """
    if crc32c(payload) != header.checksum:
        raise _broken(f"the payload's checksum of a frame of type {header.kind} is wrong")
    try:
        if header.kind in (_SYNC_EXTENTS, _EPOCH_EXTENTS):
            return _unpack_extents(header.kind, payload)
        kind, layout = _BY_NUMBER[header.kind]
        parsed = layout.parse(payload)
        message: m.Message = kind(**{name: parsed[name] for name in _FIELDS[kind]})
    except (c.ConstructError, ValueError, ConfigError) as error:
        raise _broken(f"a frame of type {header.kind} is malformed: {_one_line(error)}") from error
    return message


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _broken(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"the peer broke the replication protocol: {what}",
        safe="nothing of this frame was used",
        hint="if it happens again, check the network path and the peer's release",
    )
