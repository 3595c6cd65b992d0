"""Reads what an epoch, or a whole disk, holds out of an NBD export, in bounded memory and in ascending order.

It goes window by window: block status first, of as much of the disk as yields a bounded number of ranges, then the
data of these ranges, over one to four connections. No status is asked for while a read is unanswered on any of them:
QEMU below 9.2 may fail an assertion when both run at once on a snapshot. Each context has a connection of its own:
where QEMU cannot tell the allocation, it ends the reply and then sends the other context's status all the same. Each
connection keeps the session's budget of replies owed, so that a reader that hangs, or whose consumer does, never holds
up QEMU.

What may not enter: the protocol's bytes (protocol.py), and what an epoch is.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from qemu_remus.core.errors import EpochLost, NbdError, NbdRequestFailed, SnapshotBroken
from qemu_remus.nbd.batches import Batch, BatchQueue, Read, Run, append_run
from qemu_remus.nbd.client import DEFAULT_TIMEOUT, NbdClient, close_all, open_nbd
from qemu_remus.nbd.protocol import ALLOCATION, ReadReply, ReadRequest, RequestError, dirty_context, read_cost
from qemu_remus.nbd.windows import AllocationWalk, DirtyWalk

READ_BYTES: Final = 28 * 1024
"""Longest read: two of them, with their overhead, fit the budget of replies owed."""

WINDOW_BYTES: Final = 64 * 1024 * 1024
"""Data after which a window is large enough: its status costs little against its reads."""

WINDOW_RUNS: Final = 8192
"""Ranges after which a window is large enough; one more answer may come on top. Bounds the memory."""

CONNECTIONS: Final = 4
"""Most connections that read at once, unless the caller says otherwise."""

_BROKEN_SNAPSHOT: Final = (errno.EACCES, errno.EINVAL)
"""What a snapshot that broke answers. QEMU has EACCES for it, NBD has not: on the wire it is EINVAL (seen on 7.2),
which a request of ours, always within the export, cannot get for another reason."""

_BYTES_PER_CONNECTION: Final = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Source:
    """What to read, and from where.

    :param dirty: the bitmap, what QEMU counts in it and its granularity, in bytes; None: whatever is allocated.
    :param within: only this part of the disk; None: all of it. Of what is allocated only.
    """

    path: str
    export: str
    disk: int
    dirty: tuple[str, int, int] | None
    connections: int
    timeout: float
    within: Run | None = None


class BatchStream:
    """The batches of one disk, in ascending order: ``async for batch in stream``, once.

    Reading goes on in the background while the consumer is busy, a few batches ahead and no further.
    """

    def __init__(self, queue: BatchQueue) -> None:
        self._queue = queue
        self._ready = trio.lowlevel.ParkingLot()
        self._room = trio.lowlevel.ParkingLot()
        self._ended = False
        self._failure: NbdError | EpochLost | None = None

    def __aiter__(self) -> AsyncIterator[Batch]:
        return self

    async def __anext__(self) -> Batch:
        """The next batch.

        :raise SnapshotBroken: when the filter gave up the checkpoint's view (``read_dirty`` only).
        :raise NbdRequestFailed: when QEMU answered with another error.
        :raise NbdProtocolError: when the server broke the protocol or lacks what we need, the bitmap for example.
        :raise NbdConnectionLost: when the connection ended, or nothing was heard for ``timeout`` seconds.
        """
        await trio.lowlevel.checkpoint()
        while (batch := self._queue.next_batch()) is None:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                raise StopAsyncIteration
            await self._ready.park()
        self._room.unpark_all()
        return batch


class _Reader:
    """The half in the background: windows, connections, reads."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._clients: list[NbdClient] = []
        self._dirty: DirtyWalk | None = None
        self._allocation = AllocationWalk()
        self._allocation_client: NbdClient | None = None
        self._unexplored = deque[Run]()
        self._queue = BatchQueue(source.disk, read_bytes=READ_BYTES, limit=source.connections + 3)
        self.stream = BatchStream(self._queue)

    async def run(self) -> None:
        """Read everything, then end the stream, with what went wrong if anything did."""
        stream = self.stream
        try:
            await self._begin()
            while window := await self._next_window():
                self._queue.plan(window)
                stream._ready.unpark_all()
                await self._read_window(sum(run.length for run in window if not run.zero))
        except (NbdError, EpochLost) as error:
            stream._failure = error
        stream._ended = True
        stream._ready.unpark_all()

    async def close(self) -> None:
        """End all connections; never raises."""
        await close_all(self._clients)

    async def _open(self, *contexts: str) -> NbdClient:
        source = self._source
        client = await open_nbd(source.path, source.export, contexts, timeout=source.timeout)
        self._clients.append(client)
        return client

    async def _begin(self) -> None:
        if self._source.dirty is None:
            self._allocation_client = await self._open(ALLOCATION)
            size = self._allocation_client.info.size
            within = self._source.within or Run(0, size)
            if (end := min(within.end, size)) > within.offset:
                self._unexplored.append(Run(within.offset, end - within.offset))
        else:
            bitmap, dirty_bytes, granularity = self._source.dirty
            client = await self._open(dirty_context(bitmap))
            self._dirty = DirtyWalk(client.info.size, granularity, dirty_bytes)

    async def _next_window(self) -> list[Run]:
        """The next ranges with contents to hand over, in ascending order; empty at the end of the disk."""
        window: list[Run] = []
        data = 0
        # A snapshot is not asked for its allocation: the same fault as in batches.CLUSTER makes the answer wrong.
        explore = self._dirty is None
        while data < WINDOW_BYTES and len(window) < WINDOW_RUNS:
            if not self._unexplored:
                if self._dirty is None or self._dirty.finished:
                    break
                self._unexplored.extend(await self._find_dirty(self._dirty))
                continue
            run = self._unexplored.popleft()
            pieces = await self._find_zeroes(run) if explore else [run]
            for piece in pieces:
                append_run(window, piece)
                data += 0 if piece.zero else piece.length
            if pieces[-1].end < run.end:
                self._unexplored.appendleft(Run(pieces[-1].end, run.end - pieces[-1].end))
        return window

    async def _find_dirty(self, walk: DirtyWalk) -> list[Run]:
        assert self._source.dirty is not None
        offset, length, extents = walk.next_request()
        reply = await self._clients[0].status(offset, length, extents=extents)
        if isinstance(reply, RequestError):
            raise self._failed(reply)
        return walk.found(reply.contexts[dirty_context(self._source.dirty[0])])

    async def _find_zeroes(self, run: Run) -> list[Run]:
        if self._allocation_client is None:
            self._allocation_client = await self._open(ALLOCATION)
        offset, length, extents = self._allocation.next_request(run)
        reply = await self._allocation_client.status(offset, length, extents=extents)
        if isinstance(reply, RequestError):
            raise self._failed(reply)
        return self._allocation.found(run, reply.contexts[ALLOCATION])

    async def _read_window(self, data: int) -> None:
        """Read all that was planned; nothing is unanswered on any connection when this returns."""
        # Setting a connection up takes as long as reading some 256 KiB: not for a small epoch.
        wanted = min(self._source.connections, 1 + data // _BYTES_PER_CONNECTION)
        while len(self._clients) < wanted:
            await self._open()
        clients = self._clients[:wanted]
        if len(clients) == 1:
            await self._read_with(clients[0])
            return
        failures: list[NbdError | EpochLost] = []
        async with trio.open_nursery() as nursery:

            async def read(client: NbdClient) -> None:
                try:
                    await self._read_with(client)
                except (NbdError, EpochLost) as error:
                    failures.append(error)
                    nursery.cancel_scope.cancel()

            for client in clients:
                nursery.start_soon(read, client)
        if failures:
            raise failures[0]

    async def _read_with(self, client: NbdClient) -> None:
        """Read on one connection until no read is left to hand out and all of its own are answered."""
        session, queue = client.session, self._queue
        while True:
            while (read := queue.next_read()) is not None:
                if not session.room_for(read_cost(read.length)):
                    queue.put_back(read)
                    break
                session.read(read.offset, read.length, read)
            if session.unanswered:
                self._take_in(await client.exchange())
            elif queue.exhausted:
                return
            else:
                await self.stream._room.park()

    def _take_in(self, events: Sequence[object]) -> None:
        for event in events:
            if isinstance(event, RequestError):
                raise self._failed(event)
            assert isinstance(event, ReadReply)
            assert isinstance(event.request.tag, Read)
            event.request.tag.fill(event.data)
        if self._queue.ready:
            self.stream._ready.unpark_all()

    def _failed(self, failure: RequestError) -> NbdRequestFailed | SnapshotBroken:
        request, error = failure.request, failure.error
        kind = "a read" if isinstance(request, ReadRequest) else "the block status"
        what = (
            f"QEMU failed {kind} of {request.length} bytes at {request.offset} of the export {self._source.export!r}: "
            f"{os.strerror(error)}{f' ({failure.text})' if failure.text else ''}"
        )
        if self._source.dirty is not None and error in _BROKEN_SNAPSHOT:
            return SnapshotBroken(
                f"the checkpoint's view of export {self._source.export!r} broke ({what})",
                safe="the guest is not affected, and its changes stay recorded for the next epoch",
                hint="if this repeats, see that the fleece directory has room and is fast enough",
            )
        return NbdRequestFailed(what, error)


@asynccontextmanager
async def _streaming(source: _Source) -> AsyncGenerator[BatchStream, None]:
    reader = _Reader(source)
    alone: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.run)
            try:
                yield reader.stream
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The nursery is our own business: what the body of `async with` raised comes out as it was.
        if len(group.exceptions) != 1:
            raise
        alone = group.exceptions[0]
    finally:
        await reader.close()
    if alone is not None:
        raise alone


