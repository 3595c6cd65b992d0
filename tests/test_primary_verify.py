"""When the primary's machine verifies: between epochs, in nobody's way, where there is something to compare with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.errors import NotProtected, OutOfOrder, RefusalCode
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import EpochNumber, Replication
from qemu_remus.core.primary_machine import Opened, Phase, PrimaryState, step
from qemu_remus.core.verification import COARSE, SLICE_DATA, Ending, Findings, Order, Piece, Verification
from tests.primary_machine.states import TWO, at, first_sync, live, merged, recording

SIZE = 1 << 20
ORDER = Order(3, (0, 1), (SIZE, SIZE), True)
FIRST = Piece(Extent(0, 0, SIZE), COARSE, SLICE_DATA)
SENT = Opened(1, 4096, 5)
WRONG = (Extent(0, 8192, 4096),)
DUE = machine.VerifyDue()
SCHEDULED = machine.ScheduleVerify(ORDER)


def going(phase: Phase = Phase.IDLE, **fields: Any) -> PrimaryState:
    """Protected, with a verification that goes on."""
    return at(phase, verification=Verification(ORDER), **fields)


def looking(**fields: Any) -> PrimaryState:
    """With a slice under way."""
    state, _ = step(replace(going(), **fields), DUE)
    assert state.phase is Phase.VERIFY
    return state


def ended(state: PrimaryState) -> Ending | None:
    assert state.verification is not None
    return state.verification.ending


DONE = machine.SliceVerified(Opened(), Findings(SIZE))
REPAIRED = machine.SliceVerified(SENT, Findings(SIZE, WRONG, sent=WRONG))


def test_a_verification_begins_where_the_vm_is_protected() -> None:
    state, effects = step(at(Phase.IDLE), machine.VerifyRequested(ORDER))
    assert effects == (machine.VerifyAnswered(3), SCHEDULED)
    assert machine.replication(state) is Replication.VERIFYING


def test_in_an_epoch_it_waits_for_the_epochs_end() -> None:
    state, effects = step(at(Phase.TRANSFER), machine.VerifyRequested(ORDER))
    assert effects == (machine.VerifyAnswered(3),)
    state, effects = step(replace(state, phase=Phase.RETIRE, finished=None, opened=None), machine.BitmapRemoved())
    assert effects == (SCHEDULED, machine.Schedule())


@pytest.mark.parametrize(
    "state",
    [
        at(Phase.WAITING),
        at(Phase.IDLE, protected=False),
        first_sync(Phase.IDLE),
        at(Phase.IDLE, reach=(EpochNumber(7), None)),
        at(Phase.IDLE, reach=(EpochNumber(8), EpochNumber(7))),
        at(Phase.IDLE, doubt=machine.Doubt(EpochNumber(6))),
        at(Phase.IDLE, stopping=True),
    ],
)
def test_where_there_is_nothing_to_compare_with_it_is_refused(state: PrimaryState) -> None:
    after, (answer,) = step(state, machine.VerifyRequested(ORDER))
    assert isinstance(answer, machine.VerifyAnswered)
    assert isinstance(answer.error, NotProtected)
    assert after == state


def test_a_second_one_is_refused_and_one_that_has_ended_is_not_in_the_way() -> None:
    _, (answer,) = step(going(), machine.VerifyRequested(replace(ORDER, number=4)))
    assert isinstance(answer, machine.VerifyAnswered)
    assert isinstance(answer.error, OutOfOrder)
    over, _ = step(going(), machine.VerifyCancelled(4))
    _, effects = step(over, machine.VerifyRequested(replace(ORDER, number=5)))
    assert effects[0] == machine.VerifyAnswered(5)


def test_a_slice_opens_the_next_epoch_ahead_of_its_checkpoint() -> None:
    state, effects = step(going(), DUE)
    assert effects == (
        machine.Send(m.EpochBegin(EpochNumber(8), EpochNumber(7))),
        machine.VerifySlice(FIRST, recording(7, 8), Opened(), repair=True),
    )
    state, effects = step(state, REPAIRED)
    assert effects == (SCHEDULED, machine.Schedule())
    assert (state.phase, state.opened) == (Phase.IDLE, SENT)
    _, effects = step(state, DUE)
    (look,) = effects
    assert isinstance(look, machine.VerifySlice)
    assert look.opened == SENT


def test_the_checkpoint_after_it_ends_the_same_epoch() -> None:
    state, _ = step(looking(), REPAIRED)
    state, (capture,) = step(state, machine.CheckpointDue())
    assert capture == machine.Capture(recording(7, 8), recording(8, 9))
    state, effects = step(state, machine.Captured())
    assert effects == (machine.Transfer(recording(7, 8), SENT),)
    state, (end,) = step(state, machine.Transferred(SENT))
    assert end == machine.Send(m.EpochEnd(EpochNumber(8), 1, 4096, 5, True))
    state, _ = step(state, machine.FromPeer(m.Committed(EpochNumber(8))))
    assert state.verification is not None
    assert state.verification.repaired_bytes == 4096


def test_a_checkpoint_that_falls_due_meanwhile_is_taken_at_the_slices_end() -> None:
    state, effects = step(looking(), machine.CheckpointDue())
    assert effects == (machine.InterruptSlice(patient=True),)
    state, effects = step(state, DONE)
    assert effects == (machine.Capture(recording(7, 8), recording(8, 9)),)
    assert not state.due


def test_a_slice_that_falls_due_in_an_epoch_is_dropped() -> None:
    for phase in (Phase.CAPTURE, Phase.TRANSFER, Phase.STAGE, Phase.RETIRE, Phase.MERGE, Phase.AHEAD):
        state = going(phase)
        assert step(state, DUE) == (state, ())


def test_for_a_toolstack_a_slice_is_ended_and_none_is_begun_before_its_checkpoint() -> None:
    state, effects = step(looking(one_step=False), machine.MakeWay(patient=True))
    assert effects == (machine.InterruptSlice(patient=True),)
    state, effects = step(state, machine.MakeWay(patient=False))
    assert effects == (machine.InterruptSlice(patient=False),)
    state, effects = step(state, machine.SliceVerified(Opened(), Findings(0)))
    held = machine.ScheduleVerify(ORDER, held=True)
    assert effects == (held,)
    again, effects = step(state, DUE)
    assert again.phase is Phase.VERIFY, "the toolstack has not come"
    state, _ = step(state, machine.CheckpointDue(pause=False))
    assert not state.making_way
    assert not state.hurried


def test_cancelling_ends_the_slice_and_keeps_what_was_found() -> None:
    state, effects = step(looking(), machine.VerifyCancelled(9))
    assert effects == (machine.VerifyAnswered(9), machine.InterruptSlice(patient=False))
    state, effects = step(state, REPAIRED)
    assert effects == (machine.Schedule(),)
    assert ended(state) is Ending.CANCELLED
    assert state.verification is not None
    assert state.verification.ranges == WRONG
    assert machine.replication(state) is Replication.PROTECTED
    _, (answer,) = step(state, machine.VerifyCancelled(10))
    assert isinstance(answer, machine.VerifyAnswered)
    assert isinstance(answer.error, OutOfOrder)


def test_a_lost_link_suspends_it_and_its_repairs_are_looked_at_again() -> None:
    state, _ = step(looking(), REPAIRED)
    state, _ = step(state, DUE)
    state, effects = step(state, machine.LinkDown("cut"))
    assert effects == (machine.CancelWork(),)
    state, _ = step(state, machine.WorkFailed("it was cancelled"))
    assert state.phase is Phase.MERGE
    assert ended(state) is None
    assert state.verification is not None
    assert [suspect.extent for suspect in state.verification.suspects] == list(WRONG)
    state, effects = step(state, merged(7, 9, live(7, 8)))
    assert effects == (machine.Connect(),)
    assert machine.replication(state) is Replication.DEGRADED


def test_a_slice_that_ends_after_the_link_was_lost_does_not_leave_its_epoch_open() -> None:
    state, _ = step(looking(), machine.LinkDown("cut"))
    state, effects = step(state, DONE)
    assert state.phase is Phase.MERGE
    assert state.opened is None
    assert isinstance(effects[-1], machine.MergeBack)


def test_an_epoch_that_is_refused_while_it_compares_ends_the_verification_and_nothing_is_believed() -> None:
    refused = m.EpochRefused(EpochNumber(8), RefusalCode.STORAGE_FAILED, "cannot read the image")
    state, effects = step(looking(), machine.FromPeer(refused))
    assert effects == (machine.CancelWork(),)
    state, _ = step(state, REPAIRED)
    assert ended(state) is Ending.FAILED
    assert state.verification is not None
    assert "cannot read the image" in state.verification.reason
    assert state.verification.ranges == ()
    assert state.phase is Phase.MERGE


def test_a_refusal_of_an_epoch_in_which_nothing_was_compared_does_not_end_it() -> None:
    state, _ = step(
        going(Phase.TRANSFER),
        machine.FromPeer(m.EpochRefused(EpochNumber(8), RefusalCode.NO_SPACE, "the journal is full")),
    )
    assert ended(state) is None


def test_what_a_slice_cannot_read_ends_it_and_not_the_epoch() -> None:
    state, effects = step(looking(), replace(DONE, problem="EIO", findings=Findings(0)))
    assert ended(state) is Ending.FAILED
    assert effects == (machine.Schedule(),)
    assert state.phase is Phase.IDLE


def test_a_full_copy_ends_it() -> None:
    state = going(spare=TWO, crowded=True, allow_full_resync=True)
    state, _ = step(replace(state, phase=Phase.RETIRE), machine.BitmapRemoved())
    assert state.phase is Phase.RENEWING
    assert ended(state) is Ending.FAILED


def test_stopping_cancels_the_slice_and_merges_its_epoch_back() -> None:
    state, effects = step(looking(), machine.StopRequested())
    assert effects == (machine.CancelWork(),)
    state, effects = step(state, machine.WorkFailed("it was cancelled"))
    assert state.phase is Phase.MERGE
    assert machine.Send(m.AbortEpoch(EpochNumber(8))) in effects
    state, effects = step(state, merged(7, 9, live(7, 8)))
    assert state.phase is Phase.STOPPED
    assert ended(state) is Ending.FAILED


def test_it_completes_with_its_last_slice() -> None:
    state = going()
    for _ in range(2):
        state, _ = step(state, DUE)
        state, effects = step(state, DONE)
    assert ended(state) is Ending.COMPLETED
    assert effects == (machine.Schedule(),)
    assert machine.replication(state) is Replication.PROTECTED
