"""What the secondary's machine decides where the toolstack on the backup has the memory of an epoch."""

from __future__ import annotations

from typing import Any

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
from qemu_remus.core.model import DiskState
from qemu_remus.core.secondary_machine import Failover, Phase, SecondaryState, step
from tests.secondary_machine.states import DISKS, END, LINK, ONE, TWO, ask, at, hung_up, number, refusal, reply, said


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
