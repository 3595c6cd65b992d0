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
from qemu_remus.core.primary_machine import Found, Opened, Phase, PrimaryState, Recording, step
from qemu_remus.core.primary_turns import COPY_AHEAD_BYTES

ONE = Generation(UUID(int=1))
TWO = Generation(UUID(int=2))
DISKS = (DiskSpec(DiskName("system"), 1 << 20), DiskSpec(DiskName("data"), 1 << 20))


def recording(base: int | None, epoch: int, generation: Generation = ONE) -> Recording:
    return Recording(generation, None if base is None else EpochNumber(base), EpochNumber(epoch))


def live(base: int | None, epoch: int, generation: Generation = ONE) -> Found:
    """A bitmap that records."""
    return Found(recording(base, epoch, generation))


def ended(base: int | None, epoch: int, generation: Generation = ONE) -> Found:
    """A bitmap that is complete."""
    return Found(recording(base, epoch, generation), live=False)


def merged(base: int | None, epoch: int, *found: Found | tuple[Found, ...], generation: Generation = ONE) -> Any:
    """The end of a merge, where every disk had the bitmaps that are named here; a tuple: one disk had them."""
    disks = tuple(one for one in found if isinstance(one, tuple))
    same = tuple(one for one in found if isinstance(one, Found))
    return machine.Merged(recording(base, epoch, generation), disks or (same,) * len(DISKS))


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
        reach=(EpochNumber(7),) * len(DISKS),
        linked=phase not in {Phase.STARTING, Phase.ADOPTING, Phase.WAITING},
        protected=phase not in {Phase.STARTING, Phase.ADOPTING, Phase.WAITING},
    )
    if phase in machine.IN_EPOCH:
        state = replace(state, highest=9, finished=recording(7, 8), recording=recording(8, 9))
    if phase in machine.IN_EPOCH - {Phase.CAPTURE}:
        state = replace(state, opened=Opened())
    if phase is Phase.AHEAD:
        ahead = recording(7, 8)
        state = replace(
            state, highest=9, ahead=ahead, recording=recording(8, 9), opened=Opened(), bulky=True, protected=False
        )
    return replace(state, **fields)


def copied_ahead(phase: Phase, **fields: Any) -> PrimaryState:
    """A primary that has copied what bitmap 8 holds ahead of epoch 9, which is open; in the epoch: 10 records."""
    state = at(phase, highest=9, ahead=recording(7, 8), recording=recording(8, 9), opened=SENT_AHEAD, bulky=True)
    if phase in machine.IN_EPOCH:
        state = replace(state, highest=10, finished=recording(8, 9), recording=recording(9, 10))
    return replace(state, protected=False, **fields)


SENT_AHEAD = Opened(extents=5, payload=5 << 12, digest=11)


def first_sync(phase: Phase, **fields: Any) -> PrimaryState:
    """A primary whose first copy is flushed and whose first epoch completes it."""
    state = at(phase, committed=None, synced=True, protected=False, highest=1, recording=recording(None, 1), **fields)
    state = replace(state, reach=(None,) * len(DISKS))
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


def link_up(state: PrimaryState, hello: m.Hello, dirty_bytes: int = 0) -> machine.LinkUp:
    return machine.LinkUp(machine.hello(state), hello, TWO, dirty_bytes)


def merge_of(effects: tuple[machine.Effect, ...]) -> machine.MergeBack:
    (merge,) = (effect for effect in effects if isinstance(effect, machine.MergeBack))
    return merge


# --- starting --------------------------------------------------------------------------------------------------------


def attach(*found: tuple[Found, ...], **fields: Any) -> tuple[PrimaryState, tuple[machine.Effect, ...]]:
    return step(at(Phase.STARTING, **{"recording": None, "reach": ()} | fields), machine.Attached(found))


def test_without_bitmaps_it_connects() -> None:
    state, effects = attach((), ())
    assert effects == (machine.Connect(),)
    assert state.phase is Phase.WAITING
    assert state.reach == (None, None)


