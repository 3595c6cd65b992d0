"""The planned switch-over, around the primary's machine: ``step(state, event) -> (state, effects)``, as there.

It owns the order in which a running VM is handed over without losing a write, and who resumes it where that fails:

1. The VM is paused (``Hold``).  The guardian resumes it should this controller die, so nothing is at stake.
2. An ordinary epoch is its last one: captured, sent and committed, with the VM standing still.
3. That the secondary is going to be told is made durable; the VM is seen to have written nothing since; from here on
   nobody of ours resumes it (``Stand``).
4. The secondary is told (``HandOver``), decides durably, and answers.

Up to 3 any trouble ends in ``Resume``, and the epoch goes on as any other.  From 4 on a lost answer means *in doubt*,
and the VM stays paused: two VMs must never run.  The next handshake tells.  The secondary drops whatever an older link
has sent as soon as it greets a newer one, so that a secondary which says there that it has not taken over cannot do so
any more because of us.

What may not enter: I/O, clocks, and all that an epoch does by itself (:mod:`qemu_remus.core.primary_machine`'s).
"""

from __future__ import annotations

from typing import Final

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as primary
from qemu_remus.core import primary_turns as turns
from qemu_remus.core import primary_verify as verify
from qemu_remus.core.errors import (
    CommitInDoubt,
    NotProtected,
    OutOfOrder,
    QemuRemusError,
    RefusalCode,
    TimedOut,
)
from qemu_remus.core.frozen import replace
from qemu_remus.core.generation import FailedOver, decide
from qemu_remus.core.model import DiskState, Role
from qemu_remus.core.primary_machine import (
    BitmapRemoved,
    CheckpointDue,
    Connect,
    Disconnect,
    Effect,
    Event,
    FromPeer,
    Handover,
    Held,
    Hold,
    LinkDown,
    LinkRefused,
    LinkUp,
    Phase,
    PrimaryState,
    RemoveBitmaps,
    Resume,
    SaveState,
    Schedule,
    Send,
    Stand,
    Standing,
    Step,
    Stop,
    StopDeadline,
    Switch,
    SwitchReply,
    SwitchRequested,
    SwitchStage,
    SwitchTimeUp,
    WorkFailed,
)

__all__ = ["in_doubt_error", "step"]

_ORDINARY: Final = primary.IN_EPOCH | {Phase.IDLE, Phase.VERIFY, Phase.RETIRE, Phase.MERGE}
"""Phases of a pair that takes one checkpoint after the other."""

_UNCHANGED: Final = "nothing was changed"


def step(state: PrimaryState, event: Event) -> Step:
    """Let one event happen.

    :raise InternalError: when the event cannot happen in this phase: a defect of the shell.
    """
    if isinstance(event, SwitchRequested):
        return _requested(state, event)
    if isinstance(event, SwitchTimeUp):
        return _time_up(state, event)
    if state.phase is Phase.STOPPED:
        return state, ()
    after, effects = _own(state, event) or _look(*primary.step(state, event))
    if after.phase is Phase.WAITING and state.phase is not Phase.WAITING and _undecided(after):
        after = _doubtful(after)
    if after.phase is Phase.STOPPED and _undecided(after):
        # Whoever ends now leaves the VM paused, and must say so.
        effects = tuple(replace(one, doubt=after.handover) if isinstance(one, Stop) else one for one in effects)
        effects = (*_nobody_knows(after), *effects)
        after = replace(after, switch=None)
    return after, effects


def _nobody_knows(state: PrimaryState) -> tuple[Effect, ...]:
    handover = state.handover
    askers = () if state.switch is None else state.switch.askers
    return () if handover is None else tuple(SwitchReply(one, error=in_doubt_error(handover)) for one in askers)


def _undecided(state: PrimaryState) -> bool:
    return state.handover is not None and not state.handover.done


# --- whoever asks ----------------------------------------------------------------------------------------------------


