"""What the primary's machine decides before anything is sent: from the bitmaps that it finds and from the hellos."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import Base, DiskState, EpochNumber, Generation, Replication
from qemu_remus.core.primary_machine import Found, Phase, step
from tests.primary_machine.states import ONE, TWO, at, attach, ended, link_up, live, merge_of, merged, recording, theirs

# --- starting --------------------------------------------------------------------------------------------------------


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
