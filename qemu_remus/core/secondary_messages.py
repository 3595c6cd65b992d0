"""What the secondary makes of the primary's messages: a part of :mod:`qemu_remus.core.secondary_machine`.  Pure."""

from __future__ import annotations

from functools import singledispatch

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_failover as failover
from qemu_remus.core import secondary_questions as ask
from qemu_remus.core import secondary_turns as turns
from qemu_remus.core.errors import (
    RefusalCode,
)
from qemu_remus.core.frozen import replace
from qemu_remus.core.secondary_model import (
    AbortEpoch,
    AppendEpoch,
    BeginEpoch,
    CommitEpoch,
    CompareBlocks,
    DropUnfinished,
    Failover,
    FlushImages,
    Phase,
    PrepareTargets,
    ReopenTargets,
    SaveFailover,
    SecondaryState,
    StageEpoch,
    Step,
    WriteImages,
)


@singledispatch
def from_peer(message: object, state: SecondaryState) -> Step:
    """Let one message happen."""
    return turns.hang_up(state, RefusalCode.PROTOCOL, f"a secondary expects no {type(message).__name__}")


@from_peer.register
def _(message: m.Heartbeat, state: SecondaryState) -> Step:
    return state, ()


@from_peer.register
def _(message: m.Goodbye, state: SecondaryState) -> Step:
    return (state, ()) if state.link is None else turns.drop_link(state, message.text)


@from_peer.register
def _(message: m.SyncBegin, state: SecondaryState) -> Step:
    if state.phase not in {Phase.IDLE, Phase.STAGED} or not state.may_sync:
        return turns.hang_up(state, RefusalCode.PROTOCOL, "a full sync cannot begin now")
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
        tables=(),
        memory=None,
        highest=0,
        consistent=False,
        flushed=False,
        behind=True,
        reason="the first copy of the disks is not complete",
    )
    return state, (PrepareTargets(message.generation, message.disks),)


@from_peer.register
def _(message: m.SyncResume, state: SecondaryState) -> Step:
    if state.phase is not Phase.IDLE or not state.may_sync:
        return turns.hang_up(state, RefusalCode.PROTOCOL, "a full sync cannot go on now")
    if not ask.is_interrupted(state, message):
        return state, turns.reply(state, m.SyncResumed(False, 0, ()))
    state = replace(
        state,
        may_sync=False,
        phase=Phase.SYNC,
        flushed=False,
        reason="the first copy of the disks is not complete",
    )
    return state, (ReopenTargets(),)


@from_peer.register
def _(message: m.SyncExtents, state: SecondaryState) -> Step:
    if state.phase is not Phase.SYNC:
        return turns.hang_up(state, RefusalCode.PROTOCOL, "no full sync is under way")
    return replace(state, flushed=False), (WriteImages(message),)


@from_peer.register
def _(message: m.SyncFlush, state: SecondaryState) -> Step:
    if state.phase is not Phase.SYNC:
        return turns.hang_up(state, RefusalCode.PROTOCOL, "no full sync is under way")
    return state, (FlushImages(message.token),)


@from_peer.register
def _(message: m.EpochBegin, state: SecondaryState) -> Step:
    if state.receiving is not None or state.phase not in {Phase.IDLE, Phase.STAGED, Phase.SYNC}:
        return turns.hang_up(state, RefusalCode.PROTOCOL, "an epoch cannot begin now")
    if not ask.fits(state, message):
        held = "no checkpoint" if state.committed is None else f"checkpoint {state.committed}"
        text = (
            f"epoch {message.epoch} on base {'none' if message.base is None else message.base} does not apply: "
            f"the secondary holds {held}"
        )
        return state, turns.reply(state, m.EpochRefused(message.epoch, RefusalCode.BASE_TOO_NEW, text))
    state = replace(
        state,
        phase=Phase.EPOCH,
        receiving=(message.epoch, message.base),
        highest=max(state.highest, message.epoch),
    )
    return state, (BeginEpoch(message.epoch, message.base, state.arriving),)


@from_peer.register
def _(message: m.EpochExtents, state: SecondaryState) -> Step:
    if state.receiving is None or state.receiving[0] != message.epoch:
        # The rest of an epoch that was refused.
        return state, ()
    return state, (AppendEpoch(message),)


@from_peer.register
def _(message: m.CompareBlocks, state: SecondaryState) -> Step:
    if state.receiving is None and state.phase is not Phase.SYNC:
        # Of an epoch that was refused. Every question is answered, so that the next one's answer is known.
        return state, turns.cannot_tell(state, message)
    return replace(state, comparing=message), (CompareBlocks(message),)


@from_peer.register
def _(message: m.EpochEnd, state: SecondaryState) -> Step:
    if state.receiving is None or state.receiving[0] != message.epoch:
        return state, ()
    return state, (StageEpoch(message),)


@from_peer.register
def _(message: m.CommitEpoch, state: SecondaryState) -> Step:
    if message.epoch == state.committed:
        return state, turns.reply(state, m.Committed(message.epoch))
    if state.receiving is not None:
        return turns.hang_up(state, RefusalCode.PROTOCOL, "an epoch cannot be committed while another is coming")
    if message.epoch not in ask.in_doubt(state):
        return turns.hang_up(
            state, RefusalCode.PROTOCOL, f"epoch {message.epoch} is not staged, it cannot be committed"
        )
    return state, (CommitEpoch(message.epoch),)


@from_peer.register
def _(message: m.AbortEpoch, state: SecondaryState) -> Step:
    aborted = turns.reply(state, m.EpochAborted(message.epoch))
    state = replace(state, memory=None if state.memory == message.epoch else state.memory)
    if state.receiving is not None and state.receiving[0] == message.epoch:
        return turns.settle(state), (DropUnfinished(), *aborted)
    if message.epoch in ask.in_doubt(state):
        return state, (AbortEpoch(message.epoch),)
    if message.epoch == state.committed:
        # The toolstack here was quicker.
        return state, turns.reply(state, m.Committed(message.epoch))
    return state, aborted


@from_peer.register
def _(message: m.HandOver, state: SecondaryState) -> Step:
    refused = failover.why_not_take_over(state, message)
    if refused is not None:
        code, text = refused
        return state, turns.reply(state, m.HandoverRefused(message.epoch, code, text))
    decided = Failover(message.epoch, message.generation)
    state = replace(state, failover=decided, unsaved=True, handing=True, phase=Phase.FAILING_OVER)
    return state, (SaveFailover(decided),)
