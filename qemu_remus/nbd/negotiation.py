"""The NBD handshake, client side: fixed newstyle, structured replies, metadata contexts, the export. Pure.

Formats: the NBD protocol document, sections "Fixed newstyle negotiation" and "Option types". All numbers big-endian::

    server  0  8  "NBDMAGIC"        client  0  4  client flags        option  0  8  "IHAVEOPT"
            8  8  "IHAVEOPT"                                                  8  4  option
           16  2  handshake flags                                            12  4  length, then data

    option reply  0  8  0x0003e889045565a9      12  4  reply type
                  8  4  option                  16  4  length, then data
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Final

from qemu_remus.core.errors import NbdProtocolError

_GREETING: Final = struct.Struct(">8s8sH")
_OPTION: Final = struct.Struct(">8sII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_INFO_EXPORT_BODY: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE_BODY: Final = struct.Struct(">HIII")

_NBDMAGIC: Final = b"NBDMAGIC"
_IHAVEOPT: Final = b"IHAVEOPT"
_OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

_FIXED_NEWSTYLE: Final = 1
_NO_ZEROES: Final = 2

_OPT_GO: Final = 7
_OPT_STRUCTURED_REPLY: Final = 8
_OPT_SET_META_CONTEXT: Final = 10

_REP_ACK: Final = 1
_REP_INFO: Final = 3
_REP_META_CONTEXT: Final = 4
_REP_ERROR: Final = 1 << 31
_REP_ERR_UNSUPPORTED: Final = _REP_ERROR | 1
_REP_ERR_TLS_REQUIRED: Final = _REP_ERROR | 5
_REP_ERR_UNKNOWN: Final = _REP_ERROR | 6

_INFO_EXPORT: Final = 0
_INFO_BLOCK_SIZE: Final = 3

_FLAG_HAS_FLAGS: Final = 1
READ_ONLY: Final = 1 << 1
CAN_FLUSH: Final = 1 << 2
CAN_WRITE_ZEROES: Final = 1 << 6
"""Bits of :attr:`ExportInfo.flags`."""

_FLAG_SEND_DF: Final = 1 << 7

_REPLY_LIMIT: Final = 64 * 1024
"""Longest option reply that we take: names and texts of at most 4,096 bytes each."""

_REPLIES_LIMIT: Final = 64
"""Most replies to one option: one per context and item of information that we ask for, and some that we did not."""

_NAME_LIMIT: Final = 4096


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What the handshake yielded.

    :param size: of the export, in bytes.
    :param flags: NBD's transmission flags.
    :param minimum_block: requests are multiples of it, in bytes, except at an odd end of the export.
    :param maximum_block: longest read, in bytes.
    :param contexts: metadata contexts by the server's number for them.
    """

    size: int
    flags: int
    minimum_block: int
    maximum_block: int
    contexts: dict[int, str]


def negotiate(
    export: str, contexts: Sequence[str], send: Callable[[bytes], None]
) -> Generator[int, memoryview, ExportInfo]:
    """Run the handshake: yields how many bytes it needs next, is sent exactly these, and returns the outcome.

    :param export: the export's name.
    :param contexts: metadata contexts that we cannot do without.
    :param send: takes bytes for the server.
    :raise NbdProtocolError: when the server breaks the protocol, or has not what we need.
    """
    magic, style, flags = _GREETING.unpack((yield _GREETING.size))
    if magic != _NBDMAGIC or style != _IHAVEOPT:
        raise NbdProtocolError("whatever listens there is not an NBD server of the newstyle protocol")
    if not flags & _FIXED_NEWSTYLE:
        raise NbdProtocolError("the NBD server does not speak the fixed newstyle protocol")
    send(_U32.pack(flags & (_FIXED_NEWSTYLE | _NO_ZEROES)))

    # Structured replies come first: without them a server may not offer contexts.
    yield from _option(_OPT_STRUCTURED_REPLY, b"", "structured replies", export, send)
    name = export.encode()
    numbers: dict[int, str] = {}
    if contexts:
        numbers = yield from _set_contexts(name, export, contexts, send)

    asked = _U32.pack(len(name)) + name + _U16.pack(1) + _U16.pack(_INFO_BLOCK_SIZE)
    size = transmission = None
    minimum, maximum = 1, 32 * 1024 * 1024  # where the server says nothing
    for kind, body in (yield from _option(_OPT_GO, asked, f"the export {export!r}", export, send)):
        if kind != _REP_INFO or len(body) < _U16.size:
            raise NbdProtocolError(f"the NBD server answered the choice of export with a reply of type {kind:#x}")
        (info,) = _U16.unpack_from(body)
        try:
            if info == _INFO_EXPORT:
                _, size, transmission = _INFO_EXPORT_BODY.unpack(body)
            elif info == _INFO_BLOCK_SIZE:
                _, minimum, _, maximum = _INFO_BLOCK_SIZE_BODY.unpack(body)
        except struct.error:
            raise NbdProtocolError(f"the NBD server's information {info} about the export is malformed") from None
    if size is None or transmission is None:
        raise NbdProtocolError("the NBD server did not say how large the export is")
    if not transmission & _FLAG_HAS_FLAGS or not transmission & _FLAG_SEND_DF:
        raise NbdProtocolError("the NBD server cannot be told to answer a read in one piece")
    if minimum == 0 or minimum & (minimum - 1) or maximum < minimum:
        raise NbdProtocolError(f"the NBD server's block sizes {minimum} and {maximum} make no sense")
    return ExportInfo(size, transmission, minimum, maximum, numbers)


