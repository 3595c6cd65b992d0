"""Every command that we can build is one that every captured QEMU takes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from qemu_remus.core.model import BitmapName, NodeName, QdevPath
from qemu_remus.qemu import commands
from qemu_remus.qemu.commands import Action, Command, ExportDelMode, OnCbwError
from tests.qmp_validation import QEMU_SCHEMAS, SchemaViolation, Validator

DISK, FILTER, FLEECE = NodeName("#block123"), NodeName("filter"), NodeName("fleece")
OLD, NEW = BitmapName("qemu-remus.p.0.none.1"), BitmapName("qemu-remus.p.0.1.2")

ACTIONS = [
    commands.bitmap_add_action(DISK, NEW),
    commands.bitmap_add_action(DISK, NEW, granularity=4096, disabled=True),
    commands.bitmap_disable_action(DISK, OLD),
    commands.bitmap_merge_action(DISK, NEW, [OLD]),
    commands.bitmap_remove_action(DISK, OLD),
]
COMMANDS = [
    commands.qmp_capabilities(),
    commands.query_version(),
    commands.query_qmp_schema(),
    commands.query_status(),
    commands.query_kvm(),
    commands.query_cpus_fast(),
    commands.stop(),
    commands.cont(),
    commands.qom_get("/machine", "type"),
    commands.qom_list("/machine"),
    commands.qom_set_drive(QdevPath("sd0"), FILTER),
    commands.query_block(),
    commands.query_named_block_nodes(),
    commands.query_block_graph(),
    commands.query_block_jobs(),
    commands.query_jobs(),
    commands.job_cancel("job"),
    commands.blockdev_add_file(FLEECE, "/run/fleece"),
    commands.blockdev_add_filter(FILTER, disk=DISK, target=FLEECE, bitmap=OLD, cbw_timeout=1),
    commands.blockdev_add_filter(FILTER, disk=DISK, target=FLEECE, bitmap=None),
    commands.blockdev_add_filter(
        FILTER, disk=DISK, target=FLEECE, bitmap=OLD, on_cbw_error=OnCbwError.BREAK_GUEST_WRITE
    ),
    commands.blockdev_add_snapshot_access(NodeName("access"), filter_node=FILTER),
    commands.blockdev_del(FILTER),
    commands.transaction(ACTIONS),
    commands.bitmap_add(DISK, NEW, granularity=65536),
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


def names(items: list[Any]) -> list[str]:
    return [f"{number}-{getattr(item, 'name', None) or item.type}" for number, item in enumerate(items)]


@pytest.fixture(params=QEMU_SCHEMAS, ids=lambda path: path.stem)
def validator(request: pytest.FixtureRequest) -> Validator:
    path: Path = request.param
    return Validator(path)


@pytest.mark.parametrize("command", COMMANDS, ids=names(COMMANDS))
def test_qemu_takes_the_command(validator: Validator, command: Command) -> None:
    validator.command(command.name, dict(command.arguments))


@pytest.mark.parametrize("action", ACTIONS, ids=names(ACTIONS))
def test_an_action_alone_is_the_same_command(validator: Validator, action: Action) -> None:
    command = action.as_command()
    validator.command(command.name, dict(command.arguments))
    assert command.changes_state


def test_every_builder_is_tried_here() -> None:
    builders = {
        name
        for name, function in inspect.getmembers(commands, inspect.isfunction)
        if function.__module__ == commands.__name__ and not name.startswith("_") and name != "qom_path"
    }
    source = Path(__file__).read_text()
    assert {name for name in builders if f"commands.{name}(" not in source} == set()


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
