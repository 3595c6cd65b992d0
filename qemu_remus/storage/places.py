"""The disks' places on the secondary: which target each of them has, and what size, at which checkpoint.

A disk keeps its index in the superblock for as long as the generation lasts, and the journal's extents name it by that;
the link names it by its place in the primary's hello.  A file is made larger only after the superblock says how large
it may be found, and is cut to the checkpoint's size only when it is handed over.  Blocking calls.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from qemu_remus.core.errors import ConfigError, StorageError, TargetUnsuitable
from qemu_remus.core.model import Base, DiskName, DiskSpec, EpochNumber
from qemu_remus.core.settings import SecondaryConfig
from qemu_remus.core.target_spec import TargetSpec, known_target, raw_target
from qemu_remus.storage.any_target import OpenTarget, is_there, prepare_any, reopen_any
from qemu_remus.storage.daemon_target import Lost
from qemu_remus.storage.format import DiskTable
from qemu_remus.storage.journal import Journal
from qemu_remus.storage.superblock import StoredDisk, Superblock

_SUFFIX: Final = ".img"


def spec_for(config: SecondaryConfig, name: DiskName) -> TargetSpec | None:
    """Where the copy of a disk goes; None where there is no place for it."""
    spec = config.disks.get(name)
    if spec is None and config.disk_dir is not None:
        spec = raw_target(config.disk_dir / f"{name}{_SUFFIX}")
    return spec


def with_places(superblock: Superblock, config: SecondaryConfig) -> Superblock:
    """The superblock, with the places as they were given where nothing was copied to them yet.

    :raise ConfigError: the store keeps copies elsewhere, or one of a disk that was not given.
    """
    given = {name: str(spec) for name, spec in config.disks.items()}
    if superblock.generation is None and not superblock.discarded:
        return replace(superblock, disks=tuple(StoredDisk(name, 0, path) for name, path in given.items()))
    for disk in superblock.disks:
        found = given.get(disk.name)
        left_out = found is None and (disk.gone is not None or not disk.size or _in_directory(disk, config))
        if found != disk.path and not left_out:
            listed = " ".join(f"--disk {known.name}={known.path}" for known in superblock.disks)
            raise ConfigError(
                "the store keeps copies of other disks than the ones given, or keeps them elsewhere",
                safe="nothing was changed",
                hint=f"start it with {listed} (and more, if you like), or use an empty store",
            )
    return superblock


def _in_directory(disk: StoredDisk, config: SecondaryConfig) -> bool:
    return config.disk_dir is not None and Path(disk.path).parent == config.disk_dir


def table_of(disks: Sequence[StoredDisk]) -> DiskTable:
    """The disks at the applied checkpoint."""
    return tuple((index, disk.size) for index, disk in enumerate(disks) if disk.size and disk.gone is None)


def with_table(disks: Sequence[StoredDisk], table: DiskTable, epoch: EpochNumber) -> tuple[StoredDisk, ...]:
    """The superblock's disks once this epoch is applied.

    :param table: the disks at its checkpoint.
    """
    sizes = dict(table)
    before = dict(table_of(disks))
    return tuple(
        replace(disk, size=sizes[index], room=max(disk.room, sizes[index]), gone=None)
        if index in sizes
        else replace(disk, gone=epoch)
        if index in before
        else disk
        for index, disk in enumerate(disks)
    )


def table_at(superblock: Superblock, journal: Journal | None, epoch: Base = None) -> DiskTable:
    """The disks at a checkpoint that the journal holds; at the last committed one by default."""
    if journal is None:
        return table_of(superblock.disks)
    staged, committed, said = journal.staged, journal.committed or 0, journal.disks_of()
    if epoch is not None and epoch in said:
        return said[epoch]
    counting = [table for number, table in said.items() if number not in staged and number <= committed]
    # What is trimmed away was written to the superblock before.
    return counting[-1] if counting else table_of(superblock.disks)


def specs_at(superblock: Superblock, journal: Journal | None, epoch: Base = None) -> tuple[DiskSpec, ...]:
    """:func:`table_at` with the disks' names; before there is a table, the disks that have a place."""
    disks = superblock.disks
    if superblock.generation is None:
        return tuple(DiskSpec(disk.name, 0) for disk in disks)
    return tuple(DiskSpec(disks[index].name, size) for index, size in table_at(superblock, journal, epoch))


def sizes_held(superblock: Superblock, journal: Journal) -> dict[int, int]:
    """Every disk with contents that are needed still, by its index, and a size that it has at some checkpoint."""
    held = dict(table_of(superblock.disks))
    for table in journal.disks_of().values():
        held |= dict(table)
    return held


