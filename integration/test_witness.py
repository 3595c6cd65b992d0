"""The witness says no where it must: disks or memory of another instant than the rest of its VM.

The VM is stopped and its images are changed under it, which QEMU's raw driver does not notice; then it goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import pytest

from integration.harness import Disk, GuestImage, Machine, copy_image, make_image, start_machine
from integration.witness import (
    FULL_TURN,
    OUTPUT,
    RING_SIZE,
    Account,
    Listener,
    Witness,
    command,
    hear,
    newest_record,
    start_witness,
)

MIB = 1 << 20
MEMORY = 96
PAGE = 4096
SLOT = 4096
SLOTS = RING_SIZE // SLOT
NAMES = ("first", "second")


@asynccontextmanager
async def witnessed(scratch: Path, guest: GuestImage, *, ram: Path | None = None) -> AsyncIterator[Machine]:
    disks = [Disk(name, make_image(scratch / name, 2 * MIB)) for name in NAMES]
    async with start_machine(scratch, disks, guest=guest, memory_mb=MEMORY, ram=ram) as machine:
        yield machine


class Images:
    """A machine's images, as they were at some instant."""

    def __init__(self, machine: Machine) -> None:
        self._paths = {disk.name: disk.image for disk in machine.disks}
        self.contents = {name: path.read_bytes() for name, path in self._paths.items()}

    def put_back(self, *names: str) -> None:
        """Change the images of these disks in place, in the files that QEMU has open."""
        for name in names:
            self.put(name, 0, self.contents[name])

    def put(self, name: str, offset: int, contents: bytes) -> None:
        """Change a part of one image."""
        with self._paths[name].open("r+b") as file:
            file.seek(offset)
            file.write(contents)


async def start(machine: Machine) -> Witness:
    witness = await start_witness(machine, first="first", second="second", rate=0)
    await witness.grow(3)
    return witness


async def grown_between(machine: Machine, witness: Witness, records: int) -> tuple[Images, Images]:
    """Images of two instants so many records apart, of which the second is now; the VM is stopped."""
    await machine.pause()
    older = newer = Images(machine)
    wanted = newest_on_second(machine) + records
    # what is heard may be of before the first pause, and a disk may have had the newest record in it already
    while newest_on_second(machine) < wanted or any(newer.contents[name] == older.contents[name] for name in NAMES):
        await grow_on_disk(machine, witness, wanted)
        newer = Images(machine)
    return older, newer


async def grow_on_disk(machine: Machine, witness: Witness, wanted: int) -> None:
    """From one pause to another, in which both disks have this record, unless what is heard lags behind that much."""
    missing = wanted - newest_on_second(machine)
    await machine.resume()
    await witness.grow(max(1, missing))
    await machine.pause()


def newest_on_second(machine: Machine) -> int:
    """The newest record that both disks have; the VM is stopped."""
    _, second = (disk.image for disk in machine.disks)
    return newest_record(second, 1)


async def test_witness_finds_fault_with_any_disk_that_is_behind_or_mixed(scratch: Path, guest: GuestImage) -> None:
    async with witnessed(scratch, guest) as machine:
        for names in (("first",), ("second",), NAMES):
            # one record, some, and more than a whole turn of the ring
            for records in (1, 10, 2 * SLOTS + 5):
                witness = await start(machine)
                older, _ = await grown_between(machine, witness, records)
                older.put_back(*names)
                await machine.resume()
                found = await witness.find_fault()
                # of two, it may have looked at the first one before the pause
                assert any(f"disk {NAMES.index(name)} is behind memory" in found for name in names)

        witness = await start(machine)
        older, newer = await grown_between(machine, witness, SLOTS + 20)
        first, second = (disk.image for disk in machine.disks)
        # the newest record is there; one that is not the newest is of the older instant
        changed = newest_record(second, 1) - 10
        at = (changed - 1) % SLOTS * SLOT
        older.put("second", at, older.contents["second"][at : at + SLOT])
        with pytest.raises(AssertionError, match=f"must have {changed}"):
            newest_record(second, 1)
        await machine.resume()
        assert "disk 1 is behind memory" in await witness.find_fault()

        witness = await start(machine)
        _, newer = await grown_between(machine, witness, 5)
        newest = newest_record(first, 0)
        assert newest - newest_record(second, 1) in (0, 1)
        assert newest_record(second, 1) >= witness.said().last
        # the one before it: its slot is not the next one to be written
        slot = (newest - 2) % SLOTS
        newer.put("first", slot * SLOT + 512, bytes(512))
        with pytest.raises(AssertionError, match=rf"damaged record {newest - 1}\b"):
            newest_record(first, 0)
        await machine.resume()
        assert f"disk 0 is damaged: slot {slot} " in await witness.find_fault()

        # the disks of an earlier run, with the same numbers
        witness = await start(machine)
        newer.put_back("first", "second")
        assert "of another run" in await witness.find_fault()


async def test_witness_goes_on_where_a_pause_changes_nothing(scratch: Path, guest: GuestImage) -> None:
    async with witnessed(scratch, guest) as machine:
        boot = UUID(await machine.guest.run("cat /proc/sys/kernel/random/boot_id"))
        witness = await start(machine)
        for _ in range(20):
            _, now = await grown_between(machine, witness, 3)
            now.put_back("first", "second")
            await machine.resume()
        # all of the table has been looked at then
        await witness.grow(FULL_TURN)
        said = witness.said()
        assert said.faults == ()
        assert said.boot == boot
        assert (said.first, len(said.records)) == (1, said.last)


