"""A QMP client on trio: one reader task, one writer task, replies routed by id, events by bounded subscriptions.

Owned here: the socket, deadlines, and what is known about a command's outcome.  What a command means is not.

- A command is never half sent by a cancellation: what is not sent at once, the writer task sends.
- Running a command that changes state is no cancellation point: it is waited for until its reply, the end of the
  connection or its time-out. Its outcome must be learned, since cancelling a wait does not cancel the command.
- A lost reply to such a command is :class:`CommandInDoubt`; to a query :class:`QemuUnreachable`.  A command that was
  certainly not sent is :class:`QemuUnreachable` too.
- A QEMU that has left one command without a reply for too long leaves the next ones without, as it takes them in order.
  Those that follow wait for it no longer than :data:`SILENCE_LIMIT` all together, and are not sent any more after that,
  until it has answered one; see :attr:`QmpClient.silence`.
- QEMU drops queued commands when their connection closes, so leaving :func:`open_qmp` with commands outstanding is
  only for those who no longer care.
"""

from __future__ import annotations

import errno
import socket
import struct
import uuid
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio
from qemu.qmp.error import ProtocolError

from qemu_remus.core.errors import CommandFailed, CommandInDoubt, NotQmp, QemuError, QemuUnreachable
from qemu_remus.qemu.commands import Command, qmp_capabilities
from qemu_remus.qemu.events import EventStream, QmpEvent
from qemu_remus.qemu.protocol import NEED_DATA, ErrorReply, Event, Greeting, QmpSession, Reply
from qemu_remus.qemu.socket_holders import holders_of
from qemu_remus.streams import receive, send_at_once

SILENCE_LIMIT: Final = 10.0
"""Seconds that all commands together wait for a QEMU that has not answered one before them in time."""

_RECEIVE_SIZE: Final = 256 * 1024
_WRITE_QUEUE: Final = 64
_PEERCRED: Final = struct.Struct("3i")
_NOT_CHANGED: Final = "QEMU was not changed"


@dataclass(frozen=True, slots=True)
class PeerCredentials:
    """Who listens on the socket, by ``SO_PEERCRED``: QEMU itself, unless it was handed an open socket (libvirt)."""

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Done:
    """The command succeeded.

    :param order: place of its reply in the sequence of all messages received on this connection.
    """

    value: Any
    order: int


@dataclass(frozen=True, slots=True)
class Failed:
    """QEMU refused the command: it changed nothing."""

    error: CommandFailed
    order: int


@dataclass(frozen=True, slots=True)
class InDoubt:
    """The command was sent and its outcome is unknown.

    :param why: what happened to the reply.
    """

    error: CommandInDoubt
    why: str


Outcome = Done | Failed | InDoubt


@dataclass(slots=True, eq=False)
class _Batch:
    """Commands that were handed over in one piece, and what became of them."""

    commands: Sequence[Command]
    answers: list[Reply | ErrorReply | None]
    left: int
    descriptor: int | None = None
    data: bytes = b""
    finished: trio.Event = field(default_factory=trio.Event)
    sending: bool = False
    withdrawn: bool = False

    def answer(self, index: int, reply: Reply | ErrorReply) -> None:
        self.answers[index] = reply
        self.left -= 1
        if self.left == 0:
            self.finished.set()


@dataclass(frozen=True, slots=True)
class _Silence:
    """QEMU owes a reply for too long: what, for a person, and until when it is waited for."""

    what: str
    until: float


