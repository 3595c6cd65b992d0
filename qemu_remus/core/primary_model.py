"""What the primary's machine knows: its state, as plain data.

What may not enter: decisions, which are :mod:`qemu_remus.core.primary_machine`'s.  What it is told and asks for is in
:mod:`qemu_remus.core.primary_events` and :mod:`qemu_remus.core.primary_effects`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from qemu_remus.core import messages as m
from qemu_remus.core.errors import RefusalCode
from qemu_remus.core.model import Base, DiskName, DiskSpec, EpochNumber, Generation, InstanceId, PairName
from qemu_remus.core.verification import Verification


class Phase(Enum):
    """Where the primary stands; the comment says what it waits for."""

    STARTING = auto()  # Attached
    ADOPTING = auto()  # Merged: what an earlier controller left becomes one recording bitmap
    WAITING = auto()  # LinkUp
    RENEWING = auto()  # TrackingStarted or Merged: a bitmap with base "none" for a full sync
    SYNC_BEGIN = auto()  # SyncReady
    SYNC_RESUME = auto()  # SyncResumed: whether the secondary knows where an interrupted full sync was
    SYNC_COPY = auto()  # SyncCopied
    SYNC_FLUSH = auto()  # SyncFlushed
    AHEAD = auto()  # CopiedAhead: what changed during an outage goes before the checkpoint that completes it
    IDLE = auto()  # CheckpointDue
    VERIFY = auto()  # SliceVerified: a part of the copy is compared, within the next epoch
    CAPTURE = auto()  # Captured
    TRANSFER = auto()  # Transferred
    STAGE = auto()  # EpochStaged, or Committed where one write does both
    STAGED = auto()  # CommitDue or AbortDue, or Committed where the backup's toolstack was quicker
    COMMIT = auto()  # Committed
    ABORT = auto()  # EpochAborted, or Committed where the backup's toolstack was quicker
    RETIRE = auto()  # BitmapRemoved
    MERGE = auto()  # Merged: the failed epoch's bitmap goes back into the recording one
    HOLD = auto()  # Held: a switch-over pauses the VM for its last epoch
    STAND = auto()  # Standing: the pause is made final
    HANDOVER = auto()  # HandedOver or HandoverRefused
    HANDED_OVER = auto()  # BitmapRemoved: the secondary has taken over, everything of ours goes
    SURVEY = auto()  # Surveyed: which disks the VM has now
    STOPPED = auto()


WORKING = frozenset(
    {
        Phase.ADOPTING,
        Phase.RENEWING,
        Phase.SYNC_COPY,
        Phase.AHEAD,
        Phase.VERIFY,
        Phase.CAPTURE,
        Phase.TRANSFER,
        Phase.RETIRE,
        Phase.MERGE,
        Phase.HOLD,
        Phase.STAND,
        Phase.HANDED_OVER,
        Phase.SURVEY,
    }
)
"""Phases in which a piece of work is under way."""

SYNCING = frozenset({Phase.RENEWING, Phase.SYNC_BEGIN, Phase.SYNC_RESUME, Phase.SYNC_COPY, Phase.SYNC_FLUSH})
LASTING = frozenset(RefusalCode) - {
    RefusalCode.DISK_SHRUNK,
    RefusalCode.NO_PLACE,
    RefusalCode.FENCED,
    RefusalCode.STORAGE_FAILED,
    RefusalCode.NO_SPACE,
    RefusalCode.PROTOCOL,
    RefusalCode.SHUTTING_DOWN,
}
"""Refusals that nobody but an operator can lift: there is no use in connecting again."""

IN_EPOCH = frozenset({Phase.CAPTURE, Phase.TRANSFER, Phase.STAGE, Phase.STAGED, Phase.COMMIT, Phase.ABORT})

ANSWERING = frozenset({Phase.STAGE, Phase.COMMIT, Phase.ABORT})
"""Phases in which the secondary owes an answer about an epoch."""


@dataclass(frozen=True, slots=True)
class Recording:
    """Identity of one dirty bitmap, the same on every disk.

    :param base: the committed checkpoint that its extents build on, on every disk; None where that is not so on all.
    :param epoch: the epoch that it records, or has recorded.
    """

    generation: Generation
    base: Base
    epoch: EpochNumber


@dataclass(frozen=True, slots=True)
class Found:
    """A bitmap of ours that was found on a disk.

    :param recording: which one.
    :param live: it records what the guest writes; else it is complete.
    """

    recording: Recording
    live: bool = True


@dataclass(frozen=True, slots=True)
class Opened:
    """How much of the present epoch was handed to the link.

    :param digest: as in :class:`qemu_remus.core.messages.EpochEnd`.
    """

    extents: int = 0
    payload: int = 0
    digest: int = 0


EPOCHS_AHEAD = 1024
"""What is durable of the epochs' numbers is ahead by so many: none is used twice after a crash that takes the bitmaps
too, and nobody waits for a disk at each checkpoint."""


class Wish(Enum):
    """What the toolstack wants of an epoch in doubt."""

    NONE = auto()  # it has not said
    COMMIT = auto()
    ABORT = auto()


@dataclass(frozen=True, slots=True)
class Doubt:
    """An epoch that the secondary has staged, or may have had when the link was lost, and of which nobody here knows
    whether it is committed.  Its bitmap is merged back meanwhile, so that nothing depends on how the doubt ends.

    :param wish: carried out once there is a link and the secondary still holds the epoch.
    :param staged: the secondary has said that it is; else it may be.
    """

    epoch: EpochNumber
    wish: Wish = Wish.NONE
    staged: bool = True


@dataclass(frozen=True, slots=True)
class Handover:
    """A switch-over that the secondary is about to be told of, or was told of; durable before it is.

    From here on the VM must not run before it is known that the secondary has not taken over.

    :param target: the checkpoint at which it takes over: the last committed one.
    :param generation: the history that begins there.
    :param ours: it is we who paused the VM, and who resume it where the secondary has not taken over.
    :param done: it has.
    """

    target: EpochNumber
    generation: Generation
    ours: bool = True
    done: bool = False


class SwitchStage(Enum):
    """How far a switch-over has come."""

    WAITING = auto()  # for the epoch under way
    HOLDING = auto()  # the VM is being paused
    LAST = auto()  # the last epoch is captured, sent and committed; the VM stands still
    STANDING = auto()  # the pause is being made final
    ASKED = auto()  # the secondary was told, or may have been


@dataclass(frozen=True, slots=True)
class Switch:
    """A switch-over that somebody waits for.

    :param askers: requests that are to be answered when it ends.
    :param generation: the history that is to begin.
    :param seconds: that the pause may last until the secondary is told.
    :param epoch: the last one; None until it is known.
    :param ours: it is we who paused the VM.
    :param given_up: why it is not to go on; the VM is resumed as soon as the work under way has ended.
    """

    stage: SwitchStage
    askers: tuple[int, ...]
    generation: Generation
    seconds: float
    epoch: Base = None
    ours: bool = False
    given_up: str = ""


@dataclass(frozen=True, slots=True)
class Resize:
    """Somebody wants a disk to have another size.

    :param number: identifies who asked.
    :param size: in bytes.
    """

    number: int
    disk: DiskName
    size: int


@dataclass(frozen=True, slots=True)
class ResizeDropped:
    """Who wanted a resize waits for it no longer: it is not to be begun any more."""

    number: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A disk of the VM that goes unprotected because the secondary cannot take it.

    :param reason: why not.
    :param ask: whether there is a place for it is asked with every hello.
    """

    name: DiskName
    reason: str
    ask: bool = True


