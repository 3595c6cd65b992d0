"""The control interface's commands and events as types: what a client may ask, what it gets, what it is told.

One table, from which the server checks arguments and answers ``query-qmp-schema``; docs/control.md describes it and
qmp_schemas/qemu-remus.json is its captured form.  Pure.  What a command *does* is the controllers' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta

from qemu_remus.core.model import (
    NAME_LIMIT,
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
from qemu_remus.core.qapi import CommandType, EventType
from qemu_remus.core.report import DiskReport, Report, VerifyState

CHECKPOINTS_LIMIT: Final = 1024
"""Most checkpoints that one ``failover`` may name."""

TIMEOUT_LIMIT: Final = 86_400
"""Longest ``timeout`` of a command, in seconds."""

DISKS_LIMIT: Final = 1024
"""Most disks that one ``verify`` may name."""

VERIFY_RATE: Final = 64 << 20
"""Bytes a second that a verification reads at most, where nobody says otherwise."""

VERIFY_RATE_LEAST: Final = 64 << 10
"""Slowest ``rate`` of a verification, in bytes a second."""

_Epoch = Annotated[EpochNumber, Meta(ge=1, le=2**63 - 1)]
_Timeout = Annotated[float, Meta(gt=0, le=TIMEOUT_LIMIT)]


@dataclass(frozen=True, slots=True)
class Nothing:
    """No arguments, or an answer that only says that it was done."""


@dataclass(frozen=True, slots=True)
class PrepareArguments:
    """Make way for the next checkpoint while the VM still runs.

    :param timeout: seconds that the command may wait, as everywhere here: more than 0, at most ``TIMEOUT_LIMIT``.
    """

    timeout: _Timeout = 10.0


@dataclass(frozen=True, slots=True)
class StartArguments:
    """Capture a checkpoint of the disks of a VM that is paused.

    :param pause: stop and resume QEMU around it; for a VM that its toolstack pauses without QEMU's knowledge.
    """

    pause: bool = False
    timeout: _Timeout = 10.0


@dataclass(frozen=True, slots=True)
class EpochStarted:
    """The disks' checkpoint is captured, and the VM may resume.

    :param epoch: its number, to be named in the commands that follow.
    :param dirty_bytes: what the epoch changed, and has to be transferred.
    :param pause_ms: how long the capture needed the VM to stand still, in milliseconds.
    """

    epoch: EpochNumber
    dirty_bytes: int
    pause_ms: float


@dataclass(frozen=True, slots=True)
class FinishArguments:
    """Wait until the epoch is staged on the secondary."""

    epoch: _Epoch
    timeout: _Timeout = 30.0


@dataclass(frozen=True, slots=True)
class CommitArguments:
    """Decide that the epoch counts, and wait until that is durable on the secondary."""

    epoch: _Epoch
    timeout: _Timeout = 30.0


@dataclass(frozen=True, slots=True)
class AbortArguments:
    """Drop the epoch; a later one carries its changes."""

    epoch: _Epoch
    timeout: _Timeout = 10.0


@dataclass(frozen=True, slots=True)
class EpochDone:
    """What was asked of this epoch is done."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class VerifyArguments:
    """Begin to compare the secondary's copy with the VM's disks.

    :param disks: their names; empty: all of them.
    :param repair: send anew what differs.
    :param rate: bytes a second that are read at most, at least ``VERIFY_RATE_LEAST``; 0: as the controller's ``--rate``
        says, or else ``VERIFY_RATE``.
    """

    disks: Annotated[tuple[DiskName, ...], Meta(max_length=DISKS_LIMIT)] = ()
    repair: bool = False
    rate: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0

    def __post_init__(self) -> None:
        if 0 < self.rate < VERIFY_RATE_LEAST:
            raise ValueError(f"'rate' is too slow: it is 0, or at least {VERIFY_RATE_LEAST} bytes a second")


@dataclass(frozen=True, slots=True)
class VerifyStarted:
    """A verification has begun; ``verify`` in the report says how it goes, until it has ended and after that.

    :param number: of this one, as in the report.
    """

    number: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryReceivedArguments:
    """The backup can restore the memory of this checkpoint, so that it may be committed."""

    epoch: _Epoch


@dataclass(frozen=True, slots=True)
class MemoryReceived:
    """It is known now that this checkpoint's memory is there.

    :param committed: the checkpoint is committed, durably; else it will be as soon as it is staged.
    """

    epoch: EpochNumber
    committed: bool


