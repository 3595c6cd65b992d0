"""A link's deadlines, on trio's in-memory streams with the mock clock: whom it calls silent or too slow."""

# ruff: noqa: PT012 -- an error ends a link's body wherever that is: the body is the statement

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing

from qemu_remus.core import messages as m
from qemu_remus.core.errors import LinkLost, PeerSilent, RefusalCode
from qemu_remus.link import open_link
from tests.link.peers import BEGIN, BLOCK, Clock, P, Peer, S, greet, next_of, two_links
from tests.message_strategies import hello


async def test_a_silent_peer_ends_the_link_after_the_timeout(autojump_clock: Clock) -> None:
    left, right = trio.testing.memory_stream_pair()
    peer = Peer(right, S)
    with pytest.raises(PeerSilent, match="3 seconds"):
        async with open_link(left, P) as link:
            await peer.start()
            await link.receive()
            await link.receive()
    assert trio.current_time() == pytest.approx(3.0)


async def test_a_time_for_which_everything_stood_still_is_nobodys_silence(autojump_clock: Clock) -> None:
    async with two_links() as (primary, secondary):
        for _ in range(10):
            await trio.sleep(0.7)
            autojump_clock.jump(60)
        await primary.send(BEGIN)
        while await secondary.receive() != BEGIN:
            pass


async def test_a_peer_that_is_silent_while_we_stand_still_now_and_then_is_silent(autojump_clock: Clock) -> None:
    left, right = trio.testing.memory_stream_pair()
    peer = Peer(right, S)

    async def stand_still() -> None:
        while True:
            await trio.sleep(0.5)
            autojump_clock.jump(1)

    with pytest.raises(PeerSilent):
        async with open_link(left, P) as link, trio.open_nursery() as nursery:
            await peer.start()
            await link.receive()
            nursery.start_soon(stand_still)
            await link.receive()


async def test_bytes_of_an_unfinished_frame_are_a_sign_of_life(autojump_clock: Clock) -> None:
    left, right = trio.testing.memory_stream_pair()
    peer = Peer(right, S)

    async def dribble() -> None:
        raw = b"".join(peer.connection.send(m.Goodbye(RefusalCode.FENCED, "x" * 100)))
        for number in range(0, len(raw), 10):
            await trio.sleep(2)
            await right.send_all(raw[number : number + 10])

    async with open_link(left, P) as link, trio.open_nursery() as nursery:
        await peer.start()
        await link.receive()
        nursery.start_soon(dribble)
        assert isinstance(await link.receive(), m.Goodbye)
    assert trio.current_time() > 20


async def test_a_reader_that_waits_for_its_own_side_does_not_call_the_peer_silent(autojump_clock: Clock) -> None:
    left, right = trio.testing.lockstep_stream_pair()
    async with (
        open_link(left, P, send_timeout=1000) as primary,
        open_link(right, S, send_timeout=1000) as secondary,
        trio.open_nursery() as nursery,
    ):
        async with trio.open_nursery() as greetings:
            greetings.start_soon(greet, primary, P)
            greetings.start_soon(greet, secondary, S)
        await primary.send(BEGIN)

        async def flood() -> None:
            for _ in range(30):
                await primary.send(BLOCK)

        nursery.start_soon(flood)
        await trio.sleep(100)
        assert [await next_of(secondary) for _ in range(31)] == [BEGIN, *[BLOCK] * 30]


async def test_heartbeats_nobody_takes_do_not_pile_up_or_hold_up_messages(autojump_clock: Clock) -> None:
    async with two_links() as (primary, secondary):
        await trio.sleep(200)
        await primary.send(BEGIN)
        heard = []
        while (message := await secondary.receive()) != BEGIN:
            heard.append(message)
        assert len(heard) < 20


async def test_a_peer_that_takes_nothing_for_too_long_ends_the_link(autojump_clock: Clock) -> None:
    left, right = trio.testing.lockstep_stream_pair()
    peer = Peer(right, S)

    async def alive() -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await peer.start()
            while True:
                await peer.say(m.Heartbeat())
                await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(alive)
        with pytest.raises(LinkLost, match="took nothing for 30 seconds"):
            async with open_link(left, P) as link:
                await link.send(hello(P))
                await link.flush()
        nursery.cancel_scope.cancel()
    assert trio.current_time() == pytest.approx(30.0)
