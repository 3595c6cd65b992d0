"""The situations in which a toolstack's commands meet the primary, each reached by events from a protected, idle VM.

Checkpoint 7 is committed and epoch 8 is the one that the commands name: the docs call it N.  The names are the rows of
the table in docs/control.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as primary
from qemu_remus.core.errors import QemuRemusError
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.primary_machine import Phase
from qemu_remus.core.primary_turns import COPY_AHEAD_BYTES
from qemu_remus.core.toolstack_machine import WAIT, Event, Kind, Reply, Request, Step, ToolstackState, decide, step
from qemu_remus.core.verification import Order
from tests.primary_machine.states import SENT_AHEAD, TWO, at, first_sync, link_up, recording, theirs

N: Final = EpochNumber(8)
ME: Final = 1
"""The request that a cell is about; the situations use higher numbers."""

Story = Event | Callable[[ToolstackState], Event]


def toolstack(phase: Phase = Phase.IDLE, **fields: Any) -> ToolstackState:
    """As :func:`tests.primary_machine.states.at`, with a toolstack."""
    return ToolstackState(at(phase, one_step=False, **fields))


def played(state: ToolstackState, *story: Story) -> Step:
    """The state after some events, and the effects of the last one."""
    effects: tuple[Any, ...] = ()
    for event in story:
        state, effects = step(state, event(state) if callable(event) else event)
    return state, effects


def after(*story: Story, of: ToolstackState | None = None) -> ToolstackState:
    """The state after some events."""
    return played(toolstack() if of is None else of, *story)[0]


def asked(kind: Kind, number: int = ME, epoch: int | None = N) -> Request:
    """A command."""
    named = None if kind in {Kind.PREPARE, Kind.START} or epoch is None else EpochNumber(epoch)
    return Request(number, kind, named)


def back(**fields: Any) -> Story:
    """The link comes back; the secondary holds checkpoint 7, and what is said here."""
    return lambda state: link_up(state.primary, theirs(**{"highest_epoch": N} | fields))


def _overdue(state: ToolstackState) -> Event:
    return link_up(state.primary, theirs(), COPY_AHEAD_BYTES + 1)


OVERDUE: Final[Story] = _overdue
"""The link comes back after an outage in which much has changed."""


def replies(effects: tuple[Any, ...]) -> dict[int, EpochNumber | type[QemuRemusError] | None]:
    """What each request was answered."""
    answers = [effect for effect in effects if isinstance(effect, Reply)]
    return {reply.number: reply.epoch if reply.error is None else type(reply.error) for reply in answers}


def cell(state: ToolstackState, kind: Kind, epoch: EpochNumber = N) -> str:
    """What a command is answered in a state, as the tables call it; fails where that changes what it should not."""
    request = asked(kind, epoch=epoch)
    verdict = decide(state, request)
    then, effects = step(state, request)
    told = replies(effects)
    if verdict is WAIT:
        assert (then, effects) == (replace(state, waiting=(*state.waiting, request)), ())
        return "waits"
    if isinstance(verdict, QemuRemusError):
        assert then == state, "a refusal changes nothing"
        assert len(effects) == 1
        assert told == {ME: type(verdict)}
        assert all((verdict.what, verdict.safe, verdict.hint))
        return type(verdict).__name__
    if verdict is None or isinstance(verdict, int):
        assert then == state
        assert len(effects) == 1
        assert told == {ME: verdict}
        return "done"
    assert not told
    assert then.primary != state.primary
    assert then.waiting[-1].number == ME
    return "acts, waits"


STARTED: Final = asked(Kind.START, 99)
COMMIT: Final = asked(Kind.COMMIT, 98)
ABORT: Final = asked(Kind.ABORT, 97)
CAPTURED: Final = primary.Captured()
SENT: Final = primary.Transferred(primary.Opened(3, 4096, 99))
STAGED: Final = primary.FromPeer(m.EpochStaged(N))
COMMITTED: Final = primary.FromPeer(m.Committed(N))
ABORTED: Final = primary.FromPeer(m.EpochAborted(N))
FAILED: Final = primary.WorkFailed("the fleece is full")
REMOVED: Final = primary.BitmapRemoved()
SWITCH: Final = primary.SwitchRequested(96, TWO, 60.0, N)
HANDED: Final = primary.FromPeer(m.HandedOver(N, TWO))
CUT: Final = primary.LinkDown("the link is gone")


def _merged(state: ToolstackState) -> Event:
    into = state.primary.recording
    assert into is not None
    doubt = state.primary.doubt
    # What is in doubt completes the first copy where nothing is committed.
    base = state.primary.committed or (doubt.epoch if doubt is not None else None)
    found = primary.Found(replace(into, base=base, epoch=EpochNumber(into.epoch - 1)))
    return primary.Merged(replace(into, base=base), ((found,),) * len(state.primary.disks))


MERGED: Final[Story] = _merged
"""The merge under way has ended; no disk had lost a bitmap."""

TO_TRANSFER: Final = (STARTED, CAPTURED)
TO_STAGE: Final = (*TO_TRANSFER, SENT)
TO_STAGED: Final = (*TO_STAGE, STAGED)

VERIFY: Final = primary.VerifyRequested(Order(96, (0, 1), (1 << 20, 1 << 20)))

_LINKLESS: Final = (Phase.ADOPTING, Phase.WAITING)
_COPYING: Final = (Phase.RENEWING, Phase.SYNC_BEGIN, Phase.SYNC_RESUME, Phase.SYNC_COPY, Phase.SYNC_FLUSH)

SITUATIONS: Final[dict[str, tuple[ToolstackState, ...]]] = {
    "by interval, without a toolstack": (ToolstackState(at(Phase.IDLE)), ToolstackState(at(Phase.STAGE))),
    "not connected, N not begun": tuple(toolstack(phase) for phase in _LINKLESS),
    "not connected, N may be of an earlier controller": (
        toolstack(Phase.WAITING, highest=9, recording=recording(7, 9)),
        toolstack(Phase.STARTING, highest=7, recording=None),
    ),
    "first copy of the disks under way": (
        *(toolstack(phase, protected=False) for phase in _COPYING),
        *(toolstack(phase, protected=False, linked=False) for phase in (Phase.RENEWING, Phase.SYNC_COPY)),
    ),
    "what changed during an outage is copied ahead": (
        after(OVERDUE, of=toolstack(Phase.WAITING, highest=7, recording=recording(6, 7))),
        after(OVERDUE, CUT, of=toolstack(Phase.WAITING, highest=7, recording=recording(6, 7))),
    ),
    "ready, N not begun": (
        toolstack(),
        after(
            OVERDUE,
            primary.CopiedAhead(SENT_AHEAD),
            of=toolstack(Phase.WAITING, highest=7, recording=recording(6, 7)),
        ),
        ToolstackState(replace(first_sync(Phase.IDLE, one_step=False), recording=recording(None, N), highest=N)),
    ),
    "a part of the copy is being compared, N not begun": (after(VERIFY, primary.VerifyDue()),),
    "the VM's disks are being looked at, N not begun": (after(primary.DisksChanged()),),
    "capturing N": (after(STARTED),),
    "N leaves QEMU": (after(*TO_TRANSFER),),
    "N is sent, not staged": (after(*TO_STAGE),),
    "N is staged": (after(*TO_STAGED),),
    "N's commit is asked for": (after(*TO_STAGED, COMMIT),),
    "N's abort is asked for": (
        after(*TO_TRANSFER, ABORT),
        after(*TO_STAGE, ABORT),
        after(*TO_STAGED, ABORT),
    ),
    "N is committed, its bitmap not removed yet": (
        after(*TO_STAGED, COMMIT, COMMITTED),
        after(*TO_STAGED, COMMITTED),
    ),
    "N is committed": (after(*TO_STAGED, COMMIT, COMMITTED, REMOVED),),
    "N was aborted, not merged back yet": (
        after(*TO_TRANSFER, ABORT, FAILED),
        after(*TO_STAGED, ABORT, ABORTED),
    ),
    "N was aborted": (after(*TO_STAGED, ABORT, ABORTED, MERGED),),
    "N is lost, not merged back yet": (after(STARTED, FAILED), after(*TO_TRANSFER, FAILED)),
    "N is lost": (after(*TO_TRANSFER, FAILED, MERGED),),
    "N is older than the last committed": (
        after(of=toolstack(committed=EpochNumber(9), highest=10, recording=recording(9, 10))),
    ),
    "link lost while capturing N": (after(STARTED, CUT),),
    "link lost while N leaves QEMU": (after(*TO_TRANSFER, CUT),),
    "link lost before N was reported staged": (after(*TO_STAGE, CUT), after(*TO_STAGE, CUT, MERGED)),
    "link lost, N is staged": (after(*TO_STAGED, CUT), after(*TO_STAGED, CUT, MERGED)),
    "link lost, N's commit was asked for": (
        after(*TO_STAGED, COMMIT, CUT),
        after(*TO_STAGED, COMMIT, CUT, MERGED),
        after(*TO_STAGED, CUT, COMMIT),
        after(*TO_STAGED, CUT, COMMIT, MERGED, back(staged=N), CUT),
    ),
    "link lost, N's abort was asked for": (
        after(*TO_STAGE, ABORT, CUT),
        after(*TO_STAGED, ABORT, CUT, MERGED),
        after(*TO_STAGE, CUT, ABORT),
    ),
    "link lost, N is lost": (after(*TO_TRANSFER, CUT, FAILED), after(*TO_TRANSFER, CUT, FAILED, MERGED)),
    "back, N is still staged": (
        after(*TO_STAGED, CUT, MERGED, back(staged=N)),
        after(*TO_STAGE, CUT, MERGED, back(staged=N)),
    ),
    "back, N's commit is asked for": (
        after(*TO_STAGED, COMMIT, CUT, MERGED, back(staged=N)),
        after(*TO_STAGED, CUT, MERGED, back(staged=N), COMMIT),
    ),
    "back, N's abort is asked for": (
        after(*TO_STAGED, ABORT, CUT, MERGED, back(staged=N)),
        after(*TO_STAGE, CUT, MERGED, back(staged=N), ABORT),
    ),
    "back, N is not there": (
        after(*TO_STAGED, CUT, MERGED, back()),
        after(*TO_STAGE, CUT, MERGED, back()),
        after(*TO_STAGED, COMMIT, CUT, MERGED, back()),
    ),
    "back, N is committed there": (
        after(*TO_STAGED, COMMIT, CUT, MERGED, back(committed=N)),
        after(*TO_STAGE, CUT, MERGED, back(committed=N)),
    ),
    "the VM is being handed over at N": (
        after(*TO_STAGED, COMMIT, COMMITTED, REMOVED, SWITCH),
        after(*TO_STAGED, COMMIT, COMMITTED, REMOVED, SWITCH, primary.Standing()),
        after(*TO_STAGED, COMMIT, COMMITTED, REMOVED, SWITCH, primary.Standing(), CUT),
        after(*TO_STAGED, COMMIT, COMMITTED, REMOVED, SWITCH, primary.Standing(), HANDED),
    ),
    "stopping, N leaves QEMU": (after(*TO_TRANSFER, primary.StopRequested()),),
    "ended, N is not decided": (
        after(*TO_STAGED, primary.StopRequested(), MERGED),
        after(*TO_STAGED, COMMIT, primary.StopDeadline(), MERGED),
        after(*TO_STAGE, CUT, primary.StopRequested(), MERGED),
    ),
    "ended, N is committed": (after(*TO_STAGED, COMMIT, COMMITTED, REMOVED, primary.StopRequested()),),
    "ended, N is lost": (after(*TO_TRANSFER, FAILED, MERGED, primary.StopRequested()),),
}
