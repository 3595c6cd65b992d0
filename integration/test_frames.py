"""The proxy that kill tests hang on sees every message of the link, changes none, and lets none through after a cut."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
import trio

from integration.frames import Hook, Moment, Passing, start_frame_proxy
from qemu_remus.core import messages as m
from qemu_remus.core import wire
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import EpochNumber, Role

SEVEN = EpochNumber(7)
DATA = bytes(range(256)) * 1024
PRIMARYS: Sequence[m.Message] = (
    m.Heartbeat(committed=EpochNumber(6)),
    m.EpochBegin(SEVEN, EpochNumber(6)),
    m.EpochExtents(SEVEN, (Extent(0, 0, len(DATA), False), Extent(1, 4096, 1 << 30, True)), DATA),
    m.EpochEnd(SEVEN, 2, len(DATA), 0, False),
    m.CommitEpoch(SEVEN),
)
SECONDARYS: Sequence[m.Message] = (m.EpochStaged(SEVEN), m.Committed(SEVEN))


def in_bytes(messages: Sequence[m.Message]) -> bytes:
    frames = [b"".join(wire.encode(message, number)) for number, message in enumerate(messages)]
    return wire.BANNER + b"".join(frames)


@asynccontextmanager
async def linked(hook: Hook) -> AsyncIterator[tuple[trio.SocketStream, trio.SocketStream]]:
    """A primary's end of a link and a secondary's, with the proxy between them."""
    async with trio.open_nursery() as nursery:
        sender, receiver = trio.open_memory_channel[trio.SocketStream](0)

        async def accept(stream: trio.SocketStream) -> None:
            await sender.send(stream)
            await trio.sleep_forever()

        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, accept, [listener])
        async with start_frame_proxy(f"127.0.0.1:{listener.socket.getsockname()[1]}", hook) as proxy:
            host, _, port = proxy.address.partition(":")
            async with await trio.open_tcp_stream(host, int(port)) as primary, await receiver.receive() as secondary:
                yield primary, secondary
        nursery.cancel_scope.cancel()


async def receive(stream: trio.SocketStream, length: int) -> bytes:
    """So many bytes, fewer where it ends."""
    data = b""
    with trio.fail_after(10):
        while len(data) < length:
            try:
                more = await stream.receive_some()
            except trio.BrokenResourceError:
                break
            if not more:
                break
            data += more
    return data


async def test_every_message_is_announced_before_and_after_and_passed_unchanged() -> None:
    seen: list[Passing] = []

    async def hook(passing: Passing) -> None:
        seen.append(passing)

    async with linked(hook) as (primary, secondary):
        whole = in_bytes(PRIMARYS)
        # cut where no frame ends
        for at in range(0, len(whole), 999):
            await primary.send_all(whole[at : at + 999])
        assert await receive(secondary, len(whole)) == whole
        answer = in_bytes(SECONDARYS)
        for byte in answer:
            await secondary.send_all(bytes([byte]))
        assert await receive(primary, len(answer)) == answer
    assert (
        seen[:-1]
        == [
            Passing(role, type(message).__name__, getattr(message, "epoch", None), moment)
            for role, messages in ((Role.PRIMARY, PRIMARYS), (Role.SECONDARY, SECONDARYS))
            for message in messages
            for moment in Moment
        ][:-1]
    )


async def test_message_that_waits_in_the_hook_is_held_and_the_other_direction_goes_on() -> None:
    waiting, go_on = trio.Event(), trio.Event()

    async def hook(passing: Passing) -> None:
        if passing.message == "CommitEpoch" and passing.moment is Moment.BEFORE:
            waiting.set()
            await go_on.wait()

    async with linked(hook) as (primary, secondary):
        whole, answer = in_bytes(PRIMARYS), in_bytes(SECONDARYS)
        last = len(b"".join(wire.encode(PRIMARYS[-1], 0)))
        await primary.send_all(whole)
        assert await receive(secondary, len(whole) - last) == whole[:-last]
        await waiting.wait()
        await secondary.send_all(answer)
        assert await receive(primary, len(answer)) == answer
        go_on.set()
        assert await receive(secondary, last) == whole[-last:]


@pytest.mark.parametrize("moment", Moment)
async def test_cut_in_the_hook_ends_the_link_at_that_message(moment: Moment) -> None:
    async with trio.open_nursery() as nursery:
        got = b""
        ended = trio.Event()

        async def secondary(stream: trio.SocketStream) -> None:
            nonlocal got
            got = await receive(stream, 1 << 30)
            ended.set()

        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, secondary, [listener])

        async def hook(passing: Passing) -> None:
            if passing.message == "EpochEnd" and passing.moment is moment:
                proxy.cut()
                # as killing and waiting does: the cut does not end the hook itself
                await trio.lowlevel.checkpoint()
                reached.append(passing)

        reached: list[Passing] = []
        async with start_frame_proxy(f"127.0.0.1:{listener.socket.getsockname()[1]}", hook) as proxy:
            host, _, port = proxy.address.partition(":")
            async with await trio.open_tcp_stream(host, int(port)) as primary:
                await primary.send_all(in_bytes(PRIMARYS))
                with trio.fail_after(10):
                    await ended.wait()
            passed = PRIMARYS[: 3 if moment is Moment.BEFORE else 4]
            assert got == in_bytes(passed)
            assert len(reached) == 1
            # refused until it is mended
            async with await trio.open_tcp_stream(host, int(port)) as primary:
                assert await receive(primary, 1) == b""
            proxy.mend()
            ended = trio.Event()
            async with await trio.open_tcp_stream(host, int(port)) as primary:
                await primary.send_all(in_bytes(PRIMARYS[:2]))
                await primary.send_eof()
                with trio.fail_after(10):
                    await ended.wait()
            assert got == in_bytes(PRIMARYS[:2])
        nursery.cancel_scope.cancel()
