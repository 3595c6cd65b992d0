"""How long the primary waits for the secondary's answers, and as which error its machine's end comes out."""

from __future__ import annotations

from typing import Final

from qemu_remus.core import primary_machine as machine
from qemu_remus.core import switchover_machine as switchover
from qemu_remus.core.errors import PeerRefused, QemuError, QemuRemusError

ANSWER_TIMEOUT: Final = 30.0
"""Seconds that a secondary, although alive, may take to answer for an epoch."""

SYNC_ANSWER_TIMEOUT: Final = 900.0
"""The same for creating its images, for flushing a whole copy of the disks, and for taking over."""

_ASKED_OF_DISKS: Final = frozenset(
    {machine.Phase.SYNC_BEGIN, machine.Phase.SYNC_RESUME, machine.Phase.SYNC_FLUSH, machine.Phase.HANDOVER}
)


def patience(phase: machine.Phase) -> float:
    """Seconds that the secondary may take for what it owes us in a phase."""
    if phase in machine.ANSWERING:
        return ANSWER_TIMEOUT
    if phase in _ASKED_OF_DISKS:
        return SYNC_ANSWER_TIMEOUT
    return float("inf")


def why(effect: machine.Stop) -> QemuRemusError | None:
    """The error that ends the controller; None where somebody asked for its end, or it has handed the VM over."""
    if effect.doubt is not None:
        return switchover.in_doubt_error(effect.doubt)
    if effect.refusal is not None:
        return effect.refusal.error()
    if effect.goodbye is not None:
        return PeerRefused(f"the secondary refused: {effect.goodbye.text}", effect.goodbye.code)
    if effect.reason:
        return QemuError(
            effect.reason,
            safe="the VM goes on; its changes stay in the dirty bitmaps that are left in QEMU",
            hint="start the primary again: it takes them over and sends the difference",
        )
    return None
