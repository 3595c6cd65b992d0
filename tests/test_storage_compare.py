"""Comparing a target with the primary's digests: the function against a plain way of doing the same, and the store.

The store's tests are about what the answer is compared with: the images as they are, the committed checkpoint, and
never what a commit that is still possible would change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core.comparison import all_differ, blocks_in, digest_blocks
from qemu_remus.core.errors import InternalError, TargetUnsuitable, WriteFailed
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import DiskName, DiskSpec, EpochNumber, Generation, PairName
from qemu_remus.core.settings import Address, SecondaryConfig
from qemu_remus.core.target_spec import raw_target
from qemu_remus.storage.compare import Written, compare_blocks
from qemu_remus.storage.store import Store

BLOCK = 4096
SIZE = 9 * BLOCK + 512
E1, E2, E3, E4 = map(EpochNumber, (1, 2, 3, 4))


class Image:
    """A target in memory; holes are known in units of 64 KiB."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= self.size
        self.reads.append((offset, length))
        return self.data[offset : offset + length]

    def is_hole(self, offset: int, length: int) -> bool:
        start, end = offset - offset % (64 << 10), -(-(offset + length) // (64 << 10)) * (64 << 10)
        return not any(self.data[start:end])


# --- the function ----------------------------------------------------------------------------------------------------


@given(
    st.sets(st.integers(0, 600)),
    st.sets(st.integers(0, 600)),
    st.integers(0, 3),
    st.integers(1, BLOCK),
    st.sampled_from([BLOCK, 1 << 16, 1 << 20]),
)
def test_exactly_the_blocks_whose_bytes_differ_are_found(
    filled: set[int], changed: set[int], first: int, tail: int, block_size: int
) -> None:
    size = 600 * BLOCK + tail
    theirs = bytearray(size)
    for block in filled:
        theirs[block * BLOCK] = 1
    ours = bytearray(theirs)
    for block in changed:
        ours[min((block + 1) * BLOCK, size) - 1] ^= 0x80
    offset = min(first, size // block_size) * block_size
    digests = digest_blocks(theirs[offset:], block_size)
    found = compare_blocks(Image(bytes(ours)), 0, offset, block_size, digests, ())
    expected = [
        number
        for number, start in enumerate(range(offset, size, block_size))
        if ours[start : start + block_size] != theirs[start : start + block_size]
    ]
    assert list(blocks_in(found)) == expected


def test_holes_are_compared_without_being_read() -> None:
    image = Image(bytes(3 << 20) + b"x" * (1 << 20) + bytes(1000))
    digests = digest_blocks(image.data, 1 << 16)
    assert not any(compare_blocks(image, 0, 0, 1 << 16, digests, ()))
    assert image.reads == [(3 << 20, 1 << 20)]


@given(
    st.lists(st.builds(Extent, st.integers(0, 1), st.integers(0, 200), st.integers(1, 40)), max_size=12),
    st.integers(0, 1),
    st.integers(0, 250),
    st.integers(1, 30),
)
def test_written_touches_what_any_extent_touches(extents: list[Extent], disk: int, start: int, length: int) -> None:
    end = start + length
    expected = any(extent.disk == disk and extent.offset < end and start < extent.end for extent in extents)
    assert Written(extents).touches(disk, start, end) is expected


# --- the store -------------------------------------------------------------------------------------------------------


def config(tmp_path: Path) -> SecondaryConfig:
    return SecondaryConfig(
        PairName("vm"),
        Address("127.0.0.1", 0),
        tmp_path / "store",
        {DiskName(name): raw_target(tmp_path / name) for name in ("vda", "vdb")},
        tmp_path / "control",
    )


def begin_sync(store: Store, generation: int = 7) -> None:
    disks = (DiskSpec(DiskName("vda"), SIZE), DiskSpec(DiskName("vdb"), SIZE))
    store.prepare_targets(replace(store.recovered, generation=Generation(UUID(int=generation)), disks=disks))


@pytest.fixture
def syncing(tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "store").mkdir()
    store = Store.open(config(tmp_path))
    begin_sync(store)
    yield store
    store.close()


def block(number: int, fill: bytes, disk: int = 1) -> tuple[tuple[Extent, ...], bytes]:
    return (Extent(disk, number * BLOCK, BLOCK),), fill * BLOCK


def epoch(store: Store, number: EpochNumber, base: EpochNumber | None, *writes: tuple[int, bytes]) -> None:
    """An epoch's extents on disk 1; neither staged nor committed."""
    store.begin_epoch(number, base)
    for at, fill in writes:
        store.append(number, *block(at, fill))


@pytest.fixture
def store(syncing: Store) -> Store:
    """Disk 1 is aaaa...; that is checkpoint 1, and it is in the image."""
    for at in range(9):
        syncing.write_images(*block(at, b"a"))
    syncing.write_images((Extent(1, 9 * BLOCK, 512),), b"a" * 512)
    syncing.flush_images()
    epoch(syncing, E1, None)
    syncing.stage_and_commit(E1)
    syncing.apply_some()
    return syncing


def differ(store: Store, content: bytes = b"a" * SIZE, disk: int = 1) -> list[int]:
    """The blocks of this disk that are not what is said."""
    return list(blocks_in(store.compare(disk, 0, BLOCK, digest_blocks(content, BLOCK))))


def test_during_a_sync_it_is_the_images_as_they_are(syncing: Store) -> None:
    assert differ(syncing, bytes(SIZE)) == []
    syncing.write_images(*block(3, b"x"))
    assert differ(syncing, bytes(SIZE)) == [3]
    assert differ(syncing, bytes(SIZE), disk=0) == []
    syncing.flush_images()
    epoch(syncing, E1, None, (4, b"y"))
    assert differ(syncing, bytes(SIZE)) == [3]


def test_in_an_epoch_it_is_the_committed_checkpoint_and_not_what_has_come_of_the_epoch(store: Store) -> None:
    epoch(store, E2, E1, (2, b"b"))
    assert differ(store) == []
    assert differ(store, b"a" * (SIZE - 1) + b"z") == [9]
    store.stage_and_commit(E2)
    assert not store.images_current
    with pytest.raises(InternalError, match="behind"):
        differ(store)
    store.apply_some()
    epoch(store, E3, E2)
    assert differ(store) == [2]


def test_blocks_that_a_commit_could_still_change_differ_whatever_they_hold(store: Store) -> None:
    epoch(store, E2, E1, (2, b"b"))
    store.stage(E2)
    epoch(store, E3, E1, (5, b"b"), (6, b"b"))
    assert differ(store) == [2]
    store.stage(E3)
    epoch(store, E4, E1)
    assert differ(store) == [2, 5, 6]
    assert differ(store, b"a" * SIZE, disk=0) == list(range(10))
    # What was dropped cannot come back.
    store.abort(E3)
    assert differ(store) == [2]


def test_an_epoch_that_was_compared_is_right_on_each_checkpoint_that_may_come_before_it(store: Store) -> None:
    epoch(store, E2, E1, (2, b"b"), (4, b"b"))
    store.stage(E2)
    content = bytearray(b"a" * SIZE)
    content[6 * BLOCK] ^= 1
    epoch(store, E3, E1)
    for at in differ(store, bytes(content)):
        piece = bytes(content[at * BLOCK : (at + 1) * BLOCK])
        store.append(E3, (Extent(1, at * BLOCK, len(piece)),), piece)
    store.stage(E3)
    store.commit(E2)
    store.commit(E3)
    while store.apply_some() is not None:
        pass
    assert differ(store, bytes(content)) == []


def test_what_is_in_doubt_is_known_after_a_restart(store: Store, tmp_path: Path) -> None:
    epoch(store, E2, E1, (2, b"b"))
    store.stage(E2)
    store.close()
    again = Store.open(config(tmp_path))
    assert again.images_current
    epoch(again, E3, E1)
    assert differ(again) == [2]
    again.close()


def test_a_new_copy_has_nothing_in_doubt(store: Store) -> None:
    epoch(store, E2, E1, (2, b"b"))
    store.stage(E2)
    assert differ(store) == [2]
    begin_sync(store, 8)
    assert differ(store) == []


@pytest.mark.parametrize(("disk", "first", "blocks"), [(2, 0, 1), (1, 10, 1), (1, 9, 2), (0, 0, 11)])
def test_blocks_that_no_disk_has_are_refused(store: Store, disk: int, first: int, blocks: int) -> None:
    with pytest.raises(TargetUnsuitable, match="no such"):
        store.compare(disk, first * BLOCK, BLOCK, bytes(16 * blocks))


def test_an_image_that_cannot_be_written_is_not_compared(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    epoch(store, E2, E1, (2, b"b"))
    store.stage_and_commit(E2)
    with monkeypatch.context() as patch:

        def fail(descriptor: int) -> None:
            raise OSError(5, os.strerror(5))

        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(WriteFailed):
            store.apply_some()
    with pytest.raises(InternalError):
        differ(store)
    store.apply_some()
    assert differ(store) == [2]


def test_the_answer_about_a_short_last_block_has_a_bit_for_it(store: Store) -> None:
    assert store.compare(1, 8 * BLOCK, BLOCK, bytes(32)) == all_differ(2)
    assert store.compare(1, 8 * BLOCK, BLOCK, digest_blocks(b"a" * (BLOCK + 512), BLOCK)) == b"\x00"
