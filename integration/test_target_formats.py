"""Copies in formats that QEMU's storage daemon writes: exact at a failover, whoever dies before.

No guest: its disks are written as it would write them, and compared byte for byte as QEMU reads the images.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from integration.faults import small_file_system
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
from integration.process import children, gone, run, start_process
from integration.test_resync import remove_bitmaps

KIB = 1 << 10
MIB = 1 << 20

#: docs/cli.md
USAGE, REFUSED = 2, 4


@dataclass
class Site:
    """Both hosts of a pair.

    :ivar images: of the VM.
    :ivar targets: what ``--disk NAME=`` gets.
    :ivar readers: how qemu-img opens each copy: arguments, the last of them the image.
    :ivar options: more of the secondary's.
    """

    scratch: Path
    images: dict[str, Path]
    targets: dict[str, Path | str]
    readers: dict[str, list[str]]
    options: list[str] = field(default_factory=list)
    port: int | None = None

    @property
    def disks(self) -> list[Disk]:
        return [Disk(name, path) for name, path in self.images.items()]

    @asynccontextmanager
    async def secondary(self) -> AsyncIterator[Controller]:
        """The secondary, the same one each time."""
        async with start_secondary(self.scratch, self.targets, port=self.port, options=self.options) as secondary:
            self.port = int(secondary.address.rpartition(":")[2])
            yield secondary

    async def fail_over(self, machine: Machine, primary: Controller, secondary: Controller) -> dict[str, Any]:
        """The VM stands still, everything is committed; the primary's host dies; the copy must be the VM's disks."""
        await self.lose_primary(machine, primary, secondary)
        return await self.take_over(secondary)

    async def lose_primary(self, machine: Machine, primary: Controller, secondary: Controller) -> None:
        await machine.pause()
        await primary.progress()
        await self.crash(machine, primary, secondary)

    async def crash(self, machine: Machine, primary: Controller, secondary: Controller) -> None:
        await primary.kill()
        await machine.kill()
        await secondary.wait_until(lambda status: status["connection"] != "connected")

    async def take_over(self, secondary: Controller) -> dict[str, Any]:
        done = await qemu_remus("failover", "--control", str(secondary.control), "--json", scratch=self.scratch)
        assert done.status == 0, done.err
        # released before the answer: nothing of ours has an image open
        assert daemons(secondary) == []
        await self.see_equal()
        answer: dict[str, Any] = json.loads(done.out)
        return answer

    async def see_equal(self) -> None:
        """Compare the copies with the VM's disks, byte for byte."""
        for name, image in self.images.items():
            raw = self.scratch / f"{name}.converted"
            done = await run(["qemu-img", "convert", "-O", "raw", *self.readers[name], str(raw)], scratch=self.scratch)
            done.check()
            # an NBD target may be larger
            with raw.open("r+b") as file:
                file.truncate(image.stat().st_size)
            assert await first_difference(image, raw) is None
            raw.unlink()


async def resize(machine: Machine, disk: str, size: int) -> None:
    """As somebody else does it, behind our back: again and again, until no filter is in."""
    with trio.fail_after(60):
        while True:
            with suppress(QmpError):
                await machine.qmp.execute("block_resize", {"node-name": f"{disk}-node", "size": size})
                return


async def until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    """Wait for something that tells nobody when it happens."""
    with trio.fail_after(timeout):
        while True:
            if condition():
                return
            await trio.sleep(0.01)


def daemons(secondary: Controller) -> list[int]:
    """Process ids of the storage daemons that the secondary has."""
    return [pid for pid in children(secondary.process.pid, "qemu-storage-daemon") if not gone(pid)]


def all_gone(pids: Sequence[int]) -> bool:
    return all(map(gone, pids))