def test_what_an_earlier_controller_tracked_is_taken_over_with_a_new_number() -> None:
    state, effects = attach((live(7, 12),), (live(7, 12),), highest=8)
    assert effects == (machine.SaveState(), machine.MergeBack((recording(7, 12),), ONE, EpochNumber(13)))
    assert state.highest == 13


def test_bitmaps_that_not_every_disk_has_are_taken_over_all() -> None:
    _, effects = attach((ended(7, 8), live(8, 9)), (live(8, 9),))
    assert merge_of(effects).old == (recording(7, 8), recording(8, 9))


def test_a_lost_state_directory_is_made_up_for_by_the_bitmaps() -> None:
    found = (live(7, 12),)
    state, _ = attach(found, found, generation=None, committed=None, highest=0)
    state, _ = step(state, merged(7, 13, *found))
    assert (state.generation, state.highest, state.phase) == (ONE, 13, Phase.WAITING)
    assert [disk.base for disk in machine.hello(state).disks] == [7, 7]


@pytest.mark.parametrize(
    "found",
    [
        ((live(7, 8),), (live(7, 8, TWO),)),
        ((ended(7, 8), live(8, 9)), (ended(7, 8),)),
        ((live(7, 8),), ()),
    ],
    ids=["two generations", "a broken chain", "a disk without"],
)
def test_a_lost_state_directory_is_not_made_up_for_by_bitmaps_that_leave_a_doubt(
    found: tuple[tuple[Found, ...], ...],
) -> None:
    state, effects = attach(*found, generation=None, committed=None, highest=0)
    assert set(merge_of(effects).old) == {one.recording for disk in found for one in disk}
    state, _ = step(state, merged(None, 10, *found))
    said = machine.hello(state)
    assert (said.generation, [disk.base for disk in said.disks]) == (None, [None, None])


def test_after_taking_over_it_connects_and_tells_what_each_disk_reaches_back_to() -> None:
    state, effects = step(
        at(Phase.ADOPTING, reach=(None, None)), merged(8, 9, (live(8, 9),), (ended(7, 8), live(8, 9)))
    )
    assert effects == (machine.Connect(),)
    assert state.phase is Phase.WAITING
    assert [disk.base for disk in machine.hello(state).disks] == [8, 7]


# --- what a disk's bitmaps tell --------------------------------------------------------------------------------------

CHAINS: list[tuple[str, tuple[Found, ...], int | None]] = [
    ("none at all", (), None),
    ("one that records", (live(7, 8),), 7),
    ("one that records no more", (ended(7, 8),), None),
    ("a finished one and the next", (ended(7, 8), live(8, 9)), 7),
    ("in another order", (live(8, 9), ended(7, 8)), 7),
    ("three", (ended(7, 8), ended(8, 9), live(9, 10)), 7),
    ("the number before was given up, but the base tells", (ended(7, 8), live(8, 10)), 7),
    # What is left still holds everything since the missing one's end.
    ("the first is missing", (ended(8, 9), live(9, 10)), 8),
    ("the middle one is missing", (ended(7, 8), live(9, 10)), None),
    ("the last one is missing", (ended(7, 8), ended(8, 9)), None),
    ("an unfinished full sync's", (live(None, 1),), None),
    # If checkpoint 1 was committed, the difference to it is known; if not, no secondary can mistake the base.
    ("the one that completes a full sync, and the next", (ended(None, 1), live(1, 2)), 1),
    ("a bitmap that not all disks had, and the next", (ended(None, 8), live(8, 9)), 8),
    ("of another generation", (live(7, 8, TWO),), None),
    ("beside another generation's", (ended(7, 8, TWO), live(8, 9)), 8),
    ("the live one is another generation's", (ended(7, 8), live(8, 9, TWO)), None),
]


@pytest.mark.parametrize(("found", "base"), [row[1:] for row in CHAINS], ids=[row[0] for row in CHAINS])
def test_a_disk_reaches_back_as_far_as_its_bitmaps_are_a_chain(found: tuple[Found, ...], base: Base) -> None:
    assert machine.reach_of(found, ONE) == base


def test_without_a_generation_no_bitmap_is_ours() -> None:
    assert machine.reach_of((live(7, 8),), None) is None


