"""A client of the control socket: one command after another, events read past.

Owns one connection.  A command that is given up, by a time-out or a cancellation, ends it: its answer could come at any
time, and the server works on one command of a connection at a time.  Bytes are :mod:`qemu_remus.core.dialect`'s.  It
talks to our controllers only; QEMU's QMP sockets are :mod:`qemu_remus.qemu`'s.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from qemu_remus.core import dialect, errors
from qemu_remus.core.errors import ControlError, ControlUnreachable, QemuRemusError

REPLY_LIMIT: Final = 16 * 1024 * 1024
"""Longest reply, in bytes."""
_RECEIVE_SIZE: Final = 64 * 1024
_PACKAGE: Final = "qemu-remus"

_CLASSES: Final[Mapping[str, type[QemuRemusError]]] = {
    kind.control_class: kind
    for kind in (
        errors.CommandNotFound,
        errors.NotProtected,
        errors.NotConsistent,
        errors.CommitInDoubt,
        errors.EpochLost,
        errors.OutOfOrder,
        errors.Refused,
        errors.TimedOut,
    )
}


class ControlClient:
    """A negotiated connection to a controller."""

    def __init__(self, stream: trio.SocketStream, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._objects = dialect.ObjectReader(REPLY_LIMIT)
        self._number = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether no further command can be run: closed, or one was given up."""
        return self._closed

    def close(self) -> None:
        """End the connection; a command under way goes on at the controller's."""
        self._closed = True
        self._stream.socket.close()

    async def is_alive(self) -> bool:
        """Whether the controller has not ended the connection, as far as can be said without waiting.

        Between commands only. The events that have come meanwhile are dropped.
        """
        try:
            # The end, where there is one, comes behind whatever was sent before it.
            while not self._closed and self._stream.socket.is_readable():
                self._objects.receive_data(await self._receive_some())
                while isinstance(self._objects.next_object(), bytes):
                    pass
        except ControlUnreachable:
            self.close()
        return not self._closed

    async def execute(self, name: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 10.0) -> Any:
        """Run a command and return its answer as JSON.

        :param timeout: seconds.
        :raise ControlError: the controller's refusal, as the subclass that belongs to the error class in its reply.
        :raise EpochLost: likewise.
        :raise ControlUnreachable: when the connection is gone, or no reply came in time; its ``in_doubt`` says whether
            the command was sent, so that what became of it is unknown.
        """
        self._number += 1
        answered = sent = False
        try:
            with self._deadline(timeout, f"no answer to {name} within {timeout:g} s"):
                try:
                    await self._stream.send_all(dialect.request(name, arguments, self._number))
                except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                    raise self._gone() from error
                sent = True
                message = await self._reply(self._number)
            answered = True
        except ControlUnreachable as error:
            error.in_doubt = sent
            raise
        finally:
            if not answered:
                self.close()
        if "error" in message:
            raise _refusal(message["error"])
        return message["return"]

    async def handshake(self, timeout: float) -> None:
        """Take the greeting and negotiate.

        :raise ControlUnreachable: when that is not a controller's greeting.
        """
        with self._deadline(timeout, f"nothing was received within {timeout:g} s"):
            message = await self._receive()
        if "error" in message:
            raise ControlUnreachable(f"the controller on {self._path} says: {_refusal(message['error']).what}")
        try:
            package = str(message["QMP"]["version"]["package"])
        except (KeyError, TypeError) as error:
            raise self._not_ours() from error
        if not package.startswith(_PACKAGE):
            raise ControlUnreachable(
                f"{self._path} is the QMP socket of another program, not a controller's control socket",
                hint="give the path that the controller was started with as --control, or leave it out",
            )
        await self.execute("qmp_capabilities", timeout=timeout)

    async def _reply(self, ident: int) -> dict[str, Any]:
        while True:
            message = await self._receive()
            if "event" in message:
                continue
            # The server could not read the id of what it found unreadable; nothing else of ours is under way.
            if message.get("id", ident) == ident and ("error" in message or "return" in message):
                return message
            raise self._not_ours()

    async def _receive(self) -> dict[str, Any]:
        while isinstance(found := self._objects.next_object(), dialect.NeedData):
            self._objects.receive_data(await self._receive_some())
        if not isinstance(found, bytes):
            raise self._not_ours()
        try:
            message: dict[str, Any] = msgspec.json.decode(found)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._not_ours() from error
        return message

    async def _receive_some(self) -> bytes:
        try:
            data = await self._stream.receive_some(_RECEIVE_SIZE)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise self._gone() from error
        if not data:
            raise self._gone()
        return bytes(data)

    @contextmanager
    def _deadline(self, seconds: float, what: str) -> Iterator[None]:
        try:
            with trio.fail_after(seconds):
                yield
        except trio.TooSlowError as error:
            raise ControlUnreachable(
                f"the controller on {self._path} does not answer: {what}",
                hint="see its log; it may be asked again",
            ) from error

    def _gone(self) -> ControlUnreachable:
        return ControlUnreachable(f"the controller on {self._path} closed the connection", hint="see its log")

    def _not_ours(self) -> ControlUnreachable:
        return ControlUnreachable(
            f"whatever listens on {self._path} is not a controller of qemu-remus",
            hint="give the path that the controller was started with as --control, or leave it out",
        )


@asynccontextmanager
async def open_control(path: Path, *, timeout: float = 5.0) -> AsyncIterator[ControlClient]:
    """:func:`connect_control`, and the connection's end."""
    client = await connect_control(path, timeout=timeout)
    try:
        yield client
    finally:
        client.close()


async def connect_control(path: Path, *, timeout: float = 5.0) -> ControlClient:
    """Connect to a controller.

    :param timeout: seconds for the connection and for each step of the negotiation.
    :raise ControlUnreachable: when there is no such socket, nobody listens on it, or it is no controller's.
    """
    client = ControlClient(await _connect(path, timeout), path)
    try:
        await client.handshake(timeout)
    except BaseException:
        client.close()
        raise
    return client


async def _connect(path: Path, timeout: float) -> trio.SocketStream:
    try:
        with trio.fail_after(timeout):
            return await trio.open_unix_socket(path)
    except FileNotFoundError as error:
        raise ControlUnreachable(
            f"there is no control socket {path}",
            hint="is the controller running on this host? Its log names its control socket",
        ) from error
    except ConnectionRefusedError as error:
        raise ControlUnreachable(
            f"nobody listens on {path}: the controller has ended without cleaning up",
            safe="the VM, if it is a primary's, goes on unprotected",
            hint="start the controller again with the same options",
        ) from error
    except PermissionError as error:
        raise ControlUnreachable(
            f"{path} may not be used by this user", hint="use the account that runs the controller, or root"
        ) from error
    except trio.TooSlowError as error:
        raise ControlUnreachable(f"the controller on {path} does not accept connections", hint="see its log") from error
    except OSError as error:
        raise ControlUnreachable(f"{path} cannot be connected to: {error.strerror or error}") from error


def _refusal(error: Mapping[str, Any]) -> QemuRemusError:
    kind = _CLASSES.get(str(error.get("class")), ControlError)
    return kind(str(error.get("desc", "no reason given")))