def test_account_with_a_gap_or_two_accounts_of_one_record_is_faulty() -> None:
    boot = "S 0f0e0d0c-0b0a-0908-0706-050403020100 00000000000000ff"
    assert hear([boot, "W 1 00000001", "W 2 00000002"]).faults == ()
    assert hear(["W 7 00000001", "W 8 00000002"]).faults == ()
    # a record that was in the port when the VM was captured is printed on both hosts
    assert hear(["W 7 00000001", "W 7 00000001", "W 8 00000002"]).faults == ()
    for lines in (
        ["W 7 00000001", "W 9 00000002"],
        ["W 7 00000001", "W 7 00000002"],
        ["W 7 00000001", "FAULT disk 0 is behind memory"],
        ["W 7 00000001", "W 8 0000"],
    ):
        assert len(hear(lines).faults) == 1
    one, other = hear(["W 7 00000001", "W 8 00000002"]), hear(["W 8 00000002", "W 9 00000003"])
    assert one.agrees_with(other)
    assert not one.agrees_with(hear(["W 8 00000007"]))


_numbers = itertools.count(1)


async def go_on(scratch: Path, guest: GuestImage, device_state: Path, disks: dict[str, bytes]) -> Account:
    """Start a VM from the memory in ``then`` with these disks; what its witness says until it has looked at all."""
    name = f"vm{next(_numbers)}"
    paths = {disk: scratch / f"{name}-{disk}" for disk in disks}
    for disk, contents in disks.items():
        paths[disk].write_bytes(contents)
    async with start_machine(
        scratch,
        [Disk(disk, path) for disk, path in paths.items()],
        name=name,
        guest=guest,
        memory_mb=MEMORY,
        ram=await copy_image(scratch / "then", scratch / f"{name}-ram"),
        device_state=device_state,
    ) as machine:
        return await Listener(machine.output).hear(lambda said: bool(said.faults) or len(said.records) > FULL_TURN)


async def pause_after(machine: Machine, listener: Listener, records: int) -> None:
    """Pause the VM once its second disk has so many records more than now; what is heard may lag behind that."""
    await machine.pause()
    wanted = newest_on_second(machine) + records
    while newest_on_second(machine) < wanted:
        await machine.resume()
        await listener.hear(lambda said, last=listener.account.last: said.last > last)  # type: ignore[misc]
        await machine.pause()


async def test_vm_that_goes_on_from_its_memory_takes_disks_of_that_instant_only(
    scratch: Path, guest: GuestImage
) -> None:
    ram, state = scratch / "ram", scratch / "state"
    async with witnessed(scratch, guest, ram=ram) as machine:
        await machine.guest.start(command(machine, first="first", second="second", output=OUTPUT, rate=0))
        listener = Listener(machine.output)
        instants = []
        # memory may know of one record more than the disks have
        for records in (100, 2, 2 * SLOTS + 10):
            await pause_after(machine, listener, records)
            instants.append(Images(machine).contents)
            if len(instants) == 1:
                await machine.qmp.execute("xen-save-devices-state", {"filename": str(state), "live": False})
                await copy_image(ram, scratch / "then")
            await machine.resume()
        await listener.hear(lambda said: said.last > 100 + FULL_TURN + SLOTS)
    then, soon, later = instants
    said = await go_on(scratch, guest, state, then)
    assert said.faults == ()
    assert said.agrees_with(listener.account)
    assert said.first <= listener.account.last
    for disks in (
        {"first": soon["first"], "second": soon["second"]},
        {"first": later["first"], "second": then["second"]},
        {"first": then["first"], "second": later["second"]},
    ):
        [fault] = (await go_on(scratch, guest, state, disks)).faults
        assert "is ahead of memory" in fault


async def test_memory_that_is_in_part_older_is_a_fault(scratch: Path, guest: GuestImage) -> None:
    ram = scratch / "ram"
    async with witnessed(scratch, guest, ram=ram) as machine:
        witness = await start(machine)
        await witness.grow(300)
        await machine.pause()
        older = ram.read_bytes()
        # memory may know of one record more than the disks have
        wanted = newest_on_second(machine) + 2
        while newest_on_second(machine) < wanted:
            await grow_on_disk(machine, witness, wanted)
        newer = ram.read_bytes()
        # what a record of the time between made of its page of the table
        page = find_page(newer, witness.said().run, newest_on_second(machine))
        assert older[page : page + PAGE] != newer[page : page + PAGE]
        with ram.open("r+b") as file:
            file.seek(page)
            file.write(older[page : page + PAGE])
        await machine.resume()
        assert "memory: page" in await witness.find_fault()


def find_page(ram: bytes, run: int, number: int) -> int:
    """Where the page of the table is that this record wrote, by its first word (``fill`` in witness.c)."""
    mask = (1 << 64) - 1
    z = ((run ^ 2 << 56 ^ number << 20) + 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    word = (z ^ z >> 31).to_bytes(8, "little")
    return next(at for at in range(0, len(ram), PAGE) if ram.startswith(word, at))
