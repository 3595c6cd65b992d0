"""The applier: when it applies, whom it tells, and that nobody who waits for it waits in vain.

The clock is the real one, as threads are real; where time matters, the interval is made so long that only being asked
explains what happens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from qemu_remus.core import secondary_machine as machine
from qemu_remus.core.errors import NoSpace, StorageError, WriteFailed
from qemu_remus.core.model import EpochNumber
from qemu_remus.secondary import applier as module
from qemu_remus.secondary.applier import Applier

HANGS = 10.0
"""Seconds after which a test has shown a deadlock."""


class Images:
    """A store whose epochs are applied one a call."""

    def __init__(self, *epochs: int) -> None:
        self.waiting = deque(map(EpochNumber, epochs))
        self.failing_over = False
        self.poisoned = False
        self.backlog_bytes = 0
        self.broken = False
        self.dead = 0

    @property
    def backlog(self) -> tuple[EpochNumber, ...]:
        return tuple(self.waiting)

    @property
    def images_current(self) -> bool:
        return not self.waiting

    def apply_some(self) -> EpochNumber | None:
        if self.broken:
            raise WriteFailed("the image is broken", hint="mend it")
        return self.waiting.popleft()

    def revive_targets(self) -> int:
        if self.broken:
            raise WriteFailed("there is no daemon", hint="mend it")
        count, self.dead = self.dead, 0
        return count


@pytest.fixture
def never_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "APPLY_INTERVAL", 3600.0)


@asynccontextmanager
async def running(store: Images, room: float = 64) -> AsyncIterator[tuple[Applier, trio.MemoryReceiveChannel[object]]]:
    send, receive = trio.open_memory_channel[machine.Event](room)
    applier = Applier(store, send)
    with trio.fail_after(HANGS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(applier.run)
            await trio.testing.wait_all_tasks_blocked()
            yield applier, receive
            nursery.cancel_scope.cancel()


async def test_what_is_committed_is_applied_after_the_interval_and_told() -> None:
    store = Images()
    async with running(store) as (applier, events):
        store.waiting.append(EpochNumber(4))
        applier.wake()
        assert await events.receive() == machine.Applied(EpochNumber(4))


async def test_what_a_restart_has_left_is_applied_without_being_asked() -> None:
    async with running(Images(4)) as (_, events):
        assert await events.receive() == machine.Applied(EpochNumber(4))


async def test_a_large_backlog_does_not_wait(never_by_itself: None) -> None:
    store = Images(4)
    store.backlog_bytes = module.APPLY_AT_ONCE_BYTES + 1
    async with running(store) as (applier, events):
        applier.wake()
        assert await events.receive() == machine.Applied(EpochNumber(4))


# --- waiting for it ---------------------------------------------------------------------------------------------------


async def test_who_waits_for_the_images_does_not_wait_for_the_interval(never_by_itself: None) -> None:
    store = Images(4, 5, 6)
    async with running(store) as (applier, _):
        await applier.caught_up()
        assert not store.waiting
        # Nothing to wait for.
        await applier.caught_up()


async def test_the_engine_may_wait_although_its_queue_is_full(never_by_itself: None) -> None:
    store = Images(4, 5, 6)
    async with running(store, room=0) as (applier, events):
        await applier.caught_up()
        # The news were not lost, only the older ones.
        assert await events.receive() == machine.Applied(EpochNumber(6))


async def test_an_image_that_cannot_be_written_is_told_and_ends_the_waiting_although_the_queue_is_full(
    never_by_itself: None,
) -> None:
    store = Images(4, 5)
    store.broken = True
    async with running(store, room=0) as (applier, events):
        with pytest.raises(StorageError, match="the image is broken") as caught:
            await applier.caught_up()
        assert caught.value.hint == "mend it"
        told = await events.receive()
        assert isinstance(told, machine.ApplyFailed)
        assert "the image is broken" in told.text


async def test_applying_makes_room(never_by_itself: None) -> None:
    store = Images(4, 5)

    def append() -> str:
        if store.waiting:
            raise NoSpace("full")
        return "done"

    async with running(store) as (applier, _):
        assert await applier.with_room(append) == "done"


async def test_room_that_was_made_while_there_was_none_is_used(never_by_itself: None) -> None:
    store = Images(4)
    calls: list[int] = []

    def append() -> None:
        calls.append(len(store.waiting))
        if len(calls) == 1:
            trio.from_thread.run(applier.caught_up)
            raise NoSpace("full")

    async with running(store) as (applier, _):
        await applier.with_room(append)
    assert calls == [1, 0]


@pytest.mark.parametrize("why", ["nothing to apply", "poisoned", "broken"])
async def test_no_room_is_an_error_where_none_will_be_made(why: str, never_by_itself: None) -> None:
    store = Images(*(() if why == "nothing to apply" else (4,)))
    store.poisoned = why == "poisoned"
    store.broken = why == "broken"

    def append() -> None:
        raise NoSpace("full")

    async with running(store) as (applier, _):
        with pytest.raises(NoSpace, match="full"):
            await applier.with_room(append)


async def test_nobody_waits_for_an_applier_that_was_stopped(never_by_itself: None) -> None:
    applier = Applier(Images(4), trio.open_memory_channel[machine.Event](1)[0])
    with trio.fail_after(HANGS):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(applier.run)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(StorageError, match="stopped"):
            await applier.caught_up()


async def test_waiting_for_the_images_has_an_end(autojump_clock: trio.testing.MockClock) -> None:
    # Nothing runs that would apply.
    applier = Applier(Images(4), trio.open_memory_channel[machine.Event](1)[0])
    with pytest.raises(StorageError, match="300 seconds"):
        await applier.caught_up()
    assert trio.current_time() == pytest.approx(module.PATIENCE, abs=1)


async def test_nothing_is_applied_while_failing_over(never_by_itself: None) -> None:
    store = Images(4)
    store.failing_over = True
    store.backlog_bytes = module.APPLY_AT_ONCE_BYTES + 1
    async with running(store) as (applier, events):
        applier.wake()
        await trio.testing.wait_all_tasks_blocked(0.05)
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()
        assert store.waiting


async def test_what_writes_a_target_is_started_again_as_soon_as_it_is_lost(never_by_itself: None) -> None:
    store = Images()
    store.dead = 1
    async with running(store) as (applier, events):
        applier.target_lost("the daemon was killed")
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert store.dead == 0
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()


async def test_a_target_that_stays_lost_takes_the_store_along_until_that_is_opened_again(never_by_itself: None) -> None:
    store = Images()
    store.broken = True
    async with running(store) as (applier, events):
        applier.target_lost("the daemon was killed")
        told = await events.receive()
        assert isinstance(told, machine.StoreFailed)
        assert told.lasting
        assert "no daemon" in told.text
