"""The reference toolstack with a real QEMU and a guest: memory exact, output held, and a VM that goes on.

The disks are not replicated here: a stand-in for the controllers copies them while the VM stands still. What a commit
or a failover answers is thereby the test's to say.
"""

from __future__ import annotations

import re
import shutil
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from integration.harness import (
    Agent,
    Disk,
    GuestImage,
    Job,
    Machine,
    Process,
    background,
    first_difference,
    make_image,
    start_machine,
)
from integration.qemus import OTHERS
from integration.toolstack import (
    MOMENTS,
    BackupLink,
    BackupLost,
    Moment,
    OutputBuffer,
    Protector,
    Step,
    failover,
    memory_directory,
    open_backup_link,
    start_backup,
)
from qemu_remus.core.errors import CommitInDoubt, EpochLost, NotConsistent, QemuRemusError, TimedOut
from qemu_remus.core.model import EpochNumber

pytestmark = pytest.mark.every_qemu(slow=OTHERS)

MIB = 1 << 20
MEMORY_MB = 128

#: Counts in its own memory; says each number on the port that stands for the network, then to us.
COUNTER = 'i=0; while true; do i=$((i+1)); echo "record $i" >&4; echo $i; usleep 2000; done 4>/dev/virtio-ports/output'
#: Fills some of the guest's memory with what does not repeat, over and over.
CHURN = "while true; do dd if=/dev/urandom of=/tmp/churn bs=64k count=16 2>/dev/null; usleep 5000; done"


class CopiedDisks:
    """Stands in for both controllers: a checkpoint of the disks is a copy, and nothing is ever lost unasked.

    :ivar finishing: errors that the next calls of ``finish`` raise, one each.
    :ivar committing: the same for ``commit``; None: it is done.
    """

    def __init__(self, directory: Path, image: Path) -> None:
        self._directory = directory
        self._image = image
        self.epoch = 0
        self.staged: int | None = None
        self.committed: int | None = None
        self.finishing: deque[QemuRemusError | None] = deque()
        self.committing: deque[QemuRemusError | None] = deque()

    def copy(self, epoch: int) -> Path:
        return self._directory / f"disk.{epoch}"

    async def prepare(self, *, timeout: float = 10.0) -> None:
        assert self.staged in (None, self.committed)

    @asynccontextmanager
    async def checkpoint(self, *, pause: bool = False, timeout: float = 10.0) -> AsyncIterator[CopiedEpoch]:
        self.epoch += 1
        shutil.copyfile(self._image, self.copy(self.epoch))
        epoch = CopiedEpoch(self, EpochNumber(self.epoch))
        try:
            yield epoch
        finally:
            if not epoch.sent and self.committed != epoch.epoch:
                await self.abort(epoch.epoch)

    async def abort(self, epoch: int, *, timeout: float = 10.0) -> None:
        self.copy(epoch).unlink()
        self.staged = None

    async def failover(self, checkpoints: Sequence[int] = (), *, force: bool = False) -> CopiedFailover:
        for checkpoint in checkpoints:
            if checkpoint in (self.staged, self.committed):
                return CopiedFailover(checkpoint)
        raise NotConsistent(f"there is {self.committed}")


@dataclass(frozen=True, slots=True)
class CopiedFailover:
    checkpoint: int


@dataclass(slots=True)
class CopiedEpoch:
    disks: CopiedDisks
    epoch: EpochNumber
    sent: bool = False

    async def finish(self, *, timeout: float = 30.0) -> None:
        if self.disks.finishing and (error := self.disks.finishing.popleft()):
            raise error
        self.disks.staged = self.epoch

    async def commit(self, *, timeout: float = 30.0) -> None:
        error = self.disks.committing.popleft() if self.disks.committing else None
        self.sent = not isinstance(error, EpochLost)
        if error:
            raise error
        self.disks.committed = self.epoch


