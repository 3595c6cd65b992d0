"""The handshake's decision: what two controllers that meet may do with each other's data.

:func:`decide` is pure and total: from the same two hellos both sides come to the same verdict, and whatever the hellos
say, there is one.  A verdict that is a :class:`Refusal` carries both hellos and a diagnosis for a person.  What may not
enter: I/O, and what to do about a verdict, which is the machines' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qemu_remus.core.errors import PeerRefused, RefusalCode, sentences
from qemu_remus.core.messages import Goodbye, Hello
from qemu_remus.core.model import Base, DiskName, DiskState, EpochNumber, Generation, Role

__all__ = [
    "Diagnosis",
    "DisksMismatch",
    "FailedOver",
    "Incremental",
    "InitialSync",
    "NeedsFullSync",
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

    :param base: the newest base of the primary's disks: the secondary's committed checkpoint is at least that.
    :param committed: that checkpoint.
    :param in_doubt: an epoch that is staged there and not committed. The next epoch is a superset of it.
    """

    base: EpochNumber
    committed: EpochNumber
    in_doubt: Base


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
            "see the secondary's log and status; mend its disks, then start it again",
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
            "stop this VM unless it is the one that must live on; to protect the other one, "
            "make this host its secondary with an empty store",
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
            "decide which side's data to give up, and start that side as a secondary with an empty store",
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
                "if this copy may be overwritten, start the secondary with an empty store"
            )
        else:
            hint = "check --peer; if this copy may be overwritten, start the secondary with an empty store"
        return Diagnosis(
            f"the secondary's data are not known to be this VM's: the primary holds {_holding(self.primary)}, "
            f"the secondary {_holding(self.secondary)}",
            "nothing was changed",
            hint,
        )


@dataclass(frozen=True, slots=True)
class DisksMismatch(Refusal):
    """The two sides' disks differ in names or sizes."""

    code: ClassVar[RefusalCode] = RefusalCode.DISK_MISMATCH

    @property
    def diagnosis(self) -> Diagnosis:
        return Diagnosis(
            f"the disks differ: the primary has {_disks(self.primary)}; the secondary has {_disks(self.secondary)}",
            "nothing was changed",
            "give both sides the same --disk names, and the secondary targets of the primary's sizes",
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
    if not _same_disks(primary, secondary):
        return DisksMismatch(primary, secondary)
    if secondary.disk_state is DiskState.INCONSISTENT:
        return _without_checkpoint(primary, secondary)
    if secondary.generation is None or secondary.committed is None:
        # A consistent checkpoint without a number or a history: such a hello is wrong, so nothing is touched.
        return UnrelatedData(primary, secondary)
    if primary.generation != secondary.generation:
        if _ended_at(primary, secondary.generation) is not None:
            reason = "the secondary's data are of a history that ended when the VM was taken over"
            return NeedsFullSync(primary, secondary, reason, _names(primary))
        return UnrelatedData(primary, secondary)
    return _difference(primary, secondary, secondary.committed)


def _conflict(primary: Hello, secondary: Hello) -> Refusal | None:
    if primary.role is Role.PRIMARY and primary.generation is not None:
        if _ended_at(secondary, primary.generation) is not None:
            return FailedOver(primary, secondary)
        # Between the decision to fail over and its end, the old generation is still the secondary's.
        if secondary.role is Role.PRIMARY and primary.generation == secondary.generation:
            return FailedOver(primary, secondary)
    if primary.role is not Role.PRIMARY or secondary.role is not Role.SECONDARY:
        return RoleConflict(primary, secondary)
    known = _ended_at(primary, secondary.generation) is not None
    if primary.generation != secondary.generation and not known and _common(primary, secondary) is not None:
        return SplitBrain(primary, secondary)
    return None


def _without_checkpoint(primary: Hello, secondary: Hello) -> Verdict:
    """The secondary has nothing that could be lost: an interrupted sync, of whatever generation, begins anew."""
    if secondary.generation is None:
        return InitialSync("the secondary is new")
    if secondary.generation == primary.generation:
        return InitialSync("the last full sync was not completed")
    return InitialSync("the secondary holds what an earlier full sync left unfinished")


def _difference(primary: Hello, secondary: Hello, committed: EpochNumber) -> Verdict:
    """DESIGN section 3: an epoch applies to a committed checkpoint c iff base <= c."""
    untracked = tuple(disk.name for disk in primary.disks if disk.base is None)
    if untracked:
        reason = "the primary has no record of what was changed since the last checkpoint"
        return NeedsFullSync(primary, secondary, reason, untracked)
    bases = {disk.name: disk.base for disk in primary.disks if disk.base is not None}
    newer = tuple(name for name, base in bases.items() if base > committed)
    if newer:
        reason = f"the primary's record begins after checkpoint {committed}, the secondary's last"
        return NeedsFullSync(primary, secondary, reason, newer)
    return Incremental(max(bases.values()), committed, secondary.staged)


def _same_disks(primary: Hello, secondary: Hello) -> bool:
    sizes = {disk.name: disk.size for disk in primary.disks}
    theirs = {disk.name: disk.size for disk in secondary.disks}
    if not sizes or len(sizes) != len(primary.disks) or len(theirs) != len(secondary.disks):
        return False
    return sizes.keys() == theirs.keys() and all(size in (0, sizes[name]) for name, size in theirs.items())


def _ended_at(hello: Hello, generation: Generation | None) -> Base:
    return next((checkpoint for ended, checkpoint in reversed(hello.history) if ended == generation), None)


def _common(primary: Hello, secondary: Hello) -> Generation | None:
    theirs = {generation for generation, _ in secondary.history}
    return next((generation for generation, _ in reversed(primary.history) if generation in theirs), None)


def _names(hello: Hello) -> tuple[DiskName, ...]:
    return tuple(disk.name for disk in hello.disks)


def _holding(hello: Hello) -> str:
    if hello.generation is None:
        return "no generation"
    held = "no checkpoint" if hello.committed is None else f"checkpoint {hello.committed}"
    staged = "" if hello.staged is None else f" (and {hello.staged}, staged)"
    return f"{held}{staged} of generation {hello.generation}, {hello.disk_state}"


def _disks(hello: Hello) -> str:
    sizes = (f"{disk.name} ({disk.size or 'unknown'} bytes)" for disk in hello.disks)
    return ", ".join(sizes) or "none"
