"""Where guests' memory files lie: in memory where there is room, since a file elsewhere is written to a disk."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_SHARED: Final = Path("/dev/shm")


@contextmanager
def memory_directory(room: int) -> Iterator[Path]:
    """An empty directory for the length of the block.

    :param room: bytes that will be needed.
    """
    try:
        free = shutil.disk_usage(_SHARED).free
    except OSError:
        free = 0
    # a container has 64 MiB of it by default, and whoever fills it gets a SIGBUS
    parent = _SHARED if free > 2 * room else None
    with tempfile.TemporaryDirectory(prefix="qr-", dir=parent) as path:
        yield Path(path)
