"""What a secondary's superblock says after each step of its life, from what it said before. Pure."""

from __future__ import annotations

from dataclasses import replace

from qemu_remus.core.model import Base
from qemu_remus.core.secondary_machine import SecondaryState
from qemu_remus.storage.places import table_of
from qemu_remus.storage.superblock import (
    Failover,
    PastGeneration,
    StoredDisk,
    StoredDiskState,
    Superblock,
    SyncAttempt,
)


def with_generation_begun(
    superblock: Superblock, state: SecondaryState, disks: tuple[StoredDisk, ...], sync: SyncAttempt
) -> Superblock:
    """A full sync begins: what was there before counts no more."""
    return replace(
        superblock,
        generation=state.generation,
        committed=None,
        applied=None,
        highest_epoch=0,
        disks=disks,
        disk_state=StoredDiskState.INCONSISTENT,
        sync=sync,
        begun=state.begun,
        decided=0,
    )


def with_applied(
    superblock: Superblock, committed: Base, applied: Base, highest: int, disks: tuple[StoredDisk, ...], decided: int
) -> Superblock:
    """The images hold a checkpoint, flushed.

    :param committed: by the journal.
    :param highest: epoch number in the journal.
    :param disks: at that checkpoint.
    """
    return replace(
        superblock,
        committed=committed,
        applied=applied,
        highest_epoch=max(superblock.highest_epoch, highest),
        disks=disks,
        disk_state=StoredDiskState.INCONSISTENT if committed is None else StoredDiskState.CONSISTENT,
        sync=None if committed is not None else superblock.sync,
        decided=decided,
    )


def with_failover_finished(superblock: Superblock, state: SecondaryState, now: int, decided: int) -> Superblock:
    """The images are plain ones, of exactly their disks' sizes.

    :param now: seconds since the epoch.
    """
    failover = state.failover
    assert failover is not None
    assert state.generation is not None
    present = dict(table_of(superblock.disks))
    return replace(
        superblock,
        disks=tuple(replace(disk, room=0) if index in present else disk for index, disk in enumerate(superblock.disks)),
        generation=failover.generation,
        history=(*superblock.history, PastGeneration(state.generation, failover.target)),
        committed=failover.target,
        applied=failover.target,
        disk_state=StoredDiskState.CONSISTENT,
        failover=Failover(failover.target, failover.generation, finished=True),
        begun=now,
        decided=decided,
    )
