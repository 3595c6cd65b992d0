"""Every error that this project raises on purpose, as one tree.

Each error answers three questions: what happened (``what``), what is still safe (``safe``) and what to do next
(``hint``).  ``str(error)`` is the three together, ready for a terminal or a log line.

Local faults (ours, or the operator's) and remote faults (QEMU's, the peer's, the disk's) never share a class, and an
outcome that is unknown is a class of its own.

::

    QemuRemusError
     +-- ConfigError                what the operator asked for cannot be done as asked
     |    +-- UnknownDisk
     |    +-- DiskUnsupported       the VM has this disk, but it cannot be protected
     +-- InternalError              a defect of ours: a machine got an event that it does not know in its state
     +-- QemuError                  something between us and QEMU
     |    +-- QemuUnreachable       no socket, nobody listening, somebody else is connected, or the connection is gone
     |    +-- NotQmp                whatever listens there does not speak QMP
     |    +-- CapabilityMissing     this QEMU lacks something that we need
     |    +-- CommandFailed         QEMU refused a command: nothing was changed by it
     |    +-- CommandInDoubt        the command was sent and its outcome is unknown
     |    +-- GraphChanged          the block graph is not the one that we left
     +-- NbdError
     |    +-- NbdProtocolError      the server broke the NBD protocol
     |    +-- NbdRequestFailed      the server answered a request with an error number
     |    +-- NbdConnectionLost
     +-- EpochLost                  an epoch failed; its changes stay in the dirty bitmaps. Also a control answer
     |    +-- SnapshotBroken        the replication filter gave up the checkpoint's view for the guest's sake
     |    +-- FleeceTooSmall
     |    +-- CheckpointVoid        the VM ran while the checkpoint was being captured
     +-- LinkError                  something between the two controllers
     |    +-- PeerUnreachable
     |    +-- PeerSilent            no byte within the heartbeat's time-out
     |    +-- LinkLost              the connection ended
     |    +-- LocalProtocolError    we were about to break the replication protocol: a defect of ours
     |    +-- RemoteProtocolError   the peer broke the replication protocol
     |    |    +-- VersionMismatch
     |    +-- PeerRefused           the peer said no, with a reason
     +-- StorageError               something between us and a disk
     |    +-- StoreLocked
     |    +-- TargetUnsuitable      a target of the secondary cannot be used as it is
     |    |    +-- TargetInUse
     |    |    +-- TargetTooSmall
     |    |    +-- TargetTooLarge
     |    |    +-- TargetHoldsData
     |    +-- NoSpace
     |    +-- WriteFailed           a write or flush failed; nothing since the last good flush may be trusted
     |    +-- FormatError           bytes on disk that are not what we wrote
     |         +-- JournalDamaged
     |         +-- SuperblockDamaged
     +-- ControlUnreachable         no control socket, nobody listening, not a controller, or the connection is gone
     +-- ControlError               an answer of the control socket; ``control_class`` names it there
          +-- CommandNotFound
          +-- NotProtected
          +-- NotConsistent
          +-- CommitInDoubt
          +-- OutOfOrder
          +-- Refused
          +-- TimedOut
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

__all__ = [
    "CapabilityMissing",
    "CheckpointVoid",
    "CommandFailed",
    "CommandInDoubt",
    "CommandNotFound",
    "CommitInDoubt",
    "ConfigError",
    "ControlError",
    "ControlUnreachable",
    "DiskUnsupported",
    "EpochLost",
    "FleeceTooSmall",
    "FormatError",
    "GraphChanged",
    "InternalError",
    "JournalDamaged",
    "LinkError",
    "LinkLost",
    "LocalProtocolError",
    "NbdConnectionLost",
    "NbdError",
    "NbdProtocolError",
    "NbdRequestFailed",
    "NoSpace",
    "NotConsistent",
    "NotProtected",
    "NotQmp",
    "OutOfOrder",
    "PeerRefused",
    "PeerSilent",
    "PeerUnreachable",
    "QemuError",
    "QemuRemusError",
    "QemuUnreachable",
    "RefusalCode",
    "Refused",
    "RemoteProtocolError",
    "SnapshotBroken",
    "StorageError",
    "StoreLocked",
    "SuperblockDamaged",
    "TargetHoldsData",
    "TargetInUse",
    "TargetTooLarge",
    "TargetTooSmall",
    "TargetUnsuitable",
    "TimedOut",
    "UnknownDisk",
    "VersionMismatch",
    "WriteFailed",
]


def sentences(first: str, *later: str) -> str:
    """Join what was written without full stops; empty parts are left out."""
    return ". ".join((first, *(part[0].upper() + part[1:] for part in later if part)))


class QemuRemusError(Exception):
    """Root of the tree.

    :param what: what happened, one sentence without a full stop at its end.
    :param safe: what is still safe, the same way; empty where nothing was at stake.
    :param hint: what to do next, the same way; empty where there is nothing to do.
    """

    #: True where the same attempt may succeed later without anybody doing anything.
    transient: ClassVar[bool] = False

    #: The error class in a reply of our control socket; part of the documented interface.
    control_class: ClassVar[str] = "GenericError"

    def __init__(self, what: str, *, safe: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.safe = safe
        self.hint = hint

    def __str__(self) -> str:
        return sentences(self.what, self.safe, self.hint)


class ConfigError(QemuRemusError):
    """What the operator asked for cannot be done as asked; nothing was started."""


class UnknownDisk(ConfigError):
    """A disk was named that the VM, or the pair, does not have."""


class DiskUnsupported(ConfigError):
    """The VM has this disk, but it cannot be protected: read-only, removable, without a name, ..."""


class InternalError(QemuRemusError):
    """A defect of this program: report it."""


class QemuError(QemuRemusError):
    """Something between us and QEMU."""


class QemuUnreachable(QemuError):
    """No QMP socket, nobody listening on it, somebody else connected to it, or the connection is gone."""

    transient = True


class NotQmp(QemuError):
    """Whatever listens on the socket does not speak QMP."""


class CapabilityMissing(QemuError):
    """This QEMU lacks something that we need."""


class CommandFailed(QemuError):
    """QEMU refused a command.

    :param command: its QMP name.
    :param qmp_class: QMP's error class, usually ``GenericError``.
    :param desc: QEMU's own description.
    """

    def __init__(self, command: str, qmp_class: str, desc: str, *, safe: str = "", hint: str = "") -> None:
        super().__init__(f"QEMU refused {command}: {desc}", safe=safe, hint=hint)
        self.command = command
        self.qmp_class = qmp_class
        self.desc = desc


class CommandInDoubt(QemuError):
    """A command was sent and its outcome is unknown: the connection ended, or no reply came in time.

    Never guess: query QEMU's state and go on from there.

    :param command: its QMP name.
    """

    def __init__(self, command: str, why: str, *, safe: str = "", hint: str = "") -> None:
        super().__init__(f"the outcome of QMP command {command} is unknown: {why}", safe=safe, hint=hint)
        self.command = command


class GraphChanged(QemuError):
    """The block graph is not the one that we left; it was left alone."""


class NbdError(QemuRemusError):
    """Something between us and an NBD server."""


class NbdProtocolError(NbdError):
    """The server broke the NBD protocol, or lacks a part of it that we need."""


class NbdRequestFailed(NbdError):
    """The server answered a request with an error.

    :param error: an ``errno`` value, as NBD defines them.
    """

    def __init__(self, what: str, error: int, *, safe: str = "", hint: str = "") -> None:
        super().__init__(what, safe=safe, hint=hint)
        self.error = error


class NbdConnectionLost(NbdError):
    """The connection to the NBD server ended or was silent for too long."""


class EpochLost(QemuRemusError):
    """An epoch failed. Its changes stay in the dirty bitmaps: a later epoch carries them.

    A toolstack gets it for every cause, the classes below included, as an answer of the control socket; it must drop
    the memory of that checkpoint too.
    """

    transient = True
    control_class = "EpochLost"


class SnapshotBroken(EpochLost):
    """The replication filter gave up the checkpoint's view for the guest's sake: fleece full, slow or failing."""


class FleeceTooSmall(EpochLost):
    """The fleece directory cannot hold what the guest might overwrite during the transfer."""


class CheckpointVoid(EpochLost):
    """The VM ran, or may have run, while the checkpoint was being captured."""


class LinkError(QemuRemusError):
    """Something between the two controllers."""


class PeerUnreachable(LinkError):
    """The peer could not be connected to."""

    transient = True


class PeerSilent(LinkError):
    """Nothing was received from the peer for longer than the heartbeat's time-out."""

    transient = True


