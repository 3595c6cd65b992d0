"""The secondary's decisions as a pure machine: ``step(state, event) -> (state, effects)``.

It owns what the secondary may answer and when: which link it listens to, which epoch fits, what is committed, and what
a failover does in which order.  What may not enter: I/O, clocks, randomness, the journal's and the wire's bytes.

Effects are carried out one after the other, in order; one that can fail or has a result (marked *answers*) ends with an
event, which is handled before anything else is.  That order is what the promises rest on: an answer to the primary
always stands behind the durable act that it speaks of.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import singledispatch

from qemu_remus.core import messages as m
from qemu_remus.core.errors import (
    CommitInDoubt,
    ControlError,
    InternalError,
    NotConsistent,
    RefusalCode,
    Refused,
)
from qemu_remus.core.generation import Incremental, NeedsFullSync, Refusal, decide
from qemu_remus.core.model import (
    Base,
    Connection,
    DiskSpec,
    DiskState,
    EpochNumber,
    Generation,
    InstanceId,
    PairName,
    Replication,
    Role,
)


class Phase(Enum):
    """Where the secondary stands."""

    LISTENING = auto()  # no primary is connected
    IDLE = auto()  # a primary is connected
    SYNC = auto()  # a full sync writes into the images
    EPOCH = auto()  # an epoch's extents are coming
    STAGED = auto()  # an epoch is staged and not committed
    FAILING_OVER = auto()  # decided, durably; not finished
    FAILED_OVER = auto()  # the disks are plain images and released


@dataclass(frozen=True, slots=True)
class Failover:
    """A failover that was decided.

    :param target: the checkpoint that the disks are brought to.
    :param generation: the history that begins there.
    """

    target: EpochNumber
    generation: Generation
    done: bool = False


@dataclass(frozen=True, slots=True)
class SecondaryState:
    """All that the secondary knows.

    :param link: identity of the connection that it listens to; None without one.
    :param primary: instance and session of that connection's primary.
    :param history: generations that have ended, each with the checkpoint at which it did.
    :param highest: the highest epoch number seen in this generation.
    :param staged: the newest epoch that is staged and not committed.
    :param doubted: older ones, oldest first: links were lost before anybody said what becomes of them.
    :param receiving: the epoch whose extents are coming, with its base.
    :param may_sync: the handshake of this link asks for a full sync.
    :param undo: what held before a full sync that is being prepared.
    :param flushed: the full sync on this link is flushed: an epoch with base "none" may follow.
    :param unsaved: the failover is decided here, and nobody knows whether a restart would know of it.
    :param askers: failover requests that are to be answered when it is done.
    :param behind: the primary is known, or must be assumed, to have later checkpoints.
    :param reason: why the disks are not up to date; empty while they are.
    """

    pair: PairName
    instance: InstanceId
    disks: tuple[DiskSpec, ...]
    phase: Phase = Phase.LISTENING
    generation: Generation | None = None
    history: tuple[tuple[Generation, EpochNumber], ...] = ()
    committed: Base = None
    applied: Base = None
    staged: Base = None
    doubted: tuple[EpochNumber, ...] = ()
    highest: int = 0
    consistent: bool = False
    failed: bool = False
    link: int | None = None
    primary: tuple[InstanceId, int] | None = None
    receiving: tuple[EpochNumber, Base] | None = None
    flushed: bool = False
    may_sync: bool = False
    undo: SecondaryState | None = None
    failover: Failover | None = None
    unsaved: bool = False
    askers: tuple[int, ...] = ()
    behind: bool = False
    reason: str = "no primary has connected yet"


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HelloReceived:
    """A connection's first message."""

    link: int
    hello: m.Hello


@dataclass(frozen=True, slots=True)
class FromPeer:
    """A later message of a connection."""

    link: int
    message: m.Message


@dataclass(frozen=True, slots=True)
class LinkDown:
    """A connection is gone."""

    link: int
    reason: str


@dataclass(frozen=True, slots=True)
class TargetsReady:
    """``PrepareTargets`` is done: the store says "inconsistent", durably, and the targets can be written."""

    fresh: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Staged:
    """``StageEpoch`` is done: the epoch is durable in the journal."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class CommitDone:
    """The decision that the epoch counts is durable."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """An effect failed; the rest of its step is skipped.

    :param lasting: the store must not be trusted before it was reopened, which shows whether the effect happened. If
        not lasting, nothing of it happened.
    """

    code: RefusalCode
    text: str
    lasting: bool


@dataclass(frozen=True, slots=True)
class Applied:
    """In the background: the images hold this checkpoint, flushed."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class ApplyFailed:
    """In the background: an image cannot be written. The journal keeps everything."""

    text: str


