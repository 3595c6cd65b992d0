"""A store whose VM's disks grow, come and go: each checkpoint has the disks, in the sizes, that the VM had at it.

First the journal alone, cut and changed at every byte; then whole stores, on real files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from qemu_remus.core.comparison import blocks_in, digest_blocks
from qemu_remus.core.errors import (
    ConfigError,
    JournalDamaged,
    StorageError,
    TargetHoldsData,
    TargetTooLarge,
    TargetUnsuitable,
    WriteFailed,
)
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import DiskName, DiskSpec, EpochNumber, Generation, PairName
from qemu_remus.core.secondary_machine import Failover, SecondaryState
from qemu_remus.core.settings import Address, SecondaryConfig
from qemu_remus.core.target_spec import raw_target
from qemu_remus.storage import format as fmt
from qemu_remus.storage.format import DiskTable
from qemu_remus.storage.store import Store
from tests.memory_disk import MemoryDisk
from tests.storage_recovery.journals import PATH, open_journal

E1, E2, E3, E4, E5 = map(EpochNumber, (1, 2, 3, 4, 5))

# --- the journal -----------------------------------------------------------------------------------------------------

Tables = tuple[tuple[EpochNumber, DiskTable], ...]
Seen = tuple[int | None, tuple[EpochNumber, ...], Tables]


def history() -> tuple[MemoryDisk, list[Seen]]:
    """Epochs with tables, without, staged, aborted and committed; and the states it went through, each durable."""
    disk = MemoryDisk()
    journal, _ = open_journal(disk)
    states: list[Seen] = [(None, (), ())]

    def note() -> None:
        states.append((journal.committed, journal.staged, tuple(journal.disks_of().items())))

    def begin(epoch: EpochNumber, base: EpochNumber | None, table: DiskTable | None) -> None:
        journal.begin_epoch(epoch, base)
        journal.append(epoch, (Extent(0, epoch, 90),), bytes([epoch]) * 90)
        if table is not None:
            journal.set_disks(epoch, table)
        journal.append(epoch, (Extent(0, epoch + 9, 9, zero=True),), b"")

    begin(E1, None, None)
    journal.stage_and_commit(E1)
    note()
    begin(E2, E1, ((0, 512), (1, 1 << 40)))
    journal.stage(E2)
    note()
    journal.commit(E2)
    note()
    begin(E3, E2, ((0, 1024),))
    journal.stage(E3)
    note()
    journal.abort(E3)
    note()
    begin(E4, E2, None)
    journal.stage_and_commit(E4)
    note()
    begin(E5, E4, ((1, 1 << 41), (2, 4096)))
    journal.stage(E5)
    note()
    journal.close()
    return disk, states


DISK, STATES = history()


def seen_of(disk: MemoryDisk) -> Seen:
    journal, recovery = open_journal(disk)
    try:
        return recovery.committed, recovery.staged, tuple(journal.disks_of().items())
    finally:
        journal.close()


def offsets() -> Iterator[int]:
    content = DISK.file(PATH).seen
    last_used = max(position for position, byte in enumerate(content) if byte)
    for position in range(last_used + 100):
        around = position - position % 16
        if any(content[around : around + 16]):
            yield position


def test_what_an_epoch_says_about_its_disks_is_recovered_with_it() -> None:
    assert seen_of(DISK.copy()) == STATES[-1]
    assert STATES[-1][2] == ((E2, ((0, 512), (1, 1 << 40))), (E5, ((1, 1 << 41), (2, 4096))))


def test_with_any_byte_changed_it_is_an_earlier_state_or_damage() -> None:
    outcomes = {"damaged": 0, "earlier": 0}
    for position in offsets():
        disk = DISK.copy()
        disk.damage(PATH, position, bytes([disk.file(PATH).seen[position] ^ (1 << position % 8)]))
        try:
            seen = seen_of(disk)
        except JournalDamaged:
            outcomes["damaged"] += 1
            continue
        assert seen in (STATES[-1], STATES[-2]), position
        outcomes["earlier"] += seen == STATES[-2]
    assert min(outcomes.values()) > 50, outcomes


def test_cut_at_any_byte_it_is_a_state_that_it_was_in() -> None:
    seen = []
    for size in offsets():
        if size < fmt.SEGMENT_HEADER_SIZE:
            continue
        disk = DISK.copy()
        disk.truncate(PATH, size)
        state = seen_of(disk)
        assert state in STATES, size
        seen.append(state)
    assert len(set(seen)) == len(set(STATES))


# --- the store -------------------------------------------------------------------------------------------------------

BLOCK = 4096
A, B, C = map(DiskName, "abc")
SIZE = 20 * BLOCK + 512


class Site:
    """A store with the disks a and b, at checkpoint 1: a holds 1, b holds 2 everywhere.

    :ivar truth: what the disks held at each checkpoint, by name.
    """

    def __init__(self, directory: Path, **options: object) -> None:
        self.directory = directory
        self.options = options
        (directory / "store").mkdir()
        self.truth: dict[EpochNumber, dict[DiskName, bytearray]] = {}
        self.specs: tuple[DiskSpec, ...] = (DiskSpec(A, SIZE), DiskSpec(B, SIZE))
        self.store = Store.open(self.config())
        state = replace(self.store.recovered, generation=Generation(UUID(int=7)), disks=self.specs)
        self.store.prepare_targets(state)
        self.content = {A: bytearray(b"\1" * SIZE), B: bytearray(b"\2" * SIZE)}
        for index, data in enumerate(self.content.values()):
            self.store.write_images((Extent(index, 0, SIZE),), bytes(data))
        self.store.flush_images()
        self.store.begin_epoch(E1, None, self.specs)
        self.store.set_disks(E1)
        self.store.stage_and_commit(E1)
        self.store.apply_some()
        self._note(E1)

    def config(self) -> SecondaryConfig:
        settings = SecondaryConfig(
            PairName("vm"),
            Address("127.0.0.1", 0),
            self.directory / "store",
            {name: raw_target(self.path(name)) for name in (A, B, C)},
            self.directory / "control",
        )
        return replace(settings, **self.options)  # type: ignore[arg-type]

    def path(self, name: DiskName) -> Path:
        return self.directory / name

    def _note(self, epoch: EpochNumber) -> None:
        self.truth[epoch] = {name: bytearray(self.content[name]) for name in (spec.name for spec in self.specs)}

    def epoch(
        self, epoch: EpochNumber, base: EpochNumber, fill: int, specs: tuple[DiskSpec, ...] | None = None
    ) -> EpochNumber:
        """An epoch that writes all of its disks, so that it can follow upon any other; not staged."""
        self.specs = specs or self.specs
        self.store.begin_epoch(epoch, base, self.specs)
        self.store.set_disks(epoch)
        for place, spec in enumerate(self.specs):
            self.content[spec.name] = bytearray(bytes([fill + place]) * spec.size)
            self.store.append(epoch, (Extent(place, 0, spec.size),), bytes(self.content[spec.name]))
        self._note(epoch)
        return epoch

    def reopen(self) -> SecondaryState:
        """As after a crash: nothing is closed in order."""
        self.crash()
        self.store = Store.open(self.config())
        return self.store.recovered

    def crash(self) -> None:
        self.store._places.release()
        if self.store._journal is not None:
            self.store._journal.close()
        self.store._cleanup.close()

    def fail_over(self, target: EpochNumber) -> None:
        failover = Failover(target, Generation(UUID(int=8)))
        state = replace(self.store.recovered, generation=Generation(UUID(int=7)), failover=failover)
        self.store.save_failover(state)
        if target in self.store._open_journal().staged:
            self.store.commit(target)
        self.store.finish_failover(state)
        for name, content in self.truth[target].items():
            assert self.path(name).read_bytes() == content, name


@contextmanager
def a_site(directory: Path, **options: object) -> Iterator[Site]:
    site = Site(directory, **options)
    try:
        yield site
    finally:
        site.crash()


def with_sizes(**sizes: int) -> tuple[DiskSpec, ...]:
    return tuple(DiskSpec(DiskName(name), size) for name, size in sizes.items())


def test_a_disk_that_grows_has_the_size_of_each_checkpoint(tmp_path: Path) -> None:
    with a_site(tmp_path) as site:
        site.epoch(E2, E1, 10, with_sizes(a=SIZE + 3 * BLOCK, b=SIZE))
        # made room for, and no checkpoint yet
        assert site.path(A).stat().st_size == SIZE + 3 * BLOCK
        state = site.reopen()
        assert (state.committed, state.disks) == (E1, with_sizes(a=SIZE, b=SIZE))
        site.fail_over(E1)


class Held:
    """The lock of an apply that hangs in an image."""

    def __enter__(self) -> None:
        raise AssertionError("somebody waits for the images")

    def __exit__(self, *_: object) -> None:
        raise NotImplementedError


def test_an_epoch_of_the_same_disks_does_not_wait_for_an_apply_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_site(tmp_path) as site:
        with monkeypatch.context() as patch:
            patch.setattr(site.store, "_applying", Held())
            site.epoch(E2, E1, 3)
            site.store.stage_and_commit(E2)
            with pytest.raises(AssertionError, match="waits for the images"):
                site.epoch(E3, E2, 4, with_sizes(a=SIZE + BLOCK, b=SIZE))
        assert site.store.apply_some() == E2


def test_a_larger_disk_that_was_committed_is_recovered_before_and_after_it_is_applied(tmp_path: Path) -> None:
    with a_site(tmp_path) as site:
        site.store.stage_and_commit(site.epoch(E2, E1, 10, with_sizes(a=SIZE + 3 * BLOCK, b=SIZE)))
        assert site.reopen().disks == with_sizes(a=SIZE + 3 * BLOCK, b=SIZE)
        site.store.apply_some()
        # an epoch that says nothing about its disks has those of the one before it
        site.store.stage_and_commit(site.epoch(E3, E2, 20))
        assert site.store._open_journal().disks_of() == {}
        assert site.reopen().disks == with_sizes(a=SIZE + 3 * BLOCK, b=SIZE)
        site.fail_over(E3)


@pytest.mark.parametrize("target", [E2, E3])
def test_of_two_epochs_in_doubt_each_has_its_own_disks(tmp_path: Path, target: EpochNumber) -> None:
    with a_site(tmp_path) as site:
        site.store.stage(site.epoch(E2, E1, 10, with_sizes(a=SIZE + BLOCK, b=SIZE)))
        site.store.stage(site.epoch(E3, E1, 20, with_sizes(b=SIZE + 5 * BLOCK, a=SIZE + 2 * BLOCK)))
        state = site.reopen()
        assert state.disks == with_sizes(a=SIZE, b=SIZE)
        assert dict(state.tables) == {
            E2: with_sizes(a=SIZE + BLOCK, b=SIZE),
            E3: with_sizes(a=SIZE + 2 * BLOCK, b=SIZE + 5 * BLOCK),
        }
        if target == E2:
            site.store.abort(E3)
        site.fail_over(target)


def test_an_epoch_says_its_disks_where_the_one_before_it_may_have_others(tmp_path: Path) -> None:
    """Otherwise it would have those of an epoch in doubt that is committed after all."""
    with a_site(tmp_path) as site:
        site.store.stage(site.epoch(E2, E1, 10, with_sizes(a=SIZE)))
        site.store.stage(site.epoch(E3, E1, 20, with_sizes(a=SIZE, b=SIZE)))
        site.store.commit(E2)
        site.store.commit(E3)
        assert site.reopen().disks == with_sizes(a=SIZE, b=SIZE)


def test_extents_go_to_the_disk_that_the_primary_means_whatever_its_order(tmp_path: Path) -> None:
    with a_site(tmp_path) as site:
        site.store.stage_and_commit(site.epoch(E2, E1, 10, with_sizes(b=SIZE, a=SIZE)))
        assert site.content[A][:1] == b"\x0b"
        ours = digest_blocks(bytes(site.content[A]), BLOCK)
        site.store.apply_some()
        assert not any(blocks_in(site.store.compare(1, 0, BLOCK, ours)))
        site.fail_over(E2)


def test_a_disk_that_goes_leaves_its_image_as_at_the_last_checkpoint_that_had_it(tmp_path: Path) -> None:
    with a_site(tmp_path) as site:
        site.store.stage_and_commit(site.epoch(E2, E1, 10))
        site.store.stage_and_commit(site.epoch(E3, E2, 20, with_sizes(a=SIZE)))
        site.store.apply_some()
        gone = next(disk for disk in site.store.disks() if disk.name == B)
        assert gone.gone == E3
        assert site.path(B).read_bytes() == site.truth[E2][B]
        state = site.reopen()
        assert state.disks == with_sizes(a=SIZE)
        assert B in state.places
        # nobody uses it any more: it may be moved away
        site.path(B).rename(tmp_path / "kept")
        site.fail_over(E3)
        assert (tmp_path / "kept").read_bytes() == site.truth[E2][B]


@pytest.mark.parametrize("size", [SIZE - 3 * BLOCK, SIZE, SIZE + 3 * BLOCK])
@pytest.mark.parametrize("applied", [True, False])
def test_a_disk_that_comes_back_is_of_any_size(tmp_path: Path, size: int, applied: bool) -> None:
    with a_site(tmp_path) as site:
        site.store.stage_and_commit(site.epoch(E2, E1, 10, with_sizes(a=SIZE)))
        if applied:
            site.store.apply_some()
        site.store.stage_and_commit(site.epoch(E3, E2, 20, with_sizes(a=SIZE, b=size)))
        site.reopen()
        site.fail_over(E3)


@pytest.mark.parametrize("crash", [True, False])
def test_a_disk_that_comes_gets_an_image_and_is_part_of_a_checkpoint_with_the_first_commit(
    tmp_path: Path, crash: bool
) -> None:
    with a_site(tmp_path) as site:
        site.epoch(E2, E1, 10, with_sizes(a=SIZE, b=SIZE, c=3 * BLOCK))
        assert site.path(C).stat().st_size == 3 * BLOCK
        if crash:
            assert site.reopen().disks == with_sizes(a=SIZE, b=SIZE)
        else:
            site.store.drop_unfinished()
        site.store.stage_and_commit(site.epoch(E3, E1, 20, with_sizes(a=SIZE, b=SIZE, c=4 * BLOCK)))
        assert site.reopen().disks == with_sizes(a=SIZE, b=SIZE, c=4 * BLOCK)
        site.fail_over(E3)


def test_a_disk_in_the_directory_for_all_others(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    with a_site(tmp_path, disk_dir=tmp_path / "more") as site:
        d = DiskSpec(DiskName("d"), 2 * BLOCK)
        site.store.stage_and_commit(site.epoch(E2, E1, 10, (*site.specs, d)))
        assert (tmp_path / "more" / "d.img").stat().st_size == 2 * BLOCK
        assert site.reopen().disks == (*with_sizes(a=SIZE, b=SIZE), d)
        site.store.apply_some()
        site.options = {}
        with pytest.raises(ConfigError, match="other disks"):
            site.reopen()
        site.options = {"disk_dir": tmp_path / "more"}
        site.store = Store.open(site.config())


def test_a_new_disks_target_that_holds_data_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    with a_site(tmp_path) as site:
        site.path(C).write_bytes(b"somebody's" + bytes(3 * BLOCK - 10))
        with pytest.raises(TargetHoldsData):
            site.store.begin_epoch(E2, E1, with_sizes(a=SIZE, b=SIZE, c=3 * BLOCK))
        with pytest.raises(TargetUnsuitable, match="no target for the disk d"):
            site.store.begin_epoch(E2, E1, with_sizes(a=SIZE, d=SIZE))
        site.store.stage_and_commit(site.epoch(E2, E1, 10))
        site.fail_over(E2)
        assert site.path(C).read_bytes().startswith(b"somebody's")


def not_written(*_: object) -> None:
    raise WriteFailed("it cannot be written")


def no_space(*_: object) -> None:
    raise OSError(28, os.strerror(28))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda patch: patch.setattr(os, "posix_fallocate", no_space),
        lambda patch: patch.setattr("qemu_remus.storage.store.write_superblock", not_written),
    ],
    ids=["image", "superblock"],
)
def test_no_room_for_a_larger_or_a_new_disk_leaves_all_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pytest.MonkeyPatch], None]
) -> None:
    with a_site(tmp_path) as site:
        for wanted in (with_sizes(a=SIZE + BLOCK, b=SIZE), with_sizes(a=SIZE, b=SIZE, c=BLOCK)):
            with monkeypatch.context() as patch:
                spoil(patch)
                with pytest.raises(StorageError):
                    site.store.begin_epoch(E2, E1, wanted)
            assert site.path(A).stat().st_size == SIZE
        site.store.stage_and_commit(site.epoch(E3, E1, 10, with_sizes(a=SIZE + BLOCK, b=SIZE, c=BLOCK)))
        site.reopen()
        site.fail_over(E3)


def test_a_failover_that_was_cut_short_ends_with_the_right_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with a_site(tmp_path) as site:
        site.store.stage_and_commit(site.epoch(E2, E1, 10))
        site.epoch(E3, E2, 20, with_sizes(a=SIZE + BLOCK, b=SIZE + BLOCK))
        site.store.drop_unfinished()
        failover = Failover(E2, Generation(UUID(int=8)))
        state = replace(site.store.recovered, generation=Generation(UUID(int=7)), failover=failover)
        site.store.save_failover(state)
        with monkeypatch.context() as patch:
            patch.setattr("qemu_remus.storage.store.Store.flush_images", no_space)
            with pytest.raises(OSError, match="space"):
                site.store.finish_failover(state)
        assert site.reopen().failover is not None
        site.fail_over(E2)


def begin_copy(store: Store, **sizes: int) -> None:
    store.prepare_targets(replace(store.recovered, generation=Generation(UUID(int=9)), disks=with_sizes(**sizes)))


def test_another_first_copy_may_be_of_a_larger_disk_and_does_not_cut_a_checkpoint(tmp_path: Path) -> None:
    with a_site(tmp_path) as site:
        with pytest.raises(TargetTooLarge):
            begin_copy(site.store, a=SIZE - BLOCK, b=SIZE)
        # the first fits and the second does not: what held a checkpoint still does
        site.path(C).write_bytes(b"somebody's" + bytes(3 * BLOCK - 10))
        with pytest.raises(TargetHoldsData):
            begin_copy(site.store, a=SIZE + BLOCK, c=3 * BLOCK)
        assert site.reopen().disks == with_sizes(a=SIZE, b=SIZE)
        begin_copy(site.store, a=SIZE + 2 * BLOCK, b=SIZE)
        assert site.path(A).stat().st_size == SIZE + 2 * BLOCK
        assert site.reopen().disks == with_sizes(a=SIZE + 2 * BLOCK, b=SIZE)
