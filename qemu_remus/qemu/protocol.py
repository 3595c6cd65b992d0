"""QMP as a sans-IO session: bytes in, events out; commands in, bytes out.

Owned here: framing, JSON, and what a QMP server may say when.  No socket, no clock, no trio.  Faults are the classes of
``qemu.qmp`` (all of them :class:`qemu.qmp.ProtocolError`); the client turns them into ours.  After a fault the session
stays broken, and nothing of the bad message is used.

Format: ``docs/interop/qmp-spec`` of QEMU.  One JSON object a line, CR LF at its end; or, on a monitor with
``pretty=on``, an object over several lines, of which the first is ``{`` and the last ``}``, alone and not indented.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

import msgspec
from qemu.qmp import Message, Runstate, StateError
from qemu.qmp.error import ProtocolError
from qemu.qmp.message import DeserializationError, UnexpectedTypeError
from qemu.qmp.models import ErrorResponse
from qemu.qmp.models import Greeting as GreetingModel
from qemu.qmp.qmp_client import BadReplyError, GreetingError

from qemu_remus.qemu.commands import Command

MAX_MESSAGE: Final = 32 * 1024 * 1024
"""Longest message that is taken from a server, in bytes; the largest ordinary one, the schema, has about 200,000."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """The server's first message.

    :param version: major, minor, micro.
    :param package: the distributor's own version text, may be empty.
    """

    version: tuple[int, int, int]
    package: str
    order: int


@dataclass(frozen=True, slots=True)
class Reply:
    """A command has succeeded.

    :param order: place in the sequence of all messages received on this connection, from 0.
    """

    id: str
    value: Any
    order: int


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """A command was refused."""

    id: str
    command: str
    qmp_class: str
    desc: str
    order: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened in QEMU.

    :param timestamp: seconds since 1970 by QEMU's host's clock; 0.0 where QEMU could not tell.
    """

    name: str
    data: Mapping[str, Any]
    timestamp: float
    order: int


class NeedData(Enum):
    """The type of :data:`NEED_DATA`."""

    NEED_DATA = "need-data"


NEED_DATA: Final = NeedData.NEED_DATA
"""No complete message is buffered."""

_LATER: Final = frozenset({"event", "return", "error"})
"""Members by which messages are known that come after the greeting."""

Received = Greeting | Reply | ErrorReply | Event


