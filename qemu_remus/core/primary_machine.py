"""The primary's decisions as a pure machine: ``step(state, event) -> (state, effects)``.

It owns the order of things on the primary: when to connect, to track, to copy, to capture a checkpoint, to end an
epoch, to commit it, and what becomes of its bitmap when anything fails.  What may not enter: I/O, clocks, randomness,
and how QEMU or the wire spell any of it.  New generations come in with events, because a pure machine cannot make them.

Effects marked *work* take long; at most one is under way, and its end is an event (``Captured``, ``WorkFailed``, ...).
The others are done at once, in order.  Whatever happens, every changed block stays in a bitmap that is either
recording, finished, or being merged: a bitmap is removed only after ``Committed`` for its epoch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import singledispatch

from qemu_remus.core import messages as m
from qemu_remus.core.errors import InternalError, RefusalCode
from qemu_remus.core.generation import Incremental, InitialSync, NeedsFullSync, Refusal, decide
from qemu_remus.core.model import (
    Base,
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
    """Where the primary stands; the comment says what it waits for."""

    STARTING = auto()  # Attached
    ADOPTING = auto()  # Merged: what an earlier controller left becomes one recording bitmap
    WAITING = auto()  # LinkUp
    RENEWING = auto()  # TrackingStarted or Merged: a bitmap with base "none" for a full sync
    SYNC_BEGIN = auto()  # SyncReady
    SYNC_COPY = auto()  # SyncCopied
    SYNC_FLUSH = auto()  # SyncFlushed
    IDLE = auto()  # CheckpointDue
    CAPTURE = auto()  # Captured
    TRANSFER = auto()  # Transferred
    STAGE = auto()  # EpochStaged, or Committed where one write does both
    STAGED = auto()  # CommitDue
    COMMIT = auto()  # Committed
    RETIRE = auto()  # BitmapRemoved
    MERGE = auto()  # Merged: the failed epoch's bitmap goes back into the recording one
    STOPPED = auto()


WORKING = frozenset(
    {
        Phase.ADOPTING,
        Phase.RENEWING,
        Phase.SYNC_COPY,
        Phase.CAPTURE,
        Phase.TRANSFER,
        Phase.RETIRE,
        Phase.MERGE,
    }
)
"""Phases in which a piece of work is under way."""

SYNCING = frozenset({Phase.RENEWING, Phase.SYNC_BEGIN, Phase.SYNC_COPY, Phase.SYNC_FLUSH})
LASTING = frozenset(RefusalCode) - {
    RefusalCode.FENCED,
    RefusalCode.STORAGE_FAILED,
    RefusalCode.NO_SPACE,
    RefusalCode.PROTOCOL,
    RefusalCode.SHUTTING_DOWN,
}
"""Refusals that nobody but an operator can lift: there is no use in connecting again."""

IN_EPOCH = frozenset({Phase.CAPTURE, Phase.TRANSFER, Phase.STAGE, Phase.STAGED, Phase.COMMIT})


@dataclass(frozen=True, slots=True)
class Recording:
    """Identity of one dirty bitmap, the same on every disk.

    :param base: the committed checkpoint that its extents build on.
    :param epoch: the epoch that it records, or has recorded.
    """

    generation: Generation
    base: Base
    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class PrimaryState:
    """All that the primary knows.

    :param one_step: stage and commit by one durable write (interval mode); else a toolstack says when to commit.
    :param highest: the highest epoch number in use, here or on the secondary.
    :param recording: the bitmap that records now.
    :param finished: the bitmap of the uncommitted epoch.
    :param linked: the handshake of the present link is done.
    :param synced: a full sync was flushed on this link and is not committed yet.
    :param stopping: the machine ends as soon as nothing is under way.
    :param hurry: it has waited long enough for that: whatever is under way ends without an answer.
    :param refused: the secondary has refused the epoch under way and ignores the rest of it.
    :param refusal: the secondary has refused this pair for good; the machine ends as soon as its epoch is merged back.
    :param failures: epochs lost in a row while the link was up.
    :param reason: why the VM is not protected; empty while it is.
    """

    pair: PairName
    instance: InstanceId
    disks: tuple[DiskSpec, ...]
    session: int = 0
    one_step: bool = True
    allow_full_resync: bool = False
    phase: Phase = Phase.STARTING
    generation: Generation | None = None
    committed: Base = None
    captured: Base = None
    staged: Base = None
    highest: int = 0
    recording: Recording | None = None
    finished: Recording | None = None
    linked: bool = False
    synced: bool = False
    protected: bool = False
    stopping: bool = False
    hurry: bool = False
    refused: bool = False
    refusal: m.Goodbye | None = None
    failures: int = 0
    reason: str = "not started yet"


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attached:
    """The VM's graph is ours to use.

    :param found: for each disk, the bitmaps of this pair that were found on its node.
    """

    found: tuple[tuple[Recording, ...], ...]


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Hellos were exchanged.

    :param generation: a new one, for the case that a full sync has to begin.
    """

    ours: m.Hello
    theirs: m.Hello
    generation: Generation


