"""The primary's decisions as a pure machine: ``step(state, event) -> (state, effects)``.

It owns the order of things on the primary: when to connect, to track, to copy, to capture a checkpoint, to end an
epoch, to commit it, and what becomes of its bitmap when anything fails.  What may not enter: I/O, clocks, randomness,
and how QEMU or the wire spell any of it.  New generations come in with events, because a pure machine cannot make them.
States (:mod:`qemu_remus.core.primary_model`), events and effects can be had from here.  Here are the steps, by
event; what they ask is in :mod:`qemu_remus.core.primary_questions`, what several of them do in
:mod:`qemu_remus.core.primary_turns`, and what the secondary says in :mod:`qemu_remus.core.primary_answers`.

Whatever happens, every changed block stays in a bitmap that is either recording, finished, or being merged: a bitmap is
removed only after ``Committed`` for its epoch.
"""

from __future__ import annotations

from functools import singledispatch

from qemu_remus.core import messages as m
from qemu_remus.core import primary_answers as answers
from qemu_remus.core import primary_disks as disks
from qemu_remus.core import primary_questions as ask
from qemu_remus.core import primary_turns as turns
from qemu_remus.core import primary_verify as verify
from qemu_remus.core.disk_changes import asked_for, find_changes
from qemu_remus.core.errors import InternalError, RefusalCode
from qemu_remus.core.frozen import replace
from qemu_remus.core.generation import Incremental, InitialSync, NeedsFullSync, NoPlace, decide
from qemu_remus.core.primary_effects import (
    CancelWork,
    Capture,
    Connect,
    CopyAhead,
    CopyLive,
    Disconnect,
    Effect,
    Hold,
    InterruptSlice,
    MergeBack,
    RemoveBitmaps,
    Resume,
    SaveState,
    Schedule,
    ScheduleVerify,
    Send,
    Stand,
    StartTracking,
    Step,
    Stop,
    Survey,
    SwitchReply,
    Transfer,
    VerifyAnswered,
    VerifySlice,
)
from qemu_remus.core.primary_events import (
    AbortDue,
    Attached,
    BitmapRemoved,
    Captured,
    CheckpointDue,
    CommitDue,
    CopiedAhead,
    DisksChanged,
    Event,
    FromPeer,
    Held,
    LinkDown,
    LinkRefused,
    LinkUp,
    MakeWay,
    Merged,
    NotCaptured,
    QemuSilent,
    SliceVerified,
    Standing,
    StopDeadline,
    StopRequested,
    Surveyed,
    SwitchRequested,
    SwitchTimeUp,
    SyncCopied,
    TrackingStarted,
    Transferred,
    VerifyCancelled,
    VerifyDue,
    VerifyRequested,
    WorkFailed,
)
from qemu_remus.core.primary_model import (
    ANSWERING,
    EPOCHS_AHEAD,
    IN_EPOCH,
    LASTING,
    SYNCING,
    WORKING,
    Doubt,
    Found,
    Handover,
    LeftOut,
    Opened,
    Phase,
    PrimaryState,
    Recording,
    Resize,
    ResizeDropped,
    Switch,
    SwitchStage,
    Wish,
)
from qemu_remus.core.primary_questions import base_of, hello, reach_of, reason, replication

