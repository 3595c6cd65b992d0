"""The last checkpoint of a VM whose guest has powered off: asked for, and waited for, but not for ever.

QEMU is held meanwhile (:mod:`qemu_remus.qemu.shutdown`).  What may not enter: how a checkpoint is taken and committed,
which is the machine's business, as ever.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from qemu_remus.core import primary_machine as machine
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.primary_machine import Phase, PrimaryState

COMMIT_LIMIT: Final = 30.0
"""Seconds that the end of QEMU may be held off."""

LINK_LIMIT: Final = 5.0
"""Seconds of them without a link to the secondary."""

_NOT_BEGUN: Final = frozenset({Phase.STARTING, Phase.ADOPTING})
"""A controller that was started only now."""

_LOOK: Final = 0.02
"""Seconds between two looks at the machine."""


async def last_checkpoint(
    look: Callable[[], PrimaryState], post: Callable[[machine.Event], Awaitable[object]]
) -> EpochNumber | None:
    """Have a checkpoint taken of a VM that has ended, and wait until it is committed.

    :param look: the machine's state at this moment.
    :param post: gives the machine an event.
    :return: the checkpoint; None where there is none within the limits, or none to build on.
    """
    least: EpochNumber | None = None
    linked_at = trio.current_time()
    with trio.move_on_after(COMMIT_LIMIT):
        while (state := look()).phase is not Phase.STOPPED:
            committed = state.committed
            if committed is None and state.linked:
                break
            if least is None and state.recording is not None and state.phase not in _NOT_BEGUN:
                # One that is being captured now may be from before the last write; the one after it is not.
                least = state.recording.epoch
            if committed is not None and least is not None and committed >= least:
                return committed
            now = trio.current_time()
            linked_at = now if state.linked else linked_at
            if now - linked_at > LINK_LIMIT:
                break
            if state.phase is Phase.IDLE:
                await post(machine.CheckpointDue())
            await trio.sleep(_LOOK)
    return None
