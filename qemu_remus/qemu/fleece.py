"""Fleece files: where the replication filter puts the original of what the guest overwrites during a transfer.

One sparse file per disk, made by us, opened by QEMU, and unlinked as soon as QEMU has it open, so that no crash of
anybody leaves a file behind. Our own descriptor stays, to empty it between epochs. Blocking calls: the caller runs them
in a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from hashlib import sha256
from pathlib import Path
from typing import Final, Self

from qemu_remus.core.errors import NoSpace, StorageError
from qemu_remus.core.model import DiskName, PairName
from qemu_remus.qemu.client import PeerCredentials
from qemu_remus.qemu.epoch import CLUSTER

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
"""Modes of fallocate(2), from linux/falloc.h."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class FleeceFile:
    """One open fleece file; :meth:`make` it, hand :attr:`path` to QEMU, :meth:`unlink` it."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path = path
        self.size = size
        self._descriptor = descriptor

    @classmethod
    def make(cls, directory: Path, pair: PairName, disk: DiskName, size: int, owner: PeerCredentials) -> Self:
        """Create the file, sparse, for QEMU's user alone.

        :param size: the disk's, in bytes; the file has whole clusters.
        :param owner: who runs QEMU; where we are root the file is given to them.
        :raise NoSpace: when the file system takes no more files.
        :raise StorageError: when it cannot be made for another reason.
        """
        # Made from names only, so that a file left by a crash between making and unlinking is met again and replaced.
        path = directory / f"qemu-remus-{sha256(f'{pair} {disk}'.encode()).hexdigest()[:16]}.fleece"
        size = -(-size // CLUSTER) * CLUSTER
        try:
            path.unlink(missing_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.ftruncate(descriptor, size)
                if os.geteuid() == 0 and owner.uid != 0:
                    os.fchown(descriptor, owner.uid, owner.gid)
            except BaseException:
                os.close(descriptor)
                path.unlink()
                raise
        except OSError as error:
            kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
            raise kind(
                f"the fleece file for disk {disk} cannot be made in {directory}: {error.strerror}",
                safe="the VM was not touched",
                hint="name a directory on a local file system that can hold sparse files (--fleece-dir)",
            ) from error
        return cls(path, descriptor, size)

    def unlink(self) -> None:
        """Take its name away; QEMU and we go on using it."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def allocated(self) -> int:
        """Bytes that it occupies."""
        return os.fstat(self._descriptor).st_blocks * 512

    def empty(self) -> None:
        """Give all of its space back, keeping its size. Only while no filter writes to it.

        :raise StorageError: when the file system fails to.
        """
        if _libc.fallocate(self._descriptor, _PUNCH_HOLE | _KEEP_SIZE, 0, self.size) == 0:
            return
        number = ctypes.get_errno()
        if number != errno.EOPNOTSUPP:
            raise StorageError(f"the fleece file in {self.path.parent} cannot be emptied: {os.strerror(number)}")
        # No holes on this file system: QEMU keeps the size in mind, and reads nothing in between.
        os.ftruncate(self._descriptor, 0)
        os.ftruncate(self._descriptor, self.size)

    def free_space(self) -> int:
        """Bytes that the file system still has for QEMU's user."""
        status = os.fstatvfs(self._descriptor)
        return status.f_bavail * status.f_frsize

    def close(self) -> None:
        """Close our descriptor, and unlink the file if that has not been done."""
        self.unlink()
        os.close(self._descriptor)
