"""What a reader hands over: batches of extents with their contents, and how reads become batches.

Owns the cutting of data ranges into batches and reads, the finding of zeroes in what was read, and the order of what
comes out. Pure: no sockets, no trio, and nothing that knows how a read is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from qemu_remus.core.extents import Extent

BATCH_BYTES: Final = 256 * 1024
"""Most data in one batch."""

BATCH_EXTENTS: Final = 1024
"""Most extents in one batch."""

ZERO_BLOCK: Final = 4096
"""Unit, in bytes, in which data that were read are compared with zeroes."""

_ZEROES: Final = bytes(ZERO_BLOCK)

_BATCH_RUNS: Final = BATCH_EXTENTS - BATCH_BYTES // ZERO_BLOCK
"""Most ranges that go into one batch. Looking for zeroes cuts a range into at most one piece per ``ZERO_BLOCK`` and one
more, so this keeps ``BATCH_EXTENTS``."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A few neighbouring extents of one disk.

    :param extents: in ascending order, not overlapping; at most ``BATCH_EXTENTS``. A zero extent may be as long as the
        disk.
    :param data: the contents of all extents that are not zero, one after the other; at most ``BATCH_BYTES`` bytes. It
        belongs to whoever gets the batch.
    """

    extents: tuple[Extent, ...]
    data: bytes | bytearray


@dataclass(frozen=True, slots=True)
class Run:
    """A range of the disk, in bytes; ``zero``: known to read as zeroes, so that it need not be read."""

    offset: int
    length: int
    zero: bool = False

    @property
    def end(self) -> int:
        """First byte behind the range."""
        return self.offset + self.length


class Assembly:
    """One batch while its data are being read."""

    __slots__ = ("_data", "_runs", "missing")

    def __init__(self, runs: list[Run]) -> None:
        self._runs = runs
        self.missing = sum(run.length for run in runs if not run.zero)
        self._data = bytearray(self.missing)

    def fill(self, position: int, length: int, data: memoryview | bytes | None) -> None:
        """Put in what one read brought: ``length`` bytes at ``position`` of the batch's data; None for zeroes."""
        if data is not None:
            self._data[position : position + length] = data
        self.missing -= length

    def finish(self, disk: int) -> Batch:
        """The batch, its blocks of zeroes made zero extents. Call once, when nothing is missing."""
        pieces: list[Run] = []
        keep: list[tuple[int, int]] = []
        position = 0
        for run in self._runs:
            if run.zero:
                append_run(pieces, run)
                continue
            for piece in _split_at_zeroes(self._data, position, run):
                if not piece.zero:
                    start = position + piece.offset - run.offset
                    keep.append((start, start + piece.length))
                append_run(pieces, piece)
            position += run.length
        extents = tuple(Extent(disk, piece.offset, piece.length, piece.zero) for piece in pieces)
        if sum(end - start for start, end in keep) == len(self._data):
            return Batch(extents, self._data)
        view = memoryview(self._data)
        return Batch(extents, b"".join([view[start:end] for start, end in keep]))


def append_run(runs: list[Run], run: Run) -> None:
    """Add a run behind the others, joined to the last one where they are neighbours of one kind."""
    if runs and runs[-1].end == run.offset and runs[-1].zero == run.zero:
        runs[-1] = Run(runs[-1].offset, runs[-1].length + run.length, run.zero)
    else:
        runs.append(run)


def _split_at_zeroes(data: bytearray, position: int, run: Run) -> Iterator[Run]:
    """Cut a run, whose contents are at ``position`` of ``data``, where blocks of zeroes begin and end."""
    end = position + run.length
    whole = end - run.length % ZERO_BLOCK
    # startswith is a memcmp that copies nothing; comparing memoryviews goes item by item.
    zeroes = [start for start in range(position, whole, ZERO_BLOCK) if data.startswith(_ZEROES, start)]
    if whole < end and data.startswith(_ZEROES[: end - whole], whole):
        zeroes.append(whole)
    if not zeroes:
        yield run
        return
    done = position
    for start in zeroes:
        if start > done:
            yield Run(run.offset + done - position, start - done)
        done = min(start + ZERO_BLOCK, end)
        yield Run(run.offset + start - position, done - start, zero=True)
    if done < end:
        yield Run(run.offset + done - position, end - done)


