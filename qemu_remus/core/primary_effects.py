"""What the primary has done: the effects of :mod:`qemu_remus.core.primary_machine`, for a shell to carry out.  Pure.

Effects marked *work* take long; at most one is under way, and its end is an event (``Captured``, ``WorkFailed``, ...).
The others are done at once, in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qemu_remus.core import messages as m
from qemu_remus.core.errors import QemuRemusError, RefusalCode
from qemu_remus.core.generation import Refusal
from qemu_remus.core.model import DiskName, EpochNumber, Generation
from qemu_remus.core.primary_model import (
    Handover,
    Opened,
    PrimaryState,
    Recording,
    Resize,
)
from qemu_remus.core.verification import Order, Piece


@dataclass(frozen=True, slots=True)
class Connect:
    """Reach the secondary and exchange hellos; its end is ``LinkUp``, or ``LinkRefused`` for each attempt that was.

    With a back-off that grows until an epoch is committed: a link can come up again and again and lead nowhere.
    Nothing of an earlier link may be reported once ``LinkUp`` was.
    """


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Say goodbye and close the link; it need not be reported as down."""

    code: RefusalCode
    text: str


@dataclass(frozen=True, slots=True)
class Send:
    """Hand a message to the link."""

    message: m.Message


@dataclass(frozen=True, slots=True)
class SaveState:
    """Make generation, committed checkpoint, handover and highest epoch durable, the last one :data:`EPOCHS_AHEAD` too
    high."""


@dataclass(frozen=True, slots=True)
class StartTracking:
    """Work: a new recording bitmap on every disk."""

    recording: Recording


@dataclass(frozen=True, slots=True)
class MergeBack:
    """Work: take what is left of a checkpoint out of the graph, then let one new recording bitmap take over the old
    ones, of which some may not exist on some disks.

    Its base is :func:`qemu_remus.core.primary_machine.base_of` what is found on the disks at that moment.

    :param complete: it has base "none" whatever is found: the full sync on this link is not committed yet.
    """

    old: tuple[Recording, ...]
    generation: Generation
    epoch: EpochNumber
    complete: bool = False


@dataclass(frozen=True, slots=True)
class CopyLive:
    """Work: read the live disks and send them.

    :param recording: forgets first what it holds of the time before, which the copy carries: all that it holds then is
        one epoch, which has to fit into the journal.
    :param fresh: for each disk: its target is empty, and zeroes need not be sent; else what is there is compared.
    :param start: where an interrupted copy goes on, in bytes over all disks in their order; ``recording`` holds what
        has changed since it began, and forgets nothing. None: a new copy.
    """

    recording: Recording
    fresh: tuple[bool, ...]
    start: int | None = None


@dataclass(frozen=True, slots=True)
class CopyAhead:
    """Work: begin a bitmap while the guest runs, then send what the one before it holds, as it is at this moment.

    :param finished: the one before it; None where there is none.
    :param following: the one to begin.
    :param compare: the disks, by their place, whose blocks are compared with the secondary's instead.
    :param grown: other disks, of which what is behind this byte is compared besides.
    """

    finished: Recording | None
    following: Recording
    compare: tuple[int, ...]
    grown: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Survey:
    """Work: resize what is to be resized, see which disks the VM has, and have the attachment follow.

    Bitmaps that can be trusted no more are removed: of a disk that became smaller, or is on another node.

    :param leave_out: disks that are not to be protected.
    """

    resizes: tuple[Resize, ...] = ()
    leave_out: frozenset[DiskName] = frozenset()


@dataclass(frozen=True, slots=True)
class ScheduleVerify:
    """Let ``VerifyDue`` happen as soon as the rate allows it; only the last one that was asked for happens.

    :param held: not before a while has passed in which a toolstack should have begun its checkpoint.
    """

    order: Order
    held: bool = False


@dataclass(frozen=True, slots=True)
class VerifySlice:
    """Work: look at a part of a disk, and at what ``recording`` holds of it after it was read.

    :param opened: what was sent of the present epoch before.
    :param repair: send what is wrong.
    """

    piece: Piece
    recording: Recording
    opened: Opened
    repair: bool = False


@dataclass(frozen=True, slots=True)
class InterruptSlice:
    """End the slice under way; its end is ``SliceVerified`` all the same.

    :param patient: it may take the short while that a slice usually takes.
    """

    patient: bool


@dataclass(frozen=True, slots=True)
class VerifyAnswered:
    """Answer a ``VerifyRequested`` or ``VerifyCancelled``.

    :param error: why it was refused; None: it is done.
    """

    number: int
    error: QemuRemusError | None = None


@dataclass(frozen=True, slots=True)
class Schedule:
    """Let ``CheckpointDue`` happen: at the next interval, or after a back-off that grows with the failures in a row."""

    failures: int = 0


@dataclass(frozen=True, slots=True)
class Capture:
    """Work: the paused part of a checkpoint.

    :param pause: pause the VM for it; else it must be paused already, and stays so.
    """

    finished: Recording
    following: Recording
    pause: bool = True


@dataclass(frozen=True, slots=True)
class Transfer:
    """Work: send the epoch's extents and take the filter out.

    :param opened: what was sent of it before.
    """

    finished: Recording
    opened: Opened = field(default_factory=Opened)


@dataclass(frozen=True, slots=True)
class RemoveBitmaps:
    """Work: their epoch is committed."""

    recordings: tuple[Recording, ...]


@dataclass(frozen=True, slots=True)
class Hold:
    """Work: pause the VM, and see that it is resumed should this controller end, or hang for so long.

    Where it fails the VM is as it was.

    :param seconds: that the pause may last.
    """

    seconds: float


@dataclass(frozen=True, slots=True)
class Stand:
    """Work: see that the VM is paused and has written nothing since the checkpoint; then nobody of ours resumes it.

    :param recording: the bitmap that has recorded since, which must be empty.
    """

    recording: Recording


@dataclass(frozen=True, slots=True)
class Resume:
    """Let the VM run that a ``Hold`` of this controller, or of an earlier one, has paused."""


@dataclass(frozen=True, slots=True)
class SwitchReply:
    """Answer a request for a switch-over.

    :param handover: what was done; None where it was not.
    :param complete: the secondary's disks are free for use; else it has decided, and has not come to the end.
    """

    request: int
    handover: Handover | None = None
    complete: bool = False
    error: QemuRemusError | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class CancelWork:
    """End the work under way; its end is ``WorkFailed`` (or its success, if that was quicker)."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The machine has ended.

    :param refusal: the two sides do not replicate.
    :param goodbye: the secondary refused.
    :param reason: why, where it is neither a refusal nor because somebody asked.
    :param doubt: the VM is paused, and nobody here knows whether the secondary has taken over.
    """

    refusal: Refusal | None = None
    goodbye: m.Goodbye | None = None
    reason: str = ""
    doubt: Handover | None = None


Effect = (
    Connect
    | Disconnect
    | Send
    | SaveState
    | StartTracking
    | MergeBack
    | CopyLive
    | CopyAhead
    | ScheduleVerify
    | VerifySlice
    | InterruptSlice
    | VerifyAnswered
    | Survey
    | Schedule
    | Capture
    | Transfer
    | RemoveBitmaps
    | Hold
    | Stand
    | Resume
    | SwitchReply
    | CancelWork
    | Stop
)

Step = tuple[PrimaryState, tuple[Effect, ...]]
