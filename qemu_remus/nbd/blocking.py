"""The blocking shell of the NBD session, which writes too: one connection, used by one thread at a time.

Owns the socket, its deadline, and what may be on its way at once.  What an error means for whoever wrote is not decided
here.

Writes are sent ahead of their answers, and errors of earlier ones may come out of later calls: of :meth:`flush` at the
latest.  Two that overlap are never on their way together, since a server may do them in any order.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

from qemu_remus.core.errors import NbdConnectionLost, NbdError, NbdProtocolError, NbdRequestFailed
from qemu_remus.nbd.negotiation import CAN_FLUSH, CAN_WRITE_ZEROES, READ_ONLY, ExportInfo
from qemu_remus.nbd.protocol import (
    ALLOCATION,
    STATE_ZERO,
    STATUS_SPAN,
    Event,
    NbdSession,
    Negotiated,
    OrderRequest,
    ReadReply,
    RequestError,
    StatusReply,
)

PIECE: Final = 1 << 20
"""Bytes of one read or write."""

ZERO_PIECE: Final = 64 << 20
"""Bytes of one write of zeroes: where the server has to write them out, it answers in a moment still."""

WINDOW: Final = 16
"""Most writes on their way at once; QEMU takes as many from one connection."""

_BUDGET: Final = 4 << 20

_NAMES: Final = {errno.EPERM: "it is read-only", errno.ESHUTDOWN: "the server is shutting down"}


class BlockingNbd:
    """A connection to an export that can be written to. Use :func:`connect_nbd`.

    :param timeout: seconds without a byte from the server, after which it is taken for lost.
    :param what: names the export in errors.
    :param window: most writes on their way at once.
    """

    def __init__(self, sock: socket.socket, what: str, export: str, timeout: float, window: int) -> None:
        self._socket = sock
        self._what = what
        self._window = window
        self._timeout = timeout
        self._session = NbdSession(export, (ALLOCATION,), budget=_BUDGET)
        self._sent: set[OrderRequest] = set()
        sock.settimeout(timeout)

    def set_timeout(self, timeout: float) -> None:
        """Have another deadline from now on, in seconds."""
        self._timeout = timeout
        self._socket.settimeout(timeout)

    @property
    def info(self) -> ExportInfo:
        """The export's size and flags."""
        return self._session.info

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write a range; see the module on when its errors come.

        :raise NbdRequestFailed: this or an earlier write failed.
        :raise NbdConnectionLost: the server is gone, or silent.
        :raise NbdProtocolError: the server broke the protocol.
        """
        view = memoryview(data)
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            self._make_room(offset + start, len(piece))
            self._sent.add(self._session.write(offset + start, piece))
            self._send()

    def zero(self, offset: int, length: int, *, may_punch: bool) -> None:
        """Make a range zeroes; as :meth:`write`.

        :param may_punch: its space may be given back.
        """
        for start in range(offset, offset + length, ZERO_PIECE):
            count = min(ZERO_PIECE, offset + length - start)
            self._make_room(start, count)
            self._sent.add(self._session.write_zeroes(start, count, may_punch=may_punch))
            self._send()

    def flush(self) -> None:
        """Make durable everything that was written.

        :raise NbdRequestFailed: a write, or the flush, failed: nothing since the last flush may be trusted.
        :raise NbdConnectionLost: as :meth:`write`.
        """
        self._settle(0)
        self._sent.add(self._session.flush())
        self._settle(0)

    def settle(self) -> None:
        """Wait until every write is answered.

        :raise NbdError: as for :meth:`write`.
        """
        self._settle(0)

    def read(self, offset: int, length: int) -> bytes:
        """What is there, all that was written before included.

        :raise NbdError: as for :meth:`write`.
        """
        self._settle(0)
        parts = []
        for start in range(offset, offset + length, PIECE):
            count = min(PIECE, offset + length - start)
            self._session.read(start, count)
            reply = self._answer()
            assert isinstance(reply, ReadReply)
            parts.append(bytes(count) if reply.data is None else bytes(reply.data))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def extent(self, offset: int, length: int) -> tuple[int, bool]:
        """How many bytes from there on are of one kind, at most ``length``, and whether they are known to be zeroes.

        :raise NbdError: as for :meth:`write`.
        """
        self._settle(0)
        self._session.block_status(offset, min(length, STATUS_SPAN), extents=1)
        reply = self._answer()
        assert isinstance(reply, StatusReply)
        ((found, flags),) = reply.contexts[ALLOCATION]
        return min(found, length), bool(flags & STATE_ZERO)

    def close(self) -> None:
        """Say that we are going, and close; never raises."""
        try:
            self._session.disconnect()
            self._send()
        except (NbdError, OSError):
            pass
        self._socket.close()

    def negotiate(self) -> None:
        """Run the handshake, once.

        :raise NbdProtocolError: what is there cannot be written to, flushed, or asked for its zeroes.
        :raise NbdConnectionLost: as :meth:`write`.
        """
        while not any(isinstance(event, Negotiated) for event in self._exchange()):
            pass
        flags = self.info.flags
        lacks = [
            word
            for word, lacking in (
                ("writing", flags & READ_ONLY),
                ("flushing", not flags & CAN_FLUSH),
                ("writing zeroes", not flags & CAN_WRITE_ZEROES),
            )
            if lacking
        ]
        if lacks:
            raise NbdProtocolError(f"{self._what} does not offer {' and '.join(lacks)}")

    def _make_room(self, offset: int, length: int) -> None:
        end = offset + length
        if any(sent.offset < end and offset < sent.offset + sent.length for sent in self._sent):
            self._settle(0)
        self._settle(self._window - 1)

    def _settle(self, most: int) -> None:
        """Wait until at most so many orders are unanswered."""
        while len(self._sent) > most:
            self._exchange()

    def _answer(self) -> Event:
        while True:
            for event in self._exchange():
                return event

    def _exchange(self) -> list[Event]:
        """Wait until something comes, and return what was completed by it; an error of any request is raised."""
        session = self._session
        self._send()
        try:
            count = self._socket.recv_into(session.receive_buffer())
        except OSError as error:
            raise self._lost(error) from error
        if count == 0:
            raise NbdConnectionLost(f"{self._what} closed the connection")
        session.received(count)
        events: list[Event] = []
        failed: RequestError | None = None
        while (event := session.next_event()) is not None:
            if not isinstance(event, Negotiated) and isinstance(event.request, OrderRequest):
                self._sent.discard(event.request)
            if isinstance(event, RequestError):
                failed = failed or event
            events.append(event)
        if failed is not None:
            raise self._failed(failed)
        return events

    def _send(self) -> None:
        try:
            self._socket.sendall(self._session.data_to_send())
        except OSError as error:
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> NbdConnectionLost:
        if isinstance(error, TimeoutError):
            return NbdConnectionLost(f"{self._what} was silent for {self._timeout:g} s")
        return NbdConnectionLost(f"the connection to {self._what} broke: {error.strerror or error}")

    def _failed(self, failed: RequestError) -> NbdRequestFailed:
        said = _NAMES.get(failed.error) or os.strerror(failed.error)
        if failed.text:
            said = f"{said} ({failed.text})"
        where = f" at {failed.request.offset}" if failed.request.length else ""
        return NbdRequestFailed(f"{self._what} failed{where}: {said}", failed.error)


def connect_nbd(sock: socket.socket, what: str, export: str, *, timeout: float, window: int = WINDOW) -> BlockingNbd:
    """Run the handshake on a connected socket, which is closed where it fails.

    :param what: names the export in errors.
    :param timeout: seconds, for each wait.
    :param window: most writes on their way at once.
    :raise NbdError: see :meth:`BlockingNbd.negotiate`.
    """
    client = BlockingNbd(sock, what, export, timeout, window)
    try:
        client.negotiate()
    except BaseException:
        sock.close()
        raise
    return client
