"""The turns that the primary takes, whatever event brought it there: to wait, to connect anew, to merge, to go on.

The half of :mod:`qemu_remus.core.primary_machine` behind its events.  Pure.  Each takes the state and gives the next
one with its effects; whether it may be taken now, the event's own step has seen.
"""

from __future__ import annotations

from typing import Final

from qemu_remus.core import messages as m
from qemu_remus.core import primary_disks as disks
from qemu_remus.core import primary_questions as ask
from qemu_remus.core import primary_verify as verify
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.frozen import replace
from qemu_remus.core.generation import Refusal
from qemu_remus.core.model import Base, EpochNumber, Generation
from qemu_remus.core.primary_effects import (
    CancelWork,
    Connect,
    CopyAhead,
    Disconnect,
    Effect,
    MergeBack,
    SaveState,
    Schedule,
    Send,
    StartTracking,
    Step,
    Stop,
)
from qemu_remus.core.primary_events import Surveyed
from qemu_remus.core.primary_model import WORKING, Doubt, Opened, Phase, PrimaryState, Recording, Wish

COPY_AHEAD_BYTES: Final = 16 << 20
"""Dirty bytes, gathered during an outage, from which on they are copied ahead of the next checkpoint."""

ENDED: Final = frozenset({Phase.STAGE, Phase.STAGED, Phase.COMMIT, Phase.ABORT})
"""Phases in which an epoch has had its end, so that the secondary may have staged it."""


def take_over(
    state: PrimaryState, old: tuple[Recording, ...], generation: Generation, *, complete: bool = False
) -> Step:
    """Fold these bitmaps into a new one, which records from now on."""
    epoch = ask.next_epoch(state)
    into = Recording(generation, None, epoch)
    state = replace(state, recording=into, finished=None, ahead=None, opened=None, highest=epoch)
    return state, (SaveState(), MergeBack(old, generation, epoch, complete))


def wait_for_link(state: PrimaryState) -> Step:
    """Have the next link; disks that are to be looked at are looked at first."""
    if state.stopping:
        return stopped(state)
    state = replace(state, linked=False, synced=False, protected=False)
    if disks.to_be_surveyed(state):
        return disks.survey(state)
    connect = () if state.calling else (Connect(),)
    return replace(state, phase=Phase.WAITING, calling=True), connect


def reconnect(state: PrimaryState, code: RefusalCode, text: str) -> Step:
    """This link leads nowhere; the next one begins with a handshake."""
    if state.stopping:
        return stopped(state)
    waiting, effects = wait_for_link(state)
    return waiting, (Disconnect(code, text), *effects)


def to_be_surveyed(state: PrimaryState) -> Step:
    """At once, where nothing is under way; else when that has ended, which a copy of whole disks does now."""
    if state.phase in {Phase.IDLE, Phase.WAITING} and not state.stopping:
        return disks.survey(state)
    if state.phase in {Phase.SYNC_COPY, Phase.AHEAD}:
        return state, (CancelWork(),)
    return state, ()


def follow_disks(event: Surveyed, state: PrimaryState) -> Step:
    """Go on with other disks: whatever was recorded of them becomes one bitmap, and the next link begins with them."""
    goodbye = (Disconnect(RefusalCode.SHUTTING_DOWN, disks.CHANGED),) if state.linked else ()
    if not event.disks:
        return stopped(state, reason="the VM has no disk left that can be protected")
    state = verify.failed(disks.followed(state, event.disks, event.news), event.news)
    found = tuple(one.recording for each in event.found for one in each)
    own = tuple(one for one in (state.ahead, state.finished, state.recording) if one is not None)
    old = tuple(dict.fromkeys((*own, *found)))
    if not old:
        waiting, effects = wait_for_link(state)
        return waiting, (*goodbye, *effects)
    recording = state.recording
    generation = recording.generation if recording is not None else state.generation or old[0].generation
    adopting, effects = take_over(replace(state, phase=Phase.ADOPTING), old, generation)
    return adopting, (*goodbye, *effects)


def idle(state: PrimaryState) -> Step:
    """The graph is clean and one bitmap records: go on with whatever is next."""
    if not state.linked:
        return wait_for_link(state)
    if state.stopping:
        return stopped(state)
    if disks.to_be_surveyed(state):
        return disks.survey(state)
    if state.doubt is not None and state.doubt.wish is not Wish.NONE:
        return resolve(state, state.doubt.wish)
    if state.spare is not None and may_begin_anew(state):
        return begin_sync(state, state.spare)
    if lags(state):
        return copy_ahead(state)
    slices = verify.schedule(state)
    # A toolstack has a clock of its own.
    return replace(state, phase=Phase.IDLE), (*slices, Schedule(state.failures)) if state.one_step else slices


