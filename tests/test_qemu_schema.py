"""A schema in a file: two QEMUs' can be compared line by line, and nothing is lost or added on the way there."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qemu_remus.qemu.schema import Captured, Schema, capture, parse, render
from tests.qmp_validation import QEMU_SCHEMAS, SchemaViolation, Validator, captured

EMPTY = {"meta-type": "object", "members": []}
SMALL: list[dict[str, Any]] = [
    {"name": "add", "meta-type": "command", "arg-type": "1", "ret-type": "2"},
    {"name": "query", "meta-type": "command", "arg-type": "2", "ret-type": "[3]"},
    {"name": "1", "meta-type": "object", "members": [{"name": "x", "type": "str"}, {"name": "a", "type": "3"}]},
    {"name": "2", **EMPTY},
    {"name": "9", **EMPTY},
    {"name": "[3]", "meta-type": "array", "element-type": "3"},
    {"name": "3", "meta-type": "enum", "members": [{"name": "on"}, {"name": "off"}], "values": ["on", "off"]},
    {"name": "str", "meta-type": "builtin", "json-type": "string"},
    {"name": "77", "meta-type": "object", "members": [{"name": "unused", "type": "str"}]},
]


def small() -> Captured:
    return capture(SMALL, (7, 2, 22), "Debian", "none")


def test_types_are_named_by_where_they_are_used() -> None:
    names = [entry["name"] for entry in small().entries]
    assert names == ["[query/ret]", "add", "add/arg", "query", "query/ret", "str", "{}"]


def test_a_file_has_one_entry_a_line_and_says_whose_it_is() -> None:
    lines = render(small()).splitlines()
    assert lines[0] == '{"qemu": "7.2.22", "package": "Debian", "machine": "none", "schema": ['
    assert lines[-1] == "]}"
    assert [json.loads(line.removesuffix(",")) for line in lines[1:-1]] == list(small().entries)
    assert parse(render(small())) == small()


def test_a_type_that_is_added_changes_its_own_lines_only() -> None:
    """In QEMU's own numbering every later type would have another name."""
    grown = [dict(entry) for entry in SMALL]
    for entry in grown:
        for key in ("name", "arg-type", "ret-type", "element-type"):
            if str(entry.get(key, "")).strip("[]").isdigit():
                entry[key] = entry[key].replace(number := entry[key].strip("[]"), str(int(number) + 1))
        entry["members"] = [
            member | ({"type": str(int(member["type"]) + 1)} if str(member.get("type", "")).isdigit() else {})
            for member in entry.get("members", ())
        ]
        if entry["meta-type"] not in ("object", "enum"):
            del entry["members"]
    grown += [
        {"name": "abandon", "meta-type": "command", "arg-type": "1", "ret-type": "3"},
        {"name": "1", "meta-type": "object", "members": [{"name": "why", "type": "str"}]},
    ]
    before = set(render(small()).splitlines())
    after = set(render(capture(grown, (7, 2, 22), "Debian", "none")).splitlines())
    assert before < after
    assert len(after - before) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"qemu": "7", "package": "", "machine": "", "schema": []}'])
def test_other_files_are_not_read(text: str) -> None:
    with pytest.raises(ValueError, match=r"schema|Expecting|unpack"):
        parse(text)


@pytest.mark.parametrize("path", QEMU_SCHEMAS, ids=lambda path: path.stem)
class TestKept:
    def test_the_file_is_as_we_would_write_it(self, path: Path) -> None:
        kept = captured(path)
        assert render(kept) == path.read_text()
        names = [entry["name"] for entry in kept.entries]
        assert len(set(names)) == len(names)
        again = list(kept.entries)
        random.Random(1).shuffle(again)
        assert capture(again, kept.version, kept.package, kept.machine) == kept

    def test_every_type_that_is_named_is_there(self, path: Path) -> None:
        entries = {entry["name"]: entry for entry in captured(path).entries}
        for entry in entries.values():
            used = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
            used += [part["type"] for key in ("members", "variants") for part in entry.get(key, ()) if "type" in part]
            assert set(used) <= set(entries)

    def test_unions_within_unions_are_understood(self, path: Path) -> None:
        validator = Validator(path)
        options = {"driver": "ssh", "node-name": "n", "path": "/p", "server": {"host": "h", "port": "1"}}
        check: dict[str, Any] = {"mode": "hash", "type": "md5", "hash": "00"}
        validator.command("blockdev-add", options | {"host-key-check": check})
        for broken in ({"mode": "none", "hash": "00"}, {"mode": "hash", "type": "md5"}):
            with pytest.raises(SchemaViolation):
                validator.command("blockdev-add", options | {"host-key-check": broken})


def test_the_kept_schemas_are_of_different_qemus_in_order() -> None:
    assert all(captured(one).version < captured(next_one).version for one, next_one in pairwise(QEMU_SCHEMAS))
    assert len(QEMU_SCHEMAS) >= 3


def test_a_path_into_nothing_leads_nowhere() -> None:
    assert not Schema([]).has("stop")
