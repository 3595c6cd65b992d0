"""The primary's work in the simulation: what takes it time, and goes on a step at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as primary
from qemu_remus.core.comparison import digest_blocks
from qemu_remus.core.extents import Extent, coalesce
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.verification import Findings
from tests.simulation.models import BLOCK, DISKS, Action, Content, Link, Write, bytes_of, extents_of, frozen, specs_of

if TYPE_CHECKING:
    from tests.simulation.primary_host import PrimaryHost


@dataclass
class Work:
    """The piece of work under way on the primary."""

    effect: primary.Effect
    link: Link | None
    todo: deque[tuple[int, int]]
    extents: int = 0
    payload: int = 0
    begun: bool = False
    unanswered: int = 0
    read: list[Write] = field(default_factory=list)
    differing: list[Write] = field(default_factory=list)
    cancelled: bool = False
    interrupted: bool = False
    result: primary.Event | None = None


class Worker:
    """Does the primary's pieces of work, one after the other."""

    def __init__(self, host: PrimaryHost) -> None:
        self.host = host
        self.world = host.world
        self.verified = self.repaired = 0
        self.forget()

    def forget(self) -> None:
        self.work: Work | None = None
        self.questions: deque[tuple[Work, Write]] = deque()

    def actions(self) -> Iterator[Action]:
        if self.work is not None:
            name = type(self.work.effect).__name__
            if self.work.result is None:
                yield 4.0, f"work goes on: {name}", self.work_on
            else:
                yield 4.0, f"work ends: {name}: {self.work.result}", self.report_work

    def begin(self, effect: primary.Effect, link: Link | None) -> None:
        assert self.work is None, "two pieces of work at once"
        self.work = Work(effect, link, deque(self._blocks(effect)))
        if isinstance(effect, primary.Transfer | primary.VerifySlice):
            self.work.extents, self.work.payload = effect.opened.extents, effect.opened.payload

    def _blocks(self, effect: primary.Effect) -> Iterator[tuple[int, int]]:
        snapshot = self.world.qemu.snapshot
        for disk in range(DISKS):
            if isinstance(effect, primary.Transfer):
                assert snapshot is not None
                yield from ((disk, block) for block in sorted(snapshot.dirty[disk]))
            elif isinstance(effect, primary.CopyLive):
                size = self.sizes()[disk]
                first = (effect.start or 0) // BLOCK - sum(self.sizes()[:disk])
                yield from ((disk, block) for block in range(max(0, first), size))

    def answered(self, message: m.BlocksDiffer) -> None:
        """The oldest question's answer; nobody waits any more for those of earlier work."""
        work, write = self.questions.popleft()
        assert (message.disk, message.offset) == (write[0], write[1] * BLOCK)
        if work is not self.work:
            return
        work.unanswered -= 1
        if isinstance(work.effect, primary.VerifySlice):
            if message.differing != b"\0":
                work.differing.append(write)
            return
        if message.differing != b"\0" and work.result is None:
            self._send_extents(work, [write])

    def work_on(self) -> None:
        work = self.work
        assert work is not None
        work.result = self._advance(work, work.effect)

    def _advance(self, work: Work, effect: primary.Effect) -> primary.Event | None:
        world, qemu = self.world, self.world.qemu
        broken = world.happens(world.faults.work)
        failed = primary.WorkFailed("it failed", fatal=broken and world.rng.random() < 0.05, changed=self.outdated())
        match effect:
            case primary.Survey():
                qemu.snapshot = None
                changed = self.outdated()
                return failed if broken else primary.Surveyed(changed, specs_of(qemu.sizes), self.found())
            case primary.StartTracking(recording):
                if broken:
                    return failed
                qemu.start_tracking(recording)
                return primary.TrackingStarted()
            case primary.MergeBack():
                qemu.snapshot = None
                if broken and world.rng.random() < 0.5:
                    return failed
                merged = self._merge(effect)
                return failed if broken else merged
            case primary.RemoveBitmaps(recordings):
                if broken and world.rng.random() < 0.5:
                    return failed
                for bitmaps in qemu.bitmaps:
                    for recording in recordings:
                        bitmaps.pop(recording, None)
                return failed if broken else primary.BitmapRemoved()
            case primary.Capture(finished, following):
                return self._capture(work, finished, following, failed if broken else None)
            case primary.Transfer(finished):
                return self._transfer(work, finished.epoch, failed if broken else None)
            case primary.CopyAhead():
                return self._copy_ahead(work, effect, failed if broken else None)
            case primary.VerifySlice():
                return self._verify_slice(work, effect, failed if broken else None)
            case primary.CopyLive():
                return self._copy(work, effect, failed if broken else None)
            case primary.Hold() | primary.Stand():
                return failed if broken else self._stand_still(effect)
            case _:
                raise AssertionError(effect)

    def _stand_still(self, effect: primary.Hold | primary.Stand) -> primary.Event:
        qemu = self.world.qemu
        if isinstance(effect, primary.Hold):
            ours = not qemu.paused
            qemu.armed = qemu.armed or ours
            qemu.paused = True
            return primary.Held(ours)
        written = any(effect.recording not in bitmaps or bitmaps[effect.recording].dirty for bitmaps in qemu.bitmaps)
        if written or not qemu.paused:
            return primary.WorkFailed("the VM has run on")
        qemu.armed = False
        return primary.Standing()

    def sizes(self) -> tuple[int, ...]:
        """Of the disks as the primary knows them, in blocks."""
        assert self.host.state is not None
        return tuple(disk.size // BLOCK for disk in self.host.state.disks)

    def outdated(self) -> bool:
        return self.sizes() != self.world.qemu.sizes

    def found(self) -> tuple[tuple[primary.Found, ...], ...]:
        return tuple(
            tuple(primary.Found(recording, bitmap.recording) for recording, bitmap in bitmaps.items())
            for bitmaps in self.world.qemu.bitmaps
        )

    def _merge(self, effect: primary.MergeBack) -> primary.Merged:
        """One transaction for all disks."""
        found = tuple(tuple(one for one in disk if one.recording in effect.old) for disk in self.found())
        base = None if effect.complete else primary.base_of(found, effect.generation)
        into = primary.Recording(effect.generation, base, effect.epoch)
        for disk in range(DISKS):
            self.world.qemu.merge_back(disk, effect.old, into)
        if self.host.state is not None and effect.generation != self.host.state.generation:
            self.world.taken_over = self.host.state.generation
        return primary.Merged(into, found)

    def _copy_ahead(self, work: Work, effect: primary.CopyAhead, failed: primary.Event | None) -> primary.Event | None:
        qemu = self.world.qemu
        if failed is not None or (work.cancelled and (work.todo or work.unanswered or not work.begun)):
            return failed or primary.WorkFailed("cancelled")
        assert work.link is not None
        if work.link.cut_off:
            return primary.WorkFailed("the link is gone")
        if not work.begun and any(effect.finished not in bitmaps for bitmaps in qemu.bitmaps if effect.finished):
            return primary.WorkFailed("a disk has lost its bitmap")
        if not work.begun:
            work.begun = True
            dirty = qemu.rotate(effect.finished, effect.following)
            if any(block >= size for blocks, size in zip(dirty, self.sizes(), strict=True) for block in blocks):
                return primary.WorkFailed("a disk has grown", changed=True)
            work.todo.extend((disk, block) for disk in range(DISKS) for block in self._ahead(effect, disk, dirty))
        elif work.todo:
            disk, block, value = self._next_write(work, frozen(qemu.disks))
            if block in self._compared(effect, disk):
                self._ask(work, (disk, block, value))
            else:
                self._send_extents(work, [(disk, block, value)])
        elif not work.unanswered:
            return primary.CopiedAhead(primary.Opened(work.extents, work.payload, 0))
        return None

    def _verify_slice(
        self, work: Work, effect: primary.VerifySlice, failed: primary.Event | None
    ) -> primary.Event | None:
        """Blocks are read and asked about one by one, then the bitmap is looked at."""
        piece, rng = effect.piece.extent, self.world.rng
        nothing = Findings(piece.offset)
        if work.cancelled:
            return primary.WorkFailed("cancelled")
        if failed is not None:
            return primary.SliceVerified(effect.opened, nothing, "the disk cannot be read")
        assert work.link is not None
        if work.interrupted or work.link.cut_off:
            return primary.SliceVerified(effect.opened, nothing)
        if not work.begun:
            work.begun = True
            first, end = piece.offset // BLOCK, piece.end // BLOCK
            work.todo.extend((piece.disk, block) for block in range(first, rng.randint(first + 1, end)))
        if work.todo:
            write = self._next_write(work, frozen(self.world.qemu.disks))
            work.read.append(write)
            self._ask(work, write)
            return None
        if work.unanswered:
            return None
        bitmap = self.world.qemu.bitmaps[piece.disk].get(effect.recording)
        if bitmap is None:
            return primary.SliceVerified(effect.opened, nothing, "the disk has lost its bitmap")
        return self._sort_out(work, effect, bitmap.dirty)

    def _sort_out(self, work: Work, effect: primary.VerifySlice, dirty: set[int]) -> primary.Event:
        rng, state = self.world.rng, self.host.state
        assert state is not None
        wrong = [write for write in work.differing if write[1] not in dirty]
        assert not wrong or state.refused or self.world.tracking_lost, f"a false alarm: {wrong}"
        if effect.repair:
            # As though they had been damaged: what is sent must do no harm, whatever the guest writes.
            wrong = [write for write in work.read if write[1] not in dirty and rng.random() < 0.3]
        sent = wrong if effect.repair else []
        if sent:
            self._send_extents(work, sent)
        written = [write for write in work.differing if write[1] in dirty]
        reached = (work.read[-1][1] + 1) * BLOCK
        findings = Findings(reached, _ranges(wrong), _ranges(written), _ranges(sent))
        self.verified += 1
        self.repaired += bool(sent)
        return primary.SliceVerified(primary.Opened(work.extents, work.payload, 0), findings)

    def _ahead(self, effect: primary.CopyAhead, disk: int, dirty: list[set[int]]) -> Iterator[int]:
        yield from sorted(dirty[disk] | set(self._compared(effect, disk)))

    def _compared(self, effect: primary.CopyAhead, disk: int) -> range:
        """The blocks of the disk that the secondary is asked about."""
        size = self.sizes()[disk]
        return range(0 if disk in effect.compare else dict(effect.grown).get(disk, size * BLOCK) // BLOCK, size)

    def _ask(self, work: Work, write: Write) -> None:
        assert work.link is not None
        disk, block, value = write
        self.questions.append((work, write))
        work.unanswered += 1
        work.link.from_primary(m.CompareBlocks(disk, block * BLOCK, BLOCK, digest_blocks(bytes_of([value]), BLOCK)))

    def _send_extents(self, work: Work, writes: list[Write]) -> None:
        """In a full copy, or of the epoch under way."""
        assert work.link is not None
        extents, data = extents_of(writes)
        if isinstance(work.effect, primary.CopyLive):
            work.link.from_primary(m.SyncExtents(extents, data))
            return
        match work.effect:
            case primary.VerifySlice(recording=epoch) | primary.CopyAhead(following=epoch):
                pass
            case primary.Transfer(finished=epoch):
                pass
            case _:
                raise AssertionError(work.effect)
        work.extents += len(extents)
        work.payload += len(data)
        work.link.from_primary(m.EpochExtents(epoch.epoch, extents, data))

    def _capture(
        self, work: Work, finished: primary.Recording, following: primary.Recording, failed: primary.Event | None
    ) -> primary.Event:
        world = self.world
        if work.cancelled and world.rng.random() < 0.5:
            return primary.WorkFailed("cancelled")
        assert isinstance(work.effect, primary.Capture)
        if not work.effect.pause and world.toolstack.paused is None and not world.qemu.paused:
            return primary.NotCaptured("the VM runs")
        if failed is not None and world.rng.random() < 0.5:
            return failed
        if any(finished not in bitmaps for bitmaps in world.qemu.bitmaps):
            return primary.WorkFailed("a disk has lost its bitmap")
        if self.outdated():
            if work.effect.pause:
                # It is seen in the look that begins the next bitmaps.
                world.qemu.start_tracking(following)
            return primary.WorkFailed("a disk has another size", changed=True)
        content = world.qemu.capture(finished, following)
        key = (finished.generation, finished.epoch)
        assert key not in world.checkpoints, f"epoch {finished.epoch} was captured before"
        world.checkpoints[key] = content
        if failed is not None:
            # The bitmaps were rotated, then a filter could not be put in.
            world.qemu.snapshot = None
            return failed
        assert world.qemu.snapshot is not None
        if not any(world.qemu.snapshot.dirty) and not self.questions:
            world.qemu.snapshot = None
            return primary.Captured(changed=False)
        return primary.Captured()

    def _transfer(self, work: Work, epoch: EpochNumber, failed: primary.Event | None) -> primary.Event | None:
        snapshot = self.world.qemu.snapshot
        assert snapshot is not None
        assert work.link is not None
        if failed is not None or work.link.cut_off or (work.cancelled and (work.todo or self.questions)):
            self.world.qemu.snapshot = None
            return failed or primary.WorkFailed("cancelled, or the link is gone")
        if not work.todo:
            if self.questions:
                # A slice that was interrupted has left them: no epoch ends before its questions are answered.
                return None
            self.world.qemu.snapshot = None
            return primary.Transferred(primary.Opened(work.extents, work.payload, 0))
        writes = [self._next_write(work, snapshot.content)]
        if work.todo and self.world.rng.random() < 0.5:
            writes.append(self._next_write(work, snapshot.content))
        self._send_extents(work, writes)
        return None

    def _next_write(self, work: Work, content: Content) -> Write:
        disk, block = work.todo.popleft()
        return disk, block, content[disk][block]

    def _copy(self, work: Work, effect: primary.CopyLive, failed: primary.Event | None) -> primary.Event | None:
        qemu = self.world.qemu
        assert work.link is not None
        if failed is not None or work.link.cut_off or (work.cancelled and (work.todo or work.unanswered)):
            return failed or primary.WorkFailed("cancelled, or the link is gone", by_link=work.link.cut_off)
        if not work.begun:
            work.begun = True
            if any(effect.recording not in bitmaps for bitmaps in qemu.bitmaps):
                return primary.WorkFailed("a disk has lost its bitmap")
            if effect.start is None:
                qemu.clear(effect.recording)
        elif work.todo:
            disk, block = work.todo[0]
            position = (sum(self.sizes()[:disk]) + block) * BLOCK
            if position and not work.unanswered and self.world.rng.random() < 0.3:
                # Everything before it was sent, or is the same.
                work.link.from_primary(m.SyncFlush(position))
            disk, block, value = self._next_write(work, frozen(qemu.disks))
            if not effect.fresh[disk]:
                self._ask(work, (disk, block, value))
            elif value:
                self._send_extents(work, [(disk, block, value)])
        elif not work.unanswered:
            return primary.SyncCopied()
        return None

    def report_work(self) -> None:
        work = self.work
        assert work is not None
        assert work.result is not None
        self.work = None
        self.host.handle(work.result)


def _ranges(writes: list[Write]) -> tuple[Extent, ...]:
    return tuple(coalesce(Extent(disk, block * BLOCK, BLOCK) for disk, block, _ in sorted(writes)))