def read_dirty(
    path: str | Path,
    export: str,
    bitmap: str,
    *,
    disk: int,
    dirty_bytes: int,
    granularity: int,
    connections: int = CONNECTIONS,
    timeout: float = DEFAULT_TIMEOUT,
) -> AbstractAsyncContextManager[BatchStream]:
    """The contents of all ranges that a dirty bitmap names, exactly these, at the bitmap's granularity::

        async with read_dirty(...) as batches:
            async for batch in batches:
                ...

    The block may be left at any time. When it is, all connections are closed, as far as QEMU answers within
    ``GOODBYE_TIMEOUT`` on its side too, so that the export can be deleted. Errors come out of the ``async for``;
    without one, every byte that it yielded is the checkpoint's.

    :param path: of the NBD server's Unix socket.
    :param bitmap: name of the exported dirty bitmap.
    :param disk: index that the extents carry.
    :param dirty_bytes: what QEMU counts in the bitmap; more or less may be found.
    :param granularity: of the bitmap, in bytes.
    :param connections: most connections that read at once; small amounts take fewer.
    :param timeout: seconds, for each connection's handshake and each wait for a reply.
    """
    return _streaming(_Source(str(path), export, disk, (bitmap, dirty_bytes, granularity), connections, timeout))


def read_allocated(
    path: str | Path,
    export: str,
    *,
    disk: int,
    within: Run | None = None,
    connections: int = CONNECTIONS,
    timeout: float = DEFAULT_TIMEOUT,
) -> AbstractAsyncContextManager[BatchStream]:
    """The contents of a whole disk, without a gap: data, and zero extents for what is known or found to be zero.

    Used and failing as :func:`read_dirty`.

    :param within: of this part only, as far as the disk has it.
    """
    return _streaming(_Source(str(path), export, disk, None, connections, timeout, within))


