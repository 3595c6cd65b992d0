"""A small QMP client for the tests' own use; it shares nothing with the package, whose client is under test.

Also speaks to the controllers' control sockets, which are QMP servers too. One command at a time.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

#: What a line may hold at most, in bytes; query-qmp-schema is the longest with some 250 kB.
LINE_LIMIT = 8 << 20


class QmpError(Exception):
    """The server answered with an error."""

    def __init__(self, command: str, qmp_class: str, desc: str) -> None:
        super().__init__(f"{command}: {qmp_class}: {desc}")
        self.qmp_class = qmp_class
        self.desc = desc


class Qmp:
    """A connection in command mode.

    :ivar greeting: what the server said first.
    :ivar events: the newest events that came in between replies.
    :ivar counts: how many events of each name have come so far.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._lock = trio.Lock()
        self._number = 0
        self.greeting: dict[str, Any] = {}
        self.events: deque[dict[str, Any]] = deque(maxlen=10_000)
        self.counts: Counter[str] = Counter()

    async def execute(self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = 30.0) -> Any:
        """Run a command and return what it returns.

        :raise QmpError: when the server refuses.
        :raise EOFError: when the connection ends first.
        :raise TimeoutError: when no reply comes within ``timeout`` seconds.
        """
        self._number += 1
        # the answer to a command that somebody stopped waiting for must not pass for the next one's
        message: dict[str, Any] = {"execute": command, "id": self._number}
        if arguments:
            message["arguments"] = arguments
        async with self._lock:
            with _deadline(timeout, command):
                try:
                    await self._stream.send_all(json.dumps(message).encode() + b"\n")
                except trio.BrokenResourceError as error:
                    raise EOFError("the QMP connection has ended") from error
                while True:
                    reply = await self._receive()
                    if "event" in reply:
                        self.events.append(reply)
                    elif reply.get("id", message["id"]) != message["id"]:
                        continue
                    elif "error" in reply:
                        raise QmpError(command, reply["error"]["class"], reply["error"]["desc"])
                    else:
                        return reply["return"]

    async def wait_event(self, name: str, *, timeout: float = 30.0) -> dict[str, Any]:
        """The next event of this name, of those that came already or that come yet; all before it are dropped.

        :raise TimeoutError: when it does not come within ``timeout`` seconds.
        """
        async with self._lock:
            with _deadline(timeout, f"event {name}"):
                while True:
                    event = self.events.popleft() if self.events else await self._receive()
                    if event.get("event") == name:
                        return event

    async def _receive(self) -> dict[str, Any]:
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > LINE_LIMIT:
                raise ValueError("a QMP line is longer than any should be")
            try:
                data = await self._stream.receive_some(65536)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                raise EOFError("the QMP connection ended")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self.counts[message["event"]] += 1
        return message


@contextmanager
def _deadline(seconds: float, what: str) -> Iterator[None]:
    """``trio.fail_after`` with the built-in TimeoutError and a text."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise TimeoutError(f"no answer to {what} within {seconds:g} s")


@asynccontextmanager
async def open_qmp(path: Path, *, timeout: float = 10.0) -> AsyncIterator[Qmp]:
    """Connect and negotiate.

    :raise OSError: when nobody listens there.
    :raise TimeoutError: when nobody greets us, as where another client is connected.
    """
    stream = await trio.open_unix_socket(str(path))
    async with stream:
        qmp = Qmp(stream)
        with _deadline(timeout, f"the connection to {path}"):
            # what was meant for the client before us may come first
            while "QMP" not in (message := await qmp._receive()):
                pass
            qmp.greeting = message["QMP"]
        await qmp.execute("qmp_capabilities", timeout=timeout)
        yield qmp
