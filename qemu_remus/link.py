"""A link to the other controller: :class:`~qemu_remus.core.connection.Connection` on a trio stream.

It owns the tasks of one connection: one reader, one writer, one heart; their queues, which are bounded; and their
deadlines.  What may not enter: what messages mean, reconnecting, and what bytes look like.

A link ends once, for one reason: the peer said goodbye (:class:`PeerRefused`), was silent (:class:`PeerSilent`), broke
the protocol (:class:`RemoteProtocolError`), or the connection ended (:class:`LinkLost`).  What was received before is
delivered first; then whoever receives learns the reason.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

import trio

from qemu_remus.core import messages as m
from qemu_remus.core.connection import NEED_DATA, Connection, ConnectionClosed, Side
from qemu_remus.core.errors import (
    LinkError,
    LinkLost,
    LocalProtocolError,
    PeerRefused,
    PeerSilent,
    PeerUnreachable,
    QemuRemusError,
    RefusalCode,
    RemoteProtocolError,
)
from qemu_remus.core.model import Role
from qemu_remus.core.settings import Address
from qemu_remus.core.wire import Buffer
from qemu_remus.streams import receive, send_at_once

__all__ = ["Link", "connect", "open_link"]

HEARTBEAT_TIMEOUT: Final = 3.0
"""Seconds for which a peer may be silent while we listen."""
SEND_TIMEOUT: Final = 30.0
"""Seconds in which the peer must take at least one piece of what we send: it may be busy with its disks."""
CLOSE_TIMEOUT: Final = 1.0
"""Seconds for last words, and for the body to notice that the link has ended."""

_SILENCE_PARTS: Final = 9
"""Waits of which the time that a peer may be silent consists."""

_OUTBOX_FRAMES: Final = 8
_INBOX_MESSAGES: Final = 8
_PIECE: Final = 256 << 10
_JOINED: Final = 64 << 10
"""Frames up to this size are copied together: cheaper than a packet and a system call for the header alone."""

_SAFE: Final = "the VM runs on, the secondary keeps the last committed checkpoint"


@dataclass(frozen=True, slots=True)
class _Frame:
    """What waits for the writer.

    :param counted: it has a place in the bounded queue to give back.
    :param beat: it is a heartbeat, of which one at most waits.
    """

    pieces: Sequence[Buffer]
    counted: bool = False
    beat: bool = False


class Link:
    """One connection to the peer; made by :func:`open_link`.

    Several tasks may send; messages travel in the order in which the calls got their place in the queue.
    """

    def __init__(
        self,
        stream: trio.abc.Stream,
        role: Role,
        *,
        heartbeat_source: Callable[[], m.Heartbeat],
        heartbeat_timeout: float,
        send_timeout: float,
        close_timeout: float,
    ) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._stream = stream
        self._connection = Connection(role)
        self._heartbeat_source = heartbeat_source
        self._heartbeat_timeout = heartbeat_timeout
        self._send_timeout = send_timeout
        self._close_timeout = close_timeout
        self._failure: LinkError | None = None
        self._body = trio.CancelScope()
        self._ended = trio.Event()
        self._noticed = trio.Event()
        self._reader_done = trio.Event()
        self._writer_done = trio.Event()
        self._winding_down = False
        self._beat_waits = False
        self._outbox: deque[_Frame] = deque([_Frame([self._connection.start()])])
        self._places = trio.Semaphore(_OUTBOX_FRAMES)
        self._work = trio.Event()
        self._resting = False
        self._queued = 1
        self._written = 0
        self._progress = trio.lowlevel.ParkingLot()
        self._inbox_in, self._inbox = trio.open_memory_channel[m.Message](_INBOX_MESSAGES)

    # --- for the owner -----------------------------------------------------------------------------------------------

    async def send(self, message: m.Message) -> None:
        """Queue a message, waiting for room; a goodbye always has room.

        Cancelled, it has not sent the message; returned, the message goes out whole, whatever becomes of the caller.
        The data of extents are not copied: they must not change until they are flushed.

        :raise LinkError: when the link has ended; the reason why.
        :raise LocalProtocolError: when the message must not be said now.
        """
        counted = not isinstance(message, m.Goodbye)
        if counted and self._failure is None:
            await self._place(message)
        else:
            await trio.lowlevel.checkpoint()
        if self._failure is not None:
            raise self._failure
        try:
            frame = self._connection.send(message)
        except LocalProtocolError:
            if counted:
                self._places.release()
            raise
        self._queue(_Frame(frame, counted=counted))

    async def _place(self, message: m.Message) -> None:
        """Get a place in the queue; without a turn of the scheduler for what comes once in an epoch."""
        if not isinstance(message, m.SyncExtents | m.EpochExtents):
            with contextlib.suppress(trio.WouldBlock):
                self._places.acquire_nowait()
                return
        await self._places.acquire()

    async def flush(self) -> None:
        """Wait until all that was sent so far is in the hands of the operating system.

        :raise LinkError: when the link ended before; the reason why.
        """
        await trio.lowlevel.checkpoint()
        mark = self._queued
        while self._written < mark:
            if self._failure is not None:
                raise self._failure
            await self._progress.park()

    async def receive(self) -> m.Message:
        """The next message of the peer, heartbeats and its goodbye included.

        Heartbeats for which there is no room while nobody receives are left out.

        :raise LinkError: when the link has ended and everything before was delivered; the reason why.
        """
        try:
            return await self._inbox.receive()
        except trio.EndOfChannel:
            self._noticed.set()
            assert self._failure is not None
            raise self._failure from self._failure.__cause__

    def __aiter__(self) -> Link:
        return self

    async def __anext__(self) -> m.Message:
        """As :meth:`receive`; the iteration ends after the peer's goodbye.

        :raise LinkError: when the link ended otherwise.
        """
        try:
            return await self.receive()
        except PeerRefused:
            raise StopAsyncIteration from None

    # --- tasks -------------------------------------------------------------------------------------------------------

    def _queue(self, frame: _Frame) -> None:
        self._queued += 1
        if not self._resting or self._outbox or sum(map(len, frame.pieces)) > _JOINED:
            self._outbox.append(frame)
            self._work.set()
            return
        whole = b"".join(frame.pieces)
        taken = send_at_once(self._stream, whole)
        self.bytes_sent += taken
        if taken < len(whole):
            self._outbox.append(replace(frame, pieces=[whole[taken:]]))
            self._work.set()
        else:
            self._is_written(frame)

    def _is_written(self, frame: _Frame) -> None:
        self._beat_waits &= not frame.beat
        self._written += 1
        self._progress.unpark_all()
        if frame.counted:
            self._places.release()

    async def _write(self) -> None:
        try:
            while True:
                while not self._outbox:
                    self._resting = True
                    self._work = trio.Event()
                    await self._work.wait()
                self._resting = False
                frame = self._outbox.popleft()
                for piece in _pieces(frame.pieces):
                    with trio.fail_after(self._send_timeout):
                        await self._stream.send_all(piece)
                    self.bytes_sent += len(piece)
                self._is_written(frame)
        except trio.TooSlowError:
            self._end(LinkLost(f"the peer took nothing for {self._send_timeout:g} seconds", safe=_SAFE, hint=_HINT))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._writer_done.set()
            # What the peer said before it closed explains more than that it did: let the reader come to it.
            with trio.move_on_after(self._close_timeout):
                await self._reader_done.wait()
            self._end(_lost("the connection broke", error))
        finally:
            self._resting = False
            self._writer_done.set()
            self._progress.unpark_all()

    async def _read(self) -> None:
        try:
            await self._read_on()
        finally:
            self._reader_done.set()

    async def _read_on(self) -> None:
        while not self._ended.is_set():
            try:
                event = self._connection.next_event()
            except RemoteProtocolError as error:
                self._last_words(m.Goodbye(RefusalCode.PROTOCOL, str(error)))
                self._end(error)
                break
            if isinstance(event, ConnectionClosed):
                within = ", within a frame" if event.mid_frame else ""
                self._end(_lost(f"the peer closed the connection{within}"))
                return
            if event is NEED_DATA:
                data = await self._receive_data()
                if data is None:
                    return
                self._connection.receive_data(data)
                continue
            await self._deliver(event)
            if isinstance(event, m.Goodbye):
                self._end(PeerRefused(f"the peer ended the link: {event.text}", event.code, safe=_SAFE))
        # The peer may still have to take our last words, which a connection closed with unread data would lose.
        await self._discard()

    async def _receive_data(self) -> bytes | bytearray | None:
        """What comes next; None when the link ended instead."""
        # The peer's silence counts only while we listen: a reader that waits for its owner hears nobody. And only while
        # we run: of a time for which we, or the whole machine, stood still, no more counts than one part.
        for _ in range(_SILENCE_PARTS):
            with trio.CancelScope(deadline=trio.current_time() + self._heartbeat_timeout / _SILENCE_PARTS):
                try:
                    data = await receive(self._stream, _PIECE)
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    self._end(_lost("the connection broke", error))
                    return None
                self.bytes_received += len(data)
                return data
        waited = f"{self._heartbeat_timeout:g} seconds"
        self._end(PeerSilent(f"nothing was heard from the peer for {waited}", safe=_SAFE, hint=_HINT))
        return None

    async def _deliver(self, message: m.Message) -> None:
        try:
            # Waiting for room, and for nothing where there is some.
            self._inbox_in.send_nowait(message)
        except trio.WouldBlock:
            # A heartbeat can be left out: the next one says more.
            if not isinstance(message, m.Heartbeat):
                await self._wait_for_room(message)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # The body has left, or the link has ended: nobody will ask for it.
            pass

    async def _wait_for_room(self, message: m.Message) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._inbox_in.send(message)

    async def _discard(self) -> None:
        """Read on until the peer closes."""
        try:
            while await self._stream.receive_some(_PIECE):
                pass
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def _beat(self) -> None:
        while True:
            await trio.sleep(self._heartbeat_timeout / 3)
            talking = self._connection.our_side is Side.TALKING and self._failure is None and not self._winding_down
            if talking and not self._beat_waits:
                self._beat_waits = True
                self._queue(_Frame(self._connection.send(self._heartbeat_source()), beat=True))

    # --- the end -----------------------------------------------------------------------------------------------------

    def _last_words(self, goodbye: m.Goodbye) -> None:
        if not self._connection.goodbye_sent:
            self._queue(_Frame(self._connection.send(goodbye)))

    def _end(self, reason: LinkError) -> None:
        if self._failure is not None:
            return
        self._failure = reason
        self._inbox_in.close()
        for _ in range(self._places.statistics().tasks_waiting):
            self._places.release()
        self._progress.unpark_all()
        self._ended.set()

    async def _watch_body(self) -> None:
        """A body that does not receive would not learn of the end."""
        await self._ended.wait()
        with trio.move_on_after(self._close_timeout) as patience:
            await self._noticed.wait()
        if patience.cancelled_caught:
            self._body.cancel()

    async def _wind_down(self, *, orderly: bool) -> None:
        """Let what is queued, and a goodbye above all, reach the peer, within the deadline.

        :param orderly: the body came to its end.
        """
        self._winding_down = True
        self._inbox.close()
        goodbye = self._connection.goodbye_sent
        if not (goodbye or (orderly and self._failure is None)):
            return
        with trio.CancelScope(shield=True, deadline=trio.current_time() + self._close_timeout):
            while self._written < self._queued and not self._writer_done.is_set():
                await self._progress.park()
            if goodbye and not self._writer_done.is_set() and isinstance(self._stream, trio.abc.HalfCloseableStream):
                try:
                    await self._stream.send_eof()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    return
                await self._reader_done.wait()


_HINT: Final = "check the network path and the peer"


def _lost(what: str, cause: Exception | None = None) -> LinkLost:
    error = LinkLost(what, safe=_SAFE, hint=_HINT)
    error.__cause__ = cause
    return error


def _pieces(buffers: Sequence[Buffer]) -> Iterator[bytes | memoryview]:
    """Cut what is to be sent into pieces, each of which has a deadline."""
    if len(buffers) > 1 and sum(map(len, buffers)) <= _JOINED:
        yield b"".join(buffers)
        return
    for buffer in buffers:
        view = memoryview(buffer)
        for start in range(0, len(view), _PIECE):
            yield view[start : start + _PIECE]


@asynccontextmanager
async def open_link(
    stream: trio.abc.Stream,
    role: Role,
    *,
    heartbeat_source: Callable[[], m.Heartbeat] = m.Heartbeat,
    heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
    send_timeout: float = SEND_TIMEOUT,
    close_timeout: float = CLOSE_TIMEOUT,
) -> AsyncIterator[Link]:
    """Speak the replication protocol on a connected stream, which is closed at the end.

    The banner goes out at once, heartbeats from our hello on.  A body that ends lets what it sent go out; one that is
    cancelled, or fails, only its goodbye.  When the link ends, :meth:`Link.receive` raises the reason; a body that does
    not receive for ``close_timeout`` after that is cancelled.

    :param role: which end this is; the primary's is the one that connected.
    :param heartbeat_source: what the next heartbeat says.
    :param heartbeat_timeout: seconds of the peer's silence after which the link ends; we send at a third of it.
    :param send_timeout: seconds in which the peer must take something of what we send.
    :param close_timeout: seconds for last words.
    :raise LinkError: the reason why the link ended, alone and not in a group, when it cancelled the body.
    """
    link = Link(
        stream,
        role,
        heartbeat_source=heartbeat_source,
        heartbeat_timeout=heartbeat_timeout,
        send_timeout=send_timeout,
        close_timeout=close_timeout,
    )
    try:
        async with trio.open_nursery() as nursery:
            # Shielded: what cancels the body must not cut off the frame under way, nor the goodbye.
            scopes = [trio.CancelScope(shield=True) for _ in range(4)]
            for scope, task in zip(scopes, (link._write, link._read, link._beat, link._watch_body), strict=True):
                nursery.start_soon(_within, scope, task)
            orderly = False
            try:
                with link._body:
                    yield link
                    orderly = True
                if link._body.cancelled_caught and link._failure is not None:
                    raise link._failure
            finally:
                await link._wind_down(orderly=orderly)
                for scope in scopes:
                    scope.cancel()
    except BaseExceptionGroup as group:
        plain = _plain(group, link._failure)
        raise plain from plain.__cause__
    finally:
        await trio.aclose_forcefully(stream)


async def _within(scope: trio.CancelScope, task: Callable[[], Awaitable[None]]) -> None:
    with scope:
        await task()


def _plain(group: BaseExceptionGroup[BaseException], reason: LinkError | None) -> BaseException:
    """The one exception that matters. The link's end is the cause of what it cancelled and of its own repetitions."""
    leaves = list(dict.fromkeys(_leaves(group)))
    others = [leaf for leaf in leaves if leaf is not reason and not isinstance(leaf, trio.Cancelled)]
    if not others:
        return reason if reason is not None and reason in leaves else leaves[0]
    if len(others) == 1:
        return others[0]
    if all(isinstance(leaf, QemuRemusError) for leaf in others):
        for leaf in others[1:]:
            others[0].add_note(f"At the same time: {leaf}")
        return others[0]
    # Among several is a defect: nothing of it may be hidden.
    return group


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _leaves(member)
    else:
        yield error


def _reason(error: OSError) -> str:
    """The error without the words that trio puts before it; name resolution's numbers are not the system's."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error)


async def connect(host: str, port: int, *, timeout: float = 5.0) -> trio.SocketStream:
    """Connect to the secondary; small messages are sent at once (TCP_NODELAY).

    :param host: a name or an address, IPv6 without brackets.
    :param timeout: seconds, name resolution included.
    :raise PeerUnreachable: when nobody answers there in time, or the name is not known.
    """
    address = Address(host, port)
    try:
        with trio.fail_after(timeout):
            return await trio.open_tcp_stream(host, port)
    except trio.TooSlowError:
        why = f"no answer within {timeout:g} seconds"
        cause: Exception | None = None
    except OSError as error:
        causes = [leaf for leaf in _leaves(error.__cause__ or error) if isinstance(leaf, OSError)]
        why = "; ".join(dict.fromkeys(map(_reason, causes))) or str(error)
        cause = error
    raise PeerUnreachable(
        f"cannot connect to {address}: {why}",
        safe=_SAFE,
        hint="check that the secondary's controller runs, its --listen address, and the firewalls on the way",
    ) from cause
