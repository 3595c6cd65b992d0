"""What the secondary's machine decides, one decision a test.

Each test begins with a state built by :func:`at`, gives it events, and looks at the effects and at what matters of the
state.  How the two machines get on with each other is ``tests/simulation``'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_machine as machine
from qemu_remus.core.errors import (
    CommitInDoubt,
    EpochLost,
    NotConsistent,
    OutOfOrder,
    QemuRemusError,
    RefusalCode,
    Refused,
)
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
from qemu_remus.core.secondary_machine import Failover, Phase, SecondaryState, step

ONE = Generation(UUID(int=1))
TWO = Generation(UUID(int=2))
PRIMARY = InstanceId(UUID(int=9))
LINK = 5
DISKS = (DiskSpec(DiskName("system"), 1 << 20), DiskSpec(DiskName("data"), 1 << 20))


def number(epoch: int) -> EpochNumber:
    return EpochNumber(epoch)


def at(phase: Phase, **fields: Any) -> SecondaryState:
    """A secondary that holds checkpoint 7; its primary is connected, an epoch that comes is 8."""
    linked = phase not in {Phase.LISTENING, Phase.FAILING_OVER, Phase.FAILED_OVER}
    state = SecondaryState(
        PairName("pair"),
        InstanceId(UUID(int=8)),
        DISKS,
        phase=phase,
        generation=ONE,
        committed=number(7),
        applied=number(7),
        staged=number(8) if phase is Phase.STAGED else None,
        highest=7,
        consistent=True,
        link=LINK if linked else None,
        primary=(PRIMARY, 3) if linked else None,
        receiving=(number(8), number(7)) if phase is Phase.EPOCH else None,
    )
    if phase is Phase.SYNC:
        state = replace(state, committed=None, applied=None, consistent=False)
    return replace(state, **fields)


def greeting(**fields: Any) -> m.Hello:
    """The hello of a primary that can send the difference to checkpoint 7."""
    hello = m.Hello(
        pair=PairName("pair"),
        role=Role.PRIMARY,
        instance=PRIMARY,
        session=4,
        generation=ONE,
        disks=tuple(replace(disk, base=number(7)) for disk in DISKS),
        committed=number(7),
        staged=None,
        highest_epoch=8,
        disk_state=DiskState.UP_TO_DATE,
    )
    return replace(hello, **fields)


def said(state: SecondaryState, message: m.Message, link: int = LINK) -> machine.Step:
    return step(state, machine.FromPeer(link, message))


def reply(message: m.Message) -> machine.Send:
    return machine.Send(LINK, message)


def hung_up(effects: tuple[machine.Effect, ...], code: RefusalCode) -> bool:
    return any(isinstance(effect, machine.CloseLink) and effect.code is code for effect in effects)


END = m.EpochEnd(number(8), 1, 512, 99, commit=False)
END_COMMIT = replace(END, commit=True)


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


# --- full sync -------------------------------------------------------------------------------------------------------


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


# --- epochs ----------------------------------------------------------------------------------------------------------


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


# --- failover --------------------------------------------------------------------------------------------------------


def ask(
    *checkpoints: int, last_committed: bool = False, force: bool = False, request: int = 1
) -> machine.FailoverRequested:
    return machine.FailoverRequested(request, tuple(map(number, checkpoints)), last_committed, force, TWO)


def refusal(state: SecondaryState, event: machine.FailoverRequested) -> QemuRemusError:
    after, effects = step(state, event)
    assert after == state
    (answer,) = effects
    assert isinstance(answer, machine.Answer)
    assert answer.error is not None
    return answer.error


def test_the_decision_is_saved_before_anything_else() -> None:
    state, effects = step(at(Phase.LISTENING), ask())
    assert effects == (machine.SaveFailover(Failover(number(7), TWO)),)
    state, effects = step(state, machine.FailoverSaved())
    assert effects == (machine.FinishFailover(Failover(number(7), TWO)),)
    state, effects = step(state, machine.Released())
    assert effects == (machine.Answer(1, checkpoint=number(7)),)
    assert (state.phase, state.generation, state.history) == (Phase.FAILED_OVER, TWO, ((ONE, 7),))


def test_without_a_complete_checkpoint_there_is_no_failover() -> None:
    assert isinstance(refusal(at(Phase.LISTENING, consistent=False, committed=None), ask()), NotConsistent)


def test_a_living_primary_is_not_taken_over_without_force() -> None:
    assert isinstance(refusal(at(Phase.IDLE), ask()), Refused)
    state, _ = step(at(Phase.IDLE), ask(force=True))
    assert state.failover == Failover(number(7), TWO)


def test_without_numbers_an_epoch_in_doubt_wants_an_answer() -> None:
    doubt = at(Phase.LISTENING, staged=number(8))
    assert isinstance(refusal(doubt, ask()), CommitInDoubt)
    state, _ = step(doubt, ask(last_committed=True))
    assert state.failover == Failover(number(7), TWO)


@pytest.mark.parametrize(("checkpoints", "target"), [((9, 8, 7), 8), ((10, 8), 10), ((7,), 7), ((12, 9, 7), 7)])
def test_the_newest_that_memory_and_disks_share_is_taken(checkpoints: tuple[int, ...], target: int) -> None:
    state, _ = step(at(Phase.LISTENING, staged=number(10), doubted=(number(8),)), ask(*checkpoints))
    assert state.failover == Failover(number(target), TWO)


def test_checkpoints_that_the_disks_do_not_have_are_refused() -> None:
    assert "7 (committed), 8 (staged)" in refusal(at(Phase.LISTENING, staged=number(8)), ask(9, 6)).safe


def test_epochs_behind_the_target_are_dropped_and_the_target_is_committed() -> None:
    failover = Failover(number(8), TWO)
    doubts = at(Phase.FAILING_OVER, staged=number(12), doubted=(number(8), number(10)), failover=failover)
    state, effects = step(doubts, machine.FailoverSaved())
    assert effects == (
        machine.AbortEpoch(number(10)),
        machine.AbortEpoch(number(12)),
        machine.CommitEpoch(number(8)),
    )
    assert step(state, machine.CommitDone(number(8)))[1] == (machine.FinishFailover(failover),)


def test_the_link_is_closed_once_the_decision_is_saved() -> None:
    state, _ = step(at(Phase.EPOCH), ask(force=True))
    state, effects = step(state, machine.FailoverSaved())
    assert effects[0] == machine.DropUnfinished()
    assert hung_up(effects, RefusalCode.FAILED_OVER)
    assert state.link is None


@pytest.mark.parametrize("message", [m.CommitEpoch(number(8)), END_COMMIT, m.AbortEpoch(number(8))])
def test_from_the_decision_on_the_primary_is_not_heard(message: m.Message) -> None:
    state, _ = step(at(Phase.STAGED), ask(7, force=True))
    assert said(state, message) == (state, ())


def test_a_primary_is_refused_from_the_decision_on() -> None:
    for state in (
        at(Phase.FAILING_OVER, failover=Failover(number(7), TWO)),
        at(
            Phase.FAILED_OVER, failover=Failover(number(7), TWO, done=True), generation=TWO, history=((ONE, number(7)),)
        ),
    ):
        assert hung_up(step(state, machine.HelloReceived(LINK, greeting()))[1], RefusalCode.FAILED_OVER)


def test_a_decision_that_could_not_be_saved_is_not_told_to_the_primary() -> None:
    # The primary would end for good, and a restart of this side might not know why.
    state, _ = step(at(Phase.IDLE), ask(force=True))
    state, effects = step(state, machine.StoreFailed(RefusalCode.STORAGE_FAILED, "EIO", lasting=True))
    assert hung_up(effects, RefusalCode.STORAGE_FAILED)
    assert isinstance(effects[-1], machine.Answer)
    assert isinstance(effects[-1].error, Refused)
    _, effects = step(state, machine.HelloReceived(6, greeting()))
    assert hung_up(effects, RefusalCode.STORAGE_FAILED)


def test_a_stuck_failover_goes_on_when_it_is_asked_for_again() -> None:
    failover = Failover(number(7), TWO)
    stuck = at(Phase.FAILING_OVER, failover=failover, askers=(1,))
    state, effects = step(stuck, machine.StoreFailed(RefusalCode.NO_SPACE, "full", lasting=False))
    assert [type(effect) for effect in effects] == [machine.Answer]
    state, effects = step(state, ask(7, request=2))
    assert effects == (machine.SaveFailover(failover),)
    assert not state.failed


def test_a_failover_found_after_a_crash_keeps_its_target_and_generation() -> None:
    failover = Failover(number(8), TWO)
    found = at(Phase.FAILING_OVER, staged=number(8), failover=failover)
    assert isinstance(refusal(found, ask(7)), Refused)
    again = replace(ask(), generation=Generation(UUID(int=3)))
    assert step(found, again)[1] == (machine.SaveFailover(failover),)


def test_everybody_who_asks_meanwhile_is_answered() -> None:
    state, _ = step(at(Phase.LISTENING), ask())
    state, effects = step(state, ask(7, request=2))
    assert effects == ()
    state, effects = step(state, machine.Released())
    assert effects == (machine.Answer(1, checkpoint=number(7)), machine.Answer(2, checkpoint=number(7)))


def test_a_finished_failover_answers_again() -> None:
    done = at(Phase.FAILED_OVER, failover=Failover(number(7), TWO, done=True), generation=TWO)
    assert step(done, ask(9, 7, request=3)) == (done, (machine.Answer(3, checkpoint=number(7)),))
    assert machine.hello(done).role is Role.PRIMARY
    assert machine.replication(done) is Replication.FAILED_OVER


# --- the toolstack on the backup -------------------------------------------------------------------------------------


def received(state: SecondaryState, epoch: int = 8) -> machine.Step:
    return step(state, machine.MemoryReceived(2, number(epoch)))


def refused_memory(state: SecondaryState, epoch: int = 8) -> type[QemuRemusError]:
    after, effects = received(state, epoch)
    assert after == state
    (answer,) = effects
    assert isinstance(answer, machine.Answer)
    assert answer.error is not None
    return type(answer.error)


def test_memory_that_is_there_first_commits_its_epoch_as_soon_as_it_is_staged() -> None:
    state, effects = received(at(Phase.EPOCH, highest=8))
    assert effects == (machine.Answer(2),)
    state, effects = said(state, END)
    assert effects == (machine.StageEpoch(END),)
    state, effects = step(state, machine.Staged(number(8)))
    assert effects == (reply(m.EpochStaged(number(8))), machine.CommitEpoch(number(8)))
    state, effects = step(state, machine.CommitDone(number(8)))
    assert effects == (reply(m.Committed(number(8))), machine.WakeApply())
    assert received(state)[1] == (machine.Answer(2, number(8)),)


def test_memory_that_comes_after_the_staging_commits_at_once() -> None:
    state, effects = received(at(Phase.STAGED, highest=8))
    assert effects == (machine.CommitEpoch(number(8)),)
    _, effects = step(state, machine.CommitDone(number(8)))
    assert effects == (reply(m.Committed(number(8))), machine.Answer(2, number(8)), machine.WakeApply())


def test_memory_commits_nothing_that_a_full_copy_is_about_to_replace() -> None:
    # The checkpoint would count for a moment, and be copied over although nobody has allowed that.
    state = at(Phase.STAGED, highest=8, may_sync=True)
    assert refused_memory(state) is Refused
    begun, _ = said(state, m.SyncBegin(TWO, DISKS))
    assert (begun.phase, begun.committed) == (Phase.SYNC, None)


def test_memory_commits_a_staged_epoch_without_the_primary() -> None:
    state, effects = received(at(Phase.LISTENING, staged=number(8), highest=8))
    assert effects == (machine.CommitEpoch(number(8)),)
    state, effects = step(state, machine.CommitDone(number(8)))
    assert effects == (machine.Answer(2, number(8)), machine.WakeApply())
    assert machine.hello(state).committed == 8


def test_memory_of_a_lost_epoch_is_to_be_dropped() -> None:
    noted, _ = received(at(Phase.EPOCH, highest=8))
    for lost in (
        said(noted, m.AbortEpoch(number(8)))[0],
        step(noted, machine.LinkDown(LINK, "cut"))[0],
        step(noted, machine.StoreFailed(RefusalCode.NO_SPACE, "full", lasting=False))[0],
    ):
        assert refused_memory(lost) is EpochLost


def test_an_aborted_epochs_memory_does_not_commit_a_later_one() -> None:
    state, _ = received(at(Phase.EPOCH, highest=8))
    state, _ = said(state, m.AbortEpoch(number(8)))
    state, _ = said(state, m.EpochBegin(number(10), number(7)))
    assert step(state, machine.Staged(number(10)))[1] == (reply(m.EpochStaged(number(10))),)


def test_memory_whose_commit_cannot_be_made_durable_is_in_doubt() -> None:
    state, _ = received(at(Phase.STAGED, highest=8))
    state, effects = step(state, machine.StoreFailed(RefusalCode.STORAGE_FAILED, "EIO", lasting=True))
    assert hung_up(effects, RefusalCode.STORAGE_FAILED)
    assert isinstance(effects[-1], machine.Answer)
    assert isinstance(effects[-1].error, CommitInDoubt)
    assert machine.in_doubt(state) == (8,)
    assert refused_memory(state) is Refused


def test_nothing_is_committed_by_memory_from_the_failovers_decision_on() -> None:
    deciding, _ = step(at(Phase.LISTENING, staged=number(8), highest=8), ask(7))
    done = at(Phase.FAILED_OVER, failover=Failover(number(7), TWO, done=True), generation=TWO)
    for state in (deciding, done):
        assert refused_memory(state, 8) is Refused
        assert refused_memory(state, 9) is Refused


def test_memory_older_than_the_commit_is_out_of_order() -> None:
    assert refused_memory(at(Phase.IDLE), 6) is OutOfOrder


def test_the_first_copys_epoch_is_failed_over_to_only_by_name() -> None:
    first: dict[str, Any] = {"committed": None, "applied": None, "consistent": False, "staged": number(1), "highest": 1}
    staged = at(Phase.LISTENING, **first)
    assert isinstance(refusal(staged, ask()), NotConsistent)
    assert isinstance(refusal(staged, ask(last_committed=True)), NotConsistent)
    assert isinstance(refusal(staged, ask(2)), NotConsistent)
    state, effects = step(staged, ask(2, 1))
    failover = Failover(number(1), TWO)
    assert effects == (machine.SaveFailover(failover),)
    state, effects = step(state, machine.FailoverSaved())
    assert effects == (machine.CommitEpoch(number(1)),)
    state, effects = step(state, machine.CommitDone(number(1)))
    assert effects == (machine.FinishFailover(failover),)
    state, effects = step(state, machine.Released())
    assert effects == (machine.Answer(1, checkpoint=number(1)),)
    assert machine.disk_state(state) is DiskState.UP_TO_DATE
    assert state.history == ((ONE, 1),)


def test_the_first_copys_epoch_is_committed_by_its_memory() -> None:
    state = at(Phase.STAGED, committed=None, applied=None, consistent=False, staged=number(1), highest=1)
    state, effects = received(state, 1)
    assert effects == (machine.CommitEpoch(number(1)),)
    state, _ = step(state, machine.CommitDone(number(1)))
    assert (state.committed, state.consistent) == (1, True)


# --- storage that fails, and works again -----------------------------------------------------------------------------

EIO = machine.StoreFailed(RefusalCode.STORAGE_FAILED, "EIO", lasting=True)
FULL = machine.ApplyFailed("the image is full")


def fed(state: SecondaryState, *events: machine.Event) -> tuple[SecondaryState, list[machine.Effect]]:
    effects: list[machine.Effect] = []
    for event in events:
        state, more = step(state, event)
        effects += more
    return state, effects


def test_an_image_that_cannot_be_written_is_tried_again_with_growing_patience() -> None:
    state, effects = fed(at(Phase.IDLE, applied=number(6)), FULL, machine.RetryDue(), FULL, machine.RetryDue())
    assert [effect for effect in effects if not isinstance(effect, machine.CloseLink)] == [
        machine.ScheduleRetry(1),
        machine.WakeApply(),
        machine.ScheduleRetry(2),
        machine.WakeApply(),
    ]
    assert hung_up(tuple(effects), RefusalCode.STORAGE_FAILED)
    assert machine.disk_state(state) is DiskState.FAILED
    refused, said_no = step(state, machine.HelloReceived(LINK, greeting()))
    assert refused.link is None
    assert hung_up(said_no, RefusalCode.STORAGE_FAILED)


def test_an_image_that_can_be_written_again_lets_the_primary_in() -> None:
    state, effects = fed(at(Phase.IDLE, applied=number(6)), FULL, machine.RetryDue(3), machine.Applied(number(7)))
    assert effects[-1] == machine.Answer(3, number(7))
    assert machine.disk_state(state) is DiskState.CONSISTENT
    assert state.repairs == 0
    state, _ = step(state, machine.HelloReceived(LINK, greeting()))
    assert state.link == LINK


def test_who_asks_for_another_attempt_hears_that_it_failed() -> None:
    _, effects = fed(at(Phase.IDLE, applied=number(6)), FULL, machine.RetryDue(3), FULL)
    (told,) = [effect for effect in effects if isinstance(effect, machine.Answer)]
    assert told.request == 3
    assert "the image is full" in str(told.error)


def test_storage_that_works_needs_no_other_attempt() -> None:
    state = at(Phase.IDLE)
    assert step(state, machine.RetryDue(3)) == (state, (machine.Answer(3, number(7)),))
    assert step(state, machine.RetryDue()) == (state, ())


def test_a_store_that_may_hold_anything_is_opened_again_and_believed() -> None:
    # Whether the commit reached the device was not known: it did.
    state, effects = fed(at(Phase.STAGED), EIO, machine.RetryDue())
    assert effects[-1] == machine.ReopenStore()
    found = at(Phase.LISTENING, committed=number(8), applied=number(8), staged=None, highest=8)
    state, effects = fed(state, machine.Reopened(found))
    assert effects == [machine.WakeApply()]
    assert (state.committed, state.staged, state.failed, state.poisoned) == (number(8), None, False, False)
    state, _ = step(state, machine.HelloReceived(LINK, greeting()))
    assert state.link == LINK


def test_a_store_that_was_opened_again_counts_as_good_once_its_images_are() -> None:
    state, _ = fed(at(Phase.STAGED), EIO, machine.RetryDue(3))
    found = at(Phase.LISTENING, committed=number(8), applied=number(7), staged=None, highest=8)
    state, effects = fed(state, machine.Reopened(found))
    assert effects == [machine.WakeApply()]
    assert state.failed
    state, effects = fed(state, machine.Applied(number(8)))
    assert effects == [machine.Answer(3, number(8))]
    assert not state.failed


def test_a_store_that_cannot_be_opened_is_tried_again() -> None:
    state, effects = fed(at(Phase.STAGED), EIO, machine.RetryDue(3), EIO)
    assert effects[-1] == machine.ScheduleRetry(2)
    (told,) = [effect for effect in effects if isinstance(effect, machine.Answer)]
    assert told.error is not None
    assert state.poisoned


def test_an_epoch_in_doubt_survives_the_stores_reopening() -> None:
    state, _ = fed(at(Phase.STAGED), EIO, machine.RetryDue())
    state, _ = fed(state, machine.Reopened(at(Phase.LISTENING, staged=number(8), highest=8)))
    assert machine.in_doubt(state) == (8,)


def test_a_full_copy_whose_beginning_is_in_doubt_is_found_out() -> None:
    state, _ = fed(
        at(Phase.IDLE, may_sync=True), machine.FromPeer(LINK, m.SyncBegin(TWO, DISKS)), EIO, machine.RetryDue()
    )
    assert state.generation == ONE
    begun = at(Phase.LISTENING, generation=TWO, committed=None, applied=None, consistent=False, highest=0)
    state, _ = fed(state, machine.Reopened(begun))
    assert (state.generation, state.consistent, state.highest, state.failed) == (TWO, False, 0, False)


def test_a_failover_first_finds_out_what_the_store_holds() -> None:
    state, _ = fed(at(Phase.STAGED), EIO)
    request = machine.FailoverRequested(1, (), last_committed=False, force=False, generation=TWO)
    state, effects = fed(state, request)
    assert effects == [machine.ReopenStore()]
    assert state.failover is None
    found = at(Phase.LISTENING, committed=number(8), applied=number(7), staged=None, highest=8)
    state, effects = fed(state, machine.Reopened(found))
    assert effects == [machine.SaveFailover(Failover(number(8), TWO))]


def test_a_failover_of_a_store_that_cannot_be_opened_is_refused_and_may_be_repeated() -> None:
    request = machine.FailoverRequested(1, (), last_committed=False, force=False, generation=TWO)
    state, effects = fed(at(Phase.STAGED), EIO, request, EIO)
    (told,) = [effect for effect in effects if isinstance(effect, machine.Answer)]
    assert isinstance(told.error, Refused)
    assert state.failover is None
    _, effects = fed(state, request)
    assert effects == [machine.ReopenStore()]


def test_a_failover_that_met_a_poisoned_store_goes_on_behind_its_reopening() -> None:
    request = machine.FailoverRequested(1, (), last_committed=False, force=False, generation=TWO)
    state, effects = fed(at(Phase.LISTENING), request, machine.FailoverSaved(), EIO, machine.RetryDue(3))
    assert isinstance(effects[-1], machine.Answer)
    assert not any(isinstance(effect, machine.ScheduleRetry) for effect in effects)
    state, effects = fed(state, replace(request, request=2))
    assert effects == [machine.ReopenStore()]
    _, effects = fed(state, machine.Reopened(at(Phase.FAILING_OVER)))
    assert effects == [machine.SaveFailover(Failover(number(7), TWO))]


# --- a planned switch-over -------------------------------------------------------------------------------------------

HAND_OVER = m.HandOver(number(7), TWO)


def test_a_handover_is_decided_durably_finished_and_only_then_answered() -> None:
    state, effects = said(at(Phase.IDLE), HAND_OVER)
    assert effects == (machine.SaveFailover(Failover(number(7), TWO)),)
    state, effects = step(state, machine.FailoverSaved())
    assert effects == (machine.FinishFailover(Failover(number(7), TWO)),)
    state, effects = step(state, machine.Released())
    assert effects[0] == reply(m.HandedOver(number(7), TWO))
    assert hung_up(effects, RefusalCode.FAILED_OVER)
    assert (state.phase, state.generation, state.link) == (Phase.FAILED_OVER, TWO, None)
    assert state.history[-1] == (ONE, number(7))


@pytest.mark.parametrize(
    "state",
    [
        at(Phase.IDLE, committed=number(6)),
        at(Phase.EPOCH),
        at(Phase.STAGED),
        at(Phase.IDLE, failed=True, reason="the disk is broken"),
        at(Phase.SYNC),
    ],
)
def test_a_handover_that_does_not_fit_is_refused_and_nothing_is_decided(state: SecondaryState) -> None:
    unchanged, effects = said(state, HAND_OVER)
    assert unchanged == state
    (refused,) = effects
    assert isinstance(refused, machine.Send)
    assert isinstance(refused.message, m.HandoverRefused)


def test_a_handover_of_an_older_link_is_dropped() -> None:
    state, _ = step(at(Phase.IDLE), machine.HelloReceived(6, greeting()))
    assert said(state, HAND_OVER) == (state, ())


def test_a_handover_that_may_be_durable_is_not_denied_in_the_next_hello() -> None:
    state, _ = said(at(Phase.IDLE), HAND_OVER)
    state, effects = step(state, machine.StoreFailed(RefusalCode.STORAGE_FAILED, "the disk is broken", lasting=True))
    assert hung_up(effects, RefusalCode.STORAGE_FAILED)
    assert machine.hello(state).disk_state is DiskState.FAILED


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
