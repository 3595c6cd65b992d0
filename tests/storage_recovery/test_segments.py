"""What a journal of several segments makes of itself where one is missing, damaged, or was used before."""

import random

import pytest

from qemu_remus.core.errors import JournalDamaged
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import EpochNumber
from qemu_remus.storage import format as fmt
from qemu_remus.storage.journal import Journal
from tests.memory_disk import MemoryDisk, PowerCut
from tests.storage_recovery.journals import (
    GENERATION,
    HOME,
    PAIR,
    PATH,
    SEGMENT,
    Content,
    State,
    append_all,
    open_journal,
    segments,
    state_of,
)


def long_history(epochs: int = 60) -> tuple[MemoryDisk, State, EpochNumber]:
    """Segments used several times over; the last two epochs are not applied."""
    disk = MemoryDisk()
    journal, _ = open_journal(disk)
    rng = random.Random(3)
    contents = []
    for number in range(1, epochs + 1):
        epoch = EpochNumber(number)
        content: Content = (((Extent(0, number, 9_000),), rng.randbytes(9_000)),)
        journal.begin_epoch(epoch, journal.committed)
        append_all(journal, epoch, content)
        journal.stage_and_commit(epoch)
        contents.append((epoch, content))
        if number > 2:
            journal.trim(EpochNumber(number - 2))
    journal.close()
    return disk, State(EpochNumber(epochs), tuple(contents[-2:]), ()), EpochNumber(epochs - 2)


LONG_DISK, LONG_STATE, LONG_APPLIED = long_history()


def test_old_records_in_a_segment_used_again_are_not_taken_for_new_ones() -> None:
    assert LONG_DISK.calls["allocate"] < 5, "segments were used again"
    assert state_of(LONG_DISK.copy(), floor=EpochNumber(60), applied=LONG_APPLIED) == LONG_STATE
    newest = max(header.incarnation for header in segments(LONG_DISK).values() if header)
    stale = 0
    for path in segments(LONG_DISK):
        content = LONG_DISK.file(path).seen
        position = content.find(b"QREC")
        while position >= 0:
            record = fmt.unpack_record_header(bytes(content[position : position + 80]))
            stale += record is not None and record.incarnation < newest
            position = content.find(b"QREC", position + 1)
    assert stale > 3, "there are sound old records to be taken for new ones"


def test_a_segment_that_counts_is_missed() -> None:
    headers = {path: header for path, header in segments(LONG_DISK).items() if header}
    newest = max(header.incarnation for header in headers.values())
    oldest = next(header.oldest for header in headers.values() if header.incarnation == newest)
    for path, header in headers.items():
        disk = LONG_DISK.copy()
        disk.unlink(path)
        if header.incarnation >= oldest:
            with pytest.raises(JournalDamaged):
                open_journal(disk, floor=EpochNumber(60), applied=LONG_APPLIED)
        else:
            assert state_of(disk, floor=EpochNumber(60), applied=LONG_APPLIED) == LONG_STATE


def test_a_damaged_segment_header_is_not_a_reason_to_forget_what_follows_it() -> None:
    headers = {path: header for path, header in segments(LONG_DISK).items() if header}
    newest = max(headers, key=lambda path: headers[path].incarnation)
    disk = LONG_DISK.copy()
    disk.damage(newest, 60, b"\xff")
    with pytest.raises(JournalDamaged, match="records follow it"):
        open_journal(disk, applied=LONG_APPLIED)


def test_the_same_segment_twice_is_damage() -> None:
    disk = LONG_DISK.copy()
    path = next(path for path, header in segments(disk).items() if header)
    handle = disk.open(HOME / "000077.segment", create=True)
    disk.pwrite(handle, [bytes(disk.file(path).seen)], 0)
    with pytest.raises(JournalDamaged, match="are the same segment"):
        open_journal(disk, applied=LONG_APPLIED)


@pytest.mark.parametrize("operation", range(1, 7))
def test_a_power_cut_while_a_segment_is_taken_again_costs_nothing(operation: int) -> None:
    """The segment counted when the last header was written; its own header may be neither old nor new now."""
    for seed in range(25):
        disk = MemoryDisk(random.Random(seed))
        journal, _ = Journal.open(
            disk,
            HOME.parent,
            PAIR,
            GENERATION,
            floor=None,
            applied=None,
            limit=2 * SEGMENT,
            segment_size=SEGMENT,
            create=True,
        )
        for number in (1, 2):
            journal.begin_epoch(EpochNumber(number), journal.committed)
            append_all(journal, EpochNumber(number), (((Extent(0, 0, 40_000),), bytes(40_000)),))
            journal.stage_and_commit(EpochNumber(number))
        journal.trim(EpochNumber(1))
        assert (len(disk.list(HOME)), disk.calls["allocate"]) == (2, 2)
        journal.begin_epoch(EpochNumber(3), journal.committed)
        disk.cut_power_at(operation)
        try:
            append_all(journal, EpochNumber(3), (((Extent(0, 0, 40_000),), bytes(40_000)),))
            journal.stage_and_commit(EpochNumber(3))
        except PowerCut:
            pass
        else:
            assert operation > 5
        disk.power_cycle()
        _, recovery = open_journal(disk, floor=EpochNumber(2), applied=EpochNumber(1))
        assert recovery.unapplied in ((2,), (2, 3))


def test_a_dropped_epoch_may_have_lost_the_segments_that_it_began_in() -> None:
    disk = MemoryDisk()
    journal, _ = open_journal(disk)
    journal.begin_epoch(EpochNumber(1), None)
    append_all(journal, EpochNumber(1), (((Extent(0, 0, 20_000),), bytes(20_000)),) * 3)
    journal.stage(EpochNumber(1))
    journal.abort(EpochNumber(1))
    content: Content = (((Extent(0, 0, 40_000),), bytes(40_000)),)
    journal.begin_epoch(EpochNumber(2), None)
    append_all(journal, EpochNumber(2), content)
    journal.stage_and_commit(EpochNumber(2))
    journal.close()
    headers = [header for header in segments(disk).values() if header]
    assert sorted(header.incarnation for header in headers) == [2, 3], "the first was used again"
    assert state_of(disk) == State(EpochNumber(2), ((EpochNumber(2), content),), ())


def test_a_superblock_older_than_the_journal_is_noticed() -> None:
    with pytest.raises(JournalDamaged, match="begins behind epoch"):
        open_journal(LONG_DISK.copy(), applied=EpochNumber(3))


def test_damage_in_an_older_segment_is_damage_wherever_it_is() -> None:
    disk = MemoryDisk()
    journal, _ = open_journal(disk)
    journal.begin_epoch(EpochNumber(1), None)
    append_all(journal, EpochNumber(1), (((Extent(0, 0, 20_000),), bytes(20_000)),) * 4)
    journal.close()
    assert len(segments(disk)) == 2
    assert open_journal(disk.copy())[1].highest_epoch == 1
    disk.damage(PATH, 4096 + 30, b"\xff")
    with pytest.raises(JournalDamaged, match="gap"):
        open_journal(disk)
