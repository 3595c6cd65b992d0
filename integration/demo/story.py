"""The story: a VM under load, checkpoints of all of it, a blow, and its life at the other host.

Owns the order of things, and what is said about them.
"""

from __future__ import annotations

import random
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trio

from integration.agent import Agent
from integration.controller import Controller, start_primary, start_secondary
from integration.demo.facts import Failed, Sample, Story
from integration.demo.judge import judge_end, judge_guest, judge_outside
from integration.demo.protection import Outside, Protection
from integration.demo.screen import Screen, milliseconds, size
from integration.demo.setting import MEMORY_MB, MIB, SIZES, disks_on, make_disks, start_load, uptime, vitals
from integration.guest.build import GuestImage, guest_image
from integration.ledger import Ledger, check_disks, stop_loads
from integration.machine import Machine, best_accelerator, start_machine
from integration.process import Process, background
from integration.toolstack import OutputBuffer, failover, memory_directory, open_backup_link, start_backup
from integration.witness import FULL_TURN
from qemu_remus.core.commands import FailoverResult
from qemu_remus.toolstack import Backup, open_backup, open_toolstack

STEPS = 8
#: Seconds between two checkpoints.
INTERVAL = 0.25
#: Seconds for which the survivor is watched, and records of the ledger beyond all that was reported before the blow.
WATCHED = 4
FURTHER = 100


@dataclass(slots=True)
class Scene:
    """What both lives of the VM have in common.

    :ivar memory: directory for the VMs' memory files.
    :ivar backup_path: socket of the memory's backup.
    """

    screen: Screen
    scratch: Path
    memory: Path
    guest: GuestImage
    secondary: Controller
    backup: Process
    backup_path: Path
    story: Story = field(default_factory=Story)


@dataclass(frozen=True, slots=True)
class Remains:
    """What is left of the first life.

    :param died: trio's time of the blow.
    """

    agent: Agent
    ledger: Ledger
    died: float


async def demonstrate(screen: Screen, scratch: Path, seconds: float) -> Story:
    """The whole story; all that it started has ended when it returns.

    :raise Failed: when anything does not hold.
    """
    screen.step("A virtual machine under load")
    guest = await trio.to_thread.run_sync(guest_image)
    await best_accelerator()
    targets = {name: scratch / f"copy-of-{name}" for name in SIZES}
    with memory_directory(4 * MEMORY_MB * MIB) as memory:
        async with start_secondary(scratch, targets) as secondary, start_backup(scratch) as (backup, backup_path):
            scene = Scene(screen, scratch, memory, guest, secondary, backup, backup_path)
            remains = await _first_life(scene, seconds)
            await _second_life(scene, remains, targets)
    screen.step("It is switched off, and its disks are checked")
    verdict = await check_disks(scratch, guest, targets["disk0"], targets["disk1"])
    _say(screen, judge_end(scene.story, verdict))
    return scene.story


# --- the first life --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FirstLife:
    """The VM on the primary's host, and what stands beside it."""

    machine: Machine
    primary: Controller
    protection: Protection
    output: OutputBuffer
    outside: Outside
    ledger: Ledger


