"""The reference toolstack as processes, with real controllers, as an operator would start them; all killed at once."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import trio

from integration.harness import (
    Disk,
    GuestImage,
    Process,
    background,
    make_image,
    start_machine,
    start_primary,
    start_process,
    start_secondary,
)
from integration.toolstack import OutputBuffer, failover, memory_directory, open_backup_link, start_backup
from qemu_remus.toolstack import open_backup

MIB = 1 << 20
MEMORY_MB = 128
COUNTER = 'i=0; while true; do i=$((i+1)); echo "record $i" >&4; usleep 2000; done 4>/dev/virtio-ports/output'


def numbers(text: bytes) -> list[int]:
    """The records in the output; it must hold nothing else, but for a last line that is not whole."""
    *lines, _ = text.decode().split("\n")
    found = [re.fullmatch(r"record (\d+)", line) for line in lines]
    assert all(found), lines
    return [int(match[1]) for match in found if match]


async def released(protect: Process, count: int) -> bytes:
    """Wait until so many records went out, and return all that did."""
    with trio.fail_after(120):
        while (data := protect.out.read_bytes()).count(b"\n") < count:
            assert protect.running, protect.tail()
            await trio.sleep(0.05)
    return data


async def test_vm_that_the_command_protects_goes_on_with_all_that_was_released(
    scratch: Path, guest: GuestImage
) -> None:
    image, copy = make_image(scratch / "disk", 4 * MIB), scratch / "copy"
    with memory_directory(3 * MEMORY_MB * MIB) as directory:
        ram = directory / "ram"
        async with start_secondary(scratch, {"disk": copy}) as secondary, start_backup(scratch) as (_, path):
            async with (
                start_machine(scratch, [Disk("disk", image)], guest=guest, memory_mb=MEMORY_MB, ram=ram) as machine,
                start_primary(scratch, machine.qmp_path, secondary.address, interval_ms=None) as primary,
            ):
                port = machine.output.fileno()
                command = [sys.executable, "-m", "integration.toolstack", "protect", "--interval", "50"]
                command += ["--qmp", str(machine.spare_qmp_path), "--ram", str(ram), "--output", f"fd:{port}"]
                command += ["--control", str(primary.control), "--backup", str(path)]
                boot_id = await machine.guest.run("cat /proc/sys/kernel/random/boot_id")
                await machine.guest.start(COUNTER)
                async with start_process(
                    command, out=scratch / "released", err=scratch / "log", pass_fds=[port]
                ) as protect:
                    await released(protect, 100)
                    for process in (machine.process, primary.process, protect):
                        process.kill()
                    for process in (machine.process, primary.process, protect):
                        await process.wait()
                earlier = machine.guest
            heard = numbers((scratch / "released").read_bytes())
            assert heard == list(range(1, len(heard) + 1))
            await secondary.wait_until(lambda status: status["connection"] != "connected")
            async with (
                open_backup_link(path) as backup,
                open_backup(secondary.control) as disks,
                failover(
                    scratch,
                    directory / "survivor",
                    backup,
                    disks,
                    [Disk("disk", copy)],
                    guest=guest,
                    memory_mb=MEMORY_MB,
                    earlier=earlier,
                ) as survivor,
                background() as nursery,
            ):
                later = OutputBuffer(survivor.machine.output, holding=False)
                nursery.start_soon(later.receive)
                await later.wait_released(lambda data: data.count(b"\n") > 20)
                assert await survivor.machine.guest.run("cat /proc/sys/kernel/random/boot_id") == boot_id
                # It goes on behind all that went out. Its first line may be the rest of one; and what a checkpoint that
                # was committed had not yet let out is missing between, as lost packets are.
                _, *lines = bytes(later.released).split(b"\n")[:-1]
                goes_on = numbers(b"\n".join(lines) + b"\n")
                assert goes_on == list(range(goes_on[0], goes_on[0] + len(goes_on)))
                assert goes_on[0] > heard[-1]
