"""The order of messages: who may say what and when, as a record of one conversation by which the next one is judged.

The table below says who may say what and when; beside it stand only those rules about order that need a number (which
epoch, which token, which sizes).  What may not enter: bytes (:mod:`qemu_remus.core.wire`), time, what to do about a
message (the machines), and whether two sides should talk at all (:mod:`qemu_remus.core.generation`).

Messages cross on the way, so the two records differ for a while.  An *overtaken* message is legal and is delivered, and
the machines drop what is about an epoch that they have given up:

- a refused epoch's extents and end may follow its ``EpochRefused``, until the next ``EpochBegin``;
- ``EpochStaged`` and ``EpochRefused`` may follow an ``AbortEpoch`` of their epoch, until it is answered;
- the next ``EpochBegin`` need not wait for the ``EpochAborted`` of an epoch that had no end, or is of an earlier link;
- a refused epoch's ``CompareBlocks`` may follow its ``EpochRefused``, as its extents may.

The secondary may commit a staged epoch of its own accord: the toolstack beside it says when its memory is complete.
This ``Committed`` crosses whatever the primary wants of the epoch, and is said once more in answer to that.  An epoch
that had its end may thus be committed although it is aborted: its answer is waited for.

Every ``AbortEpoch`` is answered by one ``EpochAborted``, or by ``Committed`` where it came too late; every
``CommitEpoch`` and every ``EpochEnd`` that commits, by one ``Committed`` or ``EpochRefused``; an ``EpochEnd`` whose
epoch was refused before, by nothing.  Further answers about the newest epoch whose commit was asked for or said, and
about those before it, are not counted, as some are said unasked: they are legal and change nothing.

Every ``HandOver`` is answered by one ``HandedOver``, the last message of its sender but a goodbye, or one
``HandoverRefused``.

Every ``CompareBlocks`` is answered by one ``BlocksDiffer``, in order, at any time: also when the epoch has been refused
or aborted meanwhile, or another has begun.  At most ``QUESTIONS_LIMIT`` wait for their answers.  None may when an epoch
ends, or the epoch of a full sync begins: what is not known to be the same has to be sent before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

from qemu_remus.core import messages as m
from qemu_remus.core.comparison import QUESTIONS_LIMIT, count_blocks, fits
from qemu_remus.core.model import Base, DiskName, DiskSpec, EpochNumber, Role


class State(Enum):
    """Where the conversation stands."""

    HANDSHAKE = auto()  # the hellos are not both here
    IDLE = auto()  # between epochs
    SYNC_ASKED = auto()  # a full sync has begun, its targets are not ready
    RESUME_ASKED = auto()  # whether an interrupted full sync goes on is not known
    SYNCING = auto()  # between epochs, and a full sync is not committed yet
    OPEN = auto()  # an epoch's extents are coming
    ENDED = auto()  # the epoch is complete, its answer is due
    STAGED = auto()  # it is staged: the primary may commit or abort it
    IN_DOUBT = auto()  # its commit was sent: abort is over, only an answer resolves it
    HANDING = auto()  # the secondary is to take over, its answer is due
    ABORTING = auto()  # it had its end, and the primary wants it no more: the answer says whether that was in time


TABLE: Final[Mapping[State, Mapping[type, State]]] = {
    State.HANDSHAKE: {},
    State.IDLE: {
        m.SyncBegin: State.SYNC_ASKED,
        m.SyncResume: State.RESUME_ASKED,
        m.EpochBegin: State.OPEN,
        m.HandOver: State.HANDING,
    },
    State.HANDING: {
        m.HandedOver: State.IDLE,
        m.HandoverRefused: State.IDLE,
    },
    State.SYNC_ASKED: {
        m.SyncReady: State.SYNCING,
    },
    State.RESUME_ASKED: {
        m.SyncResumed: State.IDLE,
    },
    State.SYNCING: {
        m.SyncExtents: State.SYNCING,
        m.SyncFlush: State.SYNCING,
        m.SyncFlushed: State.SYNCING,
        m.CompareBlocks: State.SYNCING,
        m.EpochBegin: State.OPEN,
    },
    State.OPEN: {
        m.EpochExtents: State.OPEN,
        m.CompareBlocks: State.OPEN,
        m.EpochEnd: State.ENDED,  # or IN_DOUBT, where it commits
        m.AbortEpoch: State.IDLE,
        m.EpochRefused: State.IDLE,
    },
    State.ENDED: {
        m.EpochStaged: State.STAGED,
        m.AbortEpoch: State.ABORTING,
        m.EpochRefused: State.IDLE,
    },
    State.STAGED: {
        m.CommitEpoch: State.IN_DOUBT,
        m.AbortEpoch: State.ABORTING,
        m.Committed: State.IDLE,
    },
    State.IN_DOUBT: {
        m.CommitEpoch: State.IN_DOUBT,
        m.Committed: State.IDLE,
        m.EpochRefused: State.IDLE,
    },
    State.ABORTING: {
        m.EpochStaged: State.ABORTING,
        m.EpochRefused: State.IDLE,
        m.EpochAborted: State.IDLE,
        m.Committed: State.IDLE,
    },
}
"""State, message that is about the present epoch or none -> next state. IDLE stands for SYNCING during a full sync."""

SPEAKER: Final[Mapping[type, Role]] = {
    **dict.fromkeys(
        (
            m.SyncBegin,
            m.SyncResume,
            m.SyncExtents,
            m.SyncFlush,
            m.EpochBegin,
            m.EpochExtents,
            m.EpochEnd,
            m.CommitEpoch,
            m.AbortEpoch,
            m.CompareBlocks,
            m.HandOver,
        ),
        Role.PRIMARY,
    ),
    **dict.fromkeys(
        (
            m.SyncReady,
            m.SyncResumed,
            m.SyncFlushed,
            m.EpochStaged,
            m.Committed,
            m.EpochAborted,
            m.EpochRefused,
            m.BlocksDiffer,
            m.HandedOver,
            m.HandoverRefused,
        ),
        Role.SECONDARY,
    ),
}
"""Who says what; what is not here (hello, heartbeat, goodbye) both may say."""

AboutEpoch = (
    m.EpochExtents
    | m.EpochEnd
    | m.EpochStaged
    | m.CommitEpoch
    | m.Committed
    | m.AbortEpoch
    | m.EpochAborted
    | m.EpochRefused
)


class Illegal(Exception):
    """This message does not fit here."""


class Conversation:
    """The record of what was said, by which the next message is judged."""

    def __init__(self) -> None:
        self.state = State.HANDSHAKE
        self._hellos: dict[Role, m.Hello] = {}
        self._disks: tuple[DiskName, ...] = ()
        self._sizes: tuple[int, ...] = ()
        self._syncing = False
        self._unflushed = False
        self._flushes: deque[int] = deque()
        self._questions: deque[m.CompareBlocks] = deque()
        self._epoch: EpochNumber | None = None
        self._highest = 0
        self._extents = 0
        self._payload = 0
        self._refused: EpochNumber | None = None
        self._held: Base = None
        self._committed: Base = None
        self._handing: m.HandOver | None = None
        self._aborting: set[EpochNumber] = set()  # the answer is due, and not waited for
        self._answerable = 0  # the newest whose commit was asked for or said; the primary's is never behind

    def hello(self, speaker: Role, hello: m.Hello) -> None:
        self._hellos[speaker] = hello
        if len(self._hellos) == 2:
            primary, secondary = self._hellos[Role.PRIMARY], self._hellos[Role.SECONDARY]
            # One of size 0 is not protected: nothing is said of it.
            self._disks = tuple(disk.name for disk in primary.disks if disk.size)
            self._sizes = tuple(disk.size for disk in primary.disks if disk.size)
            self._held = secondary.staged
            self._committed = secondary.committed
            self._answerable = secondary.committed or 0
            self._highest = max(self._answerable, secondary.staged or 0)
            self.state = State.IDLE

    def say(self, speaker: Role, message: m.Message) -> None:
        """Judge a message, and enter it.

        :raise Illegal: when it does not fit.
        """
        if SPEAKER[type(message)] is not speaker:
            raise Illegal(f"a {speaker} does not say it")
        if isinstance(message, m.CompareBlocks):
            self._ask(message)
        elif isinstance(message, m.BlocksDiffer):
            self._answer(message)
        elif isinstance(message, AboutEpoch) and message.epoch != self._epoch:
            self._about_another(message)
        else:
            self._about_present(message)
        if isinstance(message, m.CommitEpoch | m.Committed):
            self._answerable = max(self._answerable, message.epoch)

    def _about_present(self, message: m.Message) -> None:
        after = TABLE[self.state].get(type(message))
        if after is None:
            raise Illegal(f"not now ({self.state.name})")
        if isinstance(message, AboutEpoch):
            after = self._about_epoch(message, after)
        else:
            self._about_disks(message)
        self.state = State.SYNCING if after is State.IDLE and self._syncing else after

    def _about_disks(self, message: object) -> None:
        match message:
            case m.SyncBegin(disks=disks):
                self._check_disks(disks)
                self._start_sync()
            case m.SyncResume(disks=disks):
                self._check_disks(disks)
            case m.SyncReady(fresh=fresh):
                self._check_fresh(fresh)
            case m.SyncResumed():
                self._resume(message)
            case m.SyncExtents():
                self._check_extents(message)
                self._unflushed = True
            case m.SyncFlush(token=token):
                self._flushes.append(token)
                self._unflushed = False
            case m.SyncFlushed(token=token):
                if not self._flushes or self._flushes.popleft() != token:
                    raise Illegal(f"flush {token} is not the next to be answered")
            case m.EpochBegin(epoch=epoch, base=base):
                self._begin(epoch, base)
            case m.HandOver():
                self._handing = message
            case m.HandedOver() | m.HandoverRefused():
                self._handed(message)

    def _check_disks(self, disks: tuple[DiskSpec, ...]) -> None:
        if tuple(disk.name for disk in disks) != self._disks:
            raise Illegal("its disks are not those of the primary's hello")
        self._sizes = tuple(disk.size for disk in disks)

    def _check_fresh(self, fresh: tuple[bool, ...]) -> None:
        if len(fresh) != len(self._disks):
            raise Illegal(f"it answers for {len(fresh)} disks instead of {len(self._disks)}")

    def _resume(self, answer: m.SyncResumed) -> None:
        if answer.resumed:
            self._check_fresh(answer.fresh)
            self._start_sync()
        elif answer.position or answer.fresh:
            raise Illegal("it tells of a sync that does not go on")

    def _start_sync(self) -> None:
        self._syncing = self._unflushed = True
        self._flushes.clear()
        # The secondary may be committing what it holds: that comes too late, and changes nothing.
        self._answerable = max(self._answerable, self._held or 0)
        self._held = self._committed = self._refused = None

    def _begin(self, epoch: EpochNumber, base: Base) -> None:
        if epoch <= self._highest:
            raise Illegal(f"epoch {epoch} was there before")
        if (base is None) != self._syncing or (base is not None and base >= epoch):
            when = "during" if self._syncing else "without"
            raise Illegal(f"epoch {epoch} cannot build on base {base} {when} a sync")
        if self._syncing and (self._unflushed or self._flushes):
            raise Illegal("the full sync before it is not flushed")
        if self._syncing and self._questions:
            raise Illegal("what the full sync has to send is not known yet")
        self._epoch = self._highest = epoch
        self._extents = self._payload = 0
        self._refused = None

    def _handed(self, answer: m.HandedOver | m.HandoverRefused) -> None:
        asked, self._handing = self._handing, None
        assert asked is not None
        same = answer.epoch == asked.epoch
        if not same or (isinstance(answer, m.HandedOver) and answer.generation != asked.generation):
            raise Illegal(f"it is not what was to be handed over, checkpoint {asked.epoch}")

    def _about_epoch(self, message: AboutEpoch, after: State) -> State:
        match message:
            case m.EpochExtents():
                self._check_extents(message)
                self._extents += len(message.extents)
                self._payload += memoryview(message.data).nbytes
            case m.EpochEnd() if self._questions:
                raise Illegal("what the epoch has to send is not known yet")
            case m.EpochEnd(extents=extents, payload=payload, commit=commit):
                if (extents, payload) != (self._extents, self._payload):
                    counted = f"{self._extents} and {self._payload}"
                    raise Illegal(f"it says {extents} extents and {payload} bytes, these were {counted}")
                return State.IN_DOUBT if commit else after
            case m.AbortEpoch(epoch=epoch) if after is State.IDLE:
                self._aborting.add(epoch)
            case m.EpochRefused(epoch=epoch) if self.state is State.ABORTING:
                self._aborting.add(epoch)
            case m.EpochRefused(epoch=epoch):
                self._refused = epoch
            case m.Committed(epoch=epoch):
                self._committed = epoch
                self._held = None
                self._syncing = False
        if after is State.IDLE:
            self._epoch = None
        return after

    def _about_another(self, message: AboutEpoch) -> None:
        """A message about an epoch that is not the present one: overtaken, repeated, or of an earlier link."""
        epoch = message.epoch
        between = self.state in (State.IDLE, State.SYNCING)
        held = epoch == self._held
        refused = epoch == self._refused
        match message:
            case m.EpochExtents() | m.EpochEnd() | m.CommitEpoch() if refused:
                pass
            case m.CommitEpoch() if held and between and epoch not in self._aborting:
                self._held = self._refused = None
                self._epoch = epoch
                self.state = State.IN_DOUBT
            case m.AbortEpoch() if (held or refused) and between and epoch not in self._aborting:
                self._refused = None if refused else self._refused
                self._aborting.add(epoch)
            case m.CommitEpoch() | m.AbortEpoch() if epoch <= (self._committed or 0):
                pass
            case m.EpochRefused() if epoch in self._aborting:
                pass
            case m.EpochAborted() if epoch in self._aborting:
                self._held = None if held else self._held
                self._aborting.remove(epoch)
            case m.Committed() if held:
                self._held = None
                self._committed = epoch
                self._aborting.discard(epoch)
            case m.Committed() | m.EpochAborted() | m.EpochRefused() if epoch <= self._answerable and not held:
                self._aborting.discard(epoch)
            case _:
                raise Illegal(f"it is about epoch {epoch}, the present one is {self._epoch} ({self.state.name})")

    def _ask(self, question: m.CompareBlocks) -> None:
        # About a refused epoch it was overtaken by the refusal, and is answered all the same.
        if m.CompareBlocks not in TABLE[self.state] and self._refused is None:
            raise Illegal(f"not now ({self.state.name})")
        if len(self._questions) >= QUESTIONS_LIMIT:
            raise Illegal(f"{QUESTIONS_LIMIT} questions wait for their answers")
        last = question.offset + (count_blocks(question.digests) - 1) * question.block_size
        if question.disk >= len(self._sizes) or last >= self._sizes[question.disk]:
            raise Illegal(f"its blocks at {question.offset} of disk {question.disk} are not within the disks")
        self._questions.append(question)

    def _answer(self, answer: m.BlocksDiffer) -> None:
        # Whatever has become of the sync or the epoch since: each question has one answer, in order.
        if not self._questions:
            raise Illegal("nothing was asked")
        question = self._questions.popleft()
        if (answer.disk, answer.offset) != (question.disk, question.offset):
            asked = f"{question.offset} of disk {question.disk}"
            raise Illegal(f"it is about {answer.offset} of disk {answer.disk}, the next question about {asked}")
        if not fits(answer.differing, count_blocks(question.digests)):
            raise Illegal(f"it is not about the {count_blocks(question.digests)} blocks that were asked about")

    def _check_extents(self, message: m.SyncExtents | m.EpochExtents) -> None:
        sizes = self._sizes
        for extent in message.extents:
            if extent.disk >= len(sizes) or extent.offset + extent.length > sizes[extent.disk]:
                raise Illegal(f"{extent} is not within the disks")