class LinkLost(LinkError):
    """The connection to the peer ended."""

    transient = True


class LocalProtocolError(LinkError):
    """We were about to break the replication protocol: a defect of ours."""


class RemoteProtocolError(LinkError):
    """The peer broke the replication protocol; the connection is closed and nothing of the bad frame was used."""


class VersionMismatch(RemoteProtocolError):
    """The peer speaks another version of the replication protocol."""


class RefusalCode(StrEnum):
    """Why a peer says no. The values go on the wire: never change one, only add."""

    UNKNOWN_PAIR = "unknown-pair"
    OTHER_PRIMARY = "other-primary"
    ROLE_CONFLICT = "role-conflict"
    SPLIT_BRAIN = "split-brain"
    UNRELATED_DATA = "unrelated-data"
    FAILED_OVER = "failed-over"
    FENCED = "fenced"
    NEEDS_FULL_SYNC = "needs-full-sync"
    DISK_MISMATCH = "disk-mismatch"
    DISK_SHRUNK = "disk-shrunk"
    NO_PLACE = "no-place"
    TARGET_UNSUITABLE = "target-unsuitable"
    STORAGE_FAILED = "storage-failed"
    NO_SPACE = "no-space"
    BASE_TOO_NEW = "base-too-new"
    PROTOCOL = "protocol"
    SHUTTING_DOWN = "shutting-down"


