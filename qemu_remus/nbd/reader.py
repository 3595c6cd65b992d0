"""Reads what an epoch, or a whole disk, holds out of an NBD export, in bounded memory and in ascending order."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from qemu_remus.nbd.batches import Batch

DEFAULT_TIMEOUT = 30.0


class BatchStream:
    """The batches of one disk, in ascending order: ``async for batch in stream``."""

    def __aiter__(self) -> AsyncIterator[Batch]:
        """Iterate; once."""
        return self

    async def __anext__(self) -> Batch:
        """The next batch.

        :raise SnapshotBroken: when the filter gave up the checkpoint's view (``read_dirty`` only).
        :raise NbdRequestFailed: when QEMU answered with another error.
        :raise NbdProtocolError: when the server broke the protocol or lacks what we need, the bitmap say.
        :raise NbdConnectionLost: when the connection ended, or nothing was heard for ``timeout`` seconds.
        """
        raise NotImplementedError


def read_dirty(
    path: str | Path,
    export: str,
    bitmap: str,
    *,
    disk: int,
    dirty_bytes: int,
    granularity: int,
    connections: int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> AbstractAsyncContextManager[BatchStream]:
    """``async with read_dirty(...) as batches: async for batch in batches: ...``; leave it whenever you like."""
    raise NotImplementedError


def read_allocated(
    path: str | Path,
    export: str,
    *,
    disk: int,
    connections: int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> AbstractAsyncContextManager[BatchStream]:
    """As :func:`read_dirty`, for everything that the disk holds."""
    raise NotImplementedError