@dataclass(frozen=True, slots=True)
class LinkRefused:
    """The secondary said goodbye instead of hello."""

    goodbye: m.Goodbye


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The link is gone."""

    reason: str


@dataclass(frozen=True, slots=True)
class FromPeer:
    """The secondary said something."""

    message: m.Message


@dataclass(frozen=True, slots=True)
class TrackingStarted:
    """Work done: the bitmap records on every disk."""


@dataclass(frozen=True, slots=True)
class Merged:
    """Work done: one recording bitmap has taken over all others."""


@dataclass(frozen=True, slots=True)
class SyncCopied:
    """Work done: the live disks were read to their ends and everything was handed to the link."""


@dataclass(frozen=True, slots=True)
class CheckpointDue:
    """It is time for the next checkpoint."""


@dataclass(frozen=True, slots=True)
class Captured:
    """Work done: the checkpoint is captured, the VM runs again."""


@dataclass(frozen=True, slots=True)
class Transferred:
    """Work done: all extents were handed to the link, the filter is out."""

    extents: int
    payload: int
    digest: int


@dataclass(frozen=True, slots=True)
class CommitDue:
    """The toolstack has the memory of this checkpoint on the backup."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class BitmapRemoved:
    """Work done: the committed epoch's bitmap is gone."""


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """The work under way failed or was cancelled; nothing of ours is in the guest's way.

    :param fatal: the bitmaps are not known to be whole; only a restart, which looks again, can go on.
    """

    reason: str
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody asked the controller to stop: finish what is under way."""


@dataclass(frozen=True, slots=True)
class StopDeadline:
    """What was under way took too long: cancel it."""


Event = (
    Attached
    | LinkUp
    | LinkRefused
    | LinkDown
    | FromPeer
    | TrackingStarted
    | Merged
    | SyncCopied
    | CheckpointDue
    | Captured
    | Transferred
    | CommitDue
    | BitmapRemoved
    | WorkFailed
    | StopRequested
    | StopDeadline
)


# --- effects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    """Reach the secondary and exchange hellos; its end is ``LinkUp``, or ``LinkRefused`` for each attempt that was.

    With a back-off that grows until an epoch is committed: a link can come up again and again and lead nowhere.
    Nothing of an earlier link may be reported once ``LinkUp`` was.
    """


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Say goodbye and close the link; it need not be reported as down."""

    code: RefusalCode
    text: str


@dataclass(frozen=True, slots=True)
class Send:
    """Hand a message to the link."""

    message: m.Message


@dataclass(frozen=True, slots=True)
class SaveState:
    """Make generation, committed checkpoint and highest epoch durable."""


@dataclass(frozen=True, slots=True)
class StartTracking:
    """Work: a new recording bitmap on every disk."""

    recording: Recording


@dataclass(frozen=True, slots=True)
class MergeBack:
    """Work: take what is left of a checkpoint out of the graph, then let one new recording bitmap take over the old
    ones, of which some may not exist on some disks."""

    old: tuple[Recording, ...]
    into: Recording


@dataclass(frozen=True, slots=True)
class CopyLive:
    """Work: read the live disks and send them.

    :param fresh: for each disk: zeroes need not be sent.
    """

    fresh: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Schedule:
    """Let ``CheckpointDue`` happen: at the next interval, or after a back-off that grows with the failures in a row."""

    failures: int = 0


@dataclass(frozen=True, slots=True)
class Capture:
    """Work: the paused part of a checkpoint."""

    finished: Recording
    following: Recording


@dataclass(frozen=True, slots=True)
class Transfer:
    """Work: send the epoch's extents and take the filter out."""

    finished: Recording


