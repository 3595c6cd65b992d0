"""Failed-over disks equal the primary's at one checkpoint, byte for byte, through real controllers and a real QEMU.

Where the VM is paused by the test, the primary goes on capturing, and the images that lie aside are what any later
checkpoint must hold. Where it runs to its end, a program of a few bytes in the disk's boot sector writes numbered
sectors to three disks in turn; it stands still in every pause, as a guest does, and so the copies' numbers tell whether
the three disks are of one instant. (What ``Machine.qemu_io`` writes does not wait for the VM to run.)
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from integration.harness import (
    Controller,
    Disk,
    Interface,
    Machine,
    Style,
    background,
    committed,
    copy_image,
    first_difference,
    free_port,
    make_image,
    qemu_remus,
    start_machine,
    start_primary,
    start_secondary,
)

KIB = 1 << 10
MIB = 1 << 20
ODD = 40 * MIB + 22_016
"""A disk's size that is no multiple of 4 or 64 KiB."""

MEMORY_LIMIT = 200 * MIB
"""Most that a controller may ever have had resident."""

SEED = 20
"""For the moments to kill at; the same ones in every run."""


class Pair:
    """A VM with both of its controllers, any of which may be killed and started again."""

    def __init__(self, scratch: Path, machine: Machine, interval_ms: int) -> None:
        self.scratch = scratch
        self.machine = machine
        self.targets = {disk.name: scratch / f"{disk.name}.copy" for disk in machine.disks}
        self.primary: Controller
        self.secondary: Controller
        self._interval_ms = interval_ms
        self._port = free_port()
        self._stack = AsyncExitStack()

    async def start_secondary(self) -> None:
        """Start it, or start it again on its store."""
        self.secondary = await self._stack.enter_async_context(
            start_secondary(self.scratch, self.targets, port=self._port)
        )

    async def start_primary(self) -> None:
        """Start it, or start it again on its state."""
        self.primary = await self._stack.enter_async_context(
            start_primary(self.scratch, self.machine.qmp_path, self.secondary.address, interval_ms=self._interval_ms)
        )

    async def captured_from_now(self, *, timeout: float = 60.0) -> int:
        """Wait for the commit of a checkpoint whose capture began after the call; its number, or a later one's."""
        status = await self.primary.status()
        # the next one may be under way already
        least = int(status["checkpoint"]["captured"] or 0) + 2
        return committed(await self.primary.wait_until(lambda now: committed(now) >= least, timeout=timeout))

    async def put_aside(self) -> dict[str, Path]:
        """Pause the VM; copies of its disks, which every checkpoint holds from now on."""
        # A stop that comes inside the primary's own pause cannot be seen by it (QEMU has no event for it), and it
        # resumes the VM; one that comes at any other time must hold, through the checkpoints that are waited for.
        least = 0
        for _ in range(5):
            await self.machine.pause()
            least = await self.captured_from_now()
            if await self.machine.status() == "paused":
                break
        images = {disk.name: await copy_image(disk.image, self.aside(disk)) for disk in self.machine.disks}
        assert await self.machine.status() == "paused"
        assert committed(await self.primary.status()) >= least
        return images

    def aside(self, disk: Disk) -> Path:
        """Where :meth:`put_aside` puts the disk's copy."""
        return self.scratch / f"{disk.name}.aside"

    async def crash(self) -> int:
        """SIGKILL to QEMU and the primary at once, as when their host dies; the last checkpoint known as committed."""
        last = committed(await self.secondary.status())
        self.machine.process.kill()
        self.primary.process.kill()
        await self.machine.process.wait()
        await self.primary.process.wait()
        await self.secondary.wait_until(lambda status: status["connection"] != "connected")
        return last

    async def fail_over(self) -> dict[str, Any]:
        """Run the command; its answer."""
        done = await qemu_remus("failover", "--control", str(self.secondary.control), "--json", scratch=self.scratch)
        answer: dict[str, Any] = json.loads(done.check().out)
        assert {disk["name"]: Path(disk["target"]) for disk in answer["disks"]} == self.targets
        return answer

    async def see_equal(self, images: dict[str, Path]) -> None:
        """Compare the secondary's images with others, whole, lengths and all."""
        differences = {name: await first_difference(path, self.targets[name]) for name, path in images.items()}
        assert differences == dict.fromkeys(images)

    async def see_exact_after_crash(self) -> None:
        """Pause, put the disks aside, crash, fail over, compare."""
        images = await self.put_aside()
        last = await self.crash()
        assert (await self.fail_over())["checkpoint"] >= last
        await self.see_equal(images)

    async def aclose(self) -> None:
        """End the controllers."""
        await self._stack.aclose()


