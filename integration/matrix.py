"""The kill matrix: at which points of one checkpoint who is killed. The table alone; what is done is in its test.

A point is before or after one step of the reference toolstack, or before or after one message of the replication link
is passed on. ``make check-all`` tries every cell, ``make check`` a few at random: those of :data:`SEED`.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from integration import frames
from integration.toolstack import protector
from integration.toolstack.protector import MOMENTS, Step

#: Environment variable that sets :data:`SEED`, to repeat a choice.
SEED_VARIABLE: Final = "QEMU_REMUS_MATRIX_SEED"
SEED: Final = int(os.environ.get(SEED_VARIABLE) or random.SystemRandom().randrange(1_000_000))

#: Cells of a random choice.
CHOSEN: Final = 5

#: What is said about every epoch, in this order.
MESSAGES: Final = ("EpochBegin", "EpochExtents", "EpochEnd", "EpochStaged", "CommitEpoch", "Committed")


class Victim(StrEnum):
    """Who is killed, by SIGKILL."""

    PRIMARY = "primary"
    """The primary's host: QEMU and the primary's controller; the toolstack is never heard of again."""
    BOTH = "both"
    """Both hosts at once; the secondary's controller and the backup of the memory are started again, then failover."""
    CONTROLLER = "controller"
    """The primary's controller alone; the VM runs on. It is started again, checkpoints go on, and then the primary's
    host dies."""
    SECONDARY = "secondary"
    """The secondary's controller. It is started again, checkpoints go on, and then the primary's host dies: soon
    afterwards, or at the first point of another kind, which is in the talk about what had become of the epoch."""


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a checkpoint: of its steps, or of its messages."""

    step: protector.Moment | None = None
    message: str = ""
    moment: frames.Moment = frames.Moment.BEFORE

    def __str__(self) -> str:
        text = str(self.step) if self.step else f"{self.moment} {self.message}"
        return text.replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Cell:
    """Who is killed where.

    :param then: of a secondary: where the primary's host dies after its return; None: two checkpoints later.
    :param unharmed: checkpoints committed before that.
    :param told: the secondary is told, too, of every memory that is complete, and so may commit of its own accord.
    """

    victim: Victim
    point: Point
    then: Point | None = None
    unharmed: int = 3
    told: bool = False

    def __str__(self) -> str:
        kind = ("" if self.unharmed else "-first") + ("-told" if self.told else "")
        return f"{self.victim}{kind}-{self.point}" + (f"-then-{self.then}" if self.then else "")


_AT_STEPS: Final = tuple(Point(step) for step in MOMENTS)
#: The primary's host alone has anything to do with the steps before these.
_AT_STEPS_OF_BOTH: Final = tuple(
    point for point in _AT_STEPS if point.step and point.step.step not in (Step.PREPARE, Step.STOP, Step.RESUME)
)
_AT_MESSAGES: Final = tuple(Point(None, message, moment) for message in MESSAGES for moment in frames.Moment)
#: Where the two sides may think differently of the epoch: it never became whole on the secondary, is staged there and
#: the primary does not know it, its commit is lost, or the answer to that.
_IN_DOUBT: Final = tuple(Point(None, message) for message in ("EpochEnd", "EpochStaged", "CommitEpoch", "Committed"))
_AFTER_RETURN: Final = tuple(
    Point(None, message, moment) for message in ("Hello", *MESSAGES) for moment in frames.Moment
)

#: Of the very first checkpoint, without which there is nothing to fail over to.
_AT_FIRST: Final = tuple(
    Point(protector.Moment(step, after=after)) for step in (Step.COMPLETE, Step.COMMIT) for after in (False, True)
)
_WHEN_TOLD: Final = (
    *(Point(protector.Moment(step, after=after)) for step in (Step.COMPLETE, Step.COMMIT) for after in (False, True)),
    *(Point(None, message, moment) for message in ("CommitEpoch", "Committed") for moment in frames.Moment),
)

CELLS: Final = (
    *(Cell(Victim.PRIMARY, point) for point in (*_AT_STEPS, *_AT_MESSAGES)),
    *(Cell(Victim.BOTH, point) for point in (*_AT_STEPS_OF_BOTH, *_AT_MESSAGES)),
    *(Cell(victim, point, unharmed=0) for victim in (Victim.PRIMARY, Victim.BOTH) for point in _AT_FIRST),
    *(Cell(victim, point, told=True) for victim in (Victim.PRIMARY, Victim.BOTH) for point in _WHEN_TOLD),
    *(Cell(Victim.CONTROLLER, point) for point in (*_AT_STEPS, *_AT_MESSAGES)),
    *(Cell(Victim.SECONDARY, point) for point in _AT_MESSAGES),
    *(Cell(Victim.SECONDARY, point, told=True) for point in _WHEN_TOLD if point.message),
    *(Cell(Victim.SECONDARY, point, then) for point in _IN_DOUBT for then in _AFTER_RETURN),
)


def choice(seed: int) -> tuple[Cell, ...]:
    """A few cells at random, one at least of each victim."""
    chance = random.Random(seed)
    chosen = [chance.choice([cell for cell in CELLS if cell.victim is victim]) for victim in Victim]
    others = [cell for cell in CELLS if cell not in chosen]
    return (*chosen, *chance.sample(others, CHOSEN - len(chosen)))
