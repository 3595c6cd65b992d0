"""What the toolstack's commands are answered: the table cell by cell.

How the situations come about is ``tests/toolstack_machine/situations.py``'s; that docs/control.md says the same,
``tests/test_docs_control.py``'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from qemu_remus.core import primary_machine as primary
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.primary_machine import Doubt, Phase, Wish
from qemu_remus.core.toolstack_machine import Kind, Standing, ToolstackState, standing
from tests.primary_machine.states import recording
from tests.toolstack_machine.situations import (
    ABORT,
    ABORTED,
    COMMIT,
    COMMITTED,
    CUT,
    FAILED,
    MERGED,
    REMOVED,
    STARTED,
    TO_STAGE,
    TO_STAGED,
    TO_TRANSFER,
    N,
    Story,
    after,
    back,
    cell,
    toolstack,
)

# --- the table: commands without a number, in every phase -----------------------------------------------------------


LINK, CUT_OFF = True, False

BY_PHASE: Final = {
    # phase, linked: prepare-epoch, start-new-epoch
    (Phase.STARTING, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.ADOPTING, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.WAITING, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.RENEWING, LINK): ("NotProtected", "NotProtected"),
    (Phase.RENEWING, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.SYNC_BEGIN, LINK): ("NotProtected", "NotProtected"),
    (Phase.SYNC_RESUME, LINK): ("NotProtected", "NotProtected"),
    (Phase.SYNC_COPY, LINK): ("NotProtected", "NotProtected"),
    (Phase.SYNC_COPY, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.SYNC_FLUSH, LINK): ("NotProtected", "NotProtected"),
    (Phase.AHEAD, LINK): ("NotProtected", "NotProtected"),
    (Phase.AHEAD, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.IDLE, LINK): ("done", "acts, waits"),
    (Phase.VERIFY, LINK): ("waits", "waits"),
    (Phase.VERIFY, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.CAPTURE, LINK): ("waits", "OutOfOrder"),
    (Phase.CAPTURE, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.TRANSFER, LINK): ("waits", "OutOfOrder"),
    (Phase.TRANSFER, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.STAGE, LINK): ("done", "OutOfOrder"),
    (Phase.STAGED, LINK): ("done", "OutOfOrder"),
    (Phase.COMMIT, LINK): ("done", "OutOfOrder"),
    (Phase.ABORT, LINK): ("waits", "waits"),
    (Phase.RETIRE, LINK): ("waits", "waits"),
    (Phase.RETIRE, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.MERGE, LINK): ("waits", "waits"),
    (Phase.MERGE, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.HOLD, LINK): ("NotProtected", "NotProtected"),
    (Phase.STAND, LINK): ("NotProtected", "NotProtected"),
    (Phase.STAND, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.HANDOVER, LINK): ("NotProtected", "NotProtected"),
    (Phase.HANDED_OVER, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.SURVEY, LINK): ("waits", "waits"),
    (Phase.SURVEY, CUT_OFF): ("NotProtected", "NotProtected"),
    (Phase.STOPPED, CUT_OFF): ("NotProtected", "NotProtected"),
}


def named(value: object) -> str | None:
    return value.name if isinstance(value, Phase | Standing) else None


@pytest.mark.parametrize(("phase", "linked"), BY_PHASE, ids=named)
def test_prepare_and_start_in_every_phase(phase: Phase, linked: bool) -> None:
    state = toolstack(phase, linked=linked, aborted=phase is Phase.ABORT)
    assert (cell(state, Kind.PREPARE), cell(state, Kind.START)) == BY_PHASE[phase, linked]


def test_no_phase_is_left_out() -> None:
    assert {phase for phase, _ in BY_PHASE} == set(Phase)


@pytest.mark.parametrize(("phase", "linked"), BY_PHASE, ids=named)
def test_a_controller_that_is_stopping_begins_nothing(phase: Phase, linked: bool) -> None:
    state = toolstack(phase, linked=linked, stopping=True)
    assert (cell(state, Kind.PREPARE), cell(state, Kind.START)) == ("NotProtected", "NotProtected")


@pytest.mark.parametrize(("phase", "linked"), BY_PHASE, ids=named)
@pytest.mark.parametrize("kind", Kind)
def test_by_interval_the_toolstack_has_no_say(kind: Kind, phase: Phase, linked: bool) -> None:
    state = toolstack(phase, linked=linked)
    assert cell(replace(state, primary=replace(state.primary, one_step=True)), kind) == "OutOfOrder"


WHILE_DOUBTED: Final = {
    # phase with an epoch in doubt, what the toolstack wants of it: prepare-epoch, start-new-epoch
    (Phase.IDLE, Wish.NONE): ("OutOfOrder", "OutOfOrder"),
    (Phase.COMMIT, Wish.COMMIT): ("waits", "OutOfOrder"),
    (Phase.ABORT, Wish.ABORT): ("waits", "waits"),
}


@pytest.mark.parametrize(("phase", "wish"), WHILE_DOUBTED, ids=str)
def test_no_epoch_begins_before_the_one_in_doubt_is_decided(phase: Phase, wish: Wish) -> None:
    state = toolstack(phase, doubt=Doubt(N, wish), finished=None, recording=recording(7, 10), highest=10)
    assert (cell(state, Kind.PREPARE), cell(state, Kind.START)) == WHILE_DOUBTED[phase, wish]


# --- the table: commands that name an epoch, for every standing of it ------------------------------------------------


BY_STANDING: Final = {
    # finish-disk-sync, commit-epoch, abort-epoch
    Standing.FUTURE: ("OutOfOrder", "OutOfOrder", "OutOfOrder"),
    Standing.CAPTURING: ("waits", "OutOfOrder", "waits"),
    Standing.COMING: ("waits", "OutOfOrder", "acts, waits"),
    Standing.STAGED: ("done", "acts, waits", "acts, waits"),
    Standing.COMMITTING: ("done", "waits", "CommitInDoubt"),
    Standing.ABORTING: ("OutOfOrder", "OutOfOrder", "waits"),
    Standing.COMMITTED: ("done", "done", "OutOfOrder"),
    Standing.PERHAPS: ("waits", "OutOfOrder", "acts, waits"),
    Standing.DOUBTFUL: ("done", "acts, waits", "acts, waits"),
    Standing.COMMIT_DOUBTFUL: ("done", "waits", "CommitInDoubt"),
    Standing.ABORT_DOUBTFUL: ("OutOfOrder", "OutOfOrder", "waits"),
    Standing.UNKNOWN: ("waits", "waits", "waits"),
    Standing.ABORTED: ("OutOfOrder", "OutOfOrder", "done"),
    Standing.LOST: ("EpochLost", "EpochLost", "done"),
    Standing.PAST: ("OutOfOrder", "OutOfOrder", "OutOfOrder"),
}

PLAYED: Final[dict[Standing, list[tuple[Story, ...]]]] = {
    Standing.FUTURE: [()],
    Standing.CAPTURING: [(STARTED,), (STARTED, CUT)],
    Standing.COMING: [TO_TRANSFER, (*TO_TRANSFER, CUT), TO_STAGE],
    Standing.STAGED: [TO_STAGED],
    Standing.COMMITTING: [(*TO_STAGED, COMMIT), (*TO_STAGED, COMMIT, CUT, MERGED, back(staged=N))],
    Standing.ABORTING: [
        (*TO_TRANSFER, ABORT),
        (*TO_TRANSFER, ABORT, CUT),
        (*TO_STAGE, ABORT),
        (*TO_STAGED, ABORT),
        (*TO_STAGED, ABORT, CUT, MERGED, back(staged=N)),
    ],
    Standing.COMMITTED: [
        (*TO_STAGED, COMMIT, COMMITTED),
        (*TO_STAGED, COMMIT, COMMITTED, REMOVED),
        (*TO_STAGED, COMMIT, CUT, MERGED, back(committed=N)),
    ],
    Standing.PERHAPS: [(*TO_STAGE, CUT), (*TO_STAGE, CUT, MERGED)],
    Standing.DOUBTFUL: [
        (*TO_STAGED, CUT),
        (*TO_STAGED, CUT, MERGED),
        (*TO_STAGED, CUT, MERGED, back(staged=N)),
        (*TO_STAGE, CUT, MERGED, back(staged=N)),
    ],
    Standing.COMMIT_DOUBTFUL: [(*TO_STAGED, COMMIT, CUT), (*TO_STAGED, CUT, MERGED, COMMIT)],
    Standing.ABORT_DOUBTFUL: [(*TO_STAGE, ABORT, CUT), (*TO_STAGED, CUT, MERGED, ABORT), (*TO_STAGE, CUT, ABORT)],
    Standing.ABORTED: [(*TO_STAGED, ABORT, ABORTED), (*TO_TRANSFER, ABORT, FAILED, MERGED)],
    Standing.LOST: [
        (STARTED, FAILED),
        (*TO_TRANSFER, FAILED, MERGED),
        (*TO_TRANSFER, CUT, FAILED, MERGED),
        (*TO_STAGED, CUT, MERGED, back()),
    ],
}

STANDINGS: Final = [
    *((where, after(*story)) for where, stories in PLAYED.items() for story in stories),
    (Standing.UNKNOWN, toolstack(Phase.WAITING, highest=9, recording=recording(7, 9))),
    (Standing.UNKNOWN, toolstack(Phase.STARTING, highest=7, recording=None)),
    (Standing.LOST, toolstack(highest=9, recording=recording(7, 9))),
    (Standing.PAST, toolstack(committed=EpochNumber(9), highest=10, recording=recording(9, 10))),
]


@pytest.mark.parametrize(("where", "state"), STANDINGS, ids=named)
def test_what_names_an_epoch_is_answered_as_that_epoch_stands(where: Standing, state: ToolstackState) -> None:
    assert standing(state, N) is where
    assert tuple(cell(state, kind) for kind in (Kind.FINISH, Kind.COMMIT, Kind.ABORT)) == BY_STANDING[where]


def test_no_standing_is_left_out() -> None:
    assert {where for where, _ in STANDINGS} == set(BY_STANDING) == set(Standing)


ENDED: Final = [
    # what was not decided when the controller ended, nobody here can say any more
    ((*TO_STAGED, primary.StopRequested(), MERGED), ("CommitInDoubt", "CommitInDoubt", "CommitInDoubt")),
    ((*TO_STAGED, COMMIT, primary.StopDeadline(), MERGED), ("CommitInDoubt", "CommitInDoubt", "CommitInDoubt")),
    ((*TO_STAGE, CUT, primary.StopRequested(), MERGED), ("CommitInDoubt", "CommitInDoubt", "CommitInDoubt")),
    ((*TO_STAGED, COMMITTED, REMOVED, primary.StopRequested()), ("done", "done", "OutOfOrder")),
    ((*TO_STAGED, ABORT, ABORTED, MERGED, primary.StopRequested()), ("OutOfOrder", "OutOfOrder", "done")),
    ((*TO_TRANSFER, FAILED, MERGED, primary.StopRequested()), ("EpochLost", "EpochLost", "done")),
    ((primary.StopRequested(),), ("OutOfOrder", "OutOfOrder", "OutOfOrder")),
]


@pytest.mark.parametrize(("story", "expected"), ENDED)
def test_after_the_end_only_what_is_known_is_said(story: tuple[Story, ...], expected: tuple[str, ...]) -> None:
    state = after(*story)
    assert state.primary.phase is Phase.STOPPED
    assert tuple(cell(state, kind) for kind in (Kind.FINISH, Kind.COMMIT, Kind.ABORT)) == expected
