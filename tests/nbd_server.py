"""A fake NBD server for the client's tests: sans-IO, plus a small trio shell on a Unix socket.

It serves a disk from memory with a dirty map and an allocation map, answers as a script of :class:`Behaviour` says, and
keeps account of what the client is owed, in its own way: it knows nothing of the client's code.
"""

from __future__ import annotations

import random
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio
import trio.testing

OVERHEAD = 1024  # what each message adds in a socket's buffer


@dataclass
class Behaviour:
    """How the server answers.

    :ivar shuffle: answers what is waiting in random order.
    :ivar chunked: ends replies with a chunk of their own, without contents.
    :ivar status_limit: most descriptors in a status reply.
    :ivar overshoot: the last descriptor goes on to its natural end, behind what was asked.
    :ivar split_equal: descriptors are cut, so that neighbours have equal flags.
    :ivar fail: (command, offset, length) -> errno or 0.
    :ivar holes: answers reads of zeroes by hole chunks.
    :ivar withhold: answers nothing from the so-manieth request on.
    :ivar hang_up: closes the connection instead of answering the so-manieth request.
    :ivar ignore_goodbye: keeps the connection when the client says that it goes.
    :ivar structured, contexts, df: what it offers.
    :ivar more_flags: transmission flags besides.
    :ivar simple: answers writes and flushes by simple replies.
    """

    shuffle: random.Random | None = None
    chunked: bool = False
    status_limit: int = 1 << 17
    overshoot: bool = False
    split_equal: int = 0
    fail: Callable[[int, int, int], int] = lambda command, offset, length: 0
    holes: bool = False
    withhold: int | None = None
    hang_up: int | None = None
    ignore_goodbye: bool = False
    structured: bool = True
    df: bool = True
    more_flags: int = 0
    simple: bool = False


@dataclass
class FakeDisk:
    """A disk in memory.

    :ivar contents: (offset, length) -> bytes.
    :ivar dirty, allocation: natural extents, (length, flags), covering the disk.
    :ivar changes: writes (1), flushes (3) and writes of zeroes (6) that were done: command, flags, offset, data.
    """

    size: int
    contents: Callable[[int, int], bytes]
    dirty: list[tuple[int, int]]
    allocation: list[tuple[int, int]]
    bitmap: str = "b0"
    behaviour: Behaviour = field(default_factory=Behaviour)
    requests: list[tuple[int, int, int]] = field(default_factory=list)
    changes: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    largest_owed: int = 0
    mixed: bool = False
    connections: int = 0
    goodbyes: int = 0
    _reading: int = 0
    _asking: int = 0

    @classmethod
    def from_bytes(cls, data: bytes, dirty: list[tuple[int, int]], allocation: list[tuple[int, int]]) -> FakeDisk:
        return cls(len(data), lambda offset, length: data[offset : offset + length], dirty, allocation)

    def natural(self, context: str) -> list[tuple[int, int]]:
        return self.allocation if context == "base:allocation" else self.dirty