class QmpClient:
    """A session with one QEMU; made by :func:`open_qmp`."""

    def __init__(self, stream: trio.abc.Stream, peer: PeerCredentials, name: str) -> None:
        self.version: tuple[int, int, int] = (0, 0, 0)
        """QEMU's version: major, minor, micro. For texts; decisions go by the schema."""
        self.package = ""
        """The distributor's version text, may be empty."""
        self.peer = peer
        self.closed = trio.Event()
        """Set when the connection is gone."""
        self._name = name
        self._stream = stream
        # Replies to a predecessor's commands may come to us; the prefix keeps them apart.
        # Short, because QEMU reads QMP byte by byte, at some microseconds each, and commands are sent in pauses.
        self._session = QmpSession(uuid.uuid4().hex[:6])
        self._waiting: dict[str, tuple[_Batch, int]] = {}
        self._batches: set[_Batch] = set()
        self._to_writer, self._from_callers = trio.open_memory_channel[_Batch](_WRITE_QUEUE)
        self._writing = False
        self._queued = 0
        self._subscriptions: set[EventStream] = set()
        self._greeted = trio.Event()  # or will never be: see _failure
        self._failure: QemuError | None = None
        self._silence: _Silence | None = None
        self._order = -1

    @property
    def order(self) -> int:
        """Place of the message received last; whatever comes from now on has a greater one."""
        return self._order

    @property
    def silence(self) -> str:
        """What QEMU has not answered in time, in words; empty while it answers, and as soon as it does again."""
        return self._silence.what if self._silence is not None else ""

    async def execute(self, command: Command, *, timeout: float = 10.0, insist: bool = False) -> Any:
        """Run one command and return the value of its reply.

        :param timeout: seconds, from the call to the reply.
        :param insist: send it to a QEMU that does not answer too, and wait as long as ever.
        :raise CommandFailed: when QEMU refuses it.
        :raise CommandInDoubt: when it changes state and the connection is lost, or no reply comes in time.
        :raise QemuUnreachable: when a query is not answered, or a command was certainly not sent.
        """
        (outcome,) = await self.execute_many([command], timeout=timeout, insist=insist)
        match outcome:
            case Done(value=value):
                return value
            case Failed(error=refused):
                raise refused
            case InDoubt(error=doubt, why=why):
                if command.changes_state:
                    raise doubt
                raise QemuUnreachable(f"{command.name} got no answer from QEMU: {why}", safe="a query changes nothing")

    async def execute_many(
        self, commands: Sequence[Command], *, timeout: float = 10.0, insist: bool = False
    ) -> list[Outcome]:
        """Run commands in order, all sent in one write; QEMU goes on with the next one whatever the one before gave.

        :param timeout: seconds, from the call to the last reply.
        :param insist: as :meth:`execute`.
        :return: one outcome for each command, in their order.
        :raise QemuUnreachable: when none of them was sent.
        """
        if not commands:
            return []
        return await self._run(_Batch(commands, [None] * len(commands), len(commands)), timeout, insist=insist)

    @property
    def passes_descriptors(self) -> bool:
        """Whether open files can be handed to QEMU over this connection."""
        return isinstance(self._stream, trio.SocketStream) and self._stream.socket.family == socket.AF_UNIX

    async def execute_with(self, command: Command, descriptor: int, *, timeout: float = 10.0) -> Any:
        """Run one command that takes an open file along (SCM_RIGHTS): ``add-fd``, ``getfd``.

        :param descriptor: stays the caller's, who keeps it open until this returns.
        :raise CommandFailed: when QEMU refuses it.
        :raise CommandInDoubt: as :meth:`execute`.
        :raise QemuUnreachable: when it was not sent.
        """
        batch = _Batch([command], [None], 1, descriptor)
        (outcome,) = await self._run(batch, timeout)
        if isinstance(outcome, Done):
            return outcome.value
        raise outcome.error

    async def _run(self, batch: _Batch, timeout: float, *, insist: bool = False) -> list[Outcome]:
        commands = batch.commands
        silence = self._silence
        if silence is not None and self._failure is None and not insist:
            timeout = min(timeout, silence.until - trio.current_time())
            if timeout <= 0.0:
                await trio.lowlevel.cancel_shielded_checkpoint()
                raise QemuUnreachable(f"{commands[0].name} was not sent to QEMU: {silence.what}", safe=_NOT_CHANGED)
        self._batches.add(batch)
        try:
            with trio.move_on_after(timeout) as scope:
                scope.shield = any(command.changes_state for command in commands)
                # Whatever is in _batches when the connection goes is told so; later ones must not begin to wait.
                if self._failure is None:
                    await self._hand_over(batch)
                    await batch.finished.wait()
        finally:
            # From here on the writer must not send it any more.
            batch.withdrawn = True
            self._batches.discard(batch)
        why = self._failure.what if self._failure else f"no reply within {timeout:.3g} s"
        if not batch.sending:
            raise QemuUnreachable(f"{commands[0].name} was not sent to QEMU: {why}", safe=_NOT_CHANGED)
        if scope.cancelled_caught and self._silence is None:
            what = f"QEMU at {self._name} does not answer: there was {why} to {commands[0].name}"
            self._silence = _Silence(what, trio.current_time() + SILENCE_LIMIT)
        return [_outcome(command, answer, why) for command, answer in zip(commands, batch.answers, strict=True)]

    async def _hand_over(self, batch: _Batch) -> None:
        """Send it at once where nothing is before it, which spares two turns of the scheduler; else queue it."""
        if self._resting and batch.descriptor is None:
            self._encode(batch)
            taken = send_at_once(self._stream, batch.data)
            batch.sending = taken > 0
            batch.data = batch.data[taken:]
            if not batch.data:
                return
        self._queued += 1
        try:
            if batch.sending:
                # The rest must go out, whatever becomes of the caller; and nothing is queued, so there is room.
                self._to_writer.send_nowait(batch)
            else:
                await self._to_writer.send(batch)
        except trio.BrokenResourceError:
            batch.finished.set()
        except trio.Cancelled:
            self._queued -= 1
            raise

    def _encode(self, batch: _Batch) -> None:
        pieces = []
        for index, command in enumerate(batch.commands):
            ident, data = self._session.send_command(command)
            self._waiting[ident] = (batch, index)
            pieces.append(data)
        batch.data = b"".join(pieces)

    @property
    def _resting(self) -> bool:
        """The writer has nothing to do, and nothing on its way to it."""
        return self._writing and self._queued == 0

    @contextmanager
    def subscribe(self, *names: str, capacity: int = 256) -> Iterator[EventStream]:
        """Collect events from now on.

        :param names: only these; none for all.
        :param capacity: how many may wait to be taken before new ones are dropped and ``overflowed`` is set.
        """
        stream = EventStream(frozenset(names), capacity)
        self._subscriptions.add(stream)
        if self.closed.is_set():
            stream.end()
        try:
            yield stream
        finally:
            self._subscriptions.discard(stream)
            stream.end()

    async def _negotiate(self, timeout: float) -> None:
        deadline = trio.current_time() + timeout
        with trio.move_on_at(deadline):
            await self._greeted.wait()
        if not self._greeted.is_set():
            raise await _no_greeting(self._name, timeout)
        if self._failure is None:
            try:
                await self.execute(qmp_capabilities(), timeout=max(deadline - trio.current_time(), 0.0))
            except CommandFailed as error:
                raise NotQmp(f"{self._name} greets like QMP and does not negotiate: {error}") from error
            except CommandInDoubt as error:
                if self._failure is None:
                    raise QemuUnreachable(f"{self._name} greets like QMP and does not answer: {error.what}") from error
        if self._failure is not None:
            raise self._failure

    # --- the two tasks

    async def _read(self) -> None:
        failure: QemuError
        try:
            failure = await self._receive_until_end()
        except ProtocolError as error:
            failure = NotQmp(
                f"what listens on {self._name} does not speak QMP: {error}",
                hint="name a QMP socket of QEMU, one made with -qmp unix:PATH,server=on,wait=off",
            )
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            failure = QemuUnreachable(f"the QMP connection to {self._name} broke: {error.__cause__ or error}")
        self._lose(failure)

    async def _receive_until_end(self) -> QemuError:
        session = self._session
        while True:
            data = await receive(self._stream, _RECEIVE_SIZE)
            if not data:
                return QemuUnreachable(f"QEMU closed the QMP connection at {self._name}")
            session.receive_data(data)
            while (received := session.next_event()) is not NEED_DATA:
                self._order = received.order
                match received:
                    case Reply() | ErrorReply():
                        self._silence = None
                        batch, index = self._waiting.pop(received.id)
                        batch.answer(index, received)
                    case Event():
                        event = QmpEvent(received.name, dict(received.data), received.timestamp, received.order)
                        for stream in self._subscriptions:
                            stream.offer(event)
                    case Greeting():
                        self.version, self.package = received.version, received.package
                        self._greeted.set()

    async def _write(self) -> None:
        self._writing = True
        try:
            with self._from_callers:
                async for batch in self._from_callers:
                    # What is sent in part must go out whole, whoever has lost interest.
                    if batch.sending or not (batch.withdrawn or self._failure is not None):
                        if not batch.data:
                            self._encode(batch)
                        batch.sending = True
                        await self._send(batch.data, batch.descriptor)
                    self._queued -= 1
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            # The reader sees the same end, after whatever QEMU still had to say.
            pass
        finally:
            self._writing = False

    async def _send(self, data: bytes, descriptor: int | None) -> None:
        if descriptor is not None:
            assert isinstance(self._stream, trio.SocketStream)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [descriptor]))]
            data = data[await self._stream.socket.sendmsg([data], rights) :]
        await self._stream.send_all(data)

    async def _until_closed(self) -> None:
        """Both tasks, until the connection is gone."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            await self._read()
            nursery.cancel_scope.cancel()

    def _lose(self, failure: QemuError) -> None:
        if self._failure is not None:
            return
        self._failure = failure
        self.closed.set()
        self._greeted.set()
        for batch in self._batches:
            batch.finished.set()
        self._waiting.clear()
        for stream in self._subscriptions:
            stream.end()


def _outcome(command: Command, answer: Reply | ErrorReply | None, why: str) -> Outcome:
    match answer:
        case Reply(value=value, order=order):
            return Done(value, order)
        case ErrorReply(qmp_class=qmp_class, desc=desc, order=order):
            return Failed(CommandFailed(command.name, qmp_class, desc), order)
        case None:
            return InDoubt(
                CommandInDoubt(command.name, why, safe="nothing is assumed about it", hint="query QEMU's state"), why
            )


# --- opening


@asynccontextmanager
async def open_qmp(path: str | Path, *, connect_timeout: float = 5.0) -> AsyncIterator[QmpClient]:
    """Connect to a QMP socket and negotiate; the connection ends with the context.

    :param connect_timeout: seconds for all of it.
    :raise QemuUnreachable: when there is no such socket, nobody listens, it may not be opened, or nobody greets us in
        time (a monitor serves one client at a time).
    :raise NotQmp: when something else than QMP comes.
    """
    with trio.move_on_after(connect_timeout) as deadline:
        stream = await _connect(Path(path))
    if deadline.cancelled_caught:
        raise await _no_greeting(str(path), connect_timeout)
    left = max(deadline.deadline - trio.current_time(), 0.0)
    async with open_qmp_over(stream, _credentials(stream), name=str(path), timeout=left) as client:
        yield client


@asynccontextmanager
async def open_qmp_over(
    stream: trio.abc.Stream, peer: PeerCredentials, *, name: str, timeout: float = 5.0
) -> AsyncIterator[QmpClient]:
    """As :func:`open_qmp`, over a stream that is connected already; it is closed at the end.

    :param name: what to call the other end in messages.
    """
    client = QmpClient(stream, peer, name)
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        # Cancelling the caller must not take the reader away from a command that is waiting, shielded, for its reply.
        tasks = trio.CancelScope(shield=True)

        async def run() -> None:
            with tasks:
                await client._until_closed()

        nursery.start_soon(run)
        try:
            await client._negotiate(timeout)
            yield client
        except BaseException as error:  # carried out of the nursery by hand, which would wrap it in a group
            failure = error
        finally:
            tasks.cancel()
            client._lose(QemuUnreachable(f"the QMP connection to {name} was closed"))
            # Where we are cancelled as well, what the body has to say must not be lost for that.
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)
    if failure is not None:
        raise failure


async def _connect(path: Path) -> trio.SocketStream:
    try:
        stream = await trio.open_unix_socket(str(path))
    except OSError as error:
        hints = {
            errno.ENOENT: "check the path, and that QEMU was started with -qmp unix:PATH,server=on,wait=off",
            errno.ECONNREFUSED: "the socket is a left-over: check that QEMU runs",
            errno.EACCES: "run this as a user that may write to the socket, usually QEMU's own or root",
        }
        raise QemuUnreachable(
            f"cannot connect to QMP socket {path}: {error.strerror or error}",
            hint=hints.get(error.errno or 0, "check the path"),
        ) from error
    try:
        stream.socket.getpeername()
    except OSError as error:
        # A full backlog of a Unix socket answers connect() with EAGAIN, which trio takes for "in progress".
        await trio.aclose_forcefully(stream)
        raise await _busy(f"QMP socket {path} does not accept connections", path) from error
    return stream


def _credentials(stream: trio.SocketStream) -> PeerCredentials:
    raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    return PeerCredentials(*_PEERCRED.unpack(raw))


async def _no_greeting(name: str, timeout: float) -> QemuUnreachable:
    return await _busy(f"nothing greeted us on {name} within {timeout:.1f} s", Path(name))


async def _busy(what: str, path: Path) -> QemuUnreachable:
    holders = await trio.to_thread.run_sync(holders_of, path, abandon_on_cancel=True)
    if holders:
        who = f"{' and '.join(map(str, holders))} is connected: let it end, or give"
    else:
        who = "somebody else is probably connected: give"
    return QemuUnreachable(
        what,
        safe="nothing was sent",
        hint=f"a QMP socket serves one client at a time, and {who} QEMU a socket for qemu-remus alone with another"
        " -qmp unix:PATH,server=on,wait=off",
    )
