"""An NBD client session without I/O: bytes in, events out, requests in, bytes out.

Owns the transmission phase, and the account of what the server owes us: the sum over all unanswered requests of what
their replies occupy in the server's socket buffer at worst never exceeds :data:`OWED_BUDGET`. As long as it fits that
buffer, the server never waits for us to read, however long we hang; QEMU would otherwise wait in its next drain, and
the guest with it. No sockets, trio or clock may enter.

Of writes nothing is promised before a flush is answered that was asked for after they were: a server may answer in any
order, and a flush covers only what it has answered by then. Writes that overlap must not be on their way together; that
is on the caller.

Structured replies, and simple ones to what asks for no data; formats from the NBD protocol document, all numbers
big-endian::

    request  0  4  0x25609513      reply chunk  0  4  0x668e33ef
             4  2  flags                        4  2  flags (bit 0: the last one of its reply)
             6  2  type                         6  2  type
             8  8  cookie                       8  8  cookie
            16  8  offset                      16  4  length, then:
            24  4  length

    chunk of data    0  8  offset, then data           of a hole  0  8  offset
    of block status  0  4  context                                8  4  length of the hole
                     then 4 length, 4 flags, ...       of error   0  4  error number
                                                                  4  2  length of a text, the text, ...
    simple reply  0  4  0x67446698, 4 error number, 8 cookie
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from qemu_remus.core.errors import InternalError, NbdProtocolError
from qemu_remus.nbd.buffer import ReceiveBuffer
from qemu_remus.nbd.negotiation import ExportInfo, negotiate

OWED_BUDGET: Final = 64 * 1024
"""Bytes. A Unix socket's buffer holds 208 KiB by default (net.core.wmem_default), counted as the kernel counts."""

REPLY_OVERHEAD: Final = 1024
"""Bytes of bookkeeping that the kernel adds to each message in a socket's buffer. Measured 0.75 KiB: 512-byte
replies occupy 1.3 KiB each, 4 KiB replies 4.8."""

ALLOCATION: Final = "base:allocation"
STATE_HOLE: Final = 1
STATE_ZERO: Final = 2

STATUS_SPAN: Final = (1 << 32) - (1 << 16)
"""Longest range, in bytes, that one block status request asks about."""


def dirty_context(bitmap: str) -> str:
    """The metadata context of a QEMU dirty bitmap; bit 0 of its flags: dirty."""
    return f"qemu:dirty-bitmap:{bitmap}"


_REQUEST: Final = struct.Struct(">IHHQQI")
_CHUNK: Final = struct.Struct(">IHHQI")
_SIMPLE: Final = struct.Struct(">IIQ")
_OFFSET: Final = struct.Struct(">Q")
_HOLE: Final = struct.Struct(">QI")
_ERROR: Final = struct.Struct(">IH")
_CONTEXT: Final = struct.Struct(">I")
_DESCRIPTOR: Final = struct.Struct(">II")

_REQUEST_MAGIC: Final = 0x25609513
_SIMPLE_MAGIC: Final = 0x67446698
_CHUNK_MAGIC: Final = 0x668E33EF

_CMD_READ: Final = 0
_CMD_WRITE: Final = 1
_CMD_DISC: Final = 2
_CMD_FLUSH: Final = 3
_CMD_WRITE_ZEROES: Final = 6
_CMD_BLOCK_STATUS: Final = 7
_CMD_FLAG_NO_HOLE: Final = 1 << 1
_CMD_FLAG_DF: Final = 1 << 2
_CMD_FLAG_REQ_ONE: Final = 1 << 3

_CHUNK_DONE: Final = 1
_TYPE_NONE: Final = 0
_TYPE_DATA: Final = 1
_TYPE_HOLE: Final = 2
_TYPE_STATUS: Final = 5
_TYPE_ERROR: Final = 1 << 15

_ERROR_LIMIT: Final = _ERROR.size + 4096 + _OFFSET.size
_DESCRIPTORS_LIMIT: Final = 128 * 1024
"""Most descriptors in one status chunk, whatever we counted on: bounds our memory. QEMU's own limit."""


def read_cost(length: int) -> int:
    """What the reply to a read of ``length`` bytes occupies at worst, in bytes."""
    return REPLY_OVERHEAD + _CHUNK.size + _OFFSET.size + length


def status_cost(extents: int, contexts: int = 1) -> int:
    """What the reply to a block status of at most so many extents in each context occupies at worst, in bytes."""
    per_context = REPLY_OVERHEAD + _CHUNK.size + _CONTEXT.size + extents * _DESCRIPTOR.size
    return contexts * per_context + REPLY_OVERHEAD + _CHUNK.size  # the last chunk may come by itself


