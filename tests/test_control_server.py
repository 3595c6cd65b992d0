"""The control server over real Unix sockets in tmp_path; the clocks of its time-outs are the mock clock's."""

import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from qemu_remus import control, control_socket
from qemu_remus.control import ControlServer, Handler
from qemu_remus.control_client import open_control
from qemu_remus.core.commands import (
    EpochWasLost,
    EventName,
    FailoverArguments,
    FailoverCompleted,
    FailoverResult,
    Nothing,
)
from qemu_remus.core.errors import (
    CommandFailed,
    CommandNotFound,
    CommitInDoubt,
    ConfigError,
    ControlError,
    ControlUnreachable,
    EpochLost,
    InternalError,
    NoSpace,
    NotConsistent,
    OutOfOrder,
    QemuRemusError,
    Refused,
    SnapshotBroken,
)
from qemu_remus.core.model import Connection, DiskState, EpochNumber, PairName, Replication, Role
from qemu_remus.core.report import Report

REPORT = Report(PairName("vm"), Role.SECONDARY, Connection.CONNECTED, DiskState.UP_TO_DATE, Replication.PROTECTED)
LOST = EpochWasLost(PairName("vm"), EpochNumber(7), "the fleece is full")


async def query(_: Nothing) -> Report:
    return REPORT


async def failover(arguments: FailoverArguments) -> FailoverResult:
    return FailoverResult(arguments.checkpoints[0] if arguments.checkpoints else EpochNumber(3))


HANDLERS: dict[str, Handler] = {"query-replication": query, "failover": failover}


@asynccontextmanager
async def serving(path: Path, handlers: Mapping[str, Handler] = HANDLERS) -> AsyncIterator[ControlServer]:
    server = ControlServer(path, handlers, now=lambda: 1700000000.25)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve)
        yield server
        nursery.cancel_scope.cancel()


class RawClient:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def line(self) -> Any:
        with trio.fail_after(20):
            while b"\r\n" not in self._buffer:
                data = await self.stream.receive_some(65536)
                if not data:
                    raise EOFError(self._buffer)
                self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return json.loads(line)

    async def ended(self) -> bool:
        """Whether nothing more comes, an answer on the way or not."""
        with trio.fail_after(20):
            try:
                while await self.stream.receive_some(65536):
                    pass
            except trio.BrokenResourceError:
                pass
        return True

    async def ask(self, text: str) -> Any:
        await self.stream.send_all(text.encode())
        return await self.line()


@asynccontextmanager
async def raw(path: Path, *, negotiate: bool = True) -> AsyncIterator[RawClient]:
    async with await trio.open_unix_socket(path) as stream:
        client = RawClient(stream)
        greeting = await client.line()
        assert greeting["QMP"]["capabilities"] == []
        if negotiate:
            assert await client.ask('{"execute":"qmp_capabilities"}') == {"return": {}}
        yield client


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


async def test_the_clients_commands_are_answered(path: Path) -> None:
    async with serving(path), open_control(path) as client:
        assert Report.from_json(await client.execute("query-replication")) == REPORT
        assert (await client.execute("failover", {"checkpoints": [9, 8]}))["checkpoint"] == 9
        assert (await client.execute("query-version"))["package"].startswith("qemu-remus")


async def test_a_controller_lists_and_describes_the_commands_that_it_has_and_no_others(path: Path) -> None:
    async with serving(path, {"query-replication": query}), open_control(path) as client:
        listed = {command["name"] for command in await client.execute("query-commands")}
        schema = await client.execute("query-qmp-schema")
        described = {entry["name"] for entry in schema if entry["meta-type"] == "command"}
        with pytest.raises(CommandNotFound):
            await client.execute("failover")
    assert listed == described
    assert "query-replication" in listed
    assert "failover" not in listed


async def test_nothing_is_done_before_the_negotiation(path: Path) -> None:
    called: list[object] = []

    async def note(arguments: object) -> Report:
        called.append(arguments)
        return REPORT

    async with serving(path, {"query-replication": note}), raw(path, negotiate=False) as client:
        reply = await client.ask('{"execute":"query-replication","id":4}')
    assert reply["error"]["class"] == "CommandNotFound"
    assert reply["id"] == 4
    assert not called


async def test_the_negotiation_is_done_once_and_grants_nothing(path: Path) -> None:
    async with serving(path), raw(path, negotiate=False) as client:
        reply = await client.ask('{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}')
        assert reply["error"]["class"] == "GenericError"
        assert await client.ask('{"execute":"qmp_capabilities","arguments":{"enable":[]}}') == {"return": {}}
        assert (await client.ask('{"execute":"qmp_capabilities"}'))["error"]["class"] == "CommandNotFound"