async def _first_life(scene: Scene, seconds: float) -> Remains:
    screen, scratch = scene.screen, scene.scratch
    disks = await make_disks(scratch)
    emulated = "" if await best_accelerator() == "kvm" else "; emulated: KVM is not usable here"
    sizes = ", ".join(f"{name} {size(count)}" for name, count in SIZES.items())
    screen.note(f"{MEMORY_MB} MiB of memory; {sizes}{emulated}")
    began = trio.current_time()
    ram = scene.memory / "ram"
    async with start_machine(
        scratch, disks, name="primary-vm", guest=scene.guest, memory_mb=MEMORY_MB, ram=ram
    ) as machine:
        screen.note(f"it is up after {trio.current_time() - began:.1f} s")
        outside = Outside()
        output = OutputBuffer(machine.output, sink=outside.take)
        async with background() as nursery:
            nursery.start_soon(output.receive)
            ledger = await start_load(machine)
            for line in _LOAD:
                screen.note(line)
            screen.step("Two controllers, and a backup of the memory, beside it")
            async with (
                start_primary(scratch, machine.qmp_path, scene.secondary.address, interval_ms=None) as primary,
                open_toolstack(primary.control) as toolstack,
                open_backup_link(scene.backup_path) as backup,
            ):
                for process in (scene.secondary.process, primary.process, scene.backup):
                    screen.line(_shown(process, scratch))
                protection = Protection(machine, ram, primary, toolstack, backup, output)
                life = FirstLife(machine, primary, protection, output, outside, ledger)
                screen.step("The first copy of the disks and of the memory, while the VM runs")
                await _watch_sync(screen, life)
                scene.story.before = await vitals(machine.guest)
                for line in scene.story.before.shown():
                    screen.note(line)
                screen.step(f"Protected: a checkpoint of it all every {INTERVAL * 1000:.0f} ms, for {seconds:.0f} s")
                nursery.start_soon(protection.run, INTERVAL)
                await _watch_checkpoints(scene, life, seconds)
                screen.step("SIGKILL to QEMU and to the primary controller; the toolstack falls silent with them")
                died = await _strike(scene, life)
    return Remains(machine.guest, ledger, died)


_LOAD = (
    "the ledger: 50 numbered, checksummed records a second, each with fsync to a file on disk0 and then",
    "to a slot of disk1; beside it files come and go, and random writes, zeroes and discards;",
    "the witness: 50 times a second it compares disk0 and disk2 with its memory, changes all three, and",
    "sends a numbered record to the world, which gets it only when the checkpoint after it is committed",
)


def _shown(process: Process, scratch: Path) -> str:
    program, *arguments = process.command
    command = " ".join([Path(program).name, *arguments]).replace(f"{scratch}/", "")
    return textwrap.fill(
        command, 116, initial_indent=" " * 6, subsequent_indent=" " * 10, break_on_hyphens=False, break_long_words=False
    )


async def _watch_sync(screen: Screen, life: FirstLife) -> None:
    began = trio.current_time()
    with trio.move_on_after(300):
        while not await life.protection.first():
            status = await life.primary.status()
            if sync := status.get("sync"):
                left = sync.get("seconds-left")
                text = f"{size(sync['done-bytes'])} of {size(sync['total-bytes'])}, {size(sync['bytes-per-second'])}/s"
                text += "" if left is None else f", {left:.0f} s left"
                screen.progress(sync["done-bytes"] / max(1, sync["total-bytes"]), text)
            await trio.sleep(0.1)
        sent = (await life.primary.status())["bytes-sent"]
        [first] = life.protection.measured
        screen.note(
            f"done after {trio.current_time() - began:.1f} s: {size(sent)} of the disks, {size(first.memory_bytes)} of "
            f"memory; checkpoint {first.epoch} is committed"
        )
        return
    raise Failed(f"the VM is not protected:\n{life.primary.process.tail()}")


async def _watch_checkpoints(scene: Scene, life: FirstLife, seconds: float) -> None:
    screen, protection = scene.screen, life.protection
    screen.note("checkpoint     pause  memory sent   disks sent    records: out  held    ledger  guest up")
    end = trio.current_time() + seconds
    shown = len(protection.measured)
    first = before = int((await life.primary.status())["bytes-sent"])
    while trio.current_time() < end:
        await trio.sleep(min(1.0, max(0.0, end - trio.current_time())))
        record, up = life.ledger.last, await uptime(life.machine.guest)
        scene.story.samples.append(Sample(up, protection.captured))
        new, shown = protection.measured[shown:], len(protection.measured)
        status = await life.primary.status()
        sent, before = status["bytes-sent"] - before, status["bytes-sent"]
        scene.story.disk_bytes_sent = before - first
        screen.note(
            f"{protection.committed:>10} {milliseconds(max((each.pause for each in new), default=0.0)):>9}"
            f" {size(sum(each.memory_bytes for each in new)):>12} {size(sent):>12}"
            f" {life.outside.account.last:>15} {life.output.held_records:>5} {record:>9} {up:>7.1f} s"
        )
        if status["replication"] != "protected":
            raise Failed(f"the VM is not protected: {status.get('reason')}\n{life.primary.process.tail()}")
    if shown < 2:
        raise Failed(f"no checkpoint was committed in {seconds:.0f} s")