def _requested(state: PrimaryState, event: SwitchRequested) -> Step:
    switch, handover = state.switch, state.handover
    if handover is not None and handover.done:
        return state, (SwitchReply(event.request, handover),)
    if state.phase is not Phase.STOPPED and handover is not None:
        # It was asked for before, perhaps of an earlier controller.
        asked = switch or Switch(SwitchStage.ASKED, (), handover.generation, event.seconds, handover.target)
        return replace(state, switch=replace(asked, askers=(*asked.askers, event.request))), ()
    error = _refused(state, event)
    if error is not None:
        return state, (SwitchReply(event.request, error=error),)
    switch = Switch(SwitchStage.WAITING, (event.request,), event.generation, event.seconds, event.epoch)
    # A verification would begin one epoch after the other ahead of its checkpoint.
    return _look(replace(verify.failed(state, "the VM is being handed over"), switch=switch), ())


def _refused(state: PrimaryState, event: SwitchRequested) -> QemuRemusError | None:
    if state.switch is not None:
        return OutOfOrder("a switch-over is under way", safe=_UNCHANGED, hint="wait for its end")
    if state.phase not in _ORDINARY or not state.linked or not state.protected or state.stopping:
        why = f": {state.reason}" if state.reason else ""
        hint = "switch over when query-replication says that it is protected"
        return NotProtected(f"the VM is not protected now{why}", safe=_UNCHANGED, hint=hint)
    if state.one_step and event.epoch is not None:
        return OutOfOrder(
            "this controller takes its checkpoints by interval, the last one too", safe=_UNCHANGED, hint="name no epoch"
        )
    if not state.one_step and (event.epoch is None or event.epoch != state.committed):
        last = "none" if state.committed is None else state.committed
        return OutOfOrder(
            f"a toolstack takes this VM's checkpoints, and the last committed one is {last}",
            safe=_UNCHANGED,
            hint="pause the VM, commit a checkpoint, keep the VM paused, and name that checkpoint as the epoch",
        )
    if not state.one_step and state.opened is not None:
        return OutOfOrder(
            "a verification has begun an epoch of its own since that checkpoint",
            safe=_UNCHANGED,
            hint="end the verification, commit one more checkpoint, keep the VM paused, and name that checkpoint",
        )
    return None


def _time_up(state: PrimaryState, event: SwitchTimeUp) -> Step:
    switch = state.switch
    if switch is None or event.request not in switch.askers:
        return state, ()
    state = replace(state, switch=replace(switch, askers=tuple(one for one in switch.askers if one != event.request)))
    if switch.stage is SwitchStage.ASKED:
        assert state.handover is not None
        return state, (SwitchReply(event.request, error=in_doubt_error(state.handover)),)
    late = TimedOut(
        "the VM could not be handed over in time",
        safe=_as_before(switch),
        hint="see with query-replication how long an epoch takes; then allow more time",
    )
    given_up, effects = _give_up(state, "there was no more time for it")
    return given_up, (*effects, SwitchReply(event.request, error=late))


def in_doubt_error(handover: Handover) -> CommitInDoubt:
    """The error that says what it means that an answer to a handover is missing."""
    return CommitInDoubt(
        f"the secondary was told to take over at checkpoint {handover.target}, and its answer is not known",
        safe="the VM is left paused, so that two never run; the secondary holds all that it has written",
        hint="it stays paused until the secondary has been asked, which goes on by itself as long as the primary's "
        "controller runs; switchover, given again, waits for the outcome. Resume the VM yourself (cont) only where you "
        "know that the secondary has not taken over, and never will",
    )


def _as_before(switch: Switch) -> str:
    return "the VM runs on, and replication goes on" if switch.ours else "the VM is as it was; replication goes on"


# --- before the secondary is told ------------------------------------------------------------------------------------


def _look(state: PrimaryState, effects: tuple[Effect, ...]) -> Step:
    """See whether the machine has come to where the switch-over goes on, or cannot."""
    switch = state.switch
    if switch is None:
        return state, effects
    if switch.stage is SwitchStage.WAITING:
        if state.phase not in _ORDINARY or not state.linked or state.stopping or switch.given_up:
            return _also_give_up(state, effects, state.reason)
        if state.phase is not Phase.IDLE or not state.protected or state.doubt is not None or state.opened is not None:
            return state, effects
        if switch.epoch is not None:
            return _stand(state, effects)
        state = replace(state, phase=Phase.HOLD, switch=replace(switch, stage=SwitchStage.HOLDING))
        return state, (*_without_timer(effects), Hold(switch.seconds))
    if switch.stage is not SwitchStage.LAST:
        return state, effects
    if state.phase is Phase.IDLE and state.committed == switch.epoch and not switch.given_up:
        return _stand(state, effects)
    if state.phase is Phase.CAPTURE:
        # While nodes are being put in the VM must not be resumed.
        return state, effects
    under_way = state.phase in {Phase.TRANSFER, Phase.STAGE, Phase.RETIRE} and state.linked
    if under_way and not (state.refused or state.stopping or switch.given_up):
        return state, effects
    return _also_give_up(state, effects, state.reason)


