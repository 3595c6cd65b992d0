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
                        history: count 1, then each: generation 16, epoch 8
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

The digest of an epoch is the CRC32C over the payloads of its EpochExtents frames, chained in order, from 0.  A payload
is a function of its message alone, so that both sides and the journal can compute it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, NoReturn
from uuid import UUID

import construct as c

from qemu_remus.core import messages as m
from qemu_remus.core.checksum import crc32c
from qemu_remus.core.errors import ConfigError, LocalProtocolError, RefusalCode, RemoteProtocolError, VersionMismatch
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import (
    Base,
    DiskSpec,
    DiskState,
    EpochNumber,
    Generation,
    InstanceId,
    Role,
    disk_name,
    pair_name,
)

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
DISKS_LIMIT: Final = 256
HISTORY_LIMIT: Final = 32
TEXT_LIMIT: Final = 4096
"""Most bytes of a text for a person."""

_MAGIC: Final = b"QRMF"
_NUMBER_LIMIT: Final = (1 << 63) - 1
_NO_UUID: Final = UUID(int=0)


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


# --- layouts of control messages -------------------------------------------------------------------------------------


def clean_text(text: str) -> str:
    """Make a text for a person fit to travel: no control characters but line feeds, at most 4,096 bytes of UTF-8."""
    printable = "".join(char if char == "\n" or not _is_control(char) else " " for char in text)
    return printable.encode("utf-8", "replace")[:TEXT_LIMIT].decode("utf-8", "ignore")


def _is_control(char: str) -> bool:
    return char < " " or "\x7f" <= char <= "\x9f"


def _bad(why: str) -> NoReturn:
    raise ValueError(why)


def _field(layout: Any, decoder: Callable[[Any], Any], encoder: Callable[[Any], Any]) -> Any:
    return c.ExprAdapter(layout, lambda value, _: decoder(value), lambda value, _: encoder(value))


def _number(value: int, least: int = 0) -> int:
    return value if least <= value <= _NUMBER_LIMIT else _bad(f"a number is {value}")


def _read_text(raw: bytes) -> str:
    text = raw.decode("utf-8")
    if len(raw) > TEXT_LIMIT or any(char != "\n" and _is_control(char) for char in text):
        _bad("a text is too long or holds control characters")
    return text


def _read_code(raw: bytes) -> RefusalCode:
    try:
        return RefusalCode(raw.decode("ascii"))
    except ValueError:
        # A newer release may know more reasons; the text that comes with it says which one it is.
        return RefusalCode.PROTOCOL


def _write_base(base: Base) -> int:
    return 0 if base is None else _number(base, 1)


def _read_disks(entries: list[Any]) -> tuple[DiskSpec, ...]:
    disks = tuple(DiskSpec(entry.name, entry.size, entry.base) for entry in entries)
    if len({disk.name for disk in disks}) != len(disks) or len(disks) > DISKS_LIMIT:
        _bad("there are too many disks, or two of one name")
    return disks


def _write_disks(disks: tuple[DiskSpec, ...]) -> list[dict[str, Any]]:
    _read_disks(list(disks))
    return [{"name": disk.name, "size": disk.size, "base": disk.base} for disk in disks]


def _name(check: Callable[[str], str]) -> Any:
    short = c.Prefixed(c.Byte, c.GreedyBytes)
    return _field(short, lambda raw: check(raw.decode("ascii")), lambda name: check(name).encode("ascii"))


def _uuid(kind: Callable[[UUID], Any]) -> Any:
    return _field(c.Bytes(16), lambda raw: kind(UUID(bytes=raw)), lambda value: value.bytes)


def _short(items: Any, limit: int) -> tuple[Any, ...]:
    return tuple(items) if len(items) <= limit else _bad("a list is too long")


