"""The superblock: read back as written, or refused; replaced as a whole, whatever happens; and the store's lock."""

import errno
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from qemu_remus.core.errors import FormatError, NoSpace, StoreLocked, SuperblockDamaged, WriteFailed
from qemu_remus.core.model import DiskName, EpochNumber, Generation, InstanceId, PairName, Role
from qemu_remus.storage.files import OsFiles
from qemu_remus.storage.format import pack_document, unpack_document
from qemu_remus.storage.lock import lock_store
from qemu_remus.storage.superblock import (
    Failover,
    PastGeneration,
    StoredDisk,
    StoredDiskState,
    StoredHandover,
    Superblock,
    SyncAttempt,
    decode_superblock,
    encode_superblock,
    read_superblock,
    write_superblock,
)
from tests.memory_disk import MemoryDisk, PowerCut

ROOT = Path("/")
OLD = Generation(UUID(int=1))
NEW = Generation(UUID(int=2))
FULL = Superblock(
    pair=PairName("vm1"),
    role=Role.SECONDARY,
    instance=InstanceId(UUID(int=3)),
    session=4,
    generation=NEW,
    history=(PastGeneration(OLD, EpochNumber(17)), PastGeneration(Generation(UUID(int=9)), None)),
    committed=EpochNumber(5),
    applied=EpochNumber(4),
    highest_epoch=6,
    disks=(StoredDisk(DiskName("sda"), 1 << 30, "/images/a", created=True), StoredDisk(DiskName("sdb"), 512)),
    disk_state=StoredDiskState.CONSISTENT,
    sync=SyncAttempt((True, False), 1 << 40),
    failover=Failover(EpochNumber(5), Generation(UUID(int=7)), (EpochNumber(6), EpochNumber(5)), finished=True),
    begun=1_700_000_000,
    decided=1_700_000_007,
    discarded=(Generation(UUID(int=11)),),
    handover=StoredHandover(EpochNumber(5), Generation(UUID(int=12)), ours=False, finished=True),
)
EMPTY = Superblock(PairName("vm1"), Role.PRIMARY, InstanceId(UUID(int=3)))

GOLDEN_BODY = b"""{
  "pair": "vm1",
  "role": "primary",
  "instance": "00000000-0000-0000-0000-000000000003",
  "session": 0,
  "generation": null,
  "history": [],
  "committed": null,
  "applied": null,
  "highest_epoch": 0,
  "disks": [],
  "disk_state": "inconsistent",
  "sync": null,
  "failover": null,
  "begun": 0,
  "decided": 0,
  "discarded": [],
  "handover": null
}
"""


@pytest.mark.parametrize("superblock", [FULL, EMPTY], ids=["full", "empty"])
def test_what_was_written_is_read(superblock: Superblock) -> None:
    disk = MemoryDisk()
    write_superblock(disk, ROOT, superblock)
    assert read_superblock(disk, ROOT) == superblock
    assert disk.open_files == 0


def test_the_body_is_json_that_a_person_can_read() -> None:
    assert unpack_document(encode_superblock(EMPTY)) == GOLDEN_BODY


def test_a_new_store_has_no_superblock() -> None:
    assert read_superblock(MemoryDisk(), ROOT) is None


def test_a_missing_superblock_beside_a_journal_is_damage() -> None:
    disk = MemoryDisk()
    disk.make_directory(ROOT / "journal")
    disk.make_directory(ROOT / "journal" / NEW.hex)
    with pytest.raises(SuperblockDamaged, match="missing"):
        read_superblock(disk, ROOT)


def test_a_superblock_with_any_byte_changed_is_refused() -> None:
    good = encode_superblock(FULL)
    disk = MemoryDisk()
    write_superblock(disk, ROOT, FULL)
    for position in range(len(good)):
        disk.damage(ROOT / "superblock", position, bytes([good[position] ^ 0x04]))
        with pytest.raises(SuperblockDamaged) as caught:
            read_superblock(disk, ROOT)
        assert caught.value.hint
        disk.damage(ROOT / "superblock", position, good[position : position + 1])
    assert read_superblock(disk, ROOT) == FULL


def test_a_superblock_cut_anywhere_is_refused() -> None:
    disk = MemoryDisk()
    write_superblock(disk, ROOT, FULL)
    for size in range(len(encode_superblock(FULL)) - 1, -1, -1):
        disk.truncate(ROOT / "superblock", size)
        with pytest.raises(SuperblockDamaged):
            read_superblock(disk, ROOT)


def test_a_field_of_another_type_is_refused() -> None:
    with pytest.raises(FormatError, match="session"):
        decode_superblock(pack_document(GOLDEN_BODY.replace(b'"session": 0', b'"session": "0"')))


@pytest.mark.parametrize("seed", range(40))
def test_a_power_cut_leaves_the_old_superblock_or_the_new_one(seed: int) -> None:
    disk = MemoryDisk(random.Random(seed))
    write_superblock(disk, ROOT, EMPTY)
    disk.power_cycle()
    assert read_superblock(disk, ROOT) == EMPTY, "a superblock that was written is durable"
    current = EMPTY
    for step in range(1, 8):
        following = replace(current, session=current.session + 1)
        disk.cut_power_at(step)
        try:
            write_superblock(disk, ROOT, following)
            done = True
        except PowerCut:
            done = False
        disk.power_cycle()
        found = read_superblock(disk, ROOT)
        assert found == following if done else found in (current, following)
        assert found is not None
        current = found


@pytest.mark.parametrize("operation", ["open", "pwrite", "fsync", "rename", "sync_directory"])
@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EIO, WriteFailed)]
)
def test_a_failed_write_says_so_and_leaves_one_of_the_two(operation: str, number: int, error: type) -> None:
    disk = MemoryDisk()
    write_superblock(disk, ROOT, EMPTY)
    disk.fail_next(operation, number)
    with pytest.raises(error):
        write_superblock(disk, ROOT, FULL)
    assert read_superblock(disk, ROOT) in (EMPTY, FULL)
    assert disk.open_files == 0
    write_superblock(disk, ROOT, FULL)
    assert read_superblock(disk, ROOT) == FULL


def test_on_the_real_file_system_too(tmp_path: Path) -> None:
    files = OsFiles()
    assert read_superblock(files, tmp_path) is None
    write_superblock(files, tmp_path, EMPTY)
    write_superblock(files, tmp_path, FULL)
    assert read_superblock(files, tmp_path) == FULL
    assert os.listdir(tmp_path) == ["superblock"]
    assert (tmp_path / "superblock").stat().st_mode & 0o777 == 0o600


def test_a_store_in_use_is_refused_and_its_user_named(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from qemu_remus.storage.lock import lock_store\n"
        "with lock_store(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    )
    store = tmp_path / "store"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(StoreLocked, match=f"process {other.pid} uses"), lock_store(store):
            pass
        other.kill()
    with lock_store(store):
        pass


def test_a_store_can_be_locked_once_within_one_process_and_again_after_release(tmp_path: Path) -> None:
    with lock_store(tmp_path), pytest.raises(StoreLocked), lock_store(tmp_path):
        pass
    with lock_store(tmp_path):
        pass