@dataclass(frozen=True, slots=True)
class Read:
    """One read: ``length`` bytes at ``offset`` of the disk, for ``position`` of a batch's data."""

    assembly: Assembly
    offset: int
    length: int
    position: int

    def fill(self, data: memoryview | bytes | None) -> None:
        """The read brought these data; None for zeroes."""
        self.assembly.fill(self.position, self.length, data)


def cut_batches(runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Cut runs, in ascending order, into the runs of one batch each."""
    batch: list[Run] = []
    room = BATCH_BYTES
    for run in runs:
        offset = run.offset
        while offset < run.end:
            if len(batch) == _BATCH_RUNS or (room == 0 and not run.zero):
                yield batch
                batch, room = [], BATCH_BYTES
            length = run.end - offset if run.zero else min(run.end - offset, room)
            batch.append(Run(offset, length, run.zero))
            if not run.zero:
                room -= length
            offset += length
    if batch:
        yield batch


CLUSTER: Final = 64 * 1024
"""Bytes: no read goes from one such piece of the disk into the next.

QEMU's copy-before-write filter keeps a snapshot in clusters of this size, some in the fleece, some still on the disk. A
read across the border from a cluster that is in the fleece to one that is not, or the other way round, can be answered
from the wrong one: hbitmap_status() is wrong where the first bit that it looks at is the last of its kind (QEMU 7.2;
mended in 8.0). Within one cluster there is nothing to get wrong.
"""


class BatchQueue:
    """The reads of a sequence of runs, handed out in ascending order; batches come out in that order as well, however
    the replies come in.

    :param disk: index that the extents carry.
    :param read_bytes: longest single read.
    :param limit: most batches that are begun and not yet taken out; bounds the memory.
    """

    def __init__(self, disk: int, *, read_bytes: int, limit: int) -> None:
        self._disk = disk
        self._read_bytes = read_bytes
        self._limit = limit
        self._batches: Iterator[list[Run]] = iter(())
        self._begun: deque[Assembly] = deque()
        self._reads: deque[Read] = deque()
        self._more = False

    def plan(self, runs: Iterable[Run]) -> None:
        """Take in the next runs; the last ones must all have been handed out."""
        self._batches = cut_batches(runs)
        self._more = True
        self._refill()

    def next_read(self) -> Read | None:
        """The next read; None where there is none, or none for now (:attr:`exhausted` tells)."""
        if not self._reads:
            self._refill()
        return self._reads.popleft() if self._reads else None

    def put_back(self, read: Read) -> None:
        """The last read handed out is not made now: it is the next again."""
        self._reads.appendleft(read)

    @property
    def exhausted(self) -> bool:
        """All reads of the runs planned so far have been handed out."""
        return not self._reads and not self._more

    def next_batch(self) -> Batch | None:
        """The next batch, if it is complete."""
        if not self._begun or self._begun[0].missing:
            return None
        return self._begun.popleft().finish(self._disk)

    @property
    def ready(self) -> bool:
        """Whether :meth:`next_batch` has one."""
        return bool(self._begun) and not self._begun[0].missing

    def _refill(self) -> None:
        # A batch of nothing but zeroes has no reads: go on to the next, within the limit.
        while self._more and not self._reads and len(self._begun) < self._limit:
            runs = next(self._batches, None)
            if runs is None:
                self._more = False
                return
            assembly = Assembly(runs)
            self._begun.append(assembly)
            self._reads.extend(self._cut_reads(assembly, runs))

    def _cut_reads(self, assembly: Assembly, runs: list[Run]) -> Iterator[Read]:
        position = 0
        for run in runs:
            if run.zero:
                continue
            offset = run.offset
            while offset < run.end:
                length = min(self._read_bytes, run.end - offset, CLUSTER - offset % CLUSTER)
                yield Read(assembly, offset, length, position)
                position += length
                offset += length
