"""Digests of blocks and bitmaps of blocks: known values, and each function against a plain way of doing the same."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core import comparison
from qemu_remus.core.comparison import (
    all_differ,
    bitmap_size,
    blocks_at_once,
    blocks_in,
    count_blocks,
    differing,
    digest_blocks,
    digest_zeroes,
    extents_in,
    fits,
    is_block_size,
)

BLOCK = 4096

bitmaps = st.sets(st.integers(0, 200)).map(lambda blocks: bitmap_of(blocks, 201))


def bitmap_of(blocks: set[int], count: int) -> bytes:
    bitmap = bytearray(-(-count // 8))
    for block in blocks:
        bitmap[block // 8] |= 1 << block % 8
    return bytes(bitmap)


def test_a_digest_is_blake2b_of_16_bytes() -> None:
    # $ printf abc | b2sum -l 128
    assert digest_blocks(b"abc", BLOCK).hex() == "cf4ab791c62b8d2b2109c90275287816"


@given(st.binary(max_size=3 * BLOCK + 5))
def test_each_block_has_its_own_digest_and_a_short_last_one_is_not_filled_up(data: bytes) -> None:
    digests = digest_blocks(data, BLOCK)
    blocks = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
    assert digests == b"".join(digest_blocks(block, BLOCK) for block in blocks)
    assert count_blocks(digests) == len(blocks)
    assert digest_blocks(memoryview(data), BLOCK) == digest_blocks(bytearray(data), BLOCK) == digests


def test_zeroes_are_digested_like_anything_else_and_their_number_counts() -> None:
    assert digest_zeroes(BLOCK) == digest_blocks(bytes(BLOCK), BLOCK)
    assert digest_zeroes(100) == digest_blocks(bytes(100), BLOCK)
    assert digest_zeroes(100) != digest_zeroes(BLOCK)


@given(st.integers(1, 70).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_exactly_the_blocks_that_differ_are_found(case: tuple[int, set[int]]) -> None:
    count, changed = case
    ours = [bytes([block]) * 16 for block in range(count)]
    # The last byte alone must be enough.
    theirs = [digest[:15] + b"\xff" if block in changed else digest for block, digest in enumerate(ours)]
    bitmap = differing(b"".join(ours), b"".join(theirs))
    assert set(blocks_in(bitmap)) == changed
    assert fits(bitmap, count)


@pytest.mark.parametrize(("ours", "theirs"), [(16, 32), (15, 15), (0, 16)])
def test_digests_of_other_numbers_of_blocks_are_not_compared(ours: int, theirs: int) -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        differing(bytes(ours), bytes(theirs))


@given(st.integers(1, 1024))
def test_all_differ_has_each_block_once_and_nothing_behind(blocks: int) -> None:
    assert list(blocks_in(all_differ(blocks))) == list(range(blocks))
    assert fits(all_differ(blocks), blocks)
    assert len(all_differ(blocks)) == bitmap_size(blocks)
    if blocks > 1:
        assert not fits(all_differ(blocks), blocks - 1)
    assert not fits(all_differ(blocks) + b"\0", blocks)


@given(bitmaps, st.integers(0, 5))
def test_extents_cover_exactly_the_blocks_and_are_joined(bitmap: bytes, start: int) -> None:
    size = (start + 200) * BLOCK + 512
    extents = list(extents_in(bitmap, 3, start * BLOCK, BLOCK, size))
    covered = [byte for extent in extents for byte in range(extent.offset, extent.end, 512)]
    assert covered == [
        at
        for block in blocks_in(bitmap)
        for at in range((start + block) * BLOCK, min((start + block + 1) * BLOCK, size), 512)
    ]
    assert all(extent.disk == 3 and not extent.zero for extent in extents)
    assert all(one.end < other.offset for one, other in itertools.pairwise(extents))


@pytest.mark.parametrize("size", [4096, 8192, 65536, 1 << 20])
def test_powers_of_two_within_the_limits_are_block_sizes(size: int) -> None:
    assert is_block_size(size)
    assert 1 <= blocks_at_once(size) <= comparison.BLOCKS_LIMIT
    assert blocks_at_once(size) * size <= comparison.SPAN_LIMIT


@pytest.mark.parametrize("size", [-4096, 0, 1, 512, 2048, 4097, 12288, (1 << 20) + 4096, 2 << 20])
def test_nothing_else_is_a_block_size(size: int) -> None:
    assert not is_block_size(size)
