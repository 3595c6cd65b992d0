"""Disks that may not be exported, read by push: exactly, under load, through faults, and the guest never hears of it.

Such are the disks in an iothread on a QEMU before 10.0, and all disks where QEMU's NBD server is somebody else's. On a
later QEMU the former are exported, and these tests see that instead. A guest runs in most of them: only its driver
makes the iothread work, and QEMU 7.2 does not survive ``Machine.qemu_io`` on such a disk.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import pytest
import trio

from integration.harness import (
    Disk,
    GuestImage,
    Machine,
    background,
    copy_image,
    first_difference,
    make_ext4,
    make_image,
    start_block_load,
    start_machine,
    stop_loads,
)
from integration.pair import KIB, MIB, Pair, Scribbler, fill, image, pair_of
from integration.pulse import Guest, start_guest_load
from integration.test_epoch_real import attach, identity, put, take_nbd_server
from integration.test_guardian_real import drive, see_what_is_left, track
from qemu_remus.nbd.batches import BATCH_BYTES
from qemu_remus.qemu import bitmap_file

ODD = 40 * MIB + 22_016
"""A disk's size that is no multiple of 4 or 64 KiB."""

CLUSTER = 64 * KIB
LOADED = 8 * MIB
"""What the guest writes to, at each disk's start."""


def iothread_disks(scratch: Path) -> list[Disk]:
    """Two with an iothread each, and one without."""
    return [
        image(scratch, "a", ODD, iothread=True),
        image(scratch, "b", 8 * MIB + 512, iothread=True),
        image(scratch, "c", 8 * MIB),
    ]


async def load_all(machine: Machine, *, rate: float = 300) -> None:
    """Let the guest write, discard and write zeroes on every disk."""
    for number, disk in enumerate(machine.disks, 1):
        await start_block_load(machine, disk.name, start=0, size=LOADED, rate=rate, seed=number)


async def see_alive(machine: Machine) -> None:
    """The guest's disks answer it, and its kernel has nothing to say about them."""
    assert machine.process.running, machine.process.tail()
    for disk in machine.disks:
        device = machine.device_in_guest(disk.name)
        await machine.guest.run(f"dd if=/dev/zero of={device} bs=4096 seek=1000 count=1 conv=notrunc,fsync 2>/dev/null")
    assert await machine.guest.run("dmesg | grep -E 'I/O error|timed out|blocked for more'", check=False) == ""


# --- exact


async def test_disks_in_iothreads_fail_over_byte_for_byte(scratch: Path, guest: GuestImage) -> None:
    async with pair_of(scratch, iothread_disks(scratch), guest=guest) as pair:
        await load_all(pair.machine)
        await pair.start_primary()
        await pair.primary.protected()
        status = await pair.primary.progress(12)
        assert status["epochs"]["lost"] == 0
        await pair.see_exact_after_crash()


@pytest.mark.slow
async def test_hundreds_of_epochs_under_load_lose_none_and_are_exact(scratch: Path, guest: GuestImage) -> None:
    async with pair_of(scratch, iothread_disks(scratch), guest=guest, interval_ms=50) as pair:
        await load_all(pair.machine, rate=0)
        await pair.start_primary()
        await pair.primary.protected()
        status = await pair.primary.progress(400, timeout=900)
        assert status["epochs"]["lost"] == 0
        await see_alive(pair.machine)
        await pair.see_exact_after_crash()


async def test_disks_beside_somebody_elses_nbd_server_fail_over_byte_for_byte(scratch: Path) -> None:
    disks = [image(scratch, "a", ODD), image(scratch, "b", 8 * MIB + 512)]
    async with pair_of(scratch, disks) as pair, trio.open_nursery() as nursery:
        await take_nbd_server(pair.machine)
        await fill(pair.machine)
        scribbler = Scribbler(pair.machine)
        nursery.start_soon(scribbler.run)
        await pair.start_primary()
        await pair.primary.protected()
        assert "read by push" in pair.primary.log
        await pair.primary.progress(6)
        await scribbler.end()
        await pair.see_exact_after_crash()