@dataclass(frozen=True, slots=True)
class FailoverRequested:
    """The toolstack or the operator wants the disks.

    :param request: identifies the asker, for the answer.
    :param checkpoints: the memory checkpoints that can be restored, newest first; empty: the last committed one.
    :param last_committed: without numbers: take it although an epoch is in doubt.
    :param force: although the primary's link is alive.
    :param generation: a new one.
    """

    request: int
    checkpoints: tuple[EpochNumber, ...]
    last_committed: bool
    force: bool
    generation: Generation


@dataclass(frozen=True, slots=True)
class FailoverSaved:
    """``SaveFailover`` is done: from here on, every commit is refused, also after a crash."""


@dataclass(frozen=True, slots=True)
class Released:
    """``FinishFailover`` is done."""


Event = (
    HelloReceived
    | FromPeer
    | LinkDown
    | TargetsReady
    | Staged
    | CommitDone
    | StoreFailed
    | Applied
    | ApplyFailed
    | FailoverRequested
    | FailoverSaved
    | Released
)


# --- effects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Hand a message to a connection."""

    link: int
    message: m.Message


@dataclass(frozen=True, slots=True)
class CloseLink:
    """Say goodbye and close a connection."""

    link: int
    code: RefusalCode
    text: str


@dataclass(frozen=True, slots=True)
class PrepareTargets:
    """Answers ``TargetsReady``. Checks the targets; then, durably: the new generation, inconsistent, an empty journal.

    A failure that is not lasting has changed nothing of that: the old checkpoint is still there.
    """

    generation: Generation
    disks: tuple[DiskSpec, ...]


@dataclass(frozen=True, slots=True)
class WriteImages:
    """Write a full sync's extents; a failure answers ``StoreFailed``."""

    message: m.SyncExtents


@dataclass(frozen=True, slots=True)
class FlushImages:
    """Make the images durable; a failure answers ``StoreFailed``."""


@dataclass(frozen=True, slots=True)
class BeginEpoch:
    """Start an epoch in the journal."""

    epoch: EpochNumber
    base: Base


@dataclass(frozen=True, slots=True)
class AppendEpoch:
    """Append extents; a failure answers ``StoreFailed``."""

    message: m.EpochExtents


@dataclass(frozen=True, slots=True)
class StageEpoch:
    """Answers ``Staged``, or ``CommitDone`` where the message says commit: one durable write does both."""

    message: m.EpochEnd


@dataclass(frozen=True, slots=True)
class CommitEpoch:
    """Answers ``CommitDone``. It drops the epochs staged before this one; later ones stay."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class AbortEpoch:
    """Drop a staged epoch, durably; one that is gone already is nothing new. A failure answers ``StoreFailed``."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class DropUnfinished:
    """Forget an epoch that has no end."""


@dataclass(frozen=True, slots=True)
class WakeApply:
    """There is something committed to apply, in the background."""


@dataclass(frozen=True, slots=True)
class SaveFailover:
    """Answers ``FailoverSaved``: the decision is durable."""

    failover: Failover


@dataclass(frozen=True, slots=True)
class FinishFailover:
    """Answers ``Released``: apply all that is committed up to the target, flush, save, release the targets."""

    failover: Failover


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer a failover request."""

    request: int
    checkpoint: EpochNumber | None = None
    error: ControlError | None = field(default=None, compare=False)


Effect = (
    Send
    | CloseLink
    | PrepareTargets
    | WriteImages
    | FlushImages
    | BeginEpoch
    | AppendEpoch
    | StageEpoch
    | CommitEpoch
    | AbortEpoch
    | DropUnfinished
    | WakeApply
    | SaveFailover
    | FinishFailover
    | Answer
)

Step = tuple[SecondaryState, tuple[Effect, ...]]


# --- questions -------------------------------------------------------------------------------------------------------


def hello(state: SecondaryState) -> m.Hello:
    """The answer to a primary's hello."""
    return m.Hello(
        pair=state.pair,
        # A primary that hears of a failover ends for good: it must not be told before that is certain.
        role=Role.PRIMARY if state.failover is not None and not state.unsaved else Role.SECONDARY,
        instance=state.instance,
        session=0,
        generation=state.generation,
        disks=state.disks,
        committed=state.committed,
        staged=state.staged,
        highest_epoch=state.highest,
        disk_state=disk_state(state),
        history=state.history,
    )


