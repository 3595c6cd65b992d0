"""The toolstack's desk and the task for work, on mock time: whose time is up, and who does what."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import trio
import trio.testing

from qemu_remus.core import toolstack_machine as toolstack
from qemu_remus.core.commands import CommitArguments, FinishArguments, PrepareArguments
from qemu_remus.core.errors import OutOfOrder, QemuRemusError
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.toolstack_machine import Reply, Request, TimeUp
from qemu_remus.primary.toolstack import ToolstackDesk
from qemu_remus.primary.worker import Worker

SEVEN = EpochNumber(7)


@dataclass
class Engine:
    """Notes what comes and when, in seconds of mock time; whose time is up is refused, as the machine does."""

    events: list[tuple[float, toolstack.Event]] = field(default_factory=list)
    desk: ToolstackDesk = field(init=False)

    def __post_init__(self) -> None:
        self.desk = ToolstackDesk(self.post, lambda: (4096, 0.25))

    async def post(self, event: toolstack.Event) -> None:
        self.events.append((trio.current_time(), event))
        if isinstance(event, TimeUp):
            self.desk.reply(Reply(event.number, error=OutOfOrder("too late", safe="all", hint="again")))

    def times_up(self) -> list[tuple[float, int]]:
        return [(when, event.number) for when, event in self.events if isinstance(event, TimeUp)]


@asynccontextmanager
async def open_engine() -> AsyncIterator[Engine]:
    engine = Engine()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(engine.desk.run)
        await trio.testing.wait_all_tasks_blocked()
        yield engine
        nursery.cancel_scope.cancel()


async def test_each_request_has_its_own_time_whatever_the_order(autojump_clock: trio.testing.MockClock) -> None:
    ended: list[tuple[str, float]] = []

    async def ask(engine: Engine, command: str, arguments: object) -> None:
        with pytest.raises(QemuRemusError, match="too late"):
            await engine.desk.handlers()[command](arguments)
        ended.append((command, trio.current_time() - began))

    async with open_engine() as engine:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, engine, "finish-disk-sync", FinishArguments(SEVEN, 30))
            nursery.start_soon(ask, engine, "commit-epoch", CommitArguments(SEVEN, 2))
            nursery.start_soon(ask, engine, "prepare-epoch", PrepareArguments(10))
        assert [name for name, _ in ended] == ["commit-epoch", "prepare-epoch", "finish-disk-sync"]
        assert [when for _, when in ended] == pytest.approx([2, 10, 30])
        assert len(engine.times_up()) == 3


async def test_an_answer_in_time_is_passed_on_and_its_time_is_never_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    answers: list[object] = []

    async def ask(engine: Engine, timeout: float) -> None:
        answers.append(await engine.desk.handlers()["commit-epoch"](CommitArguments(SEVEN, timeout)))

    async with open_engine() as engine:
        for timeout in (5, 1, 100):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, engine, timeout)
                await trio.testing.wait_all_tasks_blocked()
                _, request = engine.events[-1]
                assert isinstance(request, Request)
                await trio.sleep(0.5)
                engine.desk.reply(Reply(request.number, SEVEN))
        await trio.sleep(200)
        assert [getattr(answer, "epoch", None) for answer in answers] == [SEVEN] * 3
        assert engine.times_up() == []


async def test_a_time_that_is_up_already_is_told_at_once_and_once(autojump_clock: trio.testing.MockClock) -> None:
    async with open_engine() as engine:
        began = trio.current_time()
        with pytest.raises(QemuRemusError, match="too late"):
            await engine.desk.handlers()["prepare-epoch"](PrepareArguments(0))
        assert trio.current_time() == began
        await trio.sleep(100)
        assert len(engine.times_up()) == 1


async def test_a_client_that_goes_away_takes_its_time_with_it(autojump_clock: trio.testing.MockClock) -> None:
    async with open_engine() as engine:
        with trio.move_on_after(1):
            await engine.desk.handlers()["prepare-epoch"](PrepareArguments(10))
        await trio.sleep(100)
        assert engine.times_up() == []


async def test_the_worker_does_one_job_after_another_and_says_when_it_cannot() -> None:
    worker = Worker()
    done: list[int] = []
    go_on = trio.Event()

    async def job(number: int, event: trio.Event | None = None) -> None:
        if event is not None:
            await event.wait()
        done.append(number)

    assert not worker.take(partial(job, 0))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(worker.run)
        await trio.testing.wait_all_tasks_blocked()
        assert worker.take(partial(job, 1, go_on))
        assert not worker.take(partial(job, 2))
        await trio.testing.wait_all_tasks_blocked()
        assert not worker.take(partial(job, 3))
        go_on.set()
        await trio.testing.wait_all_tasks_blocked()
        assert worker.take(partial(job, 4))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert done == [1, 4]
