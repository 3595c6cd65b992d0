"""The table of state x command: what each of the toolstack's commands is answered in each state of the primary.

docs/control.md shows it, and a test compares the two.  :func:`decide` answers a command, refuses it, has it wait, or
names the event of the primary's machine that it asks for.  What may not enter: I/O, clocks, and what happens next
(:mod:`qemu_remus.core.toolstack_machine`'s).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from typing import Final

from qemu_remus.core import primary_machine as primary
from qemu_remus.core.errors import CommitInDoubt, EpochLost, NotProtected, OutOfOrder, QemuRemusError, TimedOut
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.primary_machine import Phase, PrimaryState, Wish
from qemu_remus.core.primary_verify import verifying

NOBODY: Final = 0
"""Number of a request that nobody waits for."""

REMEMBERED: Final = 16
"""Epochs whose end is remembered, for answers."""


class Kind(StrEnum):
    """The commands."""

    PREPARE = "prepare-epoch"
    START = "start-new-epoch"
    FINISH = "finish-disk-sync"
    COMMIT = "commit-epoch"
    ABORT = "abort-epoch"


@dataclass(frozen=True, slots=True)
class Request:
    """Event: the toolstack asks for something.

    :param number: identifies it, for the reply.
    :param epoch: as it was given; of ``start-new-epoch`` the one that was begun for it, once it was.
    :param pause: of ``start-new-epoch``: the VM runs, and is to be paused.
    """

    number: int
    kind: Kind
    epoch: EpochNumber | None = None
    pause: bool = False


@dataclass(frozen=True, slots=True)
class TimeUp:
    """Event: whoever asked waits no longer."""

    number: int


@dataclass(frozen=True, slots=True)
class Reply:
    """Effect: answer a request.

    :param epoch: what it was about, where it was done.
    :param error: why it was not.
    """

    number: int
    epoch: EpochNumber | None = None
    error: QemuRemusError | None = None


class Fate(Enum):
    """What became of an epoch."""

    STAGED = auto()
    COMMITTED = auto()
    ABORTED = auto()
    LOST = auto()


@dataclass(frozen=True, slots=True)
class Ended:
    """Effect: tell whoever listens what became of an epoch.

    :param reason: why, of one that was lost.
    """

    epoch: EpochNumber
    fate: Fate
    reason: str = ""


Event = primary.Event | Request | TimeUp
Effect = primary.Effect | Reply | Ended


@dataclass(frozen=True)  # no slots: see core.frozen
class ToolstackState:
    """The primary's state, and what the toolstack waits for.

    :param waiting: requests that have no answer yet, oldest first.
    :param ended: the newest epochs that were lost or aborted, oldest first.
    """

    primary: PrimaryState
    waiting: tuple[Request, ...] = ()
    ended: tuple[Ended, ...] = ()


Step = tuple[ToolstackState, tuple[Effect, ...]]


# --- where an epoch stands -------------------------------------------------------------------------------------------


class Standing(Enum):
    """Where an epoch stands, as a toolstack sees it."""

    FUTURE = auto()  # it never was
    CAPTURING = auto()  # start-new-epoch has not returned
    COMING = auto()  # on its way to the secondary
    STAGED = auto()
    COMMITTING = auto()
    ABORTING = auto()
    COMMITTED = auto()  # the last one
    PERHAPS = auto()  # the link was lost before the secondary said that it is staged
    DOUBTFUL = auto()  # staged when the link was lost; nobody has said yet that it counts
    COMMIT_DOUBTFUL = auto()  # ... and its commit was asked for
    ABORT_DOUBTFUL = auto()  # ... and its abort was asked for
    UNKNOWN = auto()  # of an earlier controller, as far as this one can tell, and no secondary to ask
    ABORTED = auto()
    LOST = auto()
    PAST = auto()  # older than the last committed one


_IN_PHASE: Final = {
    Phase.CAPTURE: Standing.CAPTURING,
    Phase.TRANSFER: Standing.COMING,
    Phase.STAGE: Standing.COMING,
    Phase.STAGED: Standing.STAGED,
    Phase.COMMIT: Standing.COMMITTING,
    Phase.ABORT: Standing.ABORTING,
}

_OF_WISH: Final = {
    Wish.NONE: Standing.DOUBTFUL,
    Wish.COMMIT: Standing.COMMIT_DOUBTFUL,
    Wish.ABORT: Standing.ABORT_DOUBTFUL,
}


def standing(state: ToolstackState, epoch: EpochNumber) -> Standing:
    """Where an epoch stands."""
    inner = state.primary
    if inner.finished is not None and inner.finished.epoch == epoch:
        found = _IN_PHASE.get(inner.phase, Standing.LOST)
        return Standing.ABORTING if inner.aborted and found is Standing.COMING else found
    if epoch == inner.committed:
        return Standing.COMMITTED
    if inner.doubt is not None and inner.doubt.epoch == epoch:
        if inner.finished is None and inner.phase in {Phase.COMMIT, Phase.ABORT}:
            return _IN_PHASE[inner.phase]
        where = _OF_WISH[inner.doubt.wish]
        return Standing.PERHAPS if where is Standing.DOUBTFUL and not inner.doubt.staged else where
    # Without a recording bitmap the state directory alone is known, and that is older than the last epochs.
    if inner.recording is not None and (epoch > inner.highest or epoch == inner.recording.epoch):
        return Standing.FUTURE
    if (ended := _ended(state, epoch)) is not None:
        return Standing.ABORTED if ended.fate is Fate.ABORTED else Standing.LOST
    if inner.committed is not None and epoch < inner.committed:
        return Standing.PAST
    return Standing.LOST if inner.linked else Standing.UNKNOWN


def _ended(state: ToolstackState, epoch: EpochNumber) -> Ended | None:
    return next((ended for ended in state.ended if ended.epoch == epoch), None)


# --- the table -------------------------------------------------------------------------------------------------------


class Wait(Enum):
    """See :data:`WAIT`."""

    WAIT = auto()


WAIT: Final = Wait.WAIT
"""The answer is not known yet."""

Verdict = EpochNumber | None | QemuRemusError | primary.Event | Wait
"""Done (with its epoch, if it has one), refused, an event for the primary's machine and then another look, or WAIT."""

