"""A planned switch-over as the primary's machine decides it, one decision a test: who resumes the VM, and who must not.

Epoch 8 is being recorded when somebody asks, and is the last one.  How the two sides get on with each other under all
kinds of faults is ``tests/simulation``'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.errors import CommitInDoubt, NotProtected, OutOfOrder, QemuRemusError, RefusalCode, TimedOut
from qemu_remus.core.model import DiskState, EpochNumber, Generation, Replication, Role
from qemu_remus.core.primary_machine import Handover, Phase, PrimaryState, SwitchReply
from qemu_remus.core.switchover_machine import step
from tests.primary_machine.states import ONE, at, link_up, recording, theirs

NEXT = Generation(UUID(int=5))
ME, OTHER = 1, 2
EIGHT = EpochNumber(8)
HANDOVER = Handover(EIGHT, NEXT)
ASKED = machine.SwitchRequested(ME, NEXT, 60.0)
HELD = machine.Held(ours=True)
CAPTURED = machine.Captured(changed=False)
COMMITTED = machine.FromPeer(m.Committed(EIGHT))
LAST = (ASKED, HELD, CAPTURED, COMMITTED, machine.BitmapRemoved())
TOLD = (*LAST, machine.Standing())
CUT = machine.LinkDown("the cable is out")


def played(state: PrimaryState, *events: machine.Event) -> machine.Step:
    """The state after some events, and the effects of the last one."""
    effects: tuple[machine.Effect, ...] = ()
    for event in events:
        state, effects = step(state, event)
    return state, effects


def after(*events: machine.Event, of: PrimaryState | None = None) -> PrimaryState:
    return played(at(Phase.IDLE) if of is None else of, *events)[0]


def answers(effects: tuple[machine.Effect, ...]) -> dict[int, Handover | type[QemuRemusError] | None]:
    replies = [effect for effect in effects if isinstance(effect, SwitchReply)]
    return {one.request: one.handover if one.error is None else type(one.error) for one in replies}


def kinds(effects: tuple[machine.Effect, ...]) -> list[type]:
    return [type(effect) for effect in effects]


# --- until the secondary is told -------------------------------------------------------------------------------------


def test_the_vm_is_paused_for_one_more_epoch_which_finds_it_paused() -> None:
    state, effects = played(at(Phase.IDLE), ASKED)
    assert effects == (machine.Hold(60.0),)
    state, effects = step(state, HELD)
    assert effects == (machine.Capture(recording(7, 8), recording(8, 9), pause=False),)


def test_an_epoch_under_way_is_waited_for() -> None:
    state, effects = played(at(Phase.STAGE), ASKED)
    assert effects == ()
    state, effects = played(state, COMMITTED, machine.BitmapRemoved())
    assert effects == (machine.Hold(60.0),)


def test_it_is_durable_before_the_pause_is_final_and_that_before_the_secondary_is_told() -> None:
    state, effects = played(at(Phase.IDLE), *LAST)
    assert effects == (machine.SaveState(), machine.Stand(recording(8, 9)))
    assert state.handover == HANDOVER
    _, effects = step(state, machine.Standing())
    assert effects == (machine.Send(m.HandOver(EIGHT, NEXT)),)


@pytest.mark.parametrize(
    ("story", "trouble"),
    [
        pytest.param((ASKED, HELD, machine.Captured()), CUT, id="link lost"),
        pytest.param((ASKED, HELD, machine.Captured()), machine.WorkFailed("the fleece is full"), id="epoch lost"),
        pytest.param((ASKED, HELD, CAPTURED), machine.StopRequested(), id="told to stop"),
        pytest.param(
            (ASKED, HELD, CAPTURED),
            machine.FromPeer(m.EpochRefused(EIGHT, RefusalCode.NO_SPACE, "full")),
            id="refused",
        ),
        pytest.param((ASKED, HELD), machine.NotCaptured("the VM runs"), id="somebody resumed it"),
        pytest.param(LAST, machine.WorkFailed("it has run on"), id="it has run on"),
    ],
)
def test_trouble_before_the_secondary_is_told_resumes_the_vm_first_of_all(
    story: tuple[machine.Event, ...], trouble: machine.Event
) -> None:
    state, effects = played(at(Phase.IDLE), *story, trouble)
    assert effects[0] == machine.Resume()
    assert answers(effects) == {ME: NotProtected}
    assert state.switch is None
    assert state.handover is None


def test_while_nodes_are_being_put_in_the_vm_is_not_resumed_and_right_after_it_is() -> None:
    state, effects = played(at(Phase.IDLE), ASKED, HELD, CUT)
    assert machine.Resume() not in effects
    _, effects = step(state, machine.Captured())
    assert effects[0] == machine.Resume()
    assert answers(effects) == {ME: NotProtected}


def test_a_vm_that_somebody_else_has_paused_is_not_resumed() -> None:
    _, effects = played(at(Phase.IDLE), ASKED, machine.Held(ours=False), machine.Captured(), CUT)
    assert machine.Resume() not in effects
    assert answers(effects) == {ME: NotProtected}


def test_what_takes_too_long_goes_on_as_an_ordinary_epoch() -> None:
    state, effects = played(at(Phase.IDLE), ASKED, HELD, CAPTURED, machine.SwitchTimeUp(ME))
    assert effects[0] == machine.Resume()
    assert answers(effects) == {ME: TimedOut}
    state, effects = played(state, COMMITTED, machine.BitmapRemoved())
    assert state.phase is Phase.IDLE
    assert effects == (machine.Schedule(0),)


def test_what_takes_too_long_in_the_middle_of_a_piece_of_work_is_undone_at_its_end() -> None:
    for story, end in (((ASKED,), HELD), (LAST, machine.Standing())):
        state, effects = played(at(Phase.IDLE), *story, machine.SwitchTimeUp(ME))
        assert answers(effects) == {ME: TimedOut}
        state, effects = step(state, end)
        assert effects[0] == machine.Resume()
        assert (state.phase, state.handover, state.switch) == (Phase.IDLE, None, None)


@pytest.mark.parametrize(
    ("state", "event", "error"),
    [
        (at(Phase.WAITING), ASKED, NotProtected),
        (at(Phase.SYNC_COPY, protected=False), ASKED, NotProtected),
        (at(Phase.IDLE, protected=False), ASKED, NotProtected),
        (at(Phase.IDLE, stopping=True), ASKED, NotProtected),
        (at(Phase.STOPPED), ASKED, NotProtected),
        (after(ASKED), replace(ASKED, request=OTHER), OutOfOrder),
        (at(Phase.IDLE), replace(ASKED, epoch=EpochNumber(7)), OutOfOrder),
        (at(Phase.IDLE, one_step=False), ASKED, OutOfOrder),
        (at(Phase.IDLE, one_step=False), replace(ASKED, epoch=EpochNumber(6)), OutOfOrder),
    ],
)
def test_where_it_cannot_be_nothing_is_changed(state: PrimaryState, event: Any, error: type) -> None:
    unchanged, effects = step(state, event)
    assert unchanged == state
    assert answers(effects) == {event.request: error}


def test_a_toolstack_that_has_paused_and_committed_needs_no_other_epoch_and_no_resume() -> None:
    seven = EpochNumber(7)
    state, effects = step(at(Phase.IDLE, one_step=False), replace(ASKED, epoch=seven))
    assert effects == (machine.SaveState(), machine.Stand(recording(7, 8)))
    _, sent = step(state, machine.Standing())
    assert sent == (machine.Send(m.HandOver(seven, NEXT)),)
    _, effects = step(state, machine.WorkFailed("it has run on"))
    assert machine.Resume() not in effects
    assert answers(effects) == {ME: NotProtected}


# --- after it --------------------------------------------------------------------------------------------------------


def test_on_the_secondarys_answer_everything_goes_and_the_vm_stays_paused() -> None:
    state, effects = played(at(Phase.IDLE), *TOLD, machine.FromPeer(m.HandedOver(EIGHT, NEXT)))
    done = replace(HANDOVER, done=True)
    assert effects == (
        machine.SaveState(),
        SwitchReply(ME, done, complete=True),
        machine.RemoveBitmaps((recording(8, 9),)),
    )
    assert machine.replication(state) is Replication.FAILED_OVER
    state, effects = step(state, machine.BitmapRemoved())
    assert state.phase is Phase.STOPPED
    assert effects[-1] == machine.Stop()


def test_a_refusal_lets_the_vm_run_on() -> None:
    refused = m.HandoverRefused(EIGHT, RefusalCode.STORAGE_FAILED, "the disk is broken")
    state, effects = played(at(Phase.IDLE), *TOLD, machine.FromPeer(refused))
    assert kinds(effects)[:2] == [machine.Resume, machine.SaveState]
    assert (state.phase, state.handover) == (Phase.IDLE, None)
    assert answers(effects) == {ME: NotProtected}


@pytest.mark.parametrize(
    "lost", [CUT, machine.FromPeer(m.Goodbye(RefusalCode.FAILED_OVER, "bye")), machine.SwitchTimeUp(ME)]
)
def test_without_an_answer_nothing_resumes_the_vm(lost: machine.Event) -> None:
    state, effects = played(at(Phase.IDLE), *TOLD, lost)
    assert machine.Resume() not in effects
    assert state.handover == HANDOVER
    assert machine.replication(state) is Replication.DEGRADED


DOUBT = after(*TOLD, CUT)
"""The link is gone, and the answer with it."""

RESTARTED = at(Phase.WAITING, handover=HANDOVER, committed=EIGHT, highest=9, recording=recording(8, 9))
"""A controller that was started again then."""


@pytest.mark.parametrize("state", [DOUBT, RESTARTED])
def test_the_next_hello_of_a_secondary_that_has_not_taken_over_resumes_the_vm(state: PrimaryState) -> None:
    state, effects = step(state, link_up(state, theirs(committed=EIGHT)))
    assert kinds(effects)[:2] == [machine.Resume, machine.SaveState]
    assert (state.phase, state.handover) == (Phase.IDLE, None)


@pytest.mark.parametrize("state", [DOUBT, RESTARTED])
@pytest.mark.parametrize("complete", [True, False])
def test_the_next_hello_of_a_secondary_that_has_taken_over_ends_it(state: PrimaryState, *, complete: bool) -> None:
    if complete:
        hello = theirs(role=Role.PRIMARY, generation=NEXT, history=((ONE, EIGHT),), disk_state=DiskState.UP_TO_DATE)
    else:
        hello = theirs(role=Role.PRIMARY, committed=EIGHT)
    asked = after(replace(ASKED, request=OTHER), of=state)
    state, effects = step(asked, link_up(asked, hello))
    assert machine.Resume() not in effects
    assert SwitchReply(OTHER, replace(HANDOVER, done=True), complete=complete) in effects
    assert state.phase is Phase.HANDED_OVER


@pytest.mark.parametrize(
    "hello",
    [
        theirs(committed=EIGHT, disk_state=DiskState.FAILED),  # it may have decided, and not know
        theirs(generation=None, committed=None, disk_state=DiskState.INCONSISTENT),  # somebody else, with a new store
        theirs(generation=NEXT, committed=EIGHT),
        theirs(committed=EpochNumber(7)),  # it is not what it was
    ],
)
def test_whoever_cannot_know_leaves_it_in_doubt(hello: m.Hello) -> None:
    state, effects = step(DOUBT, link_up(DOUBT, hello))
    assert kinds(effects) == [machine.Disconnect, machine.Connect]
    assert state.handover == HANDOVER
    assert state.phase is Phase.WAITING


def test_a_refused_connection_is_no_answer() -> None:
    state, effects = step(DOUBT, machine.LinkRefused(m.Goodbye(RefusalCode.OTHER_PRIMARY, "another one is connected")))
    assert effects == ()
    assert state.handover == HANDOVER


@pytest.mark.parametrize(
    "state", [DOUBT, RESTARTED, after(*TOLD, machine.StopRequested()), after(*TOLD, machine.StopRequested(), CUT)]
)
def test_whoever_ends_in_doubt_says_so_and_keeps_it(state: PrimaryState) -> None:
    asked = after(replace(ASKED, request=OTHER), of=state)
    if asked.phase is not Phase.STOPPED:
        asked, effects = played(asked, machine.StopRequested())
        if asked.phase is not Phase.STOPPED:
            asked, effects = step(asked, machine.StopDeadline())
        assert effects[-1] == machine.Stop(doubt=HANDOVER)
        assert answers(effects)[OTHER] is CommitInDoubt
    assert asked.handover == HANDOVER
    assert asked.switch is None


def test_asking_again_waits_for_the_answer_too() -> None:
    state = after(*TOLD, replace(ASKED, request=OTHER))
    _, effects = step(state, machine.FromPeer(m.HandedOver(EIGHT, NEXT)))
    assert set(answers(effects)) == {ME, OTHER}
    _, effects = step(DOUBT, machine.SwitchTimeUp(ME))
    assert answers(effects) == {ME: CommitInDoubt}
