"""What the journal makes of itself after damage at any byte, and of records that contradict each other."""

import errno
import random
from collections.abc import Iterator

import pytest

from qemu_remus.core.errors import JournalDamaged
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import EpochNumber
from qemu_remus.storage import format as fmt
from tests.memory_disk import MemoryDisk
from tests.storage_recovery.journals import (
    GENERATION,
    PAIR,
    PATH,
    Content,
    State,
    append_all,
    content_of,
    open_journal,
    state_of,
)


def small_history() -> tuple[MemoryDisk, list[State]]:
    """A journal of one segment with a bit of everything; and the states it went through, each durable."""
    disk = MemoryDisk()
    journal, _ = open_journal(disk)
    rng = random.Random(5)
    contents: list[Content] = [
        (((Extent(0, number, 70 + number), Extent(1, 5, 9, zero=True)), rng.randbytes(70 + number)),)
        for number in range(5)
    ]
    commits: list[tuple[EpochNumber, Content]] = []
    states = [State(None, (), ())]

    def note(staged: tuple[tuple[EpochNumber, Content], ...] = ()) -> None:
        states.append(State(journal.committed, tuple(commits), staged))

    journal.begin_epoch(EpochNumber(1), None)
    append_all(journal, EpochNumber(1), contents[0])
    journal.stage_and_commit(EpochNumber(1))
    commits.append((EpochNumber(1), contents[0]))
    note()
    journal.begin_epoch(EpochNumber(2), EpochNumber(1))
    append_all(journal, EpochNumber(2), contents[1])
    journal.stage(EpochNumber(2))
    note(((EpochNumber(2), contents[1]),))
    journal.abort(EpochNumber(2))
    note()
    journal.begin_epoch(EpochNumber(3), EpochNumber(1))
    append_all(journal, EpochNumber(3), contents[2] + contents[1])
    journal.stage(EpochNumber(3))
    note(((EpochNumber(3), contents[2] + contents[1]),))
    journal.commit(EpochNumber(3))
    commits.append((EpochNumber(3), contents[2] + contents[1]))
    note()
    journal.begin_epoch(EpochNumber(4), EpochNumber(3))
    journal.stage_and_commit(EpochNumber(4))
    commits.append((EpochNumber(4), ()))
    note()
    journal.begin_epoch(EpochNumber(5), EpochNumber(4))
    append_all(journal, EpochNumber(5), contents[3])
    journal.drop_unfinished()
    journal.begin_epoch(EpochNumber(6), EpochNumber(4))
    append_all(journal, EpochNumber(6), contents[4])
    journal.stage(EpochNumber(6))
    note(((EpochNumber(6), contents[4]),))
    journal.close()
    return disk, states


DISK, STATES = small_history()


def interesting_offsets() -> Iterator[int]:
    """Every byte of every header and record, and every 97th of the padding between them."""
    content = DISK.file(PATH).seen
    last_used = max(position for position, byte in enumerate(content) if byte)
    for position in range(last_used + 200):
        around = position - position % 16
        if any(content[around : around + 16]) or position % 97 == 0:
            yield position


def test_the_history_is_recovered_as_it_was() -> None:
    assert state_of(DISK.copy()) == STATES[-1]
    assert len(set(map(repr, STATES))) == len(STATES) - 1, "an abort brings back an earlier state, all others differ"


def test_a_journal_with_any_byte_changed_is_an_earlier_state_or_damaged() -> None:
    outcomes = {"damaged": 0, "earlier": 0, "same": 0}
    for position in interesting_offsets():
        disk = DISK.copy()
        disk.damage(PATH, position, bytes([disk.file(PATH).seen[position] ^ (1 << position % 8)]))
        try:
            state = state_of(disk)
        except JournalDamaged:
            outcomes["damaged"] += 1
            continue
        # Only what no later record proves durable may be taken for a torn write: the last epoch, which was staged.
        assert state in (STATES[-1], STATES[-2]), position
        outcomes["same" if state == STATES[-1] else "earlier"] += 1
    assert min(outcomes.values()) > 50, outcomes


def test_a_changed_byte_never_takes_the_journal_below_the_floor() -> None:
    for position in interesting_offsets():
        if position % 5:
            continue
        disk = DISK.copy()
        disk.damage(PATH, position, bytes([disk.file(PATH).seen[position] ^ 0x80]))
        try:
            state = state_of(disk, floor=EpochNumber(4))
        except JournalDamaged:
            continue
        assert state.committed == 4


def test_a_journal_cut_at_any_byte_is_a_state_that_it_was_in_or_damaged() -> None:
    seen = []
    for size in interesting_offsets():
        disk = DISK.copy()
        disk.truncate(PATH, size)
        if size < fmt.SEGMENT_HEADER_SIZE:
            # Nothing there that was a journal: only the caller knows whether one should be.
            assert state_of(disk) == STATES[0]
            with pytest.raises(JournalDamaged):
                state_of(_cut(size), floor=EpochNumber(1))
            continue
        state = state_of(disk)
        assert state in STATES, size
        seen.append(STATES.index(state))
        if (state.committed or 0) < 4:
            with pytest.raises(JournalDamaged, match="was committed"):
                state_of(_cut(size), floor=EpochNumber(4))
    assert seen == sorted(seen) or STATES[1] == STATES[3]
    assert len(set(seen)) >= len(STATES) - 1


def _cut(size: int) -> MemoryDisk:
    disk = DISK.copy()
    disk.truncate(PATH, size)
    return disk


