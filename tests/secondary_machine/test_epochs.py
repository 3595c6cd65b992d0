"""What the secondary's machine decides in an epoch, up to its commit or abort, and on questions in it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_machine as machine
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import Base, DiskState, Replication
from qemu_remus.core.secondary_machine import Phase, step
from tests.secondary_machine.states import END, END_COMMIT, LINK, at, hung_up, number, reply, said


@pytest.mark.parametrize(
    ("epoch", "base", "fits"), [(8, 7, True), (12, 3, True), (9, 8, False), (7, 6, False), (8, None, False)]
)
def test_an_epoch_fits_from_its_base_up_to_itself(epoch: int, base: int | None, fits: bool) -> None:
    known: Base = None if base is None else number(base)
    state, effects = said(at(Phase.IDLE), m.EpochBegin(number(epoch), known))
    if fits:
        assert effects == (machine.BeginEpoch(number(epoch), known),)
        assert state.highest == epoch
    else:
        assert isinstance(effects[0], machine.Send)
        assert isinstance(effects[0].message, m.EpochRefused)
        assert effects[0].message.code is RefusalCode.BASE_TOO_NEW
        assert state.phase is Phase.IDLE


def test_extents_are_journalled() -> None:
    message = m.EpochExtents(number(8), (), b"")
    assert said(at(Phase.EPOCH), message)[1] == (machine.AppendEpoch(message),)


@pytest.mark.parametrize("message", [m.EpochExtents(number(6), (), b""), replace(END, epoch=number(6))])
def test_the_rest_of_a_refused_epoch_is_ignored(message: m.Message) -> None:
    for state in (at(Phase.IDLE), at(Phase.EPOCH)):
        assert said(state, message) == (state, ())


def test_staged_is_said_when_it_is_durable() -> None:
    state, effects = said(at(Phase.EPOCH), END)
    assert effects == (machine.StageEpoch(END),)
    state, effects = step(state, machine.Staged(number(8)))
    assert effects == (reply(m.EpochStaged(number(8))),)
    assert (state.phase, state.staged, state.committed) == (Phase.STAGED, 8, 7)


def test_one_write_stages_and_commits() -> None:
    state, effects = said(at(Phase.EPOCH), END_COMMIT)
    assert effects == (machine.StageEpoch(END_COMMIT),)
    state, effects = step(state, machine.CommitDone(number(8)))
    assert effects == (reply(m.Committed(number(8))), machine.WakeApply())
    assert (state.phase, state.staged, state.committed) == (Phase.IDLE, None, 8)


def test_committed_is_said_when_it_is_durable() -> None:
    state, effects = said(at(Phase.STAGED), m.CommitEpoch(number(8)))
    assert effects == (machine.CommitEpoch(number(8)),)
    assert step(state, machine.CommitDone(number(8)))[1][0] == reply(m.Committed(number(8)))


def test_a_repeated_commit_is_answered_from_the_state() -> None:
    assert said(at(Phase.IDLE), m.CommitEpoch(number(7)))[1] == (reply(m.Committed(number(7))),)


def test_a_commit_of_what_is_not_staged_is_a_breach() -> None:
    assert hung_up(said(at(Phase.IDLE), m.CommitEpoch(number(8)))[1], RefusalCode.PROTOCOL)
    assert hung_up(said(at(Phase.EPOCH, staged=number(6)), m.CommitEpoch(number(6)))[1], RefusalCode.PROTOCOL)


def test_an_aborted_epoch_is_dropped_staged_or_not() -> None:
    aborted = reply(m.EpochAborted(number(8)))
    state, effects = said(at(Phase.EPOCH), m.AbortEpoch(number(8)))
    assert effects == (machine.DropUnfinished(), aborted)
    assert state.phase is Phase.IDLE
    state, effects = said(at(Phase.STAGED), m.AbortEpoch(number(8)))
    assert effects == (machine.AbortEpoch(number(8)),)
    state, effects = step(state, machine.AbortDone(number(8)))
    assert effects == (aborted,)
    assert (state.phase, state.staged) == (Phase.IDLE, None)
    assert said(at(Phase.IDLE), m.AbortEpoch(number(8)))[1] == (aborted,)


def test_an_epoch_whose_abort_fails_is_still_there() -> None:
    state, _ = said(at(Phase.STAGED), m.AbortEpoch(number(8)))
    state, effects = step(state, machine.StoreFailed(RefusalCode.NO_SPACE, "no room", lasting=False))
    assert hung_up(effects, RefusalCode.NO_SPACE)
    assert machine.hello(state).staged == 8


def test_an_abort_that_comes_after_the_commit_is_told_so() -> None:
    state, effects = said(at(Phase.IDLE), m.AbortEpoch(number(7)))
    assert effects == (reply(m.Committed(number(7))),)
    assert state.committed == 7


def test_an_epoch_in_doubt_is_kept_beside_a_later_one() -> None:
    state, _ = said(at(Phase.STAGED), m.EpochBegin(number(10), number(7)))
    state, _ = step(state, machine.Staged(number(10)))
    assert machine.in_doubt(state) == (8, 10)


def test_a_later_commit_decides_the_epochs_in_doubt_before_it() -> None:
    doubts = at(Phase.STAGED, staged=number(12), doubted=(number(8), number(10)))
    state, _ = step(doubts, machine.CommitDone(number(10)))
    assert machine.in_doubt(state) == (12,)
    state, _ = step(doubts, machine.CommitDone(number(12)))
    assert machine.in_doubt(state) == ()


def test_the_journal_full_refuses_the_epoch_and_keeps_the_link() -> None:
    state, effects = step(at(Phase.EPOCH), machine.StoreFailed(RefusalCode.NO_SPACE, "full", lasting=False))
    assert effects == (
        machine.DropUnfinished(),
        reply(m.EpochRefused(number(8), RefusalCode.NO_SPACE, "full")),
    )
    assert (state.phase, state.link, state.failed) == (Phase.IDLE, LINK, False)


def test_a_store_that_cannot_be_trusted_ends_the_link() -> None:
    state, effects = step(at(Phase.EPOCH), machine.StoreFailed(RefusalCode.STORAGE_FAILED, "EIO", lasting=True))
    assert hung_up(effects, RefusalCode.STORAGE_FAILED)
    assert machine.disk_state(state) is DiskState.FAILED


def test_a_commit_that_fails_is_not_answered() -> None:
    state, effects = step(at(Phase.STAGED), machine.StoreFailed(RefusalCode.STORAGE_FAILED, "EIO", lasting=True))
    assert [type(effect) for effect in effects] == [machine.CloseLink, machine.ScheduleRetry]
    assert machine.in_doubt(state) == (8,)


def test_an_image_that_cannot_be_written_ends_the_link() -> None:
    state, effects = step(at(Phase.IDLE), machine.ApplyFailed("EIO"))
    assert hung_up(effects, RefusalCode.STORAGE_FAILED)
    assert machine.replication(state) is Replication.DEGRADED


@pytest.mark.parametrize(("epoch", "applied"), [(8, 8), (5, 6), (11, 6)])
def test_what_is_applied_never_goes_back_nor_past_the_commit(epoch: int, applied: int) -> None:
    state, _ = step(at(Phase.IDLE, applied=number(6), committed=number(8)), machine.Applied(number(epoch)))
    assert state.applied == applied


QUESTION = m.CompareBlocks(1, 4096, 4096, bytes(9 * 16))
CANNOT_TELL = reply(m.BlocksDiffer(1, 4096, b"\xff\x01"))


@pytest.mark.parametrize("phase", [Phase.SYNC, Phase.EPOCH])
def test_a_question_is_answered_with_what_was_found(phase: Phase) -> None:
    before = at(phase)
    state, effects = said(before, QUESTION)
    assert effects == (machine.CompareBlocks(QUESTION),)
    state, effects = step(state, machine.Compared(b"\x02\x00"))
    assert effects == (reply(m.BlocksDiffer(1, 4096, b"\x02\x00")),)
    assert state == before


def test_a_comparison_leaves_a_flushed_copy_flushed() -> None:
    state, _ = said(at(Phase.SYNC, flushed=True), QUESTION)
    assert step(state, machine.Compared(b"\x00\x00"))[0].flushed


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.STAGED])
def test_the_rest_of_a_refused_epochs_questions_are_answered_without_looking(phase: Phase) -> None:
    assert said(at(phase), QUESTION) == (at(phase), (CANNOT_TELL,))


def test_a_comparison_that_fails_refuses_the_epoch_and_is_answered_once() -> None:
    state, _ = said(at(Phase.EPOCH), QUESTION)
    state, effects = step(state, machine.StoreFailed(RefusalCode.STORAGE_FAILED, "EIO", lasting=False))
    refused = reply(m.EpochRefused(number(8), RefusalCode.STORAGE_FAILED, "EIO"))
    assert effects == (machine.DropUnfinished(), refused, CANNOT_TELL)
    assert (state.phase, state.link, state.failed) == (Phase.IDLE, LINK, False)
    # A later failure is not about the question.
    state, _ = said(state, m.EpochBegin(number(9), number(7)))
    _, effects = step(state, machine.StoreFailed(RefusalCode.NO_SPACE, "full", lasting=False))
    assert CANNOT_TELL not in effects


@pytest.mark.parametrize(("phase", "lasting"), [(Phase.SYNC, False), (Phase.EPOCH, True)])
def test_a_comparison_that_fails_ends_the_link_where_no_epoch_can_be_refused(phase: Phase, lasting: bool) -> None:
    state, _ = said(at(phase), QUESTION)
    state, effects = step(state, machine.StoreFailed(RefusalCode.STORAGE_FAILED, "EIO", lasting=lasting))
    assert hung_up(effects, RefusalCode.STORAGE_FAILED)
    assert CANNOT_TELL not in effects
    assert (state.link, state.comparing) == (None, None)


def test_messages_that_only_a_secondary_sends_are_a_breach() -> None:
    assert hung_up(said(at(Phase.IDLE), m.Committed(number(7)))[1], RefusalCode.PROTOCOL)