def in_doubt(state: SecondaryState) -> tuple[EpochNumber, ...]:
    """The epochs that are staged and not committed, oldest first; each can still be failed over to."""
    return state.doubted if state.staged is None else (*state.doubted, state.staged)


def disk_state(state: SecondaryState) -> DiskState:
    """What the disks hold, as reports and hellos name it."""
    if state.failed:
        return DiskState.FAILED
    if not state.consistent:
        return DiskState.INCONSISTENT
    if state.failover is not None:
        return DiskState.UP_TO_DATE if state.failover.done else DiskState.CONSISTENT
    if state.link is None:
        return DiskState.CONSISTENT
    return DiskState.OUTDATED if state.behind else DiskState.UP_TO_DATE


def connection(state: SecondaryState) -> Connection:
    """The link, as reports name it."""
    if state.failover is not None:
        return Connection.STANDALONE
    return Connection.CONNECTING if state.link is None else Connection.CONNECTED


def replication(state: SecondaryState) -> Replication:
    """The VM's protection, as far as the secondary can tell."""
    if state.failover is not None:
        return Replication.FAILED_OVER
    if state.phase is Phase.SYNC:
        return Replication.INITIAL_SYNC
    if state.generation is None:
        return Replication.OFF
    if state.link is None or state.failed:
        return Replication.DEGRADED
    if not state.consistent:
        return Replication.INITIAL_SYNC
    return Replication.RESYNC if state.behind else Replication.PROTECTED


# --- the machine -----------------------------------------------------------------------------------------------------


def step(state: SecondaryState, event: Event) -> Step:
    """Let one event happen.

    :raise InternalError: when the event cannot happen in this phase: a defect of the shell.
    """
    return _on(event, state)


@singledispatch
def _on(event: object, state: SecondaryState) -> Step:
    raise InternalError(f"the secondary knows no event {event!r}")


def _after(state: SecondaryState) -> Phase:
    """The phase between epochs."""
    if state.link is None:
        return Phase.LISTENING
    return Phase.STAGED if state.staged is not None else Phase.IDLE


def _with_doubts(state: SecondaryState, epochs: tuple[EpochNumber, ...]) -> SecondaryState:
    return replace(state, staged=epochs[-1] if epochs else None, doubted=epochs[:-1])


def _settle(state: SecondaryState) -> SecondaryState:
    return replace(state, phase=_after(state), receiving=None)


def _drop_link(state: SecondaryState, reason: str) -> Step:
    """The link is gone: an epoch without an end is forgotten, a staged one is kept."""
    effects = (DropUnfinished(),) if state.receiving is not None else ()
    state = replace(
        state, link=None, primary=None, receiving=None, flushed=False, may_sync=False, behind=True, reason=reason
    )
    if state.failover is None:
        state = replace(state, phase=Phase.LISTENING)
    return state, effects


def _hang_up(state: SecondaryState, code: RefusalCode, text: str) -> Step:
    link = state.link
    assert link is not None
    state, effects = _drop_link(state, text)
    return state, (*effects, CloseLink(link, code, text))


@_on.register
def _(event: HelloReceived, state: SecondaryState) -> Step:
    theirs = event.hello
    fenced: tuple[Effect, ...] = ()
    if state.link is not None and state.primary is not None:
        instance, session = state.primary
        if theirs.instance != instance:
            text = "another primary controller is connected for this pair"
            return state, (CloseLink(event.link, RefusalCode.OTHER_PRIMARY, text),)
        if theirs.session <= session:
            text = "this primary controller has a newer connection"
            return state, (CloseLink(event.link, RefusalCode.FENCED, text),)
        state, fenced = _hang_up(state, RefusalCode.FENCED, "a newer connection of the same primary has taken over")
    ours = hello(state)
    verdict = decide(theirs, ours)
    if isinstance(verdict, Refusal) and not isinstance(verdict, NeedsFullSync):
        # The primary comes to the same verdict from our hello; what it cannot know is said in the goodbye.
        text = f"the secondary's store has failed: {state.reason}" if state.failed else str(verdict.diagnosis)
        return state, (*fenced, Send(event.link, ours), CloseLink(event.link, verdict.code, text))
    state = replace(
        state,
        link=event.link,
        primary=(theirs.instance, theirs.session),
        flushed=False,
        # Only the next commit shows that nothing later is there.
        behind=True,
        may_sync=not isinstance(verdict, Incremental),
        reason="the primary is sending what has changed",
    )
    return _settle(state), (*fenced, Send(event.link, ours))


