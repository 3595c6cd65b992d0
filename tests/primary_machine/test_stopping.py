"""How the primary's machine stops, and what it tells of itself."""

from __future__ import annotations

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.errors import InternalError
from qemu_remus.core.model import Base, EpochNumber, Generation, Replication
from qemu_remus.core.primary_machine import Opened, Phase, step
from tests.primary_machine.states import BACK, ONE, TWO, at, ended, first_sync, live, merge_of, merged

# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.WAITING, Phase.IDLE, Phase.SYNC_BEGIN, Phase.SYNC_FLUSH])
def test_it_stops_at_once_where_nothing_is_under_way(phase: Phase) -> None:
    state, effects = step(at(phase), machine.StopRequested())
    assert state.phase is Phase.STOPPED
    assert effects[-1] == machine.Stop()
    assert isinstance(effects[0], machine.Disconnect) == at(phase).linked


@pytest.mark.parametrize("phase", [Phase.ADOPTING, Phase.RENEWING, Phase.CAPTURE, Phase.TRANSFER, Phase.STAGE])
def test_what_is_under_way_is_finished_first(phase: Phase) -> None:
    state, effects = step(at(phase), machine.StopRequested())
    assert (state.phase, effects) == (phase, ())


def test_a_committed_epoch_is_the_last_one_of_a_stopping_primary() -> None:
    state, _ = step(at(Phase.STAGE), machine.StopRequested())
    state, _ = step(state, machine.FromPeer(m.Committed(EpochNumber(8))))
    state, effects = step(state, machine.BitmapRemoved())
    assert state.phase is Phase.STOPPED
    assert isinstance(effects[0], machine.Disconnect)


def test_a_copy_is_cut_short() -> None:
    state, effects = step(at(Phase.SYNC_COPY), machine.StopRequested())
    assert effects == (machine.CancelWork(),)
    state, effects = step(state, machine.WorkFailed("cancelled"))
    assert state.phase is Phase.STOPPED
    assert isinstance(effects[0], machine.Disconnect)


def test_a_staged_epoch_is_left_to_the_toolstack() -> None:
    # Its memory may be complete on the backup, and the older one dropped: no abort.
    assert step(at(Phase.STAGED), machine.StopRequested())[1] == (machine.SaveState(), BACK)
    late = step(at(Phase.STAGE, one_step=False, stopping=True), machine.FromPeer(m.EpochStaged(EpochNumber(8))))
    assert late[1] == (machine.SaveState(), BACK)


@pytest.mark.parametrize("phase", [Phase.STAGE, Phase.COMMIT])
def test_an_answer_that_does_not_come_does_not_hold_it_up(phase: Phase) -> None:
    state, _ = step(at(phase), machine.StopRequested())
    state, effects = step(state, machine.StopDeadline())
    assert merge_of(effects) == BACK
    assert step(state, merged(7, 10, ended(7, 8), live(8, 9)))[0].phase is Phase.STOPPED


def test_a_first_commit_in_doubt_keeps_its_base_when_it_has_to_stop() -> None:
    state, _ = step(first_sync(Phase.STAGE), machine.StopRequested())
    assert not merge_of(step(state, machine.StopDeadline())[1]).complete


def test_a_deadline_that_passed_during_the_transfer_is_remembered() -> None:
    state, effects = step(at(Phase.TRANSFER, stopping=True), machine.StopDeadline())
    assert effects == (machine.CancelWork(),)
    _, effects = step(state, machine.Transferred(Opened(1, 1, 1)))
    assert effects == (machine.Send(m.AbortEpoch(EpochNumber(8))), machine.SaveState(), merge_of(effects))


def test_a_deadline_that_passed_during_the_capture_is_remembered() -> None:
    state, _ = step(at(Phase.CAPTURE, stopping=True), machine.StopDeadline())
    assert merge_of(step(state, machine.Captured())[1]) == BACK


def test_a_stopped_machine_does_nothing_more() -> None:
    stopped = at(Phase.STOPPED)
    assert step(stopped, machine.LinkDown("cut")) == (stopped, ())


@pytest.mark.parametrize(
    "event",
    [
        machine.Captured(),
        machine.Transferred(Opened()),
        machine.SyncCopied(),
        machine.BitmapRemoved(),
        machine.CopiedAhead(Opened()),
    ],
)
def test_work_that_nobody_ordered_is_a_defect(event: machine.Event) -> None:
    with pytest.raises(InternalError):
        step(at(Phase.IDLE), event)


# --- hello and reports -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("generation", "base"), [(ONE, EpochNumber(7)), (TWO, None)])
def test_the_hello_names_a_base_only_of_its_own_generation(generation: Generation, base: Base) -> None:
    hello = machine.hello(at(Phase.WAITING, generation=generation))
    assert [disk.base for disk in hello.disks] == [base, base]


def test_a_primary_that_has_never_committed_is_not_degraded_but_off() -> None:
    assert machine.replication(at(Phase.WAITING, committed=None)) is Replication.OFF
    assert machine.replication(at(Phase.WAITING)) is Replication.DEGRADED


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.CAPTURE, Phase.TRANSFER, Phase.STAGE, Phase.COMMIT, Phase.RETIRE])
def test_with_a_qemu_that_does_not_answer_nothing_is_protected_until_it_does(phase: Phase) -> None:
    silent, effects = step(at(phase, reason=""), machine.QemuSilent("no reply"))
    assert (silent.phase, effects) == (phase, ())
    assert (machine.replication(silent), machine.reason(silent)) == (Replication.DEGRADED, "no reply")
    heard, effects = step(silent, machine.QemuSilent(""))
    assert effects == ()
    assert (machine.replication(heard), machine.reason(heard)) == (Replication.PROTECTED, "")


def test_what_ended_the_controller_is_said_rather_than_that_qemu_is_silent() -> None:
    silent, _ = step(at(Phase.MERGE), machine.QemuSilent("no reply"))
    ended, _ = step(silent, machine.WorkFailed("it was not sent"))
    assert (machine.replication(ended), machine.reason(ended)) == (Replication.OFF, "it was not sent")
