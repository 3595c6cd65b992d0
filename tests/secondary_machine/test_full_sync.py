"""What the secondary's machine decides in a full sync, and in one that goes on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_machine as machine
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import DiskState
from qemu_remus.core.secondary_machine import Phase, SecondaryState, step
from tests.secondary_machine.states import DISKS, ONE, TWO, at, hung_up, number, reply, said


def begun(**fields: Any) -> tuple[SecondaryState, tuple[machine.Effect, ...]]:
    return said(at(Phase.IDLE, may_sync=True, **fields), m.SyncBegin(TWO, DISKS))


def test_a_full_sync_gives_up_the_old_checkpoint_before_anything_is_written() -> None:
    state, effects = begun()
    assert effects == (machine.PrepareTargets(TWO, DISKS),)
    assert machine.disk_state(state) is DiskState.INCONSISTENT
    state, effects = step(state, machine.TargetsReady((True, False)))
    assert effects == (reply(m.SyncReady((True, False))),)


def test_a_full_sync_that_the_handshake_did_not_ask_for_is_a_breach() -> None:
    state, effects = said(at(Phase.IDLE), m.SyncBegin(TWO, DISKS))
    assert hung_up(effects, RefusalCode.PROTOCOL)
    assert (state.generation, state.consistent) == (ONE, True)


def test_a_full_sync_that_cannot_be_prepared_leaves_the_old_checkpoint() -> None:
    state, effects = step(begun()[0], machine.StoreFailed(RefusalCode.NO_SPACE, "full", lasting=False))
    assert hung_up(effects, RefusalCode.NO_SPACE)
    assert (state.generation, state.committed, state.consistent) == (ONE, 7, True)


def test_the_copy_is_acknowledged_behind_its_flush() -> None:
    state, effects = said(at(Phase.SYNC), m.SyncFlush(1))
    assert effects == (machine.FlushImages(1),)
    assert not state.flushed
    state, effects = step(state, machine.ImagesFlushed(1))
    assert effects == (reply(m.SyncFlushed(1)),)
    assert said(state, m.EpochBegin(number(1), None))[1] == (machine.BeginEpoch(number(1), None),)


def test_a_flush_that_fails_ends_the_link() -> None:
    state, _ = said(at(Phase.SYNC), m.SyncFlush(1))
    state, effects = step(state, machine.StoreFailed(RefusalCode.STORAGE_FAILED, "EIO", lasting=True))
    assert hung_up(effects, RefusalCode.STORAGE_FAILED)
    assert not state.flushed


def cut(**fields: Any) -> SecondaryState:
    """A secondary in the middle of a full sync, whose primary has come back."""
    facts: dict[str, Any] = {"committed": None, "applied": None, "consistent": False, "may_sync": True}
    return at(Phase.IDLE, **facts | {"fresh": (True, False), "position": 4096} | fields)


def test_an_interrupted_copy_goes_on_where_it_was_flushed() -> None:
    state, effects = said(cut(), m.SyncResume(ONE, DISKS))
    assert effects == (machine.ReopenTargets(),)
    state, effects = step(state, machine.TargetsReopened())
    assert effects == (reply(m.SyncResumed(True, 4096, (True, False))),)
    assert (state.phase, state.flushed, state.may_sync) == (Phase.SYNC, False, False)
    state, _ = step(state, machine.ImagesFlushed(8192))
    assert state.position == 8192


def test_a_flush_that_fails_does_not_move_the_position() -> None:
    state, _ = said(at(Phase.SYNC, fresh=(True, True), position=4096), m.SyncFlush(8192))
    state, _ = step(state, machine.StoreFailed(RefusalCode.STORAGE_FAILED, "EIO", lasting=False))
    assert state.position == 4096


@pytest.mark.parametrize(
    ("fields", "resume"),
    [
        ({}, m.SyncResume(TWO, DISKS)),
        ({}, m.SyncResume(ONE, DISKS[::-1])),
        ({}, m.SyncResume(ONE, (replace(DISKS[0], size=512), DISKS[1]))),
        ({"fresh": ()}, m.SyncResume(ONE, DISKS)),
        ({"consistent": True, "committed": number(7)}, m.SyncResume(ONE, DISKS)),
        ({"doubted": (number(6),)}, m.SyncResume(ONE, DISKS)),
    ],
    ids=["another copy", "another order", "another size", "none", "complete", "an epoch in doubt"],
)
def test_a_copy_that_is_not_known_does_not_go_on(fields: dict[str, Any], resume: m.SyncResume) -> None:
    state, effects = said(cut(**fields), resume)
    assert effects == (reply(m.SyncResumed(False, 0, ())),)
    assert state == cut(**fields)


def test_a_copy_goes_on_only_where_the_handshake_asks_for_one() -> None:
    _, effects = said(cut(may_sync=False), m.SyncResume(ONE, DISKS))
    assert hung_up(effects, RefusalCode.PROTOCOL)


def test_extents_after_the_flush_want_another() -> None:
    state, _ = said(at(Phase.SYNC, flushed=True), m.SyncExtents((), b""))
    _, effects = said(state, m.EpochBegin(number(1), None))
    assert isinstance(effects[0], machine.Send)
    assert isinstance(effects[0].message, m.EpochRefused)


def test_the_first_commit_makes_it_consistent() -> None:
    state = at(Phase.SYNC, flushed=True, behind=True)
    state, _ = said(state, m.EpochBegin(number(8), None))
    assert machine.disk_state(state) is DiskState.INCONSISTENT
    state, _ = step(state, machine.CommitDone(number(8)))
    assert machine.disk_state(state) is DiskState.UP_TO_DATE
