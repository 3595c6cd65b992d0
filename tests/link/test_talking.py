"""A link's tasks and queues, on trio's in-memory streams with the mock clock: all arrives, and little piles up."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from qemu_remus.core import messages as m
from qemu_remus.core.errors import LocalProtocolError, RefusalCode
from qemu_remus.link import Link, open_link
from tests.link.peers import BEGIN, BLOCK, E6, GOODBYE, Clock, P, Peer, S, meet, next_of, two_links
from tests.message_strategies import hello


async def test_messages_arrive_in_order_and_whole_in_both_directions(autojump_clock: Clock) -> None:
    async with two_links() as (primary, secondary):
        for message in (BEGIN, BLOCK, BLOCK):
            await primary.send(message)
        assert [await next_of(secondary) for _ in range(3)] == [BEGIN, BLOCK, BLOCK]
        await secondary.send(m.EpochRefused(E6, RefusalCode.NO_SPACE, "full"))
        assert isinstance(await next_of(primary), m.EpochRefused)
        assert primary.bytes_sent == secondary.bytes_received > 400_000
        assert secondary.bytes_sent == primary.bytes_received > 0


async def test_idle_links_stay_up_by_heartbeats_that_say_what_the_source_says(autojump_clock: Clock) -> None:
    left, right = trio.testing.memory_stream_pair()
    numbers = m.Heartbeat(captured=E6, backlog=77)
    async with open_link(left, P, heartbeat_source=lambda: numbers) as primary, open_link(right, S) as secondary:
        await primary.send(hello(P))
        await secondary.send(hello(S))
        heard = [await secondary.receive() for _ in range(20)]
        assert heard[0] == hello(P)
        assert set(heard[1:]) == {numbers}
        assert trio.current_time() == pytest.approx(19.0)


async def test_frames_of_several_senders_are_never_mixed(autojump_clock: Clock) -> None:
    async with two_links() as (primary, secondary):
        await primary.send(BEGIN)

        async def send_some() -> None:
            for _ in range(5):
                await primary.send(BLOCK)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(send_some)
            assert await next_of(secondary) == BEGIN
            assert [await next_of(secondary) for _ in range(20)] == [BLOCK] * 20


async def test_a_sender_waits_when_the_peer_takes_nothing_and_a_cancelled_one_leaves_no_trace(
    autojump_clock: Clock,
) -> None:
    left, right = trio.testing.lockstep_stream_pair()
    peer = Peer(right, S)
    queued = 0
    async with open_link(left, P) as link:
        await meet(link, peer)
        await link.send(BEGIN)
        with trio.move_on_after(1):
            while True:
                await link.send(BLOCK)
                queued += 1
        assert 0 < queued < 20
        heard = [await peer.hear() for _ in range(2 + queued)]
        assert heard == [hello(P), BEGIN, *[BLOCK] * queued]
        await link.send(m.AbortEpoch(E6))
        assert await peer.hear() == m.AbortEpoch(E6)


async def test_heartbeats_do_not_widen_the_queue(autojump_clock: Clock) -> None:
    left, right = trio.testing.lockstep_stream_pair()
    peer = Peer(right, S)
    queued = 0
    async with open_link(left, P) as link:
        await meet(link, peer)
        for _ in range(50):
            await peer.hear(beats=True)
            await peer.say(m.Heartbeat())
        await link.send(BEGIN)
        with trio.move_on_after(1):
            while True:
                await link.send(BLOCK)
                queued += 1
    assert queued < 20


async def test_heartbeats_that_cannot_get_out_do_not_pile_up(autojump_clock: Clock) -> None:
    left, right = trio.testing.lockstep_stream_pair()
    peer = Peer(right, S)
    async with open_link(left, P) as link:
        await meet(link, peer)
        for _ in range(20):
            await peer.say(m.Heartbeat())
            await trio.sleep(1)
        await link.send(BEGIN)
        heard = []
        while (event := await peer.hear(beats=True)) != BEGIN:
            heard.append(event)
        assert heard == [hello(P), m.Heartbeat()]


async def test_flush_returns_when_everything_sent_is_out(autojump_clock: Clock) -> None:
    left, right = trio.testing.lockstep_stream_pair()
    peer = Peer(right, S)
    flushed = trio.Event()

    async def flush(link: Link) -> None:
        await link.flush()
        flushed.set()

    async with open_link(left, P) as link, trio.open_nursery() as nursery:
        await link.send(hello(P))
        nursery.start_soon(flush, link)
        await trio.testing.wait_all_tasks_blocked()
        assert not flushed.is_set()
        assert await peer.hear() == hello(P)
        await flushed.wait()
        await link.flush()


async def test_a_message_that_must_not_be_said_is_our_error_and_a_goodbye_still_gets_out(
    autojump_clock: Clock,
) -> None:
    async with two_links() as (primary, secondary):
        for _ in range(20):
            with pytest.raises(LocalProtocolError):
                await primary.send(m.CommitEpoch(E6))
        await primary.send(GOODBYE)
        assert await next_of(secondary) == GOODBYE
