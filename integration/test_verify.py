"""``qemu-remus verify``: the copy is compared while the VM writes and epochs go on; what differs is found and repaired.

The copy is damaged behind the secondary's back, by writing to its images. Nothing of it may be missed, and nothing that
the VM writes may be taken for damage.
"""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import trio

from integration.controller import PROGRAM, Status
from integration.harness import (
    Disk,
    Machine,
    QmpError,
    background,
    committed,
    copy_image,
    first_difference,
    qemu_remus,
    start_machine,
    start_primary,
    start_secondary,
)
from integration.pair import KIB, MIB, Pair, Scribbler, fill, image, pair_of
from integration.process import start_process
from qemu_remus.core.errors import NotProtected
from qemu_remus.toolstack import open_toolstack

ODD = 40 * MIB + 22_016
"""A disk's size that is no multiple of 4 or 64 KiB."""

DIFFERENT = 8
INTERRUPTED = 130


def two_disks(scratch: Path) -> list[Disk]:
    return [image(scratch, "a", ODD), image(scratch, "b", 8 * MIB + 512)]


async def verify(pair: Pair, *options: str, expected: int = 0) -> dict[str, Any]:
    """Run the command to its end; its result."""
    command = ("verify", "--control", str(pair.primary.control), "--json", *options)
    done = await qemu_remus(*command, scratch=pair.scratch, timeout=120)
    assert done.status == expected, f"{done.out}{done.err}\n{pair.primary.process.tail()}"
    result: dict[str, Any] = json.loads(done.out)
    return result


def ranges(result: dict[str, Any]) -> list[tuple[str, int, int]]:
    return [(one["disk"], one["offset"], one["length"]) for one in result["ranges"]]


def damage(target: Path, offset: int, length: int) -> None:
    """Invert some bytes of an image."""
    with target.open("r+b") as file:
        file.seek(offset)
        data = file.read(length)
        assert len(data) == length
        file.seek(offset)
        file.write(bytes(byte ^ 0xFF for byte in data))


