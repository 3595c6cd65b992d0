"""The slices of a push, and what is read out of its staging file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core.errors import StorageError
from qemu_remus.core.model import DiskName, NodeName, QdevPath, pair_name
from qemu_remus.nbd.batches import BATCH_BYTES, Run
from qemu_remus.qemu.client import PeerCredentials
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.epoch import CLUSTER
from qemu_remus.qemu.staging import Slices, Staging, clusters_bytes

KIB = 1 << 10
MIB = 1 << 20


def clusters(runs: list[Run]) -> set[int]:
    return {number for run in runs for number in range(run.offset // CLUSTER, -(-run.end // CLUSTER))}


def bytes_of(runs: list[Run]) -> set[int]:
    """In units of 512 bytes."""
    return {number for run in runs for number in range(run.offset // 512, run.end // 512)}


@st.composite
def ascending(draw: st.DrawFn) -> list[Run]:
    runs: list[Run] = []
    offset = 0
    for gap, length in draw(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), max_size=30)):
        runs.append(Run(offset + gap * 512, length * 512))
        offset = runs[-1].end
    return runs


@given(ascending(), st.integers(0, 6 * CLUSTER))
def test_slices_hold_everything_once_within_the_budget(runs: list[Run], budget: int) -> None:
    slices = Slices(runs)
    parts = []
    while part := slices.take(budget):
        parts.append(part)
        assert len(clusters(part)) * CLUSTER <= max(budget, CLUSTER)
    assert slices.exhausted
    assert bytes_of([run for part in parts for run in part]) == bytes_of(runs)
    assert sum(len(bytes_of(part)) for part in parts) == len(bytes_of(runs))
    # no cluster is copied twice, by two jobs
    assert sum(len(clusters(part)) for part in parts) == len(clusters(runs))
    assert clusters_bytes(runs) == len(clusters(runs)) * CLUSTER


def test_slices_without_runs_are_exhausted_at_once() -> None:
    assert Slices([]).exhausted
    assert Slices([]).take(CLUSTER) == []


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    disk = VmDisk(
        *(DiskName("a"), "", QdevPath("/machine/a"), NodeName("a-node"), 8 * MIB + 512, False, False, "raw", ""),
        iothread=True,
    )
    owner = PeerCredentials(os.getpid(), os.getuid(), os.getgid())
    return Staging.make(tmp_path, pair_name("web"), disk, owner)


def test_the_files_have_the_disks_size_and_room_for_its_bitmap(staging: Staging) -> None:
    assert staging.data.path.stat().st_size == 8 * MIB + 512
    assert staging.bitmaps.path.stat().st_size % CLUSTER == 0
    staging.expect_bitmap()
    staging.offer_bitmap([Run(0, 8 * MIB + 512)])
    assert staging.bitmaps.path.stat().st_size == staging.bitmaps.size
    staging.empty()
    assert staging.bitmaps.allocated() == staging.data.allocated() == 0
    staging.close()
    assert not staging.data.path.exists()
    assert not staging.bitmaps.path.exists()


def test_what_was_copied_is_read_and_holes_are_zeroes(staging: Staging) -> None:
    staging.data.write([(64 * KIB, b"\x11" * 512 * KIB), (8 * MIB, b"\x22" * 512)])
    runs = [Run(0, 2 * MIB), Run(3 * MIB, 5 * MIB + 512)]
    batches = [staging.read(2, part) for part in staging.batches(runs)]
    assert all(len(batch.data) <= BATCH_BYTES for batch in batches)
    copy = bytearray(b"\xee" * (8 * MIB + 512))
    position = 0
    for batch in batches:
        position = 0
        for extent in batch.extents:
            assert extent.disk == 2
            data = bytes(extent.length) if extent.zero else batch.data[position : position + extent.length]
            copy[extent.offset : extent.end] = data
            position += extent.payload
    expected = bytearray(8 * MIB + 512)
    expected[64 * KIB : 576 * KIB] = b"\x11" * 512 * KIB
    expected[8 * MIB :] = b"\x22" * 512
    expected[2 * MIB : 3 * MIB] = b"\xee" * MIB
    assert copy == expected
    # nothing is read where the file has a hole
    assert sum(len(batch.data) for batch in batches) == 512 * KIB + 512
    staging.close()


def test_a_staging_file_that_has_become_shorter_is_no_source_of_zeroes(staging: Staging) -> None:
    os.truncate(staging.data.path, MIB)
    (part,) = staging.batches([Run(2 * MIB, 4096)])
    with pytest.raises(StorageError, match="shorter"):
        staging.read(0, part)
    staging.close()
