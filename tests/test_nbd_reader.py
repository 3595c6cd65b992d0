"""The reader against a fake server on a Unix socket in tmp_path. Deadlines run on the mock clock."""

from __future__ import annotations

import errno
import random
from array import array
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from qemu_remus.core.errors import (
    NbdConnectionLost,
    NbdProtocolError,
    NbdRequestFailed,
    SnapshotBroken,
)
from qemu_remus.core.extents import Extent
from qemu_remus.nbd.batches import BATCH_BYTES, Batch, Run, append_run
from qemu_remus.nbd.client import close_all, open_nbd
from qemu_remus.nbd.reader import BatchStream, find_dirty, read_allocated, read_dirty
from tests.nbd_server import Behaviour, FakeDisk, serve

KIB = 1024
MIB = 1024 * KIB


def pattern(offset: int, length: int) -> bytes:
    """Contents different everywhere, of a disk of any size; no block of it is zero."""
    start = offset // 8
    words = array("Q", range(start + 1, (offset + length + 7) // 8 + 1)).tobytes()
    return words[offset - 8 * start : offset - 8 * start + length]


def map_of(size: int, runs: list[Run], flag: int) -> list[tuple[int, int]]:
    """Natural extents of a disk where ``runs`` carry a flag."""
    extents = []
    position = 0
    for run in runs:
        if run.offset > position:
            extents.append((run.offset - position, 0))
        extents.append((run.length, flag))
        position = run.end
    if position < size:
        extents.append((size - position, 0))
    return extents


def a_disk(size: int, dirty: list[Run], zeroes: list[Run] = [], **behaviour: object) -> FakeDisk:  # noqa: B006
    disk = FakeDisk(size, pattern, map_of(size, dirty, 1), map_of(size, zeroes, 3))
    disk.behaviour = Behaviour(**behaviour)  # type: ignore[arg-type]
    return disk


async def take(stream: BatchStream) -> list[Batch]:
    return [batch async for batch in stream]


async def dirty_of(disk: FakeDisk, path: Path, *, connections: int = 4, promised: int | None = None) -> list[Batch]:
    """All batches of a disk's bitmap; ``promised``: dirty bytes, by default the truth."""
    truth = sum(length for length, flags in disk.dirty if flags)
    dirty_bytes = truth if promised is None else promised
    async with (
        serve(disk, path),
        read_dirty(
            path, "e", "b0", disk=2, dirty_bytes=dirty_bytes, granularity=4096, connections=connections
        ) as stream,
    ):
        batches = await take(stream)
    assert not disk.mixed, "a read and a block status were unanswered at the same time"
    assert disk.largest_owed <= 64 * KIB
    return batches


def content(batches: list[Batch]) -> tuple[list[Run], list[Run]]:
    """The data ranges, checked against the pattern, and the zero ranges."""
    data: list[Run] = []
    zeroes: list[Run] = []
    position = 0
    for batch in batches:
        at = 0
        for extent in batch.extents:
            assert extent.disk == 2
            assert extent.offset >= position
            position = extent.end
            append_run(zeroes if extent.zero else data, Run(extent.offset, extent.length))
            if not extent.zero:
                assert batch.data[at : at + extent.length] == pattern(extent.offset, extent.length)
            at += extent.payload
        assert at == len(batch.data) <= BATCH_BYTES
    return data, zeroes


@pytest.mark.parametrize("connections", [1, 4])
async def test_exactly_the_dirty_ranges_come_with_their_contents(tmp_path: Path, connections: int) -> None:
    order = random.Random(1)
    dirty: list[Run] = []
    for block in sorted(order.sample(range(10_000), 400)):
        append_run(dirty, Run(block * 4096, 4096))
    disk = a_disk(10_000 * 4096, dirty)
    assert content(await dirty_of(disk, tmp_path / "s", connections=connections)) == (dirty, [])


@pytest.mark.parametrize(
    "behaviour",
    [
        {"shuffle": random.Random(2)},
        {"chunked": True},
        {"status_limit": 3},
        {"overshoot": True, "status_limit": 2},
        {"split_equal": 4096, "chunked": True},
        {"split_equal": 12288, "overshoot": True, "shuffle": random.Random(3)},
    ],
)
async def test_no_liberty_of_the_server_changes_what_comes(tmp_path: Path, behaviour: dict[str, object]) -> None:
    dirty = [Run(0, 4096), Run(64 * KIB, 200 * KIB), Run(2 * MIB, 8192), Run(8 * MIB - 4096, 4096 + 512)]
    disk = a_disk(8 * MIB + 512, dirty, [Run(128 * KIB, 64 * KIB)], **behaviour)
    data, zeroes = content(await dirty_of(disk, tmp_path / "s"))
    # What the server calls a hole is read all the same: of a snapshot that cannot be trusted.
    assert zeroes == []
    assert data == dirty


async def test_nothing_dirty_yields_nothing_over_one_connection(tmp_path: Path) -> None:
    disk = a_disk(100 << 30, [])
    assert await dirty_of(disk, tmp_path / "s") == []
    assert disk.connections == 1
    assert len(disk.requests) == 26


async def test_a_small_epoch_uses_one_connection_and_a_large_one_several(tmp_path: Path) -> None:
    small = a_disk(1 << 30, [Run(offset, 4096) for offset in range(0, MIB, 8192)])
    await dirty_of(small, tmp_path / "small")
    assert small.connections == 1
    large = a_disk(1 << 30, [Run(0, 8 * MIB)])
    assert content(await dirty_of(large, tmp_path / "large")) == ([Run(0, 8 * MIB)], [])
    assert large.connections > 1


async def test_the_end_of_a_disk_that_is_no_multiple_of_a_block_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    size = MIB + 22_016
    disk = a_disk(size, [Run(MIB, 22_016)])
    disk.dirty[-1] = (24_576, 1)  # the bitmap's last block goes on behind the disk's end
    disk.behaviour.overshoot = True
    assert content(await dirty_of(disk, tmp_path / "s")) == ([Run(MIB, 22_016)], [])


async def test_no_read_of_a_snapshot_crosses_a_cluster_of_the_filter(tmp_path: Path) -> None:
    disk = a_disk(8 * MIB, [Run(4096, MIB), Run(3 * MIB + 8192, 200 * KIB)])
    assert await dirty_of(disk, tmp_path / "s")
    reads = [(offset, length) for command, offset, length in disk.requests if command == 0]
    assert reads
    assert all(offset // (64 * KIB) == (offset + length - 1) // (64 * KIB) for offset, length in reads)


async def test_zeroes_among_the_data_become_zero_extents(tmp_path: Path) -> None:
    disk = a_disk(MIB, [Run(0, 16 * KIB)], holes=True)
    disk.contents = lambda offset, length: (b"x" * 4096 + bytes(8192) + b"y" * 4096)[offset : offset + length]
    (batch,) = await dirty_of(disk, tmp_path / "s")
    assert batch.extents == (Extent(2, 0, 4096), Extent(2, 4096, 8192, True), Extent(2, 12288, 4096))
    assert batch.data == b"x" * 4096 + b"y" * 4096


@pytest.mark.parametrize("promised", [0, 4096, 1 << 30])
async def test_more_or_less_dirty_than_promised_is_read_all_the_same(tmp_path: Path, promised: int) -> None:
    dirty = [Run(offset, 4096) for offset in range(0, 4 * MIB, 32 * KIB)]
    disk = a_disk(64 * MIB, dirty)
    data, _ = content(await dirty_of(disk, tmp_path / "s", promised=promised))
    assert data == dirty


@pytest.mark.parametrize("connections", [1, 3])
async def test_a_whole_disk_is_covered_without_a_gap(tmp_path: Path, connections: int) -> None:
    size = 20 * MIB + 512
    zeroes = [Run(0, 64 * KIB), Run(MIB, 9 * MIB + 512), Run(20 * MIB - 4096, 4096 + 512)]
    disk = a_disk(size, [], zeroes)
    async with (
        serve(disk, tmp_path / "s"),
        read_allocated(tmp_path / "s", "e", disk=2, connections=connections) as stream,
    ):
        data, found = content(await take(stream))
    assert found == zeroes
    assert data == [Run(64 * KIB, 960 * KIB), Run(10 * MIB + 512, 10 * MIB - 4096 - 512)]


async def test_a_large_empty_disk_is_one_zero_extent(tmp_path: Path) -> None:
    size = 1 << 40
    disk = a_disk(size, [], [Run(0, size)])
    async with serve(disk, tmp_path / "s"), read_allocated(tmp_path / "s", "e", disk=0) as stream:
        assert await take(stream) == [Batch((Extent(0, 0, size, True),), b"")]
    assert len(disk.requests) == 257


async def test_an_export_of_no_bytes_is_read_at_once(tmp_path: Path) -> None:
    disk = a_disk(0, [])
    async with serve(disk, tmp_path / "s"), read_allocated(tmp_path / "s", "e", disk=0) as stream:
        assert await take(stream) == []


@pytest.mark.parametrize("number", [errno.EACCES, errno.EINVAL])
async def test_a_broken_snapshot_is_known_by_its_error(tmp_path: Path, number: int) -> None:
    disk = a_disk(8 * MIB, [Run(0, 8 * MIB)])
    # As QEMU does, the dirty bitmap's own status still works: it is asked about the whole disk.
    disk.behaviour.fail = lambda which, offset, length: number if which == 0 and offset >= 4 * MIB else 0
    with pytest.raises(SnapshotBroken, match="The guest is not affected"):
        await dirty_of(disk, tmp_path / "s")


async def test_another_error_of_a_read_keeps_its_number(tmp_path: Path) -> None:
    disk = a_disk(8 * MIB, [Run(0, 8 * MIB)])
    disk.behaviour.fail = lambda command, offset, length: errno.EIO if offset >= 7 * MIB else 0
    with pytest.raises(NbdRequestFailed, match=r"a read of [1-9]\d* bytes at \d+ .*\(text\)") as caught:
        await dirty_of(disk, tmp_path / "s")
    assert caught.value.error == errno.EIO


async def test_a_live_disk_has_no_snapshot_to_break(tmp_path: Path) -> None:
    disk = a_disk(MIB, [])
    disk.behaviour.fail = lambda command, offset, length: errno.EINVAL
    async with serve(disk, tmp_path / "s"), read_allocated(tmp_path / "s", "e", disk=0) as stream:
        with pytest.raises(NbdRequestFailed):
            await take(stream)


async def test_batches_read_before_an_error_come_before_it(tmp_path: Path) -> None:
    disk = a_disk(8 * MIB, [Run(0, 4096), Run(4 * MIB, MIB)])
    disk.behaviour.fail = lambda command, offset, length: errno.EIO if offset >= 4 * MIB + 512 * KIB else 0
    async with (
        serve(disk, tmp_path / "s"),
        read_dirty(tmp_path / "s", "e", "b0", disk=2, dirty_bytes=2 * MIB, granularity=4096) as stream,
    ):
        first = await anext(stream)
        assert first.extents[0] == Extent(2, 0, 4096)
        with pytest.raises(NbdRequestFailed):
            await take(stream)


async def test_a_bitmap_that_is_not_there_is_named(tmp_path: Path) -> None:
    disk = a_disk(MIB, [])
    disk.bitmap = "other"
    with pytest.raises(NbdProtocolError, match="qemu:dirty-bitmap:b0"):
        await dirty_of(disk, tmp_path / "s")


async def test_nobody_listening_is_a_lost_connection_with_the_path(tmp_path: Path) -> None:
    async with read_allocated(tmp_path / "nobody", "e", disk=0) as stream:
        with pytest.raises(NbdConnectionLost, match="nobody"):
            await take(stream)


@pytest.mark.parametrize("request_number", [0, 1, 5])
async def test_a_server_that_goes_away_is_a_lost_connection(tmp_path: Path, request_number: int) -> None:
    disk = a_disk(8 * MIB, [Run(0, MIB)], hang_up=request_number)
    with pytest.raises(NbdConnectionLost):
        await dirty_of(disk, tmp_path / "s")


@pytest.mark.parametrize("request_number", [0, 1, 5])
async def test_a_silent_server_is_given_up_after_the_timeout(
    tmp_path: Path, autojump_clock: MockClock, request_number: int
) -> None:
    disk = a_disk(8 * MIB, [Run(0, MIB)], withhold=request_number)
    # Sockets are real: the clock may jump only when nothing has come from them for a while.
    autojump_clock.autojump_threshold = 0.05
    before = trio.current_time()
    with pytest.raises(NbdConnectionLost, match="silent for 30 s"):
        await dirty_of(disk, tmp_path / "s")
    assert 30 <= trio.current_time() - before < 40


async def test_a_server_that_accepts_and_says_nothing_is_given_up(tmp_path: Path, autojump_clock: MockClock) -> None:
    autojump_clock.autojump_threshold = 0.05
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(tmp_path / "mute"))
        listener.listen()
        with pytest.raises(NbdConnectionLost):
            await open_nbd(tmp_path / "mute", "e", timeout=5)


async def test_leaving_half_way_says_goodbye_on_every_connection(tmp_path: Path) -> None:
    disk = a_disk(64 * MIB, [Run(0, 64 * MIB)])
    async with serve(disk, tmp_path / "s"):
        async with read_dirty(tmp_path / "s", "e", "b0", disk=2, dirty_bytes=64 * MIB, granularity=4096) as stream:
            async for _ in stream:
                break
        assert disk.connections > 1
        assert disk.goodbyes == disk.connections


async def test_an_error_of_the_consumer_comes_out_as_it_is(tmp_path: Path) -> None:
    disk = a_disk(MIB, [Run(0, MIB)])
    async with serve(disk, tmp_path / "s"):
        with pytest.raises(ValueError, match="the consumer's"):  # noqa: PT012 - the block is what is under test
            async with read_dirty(tmp_path / "s", "e", "b0", disk=2, dirty_bytes=MIB, granularity=4096) as stream:
                await anext(stream)
                raise ValueError("the consumer's")
    assert disk.goodbyes == disk.connections


async def test_a_cancelled_consumer_leaves_nothing_connected(tmp_path: Path) -> None:
    disk = a_disk(MIB, [Run(0, MIB)], withhold=3)
    async with serve(disk, tmp_path / "s"):
        with trio.CancelScope() as scope:
            async with (
                read_dirty(tmp_path / "s", "e", "b0", disk=2, dirty_bytes=MIB, granularity=4096) as stream,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(take, stream)
                await trio.testing.wait_all_tasks_blocked(0.01)
                scope.cancel()
        assert scope.cancelled_caught
        assert disk.goodbyes == disk.connections


async def test_a_slow_consumer_holds_the_reader_back(tmp_path: Path) -> None:
    disk = a_disk(64 * MIB, [Run(0, 64 * MIB)])
    async with (
        serve(disk, tmp_path / "s"),
        read_dirty(tmp_path / "s", "e", "b0", disk=2, dirty_bytes=64 * MIB, granularity=4096) as stream,
    ):
        await anext(stream)
        await trio.testing.wait_all_tasks_blocked(0.05)
        read = sum(length for command, _, length in disk.requests if command == 0)
        assert 0 < read <= 10 * BATCH_BYTES


async def test_closing_does_not_wait_for_a_server_that_hangs(tmp_path: Path, autojump_clock: MockClock) -> None:
    autojump_clock.autojump_threshold = 0.05
    disk = a_disk(MIB, [])
    async with serve(disk, tmp_path / "s"):
        client = await open_nbd(tmp_path / "s", "e")
        disk.behaviour.ignore_goodbye = True
        before = trio.current_time()
        await close_all([client])
        assert trio.current_time() - before <= 1


async def test_a_part_of_a_disk_is_covered_from_its_start_to_its_end_and_no_further(tmp_path: Path) -> None:
    zeroes = [Run(0, 64 * KIB), Run(MIB, 9 * MIB)]
    disk = a_disk(20 * MIB + 512, [], zeroes)
    part = Run(32 * KIB, 2 * MIB)
    async with (
        serve(disk, tmp_path / "s"),
        read_allocated(tmp_path / "s", "e", disk=2, within=part) as stream,
    ):
        data, found = content(await take(stream))
    assert found == [Run(32 * KIB, 32 * KIB), Run(MIB, part.end - MIB)]
    assert data == [Run(64 * KIB, MIB - 64 * KIB)]


async def test_a_part_ends_with_the_disk_at_the_latest(tmp_path: Path) -> None:
    disk = a_disk(MIB + 512, [])
    async with serve(disk, tmp_path / "s"):
        for part, expected in ((Run(MIB, MIB), [Run(MIB, 512)]), (Run(2 * MIB, MIB), [])):
            async with read_allocated(tmp_path / "s", "e", disk=2, within=part) as stream:
                data, _ = content(await take(stream))
            assert data == expected


async def test_what_is_dirty_in_a_part_is_found_and_nothing_else(tmp_path: Path) -> None:
    disk = a_disk(
        20 * MIB + 512, [Run(0, 8 * KIB), Run(MIB, 16 * KIB), Run(2 * MIB - 4096, 8 * KIB), Run(20 * MIB, 512)]
    )
    expected = {
        Run(0, 4096): [Run(0, 4096)],
        Run(4096, MIB): [Run(4096, 4096), Run(MIB, 4096)],
        Run(MIB + 4096, MIB): [Run(MIB + 4096, 12 * KIB), Run(2 * MIB - 4096, 8 * KIB)],
        Run(20 * MIB - 4096, MIB): [Run(20 * MIB, 512)],
        Run(3 * MIB, 4 * MIB): [],
    }
    async with serve(disk, tmp_path / "s"):
        for part, dirty in expected.items():
            assert await find_dirty(tmp_path / "s", "e", "b0", within=part, granularity=4096) == dirty


async def test_a_part_that_is_dirty_everywhere_is_found_in_pieces(tmp_path: Path) -> None:
    dirty = [Run(offset, 4096) for offset in range(0, 8 * MIB, 8 * KIB)]
    disk = a_disk(8 * MIB, dirty)
    async with serve(disk, tmp_path / "s"):
        assert await find_dirty(tmp_path / "s", "e", "b0", within=Run(0, 8 * MIB), granularity=4096) == dirty


async def test_a_status_that_fails_is_named(tmp_path: Path) -> None:
    disk = a_disk(MIB, [])
    disk.behaviour.fail = lambda command, offset, length: errno.EIO
    async with serve(disk, tmp_path / "s"):
        with pytest.raises(NbdRequestFailed, match="the block status of"):
            await find_dirty(tmp_path / "s", "e", "b0", within=Run(0, MIB), granularity=4096)