def _without_timer(effects: tuple[Effect, ...]) -> tuple[Effect, ...]:
    return tuple(effect for effect in effects if not isinstance(effect, Schedule))


def _also_give_up(state: PrimaryState, effects: tuple[Effect, ...], reason: str) -> Step:
    """Give it up; the guest comes first."""
    state, more = _give_up(state, reason)
    return state, (*more, *effects)


def _give_up(state: PrimaryState, reason: str) -> Step:
    """Before the secondary was told: the VM is resumed at once, or as soon as what is done to its graph has ended.

    What is under way goes on, as though nobody had asked for a switch-over.
    """
    switch = state.switch
    assert switch is not None
    reason = switch.given_up or reason or "the replication did not go on"
    if state.phase in {Phase.HOLD, Phase.STAND} or (state.phase is Phase.CAPTURE and switch.stage is SwitchStage.LAST):
        return replace(state, switch=replace(switch, given_up=reason)), ()
    why = NotProtected(
        f"the VM was not handed over: {reason}",
        safe=_as_before(switch),
        hint="when query-replication says that it is protected, try again",
    )
    replies = tuple(SwitchReply(asker, error=why) for asker in switch.askers)
    forget = () if state.handover is None else (SaveState(),)
    resume = (Resume(),) if switch.ours else ()
    return replace(state, switch=None, handover=None), (*resume, *forget, *replies)


def _give_up_and_go_on(state: PrimaryState, reason: str) -> Step:
    """The same at the end of a piece of work of our own, with nothing else under way."""
    given_up, effects = _give_up(replace(state, phase=Phase.IDLE), reason)
    after, more = turns.idle(given_up)
    return after, (*effects, *more)


def _own(state: PrimaryState, event: Event) -> Step | None:
    """What only happens in a switch-over; None: the machine's own business."""
    match state.phase:
        case Phase.HOLD:
            return _holding(state, event)
        case Phase.STAND:
            return _standing(state, event)
        case Phase.HANDOVER:
            return _asked(state, event)
        case Phase.HANDED_OVER if isinstance(event, BitmapRemoved | WorkFailed):
            return _ended(state)
        case Phase.WAITING if _undecided(state):
            return _in_doubt(state, event)
    return None


def _holding(state: PrimaryState, event: Event) -> Step | None:
    switch = state.switch
    assert switch is not None
    if isinstance(event, WorkFailed):
        return _give_up_and_go_on(state, event.reason)
    if not isinstance(event, Held):
        return None
    switch = replace(switch, ours=event.ours)
    state = replace(state, switch=switch)
    if switch.given_up or not state.linked or state.stopping:
        return _give_up_and_go_on(state, state.reason)
    assert state.recording is not None
    switch = replace(switch, stage=SwitchStage.LAST, epoch=state.recording.epoch)
    return primary.step(replace(state, phase=Phase.IDLE, switch=switch), CheckpointDue(pause=False))


def _stand(state: PrimaryState, effects: tuple[Effect, ...]) -> Step:
    """The last epoch is committed: make the pause final.

    First what is going to be said becomes durable: who finds the VM paused later must know why.
    """
    switch, recording = state.switch, state.recording
    assert switch is not None
    assert switch.epoch is not None
    assert recording is not None
    handover = Handover(switch.epoch, switch.generation, ours=switch.ours)
    state = replace(state, phase=Phase.STAND, switch=replace(switch, stage=SwitchStage.STANDING), handover=handover)
    return state, (*_without_timer(effects), SaveState(), Stand(recording))


def _standing(state: PrimaryState, event: Event) -> Step | None:
    switch, handover = state.switch, state.handover
    assert switch is not None
    assert handover is not None
    if isinstance(event, WorkFailed):
        return _give_up_and_go_on(state, event.reason)
    if not isinstance(event, Standing):
        return None
    if switch.given_up or not state.linked or state.stopping:
        return _give_up_and_go_on(state, state.reason)
    reason = f"the VM is paused, and being handed over at checkpoint {handover.target}"
    state = replace(
        state, phase=Phase.HANDOVER, switch=replace(switch, stage=SwitchStage.ASKED), protected=False, reason=reason
    )
    return state, (Send(m.HandOver(handover.target, handover.generation)),)


