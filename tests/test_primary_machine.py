"""What the primary's machine decides, one decision a test.

Each test begins with a state built by :func:`at`, gives it events, and looks at the effects and at what matters of the
state.  How the two machines get on with each other is ``tests/simulation``'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.errors import InternalError, RefusalCode
from qemu_remus.core.model import (
    Base,
    DiskName,
    DiskSpec,
    DiskState,
    EpochNumber,
    Generation,
    InstanceId,
    PairName,
    Replication,
    Role,
)
from qemu_remus.core.primary_machine import Phase, PrimaryState, Recording, step

ONE = Generation(UUID(int=1))
TWO = Generation(UUID(int=2))
DISKS = (DiskSpec(DiskName("system"), 1 << 20), DiskSpec(DiskName("data"), 1 << 20))


def recording(base: int | None, epoch: int, generation: Generation = ONE) -> Recording:
    return Recording(generation, None if base is None else EpochNumber(base), EpochNumber(epoch))


def at(phase: Phase, **fields: Any) -> PrimaryState:
    """A primary that has committed checkpoint 7 and now records epoch 8; in an epoch: 8 is finished, 9 records."""
    state = PrimaryState(
        PairName("pair"),
        InstanceId(UUID(int=9)),
        DISKS,
        phase=phase,
        generation=ONE,
        committed=EpochNumber(7),
        highest=8,
        recording=recording(7, 8),
        linked=phase not in {Phase.STARTING, Phase.ADOPTING, Phase.WAITING},
        protected=phase not in {Phase.STARTING, Phase.ADOPTING, Phase.WAITING},
    )
    if phase in machine.IN_EPOCH:
        state = replace(state, highest=9, finished=recording(7, 8), recording=recording(8, 9))
    return replace(state, **fields)


def first_sync(phase: Phase, **fields: Any) -> PrimaryState:
    """A primary whose first copy is flushed and whose first epoch completes it."""
    state = at(phase, committed=None, synced=True, protected=False, highest=1, recording=recording(None, 1), **fields)
    if phase in machine.IN_EPOCH:
        state = replace(state, highest=2, finished=recording(None, 1), recording=recording(1, 2))
    return state


def theirs(**fields: Any) -> m.Hello:
    """The hello of a secondary that holds checkpoint 7."""
    hello = m.Hello(
        pair=PairName("pair"),
        role=Role.SECONDARY,
        instance=InstanceId(UUID(int=8)),
        session=0,
        generation=ONE,
        disks=DISKS,
        committed=EpochNumber(7),
        staged=None,
        highest_epoch=7,
        disk_state=DiskState.CONSISTENT,
    )
    return replace(hello, **fields)


def link_up(state: PrimaryState, hello: m.Hello) -> machine.LinkUp:
    return machine.LinkUp(machine.hello(state), hello, TWO)


def merge_of(effects: tuple[machine.Effect, ...]) -> machine.MergeBack:
    (merge,) = (effect for effect in effects if isinstance(effect, machine.MergeBack))
    return merge


# --- starting --------------------------------------------------------------------------------------------------------


def attach(*found: tuple[Recording, ...], **fields: Any) -> tuple[PrimaryState, tuple[machine.Effect, ...]]:
    return step(at(Phase.STARTING, recording=None, **fields), machine.Attached(found))


def test_without_bitmaps_it_connects() -> None:
    state, effects = attach((), ())
    assert effects == (machine.Connect(),)
    assert state.phase is Phase.WAITING


def test_what_an_earlier_controller_tracked_is_taken_over_with_a_new_number() -> None:
    old = recording(7, 12)
    state, effects = attach((old,), (old,), highest=8)
    assert effects == (machine.SaveState(), machine.MergeBack((old,), recording(7, 13)))
    assert state.highest == 13


def test_a_lost_state_directory_is_made_up_for_by_the_bitmaps() -> None:
    old = recording(7, 12)
    state, _ = attach((old,), (old,), generation=None, committed=None, highest=0)
    assert (state.generation, state.highest) == (ONE, 13)
    assert all(disk.base == 7 for disk in machine.hello(replace(state, phase=Phase.WAITING)).disks)


def test_a_finished_and_a_recording_bitmap_together_keep_the_older_base() -> None:
    both = (recording(7, 8), recording(8, 9))
    _, effects = attach(both, both)
    assert merge_of(effects) == machine.MergeBack(both, recording(7, 10))


def test_the_first_epochs_bitmap_beside_the_next_does_not_cost_a_second_full_copy() -> None:
    # If checkpoint 1 was committed, the difference to it is known; if not, no secondary can mistake the base.
    both = (recording(None, 1), recording(1, 2))
    _, effects = attach(both, both)
    assert merge_of(effects).into.base == 1


def test_an_interrupted_full_syncs_bitmap_is_never_trusted() -> None:
    lone = recording(None, 1)
    _, effects = attach((lone,), (lone,))
    assert merge_of(effects).into.base is None


def test_a_disk_without_a_bitmap_takes_the_base_from_all() -> None:
    _, effects = attach((recording(7, 8),), ())
    assert merge_of(effects).into.base is None


def test_bitmaps_of_another_generation_are_no_base() -> None:
    foreign = recording(7, 8, TWO)
    _, effects = attach((foreign,), (foreign,))
    assert merge_of(effects).into.base is None


def test_without_a_state_directory_two_generations_cannot_be_told_apart() -> None:
    _, effects = attach((recording(7, 8, ONE),), (recording(7, 8, TWO),), generation=None)
    assert merge_of(effects).into.base is None


def test_the_base_that_holds_on_every_disk_is_the_newest() -> None:
    # One disk's finished bitmap was removed after the commit, then the controller died.
    _, effects = attach((recording(8, 9),), (recording(7, 8), recording(8, 9)))
    assert merge_of(effects).into.base == 8


def test_after_taking_over_it_connects() -> None:
    state, effects = step(at(Phase.ADOPTING), machine.Merged())
    assert effects == (machine.Connect(),)
    assert state.phase is Phase.WAITING


# --- handshake -------------------------------------------------------------------------------------------------------


def test_a_known_difference_is_sent_incrementally() -> None:
    waiting = at(Phase.WAITING)
    state, effects = step(waiting, link_up(waiting, theirs()))
    assert effects == (machine.SaveState(), machine.Schedule(0))
    assert machine.replication(state) is Replication.RESYNC


def test_a_commit_whose_answer_was_lost_is_learned_from_the_hello() -> None:
    waiting = at(Phase.WAITING, highest=10, recording=recording(7, 10))
    state, _ = step(waiting, link_up(waiting, theirs(committed=EpochNumber(8), highest_epoch=8)))
    assert state.committed == 8


def test_numbers_go_on_behind_the_highest_that_the_secondary_has_seen() -> None:
    waiting = at(Phase.WAITING)
    state, _ = step(waiting, link_up(waiting, theirs(highest_epoch=40)))
    state, _ = step(state, machine.CheckpointDue())
    assert state.recording == recording(8, 41)


def test_a_secondary_without_a_checkpoint_gets_a_new_generation() -> None:
    waiting = at(Phase.WAITING)
    empty = theirs(generation=None, committed=None, disk_state=DiskState.INCONSISTENT)
    _, effects = step(waiting, link_up(waiting, empty))
    assert merge_of(effects) == machine.MergeBack((recording(7, 8),), recording(None, 9, TWO))


def test_a_full_sync_over_a_good_checkpoint_waits_for_leave() -> None:
    waiting = at(Phase.WAITING, recording=recording(None, 8))
    state, effects = step(waiting, link_up(waiting, theirs()))
    assert state.phase is Phase.STOPPED
    assert isinstance(effects[0], machine.Disconnect)
    assert effects[0].code is RefusalCode.NEEDS_FULL_SYNC
    state, _ = step(replace(waiting, allow_full_resync=True), link_up(waiting, theirs()))
    assert state.phase is Phase.RENEWING


def test_a_failed_store_is_waited_for() -> None:
    waiting = at(Phase.WAITING)
    state, effects = step(waiting, link_up(waiting, theirs(disk_state=DiskState.FAILED)))
    assert isinstance(effects[0], machine.Disconnect)
    assert effects[1:] == (machine.Connect(),)
    assert state.phase is Phase.WAITING


def test_a_failover_ends_the_old_primary() -> None:
    waiting = at(Phase.WAITING)
    state, effects = step(waiting, link_up(waiting, theirs(generation=TWO, history=((ONE, EpochNumber(7)),))))
    assert state.phase is Phase.STOPPED
    assert isinstance(effects[-1], machine.Stop)
    assert effects[-1].refusal is not None
    assert effects[-1].refusal.code is RefusalCode.FAILED_OVER


@pytest.mark.parametrize("code", sorted(machine.LASTING))
def test_a_lasting_refusal_in_place_of_a_hello_ends_it(code: RefusalCode) -> None:
    goodbye = m.Goodbye(code, "no")
    state, effects = step(at(Phase.WAITING), machine.LinkRefused(goodbye))
    assert state.phase is Phase.STOPPED
    assert effects[-1] == machine.Stop(goodbye=goodbye)


def test_being_fenced_by_ones_own_older_link_passes() -> None:
    state, effects = step(at(Phase.WAITING), machine.LinkRefused(m.Goodbye(RefusalCode.FENCED, "no")))
    assert (state.phase, effects) == (Phase.WAITING, ())


# --- full sync -------------------------------------------------------------------------------------------------------


def test_the_new_generation_counts_only_from_the_secondarys_answer() -> None:
    renewing = at(Phase.RENEWING, recording=recording(None, 9, TWO))
    asked, effects = step(renewing, machine.Merged())
    assert effects == (machine.Send(m.SyncBegin(TWO, DISKS)),)
    assert machine.hello(asked).generation == ONE
    assert all(disk.base is None for disk in machine.hello(asked).disks)
    copying, effects = step(asked, machine.FromPeer(m.SyncReady((True, False))))
    assert effects == (machine.SaveState(), machine.CopyLive((True, False)))
    assert (copying.generation, copying.committed) == (TWO, None)


def test_the_copy_is_flushed_before_the_first_epoch() -> None:
    state, effects = step(at(Phase.SYNC_COPY), machine.SyncCopied())
    assert effects == (machine.Send(m.SyncFlush(1)),)
    state, effects = step(state, machine.FromPeer(m.SyncFlushed(1)))
    assert effects == (machine.Schedule(0),)
    assert state.synced
    assert machine.replication(state) is Replication.INITIAL_SYNC


def test_a_copy_that_fails_begins_anew_on_another_link() -> None:
    state, effects = step(at(Phase.SYNC_COPY), machine.WorkFailed("read error"))
    assert effects == (machine.Disconnect(RefusalCode.SHUTTING_DOWN, "read error"), machine.Connect())
    assert not state.linked


def test_a_first_epoch_that_fails_can_still_complete_the_sync_on_this_link() -> None:
    state, effects = step(first_sync(Phase.CAPTURE), machine.WorkFailed("void"))
    assert merge_of(effects).into == recording(None, 3)
    assert state.synced


def test_a_first_commit_in_doubt_leaves_a_base_for_the_case_that_it_was_decided() -> None:
    _, effects = step(first_sync(Phase.STAGE), machine.LinkDown("cut"))
    assert merge_of(effects).into == recording(1, 3)


def test_no_room_for_the_first_copy_ends_it_with_the_reason() -> None:
    goodbye = m.Goodbye(RefusalCode.NO_SPACE, "the file system is full")
    state, effects = step(at(Phase.SYNC_BEGIN), machine.FromPeer(goodbye))
    assert state.phase is Phase.STOPPED
    assert effects[-1] == machine.Stop(goodbye=goodbye)


# --- an epoch --------------------------------------------------------------------------------------------------------


def test_a_checkpoint_rotates_the_bitmaps() -> None:
    state, effects = step(at(Phase.IDLE), machine.CheckpointDue())
    assert effects == (machine.Capture(recording(7, 8), recording(8, 9)),)
    assert (state.finished, state.recording) == (recording(7, 8), recording(8, 9))


def test_a_timer_of_an_earlier_link_changes_nothing() -> None:
    transferring = at(Phase.TRANSFER)
    assert step(transferring, machine.CheckpointDue()) == (transferring, ())


def test_the_transfer_follows_the_epochs_beginning() -> None:
    _, effects = step(at(Phase.CAPTURE), machine.Captured())
    begin = m.EpochBegin(EpochNumber(8), EpochNumber(7))
    assert effects == (machine.Send(begin), machine.Transfer(recording(7, 8)))


@pytest.mark.parametrize("one_step", [True, False])
def test_the_epochs_end_says_whether_to_commit(one_step: bool) -> None:
    _, effects = step(at(Phase.TRANSFER, one_step=one_step), machine.Transferred(3, 4096, 99))
    assert effects == (machine.Send(m.EpochEnd(EpochNumber(8), 3, 4096, 99, one_step)),)


def test_a_staged_epoch_waits_for_the_toolstack() -> None:
    state, effects = step(at(Phase.STAGE, one_step=False), machine.FromPeer(m.EpochStaged(EpochNumber(8))))
    assert (state.phase, effects) == (Phase.STAGED, ())
    _, effects = step(state, machine.CommitDue(EpochNumber(8)))
    assert effects == (machine.Send(m.CommitEpoch(EpochNumber(8))),)


def test_a_late_word_on_a_lost_epoch_does_not_commit_a_later_one() -> None:
    staged = at(Phase.STAGED)
    assert step(staged, machine.CommitDue(EpochNumber(6))) == (staged, ())
    merging = at(Phase.MERGE)
    assert step(merging, machine.CommitDue(EpochNumber(8))) == (merging, ())


@pytest.mark.parametrize("phase", [Phase.STAGE, Phase.COMMIT])
def test_a_bitmap_is_removed_when_its_epoch_is_committed(phase: Phase) -> None:
    state, effects = step(at(phase, protected=False, failures=2), machine.FromPeer(m.Committed(EpochNumber(8))))
    assert effects == (machine.RemoveBitmap(recording(7, 8)),)
    assert (state.committed, state.failures, state.finished) == (8, 0, None)
    assert machine.replication(state) is Replication.PROTECTED


def test_a_commit_of_another_epoch_removes_nothing() -> None:
    state = at(Phase.STAGE)
    assert step(state, machine.FromPeer(m.Committed(EpochNumber(6)))) == (state, ())


def test_the_next_checkpoint_comes_when_the_bitmap_is_gone() -> None:
    state, effects = step(at(Phase.RETIRE), machine.BitmapRemoved())
    assert (state.phase, effects) == (Phase.IDLE, (machine.Schedule(0),))


# --- an epoch that fails ---------------------------------------------------------------------------------------------


def test_a_failed_capture_is_merged_back_under_the_older_base() -> None:
    state, effects = step(at(Phase.CAPTURE), machine.WorkFailed("the VM ran"))
    merge = machine.MergeBack((recording(7, 8), recording(8, 9)), recording(7, 10))
    assert effects == (machine.SaveState(), merge)
    assert (state.failures, state.reason) == (1, "the VM ran")
    assert machine.replication(state) is Replication.DEGRADED


def test_a_failed_transfer_is_aborted_on_the_secondary_first() -> None:
    _, effects = step(at(Phase.TRANSFER), machine.WorkFailed("the snapshot broke"))
    assert effects[0] == machine.Send(m.AbortEpoch(EpochNumber(8)))
    assert merge_of(effects).into == recording(7, 10)


def test_failures_in_a_row_are_backed_off() -> None:
    _, effects = step(at(Phase.MERGE, failures=3), machine.Merged())
    assert effects == (machine.Schedule(3),)


def test_a_refused_epochs_transfer_is_ended_and_not_aborted() -> None:
    refused = m.EpochRefused(EpochNumber(8), RefusalCode.NO_SPACE, "the journal is full")
    state, effects = step(at(Phase.TRANSFER), machine.FromPeer(refused))
    assert effects == (machine.CancelWork(),)
    for end in (machine.WorkFailed("cancelled"), machine.Transferred(1, 1, 1)):
        merging, effects = step(state, end)
        assert effects == (machine.SaveState(), merge_of(effects))
        assert merging.reason == "the journal is full"


def test_an_epoch_refused_at_its_end_is_merged_back() -> None:
    refused = m.EpochRefused(EpochNumber(8), RefusalCode.NO_SPACE, "the journal is full")
    state, effects = step(at(Phase.STAGE), machine.FromPeer(refused))
    assert merge_of(effects).into == recording(7, 10)
    assert state.failures == 1


@pytest.mark.parametrize("phase", [Phase.TRANSFER, Phase.STAGE])
def test_a_refused_base_is_taken_to_a_new_handshake(phase: Phase) -> None:
    refused = m.EpochRefused(EpochNumber(8), RefusalCode.BASE_TOO_NEW, "it holds less")
    state, effects = step(at(phase), machine.FromPeer(refused))
    assert effects[0] == machine.Disconnect(RefusalCode.BASE_TOO_NEW, "it holds less")
    assert not state.linked


@pytest.mark.parametrize("phase", [Phase.STAGE, Phase.STAGED, Phase.COMMIT])
def test_a_lost_link_merges_back_and_aborts_nothing(phase: Phase) -> None:
    state, effects = step(at(phase), machine.LinkDown("cut"))
    assert effects == (machine.SaveState(), merge_of(effects))
    assert merge_of(effects).into == recording(7, 10)
    assert machine.replication(state) is Replication.DEGRADED
    _, effects = step(state, machine.Merged())
    assert effects == (machine.Connect(),)


@pytest.mark.parametrize("phase", [Phase.TRANSFER, Phase.SYNC_COPY])
def test_a_lost_link_ends_work_that_writes_to_it(phase: Phase) -> None:
    assert step(at(phase), machine.LinkDown("cut"))[1] == (machine.CancelWork(),)


@pytest.mark.parametrize("phase", [Phase.CAPTURE, Phase.RETIRE, Phase.MERGE, Phase.RENEWING])
def test_a_lost_link_does_not_cut_short_work_on_the_graph(phase: Phase) -> None:
    state, effects = step(at(phase), machine.LinkDown("cut"))
    assert (state.phase, effects) == (phase, ())
    assert not state.linked


def test_a_checkpoint_captured_without_a_link_is_merged_back() -> None:
    _, effects = step(at(Phase.CAPTURE, linked=False), machine.Captured())
    assert merge_of(effects).into == recording(7, 10)


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.SYNC_BEGIN, Phase.SYNC_FLUSH])
def test_a_lost_link_without_work_is_sought_again(phase: Phase) -> None:
    state, effects = step(at(phase), machine.LinkDown("cut"))
    assert (state.phase, effects) == (Phase.WAITING, (machine.Connect(),))


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase in machine.WORKING])
def test_bitmaps_of_which_nobody_knows_end_it(phase: Phase) -> None:
    state, effects = step(at(phase), machine.WorkFailed("in doubt", fatal=True))
    assert state.phase is Phase.STOPPED
    assert effects[-1] == machine.Stop(reason="in doubt")


def test_a_goodbye_for_good_ends_it_once_the_epoch_is_merged_back() -> None:
    goodbye = m.Goodbye(RefusalCode.FAILED_OVER, "failed over to checkpoint 7")
    state, _ = step(at(Phase.STAGE), machine.FromPeer(goodbye))
    assert state.phase is Phase.MERGE
    state, effects = step(state, machine.Merged())
    assert effects == (machine.SaveState(), machine.Stop(goodbye=goodbye))


def test_what_an_earlier_link_still_says_is_not_heard() -> None:
    waiting = at(Phase.WAITING)
    assert step(waiting, machine.FromPeer(m.Committed(EpochNumber(8)))) == (waiting, ())
    assert step(waiting, machine.LinkDown("cut")) == (waiting, ())


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.WAITING, Phase.IDLE, Phase.SYNC_BEGIN, Phase.SYNC_FLUSH])
def test_it_stops_at_once_where_nothing_is_under_way(phase: Phase) -> None:
    state, effects = step(at(phase), machine.StopRequested())
    assert state.phase is Phase.STOPPED
    assert effects[-1] == machine.Stop()
    assert isinstance(effects[0], machine.Disconnect) == at(phase).linked


@pytest.mark.parametrize("phase", [Phase.ADOPTING, Phase.RENEWING, Phase.CAPTURE, Phase.TRANSFER, Phase.STAGE])
def test_what_is_under_way_is_finished_first(phase: Phase) -> None:
    state, effects = step(at(phase), machine.StopRequested())
    assert (state.phase, effects) == (phase, ())


def test_a_committed_epoch_is_the_last_one_of_a_stopping_primary() -> None:
    state, _ = step(at(Phase.STAGE), machine.StopRequested())
    state, _ = step(state, machine.FromPeer(m.Committed(EpochNumber(8))))
    state, effects = step(state, machine.BitmapRemoved())
    assert state.phase is Phase.STOPPED
    assert isinstance(effects[0], machine.Disconnect)


def test_a_copy_is_cut_short() -> None:
    state, effects = step(at(Phase.SYNC_COPY), machine.StopRequested())
    assert effects == (machine.CancelWork(),)
    state, effects = step(state, machine.WorkFailed("cancelled"))
    assert state.phase is Phase.STOPPED
    assert isinstance(effects[0], machine.Disconnect)


def test_a_staged_epoch_is_left_to_the_toolstack() -> None:
    # Its memory may be complete on the backup, and the older one dropped: no abort.
    expected = machine.MergeBack((recording(7, 8), recording(8, 9)), recording(7, 10))
    assert step(at(Phase.STAGED), machine.StopRequested())[1] == (machine.SaveState(), expected)
    late = step(at(Phase.STAGE, one_step=False, stopping=True), machine.FromPeer(m.EpochStaged(EpochNumber(8))))
    assert late[1] == (machine.SaveState(), expected)


@pytest.mark.parametrize("phase", [Phase.STAGE, Phase.COMMIT])
def test_an_answer_that_does_not_come_does_not_hold_it_up(phase: Phase) -> None:
    state, _ = step(at(phase), machine.StopRequested())
    state, effects = step(state, machine.StopDeadline())
    assert merge_of(effects).into == recording(7, 10)
    assert step(state, machine.Merged())[0].phase is Phase.STOPPED


def test_a_first_commit_in_doubt_keeps_its_base_when_it_has_to_stop() -> None:
    state, _ = step(first_sync(Phase.STAGE), machine.StopRequested())
    assert merge_of(step(state, machine.StopDeadline())[1]).into == recording(1, 3)


def test_a_deadline_that_passed_during_the_transfer_is_remembered() -> None:
    state, effects = step(at(Phase.TRANSFER, stopping=True), machine.StopDeadline())
    assert effects == (machine.CancelWork(),)
    _, effects = step(state, machine.Transferred(1, 1, 1))
    assert effects == (machine.Send(m.AbortEpoch(EpochNumber(8))), machine.SaveState(), merge_of(effects))


def test_a_deadline_that_passed_during_the_capture_is_remembered() -> None:
    state, _ = step(at(Phase.CAPTURE, stopping=True), machine.StopDeadline())
    assert merge_of(step(state, machine.Captured())[1]).into == recording(7, 10)


def test_a_stopped_machine_does_nothing_more() -> None:
    stopped = at(Phase.STOPPED)
    assert step(stopped, machine.LinkDown("cut")) == (stopped, ())


@pytest.mark.parametrize(
    "event", [machine.Captured(), machine.Transferred(0, 0, 0), machine.SyncCopied(), machine.BitmapRemoved()]
)
def test_work_that_nobody_ordered_is_a_defect(event: machine.Event) -> None:
    with pytest.raises(InternalError):
        step(at(Phase.IDLE), event)


# --- hello and reports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("generation", "base"), [(ONE, EpochNumber(7)), (TWO, None)])
def test_the_hello_names_a_base_only_of_its_own_generation(generation: Generation, base: Base) -> None:
    hello = machine.hello(at(Phase.WAITING, generation=generation))
    assert [disk.base for disk in hello.disks] == [base, base]


def test_a_primary_that_has_never_committed_is_not_degraded_but_off() -> None:
    assert machine.replication(at(Phase.WAITING, committed=None)) is Replication.OFF
    assert machine.replication(at(Phase.WAITING)) is Replication.DEGRADED
