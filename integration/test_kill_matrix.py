"""Killed at any point of a checkpoint, the VM goes on at the secondary with memory and disks of one checkpoint.

The guest's witness judges that by itself (``integration/guest/witness.c``). From outside, the disks are compared with
copies that were made while the VM was paused at that checkpoint, and the witness's records with what was released to
the outside. The cells are :mod:`integration.matrix`'s. Each begins from a VM that was booted once and put aside.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from integration import witness
from integration.frames import FrameProxy, Passing, start_frame_proxy
from integration.harness import (
    Controller,
    Disk,
    GuestImage,
    Machine,
    Process,
    background,
    copy_image,
    first_difference,
    free_port,
    make_image,
    start_machine,
    start_primary,
    start_secondary,
)
from integration.matrix import CELLS, SEED, SEED_VARIABLE, Cell, Point, Victim, choice
from integration.toolstack.backup import BackupLink, open_backup_link, start_backup
from integration.toolstack.failover import choose
from integration.toolstack.output import OutputBuffer
from integration.toolstack.protector import Moment, Protector, Step
from integration.witness import FULL_TURN, Account, Listener, newest_record
from qemu_remus.core.errors import ControlError, ControlUnreachable, NotConsistent
from qemu_remus.toolstack import open_backup, open_toolstack

MIB = 1 << 20
MEMORY_MB = 96
DISK_SIZE = 32 * MIB
NAMES = ("first", "second")

#: Checkpoints whose disks are kept aside.
KEPT = 6
#: Seconds between two checkpoints.
INTERVAL = 0.05


@dataclass(frozen=True, slots=True)
class PutAside:
    """A VM with a witness and a load in it, stopped.

    :param boot: its kernel's boot id.
    """

    directory: Path
    boot: str

    @property
    def ram(self) -> Path:
        """Its memory."""
        return self.directory / "put-aside-ram"

    @property
    def device_state(self) -> Path:
        """QEMU's state."""
        return self.directory / "put-aside-state"

    def disk(self, name: str) -> Path:
        """The image of a disk."""
        return self.directory / f"put-aside-{name}"


async def put_aside(directory: Path, guest: GuestImage) -> PutAside:
    ram = directory / "ram"
    disks = [Disk(name, make_image(directory / name, DISK_SIZE)) for name in NAMES]
    async with start_machine(directory, disks, guest=guest, memory_mb=MEMORY_MB, ram=ram) as machine:
        boot = await machine.guest.run("cat /proc/sys/kernel/random/boot_id")
        first, second = NAMES
        # the load is what makes the disks differ in more than the witness's slots
        device = machine.device_in_guest(second)
        await machine.guest.start(f"load blocks {device} {witness.RING_SIZE} {16 * MIB} 50 0 1 >/dev/null")
        await machine.guest.start(
            witness.command(machine, first=first, second=second, output=witness.OUTPUT, rate=200) + " 2>/dev/null"
        )
        await Listener(machine.output).hear(lambda said: said.last > FULL_TURN)
        aside = PutAside(directory, boot)
        async with machine.input_held():
            await machine.pause()
            await machine.qmp.execute("xen-save-devices-state", {"filename": str(aside.device_state), "live": False})
            await copy_image(ram, aside.ram)
            for disk in disks:
                await copy_image(disk.image, aside.disk(disk.name))
    return aside


@pytest.fixture(scope="module")
def stopped_vm(guest: GuestImage) -> Iterator[PutAside]:
    with tempfile.TemporaryDirectory(prefix="qr-") as path:
        yield trio.run(put_aside, Path(path), guest)