@_on.register
def _(event: LinkDown, state: SecondaryState) -> Step:
    if event.link != state.link:
        return state, ()
    return _drop_link(state, event.reason)


@_on.register
def _(event: FromPeer, state: SecondaryState) -> Step:
    if event.link != state.link or state.failover is not None:
        # A frame of a connection that was fenced or closed meanwhile.
        return state, ()
    return _from_peer(event.message, state)


@_on.register
def _(event: TargetsReady, state: SecondaryState) -> Step:
    state = replace(state, undo=None)
    return state, _reply(state, m.SyncReady(event.fresh))


@_on.register
def _(event: Staged, state: SecondaryState) -> Step:
    state = _settle(_with_doubts(state, (*in_doubt(state), event.epoch)))
    return state, _reply(state, m.EpochStaged(event.epoch))


@_on.register
def _(event: CommitDone, state: SecondaryState) -> Step:
    later = tuple(epoch for epoch in in_doubt(state) if epoch > event.epoch)
    state = replace(
        _with_doubts(state, later),
        committed=event.epoch,
        consistent=True,
        flushed=False,
        may_sync=False,
        behind=False,
        reason="",
    )
    if state.failover is not None:
        return state, (FinishFailover(state.failover),)
    state = _settle(state)
    return state, (*_reply(state, m.Committed(event.epoch)), WakeApply())


@_on.register
def _(event: StoreFailed, state: SecondaryState) -> Step:
    if state.failover is not None:
        return _failover_stuck(state, event.text)
    if state.undo is not None:
        # The full sync did not begin: what was there before it still is.
        state = state.undo
    state = replace(state, failed=state.failed or event.lasting, reason=event.text)
    receiving = state.receiving
    if receiving is None or event.lasting or state.link is None:
        if state.link is None:
            return state, ()
        return _hang_up(state, event.code, event.text)
    refused = _reply(state, m.EpochRefused(receiving[0], event.code, event.text))
    return _settle(state), (DropUnfinished(), *refused)


@_on.register
def _(event: Applied, state: SecondaryState) -> Step:
    if state.committed is None or not (state.applied or 0) < event.epoch <= state.committed:
        # Of an earlier generation, or overtaken by a failover.
        return state, ()
    return replace(state, applied=event.epoch), ()


@_on.register
def _(event: ApplyFailed, state: SecondaryState) -> Step:
    state = replace(state, failed=True, reason=event.text)
    if state.link is None:
        return state, ()
    return _hang_up(state, RefusalCode.STORAGE_FAILED, event.text)


def _reply(state: SecondaryState, message: m.Message) -> tuple[Effect, ...]:
    return () if state.link is None else (Send(state.link, message),)


# --- messages --------------------------------------------------------------------------------------------------------


@singledispatch
def _from_peer(message: object, state: SecondaryState) -> Step:
    return _hang_up(state, RefusalCode.PROTOCOL, f"a secondary expects no {type(message).__name__}")


@_from_peer.register
def _(message: m.Heartbeat, state: SecondaryState) -> Step:
    return state, ()


@_from_peer.register
def _(message: m.Goodbye, state: SecondaryState) -> Step:
    return _on(LinkDown(state.link if state.link is not None else -1, message.text), state)


@_from_peer.register
def _(message: m.SyncBegin, state: SecondaryState) -> Step:
    if state.phase not in {Phase.IDLE, Phase.STAGED} or not state.may_sync:
        return _hang_up(state, RefusalCode.PROTOCOL, "a full sync cannot begin now")
    state = replace(
        state,
        undo=state,
        may_sync=False,
        phase=Phase.SYNC,
        generation=message.generation,
        disks=message.disks,
        committed=None,
        applied=None,
        staged=None,
        doubted=(),
        highest=0,
        consistent=False,
        flushed=False,
        behind=True,
        reason="the first copy of the disks is not complete",
    )
    return state, (PrepareTargets(message.generation, message.disks),)


