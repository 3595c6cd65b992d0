"""What the primary's machine decides where much has gathered: it is copied ahead of the checkpoint, in its epoch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import Base, EpochNumber, Replication
from qemu_remus.core.primary_machine import Found, Opened, Phase, PrimaryState, Recording, step
from qemu_remus.core.primary_turns import COPY_AHEAD_BYTES
from tests.primary_machine.states import (
    DISKS,
    ONE,
    SENT_AHEAD,
    TWO,
    at,
    attach,
    copied_ahead,
    ended,
    link_up,
    live,
    merge_of,
    merged,
    recording,
    theirs,
)

MUCH = COPY_AHEAD_BYTES + 1
NO_ROOM = m.EpochRefused(EpochNumber(9), RefusalCode.NO_SPACE, "the journal is full")
AHEAD_BACK = machine.MergeBack((recording(7, 8), recording(8, 9)), ONE, EpochNumber(10))


def connected(dirty_bytes: int = 0, **fields: Any) -> tuple[PrimaryState, tuple[machine.Effect, ...]]:
    """The first step on a link, to a secondary that holds checkpoint 7."""
    waiting = at(Phase.WAITING, **fields)
    return step(waiting, link_up(waiting, theirs(), dirty_bytes))


def test_much_that_has_gathered_goes_ahead_of_the_checkpoint() -> None:
    state, effects = connected(MUCH)
    begin = machine.Send(m.EpochBegin(EpochNumber(9), EpochNumber(7)))
    assert effects[-2:] == (begin, machine.CopyAhead(recording(7, 8), recording(8, 9), ()))
    # Its number is durable before anybody can see it.
    assert effects[:-2] == (machine.SaveState(), machine.SaveState())
    assert (state.phase, state.highest) == (Phase.AHEAD, 9)
    assert (state.ahead, state.recording, state.opened) == (recording(7, 8), recording(8, 9), Opened())
    assert machine.replication(state) is Replication.RESYNC


def test_what_fits_into_an_ordinary_checkpoint_is_left_to_one() -> None:
    state, effects = connected(COPY_AHEAD_BYTES)
    assert (state.phase, effects[-1]) == (Phase.IDLE, machine.Schedule(0))


@pytest.mark.parametrize(
    ("reach", "compare"),
    [
        ((EpochNumber(7), None), (1,)),
        ((None, EpochNumber(7)), (0,)),
        ((EpochNumber(7), EpochNumber(8)), (1,)),
        ((EpochNumber(6), EpochNumber(3)), None),
    ],
    ids=["the second", "the first", "one that begins later", "none"],
)
def test_a_disk_of_which_not_everything_was_recorded_is_compared_alone(
    reach: tuple[Base, ...], compare: tuple[int, ...] | None
) -> None:
    # Its bitmap was lost: the bitmap that took over says so by its base.
    state, effects = connected(recording=recording(None, 8), reach=reach)
    if compare is None:
        assert state.phase is Phase.IDLE
    else:
        assert effects[-1] == machine.CopyAhead(recording(None, 8), recording(8, 9), compare)


def test_after_a_restart_of_qemu_all_disks_are_compared() -> None:
    state, _ = attach((), ())
    state, effects = step(state, link_up(state, theirs()))
    begin = machine.Send(m.EpochBegin(EpochNumber(9), EpochNumber(7)))
    assert effects[-2:] == (begin, machine.CopyAhead(None, recording(None, 9), (0, 1)))
    state, effects = step(state, machine.CopiedAhead(SENT_AHEAD))
    assert (state.phase, effects) == (Phase.IDLE, (machine.Schedule(0),))
    for event in (machine.CheckpointDue(), machine.Captured(), machine.Transferred(Opened(6, 6 << 12, 12))):
        state, effects = step(state, event)
    assert effects == (machine.Send(m.EpochEnd(EpochNumber(9), 6, 6 << 12, 12, True)),)
    state, effects = step(state, machine.FromPeer(m.Committed(EpochNumber(9))))
    assert effects == (machine.RemoveBitmaps((recording(None, 9),)),)
    assert state.reach == (9, 9)


def test_a_commit_that_the_hello_tells_of_is_compared_with_and_not_the_one_before() -> None:
    waiting = at(Phase.WAITING, recording=recording(None, 10), reach=(EpochNumber(7), None), highest=10)
    _, effects = step(waiting, link_up(waiting, theirs(committed=EpochNumber(8), highest_epoch=8)))
    assert machine.Send(m.EpochBegin(EpochNumber(11), EpochNumber(8))) in effects


def test_the_checkpoint_after_it_goes_on_in_the_same_epoch() -> None:
    state, effects = step(at(Phase.AHEAD), machine.CopiedAhead(SENT_AHEAD))
    assert (state.phase, effects) == (Phase.IDLE, (machine.Schedule(0),))
    state, effects = step(state, machine.CheckpointDue())
    assert effects == (machine.Capture(recording(8, 9), recording(9, 10)),)
    state, effects = step(state, machine.Captured())
    assert effects == (machine.Transfer(recording(8, 9), SENT_AHEAD),), "it has begun already"
    state, effects = step(state, machine.Transferred(Opened(7, 7 << 12, 13)))
    assert effects == (machine.Send(m.EpochEnd(EpochNumber(9), 7, 7 << 12, 13, True)),)


@pytest.mark.parametrize("phase", [Phase.STAGE, Phase.COMMIT])
def test_both_its_bitmaps_are_removed_when_it_is_committed(phase: Phase) -> None:
    state, effects = step(copied_ahead(phase), machine.FromPeer(m.Committed(EpochNumber(9))))
    assert effects == (machine.RemoveBitmaps((recording(7, 8), recording(8, 9))),)
    assert (state.ahead, state.opened, state.bulky, state.reach) == (None, None, False, (9, 9))
    state, effects = step(state, machine.BitmapRemoved())
    assert (state.phase, effects) == (Phase.IDLE, (machine.Schedule(0),)), "the next one is an ordinary one"
    assert machine.replication(state) is Replication.PROTECTED


@pytest.mark.parametrize("phase", [Phase.CAPTURE, Phase.TRANSFER])
def test_all_three_bitmaps_are_merged_back_when_its_checkpoint_fails(phase: Phase) -> None:
    _, effects = step(copied_ahead(phase), machine.WorkFailed("the fleece is full"))
    assert effects[0] == machine.Send(m.AbortEpoch(EpochNumber(9)))
    assert merge_of(effects).old == (recording(7, 8), recording(8, 9), recording(9, 10))


def test_a_copy_ahead_that_fails_is_aborted_merged_back_and_tried_on_the_next_link() -> None:
    state, effects = step(at(Phase.AHEAD), machine.WorkFailed("read error"))
    assert effects == (machine.Send(m.AbortEpoch(EpochNumber(9))), machine.SaveState(), AHEAD_BACK)
    assert (state.ahead, state.opened, state.failures, state.reason) == (None, None, 1, "read error")
    # At once it would fail again.
    state, effects = step(state, merged(7, 10, ended(7, 8), live(8, 9)))
    assert effects == (machine.Disconnect(RefusalCode.SHUTTING_DOWN, "read error"), machine.Connect())
    assert state.reach == (7, 7)
    _, effects = step(state, link_up(state, theirs(), MUCH))
    assert effects[-1] == machine.CopyAhead(recording(7, 10), recording(10, 11), ())


def test_a_bitmap_lost_under_it_has_that_disk_compared_on_the_next_link() -> None:
    state, _ = step(at(Phase.AHEAD), machine.WorkFailed("disk data has lost its dirty bitmap"))
    state, _ = step(state, merged(None, 10, (ended(7, 8), live(8, 9)), (live(8, 9),)))
    _, effects = step(state, link_up(state, theirs(highest_epoch=9)))
    assert effects[-1] == machine.CopyAhead(recording(None, 10), recording(10, 11), (1,))


def test_a_link_lost_during_the_copy_merges_it_back_without_an_abort() -> None:
    state, effects = step(at(Phase.AHEAD), machine.LinkDown("cut"))
    assert effects == (machine.CancelWork(),)
    for end in (machine.WorkFailed("it was cancelled"), machine.CopiedAhead(SENT_AHEAD)):
        merging, effects = step(state, end)
        assert effects == (machine.SaveState(), AHEAD_BACK)
        assert (merging.failures, merging.reason) == (0, "cut")
        assert step(merging, merged(7, 10, ended(7, 8), live(8, 9)))[1] == (machine.Connect(),)


def test_a_link_lost_while_the_epoch_waits_for_its_checkpoint_merges_it_back() -> None:
    state, effects = step(copied_ahead(Phase.IDLE), machine.LinkDown("cut"))
    assert effects == (machine.SaveState(), AHEAD_BACK)
    state, effects = step(state, merged(7, 10, ended(7, 8), live(8, 9)))
    assert (state.phase, effects) == (Phase.WAITING, (machine.Connect(),))
    # The next link's secondary knows nothing of it.
    _, effects = step(state, link_up(state, theirs(highest_epoch=9), MUCH))
    assert machine.Send(m.EpochBegin(EpochNumber(11), EpochNumber(7))) in effects


def test_a_timer_of_before_the_link_was_lost_takes_no_checkpoint_of_it() -> None:
    state, _ = step(copied_ahead(Phase.IDLE), machine.LinkDown("cut"))
    assert step(state, machine.CheckpointDue()) == (state, ())


def test_a_lost_answer_to_it_leaves_a_base_for_either_case() -> None:
    state, effects = step(copied_ahead(Phase.STAGE), machine.LinkDown("cut"))
    assert effects == (machine.SaveState(), merge_of(effects))
    chain = (ended(7, 8), ended(8, 9), live(9, 10))
    state, _ = step(state, merged(7, 11, *chain))
    assert state.reach == (7, 7)
    later, effects = step(state, link_up(state, theirs(committed=EpochNumber(9), highest_epoch=9)))
    assert (later.phase, later.committed, effects[-1]) == (Phase.IDLE, 9, machine.Schedule(0))


@pytest.mark.parametrize("phase", [Phase.AHEAD, Phase.TRANSFER])
def test_a_refusal_ends_the_work_and_is_not_aborted(phase: Phase) -> None:
    state, effects = step(copied_ahead(phase), machine.FromPeer(NO_ROOM))
    assert effects == (machine.CancelWork(),)
    end = machine.CopiedAhead(SENT_AHEAD) if phase is Phase.AHEAD else machine.Transferred(SENT_AHEAD)
    for event in (machine.WorkFailed("it was cancelled"), end):
        merging, effects = step(state, event)
        assert effects == (machine.SaveState(), merge_of(effects))
        assert (merging.reason, merging.failures) == ("the journal is full", 1)


def test_a_refusal_of_the_epoch_that_waits_for_its_checkpoint_merges_it_back() -> None:
    state, effects = step(copied_ahead(Phase.IDLE), machine.FromPeer(NO_ROOM))
    assert effects == (machine.SaveState(), AHEAD_BACK)
    assert state.reason == "the journal is full"


def test_a_refusal_during_the_capture_is_remembered() -> None:
    state, effects = step(copied_ahead(Phase.CAPTURE), machine.FromPeer(NO_ROOM))
    assert effects == ()
    _, effects = step(state, machine.Captured())
    assert effects == (machine.SaveState(), merge_of(effects))


@pytest.mark.parametrize("phase", [Phase.AHEAD, Phase.IDLE])
def test_a_refused_base_of_it_is_taken_to_a_new_handshake(phase: Phase) -> None:
    refused = m.EpochRefused(EpochNumber(9), RefusalCode.BASE_TOO_NEW, "it holds less")
    state, effects = step(copied_ahead(phase), machine.FromPeer(refused))
    assert effects[0] == machine.Disconnect(RefusalCode.BASE_TOO_NEW, "it holds less")
    assert not state.linked


def no_room(state: PrimaryState, *found: Found) -> tuple[PrimaryState, tuple[machine.Effect, ...]]:
    """The step after the journal had no room and everything was merged back."""
    state, _ = step(state, machine.FromPeer(NO_ROOM))
    state, effects = step(state, machine.WorkFailed("it was cancelled"))
    merge = merge_of(effects)
    return step(state, machine.Merged(recording(None, merge.epoch), (found,) * len(DISKS)))


def test_without_leave_a_journal_without_room_is_tried_again_on_another_link() -> None:
    state, effects = no_room(at(Phase.AHEAD, spare=TWO), ended(7, 8), live(8, 9))
    assert effects == (machine.Disconnect(RefusalCode.SHUTTING_DOWN, "the journal is full"), machine.Connect())
    state, _ = step(state, link_up(state, theirs(highest_epoch=9), MUCH))
    assert (state.phase, state.crowded) == (Phase.AHEAD, False)


@pytest.mark.parametrize(
    ("ahead", "reach", "bulky", "found"),
    [
        (recording(7, 8), (EpochNumber(7),) * 2, True, (ended(7, 8), live(8, 9))),
        (recording(None, 8), (EpochNumber(7), None), False, (ended(None, 8), live(8, 9))),
        (None, (None, None), False, (live(None, 9),)),
    ],
    ids=["much was dirty", "a disk is compared", "all disks are compared"],
)
def test_with_leave_a_journal_without_room_makes_it_a_full_copy(
    ahead: Recording | None, reach: tuple[Base, ...], bulky: bool, found: tuple[Found, ...]
) -> None:
    begun = at(Phase.AHEAD, allow_full_resync=True, spare=TWO, ahead=ahead, reach=reach, bulky=bulky)
    begun = replace(begun, recording=found[-1].recording)
    state, effects = no_room(begun, *found)
    assert state.phase is Phase.RENEWING
    assert merge_of(effects) == machine.MergeBack((recording(None, 10),), TWO, EpochNumber(11), complete=True)
    _, effects = step(state, merged(None, 11, live(None, 10), generation=TWO))
    assert effects == (machine.Send(m.SyncBegin(TWO, DISKS)),)


def test_leave_is_for_what_has_gathered_and_not_for_every_refused_epoch() -> None:
    refused = machine.FromPeer(m.EpochRefused(EpochNumber(8), RefusalCode.NO_SPACE, "the journal is full"))
    state, _ = step(at(Phase.STAGE, allow_full_resync=True, spare=TWO), refused)
    state, effects = step(state, merged(7, 10, ended(7, 8), live(8, 9)))
    assert (state.phase, effects) == (Phase.IDLE, (machine.Schedule(1),))


def test_leave_without_a_generation_left_waits_for_the_next_link() -> None:
    state, effects = no_room(at(Phase.AHEAD, allow_full_resync=True, spare=None), ended(7, 8), live(8, 9))
    assert isinstance(effects[0], machine.Disconnect)
    assert state.phase is Phase.WAITING


def test_a_vm_that_was_not_paused_leaves_the_epoch_open() -> None:
    state, effects = step(copied_ahead(Phase.CAPTURE, one_step=False), machine.NotCaptured("the VM runs"))
    assert (state.phase, effects) == (Phase.IDLE, ())
    assert (state.ahead, state.recording, state.finished) == (recording(7, 8), recording(8, 9), None)
    state, effects = step(state, machine.CheckpointDue(pause=False))
    assert effects == (machine.Capture(recording(8, 9), recording(9, 10), False),)
    assert step(state, machine.Captured())[1] == (machine.Transfer(recording(8, 9), SENT_AHEAD),)


@pytest.mark.parametrize(
    "between", [machine.LinkDown("cut"), machine.FromPeer(NO_ROOM), machine.StopRequested()], ids=["cut", "no", "stop"]
)
def test_an_epoch_that_ended_meanwhile_does_not_stay_open_for_a_vm_that_was_not_paused(between: machine.Event) -> None:
    state, _ = step(copied_ahead(Phase.CAPTURE, one_step=False), between)
    state, effects = step(state, machine.NotCaptured("the VM runs"))
    assert merge_of(effects).old == (recording(7, 8), recording(8, 9))
    assert (state.ahead, state.opened) == (None, None)


def test_an_abort_by_the_toolstack_drops_what_went_ahead_as_well() -> None:
    state, _ = step(copied_ahead(Phase.STAGED, one_step=False), machine.AbortDue(EpochNumber(9)))
    state, effects = step(state, machine.FromPeer(m.EpochAborted(EpochNumber(9))))
    assert merge_of(effects).old == (recording(7, 8), recording(8, 9), recording(9, 10))
    # It is not known to fail again, so it begins anew at once.
    state, effects = step(state, merged(7, 11, ended(7, 8), ended(8, 9), live(9, 10)))
    assert effects[-1] == machine.CopyAhead(recording(7, 11), recording(11, 12), ())


def test_nothing_goes_ahead_before_the_epoch_in_doubt_is_decided() -> None:
    waiting = at(Phase.WAITING, one_step=False)
    doubted = theirs(staged=EpochNumber(8), highest_epoch=8)
    state, effects = step(waiting, link_up(waiting, doubted, MUCH))
    assert (state.phase, effects) == (Phase.IDLE, (machine.SaveState(),))
    state, _ = step(state, machine.CommitDue(EpochNumber(8)))
    _, effects = step(state, machine.FromPeer(m.Committed(EpochNumber(8))))
    assert effects[-2:] == (
        machine.Send(m.EpochBegin(EpochNumber(9), EpochNumber(8))),
        machine.CopyAhead(recording(7, 8), recording(8, 9), ()),
    )


def test_a_stop_cuts_the_copy_short_and_merges_it_back() -> None:
    state, effects = step(at(Phase.AHEAD), machine.StopRequested())
    assert effects == (machine.CancelWork(),)
    for end in (machine.WorkFailed("it was cancelled"), machine.CopiedAhead(SENT_AHEAD)):
        merging, effects = step(state, end)
        assert merge_of(effects) == AHEAD_BACK
        stopped, effects = step(merging, merged(7, 10, ended(7, 8), live(8, 9)))
        assert stopped.phase is Phase.STOPPED
        assert [type(effect) for effect in effects] == [machine.Disconnect, machine.SaveState, machine.Stop]


def test_a_stop_merges_the_open_epoch_back_first() -> None:
    state, effects = step(copied_ahead(Phase.IDLE), machine.StopRequested())
    assert effects == (machine.SaveState(), AHEAD_BACK)
    assert step(state, merged(7, 10, ended(7, 8), live(8, 9)))[0].phase is Phase.STOPPED


def test_a_bitmap_lost_behind_an_epochs_back_is_noticed_at_the_next_merge() -> None:
    # Checkpoint 8's bitmap was lost before it was committed: only what came after checkpoint 8 is known of that disk.
    state, _ = step(at(Phase.STAGE), machine.LinkDown("cut"))
    state, _ = step(state, merged(8, 10, (ended(7, 8), live(8, 9)), (live(8, 9),)))
    assert [disk.base for disk in machine.hello(state).disks] == [7, 8]
    _, effects = step(state, link_up(state, theirs(highest_epoch=8)))
    assert effects[-1] == machine.CopyAhead(recording(8, 10), recording(10, 11), (1,))
    held = theirs(committed=EpochNumber(8), highest_epoch=8)
    assert step(state, link_up(state, held))[0].phase is Phase.IDLE
