"""The secondary's shell in the simulation, its store's troubles, and its background work."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_machine as secondary
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import Base, EpochNumber, InstanceId
from tests.simulation.models import (
    BLOCK,
    DISKS,
    PAIR,
    SIZES,
    Abort,
    Action,
    Commit,
    Crash,
    Data,
    End,
    Journal,
    Link,
    Store,
    Write,
    brief,
    writes_of,
)

if TYPE_CHECKING:
    from tests.simulation.world import World


class StoreError(Exception):
    """An effect of the secondary fails."""

    def __init__(self, *, lasting: bool) -> None:
        super().__init__("disk trouble")
        self.lasting = lasting


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
        self.stuck = False
        self.retry = False
        self.applying: tuple[EpochNumber, deque[Write]] | None = None
        self.counts = (0, 0)
        self.arriving = SIZES
        self.news: deque[secondary.Event] = deque()

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
                yield 0.2, "the secondary is started again", self.die
        if self.retry:
            yield 0.5, "the secondary tries again", self.try_again
        for number, link in list(self.links.items()):
            if link.to_secondary:
                yield 3.0, "-> S", lambda n=number: self.receive(n)  # type: ignore[misc]
            elif link.down_at_secondary:
                yield 1.0, "S sees that the link is down", lambda n=number: self.link_down(n)  # type: ignore[misc]
        can_apply = not self.failing_over() and not self.poisoned and not self.stuck
        if can_apply and self.store.unapplied(self._journal(), self._committed()):
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

    def try_again(self) -> None:
        self.retry = False
        self.handle(secondary.RetryDue())

    def apply(self) -> None:
        """One small piece of the background work."""
        news = self._apply_piece()
        if news is not None:
            self.handle(news)

    def _apply_piece(self) -> secondary.Applied | secondary.ApplyFailed | None:
        world = self.world
        if world.happens(world.faults.apply * 0.1):
            self.applying = None
            self.stuck = True
            return secondary.ApplyFailed("an image cannot be written")
        if self.applying is None:
            journal = self._journal()
            epoch = self.store.unapplied(journal, self._committed())[0]
            self.applying = (epoch, deque(journal.data.get(epoch, ())))
        epoch, todo = self.applying
        if todo:
            self.store.write_images([todo.popleft()])
            return None
        self.store.flush_images()
        self.store.trim(epoch)
        self.applying = None
        return secondary.Applied(epoch)

    def _apply_all(self) -> None:
        """Bring the images to the committed checkpoint for somebody who waits for it; the news come to him later."""
        while self.store.unapplied(self._journal(), self._committed()):
            self._maybe_crash()
            news = self._apply_piece()
            if news is not None:
                self.news.append(news)
            if isinstance(news, secondary.ApplyFailed):
                raise StoreError(lasting=False)

    # --- effects -----------------------------------------------------------------------------------------------------

    def handle(self, event: secondary.Event) -> None:
        try:
            self._handle(event)
            while self.news:
                self._handle(self.news.popleft())
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
                self.stuck = False
                return None
            case secondary.ScheduleRetry():
                self.retry = True
                return None
            case secondary.ReopenStore():
                if self.world.happens(self.world.faults.store):
                    raise StoreError(lasting=True)
                self.poisoned = False
                self.applying = None
                return secondary.Reopened(self.store.reopen(self.world.rng, PAIR, self.instance))
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
            case secondary.PrepareTargets(generation, disks):
                self.applying = None
                fresh = store.begin_sync(generation, tuple(disk.size // BLOCK for disk in disks))
                return secondary.TargetsReady((fresh,) * DISKS)
            case secondary.WriteImages(message):
                store.write_images(writes_of(message))
            case secondary.FlushImages(position):
                if surely:
                    store.flush_images()
                    self._maybe_crash()
                    store.superblock = replace(store.superblock, position=max(store.superblock.position, position))
                return secondary.ImagesFlushed(position)
            case secondary.ReopenTargets():
                return secondary.TargetsReopened()
            case secondary.BeginEpoch(epoch, _, disks):
                assert not self._journal().unended(), "the rest of an epoch that was not dropped"
                self.arriving = tuple(disk.size // BLOCK for disk in disks)
                store.make_room(self.arriving)
                self.counts = (0, 0)
                store.superblock = replace(store.superblock, highest=max(store.superblock.highest, epoch))
            case secondary.AppendEpoch(message):
                self.counts = (self.counts[0] + len(message.extents), self.counts[1] + len(message.data))
                store.append(Data(message.epoch, tuple(writes_of(message))))
            case secondary.CompareBlocks(question):
                self._apply_all()
                return secondary.Compared(store.compare(question, self._journal()))
            case secondary.StageEpoch(end):
                assert (end.extents, end.payload) == self.counts, "the epoch did not arrive whole"
                store.append(End(end.epoch, end.commit, self.arriving))
                sync()
                return secondary.CommitDone(end.epoch) if end.commit else secondary.Staged(end.epoch)
            case secondary.CommitEpoch(epoch):
                store.append(Commit(epoch))
                sync()
                return secondary.CommitDone(epoch)
            case secondary.AbortEpoch(epoch):
                store.append(Abort(epoch))
                sync()
                return secondary.AbortDone(epoch)
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
        sizes = store.sizes_at(journal, failover.target)
        store.cut(sizes)
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
            sizes=sizes,
        )
        store.forget([record.epoch for record in store.records])
        self.world.released(failover, ended)
