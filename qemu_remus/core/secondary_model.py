"""What the secondary's machine knows, is told, and asks for: its states, its events and its effects, as plain data.

What may not enter: decisions, which are :mod:`qemu_remus.core.secondary_machine`'s.

Effects are carried out one after the other, in order; one that can fail or has a result (marked *answers*) ends with an
event, which is handled before anything else is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from qemu_remus.core import messages as m
from qemu_remus.core.errors import QemuRemusError, RefusalCode
from qemu_remus.core.model import Base, DiskName, DiskSpec, EpochNumber, Generation, InstanceId, PairName


class Phase(Enum):
    """Where the secondary stands."""

    LISTENING = auto()  # no primary is connected
    IDLE = auto()  # a primary is connected
    SYNC = auto()  # a full sync writes into the images
    EPOCH = auto()  # an epoch's extents are coming
    STAGED = auto()  # an epoch is staged and not committed
    FAILING_OVER = auto()  # decided, durably; not finished
    FAILED_OVER = auto()  # the disks are plain images and released


@dataclass(frozen=True, slots=True)
class Failover:
    """A failover that was decided.

    :param target: the checkpoint that the disks are brought to.
    :param generation: the history that begins there.
    """

    target: EpochNumber
    generation: Generation
    done: bool = False


@dataclass(frozen=True)  # no slots: see core.frozen
class SecondaryState:
    """All that the secondary knows.

    :param disks: the VM's at the committed checkpoint; without a checkpoint, those of the full sync, or those that have
        a place here, of size 0.
    :param places: all disks that have a place here.
    :param takes_any: any other gets one when it comes.
    :param tables: the disks of each epoch that is staged.
    :param arriving: the disks of the connected primary, in its order.
    :param link: identity of the connection that it listens to; None without one.
    :param primary: instance and session of that connection's primary.
    :param history: generations that have ended, each with the checkpoint at which it did.
    :param highest: the highest epoch number seen in this generation.
    :param staged: the newest epoch that is staged and not committed.
    :param doubted: older ones, oldest first: links were lost before anybody said what becomes of them.
    :param memory: the newest checkpoint whose memory is complete here, as the toolstack says: it is committed as soon
        as it is staged.
    :param receiving: the epoch whose extents are coming, with its base.
    :param may_sync: the handshake of this link asks for a full sync.
    :param undo: what held before a full sync that is being prepared.
    :param fresh: of the full sync that is not complete: what each target was; empty where there is none.
    :param position: up to where it is flushed; see :class:`qemu_remus.core.messages.SyncFlush`.
    :param flushed: the full sync on this link is flushed: an epoch with base "none" may follow.
    :param handing: the primary of this link has asked for the failover, and is told when it is done.
    :param unsaved: the failover is decided here, and nobody knows whether a restart would know of it.
    :param comparing: the question whose blocks are being compared.
    :param committing: the ``MemoryReceived`` whose commit is under way.
    :param askers: failover requests that are to be answered when it is done.
    :param poisoned: a write of the store's own failed: it has to be opened again, which shows what it holds, before
        anything else is done with it.
    :param repairs: attempts in a row to have it, or the images, work again that came to nothing.
    :param menders: requests that are to be answered when the present attempt has ended.
    :param asked: a failover that waits for the store to be opened again, before its checkpoint is chosen.
    :param behind: the primary is known, or must be assumed, to have later checkpoints.
    :param begun: when this generation began, as in :class:`qemu_remus.core.messages.Hello`, set by the shell.
    :param decided: when the committed checkpoint was.
    :param reason: why the disks are not up to date; empty while they are.
    """

    pair: PairName
    instance: InstanceId
    disks: tuple[DiskSpec, ...]
    phase: Phase = Phase.LISTENING
    generation: Generation | None = None
    history: tuple[tuple[Generation, EpochNumber], ...] = ()
    committed: Base = None
    applied: Base = None
    staged: Base = None
    doubted: tuple[EpochNumber, ...] = ()
    highest: int = 0
    consistent: bool = False
    failed: bool = False
    link: int | None = None
    primary: tuple[InstanceId, int] | None = None
    memory: Base = None
    receiving: tuple[EpochNumber, Base] | None = None
    fresh: tuple[bool, ...] = ()
    position: int = 0
    flushed: bool = False
    may_sync: bool = False
    undo: SecondaryState | None = None
    failover: Failover | None = None
    handing: bool = False
    unsaved: bool = False
    comparing: m.CompareBlocks | None = None
    committing: int | None = None
    askers: tuple[int, ...] = ()
    poisoned: bool = False
    repairs: int = 0
    menders: tuple[int, ...] = ()
    asked: FailoverRequested | None = None
    behind: bool = False
    begun: int = 0
    decided: int = 0
    reason: str = "no primary has connected yet"
    places: tuple[DiskName, ...] = ()
    takes_any: bool = False
    tables: tuple[tuple[EpochNumber, tuple[DiskSpec, ...]], ...] = ()
    arriving: tuple[DiskSpec, ...] = ()


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HelloReceived:
    """A connection's first message."""

    link: int
    hello: m.Hello