@dataclass(frozen=True, slots=True)
class FailoverArguments:
    """Which checkpoint to fail over to.

    :param checkpoints: whose memory can be restored, newest first; the newest that the disks can reach is taken.
        Empty: the last committed one.
    :param last_committed: take the last committed checkpoint although an epoch is in doubt.
    :param force: fail over although the primary's link is alive.
    """

    checkpoints: Annotated[tuple[_Epoch, ...], Meta(max_length=CHECKPOINTS_LIMIT)] = ()
    last_committed: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.checkpoints and self.last_committed:
            raise ValueError("'checkpoints' and 'last-committed' exclude each other")


@dataclass(frozen=True, slots=True)
class FailoverResult:
    """The disks hold this checkpoint, flushed and released.

    :param generation: the new history that begins with it.
    :param disks: with the targets to start the VM from.
    """

    checkpoint: EpochNumber
    generation: Generation | None = None
    disks: tuple[DiskReport, ...] = ()


@dataclass(frozen=True, slots=True)
class StorageWorks:
    """The secondary's store and images can be written.

    :param disk: as in the report.
    :param applied: the checkpoint that is in the images; the journal holds what is committed beyond it.
    """

    disk: DiskState
    committed: EpochNumber | None
    applied: EpochNumber | None


@dataclass(frozen=True, slots=True)
class SwitchoverArguments:
    """Hand the running VM over to the secondary, without losing a write.

    :param epoch: with a toolstack: the last committed checkpoint, at which it has paused the VM. By interval the
        controller pauses the VM itself, and takes a last checkpoint.
    :param timeout: until the secondary is told, the VM is resumed when it has passed; after that, only the answer is
        not waited for any more.
    """

    epoch: _Epoch | None = None
    timeout: _Timeout = 60.0


@dataclass(frozen=True, slots=True)
class SwitchoverResult:
    """The secondary has taken over. The VM here stays paused for good: its disks are the past.

    :param checkpoint: the VM's last one, with every write that it has made.
    :param generation: the history that begins there.
    :param complete: the secondary's disks are free for use; else it has decided, and has not come to the end:
        ``failover`` there goes on.
    """

    checkpoint: EpochNumber
    generation: Generation
    complete: bool = True


@dataclass(frozen=True, slots=True)
class ResizeArguments:
    """Make a disk of the VM larger while it is protected.

    :param disk: its name in the pair.
    :param size: bytes, a multiple of 512, more than it has.
    """

    disk: Annotated[str, Meta(min_length=1, max_length=NAME_LIMIT)]
    size: Annotated[int, Meta(ge=512, le=2**63 - 512, multiple_of=512)]
    timeout: _Timeout = 30.0


@dataclass(frozen=True, slots=True)
class Resized:
    """The guest's disk has this size; the secondary's copy follows with the next checkpoint."""

    disk: DiskName
    size: int


@dataclass(frozen=True, slots=True)
class CommandName:
    """One entry of ``query-commands``."""

    name: str


@dataclass(frozen=True, slots=True)
class VersionTriple:
    """A version's numbers."""

    major: int
    minor: int
    micro: int


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """The answer of ``query-version``.

    :param qemu: QEMU's name for the member; it holds the version of *this* program, since clients look for it there.
    :param package: this program's name and version, so that nobody takes us for a QEMU.
    """

    qemu: VersionTriple
    package: str


@dataclass(frozen=True, slots=True)
class CapabilitiesArguments:
    """The arguments of ``qmp_capabilities``; no capability is on offer, so that only an empty list is right."""

    enable: tuple[str, ...] = ()


class EventName(StrEnum):
    """The events that a controller emits."""

    REPLICATION_STATE_CHANGED = "REPLICATION_STATE_CHANGED"
    EPOCH_STAGED = "EPOCH_STAGED"
    EPOCH_COMMITTED = "EPOCH_COMMITTED"
    EPOCH_ABORTED = "EPOCH_ABORTED"
    EPOCH_LOST = "EPOCH_LOST"
    SYNC_PROGRESS = "SYNC_PROGRESS"
    VERIFY_PROGRESS = "VERIFY_PROGRESS"
    VERIFY_COMPLETED = "VERIFY_COMPLETED"
    FAILOVER_COMPLETED = "FAILOVER_COMPLETED"
    DISK_CHANGED = "DISK_CHANGED"


