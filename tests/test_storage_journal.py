"""The journal's behaviour while it runs: what is durable when, what it costs, what it refuses; recovery has a file of
its own.  Everything on the disk of ``memory_disk``, where "durable" means: there after ``power_cycle()``.
"""

import errno
import random
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest

from qemu_remus.core.errors import ConfigError, InternalError, JournalDamaged, NoSpace, WriteFailed
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import Base, EpochNumber, Generation, PairName
from qemu_remus.storage.files import OsFiles
from qemu_remus.storage.journal import Journal, Recovery, remove_other_journals
from qemu_remus.storage.log import MINIMUM_SEGMENT_SIZE
from tests.memory_disk import MemoryDisk

PAIR = PairName("vm1")
GENERATION = Generation(UUID(int=1))
DIRECTORY = Path("/journal")
SEGMENT = MINIMUM_SEGMENT_SIZE
LIMIT = 4 * SEGMENT

Content = tuple[tuple[tuple[Extent, ...], bytes], ...]


def epoch(number: int) -> EpochNumber:
    return EpochNumber(number)


def open_journal(
    disk: MemoryDisk, *, floor: int = 0, applied: int = 0, create: bool = False, limit: int = LIMIT
) -> tuple[Journal, Recovery]:
    return Journal.open(
        disk,
        DIRECTORY,
        PAIR,
        GENERATION,
        floor=epoch(floor) if floor else None,
        applied=epoch(applied) if applied else None,
        limit=limit,
        segment_size=SEGMENT,
        create=create,
    )


def new_journal(disk: MemoryDisk, *, limit: int = LIMIT) -> Journal:
    return open_journal(disk, create=True, limit=limit)[0]


def put(journal: Journal, number: int, *pieces: bytes, base: Base = None) -> Content:
    """Begin an epoch and append one extent per piece."""
    journal.begin_epoch(epoch(number), base)
    content = tuple(((Extent(0, 512 * number, len(piece)),), piece) for piece in pieces)
    for extents, data in content:
        journal.append(epoch(number), extents, data)
    return content


def get(journal: Journal, number: int) -> Content:
    return tuple((extents, bytes(data)) for extents, data in journal.read_epoch(epoch(number)))


@pytest.fixture
def disk() -> MemoryDisk:
    return MemoryDisk(random.Random(1))


def test_a_new_journal_is_durable_at_once(disk: MemoryDisk) -> None:
    new_journal(disk)
    disk.power_cycle()
    assert open_journal(disk)[1] == Recovery(None, (), (), 0, 0)


def test_a_missing_journal_is_damage_unless_it_is_to_be_created(disk: MemoryDisk) -> None:
    with pytest.raises(JournalDamaged, match="there is no journal"):
        open_journal(disk)
    new_journal(disk)
    open_journal(disk)