@dataclass(frozen=True, slots=True)
class FromPeer:
    """A later message of a connection."""

    link: int
    message: m.Message


@dataclass(frozen=True, slots=True)
class LinkDown:
    """A connection is gone."""

    link: int
    reason: str


@dataclass(frozen=True, slots=True)
class TargetsReady:
    """``PrepareTargets`` is done: the store says "inconsistent", durably, and the targets can be written."""

    fresh: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class TargetsReopened:
    """``ReopenTargets`` is done."""


@dataclass(frozen=True, slots=True)
class ImagesFlushed:
    """``FlushImages`` is done."""

    position: int


@dataclass(frozen=True, slots=True)
class Staged:
    """``StageEpoch`` is done: the epoch is durable in the journal."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class CommitDone:
    """The decision that the epoch counts is durable."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class Compared:
    """``CompareBlocks`` is done.

    :param differing: the bitmap of the blocks that are not known to be the same.
    """

    differing: bytes


@dataclass(frozen=True, slots=True)
class AbortDone:
    """The epoch is dropped, durably."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class StoreFailed:
    """An effect failed; the rest of its step is skipped.

    :param lasting: the store must not be trusted before it was reopened, which shows whether the effect happened. If
        not lasting, nothing of it happened.
    """

    code: RefusalCode
    text: str
    lasting: bool


@dataclass(frozen=True, slots=True)
class Applied:
    """In the background: the images hold this checkpoint, flushed."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class ApplyFailed:
    """In the background: an image cannot be written. The journal keeps everything."""

    text: str


@dataclass(frozen=True, slots=True)
class FailoverRequested:
    """The toolstack or the operator wants the disks.

    :param request: identifies the asker, for the answer.
    :param checkpoints: the memory checkpoints that can be restored, newest first; empty: the last committed one.
    :param last_committed: without numbers: take it although an epoch is in doubt.
    :param force: although the primary's link is alive.
    :param generation: a new one.
    """

    request: int
    checkpoints: tuple[EpochNumber, ...]
    last_committed: bool
    force: bool
    generation: Generation


@dataclass(frozen=True, slots=True)
class MemoryReceived:
    """The toolstack here has the whole memory of a checkpoint.

    :param request: identifies the asker, for the answer.
    """

    request: int
    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class RetryDue:
    """It is time to see whether what has failed works again.

    :param request: identifies who asks for it, for the answer; None: the back-off has passed.
    """

    request: int | None = None


@dataclass(frozen=True, slots=True)
class Reopened:
    """``ReopenStore`` is done.

    :param found: what the store holds, as a restart would have found it.
    """

    found: SecondaryState


@dataclass(frozen=True, slots=True)
class FailoverSaved:
    """``SaveFailover`` is done: from here on, every commit is refused, also after a crash."""


@dataclass(frozen=True, slots=True)
class Released:
    """``FinishFailover`` is done."""


Event = (
    HelloReceived
    | FromPeer
    | LinkDown
    | TargetsReady
    | TargetsReopened
    | ImagesFlushed
    | Staged
    | CommitDone
    | AbortDone
    | Compared
    | StoreFailed
    | Applied
    | ApplyFailed
    | FailoverRequested
    | MemoryReceived
    | RetryDue
    | Reopened
    | FailoverSaved
    | Released
)


