"""The primary's shell in the simulation: it keeps the contract of the machine's docstrings, and nothing more."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as primary
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import Base, EpochNumber, Generation, InstanceId
from tests.simulation.models import (
    BLOCKS,
    DISKS,
    PAIR,
    SPECS,
    Action,
    Content,
    Crash,
    Link,
    Write,
    brief,
    extents_of,
    frozen,
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
    cancelled: bool = False
    result: primary.Event | None = None


@dataclass(frozen=True)
class Saved:
    """The primary's state directory."""

    instance: InstanceId
    generation: Generation | None = None
    committed: Base = None
    highest: int = 0
    session: int = 0


class PrimaryHost:
    """The primary's shell."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.saved = Saved(InstanceId(world.identity()))
        self.state: primary.PrimaryState | None = None
        self.ended: primary.Stop | None = None
        self._forget()

    def _forget(self) -> None:
        self.link: Link | None = None
        self.attempt: tuple[Link, m.Hello] | None = None
        self.connecting = False
        self.timer = False
        self.hurried = False
        self.work: Work | None = None

    def running(self) -> bool:
        return self.state is not None

    def refused_for_good(self) -> bool:
        return self.ended is not None and (self.ended.refusal is not None or self.ended.goodbye is not None)

    # --- what can happen ---------------------------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        world, faults = self.world, self.world.faults
        state = self.state
        if state is None:
            if not self.refused_for_good() and not world.silent:
                yield 1.0, "the primary starts", self.start
            return
        if not world.calm:
            yield faults.primary_crash, "the primary crashes", self.die
            yield faults.stop, "the primary is asked to stop", lambda: self.handle(primary.StopRequested())
        if state.stopping and not self.hurried:
            yield 0.3, "the primary has to stop now", self.hurry
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
        if self.timer:
            yield 1.5, "a checkpoint is due", self.checkpoint_due
        yield from self._toolstack(state)
        if self.work is not None:
            name = type(self.work.effect).__name__
            if self.work.result is None:
                yield 4.0, f"work goes on: {name}", self.work_on
            else:
                yield 4.0, f"work ends: {name}: {self.work.result}", self.report_work

    def _toolstack(self, state: primary.PrimaryState) -> Iterator[Action]:
        if state.phase is not primary.Phase.STAGED or state.finished is None:
            return
        generation, epoch = state.finished.generation, state.finished.epoch
        if (generation, epoch) not in self.world.memories:
            yield 2.0, f"memory {epoch} is complete", lambda: self.world.memory_complete(generation, epoch)
        else:
            yield 2.0, f"commit {epoch} is due", lambda: self.handle(primary.CommitDue(epoch))

    def start(self) -> None:
        world = self.world
        if world.happens(world.faults.lost_state):
            world.say("its state directory is lost")
            world.state_lost = True
            self.saved = Saved(InstanceId(world.identity()))
        self.ended = None
        self.state = primary.PrimaryState(
            pair=PAIR,
            instance=self.saved.instance,
            disks=SPECS,
            session=self.saved.session,
            one_step=world.one_step,
            allow_full_resync=world.allow_full_resync,
            generation=self.saved.generation,
            committed=self.saved.committed,
            highest=self.saved.highest,
        )
        self.handle(primary.Attached(tuple(tuple(bitmaps) for bitmaps in world.qemu.bitmaps)))

    def die(self) -> None:
        """The process is gone; what it has sent may still arrive."""
        for link in (self.link, self.attempt[0] if self.attempt else None):
            if link is not None:
                if self.world.rng.random() < 0.5:
                    link.cut()
                link.primary_open = False
        self._forget()
        self.state = None

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
            self.handle(primary.LinkUp(ours, theirs, Generation(self.world.identity())))
        else:
            assert isinstance(theirs, m.Goodbye)
            self.attempt_failed()
            self.handle(primary.LinkRefused(theirs))

    def receive(self) -> None:
        assert self.link is not None
        self.handle(primary.FromPeer(self.link.at_primary()))

    def link_down(self) -> None:
        assert self.link is not None
        self.link.primary_open = False
        self.link = None
        self.handle(primary.LinkDown("the link was lost"))

    def hurry(self) -> None:
        self.hurried = True
        self.handle(primary.StopDeadline())

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
        failed = primary.WorkFailed("it failed", fatal=broken and world.rng.random() < 0.05)
        match effect:
            case primary.StartTracking(recording):
                if broken:
                    return failed
                qemu.start_tracking(recording)
                return primary.TrackingStarted()
            case primary.MergeBack(old, into):
                qemu.snapshot = None
                for disk in range(DISKS):
                    if broken and world.rng.random() < 0.5:
                        return failed
                    qemu.merge_back(disk, old, into)
                return failed if broken else primary.Merged()
            case primary.RemoveBitmap(recording):
                for bitmaps in qemu.bitmaps:
                    if broken and world.rng.random() < 0.5:
                        return failed
                    del bitmaps[recording]
                return failed if broken else primary.BitmapRemoved()
            case primary.Capture(finished, following):
                return self._capture(work, finished, following, failed if broken else None)
            case primary.Transfer(finished):
                return self._transfer(work, finished.epoch, failed if broken else None)
            case primary.CopyLive(fresh):
                return self._copy(work, fresh, failed if broken else None)
            case _:
                raise AssertionError(effect)

    def _capture(
        self, work: Work, finished: primary.Recording, following: primary.Recording, failed: primary.Event | None
    ) -> primary.Event:
        world = self.world
        if work.cancelled and world.rng.random() < 0.5:
            return primary.WorkFailed("cancelled")
        if failed is not None and world.rng.random() < 0.5:
            return failed
        content = world.qemu.capture(finished, following)
        key = (finished.generation, finished.epoch)
        assert key not in world.checkpoints, f"epoch {finished.epoch} was captured before"
        world.checkpoints[key] = content
        if failed is not None:
            # The bitmaps were rotated, then a filter could not be put in.
            world.qemu.snapshot = None
            return failed
        return primary.Captured()

    def _transfer(self, work: Work, epoch: EpochNumber, failed: primary.Event | None) -> primary.Event | None:
        snapshot = self.world.qemu.snapshot
        assert snapshot is not None
        assert work.link is not None
        if failed is not None or work.link.cut_off or (work.cancelled and work.todo):
            self.world.qemu.snapshot = None
            return failed or primary.WorkFailed("cancelled, or the link is gone")
        if not work.todo:
            self.world.qemu.snapshot = None
            return primary.Transferred(work.extents, work.payload, 0)
        writes = [self._next_write(work, snapshot.content)]
        if work.todo and self.world.rng.random() < 0.5:
            writes.append(self._next_write(work, snapshot.content))
        extents, data = extents_of(writes)
        work.extents += len(extents)
        work.payload += len(data)
        work.link.from_primary(m.EpochExtents(epoch, extents, data))
        return None

    def _next_write(self, work: Work, content: Content) -> Write:
        disk, block = work.todo.popleft()
        return disk, block, content[disk][block]

    def _copy(self, work: Work, fresh: tuple[bool, ...], failed: primary.Event | None) -> primary.Event | None:
        assert work.link is not None
        if failed is not None or work.link.cut_off or (work.cancelled and work.todo):
            return failed or primary.WorkFailed("cancelled, or the link is gone")
        if not work.todo:
            return primary.SyncCopied()
        disk, block, value = self._next_write(work, frozen(self.world.qemu.disks))
        if value or not fresh[disk]:
            work.link.from_primary(m.SyncExtents(*extents_of([(disk, block, value)])))
        return None

    def report_work(self) -> None:
        work = self.work
        assert work is not None
        assert work.result is not None
        self.work = None
        self.handle(work.result)

    # --- effects -----------------------------------------------------------------------------------------------------

    def handle(self, event: primary.Event) -> None:
        before = self.state
        assert before is not None
        self.state, effects = primary.step(before, event)
        self.world.say(f"     P {brief(event)}: {before.phase.name} -> {self.state.phase.name} {brief(effects)}")
        if self.state.phase is primary.Phase.RETIRE and before.phase is not primary.Phase.RETIRE:
            assert self.state.generation is not None
            assert self.state.committed is not None
            self.world.commit_reached_primary(self.state.generation, self.state.committed)
        try:
            for effect in effects:
                self._maybe_crash()
                self._perform(effect)
                self._maybe_crash()
        except Crash:
            self.world.say("     P crashes there")
            self.die()

    def _maybe_crash(self) -> None:
        if self.state is not None and self.world.happens(self.world.faults.effect_crash):
            raise Crash

    def _perform(self, effect: primary.Effect) -> None:
        world, state = self.world, self.state
        assert state is not None, "an effect after Stop"
        match effect:
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
                    self.saved, generation=state.generation, committed=state.committed, highest=state.highest
                )
            case primary.Schedule():
                self.timer = True
            case primary.CancelWork():
                if self.work is not None:
                    self.work.cancelled = True
            case primary.Stop():
                self._stop(effect)
            case _:
                assert self.work is None, "two pieces of work at once"
                self.work = Work(effect, self.link, deque(self._blocks(effect)))

    def _blocks(self, effect: primary.Effect) -> Iterator[tuple[int, int]]:
        snapshot = self.world.qemu.snapshot
        for disk in range(DISKS):
            if isinstance(effect, primary.Transfer):
                assert snapshot is not None
                yield from ((disk, block) for block in sorted(snapshot.dirty[disk]))
            elif isinstance(effect, primary.CopyLive):
                yield from ((disk, block) for block in range(BLOCKS))

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
        self._forget()
        self.state = None
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
