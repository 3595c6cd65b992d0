"""The primary's engine: one event at a time, in the order in which they came, whoever brings them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from qemu_remus.primary.engine import QUEUE_LIMIT, Engine


@dataclass
class Handled:
    """What was handled, and by which task; ``held`` holds up the events of these names until they are let go."""

    names: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    held: dict[str, trio.Event] = field(default_factory=dict)
    inside: int = 0
    over: bool = False

    async def handle(self, name: str) -> None:
        self.inside += 1
        assert self.inside == 1, "two at a time"
        self.names.append(name)
        self.tasks.append(trio.lowlevel.current_task().name)
        if name in self.held:
            await self.held[name].wait()
        self.inside -= 1
        if name == "fail":
            raise ValueError(name)
        self.over = self.over or name == "end"


@asynccontextmanager
async def engine_of(handled: Handled) -> AsyncIterator[tuple[Engine[str], trio.Nursery]]:
    engine = Engine(handled.handle, lambda: handled.over)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run, name="engine")
        await trio.testing.wait_all_tasks_blocked()
        yield engine, nursery
        nursery.cancel_scope.cancel()


async def test_a_given_event_is_handled_by_its_giver_and_a_posted_one_by_the_engine() -> None:
    handled = Handled()
    async with engine_of(handled) as (engine, nursery):
        nursery.start_soon(engine.give, "a", name="giver")
        await trio.testing.wait_all_tasks_blocked()
        await engine.post("b")
        await trio.testing.wait_all_tasks_blocked()
    assert list(zip(handled.names, handled.tasks, strict=True)) == [("a", "giver"), ("b", "engine")]


@pytest.mark.parametrize("first", ["give", "post"])
async def test_nothing_overtakes_what_is_under_way_or_waits(first: str) -> None:
    handled = Handled(held={"a": trio.Event()})
    async with engine_of(handled) as (engine, nursery):
        nursery.start_soon(getattr(engine, first), "a", name="first")
        await trio.testing.wait_all_tasks_blocked()
        for index, name in enumerate("bcdef"):
            await (engine.give if index % 2 else engine.post)(name)
            await trio.testing.wait_all_tasks_blocked()
        assert handled.names == ["a"]
        handled.held["a"].set()
        # the engine's task has b already, and has not had its turn
        await engine.give("g")
        await trio.testing.wait_all_tasks_blocked()
        await engine.give("h")
    assert "".join(handled.names) == "abcdefgh"
    assert handled.tasks[1:7] == ["engine"] * 6
    assert handled.tasks[7] != "engine"


async def test_what_is_given_before_the_engine_runs_waits_for_it() -> None:
    handled = Handled()
    engine = Engine(handled.handle, lambda: handled.over)
    await engine.post("a")
    await engine.give("b")
    await engine.give("end")
    assert handled.names == []
    await engine.run()
    assert handled.names == ["a", "b", "end"]


@pytest.mark.parametrize("way", ["give", "post"])
async def test_the_engine_ends_with_the_event_that_ends_it_and_handles_none_behind_it(way: str) -> None:
    handled = Handled(held={"end": trio.Event()})
    engine = Engine(handled.handle, lambda: handled.over)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(getattr(engine, way), "end")
        await trio.testing.wait_all_tasks_blocked()
        await engine.post("late")
        handled.held["end"].set()
    # the nursery's end: the engine's task has ended
    await engine.give("later")
    assert handled.names == ["end"]


@pytest.mark.parametrize("way", ["give", "post"])
async def test_what_goes_wrong_ends_the_engine_and_not_whoever_gave_it(way: str) -> None:
    handled = Handled()

    async def fail() -> None:
        async with engine_of(handled) as (engine, _):
            await getattr(engine, way)("fail")
            await engine.give("behind")
            await trio.testing.wait_all_tasks_blocked()

    with pytest.raises(ExceptionGroup) as caught:
        await fail()
    [error] = caught.value.exceptions
    assert isinstance(error, ValueError)
    assert handled.names == ["fail"]


async def test_posting_waits_for_a_place_and_a_cancelled_post_leaves_nothing() -> None:
    handled = Handled(held={"0": trio.Event()})
    async with engine_of(handled) as (engine, nursery):
        # one is with the engine, the others wait
        for number in range(QUEUE_LIMIT + 1):
            await engine.post(str(number))
            await trio.testing.wait_all_tasks_blocked()
        with trio.CancelScope() as scope:
            nursery.start_soon(trio.testing.wait_all_tasks_blocked)
            nursery.start_soon(_cancel_when_blocked, scope)
            await engine.post("lost")
        assert scope.cancelled_caught
        handled.held["0"].set()
        await trio.testing.wait_all_tasks_blocked()
        # nothing is under way any more, or it would be the engine's task that handles it
        await engine.give("mine")
    assert handled.names == [*map(str, range(QUEUE_LIMIT + 1)), "mine"]
    assert handled.tasks[-1] != "engine"


async def _cancel_when_blocked(scope: trio.CancelScope) -> None:
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel()


async def test_a_giver_that_is_cancelled_leaves_the_engine_to_others() -> None:
    handled = Handled(held={"a": trio.Event()})
    async with engine_of(handled) as (engine, nursery):
        with trio.CancelScope() as scope:
            nursery.start_soon(_cancel_when_blocked, scope)
            await engine.give("a")
        assert scope.cancelled_caught
        handled.inside = 0
        await engine.post("b")
        await trio.testing.wait_all_tasks_blocked()
    assert handled.names == ["a", "b"]
