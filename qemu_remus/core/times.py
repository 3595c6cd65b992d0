"""Wall-clock times that explain to a person what a side holds; nothing is ever decided by them. Pure: no clock.

Seconds since 1970 in UTC, 0 where they are not known.
"""

from __future__ import annotations

from qemu_remus.core.frozen import replace
from qemu_remus.core.primary_model import PrimaryState
from qemu_remus.core.secondary_model import SecondaryState


def stamped_primary(before: PrimaryState, after: PrimaryState, now: int) -> PrimaryState:
    """The state with the time in it, where its history or its checkpoint has just become another one."""
    if after.generation != before.generation and after.begun == before.begun:
        after = replace(after, begun=now)
    if after.committed != before.committed and after.committed is not None:
        after = replace(after, decided=now)
    return after


def stamped_secondary(before: SecondaryState, after: SecondaryState, now: int) -> SecondaryState:
    """As :func:`stamped_primary`."""
    if after.generation != before.generation and after.begun == before.begun:
        after = replace(after, begun=now)
    if after.committed != before.committed and after.committed is not None and after.decided == before.decided:
        after = replace(after, decided=now)
    return after