@_from_peer.register
def _(message: m.SyncExtents, state: SecondaryState) -> Step:
    if state.phase is not Phase.SYNC:
        return _hang_up(state, RefusalCode.PROTOCOL, "no full sync is under way")
    return replace(state, flushed=False), (WriteImages(message),)


@_from_peer.register
def _(message: m.SyncFlush, state: SecondaryState) -> Step:
    if state.phase is not Phase.SYNC:
        return _hang_up(state, RefusalCode.PROTOCOL, "no full sync is under way")
    # A flush that fails hangs up before the answer is sent.
    return replace(state, flushed=True), (FlushImages(), *_reply(state, m.SyncFlushed(message.token)))


@_from_peer.register
def _(message: m.EpochBegin, state: SecondaryState) -> Step:
    if state.receiving is not None or state.phase not in {Phase.IDLE, Phase.STAGED, Phase.SYNC}:
        return _hang_up(state, RefusalCode.PROTOCOL, "an epoch cannot begin now")
    if not _fits(state, message):
        held = "no checkpoint" if state.committed is None else f"checkpoint {state.committed}"
        text = (
            f"epoch {message.epoch} on base {'none' if message.base is None else message.base} does not apply: "
            f"the secondary holds {held}"
        )
        return state, _reply(state, m.EpochRefused(message.epoch, RefusalCode.BASE_TOO_NEW, text))
    state = replace(
        state,
        phase=Phase.EPOCH,
        receiving=(message.epoch, message.base),
        highest=max(state.highest, message.epoch),
    )
    return state, (BeginEpoch(message.epoch, message.base),)


def _fits(state: SecondaryState, epoch: m.EpochBegin) -> bool:
    """DESIGN: an epoch applies to a committed checkpoint c iff base <= c < epoch; base "none" completes a full sync."""
    if epoch.epoch <= max(state.committed or 0, state.staged or 0):
        return False
    if epoch.base is None:
        return state.flushed
    return state.consistent and state.committed is not None and epoch.base <= state.committed


@_from_peer.register
def _(message: m.EpochExtents, state: SecondaryState) -> Step:
    if state.receiving is None or state.receiving[0] != message.epoch:
        # The rest of an epoch that was refused.
        return state, ()
    return state, (AppendEpoch(message),)


@_from_peer.register
def _(message: m.EpochEnd, state: SecondaryState) -> Step:
    if state.receiving is None or state.receiving[0] != message.epoch:
        return state, ()
    return state, (StageEpoch(message),)


@_from_peer.register
def _(message: m.CommitEpoch, state: SecondaryState) -> Step:
    if message.epoch == state.committed:
        return state, _reply(state, m.Committed(message.epoch))
    if state.receiving is not None:
        return _hang_up(state, RefusalCode.PROTOCOL, "an epoch cannot be committed while another is coming")
    if message.epoch not in in_doubt(state):
        return _hang_up(state, RefusalCode.PROTOCOL, f"epoch {message.epoch} is not staged, it cannot be committed")
    return state, (CommitEpoch(message.epoch),)


@_from_peer.register
def _(message: m.AbortEpoch, state: SecondaryState) -> Step:
    aborted = _reply(state, m.EpochAborted(message.epoch))
    if state.receiving is not None and state.receiving[0] == message.epoch:
        return _settle(state), (DropUnfinished(), *aborted)
    if message.epoch in in_doubt(state):
        left = tuple(epoch for epoch in in_doubt(state) if epoch != message.epoch)
        state = _with_doubts(state, left)
        if state.receiving is None:
            state = _settle(state)
        return state, (AbortEpoch(message.epoch), *aborted)
    if message.epoch == state.committed:
        return _hang_up(state, RefusalCode.PROTOCOL, f"epoch {message.epoch} is committed, it cannot be aborted")
    return state, aborted


# --- failover --------------------------------------------------------------------------------------------------------


