"""A real QEMU with every kind of disk: what is found, what may be protected, and detach from every half-way state.

No guest: nothing here needs one.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio
import trio.testing

from integration.machine import Disk, Interface, Machine, Style, start_machine
from integration.qemus import OTHERS
from qemu_remus.core.errors import CommandInDoubt, DiskUnsupported, NotQmp, QemuUnreachable
from qemu_remus.core.model import DiskName, EpochNumber, Generation, NodeName, PairName
from qemu_remus.nbd.client import close_all, open_nbd
from qemu_remus.qemu import commands
from qemu_remus.qemu.capabilities import query_capabilities
from qemu_remus.qemu.client import QmpClient, open_qmp
from qemu_remus.qemu.commands import Command
from qemu_remus.qemu.detach import detach
from qemu_remus.qemu.discover import discover
from qemu_remus.qemu.disks import VmDisk, choose_disks
from qemu_remus.qemu.nbd_server import socket_path
from qemu_remus.qemu.nodes import BitmapIdentity, access_node, export_id, filter_node, fleece_node
from qemu_remus.qemu.probe import probe
from qemu_remus.qemu.probe_model import Level
from qemu_remus.qemu.probe_text import render
from qemu_remus.qemu.process import qemu_process

pytestmark = pytest.mark.every_qemu(slow=OTHERS)

MIB = 1 << 20
PAIR = PairName("web")
EPOCH = EpochNumber(5)
FINISHED = BitmapIdentity(PAIR, Generation(UUID(int=7)), EpochNumber(4), EPOCH)
FOLLOWING = BitmapIdentity(PAIR, Generation(UUID(int=7)), EPOCH, EpochNumber(6))
FOREIGN_BITMAP = "libvirt-backup"

Json = dict[str, Any]


def image(directory: Path, name: str, size: int = 4 * MIB) -> Path:
    path = directory / f"{name}.img"
    with path.open("wb") as file:
        file.truncate(size)
    return path


def writable(directory: Path) -> list[Disk]:
    """A disk of every kind that can be protected on every QEMU; one of no whole number of clusters."""
    return [
        Disk("ide0", image(directory, "ide0"), Interface.IDE, Style.IMPLICIT),
        Disk("vd0", image(directory, "vd0"), Interface.VIRTIO, Style.IMPLICIT),
        Disk("vd1", image(directory, "vd1"), Interface.VIRTIO, Style.DRIVE),
        Disk("vd2", image(directory, "vd2", 4 * MIB + 22_016)),
        Disk("sd0", image(directory, "sd0"), Interface.SCSI),
        Disk("nv0", image(directory, "nv0"), Interface.NVME, Style.DRIVE),
    ]


def others(directory: Path) -> list[Disk]:
    """Disks that cannot be protected, some only by an old QEMU."""
    return [
        Disk("ro0", image(directory, "ro0"), read_only=True),
        Disk("io0", image(directory, "io0"), iothread=True),
        Disk("io1", image(directory, "io1"), Interface.SCSI, iothread=True),
    ]


CDROMS = [
    *("-drive", "if=none,id=cd0,media=cdrom", "-device", "ide-cd,drive=cd0,id=cdrom0,bus=ide.1"),
    *("-drive", "if=none,id=unused,driver=null-co,size=1M"),
]


@asynccontextmanager
async def machine_with(scratch: Path, disks: list[Disk], *extra: str) -> AsyncIterator[tuple[Machine, QmpClient]]:
    async with (
        start_machine(scratch, disks, accelerator="tcg", memory_mb=64, extra=["-S", *extra]) as machine,
        open_qmp(machine.qmp_path) as client,
    ):
        yield machine, client


async def test_every_kind_of_disk_is_found_with_its_node_size_and_thread(scratch: Path) -> None:
    async with machine_with(scratch, [*writable(scratch), *others(scratch)], *CDROMS) as (_, client):
        found = {str(disk.name): disk for disk in await discover(client, await query_capabilities(client))}
    seen = {
        name: (bool(disk.qdev), disk.size, disk.read_only, disk.removable, disk.iothread)
        for name, disk in found.items()
    }
    plain = (True, 4 * MIB, False, False, False)
    assert seen == {
        "ide0": plain,
        "vd0": plain,
        "vd1": plain,
        "vd2": (True, 4 * MIB + 22_016, False, False, False),
        "sd0": plain,
        "nv0": plain,
        "ro0": (True, 4 * MIB, True, False, False),
        "io0": (True, 4 * MIB, False, False, True),
        "io1": (True, 4 * MIB, False, False, True),
        "cdrom0": (True, 0, False, True, False),
        "unused": (False, MIB, False, True, None),
    }
    assert found["vd2"].node == "vd2-node"
    assert re.fullmatch(r"#block\d+", found["ide0"].node)
    assert found["sd0"].filename == str(scratch / "sd0.img")


async def test_probe_says_of_each_disk_whether_and_why_not(scratch: Path) -> None:
    async with machine_with(scratch, [*writable(scratch), *others(scratch)], *CDROMS) as (_, client):
        report = await probe(client)
        capabilities = await query_capabilities(client)
    verdicts = {str(disk.name): disk.protectable for disk in report.disks}
    assert {name for name, good in verdicts.items() if not good} == {"ro0", "cdrom0", "unused"}
    assert report.ok
    text = "\n".join(render(report))
    assert report.machine.startswith("pc-i440fx")
    assert text.count("by push") == 2 * (not capabilities.pull_safe_in_iothread)
    assert "CD-ROM" in text
    assert "not running (prelaunch)" in text


async def test_a_plain_machine_is_good_and_its_writable_disks_are_chosen(scratch: Path) -> None:
    async with machine_with(scratch, writable(scratch), *CDROMS) as (_, client):
        report = await probe(client)
        capabilities = await query_capabilities(client)
        disks = await discover(client, capabilities)
    assert report.ok
    assert not [finding for finding in report.findings if finding.level is Level.NO]
    chosen = choose_disks(disks, None, capabilities)
    assert sorted(disk.name for disk in chosen) == ["ide0", "nv0", "sd0", "vd0", "vd1", "vd2"]
    with pytest.raises(DiskUnsupported, match="CD-ROM"):
        choose_disks(disks, {DiskName("x"): NodeName("cd0")}, capabilities)


# --- detach


async def graph(client: QmpClient) -> Json:
    """Everything in the block layer that somebody could miss afterwards, without what changes by itself."""

    # The firmware turns a virtio disk's write cache on while it boots.
    volatile = ("actual-size", "io-status", "cache")

    def stable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: stable(item) for key, item in value.items() if key not in volatile}
        return [stable(item) for item in value] if isinstance(value, list) else value

    nodes = await client.execute(commands.query_named_block_nodes())
    edges = await client.execute(commands.query_block_graph())
    names = {node["id"]: node["name"] for node in edges["nodes"]}
    return {
        "block": stable(await client.execute(commands.query_block())),
        "nodes": sorted((stable(node) for node in nodes), key=lambda node: str(node["node-name"])),
        "edges": sorted((names[edge["parent"]], edge["name"], names[edge["child"]]) for edge in edges["edges"]),
        "exports": await client.execute(commands.query_block_exports()),
    }


async def foreign_things(client: QmpClient, disks: tuple[VmDisk, ...]) -> None:
    """What another tool might have in there: a bitmap on each disk, a node of its own."""
    for disk in disks:
        await client.execute(Command("block-dirty-bitmap-add", {"node": disk.node, "name": FOREIGN_BITMAP}, True))
    null = {"driver": "null-co", "node-name": "libvirt-scratch", "size": MIB, "read-zeroes": True}
    await client.execute(Command("blockdev-add", null, True))


async def steps(client: QmpClient, scratch: Path, disks: tuple[VmDisk, ...]) -> list[list[Command]]:
    """What a controller does, step by step, each step for all disks."""
    path = socket_path(scratch, PAIR, await qemu_process(client))
    rounds: list[list[Command]] = [[commands.nbd_server_start(str(path))], [], [], [], [], [], [], [], []]
    for disk in disks:
        fleece = image(scratch, f"fleece-{disk.name}", disk.size)
        below, above = fleece_node(PAIR, disk.name), filter_node(PAIR, disk.name, EPOCH)
        access, export = access_node(PAIR, disk.name, EPOCH), export_id(PAIR, disk.name, EPOCH)
        for number, command in enumerate(
            [
                commands.blockdev_add_file(below, str(fleece)),
                commands.bitmap_add(disk.node, FINISHED.name, granularity=4096),
                commands.bitmap_add(disk.node, FOLLOWING.name, granularity=4096),
                commands.bitmap_disable(disk.node, FINISHED.name),
                commands.blockdev_add_filter(above, disk=disk.node, target=below, bitmap=FINISHED.name, cbw_timeout=1),
                commands.qom_set_drive(disk.qdev, above),
                commands.blockdev_add_snapshot_access(access, filter_node=above),
                commands.block_export_add_nbd(export, access, export, bitmaps=[(disk.node, FINISHED.name)]),
            ],
            start=1,
        ):
            rounds[number].append(command)
    return rounds


async def test_detach_leaves_the_graph_as_it_was_from_every_half_way_state(scratch: Path) -> None:
    async with machine_with(scratch, writable(scratch)) as (machine, client):
        capabilities = await query_capabilities(client)
        disks = choose_disks(await discover(client, capabilities), None, capabilities)
        await foreign_things(client, disks)
        before = await graph(client)
        rounds = await steps(client, scratch, disks)
        for running in (False, True):
            if running:
                await client.execute(commands.cont())
            for done in range(len(rounds) + 1):
                for command in [command for part in rounds[:done] for command in part]:
                    await client.execute(command)
                # With the filter in, discovery still shows the disk's own node.
                assert {disk.node for disk in await discover(client, capabilities)} == {disk.node for disk in disks}
                report = await detach(client, PAIR)
                assert report.ok, report.lines()
                assert await graph(client) == before
                await client.execute(commands.nbd_server_start(str(scratch / "free")))
                await client.execute(commands.nbd_server_stop())
        assert machine.process.running


async def test_detach_after_the_controller_was_killed_cuts_its_readers_off(scratch: Path) -> None:
    async with machine_with(scratch, writable(scratch)[2:4]) as (_, client):
        capabilities = await query_capabilities(client)
        disks = choose_disks(await discover(client, capabilities), None, capabilities)
        before = await graph(client)
        for part in await steps(client, scratch, disks):
            for command in part:
                await client.execute(command)
        path = socket_path(scratch, PAIR, await qemu_process(client))
        reader = await open_nbd(path, export_id(PAIR, disks[0].name, EPOCH))
        try:
            report = await detach(client, None)
        finally:
            await close_all([reader])
        assert report.ok, report.lines()
        assert await graph(client) == before
        assert not path.exists()


async def test_detach_keeps_tracking_where_that_is_wanted_and_spares_other_pairs(scratch: Path) -> None:
    async with machine_with(scratch, writable(scratch)[:2]) as (_, client):
        capabilities = await query_capabilities(client)
        disks = choose_disks(await discover(client, capabilities), None, capabilities)
        for part in await steps(client, scratch, disks):
            for command in part:
                await client.execute(command)
        full = await graph(client)
        assert (await detach(client, PairName("other"))).removed == ()
        assert await graph(client) == full
        assert (await detach(client, PAIR, keep_tracking=True)).ok
        for entry in (await graph(client))["block"]:
            names = {bitmap["name"] for bitmap in entry["inserted"]["dirty-bitmaps"]}
            assert names == {FINISHED.name, FOLLOWING.name}


async def test_an_overlay_over_our_filter_is_left_alone_and_qemu_lives(scratch: Path) -> None:
    async with machine_with(scratch, writable(scratch)[3:4]) as (machine, client):
        capabilities = await query_capabilities(client)
        disks = choose_disks(await discover(client, capabilities), None, capabilities)
        for part in (await steps(client, scratch, disks))[:8]:
            for command in part:
                await client.execute(command)
        above = filter_node(PAIR, disks[0].name, EPOCH)
        await snapshot(machine, client, above, disks[0].size)
        report = await detach(client, PAIR)
        assert not report.ok
        assert {left.name for left in report.left} == {above, fleece_node(PAIR, disks[0].name)}
        (device,) = [disk for disk in await discover(client, capabilities) if disk.name == disks[0].name]
        assert device.node == "overlay"
        assert machine.process.running


async def snapshot(machine: Machine, client: QmpClient, node: str, size: int) -> None:
    """Another tool takes an external snapshot."""
    path = machine.directory / "overlay.qcow2"
    job = {"job-id": "make", "options": {"driver": "qcow2", "file": "overlay-file", "size": size}}
    path.touch()
    file = {"driver": "file", "node-name": "overlay-file", "filename": str(path)}
    await client.execute(Command("blockdev-add", file, True))
    with client.subscribe("JOB_STATUS_CHANGE") as events:
        await client.execute(Command("blockdev-create", job, True))
        with trio.fail_after(30):
            async for event in events:
                if event.data["status"] == "concluded":
                    break
    overlay = {"driver": "qcow2", "node-name": "overlay", "file": "overlay-file", "backing": None}
    await client.execute(Command("blockdev-add", overlay, True))
    await client.execute(Command("blockdev-snapshot", {"node": node, "overlay": "overlay"}, True))


# --- the session itself


async def test_a_second_client_learns_that_the_socket_is_busy(scratch: Path) -> None:
    async with machine_with(scratch, []) as (machine, _):
        with pytest.raises(QemuUnreachable, match="somebody else is probably connected"):
            async with open_qmp(machine.qmp_path, connect_timeout=0.5):
                pass


async def test_a_human_monitor_is_not_qmp_and_a_pretty_one_is(scratch: Path) -> None:
    monitors = []
    for name, mode in (("hmp", "mode=readline"), ("pretty", "mode=control,pretty=on")):
        monitors += ["-chardev", f"socket,id={name},path={scratch / name},server=on,wait=off"]
        monitors += ["-mon", f"chardev={name},{mode}"]
    async with machine_with(scratch, [], *monitors) as (_, client):
        with pytest.raises(NotQmp):
            async with open_qmp(scratch / "hmp"):
                pass
        async with open_qmp(scratch / "pretty") as pretty:
            schema = await pretty.execute(commands.query_qmp_schema())
        assert schema == await client.execute(commands.query_qmp_schema())


async def test_a_killed_qemu_leaves_a_change_in_doubt_or_unsent_and_says_which(scratch: Path) -> None:
    async with machine_with(scratch, []) as (machine, client):
        os.kill(machine.pid, signal.SIGSTOP)  # the command arrives and is never read
        outcome: list[type[Exception]] = []

        async def stop() -> None:
            try:
                await client.execute(commands.stop())
            except (CommandInDoubt, QemuUnreachable) as error:
                outcome.append(type(error))

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stop)
                await trio.testing.wait_all_tasks_blocked()
                await machine.kill()
        assert outcome == [CommandInDoubt]
        with pytest.raises(QemuUnreachable, match="was not sent"):
            await client.execute(commands.cont())
