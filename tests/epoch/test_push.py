"""Push on a fake QEMU: the disk's contents come out by jobs and files, exactly, and nothing of it stays behind.

Disk a lives in an iothread, disk b does not: in one VM there are both ways. The fake has what QEMU 7.2 dies of.
"""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio

from qemu_remus.core.errors import CheckpointVoid, EpochLost, FleeceTooSmall, QemuError, QemuRemusError, SnapshotBroken
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import DiskName
from qemu_remus.nbd.batches import Batch
from qemu_remus.qemu import push
from qemu_remus.qemu.detach import detach
from qemu_remus.qemu.fleece import FleeceFile
from qemu_remus.qemu.nodes import Kind, job_id, kind_of
from tests.epoch.rig import (
    BLOCK,
    PAIR,
    Rig,
    attached,
    directory_entries,
    identity,
    named,
    recorded,
)
from tests.fake_qemu import VIRTIO, FakeQemu
from tests.faulty_qmp import Fault

KIB = 1 << 10
MIB = 1 << 20
SIZE = 4 * MIB + 22_016
JOB = job_id(PAIR, DiskName("a"))

STAYING = {Kind.FLEECE, Kind.STAGING, Kind.MAP_FILE}
"""What a controller keeps in QEMU between two checkpoints."""


@pytest.fixture
def qemu() -> Any:
    with FakeQemu() as fake:
        fake.add_disk("a-node", VIRTIO.format("a"), size=SIZE, iothread="/objects/t")
        fake.add_disk("b-node", VIRTIO.format("b"))
        fake.nodes["a-node"].data = bytearray(random.Random(1).randbytes(SIZE))
        yield fake


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


def write(qemu: FakeQemu, offset: int, data: bytes) -> None:
    """The guest writes to disk a."""
    disk = qemu.nodes["a-node"]
    assert disk.data is not None
    disk.data[offset : offset + len(data)] = data
    qemu.write("a-node", offset, len(data))


def contents(qemu: FakeQemu) -> bytes:
    data = qemu.nodes["a-node"].data
    assert data is not None
    return bytes(data)


async def put_together(copy: bytearray, reading: AbstractAsyncContextManager[AsyncIterator[Batch]]) -> int:
    """Write all that is read into a copy of the disk; its bytes."""
    read = 0
    async with reading as batches:
        async for batch in batches:
            position = 0
            for extent in batch.extents:
                data = bytes(extent.length) if extent.zero else batch.data[position : position + extent.length]
                copy[extent.offset : extent.end] = data
                position += extent.payload
                read += extent.length
    return read


def see_clean(rig: Rig, written: set[int] | None = None) -> None:
    rig.see_harmless(written or set())
    assert {kind_of(name) for name in rig.qemu.nodes if kind_of(name)} <= STAYING
    assert rig.qemu.jobs == {}
    assert [
        name for name in rig.qemu.nodes["a-node"].bitmaps if ".00000000000000000000000000000000.none." in name
    ] == []


