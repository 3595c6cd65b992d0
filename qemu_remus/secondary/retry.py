"""When a secondary whose storage has failed looks again whether it works.

Owns the back-off.  What may not enter: what is tried then (:mod:`qemu_remus.core.repair`'s).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from qemu_remus.core import secondary_machine as machine

RETRY_FIRST: Final = 1.0
RETRY_LIMIT: Final = 30.0
"""Seconds between attempts: doubled each time up to the limit."""


def backoff(failures: int) -> float:
    """Seconds to wait after so many attempts in a row that failed (1, 2, ...)."""
    return min(RETRY_LIMIT, RETRY_FIRST * 2.0 ** min(failures - 1, 16))


class RetryTimer:
    """One task, :meth:`run`, and one time at which it posts ``RetryDue``.

    :param post: gives the engine an event.
    """

    def __init__(self, post: Callable[[machine.Event], Awaitable[None]]) -> None:
        self._post = post
        self._changed = trio.Event()
        self._due = float("inf")

    def schedule(self, failures: int) -> None:
        """Let it happen after the back-off; what was scheduled before is forgotten. Never waits."""
        self._due = trio.current_time() + backoff(failures)
        self._changed.set()

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            with trio.move_on_at(self._due):
                await self._changed.wait()
                self._changed = trio.Event()
                continue
            self._due = float("inf")
            await self._post(machine.RetryDue())
