"""What an outage, a lost bitmap, a restarted QEMU or a failover costs: only what differs is sent; the copy is exact.

No guest: its disks are written as it would write them, and compared byte for byte at the end.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from integration.harness import (
    Controller,
    Disk,
    Machine,
    QmpError,
    committed,
    first_difference,
    make_image,
    qemu_remus,
    start_machine,
    start_primary,
    start_secondary,
)
from integration.qemus import OTHERS

pytestmark = pytest.mark.every_qemu(slow=OTHERS)

MIB = 1 << 20
SIZES = {"disk0": 96 * MIB, "disk1": 48 * MIB}
FILLED = {"disk0": 64 * MIB, "disk1": 32 * MIB}

#: Beyond what differs: heartbeats, digests (16 bytes for 64 KiB of a whole disk), frames.
OVERHEAD = MIB


@dataclass
class Site:
    """Both hosts of a pair.

    :ivar images: of the VM.
    :ivar copies: on the secondary.
    """

    scratch: Path
    images: dict[str, Path]
    copies: dict[str, Path]

    @property
    def disks(self) -> list[Disk]:
        return [Disk(name, path) for name, path in self.images.items()]

    async def fail_over(self, machine: Machine, primary: Controller, secondary: Controller) -> None:
        """Everything is written and the VM stands still; the primary's host dies; the copy must be the VM's disks."""
        await machine.pause()
        await primary.progress()
        await primary.kill()
        await machine.kill()
        await secondary.wait_until(lambda status: status["connection"] != "connected")
        done = await qemu_remus("failover", "--control", str(secondary.control), scratch=self.scratch)
        assert done.status == 0, done.err
        for name, image in self.images.items():
            assert await first_difference(image, self.copies[name]) is None


@pytest.fixture
def site(scratch: Path) -> Site:
    images = {name: make_image(scratch / name, size) for name, size in SIZES.items()}
    for name, count in FILLED.items():
        with images[name].open("r+b") as file:
            file.write(os.urandom(count))
    return Site(scratch, images, {name: scratch / f"copy-of-{name}" for name in SIZES})


@asynccontextmanager
async def again(site: Site, secondary: Controller, *options: str) -> AsyncIterator[Controller]:
    """The same secondary, started anew."""
    port = int(secondary.address.rpartition(":")[2])
    async with start_secondary(site.scratch, site.copies, port=port, options=options) as restarted:
        yield restarted


async def sent_until_protected(primary: Controller, before: dict[str, object]) -> int:
    """Bytes sent since then, once a later checkpoint is committed."""
    status = await primary.wait_until(
        lambda status: status["replication"] == "protected" and committed(status) > committed(before), timeout=120
    )
    return int(status["bytes-sent"]) - int(str(before["bytes-sent"]))


async def test_after_an_outage_only_the_difference_crosses_and_the_last_checkpoint_stays_usable(site: Site) -> None:
    async with (
        start_secondary(site.scratch, site.copies) as secondary,
        start_machine(site.scratch, site.disks) as vm,
        start_primary(site.scratch, vm.qmp_path, secondary.address) as primary,
    ):
        before = await primary.protected()
        await secondary.kill()
        for number in range(24):
            await vm.qemu_io("disk0", f"write -P {number + 1} {number}M 1M")
        async with again(site, secondary) as restarted:
            status = await restarted.wait_until(lambda status: status["connection"] == "connected")
            assert status["disk"] != "inconsistent"
            sent = await sent_until_protected(primary, before)
            assert 24 * MIB <= sent <= 1.1 * 24 * MIB + OVERHEAD
            await vm.qemu_io("disk1", "write -P 0x77 5M 256k")
            await site.fail_over(vm, primary, restarted)


async def test_a_disk_whose_bitmap_was_removed_is_compared_and_no_other(site: Site) -> None:
    async with (
        start_secondary(site.scratch, site.copies) as secondary,
        start_machine(site.scratch, site.disks) as vm,
        start_primary(site.scratch, vm.qmp_path, secondary.address, interval_ms=1000) as primary,
    ):
        before = await primary.protected()
        await remove_bitmaps(vm, "disk1")
        await vm.qemu_io("disk1", "write -P 0x77 5M 256k")
        await vm.qemu_io("disk0", "write -P 0x78 5M 256k")
        await primary.wait_until(lambda status: status["epochs"]["lost"] > 0)
        sent = await sent_until_protected(primary, before)
        # all of disk1 was compared: a digest of 16 bytes for each 64 KiB, and no more
        assert sent <= 512 * 1024 + SIZES["disk1"] // 65536 * 16 + OVERHEAD // 4
        assert "disk1 has lost its dirty bitmap" in primary.log
        await site.fail_over(vm, primary, secondary)


async def remove_bitmaps(vm: Machine, disk: str) -> None:
    """As another tool would: at a moment when QEMU lets it."""
    while True:
        nodes = await vm.qmp.execute("query-named-block-nodes", {"flat": True})
        names = [
            bitmap["name"]
            for node in nodes
            if node["node-name"] == f"{disk}-node"
            for bitmap in node.get("dirty-bitmaps", [])
            if bitmap.get("name")
        ]
        try:
            for name in names:
                await vm.qmp.execute("block-dirty-bitmap-remove", {"node": f"{disk}-node", "name": name})
        except QmpError:
            continue
        if names:
            return


async def test_a_restarted_qemu_is_compared_and_only_what_differs_is_sent(site: Site) -> None:
    async with start_secondary(site.scratch, site.copies) as secondary:
        async with (
            start_machine(site.scratch, site.disks) as vm,
            start_primary(site.scratch, vm.qmp_path, secondary.address) as primary,
        ):
            await primary.protected()
            await vm.kill()
            assert await primary.process.wait(30) != 0
        with site.images["disk0"].open("r+b") as file:
            file.seek(40 * MIB)
            file.write(os.urandom(2 * MIB))
        async with (
            start_machine(site.scratch, site.disks, name="restarted") as vm,
            start_primary(site.scratch, vm.qmp_path, secondary.address) as primary,
        ):
            status = await primary.protected()
            assert 2 * MIB <= status["bytes-sent"] <= 2 * MIB + OVERHEAD
            await vm.qemu_io("disk1", "write -P 0x56 1M 2M")
            await site.fail_over(vm, primary, secondary)


async def test_after_a_failover_the_old_host_gets_only_what_differs(site: Site) -> None:
    async with start_secondary(site.scratch, site.copies) as secondary, start_machine(site.scratch, site.disks) as vm:
        async with start_primary(site.scratch, vm.qmp_path, secondary.address) as primary:
            await primary.protected()
            await site.fail_over(vm, primary, secondary)
        # the old host's disks went on a little, unseen
        with site.images["disk0"].open("r+b") as file:
            file.write(os.urandom(MIB))
    back = site.scratch / "back"
    back.mkdir()
    home = Site(back, site.copies, site.images)
    async with (
        start_secondary(back, home.copies, options=["--overwrite"]) as secondary,
        start_machine(back, home.disks) as vm,
    ):
        await vm.qemu_io("disk1", "write -P 0x21 3M 1M")
        async with start_primary(back, vm.qmp_path, secondary.address) as primary:
            status = await primary.protected()
            assert 2 * MIB <= status["bytes-sent"] <= 2 * MIB + OVERHEAD
            await home.fail_over(vm, primary, secondary)


def flushed(site: Site) -> int:
    """Up to where the secondary's store says that the first copy is durable."""
    superblock = (site.scratch / "secondary" / "store" / "superblock").read_bytes()
    found = re.search(rb'"flushed": (\d+)', superblock)
    return int(found[1]) if found else 0


