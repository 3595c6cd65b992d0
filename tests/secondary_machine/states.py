"""States of the secondary's machine that tests begin with, and what it hears and says there.

Each test begins with a state built by :func:`at`, gives it events, and looks at the effects and at what matters of the
state.  How the two machines get on with each other is ``tests/simulation``'s.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

from qemu_remus.core import messages as m
from qemu_remus.core import secondary_machine as machine
from qemu_remus.core.errors import QemuRemusError, RefusalCode
from qemu_remus.core.model import DiskName, DiskSpec, DiskState, EpochNumber, Generation, InstanceId, PairName, Role
from qemu_remus.core.secondary_machine import Phase, SecondaryState, step

ONE = Generation(UUID(int=1))
TWO = Generation(UUID(int=2))
PRIMARY = InstanceId(UUID(int=9))
LINK = 5
DISKS = (DiskSpec(DiskName("system"), 1 << 20), DiskSpec(DiskName("data"), 1 << 20))


def number(epoch: int) -> EpochNumber:
    return EpochNumber(epoch)


def at(phase: Phase, **fields: Any) -> SecondaryState:
    """A secondary that holds checkpoint 7; its primary is connected, an epoch that comes is 8."""
    linked = phase not in {Phase.LISTENING, Phase.FAILING_OVER, Phase.FAILED_OVER}
    state = SecondaryState(
        PairName("pair"),
        InstanceId(UUID(int=8)),
        DISKS,
        phase=phase,
        generation=ONE,
        committed=number(7),
        applied=number(7),
        staged=number(8) if phase is Phase.STAGED else None,
        highest=7,
        consistent=True,
        link=LINK if linked else None,
        primary=(PRIMARY, 3) if linked else None,
        receiving=(number(8), number(7)) if phase is Phase.EPOCH else None,
    )
    if phase is Phase.SYNC:
        state = replace(state, committed=None, applied=None, consistent=False)
    return replace(state, **fields)


def greeting(**fields: Any) -> m.Hello:
    """The hello of a primary that can send the difference to checkpoint 7."""
    hello = m.Hello(
        pair=PairName("pair"),
        role=Role.PRIMARY,
        instance=PRIMARY,
        session=4,
        generation=ONE,
        disks=tuple(replace(disk, base=number(7)) for disk in DISKS),
        committed=number(7),
        staged=None,
        highest_epoch=8,
        disk_state=DiskState.UP_TO_DATE,
    )
    return replace(hello, **fields)


def said(state: SecondaryState, message: m.Message, link: int = LINK) -> machine.Step:
    return step(state, machine.FromPeer(link, message))


def reply(message: m.Message) -> machine.Send:
    return machine.Send(LINK, message)


def hung_up(effects: tuple[machine.Effect, ...], code: RefusalCode) -> bool:
    return any(isinstance(effect, machine.CloseLink) and effect.code is code for effect in effects)


END = m.EpochEnd(number(8), 1, 512, 99, commit=False)
END_COMMIT = replace(END, commit=True)


def ask(
    *checkpoints: int, last_committed: bool = False, force: bool = False, request: int = 1
) -> machine.FailoverRequested:
    return machine.FailoverRequested(request, tuple(map(number, checkpoints)), last_committed, force, TWO)


def refusal(state: SecondaryState, event: machine.FailoverRequested) -> QemuRemusError:
    after, effects = step(state, event)
    assert after == state
    (answer,) = effects
    assert isinstance(answer, machine.Answer)
    assert answer.error is not None
    return answer.error
