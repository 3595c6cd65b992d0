"""The superblock: what a controller knows about its pair across restarts, of either role.

One file, ``superblock``, in the store's directory: JSON (for people) in a frame with checksums (``format.py``), always
replaced as a whole: temporary file, fsync, rename, fsync of the directory.  No decision is taken here.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec

from qemu_remus.core.errors import FormatError, SuperblockDamaged
from qemu_remus.core.model import Base, DiskName, EpochNumber, Generation, InstanceId, PairName, Role
from qemu_remus.storage import format as fmt
from qemu_remus.storage.files import Files, storage_error

SUPERBLOCK_NAME: Final = "superblock"
JOURNAL_NAME: Final = "journal"
"""Directory of the journals, beside the superblock."""

_TEMPORARY_NAME: Final = "superblock.new"


class StoredDiskState(StrEnum):
    """What the disks hold, as far as that survives a restart; the link decides the rest of ``DiskState``."""

    INCONSISTENT = "inconsistent"
    CONSISTENT = "consistent"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class PastGeneration:
    """A history that failover ended.

    :param ended_at: the checkpoint that was taken over; None where it ended before its first commit.
    """

    generation: Generation
    ended_at: Base


@dataclass(frozen=True, slots=True)
class StoredDisk:
    """One disk of the pair, in the order that the journal's extents refer to. A disk keeps its place in a generation.

    :param size: bytes at the applied checkpoint; 0 where it is not one of that checkpoint's disks, and on a secondary
        that has not met its primary yet.
    :param path: secondary: the target. Primary: empty.
    :param created: the target was made by us.
    :param room: secondary: bytes that we may have made the target's file have, for an epoch that is not applied yet: a
        file may have any length between ``size`` and this. 0: it has ``size``.
    :param gone: the checkpoint from which on the VM has it no more; its target is left as it was then.
    """

    name: DiskName
    size: int
    path: str = ""
    created: bool = False
    room: int = 0
    gone: Base = None


@dataclass(frozen=True, slots=True)
class SyncAttempt:
    """An initial sync that is under way.

    :param fresh: for each disk: its target was created, empty, in this attempt, so that zeroes may be left out.
    :param flushed: position up to which everything was flushed, an opaque number of the caller's; it is worth something
        only together with the same first bitmap.
    """

    fresh: tuple[bool, ...]
    flushed: int = 0


@dataclass(frozen=True, slots=True)
class Failover:
    """A failover that was begun. It can only go on: a retry must name the same target.

    :param target: the checkpoint that the disks will hold, or hold.
    :param new_generation: the history that begins with it.
    :param requested: what the toolstack asked for, newest first; empty where it left the choice to us.
    :param finished: images are flushed and released.
    """

    target: EpochNumber
    new_generation: Generation
    requested: tuple[EpochNumber, ...] = ()
    finished: bool = False


@dataclass(frozen=True, slots=True)
class StoredHandover:
    """Primary: a planned switch-over, from just before the secondary is told.

    :param target: the checkpoint at which the secondary takes over.
    :param new_generation: the history that begins there.
    :param ours: it is we who paused the VM.
    :param finished: the secondary has taken over: this host's generation has ended there.
    """

    target: EpochNumber
    new_generation: Generation
    ours: bool = True
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Superblock:
    """All of it. Replace it with ``dataclasses.replace`` and write it before acting on the change.

    :param session: this instance's connections so far.
    :param generation: None before the first sync was begun.
    :param history: earlier generations, oldest first.
    :param committed: secondary: a floor, the journal is authoritative. Primary: the last commit that it knows of.
    :param applied: secondary: every committed epoch up to this one is in the images, flushed.
    :param highest_epoch: no epoch number up to this one may be used again in this generation.
    :param begun: when this generation began, in seconds since 1970 (UTC); 0: not known. For people only.
    :param decided: when the committed checkpoint was, roughly.
    :param discarded: generations whose data were given up here by the operator's word, the newest last.
    """

    pair: PairName
    role: Role
    instance: InstanceId
    session: int = 0
    generation: Generation | None = None
    history: tuple[PastGeneration, ...] = ()
    committed: Base = None
    applied: Base = None
    highest_epoch: int = 0
    disks: tuple[StoredDisk, ...] = ()
    disk_state: StoredDiskState = StoredDiskState.INCONSISTENT
    sync: SyncAttempt | None = None
    failover: Failover | None = None
    begun: int = 0
    decided: int = 0
    discarded: tuple[Generation, ...] = ()
    handover: StoredHandover | None = None


def encode_superblock(superblock: Superblock) -> bytes:
    """The superblock's file, as bytes."""
    body = msgspec.json.format(msgspec.json.encode(superblock), indent=2)
    return fmt.pack_document(body + b"\n")


def decode_superblock(data: bytes) -> Superblock:
    """Read the superblock's file.

    :raise FormatError: it is not what :func:`encode_superblock` made.
    """
    try:
        return msgspec.json.decode(fmt.unpack_document(data), type=Superblock)
    except msgspec.DecodeError as error:
        raise FormatError(f"the body cannot be read: {error}") from error


def read_superblock(files: Files, directory: Path) -> Superblock | None:
    """The superblock of the store in ``directory``; None where the store is new.

    :raise SuperblockDamaged: it is not what we wrote, or it is missing although there are journals.
    :raise StorageError: it cannot be read.
    """
    path = directory / SUPERBLOCK_NAME
    hint = (
        "restore the file from a backup of the store, or empty the store's directory and begin with a full sync; "
        "a secondary's images alone are no checkpoint while epochs wait in its journal"
    )
    try:
        handle = files.open(path)
        try:
            data = files.pread(handle, files.size(handle), 0)
        finally:
            files.close(handle)
    except FileNotFoundError:
        if files.list(directory / JOURNAL_NAME):
            raise SuperblockDamaged(f"{path} is missing beside its journal", hint=hint) from None
        return None
    except OSError as error:
        raise storage_error(error, f"reading {path}") from error
    try:
        return decode_superblock(data)
    except FormatError as error:
        raise SuperblockDamaged(
            f"{path} cannot be used: {error.what}", safe="nothing was changed", hint=hint
        ) from error


def write_superblock(files: Files, directory: Path, superblock: Superblock) -> None:
    """Replace the superblock. When this returns the new one is durable.

    :raise NoSpace, WriteFailed: nobody knows which of the two is there after a crash, but it is one of them, whole.
    """
    temporary = directory / _TEMPORARY_NAME
    path = directory / SUPERBLOCK_NAME
    try:
        with suppress(FileNotFoundError):
            files.unlink(temporary)
        handle = files.open(temporary, create=True)
        try:
            files.pwrite(handle, [encode_superblock(superblock)], 0)
            files.fsync(handle)
        finally:
            files.close(handle)
        files.rename(temporary, path)
        files.sync_directory(directory)
    except OSError as error:
        raise storage_error(
            error, f"writing {path}", safe="the old superblock or the new one is there, whole"
        ) from error