class QmpSession:
    """One connection's protocol state.

    :param id_prefix: begins every command's id.  QEMU may answer a command of the connection before ours on our
        connection, even before it greets us, so it must differ between connections; replies with other ids are counted
        and dropped.
    """

    def __init__(self, id_prefix: str, *, max_message: int = MAX_MESSAGE) -> None:
        self._prefix = f"{id_prefix}."
        self._max_message = max_message
        self._state = Runstate.CONNECTING
        self._buffer = bytearray()
        self._scanned = 0
        self._multiline = bytearray()
        self._outstanding: dict[str, Message] = {}
        self._next_id = 1
        self._next_order = 0
        self.strays = 0
        """Replies dropped because they answer somebody else's command, and all that came before the greeting."""

    @property
    def outstanding(self) -> int:
        """Commands sent and not answered."""
        return len(self._outstanding)

    def send_command(self, command: Command) -> tuple[str, bytes]:
        """Give a command its id.

        :return: the id that the reply will carry, and the bytes to send.
        :raise StateError: before the greeting, and when the session is broken.
        """
        self._require(Runstate.RUNNING)
        ident = f"{self._prefix}{self._next_id}"
        self._next_id += 1
        message = {"execute": command.name, "arguments": dict(command.arguments), "id": ident}
        self._outstanding[ident] = Message(message, eager=False)
        return ident, msgspec.json.encode(message) + b"\n"

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the server, any number of them.

        :raise StateError: when the session is broken.
        """
        self._require(Runstate.CONNECTING, Runstate.RUNNING)
        self._buffer += data

    def next_event(self) -> Received | NeedData:
        """The next message, or :data:`NEED_DATA`.

        :raise ProtocolError: when the server breaks the protocol; :class:`GreetingError` when what it says first is no
            QMP greeting.
        :raise StateError: when the session is broken.
        """
        self._require(Runstate.CONNECTING, Runstate.RUNNING)
        try:
            while (raw := self._next_object()) is not None:
                received = self._interpret(_decode(raw))
                if received is not None:
                    return received
        except ProtocolError as error:
            greeting = self._state is Runstate.CONNECTING
            self._state = Runstate.DISCONNECTING
            self._buffer.clear()
            if greeting and not isinstance(error, GreetingError):
                raise GreetingError("the first message is not a QMP greeting", error) from error
            raise
        return NEED_DATA

    def _require(self, *states: Runstate) -> None:
        if self._state not in states:
            raise StateError(f"the QMP session is {self._state.name}", self._state, states[-1])

    # --- framing

    def _next_object(self) -> bytes | None:
        while True:
            end = self._buffer.find(b"\n", self._scanned)
            if end < 0:
                self._scanned = len(self._buffer)
                self._check_partial()
                return None
            line = bytes(self._buffer[:end]).rstrip(b"\r")
            del self._buffer[: end + 1]
            self._scanned = 0
            if len(line) + len(self._multiline) > self._max_message:
                raise ProtocolError(f"a message is longer than {self._max_message} bytes")
            if self._multiline:
                self._multiline += line
                if line == b"}":
                    whole = bytes(self._multiline)
                    self._multiline.clear()
                    return whole
            elif line == b"{":
                self._multiline += line
            elif line.strip():
                return line

    def _check_partial(self) -> None:
        if len(self._buffer) + len(self._multiline) > self._max_message:
            raise ProtocolError(f"a message is longer than {self._max_message} bytes")
        # Something that never sends a line end must not pass for a server that is slow with its greeting.
        start = self._buffer.lstrip()[:1]
        if self._state is Runstate.CONNECTING and not self._multiline and start and start != b"{":
            raise ProtocolError("the server does not send JSON objects")

    # --- meaning

    def _interpret(self, message: Message) -> Received | None:
        order = self._next_order
        self._next_order += 1
        if self._state is Runstate.CONNECTING:
            # QEMU answers from another thread than it accepts in: what was meant for our predecessor may come first.
            if message.keys() & _LATER:
                self.strays += 1
                return None
            greeting = _greeting(message, order)
            self._state = Runstate.RUNNING
            return greeting
        if "event" in message:
            return _event(message, order)
        if "return" not in message and "error" not in message:
            raise BadReplyError("a message is neither reply, error nor event", message, Message({}))
        ident = message.get("id")
        if not isinstance(ident, str) or not ident.startswith(self._prefix):
            self.strays += 1
            return None
        sent = self._outstanding.pop(ident, None)
        if sent is None:
            raise BadReplyError(f"nothing is waiting for the reply to {ident}", message, Message({}))
        if "return" in message:
            return Reply(ident, message["return"], order)
        try:
            error = ErrorResponse(message).error
        except (KeyError, TypeError) as fault:
            raise BadReplyError(str(fault), message, sent) from fault
        return ErrorReply(ident, str(sent["execute"]), error.class_, error.desc, order)


def _decode(raw: bytes) -> Message:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        # The standard decoder takes a little more (lone surrogates), and its refusal is the one that Message describes.
        try:
            return Message(raw)
        except ProtocolError:
            raise
        except (ValueError, RecursionError) as error:
            raise DeserializationError("Failed to deserialize QMP message.", raw) from error
    if not isinstance(value, dict):
        raise UnexpectedTypeError("QMP message is not a JSON object.", value)
    return Message(value, eager=False)


def _greeting(message: Message, order: int) -> Greeting:
    try:
        version = GreetingModel(message).QMP.version
        numbers = version["qemu"]
        package = version.get("package", "")
        if not isinstance(numbers, Mapping) or not isinstance(package, str):
            raise TypeError("the greeting's version has the wrong type")  # noqa: TRY301
        major, minor, micro = (numbers[part] for part in ("major", "minor", "micro"))
        if not all(isinstance(part, int) for part in (major, minor, micro)):
            raise TypeError("the greeting's version is not made of numbers")  # noqa: TRY301
    except (KeyError, TypeError) as error:
        raise GreetingError(str(error), error) from error
    return Greeting((major, minor, micro), package.strip(), order)


def _event(message: Message, order: int) -> Event:
    name, data, stamp = message["event"], message.get("data", {}), message.get("timestamp", {})
    if not isinstance(name, str) or not isinstance(data, Mapping) or not isinstance(stamp, Mapping):
        raise UnexpectedTypeError("QMP event has members of the wrong type.", dict(message))
    seconds, micros = stamp.get("seconds", 0), stamp.get("microseconds", 0)
    if not isinstance(seconds, int) or not isinstance(micros, int):
        raise UnexpectedTypeError("QMP event has members of the wrong type.", dict(message))
    # QEMU says -1 for both where its clock failed.
    return Event(name, data, 0.0 if seconds < 0 else seconds + max(micros, 0) / 1_000_000, order)
