"""The backup host's side of the memory, as a server, and the connection to it.

Owns the talk about a :class:`~integration.toolstack.store.MemoryStore`: its steps and states are the store's, the bytes
:mod:`integration.toolstack.wire`'s.  The server is a process of its own (``python -m integration.toolstack backup``),
so that a test can kill it; a Unix socket stands for the network between the hosts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from integration.process import Process, start_process
from integration.toolstack import wire
from integration.toolstack.memory import MemoryImage
from integration.toolstack.store import Incoming, MemoryStore, StoreError
from integration.toolstack.wire import Frame, Kind, WireError

_PAYLOAD: Final = 1 << 20
_RUNS: Final = 4096


class BackupLost(Exception):
    """The backup cannot be reached, or the connection to it has ended; what came of the last step is unknown."""


class BackupRefused(Exception):
    """The backup says no; nothing was changed there."""


class BackupLink:
    """A connection to a backup. Made by :func:`open_backup_link`.

    Every method raises BackupLost, and BackupRefused where that is stated; after BackupLost nothing works any more.
    Time-outs are in seconds.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._lock = trio.Lock()

    async def stage(
        self, epoch: int, image: MemoryImage, device_state: bytes, *, base: int | None, timeout: float = 60.0
    ) -> int:
        """Send what the image owes, and QEMU's device state; returns when they are durable, and the bytes sent.

        :param base: the checkpoint that the backup has and that the pages owed are a difference to; None: all pages
            that are not zero are owed.
        :raise BackupRefused: when the backup has not what they build on.
        """
        async with self._talk(timeout):
            sent = await self._send(wire.begin(epoch, image.size, base))
            count = 1
            for start in range(0, len(device_state), _PAYLOAD):
                sent += await self._send(wire.frame(Kind.DEVICE, epoch, device_state[start : start + _PAYLOAD]))
                count += 1
            group: list[tuple[int, memoryview]] = []
            size = 0
            for run in image.owed(limit=_PAYLOAD):
                if size + run.length > _PAYLOAD or len(group) == _RUNS:
                    sent += await self._send(wire.pages(epoch, group))
                    count += 1
                    group, size = [], 0
                group.append((run.start, image.read(run)))
                size += run.length
            if group:
                sent += await self._send(wire.pages(epoch, group))
                count += 1
            sent += await self._send(wire.end(epoch, count))
            await self._answer()
        return sent

    async def complete(self, epoch: int, *, timeout: float = 60.0) -> None:
        """The disks of this checkpoint are staged: it may be restored; the one before stays beside it.

        :raise BackupRefused: when it is not staged.
        """
        await self._ask(wire.frame(Kind.COMPLETE, epoch), timeout)

    async def committed(self, epoch: int, *, timeout: float = 60.0) -> None:
        """This checkpoint counts: older ones may go.

        :raise BackupRefused: when it cannot be restored.
        """
        await self._ask(wire.frame(Kind.COMMITTED, epoch), timeout)

    async def drop(self, epoch: int, *, timeout: float = 60.0) -> None:
        """Forget this checkpoint: the disks have lost it. Nothing happens where there is none.

        :raise BackupRefused: when another one builds on it.
        """
        await self._ask(wire.frame(Kind.DROP, epoch), timeout)

    async def checkpoints(self, *, timeout: float = 10.0) -> tuple[int, ...]:
        """Numbers of those that can be restored, the newest first."""
        answer = await self._ask(wire.frame(Kind.LIST), timeout)
        return wire.parse_numbers(answer.payload)

    async def restore(self, epoch: int, memory: Path, device_state: Path, *, timeout: float = 120.0) -> None:
        """Have a checkpoint written out to two new files on the backup's host.

        :raise BackupRefused: when it cannot be restored, or the files cannot be written.
        """
        paths = b"\0".join((os.fsencode(memory), os.fsencode(device_state)))
        await self._ask(wire.frame(Kind.RESTORE, epoch, paths), timeout)

    @asynccontextmanager
    async def _talk(self, timeout: float) -> AsyncIterator[None]:
        async with self._lock:
            whole = False
            try:
                with trio.fail_after(timeout):
                    yield
                whole = True
            except BackupRefused:
                whole = True
                raise
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, EOFError) as error:
                raise BackupLost(f"the connection to the backup has ended: {error}") from error
            except WireError as error:
                raise BackupLost(f"the backup answers nonsense: {error}") from error
            except trio.TooSlowError as error:
                raise BackupLost(f"the backup does not answer within {timeout:g} s") from error
            finally:
                if not whole:
                    # half a talk: what comes next on it would be taken for something else
                    await trio.aclose_forcefully(self._stream)

    async def _ask(self, question: bytes, timeout: float) -> Frame:
        async with self._talk(timeout):
            await self._send(question)
            return await self._answer()

    async def _send(self, raw: bytes) -> int:
        await self._stream.send_all(raw)
        return len(raw)

    async def _answer(self) -> Frame:
        answer = await _receive(self._stream)
        if answer is None:
            raise EOFError("it was closed")
        if answer.kind is Kind.REFUSED:
            raise BackupRefused(bytes(answer.payload).decode())
        return answer