@dataclass(frozen=True, slots=True)
class RemoveBitmap:
    """Work: its epoch is committed."""

    recording: Recording


@dataclass(frozen=True, slots=True)
class CancelWork:
    """End the work under way; its end is ``WorkFailed`` (or its success, if that was quicker)."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The machine has ended.

    :param refusal: the two sides do not replicate.
    :param goodbye: the secondary refused.
    :param reason: why, where it is neither a refusal nor because somebody asked.
    """

    refusal: Refusal | None = None
    goodbye: m.Goodbye | None = None
    reason: str = ""


Effect = (
    Connect
    | Disconnect
    | Send
    | SaveState
    | StartTracking
    | MergeBack
    | CopyLive
    | Schedule
    | Capture
    | Transfer
    | RemoveBitmap
    | CancelWork
    | Stop
)

Step = tuple[PrimaryState, tuple[Effect, ...]]


# --- questions -------------------------------------------------------------------------------------------------------


def hello(state: PrimaryState) -> m.Hello:
    """The hello of the next link."""
    recording = state.recording
    base = recording.base if recording is not None and recording.generation == state.generation else None
    return m.Hello(
        pair=state.pair,
        role=Role.PRIMARY,
        instance=state.instance,
        session=state.session,
        generation=state.generation,
        disks=tuple(replace(disk, base=base) for disk in state.disks),
        committed=state.committed,
        staged=None,
        highest_epoch=state.highest,
        disk_state=DiskState.UP_TO_DATE,
    )


def replication(state: PrimaryState) -> Replication:
    """The VM's protection, as reports name it."""
    if state.phase in {Phase.STARTING, Phase.ADOPTING, Phase.STOPPED}:
        return Replication.OFF
    if state.phase in SYNCING or state.synced:
        return Replication.INITIAL_SYNC
    if not state.linked or state.failures:
        return Replication.DEGRADED if state.committed is not None else Replication.OFF
    return Replication.PROTECTED if state.protected else Replication.RESYNC


# --- the machine -----------------------------------------------------------------------------------------------------


def step(state: PrimaryState, event: Event) -> Step:
    """Let one event happen.

    :raise InternalError: when the event cannot happen in this phase: a defect of the shell.
    """
    if state.phase is Phase.STOPPED:
        return state, ()
    return _on(event, state)


@singledispatch
def _on(event: object, state: PrimaryState) -> Step:
    raise InternalError(f"the primary knows no event {event!r}")


def _expect(state: PrimaryState, event: object, *phases: Phase) -> None:
    if state.phase not in phases:
        raise InternalError(f"{type(event).__name__} cannot happen in phase {state.phase.name}")


def _next_epoch(state: PrimaryState) -> EpochNumber:
    return EpochNumber(state.highest + 1)


def _oldest(recordings: tuple[Recording, ...]) -> Base:
    """The oldest base that holds for a bitmap that takes over all of these: bitmaps of one disk and one history.

    Beside a bitmap with base "none" stands one that began at the checkpoint that ends it.  If that checkpoint was
    committed after all, the union builds on it; if not, no commit is there to build on, and nobody can mistake it.
    """
    return min((recording.base for recording in recordings if recording.base is not None), default=None)


def _common_base(found: tuple[tuple[Recording, ...], ...]) -> Base:
    """The base that holds on every disk, from the bitmaps of one generation on each of them: the newest of theirs."""
    bases = [_oldest(recordings) for recordings in found]
    known = [base for base in bases if base is not None]
    return max(known) if known and len(known) == len(bases) else None


def _take_over(state: PrimaryState, old: tuple[Recording, ...], base: Base, generation: Generation) -> Step:
    into = Recording(generation, base, _next_epoch(state))
    state = replace(state, recording=into, finished=None, highest=into.epoch)
    return state, (SaveState(), MergeBack(old, into))


def _wait_for_link(state: PrimaryState) -> Step:
    if state.stopping:
        return _stopped(state)
    return replace(state, phase=Phase.WAITING, linked=False, synced=False, protected=False), (Connect(),)


def _reconnect(state: PrimaryState, code: RefusalCode, text: str) -> Step:
    """This link leads nowhere; the next one begins with a handshake."""
    waiting, effects = _wait_for_link(state)
    return waiting, (Disconnect(code, text), *effects)


