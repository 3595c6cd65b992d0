"""What can be asked of the primary's state, and of what is found of its bitmaps.  Pure, and nothing changes.

States are :mod:`qemu_remus.core.primary_model`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from qemu_remus.core import messages as m
from qemu_remus.core import primary_verify as verify
from qemu_remus.core.errors import InternalError
from qemu_remus.core.frozen import replace
from qemu_remus.core.model import Base, DiskSpec, DiskState, EpochNumber, Generation, Replication, Role
from qemu_remus.core.primary_model import SYNCING, Found, Phase, PrimaryState, Recording


def hello(state: PrimaryState) -> m.Hello:
    """The hello of the next link."""
    recording = state.recording
    known = recording is not None and recording.generation == state.generation
    reach = state.reach if known else (None,) * len(state.disks)
    return m.Hello(
        pair=state.pair,
        role=Role.PRIMARY,
        instance=state.instance,
        session=state.session,
        generation=state.generation,
        disks=(
            *(replace(disk, base=base) for disk, base in zip(state.disks, reach, strict=True)),
            *(DiskSpec(one.name, 0) for one in state.left_out if one.ask),
        ),
        committed=state.committed,
        staged=None,
        highest_epoch=state.highest,
        disk_state=DiskState.UP_TO_DATE,
        history=state.history,
        begun=state.begun,
        decided=state.decided,
    )


def replication(state: PrimaryState) -> Replication:
    """The VM's protection, as reports name it."""
    if state.handover is not None and state.handover.done:
        return Replication.FAILED_OVER
    if state.phase in {Phase.STARTING, Phase.ADOPTING, Phase.STOPPED} and not (
        state.phase is Phase.ADOPTING and state.news
    ):
        return Replication.OFF
    if state.handover is not None and state.phase is not Phase.STAND:
        return Replication.DEGRADED
    if state.phase in SYNCING or state.synced:
        return Replication.INITIAL_SYNC
    if state.phase is Phase.AHEAD and state.linked:
        return Replication.RESYNC
    if not state.linked or state.failures or state.silence:
        return Replication.DEGRADED if state.committed is not None else Replication.OFF
    if not state.protected:
        return Replication.RESYNC
    return Replication.VERIFYING if verify.verifying(state) else Replication.PROTECTED


def reason(state: PrimaryState) -> str:
    """Why the VM is not protected; empty while it is."""
    return state.reason if state.phase is Phase.STOPPED else state.silence or state.reason


def expect(state: PrimaryState, event: object, *phases: Phase) -> None:
    """See that a result comes in a phase that can have it.

    :raise InternalError: it does not: a defect of the shell.
    """
    if state.phase not in phases:
        raise InternalError(f"{type(event).__name__} cannot happen in phase {state.phase.name}")


def next_epoch(state: PrimaryState) -> EpochNumber:
    """The number of the epoch that begins next."""
    return EpochNumber(state.highest + 1)


def reach_of(found: tuple[Found, ...], generation: Generation | None) -> Base:
    """The committed checkpoint that a disk's bitmaps reach back to; None where changes since may not be recorded.

    They are a chain: each began when the one before it ended, and the last one still records.  Beside a bitmap with
    base "none" stands one that began at the checkpoint that ends it.  If that checkpoint was committed after all, the
    union builds on it; if not, no commit is there to build on, and nobody can mistake it.
    """
    chain = chain_of(found, generation)
    return min((one.recording.base for one in chain if one.recording.base is not None), default=None)


def chain_of(found: tuple[Found, ...], generation: Generation | None) -> tuple[Found, ...]:
    """A disk's bitmaps in order; none of them where one is missing."""
    ours = (one for one in found if one.recording.generation == generation)
    chain = tuple(sorted(ours, key=lambda one: one.recording.epoch))
    whole = all(later.recording.base == earlier.recording.epoch for earlier, later in pairwise(chain))
    return chain if chain and chain[-1].live and whole else ()


def reaches_the_copy(found: tuple[Found, ...], generation: Generation | None) -> bool:
    """A disk's bitmaps hold everything since the full sync began: the first of them began with it."""
    chain = chain_of(found, generation)
    return bool(chain) and chain[0].recording.base is None


def has_all_since(found: tuple[Found, ...], since: Recording | None) -> bool:
    """A disk's bitmaps hold everything since that one began."""
    chain = chain_of(found, since.generation) if since is not None else ()
    return bool(chain) and chain[0].recording == since


def base_of(found: tuple[tuple[Found, ...], ...], generation: Generation | None) -> Base:
    """The base that holds on every disk for a bitmap that takes over all that were found: the newest of theirs."""
    return common([reach_of(one, generation) for one in found])


def common(reach: Sequence[Base]) -> Base:
    """The base of disks that reach back to these."""
    known = [base for base in reach if base is not None]
    return max(known) if known and len(known) == len(reach) else None
