"""The tests' own tools: that they see what they claim to see, and above all that the ledger's check can say no."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from integration.harness import (
    SLOTS_SIZE,
    Disk,
    GuestError,
    GuestImage,
    Interface,
    Machine,
    Style,
    check_disks,
    copy_image,
    first_difference,
    make_ext4,
    make_image,
    mount,
    open_qmp,
    start_block_load,
    start_file_load,
    start_ledger,
    start_machine,
    start_proxy,
    stop_loads,
)

RECORD = 4096
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Images:
    """The two disks of a ledger."""

    first: Path
    second: Path

    async def copy_as(self, prefix: str) -> Images:
        first = await copy_image(self.first, self.first.with_name(f"{prefix}-first"))
        return Images(first, await copy_image(self.second, self.second.with_name(f"{prefix}-second")))


@asynccontextmanager
async def ledger_machine(scratch: Path, guest: GuestImage) -> AsyncIterator[tuple[Machine, Images]]:
    images = Images(await make_ext4(scratch / "first", 64 * MIB), make_image(scratch / "second", 16 * MIB))
    disks = [Disk("first", images.first), Disk("second", images.second)]
    async with start_machine(scratch, disks, guest=guest) as machine:
        await mount(machine, "first")
        yield machine, images


async def test_ledger_survives_sigkill_under_load_with_every_reported_record(scratch: Path, guest: GuestImage) -> None:
    async with ledger_machine(scratch, guest) as (machine, images):
        ledger = await start_ledger(machine, first="first", second="second", rate=0)
        await start_file_load(machine)
        await start_block_load(machine, "second", start=SLOTS_SIZE, size=8 * MIB)
        await ledger.reach(700, timeout=180)
        await machine.kill()
        reported = ledger.last
    verdict = await check_disks(scratch, guest, images.first, images.second)
    assert verdict.faults == ()
    assert verdict.in_slots >= reported


async def test_ledger_check_finds_what_is_wrong_with_either_disk(scratch: Path, guest: GuestImage) -> None:
    async with ledger_machine(scratch, guest) as (machine, images):
        ledger = await start_ledger(machine, first="first", second="second", rate=0)
        await ledger.reach(20)
        await machine.pause()
        older = await images.copy_as("older")
        await machine.resume()
        await ledger.grow(20)
        await machine.pause()
        newer = await images.copy_as("newer")

    torn = scratch / "torn"
    torn.write_bytes(newer.second.read_bytes())
    with torn.open("r+b") as file:
        file.seek(5 * RECORD + 512)
        file.write(bytes(512))
    gap = scratch / "gap"
    gap.write_bytes(newer.second.read_bytes())
    with gap.open("r+b") as file:
        file.seek(7 * RECORD)
        file.write(bytes(RECORD))
    misplaced = scratch / "misplaced"
    misplaced.write_bytes(newer.second.read_bytes())
    with misplaced.open("r+b") as file:
        file.seek(3 * RECORD)
        record = file.read(RECORD)
        file.seek(4 * RECORD)
        file.write(record)

    # one machine sees them all: it is the boot that takes the time
    checked = {
        "good": (newer.first, newer.second),
        "file-older": (older.first, newer.second),
        "slots-older": (newer.first, older.second),
        "torn-slot": (newer.first, torn),
        "gap-in-slots": (newer.first, gap),
        "slot-misplaced": (newer.first, misplaced),
    }
    found = {}
    firsts = {path: f"first{index}" for index, path in enumerate((newer.first, older.first))}
    seconds = {path: f"second{index}" for index, path in enumerate({path for _, path in checked.values()})}
    disks = [Disk(name, path) for path, name in (firsts | seconds).items()]
    async with start_machine(scratch, disks, name="checker", guest=guest) as machine:
        for case, (first, second) in checked.items():
            await machine.guest.run(f"mount -t ext4 {machine.device_in_guest(firsts[first])} /mnt")
            job = await machine.guest.start(f"ledger check /mnt/ledger {machine.device_in_guest(seconds[second])}")
            await job.wait_until(lambda job: job.ended)
            found[case] = (job.status, job.output)
            await machine.guest.run("umount /mnt")
        await machine.guest.run(f"mount -t ext4 {machine.device_in_guest(firsts[newer.first])} /mnt")
        for case, tamper in {
            "torn-file": "dd if=/dev/zero of=/mnt/ledger bs=512 seek=80 count=1 conv=notrunc",
            "gap-in-file": "dd if=/mnt/ledger of=/mnt/ledger bs=4096 skip=30 seek=20 count=1 conv=notrunc",
            "file-cut-short": "truncate -s 100000 /mnt/ledger",
        }.items():
            await machine.guest.run(f"cp /mnt/ledger /tmp/kept; {tamper}")
            device = machine.device_in_guest(seconds[newer.second])
            job = await machine.guest.start(f"ledger check /mnt/ledger {device}")
            await job.wait_until(lambda job: job.ended)
            found[case] = (job.status, job.output)
            await machine.guest.run("cp /tmp/kept /mnt/ledger")

    expected = {
        "good": (0, '"faults": []'),
        "file-older": (1, "not of one instant"),
        "slots-older": (1, "not of one instant"),
        "torn-slot": (1, "slots: torn record"),
        "gap-in-slots": (1, "slots: gap"),
        "slot-misplaced": (1, "slots: gap"),
        "torn-file": (1, "file: torn record"),
        "gap-in-file": (1, "file: gap"),
        "file-cut-short": (1, "file: part of a record"),
    }
    assert found.keys() == expected.keys()
    for case, (status, text) in expected.items():
        assert found[case][0] == status, (case, found[case])
        assert text in found[case][1], (case, found[case])


async def test_check_reports_a_damaged_file_system(scratch: Path, guest: GuestImage) -> None:
    async with ledger_machine(scratch, guest) as (machine, images):
        await (await start_ledger(machine, first="first", second="second", rate=0)).reach(5)
        await stop_loads(machine)
        await machine.power_off()
    with images.first.open("r+b") as file:
        # block and inode bitmaps of the first group lie behind superblock, descriptors and reserved descriptors
        file.seek(4096 + 4096)
        file.write(b"\xff" * (64 * 4096))
    verdict = await check_disks(scratch, guest, images.first, images.second)
    assert not verdict.good


@pytest.mark.parametrize("style", list(Style))
@pytest.mark.parametrize("interface", list(Interface))
async def test_qemu_io_writes_pass_a_filter_as_the_guest_s_do(
    scratch: Path, interface: Interface, style: Style
) -> None:
    if style is Style.IMPLICIT and interface not in (Interface.IDE, Interface.VIRTIO):
        return
    image = make_image(scratch / "disk", 4 * MIB + 512)
    make_image(scratch / "fleece", 4 * MIB + 512)
    async with start_machine(scratch, [Disk("disk", image, interface, style)]) as machine:
        await machine.qemu_io("disk", "write -P 0x11 64k 64k")
        node = await machine.node("disk")
        for name, options in {
            "fleece": {"driver": "file", "filename": str(scratch / "fleece"), "discard": "unmap"},
            "filter": {"driver": "copy-before-write", "file": node, "target": "fleece", "discard": "unmap"},
        }.items():
            await machine.qmp.execute("blockdev-add", {"node-name": name, **options})
        qdev = (await machine.block("disk"))["qdev"]
        # NVMe's bus has its device's id for a name too, so that the bare id would be ambiguous
        qdev = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
        await machine.qmp.execute("qom-set", {"path": qdev, "property": "drive", "value": "filter"})
        assert await machine.node("disk") == "filter"
        await machine.qemu_io("disk", "write -P 0x22 64k 64k")
        await machine.qemu_io("disk", "flush")
        await machine.qemu_io("disk", "discard 1M 64k")
    assert image.read_bytes()[65536:131072] == b"\x22" * 65536
    assert (scratch / "fleece").read_bytes()[65536:131072] == b"\x11" * 65536


async def test_qemu_io_helper_fails_where_qemu_io_does(scratch: Path) -> None:
    async with start_machine(scratch, [Disk("disk", make_image(scratch / "disk", MIB))]) as machine:
        await machine.qemu_io("disk", "write -P 0x11 0 4k")
        await machine.qemu_io("disk", "read -P 0x11 0 4k")
        for wrong in ("read -P 0x12 0 4k", "write 2M 4k", "no-such-command", "write"):
            with pytest.raises(AssertionError):
                await machine.qemu_io("disk", wrong)


async def test_guest_sees_each_kind_of_disk_under_the_name_that_the_harness_says(
    scratch: Path, guest: GuestImage
) -> None:
    sizes = {"a": 5, "b": 6, "c": 7, "d": 8, "e": 9}
    disks = [
        Disk("a", scratch / "a", Interface.VIRTIO, Style.IMPLICIT),
        Disk("b", scratch / "b", Interface.VIRTIO, iothread=True),
        Disk("c", scratch / "c", Interface.NVME),
        Disk("d", scratch / "d", Interface.SCSI, iothread=True),
        Disk("e", scratch / "e", Interface.SCSI, Style.DRIVE),
    ]
    for name, size in sizes.items():
        make_image(scratch / name, size * MIB)
    async with start_machine(scratch, disks, guest=guest) as machine:
        for name, size in sizes.items():
            device = machine.device_in_guest(name)
            assert await machine.guest.run(f"blockdev --getsize64 {device}") == str(size * MIB), name
        with pytest.raises(GuestError, match="ended with 3"):
            await machine.guest.run("exit 3")
    assert not machine.process.running


async def test_pause_that_fell_into_somebody_elses_does_not_pass_for_one_that_stays(scratch: Path) -> None:
    async with start_machine(scratch, []) as machine, open_qmp(machine.spare_qmp_path) as other:
        await machine.pause()
        assert await machine.stays_paused()
        await machine.resume()
        await other.execute("stop")
        await machine.pause()
        await other.execute("cont")
        assert not await machine.stays_paused()
        await other.execute("stop")
        assert not await machine.stays_paused()


async def test_machine_that_qemu_refuses_says_why(scratch: Path) -> None:
    with pytest.raises(GuestError, match="no-such-device"):
        async with start_machine(scratch, [], extra=["-device", "no-such-device"]):
            pass


async def test_first_difference_sees_one_byte_and_one_length(scratch: Path) -> None:
    one, other = scratch / "one", scratch / "other"
    one.write_bytes(bytes(3 * MIB))
    shutil.copy(one, other)
    assert await first_difference(one, other) is None
    with other.open("r+b") as file:
        file.seek(2 * MIB + 77)
        file.write(b"x")
    assert await first_difference(one, other) == 2 * MIB + 77
    assert await first_difference(one, other, length=2 * MIB + 77) is None
    one.write_bytes(bytes(5))
    other.write_bytes(bytes(6))
    assert await first_difference(one, other) == 5


async def test_proxy_passes_freezes_and_cuts() -> None:
    async def echo(stream: trio.SocketStream) -> None:
        async for data in stream:
            await stream.send_all(data)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, echo, listeners)
        async with start_proxy(f"127.0.0.1:{listeners[0].socket.getsockname()[1]}") as proxy:
            host, _, proxy_port = proxy.address.partition(":")
            async with await trio.open_tcp_stream(host, int(proxy_port)) as stream:
                await stream.send_all(b"one")
                assert await stream.receive_some() == b"one"

                proxy.freeze()
                await stream.send_all(b"two")
                with trio.move_on_after(0.2) as waited:
                    await stream.receive_some()
                assert waited.cancelled_caught
                proxy.mend()
                assert await stream.receive_some() == b"two"

                proxy.delay = 0.15
                before = trio.current_time()
                await stream.send_all(b"three")
                assert await stream.receive_some() == b"three"
                assert trio.current_time() - before >= 0.3

                proxy.cut()
                assert await stream.receive_some() == b""
            proxy.mend()
            proxy.delay = 0.0
            async with await trio.open_tcp_stream(host, int(proxy_port)) as stream:
                await stream.send_all(b"four")
                assert await stream.receive_some() == b"four"
        nursery.cancel_scope.cancel()
