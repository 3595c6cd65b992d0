"""What the guest has said to the outside, held back until the checkpoint that follows counts.

Owns our end of the guest's port ``output``, which stands for the network.  Checkpoints are numbers here, no more.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

_RECEIVE_SIZE: Final = 64 << 10
HELD_LIMIT: Final = 64 << 20
"""Bytes held, beyond which nothing more is read, and so in the end the guest waits."""


class OutputBuffer:
    """Output of one VM.

    While the VM is stopped, all that its guest has handed over has been written out by QEMU and lies in the socket, and
    more does not come: to read it empty then, by :meth:`close_epoch`, is to have what the guest said before this
    checkpoint, to the byte.

    :param sock: connected to the port, non-blocking.
    :param sink: gets what is released, as it is.
    :param holding: hold back; False: the VM is not protected, and all goes out at once.
    :ivar released: all that went out so far.
    """

    def __init__(
        self, sock: socket.socket, *, sink: Callable[[bytes], None] | None = None, holding: bool = True
    ) -> None:
        self._socket = sock
        self._sink = sink
        self._holding = holding
        self._epochs: deque[tuple[int, bytes]] = deque()
        self._open = bytearray()
        self._held = 0
        self._changed = trio.Event()
        self.released = bytearray()

    @property
    def held_bytes(self) -> int:
        """What waits for a commit."""
        return self._held

    @property
    def held_records(self) -> int:
        """Lines among that."""
        return self._open.count(b"\n") + sum(data.count(b"\n") for _, data in self._epochs)

    async def receive(self) -> None:
        """Task: take in what comes, until the VM's end."""
        while True:
            while self._held > HELD_LIMIT:
                await self._changed.wait()
            await trio.lowlevel.wait_readable(self._socket)
            try:
                data = self._socket.recv(_RECEIVE_SIZE)
            except BlockingIOError:
                continue
            except ConnectionError:
                return
            if not data:
                return
            self._take(data)

    def close_epoch(self, epoch: int) -> None:
        """The VM is stopped at this checkpoint: all that it said until now waits for the commit of this epoch."""
        while True:
            try:
                data = self._socket.recv(_RECEIVE_SIZE)
            except (BlockingIOError, ConnectionError):
                break
            if not data:
                break
            self._take(data)
        if self._open:
            self._epochs.append((epoch, bytes(self._open)))
            self._open.clear()

    def release(self, epoch: int) -> None:
        """This checkpoint is committed: let out what was said before it, in lost epochs before it too."""
        while self._epochs and self._epochs[0][0] <= epoch:
            _, data = self._epochs.popleft()
            self._held -= len(data)
            self._let_out(data)

    async def wait_released(self, condition: Callable[[bytes], bool], *, timeout: float = 60.0) -> None:
        """Wait until what has been released fulfils the condition.

        :raise TimeoutError: after ``timeout`` seconds.
        """
        with trio.move_on_after(timeout):
            while not condition(bytes(self.released)):
                await self._changed.wait()
            return
        raise TimeoutError(f"not within {timeout:g} s; released: ...{bytes(self.released[-300:])!r}")

    def _take(self, data: bytes) -> None:
        if self._holding:
            self._open += data
            self._held += len(data)
        else:
            self._let_out(data)

    def _let_out(self, data: bytes) -> None:
        self.released += data
        if self._sink:
            self._sink(data)
        self._changed.set()
        self._changed = trio.Event()