@asynccontextmanager
async def open_backup_link(path: Path, *, timeout: float = 10.0) -> AsyncIterator[BackupLink]:
    """Connect to the backup that listens there.

    :raise BackupLost: when there is none.
    """
    try:
        with trio.fail_after(timeout):
            stream = await trio.open_unix_socket(str(path))
    except (OSError, trio.TooSlowError) as error:
        raise BackupLost(f"no backup on {path}: {error}") from error
    try:
        yield BackupLink(stream)
    finally:
        await trio.aclose_forcefully(stream)


class _Session:
    """One connection, as the server sees it."""

    def __init__(self, store: MemoryStore, lock: trio.Lock) -> None:
        self._store = store
        self._lock = lock
        self._incoming: Incoming | None = None
        #: of a checkpoint that was refused amid its frames: told at its end, when an answer is waited for
        self._refusal = ""

    async def serve(self, stream: trio.SocketStream) -> None:
        try:
            while found := await _receive(stream):
                if answer := await self._take(found):
                    await stream.send_all(answer)
        except (trio.BrokenResourceError, WireError):
            pass
        finally:
            with trio.CancelScope(shield=True):
                async with self._lock:
                    if self._incoming:
                        self._incoming.discard()
                await trio.aclose_forcefully(stream)

    async def _take(self, found: Frame) -> bytes:
        """The answer, empty where none is due."""
        async with self._lock:
            try:
                payload = await trio.to_thread.run_sync(self._do, found)
            except (StoreError, WireError, OSError) as error:
                if found.kind in (Kind.BEGIN, Kind.DEVICE, Kind.PAGES):
                    self._refusal = self._refusal or str(error)
                    return b""
                return wire.frame(Kind.REFUSED, found.epoch, str(error).encode())
        if found.kind in (Kind.BEGIN, Kind.DEVICE, Kind.PAGES):
            return b""
        return wire.frame(Kind.DONE, found.epoch, payload)

    def _do(self, found: Frame) -> bytes:
        match found.kind:
            case Kind.BEGIN:
                self._refusal = ""
                self._incoming = self._store.begin(found)
            case Kind.DEVICE | Kind.PAGES:
                if not self._refusal:
                    self._receiving().add(found)
            case Kind.END:
                if self._refusal:
                    raise StoreError(self._refusal)
                self._receiving().stage(found)
            case Kind.COMPLETE:
                self._store.complete(found.epoch)
            case Kind.COMMITTED:
                self._store.committed(found.epoch)
            case Kind.DROP:
                self._store.drop(found.epoch)
            case Kind.LIST:
                return wire.numbers(self._store.checkpoints())
            case Kind.RESTORE:
                memory, _, device_state = bytes(found.payload).partition(b"\0")
                self._store.restore(found.epoch, Path(os.fsdecode(memory)), Path(os.fsdecode(device_state)))
            case Kind.DONE | Kind.REFUSED:
                raise WireError("an answer to no question")
        return b""

    def _receiving(self) -> Incoming:
        if self._incoming is None:
            raise StoreError("a frame of no checkpoint")
        return self._incoming


async def serve(directory: Path, path: Path) -> None:
    """Task: keep a store and serve it on a Unix socket, until cancelled.

    :raise StoreError: when another process has the store open.
    """
    store = await trio.to_thread.run_sync(_open, directory, path)
    lock = trio.Lock()
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    try:
        async with trio.open_nursery() as nursery:
            while True:
                connection, _ = await listener.accept()
                session = _Session(store, lock)
                nursery.start_soon(session.serve, trio.SocketStream(connection))
    finally:
        listener.close()
        store.close()


def _open(directory: Path, path: Path) -> MemoryStore:
    store = MemoryStore(directory)
    path.unlink(missing_ok=True)
    return store


@asynccontextmanager
async def start_backup(directory: Path, *, name: str = "backup") -> AsyncIterator[tuple[Process, Path]]:
    """Run a backup as a process for the length of the block; starting one again in the same directory is a restart.

    :return: the process, and the socket for :func:`open_backup_link`, which answers already.
    """
    here = directory / name
    here.mkdir(exist_ok=True)
    path = here / "socket"
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "integration.toolstack", "backup"]
    command += ["--directory", str(here / "store"), "--socket", str(path)]
    async with start_process(command, out=here / "log") as process:
        with trio.fail_after(60):
            while True:
                try:
                    async with open_backup_link(path) as link:
                        await link.checkpoints()
                    break
                except BackupLost:
                    if not process.running:
                        raise BackupLost(f"the backup does not start:\n{process.tail()}") from None
                    await trio.sleep(0.02)
        yield process, path


async def _receive(stream: trio.SocketStream) -> Frame | None:
    """The next frame; None at the end of the connection between two.

    :raise WireError: when it ends amid one, or what comes is none.
    """
    header = await _exactly(stream, wire.HEADER.size)
    if not header:
        return None
    payload = await _exactly(stream, wire.payload_length(header))
    return wire.parse(header + payload)


async def _exactly(stream: trio.SocketStream, count: int) -> bytes:
    """So many bytes, or none when the connection ends first.

    :raise WireError: when it ends amid them.
    """
    found = bytearray()
    while len(found) < count:
        piece = await stream.receive_some(count - len(found))
        if not piece:
            if found:
                raise WireError("the connection ended amid a frame")
            return b""
        found += piece
    return bytes(found)
