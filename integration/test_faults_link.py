"""A link that is cut, swallows everything, is slow, or comes back: noticed, sat out, and made good by the difference.

Both controllers run in network namespaces, QEMU beside the primary's, so that a link ends as it does in a rack: by
nothing, neither FIN nor RST. Bytes are counted at the network interface. Root is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.faults import Link, start_link
from integration.harness import Disk, GuestImage, background, check_disks, committed, make_ext4, make_image
from integration.pair import MIB, Pair, Scribbler, fill, image, pair_of, scribble
from integration.pulse import start_guest_load

pytestmark = pytest.mark.root

#: Seconds of silence after which a peer is taken for lost: the shortest that a machine under load bears.
HEARTBEAT = 1.5

CUTS: dict[str, Callable[[Link], None]] = {"interface-down": Link.cut, "all-packets-lost": Link.swallow}


def two_disks(scratch: Path) -> list[Disk]:
    return [image(scratch, "a", 64 * MIB), image(scratch, "b", 8 * MIB + 512)]


def most(dirty: int, lost: int) -> int:
    """Bytes that may cross the link after an outage in which so many became dirty.

    :param lost: epochs that were lost again on the way, as on a machine under load, and sent once more.
    """
    return (1 + lost) * math.floor(1.1 * dirty) + MIB


async def see_difference_only(pair: Pair, link: Link, least: int) -> None:
    """Mend the link, wait until the VM is protected again, and hold what crossed it against what had become dirty.

    :param least: bytes of it that are not zero.
    """
    dirty = await pair.tracked()
    lost = (await pair.primary.status())["epochs"]["lost"]
    before = link.sent
    link.mend()
    again = (await pair.primary.protected())["epochs"]["lost"] - lost
    crossed = link.sent - before
    assert least <= crossed <= most(dirty, again), f"{dirty} bytes were dirty, and {again} epochs lost again"


@pytest.mark.parametrize("kind", ["interface-down", pytest.param("all-packets-lost", marks=pytest.mark.slow)])
async def test_a_cut_link_is_noticed_on_both_sides_and_costs_the_difference_only(scratch: Path, kind: str) -> None:
    async with (
        start_link(scratch) as link,
        pair_of(scratch, two_disks(scratch), link=link, heartbeat=HEARTBEAT) as pair,
    ):
        await fill(pair.machine)
        await pair.machine.qemu_io("a", "write -P 0x44 8M 40M")
        await pair.start_primary()
        before = await pair.primary.protected()
        for round in range(2):
            CUTS[kind](link)
            lost = await pair.lost()
            assert lost["connection"] != "connected"
            await pair.secondary.wait_until(lambda now: now["connection"] != "connected")
            # not from the outage on, but while it lasts
            await pair.machine.qemu_io("a", f"write -P {0x55 + round} 16M 12M")
            await scribble(pair.machine, round)
            await pair.machine.running()
            held = await pair.secondary.status()
            assert held["disk"] in {"consistent", "outdated"}
            assert committed(held) >= committed(before)
            await see_difference_only(pair, link, 12 * MIB)
        assert (await pair.primary.status())["generation"] == before["generation"]
        await pair.see_exact_after_crash()


@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.slow
async def test_a_link_that_is_cut_in_an_epochs_transfer_costs_that_epoch_and_nothing_else(
    scratch: Path, kind: str
) -> None:
    async with (
        start_link(scratch) as link,
        pair_of(scratch, two_disks(scratch), link=link, heartbeat=HEARTBEAT) as pair,
    ):
        await fill(pair.machine)
        await pair.start_primary()
        before = committed(await pair.primary.protected())
        link.slow(MIB)
        await pair.machine.qemu_io("a", "write -P 0x33 0 16M")
        await pair.transferring()
        CUTS[kind](link)
        await pair.machine.qemu_io("a", "write -P 0x34 4M 2M")
        await pair.lost()
        # nothing of ours is in the guest's way while there is nobody to send to
        await pair.left_alone()
        held = await pair.secondary.wait_until(lambda now: now["connection"] != "connected")
        assert committed(held) >= before
        assert 16 * MIB <= await pair.tracked() < 20 * MIB
        await see_difference_only(pair, link, 16 * MIB)
        await pair.see_exact_after_crash()


@pytest.mark.slow
async def test_a_slow_link_stretches_the_epochs_and_loses_none(scratch: Path) -> None:
    async with (
        start_link(scratch) as link,
        pair_of(scratch, two_disks(scratch), link=link, heartbeat=HEARTBEAT) as pair,
        background() as nursery,
    ):
        await fill(pair.machine)
        await pair.start_primary()
        await pair.primary.protected()
        scribbler = Scribbler(pair.machine)
        nursery.start_soon(scribbler.run)
        link.slow(MIB)
        began = await pair.primary.status()
        await pair.primary.progress(4)
        rounds = scribbler.rounds
        # more than the link takes within the time after which silence is a loss
        await pair.machine.qemu_io("a", "write -P 0x66 8M 6M")
        await scribbler.go_on(20)
        now = await pair.primary.progress(3)
        assert now["epochs"]["lost"] == began["epochs"]["lost"] == 0
        assert now["connection"] == "connected"
        assert scribbler.rounds > rounds + 20
        link.fast()
        await pair.primary.progress(10)
        await scribbler.end()
        print(f"slow link: longest round of writes {scribbler.longest * 1000:.0f} ms")
        await pair.see_exact_after_crash()


@pytest.mark.slow
async def test_an_interruption_that_nobody_notices_costs_no_epoch(scratch: Path) -> None:
    async with (
        start_link(scratch) as link,
        pair_of(scratch, two_disks(scratch), link=link) as pair,
        background() as nursery,
    ):
        await pair.start_primary()
        await pair.primary.protected()
        scribbler = Scribbler(pair.machine)
        nursery.start_soon(scribbler.run)
        for lose in CUTS.values():
            lose(link)
            await scribbler.go_on(1)
            link.mend()
            status = await pair.primary.progress(3)
            assert status["epochs"]["lost"] == 0
            assert status["connection"] == "connected"
        await scribbler.end()
        await pair.see_exact_after_crash()


@pytest.mark.slow
async def test_a_link_that_only_the_primary_has_given_up_is_taken_over_at_its_return(scratch: Path) -> None:
    """The secondary still waits for the old one, whose last packets come late; a newer session fences it."""
    impatient = ("--heartbeat-timeout", f"{HEARTBEAT:g}")
    async with (
        start_link(scratch) as link,
        pair_of(scratch, two_disks(scratch), link=link, heartbeat=3600, primary_options=impatient) as pair,
    ):
        await fill(pair.machine)
        await pair.start_primary()
        await pair.primary.protected()
        link.swallow()
        await pair.lost()
        assert (await pair.secondary.status())["connection"] == "connected"
        await scribble(pair.machine, 1)
        await see_difference_only(pair, link, 64 << 10)
        await pair.see_exact_after_crash()


@pytest.mark.slow
async def test_a_primary_that_was_cut_off_is_refused_after_the_failover(scratch: Path) -> None:
    async with (
        start_link(scratch) as link,
        pair_of(scratch, two_disks(scratch), link=link, heartbeat=HEARTBEAT) as pair,
    ):
        await fill(pair.machine)
        await pair.start_primary()
        await pair.primary.protected()
        images = await pair.put_aside()
        link.cut()
        await pair.machine.resume()
        await scribble(pair.machine, 1)
        await pair.lost()
        await pair.secondary.wait_until(lambda now: now["connection"] != "connected")
        await pair.fail_over()
        link.mend()
        assert await pair.primary.process.wait(60) == 4
        assert "failed over" in pair.primary.log
        # the old VM is nobody's to stop but the operator's, and its changes stay recorded
        await pair.machine.running()
        assert await pair.tracked() > 0
        assert await pair.machine.node("a") == "a-node"
        await pair.see_equal(images)


async def test_a_guest_sees_nothing_of_a_link_that_is_cut_slow_and_cut_again(scratch: Path, guest: GuestImage) -> None:
    disks = [
        Disk("a", await make_ext4(scratch / "a.img", 64 * MIB)),
        Disk("b", make_image(scratch / "b.img", 32 * MIB)),
    ]
    async with (
        start_link(scratch) as link,
        pair_of(scratch, disks, guest=guest, link=link, heartbeat=HEARTBEAT) as pair,
        start_guest_load(pair.machine) as load,
    ):
        await pair.start_primary()
        await pair.primary.protected()
        await load.go_on(30)
        print(f"protected: {load.stalls()}")
        for spoil in (Link.cut, Link.swallow, lambda link: Link.slow(link, 128 << 10), Link.cut):
            began = load.beats[-1].at
            spoil(link)
            await load.go_on(50)
            link.mend()
            await pair.primary.protected()
            print(f"fault and return: {load.stalls(began)}")
        await load.see_no_errors()
        least = load.ledger.last
        await pair.captured_from_now()
        await pair.crash()
        await pair.fail_over()
        verdict = await check_disks(scratch, guest, pair.targets["a"], pair.targets["b"])
    assert verdict.good, verdict
    assert verdict.in_slots >= least
