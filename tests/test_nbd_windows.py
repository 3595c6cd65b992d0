"""Spans of block status, and how ranges become reads and reads become batches. No I/O."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_remus.core.extents import Extent
from qemu_remus.nbd.batches import BATCH_BYTES, BATCH_EXTENTS, CLUSTER, Batch, BatchQueue, Read, Run, append_run
from qemu_remus.nbd.protocol import STATUS_EXTENTS, STATUS_SPAN, status_cost
from qemu_remus.nbd.windows import AllocationWalk, DirtyWalk

GIB = 1 << 30


def status(dirty: list[Run], offset: int, length: int) -> list[tuple[int, int]]:
    """What a server says of a range, given all dirty ranges in ascending order, none touching the next."""
    extents: list[tuple[int, int]] = []
    position, end = offset, offset + length
    for run in dirty:
        if run.end <= position:
            continue
        if run.offset >= end:
            break
        if run.offset > position:
            extents.append((run.offset - position, 0))
            position = run.offset
        extents.append((min(run.end, end) - position, 1))
        position = min(run.end, end)
    if position < end:
        extents.append((end - position, 0))
    return extents


def walk_all(walk: DirtyWalk, dirty: list[Run]) -> tuple[list[Run], int]:
    """The dirty ranges that a walk finds, and its number of requests; checks the bound of each."""
    found: list[Run] = []
    requests = 0
    while not walk.finished:
        offset, length, most = walk.next_request()
        extents = status(dirty, offset, length)
        assert len(extents) <= most
        assert most <= STATUS_EXTENTS
        assert 0 < length <= STATUS_SPAN
        for run in walk.found(extents):
            append_run(found, run)
        requests += 1
    return found, requests


def test_a_large_clean_disk_takes_a_request_every_four_gib() -> None:
    assert walk_all(DirtyWalk(100 * GIB, 4096, 0), []) == ([], 26)


def test_a_large_and_nearly_clean_disk_takes_no_more() -> None:
    dirty = [Run(index * GIB, 8192) for index in range(100)]
    assert walk_all(DirtyWalk(100 * GIB, 4096, 200 * 4096), dirty) == (dirty, 26)


def test_a_dirty_disk_is_walked_in_spans_that_fit_the_budget() -> None:
    dirty = [Run(offset, 4096) for offset in range(0, GIB // 4, 8192)]
    found, requests = walk_all(DirtyWalk(GIB // 4, 4096, GIB // 8), dirty)
    assert found == dirty
    assert requests <= 9


def test_spans_widen_when_what_was_promised_is_found() -> None:
    dirty = [Run(offset, 4096) for offset in range(0, 128 << 20, 8192)]
    _, requests = walk_all(DirtyWalk(100 * GIB, 4096, 64 << 20), dirty)
    assert requests <= 8 + 26


def test_more_dirty_than_promised_is_found_and_shrinks_the_spans() -> None:
    walk = DirtyWalk(8 * GIB, 4096, 4096)
    offset, length, most = walk.next_request()
    assert (offset, length, most) == (0, STATUS_SPAN, 3)
    assert len(walk.found([(4096, 0), (4096, 1)] * 10)) == 10
    offset, length, most = walk.next_request()
    assert offset == 20 * 4096
    assert length // 4096 < most <= STATUS_EXTENTS
    assert status_cost(most) <= 64 * 1024


def test_a_disk_that_ends_inside_a_block_is_clipped() -> None:
    size = 3 * 65536 + 512
    walk = DirtyWalk(size, 65536, 65536)
    assert walk.next_request()[:2] == (0, size)
    assert walk.found([(3 * 65536, 0), (65536, 1)]) == [Run(3 * 65536, 512)]
    assert walk.finished


def test_equal_neighbours_become_one_range() -> None:
    walk = DirtyWalk(10 * 4096, 4096, 4 * 4096)
    assert walk.found([(4096, 1)] * 4 + [(4096, 0)] * 6) == [Run(0, 4 * 4096)]


@given(
    granularity=st.sampled_from([512, 4096, 65536, 1 << 31]),
    blocks=st.integers(1, 40_000),
    dirty=st.lists(st.integers(0, 39_999), max_size=60),
    promised=st.integers(0, 70),
    cut=st.integers(0, 511),
)
@settings(max_examples=80, deadline=None)
def test_a_walk_finds_every_dirty_block_whatever_was_promised(
    granularity: int, blocks: int, dirty: list[int], promised: int, cut: int
) -> None:
    size = blocks * granularity - cut
    expected: list[Run] = []
    for block in sorted({block for block in dirty if block < blocks}):
        append_run(expected, Run(block * granularity, min(granularity, size - block * granularity)))
    found: list[Run] = []
    walk = DirtyWalk(size, granularity, promised * granularity)
    while not walk.finished:
        offset, length, most = walk.next_request()
        assert status_cost(most) <= 64 * 1024
        for run in walk.found(status(expected, offset, length)):
            append_run(found, run)
    assert found == expected


def allocation(zeroes: list[Run], run: Run, walk: AllocationWalk) -> tuple[list[Run], int]:
    found: list[Run] = []
    requests = 0
    while run.length:
        offset, length, most = walk.next_request(run)
        extents = [(size, flags * 3) for size, flags in status(zeroes, offset, length)]
        assert most in (1, STATUS_EXTENTS)
        if most > 1:
            assert len(extents) <= most
        requests += 1
        for piece in walk.found(run, extents[:most]):
            append_run(found, piece)
        run = Run(found[-1].end, run.end - found[-1].end)
    return found, requests


def test_an_empty_disk_is_one_zero_range_after_a_request_every_four_gib() -> None:
    assert allocation([Run(0, 100 * GIB)], Run(0, 100 * GIB), AllocationWalk()) == ([Run(0, 100 * GIB, True)], 26)


def test_short_allocated_extents_are_asked_for_many_at_a_time() -> None:
    zeroes = [Run(offset, 512) for offset in range(0, 16 << 20, 1024)]
    found, requests = allocation(zeroes, Run(0, 16 << 20), AllocationWalk())
    assert [run for run in found if run.zero] == [Run(run.offset, run.length, True) for run in zeroes]
    assert requests <= 6


def test_after_short_extents_a_long_hole_is_crossed_at_once() -> None:
    zeroes = [Run(offset, 512) for offset in range(0, 1 << 20, 1024)] + [Run(8 << 20, 50 * GIB)]
    _, requests = allocation(zeroes, Run(0, 60 * GIB), AllocationWalk())
    assert requests <= 22


def test_a_hole_that_is_not_zero_is_read() -> None:
    walk = AllocationWalk()
    assert walk.found(Run(0, 4096), [(4096, 1)]) == [Run(0, 4096)]
    assert walk.found(Run(0, 4096), [(4096, 2)]) == [Run(0, 4096, True)]


def test_status_behind_the_asked_range_is_not_counted() -> None:
    assert AllocationWalk().found(Run(512, 1024), [(4096, 3)]) == [Run(512, 1024, True)]


# --- batches ------------------------------------------------------------------------------------------------------


def run_queue(queue: BatchQueue, runs: list[Run], contents: bytes, order: random.Random, limit: int) -> list[Batch]:
    """Hand out all reads and answer them in random order, the consumer taking batches now and then."""
    batches: list[Batch] = []
    waiting: list[Read] = []
    queue.plan(runs)
    while True:
        read = queue.next_read() if order.random() < 0.6 else None
        if read is not None:
            waiting.append(read)
            assert len({id(read.assembly) for read in waiting}) <= limit
        elif waiting:
            done = waiting.pop(order.randrange(len(waiting)))
            data = contents[done.offset : done.offset + done.length]
            done.fill(memoryview(data) if any(data) or order.random() < 0.5 else None)
        elif (batch := queue.next_batch()) is not None:
            batches.append(batch)
        elif queue.exhausted:
            return batches


def check_batches(batches: list[Batch], runs: list[Run], contents: bytes) -> None:
    """They cover the runs exactly, in order, within the bounds of a batch, and say what the contents are."""
    position = 0
    covered: list[Run] = []
    for batch in batches:
        assert 0 < len(batch.extents) <= BATCH_EXTENTS
        assert len(batch.data) <= BATCH_BYTES
        assert sum(extent.payload for extent in batch.extents) == len(batch.data)
        at = 0
        for extent in batch.extents:
            assert extent.disk == 3
            assert extent.offset >= position
            position = extent.end
            if extent.zero:
                assert not any(contents[extent.offset : extent.end])
            else:
                assert batch.data[at : at + extent.length] == contents[extent.offset : extent.end]
            at += extent.payload
            append_run(covered, Run(extent.offset, extent.length))
    expected: list[Run] = []
    for run in runs:
        append_run(expected, Run(run.offset, run.length))
    assert covered == expected


@given(
    cuts=st.lists(st.tuples(st.integers(1, 200), st.sampled_from(["skip", "zero", "data", "nought"])), max_size=60),
    unit=st.sampled_from([512, 4096, 12288]),
    tail=st.integers(0, 4095),
    seed=st.integers(0, 1 << 32),
    read_bytes=st.sampled_from([4096, 28 * 1024]),
    limit=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_batches_carry_exactly_the_ranges_in_order_however_replies_come(
    cuts: list[tuple[int, str]], unit: int, tail: int, seed: int, read_bytes: int, limit: int
) -> None:
    order = random.Random(seed)
    runs: list[Run] = []
    contents = bytearray()
    for count, kind in cuts:
        length = count % 40 * unit + (tail if (count, kind) == cuts[-1] else 0)
        start = len(contents)
        contents += order.randbytes(length) if kind == "data" else bytes(length)
        if kind != "skip" and length:
            append_run(runs, Run(start, length, kind == "zero"))
    queue = BatchQueue(3, read_bytes=read_bytes, limit=limit)
    check_batches(run_queue(queue, runs, bytes(contents), order, limit), runs, bytes(contents))


def test_many_small_ranges_alternating_with_zeroes_keep_a_batch_within_its_extents() -> None:
    order = random.Random(5)
    contents = b"".join(order.randbytes(512) + bytes(1536) for _ in range(2000))
    runs = [Run(offset, 1024) for offset in range(0, len(contents), 2048)]
    queue = BatchQueue(3, read_bytes=28 * 1024, limit=3)
    check_batches(run_queue(queue, runs, contents, order, 3), runs, contents)


def test_blocks_of_zeroes_inside_data_become_zero_extents() -> None:
    contents = b"a" * 4096 + bytes(8192) + b"b" * 4096 + bytes(100)
    queue = BatchQueue(3, read_bytes=1 << 20, limit=1)
    runs = [Run(0, len(contents)), Run(len(contents), 1 << 40, zero=True)]
    (batch,) = run_queue(queue, runs, contents, random.Random(0), 1)
    assert batch.extents == (
        Extent(3, 0, 4096),
        Extent(3, 4096, 8192, True),
        Extent(3, 12288, 4096),
        Extent(3, 16384, 100 + (1 << 40), True),
    )
    assert batch.data == b"a" * 4096 + b"b" * 4096


def test_a_block_with_one_byte_set_at_its_end_is_data() -> None:
    contents = bytes(4095) + b"x"
    queue = BatchQueue(3, read_bytes=1 << 20, limit=1)
    (batch,) = run_queue(queue, [Run(0, 4096)], contents, random.Random(0), 1)
    assert batch == Batch((Extent(3, 0, 4096),), bytearray(contents))


@pytest.mark.parametrize("limit", [1, 2])
def test_no_read_is_handed_out_beyond_the_limit_of_batches(limit: int) -> None:
    queue = BatchQueue(3, read_bytes=BATCH_BYTES, limit=limit)
    queue.plan([Run(0, 10 * BATCH_BYTES)])
    reads = []
    while (read := queue.next_read()) is not None:
        reads.append(read)
    each = BATCH_BYTES // CLUSTER
    assert len(reads) == limit * each
    assert not queue.exhausted
    for read in reads[:each]:
        read.fill(None)
    assert queue.next_batch() == Batch((Extent(3, 0, BATCH_BYTES, True),), b"")
    assert queue.next_read() is not None
