"""The handshake's decision: what two controllers that meet may do with each other's data.

:func:`decide` is pure and total: from the same two hellos both sides come to the same verdict, and whatever the hellos
say, there is one.  A verdict that is a :class:`Refusal` carries both hellos and a diagnosis for a person.  What may not
enter: I/O, and what to do about a verdict, which is the machines' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qemu_remus.core.disk_changes import UNCHANGED, DiskChanges, find_changes, has_places
from qemu_remus.core.errors import PeerRefused, RefusalCode, sentences
from qemu_remus.core.messages import Goodbye, Hello
from qemu_remus.core.model import Base, DiskName, DiskState, EpochNumber, Generation, Role
from qemu_remus.core.text import written

__all__ = [
    "Diagnosis",
    "DiskShrunk",
    "DisksMismatch",
    "FailedOver",
    "Incremental",
    "InitialSync",
    "NeedsFullSync",
    "NoPlace",
    "PairMismatch",
    "Refusal",
    "RoleConflict",
    "SplitBrain",
    "StorageFailed",
    "UnrelatedData",
    "Verdict",
    "decide",
]


@dataclass(frozen=True, slots=True)
class InitialSync:
    """The secondary holds no checkpoint: every block is to be copied.

    :param reason: why there is none, for the log.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Incremental:
    """The next epoch may build on what the secondary has; that there is nothing to send is a case of it.

    :param committed: the secondary's checkpoint.
    :param in_doubt: an epoch that is staged there and not committed. The next epoch is a superset of it.
    :param compare: the disks, by their place in the primary's hello, of which nobody recorded what has changed since
        that checkpoint, or which that checkpoint does not have: their blocks are compared.
    :param changes: what has become of the disks since that checkpoint.
    """

    committed: EpochNumber
    in_doubt: Base
    compare: tuple[int, ...] = ()
    changes: DiskChanges = UNCHANGED


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A refusal in words: what happened, what is safe, what to do next; each without a full stop at its end."""

    what: str
    safe: str
    hint: str

    def __str__(self) -> str:
        return sentences(self.what, self.safe, self.hint)


@dataclass(frozen=True, slots=True)
class Refusal:
    """The two do not replicate; nothing on either side was changed.

    :param primary: its hello.
    :param secondary: its hello.
    """

    primary: Hello
    secondary: Hello

    code: ClassVar[RefusalCode]

    @property
    def diagnosis(self) -> Diagnosis:
        """The refusal for a person."""
        raise NotImplementedError

    def error(self) -> PeerRefused:
        """The refusal as an error."""
        said = self.diagnosis
        return PeerRefused(said.what, self.code, safe=said.safe, hint=said.hint)

    def goodbye(self) -> Goodbye:
        """The refusal as the last message to the other side."""
        return Goodbye(self.code, str(self.diagnosis))


@dataclass(frozen=True, slots=True)
class PairMismatch(Refusal):
    """The two belong to different pairs."""

    code: ClassVar[RefusalCode] = RefusalCode.UNKNOWN_PAIR

    @property
    def diagnosis(self) -> Diagnosis:
        return Diagnosis(
            f"the primary is of pair {self.primary.pair}, the secondary keeps pair {self.secondary.pair}",
            "nothing was changed",
            "check --peer, and that both sides have the same --pair",
        )


@dataclass(frozen=True, slots=True)
class RoleConflict(Refusal):
    """A pair needs one primary and one secondary, and these are not that."""

    code: ClassVar[RefusalCode] = RefusalCode.ROLE_CONFLICT

    @property
    def diagnosis(self) -> Diagnosis:
        return Diagnosis(
            f"the side that connected says that it is {self.primary.role}, "
            f"the side that listens {self.secondary.role}; "
            f"they hold {_holding(self.primary)} and {_holding(self.secondary)}",
            "nothing was changed",
            "make sure that the VM runs on one side only, and make the other side a new secondary",
        )


@dataclass(frozen=True, slots=True)
class StorageFailed(Refusal):
    """The secondary's store is damaged or cannot be written."""

    code: ClassVar[RefusalCode] = RefusalCode.STORAGE_FAILED

    @property
    def diagnosis(self) -> Diagnosis:
        return Diagnosis(
            f"the secondary's store has failed; it last held {_holding(self.secondary)}",
            "the VM runs on, and what it changes is tracked",
            "see the secondary's log and status; mend its disks or make room: it tries again by itself, and at once "
            "with `qemu-remus retry-storage` there",
        )


@dataclass(frozen=True, slots=True)
class FailedOver(Refusal):
    """The secondary has taken the VM over from this primary."""

    code: ClassVar[RefusalCode] = RefusalCode.FAILED_OVER

    @property
    def diagnosis(self) -> Diagnosis:
        end = _ended_at(self.secondary, self.primary.generation)
        checkpoint = f" at checkpoint {end}" if end is not None else ""
        return Diagnosis(
            f"the secondary has failed over{checkpoint}: the VM's present is there, this primary's disks are its past",
            "nothing was changed on either side",
            "stop this VM unless it is the one that must live on; to protect the other one, make this host its "
            f"secondary: {_give_up_primary(self.primary)}. To give up the other one instead: "
            f"{_give_up_secondary(self.secondary)}",
        )


