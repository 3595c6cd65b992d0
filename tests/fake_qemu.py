"""A QEMU for tests without one: its QMP, over as much of its block graph as we touch (:mod:`tests.fake_block`).

It is of a captured version. Every command is checked against that one's schema first, and every answer as well; a
violation fails the test. What QEMU would refuse is refused, in QEMU's words where code looks at them; what would abort
QEMU ends the connection and is told in ``aborted``. Tests make it go wrong on purpose with :meth:`FakeQemu.refuse`,
``mute``, ``hang_up_before`` and ``hang_up_after``, and have things happen before or after a command with ``before`` and
``after``.

Rules: it keeps no time, and never waits but where a test has it :meth:`FakeQemu.hang`; events come before the reply of
the command that causes them, except for ``BLOCK_EXPORT_DELETED``, which comes after it, as in QEMU.
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import trio
import trio.testing

from qemu_remus.qemu.client import PeerCredentials, QmpClient, open_qmp_over
from qemu_remus.qemu.schema import Captured, Schema
from tests.fake_block import VIRTIO, Abort, Bitmap, Device, Node, Refusal
from tests.fake_push import FakePush
from tests.qmp_validation import QEMU_SCHEMAS, Validator, captured

__all__ = ["GREETING", "VIRTIO", "Abort", "Bitmap", "Device", "FakeQemu", "Node", "Refusal", "greeting"]


def greeting(schema: Captured) -> dict[str, Any]:
    """What the QEMU of a captured schema says first."""
    major, minor, micro = schema.version
    version = {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": "fake"}
    return {"QMP": {"version": version, "capabilities": ["oob"]}}


OLDEST = captured(QEMU_SCHEMAS[0])
GREETING = greeting(OLDEST)


class FakeQemu(FakePush):
    """One QEMU process, as far as QMP goes. ``with`` it, so that its NBD socket is closed."""

    def __init__(self, schema: Captured = OLDEST) -> None:
        super().__init__(Schema(schema.entries))
        self.version = schema.version
        self.greeting = greeting(schema)
        self.schema = list(schema.entries)
        self._validator = Validator(schema)
        self.status = "running"
        self.shutdown_action = "poweroff"
        self.ended = False
        """It was told to quit."""
        self.written = 0
        """How often the guest has written to each disk, as ``query-blockstats`` has it."""
        self.aborted = ""
        self.log: list[tuple[str, dict[str, Any]]] = []
        """Every command that came, in order, with its arguments."""
        self.mute: set[str] = set()
        """Commands that are done and never answered."""
        self.before: dict[str, Callable[[], object]] = {}
        self.after: dict[str, Callable[[], object]] = {}
        """What happens in QEMU just before, or after, it executes a command; once. Its events come before the reply."""
        self.hang_up_before: set[str] = set()
        self.hang_up_after: set[str] = set()
        """Commands at which the connection ends, before or after they are done, without a reply."""
        self._refusals: Counter[tuple[str, str]] = Counter()
        self._pending: list[dict[str, Any]] = []
        self._stream: trio.abc.Stream | None = None
        self._gone_on: trio.Event | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_nbd()
        self.close_files()

    # --- what tests do to it

    def refuse(self, command: str, desc: str = "refused by the test", *, times: int = 1) -> None:
        """Refuse the next commands of a name."""
        self._refusals[command, desc] += times

    def hang(self) -> None:
        """Do and say nothing, from the next command on, until :meth:`go_on`; then do all that has come meanwhile."""
        self._gone_on = trio.Event()

    def go_on(self) -> None:
        """Hang no more."""
        if self._gone_on is not None:
            self._gone_on.set()

    def commands(self, *, queries: bool = False) -> list[str]:
        """Names of the commands that came, without the queries."""
        return [name for name, _ in self.log if queries or not name.startswith(("query-", "qom-get", "qom-list", "x-"))]

    # --- the wire

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one client until either end closes the connection."""
        self._stream = stream
        buffer = b""
        async with stream:
            try:
                await self._send(self.greeting)
                while data := await stream.receive_some():
                    buffer += data
                    *lines, buffer = buffer.split(b"\n")
                    for line in lines:
                        if not await self._answer(json.loads(line)):
                            return
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def _answer(self, message: dict[str, Any]) -> bool:
        name = message["execute"]
        if self._gone_on is not None:
            await self._gone_on.wait()
        if name in self.hang_up_before:
            return False
        try:
            reply = {"return": self.execute(name, message.get("arguments", {})), "id": message["id"]}
        except Refusal as refusal:
            reply = {"error": {"class": refusal.qmp_class, "desc": refusal.desc}, "id": message["id"]}
        except Abort as abort:
            self.aborted = str(abort)
            return False
        late = [event for event in self._pending if event["event"] == "BLOCK_EXPORT_DELETED"]
        early = [event for event in self._pending if event["event"] != "BLOCK_EXPORT_DELETED"]
        self._pending.clear()
        await self._send(*early)
        if name in self.hang_up_after:
            return False
        await self._send(*([] if name in self.mute else [reply]), *late)
        return True

    async def _send(self, *messages: dict[str, Any]) -> None:
        if self._stream is not None and messages:
            await self._stream.send_all(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    def emit(self, event: str, **data: Any) -> None:
        """An event, sent with the next reply."""
        self._pending.append(
            {"event": event, "data": data, "timestamp": {"seconds": 1_700_000_000, "microseconds": 500_000}}
        )

    async def emit_now(self, event: str, **data: Any) -> None:
        """An event, sent at once."""
        self.emit(event, **data)
        await self._send(*self._pending)
        self._pending.clear()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[QmpClient]:
        """A client that is connected to this QEMU."""
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.serve, theirs)
            try:
                async with open_qmp_over(ours, PeerCredentials(0, 0, 0), name="the fake") as client:
                    yield client
            finally:
                # Else it would not see that the connection has ended.
                self.go_on()

    async def listen(self, path: Path, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve clients on a Unix socket, one at a time, as a QMP monitor does."""
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            await listener.bind(str(path))
            listener.listen(1)
            task_status.started()
            while True:
                connection, _ = await listener.accept()
                await self.serve(trio.SocketStream(connection))

    # --- commands

    def execute(self, name: str, arguments: dict[str, Any]) -> Any:
        """Do one command.

        :raise Refusal: when QEMU says no.
        :raise Abort: when QEMU dies of it.
        """
        self._validator.command(name, arguments)
        self.log.append((name, arguments))
        for command, desc in list(self._refusals):
            if command == name and self._refusals[command, desc] > 0:
                self._refusals[command, desc] -= 1
                raise Refusal(desc)
        handler: Callable[..., Any] | None = getattr(self, "_do_" + name.replace("-", "_"), None)
        if handler is None:
            raise AssertionError(f"the fake QEMU does not know {name}: teach it")
        self.before.pop(name, bool)()
        value = handler(**{key.replace("-", "_"): value for key, value in arguments.items()})
        self._validator.reply(name, value)
        self.after.pop(name, bool)()
        return value

    def _do_qmp_capabilities(self) -> dict[str, Any]:
        return {}

    def _do_query_version(self) -> Any:
        return self.greeting["QMP"]["version"]

    def _do_query_qmp_schema(self) -> Any:
        return self.schema

    def _do_query_kvm(self) -> Any:
        return {"enabled": False, "present": True}

    def _do_query_name(self) -> Any:
        return {"name": "fake"}

    def _do_query_chardev(self) -> Any:
        return [{"label": "qmp", "filename": "unix:/run/qmp.sock,server=on", "frontend-open": True}]

    def _do_query_vnc(self) -> Any:
        return {"enabled": False}

    def _do_query_spice(self) -> Any:
        raise Refusal("The command query-spice has not been found", "CommandNotFound")

    def _do_query_blockstats(self) -> Any:
        return [{"stats": {"wr_operations": self.written, "wr_bytes": self.written * 4096}} for _ in self.devices]

    def _do_query_accelerators(self) -> Any:
        return {"enabled": "tcg", "present": ["kvm", "qtest", "tcg"]}

    def _do_query_status(self) -> Any:
        singlestep = {"singlestep": False} if self.has("query-status/ret-type/singlestep") else {}
        return {"status": self.status, "running": self.status == "running", **singlestep}

    def _do_query_cpus_fast(self) -> Any:
        # Its threads are ours, as is the socket of its NBD server.
        return [
            {"cpu-index": 0, "qom-path": "/machine/unattached/device[0]", "thread-id": os.getpid(), "target": "x86_64"}
        ]

    def _do_stop(self) -> Any:
        if self.status == "running":
            self.status = "paused"
            self.emit("STOP")
        return {}

    def _do_set_action(self, shutdown: str) -> Any:
        self.shutdown_action = shutdown
        return {}

    def _do_quit(self) -> Any:
        self.ended = True
        return {}

    def _do_cont(self) -> Any:
        if self.status == "paused":
            self.status = "running"
            self.emit("RESUME")
        return {}