@dataclass(slots=True)
class Setting:
    """A protected VM, and all around it.

    :ivar copies: the memory file as it was at each checkpoint, by number.
    """

    scratch: Path
    ram: Path
    machine: Machine
    disks: CopiedDisks
    backup: BackupLink
    backup_process: Process
    output: OutputBuffer
    protector: Protector
    copies: dict[int, Path]
    guest: GuestImage

    async def kill(self) -> Agent:
        """The primary host dies."""
        await self.machine.kill()
        return self.machine.guest


@asynccontextmanager
async def protected(scratch: Path, guest: GuestImage, *, keep_copies: bool = False) -> AsyncIterator[Setting]:
    image = make_image(scratch / "disk", 4 * MIB)
    disks = CopiedDisks(scratch, image)
    with memory_directory(12 * MEMORY_MB * MIB) as directory:
        ram = directory / "ram"
        copies: dict[int, Path] = {}

        async def hook(moment: Moment, epoch: int | None) -> None:
            if keep_copies and moment == Moment(Step.RESUME, after=False) and epoch:
                # just before the VM runs again: what had moved since the capture would show
                copies[epoch] = directory / f"ram.{epoch}"
                await trio.to_thread.run_sync(shutil.copyfile, ram, copies[epoch])

        async with (
            start_backup(scratch) as (process, path),
            open_backup_link(path) as backup,
            start_machine(scratch, [Disk("disk", image)], guest=guest, memory_mb=MEMORY_MB, ram=ram) as machine,
            background() as nursery,
        ):
            output = OutputBuffer(machine.output)
            nursery.start_soon(output.receive)
            protector = Protector(machine, ram, disks, backup, output, hook=hook)
            yield Setting(scratch, ram, machine, disks, backup, process, output, protector, copies, guest)
            protector.close()


def numbers(text: bytes) -> list[int]:
    """The records in the output; it must hold nothing else, but for a last line that is not whole."""
    *lines, _ = text.decode().split("\n")
    found = [re.fullmatch(r"record (\d+)", line) for line in lines]
    assert all(found), lines
    return [int(match[1]) for match in found if match]


def last(job: Job) -> int:
    return int(job.lines[-1]) if job.lines else 0


async def grow(job: Job, count: int) -> None:
    """Wait until the guest has counted so much further."""
    goal = last(job) + count
    await job.wait_until(lambda job: last(job) >= goal)


async def check_newest(setting: Setting) -> None:
    """The backup offers the last committed checkpoint alone, and has the memory as it was then."""
    committed = setting.protector.committed
    assert committed
    assert await setting.backup.checkpoints() == (committed,)
    memory = setting.ram.with_name("restored")
    await setting.backup.restore(committed, memory, setting.ram.with_name("restored-devices"))
    assert await first_difference(memory, setting.copies[committed]) is None, committed


async def test_backup_holds_the_memory_of_each_checkpoint_byte_for_byte(scratch: Path, guest: GuestImage) -> None:
    async with protected(scratch, guest, keep_copies=True) as setting:
        job = await setting.machine.guest.start(COUNTER)
        await setting.machine.guest.start(CHURN)
        setting.disks.finishing.extend((None, None, EpochLost("as asked"), TimedOut("as asked")))
        fates = []
        for _ in range(6):
            await grow(job, 10)
            fates.append(await setting.protector.checkpoint())
            await check_newest(setting)
        assert fates == [1, 2, None, None, 5, 6]
        figures = setting.protector.figures
        assert figures
        # a difference was sent, not the memory
        assert figures.memory_bytes < MEMORY_MB * MIB / 4


