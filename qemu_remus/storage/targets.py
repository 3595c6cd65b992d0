"""The secondary's targets: raw image files and block devices, who may use them, writing and reading them.

It owns the rules by which a target is accepted, its lock, its writes and reads; whose extents these are, and when they
may be written, is decided elsewhere.  Calls block; one thread at a time per target.

The lock is the one that QEMU takes on its images (image locking, in its manual's chapter on block drivers): open file
description locks on single bytes, 100 + n for a permission that the holder uses, 200 + n for one that it grants to
nobody else, with n = 0 for consistent reads, 1 for writes, 2 for writes that change nothing, 3 for resizing.  All are
shared locks, taken first and checked afterwards, so that of two that come at once at most one goes on.  We use 1 to 3
and grant nothing: a QEMU that is started on the target too early fails to open it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

from qemu_remus.core.errors import (
    InternalError,
    StorageError,
    TargetHoldsData,
    TargetInUse,
    TargetTooLarge,
    TargetTooSmall,
    TargetUnsuitable,
)
from qemu_remus.storage import contents
from qemu_remus.storage.files import Buffer, is_no_space, storage_error, sync_directory, write_all

_LOCK_RANGES: Final = ((101, 3), (200, 4))
_FLOCK: Final = struct.Struct("hhqqi4x")

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZERO_RANGE: Final = 0x10

_PIECE: Final = 1 << 20
_ZEROES: Final = bytes(_PIECE)
_SMALL_ZERO: Final = 64 << 10
"""Below this, writing zeroes costs less than what cutting up the file's extents costs later."""