@dataclass(frozen=True, slots=True)
class SplitBrain(Refusal):
    """Both sides went on by themselves from one common history."""

    code: ClassVar[RefusalCode] = RefusalCode.SPLIT_BRAIN

    @property
    def diagnosis(self) -> Diagnosis:
        common = _common(self.primary, self.secondary)
        return Diagnosis(
            f"split brain: both sides went on from generation {common}; the primary holds {_holding(self.primary)}, "
            f"the secondary {_holding(self.secondary)}",
            "nothing was changed; each side keeps what it has",
            f"decide which side's data to give up. The secondary's: {_give_up_secondary(self.secondary)}. "
            f"The primary's: stop its VM, and there {_give_up_primary(self.primary)}",
        )


@dataclass(frozen=True, slots=True)
class UnrelatedData(Refusal):
    """The secondary's data are not a copy of this primary's, as far as anybody can tell."""

    code: ClassVar[RefusalCode] = RefusalCode.UNRELATED_DATA

    @property
    def diagnosis(self) -> Diagnosis:
        if self.primary.generation is None:
            hint = (
                "if the primary's --state-dir is a wrong or a new one, give the old one; "
                f"if this copy may be overwritten, {_give_up_secondary(self.secondary)}"
            )
        else:
            hint = f"check --peer; if this copy may be overwritten, {_give_up_secondary(self.secondary)}"
        return Diagnosis(
            f"the secondary's data are not known to be this VM's: the primary holds {_holding(self.primary)}, "
            f"the secondary {_holding(self.secondary)}",
            "nothing was changed",
            hint,
        )


@dataclass(frozen=True, slots=True)
class DisksMismatch(Refusal):
    """The two sides have no disks in common, or there is no place for a full copy."""

    code: ClassVar[RefusalCode] = RefusalCode.DISK_MISMATCH

    @property
    def diagnosis(self) -> Diagnosis:
        return Diagnosis(
            f"the disks differ: the primary has {_disks(self.primary)}; the secondary has {_disks(self.secondary)}",
            "nothing was changed",
            "give the secondary the primary's --disk names, or --disk-dir",
        )


@dataclass(frozen=True, slots=True)
class DiskShrunk(Refusal):
    """Disks of the primary are smaller than at the secondary's checkpoint.

    :param disks: their places in the primary's hello, with the size in bytes that the secondary has.
    """

    disks: tuple[tuple[int, int], ...]

    code: ClassVar[RefusalCode] = RefusalCode.DISK_SHRUNK

    @property
    def diagnosis(self) -> Diagnosis:
        ours = [disk for disk in self.primary.disks if disk.size]
        listed = ", ".join(f"{ours[place].name} from {held} to {ours[place].size} bytes" for place, held in self.disks)
        return Diagnosis(
            f"a disk cannot be made smaller while it is protected: {listed}",
            f"the VM runs on; the secondary keeps {_holding(self.secondary)}, of the old size",
            "make the disk as large as it was: replication goes on by itself then; or start the secondary with an "
            "empty store",
        )


@dataclass(frozen=True, slots=True)
class NoPlace(Refusal):
    """The primary has new disks that the secondary has no place for; the others go on without them.

    :param disks: their names.
    """

    disks: tuple[DiskName, ...]

    code: ClassVar[RefusalCode] = RefusalCode.NO_PLACE

    @property
    def diagnosis(self) -> Diagnosis:
        listed = ", ".join(self.disks)
        return Diagnosis(
            f"the secondary has no place for {listed}",
            "the VM's other disks are protected without it",
            f"start the secondary with --disk {self.disks[0]}=PATH as well, or with --disk-dir",
        )


@dataclass(frozen=True, slots=True)
class NeedsFullSync(Refusal):
    """The secondary holds a consistent checkpoint, and the primary no longer knows what has changed since.

    Only a copy of every block would help, during which that checkpoint is lost: somebody has to say that it may be.

    :param reason: why the difference is not known, for a person.
    :param disks: those whose difference is not known, in the primary's order.
    """

    reason: str
    disks: tuple[DiskName, ...]

    code: ClassVar[RefusalCode] = RefusalCode.NEEDS_FULL_SYNC

    @property
    def diagnosis(self) -> Diagnosis:
        return Diagnosis(
            f"disks {', '.join(self.disks)} would have to be copied in full: {self.reason}",
            f"nothing was changed; the secondary keeps {_holding(self.secondary)}",
            "start the primary with --allow-inconsistent-resync if that copy may be unusable until the sync is done",
        )


Verdict = InitialSync | Incremental | Refusal


