"""The primary's engine: it takes events from a bounded queue, one at a time, and carries out their effects.

What takes long (*work*) runs beside it, one piece at a time, and ends with an event.  Around it: the link, a timer, a
watch on QEMU, the control socket.  What may not enter: decisions (:mod:`qemu_remus.core.primary_machine`'s), QMP and
the block graph (:mod:`qemu_remus.qemu`), bytes on the wire.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial, singledispatchmethod
from typing import Final

import structlog
import trio

from qemu_remus.control import ControlServer
from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.commands import EpochWasLost, EventName, Nothing, ReplicationChanged
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
from qemu_remus.core.model import DiskSpec, DiskState, EpochNumber, Generation, Replication, Role
from qemu_remus.core.report import Checkpoints, DiskReport, EpochCounts, Report
from qemu_remus.core.settings import PrimaryConfig
from qemu_remus.primary.link_keeper import LinkKeeper, backoff
from qemu_remus.primary.work import Work
from qemu_remus.qemu.attachment import Attachment
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.storage.memory import PrimaryMemory

QUEUE_LIMIT: Final = 64
"""Most events that wait for the engine."""

ANSWER_TIMEOUT: Final = 30.0
"""Seconds that a secondary, although alive, may take to answer for an epoch."""

SYNC_ANSWER_TIMEOUT: Final = 900.0
"""The same for creating its images, and for flushing a whole copy of the disks."""

STOP_PATIENCE: Final = 5.0
"""Seconds that an epoch under way gets to end by itself when the controller has to stop."""

STOP_TIMEOUT: Final = 30.0
"""Seconds until a controller that has to stop gives up on what is left and only cleans up."""

DIRTY_REFRESH: Final = 2.0
"""Seconds between looks at the recording bitmaps while no checkpoint counts them."""

_QEMU_GONE: Final = "QEMU has closed its QMP connection: the VM has ended, or is in trouble"

_log = structlog.get_logger("primary")


class PrimaryController:
    """One pair's primary."""

    def __init__(
        self,
        config: PrimaryConfig,
        memory: PrimaryMemory,
        client: QmpClient,
        disks: tuple[VmDisk, ...],
        attachment: Attachment,
    ) -> None:
        self._config = config
        self._memory = memory
        self._client = client
        self._disks = disks
        self._attachment = attachment
        known = memory.superblock
        self._state = machine.PrimaryState(
            pair=config.pair,
            instance=known.instance,
            disks=tuple(DiskSpec(disk.name, disk.size) for disk in disks),
            session=known.session,
            allow_full_resync=config.allow_inconsistent_resync,
            generation=known.generation,
            committed=known.committed,
            highest=known.highest_epoch,
        )
        self._post, self._events = trio.open_memory_channel[machine.Event](QUEUE_LIMIT)
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
        self._work = Work(config.pair, attachment, self._link.send, [disk.size for disk in disks])
        self._saving = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._work_scope = trio.CancelScope()
        self._timer_scope = trio.CancelScope()
        self._committed_at: float | None = None
        self._captured = self._committed = self._lost = 0
        self._failure: QemuRemusError | None = None
        self._control = ControlServer(config.control, {"query-replication": self._query_replication})

    # --- tasks -------------------------------------------------------------------------------------------------------

    async def run(self, stop: trio.Event) -> None:
        """Protect the VM until ``stop`` is set or it can go on no more.

        :raise QemuRemusError: why it could go on no more.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self._control.serve)
            nursery.start_soon(self._watch_qemu)
            nursery.start_soon(self._watch_dirty)
            nursery.start_soon(self._watch_stop, stop)
            _log.info(
                "attached to QEMU",
                pair=self._config.pair,
                qemu=".".join(map(str, self._client.version)),
                disks=" ".join(f"{disk.name}={disk.node}" for disk in self._disks),
                control=str(self._config.control),
            )
            await self._post.send(machine.Attached(await self._found()))
            await self._engine()
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _found(self) -> tuple[tuple[machine.Recording, ...], ...]:
        found = await self._attachment.bitmaps()
        return tuple(
            tuple(machine.Recording(b.generation, b.base, b.epoch) for b in found.get(disk.name, ()))
            for disk in self._disks
        )

    async def _watch_qemu(self) -> None:
        await self._client.closed.wait()
        committed = self._state.committed
        self._failure = QemuUnreachable(
            _QEMU_GONE,
            safe="nothing was committed yet" if committed is None else f"the secondary holds checkpoint {committed}",
            hint="if the VM is gone for good, use `qemu-remus failover` on the secondary; else start the primary again",
        )
        await self._stop_within(0.0, machine_timeout=2.0)

    async def _watch_stop(self, stop: trio.Event) -> None:
        await stop.wait()
        _log.info("asked to stop: the epoch under way is ended, then everything of ours but the bitmaps comes out")
        await self._stop_within(STOP_PATIENCE, machine_timeout=STOP_TIMEOUT)

    async def _stop_within(self, patience: float, *, machine_timeout: float) -> None:
        await self._post.send(machine.StopRequested())
        await trio.sleep(patience)
        await self._post.send(machine.StopDeadline())
        await trio.sleep(machine_timeout)
        self._running().cancel_scope.cancel()

    async def _watch_dirty(self) -> None:
        counted_elsewhere = machine.IN_EPOCH | {machine.Phase.IDLE, machine.Phase.RETIRE}
        while True:
            await trio.sleep(DIRTY_REFRESH)
            if self._state.recording is not None and self._state.phase not in counted_elsewhere:
                with contextlib.suppress(QemuError):
                    self._work.dirty_bytes = await self._attachment.dirty_bytes()

    def _running(self) -> trio.Nursery:
        if self._nursery is None:
            raise InternalError("the controller does not run")
        return self._nursery

    # --- the engine --------------------------------------------------------------------------------------------------

    async def _engine(self) -> None:
        while self._state.phase is not machine.Phase.STOPPED:
            event = await self._next_event()
            before = self._state
            self._state, effects = machine.step(before, event)
            self._note(before, event)
            for effect in effects:
                await self._perform(effect)
            self._tell(before)

    async def _next_event(self) -> machine.Event:
        with trio.move_on_after(self._patience()):
            event: machine.Event = await self._events.receive()
            return event
        reason = "the secondary is alive but did not answer in time"
        await self._link.close(m.Goodbye(RefusalCode.PROTOCOL, reason))
        return machine.LinkDown(reason)

    def _patience(self) -> float:
        """Seconds that the next event may take: only an answer of the secondary has a deadline of its own here."""
        if self._state.phase in {machine.Phase.STAGE, machine.Phase.COMMIT}:
            return ANSWER_TIMEOUT
        if self._state.phase in {machine.Phase.SYNC_BEGIN, machine.Phase.SYNC_FLUSH}:
            return SYNC_ANSWER_TIMEOUT
        return float("inf")

    @singledispatchmethod
    async def _perform(self, effect: machine.Effect) -> None:
        raise InternalError(f"the primary has no way to do {effect!r}")

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
        self._start(partial(self._work.copy_live, effect.fresh))

    @_perform.register
    async def _(self, effect: machine.Capture) -> None:
        self._start(partial(self._work.capture, effect))

    @_perform.register
    async def _(self, effect: machine.Transfer) -> None:
        self._start(partial(self._work.transfer, effect.finished))

    @_perform.register
    async def _(self, effect: machine.RemoveBitmap) -> None:
        self._start(partial(self._work.remove, effect.recording))

    @_perform.register
    async def _(self, effect: machine.CancelWork) -> None:
        self._work_scope.cancel()

    @_perform.register
    async def _(self, effect: machine.Schedule) -> None:
        self._timer_scope.cancel()
        self._timer_scope = trio.CancelScope()
        due = self._work.capture_started + self._config.interval_seconds
        if effect.failures:
            due = trio.current_time() + backoff(effect.failures)
        self._running().start_soon(self._timer, due, self._timer_scope)

    @_perform.register
    async def _(self, effect: machine.Stop) -> None:
        if self._failure is None:
            self._failure = _why(effect)
        recording = self._state.recording
        if self._client.closed.is_set():
            return
        if recording is not None and recording.base is None and isinstance(self._failure, PeerRefused):
            # Nothing was ever committed and nobody wants the copy: the bitmap would be of no use to anybody.
            with contextlib.suppress(QemuError):
                await self._work.remove(recording)
                recording = None
        if recording is None:
            _log.info("stopped: nothing of ours is left in QEMU")
        else:
            _log.info("stopped: one tracking bitmap per disk stays in QEMU, so that a restart can send the difference")

    async def _timer(self, due: float, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep_until(due)
            await self._post.send(machine.CheckpointDue())

    def _start(self, work: Callable[[], Awaitable[machine.Event]]) -> None:
        self._work_scope = trio.CancelScope()
        self._running().start_soon(self._run_work, work, self._work_scope)

    async def _run_work(self, work: Callable[[], Awaitable[machine.Event]], scope: trio.CancelScope) -> None:
        """Run a piece of work to its end, whatever that is, and say how it ended."""
        result: machine.Event = machine.WorkFailed("it was cancelled")
        with scope:
            try:
                result = await work()
            except CommandInDoubt as error:
                # What QEMU did with it is unknown, and only a fresh look at its bitmaps can tell.
                result = machine.WorkFailed(str(error), fatal=True)
            except QemuRemusError as error:
                result = machine.WorkFailed(str(error))
        if isinstance(result, machine.WorkFailed) and self._client.closed.is_set():
            # What failed in its last moments explains nothing.
            result = machine.WorkFailed(_QEMU_GONE)
        await self._post.send(result)

    async def _save(self) -> None:
        async with self._saving:
            state = self._state
            save = partial(
                self._memory.save,
                generation=state.generation,
                committed=state.committed,
                highest_epoch=state.highest,
                session=state.session,
            )
            await trio.to_thread.run_sync(save)

    # --- the link ----------------------------------------------------------------------------------------------------

    async def _make_hello(self) -> m.Hello:
        self._state = replace(self._state, session=self._state.session + 1)
        await self._save()
        return machine.hello(self._state)

    def _heartbeat(self) -> m.Heartbeat:
        state = self._state
        return m.Heartbeat(captured=state.captured, staged=state.staged, committed=state.committed)

    async def _on_hello(self, ours: m.Hello, theirs: m.Hello) -> None:
        await self._post.send(machine.LinkUp(ours, theirs, Generation(uuid.uuid4())))

    async def _on_message(self, message: m.Message) -> None:
        await self._post.send(machine.FromPeer(message))

    async def _on_refusal(self, refusal: m.Goodbye | QemuRemusError) -> None:
        if isinstance(refusal, m.Goodbye):
            await self._post.send(machine.LinkRefused(refusal))
        elif self._state.committed is None:
            # Never yet protected, and it will not pass by itself: better an end that is seen than a quiet retry.
            self._failure = refusal
            await self._post.send(machine.StopRequested())

    async def _on_down(self, reason: str) -> None:
        await self._post.send(machine.LinkDown(reason))

    # --- what others see ---------------------------------------------------------------------------------------------

    def _note(self, before: machine.PrimaryState, event: machine.Event) -> None:
        """Keep the figures."""
        state = self._state
        if isinstance(event, machine.Captured):
            self._captured += 1
        if state.committed is not None and state.committed != before.committed:
            if isinstance(event, machine.FromPeer):
                self._committed += 1
                self._committed_at = self._work.captured_at
                self._work.dirty_bytes = 0
            self._link.settled()
        if state.phase is machine.Phase.MERGE and before.phase is not machine.Phase.MERGE:
            self._lost += 1
            lost = before.finished.epoch if before.finished is not None else EpochNumber(state.highest)
            _log.warning("epoch lost; a later one carries its changes", epoch=lost, reason=state.reason)
            self._control.emit(EventName.EPOCH_LOST, EpochWasLost(self._config.pair, lost, state.reason))

    def _disk_state(self, state: machine.PrimaryState) -> DiskState:
        """The primary's own disks are the truth."""
        return DiskState.UP_TO_DATE

    def _tell(self, before: machine.PrimaryState) -> None:
        """Say what has changed, in the log and as an event."""
        old, new = machine.replication(before), machine.replication(self._state)
        if old == new:
            return
        reason = self._state.reason or None
        report = _log.warning if new in {Replication.DEGRADED, Replication.OFF} else _log.info
        report("state", replication=new.value, connection=self._link.connection.value, reason=reason)
        changed = ReplicationChanged(
            self._config.pair, Role.PRIMARY, self._link.connection, self._disk_state(self._state), new, reason
        )
        self._control.emit(EventName.REPLICATION_CHANGED, changed)

    def report(self) -> Report:
        """The status, as ``query-replication`` gives it."""
        state = self._state
        age = None if self._committed_at is None else trio.current_time() - self._committed_at
        in_doubt = state.finished.epoch if state.finished and state.phase is machine.Phase.COMMIT else None
        return Report(
            pair=self._config.pair,
            role=Role.PRIMARY,
            connection=self._link.connection,
            disk=self._disk_state(state),
            replication=machine.replication(state),
            reason=state.reason or None,
            generation=state.generation,
            peer=str(self._config.peer),
            checkpoint=Checkpoints(
                captured=state.captured,
                staged=state.staged,
                committed=state.committed,
                applied=self._link.peer_numbers.applied,
                committed_age_seconds=age,
                in_doubt=in_doubt,
            ),
            dirty_bytes=self._work.dirty_bytes,
            backlog_bytes=self._link.peer_numbers.backlog,
            pause=self._work.pauses.report(),
            epochs=EpochCounts(self._captured, self._committed, self._lost),
            bytes_sent=self._link.bytes_sent,
            bytes_received=self._link.bytes_received,
            sync=self._work.progress if machine.replication(state) is Replication.INITIAL_SYNC else None,
            disks=tuple(DiskReport(disk.name, size=disk.size, node=disk.node) for disk in self._disks),
        )

    async def _query_replication(self, _: Nothing) -> Report:
        return self.report()


def _why(effect: machine.Stop) -> QemuRemusError | None:
    """The error that ends the controller; None where somebody asked for its end."""
    if effect.refusal is not None:
        return effect.refusal.error()
    if effect.goodbye is not None:
        return PeerRefused(f"the secondary refused: {effect.goodbye.text}", effect.goodbye.code)
    if effect.reason:
        return QemuError(
            effect.reason,
            safe="the VM goes on; its changes stay in the dirty bitmaps that are left in QEMU",
            hint="start the primary again: it takes them over and sends the difference",
        )
    return None
