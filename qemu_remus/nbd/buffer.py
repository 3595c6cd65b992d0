"""The receive buffer of the NBD session: the kernel writes straight into it, the parser reads out of it by views.

Nothing of NBD is known here.
"""

from __future__ import annotations

from typing import Final

RECEIVE_BYTES: Final = 256 * 1024
"""Room offered to one receive call: large, since calls are what costs."""


class ReceiveBuffer:
    """Bytes received and not yet parsed.

    A view that :meth:`peek` or :meth:`take` gave is good until the next :meth:`writable`, no longer.
    """

    __slots__ = ("_end", "_memory", "_start", "_view")

    def __init__(self) -> None:
        self._memory = bytearray(2 * RECEIVE_BYTES)
        self._view = memoryview(self._memory)
        self._start = 0
        self._end = 0

    def __len__(self) -> int:
        return self._end - self._start

    def writable(self, wanted: int = 0) -> memoryview:
        """Room for the next receive call.

        :param wanted: bytes that the parser needs in one piece before it can go on; the buffer grows to hold them.
        """
        if self._start == self._end:
            self._start = self._end = 0
        room = max(RECEIVE_BYTES, wanted - len(self))
        if len(self._memory) - self._end < room:
            # Moving happens once per filled half at most, so feeding byte by byte stays linear.
            kept = bytes(self._view[self._start : self._end])
            if len(kept) + room > len(self._memory):
                self._memory = bytearray(len(kept) + 2 * room)
                self._view = memoryview(self._memory)
            self._view[: len(kept)] = kept
            self._start, self._end = 0, len(kept)
        return self._view[self._end : self._end + room]

    def written(self, count: int) -> None:
        """``count`` bytes of the last :meth:`writable` have been filled."""
        self._end += count

    def peek(self, count: int) -> memoryview:
        """The next ``count`` bytes, which must be there."""
        return self._view[self._start : self._start + count]

    def take(self, count: int) -> memoryview:
        """As :meth:`peek`; the bytes are done with."""
        start = self._start
        self._start += count
        return self._view[start : self._start]
