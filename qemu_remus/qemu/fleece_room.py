"""Whether the fleeces can hold what the guest may overwrite while a checkpoint is being read.

Owned here: the estimate, cheap where there is plenty of room, and exact, counted by QEMU, where there is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import trio

from qemu_remus.core.errors import FleeceTooSmall
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.client import Done, Outcome, QmpClient
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.epoch import BitmapLook
from qemu_remus.qemu.nodes import BitmapIdentity, scratch_bitmap

_KEPT: Final = "the VM runs and its changes stay recorded"


class FleeceRoom:
    """The room of one VM's fleeces.

    :param free_space: bytes that the fleeces in files may still take; blocks, is called in a thread.
    :param memory: the same of those in memory; None: there are none.
    :ivar in_memory: where the present epoch's fleeces are, as :meth:`choose` has found.
    """

    def __init__(
        self,
        client: QmpClient,
        disks: Sequence[VmDisk],
        free_space: Callable[[], int],
        memory: Callable[[], int] | None = None,
    ) -> None:
        self._client = client
        self._disks = disks
        self._free_space = free_space
        self._memory = memory
        self._measured = 0
        self._measured_memory = 0
        self.in_memory = False

    def follow(self, disks: Sequence[VmDisk], *, in_memory: bool) -> None:
        """The VM has these disks from now on."""
        self._disks = disks
        if not in_memory:
            self._memory, self._measured_memory = None, 0

    async def measure(self) -> int:
        """See how much is free in files now; between two epochs there is time for it."""
        self._measured, self._measured_memory = await trio.to_thread.run_sync(self._measure)
        return self._measured

    def _measure(self) -> tuple[int, int]:
        return self._free_space(), 0 if self._memory is None else self._memory()

    async def choose(self, finished: BitmapIdentity, dirty: Mapping[int, BitmapLook], *, count: bool = False) -> None:
        """Before anything is put in: memory if there is plenty, a file otherwise.

        :param count: nobody waits with a paused VM: there is time to have QEMU count what is not sure to fit.
        :raise FleeceTooSmall: when neither can hold every cluster that the guest might overwrite.
        """
        if self._memory is not None and not self._measured_memory:
            await self.measure()
        # The guest may still write a little before the checkpoint, also to disks that are clean so far.
        half = self._measured_memory // 2
        needed = self._bound(dirty)
        if count and needed > half >= sum(bitmap.count for bitmap in dirty.values()):
            needed = await self._count_clusters(finished, list(dirty))
        self.in_memory = half > 0 and needed <= half
        if not self.in_memory:
            await self.check(finished, dirty)

    def _bound(self, dirty: Mapping[int, BitmapLook]) -> int:
        return sum(
            epoch.fleece_bound(self._disks[index].size, bitmap.count, bitmap.granularity)
            for index, bitmap in dirty.items()
        )

    async def check(self, finished: BitmapIdentity, dirty: Mapping[int, BitmapLook]) -> None:
        """See that the chosen fleeces can hold every cluster that the guest might overwrite.

        :raise FleeceTooSmall: when they cannot.
        """
        if not dirty:
            return
        bound = self._bound(dirty)
        if self.in_memory and bound <= self._measured_memory:
            return
        # What was free after the last epoch, if that is plenty: somebody may be waiting with a paused VM.
        if not self.in_memory and 2 * bound <= self._measured:
            return
        free = await self.measure()
        free = self._measured_memory if self.in_memory else free
        if bound <= free:
            return
        needed = await self._count_clusters(finished, list(dirty))
        if needed > free:
            raise FleeceTooSmall(
                f"the epoch may need {needed} bytes of fleece, and {free} are free",
                safe=_KEPT,
                hint="free some space in the fleece directory, or name another one (--fleece-dir)",
            )

    async def _count_clusters(self, finished: BitmapIdentity, indices: Sequence[int]) -> int:
        """Bytes in clusters that hold a dirty block, counted by QEMU."""
        name = scratch_bitmap(finished.pair, finished.epoch).name
        disks = [self._disks[index] for index in indices]
        count = commands.transaction(
            [
                action
                for disk in disks
                for action in (
                    commands.bitmap_add_action(disk.node, name, granularity=epoch.CLUSTER, disabled=True),
                    commands.bitmap_merge_action(disk.node, name, [finished.name]),
                )
            ]
        )
        remove = commands.transaction([commands.bitmap_remove_action(disk.node, name) for disk in disks])
        counted, nodes, removed = await self._client.execute_many([count, commands.query_named_block_nodes(), remove])
        _value(counted)
        _value(removed)
        bitmaps = epoch.bitmaps_by_node(_value(nodes))
        return sum(bitmaps[disk.node][name].count for disk in disks)


def _value(outcome: Outcome) -> Any:
    """The reply's value."""
    if isinstance(outcome, Done):
        return outcome.value
    raise outcome.error
