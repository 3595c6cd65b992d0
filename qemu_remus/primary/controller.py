"""The primary's controller: its engine takes one event after another, and carries out its effects.

What takes long (*work*) runs beside it, one piece at a time, and ends with an event.  Around it: the link, a timer, a
watch on QEMU, the control socket.  What may not enter: decisions (:mod:`qemu_remus.core.primary_machine`'s), QMP and
the block graph (:mod:`qemu_remus.qemu`), bytes on the wire.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial, singledispatchmethod
from typing import Final

import structlog
import trio

from qemu_remus.control import ControlServer
from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core import toolstack_machine as toolstack
from qemu_remus.core.commands import VERIFY_RATE, Nothing
from qemu_remus.core.errors import (
    CommandInDoubt,
    InternalError,
    LinkError,
    PeerRefused,
    QemuError,
    QemuRemusError,
    QemuUnreachable,
    RefusalCode,
)
from qemu_remus.core.frozen import replace
from qemu_remus.core.model import Generation
from qemu_remus.core.report import Report
from qemu_remus.core.settings import PrimaryConfig
from qemu_remus.core.times import stamped_primary
from qemu_remus.primary.engine import Engine
from qemu_remus.primary.first_state import first_state
from qemu_remus.primary.link_keeper import LinkKeeper, backoff
from qemu_remus.primary.outcome import patience, why
from qemu_remus.primary.power_off import last_checkpoint
from qemu_remus.primary.resizing import ResizeDesk
from qemu_remus.primary.switchover import SwitchDesk
from qemu_remus.primary.telling import Telling
from qemu_remus.primary.toolstack import ToolstackDesk
from qemu_remus.primary.verify_desk import VerifyDesk
from qemu_remus.primary.watches import Overdue, watch_answers, watch_dirty, watch_disks
from qemu_remus.primary.work import Work
from qemu_remus.primary.worker import Worker
from qemu_remus.qemu.attachment import Attachment
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.shutdown import Ending
from qemu_remus.qemu.survey import Surveyor
from qemu_remus.storage.memory import PrimaryMemory

STOP_PATIENCE: Final = 5.0
"""Seconds that an epoch under way gets to end by itself when the controller has to stop."""

STOP_TIMEOUT: Final = 30.0
"""Seconds until a controller that has to stop gives up on what is left and only cleans up."""

GOODBYE_TIMEOUT: Final = 2.0
"""Seconds that clients of the control socket get to read their last answers."""

_QEMU_GONE: Final = "QEMU has closed its QMP connection: the VM has ended, or is in trouble"

_log = structlog.get_logger("primary")


class PrimaryController:
    """One pair's primary."""

    def __init__(
        self,
        config: PrimaryConfig,
        memory: PrimaryMemory,
        client: QmpClient,
        attachment: Attachment,
        surveyor: Surveyor,
        ending: Ending | None = None,
    ) -> None:
        self._ending = ending
        self._config = config
        self._memory = memory
        self._client = client
        self._attachment = attachment
        self._surveyor = surveyor
        self._state = toolstack.ToolstackState(first_state(config, memory, attachment.disks))
        self._engine = Engine[toolstack.Event | Overdue](
            self._handle, lambda: self._primary.phase is machine.Phase.STOPPED
        )
        post = self._engine.post
        self._link = LinkKeeper(
            config.peer,
            config.heartbeat_timeout_seconds,
            make_hello=self._make_hello,
            heartbeat=self._heartbeat,
            on_hello=self._on_hello,
            on_message=self._on_message,
            on_refusal=self._on_refusal,
            on_down=self._on_down,
        )
        self._resizes = ResizeDesk(post)
        self._work = Work(
            config.pair,
            attachment,
            self._link.send,
            surveyor,
            resized=self._resizes.done,
            rate=config.rate_bytes_per_second,
        )
        self._saving = trio.Lock()
        self._nursery: trio.Nursery | None = None
        # Two: a piece of work tells the engine of its end by itself, and the next one follows from that.
        self._workers = (Worker(), Worker())
        self._work_scope = trio.CancelScope()
        self._timer_scope = trio.CancelScope()
        self._answer_due = math.inf
        self._failure: QemuRemusError | None = None
        self._desk = ToolstackDesk(self._engine.give, lambda: (self._work.dirty_bytes, self._work.pause_seconds))
        self._verify = VerifyDesk(
            post, attachment, self._work.verifier, default_rate=config.rate_bytes_per_second or VERIFY_RATE
        )
        self._switch_desk = SwitchDesk(post)
        handlers = {**self._desk.handlers(), **self._verify.handlers(), **self._switch_desk.handlers()}
        handlers |= self._resizes.handlers()
        self._control = ControlServer(config.control, {"query-replication": self._query_replication, **handlers})
        self._telling = Telling(config, attachment, surveyor, self._link, self._work, self._control)

    @property
    def _primary(self) -> machine.PrimaryState:
        return self._state.primary

    # --- tasks -------------------------------------------------------------------------------------------------------

    async def run(self, stop: trio.Event) -> None:
        """Protect the VM until ``stop`` is set or it can go on no more.

        :raise QemuRemusError: why it could go on no more.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self._control.serve)
            nursery.start_soon(self._watch_qemu)
            nursery.start_soon(watch_dirty, self._work, self._attachment, self._counts_by_itself)
            nursery.start_soon(watch_disks, self._client, self._surveyor, self._engine.post)
            nursery.start_soon(self._telling.watch_sync, lambda: machine.replication(self._primary))
            nursery.start_soon(self._telling.watch_verify, lambda: self._primary)
            nursery.start_soon(self._verify.run)
            for worker in self._workers:
                nursery.start_soon(worker.run)
            nursery.start_soon(self._desk.run)
            nursery.start_soon(self._watch_stop, stop)
            nursery.start_soon(self._watch_guest)
            nursery.start_soon(watch_answers, lambda: self._answer_due, self._engine.post)
            _log.info(
                "attached to QEMU",
                pair=self._config.pair,
                qemu=".".join(map(str, self._client.version)),
                disks=" ".join(f"{disk.name}={disk.node}" for disk in self._attachment.disks),
                control=str(self._config.control),
            )
            await self._engine.post(machine.Attached(await self._work.found()))
            await self._engine.run()
            # Whoever waits for an answer has it now, and it is on its way.
            await self._control.finish(GOODBYE_TIMEOUT)
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _watch_qemu(self) -> None:
        await self._client.closed.wait()
        committed = self._primary.committed
        self._failure = QemuUnreachable(
            _QEMU_GONE,
            safe="nothing was committed yet" if committed is None else f"the secondary holds checkpoint {committed}",
            hint="if the VM is gone for good, use `qemu-remus failover` on the secondary; else start the primary again",
        )
        await self._stop_within(0.0, machine_timeout=2.0)

    async def _watch_guest(self) -> None:
        """Where its QEMU is held when the guest has powered off."""
        if self._ending is None:
            return
        await self._ending.came.wait()
        _log.info("the guest has powered off: QEMU ends when what it wrote last is committed")
        checkpoint = await last_checkpoint(lambda: self._primary, self._engine.post)
        if checkpoint is not None:
            _log.info("the secondary holds all that the guest has written", checkpoint=checkpoint)
        else:
            self._failure = QemuError(
                "the guest has powered off, and what it wrote last could not be committed in time",
                safe="the VM's own disks hold everything; the secondary keeps its last checkpoint",
                hint="when the VM is started again, start its primary: the difference is sent",
            )
        await self._stop_within(STOP_PATIENCE, machine_timeout=STOP_TIMEOUT)

    async def _watch_stop(self, stop: trio.Event) -> None:
        await stop.wait()
        _log.info("asked to stop: the epoch under way is ended, then everything of ours but the bitmaps comes out")
        await self._stop_within(STOP_PATIENCE, machine_timeout=STOP_TIMEOUT)

    async def _stop_within(self, patience: float, *, machine_timeout: float) -> None:
        await self._engine.post(machine.StopRequested())
        await trio.sleep(patience)
        await self._engine.post(machine.StopDeadline())
        await trio.sleep(machine_timeout)
        self._running().cancel_scope.cancel()

    def _counts_by_itself(self) -> bool:
        elsewhere = machine.IN_EPOCH | {machine.Phase.IDLE, machine.Phase.RETIRE}
        return self._primary.recording is not None and self._primary.phase not in elsewhere

    def _running(self) -> trio.Nursery:
        assert self._nursery is not None, "the controller does not run"
        return self._nursery

    # --- the engine --------------------------------------------------------------------------------------------------

    async def _handle(self, event: toolstack.Event | Overdue) -> None:
        if not isinstance(event, Overdue):
            await self._step(event)
        elif event.due == self._answer_due:
            self._answer_due = math.inf
            reason = "the secondary is alive but did not answer in time"
            await self._link.close(m.Goodbye(RefusalCode.PROTOCOL, reason))
            await self._step(machine.LinkDown(reason))

    async def _step(self, event: toolstack.Event) -> None:
        before = self._primary
        self._state, effects = toolstack.step(self._state, event)
        primary = stamped_primary(before, self._primary, int(time.time()))
        if primary is not self._primary:
            self._state = replace(self._state, primary=primary)
        if self._primary.phase is not before.phase:
            self._answer_due = trio.current_time() + patience(self._primary.phase)
        self._note(before, event)
        for effect in effects:
            await _how(type(effect))(self, effect)
        self._telling.tell(before, self._primary)

    @singledispatchmethod
    async def _perform(self, effect: toolstack.Effect) -> None:
        raise InternalError(f"the primary has no way to do {effect!r}")

    @_perform.register
    async def _(self, effect: toolstack.Reply) -> None:
        self._desk.reply(effect)

    @_perform.register
    async def _(self, effect: toolstack.Ended) -> None:
        self._telling.ended(effect)

    @_perform.register
    async def _(self, effect: machine.Connect) -> None:
        self._running().start_soon(self._link.keep)

    @_perform.register
    async def _(self, effect: machine.Disconnect) -> None:
        await self._link.close(m.Goodbye(effect.code, effect.text))

    @_perform.register
    async def _(self, effect: machine.Send) -> None:
        # A link that is gone says so with LinkDown.
        with contextlib.suppress(LinkError):
            await self._link.send(effect.message)

    @_perform.register
    async def _(self, effect: machine.SaveState) -> None:
        await self._save()

    @_perform.register
    async def _(self, effect: machine.StartTracking) -> None:
        self._start(partial(self._work.start_tracking, effect.recording))

    @_perform.register
    async def _(self, effect: machine.MergeBack) -> None:
        self._start(partial(self._work.merge_back, effect))

    @_perform.register
    async def _(self, effect: machine.CopyLive) -> None:
        self._start(partial(self._work.copy_live, effect))

    @_perform.register
    async def _(self, effect: machine.CopyAhead) -> None:
        self._start(partial(self._work.copy_ahead, effect))

    @_perform.register
    async def _(self, effect: machine.ScheduleVerify) -> None:
        self._verify.schedule(effect)

    @_perform.register
    async def _(self, effect: machine.VerifySlice) -> None:
        self._work.verifier.begin()
        self._start(partial(self._work.verify, effect))

    @_perform.register
    async def _(self, effect: machine.InterruptSlice) -> None:
        self._work.verifier.interrupt(patient=effect.patient)

    @_perform.register
    async def _(self, effect: machine.VerifyAnswered) -> None:
        self._verify.reply(effect)

    @_perform.register
    async def _(self, effect: machine.Survey) -> None:
        self._start(partial(self._work.survey, effect))

    @_perform.register
    async def _(self, effect: machine.Capture) -> None:
        self._start(partial(self._work.capture, effect))

    @_perform.register
    async def _(self, effect: machine.Transfer) -> None:
        self._start(partial(self._work.transfer, effect))

    @_perform.register
    async def _(self, effect: machine.RemoveBitmaps) -> None:
        self._start(partial(self._work.remove, effect.recordings))

    @_perform.register
    async def _(self, effect: machine.Hold) -> None:
        _log.info("the VM is paused for a switch-over")
        self._start(partial(self._work.hold, effect))

    @_perform.register
    async def _(self, effect: machine.Stand) -> None:
        self._start(partial(self._work.stand, effect))

    @_perform.register
    async def _(self, effect: machine.Resume) -> None:
        try:
            await self._work.resume()
        except QemuError as error:
            _log.error("the VM may still be paused: look at it, and resume it (cont)", error=str(error))
        else:
            _log.warning("the VM was not handed over, and runs on")

    @_perform.register
    async def _(self, effect: machine.SwitchReply) -> None:
        self._switch_desk.reply(effect)

    @_perform.register
    async def _(self, effect: machine.CancelWork) -> None:
        self._work_scope.cancel()

    @_perform.register
    async def _(self, effect: machine.Schedule) -> None:
        self._timer_scope.cancel()
        self._timer_scope = trio.CancelScope()
        if self._config.interval_seconds is None:
            return
        due = self._work.capture_started + self._config.interval_seconds
        if effect.failures:
            due = trio.current_time() + backoff(effect.failures)
        self._running().start_soon(self._timer, due, self._timer_scope)

    @_perform.register
    async def _(self, effect: machine.Stop) -> None:
        if self._failure is None:
            self._failure = why(effect)
        recording = self._primary.recording
        if self._client.closed.is_set():
            return
        if recording is not None and recording.base is None and isinstance(self._failure, PeerRefused):
            # Nothing was ever committed and nobody wants the copy: the bitmap would be of no use to anybody.
            with contextlib.suppress(QemuError):
                await self._work.remove((recording,))
                recording = None
        if effect.doubt is not None:
            _log.error("stopped, and the VM stays paused", handed_over_at=effect.doubt.target)
        elif recording is None:
            _log.info("stopped: nothing of ours is left in QEMU", reason=self._primary.reason)
        else:
            _log.info("stopped: one tracking bitmap per disk stays in QEMU, so that a restart can send the difference")

    async def _timer(self, due: float, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep_until(due)
            await self._engine.post(machine.CheckpointDue())

    def _start(self, work: Callable[[], Awaitable[machine.Event]]) -> None:
        self._work_scope = trio.CancelScope()
        job = partial(self._run_work, work, self._work_scope)
        if not any(worker.take(job) for worker in self._workers):  # pieces before are on their way out
            self._running().start_soon(job)

    async def _run_work(self, work: Callable[[], Awaitable[machine.Event]], scope: trio.CancelScope) -> None:
        """Run a piece of work to its end, whatever that is, and say how it ended."""
        result: machine.Event = machine.WorkFailed("it was cancelled")
        with scope:
            try:
                result = await work()
            except CommandInDoubt as error:
                # What QEMU did with it is unknown, and only a fresh look at its bitmaps can tell.
                result = machine.WorkFailed(str(error), fatal=True)
            except LinkError as error:
                result = machine.WorkFailed(str(error), by_link=True)
            except QemuRemusError as error:
                result = machine.WorkFailed(str(error), changed=await self._disks_changed())
        if isinstance(result, machine.WorkFailed) and self._client.closed.is_set():
            # What failed in its last moments explains nothing.
            result = machine.WorkFailed(_QEMU_GONE)
        await self._engine.give(result)

    async def _disks_changed(self) -> bool:
        with contextlib.suppress(QemuError):
            return await self._surveyor.changed()
        return False

    async def _save(self) -> None:
        async with self._saving:
            state = self._primary
            save = partial(
                self._memory.save,
                generation=state.generation,
                committed=state.committed,
                highest_epoch=state.highest + machine.EPOCHS_AHEAD,
                session=state.session,
                history=state.history,
                begun=state.begun,
                decided=state.decided,
                handover=state.handover,
            )
            await trio.to_thread.run_sync(save)

    # --- the link ----------------------------------------------------------------------------------------------------

    async def _make_hello(self) -> m.Hello:
        primary = replace(self._primary, session=self._primary.session + 1)
        self._state = replace(self._state, primary=primary)
        await self._save()
        return machine.hello(self._primary)

    def _heartbeat(self) -> m.Heartbeat:
        state = self._primary
        return m.Heartbeat(captured=state.captured, staged=state.staged, committed=state.committed)

    async def _on_hello(self, ours: m.Hello, theirs: m.Hello) -> None:
        with contextlib.suppress(QemuError):
            self._work.dirty_bytes = await self._attachment.dirty_bytes()
        await self._engine.post(machine.LinkUp(ours, theirs, Generation(uuid.uuid4()), self._work.dirty_bytes))

    async def _on_message(self, message: m.Message) -> None:
        if isinstance(message, m.BlocksDiffer):
            self._work.comparison.answered(message)
        else:
            if isinstance(message, m.SyncFlushed):
                self._work.flushed(message.token)
            await self._engine.post(machine.FromPeer(message))

    async def _on_refusal(self, refusal: m.Goodbye | QemuRemusError) -> None:
        if isinstance(refusal, m.Goodbye):
            await self._engine.post(machine.LinkRefused(refusal))
        elif self._primary.committed is None:
            # Never yet protected, and it will not pass by itself: better an end that is seen than a quiet retry.
            self._failure = refusal
            await self._engine.post(machine.StopRequested())

    async def _on_down(self, reason: str) -> None:
        self._work.comparison.link_lost()
        await self._engine.post(machine.LinkDown(reason))

    # --- what others see ---------------------------------------------------------------------------------------------

    def _note(self, before: machine.PrimaryState, event: toolstack.Event) -> None:
        """Keep the figures."""
        state = self._primary
        if isinstance(event, machine.Captured):
            self._telling.captured()
        if state.committed is not None and state.committed != before.committed:
            if isinstance(event, machine.FromPeer):
                self._telling.committed()
            self._link.settled()

    def report(self) -> Report:
        """The status, as ``query-replication`` gives it."""
        return self._telling.report(self._primary)

    async def _query_replication(self, _: Nothing) -> Report:
        return self.report()


# As self._perform finds it, with more ado than many an effect is worth.
_how: Final[Callable[[type], Callable[..., Awaitable[None]]]] = vars(PrimaryController)["_perform"].dispatcher.dispatch
