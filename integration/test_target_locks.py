"""A target in use by the secondary cannot be opened by QEMU, and the other way round; block devices as targets."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_remus.core.errors import NoSpace, TargetHoldsData, TargetInUse, TargetTooSmall
from qemu_remus.storage.targets import Target, prepare_target, reopen_target

SIZE = 64 << 20
TIMEOUT = 20.0


def qemu_io(path: Path, *options: str, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["qemu-io", "-f", "raw", *options, "-c", command, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )


@contextmanager
def qemu_holding(path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A QEMU process with the image open."""
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", *options, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + TIMEOUT
        while not any(_is(link, path) for link in Path(f"/proc/{process.pid}/fd").iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # It answers only when it has opened, and with that locked, the image.
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        while "MiB" not in process.stdout.readline():
            assert time.monotonic() < deadline
        yield process
        process.kill()


def _is(link: Path, path: Path) -> bool:
    try:
        return link.samefile(path)
    except OSError:
        return False


@pytest.fixture
def target(scratch: Path) -> Iterator[Target]:
    target = prepare_target(scratch / "image", SIZE)
    yield target
    target.close()


@pytest.mark.parametrize(("options", "command"), [((), "write 0 4k"), (("-r",), "read 0 4k")])
def test_qemu_does_not_open_a_target_in_use(target: Target, options: tuple[str, ...], command: str) -> None:
    refused = qemu_io(target.path, *options, command=command)
    assert refused.returncode != 0
    assert "lock" in refused.stderr
    target.close()
    opened = qemu_io(target.path, *options, command=command)
    assert opened.returncode == 0, opened.stderr


def test_looking_at_a_target_in_use_is_still_possible(target: Target) -> None:
    looked = subprocess.run(
        ["qemu-img", "info", "-U", "-f", "raw", str(target.path)], capture_output=True, check=False, timeout=TIMEOUT
    )
    assert looked.returncode == 0, looked.stderr


@pytest.mark.parametrize("options", [(), ("-r",)], ids=["writer", "reader"])
def test_an_image_that_qemu_has_open_is_no_target(scratch: Path, options: tuple[str, ...]) -> None:
    path = scratch / "image"
    path.write_bytes(bytes(1 << 20))
    with qemu_holding(path, *options) as qemu:
        with pytest.raises(TargetInUse, match=f"process {qemu.pid} uses"):
            prepare_target(path, 1 << 20, overwrite=True)
        with pytest.raises(TargetInUse):
            reopen_target(path, 1 << 20)
    prepare_target(path, 1 << 20).close()


@pytest.fixture
def device(scratch: Path) -> Iterator[Path]:
    """A loop device, somewhat larger than ``SIZE``."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    backing = scratch / "backing"
    with backing.open("wb") as file:
        file.truncate(SIZE + (1 << 20))
    made = subprocess.run(
        ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    if made.returncode:
        pytest.skip(f"no loop device to be had: {made.stderr.strip()}")
    path = Path(made.stdout.strip())
    yield path
    subprocess.run(["losetup", "--detach", str(path)], check=True, timeout=TIMEOUT)


def test_a_block_device_may_be_larger_but_not_smaller(device: Path) -> None:
    target = prepare_target(device, SIZE)
    assert (target.size, target.created) == (SIZE, False)
    expected = bytearray(SIZE)
    for offset, data in ((0, b"\x01" * (4 << 20)), (SIZE - 3, b"end")):
        target.write(offset, data)
        expected[offset : offset + len(data)] = data
    for offset, length in ((1 << 20, 1 << 20), (4096 + 512, 512), (70_001, 200_003)):
        target.zero(offset, length)
        expected[offset : offset + length] = bytes(length)
    target.flush()
    target.close()
    with device.open("rb") as file:
        assert file.read(SIZE) == expected
        assert file.read() == bytes(1 << 20)
    with pytest.raises(TargetTooSmall):
        prepare_target(device, SIZE + (2 << 20))
    with pytest.raises(TargetHoldsData):
        prepare_target(device, SIZE)
    prepare_target(device, SIZE, overwrite=True).close()
    reopen_target(device, SIZE).close()


def test_a_block_device_in_use_is_refused(device: Path, scratch: Path) -> None:
    target = prepare_target(device, SIZE)
    refused = qemu_io(device, command="write 0 4k")
    assert refused.returncode != 0
    assert "lock" in refused.stderr
    target.close()
    mount = scratch / "mount"
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", str(device)], check=True, timeout=TIMEOUT)
    mounted = subprocess.run(["mount", str(device), str(mount)], check=False, timeout=TIMEOUT)
    if mounted.returncode:
        pytest.skip("mounting is not possible here")
    try:
        with pytest.raises(TargetInUse, match="mounted"):
            prepare_target(device, SIZE, overwrite=True)
    finally:
        subprocess.run(["umount", str(mount)], check=True, timeout=TIMEOUT)


def test_a_file_system_on_a_device_counts_as_data(device: Path) -> None:
    subprocess.run(["mkfs.ext4", "-q", "-F", str(device)], check=True, timeout=TIMEOUT)
    with pytest.raises(TargetHoldsData):
        prepare_target(device, SIZE)


def test_a_file_system_that_gets_full_while_a_target_is_made_keeps_no_file(device: Path, scratch: Path) -> None:
    mount = scratch / "mount"
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", str(device)], check=True, timeout=TIMEOUT)
    if subprocess.run(["mount", str(device), str(mount)], check=False, timeout=TIMEOUT).returncode:
        pytest.skip("mounting is not possible here")
    try:
        with pytest.raises(NoSpace, match="No space left"):
            prepare_target(mount / "image", 2 * SIZE)
        assert not (mount / "image").exists()
    finally:
        subprocess.run(["umount", str(mount)], check=True, timeout=TIMEOUT)
