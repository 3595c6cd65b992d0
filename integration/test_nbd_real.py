"""The NBD reader against QEMU's own servers: qemu-nbd with a qcow2 bitmap, and a running QEMU's view of a checkpoint.

What is read is compared, byte for byte, with an image copied aside; the last tests do what a reader that hangs does.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from integration.machine import Disk, Machine, start_machine
from integration.process import run, start_process
from integration.qemus import OTHERS
from qemu_remus.core.errors import NbdRequestFailed, SnapshotBroken
from qemu_remus.nbd.batches import Run, append_run
from qemu_remus.nbd.client import NbdClient, close_all, open_nbd
from qemu_remus.nbd.protocol import STATUS_EXTENTS, dirty_context, read_cost
from qemu_remus.nbd.reader import BatchStream, read_allocated, read_dirty

pytestmark = pytest.mark.every_qemu(slow=OTHERS)

KIB = 1024
MIB = 1024 * KIB
BLOCK = 4096
ODD_SIZE = 40 * MIB + 22_016


class Copy:
    """What a stream of batches says of a disk: written over an image, and which ranges it covered."""

    def __init__(self, image: bytes) -> None:
        self.image = bytearray(image)
        self.covered: list[Run] = []
        self.data_bytes = 0

    async def take(self, stream: BatchStream) -> None:
        async for batch in stream:
            at = 0
            for extent in batch.extents:
                data = bytes(extent.length) if extent.zero else batch.data[at : at + extent.length]
                self.image[extent.offset : extent.end] = data
                append_run(self.covered, Run(extent.offset, extent.length))
                at += extent.payload
            assert at == len(batch.data)
            self.data_bytes += at


def runs_of(blocks: set[int], size: int) -> list[Run]:
    runs: list[Run] = []
    for block in sorted(blocks):
        append_run(runs, Run(block * BLOCK, min(BLOCK, size - block * BLOCK)))
    return runs


@asynccontextmanager
async def qemu_nbd(image: Path, scratch: Path, *arguments: str) -> AsyncIterator[Path]:
    """Serve an image, read-only, while the block lasts; yields the socket's path once it accepts."""
    path, pid_file = scratch / "nbd", scratch / "nbd.pid"
    command = ["qemu-nbd", "--read-only", "--persistent", "--shared=16", f"--socket={path}", f"--pid-file={pid_file}"]
    async with start_process([*command, *arguments, str(image)], out=scratch / "qemu-nbd.out") as process:
        with trio.fail_after(20):
            while not pid_file.exists():  # written when it listens; qemu-nbd has no other way to say so
                assert process.running, process.tail()
                await trio.sleep(0.02)
        yield path


async def qcow2_with_writes(scratch: Path, size: int, granularity: int, commands: list[str]) -> Path:
    """A qcow2 image with bitmap b0, and the writes that it recorded."""
    image = scratch / "disk.qcow2"
    await run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), str(size)], scratch=scratch)
    (await run(["qemu-img", "bitmap", "--add", "-g", str(granularity), str(image), "b0"], scratch=scratch)).check()
    words = ["qemu-io", "-t", "unsafe", "-f", "qcow2"]
    for command in commands:
        words += ["-c", command]
    (await run([*words, str(image)], scratch=scratch)).check()
    return image


async def raw_of(image: Path, scratch: Path) -> bytes:
    raw = scratch / "disk.raw"
    (await run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], scratch=scratch)).check()
    return raw.read_bytes()


async def dirty_bytes_over(path: Path, copy: Copy, blocks: int, granularity: int, **more: Any) -> None:
    async with read_dirty(
        path, "", "b0", disk=0, dirty_bytes=blocks * granularity, granularity=granularity, **more
    ) as stream:
        await copy.take(stream)


