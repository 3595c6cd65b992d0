"""The control interface's commands and events as types: what a client may ask, what it gets, what it is told.

One table, from which the server checks arguments and answers ``query-qmp-schema``; docs/control.md describes it and
qmp_schemas/qemu-remus.json is its captured form.  Pure.  What a command *does* is the controllers' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from msgspec import Meta

from qemu_remus.core.model import Connection, DiskState, EpochNumber, Generation, PairName, Replication, Role
from qemu_remus.core.qapi import CommandType, EventType
from qemu_remus.core.report import DiskReport, Report

CHECKPOINTS_LIMIT: Final = 1024
"""Most checkpoints that one ``failover`` may name."""

_LARGEST: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Nothing:
    """No arguments, or an answer that only says that it was done."""


@dataclass(frozen=True, slots=True)
class FailoverArguments:
    """Which checkpoint to fail over to.

    :param checkpoints: whose memory can be restored, newest first; the newest that the disks can reach is taken.
        Empty: the last committed one.
    :param last_committed: take the last committed checkpoint although an epoch is in doubt.
    :param force: fail over although the primary's link is alive.
    """

    checkpoints: Annotated[
        tuple[Annotated[EpochNumber, Meta(ge=1, le=_LARGEST)], ...], Meta(max_length=CHECKPOINTS_LIMIT)
    ] = ()
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

    REPLICATION_CHANGED = "REPLICATION_CHANGED"
    EPOCH_LOST = "EPOCH_LOST"
    FAILOVER_COMPLETED = "FAILOVER_COMPLETED"


@dataclass(frozen=True, slots=True)
class ReplicationChanged:
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
class EpochWasLost:
    """An epoch failed; a later one carries its changes.

    :param reason: why, for a person.
    """

    pair: PairName
    checkpoint: EpochNumber
    reason: str


@dataclass(frozen=True, slots=True)
class FailoverCompleted:
    """The secondary's disks hold the checkpoint and are free for use."""

    pair: PairName
    checkpoint: EpochNumber


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
    CommandType("failover", FailoverArguments, FailoverResult),
)

COMMANDS: Final = {command.name: command for command in _COMMANDS}
"""Every command that some controller has, by name."""

EVENTS: Final = {
    event.name: event
    for event in (
        EventType(EventName.REPLICATION_CHANGED.value, ReplicationChanged),
        EventType(EventName.EPOCH_LOST.value, EpochWasLost),
        EventType(EventName.FAILOVER_COMPLETED.value, FailoverCompleted),
    )
}
"""Every event that some controller emits, by name."""

BUILT_IN: Final = frozenset({"qmp_capabilities", "query-version", "query-commands", "query-qmp-schema"})
"""The commands that the server itself answers."""
