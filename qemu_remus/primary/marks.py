"""Where a full copy of the disks can go on after an interruption: now and then the secondary makes durable what it has.

Owns when that is asked for, and that one such question at most is unanswered.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from qemu_remus.core import messages as m

MARK_BYTES: Final = 256 << 20
MARK_SECONDS: Final = 10.0
"""A mark is due after so much, or so long: what lies behind it is read again."""


class Marks:
    """The marks of one copy.

    :param send: hands a message to the link, behind all that was handed to it before; raises LinkError.
    :param position: where the copy begins, in bytes over all disks.
    :param total: where it ends; there the machine asks.
    :ivar position: up to there everything was handed to the link, or is the same on the secondary.
    """

    def __init__(self, send: Callable[[m.Message], Awaitable[None]], position: int, total: int) -> None:
        self.position = position
        self._send = send
        self._total = total
        self._marked = position
        self._marked_at = trio.current_time()
        self._unanswered: int | None = None

    async def set_if_due(self) -> None:
        """Ask for a mark, if it is time for one and the last one is answered."""
        position, now = self.position, trio.current_time()
        if self._unanswered is not None or not self._marked < position < self._total:
            return
        if position - self._marked < MARK_BYTES and now - self._marked_at < MARK_SECONDS:
            return
        self._unanswered = self._marked = position
        self._marked_at = now
        await self._send(m.SyncFlush(position))

    def answered(self, token: int) -> None:
        """The secondary has said that it is there."""
        if token == self._unanswered:
            self._unanswered = None
