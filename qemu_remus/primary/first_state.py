"""What a primary's machine begins with: from the configuration, from what it remembers, and from the VM's disks."""

from __future__ import annotations

from qemu_remus.core.model import DiskSpec
from qemu_remus.core.primary_machine import PrimaryState
from qemu_remus.core.settings import PrimaryConfig
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.storage.memory import PrimaryMemory


def first_state(config: PrimaryConfig, memory: PrimaryMemory, disks: tuple[VmDisk, ...]) -> PrimaryState:
    """The state before anything has happened.

    :param disks: in the order that extents' disk numbers refer to.
    """
    known = memory.superblock
    return PrimaryState(
        pair=config.pair,
        instance=known.instance,
        disks=tuple(DiskSpec(disk.name, disk.size) for disk in disks),
        session=known.session,
        one_step=config.interval_seconds is not None,
        allow_full_resync=config.allow_inconsistent_resync,
        generation=known.generation,
        committed=known.committed,
        highest=known.highest_epoch,
        history=tuple((past.generation, past.ended_at) for past in known.history if past.ended_at is not None),
        begun=known.begun,
        decided=known.decided,
        handover=memory.handover,
    )