@pytest.mark.parametrize("overwrite", ["write", "zero", "discard"])
async def test_cluster_overwritten_while_a_job_copies_is_as_at_the_checkpoint(
    scratch: Path, guest: GuestImage, overwrite: str
) -> None:
    """As integration/test_snapshot_edges.py, in an iothread: QEMU 7.2 answers wrong across a cluster's border."""
    disk = image(scratch, "a", 4 * MIB, iothread=True)
    commands = {
        "write": "dd if=/dev/urandom of={device} bs=64k seek={at} count=1 oflag=direct conv=notrunc",
        "zero": "blkdiscard -z -o {offset} -l 65536 {device} || dd if=/dev/zero of={device} bs=64k seek={at} count=1",
        "discard": "blkdiscard -o {offset} -l 65536 {device}",
    }
    async with start_machine(scratch, [disk], guest=guest) as machine, attach(machine, scratch) as rig:
        device = machine.device_in_guest("a")
        await rig.attachment.start_tracking(identity(1))
        for number, start in enumerate((0, 4 * KIB, 20 * KIB), 1):
            await machine.guest.run(
                f"dd if=/dev/urandom of={device} bs=4096 seek={start // 4096} count=256 conv=notrunc,fsync 2>&1;"
                f"dd if=/dev/zero of={device} bs=4096 seek={start // 4096 + 128} count=25 conv=notrunc,fsync 2>&1"
            )
            copy = await copy_image(disk.image, scratch / "copy")
            with copy.open("r+b") as file:
                file.seek(start)
                file.write(b"\xaa" * MIB)
            capture = await rig.attachment.capture(identity(number), identity(number + 1), pause=True)
            now = await copy_image(disk.image, scratch / "now")
            for at in range(0, MIB // CLUSTER, 2):
                command = commands[overwrite].format(device=device, at=at, offset=at * CLUSTER)
                await machine.guest.run(f"{{ {command}; }} 2>&1; sync")
            async with rig.attachment.read(capture) as batches:
                async for batch in batches:
                    put([copy], batch)
            await rig.attachment.release(capture)
            assert await first_difference(now, copy) is None
            await rig.attachment.remove_bitmaps(identity(number))
        await see_alive(machine)


async def test_live_disk_is_read_window_by_window_while_its_guest_writes(scratch: Path, guest: GuestImage) -> None:
    """What is read is fuzzy; with what was recorded meanwhile, it is the disk."""
    disk = image(scratch, "a", 160 * MIB + 512, iothread=True)
    with disk.image.open("r+b") as file:
        for at in range(0, 160 * MIB, 4 * MIB):
            file.seek(at)
            file.write(at.to_bytes(8, "little") * 4096)
    async with start_machine(scratch, [disk], guest=guest) as machine, attach(machine, scratch) as rig:
        copy = make_image(scratch / "copy", 160 * MIB + 512)
        await rig.attachment.start_tracking(identity(1))
        await load_all(machine)
        async with rig.attachment.read_live(0) as batches:
            async for batch in batches:
                assert len(batch.data) <= BATCH_BYTES
                put([copy], batch)
        await rig.attachment.rotate(identity(1), identity(2))
        async with rig.attachment.read_ahead(identity(1)) as batches:
            async for batch in batches:
                put([copy], batch)
        await stop_loads(machine)
        capture = await rig.attachment.capture(identity(2), identity(3), pause=True)
        now = await copy_image(disk.image, scratch / "now")
        async with rig.attachment.read(capture) as batches:
            async for batch in batches:
                put([copy], batch)
        await rig.attachment.release(capture)
        assert await first_difference(now, copy) is None
        await rig.see_harmless()


async def test_outages_and_lost_bitmaps_cost_the_difference(scratch: Path, guest: GuestImage) -> None:
    async with pair_of(scratch, iothread_disks(scratch), guest=guest) as pair:
        machine = pair.machine
        await machine.guest.run(f"dd if=/dev/urandom of={machine.device_in_guest('a')} bs=1M count=32 conv=fsync")
        await pair.start_primary()
        await pair.primary.protected()
        assert await pair.primary.stop() == 0
        await load_all(machine)
        await stop_loads_after(machine, 1)
        await pair.start_primary()
        assert (await pair.primary.protected())["bytes-sent"] < 24 * MIB
        assert await pair.primary.stop() == 0
        # behind our back: that disk alone is compared
        for entry in await machine.qmp.execute("query-named-block-nodes", {"flat": True}):
            if entry["node-name"] == "a-node":
                for bitmap in entry["dirty-bitmaps"]:
                    arguments = {"node": "a-node", "name": bitmap["name"]}
                    await machine.qmp.execute("block-dirty-bitmap-remove", arguments)
        await pair.start_primary()
        assert (await pair.primary.protected())["bytes-sent"] < 8 * MIB
        await pair.see_exact_after_crash()


async def stop_loads_after(machine: Machine, seconds: float) -> None:
    """Let the guest write for a while; how much is not important."""
    await trio.sleep(seconds)
    await stop_loads(machine)


# --- what QEMU takes for a bitmap


@pytest.mark.parametrize("size", [ODD, 512, 3 * 512 * MIB + 22_016])
async def test_qemu_and_we_mean_the_same_by_a_stored_bitmap(scratch: Path, size: int) -> None:
    disk = image(scratch, "a", size)
    async with start_machine(scratch, [disk]) as machine:
        file = scratch / "bitmaps"
        with file.open("w+b") as ours:
            ours.truncate(bitmap_file.file_size(size, 4096))

            def write(pieces: list[bitmap_file.Piece]) -> None:
                for offset, data in pieces:
                    ours.seek(offset)
                    ours.write(data)
                ours.flush()

            def read(length: int, offset: int) -> bytes:
                ours.seek(offset)
                return ours.read(length)

            execute = machine.qmp.execute
            node = {"driver": "file", "node-name": "file", "filename": str(file), "locking": "off"}
            await execute("blockdev-add", node)
            last = (size - 1) // 4096 * 4096
            ranges = sorted({(0, 4096), (min(last, 20 * KIB), 4096), (min(last, 2 * MIB), 3 * 4096), (last, 4096)})
            write(bitmap_file.image_with(size, "map", 4096, ranges))
            await execute("blockdev-add", {"driver": "qcow2", "node-name": "map", "file": "file", "read-only": True})
            await execute("block-dirty-bitmap-add", {"node": "a-node", "name": "n", "granularity": 4096})
            merge = {"node": "a-node", "target": "n", "bitmaps": [{"node": "map", "name": "map"}]}
            await execute("block-dirty-bitmap-merge", merge)
            await execute("blockdev-del", {"node-name": "map"})
            write(bitmap_file.empty_image(size))
            await execute("blockdev-add", {"driver": "qcow2", "node-name": "map", "file": "file"})
            bitmap = {"node": "map", "name": "map", "granularity": 4096, "persistent": True, "disabled": True}
            await execute("block-dirty-bitmap-add", bitmap)
            merge = {"node": "map", "target": "map", "bitmaps": [{"node": "a-node", "name": "n"}]}
            await execute("block-dirty-bitmap-merge", merge)
            await execute("blockdev-del", {"node-name": "map"})
            found = bitmap_file.read_bitmap(read, size, "map", 4096)
            expected = bitmap_file.read_bitmap(
                _Pieces(bitmap_file.image_with(size, "map", 4096, ranges)).read, size, "map", 4096
            )
            assert list(found.ranges()) == list(expected.ranges())


class _Pieces:
    """A file that was never written."""

    def __init__(self, pieces: list[bitmap_file.Piece]) -> None:
        self._pieces = dict(pieces)

    def read(self, length: int, offset: int) -> bytes:
        return self._pieces[offset][:length]


# --- faults


@pytest.mark.parametrize(
    ("work", "steps"),
    [("epoch", 6), pytest.param("epoch", 1, marks=pytest.mark.slow), pytest.param("live", 1, marks=pytest.mark.slow)],
)
async def test_sigkill_at_any_point_of_a_push_leaves_the_guest_alive(
    scratch: Path, guest: GuestImage, work: str, steps: int
) -> None:
    disks = [image(scratch, "a", ODD, iothread=True)]
    async with start_machine(scratch, disks, guest=guest) as machine:
        await track(machine)
        await load_all(machine)
        deaths = 0
        for point in count(0, steps):
            status = await drive(machine, scratch, 2 * point + 3, "kill", point, "--work", work)
            assert await machine.status() == "running", f"point {point}"
            await see_what_is_left(machine, {"a": 4096})
            await see_alive(machine)
            if status == 0:
                break
            assert status == -signal.SIGKILL
            deaths += 1
        assert deaths * steps > 30


@pytest.mark.parametrize(
    "point",
    [
        "blockdev-backup",
        *(
            pytest.param(point, marks=pytest.mark.slow)
            for point in ("stop", "qom-set", "block-dirty-bitmap-merge", "query-jobs", "job-dismiss", "blockdev-del")
        ),
    ],
)
async def test_a_controller_that_hangs_in_a_push_hangs_nobody_else(
    scratch: Path, guest: GuestImage, point: str
) -> None:
    disks = [image(scratch, "a", ODD, iothread=True)]
    async with start_machine(scratch, disks, guest=guest) as machine:
        await track(machine)
        await load_all(machine)
        options = ("--work", "epoch", "--patience", 3)
        async with background() as nursery:

            async def look() -> None:
                while True:
                    # each of these waits for all that the disks have under way
                    await see_alive(machine)

            nursery.start_soon(look)
            status = await drive(machine, scratch, 3, "stop", point, *options, pause_limit=1.0)
        assert status == -signal.SIGKILL
        await see_what_is_left(machine, {"a": 4096})
        await see_alive(machine)


@asynccontextmanager
async def loaded_pair(scratch: Path, guest: GuestImage, *extra: str) -> AsyncIterator[tuple[Pair, Guest]]:
    """A VM with two iothreads whose guest writes to its disks, judging by itself; not protected yet."""
    disks = [
        Disk("a", await make_ext4(scratch / "a.img", 64 * MIB), iothread=True),
        Disk("b", make_image(scratch / "b.img", 32 * MIB), iothread=True),
    ]
    async with (
        pair_of(scratch, disks, guest=guest, heartbeat=3.0, extra=extra) as pair,
        start_guest_load(pair.machine) as load,
    ):
        yield pair, load


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
async def test_a_guest_sees_nothing_of_a_primary_that_is_killed_or_hangs(
    scratch: Path, guest: GuestImage, number: signal.Signals
) -> None:
    async with loaded_pair(scratch, guest) as (pair, load):
        await pair.start_primary()
        await pair.primary.protected()
        for _ in range(3):
            await pair.primary.progress(2)
            pair.primary.process.signal(number)
            await load.go_on(20)
            if number is signal.SIGSTOP:
                await pair.go_on(pair.primary)
            else:
                await pair.primary.process.wait()
                await pair.start_primary()
            await pair.primary.protected()
        await load.see_no_errors()
        await load.stop()
        await pair.see_exact_after_crash()


@pytest.mark.slow
async def test_pauses_of_somebody_else_and_a_reset_meet_jobs_and_end_nothing(scratch: Path, guest: GuestImage) -> None:
    async with pair_of(scratch, iothread_disks(scratch), guest=guest, extra=("-action", "reboot=reset")) as pair:
        await load_all(pair.machine)
        await pair.start_primary()
        await pair.primary.protected()
        for _ in range(20):
            await pair.machine.pause()
            await pair.captured_from_now()
            # One that fell into a pause of ours is undone by us. A cont of somebody who takes that for his own pause,
            # and meets another of ours, ends QEMU 7.2: see the README.
            if await pair.machine.stays_paused():
                await pair.machine.resume()
            await trio.sleep(0.05)
        await pair.machine.running()
        await pair.primary.progress(3)
        for _ in range(3):
            await pair.machine.qmp.execute("system_reset", timeout=8)
            await pair.machine.qmp.wait_event("RESET", timeout=8)
            await pair.primary.progress(3)
        assert pair.machine.process.running
        await pair.see_exact_after_crash()
