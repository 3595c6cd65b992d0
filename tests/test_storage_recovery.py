"""What the journal makes of itself after a crash, a power cut or damage.

The measure is always the same: a recovered journal is, exactly, a state that it was in, and one that lies at or after
the last thing that was acknowledged; anything else is ``JournalDamaged``.  Never a state that it was not in.
"""

import errno
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_remus.core.errors import JournalDamaged, NoSpace, StorageError
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import Base, EpochNumber, Generation, PairName
from qemu_remus.storage import format as fmt
from qemu_remus.storage.journal import Journal, Recovery
from qemu_remus.storage.log import MINIMUM_SEGMENT_SIZE
from tests.memory_disk import MemoryDisk, PowerCut

PAIR = PairName("vm1")
GENERATION = Generation(UUID(int=1))
HOME = Path("/journal") / GENERATION.hex
SEGMENT = MINIMUM_SEGMENT_SIZE

Content = tuple[tuple[tuple[Extent, ...], bytes], ...]


@dataclass(frozen=True)
class State:
    """What a journal holds, contents included."""

    committed: Base
    unapplied: tuple[tuple[EpochNumber, Content], ...]
    staged: tuple[tuple[EpochNumber, Content], ...]


def open_journal(disk: MemoryDisk, *, floor: Base = None, applied: Base = None) -> tuple[Journal, Recovery]:
    return Journal.open(
        disk,
        HOME.parent,
        PAIR,
        GENERATION,
        floor=floor,
        applied=applied,
        limit=5 * SEGMENT,
        segment_size=SEGMENT,
        create=True,
    )


def content_of(journal: Journal, epoch: EpochNumber) -> Content:
    return tuple((extents, bytes(data)) for extents, data in journal.read_epoch(epoch))


def state_of(disk: MemoryDisk, *, floor: Base = None, applied: Base = None) -> State:
    """Recover and read everything; staged epochs are committed, one after the other, to read them too."""
    journal, recovery = open_journal(disk, floor=floor, applied=applied)
    try:
        unapplied = tuple((epoch, content_of(journal, epoch)) for epoch in recovery.unapplied)
        staged = []
        for epoch in recovery.staged:
            journal.commit(epoch)
            staged.append((epoch, content_of(journal, epoch)))
    finally:
        journal.close()
    return State(recovery.committed, unapplied, tuple(staged))


def make_content(rng: random.Random, largest: int) -> Content:
    """Of random shape; with ``largest`` 0 all records have one size, so that old and new ones line up."""
    if not largest:
        return tuple(((Extent(0, rng.randrange(1 << 40), 100),), rng.randbytes(100)) for _ in range(rng.randrange(4)))
    pieces = []
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        extents = tuple(
            Extent(rng.randrange(3), rng.randrange(1 << 40), rng.randint(1, largest), zero=rng.random() < 0.2)
            for _ in range(rng.randint(1, 3))
        )
        pieces.append((extents, rng.randbytes(sum(extent.payload for extent in extents))))
    return tuple(pieces)


def append_all(journal: Journal, epoch: EpochNumber, content: Content) -> None:
    for extents, data in content:
        journal.append(epoch, extents, data)


# --- damage at every byte --------------------------------------------------------------------------------------------


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
PATH = HOME / "000001.segment"


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


# --- several segments ------------------------------------------------------------------------------------------------


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


def segments(disk: MemoryDisk) -> dict[Path, fmt.SegmentHeader | None]:
    return {HOME / name: fmt.unpack_segment_header(bytes(disk.file(HOME / name).seen[:96])) for name in disk.list(HOME)}


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


# --- random histories, power cuts ------------------------------------------------------------------------------------


@dataclass
class Truth:
    """What was acknowledged, and what was being asked for when the power went."""

    contents: dict[EpochNumber, Content] = field(default_factory=dict)
    committed: Base = None
    staged: set[EpochNumber] = field(default_factory=set)
    applied: Base = None
    highest: int = 0
    # The call that was not answered.
    asked: tuple[str, EpochNumber] | None = None

    def check(self, journal: Journal, recovery: Recovery) -> None:
        committed, staged = self.committed, set(self.staged)
        verb, epoch = self.asked or ("", EpochNumber(0))
        if verb in ("commit", "stage_and_commit") and recovery.committed == epoch:
            committed = epoch
        if verb == "stage" and epoch in recovery.staged:
            staged.add(epoch)
        if verb == "abort" and epoch not in recovery.staged:
            staged.discard(epoch)
        staged = {number for number in staged if number > (committed or 0)}
        assert recovery.committed == committed
        assert set(recovery.staged) == staged
        first = (self.applied or 0) + 1
        assert [number for number in recovery.unapplied if number < first] == []
        for number in recovery.unapplied:
            assert content_of(journal, number) == self.contents[number], number
        # From here on this is what counts: it was reported.
        self.committed, self.staged, self.asked = committed, staged, None
        self.highest = max(self.highest, recovery.highest_epoch)