class Rig:
    """Two hosts, a VM that is checkpointed, and somebody who strikes at the cell's point. Made by :func:`rig_of`.

    :ivar acknowledged: the last checkpoint whose commit the toolstack was told of, 0 for none.
    :ivar counted: the last checkpoint that the secondary has committed of its own accord, 0 for none.
    :ivar struck: set when the cell's point was reached and the blow is done.
    :ivar dead: set when the primary's host has been killed.
    :ivar returned: to be set when a killed secondary has been started again: the cell's second point counts from now.
    """

    def __init__(self, scratch: Path, cell: Cell, stack: AsyncExitStack) -> None:
        self.scratch = scratch
        self.cell = cell
        self.acknowledged = 0
        self.counted = 0
        self.struck = trio.Event()
        self.dead = trio.Event()
        self.returned = False
        self.machine: Machine
        self.primary: Controller
        self.secondary: Controller
        self.backup: Process
        self.proxy: FrameProxy
        self.output: OutputBuffer
        self.targets = {name: scratch / f"{name}.copy" for name in NAMES}
        self._stack = stack
        self._port = free_port()
        self._backup_path = scratch
        self._commits = 0
        self._armed_after: int | None = None
        self._protecting = trio.CancelScope()
        self._progress = trio.Event()

    async def start(self, aside: PutAside, guest: GuestImage, nursery: trio.Nursery) -> None:
        """Start all of it, and the checkpoints."""
        await self.start_secondary()
        await self.start_backup()
        self.proxy = await self._stack.enter_async_context(start_frame_proxy(self.secondary.address, self._on_message))
        ram = await copy_image(aside.ram, self.scratch / "ram")
        disks = [Disk(name, await copy_image(aside.disk(name), self.scratch / name)) for name in NAMES]
        self.machine = await self._stack.enter_async_context(
            start_machine(
                self.scratch, disks, guest=guest, memory_mb=MEMORY_MB, ram=ram, device_state=aside.device_state
            )
        )
        self.output = OutputBuffer(self.machine.output)
        nursery.start_soon(self.output.receive)
        await self.start_primary()
        nursery.start_soon(self._protect, ram)

    async def start_primary(self) -> None:
        """Start it, or start it again on its state."""
        self.primary = await self._stack.enter_async_context(
            start_primary(self.scratch, self.machine.qmp_path, self.proxy.address, interval_ms=None)
        )

    async def start_secondary(self) -> None:
        """Start it, or start it again on its store."""
        self.secondary = await self._stack.enter_async_context(
            start_secondary(self.scratch, self.targets, port=self._port)
        )

    async def start_backup(self) -> None:
        """Start the memory's keeper, or start it again on its store."""
        self.backup, self._backup_path = await self._stack.enter_async_context(start_backup(self.scratch))

    async def _protect(self, ram: Path) -> None:
        try:
            with self._protecting:
                async with open_toolstack(self.primary.control) as toolstack, self.memory() as backup:
                    protector = Protector(self.machine, ram, toolstack, backup, self.output, hook=self._on_step)
                    try:
                        while True:
                            try:
                                await protector.checkpoint()
                            except ControlError as error:
                                print(f"no checkpoint: {type(error).__name__}")
                            except ControlUnreachable:
                                if self.cell.victim is not Victim.CONTROLLER or self.dead.is_set():
                                    raise
                            await trio.sleep(INTERVAL)
                    finally:
                        protector.close()
        except Exception as error:
            # its host is dead, and it with it: what it would still say, nobody hears
            if not self.dead.is_set():
                raise
            print(f"the toolstack's last words: {error!r}")

    async def _on_step(self, moment: Moment, epoch: int | None) -> None:
        if moment == Moment(Step.START, after=True):
            assert epoch
            await self._keep_disks(epoch)
        if moment == Moment(Step.COMPLETE, after=True) and self.cell.told:
            assert epoch
            await self._tell(epoch)
        if moment == Moment(Step.COMMIT, after=True):
            assert epoch
            self.acknowledged = epoch
            self._commits += 1
            self._progress.set()
            self._progress = trio.Event()
        if (
            moment == Moment(Step.PREPARE, after=False)
            and self._commits >= self.cell.unharmed
            and self._armed_after is None
        ):
            await self._guest_went_on()
            self._armed_after = self.acknowledged
        if self._armed_after is not None and moment == self.cell.point.step and not self.struck.is_set():
            self._strike(epoch)
            await trio.lowlevel.checkpoint()

    async def _guest_went_on(self) -> None:
        """Wait until no disk of the next checkpoint can be taken for one of the last, however slow the guest is."""
        with trio.fail_after(60):
            # what it has said since; memory may know of one record more than the disks have
            while self.output.held_records < 3:  # noqa: ASYNC110 - the buffer tells nobody
                await trio.sleep(0.005)

    async def _on_message(self, passing: Passing) -> None:
        point = self.cell.point
        if (
            (passing.message, passing.moment) == (point.message, point.moment)
            and self._armed_after is not None
            and (passing.epoch or 0) > self._armed_after
            and not self.struck.is_set()
        ):
            self._strike(passing.epoch)
        then = self.cell.then
        if self.returned and then and (passing.message, passing.moment) == (then.message, then.moment):
            print(f"the host's end {passing}, acknowledged {self.acknowledged}")
            self.returned = False
            self.kill_host()

    async def _tell(self, epoch: int) -> None:
        """The secondary is the first to know that this checkpoint counts."""
        try:
            async with open_backup(self.secondary.control) as secondary:
                # its disks are staged, or its memory could not be complete
                assert await secondary.memory_received(epoch)
        except ControlUnreachable:
            assert self.struck.is_set()
        else:
            self.counted = epoch

    async def _keep_disks(self, epoch: int) -> None:
        """The VM is stopped: its images are the disks of this checkpoint."""
        for disk in self.machine.disks:
            await copy_image(disk.image, self.kept(disk.name, epoch))
        old = [self.kept(name, epoch - KEPT) for name in NAMES]
        for path in old:
            path.unlink(missing_ok=True)

    def kept(self, name: str, epoch: int) -> Path:
        """The copy of a disk at a checkpoint."""
        return self.scratch / f"{name}.at-{epoch}"

    def _strike(self, epoch: int | None) -> None:
        print(f"strike at {self.cell}, epoch {epoch}, acknowledged {self.acknowledged}")
        victim = self.cell.victim
        if victim in (Victim.PRIMARY, Victim.BOTH):
            self.kill_host()
        if victim is Victim.CONTROLLER:
            self.primary.process.kill()
        if victim in (Victim.SECONDARY, Victim.BOTH):
            self.secondary.process.kill()
        if victim is Victim.BOTH:
            self.backup.kill()
        self.proxy.cut()
        self.struck.set()

    def kill_host(self) -> None:
        """The end of the primary's host."""
        self.dead.set()
        self.machine.process.kill()
        self.primary.process.kill()
        self._protecting.cancel()
        # what was under way from the dead to the living has arrived; what we hold back never does
        self.proxy.cut()

    async def go_on(self, commits: int) -> None:
        """Wait for so many more checkpoints."""
        wanted = self._commits + commits
        with trio.fail_after(120):
            while self._commits < wanted:
                await self._progress.wait()

    @asynccontextmanager
    async def memory(self) -> AsyncIterator[BackupLink]:
        """A connection to the memory's keeper."""
        async with open_backup_link(self._backup_path) as link:
            yield link


