"""Bitmaps in QEMU's files: what is put in comes out, and what is no stored bitmap is never taken for an empty one.

Whether QEMU takes these files for what they are, integration/test_push.py sees.
"""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core.errors import EpochLost
from qemu_remus.qemu import bitmap_file
from qemu_remus.qemu.bitmap_file import CLUSTER, Piece

SECTOR = 512


class File:
    """A sparse file in memory."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces

    def read(self, length: int, offset: int) -> bytes:
        data = bytearray(length)
        for at, piece in self.pieces:
            start, end = max(at, offset), min(at + len(piece), offset + length)
            if start < end:
                data[start - offset : end - offset] = piece[start - at : end - at]
        return bytes(data)

    @property
    def end(self) -> int:
        return max(at + len(piece) for at, piece in self.pieces)


@st.composite
def dirty(draw: st.DrawFn) -> tuple[int, int, set[int]]:
    """A disk's size, a granularity, and the numbers of its dirty granules."""
    granularity = 1 << draw(st.integers(9, 20))
    # Three pieces of the bitmap's file at most, and a last granule that is cut.
    granules = draw(st.integers(1, 3 * CLUSTER * 8))
    size = (granules - 1) * granularity + draw(st.integers(1, granularity // SECTOR)) * SECTOR
    starts = draw(st.lists(st.integers(0, granules - 1), max_size=20))
    lengths = draw(st.lists(st.integers(1, 5000), min_size=len(starts), max_size=len(starts)))
    pairs = zip(starts, lengths, strict=True)
    return size, granularity, {n for start, length in pairs for n in range(start, min(start + length, granules))}


def ranges_of(granules: set[int], granularity: int) -> list[tuple[int, int]]:
    return [(number * granularity, granularity) for number in sorted(granules)]


@given(dirty())
def test_what_is_put_in_comes_out_and_fits_the_file(case: tuple[int, int, set[int]]) -> None:
    size, granularity, granules = case
    file = File(bitmap_file.image_with(size, "map", granularity, ranges_of(granules, granularity)))
    assert file.end <= bitmap_file.file_size(size, granularity)
    found = list(bitmap_file.read_bitmap(file.read, size, "map", granularity).ranges())
    assert {
        number
        for offset, length in found
        for number in range(offset // granularity, -(-(offset + length) // granularity))
    } == granules
    assert all(length > 0 and offset + length <= size for offset, length in found)
    # ascending, and neighbours joined
    assert all(sum(one) < other[0] for one, other in pairwise(found))


def test_a_range_counts_for_every_granule_that_it_touches() -> None:
    pieces = bitmap_file.image_with(1 << 20, "map", 65536, [(65535, 2), (300_000, 1)])
    found = bitmap_file.read_bitmap(File(pieces).read, 1 << 20, "map", 65536)
    assert list(found.ranges()) == [(0, 131072), (262144, 65536)]


def test_a_piece_of_nothing_but_ones_needs_no_data() -> None:
    size = 3 * CLUSTER * 8 * 4096
    pieces = bitmap_file.image_with(size, "map", 4096, [(0, 4096)])
    table = next(index for index, (_, data) in enumerate(pieces) if data[:8] == struct.pack(">Q", pieces[-1][0]))
    offset, data = pieces[table]
    pieces[table] = offset, data[:8] + struct.pack(">Q", 1) + data[16:]
    found = bitmap_file.read_bitmap(File(pieces).read, size, "map", 4096)
    assert list(found.ranges()) == [(0, 4096), (size // 3, size // 3)]


@pytest.mark.parametrize(
    ("name", "granularity", "size"), [("other", 4096, 1 << 20), ("map", 8192, 1 << 20), ("map", 4096, 1 << 21)]
)
def test_another_bitmap_is_not_taken_for_it(name: str, granularity: int, size: int) -> None:
    file = File(bitmap_file.image_with(1 << 20, "map", 4096, [(0, 4096)]))
    with pytest.raises(EpochLost, match="not stored"):
        bitmap_file.read_bitmap(file.read, size, name, granularity)


def test_an_image_in_which_none_was_stored_is_no_empty_bitmap() -> None:
    file = File(bitmap_file.empty_image(1 << 20))
    with pytest.raises(EpochLost, match="no bitmap in it"):
        bitmap_file.read_bitmap(file.read, 1 << 20, "map", 4096)


def test_a_bitmap_that_is_marked_as_in_use_was_not_stored_to_its_end() -> None:
    pieces = bitmap_file.image_with(1 << 20, "map", 4096, [(0, 4096)])
    index = next(index for index, (_, data) in enumerate(pieces) if b"map" in data)
    offset, data = pieces[index]
    flags = struct.calcsize(">QI")
    pieces[index] = offset, data[:flags] + struct.pack(">I", 1) + data[flags + 4 :]
    with pytest.raises(EpochLost):
        bitmap_file.read_bitmap(File(pieces).read, 1 << 20, "map", 4096)


@given(st.binary(max_size=400))
def test_rubbish_is_a_lost_epoch_and_nothing_else(data: bytes) -> None:
    header = File(bitmap_file.image_with(1 << 20, "map", 4096, [(0, 4096)])).read(CLUSTER, 0)
    for file in (File([(0, data)]), File([(0, header[:104] + data)])):
        with pytest.raises(EpochLost):
            bitmap_file.read_bitmap(file.read, 1 << 20, "map", 4096)