class Run:
    """Random use of a journal, with everything that can go wrong."""

    def __init__(self, rng: random.Random, *, largest: int) -> None:
        self.rng = rng
        self.largest = largest
        self.disk = MemoryDisk(rng)
        self.truth = Truth()
        self.journal, _ = open_journal(self.disk)
        self.committed_unapplied: list[EpochNumber] = []

    def ask(self, verb: str, epoch: EpochNumber) -> None:
        self.truth.asked = (verb, epoch)
        getattr(self.journal, verb)(epoch)
        self.truth.asked = None

    def step(self) -> None:
        truth, rng = self.truth, self.rng
        choice = rng.random()
        if truth.staged and choice < 0.5:
            epoch = max(truth.staged)
            verb = rng.choice(("commit", "commit", "abort"))
            self.ask(verb, epoch)
            if verb == "commit":
                truth.committed = epoch
                truth.staged.clear()
            else:
                truth.staged.discard(epoch)
        elif choice < 0.6 and self.journal.unapplied:
            # The superblock's part: it is durable before the journal hears of it.
            truth.applied = rng.choice(self.journal.unapplied)
            self.journal.trim(truth.applied)
        else:
            self.epoch()

    def epoch(self) -> None:
        truth, rng = self.truth, self.rng
        truth.highest += 1
        epoch = EpochNumber(truth.highest)
        content = make_content(rng, self.largest)
        truth.contents[epoch] = content
        self.journal.begin_epoch(epoch, truth.committed)
        try:
            append_all(self.journal, epoch, content)
            end = rng.random()
            if end < 0.1:
                self.journal.drop_unfinished()
            elif end < 0.5 and not truth.staged:
                self.ask("stage", epoch)
                truth.staged.add(epoch)
            else:
                self.ask("stage_and_commit", epoch)
                truth.committed = epoch
                truth.staged.clear()
        except NoSpace:
            assert not self.journal.poisoned
            truth.asked = None
            self.journal.drop_unfinished()
            if self.journal.unapplied:
                truth.applied = self.journal.unapplied[-1]
                self.journal.trim(truth.applied)

    def recover(self) -> None:
        self.journal, recovery = open_journal(self.disk, floor=self.truth.committed, applied=self.truth.applied)
        self.truth.check(self.journal, recovery)

    def round(self) -> None:
        """Run until something goes wrong, then recover."""
        rng, disk = self.rng, self.disk
        fault = rng.choice(("power", "power", "power", "sync", "write", "kill"))
        if fault == "power":
            disk.cut_power_at(rng.randint(1, 60))
        try:
            for _ in range(rng.randint(1, 25)):
                if fault in ("sync", "write") and rng.random() < 0.1:
                    disk.fail_next({"sync": rng.choice(("fdatasync", "fsync")), "write": "pwrite"}[fault], errno.EIO)
                self.step()
        except PowerCut:
            pass
        except StorageError:
            assert self.journal.poisoned
        if fault in ("sync", "write", "kill"):
            disk.restart()
            disk.fail_next("fsync", errno.EIO)
            with pytest.raises(StorageError):
                open_journal(disk, floor=self.truth.committed, applied=self.truth.applied)
            disk.cut_power_at(None)
            self._forget_faults()
            self.recover()
        self._cycle_and_recover()

    def _forget_faults(self) -> None:
        self.disk._faults.clear()

    def _cycle_and_recover(self) -> None:
        """Recovery itself may lose its power, again and again."""
        self.disk.power_cycle()
        for operation in self.rng.sample(range(1, 12), k=2):
            self.disk.cut_power_at(operation)
            try:
                self.recover()
            except PowerCut:
                self.disk.power_cycle()
        self.disk.cut_power_at(None)
        self.recover()


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("largest", [0, 300, 6_000, 15_000])
def test_whatever_goes_wrong_what_was_acknowledged_is_there_and_exact(seed: int, largest: int) -> None:
    run = Run(random.Random(f"{seed}/{largest}"), largest=largest)
    for _ in range(6):
        run.round()


def test_the_random_runs_reach_what_they_are_for() -> None:
    """Otherwise they would prove nothing: segments used again, epochs in doubt found, tails dropped."""
    reused = doubted = dropped = 0
    for seed in range(12):
        run = Run(random.Random(f"reach {seed}"), largest=6_000)
        for _ in range(6):
            run.round()
            run.disk.power_cycle()
            run.journal, recovery = open_journal(run.disk, floor=run.truth.committed, applied=run.truth.applied)
            doubted += len(recovery.staged)
        for _ in range(40):
            run.step()
        run.journal.begin_epoch(EpochNumber(run.truth.highest + 1), run.truth.committed)
        run.journal.append(EpochNumber(run.truth.highest + 1), (Extent(0, 0, 3),), b"abc")
        run.disk.restart()
        dropped += open_journal(run.disk, applied=run.truth.applied)[1].dropped_tail_bytes > 0
        highest = max(header.incarnation for header in segments(run.disk).values() if header)
        reused += highest > len(segments(run.disk))
    assert min(reused, doubted, dropped) > 2, (reused, doubted, dropped)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(0, 2**20), st.binary(min_size=1, max_size=600)), min_size=1, max_size=3),
)
def test_random_damage_to_a_random_journal_gives_a_state_that_it_was_in_or_an_error(
    seed: int, damage: list[tuple[int, bytes]]
) -> None:
    rng = random.Random(seed)
    disk = MemoryDisk(rng)
    journal, _ = open_journal(disk)
    truth: dict[EpochNumber, Content] = {}
    for number in range(1, 9):
        epoch = EpochNumber(number)
        truth[epoch] = make_content(rng, 4_000)
        journal.begin_epoch(epoch, journal.committed)
        append_all(journal, epoch, truth[epoch])
        journal.stage_and_commit(epoch)
    journal.close()
    paths = sorted(HOME / name for name in disk.list(HOME))
    used = sum(len(disk.file(path).seen) for path in paths)
    for offset, noise in damage:
        path = paths[offset % used // SEGMENT]
        start = offset % SEGMENT
        disk.damage(path, start, noise[: SEGMENT - start])
    try:
        journal, recovery = open_journal(disk)
    except JournalDamaged:
        return
    assert recovery.unapplied == tuple(range(1, (recovery.committed or 0) + 1))
    assert recovery.committed is not None
    assert recovery.committed >= 7, "only the last epoch is not proved by a later one"
    for number in recovery.unapplied:
        assert content_of(journal, number) == truth[number]