@pytest.mark.slow
@pytest.mark.parametrize("compared", [False, True], ids=["onto-new-images", "onto-old-images"])
async def test_a_first_copy_that_is_interrupted_goes_on_where_it_was(site: Site, compared: bool) -> None:
    if compared:
        for name, size in SIZES.items():
            site.copies[name].write_bytes(os.urandom(size))
    rate = ["--rate", "5M"]
    async with (
        start_secondary(site.scratch, site.copies, options=["--overwrite"]) as secondary,
        start_machine(site.scratch, site.disks) as vm,
        start_primary(site.scratch, vm.qmp_path, secondary.address, options=rate) as primary,
    ):
        before = await primary.wait_until(lambda _: flushed(site) >= 32 * MIB)
        # what is sent and not flushed is torn, lost, or there
        await secondary.kill()
        kept = flushed(site)
        # on either side of where it goes on
        await vm.qemu_io("disk0", "write -P 0x31 3M 1M")
        await vm.qemu_io("disk0", f"write -P 0x32 {kept - 256 * 1024} 512k")
        await vm.qemu_io("disk0", "write -z 60M 1M")
        await vm.qemu_io("disk1", "write -P 0x33 9M 1M")
        async with again(site, secondary, "--overwrite") as restarted:
            status = await primary.protected()
            assert re.search(rf"the first copy of the disks goes on +done_bytes={kept}$", restarted.log, re.MULTILINE)
            whole = sum(SIZES.values() if compared else FILLED.values())
            sent = status["bytes-sent"] - before["bytes-sent"]
            assert sent <= whole - kept + 16 * MIB
            await vm.qemu_io("disk1", "write -P 0x34 1M 64k")
            await site.fail_over(vm, primary, restarted)


@pytest.mark.slow
async def test_a_first_copy_whose_bitmap_is_gone_begins_anew(site: Site) -> None:
    async with (
        start_secondary(site.scratch, site.copies) as secondary,
        start_machine(site.scratch, site.disks) as vm,
        start_primary(site.scratch, vm.qmp_path, secondary.address, options=["--rate", "5M"]) as primary,
    ):
        await primary.wait_until(lambda _: flushed(site) >= 32 * MIB)
        await secondary.kill()
        await remove_bitmaps(vm, "disk1")
        await vm.qemu_io("disk0", "write -P 0x31 3M 1M")
        await vm.qemu_io("disk1", "write -P 0x33 9M 1M")
        async with again(site, secondary) as restarted:
            await primary.protected()
            assert "lost its dirty bitmap" in primary.log
            await site.fail_over(vm, primary, restarted)


