"""Checks QMP commands against a captured schema, as strictly as QEMU does. Format: QEMU's ``qapi/introspect.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).parent.parent / "qmp_schemas"
QEMU_SCHEMAS = sorted(SCHEMAS.glob("qemu-[0-9]*.json"))

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


@cache
def load(path: Path) -> list[dict[str, Any]]:
    """The entries of one captured schema."""
    entries: list[dict[str, Any]] = json.loads(path.read_text())
    return entries


class Validator:
    """One QEMU release's schema."""

    def __init__(self, path: Path) -> None:
        self._entries = {entry["name"]: entry for entry in load(path)}

    def command(self, name: str, arguments: object) -> None:
        """:raise SchemaViolation: when QEMU would refuse the command for its form."""
        entry = self._entries.get(name)
        if entry is None or entry["meta-type"] != "command":
            raise SchemaViolation(f"there is no command {name}")
        self._value(entry["arg-type"], arguments, name)

    def _value(self, type_name: str, value: object, where: str) -> None:
        entry = self._entries[type_name]
        match entry["meta-type"]:
            case "builtin":
                self._builtin(entry["json-type"], value, where)
            case "enum":
                if value not in (member["name"] for member in entry["members"]):
                    raise SchemaViolation(f"{where}: {value!r} is not a value of the enum")
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
        if not right:
            raise SchemaViolation(f"{where}: {value!r} is not of type {json_type}")

    def _alternate(self, entry: Mapping[str, Any], value: object, where: str) -> None:
        violations = []
        for member in entry["members"]:
            try:
                self._value(member["type"], value, where)
            except SchemaViolation as violation:
                violations.append(str(violation))
            else:
                return
        raise SchemaViolation("; or ".join(violations))

    def _object(self, entry: Mapping[str, Any], value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise SchemaViolation(f"{where}: {value!r} is not an object")
        members = {member["name"]: member for member in entry["members"]}
        if "tag" in entry:
            for variant in entry["variants"]:
                if variant["case"] == value.get(entry["tag"]):
                    members |= {member["name"]: member for member in self._entries[variant["type"]]["members"]}
                    inner = self._entries[variant["type"]]
                    if "tag" in inner:
                        raise SchemaViolation(f"{where}: nested unions are not understood here")
        for name, member in members.items():
            if name in value:
                self._value(member["type"], value[name], f"{where}/{name}")
            elif "default" not in member:
                raise SchemaViolation(f"{where}: {name} is missing")
        for name in value:
            if name not in members:
                raise SchemaViolation(f"{where}: {name} is unexpected")
