"""Storage that fills up, fails or stalls, on either side: the guest writes on, what was committed is kept, all is said.

Full and failing file systems are small ones on loop devices: root is needed for these.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from integration.controller import qemu_remus
from integration.faults import FileSystem, largest_file, small_file_system
from integration.harness import Disk, Status, background, committed, make_image
from integration.pair import KIB, MIB, Pair, Scribbler, fill, image, pair_of, scribble
from integration.process import Finished

HEARTBEAT = 1.5
SIZE = 24 * MIB
"""Of the epoch that meets with trouble."""


@asynccontextmanager
async def protected_pair(
    scratch: Path,
    *,
    size: int = 48 * MIB,
    store: FileSystem | None = None,
    targets: FileSystem | None = None,
    fleece: FileSystem | None = None,
    fleece_memory: str | None = "0",
    sparse: bool = False,
    proxied: bool = False,
    heartbeat: float = HEARTBEAT,
) -> AsyncIterator[Pair]:
    """A VM that has been protected for a moment.

    :param store: holds the secondary's journal; ``targets`` its images, ``fleece`` the primary's fleece.
    :param fleece_memory: for that; None: as much as there is by default.
    """
    secondary = [] if store is None else ["--store", str(store.path / "store")]
    primary = [] if fleece is None else ["--fleece-dir", str(fleece.path)]
    primary += [] if fleece_memory is None else ["--fleece-memory", fleece_memory]
    async with pair_of(
        scratch,
        [image(scratch, "a", size), image(scratch, "b", 8 * MIB + 512)],
        heartbeat=heartbeat,
        proxied=proxied,
        targets=targets.path if targets else None,
        primary_options=primary,
        secondary_options=[*secondary, *(["--sparse"] if sparse else [])],
    ) as pair:
        await fill(pair.machine)
        await pair.start_primary()
        await pair.primary.protected()
        yield pair


async def lost_epoch(pair: Pair, *words: str) -> Status:
    """Wait until the primary has lost an epoch and says why."""

    def said(now: Status) -> bool:
        reason = (now["reason"] or "").lower()
        return now["replication"] != "protected" and all(word in reason for word in words)

    return await pair.primary.wait_until(said)


async def see_protected_and_exact(pair: Pair) -> None:
    await pair.primary.protected()
    await pair.captured_from_now()
    await pair.see_exact_after_crash()


# --- the secondary's journal -----------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.slow
async def test_a_full_journal_refuses_the_epoch_and_takes_it_once_there_is_room(scratch: Path) -> None:
    with small_file_system(scratch / "journal", 256 * MIB) as storage:
        async with protected_pair(scratch, size=128 * MIB, store=storage) as pair:
            storage.fill()
            # more than the one segment that is there
            await pair.machine.qemu_io("a", f"write -P 0x77 0 {100 * MIB}")
            before = committed(await lost_epoch(pair, "space"))
            await scribble(pair.machine, 3)
            held = await pair.secondary.status()
            assert committed(held) == before
            assert held["disk"] != "inconsistent"
            assert (await pair.primary.status())["epochs"]["lost"] > 0
            storage.empty()
            await see_protected_and_exact(pair)


@pytest.mark.root
@pytest.mark.slow
async def test_a_journal_whose_storage_fails_is_said_and_is_whole_when_that_is_back(scratch: Path) -> None:
    with small_file_system(scratch / "journal", 256 * MIB) as storage:
        async with protected_pair(scratch, store=storage) as pair:
            before = committed(await pair.secondary.status())
            storage.die()
            await pair.secondary.wait_until(lambda now: now["disk"] == "failed")
            await pair.lost()
            await scribble(pair.machine, 3)
            await pair.secondary.stop()
            storage.mount_again()
            await pair.start_secondary()
            assert committed(await pair.secondary.status()) >= before
            await see_protected_and_exact(pair)


@pytest.mark.root
@pytest.mark.slow
async def test_a_journal_lost_at_its_flush_is_opened_again_and_read_back(scratch: Path) -> None:
    """Thin storage takes the writes, and loses them at the flush: nobody knows what is on it before it is read."""
    with (
        small_file_system(scratch / "images", 80 * MIB) as images,
        small_file_system(scratch / "journal", 256 * MIB, thin=True) as storage,
    ):
        async with protected_pair(scratch, store=storage, targets=images) as pair:
            before = committed(await pair.secondary.status())
            # Nothing is applied, so that the superblock is not what fails first.
            with images.frozen():
                await pair.machine.qemu_io("a", "write -P 0x79 1M 1M")
                await pair.secondary.wait_until(
                    lambda now: committed(now) - (now["checkpoint"]["applied"] or 0) > 6 and now["backlog-bytes"] > 0
                )
                storage.fail()
                await pair.machine.qemu_io("a", f"write -P 0x7a 8M {SIZE}")
                await pair.secondary.wait_until(lambda now: now["disk"] == "failed")
                await pair.lost()
                await scribble(pair.machine, 3)
            storage.heal()
            assert committed(await pair.primary.protected()) > before
            assert "the store was opened again" in pair.secondary.log
            await see_protected_and_exact(pair)


@pytest.mark.root
@pytest.mark.slow
async def test_a_journal_that_stalls_stretches_the_epoch_and_not_the_guest(scratch: Path) -> None:
    with small_file_system(scratch / "journal", 256 * MIB) as storage:
        async with protected_pair(scratch, store=storage) as pair, background() as nursery:
            scribbler = Scribbler(pair.machine)
            nursery.start_soon(scribbler.run)
            with storage.frozen():
                await scribbler.go_on(30)
                stalled = await pair.primary.status()
                assert stalled["checkpoint"]["captured"] > committed(stalled)
                # the secondary lives, and answers its heartbeats
                assert stalled["connection"] == "connected"
            await pair.primary.progress(3)
            await scribbler.end()
            await see_protected_and_exact(pair)


# --- the secondary's images ------------------------------------------------------------------------------------------


async def retry_storage(pair: Pair) -> Finished:
    return await qemu_remus("retry-storage", "--control", str(pair.secondary.control), scratch=pair.secondary.directory)


async def see_failover_asks(pair: Pair, *words: str) -> None:
    """A failover that cannot bring the disks up says what it needs, and loses nothing."""
    with pytest.raises(AssertionError) as caught:
        await pair.fail_over()
    text = str(caught.value)
    assert "error:" in text
    assert "Traceback" not in text
    for word in (str(pair.targets["a"]), *words):
        assert word in text


async def test_an_image_that_cannot_be_written_keeps_the_journal_and_failover_says_what_it_needs(scratch: Path) -> None:
    async with protected_pair(scratch) as pair:
        with largest_file(pair.secondary.process.pid, 32 * MIB):
            await pair.machine.qemu_io("a", "write -P 0x78 36M 2M")
            images = await aside_at_once(pair)
            held = await pair.secondary.wait_until(lambda now: now["disk"] == "failed")
            assert str(pair.targets["a"]) in held["reason"]
            await pair.lost()
            await pair.left_alone()
            await scribble(pair.machine, 3)
            await pair.crash()
            await see_failover_asks(pair)
        # what was committed is all there
        await pair.fail_over()
        await pair.see_equal(images)


async def aside_at_once(pair: Pair) -> dict[str, Path]:
    """Copies of the disks, of which the last write is in the very next checkpoint: nobody writes."""
    await pair.machine.pause()
    return await pair.copies()


@pytest.mark.root
@pytest.mark.slow
async def test_a_sparse_image_on_a_full_file_system_is_said_and_failover_waits_for_room(scratch: Path) -> None:
    with small_file_system(scratch / "images", 80 * MIB) as storage:
        async with protected_pair(scratch, targets=storage, sparse=True) as pair:
            storage.fill(MIB)
            await pair.machine.qemu_io("a", f"write -P 0x79 8M {SIZE}")
            images = await aside_at_once(pair)
            await pair.secondary.wait_until(lambda now: now["disk"] == "failed")
            await pair.lost()
            await pair.crash()
            await see_failover_asks(pair, "space")
            storage.empty()
            await pair.fail_over()
            await pair.see_equal(images)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("how", ["by-itself", "told", "restarted"])
async def test_an_image_that_can_be_written_again_is_brought_up_from_the_journal(scratch: Path, how: str) -> None:
    with small_file_system(scratch / "images", 80 * MIB) as storage:
        async with protected_pair(scratch, targets=storage, sparse=True) as pair:
            storage.fill(MIB)
            await pair.machine.qemu_io("a", f"write -P 0x79 8M {SIZE}")
            await pair.secondary.wait_until(lambda now: now["disk"] == "failed")
            await pair.lost()
            await scribble(pair.machine, 3)
            assert (await retry_storage(pair)).status == 1
            storage.empty()
            if how == "restarted":
                assert await pair.secondary.stop() == 0
                await pair.start_secondary()
            elif how == "told":
                assert (await retry_storage(pair)).status == 0
                assert (await pair.secondary.status())["disk"] != "failed"
            await pair.primary.protected(timeout=45)
            await see_protected_and_exact(pair)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True])
async def test_images_lost_at_their_flush_are_written_again_from_the_journal(scratch: Path, killed: bool) -> None:
    """Thin storage takes the writes, and loses them at the flush: what is applied then is done again, on no trust."""
    with small_file_system(scratch / "images", 80 * MIB, thin=True) as storage:
        async with protected_pair(scratch, targets=storage, sparse=True) as pair:
            storage.fail()
            await pair.machine.qemu_io("a", f"write -P 0x7a 8M {SIZE}")
            await pair.secondary.wait_until(lambda now: now["disk"] == "failed")
            await pair.lost()
            if killed:
                await pair.secondary.kill()
            storage.heal()
            if killed:
                await pair.start_secondary()
            await see_protected_and_exact(pair)


@pytest.mark.root
@pytest.mark.slow
async def test_images_that_fail_are_said_and_brought_up_when_their_storage_is_back(scratch: Path) -> None:
    with small_file_system(scratch / "images", 80 * MIB) as storage:
        async with protected_pair(scratch, targets=storage) as pair:
            storage.die()
            await scribble(pair.machine, 3)
            await pair.secondary.wait_until(lambda now: now["disk"] == "failed")
            await pair.lost()
            await scribble(pair.machine, 4)
            await pair.secondary.stop()
            storage.mount_again()
            await pair.start_secondary()
            await see_protected_and_exact(pair)


@pytest.mark.root
@pytest.mark.slow
async def test_images_that_stall_hold_up_no_commit(scratch: Path) -> None:
    with small_file_system(scratch / "images", 80 * MIB) as storage:
        async with protected_pair(scratch, targets=storage) as pair, background() as nursery:
            scribbler = Scribbler(pair.machine)
            nursery.start_soon(scribbler.run)
            with storage.frozen():
                status = await pair.primary.progress(20)
                held = await pair.secondary.status()
                assert status["epochs"]["lost"] == 0
                assert held["backlog-bytes"] > 0
                assert (held["checkpoint"]["applied"] or 0) < committed(held)
            await scribbler.end()
            await pair.secondary.wait_until(lambda now: now["checkpoint"]["applied"] >= committed(status))
            await see_protected_and_exact(pair)


# --- the primary's fleece --------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.slow
async def test_a_fleece_too_small_for_an_epoch_loses_it_and_not_the_guest(scratch: Path) -> None:
    with small_file_system(scratch / "fleece", 64 * MIB) as storage:
        async with protected_pair(scratch, fleece=storage) as pair:
            storage.fill(MIB)
            await pair.machine.qemu_io("a", f"write -P 0x7b 8M {SIZE}")
            await lost_epoch(pair, "fleece")
            await scribble(pair.machine, 3)
            assert await pair.tracked() > SIZE
            storage.empty()
            await see_protected_and_exact(pair)


@pytest.mark.root
async def test_a_fleece_that_fills_up_in_a_transfer_breaks_the_snapshot_and_not_the_guest(scratch: Path) -> None:
    with small_file_system(scratch / "fleece", 64 * MIB) as storage:
        async with protected_pair(scratch, fleece=storage, proxied=True, heartbeat=60) as pair:
            await pair.begin_transfer("a", SIZE)
            storage.fill()
            # over what is being read: none of it can be kept
            await pair.machine.qemu_io("a", f"write -P 0x7c 0 {SIZE}")
            await scribble(pair.machine, 3)
            pair.end_transfer()
            status = await pair.primary.wait_until(lambda now: now["epochs"]["lost"] > 0)
            assert status["connection"] == "connected"
            storage.empty()
            await see_protected_and_exact(pair)


@pytest.mark.root
@pytest.mark.slow
async def test_a_fleece_that_stalls_stalls_the_guest_once_and_loses_the_epoch(scratch: Path) -> None:
    with small_file_system(scratch / "fleece", 64 * MIB) as storage:
        async with protected_pair(scratch, fleece=storage, proxied=True, heartbeat=60) as pair:
            await pair.begin_transfer("a", SIZE)
            with storage.frozen():
                took = []
                for block in range(4):
                    began = trio.current_time()
                    await pair.machine.qemu_io("a", f"write -P 0x7d {block * MIB} 4k")
                    took.append(trio.current_time() - began)
                print("writes beside a stalled fleece:", *(f"{seconds * 1000:.0f} ms" for seconds in took))
                # the snapshot is given up at the first one, and nothing is copied for it any more
                assert sum(seconds > 0.5 for seconds in took) <= 1
            pair.end_transfer()
            status = await pair.primary.wait_until(lambda now: now["epochs"]["lost"] > 0)
            assert status["connection"] == "connected"
            await see_protected_and_exact(pair)


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.parametrize(
    "memory",
    [
        None,
        pytest.param(
            "0",
            marks=pytest.mark.xfail(
                strict=True, reason="taking the filter out drains the fleece, and QEMU's main loop with it"
            ),
        ),
    ],
    ids=["in-memory", "in-a-file"],
)
async def test_a_fleece_that_stalls_does_not_hold_up_the_guest_at_its_epochs_end(
    scratch: Path, memory: str | None
) -> None:
    """What is under way to a file cannot be taken back: whatever waits for it makes the VM wait, too."""
    with small_file_system(scratch / "fleece", 64 * MIB) as storage:
        async with protected_pair(scratch, fleece=storage, fleece_memory=memory, proxied=True, heartbeat=60) as pair:
            await pair.begin_transfer("a", SIZE)
            with storage.frozen():
                await pair.machine.qemu_io("a", "write -P 0x7d 0 4k")
                pair.end_transfer()
                for seed in range(5):
                    await pair.machine.qmp.execute("query-status", timeout=8)
                    await scribble(pair.machine, seed)
                status = await pair.primary.status()
                assert status["connection"] == "connected"
                assert memory == "0" or status["epochs"]["lost"] == 0
            await see_protected_and_exact(pair)


@pytest.mark.root
@pytest.mark.slow
async def test_an_epoch_that_memory_has_no_room_for_uses_the_file_and_the_next_one_memory_again(scratch: Path) -> None:
    with small_file_system(scratch / "fleece", 128 * MIB) as storage:
        async with protected_pair(scratch, fleece=storage, fleece_memory="8M", proxied=True, heartbeat=60) as pair:
            before = storage.free
            await pair.begin_transfer("a", SIZE)
            await pair.machine.qemu_io("a", f"write -P 0x7c 0 {SIZE}")
            assert storage.free < before - SIZE // 2
            pair.end_transfer()
            await pair.primary.progress(2)
            await pair.primary.wait_until(lambda now: now["dirty-bytes"] == 0)
            await pair.begin_transfer("a", 3 * MIB)
            before = storage.free
            await pair.machine.qemu_io("a", f"write -P 0x7d 0 {3 * MIB}")
            assert storage.free == before
            pair.end_transfer()
            assert (await pair.primary.status())["epochs"]["lost"] == 0
            await see_protected_and_exact(pair)


# --- the guest's own disk --------------------------------------------------------------------------------------------

SECTOR = 20 * MIB // 512


def bad_disk(scratch: Path, kind: str, *, once: bool) -> Disk:
    """A disk that cannot write, or read, one sector."""
    error = {"event": "none", "iotype": kind, "errno": 5, "sector": SECTOR, "once": once}
    return Disk("a", make_image(scratch / "a.img", 48 * MIB), errors=(error,))


async def test_a_disk_that_cannot_write_a_sector_fails_its_guest_and_not_the_replication(scratch: Path) -> None:
    disks = [bad_disk(scratch, "write", once=False), image(scratch, "b", 8 * MIB)]

    async def see_it_fail(pair: Pair) -> None:
        with pytest.raises(AssertionError, match="Input/output error"):
            await pair.machine.qemu_io("a", f"write -P 0x7e {SECTOR * 512 - 2 * KIB} 4k")

    # the link stands still meanwhile, and is not to be taken for lost
    async with pair_of(scratch, disks, proxied=True, heartbeat=60) as pair:
        await fill(pair.machine)
        await see_it_fail(pair)
        await pair.start_primary()
        await pair.primary.protected()
        await see_it_fail(pair)
        await pair.begin_transfer("a", 12 * MIB)
        await see_it_fail(pair)
        pair.end_transfer()
        await scribble(pair.machine, 3)
        await pair.captured_from_now()
        assert (await pair.primary.status())["epochs"]["lost"] == 0
        await pair.machine.running()
        await pair.see_exact_after_crash()


@pytest.mark.slow
async def test_a_sector_that_cannot_be_read_once_costs_an_epoch(scratch: Path) -> None:
    # in a hole, so that the first copy does not read it
    disks = [bad_disk(scratch, "read", once=True), image(scratch, "b", 8 * MIB)]
    async with pair_of(scratch, disks) as pair:
        await fill(pair.machine)
        await pair.start_primary()
        await pair.primary.protected()
        await pair.machine.qemu_io("a", f"write -P 0x7e {SECTOR * 512} 4k")
        status = await pair.primary.wait_until(lambda now: now["epochs"]["lost"] == 1)
        assert status["connection"] == "connected"
        await scribble(pair.machine, 3)
        await see_protected_and_exact(pair)


@asynccontextmanager
async def pair_with_an_unreadable_sector(scratch: Path) -> AsyncIterator[Pair]:
    """A pair that was protected before the guest wrote to a sector which cannot be read."""
    disks = [bad_disk(scratch, "read", once=False), image(scratch, "b", 8 * MIB)]
    async with pair_of(scratch, disks) as pair:
        await fill(pair.machine)
        await pair.start_primary()
        await pair.primary.protected()
        await pair.machine.qemu_io("a", f"write -P 0x7e {SECTOR * 512} 4k")
        await pair.primary.wait_until(lambda now: now["epochs"]["lost"] >= 2)
        yield pair


@pytest.mark.slow
async def test_a_sector_that_cannot_be_read_leaves_the_guest_alone_and_its_changes_recorded(scratch: Path) -> None:
    async with pair_with_an_unreadable_sector(scratch) as pair:
        await scribble(pair.machine, 3)
        await pair.machine.running()
        status = await pair.primary.status()
        assert status["replication"] == "degraded"
        assert f"{SECTOR * 512}" in status["reason"]
        assert "Input/output error" in status["reason"]
        assert (await pair.secondary.status())["disk"] in {"up-to-date", "outdated", "consistent"}
        await pair.primary.stop()
        assert await pair.tracked() > 4 * KIB


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="the export is named, and not the disk")
async def test_a_sector_that_cannot_be_read_is_said_with_its_disk(scratch: Path) -> None:
    async with pair_with_an_unreadable_sector(scratch) as pair:
        assert "disk a" in (await pair.primary.status())["reason"]