def stopped(state: PrimaryState, refusal: Refusal | None = None, reason: str = "") -> Step:
    """The end, with a goodbye where somebody listens."""
    text = refusal.diagnosis.what if refusal is not None else reason or "the primary's controller is stopping"
    code = refusal.code if refusal is not None else RefusalCode.SHUTTING_DOWN
    goodbye = (Disconnect(code, text),) if state.linked or refusal is not None else ()
    ended = replace(verify.failed(state, text), phase=Phase.STOPPED, linked=False, protected=False, reason=text)
    return ended, (*goodbye, SaveState(), Stop(refusal, state.refusal, reason))


def merge(state: PrimaryState, reason: str, *, count: bool = True) -> Step:
    """The epoch failed: its bitmap goes back into a recording one that keeps the older base."""
    assert state.recording is not None
    old = tuple(one for one in (state.ahead, state.finished, state.recording) if one is not None)
    failures = state.failures + 1 if count else state.failures
    # On this link the next epoch can still complete the full sync; no later link takes it up.
    unfinished = state.synced and state.linked and not state.stopping
    generation = state.recording.generation
    # What the toolstack itself drops, it has not released.
    protected = state.protected and state.aborted and state.linked
    state = replace(
        verify.epoch_lost(state),
        phase=Phase.MERGE,
        failures=failures,
        protected=protected,
        reason="" if protected else reason,
    )
    return take_over(state, old, generation, complete=unfinished)


def unknown(state: PrimaryState) -> tuple[int, ...]:
    """The disks of which nobody recorded everything since the secondary's checkpoint."""
    committed = state.committed
    assert committed is not None
    return tuple(
        place for place, base in enumerate(state.reach) if base is None or base > committed or place in state.added
    )


def far_behind(state: PrimaryState) -> bool:
    """Much has changed since the secondary's checkpoint, or blocks have to be compared; until the next commit."""
    if state.synced or state.committed is None:
        return False
    return state.bulky or bool(state.grown) or bool(unknown(state))


def lags(state: PrimaryState) -> bool:
    """What is to be sent goes ahead of the next checkpoint, and has not gone yet."""
    return state.opened is None and state.doubt is None and far_behind(state)


def may_begin_anew(state: PrimaryState) -> bool:
    """The difference does not fit into the journal, and a full copy in its place is allowed and possible."""
    return state.crowded and state.allow_full_resync and state.spare is not None


def copy_ahead(state: PrimaryState) -> Step:
    """Send what has gathered ahead of the next checkpoint, while the VM runs."""
    finished, generation, committed = state.recording, state.generation, state.committed
    assert generation is not None
    following = Recording(generation, None if finished is None else finished.epoch, ask.next_epoch(state))
    state = replace(
        state,
        phase=Phase.AHEAD,
        ahead=finished,
        recording=following,
        opened=Opened(),
        highest=following.epoch,
        refused=False,
        aborted=False,
        reason="what has changed meanwhile is being sent",
    )
    begin = Send(m.EpochBegin(following.epoch, committed))
    compare = unknown(state)
    grown = tuple(one for one in state.grown if one[0] not in compare)
    return state, (SaveState(), begin, CopyAhead(finished, following, compare, grown))


FIRST_COPY = "the first copy of the disks is not complete"


def first_is_staged(state: PrimaryState, theirs: m.Hello) -> bool:
    """The epoch that completes the full sync waits for the toolstack's word: it saves another copy."""
    recording = state.recording
    if state.one_step or recording is None or theirs.staged is None:
        return False
    reaches = recording.base is not None and recording.base <= theirs.staged
    return reaches and recording.generation == state.generation == theirs.generation


def may_go_on(state: PrimaryState, theirs: m.Hello) -> bool:
    """The secondary may hold a part of a full sync, and all that changed since that began is recorded."""
    since = state.since
    ours = since is not None and since == state.recording and since.generation == state.generation
    untouched = theirs.committed is None and theirs.staged is None and state.committed is None
    return ours and untouched and theirs.generation == state.generation


def settle_doubt(state: PrimaryState, staged: Base) -> Step:
    """Carry out what the toolstack wants of an epoch that the secondary has staged and not committed."""
    known = state.doubt
    if state.one_step or staged is None or staged <= (state.committed or 0):
        doubt = None
    else:
        doubt = Doubt(staged, known.wish if known is not None and known.epoch == staged else Wish.NONE)
        state = replace(state, staged=staged)
    after, effects = idle(replace(state, doubt=doubt))
    return after, (SaveState(), *effects)