def image_at(scratch: Path, name: str, size: int) -> Path:
    path = make_image(scratch / name, size)
    with path.open("r+b") as file:
        file.write(os.urandom(size // 2))
    return path


@pytest.fixture
def qcow2(scratch: Path) -> Site:
    """One disk, on qcow2."""
    return qcow2_in(scratch, scratch)


def qcow2_in(scratch: Path, directory: Path, *options: str, size: int = 24 * MIB + 512) -> Site:
    copy = directory / "copy"
    return Site(
        scratch,
        {"a": image_at(scratch, "a", size)},
        {"a": f"qcow2:{copy}"},
        {"a": ["-f", "qcow2", str(copy)]},
        list(options),
    )


@pytest.fixture
async def mixed(scratch: Path) -> AsyncIterator[Site]:
    """Four disks: qcow2, luks, NBD and raw, each with something odd in its name or size."""
    sizes = {"a": 24 * MIB + 512, "b": 6 * MIB + 1536, "c": 8 * MIB, "d": 4 * MIB + 512}
    images = {name: image_at(scratch, name, size) for name, size in sizes.items()}
    key = scratch / "key"
    key.write_bytes(b"a, passphrase")
    luks = {"driver": "luks", "key-secret": "s", "file": {"driver": "file", "filename": str(scratch / "b.copy")}}
    backing = make_image(scratch / "c.copy", 9 * MIB)
    socket = scratch / "nbd"
    blockdev = {"driver": "file", "node-name": "n", "filename": str(backing)}
    server = [
        *("qemu-storage-daemon", "--blockdev", json.dumps(blockdev)),
        *("--nbd-server", f"addr.type=unix,addr.path={socket}"),
        *("--export", "type=nbd,id=e,node-name=n,name=e,writable=on"),
    ]
    qcow2 = scratch / "a copy: with, signs"
    async with start_process(server, out=scratch / "server"):
        await until(socket.exists)
        yield Site(
            scratch,
            images,
            {
                "a": f"qcow2:{qcow2}",
                "b": f"luks:{scratch}/b.copy",
                "c": f"nbd+unix:///e?socket={socket}",
                "d": scratch / "d:copy",
            },
            {
                "a": ["-f", "qcow2", str(qcow2)],
                "b": ["--object", f"secret,id=s,file={key}", "json:" + json.dumps(luks)],
                # the server writes into it still, and has nothing to write
                "c": ["-U", "-f", "raw", str(backing)],
                "d": ["-f", "raw", str(scratch / "d:copy")],
            },
            [
                *("--target-option", "a=cluster_size=128k", "--target-option", "a=lazy_refcounts=on"),
                *("--target-option", "b=iter-time=10", "--target-secret", f"b={key}"),
            ],
        )


async def write_all_over(machine: Machine, seed: int) -> None:
    """Data of all alignments, zeroes and discards, on every disk."""
    for index, disk in enumerate(machine.disks):
        size = disk.image.stat().st_size
        at = (seed * 7 + index * 3) % 16 * 192 * KIB
        for command in (
            f"write -P {seed % 255 + 1} {at} 64k",
            f"write -P {seed % 241 + 2} {at + 64 * KIB - 1536} 4608",
            f"write -z {at + 8 * KIB} 12k",
            f"discard {(at + MIB) % (3 * MIB)} 128k",
            f"write -P {seed % 229 + 3} {size - 512} 512",
        ):
            await machine.qemu_io(disk.name, command)


async def test_a_failover_to_copies_of_several_formats_is_exact(mixed: Site) -> None:
    async with (
        mixed.secondary() as secondary,
        start_machine(mixed.scratch, mixed.disks) as vm,
        start_primary(mixed.scratch, vm.qmp_path, secondary.address, interval_ms=100) as primary,
    ):
        await primary.protected()
        assert len(daemons(secondary)) == 3
        for seed in range(12):
            await write_all_over(vm, seed)
        # what verify reads of the copy, it reads through the daemons
        verified = await qemu_remus("verify", "--control", str(primary.control), scratch=mixed.scratch)
        assert verified.status == 0, verified.err
        answer = await mixed.fail_over(vm, primary, secondary)
        told = {disk["name"]: (disk["format"], disk["target"]) for disk in answer["disks"]}
        assert told["a"] == ("qcow2", str(mixed.targets["a"]).removeprefix("qcow2:"))
        assert told["b"][0] == "luks"
        assert told["c"] == ("nbd", mixed.targets["c"])
        assert told["d"] == ("raw", str(mixed.targets["d"]))
        info = await run(["qemu-img", "info", "--output=json", *mixed.readers["a"][2:]], scratch=mixed.scratch)
        found = json.loads(info.check().out)
        assert found["virtual-size"] == mixed.images["a"].stat().st_size
        assert found["cluster-size"] == 128 * KIB
        assert found["format-specific"]["data"]["lazy-refcounts"] is True
        check = await run(["qemu-img", "check", *mixed.readers["a"]], scratch=mixed.scratch)
        check.check()


async def test_copies_follow_disks_that_grow(mixed: Site) -> None:
    """What an encrypted image gains reads as anything before it is written."""
    async with (
        mixed.secondary() as secondary,
        start_machine(mixed.scratch, mixed.disks) as vm,
        start_primary(mixed.scratch, vm.qmp_path, secondary.address, interval_ms=100) as primary,
    ):
        await primary.protected()
        grown = {name: mixed.images[name].stat().st_size + MIB - 512 for name in ("a", "b")}
        for name, size in grown.items():
            await resize(vm, name, size)
        await primary.wait_until(
            lambda status: {disk["name"]: disk["size"] for disk in status["disks"]}.items() >= grown.items()
        )
        for seed in range(4):
            await write_all_over(vm, seed)
        await primary.protected()
        await mixed.fail_over(vm, primary, secondary)


async def test_a_daemon_that_is_killed_again_and_again_costs_nothing(qcow2: Site) -> None:
    """At rest and while it writes: said, started again, done again; exact."""
    async with (
        qcow2.secondary() as secondary,
        start_machine(qcow2.scratch, qcow2.disks) as vm,
        start_primary(qcow2.scratch, vm.qmp_path, secondary.address, interval_ms=100) as primary,
    ):
        await primary.protected()
        [first] = daemons(secondary)
        await secondary.wait_until(lambda status: status["checkpoint"]["applied"] == committed(status))
        os.kill(first, signal.SIGKILL)
        await until(lambda: daemons(secondary) not in ([], [first]))
        await until(lambda: "killed by signal 9" in secondary.log)
        for seed in range(8):
            await write_all_over(vm, seed)
            await vm.qemu_io("a", f"write -P {seed + 1} 0 12M")
            for pid in daemons(secondary):
                # what the last one has cost may have ended it since
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        await primary.protected()
        await vm.qemu_io("a", "write -P 0x61 3M 1M")
        await primary.progress(3)
        await qcow2.fail_over(vm, primary, secondary)


async def test_a_first_copy_whose_daemon_is_killed_begins_again(qcow2: Site) -> None:
    async with (
        qcow2.secondary() as secondary,
        start_machine(qcow2.scratch, qcow2.disks) as vm,
        start_primary(
            qcow2.scratch, vm.qmp_path, secondary.address, interval_ms=100, options=["--rate", "4M"], wait=False
        ) as primary,
    ):
        await until(lambda: bool(daemons(secondary)))
        await secondary.wait_until(lambda status: status["bytes-received"] > 2 * MIB)
        [pid] = daemons(secondary)
        os.kill(pid, signal.SIGKILL)
        await primary.protected()
        await write_all_over(vm, 3)
        await qcow2.fail_over(vm, primary, secondary)


async def test_a_target_that_cannot_come_back_is_failed_and_protected_once_it_can(qcow2: Site) -> None:
    copy = qcow2.scratch / "copy"
    async with (
        qcow2.secondary() as secondary,
        start_machine(qcow2.scratch, qcow2.disks) as vm,
        start_primary(qcow2.scratch, vm.qmp_path, secondary.address, interval_ms=100) as primary,
    ):
        before = committed(await primary.protected())
        await secondary.wait_until(lambda status: status["checkpoint"]["applied"] == committed(status))
        copy.rename(qcow2.scratch / "away")
        [pid] = daemons(secondary)
        os.kill(pid, signal.SIGKILL)
        # nothing is written: it is said all the same
        held = await secondary.wait_until(lambda status: status["disk"] == "failed")
        assert str(copy) in held["reason"]
        lost = await primary.wait_until(lambda status: status["replication"] == "degraded")
        assert lost["reason"]
        await write_all_over(vm, 5)
        assert committed(await secondary.status()) >= before
        (qcow2.scratch / "away").rename(copy)
        await primary.wait_until(
            lambda status: status["replication"] == "protected" and committed(status) > before, timeout=60
        )
        await write_all_over(vm, 6)
        await qcow2.fail_over(vm, primary, secondary)


async def test_failover_says_what_it_needs_where_the_image_is_away_and_goes_on_when_it_is_back(qcow2: Site) -> None:
    copy = qcow2.scratch / "copy"
    async with (
        qcow2.secondary() as secondary,
        start_machine(qcow2.scratch, qcow2.disks) as vm,
        start_primary(qcow2.scratch, vm.qmp_path, secondary.address, interval_ms=100) as primary,
    ):
        await primary.protected()
        await write_all_over(vm, 5)
        await vm.pause()
        await primary.progress()
        [pid] = daemons(secondary)
        os.kill(pid, signal.SIGSTOP)
        copy.rename(qcow2.scratch / "away")
        os.kill(pid, signal.SIGKILL)
        await qcow2.crash(vm, primary, secondary)
        done = await qemu_remus("failover", "--control", str(secondary.control), scratch=qcow2.scratch)
        assert done.status != 0
        assert str(copy) in done.err
        (qcow2.scratch / "away").rename(copy)
        await qcow2.take_over(secondary)


async def test_a_secondary_that_is_killed_leaves_no_daemon_and_goes_on_after_its_restart(mixed: Site) -> None:
    async with AsyncExitStack() as stack:
        secondary = await stack.enter_async_context(mixed.secondary())
        vm = await stack.enter_async_context(start_machine(mixed.scratch, mixed.disks))
        primary = await stack.enter_async_context(
            start_primary(mixed.scratch, vm.qmp_path, secondary.address, interval_ms=100)
        )
        await primary.protected()
        for seed in range(3):
            await write_all_over(vm, seed)
            left = daemons(secondary)
            assert len(left) == 3
            await secondary.kill()
            secondary = await stack.enter_async_context(mixed.secondary())
            await until(partial(all_gone, left))
            await primary.progress(2)
        await mixed.fail_over(vm, primary, secondary)


async def test_a_lost_bitmap_is_compared_through_the_daemon_and_only_what_differs_is_sent(qcow2: Site) -> None:
    async with (
        qcow2.secondary() as secondary,
        start_machine(qcow2.scratch, qcow2.disks) as vm,
        start_primary(qcow2.scratch, vm.qmp_path, secondary.address, interval_ms=1000) as primary,
    ):
        before = await primary.protected()
        await remove_bitmaps(vm, "a")
        await vm.qemu_io("a", "write -P 0x77 5M 256k")
        await primary.wait_until(lambda status: status["epochs"]["lost"] > 0)
        status = await primary.wait_until(
            lambda status: status["replication"] == "protected" and committed(status) > committed(before), timeout=120
        )
        assert status["bytes-sent"] - before["bytes-sent"] <= MIB
        assert "has lost its dirty bitmap" in primary.log
        await qcow2.fail_over(vm, primary, secondary)


@pytest.mark.root
async def test_a_qcow2_image_on_a_full_file_system_is_said_and_brought_up_once_there_is_room(scratch: Path) -> None:
    with small_file_system(scratch / "images", 40 * MIB) as storage:
        site = qcow2_in(scratch, storage.path, "--sparse")
        async with (
            site.secondary() as secondary,
            start_machine(site.scratch, site.disks) as vm,
            start_primary(site.scratch, vm.qmp_path, secondary.address, interval_ms=100) as primary,
        ):
            await primary.protected()
            storage.fill(MIB)
            await vm.qemu_io("a", "write -P 0x51 13M 10M")
            held = await secondary.wait_until(lambda status: status["disk"] == "failed")
            assert "No space left" in held["reason"]
            await primary.wait_until(lambda status: status["replication"] == "degraded")
            await write_all_over(vm, 7)
            storage.empty()
            await primary.protected()
            await site.fail_over(vm, primary, secondary)


async def refused(scratch: Path, *arguments: str) -> str:
    """What ``qemu-remus secondary`` says that does not start."""
    where = ["--listen", "127.0.0.1:0", "--store", str(scratch / "store"), "--control", str(scratch / "unused")]
    done = await qemu_remus("secondary", *where, *arguments, scratch=scratch)
    assert done.status == USAGE, done.err
    assert done.err.startswith("error: ")
    assert not (scratch / "store").exists()
    return done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--disk", "a=qcow3:/srv/x"], "qcow3"),
        (["--disk", "a=qcow2,cluster_size=64k:/srv/x"], "--target-option a=KEY=VALUE"),
        (["--disk", "a=luks:/srv/x"], "--target-secret a=FILE"),
        (["--disk", "a=luks:/srv/x", "--target-secret", "a=/nonexistent"], "cannot be read"),
        (["--disk", "a=qcow2:/srv/x", "--target-option", "a=colour=blue"], "no option colour"),
        (["--disk", "a=/srv/x", "--target-option", "a=cluster_size=64k"], "a raw file or device"),
    ],
)
async def test_what_cannot_be_a_target_is_said_at_once(arguments: Sequence[str], said: str, scratch: Path) -> None:
    assert said in await refused(scratch, *arguments)


async def test_a_target_that_cannot_be_used_is_said_on_both_sides_and_left_alone(qcow2: Site) -> None:
    copy = qcow2.scratch / "copy"
    (await run(["qemu-img", "create", "-q", "-f", "vdi", str(copy), "24M"], scratch=qcow2.scratch)).check()
    before = copy.read_bytes()
    async with (
        qcow2.secondary() as secondary,
        start_machine(qcow2.scratch, qcow2.disks) as vm,
        start_primary(qcow2.scratch, vm.qmp_path, secondary.address, interval_ms=100, wait=False) as primary,
    ):
        assert await primary.process.wait() == REFUSED
        status = await secondary.status()
        for said in (primary.log, status["reason"]):
            assert "but one of vdi" in said
            assert str(copy) in said
        assert copy.read_bytes() == before
        await vm.running()
