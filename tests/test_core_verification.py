"""The course of a verification: what is looked at, counted, looked at again, and repaired.

A model of a slice stands for the primary: disks are lists of 4 KiB blocks, of which the guest has written some since
the secondary's checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core import verification as module
from qemu_remus.core.extents import Extent, coalesce
from qemu_remus.core.verification import (
    COARSE,
    FINE,
    RANGES_LIMIT,
    REPAIR_LIMIT,
    SLICE_DATA,
    SLICE_DATA_LEAST,
    SLICE_SPAN,
    SUSPECTS_LIMIT,
    TRIES,
    Ending,
    Findings,
    Order,
    Piece,
    Suspect,
    Verification,
    begun,
    committed,
    ended,
    looked,
    lost,
    next_piece,
    sort_out,
)

SIZE = 96 << 20
ODD = COARSE + 512


def begin(*sizes: int, repair: bool = False) -> Verification:
    return Verification(Order(1, tuple(range(len(sizes))), sizes, repair))


def extents(*ranges: tuple[int, int, int]) -> tuple[Extent, ...]:
    """In blocks of 4 KiB: disk, first, count."""
    return tuple(Extent(disk, first * FINE, count * FINE) for disk, first, count in ranges)


def look(state: Verification, findings: Findings | None = None) -> Verification:
    """One slice, by default with nothing found in all of its piece."""
    piece = next_piece(state)
    assert piece is not None
    return looked(begun(state), findings or Findings(piece.extent.end))


def found(state: Verification, **fields: tuple[Extent, ...]) -> Verification:
    """One slice that reaches its piece's end."""
    piece = next_piece(state)
    assert piece is not None
    return look(state, Findings(piece.extent.end, **fields))


def test_all_disks_are_looked_at_from_their_starts_to_their_ends() -> None:
    state = begin(SIZE, ODD)
    seen = []
    while (piece := next_piece(state)) is not None:
        seen.append(piece)
        state = look(state)
    assert [piece.extent for piece in seen] == [
        *(Extent(0, start, SLICE_SPAN) for start in range(0, SIZE, SLICE_SPAN)),
        Extent(1, 0, ODD),
    ]
    assert {piece.block for piece in seen} == {COARSE}
    assert state.ending is Ending.COMPLETED
    assert state.done_bytes == state.total_bytes == SIZE + ODD


def test_a_slice_may_read_less_than_its_piece() -> None:
    state = look(begin(SIZE), Findings(COARSE))
    assert state.done_bytes == COARSE
    piece = next_piece(state)
    assert piece is not None
    assert piece.extent == Extent(0, COARSE, SLICE_SPAN)


def test_slices_shrink_where_there_is_no_time_and_grow_again() -> None:
    state = begin(SIZE)
    for _ in range(10):
        state = look(state, Findings(0))
    assert next_piece(state) == Piece(Extent(0, 0, SLICE_SPAN), COARSE, SLICE_DATA_LEAST)
    for part in range(1, 10):
        state = look(state, Findings(part * COARSE))
    assert state.data == SLICE_DATA


def test_what_is_wrong_is_counted_and_listed_with_its_neighbours_joined() -> None:
    state = found(begin(SIZE), wrong=extents((0, 0, 1), (0, 8191, 1)))
    state = found(state, wrong=extents((0, 8192, 2)))
    assert state.ranges == extents((0, 0, 1), (0, 8191, 3))
    assert (state.found, state.wrong_bytes) == (2, 4 * FINE)


def test_the_list_is_bounded_and_says_so() -> None:
    many = extents(*((0, 2 * number, 1) for number in range(RANGES_LIMIT + 9)))
    state = found(begin(SIZE), wrong=many)
    assert state.truncated
    assert len(state.ranges) == RANGES_LIMIT
    assert (state.found, state.wrong_bytes) == (RANGES_LIMIT + 9, (RANGES_LIMIT + 9) * FINE)


def test_what_the_guest_writes_is_looked_at_again_and_is_no_difference() -> None:
    state = found(begin(ODD), written=extents((0, 3, 2)))
    assert state.going_on
    assert state.done_bytes == ODD - 2 * FINE
    assert next_piece(state) == Piece(extents((0, 3, 2))[0], FINE, SLICE_DATA)
    state = look(state)
    assert state.ending is Ending.COMPLETED
    assert (state.found, state.rewritten_bytes) == (0, 0)