_UNPROTECTED: Final = {
    Phase.STARTING,
    Phase.ADOPTING,
    Phase.WAITING,
    Phase.RENEWING,
    Phase.SYNC_BEGIN,
    Phase.SYNC_RESUME,
    Phase.SYNC_COPY,
    Phase.SYNC_FLUSH,
    Phase.AHEAD,
    Phase.HOLD,
    Phase.STAND,
    Phase.HANDOVER,
    Phase.HANDED_OVER,
    Phase.STOPPED,
}
_PASSING: Final = {
    Phase.VERIFY,
    Phase.CAPTURE,
    Phase.TRANSFER,
    Phase.ABORT,
    Phase.RETIRE,
    Phase.MERGE,
    Phase.SURVEY,
}
"""What ends by itself, and lets an epoch begin then."""
_SETTLED: Final = {Standing.COMMITTED, Standing.ABORTED, Standing.LOST, Standing.FUTURE, Standing.PAST}
UNCHANGED: Final = "nothing was changed"


def decide(state: ToolstackState, request: Request) -> Verdict:
    """What a request is answered in a state."""
    if state.primary.one_step:
        return OutOfOrder(
            "this controller takes its checkpoints by interval",
            safe=UNCHANGED,
            hint="start it with --toolstack instead of --interval",
        )
    if request.kind is Kind.PREPARE:
        return _prepare(state.primary)
    if request.kind is Kind.START:
        return _start(state, request)
    assert request.epoch is not None
    where = standing(state, request.epoch)
    if state.primary.phase is Phase.STOPPED and where not in _SETTLED:
        return _nobody_to_ask(state, request)
    return _BY_EPOCH[request.kind](state, request.epoch, where)


def _not_protected(state: PrimaryState) -> NotProtected:
    why = f": {state.reason}" if state.reason else ""
    if state.handover is not None:
        return NotProtected(
            f"no checkpoint can be taken now{why}",
            safe="the secondary holds all that the VM has written",
            hint="keep the VM paused: two VMs must never run; switchover, given again, says how it ends",
        )
    return NotProtected(
        f"no checkpoint can be taken now{why}",
        safe="the VM and its disks are not affected; its changes stay recorded",
        hint="let the VM run on; query-replication says how the replication is",
    )


