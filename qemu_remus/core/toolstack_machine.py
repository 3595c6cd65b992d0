"""The toolstack's commands around the primary's machine: ``step(state, event) -> (state, effects)``, as there.

It owns who waits for an answer, and what the end of an epoch is called.  A command that waits is looked at again after
every step.  What may not enter: I/O, clocks, what a command is answered (:mod:`qemu_remus.core.toolstack_table`'s), and
what an epoch does by itself (:mod:`qemu_remus.core.primary_machine`'s).

An error changes nothing.  A time-out changes nothing either, but what was begun goes on: the command can be repeated.
Only an epoch that a late ``start-new-epoch`` has begun is aborted, since nobody knows its number.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Final

from qemu_remus.core import primary_machine as primary
from qemu_remus.core import switchover_machine as switchover
from qemu_remus.core.errors import OutOfOrder, QemuRemusError
from qemu_remus.core.frozen import replace
from qemu_remus.core.primary_machine import Phase, PrimaryState, Wish
from qemu_remus.core.toolstack_table import (
    NOBODY,
    REMEMBERED,
    UNCHANGED,
    WAIT,
    Effect,
    Ended,
    Event,
    Fate,
    Kind,
    Reply,
    Request,
    Standing,
    Step,
    TimeUp,
    ToolstackState,
    decide,
    standing,
    too_late,
)

__all__ = [
    "WAIT",
    "Effect",
    "Ended",
    "Event",
    "Fate",
    "Kind",
    "Reply",
    "Request",
    "Standing",
    "Step",
    "TimeUp",
    "ToolstackState",
    "decide",
    "standing",
    "step",
]


def step(state: ToolstackState, event: Event) -> Step:
    """Let one event happen.

    :raise InternalError: when the event cannot happen in this phase: a defect of the shell.
    """
    if isinstance(event, Request):
        return _look(replace(state, waiting=(*state.waiting, event)))
    if isinstance(event, TimeUp):
        return _give_up(state, event)
    after, effects = _feed(state, event)
    if isinstance(event, primary.NotCaptured):
        # Whoever asked is told why; its number goes to the next one.
        refused = partial(OutOfOrder, event.reason, safe=UNCHANGED, hint="pause the VM first, or ask for a pause")
        mistaken = [r for r in after.waiting if r.kind is Kind.START and r.epoch is not None]
        after = _without(after, {request.number for request in mistaken})
        effects = (*effects, *(Reply(request.number, error=refused()) for request in mistaken))
    looked, more = _look(after)
    # A VM may be paused for as long as its answer takes.
    caused = (*effects, *more)
    replies = tuple(effect for effect in caused if isinstance(effect, Reply))
    return looked, (*replies, *(effect for effect in caused if not isinstance(effect, Reply)))


def _give_up(state: ToolstackState, event: TimeUp) -> Step:
    late = [request for request in state.waiting if request.number == event.number]
    state = _without(state, {event.number})
    # Nobody has its number to commit or abort it with.
    orphans = tuple(Request(NOBODY, Kind.ABORT, r.epoch) for r in late if r.kind is Kind.START and r.epoch is not None)
    state = replace(state, waiting=(*state.waiting, *orphans))
    return state, tuple(Reply(request.number, error=too_late(state, request)) for request in late)


def _without(state: ToolstackState, numbers: set[int]) -> ToolstackState:
    return replace(state, waiting=tuple(request for request in state.waiting if request.number not in numbers))


def _feed(state: ToolstackState, event: primary.Event) -> Step:
    """One event of the primary's machine, and what it means for epochs."""
    before = state.primary
    after, effects = switchover.step(before, event)
    told = tuple(_fates(before, after))
    ended = tuple(one for one in told if one.fate in {Fate.ABORTED, Fate.LOST})
    state = replace(state, primary=after, ended=(*state.ended, *ended)[-REMEMBERED:])
    # Nothing can be done behind the last effect of all.
    return state, (*told, *effects)


def _fates(before: PrimaryState, after: PrimaryState) -> Iterable[Ended]:
    if after.phase is Phase.STAGED and before.phase is not Phase.STAGED and after.staged is not None:
        yield Ended(after.staged, Fate.STAGED)
    committed = after.committed or 0
    gone = before.finished
    settled = {committed} if after.doubt is None else {committed, after.doubt.epoch}
    if gone is not None and gone not in (after.finished, after.recording) and gone.epoch not in settled:
        yield Ended(gone.epoch, Fate.ABORTED) if after.aborted else Ended(gone.epoch, Fate.LOST, after.reason)
    doubt = before.doubt
    if doubt is not None and after.doubt is None and doubt.epoch > committed:
        aborted = doubt.wish is Wish.ABORT
        yield Ended(doubt.epoch, Fate.ABORTED) if aborted else Ended(doubt.epoch, Fate.LOST, _DROPPED)
    if after.committed is not None and after.committed != before.committed:
        yield Ended(after.committed, Fate.COMMITTED)


_DROPPED: Final = "the secondary does not hold it any more"


def _look(state: ToolstackState) -> Step:
    """See which of the waiting requests can be answered, or set something going."""
    effects: list[Effect] = []
    again = True
    while again:
        again = False
        for request in state.waiting:
            verdict = decide(state, request)
            if verdict is WAIT:
                continue
            if isinstance(verdict, QemuRemusError):
                state, reply = _without(state, {request.number}), Reply(request.number, error=verdict)
                effects.append(reply)
            elif verdict is None or isinstance(verdict, int):
                state, reply = _without(state, {request.number}), Reply(request.number, verdict)
                effects.append(reply)
            else:
                if isinstance(verdict, primary.CheckpointDue):
                    state = _name_epoch(state, request)
                state, caused = _feed(state, verdict)
                effects += caused
                again = True
                break
    return state, tuple(effects)


def _name_epoch(state: ToolstackState, request: Request) -> ToolstackState:
    """The checkpoint that is due ends the epoch that is being recorded."""
    recording = state.primary.recording
    assert recording is not None
    named = replace(request, epoch=recording.epoch)
    return replace(state, waiting=tuple(named if one.number == request.number else one for one in state.waiting))
