"""The QMP dialect in bytes, sans I/O: what our control socket's server and client read and write.

Owns framing, the shape of requests, and the encoding of greetings, replies and events.  No streams, no clock, and no
knowledge of any command beyond ``qmp_capabilities`` being one (:mod:`qemu_remus.core.commands` has the table).

The form is the one of QEMU's "QEMU Machine Protocol Specification": JSON objects one after another; we end ours with
CR LF, and take a client's with or without anything between them.  What we leave out: out-of-band execution, and
single-quoted strings.  After input that is no JSON object we answer with an error and go on behind the next newline.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

REQUEST_LIMIT: Final = 64 * 1024
"""Longest request, in bytes."""

DEPTH_LIMIT: Final = 64
"""Deepest nesting of objects and arrays in one object."""

_OUTSIDE_STRING: Final = re.compile(rb'["{}\[\]]')
_INSIDE_STRING: Final = re.compile(rb'["\\\n]')
_TO_BRACKET: Final = re.compile(rb'(?:[^"{}\[\]\n]++|"[^"\\\n]*+")*+([{}\[\]])')
"""On to the next bracket, over whole strings without escapes."""
_SPACE: Final = b" \t\r\n"
_EXPECTED: Final = frozenset({"execute", "arguments", "id"})


@dataclass(frozen=True, slots=True)
class NeedData:
    """There is no whole object yet."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """Input that is no JSON object; it was skipped."""

    why: str


@dataclass(frozen=True, slots=True)
class Unreadable:
    """An object beyond a limit. Nothing can be read behind it: close the connection."""

    why: str


NEED_DATA: Final = NeedData()


@dataclass(frozen=True, slots=True)
class Request:
    """One command as it came, its arguments not checked yet.

    :param ident: the client's ``id`` as a one-member mapping, or empty where it sent none; replies repeat it.
    """

    name: str
    arguments: Mapping[str, Any]
    ident: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BadRequest:
    """Something that is no request.

    :param why: for the error reply.
    :param ident: as in :class:`Request`, as far as it could be read.
    :param fatal: the connection must be closed after the reply.
    """

    why: str
    ident: Mapping[str, Any]
    fatal: bool = False


class ObjectReader:
    """Cuts a stream of bytes into JSON objects, without parsing them.

    :param limit: most bytes of one object; the buffer never holds more than that and one ``receive_data``.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._in_string = False
        self._skipping = False
        self._unreadable: Unreadable | None = None

    def receive_data(self, data: bytes | bytearray) -> None:
        """Take bytes from the stream."""
        if self._unreadable is None:
            self._buffer += data

    def next_object(self) -> bytes | Garbage | Unreadable | NeedData:
        """The next object's bytes, or what is there instead of it; after an :class:`Unreadable`, only that."""
        if self._unreadable is not None:
            return self._unreadable
        if self._skipping and not self._skip_line():
            return NEED_DATA
        if self._depth == 0:
            self._drop_space()
            if not self._buffer:
                return NEED_DATA
            if self._buffer[:1] != b"{":
                self._skipping = True
                self._skip_line()
                return Garbage("a JSON object was expected")
            if self._scanned == 0 and (end := self._simple_end()) is not None:
                return self._take(end)
        return self._scan()

    def _simple_end(self) -> int | None:
        """Where an object ends that has come whole, on one line and without escapes, as nearly all do; else None.

        It saves the steps of the scan, of which a quarter of the time for a command would be spent.
        """
        end = depth = 0
        while (match := _TO_BRACKET.match(self._buffer, end)) is not None:
            end = match.end()
            if end > self._limit or depth == DEPTH_LIMIT:
                return None
            depth += 1 if match.group(1) in b"{[" else -1
            if depth == 0:
                return end
        return None

    def _scan(self) -> bytes | Garbage | Unreadable | NeedData:
        while True:
            pattern = _INSIDE_STRING if self._in_string else _OUTSIDE_STRING
            match = pattern.search(self._buffer, self._scanned)
            self._scanned = len(self._buffer) if match is None else match.end()
            # Before anything else, so that the same bytes are refused however they were cut on their way.
            if self._scanned > self._limit:
                return self._give_up(f"more than {self._limit} bytes in one object")
            if match is None:
                return NEED_DATA
            character = match.group()
            if character == b"\\":
                if self._scanned == len(self._buffer):
                    self._scanned -= 1
                    return NEED_DATA
                self._scanned += 1
            elif character == b"\n":
                # No JSON string holds one: the closing quote is missing.
                self._take(self._scanned)
                return Garbage("a string does not end")
            elif character == b'"':
                self._in_string = not self._in_string
            elif character in b"{[":
                self._depth += 1
                if self._depth > DEPTH_LIMIT:
                    return self._give_up(f"more than {DEPTH_LIMIT} levels in one object")
            else:
                self._depth -= 1
                if self._depth == 0:
                    return self._take(self._scanned)

    def _give_up(self, why: str) -> Unreadable:
        self._buffer.clear()
        self._unreadable = Unreadable(why)
        return self._unreadable

    def _take(self, end: int) -> bytes:
        taken = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._scanned = 0
        self._depth = 0
        self._in_string = False
        return taken

    def _drop_space(self) -> None:
        start = len(self._buffer) - len(self._buffer.lstrip(_SPACE))
        del self._buffer[:start]

    def _skip_line(self) -> bool:
        end = self._buffer.find(b"\n")
        if end < 0:
            self._buffer.clear()
            return False
        del self._buffer[: end + 1]
        self._skipping = False
        return True


