"""What surrounds the two machines, as small models: a VM with QEMU's bitmaps, the link, the secondary's durable state.

Each model keeps apart what survives a crash and what does not.  No scheduling and no checks: those are ``world.py``'s.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_machine as secondary
from qemu_remus.core.comparison import count_blocks, differing, digest_blocks
from qemu_remus.core.connection import Connection, ConnectionClosed, NeedData
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import (
    Base,
    DiskName,
    DiskSpec,
    EpochNumber,
    Generation,
    InstanceId,
    PairName,
    Role,
    pair_name,
)
from qemu_remus.core.primary_machine import Recording

DISKS = 2
BLOCKS = 4
"""Per disk. Few, so that epochs overlap all the time."""

BLOCK = 4096
"""Bytes: one number, which no two writes share; 0 is a block of zeroes. As small as blocks can be compared."""

SIZES = (BLOCKS,) * DISKS
"""In blocks, at first: a disk may grow."""


def specs_of(sizes: Iterable[int]) -> tuple[DiskSpec, ...]:
    """The disks with so many blocks each, as they are spoken of."""
    return tuple(DiskSpec(DiskName(f"disk{disk}"), blocks * BLOCK) for disk, blocks in enumerate(sizes))


Content = tuple[tuple[int, ...], ...]
"""Each disk's blocks."""

Write = tuple[int, int, int]
"""Disk, block, value."""


def frozen(disks: Sequence[Sequence[int]]) -> Content:
    return tuple(tuple(blocks) for blocks in disks)


def overlaid(content: Content, writes: Iterable[Write]) -> Content:
    disks = [list(blocks) for blocks in content]
    for disk, block, value in writes:
        disks[disk][block] = value
    return frozen(disks)


def extents_of(writes: Iterable[Write]) -> tuple[tuple[Extent, ...], bytes]:
    """Writes as they travel."""
    extents: list[Extent] = []
    data = b""
    for disk, block, value in writes:
        extents.append(Extent(disk, block * BLOCK, BLOCK, zero=value == 0))
        data += value.to_bytes(BLOCK, "big") if value else b""
    return tuple(extents), data


def bytes_of(blocks: Iterable[int]) -> bytes:
    """What a disk with these blocks holds."""
    return b"".join(value.to_bytes(BLOCK, "big") for value in blocks)


def writes_of(message: m.EpochExtents | m.SyncExtents) -> Iterator[Write]:
    """The reverse of :func:`extents_of`."""
    data = bytes(message.data)
    for extent in message.extents:
        value = int.from_bytes(data[: extent.payload], "big")
        data = data[extent.payload :]
        yield extent.disk, extent.offset // BLOCK, value


# --- the VM ----------------------------------------------------------------------------------------------------------


@dataclass
class Bitmap:
    recording: bool = True
    dirty: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Snapshot:
    """The replication filters' view: a checkpoint, and the blocks of its epoch."""

    content: Content
    dirty: tuple[frozenset[int], ...]


