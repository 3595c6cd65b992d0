"""The status report: the one structure behind ``query-replication``, ``qemu-remus status``, events and metrics.

Owns what a controller says about itself, and the small statistics in it.  Pure: no clock (times are handed in), no
rendering (:mod:`qemu_remus.status`), no sockets.

As JSON (:func:`qemu_remus.core.qapi.to_qmp`) it is a documented contract, docs/status.md: members are added, never
renamed or given another meaning, and readers ignore those that they do not know.  A member's name says its unit:
bytes, seconds or, as ``_ms``, milliseconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from qemu_remus import __version__
from qemu_remus.core.model import (
    Connection,
    DiskName,
    DiskStanding,
    DiskState,
    EpochNumber,
    Generation,
    PairName,
    Replication,
    Role,
)
from qemu_remus.core.qapi import from_qmp, to_qmp


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """How far each stage has come; each is the newest checkpoint to have reached it in this generation, or None.

    :param committed_age_seconds: since the checkpoint ``committed`` was *captured*, as far as this side knows: on the
        primary since its pause, on the secondary since its commit.  It is how much work a failover now would lose.
    :param in_doubt: an epoch whose commit is undecided as far as this side knows.
    """

    captured: EpochNumber | None = None
    staged: EpochNumber | None = None
    committed: EpochNumber | None = None
    applied: EpochNumber | None = None
    committed_age_seconds: float | None = None
    in_doubt: EpochNumber | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """The VM's pauses that this controller caused, in milliseconds; None where there was none.

    :param count: pauses since the controller started.
    :param median_ms: over a bounded window of the newest pauses; so is ``p99_ms``.
    """

    last_ms: float | None = None
    median_ms: float | None = None
    p99_ms: float | None = None
    count: int = 0


@dataclass(frozen=True, slots=True)
class EpochCounts:
    """Epochs since the controller started.

    :param lost: failed; their changes were carried by later epochs.
    """

    captured: int = 0
    committed: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class SyncProgress:
    """An initial sync or resync under way.

    :param bytes_per_second: over the last few seconds.
    :param seconds_left: None while that cannot be said.
    """

    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    seconds_left: float | None


class VerifyState(StrEnum):
    """Where a verification stands."""

    RUNNING = "running"
    SUSPENDED = "suspended"
    """The VM is not protected at the moment; it goes on when it is again."""
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class DiskRange:
    """A range of a disk.

    :param offset: bytes from the disk's start.
    :param length: bytes.
    """

    disk: DiskName
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The last verification of the copy; only on a primary.

    :param number: tells the controller's verifications apart; a later one has a higher one.
    :param repair: what differs is sent anew.
    :param done_bytes: that need no further look.
    :param bytes_per_second: over the last few seconds.
    :param seconds_left: None while that cannot be said.
    :param differing_ranges: how many ranges of the copy were found to be other than the VM's disks.
    :param differing_bytes: in them.
    :param ranges: the ranges, as they were found; not all of them where ``ranges_truncated``.
    :param repaired_bytes: sent anew, and committed.
    :param rewritten_bytes: that could not be compared as the guest wrote them each time; the epochs send them anew.
    :param reason: why it failed, for a person.
    :param ended_age_seconds: since it ended; None while it goes on.
    """

    number: int
    state: VerifyState
    repair: bool
    disks: tuple[DiskName, ...]
    done_bytes: int
    total_bytes: int
    bytes_per_second: float = 0.0
    seconds_left: float | None = None
    differing_ranges: int = 0
    differing_bytes: int = 0
    ranges: tuple[DiskRange, ...] = ()
    ranges_truncated: bool = False
    repaired_bytes: int = 0
    rewritten_bytes: int = 0
    reason: str | None = None
    ended_age_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class DiskReport:
    """One disk of the pair.

    :param size: bytes; None on a secondary that has not been told yet.
    :param node: primary: QEMU's node name of the disk.
    :param target: secondary: path of the image or device that holds the copy, or URI of the NBD export.
    :param format: secondary: the target's format: ``raw``, ``nbd``, or one of QEMU's for images.
    :param reason: why it is not protected, or not at its present size; None where there is nothing to say.
    :param gone_at: secondary: the first checkpoint that does not have it any more.
    """

    name: DiskName
    size: int | None = None
    node: str | None = None
    target: str | None = None
    format: str | None = None
    state: DiskStanding = DiskStanding.PROTECTED
    reason: str | None = None
    gone_at: EpochNumber | None = None


