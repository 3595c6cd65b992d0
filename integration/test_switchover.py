"""A planned switch-over of a running pair: no write is lost, two VMs can never run, the way back sends what differs.

Who is killed, or which message the link is cut at, decides nothing but when: in the end the VM runs on the old side and
the secondary is one still, or the VM stands still for good and the secondary has taken over.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from enum import StrEnum
from pathlib import Path

import pytest
import trio

from integration.frames import FrameProxy, Moment, Passing, start_frame_proxy
from integration.harness import (
    Controller,
    Disk,
    GuestImage,
    Machine,
    first_difference,
    free_port,
    make_image,
    qemu_remus,
    start_machine,
    start_primary,
    start_secondary,
)
from integration.pair import MIB, image, pair_of
from integration.process import Finished, background

OVERHEAD = MIB
"""Bytes on the way back beyond what differs: heartbeats, digests, frames."""


async def switch_over(primary: Controller, *options: str, timeout: float = 90.0) -> Finished:
    """The command, to its end."""
    command = ("switchover", "--control", str(primary.control), "--json", *options)
    return await qemu_remus(*command, scratch=primary.directory, timeout=timeout)


async def see_equal(machine: Machine, copies: dict[str, Path]) -> None:
    for disk in machine.disks:
        assert await first_difference(disk.image, copies[disk.name]) is None, disk.name


async def test_nothing_that_a_guest_wrote_is_missing_and_the_way_back_sends_what_differs(
    scratch: Path, guest: GuestImage
) -> None:
    disks = [image(scratch, "disk0", 64 * MIB), image(scratch, "disk1", 32 * MIB)]
    async with pair_of(scratch, disks, guest=guest, interval_ms=200) as pair:
        machine = pair.machine
        device = machine.device_in_guest("disk0")
        await machine.guest.start(f"load blocks {device} 0 {32 * MIB} 200 0 1 >/dev/null")
        await pair.start_primary()
        await pair.primary.protected()
        before = await pair.primary.progress()
        done = await switch_over(pair.primary)
        answer = json.loads(done.check().out)
        assert answer["complete"]
        # it has written until the last instant, and stands still
        assert await machine.status() == "paused"
        assert await pair.primary.process.wait(30) == 0, pair.primary.log
        status = await pair.secondary.status()
        assert status["role"] == "primary"
        assert status["failover"] == {"checkpoint": answer["checkpoint"], "complete": True}
        assert status["generation"] == answer["generation"]
        await see_equal(machine, pair.targets)
        nodes = await machine.qmp.execute("query-named-block-nodes", {"flat": True})
        assert not any("remus" in entry["node-name"] or entry.get("dirty-bitmaps") for entry in nodes)
        # the old side is refused, until it is told otherwise
        await pair.start_primary(wait=False)
        assert await pair.primary.process.wait(30) == 4
        assert f"handed over to the secondary at checkpoint {answer['checkpoint']}" in pair.primary.log
        assert await machine.status() == "paused"
        await machine.kill()
        await pair.secondary.stop()
    # the past is given up by its name: the old primary's directory becomes the store
    back = scratch / "back"
    back.mkdir()
    state = pair.primary.directory / "state"
    options = ["--store", str(state), "--force-discard", before["generation"]]
    here = {disk.name: pair.targets[disk.name] for disk in disks}
    there = {disk.name: disk.image for disk in disks}
    async with (
        start_secondary(back, there, options=options) as secondary,
        start_machine(back, [Disk(name, path) for name, path in here.items()]) as vm,
    ):
        await vm.qemu_io("disk1", "write -P 0x21 3M 1M")
        async with start_primary(back, vm.qmp_path, secondary.address) as primary:
            status = await primary.protected()
            assert MIB <= status["bytes-sent"] <= MIB + OVERHEAD
            again = json.loads((await switch_over(primary)).check().out)
            assert await primary.process.wait(30) == 0
            assert (await secondary.status())["failover"]["checkpoint"] == again["checkpoint"]
            await see_equal(vm, there)


# --- killed, and cut -------------------------------------------------------------------------------------------------


class Victim(StrEnum):
    """Who, or what, is struck at a message."""

    PRIMARY = "primary"
    SECONDARY = "secondary"
    LINK = "link"


class Rig:
    """A VM and its two controllers, with a proxy between them that strikes at one message of a switch-over.

    :ivar strike: called at that message, once the VM stands still for the switch-over.
    """

    def __init__(self, scratch: Path, machine: Machine, stack: AsyncExitStack) -> None:
        self.scratch = scratch
        self.machine = machine
        self.targets = {disk.name: scratch / f"{disk.name}.copy" for disk in machine.disks}
        self.primary: Controller
        self.secondary: Controller
        self.proxy: FrameProxy
        self.point: tuple[str, Moment] | None = None
        self.strike: Callable[[], Awaitable[None]]
        self.struck = trio.Event()
        self._stack = stack
        self._port = free_port()

    async def start_secondary(self) -> None:
        self.secondary = await self._stack.enter_async_context(
            start_secondary(self.scratch, self.targets, port=self._port)
        )

    async def start_proxy(self) -> None:
        self.proxy = await self._stack.enter_async_context(start_frame_proxy(self.secondary.address, self._on_message))

    async def start_primary(self) -> None:
        self.primary = await self._stack.enter_async_context(
            start_primary(self.scratch, self.machine.qmp_path, self.proxy.address, interval_ms=100, wait=False)
        )

    async def _on_message(self, passing: Passing) -> None:
        if (passing.message, passing.moment) != self.point or self.struck.is_set():
            return
        # an ordinary epoch travels while the VM runs
        if await self.machine.status() == "paused":
            self.struck.set()
            await self.strike()

    async def kill(self, victim: Victim) -> None:
        if victim is Victim.PRIMARY:
            self.primary.process.kill()
        elif victim is Victim.SECONDARY:
            self.secondary.process.kill()
        self.proxy.cut()

    async def moved(self) -> bool:
        """Whether the VM has moved; and the two sides never disagree."""
        # in this order: a secondary that has taken over never goes back
        taken: bool = (await self.secondary.status())["role"] == "primary"
        status = await self.machine.status()
        assert not taken or status == "paused", "two VMs can run"
        return taken

    async def settle(self) -> bool:
        """Wait until nothing is in doubt any more; whether the VM has moved."""
        with trio.fail_after(60):
            while not await self.moved():
                if self.primary.process.running and await self.machine.status() == "running":
                    try:
                        if (await self.primary.status())["replication"] == "protected":
                            return False
                    except (OSError, EOFError):
                        pass
                await trio.sleep(0.05)
            assert await self.primary.process.wait() == 0, self.primary.log
        return True

    async def runs(self) -> None:
        """Wait until the VM runs."""
        with trio.fail_after(30):
            while True:
                if await self.machine.status() == "running":
                    return
                await trio.sleep(0.05)

    async def see_moved(self) -> None:
        done = await qemu_remus("failover", "--control", str(self.secondary.control), scratch=self.scratch)
        done.check()
        await see_equal(self.machine, self.targets)
        assert await self.machine.status() == "paused"


@asynccontextmanager
async def rig_of(scratch: Path) -> AsyncIterator[Rig]:
    async with (
        start_machine(scratch, [Disk("disk0", make_image(scratch / "disk0.img", 16 * MIB))]) as machine,
        background(),
        AsyncExitStack() as stack,
    ):
        rig = Rig(scratch, machine, stack)
        await rig.start_secondary()
        await rig.start_proxy()
        await rig.start_primary()
        await rig.primary.protected()
        await machine.qemu_io("disk0", "write -P 0x42 1M 1M")
        await machine.qemu_io("disk0", "write -P 0x43 5M 64k")
        yield rig


POINTS = [(message, moment) for message in ("EpochEnd", "Committed", "HandOver", "HandedOver") for moment in Moment]
OFTEN = {
    (Victim.PRIMARY, "EpochEnd", Moment.AFTER),
    (Victim.PRIMARY, "HandOver", Moment.BEFORE),
    (Victim.PRIMARY, "HandOver", Moment.AFTER),
    (Victim.SECONDARY, "HandOver", Moment.AFTER),
    (Victim.LINK, "HandOver", Moment.BEFORE),
    (Victim.LINK, "HandedOver", Moment.BEFORE),
}


@pytest.mark.parametrize(
    ("victim", "message", "moment"),
    [
        pytest.param(
            victim,
            message,
            moment,
            id=f"{victim} {moment} {message}",
            marks=() if (victim, message, moment) in OFTEN else pytest.mark.slow,
        )
        for victim in Victim
        for message, moment in POINTS
    ],
)
async def test_struck_in_a_switch_over_the_vm_is_on_one_side(
    scratch: Path, victim: Victim, message: str, moment: Moment
) -> None:
    async with rig_of(scratch) as rig, trio.open_nursery() as nursery:
        rig.point, rig.strike = (message, moment), lambda: rig.kill(victim)
        said: list[Finished] = []

        async def command() -> None:
            said.append(await switch_over(rig.primary, "--timeout", "20"))

        nursery.start_soon(command)
        with trio.fail_after(60):
            await rig.struck.wait()
        if victim is Victim.PRIMARY:
            await rig.primary.process.wait()
            if message in ("EpochEnd", "Committed") and moment is Moment.BEFORE:
                # by its guardian; nobody else is there
                await rig.runs()
            elif message.startswith("Hand"):
                assert await rig.machine.status() == "paused"
            await rig.start_primary()
        elif victim is Victim.SECONDARY:
            await rig.secondary.process.wait()
            await rig.start_secondary()
        elif message.startswith("Hand"):
            assert await rig.machine.status() == "paused"
        rig.proxy.mend()
        moved = await rig.settle()
        if message == "HandedOver":
            assert moved
        elif message != "HandOver":
            # after Committed the primary may have been quick
            assert not moved or (message, moment) == ("Committed", Moment.AFTER)
        elif moment is Moment.BEFORE:
            assert not moved
        elif victim is not Victim.SECONDARY:
            assert moved
        if not moved:
            await rig.machine.qemu_io("disk0", "write -P 0x55 9M 1M")
            (await switch_over(rig.primary)).check()
        await rig.see_moved()


async def test_a_write_after_the_last_checkpoint_keeps_the_vm_where_it_is(scratch: Path) -> None:
    async with rig_of(scratch) as rig:

        async def write() -> None:
            await rig.machine.qemu_io("disk0", "write -P 0x66 7M 64k")

        rig.point, rig.strike = ("EpochEnd", Moment.BEFORE), write
        done = await switch_over(rig.primary)
        assert done.status == 4
        assert "somebody let the VM run on" in done.err
        await rig.machine.running()
        assert not await rig.settle()
        (await switch_over(rig.primary)).check()
        await rig.see_moved()


async def test_what_takes_too_long_is_given_up_and_the_vm_runs_on(scratch: Path) -> None:
    async with rig_of(scratch) as rig:
        running = trio.Event()

        async def hold_up() -> None:
            with trio.move_on_after(60):
                await running.wait()

        rig.point, rig.strike = ("EpochEnd", Moment.BEFORE), hold_up
        done = await switch_over(rig.primary, "--timeout", "1")
        assert done.status == 1
        assert "could not be handed over in time" in done.err
        await rig.runs()
        running.set()
        assert not await rig.settle()


async def test_a_restarted_primary_in_doubt_leaves_the_vm_paused_until_the_secondary_answers(scratch: Path) -> None:
    async with rig_of(scratch) as rig, trio.open_nursery() as nursery:
        rig.point, rig.strike = ("HandOver", Moment.BEFORE), lambda: rig.kill(Victim.PRIMARY)
        nursery.start_soon(switch_over, rig.primary)
        with trio.fail_after(60):
            await rig.struck.wait()
        await rig.primary.process.wait()
        await rig.start_primary()
        status = await rig.primary.wait_until(lambda status: "not known" in (status["reason"] or ""))
        assert status["replication"] != "protected"
        assert await rig.machine.status() == "paused"
        waited = await switch_over(rig.primary, "--timeout", "1")
        assert waited.status == 7
        assert await rig.primary.stop() == 7
        assert await rig.machine.status() == "paused"
        assert "two never run" in rig.primary.log
        await rig.start_primary()
        rig.proxy.mend()
        assert not await rig.settle()
