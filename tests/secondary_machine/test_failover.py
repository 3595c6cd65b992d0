"""What the secondary's machine decides in a failover, and in a planned switch-over."""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_machine as machine
from qemu_remus.core.errors import CommitInDoubt, NotConsistent, RefusalCode, Refused
from qemu_remus.core.model import DiskState, Generation, Replication, Role
from qemu_remus.core.secondary_machine import Failover, Phase, SecondaryState, step
from tests.secondary_machine.states import (
    END_COMMIT,
    LINK,
    ONE,
    TWO,
    ask,
    at,
    greeting,
    hung_up,
    number,
    refusal,
    reply,
    said,
)

# --- failover --------------------------------------------------------------------------------------------------------


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
