"""Writing over NBD against a fake server: what is on its way at once, when errors come, and what a flush waits for."""

from __future__ import annotations

import errno
import random
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from qemu_remus.core.errors import NbdConnectionLost, NbdProtocolError, NbdRequestFailed
from qemu_remus.nbd import blocking
from qemu_remus.nbd.blocking import WINDOW, BlockingNbd, connect_nbd
from tests.nbd_server import Behaviour, Connection, FakeDisk

MIB = 1 << 20
SIZE = 8 * MIB + 512
WRITABLE = 1 << 2 | 1 << 6
HANGS = 20.0


class Server:
    """The fake server in a thread, on one end of a socket pair. It answers when so many requests wait, or none come.

    :ivar most: requests that were ever waiting together.
    """

    def __init__(self, disk: FakeDisk) -> None:
        self.disk = disk
        self.ours, self._theirs = socket.socketpair()
        self.most = 0
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection = Connection(self.disk)
        # a client that has gone need not be told anything
        with self._theirs as stream, suppress(OSError):
            stream.sendall(connection.greeting())
            while not connection.closed:
                if select.select([stream], [], [], 0.02)[0]:
                    data = stream.recv(1 << 16)
                    if not data:
                        return
                    stream.sendall(connection.feed(data))
                    self.most = max(self.most, len(connection._waiting))
                else:
                    stream.sendall(connection.answer())

    def join(self) -> None:
        self.ours.close()
        self._thread.join(HANGS)
        assert not self._thread.is_alive()


@contextmanager
def serving(contents: bytes = bytes(SIZE), **behaviour: object) -> Iterator[Server]:
    zero = [(len(contents), 0 if any(contents) else 3)]
    disk = FakeDisk.from_bytes(contents, [(len(contents), 1)], zero)
    disk.behaviour = Behaviour(**({"more_flags": WRITABLE} | behaviour))  # type: ignore[arg-type]
    server = Server(disk)
    try:
        yield server
    finally:
        server.join()


def connected(server: Server, *, timeout: float = HANGS, window: int = WINDOW) -> BlockingNbd:
    return connect_nbd(server.ours, "the server", "disk", timeout=timeout, window=window)


def after(changes: list[tuple[int, int, int, bytes]]) -> bytes:
    """The disk's contents once these are done."""
    disk = bytearray(SIZE)
    for command, _, offset, data in changes:
        if command != 3:
            disk[offset : offset + len(data)] = data
    return bytes(disk)


@pytest.mark.parametrize("simple", [False, True])
def test_writes_and_zeroes_end_in_their_order_whatever_order_the_server_answers_in(simple: bool) -> None:
    chance = random.Random(7)
    model = bytearray(SIZE)
    with serving(shuffle=random.Random(3), simple=simple) as server:
        client = connected(server)
        for _ in range(60):
            length = chance.choice([1, 512, 4096, 65536, 3 * MIB])
            offset = chance.randrange(0, SIZE - length + 1)
            if chance.random() < 0.3:
                client.zero(offset, length, may_punch=False)
                model[offset : offset + length] = bytes(length)
            else:
                data = chance.randbytes(length)
                client.write(offset, data)
                model[offset : offset + length] = data
        client.flush()
        assert after(server.disk.changes) == model
        # and the flush came when all was answered
        assert server.disk.changes[-1][0] == 3
        client.close()
    assert 1 < server.most <= WINDOW


def test_one_at_a_time_is_one_at_a_time() -> None:
    with serving() as server:
        client = connected(server, window=1)
        for block in range(5):
            client.write(block * 4096, b"x" * 4096)
        client.flush()
    assert server.most == 1


def test_zeroes_keep_their_space_unless_it_may_be_given_back() -> None:
    with serving() as server:
        client = connected(server)
        client.zero(0, 4096, may_punch=False)
        client.zero(8192, 4096, may_punch=True)
        client.flush()
        assert [flags & 2 for command, flags, _, _ in server.disk.changes if command == 6] == [2, 0]


@pytest.mark.parametrize("simple", [False, True])
def test_an_error_of_a_write_comes_out_at_the_flush_at_the_latest(simple: bool) -> None:
    def fail(command: int, offset: int, length: int) -> int:
        return errno.ENOSPC if command == 1 and offset == 4096 else 0

    with serving(fail=fail, simple=simple) as server:
        client = connected(server)
        for block in range(3):
            client.write(block * 4096, b"x" * 4096)
        with pytest.raises(NbdRequestFailed, match="No space left") as caught:
            client.flush()
        assert caught.value.error == errno.ENOSPC
        # no flush was asked for
        assert 3 not in [command for command, _, _ in server.disk.requests]


def test_what_was_written_is_answered_before_anything_is_read() -> None:
    contents = random.Random(5).randbytes(SIZE)
    with serving(contents) as server:
        client = connected(server)
        client.write(0, b"x" * 512)
        assert client.read(100, 3 * MIB) == contents[100 : 100 + 3 * MIB]
        assert [command for command, _, _ in server.disk.requests[:2]] == [1, 0]
        assert client.extent(0, SIZE) == (SIZE, False)


def test_zeroes_are_known_as_such() -> None:
    with serving(holes=True) as server:
        client = connected(server)
        assert client.extent(512, SIZE - 512) == (SIZE - 512, True)
        assert client.read(0, SIZE) == bytes(SIZE)


def test_a_server_that_is_silent_is_lost() -> None:
    with serving(withhold=0) as server:
        client = connected(server)
        client.set_timeout(0.05)
        client.write(0, b"x")
        with pytest.raises(NbdConnectionLost, match="silent"):
            client.flush()


def test_a_server_that_hangs_up_is_lost() -> None:
    with serving(hang_up=1) as server:
        client = connected(server)
        client.write(0, b"x")
        client.write(1, b"y")
        with pytest.raises(NbdConnectionLost):
            client.flush()


@pytest.mark.parametrize(
    ("flags", "lacks"), [(1 << 1, "writing and flushing and writing zeroes"), (1 << 6, "flushing"), (1 << 2, "zeroes")]
)
def test_an_export_that_cannot_keep_a_copy_is_refused(flags: int, lacks: str) -> None:
    with serving(more_flags=flags) as server, pytest.raises(NbdProtocolError, match=lacks):
        connected(server)


def test_large_writes_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "ZERO_PIECE", MIB)
    with serving() as server:
        client = connected(server)
        client.write(0, bytes(3 * MIB))
        client.zero(3 * MIB, 2 * MIB + 512, may_punch=False)
        client.flush()
        assert max(length for _, _, length in server.disk.requests) == MIB