async def find_dirty(
    path: str | Path,
    export: str,
    bitmap: str,
    *,
    within: Run,
    granularity: int,
    timeout: float = DEFAULT_TIMEOUT,
) -> list[Run]:
    """Which ranges of a part of the disk a dirty bitmap names, in ascending order; neighbours may come apart.

    :param path: of the NBD server's Unix socket.
    :param bitmap: name of the exported dirty bitmap.
    :param granularity: of the bitmap, in bytes.
    :param timeout: seconds, for the handshake and for each wait for a reply.
    :raise NbdError: as :func:`read_dirty`.
    """
    context = dirty_context(bitmap)
    clients: list[NbdClient] = []
    try:
        client = await open_nbd(str(path), export, (context,), timeout=timeout)
        clients.append(client)
        end = min(within.end, client.info.size)
        walk = DirtyWalk(end, granularity, within.length + granularity)
        walk.offset = within.offset
        found: list[Run] = []
        while not walk.finished:
            offset, length, extents = walk.next_request()
            reply = await client.status(offset, length, extents=extents)
            if isinstance(reply, RequestError):
                raise NbdRequestFailed(
                    f"QEMU failed the block status of {length} bytes at {offset} of the export {export!r}: "
                    f"{os.strerror(reply.error)}",
                    reply.error,
                )
            found += walk.found(reply.contexts[context])
        return found
    finally:
        await close_all(clients)