async def test_an_epoch_comes_out_by_a_job_exactly_as_it_was_dirtied(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        copy = bytearray(contents(qemu))
        write(qemu, 5 * BLOCK, b"\x11" * 3 * BLOCK)
        write(qemu, MIB - 512, b"\x22" * 1024)
        write(qemu, 2 * MIB, bytes(128 * KIB))
        write(qemu, SIZE - 512, b"\x33" * 512)
        expected = contents(qemu)
        capture = await rig.capture()
        assert await put_together(copy, rig.attachment.read(capture)) == sum(
            (3 * BLOCK, 2 * BLOCK, 128 * KIB, SIZE % BLOCK)
        )
        assert copy == expected
        assert JOB not in qemu.jobs
        await rig.attachment.release(capture)
        see_clean(rig)
        assert "block-export-add" not in qemu.commands()
    assert qemu.ours() == sorted(identity(number).name for number in (1, 1, 2, 2))
    assert directory_entries(directory) == []


async def test_the_other_disk_of_the_vm_is_exported_as_ever(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("b-node", 0, BLOCK)
        capture = await rig.capture()
        # The fake's NBD server would listen and say nothing.
        qemu._stop_nbd()
        with pytest.raises(QemuRemusError):
            await put_together(bytearray(MIB), rig.attachment.read(capture))
        assert "block-export-add" in qemu.commands()
        assert "blockdev-backup" not in qemu.commands()


async def test_without_an_nbd_server_of_our_own_every_disk_comes_out_by_push(qemu: FakeQemu, directory: Path) -> None:
    qemu.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(directory / "theirs.sock")}}})
    qemu.nodes["b-node"].data = bytearray(b"\x77" * MIB)
    async with attached(qemu, directory) as rig:
        qemu.write("b-node", BLOCK, BLOCK)
        capture = await rig.capture()
        copy = bytearray(MIB)
        assert await put_together(copy, rig.attachment.read(capture)) == BLOCK
        assert copy == bytes(BLOCK) + b"\x77" * BLOCK + bytes(MIB - 2 * BLOCK)
        await rig.attachment.release(capture)
        see_clean(rig)
    assert qemu.nbd is not None


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "SLICE", 256 * KIB)
    monkeypatch.setattr(push, "_LARGEST_SLICE", 512 * KIB)


