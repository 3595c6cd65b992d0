"""The secondary's decisions as a pure machine: ``step(state, event) -> (state, effects)``.

It owns what the secondary may answer and when: which link it listens to, which epoch fits, what is committed, and what
a failover does in which order.  What may not enter: I/O, clocks, randomness, the journal's and the wire's bytes.
States, events and effects are :mod:`qemu_remus.core.secondary_model`'s, and can be had from here.  Here are the steps
by event; those that a message of the primary's causes are in :mod:`qemu_remus.core.secondary_messages`, the toolstack's
in :mod:`qemu_remus.core.secondary_failover`.

The effects' order is what the promises rest on: an answer to the primary always stands behind the durable act that it
speaks of.
"""

from __future__ import annotations

from functools import singledispatch

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_failover as failover
from qemu_remus.core import secondary_messages as messages
from qemu_remus.core import secondary_questions as ask
from qemu_remus.core import secondary_turns as turns
from qemu_remus.core.errors import (
    CommitInDoubt,
    InternalError,
    RefusalCode,
)
from qemu_remus.core.frozen import replace
from qemu_remus.core.generation import Incremental, NeedsFullSync, Refusal, decide
from qemu_remus.core.repair import failed_again, mended, not_repairable, try_again, with_found
from qemu_remus.core.secondary_model import (
    AbortDone,
    AbortEpoch,
    Answer,
    AppendEpoch,
    Applied,
    ApplyFailed,
    BeginEpoch,
    CloseLink,
    CommitDone,
    CommitEpoch,
    CompareBlocks,
    Compared,
    DropUnfinished,
    Effect,
    Event,
    Failover,
    FailoverRequested,
    FailoverSaved,
    FinishFailover,
    FlushImages,
    FromPeer,
    HelloReceived,
    ImagesFlushed,
    LinkDown,
    MemoryReceived,
    Phase,
    PrepareTargets,
    Released,
    Reopened,
    ReopenStore,
    ReopenTargets,
    RetryDue,
    SaveFailover,
    ScheduleRetry,
    SecondaryState,
    Send,
    Staged,
    StageEpoch,
    Step,
    StoreFailed,
    TargetsReady,
    TargetsReopened,
    WakeApply,
    WriteImages,
)
from qemu_remus.core.secondary_questions import connection, disk_state, hello, in_doubt, replication

__all__ = [
    "AbortDone",
    "AbortEpoch",
    "Answer",
    "AppendEpoch",
    "Applied",
    "ApplyFailed",
    "BeginEpoch",
    "CloseLink",
    "CommitDone",
    "CommitEpoch",
    "CompareBlocks",
    "Compared",
    "DropUnfinished",
    "Effect",
    "Event",
    "Failover",
    "FailoverRequested",
    "FailoverSaved",
    "FinishFailover",
    "FlushImages",
    "FromPeer",
    "HelloReceived",
    "ImagesFlushed",
    "LinkDown",
    "MemoryReceived",
    "Phase",
    "PrepareTargets",
    "Released",
    "ReopenStore",
    "ReopenTargets",
    "Reopened",
    "RetryDue",
    "SaveFailover",
    "ScheduleRetry",
    "SecondaryState",
    "Send",
    "StageEpoch",
    "Staged",
    "Step",
    "StoreFailed",
    "TargetsReady",
    "TargetsReopened",
    "WakeApply",
    "WriteImages",
    "connection",
    "disk_state",
    "hello",
    "in_doubt",
    "replication",
    "step",
]


def step(state: SecondaryState, event: Event) -> Step:
    """Let one event happen.

    :raise InternalError: when the event cannot happen in this phase: a defect of the shell.
    """
    return _on(event, state)


@singledispatch
def _on(event: object, state: SecondaryState) -> Step:
    raise InternalError(f"the secondary knows no event {event!r}")


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
        state, fenced = turns.hang_up(
            state, RefusalCode.FENCED, "a newer connection of the same primary has taken over"
        )
    ours = ask.hello(state, theirs)
    verdict = decide(theirs, ours)
    if isinstance(verdict, Refusal) and not isinstance(verdict, NeedsFullSync):
        # The primary comes to the same verdict from our hello; what it cannot know is said in the goodbye.
        text = f"the secondary's store has failed: {state.reason}" if state.failed else str(verdict.diagnosis)
        return state, (*fenced, Send(event.link, ours), CloseLink(event.link, verdict.code, text))
    state = replace(
        state,
        link=event.link,
        primary=(theirs.instance, theirs.session),
        arriving=tuple(disk for disk in theirs.disks if disk.size),
        flushed=False,
        # Only the next commit shows that nothing later is there.
        behind=True,
        may_sync=not isinstance(verdict, Incremental),
        reason="the primary is sending what has changed",
    )
    return turns.settle(state), (*fenced, Send(event.link, ours))


@_on.register
def _(event: LinkDown, state: SecondaryState) -> Step:
    if event.link != state.link:
        return state, ()
    return turns.drop_link(state, event.reason)


@_on.register
def _(event: FromPeer, state: SecondaryState) -> Step:
    if event.link != state.link or state.failover is not None:
        # A frame of a connection that was fenced or closed meanwhile.
        return state, ()
    return messages.from_peer(event.message, state)


@_on.register
def _(event: TargetsReady, state: SecondaryState) -> Step:
    state = replace(state, undo=None, fresh=event.fresh, position=0)
    return state, turns.reply(state, m.SyncReady(event.fresh))


@_on.register
def _(event: TargetsReopened, state: SecondaryState) -> Step:
    return state, turns.reply(state, m.SyncResumed(True, state.position, state.fresh))


