"""Extents, and the arithmetic on them: pure integers, in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of one disk with known contents.

    :param disk: index into the pair's disks, in the order of the primary's hello.
    :param offset: bytes from the disk's start.
    :param length: bytes, more than 0.
    :param zero: the range reads as zeroes and travels without data.
    """

    disk: int
    offset: int
    length: int
    zero: bool = False

    @property
    def end(self) -> int:
        """First byte behind the extent."""
        return self.offset + self.length

    @property
    def payload(self) -> int:
        """Bytes of data that travel with it."""
        return 0 if self.zero else self.length


def coalesce(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Join neighbours of the same disk and kind; the input must be sorted by disk and offset and not overlap."""
    pending: Extent | None = None
    for extent in extents:
        if (
            pending is not None
            and pending.disk == extent.disk
            and pending.end == extent.offset
            and pending.zero == extent.zero
        ):
            pending = Extent(pending.disk, pending.offset, pending.length + extent.length, pending.zero)
            continue
        if pending is not None:
            yield pending
        pending = extent
    if pending is not None:
        yield pending


def split(extent: Extent, limit: int) -> Iterator[Extent]:
    """Cut an extent into pieces of at most ``limit`` bytes."""
    for offset in range(extent.offset, extent.end, limit):
        yield Extent(extent.disk, offset, min(limit, extent.end - offset), extent.zero)


def round_out(offset: int, length: int, granularity: int, size: int) -> tuple[int, int]:
    """The smallest granularity-aligned range, clipped to ``size``, that covers the given one.

    :return: offset and length in bytes.
    """
    start = offset - offset % granularity
    end = min(-(-(offset + length) // granularity) * granularity, size)
    return start, end - start
