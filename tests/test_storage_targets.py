"""Targets: which ones are accepted, and that a refused one is left as it was; writing, zeroing, failing.

Files in ``tmp_path`` only; block devices and a real QEMU's locks are integration/test_target_locks.py.
"""

import errno
import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qemu_remus.core.errors import (
    InternalError,
    NoSpace,
    StorageError,
    TargetHoldsData,
    TargetInUse,
    TargetTooLarge,
    TargetTooSmall,
    TargetUnsuitable,
    WriteFailed,
)
from qemu_remus.storage import targets
from qemu_remus.storage.targets import Target, prepare_target, reopen_target

SIZE = 300 * 1024 + 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "image"


@pytest.fixture
def target(path: Path) -> Iterator[Target]:
    target = prepare_target(path, SIZE)
    yield target
    target.close()


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_missing_file_is_created_at_its_size_with_all_of_its_space(path: Path) -> None:
    target = prepare_target(path, SIZE)
    assert (target.created, target.size, path.stat().st_size) == (True, SIZE, SIZE)
    assert allocated(path) >= SIZE
    assert path.stat().st_mode & 0o777 == 0o600
    target.close()


def test_a_sparse_target_takes_no_space_before_it_is_written(path: Path) -> None:
    prepare_target(path, 1 << 30, sparse=True).close()
    assert path.stat().st_size == 1 << 30
    assert allocated(path) < 1 << 20


def test_a_creation_that_fails_leaves_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpace, match="No space left") as caught:
        prepare_target(path, SIZE)
    assert "--sparse" in caught.value.hint
    assert not path.exists()


def test_a_target_in_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetUnsuitable, match="cannot be created"):
        prepare_target(tmp_path / "no" / "image", SIZE)


def test_an_existing_file_of_the_right_size_without_data_is_taken(path: Path) -> None:
    path.write_bytes(bytes(SIZE))
    target = prepare_target(path, SIZE)
    assert not target.created, "only what we created is known to be zero throughout"
    target.close()
    assert path.read_bytes() == bytes(SIZE)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_smaller_file_is_refused_whatever_was_said(path: Path, overwrite: bool) -> None:
    path.write_bytes(bytes(SIZE - 512))
    with pytest.raises(TargetTooSmall, match=str(SIZE)):
        prepare_target(path, SIZE, overwrite=overwrite)
    assert path.stat().st_size == SIZE - 512


def test_a_larger_file_needs_overwrite_and_is_then_cut(path: Path) -> None:
    path.write_bytes(bytes(SIZE + 1))
    with pytest.raises(TargetTooLarge, match=str(SIZE + 1)) as caught:
        prepare_target(path, SIZE)
    assert "--overwrite" in caught.value.hint
    assert path.stat().st_size == SIZE + 1
    prepare_target(path, SIZE, overwrite=True).close()
    assert path.stat().st_size == SIZE


@pytest.mark.parametrize("offset", [0, 1 << 19, (1 << 22) - 1])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_single_byte_is_data_and_needs_overwrite(path: Path, offset: int, sparse: bool) -> None:
    size = 1 << 22
    with path.open("wb") as file:
        file.truncate(size) if sparse else file.write(bytes(size))
        file.seek(offset)
        file.write(b"\x01")
    before = path.read_bytes()
    with pytest.raises(TargetHoldsData, match="holds data"):
        prepare_target(path, size)
    assert path.read_bytes() == before
    target = prepare_target(path, size, overwrite=True)
    assert not target.created
    target.close()
    assert path.read_bytes() == before, "what it holds goes as it is written over, not before"


def test_what_is_neither_file_nor_device_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(TargetUnsuitable, match="neither a file nor a block device"):
            prepare_target(path, SIZE)


def test_two_secondaries_do_not_share_a_target(path: Path, target: Target) -> None:
    with pytest.raises(TargetInUse, match="another disk of this secondary"):
        prepare_target(path, SIZE)
    with pytest.raises(TargetInUse):
        reopen_target(path, SIZE)
    target.close()
    reopen_target(path, SIZE).close()


