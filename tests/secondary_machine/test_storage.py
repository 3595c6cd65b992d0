"""What the secondary's machine decides when its storage fails, and when it works again."""

from __future__ import annotations

from dataclasses import replace

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_machine as machine
from qemu_remus.core.errors import RefusalCode, Refused
from qemu_remus.core.model import DiskState
from qemu_remus.core.secondary_machine import Failover, Phase, SecondaryState, step
from tests.secondary_machine.states import DISKS, LINK, ONE, TWO, at, greeting, hung_up, number

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
