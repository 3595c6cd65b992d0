"""What the journal makes of itself after random use, power cuts, faults and damage."""

import errno
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qemu_remus.core.errors import JournalDamaged, NoSpace, StorageError
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import Base, EpochNumber
from qemu_remus.storage.journal import Journal, Recovery
from tests.memory_disk import MemoryDisk, PowerCut
from tests.storage_recovery.journals import (
    HOME,
    SEGMENT,
    Content,
    append_all,
    content_of,
    make_content,
    open_journal,
    segments,
)


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
