"""Disks that grow, come and go while the VM is protected: the copy follows, and no checkpoint is given up for it.

No guest: its disks are written as it would write them, and compared byte for byte, sizes and all, at the end.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from integration.harness import QmpError, committed, first_difference, make_image, qemu_remus
from integration.images import copy_image
from integration.pair import KIB, MIB, Pair, fill, image, pair_of, scribble

SIZES = {"a": 16 * MIB, "b": 8 * MIB + 512}


def pair(scratch: Path, **options: Any) -> Any:
    """A VM with two disks, and both controllers."""
    return pair_of(scratch, [image(scratch, name, size) for name, size in SIZES.items()], **options)


async def resize(pair: Pair, disk: str, size: int) -> None:
    """As somebody else does it, behind our back: again and again, until no filter is in."""
    with trio.fail_after(60):
        while True:
            with suppress(QmpError):
                await pair.machine.qmp.execute("block_resize", {"node-name": f"{disk}-node", "size": size})
                return


def state(status: dict[str, Any], disk: str) -> tuple[str, int | None]:
    """How a disk stands, and its size."""
    return next(((one["state"], one["size"]) for one in status["disks"] if one["name"] == disk), ("absent", None))


async def standing(pair: Pair, **disks: tuple[str, int | None]) -> None:
    """Wait until the VM is protected again, with its disks so."""
    await pair.primary.wait_until(
        lambda now: now["replication"] == "protected" and all(state(now, d) == s for d, s in disks.items()),
        timeout=60,
    )


async def test_a_disk_grows_by_our_command_and_the_copy_with_it(scratch: Path) -> None:
    async with pair(scratch) as site:
        await fill(site.machine)
        await site.start_primary()
        before = await site.primary.protected()
        done = await qemu_remus("resize", "a", "24M", "--control", str(site.primary.control), "--json", scratch=scratch)
        assert json.loads(done.check().out) == {"disk": "a", "size": 24 * MIB}
        await site.machine.qemu_io("a", "write -P 0x41 15M 2M")
        await site.machine.qemu_io("a", f"write -P 0x42 {24 * MIB - 1024} 1k")
        await standing(site, a=("protected", 24 * MIB), b=("protected", SIZES["b"]))
        assert committed(await site.primary.status()) > committed(before)
        await scribble(site.machine, 5)
        await site.see_exact_after_crash()
        assert site.targets["a"].stat().st_size == 24 * MIB


async def test_a_disk_grows_behind_our_back_and_only_what_is_new_of_it_is_compared(scratch: Path) -> None:
    async with pair(scratch, interval_ms=20) as site:
        await fill(site.machine)
        await site.start_primary()
        before = await site.primary.protected()
        # neither a multiple of 64 KiB nor of 4 KiB
        size = 20 * MIB + 3 * 512
        await resize(site, "a", size)
        await site.machine.qemu_io("a", f"write -P 0x41 {size - 512} 512")
        await standing(site, a=("protected", size))
        sent = int((await site.primary.status())["bytes-sent"]) - int(before["bytes-sent"])
        assert sent < 2 * MIB
        await resize(site, "a", size + 5 * MIB)
        await resize(site, "b", 8 * MIB + 1024)
        await standing(site, a=("protected", size + 5 * MIB), b=("protected", 8 * MIB + 1024))
        await scribble(site.machine, 9)
        await site.see_exact_after_crash()
        assert {name: path.stat().st_size for name, path in site.targets.items()} == {
            "a": size + 5 * MIB,
            "b": 8 * MIB + 1024,
        }


async def test_a_secondary_killed_before_the_first_checkpoint_of_the_new_size_has_the_old_one(scratch: Path) -> None:
    async with pair(scratch, proxied=True) as site:
        assert site.proxy
        await fill(site.machine)
        await site.start_primary()
        await site.primary.protected()
        images = await site.put_aside()
        # what the new part holds comes, and never the end of it
        site.proxy.bytes_per_second = 256 * KIB
        await resize(site, "a", 48 * MIB)
        for start in range(16, 48, 4):
            await site.machine.qemu_io("a", f"write -P {start} {start}M 4M")
        await site.secondary.wait_until(lambda _: site.targets["a"].stat().st_size == 48 * MIB)
        await site.secondary.kill()
        await site.primary.kill()
        await site.machine.kill()
        await site.start_secondary()
        status = await site.secondary.status()
        assert status["disk"] == "consistent"
        assert state(status, "a") == ("protected", SIZES["a"])
        await site.fail_over()
        await site.see_equal(images)


async def test_a_secondary_killed_while_a_disk_grows_goes_on_with_the_new_size(scratch: Path) -> None:
    async with pair(scratch, proxied=True) as site:
        assert site.proxy
        await fill(site.machine)
        await site.start_primary()
        await site.primary.protected()
        site.proxy.bytes_per_second = 256 * KIB
        await resize(site, "a", 40 * MIB)
        for start in range(16, 40, 4):
            await site.machine.qemu_io("a", f"write -P {start} {start}M 4M")
        await site.secondary.wait_until(lambda _: site.targets["a"].stat().st_size == 40 * MIB)
        await site.secondary.kill()
        site.end_transfer()
        await site.start_secondary()
        await standing(site, a=("protected", 40 * MIB))
        await scribble(site.machine, 3)
        await site.see_exact_after_crash()


async def test_a_disk_that_became_smaller_is_refused_and_nothing_is_lost(scratch: Path) -> None:
    async with pair(scratch) as site:
        await fill(site.machine)
        await site.start_primary()
        await site.primary.protected()
        images = await site.put_aside()
        held = committed(await site.primary.status())
        await resize(site, "a", 4 * MIB)
        status = await site.primary.wait_until(lambda now: "smaller" in (now["reason"] or ""))
        assert f"a from {SIZES['a']} to {4 * MIB} bytes" in status["reason"]
        assert site.primary.process.running
        status = await site.secondary.status()
        assert (committed(status), status["disk"]) >= (held, "consistent")
        assert state(status, "a") == ("protected", SIZES["a"])
        # as large as it was, it goes on; what it lost is zero now
        await resize(site, "a", SIZES["a"])
        await standing(site, a=("protected", SIZES["a"]))
        await site.machine.resume()
        await scribble(site.machine, 3)
        assert await first_difference(images["a"], site.machine.disks[0].image) is not None
        await site.see_exact_after_crash()


async def test_a_resize_that_cannot_be_is_refused_and_changes_nothing(scratch: Path) -> None:
    async with pair(scratch, heartbeat=60) as site:
        await site.start_primary()
        await site.primary.protected()
        for disk, size, words in (
            ("a", "8M", "cannot be made smaller"),
            ("a", "100", "multiple of 512"),
            ("a", "much", "SIZE"),
            ("c", "24M", "no disk c"),
            ("no/name", "24M", "cannot be a disk name"),
        ):
            done = await qemu_remus("resize", disk, size, "--control", str(site.primary.control), scratch=scratch)
            assert done.status in {1, 2}
            assert words in done.err
            assert "Traceback" not in done.err
        done = await qemu_remus("resize", "a", "24M", "--control", str(site.secondary.control), scratch=scratch)
        assert done.status != 0
        assert "is not a primary" in done.err
        await site.primary.progress(2)
        assert state(await site.primary.status(), "a") == ("protected", SIZES["a"])
        assert (await site.primary.status())["epochs"]["lost"] == 0


# --- disks that come and go ------------------------------------------------------------------------------------------


async def plug(pair: Pair, name: str, size: int) -> Path:
    """Give the VM a disk more, as a management tool does; its image."""
    path = make_image(pair.scratch / f"{name}.plugged", size)
    file = {"driver": "file", "filename": str(path), "node-name": f"{name}-file", "discard": "unmap"}
    node = {"driver": "raw", "node-name": f"{name}-node", "file": file, "discard": "unmap"}
    await pair.machine.qmp.execute("blockdev-add", node)
    await pair.machine.qmp.execute("device_add", {"driver": "virtio-blk-pci", "id": name, "drive": f"{name}-node"})
    return path


#: The machine of :func:`unplug`.
RESET = ("-action", "reboot=reset")


async def unplug(pair: Pair, name: str) -> None:
    """Take a disk away; with no operating system in the guest, a reset is what lets go of it: see ``RESET``."""
    await pair.machine.qmp.execute("device_del", {"id": name})
    await pair.machine.qmp.execute("system_reset")
    while (await pair.machine.qmp.wait_event("DEVICE_DELETED"))["data"].get("device") != name:
        pass


async def free_nodes(pair: Pair, name: str) -> None:
    """Take its nodes away, too: nothing of ours may hold on to them for long."""
    with trio.fail_after(30):
        while True:
            try:
                await pair.machine.qmp.execute("blockdev-del", {"node-name": f"{name}-node"})
            except QmpError:
                await trio.sleep(0.02)
                continue
            return


async def see_equal(pair: Pair, images: dict[str, Path], copies: dict[str, Path]) -> None:
    """Fail over, and compare the disks that are handed over with others: those, and no more."""
    done = await qemu_remus("failover", "--control", str(pair.secondary.control), "--json", scratch=pair.scratch)
    disks = json.loads(done.check().out)["disks"]
    assert {disk["name"]: Path(disk["target"]) for disk in disks} == {name: copies[name] for name in images}
    assert {name: await first_difference(path, copies[name]) for name, path in images.items()} == dict.fromkeys(images)


@pytest.mark.parametrize("where", ["disk", "disk-dir"])
async def test_a_disk_that_is_plugged_in_is_copied_and_then_one_of_all(scratch: Path, where: str) -> None:
    place = scratch / ("c.copy" if where == "disk" else "c.img.d")
    if where == "disk-dir":
        place.mkdir()
        options = ("--disk-dir", str(place))
        place = place / "c.img"
    else:
        options = ("--disk", f"c={place}")
    async with pair(scratch, secondary_options=options) as site:
        await fill(site.machine)
        await site.start_primary()
        await site.primary.protected()
        await plug(site, "c", 12 * MIB + 512)
        await site.machine.qemu_io("c", "write -P 0x51 1M 3M")
        await site.machine.qemu_io("c", f"write -P 0x52 {12 * MIB} 512")
        await standing(site, a=("protected", SIZES["a"]), c=("protected", 12 * MIB + 512))
        await site.machine.qemu_io("c", "write -P 0x53 2M 128k")
        await scribble(site.machine, 3)
        images = await site.put_aside() | {"c": scratch / "c.aside"}
        await copy_image(scratch / "c.plugged", images["c"])
        await site.crash()
        await see_equal(site, images, {**site.targets, "c": place})


async def test_a_disk_whose_copy_is_an_image_of_another_format_comes_and_grows(scratch: Path) -> None:
    place = scratch / "c.qcow2"
    async with pair(scratch, secondary_options=("--disk", f"c=qcow2:{place}")) as site:
        await site.start_primary()
        await site.primary.protected()
        path = await plug(site, "c", 4 * MIB)
        await site.machine.qemu_io("c", "write -P 0x51 1M 1M")
        await standing(site, c=("protected", 4 * MIB))
        await resize(site, "c", 6 * MIB)
        await site.machine.qemu_io("c", f"write -P 0x42 {6 * MIB - 1024} 1k")
        await standing(site, c=("protected", 6 * MIB))
        await site.put_aside()
        original = await copy_image(path, scratch / "c.aside")
        await site.crash()
        done = await qemu_remus("failover", "--control", str(site.secondary.control), scratch=scratch)
        done.check()
        copy = scratch / "c.raw"
        await trio.run_process(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(place), str(copy)])
        assert await first_difference(original, copy) is None


async def test_a_disk_without_a_place_is_said_to_be_unprotected_and_the_others_go_on(scratch: Path) -> None:
    async with pair(scratch) as site:
        await fill(site.machine)
        await site.start_primary()
        await site.primary.protected()
        await plug(site, "c", 4 * MIB)
        await standing(site, a=("protected", SIZES["a"]), c=("unprotected", 4 * MIB))
        status = await site.primary.status()
        assert "no place for c" in next(disk["reason"] for disk in status["disks"] if disk["name"] == "c")
        await site.machine.qemu_io("c", "write -P 0x51 1M 1M")
        await site.primary.progress(3)
        # a place for it is all that is needed
        copies = {**site.targets, "c": scratch / "c.copy"}
        await site.secondary.stop()
        site.targets = copies
        await site.start_secondary()
        await standing(site, a=("protected", SIZES["a"]), c=("protected", 4 * MIB))
        await site.machine.qemu_io("c", "write -P 0x52 2M 1M")
        images = await site.put_aside() | {"c": scratch / "c.aside"}
        await copy_image(scratch / "c.plugged", images["c"])
        await site.crash()
        await see_equal(site, images, copies)


@pytest.mark.parametrize("moment", ["at-rest", "in-transfer"])
async def test_a_disk_that_is_unplugged_is_dropped_and_its_copy_kept(scratch: Path, moment: str) -> None:
    async with pair(scratch, proxied=True, extra=RESET) as site:
        await fill(site.machine)
        await site.start_primary()
        await site.primary.protected()
        if moment == "in-transfer":
            await site.begin_transfer("b", 6 * MIB)
        else:
            await site.put_aside()
            await site.machine.resume()
        await unplug(site, "b")
        site.end_transfer()
        await standing(site, a=("protected", SIZES["a"]), b=("absent", None))
        await free_nodes(site, "b")
        await site.machine.qemu_io("a", "write -P 0x61 3M 1M")
        status = await site.secondary.wait_until(lambda now: state(now, "b")[0] == "gone")
        gone = next(disk["gone-at"] for disk in status["disks"] if disk["name"] == "b")
        assert gone is None or gone <= committed(status)
        assert "state=gone" in site.primary.log
        await site.machine.pause()
        await site.captured_from_now()
        images = {"a": await copy_image(site.machine.disks[0].image, scratch / "a.aside")}
        await site.crash()
        await see_equal(site, images, site.targets)
        # as at the last checkpoint that had it
        assert site.targets["b"].stat().st_size == SIZES["b"]
        if moment == "at-rest":
            assert await first_difference(scratch / "b.aside", site.targets["b"]) is None


async def test_a_disk_that_comes_back_smaller_and_other_than_it_went_is_copied_anew(scratch: Path) -> None:
    async with pair(scratch, extra=RESET) as site:
        await fill(site.machine)
        await site.start_primary()
        await site.primary.protected()
        await unplug(site, "b")
        await standing(site, a=("protected", SIZES["a"]), b=("absent", None))
        await free_nodes(site, "b")
        await site.secondary.wait_until(lambda now: state(now, "b")[0] == "gone")
        path = await plug(site, "b", 3 * MIB)
        await site.machine.qemu_io("b", "write -P 0x71 1M 1M")
        await standing(site, b=("protected", 3 * MIB))
        for command in ("write -P 0x72 100k 9k", "write -z 1500k 30k", "discard 2M 128k"):
            await site.machine.qemu_io("b", command)
        images = await site.put_aside()
        await copy_image(path, images["b"])
        await site.crash()
        await see_equal(site, images, site.targets)
        assert site.targets["b"].stat().st_size == 3 * MIB
