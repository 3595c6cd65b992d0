"""The pause of a switch-over: whoever ends before it is final leaves the VM running, and afterwards paused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from qemu_remus.core.errors import CommandFailed, QemuError
from qemu_remus.qemu.hold import Hold
from tests.fake_qemu import FakeQemu


class FakeGuardian:
    """Remembers what it was told, in order.

    :ivar deaf: it cannot be brought to answer.
    """

    def __init__(self) -> None:
        self.told: list[str] = []
        self.deaf = False

    async def arm(self, seconds: float = 10.0) -> None:
        await self._hear(f"arm {seconds:g}")

    def disarm(self) -> None:
        self.told.append("disarm")

    async def stand_down(self) -> None:
        await self._hear("stand down")

    async def resume_now(self, timeout: float = 30.0) -> None:
        await self._hear("resume")

    async def _hear(self, what: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.deaf:
            raise QemuError("the guardian does not answer")
        self.told.append(what)


@asynccontextmanager
async def holding() -> AsyncIterator[tuple[FakeQemu, FakeGuardian, Hold]]:
    guardian = FakeGuardian()
    with FakeQemu() as qemu:
        async with qemu.connect() as client:
            yield qemu, guardian, Hold(client, guardian)  # type: ignore[arg-type]


async def test_a_guardian_knows_of_the_pause_before_it_begins_and_until_the_vm_runs() -> None:
    async with holding() as (qemu, guardian, hold):
        assert await hold.take(60.0)
        assert qemu.status == "paused"
        await hold.let_run()
        assert qemu.status == "running"
        assert guardian.told == ["arm 70", "arm 10", "disarm"]


async def test_without_a_guardian_there_is_no_pause() -> None:
    async with holding() as (qemu, guardian, hold):
        guardian.deaf = True
        with pytest.raises(QemuError, match="does not answer"):
            await hold.take(60.0)
        assert qemu.status == "running"


async def test_a_vm_that_is_paused_already_is_used_and_not_ours() -> None:
    async with holding() as (qemu, guardian, hold):
        qemu.status = "paused"
        assert not await hold.take(60.0)
        await hold.let_go()
        assert qemu.status == "paused"
        assert guardian.told == []


@pytest.mark.parametrize("status", ["suspended", "io-error", "shutdown", "inmigrate"])
async def test_a_vm_in_any_other_state_is_left_so(status: str) -> None:
    async with holding() as (qemu, _, hold):
        qemu.status = status
        with pytest.raises(QemuError, match=f"the VM is {status}"):
            await hold.take(60.0)
        await hold.let_run()
        assert qemu.status == status


async def test_a_vm_is_told_to_run_for_as_long_as_its_qemu_hangs(autojump_clock: trio.testing.MockClock) -> None:
    async with holding() as (qemu, guardian, hold), trio.open_nursery() as nursery:
        await hold.take(60.0)
        qemu.hang()
        nursery.start_soon(hold.let_run)
        await trio.sleep(60)
        qemu.go_on()
        await trio.testing.wait_all_tasks_blocked()
        assert qemu.status == "running"
        assert guardian.told[-1] == "disarm"


async def test_at_the_end_a_pause_that_is_not_final_is_undone() -> None:
    async with holding() as (qemu, _, hold):
        await hold.take(60.0)
        await hold.let_go()
        assert qemu.status == "running"


async def test_a_final_pause_outlasts_the_end_and_can_still_be_undone_on_purpose() -> None:
    async with holding() as (qemu, guardian, hold):
        await hold.take(60.0)
        await hold.stand()
        await hold.let_go()
        assert qemu.status == "paused"
        assert guardian.told[-1] == "stand down"
        await hold.let_run()
        assert qemu.status == "running"


async def test_a_pause_that_the_guardian_may_undo_is_not_final() -> None:
    async with holding() as (qemu, guardian, hold):
        await hold.take(60.0)
        guardian.deaf = True
        with pytest.raises(QemuError):
            await hold.stand()
        await hold.let_go()
        assert qemu.status == "running"


async def test_a_refused_stop_leaves_the_guardian_disarmed() -> None:
    async with holding() as (qemu, guardian, hold):
        qemu.refuse("stop")
        with pytest.raises(CommandFailed):
            await hold.take(60.0)
        assert qemu.status == "running"
        assert guardian.told[-1] == "disarm"
