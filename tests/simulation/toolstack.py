"""The toolstack in the simulation: it drives one checkpoint after the other, and keeps the memory on the backup.

It obeys docs/control.md and knows no more than a toolstack does: answers, time-outs, lost connections, and what
``query-replication`` says.  It also judges the answers: none may contradict an earlier one, or what the
secondary holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Protocol

from qemu_remus.core import secondary_machine as secondary
from qemu_remus.core import toolstack_machine as machine
from qemu_remus.core.errors import CommitInDoubt, EpochLost, NotProtected, OutOfOrder, QemuRemusError, TimedOut
from qemu_remus.core.model import EpochNumber, Generation
from qemu_remus.core.toolstack_machine import Ended, Fate, Kind, Reply, Request, TimeUp
from tests.simulation.models import Action, Content, frozen

if TYPE_CHECKING:
    from tests.simulation.world import World

Key = tuple[Generation, EpochNumber]
"""A checkpoint. A toolstack knows the number alone, and must be able to rely on it."""


class Controller(Protocol):
    """A primary's control socket."""

    def handle(self, event: machine.Event) -> None:
        """A command."""

    def running(self) -> bool:
        """Whether anybody listens."""

    def undecided(self) -> EpochNumber | None:
        """``query-replication``: the epoch in doubt, or the one under way."""


class Stage(Enum):
    """Where the toolstack stands."""

    REST = auto()  # the VM runs
    PREPARED = auto()
    PAUSED = auto()  # start-new-epoch was sent
    DRIVING = auto()  # the VM runs again; memory and disks travel


@dataclass
class Drive:
    """A checkpoint that has a number and is not decided, as far as the toolstack knows.

    :ivar found: of an earlier toolstack, which has told nobody what it had asked for.
    :ivar memory: its memory can still be completed on the backup.
    :ivar finished: finish-disk-sync was answered as done.
    :ivar committing: its commit was asked for.
    :ivar aborting: its abort was asked for.
    """

    key: Key
    found: bool = False
    memory: bool = True
    finished: bool = False
    committing: bool = False
    aborting: bool = False


