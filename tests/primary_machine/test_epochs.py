"""What the primary's machine decides in an epoch: on the way to its commit, and back when it fails."""

from __future__ import annotations

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import EpochNumber, Replication
from qemu_remus.core.primary_machine import Opened, Phase, step
from tests.primary_machine.states import BACK, at, ended, live, merge_of, merged, recording

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
    _, effects = step(at(Phase.TRANSFER, one_step=one_step), machine.Transferred(Opened(3, 4096, 99)))
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
    assert effects == (machine.RemoveBitmaps((recording(7, 8),)),)
    assert (state.committed, state.failures, state.finished, state.opened) == (8, 0, None, None)
    assert state.reach == (8, 8)
    assert machine.replication(state) is Replication.PROTECTED


def test_numbers_are_made_durable_ahead_of_their_use_and_not_at_each_commit() -> None:
    fields = {"saved": 8, "highest": 8 + machine.EPOCHS_AHEAD // 2 - 1}
    committed = machine.FromPeer(m.Committed(EpochNumber(8)))
    _, effects = step(at(Phase.STAGE, **fields), committed)
    assert effects == (machine.RemoveBitmaps((recording(7, 8),)),)
    # Half of them are left when the next ones are taken.
    highest = fields["highest"] + 1
    state, effects = step(at(Phase.STAGE, **fields | {"highest": highest}), committed)
    assert effects == (machine.SaveState(), machine.RemoveBitmaps((recording(7, 8),)))
    assert state.saved == highest


def test_a_commit_of_another_epoch_removes_nothing() -> None:
    state = at(Phase.STAGE)
    assert step(state, machine.FromPeer(m.Committed(EpochNumber(6)))) == (state, ())


def test_the_next_checkpoint_comes_when_the_bitmap_is_gone() -> None:
    state, effects = step(at(Phase.RETIRE), machine.BitmapRemoved())
    assert (state.phase, effects) == (Phase.IDLE, (machine.Schedule(0),))


# --- an epoch that fails ---------------------------------------------------------------------------------------------


def test_a_failed_capture_is_merged_back_under_the_older_base() -> None:
    state, effects = step(at(Phase.CAPTURE), machine.WorkFailed("the VM ran"))
    assert effects == (machine.SaveState(), BACK)
    assert (state.failures, state.reason) == (1, "the VM ran")
    assert machine.replication(state) is Replication.DEGRADED


def test_a_failed_transfer_is_aborted_on_the_secondary_first() -> None:
    _, effects = step(at(Phase.TRANSFER), machine.WorkFailed("the snapshot broke"))
    assert effects[0] == machine.Send(m.AbortEpoch(EpochNumber(8)))
    assert merge_of(effects) == BACK


def test_failures_in_a_row_are_backed_off() -> None:
    state, effects = step(at(Phase.MERGE, failures=3), merged(7, 10, ended(7, 8), live(8, 9)))
    assert effects == (machine.Schedule(3),)
    assert (state.recording, state.reach) == (recording(7, 10), (7, 7))


def test_a_refused_epochs_transfer_is_ended_and_not_aborted() -> None:
    refused = m.EpochRefused(EpochNumber(8), RefusalCode.NO_SPACE, "the journal is full")
    state, effects = step(at(Phase.TRANSFER), machine.FromPeer(refused))
    assert effects == (machine.CancelWork(),)
    for end in (machine.WorkFailed("cancelled"), machine.Transferred(Opened(1, 1, 1))):
        merging, effects = step(state, end)
        assert effects == (machine.SaveState(), merge_of(effects))
        assert merging.reason == "the journal is full"


def test_an_epoch_refused_at_its_end_is_merged_back() -> None:
    refused = m.EpochRefused(EpochNumber(8), RefusalCode.NO_SPACE, "the journal is full")
    state, effects = step(at(Phase.STAGE), machine.FromPeer(refused))
    assert merge_of(effects) == BACK
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
    assert merge_of(effects) == BACK
    assert machine.replication(state) is Replication.DEGRADED
    _, effects = step(state, merged(7, 10, ended(7, 8), live(8, 9)))
    assert effects == (machine.Connect(),)


@pytest.mark.parametrize("phase", [Phase.TRANSFER, Phase.SYNC_COPY, Phase.AHEAD])
def test_a_lost_link_ends_work_that_writes_to_it(phase: Phase) -> None:
    assert step(at(phase), machine.LinkDown("cut"))[1] == (machine.CancelWork(),)


@pytest.mark.parametrize("phase", [Phase.CAPTURE, Phase.RETIRE, Phase.MERGE, Phase.RENEWING])
def test_a_lost_link_does_not_cut_short_work_on_the_graph(phase: Phase) -> None:
    state, effects = step(at(phase), machine.LinkDown("cut"))
    assert (state.phase, effects) == (phase, ())
    assert not state.linked


def test_an_epoch_of_nothing_begins_and_ends_at_once() -> None:
    state, effects = step(at(Phase.CAPTURE), machine.Captured(changed=False))
    begin, end = m.EpochBegin(EpochNumber(8), EpochNumber(7)), m.EpochEnd(EpochNumber(8), 0, 0, 0, commit=True)
    assert effects == (machine.Send(begin), machine.Send(end))
    assert state.phase is Phase.STAGE


def test_nothing_new_behind_what_was_copied_ahead_ends_that_epoch() -> None:
    opened = machine.Opened(3, 12288, 77)
    state = at(Phase.CAPTURE, opened=opened, ahead=recording(6, 7))
    state, effects = step(state, machine.Captured(changed=False))
    assert effects == (machine.Send(m.EpochEnd(EpochNumber(8), 3, 12288, 77, commit=True)),)


def test_a_checkpoint_captured_without_a_link_is_merged_back() -> None:
    _, effects = step(at(Phase.CAPTURE, linked=False), machine.Captured())
    assert merge_of(effects) == BACK


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
    state, effects = step(state, merged(7, 10, ended(7, 8), live(8, 9)))
    assert effects == (machine.SaveState(), machine.Stop(goodbye=goodbye))


def test_what_an_earlier_link_still_says_is_not_heard() -> None:
    waiting = at(Phase.WAITING)
    assert step(waiting, machine.FromPeer(m.Committed(EpochNumber(8)))) == (waiting, ())
    assert step(waiting, machine.LinkDown("cut")) == (waiting, ())