@pytest.mark.parametrize(
    ("found", "base"),
    [
        (((live(7, 8),), (live(7, 8),)), 7),
        # One disk's finished bitmap was removed after the commit, then the controller died.
        (((live(8, 9),), (ended(7, 8), live(8, 9))), 8),
        (((live(7, 8),), ()), None),
        ((), None),
    ],
    ids=["the same", "the newest holds on all", "a disk without", "no disk"],
)
def test_the_base_of_the_bitmap_that_takes_over_holds_on_every_disk(
    found: tuple[tuple[Found, ...], ...], base: Base
) -> None:
    assert machine.base_of(found, ONE) == base


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
    assert merge_of(effects) == machine.MergeBack((recording(7, 8),), TWO, EpochNumber(9), complete=True)


def test_a_full_sync_over_a_good_checkpoint_waits_for_leave() -> None:
    # The secondary's is of the history before this VM was taken over.
    waiting = at(Phase.WAITING)
    hello = replace(machine.hello(replace(waiting, generation=TWO)), history=((ONE, EpochNumber(7)),))
    up = machine.LinkUp(hello, theirs(), Generation(UUID(int=3)))
    state, effects = step(waiting, up)
    assert state.phase is Phase.STOPPED
    assert isinstance(effects[0], machine.Disconnect)
    assert effects[0].code is RefusalCode.NEEDS_FULL_SYNC
    state, _ = step(replace(waiting, allow_full_resync=True), up)
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
    asked, effects = step(renewing, merged(None, 9, live(7, 8), generation=TWO))
    assert effects == (machine.Send(m.SyncBegin(TWO, DISKS)),)
    assert machine.hello(asked).generation == ONE
    assert all(disk.base is None for disk in machine.hello(asked).disks)
    copying, effects = step(asked, machine.FromPeer(m.SyncReady((True, False))))
    assert effects == (machine.SaveState(), machine.CopyLive(recording(None, 9, TWO), (True, False)))
    assert (copying.generation, copying.committed) == (TWO, None)