ORDER_COST: Final = REPLY_OVERHEAD + _CHUNK.size
"""What the reply to a write or a flush occupies at worst, in bytes; an error's text is not counted."""

STATUS_EXTENTS: Final = (OWED_BUDGET - status_cost(0)) // _DESCRIPTOR.size
"""Most extents of one context that a single block status may yield within the budget."""


@dataclass(eq=False, slots=True)
class Request:
    """A request that the server has not answered completely.

    :param offset: bytes.
    :param length: bytes.
    :param cost: its share of the budget.
    :param tag: the caller's.
    """

    offset: int
    length: int
    cost: int
    tag: object
    content: Reply | None = field(default=None, init=False)


@dataclass(eq=False, slots=True)
class ReadRequest(Request):
    """A read, answered by ReadReply or RequestError."""


@dataclass(eq=False, slots=True)
class StatusRequest(Request):
    """A block status, answered by StatusReply or RequestError."""

    one: bool
    status: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict, init=False)


@dataclass(eq=False, slots=True)
class OrderRequest(Request):
    """A write, a write of zeroes, or a flush (of no bytes), answered by Done or RequestError."""


@dataclass(frozen=True, slots=True)
class Negotiated:
    """The handshake is over; :attr:`NbdSession.info` is there, and requests may be made."""


@dataclass(frozen=True, slots=True)
class ReadReply:
    """Contents of a range.

    :param data: the request's length of bytes, good only until the session is given more bytes; None: all zeroes.
    """

    request: ReadRequest
    data: memoryview | bytes | None


@dataclass(frozen=True, slots=True)
class StatusReply:
    """Block status from the request's offset on.

    :param contexts: for each context, (length, flags) in ascending order. They cover at least one byte; less or more
        than was asked, and each context its own number of bytes. Neighbours may have equal flags.
    """

    request: StatusRequest
    contexts: dict[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True, slots=True)
class Done:
    """What was ordered is done; a write is durable after the next flush only."""

    request: OrderRequest


@dataclass(frozen=True, slots=True)
class RequestError:
    """The server could not do it.

    :param error: an errno value, as NBD defines them.
    :param text: the server's, possibly empty.
    """

    request: Request
    error: int
    text: str


Reply = ReadReply | StatusReply | Done | RequestError
Event = Negotiated | Reply


