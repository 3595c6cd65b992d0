"""Both machines among modelled surroundings, driven by one seeded random walk, and the promises checked at every step.

A seed fixes everything: which faults this world knows, and every choice.  The hosts here keep the shells' contract as
the machines' docstrings state it, so that what holds here holds wherever that contract is kept: effects in order; the
event that an effect answers with is handled before anything else; after ``StoreFailed`` the rest of the step is
skipped; one piece of work at a time; ``CancelWork`` ends in failure, or in success if that was quicker.
"""

from __future__ import annotations

import random
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from uuid import UUID

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as primary
from qemu_remus.core import secondary_machine as secondary
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import Base, EpochNumber, Generation, InstanceId, Replication, pair_name
from tests.simulation.models import (
    BLOCKS,
    DISKS,
    SPECS,
    Abort,
    Commit,
    Content,
    Data,
    End,
    Journal,
    Link,
    Qemu,
    Store,
    Write,
    extents_of,
    frozen,
    overlaid,
    writes_of,
)

PAIR = pair_name("pair")
Action = tuple[float, str, Callable[[], None]]


def brief(thing: object) -> str:
    """An event, or effects, short enough for a trace."""
    text = re.sub(r"UUID\('0*-?0*-?0*-?0*-?0*(\w+)'\)", r"#\1", repr(thing))
    return re.sub(r"b'[^']*'|b\"[^\"]*\"", "b'...'", text)


class Crash(Exception):
    """A controller dies between two effects."""


class StoreError(Exception):
    """An effect of the secondary fails."""

    def __init__(self, *, lasting: bool) -> None:
        super().__init__("disk trouble")
        self.lasting = lasting


@dataclass
class Faults:
    """How often each thing happens, in parts of one; 0 where this world does not know it."""

    cut: float = 0.0
    primary_crash: float = 0.0
    secondary_crash: float = 0.0
    effect_crash: float = 0.0
    work: float = 0.0
    store: float = 0.0
    apply: float = 0.0
    stop: float = 0.0
    lost_state: float = 0.0
    qemu_restart: float = 0.0

    @classmethod
    def drawn(cls, rng: random.Random) -> Faults:
        """Each kind is off in half of all worlds, so that no fault hides behind another; rare ones find late states."""
        most = {"cut": 0.5, "store": 0.1, "work": 0.1, "effect_crash": 0.02, "qemu_restart": 0.1, "lost_state": 0.3}
        return cls(**{f.name: rng.choice((0.0, most.get(f.name, 0.1) * 10 ** rng.uniform(-2, 0))) for f in fields(cls)})


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


