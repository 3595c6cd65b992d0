"""Redo: the images equal the committed prefix, however often and from wherever it is done again."""

import random
from pathlib import Path
from uuid import UUID

import pytest

from qemu_remus.core.errors import InternalError, NoSpace, WriteFailed
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import EpochNumber, Generation, PairName
from qemu_remus.storage.apply import apply_epochs
from qemu_remus.storage.files import Buffer, OsFiles
from qemu_remus.storage.journal import Journal
from qemu_remus.storage.targets import prepare_target
from tests.memory_disk import MemoryDisk

SIZE = 64 * 1024


class Image:
    """A target in memory that can fail after so many writes."""

    def __init__(self, failure: NoSpace | WriteFailed | None = None, after: int = 0) -> None:
        self.content = bytearray(SIZE)
        self.flushed = bytes(SIZE)
        self.failure = failure
        self.left = after

    def _count(self) -> None:
        if self.failure is not None:
            if not self.left:
                raise self.failure
            self.left -= 1

    def write(self, offset: int, data: Buffer) -> None:
        self._count()
        self.content[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self._count()
        self.content[offset : offset + length] = bytes(length)

    def flush(self) -> None:
        self._count()
        self.flushed = bytes(self.content)


def make_journal(epochs: int = 5) -> tuple[Journal, list[list[bytes]]]:
    """Epochs over two disks; and both disks' contents at every checkpoint."""
    rng = random.Random(11)
    journal, _ = Journal.open(
        MemoryDisk(),
        Path("/journal"),
        PairName("vm1"),
        Generation(UUID(int=1)),
        floor=None,
        applied=None,
        create=True,
        limit=1 << 20,
        segment_size=1 << 18,
    )
    disks = [bytearray(SIZE), bytearray(SIZE)]
    checkpoints = [[bytes(disk) for disk in disks]]
    for number in range(1, epochs + 1):
        journal.begin_epoch(EpochNumber(number), journal.committed)
        for _ in range(3):
            extents = []
            data = b""
            for _ in range(4):
                length = rng.randint(1, 3000)
                extent = Extent(rng.randrange(2), rng.randrange(SIZE - length), length, zero=rng.random() < 0.3)
                content = bytes(length) if extent.zero else rng.randbytes(length)
                disks[extent.disk][extent.offset : extent.end] = content
                extents.append(extent)
                data += b"" if extent.zero else content
            journal.append(EpochNumber(number), extents, data)
        journal.stage_and_commit(EpochNumber(number))
        checkpoints.append([bytes(disk) for disk in disks])
    return journal, checkpoints


def test_images_equal_the_checkpoint_that_was_applied() -> None:
    journal, checkpoints = make_journal()
    images = [Image(), Image()]
    backlog = journal.backlog_bytes
    written = sum(apply_epochs(journal, [number], images) for number in journal.unapplied[:2])
    assert [image.flushed for image in images] == checkpoints[2]
    written += apply_epochs(journal, journal.unapplied[2:], images)
    assert [image.flushed for image in images] == checkpoints[5]
    assert written == backlog


@pytest.mark.parametrize("failure", [NoSpace("full", hint="make room"), WriteFailed("broken")])
@pytest.mark.parametrize("after", [0, 1, 7, 20, 27])
def test_applying_again_from_the_same_epoch_on_repairs_a_failure_anywhere(
    failure: NoSpace | WriteFailed, after: int
) -> None:
    journal, checkpoints = make_journal()
    images = [Image(failure, after), Image(failure, after)]
    epochs = journal.unapplied
    with pytest.raises(type(failure)) as caught:
        apply_epochs(journal, epochs, images)
    assert "the journal keeps every committed epoch" in caught.value.safe
    assert caught.value.hint == failure.hint
    for image in images:
        image.failure = None
    apply_epochs(journal, epochs, images)
    assert [image.flushed for image in images] == checkpoints[5]


def test_what_was_applied_may_be_applied_again() -> None:
    journal, checkpoints = make_journal()
    images = [Image(), Image()]
    for start in (0, 0, 2, 4):
        apply_epochs(journal, journal.unapplied[start:], images)
        assert [image.flushed for image in images] == checkpoints[5]


def test_an_extent_of_a_disk_that_is_not_there_is_refused() -> None:
    journal, _ = make_journal()
    with pytest.raises(InternalError, match="disk 1 of 1"):
        apply_epochs(journal, journal.unapplied, [Image()])


def test_from_real_files_into_real_files(tmp_path: Path) -> None:
    journal, _ = Journal.open(
        OsFiles(),
        tmp_path / "journal",
        PairName("vm1"),
        Generation(UUID(int=1)),
        floor=None,
        applied=None,
        create=True,
        limit=1 << 18,
        segment_size=1 << 16,
    )
    target = prepare_target(tmp_path / "image", SIZE)
    expected = bytearray(SIZE)
    for number in range(1, 30):
        epoch = EpochNumber(number)
        journal.begin_epoch(epoch, journal.committed)
        offset = number * 1000
        journal.append(epoch, (Extent(0, offset, 9_000), Extent(0, 0, 512, zero=True)), bytes([number]) * 9_000)
        expected[offset : offset + 9_000] = bytes([number]) * 9_000
        journal.stage_and_commit(epoch)
        if number % 3 == 0:
            apply_epochs(journal, journal.unapplied, [target])
            journal.trim(epoch)
    apply_epochs(journal, journal.unapplied, [target])
    expected[:512] = bytes(512)
    assert (tmp_path / "image").read_bytes() == expected
    target.close()
    journal.close()