class NbdSession:
    """One connection to an export.

    Give it what was received (:meth:`receive_data`, or :meth:`receive_buffer` and :meth:`received`), then take events
    until there are none, and send what :meth:`data_to_send` has. After an NbdProtocolError every call raises it again.

    :param export: the export's name.
    :param contexts: metadata contexts that status requests are about; all must be there.
    :param budget: bytes that the server may owe us. More than the default only where it may wait for us, since no
        guest waits for it.
    """

    def __init__(self, export: str, contexts: Sequence[str] = (), *, budget: int = OWED_BUDGET) -> None:
        self._budget = budget
        self._buffer = ReceiveBuffer()
        self._out = bytearray()
        self._contexts = tuple(contexts)
        self._negotiation = negotiate(export, self._contexts, self._out.extend)
        self._wanted = next(self._negotiation)
        self._info: ExportInfo | None = None
        self._pending: dict[int, Request] = {}
        self._cookie = 0
        self._owed = 0
        self._disconnected = False
        self._broken: NbdProtocolError | None = None

    @property
    def info(self) -> ExportInfo:
        """What the handshake yielded.

        :raise InternalError: before :class:`Negotiated`.
        """
        if self._info is None:
            raise InternalError("the NBD handshake is not over")
        return self._info

    @property
    def owed(self) -> int:
        """What the server owes us, in bytes of its socket buffer at worst; at most the budget."""
        return self._owed

    @property
    def unanswered(self) -> int:
        """Number of requests without a complete answer."""
        return len(self._pending)

    def room_for(self, cost: int) -> bool:
        """Whether a request of this cost keeps the budget."""
        return self._owed + cost <= self._budget

    def read(self, offset: int, length: int, tag: object = None) -> ReadRequest:
        """Ask for the contents of a range, in one piece.

        :raise InternalError: when there is no room, or the range is not within the export.
        """
        request = ReadRequest(offset, length, read_cost(length), tag)
        self._request(_CMD_READ, _CMD_FLAG_DF, request)
        return request

    def block_status(self, offset: int, length: int, *, extents: int, tag: object = None) -> StatusRequest:
        """Ask for the block status of a range, at most 2**32 - 1 bytes.

        :param extents: most extents in each context that the answer can have; it is on the caller that the range
            cannot yield more. With 1, the server is told to stop at one.
        :raise InternalError: as for :meth:`read`, or when no context was negotiated.
        """
        if not self._contexts:
            raise InternalError("block status without a metadata context")
        one = extents == 1
        request = StatusRequest(offset, length, status_cost(extents, len(self._contexts)), tag, one)
        self._request(_CMD_BLOCK_STATUS, _CMD_FLAG_REQ_ONE if one else 0, request)
        return request

    def write(self, offset: int, data: bytes | bytearray | memoryview, tag: object = None) -> OrderRequest:
        """Order a range to be written.

        :raise InternalError: as for :meth:`read`.
        """
        request = OrderRequest(offset, len(data), ORDER_COST, tag)
        self._request(_CMD_WRITE, 0, request)
        self._out += data
        return request

    def write_zeroes(self, offset: int, length: int, *, may_punch: bool, tag: object = None) -> OrderRequest:
        """Order a range to be made zeroes.

        :param may_punch: the server may give its space back.
        :raise InternalError: as for :meth:`read`.
        """
        request = OrderRequest(offset, length, ORDER_COST, tag)
        self._request(_CMD_WRITE_ZEROES, 0 if may_punch else _CMD_FLAG_NO_HOLE, request)
        return request

    def flush(self, tag: object = None) -> OrderRequest:
        """Order everything that has been answered until now to be made durable.

        :raise InternalError: when there is no room.
        """
        request = OrderRequest(0, 0, ORDER_COST, tag)
        self._request(_CMD_FLUSH, 0, request)
        return request

    def disconnect(self) -> None:
        """Tell the server that we are going; it finishes what it owes, then closes. Nothing may be asked after it."""
        if self._info is not None and not self._disconnected:
            self._out += _REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_DISC, 0, 0, 0)
        self._disconnected = True

    def data_to_send(self) -> bytes:
        """Bytes for the server; they are handed over once."""
        data = bytes(self._out)
        self._out.clear()
        return data

    def receive_buffer(self) -> memoryview:
        """Where to receive into; data of earlier events are no longer good."""
        return self._buffer.writable(self._wanted)

    def received(self, count: int) -> None:
        """``count`` bytes of :meth:`receive_buffer` were filled."""
        self._buffer.written(count)

    def receive_data(self, data: bytes | memoryview) -> None:
        """Take in bytes from the server, any number of them."""
        view = memoryview(data)
        while view:
            room = self.receive_buffer()
            count = min(len(room), len(view))
            room[:count] = view[:count]
            self.received(count)
            view = view[count:]

    def next_event(self) -> Event | None:
        """The next event; None when more bytes are needed.

        :raise NbdProtocolError: when the server broke the protocol; from then on always.
        """
        if self._broken is not None:
            raise self._broken
        try:
            if self._info is None:
                return self._handshake()
            return self._next_reply(self._info)
        except NbdProtocolError as error:
            self._broken = error
            raise

    def _handshake(self) -> Negotiated | None:
        while len(self._buffer) >= self._wanted:
            try:
                self._wanted = self._negotiation.send(self._buffer.take(self._wanted))
            except StopIteration as outcome:
                self._info = outcome.value
                self._wanted = _CHUNK.size
                return Negotiated()
        return None

    def _request(self, command: int, flags: int, request: Request) -> None:
        end = request.offset + request.length
        within = 0 <= request.offset < end <= self.info.size or command == _CMD_FLUSH
        if self._disconnected or not within or request.length >= 1 << 32:
            raise InternalError(f"NBD request at {request.offset}, {request.length} bytes, cannot be made")
        if not self.room_for(request.cost):
            raise InternalError("an NBD request without room in the budget of replies owed")
        self._cookie += 1
        self._pending[self._cookie] = request
        self._owed += request.cost
        self._out += _REQUEST.pack(_REQUEST_MAGIC, flags, command, self._cookie, request.offset, request.length)

    def _next_reply(self, info: ExportInfo) -> Reply | None:
        while True:
            if len(self._buffer) < _SIMPLE.size:
                self._wanted = _SIMPLE.size
                return None
            if _SIMPLE.unpack(self._buffer.peek(_SIMPLE.size))[0] == _SIMPLE_MAGIC:
                return self._simple_reply()
            if len(self._buffer) < _CHUNK.size:
                self._wanted = _CHUNK.size
                return None
            magic, flags, kind, cookie, length = _CHUNK.unpack(self._buffer.peek(_CHUNK.size))
            if magic != _CHUNK_MAGIC:
                raise NbdProtocolError(f"the NBD server sent {magic:#010x} where a reply should begin")
            request = self._pending.get(cookie)
            if request is None:
                raise NbdProtocolError(f"the NBD server answered a request that was not made ({cookie})")
            # Checked before the body is waited for, so that a length out of the blue cannot take our memory.
            if not self._fits(kind, request, length):
                raise NbdProtocolError(f"the NBD server sent a chunk of type {kind} and {length} bytes as an answer")
            if len(self._buffer) < _CHUNK.size + length:
                self._wanted = _CHUNK.size + length
                return None
            self._buffer.take(_CHUNK.size)
            body = self._buffer.take(length)
            content = self._parse(kind, request, body, info)
            if flags & _CHUNK_DONE:
                del self._pending[cookie]
                self._owed -= request.cost
                return self._complete(request, content)
            if isinstance(content, ReadReply) and content.data is not None:
                content = ReadReply(content.request, bytes(content.data))  # the view does not last until the end
            if content is not None:
                request.content = _first_error(request.content, content)

    def _simple_reply(self) -> Reply:
        _, error, cookie = _SIMPLE.unpack(self._buffer.take(_SIMPLE.size))
        request = self._pending.pop(cookie, None)
        if not isinstance(request, OrderRequest) or request.content is not None:
            raise NbdProtocolError("the NBD server sent a simple reply where a structured one was agreed on")
        self._owed -= request.cost
        return RequestError(request, error, "") if error else Done(request)

    def _fits(self, kind: int, request: Request, length: int) -> bool:
        if kind & _TYPE_ERROR:
            return _ERROR.size <= length <= _ERROR_LIMIT
        if kind == _TYPE_NONE:
            return length == 0
        if kind == _TYPE_DATA:
            return isinstance(request, ReadRequest) and length == _OFFSET.size + request.length
        if kind == _TYPE_HOLE:
            return isinstance(request, ReadRequest) and length == _HOLE.size
        if kind == _TYPE_STATUS:
            count, rest = divmod(length - _CONTEXT.size, _DESCRIPTOR.size)
            return isinstance(request, StatusRequest) and rest == 0 and 0 < count <= _DESCRIPTORS_LIMIT
        return False

    def _parse(self, kind: int, request: Request, body: memoryview, info: ExportInfo) -> Reply | None:
        """The contents of a chunk whose length is right for its type."""
        if kind & _TYPE_ERROR:
            error, text = _ERROR.unpack_from(body)
            if error == 0 or _ERROR.size + text > len(body):
                raise NbdProtocolError("the NBD server sent a malformed error")
            return RequestError(request, error, bytes(body[_ERROR.size : _ERROR.size + text]).decode(errors="replace"))
        if kind == _TYPE_NONE:
            return Done(request) if isinstance(request, OrderRequest) else None
        if isinstance(request, StatusRequest):
            self._parse_status(request, body, info)
            return StatusReply(request, request.status)
        assert isinstance(request, ReadRequest)
        if isinstance(request.content, ReadReply):
            raise NbdProtocolError("the NBD server answered in several pieces a read that was to be answered in one")
        if kind == _TYPE_HOLE:
            if _HOLE.unpack(body) != (request.offset, request.length):
                raise NbdProtocolError("the NBD server answered a read with a hole elsewhere")
            return ReadReply(request, None)
        if _OFFSET.unpack_from(body) != (request.offset,):
            raise NbdProtocolError("the NBD server answered a read with data from elsewhere")
        return ReadReply(request, body[_OFFSET.size :])

    def _parse_status(self, request: StatusRequest, body: memoryview, info: ExportInfo) -> None:
        (number,) = _CONTEXT.unpack_from(body)
        context = info.contexts.get(number)
        if context is None or context in request.status:
            raise NbdProtocolError(f"the NBD server sent the status of context {number}, unasked or twice")
        extents = tuple(_DESCRIPTOR.iter_unpack(body[_CONTEXT.size :]))
        if any(length == 0 for length, _ in extents):
            raise NbdProtocolError("the NBD server sent a block status of no bytes")
        if request.one and (len(extents) > 1 or extents[0][0] > request.length):
            raise NbdProtocolError("the NBD server sent more block status than the one extent asked for")
        request.status[context] = extents

    def _complete(self, request: Request, content: Reply | None) -> Reply:
        reply = content if request.content is None else _first_error(request.content, content)
        if reply is None or (isinstance(reply, StatusReply) and len(reply.contexts) < len(self._contexts)):
            raise NbdProtocolError("the NBD server ended a reply before it was complete")
        return reply


def _first_error(earlier: Reply | None, later: Reply | None) -> Reply | None:
    """What two chunks of one reply amount to: an error counts for the whole of it."""
    if isinstance(earlier, RequestError) or later is None:
        return earlier
    return later
