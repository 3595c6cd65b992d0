"""Comparing disks by their blocks' digests: what is the same on both sides need not travel.

It owns what a digest is, and how the blocks that differ are written down.  What may not enter: reading disks, and what
to do about a difference.

A block's digest is BLAKE2b (RFC 7693) with 16 bytes of it, over the bytes that the disk has there: the last block of a
disk may be short.  A bitmap of blocks has one bit for each, the first in the lowest bit of the first byte; the bits
behind the last block are 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from typing import Final

from qemu_remus.core.extents import Extent, coalesce

DIGEST_SIZE: Final = 16
"""Bytes of one block's digest."""

BLOCK_LEAST: Final = 4 << 10
BLOCK_MOST: Final = 1 << 20
"""A block is a power of two between these, in bytes."""

BLOCKS_LIMIT: Final = 1024
"""Most blocks in one question."""

SPAN_LIMIT: Final = 64 << 20
"""Most bytes that one question is about: nothing else is done while they are read."""

QUESTIONS_LIMIT: Final = 32
"""Most questions of one link that wait for their answers."""


def is_block_size(size: int) -> bool:
    """Whether blocks may have this size."""
    return BLOCK_LEAST <= size <= BLOCK_MOST and size & (size - 1) == 0


def blocks_at_once(block_size: int) -> int:
    """Most blocks of this size in one question."""
    return min(BLOCKS_LIMIT, SPAN_LIMIT // block_size)


def digest_blocks(data: bytes | bytearray | memoryview, block_size: int) -> bytes:
    """The digests of the blocks in ``data``, one behind the other; the last one may be short."""
    view = memoryview(data).cast("B")
    return b"".join(
        blake2b(view[start : start + block_size], digest_size=DIGEST_SIZE).digest()
        for start in range(0, len(view), block_size)
    )


@lru_cache(maxsize=64)
def digest_zeroes(length: int) -> bytes:
    """The digest of one block of ``length`` bytes that are all zero."""
    return blake2b(bytes(length), digest_size=DIGEST_SIZE).digest()


def count_blocks(digests: bytes | memoryview) -> int:
    """How many blocks these digests are of."""
    return len(digests) // DIGEST_SIZE


def differing(ours: bytes | memoryview, theirs: bytes | memoryview) -> bytes:
    """The bitmap of the blocks whose digests are not the same.

    :raise ValueError: when they are not of equally many blocks.
    """
    if len(ours) != len(theirs) or len(ours) % DIGEST_SIZE:
        raise ValueError(f"{len(ours)} bytes of digests cannot be compared with {len(theirs)}")
    bitmap = bytearray(bitmap_size(count_blocks(ours)))
    if ours != theirs:
        for block in range(count_blocks(ours)):
            at = block * DIGEST_SIZE
            if ours[at : at + DIGEST_SIZE] != theirs[at : at + DIGEST_SIZE]:
                bitmap[block // 8] |= 1 << block % 8
    return bytes(bitmap)


def all_differ(blocks: int) -> bytes:
    """The bitmap of so many blocks that all differ: the answer of somebody who cannot tell."""
    return ((1 << blocks) - 1).to_bytes(bitmap_size(blocks), "little")


def bitmap_size(blocks: int) -> int:
    """Bytes of a bitmap of so many blocks."""
    return -(-blocks // 8)


def fits(bitmap: bytes, blocks: int) -> bool:
    """Whether this is a bitmap of so many blocks."""
    return len(bitmap) == bitmap_size(blocks) and int.from_bytes(bitmap, "little") >> blocks == 0


def blocks_in(bitmap: bytes) -> Iterator[int]:
    """The blocks whose bits are set, in order."""
    for number, byte in enumerate(bitmap):
        while byte:
            yield number * 8 + (byte & -byte).bit_length() - 1
            byte &= byte - 1


def extents_in(bitmap: bytes, disk: int, offset: int, block_size: int, size: int) -> Iterator[Extent]:
    """The ranges whose bits are set, neighbours joined.

    :param offset: bytes from the disk's start to the first block.
    :param size: bytes of the disk, at which a short last block ends.
    """
    starts = (offset + block * block_size for block in blocks_in(bitmap))
    return coalesce(Extent(disk, start, min(block_size, size - start)) for start in starts)
