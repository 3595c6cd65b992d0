"""What the primary's machine decides in a full sync, and when one was interrupted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import DiskState, EpochNumber, Generation, Replication
from qemu_remus.core.primary_machine import Found, Phase, PrimaryState, step
from tests.primary_machine.states import (
    DISKS,
    ONE,
    TWO,
    at,
    attach,
    ended,
    first_sync,
    link_up,
    live,
    merge_of,
    merged,
    recording,
    theirs,
)

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
