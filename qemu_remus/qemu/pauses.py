"""A pause of the VM in which something is captured: what was seen before it, what became of it, whether it counts.

Pure data and judgements; :mod:`qemu_remus.qemu.capture` sends what belongs in there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from qemu_remus.core.errors import CheckpointVoid, EpochLost, QemuRemusError, QemuUnreachable
from qemu_remus.qemu.client import Done, Failed, InDoubt, Outcome
from qemu_remus.qemu.epoch import BitmapLook
from qemu_remus.qemu.events import QmpEvent

KEPT: Final = "the VM runs and its changes stay recorded"


@dataclass(slots=True)
class Pause:
    """What became of the part that had to find the VM paused.

    :param ours: we were to make it.
    :param inserted: indices of the disks for which a filter was sent.
    :param late: those of them that were clean just before the pause.
    :param dirty: in somebody else's pause, what each of them has changed.
    :param problem: the first thing that went wrong; the checkpoint cannot be used then.
    """

    ours: bool
    inserted: list[int]
    late: list[int] = field(default_factory=list)
    dirty: Mapping[int, BitmapLook] = field(default_factory=dict)
    seconds: float = 0.0
    problem: QemuRemusError | None = None


@dataclass(frozen=True, slots=True)
class NotSent:
    """The connection was gone before the command was sent."""

    error: QemuUnreachable


Result = Outcome | NotSent


@dataclass(frozen=True, slots=True)
class Look:
    """The VM just before the pause, or in somebody else's.

    :param window: not for a checkpoint: no bitmap ends, and the snapshot's node goes in with the filter.
    """

    status: str
    dirty: dict[int, BitmapLook]
    clean: list[int]
    order: int
    window: bool = False

    def stopped_by_us(self, stopped: Result, seen: Sequence[QmpEvent]) -> bool:
        """Whether our ``stop`` is what paused the VM.

        :param stopped: its outcome.
        :param seen: events since the look.
        """
        return isinstance(stopped, Done) and any(
            event.name == "STOP" and self.order < event.order < stopped.order for event in seen
        )


def done(outcome: Outcome) -> Done:
    """The reply; raises what a lone command would have raised."""
    if isinstance(outcome, Done):
        return outcome
    raise outcome.error


def value(outcome: Outcome) -> Any:
    """The reply's value."""
    return done(outcome).value


def first_problem(outcomes: Sequence[Result], seen: Iterable[QmpEvent], *, after: int) -> QemuRemusError | None:
    """The first thing that keeps a checkpoint from being one.

    :param after: order of the message that showed the VM paused.
    """
    last = after
    for outcome in outcomes:
        match outcome:
            case Done(order=order):
                last = max(last, order)
            case Failed(error=refused):
                problem = EpochLost(f"the checkpoint could not be captured: {refused.what}", safe=KEPT)
                problem.__cause__ = refused
                return problem
            case InDoubt(error=error) | NotSent(error=error):
                return error
    if any(event.name == "RESUME" and after < event.order < last for event in seen):
        return CheckpointVoid("somebody resumed the VM while the checkpoint was being captured", safe=KEPT)
    return None


def stopped_by_others() -> CheckpointVoid:
    """A pause that we wanted to make has been made by somebody else."""
    return CheckpointVoid("somebody else paused the VM at the same moment", safe="it was left paused, as they want it")
