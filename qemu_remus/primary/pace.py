"""A limit on how fast something is sent: a bucket of tokens, one for each byte.

It owns the arithmetic and the waiting.  What may not enter: what is sent, and what is limited (the epochs are not).
"""

from __future__ import annotations

import math
from typing import Final

import trio

BURST_SECONDS: Final = 0.25
"""How long somebody who was idle may make up for it: the bucket holds what is allowed in this time."""


class Pace:
    """So many bytes a second on average, over any time longer than ``BURST_SECONDS``.

    :param bytes_per_second: more than 0; None: no limit.
    """

    def __init__(self, bytes_per_second: float | None) -> None:
        if bytes_per_second is not None and not bytes_per_second > 0:
            raise ValueError(f"{bytes_per_second} bytes a second are no pace")
        self._rate = bytes_per_second
        self._due = float("-inf")

    async def spend(self, count: int) -> None:
        """Wait until ``count`` more bytes may go; always a checkpoint.

        More than the bucket holds may be spent at once, and is waited for. Several tasks get their turns in the order
        of their calls. Cancelled, nothing is spent.

        :param count: bytes, not negative.
        """
        due = self.take(count)
        if self._rate is None:
            await trio.lowlevel.checkpoint()
            return
        try:
            await trio.sleep_until(due)
        except trio.Cancelled:
            self._due -= count / self._rate
            raise

    def take(self, count: int) -> float:
        """Spend ``count`` bytes for good, and wait elsewhere, as often as may be.

        :return: when they may go, in trio's time; with no bytes, when all those before may.
        """
        if self._rate is None:
            return -math.inf
        # All that was allowed so far will be used up at this time.
        self._due = max(self._due, trio.current_time() - BURST_SECONDS) + count / self._rate
        return self._due