@pytest.mark.parametrize(
    ("error", "qmp_class"),
    [
        (NotConsistent("no"), "NotConsistent"),
        (CommitInDoubt("no"), "CommitInDoubt"),
        (OutOfOrder("no"), "OutOfOrder"),
        (Refused("no"), "Refused"),
        (EpochLost("no"), "EpochLost"),
        (SnapshotBroken("no", hint="a larger fleece"), "EpochLost"),
        (CommandFailed("stop", "DeviceNotActive", "no"), "GenericError"),
        (ControlError("no"), "GenericError"),
        (NoSpace("no", safe="all is there", hint="make room"), "GenericError"),
    ],
)
async def test_a_handlers_error_reaches_the_client_with_its_class_and_whole_text(
    path: Path, error: Any, qmp_class: str
) -> None:
    async def fail(_: object) -> None:
        raise error

    async with serving(path, {"failover": fail}):
        async with raw(path) as client:
            reply = await client.ask('{"execute":"failover","id":"a"}')
        assert reply == {"error": {"class": qmp_class, "desc": str(error)}, "id": "a"}
        async with open_control(path) as ours:
            with pytest.raises(QemuRemusError) as caught:
                await ours.execute("failover")
    assert caught.value.control_class == qmp_class
    expected = EpochLost if qmp_class == "EpochLost" else ControlError if qmp_class == "GenericError" else type(error)
    assert type(caught.value) is expected


async def test_a_defect_in_a_handler_ends_neither_the_connection_nor_the_controller(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def broken(_: object) -> None:
        raise ZeroDivisionError

    async with serving(path, {"query-replication": broken}), raw(path) as client:
        reply = await client.ask('{"execute":"query-replication"}')
        assert "Internal error" in reply["error"]["desc"]
        assert "return" in await client.ask('{"execute":"query-version"}')
    assert "ZeroDivisionError" in "".join(capsys.readouterr())


async def test_wrong_arguments_are_refused_before_the_handler(path: Path) -> None:
    async with serving(path), raw(path) as client:
        for arguments, desc in (('{"x":1}', "'x' is unexpected"), ('{"checkpoints":[0]}', "$.checkpoints[0]")):
            reply = await client.ask('{"execute":"failover","arguments":' + arguments + "}")
            assert reply["error"]["class"] == "GenericError"
            assert desc in reply["error"]["desc"]


async def test_a_request_too_long_is_answered_and_ends_that_connection_only(path: Path) -> None:
    async with serving(path), raw(path) as other:
        async with raw(path) as client:
            reply = await client.ask('{"execute":"' + "a" * 70_000)
            assert "more than" in reply["error"]["desc"]
            assert await client.ended()
        assert "return" in await other.ask('{"execute":"query-version"}')


async def test_a_client_that_closes_its_own_direction_still_gets_its_answers(path: Path) -> None:
    async with serving(path), raw(path) as client:
        await client.stream.send_all(b'{"execute":"query-version","id":1}{"execute":"query-replication","id":2}')
        await client.stream.send_eof()
        assert [(await client.line())["id"], (await client.line())["id"]] == [1, 2]
        assert await client.ended()


async def test_one_clients_long_command_does_not_hold_up_another(path: Path) -> None:
    started, go_on = trio.Event(), trio.Event()

    async def slow(arguments: object) -> FailoverResult:
        started.set()
        await go_on.wait()
        return FailoverResult(EpochNumber(1))

    async with serving(path, {"failover": slow, "query-replication": query}), raw(path) as first, raw(path) as second:
        await first.stream.send_all(b'{"execute":"failover"}')
        await started.wait()
        assert "return" in await second.ask('{"execute":"query-replication"}')
        go_on.set()
        assert (await first.line())["return"]["checkpoint"] == 1


async def test_a_command_goes_on_when_its_client_goes_away(path: Path) -> None:
    started, go_on, done = trio.Event(), trio.Event(), trio.Event()

    async def slow(arguments: object) -> FailoverResult:
        started.set()
        await go_on.wait()
        done.set()
        return FailoverResult(EpochNumber(1))

    async with serving(path, {"failover": slow}) as server:
        async with raw(path) as client:
            await client.stream.send_all(b'{"execute":"failover"}')
            await started.wait()
        server.emit(EventName.EPOCH_LOST, LOST)
        go_on.set()
        with trio.fail_after(20):
            await done.wait()


async def test_events_go_to_every_negotiated_client_with_their_timestamp(path: Path) -> None:
    async with serving(path) as server, raw(path) as one, raw(path) as two, raw(path, negotiate=False) as early:
        server.emit(EventName.EPOCH_LOST, LOST)
        expected = {
            "timestamp": {"seconds": 1700000000, "microseconds": 250000},
            "event": "EPOCH_LOST",
            "data": {"pair": "vm", "epoch": 7, "reason": "the fleece is full"},
        }
        assert await one.line() == expected
        assert await two.line() == expected
        assert await early.ask('{"execute":"qmp_capabilities"}') == {"return": {}}


async def test_the_client_reads_past_events(path: Path) -> None:
    async with serving(path) as server, open_control(path) as client:
        server.emit(EventName.EPOCH_LOST, LOST)
        assert (await client.execute("query-replication"))["pair"] == "vm"


async def test_an_event_with_anothers_data_is_a_defect(path: Path) -> None:
    server = ControlServer(path, HANDLERS)
    with pytest.raises(InternalError):
        server.emit(EventName.EPOCH_LOST, FailoverCompleted(PairName("vm"), EpochNumber(1)))


async def test_a_client_that_does_not_read_is_dropped_and_nobody_waits_for_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "QUEUE_LIMIT", 4)
    flood = EpochWasLost(PairName("vm"), EpochNumber(7), "x" * 100_000)
    async with serving(path) as server, raw(path) as idle, raw(path) as other:
        # More than the queue and the sockets' buffers hold; emit() is no checkpoint, so that nobody can read meanwhile.
        for _ in range(8):
            server.emit(EventName.EPOCH_LOST, flood)
        assert await idle.ended()
        await other.ended()
        async with raw(path) as client:
            assert "return" in await client.ask('{"execute":"query-version"}')