@pytest.mark.parametrize("connections", [1, 4])
async def test_scattered_blocks_of_a_qcow2_come_exactly_as_its_bitmap_says(scratch: Path, connections: int) -> None:
    order = random.Random(7)
    blocks = set(order.sample(range(ODD_SIZE // BLOCK), 900)) | {ODD_SIZE // BLOCK}
    commands = [f"write -q -P {order.randint(1, 255)} {run.offset} {run.length}" for run in runs_of(blocks, ODD_SIZE)]
    image = await qcow2_with_writes(scratch, ODD_SIZE, BLOCK, commands)
    expected = await raw_of(image, scratch)
    copy = Copy(bytes(ODD_SIZE))
    async with qemu_nbd(image, scratch, "--format=qcow2", "--bitmap=b0") as path:
        await dirty_bytes_over(path, copy, len(blocks), BLOCK, connections=connections)
    assert copy.image == expected
    assert copy.covered == runs_of(blocks, ODD_SIZE)


@pytest.mark.parametrize("promised", [1, 16384])
async def test_a_map_as_fragmented_as_can_be_is_read_whatever_was_promised(scratch: Path, promised: int) -> None:
    size = 128 * MIB
    blocks = set(range(0, size // BLOCK, 2))
    # Written zeroes are dirty all the same, and one request makes 16384 alternating blocks of nothing but bitmap.
    image = await qcow2_with_writes(scratch, size, BLOCK, ["write -q -P 1 0 1M"])
    (await run(["qemu-img", "bitmap", "--clear", str(image), "b0"], scratch=scratch)).check()
    for start in range(0, len(blocks), 4096):
        words = ["qemu-io", "-t", "unsafe", "-f", "qcow2"]
        for block in sorted(blocks)[start : start + 4096]:
            words += ["-c", f"write -q -z {block * BLOCK} {BLOCK}"]
        (await run([*words, str(image)], scratch=scratch)).check()
    copy = Copy(b"\1" * MIB + bytes(size - MIB))
    async with qemu_nbd(image, scratch, "--format=qcow2", "--bitmap=b0") as path:
        await dirty_bytes_over(path, copy, promised, BLOCK)
    assert copy.covered == runs_of(blocks, size)
    assert copy.image == b"".join([bytes(BLOCK) + b"\1" * BLOCK] * 128) + bytes(size - MIB)
    assert copy.data_bytes == 0


@pytest.mark.parametrize("granularity", [64 * KIB, 128 * KIB])
async def test_a_coarse_bitmap_ends_at_the_disks_end(scratch: Path, granularity: int) -> None:
    last = ODD_SIZE - ODD_SIZE % granularity
    image = await qcow2_with_writes(
        scratch, ODD_SIZE, granularity, ["write -q -P 9 70000 512", f"write -q -P 8 {ODD_SIZE - 512} 512"]
    )
    expected = await raw_of(image, scratch)
    copy = Copy(bytes(ODD_SIZE))
    async with qemu_nbd(image, scratch, "--format=qcow2", "--bitmap=b0") as path:
        await dirty_bytes_over(path, copy, 2, granularity)
    assert copy.image == expected
    first = 70_000 - 70_000 % granularity
    assert copy.covered == [Run(first, granularity), Run(last, ODD_SIZE - last)]


async def test_a_sparse_image_is_read_whole_and_its_holes_cost_nothing(scratch: Path) -> None:
    size = (3 << 30) + 512
    image = scratch / "sparse.raw"
    order = random.Random(11)
    written: dict[int, bytes] = {}
    with image.open("wb") as file:
        file.truncate(size)
        for offset in (0, MIB, 32 * MIB, (1 << 30) + 12_288, size - 512):
            written[offset] = order.randbytes(min(300 * KIB, size - offset))
            file.seek(offset)
            file.write(written[offset])
    async with qemu_nbd(image, scratch, "--format=raw") as path, read_allocated(path, "", disk=0) as stream:
        position = data_bytes = 0
        async for batch in stream:
            at = 0
            for extent in batch.extents:
                assert extent.offset == position
                position = extent.end
                if not extent.zero:
                    with image.open("rb") as file:
                        file.seek(extent.offset)
                        assert file.read(extent.length) == batch.data[at : at + extent.length]
                at += extent.payload
            data_bytes += at
    assert position == size
    assert data_bytes <= sum(map(len, written.values())) + 5 * BLOCK


class Epoch:
    """A checkpoint of a machine's disk, held by a filter and exported, made by plain QMP."""

    def __init__(self, machine: Machine, scratch: Path) -> None:
        self.machine = machine
        self.path = scratch / "nbd"
        self.image = b""
        self.dirty_bytes = 0

    async def begin(self) -> None:
        """Start recording."""
        node = await self.machine.node("disk0")
        await self._execute("block-dirty-bitmap-add", node=node, name="b0", granularity=BLOCK)

    async def capture(self, scratch: Path, *, fleece_error: bool = False) -> None:
        """Take the checkpoint; ``fleece_error``: the fleece fails when it is written to."""
        node = await self.machine.node("disk0")
        fleece = scratch / "fleece"
        with fleece.open("wb") as file:
            file.truncate(ODD_SIZE)
        await self.machine.pause()
        await self._execute("block-dirty-bitmap-disable", node=node, name="b0")
        bitmaps = (await self.machine.block("disk0"))["inserted"]["dirty-bitmaps"]
        self.dirty_bytes = bitmaps[0]["count"]
        self.image = self.machine.disks[0].image.read_bytes()
        target: dict[str, Any] = {"driver": "file", "node-name": "fleece", "filename": str(fleece)}
        if fleece_error:
            target = {
                "driver": "blkdebug",
                "node-name": "fleece",
                "image": target | {"node-name": "fleece-file"},
                "inject-error": [{"event": "none", "iotype": "write", "errno": 28}],
            }
        await self._execute("blockdev-add", **target)
        filter_node = {"driver": "copy-before-write", "node-name": "filter", "file": node, "target": "fleece"}
        bitmap = {"node": node, "name": "b0"}
        more = {"bitmap": bitmap, "on-cbw-error": "break-snapshot", "discard": "unmap"}
        await self._execute("blockdev-add", **filter_node, **more)
        qdev = (await self.machine.block("disk0"))["qdev"]
        await self._execute("qom-set", path=qdev, property="drive", value="filter")
        await self._execute("blockdev-add", **{"driver": "snapshot-access", "node-name": "snapshot", "file": "filter"})
        await self.machine.resume()
        await self._execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(self.path)}})
        await self._execute(
            "block-export-add", **{"type": "nbd", "id": "x", "node-name": "snapshot", "name": "x", "bitmaps": [bitmap]}
        )

    def read(self) -> Any:
        """The reader on it."""
        return read_dirty(self.path, "x", "b0", disk=0, dirty_bytes=self.dirty_bytes, granularity=BLOCK)

    async def release(self) -> None:
        """Delete the export; fails where somebody is connected still."""
        await self._execute("block-export-del", id="x", mode="safe")

    async def _execute(self, command: str, /, **arguments: Any) -> Any:
        return await self.machine.qmp.execute(command, arguments)


@asynccontextmanager
async def a_machine(scratch: Path) -> AsyncIterator[tuple[Machine, bytes]]:
    """A machine without a guest, its disk full of random data; yields the disk's first contents with it."""
    image = scratch / "disk.raw"
    contents = random.Random(5).randbytes(ODD_SIZE)
    image.write_bytes(contents)
    async with start_machine(scratch, [Disk("disk0", image)], accelerator="tcg") as machine:
        yield machine, contents


async def test_a_checkpoint_is_read_exactly_while_the_disk_is_overwritten(scratch: Path) -> None:
    order = random.Random(13)
    async with a_machine(scratch) as (machine, before):
        epoch = Epoch(machine, scratch)
        await epoch.begin()
        for offset, length in ((0, 4 * KIB), (MIB + 1024, 512), (2 * MIB, 700 * KIB), (ODD_SIZE - 512, 512)):
            await machine.qemu_io("disk0", f"write -P {order.randint(1, 255)} {offset} {length}")
        for offset in order.sample(range(8 * MIB, 40 * MIB, 512), 60):
            await machine.qemu_io("disk0", f"write -P {order.randint(1, 255)} {offset} 512")
        await machine.qemu_io("disk0", f"write -z {4 * MIB} 300k")
        await machine.qemu_io("disk0", f"discard {5 * MIB} 1M")
        await epoch.capture(scratch)
        assert epoch.image != before
        # The guest goes on, over all that is to be read, before and while it is.
        await machine.qemu_io("disk0", "write -P 0xee 0 3M")
        copy = Copy(before)
        async with epoch.read() as stream, trio.open_nursery() as nursery:
            nursery.start_soon(machine.qemu_io, "disk0", "write -P 0xdd 1M 39M")
            await copy.take(stream)
        assert copy.image == epoch.image
        assert sum(run.length for run in copy.covered) <= epoch.dirty_bytes
        assert copy.data_bytes <= epoch.dirty_bytes - MIB  # neither zeroes nor discarded blocks were carried
        await epoch.release()


async def test_an_export_can_be_deleted_as_soon_as_a_reader_left_half_way(scratch: Path) -> None:
    async with a_machine(scratch) as (machine, _):
        epoch = Epoch(machine, scratch)
        await epoch.begin()
        await machine.qemu_io("disk0", "write -P 0x77 0 30M")
        await epoch.capture(scratch)
        async with epoch.read() as stream:
            assert (await anext(stream)).extents[0].offset == 0
        await epoch.release()


async def test_a_snapshot_that_broke_is_reported_as_such(scratch: Path) -> None:
    async with a_machine(scratch) as (machine, _):
        epoch = Epoch(machine, scratch)
        await epoch.begin()
        await machine.qemu_io("disk0", "write -P 0x77 0 4k")
        await epoch.capture(scratch, fleece_error=True)
        await machine.qemu_io("disk0", "write -P 0x78 0 4k")  # the guest's write succeeds: the snapshot gives way
        with pytest.raises(SnapshotBroken):
            async with epoch.read() as stream:
                await Copy(b"").take(stream)
        await epoch.release()


async def test_reading_outside_the_bitmap_is_refused_by_the_snapshot(scratch: Path) -> None:
    async with a_machine(scratch) as (machine, _):
        epoch = Epoch(machine, scratch)
        await epoch.begin()
        await machine.qemu_io("disk0", "write -P 0x77 0 4k")
        await epoch.capture(scratch)
        async with read_allocated(epoch.path, "x", disk=0) as stream:
            with pytest.raises(NbdRequestFailed):
                await Copy(b"").take(stream)
        await epoch.release()


@pytest.mark.parametrize("read_bytes", [512, 4 * KIB, 28 * KIB, 60 * KIB])
async def test_a_reader_that_hangs_with_its_budget_used_does_not_hold_up_the_vm(scratch: Path, read_bytes: int) -> None:
    async with a_machine(scratch) as (machine, _):
        clients = await live_export(machine, scratch)
        for client in clients:
            offset = 0
            while client.session.room_for(read_cost(read_bytes)):
                client.session.read(offset, read_bytes)
                offset += read_bytes
            await client._flush()
        # From here on nobody receives: to QEMU this is a stopped process.
        await stop_and_cont(machine)
        await close_all(clients)


async def test_a_reader_that_hangs_before_the_largest_status_does_not_hold_up_the_vm(scratch: Path) -> None:
    # Every second sector is dirty: as many extents as one answer may have.
    writes = [f"write -q -z {offset} 512" for offset in range(0, STATUS_EXTENTS * 512, 1024)]
    image = await qcow2_with_writes(scratch, ODD_SIZE, 512, writes)
    disk = Disk("disk0", image, format="qcow2")
    async with start_machine(scratch, [disk], accelerator="tcg") as machine:
        node = await machine.node("disk0")
        clients = await live_export(machine, scratch, node, "b0")
        for client in clients:
            client.session.block_status(0, STATUS_EXTENTS * 512, extents=STATUS_EXTENTS)
            await client._flush()
        await stop_and_cont(machine)
        for client in clients:
            (reply,) = await all_events(client)
            assert len(reply.contexts[dirty_context("b0")]) > STATUS_EXTENTS - 2
        await close_all(clients)


async def all_events(client: NbdClient) -> list[Any]:
    events: list[Any] = []
    while client.session.unanswered:
        events += await client.exchange()
    return events


async def live_export(machine: Machine, scratch: Path, node: str = "", bitmap: str = "") -> list[NbdClient]:
    """Four connections to an export of the live disk."""
    path = scratch / "live"
    await machine.qmp.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(path)}}})
    export: dict[str, Any] = {"type": "nbd", "id": "live", "node-name": await machine.node("disk0"), "name": "live"}
    if bitmap:
        await machine.qmp.execute("block-dirty-bitmap-disable", {"node": node, "name": bitmap})
        export["bitmaps"] = [{"node": node, "name": bitmap}]
    await machine.qmp.execute("block-export-add", export)
    contexts = [dirty_context(bitmap)] if bitmap else []
    return [await open_nbd(path, "live", contexts) for _ in range(4)]


async def stop_and_cont(machine: Machine) -> None:
    """The drain that a hung reader would hold up for ever."""
    await machine.qmp.execute("stop", timeout=10)
    await machine.qmp.execute("cont", timeout=10)
