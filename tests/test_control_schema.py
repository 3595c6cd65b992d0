"""The control interface's types: strict arguments, tolerant readers, and a schema that is pinned and complete."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from qemu_remus.core.commands import COMMANDS, EVENTS, EventName, FailoverArguments, Nothing
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.qapi import UnexpectedMember, from_qmp, introspect, read_arguments, to_qmp

CAPTURED = Path(__file__).parent.parent / "qmp_schemas" / "qemu-remus.json"


def test_the_captured_schema_is_the_one_that_is_served() -> None:
    captured = json.loads(CAPTURED.read_text())
    assert captured == introspect(COMMANDS.values(), EVENTS.values()), (
        "the control interface changed: if members were only added, run python -m tests.test_control_schema"
    )


def test_the_captured_schema_has_one_entry_a_line() -> None:
    lines = CAPTURED.read_text().splitlines()
    assert lines[0] == "["
    assert lines[-1] == "]"
    assert [json.loads(line.rstrip(","))["name"] for line in lines[1:-1]]


def test_every_type_that_the_schema_refers_to_is_in_it() -> None:
    schema = introspect(COMMANDS.values(), EVENTS.values())
    names = [entry["name"] for entry in schema]
    assert len(names) == len(set(names))
    referred = set()
    for entry in schema:
        referred |= {entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry}
        if entry["meta-type"] in ("object", "alternate"):
            referred |= {member["type"] for member in entry["members"]}
    assert referred <= set(names)


def test_optional_arguments_are_marked_as_such_and_answers_are_complete() -> None:
    schema = {entry["name"]: entry for entry in introspect(COMMANDS.values(), EVENTS.values())}
    assert all("default" in member for member in schema["FailoverArguments"]["members"])
    assert not any("default" in member for member in schema["Report"]["members"])


def test_arguments_are_read_by_their_qmp_names() -> None:
    assert read_arguments(FailoverArguments, {"checkpoints": [7, 5], "force": True}) == FailoverArguments(
        checkpoints=(EpochNumber(7), EpochNumber(5)), force=True
    )
    assert read_arguments(FailoverArguments, {"last-committed": True}).last_committed


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"last_committed": True}, UnexpectedMember),
        ({"checkpoint": [1]}, UnexpectedMember),
        ({"checkpoints": 1}, msgspec.ValidationError),
        ({"checkpoints": [0]}, msgspec.ValidationError),
        ({"checkpoints": [-1]}, msgspec.ValidationError),
        ({"checkpoints": [2**63]}, msgspec.ValidationError),
        ({"checkpoints": [True]}, msgspec.ValidationError),
        ({"checkpoints": ["1"]}, msgspec.ValidationError),
        ({"checkpoints": list(range(1, 1026))}, msgspec.ValidationError),
        ({"checkpoints": [1], "last-committed": True}, msgspec.ValidationError),
        ({"force": 1}, msgspec.ValidationError),
        ({"force": None}, msgspec.ValidationError),
    ],
)
def test_wrong_failover_arguments_never_reach_the_controller(arguments: Any, error: Any) -> None:
    with pytest.raises(error):
        read_arguments(FailoverArguments, arguments)


TOOLSTACK = {
    "prepare-epoch": {"timeout": 1},
    "start-new-epoch": {"pause": True, "timeout": 1},
    "finish-disk-sync": {"epoch": 1, "timeout": 1},
    "commit-epoch": {"epoch": 1, "timeout": 1},
    "abort-epoch": {"epoch": 1, "timeout": 1},
    "memory-received": {"epoch": 1},
}


@pytest.mark.parametrize("name", TOOLSTACK)
def test_the_toolstacks_commands_take_their_arguments_and_need_only_the_epoch(name: str) -> None:
    kind, arguments = COMMANDS[name].arguments, TOOLSTACK[name]
    assert to_qmp(read_arguments(kind, arguments)) == arguments
    needed = {member: 2**63 - 1 for member in arguments if member == "epoch"}
    assert to_qmp(read_arguments(kind, needed)).items() >= needed.items()
    if needed:
        with pytest.raises(msgspec.ValidationError, match="epoch"):
            read_arguments(kind, {})


@pytest.mark.parametrize(
    ("name", "member", "value"),
    [
        (name, member, value)
        for name, arguments in TOOLSTACK.items()
        for member, values in {
            "timeout": (0, -1, 86_400.001, "10", True, None),
            "epoch": (0, -1, 2**63, 1.5, "1", True, None, [1]),
            "pause": (1, "true", None),
        }.items()
        if member in arguments
        for value in values
    ],
)
def test_wrong_arguments_of_a_toolstack_never_reach_the_controller(name: str, member: str, value: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match=member):
        read_arguments(COMMANDS[name].arguments, {**TOOLSTACK[name], member: value})


def test_every_event_has_a_type_and_says_which_pair_it_is_about() -> None:
    assert EVENTS.keys() == {name.value for name in EventName}
    schema = {entry["name"]: entry for entry in introspect(COMMANDS.values(), EVENTS.values())}
    for name in EVENTS:
        members = schema[schema[name]["arg-type"]]["members"]
        assert members[0] == {"name": "pair", "type": "str"}


def test_a_command_without_arguments_takes_none() -> None:
    assert read_arguments(Nothing, {}) == Nothing()
    with pytest.raises(UnexpectedMember, match="'x'"):
        read_arguments(Nothing, {"x": 1})


@dataclass(frozen=True, slots=True)
class Sample:
    two_words: int
    many_values: tuple[float, ...] = ()


def test_answers_are_spelled_with_hyphens_and_read_back_with_later_members_ignored() -> None:
    value = to_qmp(Sample(1, (2.5,)))
    assert value == {"two-words": 1, "many-values": [2.5]}
    assert from_qmp(Sample, {**value, "a-later-one": {}}) == Sample(1, (2.5,))


if __name__ == "__main__":
    entries = introspect(COMMANDS.values(), EVENTS.values())
    CAPTURED.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")