async def test_a_client_that_stops_reading_is_dropped_in_time(
    path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(path) as server, raw(path) as client:
        server.emit(EventName.EPOCH_LOST, EpochWasLost(PairName("vm"), EpochNumber(7), "x" * 5_000_000))
        await trio.sleep(control.SEND_TIMEOUT - 1)
        assert server._clients
        await trio.sleep(2)
        assert not server._clients
        assert await client.ended()


async def test_a_client_that_never_negotiates_is_dropped_and_one_that_has_is_not(
    path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(path) as server, raw(path) as patient, raw(path, negotiate=False) as silent:
        await trio.sleep(control.NEGOTIATION_TIMEOUT + 1)
        assert await silent.ended()
        server.emit(EventName.EPOCH_LOST, LOST)
        assert (await patient.line())["event"] == "EPOCH_LOST"


async def test_one_client_too_many_is_told_so_and_a_place_becomes_free_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "CLIENT_LIMIT", 2)
    async with serving(path) as server:
        async with raw(path), raw(path):
            with pytest.raises(ControlUnreachable, match="connected already"):
                async with open_control(path):
                    pass
        with trio.fail_after(20):
            while server._clients:
                await trio.testing.wait_all_tasks_blocked()
        async with raw(path):
            pass


async def test_a_handler_for_a_command_that_is_not_in_the_table_is_a_defect(path: Path) -> None:
    for name in ("query-versions", "query-version"):
        with pytest.raises(InternalError, match=name):
            ControlServer(path, {name: query})


# The socket's file


def mode_of(path: Path) -> int:
    return path.lstat().st_mode


def put(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(text)


def content(path: Path) -> str:
    return path.read_text()


async def test_the_socket_is_for_its_user_only_and_gone_afterwards(path: Path) -> None:
    async with serving(path):
        mode = mode_of(path)
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
    assert not list(path.parent.iterdir())


async def test_the_directory_is_made_for_its_user_only(tmp_path: Path) -> None:
    path = tmp_path / "made" / "control.sock"
    async with serving(path):
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def refused_to_serve(match: str) -> pytest.RaisesGroup[ConfigError]:
    return pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match=match), flatten_subgroups=True)


@contextmanager
def dead_socket(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
    yield


async def test_a_dead_controllers_socket_is_replaced(path: Path) -> None:
    with dead_socket(path), dead_socket(Path(f"{path}~")):
        async with serving(path), raw(path) as client:
            assert "return" in await client.ask('{"execute":"query-version"}')
    assert not list(path.parent.iterdir())


async def test_a_live_socket_is_refused_and_left_alone(path: Path) -> None:
    async with serving(path):
        with refused_to_serve("listens on"):
            async with serving(path):
                pass
        async with raw(path) as client:
            assert "return" in await client.ask('{"execute":"query-version"}')


async def test_a_live_socket_with_a_full_backlog_is_refused_too(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))
        with refused_to_serve("listens on"):
            async with serving(path):
                pass


