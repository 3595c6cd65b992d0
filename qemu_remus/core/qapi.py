"""The QMP dialect's data: our dataclasses as JSON in QMP's spelling, back again, and as a QAPI introspection schema.

Owns the mapping between Python types and JSON, and nothing of what the types mean.  No bytes, no framing
(:mod:`qemu_remus.core.dialect`), no I/O.

A dataclass becomes an object whose keys have hyphens for underscores; enums their values; tuples arrays; a UUID its
usual text; None null.  Readers ignore members that they do not know, so that members may be added later; only the
*arguments* of a command are read strictly, as QEMU reads them.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin
from uuid import UUID

import msgspec

from qemu_remus.core.errors import InternalError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CommandType:
    """A command's types; both are dataclasses."""

    name: str
    arguments: type[Any]
    returns: type[Any]


@dataclass(frozen=True, slots=True)
class EventType:
    """An event's type, a dataclass."""

    name: str
    data: type[Any]


class UnexpectedMember(ValueError):
    """An argument that the command does not have.

    :param member: its name as it came.
    """

    def __init__(self, member: str) -> None:
        super().__init__(f"Parameter '{member}' is unexpected")
        self.member = member


def to_qmp(value: object) -> Any:
    """What ``value`` looks like as JSON in QMP's spelling: dicts, lists, strings, numbers, booleans and None."""
    return _rename(msgspec.to_builtins(value), "_", "-")


def from_qmp(kind: type[T], value: object) -> T:
    """Read ``value`` tolerantly: unknown members are ignored, absent ones take their defaults.

    :raise msgspec.ValidationError: when a member is missing, or not of its type.
    """
    return msgspec.convert(_rename(value, "-", "_"), kind)


def read_arguments(kind: type[T], arguments: Mapping[str, Any]) -> T:
    """Read a command's arguments strictly.

    :raise UnexpectedMember: when there is one that the command does not have.
    :raise msgspec.ValidationError: when one is missing, not of its type or out of its range.
    """
    known = {_spelling(field.name) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for member in arguments:
        if member not in known:
            raise UnexpectedMember(member)
    return from_qmp(kind, arguments)


def introspect(commands: Iterable[CommandType], events: Iterable[EventType]) -> list[dict[str, Any]]:
    """The ``query-qmp-schema`` answer for these commands and events.

    The form is QEMU's (``docs/devel/qapi-code-gen.rst`` there, "Client JSON Protocol introspection").  Unlike QEMU's,
    our type names are readable; clients must not depend on them either way.
    """
    schema = _Introspection()
    for command in commands:
        schema.entries[command.name] = {
            "name": command.name,
            "meta-type": "command",
            "arg-type": schema.name_of_arguments(command.arguments),
            "ret-type": schema.name_of(command.returns),
        }
    for event in events:
        schema.entries[event.name] = {
            "name": event.name,
            "meta-type": "event",
            "arg-type": schema.name_of(event.data),
        }
    return list(schema.entries.values())


def _spelling(name: str) -> str:
    return name.replace("_", "-")


def _rename(value: Any, old: str, new: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key).replace(old, new): _rename(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rename(item, old, new) for item in value]
    return value


class _Introspection:
    BUILTINS: Final = {
        str: ("str", "string"),
        UUID: ("str", "string"),
        int: ("int", "int"),
        float: ("number", "number"),
        bool: ("bool", "boolean"),
        type(None): ("null", "null"),
        object: ("any", "value"),
    }

    def __init__(self) -> None:
        self.entries: dict[str, dict[str, Any]] = {}

    def name_of(self, kind: Any) -> str:
        """The name of a type's entry, which is made if it is not there."""
        kind = _bare(kind)
        if kind in self.BUILTINS:
            name, json_type = self.BUILTINS[kind]
            return self._add(name, {"meta-type": "builtin", "json-type": json_type})
        origin = get_origin(kind)
        if origin is tuple:
            element = self.name_of(get_args(kind)[0])
            return self._add(f"[{element}]", {"meta-type": "array", "element-type": element})
        if origin in (Union, types.UnionType):
            members = [self.name_of(choice) for choice in get_args(kind)]
            return self._add(
                "Or".join(_capital(member) for member in members),
                {"meta-type": "alternate", "members": [{"type": member} for member in members]},
            )
        if isinstance(kind, type) and issubclass(kind, Enum):
            values = [str(member.value) for member in kind]
            enum = {"meta-type": "enum", "members": [{"name": value} for value in values], "values": values}
            return self._add(kind.__name__, enum)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return self._add_object(kind, arguments=False)
        raise InternalError(f"type {kind!r} has no form in QMP")

    def name_of_arguments(self, kind: type[Any]) -> str:
        """The same for a command's arguments, of which those with a default may be absent."""
        return self._add_object(kind, arguments=True)

    def _add(self, name: str, entry: dict[str, Any]) -> str:
        self.entries.setdefault(name, {"name": name, **entry})
        return name

    def _add_object(self, kind: type[Any], *, arguments: bool) -> str:
        name = kind.__name__
        if name in self.entries:
            return name
        members: list[dict[str, Any]] = []
        self.entries[name] = {"name": name, "meta-type": "object", "members": members}
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            member: dict[str, Any] = {"name": _spelling(field.name), "type": self.name_of(hints[field.name])}
            optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
            if arguments and optional:
                # QAPI's way to say "may be absent"; null promises nothing about the value then. Answers are complete.
                member["default"] = None
            members.append(member)
        return name


def _bare(kind: Any) -> Any:
    """Without ``Annotated`` and ``NewType``."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif isinstance(kind, typing.NewType):
            kind = kind.__supertype__
        else:
            return kind


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]
