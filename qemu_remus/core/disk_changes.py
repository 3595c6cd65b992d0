"""What has become of a VM's disks since the secondary's checkpoint: grown, come, gone; from both hellos alone.

Pure and total, for :func:`qemu_remus.core.generation.decide`, which both sides run.  In a primary's hello a disk of
size 0 is one that it has and does not protect: it asks whether there is a place for it.  In a secondary's it is a place
without a disk.  What may not enter: what to do about it, which is the machines' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from qemu_remus.core.messages import Hello
from qemu_remus.core.model import DiskName

__all__ = ["UNCHANGED", "DiskChanges", "asked_for", "find_changes", "has_places"]


@dataclass(frozen=True, slots=True)
class DiskChanges:
    """The primary's disks against the secondary's checkpoint; disks of the primary by their place in its hello.

    :param grown: those that have become larger, with the size in bytes that the secondary has of them.
    :param shrunk: those that have become smaller, with the same.
    :param added: those that the checkpoint does not have.
    :param unplaced: those of them that the secondary has no place for.
    :param removed: the checkpoint's disks that the primary does not have.
    :param kept: disks are left that both have.
    """

    grown: tuple[tuple[int, int], ...] = ()
    shrunk: tuple[tuple[int, int], ...] = ()
    added: tuple[int, ...] = ()
    unplaced: tuple[int, ...] = ()
    removed: tuple[DiskName, ...] = ()
    kept: bool = True


UNCHANGED: Final = DiskChanges()


def find_changes(primary: Hello, secondary: Hello) -> DiskChanges | None:
    """The difference; None where a side names a disk twice, or the primary has none."""
    theirs = {disk.name: disk.size for disk in secondary.disks}
    ours = [disk for disk in primary.disks if disk.size]
    names = {disk.name for disk in primary.disks}
    if not ours or len(names) != len(primary.disks) or len(theirs) != len(secondary.disks):
        return None
    grown, shrunk, added, unplaced = [], [], [], []
    for place, disk in enumerate(ours):
        held = theirs.get(disk.name, 0)
        if not held:
            added.append(place)
            if disk.name not in theirs:
                unplaced.append(place)
        elif disk.size > held:
            grown.append((place, held))
        elif disk.size < held:
            shrunk.append((place, held))
    present = {disk.name for disk in ours}
    return DiskChanges(
        tuple(grown),
        tuple(shrunk),
        tuple(added),
        tuple(unplaced),
        tuple(name for name, size in theirs.items() if size and name not in present),
        kept=len(added) < len(ours),
    )


def has_places(primary: Hello, secondary: Hello) -> bool:
    """Whether a full copy of the primary's disks has somewhere to go."""
    changes = find_changes(primary, secondary)
    return changes is not None and not changes.unplaced


def asked_for(primary: Hello, secondary: Hello) -> tuple[DiskName, ...]:
    """The disks that the primary does not protect, and that there is a place for."""
    places = {disk.name for disk in secondary.disks}
    return tuple(disk.name for disk in primary.disks if not disk.size and disk.name in places)