def test_a_staged_epoch_survives_and_can_be_committed_afterwards(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    content = put(journal, 1, b"one", b"two")
    journal.stage(epoch(1))
    disk.power_cycle()
    journal, recovery = open_journal(disk)
    assert (recovery.committed, recovery.staged, recovery.in_doubt) == (None, (1,), 1)
    journal.commit(epoch(1))
    disk.power_cycle()
    journal, recovery = open_journal(disk, floor=1)
    assert (recovery.committed, recovery.unapplied, recovery.staged) == (1, (1,), ())
    assert get(journal, 1) == content


def test_staging_and_committing_at_once_costs_one_sync(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    disk.calls.clear()
    content = put(journal, 1, b"x" * 5000)
    assert disk.calls["fdatasync"] == disk.calls["fsync"] == 0, "append syncs nothing"
    journal.stage_and_commit(epoch(1))
    assert (disk.calls["fdatasync"], disk.calls["fsync"]) == (1, 0)
    disk.power_cycle()
    journal, recovery = open_journal(disk)
    assert recovery.committed == 1
    assert get(journal, 1) == content


def test_the_commit_of_a_staged_epoch_costs_one_small_record_and_one_sync(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    put(journal, 1, b"a" * 4096)
    journal.stage(epoch(1))
    disk.calls.clear()
    journal.commit(epoch(1))
    assert dict(disk.calls) == {"pwrite": 1, "fdatasync": 1}


def test_an_epoch_of_nothing_costs_one_small_record_and_one_sync(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    free = journal.free_bytes
    disk.calls.clear()
    put(journal, 1)
    journal.stage_and_commit(epoch(1))
    assert dict(disk.calls) == {"pwrite": 1, "fdatasync": 1}
    assert free - journal.free_bytes == 4096
    disk.power_cycle()
    journal, recovery = open_journal(disk)
    assert (recovery.committed, recovery.unapplied) == (1, (1,))
    assert get(journal, 1) == ()


def test_an_epoch_of_nothing_that_is_staged_survives_as_staged(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    put(journal, 1)
    journal.stage(epoch(1))
    disk.power_cycle()
    assert open_journal(disk)[1].staged == (1,)


def test_zero_extents_travel_without_data(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    journal.begin_epoch(epoch(1), None)
    extents = (Extent(0, 0, 1 << 40, zero=True), Extent(1, 7, 2), Extent(0, 1 << 40, 512, zero=True))
    journal.append(epoch(1), extents, b"ab")
    journal.stage_and_commit(epoch(1))
    assert get(journal, 1) == ((extents, b"ab"),)
    assert journal.backlog_bytes == 2


def test_data_may_be_any_buffer(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    journal.begin_epoch(epoch(1), None)
    for buffer in (b"abc", bytearray(b"abc"), memoryview(b"xabcx")[1:4]):
        journal.append(epoch(1), (Extent(0, 0, 3),), buffer)
    journal.stage_and_commit(epoch(1))
    assert [data for _, data in get(journal, 1)] == [b"abc"] * 3


def test_an_aborted_epoch_does_not_come_back(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    put(journal, 1, b"x")
    journal.stage(epoch(1))
    journal.abort(epoch(1))
    disk.power_cycle()
    journal, recovery = open_journal(disk)
    assert (recovery.staged, recovery.committed, recovery.highest_epoch) == ((), None, 1)
    journal.abort(epoch(1))
    with pytest.raises(InternalError, match="not staged"):
        journal.commit(epoch(1))


def test_an_unfinished_epoch_is_dropped_silently(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    put(journal, 1, b"x" * 1000)
    journal.drop_unfinished()
    content = put(journal, 2, b"y")
    journal.stage_and_commit(epoch(2))
    put(journal, 3, b"z")
    disk.restart()
    journal, recovery = open_journal(disk)
    assert (recovery.committed, recovery.unapplied, recovery.staged) == (2, (2,), ())
    assert recovery.highest_epoch == 3, "its number is used all the same"
    assert recovery.dropped_tail_bytes > 0
    assert get(journal, 2) == content


def test_a_later_commit_drops_what_was_staged_before(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    put(journal, 1, b"one")
    journal.stage(epoch(1))
    second = put(journal, 2, b"two")
    journal.stage(epoch(2))
    assert list(journal.staged) == [1, 2]
    journal.commit(epoch(2))
    assert list(journal.staged) == []
    disk.power_cycle()
    journal, recovery = open_journal(disk)
    assert (recovery.committed, recovery.unapplied, recovery.staged) == (2, (2,), ())
    assert get(journal, 2) == second


def test_an_epoch_in_doubt_can_be_committed_while_the_next_is_coming(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    first = put(journal, 1, b"one")
    journal.stage(epoch(1))
    second = put(journal, 2, b"two", b"three")
    journal.commit(epoch(1))
    journal.stage(epoch(2))
    disk.power_cycle()
    journal, recovery = open_journal(disk)
    assert (recovery.committed, recovery.staged) == (1, (2,))
    journal.commit(epoch(2))
    assert get(journal, 1) == first
    assert get(journal, 2) == second


def test_committing_twice_is_committing_once(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    put(journal, 1, b"one")
    journal.stage(epoch(1))
    journal.commit(epoch(1))
    disk.calls.clear()
    journal.commit(epoch(1))
    assert not disk.calls


def test_numbers_that_do_not_fit_are_a_defect(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    with pytest.raises(InternalError, match="does not fit"):
        journal.begin_epoch(epoch(1), epoch(1))
    put(journal, 2, b"x")
    journal.stage_and_commit(epoch(2))
    for number, base in ((1, None), (2, None), (3, 3)):
        with pytest.raises(InternalError, match="does not fit"):
            journal.begin_epoch(epoch(number), epoch(base) if base else None)
    with pytest.raises(InternalError, match="not begun"):
        journal.append(epoch(3), (Extent(0, 0, 1),), b"x")
    with pytest.raises(InternalError, match="is committed"):
        journal.abort(epoch(2))
    journal.begin_epoch(epoch(3), epoch(2))
    with pytest.raises(InternalError, match="do not fit their data"):
        journal.append(epoch(3), (Extent(0, 0, 2),), b"x")
    with pytest.raises(InternalError, match="does not fit into a segment"):
        journal.append(epoch(3), (Extent(0, 0, SEGMENT),), bytes(SEGMENT))


def test_sizes_that_make_no_sense_are_refused(disk: MemoryDisk) -> None:
    with pytest.raises(ConfigError, match="cannot be"):
        open_journal(disk, create=True, limit=2 * SEGMENT - 1)


def fill(journal: Journal, number: int, size: int = 10_000) -> int:
    """Append to a new epoch until it does not fit any more: how often it did."""
    journal.begin_epoch(epoch(number), journal.committed)
    for count in range(10_000):
        try:
            journal.append(epoch(number), (Extent(0, count * size, size),), bytes([count % 256]) * size)
        except NoSpace as error:
            assert "is full" in error.what  # noqa: PT017 -- how often it was not raised is the question
            return count
    raise AssertionError("the journal has no limit")


def test_an_epoch_that_outgrows_the_limit_is_refused_and_the_journal_goes_on(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    content = put(journal, 1, b"one")
    journal.stage_and_commit(epoch(1))
    assert fill(journal, 2) >= 4 * 4
    assert not journal.poisoned
    assert sum(len(disk.file(path).seen) for path in segment_paths(disk)) <= LIMIT
    with pytest.raises(NoSpace):
        journal.append(epoch(2), (Extent(0, 0, 10_000),), bytes(10_000))
    journal.drop_unfinished()
    # Nothing of epoch 2 is needed, and epoch 1 is applied: everything is free again.
    journal.trim(epoch(1))
    third = put(journal, 3, b"z" * 10_000)
    journal.stage_and_commit(epoch(3))
    disk.power_cycle()
    journal, recovery = open_journal(disk, floor=3, applied=1)
    assert recovery.unapplied == (3,)
    assert get(journal, 3) == third
    assert content


def test_what_is_refused_for_space_can_be_repeated_after_a_trim(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    put(journal, 1, *[b"a" * 10_000] * 10)
    journal.stage_and_commit(epoch(1))
    count = fill(journal, 2)
    journal.trim(epoch(1))
    journal.append(epoch(2), (Extent(0, count * 10_000, 10_000),), bytes([count]) * 10_000)
    journal.stage_and_commit(epoch(2))
    disk.power_cycle()
    journal, _ = open_journal(disk, floor=2, applied=1)
    assert [data for _, data in get(journal, 2)] == [bytes([number]) * 10_000 for number in range(count + 1)]


@pytest.mark.parametrize("decide", ["commit", "abort"])
def test_a_full_journal_still_takes_the_decision_on_what_is_staged(disk: MemoryDisk, decide: str) -> None:
    journal = new_journal(disk)
    put(journal, 1)
    journal.stage_and_commit(epoch(1))
    content = put(journal, 2, *[b"2" * 900] * 60)
    journal.stage(epoch(2))
    journal.trim(epoch(1))
    fill(journal, 3, 100)
    getattr(journal, decide)(epoch(2))
    disk.power_cycle()
    journal, recovery = open_journal(disk, applied=1)
    assert (recovery.committed, recovery.staged) == ((2, ()) if decide == "commit" else (1, ()))
    if decide == "commit":
        assert get(journal, 2) == content


def test_segments_are_used_again_and_no_file_is_made_beyond_need(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    for number in range(1, 120):
        content = put(journal, number, bytes([number]) * 9_000, base=journal.committed)
        journal.stage_and_commit(epoch(number))
        journal.trim(epoch(number))
    assert disk.calls["allocate"] == len(segment_paths(disk)) <= 3
    disk.power_cycle()
    journal, recovery = open_journal(disk, floor=119, applied=118)
    assert recovery.unapplied == (119,)
    assert get(journal, 119) == content


def test_trimming_keeps_what_is_not_applied_and_what_is_in_doubt(disk: MemoryDisk) -> None:
    journal = new_journal(disk, limit=16 * SEGMENT)
    contents = {}
    for number in range(1, 9):
        contents[number] = put(journal, number, bytes([number]) * 30_000, base=journal.committed)
        journal.stage_and_commit(epoch(number))
    contents[9] = put(journal, 9, b"9" * 30_000, base=epoch(8))
    journal.stage(epoch(9))
    free = journal.free_bytes
    journal.trim(epoch(6))
    assert journal.free_bytes > free
    assert (journal.unapplied, journal.staged, journal.backlog_bytes) == ((7, 8), (9,), 60_000)
    with pytest.raises(InternalError, match="not there"):
        get(journal, 6)
    disk.power_cycle()
    journal, recovery = open_journal(disk, floor=8, applied=6, limit=16 * SEGMENT)
    assert (recovery.unapplied, recovery.staged) == ((7, 8), (9,))
    journal.commit(epoch(9))
    assert {number: get(journal, number) for number in (7, 8, 9)} == {n: contents[n] for n in (7, 8, 9)}


def segment_paths(disk: MemoryDisk) -> list[Path]:
    home = DIRECTORY / GENERATION.hex
    return sorted(home / name for name in disk.list(home))


@pytest.mark.parametrize("operation", ["pwrite", "fdatasync"])
@pytest.mark.parametrize(
    ("number", "error"), [(errno.EIO, WriteFailed), (errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace)]
)
def test_after_a_failed_write_or_sync_nothing_more_is_taken(
    disk: MemoryDisk, operation: str, number: int, error: type[Exception]
) -> None:
    journal = new_journal(disk)
    content = put(journal, 1, b"one")
    journal.stage_and_commit(epoch(1))
    put(journal, 2, b"two")
    disk.fail_next(operation, number)
    with pytest.raises(error):
        journal.stage(epoch(2))
    assert journal.poisoned
    writes = disk.operations
    calls: tuple[Callable[[], None], ...] = (
        lambda: journal.stage(epoch(2)),
        lambda: journal.stage_and_commit(epoch(2)),
        lambda: journal.append(epoch(2), (Extent(0, 0, 1),), b"x"),
        lambda: journal.begin_epoch(epoch(3), epoch(1)),
        lambda: journal.commit(epoch(1)),
        lambda: journal.abort(epoch(2)),
    )
    for call in calls:
        with pytest.raises(WriteFailed, match="takes nothing more"):
            call()
    assert disk.operations == writes
    assert get(journal, 1) == content, "what was durable before can still be applied"
    journal.close()
    journal, recovery = open_journal(disk, floor=1)
    assert recovery.committed == 1
    disk.power_cycle()
    assert open_journal(disk, floor=1)[1].staged == recovery.staged, "what recovery reported is on the device"


def test_a_file_system_without_space_for_a_segment_refuses_without_harm() -> None:
    disk = MemoryDisk(capacity=SEGMENT + SEGMENT // 2)
    journal = new_journal(disk)
    put(journal, 1, *[bytes(10_000)] * 4)
    with pytest.raises(NoSpace, match="No space left"):
        journal.append(epoch(1), (Extent(0, 0, 10_000),), bytes(10_000))
    assert not journal.poisoned
    assert len(segment_paths(disk)) == 1
    journal.drop_unfinished()
    disk.capacity = None
    put(journal, 2, bytes(40_000))
    journal.stage_and_commit(epoch(2))
    disk.power_cycle()
    assert open_journal(disk, floor=2)[1].unapplied == (2,)


def test_a_journal_of_another_pair_or_generation_is_refused(disk: MemoryDisk) -> None:
    new_journal(disk).close()
    with pytest.raises(JournalDamaged, match="another pair"):
        Journal.open(disk, DIRECTORY, PairName("vm2"), GENERATION, floor=None, applied=None)
    other = Generation(UUID(int=2))
    disk.rename(DIRECTORY / GENERATION.hex, DIRECTORY / other.hex)
    with pytest.raises(JournalDamaged, match="another pair or generation"):
        Journal.open(disk, DIRECTORY, PAIR, other, floor=None, applied=None)
    assert disk.open_files == 0


def test_a_new_generation_starts_empty_and_the_old_one_can_be_removed(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    put(journal, 1, b"x")
    journal.stage_and_commit(epoch(1))
    journal.close()
    other = Generation(UUID(int=2))
    _, recovery = Journal.open(disk, DIRECTORY, PAIR, other, floor=None, applied=None, create=True)
    assert recovery == Recovery(None, (), (), 0, 0)
    assert open_journal(disk)[1].committed == 1
    remove_other_journals(disk, DIRECTORY, other)
    assert disk.list(DIRECTORY) == [other.hex]
    remove_other_journals(disk, DIRECTORY, None)
    assert disk.list(DIRECTORY) == []


def test_a_changed_segment_size_and_a_lower_limit_take_effect_as_segments_get_free(disk: MemoryDisk) -> None:
    journal = new_journal(disk, limit=8 * SEGMENT)
    contents = {}
    for number in range(1, 8):
        contents[number] = put(journal, number, bytes([number]) * 30_000, base=journal.committed)
        journal.stage_and_commit(epoch(number))
    journal.close()
    journal, _ = Journal.open(
        disk,
        DIRECTORY,
        PAIR,
        GENERATION,
        floor=epoch(7),
        applied=epoch(2),
        limit=4 * SEGMENT,
        segment_size=2 * SEGMENT,
    )
    assert get(journal, 3) == contents[3]
    journal.trim(epoch(7))
    for number in range(8, 30):
        contents[number] = put(journal, number, bytes([number]) * 30_000, base=journal.committed)
        journal.stage_and_commit(epoch(number))
        journal.trim(epoch(number - 1))
    assert get(journal, 29) == contents[29]
    assert sum(len(disk.file(path).seen) for path in segment_paths(disk)) <= 4 * SEGMENT


def test_closing_closes_every_file(disk: MemoryDisk) -> None:
    journal = new_journal(disk)
    for number in range(1, 10):
        put(journal, number, bytes(20_000), base=journal.committed)
        journal.stage_and_commit(epoch(number))
        journal.trim(epoch(number))
    journal.close()
    journal.close()
    assert disk.open_files == 0
    with pytest.raises(InternalError, match="closed"):
        journal.begin_epoch(epoch(10), None)


def test_applying_may_run_beside_appending(tmp_path: Path) -> None:
    """On real files: one thread takes epochs in, the other reads each committed one and trims it."""
    journal, _ = Journal.open(
        OsFiles(),
        tmp_path / "journal",
        PAIR,
        GENERATION,
        floor=None,
        applied=None,
        limit=8 * SEGMENT,
        segment_size=SEGMENT,
        create=True,
    )
    last = 60
    ready = threading.Semaphore(0)
    wrong: list[object] = []

    def apply() -> None:
        try:
            for number in range(1, last + 1):
                assert ready.acquire(timeout=10)
                wanted = tuple(((Extent(0, part, 700),), bytes([number, part]) * 350) for part in range(5))
                if get(journal, number) != wanted:
                    wrong.append(number)
                journal.trim(epoch(number))
                assert journal.free_bytes >= 0
        except BaseException as error:
            wrong.append(error)

    reader = threading.Thread(target=apply)
    reader.start()
    for number in range(1, last + 1):
        journal.begin_epoch(epoch(number), journal.committed)
        for part in range(5):
            journal.append(epoch(number), (Extent(0, part, 700),), bytes([number, part]) * 350)
        journal.stage_and_commit(epoch(number))
        ready.release()
    reader.join()
    assert wrong == []
    assert journal.unapplied == ()
    journal.close()
