"""Scratch files that we share with QEMU, the fleece above all: where the replication filter puts the original of what
the guest overwrites during a transfer.

One sparse file per disk and use, made by us, opened by QEMU, and unlinked as soon as QEMU has it open, so that no
crash of anybody leaves a file behind. Our own descriptor stays, to empty it between epochs. Beside the fleece's there
is one in memory (memfd), which is used where there is room for an epoch: what is under way to a file whose storage
stands still cannot be taken back, and taking the filter out would wait for it, with the whole VM. Blocking calls: the
caller runs them in a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterable
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
        self.descriptor = descriptor

    @classmethod
    def in_memory(cls, size: int) -> Self:
        """A fleece that no storage can hold up: it has no name, and QEMU is handed :attr:`descriptor`.

        :raise StorageError: when it cannot be made.
        """
        size = -(-size // CLUSTER) * CLUSTER
        descriptor = -1
        try:
            descriptor = os.memfd_create("qemu-remus-fleece", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise StorageError(f"no file in memory can be made: {error.strerror}") from error
        return cls(Path("/dev/null/memory"), descriptor, size)

    @classmethod
    def make(
        cls,
        directory: Path,
        pair: PairName,
        disk: DiskName,
        size: int,
        owner: PeerCredentials,
        *,
        use: str = "fleece",
        unit: int = CLUSTER,
    ) -> Self:
        """Create the file, sparse, for QEMU's user alone.

        :param size: bytes, rounded up to whole units.
        :param use: what it is for, as its name ends.
        :param unit: bytes.
        :param owner: who runs QEMU; where we are root the file is given to them.
        :raise NoSpace: when the file system takes no more files.
        :raise StorageError: when it cannot be made for another reason.
        """
        # Made from names only, so that a file left by a crash between making and unlinking is met again and replaced.
        path = directory / f"qemu-remus-{sha256(f'{pair} {disk}'.encode()).hexdigest()[:16]}.{use}"
        size = -(-size // unit) * unit
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
                f"the {use} file for disk {disk} cannot be made in {directory}: {error.strerror}",
                safe="the VM was not touched",
                hint="name a directory on a local file system that can hold sparse files (--fleece-dir)",
            ) from error
        return cls(path, descriptor, size)

    def unlink(self) -> None:
        """Take its name away; QEMU and we go on using it."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self.path.unlink()

    def allocated(self) -> int:
        """Bytes that it occupies."""
        return os.fstat(self.descriptor).st_blocks * 512

    def empty(self) -> None:
        """Give all of its space back, keeping its size. Only while no filter writes to it.

        :raise StorageError: when the file system fails to.
        """
        if _libc.fallocate(self.descriptor, _PUNCH_HOLE | _KEEP_SIZE, 0, self.size) == 0:
            return
        number = ctypes.get_errno()
        if number != errno.EOPNOTSUPP:
            raise StorageError(
                f"the file {self.path.name} in {self.path.parent} cannot be emptied: {os.strerror(number)}"
            )
        # No holes on this file system: QEMU keeps the size in mind, and reads nothing in between.
        os.ftruncate(self.descriptor, 0)
        os.ftruncate(self.descriptor, self.size)

    def write(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        """Write bytes at offsets; what is elsewhere stays.

        :raise StorageError: when the file system fails to.
        """
        try:
            for offset, data in pieces:
                at, view = offset, memoryview(data)
                while view:
                    written = os.pwrite(self.descriptor, view, at)
                    at, view = at + written, view[written:]
        except OSError as error:
            kind = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
            raise kind(
                f"the file {self.path.name} in {self.path.parent} cannot be written: {error.strerror}"
            ) from error

    def read(self, length: int, offset: int) -> bytes:
        """What is there; fewer bytes at its end.

        :raise StorageError: when the file system fails to.
        """
        try:
            return os.pread(self.descriptor, length, offset)
        except OSError as error:
            raise StorageError(
                f"the file {self.path.name} in {self.path.parent} cannot be read: {error.strerror}"
            ) from error

    def data_from(self, offset: int) -> tuple[int, int]:
        """The first piece of the file, at or behind an offset, that is not a hole: its start and its end; both the
        file's end where there is none. Where the file system knows of no holes, everything is data."""
        try:
            start = os.lseek(self.descriptor, offset, os.SEEK_DATA)
            return start, os.lseek(self.descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.size, self.size
            return offset, self.size

    def free_space(self) -> int:
        """Bytes that the file system still has for QEMU's user."""
        status = os.fstatvfs(self.descriptor)
        return status.f_bavail * status.f_frsize

    def close(self) -> None:
        """Close our descriptor, and unlink the file if that has not been done."""
        self.unlink()
        os.close(self.descriptor)