@asynccontextmanager
async def pair_of(scratch: Path, disks: Sequence[Disk], *, interval_ms: int = 100) -> AsyncIterator[Pair]:
    """Run the VM and its controllers, the primary not yet."""
    async with start_machine(scratch, disks, memory_mb=32) as machine:
        pair = Pair(scratch, machine, interval_ms)
        try:
            await pair.start_secondary()
            yield pair
        finally:
            with trio.CancelScope(shield=True):
                await pair.aclose()


def image(directory: Path, name: str, size: int, **options: Any) -> Disk:
    return Disk(name, make_image(directory / f"{name}.img", size), **options)


ONE: list[tuple[str, int, dict[str, Any]]] = [("a", ODD, {})]
THREE: list[tuple[str, int, dict[str, Any]]] = [
    ("a", 16 * MIB, {"style": Style.DRIVE}),
    ("b", ODD, {"interface": Interface.SCSI}),
    ("c", 8 * MIB + 512, {"interface": Interface.IDE, "style": Style.IMPLICIT}),
]
MIXES = {"one": ONE, "three": THREE}


def make_disks(scratch: Path, mix: str) -> list[Disk]:
    return [image(scratch, name, size, **options) for name, size, options in MIXES[mix]]


async def fill(machine: Machine) -> None:
    """The start, the middle and the end of every disk; the ends not in whole clusters."""
    for index, disk in enumerate(machine.disks):
        size = disk.image.stat().st_size
        for command in (
            f"write -P {0x11 + index} 0 64k",
            f"write -P {0x22 + index} 1M 3M",
            f"write -P {0x33 + index} {size - 64 * KIB} 64k",
        ):
            await machine.qemu_io(disk.name, command)


async def scribble(machine: Machine, seed: int) -> None:
    """Whole and partial overwrites on either side and next to each other, zeroes and discards, on every disk."""
    for index, disk in enumerate(machine.disks):
        size = disk.image.stat().st_size
        base = (seed * 7 + index * 3) % 40 * 128 * KIB
        for command in (
            f"write -P {seed % 255 + 1} {base} 64k",
            f"write -P {seed % 251 + 2} {base} 512",
            f"write -P {seed % 241 + 3} {base + 64 * KIB - 1536} 1536",
            f"write -P {seed % 239 + 4} {base + 64 * KIB} 4k",
            f"write -P {seed % 233 + 5} {base + 20 * KIB + 512} 1k",
            f"write -z {base + 8 * KIB} 12k",
            f"discard {(base + 3 * MIB) % (6 * MIB)} 128k",
            f"write -z {size - 512 * (seed % 90 + 2)} 512",
            f"write -P {seed % 229 + 6} {size - 512} 512",
        ):
            await machine.qemu_io(disk.name, command)


