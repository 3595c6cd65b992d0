"""What the secondary does about a store or an image that could not be written: it tries again, and trusts nothing.

Pure; :mod:`qemu_remus.core.secondary_machine` calls it.  Meanwhile the disks count as failed: primaries are refused,
and the journal is kept.  An image is written again from the last good flush on.  A store whose own writing failed is
closed and opened first, as by a restart, which reads back from the device what it really holds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qemu_remus.core.errors import Refused, StorageError
from qemu_remus.core.secondary_model import (
    Answer,
    Effect,
    ReopenStore,
    ScheduleRetry,
    SecondaryState,
    Step,
    WakeApply,
)

_SAFE: Final = "the journal keeps every committed checkpoint"
_MENDED: Final = "the secondary's storage works again; the primary has not connected yet"


def failed_again(state: SecondaryState) -> Step:
    """The disks have failed, or an attempt to have them work again has: there will be another."""
    answers: tuple[Effect, ...] = tuple(_denied(state, request) for request in state.menders)
    asked = state.asked
    if asked is not None:
        text = f"the store cannot be opened, so that nobody knows which checkpoint it can give: {state.reason}"
        hint = "remove the cause, then ask for the failover again"
        answers = (*answers, Answer(asked.request, error=Refused(text, safe="nothing was changed", hint=hint)))
    state = replace(state, menders=(), asked=None, repairs=state.repairs + 1)
    if state.failover is not None:
        # Its repetition tries again.
        return state, answers
    return state, (*answers, ScheduleRetry(state.repairs))


def try_again(state: SecondaryState, request: int | None) -> Step:
    """See whether it works now; who asks is answered when that is known."""
    if not state.failed:
        return state, () if request is None else (Answer(request, state.committed),)
    if request is not None:
        state = replace(state, menders=(*state.menders, request))
    if not state.poisoned and state.applied == state.committed:
        # All is in the images.
        return mended(state)
    return state, (ReopenStore() if state.poisoned else WakeApply(),)


def mended(state: SecondaryState) -> Step:
    """Something went well: unless anything else is amiss, the disks are good again."""
    if not state.failed or state.poisoned or state.failover is not None:
        return state, ()
    answers = tuple(Answer(request, state.committed) for request in state.menders)
    return replace(state, failed=False, repairs=0, menders=(), reason=_MENDED), answers


def with_found(state: SecondaryState, found: SecondaryState) -> SecondaryState:
    """The store was opened again and holds this: whether a commit that failed became durable is known now."""
    same = found.generation == state.generation
    return replace(
        state,
        disks=found.disks,
        tables=found.tables,
        places=found.places,
        generation=found.generation,
        history=found.history,
        committed=found.committed,
        applied=found.applied,
        staged=found.staged,
        doubted=found.doubted,
        highest=max(state.highest, found.highest) if same else found.highest,
        consistent=found.consistent,
        fresh=found.fresh,
        position=found.position,
        begun=found.begun,
        decided=found.decided,
        memory=state.memory if same else None,
        poisoned=False,
        asked=None,
    )


def not_repairable(state: SecondaryState, request: int) -> Answer:
    """A store that fails over tries again with the failover's repetition."""
    assert state.failover is not None
    return Answer(
        request,
        error=Refused(
            f"a failover to checkpoint {state.failover.target} was decided",
            safe="nothing was changed",
            hint="ask for the same failover again: that tries again",
        ),
    )


def _denied(state: SecondaryState, request: int) -> Answer:
    return Answer(request, error=StorageError(f"it still does not work: {state.reason}", safe=_SAFE))
