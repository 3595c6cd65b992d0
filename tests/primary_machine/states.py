"""States of the primary's machine that tests begin with, and the bitmaps, hellos and effects that they name.

Each test begins with a state built by :func:`at`, gives it events, and looks at the effects and at what matters of the
state.  How the two machines get on with each other is ``tests/simulation``'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.model import DiskName, DiskSpec, DiskState, EpochNumber, Generation, InstanceId, PairName, Role
from qemu_remus.core.primary_machine import Found, Opened, Phase, PrimaryState, Recording, step

ONE = Generation(UUID(int=1))
TWO = Generation(UUID(int=2))
DISKS = (DiskSpec(DiskName("system"), 1 << 20), DiskSpec(DiskName("data"), 1 << 20))


def recording(base: int | None, epoch: int, generation: Generation = ONE) -> Recording:
    return Recording(generation, None if base is None else EpochNumber(base), EpochNumber(epoch))


def live(base: int | None, epoch: int, generation: Generation = ONE) -> Found:
    """A bitmap that records."""
    return Found(recording(base, epoch, generation))


def ended(base: int | None, epoch: int, generation: Generation = ONE) -> Found:
    """A bitmap that is complete."""
    return Found(recording(base, epoch, generation), live=False)


def merged(base: int | None, epoch: int, *found: Found | tuple[Found, ...], generation: Generation = ONE) -> Any:
    """The end of a merge, where every disk had the bitmaps that are named here; a tuple: one disk had them."""
    disks = tuple(one for one in found if isinstance(one, tuple))
    same = tuple(one for one in found if isinstance(one, Found))
    return machine.Merged(recording(base, epoch, generation), disks or (same,) * len(DISKS))


def at(phase: Phase, **fields: Any) -> PrimaryState:
    """A primary that has committed checkpoint 7 and now records epoch 8; in an epoch: 8 is finished, 9 records."""
    state = PrimaryState(
        PairName("pair"),
        InstanceId(UUID(int=9)),
        DISKS,
        phase=phase,
        generation=ONE,
        committed=EpochNumber(7),
        highest=8,
        recording=recording(7, 8),
        reach=(EpochNumber(7),) * len(DISKS),
        linked=phase not in {Phase.STARTING, Phase.ADOPTING, Phase.WAITING},
        protected=phase not in {Phase.STARTING, Phase.ADOPTING, Phase.WAITING},
    )
    if phase in machine.IN_EPOCH:
        state = replace(state, highest=9, finished=recording(7, 8), recording=recording(8, 9))
    if phase in machine.IN_EPOCH - {Phase.CAPTURE}:
        state = replace(state, opened=Opened())
    if phase is Phase.AHEAD:
        ahead = recording(7, 8)
        state = replace(
            state, highest=9, ahead=ahead, recording=recording(8, 9), opened=Opened(), bulky=True, protected=False
        )
    return replace(state, **fields)


def copied_ahead(phase: Phase, **fields: Any) -> PrimaryState:
    """A primary that has copied what bitmap 8 holds ahead of epoch 9, which is open; in the epoch: 10 records."""
    state = at(phase, highest=9, ahead=recording(7, 8), recording=recording(8, 9), opened=SENT_AHEAD, bulky=True)
    if phase in machine.IN_EPOCH:
        state = replace(state, highest=10, finished=recording(8, 9), recording=recording(9, 10))
    return replace(state, protected=False, **fields)


SENT_AHEAD = Opened(extents=5, payload=5 << 12, digest=11)


def first_sync(phase: Phase, **fields: Any) -> PrimaryState:
    """A primary whose first copy is flushed and whose first epoch completes it."""
    state = at(phase, committed=None, synced=True, protected=False, highest=1, recording=recording(None, 1), **fields)
    state = replace(state, reach=(None,) * len(DISKS))
    if phase in machine.IN_EPOCH:
        state = replace(state, highest=2, finished=recording(None, 1), recording=recording(1, 2))
    return state


def attach(*found: tuple[Found, ...], **fields: Any) -> tuple[PrimaryState, tuple[machine.Effect, ...]]:
    return step(at(Phase.STARTING, **{"recording": None, "reach": ()} | fields), machine.Attached(found))


def theirs(**fields: Any) -> m.Hello:
    """The hello of a secondary that holds checkpoint 7."""
    hello = m.Hello(
        pair=PairName("pair"),
        role=Role.SECONDARY,
        instance=InstanceId(UUID(int=8)),
        session=0,
        generation=ONE,
        disks=DISKS,
        committed=EpochNumber(7),
        staged=None,
        highest_epoch=7,
        disk_state=DiskState.CONSISTENT,
    )
    return replace(hello, **fields)


def link_up(state: PrimaryState, hello: m.Hello, dirty_bytes: int = 0) -> machine.LinkUp:
    return machine.LinkUp(machine.hello(state), hello, TWO, dirty_bytes)


def merge_of(effects: tuple[machine.Effect, ...]) -> machine.MergeBack:
    (merge,) = (effect for effect in effects if isinstance(effect, machine.MergeBack))
    return merge


BACK = machine.MergeBack((recording(7, 8), recording(8, 9)), ONE, EpochNumber(10))
"""What takes a failed epoch 8 back."""
