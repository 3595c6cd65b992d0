"""The short ways through a socket, on real ones: nothing here is worth anything on a fake."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from qemu_remus.streams import put, receive, send_at_once

Pair = tuple[trio.SocketStream, trio.SocketStream]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    async with ours, theirs:
        yield ours, theirs


async def test_what_is_sent_at_once_arrives_and_the_end_is_empty(pair: Pair) -> None:
    ours, theirs = pair
    assert send_at_once(ours, b"a line") == 6
    assert await receive(theirs, 4) == b"a li"
    assert await receive(theirs, 4) == b"ne"
    await ours.send_eof()
    assert await receive(theirs, 4) == b""


async def test_a_full_socket_takes_a_part_then_nothing_and_the_rest_goes_the_usual_way(pair: Pair) -> None:
    ours, theirs = pair
    data = os.urandom(8 << 20)
    taken = send_at_once(ours, data)
    assert 0 < taken < len(data)
    assert send_at_once(ours, data[taken:]) == 0
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.send_all, data[taken:])
        while len(got) < len(data):
            got += await receive(theirs, 1 << 20)
    assert bytes(got) == data


async def test_whoever_waits_learns_of_what_comes_later(pair: Pair, autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = pair
    got: list[bytes | bytearray] = []

    async def wait() -> None:
        got.append(await receive(theirs, 100))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert got == []
        send_at_once(ours, b"late")
    assert got == [b"late"]


async def test_a_reset_connection_is_broken_and_takes_nothing() -> None:
    async with await _listening() as listener:
        port = listener.socket.getsockname()[1]
        ours = await trio.open_tcp_stream("127.0.0.1", port)
        theirs = await listener.accept()
        # closing with this set sends a reset
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await theirs.aclose()
        with pytest.raises(trio.BrokenResourceError):
            await receive(ours, 10)
        assert send_at_once(ours, b"more") == 0
        await ours.aclose()


async def _listening() -> trio.SocketListener:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    return listener


async def test_a_stream_that_is_closed_while_somebody_waits_tells_him_so_and_takes_nothing(pair: Pair) -> None:
    ours, theirs = pair
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await receive(theirs, 10)

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await theirs.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await receive(theirs, 10)
    assert send_at_once(theirs, b"x") == 0
    assert send_at_once(ours, b"to nobody") == 0


async def test_a_number_that_was_given_to_another_file_is_not_read(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    _, theirs = pair
    descriptor = theirs.socket.fileno()
    others = socket.socketpair()

    async def closed_meanwhile(_: int) -> None:
        theirs.socket.close()
        os.dup2(others[1].fileno(), descriptor)
        others[0].send(b"not for us")

    monkeypatch.setattr(trio.lowlevel, "wait_readable", closed_meanwhile)
    with pytest.raises(trio.ClosedResourceError):
        await receive(theirs, 10)
    assert os.read(descriptor, 100) == b"not for us"
    os.close(descriptor)
    for end in others:
        end.close()


async def test_a_stream_that_is_no_socket_goes_the_usual_way() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    assert send_at_once(ours, b"x") == 0
    await ours.send_all(b"memory")
    assert await receive(theirs, 10) == b"memory"


async def test_what_is_put_into_a_queue_waits_only_where_it_is_full() -> None:
    give, take = trio.open_memory_channel[str](1)
    others: list[str] = []

    async def other() -> None:
        others.append("ran")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await put(give, "a")
        assert others == []
        with trio.CancelScope() as scope:
            scope.cancel()
            await put(give, "b")
        assert scope.cancelled_caught
        nursery.start_soon(put, give, "c")
        await trio.testing.wait_all_tasks_blocked()
        assert [await take.receive(), await take.receive()] == ["a", "c"]
