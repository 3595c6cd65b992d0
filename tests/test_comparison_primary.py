"""Comparing a live disk with a model of a secondary that answers late and in bursts: exactly the blocks that differ
come out, whatever happens on the way. Time is the mock clock's."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from unittest import mock

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from qemu_remus.core import messages as m
from qemu_remus.core.comparison import QUESTIONS_LIMIT, all_differ, count_blocks, differing, digest_blocks
from qemu_remus.core.errors import (
    GraphChanged,
    InternalError,
    LinkLost,
    LocalProtocolError,
    NbdConnectionLost,
    PeerSilent,
)
from qemu_remus.core.extents import Extent
from qemu_remus.core.wire import encode
from qemu_remus.nbd.batches import BATCH_BYTES, BATCH_EXTENTS, Batch
from qemu_remus.primary import comparison as module
from qemu_remus.primary.comparison import ANSWER_TIMEOUT, BLOCK, HELD_BYTES, Comparison

UNIT = 4096
DISK = 3


class Secondary:
    """Compares with its image, and answers when it is told to.

    :param image: empty: it cannot tell.
    :param places: messages that the link takes before it waits.
    """

    def __init__(self, image: bytes, places: float = 8) -> None:
        self.image = image
        self.asked = 0
        self.unanswered: deque[m.CompareBlocks] = deque()
        self.out, self._in = trio.open_memory_channel[m.Message](places)
        self.comparison = Comparison(self.out.send)

    async def take(self) -> None:
        """Take one question from the link."""
        question = await self._in.receive()
        assert isinstance(question, m.CompareBlocks)
        encode(question, self.asked)  # it is within the wire's limits
        self.asked += 1
        self.unanswered.append(question)
        assert len(self.unanswered) <= QUESTIONS_LIMIT

    def answer(self) -> None:
        """Answer the oldest question."""
        question = self.unanswered.popleft()
        blocks = count_blocks(question.digests)
        found = all_differ(blocks)
        if self.image:
            end = question.offset + blocks * question.block_size
            theirs = digest_blocks(self.image[question.offset : end], question.block_size)
            found = differing(question.digests, theirs)
        self.comparison.answered(m.BlocksDiffer(question.disk, question.offset, found))

    async def serve(self, bursts: tuple[int, ...] = (1,), delay: float = 0) -> None:
        """Answer everything: so many questions at once, or fewer where no more come."""
        while True:
            for burst in bursts:
                await self.take()
                with trio.move_on_after(1):
                    while len(self.unanswered) < burst:
                        await self.take()
                await trio.sleep(delay)
                while self.unanswered:
                    self.answer()


@asynccontextmanager
async def serving(secondary: Secondary, bursts: tuple[int, ...] = (1,), delay: float = 0) -> AsyncIterator[None]:
    escaped: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(secondary.serve, bursts, delay)
        try:
            yield
        except BaseException as error:
            escaped = error
        nursery.cancel_scope.cancel()
    if escaped is not None:
        raise escaped


def is_zero(contents: bytes) -> bool:
    return contents == bytes(len(contents))


class Reading:
    """A reader of a disk, which may be left at any time.

    :param pause: seconds before each batch.
    """

    def __init__(self, batches: Iterable[Batch], pause: float = 0) -> None:
        self._batches = iter(batches)
        self._pause = pause

    def __aiter__(self) -> Reading:
        return self

    async def __anext__(self) -> Batch:
        await trio.sleep(self._pause)
        batch = next(self._batches, None)
        if batch is None:
            raise StopAsyncIteration
        return batch


def batches_of(contents: bytes, cuts: tuple[int, ...] = (BATCH_BYTES,)) -> Iterator[Batch]:
    """A disk as a reader hands it over: units of zeroes are zero extents, batches end where they are cut."""
    start, turn = 0, 0
    while start < len(contents):
        end = min(start + min(cuts[turn % len(cuts)], BATCH_BYTES), len(contents))
        turn += 1
        pieces = [contents[at : min(at + UNIT, end)] for at in range(start, end, UNIT)]
        extents, at = [], start
        for piece in pieces:
            extents.append(Extent(DISK, at, len(piece), zero=is_zero(piece)))
            at += len(piece)
        yield Batch(tuple(extents), b"".join(piece for piece in pieces if not is_zero(piece)))
        start = end


def zeroes(size: int) -> Reading:
    return Reading([Batch((Extent(DISK, 0, size, zero=True),), b"")])


def blocks_that_differ(ours: bytes, theirs: bytes) -> Iterator[tuple[int, bytes]]:
    for start in range(0, len(ours), BLOCK):
        if ours[start : start + BLOCK] != theirs[start : start + BLOCK]:
            yield start, ours[start : start + BLOCK]


class Collected:
    """What came out, checked for its form, block by block."""

    def __init__(self) -> None:
        self.blocks: list[tuple[int, bytes]] = []
        self.zero: set[int] = set()
        self._end = 0

    def add(self, extents: tuple[Extent, ...], data: bytes) -> None:
        assert 0 < len(extents) <= BATCH_EXTENTS
        assert len(data) <= BATCH_BYTES
        assert len(data) == sum(extent.payload for extent in extents)
        for one, other in itertools.pairwise(extents):
            assert one.end < other.offset or one.zero != other.zero, "neighbours are joined"
        start = 0
        for extent in extents:
            assert extent.disk == DISK
            assert extent.offset >= self._end
            self._end = extent.end
            contents = bytes(extent.length) if extent.zero else data[start : start + extent.length]
            start += extent.payload
            for at in range(0, extent.length, BLOCK):
                self.blocks.append((extent.offset + at, contents[at : at + BLOCK]))
                if extent.zero:
                    self.zero.add(extent.offset + at)


async def compare(secondary: Secondary, ours: bytes, *cuts: int, busy: float = 0) -> Collected:
    collected = Collected()
    reading = Reading(batches_of(ours, cuts or (BATCH_BYTES,)))
    async with secondary.comparison.differing(reading, DISK, len(ours)) as differences:
        async for extents, data in differences:
            collected.add(extents, data)
            await trio.sleep(busy)
    return collected


def small_limits() -> AbstractContextManager[object]:
    """So that a small disk meets all of them."""
    return mock.patch.multiple(module, QUESTION_BYTES=2 * BLOCK, HELD_BYTES=5 * BLOCK, _BLOCKS_AT_ONCE=3)


def run(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test, clock=MockClock(autojump_threshold=0))


# A disk in units of 4 KiB: 0 is zeroes. Most units are as their neighbours, as on a disk.
runs = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), min_size=1, max_size=20)
disks = st.tuples(runs, st.integers(0, UNIT // 512 - 1))


def disk_of(drawn: tuple[list[tuple[int, int]], int]) -> bytes:
    pieces, tail = drawn
    return b"".join(bytes([value]) * (units * UNIT) for value, units in pieces) + b"\7" * (tail * 512)


@given(
    ours=disks,
    theirs=disks,
    bursts=st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple),
    delay=st.sampled_from([0, 0.5, 100]),
    busy=st.sampled_from([0, 0.3]),
    cuts=st.lists(st.integers(1, 64).map(lambda sectors: sectors * 512), min_size=1, max_size=5),
    places=st.sampled_from([0, 1, 8]),
    small=st.booleans(),
)
def test_exactly_the_blocks_that_differ_come_out_in_order(
    ours: tuple[list[tuple[int, int]], int],
    theirs: tuple[list[tuple[int, int]], int],
    bursts: tuple[int, ...],
    delay: float,
    busy: float,
    cuts: list[int],
    places: int,
    small: bool,
) -> None:
    disk = disk_of(ours)
    image = disk_of(theirs)[: len(disk)].ljust(len(disk), b"\0")

    async def test() -> None:
        secondary = Secondary(image, places)
        async with serving(secondary, bursts, delay):
            collected = await compare(secondary, disk, *cuts, busy=busy)
        assert collected.blocks == list(blocks_that_differ(disk, image))
        assert collected.zero == {start for start, block in collected.blocks if is_zero(block)}

    with small_limits() if small else nullcontext():
        run(test)


async def test_data_that_are_all_zero_are_zero_extents_and_meet_zeroes(autojump_clock: MockClock) -> None:
    batch = Batch((Extent(DISK, 0, 2 * BLOCK), Extent(DISK, 2 * BLOCK, 100)), bytes(2 * BLOCK + 100))
    secondary = Secondary(b"x" + bytes(2 * BLOCK + 99))
    async with (
        serving(secondary),
        secondary.comparison.differing(Reading([batch]), DISK, 2 * BLOCK + 100) as differences,
    ):
        assert [piece async for piece in differences] == [((Extent(DISK, 0, BLOCK, zero=True),), b"")]


async def test_zeroes_take_one_question_for_64_mib_and_no_memory(autojump_clock: MockClock) -> None:
    secondary = Secondary(b"")
    size = (32 << 30) + 512
    progress: list[int] = []

    async def agree() -> None:
        while True:
            await secondary.take()
            question = secondary.unanswered.popleft()
            none = bytes(len(all_differ(count_blocks(question.digests))))
            secondary.comparison.answered(m.BlocksDiffer(DISK, question.offset, none))

    tracemalloc.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(agree)
        async with secondary.comparison.differing(zeroes(size), DISK, size, progress=progress.append) as differences:
            assert [piece async for piece in differences] == []
        nursery.cancel_scope.cancel()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert secondary.asked == 512 + 1
    assert peak < 8 << 20
    assert progress == sorted(progress)
    assert progress[-1] == size


async def test_an_empty_disk_asks_nothing(autojump_clock: MockClock) -> None:
    secondary = Secondary(b"")
    assert (await compare(secondary, b"")).blocks == []
    assert secondary.asked == 0


@pytest.mark.parametrize("answers", [False, True])
async def test_a_secondary_or_a_consumer_that_hangs_stops_the_reading(answers: bool, autojump_clock: MockClock) -> None:
    read = 0

    def reading() -> Iterator[Batch]:
        nonlocal read
        while True:
            yield Batch((Extent(DISK, read, BATCH_BYTES),), b"x" * BATCH_BYTES)
            read += BATCH_BYTES

    secondary = Secondary(bytes(HELD_BYTES))
    async with secondary.comparison.differing(Reading(reading()), DISK, 1 << 40) as differences:
        for _ in range(HELD_BYTES // module.QUESTION_BYTES):
            await secondary.take()
            if answers:
                secondary.answer()
        await wait_all_tasks_blocked()
        assert HELD_BYTES - BATCH_BYTES <= read <= HELD_BYTES
        if not answers:
            secondary.answer()
        await anext(differences)
        await wait_all_tasks_blocked()
        assert read <= HELD_BYTES, "what was not handed over counts until it was"


async def test_no_more_questions_wait_than_may(autojump_clock: MockClock) -> None:
    secondary = Secondary(b"", places=1000)
    async with secondary.comparison.differing(zeroes(1 << 40), DISK, 1 << 40):
        await wait_all_tasks_blocked()
        assert secondary.out.statistics().current_buffer_used == QUESTIONS_LIMIT
    async with secondary.comparison.differing(zeroes(1 << 40), DISK, 1 << 40):
        await wait_all_tasks_blocked()
        assert secondary.out.statistics().current_buffer_used == QUESTIONS_LIMIT, "those of one left early count"


async def test_no_more_answers_are_kept_for_a_busy_consumer_than_questions_may_wait(autojump_clock: MockClock) -> None:
    secondary = Secondary(b"")
    async with serving(secondary), secondary.comparison.differing(zeroes(1 << 40), DISK, 1 << 40) as differences:
        await anext(differences)
        await wait_all_tasks_blocked()
        assert secondary.asked == QUESTIONS_LIMIT


async def test_a_question_may_wait_as_long_as_those_before_it_are_answered(autojump_clock: MockClock) -> None:
    secondary = Secondary(b"", places=QUESTIONS_LIMIT)
    size = QUESTIONS_LIMIT * (64 << 20)
    start = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def answer() -> None:
            await wait_all_tasks_blocked()
            for _ in range(QUESTIONS_LIMIT):
                await trio.sleep(ANSWER_TIMEOUT - 1)
                await secondary.take()
                secondary.answer()

        nursery.start_soon(answer)
        async with secondary.comparison.differing(zeroes(size), DISK, size) as differences:
            found = [extent async for extents, _ in differences for extent in extents]
    assert sum(extent.length for extent in found) == size
    assert trio.current_time() - start == pytest.approx(QUESTIONS_LIMIT * (ANSWER_TIMEOUT - 1))


@given(
    drawn=disks,
    first=st.integers(0, 3),
    answered=st.integers(0, 5),
    bursts=st.lists(st.integers(1, 8), min_size=1, max_size=3).map(tuple),
    places=st.sampled_from([0, 1, 100]),
    failing=st.booleans(),
)
def test_a_comparison_that_was_left_does_not_disturb_the_next(
    drawn: tuple[list[tuple[int, int]], int],
    first: int,
    answered: int,
    bursts: tuple[int, ...],
    places: int,
    failing: bool,
) -> None:
    disk = disk_of(drawn)

    class Left(Exception):
        pass

    async def leave(scope: trio.CancelScope) -> None:
        if failing:
            raise Left
        scope.cancel()
        await trio.lowlevel.checkpoint()

    async def test() -> None:
        # All of it differs from the first disk, and nothing from the second.
        secondary = Secondary(disk, places)
        other = bytes(256 - byte if byte else 9 for byte in disk[:1]) * len(disk)
        with trio.CancelScope() as scope:
            try:
                async with secondary.comparison.differing(Reading(batches_of(other)), DISK, len(disk)) as differences:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(secondary.serve, bursts)
                        for _ in range(first):
                            await anext(differences, None)
                        nursery.cancel_scope.cancel()
                    await wait_all_tasks_blocked()
                    for _ in range(min(answered, len(secondary.unanswered))):
                        secondary.answer()
                    await leave(scope)
            except Left:
                pass
        async with serving(secondary, bursts):
            assert (await compare(secondary, disk)).blocks == []
            assert (await compare(secondary, other)).blocks == list(blocks_that_differ(other, disk))

    with small_limits():
        run(test)


async def test_settling_waits_for_what_an_early_end_left_behind(autojump_clock: MockClock) -> None:
    secondary = Secondary(bytes(BLOCK))
    await secondary.comparison.settle()
    async with secondary.comparison.differing(zeroes(BLOCK), DISK, BLOCK):
        await secondary.take()
    with trio.move_on_after(1) as patience:
        await secondary.comparison.settle()
    assert patience.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(secondary.comparison.settle)
        await wait_all_tasks_blocked()
        secondary.answer()


async def test_a_lost_link_ends_the_comparison_and_the_next_link_starts_afresh(autojump_clock: MockClock) -> None:
    secondary = Secondary(bytes(BLOCK))

    async def lose() -> None:
        await secondary.take()
        await wait_all_tasks_blocked()
        secondary.comparison.link_lost()
        secondary.unanswered.clear()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lose)
        with pytest.raises(LinkLost):
            await compare(secondary, b"x" * BLOCK)
    async with serving(secondary):
        assert (await compare(secondary, b"x" * BLOCK)).blocks == [(0, b"x" * BLOCK)]


async def test_a_consumer_that_was_busy_while_the_link_was_replaced_gets_nothing_more(
    autojump_clock: MockClock,
) -> None:
    secondary = Secondary(b"", places=100)
    async with secondary.comparison.differing(zeroes(1 << 40), DISK, 1 << 40) as differences:
        await wait_all_tasks_blocked()
        secondary.comparison.link_lost()
        await wait_all_tasks_blocked()
        assert secondary.out.statistics().current_buffer_used == QUESTIONS_LIMIT, "the next link is not for these"
        with pytest.raises(LinkLost):
            await anext(differences)


async def test_a_link_that_does_not_take_the_question_is_the_comparisons_end(autojump_clock: MockClock) -> None:
    async def refuse(_: m.Message) -> None:
        await trio.lowlevel.checkpoint()
        raise LinkLost("it is gone")

    comparison = Comparison(refuse)
    with pytest.raises(LinkLost, match="it is gone"):
        async with comparison.differing(zeroes(BLOCK), DISK, BLOCK) as differences:
            await anext(differences)
    await comparison.settle()


async def test_an_answer_that_is_overdue_is_not_waited_for(autojump_clock: MockClock) -> None:
    secondary = Secondary(bytes(BLOCK))
    start = trio.current_time()
    with pytest.raises(PeerSilent, match="300 seconds"):
        await compare(secondary, b"x" * BLOCK)
    assert trio.current_time() - start == pytest.approx(ANSWER_TIMEOUT)


async def test_each_answer_may_take_its_time_and_so_may_reading_and_sending(autojump_clock: MockClock) -> None:
    secondary = Secondary(bytes(9 * BLOCK), places=0)
    ours = b"x" * (9 * BLOCK)
    reading = Reading(batches_of(ours, (BLOCK,)), pause=2 * ANSWER_TIMEOUT)

    async def serve() -> None:
        await trio.sleep(50 * ANSWER_TIMEOUT)  # the link is full meanwhile
        while True:
            await secondary.take()
            await trio.sleep(ANSWER_TIMEOUT - 1)
            secondary.answer()

    with small_limits():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            async with secondary.comparison.differing(reading, DISK, len(ours)) as differences:
                blocks = [piece async for piece in differences]
            nursery.cancel_scope.cancel()
    assert b"".join(data for _, data in blocks) == ours


async def test_a_question_that_the_link_has_not_taken_yet_is_not_overdue(autojump_clock: MockClock) -> None:
    secondary = Secondary(bytes(BLOCK), places=0)
    async with secondary.comparison.differing(zeroes(BLOCK), DISK, BLOCK) as differences:
        await wait_all_tasks_blocked()
        with trio.move_on_after(2 * ANSWER_TIMEOUT) as patience:
            await anext(differences)
    assert patience.cancelled_caught


@pytest.mark.parametrize("wrong", ["disk", "offset", "blocks"])
async def test_an_answer_that_does_not_fit_ends_the_link_rather_than_vouch_for_a_block(
    wrong: str, autojump_clock: MockClock
) -> None:
    secondary = Secondary(bytes(BLOCK))
    async with secondary.comparison.differing(zeroes(BLOCK), DISK, BLOCK):
        await secondary.take()
        with pytest.raises(LocalProtocolError):
            secondary.comparison.answered(
                m.BlocksDiffer(DISK + (wrong == "disk"), BLOCK * (wrong == "offset"), bytes(1 + (wrong == "blocks")))
            )
    secondary.answer()
    with pytest.raises(LocalProtocolError):
        secondary.comparison.answered(m.BlocksDiffer(DISK, 0, b"\0"))


@pytest.mark.parametrize(
    ("extents", "error"),
    [
        ([Extent(DISK, 0, 1000, zero=True)], GraphChanged),
        ([Extent(DISK, 0, BLOCK + 512, zero=True)], GraphChanged),
        ([Extent(DISK, 512, BLOCK - 512, zero=True)], InternalError),
        ([Extent(DISK, 0, 512, zero=True), Extent(DISK, 0, BLOCK, zero=True)], InternalError),
        ([Extent(DISK + 1, 0, BLOCK, zero=True)], InternalError),
    ],
    ids=["shorter", "longer", "gap", "overlap", "other disk"],
)
async def test_a_disk_that_is_not_read_as_a_whole_is_never_taken_for_compared(
    extents: list[Extent], error: type[Exception], autojump_clock: MockClock
) -> None:
    secondary = Secondary(bytes(2 * BLOCK))
    async with (
        serving(secondary),
        secondary.comparison.differing(Reading([Batch(tuple(extents), b"")]), DISK, BLOCK) as differences,
    ):
        with pytest.raises(error):
            _ = [piece async for piece in differences]


async def test_what_reading_raises_comes_out_as_it_was(autojump_clock: MockClock) -> None:
    def reading() -> Iterator[Batch]:
        yield Batch((Extent(DISK, 0, BLOCK, zero=True),), b"")
        raise NbdConnectionLost("QEMU is gone")

    secondary = Secondary(bytes(2 * BLOCK))
    with pytest.raises(NbdConnectionLost):
        async with secondary.comparison.differing(Reading(reading()), DISK, 2 * BLOCK) as differences:
            await anext(differences)


async def test_what_nobody_wants_any_more_is_not_kept_until_it_is_answered(autojump_clock: MockClock) -> None:
    secondary = Secondary(bytes(8 << 20))
    ours = b"x" * (8 << 20)
    tracemalloc.start()
    async with secondary.comparison.differing(Reading(batches_of(ours)), DISK, len(ours)):
        await secondary.take()
        await secondary.take()
        held, _ = tracemalloc.get_traced_memory()
    left, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held > 8 << 20
    assert left < 1 << 20
