"""What has changed, in bitmaps: merged, rotated, read ahead and removed without losing a write."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from qemu_remus.core.errors import (
    CommandFailed,
    GraphChanged,
)
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import DiskName
from qemu_remus.nbd.batches import Batch
from qemu_remus.qemu import epoch
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.nodes import BitmapIdentity
from qemu_remus.qemu.transport import Transport
from tests.epoch.rig import (
    BLOCK,
    Rig,
    attached,
    identity,
    named,
    recorded,
)
from tests.fake_qemu import FakeQemu


async def test_a_merge_keeps_every_change_and_one_bitmap(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        capture = await rig.capture()
        qemu.write("a-node", BLOCK, 1)
        await rig.attachment.release(capture)
        del qemu.nodes["b-node"].bitmaps[identity(1).name]
        await rig.attachment.merge_back([identity(1), identity(2)], named(3))
        qemu.write("a-node", 2 * BLOCK, 1)
        assert await rig.attachment.bitmaps() == dict.fromkeys(
            map(DiskName, "ab"), (epoch.Tracked(identity(3), recording=True),)
        )
        assert recorded(qemu, "a-node") == {0, 1, 2}


async def test_a_merge_of_a_bitmap_that_is_in_use_changes_nothing(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.nodes["b-node"].bitmaps[identity(1).name].busy = 1
        with pytest.raises(CommandFailed, match="in use"):
            await rig.attachment.merge_back([identity(1)], named(2))
        assert set((await rig.attachment.bitmaps()).values()) == {(epoch.Tracked(identity(1), recording=True),)}
        qemu.nodes["b-node"].bitmaps[identity(1).name].busy = 0
        await rig.attachment.remove_bitmaps(identity(1))
        await rig.attachment.remove_bitmaps(identity(1))
        assert set((await rig.attachment.bitmaps()).values()) == {()}


class Sources:
    """Stands for the transport: notes what is read."""

    def __init__(self) -> None:
        self.read: list[tuple[int, str, int]] = []

    def enters_graph(self, disk: VmDisk) -> bool:
        return False

    @asynccontextmanager
    async def read_ahead(self, index: int, disk: VmDisk, bitmap: epoch.BitmapLook) -> AsyncIterator[Any]:
        self.read.append((index, bitmap.name, bitmap.count))

        async def stream() -> AsyncIterator[Batch]:
            yield Batch((Extent(index, 0, BLOCK, zero=True),), bytearray())

        yield stream()


async def ahead(rig: Rig, *, skip: tuple[int, ...] = ()) -> list[tuple[int, str, int]]:
    """What is read of bitmap 1: disks, bitmaps, bytes."""
    sources = Sources()
    rig.attachment._transport = cast(Transport, sources)
    async with rig.attachment.read_ahead(identity(1), skip=skip) as batches:
        disks = [batch.extents[0].disk async for batch in batches]
    assert disks == [index for index, _, _ in sources.read]
    return sources.read


async def test_a_rotation_loses_no_write_while_the_guest_runs(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.before["transaction"] = lambda: qemu.write("a-node", 0, 1)
        qemu.after["transaction"] = lambda: qemu.write("a-node", BLOCK, 1)
        await rig.attachment.rotate(identity(1), identity(2))
        bitmaps = qemu.nodes["a-node"].bitmaps
        assert bitmaps[identity(1).name].dirty == {0}
        assert bitmaps[identity(2).name].dirty == {1}
        assert "stop" not in qemu.commands()
        expected = (epoch.Tracked(identity(1), recording=False), epoch.Tracked(identity(2), recording=True))
        assert await rig.attachment.bitmaps() == dict.fromkeys(map(DiskName, "ab"), expected)
        rig.see_harmless({0, 1})


async def test_a_rotation_without_the_bitmap_that_it_ends_begins_none(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        del qemu.nodes["b-node"].bitmaps[identity(1).name]
        with pytest.raises(CommandFailed):
            await rig.attachment.rotate(identity(1), identity(2))
        assert (await rig.attachment.bitmaps())[DiskName("a")] == (epoch.Tracked(identity(1), recording=True),)
        rig.see_harmless({0})


async def test_what_a_finished_bitmap_holds_is_read_disk_after_disk(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        for number, node in enumerate(("a-node", "b-node"), 1):
            qemu.write(node, 0, number * BLOCK)
        await rig.attachment.rotate(identity(1), identity(2))
        name = identity(1).name
        assert await ahead(rig) == [(0, name, BLOCK), (1, name, 2 * BLOCK)]
        assert await ahead(rig, skip=(0,)) == [(1, name, 2 * BLOCK)]
        assert await ahead(rig, skip=(0, 1)) == []


async def test_a_disk_without_changes_is_not_read_ahead(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("b-node", 0, BLOCK)
        await rig.attachment.rotate(identity(1), identity(2))
        assert [index for index, _, _ in await ahead(rig)] == [1]


async def test_a_bitmap_lost_before_it_is_read_ahead_is_not_an_empty_one(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("b-node", 0, BLOCK)
        await rig.attachment.rotate(identity(1), identity(2))
        del qemu.nodes["b-node"].bitmaps[identity(1).name]
        with pytest.raises(GraphChanged, match="disk b has lost its dirty bitmap"):
            await ahead(rig)
        # A disk that is compared needs none.
        assert await ahead(rig, skip=(1,)) == []


async def test_a_merge_names_the_new_bitmap_by_what_is_there_at_that_moment(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        await rig.attachment.rotate(identity(1), identity(2))
        del qemu.nodes["b-node"].bitmaps[identity(1).name]
        seen: list[Mapping[DiskName, tuple[epoch.Tracked, ...]]] = []

        def into(found: Mapping[DiskName, tuple[epoch.Tracked, ...]]) -> BitmapIdentity:
            seen.append(found)
            return identity(3)

        before = await rig.attachment.bitmaps()
        await rig.attachment.merge_back([identity(1), identity(2)], into)
        assert seen == [before]
        assert [len(found) for found in seen[0].values()] == [2, 1]
        assert set((await rig.attachment.bitmaps()).values()) == {(epoch.Tracked(identity(3), recording=True),)}


async def test_both_bitmaps_of_an_epoch_are_removed_together(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        await rig.attachment.rotate(identity(1), identity(2))
        await rig.attachment.rotate(identity(2), identity(3))
        await rig.attachment.remove_bitmaps(identity(1), identity(2))
        assert qemu.commands()[-1] == "transaction"
        left = {(epoch.Tracked(identity(3), recording=True),)}
        assert set((await rig.attachment.bitmaps()).values()) == left
        await rig.attachment.remove_bitmaps(identity(2), identity(1))
        assert set((await rig.attachment.bitmaps()).values()) == left