@asynccontextmanager
async def rig_of(scratch: Path, cell: Cell, aside: PutAside, guest: GuestImage) -> AsyncIterator[Rig]:
    # the processes end before the tasks that hear of it
    async with background() as nursery, AsyncExitStack() as stack:
        rig = Rig(scratch, cell, stack)
        await rig.start(aside, guest, nursery)
        try:
            yield rig
        finally:
            rig.kill_host()


async def blow(rig: Rig) -> None:
    """Have the cell's victim killed; at the end the primary's host is dead, and what the failover needs is there."""
    with trio.fail_after(120):
        await rig.struck.wait()
    victim = rig.cell.victim
    if victim in (Victim.SECONDARY, Victim.BOTH):
        await rig.secondary.process.wait()
        await rig.start_secondary()
    if victim is Victim.BOTH:
        await rig.backup.wait()
        await rig.start_backup()
    if victim in (Victim.SECONDARY, Victim.CONTROLLER):
        rig.returned = True
        rig.proxy.mend()
    if victim is Victim.CONTROLLER:
        await rig.primary.process.wait()
        await rig.start_primary()
    if rig.cell.then:
        with trio.fail_after(120):
            await rig.dead.wait()
    elif not rig.dead.is_set():
        await rig.go_on(2)
        rig.kill_host()
    await rig.machine.process.wait()
    await rig.primary.process.wait()
    await rig.secondary.wait_until(lambda status: status["connection"] != "connected")


