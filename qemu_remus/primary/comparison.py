"""The primary's side of comparing a live disk with the secondary's: ask by digests, keep the blocks until the answer.

It owns the cutting of a disk into blocks and questions, the questions of one link that wait for their answers, and the
bounds on what is kept meanwhile.  What may not enter: reading the disk, sending what differs, and why it is compared.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Final

import trio

from qemu_remus.core import messages as m
from qemu_remus.core.comparison import (
    QUESTIONS_LIMIT,
    blocks_at_once,
    blocks_in,
    count_blocks,
    digest_blocks,
    digest_zeroes,
    fits,
)
from qemu_remus.core.errors import (
    GraphChanged,
    InternalError,
    LinkLost,
    LocalProtocolError,
    PeerSilent,
    QemuRemusError,
)
from qemu_remus.core.extents import Extent, coalesce
from qemu_remus.nbd.batches import BATCH_BYTES, Batch

__all__ = ["ANSWER_TIMEOUT", "Comparison", "Differences"]

BLOCK: Final = 64 << 10
"""Bytes of one block: what is sent where anything in it differs."""

QUESTION_BYTES: Final = 4 << 20
"""Most data that one question is about."""

HELD_BYTES: Final = 32 << 20
"""Most data that is kept: read, and not yet known to be the same or handed over."""

ANSWER_TIMEOUT: Final = 300.0
"""Seconds that the secondary may take for an answer after the one before it: first it writes all that it was sent."""

_BLOCKS_AT_ONCE: Final = blocks_at_once(BLOCK)
_ZEROES: Final = bytes(BLOCK)


class _Question:
    """Neighbouring blocks of a disk, and what they hold until it is known whether that has to be sent."""

    __slots__ = ("answer", "asked_at", "block_size", "blocks", "data", "digests", "disk", "held", "offset")

    def __init__(self, disk: int, offset: int, block_size: int = BLOCK) -> None:
        self.disk = disk
        self.offset = offset
        self.block_size = block_size
        self.blocks = 0
        self.digests = bytearray()
        self.data: dict[int, bytearray] = {}  # by block; those that are not here are zero
        self.held = 0
        self.asked_at = float("inf")
        self.answer: bytes | None = None

    @property
    def full(self) -> bool:
        return self.blocks == _BLOCKS_AT_ONCE or self.held + BLOCK > QUESTION_BYTES

    def add_zeroes(self, blocks: int, length: int) -> None:
        """So many more blocks, of ``length`` bytes each, are all zero."""
        self.digests += digest_zeroes(length) * blocks
        self.blocks += blocks

    def add_data(self, content: bytearray) -> None:
        """One more block holds this."""
        self.digests += digest_blocks(content, BLOCK)
        self.data[self.blocks] = content
        self.held += len(content)
        self.blocks += 1

    def message(self) -> m.CompareBlocks:
        """As it is asked."""
        return m.CompareBlocks(self.disk, self.offset, self.block_size, bytes(self.digests))

    def is_answered_by(self, answer: m.BlocksDiffer) -> bool:
        """Whether an answer is about these blocks."""
        asked = (self.disk, self.offset) == (answer.disk, answer.offset)
        return asked and fits(answer.differing, self.blocks)

    def drop(self) -> None:
        """Nobody wants to know any more, but the answer will come."""
        self.data.clear()

    def pieces(self, size: int) -> Iterator[tuple[tuple[Extent, ...], bytes]]:
        """The blocks that differ, with their contents, in messages' sizes.

        A question has no more blocks than a message may have extents.
        """
        assert self.answer is not None
        extents: list[Extent] = []
        data: list[bytearray] = []
        room = BATCH_BYTES
        for block in blocks_in(self.answer):
            offset = self.offset + block * BLOCK
            content = self.data.get(block)
            if content is not None:
                if room < len(content):
                    yield tuple(coalesce(extents)), b"".join(data)
                    extents, data, room = [], [], BATCH_BYTES
                data.append(content)
                room -= len(content)
            extents.append(Extent(self.disk, offset, min(BLOCK, size - offset), content is None))
        if extents:
            yield tuple(coalesce(extents)), b"".join(data)


class _Cutter:
    """Makes questions of a disk's batches, which must leave nothing out."""

    def __init__(self, disk: int, size: int, start: int) -> None:
        self._disk = disk
        self._size = size
        self._position = start
        self._question = _Question(disk, start)
        self._block: bytearray | None = None  # the one under way; None: all of it was zero so far

    def add(self, batch: Batch) -> Iterator[_Question]:
        """Take in the next batch; yields the questions that are complete with it."""
        view = memoryview(batch.data)
        start = 0
        for extent in batch.extents:
            if (extent.disk, extent.offset) != (self._disk, self._position):
                raise InternalError(f"{extent} was read where disk {self._disk} goes on at {self._position}")
            if extent.end > self._size:
                raise self._other_size("more")
            if extent.zero:
                yield from self._add_zeroes(extent.end)
            else:
                yield from self._add_data(view[start : start + extent.length])
                start += extent.length

    def finish(self) -> Iterator[_Question]:
        """The disk has come to its end."""
        if self._position != self._size:
            raise self._other_size("only some")
        if self._question.blocks:
            yield self._question

    def _other_size(self, how_many: str) -> GraphChanged:
        return GraphChanged(
            f"disk {self._disk} has {how_many} of the {self._size} bytes that it had when we attached",
            safe="the VM goes on, and the secondary keeps its last checkpoint",
            hint="if the disk was resized, that is seen to",
        )

    @property
    def _block_start(self) -> int:
        return self._position - self._position % BLOCK

    @property
    def _block_end(self) -> int:
        return min(self._block_start + BLOCK, self._size)

    def _add_zeroes(self, end: int) -> Iterator[_Question]:
        while self._position < end:
            if self._position % BLOCK == 0 and (whole := (end - self._position) // BLOCK):
                # However long it is, nothing is looked at block by block.
                blocks = min(whole, _BLOCKS_AT_ONCE - self._question.blocks)
                self._question.add_zeroes(blocks, BLOCK)
                self._position += blocks * BLOCK
                yield from self._asked_if_full()
            else:
                yield from self._go_to(min(end, self._block_end))

    def _add_data(self, data: memoryview) -> Iterator[_Question]:
        start = 0
        while start < len(data):
            if self._block is None:
                self._block = bytearray(self._block_end - self._block_start)
            within = self._position - self._block_start
            length = min(len(data) - start, self._block_end - self._position)
            self._block[within : within + length] = data[start : start + length]
            start += length
            yield from self._go_to(self._position + length)

    def _go_to(self, position: int) -> Iterator[_Question]:
        """What is before this position, within the present block or at its end, is known."""
        length, end = self._block_end - self._block_start, self._block_end
        self._position = position
        if position < end:
            return
        content, self._block = self._block, None
        # A reader looks for zeroes in units of its own, and from where its ranges begin.
        if content is None or content == _ZEROES[:length]:
            self._question.add_zeroes(1, length)
        else:
            self._question.add_data(content)
        yield from self._asked_if_full()

    def _asked_if_full(self) -> Iterator[_Question]:
        if self._question.full:
            full, self._question = self._question, _Question(self._disk, self._position)
            yield full


class Comparison:
    """The questions of one link after the other, and the answers to them.

    :param send: hands a message to the link; raises LinkError. Cancelled or failed, it has not sent the message.
    """

    def __init__(self, send: Callable[[m.Message], Awaitable[None]]) -> None:
        self._send = send
        self._unanswered: deque[_Question] = deque()  # also those that nobody wants to know any more
        self._heard_at = float("-inf")
        self._link = 0  # counts them
        self._turn = trio.Lock()
        self._news = trio.lowlevel.ParkingLot()

    def answered(self, message: m.BlocksDiffer) -> None:
        """Take an answer from the link, every one of them, in order. Never waits; keeps nothing that nobody asks for.

        :raise LocalProtocolError: when it does not fit the oldest question, so that no later one would.
        """
        if not self._unanswered or not self._unanswered[0].is_answered_by(message):
            raise LocalProtocolError(
                f"an answer about {message.offset} of disk {message.disk} is not to the question that waits for one",
                safe="nothing was taken for the same because of it",
                hint="this is a defect: report it",
            )
        self._unanswered.popleft().answer = message.differing
        self._heard_at = trio.current_time()
        self._news.unpark_all()

    def link_lost(self) -> None:
        """The link has ended: nothing asked on it will be answered. Call it before the next one is there."""
        self._link += 1
        self._unanswered.clear()
        self._news.unpark_all()

    @asynccontextmanager
    async def differing(
        self,
        batches: AsyncIterator[Batch],
        disk: int,
        size: int,
        *,
        start: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> AsyncIterator[Differences]:
        """What the secondary's copy of a disk does not hold, as far as it answers; the rest need not be sent::

            async with (
                attachment.read_live(disk) as batches,
                comparison.differing(batches, disk, size) as differences,
            ):
                async for extents, data in differences:
                    ...

        The block may be left at any time: answers that come later are dropped. The link must be one on which comparing
        is legal now, and stays so until then. At the end of the iteration every question has its answer.

        :param batches: of the disk from ``start`` on, in ascending order, without a gap; see ``Attachment.read_live``.
        :param size: of the disk, in bytes.
        :param start: where the batches begin, a multiple of the blocks' size.
        :param progress: told the bytes from the disk's start that are the same or were handed over, as they grow.
        """
        differences = Differences(self, size, progress)
        escaped: BaseException | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(differences._ask_about, batches, disk, start)
                try:
                    yield differences
                except BaseException as error:  # carried out by hand: the nursery would wrap it in a group
                    escaped = error
                nursery.cancel_scope.cancel()
        finally:
            differences._drop()
        if escaped is not None:
            raise escaped

    async def ask(self, disk: int, offset: int, block_size: int, digests: bytes) -> bytes:
        """Which of these blocks the secondary's copy does not hold, as a bitmap; the arguments are
        :class:`qemu_remus.core.messages.CompareBlocks`'. Cancelled, the answer is dropped when it comes.

        :raise LinkError: as ``Differences.__anext__``; also PeerSilent.
        """
        question = _Question(disk, offset, block_size)
        question.digests += digests
        question.blocks = count_blocks(digests)
        link = self._link
        await self._ask(question, link)
        while question.answer is None:
            self._check(link)
            await self._wait()
        return question.answer

    @property
    def settled(self) -> bool:
        """Every question of this link is answered."""
        return not self._unanswered

    async def settle(self) -> None:
        """Wait until every question of this link is answered, or the link is lost: no epoch may end before.

        Only a comparison that was left early leaves some behind.

        :raise PeerSilent: when an answer is overdue by ``ANSWER_TIMEOUT``.
        """
        await trio.lowlevel.checkpoint()
        while self._unanswered:
            await self._wait()

    async def _ask(self, question: _Question, link: int) -> None:
        """Ask, when there is room for one more question."""
        async with self._turn:
            while link == self._link and len(self._unanswered) >= QUESTIONS_LIMIT:
                await self._wait()
            self._check(link)
            # Before it is sent: the answer may be here before the sender has its turn again.
            self._unanswered.append(question)
            try:
                await self._send(question.message())
            except BaseException:
                with contextlib.suppress(ValueError):  # the link was lost meanwhile
                    self._unanswered.remove(question)
                raise
            question.digests.clear()
            question.asked_at = trio.current_time()
            # Whoever waits does not know yet since when.
            self._news.unpark_all()

    def _check(self, link: int) -> None:
        if link != self._link:
            raise LinkLost("the link ended while disks were being compared", safe="what differs is asked again later")

    async def _wait(self) -> None:
        """Wait until anything has changed.

        :raise PeerSilent: when the oldest question should have been answered by now.
        """
        due = float("inf")
        if self._unanswered:
            due = max(self._unanswered[0].asked_at, self._heard_at) + ANSWER_TIMEOUT
        with trio.move_on_at(due) as patience:
            await self._news.park()
        if patience.cancelled_caught:
            raise PeerSilent(
                f"the secondary has not said for {ANSWER_TIMEOUT:g} seconds which blocks differ",
                safe="the VM runs on, and its changes stay recorded",
                hint="see whether its disks still answer",
            )


class Differences:
    """What differs, in ascending order: ``async for extents, data in differences``, once.

    Extents are joined where they are neighbours; those of blocks that are all zero are zero extents. At most
    ``BATCH_BYTES`` of data and ``BATCH_EXTENTS`` extents come at a time, never none. Reading and asking go on in the
    background while the consumer is busy, until ``HELD_BYTES`` or ``QUESTIONS_LIMIT`` questions wait.
    """

    def __init__(self, comparison: Comparison, size: int, progress: Callable[[int], None] | None) -> None:
        self._comparison = comparison
        self._link = comparison._link
        self._size = size
        self._progress = progress
        self._questions: deque[_Question] = deque()  # asked and not yet handed over
        self._held = 0
        self._pieces: Iterator[tuple[tuple[Extent, ...], bytes]] | None = None
        self._ended = False
        self._failure: QemuRemusError | None = None

    def __aiter__(self) -> AsyncIterator[tuple[tuple[Extent, ...], bytes]]:
        return self

    async def __anext__(self) -> tuple[tuple[Extent, ...], bytes]:
        """The next that differ: their extents, and the contents of those that are not zero, one after the other.

        :raise LinkError: when the link ended: LinkLost, or its own reason where asking met it first.
        :raise PeerSilent: when an answer is overdue by ``ANSWER_TIMEOUT``.
        :raise GraphChanged: when the disk does not have its size any more.
        :raise QemuRemusError: what the batches raised.
        """
        await trio.lowlevel.checkpoint()
        while True:
            if self._failure is not None:
                raise self._failure
            self._comparison._check(self._link)
            if self._pieces is not None:
                piece = next(self._pieces, None)
                if piece is not None:
                    return piece
                self._handed_over()
            elif self._questions and self._questions[0].answer is not None:
                self._pieces = self._questions[0].pieces(self._size)
            elif self._ended and not self._questions:
                raise StopAsyncIteration
            else:
                await self._comparison._wait()

    def _handed_over(self) -> None:
        question = self._questions.popleft()
        self._held -= question.held
        self._pieces = None
        if self._progress is not None:
            self._progress(min(question.offset + question.blocks * BLOCK, self._size))
        self._comparison._news.unpark_all()

    async def _ask_about(self, batches: AsyncIterator[Batch], disk: int, start: int) -> None:
        """The half in the background."""
        cutter = _Cutter(disk, self._size, start)
        try:
            async for batch in batches:
                for question in cutter.add(batch):
                    await self._ask(question)
            for question in cutter.finish():
                await self._ask(question)
            self._ended = True
        except QemuRemusError as error:
            self._failure = error
        self._comparison._news.unpark_all()

    async def _ask(self, question: _Question) -> None:
        self._questions.append(question)
        self._held += question.held
        await self._comparison._ask(question, self._link)
        # The next question fills while this waits: there must be room for all of it.
        while self._held > HELD_BYTES - QUESTION_BYTES or len(self._questions) >= QUESTIONS_LIMIT:
            self._comparison._check(self._link)
            await self._comparison._wait()

    def _drop(self) -> None:
        for question in self._questions:
            question.drop()
        self._questions.clear()
