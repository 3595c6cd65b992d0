"""A link on loopback, where TCP's own behaviour is the point."""

# ruff: noqa: PT012 -- an error ends a link's body wherever that is: the body is the statement

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from qemu_remus.core import messages as m
from qemu_remus.core.errors import LinkLost, PeerRefused, PeerUnreachable, RefusalCode
from qemu_remus.link import Link, connect, open_link
from tests.link.peers import BEGIN, BLOCK, Clock, P, S, greet, next_of


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
