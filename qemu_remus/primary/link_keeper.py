"""The primary's link: reach the secondary, exchange hellos, pass on what it says, and start again when asked to.

It owns back-off and the counters over all links of this run.  What a hello or a goodbye means is the machine's.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from qemu_remus.core import messages as m
from qemu_remus.core.errors import LinkError, LinkLost, PeerSilent, QemuRemusError
from qemu_remus.core.model import Connection, Role
from qemu_remus.core.settings import Address
from qemu_remus.link import Link, connect, open_link

CONNECT_TIMEOUT: Final = 10.0
"""Seconds for one attempt to reach the secondary; the same again for its hello."""

BACKOFF_FIRST: Final = 0.5
BACKOFF_LIMIT: Final = 10.0
"""Seconds between attempts: doubled each time up to the limit, with jitter."""

GOODBYE_TIMEOUT: Final = 2.0
"""Seconds for the last message of a link that we close."""

_log = structlog.get_logger("link")


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row (1, 2, ...), spread so that many waiters do not come at once."""
    longest = min(BACKOFF_LIMIT, BACKOFF_FIRST * 2.0 ** min(failures - 1, 16))
    return longest * random.uniform(0.5, 1.0)


class LinkKeeper:
    """One link at a time.

    :param on_hello: both hellos, once they were exchanged.
    :param on_message: everything later, heartbeats left out.
    :param on_refusal: a goodbye, or an error that will not pass by itself, in place of a hello.
    :param on_down: the link that had been announced with ``on_hello`` has ended, with the reason.
    """

    def __init__(
        self,
        peer: Address,
        heartbeat_timeout: float,
        *,
        make_hello: Callable[[], Awaitable[m.Hello]],
        heartbeat: Callable[[], m.Heartbeat],
        on_hello: Callable[[m.Hello, m.Hello], Awaitable[None]],
        on_message: Callable[[m.Message], Awaitable[None]],
        on_refusal: Callable[[m.Goodbye | QemuRemusError], Awaitable[None]],
        on_down: Callable[[str], Awaitable[None]],
    ) -> None:
        self.connection = Connection.STANDALONE
        self.peer_numbers = m.Heartbeat()
        self._peer = peer
        self._timeout = heartbeat_timeout
        self._make_hello = make_hello
        self._heartbeat = heartbeat
        self._on_hello = on_hello
        self._on_message = on_message
        self._on_refusal = on_refusal
        self._on_down = on_down
        self._link: Link | None = None
        self._scope = trio.CancelScope()
        self._closing = ""
        self._failures = 0
        self._earlier = (0, 0)
        self._one_at_a_time = trio.Lock()

    @property
    def bytes_sent(self) -> int:
        """Over all links of this run."""
        return self._earlier[0] + (self._link.bytes_sent if self._link else 0)

    @property
    def bytes_received(self) -> int:
        """Over all links of this run."""
        return self._earlier[1] + (self._link.bytes_received if self._link else 0)

    def settled(self) -> None:
        """The link has proved its worth: the next loss is retried at once."""
        self._failures = 0

    async def keep(self) -> None:
        """Connect, however often it takes; return when the link that came of it has ended."""
        # The end of an earlier link must be told before anything of the next one is.
        async with self._one_at_a_time:
            await self._on_down(await self._until_one_ends())

    async def _until_one_ends(self) -> str:
        while True:
            if self._failures:
                await trio.sleep(backoff(self._failures))
            self._failures += 1
            self.connection = Connection.CONNECTING
            self._scope = trio.CancelScope()
            self._closing = ""
            announced, reason = await self._one_link()
            self.connection = Connection.STANDALONE
            if announced:
                return reason
            _log.warning("no link to the secondary", peer=str(self._peer), reason=reason, attempt=self._failures)

    async def _one_link(self) -> tuple[bool, str]:
        """One attempt. Return whether it was announced with ``on_hello``, and how it ended."""
        announced = False
        reason = "the secondary closed the link"
        try:
            with self._scope:
                stream = await connect(self._peer.host, self._peer.port, timeout=CONNECT_TIMEOUT)
                self.connection = Connection.HANDSHAKE
                async with open_link(
                    stream, Role.PRIMARY, heartbeat_timeout=self._timeout, heartbeat_source=self._heartbeat
                ) as link:
                    ours = await self._make_hello()
                    await link.send(ours)
                    theirs = await self._first_message(link)
                    if not isinstance(theirs, m.Hello):
                        if isinstance(theirs, m.Goodbye):
                            await self._on_refusal(theirs)
                            reason = theirs.text
                        return False, reason
                    self._link = link
                    self.connection = Connection.CONNECTED
                    announced = True
                    await self._on_hello(ours, theirs)
                    await self._listen(link)
        except LinkError as error:
            reason = str(error)
            if not announced and not error.transient:
                await self._on_refusal(error)
        finally:
            if self._link is not None:
                sent, received = self._earlier
                self._earlier = (sent + self._link.bytes_sent, received + self._link.bytes_received)
                self._link = None
        return announced, self._closing or reason

    async def _first_message(self, link: Link) -> m.Message | None:
        with trio.move_on_after(CONNECT_TIMEOUT):
            return await link.receive()
        raise PeerSilent(
            f"{self._peer} took the connection and said nothing for {CONNECT_TIMEOUT:g} seconds",
            safe="nothing was changed",
            hint="is that a qemu-remus secondary, and does it run?",
        )

    async def _listen(self, link: Link) -> None:
        async for message in link:
            if isinstance(message, m.Heartbeat):
                self.peer_numbers = message
            else:
                await self._on_message(message)

    async def send(self, message: m.Message) -> None:
        """Hand a message to the link; waits for room.

        :raise LinkError: when there is no link, or it ended.
        """
        if self._link is None:
            raise LinkLost("there is no link to the secondary")
        await self._link.send(message)

    async def close(self, goodbye: m.Goodbye) -> None:
        """End the link, or the attempt, with a last message if it can be had."""
        link = self._link
        self._closing = self._closing or goodbye.text
        if link is not None:
            with trio.move_on_after(GOODBYE_TIMEOUT), contextlib.suppress(LinkError):
                await link.send(goodbye)
                await link.flush()
        self._scope.cancel()
