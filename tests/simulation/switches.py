"""The operator in the simulation who hands a running VM over, and whoever resumes a VM without being asked.

He judges the answers, and above all: two VMs can never run, and no write is lost.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qemu_remus.core import primary_machine as primary
from qemu_remus.core.errors import CommitInDoubt
from qemu_remus.core.model import Generation
from tests.simulation.models import Action, frozen

if TYPE_CHECKING:
    from tests.simulation.primary_host import PrimaryHost
    from tests.simulation.world import World


class Switches:
    """In half of the worlds that take their checkpoints by interval. A generator of its own: other worlds stay as they
    are.

    :ivar insists: he wants it although nothing goes wrong any more, and waits for it.
    :ivar answers: kinds of answers there were.
    """

    def __init__(self, world: World, seed: int) -> None:
        rng = random.Random(f"switch-over {seed}")
        self.world = world
        self.wanted = rng.choice((0.0, 0.3 * 10 ** rng.uniform(-2, 0))) if world.one_step else 0.0
        self.interferes = rng.choice((0.0, 0.1))
        self.insists = False
        self.answers: set[str] = set()
        self._asked: dict[int, Generation] = {}
        self._offered: set[Generation] = set()
        self._denied: set[Generation] = set()
        self._next = 1

    def actions(self, host: PrimaryHost) -> Iterator[Action]:
        doubtful = self.world.qemu.paused and not self.world.qemu.armed
        if doubtful and not self.world.calm:
            yield from self._worst_moment(host)
        if not self.insists and (not self.wanted or self.world.calm):
            return
        if self._asked and not self.world.calm:
            yield 0.5 if doubtful else 0.1, "the switch-over times out", lambda: self.time_up(host)
        if len(self._asked) < 2:
            yield 0.3 if self.insists else self.wanted, "a switch-over is wanted", lambda: self.ask(host)
        if self.world.qemu.armed and self.interferes and not self.world.calm:
            yield self.interferes, "somebody resumes the VM", self.world.qemu.resume

    def _worst_moment(self, host: PrimaryHost) -> Iterator[Action]:
        """It is a short one, which faults at any time would hardly ever meet."""
        world, faults = self.world, self.world.faults
        if faults.primary_crash:
            yield 0.3, "the primary crashes in doubt", host.die
        if faults.secondary_crash and world.secondary.state is not None:
            yield 0.3, "the secondary crashes in doubt", world.secondary.die
        if faults.cut and host.link is not None and not host.link.cut_off:
            yield 0.5, "the link is cut in doubt", host.link.cut

    def ask(self, host: PrimaryHost) -> None:
        number, self._next = self._next, self._next + 1
        generation = self._asked[number] = Generation(self.world.identity())
        self._offered.add(generation)
        host.handle(primary.SwitchRequested(number, generation, 60.0))

    def time_up(self, host: PrimaryHost) -> None:
        host.handle(primary.SwitchTimeUp(next(iter(self._asked))))

    def connection_lost(self) -> None:
        self._asked.clear()

    def replied(self, reply: primary.SwitchReply) -> None:
        generation = self._asked.pop(reply.request)
        if reply.error is None:
            self.answers.add("done")
            assert reply.handover is not None
            failover = self.world.secondary.store.superblock.failover
            assert failover is not None
            assert failover.target == reply.handover.target
            return
        self.answers.add(type(reply.error).__name__)
        if not isinstance(reply.error, CommitInDoubt):
            # For good: whoever hears it lets the VM run.
            self._denied.add(generation)
            assert generation != self.handed_over(), "the VM is said to run on, and the secondary has taken over"

    def handed_over(self) -> Generation | None:
        """The generation that began with a switch-over; None where there was none. A failover is the operator's."""
        failover = self.world.secondary.store.superblock.failover
        return failover.generation if failover is not None and failover.generation in self._offered else None

    def check(self) -> None:
        generation = self.handed_over()
        if generation is None:
            return
        world = self.world
        store = world.secondary.store
        failover = store.superblock.failover
        assert failover is not None
        assert generation not in self._denied, "the secondary takes over, which was said not to"
        assert world.qemu.paused, "two VMs can run"
        assert not world.qemu.armed, "the guardian would resume it"
        ended = store.superblock.history[-1][0] if failover.done else store.superblock.generation
        assert ended is not None
        assert frozen(world.qemu.disks) == world.checkpoints[ended, failover.target], "a write is lost"
