"""Failed-over disks equal the primary's at one checkpoint, byte for byte, through real controllers and a real QEMU.

Where the VM is paused by the test, the primary goes on capturing, and the images that lie aside are what any later
checkpoint must hold. Where it runs to its end, a program of a few bytes in the disk's boot sector writes numbered
sectors to three disks in turn; it stands still in every pause, as a guest does, and so the copies' numbers tell whether
the three disks are of one instant. (What ``Machine.qemu_io`` writes does not wait for the VM to run.)
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from integration.harness import Controller, Disk, Interface, Style, background, committed, copy_image
from integration.pair import KIB, MIB, Scribbler, fill, image, pair_of, scribble
from integration.qemus import OTHERS

pytestmark = pytest.mark.every_qemu(slow=OTHERS)

ODD = 40 * MIB + 22_016
"""A disk's size that is no multiple of 4 or 64 KiB."""

MEMORY_LIMIT = 200 * MIB
"""Most that a controller may ever have had resident."""

SEED = 20
"""For the moments to kill at; the same ones in every run."""


ONE: list[tuple[str, int, dict[str, Any]]] = [("a", ODD, {})]
THREE: list[tuple[str, int, dict[str, Any]]] = [
    ("a", 16 * MIB, {"style": Style.DRIVE}),
    ("b", ODD, {"interface": Interface.SCSI}),
    ("c", 8 * MIB + 512, {"interface": Interface.IDE, "style": Style.IMPLICIT}),
]
MIXES = {"one": ONE, "three": THREE}


def make_disks(scratch: Path, mix: str) -> list[Disk]:
    return [image(scratch, name, size, **options) for name, size, options in MIXES[mix]]


@pytest.mark.every_qemu
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
    async with pair_of(scratch, make_disks(scratch, "three"), interval_ms=600_000) as pair:
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
        await pair.machine.running()
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