def decide(primary: Hello, secondary: Hello) -> Verdict:
    """What these two may do with each other.

    :param primary: the hello of the side that connected.
    :param secondary: the hello of the side that listened.
    """
    if primary.pair != secondary.pair:
        return PairMismatch(primary, secondary)
    if conflict := _conflict(primary, secondary):
        return conflict
    if secondary.disk_state is DiskState.FAILED:
        return StorageFailed(primary, secondary)
    changes = find_changes(primary, secondary)
    if changes is None:
        return DisksMismatch(primary, secondary)
    if secondary.disk_state is DiskState.INCONSISTENT:
        placed = has_places(primary, secondary)
        return _without_checkpoint(primary, secondary) if placed else DisksMismatch(primary, secondary)
    if not changes.kept:
        return DisksMismatch(primary, secondary)
    if secondary.generation is None or secondary.committed is None:
        # A consistent checkpoint without a number or a history: such a hello is wrong, so nothing is touched.
        return UnrelatedData(primary, secondary)
    if primary.generation != secondary.generation:
        if _ended_at(primary, secondary.generation) is not None:
            if not has_places(primary, secondary):
                return DisksMismatch(primary, secondary)
            reason = "the secondary's data are of a history that ended when the VM was taken over"
            return NeedsFullSync(primary, secondary, reason, _names(primary))
        return UnrelatedData(primary, secondary)
    return _difference(primary, secondary, secondary.committed, changes)


def _conflict(primary: Hello, secondary: Hello) -> Refusal | None:
    if primary.role is Role.PRIMARY and primary.generation is not None:
        if _ended_at(secondary, primary.generation) is not None:
            return FailedOver(primary, secondary)
        # Between the decision to fail over and its end, the old generation is still the secondary's.
        if secondary.role is Role.PRIMARY and primary.generation == secondary.generation:
            return FailedOver(primary, secondary)
    if primary.role is not Role.PRIMARY:
        return RoleConflict(primary, secondary)
    known = _ended_at(primary, secondary.generation) is not None
    if primary.generation != secondary.generation and not known and _common(primary, secondary) is not None:
        return SplitBrain(primary, secondary)
    return None if secondary.role is Role.SECONDARY else RoleConflict(primary, secondary)


def _without_checkpoint(primary: Hello, secondary: Hello) -> Verdict:
    """The secondary has nothing that could be lost: an interrupted sync, of whatever generation, begins anew."""
    if secondary.generation is None:
        return InitialSync("the secondary is new")
    if secondary.generation == primary.generation:
        return InitialSync("the last full sync was not completed")
    return InitialSync("the secondary holds what an earlier full sync left unfinished")


def _difference(primary: Hello, secondary: Hello, committed: EpochNumber, changes: DiskChanges) -> Verdict:
    """DESIGN section 3: an epoch applies to a committed checkpoint c iff base <= c."""
    protected = tuple(disk for disk in primary.disks if disk.size)
    if changes.shrunk:
        return DiskShrunk(primary, secondary, changes.shrunk)
    if changes.unplaced:
        return NoPlace(primary, secondary, tuple(protected[place].name for place in changes.unplaced))
    unknown = (
        place
        for place, disk in enumerate(protected)
        if disk.base is None or disk.base > committed or place in changes.added
    )
    return Incremental(committed, secondary.staged, tuple(unknown), changes)


def _ended_at(hello: Hello, generation: Generation | None) -> Base:
    return next((checkpoint for ended, checkpoint in reversed(hello.history) if ended == generation), None)


def _common(primary: Hello, secondary: Hello) -> Generation | None:
    theirs = {generation for generation, _ in secondary.history}
    return next((generation for generation, _ in reversed(primary.history) if generation in theirs), None)


def _names(hello: Hello) -> tuple[DiskName, ...]:
    return tuple(disk.name for disk in hello.disks if disk.size)


def _give_up_secondary(hello: Hello) -> str:
    """How to give up what a store holds; its generation is named, so that no other can be meant."""
    if hello.generation is None:
        return "start the secondary with an empty store"
    return f"start the secondary, on its store, with --force-discard {hello.generation}"


def _give_up_primary(hello: Hello) -> str:
    """The same for a primary, whose state directory becomes the store of a secondary."""
    if hello.generation is None:
        return "start a secondary with an empty store and --overwrite"
    return f"start a secondary with --store on its state directory and --force-discard {hello.generation}"


def _holding(hello: Hello) -> str:
    if hello.generation is None:
        return "no generation"
    held = "no checkpoint" if hello.committed is None else f"checkpoint {hello.committed}"
    staged = "" if hello.staged is None else f" (and {hello.staged}, staged)"
    times = (("begun", written(hello.begun)), ("last decided on", written(hello.decided)))
    when = ", ".join(f"{what} {time}" for what, time in times if time)
    return f"{held}{staged} of generation {hello.generation}{f' ({when})' if when else ''}, {hello.disk_state}"


def _disks(hello: Hello) -> str:
    sizes = (f"{disk.name} ({disk.size or 'unknown'} bytes)" for disk in hello.disks)
    return ", ".join(sizes) or "none"
