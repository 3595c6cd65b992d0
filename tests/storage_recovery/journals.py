"""Journals on a disk of memory, what is written to them, and what they are recovered as.

The measure is always the same: a recovered journal is, exactly, a state that it was in, and one that lies at or after
the last thing that was acknowledged; anything else is ``JournalDamaged``.  Never a state that it was not in.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from qemu_remus.core.extents import Extent
from qemu_remus.core.model import Base, EpochNumber, Generation, PairName
from qemu_remus.storage import format as fmt
from qemu_remus.storage.journal import Journal, Recovery
from qemu_remus.storage.log import MINIMUM_SEGMENT_SIZE
from tests.memory_disk import MemoryDisk

PAIR = PairName("vm1")
GENERATION = Generation(UUID(int=1))
HOME = Path("/journal") / GENERATION.hex
PATH = HOME / "000001.segment"
SEGMENT = MINIMUM_SEGMENT_SIZE

Content = tuple[tuple[tuple[Extent, ...], bytes], ...]


@dataclass(frozen=True)
class State:
    """What a journal holds, contents included."""

    committed: Base
    unapplied: tuple[tuple[EpochNumber, Content], ...]
    staged: tuple[tuple[EpochNumber, Content], ...]


def open_journal(disk: MemoryDisk, *, floor: Base = None, applied: Base = None) -> tuple[Journal, Recovery]:
    return Journal.open(
        disk,
        HOME.parent,
        PAIR,
        GENERATION,
        floor=floor,
        applied=applied,
        limit=5 * SEGMENT,
        segment_size=SEGMENT,
        create=True,
    )


def content_of(journal: Journal, epoch: EpochNumber) -> Content:
    return tuple((extents, bytes(data)) for extents, data in journal.read_epoch(epoch))


def state_of(disk: MemoryDisk, *, floor: Base = None, applied: Base = None) -> State:
    """Recover and read everything; staged epochs are committed, one after the other, to read them too."""
    journal, recovery = open_journal(disk, floor=floor, applied=applied)
    try:
        unapplied = tuple((epoch, content_of(journal, epoch)) for epoch in recovery.unapplied)
        staged = []
        for epoch in recovery.staged:
            journal.commit(epoch)
            staged.append((epoch, content_of(journal, epoch)))
    finally:
        journal.close()
    return State(recovery.committed, unapplied, tuple(staged))


def make_content(rng: random.Random, largest: int) -> Content:
    """Of random shape; with ``largest`` 0 all records have one size, so that old and new ones line up."""
    if not largest:
        return tuple(((Extent(0, rng.randrange(1 << 40), 100),), rng.randbytes(100)) for _ in range(rng.randrange(4)))
    pieces = []
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        extents = tuple(
            Extent(rng.randrange(3), rng.randrange(1 << 40), rng.randint(1, largest), zero=rng.random() < 0.2)
            for _ in range(rng.randint(1, 3))
        )
        pieces.append((extents, rng.randbytes(sum(extent.payload for extent in extents))))
    return tuple(pieces)


def append_all(journal: Journal, epoch: EpochNumber, content: Content) -> None:
    for extents, data in content:
        journal.append(epoch, extents, data)


def segments(disk: MemoryDisk) -> dict[Path, fmt.SegmentHeader | None]:
    return {HOME / name: fmt.unpack_segment_header(bytes(disk.file(HOME / name).seen[:96])) for name in disk.list(HOME)}
