"""Checkpoints of a real QEMU, without controllers or guests: exact, harmless, and within their bounds.

The disks are written through their devices (``Machine.qemu_io``), as a guest's writes go. What is read is put together
here and compared with a copy of the image that was taken while the VM was paused.
"""

from __future__ import annotations

import errno
import shutil
import statistics
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import trio

from integration.machine import Disk, Interface, Machine, Style, start_machine
from integration.qemus import OTHERS
from qemu_remus.core.errors import CheckpointVoid, GraphChanged, QemuRemusError, SnapshotBroken
from qemu_remus.core.model import EpochNumber, Generation, NodeName, pair_name
from qemu_remus.nbd.batches import Batch
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.attachment import Attachment, open_attachment
from qemu_remus.qemu.capabilities import query_capabilities
from qemu_remus.qemu.client import open_qmp
from qemu_remus.qemu.discover import discover
from qemu_remus.qemu.disks import choose_disks
from qemu_remus.qemu.guardian_client import start_guardian
from qemu_remus.qemu.nodes import BitmapIdentity, is_ours
from tests.faulty_qmp import Fault, FaultyQmp

pytestmark = pytest.mark.every_qemu(slow=OTHERS)

PAIR = pair_name("real")
GENERATION = Generation(UUID("11111111-2222-3333-4444-555555555555"))
ODD = (8 << 20) + 22_016
"""A disk's size that is no multiple of 4 or 64 KiB."""


def identity(number: int) -> BitmapIdentity:
    return BitmapIdentity(PAIR, GENERATION, None, EpochNumber(number))


def named(number: int) -> Callable[[object], BitmapIdentity]:
    """Names the bitmap that takes over whatever is found."""
    return lambda _: identity(number)


@dataclass
class Rig:
    machine: Machine
    client: FaultyQmp
    attachment: Attachment

    async def names(self) -> list[NodeName]:
        nodes = await self.client.execute(commands.query_named_block_nodes())
        return list(epoch.bitmaps_by_node(nodes))

    async def see_harmless(self) -> None:
        """The VM runs on its own nodes, and of ours only fleeces and bitmaps are in."""
        assert await self.machine.status() == "running"
        for disk in self.machine.disks:
            assert not is_ours(await self.machine.node(disk.name))
        assert epoch.inserted_nodes(PAIR, await self.names()) == []
        assert await self.client.execute(commands.query_block_exports()) == []


@asynccontextmanager
async def attached(directory: Path, disks: Sequence[Disk], way: str = "pull") -> AsyncIterator[Rig]:
    async with start_machine(directory, disks) as machine:
        if way == "push":
            await take_nbd_server(machine)
        async with attach(machine, directory) as rig:
            yield rig


async def take_nbd_server(machine: Machine) -> None:
    """Somebody else starts QEMU's one NBD server, so that all of its disks are read by push."""
    address = {"type": "unix", "data": {"path": str(machine.directory / "theirs")}}
    await machine.qmp.execute("nbd-server-start", {"addr": address})


@asynccontextmanager
async def attach(machine: Machine, directory: Path) -> AsyncIterator[Rig]:
    async with open_qmp(machine.qmp_path) as plain, start_guardian(machine.qmp_path, PAIR) as guardian:
        client = FaultyQmp(plain)
        capabilities = await query_capabilities(plain)
        disks = choose_disks(await discover(plain, capabilities), None, capabilities)
        async with open_attachment(
            client.as_client(),
            capabilities,
            PAIR,
            disks,
            fleece_dir=directory,
            runtime_dir=directory,
            guardian=guardian,
        ) as attachment:
            yield Rig(machine, client, attachment)


def image(directory: Path, name: str, size: int = 8 << 20, **options: Any) -> Disk:
    with (directory / f"{name}.img").open("wb") as file:
        file.truncate(size)
    return Disk(name, directory / f"{name}.img", **options)


def put(copies: Sequence[Path], batch: Batch) -> None:
    """Write a batch to the copies, as a secondary would."""
    position = 0
    for extent in batch.extents:
        with copies[extent.disk].open("r+b") as copy:
            copy.seek(extent.offset)
            copy.write(bytes(extent.length) if extent.zero else batch.data[position : position + extent.length])
        position += extent.payload


def aside(disks: Sequence[Disk], directory: Path, kind: str) -> list[Path]:
    return [Path(shutil.copyfile(disk.image, directory / f"{disk.name}.{kind}")) for disk in disks]


def same(left: Path, right: Path) -> bool:
    return left.read_bytes() == right.read_bytes()


