"""The secondary's controller: it carries out what :mod:`qemu_remus.core.secondary_machine` decides.

One task, the engine, takes events from a bounded queue, one at a time, and carries out their effects in order; so that
an answer never overtakes the durable act that it speaks of.  Around it: the listener with one task per connection, the
applier, and the control socket.  What may not enter: decisions (the machine's), bytes (wire, journal), policy on disks
(:mod:`qemu_remus.storage`).
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from functools import partial, singledispatchmethod
from typing import Final, TypeVar

import structlog
import trio

from qemu_remus.control import ControlServer
from qemu_remus.core import messages as m
from qemu_remus.core import secondary_machine as machine
from qemu_remus.core.commands import (
    DiskChanged,
    EpochWasAborted,
    EpochWasCommitted,
    EpochWasStaged,
    EventName,
    FailoverCompleted,
    Nothing,
    ReplicationStateChanged,
)
from qemu_remus.core.errors import ConfigError, LinkError, NoSpace, RefusalCode, StorageError, TargetUnsuitable
from qemu_remus.core.model import DiskStanding, EpochNumber, Role
from qemu_remus.core.report import Checkpoints, DiskReport, EpochCounts, FailoverReport, Report
from qemu_remus.core.settings import Address, SecondaryConfig
from qemu_remus.core.target_spec import known_target
from qemu_remus.core.times import stamped_secondary
from qemu_remus.core.wire import digest_update
from qemu_remus.link import Link, open_link
from qemu_remus.secondary.applier import Applier
from qemu_remus.secondary.desk import RequestDesk
from qemu_remus.secondary.retry import RetryTimer
from qemu_remus.storage.store import Store
from qemu_remus.streams import put

QUEUE_LIMIT: Final = 64
"""Most events that wait for the engine."""

HELLO_TIMEOUT: Final = 10.0
"""Seconds that a connection has for its hello."""

GOODBYE_TIMEOUT: Final = 2.0
"""Seconds for the last message of a connection that we close."""

CONNECTION_LIMIT: Final = 8
"""Most connections at once; one is the primary, the others are being refused."""

STOP_TIMEOUT: Final = 30.0
"""Seconds to finish what is being written when the controller has to stop."""

_log = structlog.get_logger("secondary")
_T = TypeVar("_T")


async def run_secondary(config: SecondaryConfig) -> None:
    """Keep the copy of one VM's disks until cancelled.

    :raise ConfigError: when the address or the control socket cannot be used.
    :raise StorageError: when the store or a target cannot be used.
    """
    store = await trio.to_thread.run_sync(Store.open, config)
    try:
        await SecondaryController(config, store).run()
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + STOP_TIMEOUT):
            await trio.to_thread.run_sync(store.close, abandon_on_cancel=True)


class _Peer:
    """One connection, as the engine sees it."""

    def __init__(self, link: Link, address: str) -> None:
        self.link = link
        self.address = address
        self.closing = trio.CancelScope()


class SecondaryController:
    """One pair's secondary."""

    def __init__(self, config: SecondaryConfig, store: Store) -> None:
        self._config = config
        self._store = store
        self._state = store.recovered
        self._post, self._events = trio.open_memory_channel[machine.Event](QUEUE_LIMIT)
        self._peers: dict[int, _Peer] = {}
        self._next_link = 1
        self._digest = 0
        self._counts = (0, 0)
        self._applier = Applier(store, self._post)
        self._retry = RetryTimer(self._post.send)
        self._committed_at: float | None = None
        self._committed_epochs = 0
        self._lost_epochs = 0
        self._bytes = (0, 0)
        self._peer_numbers = m.Heartbeat()
        self._desk = RequestDesk(self._post.send, self.report)
        self._control = ControlServer(
            config.control,
            {"query-replication": self._query_replication, **self._desk.handlers()},
        )

    # --- tasks ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until cancelled."""
        self._store.on_lost = partial(_tell_soon, trio.lowlevel.current_trio_token(), self._applier.target_lost)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._control.serve)
            nursery.start_soon(self._engine)
            nursery.start_soon(self._applier.run)
            nursery.start_soon(self._retry.run)
            await nursery.start(self._listen)
            _log.info(
                "the secondary is ready",
                pair=self._config.pair,
                control=str(self._config.control),
                **self._summary(),
            )

    async def _listen(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        address = self._config.listen
        try:
            listeners = await trio.open_tcp_listeners(address.port, host=address.host)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {address}: {error.strerror or error}",
                hint="choose another address with --listen, or stop what uses it",
            ) from error
        bound = Address(address.host, listeners[0].socket.getsockname()[1])
        _log.info("listening for the primary", address=str(bound))
        await trio.serve_listeners(self._serve, listeners, task_status=_Started(task_status))

    async def _serve(self, stream: trio.SocketStream) -> None:
        address = _peer_address(stream)
        if len(self._peers) >= CONNECTION_LIMIT:
            _log.warning("too many connections; one was refused", peer=address)
            await trio.aclose_forcefully(stream)
            return
        number = self._next_link
        self._next_link += 1
        reason = "the connection was closed"
        try:
            async with open_link(
                stream,
                Role.SECONDARY,
                heartbeat_timeout=self._config.heartbeat_timeout_seconds,
                heartbeat_source=self._heartbeat,
            ) as link:
                peer = self._peers[number] = _Peer(link, address)
                with peer.closing:
                    await self._converse(number, peer)
        except LinkError as error:
            reason = str(error)
            _log.warning("the link to the primary ended", peer=address, reason=reason)
        finally:
            self._count_bytes(self._peers.pop(number, None))
            # The engine must learn of it; when the engine has ended, nobody need.
            with trio.CancelScope(shield=True), contextlib.suppress(trio.BrokenResourceError):
                await self._post.send(machine.LinkDown(number, reason))

    async def _converse(self, number: int, peer: _Peer) -> None:
        with trio.move_on_after(HELLO_TIMEOUT) as patience:
            hello = await peer.link.receive()
        if patience.cancelled_caught:
            _log.warning("a connection said nothing", peer=peer.address)
            return
        if not isinstance(hello, m.Hello):
            return
        await self._post.send(machine.HelloReceived(number, hello))
        async for message in peer.link:
            if isinstance(message, m.Heartbeat):
                self._peer_numbers = message
            else:
                await put(self._post, machine.FromPeer(number, message))

    def _count_bytes(self, peer: _Peer | None) -> None:
        if peer is not None:
            sent, received = self._bytes
            self._bytes = (sent + peer.link.bytes_sent, received + peer.link.bytes_received)

    # --- the engine ----------------------------------------------------------------------------------------------

    async def _engine(self) -> None:
        async with self._events:
            async for event in self._events:
                # Between two events nothing is half done; within one, a cancelled wait must not skip an effect.
                with trio.CancelScope(shield=True):
                    await self._handle(event)

    async def _handle(self, event: machine.Event) -> None:
        waiting: deque[machine.Event] = deque([event])
        while waiting:
            before = self._state
            after, effects = machine.step(before, waiting.popleft())
            self._state = stamped_secondary(before, after, int(time.time()))
            self._store.decided = self._state.decided
            for effect in effects:
                try:
                    result = await self._perform(effect)
                except StorageError as error:
                    # What was to follow this effect must not happen.
                    _log.error("the store could not do its part", effect=type(effect).__name__, reason=str(error))
                    code = _refusal(effect, error)
                    waiting.append(machine.StoreFailed(code, str(error), self._store.poisoned))
                    break
                if result is not None:
                    waiting.append(result)
            self._tell(before)

    @singledispatchmethod
    async def _perform(self, effect: machine.Effect) -> machine.Event | None:
        raise NotImplementedError(effect)

    @_perform.register
    async def _(self, effect: machine.Send) -> None:
        peer = self._peers.get(effect.link)
        if peer is not None:
            with contextlib.suppress(LinkError):
                await peer.link.send(effect.message)

    @_perform.register
    async def _(self, effect: machine.CloseLink) -> None:
        peer = self._peers.get(effect.link)
        if peer is None:
            return
        _log.warning("closing the link to a primary", peer=peer.address, code=effect.code.value, reason=effect.text)
        with trio.move_on_after(GOODBYE_TIMEOUT), contextlib.suppress(LinkError):
            await peer.link.send(m.Goodbye(effect.code, effect.text))
            await peer.link.flush()
        peer.closing.cancel()

    @_perform.register
    async def _(self, effect: machine.PrepareTargets) -> machine.Event:
        _log.info("a full copy of the disks begins", generation=str(effect.generation))
        fresh = await self._in_thread(partial(self._store.prepare_targets, self._state))
        return machine.TargetsReady(fresh)

    @_perform.register
    async def _(self, effect: machine.WriteImages) -> None:
        await self._in_thread(partial(self._store.write_images, effect.message.extents, effect.message.data))

    @_perform.register
    async def _(self, effect: machine.FlushImages) -> machine.Event:
        await self._in_thread(partial(self._store.flush_sync, effect.position))
        return machine.ImagesFlushed(effect.position)

    @_perform.register
    async def _(self, effect: machine.ReopenTargets) -> machine.Event:
        _log.info("the first copy of the disks goes on", done_bytes=self._state.position)
        await self._in_thread(self._store.reopen_targets)
        return machine.TargetsReopened()

    @_perform.register
    async def _(self, effect: machine.BeginEpoch) -> None:
        self._digest = 0
        self._counts = (0, 0)
        await self._in_thread(partial(self._store.begin_epoch, effect.epoch, effect.base, effect.disks))
        await self._applier.with_room(partial(self._store.set_disks, effect.epoch))

    @_perform.register
    async def _(self, effect: machine.AppendEpoch) -> None:
        message = effect.message
        self._digest = digest_update(self._digest, message)
        extents, payload = self._counts
        self._counts = (extents + len(message.extents), payload + len(message.data))
        append = partial(self._store.append, message.epoch, message.extents, message.data)
        # While there is no room the link waits, and with it the primary.
        await self._applier.with_room(append)

    @_perform.register
    async def _(self, effect: machine.CompareBlocks) -> machine.Event:
        asked = effect.message
        await self._applier.caught_up()
        compare = partial(self._store.compare, asked.disk, asked.offset, asked.block_size, asked.digests)
        return machine.Compared(await self._in_thread(compare))

    @_perform.register
    async def _(self, effect: machine.StageEpoch) -> machine.Event:
        end = effect.message
        self._check_whole(end)
        if not end.commit:
            await self._in_thread(partial(self._store.stage, end.epoch))
            self._control.emit(EventName.EPOCH_STAGED, EpochWasStaged(self._config.pair, end.epoch))
            return machine.Staged(end.epoch)
        await self._in_thread(partial(self._store.stage_and_commit, end.epoch))
        return self._committed(end.epoch)

    def _check_whole(self, end: m.EpochEnd) -> None:
        extents, payload = self._counts
        if (end.extents, end.payload, end.digest) == (extents, payload, self._digest):
            return
        raise StorageError(
            f"epoch {end.epoch} did not arrive whole: {extents} extents with {payload} bytes came, "
            f"{end.extents} with {end.payload} were announced",
            safe="nothing of it was used",
            hint="the primary sends its changes again with a later epoch",
        )

    def _committed(self, epoch: EpochNumber) -> machine.CommitDone:
        self._committed_at = trio.current_time()
        self._committed_epochs += 1
        self._control.emit(EventName.EPOCH_COMMITTED, EpochWasCommitted(self._config.pair, epoch))
        return machine.CommitDone(epoch)

    @_perform.register
    async def _(self, effect: machine.CommitEpoch) -> machine.Event:
        await self._in_thread(partial(self._store.commit, effect.epoch))
        return self._committed(effect.epoch)

    @_perform.register
    async def _(self, effect: machine.AbortEpoch) -> machine.Event:
        await self._in_thread(partial(self._store.abort, effect.epoch))
        self._control.emit(EventName.EPOCH_ABORTED, EpochWasAborted(self._config.pair, effect.epoch))
        return machine.AbortDone(effect.epoch)

    @_perform.register
    async def _(self, effect: machine.DropUnfinished) -> None:
        self._lost_epochs += 1
        await self._in_thread(self._store.drop_unfinished)

    @_perform.register
    async def _(self, effect: machine.WakeApply) -> None:
        self._applier.wake()

    @_perform.register
    async def _(self, effect: machine.ScheduleRetry) -> None:
        self._retry.schedule(effect.failures)

    @_perform.register
    async def _(self, effect: machine.ReopenStore) -> machine.Event:
        found = await self._in_thread(self._store.reopen)
        _log.info("the store was opened again", committed=found.committed, applied=found.applied, staged=found.staged)
        return machine.Reopened(found)

    @_perform.register
    async def _(self, effect: machine.SaveFailover) -> machine.Event:
        _log.warning("failing over: no later commit will be taken", checkpoint=effect.failover.target)
        await self._in_thread(partial(self._store.save_failover, self._state))
        return machine.FailoverSaved()

    @_perform.register
    async def _(self, effect: machine.FinishFailover) -> machine.Event:
        await self._in_thread(partial(self._store.finish_failover, self._state))
        _log.warning("the disks are plain images now and free for use", checkpoint=effect.failover.target)
        self._control.emit(EventName.FAILOVER_COMPLETED, FailoverCompleted(self._config.pair, effect.failover.target))
        return machine.Released()

    @_perform.register
    async def _(self, effect: machine.Answer) -> None:
        self._desk.reply(effect)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await trio.to_thread.run_sync(work)

    # --- what others see -----------------------------------------------------------------------------------------

    def _tell(self, before: machine.SecondaryState) -> None:
        """Say what has changed, in the log and as an event."""
        self._tell_of_disks(before)
        old = (machine.connection(before), machine.disk_state(before), machine.replication(before))
        new = (machine.connection(self._state), machine.disk_state(self._state), machine.replication(self._state))
        if old == new:
            return
        connection, disk, replication = new
        reason = self._state.reason or None
        _log.info("state", connection=connection.value, disk=disk.value, replication=replication.value, reason=reason)
        changed = ReplicationStateChanged(self._config.pair, Role.SECONDARY, connection, disk, replication, reason)
        self._control.emit(EventName.REPLICATION_STATE_CHANGED, changed)

    def _tell_of_disks(self, before: machine.SecondaryState) -> None:
        """Say which disks the newest checkpoint has that the one before it did not have so."""
        state = self._state
        if before.disks == state.disks or state.committed is None or before.committed is None:
            return
        old, new = ({disk.name: disk.size for disk in one.disks} for one in (before, state))
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) == new.get(name):
                continue
            kind = DiskStanding.GONE if name not in new else DiskStanding.PROTECTED
            what = "gone" if name not in new else "new" if name not in old else "resized"
            _log.warning("a disk is another", disk=name, what=what, size=new.get(name), checkpoint=state.committed)
            changed = DiskChanged(self._config.pair, name, kind, new.get(name, old.get(name)), None)
            self._control.emit(EventName.DISK_CHANGED, changed)

    def _summary(self) -> dict[str, object]:
        state = self._state
        return {"disk": machine.disk_state(state).value, "committed": state.committed, "applied": state.applied}

    def _heartbeat(self) -> m.Heartbeat:
        state = self._state
        return m.Heartbeat(
            captured=None,
            staged=state.staged,
            committed=state.committed,
            applied=state.applied,
            backlog=self._store.backlog_bytes,
        )

    def report(self) -> Report:
        """The status, as ``query-replication`` gives it."""
        state = self._state
        live = self._peers.get(state.link) if state.link is not None else None
        sent, received = self._bytes
        failover = state.failover
        age = None if self._committed_at is None else trio.current_time() - self._committed_at
        return Report(
            pair=self._config.pair,
            role=machine.hello(state).role,
            connection=machine.connection(state),
            disk=machine.disk_state(state),
            replication=machine.replication(state),
            reason=state.reason or None,
            generation=state.generation,
            peer=live.address if live else None,
            checkpoint=Checkpoints(
                captured=_latest(self._peer_numbers.captured, state.committed),
                staged=_latest(state.staged, state.committed),
                committed=state.committed,
                applied=state.applied,
                committed_age_seconds=age,
                in_doubt=state.staged,
            ),
            backlog_bytes=self._store.backlog_bytes,
            epochs=EpochCounts(0, self._committed_epochs, self._lost_epochs),
            bytes_sent=sent + (live.link.bytes_sent if live else 0),
            bytes_received=received + (live.link.bytes_received if live else 0),
            disks=self._disks(),
            failover=None if failover is None else FailoverReport(failover.target, failover.done),
        )

    def _disks(self) -> tuple[DiskReport, ...]:
        present = {disk.name: disk.size for disk in self._state.disks if disk.size}
        held = self._state.consistent
        reports = []
        for disk in self._store.disks():
            if disk.name in present:
                state = DiskStanding.PROTECTED if held else DiskStanding.SYNCING
            elif disk.gone is not None or disk.size:
                state = DiskStanding.GONE
            else:
                state = DiskStanding.FREE
            size = present.get(disk.name) or disk.size or None
            target = known_target(disk.name, disk.path)
            reports.append(DiskReport(disk.name, size, None, target.location, target.format, state, gone_at=disk.gone))
        return tuple(reports)

    async def _query_replication(self, _: Nothing) -> Report:
        return self.report()