class Storm:
    """Writes all over the disks, at random, until it is cancelled."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._random = random.Random(11)
        self.writes = 0

    async def run(self) -> None:
        """To be started in a nursery."""
        while True:
            disk = self._random.choice(self._machine.disks)
            sectors = disk.image.stat().st_size // 512
            length = min(self._random.choice((1, 8, 9, 200)), sectors)
            at = self._random.randrange(sectors - length + 1)
            kind = self._random.choice(("-z", "-P 0", *(f"-P {self._random.randrange(256)}" for _ in range(6))))
            await self._machine.qemu_io(disk.name, f"write {kind} {at * 512} {length * 512}")
            self.writes += 1


async def test_a_vm_that_writes_everywhere_is_no_false_alarm_and_epochs_go_on(scratch: Path) -> None:
    async with pair_of(scratch, two_disks(scratch), interval_ms=200) as pair, background() as nursery:
        await fill(pair.machine)
        scribbler, storm = Scribbler(pair.machine), Storm(pair.machine)
        nursery.start_soon(scribbler.run)
        nursery.start_soon(storm.run)
        await pair.start_primary()
        await pair.primary.protected()
        for _ in range(4):
            before, writes = await pair.primary.status(), storm.writes
            result = await verify(pair, "--rate", "24M")
            after = await pair.primary.status()
            assert result["state"] == "completed"
            assert ranges(result) == []
            assert result["differing-bytes"] == 0
            assert result["done-bytes"] == result["total-bytes"] == ODD + 8 * MIB + 512
            assert committed(after) >= committed(before) + 3
            assert after["epochs"]["lost"] == before["epochs"]["lost"]
            assert storm.writes > writes


DAMAGES = [
    ("a", 0, 1),
    ("a", 2 * MIB + 5000, 100),  # written
    ("a", 12 * MIB + 4 * KIB, 12 * KIB),  # never written
    ("a", 30 * MIB - 2, 4),  # across a block's border
    ("a", ODD - 1, 1),
    ("b", 5 * MIB, 1 * MIB),
    ("b", 8 * MIB + 511, 1),
]
FOUND = [
    ("a", 0, 4 * KIB),
    ("a", 2 * MIB + 4 * KIB, 4 * KIB),
    ("a", 12 * MIB + 4 * KIB, 12 * KIB),
    ("a", 30 * MIB - 4 * KIB, 8 * KIB),
    ("a", ODD // 4096 * 4096, ODD % 4096),
    ("b", 5 * MIB, 1 * MIB),
    ("b", 8 * MIB, 512),
]


async def write_elsewhere(machine: Machine) -> None:
    """Write in the background where nothing is damaged."""
    number = 0
    while True:
        number += 1
        await machine.qemu_io("a", f"write -P {number % 255 + 1} {16 * MIB + number % 500 * 8192} 4k")
        await machine.qemu_io("b", f"write -P {number % 255 + 1} {2 * MIB + number % 100 * 8192} 4k")


async def damaged(pair: Pair) -> None:
    """Damage the copy, once the images hold what was written there."""
    least = await pair.captured_from_now()
    await pair.secondary.wait_until(lambda now: (now["checkpoint"]["applied"] or 0) >= least)
    for name, offset, length in DAMAGES:
        damage(pair.targets[name], offset, length)


async def test_exactly_what_is_damaged_is_found_and_repaired(scratch: Path) -> None:
    async with pair_of(scratch, two_disks(scratch), interval_ms=200) as pair:
        await fill(pair.machine)
        await pair.start_primary()
        await pair.primary.protected()
        async with background() as nursery:
            nursery.start_soon(write_elsewhere, pair.machine)
            await damaged(pair)
            for _ in range(2):
                # Without --repair nothing is changed: the second finds the same.
                result = await verify(pair, expected=DIFFERENT)
                assert ranges(result) == FOUND
                assert result["differing-ranges"] == len(FOUND)
                assert result["repaired-bytes"] == 0
            only = await verify(pair, "--disk", "b", expected=DIFFERENT)
            assert ranges(only) == FOUND[-2:]
            repaired = await verify(pair, "--repair")
            assert ranges(repaired) == FOUND
            assert repaired["repaired-bytes"] == repaired["differing-bytes"] == sum(length for _, _, length in FOUND)
            assert ranges(await verify(pair)) == []
        await pair.see_exact_after_crash()


async def test_damage_is_found_in_the_storm_and_the_rest_of_a_written_block_is_not_hidden(scratch: Path) -> None:
    async with pair_of(scratch, [image(scratch, "a", 24 * MIB)], interval_ms=200) as pair:
        await pair.machine.qemu_io("a", "write -P 0x61 0 24M")
        await pair.start_primary()
        await pair.primary.protected()
        least = await pair.captured_from_now()
        await pair.secondary.wait_until(lambda now: (now["checkpoint"]["applied"] or 0) >= least)
        # every 64 KiB is damaged in its second 4 KiB and written all the time in its first
        for at in range(0, 24 * MIB, MIB):
            damage(pair.targets["a"], at + 4 * KIB, 4 * KIB)

        async def hammer() -> None:
            number = 0
            while True:
                number += 1
                await pair.machine.qemu_io("a", f"write -P {number % 256} {number % 24 * MIB} 4k")

        async with background() as nursery:
            nursery.start_soon(hammer)
            result = await verify(pair, "--repair")
            assert ranges(result) == [("a", at + 4 * KIB, 4 * KIB) for at in range(0, 24 * MIB, MIB)]
            assert ranges(await verify(pair)) == []
        await pair.see_exact_after_crash()


async def begin(pair: Pair, **arguments: Any) -> None:
    await pair.primary.execute("verify", arguments)


def state(status: Status) -> str:
    return str(status["verify"]["state"])


async def test_a_lost_link_suspends_it_and_it_ends_well_when_the_link_is_back(scratch: Path) -> None:
    async with pair_of(scratch, two_disks(scratch), proxied=True, heartbeat=1.5, interval_ms=200) as pair:
        await fill(pair.machine)
        await pair.start_primary()
        await pair.primary.protected()
        await damaged(pair)
        async with background() as nursery:
            nursery.start_soon(write_elsewhere, pair.machine)
            # A disk that is full of data, so that the rate makes it last.
            await pair.machine.qemu_io("a", "write -P 0x44 20M 20M")
            await begin(pair, rate=8 * MIB, repair=True)
            # the link may have been lost, and found again, before: to a machine that is busy, so short a silence is one
            await pair.primary.wait_until(
                lambda now: now["verify"]["done-bytes"] > 0 and now["replication"] == "verifying"
            )
            assert pair.proxy
            pair.proxy.freeze()
            await pair.primary.wait_until(lambda now: state(now) == "suspended" and now["replication"] == "degraded")
            pair.proxy.mend()
            ended = await pair.primary.wait_until(lambda now: state(now) not in {"running", "suspended"}, timeout=90)
            assert state(ended) == "completed", ended["verify"]
            assert ended["verify"]["repaired-bytes"] == ended["verify"]["differing-bytes"]
            assert ranges(await verify(pair)) == []
        await pair.see_exact_after_crash()


async def test_it_is_cancelled_by_ctrl_c_and_by_command_and_refuses_a_second_one(scratch: Path) -> None:
    async with pair_of(scratch, two_disks(scratch), interval_ms=200) as pair:
        await pair.start_primary()
        await pair.primary.protected()
        await pair.machine.qemu_io("a", "write -P 0x44 0 40M")
        command = [PROGRAM, "verify", "--control", str(pair.primary.control), "--rate", "1M"]
        async with start_process(command, out=scratch / "verify.out", err=scratch / "verify.err") as process:
            await pair.primary.wait_until(lambda now: now["verify"] is not None)
            with pytest.raises(QmpError, match="under way"):
                await begin(pair)
            process.signal(signal.SIGINT)
            assert await process.wait() == INTERRUPTED
            assert "ended early" in process.out.read_text()
        assert state(await pair.primary.status()) == "cancelled"
        await begin(pair, rate=MIB)
        await pair.primary.execute("verify-cancel")
        assert state(await pair.primary.status()) == "cancelled"
        with pytest.raises(QmpError, match="no verification"):
            await pair.primary.execute("verify-cancel")
        assert (await pair.primary.protected())["epochs"]["lost"] == 0
        await pair.primary.progress(3)


async def test_it_is_refused_where_it_makes_no_sense(scratch: Path) -> None:
    async with pair_of(scratch, two_disks(scratch), interval_ms=200) as pair:
        await pair.start_primary()
        await pair.primary.protected()
        for arguments, words in (
            ({"disks": ["c"]}, "no disk c"),
            ({"rate": 1000}, "too slow"),
            ({"rate": -1}, "rate"),
            ({"disks": "a"}, "disks"),
            ({"repair": 1}, "repair"),
        ):
            with pytest.raises(QmpError, match=words):
                await pair.primary.execute("verify", arguments)
        assert (await pair.primary.status())["verify"] is None
        wrong = await qemu_remus("verify", "--control", str(pair.secondary.control), scratch=scratch)
        assert wrong.status == 4
        assert "not a primary" in wrong.err
        slow = await qemu_remus("verify", "--control", str(pair.primary.control), "--rate", "1K", scratch=scratch)
        assert slow.status == 2
        await pair.secondary.kill()
        await pair.primary.wait_until(lambda now: now["connection"] != "connected")
        lost = await qemu_remus("verify", "--control", str(pair.primary.control), scratch=scratch)
        assert lost.status == 4
        assert "error: " in lost.err


async def test_a_controller_that_is_stopped_meanwhile_leaves_nothing_behind(scratch: Path) -> None:
    async with pair_of(scratch, two_disks(scratch), interval_ms=200) as pair:
        await pair.start_primary()
        await pair.primary.protected()
        await pair.machine.qemu_io("a", "write -P 0x44 0 40M")
        await begin(pair, rate=16 * MIB)
        await pair.primary.wait_until(lambda now: now["verify"]["done-bytes"] > 0)
        assert await pair.primary.stop() == 0
        await pair.left_alone()
        await pair.start_primary()
        await pair.primary.protected()
        assert (await verify(pair))["state"] == "completed"
        with trio.fail_after(60):
            await pair.see_exact_after_crash()


async def test_a_toolstacks_checkpoints_go_on_and_their_images_are_exact(scratch: Path) -> None:
    """The VM is paused in the middle of slices; what the checkpoint holds is what the disk held then."""
    disk = image(scratch, "a", 48 * MIB)
    target = scratch / "copy"
    async with (
        start_secondary(scratch, {"a": target}) as secondary,
        start_machine(scratch, [disk]) as vm,
        start_primary(scratch, vm.qmp_path, secondary.address, interval_ms=None) as primary,
    ):
        await vm.qemu_io("a", "write -P 0x71 0 48M")
        async with open_toolstack(primary.control) as toolstack:

            async def checkpoint(*, prepared: bool) -> None:
                with trio.fail_after(60):
                    while True:
                        try:
                            if prepared:
                                await toolstack.prepare()
                            await vm.pause()
                            began = await toolstack.start()
                            break
                        except NotProtected:
                            await vm.resume()
                            await trio.sleep(0.05)
                aside = await copy_image(disk.image, scratch / "aside")
                await vm.resume()
                await began.finish()
                await began.commit()
                images[began.epoch] = aside

            images: dict[int, Path] = {}
            for _ in range(2):
                await checkpoint(prepared=True)
            for name, offset, length in (("a", MIB, 10), ("a", 40 * MIB, 4 * KIB)):
                assert name == "a"
                await secondary.wait_until(lambda now: now["backlog-bytes"] == 0)
                damage(target, offset, length)
            await primary.execute("verify", {"rate": 12 * MIB, "repair": True})

            async def write() -> None:
                number = 0
                while True:
                    number += 1
                    await vm.qemu_io("a", f"write -P {number % 256} {number % 40 * MIB + 512 * KIB} 8k")

            rounds = 0
            async with background() as nursery:
                nursery.start_soon(write)
                with trio.fail_after(120):
                    while state(await primary.status()) == "running":
                        await primary.wait_until(lambda now: now["verify"]["done-bytes"] > 0)
                        await checkpoint(prepared=rounds % 4 != 0)
                        rounds += 1
            assert rounds > 2
            result = (await primary.status())["verify"]
            assert result["state"] == "completed", result
            assert ranges(result) == [("a", MIB, 4 * KIB), ("a", 40 * MIB, 4 * KIB)]
            assert result["repaired-bytes"] == 8 * KIB
            assert (await primary.status())["epochs"]["lost"] == 0
            # nothing writes into this pause: the copy is the checkpoint
            await checkpoint(prepared=True)
        last = max(images)
        await primary.kill()
        await vm.kill()
        await secondary.wait_until(lambda now: now["connection"] != "connected")
        done = await qemu_remus("failover", "--control", str(secondary.control), "--json", scratch=scratch)
        assert json.loads(done.check().out)["checkpoint"] == last
        assert await first_difference(images[last], target) is None
