"""What the toolstack's commands are answered where they cross other things, one sequence a test."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as primary
from qemu_remus.core.errors import (
    CommitInDoubt,
    EpochLost,
    NotProtected,
    OutOfOrder,
    QemuRemusError,
    RefusalCode,
    TimedOut,
)
from qemu_remus.core.model import DiskState, EpochNumber
from qemu_remus.core.primary_machine import Phase
from qemu_remus.core.toolstack_machine import (
    Ended,
    Fate,
    Kind,
    Reply,
    Request,
    Standing,
    TimeUp,
    ToolstackState,
    standing,
    step,
)
from tests.primary_machine.states import first_sync, recording
from tests.toolstack_machine.situations import (
    ABORT,
    ABORTED,
    CAPTURED,
    COMMIT,
    COMMITTED,
    CUT,
    FAILED,
    MERGED,
    REMOVED,
    SENT,
    STAGED,
    STARTED,
    TO_STAGE,
    TO_STAGED,
    TO_TRANSFER,
    N,
    Story,
    after,
    asked,
    back,
    cell,
    played,
    replies,
    toolstack,
)

FINISH: Final = asked(Kind.FINISH, 96)
PREPARE: Final = asked(Kind.PREPARE, 95)


def ended(effects: tuple[object, ...]) -> list[Ended]:
    return [effect for effect in effects if isinstance(effect, Ended)]


def test_a_whole_checkpoint_is_answered_step_by_step() -> None:
    state, effects = played(toolstack(), PREPARE)
    assert replies(effects) == {PREPARE.number: None}
    state, effects = played(state, STARTED, CAPTURED)
    assert replies(effects) == {STARTED.number: N}
    state, effects = played(state, SENT, FINISH)
    assert replies(effects) == {}
    state, effects = step(state, STAGED)
    assert replies(effects) == {FINISH.number: N}
    assert ended(effects) == [Ended(N, Fate.STAGED)]
    state, effects = step(state, COMMIT)
    assert effects == (primary.Send(m.CommitEpoch(N)),)
    state, effects = step(state, COMMITTED)
    assert replies(effects) == {COMMIT.number: N}
    assert ended(effects) == [Ended(N, Fate.COMMITTED)]
    assert state.waiting == ()


def test_the_paused_vm_is_answered_before_anything_else_is_done() -> None:
    _, effects = played(toolstack(), STARTED, CAPTURED)
    assert effects[0] == Reply(STARTED.number, N)
    assert any(isinstance(effect, primary.Transfer) for effect in effects[1:])


# ... a commit whose answer was lost


IN_DOUBT: Final = (*TO_STAGED, COMMIT, CUT)


def test_a_lost_link_answers_no_commit() -> None:
    state, effects = played(toolstack(), *IN_DOUBT)
    assert replies(effects) == {}
    state, effects = played(state, MERGED)
    assert replies(effects) == {}
    assert [request.number for request in state.waiting] == [COMMIT.number]


def test_a_commit_is_done_where_the_secondary_comes_back_with_it() -> None:
    _, effects = played(toolstack(), *IN_DOUBT, MERGED, back(committed=N))
    assert replies(effects) == {COMMIT.number: N}
    assert ended(effects) == [Ended(N, Fate.COMMITTED)]


def test_a_commit_is_sent_again_where_the_secondary_comes_back_with_it_staged() -> None:
    state, effects = played(toolstack(), *IN_DOUBT, MERGED, back(staged=N))
    assert replies(effects) == {}
    assert primary.Send(m.CommitEpoch(N)) in effects
    _, effects = step(state, COMMITTED)
    assert replies(effects) == {COMMIT.number: N}


def test_a_commit_ends_as_lost_where_the_secondary_comes_back_without_it() -> None:
    state, effects = played(toolstack(), *IN_DOUBT, MERGED, back())
    assert replies(effects) == {COMMIT.number: EpochLost}
    (lost,) = ended(effects)
    assert (lost.epoch, lost.fate) == (N, Fate.LOST)
    assert cell(state, Kind.COMMIT) == "EpochLost"


def test_a_commit_that_is_lost_twice_is_still_the_same_commit() -> None:
    state, _ = played(toolstack(), *IN_DOUBT, MERGED, back(staged=N), CUT)
    assert cell(state, Kind.ABORT) == "CommitInDoubt"
    _, effects = played(state, back(committed=N))
    assert replies(effects) == {COMMIT.number: N}


def test_a_commit_asked_for_without_a_link_is_sent_with_the_next() -> None:
    state, effects = played(toolstack(), *TO_STAGED, CUT, MERGED, COMMIT)
    assert (replies(effects), effects) == ({}, ())
    _, effects = played(state, back(staged=N))
    assert primary.Send(m.CommitEpoch(N)) in effects


def test_a_commit_found_by_a_restarted_controller_is_answered_from_the_secondary() -> None:
    # The new controller knows nothing of epoch 8 but that there was one.
    fresh = toolstack(Phase.WAITING, highest=9, recording=recording(7, 9))
    state, effects = played(fresh, COMMIT)
    assert replies(effects) == {}
    assert replies(played(state, back(committed=N))[1]) == {COMMIT.number: N}
    assert replies(played(state, back(highest_epoch=9))[1]) == {COMMIT.number: EpochLost}
    assert replies(played(state, back(staged=N), COMMITTED)[1]) == {COMMIT.number: N}


def test_a_commit_in_doubt_is_never_called_not_begun_by_a_controller_that_has_yet_to_look() -> None:
    # What it has saved is older than epoch 8; QEMU's bitmaps know better.
    state, effects = played(toolstack(Phase.STARTING, highest=7, recording=None), COMMIT)
    assert replies(effects) == {}
    found = primary.Attached(((primary.Found(recording(7, 8), live=False), primary.Found(recording(8, 9))),) * 2)
    state, effects = played(state, found, MERGED)
    assert replies(effects) == {}
    assert replies(played(state, back(committed=N))[1]) == {COMMIT.number: N}


def test_the_first_copy_is_committed_behind_a_new_link() -> None:
    first = ToolstackState(first_sync(Phase.STAGED, one_step=False, staged=EpochNumber(1)))
    commit = asked(Kind.COMMIT, 98, 1)
    state, _ = played(first, commit, CUT, MERGED)
    inconsistent = DiskState.INCONSISTENT
    one = EpochNumber(1)
    state, effects = played(state, back(committed=None, staged=one, highest_epoch=one, disk_state=inconsistent))
    assert primary.Send(m.CommitEpoch(EpochNumber(1))) in effects
    state, effects = played(state, primary.FromPeer(m.Committed(EpochNumber(1))))
    assert replies(effects) == {98: 1}
    assert state.primary.phase is Phase.IDLE


# ... an epoch that may be staged


MAYBE: Final = (*TO_STAGE, FINISH, CUT)


def test_finish_does_not_call_staged_what_nobody_has_confirmed() -> None:
    state, effects = played(toolstack(), *MAYBE)
    assert replies(effects) == {}
    assert standing(state, N) is Standing.PERHAPS
    assert replies(played(state, MERGED)[1]) == {}


@pytest.mark.parametrize(
    ("link", "answer"), [(back(staged=N), N), (back(committed=N), N), (back(), EpochLost)], ids=["staged", "done", "no"]
)
def test_finish_is_answered_by_what_the_secondary_comes_back_with(link: Story, answer: object) -> None:
    assert replies(played(toolstack(), *MAYBE, MERGED, link)[1]) == {FINISH.number: answer}


def test_finish_of_an_epoch_whose_transfer_failed_is_lost_with_the_reason() -> None:
    _, effects = played(toolstack(), *TO_TRANSFER, FINISH, FAILED)
    assert replies(effects) == {FINISH.number: EpochLost}
    (error,) = (effect.error for effect in effects if isinstance(effect, Reply))
    assert error is not None
    assert "the fleece is full" in str(error)
    assert ended(effects) == [Ended(N, Fate.LOST, "the fleece is full")]


def test_finish_of_an_epoch_that_the_secondary_refuses_is_lost() -> None:
    refused = primary.FromPeer(m.EpochRefused(N, RefusalCode.NO_SPACE, "the journal is full"))
    assert replies(played(toolstack(), *TO_STAGE, FINISH, refused)[1]) == {FINISH.number: EpochLost}


def test_an_abort_answers_the_finish_that_waits() -> None:
    _, effects = played(toolstack(), *TO_STAGE, FINISH, ABORT)
    assert replies(effects) == {FINISH.number: OutOfOrder}


# ... an abort


def test_an_abort_that_the_backups_toolstack_overtook_finds_the_epoch_committed() -> None:
    state, effects = played(toolstack(), *TO_STAGED, ABORT, COMMITTED)
    assert replies(effects) == {ABORT.number: OutOfOrder}
    assert ended(effects) == [Ended(N, Fate.COMMITTED)]
    assert primary.RemoveBitmaps((recording(7, 8),)) in effects
    assert cell(state, Kind.COMMIT) == "done"


def test_an_abort_in_doubt_that_was_overtaken_finds_the_epoch_committed() -> None:
    _, effects = played(toolstack(), *TO_STAGED, ABORT, CUT, MERGED, back(staged=N), COMMITTED)
    assert replies(effects) == {ABORT.number: OutOfOrder}
    assert ended(effects) == [Ended(N, Fate.COMMITTED)]


def test_an_abort_is_carried_out_behind_the_next_link() -> None:
    state, effects = played(toolstack(), *TO_STAGED, ABORT, CUT, MERGED, back(staged=N))
    assert (replies(effects), primary.Send(m.AbortEpoch(N)) in effects) == ({}, True)
    _, effects = step(state, ABORTED)
    assert replies(effects) == {ABORT.number: N}
    assert ended(effects) == [Ended(N, Fate.ABORTED)]


def test_an_abort_while_capturing_waits_for_the_capture() -> None:
    state, effects = played(toolstack(), STARTED, ABORT)
    assert (replies(effects), effects) == ({}, ())
    state, effects = step(state, CAPTURED)
    assert replies(effects) == {STARTED.number: N}
    assert primary.CancelWork() in effects
    _, effects = step(state, FAILED)
    assert replies(effects) == {ABORT.number: N}


def test_a_staged_epoch_that_the_backup_commits_by_itself_answers_whoever_waits() -> None:
    _, effects = played(toolstack(), *TO_STAGE, FINISH, COMMITTED)
    assert replies(effects) == {FINISH.number: N}


# ... time-outs


Timed = tuple[
    str,
    tuple[Story, ...],
    Request,
    type[QemuRemusError],
    tuple[Story, ...],
    EpochNumber | type[QemuRemusError] | None,
]
TIMED: Final[list[Timed]] = [
    # what happens, the command that is late, its error, what happens then, its repetition's answer
    ("prepare", TO_TRANSFER, PREPARE, TimedOut, (SENT,), None),
    ("finish", TO_TRANSFER, FINISH, TimedOut, (SENT, STAGED), N),
    ("finish, link lost", (*TO_STAGE, CUT), FINISH, CommitInDoubt, (MERGED, back(staged=N)), N),
    ("commit", TO_STAGED, COMMIT, CommitInDoubt, (COMMITTED,), N),
    ("commit, link lost", (*TO_STAGED, CUT), COMMIT, CommitInDoubt, (MERGED, back(staged=N), COMMITTED), N),
    ("commit, not there", (*TO_STAGED, CUT), COMMIT, CommitInDoubt, (MERGED, back()), EpochLost),
    ("abort", TO_STAGED, ABORT, CommitInDoubt, (ABORTED,), N),
]


@pytest.mark.parametrize(
    ("before", "late", "error", "then", "again"), [row[1:] for row in TIMED], ids=[row[0] for row in TIMED]
)
def test_what_was_late_goes_on_and_can_be_repeated(
    before: tuple[Story, ...],
    late: Request,
    error: type[QemuRemusError],
    then: tuple[Story, ...],
    again: EpochNumber | type[QemuRemusError] | None,
) -> None:
    waiting = after(*before, late)
    state, effects = step(waiting, TimeUp(late.number))
    assert replies(effects) == {late.number: error}
    assert len(effects) == 1
    assert state == replace(waiting, waiting=())
    state, effects = played(state, *then)
    assert late.number not in replies(effects)
    assert replies(step(state, late)[1]) == {late.number: again}


def test_a_repetition_while_it_still_goes_on_waits_with_it() -> None:
    late = after(*TO_STAGED, COMMIT, TimeUp(COMMIT.number))
    state, effects = step(late, asked(Kind.COMMIT, 50))
    assert (replies(effects), effects) == ({}, ())
    assert replies(step(state, COMMITTED)[1]) == {50: N}


def test_a_time_that_is_up_after_the_answer_changes_nothing() -> None:
    state = after(*TO_STAGED, COMMIT, COMMITTED)
    assert step(state, TimeUp(COMMIT.number)) == (state, ())


def test_an_epoch_begun_by_a_late_start_is_aborted() -> None:
    state, effects = played(toolstack(), STARTED, TimeUp(STARTED.number))
    assert replies(effects) == {STARTED.number: TimedOut}
    state, effects = step(state, CAPTURED)
    assert primary.CancelWork() in effects
    assert STARTED.number not in replies(effects)
    state, effects = step(state, FAILED)
    assert ended(effects) == [Ended(N, Fate.ABORTED)]
    assert state.waiting == ()
    state, _ = played(state, MERGED)
    assert cell(state, Kind.START) == "acts, waits"


def test_a_late_start_whose_capture_fails_leaves_nothing_behind() -> None:
    state, _ = played(toolstack(), STARTED, TimeUp(STARTED.number), FAILED, MERGED)
    assert state.waiting == ()
    assert cell(state, Kind.START) == "acts, waits"


def test_a_start_that_is_late_before_it_began_begins_nothing() -> None:
    state, _ = played(toolstack(), *TO_TRANSFER, FAILED, asked(Kind.START, 50), TimeUp(50))
    state, effects = played(state, MERGED)
    assert state.primary.phase is Phase.IDLE
    assert effects == ()


# ... what has to wait its turn


@pytest.mark.parametrize(
    ("busy", "end"),
    [
        ((*TO_STAGED, COMMIT, COMMITTED), REMOVED),
        ((*TO_TRANSFER, FAILED), MERGED),
        ((*TO_STAGED, ABORT, ABORTED), MERGED),
    ],
    ids=["retire", "merge", "abort"],
)
def test_prepare_and_start_wait_for_the_last_epochs_remains(busy: tuple[Story, ...], end: Story) -> None:
    state, effects = played(toolstack(), *busy, PREPARE)
    assert replies(effects) == {}
    assert replies(played(state, end)[1]) == {PREPARE.number: None}
    state = after(asked(Kind.START, 50), of=after(*busy))
    state, effects = played(state, end)
    assert any(isinstance(effect, primary.Capture) for effect in effects)
    following = state.primary.finished
    assert following is not None
    assert replies(step(state, CAPTURED)[1]) == {50: following.epoch}


def test_a_second_start_is_refused_while_one_waits() -> None:
    state = after(*TO_TRANSFER, FAILED, asked(Kind.START, 50))
    after_it, effects = step(state, asked(Kind.START, 51))
    assert after_it == state
    assert replies(effects) == {51: OutOfOrder}


def test_start_names_the_epoch_in_doubt_that_it_waits_for() -> None:
    state = after(*TO_STAGED, CUT, MERGED, back(staged=N))
    _, (reply,) = step(state, asked(Kind.START))
    assert isinstance(reply, Reply)
    assert isinstance(reply.error, OutOfOrder)
    assert "epoch 8 is not committed" in reply.error.what


def test_an_epoch_in_doubt_that_is_decided_lets_the_next_one_begin() -> None:
    doubted = after(*TO_STAGED, CUT, MERGED, back(staged=N))
    assert cell(after(COMMIT, COMMITTED, of=doubted), Kind.START) == "acts, waits"
    assert cell(after(ABORT, ABORTED, of=doubted), Kind.START) == "acts, waits"
    state = after(ABORT, asked(Kind.START, 50), of=doubted)
    assert any(isinstance(effect, primary.Capture) for effect in step(state, ABORTED)[1])


def test_a_vm_that_is_not_paused_is_reported_and_its_number_goes_to_the_next() -> None:
    state, effects = played(toolstack(), STARTED, primary.NotCaptured("the VM runs"))
    assert replies(effects) == {STARTED.number: OutOfOrder}
    assert (state.primary.phase, state.primary.recording, state.waiting) == (Phase.IDLE, recording(7, 8), ())
    assert replies(played(state, STARTED, CAPTURED)[1]) == {STARTED.number: N}


def test_a_link_lost_while_the_vm_is_paused_answers_at_the_end_of_the_capture() -> None:
    state, effects = played(toolstack(), STARTED, CUT)
    assert replies(effects) == {}
    assert replies(step(state, CAPTURED)[1]) == {STARTED.number: EpochLost}


# ... the end of the controller


def test_whoever_waits_when_the_controller_ends_is_answered() -> None:
    undecided = after(*TO_STAGED, CUT, MERGED, COMMIT, FINISH)
    _, effects = step(undecided, primary.StopRequested())
    assert replies(effects) == {COMMIT.number: CommitInDoubt}
    perhaps = after(*MAYBE, MERGED)
    assert replies(step(perhaps, primary.StopRequested())[1]) == {FINISH.number: CommitInDoubt}
    fatal = primary.WorkFailed("the bitmaps are in doubt", fatal=True)
    assert replies(step(after(STARTED), fatal)[1]) == {STARTED.number: EpochLost}
    assert replies(step(after(*TO_TRANSFER, PREPARE), fatal)[1]) == {PREPARE.number: NotProtected}


def test_a_commit_under_way_is_finished_by_a_stopping_controller() -> None:
    _, effects = played(toolstack(), *TO_STAGED, COMMIT, primary.StopRequested(), COMMITTED)
    assert replies(effects) == {COMMIT.number: N}


def test_nothing_is_left_to_do_behind_the_end() -> None:
    doubted = after(*TO_STAGED, CUT, MERGED, back(staged=N))
    _, effects = played(doubted, COMMIT, primary.StopRequested(), COMMITTED)
    assert ended(effects) == [Ended(N, Fate.COMMITTED)]
    assert isinstance(effects[-1], primary.Stop)


def test_prepare_ends_with_the_protection() -> None:
    _, effects = played(toolstack(), *TO_TRANSFER, PREPARE, CUT)
    assert replies(effects) == {PREPARE.number: NotProtected}


def test_the_ends_of_old_epochs_are_forgotten_in_order() -> None:
    state = toolstack()
    for _ in range(40):
        state = after(STARTED, FAILED, MERGED, of=state)
    assert len(state.ended) == 16
    newest = state.ended[-1].epoch
    assert cell(state, Kind.FINISH, newest) == "EpochLost"
    assert cell(state, Kind.FINISH, N) == "EpochLost"