async def _strike(scene: Scene, life: FirstLife) -> float:
    # at no certain time after the last checkpoint
    await trio.sleep(random.uniform(0, INTERVAL))
    blow = await life.protection.strike()
    died = trio.current_time()
    with trio.move_on_after(5):
        await life.machine.guest.gone.wait()
    story, protection = scene.story, life.protection
    story.measured, story.missed = protection.measured, protection.missed
    story.committed, story.released = protection.committed, protection.released
    story.heard, story.torn, story.held = life.outside.account, life.outside.torn, life.output.held_records
    story.reported = life.ledger.last
    scene.screen.note(f"it came {blow}")
    scene.screen.note(
        f"the world has seen records 1 to {story.heard.last}; {story.held} more were held, and died with the host"
    )
    return died


# --- the second life -------------------------------------------------------------------------------------------------


class _Clocked:
    """The secondary, and how long its failover took."""

    def __init__(self, secondary: Backup) -> None:
        self._secondary = secondary
        self.seconds = 0.0
        self.offered: Sequence[int] = ()

    async def failover(self, checkpoints: Sequence[int] = (), *, force: bool = False) -> FailoverResult:
        began = trio.current_time()
        answer = await self._secondary.failover(checkpoints, force=force)
        self.seconds += trio.current_time() - began
        self.offered = checkpoints
        return answer


async def _second_life(scene: Scene, remains: Remains, targets: dict[str, Path]) -> None:
    screen, story = scene.screen, scene.story
    screen.step("Failover: disks and memory of one checkpoint, and the guest goes on")
    await scene.secondary.wait_until(lambda status: status["connection"] != "connected", timeout=30)
    async with open_backup_link(scene.backup_path) as backup, open_backup(scene.secondary.control) as control:
        clocked = _Clocked(control)
        async with failover(
            scene.scratch,
            scene.memory / "survivor-ram",
            backup,
            clocked,
            disks_on(targets),
            guest=scene.guest,
            memory_mb=MEMORY_MB,
            earlier=remains.agent,
        ) as survivor:
            story.outage = trio.current_time() - remains.died
            story.checkpoint = survivor.checkpoint
            story.disk_seconds, story.failover_seconds = clocked.seconds, survivor.seconds
            outside = Outside()
            output = OutputBuffer(survivor.machine.output, sink=outside.take, holding=False)
            async with background() as nursery:
                nursery.start_soon(output.receive)
                screen.note(
                    f"the backup has the memory of {' and '.join(map(str, clocked.offered))}; "
                    f"memory and disks are taken to checkpoint {story.checkpoint}"
                )
                screen.note(f"the guest answers {story.outage:.1f} s after the blow")
                story.after = await vitals(survivor.machine.guest)
                for line in story.after.shown():
                    screen.note(line)
                _say(screen, judge_guest(story))
                screen.step("The guest lives on")
                if await scene.secondary.stop():
                    raise Failed(f"the secondary did not end cleanly:\n{scene.secondary.process.tail()}")
                await _watch_survivor(scene, survivor.machine, output, outside, remains.ledger)
                story.heard_later = outside.account
                _say(screen, judge_outside(story))
                story.at_end = await vitals(survivor.machine.guest)
                await stop_loads(survivor.machine)
                await survivor.machine.guest.run("killall witness")
                story.reported_later = remains.ledger.last
                await survivor.machine.power_off()


async def _watch_survivor(
    scene: Scene, machine: Machine, output: OutputBuffer, outside: Outside, ledger: Ledger
) -> None:
    screen = scene.screen
    screen.note("records: out    ledger  guest up")
    for _ in range(WATCHED):
        await trio.sleep(1.0)
        up = await uptime(machine.guest)
        screen.note(f"{outside.account.last:>12} {ledger.last:>9} {up:>7.1f} s")
    await ledger.reach(scene.story.reported + FURTHER)

    def looked_at_all(_: bytes) -> bool:
        return len(outside.account.records) > 2 * FULL_TURN or bool(outside.account.faults)

    await output.wait_released(looked_at_all)


def _say(screen: Screen, facts: Iterable[str]) -> None:
    for fact in facts:
        screen.note(f"ok  {fact}")
