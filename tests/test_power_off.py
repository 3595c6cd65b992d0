"""Waiting for the last checkpoint of a guest that has powered off: long enough, and no longer."""

from __future__ import annotations

from dataclasses import replace

import trio
import trio.testing

from qemu_remus.core import primary_machine as machine
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.primary_machine import Phase, PrimaryState
from qemu_remus.primary.power_off import COMMIT_LIMIT, LINK_LIMIT, last_checkpoint
from tests.primary_machine.states import at


class Engine:
    """A machine whose epochs take a second each.

    :ivar asked: checkpoints that were asked for.
    """

    def __init__(self, state: PrimaryState) -> None:
        self.state = state
        self.asked = 0

    def look(self) -> PrimaryState:
        return self.state

    async def post(self, event: machine.Event) -> None:
        assert event == machine.CheckpointDue()
        self.asked += 1
        await trio.sleep(1)
        recording = self.state.recording
        assert recording is not None
        self.state = replace(
            self.state,
            committed=recording.epoch,
            recording=replace(recording, base=recording.epoch, epoch=EpochNumber(recording.epoch + 1)),
        )


async def test_a_checkpoint_is_asked_for_at_once_and_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    engine = Engine(at(Phase.IDLE))
    assert await last_checkpoint(engine.look, engine.post) == 8
    assert engine.asked == 1


async def test_an_epoch_that_is_being_captured_may_be_too_early(autojump_clock: trio.testing.MockClock) -> None:
    engine = Engine(at(Phase.CAPTURE))
    async with trio.open_nursery() as nursery:

        async def end_it() -> None:
            await trio.sleep(1)
            engine.state = replace(engine.state, phase=Phase.IDLE, committed=EpochNumber(8), finished=None)

        nursery.start_soon(end_it)
        assert await last_checkpoint(engine.look, engine.post) == 9


async def test_it_is_given_up_at_the_limit_sooner_without_a_link_and_at_once_with_nothing_to_build_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    for state, limit in (
        (at(Phase.STAGE), COMMIT_LIMIT),
        (at(Phase.WAITING), LINK_LIMIT),
        (at(Phase.SYNC_COPY, committed=None), 0.0),
        (at(Phase.STOPPED), 0.0),
        # What a controller that was started only now has on its disk may be older than what the secondary holds.
        (at(Phase.STARTING, recording=None, committed=None), LINK_LIMIT),
    ):
        engine = Engine(state)
        began = trio.current_time()
        assert await last_checkpoint(engine.look, engine.post) is None
        assert limit <= trio.current_time() - began < limit + 0.1