class Scribbler:
    """Scribbles in the background, through captures and transfers, until it is told to end."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._ending = False
        self._ended = trio.Event()
        self.rounds = 0

    async def run(self) -> None:
        """To be started in a nursery."""
        while not self._ending:
            self.rounds += 1
            await scribble(self._machine, self.rounds)
        self._ended.set()

    async def end(self) -> None:
        """Returns when its last write is done."""
        self._ending = True
        await self._ended.wait()
        assert self.rounds > 3


@pytest.mark.parametrize("mix", MIXES)
async def test_failed_over_disks_equal_the_paused_primarys_byte_for_byte(scratch: Path, mix: str) -> None:
    async with pair_of(scratch, make_disks(scratch, mix)) as pair, background() as nursery:
        await fill(pair.machine)
        scribbler = Scribbler(pair.machine)
        nursery.start_soon(scribbler.run)
        await pair.start_primary()
        await pair.primary.protected()
        await pair.primary.progress(6)
        await scribbler.end()
        await pair.see_exact_after_crash()


async def test_what_is_written_after_a_checkpoint_does_not_show_in_it(scratch: Path) -> None:
    """The disks are put aside, then the VM is written again and dies before the next checkpoint."""
    async with pair_of(scratch, make_disks(scratch, "three"), interval_ms=60_000) as pair:
        await fill(pair.machine)
        await pair.start_primary()
        # with such an interval the first checkpoint, of the copy itself, is the only one
        await pair.primary.protected()
        for disk in pair.machine.disks:
            await copy_image(disk.image, pair.aside(disk))
        await scribble(pair.machine, 3)
        last = await pair.crash()
        assert (await pair.fail_over())["checkpoint"] == last
        await pair.see_equal({disk.name: pair.aside(disk) for disk in pair.machine.disks})


async def test_a_failover_asked_for_again_answers_the_same_and_changes_nothing(scratch: Path) -> None:
    async with pair_of(scratch, make_disks(scratch, "one")) as pair:
        await fill(pair.machine)
        await pair.start_primary()
        await pair.primary.protected()
        images = await pair.put_aside()
        await pair.crash()
        first = await pair.fail_over()
        assert await pair.fail_over() == first
        await pair.secondary.kill()
        await pair.start_secondary()
        assert await pair.fail_over() == first
        await pair.see_equal(images)


async def test_a_restarted_primary_sends_the_difference_only(scratch: Path) -> None:
    async with pair_of(scratch, make_disks(scratch, "three")) as pair:
        await fill(pair.machine)
        await pair.machine.qemu_io("b", "write -P 0x44 8M 24M")
        await pair.start_primary()
        status = await pair.primary.protected()
        assert status["bytes-sent"] > 24 * MIB
        assert await pair.primary.stop() == 0
        assert await pair.machine.status() == "running"
        await scribble(pair.machine, 5)
        await pair.start_primary()
        await pair.primary.protected()
        await pair.captured_from_now()
        assert (await pair.primary.status())["bytes-sent"] < 2 * MIB
        await pair.see_exact_after_crash()


async def test_a_killed_primary_costs_no_full_copy_either(scratch: Path) -> None:
    async with pair_of(scratch, make_disks(scratch, "three")) as pair, background() as nursery:
        await pair.machine.qemu_io("b", "write -P 0x44 8M 24M")
        scribbler = Scribbler(pair.machine)
        nursery.start_soon(scribbler.run)
        await pair.start_primary()
        await pair.primary.protected()
        await pair.primary.progress(2)
        await pair.primary.kill()
        await scribbler.end()
        await pair.start_primary()
        await pair.primary.protected()
        await pair.captured_from_now()
        assert (await pair.primary.status())["bytes-sent"] < 16 * MIB
        await pair.see_exact_after_crash()


async def test_a_killed_secondary_takes_up_its_work_again_on_its_store(scratch: Path) -> None:
    async with pair_of(scratch, make_disks(scratch, "three")) as pair, background() as nursery:
        await fill(pair.machine)
        await pair.machine.qemu_io("b", "write -P 0x44 8M 24M")
        scribbler = Scribbler(pair.machine)
        nursery.start_soon(scribbler.run)
        await pair.start_primary()
        await pair.primary.protected()
        for _ in range(2):
            before = committed(await pair.primary.progress(2))
            await pair.secondary.kill()
            await pair.primary.wait_until(lambda status: status["replication"] != "protected")
            await pair.start_secondary()
            after = await pair.primary.protected()
            assert committed(after) >= before
            assert after["generation"] == (await pair.secondary.status())["generation"]
        await pair.captured_from_now()
        await scribbler.end()
        await pair.see_exact_after_crash()


async def test_an_epoch_of_64_mib_and_more_is_exact_and_takes_little_memory(scratch: Path) -> None:
    async with pair_of(scratch, [image(scratch, "a", 160 * MIB + 512), image(scratch, "b", 8 * MIB)]) as pair:
        await pair.start_primary()
        await pair.primary.protected()
        await pair.machine.qemu_io("a", "write -P 0x51 1M 96M")
        # over the same blocks while they are on their way
        for seed in range(8):
            await scribble(pair.machine, seed)
        await pair.captured_from_now()
        assert (await pair.primary.status())["bytes-sent"] > 96 * MIB
        for controller in (pair.primary, pair.secondary):
            assert peak_memory(controller) < MEMORY_LIMIT
        await pair.see_exact_after_crash()


def peak_memory(controller: Controller) -> int:
    """The most bytes that it has ever had resident."""
    found = re.search(r"^VmHWM:\s*(\d+) kB$", Path(f"/proc/{controller.process.pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * KIB


# --- the VM that runs to its end -------------------------------------------------------------------------------------

COUNTER = bytes.fromhex(
    "31c0 8ed8 8ec0 8ed0 bc007c"  # xor ax,ax; mov ds,ax; mov es,ax; mov ss,ax; mov sp,0x7c00
    "66ff060080"  # next: inc dword [0x8000]
    "66a10080 66a3fc81"  # mov eax,[0x8000]; mov [0x81fc],eax: the number, at both ends of the sector
    "66250f000000 66c1e003 660500100000"  # and eax,15; shl eax,3; add eax,4096
    "66a3087d b280"  # mov [0x7d08],eax: the packet's sector; mov dl,0x80: the first disk
    "b80043 be007d cd13 72fe"  # disk: mov ax,0x4300; mov si,0x7d00; int 0x13: write; jc $: stand still on an error
    "fec2 80fa83 72ef ebca"  # inc dl; cmp dl,0x83; jb disk; jmp next
)
"""The boot sector's program: writes 1, 2, 3, ... to three disks in turn, number n to slot n modulo :data:`SLOTS`."""

