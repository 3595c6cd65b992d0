"""What the primary lets others see: its status report, its events, its log of states, and the figures behind them.

What may not enter: decisions, and anything that waits for a client.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import structlog
import trio

from qemu_remus.control import ControlServer
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.commands import (
    DiskChanged,
    EpochWasAborted,
    EpochWasCommitted,
    EpochWasLost,
    EpochWasStaged,
    EventName,
    ReplicationStateChanged,
    SyncProgressed,
    VerifyCompleted,
    VerifyProgressed,
)
from qemu_remus.core.model import DiskName, DiskStanding, DiskState, EpochNumber, Replication, Role
from qemu_remus.core.primary_verify import suspended
from qemu_remus.core.report import (
    Checkpoints,
    DiskRange,
    DiskReport,
    EpochCounts,
    Report,
    SyncMeter,
    VerifyReport,
    VerifyState,
)
from qemu_remus.core.settings import PrimaryConfig
from qemu_remus.core.toolstack_machine import Ended, Fate
from qemu_remus.primary.link_keeper import LinkKeeper
from qemu_remus.primary.work import Work
from qemu_remus.qemu.attachment import Attachment
from qemu_remus.qemu.survey import Surveyor

PROGRESS_INTERVAL: Final = 1.0
"""Seconds between two events about a sync's progress."""

_log = structlog.get_logger("primary")