__all__ = [
    "DisksChanged",
    "QemuSilent",
    "LeftOut",
    "Resize",
    "ResizeDropped",
    "Survey",
    "Surveyed",
    "EPOCHS_AHEAD",
    "CopiedAhead",
    "CopyAhead",
    "Found",
    "InterruptSlice",
    "MakeWay",
    "Opened",
    "ScheduleVerify",
    "SliceVerified",
    "VerifyAnswered",
    "VerifyCancelled",
    "VerifyDue",
    "VerifyRequested",
    "VerifySlice",
    "base_of",
    "reach_of",
    "ANSWERING",
    "AbortDue",
    "Doubt",
    "NotCaptured",
    "Wish",
    "Attached",
    "BitmapRemoved",
    "CancelWork",
    "Capture",
    "Captured",
    "CheckpointDue",
    "CommitDue",
    "Connect",
    "CopyLive",
    "Disconnect",
    "Effect",
    "Event",
    "FromPeer",
    "IN_EPOCH",
    "LASTING",
    "LinkDown",
    "LinkRefused",
    "LinkUp",
    "MergeBack",
    "Merged",
    "Phase",
    "PrimaryState",
    "Recording",
    "RemoveBitmaps",
    "SYNCING",
    "SaveState",
    "Schedule",
    "Send",
    "StartTracking",
    "Step",
    "Stop",
    "StopDeadline",
    "StopRequested",
    "SyncCopied",
    "TrackingStarted",
    "Transfer",
    "Transferred",
    "WORKING",
    "WorkFailed",
    "Handover",
    "Held",
    "Hold",
    "Resume",
    "Stand",
    "Standing",
    "Switch",
    "SwitchReply",
    "SwitchRequested",
    "SwitchStage",
    "SwitchTimeUp",
    "hello",
    "reason",
    "replication",
    "step",
]


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


@_on.register
def _(event: DisksChanged, state: PrimaryState) -> Step:
    return turns.to_be_surveyed(replace(state, stale=True))


@_on.register
def _(event: QemuSilent, state: PrimaryState) -> Step:
    # Work that waits for it ends by itself, and is not lost where QEMU goes on before.
    return replace(state, silence=event.what), ()


@_on.register
def _(event: Resize, state: PrimaryState) -> Step:
    return turns.to_be_surveyed(replace(state, resizes=(*state.resizes, event)))


@_on.register
def _(event: ResizeDropped, state: PrimaryState) -> Step:
    return replace(state, resizes=tuple(one for one in state.resizes if one.number != event.number)), ()


@_on.register
def _(event: Surveyed, state: PrimaryState) -> Step:
    ask.expect(state, event, Phase.SURVEY)
    if event.changed:
        return turns.follow_disks(event, state)
    if state.finished is not None or state.ahead is not None or state.opened is not None:
        return turns.lost(state, state.reason)
    if disks.untidy(state, event.found):
        # Work on the bitmaps had failed half-way.
        return turns.follow_disks(replace(event, news=state.reason or disks.CHANGED), state)
    return turns.idle(state)


@_on.register
def _(event: CopiedAhead, state: PrimaryState) -> Step:
    ask.expect(state, event, Phase.AHEAD)
    if not state.linked or state.refused or state.stopping:
        return turns.merge(state, state.reason, count=state.linked and state.refused)
    return turns.idle(replace(state, opened=event.opened))


@_on.register
def _(event: Attached, state: PrimaryState) -> Step:
    ask.expect(state, event, Phase.STARTING)
    state = replace(state, reach=(None,) * len(state.disks))
    everywhere = tuple(dict.fromkeys(one.recording for found in event.found for one in found))
    if not everywhere:
        return turns.wait_for_link(replace(state, reason="not connected to the secondary yet"))
    generations = {recording.generation for recording in everywhere}
    # Without a memory of our own, only whole chains tell how far the epochs' numbers have come.
    only = generations.pop() if len(generations) == 1 else None
    whole = all(ask.chain_of(found, only) for found in event.found)
    generation = state.generation or (only if whole else None)
    highest = max(state.highest, *(recording.epoch for recording in everywhere))
    state = replace(
        state,
        phase=Phase.ADOPTING,
        generation=generation,
        highest=highest,
        reason="taking over what an earlier controller has tracked",
    )
    return turns.take_over(state, everywhere, generation or everywhere[0].generation)