class Toolstack:
    """Both halves: beside the VM, and the backup's store of memories.

    :ivar memories: checkpoints whose memory the backup can restore, oldest first. They outlive the primary's host.
    :ivar eager: it completes memory N before disk N is known to be staged, and says so to the secondary.
    """

    def __init__(self, world: World) -> None:
        rng = world.rng
        self.world = world
        self.alive = not world.one_step
        self.eager = rng.random() < 0.5
        self.tells = rng.choice((0.0, 0.05, 0.5))
        self.pauses = rng.random() < 0.5
        self.memories: list[Key] = []
        self.stage = Stage.REST
        self.paused: Content | None = None
        self.asked: Request | None = None
        self.drive: Drive | None = None
        self.unprotected = False
        # What was answered, for the checks: for good, of each epoch; and what kinds of answers there were.
        self.committed: set[Key] = set()
        self.staged: set[Key] = set()
        self.gone: dict[Key, Fate] = {}
        self.dropping: set[Key] = set()
        self.answers: set[tuple[str, str]] = set()

    # --- what can happen ---------------------------------------------------------------------------------------------

    def actions(self, controller: Controller) -> Iterator[Action]:
        faults, calm = self.world.faults, self.world.calm
        if not self.alive or self.world.silent:
            return
        if not calm:
            yield faults.toolstack, "the toolstack is restarted", self.restart
        drive = self.drive
        travels = drive is not None and drive.memory and not drive.aborting and (drive.finished or self.eager)
        if drive is not None and travels and drive.key not in self.memories:
            yield 2.0, f"memory {drive.key[1]} is complete", lambda: self.memories.append(drive.key)
        if not controller.running():
            return
        if self.asked is not None:
            if not calm:
                yield faults.timeout, f"{self.asked.kind} times out", lambda: self.time_up(controller)
        elif drive is not None:
            yield from self._driving(controller, drive)
        else:
            # Where there was no protection it asks less often.
            yield 0.2 if self.unprotected else 1.0, "prepare-epoch", lambda: self.ask(controller, Kind.PREPARE)
            weight = 3.0 if self.stage is Stage.PREPARED else 0.1
            yield weight, "the VM is paused for start-new-epoch", lambda: self.pause(controller)

    def _driving(self, controller: Controller, drive: Drive) -> Iterator[Action]:
        faults, epoch = self.world.faults, drive.key[1]
        if drive.aborting:
            yield 2.0, f"abort-epoch {epoch}", lambda: self.ask(controller, Kind.ABORT, epoch)
        else:
            if not drive.finished:
                yield 2.0, f"finish-disk-sync {epoch}", lambda: self.ask(controller, Kind.FINISH, epoch)
            if drive.key in self.memories and (drive.finished or drive.committing):
                yield 2.0, f"commit-epoch {epoch}", lambda: self.ask(controller, Kind.COMMIT, epoch)
            hopeless = not drive.memory and drive.key not in self.memories
            if hopeless or not self.world.calm:
                weight = 1.0 if hopeless else faults.abort
                yield weight, f"abort-epoch {epoch}, first", lambda: self.ask(controller, Kind.ABORT, epoch)
        if (drive.committing or drive.aborting) and not self.world.calm:
            yield faults.toolstack, f"the toolstack asks no more about {epoch}", self.rest

    def tell(self) -> Iterator[Action]:
        """The backup's half can speak to the secondary."""
        if self.memories and self.tells and not self.world.calm:
            undecided = [key for key in self.memories if key not in self.committed]
            key = self.world.rng.choice(undecided or self.memories)
            yield self.tells if undecided else 0.02, f"memory-received {key[1]}", lambda: self.received(key)

    # --- commands ----------------------------------------------------------------------------------------------------

    def ask(self, controller: Controller, kind: Kind, epoch: EpochNumber | None = None) -> None:
        assert self.asked is None
        self.world.requests += 1
        self.asked = Request(self.world.requests, kind, epoch, pause=kind is Kind.START and self.pauses)
        if self.drive is not None:
            self.drive.committing |= kind is Kind.COMMIT
            if kind is Kind.ABORT:
                self._give_up(self.drive)
        controller.handle(self.asked)

    def pause(self, controller: Controller) -> None:
        self.paused = frozen(self.world.qemu.disks)
        self.stage = Stage.PAUSED
        self.ask(controller, Kind.START)

    def time_up(self, controller: Controller) -> None:
        assert self.asked is not None
        number = self.asked.number
        controller.handle(TimeUp(number))
        if controller.running():
            assert self.asked is None, "a time-out was not answered"

    def rest(self) -> None:
        """The VM runs, and nothing is asked for; memories stay."""
        self.stage, self.drive, self.asked, self.paused = Stage.REST, None, None, None

    restart = rest

    def host_dies(self) -> None:
        """With the VM. The backup's half lives on."""
        self.rest()
        self.alive = False

    def connection_lost(self) -> None:
        """The controller is gone: whatever was asked may have been done."""
        asked, self.asked = self.asked, None
        if asked is not None and asked.kind in {Kind.PREPARE, Kind.START}:
            self.rest()

    # --- answers -----------------------------------------------------------------------------------------------------

    def replied(self, reply: Reply, controller: Controller) -> None:
        asked = self.asked
        if asked is None or asked.number != reply.number:
            return
        self.asked = None
        self.answers.add((asked.kind, "done" if reply.error is None else type(reply.error).__name__))
        match asked.kind:
            case Kind.PREPARE:
                self.stage = Stage.PREPARED if reply.error is None else Stage.REST
                self.unprotected = isinstance(reply.error, NotProtected)
            case Kind.START:
                self._started(reply, controller)
            case _ if reply.error is None:
                self._done(asked.kind)
            case _:
                self._refused(asked.kind, reply.error)

    def _started(self, reply: Reply, controller: Controller) -> None:
        paused = self.paused
        self.rest()
        if reply.error is None:
            assert reply.epoch is not None
            key = self.world.named(reply.epoch)
            assert key is not None
            assert self.world.checkpoints[key] == paused, "the disks were captured at another moment than the memory"
            self.stage, self.drive = Stage.DRIVING, Drive(key)
            return
        epoch = controller.undecided()
        if isinstance(reply.error, OutOfOrder) and epoch is not None and (key := self.world.named(epoch)) is not None:
            # The last toolstack's, or one that was asked about for too long.
            self.stage, self.drive = Stage.DRIVING, Drive(key, found=True, memory=False)

    def _done(self, kind: Kind) -> None:
        drive = self.drive
        assert drive is not None
        match kind:
            case Kind.FINISH:
                drive.finished = True
                self.staged.add(drive.key)
                assert drive.key not in self.gone, "an epoch that was gone is staged"
            case Kind.COMMIT:
                self.count(drive.key)
                self.world.commit_acknowledged(drive.key)
                self.memories = self.memories[self.memories.index(drive.key) :]
                self.rest()
            case _:
                self.lose(drive.key, Fate.ABORTED)
                self.rest()

    def _refused(self, kind: Kind, error: QemuRemusError | None) -> None:
        drive = self.drive
        assert drive is not None
        if isinstance(error, EpochLost):
            assert kind is not Kind.ABORT
            self.lose(drive.key, Fate.LOST)
            self.rest()
        elif isinstance(error, OutOfOrder):
            self._out_of_order(kind, drive)
        else:
            assert isinstance(error, CommitInDoubt | TimedOut), error
            if kind is Kind.ABORT and (drive.committing or drive.found) and drive.key in self.memories:
                # Perhaps because its commit was asked for.
                drive.aborting, drive.committing = False, True
            elif kind is Kind.FINISH and self.world.happens(0.2):
                self._give_up(drive)

    def _out_of_order(self, kind: Kind, drive: Drive) -> None:
        if kind is Kind.ABORT:
            # It is committed: asking for that says so.
            assert drive.key in self.memories, "a checkpoint without its memory is committed"
            drive.aborting, drive.committing = False, True
            return
        assert drive.found or drive.key in self.dropping, f"{kind} is out of order"
        self._give_up(drive)

    def _give_up(self, drive: Drive) -> None:
        drive.aborting = True
        self.dropping.add(drive.key)

    # --- what became of an epoch -------------------------------------------------------------------------------------

    def count(self, key: Key) -> None:
        """Somebody has said that it is committed."""
        assert key not in self.gone, f"epoch {key[1]} was {self.gone[key].name}, and is committed"
        self.committed.add(key)

    def lose(self, key: Key, fate: Fate) -> None:
        """Somebody has said that it never will be."""
        if not self.world.disks_given_up(key):
            assert key not in self.committed, f"epoch {key[1]} was committed, and is {fate.name}"
            assert fate is Fate.ABORTED or key not in self.staged - self.dropping, (
                f"epoch {key[1]} was staged, and is lost"
            )
        self.gone.setdefault(key, fate)
        if key in self.memories:
            self.memories.remove(key)

    def told(self, ended: Ended) -> None:
        """An event of the primary's."""
        key = self.world.named(ended.epoch)
        if key is None or self.world.one_step:
            return
        if ended.fate is Fate.COMMITTED:
            self.count(key)
        elif ended.fate is not Fate.STAGED:
            assert key not in self.committed, f"epoch {key[1]} was committed, and is {ended.fate.name}"
            self.gone.setdefault(key, ended.fate)

    def received(self, key: Key) -> None:
        """``memory-received``, on the secondary."""
        world = self.world
        before = len(world.answers)
        world.requests += 1
        world.secondary.handle(secondary.MemoryReceived(world.requests, key[1]))
        for answer in world.answers[before:]:
            said = "noted" if answer.checkpoint is None else "done"
            self.answers.add(("memory-received", said if answer.error is None else type(answer.error).__name__))
            if answer.checkpoint is not None:
                assert answer.checkpoint == key[1]
                self.count(key)
            elif isinstance(answer.error, EpochLost):
                self.lose(key, Fate.LOST)
                if self.drive is not None and self.drive.key == key:
                    self.drive.memory = False