async def test_guest_goes_on_elsewhere_and_the_outside_misses_nothing_and_hears_nothing_twice(
    scratch: Path, guest: GuestImage
) -> None:
    async with protected(scratch, guest) as setting:
        agent = setting.machine.guest
        await agent.run("echo kept >/tmp/file; printf at-the-checkpoint | dd of=/dev/vda bs=512 conv=sync,fsync")
        boot_id = await agent.run("cat /proc/sys/kernel/random/boot_id")
        job = await agent.start(COUNTER)
        await job.wait_until(lambda job: last(job) >= 20)
        for _ in range(3):
            assert await setting.protector.checkpoint()
        uptime = float((await agent.run("cat /proc/uptime")).split()[0])
        assert await setting.protector.checkpoint() == 4
        said = last(job)
        await agent.run("echo lost >/tmp/file; printf too-late | dd of=/dev/vda bs=512 conv=sync,fsync")
        await grow(job, 20)
        earlier = await setting.kill()
        released = bytes(setting.output.released)
        disks = [Disk("disk", setting.disks.copy(4))]
        async with failover(
            scratch,
            setting.ram.with_name("survivor"),
            setting.backup,
            setting.disks,
            disks,
            guest=guest,
            memory_mb=MEMORY_MB,
            earlier=earlier,
        ) as survivor:
            assert survivor.checkpoint == 4
            later = OutputBuffer(survivor.machine.output, holding=False)
            async with background() as nursery:
                nursery.start_soon(later.receive)
                await later.wait_released(lambda data: data.count(b"\n") > 50)
            after = survivor.machine.guest
            assert await after.run("cat /proc/sys/kernel/random/boot_id") == boot_id
            assert float((await after.run("cat /proc/uptime")).split()[0]) >= uptime
            assert await after.run("cat /tmp/file") == "kept"
            assert (await after.run("head -c 17 /dev/vda")) == "at-the-checkpoint"
            await job.wait_until(lambda job: last(job) > said)
        heard = numbers(released + bytes(later.released))
        assert heard == list(range(1, len(heard) + 1))
        assert len(numbers(released)) >= 20


async def test_output_is_held_until_the_commit_of_the_checkpoint_after_it(scratch: Path, guest: GuestImage) -> None:
    async with protected(scratch, guest) as setting:
        job = await setting.machine.guest.start(COUNTER)
        await job.wait_until(lambda job: last(job) >= 20)
        assert setting.output.held_bytes > 0
        assert not setting.output.released
        seen: list[tuple[Moment, int]] = []

        async def watch(moment: Moment, epoch: int | None) -> None:
            if moment == Moment(Step.COMMIT, after=False):
                held = b"".join(data for _, data in setting.output._epochs)
                await job.wait_until(lambda job: last(job) > numbers(held)[-1] + 20)
            seen.append((moment, len(setting.output.released)))

        setting.protector._hook = watch
        setting.disks.finishing.append(EpochLost("as asked"))
        assert await setting.protector.checkpoint() is None
        assert not setting.output.released
        assert await setting.protector.checkpoint() == 2
        released = len(setting.output.released)
        assert released > 0
        assert {length for moment, length in seen[: seen.index((Moment(Step.RELEASE, after=True), released))]} == {0}
        # what was said after the pause, but before the commit, is still held
        assert numbers(bytes(setting.output.released))[-1] < last(job) - 10
        assert setting.output.held_bytes > 0


async def test_commit_in_doubt_keeps_both_memories_holds_output_and_is_asked_about_again(
    scratch: Path, guest: GuestImage
) -> None:
    async with protected(scratch, guest) as setting:
        protector, disks = setting.protector, setting.disks
        job = await setting.machine.guest.start(COUNTER)
        await job.wait_until(lambda job: last(job) >= 5)
        assert await protector.checkpoint() == 1
        disks.committing.extend((CommitInDoubt("as asked"), TimedOut("as asked")))
        assert await protector.checkpoint() == 2
        assert not disks.committing

        protector._commit_limit = 0.0
        released = len(setting.output.released)
        await grow(job, 5)
        disks.committing.extend((CommitInDoubt("as asked"), CommitInDoubt("as asked")))
        for _ in range(2):
            with pytest.raises(CommitInDoubt):
                await protector.checkpoint()
            assert await setting.machine.status() == "running"
            assert protector.in_doubt == 3
            assert await setting.backup.checkpoints() == (3, 2)
            assert len(setting.output.released) == released
        assert await protector.checkpoint() == 4
        assert protector.in_doubt is None
        assert await setting.backup.checkpoints() == (4,)
        assert len(setting.output.released) > released

        disks.committing.extend((CommitInDoubt("as asked"), EpochLost("as asked")))
        with pytest.raises(CommitInDoubt):
            await protector.checkpoint()
        disks.staged = None
        assert await protector.checkpoint() == 6
        assert await setting.backup.checkpoints() == (6,)


