"""The ledger and the loads in a guest, and the judgement over the disks that a VM left behind.

What the ledger writes, and what its check means, is in ``integration/guest/ledger.c``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from integration.agent import Job
from integration.guest.build import GuestImage
from integration.images import fsck
from integration.machine import Disk, Machine, start_machine

#: Bytes at the second disk's start that are the ledger's: 512 slots of 4 KiB. A load on that disk keeps behind them.
SLOTS_SIZE = 2 << 20

_FILE = "/mnt/ledger"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the check found.

    :param in_file: last complete record in the file on the first disk.
    :param in_slots: last complete record in the slots of the second disk.
    :param faults: gaps, torn records, disks of two instants, a file system that is not clean; empty: all is well.
    """

    in_file: int
    in_slots: int
    faults: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


class Ledger:
    """A ledger that is being written in a guest. Made by :func:`start_ledger`."""

    def __init__(self, job: Job) -> None:
        self._job = job

    @property
    def last(self) -> int:
        """The last record that the guest has reported as durable on both disks; 0 before the first."""
        return _record(self._job)

    async def reach(self, number: int, *, timeout: float = 60.0) -> None:
        """Wait until the record of this number was reported.

        :raise GuestError: when the ledger ends before.
        :raise TimeoutError: after ``timeout`` seconds.
        """
        await self._job.wait_until(lambda job: _record(job) >= number, timeout=timeout)

    async def grow(self, records: int, *, timeout: float = 60.0) -> None:
        """Wait until so many more records were reported."""
        await self.reach(self.last + records, timeout=timeout)


def _record(job: Job) -> int:
    word, _, number = (job.lines[-1] if job.lines else "R 0").partition(" ")
    return int(number) if word == "R" else 0


async def mount(machine: Machine, disk: str) -> None:
    """Mount the disk's ext4 in the guest on /mnt; freed space is discarded at once."""
    await machine.guest.run(f"mount -t ext4 -o discard {machine.device_in_guest(disk)} /mnt")


async def start_ledger(machine: Machine, *, first: str, second: str, rate: float = 100.0) -> Ledger:
    """Start writing the ledger: to a file on disk ``first``, which is mounted, and to the raw disk ``second``.

    :param rate: records a second at most; 0: as fast as it goes.
    """
    device = machine.device_in_guest(second)
    return Ledger(await machine.guest.start(f"ledger write {_FILE} {device} {rate:g}"))


async def start_file_load(machine: Machine, *, rate: float = 100.0, seed: int = 1) -> Job:
    """Start changing files on the mounted disk; ``rate`` operations a second at most, 0: as fast as it goes."""
    return await machine.guest.start(f"load files /mnt {rate:g} 0 {seed}")


async def start_block_load(
    machine: Machine, disk: str, *, start: int, size: int, rate: float = 100.0, count: int = 0, seed: int = 1
) -> Job:
    """Start random writes, discards, zero writes and the sequential witness on a raw disk.

    :param start: first byte, a multiple of 512; behind :data:`SLOTS_SIZE` where the ledger is on the same disk.
    :param size: bytes, a multiple of 512, at least 256 KiB.
    :param rate: operations a second at most; 0: as fast as it goes.
    :param count: operations; 0: until it is stopped by :func:`stop_loads`.
    """
    device = machine.device_in_guest(disk)
    return await machine.guest.start(f"load blocks {device} {start} {size} {rate:g} {count} {seed}")


async def stop_loads(machine: Machine) -> None:
    """End all loads in the guest, the ledger among them, each inside no operation or behind it."""
    names = "load ledger pulse"
    await machine.guest.run(f"killall {names}; while pidof {names}; do usleep 50000; done", check=False)


async def check_disks(directory: Path, guest: GuestImage, first: Path, second: Path, *, name: str = "check") -> Verdict:
    """Boot a second VM from the two images, let ext4 replay its journal, check the ledger, then fsck the first image.

    The images are changed by the replay: check copies where they are wanted as they are.

    :param directory: as for :func:`integration.machine.start_machine`.
    :param first: image with the file system; the ledger's file is on it.
    :param second: raw image with the slots.
    """
    disks = [Disk("first", first), Disk("second", second)]
    async with start_machine(directory, disks, name=name, guest=guest) as machine:
        try_mount = await machine.guest.run(
            f"mount -t ext4 {machine.device_in_guest('first')} /mnt 2>&1 || echo failed; dmesg | grep -i ext4",
            check=False,
        )
        if "failed" in try_mount:
            return Verdict(0, 0, (f"the file system cannot be mounted: {try_mount}",))
        line = await machine.guest.run(f"ledger check {_FILE} {machine.device_in_guest('second')}", check=False)
        await machine.power_off()
    try:
        found = json.loads(line)
        faults = list(found["faults"])
        in_file, in_slots = int(found["file"]), int(found["slots"])
    except (ValueError, KeyError):
        return Verdict(0, 0, (f"the check could not be done: {line}",))
    if faults == [] and found["ok"] is not True:
        faults.append(f"the check says no: {line}")
    if complaint := await fsck(first):
        faults.append(f"the file system is not clean: {complaint}")
    return Verdict(in_file, in_slots, tuple(faults))
