"""The replication protocol as a conversation, without I/O: ``receive_data``, ``next_event``, ``send``.

What may live here: frames in and out, the banner, what has ended.  What may not: bytes (:mod:`wire`), the order of
messages (:mod:`conversation`), time, what to do about a message (the machines), and whether two sides should talk at
all (:mod:`generation`).

Both sides keep the same record of the conversation and judge every message by it twice: the sender before it is sent
(:class:`LocalProtocolError`: a defect of ours), the receiver before it is delivered (:class:`RemoteProtocolError`).
After an error that direction is over; what can still be sent then is one ``Goodbye``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from qemu_remus.core import messages as m
from qemu_remus.core import wire
from qemu_remus.core.conversation import Conversation, Illegal, State
from qemu_remus.core.errors import LocalProtocolError, RemoteProtocolError
from qemu_remus.core.model import Role

RECEIVE_LIMIT: Final = wire.HEADER_SIZE + 2 * wire.PAYLOAD_LIMIT
"""Most bytes that may wait in a connection: the owner takes out events until there is none, then brings more."""


class Side(Enum):
    """How far one direction is."""

    BANNER = auto()
    HELLO = auto()
    TALKING = auto()
    CLOSED = auto()  # goodbye was said
    ERROR = auto()


class NeedData(Enum):
    """See :data:`NEED_DATA`."""

    NEED_DATA = auto()


NEED_DATA: Final = NeedData.NEED_DATA
"""There is no complete message: bring more bytes."""


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """The peer has closed its direction; nothing more will come.

    :param mid_frame: it did so within a banner or frame, which was thrown away.
    """

    mid_frame: bool


Event = m.Message | NeedData | ConnectionClosed


class Connection:
    """One side's end of a link.

    :param role: which end this is: the primary's is the one that connects.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.our_side = Side.BANNER
        self.their_side = Side.BANNER
        self._peer = Role.SECONDARY if role is Role.PRIMARY else Role.PRIMARY
        self._talk = Conversation()
        self._goodbye_sent = False
        self._sent = 0
        self._received = 0
        self._buffer = bytearray()
        self._header: wire.FrameHeader | None = None
        self._eof = False
        self._error: RemoteProtocolError | None = None

    @property
    def state(self) -> State:
        """Where the conversation stands, as far as this side knows."""
        return self._talk.state

    @property
    def goodbye_sent(self) -> bool:
        """Nothing more can be sent."""
        return self._goodbye_sent

    def start(self) -> bytes:
        """Our banner, to be sent at once and before everything else.

        :raise LocalProtocolError: when it was called before.
        """
        if self.our_side is not Side.BANNER:
            raise self._local("the banner is sent once")
        self.our_side = Side.HELLO
        return wire.BANNER

    def send(self, message: m.Message) -> list[wire.Buffer]:
        """Turn a message into bytes, to be sent in full, in this order, before those of the next message.

        The data of extents are not copied: they must not change until the bytes are sent.

        :raise LocalProtocolError: when it must not be said now or breaks a limit. Only a goodbye can follow.
        """
        name = type(message).__name__
        try:
            self._judge_ours(message)
            frame = wire.encode(message, self._sent)
        except Illegal as error:
            raise self._local(f"{name} cannot be sent: {error}") from None
        except LocalProtocolError:
            self.our_side = Side.ERROR
            raise
        self._sent += 1
        return frame

    def _judge_ours(self, message: m.Message) -> None:
        if self.our_side is Side.BANNER or self._goodbye_sent:
            raise Illegal("the conversation is over" if self._goodbye_sent else "the banner comes first")
        if isinstance(message, m.Goodbye):
            self._goodbye_sent = True
            if self.our_side is not Side.ERROR:
                self.our_side = Side.CLOSED
            return
        if self.our_side is Side.ERROR:
            raise Illegal("this direction ended with an error")
        self.our_side = self._judge(self.role, self.our_side, message)

    def _judge(self, speaker: Role, side: Side, message: m.Message) -> Side:
        if (side is Side.HELLO) != isinstance(message, m.Hello):
            raise Illegal("the hello comes first, and once")
        if isinstance(message, m.Hello):
            self._talk.hello(speaker, message)
        elif not isinstance(message, m.Heartbeat):
            self._talk.say(speaker, message)
        return Side.TALKING

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take what came from the peer; nothing means that it closed its direction.

        :raise LocalProtocolError: when more than ``RECEIVE_LIMIT`` bytes would wait, or data come after the end.
        """
        if not data:
            self._eof = True
        elif self._eof:
            raise LocalProtocolError("data were received after the connection's end")
        elif self._error is None:
            if len(self._buffer) + len(data) > RECEIVE_LIMIT:
                raise LocalProtocolError("more data were received than there is room for")
            self._buffer += data

    def next_event(self) -> Event:
        """The next message, once it is complete and checked. Data of extents are a view that stays valid.

        :return: a message, ``NEED_DATA``, or ``ConnectionClosed``, after which there is nothing else.
        :raise RemoteProtocolError: when the peer broke the protocol; from then on every time.
        """
        if self._error is not None:
            raise type(self._error)(self._error.what, safe=self._error.safe, hint=self._error.hint)
        try:
            return self._next_event()
        except RemoteProtocolError as error:
            self._error = error
            self.their_side = Side.ERROR
            self._buffer.clear()
            raise

    def _next_event(self) -> Event:
        if self.their_side is Side.BANNER:
            length = wire.parse_banner(self._buffer)
            if length is None:
                return self._incomplete()
            del self._buffer[:length]
            self.their_side = Side.HELLO
        if self.their_side is Side.CLOSED:
            if self._buffer:
                raise _remote("it went on after its goodbye")
            return self._incomplete()
        if self._header is None:
            if len(self._buffer) < wire.HEADER_SIZE:
                return self._incomplete()
            header = wire.decode_header(self._take(wire.HEADER_SIZE))
            if header.sequence != self._received:
                raise _remote(f"frame {header.sequence} came instead of frame {self._received}")
            self._header = header
        if len(self._buffer) < self._header.length:
            return self._incomplete()
        message = wire.decode(self._header, self._take(self._header.length))
        self._header = None
        self._received += 1
        if isinstance(message, m.Goodbye):
            self.their_side = Side.CLOSED
            return message
        try:
            self.their_side = self._judge(self._peer, self.their_side, message)
        except Illegal as error:
            raise _remote(f"it sent {type(message).__name__}: {error}") from None
        return message

    def _take(self, length: int) -> bytes:
        with memoryview(self._buffer) as view:
            taken = bytes(view[:length])
        # A bytearray gives up its front without moving the rest.
        del self._buffer[:length]
        return taken

    def _incomplete(self) -> NeedData | ConnectionClosed:
        if not self._eof:
            return NEED_DATA
        return ConnectionClosed(mid_frame=bool(self._buffer) or self._header is not None)

    def _local(self, what: str) -> LocalProtocolError:
        self.our_side = Side.ERROR
        return LocalProtocolError(what, safe="nothing of it was sent", hint="this is a defect of qemu-remus: report it")


def _remote(why: str) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"the peer broke the replication protocol: {why}",
        safe="the message was not used",
        hint="this is a defect of the peer's qemu-remus: report it with both sides' logs",
    )
