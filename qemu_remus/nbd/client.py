"""The trio shell of the NBD session: one connection, its deadlines, its end.

Owns the socket and the clock, nothing of the protocol. One task at a time uses a client; several clients connected to
one export are how more is read at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trio

from qemu_remus.core.errors import NbdConnectionLost
from qemu_remus.nbd.negotiation import ExportInfo
from qemu_remus.nbd.protocol import Event, NbdSession, Negotiated, RequestError, StatusReply

DEFAULT_TIMEOUT: Final = 30.0
"""Seconds to wait for the connection, and for each next byte of what the server owes."""

GOODBYE_TIMEOUT: Final = 1.0
"""Seconds to wait, at most, for the server to close its side after we said that we are going."""


class NbdClient:
    """A connection to one export; made by :func:`open_nbd`, ended by :func:`close_all`.

    Make requests on :attr:`session`, then :meth:`exchange` until they are answered.
    """

    def __init__(self, sock: trio.socket.SocketType, session: NbdSession, path: str, timeout: float) -> None:
        self.session = session
        self._socket = sock
        self._path = path
        self._timeout = timeout

    @property
    def info(self) -> ExportInfo:
        """The export's size, block sizes and contexts."""
        return self.session.info

    async def exchange(self) -> list[Event]:
        """Send what is to be sent, wait until something comes, and return what was completed by it, possibly nothing.

        The data of read replies are good until the next call.

        :raise NbdConnectionLost: when the connection ended, or nothing came within the timeout.
        :raise NbdProtocolError: when the server broke the protocol.
        """
        session = self.session
        try:
            with trio.fail_after(self._timeout):
                await self._flush()
                count = await self._socket.recv_into(session.receive_buffer())
        except trio.TooSlowError:
            raise NbdConnectionLost(f"the NBD server at {self._path} was silent for {self._timeout:g} s") from None
        except OSError as error:
            raise NbdConnectionLost(f"the connection to the NBD server at {self._path} broke: {error}") from error
        if count == 0:
            raise NbdConnectionLost(f"the NBD server at {self._path} closed the connection")
        session.received(count)
        events: list[Event] = []
        while (event := session.next_event()) is not None:
            events.append(event)
        return events

    async def status(self, offset: int, length: int, *, extents: int) -> StatusReply | RequestError:
        """One block status and its answer; parameters as in :meth:`NbdSession.block_status`.

        Only when nothing else is unanswered.

        :raise NbdConnectionLost: as for :meth:`exchange`.
        :raise NbdProtocolError: as for :meth:`exchange`.
        """
        self.session.block_status(offset, length, extents=extents)
        while True:
            for event in await self.exchange():
                if isinstance(event, StatusReply | RequestError):
                    return event

    async def _flush(self) -> None:
        # Requests are tiny and the server is never stuck on us, so this waits for a server that hangs only.
        view = memoryview(self.session.data_to_send())
        while view:
            view = view[await self._socket.send(view) :]

    async def _negotiate(self) -> None:
        while True:
            for event in await self.exchange():
                if isinstance(event, Negotiated):
                    return

    async def _leave(self) -> None:
        """Say that we are going and wait until the server has closed its side; never raises."""
        try:
            self.session.disconnect()
            await self._flush()
            while await self._socket.recv_into(self.session.receive_buffer()):
                pass  # what it still owed us
        except OSError:
            pass

    def _close(self) -> None:
        self._socket.close()


async def open_nbd(
    path: str | Path, export: str, contexts: Sequence[str] = (), *, timeout: float = DEFAULT_TIMEOUT
) -> NbdClient:
    """Connect to an export on a Unix socket.

    :param contexts: metadata contexts that must be there.
    :param timeout: seconds, for connecting with the whole handshake, and later for each wait.
    :raise NbdConnectionLost: when nobody listens there, or the handshake took too long.
    :raise NbdProtocolError: when that is no NBD server, or it lacks the export, a context or a feature that we need.
    """
    sock = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    client = NbdClient(sock, NbdSession(export, contexts), str(path), timeout)
    try:
        with trio.fail_after(timeout):
            await sock.connect(str(path))
            await client._negotiate()
    except BaseException as error:
        sock.close()
        if isinstance(error, trio.TooSlowError):
            raise NbdConnectionLost(f"the NBD server at {path} did not finish its handshake in {timeout:g} s") from None
        if isinstance(error, OSError):
            raise NbdConnectionLost(
                f"no connection to the NBD server at {path}: {error}",
                hint="see that QEMU runs and exports the disk there",
            ) from error
        raise
    return client


async def close_all(clients: Sequence[NbdClient]) -> None:
    """End connections politely: QEMU has let go of each export when this returns, if it can within
    ``GOODBYE_TIMEOUT``, so that the export can be taken out at once. Shielded; never raises.
    """
    with trio.CancelScope(deadline=trio.current_time() + GOODBYE_TIMEOUT, shield=True):
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(client._leave)
    for client in clients:
        client._close()