@_on.register
def _(event: ImagesFlushed, state: SecondaryState) -> Step:
    state = replace(state, flushed=True, position=max(state.position, event.position))
    return state, turns.reply(state, m.SyncFlushed(event.position))


@_on.register
def _(event: Staged, state: SecondaryState) -> Step:
    state = replace(state, tables=(*state.tables, (event.epoch, turns.disks_of(state, event.epoch))))
    state = turns.settle(turns.with_doubts(state, (*ask.in_doubt(state), event.epoch)))
    commit = (CommitEpoch(event.epoch),) if state.memory == event.epoch else ()
    return state, (*turns.reply(state, m.EpochStaged(event.epoch)), *commit)


@_on.register
def _(event: CommitDone, state: SecondaryState) -> Step:
    later = tuple(epoch for epoch in ask.in_doubt(state) if epoch > event.epoch)
    state = replace(
        turns.with_doubts(state, later),
        disks=turns.disks_of(state, event.epoch),
        committed=event.epoch,
        consistent=True,
        fresh=(),
        position=0,
        flushed=False,
        may_sync=False,
        # Without a link nobody knows what the primary has meanwhile.
        behind=state.link is None,
        reason=state.reason if state.link is None else "",
    )
    if state.failover is not None:
        return state, (FinishFailover(state.failover),)
    answer = () if state.committing is None else (Answer(state.committing, event.epoch),)
    state = turns.settle(replace(state, committing=None))
    return state, (*turns.reply(state, m.Committed(event.epoch)), *answer, WakeApply())


@_on.register
def _(event: Compared, state: SecondaryState) -> Step:
    asked = state.comparing
    assert asked is not None
    differ = m.BlocksDiffer(asked.disk, asked.offset, event.differing)
    return replace(state, comparing=None), turns.reply(state, differ)


@_on.register
def _(event: AbortDone, state: SecondaryState) -> Step:
    state = turns.with_doubts(state, tuple(epoch for epoch in ask.in_doubt(state) if epoch != event.epoch))
    if state.failover is not None:
        return state, ()
    if state.receiving is None:
        state = turns.settle(state)
    return state, turns.reply(state, m.EpochAborted(event.epoch))


@_on.register
def _(event: StoreFailed, state: SecondaryState) -> Step:
    if state.failover is not None:
        return failover.stuck(replace(state, poisoned=state.poisoned or event.lasting), event.text)
    if state.undo is not None:
        # The full sync did not begin: what was there before it still is.
        state = state.undo
    state = replace(
        state,
        failed=state.failed or event.lasting,
        poisoned=state.poisoned or event.lasting,
        reason=event.text,
    )
    if state.committing is not None:
        unknown = CommitInDoubt(
            f"whether the commit became durable is not known: {event.text}",
            safe="the epoch is kept, and the checkpoint before it",
            hint="the secondary finds out as soon as its storage works again; then say memory-received once more",
        )
        answer = Answer(state.committing, error=unknown)
        after, effects = _store_failed(replace(state, committing=None), event)
        return after, (*effects, answer)
    return _store_failed(state, event)


def _store_failed(state: SecondaryState, event: StoreFailed) -> Step:
    receiving, asked = state.receiving, state.comparing
    state = replace(state, comparing=None)
    if event.lasting:
        state, repair = failed_again(state)
        closing: tuple[Effect, ...] = ()
        if state.link is not None:
            state, closing = turns.hang_up(state, event.code, event.text)
        return state, (*closing, *repair)
    if receiving is None or state.link is None:
        if state.link is None:
            return state, ()
        return turns.hang_up(state, event.code, event.text)
    refused = turns.reply(state, m.EpochRefused(receiving[0], event.code, event.text))
    answer = () if asked is None else turns.cannot_tell(state, asked)
    # Where the journal has no room, the primary's operator may give up the checkpoint for a full copy.
    state = replace(state, may_sync=state.may_sync or event.code is RefusalCode.NO_SPACE)
    return turns.settle(state), (DropUnfinished(), *refused, *answer)


@_on.register
def _(event: Applied, state: SecondaryState) -> Step:
    if state.committed is None or not (state.applied or 0) < event.epoch <= state.committed:
        # Of an earlier generation, or overtaken by a failover.
        return state, ()
    return mended(replace(state, applied=event.epoch))


@_on.register
def _(event: ApplyFailed, state: SecondaryState) -> Step:
    state, repair = failed_again(replace(state, failed=True, reason=event.text))
    if state.link is None:
        return state, repair
    state, closing = turns.hang_up(state, RefusalCode.STORAGE_FAILED, event.text)
    return state, (*closing, *repair)


@_on.register
def _(event: RetryDue, state: SecondaryState) -> Step:
    if state.failover is not None:
        return state, () if event.request is None else (not_repairable(state, event.request),)
    return try_again(state, event.request)


@_on.register
def _(event: Reopened, state: SecondaryState) -> Step:
    asked = state.asked
    state = with_found(state, event.found)
    if state.failover is not None:
        return state, (SaveFailover(state.failover),)
    answers: tuple[Effect, ...] = ()
    if state.committed == state.applied:
        # Else applying what waits has to show first that the images can be written.
        state, answers = mended(state)
    if asked is not None:
        state, effects = _on(asked, state)
        return state, (*answers, *effects)
    return state, (*answers, WakeApply())


_on.register(MemoryReceived, failover.memory_received)
_on.register(FailoverRequested, failover.requested)
_on.register(FailoverSaved, failover.saved)
_on.register(Released, failover.released)
