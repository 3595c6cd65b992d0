"""Every command that we can build is one that every captured QEMU takes, and of which it does not warn."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_remus.core.model import BitmapName, NodeName, QdevPath
from qemu_remus.qemu import commands
from qemu_remus.qemu.capabilities import Capabilities, Feature
from qemu_remus.qemu.commands import Action, Command, ExportDelMode, OnCbwError, ShutdownAction
from tests.qmp_validation import ACCEPTED, QEMU_SCHEMAS, Discouraged, SchemaViolation, Validator, captured

DISK, FILTER, FLEECE = NodeName("#block123"), NodeName("filter"), NodeName("fleece")
OLD, NEW = BitmapName("qemu-remus.p.0.none.1"), BitmapName("qemu-remus.p.0.1.2")

ACTIONS = [
    commands.bitmap_add_action(DISK, NEW),
    commands.bitmap_add_action(DISK, NEW, granularity=4096, disabled=True),
    commands.bitmap_disable_action(DISK, OLD),
    commands.bitmap_clear_action(DISK, OLD),
    commands.bitmap_merge_action(DISK, NEW, [OLD]),
    commands.bitmap_copy_action(FILTER, NEW, (DISK, OLD)),
    commands.bitmap_remove_action(DISK, OLD),
]
COMMANDS = [
    commands.qmp_capabilities(),
    commands.query_version(),
    commands.query_qmp_schema(),
    commands.query_status(),
    commands.query_kvm(),
    commands.query_accelerators(),
    commands.query_cpus_fast(),
    commands.stop(),
    commands.cont(),
    commands.set_power_off(ShutdownAction.PAUSE),
    commands.quit_qemu(),
    commands.qom_get("/machine", "type"),
    commands.qom_list("/machine"),
    commands.qom_set_drive(QdevPath("sd0"), FILTER),
    commands.query_block(),
    commands.query_named_block_nodes(),
    commands.query_block_graph(),
    commands.query_block_jobs(),
    commands.query_blockstats(),
    commands.query_name(),
    commands.query_chardev(),
    commands.query_vnc(),
    commands.query_spice(),
    commands.query_jobs(),
    commands.job_cancel("job"),
    commands.job_dismiss("job"),
    commands.blockdev_backup("job", FILTER, FLEECE, OLD, chunk=65536),
    commands.blockdev_add_qcow2(NodeName("map"), file=FLEECE),
    commands.blockdev_add_qcow2(NodeName("map"), file=FLEECE, read_only=True),
    commands.blockdev_add_file(FLEECE, "/run/fleece"),
    commands.add_fd(),
    commands.remove_fd(3),
    commands.blockdev_add_filter(FILTER, disk=DISK, target=FLEECE, bitmap=OLD, cbw_timeout=1),
    commands.blockdev_add_filter(FILTER, disk=DISK, target=FLEECE, bitmap=None),
    commands.blockdev_add_filter(
        FILTER, disk=DISK, target=FLEECE, bitmap=OLD, on_cbw_error=OnCbwError.BREAK_GUEST_WRITE
    ),
    commands.blockdev_add_snapshot_access(NodeName("access"), filter_node=FILTER),
    commands.block_resize(DISK, 1 << 30),
    commands.blockdev_del(FILTER),
    commands.transaction(ACTIONS),
    commands.bitmap_add(DISK, NEW, granularity=65536),
    commands.bitmap_add(FILTER, NEW, granularity=4096, disabled=True, persistent=True),
    commands.bitmap_copy(FILTER, NEW, (DISK, OLD)),
    commands.bitmap_disable(DISK, OLD),
    commands.bitmap_merge(DISK, NEW, [OLD]),
    commands.bitmap_remove(DISK, OLD),
    commands.nbd_server_start("/run/nbd.sock"),
    commands.nbd_server_stop(),
    commands.query_block_exports(),
    commands.block_export_add_nbd("id", FILTER, "name"),
    commands.block_export_add_nbd("id", FILTER, "name", bitmaps=[(DISK, OLD)]),
    commands.block_export_del("id"),
    commands.block_export_del("id", ExportDelMode.HARD),
]


SENT_WHERE = {
    "query-accelerators": lambda has: Feature.ACCELERATORS in has,
    "query-kvm": lambda has: Feature.ACCELERATORS not in has,
}
"""The commands that not every QEMU is sent; what each depends on is tested where it is sent."""


def names(items: list[Any]) -> list[str]:
    return [f"{number}-{getattr(item, 'name', None) or item.type}" for number, item in enumerate(items)]


@pytest.fixture(params=QEMU_SCHEMAS, ids=lambda path: path.stem)
def schema(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture
def validator(schema: Path) -> Validator:
    return Validator(schema)


def is_sent(command: Command, schema: Path) -> bool:
    kept = captured(schema)
    condition = SENT_WHERE.get(command.name)
    return condition is None or condition(Capabilities.from_schema(kept.entries, kept.version))


@pytest.mark.parametrize("command", COMMANDS, ids=names(COMMANDS))
def test_qemu_takes_the_command(schema: Path, validator: Validator, command: Command) -> None:
    if is_sent(command, schema):
        validator.command(command.name, dict(command.arguments))


def test_every_command_is_sent_to_some_qemu() -> None:
    for command in COMMANDS:
        assert any(is_sent(command, schema) for schema in QEMU_SCHEMAS), command.name


@pytest.mark.parametrize("action", ACTIONS, ids=names(ACTIONS))
def test_an_action_alone_is_the_same_command(validator: Validator, action: Action) -> None:
    command = action.as_command()
    validator.command(command.name, dict(command.arguments))
    assert command.changes_state


# --- whatever its builder is given


def strategies() -> Mapping[object, st.SearchStrategy[Any]]:
    text = st.text(max_size=40)
    for new in (NodeName, BitmapName, QdevPath):
        st.register_type_strategy(new, text.map(new))
    number = st.one_of(st.none(), st.sampled_from(commands.BITMAP_GRANULARITIES))
    return {
        "granularity": number,
        "fdset": st.integers(0, (1 << 31) - 1),
        "size": st.integers(0, (1 << 63) - 512),
        "cbw_timeout": st.one_of(st.none(), st.integers(0, (1 << 32) - 1)),
        "chunk": st.integers(1, (1 << 63) - 1),
    }


OF_PARAMETER = strategies()


def built(name: str) -> st.SearchStrategy[Command | Action]:
    """What a builder makes of arguments of the types that it names, all of its optional ones in any combination."""
    builder = BUILDERS[name]
    hints = get_type_hints(builder, localns={"Action": Action})
    if name == "transaction":
        return st.lists(st.one_of(*[built(one) for one in BUILDERS if one.endswith("_action")])).map(builder)
    chosen = {
        parameter: OF_PARAMETER.get(parameter, st.from_type(hints[parameter]))
        for parameter in inspect.signature(builder).parameters
    }
    return st.builds(builder, **chosen)


BUILDERS = {
    name: function
    for name, function in inspect.getmembers(commands, inspect.isfunction)
    if function.__module__ == commands.__name__ and not name.startswith("_") and name != "qom_path"
}


@pytest.mark.parametrize("name", BUILDERS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_qemu_takes_whatever_the_builder_makes(name: str, data: st.DataObject) -> None:
    made = data.draw(built(name))
    command = made.as_command() if isinstance(made, Action) else made
    for schema in QEMU_SCHEMAS:
        if is_sent(command, schema):
            Validator(schema).command(command.name, json.loads(json.dumps(command.arguments)))


def test_the_package_makes_no_command_but_by_a_builder() -> None:
    package = Path(commands.__file__).parent.parent
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        made = {call for call in calls if call.rpartition(".")[2] in ("Command", "Action")}
        if "qemu" in path.parts[len(package.parts) :] and path.name != "commands.py":
            assert not made, path


def test_every_builder_is_tried_here() -> None:
    source = Path(__file__).read_text()
    assert {name for name in BUILDERS if f"commands.{name}(" not in source} == set()


def test_only_queries_change_nothing() -> None:
    harmless = {command.name for command in COMMANDS if not command.changes_state}
    assert all(name.startswith(("query-", "x-debug-query-")) or name in ("qom-get", "qom-list") for name in harmless)
    assert not [command.name for command in COMMANDS if command.changes_state and "query-" in command.name]


def test_the_filter_lets_discards_through_and_spares_the_guests_writes() -> None:
    arguments = commands.blockdev_add_filter(FILTER, disk=DISK, target=FLEECE, bitmap=OLD).arguments
    assert arguments["discard"] == "unmap"
    assert arguments["on-cbw-error"] == "break-snapshot"
    assert "cbw-timeout" not in arguments


@pytest.mark.parametrize(
    ("qdev", "path"),
    [
        ("sd0", "/machine/peripheral/sd0"),
        ("/machine/unattached/device[19]", "/machine/unattached/device[19]"),
        ("/machine/peripheral/vda/virtio-backend", "/machine/peripheral/vda/virtio-backend"),
    ],
)
def test_a_bare_device_id_becomes_a_qom_path(qdev: str, path: str) -> None:
    assert commands.qom_set_drive(QdevPath(qdev), FILTER).arguments["path"] == path


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("blockdev-ad", {}),
        ("blockdev-del", {}),
        ("blockdev-del", {"node-name": 3}),
        ("blockdev-del", {"node-name": "n", "force": True}),
        ("blockdev-add", {"driver": "copy-before-write", "node-name": "n", "file": "f"}),
        ("blockdev-add", {"driver": "copy-before-write", "node-name": "n", "file": "f", "target": "t", "bitmap": "b"}),
        ("blockdev-add", {"driver": "no-such-driver", "node-name": "n", "file": "f"}),
        ("block-export-add", {"type": "nbd", "id": "i", "node-name": "n", "bitmaps": [{"nod": "d", "name": "b"}]}),
        ("transaction", {"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "n"}}]}),
        ("query-named-block-nodes", {"flat": 1}),
    ],
)
def test_the_validator_refuses_what_qemu_would(validator: Validator, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(SchemaViolation):
        validator.command(name, arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "what"),
    [
        ("query-kvm", {}, "query-kvm is deprecated"),
        ("block-job-dismiss", {"id": "j"}, "block-job-dismiss is deprecated"),
        ("eject", {"device": "cd0"}, "eject/device is deprecated"),
        ("x-query-ramblock", {}, "x-query-ramblock is unstable"),
    ],
)
def test_the_validator_says_what_the_newest_qemu_would_rather_not_see(
    name: str, arguments: dict[str, Any], what: str
) -> None:
    with pytest.raises(Discouraged, match=what):
        Validator(QEMU_SCHEMAS[-1]).command(name, arguments)


def test_what_is_discouraged_is_accepted_only_where_we_send_it() -> None:
    sent = {command.name for command in COMMANDS}
    sent |= {f"{command.name}/{argument}" for command in COMMANDS for argument in command.arguments}
    assert set(ACCEPTED) <= sent