def test_what_it_writes_each_time_counts_as_rewritten() -> None:
    state = begin(ODD)
    for _ in range(TRIES):
        state = found(state, written=extents((0, 3, 2)))
    assert state.ending is Ending.COMPLETED
    assert (state.found, state.rewritten_bytes) == (0, 2 * FINE)


def test_what_waits_for_another_look_is_bounded() -> None:
    state = begin(SIZE)
    for first in range(3):
        ranges = ((0, first * 8192 + 2 * number, 1) for number in range(SUSPECTS_LIMIT))
        state = found(state, written=extents(*ranges))
    assert len(state.suspects) == SUSPECTS_LIMIT
    assert state.rewritten_bytes == 2 * SUSPECTS_LIMIT * FINE


def test_wrong_behind_a_busy_block_is_found_at_the_next_look() -> None:
    state = found(begin(ODD), written=extents((0, 3, 2)))
    state = found(state, wrong=extents((0, 4, 1)))
    assert state.ranges == extents((0, 4, 1))
    assert state.ending is Ending.COMPLETED


def test_a_repair_counts_once_its_epoch_is_committed() -> None:
    wrong = extents((0, 3, 2))
    state = found(begin(ODD, repair=True), wrong=wrong, sent=wrong)
    assert state.going_on
    assert next_piece(state) is None
    assert state.repaired_bytes == 0
    state = committed(state)
    assert state.ending is Ending.COMPLETED
    assert state.repaired_bytes == state.wrong_bytes == 2 * FINE


def test_a_repair_whose_epoch_is_lost_is_looked_at_again_and_not_counted_twice() -> None:
    wrong = extents((0, 3, 2))
    state = lost(found(begin(ODD, repair=True), wrong=wrong, sent=wrong))
    state = found(state, wrong=extents((0, 4, 1)), sent=extents((0, 4, 1)))
    # the other one has been mended by the epoch that seemed lost, or by the guest
    assert state.repaired_bytes == FINE
    state = committed(state)
    assert (state.found, state.wrong_bytes, state.repaired_bytes) == (1, 2 * FINE, 2 * FINE)
    assert state.ending is Ending.COMPLETED


def test_a_repair_that_was_not_sent_in_time_is_not_forgotten() -> None:
    state = found(begin(ODD, repair=True), wrong=extents((0, 2, 4)), sent=extents((0, 3, 1)))
    assert [suspect.extent for suspect in state.suspects] == list(extents((0, 2, 1), (0, 4, 2)))
    state = committed(state)
    while (piece := next_piece(state)) is not None:
        state = committed(found(state, wrong=(piece.extent,), sent=(piece.extent,)))
    assert state.ending is Ending.COMPLETED
    assert (state.found, state.wrong_bytes, state.repaired_bytes) == (1, 4 * FINE, 4 * FINE)


