"""The primary's shell in the simulation: it keeps the contract of the machine's docstrings, and nothing more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as primary
from qemu_remus.core import toolstack_machine as machine
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import Base, EpochNumber, Generation, InstanceId
from qemu_remus.core.primary_verify import verifying
from qemu_remus.core.verification import Order
from tests.simulation.models import BLOCK, DISKS, PAIR, Action, Crash, Link, brief, specs_of
from tests.simulation.primary_work import Worker

if TYPE_CHECKING:
    from tests.simulation.world import World


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
        self.worker = Worker(self)
        self._forget()

    def _forget(self) -> None:
        self.link: Link | None = None
        self.attempt: tuple[Link, m.Hello] | None = None
        self.connecting = False
        self.timer = False
        self.verify_timer = False
        self.hurried = False
        self.worker.forget()

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
        if state.phase is not primary.Phase.STARTING and not state.stale and self.worker.outdated():
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
        yield from self.worker.actions()

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
        self.handle(primary.Attached(self.worker.found()))

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
            self.worker.questions.clear()
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
            self.worker.answered(message)
        else:
            self.handle(primary.FromPeer(message))

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
            self.verifications, disks, tuple(self.worker.sizes()[disk] * BLOCK for disk in disks), rng.random() < 0.5
        )
        self.handle(primary.VerifyRequested(order))

    def verify_due(self) -> None:
        self.verify_timer = False
        self.handle(primary.VerifyDue())

    def checkpoint_due(self) -> None:
        self.timer = False
        self.handle(primary.CheckpointDue())

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
                if self.worker.work is not None and not (patient and world.rng.random() < 0.7):
                    self.worker.work.interrupted = True
            case primary.CancelWork():
                if self.worker.work is not None:
                    self.worker.work.cancelled = True
            case primary.Stop():
                self._stop(effect)
            case _:
                self.worker.begin(effect, self.link)

    def _close_link(self) -> None:
        if self.link is not None:
            self.link.primary_open = False
            self.link = None

    def _stop(self, effect: primary.Stop) -> None:
        world = self.world
        assert self.worker.work is None, "stopped while work was under way"
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
