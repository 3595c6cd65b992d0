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
from qemu_remus.core.errors import CommitInDoubt, ControlError, NotConsistent, RefusalCode, Refused
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
    assert effects == (machine.FlushImages(), reply(m.SyncFlushed(1)))
    assert said(state, m.EpochBegin(number(1), None))[1] == (machine.BeginEpoch(number(1), None),)


def test_a_flush_that_fails_ends_the_link() -> None:
    state, _ = said(at(Phase.SYNC), m.SyncFlush(1))
    state, effects = step(state, machine.StoreFailed(RefusalCode.STORAGE_FAILED, "EIO", lasting=True))
    assert hung_up(effects, RefusalCode.STORAGE_FAILED)
    assert not state.flushed


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
    assert effects == (machine.AbortEpoch(number(8)), aborted)
    assert (state.phase, state.staged) == (Phase.IDLE, None)
    assert said(at(Phase.IDLE), m.AbortEpoch(number(8)))[1] == (aborted,)


def test_a_committed_epoch_cannot_be_aborted() -> None:
    assert hung_up(said(at(Phase.IDLE), m.AbortEpoch(number(7)))[1], RefusalCode.PROTOCOL)


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
    assert [type(effect) for effect in effects] == [machine.CloseLink]
    assert machine.in_doubt(state) == (8,)


def test_an_image_that_cannot_be_written_ends_the_link() -> None:
    state, effects = step(at(Phase.IDLE), machine.ApplyFailed("EIO"))
    assert hung_up(effects, RefusalCode.STORAGE_FAILED)
    assert machine.replication(state) is Replication.DEGRADED


@pytest.mark.parametrize(("epoch", "applied"), [(8, 8), (5, 6), (11, 6)])
def test_what_is_applied_never_goes_back_nor_past_the_commit(epoch: int, applied: int) -> None:
    state, _ = step(at(Phase.IDLE, applied=number(6), committed=number(8)), machine.Applied(number(epoch)))
    assert state.applied == applied


def test_messages_that_only_a_secondary_sends_are_a_breach() -> None:
    assert hung_up(said(at(Phase.IDLE), m.Committed(number(7)))[1], RefusalCode.PROTOCOL)


# --- failover --------------------------------------------------------------------------------------------------------


def ask(
    *checkpoints: int, last_committed: bool = False, force: bool = False, request: int = 1
) -> machine.FailoverRequested:
    return machine.FailoverRequested(request, tuple(map(number, checkpoints)), last_committed, force, TWO)


def refusal(state: SecondaryState, event: machine.FailoverRequested) -> ControlError:
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
