"""The extents of one epoch on their way to the link, and the account of them that its end has to give.

What may not enter: where the extents come from.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from qemu_remus.core import messages as m
from qemu_remus.core import primary_machine as machine
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.wire import digest_update


class OutgoingEpoch:
    """An epoch that is open.

    :param opened: what was sent of it before.
    :param send: hands a message to the link, with back-pressure. Cancelled or failed, it has not sent the message.
    """

    def __init__(
        self, number: EpochNumber, opened: machine.Opened, send: Callable[[m.Message], Awaitable[None]]
    ) -> None:
        self.opened = opened
        """What was sent of it so far."""
        self._number = number
        self._send = send

    async def send(self, extents: tuple[Extent, ...], data: bytes | bytearray) -> None:
        """Hand some of them over.

        :raise LinkError: when the link has ended.
        """
        message = m.EpochExtents(self._number, extents, memoryview(data))
        sent = self.opened
        opened = machine.Opened(
            sent.extents + len(extents), sent.payload + len(data), digest_update(sent.digest, message)
        )
        await self._send(message)
        self.opened = opened