_UNCHANGED: Final = "it was not changed"

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Target:
    """One open and locked target. Use :func:`prepare_target` or :func:`reopen_target`.

    After a write or flush that failed it refuses everything until :meth:`reset_after_failure`: what the kernel still
    shows of it need not be on the device, and only the caller knows what has to be written again.

    :param size: bytes of the disk; a block device may be larger.
    :param created: this call created it, empty: it reads as zeroes.
    :param sparse: give space back where zeroes are written.
    """

    def __init__(self, descriptor: int, path: Path, size: int, *, created: bool, sparse: bool, device: bool) -> None:
        self.path = path
        self.size = size
        self.created = created
        self._descriptor = descriptor
        self._device = device
        self._sparse = sparse and not device
        self._can_zero = True
        self._failure: StorageError | None = None

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of ``data``; not durable before :meth:`flush`.

        :raise NoSpace, WriteFailed: it could not be written, or an earlier write or flush failed.
        """
        self._check(offset, len(data))
        try:
            write_all(self._descriptor, [data], offset)
        except OSError as error:
            raise self._fail(error, "writing") from error

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes; it stays allocated unless the target is sparse. As :meth:`write` otherwise.

        :raise NoSpace, WriteFailed: as :meth:`write`.
        """
        self._check(offset, length)
        try:
            if self._can_zero and (self._sparse or length >= _SMALL_ZERO) and self._zero_quickly(offset, length):
                return
            for start in range(offset, offset + length, _PIECE):
                write_all(self._descriptor, [memoryview(_ZEROES)[: min(_PIECE, offset + length - start)]], start)
        except OSError as error:
            raise self._fail(error, "zeroing") from error

    def read(self, offset: int, length: int) -> bytes:
        """What the target holds there.

        :raise TargetUnsuitable: it cannot be read, or has become too small.
        :raise NoSpace, WriteFailed: an earlier write or flush failed.
        """
        self._check(offset, length)
        parts = []
        while length:
            try:
                part = os.pread(self._descriptor, length, offset)
            except OSError as error:
                raise TargetUnsuitable(
                    f"the target {self.path} cannot be read at {offset}: {error.strerror}",
                    safe=_UNCHANGED,
                    hint="look at the host's kernel log for the device's errors",
                ) from error
            if not part:
                raise self._too_small()
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether the whole range reads as zeroes because nothing was ever written there; False where unknown.

        :raise TargetUnsuitable, NoSpace, WriteFailed: as :meth:`read`.
        """
        self._check(offset, length)
        if self._device:
            return False
        try:
            if os.fstat(self._descriptor).st_size < offset + length:
                raise self._too_small()
            return os.lseek(self._descriptor, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:
            return error.errno == errno.ENXIO

    def flush(self) -> None:
        """Make durable what was written before.

        :raise NoSpace, WriteFailed: it could not be made durable: everything since the last good flush has to be
            written again.
        """
        self._check(0, 0)
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise self._fail(error, "flushing") from error

    def resize(self, size: int) -> None:
        """Give it another size, durably: a file gets space for all of it, or is cut; a device has to be large enough.

        What a file gains reads as zeroes; what a device has there is not looked at.

        :param size: bytes of the disk from now on.
        :raise TargetTooSmall: it is a device that is smaller; nothing was changed.
        :raise NoSpace, WriteFailed: a file could not be given the size; what it held before it still holds.
        """
        self._check(0, 0)
        if self._device:
            found = os.lseek(self._descriptor, 0, os.SEEK_END)
            if found < size:
                raise TargetTooSmall(
                    f"the target {self.path} has {found} bytes; the primary's disk has {size} now",
                    safe=_UNCHANGED,
                    hint="make the device larger: replication goes on by itself then",
                )
        else:
            try:
                _fit(self._descriptor, self.path, size, sparse=self._sparse)
            except StorageError:
                # Only the space is given back: a failure of this would change nothing for anybody.
                if size > self.size:
                    with suppress(OSError):
                        os.ftruncate(self._descriptor, self.size)
                raise
        self.size = size

    def reset_after_failure(self) -> None:
        """Take writes again; the caller writes again everything since its last good flush."""
        self._failure = None

    def close(self) -> None:
        """Release the lock and close; does not flush."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _check(self, offset: int, length: int) -> None:
        if self._descriptor < 0:
            raise InternalError(f"{self.path} is closed")
        if offset < 0 or length < 0 or offset + length > self.size:
            raise InternalError(f"{length} bytes at {offset} are outside {self.path} with its {self.size} bytes")
        if self._failure is not None:
            raise type(self._failure)(
                f"{self.path} takes nothing more since {self._failure.what}", hint=self._failure.hint
            ) from self._failure

    def _too_small(self) -> TargetUnsuitable:
        return TargetUnsuitable(
            f"the target {self.path} has become smaller than its {self.size} bytes",
            safe=_UNCHANGED,
            hint="somebody else changed it: what it holds is not known; synchronise into an empty store",
        )

    def _fail(self, error: OSError, doing: str) -> StorageError:
        self._failure = storage_error(error, f"{doing} {self.path}")
        return self._failure

    def _zero_quickly(self, offset: int, length: int) -> bool:
        try:
            fallocate(self._descriptor, _KEEP_SIZE | (_PUNCH_HOLE if self._sparse else _ZERO_RANGE), offset, length)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV):
                self._can_zero = False
                return False
            if error.errno == errno.EINVAL:  # a device whose sectors are larger than the range's alignment
                return False
            raise
        return True


