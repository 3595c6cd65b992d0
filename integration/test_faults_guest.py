"""What the guest and other people do to a protected VM: reset, long pauses, shutdown, backup, mirror, overlay.

Nothing of it is hindered or undone by us, nothing of ours harms it, and what ends the protection is said.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from integration.faults import MIB
from integration.harness import Machine, QmpError, background, committed, first_difference, make_image, qemu_remus
from integration.pair import Pair, Scribbler, fill, image, pair_of, scribble

SIZE = 12 * MIB


@asynccontextmanager
async def protected_pair(
    scratch: Path, *extra: str, proxied: bool = False, heartbeat: float | None = None
) -> AsyncIterator[Pair]:
    """A VM that has been protected for a moment."""
    disks = [image(scratch, "a", 32 * MIB), image(scratch, "b", 8 * MIB + 512)]
    async with pair_of(scratch, disks, proxied=proxied, extra=extra, heartbeat=heartbeat) as pair:
        await fill(pair.machine)
        await pair.start_primary()
        await pair.primary.protected()
        yield pair


async def lost_nothing(pair: Pair) -> None:
    assert (await pair.primary.status())["epochs"]["lost"] == 0


# --- the guest, and whoever manages it -------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["in-transfer", pytest.param("at-rest", marks=pytest.mark.slow)])
async def test_a_reset_is_no_event_for_the_replication(scratch: Path, moment: str) -> None:
    # the link stands still meanwhile, and is not to be taken for lost
    async with protected_pair(scratch, "-action", "reboot=reset", proxied=True, heartbeat=60) as pair:
        if moment == "in-transfer":
            await pair.begin_transfer("a", SIZE)
        for _ in range(3):
            await pair.machine.qmp.execute("system_reset")
            await pair.machine.qmp.wait_event("RESET")
            await scribble(pair.machine, 3)
        pair.end_transfer()
        await pair.primary.progress(3)
        await lost_nothing(pair)
        await pair.see_exact_after_crash()


@pytest.mark.slow
async def test_a_vm_that_somebody_else_pauses_stays_so_for_as_long_as_he_wants(scratch: Path) -> None:
    async with protected_pair(scratch) as pair:
        await pair.put_aside()
        # its disks may change all the same, by what was under way in a device
        await scribble(pair.machine, 3)
        await pair.primary.progress(30)
        assert await pair.machine.status() == "paused"
        await lost_nothing(pair)
        await pair.machine.resume()
        await scribble(pair.machine, 4)
        await pair.primary.progress(3)
        await pair.machine.running()
        await pair.see_exact_after_crash()


@pytest.mark.slow
async def test_pauses_of_somebody_else_between_ours_are_never_ended_by_us(scratch: Path) -> None:
    async with protected_pair(scratch) as pair, background() as nursery:
        scribbler = Scribbler(pair.machine)
        nursery.start_soon(scribbler.run)
        held = 0
        for _ in range(15):
            await pair.machine.pause()
            # one that comes inside a pause of ours cannot be seen by us, and is over with it
            if await pair.machine.status() == "paused":
                await pair.primary.progress(2)
                held += await pair.machine.status() == "paused"
            await pair.machine.resume()
            await scribbler.go_on(1)
        print(f"{held} of 15 pauses held")
        assert held >= 8
        await scribbler.end()
        # one that is ended inside a checkpoint takes that along, and the next one has its changes
        await pair.primary.protected()
        await pair.see_exact_after_crash()


@pytest.mark.slow
async def test_the_last_state_of_a_guest_that_shuts_down_is_committed(scratch: Path) -> None:
    """QEMU stays, as management tools have it (``-no-shutdown``), until they have seen to everything."""
    async with protected_pair(scratch, "-action", "shutdown=pause") as pair:
        await pair.machine.qemu_io("a", f"write -P 0x51 1M {SIZE}")
        # what a guest's ACPI, and thus its power-off, comes to
        await pair.machine.qmp.execute("human-monitor-command", {"command-line": "o /w 0x604 0x2000"})
        await pair.machine.qmp.wait_event("SHUTDOWN")
        await pair.captured_from_now()
        assert await pair.machine.status() == "shutdown"
        await lost_nothing(pair)
        images = await pair.copies()
        await pair.crash()
        await pair.fail_over()
        await pair.see_equal(images)


# --- other tools -----------------------------------------------------------------------------------------------------


async def job_ended(machine: Machine, job: str) -> None:
    """Wait until a block job has ended well."""
    while True:
        event = await machine.qmp.wait_event("BLOCK_JOB_COMPLETED")
        if event["data"]["device"] == job:
            assert "error" not in event["data"], event
            return


@pytest.mark.slow
async def test_a_backup_by_another_tool_is_exact_and_costs_us_nothing(scratch: Path) -> None:
    async with protected_pair(scratch) as pair:
        machine = pair.machine
        target = make_image(scratch / "backup", 32 * MIB)
        node = {"driver": "raw", "node-name": "backup", "file": {"driver": "file", "filename": str(target)}}
        await machine.qmp.execute("blockdev-add", node)
        await pair.put_aside()
        job = {"job-id": "backup", "device": "a-node", "target": "backup", "sync": "full"}
        await machine.qmp.execute("blockdev-backup", job)
        await machine.resume()
        await scribble(machine, 3)
        await job_ended(machine, "backup")
        assert await first_difference(pair.aside(machine.disks[0]), target) is None
        await machine.qmp.execute("blockdev-del", {"node-name": "backup"})
        await pair.primary.progress(3)
        await scribble(machine, 4)
        await pair.primary.protected()
        await pair.see_exact_after_crash()


@pytest.mark.slow
async def test_a_mirror_by_another_tool_gets_ready_and_is_given_up_beside_us(scratch: Path) -> None:
    async with protected_pair(scratch) as pair:
        machine = pair.machine
        target = make_image(scratch / "mirror", 32 * MIB)
        node = {"driver": "raw", "node-name": "mirror", "file": {"driver": "file", "filename": str(target)}}
        await machine.qmp.execute("blockdev-add", node)
        job = {"job-id": "mirror", "device": "a-node", "target": "mirror", "sync": "full"}
        await machine.qmp.execute("blockdev-mirror", job)
        await scribble(machine, 3)
        await machine.qmp.wait_event("BLOCK_JOB_READY")
        # cancelled when it is ready, it leaves a copy and changes nothing
        await machine.qmp.execute("block-job-cancel", {"device": "mirror"})
        await job_ended(machine, "mirror")
        assert await first_difference(machine.disks[0].image, target) is None
        await machine.qmp.execute("blockdev-del", {"node-name": "mirror"})
        await pair.primary.progress(3)
        await scribble(machine, 4)
        await pair.primary.protected()
        await pair.see_exact_after_crash()


async def test_a_disk_goes_on_under_another_tools_overlay_and_back(scratch: Path) -> None:
    async with protected_pair(scratch) as pair:
        machine = pair.machine
        await overlay(scratch, machine)
        # its writes go where no bitmap of ours has seen them
        await machine.qemu_io("a", "write -P 0x61 20M 1M")
        before = await pair.primary.status()
        status = await pair.primary.wait_until(
            lambda now: now["disks"][0]["node"] == "overlay" and now["replication"] == "protected"
        )
        assert committed(status) > committed(before)
        assert "on node overlay instead of a-node" in pair.primary.log
        await scribble(machine, 3)
        await between_epochs(machine, "block-commit", {"job-id": "commit", "device": "overlay"})
        await machine.qmp.wait_event("BLOCK_JOB_READY")
        await machine.qmp.execute("job-complete", {"id": "commit"})
        await job_ended(machine, "commit")
        await pair.primary.wait_until(
            lambda now: now["disks"][0]["node"] == "a-node" and now["replication"] == "protected"
        )
        await scribble(machine, 4)
        await pair.see_exact_after_crash()


@pytest.mark.slow
async def test_an_overlay_over_the_filter_ends_the_protection_aloud_and_harms_nothing(scratch: Path) -> None:
    async with protected_pair(scratch, proxied=True) as pair:
        machine = pair.machine
        await pair.begin_transfer("a", SIZE)
        await overlay(scratch, machine)
        # its writes go where no bitmap of ours sees them
        await machine.qemu_io("a", "write -P 0x61 20M 1M")
        pair.end_transfer()
        await ended_or_said(pair, "Another tool")
        await machine.qemu_io("a", "read -P 0x61 20M 1M")
        await scribble(machine, 3)
        assert await machine.node("a") == "overlay"
        await machine.running()
        # what was committed before is still there, and detach does what can be done
        held = await pair.secondary.status()
        assert committed(held) > 0
        assert held["disk"] in {"up-to-date", "consistent", "outdated"}
        await pair.primary.stop()
        done = await qemu_remus("detach", "--qmp", str(machine.qmp_path), scratch=scratch)
        assert "Traceback" not in done.err
        assert "overlay" in done.out + done.err or done.status == 0
        await machine.qemu_io("a", "read -P 0x61 20M 1M")
        await scribble(machine, 4)
        assert await machine.node("a") == "overlay"


async def between_epochs(machine: Machine, command: str, arguments: dict[str, str]) -> None:
    """Do what QEMU refuses as long as a filter of ours is over the node, as another tool would: once more."""
    with trio.fail_after(60):
        while True:
            with suppress(QmpError):
                await machine.qmp.execute(command, arguments)
                return


async def overlay(scratch: Path, machine: Machine) -> None:
    """Take a snapshot as backup tools do: the guest's device gets an empty qcow2 over what it has now."""
    path = scratch / "overlay.qcow2"
    await machine.qmp.execute(
        "blockdev-add", {"driver": "file", "node-name": "overlay-file", "filename": str(make_image(path, 0))}
    )
    create = {"driver": "qcow2", "file": "overlay-file", "size": 32 * MIB}
    await machine.qmp.execute("blockdev-create", {"job-id": "create", "options": create})
    status = ""
    while status != "concluded":
        status = (await machine.qmp.wait_event("JOB_STATUS_CHANGE"))["data"]["status"]
    await machine.qmp.execute("job-dismiss", {"id": "create"})
    await machine.qmp.execute(
        "blockdev-add", {"driver": "qcow2", "node-name": "overlay", "file": "overlay-file", "backing": None}
    )
    await machine.qmp.execute("blockdev-snapshot", {"node": await machine.node("a"), "overlay": "overlay"})


async def ended_or_said(pair: Pair, word: str) -> None:
    """The primary says that the VM is not protected as it was, and why, or has ended with that."""
    try:
        status = await pair.primary.wait_until(lambda now: bool(now["reason"]), timeout=30)
        text = status["reason"]
        assert status["replication"] != "protected"
    except AssertionError:
        if pair.primary.process.running:
            raise
        text = pair.primary.log
    assert word in text
