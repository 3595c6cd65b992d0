"""The turns that the secondary takes, whatever event brought it there.  Pure.

The half of :mod:`qemu_remus.core.secondary_machine` behind its events.
"""

from __future__ import annotations

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_questions as ask
from qemu_remus.core.comparison import all_differ, count_blocks
from qemu_remus.core.errors import (
    RefusalCode,
)
from qemu_remus.core.frozen import replace
from qemu_remus.core.model import DiskSpec, EpochNumber
from qemu_remus.core.secondary_model import (
    CloseLink,
    DropUnfinished,
    Effect,
    Phase,
    SecondaryState,
    Send,
    Step,
)


def with_doubts(state: SecondaryState, epochs: tuple[EpochNumber, ...]) -> SecondaryState:
    """These epochs, oldest first, are staged and not decided."""
    tables = tuple(table for table in state.tables if table[0] in epochs)
    return replace(state, staged=epochs[-1] if epochs else None, doubted=epochs[:-1], tables=tables)


def disks_of(state: SecondaryState, epoch: EpochNumber) -> tuple[DiskSpec, ...]:
    """The VM's disks at the checkpoint of an epoch that is here and not committed yet."""
    if state.receiving is not None and state.receiving[0] == epoch and state.arriving:
        return tuple(DiskSpec(disk.name, disk.size) for disk in state.arriving)
    return dict(state.tables).get(epoch, state.disks)


def settle(state: SecondaryState) -> SecondaryState:
    """Nothing is being received any more."""
    return replace(state, phase=ask.between_epochs(state), receiving=None)


def drop_link(state: SecondaryState, reason: str) -> Step:
    """The link is gone: an epoch without an end is forgotten, a staged one is kept."""
    effects = (DropUnfinished(),) if state.receiving is not None else ()
    state = replace(
        state, link=None, primary=None, receiving=None, flushed=False, may_sync=False, behind=True, reason=reason
    )
    if state.failover is None:
        state = replace(state, phase=Phase.LISTENING)
    return state, effects


def hang_up(state: SecondaryState, code: RefusalCode, text: str) -> Step:
    """End the link, with this as the last word."""
    link = state.link
    assert link is not None
    state, effects = drop_link(state, text)
    return state, (*effects, CloseLink(link, code, text))


def reply(state: SecondaryState, message: m.Message) -> tuple[Effect, ...]:
    """Say it to the primary, if it is there."""
    return () if state.link is None else (Send(state.link, message),)


def cannot_tell(state: SecondaryState, asked: m.CompareBlocks) -> tuple[Effect, ...]:
    """Answer a comparison with "all differs", which is never wrong."""
    return reply(state, m.BlocksDiffer(asked.disk, asked.offset, all_differ(count_blocks(asked.digests))))
