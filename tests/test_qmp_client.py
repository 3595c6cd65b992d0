"""The QMP client against the fake QEMU: outcomes, deadlines, pipelining, the order of events, and bad sockets."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from qemu_remus.core.errors import CommandFailed, CommandInDoubt, NotQmp, QemuUnreachable
from qemu_remus.core.model import NodeName
from qemu_remus.qemu import commands
from qemu_remus.qemu.client import (
    SILENCE_LIMIT,
    Done,
    Failed,
    InDoubt,
    PeerCredentials,
    open_qmp,
    open_qmp_over,
)
from qemu_remus.qemu.commands import Command
from qemu_remus.qemu.events import QmpEvent
from tests.fake_qemu import FakeQemu

NOBODY = NodeName("nobody")
GREETING = (
    b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}, "capabilities": []}}\r\n'
)


@pytest.fixture
def fake() -> Iterator[FakeQemu]:
    with FakeQemu() as qemu:
        yield qemu


@asynccontextmanager
async def listening(fake: FakeQemu, path: Path) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(fake.listen, path)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def server_that_sends(path: Path, data: bytes, *, then_close: bool) -> AsyncIterator[None]:
    async def serve() -> None:
        connection, _ = await listener.accept()
        with connection:
            await connection.send(data)
            if not then_close:
                await trio.sleep_forever()

    with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        await listener.bind(str(path))
        listener.listen(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield
            nursery.cancel_scope.cancel()


# --- over a real socket


async def test_a_session_over_a_unix_socket_knows_version_and_peer(fake: FakeQemu, tmp_path: Path) -> None:
    async with listening(fake, tmp_path / "qmp"), open_qmp(tmp_path / "qmp") as client:
        assert client.version == (7, 2, 22)
        assert client.peer == PeerCredentials(os.getpid(), os.getuid(), os.getgid())
        assert await client.execute(commands.query_status()) == {
            "status": "running",
            "running": True,
            "singlestep": False,
        }


async def test_the_socket_is_free_for_the_next_client_once_a_session_ends(fake: FakeQemu, tmp_path: Path) -> None:
    async with listening(fake, tmp_path / "qmp"):
        for _ in range(3):
            async with open_qmp(tmp_path / "qmp") as client:
                await client.execute(commands.query_status())


async def test_an_error_in_the_body_comes_out_as_itself(fake: FakeQemu, tmp_path: Path) -> None:
    async with listening(fake, tmp_path / "qmp"):
        with pytest.raises(KeyError, match="mine"):
            async with open_qmp(tmp_path / "qmp"):
                raise KeyError("mine")


async def test_an_error_in_a_cancelled_body_comes_out_too(fake: FakeQemu, tmp_path: Path) -> None:
    async with listening(fake, tmp_path / "qmp"):
        with trio.CancelScope() as scope, pytest.raises(KeyError):
            await _fail_when_cancelled(tmp_path / "qmp", scope)


async def _fail_when_cancelled(path: Path, scope: trio.CancelScope) -> None:
    async with open_qmp(path):
        scope.cancel()
        raise KeyError("ours")


async def test_a_busy_socket_is_told_from_a_dead_one(fake: FakeQemu, tmp_path: Path) -> None:
    async with listening(fake, tmp_path / "qmp"), open_qmp(tmp_path / "qmp"):
        with pytest.raises(QemuUnreachable, match="somebody else is probably connected"):
            async with open_qmp(tmp_path / "qmp", connect_timeout=0.05):
                pass


async def test_a_full_backlog_counts_as_busy(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(0)
        first.connect(str(tmp_path / "qmp"))
        with pytest.raises(QemuUnreachable, match="somebody else is probably connected"):
            async with open_qmp(tmp_path / "qmp", connect_timeout=1):
                pass


async def test_no_socket_nobody_listening_and_a_path_too_long_are_unreachable(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(tmp_path / "dead"))
    for path, text in [("none", "No such file"), ("dead", "refused"), ("x" * 200, "too long")]:
        with pytest.raises(QemuUnreachable, match=text):
            async with open_qmp(tmp_path / path):
                pass


@pytest.mark.parametrize(
    "greeting",
    [
        b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ",
        b"NBDMAGICIHAVEOPT\x00\x03",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b'{"hello": "world"}\n',
        b"[]\n",
    ],
)
async def test_something_else_than_qmp_is_not_qmp(tmp_path: Path, greeting: bytes) -> None:
    async with server_that_sends(tmp_path / "s", greeting, then_close=False):
        with pytest.raises(NotQmp, match="does not speak QMP"):
            async with open_qmp(tmp_path / "s"):
                pass


async def test_a_server_that_closes_at_once_is_unreachable(tmp_path: Path) -> None:
    async with server_that_sends(tmp_path / "s", b"", then_close=True):
        with pytest.raises(QemuUnreachable, match="closed the QMP connection"):
            async with open_qmp(tmp_path / "s"):
                pass


# --- outcomes


async def test_a_refusal_carries_qemus_words(fake: FakeQemu) -> None:
    async with fake.connect() as client:
        with pytest.raises(CommandFailed) as caught:
            await client.execute(commands.blockdev_del(NOBODY))
    assert caught.value.command == "blockdev-del"
    assert caught.value.qmp_class == "GenericError"
    assert caught.value.desc == "Failed to find node with node-name='nobody'"


@pytest.mark.parametrize("when", ["hang_up_before", "hang_up_after"])
async def test_a_lost_connection_leaves_a_change_in_doubt_and_a_query_unreachable(fake: FakeQemu, when: str) -> None:
    getattr(fake, when).update({"stop", "query-status"})
    async with fake.connect() as client:
        with pytest.raises(CommandInDoubt, match="closed the QMP connection"):
            await client.execute(commands.stop())
        assert client.closed.is_set()
    async with fake.connect() as client:
        with pytest.raises(QemuUnreachable, match="query-status got no answer"):
            await client.execute(commands.query_status())


async def test_a_missing_reply_leaves_a_change_in_doubt_and_the_connection_usable(
    fake: FakeQemu, autojump_clock: trio.testing.MockClock
) -> None:
    fake.mute = {"stop", "query-block"}
    async with fake.connect() as client:
        with pytest.raises(CommandInDoubt, match="no reply within 2 s"):
            await client.execute(commands.stop(), timeout=2)
        with pytest.raises(QemuUnreachable, match="no reply within 3 s"):
            await client.execute(commands.query_block(), timeout=3)
        assert (await client.execute(commands.query_status()))["status"] == "paused"


async def test_nothing_is_sent_after_the_connection_is_gone_and_nobody_waits_for_it(fake: FakeQemu) -> None:
    fake.hang_up_before.add("query-block")
    async with fake.connect() as client:
        with pytest.raises(QemuUnreachable):
            await client.execute(commands.query_block())
        before = len(fake.log)
        for command in (commands.stop(), commands.query_status()):
            with pytest.raises(QemuUnreachable, match="was not sent to QEMU: QEMU closed the QMP connection"):
                await client.execute(command, timeout=1e6)
        assert len(fake.log) == before


async def test_garbage_in_the_middle_leaves_changes_in_doubt() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    greeting = b'{"QMP": {"version": {"qemu": {"major": 9, "minor": 0, "micro": 1}}, "capabilities": []}}\r\n'

    async def serve() -> None:
        await theirs.send_all(greeting)
        ident = (await theirs.receive_some()).split(b'"id":')[1].split(b"}")[0]
        await theirs.send_all(b'{"return": {}, "id": ' + ident + b"}\r\n")
        await theirs.receive_some()
        await theirs.send_all(b"Segmentation fault\r\n")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with open_qmp_over(ours, PeerCredentials(1, 2, 3), name="it") as client:
            with pytest.raises(CommandInDoubt, match="does not speak QMP"):
                await client.execute(commands.cont())
            assert client.closed.is_set()


async def test_a_cancelled_change_is_waited_for_and_its_outcome_known(fake: FakeQemu) -> None:
    async with fake.connect() as client:
        outcome = None
        with trio.CancelScope() as scope:
            scope.cancel()
            outcome = await client.execute_many([commands.stop()])
        assert outcome is not None
        assert isinstance(outcome[0], Done)
        assert fake.status == "paused"


async def test_a_change_is_answered_though_everything_around_its_session_is_cancelled(
    fake: FakeQemu, tmp_path: Path
) -> None:
    answers = []
    async with listening(fake, tmp_path / "qmp"):
        with trio.CancelScope() as scope:
            async with open_qmp(tmp_path / "qmp") as client:
                scope.cancel()
                answers.append(await client.execute(commands.stop()))
    assert answers == [{}]


async def test_a_cancelled_query_is_given_up_at_once(fake: FakeQemu, autojump_clock: trio.testing.MockClock) -> None:
    fake.mute.add("query-block")
    async with fake.connect() as client:
        started = trio.current_time()
        with trio.move_on_after(1) as scope:
            await client.execute(commands.query_block(), timeout=60)
        assert scope.cancelled_caught
        assert trio.current_time() - started == pytest.approx(1)
        assert (await client.execute(commands.query_status()))["running"]


# --- a QEMU that hangs


async def test_all_that_comes_after_a_missing_reply_waits_once_and_is_sent_no_more(
    fake: FakeQemu, autojump_clock: trio.testing.MockClock
) -> None:
    async with fake.connect() as client:
        fake.hang()
        started = trio.current_time()
        with pytest.raises(CommandInDoubt):
            await client.execute(commands.stop(), timeout=5)
        # This one has the time that is left for all.
        with pytest.raises(QemuUnreachable, match="query-block got no answer from QEMU: no reply within 10 s"):
            await client.execute(commands.query_block(), timeout=60)
        for command in (commands.cont(), commands.query_status(), commands.blockdev_del(NOBODY)):
            with pytest.raises(
                QemuUnreachable, match=r"not sent to QEMU: QEMU at the fake does not answer: .* to stop"
            ):
                await client.execute(command)
        assert trio.current_time() - started == pytest.approx(5 + SILENCE_LIMIT)
        fake.go_on()
        await trio.testing.wait_all_tasks_blocked()
        assert fake.commands(queries=True)[1:] == ["stop", "query-block"]


async def test_whoever_insists_is_heard_however_long_qemu_hangs(
    fake: FakeQemu, autojump_clock: trio.testing.MockClock
) -> None:
    async with fake.connect() as client, trio.open_nursery() as nursery:
        fake.hang()
        with pytest.raises(QemuUnreachable):
            await client.execute(commands.query_status())
        await trio.sleep(SILENCE_LIMIT)
        nursery.start_soon(_after, 20, fake.go_on)
        assert await client.execute(commands.stop(), timeout=30, insist=True) == {}


async def _after(seconds: float, act: Callable[[], None]) -> None:
    await trio.sleep(seconds)
    act()


async def test_a_qemu_that_goes_on_is_asked_as_before(fake: FakeQemu, autojump_clock: trio.testing.MockClock) -> None:
    async with fake.connect() as client:
        assert client.silence == ""
        fake.hang()
        with pytest.raises(CommandInDoubt):
            await client.execute(commands.stop())
        assert client.silence == "QEMU at the fake does not answer: there was no reply within 10 s to stop"
        await trio.sleep(10 * SILENCE_LIMIT)
        fake.go_on()
        # What it owed says so.
        await trio.testing.wait_all_tasks_blocked()
        assert client.silence == ""
        assert (await client.execute(commands.query_status()))["status"] == "paused"


async def test_one_slow_reply_leaves_the_next_commands_all_their_time(
    fake: FakeQemu, autojump_clock: trio.testing.MockClock
) -> None:
    async with fake.connect() as client, trio.open_nursery() as nursery:
        for _ in range(2):
            fake.hang()
            with pytest.raises(QemuUnreachable):
                await client.execute(commands.query_status(), timeout=5)
            nursery.start_soon(_after, SILENCE_LIMIT - 1, fake.go_on)
            assert await client.execute(commands.query_block()) == []


# --- many at once


async def test_many_commands_go_in_one_write_and_come_back_in_order(fake: FakeQemu) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    writes: list[bytes] = []
    send_all = ours.send_all

    async def recording_send_all(data: bytes | bytearray | memoryview) -> None:
        writes.append(bytes(data))
        await send_all(data)

    ours.send_all = recording_send_all  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fake.serve, theirs)
        async with open_qmp_over(ours, PeerCredentials(0, 0, 0), name="fake") as client:
            writes.clear()
            outcomes = await client.execute_many([commands.stop(), commands.blockdev_del(NOBODY), commands.cont()])
    assert len(writes) == 1
    assert fake.commands() == ["qmp_capabilities", "stop", "blockdev-del", "cont"]
    match outcomes:
        case [Done(value={}), Failed(error=CommandFailed(command="blockdev-del")), Done(value={})]:
            pass
        case _:
            pytest.fail(str(outcomes))


async def test_a_connection_lost_on_the_way_leaves_the_rest_in_doubt(fake: FakeQemu) -> None:
    fake.hang_up_after.add("blockdev-del")
    async with fake.connect() as client:
        outcomes = await client.execute_many([commands.stop(), commands.blockdev_del(NOBODY), commands.cont()])
    assert [type(outcome) for outcome in outcomes] == [Done, InDoubt, InDoubt]
    assert fake.status == "paused"


async def test_no_commands_need_no_connection(fake: FakeQemu) -> None:
    async with fake.connect() as client:
        assert await client.execute_many([]) == []


async def test_more_callers_than_the_queue_holds_are_all_served(fake: FakeQemu) -> None:
    async with fake.connect() as client:
        done = 0

        async def ask() -> None:
            nonlocal done
            await client.execute(commands.query_status())
            done += 1

        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(ask)
        assert done == 300


async def test_a_qemu_that_reads_nothing_does_not_hold_callers_beyond_their_time_out(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    greeting = b'{"QMP": {"version": {"qemu": {"major": 9, "minor": 0, "micro": 1}}, "capabilities": []}}\r\n'

    async def serve() -> None:
        await theirs.send_all(greeting)
        ident = (await theirs.receive_some()).split(b'"id":')[1].split(b"}")[0]
        await theirs.send_all(b'{"return": {}, "id": ' + ident + b"}\r\n")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with open_qmp_over(ours, PeerCredentials(1, 2, 3), name="it") as client:
            # The first is stuck in the stream: some of it may have been read. The second was never begun.
            with pytest.raises(CommandInDoubt):
                await client.execute(commands.stop(), timeout=5)
            with pytest.raises(QemuUnreachable, match="cont was not sent"):
                await client.execute(commands.cont(), timeout=5)


# --- events


async def test_the_order_of_events_and_replies_is_that_of_the_wire(fake: FakeQemu) -> None:
    async with fake.connect() as client:
        with client.subscribe("STOP", "RESUME") as events:
            before = client.order
            outcomes = await client.execute_many([commands.stop(), commands.query_status(), commands.cont()])
            stop, resume = events.drain()
        orders = [outcome.order for outcome in outcomes if isinstance(outcome, Done)]
        assert (stop.name, resume.name) == ("STOP", "RESUME")
        assert before < stop.order < orders[0] < orders[1] < resume.order < orders[2] == client.order
        assert stop.timestamp == 1_700_000_000.5


async def test_a_subscription_gets_only_what_it_names_and_only_while_it_lasts(fake: FakeQemu) -> None:
    async with fake.connect() as client:
        await client.execute(commands.stop())
        with client.subscribe("RESUME") as some, client.subscribe() as every:
            await client.execute_many([commands.cont(), commands.stop()])
            assert [event.name for event in some.drain()] == ["RESUME"]
            assert [event.name for event in every.drain()] == ["RESUME", "STOP"]
        await client.execute(commands.cont())
        assert some.drain() == []


async def test_too_many_events_are_dropped_and_it_is_said(fake: FakeQemu) -> None:
    async with fake.connect() as client:
        with client.subscribe("STOP", capacity=2) as events:
            overflowed = []
            for _ in range(3):
                await client.execute_many([commands.stop(), commands.cont()])
                overflowed.append(events.overflowed)
            assert overflowed == [False, False, True]
            assert len(events.drain()) == 2


async def test_an_event_stream_ends_with_the_connection(fake: FakeQemu) -> None:
    fake.hang_up_after.add("cont")
    async with fake.connect() as client:
        with client.subscribe() as events:
            await client.execute_many([commands.stop(), commands.cont()])
            names = [event.name async for event in events]
            assert names == ["STOP", "RESUME"]
        with client.subscribe() as late:
            assert [event async for event in late] == []


async def test_an_event_before_negotiation_is_over_does_no_harm(fake: FakeQemu) -> None:
    fake.emit("RESUME")
    async with fake.connect() as client:
        assert client.version == (7, 2, 22)


async def test_waiting_for_an_event_ends_when_it_comes(fake: FakeQemu) -> None:
    got: list[QmpEvent] = []
    async with fake.connect() as client, trio.open_nursery() as nursery:
        with client.subscribe("SHUTDOWN") as events:

            async def wait() -> None:
                got.append(await anext(events))

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await fake.emit_now("SHUTDOWN", guest=True)
            await trio.testing.wait_all_tasks_blocked()
    assert [event.data for event in got] == [{"guest": True}]


async def test_what_went_out_in_part_goes_out_whole_though_its_caller_is_gone() -> None:
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in socket.socketpair())
    lines: list[dict[str, object]] = []
    read_on = trio.Event()

    async def qemu() -> None:
        await theirs.send_all(GREETING)
        buffer = b""
        while data := await theirs.receive_some(1 << 20):
            buffer += data
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                lines.append(json.loads(line))
                await theirs.send_all(json.dumps({"return": {}, "id": lines[-1]["id"]}).encode() + b"\r\n")
                if len(lines) == 1:
                    await read_on.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(qemu)
        async with theirs, open_qmp_over(ours, PeerCredentials(1, 0, 0), name="qmp") as client:
            with trio.CancelScope() as scope:
                scope.cancel()
                await client.execute(Command("query-status", {"long": "x" * (4 << 20)}, changes_state=False))
            assert scope.cancelled_caught
            read_on.set()
            await client.execute(commands.query_status())
            assert [line["execute"] for line in lines] == ["qmp_capabilities", "query-status", "query-status"]
        nursery.cancel_scope.cancel()