class Telling:
    """One primary's figures, and their ways out."""

    def __init__(
        self,
        config: PrimaryConfig,
        attachment: Attachment,
        surveyor: Surveyor,
        link: LinkKeeper,
        work: Work,
        control: ControlServer,
    ) -> None:
        self._config = config
        self._attachment = attachment
        self._surveyor = surveyor
        self._told: dict[DiskName, DiskReport] | None = None
        self._seen: object = None
        self._link = link
        self._work = work
        self._control = control
        self._committed_at: float | None = None
        self._captured = self._committed = self._lost = 0
        self._verifying = 0
        self._verify_meter = SyncMeter(0)
        self._verify_ended_at: float | None = None

    def captured(self) -> None:
        """A checkpoint was captured."""
        self._captured += 1

    def committed(self) -> None:
        """The newest captured checkpoint is committed."""
        self._committed += 1
        self._committed_at = self._work.captured_at
        self._work.dirty_bytes = 0

    def ended(self, ended: Ended) -> None:
        """Tell of an epoch."""
        pair, epoch = self._config.pair, ended.epoch
        match ended.fate:
            case Fate.STAGED:
                self._control.emit(EventName.EPOCH_STAGED, EpochWasStaged(pair, epoch))
            case Fate.COMMITTED:
                self._control.emit(EventName.EPOCH_COMMITTED, EpochWasCommitted(pair, epoch))
            case Fate.ABORTED:
                _log.info("epoch aborted; a later one carries its changes", epoch=epoch)
                self._control.emit(EventName.EPOCH_ABORTED, EpochWasAborted(pair, epoch))
            case Fate.LOST:
                self._lost += 1
                _log.warning("epoch lost; a later one carries its changes", epoch=epoch, reason=ended.reason)
                self._control.emit(EventName.EPOCH_LOST, EpochWasLost(pair, epoch, ended.reason))

    def tell(self, before: machine.PrimaryState, after: machine.PrimaryState) -> None:
        """Say what has changed, in the log and as an event."""
        if before.verification is not after.verification:
            self._tell_verification(after)
        self._tell_of_disks(after)
        old, new = machine.replication(before), machine.replication(after)
        if old == new:
            return
        reason = machine.reason(after) or None
        report = _log.warning if new in {Replication.DEGRADED, Replication.OFF} else _log.info
        report("state", replication=new.value, connection=self._link.connection.value, reason=reason)
        changed = ReplicationStateChanged(
            self._config.pair, Role.PRIMARY, self._link.connection, DiskState.UP_TO_DATE, new, reason
        )
        self._control.emit(EventName.REPLICATION_STATE_CHANGED, changed)

    def _tell_of_disks(self, state: machine.PrimaryState) -> None:
        """Say what has become of the disks, in the log and as events."""
        if state.phase is machine.Phase.SURVEY:
            # The attachment may follow other disks already; what that means is known with the survey's result.
            return
        unsynced = state.committed is None or state.synced or state.phase in machine.SYNCING
        seen = (unsynced, state.uncovered, state.left_out, self._attachment.disks, self._surveyor.outside)
        if seen == self._seen:
            return
        self._seen = seen
        now = {report.name: report for report in self._disks(state)}
        told, self._told = self._told, now
        if told is None or told == now:
            return
        for name in dict.fromkeys((*told, *now)):
            old, new = told.get(name), now.get(name)
            if new is None:
                assert old is not None
                new = replace(old, state=DiskStanding.GONE, reason=None)
            if old is not None and (old.state, old.size, old.reason) == (new.state, new.size, new.reason):
                continue
            report = _log.info if new.state in {DiskStanding.PROTECTED, DiskStanding.SYNCING} else _log.warning
            report("disk", disk=name, state=new.state.value, size=new.size, node=new.node, reason=new.reason)
            changed = DiskChanged(self._config.pair, name, new.state, new.size, new.reason)
            self._control.emit(EventName.DISK_CHANGED, changed)

    def _disks_told(self, state: machine.PrimaryState) -> tuple[DiskReport, ...]:
        """The disks as the machine knows them."""
        if state.phase is machine.Phase.SURVEY and self._told is not None:
            return tuple(self._told.values())
        return self._disks(state)

    def _disks(self, state: machine.PrimaryState) -> tuple[DiskReport, ...]:
        reports = []
        unsynced = state.committed is None or state.synced or state.phase in machine.SYNCING
        for disk in self._attachment.disks:
            syncing = unsynced or disk.name in state.uncovered
            standing = DiskStanding.SYNCING if syncing else DiskStanding.PROTECTED
            reports.append(DiskReport(disk.name, size=disk.size, node=disk.node, state=standing))
        outside = {one.name: (one.size, one.node, one.reason) for one in self._surveyor.outside}
        reasons = {one.name: one.reason for one in state.left_out}
        for name, (size, node, reason) in outside.items():
            reports.append(
                DiskReport(name, size=size, node=node, state=DiskStanding.UNPROTECTED, reason=reasons.get(name, reason))
            )
        return tuple(reports)

    async def watch_sync(self, replication: Callable[[], Replication]) -> None:
        """Task: tell how far a sync is, as long as there is one."""
        while True:
            await trio.sleep(PROGRESS_INTERVAL)
            progress = self._work.progress
            if progress is not None and replication() is Replication.INITIAL_SYNC:
                told = SyncProgressed(
                    self._config.pair,
                    progress.done_bytes,
                    progress.total_bytes,
                    progress.bytes_per_second,
                    progress.seconds_left,
                )
                self._control.emit(EventName.SYNC_PROGRESS, told)

    def _tell_verification(self, state: machine.PrimaryState) -> None:
        """A verification has begun, come further or ended."""
        verification = state.verification
        assert verification is not None
        number = verification.order.number
        if number != self._verifying:
            self._verifying, self._verify_ended_at = number, None
            self._verify_meter = SyncMeter(verification.total_bytes)
            disks = " ".join(verification.order.name_of(place) for place in verification.order.disks)
            _log.info("verifying the copy", disks=disks, repair=verification.order.repair)
        if verification.going_on or self._verify_ended_at is not None:
            return
        self._verify_ended_at = trio.current_time()
        told = self._verification(state)
        assert told is not None
        good = told.state is VerifyState.COMPLETED and not told.differing_ranges
        report = _log.info if good else _log.warning
        report(
            "the verification has ended",
            state=told.state.value,
            differing_ranges=told.differing_ranges,
            differing_bytes=told.differing_bytes,
            repaired_bytes=told.repaired_bytes,
            reason=told.reason,
        )
        completed = VerifyCompleted(
            self._config.pair,
            told.state,
            told.differing_ranges,
            told.differing_bytes,
            told.repaired_bytes,
            told.rewritten_bytes,
            told.reason,
        )
        self._control.emit(EventName.VERIFY_COMPLETED, completed)

    async def watch_verify(self, state: Callable[[], machine.PrimaryState]) -> None:
        """Task: tell how far a verification is, as long as there is one."""
        while True:
            await trio.sleep(PROGRESS_INTERVAL)
            told = self._verification(state())
            if told is not None and told.ended_age_seconds is None:
                progressed = VerifyProgressed(
                    self._config.pair,
                    told.state,
                    told.done_bytes,
                    told.total_bytes,
                    told.bytes_per_second,
                    told.seconds_left,
                    told.differing_ranges,
                )
                self._control.emit(EventName.VERIFY_PROGRESS, progressed)

    def _verification(self, state: machine.PrimaryState) -> VerifyReport | None:
        verification = state.verification
        if verification is None:
            return None
        where = VerifyState.SUSPENDED if suspended(state) else VerifyState.RUNNING
        if verification.ending is not None:
            where = VerifyState(verification.ending.value)
        progress = self._verify_meter.update(trio.current_time(), verification.done_bytes)
        ended_at = self._verify_ended_at
        running = where is VerifyState.RUNNING
        return VerifyReport(
            number=verification.order.number,
            state=where,
            repair=verification.order.repair,
            disks=tuple(verification.order.name_of(place) for place in verification.order.disks),
            done_bytes=verification.done_bytes,
            total_bytes=verification.total_bytes,
            bytes_per_second=progress.bytes_per_second if running else 0.0,
            seconds_left=progress.seconds_left if running else None,
            differing_ranges=verification.found,
            differing_bytes=verification.wrong_bytes,
            ranges=tuple(
                DiskRange(verification.order.name_of(extent.disk), extent.offset, extent.length)
                for extent in verification.ranges
            ),
            ranges_truncated=verification.truncated,
            repaired_bytes=verification.repaired_bytes,
            rewritten_bytes=verification.rewritten_bytes,
            reason=verification.reason or None,
            ended_age_seconds=None if ended_at is None else trio.current_time() - ended_at,
        )

    def report(self, state: machine.PrimaryState) -> Report:
        """The status, as ``query-replication`` gives it."""
        age = None if self._committed_at is None else trio.current_time() - self._committed_at
        return Report(
            pair=self._config.pair,
            role=Role.PRIMARY,
            connection=self._link.connection,
            # The primary's own disks are the truth.
            disk=DiskState.UP_TO_DATE,
            replication=machine.replication(state),
            reason=machine.reason(state) or None,
            generation=state.generation,
            peer=str(self._config.peer),
            checkpoint=Checkpoints(
                captured=state.captured,
                staged=state.staged,
                committed=state.committed,
                applied=self._link.peer_numbers.applied,
                committed_age_seconds=age,
                in_doubt=_in_doubt(state),
            ),
            dirty_bytes=self._work.dirty_bytes,
            backlog_bytes=self._link.peer_numbers.backlog,
            pause=self._work.pauses.report(),
            epochs=EpochCounts(self._captured, self._committed, self._lost),
            bytes_sent=self._link.bytes_sent,
            bytes_received=self._link.bytes_received,
            sync=self._work.progress if machine.replication(state) is Replication.INITIAL_SYNC else None,
            verify=self._verification(state),
            disks=self._disks_told(state),
        )


def _in_doubt(state: machine.PrimaryState) -> EpochNumber | None:
    if state.finished is not None and state.phase is machine.Phase.COMMIT:
        return state.finished.epoch
    return state.doubt.epoch if state.doubt is not None else None