_NUMBER: Final = _field(c.Int64ub, _number, _number)
_EPOCH: Final = _field(c.Int64ub, lambda n: EpochNumber(_number(n, 1)), lambda n: _number(n, 1))
_BASE: Final = _field(c.Int64ub, lambda n: EpochNumber(_number(n)) if n else None, _write_base)
_FLAG: Final = c.Mapping(c.Byte, {False: 0, True: 1})
_GENERATION: Final = _uuid(Generation)
_OPTIONAL_GENERATION: Final = _field(
    c.Bytes(16),
    lambda raw: Generation(UUID(bytes=raw)) if any(raw) else None,
    lambda value: (value or _NO_UUID).bytes,
)
_CODE: Final = _field(c.Prefixed(c.Byte, c.GreedyBytes), _read_code, lambda code: code.value.encode("ascii"))
_TEXT: Final = _field(c.Prefixed(c.Int16ub, c.GreedyBytes), _read_text, lambda text: clean_text(text).encode())
_DISKS: Final = _field(
    c.PrefixedArray(c.Int16ub, c.Struct("name" / _name(disk_name), "size" / _NUMBER, "base" / _BASE)),
    _read_disks,
    _write_disks,
)
_HISTORY: Final = _field(
    c.PrefixedArray(c.Byte, c.Sequence(_GENERATION, _EPOCH)),
    lambda ended: _short([tuple(entry) for entry in ended], HISTORY_LIMIT),
    lambda ended: ended[-HISTORY_LIMIT:],
)
_FRESH: Final = _field(
    c.PrefixedArray(c.Int16ub, _FLAG),
    lambda fresh: _short(fresh, DISKS_LIMIT),
    lambda fresh: _short(fresh, DISKS_LIMIT),
)
_ROLE: Final = c.Mapping(c.Byte, {Role.PRIMARY: 1, Role.SECONDARY: 2})
_DISK_STATE: Final = c.Mapping(
    c.Byte,
    {
        DiskState.INCONSISTENT: 1,
        DiskState.CONSISTENT: 2,
        DiskState.UP_TO_DATE: 3,
        DiskState.OUTDATED: 4,
        DiskState.FAILED: 5,
    },
)


def _layout(**members: Any) -> Any:
    return c.Struct(*(name / member for name, member in members.items()), c.Terminated)