def _idle(state: PrimaryState) -> Step:
    """The graph is clean and one bitmap records: go on with whatever is next."""
    if not state.linked:
        return _wait_for_link(state)
    if state.stopping:
        return _stopped(state)
    return replace(state, phase=Phase.IDLE), (Schedule(state.failures),)


def _stopped(state: PrimaryState, refusal: Refusal | None = None, reason: str = "") -> Step:
    text = refusal.diagnosis.what if refusal is not None else reason or "the primary's controller is stopping"
    code = refusal.code if refusal is not None else RefusalCode.SHUTTING_DOWN
    goodbye = (Disconnect(code, text),) if state.linked or refusal is not None else ()
    ended = replace(state, phase=Phase.STOPPED, linked=False, protected=False, reason=text)
    return ended, (*goodbye, SaveState(), Stop(refusal, state.refusal, reason))


def _merge(state: PrimaryState, reason: str, *, count: bool = True) -> Step:
    """The epoch failed: its bitmap goes back into a recording one that keeps the older base."""
    assert state.recording is not None
    old = (state.finished, state.recording) if state.finished is not None else (state.recording,)
    failures = state.failures + 1 if count else state.failures
    # On this link the next epoch can still complete the full sync; no later link takes it up.
    unfinished = state.synced and state.linked and not state.stopping
    base = None if unfinished and any(recording.base is None for recording in old) else _oldest(old)
    generation = state.recording.generation
    state = replace(state, phase=Phase.MERGE, failures=failures, protected=False, reason=reason)
    return _take_over(state, old, base, generation)


@_on.register
def _(event: Attached, state: PrimaryState) -> Step:
    _expect(state, event, Phase.STARTING)
    everywhere = tuple(dict.fromkeys(recording for found in event.found for recording in found))
    if not everywhere:
        return _wait_for_link(replace(state, reason="not connected to the secondary yet"))
    generations = {recording.generation for recording in everywhere}
    generation = state.generation or (generations.pop() if len(generations) == 1 else None)
    # A disk without a bitmap of this generation has changes that nobody recorded: it has no base.
    base = _common_base(tuple(tuple(r for r in found if r.generation == generation) for found in event.found))
    generation = generation or everywhere[0].generation
    highest = max(state.highest, *(recording.epoch for recording in everywhere))
    state = replace(
        state,
        phase=Phase.ADOPTING,
        generation=state.generation or generation,
        highest=highest,
        reason="taking over what an earlier controller has tracked",
    )
    return _take_over(state, everywhere, base, generation)


@_on.register
def _(event: LinkUp, state: PrimaryState) -> Step:
    _expect(state, event, Phase.WAITING)
    verdict = decide(event.ours, event.theirs)
    state = replace(state, highest=max(state.highest, event.theirs.highest_epoch))
    if isinstance(verdict, Incremental):
        # The secondary may have committed an epoch whose answer was lost; what it holds is the truth.
        state = replace(state, linked=True, committed=event.theirs.committed, reason="sending what has changed")
        idle, effects = _idle(state)
        return idle, (SaveState(), *effects)
    if isinstance(verdict, InitialSync) or (isinstance(verdict, NeedsFullSync) and state.allow_full_resync):
        return _begin_sync(replace(state, linked=True), event.generation)
    if verdict.code in LASTING:
        return _stopped(state, verdict)
    text = verdict.diagnosis.what
    return _reconnect(replace(state, reason=text), verdict.code, text)


def _begin_sync(state: PrimaryState, generation: Generation) -> Step:
    """Every full sync is a new generation, so that nothing older in a journal or a bitmap can be taken for its own.

    It becomes the pair's with the secondary's answer: until then the secondary may still hold a checkpoint of the old
    one, and a primary that named another would be a stranger to it.
    """
    old = state.recording
    state = replace(state, phase=Phase.RENEWING, protected=False, reason="the disks are being copied")
    if old is not None:
        return _take_over(state, (old,), None, generation)
    recording = Recording(generation, None, _next_epoch(state))
    state = replace(state, recording=recording, highest=recording.epoch)
    return state, (SaveState(), StartTracking(recording))


@_on.register
def _(event: LinkRefused, state: PrimaryState) -> Step:
    state = replace(state, reason=event.goodbye.text)
    if state.phase is Phase.WAITING and event.goodbye.code in LASTING:
        return _stopped(replace(state, refusal=event.goodbye))
    return state, ()