async def scribble(machine: Machine, seed: int) -> None:
    """Whole and partial overwrites, neighbours, the ends, zeroes and discards, on every disk."""
    for index, disk in enumerate(machine.disks):
        size = disk.image.stat().st_size
        base = (seed * 7 + index * 3) % 40 * 131_072
        for command in (
            f"write -P {seed % 255 + 1} {base} 65536",
            f"write -P {seed % 251 + 2} {base + 512} 1024",
            f"write -P {seed % 241 + 3} {base + 65536} 4096",
            f"write -z {base + 8192} 12288",
            f"write -P {seed % 239 + 4} {size - 512} 512",
            f"discard {(base + (2 << 20)) % (6 << 20)} 131072",
        ):
            await machine.qemu_io(disk.name, command)


MIXES: dict[str, list[tuple[str, int, dict[str, Any]]]] = {
    "one": [("a", ODD, {})],
    "three": [
        ("a", 8 << 20, {"style": Style.DRIVE}),
        ("b", ODD, {"interface": Interface.SCSI}),
        ("c", (6 << 20) + 512, {"interface": Interface.IDE, "style": Style.IMPLICIT}),
    ],
}


@pytest.mark.parametrize("way", ["pull", "push"])
@pytest.mark.parametrize("mix", MIXES)
async def test_copies_equal_the_disks_at_the_checkpoint_byte_for_byte(scratch: Path, mix: str, way: str) -> None:
    disks = [image(scratch, name, size, **options) for name, size, options in MIXES[mix]]
    async with attached(scratch, disks, way) as rig:
        machine, attachment = rig.machine, rig.attachment
        disks = by_filename(machine.disks, attachment)
        await scribble(machine, 1)
        await attachment.start_tracking(identity(1))
        copies = aside(disks, scratch, "copy")
        for copy in copies:
            with copy.open("r+b") as file:  # what a target held before must not show through
                file.write(b"\xaa" * copy.stat().st_size)
        for index in range(len(disks)):
            async with attachment.read_live(index) as batches:
                async for batch in batches:
                    put(copies, batch)
                    if batch.extents[0].offset == 0:
                        await scribble(machine, 50 + index)
        for number in range(1, 5):
            await scribble(machine, number)
            # Paused by somebody, so that the images can be put aside; every other checkpoint is one of our own pauses.
            await machine.pause()
            images = aside(disks, scratch, "now")
            if number % 2:
                capture = await attachment.capture(identity(number), identity(number + 1), pause=False)
                await machine.resume()
            else:
                await machine.resume()
                capture = await attachment.capture(identity(number), identity(number + 1), pause=True)
            await scribble(machine, number + 100)
            async with attachment.read(capture) as batches:
                async for batch in batches:
                    put(copies, batch)
                    await scribble(machine, number + 200)
            await attachment.release(capture)
            await attachment.remove_bitmaps(identity(number))
            assert [same(*pair) for pair in zip(copies, images, strict=True)] == [True] * len(disks)
        await rig.see_harmless()


def by_filename(disks: Sequence[Disk], attachment: Attachment) -> list[Disk]:
    """The machine's disks in the attachment's order, whatever their devices are called."""
    return [next(disk for disk in disks if str(disk.image) == one.filename) for one in attachment.disks]


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.DOUBT])
async def test_a_fault_at_any_command_leaves_the_vm_as_it_was(scratch: Path, fault: Fault) -> None:
    failures = 0
    async with attached(scratch, [image(scratch, "a"), image(scratch, "b")]) as rig:
        await rig.attachment.start_tracking(identity(1))
        for point in count():
            current = 2 * point + 3
            await rig.machine.qemu_io("a", f"write -P 7 {point * 8192} 4096")
            found = set().union(*(await rig.attachment.bitmaps()).values())
            old = sorted((one.identity for one in found), key=lambda one: one.epoch)
            await rig.attachment.merge_back(old, named(current))
            rig.client.arm(fault, point)
            try:
                await rig.attachment.capture(identity(current), identity(current + 1), pause=True)
            except QemuRemusError:
                failures += 1
            rig.client.disarm()
            await rig.attachment.prepare()
            await rig.see_harmless()
            assert await rig.attachment.dirty_bytes() >= (point + 1) * 4096
            if not rig.client.struck:
                break
    assert failures > 8


def full_fleece(node: NodeName, filename: str) -> commands.Command:
    """As ``blockdev_add_file``, on a file system that is full."""
    full = {"event": "none", "iotype": "write", "errno": errno.ENOSPC}
    below = {"driver": "file", "filename": filename, "locking": "off"}
    options = {"driver": "blkdebug", "node-name": node, "image": below, "inject-error": [full]}
    return commands.Command("blockdev-add", options, changes_state=True)