_CONTROL: Final[Mapping[type, tuple[int, Any]]] = {
    m.Hello: (
        1,
        _layout(
            pair=_name(pair_name),
            role=_ROLE,
            instance=_uuid(InstanceId),
            session=_NUMBER,
            generation=_OPTIONAL_GENERATION,
            disks=_DISKS,
            committed=_BASE,
            staged=_BASE,
            highest_epoch=_NUMBER,
            disk_state=_DISK_STATE,
            history=_HISTORY,
        ),
    ),
    m.Heartbeat: (2, _layout(captured=_BASE, staged=_BASE, committed=_BASE, applied=_BASE, backlog=_NUMBER)),
    m.Goodbye: (3, _layout(code=_CODE, text=_TEXT)),
    m.SyncBegin: (16, _layout(generation=_GENERATION, disks=_DISKS)),
    m.SyncReady: (17, _layout(fresh=_FRESH)),
    m.SyncFlush: (19, _layout(token=_NUMBER)),
    m.SyncFlushed: (20, _layout(token=_NUMBER)),
    m.EpochBegin: (32, _layout(epoch=_EPOCH, base=_BASE)),
    m.EpochEnd: (34, _layout(epoch=_EPOCH, extents=_NUMBER, payload=_NUMBER, digest=c.Int32ub, commit=_FLAG)),
    m.EpochStaged: (35, _layout(epoch=_EPOCH)),
    m.CommitEpoch: (36, _layout(epoch=_EPOCH)),
    m.Committed: (37, _layout(epoch=_EPOCH)),
    m.AbortEpoch: (38, _layout(epoch=_EPOCH)),
    m.EpochAborted: (39, _layout(epoch=_EPOCH)),
    m.EpochRefused: (40, _layout(epoch=_EPOCH, code=_CODE, text=_TEXT)),
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
    if isinstance(message, m.EpochExtents) and not 1 <= epoch <= _NUMBER_LIMIT:
        raise LocalProtocolError(f"{epoch} is no epoch number")
    table = bytearray(_TABLE_HEAD.size + len(extents) * _ENTRY.size)
    _TABLE_HEAD.pack_into(table, 0, epoch, len(extents))
    position = _TABLE_HEAD.size
    expected = 0
    for extent in extents:
        offset, length = extent.offset, extent.length
        if not (0 <= extent.disk < DISKS_LIMIT and offset >= 0 and length > 0 and offset + length <= _NUMBER_LIMIT):
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
        _bad("the table is cut off")
    epoch, count = _TABLE_HEAD.unpack_from(payload)
    data_start = _TABLE_HEAD.size + count * _ENTRY.size
    if count > EXTENTS_LIMIT or data_start > len(payload):
        _bad(f"{count} extents are too many")
    view = memoryview(payload)
    extents = []
    expected = 0
    for disk, flags, offset, length in _ENTRY.iter_unpack(view[_TABLE_HEAD.size : data_start]):
        if flags > 1 or disk >= DISKS_LIMIT or length == 0 or offset + length > _NUMBER_LIMIT:
            _bad(f"an extent is disk {disk}, offset {offset}, length {length}, flags {flags}")
        if not flags:
            expected += length
        extents.append(Extent(disk, offset, length, flags == 1))
    data = view[data_start:]
    if expected != len(data):
        _bad(f"the extents want {expected} bytes of data, there are {len(data)}")
    if kind == _SYNC_EXTENTS:
        return m.SyncExtents(tuple(extents), data) if epoch == 0 else _bad("an epoch number where there is none")
    return m.EpochExtents(EpochNumber(_number(epoch, 1)), tuple(extents), data)


def digest_update(digest: int, message: m.EpochExtents) -> int:
    """Carry an epoch's digest on over one more message; it begins with 0.

    :raise LocalProtocolError: when the message cannot be encoded.
    """
    return crc32c(message.data, crc32c(_pack_table(message), digest))


# --- frames ----------------------------------------------------------------------------------------------------------

_HEADER: Final = c.Struct(
    "magic" / c.Bytes(4),
    "type" / c.Byte,
    "flags" / c.Byte,
    "reserved" / c.Int16ub,
    "length" / c.Int32ub,
    "checksum" / c.Int32ub,
    "sequence" / c.Int64ub,
).compile()
_HEADER_CRC: Final = struct.Struct(">I")
_CHECKED: Final = 24
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
    head: bytes = _HEADER.build(
        {
            "magic": _MAGIC,
            "type": number,
            "flags": 0,
            "reserved": 0,
            "length": length,
            "checksum": checksum,
            "sequence": sequence,
        }
    )
    return head + _HEADER_CRC.pack(crc32c(head))


def decode_header(raw: bytes) -> FrameHeader:
    """Read and check a frame's first ``HEADER_SIZE`` bytes.

    :raise RemoteProtocolError: when they are not a header, are damaged, or announce what this version does not know.
    """
    if raw[:4] != _MAGIC:
        raise _broken(f"a frame begins with {raw[:16]!r}")
    if _HEADER_CRC.unpack_from(raw, _CHECKED)[0] != crc32c(raw[:_CHECKED]):
        raise _broken("a frame header's checksum is wrong")
    head = _HEADER.parse(raw)
    extents = head.type in (_SYNC_EXTENTS, _EPOCH_EXTENTS)
    if head.flags or head.reserved or not (extents or head.type in _BY_NUMBER):
        raise _broken(f"a frame of unknown type {head.type}, flags {head.flags:#x}, {head.reserved:#x}")
    if head.length > (PAYLOAD_LIMIT if extents else CONTROL_LIMIT):
        raise _broken(f"a frame of type {head.type} announces {head.length} bytes")
    return FrameHeader(head.type, head.length, head.checksum, head.sequence)


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