@_on.register
def _(event: LinkDown, state: PrimaryState) -> Step:
    if not state.linked:
        return state, ()
    state = replace(state, linked=False, synced=False, protected=False, reason=event.reason)
    if state.phase in WORKING:
        # Work that needs the link fails by itself; it may hang in QEMU or in a read, so it is told as well.
        cancel = state.phase in {Phase.SYNC_COPY, Phase.TRANSFER}
        return state, (CancelWork(),) if cancel else ()
    if state.phase in {Phase.STAGE, Phase.STAGED, Phase.COMMIT}:
        return _merge(state, event.reason, count=False)
    return _wait_for_link(state)


@_on.register
def _(event: TrackingStarted, state: PrimaryState) -> Step:
    _expect(state, event, Phase.RENEWING)
    return _tracking(state)


@_on.register
def _(event: Merged, state: PrimaryState) -> Step:
    _expect(state, event, Phase.ADOPTING, Phase.RENEWING, Phase.MERGE)
    if state.phase is Phase.RENEWING:
        return _tracking(state)
    if state.phase is Phase.ADOPTING:
        return _wait_for_link(replace(state, reason="not connected to the secondary yet"))
    return _idle(state)


def _tracking(state: PrimaryState) -> Step:
    if not state.linked or state.stopping:
        return _wait_for_link(state)
    assert state.recording is not None
    return replace(state, phase=Phase.SYNC_BEGIN), (Send(m.SyncBegin(state.recording.generation, state.disks)),)


@_on.register
def _(event: SyncCopied, state: PrimaryState) -> Step:
    _expect(state, event, Phase.SYNC_COPY)
    if not state.linked or state.stopping:
        return _wait_for_link(state)
    return replace(state, phase=Phase.SYNC_FLUSH), (Send(m.SyncFlush(1)),)


@_on.register
def _(event: CheckpointDue, state: PrimaryState) -> Step:
    if state.phase is not Phase.IDLE:
        # A timer of a link that is gone.
        return state, ()
    finished = state.recording
    assert finished is not None
    following = Recording(finished.generation, finished.epoch, _next_epoch(state))
    state = replace(
        state, phase=Phase.CAPTURE, finished=finished, recording=following, highest=following.epoch, refused=False
    )
    return state, (Capture(finished, following),)


@_on.register
def _(event: Captured, state: PrimaryState) -> Step:
    _expect(state, event, Phase.CAPTURE)
    finished = state.finished
    assert finished is not None
    state = replace(state, captured=finished.epoch)
    if not state.linked or state.hurry:
        return _merge(state, state.reason, count=False)
    begin = Send(m.EpochBegin(finished.epoch, finished.base))
    return replace(state, phase=Phase.TRANSFER), (begin, Transfer(finished))


@_on.register
def _(event: Transferred, state: PrimaryState) -> Step:
    _expect(state, event, Phase.TRANSFER)
    if not state.linked or state.refused:
        return _merge(state, state.reason, count=state.linked)
    assert state.finished is not None
    if state.hurry:
        merging, effects = _merge(state, state.reason, count=False)
        return merging, (Send(m.AbortEpoch(state.finished.epoch)), *effects)
    end = m.EpochEnd(state.finished.epoch, event.extents, event.payload, event.digest, state.one_step)
    return replace(state, phase=Phase.STAGE), (Send(end),)


@_on.register
def _(event: CommitDue, state: PrimaryState) -> Step:
    if state.phase is not Phase.STAGED or state.finished is None or state.finished.epoch != event.epoch:
        # The epoch was lost while the toolstack was about to say so.
        return state, ()
    return replace(state, phase=Phase.COMMIT), (Send(m.CommitEpoch(event.epoch)),)


@_on.register
def _(event: BitmapRemoved, state: PrimaryState) -> Step:
    _expect(state, event, Phase.RETIRE)
    return _idle(state)


@_on.register
def _(event: WorkFailed, state: PrimaryState) -> Step:
    _expect(state, event, *WORKING)
    if event.fatal or state.phase in {Phase.ADOPTING, Phase.RENEWING, Phase.MERGE, Phase.RETIRE}:
        return _stopped(state, reason=event.reason)
    if state.phase is Phase.SYNC_COPY:
        if not state.linked or state.stopping:
            return _wait_for_link(state)
        return _reconnect(replace(state, reason=event.reason), RefusalCode.SHUTTING_DOWN, event.reason)
    abort: tuple[Effect, ...] = ()
    if state.phase is Phase.TRANSFER and state.linked and not state.refused:
        assert state.finished is not None
        abort = (Send(m.AbortEpoch(state.finished.epoch)),)
    reason = event.reason if state.linked and not state.refused else state.reason
    merging, effects = _merge(state, reason, count=state.linked)
    return merging, (*abort, *effects)


