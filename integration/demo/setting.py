"""The demonstration's VM: its disks, its load, and what identifies its guest.

Owns sizes and rates, and what runs in the guest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from integration.agent import Agent
from integration.images import make_ext4, make_image
from integration.ledger import SLOTS_SIZE, Ledger, mount, start_block_load, start_file_load, start_ledger
from integration.machine import Disk, Machine
from integration.witness import OUTPUT

MIB: Final = 1 << 20
MEMORY_MB: Final = 256
SIZES: Final = {"disk0": 512 * MIB, "disk1": 256 * MIB, "disk2": 8 * MIB}
#: Bytes that disk0 and disk1 each hold before anything starts, so that there is something to copy.
PREFILLED: Final = 96 * MIB
#: What the demonstration needs in the temporary directory, in bytes: the disks twice, a fleece and a journal; and the
#: memory of the VM and of the survivor, and two checkpoints of it.
ROOM: Final = 4 * (sum(SIZES.values()) + MEMORY_MB * MIB)

#: Records a second, of the ledger and of the witness.
RATE: Final = 50
#: The witness's ring on the first disk; there a file system has the disk's beginning.
_RING: Final = "/mnt/witness"
_RING_BLOCKS: Final = 64


async def make_disks(scratch: Path) -> tuple[Disk, ...]:
    """disk0 with a file system, disk1 raw, disk2 for the witness alone."""
    contents = scratch / "contents"
    await trio.to_thread.run_sync(_fill, contents / "some-data")
    await make_ext4(scratch / "disk0", SIZES["disk0"], contents=contents)
    await trio.to_thread.run_sync(shutil.rmtree, contents)
    await trio.to_thread.run_sync(_make_second, scratch / "disk1")
    make_image(scratch / "disk2", SIZES["disk2"])
    return disks_on({name: scratch / name for name in SIZES})


def disks_on(images: dict[str, Path]) -> tuple[Disk, ...]:
    """The VM's disks, on these images by name; in the same order on either host."""
    return tuple(Disk(name, images[name]) for name in SIZES)


def _fill(path: Path) -> None:
    path.parent.mkdir()
    with path.open("wb") as file:
        for _ in range(PREFILLED // MIB):
            file.write(os.urandom(MIB))


def _make_second(path: Path) -> None:
    make_image(path, SIZES["disk1"])
    with path.open("r+b") as file:
        file.seek(SIZES["disk1"] - PREFILLED)
        for _ in range(PREFILLED // MIB):
            file.write(os.urandom(MIB))


async def start_load(machine: Machine) -> Ledger:
    """The ledger, what keeps the disks busy, and the witness; they run when it returns."""
    await mount(machine, "disk0")
    ledger = await start_ledger(machine, first="disk0", second="disk1", rate=RATE)
    await start_file_load(machine, rate=40)
    await start_block_load(machine, "disk1", start=SLOTS_SIZE, size=64 * MIB, rate=60)
    await machine.guest.run(f"dd if=/dev/zero of={_RING} bs=4k count={_RING_BLOCKS} conv=fsync")
    # what it finds wrong it says on the port too
    witness = f"witness {_RING} {machine.device_in_guest('disk2')} {OUTPUT} {RATE} 2>/dev/null"
    await machine.guest.start(witness)
    await ledger.reach(10)
    return ledger


#: One line each: the kernel's boot id; seconds since then; pid, name and start of each process of ours.
_VITALS: Final = (
    "cat /proc/sys/kernel/random/boot_id; cut -d' ' -f1 /proc/uptime; "
    "for pid in $(pidof ledger load witness); do cut -d' ' -f1,2,22 /proc/$pid/stat; done"
)


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a guest that goes on keeps, and one that has booted has not.

    :param uptime: seconds since it booted.
    :param processes: pid, name and time of start of each process of the load.
    """

    boot_id: str
    uptime: float
    processes: frozenset[str]

    def shown(self) -> Sequence[str]:
        """For a person."""
        names = (f"{name.strip('()')} {pid}" for pid, name, _ in map(str.split, sorted(self.processes)))
        return (f"boot id {self.boot_id}, up {self.uptime:.1f} s", f"processes {', '.join(names)}")


async def vitals(guest: Agent) -> Vitals:
    """Ask the guest.

    :raise GuestError: when it does not answer.
    """
    boot_id, uptime, *processes = (await guest.run(_VITALS)).splitlines()
    return Vitals(boot_id, float(uptime), frozenset(processes))


async def uptime(guest: Agent) -> float:
    """Seconds since the guest booted."""
    return float((await guest.run("cat /proc/uptime")).split()[0])
