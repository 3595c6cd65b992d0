"""One process per store: an exclusive ``flock`` on the file ``lock`` in the store's directory.

The kernel drops the lock when the process ends, however it ends; the file stays and means nothing by itself.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from qemu_remus.core.errors import StoreLocked
from qemu_remus.storage.files import storage_error

LOCK_NAME: Final = "lock"


@contextmanager
def lock_store(directory: Path) -> Iterator[None]:
    """Hold a store for as long as the context lasts; the directory is made (mode 0700) where it is missing.

    :raise StoreLocked: another process, or another part of this one, holds it; names its pid where that is known.
    :raise StorageError: the directory or the file cannot be made.
    """
    path = directory / LOCK_NAME
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise storage_error(
            error, f"opening {path}", hint="see that the directory is there and that this user may write to it"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            who = f"process {holder}" if holder.isdigit() else "another process"
            raise StoreLocked(
                f"{who} uses the store {directory}",
                safe="nothing in it was read or changed",
                hint="one controller per store: stop that one, or name another directory",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