async def fail_over(rig: Rig) -> tuple[Path, Path] | None:
    """Have the checkpoint chosen, and look at the disks; its memory and device state, None where there is none yet."""
    ram, state = rig.scratch / "restored-ram", rig.scratch / "restored-state"
    async with rig.memory() as link, open_backup(rig.secondary.control) as secondary:
        offered = await link.checkpoints()
        if not offered:
            # no disks without memory
            assert rig.acknowledged == 0
            with pytest.raises(NotConsistent):
                await choose(link, secondary)
            return None
        checkpoint = await choose(link, secondary)
        print(f"memory {offered}, failover to {checkpoint}")
        await link.restore(checkpoint, ram, state)
    assert checkpoint >= max(rig.acknowledged, rig.counted)
    # memory is offered only when the primary has said that its disks are staged, and what is staged is kept
    assert checkpoint == offered[0]
    differences = {name: await first_difference(rig.kept(name, checkpoint), rig.targets[name]) for name in NAMES}
    assert differences == dict.fromkeys(NAMES)
    return ram, state


async def see_witness_go_on(rig: Rig, aside: PutAside, guest: GuestImage, ram: Path, state: Path) -> None:
    released = witness.hear(bytes(rig.output.released).decode().splitlines())
    assert released.faults == ()
    on_disks = [newest_record(rig.targets[name], which) for which, name in enumerate(NAMES)]
    # what the outside was shown is in the checkpoint: a record is printed when it is on both disks
    assert released.last <= min(on_disks)
    assert (released.last > 0) == (rig.cell.unharmed > 0)
    disks = [Disk(name, rig.targets[name]) for name in NAMES]
    async with start_machine(
        rig.scratch, disks, name="survivor", guest=guest, memory_mb=MEMORY_MB, ram=ram, device_state=state
    ) as survivor:
        said = await Listener(survivor.output).hear(is_enough)
        assert said.faults == (), said.faults
        assert said.agrees_with(released)
        assert said.first <= max(on_disks) + 1
        assert await survivor.guest.run("cat /proc/sys/kernel/random/boot_id") == aside.boot


def is_enough(said: Account) -> bool:
    """Whether the witness has looked at all that it has, or has found something."""
    return bool(said.faults) or len(said.records) > FULL_TURN


CHOICE = choice(SEED)


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=str(cell), marks=() if cell in CHOICE else pytest.mark.slow) for cell in CELLS]
)
async def test_kill(scratch: Path, guest: GuestImage, stopped_vm: PutAside, cell: Cell) -> None:
    print(f"{SEED_VARIABLE}={SEED} makes the choice that this was in")
    async with rig_of(scratch, cell, stopped_vm, guest) as rig:
        await blow(rig)
        if chosen := await fail_over(rig):
            await see_witness_go_on(rig, stopped_vm, guest, *chosen)


async def test_matrix_says_no_to_memory_and_disks_of_two_checkpoints(
    scratch: Path, guest: GuestImage, stopped_vm: PutAside
) -> None:
    cell = Cell(Victim.PRIMARY, Point(Moment(Step.COMMIT, after=False)))
    async with rig_of(scratch, cell, stopped_vm, guest) as rig:
        await blow(rig)
        assert await fail_over(rig)
        ram, state = scratch / "older-ram", scratch / "older-state"
        async with rig.memory() as link:
            newer, older = await link.checkpoints()
            await link.restore(older, ram, state)
        with pytest.raises(AssertionError, match="ahead of memory"):
            await see_witness_go_on(rig, stopped_vm, guest, ram, state)
        first = rig.kept("first", newer), rig.kept("first", older)
        assert await first_difference(*first) is not None