# --- effects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Hand a message to a connection."""

    link: int
    message: m.Message


@dataclass(frozen=True, slots=True)
class CloseLink:
    """Say goodbye and close a connection."""

    link: int
    code: RefusalCode
    text: str


@dataclass(frozen=True, slots=True)
class PrepareTargets:
    """Answers ``TargetsReady``. Checks the targets; then, durably: the new generation, inconsistent, an empty journal.

    A failure that is not lasting has changed nothing of that: the old checkpoint is still there.
    """

    generation: Generation
    disks: tuple[DiskSpec, ...]


@dataclass(frozen=True, slots=True)
class WriteImages:
    """Write a full sync's extents; a failure answers ``StoreFailed``."""

    message: m.SyncExtents


@dataclass(frozen=True, slots=True)
class FlushImages:
    """Answers ``ImagesFlushed``, or ``StoreFailed``: make the images durable, and then how far the full sync is."""

    position: int


@dataclass(frozen=True, slots=True)
class ReopenTargets:
    """Answers ``TargetsReopened``, or ``StoreFailed``: what is read from now on is what the devices really hold, and a
    write that failed before is forgotten."""


@dataclass(frozen=True, slots=True)
class BeginEpoch:
    """Start an epoch in the journal; a failure answers ``StoreFailed``.

    :param disks: the VM's at its checkpoint, in the order that its extents refer to: their targets get room for them.
    """

    epoch: EpochNumber
    base: Base
    disks: tuple[DiskSpec, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class AppendEpoch:
    """Append extents; a failure answers ``StoreFailed``."""

    message: m.EpochExtents


@dataclass(frozen=True, slots=True)
class CompareBlocks:
    """Answers ``Compared``, or ``StoreFailed``: which blocks are not what the message says.

    Between epochs of a full sync: compared with the images as they are.  In an epoch: with the last committed
    checkpoint, to which the images are brought first; and what epochs in doubt have written counts as differing,
    since each of them may still be committed before this one.
    """

    message: m.CompareBlocks


@dataclass(frozen=True, slots=True)
class StageEpoch:
    """Answers ``Staged``, or ``CommitDone`` where the message says commit: one durable write does both."""

    message: m.EpochEnd


@dataclass(frozen=True, slots=True)
class CommitEpoch:
    """Answers ``CommitDone``. It drops the epochs staged before this one; later ones stay."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class AbortEpoch:
    """Answers ``AbortDone``: a staged epoch is dropped, durably; one that is gone already is nothing new."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class DropUnfinished:
    """Forget an epoch that has no end."""


@dataclass(frozen=True, slots=True)
class WakeApply:
    """There is something committed to apply, in the background."""


@dataclass(frozen=True, slots=True)
class ScheduleRetry:
    """Let ``RetryDue`` happen after a back-off that grows with the failures in a row; an earlier one is forgotten."""

    failures: int


@dataclass(frozen=True, slots=True)
class ReopenStore:
    """Answers ``Reopened``, or ``StoreFailed``: close the store and open it as a restart does.

    What was written and not acknowledged is read back from the device, never assumed.
    """


@dataclass(frozen=True, slots=True)
class SaveFailover:
    """Answers ``FailoverSaved``: the decision is durable."""

    failover: Failover


@dataclass(frozen=True, slots=True)
class FinishFailover:
    """Answers ``Released``: apply all that is committed up to the target, flush, save, release the targets."""

    failover: Failover


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer a request.

    :param checkpoint: the one that was failed over to, or that is committed; None: noted, not committed yet.
    """

    request: int
    checkpoint: EpochNumber | None = None
    error: QemuRemusError | None = field(default=None, compare=False)


Effect = (
    Send
    | CloseLink
    | PrepareTargets
    | WriteImages
    | FlushImages
    | ReopenTargets
    | BeginEpoch
    | AppendEpoch
    | CompareBlocks
    | StageEpoch
    | CommitEpoch
    | AbortEpoch
    | DropUnfinished
    | WakeApply
    | ScheduleRetry
    | ReopenStore
    | SaveFailover
    | FinishFailover
    | Answer
)

Step = tuple[SecondaryState, tuple[Effect, ...]]
