"""The secondary's store: superblock, journal and targets of one pair, behind one set of blocking calls.

It knows in which order the three must be written so that each instant, seen from behind a crash, is a state that
DESIGN.md section 4 allows.  What may be done at all is :mod:`qemu_remus.core.secondary_machine`'s decision.

Two threads may be in it at a time: one that takes epochs in, and one that applies (:meth:`Store.apply_some`).
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final, Self

from qemu_remus.core.errors import ConfigError, InternalError, StorageError, TargetUnsuitable
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import Base, DiskName, DiskSpec, EpochNumber, Generation, InstanceId, Role
from qemu_remus.core.secondary_machine import Failover, Phase, SecondaryState
from qemu_remus.core.settings import SecondaryConfig
from qemu_remus.storage.apply import apply_epochs
from qemu_remus.storage.files import OsFiles
from qemu_remus.storage.journal import Journal, remove_other_journals
from qemu_remus.storage.lock import lock_store
from qemu_remus.storage.memory import check_owner
from qemu_remus.storage.recovery import Recovery
from qemu_remus.storage.superblock import (
    JOURNAL_NAME,
    PastGeneration,
    StoredDisk,
    StoredDiskState,
    Superblock,
    SyncAttempt,
    read_superblock,
    write_superblock,
)
from qemu_remus.storage.superblock import Failover as StoredFailover
from qemu_remus.storage.targets import Target, prepare_target, reopen_target

APPLY_AT_ONCE: Final = 16
"""Most committed epochs that one call of :meth:`Store.apply_some` takes."""


class Store:
    """Use :meth:`open`, then :meth:`close`. All calls block."""

    def __init__(self, config: SecondaryConfig, cleanup: ExitStack, superblock: Superblock) -> None:
        self._config = config
        self._cleanup = cleanup
        self._files = OsFiles()
        self._superblock = superblock
        self._writing = threading.Lock()
        self._applying = threading.Lock()
        self._journal: Journal | None = None
        self._targets: list[Target] = []
        self._applied: Base = superblock.applied
        self._in_doubt = False
        self.failing_over = superblock.failover is not None
        self.recovered = SecondaryState(superblock.pair, superblock.instance, self._specs())

    @classmethod
    def open(cls, config: SecondaryConfig) -> Self:
        """Lock the store, made where it is missing, recover what is in it, and open the targets.

        :raise ConfigError: it belongs to another pair, or its disks are others than the ones given.
        :raise StoreLocked: another process uses it.
        :raise StorageError: it, or a target, is damaged or cannot be used.
        """
        with ExitStack() as cleanup:
            cleanup.enter_context(lock_store(config.store))
            superblock = read_superblock(OsFiles(), config.store)
            if superblock is None:
                superblock = Superblock(config.pair, Role.SECONDARY, InstanceId(uuid.uuid4()))
            check_owner(config.store, superblock, config.pair, Role.SECONDARY)
            superblock = _with_disks(superblock, config.disks)
            store = cls(config, cleanup.pop_all(), superblock)
        try:
            store._write_superblock(superblock)
            store._recover()
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Save how far the images are, and let go of everything. Never raises for what a restart can find out."""
        with self._applying:
            if self._journal is not None:
                if not self._journal.poisoned:
                    # Not saved, the same epochs are applied once more after a restart.
                    with suppress(StorageError):
                        self._save_applied(trim=False)
                self._journal.close()
                self._journal = None
            self._release_targets()
        self._cleanup.close()

    def _recover(self) -> None:
        block = self._superblock
        recovery: Recovery | None = None
        finished = block.failover is not None and block.failover.finished
        if block.generation is not None and not finished:
            self._journal, recovery = Journal.open(
                self._files,
                self._config.store / JOURNAL_NAME,
                block.pair,
                block.generation,
                floor=block.committed,
                applied=block.applied,
                limit=self._config.journal_limit_bytes,
            )
            self._reopen([(Path(disk.path), disk.size) for disk in block.disks])
        committed = recovery.committed if recovery is not None else block.committed
        failover = block.failover
        self.recovered = replace(
            self.recovered,
            phase=_phase(failover),
            generation=block.generation,
            history=tuple((past.generation, past.ended_at) for past in block.history if past.ended_at is not None),
            committed=committed,
            applied=block.applied,
            staged=recovery.in_doubt if recovery is not None else None,
            doubted=recovery.staged[:-1] if recovery is not None else (),
            highest=max(block.highest_epoch, recovery.highest_epoch if recovery is not None else 0),
            # A journal is as old as its generation, and so is the sync that its first commit completed.
            consistent=committed is not None,
            failover=None if failover is None else Failover(failover.target, failover.new_generation, finished),
            behind=True,
        )

    def _reopen(self, targets: list[tuple[Path, int]]) -> None:
        for path, size in targets:
            self._targets.append(reopen_target(path, size, sparse=self._config.sparse))

    def _specs(self) -> tuple[DiskSpec, ...]:
        return tuple(DiskSpec(disk.name, disk.size) for disk in self._superblock.disks)

    # --- what it holds -----------------------------------------------------------------------------------------------

    @property
    def backlog(self) -> tuple[EpochNumber, ...]:
        """Committed epochs that are not in the images yet."""
        return () if self._journal is None else self._journal.unapplied

    @property
    def backlog_bytes(self) -> int:
        """Their data."""
        return 0 if self._journal is None else self._journal.backlog_bytes

    @property
    def poisoned(self) -> bool:
        """Nothing can be taken in before the store is opened again."""
        return self._in_doubt or (self._journal is not None and self._journal.poisoned)

    # --- a full sync -------------------------------------------------------------------------------------------------

    def prepare_targets(self, state: SecondaryState) -> tuple[bool, ...]:
        """Make the store inconsistent, durably, for a full sync of a new generation.

        :return: for each disk: its target was created, empty, just now.
        :raise TargetUnsuitable: a target cannot be used; nothing was changed.
        :raise StorageError: the store holds what it held, or is inconsistent.
        """
        assert state.generation is not None
        with self._applying:
            targets = self._open_targets(state.disks)
            disks = tuple(
                StoredDisk(disk.name, disk.size, str(self._config.disks[disk.name]), target.created)
                for disk, target in zip(state.disks, targets, strict=True)
            )
            fresh = tuple(target.created for target in targets)
            self._begin_generation(state, disks, SyncAttempt(fresh))
            self._targets = targets
        return fresh

    def _open_targets(self, disks: tuple[DiskSpec, ...]) -> list[Target]:
        """The targets for disks of these sizes; those that a former attempt made or filled are ours already."""
        ours = {disk.name: disk for disk in self._superblock.disks if disk.size}
        # One process may not lock a file twice, so what is open is closed, and opened again if this comes to nothing.
        before = [(target.path, target.size) for target in self._targets]
        self._release_targets()
        with ExitStack() as undo:
            undo.callback(self._reopen, before)
            targets = []
            for disk in disks:
                path = self._config.disks.get(disk.name)
                if path is None:
                    raise TargetUnsuitable(
                        f"the secondary has no target for the disk {disk.name}",
                        safe="nothing was changed",
                        hint=f"start it with --disk {disk.name}=PATH as well",
                    )
                known = ours.get(disk.name)
                if known is not None and known.size == disk.size and path.exists():
                    target = reopen_target(path, disk.size, sparse=self._config.sparse)
                else:
                    target = prepare_target(
                        path, disk.size, overwrite=self._config.overwrite, sparse=self._config.sparse
                    )
                undo.callback(target.close)
                targets.append(target)
            undo.pop_all()
        return targets

    def _begin_generation(self, state: SecondaryState, disks: tuple[StoredDisk, ...], sync: SyncAttempt) -> None:
        assert state.generation is not None
        home = self._config.store / JOURNAL_NAME
        # First the new journal, then the superblock that names it, last the end of the old one: a crash in between
        # leaves one generation whole.
        journal, _ = Journal.open(
            self._files,
            home,
            self._superblock.pair,
            state.generation,
            floor=None,
            applied=None,
            limit=self._config.journal_limit_bytes,
            create=True,
        )
        try:
            self._write_superblock(
                replace(
                    self._superblock,
                    generation=state.generation,
                    committed=None,
                    applied=None,
                    highest_epoch=0,
                    disks=disks,
                    disk_state=StoredDiskState.INCONSISTENT,
                    sync=sync,
                )
            )
        except StorageError:
            # Which of the two generations a restart finds is not known, so nothing may build on either before one.
            self._in_doubt = True
            journal.close()
            raise
        old, self._journal = self._journal, journal
        self._applied = None
        if old is not None:
            old.close()
        self._remove_journals(keep=state.generation)

    def _remove_journals(self, *, keep: Generation | None) -> None:
        """What cannot be removed is only in the way: it is of a generation that the superblock does not name."""
        with suppress(StorageError):
            remove_other_journals(self._files, self._config.store / JOURNAL_NAME, keep)

    def write_images(self, extents: tuple[Extent, ...], data: bytes | bytearray | memoryview) -> None:
        """Write a full sync's extents, durable after :meth:`flush_images`.

        :raise StorageError: an image could not be written.
        """
        self._check_within(extents)
        view, position = memoryview(data), 0
        for extent in extents:
            if extent.zero:
                self._targets[extent.disk].zero(extent.offset, extent.length)
            else:
                self._targets[extent.disk].write(extent.offset, view[position : position + extent.length])
                position += extent.length

    def flush_images(self) -> None:
        """Make the images durable."""
        for target in self._targets:
            target.flush()

    # --- epochs ------------------------------------------------------------------------------------------------------

    def _open_journal(self) -> Journal:
        if self._journal is None:
            raise InternalError("the store has no journal: no full sync was begun")
        return self._journal

    def begin_epoch(self, epoch: EpochNumber, base: Base) -> None:
        """As :meth:`Journal.begin_epoch`."""
        self._open_journal().begin_epoch(epoch, base)

    def append(self, epoch: EpochNumber, extents: tuple[Extent, ...], data: bytes | bytearray | memoryview) -> None:
        """As :meth:`Journal.append`.

        :raise TargetUnsuitable: an extent lies outside its disk.
        """
        self._check_within(extents)
        self._open_journal().append(epoch, extents, data)

    def _check_within(self, extents: tuple[Extent, ...]) -> None:
        for extent in extents:
            if extent.disk >= len(self._targets) or extent.end > self._targets[extent.disk].size:
                raise TargetUnsuitable(
                    f"the primary sent bytes {extent.offset} to {extent.end} of disk {extent.disk}, which has no such",
                    safe="the epoch is refused, nothing of it is used",
                    hint="if the disk was resized on the primary, restart both controllers",
                )

    def stage(self, epoch: EpochNumber) -> None:
        """As :meth:`Journal.stage`."""
        self._open_journal().stage(epoch)

    def stage_and_commit(self, epoch: EpochNumber) -> None:
        """As :meth:`Journal.stage_and_commit`."""
        self._open_journal().stage_and_commit(epoch)

    def commit(self, epoch: EpochNumber) -> None:
        """As :meth:`Journal.commit`."""
        self._open_journal().commit(epoch)

    def abort(self, epoch: EpochNumber) -> None:
        """As :meth:`Journal.abort`."""
        self._open_journal().abort(epoch)

    def drop_unfinished(self) -> None:
        """As :meth:`Journal.drop_unfinished`."""
        if self._journal is not None:
            self._journal.drop_unfinished()

    # --- applying ----------------------------------------------------------------------------------------------------

    def apply_some(self) -> EpochNumber | None:
        """Bring some committed epochs into the images and flush them.

        :return: the last of them; None where there is nothing to do.
        :raise StorageError: an image cannot be written; the journal keeps everything.
        """
        with self._applying:
            if self.failing_over:
                return None
            return self._apply(APPLY_AT_ONCE)

    def _apply(self, most: int) -> EpochNumber | None:
        journal = self._journal
        # What is applied is trimmed only now and then, so the journal names it still.
        waiting = [epoch for epoch in self.backlog if self._applied is None or epoch > self._applied][:most]
        if journal is None or not waiting:
            return None
        for target in self._targets:
            # After a failure everything since the last good flush is written again: redo begins right behind it.
            target.reset_after_failure()
        apply_epochs(journal, waiting, self._targets)
        self._applied = waiting[-1]
        self._save_applied(trim=True)
        return self._applied

    def _save_applied(self, *, trim: bool) -> None:
        """Make durable how far the images are; only then may the journal forget."""
        journal = self._open_journal()
        with self._writing:
            changed = replace(
                self._superblock,
                committed=journal.committed,
                applied=self._applied,
                highest_epoch=max(self._superblock.highest_epoch, journal.highest_epoch),
                disk_state=self._stored_state(journal.committed),
                sync=None if journal.committed is not None else self._superblock.sync,
            )
            if changed != self._superblock:
                write_superblock(self._files, self._config.store, changed)
                self._superblock = changed
        if trim and self._applied is not None:
            journal.trim(self._applied)

    @staticmethod
    def _stored_state(committed: Base) -> StoredDiskState:
        return StoredDiskState.INCONSISTENT if committed is None else StoredDiskState.CONSISTENT

    # --- failover ----------------------------------------------------------------------------------------------------

    def save_failover(self, state: SecondaryState) -> None:
        """Make durable that this store fails over, and to what."""
        assert state.failover is not None
        failover = StoredFailover(state.failover.target, state.failover.generation)
        self.failing_over = True
        self._write_superblock(replace(self._superblock, failover=failover))

    def finish_failover(self, state: SecondaryState) -> None:
        """Apply all that is committed, flush, say so durably, and release the targets.

        :raise StorageError: it did not come to its end; it can be repeated.
        """
        failover = state.failover
        assert failover is not None
        assert state.generation is not None
        with self._applying:
            while self._apply(APPLY_AT_ONCE) is not None:
                pass
            self.flush_images()
            self._write_superblock(
                replace(
                    self._superblock,
                    generation=failover.generation,
                    history=(*self._superblock.history, PastGeneration(state.generation, failover.target)),
                    committed=failover.target,
                    applied=failover.target,
                    disk_state=StoredDiskState.CONSISTENT,
                    failover=StoredFailover(failover.target, failover.generation, finished=True),
                )
            )
            self._release_targets()
            journal, self._journal = self._journal, None
            if journal is not None:
                journal.close()
            self._remove_journals(keep=None)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _write_superblock(self, superblock: Superblock) -> None:
        with self._writing:
            write_superblock(self._files, self._config.store, superblock)
            self._superblock = superblock

    def _release_targets(self) -> None:
        for target in self._targets:
            target.close()
        self._targets = []


def _phase(failover: StoredFailover | None) -> Phase:
    if failover is None:
        return Phase.LISTENING
    return Phase.FAILED_OVER if failover.finished else Phase.FAILING_OVER


def _with_disks(superblock: Superblock, disks: Mapping[DiskName, Path]) -> Superblock:
    """The superblock, with the disks as given where nothing was copied to them yet.

    :raise ConfigError: the store keeps copies of other disks, or elsewhere.
    """
    known = {disk.name: disk.path for disk in superblock.disks}
    given = {name: str(path) for name, path in disks.items()}
    if superblock.generation is None:
        return replace(superblock, disks=tuple(StoredDisk(name, 0, path) for name, path in given.items()))
    if known != given:
        listed = " ".join(f"--disk {name}={path}" for name, path in known.items())
        raise ConfigError(
            "the store keeps copies of other disks than the ones given, or keeps them elsewhere",
            safe="nothing was changed",
            hint=f"start it with {listed}, or use an empty store",
        )
    return superblock
