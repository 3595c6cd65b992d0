"""What the primary makes of the secondary's messages: a part of :mod:`qemu_remus.core.primary_machine`.  Pure."""

from __future__ import annotations

from functools import singledispatch
from typing import Final

from qemu_remus.core import messages as m
from qemu_remus.core import primary_disks as disks
from qemu_remus.core import primary_turns as turns
from qemu_remus.core import primary_verify as verify
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.frozen import replace
from qemu_remus.core.model import EpochNumber, Generation
from qemu_remus.core.primary_effects import CancelWork, CopyLive, Disconnect, RemoveBitmaps, SaveState, Step
from qemu_remus.core.primary_model import ANSWERING, EPOCHS_AHEAD, LASTING, Phase, PrimaryState

HISTORY_LIMIT: Final = 32
"""Most generations that are remembered: as many as travel in a ask.hello."""


def with_last(state: PrimaryState) -> tuple[tuple[Generation, EpochNumber], ...]:
    """The history with the generation that ends now: whoever still holds something of it is known by that."""
    if state.generation is None or state.committed is None:
        return state.history
    return (*state.history, (state.generation, state.committed))[-HISTORY_LIMIT:]


@singledispatch
def from_peer(message: object, state: PrimaryState) -> Step:
    """Heartbeats and answers that nobody waits for any more change nothing."""
    return state, ()


@from_peer.register
def _(message: m.Goodbye, state: PrimaryState) -> Step:
    # Where the secondary has no room for the first copy, somebody has to make some.
    if message.code in LASTING or (message.code is RefusalCode.NO_SPACE and state.phase is Phase.SYNC_BEGIN):
        state = replace(state, refusal=message, stopping=True)
    return turns.down(state, message.text)


@from_peer.register
def _(message: m.SyncReady, state: PrimaryState) -> Step:
    if state.phase is not Phase.SYNC_BEGIN:
        return state, ()
    recording = state.recording
    assert recording is not None
    # Nothing on the secondary can be built on any more, so that nobody needs what was recorded before.
    state = replace(
        state,
        phase=Phase.SYNC_COPY,
        generation=recording.generation,
        history=with_last(state),
        captured=None,
        staged=None,
        committed=None,
        since=recording,
    )
    return state, (SaveState(), CopyLive(recording, message.fresh))


@from_peer.register
def _(message: m.SyncResumed, state: PrimaryState) -> Step:
    if state.phase is not Phase.SYNC_RESUME:
        return state, ()
    if not message.resumed:
        assert state.spare is not None
        return turns.begin_sync(state, state.spare)
    since = state.since
    assert since is not None
    state = replace(state, phase=Phase.SYNC_COPY, reason="the disks are being copied")
    return state, (CopyLive(since, message.fresh, message.position),)


@from_peer.register
def _(message: m.SyncFlushed, state: PrimaryState) -> Step:
    if state.phase is not Phase.SYNC_FLUSH or message.token != turns.whole(state):
        # One on the way.
        return state, ()
    return turns.idle(replace(state, synced=True))


@from_peer.register
def _(message: m.EpochStaged, state: PrimaryState) -> Step:
    if state.phase is not Phase.STAGE or state.finished is None or message.epoch != state.finished.epoch:
        return state, ()
    state = replace(state, phase=Phase.STAGED, staged=message.epoch)
    if state.stopping:
        return turns.leave_staged(state)
    return state, ()


@from_peer.register
def _(message: m.Committed, state: PrimaryState) -> Step:
    finished, ahead, doubt = state.finished, state.ahead, state.doubt
    if doubt is not None and message.epoch == doubt.epoch:
        return turns.resolved(state, committed=True)
    if state.phase not in turns.ENDED or finished is None or message.epoch != finished.epoch:
        return state, ()
    state = replace(
        verify.epoch_committed(state),
        phase=Phase.RETIRE,
        staged=message.epoch,
        committed=message.epoch,
        news="",
        finished=None,
        ahead=None,
        opened=None,
        bulky=False,
        reach=(message.epoch,) * len(state.disks),
        grown=(),
        added=(),
        uncovered=frozenset(),
        doubt=None,
        synced=False,
        since=None,
        protected=True,
        failures=0,
        reason="",
    )
    remove = RemoveBitmaps((finished,) if ahead is None else (ahead, finished))
    if state.highest - state.saved < EPOCHS_AHEAD // 2:
        return state, (remove,)
    return replace(state, saved=state.highest), (SaveState(), remove)


@from_peer.register
def _(message: m.EpochAborted, state: PrimaryState) -> Step:
    doubt = state.doubt
    if doubt is not None and message.epoch == doubt.epoch:
        return turns.resolved(state, committed=False)
    if state.phase is not Phase.ABORT or state.finished is None or message.epoch != state.finished.epoch:
        return state, ()
    return turns.merge(state, state.reason, count=False)


@from_peer.register
def _(message: m.EpochRefused, state: PrimaryState) -> Step:
    doubt = state.doubt
    if doubt is not None and message.epoch == doubt.epoch:
        return turns.resolved(state, committed=False)
    if message.epoch != turns.present_epoch(state):
        return state, ()
    state = verify.epoch_refused(state, message.text)
    if message.code is RefusalCode.TARGET_UNSUITABLE and state.added:
        # The others go on without them.
        names = tuple(state.disks[place].name for place in state.added)
        state = replace(disks.leave_out(state, names, message.text, ask=False), stale=True)
    # Only a difference that has gathered is too much for a journal that takes every other epoch.
    state = replace(state, crowded=message.code is RefusalCode.NO_SPACE and turns.far_behind(state))
    if message.code is RefusalCode.BASE_TOO_NEW:
        # One side is wrong about the other, and every later epoch would meet the same: the handshake finds out.
        down, effects = turns.down(replace(state, refused=True), message.text)
        return down, (Disconnect(RefusalCode.BASE_TOO_NEW, message.text), *effects)
    if state.phase in {Phase.AHEAD, Phase.VERIFY, Phase.CAPTURE, Phase.TRANSFER}:
        cancel = (CancelWork(),) if state.phase is not Phase.CAPTURE else ()
        return replace(state, reason=message.text, refused=True), cancel
    if state.phase is Phase.IDLE:
        return turns.merge(state, message.text)
    if state.phase in ANSWERING:
        return turns.merge(state, message.text, count=not state.aborted)
    return state, ()
