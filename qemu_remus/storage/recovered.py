"""What a secondary's store holds when it has been opened, as its machine's state. Pure: no file is touched here."""

from __future__ import annotations

from dataclasses import replace

from qemu_remus.core.secondary_machine import Failover, Phase, SecondaryState
from qemu_remus.storage.recovery import Recovery
from qemu_remus.storage.superblock import Failover as StoredFailover
from qemu_remus.storage.superblock import Superblock


def recovered_state(state: SecondaryState, superblock: Superblock, recovery: Recovery | None) -> SecondaryState:
    """The state that the machine goes on from.

    :param recovery: what the journal holds; None where there is none, or it is not needed any more.
    """
    failover = superblock.failover
    sync = superblock.sync
    committed = recovery.committed if recovery is not None else superblock.committed
    return replace(
        state,
        phase=_phase(failover),
        generation=superblock.generation,
        history=tuple((past.generation, past.ended_at) for past in superblock.history if past.ended_at is not None),
        committed=committed,
        applied=superblock.applied,
        staged=recovery.in_doubt if recovery is not None else None,
        doubted=recovery.staged[:-1] if recovery is not None else (),
        highest=max(superblock.highest_epoch, recovery.highest_epoch if recovery is not None else 0),
        # A journal is as old as its generation, and so is the sync that its first commit completed.
        consistent=committed is not None,
        fresh=sync.fresh if sync is not None and committed is None else (),
        position=sync.flushed if sync is not None and committed is None else 0,
        failover=None if failover is None else Failover(failover.target, failover.new_generation, failover.finished),
        behind=True,
        begun=superblock.begun,
        decided=superblock.decided,
    )


def _phase(failover: StoredFailover | None) -> Phase:
    if failover is None:
        return Phase.LISTENING
    return Phase.FAILED_OVER if failover.finished else Phase.FAILING_OVER
