"""When the primary's machine has time to verify, and what else that means for it.

What is looked at, and what was found, is :mod:`qemu_remus.core.verification`'s.  What may not enter: the order of
epochs, which is :mod:`qemu_remus.core.primary_machine`'s.

A slice is looked at between two epochs, inside the next one: that is opened ahead of its checkpoint, and the secondary
compares with the checkpoint before it, which the recording bitmap reaches back to.  A checkpoint that falls due
meanwhile waits for the slice's end, for a short while; where the VM stands still already, the slice is ended at once.
"""

from __future__ import annotations

from qemu_remus.core import messages as m
from qemu_remus.core.errors import NotProtected, OutOfOrder, QemuRemusError
from qemu_remus.core.frozen import replace
from qemu_remus.core.primary_effects import (
    Effect,
    InterruptSlice,
    ScheduleVerify,
    Send,
    Step,
    VerifyAnswered,
    VerifySlice,
)
from qemu_remus.core.primary_events import MakeWay, SliceVerified, VerifyCancelled, VerifyRequested
from qemu_remus.core.primary_model import Opened, Phase, PrimaryState
from qemu_remus.core.verification import Ending, Verification, begun, committed, ended, looked, lost, next_piece

UNCHANGED = "nothing was changed"


def verifying(state: PrimaryState) -> bool:
    """A verification goes on, or waits until it can."""
    return state.verification is not None and state.verification.going_on


def suspended(state: PrimaryState) -> bool:
    """A verification waits until the VM is protected again."""
    return verifying(state) and not comparable(state)


def comparable(state: PrimaryState) -> bool:
    """The secondary's last checkpoint is known, and the bitmaps hold everything that was written since."""
    base = state.committed
    known = base is not None and all(reach is not None and reach <= base for reach in state.reach)
    return state.linked and state.protected and known and state.doubt is None and not state.synced


def requested(state: PrimaryState, event: VerifyRequested) -> Step:
    """Begin a verification."""
    error = _refusal(state)
    order = event.order
    now = {place: (disk.name, disk.size) for place, disk in enumerate(state.disks)}
    meant = {place: (name, size) for place, name, size in zip(order.disks, order.names, order.sizes, strict=False)}
    if error is None and not meant.items() <= now.items():
        error = OutOfOrder("the VM's disks have just changed", safe=UNCHANGED, hint="give the command again")
    if error is not None:
        return state, (VerifyAnswered(event.order.number, error),)
    state = replace(state, verification=Verification(event.order))
    return state, (VerifyAnswered(event.order.number), *(schedule(state) if state.phase is Phase.IDLE else ()))


def _refusal(state: PrimaryState) -> QemuRemusError | None:
    if verifying(state):
        return OutOfOrder(
            "a verification is under way",
            safe="it goes on",
            hint="query-replication says how far it is; verify-cancel ends it",
        )
    if state.stopping or not comparable(state):
        why = f": {state.reason}" if state.reason else ""
        return NotProtected(
            f"there is no checkpoint to compare with now{why}",
            safe=UNCHANGED,
            hint="verify when the VM is protected; a resync compares by itself what it cannot know",
        )
    return None


def cancelled(state: PrimaryState, event: VerifyCancelled) -> Step:
    """End it early."""
    if state.verification is None or not verifying(state):
        error = OutOfOrder("no verification is under way", safe=UNCHANGED, hint="query-replication says how it ended")
        return state, (VerifyAnswered(event.number, error),)
    state = replace(state, verification=ended(state.verification, Ending.CANCELLED))
    interrupt = (InterruptSlice(patient=False),) if state.phase is Phase.VERIFY else ()
    return state, (VerifyAnswered(event.number), *interrupt)


def schedule(state: PrimaryState) -> tuple[Effect, ...]:
    """Between two epochs: have the next slice begin when there is one and its turn has come."""
    if state.verification is None or not comparable(state) or next_piece(state.verification) is None:
        return ()
    return (ScheduleVerify(state.verification.order, held=state.making_way),)


def due(state: PrimaryState) -> Step:
    """It is time for a slice."""
    verification, recording = state.verification, state.recording
    if state.phase is not Phase.IDLE or verification is None or recording is None or not comparable(state):
        return state, ()
    piece = next_piece(verification)
    if piece is None:
        return state, ()
    begin = () if state.opened is not None else (Send(m.EpochBegin(recording.epoch, state.committed)),)
    opened = state.opened or Opened()
    state = replace(
        state,
        phase=Phase.VERIFY,
        opened=opened,
        refused=False,
        aborted=False,
        making_way=False,
        hurried=False,
        asked=True,
        verification=begun(verification),
    )
    return state, (*begin, VerifySlice(piece, recording, opened, verification.order.repair))


def make_way(state: PrimaryState, event: MakeWay) -> Step:
    """A toolstack is about to pause its VM, or has."""
    if not verifying(state):
        return state, ()
    state = replace(state, making_way=True, hurried=not event.patient)
    if state.phase is Phase.VERIFY:
        return state, (InterruptSlice(event.patient),)
    return state, schedule(state) if state.phase is Phase.IDLE else ()


def verified(state: PrimaryState, event: SliceVerified) -> PrimaryState:
    """What a slice has brought."""
    verification = state.verification
    assert verification is not None
    if not state.refused:
        # An epoch that was refused was compared with nothing.
        verification = looked(verification, event.findings)
    if event.problem:
        verification = ended(verification, Ending.FAILED, event.problem)
    return replace(state, opened=event.opened, verification=verification)


def epoch_committed(state: PrimaryState) -> PrimaryState:
    """The secondary has everything that the present epoch carries."""
    verification = state.verification
    if verification is None:
        return state
    return replace(state, asked=False, verification=committed(verification))


def epoch_lost(state: PrimaryState) -> PrimaryState:
    """The present epoch comes to nothing, or to nobody knows what."""
    verification = state.verification
    if verification is None:
        return state
    return replace(state, asked=False, due=False, verification=lost(verification))


def epoch_refused(state: PrimaryState, text: str) -> PrimaryState:
    """The secondary could not take the present epoch.

    Where it was asked to compare, it may not be able to read its disks there; it would be so again and again.
    """
    verification = state.verification
    if verification is None or not state.asked:
        return state
    reason = f"the secondary could not go on with the epoch in which it was to compare: {text}"
    return replace(state, verification=ended(verification, Ending.FAILED, reason))


def failed(state: PrimaryState, reason: str) -> PrimaryState:
    """It can go on no more."""
    verification = state.verification
    return state if verification is None else replace(state, verification=ended(verification, Ending.FAILED, reason))