@dataclass(frozen=True, slots=True)
class ReplicationStateChanged:
    """One of the four states is another than before.

    :param reason: as in the report.
    """

    pair: PairName
    role: Role
    connection: Connection
    disk: DiskState
    replication: Replication
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class EpochWasStaged:
    """All of an epoch's changes are durable in the secondary's journal; whether it counts is not decided."""

    pair: PairName
    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class EpochWasCommitted:
    """An epoch counts, durably on the secondary."""

    pair: PairName
    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class EpochWasAborted:
    """The toolstack gave an epoch up; a later one carries its changes."""

    pair: PairName
    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class EpochWasLost:
    """An epoch failed; a later one carries its changes.

    :param reason: why, for a person.
    """

    pair: PairName
    epoch: EpochNumber
    reason: str


@dataclass(frozen=True, slots=True)
class SyncProgressed:
    """An initial sync or resync has come further; as ``sync`` in the report.

    :param bytes_per_second: over the last few seconds.
    :param seconds_left: None while that cannot be said.
    """

    pair: PairName
    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class VerifyProgressed:
    """A verification has come further; as ``verify`` in the report."""

    pair: PairName
    state: VerifyState
    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    seconds_left: float | None
    differing_ranges: int


@dataclass(frozen=True, slots=True)
class VerifyCompleted:
    """A verification has ended, whichever way; as ``verify`` in the report, which has the ranges too."""

    pair: PairName
    state: VerifyState
    differing_ranges: int
    differing_bytes: int
    repaired_bytes: int
    rewritten_bytes: int
    reason: str | None


@dataclass(frozen=True, slots=True)
class FailoverCompleted:
    """The secondary's disks hold the checkpoint and are free for use."""

    pair: PairName
    checkpoint: EpochNumber


@dataclass(frozen=True, slots=True)
class DiskChanged:
    """A disk has come, has gone, or has another size; on the secondary: from the committed checkpoint on.

    :param state: how it stands now, as in the report.
    :param size: bytes that it has, or had.
    :param reason: why it is not protected, where it is not.
    """

    pair: PairName
    disk: DiskName
    state: DiskStanding
    size: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SchemaEntry:
    """One entry of ``query-qmp-schema``; it has further members, as QEMU's do, that depend on ``meta-type``."""

    name: str
    meta_type: str


_COMMANDS: Final = (
    CommandType("qmp_capabilities", CapabilitiesArguments, Nothing),
    CommandType("query-version", Nothing, VersionInfo),
    CommandType("query-commands", Nothing, tuple[CommandName, ...]),
    CommandType("query-qmp-schema", Nothing, tuple[SchemaEntry, ...]),
    CommandType("query-replication", Nothing, Report),
    CommandType("prepare-epoch", PrepareArguments, Nothing),
    CommandType("start-new-epoch", StartArguments, EpochStarted),
    CommandType("finish-disk-sync", FinishArguments, EpochDone),
    CommandType("commit-epoch", CommitArguments, EpochDone),
    CommandType("abort-epoch", AbortArguments, EpochDone),
    CommandType("verify", VerifyArguments, VerifyStarted),
    CommandType("verify-cancel", Nothing, Nothing),
    CommandType("switchover", SwitchoverArguments, SwitchoverResult),
    CommandType("memory-received", MemoryReceivedArguments, MemoryReceived),
    CommandType("failover", FailoverArguments, FailoverResult),
    CommandType("retry-storage", Nothing, StorageWorks),
    CommandType("resize", ResizeArguments, Resized),
)

COMMANDS: Final = {command.name: command for command in _COMMANDS}
"""Every command that some controller has, by name."""

EVENTS: Final = {
    event.name: event
    for event in (
        EventType(EventName.REPLICATION_STATE_CHANGED.value, ReplicationStateChanged),
        EventType(EventName.EPOCH_STAGED.value, EpochWasStaged),
        EventType(EventName.EPOCH_COMMITTED.value, EpochWasCommitted),
        EventType(EventName.EPOCH_ABORTED.value, EpochWasAborted),
        EventType(EventName.EPOCH_LOST.value, EpochWasLost),
        EventType(EventName.SYNC_PROGRESS.value, SyncProgressed),
        EventType(EventName.VERIFY_PROGRESS.value, VerifyProgressed),
        EventType(EventName.VERIFY_COMPLETED.value, VerifyCompleted),
        EventType(EventName.FAILOVER_COMPLETED.value, FailoverCompleted),
        EventType(EventName.DISK_CHANGED.value, DiskChanged),
    )
}
"""Every event that some controller emits, by name."""

BUILT_IN: Final = frozenset({"qmp_capabilities", "query-version", "query-commands", "query-qmp-schema"})
"""The commands that the server itself answers."""