class Connection:
    """One client's session: bytes in, bytes out."""

    def __init__(self, disk: FakeDisk) -> None:
        self.disk = disk
        self.closed = False
        self._in = bytearray()
        self._contexts: list[str] = []
        self._state = self._flags
        self._waiting: list[tuple[int, int, int, int, int]] = []
        self._payload = (0, 0, 0, 0)
        self._written: dict[int, bytes] = {}

    def greeting(self) -> bytes:
        return b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)

    def feed(self, data: bytes) -> bytes:
        """Take in bytes; returns handshake replies. Requests queue up until :meth:`answer`."""
        self._in += data
        out = b""
        while True:
            before = len(self._in)
            out += self._state()
            if len(self._in) == before:
                break
        self.disk.largest_owed = max(self.disk.largest_owed, sum(self._worst(request) for request in self._waiting))
        return out

    def answer(self) -> bytes:
        """Answer everything that waits."""
        behaviour = self.disk.behaviour
        if behaviour.shuffle is not None:
            behaviour.shuffle.shuffle(self._waiting)
        out = bytearray()
        while self._waiting:
            number = len(self.disk.requests) - len(self._waiting)
            if behaviour.hang_up is not None and number >= behaviour.hang_up:
                self.closed = True
                break
            if behaviour.withhold is not None and number >= behaviour.withhold:
                break
            out += self._reply(*self._waiting.pop(0))
        return bytes(out)

    def _take(self, count: int) -> bytes:
        data = bytes(self._in[:count])
        del self._in[:count]
        return data

    def _flags(self) -> bytes:
        if len(self._in) >= 4:
            assert self._take(4) == struct.pack(">I", 3)
            self._state = self._option
        return b""

    def _option(self) -> bytes:
        if len(self._in) < 16:
            return b""
        magic, option, length = struct.unpack_from(">8sII", self._in)
        assert magic == b"IHAVEOPT"
        if len(self._in) < 16 + length:
            return b""
        body = self._take(16 + length)[16:]
        if option == 8:
            return self._option_reply(option, 1 if self.disk.behaviour.structured else (1 << 31) + 1)
        if option == 10:
            (name,) = struct.unpack_from(">I", body)
            at = 4 + name
            (count,) = struct.unpack_from(">I", body, at)
            at += 4
            out = b""
            for _ in range(count):
                (length,) = struct.unpack_from(">I", body, at)
                context = body[at + 4 : at + 4 + length].decode()
                at += 4 + length
                if context in ("base:allocation", f"qemu:dirty-bitmap:{self.disk.bitmap}"):
                    number = struct.pack(">I", 7 + len(self._contexts))
                    out += self._option_reply(option, 4, number + context.encode())
                    self._contexts.append(context)
            return out + self._option_reply(option, 1)
        assert option == 7
        self._state = self._request
        flags = 1 | (1 << 7 if self.disk.behaviour.df else 0) | (self.disk.behaviour.more_flags or 2)
        return (
            self._option_reply(option, 3, struct.pack(">HQH", 0, self.disk.size, flags))
            + self._option_reply(option, 3, struct.pack(">H", 9) + b"of no interest")
            + self._option_reply(option, 3, struct.pack(">HIII", 3, 1, 4096, 32 << 20))
            + self._option_reply(option, 1)
        )

    def _option_reply(self, option: int, kind: int, body: bytes = b"") -> bytes:
        return struct.pack(">QIII", 0x0003E889045565A9, option, kind, len(body)) + body

    def _request(self) -> bytes:
        if len(self._in) < 28:
            return b""
        magic, flags, command, cookie, offset, length = struct.unpack(">IHHQQI", self._take(28))
        assert magic == 0x25609513
        if command == 2:
            self.disk.goodbyes += 1
            self.closed = not self.disk.behaviour.ignore_goodbye
            return b""
        assert offset + length <= self.disk.size
        assert length > 0 or command == 3
        assert command != 0 or flags & 4
        if command == 1:
            self._payload = (flags, cookie, offset, length)
            self._state = self._data
            return b""
        self._waiting.append((command, flags, cookie, offset, length))
        self.disk.requests.append((command, offset, length))
        if command == 0:
            self.disk._reading += 1
        elif command == 7:
            self.disk._asking += 1
        self.disk.mixed |= bool(self.disk._reading and self.disk._asking)
        return b""

    def _data(self) -> bytes:
        flags, cookie, offset, length = self._payload
        if len(self._in) < length:
            return b""
        assert not any(
            kind in (1, 6) and start < offset + length and offset < start + count
            for kind, _, _, start, count in self._waiting
        ), "writes that overlap are on their way at once"
        self._written[cookie] = self._take(length)
        self._waiting.append((1, flags, cookie, offset, length))
        self.disk.requests.append((1, offset, length))
        self._state = self._request
        return b""

    def _worst(self, request: tuple[int, int, int, int, int]) -> int:
        command, flags, _, offset, length = request
        if command in (1, 3, 6):
            return OVERHEAD + 20
        if command == 0:
            return OVERHEAD + 28 + length
        return sum(OVERHEAD + 24 + 8 * len(self._status(context, flags, offset, length)) for context in self._contexts)

    def _chunk(self, cookie: int, kind: int, body: bytes, *, done: bool) -> bytes:
        return struct.pack(">IHHQI", 0x668E33EF, done, kind, cookie, len(body)) + body

    def _reply(self, command: int, flags: int, cookie: int, offset: int, length: int) -> bytes:
        behaviour = self.disk.behaviour
        if command == 0:
            self.disk._reading -= 1
        elif command == 7:
            self.disk._asking -= 1
        if command in (1, 3, 6):
            return self._order(command, flags, cookie, offset, length)
        if error := behaviour.fail(command, offset, length):
            return self._chunk(cookie, 1 << 15 | 1, struct.pack(">IH", error, 4) + b"text", done=True)
        if command == 0:
            data = self.disk.contents(offset, length)
            assert len(data) == length
            kind, body = 1, struct.pack(">Q", offset) + data
            if behaviour.holes and not any(data):
                kind, body = 2, struct.pack(">QI", offset, length)
            chunks = [(kind, body)]
        else:
            chunks = [
                (5, struct.pack(">I", 7 + number) + b"".join(struct.pack(">II", *extent) for extent in extents))
                for number, context in enumerate(self._contexts)
                if (extents := self._status(context, flags, offset, length))
            ]
        if behaviour.chunked:
            chunks.append((0, b""))
        last = len(chunks) - 1
        return b"".join(self._chunk(cookie, *chunk, done=index == last) for index, chunk in enumerate(chunks))

    def _order(self, command: int, flags: int, cookie: int, offset: int, length: int) -> bytes:
        behaviour = self.disk.behaviour
        error = behaviour.fail(command, offset, length)
        data = self._written.pop(cookie, bytes(length))
        if not error:
            self.disk.changes.append((command, flags, offset, data))
        if behaviour.simple:
            return struct.pack(">IIQ", 0x67446698, error, cookie)
        if error:
            return self._chunk(cookie, 1 << 15 | 1, struct.pack(">IH", error, 4) + b"text", done=True)
        return self._chunk(cookie, 0, b"", done=True)

    def _status(self, context: str, flags: int, offset: int, length: int) -> list[tuple[int, int]]:
        behaviour = self.disk.behaviour
        extents: list[tuple[int, int]] = []
        start, end = 0, offset + length
        for natural, state in self.disk.natural(context):
            first, last = max(start, offset), start + natural
            start = last
            if last <= offset:
                continue
            if first >= end:
                break
            if not behaviour.overshoot or flags & 8:
                last = min(last, end)
            while first < last:
                piece = min(last - first, 0xFFFFFFFF, behaviour.split_equal or last)
                extents.append((piece, state))
                first += piece
        return extents[: 1 if flags & 8 else behaviour.status_limit]


@asynccontextmanager
async def serve(disk: FakeDisk, path: Path) -> AsyncIterator[None]:
    """Serve the disk on a Unix socket, to any number of clients."""

    async def client(stream: trio.SocketStream) -> None:
        disk.connections += 1
        connection = Connection(disk)
        try:
            await stream.send_all(connection.greeting())
            while not connection.closed and (data := await stream.receive_some(65536)):
                await stream.send_all(connection.feed(data))
                # Lets requests gather that are sent one by one, and other connections have their turn.
                await trio.testing.wait_all_tasks_blocked()
                await stream.send_all(connection.answer())
        except trio.BrokenResourceError:
            pass
        finally:
            await stream.aclose()

    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen(16)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, client, [trio.SocketListener(listener)])
            yield
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise
