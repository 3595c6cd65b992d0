"""Answering what differs: a target's blocks against the digests of the primary's.

Blocks that an epoch in doubt has written count as differing whatever they hold now: an epoch for which this was asked
applies to each checkpoint that can still be committed before it.  When the images can be compared at all is decided
elsewhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Final, Protocol

from qemu_remus.core.comparison import count_blocks, differing, digest_blocks, digest_zeroes
from qemu_remus.core.extents import Extent

_PIECE: Final = 1 << 20
"""Bytes that are read at once: at least one block."""


class Readable(Protocol):
    """What is asked of a target; :class:`qemu_remus.storage.targets.Target` has it."""

    size: int

    def read(self, offset: int, length: int) -> bytes: ...

    def is_hole(self, offset: int, length: int) -> bool: ...


class Written:
    """Which ranges of the disks some epoch has written, whatever it wrote.

    :param extents: the epoch's, in any order.
    """

    def __init__(self, extents: Iterable[Extent]) -> None:
        ranges: dict[int, list[tuple[int, int]]] = {}
        for extent in extents:
            ranges.setdefault(extent.disk, []).append((extent.offset, extent.end))
        self._starts: dict[int, list[int]] = {}
        self._ends: dict[int, list[int]] = {}
        for disk, found in ranges.items():
            starts = self._starts[disk] = []
            ends = self._ends[disk] = []
            for start, end in sorted(found):
                if ends and start <= ends[-1]:
                    ends[-1] = max(ends[-1], end)
                else:
                    starts.append(start)
                    ends.append(end)

    def touches(self, disk: int, start: int, end: int) -> bool:
        """Whether anything from ``start`` to before ``end`` was written."""
        before = bisect_right(self._starts.get(disk, ()), end - 1)
        return before > 0 and self._ends[disk][before - 1] > start


def compare_blocks(
    target: Readable, disk: int, offset: int, block_size: int, digests: bytes, doubted: Iterable[Written]
) -> bytes:
    """The bitmap of the blocks that are not known to be what the digests say; see :mod:`qemu_remus.core.comparison`.

    :param offset: bytes from the target's start to the first block.
    :param doubted: what epochs in doubt have written.
    :raise TargetUnsuitable, NoSpace, WriteFailed: as :meth:`Target.read`.
    """
    end = min(offset + count_blocks(digests) * block_size, target.size)
    bitmap = bytearray(differing(_digests(target, offset, end, block_size), digests))
    for written in doubted:
        if written.touches(disk, offset, end):
            for block in range(count_blocks(digests)):
                start = offset + block * block_size
                if written.touches(disk, start, start + block_size):
                    bitmap[block // 8] |= 1 << block % 8
    return bytes(bitmap)


def _digests(target: Readable, offset: int, end: int, block_size: int) -> bytes:
    digests = []
    for start in range(offset, end, _PIECE):
        length = min(_PIECE, end - start)
        if target.is_hole(start, length):
            full, short = divmod(length, block_size)
            digests.append(digest_zeroes(block_size) * full + (digest_zeroes(short) if short else b""))
        else:
            digests.append(digest_blocks(target.read(start, length), block_size))
    return b"".join(digests)