def test_the_process_that_uses_a_target_is_named(path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from qemu_remus.storage.targets import prepare_target\n"
        "target = prepare_target(Path(sys.argv[1]), 512); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(TargetInUse, match=f"process {other.pid} uses"):
            prepare_target(path, 512)
        other.kill()
    reopen_target(path, 512).close()


@pytest.mark.parametrize(
    ("kind", "offset"), [(fcntl.F_RDLCK, 100), (fcntl.F_RDLCK, 201), (fcntl.F_WRLCK, 201), (fcntl.F_WRLCK, 1 << 20)]
)
def test_any_lock_of_somebody_else_is_respected(path: Path, kind: int, offset: int) -> None:
    path.write_bytes(bytes(SIZE))
    with path.open("r+b") as file:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, offset, 1, 0))
        with pytest.raises(TargetInUse):
            prepare_target(path, SIZE, overwrite=True)
    prepare_target(path, SIZE).close()


def test_reopening_wants_the_target_as_it_was_left(path: Path) -> None:
    with pytest.raises(TargetUnsuitable, match="is gone"):
        reopen_target(path, SIZE)
    target = prepare_target(path, SIZE)
    target.write(0, b"contents")
    target.close()
    target = reopen_target(path, SIZE)
    assert not target.created
    target.close()
    for size in (SIZE - 1, SIZE + 1):
        os.truncate(path, size)
        with pytest.raises(TargetUnsuitable, match=f"has {size} bytes, and had {SIZE}"):
            reopen_target(path, SIZE)
        assert path.stat().st_size == size


@pytest.mark.parametrize("sparse", [False, True])
def test_writes_and_zeroes_end_up_where_they_belong(path: Path, sparse: bool) -> None:
    size = 4 << 20
    target = prepare_target(path, size, sparse=sparse)
    expected = bytearray(size)
    for offset, length, byte in ((0, size, 1), (100, 3, 2), (size - 5, 5, 3)):
        target.write(offset, memoryview(bytes([byte]) * length))
        expected[offset : offset + length] = bytes([byte]) * length
    for offset, length in ((4096, 512), (1 << 20, 1 << 20), (70_001, 200_003), (size - 3, 3), (9, 0)):
        target.zero(offset, length)
        expected[offset : offset + length] = bytes(length)
    target.flush()
    target.close()
    assert path.read_bytes() == expected


def test_zeroing_keeps_the_space_of_a_preallocated_target_and_gives_back_that_of_a_sparse_one(tmp_path: Path) -> None:
    size = 4 << 20
    sizes = []
    for sparse in (False, True):
        path = tmp_path / f"sparse-{sparse}"
        target = prepare_target(path, size, sparse=sparse)
        target.write(0, b"\x01" * size)
        target.zero(0, size)
        target.flush()
        target.close()
        assert path.read_bytes() == bytes(size)
        sizes.append(allocated(path))
    assert sizes[0] >= size
    assert sizes[1] < size // 4


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_zero_gets_zeroes_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(descriptor: int, mode: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(targets, "fallocate", refuse)
    size = 3 << 20
    target = prepare_target(path, size)
    target.write(0, b"\x01" * size)
    target.zero(1, size - 2)
    target.close()
    assert path.read_bytes() == b"\x01" + bytes(size - 2) + b"\x01"


def test_nothing_is_written_outside_the_disk(path: Path, target: Target) -> None:
    calls: tuple[Callable[[], None], ...] = (
        lambda: target.write(SIZE - 1, b"ab"),
        lambda: target.zero(SIZE, 1),
        lambda: target.write(-1, b"a"),
    )
    for call in calls:
        with pytest.raises(InternalError, match="outside"):
            call()
    assert path.stat().st_size == SIZE


def fail_with(number: int) -> object:
    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "error"), [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EIO, WriteFailed)]
)
@pytest.mark.parametrize("function", ["pwritev", "fdatasync"])
def test_after_a_failure_a_target_takes_nothing_before_somebody_says_that_all_is_written_again(
    path: Path,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    number: int,
    error: type[StorageError],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail_with(number))
        with pytest.raises(error, match=str(path)):  # noqa: PT012 -- one of the two fails
            target.write(0, b"x")
            target.flush()
    for again in (target.flush, lambda: target.write(0, b"x"), lambda: target.zero(0, 1)):
        with pytest.raises(error, match="takes nothing more"):
            again()
    target.reset_after_failure()
    target.write(0, b"y")
    target.flush()
    assert path.read_bytes()[:1] == b"y"