@pytest.mark.parametrize("staged", [True, False])
async def test_failover_in_doubt_takes_the_newest_memory_that_the_disks_have(
    scratch: Path, guest: GuestImage, staged: bool
) -> None:
    async with protected(scratch, guest) as setting:
        job = await setting.machine.guest.start(COUNTER)
        await job.wait_until(lambda job: last(job) >= 5)
        assert await setting.protector.checkpoint() == 1
        setting.protector._commit_limit = 0.0
        setting.disks.committing.append(CommitInDoubt("as asked"))
        with pytest.raises(CommitInDoubt):
            await setting.protector.checkpoint()
        earlier = await setting.kill()
        if not staged:
            setting.disks.staged = None
        expected = 2 if staged else 1
        async with failover(
            scratch,
            setting.ram.with_name("survivor"),
            setting.backup,
            setting.disks,
            [Disk("disk", setting.disks.copy(expected))],
            guest=guest,
            memory_mb=MEMORY_MB,
            earlier=earlier,
        ) as survivor:
            assert survivor.checkpoint == expected
            before = last(job)
            await job.wait_until(lambda job: last(job) != before)


async def test_protector_goes_on_with_the_difference_after_the_backup_was_killed(
    scratch: Path, guest: GuestImage
) -> None:
    async with protected(scratch, guest, keep_copies=True) as setting, AsyncExitStack() as restarts:
        await setting.machine.guest.start(CHURN)
        protector = setting.protector
        keep = protector._hook
        assert keep
        assert await protector.checkpoint() == 1

        async def kill(now: Moment, epoch: int | None) -> None:
            await keep(now, epoch)
            if now == Moment(step, after=False):
                setting.backup_process.kill()
                await setting.backup_process.wait()

        async def restart(name: str) -> None:
            setting.backup_process, path = await restarts.enter_async_context(start_backup(scratch, name=name))
            setting.backup = protector.backup = await restarts.enter_async_context(open_backup_link(path))

        for step in (Step.SEND, Step.COMPLETE, Step.SETTLE):
            before = protector.committed
            protector._hook = kill
            with pytest.raises(BackupLost):
                await protector.checkpoint()
            # before the commit the epoch is lost with the backup; after it, it counts all the same
            assert protector.committed == (setting.disks.epoch if step is Step.SETTLE else before)
            assert await setting.machine.status() == "running"
            protector._hook = keep
            await restart("backup")
            assert protector.committed in await setting.backup.checkpoints()
            assert await protector.checkpoint() == setting.disks.epoch
            assert protector.figures
            assert protector.figures.memory_bytes < MEMORY_MB * MIB / 4
            await check_newest(setting)

        await restart("another")
        # it has nothing that a difference could build on: refused once, then all is sent
        assert [await protector.checkpoint() for _ in range(2)] == [None, setting.disks.epoch]
        await check_newest(setting)


class Asked(Exception):
    """The hook was told to fail."""


async def test_vm_runs_and_memory_stays_exact_whatever_step_fails(scratch: Path, guest: GuestImage) -> None:
    async with protected(scratch, guest, keep_copies=True) as setting:
        await setting.machine.guest.start(CHURN)
        protector = setting.protector
        keep = protector._hook
        assert keep
        assert await protector.checkpoint()
        for moment in MOMENTS:

            async def fail(now: Moment, epoch: int | None, at: Moment = moment) -> None:
                await keep(now, epoch)
                if now == at:
                    raise Asked

            protector._hook = fail
            with pytest.raises(Asked):
                await protector.checkpoint()
            assert await setting.machine.status() == "running", moment
            # whatever else may be offered, the disks' last one is among it
            assert setting.disks.committed in await setting.backup.checkpoints(), moment
        protector._hook = keep
        assert await protector.checkpoint()
        await check_newest(setting)
