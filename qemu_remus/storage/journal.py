"""The secondary's journal: epochs, durable before they count, until they are in the images.

It owns what an epoch is in there and what is durable when.  Records, segments and space are
:mod:`qemu_remus.storage.log`, their bytes :mod:`qemu_remus.storage.format`; what a restart makes of them is
:mod:`qemu_remus.storage.recovery`.  Which epoch fits, and when it is committed, is decided elsewhere.

``append`` syncs nothing.  ``stage`` writes END, ``stage_and_commit`` only COMMIT (which carries the same totals), each
with one fdatasync.  Deciding a staged epoch never needs space: every segment keeps a reserve for it.  After a write or
sync that failed, the journal writes nothing until it is opened again: what then is on the device is read back from
there, never assumed.

Calls block.  One thread may write while another reads committed epochs and trims.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from qemu_remus.core.errors import FormatError, InternalError
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import Base, EpochNumber, Generation, PairName
from qemu_remus.storage import format as fmt
from qemu_remus.storage.files import Buffer, Files, storage_error
from qemu_remus.storage.format import RecordType, Totals
from qemu_remus.storage.log import Marks, RecordLog, Space
from qemu_remus.storage.recovery import Found, Recovery, choose_chain, replay
from qemu_remus.storage.segments import (
    EpochEntry,
    Identity,
    Segment,
    close_segments,
    damaged,
    open_segments,
    read_record,
)

SEGMENT_SIZE: Final = 64 << 20
"""Bytes of a segment, unless told otherwise."""

LIMIT: Final = 16 << 30
"""Bytes that all segments together may take, unless told otherwise."""


class Journal:
    """The epochs of one generation of a pair. Use :meth:`open`."""

    def __init__(self, files: Files, directory: Path, identity: Identity, space: Space, found: Found) -> None:
        self._files = files
        # Guards what a reader and trimmer in another thread also touches.
        self._lock = threading.RLock()
        self._unapplied = found.unapplied
        self._staged = found.staged
        self._building: EpochEntry | None = None
        self._committed = found.committed
        self._highest = found.highest_epoch
        self._log = RecordLog(files, directory, identity, space, found, self._lock, self._marks)

    @classmethod
    def open(
        cls,
        files: Files,
        directory: Path,
        pair: PairName,
        generation: Generation,
        *,
        floor: Base,
        applied: Base,
        limit: int = LIMIT,
        segment_size: int = SEGMENT_SIZE,
        create: bool = False,
    ) -> tuple[Journal, Recovery]:
        """Recover a generation's journal, and go on in it.

        A journal is a directory, named by its generation, in ``directory``.

        :param floor: the superblock's committed epoch: fewer than that is damage.
        :param applied: the superblock's applied epoch.
        :param limit: bytes, at least two segments.
        :param segment_size: bytes of new segments, a multiple of 4,096, at least 64 KiB.
        :param create: it need not exist. Use this before the superblock names the generation, and never after.
        :raise JournalDamaged: it is missing, damaged before something that counts, or ends before ``floor``; nothing
            was changed.
        :raise NoSpace, WriteFailed: it cannot be created, synced or wiped behind its end.
        :raise ConfigError: the sizes do not fit.
        """
        space = Space(limit, segment_size)
        space.check()
        identity = Identity.of(pair, generation)
        home = directory / generation.hex
        segments = open_segments(files, home, identity)
        journal: Journal | None = None
        try:
            found = choose_chain(files, segments, home)
            if found is not None:
                replay(files, found, identity, applied)
            _check_floor(home, found, max(floor or 0, applied or 0), create)
            new = found is None
            if found is None:
                _make_home(files, home)
                # What a creation that was cut short has left is not worth keeping.
                found = Found([], segments, oldest=1)
            journal = cls(files, home, identity, space, found)
            if new:
                journal._log.begin()
            journal._log.settle(found.wipe_to)
        except BaseException:
            if journal is None:
                close_segments(files, segments)
            else:
                journal.close()
            raise
        recovery = Recovery(
            committed=found.committed,
            unapplied=tuple(found.unapplied),
            staged=tuple(sorted(found.staged)),
            highest_epoch=found.highest_epoch,
            dropped_tail_bytes=max(0, found.wipe_to - found.position),
        )
        return journal, recovery

    # --- what it holds -----------------------------------------------------------------------------------------------

    @property
    def committed(self) -> Base:
        """The last committed epoch."""
        return self._committed

    @property
    def staged(self) -> tuple[EpochNumber, ...]:
        """Epochs in doubt, oldest first."""
        with self._lock:
            return tuple(sorted(self._staged))

    @property
    def unapplied(self) -> tuple[EpochNumber, ...]:
        """Committed epochs that were not trimmed away yet, in the order in which to apply them."""
        with self._lock:
            return tuple(self._unapplied)

    @property
    def highest_epoch(self) -> int:
        """The highest epoch number that was ever begun here."""
        return self._highest

    @property
    def backlog_bytes(self) -> int:
        """Bytes of data in :attr:`unapplied`."""
        with self._lock:
            return sum(entry.totals.payload for entry in self._unapplied.values())

    @property
    def free_bytes(self) -> int:
        """Bytes of records that fit before epochs have to be applied and trimmed."""
        return self._log.free_bytes

    @property
    def poisoned(self) -> bool:
        """A write or sync failed: nothing more is written until the journal is opened again."""
        return self._log.failed

    # --- writing -----------------------------------------------------------------------------------------------------

    def begin_epoch(self, epoch: EpochNumber, base: Base) -> None:
        """Start an epoch; one that was begun and not staged is dropped.

        :param base: at most the committed epoch; None where the images themselves are the base.
        :raise InternalError: the numbers do not fit.
        :raise WriteFailed: the journal is poisoned.
        """
        self._log.check_usable()
        if epoch <= self._highest or (base is not None and base > (self._committed or 0)):
            raise InternalError(
                f"epoch {epoch} with base {base} does not fit a journal with committed epoch {self._committed} "
                f"and highest epoch {self._highest}"
            )
        with self._lock:
            self._building = EpochEntry(epoch, Totals(base, 0, 0, 0))
            self._highest = epoch

    def append(self, epoch: EpochNumber, extents: Sequence[Extent], data: Buffer) -> None:
        """Add extents to the epoch that was begun; nothing is synced.

        :param data: contents of the extents that are not zero, one after the other.
        :raise NoSpace: they do not fit; nothing was written, and the same call may be repeated after :meth:`trim`
            (unless :attr:`poisoned`: then the file system was full although space had been reserved).
        :raise WriteFailed: the write failed, or an earlier one had; the journal is poisoned.
        """
        entry = self._begun(epoch)
        if sum(extent.payload for extent in extents) != len(data):
            raise InternalError(f"extents of epoch {epoch} do not fit their data")
        if not extents:
            return
        payload = (fmt.pack_extents(extents), data)
        segment, record = self._log.write(RecordType.EXTENTS, epoch, payload)
        with self._lock:
            entry.add(segment, record, len(extents), len(data))

    def set_disks(self, epoch: EpochNumber, disks: fmt.DiskTable) -> None:
        """Say which disks there are at the checkpoint of the epoch that was begun; nothing is synced.

        :raise NoSpace, WriteFailed: as :meth:`append`.
        """
        entry = self._begun(epoch)
        segment, record = self._log.write(RecordType.DISKS, epoch, (fmt.pack_disks(disks),))
        with self._lock:
            entry.disks = disks
            entry.add(segment, record, 0, 0)

    def stage(self, epoch: EpochNumber) -> None:
        """Make the epoch that was begun durable as a whole; it stays in doubt until its commit or abort.

        :raise NoSpace, WriteFailed: as :meth:`append`.
        """
        entry = self._begun(epoch)
        segment, _ = self._log.write(RecordType.END, epoch, (fmt.pack_totals(entry.totals),))
        self._log.sync()
        with self._lock:
            entry.touch(segment)
            self._staged[epoch] = entry
            self._building = None

    def commit(self, epoch: EpochNumber) -> None:
        """Make the decision durable that a staged epoch counts; older staged ones are dropped by it.

        Committing the last committed epoch again does nothing.

        :raise InternalError: the epoch is not staged.
        :raise WriteFailed: as :meth:`append`; the epoch is in doubt.
        """
        self._log.check_usable()
        if epoch == self._committed:
            return
        entry = self._staged.get(epoch)
        if entry is None:
            raise InternalError(f"epoch {epoch} is to be committed and is not staged")
        self._log.write(RecordType.COMMIT, epoch, (fmt.pack_totals(entry.totals),), reserved=True)
        self._log.sync()
        self._count(entry)

    def stage_and_commit(self, epoch: EpochNumber) -> None:
        """Make the epoch that was begun durable and committed, with one sync; empty, it costs one small record.

        :raise NoSpace, WriteFailed: as :meth:`append`.
        """
        entry = self._begun(epoch)
        segment, _ = self._log.write(RecordType.COMMIT, epoch, (fmt.pack_totals(entry.totals),))
        self._log.sync()
        entry.touch(segment)
        self._count(entry)

    def abort(self, epoch: EpochNumber) -> None:
        """Drop an epoch, durably where it was staged; nothing happens where there is nothing of it.

        :raise InternalError: it is committed.
        :raise WriteFailed: as :meth:`append`; the epoch is in doubt as before.
        """
        self._log.check_usable()
        if epoch in self._unapplied or epoch == self._committed:
            raise InternalError(f"epoch {epoch} is to be aborted and is committed")
        if self._building is not None and self._building.epoch == epoch:
            self.drop_unfinished()
        entry = self._staged.get(epoch)
        if entry is not None:
            self._log.write(RecordType.ABORT, epoch, (fmt.pack_totals(entry.totals),), reserved=True)
            self._log.sync()
            with self._lock:
                del self._staged[epoch]

    def drop_unfinished(self) -> None:
        """Forget the epoch that was begun and not staged, if there is one. Its number stays used."""
        with self._lock:
            self._building = None

    # --- reading, from another thread perhaps ------------------------------------------------------------------------

    def read_epoch(self, epoch: EpochNumber) -> Iterator[tuple[tuple[Extent, ...], memoryview]]:
        """Extents and data of a committed epoch, in the order in which they were appended, checked again.

        :raise InternalError: it is not committed, or was trimmed away.
        :raise JournalDamaged: what was sound when it was written is not any more.
        """
        yield from self._read("committed", epoch, self._unapplied)

    def read_staged(self, epoch: EpochNumber) -> Iterator[tuple[Extent, ...]]:
        """The extents of an epoch in doubt, as :meth:`read_epoch`.

        :raise InternalError: it is not staged.
        :raise JournalDamaged: as :meth:`read_epoch`.
        """
        for extents, _ in self._read("staged", epoch, self._staged):
            yield extents

    def _read(
        self, kind: str, epoch: EpochNumber, entries: Mapping[EpochNumber, EpochEntry]
    ) -> Iterator[tuple[tuple[Extent, ...], memoryview]]:
        with self._lock:
            entry = entries.get(epoch)
            spans = () if entry is None else tuple(entry.spans)
        if entry is None:
            raise InternalError(f"epoch {epoch} is to be read and is not there")
        for span in spans:
            offset = span.start
            while offset < span.stop:
                record = read_record(self._files, span.segment, offset)
                if record is None or record.payload is None:
                    raise damaged(
                        f"{span.segment.path} is damaged at offset {offset}, in {kind} epoch {epoch}",
                        safe="the images hold everything up to the last applied epoch, and perhaps parts of later ones",
                    )
                header = record.header
                if header.type is RecordType.EXTENTS and header.epoch == epoch:
                    yield _extents(span.segment, record.payload, offset)
                offset = header.next_offset

    def disks_of(self) -> dict[EpochNumber, fmt.DiskTable]:
        """The disks of those epochs in :attr:`unapplied` and :attr:`staged` that say so themselves, oldest first."""
        with self._lock:
            entries = sorted([*self._unapplied.items(), *self._staged.items()], key=lambda item: item[0])
            return {epoch: entry.disks for epoch, entry in entries if entry.disks is not None}

    def trim(self, applied: EpochNumber) -> None:
        """Forget committed epochs up to ``applied``; whole segments become free by it.

        Call it only after the images were flushed and the superblock says so, durably.
        """
        with self._lock:
            for epoch in [epoch for epoch in self._unapplied if epoch <= applied]:
                del self._unapplied[epoch]
            self._log.reclaim()

    def close(self) -> None:
        """Close the files; what was not staged is lost."""
        self._log.close()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _marks(self) -> Marks:
        """For the log: what a segment's header says of the epochs."""
        entries = [*self._unapplied.values(), *self._staged.values()]
        if self._building is not None:
            entries.append(self._building)
        oldest = min((entry.oldest for entry in entries if entry.oldest is not None), default=None)
        return Marks(oldest, self._committed, self._highest)

    def _begun(self, epoch: EpochNumber) -> EpochEntry:
        self._log.check_usable()
        if self._building is None or self._building.epoch != epoch:
            raise InternalError(f"epoch {epoch} was not begun")
        return self._building

    def _count(self, entry: EpochEntry) -> None:
        with self._lock:
            self._committed = entry.epoch
            # At no instant may the epoch be in none of these: its segments would be free.
            if self._building is entry:
                self._building = None
            for older in [number for number in self._staged if number <= entry.epoch]:
                del self._staged[older]
            self._unapplied[entry.epoch] = entry