class Qemu:
    """A VM's disks and their bitmaps. It outlives the primary's controller."""

    def __init__(self) -> None:
        self.disks = [[0] * BLOCKS for _ in range(DISKS)]
        self.bitmaps: list[dict[Recording, Bitmap]] = [{} for _ in range(DISKS)]
        self.snapshot: Snapshot | None = None
        self.paused = False
        """For a switch-over."""
        self.armed = False
        """The guardian resumes it, should the controller end."""

    def resume(self) -> None:
        self.paused = self.armed = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """In blocks."""
        return tuple(len(blocks) for blocks in self.disks)

    def grow(self, disk: int, value: int) -> None:
        """By one block, with whatever is there; its bitmaps grow with it, and do not have it."""
        self.disks[disk].append(value)

    def write(self, disk: int, block: int, value: int) -> None:
        self.disks[disk][block] = value
        for bitmap in self.bitmaps[disk].values():
            if bitmap.recording:
                bitmap.dirty.add(block)

    def start_tracking(self, recording: Recording) -> None:
        for bitmaps in self.bitmaps:
            assert recording not in bitmaps
            bitmaps[recording] = Bitmap()

    def capture(self, finished: Recording, following: Recording) -> Content:
        """DESIGN section 3: one transaction for all disks, while the VM is paused."""
        for bitmaps in self.bitmaps:
            assert following not in bitmaps
            bitmaps[following] = Bitmap()
            bitmaps[finished].recording = False
        assert self.snapshot is None
        self.snapshot = Snapshot(
            frozen(self.disks), tuple(frozenset(bitmaps[finished].dirty) for bitmaps in self.bitmaps)
        )
        return self.snapshot.content

    def rotate(self, finished: Recording | None, following: Recording) -> list[set[int]]:
        """While the guest runs; returns what the finished one holds of each disk.

        One transaction: it is there on every disk.
        """
        dirty: list[set[int]] = []
        for bitmaps in self.bitmaps:
            assert following not in bitmaps
            bitmaps[following] = Bitmap()
            if finished is not None and finished in bitmaps:
                bitmaps[finished].recording = False
                dirty.append(set(bitmaps[finished].dirty))
            else:
                dirty.append(set())
        return dirty

    def clear(self, recording: Recording) -> None:
        """In one transaction, a bitmap that goes on recording forgets what it holds."""
        for bitmaps in self.bitmaps:
            bitmaps[recording].dirty.clear()

    def merge_back(self, disk: int, old: Sequence[Recording], into: Recording) -> None:
        """One disk's transaction: add, merge, remove; an old bitmap may be missing."""
        bitmaps = self.bitmaps[disk]
        assert into not in bitmaps
        merged = Bitmap()
        for recording in old:
            gone = bitmaps.pop(recording, None)
            if gone is not None:
                merged.dirty |= gone.dirty
        bitmaps[into] = merged

    def restart(self) -> None:
        """The process ends and starts again: bitmaps are gone, the disks are not."""
        self.bitmaps = [{} for _ in range(DISKS)]
        self.snapshot = None
        self.resume()


# --- the link --------------------------------------------------------------------------------------------------------


class Link:
    """One connection: two queues, in order. Cut, it loses what is in flight, and both ends learn of it some time.

    Messages pass through real :class:`Connection` objects, so that whatever the machines say is judged by the
    protocol's own table, and travels as bytes.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.to_primary: deque[bytes] = deque()
        self.to_secondary: deque[bytes] = deque()
        self.primary_open = True
        self.secondary_open = True
        self.cut_off = False
        self._primary = Connection(Role.PRIMARY)
        self._secondary = Connection(Role.SECONDARY)
        self._primary.receive_data(self._secondary.start())
        self._secondary.receive_data(self._primary.start())

    def cut(self) -> None:
        self.cut_off = True
        self.to_primary.clear()
        self.to_secondary.clear()

    def from_primary(self, message: m.Message) -> None:
        if self.primary_open and not self.cut_off:
            self.to_secondary.append(b"".join(self._primary.send(message)))

    def from_secondary(self, message: m.Message) -> None:
        if self.secondary_open and not self.cut_off:
            self.to_primary.append(b"".join(self._secondary.send(message)))

    def at_primary(self) -> m.Message:
        return self._next(self._primary, self.to_primary)

    def at_secondary(self) -> m.Message:
        return self._next(self._secondary, self.to_secondary)

    def _next(self, end: Connection, queue: deque[bytes]) -> m.Message:
        end.receive_data(queue.popleft())
        message = end.next_event()
        assert not isinstance(message, NeedData | ConnectionClosed)
        return message

    @property
    def down_at_primary(self) -> bool:
        return self.cut_off or (not self.secondary_open and not self.to_primary)

    @property
    def down_at_secondary(self) -> bool:
        return self.cut_off or (not self.primary_open and not self.to_secondary)


# --- the secondary's durable state -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    epoch: EpochNumber
    writes: tuple[Write, ...]


@dataclass(frozen=True)
class End:
    """:ivar sizes: of the disks at the epoch's checkpoint, in blocks."""

    epoch: EpochNumber
    commit: bool
    sizes: tuple[int, ...] = SIZES


@dataclass(frozen=True)
class Commit:
    epoch: EpochNumber


@dataclass(frozen=True)
class Abort:
    epoch: EpochNumber


Record = Data | End | Commit | Abort