@_on.register
def _(event: LinkUp, state: PrimaryState) -> Step:
    if state.calling and state.phase in {Phase.SURVEY, Phase.ADOPTING}:
        # Its ask.hello speaks of disks that may be others by now.
        return state, (Disconnect(RefusalCode.SHUTTING_DOWN, disks.CHANGED), Connect())
    ask.expect(state, event, Phase.WAITING)
    state = replace(state, calling=False)
    if disks.outdated(state, event.ours):
        return turns.reconnect(state, RefusalCode.SHUTTING_DOWN, disks.CHANGED)
    verdict = decide(event.ours, event.theirs)
    highest = max(state.highest, event.theirs.highest_epoch)
    bulky = event.dirty_bytes > turns.COPY_AHEAD_BYTES
    state = replace(state, highest=highest, spare=event.generation, bulky=bulky, crowded=False)
    if isinstance(verdict, NoPlace):
        state = disks.leave_out(state, verdict.disks, verdict.diagnosis.what, ask=True)
        return turns.reconnect(replace(state, stale=True), verdict.code, verdict.diagnosis.what)
    if isinstance(verdict, Incremental):
        placed = asked_for(event.ours, event.theirs)
        if placed:
            state = disks.take_in(state, placed)
            return turns.reconnect(state, RefusalCode.SHUTTING_DOWN, disks.CHANGED)
        state = disks.compared(state, verdict.changes)
        # The secondary may have committed an epoch whose answer was lost; what it holds is the truth.
        state = replace(state, linked=True, committed=event.theirs.committed, reason="sending what has changed")
        return turns.settle_doubt(state, event.theirs.staged)
    changes = find_changes(event.ours, event.theirs)
    if isinstance(verdict, InitialSync) and turns.first_is_staged(state, event.theirs) and changes is not None:
        # It has the disks of the link on which it was staged, and what was gained since has to be compared.
        state = disks.compared(state, changes)
        return turns.settle_doubt(replace(state, linked=True, reason=turns.FIRST_COPY), event.theirs.staged)
    if isinstance(verdict, InitialSync) and turns.may_go_on(state, event.theirs):
        generation = state.generation
        assert generation is not None
        # An epoch that was in doubt is not there: it is lost.
        state = replace(
            state, linked=True, phase=Phase.SYNC_RESUME, protected=False, doubt=None, reason=turns.FIRST_COPY
        )
        return state, (Send(m.SyncResume(generation, state.disks)),)
    if isinstance(verdict, InitialSync) or (isinstance(verdict, NeedsFullSync) and state.allow_full_resync):
        return turns.begin_sync(replace(state, linked=True), event.generation)
    if verdict.code in LASTING:
        return turns.stopped(state, verdict)
    text = verdict.diagnosis.what
    return turns.reconnect(replace(state, reason=text), verdict.code, text)


_STOPPING = "the primary's controller is stopping"


@_on.register
def _(event: LinkRefused, state: PrimaryState) -> Step:
    state = replace(state, reason=event.goodbye.text)
    if state.phase is Phase.WAITING and event.goodbye.code in LASTING:
        return turns.stopped(replace(state, refusal=event.goodbye))
    return state, ()


@_on.register
def _(event: LinkDown, state: PrimaryState) -> Step:
    return turns.down(state, event.reason)


@_on.register
def _(event: TrackingStarted, state: PrimaryState) -> Step:
    ask.expect(state, event, Phase.RENEWING)
    return turns.tracking(state)


@_on.register
def _(event: Merged, state: PrimaryState) -> Step:
    ask.expect(state, event, Phase.ADOPTING, Phase.RENEWING, Phase.MERGE)
    if state.phase is Phase.RENEWING:
        return turns.tracking(replace(state, recording=event.into))
    generation = event.into.generation
    reach = tuple(ask.reach_of(found, generation) for found in event.found)
    since = event.into if all(ask.has_all_since(found, state.since) for found in event.found) else None
    state = replace(state, recording=event.into, reach=(None,) * len(reach) if state.synced else reach, since=since)
    whole = all(ask.reaches_the_copy(found, generation) for found in event.found)
    if state.synced and state.linked and not whole and since is None:
        # What the copy missed is not known any more.
        return turns.reconnect(replace(state, reason=turns.FIRST_COPY), RefusalCode.SHUTTING_DOWN, turns.FIRST_COPY)
    if state.phase is Phase.ADOPTING:
        return turns.wait_for_link(replace(state, reason=state.news or "not connected to the secondary yet"))
    if state.linked and state.failures and turns.lags(state) and not turns.may_begin_anew(state):
        # It would fail again at once; the next link comes after a while.
        return turns.reconnect(state, RefusalCode.SHUTTING_DOWN, state.reason)
    return turns.idle(state)