def _target(state: SecondaryState, event: FailoverRequested) -> EpochNumber | ControlError:
    """The checkpoint that a failover takes, or why it takes none."""
    if not state.consistent or state.committed is None:
        return NotConsistent(
            "the secondary's disks hold no complete checkpoint: the first copy was never finished",
            safe="nothing was changed",
            hint="the VM's only good disks are the primary's",
        )
    if state.link is not None and not event.force:
        return Refused(
            "the primary is connected and may still be running its VM",
            safe="nothing was changed; replication goes on",
            hint="make sure that the primary's VM cannot run, then use --force",
        )
    if not event.checkpoints:
        if state.staged is not None and not event.last_committed:
            return CommitInDoubt(
                f"epoch {state.staged} is staged and it is not known here whether its commit was decided",
                safe=f"nothing was changed; these checkpoints can be reached: {_reachable(state)}",
                hint="name the memory checkpoints that can be restored with --checkpoint, newest first, or say "
                "--last-committed to take the oldest of them",
            )
        return state.committed
    for checkpoint in event.checkpoints:
        if checkpoint == state.committed or checkpoint in in_doubt(state):
            return checkpoint
    return Refused(
        f"none of the checkpoints asked for can be reached: {', '.join(map(str, event.checkpoints))}",
        safe=f"nothing was changed; these checkpoints can be reached: {_reachable(state)}",
        hint="name one of these with --checkpoint",
    )


def _reachable(state: SecondaryState) -> str:
    staged = "".join(f", {epoch} (staged)" for epoch in in_doubt(state))
    return f"{state.committed} (committed){staged}"


@_on.register
def _(event: FailoverRequested, state: SecondaryState) -> Step:
    if state.failover is not None:
        return _failover_again(state, event, state.failover)
    target = _target(state, event)
    if isinstance(target, ControlError):
        return state, (Answer(event.request, error=target),)
    failover = Failover(target, event.generation)
    state = replace(state, failover=failover, unsaved=True, phase=Phase.FAILING_OVER, askers=(event.request,))
    return state, (SaveFailover(failover),)


def _failover_stuck(state: SecondaryState, text: str) -> Step:
    """The decision stays: a repetition of the request goes on where this one failed.

    The primary must know as well, even if the decision itself could not be saved.
    """
    stuck = Refused(
        f"the failover could not be finished: {text}",
        safe="the journal keeps everything that is not in the images, and no later commit will be taken",
        hint="remove the cause, then ask for the same failover again",
    )
    answers = tuple(Answer(asker, error=stuck) for asker in state.askers)
    closing: tuple[Effect, ...] = ()
    if state.link is not None:
        state, closing = _hang_up(state, RefusalCode.STORAGE_FAILED, text)
    return replace(state, failed=True, reason=text, askers=()), (*closing, *answers)


def _failover_again(state: SecondaryState, event: FailoverRequested, failover: Failover) -> Step:
    if event.checkpoints and failover.target not in event.checkpoints:
        wrong = Refused(
            f"a failover to checkpoint {failover.target} was decided already",
            safe="nothing was changed by this request",
            hint=f"ask for checkpoint {failover.target}",
        )
        return state, (Answer(event.request, error=wrong),)
    if failover.done:
        return state, (Answer(event.request, checkpoint=failover.target),)
    again = replace(state, failed=False, askers=(*state.askers, event.request))
    if state.askers:
        return again, ()
    return again, (SaveFailover(failover),)


@_on.register
def _(event: FailoverSaved, state: SecondaryState) -> Step:
    failover = state.failover
    assert failover is not None
    state = replace(state, unsaved=False)
    effects: tuple[Effect, ...] = ()
    if state.link is not None:
        text = f"the secondary has failed over to checkpoint {failover.target}"
        link = state.link
        state, dropped = _drop_link(state, text)
        effects = (*dropped, CloseLink(link, RefusalCode.FAILED_OVER, text))
    # An epoch before the target goes with its commit; one behind it must not come back.
    later = tuple(epoch for epoch in in_doubt(state) if epoch > failover.target)
    effects = (*effects, *(AbortEpoch(epoch) for epoch in later))
    if failover.target in in_doubt(state):
        return state, (*effects, CommitEpoch(failover.target))
    return state, (*effects, FinishFailover(failover))


@_on.register
def _(event: Released, state: SecondaryState) -> Step:
    failover = state.failover
    assert failover is not None
    assert state.generation is not None
    state = replace(
        state,
        phase=Phase.FAILED_OVER,
        failover=replace(failover, done=True),
        generation=failover.generation,
        history=(*state.history, (state.generation, failover.target)),
        applied=failover.target,
        staged=None,
        doubted=(),
        reason="",
    )
    answers = tuple(Answer(asker, checkpoint=failover.target) for asker in state.askers)
    return replace(state, askers=()), answers
