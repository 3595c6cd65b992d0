"""When a verification's next slice has its turn, on mock time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

from qemu_remus.core import primary_machine as machine
from qemu_remus.core import toolstack_machine as toolstack
from qemu_remus.core.verification import Order
from qemu_remus.primary.pace import BURST_SECONDS
from qemu_remus.primary.verify_desk import VerifyDesk

RATE = 1000
"""Bytes a second."""


@pytest.mark.parametrize("every", [0.2, 5.0])
async def test_a_slice_has_its_turn_in_time_however_often_an_epoch_ends_meanwhile(
    autojump_clock: trio.testing.MockClock, every: float
) -> None:
    due: list[float] = []
    verifier = SimpleNamespace(read_bytes=0)
    schedule = machine.ScheduleVerify(Order(1, (0,), (1 << 20,), False, RATE, ()), held=False)

    async def post(event: toolstack.Event) -> None:
        await trio.lowlevel.checkpoint()
        assert event == machine.VerifyDue()
        due.append(trio.current_time())
        verifier.read_bytes = 3 * RATE

    desk = VerifyDesk(post, *cast(Any, (None, verifier)), default_rate=RATE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.run)
        began = trio.current_time()
        while len(due) < 4 and trio.current_time() < began + 60:
            desk.schedule(schedule)
            await trio.sleep(every)
        nursery.cancel_scope.cancel()
    assert len(due) == 4
    # each has read for three seconds' worth, the first one nothing
    assert due[3] - began >= 3 * 3 - BURST_SECONDS
    assert due[3] - began <= 3 * (3 + every)
