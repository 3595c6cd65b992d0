"""Failover of a whole VM: the disks and the memory of one checkpoint, and a QEMU that goes on with them.

Owns the order: what the backup can restore, which of it the disks reach, then that.  Nothing of either side's storage
may enter.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import trio

from integration.agent import Agent
from integration.guest.build import GuestImage
from integration.machine import Disk, Machine, start_machine
from integration.toolstack.backup import BackupLink
from qemu_remus.core.errors import NotConsistent, Refused


class FailoverAnswer(Protocol):
    """What is used of :class:`qemu_remus.core.commands.FailoverResult`."""

    @property
    def checkpoint(self) -> int:
        """The one that the disks are at."""


class Secondary(Protocol):
    """What is used of :class:`qemu_remus.toolstack.Backup`."""

    async def failover(self, checkpoints: Sequence[int] = ..., *, force: bool = ...) -> FailoverAnswer:
        """Take the newest of these that the disks reach."""


@dataclass(frozen=True, slots=True)
class Survivor:
    """A VM that goes on.

    :param checkpoint: from which.
    :param seconds: from the beginning of the failover until the guest answered.
    """

    machine: Machine
    checkpoint: int
    seconds: float


async def choose(backup: BackupLink, secondary: Secondary, *, force: bool = False) -> int:
    """Have the disks taken to the newest checkpoint whose memory can be restored; to repeat it gives the same.

    :param force: although the primary is connected; the caller has seen to it that its VM is off.
    :raise NotConsistent: when there is none.
    :raise Refused: when the secondary refuses.
    :raise BackupLost: when the backup is gone.
    """
    checkpoints = await backup.checkpoints()
    while True:
        try:
            return (await secondary.failover(checkpoints, force=force)).checkpoint
        except (NotConsistent, Refused):
            # a primary that is still there, and forced away, may have gone on between our two questions
            before, checkpoints = checkpoints, await backup.checkpoints()
            if checkpoints == before:
                raise


@asynccontextmanager
async def failover(
    directory: Path,
    ram: Path,
    backup: BackupLink,
    secondary: Secondary,
    disks: Sequence[Disk],
    *,
    guest: GuestImage,
    memory_mb: int,
    name: str = "survivor",
    accelerator: str | None = None,
    earlier: Agent | None = None,
    force: bool = False,
) -> AsyncIterator[Survivor]:
    """Go on with the VM for the length of the block.

    :param directory: as for :func:`integration.machine.start_machine`.
    :param ram: file for its memory, not there yet.
    :param disks: as the primary VM had them, on the secondary's images.
    :param guest: what the primary VM was booted from, and so ``memory_mb`` and ``accelerator``.
    :param earlier: the primary VM's agent; the output of jobs that run on is followed further.
    :raise NotConsistent: as :func:`choose` does, and Refused and BackupLost.
    :raise GuestError: when the guest does not go on.
    """
    began = trio.current_time()
    checkpoint = await choose(backup, secondary, force=force)
    device_state = ram.with_name(f"{ram.name}.restored-device-state")
    await backup.restore(checkpoint, ram, device_state)
    async with start_machine(
        directory,
        disks,
        name=name,
        guest=guest,
        accelerator=accelerator,
        memory_mb=memory_mb,
        ram=ram,
        device_state=device_state,
        earlier=earlier,
    ) as machine:
        yield Survivor(machine, checkpoint, trio.current_time() - began)
