"""A client of the control socket, for the command line: one command after another, events read past.

Owns one connection.  Bytes are :mod:`qemu_remus.core.dialect`'s.  It talks to our controllers only; QEMU's QMP sockets
are :mod:`qemu_remus.qemu`'s.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from qemu_remus.core import dialect, errors
from qemu_remus.core.errors import ControlError, ControlUnreachable

REPLY_LIMIT: Final = 16 * 1024 * 1024
"""Longest reply, in bytes."""
_RECEIVE_SIZE: Final = 64 * 1024
_PACKAGE: Final = "qemu-remus"

_CLASSES: Final[Mapping[str, type[ControlError]]] = {
    kind.qmp_class: kind
    for kind in (
        errors.CommandNotFound,
        errors.NotProtected,
        errors.NotConsistent,
        errors.CommitInDoubt,
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

    async def execute(self, name: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 10.0) -> Any:
        """Run a command and return its answer as JSON.

        :param timeout: seconds.
        :raise ControlError: the controller's refusal, as the subclass that belongs to the error class in its reply.
        :raise ControlUnreachable: when the connection is gone, or no reply came in time; what became of the command is
            then unknown.
        """
        self._number += 1
        ident = self._number
        with self._deadline(timeout, f"no answer to {name} within {timeout:g} s"):
            try:
                await self._stream.send_all(dialect.request(name, arguments, ident))
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._gone() from error
            while True:
                message = await self._receive()
                if "event" in message:
                    continue
                if "error" in message:
                    raise _refusal(message["error"])
                if message.get("id") == ident and "return" in message:
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

    async def _receive(self) -> dict[str, Any]:
        while isinstance(found := self._objects.next_object(), dialect.NeedData):
            try:
                data = await self._stream.receive_some(_RECEIVE_SIZE)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise self._gone() from error
            if not data:
                raise self._gone()
            self._objects.receive_data(bytes(data))
        if not isinstance(found, bytes):
            raise self._not_ours()
        try:
            message: dict[str, Any] = msgspec.json.decode(found)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._not_ours() from error
        return message

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
    """Connect to a controller.

    :param timeout: seconds for the connection and for each step of the negotiation.
    :raise ControlUnreachable: when there is no such socket, nobody listens on it, or it is no controller's.
    """
    stream = await _connect(path, timeout)
    async with stream:
        client = ControlClient(stream, path)
        await client.handshake(timeout)
        yield client


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


def _refusal(error: Mapping[str, Any]) -> ControlError:
    kind = _CLASSES.get(str(error.get("class")), ControlError)
    return kind(str(error.get("desc", "no reason given")))
