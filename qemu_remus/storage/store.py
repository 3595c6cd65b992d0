"""The secondary's store: superblock, journal and targets of one pair, behind one set of blocking calls.

It knows in which order the three must be written so that each instant, seen from behind a crash, is a state that
DESIGN.md section 4 allows.  What may be done at all is :mod:`qemu_remus.core.secondary_machine`'s decision.

Two threads may be in it at a time: one that takes epochs in, and one that applies (:meth:`Store.apply_some`).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import chain
from typing import Final, Self

from qemu_remus.core.comparison import count_blocks
from qemu_remus.core.errors import InternalError, NoSpace, StorageError, TargetUnsuitable
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import Base, DiskSpec, EpochNumber, Generation, InstanceId, Role
from qemu_remus.core.secondary_machine import SecondaryState
from qemu_remus.core.settings import SecondaryConfig
from qemu_remus.storage.any_target import revive
from qemu_remus.storage.apply import apply_epochs
from qemu_remus.storage.compare import Written, compare_blocks
from qemu_remus.storage.discard import discarded
from qemu_remus.storage.files import OsFiles
from qemu_remus.storage.journal import Journal, remove_other_journals
from qemu_remus.storage.lock import lock_store
from qemu_remus.storage.memory import check_owner
from qemu_remus.storage.places import (
    Places,
    sizes_held,
    specs_at,
    table_of,
    with_free_places,
    with_places,
    with_table,
)
from qemu_remus.storage.qemu_images import check_images
from qemu_remus.storage.recovered import recovered_state
from qemu_remus.storage.recovery import Recovery
from qemu_remus.storage.superblock import (
    JOURNAL_NAME,
    StoredDisk,
    Superblock,
    SyncAttempt,
    read_superblock,
    write_superblock,
)
from qemu_remus.storage.superblock import Failover as StoredFailover
from qemu_remus.storage.transitions import with_applied, with_failover_finished, with_generation_begun

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
        self._places = Places(config, self._lost)
        # The link's disks, in its order: their indices in the superblock, and their sizes.
        self._link: tuple[tuple[int, int], ...] = ()
        self._applied: Base = superblock.applied
        self._in_doubt = False
        self._written: dict[EpochNumber, Written] = {}
        self.failing_over = superblock.failover is not None
        self.decided = superblock.decided
        """When the last commit was, as whoever decides says; saved now and then."""
        self.on_lost: Callable[[str], None] = lambda what: None
        self.recovered = SecondaryState(superblock.pair, superblock.instance, ())

    @classmethod
    def open(cls, config: SecondaryConfig) -> Self:
        """Lock the store, made where it is missing, recover what is in it, and open the targets.

        :raise ConfigError: it belongs to another pair, its disks are others than the ones given, or this host lacks
            what they need.
        :raise StoreLocked: another process uses it.
        :raise StorageError: it, or a target, is damaged or cannot be used.
        """
        check_images(config.disks.values())
        with ExitStack() as cleanup:
            cleanup.enter_context(lock_store(config.store))
            superblock = read_superblock(OsFiles(), config.store)
            if superblock is None:
                superblock = Superblock(config.pair, Role.SECONDARY, InstanceId(uuid.uuid4()))
            if config.discard is not None and superblock.pair == config.pair:
                superblock = discarded(superblock, config.discard, config.disks)
            check_owner(config.store, superblock, config.pair, Role.SECONDARY)
            superblock = with_places(superblock, config)
            store = cls(config, cleanup.pop_all(), superblock)
        try:
            store._write_superblock(superblock)
            if superblock.generation is None:
                # Of what was given up, or of a beginning that was cut short.
                store._remove_journals(keep=None)
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
                        self._save_applied(self._applied, trim=False)
                self._journal.close()
                self._journal = None
            self._places.release()
        self._cleanup.close()

    def reopen(self) -> SecondaryState:
        """Close all but the lock, and open it again as a restart does: from what the devices really hold.

        After a write or sync that failed nothing else tells what became of it.  An image is brought up from the last
        flush that went well, since the superblock names that one.

        :return: what it holds.
        :raise StorageError: it cannot be used yet; it stays poisoned, and this may be called again.
        """
        with self._applying:
            self._in_doubt = True
            journal, self._journal = self._journal, None
            if journal is not None:
                journal.close()
            self._places.release()
            self._written = {}
            superblock = read_superblock(self._files, self._config.store)
            if superblock is None:
                raise StorageError(
                    f"the superblock in {self._config.store} is gone",
                    safe="nothing was changed",
                    hint="bring the directory's file system back as it was",
                )
            # Which of two is durable, the one that is there or an older one, is not known before it is written again.
            self._write_superblock(superblock)
            self._applied = superblock.applied
            self.failing_over = self.failing_over or superblock.failover is not None
            try:
                self._recover()
            except StorageError:
                self._places.release()
                raise
            self._in_doubt = False
            return self.recovered

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
            self._places.reopen(block.disks, sizes_held(block, self._journal))
            self._link = table_of(block.disks)
        staged = recovery.staged if recovery is not None else ()
        self.recovered = replace(
            recovered_state(self.recovered, block, recovery),
            disks=specs_at(block, self._journal),
            tables=tuple((epoch, specs_at(block, self._journal, epoch)) for epoch in staged),
            places=tuple(disk.name for disk in self.disks()),
            takes_any=self._config.disk_dir is not None,
        )

    def _lost(self, what: str) -> None:
        self.on_lost(what)

    def revive_targets(self) -> int:
        """Start again what writes a target and has ended with nothing unflushed: how many there were.

        :raise StorageError: one cannot be started.
        """
        return sum(revive(target) for target in self._places.targets.values())

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

    def disks(self) -> tuple[StoredDisk, ...]:
        """Every disk that has, had, or could have a place here."""
        return with_free_places(self._superblock, self._config)

    # --- a full sync -------------------------------------------------------------------------------------------------

    def prepare_targets(self, state: SecondaryState) -> tuple[bool, ...]:
        """Make the store inconsistent, durably, for a full sync of a new generation.

        :return: for each disk: its target was created, empty, just now.
        :raise TargetUnsuitable: a target cannot be used; nothing was changed.
        :raise StorageError: the store holds what it held, or is inconsistent.
        """
        with self._applying:
            stored = self._places.with_room(self._superblock.disks, state.disks)
            if stored != self._superblock.disks:
                self._write_superblock(replace(self._superblock, disks=stored))
            # What is on the disks of a store that was given up was given up with it.
            given_up = bool(self._superblock.discarded) and self._superblock.generation is None
            targets = self._places.open_all(state.disks, stored, given_up=given_up)
            disks = self._places.filled(state.disks, targets, stored)
            self._begin_generation(state, disks, SyncAttempt(tuple(target.created for target in targets)))
            self._places.take(targets)
            self._link = tuple((index, disk.size) for index, disk in enumerate(disks))
        return tuple(target.created for target in targets)

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
            self._write_superblock(with_generation_begun(self._superblock, state, disks, sync))
        except StorageError:
            # Which of the two generations a restart finds is not known, so nothing may build on either before one.
            self._in_doubt = True
            journal.close()
            raise
        old, self._journal = self._journal, journal
        self._applied = None
        self._written = {}
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
            target = self._places.targets[self._link[extent.disk][0]]
            if extent.zero:
                target.zero(extent.offset, extent.length)
            else:
                target.write(extent.offset, view[position : position + extent.length])
                position += extent.length

    def flush_images(self) -> None:
        """Make the images durable."""
        for target in self._places.targets.values():
            target.flush()

    def flush_sync(self, position: int) -> None:
        """Make the images durable, and then how far the full sync is: after a restart it goes on from there."""
        self.flush_images()
        sync = self._superblock.sync
        if sync is not None and position > sync.flushed:
            self._write_superblock(replace(self._superblock, sync=replace(sync, flushed=position)))

    def reopen_targets(self) -> None:
        """Forget what the kernel remembers of the images, and that one could not be written."""
        with self._applying:
            self._places.release()
            self._link = table_of(self._superblock.disks)
            self._places.reopen(self._superblock.disks, dict(self._link))

    # --- comparing ---------------------------------------------------------------------------------------------------

    @property
    def images_current(self) -> bool:
        """The images hold the last committed checkpoint, or what a full sync has brought so far."""
        return self._journal is None or self._journal.committed == self._applied

    def compare(self, disk: int, offset: int, block_size: int, digests: bytes) -> bytes:
        """Which blocks are not known to be what the digests say, as a bitmap; see :mod:`qemu_remus.core.comparison`.

        During a full sync they are compared with the images as they are, in an epoch with the committed checkpoint; see
        :attr:`images_current`.

        :raise TargetUnsuitable: the disk has no such blocks, or its image cannot be read.
        :raise StorageError: an image could not be written before, or the journal cannot be read.
        """
        self._check_within(
            (Extent(disk, offset, 1), Extent(disk, offset + (count_blocks(digests) - 1) * block_size, 1))
        )
        with self._applying:
            if not self.images_current:
                raise InternalError("images that are behind their checkpoint are to be compared")
            index, _ = self._link[disk]
            target = self._places.targets[index]
            return compare_blocks(target, index, offset, block_size, digests, self._doubted())

    def _doubted(self) -> Collection[Written]:
        """What the epochs in doubt have written; each is read from the journal once."""
        journal = self._open_journal()
        known = self._written
        self._written = {
            epoch: known[epoch] if epoch in known else Written(chain.from_iterable(journal.read_staged(epoch)))
            for epoch in journal.staged
        }
        return self._written.values()

    # --- epochs ------------------------------------------------------------------------------------------------------

    def _open_journal(self) -> Journal:
        if self._journal is None:
            raise InternalError("the store has no journal: no full sync was begun")
        return self._journal

    def begin_epoch(self, epoch: EpochNumber, base: Base, disks: tuple[DiskSpec, ...] = ()) -> None:
        """As :meth:`Journal.begin_epoch`.

        :param disks: the VM's at its checkpoint, in the order that its extents refer to; those of the last full sync or
            epoch where none are given. Their targets get the room for them.
        :raise TargetUnsuitable, WriteFailed: one of these cannot have it; nothing was begun.
        """
        if disks:
            try:
                self._arrange(disks)
            except NoSpace as error:
                # Of a full journal a primary would think that it helps to send less.
                raise TargetUnsuitable(error.what, safe=error.safe, hint=error.hint) from error
        self._open_journal().begin_epoch(epoch, base)

    def _arrange(self, disks: tuple[DiskSpec, ...]) -> None:
        # Nearly always nothing is to be done; an image that stands still, with the lock, must not hold up the journal.
        if self._places.arranged(self._superblock.disks, disks) == self._link:
            return
        with self._applying:
            known = self._superblock.disks
            planned = self._places.planned(known, disks)
            if planned != known:
                try:
                    self._write_superblock(replace(self._superblock, disks=planned))
                except StorageError:
                    self._places.forget(range(len(known), len(planned)))
                    raise
            held = sizes_held(self._superblock, self._open_journal())
            self._link = self._places.arrange(planned, disks, held)

    def set_disks(self, epoch: EpochNumber) -> None:
        """Let the epoch that was begun say which disks it is about, unless that goes without saying.

        :raise NoSpace, WriteFailed: as :meth:`append`.
        """
        journal = self._open_journal()
        table = tuple(sorted(self._link))
        # Whichever of the epochs that are there is committed before this one: it has these disks then, and no others.
        # In this order: what the journal forgets was written to the superblock before.
        before = [*journal.disks_of().values(), table_of(self._superblock.disks)]
        if any(other != table for other in before):
            journal.set_disks(epoch, table)

    def append(self, epoch: EpochNumber, extents: tuple[Extent, ...], data: bytes | bytearray | memoryview) -> None:
        """As :meth:`Journal.append`.

        :raise TargetUnsuitable: an extent lies outside its disk.
        """
        self._check_within(extents)
        if any(index != place for place, (index, _) in enumerate(self._link)):
            extents = tuple(replace(extent, disk=self._link[extent.disk][0]) for extent in extents)
        self._open_journal().append(epoch, extents, data)

    def _check_within(self, extents: tuple[Extent, ...]) -> None:
        for extent in extents:
            if extent.disk >= len(self._link) or extent.end > self._link[extent.disk][1]:
                raise TargetUnsuitable(
                    f"the primary sent bytes {extent.offset} to {extent.end} of disk {extent.disk}, which has no such",
                    safe="the epoch is refused, nothing of it is used",
                    hint="if it happens again, report it",
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
        for target in self._places.targets.values():
            # After a failure everything since the last good flush is written again: redo begins right behind it.
            target.reset_after_failure()
        apply_epochs(journal, waiting, self._places.by_index(len(self._superblock.disks)))
        disks = self._superblock.disks
        for epoch, table in journal.disks_of().items():
            if epoch in waiting:
                disks = with_table(disks, table, epoch)
        self._save_applied(waiting[-1], trim=True, disks=disks)
        self._places.let_go(disks, dict(self._link))
        return waiting[-1]

    def _save_applied(self, applied: Base, *, trim: bool, disks: tuple[StoredDisk, ...] | None = None) -> None:
        """Make durable how far the images are; only then may the journal forget.

        Where that fails, they count as no further than before, and the same is applied once more.
        """
        journal = self._open_journal()
        with self._writing:
            known = self._superblock
            disks = known.disks if disks is None else disks
            highest = journal.highest_epoch
            changed = with_applied(known, journal.committed, applied, highest, disks, self.decided)
            if changed != self._superblock:
                write_superblock(self._files, self._config.store, changed)
                self._superblock = changed
        self._applied = applied
        if trim and applied is not None:
            journal.trim(applied)

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
        with self._applying:
            while self._apply(APPLY_AT_ONCE) is not None:
                pass
            self._places.finish(table_of(self._superblock.disks))
            self.flush_images()
            finished = with_failover_finished(self._superblock, state, int(time.time()), self.decided)
            self._write_superblock(finished)
            self._places.release()
            journal, self._journal = self._journal, None
            if journal is not None:
                journal.close()
            self._remove_journals(keep=None)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _write_superblock(self, superblock: Superblock) -> None:
        with self._writing:
            write_superblock(self._files, self._config.store, superblock)
            self._superblock = superblock