def in_doubt(state: PrimaryState) -> PrimaryState:
    """The epoch had its end and no answer comes any more.

    The secondary may hold it until a later one is committed, and may be told to commit it by the toolstack there.
    """
    finished = state.finished
    if state.one_step or state.refused or finished is None or state.phase not in ENDED:
        return state
    wish = {Phase.COMMIT: Wish.COMMIT, Phase.ABORT: Wish.ABORT}.get(state.phase, Wish.NONE)
    return replace(state, doubt=Doubt(finished.epoch, wish, staged=state.staged == finished.epoch))


def resolve(state: PrimaryState, wish: Wish) -> Step:
    """Commit or abort an epoch whose bitmap is merged back already: the next one is a superset, whatever comes."""
    assert state.doubt is not None
    epoch = state.doubt.epoch
    state = replace(state, doubt=Doubt(epoch, wish))
    if wish is Wish.COMMIT:
        return replace(state, phase=Phase.COMMIT), (Send(m.CommitEpoch(epoch)),)
    return replace(state, phase=Phase.ABORT), (Send(m.AbortEpoch(epoch)),)


def resolved(state: PrimaryState, *, committed: bool) -> Step:
    """The secondary has said what became of the epoch in doubt."""
    assert state.doubt is not None
    if committed:
        # The difference to the primary's disks is in the recording bitmap: protected again with the next epoch.
        state = replace(state, committed=state.doubt.epoch)
    state = replace(state, doubt=None)
    if state.phase not in {Phase.IDLE, Phase.COMMIT, Phase.ABORT} or state.finished is not None:
        return state, ()
    if state.committed is None and not state.stopping:
        return reconnect(state, RefusalCode.SHUTTING_DOWN, FIRST_COPY)
    return (state, ()) if state.phase is Phase.IDLE and not lags(state) else idle(state)


def begin_sync(state: PrimaryState, generation: Generation) -> Step:
    """Every full sync is a new generation, so that nothing older in a journal or a bitmap can be taken for its own.

    It becomes the pair's with the secondary's answer: until then the secondary may still hold a checkpoint of the old
    one, and a primary that named another would be a stranger to it.
    """
    old = state.recording
    state = replace(
        verify.failed(state, "all of the disks are being copied anew"),
        phase=Phase.RENEWING,
        protected=False,
        doubt=None,
        crowded=False,
        # No two full syncs share one, whatever becomes of this link.
        spare=None,
        reach=(None,) * len(state.disks),
        since=None,
        reason="the disks are being copied",
    )
    if old is not None:
        return take_over(state, (old,), generation, complete=True)
    recording = Recording(generation, None, ask.next_epoch(state))
    state = replace(state, recording=recording, highest=recording.epoch)
    return state, (SaveState(), StartTracking(recording))


def tracking(state: PrimaryState) -> Step:
    """Everything is recorded from now on: the copy may begin."""
    if not state.linked or state.stopping:
        return wait_for_link(state)
    assert state.recording is not None
    return replace(state, phase=Phase.SYNC_BEGIN), (Send(m.SyncBegin(state.recording.generation, state.disks)),)


def whole(state: PrimaryState) -> int:
    """Where a full sync ends, as its position is counted."""
    return max(1, sum(disk.size for disk in state.disks))


def lost(state: PrimaryState, why: str) -> Step:
    """The epoch under way has failed, and nothing of it is in the guest's way."""
    abort: tuple[Effect, ...] = ()
    present = present_epoch(state)
    if state.opened is not None and present is not None and state.linked and not state.refused:
        abort = (Send(m.AbortEpoch(present)),)
    reason = why if state.linked and not state.refused and not state.aborted else state.reason
    merging, effects = merge(state, reason, count=state.linked and not state.aborted)
    return merging, (*abort, *effects)


def present_epoch(state: PrimaryState) -> EpochNumber | None:
    """The epoch that the secondary was told of and has not been told the end of, or that waits for its answer."""
    if state.finished is not None:
        return state.finished.epoch
    return state.recording.epoch if state.opened is not None and state.recording is not None else None


def leave_staged(state: PrimaryState) -> Step:
    """Stop while the toolstack has still to decide: it may have completed this memory, so nothing is aborted."""
    return merge(in_doubt(state), "the primary's controller is stopping", count=False)


def down(state: PrimaryState, reason: str) -> Step:
    """The link has ended."""
    if not state.linked:
        return state, ()
    state = replace(state, linked=False, synced=False, protected=False, reason=reason)
    state = disks.ask_again(state)
    if state.phase in WORKING:
        # Work that needs the link fails by itself; it may hang in QEMU or in a read, so it is told as well.
        cancel = state.phase in {Phase.SYNC_COPY, Phase.AHEAD, Phase.VERIFY, Phase.TRANSFER}
        return state, (CancelWork(),) if cancel else ()
    if state.finished is None and state.opened is None:
        return wait_for_link(state)
    return merge(in_doubt(state), reason, count=False)
