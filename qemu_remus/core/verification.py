"""Comparing the copy with the VM's disks while both go on: what has been looked at, what was found, what is next.

Pure data and functions; what may not enter: I/O, clocks, and when there is time for it (the primary's machine).

It goes slice by slice.  A slice's blocks are read from the live disk, the secondary says which of them are not in its
last committed checkpoint, and *then* the dirty bitmap that reaches back to that checkpoint is looked at:

- a block that differs and is clean has not been written since the checkpoint: the copy is wrong there;
- one that differs and is dirty says nothing: the guest has written it, and the present epoch brings it to the secondary
  whatever that holds.  It is looked at again later, and after a few times counted as *rewritten*.

So nothing is taken for wrong because the guest has written, and what is neither the same nor reported is being sent.
What is repaired goes into the present epoch as it was read: what the guest writes later is in the bitmap, and wins.  It
counts as repaired once that epoch is committed; where it is lost, the ranges are looked at once more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from qemu_remus.core.extents import Extent, coalesce, split
from qemu_remus.core.model import DiskName

COARSE: Final = 64 << 10
"""Bytes of a block that is asked about first."""

FINE: Final = 4 << 10
"""Bytes of the blocks in which a difference is reported: the bitmaps' usual granularity."""

SLICE_SPAN: Final = 32 << 20
"""Most bytes of the disk that a slice is about."""

SLICE_DATA: Final = 4 << 20
"""Most bytes that a slice reads: nothing else is done with the VM's disks meanwhile."""

SLICE_DATA_LEAST: Final = 256 << 10
"""To this a slice shrinks where the checkpoints leave no time for more."""

TRIES: Final = 3
"""Looks at a block that the guest keeps writing."""

SUSPECTS_LIMIT: Final = 512
"""Most ranges that wait for another look; what is beyond counts as rewritten at once."""

REPAIR_LIMIT: Final = 32 << 20
"""Bytes of repairs in one epoch, from which on the next slice waits for the epoch's commit: they have to fit into the
secondary's journal."""

RANGES_LIMIT: Final = 256
"""Most ranges that are listed."""


class Ending(StrEnum):
    """How a verification has ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be verified.

    :param number: tells a controller's verifications apart, from 1.
    :param disks: by their place in the pair, without repetition.
    :param sizes: of these disks, in bytes.
    :param repair: send what differs.
    :param rate: bytes a second that are read at most; None: no limit.
    :param names: of these disks, for reports: their places may be others' when it has ended.
    """

    number: int
    disks: tuple[int, ...]
    sizes: tuple[int, ...]
    repair: bool = False
    rate: float | None = None
    names: tuple[DiskName, ...] = ()

    def name_of(self, place: int) -> DiskName:
        """The name of the disk at this place."""
        return dict(zip(self.disks, self.names, strict=False)).get(place, DiskName(f"disk{place}"))


@dataclass(frozen=True, slots=True)
class Piece:
    """One slice.

    :param extent: the range of a disk, from a multiple of ``block`` to another or to the disk's end.
    :param block: bytes of the blocks to begin with, ``COARSE`` or ``FINE``.
    :param data: bytes after which no more is read.
    """

    extent: Extent
    block: int
    data: int


@dataclass(frozen=True, slots=True)
class Findings:
    """What a slice has brought. The extents are of its piece, sorted, and do not overlap.

    :param reached: first byte that is not known, counted from the disk's start; the piece's offset where nothing is.
    :param wrong: other on the secondary, and not written since its checkpoint.
    :param written: other on the secondary, and written since.
    :param sent: those of ``wrong`` whose contents were handed to the link, within the present epoch.
    """

    reached: int
    wrong: tuple[Extent, ...] = ()
    written: tuple[Extent, ...] = ()
    sent: tuple[Extent, ...] = ()


@dataclass(frozen=True, slots=True)
class Suspect:
    """A range that needs another look.

    :param tries: looks that were of no use.
    :param known: it has been found wrong before, and is counted; its repair was lost.
    """

    extent: Extent
    tries: int = 0
    known: bool = False