def test_an_epoch_carries_a_bounded_amount_of_repairs() -> None:
    state = begin(SIZE, repair=True)
    half = Extent(0, 0, REPAIR_LIMIT // 2), Extent(0, REPAIR_LIMIT, REPAIR_LIMIT // 2)
    state = found(found(state, wrong=half[:1], sent=half[:1]), wrong=half[1:], sent=half[1:])
    assert next_piece(state) is None
    assert next_piece(committed(state)) is not None


def test_what_has_ended_stays_as_it_is() -> None:
    state = ended(begin(ODD), Ending.CANCELLED)
    assert next_piece(state) is None
    assert ended(state, Ending.FAILED, "why") == state
    assert look_at(state).ending is Ending.CANCELLED


def look_at(state: Verification) -> Verification:
    """The end of a slice that was under way when the verification was cancelled."""
    return looked(state, Findings(ODD))


def test_no_known_difference_is_dropped_where_much_waits() -> None:
    waiting = tuple(Suspect(extent) for extent in extents(*((0, 2 * n, 1) for n in range(SUSPECTS_LIMIT))))
    state = replace(begin(SIZE, repair=True), suspects=waiting)
    state = found(state, wrong=extents((0, 8001, 1)))
    assert Suspect(extents((0, 8001, 1))[0], 0, known=True) in state.suspects


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_sorting_out_tells_written_blocks_from_clean_ones(differing: set[int], dirty: set[int]) -> None:
    def of(blocks: Iterable[int]) -> list[Extent]:
        return list(coalesce(extents(*((0, block, 1) for block in sorted(blocks)))))

    clean, written = sort_out(of(differing), [*of(dirty), Extent(1, 0, 1 << 30)])
    assert list(clean) == of(differing - dirty)
    assert list(written) == of(differing & dirty)


def test_a_coarse_bitmap_covers_all_that_it_touches() -> None:
    clean, written = sort_out(extents((0, 0, 16)), [Extent(0, 2 * FINE, 2 * FINE), Extent(0, 8 * FINE + 512, 512)])
    assert clean == extents((0, 0, 2), (0, 4, 4), (0, 9, 7))
    assert written == extents((0, 2, 2), (0, 8, 1))


class Model:
    """A disk, its copy, and the epochs between them, block by block."""

    def __init__(self, rng: random.Random, blocks: int, *, repair: bool) -> None:
        self.rng = rng
        self.live = [0] * blocks
        self.copy = [0] * blocks
        self.dirty: set[int] = set()
        self.damaged: set[int] = set()
        self.extents: dict[int, int] = {}
        self.repair = repair
        self.values = 0

    def write(self) -> None:
        self.values += 1
        block = self.rng.randrange(len(self.live))
        self.live[block] = self.values
        self.dirty.add(block)

    def damage(self) -> None:
        block = self.rng.randrange(len(self.live))
        self.copy[block] = -1
        self.damaged.add(block)

    def slice(self, piece: Piece) -> Findings:
        first = piece.extent.offset // FINE
        end = min(first + self.rng.randrange(1, 40), piece.extent.end // FINE)
        if self.rng.random() < 0.2:
            return Findings(piece.extent.offset)
        read = self.live[first:end]
        for _ in range(self.rng.randrange(3)):
            self.write()
        differing = [first + at for at, value in enumerate(read) if value != self.copy[first + at]]
        wrong, written = sort_out(
            extents(*((0, block, 1) for block in differing)), extents(*((0, block, 1) for block in sorted(self.dirty)))
        )
        sent = wrong[: self.rng.randrange(len(wrong) + 1)] if self.repair else ()
        for extent in sent:
            for block in range(extent.offset // FINE, extent.end // FINE):
                self.extents[block] = read[block - first]
        return Findings(end * FINE, wrong, written, sent)

    def commit(self) -> None:
        for block, value in self.extents.items():
            self.copy[block] = value
        for block in self.dirty:
            self.copy[block] = self.live[block]
        self.forget()
        self.dirty.clear()

    def forget(self) -> None:
        self.extents.clear()


@pytest.mark.parametrize("repair", [True, False])
@given(seed=st.integers(0, 1 << 30))
def test_no_false_alarm_nothing_missed_and_a_repaired_copy_is_exact(repair: bool, seed: int) -> None:
    rng = random.Random(seed)
    model = Model(rng, rng.randrange(1, 200), repair=repair)
    for _ in range(rng.randrange(60)):
        model.write()
    model.commit()
    for _ in range(rng.randrange(30)):
        model.damage()
    state = begin(len(model.live) * FINE, repair=repair)
    for _ in range(5000):
        if not state.going_on:
            break
        choice = rng.random()
        piece = next_piece(state)
        if choice < 0.6 and piece is not None:
            state = looked(begun(state), model.slice(piece))
        elif choice < 0.8:
            model.commit()
            state = committed(state)
        elif choice < 0.9:
            model.forget()
            state = lost(state)
        else:
            model.write()
    assert state.ending is Ending.COMPLETED
    listed = {block for extent in state.ranges for block in range(extent.offset // FINE, extent.end // FINE)}
    assert listed <= model.damaged
    assert state.wrong_bytes == len(listed) * FINE
    model.commit()
    assert state.repaired_bytes == (state.wrong_bytes if repair else 0)
    left = {block for block, value in enumerate(model.copy) if value != model.live[block]}
    assert left == set() if repair else left <= listed


def test_the_module_promises_what_the_wire_can_carry() -> None:
    from qemu_remus.core.comparison import BLOCKS_LIMIT, is_block_size

    assert is_block_size(COARSE)
    assert is_block_size(FINE)
    assert SLICE_SPAN // COARSE <= BLOCKS_LIMIT
    assert module.SLICE_SPAN % COARSE == 0
