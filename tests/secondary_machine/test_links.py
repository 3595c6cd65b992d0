"""What the secondary's machine decides on a new link, on its disks, and on a link's end."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_machine as machine
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import DiskName, DiskSpec, DiskState, InstanceId, Replication
from qemu_remus.core.secondary_machine import Phase, step
from tests.secondary_machine.states import DISKS, LINK, TWO, at, greeting, hung_up, number, reply, said

# --- links -----------------------------------------------------------------------------------------------------------


def test_a_primary_that_can_send_the_difference_is_taken() -> None:
    listening = at(Phase.LISTENING)
    state, effects = step(listening, machine.HelloReceived(LINK, greeting()))
    assert effects == (reply(machine.hello(listening)),)
    assert (state.phase, state.link, state.may_sync) == (Phase.IDLE, LINK, False)


def test_only_a_commit_makes_a_reconnected_copy_up_to_date() -> None:
    state, _ = step(at(Phase.LISTENING), machine.HelloReceived(LINK, greeting()))
    assert machine.replication(state) is Replication.RESYNC
    assert machine.disk_state(state) is DiskState.OUTDATED
    state, _ = step(state, machine.CommitDone(number(8)))
    assert machine.replication(state) is Replication.PROTECTED
    assert machine.disk_state(state) is DiskState.UP_TO_DATE


def test_a_second_primary_is_refused() -> None:
    idle = at(Phase.IDLE)
    other = greeting(instance=InstanceId(UUID(int=77)))
    state, effects = step(idle, machine.HelloReceived(6, other))
    assert state == idle
    assert hung_up(effects, RefusalCode.OTHER_PRIMARY)


def test_a_newer_link_of_the_same_primary_fences_the_older_one() -> None:
    state, effects = step(at(Phase.EPOCH), machine.HelloReceived(6, greeting(session=4)))
    assert isinstance(effects[0], machine.DropUnfinished)
    assert isinstance(effects[1], machine.CloseLink)
    assert (effects[1].link, effects[1].code) == (LINK, RefusalCode.FENCED)
    assert (state.link, state.phase, state.receiving) == (6, Phase.IDLE, None)


@pytest.mark.parametrize("session", [2, 3])
def test_an_older_link_cannot_fence_a_newer_one(session: int) -> None:
    idle = at(Phase.IDLE)
    state, effects = step(idle, machine.HelloReceived(6, greeting(session=session)))
    assert state == idle
    assert hung_up(effects, RefusalCode.FENCED)


def test_frames_of_a_fenced_link_are_dropped() -> None:
    idle = at(Phase.IDLE)
    assert said(idle, m.EpochBegin(number(8), number(7)), link=4) == (idle, ())


def test_a_refused_primary_hears_our_hello_and_the_reason() -> None:
    listening = at(Phase.LISTENING)
    state, effects = step(listening, machine.HelloReceived(LINK, greeting(generation=TWO)))
    assert state == listening
    assert effects[0] == reply(machine.hello(listening))
    assert hung_up(effects, RefusalCode.UNRELATED_DATA)


def test_a_failed_store_is_told_to_the_primary() -> None:
    state, effects = step(at(Phase.LISTENING, failed=True, reason="EIO"), machine.HelloReceived(LINK, greeting()))
    assert state.link is None
    assert hung_up(effects, RefusalCode.STORAGE_FAILED)
    assert isinstance(effects[-1], machine.CloseLink)
    assert "EIO" in effects[-1].text


def test_a_lost_link_forgets_an_epoch_without_an_end() -> None:
    state, effects = step(at(Phase.EPOCH), machine.LinkDown(LINK, "cut"))
    assert effects == (machine.DropUnfinished(),)
    assert (state.phase, state.link, state.receiving) == (Phase.LISTENING, None, None)


def test_a_lost_link_keeps_a_staged_epoch() -> None:
    state, effects = step(at(Phase.STAGED), machine.LinkDown(LINK, "cut"))
    assert effects == ()
    assert machine.in_doubt(state) == (8,)
    assert machine.hello(state).staged == 8


def test_the_end_of_another_link_changes_nothing() -> None:
    idle = at(Phase.IDLE)
    assert step(idle, machine.LinkDown(4, "cut")) == (idle, ())


# --- disks that change -----------------------------------------------------------------------------------------------


LARGER = (replace(DISKS[0], size=2 * DISKS[0].size), *DISKS[1:])
NEW = DiskSpec(DiskName("new"), 4096)


def test_the_disks_of_a_link_are_the_secondarys_from_the_first_commit_on() -> None:
    state, _ = step(at(Phase.LISTENING), machine.HelloReceived(LINK, greeting(disks=LARGER)))
    assert state.disks == DISKS
    state, effects = said(state, m.EpochBegin(number(8), number(7)))
    (begin,) = effects
    assert isinstance(begin, machine.BeginEpoch)
    assert begin.disks == LARGER
    staged, _ = step(state, machine.Staged(number(8)))
    assert staged.disks == DISKS
    assert step(staged, machine.CommitDone(number(8)))[0].disks == LARGER
    assert step(state, machine.CommitDone(number(8)))[0].disks == LARGER
    dropped, _ = step(staged, machine.AbortDone(number(8)))
    assert (dropped.disks, dropped.tables) == (DISKS, ())


def test_each_epoch_in_doubt_has_the_disks_of_its_link() -> None:
    state, _ = step(at(Phase.LISTENING), machine.HelloReceived(LINK, greeting(disks=LARGER)))
    state, _ = said(state, m.EpochBegin(number(8), number(7)))
    state, _ = step(state, machine.Staged(number(8)))
    state, _ = step(state, machine.LinkDown(LINK, "lost"))
    fewer = greeting(disks=DISKS[:1], session=5)
    state, _ = step(state, machine.HelloReceived(LINK, fewer))
    state, _ = said(state, m.EpochBegin(number(9), number(7)))
    state, _ = step(state, machine.Staged(number(9)))
    first, _ = step(state, machine.CommitDone(number(8)))
    assert first.disks == LARGER
    assert step(first, machine.CommitDone(number(9)))[0].disks == DISKS[:1]
    assert step(state, machine.CommitDone(number(9)))[0].disks == DISKS[:1]


def test_a_hello_names_the_free_places_too() -> None:
    state = at(Phase.LISTENING, places=(DISKS[0].name, NEW.name))
    assert machine.hello(state).disks == (*DISKS, replace(NEW, size=0))
    wanted = DiskSpec(DiskName("other"), 512)
    theirs = greeting(disks=(*DISKS, wanted))
    assert machine.hello(state, theirs).disks == (*DISKS, replace(NEW, size=0))
    anywhere = replace(state, takes_any=True)
    assert machine.hello(anywhere, theirs).disks == (*DISKS, replace(NEW, size=0), replace(wanted, size=0))


@pytest.mark.parametrize(
    ("disks", "code"),
    [((*DISKS, NEW), RefusalCode.NO_PLACE), ((replace(DISKS[0], size=512), *DISKS[1:]), RefusalCode.DISK_SHRUNK)],
)
def test_a_primary_whose_disks_do_not_fit_hears_why_and_may_come_again(
    disks: tuple[DiskSpec, ...], code: RefusalCode
) -> None:
    listening = at(Phase.LISTENING)
    state, effects = step(listening, machine.HelloReceived(LINK, greeting(disks=disks)))
    assert state == listening
    assert effects[0] == reply(machine.hello(listening))
    assert hung_up(effects, code)


def test_a_disk_that_the_primary_only_asks_about_is_none_of_the_links() -> None:
    asking = greeting(disks=(*DISKS, replace(NEW, size=0)))
    state, _ = step(at(Phase.LISTENING), machine.HelloReceived(LINK, asking))
    assert state.link == LINK
    assert [disk.name for disk in state.arriving] == [disk.name for disk in DISKS]
