"""Giving up what a store holds: exactly what was named, nothing else; and a directory that changes its role."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import pytest

from qemu_remus.core.errors import ConfigError, TargetInUse, TargetTooLarge
from qemu_remus.core.model import DiskName, DiskSpec, DiskState, EpochNumber, Generation, InstanceId, PairName, Role
from qemu_remus.core.secondary_machine import SecondaryState, disk_state, hello
from qemu_remus.core.settings import Address, SecondaryConfig
from qemu_remus.core.target_spec import raw_target
from qemu_remus.storage.files import OsFiles
from qemu_remus.storage.memory import open_memory
from qemu_remus.storage.store import Store
from qemu_remus.storage.superblock import (
    Failover,
    PastGeneration,
    StoredDisk,
    Superblock,
    read_superblock,
    write_superblock,
)
from qemu_remus.storage.targets import prepare_target

if TYPE_CHECKING:
    from collections.abc import Iterator

PAIR = PairName("vm")
VDA = DiskName("vda")
SIZE = 1 << 20
G1, G2, G3 = (Generation(UUID(int=number)) for number in (1, 2, 3))
E7 = EpochNumber(7)


def written(directory: Path, role: Role, **changes: object) -> Superblock:
    superblock = Superblock(PAIR, role, InstanceId(UUID(int=9)))
    superblock = replace(superblock, **changes)  # type: ignore[arg-type]
    directory.mkdir(exist_ok=True)
    write_superblock(OsFiles(), directory, superblock)
    return superblock


def failed_over(directory: Path, image: Path, *, finished: bool = True) -> Superblock:
    """The store of a secondary that has taken over checkpoint 7 of G1 as G2."""
    return written(
        directory,
        Role.SECONDARY,
        generation=G2,
        history=(PastGeneration(G1, E7),),
        committed=E7,
        applied=E7,
        highest_epoch=9,
        disks=(StoredDisk(VDA, SIZE, str(image), created=True),),
        failover=Failover(E7, G2, finished=finished),
        begun=1_700_000_000,
    )


@contextmanager
def opened(directory: Path, image: Path, discard: Generation | None = None) -> Iterator[Store]:
    config = SecondaryConfig(
        PAIR, Address("h", 1), directory, {VDA: raw_target(image)}, directory / "control", discard=discard
    )
    store = Store.open(config)
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"x" * SIZE)
    return path


def begun(store: Store, generation: Generation = G3) -> SecondaryState:
    """A full copy that the winner begins."""
    state = replace(store.recovered, generation=generation, disks=(DiskSpec(VDA, SIZE),))
    assert store.prepare_targets(state) == (False,)
    return state


def test_a_store_that_failed_over_can_be_given_up_and_keeps_what_its_disks_hold(tmp_path: Path, image: Path) -> None:
    failed_over(tmp_path / "store", image)
    with opened(tmp_path / "store", image, G2) as store:
        fresh = hello(store.recovered)
        assert (fresh.role, fresh.generation, fresh.committed, fresh.history) == (Role.SECONDARY, None, None, ())
        assert disk_state(store.recovered) is DiskState.INCONSISTENT
        assert not store.failing_over
        begun(store)
    assert image.read_bytes() == b"x" * SIZE


def test_an_old_primarys_directory_becomes_a_secondarys_store(tmp_path: Path, image: Path) -> None:
    written(tmp_path / "state", Role.PRIMARY, generation=G1, committed=E7, highest_epoch=9, session=4)
    with pytest.raises(ConfigError, match="belongs to the primary"), opened(tmp_path / "state", image):
        pass
    with opened(tmp_path / "state", image, G1) as store:
        assert hello(store.recovered).generation is None
        begun(store)
    assert image.read_bytes() == b"x" * SIZE
    with pytest.raises(ConfigError, match="belongs to the secondary"), open_memory(tmp_path / "state", PAIR):
        pass


@pytest.mark.parametrize("role", Role)
def test_a_word_that_names_another_generation_changes_nothing(tmp_path: Path, image: Path, role: Role) -> None:
    disks = (StoredDisk(VDA, SIZE, str(image)),) if role is Role.SECONDARY else ()
    before = written(tmp_path / "store", role, generation=G1, committed=E7, disks=disks)
    with pytest.raises(ConfigError, match=str(G1)) as caught, opened(tmp_path / "store", image, G2):
        pass
    assert "checkpoint 7" in caught.value.what
    assert caught.value.safe
    assert caught.value.hint
    assert read_superblock(OsFiles(), tmp_path / "store") == before


def test_a_new_store_has_nothing_to_give_up(tmp_path: Path, image: Path) -> None:
    with pytest.raises(ConfigError, match="nothing that could be given up"), opened(tmp_path / "store", image, G1):
        pass


def test_a_failover_that_is_not_finished_is_not_given_up(tmp_path: Path, image: Path) -> None:
    before = failed_over(tmp_path / "store", image, finished=False)
    with pytest.raises(ConfigError, match="middle of a failover"), opened(tmp_path / "store", image, G2):
        pass
    assert read_superblock(OsFiles(), tmp_path / "store") == before


def test_another_pairs_store_is_not_given_up(tmp_path: Path, image: Path) -> None:
    before = written(tmp_path / "store", Role.PRIMARY, generation=G1, pair=PairName("other"))
    with pytest.raises(ConfigError, match="pair other"), opened(tmp_path / "store", image, G1):
        pass
    assert read_superblock(OsFiles(), tmp_path / "store") == before


def test_the_same_word_again_gives_up_nothing_more(tmp_path: Path, image: Path) -> None:
    """As when it stands in a unit file."""
    failed_over(tmp_path / "store", image)
    with opened(tmp_path / "store", image, G2) as store:
        begun(store)
    with opened(tmp_path / "store", image, G2) as store:
        assert store.recovered.generation == G3


def test_a_store_that_was_given_up_is_not_pointed_at_other_disks(tmp_path: Path, image: Path) -> None:
    failed_over(tmp_path / "store", image)
    with opened(tmp_path / "store", image, G2):
        pass
    with pytest.raises(ConfigError, match="other disks"), opened(tmp_path / "store", tmp_path / "precious"):
        pass


def test_leave_to_overwrite_ends_with_the_first_copy(tmp_path: Path, image: Path) -> None:
    failed_over(tmp_path / "store", image)
    with opened(tmp_path / "store", image, G2) as store:
        begun(store)
        smaller = replace(store.recovered, generation=G1, disks=(DiskSpec(VDA, SIZE // 2),))
        with pytest.raises(TargetTooLarge):
            store.prepare_targets(smaller)


def test_disks_that_a_vm_still_uses_are_not_written_to(tmp_path: Path, image: Path) -> None:
    written(tmp_path / "state", Role.PRIMARY, generation=G1, committed=E7)
    user = prepare_target(image, SIZE, overwrite=True)
    try:
        with opened(tmp_path / "state", image, G1) as store, pytest.raises(TargetInUse):
            begun(store)
    finally:
        user.close()


# --- the other way: the copy becomes the VM ---------------------------------------------------------------------------


def test_the_store_that_failed_over_may_be_its_primarys_directory_and_keeps_its_history(
    tmp_path: Path, image: Path
) -> None:
    failed_over(tmp_path / "store", image)
    for _ in range(2):
        with open_memory(tmp_path / "store", PAIR) as memory:
            known = memory.superblock
            assert (known.role, known.generation, known.committed) == (Role.PRIMARY, G2, E7)
            assert known.history == (PastGeneration(G1, E7),)
            assert known.begun == 1_700_000_000
            assert known.failover is None
    with pytest.raises(ConfigError, match="belongs to the primary"), opened(tmp_path / "store", image):
        pass


def test_a_store_that_has_not_failed_over_is_no_primarys(tmp_path: Path, image: Path) -> None:
    written(tmp_path / "store", Role.SECONDARY, generation=G1, committed=E7)
    with pytest.raises(ConfigError, match="belongs to the secondary"), open_memory(tmp_path / "store", PAIR):
        pass
    failed_over(tmp_path / "store", image, finished=False)
    with pytest.raises(ConfigError, match="not finished"), open_memory(tmp_path / "store", PAIR):
        pass


def test_a_primarys_history_is_remembered(tmp_path: Path) -> None:
    with open_memory(tmp_path / "state", PAIR) as memory:
        memory.save(
            generation=G2, committed=E7, highest_epoch=9, session=1, history=((G1, E7),), begun=1_700, decided=1_701
        )
    with open_memory(tmp_path / "state", PAIR) as memory:
        known = memory.superblock
        assert known.history == (PastGeneration(G1, E7),)
        assert (known.begun, known.decided) == (1_700, 1_701)
