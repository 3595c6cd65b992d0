"""What the primary remembers across restarts: its superblock, under a lock. Blocking calls.

It is a help, not the truth: the bitmaps in QEMU carry their own identity, and the secondary knows what it holds.  What
must never be lost is the instance's identity and the numbers that may not be used twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from qemu_remus.core.errors import ConfigError
from qemu_remus.core.model import Base, EpochNumber, Generation, InstanceId, PairName, Role
from qemu_remus.core.primary_machine import Handover
from qemu_remus.storage.files import OsFiles
from qemu_remus.storage.lock import lock_store
from qemu_remus.storage.superblock import (
    PastGeneration,
    StoredHandover,
    Superblock,
    read_superblock,
    write_superblock,
)


class PrimaryMemory:
    """The primary's state directory, of one pair. Use :func:`open_memory`."""

    def __init__(self, directory: Path, superblock: Superblock) -> None:
        self._files = OsFiles()
        self._directory = directory
        self._superblock = superblock

    @property
    def superblock(self) -> Superblock:
        """What is known."""
        return self._superblock

    @property
    def handover(self) -> Handover | None:
        """A switch-over that the secondary was told of, or was about to be; undecided, or done."""
        known = self._superblock.handover
        return None if known is None else Handover(known.target, known.new_generation, known.ours, known.finished)

    def save(
        self,
        *,
        generation: Generation | None,
        committed: Base,
        highest_epoch: int,
        session: int,
        history: tuple[tuple[Generation, EpochNumber], ...] = (),
        begun: int = 0,
        decided: int = 0,
        handover: Handover | None = None,
    ) -> None:
        """Make the numbers durable.

        :raise StorageError: the old ones or the new ones are on disk, whole.
        """
        changed = replace(
            self._superblock,
            generation=generation,
            committed=committed,
            highest_epoch=highest_epoch,
            session=session,
            history=tuple(PastGeneration(ended, checkpoint) for ended, checkpoint in history),
            begun=begun,
            decided=decided,
            handover=None
            if handover is None
            else StoredHandover(handover.target, handover.generation, handover.ours, handover.done),
        )
        if changed != self._superblock:
            write_superblock(self._files, self._directory, changed)
            self._superblock = changed


@contextmanager
def open_memory(directory: Path, pair: PairName) -> Iterator[PrimaryMemory]:
    """Lock the directory, made where it is missing, and read what an earlier run has left.

    The store of a secondary that has failed over may be given: from here on it is a primary's, which knows where its
    history comes from.

    :raise ConfigError: it belongs to another pair, or to a secondary.
    :raise StoreLocked: another process uses it.
    :raise StorageError: it cannot be used.
    """
    with lock_store(directory):
        superblock = read_superblock(OsFiles(), directory)
        if superblock is None:
            superblock = Superblock(pair, Role.PRIMARY, InstanceId(uuid.uuid4()))
        if superblock.pair == pair and superblock.role is Role.SECONDARY and superblock.failover is not None:
            superblock = as_primary(directory, superblock)
            write_superblock(OsFiles(), directory, superblock)
        check_owner(directory, superblock, pair, Role.PRIMARY)
        yield PrimaryMemory(directory, superblock)


def as_primary(directory: Path, superblock: Superblock) -> Superblock:
    """What a secondary's store becomes once its copy is the VM.

    :raise ConfigError: the failover has not come to its end.
    """
    failover = superblock.failover
    if failover is None or not failover.finished:
        raise ConfigError(
            f"the failover of the store in {directory} was begun and is not finished",
            safe="nothing was changed",
            hint="start the secondary and ask for the same failover again; then start the VM and its primary",
        )
    return replace(superblock, role=Role.PRIMARY, session=0, disks=(), applied=None, sync=None, failover=None)


def check_owner(directory: Path, superblock: Superblock, pair: PairName, role: Role) -> None:
    """See that a directory is this pair's and role's.

    :raise ConfigError: it is not.
    """
    if (superblock.pair, superblock.role) != (pair, role):
        raise ConfigError(
            f"{directory} belongs to the {superblock.role} of pair {superblock.pair}, not to the {role} of {pair}",
            safe="nothing was changed",
            hint="give each pair and role a directory of its own, and check --pair",
        )
