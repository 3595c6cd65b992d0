"""Checks QMP commands against a captured schema, as strictly as QEMU does, and for what a QEMU would rather not see.

Format of a schema: QEMU's ``qapi/introspect.json``; of the files: :mod:`qemu_remus.qemu.schema`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qemu_remus.qemu.capabilities import OPTIONAL, Feature
from qemu_remus.qemu.schema import Captured, Schema, parse

SCHEMAS = Path(__file__).parent.parent / "qmp_schemas"
QEMU_SCHEMAS = sorted(
    SCHEMAS.glob("qemu-[0-9]*.json"), key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)]
)
"""By version, the oldest first."""

ACCEPTED = {
    "x-debug-query-block-graph": "unstable: before 10.1 nothing else shows what is below a filter; without it, we ask"
    " the operator",
    "blockdev-backup/x-perf": "unstable: its max-chunk alone keeps a job's requests within a cluster of a snapshot;"
    " without it, there is no push",
}
"""What we send although some QEMU marks it ``deprecated`` or ``unstable``, with the reason."""

_JSON_TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "int": (int,),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "array": (list,),
    "value": (object,),
}


class SchemaViolation(AssertionError):
    """A command that QEMU would not take."""


class Discouraged(AssertionError):
    """A command that QEMU takes, saying that it is deprecated or unstable, and that is not in :data:`ACCEPTED`."""


@cache
def captured(path: Path) -> Captured:
    """One captured schema."""
    return parse(path.read_text())


def load(path: Path) -> list[dict[str, Any]]:
    """The entries of one captured schema; not to be changed."""
    return [dict(entry) for entry in captured(path).entries]


def of_version(version: str) -> Captured:
    """The captured schema of one version, such as ``7.2``."""
    return captured(SCHEMAS / f"qemu-{version}.json")


def floor() -> Captured:
    """The least that we are at home with: the oldest captured QEMU, without what came after the first that we take."""
    oldest = captured(QEMU_SCHEMAS[0])
    entries = [dict(entry) for entry in oldest.entries]
    for feature in OPTIONAL - {Feature.BLOCK_GRAPH}:
        *steps, last = feature.path.split("/")
        for entry in Schema(entries).find("/".join(steps)) if steps else ():
            index = next(number for number, other in enumerate(entries) if other["name"] == entry["name"])
            entries[index] = dict(entry) | {"members": [one for one in entry["members"] if one["name"] != last]}
        entries = [entry for entry in entries if entry["name"] != feature.path]
    return replace(oldest, version=(7, 1, 0), entries=tuple(entries))


OLD_AND_NEW = [pytest.param(floor(), id="floor"), pytest.param(captured(QEMU_SCHEMAS[-1]), id=QEMU_SCHEMAS[-1].stem)]
"""For tests with the fake: it is the least QEMU, and the newest one."""


class Validator:
    """One QEMU's schema.

    :ivar discouraged: what it has marked of what was validated so far: ``FEATURE PATH``.
    """

    def __init__(self, schema: Path | Captured) -> None:
        entries = (captured(schema) if isinstance(schema, Path) else schema).entries
        self._entries = {entry["name"]: entry for entry in entries}
        self.discouraged: list[str] = []
        self._partial = False

    def command(self, name: str, arguments: object) -> None:
        """See that QEMU takes a command, and gladly.

        :raise SchemaViolation: when QEMU would refuse the command for its form.
        :raise Discouraged: when QEMU marks something in it, and we have not said why we use it all the same.
        """
        self.discouraged.clear()
        entry = self._entries.get(name)
        if entry is None or entry["meta-type"] != "command":
            raise SchemaViolation(f"there is no command {name}")
        self._look(entry, name)
        self._value(entry["arg-type"], arguments, name)
        if self.discouraged:
            raise Discouraged(", ".join(self.discouraged))

    def reply(self, name: str, value: object) -> None:
        """See that a QEMU could have answered this; members that it would have told besides may be missing.

        :raise SchemaViolation: when it could not.
        """
        self._partial = True
        try:
            self._value(self._entries[name]["ret-type"], value, f"reply to {name}")
        finally:
            self._partial = False

    def _look(self, thing: Mapping[str, Any], where: str) -> None:
        for feature in ("deprecated", "unstable"):
            if feature in thing.get("features", ()) and where not in ACCEPTED:
                self.discouraged.append(f"{where} is {feature}")

    def _value(self, type_name: str, value: object, where: str) -> None:
        entry = self._entries[type_name]
        self._look(entry, where)
        match entry["meta-type"]:
            case "builtin":
                self._builtin(entry["json-type"], value, where)
            case "enum":
                self._enum(entry, value, where)
            case "array":
                if not isinstance(value, list):
                    raise SchemaViolation(f"{where}: {value!r} is not an array")
                for index, element in enumerate(value):
                    self._value(entry["element-type"], element, f"{where}[{index}]")
            case "alternate":
                self._alternate(entry, value, where)
            case "object":
                self._object(entry, value, where)

    @staticmethod
    def _builtin(json_type: str, value: object, where: str) -> None:
        right = isinstance(value, _JSON_TYPES[json_type])
        if json_type in ("int", "number") and isinstance(value, bool):
            right = False
        if json_type == "int" and right and not -(1 << 63) <= int(str(value)) < 1 << 64:
            right = False
        if not right:
            raise SchemaViolation(f"{where}: {value!r} is not of type {json_type}")

    def _enum(self, entry: Mapping[str, Any], value: object, where: str) -> None:
        member = next((member for member in entry["members"] if member["name"] == value), None)
        if member is None:
            raise SchemaViolation(f"{where}: {value!r} is not a value of the enum")
        self._look(member, f"{where}={value}")

    def _alternate(self, entry: Mapping[str, Any], value: object, where: str) -> None:
        violations = []
        for member in entry["members"]:
            seen = len(self.discouraged)
            try:
                self._value(member["type"], value, where)
            except SchemaViolation as violation:
                violations.append(str(violation))
                del self.discouraged[seen:]
            else:
                return
        raise SchemaViolation("; or ".join(violations))

    def _object(self, entry: Mapping[str, Any], value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise SchemaViolation(f"{where}: {value!r} is not an object")
        members = self._members(entry, value)
        for name, member in members.items():
            if name in value:
                self._look(member, f"{where}/{name}")
                self._value(member["type"], value[name], f"{where}/{name}")
            elif "default" not in member and not self._partial:
                raise SchemaViolation(f"{where}: {name} is missing")
        for name in value:
            if name not in members:
                raise SchemaViolation(f"{where}: {name} is unexpected")

    def _members(self, entry: Mapping[str, Any], value: Mapping[str, object]) -> dict[str, Mapping[str, Any]]:
        """An object's members, with those of the variant that its tag names; a variant may have variants."""
        members = {member["name"]: member for member in entry["members"]}
        for variant in entry.get("variants", ()):
            if variant["case"] == value.get(entry["tag"]):
                members |= self._members(self._entries[variant["type"]], value)
        return members