@dataclass(frozen=True, slots=True)
class Verification:
    """How far a verification has come.

    :param place: the disk under way, an index into the order's disks; their number behind the last one.
    :param position: bytes of that disk that have been looked at.
    :param suspects: what will be looked at again, behind all disks.
    :param present: the suspect that the slice under way is about.
    :param data: bytes that the next slice may read.
    :param ranges: what was found wrong, sorted, neighbours joined; not more than ``RANGES_LIMIT``.
    :param truncated: there is more than ``ranges`` says.
    :param found: how many ranges were found wrong, listed or not.
    :param wrong_bytes: in them.
    :param sent: repairs that the present epoch carries.
    :param repaired_bytes: whose epoch is committed.
    :param rewritten_bytes: that the guest had changed at each look: the epochs have sent them anew.
    :param ending: None while it goes on.
    :param reason: of a failure, for a person.
    """

    order: Order
    place: int = 0
    position: int = 0
    suspects: tuple[Suspect, ...] = ()
    present: Suspect | None = None
    data: int = SLICE_DATA
    ranges: tuple[Extent, ...] = ()
    truncated: bool = False
    found: int = 0
    wrong_bytes: int = 0
    sent: tuple[Extent, ...] = ()
    repaired_bytes: int = 0
    rewritten_bytes: int = 0
    ending: Ending | None = None
    reason: str = ""

    @property
    def going_on(self) -> bool:
        """It has not ended."""
        return self.ending is None

    @property
    def total_bytes(self) -> int:
        """Of all disks that are verified."""
        return sum(self.order.sizes)

    @property
    def done_bytes(self) -> int:
        """That need no further look."""
        waiting = sum(suspect.extent.length for suspect in self.suspects)
        return sum(self.order.sizes[: self.place]) + self.position - waiting


def next_piece(state: Verification) -> Piece | None:
    """What to look at next; None where there is nothing, or nothing before a commit."""
    if not state.going_on or _length(state.sent) >= REPAIR_LIMIT:
        return None
    if state.place < len(state.order.disks):
        length = min(SLICE_SPAN, state.order.sizes[state.place] - state.position)
        return Piece(Extent(state.order.disks[state.place], state.position, length), COARSE, state.data)
    if state.suspects:
        return Piece(state.suspects[0].extent, FINE, state.data)
    return None


def begun(state: Verification) -> Verification:
    """The next piece is being looked at."""
    scanning = state.place < len(state.order.disks)
    return replace(state, present=None if scanning else state.suspects[0])


def looked(state: Verification, findings: Findings) -> Verification:
    """A slice has ended."""
    suspect = state.present
    state = replace(state, present=None, data=_next_data(state, findings))
    state = replace(state, sent=(*state.sent, *findings.sent))
    if suspect is None:
        state = _advanced(state, findings.reached)
        state = _counted(state, findings.wrong)
    else:
        state = _seen_again(state, suspect, findings)
    tries = 1 if suspect is None else suspect.tries + 1
    known = suspect is not None and suspect.known
    for extent in findings.written:
        state = _wait(state, Suspect(extent, tries, known))
    if state.order.repair:
        # Found, and the slice was ended before it could be sent.
        for extent in _without(findings.wrong, findings.sent):
            state = _wait(state, Suspect(extent, 0, known=True))
    return _perhaps_completed(state)


def committed(state: Verification) -> Verification:
    """The epoch that carries what was sent is committed."""
    if not state.sent:
        return state
    repaired = state.repaired_bytes + _length(state.sent)
    return _perhaps_completed(replace(state, sent=(), repaired_bytes=repaired))


def lost(state: Verification) -> Verification:
    """That epoch may not come to the secondary."""
    again = tuple(Suspect(extent, 0, known=True) for extent in coalesce(sorted(state.sent, key=_place)))
    return replace(state, sent=(), present=None, suspects=(*state.suspects, *again))


def ended(state: Verification, ending: Ending, reason: str = "") -> Verification:
    """It goes on no more."""
    return replace(state, ending=ending, reason=reason) if state.going_on else state