class PeerRefused(LinkError):
    """The peer said no, with a reason.

    :param code: the reason for programs.
    """

    def __init__(self, what: str, code: RefusalCode, *, safe: str = "", hint: str = "") -> None:
        super().__init__(what, safe=safe, hint=hint)
        self.code = code


class StorageError(QemuRemusError):
    """Something between us and a disk."""


class StoreLocked(StorageError):
    """Another process uses this store or state directory."""


class TargetUnsuitable(StorageError):
    """A target of the secondary cannot be used as it is; it was not changed."""


class TargetInUse(TargetUnsuitable):
    """Another process holds a lock on the target."""


class TargetTooSmall(TargetUnsuitable):
    """The target is smaller than the primary's disk."""


class TargetTooLarge(TargetUnsuitable):
    """The target is a file larger than the primary's disk, and nobody said that it may be overwritten."""


class TargetHoldsData(TargetUnsuitable):
    """The target holds data, and nobody said that they may be overwritten."""


class NoSpace(StorageError):
    """A file system or the journal's limit is full."""


class WriteFailed(StorageError):
    """A write or a flush failed. Nothing written since the last good flush may be trusted."""


class FormatError(StorageError):
    """Bytes on disk that are not what we wrote."""


class JournalDamaged(FormatError):
    """The journal is damaged before a valid commit, or ends before what is known to be committed."""


class SuperblockDamaged(FormatError):
    """The superblock cannot be read."""


class ControlUnreachable(QemuRemusError):
    """No control socket there, nobody listening on it, not a controller of ours, or the connection is gone.

    :param in_doubt: a command was sent, and what became of it is unknown; else nothing was asked.
    """

    transient = True

    def __init__(self, what: str, *, safe: str = "", hint: str = "", in_doubt: bool = False) -> None:
        super().__init__(what, safe=safe, hint=hint)
        self.in_doubt = in_doubt


class ControlError(QemuRemusError):
    """An answer of the control socket; ``control_class`` is its error class there."""


class CommandNotFound(ControlError):
    """This controller does not have the command."""

    control_class = "CommandNotFound"


class NotProtected(ControlError):
    """The VM is not protected at the moment."""

    control_class = "NotProtected"


class NotConsistent(ControlError):
    """The secondary's disks hold no complete checkpoint."""

    control_class = "NotConsistent"


class CommitInDoubt(ControlError):
    """An epoch is staged and nobody here knows whether its commit was decided."""

    control_class = "CommitInDoubt"


class OutOfOrder(ControlError):
    """The command does not fit the state; nothing was changed."""

    control_class = "OutOfOrder"


class Refused(ControlError):
    """The command is refused as things stand; nothing was changed."""

    control_class = "Refused"


class TimedOut(ControlError):
    """The command's time-out passed; the state is unchanged, and the command may be repeated."""

    control_class = "TimedOut"
