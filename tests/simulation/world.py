"""Both machines among modelled surroundings, driven by one seeded random walk, and the promises checked at every step.

A seed fixes everything: which faults this world knows, and every choice.  The hosts keep the shells' contract as
the machines' docstrings state it, so that what holds here holds wherever that contract is kept: effects in order; the
event that an effect answers with is handled before anything else; after ``StoreFailed`` the rest of the step is
skipped; one piece of work at a time; ``CancelWork`` ends in failure, or in success if that was quicker.

Half of all worlds take their checkpoints by interval, in the others a toolstack drives them.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from uuid import UUID

from qemu_remus.core import primary_machine as primary
from qemu_remus.core import secondary_machine as secondary
from qemu_remus.core.model import EpochNumber, Generation, Replication
from tests.simulation.models import DISKS, Action, Content, Journal, Link, Qemu, frozen
from tests.simulation.primary_host import PrimaryHost
from tests.simulation.secondary_host import SecondaryHost
from tests.simulation.switches import Switches
from tests.simulation.toolstack import Key, Toolstack


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
    bitmap_gone: float = 0.0
    timeout: float = 0.0
    abort: float = 0.0
    toolstack: float = 0.0

    @classmethod
    def drawn(cls, rng: random.Random) -> Faults:
        """Each kind is off in half of all worlds, so that no fault hides behind another; rare ones find late states."""
        most = {"cut": 0.5, "effect_crash": 0.02, "lost_state": 0.3, "timeout": 1.0, "abort": 0.5, "toolstack": 0.3}
        return cls(**{f.name: rng.choice((0.0, most.get(f.name, 0.1) * 10 ** rng.uniform(-2, 0))) for f in fields(cls)})


class World:
    """Everything, and the walk through it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.faults = Faults.drawn(self.rng)
        # A generator of its own: worlds without it walk as they did before disks could grow.
        self.growth = random.Random(seed).choice((0, 0, 1, 3))
        """So many times a disk grows."""
        self.calm = False
        self.silent = False
        self.host_dead = False
        self.one_step = self.rng.random() < 0.5
        self.allow_full_resync = self.rng.random() < 0.5
        self.trace: deque[str] = deque(maxlen=120)
        self.steps = 0
        self._identities = 0
        self._values = 0
        self.links: list[Link] = []
        # What really happened, for the checks.
        self.checkpoints: dict[Key, Content] = {}
        self.begun: set[Key] = set()
        self.acknowledged: dict[Generation, EpochNumber] = {}
        self.tracking_lost = False
        self.state_lost = False
        self.taken_over: Generation | None = None
        self.ever_consistent = False
        self.answers: list[secondary.Answer] = []
        self.failed_over: Key | None = None
        self.requests = 0
        self.qemu = Qemu()
        self.toolstack = Toolstack(self)
        self.switches = Switches(self, seed)
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
        disk = self.rng.randrange(DISKS)
        self.qemu.write(disk, self.rng.randrange(len(self.qemu.disks[disk])), value)

    def a_disk_grows(self) -> None:
        """By a block that holds anything, as on a block device."""
        self._values += 1
        self.growth -= 1
        self.qemu.grow(self.rng.randrange(DISKS), self.rng.choice((0, self._values)))

    # --- the walk ----------------------------------------------------------------------------------------------------

    def actions(self) -> Iterator[Action]:
        # Something can always happen.
        running = not self.host_dead and self.toolstack.paused is None and not self.qemu.paused
        yield (1.0, "guest writes", self.guest_writes) if running else (0.1, "nothing happens", lambda: None)
        yield from self.primary.actions()
        yield from self.toolstack.actions(self.primary)
        if not self.silent:
            yield from self.secondary.actions()
            if self.secondary.state is not None:
                yield from self.toolstack.tell()
        live = [link for link in self.links if not link.cut_off and (link.primary_open or link.secondary_open)]
        if live and self.faults.cut and not self.calm:
            yield self.faults.cut, "the link is cut", lambda: self.rng.choice(live).cut()
        # Who starts the old VM while it is not known who has it, or when it is known, does so at his own risk.
        if self.faults.qemu_restart and not self.calm and self.primary.saved.handover is None:
            yield self.faults.qemu_restart, "QEMU restarts", self.restart_qemu
        if self.growth and running and not self.calm:
            yield 0.05, "a disk grows", self.a_disk_grows
        if self.faults.bitmap_gone and not self.calm:
            yield self.faults.bitmap_gone, "somebody removes a bitmap", self.remove_a_bitmap

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
        self.toolstack.restart()
        self.primary.die()

    def remove_a_bitmap(self) -> None:
        """One that is in use cannot be removed."""
        used = self.primary.worker.work.effect if self.primary.worker.work is not None else None
        if isinstance(used, primary.Transfer | primary.CopyAhead | primary.RemoveBitmaps):
            return
        bitmaps = self.rng.choice(self.qemu.bitmaps)
        if bitmaps:
            del bitmaps[self.rng.choice(list(bitmaps))]
            self.tracking_lost = True

    def host_dies(self) -> None:
        """The VM, its toolstack and its controller, for good; the backup of the memory is elsewhere."""
        self.say("the primary's host dies")
        self.primary.die()
        self.toolstack.host_dies()
        self.host_dead = True

    # --- the toolstack -----------------------------------------------------------------------------------------------

    def named(self, epoch: EpochNumber) -> Key | None:
        """The checkpoint that a toolstack means, which knows of no generation: the newest of that number."""
        return next((key for key in reversed(self.checkpoints) if key[1] == epoch), None)

    def commit_acknowledged(self, key: Key) -> None:
        """The network output of this checkpoint is released."""
        generation, epoch = key
        assert self.acknowledged.get(generation, 0) <= epoch
        if self.failed_over is not None:
            # Such an answer was under way when the failover began.
            assert epoch <= self.failed_over[1], "a commit that the failover did not take was acknowledged"
        self.acknowledged[generation] = epoch

    def disks_given_up(self, key: Key) -> bool:
        """A full copy over them has begun, or has to."""
        return self.tracking_lost or self.state_lost or key[0] != self.secondary.store.superblock.generation

    def request_failover(self, *, force: bool) -> None:
        host = self.secondary
        state = host.state
        assert state is not None
        self.requests += 1
        numbers: tuple[EpochNumber, ...] = ()
        if not self.one_step and self.rng.random() < 0.7:
            numbers = tuple(epoch for _, epoch in reversed(self.toolstack.memories))
        decided = state.failover
        if decided is not None:
            numbers = self.rng.choice(((), (decided.target,)))
        last = self.one_step or self.rng.random() < 0.5
        self.say(f"failover requested: {numbers or 'no numbers'}, last={last}, force={force}")
        event = secondary.FailoverRequested(self.requests, numbers, last, force, Generation(self.identity()))
        before, poisoned = len(self.answers), host.poisoned
        host.handle(event)
        for answer in self.answers[before:]:
            if answer.checkpoint is None:
                self.check_refused_failover(state, numbers, last=last, force=force)
        chosen = host.state.failover if host.state is not None else None
        if decided is None and chosen is not None and state.generation is not None:
            reachable = {state.committed, *secondary.in_doubt(state)}
            best = next((epoch for epoch in numbers if epoch in reachable), state.committed)
            # A store that was opened again may hold another than was known.
            assert poisoned or chosen.target == best, f"failover takes {chosen.target}, {best} can be reached"
            assert chosen.target >= self.acknowledged.get(state.generation, 0), "released output is lost"
            key = (state.generation, chosen.target)
            assert not numbers or key in self.toolstack.memories, "the disks are of another checkpoint than the memory"

    def check_refused_failover(
        self, state: secondary.SecondaryState, numbers: tuple[EpochNumber, ...], *, last: bool, force: bool
    ) -> None:
        trouble = self.secondary.poisoned or state.failover is not None or self.secondary.trouble
        alive = state.link is not None and not force
        doubt = not numbers and not last and state.staged is not None
        # A first copy that is staged is a checkpoint as soon as the toolstack names it.
        inconsistent = not state.consistent and not set(numbers) & set(secondary.in_doubt(state))
        assert trouble or alive or doubt or inconsistent, "a failover was refused without need"

    def released(self, failover: secondary.Failover, generation: Generation) -> None:
        """Promise 1, and what the toolstack relies on."""
        content = frozen(self.secondary.store.images)
        assert content == self.checkpoints[generation, failover.target], "the images are not the checkpoint"
        self.failed_over = (generation, failover.target)

    # --- what must hold at every step --------------------------------------------------------------------------------

    def check(self) -> None:
        self.switches.check()
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
        toolstack, key = self.toolstack, (generation, committed)
        if not self.one_step and not self.secondary.failing_over():
            assert key in toolstack.memories, f"checkpoint {committed} is committed without its memory"
            assert key not in toolstack.gone, f"epoch {committed} was {toolstack.gone[key].name}, and is committed"
            for staged_in, epoch in toolstack.staged - toolstack.dropping - set(toolstack.gone):
                kept = epoch <= committed or epoch in durable.staged or staged_in != generation
                assert kept, f"epoch {epoch} was staged, and is not kept"
        state = self.secondary.state
        if state is None or self.secondary.poisoned or state.failover is not None:
            return
        assert state.generation == generation
        assert state.committed == committed
        assert list(secondary.in_doubt(state)) == durable.staged

    def check_tracking(self, generation: Generation, committed: EpochNumber, held: Content) -> None:
        """Promise 5: every block that differs from the last commit is in a bitmap that may be sent upon it."""
        if self.tracking_lost or self.state_lost or self.primary.handed_over():
            return
        if generation == self.taken_over:
            # A full copy was begun by leave and did not come about: the disks are compared.
            assert self.allow_full_resync, "a full copy without leave"
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
            # What a disk has gained is compared, whatever the bitmaps say.
            both = range(min(len(here), len(held[disk])))
            differing = {block for block in both if here[block] != held[disk][block]}
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
            if self.primary.refused_for_good() or self.primary.handed_over():
                return False
            state = self.primary.state
            good = {Replication.PROTECTED, Replication.VERIFYING}
            protected = state is not None and primary.replication(state) in good
            if protected and self.acknowledged != acknowledged:
                doubt = self.primary.saved.handover
                assert doubt is not None or not self.qemu.paused or self.qemu.armed, (
                    "the VM was left paused for nothing"
                )
                return True
        raise AssertionError(f"not protected after {limit} quiet steps")

    def switch_over(self, limit: int) -> None:
        """An operator insists: in the end the VM has moved, and its old controller knows it; unless it was refused."""
        self.switches.insists = self.one_step
        for _ in range(limit // 4):
            self.step()
        if self.settle(limit) and self.switches.insists:
            for _ in range(limit):
                if self.primary.handed_over() or self.primary.refused_for_good():
                    break
                self.step()
            else:
                raise AssertionError(f"not handed over after {limit} quiet steps")

    def stop_primary(self, limit: int = 60) -> None:
        """The secondary is silent, and the primary must come to its end all the same."""
        self.calm = True
        self.silent = True
        self.say("--- stop ---")
        state = self.primary.state
        if state is None:
            return
        if state.phase is primary.Phase.STARTING:
            # It leaves what an earlier one has left: it has not looked yet.
            self.primary.attach()
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
        assert max(tracked) <= 1, "more than one bitmap was left behind"

    def fail_over(self, *, force: bool, limit: int = 400) -> None:
        """Ask, again and again, among whatever else happens, until the disks are free."""
        if self.rng.random() < 0.3:
            self.host_dies()
        elif force or self.rng.random() < 0.5:
            self.primary.die()
        for attempt in range(limit):
            if attempt > limit // 2:
                self.calm = True
            if self.failed_over is not None:
                break
            state = self.secondary.state
            if state is not None and self.rng.random() < 0.2:
                self.request_failover(force=force or attempt > limit // 3)
                undecided = self.secondary.state is None or self.secondary.state.failover is None
                if not state.consistent and not self.secondary.poisoned and undecided:
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