def test_a_closed_target_is_not_used(target: Target) -> None:
    target.close()
    target.close()
    with pytest.raises(InternalError, match="closed"):
        target.flush()


# --- reading ---------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_before_it_is_durable_and_up_to_the_disks_end(target: Target) -> None:
    target.write(100, b"abc")
    target.write(SIZE - 2, b"yz")
    assert target.read(99, 5) == b"\0abc\0"
    assert target.read(SIZE - 3, 3) == b"\0yz"
    assert target.read(7, 0) == b""
    assert target.read(0, SIZE).count(0) == SIZE - 5


def test_a_read_that_the_kernel_cuts_short_goes_on(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    target.write(1000, b"0123456789")
    whole = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, offset: whole(descriptor, min(length, 3), offset))
    assert target.read(1000, 10) == b"0123456789"


def test_nothing_is_read_outside_the_disk(target: Target) -> None:
    for call in (lambda: target.read(SIZE - 1, 2), lambda: target.read(-1, 1), lambda: target.is_hole(SIZE, 1)):
        with pytest.raises(InternalError, match="outside"):
            call()


def test_a_target_that_somebody_has_cut_is_not_taken_for_zeroes(path: Path, target: Target) -> None:
    os.truncate(path, SIZE - 512)
    assert target.read(0, SIZE - 512) == bytes(SIZE - 512)
    for look in (target.read, target.is_hole):
        with pytest.raises(TargetUnsuitable, match="smaller"):
            look(SIZE - 1024, 1024)


def test_a_target_that_cannot_be_read_says_where(path: Path, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail_with(errno.EIO))
        with pytest.raises(TargetUnsuitable, match=f"{path} cannot be read at 4096"):
            target.read(4096, 512)
    # Nothing that was written is in doubt by that.
    target.flush()


def test_nothing_is_read_after_a_flush_that_failed(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail_with(errno.EIO))
        with pytest.raises(WriteFailed):
            target.flush()
    for look in (target.read, target.is_hole):
        with pytest.raises(WriteFailed):
            look(0, 1)


def test_holes_are_known_where_nothing_was_written(path: Path) -> None:
    target = prepare_target(path, 1 << 20, sparse=True)
    assert target.is_hole(0, 1 << 20)
    target.write(600 << 10, b"\0" * 4096)
    assert target.is_hole(0, 512 << 10)
    assert target.is_hole(704 << 10, 320 << 10)
    assert not target.is_hole(0, 1 << 20)
    assert not target.is_hole(600 << 10, 1)
    assert not target.is_hole(0, (600 << 10) + 1)
    target.close()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_where_holes_cannot_be_found_there_are_none(
    target: Target, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "lseek", fail_with(number))
    assert not target.is_hole(0, 1)


def test_an_opened_target_is_read_from_the_device_and_not_from_memory(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_bytes(bytes(SIZE))
    dropped: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *rest: dropped.append(rest))
    prepare_target(path, SIZE).close()
    reopen_target(path, SIZE).close()
    assert dropped == [(0, 0, os.POSIX_FADV_DONTNEED)] * 2
