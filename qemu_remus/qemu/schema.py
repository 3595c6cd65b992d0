"""QEMU's schema: questions to it by path, and the form in which one is kept in a file.

Pure.  Owns the format of ``qmp_schemas/qemu-*.json`` (:func:`render`) and of the paths; what is asked of a schema is in
:mod:`qemu_remus.qemu.capabilities`.  The schema's own format: QEMU's ``qapi/introspect.json``.

A path reads like this::

    blockdev-add/arg-type/+copy-before-write/on-cbw-error

a command or event, its ``arg-type`` or ``ret-type``, then members by name; ``+NAME`` goes to the variant of that case,
``^NAME`` is a value of an enum, ``$NAME`` a feature of the schema's entry or member that was reached (``$deprecated``);
arrays and alternates are looked through.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

Entry = Mapping[str, Any]

_EMPTY: Final = "{}"
"""Name of the object without members, which every command that takes or returns nothing has."""


@dataclass(frozen=True, slots=True)
class _Found:
    """Where a path has led: an entry, with the features of the member through which it was reached."""

    entry: Entry
    features: tuple[str, ...]


class Schema:
    """An index over the answer to ``query-qmp-schema``."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = {entry["name"]: entry for entry in entries}

    def has(self, path: str) -> bool:
        """Whether a path (see the module's docstring) leads somewhere."""
        name, *steps = path.split("/")
        last = steps[-1] if steps and steps[-1][0] in "^$" else ""
        found = self._walk(name, steps[:-1] if last else steps)
        if last.startswith("^"):
            return any(last[1:] in _values(one.entry) for one in found)
        if last:
            return any(last[1:] in one.features for one in found)
        return bool(found)

    def find(self, path: str) -> list[Entry]:
        """The entries that a path leads to; it may not end in a value or a feature."""
        name, *steps = path.split("/")
        return [one.entry for one in self._walk(name, steps)]

    def _walk(self, name: str, steps: Iterable[str]) -> list[_Found]:
        entry = self._entries.get(name)
        found = [] if entry is None else [_Found(entry, _features(entry))]
        for step in steps:
            found = [target for one in found for target in self._step(one.entry, step)]
        return found

    def _step(self, entry: Entry, step: str) -> Iterator[_Found]:
        if step in ("arg-type", "ret-type") and step in entry:
            yield from self._resolve(entry[step])
        elif step.startswith("+"):
            for variant in entry.get("variants", ()):
                if variant["case"] == step[1:]:
                    yield from self._resolve(variant["type"])
        else:
            for member in entry.get("members", ()):
                if member.get("name") == step:
                    yield from self._resolve(member["type"], _features(member))

    def _resolve(self, name: str, features: tuple[str, ...] = ()) -> Iterator[_Found]:
        entry = self._entries[name]
        if entry["meta-type"] == "array":
            yield from self._resolve(entry["element-type"], features)
        elif entry["meta-type"] == "alternate":
            for member in entry["members"]:
                yield from self._resolve(member["type"], features)
        else:
            yield _Found(entry, features + _features(entry))


def _features(thing: Entry) -> tuple[str, ...]:
    return tuple(thing.get("features", ()))


def _values(entry: Entry) -> Iterator[str]:
    if entry["meta-type"] == "enum":
        # "members" since 6.2; "values" is the old spelling, still there.
        yield from (member["name"] for member in entry.get("members", ()))
        yield from entry.get("values", ())


@dataclass(frozen=True, slots=True)
class Captured:
    """One QEMU's schema, kept.

    :param version: major, minor, micro.
    :param package: the distribution's name for this QEMU; empty where there is none.
    :param machine: the machine type that was asked.
    :param entries: in the order of their names, with names that mean something; see :func:`capture`.
    """

    version: tuple[int, int, int]
    package: str
    machine: str
    entries: tuple[Entry, ...]


def capture(entries: Iterable[Entry], version: tuple[int, int, int], package: str, machine: str) -> Captured:
    """Make a schema fit for keeping, and for comparing with another one's.

    QEMU numbers its types, and one that is added moves all numbers behind it.  Here a type is named by the shortest
    path that leads to it, and the entries stand in the order of their names: a ``diff`` shows what has changed.
    """
    by_name = {entry["name"]: entry for entry in entries}
    names: dict[str, str] = {}
    queue: deque[tuple[str, str]] = deque()
    for name in sorted(name for name, entry in by_name.items() if entry["meta-type"] in ("command", "event")):
        names[name] = name
        queue.extend(_references(by_name, name, name))
    while queue:
        name, wish = queue.popleft()
        entry = by_name[name]
        if name in names:
            continue
        if entry["meta-type"] == "array":
            # an array is named after its elements, so these come first
            inner = entry["element-type"]
            if inner not in names:
                queue.extendleft([(name, wish), (inner, wish)])
                continue
            names[name] = f"[{names[inner]}]"
        else:
            names[name] = name if entry["meta-type"] == "builtin" else _EMPTY if _is_empty(entry) else wish
            queue.extend(_references(by_name, name, wish))
    # what nothing leads to cannot be meant by anybody
    kept = {names[name]: _renamed(entry, names) for name, entry in by_name.items() if name in names}
    return Captured(version, package, machine, tuple(kept[name] for name in sorted(kept)))


def _is_empty(entry: Entry) -> bool:
    return entry["meta-type"] == "object" and not entry["members"] and "tag" not in entry


def _references(by_name: Mapping[str, Entry], name: str, path: str) -> list[tuple[str, str]]:
    """The types that an entry names, each with the path to it, in the order of their paths."""
    entry = by_name[name]
    found = [(entry[key], f"{path}/{step}") for key, step in (("arg-type", "arg"), ("ret-type", "ret")) if key in entry]
    for member in entry.get("members", ()):
        if "name" not in member:
            # the members of an alternate are told apart by what they are in JSON
            target = by_name[member["type"]]
            found.append((member["type"], f"{path}/|{target.get('json-type', target['meta-type'])}"))
        elif "type" in member:
            found.append((member["type"], f"{path}/{member['name']}"))
    found += [(variant["type"], f"{path}/+{variant['case']}") for variant in entry.get("variants", ())]
    return sorted(found, key=lambda reference: reference[1])


def _renamed(entry: Entry, names: Mapping[str, str]) -> Entry:
    new = dict(entry) | {"name": names[entry["name"]]}
    for key in ("arg-type", "ret-type", "element-type"):
        if key in entry:
            new[key] = names[entry[key]]
    for key, order in (("members", "name"), ("variants", "case")):
        if key in entry:
            inner = [member | {"type": names[member["type"]]} if "type" in member else member for member in entry[key]]
            new[key] = sorted(inner, key=lambda member: str(member.get(order, member.get("type", ""))))
    if "values" in entry:
        # only repeats the members' names
        del new["values"]
    return new


def render(captured: Captured) -> str:
    """The text of a file: a JSON object whose entries stand one a line."""
    head = {
        "qemu": ".".join(map(str, captured.version)),
        "package": captured.package,
        "machine": captured.machine,
        "schema": [],
    }
    lines = [json.dumps(entry, sort_keys=True, separators=(",", ":")) for entry in captured.entries]
    return json.dumps(head)[: -len("]}")] + "\n" + ",\n".join(lines) + "\n]}\n"


def parse(text: str) -> Captured:
    """Read what :func:`render` wrote.

    :raise ValueError: when it is something else.
    """
    try:
        head = json.loads(text)
        major, minor, micro = (int(part) for part in head["qemu"].split("."))
        return Captured((major, minor, micro), head["package"], head["machine"], tuple(head["schema"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is no captured schema: {error!r}") from error
