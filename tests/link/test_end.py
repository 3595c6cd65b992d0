"""A link's end, on trio's in-memory streams with the mock clock: what still gets out, and as which one error."""

# ruff: noqa: PT012 -- an error ends a link's body wherever that is: the body is the statement

from __future__ import annotations

import pytest
import trio
import trio.testing

from qemu_remus.core import messages as m
from qemu_remus.core import wire
from qemu_remus.core.connection import ConnectionClosed
from qemu_remus.core.errors import (
    LinkLost,
    PeerRefused,
    RefusalCode,
    RemoteProtocolError,
    StorageError,
    VersionMismatch,
)
from qemu_remus.link import open_link
from tests.link.peers import BEGIN, BLOCK, GOODBYE, Clock, P, Peer, S, meet, two_links
from tests.message_strategies import hello

# --- the end ---------------------------------------------------------------------------------------------------------


async def test_what_came_before_the_end_is_delivered_before_the_error(autojump_clock: Clock) -> None:
    left, right = trio.testing.memory_stream_pair()
    peer = Peer(right, S)
    await peer.start()
    await right.send_eof()
    async with open_link(left, P) as link:
        await trio.testing.wait_all_tasks_blocked()
        assert await link.receive() == hello(S)
        for _ in range(2):
            with pytest.raises(LinkLost, match=r"closed the connection\."):
                await link.receive()
        with pytest.raises(LinkLost):
            await link.send(hello(P))


async def test_a_connection_cut_within_a_frame_is_a_lost_link(autojump_clock: Clock) -> None:
    left, right = trio.testing.memory_stream_pair()
    await right.send_all(wire.BANNER + b"QRM")
    await right.send_eof()
    with pytest.raises(LinkLost, match="within a frame"):
        async with open_link(left, P) as link:
            await link.receive()


async def test_a_body_that_does_not_receive_is_cancelled_soon_after_the_end(autojump_clock: Clock) -> None:
    left, right = trio.testing.memory_stream_pair()
    await right.aclose()
    with pytest.raises(LinkLost):
        async with open_link(left, P):
            await trio.sleep_forever()
    assert trio.current_time() == pytest.approx(1.0)


async def test_a_sender_that_waits_for_room_learns_of_the_end(autojump_clock: Clock) -> None:
    left, right = trio.testing.lockstep_stream_pair()
    peer = Peer(right, S)

    async def end_it() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await right.aclose()

    with pytest.raises(LinkLost):
        async with open_link(left, P) as link, trio.open_nursery() as nursery:
            await meet(link, peer)
            await link.send(BEGIN)
            nursery.start_soon(end_it)
            while True:
                await link.send(BLOCK)
    assert trio.current_time() == pytest.approx(0.0)


async def test_the_peers_goodbye_is_heard_and_ends_the_iteration(autojump_clock: Clock) -> None:
    async with two_links() as (primary, secondary):
        await secondary.send(m.Goodbye(RefusalCode.FENCED, "a newer connection"))
        heard = [message async for message in primary]
        assert heard == [m.Goodbye(RefusalCode.FENCED, "a newer connection")]
        with pytest.raises(PeerRefused, match="a newer connection") as caught:
            await primary.receive()
        assert caught.value.code is RefusalCode.FENCED


async def test_a_goodbye_explains_more_than_a_connection_that_breaks_while_we_write(autojump_clock: Clock) -> None:
    left, right = trio.testing.memory_stream_pair()
    peer = Peer(right, S)
    await peer.start()
    await peer.say(GOODBYE)
    await right.aclose()
    with pytest.raises(PeerRefused):
        async with open_link(left, P) as link:
            await link.receive()
            await link.receive()
            await link.receive()


async def test_a_body_that_ignores_a_goodbye_is_ended_by_it(autojump_clock: Clock) -> None:
    left, right = trio.testing.memory_stream_pair()
    peer = Peer(right, S)
    await peer.start()
    await peer.say(m.Goodbye(RefusalCode.FAILED_OVER, "taken over"))
    with pytest.raises(PeerRefused, match="taken over"):
        async with open_link(left, P):
            await trio.sleep_forever()


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", RemoteProtocolError),
        (b"QEMU-REMUS/2 replication\r\n", VersionMismatch),
        (wire.BANNER + bytes(100), RemoteProtocolError),
    ],
)
async def test_a_peer_that_breaks_the_protocol_is_told_why_before_the_link_closes(
    raw: bytes, error: type[Exception], autojump_clock: Clock
) -> None:
    left, right = trio.testing.memory_stream_pair()
    await right.send_all(raw)
    with pytest.raises(error) as caught:
        async with open_link(left, S) as link:
            await link.receive()
    assert type(caught.value) is error
    goodbye = await Peer(right, P).hear()
    assert isinstance(goodbye, m.Goodbye)
    assert goodbye.code is RefusalCode.PROTOCOL
    assert goodbye.text == str(caught.value)