async def test_a_full_fleece_costs_the_epoch_and_never_the_guests_write(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "blockdev_add_file", full_fleece)
    async with attached(scratch, [image(scratch, "a")]) as rig:
        await rig.attachment.start_tracking(identity(1))
        await rig.machine.qemu_io("a", "write -P 1 0 65536")
        capture = await rig.attachment.capture(identity(1), identity(2), pause=True)
        await rig.machine.qemu_io("a", "write -P 2 0 65536")
        async with rig.attachment.read(capture) as batches:
            with pytest.raises(SnapshotBroken):
                await anext(batches)
        await rig.attachment.release(capture)
        await rig.attachment.merge_back([identity(1), identity(2)], named(3))
        assert await rig.attachment.dirty_bytes() == 65536
        await rig.see_harmless()


async def test_the_vm_resumed_by_somebody_else_voids_the_checkpoint(scratch: Path) -> None:
    async with attached(scratch, [image(scratch, "a")]) as rig:
        await rig.attachment.start_tracking(identity(1))
        await rig.machine.qemu_io("a", "write -P 1 0 4096")
        with pytest.raises(CheckpointVoid):
            await rig.attachment.capture(identity(1), identity(2), pause=False)
        await rig.see_harmless()


async def test_an_overlay_of_another_tool_is_not_bypassed(scratch: Path) -> None:
    async with attached(scratch, [image(scratch, "a")]) as rig:
        await rig.attachment.start_tracking(identity(1))
        await rig.machine.qemu_io("a", "write -P 1 0 4096")
        overlay = {"node-name": "a-node", "snapshot-file": str(scratch / "o"), "snapshot-node-name": "overlay"}
        await rig.machine.qmp.execute("blockdev-snapshot-sync", overlay)
        with pytest.raises(GraphChanged, match="overlay"):
            await rig.attachment.capture(identity(1), identity(2), pause=True)
        assert await rig.machine.node("a") == "overlay"
        assert await rig.machine.status() == "running"


async def test_exact_counting_and_merging_do_what_the_fakes_say(scratch: Path) -> None:
    """Bitmaps of different granularities merge, and different names come and go in one transaction."""
    async with attached(scratch, [image(scratch, "a")]) as rig:
        await rig.attachment.start_tracking(identity(1))
        for offset in (0, 4096, 65536 - 512, 3 << 20):
            await rig.machine.qemu_io("a", f"write -P 1 {offset} 512")
        assert await rig.attachment._capturer._fleece_room._count_clusters(identity(1), [0]) == 2 * 65536
        await rig.attachment.merge_back([identity(1)], named(2))
        assert await rig.attachment.dirty_bytes() == 4 * 4096
        assert list((await rig.attachment.bitmaps()).values()) == [(epoch.Tracked(identity(2), recording=True),)]


async def test_a_released_fleece_is_empty_and_has_no_name(scratch: Path) -> None:
    async with attached(scratch, [image(scratch, "a")]) as rig:
        await rig.attachment.start_tracking(identity(1))
        await rig.machine.qemu_io("a", "write -P 1 0 1M")
        capture = await rig.attachment.capture(identity(1), identity(2), pause=True)
        await rig.machine.qemu_io("a", "write -P 2 0 1M")
        (fleece,) = rig.attachment._fleeces._files.values()
        assert fleece.allocated() >= 1 << 20
        await rig.attachment.release(capture)
        assert fleece.allocated() == 0
        assert fleeces(scratch) == []


def fleeces(directory: Path) -> list[Path]:
    return list(directory.glob("*.fleece"))


@pytest.mark.bench
async def test_the_pause_does_not_grow_with_a_disk_of_100_gib(scratch: Path) -> None:
    """The bound under load is the benchmark's; here, without one, where a bare pause is shortest, a loose one holds."""
    async with attached(scratch, [image(scratch, "a", 100 << 30)]) as rig:
        await rig.attachment.start_tracking(identity(1))
        bare, ours = [], []
        for number in range(1, 21):
            for offset in range(16):
                await rig.machine.qemu_io("a", f"write -P 1 {(offset * 67 + number) << 26} 4096")
            started = trio.current_time()
            await rig.client.execute(commands.stop())
            await rig.client.execute(commands.cont())
            bare.append(trio.current_time() - started)
            await rig.machine.qemu_io("a", f"write -P 1 {number << 30} 4096")
            capture = await rig.attachment.capture(identity(number), identity(number + 1), pause=True)
            ours.append(capture.pause_seconds)
            await rig.attachment.release(capture)
            await rig.attachment.remove_bitmaps(identity(number))
        print(f"bare {statistics.median(bare) * 1000:.2f} ms, ours {statistics.median(ours) * 1000:.2f} ms")
        assert statistics.median(ours) < 8 * statistics.median(bare)