@dataclass(frozen=True)
class Superblock:
    generation: Generation | None = None
    consistent: bool = False
    committed: Base = None
    applied: Base = None
    highest: int = 0
    failover: secondary.Failover | None = None
    history: tuple[tuple[Generation, EpochNumber], ...] = ()
    created: bool = False
    fresh: tuple[bool, ...] = ()
    position: int = 0
    sizes: tuple[int, ...] = SIZES


@dataclass
class Journal:
    """What the records mean."""

    data: dict[EpochNumber, list[Write]] = field(default_factory=dict)
    ended: set[EpochNumber] = field(default_factory=set)
    staged: list[EpochNumber] = field(default_factory=list)
    commits: list[EpochNumber] = field(default_factory=list)
    sizes: dict[EpochNumber, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, records: Iterable[Record]) -> Journal:
        journal = cls()
        for record in records:
            if isinstance(record, End):
                journal.sizes[record.epoch] = record.sizes
            if isinstance(record, Data):
                journal.data.setdefault(record.epoch, []).extend(record.writes)
            elif isinstance(record, Abort):
                journal.staged = [epoch for epoch in journal.staged if epoch != record.epoch]
            elif isinstance(record, End) and not record.commit:
                journal.ended.add(record.epoch)
                journal.staged.append(record.epoch)
            else:
                journal.ended.add(record.epoch)
                journal.commits.append(record.epoch)
                journal.staged = [epoch for epoch in journal.staged if epoch > record.epoch]
        return journal

    def unended(self) -> list[EpochNumber]:
        """Epochs of which only a part has come."""
        return [epoch for epoch in self.data if epoch not in self.ended]