@dataclass(frozen=True)  # no slots: see core.frozen
class PrimaryState:
    """All that the primary knows.

    :param one_step: stage and commit by one durable write (interval mode); else a toolstack says when to take a
        checkpoint and when to commit it.
    :param highest: the highest epoch number in use, here or on the secondary.
    :param saved: what it was when it was last made durable; see :data:`EPOCHS_AHEAD`.
    :param recording: the bitmap that records now.
    :param reach: for each disk, the committed checkpoint that its bitmaps reach back to; None where nobody recorded
        everything since: its blocks are compared with the secondary's.
    :param grown: disks that have become larger than at the secondary's checkpoint, by their place, with the size that
        they have there: what is behind that is compared, whatever the bitmaps say.
    :param added: disks that the secondary's checkpoint does not have: their blocks are compared.
    :param uncovered: the names of the disks that the last committed checkpoint does not have, or not in their size.
    :param left_out: disks that the secondary cannot take.
    :param news: what the VM's disks have become since the last commit, for a person; empty where they are the same.
    :param stale: the VM's disks may be others than these.
    :param resizes: wanted, and not begun.
    :param calling: a link was asked for, and has not come up since.
    :param silence: what QEMU has not answered in time, for a person; empty while it answers.
    :param bulky: so much has changed during an outage that it is copied ahead of the next checkpoint.
    :param ahead: the bitmap whose blocks were copied ahead; they are part of the epoch that ``recording`` will end, or
        ``finished`` has ended.
    :param opened: what was sent of that epoch; None: it has not begun.
    :param spare: a new generation, should a full copy become necessary on this link.
    :param crowded: the secondary's journal has no room for the difference; a full copy may have, if that is allowed.
    :param finished: the bitmap of the uncommitted epoch.
    :param doubt: the epoch in doubt; with ``one_step`` there is none, the next epoch settles that by itself.  A
        toolstack gets no other epoch before it: one at most is undecided.
    :param linked: the handshake of the present link is done.
    :param since: the bitmap that has recorded everything since this generation's full sync began, or took that over;
        None where nobody is sure. This controller has seen it itself: it never trusts a name that it finds.
    :param synced: a full sync was flushed on this link and is not committed yet.
    :param stopping: the machine ends as soon as nothing is under way.
    :param hurry: it has waited long enough for that: whatever is under way ends without an answer.
    :param refused: the secondary has refused the epoch under way and ignores the rest of it.
    :param aborted: the toolstack does not want the epoch under way any more.
    :param refusal: the secondary has refused this pair for good; the machine ends as soon as its epoch is merged back.
    :param verification: the last one, whether it goes on or not.
    :param asked: the secondary was asked to compare within the present epoch.
    :param due: a checkpoint fell due while a slice was being verified.
    :param making_way: no slice is begun before the next checkpoint, or before a while has passed without one.
    :param hurried: the slice under way was told to end at once.
    :param failures: epochs lost in a row while the link was up.
    :param history: generations that came before this one, oldest first, each with the last checkpoint of it that
        was committed.
    :param begun: when this generation began, as in :class:`qemu_remus.core.messages.Hello`, set by the shell.
    :param decided: when the committed checkpoint was.
    :param switch: a switch-over under way; see :mod:`qemu_remus.core.switchover_machine`.
    :param handover: what the secondary was told of, or may have been; durable.
    :param reason: why the VM is not protected; empty while it is.
    """

    pair: PairName
    instance: InstanceId
    disks: tuple[DiskSpec, ...]
    session: int = 0
    one_step: bool = True
    allow_full_resync: bool = False
    phase: Phase = Phase.STARTING
    generation: Generation | None = None
    committed: Base = None
    captured: Base = None
    staged: Base = None
    highest: int = 0
    saved: int = 0
    recording: Recording | None = None
    reach: tuple[Base, ...] = ()
    bulky: bool = False
    ahead: Recording | None = None
    opened: Opened | None = None
    spare: Generation | None = None
    crowded: bool = False
    finished: Recording | None = None
    doubt: Doubt | None = None
    linked: bool = False
    since: Recording | None = None
    synced: bool = False
    protected: bool = False
    stopping: bool = False
    hurry: bool = False
    refused: bool = False
    aborted: bool = False
    refusal: m.Goodbye | None = None
    verification: Verification | None = None
    asked: bool = False
    due: bool = False
    making_way: bool = False
    hurried: bool = False
    failures: int = 0
    history: tuple[tuple[Generation, EpochNumber], ...] = ()
    begun: int = 0
    decided: int = 0
    switch: Switch | None = None
    handover: Handover | None = None
    reason: str = "not started yet"
    grown: tuple[tuple[int, int], ...] = ()
    added: tuple[int, ...] = ()
    uncovered: frozenset[DiskName] = frozenset()
    left_out: tuple[LeftOut, ...] = ()
    news: str = ""
    stale: bool = False
    resizes: tuple[Resize, ...] = ()
    calling: bool = False
    silence: str = ""