def test_damage_is_reported_without_changing_anything() -> None:
    disk = DISK.copy()
    disk.damage(PATH, 4096 + 100, b"\xff")
    before = bytes(disk.file(PATH).seen)
    for _ in range(2):
        with pytest.raises(JournalDamaged, match="was durable when") as caught:
            open_journal(disk)
        assert caught.value.safe == "nothing was changed"
        assert caught.value.hint
    assert disk.file(PATH).seen == before
    assert disk.open_files == 0


def test_damage_between_recovery_and_apply_is_noticed() -> None:
    disk = DISK.copy()
    journal, _ = open_journal(disk)
    disk.damage(PATH, 4096 + 150, b"\xff\x00\xff")
    with pytest.raises(JournalDamaged, match="in committed epoch 1"):
        content_of(journal, EpochNumber(1))


def test_a_device_that_cannot_be_read_is_damage() -> None:
    disk = DISK.copy()
    disk.fail_next("pread", errno.EIO)
    with pytest.raises(JournalDamaged, match="cannot be read"):
        open_journal(disk)
    assert disk.open_files == 0


def test_a_dropped_tail_never_comes_back() -> None:
    """A record that was sound, but stood behind a bad one, must not continue what is written over the bad one."""
    disk = MemoryDisk()
    journal, _ = open_journal(disk)
    journal.begin_epoch(EpochNumber(1), None)
    journal.stage_and_commit(EpochNumber(1))
    journal.begin_epoch(EpochNumber(2), EpochNumber(1))
    tail = bytes(disk.file(PATH).seen)
    for letter in (b"a", b"b"):
        journal.append(EpochNumber(2), (Extent(0, 0, 100),), letter * 100)
    journal.stage_and_commit(EpochNumber(2))
    journal.close()
    # The power cut kept the second extent and the commit, and lost the first.
    lost = 8192
    disk.damage(PATH, lost, tail[lost : lost + fmt.record_size(8 + 24 + 100)])
    journal, recovery = open_journal(disk, floor=EpochNumber(1))
    assert (recovery.committed, recovery.highest_epoch) == (1, 2)
    assert recovery.dropped_tail_bytes > 0
    # What is written now ends where the old second extent began, with the sequence number before it.
    journal.begin_epoch(EpochNumber(3), EpochNumber(1))
    journal.append(EpochNumber(3), (Extent(0, 0, 100),), b"c" * 100)
    disk.restart()
    _, recovery = open_journal(disk, floor=EpochNumber(1))
    assert (recovery.committed, recovery.staged) == (1, ())


def forge(disk: MemoryDisk, offset: int, sequence: int, kind: fmt.RecordType, epoch: int, payload: bytes) -> int:
    """Put a sound record of the first segment where it would be read; where the next one goes."""
    header = fmt.RecordHeader(
        type=kind,
        length=len(payload),
        checksum=fmt.checksum(payload),
        pair=fmt.pair_hash(PAIR),
        generation=GENERATION,
        epoch=epoch,
        incarnation=1,
        sequence=sequence,
        durable=sequence,
        offset=offset,
    )
    disk.damage(PATH, offset, fmt.pack_record_header(header) + payload)
    return header.next_offset


def totals(base: int, extents: int = 0, payload: int = 0, digest: int = 0) -> bytes:
    return fmt.pack_totals(fmt.Totals(EpochNumber(base) if base else None, extents, payload, digest))


ONE_EXTENT = fmt.pack_extents((Extent(0, 0, 3),)) + b"abc"
ONE_DIGEST = fmt.extend_digest(0, fmt.checksum(ONE_EXTENT))
EXTENTS, END, COMMIT = fmt.RecordType.EXTENTS, fmt.RecordType.END, fmt.RecordType.COMMIT


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ([(COMMIT, 2, totals(0, 1, 3, ONE_DIGEST))], "not whole: 0 of 1"),
        ([(EXTENTS, 2, ONE_EXTENT), (COMMIT, 2, totals(1, 2, 3, ONE_DIGEST))], "not whole: 1 of 2"),
        ([(EXTENTS, 2, ONE_EXTENT), (COMMIT, 2, totals(1, 1, 4, ONE_DIGEST))], "not whole"),
        ([(EXTENTS, 2, ONE_EXTENT), (END, 2, totals(1, 1, 3, 7))], "not whole"),
        ([(EXTENTS, 2, ONE_EXTENT), (COMMIT, 3, totals(1, 1, 3, ONE_DIGEST))], "epoch 3 is not whole: 0 of 1"),
        ([(END, 2, totals(1)), (COMMIT, 2, totals(1, 1, 3, ONE_DIGEST))], "does not fit what was staged"),
        ([(COMMIT, 3, totals(2))], "builds on epoch 2, which is not there"),
        ([(COMMIT, 1, totals(0))], "epoch 1 is committed after epoch 1"),
        ([(EXTENTS, 2, b"\x09" + bytes(7))], "cut short"),
        ([(END, 2, b"short")], "cut short"),
    ],
)
def test_sound_records_that_contradict_each_other_are_damage(
    records: list[tuple[fmt.RecordType, int, bytes]], complaint: str
) -> None:
    disk = MemoryDisk()
    journal, _ = open_journal(disk)
    journal.begin_epoch(EpochNumber(1), None)
    journal.stage_and_commit(EpochNumber(1))
    journal.close()
    offset = 2 * fmt.BLOCK
    for number, (kind, epoch, payload) in enumerate(records):
        offset = forge(disk, offset, 2 + number, kind, epoch, payload)
    with pytest.raises(JournalDamaged, match=complaint):
        open_journal(disk)