async def test_controllers_that_start_at_once_in_one_directory_all_get_their_socket(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.sock" for number in range(8)]
    async with trio.open_nursery() as serving_all:

        async def start(path: Path) -> None:
            await serving_all.start(ControlServer(path, HANDLERS).serve)

        async with trio.open_nursery() as starting:
            for each in paths:
                starting.start_soon(start, each)
        for each in paths:
            async with raw(each):
                pass
        serving_all.cancel_scope.cancel()


async def test_a_directory_that_somebody_else_keeps_locked_is_one_clear_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_socket, "LOCK_TIMEOUT", 0.05)
    fd = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with refused_to_serve("holds a lock"):
            async with serving(path):
                pass
    finally:
        os.close(fd)


async def test_a_file_that_is_no_socket_is_refused_and_left_alone(path: Path) -> None:
    put(path, "precious")
    with refused_to_serve("no socket"):
        async with serving(path):
            pass
    assert content(path) == "precious"


async def test_a_path_too_long_for_a_socket_is_refused_with_the_limit(tmp_path: Path) -> None:
    with refused_to_serve("at most 106 bytes"):
        async with serving(tmp_path / ("a" * 108)):
            pass


async def test_a_directory_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with refused_to_serve("cannot be made: No such file"):
        async with serving(tmp_path / "a" / "b" / "control.sock"):
            pass


async def test_a_socket_that_somebody_put_in_our_place_is_not_removed(path: Path) -> None:
    async with serving(path):
        put(path, "somebody else's")
    assert content(path) == "somebody else's"


# The client against others


async def test_the_client_says_what_is_wrong_with_a_path(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ControlUnreachable, match="no control socket"):
        async with open_control(path):
            pass
    with dead_socket(path), pytest.raises(ControlUnreachable, match="nobody listens"):
        async with open_control(path):
            pass


@pytest.mark.parametrize(
    ("sends", "match"),
    [
        (
            b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 22}, "package": ""}}}\r\n',
            "another program",
        ),
        (b"SSH-2.0-OpenSSH\r\n", "not a controller"),
        (b'{"hello": 1}\r\n', "not a controller"),
        (b"", "closed the connection"),
    ],
)
async def test_the_client_knows_a_strangers_socket(path: Path, sends: bytes, match: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.sendall(sends)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, answer)
            with pytest.raises(ControlUnreachable, match=match):
                async with open_control(path):
                    pass


async def test_the_client_gives_up_on_a_socket_that_says_nothing(
    path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(ControlUnreachable, match="nothing was received"):
            async with open_control(path):
                pass


async def test_the_client_says_that_an_answer_did_not_come_in_time(path: Path) -> None:
    async def never(_: object) -> None:
        await trio.sleep_forever()

    async with serving(path, {"failover": never}), open_control(path) as client:
        with pytest.raises(ControlUnreachable, match="no answer to failover within"):
            await client.execute("failover", timeout=0.01)


REFERENCE = """\
import asyncio, sys
from qemu.qmp import QMPClient, ExecuteError

async def main():
    client = QMPClient("reference")
    await client.connect(sys.argv[1])
    with client.listener() as events:
        print((await client.execute("query-replication"))["replication"])
        print((await client.execute("failover", {"checkpoints": [12]}))["checkpoint"])
        try:
            await client.execute("system_reset")
        except ExecuteError as error:
            print(error.error_class)
        print((await events.get())["event"])
    await client.disconnect()

asyncio.run(main())
"""


async def test_qemus_own_client_can_talk_to_it(path: Path) -> None:
    async def then_emit(arguments: FailoverArguments) -> FailoverResult:
        server.emit(EventName.FAILOVER_COMPLETED, FailoverCompleted(PairName("vm"), EpochNumber(12)))
        return await failover(arguments)

    async with serving(path, {"query-replication": query, "failover": then_emit}) as server:
        with trio.fail_after(30):
            done = await trio.run_process(
                [sys.executable, "-c", REFERENCE, os.fspath(path)], capture_stdout=True, stderr=subprocess.STDOUT
            )
    assert done.stdout.decode().split() == ["protected", "12", "CommandNotFound", "FAILOVER_COMPLETED"]
