"""What can happen to the primary: the events of :mod:`qemu_remus.core.primary_machine`.  Pure."""

from __future__ import annotations

from dataclasses import dataclass

from qemu_remus.core import messages as m
from qemu_remus.core.model import Base, DiskSpec, EpochNumber, Generation
from qemu_remus.core.primary_model import (
    Found,
    Opened,
    Recording,
    Resize,
    ResizeDropped,
)
from qemu_remus.core.verification import Findings, Order


@dataclass(frozen=True, slots=True)
class Attached:
    """The VM's graph is ours to use.

    :param found: for each disk, the bitmaps of this pair that were found on its node.
    """

    found: tuple[tuple[Found, ...], ...]


@dataclass(frozen=True, slots=True)
class DisksChanged:
    """Somebody has seen that the VM's disks may be others than these: other ones, of other sizes, on other nodes."""


@dataclass(frozen=True, slots=True)
class QemuSilent:
    """QEMU does not answer, or does again.

    :param what: it has not answered in time, for a person; empty: it has answered since.
    """

    what: str


@dataclass(frozen=True, slots=True)
class Surveyed:
    """Work done: the attachment has the disks that the VM has now; each resize that was wanted is done or refused.

    :param changed: they are others than before, in number, order, size or node; else all is as it was.
    :param disks: all of them.
    :param found: as in :class:`Attached`.
    :param news: what is other than before, for a person.
    """

    changed: bool
    disks: tuple[DiskSpec, ...]
    found: tuple[tuple[Found, ...], ...]
    news: str = "the VM's disks have changed"


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Hellos were exchanged.

    :param generation: a new one, for the case that a full sync has to begin.
    :param dirty_bytes: of all disks, that the bitmaps hold at this moment.
    """

    ours: m.Hello
    theirs: m.Hello
    generation: Generation
    dirty_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LinkRefused:
    """The secondary said goodbye instead of hello."""

    goodbye: m.Goodbye


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The link is gone."""

    reason: str


@dataclass(frozen=True, slots=True)
class FromPeer:
    """The secondary said something."""

    message: m.Message


@dataclass(frozen=True, slots=True)
class TrackingStarted:
    """Work done: the bitmap records on every disk."""


@dataclass(frozen=True, slots=True)
class Merged:
    """Work done: one recording bitmap has taken over all others.

    :param into: that one.
    :param found: for each disk, the bitmaps of the pair that were there just before.
    """

    into: Recording
    found: tuple[tuple[Found, ...], ...]


@dataclass(frozen=True, slots=True)
class SyncCopied:
    """Work done: the live disks were read to their ends and everything was handed to the link."""


@dataclass(frozen=True, slots=True)
class CopiedAhead:
    """Work done: what changed during the outage was handed to the link."""

    opened: Opened


@dataclass(frozen=True, slots=True)
class VerifyRequested:
    """Somebody wants the copy verified; its end is ``VerifyAnswered``."""

    order: Order


@dataclass(frozen=True, slots=True)
class VerifyCancelled:
    """Somebody wants the verification ended; its end is ``VerifyAnswered``."""

    number: int


@dataclass(frozen=True, slots=True)
class VerifyDue:
    """It is time for the next slice of a verification."""


@dataclass(frozen=True, slots=True)
class MakeWay:
    """A toolstack wants a checkpoint: nothing may be in its way.

    :param patient: the VM still runs: what is under way may take its usual short while.  Else it stands still.
    """

    patient: bool


@dataclass(frozen=True, slots=True)
class SliceVerified:
    """Work done: a slice was looked at, or as much of it as there was time for.

    :param opened: the whole epoch's, with what was repaired.
    :param problem: why the verification cannot go on; empty where it can.
    """

    opened: Opened
    findings: Findings
    problem: str = ""


@dataclass(frozen=True, slots=True)
class CheckpointDue:
    """It is time for the next checkpoint.

    :param pause: the VM runs, and is to be paused for it; else somebody else has paused it.
    """

    pause: bool = True


@dataclass(frozen=True, slots=True)
class Captured:
    """Work done: the checkpoint is captured, the VM runs again.

    :param changed: there is something to transfer; else the epoch ends here.
    """

    changed: bool = True


@dataclass(frozen=True, slots=True)
class NotCaptured:
    """Work done: the VM was not as whoever asked for the checkpoint said; nothing was touched."""

    reason: str


@dataclass(frozen=True, slots=True)
class Transferred:
    """Work done: all extents were handed to the link, the filter is out.

    :param opened: the whole epoch's, with what was copied ahead.
    """

    opened: Opened


@dataclass(frozen=True, slots=True)
class CommitDue:
    """The toolstack has the memory of this checkpoint on the backup."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class AbortDue:
    """The toolstack drops this checkpoint."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class BitmapRemoved:
    """Work done: the committed epoch's bitmap is gone."""


@dataclass(frozen=True, slots=True)
class WorkFailed:
    """The work under way failed or was cancelled; nothing of ours is in the guest's way.

    :param fatal: the bitmaps are not known to be whole; only a restart, which looks again, can go on.
    :param by_link: it was the link that failed, and nothing else.
    :param changed: the VM's disks are not what they were, which may be why.
    """

    reason: str
    fatal: bool = False
    by_link: bool = False
    changed: bool = False


@dataclass(frozen=True, slots=True)
class SwitchRequested:
    """Somebody wants the VM to be handed over to the secondary.

    :param request: identifies the asker, for the answer.
    :param generation: a new one.
    :param seconds: that it may take until the secondary is told.
    :param epoch: of a toolstack: the committed checkpoint at which it has paused the VM; None: pause it, and take one.
    """

    request: int
    generation: Generation
    seconds: float
    epoch: Base = None


@dataclass(frozen=True, slots=True)
class SwitchTimeUp:
    """Whoever asked for a switch-over waits no longer."""

    request: int


@dataclass(frozen=True, slots=True)
class Held:
    """Work done: the VM is paused.

    :param ours: by us.
    """

    ours: bool


@dataclass(frozen=True, slots=True)
class Standing:
    """Work done: the VM stands still, has written nothing since the checkpoint, and nobody of ours resumes it."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Somebody asked the controller to stop: finish what is under way."""


@dataclass(frozen=True, slots=True)
class StopDeadline:
    """What was under way took too long: cancel it."""


Event = (
    Attached
    | DisksChanged
    | QemuSilent
    | Resize
    | ResizeDropped
    | Surveyed
    | LinkUp
    | LinkRefused
    | LinkDown
    | FromPeer
    | TrackingStarted
    | Merged
    | SyncCopied
    | CopiedAhead
    | VerifyRequested
    | VerifyCancelled
    | VerifyDue
    | MakeWay
    | SliceVerified
    | CheckpointDue
    | Captured
    | NotCaptured
    | Transferred
    | CommitDue
    | AbortDue
    | BitmapRemoved
    | WorkFailed
    | SwitchRequested
    | SwitchTimeUp
    | Held
    | Standing
    | StopRequested
    | StopDeadline
)