def _set_contexts(
    name: bytes, export: str, contexts: Sequence[str], send: Callable[[bytes], None]
) -> Generator[int, memoryview, dict[int, str]]:
    asked = [_U32.pack(len(name)), name, _U32.pack(len(contexts))]
    for context in contexts:
        asked += [_U32.pack(len(context.encode())), context.encode()]
    numbers: dict[int, str] = {}
    for kind, body in (yield from _option(_OPT_SET_META_CONTEXT, b"".join(asked), "block status", export, send)):
        if kind != _REP_META_CONTEXT or len(body) < _U32.size:
            raise NbdProtocolError(f"the NBD server answered the choice of contexts with a reply of type {kind:#x}")
        context = body[_U32.size :].decode(errors="replace")
        (number,) = _U32.unpack_from(body)
        if context not in contexts or context in numbers.values() or number in numbers:
            raise NbdProtocolError(f"the NBD server chose the context {context!r}, which was not asked for, or twice")
        numbers[number] = context
    for context in contexts:
        if context not in numbers.values():
            raise NbdProtocolError(f"the NBD export {export!r} does not offer {context}")
    return numbers


def _option(
    option: int, data: bytes, what: str, export: str, send: Callable[[bytes], None]
) -> Generator[int, memoryview, list[tuple[int, bytes]]]:
    """Send one option and collect its replies up to the acknowledgement."""
    send(_OPTION.pack(_IHAVEOPT, option, len(data)) + data)
    replies: list[tuple[int, bytes]] = []
    while True:
        magic, answered, kind, length = _OPTION_REPLY.unpack((yield _OPTION_REPLY.size))
        if magic != _OPTION_REPLY_MAGIC or answered != option:
            raise NbdProtocolError("the NBD server answered an option with something that is no reply to it")
        if length > _REPLY_LIMIT or len(replies) >= _REPLIES_LIMIT:
            raise NbdProtocolError(f"the NBD server's answer to option {option} is too long")
        body = bytes((yield length))
        if kind == _REP_ACK:
            if body:
                raise NbdProtocolError(f"the NBD server's acknowledgement of option {option} carries data")
            return replies
        if kind & _REP_ERROR:
            raise _refused(kind, body, what, export)
        replies.append((kind, body))


def _refused(kind: int, body: bytes, what: str, export: str) -> NbdProtocolError:
    said = body[:_NAME_LIMIT].decode(errors="replace")
    if kind == _REP_ERR_UNKNOWN:
        return NbdProtocolError(f"the NBD server has no export {export!r}" + (f" ({said})" if said else ""))
    if kind == _REP_ERR_TLS_REQUIRED:
        return NbdProtocolError("the NBD server wants TLS, which is not used on a local socket")
    if kind == _REP_ERR_UNSUPPORTED:
        return NbdProtocolError(f"the NBD server does not support {what}")
    return NbdProtocolError(f"the NBD server refused {what} with error {kind:#x}" + (f" ({said})" if said else ""))
