"""What the primary's machine makes of disks that come, go and grow: functions from its state to its state.

What may not enter: phases but SURVEY, bitmaps, and the order of things, which are
:mod:`qemu_remus.core.primary_machine`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from qemu_remus.core import messages as m
from qemu_remus.core.disk_changes import DiskChanges
from qemu_remus.core.frozen import replace
from qemu_remus.core.model import DiskName, DiskSpec
from qemu_remus.core.primary_effects import Step, Survey
from qemu_remus.core.primary_model import Found, LeftOut, Phase, PrimaryState

CHANGED: Final = "the VM's disks have changed"


def to_be_surveyed(state: PrimaryState) -> bool:
    """Before anything else is begun, it has to be seen which disks the VM has."""
    return state.stale or bool(state.resizes)


def survey(state: PrimaryState) -> Step:
    """See which disks the VM has. Nothing of a checkpoint may be in the graph that is still needed."""
    effect = Survey(state.resizes, frozenset(one.name for one in state.left_out))
    return replace(state, phase=Phase.SURVEY, stale=False, resizes=()), (effect,)


def outdated(state: PrimaryState, ours: m.Hello) -> bool:
    """A hello of ours speaks of other disks than we have now."""
    return [(disk.name, disk.size) for disk in ours.disks if disk.size] != [(d.name, d.size) for d in state.disks]


def followed(state: PrimaryState, disks: tuple[DiskSpec, ...], news: str) -> PrimaryState:
    """These are the disks from now on; nothing is known of them.

    :param news: what is other than before, for a person.
    """
    before = {disk.name: disk.size for disk in state.disks}
    other = {disk.name for disk in disks if before.get(disk.name) != disk.size}
    names = {disk.name for disk in disks}
    return replace(
        state,
        disks=disks,
        reach=(None,) * len(disks),
        grown=(),
        added=(),
        uncovered=frozenset((state.uncovered | other) & names),
        since=None,
        linked=False,
        synced=False,
        protected=False,
        refused=False,
        aborted=False,
        reason=news,
        news=news,
    )


def untidy(state: PrimaryState, found: tuple[tuple[Found, ...], ...]) -> bool:
    """Between two epochs there are other bitmaps than the one that records."""
    known = set() if state.recording is None else {state.recording}
    return any({one.recording for one in each} != known for each in found)


def compared(state: PrimaryState, changes: DiskChanges) -> PrimaryState:
    """What the secondary's checkpoint does not have of these disks."""
    uncovered = frozenset(state.disks[place].name for place in (*changes.added, *(p for p, _ in changes.grown)))
    return replace(state, grown=changes.grown, added=changes.added, uncovered=uncovered)


def leave_out(state: PrimaryState, names: Iterable[DiskName], reason: str, *, ask: bool) -> PrimaryState:
    """Protect the others without these."""
    others = tuple(one for one in state.left_out if one.name not in set(names))
    return replace(state, left_out=(*others, *(LeftOut(name, reason, ask) for name in names)))


def take_in(state: PrimaryState, names: Iterable[DiskName]) -> PrimaryState:
    """There is a place for these now."""
    kept = tuple(one for one in state.left_out if one.name not in set(names))
    return replace(state, left_out=kept, stale=True)


def ask_again(state: PrimaryState) -> PrimaryState:
    """Whoever comes next may have a place for what the secondary could not take."""
    return replace(state, left_out=tuple(replace(one, ask=True) for one in state.left_out))
