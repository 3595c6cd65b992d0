"""The secondary's failovers, and what its toolstack says: a part of :mod:`qemu_remus.core.secondary_machine`.  Pure.

The first durable act of a failover is its decision: from then on nothing is committed any more.
"""

from __future__ import annotations

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_questions as ask
from qemu_remus.core import secondary_turns as turns
from qemu_remus.core.errors import (
    CommitInDoubt,
    ControlError,
    EpochLost,
    NotConsistent,
    OutOfOrder,
    RefusalCode,
    Refused,
)
from qemu_remus.core.frozen import replace
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.secondary_model import (
    AbortEpoch,
    Answer,
    CloseLink,
    CommitEpoch,
    Effect,
    Failover,
    FailoverRequested,
    FailoverSaved,
    FinishFailover,
    MemoryReceived,
    Phase,
    Released,
    ReopenStore,
    SaveFailover,
    SecondaryState,
    Send,
    Step,
)


def why_not_take_over(state: SecondaryState, message: m.HandOver) -> tuple[RefusalCode, str] | None:
    """Why the VM cannot be handed over at this checkpoint; None where it can."""
    if state.failed or state.poisoned:
        return RefusalCode.STORAGE_FAILED, f"the secondary's store has failed: {state.reason}"
    if state.receiving is not None or ask.in_doubt(state) or state.phase is Phase.SYNC:
        return RefusalCode.PROTOCOL, "an epoch is not decided yet on the secondary"
    if not state.consistent or state.committed != message.epoch:
        held = "no checkpoint" if state.committed is None else f"checkpoint {state.committed}"
        return RefusalCode.BASE_TOO_NEW, f"the secondary holds {held}, not checkpoint {message.epoch}"
    return None


def memory_received(event: MemoryReceived, state: SecondaryState) -> Step:
    """The toolstack here has a checkpoint's memory, whole: its disks are committed, or will be once they have come."""
    epoch = event.epoch
    if state.failover is not None:
        text = "a failover was decided, nothing is committed any more"
        return _deny(state, event, Refused, text, "query-replication says which checkpoint it takes")
    if epoch == state.committed:
        return state, (Answer(event.request, epoch),)
    if state.failed:
        text = f"the store has failed: {state.reason}"
        return _deny(state, event, Refused, text, "keep the memory of this checkpoint and of the one before")
    if epoch in ask.in_doubt(state):
        if state.may_sync:
            # A checkpoint that begins to count now would be copied over without anybody's leave.
            text = "the primary may be about to copy all of the disks"
            return _deny(state, event, Refused, text, "commit it on the primary, which answers whether it still can be")
        if state.receiving is not None:
            later = state.receiving[0]
            text = f"epoch {later} is coming, which holds all of epoch {epoch}"
            return _deny(state, event, OutOfOrder, text, f"epoch {epoch} is kept until a later one is committed")
        return replace(state, memory=epoch, committing=event.request), (CommitEpoch(epoch),)
    if epoch < (state.committed or 0):
        return _deny(state, event, OutOfOrder, f"checkpoint {state.committed} is committed already", "drop that memory")
    if epoch <= state.highest and (state.receiving is None or state.receiving[0] != epoch):
        lost = EpochLost(
            f"the secondary does not have epoch {epoch}",
            safe="the checkpoint before it is kept",
            hint=f"drop the memory of checkpoint {epoch}",
        )
        return state, (Answer(event.request, error=lost),)
    # Its disks are still on their way.
    return replace(state, memory=epoch), (Answer(event.request),)


def _deny(state: SecondaryState, event: MemoryReceived, kind: type[ControlError], what: str, hint: str) -> Step:
    return state, (Answer(event.request, error=kind(what, safe="nothing was changed", hint=hint)),)


def _target(state: SecondaryState, event: FailoverRequested) -> EpochNumber | ControlError:
    """The checkpoint that a failover takes, or why it takes none."""
    first = ask.in_doubt(state) if state.committed is None else ()
    if not set(first) & set(event.checkpoints) and (not state.consistent or state.committed is None):
        # A first epoch counts only where the toolstack names it: its sync was flushed before it began.
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
        assert state.committed is not None
        return state.committed
    for checkpoint in event.checkpoints:
        if checkpoint == state.committed or checkpoint in ask.in_doubt(state):
            return checkpoint
    return Refused(
        f"none of the checkpoints asked for can be reached: {', '.join(map(str, event.checkpoints))}",
        safe=f"nothing was changed; these checkpoints can be reached: {_reachable(state)}",
        hint="name one of these with --checkpoint",
    )


def _reachable(state: SecondaryState) -> str:
    staged = "".join(f", {epoch} (staged)" for epoch in ask.in_doubt(state))
    committed = "no committed one" if state.committed is None else f"{state.committed} (committed)"
    return f"{committed}{staged}"


def requested(event: FailoverRequested, state: SecondaryState) -> Step:
    """Somebody asks for a failover."""
    if state.failover is not None:
        return _again(state, event, state.failover)
    if state.poisoned and state.asked is None:
        # What it could be brought to is not known before.
        return replace(state, asked=event), (ReopenStore(),)
    target = _target(state, event)
    if isinstance(target, ControlError):
        return state, (Answer(event.request, error=target),)
    failover = Failover(target, event.generation)
    state = replace(
        state, failover=failover, unsaved=True, phase=Phase.FAILING_OVER, askers=(event.request,), failed=False
    )
    return state, (SaveFailover(failover),)


def stuck(state: SecondaryState, text: str) -> Step:
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
        state, closing = turns.hang_up(state, RefusalCode.STORAGE_FAILED, text)
    return replace(state, failed=True, reason=text, askers=()), (*closing, *answers)


def _again(state: SecondaryState, event: FailoverRequested, failover: Failover) -> Step:
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
    if state.poisoned:
        return again, (ReopenStore(),)
    return again, (SaveFailover(failover),)


def saved(event: FailoverSaved, state: SecondaryState) -> Step:
    """The decision is durable."""
    failover = state.failover
    assert failover is not None
    state = replace(state, unsaved=False)
    effects: tuple[Effect, ...] = ()
    if state.link is not None and not state.handing:
        text = f"the secondary has failed over to checkpoint {failover.target}"
        link = state.link
        state, dropped = turns.drop_link(state, text)
        effects = (*dropped, CloseLink(link, RefusalCode.FAILED_OVER, text))
    # An epoch before the target goes with its commit; one behind it must not come back.
    later = tuple(epoch for epoch in ask.in_doubt(state) if epoch > failover.target)
    effects = (*effects, *(AbortEpoch(epoch) for epoch in later))
    if failover.target in ask.in_doubt(state):
        return state, (*effects, CommitEpoch(failover.target))
    return state, (*effects, FinishFailover(failover))


def released(event: Released, state: SecondaryState) -> Step:
    """The disks are those of the checkpoint, and are let go."""
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
    answers: tuple[Effect, ...] = tuple(Answer(asker, checkpoint=failover.target) for asker in state.askers)
    state = replace(state, askers=())
    if not state.handing or state.link is None:
        return state, answers
    text = f"the secondary has taken over at checkpoint {failover.target}"
    handed = Send(state.link, m.HandedOver(failover.target, failover.generation))
    state, effects = turns.hang_up(replace(state, handing=False), RefusalCode.FAILED_OVER, text)
    return replace(state, reason=""), (handed, *effects, *answers)
