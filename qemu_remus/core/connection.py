"""The replication protocol as a conversation, without I/O: ``receive_data``, ``next_event``, ``send``.

What may live here: the order of messages.  The table below says who may say what and when; beside it stand only those
rules about order that need a number (which epoch, which token, which sizes).  What may not: bytes (:mod:`wire`), time,
what to do about a message (the machines), and whether two sides should talk at all (:mod:`generation`).

Both sides keep the same record of the conversation and judge every message by it twice: the sender before it is sent
(:class:`LocalProtocolError`: a defect of ours), the receiver before it is delivered (:class:`RemoteProtocolError`).
After an error that direction is over; what can still be sent then is one ``Goodbye``.

Messages cross on the way, so the two records differ for a while.  An *overtaken* message is legal and is delivered, and
the machines drop what is about an epoch that they have given up:

- a refused epoch's extents and end may follow its ``EpochRefused``, until the next ``EpochBegin``;
- ``EpochStaged`` and ``EpochRefused`` may follow an ``AbortEpoch`` of their epoch, until it is answered;
- the next ``EpochBegin`` need not wait for the ``EpochAborted`` of the last.

Every ``AbortEpoch`` is answered by one ``EpochAborted``; every ``CommitEpoch`` and every ``EpochEnd`` that commits, by
one ``Committed`` or ``EpochRefused``; an ``EpochEnd`` whose epoch was refused before, by nothing.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from qemu_remus.core import messages as m
from qemu_remus.core import wire
from qemu_remus.core.errors import LocalProtocolError, RemoteProtocolError
from qemu_remus.core.model import Base, DiskName, EpochNumber, Role

RECEIVE_LIMIT: Final = wire.HEADER_SIZE + 2 * wire.PAYLOAD_LIMIT
"""Most bytes that may wait in a connection: the owner takes out events until there is none, then brings more."""


class State(Enum):
    """Where the conversation stands."""

    HANDSHAKE = auto()  # the hellos are not both here
    IDLE = auto()  # between epochs
    SYNC_ASKED = auto()  # a full sync has begun, its targets are not ready
    SYNCING = auto()  # between epochs, and a full sync is not committed yet
    OPEN = auto()  # an epoch's extents are coming
    ENDED = auto()  # the epoch is complete, its answer is due
    STAGED = auto()  # it is staged: the primary may commit or abort it
    IN_DOUBT = auto()  # its commit was sent: abort is over, only an answer resolves it


TABLE: Final[Mapping[State, Mapping[type, State]]] = {
    State.HANDSHAKE: {},
    State.IDLE: {
        m.SyncBegin: State.SYNC_ASKED,
        m.EpochBegin: State.OPEN,
    },
    State.SYNC_ASKED: {
        m.SyncReady: State.SYNCING,
    },
    State.SYNCING: {
        m.SyncExtents: State.SYNCING,
        m.SyncFlush: State.SYNCING,
        m.SyncFlushed: State.SYNCING,
        m.EpochBegin: State.OPEN,
    },
    State.OPEN: {
        m.EpochExtents: State.OPEN,
        m.EpochEnd: State.ENDED,  # or IN_DOUBT, where it commits
        m.AbortEpoch: State.IDLE,
        m.EpochRefused: State.IDLE,
    },
    State.ENDED: {
        m.EpochStaged: State.STAGED,
        m.AbortEpoch: State.IDLE,
        m.EpochRefused: State.IDLE,
    },
    State.STAGED: {
        m.CommitEpoch: State.IN_DOUBT,
        m.AbortEpoch: State.IDLE,
    },
    State.IN_DOUBT: {
        m.CommitEpoch: State.IN_DOUBT,
        m.Committed: State.IDLE,
        m.EpochRefused: State.IDLE,
    },
}
"""State, message that is about the present epoch or none -> next state. IDLE stands for SYNCING during a full sync."""

SPEAKER: Final[Mapping[type, Role]] = {
    **dict.fromkeys(
        (
            m.SyncBegin,
            m.SyncExtents,
            m.SyncFlush,
            m.EpochBegin,
            m.EpochExtents,
            m.EpochEnd,
            m.CommitEpoch,
            m.AbortEpoch,
        ),
        Role.PRIMARY,
    ),
    **dict.fromkeys(
        (m.SyncReady, m.SyncFlushed, m.EpochStaged, m.Committed, m.EpochAborted, m.EpochRefused),
        Role.SECONDARY,
    ),
}
"""Who says what; what is not here (hello, heartbeat, goodbye) both may say."""

AboutEpoch = (
    m.EpochExtents
    | m.EpochEnd
    | m.EpochStaged
    | m.CommitEpoch
    | m.Committed
    | m.AbortEpoch
    | m.EpochAborted
    | m.EpochRefused
)


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


class _Illegal(Exception):
    """This message does not fit here."""


class _Conversation:
    """The record of what was said, by which the next message is judged."""

    def __init__(self) -> None:
        self.state = State.HANDSHAKE
        self._hellos: dict[Role, m.Hello] = {}
        self._disks: tuple[DiskName, ...] = ()
        self._sizes: tuple[int, ...] = ()
        self._syncing = False
        self._unflushed = False
        self._flushes: deque[int] = deque()
        self._epoch: EpochNumber | None = None
        self._highest = 0
        self._extents = 0
        self._payload = 0
        self._refused: EpochNumber | None = None
        self._held: Base = None
        self._committed: Base = None
        self._aborting: set[EpochNumber] = set()
        self._repeated: Counter[EpochNumber] = Counter()

    def hello(self, speaker: Role, hello: m.Hello) -> None:
        self._hellos[speaker] = hello
        if len(self._hellos) == 2:
            primary, secondary = self._hellos[Role.PRIMARY], self._hellos[Role.SECONDARY]
            self._disks = tuple(disk.name for disk in primary.disks)
            self._sizes = tuple(disk.size for disk in primary.disks)
            self._held = secondary.staged
            self._committed = secondary.committed
            self.state = State.IDLE

    def say(self, speaker: Role, message: m.Message) -> None:
        """Judge a message, and enter it.

        :raise _Illegal: when it does not fit.
        """
        kind = type(message)
        if SPEAKER[kind] is not speaker:
            raise _Illegal(f"a {speaker} does not say it")
        if isinstance(message, AboutEpoch) and message.epoch != self._epoch:
            self._about_another(message)
            return
        after = TABLE[self.state].get(kind)
        if after is None:
            raise _Illegal(f"not now ({self.state.name})")
        if isinstance(message, AboutEpoch):
            after = self._about_epoch(message, after)
        else:
            self._about_disks(message)
        self.state = State.SYNCING if after is State.IDLE and self._syncing else after

    def _about_disks(self, message: object) -> None:
        match message:
            case m.SyncBegin(disks=disks):
                if tuple(disk.name for disk in disks) != self._disks:
                    raise _Illegal("its disks are not those of the primary's hello")
                self._sizes = tuple(disk.size for disk in disks)
                self._syncing = self._unflushed = True
                self._flushes.clear()
                self._held = self._committed = self._refused = None
            case m.SyncReady(fresh=fresh):
                if len(fresh) != len(self._disks):
                    raise _Illegal(f"it answers for {len(fresh)} disks instead of {len(self._disks)}")
            case m.SyncExtents():
                self._check_extents(message)
                self._unflushed = True
            case m.SyncFlush(token=token):
                self._flushes.append(token)
                self._unflushed = False
            case m.SyncFlushed(token=token):
                if not self._flushes or self._flushes.popleft() != token:
                    raise _Illegal(f"flush {token} is not the next to be answered")
            case m.EpochBegin(epoch=epoch, base=base):
                self._begin(epoch, base)

    def _begin(self, epoch: EpochNumber, base: Base) -> None:
        if epoch <= self._highest or epoch == self._held:
            raise _Illegal(f"epoch {epoch} was there before")
        if (base is None) != self._syncing or (base is not None and base >= epoch):
            raise _Illegal(
                f"epoch {epoch} cannot build on base {base} {'during' if self._syncing else 'without'} a sync"
            )
        if self._syncing and (self._unflushed or self._flushes):
            raise _Illegal("the full sync before it is not flushed")
        self._epoch = epoch
        self._highest = epoch
        self._extents = self._payload = 0
        self._refused = None

    def _about_epoch(self, message: AboutEpoch, after: State) -> State:
        match message:
            case m.EpochExtents():
                self._check_extents(message)
                self._extents += len(message.extents)
                self._payload += memoryview(message.data).nbytes
            case m.EpochEnd(extents=extents, payload=payload, commit=commit):
                if (extents, payload) != (self._extents, self._payload):
                    counted = f"{self._extents} and {self._payload}"
                    raise _Illegal(f"it says {extents} extents and {payload} bytes, these were {counted}")
                return State.IN_DOUBT if commit else after
            case m.CommitEpoch(epoch=epoch):
                if self.state is State.IN_DOUBT:
                    self._repeated[epoch] += 1
            case m.AbortEpoch(epoch=epoch):
                self._aborting.add(epoch)
                self._epoch = None
            case m.EpochRefused(epoch=epoch):
                self._refused = epoch
                self._epoch = None
            case m.Committed(epoch=epoch):
                self._committed = epoch
                self._held = self._epoch = None
                self._syncing = False
        return after

    def _about_another(self, message: AboutEpoch) -> None:
        """A message about an epoch that is not the present one: overtaken, repeated, or of an earlier link."""
        epoch = message.epoch
        between = self.state in (State.IDLE, State.SYNCING)
        match message:
            case m.EpochExtents() | m.EpochEnd() if epoch == self._refused:
                return
            case m.CommitEpoch() if epoch == self._held and between:
                self._held = None
                self._epoch = epoch
                self.state = State.IN_DOUBT
                return
            case m.CommitEpoch() if epoch == self._refused or epoch <= (self._committed or 0):
                self._repeated[epoch] += 1
                return
            case m.AbortEpoch() if between and epoch in (self._held, self._refused):
                self._held = None if epoch == self._held else self._held
                self._refused = None if epoch == self._refused else self._refused
                self._aborting.add(epoch)
                return
            case m.EpochAborted() if epoch in self._aborting:
                self._aborting.remove(epoch)
                return
            case m.EpochStaged() | m.EpochRefused() if epoch in self._aborting:
                return
            case m.Committed() | m.EpochRefused() if self._repeated[epoch]:
                self._repeated -= Counter({epoch: 1})
                return
        present = "there is none" if self._epoch is None else f"the present one is {self._epoch}"
        raise _Illegal(f"it is about epoch {epoch}, and {present} ({self.state.name})")

    def _check_extents(self, message: m.SyncExtents | m.EpochExtents) -> None:
        sizes = self._sizes
        for extent in message.extents:
            if extent.disk >= len(sizes) or extent.offset + extent.length > sizes[extent.disk]:
                raise _Illegal(f"{extent} is not within the disks")


class Connection:
    """One side's end of a link.

    :param role: which end this is: the primary's is the one that connects.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.our_side = Side.BANNER
        self.their_side = Side.BANNER
        self._peer = Role.SECONDARY if role is Role.PRIMARY else Role.PRIMARY
        self._talk = _Conversation()
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
        except _Illegal as error:
            raise self._local(f"{name} cannot be sent: {error}") from None
        except LocalProtocolError:
            self.our_side = Side.ERROR
            raise
        self._sent += 1
        return frame

    def _judge_ours(self, message: m.Message) -> None:
        if self.our_side is Side.BANNER or self._goodbye_sent:
            raise _Illegal("the conversation is over" if self._goodbye_sent else "the banner comes first")
        if isinstance(message, m.Goodbye):
            self._goodbye_sent = True
            if self.our_side is not Side.ERROR:
                self.our_side = Side.CLOSED
            return
        if self.our_side is Side.ERROR:
            raise _Illegal("this direction ended with an error")
        self.our_side = self._judge(self.role, self.our_side, message)

    def _judge(self, speaker: Role, side: Side, message: m.Message) -> Side:
        if (side is Side.HELLO) != isinstance(message, m.Hello):
            raise _Illegal("the hello comes first, and once")
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
        except _Illegal as error:
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
