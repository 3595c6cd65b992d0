"""What can be asked of the secondary's state.  Pure, and nothing changes.

States are :mod:`qemu_remus.core.secondary_model`'s.
"""

from __future__ import annotations

from qemu_remus.core import messages as m
from qemu_remus.core.model import Connection, DiskSpec, DiskState, EpochNumber, Replication, Role
from qemu_remus.core.secondary_model import (
    Phase,
    SecondaryState,
)


def hello(state: SecondaryState, theirs: m.Hello | None = None) -> m.Hello:
    """The answer to a primary's hello: with the disks that it could have, too, and those of the primary's if any are
    taken."""
    further = [*state.places, *(disk.name for disk in theirs.disks if state.takes_any)] if theirs else [*state.places]
    known = {disk.name for disk in state.disks}
    free = tuple(DiskSpec(name, 0) for name in dict.fromkeys(further) if name not in known)
    return m.Hello(
        pair=state.pair,
        # A primary that hears of a failover ends for good: it must not be told before that is certain.
        role=Role.PRIMARY if state.failover is not None and not state.unsaved else Role.SECONDARY,
        instance=state.instance,
        session=0,
        generation=state.generation,
        disks=(*state.disks, *free),
        committed=state.committed,
        staged=state.staged,
        highest_epoch=state.highest,
        disk_state=disk_state(state),
        history=state.history,
        begun=state.begun,
        decided=state.decided,
    )


def in_doubt(state: SecondaryState) -> tuple[EpochNumber, ...]:
    """The epochs that are staged and not committed, oldest first; each can still be failed over to."""
    return state.doubted if state.staged is None else (*state.doubted, state.staged)


def disk_state(state: SecondaryState) -> DiskState:
    """What the disks hold, as reports and hellos name it."""
    if state.failed:
        return DiskState.FAILED
    if not state.consistent:
        return DiskState.INCONSISTENT
    if state.failover is not None:
        return DiskState.UP_TO_DATE if state.failover.done else DiskState.CONSISTENT
    if state.link is None:
        return DiskState.CONSISTENT
    return DiskState.OUTDATED if state.behind else DiskState.UP_TO_DATE


def connection(state: SecondaryState) -> Connection:
    """The link, as reports name it."""
    if state.failover is not None:
        return Connection.STANDALONE
    return Connection.CONNECTING if state.link is None else Connection.CONNECTED


def replication(state: SecondaryState) -> Replication:
    """The VM's protection, as far as the secondary can tell."""
    if state.failover is not None:
        return Replication.FAILED_OVER
    if state.phase is Phase.SYNC:
        return Replication.INITIAL_SYNC
    if state.generation is None:
        return Replication.OFF
    if state.link is None or state.failed:
        return Replication.DEGRADED
    if not state.consistent:
        return Replication.INITIAL_SYNC
    return Replication.RESYNC if state.behind else Replication.PROTECTED


def between_epochs(state: SecondaryState) -> Phase:
    """The phase between epochs."""
    if state.link is None:
        return Phase.LISTENING
    return Phase.STAGED if state.staged is not None else Phase.IDLE


def is_interrupted(state: SecondaryState, wanted: m.SyncResume) -> bool:
    """This full sync was begun here, nothing of it counts yet, and nothing else has been at the images since."""
    same = [(disk.name, disk.size) for disk in wanted.disks] == [(disk.name, disk.size) for disk in state.disks]
    untouched = not state.consistent and not in_doubt(state)
    return untouched and same and bool(state.fresh) and wanted.generation == state.generation


def fits(state: SecondaryState, epoch: m.EpochBegin) -> bool:
    """DESIGN: an epoch applies to a committed checkpoint c iff base <= c < epoch; base "none" completes a full sync."""
    if epoch.epoch <= max(state.committed or 0, state.staged or 0):
        return False
    if epoch.base is None:
        return state.flushed
    return state.consistent and state.committed is not None and epoch.base <= state.committed
