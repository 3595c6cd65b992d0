"""A guest that powers off: the copy has all that it wrote, and QEMU ends as it does without us, whoever is killed.

QEMU makes the socket itself here, as most users' do: where a manager has opened it, it is the manager who decides when
QEMU ends, and nothing of this happens.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from integration.harness import (
    Controller,
    Disk,
    GuestImage,
    Machine,
    first_difference,
    make_image,
    qemu_remus,
    start_machine,
    start_primary,
    start_secondary,
)
from integration.machine import BOOT_TIMEOUT

MIB = 1 << 20
SELDOM = 600_000
"""Milliseconds between two checkpoints: what is committed later is so for the guest's end."""


class Site:
    """A VM with a guest, and both of its controllers."""

    def __init__(self, scratch: Path, machine: Machine, qmp: Path, secondary: Controller) -> None:
        self.scratch = scratch
        self.machine = machine
        self.qmp = qmp
        self.secondary = secondary
        self.primary: Controller

    @asynccontextmanager
    async def protected(self, *options: str, interval_ms: int = SELDOM) -> AsyncIterator[Controller]:
        async with start_primary(
            self.scratch, self.qmp, self.secondary.address, interval_ms=interval_ms, options=options
        ) as primary:
            self.primary = primary
            await primary.protected()
            yield primary

    async def write_and_power_off(self) -> None:
        """Without a pause between the two."""
        device = self.machine.device_in_guest("disk0")
        write = f"dd if=/dev/urandom of={device} bs=64k count=64 seek=16 conv=fsync 2>/dev/null"
        await self.machine.guest.start(f"{write}; poweroff -f")

    async def ended(self) -> int:
        return await self.machine.process.wait(60)

    async def held(self) -> None:
        """Wait until the guest has powered off and QEMU goes on."""
        with trio.fail_after(60):
            while True:
                if await self.machine.status() == "shutdown":
                    return
                await trio.sleep(0.02)

    async def said(self, text: str) -> None:
        """Wait until the primary, or what comes behind it, has said something."""
        with trio.fail_after(30):
            while text not in self.primary.log:  # noqa: ASYNC110 - another process's log
                await trio.sleep(0.02)

    async def see_whole(self) -> None:
        """Fail over; the copy is the image."""
        await self.secondary.wait_until(lambda status: status["connection"] != "connected")
        done = await qemu_remus("failover", "--control", str(self.secondary.control), scratch=self.scratch)
        done.check()
        assert await first_difference(self.scratch / "disk0.img", self.scratch / "disk0.copy") is None


@asynccontextmanager
async def site_of(scratch: Path, guest: GuestImage, *extra: str) -> AsyncIterator[Site]:
    qmp = scratch / "own-qmp"
    disks = [Disk("disk0", make_image(scratch / "disk0.img", 16 * MIB))]
    more = ("-qmp", f"unix:{qmp},server=on,wait=off", *extra)
    async with (
        start_secondary(scratch, {"disk0": scratch / "disk0.copy"}) as secondary,
        start_machine(scratch, disks, guest=guest, extra=more) as machine,
    ):
        yield Site(scratch, machine, qmp, secondary)


async def test_what_the_guest_wrote_last_is_committed_before_qemu_ends(scratch: Path, guest: GuestImage) -> None:
    async with site_of(scratch, guest) as site, site.protected() as primary:
        await site.write_and_power_off()
        assert await site.ended() == 0
        assert await primary.process.wait(30) == 0, primary.log
        assert "the secondary holds all that the guest has written" in primary.log
        await site.see_whole()


async def test_without_the_option_qemu_ends_at_once(scratch: Path, guest: GuestImage) -> None:
    async with site_of(scratch, guest) as site, site.protected("--no-commit-at-shutdown") as primary:
        await site.write_and_power_off()
        assert await site.ended() == 0
        assert await primary.process.wait(30) != 0


async def test_a_qemu_that_its_user_keeps_is_never_ended(scratch: Path, guest: GuestImage) -> None:
    async with site_of(scratch, guest, "-no-shutdown") as site, site.protected(interval_ms=200) as primary:
        await site.write_and_power_off()
        await site.held()
        await primary.progress()
        assert await primary.stop() == 0
        assert await site.machine.status() == "shutdown"
        await site.see_whole()


async def test_a_reset_and_a_reboot_are_none_of_our_business(scratch: Path, guest: GuestImage) -> None:
    async with site_of(scratch, guest, "-action", "reboot=reset") as site, site.protected(interval_ms=200) as primary:
        await site.machine.qmp.execute("system_reset")
        with trio.fail_after(BOOT_TIMEOUT):
            await site.machine.guest.ready(boots=2)
        await primary.progress()
        await site.machine.guest.start("reboot -f")
        with trio.fail_after(BOOT_TIMEOUT):
            await site.machine.guest.ready(boots=3)
        await primary.progress()
        await site.machine.running()


async def test_after_the_controllers_end_qemu_ends_with_its_guest_as_before(scratch: Path, guest: GuestImage) -> None:
    async with site_of(scratch, guest) as site:
        async with site.protected() as primary:
            assert await primary.stop() == 0
        await site.write_and_power_off()
        assert await site.ended() == 0


async def test_after_the_controllers_death_qemu_ends_with_its_guest_as_before(scratch: Path, guest: GuestImage) -> None:
    async with site_of(scratch, guest) as site, site.protected() as primary:
        await primary.kill()
        await site.said("removed fleece")
        await site.write_and_power_off()
        assert await site.ended() == 0


async def test_a_guest_that_ends_while_its_controller_hangs_is_not_kept(scratch: Path, guest: GuestImage) -> None:
    async with site_of(scratch, guest) as site, site.protected("--watchdog", "5") as primary:
        primary.process.signal(signal.SIGSTOP)
        await site.write_and_power_off()
        # the guardian kills it, and what comes behind it ends QEMU, and says so afterwards
        assert await site.ended() == 0
        await site.said("QEMU itself, whose guest had powered off")


async def test_with_guardian_and_all_gone_the_next_start_commits_and_ends_it(scratch: Path, guest: GuestImage) -> None:
    async with site_of(scratch, guest) as site:
        async with site.protected() as primary:
            guardian = primary.guardian
            primary.process.signal(signal.SIGSTOP)
            os.kill(guardian, signal.SIGKILL)
            await primary.kill()
        await site.write_and_power_off()
        await site.held()
        async with start_primary(scratch, site.qmp, site.secondary.address, interval_ms=SELDOM, wait=False) as primary:
            assert await site.ended() == 0
            assert await primary.process.wait(30) == 0, primary.log
        await site.see_whole()


async def test_with_nobody_left_detach_ends_it(scratch: Path, guest: GuestImage) -> None:
    async with site_of(scratch, guest) as site:
        async with site.protected() as primary:
            guardian = primary.guardian
            primary.process.signal(signal.SIGSTOP)
            os.kill(guardian, signal.SIGKILL)
            await primary.kill()
        await site.write_and_power_off()
        await site.held()
        done = await qemu_remus("detach", "--qmp", str(site.qmp), scratch=scratch)
        assert "QEMU itself, whose guest had powered off" in done.check().out
        assert await site.ended() == 0


async def test_without_a_secondary_the_end_is_not_held_off_for_long(scratch: Path, guest: GuestImage) -> None:
    async with site_of(scratch, guest) as site, site.protected() as primary:
        await site.secondary.kill()
        await primary.wait_until(lambda status: status["replication"] == "degraded")
        await site.write_and_power_off()
        assert await site.ended() == 0
        assert await primary.process.wait(30) == 1
        assert "what it wrote last could not be committed in time" in primary.log
