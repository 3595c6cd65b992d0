"""Giving up what a store holds, by the operator's word, so that it can become the other side's copy. Pure.

The word names the generation that is given up, so that it cannot meet another: ``--force-discard GENERATION``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NoReturn

from qemu_remus.core.errors import ConfigError
from qemu_remus.core.model import DiskName, Generation, Role
from qemu_remus.core.target_spec import TargetSpec
from qemu_remus.storage.superblock import StoredDisk, StoredDiskState, Superblock


def discarded(superblock: Superblock, generation: Generation, disks: Mapping[DiskName, TargetSpec]) -> Superblock:
    """The store as a secondary's that holds nothing, over the same disks.

    What the disks hold stays where it is: a copy compares, and only what differs is sent.  A primary's directory
    becomes a secondary's store.  Where the generation was given up before, nothing changes.

    :raise ConfigError: the store holds something else.
    """
    if superblock.generation != generation:
        if generation in superblock.discarded:
            return superblock
        _refuse(superblock, generation)
    failover = superblock.failover
    if failover is not None and not failover.finished:
        raise ConfigError(
            f"the store is in the middle of a failover to checkpoint {failover.target}",
            safe="nothing was changed",
            hint="start the secondary without --force-discard, ask for the same failover again, then give it up",
        )
    handover = superblock.handover
    if handover is not None and not handover.finished:
        raise ConfigError(
            f"whether the secondary has taken over at checkpoint {handover.target} is not known yet",
            safe="nothing was changed",
            hint="start the primary, which asks the secondary",
        )
    known = superblock.disks
    if superblock.role is Role.PRIMARY:
        known = tuple(StoredDisk(name, 0, str(target)) for name, target in disks.items())
    return replace(
        superblock,
        role=Role.SECONDARY,
        session=0,
        generation=None,
        # With a history it would be taken for what it has been.
        history=(),
        committed=None,
        applied=None,
        highest_epoch=0,
        disks=tuple(replace(disk, created=False) for disk in known),
        disk_state=StoredDiskState.INCONSISTENT,
        sync=None,
        failover=None,
        handover=None,
        begun=0,
        decided=0,
        discarded=(*superblock.discarded, generation),
    )


def _refuse(superblock: Superblock, generation: Generation) -> NoReturn:
    if superblock.generation is None:
        held = "nothing that could be given up"
        hint = "start it without --force-discard"
    else:
        checkpoint = "no checkpoint" if superblock.committed is None else f"checkpoint {superblock.committed}"
        held = f"{checkpoint} of generation {superblock.generation}"
        hint = "see that the command is for this host and this store; the other side is given up on its own host"
    raise ConfigError(f"the store holds {held}, and not generation {generation}", safe="nothing was changed", hint=hint)