def _tell_soon(token: trio.lowlevel.TrioToken, tell: Callable[[str], None], what: str) -> None:
    """From another thread, which does not wait for us."""
    with contextlib.suppress(trio.RunFinishedError):
        token.run_sync_soon(tell, what)


class _Started:
    """Passes on "started" without the listeners, which nobody wants."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status = task_status

    def started(self, value: object = None) -> None:
        self._task_status.started()


def _refusal(effect: machine.Effect, error: StorageError) -> RefusalCode:
    no_target = isinstance(effect, machine.BeginEpoch) and isinstance(error, TargetUnsuitable)
    if isinstance(effect, machine.PrepareTargets) or no_target:
        # Nobody but the operator can help, whatever it is that the targets lack.
        return RefusalCode.TARGET_UNSUITABLE
    return RefusalCode.NO_SPACE if isinstance(error, NoSpace) else RefusalCode.STORAGE_FAILED


def _peer_address(stream: trio.SocketStream) -> str:
    try:
        host, port = stream.socket.getpeername()[:2]
    except OSError:
        return "unknown"
    return str(Address(host, port))


def _latest(one: EpochNumber | None, other: EpochNumber | None) -> EpochNumber | None:
    """The later of two checkpoints: a later stage implies the earlier ones."""
    known = [number for number in (one, other) if number is not None]
    return max(known) if known else None