PACKET = struct.pack("<BxHHHQ", 16, 1, 0x8000, 0, 0)
"""The BIOS' disk address packet, at 0x7d00: one sector from 0x8000."""

SLOTS = 16
"""So few that each is written again while an epoch is read: what is not read from the checkpoint shows."""
FIRST_SLOT = 2 * MIB
SLOT_SPACING = 4 * KIB


def boot_sector() -> bytes:
    return COUNTER.ljust(0x100, b"\0") + PACKET.ljust(0xFE, b"\0") + b"\x55\xaa"


def last_number(path: Path) -> int:
    """The newest number on a disk, 0 for none.

    :raise AssertionError: when its slots are not what they were right after that number was written.
    """
    with path.open("rb") as file:
        file.seek(FIRST_SLOT)
        area = file.read(SLOTS * SLOT_SPACING)
    slots = [struct.unpack_from("<I504xI", area, slot * SLOT_SPACING) for slot in range(SLOTS)]
    last: int = max(first for first, _ in slots)
    for slot, (first, second) in enumerate(slots):
        newest = last - (last - slot) % SLOTS
        assert first == second == max(0, newest), f"{path.name}, slot {slot}, of {last}"
    return last


@pytest.mark.parametrize("moment", range(2))
async def test_disks_of_a_vm_that_dies_at_any_moment_are_of_one_instant(scratch: Path, moment: int) -> None:
    disks = [image(scratch, name, 8 * MIB + 512) for name in "abc"]
    with disks[0].image.open("r+b") as file:
        file.write(boot_sector())
    # virtio disks on one bus: the BIOS numbers them in the order of their devices
    async with pair_of(scratch, disks) as pair:
        await pair.start_primary()
        await pair.primary.protected()
        # all three hold it: what a checkpoint holds that is captured from now on
        least = newest_on_all(disks)
        checkpoint = await pair.captured_from_now()
        while least == 0:
            least = newest_on_all(disks)
            checkpoint = await pair.captured_from_now()
        # not to wait for anything: to be at any point of an epoch
        await trio.sleep(random.Random(SEED + moment).uniform(0, 0.2))
        last = await pair.crash()
        answer = await pair.fail_over()
        assert answer["checkpoint"] >= max(last, checkpoint)
        numbers = [last_number(pair.targets[disk.name]) for disk in disks]
        assert numbers[0] >= numbers[1] >= numbers[2] >= numbers[0] - 1
        assert least <= numbers[2]
        assert numbers[0] <= last_number(disks[0].image)


def newest_on_all(disks: Sequence[Disk]) -> int:
    """A number that is on every disk of a running VM: its slots change under us, so their rules are not looked at."""
    newest: list[int] = []
    for disk in disks:
        with disk.image.open("rb") as file:
            file.seek(FIRST_SLOT)
            area = file.read(SLOTS * SLOT_SPACING)
        newest.append(max(struct.unpack_from("<I", area, slot * SLOT_SPACING)[0] for slot in range(SLOTS)))
    return min(newest)
