"""A primary's controller that hangs is ended, and what a dead one left in QEMU is taken out, by its guardian.

Hangs and deaths inside a pause of the controller's own are integration/test_guardian_real.py's; who is taken for one
that hangs is tests/guardian/test_watch.py's.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from integration.harness import background
from integration.pair import MIB, Pair, Scribbler, image, pair_of

LIMIT = 60.0
"""Seconds after which a process is given up."""

WATCHDOG = 5.0
"""Seconds for which a controller may hang here: more than the machine's load holds up one that does not."""

PATIENT = 30.0
"""Seconds of silence that a transfer may be stuck for: it ends by what the test does and not by itself."""

SIZE = 48 * MIB
DIRTY = 24 * MIB
"""What an epoch in transfer has to carry."""


@asynccontextmanager
async def protected_pair(scratch: Path, *, heartbeat: float | None = None) -> AsyncIterator[Pair]:
    """A VM that is protected, its first copy of all of the disk done."""
    options = ("--watchdog", f"{WATCHDOG:g}")
    disks = [image(scratch, "a", SIZE)]
    async with pair_of(scratch, disks, proxied=True, heartbeat=heartbeat, primary_options=options) as pair:
        await pair.machine.qemu_io("a", f"write -P 0x5a 0 {SIZE}")
        await pair.start_primary()
        assert (await pair.primary.protected())["bytes-sent"] > SIZE
        yield pair


async def all_ended(pair: Pair, act: Callable[[], None]) -> None:
    """Do something to the primary, and wait until it and its guardian have ended."""
    guardian = os.pidfd_open(pair.primary.guardian)
    try:
        act()
        assert await pair.primary.process.wait(LIMIT) == -signal.SIGKILL
        with trio.fail_after(LIMIT):
            await trio.lowlevel.wait_readable(guardian)
    finally:
        os.close(guardian)


async def see_only_the_tracking(pair: Pair) -> None:
    """The VM runs on its own node; of ours there are bitmaps and nothing else."""
    machine = pair.machine
    assert await machine.status() == "running"
    assert await machine.node("a") == "a-node"
    assert await machine.qmp.execute("query-block-exports") == []
    nodes = await machine.qmp.execute("query-named-block-nodes", {"flat": True})
    assert [node["node-name"] for node in nodes if node["node-name"].startswith("qemu-remus")] == []
    assert await pair.tracked() > 0


async def see_the_difference_sent(pair: Pair) -> None:
    """Start the primary again: it takes the bitmaps over, sends what they say, and the copy is exact."""
    pair.end_transfer()
    await pair.start_primary()
    await pair.primary.protected()
    await pair.captured_from_now()
    assert (await pair.primary.status())["bytes-sent"] < DIRTY + 8 * MIB
    await pair.see_exact_after_crash()


@pytest.mark.parametrize("transferring", [False, True], ids=["idle", "in-transfer"])
async def test_a_controller_that_hangs_is_ended_and_its_filter_taken_out(scratch: Path, transferring: bool) -> None:
    async with protected_pair(scratch, heartbeat=PATIENT) as pair:
        if transferring:
            await pair.begin_transfer("a", DIRTY)
        await all_ended(pair, lambda: pair.primary.process.signal(signal.SIGSTOP))
        assert "is silent" in pair.primary.log
        await pair.machine.qemu_io("a", "write -P 0x77 1M 64k")
        await see_only_the_tracking(pair)
        await see_the_difference_sent(pair)


async def test_the_filter_of_a_killed_controller_comes_out_while_the_guest_writes(scratch: Path) -> None:
    async with protected_pair(scratch, heartbeat=PATIENT) as pair, background() as nursery:
        await pair.begin_transfer("a", DIRTY)
        scribbler = Scribbler(pair.machine)
        nursery.start_soon(scribbler.run)
        assert await pair.machine.node("a") != "a-node"
        await all_ended(pair, pair.primary.process.kill)
        await scribbler.go_on()
        await see_only_the_tracking(pair)
        await scribbler.end()
        await see_the_difference_sent(pair)


async def test_a_controller_that_is_started_at_once_and_the_clean_up_do_not_disturb_each_other(scratch: Path) -> None:
    async with protected_pair(scratch, heartbeat=PATIENT) as pair:
        for _ in range(3):
            await pair.begin_transfer("a", DIRTY)
            # the guardian stands still until the new controller is on its way
            guardian = pair.primary.guardian
            os.kill(guardian, signal.SIGSTOP)
            await pair.primary.kill()
            pair.end_transfer()
            await pair.start_primary(wait=False)
            os.kill(guardian, signal.SIGCONT)
            await pair.primary.protected()
            await pair.captured_from_now()
            assert (await pair.primary.status())["bytes-sent"] < DIRTY + 8 * MIB
        await pair.see_exact_after_crash()


async def test_an_hour_in_which_the_whole_machine_stood_still_is_not_held_against_the_controller(scratch: Path) -> None:
    """Of an hour, a little more than the watchdog's time."""
    async with protected_pair(scratch) as pair:
        guardian = pair.primary.guardian
        for pid in (pair.primary.process.pid, guardian):
            os.kill(pid, signal.SIGSTOP)
        await trio.sleep(1.4 * WATCHDOG)
        for pid in (guardian, pair.primary.process.pid):
            os.kill(pid, signal.SIGCONT)
        await pair.primary.protected()
        await pair.captured_from_now()
        assert pair.primary.guardian == guardian


async def test_a_secondary_that_hangs_is_noticed_by_its_silence_and_comes_back(scratch: Path) -> None:
    async with protected_pair(scratch) as pair:
        pair.secondary.process.signal(signal.SIGSTOP)
        status = await pair.lost()
        assert "nothing was heard from the peer for 3 seconds" in status["reason"]
        await pair.machine.qemu_io("a", "write -P 0x21 1M 4M")
        pair.secondary.process.signal(signal.SIGCONT)
        await pair.primary.protected()
        await pair.captured_from_now()
        assert (await pair.primary.status())["bytes-sent"] < SIZE + 16 * MIB
        await pair.see_exact_after_crash()
