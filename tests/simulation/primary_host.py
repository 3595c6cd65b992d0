"""The primary's shell in the simulation: it keeps the contract of the machine's docstrings, and nothing more."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as primary
from qemu_remus.core import toolstack_machine as machine
from qemu_remus.core.comparison import digest_blocks
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.extents import Extent, coalesce
from qemu_remus.core.model import Base, EpochNumber, Generation, InstanceId
from qemu_remus.core.primary_verify import verifying
from qemu_remus.core.verification import Findings, Order
from tests.simulation.models import (
    BLOCK,
    DISKS,
    PAIR,
    Action,
    Content,
    Crash,
    Link,
    Write,
    brief,
    bytes_of,
    extents_of,
    frozen,
    specs_of,
)

if TYPE_CHECKING:
    from tests.simulation.world import World


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


@dataclass(frozen=True)
class Saved:
    """The primary's state directory."""

    instance: InstanceId
    generation: Generation | None = None
    committed: Base = None
    highest: int = 0
    session: int = 0
    history: tuple[tuple[Generation, EpochNumber], ...] = ()
    handover: primary.Handover | None = None


class PrimaryHost:
    """The primary's shell. The toolstack sees it as its controller."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.saved = Saved(InstanceId(world.identity()))
        self.whole: machine.ToolstackState | None = None
        self.ended: primary.Stop | None = None
        self.verifications = 0
        self.verified = self.repaired = 0
        self._forget()

    def _forget(self) -> None:
        self.link: Link | None = None
        self.attempt: tuple[Link, m.Hello] | None = None
        self.connecting = False
        self.timer = False
        self.verify_timer = False
        self.hurried = False
        self.work: Work | None = None
        self.questions: deque[tuple[Work, Write]] = deque()

    @property
    def state(self) -> primary.PrimaryState | None:
        return None if self.whole is None else self.whole.primary

    def running(self) -> bool:
        return self.whole is not None

    def undecided(self) -> EpochNumber | None:
        state = self.state
        if state is None:
            return None
        if state.finished is not None:
            return state.finished.epoch
        return None if state.doubt is None else state.doubt.epoch

    def handed_over(self) -> bool:
        """It knows so, and its next start would be refused."""
        return self.saved.handover is not None and self.saved.handover.done

    def refused_for_good(self) -> bool:
        return self.ended is not None and (self.ended.refusal is not None or self.ended.goodbye is not None)

    # --- what can happen ---------------------------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        world, faults = self.world, self.world.faults
        state = self.state
        if state is None:
            may = not self.refused_for_good() and not self.handed_over()
            if may and not world.silent and not world.host_dead:
                yield 1.0, "the primary starts", self.start
            return
        if not world.calm:
            yield faults.primary_crash, "the primary crashes", self.die
            yield faults.stop, "the primary is asked to stop", lambda: self.handle(primary.StopRequested())
        if state.phase is not primary.Phase.STARTING and not state.stale and self._outdated():
            yield 0.3, "the primary sees that a disk has grown", lambda: self.handle(primary.DisksChanged())
        if state.stopping and not self.hurried:
            yield 0.3, "the primary has to stop now", self.hurry
        if state.phase is primary.Phase.STARTING:
            yield 3.0, "the primary looks at the VM's graph", self.attach
        if self.connecting and self.attempt is None:
            yield 2.0, "the primary connects", self.connect
        if self.attempt is not None:
            link, _ = self.attempt
            if link.to_primary:
                yield 3.0, "-> P", self.receive_first
            elif link.down_at_primary:
                yield 3.0, "the attempt to connect fails", self.attempt_failed
        if self.link is not None:
            if self.link.to_primary:
                yield 3.0, "-> P", self.receive
            elif self.link.down_at_primary:
                yield 1.0, "P sees that the link is down", self.link_down
        yield from world.switches.actions(self)
        if self.timer:
            yield 1.5, "a checkpoint is due", self.checkpoint_due
        if self.verify_timer:
            yield 3.0, "a slice is due", self.verify_due
        if not world.calm:
            wanted = 0.5 if state.protected and not verifying(state) else 0.02
            yield wanted, "somebody wants the copy verified", self.verify
            yield 0.01, "somebody wants that ended", lambda: self.handle(primary.VerifyCancelled(0))
        if self.work is not None:
            name = type(self.work.effect).__name__
            if self.work.result is None:
                yield 4.0, f"work goes on: {name}", self.work_on
            else:
                yield 4.0, f"work ends: {name}: {self.work.result}", self.report_work

    def start(self) -> None:
        world = self.world
        if self.saved.handover is None and world.happens(world.faults.lost_state):
            world.say("its state directory is lost")
            world.state_lost = True
            self.saved = Saved(InstanceId(world.identity()))
        self.ended = None
        state = primary.PrimaryState(
            pair=PAIR,
            instance=self.saved.instance,
            disks=specs_of(world.qemu.sizes),
            session=self.saved.session,
            one_step=world.one_step,
            allow_full_resync=world.allow_full_resync,
            generation=self.saved.generation,
            committed=self.saved.committed,
            highest=self.saved.highest,
            history=self.saved.history,
            handover=self.saved.handover,
        )
        self.whole = machine.ToolstackState(state)

    def attach(self) -> None:
        """The control socket is there already."""
        self.handle(primary.Attached(self.found()))

    def die(self) -> None:
        """The process is gone; what it has sent may still arrive."""
        for link in (self.link, self.attempt[0] if self.attempt else None):
            if link is not None:
                if self.world.rng.random() < 0.5:
                    link.cut()
                link.primary_open = False
        self._gone()

    def _gone(self) -> None:
        self._forget()
        if self.world.qemu.armed:
            self.world.say("the guardian resumes the VM")
            self.world.qemu.resume()
        self.whole = None
        self.world.toolstack.connection_lost()
        self.world.switches.connection_lost()

    def connect(self) -> None:
        state = self.state
        assert state is not None
        self.saved = replace(self.saved, session=self.saved.session + 1)
        ours = replace(primary.hello(state), session=self.saved.session)
        link = Link(len(self.world.begun) * 1000 + self.world.steps)
        self.world.links.append(link)
        self.attempt = (link, ours)
        if self.world.secondary.state is None:
            link.secondary_open = False
            link.cut()
            return
        self.world.secondary.accept(link)
        link.from_primary(ours)

    def attempt_failed(self) -> None:
        assert self.attempt is not None
        self.attempt[0].primary_open = False
        self.attempt = None

    def receive_first(self) -> None:
        assert self.attempt is not None
        link, ours = self.attempt
        theirs = link.at_primary()
        if isinstance(theirs, m.Hello):
            self.attempt, self.link, self.connecting = None, link, False
            self.questions.clear()
            much = self.world.rng.random() < 0.5
            self.handle(primary.LinkUp(ours, theirs, Generation(self.world.identity()), 1 << 40 if much else 0))
        else:
            assert isinstance(theirs, m.Goodbye)
            self.attempt_failed()
            self.handle(primary.LinkRefused(theirs))

    def receive(self) -> None:
        assert self.link is not None
        message = self.link.at_primary()
        if isinstance(message, m.BlocksDiffer):
            self._answered(message)
        else:
            self.handle(primary.FromPeer(message))

    def _answered(self, message: m.BlocksDiffer) -> None:
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

    def link_down(self) -> None:
        assert self.link is not None
        self.link.primary_open = False
        self.link = None
        self.handle(primary.LinkDown("the link was lost"))

    def hurry(self) -> None:
        self.hurried = True
        self.handle(primary.StopDeadline())

    def verify(self) -> None:
        rng = self.world.rng
        disks = tuple(range(DISKS)) if rng.random() < 0.7 else (rng.randrange(DISKS),)
        self.verifications += 1
        order = Order(
            self.verifications, disks, tuple(self._sizes()[disk] * BLOCK for disk in disks), rng.random() < 0.5
        )
        self.handle(primary.VerifyRequested(order))

    def verify_due(self) -> None:
        self.verify_timer = False
        self.handle(primary.VerifyDue())

    def checkpoint_due(self) -> None:
        self.timer = False
        self.handle(primary.CheckpointDue())

    # --- work --------------------------------------------------------------------------------------------------------

    def work_on(self) -> None:
        work = self.work
        assert work is not None
        work.result = self._advance(work, work.effect)

    def _advance(self, work: Work, effect: primary.Effect) -> primary.Event | None:
        world, qemu = self.world, self.world.qemu
        broken = world.happens(world.faults.work)
        failed = primary.WorkFailed("it failed", fatal=broken and world.rng.random() < 0.05, changed=self._outdated())
        match effect:
            case primary.Survey():
                qemu.snapshot = None
                changed = self._outdated()
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

    def _sizes(self) -> tuple[int, ...]:
        """Of the disks as the primary knows them, in blocks."""
        assert self.state is not None
        return tuple(disk.size // BLOCK for disk in self.state.disks)

    def _outdated(self) -> bool:
        return self._sizes() != self.world.qemu.sizes

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
        if self.state is not None and effect.generation != self.state.generation:
            self.world.taken_over = self.state.generation
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
            if any(block >= size for blocks, size in zip(dirty, self._sizes(), strict=True) for block in blocks):
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
        rng, state = self.world.rng, self.state
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
        size = self._sizes()[disk]
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
        if self._outdated():
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
            position = (sum(self._sizes()[:disk]) + block) * BLOCK
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
        self.handle(work.result)

    # --- effects -----------------------------------------------------------------------------------------------------

    def handle(self, event: machine.Event) -> None:
        before = self.whole
        assert before is not None
        self.whole, effects = machine.step(before, event)
        old, new = before.primary, self.whole.primary
        self.world.say(f"     P {brief(event)}: {old.phase.name} -> {new.phase.name} {brief(effects)}")
        if new.one_step and new.phase is primary.Phase.RETIRE and old.phase is not primary.Phase.RETIRE:
            assert new.generation is not None
            assert new.committed is not None
            self.world.commit_acknowledged((new.generation, new.committed))
        waiting = self.whole.waiting or new.switch is not None
        assert new.phase is not primary.Phase.STOPPED or not waiting, "somebody waits for ever"
        try:
            for effect in effects:
                self._maybe_crash()
                self._perform(effect)
                self._maybe_crash()
        except Crash:
            self.world.say("     P crashes there")
            self.die()

    def _maybe_crash(self) -> None:
        if self.running() and self.world.happens(self.world.faults.effect_crash):
            raise Crash

    def _perform(self, effect: machine.Effect) -> None:
        world, state = self.world, self.state
        assert state is not None, "an effect after Stop"
        match effect:
            case machine.Reply():
                world.toolstack.replied(effect, self)
            case machine.Ended():
                world.toolstack.told(effect)
            case primary.Connect():
                assert not self.connecting
                self._close_link()
                self.connecting = True
            case primary.Disconnect(code, text):
                assert code is not RefusalCode.PROTOCOL
                if self.link is not None:
                    self.link.from_primary(m.Goodbye(code, text))
                self._close_link()
            case primary.Send(message):
                if isinstance(message, m.EpochBegin):
                    assert state.generation is not None
                    assert (state.generation, message.epoch) not in world.begun, "an epoch number was used twice"
                    world.begun.add((state.generation, message.epoch))
                if self.link is not None:
                    self.link.from_primary(message)
            case primary.SaveState():
                self.saved = replace(
                    self.saved,
                    generation=state.generation,
                    committed=state.committed,
                    highest=state.highest + primary.EPOCHS_AHEAD,
                    history=state.history,
                    handover=state.handover,
                )
            case primary.Resume():
                world.qemu.resume()
            case primary.SwitchReply():
                world.switches.replied(effect)
            case primary.Schedule():
                self.timer = True
            case primary.ScheduleVerify():
                self.verify_timer = True
            case primary.VerifyAnswered():
                pass
            case primary.InterruptSlice(patient):
                if self.work is not None and not (patient and world.rng.random() < 0.7):
                    self.work.interrupted = True
            case primary.CancelWork():
                if self.work is not None:
                    self.work.cancelled = True
            case primary.Stop():
                self._stop(effect)
            case _:
                assert self.work is None, "two pieces of work at once"
                self.work = Work(effect, self.link, deque(self._blocks(effect)))
                if isinstance(effect, primary.Transfer | primary.VerifySlice):
                    self.work.extents, self.work.payload = effect.opened.extents, effect.opened.payload

    def _blocks(self, effect: primary.Effect) -> Iterator[tuple[int, int]]:
        snapshot = self.world.qemu.snapshot
        for disk in range(DISKS):
            if isinstance(effect, primary.Transfer):
                assert snapshot is not None
                yield from ((disk, block) for block in sorted(snapshot.dirty[disk]))
            elif isinstance(effect, primary.CopyLive):
                size = self._sizes()[disk]
                first = (effect.start or 0) // BLOCK - sum(self._sizes()[:disk])
                yield from ((disk, block) for block in range(max(0, first), size))

    def _close_link(self) -> None:
        if self.link is not None:
            self.link.primary_open = False
            self.link = None

    def _stop(self, effect: primary.Stop) -> None:
        world = self.world
        assert self.work is None, "stopped while work was under way"
        self.ended = effect
        if effect.goodbye is not None:
            self._check_refused(effect.goodbye.code)
        if effect.refusal is not None:
            self._check_refused(effect.refusal.code)
        self._close_link()
        if self.attempt is not None:
            self.attempt[0].primary_open = False
        self._gone()
        world.qemu.snapshot = None

    def _check_refused(self, code: RefusalCode) -> None:
        """The refusals that a world can really deserve."""
        world = self.world
        deserved = {
            RefusalCode.NEEDS_FULL_SYNC: world.tracking_lost or world.state_lost,
            RefusalCode.UNRELATED_DATA: world.state_lost,
            RefusalCode.OTHER_PRIMARY: world.state_lost,
            RefusalCode.FAILED_OVER: world.secondary.failing_over(),
            RefusalCode.ROLE_CONFLICT: world.secondary.failing_over() and world.state_lost,
            RefusalCode.NO_SPACE: bool(world.faults.store),
        }
        assert deserved.get(code, False), f"the primary was refused for no reason: {code}"
        if code is RefusalCode.OTHER_PRIMARY or code is RefusalCode.NO_SPACE:
            # The operator waits a little, makes room, and starts it again.
            self.ended = None


def _ranges(writes: list[Write]) -> tuple[Extent, ...]:
    return tuple(coalesce(Extent(disk, block * BLOCK, BLOCK) for disk, block, _ in sorted(writes)))
