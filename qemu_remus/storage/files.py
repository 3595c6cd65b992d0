"""The few file operations that our own disk state (superblock and journal) stands on, as a protocol.

:class:`OsFiles` is the operating system; tests put a disk in its place that loses, tears and reorders whatever was not
synced.  Disk images and locks do not go through here: they are :mod:`qemu_remus.storage.targets` and
:mod:`qemu_remus.storage.lock`.  No format and no policy may enter: every failure leaves as the ``OSError`` that it is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NewType, Protocol

from qemu_remus.core.errors import NoSpace, StorageError, WriteFailed

Handle = NewType("Handle", int)
"""An open file, as :meth:`Files.open` returned it."""

Buffer = bytes | bytearray | memoryview

_ZEROES = bytes(1 << 20)


class Files(Protocol):
    """File operations; all block, and all raise ``OSError``.

    What may be assumed of stable storage: data and size of a file after :meth:`fsync` or :meth:`fdatasync` of it;
    names in a directory after :meth:`sync_directory` of it; nothing else, and nothing at all of what was written since
    a sync that failed.
    """

    def open(self, path: Path, *, create: bool = False) -> Handle:
        """Open for reading and writing; with ``create``, a new and empty file.

        :raise FileNotFoundError: it is missing and ``create`` is not given.
        :raise FileExistsError: it exists and ``create`` is given.
        """
        ...

    def close(self, handle: Handle) -> None: ...

    def size(self, handle: Handle) -> int:
        """Bytes."""
        ...

    def pread(self, handle: Handle, length: int, offset: int) -> bytes:
        """Read; fewer bytes than asked for only at the file's end."""
        ...

    def pwrite(self, handle: Handle, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all buffers, one behind the other. Concurrent readers of other ranges are not disturbed."""
        ...

    def allocate(self, handle: Handle, size: int) -> None:
        """Extend the file to ``size`` bytes where it is shorter, with space reserved for all of them."""
        ...

    def fsync(self, handle: Handle) -> None: ...

    def fdatasync(self, handle: Handle) -> None: ...

    def drop_cache(self, handle: Handle) -> None:
        """Make later reads come from the device, as far as pages are clean.

        After a sync that failed, Linux keeps the pages that never reached the device as if they had: reading them back
        proves nothing.
        """
        ...

    def make_directory(self, path: Path) -> None:
        """Make a directory; fine where it exists."""
        ...

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        ...

    def list(self, path: Path) -> list[str]:
        """Names in a directory, in no order; empty where the directory is missing."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """Replace ``new`` atomically."""
        ...

    def unlink(self, path: Path) -> None: ...

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        ...


class OsFiles:
    """The operating system's files. New ones are readable by their owner only: they hold the guest's data."""

    def open(self, path: Path, *, create: bool = False) -> Handle:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        return Handle(os.open(path, flags, 0o600))

    def close(self, handle: Handle) -> None:
        os.close(handle)

    def size(self, handle: Handle) -> int:
        return os.fstat(handle).st_size

    def pread(self, handle: Handle, length: int, offset: int) -> bytes:
        first = os.pread(handle, length, offset)
        if len(first) == length or not first:
            return first
        parts = [first]
        missing = length - len(first)
        while missing:
            part = os.pread(handle, missing, offset + length - missing)
            if not part:
                break
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    def pwrite(self, handle: Handle, buffers: Sequence[Buffer], offset: int) -> None:
        write_all(handle, buffers, offset)

    def allocate(self, handle: Handle, size: int) -> None:
        os.posix_fallocate(handle, 0, size)

    def fsync(self, handle: Handle) -> None:
        os.fsync(handle)

    def fdatasync(self, handle: Handle) -> None:
        os.fdatasync(handle)

    def drop_cache(self, handle: Handle) -> None:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def make_directory(self, path: Path) -> None:
        path.mkdir(mode=0o700, exist_ok=True)

    def sync_directory(self, path: Path) -> None:
        sync_directory(path)

    def list(self, path: Path) -> list[str]:
        try:
            return os.listdir(path)  # noqa: PTH208 -- names are wanted, not paths
        except FileNotFoundError:
            return []

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        path.rmdir()


def write_all(descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write all buffers one behind the other at ``offset``, however often the kernel takes only a part.

    :raise OSError: the kernel's error; what was written until then is unknown.
    """
    views = [memoryview(buffer) for buffer in buffers if len(buffer)]
    while views:
        written = os.pwritev(descriptor, views, offset)
        offset += written
        while views and written >= len(views[0]):
            written -= len(views[0])
            del views[0]
        if written:
            views[0] = views[0][written:]


def write_zeroes(files: Files, handle: Handle, offset: int, length: int) -> None:
    """Write ``length`` zero bytes through ``files``, piece by piece."""
    for start in range(offset, offset + length, len(_ZEROES)):
        files.pwrite(handle, [memoryview(_ZEROES)[: min(len(_ZEROES), offset + length - start)]], start)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable.

    :raise OSError: as ``fsync`` does.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_error(error: OSError, what: str, *, safe: str = "", hint: str = "") -> StorageError:
    """The class for a failed write or sync: :class:`NoSpace` for a full file system or quota, else WriteFailed.

    :param what: what was being done, for example ``writing /var/lib/qemu-remus/journal/1.segment``.
    """
    text = f"{what} failed: {error.strerror or error}"
    if is_no_space(error):
        return NoSpace(text, safe=safe, hint=hint or "make room on that file system")
    return WriteFailed(text, safe=safe, hint=hint or "look at the host's kernel log for the device's errors")


def is_no_space(error: OSError) -> bool:
    """Whether the error says that a file system or a quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


__all__ = [
    "Buffer",
    "Files",
    "Handle",
    "OsFiles",
    "is_no_space",
    "storage_error",
    "sync_directory",
    "write_all",
    "write_zeroes",
]