async def test_leaving_the_body_lets_out_what_was_sent(autojump_clock: Clock) -> None:
    left, right = trio.testing.lockstep_stream_pair()
    peer = Peer(right, S)
    heard = []

    async def listen() -> None:
        while not isinstance(event := await peer.hear(), ConnectionClosed):
            heard.append(event)

    async with trio.open_nursery() as nursery, open_link(left, P) as link:
        nursery.start_soon(peer.start)
        await link.send(hello(P))
        await link.receive()
        await link.send(BEGIN)
        await link.send(BLOCK)
        nursery.start_soon(listen)
    assert heard == [hello(P), BEGIN, BLOCK]


async def test_a_goodbye_gets_out_although_the_body_was_cancelled_and_the_peer_slow(autojump_clock: Clock) -> None:
    left, right = trio.testing.lockstep_stream_pair()
    peer = Peer(right, S)
    heard: list[object] = []

    async def listen_late() -> None:
        await trio.sleep(0.5)
        while not isinstance(event := await peer.hear(), ConnectionClosed):
            heard.append(event)
        await right.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen_late)
        with trio.CancelScope() as scope:
            async with open_link(left, P) as link:
                await link.send(hello(P))
                await link.send(GOODBYE)
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
    assert heard == [hello(P), GOODBYE]
    assert trio.current_time() == pytest.approx(0.5)


async def test_after_a_goodbye_the_connection_stays_until_the_peer_has_closed_it(autojump_clock: Clock) -> None:
    """Closed with something unread, TCP would throw away what the peer has not taken yet."""
    left, right = trio.testing.memory_stream_pair()
    peer = Peer(right, S)

    async def go_on_for_a_while() -> None:
        await peer.start()
        assert await peer.hear() == GOODBYE
        assert await peer.hear() == ConnectionClosed(mid_frame=False)
        await trio.sleep(0.5)
        await peer.say(m.Heartbeat())
        await right.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(go_on_for_a_while)
        async with open_link(left, P) as link:
            await link.send(GOODBYE)
        assert trio.current_time() == pytest.approx(0.5)


async def test_a_peer_that_never_takes_the_goodbye_does_not_hold_us_up(autojump_clock: Clock) -> None:
    left, _right = trio.testing.lockstep_stream_pair()
    async with open_link(left, P) as link:
        await link.send(GOODBYE)
    assert trio.current_time() == pytest.approx(1.0)


# --- one plain error -------------------------------------------------------------------------------------------------


async def test_the_links_end_in_the_bodys_own_nurseries_comes_out_as_one_plain_error(autojump_clock: Clock) -> None:
    left, right = trio.testing.memory_stream_pair()
    await right.aclose()
    with pytest.raises(LinkLost):
        async with open_link(left, P) as link, trio.open_nursery() as outer, trio.open_nursery() as inner:
            outer.start_soon(link.receive)
            inner.start_soon(link.receive)
            inner.start_soon(trio.sleep_forever)


async def test_the_bodys_own_error_comes_out_plain_and_with_its_cause(autojump_clock: Clock) -> None:
    left, _right = trio.testing.memory_stream_pair()
    cause = OSError("no space")
    with pytest.raises(StorageError) as caught:
        async with open_link(left, P):
            raise StorageError("the journal is full") from cause
    assert caught.value.__cause__ is cause


async def test_the_bodys_own_error_wins_over_the_links_end(autojump_clock: Clock) -> None:
    left, right = trio.testing.memory_stream_pair()
    await right.aclose()

    async def fail_on_cancel() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise StorageError("the journal is full")

    with pytest.raises(StorageError):
        async with open_link(left, P) as link, trio.open_nursery() as nursery:
            nursery.start_soon(fail_on_cancel)
            await trio.testing.wait_all_tasks_blocked()
            await link.receive()


async def test_two_errors_of_ours_become_one_that_tells_of_the_other(autojump_clock: Clock) -> None:
    left, _right = trio.testing.memory_stream_pair()

    async def fail(text: str) -> None:
        raise StorageError(text)

    with pytest.raises(StorageError) as caught:
        async with open_link(left, P), trio.open_nursery() as nursery:
            nursery.start_soon(fail, "first")
            nursery.start_soon(fail, "second")
    told = f"{caught.value} {' '.join(caught.value.__notes__)}"
    assert "first" in told
    assert "second" in told


async def test_a_defect_among_several_errors_is_not_hidden(autojump_clock: Clock) -> None:
    left, _right = trio.testing.memory_stream_pair()

    async def fail(error: Exception) -> None:
        raise error

    with pytest.raises(ExceptionGroup) as caught:
        async with open_link(left, P), trio.open_nursery() as nursery:
            nursery.start_soon(fail, StorageError("full"))
            nursery.start_soon(fail, KeyError("a defect"))
    assert caught.group_contains(KeyError)


async def test_a_defect_in_the_heartbeats_source_is_not_hidden(autojump_clock: Clock) -> None:
    left, right = trio.testing.memory_stream_pair()

    def broken() -> m.Heartbeat:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with open_link(left, P, heartbeat_source=broken) as link, open_link(right, S):
            await link.send(hello(P))
            await trio.sleep_forever()


async def test_cancelling_from_outside_is_no_error_and_takes_no_time(autojump_clock: Clock) -> None:
    with trio.move_on_after(2) as scope:
        async with two_links() as (primary, _secondary):
            await primary.send(BEGIN)
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(2.0)