def with_free_places(superblock: Superblock, config: SecondaryConfig) -> tuple[StoredDisk, ...]:
    """The superblock's disks, and those that were named and never came."""
    names = {disk.name for disk in superblock.disks}
    further = (StoredDisk(name, 0, str(spec)) for name, spec in config.disks.items() if name not in names)
    return (*superblock.disks, *further)


class Places:
    """The open targets, by the disk's index in the superblock.

    :param on_lost: hears of a target's daemon that ends by itself, in another thread.
    """

    def __init__(self, config: SecondaryConfig, on_lost: Lost) -> None:
        self._config = config
        self._on_lost = on_lost
        self.targets: dict[int, OpenTarget] = {}

    def by_index(self, disks: int) -> list[OpenTarget | None]:
        """The targets of so many disks."""
        return [self.targets.get(index) for index in range(disks)]

    def reopen(self, disks: Sequence[StoredDisk], indices: Iterable[int]) -> None:
        """Open the targets of disks that have them.

        :raise StorageError: one cannot be used; see :func:`reopen_target`.
        """
        for index in indices:
            if index not in self.targets:
                self.targets[index] = self._reopened(disks[index])

    def _reopened(self, disk: StoredDisk) -> OpenTarget:
        # What a disk left behind that was taken out may be of any length up to what it was given since.
        size = disk.size if disk.gone is None else 0
        room = max(disk.room, disk.size)
        spec = self._spec(disk.name, disk)
        return reopen_any(spec, size, room=room, sparse=self._config.sparse, on_lost=self._on_lost)

    def release(self) -> None:
        """Close all targets."""
        self.forget(tuple(self.targets))

    def forget(self, indices: Iterable[int]) -> None:
        """Close these targets, where they are open."""
        for index in indices:
            target = self.targets.pop(index, None)
            if target is not None:
                target.close()

    def let_go(self, disks: Sequence[StoredDisk], coming: Collection[int]) -> None:
        """Leave alone the targets of disks that are gone, at the size that they had.

        :param coming: those that are coming back.
        """
        for index, disk in enumerate(disks):
            if disk.gone is not None and index in self.targets and index not in coming:
                with suppress(StorageError):
                    self.finish(((index, disk.size),))
                self.forget((index,))

    # --- a full copy -------------------------------------------------------------------------------------------------

    def open_all(self, wanted: Sequence[DiskSpec], known: Sequence[StoredDisk], *, given_up: bool) -> list[OpenTarget]:
        """The targets for a full copy of these disks; those that a former attempt made or filled are ours already.

        :param given_up: what is on the known ones may go.
        :return: in their order; :meth:`take` them, once the superblock names them.
        :raise StorageError: one cannot be used; the targets that were open are so again.
        """
        ours = {disk.name: disk for disk in known}
        # One process may not lock a file twice, so what is open is closed, and opened again if this comes to nothing.
        before = tuple(self.targets)
        self.release()
        with ExitStack() as undo:
            undo.callback(self.reopen, known, before)
            targets: list[OpenTarget] = []
            for disk in wanted:
                target = self._opened(disk, ours.get(disk.name), given_up=given_up)
                undo.callback(target.close)
                targets.append(target)
            undo.pop_all()
        return targets

    def filled(
        self, wanted: Sequence[DiskSpec], targets: Sequence[OpenTarget], known: Sequence[StoredDisk]
    ) -> tuple[StoredDisk, ...]:
        """What the superblock says of disks that are copied to these targets."""
        ours = {disk.name: disk for disk in known}
        return tuple(
            StoredDisk(disk.name, disk.size, str(self._spec(disk.name, ours.get(disk.name))), target.created)
            for disk, target in zip(wanted, targets, strict=True)
        )

    def take(self, targets: Sequence[OpenTarget]) -> None:
        """Have these, and no others."""
        self.targets = dict(enumerate(targets))

    def _opened(self, disk: DiskSpec, known: StoredDisk | None, *, given_up: bool) -> OpenTarget:
        spec = self._spec(disk.name, known)
        # What is larger than the disk is not cut before the superblock says that it counts no more.
        usable = known is not None and 0 < known.size <= disk.size and is_there(spec)
        if known is None or not usable or (given_up and known.size != disk.size):
            overwrite = self._config.overwrite or (known is not None and given_up)
            return self._prepared(spec, disk.size, overwrite=overwrite)
        target = self._reopened(known)
        try:
            if target.size != disk.size:
                target.resize(disk.size)
        except BaseException:
            target.close()
            raise
        return target

    def _prepared(self, spec: TargetSpec, size: int, *, overwrite: bool) -> OpenTarget:
        return prepare_any(spec, size, overwrite=overwrite, sparse=self._config.sparse, on_lost=self._on_lost)

    def _spec(self, name: DiskName, known: StoredDisk | None) -> TargetSpec:
        spec = spec_for(self._config, name)
        if known is not None and (spec is None or str(spec) != known.path):
            # Of a disk that need not be given any more.
            spec = known_target(name, known.path)
        if spec is None:
            raise TargetUnsuitable(
                f"the secondary has no target for the disk {name}",
                safe="nothing was changed",
                hint=f"start it with --disk {name}=PATH as well, or with --disk-dir",
            )
        return spec

    @staticmethod
    def with_room(disks: Sequence[StoredDisk], wanted: Sequence[DiskSpec]) -> tuple[StoredDisk, ...]:
        """What the superblock has to say before :meth:`open_all` makes targets larger that are ours already."""
        sizes = {disk.name: disk.size for disk in wanted}
        return tuple(
            replace(disk, room=sizes.get(disk.name, 0))
            if 0 < max(disk.size, disk.room) < sizes.get(disk.name, 0) and disk.size
            else disk
            for disk in disks
        )

    # --- disks that change -------------------------------------------------------------------------------------------

    def planned(self, disks: Sequence[StoredDisk], wanted: Sequence[DiskSpec]) -> tuple[StoredDisk, ...]:
        """What the superblock has to say before :meth:`arrange` gives these disks the room that they want.

        A disk that is new gets the next index; its file is made by this, since nothing is known of it before. Should
        the superblock not be written, :meth:`forget` its target.

        :raise StorageError: a new disk's target cannot be used; nothing was changed.
        """
        after = list(disks)
        places = {disk.name: index for index, disk in enumerate(disks)}
        for spec in wanted:
            index = places.get(spec.name)
            if index is None:
                place = self._spec(spec.name, None)
                target = self._prepared(place, spec.size, overwrite=self._config.overwrite)
                self.targets[len(after)] = target
                after.append(StoredDisk(spec.name, 0, str(place), target.created, room=spec.size))
                continue
            known = after[index]
            if known.gone is not None:
                # Its old contents are no checkpoint's: they are written over, and may be cut.
                after[index] = replace(
                    known, size=min(known.size, spec.size), room=max(known.room, known.size, spec.size)
                )
            elif spec.size > max(known.room, known.size):
                after[index] = replace(known, room=spec.size)
        return tuple(after)

    def arranged(self, disks: Sequence[StoredDisk], wanted: Sequence[DiskSpec]) -> tuple[tuple[int, int], ...] | None:
        """What :meth:`arrange` would return where it, and :meth:`planned`, have nothing to do; else None."""
        link = []
        places = {disk.name: index for index, disk in enumerate(disks) if disk.gone is None}
        for spec in wanted:
            index = places.get(spec.name)
            target = None if index is None else self.targets.get(index)
            if index is None or target is None or target.size != spec.size:
                return None
            if spec.size > max(disks[index].room, disks[index].size):
                return None
            link.append((index, spec.size))
        return tuple(link)

    def arrange(
        self, disks: Sequence[StoredDisk], wanted: Sequence[DiskSpec], held: Collection[int]
    ) -> tuple[tuple[int, int], ...]:
        """Give targets the sizes that an epoch that comes wants.

        :param disks: as the superblock says, durably.
        :param held: indices of the disks with contents that are needed still.
        :return: index and size of each.
        :raise StorageError: one cannot have it; what it holds it still holds.
        """
        index_of = {disk.name: index for index, disk in enumerate(disks)}
        link = tuple((index_of[disk.name], disk.size) for disk in wanted)
        self.reopen(disks, (index for index, _ in link))
        for index, size in link:
            target = self.targets[index]
            if target.size < size or (target.size > size and index not in held):
                target.resize(size)
        return link

    def finish(self, table: DiskTable) -> None:
        """Give every target exactly the size that its disk has at the checkpoint, durably.

        :raise StorageError: one cannot have it.
        """
        for index, size in table:
            if self.targets[index].size != size:
                self.targets[index].resize(size)


__all__ = [
    "Places",
    "spec_for",
    "sizes_held",
    "specs_at",
    "table_at",
    "table_of",
    "with_free_places",
    "with_places",
    "with_table",
]