# --- after it --------------------------------------------------------------------------------------------------------


def _asked(state: PrimaryState, event: Event) -> Step | None:
    handover = state.handover
    assert handover is not None
    if isinstance(event, StopDeadline):
        return _end(replace(state, hurry=True), Stop())
    if not isinstance(event, FromPeer):
        # A lost link is the machine's to mend.
        return None
    match event.message:
        case m.HandedOver(epoch=epoch) if epoch == handover.target:
            return _done(state, complete=True)
        case m.HandoverRefused(epoch=epoch, text=text) if epoch == handover.target:
            return _not_taken(state, text)
        case m.Goodbye(text=text):
            # Whatever it says, the next hello says it better.
            return primary.step(state, LinkDown(text))
    return None


def _doubtful(state: PrimaryState, why: str = "") -> PrimaryState:
    assert state.handover is not None
    target = state.handover.target
    text = f"the VM is paused: whether the secondary has taken over at checkpoint {target} is not known"
    return replace(state, reason=f"{text} ({why})" if why else text)


def _in_doubt(state: PrimaryState, event: Event) -> Step | None:
    handover = state.handover
    assert handover is not None
    if isinstance(event, LinkRefused):
        return _doubtful(state, event.goodbye.text), ()
    if not isinstance(event, LinkUp):
        return None
    theirs = event.theirs
    verdict = decide(event.ours, theirs)
    if isinstance(verdict, FailedOver):
        return _done(state, complete=theirs.disk_state is DiskState.UP_TO_DATE)
    same = theirs.generation == state.generation and theirs.committed == handover.target
    if theirs.role is Role.SECONDARY and same and theirs.disk_state is not DiskState.FAILED:
        resumed, effects = _not_taken(replace(state, phase=Phase.WAITING), "it has not taken over")
        after, more = primary.step(resumed, event)
        return after, (*effects, *more)
    text = "the secondary cannot say whether it has taken over"
    if theirs.disk_state is not DiskState.FAILED:
        text = "whoever answers there is not the secondary that was told to take over"
    return _doubtful(state, text), (Disconnect(RefusalCode.SHUTTING_DOWN, text), Connect())


def _not_taken(state: PrimaryState, reason: str) -> Step:
    """The secondary has not decided, and will not: the VM runs on."""
    handover = state.handover
    assert handover is not None
    switch = state.switch or Switch(SwitchStage.ASKED, (), handover.generation, 0.0)
    state = replace(state, switch=replace(switch, ours=handover.ours, given_up=""))
    if state.phase is Phase.WAITING:
        return _give_up(state, reason)
    return _give_up_and_go_on(state, reason)


def _done(state: PrimaryState, *, complete: bool) -> Step:
    """The secondary has taken over: the VM stays paused for good, its disks are the past."""
    assert state.handover is not None
    handover = replace(state.handover, done=True)
    askers = () if state.switch is None else state.switch.askers
    state = replace(
        state,
        phase=Phase.HANDED_OVER,
        handover=handover,
        switch=None,
        protected=False,
        reason=f"handed over at checkpoint {handover.target}: the VM's present is on the secondary, here is its past",
    )
    effects: tuple[Effect, ...] = (SaveState(), *(SwitchReply(asker, handover, complete) for asker in askers))
    if state.recording is None:
        after, more = _ended(state)
        return after, (*effects, *more)
    return state, (*effects, RemoveBitmaps((state.recording,)))


def _ended(state: PrimaryState) -> Step:
    """Bitmaps that could not be removed are of no use to anybody, and go with the paused VM's QEMU."""
    return _end(replace(state, recording=None), Stop())


def _end(state: PrimaryState, stop: Stop) -> Step:
    code = RefusalCode.FAILED_OVER if state.handover is not None and state.handover.done else RefusalCode.SHUTTING_DOWN
    goodbye = (Disconnect(code, state.reason),) if state.linked else ()
    return replace(state, phase=Phase.STOPPED, linked=False), (*goodbye, SaveState(), stop)