class World:
    """Everything, and the walk through it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.faults = Faults.drawn(self.rng)
        self.calm = False
        self.silent = False
        self.one_step = self.rng.random() < 0.5
        self.allow_full_resync = self.rng.random() < 0.5
        self.trace: deque[str] = deque(maxlen=120)
        self.steps = 0
        self._identities = 0
        self._values = 0
        self.links: list[Link] = []
        # What really happened, for the checks.
        self.checkpoints: dict[tuple[Generation, EpochNumber], Content] = {}
        self.begun: set[tuple[Generation, EpochNumber]] = set()
        self.acknowledged: dict[Generation, EpochNumber] = {}
        self.memories: set[tuple[Generation, EpochNumber]] = set()
        self.tracking_lost = False
        self.state_lost = False
        self.ever_consistent = False
        self.answers: list[secondary.Answer] = []
        self.failed_over: tuple[Generation, EpochNumber] | None = None
        self.requests = 0
        self.qemu = Qemu()
        self.primary = PrimaryHost(self)
        self.secondary = SecondaryHost(self)
        for _ in range(self.rng.randrange(8)):
            self.guest_writes()

    # --- odds and ends -----------------------------------------------------------------------------------------------

    def identity(self) -> UUID:
        self._identities += 1
        return UUID(int=self._identities)

    def happens(self, chance: float) -> bool:
        return not self.calm and self.rng.random() < chance

    def say(self, text: str) -> None:
        self.trace.append(f"{self.steps:4} {text}")

    def guest_writes(self) -> None:
        self._values += 1
        # Zeroes are contents too, and travel differently.
        value = 0 if self.rng.random() < 0.2 else self._values
        self.qemu.write(self.rng.randrange(DISKS), self.rng.randrange(BLOCKS), value)

    # --- the walk ----------------------------------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        yield 1.0, "guest writes", self.guest_writes
        yield from self.primary.actions()
        if not self.silent:
            yield from self.secondary.actions()
        live = [link for link in self.links if not link.cut_off and (link.primary_open or link.secondary_open)]
        if live and self.faults.cut and not self.calm:
            yield self.faults.cut, "the link is cut", lambda: self.rng.choice(live).cut()
        if self.faults.qemu_restart and not self.calm:
            yield self.faults.qemu_restart, "QEMU restarts", self.restart_qemu

    def step(self) -> None:
        self.steps += 1
        actions = list(self.actions())
        (chosen,) = self.rng.choices(actions, [weight for weight, _, _ in actions])
        self.say(chosen[1])
        chosen[2]()
        self.links = [
            link for link in self.links if not (link.cut_off and not link.primary_open and not link.secondary_open)
        ]
        self.check()

    def restart_qemu(self) -> None:
        self.qemu.restart()
        self.tracking_lost = True
        self.primary.die()

    # --- the toolstack -----------------------------------------------------------------------------------------------

    def restorable(self, generation: Generation) -> tuple[EpochNumber, ...]:
        """The memory checkpoints on the backup, newest first."""
        return tuple(sorted((epoch for g, epoch in self.memories if g == generation), reverse=True))

    def memory_complete(self, generation: Generation, epoch: EpochNumber) -> None:
        self.memories.add((generation, epoch))

    def commit_reached_primary(self, generation: Generation, epoch: EpochNumber) -> None:
        """The network output of this checkpoint is released."""
        assert self.acknowledged.get(generation, 0) < epoch
        if self.failed_over is not None:
            # Such an answer was under way when the failover began.
            assert epoch <= self.failed_over[1], "a commit that the failover did not take was acknowledged"
        self.acknowledged[generation] = epoch
        self.memories = {(g, e) for g, e in self.memories if g == generation and e >= epoch}

    def request_failover(self, *, force: bool) -> None:
        host = self.secondary
        state = host.state
        assert state is not None
        self.requests += 1
        numbers: tuple[EpochNumber, ...] = ()
        if not self.one_step and state.generation is not None and self.rng.random() < 0.7:
            numbers = self.restorable(state.generation)
        decided = state.failover
        if decided is not None:
            numbers = self.rng.choice(((), (decided.target,)))
        last = self.one_step or self.rng.random() < 0.5
        self.say(f"failover requested: {numbers or 'no numbers'}, last={last}, force={force}")
        event = secondary.FailoverRequested(self.requests, numbers, last, force, Generation(self.identity()))
        before = len(self.answers)
        host.handle(event)
        for answer in self.answers[before:]:
            if answer.checkpoint is None:
                self.check_refused_failover(state, numbers, last=last, force=force)
        chosen = host.state.failover if host.state is not None else None
        if decided is None and chosen is not None and state.generation is not None:
            best = max(numbers, default=state.committed)
            assert chosen.target == best, f"failover takes {chosen.target}, {best} can be reached"
            assert chosen.target >= self.acknowledged.get(state.generation, 0), "released output is lost"

    def check_refused_failover(
        self, state: secondary.SecondaryState, numbers: tuple[EpochNumber, ...], *, last: bool, force: bool
    ) -> None:
        trouble = self.secondary.poisoned or state.failover is not None or self.secondary.trouble
        alive = state.link is not None and not force
        doubt = not numbers and not last and state.staged is not None
        assert trouble or alive or doubt or not state.consistent, "a failover was refused without need"

    def released(self, failover: secondary.Failover, generation: Generation) -> None:
        """Promise 1, and what the toolstack relies on."""
        content = frozen(self.secondary.store.images)
        assert content == self.checkpoints[generation, failover.target], "the images are not the checkpoint"
        self.failed_over = (generation, failover.target)

    # --- what must hold at every step --------------------------------------------------------------------------------

    def check(self) -> None:
        store = self.secondary.store
        if self.failed_over is not None:
            assert frozen(store.images) == self.checkpoints[self.failed_over]
            return
        generation = store.superblock.generation
        durable = store.journal(durable=True)
        committed = store.committed(durable)
        if generation is None or committed is None:
            lost = self.ever_consistent and not self.allow_full_resync
            assert not lost, "the secondary gave up its checkpoint without leave"
            return
        self.ever_consistent = True
        assert committed >= self.acknowledged.get(generation, 0), "an acknowledged commit is not durable"
        for epoch in (committed, *durable.staged):
            for landed in (False, True):
                view = store.view(durable, epoch, landed=landed)
                assert view == self.checkpoints[generation, epoch], f"checkpoint {epoch} cannot be made of the disks"
        self.check_memory(durable, generation, committed)
        self.check_tracking(generation, committed, store.view(durable, committed, landed=True))

    def check_memory(self, durable: Journal, generation: Generation, committed: EpochNumber) -> None:
        """What the toolstack may still choose is kept, and the machine knows what its journal holds."""
        decided = self.secondary.failing_over()
        for epoch in () if decided else self.restorable(generation):
            assert epoch <= committed or epoch in durable.staged, f"memory {epoch} has lost its disks"
        state = self.secondary.state
        if state is None or self.secondary.poisoned or state.failover is not None:
            return
        assert state.generation == generation
        assert state.committed == committed
        assert list(secondary.in_doubt(state)) == durable.staged

    def check_tracking(self, generation: Generation, committed: EpochNumber, held: Content) -> None:
        """Promise 5: every block that differs from the last commit is in a bitmap that may be sent upon it."""
        if self.tracking_lost or self.state_lost:
            return
        bases: list[EpochNumber] = []
        for disk, bitmaps in enumerate(self.qemu.bitmaps):
            ours = {recording: bitmap for recording, bitmap in bitmaps.items() if recording.generation == generation}
            if not ours:
                assert self.allow_full_resync, "nothing tracks this disk"
                return
            known = [recording.base for recording in ours if recording.base is not None]
            assert known, f"disk {disk} needs a full copy although checkpoint {committed} is committed"
            bases.append(min(known))
            dirty = set().union(*(bitmap.dirty for bitmap in ours.values()))
            here = self.qemu.disks[disk]
            differing = {block for block in range(BLOCKS) if here[block] != held[disk][block]}
            assert differing <= dirty, f"blocks {differing - dirty} of disk {disk} are forgotten"
        assert max(bases) <= committed, "the bitmaps begin after what the secondary holds"

    # --- ends --------------------------------------------------------------------------------------------------------

    def settle(self, limit: int) -> bool:
        """No more faults: the pair must come to be protected, unless the primary was refused for good.

        :return: whether it is protected.
        """
        self.calm = True
        self.say("--- calm ---")
        acknowledged = dict(self.acknowledged)
        for _ in range(limit):
            self.step()
            if self.primary.refused_for_good():
                return False
            state = self.primary.state
            protected = state is not None and primary.replication(state) is Replication.PROTECTED
            if protected and self.acknowledged != acknowledged:
                return True
        raise AssertionError(f"not protected after {limit} quiet steps")

    def stop_primary(self, limit: int = 60) -> None:
        """The secondary is silent, and the primary must come to its end all the same."""
        self.calm = True
        self.silent = True
        self.say("--- stop ---")
        if not self.primary.running():
            return
        self.primary.handle(primary.StopRequested())
        for _ in range(limit):
            if not self.primary.running():
                break
            self.step()
        assert not self.primary.running(), "the primary does not stop"
        assert self.qemu.snapshot is None, "a filter was left behind"
        if self.primary.ended is None or self.primary.ended.reason:
            # Work on the bitmaps had failed: the next start puts them in order.
            return
        tracked = [len(bitmaps) for bitmaps in self.qemu.bitmaps]
        assert tracked in ([0] * DISKS, [1] * DISKS), "more than one bitmap was left behind"

    def fail_over(self, *, force: bool, limit: int = 400) -> None:
        """Ask, again and again, among whatever else happens, until the disks are free."""
        if force or self.rng.random() < 0.5:
            self.primary.die()
        for attempt in range(limit):
            if attempt > limit // 2:
                self.calm = True
            if self.failed_over is not None:
                break
            state = self.secondary.state
            if state is not None and self.rng.random() < 0.2:
                self.request_failover(force=force or attempt > limit // 3)
                if not state.consistent and not self.secondary.poisoned and state.failover is None:
                    assert self.secondary.state is None or self.secondary.state.failover is None
                    return
            else:
                self.step()
        assert self.failed_over is not None, "the failover does not come to its end"
        for _ in range(30):
            self.step()
        if self.secondary.state is not None:
            target = self.failed_over[1]
            before = len(self.answers)
            self.secondary.handle(secondary.FailoverRequested(0, (target,), False, False, Generation(self.identity())))
            assert [answer.checkpoint for answer in self.answers[before:]] in ([target], [])


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


class SecondaryHost:
    """The secondary's shell, and its background work."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.instance = InstanceId(world.identity())
        self.store = Store()
        self.state: secondary.SecondaryState | None = None
        self.links: dict[int, Link] = {}
        self._forget()

    def _forget(self) -> None:
        self.links.clear()
        self.greeted: set[int] = set()
        self.poisoned = False
        self.trouble = False
        self.applying: tuple[EpochNumber, deque[Write]] | None = None
        self.counts = (0, 0)

    def failing_over(self) -> bool:
        state = self.state
        return self.store.superblock.failover is not None or (state is not None and state.failover is not None)

    # --- what can happen ---------------------------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        world, faults = self.world, self.world.faults
        if self.state is None:
            yield 1.0, "the secondary starts", self.start
            return
        if not world.calm:
            yield faults.secondary_crash, "the secondary crashes", self.die
        if self.poisoned or self.state.failed:
            yield 0.5, "the secondary is started again", self.die
        for number, link in list(self.links.items()):
            if link.to_secondary:
                yield 3.0, "-> S", lambda n=number: self.receive(n)  # type: ignore[misc]
            elif link.down_at_secondary:
                yield 1.0, "S sees that the link is down", lambda n=number: self.link_down(n)  # type: ignore[misc]
        if not self.failing_over() and not self.poisoned and self.store.unapplied(self._journal(), self._committed()):
            yield 1.5, "applying goes on", self.apply

    def _journal(self) -> Journal:
        return self.store.journal(durable=False)

    def _committed(self) -> Base:
        return self.store.committed(self._journal())

    def start(self) -> None:
        self.state = self.store.recover(PAIR, self.instance)

    def die(self) -> None:
        for link in self.links.values():
            if self.world.rng.random() < 0.5:
                link.cut()
            link.secondary_open = False
        self._forget()
        self.state = None
        self.store.crash(self.world.rng)

    def accept(self, link: Link) -> None:
        self.links[link.number] = link

    def receive(self, number: int) -> None:
        link = self.links[number]
        message = link.at_secondary()
        if number in self.greeted:
            self.handle(secondary.FromPeer(number, message))
        elif isinstance(message, m.Hello):
            self.greeted.add(number)
            self.handle(secondary.HelloReceived(number, message))

    def link_down(self, number: int) -> None:
        self.links.pop(number).secondary_open = False
        self.handle(secondary.LinkDown(number, "the link was lost"))

    def apply(self) -> None:
        """One small piece of the background work."""
        world = self.world
        if world.happens(world.faults.apply * 0.1):
            self.applying = None
            self.handle(secondary.ApplyFailed("an image cannot be written"))
            return
        if self.applying is None:
            journal = self._journal()
            epoch = self.store.unapplied(journal, self._committed())[0]
            self.applying = (epoch, deque(journal.data.get(epoch, ())))
        epoch, todo = self.applying
        if todo:
            self.store.write_images([todo.popleft()])
            return
        self.store.flush_images()
        self.store.trim(epoch)
        self.applying = None
        self.handle(secondary.Applied(epoch))

    # --- effects -----------------------------------------------------------------------------------------------------

    def handle(self, event: secondary.Event) -> None:
        try:
            self._handle(event)
        except Crash:
            self.world.say("     S crashes there")
            self.die()

    def _handle(self, event: secondary.Event) -> None:
        before = self.state
        assert before is not None
        self.state, effects = secondary.step(before, event)
        self.world.say(f"     S {brief(event)}: {before.phase.name} -> {self.state.phase.name} {brief(effects)}")
        for effect in effects:
            self._maybe_crash()
            try:
                result = self._perform(effect)
            except StoreError as error:
                self.trouble = True
                self.poisoned = self.poisoned or error.lasting
                code = RefusalCode.STORAGE_FAILED if error.lasting else RefusalCode.NO_SPACE
                self._handle(secondary.StoreFailed(code, "disk trouble", error.lasting))
                return
            self._maybe_crash()
            if result is not None:
                self._handle(result)

    def _maybe_crash(self) -> None:
        if self.world.happens(self.world.faults.effect_crash):
            raise Crash

    def _trouble(self, *, may_be_passing: bool) -> bool:
        """Fail before anything was done; or return that it is to fail after the deed, which nobody can know."""
        if self.poisoned:
            raise StoreError(lasting=True)
        if not self.world.happens(self.world.faults.store):
            return False
        if may_be_passing and self.world.rng.random() < 0.7:
            raise StoreError(lasting=False)
        if self.world.rng.random() < 0.5:
            raise StoreError(lasting=True)
        return True

    def _perform(self, effect: secondary.Effect) -> secondary.Event | None:
        match effect:
            case secondary.Send(number, message):
                if isinstance(message, m.EpochRefused):
                    assert message.code is not RefusalCode.BASE_TOO_NEW, "the two disagree about what may be sent"
                if number in self.links:
                    self.links[number].from_secondary(message)
                return None
            case secondary.CloseLink(number, code, text):
                assert code is not RefusalCode.PROTOCOL, f"a breach of protocol: {text}"
                link = self.links.pop(number, None)
                if link is not None:
                    link.from_secondary(m.Goodbye(code, text))
                    link.secondary_open = False
                return None
            case secondary.Answer():
                self.world.answers.append(effect)
                return None
            case secondary.WakeApply():
                return None
            case secondary.DropUnfinished():
                self._drop_unfinished()
                return None
            case _:
                after = self._trouble(may_be_passing=True)
                result = self._store_effect(effect, surely=not after)
                if after:
                    raise StoreError(lasting=True)
                return result

    def _drop_unfinished(self) -> None:
        self.store.forget(self._journal().unended())

    def _store_effect(self, effect: secondary.Effect, *, surely: bool) -> secondary.Event | None:
        """:param surely: False: the flush at the end fails, and only a crash shows what reached the disk."""
        store = self.store
        sync = store.sync if surely else lambda: None
        match effect:
            case secondary.PrepareTargets(generation, _):
                self.applying = None
                fresh = store.begin_sync(generation)
                return secondary.TargetsReady((fresh,) * DISKS)
            case secondary.WriteImages(message):
                store.write_images(writes_of(message))
            case secondary.FlushImages():
                if surely:
                    store.flush_images()
            case secondary.BeginEpoch(epoch, _):
                assert not self._journal().unended(), "the rest of an epoch that was not dropped"
                self.counts = (0, 0)
                store.superblock = replace(store.superblock, highest=max(store.superblock.highest, epoch))
            case secondary.AppendEpoch(message):
                self.counts = (self.counts[0] + len(message.extents), self.counts[1] + len(message.data))
                store.append(Data(message.epoch, tuple(writes_of(message))))
            case secondary.StageEpoch(end):
                assert (end.extents, end.payload) == self.counts, "the epoch did not arrive whole"
                store.append(End(end.epoch, end.commit))
                sync()
                return secondary.CommitDone(end.epoch) if end.commit else secondary.Staged(end.epoch)
            case secondary.CommitEpoch(epoch):
                store.append(Commit(epoch))
                sync()
                return secondary.CommitDone(epoch)
            case secondary.AbortEpoch(epoch):
                store.append(Abort(epoch))
                sync()
            case secondary.SaveFailover(failover):
                store.superblock = replace(store.superblock, failover=failover)
                return secondary.FailoverSaved()
            case secondary.FinishFailover(failover):
                self._finish(failover)
                return secondary.Released()
            case _:
                raise AssertionError(effect)
        return None

    def _finish(self, failover: secondary.Failover) -> None:
        """Bring the images to the target, in pieces that a crash can part."""
        store = self.store
        self.applying = None
        journal = self._journal()
        assert failover.target not in journal.staged
        assert all(epoch <= failover.target for epoch in (*journal.staged, *journal.commits))
        for epoch in store.unapplied(journal, failover.target):
            for write in journal.data.get(epoch, ()):
                store.write_images([write])
                self._maybe_crash()
        store.flush_images()
        self._maybe_crash()
        ended = store.superblock.generation
        assert ended is not None
        store.superblock = replace(
            store.superblock,
            generation=failover.generation,
            committed=failover.target,
            applied=failover.target,
            history=(*store.superblock.history, (ended, failover.target)),
            failover=replace(failover, done=True),
        )
        store.forget([record.epoch for record in store.records])
        self.world.released(failover, ended)


__all__ = ["World", "overlaid"]