def _prepare(state: PrimaryState) -> Verdict:
    if state.phase in _UNPROTECTED or not state.linked or state.stopping:
        return _not_protected(state)
    if verifying(state) and not state.making_way:
        return primary.MakeWay(patient=True)
    if state.phase in _PASSING:
        return WAIT
    if state.doubt is not None and state.doubt.wish is Wish.NONE:
        # Somebody who has forgotten it would pause the VM for nothing.
        return _decide_first(state.doubt.epoch)
    return WAIT if state.phase in {Phase.COMMIT, Phase.ABORT} and state.finished is None else None


def _start(state: ToolstackState, request: Request) -> Verdict:
    inner = state.primary
    if request.epoch is not None:
        return _started(state, request.epoch)
    first = next((other for other in state.waiting if other.kind is Kind.START), request)
    if first.number != request.number:
        return OutOfOrder("another start-new-epoch is under way", safe=UNCHANGED, hint="one toolstack drives a VM")
    if inner.phase in _UNPROTECTED or not inner.linked or inner.stopping:
        return _not_protected(inner)
    if (epoch := _undecided(inner)) is not None:
        return _decide_first(epoch)
    if inner.phase is Phase.IDLE:
        return primary.CheckpointDue(request.pause)
    if inner.phase is Phase.VERIFY and verifying(inner) and not inner.hurried:
        return primary.MakeWay(patient=False)
    return WAIT


def _decide_first(epoch: EpochNumber) -> OutOfOrder:
    return OutOfOrder(
        f"epoch {epoch} is not committed yet",
        safe=UNCHANGED,
        hint=f"let the VM run on, and commit or abort epoch {epoch} first",
    )


def _undecided(state: PrimaryState) -> EpochNumber | None:
    """The epoch that the toolstack has to decide about before the next one, if there is one that it has not dropped."""
    if state.finished is not None:
        return None if state.aborted else state.finished.epoch
    if state.doubt is not None and state.doubt.wish is not Wish.ABORT:
        return state.doubt.epoch
    return None


def _started(state: ToolstackState, epoch: EpochNumber) -> Verdict:
    match standing(state, epoch):
        case Standing.CAPTURING:
            return WAIT
        case Standing.FUTURE:
            return OutOfOrder("the VM is not paused", safe=UNCHANGED, hint="pause the VM first, or ask for a pause")
        case Standing.LOST | Standing.ABORTED | Standing.UNKNOWN:
            return _lost(state, epoch)
        case _:
            return epoch


def _finish(state: ToolstackState, epoch: EpochNumber, where: Standing) -> Verdict:
    match where:
        case Standing.COMING | Standing.CAPTURING | Standing.PERHAPS | Standing.UNKNOWN:
            return WAIT
        case Standing.ABORTING | Standing.ABORTED | Standing.ABORT_DOUBTFUL:
            return _aborted(epoch)
        case Standing.LOST:
            return _lost(state, epoch)
        case Standing.FUTURE | Standing.PAST:
            return _no_such(state, epoch, where)
        case _:
            return epoch


def _commit(state: ToolstackState, epoch: EpochNumber, where: Standing) -> Verdict:
    match where:
        case Standing.COMMITTED:
            return epoch
        case Standing.STAGED:
            return primary.CommitDue(epoch)
        case Standing.COMING | Standing.CAPTURING | Standing.PERHAPS:
            return OutOfOrder(
                f"epoch {epoch} is not staged on the secondary yet",
                safe=UNCHANGED,
                hint="wait for finish-disk-sync first",
            )
        case Standing.DOUBTFUL | Standing.COMMIT_DOUBTFUL:
            asked = where is Standing.COMMIT_DOUBTFUL and state.primary.phase is not Phase.IDLE
            return WAIT if asked else primary.CommitDue(epoch)
        case Standing.ABORTING | Standing.ABORTED | Standing.ABORT_DOUBTFUL:
            return _aborted(epoch)
        case Standing.LOST:
            return _lost(state, epoch)
        case Standing.FUTURE | Standing.PAST:
            return _no_such(state, epoch, where)
        case _:
            return WAIT


