"""What the two controllers say to each other, as data. How it looks in bytes is :mod:`qemu_remus.core.wire`'s business.

One link, in order::

    P -> S  Hello                            S -> P  Hello          (each side computes the same verdict)
    P -> S  SyncBegin                        S -> P  SyncReady      (full sync only: what each target was)
    P -> S  SyncResume                       S -> P  SyncResumed    (instead, where one was interrupted)
    P -> S  SyncExtents ... SyncFlush        S -> P  SyncFlushed    (straight into the images; they are fsynced)
    P -> S  EpochBegin EpochExtents ... EpochEnd(commit=...)
                                             S -> P  EpochStaged, or Committed where EpochEnd said commit
    P -> S  CompareBlocks                    S -> P  BlocksDiffer   (during a full sync, and within an epoch)
    P -> S  CommitEpoch                      S -> P  Committed
    P -> S  AbortEpoch                       S -> P  EpochAborted
    P -> S  HandOver                         S -> P  HandedOver, or HandoverRefused
    either  Heartbeat, Goodbye               S -> P  EpochRefused   (the epoch is dropped there; the link stays)

``EpochEnd(commit=True)`` is the interval mode's way: one durable write stages and commits.
"""

from __future__ import annotations

from dataclasses import dataclass

from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import Base, DiskSpec, DiskState, EpochNumber, Generation, InstanceId, PairName, Role


@dataclass(frozen=True, slots=True)
class Hello:
    """Who I am and what I hold; the first message in each direction.

    :param session: counts this instance's connections, from 1; a newer one fences an older one of the same instance.
    :param generation: None where nothing has been synchronised yet.
    :param disks: of the primary: all disks to protect, in the order that extents refer to; those of size 0, which do
        not count in this order, it does not protect and asks about: is there a place for them?
        Of the secondary: the disks at its checkpoint, and, of size 0, those that it has a place for besides.
    :param committed: the last committed checkpoint; of the primary: the last one that it knows of.
    :param staged: secondary: an epoch that is staged and not committed.
    :param highest_epoch: the highest epoch number that this side has seen in this generation.
    :param disk_state: what this side's disks hold.
    :param history: the generations of this side that have ended, oldest first, each with the checkpoint at which it
        did; the newest 32 travel.
    :param begun: when this generation began, in seconds since 1970 (UTC); 0: not known. For people only.
    :param decided: when the last committed checkpoint was decided on, the same way.
    """

    pair: PairName
    role: Role
    instance: InstanceId
    session: int
    generation: Generation | None
    disks: tuple[DiskSpec, ...]
    committed: Base
    staged: Base
    highest_epoch: int
    disk_state: DiskState
    history: tuple[tuple[Generation, EpochNumber], ...] = ()
    begun: int = 0
    decided: int = 0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """I am here. Sent by both sides at a third of the time-out; the numbers are for the other side's status report.

    :param backlog: secondary: bytes that are committed and not applied.
    """

    captured: Base = None
    staged: Base = None
    committed: Base = None
    applied: Base = None
    backlog: int = 0


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The last message before its sender closes the connection.

    :param text: one to three sentences for a person, at most 4,096 bytes of UTF-8.
    """

    code: RefusalCode
    text: str


@dataclass(frozen=True, slots=True)
class SyncBegin:
    """A full sync starts; the secondary is inconsistent from its answer on until the first commit.

    :param generation: the history that begins here.
    :param disks: with their sizes.
    """

    generation: Generation
    disks: tuple[DiskSpec, ...]


@dataclass(frozen=True, slots=True)
class SyncReady:
    """The targets are there.

    :param fresh: for each disk: the secondary created the target, empty, in this attempt, so that zeroes need not be
        sent.
    """

    fresh: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class SyncResume:
    """Let the full sync of this generation go on where it was flushed last: the bitmap begun with it still records.

    :param disks: as in its ``SyncBegin``.
    """

    generation: Generation
    disks: tuple[DiskSpec, ...]


@dataclass(frozen=True, slots=True)
class SyncResumed:
    """Whether the secondary has that sync, and how far it is.

    :param resumed: it goes on; else nothing was changed, and another may begin.
    :param position: the token of the last ``SyncFlush`` that is durable; 0 for none.
    :param fresh: as in the sync's ``SyncReady``.
    """

    resumed: bool
    position: int
    fresh: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class SyncExtents:
    """Contents for the images themselves.

    :param extents: in the order of their data in ``data``.
    :param data: the contents of all extents that are not zero, one after the other.
    """

    extents: tuple[Extent, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class SyncFlush:
    """Make durable all that this sync has sent so far, and answer with the token.

    :param token: how far it has come, in bytes over all disks in their order: up to there everything was sent, or is
        the same. The secondary remembers it for ``SyncResumed``.
    """

    token: int


@dataclass(frozen=True, slots=True)
class SyncFlushed:
    """All extents before the flush of this token are on stable storage."""

    token: int


@dataclass(frozen=True, slots=True)
class EpochBegin:
    """An epoch's extents follow; it applies to a committed checkpoint c with base <= c < epoch.

    :param base: None: it completes a full sync that was flushed on this link.
    """

    epoch: EpochNumber
    base: Base


@dataclass(frozen=True, slots=True)
class EpochExtents:
    """Part of an epoch, in the form of :class:`SyncExtents`."""

    epoch: EpochNumber
    extents: tuple[Extent, ...]
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class EpochEnd:
    """The epoch is complete.

    :param extents: number of extents sent.
    :param payload: bytes of data sent.
    :param digest: CRC32C over the payloads of all its EpochExtents frames, chained in order (0 where there are none).
    :param commit: commit at once; from the sending of this on, the epoch is in doubt until it is answered.
    """

    epoch: EpochNumber
    extents: int
    payload: int
    digest: int
    commit: bool


@dataclass(frozen=True, slots=True)
class EpochStaged:
    """Every extent of the epoch is durable in the journal."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class CommitEpoch:
    """Checkpoint N counts: decide so durably. Repeating it is answered from the state."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class Committed:
    """The decision that checkpoint N counts is durable."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class AbortEpoch:
    """Drop the epoch, staged or not; never sent after its commit was."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class EpochAborted:
    """Nothing of the epoch is left."""

    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class EpochRefused:
    """The epoch cannot be staged and was dropped; its remaining frames are ignored, the link stays.

    :param text: one to three sentences for a person, at most 4,096 bytes of UTF-8.
    """

    epoch: EpochNumber
    code: RefusalCode
    text: str


@dataclass(frozen=True, slots=True)
class CompareBlocks:
    """Which of these blocks are other than they are here? Only they need to be sent.

    During a full sync they are compared with the images as they are, with all that was sent before; within an epoch,
    with the last committed checkpoint. Every question is answered, in order.

    :param disk: as an extent's.
    :param offset: bytes from the disk's start, a multiple of ``block_size``.
    :param block_size: bytes.
    :param digests: of this many blocks from there on; see :mod:`qemu_remus.core.comparison`.
    """

    disk: int
    offset: int
    block_size: int
    digests: bytes


@dataclass(frozen=True, slots=True)
class BlocksDiffer:
    """The answer to the oldest ``CompareBlocks`` that has none.

    :param disk: the question's.
    :param offset: the question's.
    :param differing: a bitmap of the question's blocks; those that need not be sent are 0. All are 1 where nothing
        can be said: the epoch was refused.
    """

    disk: int
    offset: int
    differing: bytes


@dataclass(frozen=True, slots=True)
class HandOver:
    """Take the VM over at this checkpoint; it is paused there, and has written nothing since.

    From the sending of this on the handover is in doubt until it is answered, here or by the next link's hello.

    :param epoch: the last committed checkpoint.
    :param generation: the history that begins there.
    """

    epoch: EpochNumber
    generation: Generation


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The secondary has taken over, durably, and its disks are free for use. It says nothing more."""

    epoch: EpochNumber
    generation: Generation