@_on.register
def _(event: StopRequested, state: PrimaryState) -> Step:
    state = replace(state, stopping=True)
    if state.phase in {Phase.WAITING, Phase.IDLE, Phase.STARTING, Phase.SYNC_BEGIN, Phase.SYNC_FLUSH}:
        return _stopped(state)
    if state.phase is Phase.SYNC_COPY:
        return state, (CancelWork(),)
    if state.phase is Phase.STAGED:
        return _leave_staged(state)
    return state, ()


def _leave_staged(state: PrimaryState) -> Step:
    """Stop while the toolstack has still to decide: it may have completed this memory, so nothing is aborted."""
    return _merge(state, "the primary's controller is stopping", count=False)


@_on.register
def _(event: StopDeadline, state: PrimaryState) -> Step:
    state = replace(state, stopping=True, hurry=True)
    if state.phase in {Phase.STAGE, Phase.COMMIT}:
        return _merge(state, "the secondary did not answer before the controller had to stop", count=False)
    if state.phase in {Phase.CAPTURE, Phase.TRANSFER}:
        return state, (CancelWork(),)
    return state, ()


@_on.register
def _(event: FromPeer, state: PrimaryState) -> Step:
    if not state.linked:
        return state, ()
    return _from_peer(event.message, state)


@singledispatch
def _from_peer(message: object, state: PrimaryState) -> Step:
    """Heartbeats and answers that nobody waits for any more change nothing."""
    return state, ()


@_from_peer.register
def _(message: m.Goodbye, state: PrimaryState) -> Step:
    # Where the secondary has no room for the first copy, somebody has to make some.
    if message.code in LASTING or (message.code is RefusalCode.NO_SPACE and state.phase is Phase.SYNC_BEGIN):
        state = replace(state, refusal=message, stopping=True)
    return _on(LinkDown(message.text), state)


@_from_peer.register
def _(message: m.SyncReady, state: PrimaryState) -> Step:
    if state.phase is not Phase.SYNC_BEGIN:
        return state, ()
    assert state.recording is not None
    state = replace(
        state, phase=Phase.SYNC_COPY, generation=state.recording.generation, captured=None, staged=None, committed=None
    )
    return state, (SaveState(), CopyLive(message.fresh))


@_from_peer.register
def _(message: m.SyncFlushed, state: PrimaryState) -> Step:
    if state.phase is not Phase.SYNC_FLUSH:
        return state, ()
    return _idle(replace(state, synced=True))


@_from_peer.register
def _(message: m.EpochStaged, state: PrimaryState) -> Step:
    if state.phase is not Phase.STAGE or state.finished is None or message.epoch != state.finished.epoch:
        return state, ()
    state = replace(state, phase=Phase.STAGED, staged=message.epoch)
    if state.stopping:
        return _leave_staged(state)
    return state, ()


@_from_peer.register
def _(message: m.Committed, state: PrimaryState) -> Step:
    finished = state.finished
    if state.phase not in {Phase.STAGE, Phase.COMMIT} or finished is None or message.epoch != finished.epoch:
        return state, ()
    state = replace(
        state,
        phase=Phase.RETIRE,
        staged=message.epoch,
        committed=message.epoch,
        finished=None,
        synced=False,
        protected=True,
        failures=0,
        reason="",
    )
    return state, (RemoveBitmap(finished),)


@_from_peer.register
def _(message: m.EpochRefused, state: PrimaryState) -> Step:
    if state.finished is None or message.epoch != state.finished.epoch:
        return state, ()
    if message.code is RefusalCode.BASE_TOO_NEW:
        # One side is wrong about the other, and every later epoch would meet the same: the handshake finds out.
        down, effects = _on(LinkDown(message.text), state)
        return down, (Disconnect(RefusalCode.BASE_TOO_NEW, message.text), *effects)
    if state.phase is Phase.TRANSFER:
        return replace(state, reason=message.text, refused=True), (CancelWork(),)
    if state.phase in {Phase.STAGE, Phase.COMMIT}:
        return _merge(state, message.text)
    return state, ()
