"""Which ranges to read: block status walked in steps whose answers fit the budget of replies owed.

Owns the spans of block status requests and what their answers mean. Pure arithmetic: the reader asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from qemu_remus.nbd.batches import Run, append_run
from qemu_remus.nbd.protocol import STATE_ZERO, STATUS_EXTENTS, STATUS_SPAN

_DIRTY: Final = 1

_SMALLEST_EXTENT: Final = 512
"""Bytes. QEMU reports allocation in nothing smaller than a sector."""


def clip(extents: Sequence[tuple[int, int]], offset: int, end: int) -> list[tuple[int, int, int]]:
    """(offset, length, flags) of a status answer that begins at ``offset``, without what lies behind ``end``."""
    clipped = []
    for length, flags in extents:
        if offset >= end:
            break
        clipped.append((offset, min(length, end - offset), flags))
        offset += length
    return clipped


class DirtyWalk:
    """Walks a dirty bitmap from the disk's start to its end.

    A span S can yield at most S / granularity extents, and at most two for each dirty block of the bitmap that is not
    found yet, and one. So a large and nearly clean disk takes a few requests, and no answer outgrows the budget.

    :param size: of the disk, in bytes.
    :param granularity: of the bitmap, in bytes.
    :param dirty_bytes: what QEMU counts in the bitmap. Should more be found, the number is not trusted any more.
    """

    def __init__(self, size: int, granularity: int, dirty_bytes: int) -> None:
        self._size = size
        self._granularity = granularity
        self._left: int | None = -(-dirty_bytes // granularity)
        self.offset = 0

    @property
    def finished(self) -> bool:
        """The end of the disk is reached."""
        return self.offset >= self._size

    def next_request(self) -> tuple[int, int, int]:
        """Offset and length to ask for, and the most extents that the answer can have."""
        widest = max(STATUS_SPAN // self._granularity, 1) * self._granularity
        extents = STATUS_EXTENTS if self._left is None else min(STATUS_EXTENTS, 2 * self._left + 1)
        if extents == STATUS_EXTENTS:
            # One extent is kept for a first block that is cut, should an earlier answer have ended inside a block.
            widest = min(widest, (STATUS_EXTENTS - 1) * self._granularity)
        length = min(widest, self._size - self.offset)
        return self.offset, length, min(extents, -(-length // self._granularity) + 1)

    def found(self, extents: Sequence[tuple[int, int]]) -> list[Run]:
        """Take in the answer to :meth:`next_request`; returns the dirty ranges in it, neighbours joined.

        An answer may go beyond what was asked: all of it counts, up to the end of the disk.
        """
        runs: list[Run] = []
        for offset, length, flags in clip(extents, self.offset, self._size):
            self.offset = offset + length
            if not flags & _DIRTY:
                continue
            if self._left is not None:
                self._left -= -(-length // self._granularity)
                if self._left < 0:
                    self._left = None
            append_run(runs, Run(offset, length))
        return runs


class AllocationWalk:
    """Asks which parts of a range read as zeroes.

    Where extents are long it asks for one at a time, each as long as it likes; where they are short, for spans that
    cannot yield more than the budget even if every sector differed from the next.
    """

    _SHORT: Final = (STATUS_EXTENTS - 1) * _SMALLEST_EXTENT

    def __init__(self) -> None:
        self._one = True

    def next_request(self, run: Run) -> tuple[int, int, int]:
        """Offset and length to ask for, from the run's start on, and the most extents that the answer can have."""
        if self._one:
            return run.offset, min(run.length, STATUS_SPAN), 1
        return run.offset, min(run.length, self._SHORT), STATUS_EXTENTS

    def found(self, run: Run, extents: Sequence[tuple[int, int]]) -> list[Run]:
        """What the answer says about the start of the run, zero ranges marked; at least one, from the run's start."""
        runs: list[Run] = []
        for offset, length, flags in clip(extents, run.offset, run.end):
            # A hole that is not said to be zero has undefined contents: read it.
            append_run(runs, Run(offset, length, bool(flags & STATE_ZERO)))
        if self._one:
            self._one = runs[0].length >= self._SHORT or runs[0].end == run.end
        else:
            self._one = len(runs) == 1
        return runs