def remove_other_journals(files: Files, directory: Path, keep: Generation | None) -> None:
    """Delete the journals of all generations but one, when nothing in them is needed any more.

    :raise WriteFailed: one cannot be deleted; what is left of it does no harm.
    """
    try:
        for name in files.list(directory):
            if keep is None or name != keep.hex:
                for part in files.list(directory / name):
                    files.unlink(directory / name / part)
                files.remove_directory(directory / name)
    except OSError as error:
        raise storage_error(
            error, f"deleting old journals in {directory}", safe="the journal in use is whole"
        ) from error


def _check_floor(home: Path, found: Found | None, floor: int, create: bool) -> None:
    if found is None and not create:
        raise damaged(f"there is no journal in {home}")
    committed = None if found is None else found.committed
    if (committed or 0) < floor:
        raise damaged(f"the journal in {home} ends at epoch {committed or 'none'}, but epoch {floor} was committed")


def _make_home(files: Files, home: Path) -> None:
    try:
        files.make_directory(home.parent)
        files.sync_directory(home.parent.parent)
        files.make_directory(home)
        files.sync_directory(home.parent)
    except OSError as error:
        raise storage_error(error, f"making the directory {home}", safe="nothing was lost") from error


def _extents(segment: Segment, payload: bytes, offset: int) -> tuple[tuple[Extent, ...], memoryview]:
    try:
        return fmt.unpack_extents(payload)
    except FormatError as error:
        raise damaged(f"{segment.path}, offset {offset}: {error.what}") from error


__all__ = ["LIMIT", "SEGMENT_SIZE", "Journal", "Recovery", "remove_other_journals"]
