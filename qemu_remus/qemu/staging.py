"""What a push needs of one disk on our side: the file that the job fills, the file that carries bitmaps, and what is in
them.

Blocking calls: the caller runs them in a thread. What is sent to QEMU is decided in :mod:`qemu_remus.qemu.push`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from qemu_remus.core.errors import StorageError
from qemu_remus.core.model import BitmapName, NodeName, PairName
from qemu_remus.nbd.batches import Assembly, Batch, Run, cut_batches
from qemu_remus.qemu import bitmap_file
from qemu_remus.qemu.bitmap_file import StoredBitmap
from qemu_remus.qemu.client import PeerCredentials
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.epoch import CLUSTER, granularity_for
from qemu_remus.qemu.fleece import FleeceFile
from qemu_remus.qemu.nodes import map_file_node, map_node, staging_node

MAP: Final = BitmapName("map")
"""Name of the one bitmap in a map file."""

_SECTOR: Final = 512

_LONG_RUN: Final = 1 << 20
"""Bytes from which on it is worth looking for holes."""


@dataclass(frozen=True, slots=True)
class Staging:
    """One disk's two files, and their nodes' names.

    :param data: as long as the disk; the job writes it, cluster by cluster, at the disk's offsets.
    :param bitmaps: the file of :mod:`qemu_remus.qemu.bitmap_file`; its length never changes, as QEMU would not see it.
    """

    disk: VmDisk
    data: FleeceFile
    bitmaps: FleeceFile
    data_node: NodeName
    bitmaps_node: NodeName
    map_node: NodeName

    @classmethod
    def make(cls, directory: Path, pair: PairName, disk: VmDisk, owner: PeerCredentials) -> Self:
        """Create the files; see :meth:`FleeceFile.make`."""
        data = FleeceFile.make(directory, pair, disk.name, disk.size, owner, use="staging", unit=_SECTOR)
        try:
            length = bitmap_file.file_size(disk.size, granularity_for(disk.size))
            bitmaps = FleeceFile.make(directory, pair, disk.name, length, owner, use="bitmaps")
        except BaseException:
            data.close()
            raise
        return cls(
            disk,
            data,
            bitmaps,
            staging_node(pair, disk.name),
            map_file_node(pair, disk.name),
            map_node(pair, disk.name),
        )

    def close(self) -> None:
        """Close both."""
        self.data.close()
        self.bitmaps.close()

    def empty(self) -> None:
        """Give the space of both back."""
        for file in (self.data, self.bitmaps):
            if file.allocated():
                file.empty()

    def expect_bitmap(self) -> None:
        """Have the map file ready for QEMU to store a bitmap in it."""
        self.bitmaps.write(bitmap_file.empty_image(self.disk.size))

    def stored_bitmap(self, granularity: int) -> StoredBitmap:
        """What QEMU has stored.

        :param granularity: the bitmap's, in bytes.
        :raise EpochLost: when it has not.
        """
        return bitmap_file.read_bitmap(self.bitmaps.read, self.disk.size, MAP, granularity)

    def offer_bitmap(self, runs: Iterable[Run]) -> None:
        """Put a bitmap, of whole clusters, into the map file for QEMU to load."""
        ranges = ((run.offset, run.length) for run in runs)
        self.bitmaps.write(bitmap_file.image_with(self.disk.size, MAP, CLUSTER, ranges))

    def batches(self, runs: Sequence[Run]) -> Iterator[list[Run]]:
        """The runs of one batch each, of what the job has copied; long holes are zeroes."""
        return cut_batches(piece for run in runs for piece in self._without_holes(run))

    def _without_holes(self, run: Run) -> Iterator[Run]:
        # Every cluster of the run has been copied: a hole is one of zeroes.
        if run.length < _LONG_RUN:
            yield run
            return
        offset = run.offset
        while offset < run.end:
            start, end = (min(place, run.end) for place in self.data.data_from(offset))
            if end <= offset:
                raise StorageError(f"the staging file of disk {self.disk.name} has become shorter")
            if start > offset:
                yield Run(offset, start - offset, zero=True)
            if end > start:
                yield Run(start, end - start)
            offset = end

    def read(self, index: int, runs: list[Run]) -> Batch:
        """One batch.

        :param index: the disk's.
        :raise StorageError: when it cannot be read.
        """
        assembly = Assembly(runs)
        position = 0
        for run in runs:
            if run.zero:
                continue
            data = self.data.read(run.length, run.offset)
            if len(data) != run.length:
                raise StorageError(f"the staging file of disk {self.disk.name} has become shorter")
            assembly.fill(position, run.length, data)
            position += run.length
        return assembly.finish(index)


def runs_of(bitmap: StoredBitmap) -> Iterator[Run]:
    """What a bitmap marks, as the readers have it."""
    return (Run(offset, length) for offset, length in bitmap.ranges())


def clusters_bytes(runs: Iterable[Run]) -> int:
    """Bytes of all clusters that runs touch; the runs ascend."""
    total, done = 0, 0
    for run in runs:
        start, end = max(run.offset // CLUSTER, done), -(-run.end // CLUSTER)
        total += max(0, end - start)
        done = max(done, end)
    return total * CLUSTER


class Slices:
    """Ascending runs, cut into parts that one job each can copy. No cluster is in two of them."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs = iter(runs)
        self._next = next(self._runs, None)

    @property
    def exhausted(self) -> bool:
        """Nothing is left."""
        return self._next is None

    def take(self, budget: int) -> list[Run]:
        """The next part; empty at the end.

        :param budget: bytes of clusters that it may touch; one cluster in any case.
        """
        left = max(budget // CLUSTER, 1)
        done = 0
        part: list[Run] = []
        while self._next is not None:
            run = self._next
            start, end = max(run.offset // CLUSTER, done), -(-run.end // CLUSTER)
            if end - start > left:
                border = (start + left) * CLUSTER
                if border > run.offset:
                    part.append(Run(run.offset, border - run.offset))
                    self._next = Run(border, run.end - border)
                break
            part.append(run)
            left -= max(end - start, 0)
            done = max(done, end)
            self._next = next(self._runs, None)
        return part