@dataclass(frozen=True, slots=True)
class HandoverRefused:
    """The secondary does not take over, and has decided nothing; the link stays.

    :param text: one to three sentences for a person, at most 4,096 bytes of UTF-8.
    """

    epoch: EpochNumber
    code: RefusalCode
    text: str


Message = (
    Hello
    | Heartbeat
    | Goodbye
    | SyncBegin
    | SyncReady
    | SyncResume
    | SyncResumed
    | SyncExtents
    | SyncFlush
    | SyncFlushed
    | EpochBegin
    | EpochExtents
    | EpochEnd
    | EpochStaged
    | CommitEpoch
    | Committed
    | AbortEpoch
    | EpochAborted
    | EpochRefused
    | CompareBlocks
    | BlocksDiffer
    | HandOver
    | HandedOver
    | HandoverRefused
)

__all__ = [
    "AbortEpoch",
    "BlocksDiffer",
    "CommitEpoch",
    "Committed",
    "CompareBlocks",
    "EpochAborted",
    "EpochBegin",
    "EpochEnd",
    "EpochExtents",
    "EpochRefused",
    "EpochStaged",
    "Goodbye",
    "HandOver",
    "HandedOver",
    "HandoverRefused",
    "Heartbeat",
    "Hello",
    "Message",
    "SyncBegin",
    "SyncExtents",
    "SyncFlush",
    "SyncFlushed",
    "SyncReady",
]
