"""A controller that is killed, or hangs, anywhere in a checkpoint of a real QEMU: the guest goes on, nothing stays.

The machines have no guest; the disks are written through their devices. ``integration/capture_driver.py`` is the
controller.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from uuid import UUID

import pytest
import trio

from integration.machine import Disk, Machine, start_machine
from integration.qemus import OTHERS
from qemu_remus.core.model import EpochNumber, Generation, NodeName, pair_name
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.attachment import open_attachment
from qemu_remus.qemu.capabilities import query_capabilities
from qemu_remus.qemu.client import open_qmp
from qemu_remus.qemu.detach import detach
from qemu_remus.qemu.discover import discover
from qemu_remus.qemu.disks import choose_disks
from qemu_remus.qemu.guardian_client import start_guardian
from qemu_remus.qemu.nodes import BitmapIdentity, is_ours

pytestmark = pytest.mark.every_qemu(slow=OTHERS)

LIMIT = 60.0
"""Seconds after which a process is given up; an idle machine takes one."""

PAIR = pair_name("driver")
GENERATION = Generation(UUID("11111111-2222-3333-4444-555555555555"))
ROOT = Path(__file__).resolve().parent.parent


def blank(directory: Path, *names: str) -> list[Disk]:
    for name in names:
        with (directory / f"{name}.img").open("wb") as image:
            image.truncate(8 << 20)
    return [Disk(name, directory / f"{name}.img") for name in names]


async def drive(
    machine: Machine,
    directory: Path,
    number: int,
    fault: str,
    point: int | str,
    *options: object,
    pause_limit: float = 30.0,
) -> int:
    """Run a controller of one checkpoint and wait until it and its guardian have ended; its exit status."""
    arguments: Sequence[object] = (
        *("--qmp", machine.qmp_path, "--directory", directory, "--generation", GENERATION, "--epoch", number),
        *("--fault", fault, "--point", point, "--pause-limit", pause_limit, *options),
    )
    command = [sys.executable, "-m", "integration.capture_driver", *map(str, arguments)]
    with trio.fail_after(LIMIT):
        process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, cwd=ROOT)
        try:
            assert process.stdout is not None
            guardian = int(await process.stdout.receive_some())
            await process.wait()
            await ended(guardian)
        finally:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode


async def ended(pid: int) -> None:
    """Wait for the end of a process that is not our child; it may have ended already."""
    with suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        try:
            await trio.lowlevel.wait_readable(handle)
        finally:
            os.close(handle)


def fleeces(directory: Path) -> list[Path]:
    return list(directory.glob("*.fleece"))


async def track(machine: Machine) -> None:
    """Begin to record, as a controller would have."""
    async with open_qmp(machine.qmp_path) as client:
        capabilities = await query_capabilities(client)
        disks = choose_disks(await discover(client, capabilities), None, capabilities)
        first = BitmapIdentity(PAIR, GENERATION, None, EpochNumber(1))
        await client.execute(commands.transaction(epoch.rotation(disks, None, first)))


async def see_what_is_left(machine: Machine, expected: dict[str, int]) -> None:
    """See that everything but the tracking was taken out by the guardian, and that no change was forgotten."""
    async with open_qmp(machine.qmp_path) as client:
        report = await detach(client, PAIR, keep_tracking=True)
        assert report.ok, report.lines()
        assert report.removed == ()
        assert await client.execute(commands.query_block_exports()) == []
        nodes = epoch.bitmaps_by_node(await client.execute(commands.query_named_block_nodes()))
    assert not [name for name in nodes if is_ours(name)]
    for disk in machine.disks:
        assert await machine.node(disk.name) == f"{disk.name}-node"
        recorded: int = sum(bitmap.count for bitmap in nodes[NodeName(f"{disk.name}-node")].values())
        assert recorded >= expected[disk.name]


async def test_sigkill_at_any_point_of_a_checkpoint_leaves_the_vm_running_and_nothing_forgotten(scratch: Path) -> None:
    async with start_machine(scratch, blank(scratch, "a", "b")) as machine:
        await track(machine)
        deaths = 0
        for point in count():
            block = point % 1024 * 4096
            await machine.qemu_io("a", f"write -P 1 {block} 4096")
            if point % 2:  # disk b is sometimes clean, which makes another sequence of commands
                await machine.qemu_io("b", f"write -P 2 {block} 4096")
            status = await drive(machine, scratch, 2 * point + 3, "kill", point)
            assert await machine.status() == "running", f"point {point}"
            await see_what_is_left(machine, {"a": 4096 * (point + 1), "b": 4096 * ((point + 1) // 2)})
            assert fleeces(scratch) == []
            if status == 0:
                break
            assert status == -signal.SIGKILL
            deaths += 1
        assert deaths > 12


async def test_a_controller_that_hangs_in_its_pause_is_killed_and_the_vm_resumed(scratch: Path) -> None:
    async with start_machine(scratch, blank(scratch, "a")) as machine:
        await track(machine)
        for number, point in enumerate(("stop", "qom-set")):
            await machine.qemu_io("a", f"write -P 1 {number * 4096} 4096")
            status = await drive(machine, scratch, 2 * number + 3, "stop", point, pause_limit=0.5)
            assert status == -signal.SIGKILL
            assert await machine.status() == "running"
            await see_what_is_left(machine, {"a": 4096})


async def test_a_pause_of_somebody_else_is_never_ended(scratch: Path) -> None:
    """The operator has paused the VM; the controller captures a checkpoint in that pause, and is killed in it."""
    async with start_machine(scratch, blank(scratch, "a")) as machine:
        await track(machine)
        await machine.qemu_io("a", "write -P 1 0 4096")
        await machine.pause()
        for point in (0, 2, 5, 8):
            assert await drive(machine, scratch, 2 * point + 3, "kill", point) == -signal.SIGKILL
            assert await machine.status() == "paused"
        await machine.resume()
        await see_what_is_left(machine, {"a": 4096})


async def test_a_guardian_that_died_is_replaced_before_the_next_pause(scratch: Path) -> None:
    async with start_machine(scratch, blank(scratch, "a")) as machine, open_qmp(machine.qmp_path) as client:
        capabilities = await query_capabilities(client)
        disks = choose_disks(await discover(client, capabilities), None, capabilities)
        async with (
            start_guardian(machine.qmp_path, PAIR) as guardian,
            open_attachment(
                client, capabilities, PAIR, disks, fleece_dir=scratch, runtime_dir=scratch, guardian=guardian
            ) as attachment,
        ):
            one, two = (BitmapIdentity(PAIR, GENERATION, None, EpochNumber(number)) for number in (1, 2))
            await attachment.start_tracking(one)
            assert guardian.pid is not None
            os.kill(guardian.pid, signal.SIGKILL)
            capture = await attachment.capture(one, two, pause=True)
            assert guardian.restarts == 1
            assert capture.disks == ()
            assert await machine.status() == "running"
