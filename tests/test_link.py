"""The link's tasks, queues and deadlines, on trio's in-memory streams with the mock clock, and on loopback where TCP's
own behaviour is the point.

Rules: no sleep as synchronisation (a sleep here is only virtual time passing); wait for an event, a message, or
``wait_all_tasks_blocked``.  The mock clock jumps while the kernel still carries bytes, so tests over TCP go without it.
"""

# ruff: noqa: PT012 -- an error ends a link's body wherever that is: the body is the statement

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from qemu_remus.core import messages as m
from qemu_remus.core import wire
from qemu_remus.core.connection import NEED_DATA, Connection, ConnectionClosed
from qemu_remus.core.errors import (
    LinkLost,
    LocalProtocolError,
    PeerRefused,
    PeerSilent,
    PeerUnreachable,
    RefusalCode,
    RemoteProtocolError,
    StorageError,
    VersionMismatch,
)
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import EpochNumber, Role
from qemu_remus.link import Link, connect, open_link

from .message_strategies import hello

Clock = trio.testing.MockClock
P, S = Role.PRIMARY, Role.SECONDARY
E5, E6 = EpochNumber(5), EpochNumber(6)
BEGIN = m.EpochBegin(E6, E5)
BLOCK = m.EpochExtents(E6, (Extent(0, 0, 200_000),), bytes(200_000))
GOODBYE = m.Goodbye(RefusalCode.SHUTTING_DOWN, "done")


class Peer:
    """The other end without a link: it does nothing by itself."""

    def __init__(self, stream: trio.abc.HalfCloseableStream, role: Role) -> None:
        self.stream = stream
        self.connection = Connection(role)

    async def start(self) -> None:
        await self.stream.send_all(self.connection.start())
        await self.say(hello(self.connection.role))

    async def say(self, message: m.Message) -> None:
        await self.stream.send_all(b"".join(self.connection.send(message)))

    async def hear(self, *, beats: bool = False) -> m.Message | ConnectionClosed:
        """The next message; heartbeats only if asked for."""
        while True:
            event = self.connection.next_event()
            if event is NEED_DATA:
                self.connection.receive_data(await self.stream.receive_some())
            elif beats or not isinstance(event, m.Heartbeat):
                assert not isinstance(event, type(NEED_DATA))
                return event


async def next_of(link: Link) -> m.Message:
    """The next message but heartbeats."""
    while isinstance(message := await link.receive(), m.Heartbeat):
        pass
    return message


async def greet(link: Link, role: Role) -> None:
    await link.send(hello(role))
    assert isinstance(await next_of(link), m.Hello)


async def meet(link: Link, peer: Peer) -> None:
    """Exchange hellos with a peer that takes its time for every byte."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.start)
        await link.send(hello(P))
        assert isinstance(await link.receive(), m.Hello)


@asynccontextmanager
async def two_links(**options: float) -> AsyncIterator[tuple[Link, Link]]:
    """Primary and secondary, past their hellos."""
    left, right = trio.testing.memory_stream_pair()
    async with (
        open_link(left, P, **options) as primary,  # type: ignore[arg-type]
        open_link(right, S, **options) as secondary,  # type: ignore[arg-type]
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(greet, primary, P)
            nursery.start_soon(greet, secondary, S)
        yield primary, secondary


# --- talking ---------------------------------------------------------------------------------------------------------


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


# --- silence, slowness ------------------------------------------------------------------------------------------------


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


# --- TCP -------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def tcp_pair() -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        client = await connect("127.0.0.1", listener.socket.getsockname()[1])
        async with client, await listener.accept() as server:
            yield client, server


async def test_over_tcp_a_refusal_reaches_a_peer_that_is_still_sending() -> None:
    """Closing a socket with unread data resets it and would lose the goodbye."""
    async with tcp_pair() as (left, right):
        left.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, 1 << 16)

        async def send_much(link: Link) -> None:
            while True:
                await link.send(BLOCK)

        async def refuse() -> None:
            async with open_link(right, S) as link:
                await greet(link, S)
                assert await next_of(link) == BEGIN
                await link.send(m.Goodbye(RefusalCode.FENCED, "a newer connection"))

        async with trio.open_nursery() as outer:
            outer.start_soon(refuse)
            with pytest.raises(PeerRefused, match="a newer connection"):
                async with open_link(left, P) as link, trio.open_nursery() as nursery:
                    await greet(link, P)
                    await link.send(BEGIN)
                    nursery.start_soon(send_much, link)
                    while True:
                        await link.receive()


async def test_over_tcp_a_peer_that_dies_is_a_lost_link() -> None:
    async with tcp_pair() as (left, right):
        with pytest.raises(LinkLost):
            async with open_link(left, P) as link:
                await trio.aclose_forcefully(right)
                await link.receive()


async def test_small_messages_are_not_held_back_by_tcp() -> None:
    async with tcp_pair() as (left, _right):
        assert left.getsockopt(trio.socket.IPPROTO_TCP, trio.socket.TCP_NODELAY)


async def test_an_address_where_nobody_listens_is_named_with_what_to_check() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    with pytest.raises(PeerUnreachable, match=f"to 127.0.0.1:{port}: Connection refused") as caught:
        await connect("127.0.0.1", port)
    assert "--listen" in caught.value.hint


async def test_a_name_that_nobody_knows_or_that_takes_too_long_is_an_unreachable_peer(autojump_clock: Clock) -> None:
    class Resolver(trio.abc.HostnameResolver):
        async def getaddrinfo(self, host: object, *_: object) -> list[object]:  # type: ignore[override]
            if host == b"slow":
                await trio.sleep_forever()
            raise trio.socket.gaierror(-2, "Name or service not known")

        async def getnameinfo(self, *_: object) -> tuple[str, str]:
            raise NotImplementedError

    trio.socket.set_custom_hostname_resolver(Resolver())
    with pytest.raises(PeerUnreachable, match="nowhere:7400: Name or service not known"):
        await connect("nowhere", 7400)
    with pytest.raises(PeerUnreachable, match="slow:7400: no answer within 4 seconds"):
        await connect("slow", 7400, timeout=4)
    assert trio.current_time() == pytest.approx(4.0)
