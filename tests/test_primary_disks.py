"""The primary's machine when the VM's disks change: it looks, merges, and begins the next link with other disks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import DiskName, DiskSpec, EpochNumber, Replication
from qemu_remus.core.primary_machine import Opened, Phase, PrimaryState, Resize, Surveyed, step
from tests.primary_machine.states import DISKS, at, copied_ahead, ended, first_sync, link_up, live, merge_of, theirs

NEW = DiskSpec(DiskName("new"), 1 << 20)
LARGER = (replace(DISKS[0], size=2 * DISKS[0].size), *DISKS[1:])


def surveyed(disks: tuple[DiskSpec, ...], *found: tuple[machine.Found, ...], changed: bool = True) -> Surveyed:
    return Surveyed(changed, disks, found or ((),) * len(disks), "something is other")


def kinds(effects: tuple[machine.Effect, ...]) -> list[str]:
    return [type(effect).__name__ for effect in effects]


def after_survey(state: PrimaryState, event: Surveyed) -> tuple[PrimaryState, tuple[machine.Effect, ...]]:
    assert state.phase is Phase.SURVEY
    return step(state, event)


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.WAITING])
def test_at_rest_it_looks_at_once(phase: Phase) -> None:
    state, effects = step(at(phase), machine.DisksChanged())
    assert (state.phase, effects) == (Phase.SURVEY, (machine.Survey(),))


@pytest.mark.parametrize("phase", [Phase.SYNC_COPY, Phase.AHEAD])
def test_a_copy_of_whole_disks_ends_for_it(phase: Phase) -> None:
    state, effects = step(at(phase), machine.DisksChanged())
    assert effects == (machine.CancelWork(),)
    state, effects = step(state, machine.WorkFailed("it was cancelled"))
    assert (state.phase, effects) == (Phase.SURVEY, (machine.Survey(),))


@pytest.mark.parametrize("phase", [Phase.CAPTURE, Phase.TRANSFER, Phase.STAGE, Phase.RETIRE, Phase.MERGE])
def test_an_epoch_under_way_comes_first(phase: Phase) -> None:
    state, effects = step(at(phase), machine.DisksChanged())
    assert (state.phase, effects) == (phase, ())
    assert state.stale


def test_it_looks_before_the_next_epoch() -> None:
    state, _ = step(at(Phase.RETIRE), machine.DisksChanged())
    state, effects = step(state, machine.BitmapRemoved())
    assert (state.phase, effects) == (Phase.SURVEY, (machine.Survey(),))


def test_a_failure_with_other_disks_looks_before_it_merges() -> None:
    state, effects = step(at(Phase.TRANSFER), machine.WorkFailed("the node is gone", changed=True))
    assert (state.phase, effects, state.reason) == (Phase.SURVEY, (machine.Survey(),), "the node is gone")
    # the same disks: as any failure
    merging, effects = after_survey(state, surveyed(DISKS, changed=False))
    assert merging.phase is Phase.MERGE
    assert effects[0] == machine.Send(m.AbortEpoch(EpochNumber(8)))
    assert (merging.failures, merging.reason) == (1, "the node is gone")


@pytest.mark.parametrize("phase", [Phase.MERGE, Phase.RETIRE, Phase.ADOPTING, Phase.RENEWING])
def test_work_on_bitmaps_that_fails_for_it_is_no_end(phase: Phase) -> None:
    assert step(at(phase), machine.WorkFailed("no such node", changed=True))[0].phase is Phase.SURVEY
    assert step(at(phase), machine.WorkFailed("no such node"))[0].phase is Phase.STOPPED


def test_a_look_that_fails_ends_it() -> None:
    state, _ = step(at(Phase.IDLE), machine.DisksChanged())
    assert step(state, machine.WorkFailed("QEMU is gone", changed=True))[0].phase is Phase.STOPPED


@pytest.mark.parametrize("linked", [True, False])
def test_the_same_disks_change_nothing(linked: bool) -> None:
    state, _ = step(at(Phase.IDLE if linked else Phase.WAITING, calling=not linked), machine.DisksChanged())
    tidy = ((live(7, 8),),) * len(DISKS)
    state, effects = after_survey(state, surveyed(DISKS, *tidy, changed=False))
    assert (state.phase, kinds(effects)) == ((Phase.IDLE, ["Schedule"]) if linked else (Phase.WAITING, []))
    assert not state.stale


def test_a_merge_that_failed_half_way_is_made_up_for_though_the_disks_are_the_same() -> None:
    state, _ = step(at(Phase.MERGE), machine.WorkFailed("no such node", changed=True))
    found = ((ended(7, 8), live(8, 9)),) * len(DISKS)
    state, effects = after_survey(state, surveyed(DISKS, *found, changed=False))
    assert state.phase is Phase.ADOPTING
    assert {recording.epoch for recording in merge_of(effects).old} == {8, 9}


def test_a_lost_epoch_is_no_protection_while_it_looks() -> None:
    state, _ = step(at(Phase.TRANSFER), machine.WorkFailed("the node is gone", changed=True))
    assert machine.replication(state) is not Replication.PROTECTED


def test_other_disks_begin_a_new_link_with_everything_merged() -> None:
    state, _ = step(at(Phase.IDLE), machine.DisksChanged())
    found = ((live(7, 8),), (), ())
    state, effects = after_survey(state, surveyed((*DISKS, NEW), *found))
    assert state.phase is Phase.ADOPTING
    assert kinds(effects) == ["Disconnect", "SaveState", "MergeBack"]
    assert merge_of(effects).old == (
        machine.Recording(live(7, 8).recording.generation, EpochNumber(7), EpochNumber(8)),
    )
    assert machine.replication(state) is Replication.DEGRADED
    assert NEW.name in state.uncovered
    state, effects = step(state, machine.Merged(live(None, 9).recording, found))
    assert (state.phase, effects, state.reason) == (Phase.WAITING, (machine.Connect(),), "something is other")
    assert [disk.base for disk in machine.hello(state).disks] == [7, None, None]


def test_bitmaps_that_only_qemu_knows_of_are_merged_as_well() -> None:
    state, _ = step(at(Phase.RETIRE), machine.WorkFailed("no such node", changed=True))
    state, effects = after_survey(state, surveyed((*DISKS, NEW), (ended(6, 7), live(7, 8)), (), ()))
    assert [recording.epoch for recording in merge_of(effects).old] == [8, 7]


def test_what_was_copied_ahead_is_sent_again() -> None:
    state, _ = step(copied_ahead(Phase.IDLE), machine.DisksChanged())
    state, effects = after_survey(state, surveyed(LARGER))
    assert [recording.epoch for recording in merge_of(effects).old] == [8, 9]
    assert state.opened is None


def test_no_disk_left_ends_it() -> None:
    state, _ = step(at(Phase.IDLE), machine.DisksChanged())
    state, effects = after_survey(state, Surveyed(True, (), (), "disk a is gone"))
    assert state.phase is Phase.STOPPED
    assert isinstance(effects[-1], machine.Stop)
    assert "no disk left" in effects[-1].reason


def test_a_link_that_comes_up_meanwhile_speaks_of_old_disks() -> None:
    state, _ = step(at(Phase.WAITING, calling=True), machine.DisksChanged())
    up = link_up(at(Phase.WAITING), theirs())
    state, effects = step(state, up)
    assert (state.phase, kinds(effects)) == (Phase.SURVEY, ["Disconnect", "Connect"])
    state, effects = after_survey(state, surveyed(LARGER))
    assert kinds(effects) == ["SaveState", "MergeBack"]
    state, effects = step(state, machine.Merged(live(7, 9).recording, ((live(7, 8),), (live(7, 8),))))
    # one link was asked for, and is still to come
    assert (state.phase, effects) == (Phase.WAITING, ())
    state, effects = step(state, up)
    assert (state.phase, kinds(effects)) == (Phase.WAITING, ["Disconnect", "Connect"])


def connected(state: PrimaryState, **fields: Any) -> tuple[PrimaryState, tuple[machine.Effect, ...]]:
    return step(state, link_up(state, theirs(**fields)))


def test_what_a_disk_has_gained_goes_ahead_of_the_next_checkpoint() -> None:
    state, effects = connected(at(Phase.WAITING, disks=LARGER))
    assert state.phase is Phase.AHEAD
    ahead = effects[-1]
    assert isinstance(ahead, machine.CopyAhead)
    assert (ahead.compare, ahead.grown) == ((), ((0, DISKS[0].size),))
    assert state.uncovered == {DISKS[0].name}
    # until it is committed, whatever becomes of the epoch
    state, _ = step(state, machine.WorkFailed("the link is slow"))
    state, effects = step(state, machine.Merged(live(7, 10).recording, ((live(7, 10),),) * len(DISKS)))
    assert state.grown


def test_a_new_disk_is_compared_until_it_is_committed_whatever_its_bitmaps_say() -> None:
    disks = (*DISKS, NEW)
    state = at(Phase.WAITING, disks=disks, reach=(EpochNumber(7),) * len(disks))
    state, effects = connected(state, disks=(*DISKS, replace(NEW, size=0)))
    ahead = effects[-1]
    assert isinstance(ahead, machine.CopyAhead)
    assert ahead.compare == (len(DISKS),)
    state, _ = step(state, machine.CopiedAhead(Opened()))
    state, _ = step(state, machine.CheckpointDue())
    state, _ = step(state, machine.Captured())
    state, _ = step(state, machine.Transferred(Opened()))
    assert state.added
    state, _ = step(state, machine.FromPeer(m.Committed(EpochNumber(9))))
    assert (state.added, state.grown, state.uncovered, state.news) == ((), (), frozenset(), "")


def test_a_disk_without_a_place_is_left_out_and_asked_about_until_there_is_one() -> None:
    disks = (*DISKS, NEW)
    state, effects = connected(at(Phase.WAITING, disks=disks, reach=(EpochNumber(7),) * len(disks)))
    assert effects == (
        machine.Disconnect(RefusalCode.NO_PLACE, "the secondary has no place for new"),
        machine.Survey((), frozenset({NEW.name})),
    )
    state, effects = after_survey(state, surveyed(DISKS, *((live(7, 8),),) * len(DISKS)))
    state, _ = step(state, machine.Merged(live(7, 9).recording, ((live(7, 9),),) * len(DISKS)))
    assert machine.hello(state).disks[-1] == DiskSpec(NEW.name, 0)
    same, _ = connected(state)
    assert same.phase is Phase.IDLE
    there, effects = connected(state, disks=(*DISKS, replace(NEW, size=0)))
    assert effects[-1] == machine.Survey()
    assert there.left_out == ()


@pytest.mark.parametrize("phase", [Phase.AHEAD, Phase.IDLE, Phase.STAGE])
def test_a_new_disk_whose_target_cannot_be_used_does_not_stop_the_others(phase: Phase) -> None:
    disks = (*DISKS, NEW)
    state = copied_ahead(phase) if phase is not Phase.AHEAD else at(phase)
    state = replace(state, disks=disks, reach=(EpochNumber(7),) * len(disks), added=(len(DISKS),))
    refused = m.EpochRefused(EpochNumber(9), RefusalCode.TARGET_UNSUITABLE, "it holds data")
    state, effects = step(state, machine.FromPeer(refused))
    assert [one.name for one in state.left_out] == [NEW.name]
    if phase is Phase.AHEAD:
        state, effects = step(state, machine.WorkFailed("it was cancelled"))
    else:
        state, effects = step(state, machine.Merged(live(7, 11).recording, ((live(7, 11),),) * len(disks)))
    assert effects[-1] == machine.Survey((), frozenset({NEW.name}))
    # not asked for on this link, nor on the next; after that somebody may have made room
    assert machine.hello(replace(state, disks=DISKS, reach=(None,) * len(DISKS))).disks == DISKS
    lost, _ = step(replace(state, linked=True), machine.LinkDown("lost"))
    assert [one.ask for one in lost.left_out] == [True]


def test_a_smaller_disk_is_told_and_waited_for() -> None:
    smaller = (replace(DISKS[0], size=512), *DISKS[1:])
    state, effects = connected(at(Phase.WAITING, disks=smaller))
    assert state.phase is Phase.WAITING
    assert "smaller" in state.reason
    assert kinds(effects) == ["Disconnect", "Connect"]
    assert machine.replication(state) is Replication.DEGRADED


def test_a_resize_waits_for_the_end_of_the_epoch_and_can_be_dropped_until_then() -> None:
    one, two = Resize(1, DISKS[0].name, 1 << 30), Resize(2, DISKS[0].name, 1 << 31)
    state, effects = step(at(Phase.STAGE), one)
    state, _ = step(state, two)
    assert effects == ()
    state, _ = step(state, machine.ResizeDropped(1))
    state, _ = step(state, machine.FromPeer(m.Committed(EpochNumber(8))))
    state, effects = step(state, machine.BitmapRemoved())
    assert effects == (machine.Survey((two,)),)
    assert state.resizes == ()


def test_a_first_copy_that_grew_begins_anew() -> None:
    state, _ = step(first_sync(Phase.SYNC_FLUSH), machine.DisksChanged())
    state, effects = step(state, machine.FromPeer(m.SyncFlushed(sum(disk.size for disk in DISKS))))
    assert state.phase is Phase.SURVEY
    state, effects = after_survey(state, surveyed(LARGER))
    assert not state.synced
    assert kinds(effects) == ["Disconnect", "SaveState", "MergeBack"]


def test_a_stop_while_it_looks_waits_for_the_look() -> None:
    state, _ = step(at(Phase.IDLE), machine.DisksChanged())
    state, effects = step(state, machine.StopRequested())
    assert (state.phase, effects) == (Phase.SURVEY, ())
    assert step(state, surveyed(DISKS, *((live(7, 8),),) * len(DISKS), changed=False))[0].phase is Phase.STOPPED
    state, _ = step(state, surveyed(LARGER))
    state, _ = step(state, machine.Merged(live(7, 9).recording, ((live(7, 9),),) * len(DISKS)))
    assert state.phase is Phase.STOPPED