class RequestReader:
    """The server's side: bytes in, requests out."""

    def __init__(self, limit: int = REQUEST_LIMIT) -> None:
        self._objects = ObjectReader(limit)

    def receive_data(self, data: bytes | bytearray) -> None:
        """Take bytes from the client."""
        self._objects.receive_data(data)

    def next_event(self) -> Request | BadRequest | NeedData:
        """The next request, or what is there instead of it."""
        found = self._objects.next_object()
        if isinstance(found, NeedData):
            return found
        if isinstance(found, Unreadable):
            return BadRequest(f"JSON parse error, {found.why}", {}, fatal=True)
        if isinstance(found, Garbage):
            return BadRequest(f"JSON parse error, {found.why}", {})
        try:
            return _request(msgspec.json.decode(found))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return BadRequest(f"JSON parse error, {error}", {})


def _request(value: Mapping[str, Any]) -> Request | BadRequest:
    ident = {"id": value["id"]} if "id" in value else {}
    if "exec-oob" in value:
        return BadRequest("Out-of-band execution is not on offer", ident)
    for member in value:
        if member not in _EXPECTED:
            return BadRequest(f"QMP input member '{member}' is unexpected", ident)
    if "execute" not in value:
        return BadRequest("QMP input lacks member 'execute'", ident)
    name = value["execute"]
    if not isinstance(name, str):
        return BadRequest("QMP input member 'execute' must be a string", ident)
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return BadRequest("QMP input member 'arguments' must be an object", ident)
    return Request(name, arguments, ident)


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as one line, CR LF included."""
    return msgspec.json.encode(message) + b"\r\n"


def greeting(version: str, package: str) -> bytes:
    """The server's first line.

    :param version: of this program, ``MAJOR.MINOR.MICRO``.
    :param package: the program's name and version.
    """
    return encode({"QMP": {"version": version_info(version, package), "capabilities": []}})


def version_info(version: str, package: str) -> dict[str, Any]:
    """The answer of ``query-version``, in QMP's form."""
    major, minor, micro = (int(number) for number in version.split("."))
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": package}


def returned(value: Any, ident: Mapping[str, Any]) -> bytes:
    """A success reply.

    :param value: JSON in QMP's spelling.
    """
    return encode({"return": value, **ident})


def failed(qmp_class: str, desc: str, ident: Mapping[str, Any]) -> bytes:
    """An error reply."""
    return encode({"error": {"class": qmp_class, "desc": desc}, **ident})


def event(name: str, data: Any, now: float) -> bytes:
    """An event.

    :param now: seconds since 1970.
    """
    seconds, microseconds = divmod(round(now * 1_000_000), 1_000_000)
    return encode(
        {"timestamp": {"seconds": seconds, "microseconds": microseconds}, "event": name, "data": data},
    )


def request(name: str, arguments: Mapping[str, Any] | None, ident: int) -> bytes:
    """A client's request."""
    body: dict[str, Any] = {"execute": name, "id": ident}
    if arguments:
        body["arguments"] = dict(arguments)
    return encode(body)