def prepare_target(path: Path, size: int, *, overwrite: bool = False, sparse: bool = False) -> Target:
    """Open a target for a new copy of a disk, creating the file where it is missing.

    A missing file is created with ``size`` bytes, all of them allocated unless ``sparse``; where that fails, no file is
    left.  With ``overwrite``, a larger file is cut to ``size`` (a guest must see its disk at the size it knows), and
    what a file or device holds stays until it is written over.  A larger block device is used from its start.

    :param size: bytes of the disk.
    :raise TargetTooSmall: it is smaller, with ``overwrite`` too.
    :raise TargetTooLarge: it is a larger file, without ``overwrite``.
    :raise TargetHoldsData: without ``overwrite``. Of a file every byte is looked at, of a block device both ends and
        samples between them.
    :raise TargetInUse: another process uses it: QEMU, another secondary, a mount.
    :raise TargetUnsuitable: it is no file and no block device, or cannot be opened.
    :raise NoSpace, WriteFailed: it cannot be allocated.
    """
    try:
        descriptor, device = _open(path)
    except FileNotFoundError:
        return _create(path, size, sparse=sparse)
    try:
        _claim(descriptor, path)
        _accept(descriptor, path, size, overwrite=overwrite, device=device)
        if not device:
            _fit(descriptor, path, size, sparse=sparse)
        _read_from_device(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return Target(descriptor, path, size, created=False, sparse=sparse, device=device)


def reopen_target(path: Path, size: int, *, sparse: bool = False, room: int = 0) -> Target:
    """Open a target that was prepared earlier.

    :param size: bytes of the disk, as in the superblock.
    :param room: bytes that a file may have instead, where it was being made larger; the target has as many as it has.
    :raise TargetInUse: as :func:`prepare_target`.
    :raise TargetUnsuitable: it is gone, cannot be opened, or has another size than it was left with.
    """
    try:
        descriptor, device = _open(path)
    except FileNotFoundError:
        raise TargetUnsuitable(
            f"the target {path} is gone",
            hint="bring it back as it was; without it, this secondary needs a full sync into an empty store",
        ) from None
    try:
        _claim(descriptor, path)
        found = _see_same_size(descriptor, path, size, max(size, room), device=device)
        _read_from_device(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return Target(descriptor, path, found, created=False, sparse=sparse, device=device)


def device_holds_data(path: Path) -> bool:
    """Whether a block device that nobody uses holds anything; see :func:`prepare_target`.

    :raise TargetInUse: it is mounted, or part of something larger.
    :raise TargetUnsuitable: it cannot be opened or read.
    """
    descriptor, _ = _open(path)
    try:
        return contents.device_holds_data(descriptor, os.lseek(descriptor, 0, os.SEEK_END))
    except OSError as error:
        raise TargetUnsuitable(
            f"the target {path} cannot be read: {error.strerror}",
            safe=_UNCHANGED,
            hint="look at the host's kernel log for the device's errors",
        ) from error
    finally:
        os.close(descriptor)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """``fallocate(2)`` with a mode, which :mod:`os` does not have.

    :raise OSError: as the system call.
    """
    while _fallocate(descriptor, mode, offset, length):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _read_from_device(descriptor: int) -> None:
    """Drop what the kernel remembers of it.

    After a flush that failed, Linux keeps the pages as if they had reached the device; whoever compared with them would
    find that nothing need be sent.
    """
    with suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _see_same_size(descriptor: int, path: Path, size: int, room: int, *, device: bool) -> int:
    """Bytes of it that the disk may use at present."""
    found = os.lseek(descriptor, 0, os.SEEK_END)
    if found < size or (found > room and not device):
        raise TargetUnsuitable(
            f"the target {path} has {found} bytes, and had {size}",
            safe=_UNCHANGED,
            hint="somebody else changed it: what it holds is not known; synchronise into an empty store",
        )
    return min(found, room)


def _open(path: Path) -> tuple[int, bool]:
    """Open an existing file or device: its descriptor, and whether it is a device."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise TargetUnsuitable(
                f"the target {path} is neither a file nor a block device",
                safe=_UNCHANGED,
                hint="name a raw image file or a block device",
            )
        device = stat.S_ISBLK(mode)
        # For a device, and on Linux only, O_EXCL means: not while it is mounted or otherwise held.
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if device else 0)), device
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise TargetInUse(
                f"the block device {path} is in use: mounted, or part of something larger",
                safe=_UNCHANGED,
                hint="release it, or name another target",
            ) from error
        raise TargetUnsuitable(
            f"the target {path} cannot be opened: {error.strerror}",
            safe=_UNCHANGED,
            hint="see that the path is right and that this user may write to it",
        ) from error


def _create(path: Path, size: int, *, sparse: bool) -> Target:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if is_no_space(error):
            raise storage_error(error, f"creating the target {path}", safe="no file was left") from error
        raise TargetUnsuitable(
            f"the target {path} cannot be created: {error.strerror}",
            hint="see that its directory is there and that this user may write to it",
        ) from error
    try:
        _claim(descriptor, path)
        _fit(descriptor, path, size, sparse=sparse)
        _sync_name(path)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
        raise
    return Target(descriptor, path, size, created=True, sparse=sparse, device=False)


def _sync_name(path: Path) -> None:
    try:
        sync_directory(path.parent)
    except OSError as error:
        raise storage_error(error, f"syncing the directory of {path}", safe="no file was left") from error


def _claim(descriptor: int, path: Path) -> None:
    """Take the lock; closing the descriptor drops it.

    :raise TargetInUse: somebody else has it, or any other lock on the file.
    """
    try:
        for start, length in _LOCK_RANGES:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, start, length, 0))
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        held = _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise TargetUnsuitable(
                f"the target {path} cannot be locked: {error.strerror}",
                safe=_UNCHANGED,
                hint="use a file system with open file description locks",
            ) from error
        held = True
    if held:
        raise TargetInUse(
            f"{_holder(descriptor)} uses the target {path}",
            safe=_UNCHANGED,
            hint="end it first (a VM must never run on a target while this secondary does), or name another target",
        )


def _holder(descriptor: int) -> str:
    """Who else has the file open, as far as this user may know; locks of this kind carry no process id."""
    ours = os.fstat(descriptor)
    holders: list[int] = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        with suppress(OSError):
            for link in (process / "fd").iterdir():
                with suppress(OSError):
                    theirs = link.stat()
                    if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino):
                        holders.append(int(process.name))
                        break
    if not holders:
        return "another process, or another disk of this secondary,"
    return "process " + ", ".join(str(pid) for pid in sorted(holders))


def _accept(descriptor: int, path: Path, size: int, *, overwrite: bool, device: bool) -> None:
    found = os.lseek(descriptor, 0, os.SEEK_END)
    if found < size:
        raise TargetTooSmall(
            f"the target {path} has {found} bytes; the primary's disk has {size}",
            safe=_UNCHANGED,
            hint="name a larger one; a file that does not exist is created with the right size",
        )
    if overwrite:
        return
    hint = "say --overwrite if its contents may go, or name another target"
    if found > size and not device:
        raise TargetTooLarge(
            f"the target {path} has {found} bytes; the primary's disk has {size}",
            safe=_UNCHANGED,
            hint=hint + "; the file is then cut to the disk's size",
        )
    try:
        looked = contents.device_holds_data if device else contents.file_holds_data
        holds_data = looked(descriptor, found)
    except OSError as error:
        raise TargetUnsuitable(
            f"the target {path} cannot be read: {error.strerror}",
            safe=_UNCHANGED,
            hint="look at the host's kernel log for the device's errors",
        ) from error
    if holds_data:
        raise TargetHoldsData(f"the target {path} holds data", safe=_UNCHANGED, hint=hint)


def _fit(descriptor: int, path: Path, size: int, *, sparse: bool) -> None:
    """Give a file its size, and space for all of it."""
    try:
        os.ftruncate(descriptor, size)
        if not sparse and size:
            os.posix_fallocate(descriptor, 0, size)
        os.fsync(descriptor)
    except OSError as error:
        raise storage_error(
            error,
            f"allocating {size} bytes for the target {path}",
            hint="make room on that file system, or say --sparse and see yourself that it never gets full"
            if is_no_space(error)
            else "",
        ) from error


__all__ = ["Target", "device_holds_data", "fallocate", "prepare_target", "reopen_target"]