def _abort(state: ToolstackState, epoch: EpochNumber, where: Standing) -> Verdict:
    match where:
        case Standing.ABORTED | Standing.LOST:
            return epoch
        case Standing.COMING | Standing.STAGED:
            return primary.AbortDue(epoch)
        case Standing.DOUBTFUL | Standing.PERHAPS:
            return primary.AbortDue(epoch)
        case Standing.COMMITTING | Standing.COMMIT_DOUBTFUL:
            return CommitInDoubt(
                f"epoch {epoch} cannot be aborted: its commit was asked for",
                safe="the secondary keeps it until the answer is known",
                hint="repeat commit-epoch; keep the memory of this checkpoint and of the one before",
            )
        case Standing.COMMITTED:
            return OutOfOrder(f"epoch {epoch} is committed", safe=UNCHANGED, hint="its output may be released")
        case Standing.FUTURE | Standing.PAST:
            return _no_such(state, epoch, where)
        case _:
            return WAIT


_BY_EPOCH: Final = {Kind.FINISH: _finish, Kind.COMMIT: _commit, Kind.ABORT: _abort}


def _nobody_to_ask(state: ToolstackState, request: Request) -> QemuRemusError:
    assert request.epoch is not None
    reason = state.primary.reason
    return CommitInDoubt(
        f"{request.kind} {request.epoch} cannot be answered: {reason or 'the controller has ended'}",
        safe="what the secondary has staged it keeps",
        hint="keep the memory of this checkpoint and of the one before; ask the secondary which of them it has",
    )


def _lost(state: ToolstackState, epoch: EpochNumber) -> EpochLost:
    ended = _ended(state, epoch)
    why = f": {ended.reason}" if ended is not None and ended.reason else ""
    return EpochLost(
        f"epoch {epoch} was lost{why}",
        safe="its changes stay recorded, the next epoch carries them; the checkpoint before it is kept",
        hint=f"drop the memory of checkpoint {epoch}, and take the next checkpoint",
    )


def _aborted(epoch: EpochNumber) -> OutOfOrder:
    return OutOfOrder(f"epoch {epoch} was aborted", safe=UNCHANGED, hint="take the next checkpoint")


def _no_such(state: ToolstackState, epoch: EpochNumber, where: Standing) -> OutOfOrder:
    committed = state.primary.committed
    last = "nothing is committed yet" if committed is None else f"the last committed one is {committed}"
    what = "has not been started" if where is Standing.FUTURE else "is long past"
    return OutOfOrder(f"epoch {epoch} {what}; {last}", safe=UNCHANGED, hint="start-new-epoch says the epoch's number")


def too_late(state: ToolstackState, request: Request) -> QemuRemusError:
    """The answer to a request whose time is up."""
    where = None if request.epoch is None else standing(state, request.epoch)
    undecided = {
        Standing.COMMITTING,
        Standing.ABORTING,
        Standing.PERHAPS,
        Standing.DOUBTFUL,
        Standing.COMMIT_DOUBTFUL,
        Standing.ABORT_DOUBTFUL,
        Standing.UNKNOWN,
    }
    if request.kind in {Kind.COMMIT, Kind.ABORT, Kind.FINISH} and where in undecided:
        return CommitInDoubt(
            f"{request.kind} {request.epoch} was not answered in time: whether that epoch is committed is not known",
            safe="the secondary keeps it, and the checkpoint before it, until the answer is known",
            hint=f"repeat {request.kind}; keep the memory of this checkpoint and of the one before, and hold the "
            "output back",
        )
    about = f" {request.epoch}" if request.epoch is not None else ""
    if request.kind in {Kind.PREPARE, Kind.START}:
        hint, safe = "let the VM run on, and repeat it later", "an epoch that it has begun is aborted"
    else:
        hint, safe = f"repeat {request.kind}, or abort the epoch", "it goes on by itself"
    return TimedOut(f"{request.kind}{about} did not end in time", safe=safe, hint=hint)