class Store:
    """Superblock, journal and images. A crash loses a suffix of the unsynced records, any of the unsynced writes."""

    def __init__(self) -> None:
        self.superblock = Superblock()
        self.records: list[Record] = []
        self.synced = 0
        self.images = [[0] * BLOCKS for _ in range(DISKS)]
        self.unsynced: list[Write] = []

    def append(self, record: Record) -> None:
        self.records.append(record)

    def sync(self) -> None:
        self.synced = len(self.records)

    def forget(self, epochs: Iterable[EpochNumber]) -> None:
        """Take these epochs' records out."""
        gone = set(epochs)
        self.synced = sum(record.epoch not in gone for record in self.records[: self.synced])
        self.records = [record for record in self.records if record.epoch not in gone]

    def write_images(self, writes: Iterable[Write]) -> None:
        self.unsynced.extend(writes)

    def flush_images(self) -> None:
        for disk, block, value in self.unsynced:
            self.images[disk][block] = value
        self.unsynced.clear()

    def make_room(self, sizes: tuple[int, ...]) -> None:
        """For an epoch that comes; durable at once."""
        for blocks, size in zip(self.images, sizes, strict=True):
            blocks.extend([0] * (size - len(blocks)))

    def sizes_at(self, journal: Journal, epoch: Base) -> tuple[int, ...]:
        """Of the disks at a checkpoint."""
        return self.superblock.sizes if epoch is None else journal.sizes.get(epoch, self.superblock.sizes)

    def cut(self, sizes: tuple[int, ...]) -> None:
        """The images become plain ones, of these sizes."""
        for blocks, size in zip(self.images, sizes, strict=True):
            del blocks[size:]

    def compare(self, question: m.CompareBlocks, journal: Journal) -> bytes:
        """The images as whoever reads them sees them; what an epoch in doubt has written differs in any case."""
        content = overlaid(frozen(self.images), self.unsynced)[question.disk]
        blocks = content[question.offset // BLOCK :][: count_blocks(question.digests) * question.block_size // BLOCK]
        bitmap = bytearray(differing(digest_blocks(bytes_of(blocks), question.block_size), question.digests))
        for epoch in journal.staged:
            for disk, block, _ in journal.data.get(epoch, ()):
                number = (block * BLOCK - question.offset) // question.block_size
                if disk == question.disk and 0 <= number < count_blocks(question.digests):
                    bitmap[number // 8] |= 1 << number % 8
        return bytes(bitmap)

    def crash(self, rng: random.Random) -> None:
        kept = rng.randint(self.synced, len(self.records))
        self.records = self.records[:kept]
        self.synced = kept
        self.unsynced = [write for write in self.unsynced if rng.random() < 0.5]
        self.flush_images()

    def reopen(self, rng: random.Random, pair: PairName, instance: InstanceId) -> secondary.SecondaryState:
        """Read back what is really there: of what was written and not synced, any part may be."""
        kept = rng.randint(self.synced, len(self.records))
        self.records = self.records[:kept]
        self.synced = kept
        return self.recover(pair, instance)

    def begin_sync(self, generation: Generation, sizes: tuple[int, ...] = SIZES) -> bool:
        """Return whether the images were created by this."""
        self.make_room(sizes)
        fresh = not self.superblock.created
        history = self.superblock.history
        self.superblock = Superblock(
            generation=generation, history=history, created=True, fresh=(fresh,) * DISKS, sizes=sizes
        )
        self.records.clear()
        self.synced = 0
        return fresh

    def journal(self, *, durable: bool) -> Journal:
        return Journal.read(self.records[: self.synced] if durable else self.records)

    def committed(self, journal: Journal) -> Base:
        floor = self.superblock.committed
        return max((*journal.commits, floor or 0), default=None) or None  # type: ignore[return-value]

    def unapplied(self, journal: Journal, upto: Base) -> list[EpochNumber]:
        applied = self.superblock.applied or 0
        return [epoch for epoch in journal.commits if applied < epoch <= (upto or 0)]

    def trim(self, applied: EpochNumber) -> None:
        """The images hold this checkpoint, flushed."""
        journal = self.journal(durable=False)
        sizes = self.sizes_at(journal, applied)
        self.superblock = replace(self.superblock, applied=applied, committed=applied, consistent=True, sizes=sizes)
        self.forget(epoch for epoch in (*journal.data, *journal.ended, *journal.commits) if epoch <= applied)

    def view(self, journal: Journal, target: EpochNumber, *, landed: bool) -> Content:
        """What a failover to this checkpoint would make of the images.

        :param landed: all unsynced writes reached the disk; else none did.
        """
        content = frozen(self.images)
        if landed:
            content = overlaid(content, self.unsynced)
        for epoch in self.unapplied(journal, target):
            content = overlaid(content, journal.data.get(epoch, ()))
        if target in journal.staged:
            content = overlaid(content, journal.data.get(target, ()))
        sizes = self.sizes_at(journal, target)
        return tuple(blocks[:size] for blocks, size in zip(content, sizes, strict=True))

    def recover(self, pair: PairName, instance: InstanceId) -> secondary.SecondaryState:
        """The machine's state after a restart."""
        superblock = self.superblock
        journal = self.journal(durable=True)
        self.forget(journal.unended())
        committed = self.committed(journal)
        failover = superblock.failover
        phase = secondary.Phase.LISTENING
        if failover is not None:
            phase = secondary.Phase.FAILED_OVER if failover.done else secondary.Phase.FAILING_OVER
        return secondary.SecondaryState(
            pair=pair,
            instance=instance,
            disks=specs_of(self.sizes_at(journal, committed) if superblock.created else (0,) * DISKS),
            tables=tuple((epoch, specs_of(self.sizes_at(journal, epoch))) for epoch in journal.staged),
            phase=phase,
            generation=superblock.generation,
            history=superblock.history,
            committed=committed,
            applied=superblock.applied,
            staged=journal.staged[-1] if journal.staged else None,
            doubted=tuple(journal.staged[:-1]),
            highest=max((superblock.highest, committed or 0, *journal.staged)),
            consistent=superblock.consistent or committed is not None,
            fresh=superblock.fresh if committed is None else (),
            position=superblock.position if committed is None else 0,
            failover=failover,
            behind=True,
        )


# --- what all hosts share --------------------------------------------------------------------------------------------

PAIR = pair_name("pair")

Action = tuple[float, str, Callable[[], None]]
"""Weight, name for the trace, what to do."""


class Crash(Exception):
    """A controller dies between two effects."""


def brief(thing: object) -> str:
    """An event, or effects, short enough for a trace."""
    text = re.sub(r"UUID\('0*-?0*-?0*-?0*-?0*(\w+)'\)", r"#\1", repr(thing))
    return re.sub(r"b'[^']*'|b\"[^\"]*\"|<memory at \w+>", "...", text)