def _next_data(state: Verification, findings: Findings) -> int:
    piece = next_piece(replace(state, sent=()))
    stuck = piece is not None and findings.reached <= piece.extent.offset
    return max(SLICE_DATA_LEAST, state.data // 2) if stuck else min(SLICE_DATA, state.data * 2)


def _advanced(state: Verification, reached: int) -> Verification:
    place, position = state.place, max(state.position, reached)
    if position >= state.order.sizes[place]:
        place, position = place + 1, 0
    return replace(state, place=place, position=position)


def _counted(state: Verification, wrong: Iterable[Extent]) -> Verification:
    for extent in wrong:
        ranges, joined = _listed(state.ranges, extent)
        full = len(ranges) > RANGES_LIMIT
        state = replace(
            state,
            ranges=state.ranges if full else ranges,
            truncated=state.truncated or full,
            found=state.found + 1 - joined,
            wrong_bytes=state.wrong_bytes + extent.length,
        )
    return state


def _listed(ranges: tuple[Extent, ...], extent: Extent) -> tuple[tuple[Extent, ...], int]:
    """With one more range in it, which no other overlaps; and how many others it has joined."""
    at = bisect_left(ranges, _place(extent), key=_place)
    near = tuple(coalesce((*ranges[max(0, at - 1) : at], extent, *ranges[at : at + 1])))
    before, behind = ranges[: max(0, at - 1)], ranges[at + 1 :]
    together = (*before, *near, *behind)
    return together, len(ranges) + 1 - len(together)


def _seen_again(state: Verification, suspect: Suspect, findings: Findings) -> Verification:
    extent = suspect.extent
    reached = min(max(findings.reached, extent.offset), extent.end)
    rest = state.suspects[1:]
    if reached < extent.end:
        rest = (replace(suspect, extent=Extent(extent.disk, reached, extent.end - reached)), *rest)
    state = replace(state, suspects=rest)
    if not suspect.known:
        return _counted(state, findings.wrong)
    # Whatever is no longer wrong there has been mended by the epoch that seemed lost, or by the guest itself.
    open_still = _length(findings.wrong) + _length(findings.written)
    return replace(state, repaired_bytes=state.repaired_bytes + reached - extent.offset - open_still)


def _wait(state: Verification, suspect: Suspect) -> Verification:
    if suspect.tries < TRIES and len(state.suspects) < SUSPECTS_LIMIT:
        return replace(state, suspects=(*state.suspects, suspect))
    if suspect.known and suspect.tries < TRIES:
        # It is wrong, and must not be forgotten.
        return replace(state, suspects=(*state.suspects, suspect))
    length = suspect.extent.length
    if suspect.known:
        return replace(state, repaired_bytes=state.repaired_bytes + length)
    return replace(state, rewritten_bytes=state.rewritten_bytes + length)


def _perhaps_completed(state: Verification) -> Verification:
    if state.going_on and not state.sent and not state.suspects and state.place == len(state.order.disks):
        return ended(state, Ending.COMPLETED)
    return state


def _length(extents: Iterable[Extent]) -> int:
    return sum(extent.length for extent in extents)


def _place(extent: Extent) -> tuple[int, int]:
    return extent.disk, extent.offset


def overlap(extent: Extent, other: Extent) -> Extent | None:
    """What is in both."""
    start, end = max(extent.offset, other.offset), min(extent.end, other.end)
    return Extent(extent.disk, start, end - start) if extent.disk == other.disk and start < end else None


def _without(extents: Iterable[Extent], others: Iterable[Extent]) -> Iterator[Extent]:
    """Those parts that are in none of the others."""
    taken = sorted(others, key=_place)
    for extent in extents:
        start = extent.offset
        for other in taken:
            common = overlap(extent, other)
            if common is None:
                continue
            if start < common.offset:
                yield Extent(extent.disk, start, common.offset - start)
            start = max(start, common.end)
        if start < extent.end:
            yield Extent(extent.disk, start, extent.end - start)


def sort_out(differing: Iterable[Extent], dirty: Iterable[Extent]) -> tuple[tuple[Extent, ...], tuple[Extent, ...]]:
    """Tell what the guest has written from what is wrong.

    :param differing: what differs, in multiples of ``FINE``.
    :param dirty: what the bitmap says, looked at after the blocks were read.
    :return: the clean parts of what differs, and the dirty ones; sorted, neighbours joined.
    """
    blocks = [block for extent in differing for block in split(extent, FINE)]
    marked = sorted(dirty, key=_place)
    ends = [(extent.disk, extent.end) for extent in marked]
    clean: list[Extent] = []
    written: list[Extent] = []
    for block in sorted(blocks, key=_place):
        # The first that ends behind the block's start is the only one that can touch it first.
        at = bisect_left(ends, (block.disk, block.offset + 1))
        touched = at < len(marked) and overlap(block, marked[at]) is not None
        (written if touched else clean).append(block)
    return tuple(coalesce(clean)), tuple(coalesce(written))