@dataclass(frozen=True, slots=True)
class FailoverReport:
    """A failover that was begun; only on a secondary.

    :param checkpoint: the one that the disks will hold, or hold.
    :param complete: the disks hold it, flushed and released.
    """

    checkpoint: EpochNumber
    complete: bool


@dataclass(frozen=True, slots=True)
class Report:
    """The whole status of one controller.

    :param reason: why the VM is not protected, or what needs attention, for a person; None when all is well.
    :param peer: address of the other controller, as ``HOST:PORT``.
    :param dirty_bytes: changed on the primary and not committed on the secondary; None where it is not known.
    :param backlog_bytes: committed and not yet applied to the secondary's images; failover waits for them.
    :param bytes_sent: over the link since the controller started, as is ``bytes_received``.
    :param version: of this program.
    """

    pair: PairName
    role: Role
    connection: Connection
    disk: DiskState
    replication: Replication
    reason: str | None = None
    generation: Generation | None = None
    peer: str | None = None
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    dirty_bytes: int | None = None
    backlog_bytes: int | None = None
    pause: Pause = field(default_factory=Pause)
    epochs: EpochCounts = field(default_factory=EpochCounts)
    bytes_sent: int = 0
    bytes_received: int = 0
    sync: SyncProgress | None = None
    verify: VerifyReport | None = None
    disks: tuple[DiskReport, ...] = ()
    failover: FailoverReport | None = None
    version: str = __version__

    @property
    def protected(self) -> bool:
        """Whether a failure of the primary at this moment would lose no released output."""
        return self.replication in (Replication.PROTECTED, Replication.VERIFYING)

    def to_json(self) -> dict[str, Any]:
        """The report as ``query-replication`` gives it."""
        report: dict[str, Any] = to_qmp(self)
        return report

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Report:
        """Read a report, of this or a later version.

        :raise msgspec.ValidationError: when it is not one.
        """
        return from_qmp(cls, value)


class PauseStatistics:
    """Collects pauses; keeps a bounded window of them.

    :param window: newest pauses that the median and p99 are taken over, at least 1.
    """

    def __init__(self, window: int = 1024) -> None:
        self._window: deque[float] = deque(maxlen=window)
        self._count = 0

    def add(self, seconds: float) -> None:
        """One pause has ended."""
        self._window.append(seconds)
        self._count += 1

    def report(self) -> Pause:
        """The statistics now; median and p99 are pauses that happened (nearest rank), never an average of two."""
        if not self._window:
            return Pause()
        ordered = sorted(self._window)
        return Pause(
            last_ms=_milliseconds(self._window[-1]),
            median_ms=_milliseconds(_nearest_rank(ordered, 0.50)),
            p99_ms=_milliseconds(_nearest_rank(ordered, 0.99)),
            count=self._count,
        )


class SyncMeter:
    """Rate and time left of a sync, over a sliding window.

    :param total_bytes: what the sync has to do in all; may be corrected on the way.
    :param window: seconds that the rate is taken over.
    """

    def __init__(self, total_bytes: int, *, window: float = 10.0) -> None:
        self.total_bytes = total_bytes
        self._window = window
        self._samples: deque[tuple[float, int]] = deque()
        self._spacing = window / 50

    def update(self, now: float, done_bytes: int) -> SyncProgress:
        """Take a sample and say how it goes.

        :param now: seconds on any clock that only goes forward.
        :param done_bytes: so far, from the sync's beginning.
        """
        if not self._samples or now - self._samples[-1][0] >= self._spacing:
            self._samples.append((now, done_bytes))
        while len(self._samples) > 1 and now - self._samples[1][0] >= self._window:
            self._samples.popleft()
        since, then = self._samples[0]
        rate = max(0.0, (done_bytes - then) / (now - since)) if now > since else 0.0
        left = max(0, self.total_bytes - done_bytes)
        return SyncProgress(
            done_bytes=done_bytes,
            total_bytes=self.total_bytes,
            bytes_per_second=rate,
            seconds_left=0.0 if left == 0 else left / rate if rate > 0 else None,
        )


def _nearest_rank(ordered: list[float], share: float) -> float:
    return ordered[max(1, math.ceil(share * len(ordered))) - 1]


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