def test_the_copy_is_flushed_before_the_first_epoch() -> None:
    state, effects = step(at(Phase.SYNC_COPY), machine.SyncCopied())
    whole = sum(disk.size for disk in DISKS)
    assert effects == (machine.Send(m.SyncFlush(whole)),)
    assert step(state, machine.FromPeer(m.SyncFlushed(whole // 2))) == (state, ())
    state, effects = step(state, machine.FromPeer(m.SyncFlushed(whole)))
    assert effects == (machine.Schedule(0),)
    assert state.synced
    assert machine.replication(state) is Replication.INITIAL_SYNC


def test_a_copy_that_fails_begins_anew_on_another_link() -> None:
    state, effects = step(at(Phase.SYNC_COPY), machine.WorkFailed("read error"))
    assert effects == (machine.Disconnect(RefusalCode.SHUTTING_DOWN, "read error"), machine.Connect())
    assert not state.linked


def test_a_first_epoch_that_fails_can_still_complete_the_sync_on_this_link() -> None:
    state, effects = step(first_sync(Phase.CAPTURE), machine.WorkFailed("void"))
    assert merge_of(effects) == machine.MergeBack(
        (recording(None, 1), recording(1, 2)), ONE, EpochNumber(3), complete=True
    )
    state, effects = step(state, merged(None, 3, ended(None, 1), live(1, 2)))
    assert effects == (machine.Schedule(1),)
    _, effects = step(step(state, machine.CheckpointDue())[0], machine.Captured())
    assert effects[0] == machine.Send(m.EpochBegin(EpochNumber(3), None))


@pytest.mark.parametrize(
    "left",
    [(), (ended(None, 1),), (live(1, 2),)],
    ids=["both", "the one that records", "the one that the copy began with"],
)
def test_a_bitmap_lost_during_a_full_sync_begins_it_anew(left: tuple[Found, ...]) -> None:
    # What that disk's copy missed is not known: no epoch of this link may complete it.
    whole = (ended(None, 1), live(1, 2))
    state, _ = step(first_sync(Phase.CAPTURE), machine.WorkFailed("void"))
    state, effects = step(state, merged(None, 3, whole, left))
    assert isinstance(effects[0], machine.Disconnect)
    assert (state.phase, state.synced) == (Phase.WAITING, False)
    assert [disk.base for disk in machine.hello(state).disks] == [None, None]


def test_no_two_full_syncs_share_a_generation() -> None:
    waiting = at(Phase.WAITING)
    state, _ = step(waiting, link_up(waiting, theirs(committed=None, disk_state=DiskState.INCONSISTENT)))
    assert state.spare is None


def test_a_first_commit_in_doubt_leaves_a_base_for_the_case_that_it_was_decided() -> None:
    state, effects = step(first_sync(Phase.STAGE), machine.LinkDown("cut"))
    assert not merge_of(effects).complete
    state, _ = step(state, merged(1, 3, ended(None, 1), live(1, 2)))
    assert state.reach == (1, 1)


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


BACK = machine.MergeBack((recording(7, 8), recording(8, 9)), ONE, EpochNumber(10))
"""What takes a failed epoch 8 back."""


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


# --- copied ahead of a checkpoint ------------------------------------------------------------------------------------

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
    assert step(at(Phase.STAGED), machine.StopRequested())[1] == (machine.SaveState(), BACK)
    late = step(at(Phase.STAGE, one_step=False, stopping=True), machine.FromPeer(m.EpochStaged(EpochNumber(8))))
    assert late[1] == (machine.SaveState(), BACK)


@pytest.mark.parametrize("phase", [Phase.STAGE, Phase.COMMIT])
def test_an_answer_that_does_not_come_does_not_hold_it_up(phase: Phase) -> None:
    state, _ = step(at(phase), machine.StopRequested())
    state, effects = step(state, machine.StopDeadline())
    assert merge_of(effects) == BACK
    assert step(state, merged(7, 10, ended(7, 8), live(8, 9)))[0].phase is Phase.STOPPED


def test_a_first_commit_in_doubt_keeps_its_base_when_it_has_to_stop() -> None:
    state, _ = step(first_sync(Phase.STAGE), machine.StopRequested())
    assert not merge_of(step(state, machine.StopDeadline())[1]).complete


def test_a_deadline_that_passed_during_the_transfer_is_remembered() -> None:
    state, effects = step(at(Phase.TRANSFER, stopping=True), machine.StopDeadline())
    assert effects == (machine.CancelWork(),)
    _, effects = step(state, machine.Transferred(Opened(1, 1, 1)))
    assert effects == (machine.Send(m.AbortEpoch(EpochNumber(8))), machine.SaveState(), merge_of(effects))


def test_a_deadline_that_passed_during_the_capture_is_remembered() -> None:
    state, _ = step(at(Phase.CAPTURE, stopping=True), machine.StopDeadline())
    assert merge_of(step(state, machine.Captured())[1]) == BACK


def test_a_stopped_machine_does_nothing_more() -> None:
    stopped = at(Phase.STOPPED)
    assert step(stopped, machine.LinkDown("cut")) == (stopped, ())


@pytest.mark.parametrize(
    "event",
    [
        machine.Captured(),
        machine.Transferred(Opened()),
        machine.SyncCopied(),
        machine.BitmapRemoved(),
        machine.CopiedAhead(Opened()),
    ],
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


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.CAPTURE, Phase.TRANSFER, Phase.STAGE, Phase.COMMIT, Phase.RETIRE])
def test_with_a_qemu_that_does_not_answer_nothing_is_protected_until_it_does(phase: Phase) -> None:
    silent, effects = step(at(phase, reason=""), machine.QemuSilent("no reply"))
    assert (silent.phase, effects) == (phase, ())
    assert (machine.replication(silent), machine.reason(silent)) == (Replication.DEGRADED, "no reply")
    heard, effects = step(silent, machine.QemuSilent(""))
    assert effects == ()
    assert (machine.replication(heard), machine.reason(heard)) == (Replication.PROTECTED, "")


def test_what_ended_the_controller_is_said_rather_than_that_qemu_is_silent() -> None:
    silent, _ = step(at(Phase.MERGE), machine.QemuSilent("no reply"))
    ended, _ = step(silent, machine.WorkFailed("it was not sent"))
    assert (machine.replication(ended), machine.reason(ended)) == (Replication.OFF, "it was not sent")


# --- a full sync that was interrupted --------------------------------------------------------------------------------

BEGUN = recording(None, 9, TWO)
THREE = Generation(UUID(int=3))


def interrupted(**fields: Any) -> PrimaryState:
    """A primary whose link was lost while it copied the disks."""
    asked = at(Phase.SYNC_BEGIN, recording=BEGUN, highest=9, reach=(None,) * len(DISKS))
    copying, _ = step(asked, machine.FromPeer(m.SyncReady((True, False))))
    lost, _ = step(copying, machine.LinkDown("cut"))
    waiting, _ = step(lost, machine.WorkFailed("the link is gone", by_link=True))
    assert waiting.phase is Phase.WAITING
    return replace(waiting, **fields)


def back(state: PrimaryState, **fields: Any) -> machine.Step:
    """The link is there again; the secondary holds a part of the copy."""
    facts = {"generation": TWO, "committed": None, "highest_epoch": 0, "disk_state": DiskState.INCONSISTENT}
    hello = theirs(**facts | fields)
    return step(state, machine.LinkUp(machine.hello(state), hello, THREE, 0))


def test_an_interrupted_copy_goes_on_where_it_was_flushed_and_its_bitmap_forgets_nothing() -> None:
    state, effects = back(interrupted())
    assert effects == (machine.Send(m.SyncResume(TWO, DISKS)),)
    state, effects = step(state, machine.FromPeer(m.SyncResumed(True, 4096, (True, False))))
    assert effects == (machine.CopyLive(BEGUN, (True, False), 4096),)
    state, effects = step(state, machine.SyncCopied())
    assert state.phase is Phase.SYNC_FLUSH


def test_a_secondary_that_knows_nothing_of_the_copy_gets_a_new_one() -> None:
    state, _ = back(interrupted())
    state, effects = step(state, machine.FromPeer(m.SyncResumed(False, 0, ())))
    assert state.phase is Phase.RENEWING
    assert merge_of(effects).generation == THREE


@pytest.mark.parametrize(
    ("ours", "hello"),
    [
        ({"since": None}, {}),
        ({"recording": recording(None, 10, TWO)}, {}),
        ({}, {"generation": ONE}),
        ({}, {"generation": None}),
        ({}, {"staged": EpochNumber(9)}),
    ],
    ids=["not sure of the bitmap", "another bitmap", "another copy there", "a new store", "an epoch is in doubt"],
)
def test_whatever_is_not_sure_begins_anew(ours: Any, hello: Any) -> None:
    assert back(interrupted(**ours), **hello)[0].phase is Phase.RENEWING


def test_a_controller_that_was_started_again_never_trusts_the_bitmap_of_a_copy() -> None:
    found = live(None, 9, TWO)
    state, _ = attach(*((found,),) * len(DISKS), generation=TWO, committed=None)
    state, _ = step(state, merged(None, 10, found, generation=TWO))
    assert back(state)[0].phase is Phase.RENEWING


def test_a_copy_that_failed_by_itself_is_not_built_upon() -> None:
    """A disk may have lost its bitmap."""
    asked = at(Phase.SYNC_BEGIN, recording=BEGUN, highest=9)
    copying, _ = step(asked, machine.FromPeer(m.SyncReady((True,) * len(DISKS))))
    waiting, _ = step(copying, machine.WorkFailed("a disk has lost its bitmap"))
    assert back(waiting)[0].phase is Phase.RENEWING


@pytest.mark.parametrize("whole", [True, False])
def test_a_bitmap_that_takes_over_a_failed_epoch_reaches_the_copy_where_no_disk_lost_one(whole: bool) -> None:
    finished, into = recording(None, 9, TWO), recording(9, 11, TWO)
    fields = {"generation": TWO, "committed": None, "since": finished, "recording": into}
    chain = (ended(None, 9, TWO), live(9, 10, TWO))
    state = at(Phase.MERGE, linked=False, **fields)
    state, _ = step(state, machine.Merged(into, (chain, chain if whole else chain[1:])))
    assert state.since == (into if whole else None)