@asynccontextmanager
async def taken_over(site: Site) -> AsyncIterator[tuple[Controller, str]]:
    """A pair whose secondary has failed over, and whose old host is back, a little further than the copy.

    Yields the secondary, and the generation of the old primary.
    """
    async with start_secondary(site.scratch, site.copies) as secondary, start_machine(site.scratch, site.disks) as vm:
        async with start_primary(site.scratch, vm.qmp_path, secondary.address) as primary:
            await primary.protected()
            old = str((await primary.status())["generation"])
            await site.fail_over(vm, primary, secondary)
        with site.images["disk0"].open("r+b") as file:
            file.write(os.urandom(MIB))
        yield secondary, old


async def refused(site: Site, store: Path, generation: str) -> str:
    """What ``qemu-remus secondary --force-discard`` says that does not start."""
    disks = [f"--disk={name}={path}" for name, path in site.images.items()]
    where = ["--listen", "127.0.0.1:0", "--store", str(store), "--control", str(site.scratch / "unused")]
    done = await qemu_remus("secondary", *where, *disks, "--force-discard", generation, scratch=site.scratch)
    assert done.status == 2
    return done.err


async def test_an_old_primary_is_refused_until_its_data_are_given_up_by_name(site: Site) -> None:
    """Then its directory is a secondary's store, and the store that failed over the primary's directory."""
    state, store = site.scratch / "primary" / "state", site.scratch / "secondary" / "store"
    async with taken_over(site) as (secondary, old):
        new = str((await secondary.status())["generation"])
        async with (
            start_machine(site.scratch, site.disks, name="returned") as vm,
            start_primary(site.scratch, vm.qmp_path, secondary.address, wait=False) as primary,
        ):
            assert await primary.process.wait(30) == 4
            assert "has failed over" in primary.log
            assert f"--force-discard {old}" in primary.log
        assert f"not generation {new}" in await refused(site, state, new)
    back = site.scratch / "back"
    back.mkdir()
    home = Site(back, site.copies, site.images)
    given_up = ["--store", str(state), "--force-discard", old]
    async with (
        start_secondary(back, home.copies, options=given_up) as secondary,
        start_machine(back, home.disks) as vm,
    ):
        await vm.qemu_io("disk1", "write -P 0x21 3M 1M")
        options = ["--state-dir", str(store)]
        async with start_primary(back, vm.qmp_path, secondary.address, options=options) as primary:
            status = await primary.protected()
            assert 2 * MIB <= status["bytes-sent"] <= 2 * MIB + OVERHEAD
            assert status["generation"] not in {old, new}
            await home.fail_over(vm, primary, secondary)


async def test_a_failover_can_be_given_up_for_the_old_primary_that_lives_on(site: Site) -> None:
    async with taken_over(site) as (secondary, _):
        new = str((await secondary.status())["generation"])
        await secondary.stop()
        # the copy was started from, and went on
        with site.copies["disk1"].open("r+b") as file:
            file.write(os.urandom(MIB))
        async with (
            again(site, secondary, "--force-discard", new) as given_up,
            start_machine(site.scratch, site.disks, name="returned") as vm,
            start_primary(site.scratch, vm.qmp_path, secondary.address) as primary,
        ):
            status = await primary.protected()
            assert 2 * MIB <= status["bytes-sent"] <= 2 * MIB + OVERHEAD
            await vm.qemu_io("disk1", "write -P 0x22 5M 1M")
            await site.fail_over(vm, primary, given_up)


async def test_a_difference_that_the_journal_cannot_hold_waits_for_leave(site: Site) -> None:
    small = ("--journal-limit", "128M")
    async with (
        start_secondary(site.scratch, site.copies, options=small) as secondary,
        start_machine(site.scratch, site.disks) as vm,
        start_primary(site.scratch, vm.qmp_path, secondary.address) as primary,
    ):
        before = await primary.protected()
        await secondary.kill()
        for number in range(96):
            await vm.qemu_io("disk0", f"write -P {number + 1} {number}M 1M")
        for number in range(48):
            await vm.qemu_io("disk1", f"write -P {number + 1} {number}M 1M")
        async with again(site, secondary, *small) as restarted:
            waiting = await primary.wait_until(lambda status: "journal" in (status["reason"] or ""), timeout=60)
            assert waiting["replication"] != "protected"
            kept = await restarted.status()
            assert committed(kept) >= committed(before)
            assert kept["disk"] != "inconsistent"
            assert await primary.stop() == 0
            leave = ["--allow-inconsistent-resync"]
            async with start_primary(site.scratch, vm.qmp_path, secondary.address, options=leave) as allowed:
                status = await allowed.protected()
                assert status["bytes-sent"] <= 2.2 * 144 * MIB + OVERHEAD
                await site.fail_over(vm, allowed, restarted)