@_on.register
def _(event: SyncCopied, state: PrimaryState) -> Step:
    ask.expect(state, event, Phase.SYNC_COPY)
    if not state.linked or state.stopping:
        return turns.wait_for_link(state)
    return replace(state, phase=Phase.SYNC_FLUSH), (Send(m.SyncFlush(turns.whole(state))),)


@_on.register
def _(event: CheckpointDue, state: PrimaryState) -> Step:
    if state.phase is Phase.VERIFY:
        return replace(state, due=True), (InterruptSlice(patient=True),)
    if state.phase is not Phase.IDLE or state.doubt is not None:
        # A timer of a link that is gone; or a toolstack that has to decide about another epoch first.
        return state, ()
    finished = state.recording
    assert finished is not None
    following = Recording(finished.generation, finished.epoch, ask.next_epoch(state))
    state = replace(
        state,
        phase=Phase.CAPTURE,
        finished=finished,
        recording=following,
        highest=following.epoch,
        refused=False,
        aborted=False,
        due=False,
        making_way=False,
        hurried=False,
    )
    return state, (Capture(finished, following, event.pause),)


@_on.register
def _(event: VerifyRequested, state: PrimaryState) -> Step:
    return verify.requested(state, event)


@_on.register
def _(event: VerifyCancelled, state: PrimaryState) -> Step:
    return verify.cancelled(state, event)


@_on.register
def _(event: VerifyDue, state: PrimaryState) -> Step:
    return verify.due(state)


@_on.register
def _(event: MakeWay, state: PrimaryState) -> Step:
    return verify.make_way(state, event)


@_on.register
def _(event: SliceVerified, state: PrimaryState) -> Step:
    ask.expect(state, event, Phase.VERIFY)
    state = verify.verified(state, event)
    if not state.linked or state.refused or state.stopping:
        return turns.merge(state, state.reason or _STOPPING, count=state.linked and state.refused)
    if state.due:
        return _on(CheckpointDue(), replace(state, phase=Phase.IDLE, due=False))
    return turns.idle(state)


@_on.register
def _(event: NotCaptured, state: PrimaryState) -> Step:
    ask.expect(state, event, Phase.CAPTURE)
    # The number that was set aside for the epoch after this one is free again.
    state = replace(state, recording=state.finished, finished=None, highest=state.highest - 1)
    if state.opened is not None and (not state.linked or state.refused or state.stopping):
        # Meanwhile the open epoch has ended.
        return turns.merge(state, state.reason, count=state.linked and state.refused)
    return turns.idle(state)


@_on.register
def _(event: Captured, state: PrimaryState) -> Step:
    ask.expect(state, event, Phase.CAPTURE)
    finished = state.finished
    assert finished is not None
    state = replace(state, captured=finished.epoch)
    if not state.linked or state.hurry or state.refused:
        return turns.merge(state, state.reason, count=state.linked and state.refused)
    begin: tuple[Effect, ...] = ()
    if state.opened is None:
        begin = (Send(m.EpochBegin(finished.epoch, None if state.synced else state.committed)),)
    opened = state.opened or Opened()
    state = replace(state, phase=Phase.TRANSFER, opened=opened)
    if event.changed:
        return state, (*begin, Transfer(finished, opened))
    ended, effects = _on(Transferred(opened), state)
    return ended, (*begin, *effects)


@_on.register
def _(event: Transferred, state: PrimaryState) -> Step:
    ask.expect(state, event, Phase.TRANSFER)
    if not state.linked or state.refused:
        return turns.merge(state, state.reason, count=state.linked and not state.aborted)
    assert state.finished is not None
    if state.hurry or state.aborted:
        merging, effects = turns.merge(state, state.reason, count=False)
        return merging, (Send(m.AbortEpoch(state.finished.epoch)), *effects)
    opened = event.opened
    end = m.EpochEnd(state.finished.epoch, opened.extents, opened.payload, opened.digest, state.one_step)
    return replace(state, phase=Phase.STAGE), (Send(end),)