@pytest.mark.usefixtures("small_slices")
async def test_an_epoch_too_large_for_one_slice_goes_in_several(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        copy = bytearray(contents(qemu))
        for at in range(0, 4 * MIB, 100 * KIB):
            write(qemu, at, bytes([at // KIB % 250 + 1]) * 5000)
        expected = contents(qemu)
        capture = await rig.capture()
        await put_together(copy, rig.attachment.read(capture))
        assert copy == expected
        assert qemu.commands().count("blockdev-backup") > 5
        await rig.attachment.release(capture)
        see_clean(rig)


@pytest.mark.usefixtures("small_slices")
async def test_a_live_disk_is_read_through_short_windows(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        copy = bytearray(SIZE)
        assert await put_together(copy, rig.attachment.read_live(0)) == SIZE
        assert copy == contents(qemu)
        pauses = rig.guardian.calls.count("arm")
        assert pauses == rig.guardian.calls.count("disarm") == qemu.commands().count("blockdev-backup") > 8
        await rig.attachment.prepare()
        see_clean(rig)


@pytest.mark.usefixtures("small_slices")
async def test_nothing_is_over_the_disk_while_a_window_is_being_sent(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig, rig.attachment.read_live(0) as batches:
        async for _ in batches:
            see_clean(rig)


@pytest.mark.usefixtures("small_slices")
async def test_a_nearly_empty_disk_is_read_in_larger_windows(qemu: FakeQemu, directory: Path) -> None:
    qemu.nodes["a-node"].data = None
    async with attached(qemu, directory) as rig:
        copy = bytearray(b"\xee" * SIZE)
        await put_together(copy, rig.attachment.read_live(0))
        assert copy == bytes(SIZE)
        assert qemu.commands().count("blockdev-backup") <= 1 + -(-(SIZE - 256 * KIB) // (512 * KIB))


async def test_what_gathered_in_an_outage_is_read_ahead(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        copy = bytearray(contents(qemu))
        write(qemu, 5 * BLOCK, b"\x11" * 3 * BLOCK)
        write(qemu, SIZE - 512, b"\x33" * 512)
        await rig.attachment.rotate(identity(1), identity(2))
        assert await put_together(copy, rig.attachment.read_ahead(identity(1))) == 3 * BLOCK + SIZE % BLOCK
        assert copy == contents(qemu)
        await rig.attachment.prepare()
        see_clean(rig, {5, 6, 7})


async def test_a_part_is_read_in_one_small_window_and_what_was_written_there_is_told(
    qemu: FakeQemu, directory: Path
) -> None:
    async with attached(qemu, directory) as rig:
        write(qemu, MIB - BLOCK, b"\x11" * 3 * BLOCK)
        write(qemu, 3 * MIB, b"\x22")
        part = Extent(0, MIB, 2 * MIB)
        copy = bytearray(SIZE)
        assert await put_together(copy, rig.attachment.read_part(part)) == 2 * MIB
        assert copy[MIB : 3 * MIB] == contents(qemu)[MIB : 3 * MIB]
        assert qemu.commands().count("blockdev-backup") == 1
        see_clean(rig)
        assert await rig.attachment.written(identity(1), part) == (Extent(0, MIB, 2 * BLOCK),)
        await rig.attachment.prepare()
        see_clean(rig)
        assert "block-export-add" not in qemu.commands()


async def test_a_snapshot_of_a_window_that_breaks_is_taken_again(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.job_errors = [os.strerror(13)] * 2
        copy = bytearray(SIZE)
        await put_together(copy, rig.attachment.read_live(0))
        assert copy == contents(qemu)
        qemu.job_errors = [os.strerror(13)] * 3
        with pytest.raises(SnapshotBroken):
            await put_together(copy, rig.attachment.read_live(0))
        see_clean(rig)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        ("Permission denied", SnapshotBroken, "broke while it was copied"),
        ("No space left on device", FleeceTooSmall, "fleece-dir"),
        ("Input/output error", EpochLost, "Input/output error"),
    ],
)
async def test_a_job_that_fails_loses_the_epoch_and_says_why(
    qemu: FakeQemu, directory: Path, error: str, kind: type[EpochLost], says: str
) -> None:
    async with attached(qemu, directory) as rig:
        write(qemu, 0, b"x")
        qemu.job_errors = [error]
        capture = await rig.capture()
        with pytest.raises(kind, match=says) as caught:
            await put_together(bytearray(SIZE), rig.attachment.read(capture))
        assert "changes stay recorded" in str(caught.value)
        await rig.attachment.release(capture)
        see_clean(rig, {0})


async def test_a_bitmap_that_qemu_cannot_store_is_no_epoch_of_nothing(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        write(qemu, 0, b"x")
        qemu.not_stored["map"] = 1
        capture = await rig.capture()
        with pytest.raises(EpochLost, match="has not stored"):
            await put_together(bytearray(SIZE), rig.attachment.read(capture))
        await rig.attachment.release(capture)
        see_clean(rig, {0})


async def test_too_little_room_for_staging_loses_the_epoch_before_a_job_is_begun(
    qemu: FakeQemu, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with attached(qemu, directory) as rig:
        write(qemu, 0, bytes(2 * MIB))
        capture = await rig.capture()
        monkeypatch.setattr(FleeceFile, "free_space", lambda _: 2 * MIB + 512 * KIB)
        with pytest.raises(FleeceTooSmall, match="524288 bytes are left"):
            await put_together(bytearray(SIZE), rig.attachment.read(capture))
        assert "blockdev-backup" not in qemu.commands()
        await rig.attachment.release(capture)
        see_clean(rig, {0})


async def test_a_job_that_does_not_end_is_ended(qemu: FakeQemu, directory: Path, autojump_clock: Any) -> None:
    async with attached(qemu, directory) as rig:
        write(qemu, 0, b"x")
        qemu.endless.add(JOB)
        capture = await rig.capture()
        with pytest.raises(EpochLost, match="within 60 s"):
            await put_together(bytearray(SIZE), rig.attachment.read(capture))
        assert qemu.commands()[-2:] == ["job-cancel", "job-dismiss"]
        await rig.attachment.release(capture)
        see_clean(rig, {0})


async def test_a_job_that_qemu_does_not_let_go_of_keeps_the_next_checkpoint_away(
    qemu: FakeQemu, directory: Path, autojump_clock: Any
) -> None:
    async with attached(qemu, directory) as rig:
        write(qemu, 0, b"x")
        qemu.endless.add(JOB)
        qemu.stuck.add(JOB)
        capture = await rig.capture()
        with pytest.raises(QemuError, match="does not let go of job"):
            await put_together(bytearray(SIZE), rig.attachment.read(capture))
        with pytest.raises(QemuError, match="does not let go of job"):
            await rig.attachment.release(capture)
        qemu.stuck.clear()
        await rig.attachment.prepare()
        see_clean(rig, {0})


async def test_a_reader_that_leaves_in_the_middle_of_a_job_takes_it_along(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        write(qemu, 0, b"x")
        qemu.endless.add(JOB)
        capture = await rig.capture()
        with trio.CancelScope() as scope:
            qemu.after["blockdev-backup"] = scope.cancel
            await put_together(bytearray(SIZE), rig.attachment.read(capture))
        assert scope.cancelled_caught
        assert qemu.jobs == {}
        await rig.attachment.release(capture)
        see_clean(rig, {0})


async def test_a_job_that_somebody_dismisses_is_not_taken_for_done(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        write(qemu, 0, b"x")
        qemu.after["blockdev-backup"] = qemu.jobs.clear
        capture = await rig.capture()
        with pytest.raises(EpochLost, match="is gone"):
            await put_together(bytearray(SIZE), rig.attachment.read(capture))
        await rig.attachment.release(capture)
        see_clean(rig, {0})


async def _epoch(rig: Rig, number: int = 1) -> None:
    capture = await rig.capture(finished=number)
    try:
        await put_together(bytearray(SIZE), rig.attachment.read(capture))
    finally:
        await rig.attachment.release(capture)


async def _live(rig: Rig, number: int = 1) -> None:
    await put_together(bytearray(SIZE), rig.attachment.read_live(0))


async def _ahead(rig: Rig, number: int = 1) -> None:
    await rig.attachment.rotate(identity(number), identity(number + 1))
    await put_together(bytearray(SIZE), rig.attachment.read_ahead(identity(number)))


async def _verify(rig: Rig, number: int = 1) -> None:
    part = Extent(0, 0, 128 * KIB)
    await put_together(bytearray(SIZE), rig.attachment.read_part(part))
    await rig.attachment.written(identity(number), part)


WORKS = [_epoch, _live, _ahead, _verify]


@pytest.fixture
def small() -> Any:
    """As ``qemu``, with a disk of one slice."""
    with FakeQemu() as fake:
        fake.add_disk("a-node", VIRTIO.format("a"), size=256 * KIB, iothread="/objects/t")
        fake.add_disk("b-node", VIRTIO.format("b"))
        yield fake


@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.DOUBT])
@pytest.mark.parametrize("work", WORKS)
async def test_a_fault_at_any_command_leaves_nothing_behind(
    small: FakeQemu, directory: Path, fault: Fault, work: Callable[[Rig, int], Awaitable[None]]
) -> None:
    failures = 0
    async with attached(small, directory) as rig:
        for point in count():
            current = 2 * point + 3
            small.write("a-node", 3 * BLOCK, BLOCK)
            found = set().union(*(await rig.attachment.bitmaps()).values())
            old = sorted((one.identity for one in found), key=lambda one: one.epoch)
            await rig.attachment.merge_back(old, named(current))
            rig.client.arm(fault, point)
            try:
                await work(rig, current)
            except QemuRemusError:
                failures += 1
            rig.client.disarm()
            await rig.attachment.prepare()
            see_clean(rig, {3})
            if not rig.client.struck:
                break
    # of ours only what records is left, whatever happened
    assert {kind_of(name) for name in small.nodes} == {None}
    assert failures > 8


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("moment", ["hang_up_before", "hang_up_after"])
async def test_what_a_controller_leaves_at_any_command_is_taken_out_behind_it(
    small: FakeQemu, directory: Path, moment: str, work: Callable[[Rig], Awaitable[None]]
) -> None:
    """As the guardian's clean-up does, and a restarted controller: the dead one's connection ends at that command."""
    async with attached(small, directory) as rig:
        small.write("a-node", 3 * BLOCK, BLOCK)
        before = len(small.log)
        await work(rig)
        commands = [name for name, _ in small.log[before:]]
    async with small.connect() as client:
        await detach(client, PAIR)
    # Those that capturing has as well are tried there.
    for command in sorted({*commands} & {"block-dirty-bitmap-merge", "blockdev-backup", "job-dismiss", "query-jobs"}):
        async with attached(small, directory) as rig:
            small.write("a-node", 3 * BLOCK, BLOCK)
            small.endless = {JOB} if command in ("query-jobs", "blockdev-backup") else set()
            getattr(small, moment).add(command)
            with pytest.raises(QemuRemusError):
                await work(rig)
        getattr(small, moment).clear()
        assert small.aborted == ""
        async with small.connect() as client:
            report = await detach(client, PAIR, keep_tracking=True)
            assert report.ok, report.lines()
            assert {kind_of(name) for name in small.nodes} == {None}
            assert [device.node for device in small.devices.values()] == ["a-node", "b-node"]
            assert small.jobs == {}
            assert 3 in recorded(small, "a-node")
            assert {*small.nodes["a-node"].bitmaps} <= {identity(1).name, identity(2).name}
            await detach(client, PAIR)


async def test_a_pause_of_somebody_else_is_waited_for_and_then_used(
    qemu: FakeQemu, directory: Path, autojump_clock: Any
) -> None:
    """Theirs is most likely short, and a node that is added as it ends would end QEMU."""
    async with attached(qemu, directory) as rig:
        qemu.execute("stop", {})
        qemu._pending.clear()
        before = trio.current_time()
        copy = bytearray(SIZE)
        await put_together(copy, rig.attachment.read_live(0))
        assert copy == contents(qemu)
        assert trio.current_time() >= before + 1
        assert qemu.status == "paused"
        assert "cont" not in qemu.commands()
        assert rig.guardian.calls == []


async def test_nothing_goes_in_where_somebody_else_stopped_the_vm_just_before_us(
    qemu: FakeQemu, directory: Path
) -> None:
    """He may let it run again at any moment, and a node that is added then ends QEMU."""
    async with attached(qemu, directory) as rig:
        write(qemu, 0, b"x")

        def somebody_stops() -> None:
            qemu.status = "paused"

        qemu.before["stop"] = somebody_stops
        qemu.after["stop"] = qemu._do_cont
        with pytest.raises(CheckpointVoid, match="somebody else paused"):
            await rig.capture()
        assert "qom-set" not in qemu.commands()
        see_clean(rig, {0})


@pytest.mark.parametrize("live", [False, True])
async def test_a_short_pause_of_somebody_else_is_over_before_anything_goes_in(
    qemu: FakeQemu, directory: Path, autojump_clock: Any, live: bool
) -> None:
    async with attached(qemu, directory) as rig, trio.open_nursery() as nursery:
        write(qemu, 0, b"x")
        qemu.execute("stop", {})
        qemu._pending.clear()

        async def resume() -> None:
            await trio.sleep(0.5)
            qemu.status = "running"
            await qemu.emit_now("RESUME")

        nursery.start_soon(resume)
        if live:
            await _live(rig)
        else:
            await _epoch(rig)
        assert qemu.aborted == ""
        assert qemu.commands().count("cont") == 1
        assert rig.guardian.calls == ["arm", "disarm"]
        await rig.attachment.prepare()
        see_clean(rig, {0})


async def test_old_bitmaps_are_named_by_the_same_pair(qemu: FakeQemu, directory: Path) -> None:
    """Merging back after a lost push keeps what it had."""
    async with attached(qemu, directory) as rig:
        write(qemu, 0, b"x")
        qemu.job_errors = ["Input/output error"]
        capture = await rig.capture()
        with pytest.raises(EpochLost):
            await put_together(bytearray(SIZE), rig.attachment.read(capture))
        await rig.attachment.release(capture)
        await rig.attachment.merge_back([identity(1), identity(2)], named(3))
        write(qemu, MIB, b"y")
        capture = await rig.capture(finished=3)
        copy = bytearray(SIZE)
        assert await put_together(copy, rig.attachment.read(capture)) == 2 * BLOCK
        assert (copy[0], copy[MIB]) == (ord("x"), ord("y"))
        await rig.attachment.release(capture)
