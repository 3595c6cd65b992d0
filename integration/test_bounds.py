"""What a checkpoint may cost: an epoch of 1 GiB in bounded memory, and an epoch of nothing for one small record."""

from __future__ import annotations

from pathlib import Path

from integration.harness import Disk, make_image, start_machine, start_primary, start_secondary
from integration.images import first_difference
from integration.machine import Interface, Machine

GIB = 1 << 30
MEMORY_BOUND = 200 * 1000 * 1000
"""Bytes that either controller may take at its peak, whatever the epoch."""


def peak_memory(pid: int) -> int:
    """Bytes, as the kernel counts the largest resident set of a process so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no peak")


async def write_gib(machine: Machine, disk: str) -> None:
    for mib in range(0, 1024, 64):
        await machine.qemu_io(disk, f"write -P {1 + mib % 255} {mib}M 64M")


async def test_an_epoch_of_one_gib_is_carried_in_bounded_memory(scratch: Path) -> None:
    image = make_image(scratch / "disk0", GIB + (64 << 20) + 22_016)
    copy = scratch / "copy"
    async with (
        start_machine(scratch, [Disk("disk0", image, Interface.VIRTIO)]) as machine,
        start_secondary(scratch, {"disk0": copy}, options=["--sparse"]) as secondary,
    ):
        async with start_primary(scratch, machine.qmp_path, secondary.address) as primary:
            await primary.protected()
            assert await primary.stop() == 0
        await write_gib(machine, "disk0")
        async with start_primary(scratch, machine.qmp_path, secondary.address) as primary:
            status = await primary.protected(timeout=180)
            assert GIB <= status["bytes-sent"] < GIB * 1.1
            assert status["sync"] is None
            assert peak_memory(primary.process.pid) < MEMORY_BOUND
            assert peak_memory(secondary.process.pid) < MEMORY_BOUND
            assert await primary.stop() == 0
        await machine.kill()
        await secondary.wait_until(lambda status: status["connection"] != "connected")
        await secondary.execute("failover", {}, timeout=180)
    assert await first_difference(image, copy) is None


async def test_an_epoch_of_nothing_has_no_filter_and_costs_next_to_nothing_on_the_link(scratch: Path) -> None:
    image = make_image(scratch / "disk0", 16 << 20)
    async with (
        start_machine(scratch, [Disk("disk0", image, Interface.VIRTIO)]) as machine,
        start_secondary(scratch, {"disk0": scratch / "copy"}) as secondary,
        start_primary(scratch, machine.qmp_path, secondary.address, interval_ms=50) as primary,
    ):
        before = await primary.protected()
        after = await primary.progress(20)
        epochs = after["checkpoint"]["committed"] - before["checkpoint"]["committed"]
        # Begin, end and their headers, and heartbeats in between.
        assert after["bytes-sent"] - before["bytes-sent"] < epochs * 300 + 2_000
        assert after["backlog-bytes"] == 0