@_on.register
def _(event: CommitDue, state: PrimaryState) -> Step:
    if state.phase is Phase.STAGED and state.finished is not None and state.finished.epoch == event.epoch:
        return replace(state, phase=Phase.COMMIT), (Send(m.CommitEpoch(event.epoch)),)
    doubt = state.doubt
    if doubt is None or doubt.epoch != event.epoch:
        # The epoch was lost while the toolstack was about to say so.
        return state, ()
    if state.phase is Phase.IDLE:
        return turns.resolve(state, Wish.COMMIT)
    return replace(state, doubt=replace(doubt, wish=Wish.COMMIT)), ()


@_on.register
def _(event: AbortDue, state: PrimaryState) -> Step:
    finished, doubt = state.finished, state.doubt
    if finished is not None and finished.epoch == event.epoch:
        if state.phase is Phase.TRANSFER:
            return replace(state, aborted=True, reason="the toolstack dropped the checkpoint"), (CancelWork(),)
        if state.phase in {Phase.STAGE, Phase.STAGED}:
            state = replace(state, phase=Phase.ABORT, aborted=True, reason="the toolstack dropped the checkpoint")
            return state, (Send(m.AbortEpoch(event.epoch)),)
        return state, ()
    if doubt is None or doubt.epoch != event.epoch or doubt.wish is Wish.COMMIT:
        return state, ()
    if state.phase is Phase.IDLE:
        return turns.resolve(state, Wish.ABORT)
    return replace(state, doubt=replace(doubt, wish=Wish.ABORT)), ()


@_on.register
def _(event: BitmapRemoved, state: PrimaryState) -> Step:
    ask.expect(state, event, Phase.RETIRE)
    return turns.idle(state)


@_on.register
def _(event: WorkFailed, state: PrimaryState) -> Step:
    ask.expect(state, event, *WORKING)
    if event.fatal:
        return turns.stopped(state, reason=event.reason)
    if (event.changed or disks.to_be_surveyed(state)) and state.phase is not Phase.SURVEY and not state.stopping:
        said = event.changed and not state.refused and not state.aborted
        protected = state.protected and state.aborted
        return disks.survey(replace(state, reason=event.reason if said else state.reason, protected=protected))
    if state.phase in {Phase.ADOPTING, Phase.RENEWING, Phase.MERGE, Phase.RETIRE, Phase.SURVEY}:
        return turns.stopped(state, reason=event.reason)
    if state.phase is Phase.SYNC_COPY:
        if not state.linked or state.stopping:
            return turns.wait_for_link(state)
        if not event.by_link:
            # Perhaps a disk has lost its bitmap: what is there is not built upon.
            state = replace(state, since=None)
        return turns.reconnect(replace(state, reason=event.reason), RefusalCode.SHUTTING_DOWN, event.reason)
    return turns.lost(state, event.reason)


@_on.register
def _(event: StopRequested, state: PrimaryState) -> Step:
    state = replace(state, stopping=True)
    if state.phase is Phase.IDLE and state.opened is not None:
        return turns.merge(state, "the primary's controller is stopping", count=False)
    if state.phase in _WITHOUT_WORK:
        return turns.stopped(state)
    if state.phase in {Phase.SYNC_COPY, Phase.AHEAD, Phase.VERIFY}:
        return state, (CancelWork(),)
    if state.phase is Phase.STAGED:
        return turns.leave_staged(state)
    return state, ()


_WITHOUT_WORK = frozenset(
    {Phase.WAITING, Phase.IDLE, Phase.STARTING, Phase.SYNC_BEGIN, Phase.SYNC_RESUME, Phase.SYNC_FLUSH}
)


@_on.register
def _(event: StopDeadline, state: PrimaryState) -> Step:
    state = replace(state, stopping=True, hurry=True)
    if state.phase in ANSWERING:
        text = "the secondary did not answer before the controller had to stop"
        return (
            turns.merge(turns.in_doubt(state), text, count=False)
            if state.finished is not None
            else turns.stopped(state)
        )
    if state.phase in {Phase.AHEAD, Phase.VERIFY, Phase.CAPTURE, Phase.TRANSFER}:
        return state, (CancelWork(),)
    return state, ()


@_on.register
def _(event: FromPeer, state: PrimaryState) -> Step:
    if not state.linked:
        return state, ()
    return answers.from_peer(event.message, state)
