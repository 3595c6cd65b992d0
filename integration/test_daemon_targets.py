"""Targets that QEMU's storage daemon writes: each format, its life and death, and who is refused. No VM runs here."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from integration.faults import small_file_system
from integration.process import gone, listens
from qemu_remus.core.errors import (
    ConfigError,
    NoSpace,
    StorageError,
    TargetHoldsData,
    TargetInUse,
    TargetTooLarge,
    TargetTooSmall,
    TargetUnsuitable,
    WriteFailed,
)
from qemu_remus.core.target_spec import IMAGE_FORMATS, TargetSpec
from qemu_remus.storage.daemon_target import DaemonTarget
from qemu_remus.storage.programs import Child
from qemu_remus.storage.qemu_images import check_images, prepare_image, reopen_image

KIB = 1 << 10
MIB = 1 << 20
SIZE = 24 * MIB + 512
TIMEOUT = 60.0


def qemu_img(*arguments: str) -> str:
    return subprocess.run(["qemu-img", *arguments], capture_output=True, text=True, check=True, timeout=TIMEOUT).stdout


@pytest.fixture
def secret(scratch: Path) -> Path:
    path = scratch / "key"
    path.write_bytes(b"a passphrase, with a comma")
    return path


def spec_of(name: str, scratch: Path, secret: Path) -> TargetSpec:
    place = str(scratch / f"image, with: commas.{name}")
    if name == "luks":
        return TargetSpec(place, "luks", (("iter-time", "10"),), secret)
    if name == "encrypted":
        return TargetSpec(place, "qcow2", (("encrypt.iter-time", "10"), ("cluster_size", "4k")), secret)
    if name == "options":
        return TargetSpec(place, "qcow2", (("cluster_size", "2M"), ("extended_l2", "on"), ("lazy_refcounts", "on")))
    if name == "data-file":
        return TargetSpec(place, "qcow2", (("data_file", place + ".data"), ("data_file_raw", "on")))
    return TargetSpec(place, name)


def image_options(spec: TargetSpec) -> list[str]:
    """Arguments by which qemu-img opens it."""
    file = {"driver": "file", "filename": spec.location}
    described: dict[str, Any] = {"driver": spec.format, "file": file}
    arguments = []
    if spec.secret is not None:
        arguments = ["--object", f"secret,id=s,file={spec.secret}"]
        if spec.format == "luks":
            described["key-secret"] = "s"
        else:
            described["encrypt"] = {"format": "luks", "key-secret": "s"}
    return [*arguments, "json:" + json.dumps(described)]


def contents(spec: TargetSpec, scratch: Path) -> bytes:
    """The whole disk, as QEMU reads it."""
    raw = scratch / "converted"
    qemu_img("convert", "-O", "raw", *image_options(spec), str(raw))
    return raw.read_bytes()


def prepare(
    spec: TargetSpec, size: int = SIZE, *, overwrite: bool = False, sparse: bool = False, lost: list[str] | None = None
) -> DaemonTarget:
    said = lost if lost is not None else []
    return prepare_image(spec, size, overwrite=overwrite, sparse=sparse, on_lost=said.append)


@contextmanager
def prepared(spec: TargetSpec, size: int = SIZE, **options: Any) -> Iterator[DaemonTarget]:
    target = prepare(spec, size, **options)
    try:
        yield target
    finally:
        target.close()


def scribble(target: DaemonTarget, model: bytearray, seed: int, rounds: int = 60) -> None:
    """Writes and zeroes of all sizes and positions, many over each other."""
    chance = random.Random(seed)
    for _ in range(rounds):
        length = chance.choice([1, 511, 512, 4 * KIB, 64 * KIB, 3 * MIB])
        offset = chance.randrange(0, len(model) - length + 1)
        if chance.random() < 0.3:
            target.zero(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            data = chance.randbytes(length)
            target.write(offset, data)
            model[offset : offset + length] = data


def scribble_and_flush(target: DaemonTarget, model: bytearray, seed: int) -> None:
    scribble(target, model, seed)
    target.flush()


def write_and_flush(target: DaemonTarget, offset: int, data: bytes) -> None:
    target.write(offset, data)
    target.flush()


def see(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", [*sorted(IMAGE_FORMATS), "encrypted", "options", "data-file"])
def test_each_format_takes_everything_and_gives_it_back(name: str, scratch: Path, secret: Path) -> None:
    spec = spec_of(name, scratch, secret)
    check_images([spec])
    model = bytearray(SIZE)
    with prepared(spec) as target:
        assert target.created is not spec.encrypted
        assert spec.path.stat().st_mode & 0o777 == 0o600
        if spec.encrypted:
            target.zero(0, SIZE)
        scribble(target, model, 1)
        assert target.read(0, SIZE) == model
        target.write(SIZE - 512, b"\x55" * 512)
        model[-512:] = b"\x55" * 512
        target.flush()
        with pytest.raises(TargetInUse):
            prepare(spec)
    assert contents(spec, scratch) == model
    target = reopen_image(spec, SIZE, sparse=False, on_lost=print)
    scribble(target, model, 2)
    target.flush()
    target.close()
    assert contents(spec, scratch) == model
    assert [path.name for path in scratch.iterdir() if path.name.endswith("-new")] == []


def test_a_qcow2_image_is_made_with_the_options_and_its_space(scratch: Path, secret: Path) -> None:
    spec = spec_of("options", scratch, secret)
    prepare(spec).close()
    info = json.loads(qemu_img("info", "--output=json", *image_options(spec)))
    assert info["virtual-size"] == SIZE
    assert info["cluster-size"] == 2 * MIB
    assert info["format-specific"]["data"]["extended-l2"] is True
    assert spec.path.stat().st_blocks * 512 >= SIZE
    sparse = replace(spec, location=str(scratch / "sparse"))
    prepare(sparse, sparse=True).close()
    assert sparse.path.stat().st_blocks * 512 < SIZE // 2


def test_space_is_given_back_only_where_the_target_is_sparse(scratch: Path) -> None:
    for sparse in (True, False):
        spec = TargetSpec(str(scratch / f"image-{sparse}"), "qcow2")
        with prepared(spec, sparse=sparse) as target:
            target.write(0, b"\x11" * 8 * MIB)
            target.flush()
            before = spec.path.stat().st_blocks * 512
            target.zero(0, 8 * MIB)
            target.flush()
            after = spec.path.stat().st_blocks * 512
            assert (after <= before - 4 * MIB) is sparse
            assert target.is_hole(0, 8 * MIB)


def test_holes_are_known_and_forgotten_where_something_is_written(scratch: Path) -> None:
    with prepared(TargetSpec(str(scratch / "image"), "qcow2"), sparse=True) as target:
        assert target.is_hole(0, SIZE)
        target.write(5 * MIB, b"x")
        assert not target.is_hole(0, SIZE)
        assert target.is_hole(0, 5 * MIB)
        assert not target.is_hole(5 * MIB, 1)
        target.zero(5 * MIB, 1)
        target.flush()


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_is_there_is_taken_when_it_is_empty_and_of_the_format_and_size(scratch: Path) -> None:
    spec = TargetSpec(str(scratch / "image"), "qcow2")
    qemu_img("create", "-q", "-f", "qcow2", spec.location, str(SIZE))
    with prepared(spec) as target:
        assert not target.created
        target.write(0, b"data")
        target.flush()
    with pytest.raises(TargetHoldsData):
        prepare(spec)
    with prepared(spec, overwrite=True) as target:
        assert target.read(0, 4) == b"data"
    for size, error in ((SIZE + 512, TargetTooSmall), (SIZE - 512, TargetTooLarge)):
        before = spec.path.read_bytes()
        with pytest.raises(error):
            prepare(spec, size, overwrite=True)
        assert spec.path.read_bytes() == before


def test_an_image_of_another_format_is_refused_by_name_and_left_alone(scratch: Path) -> None:
    path = scratch / "image"
    for found in ("vdi", "raw"):
        qemu_img("create", "-q", "-f", found, str(path), str(SIZE))
        before = path.read_bytes()
        with pytest.raises(TargetUnsuitable, match="vdi" if found == "vdi" else "no image of this format"):
            prepare(TargetSpec(str(path), "qcow2"), overwrite=True)
        assert path.read_bytes() == before
        path.unlink()


def test_an_image_that_needs_another_one_is_refused(scratch: Path) -> None:
    qemu_img("create", "-q", "-f", "raw", str(scratch / "base"), str(SIZE))
    overlay = scratch / "overlay"
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(scratch / "base"), "-F", "raw", str(overlay))
    with pytest.raises(TargetUnsuitable, match="base"):
        prepare(TargetSpec(str(overlay), "qcow2"), overwrite=True)


def test_sizes_that_no_image_can_have_are_refused_by_name(scratch: Path) -> None:
    spec = TargetSpec(str(scratch / "image"), "qcow2")
    with pytest.raises(TargetUnsuitable, match=f"{SIZE + 1} bytes"):
        prepare(spec, SIZE + 1)
    with pytest.raises(TargetUnsuitable, match="no such size"):
        prepare(TargetSpec(spec.location, "vpc", (("force_size", "off"),)))
    assert not spec.path.exists()


@pytest.mark.parametrize("option", [("cluster_size", "3"), ("preallocation", "perhaps"), ("compat", "0.9")])
def test_an_option_that_qemu_img_refuses_leaves_no_file(option: tuple[str, str], scratch: Path) -> None:
    spec = TargetSpec(str(scratch / "image"), "qcow2", (option,))
    with pytest.raises(StorageError, match="cannot be created") as caught:
        prepare(spec)
    assert "qemu-img" in str(caught.value)
    assert list(scratch.iterdir()) == []


def test_a_data_file_that_is_there_is_not_written_over(scratch: Path) -> None:
    data = scratch / "data"
    data.write_bytes(b"precious")
    with pytest.raises(TargetHoldsData):
        prepare(TargetSpec(str(scratch / "image"), "qcow2", (("data_file", str(data)),)), overwrite=True)
    assert data.read_bytes() == b"precious"


def test_a_wrong_or_missing_secret_is_said(scratch: Path, secret: Path) -> None:
    spec = spec_of("luks", scratch, secret)
    prepare(spec).close()
    other = scratch / "other"
    other.write_bytes(b"not the passphrase")
    with pytest.raises(TargetUnsuitable, match="secret"):
        prepare(replace(spec, secret=other), overwrite=True)
    with pytest.raises(ConfigError, match="cannot be read"):
        check_images([replace(spec, secret=scratch / "none")])
    other.write_bytes(b"")
    with pytest.raises(ConfigError, match="empty"):
        check_images([replace(spec, secret=other)])


def test_no_secret_is_on_a_command_line(scratch: Path, secret: Path) -> None:
    with prepared(spec_of("luks", scratch, secret)) as target:
        command = Path(f"/proc/{target.daemon}/cmdline").read_bytes()
        assert str(secret).encode() in command
        assert secret.read_bytes() not in command


def test_a_missing_program_is_said_with_its_package(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(scratch))
    with pytest.raises(ConfigError, match=r"qemu-storage-daemon.*package") as caught:
        check_images([TargetSpec("/x", "qcow2")])
    assert "qemu-utils" in str(caught.value)
    check_images([TargetSpec("/x")])


def test_unknown_options_are_said_before_anything_is_begun(scratch: Path) -> None:
    check_images([TargetSpec("/x", "qcow2", (("cluster_size", "4k"), ("preallocation", "full")))])
    with pytest.raises(ConfigError, match="clustersize"):
        check_images([TargetSpec("/x", "qcow2", (("clustersize", "4k"),))])


# --- the daemon's life -----------------------------------------------------------------------------------------------


def kill(target: DaemonTarget) -> int:
    pid = target.daemon
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_daemon_that_dies_at_rest_is_said_and_started_again(scratch: Path) -> None:
    lost: list[str] = []
    spec = TargetSpec(str(scratch / "image"), "qcow2")
    model = bytearray(SIZE)
    with prepared(spec, lost=lost) as target:
        scribble(target, model, 3)
        target.flush()
        first = kill(target)
        see(lambda: bool(lost))
        assert "signal 9" in lost[0]
        assert target.revive()
        assert not target.revive()
        assert target.daemon not in (None, first)
        kill(target)
        # nobody has looked after it this time
        scribble(target, model, 4)
        target.flush()
        assert target.read(0, SIZE) == model
        see(lambda: len(lost) == 2)
    assert contents(spec, scratch) == model


def test_a_loss_is_said_even_where_another_daemon_is_at_work_before_that(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, revived = DaemonTarget._ended, threading.Event()

    def late(target: DaemonTarget, child: Child) -> None:
        revived.wait(TIMEOUT)
        ended(target, child)

    monkeypatch.setattr(DaemonTarget, "_ended", late)
    lost: list[str] = []
    with prepared(TargetSpec(str(scratch / "image"), "qcow2"), lost=lost) as target:
        target.flush()
        kill(target)
        target.write(0, b"x")
        revived.set()
        see(lambda: len(lost) == 1)


def test_a_daemon_that_dies_with_writes_unflushed_takes_them_along_and_says_so(scratch: Path) -> None:
    spec = TargetSpec(str(scratch / "image"), "qcow2")
    model = bytearray(SIZE)
    with prepared(spec) as target:
        scribble(target, model, 5)
        target.flush()
        good = bytearray(model)
        scribble(target, model, 6)
        kill(target)
        with pytest.raises(WriteFailed, match="signal 9"):
            scribble(target, model, 7)
        # nothing is taken, and nothing told, before the caller knows
        for call in (target.flush, lambda: target.read(0, 1), lambda: target.write(0, b"x")):
            with pytest.raises(WriteFailed, match="takes nothing more"):
                call()
        assert not target.revive()
        target.reset_after_failure()
        scribble(target, good, 6)
        target.flush()
    assert contents(spec, scratch) == good


def test_a_daemon_that_hangs_is_killed(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qemu_remus.storage.daemon_target.END_TIMEOUT", 0.5)
    with prepared(TargetSpec(str(scratch / "image"), "qcow2")) as target:
        target.write(0, b"x")
        pid = target.daemon
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        # impatient with this daemon alone: one that does not hang may take its time
        assert target._nbd is not None
        target._nbd.set_timeout(0.5)
        with pytest.raises(WriteFailed, match="silent"):
            target.flush()
        see(partial(gone, pid))
        target.reset_after_failure()
        target.write(0, b"y")
        target.flush()
        pid = target.daemon
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
    assert gone(pid)


def test_a_daemon_that_cannot_be_started_again_is_said_until_it_can(scratch: Path) -> None:
    spec = TargetSpec(str(scratch / "image"), "qcow2")
    lost: list[str] = []
    with prepared(spec, lost=lost) as target:
        target.flush()
        kill(target)
        see(lambda: bool(lost))
        spec.path.rename(scratch / "away")
        with pytest.raises(TargetUnsuitable, match="No such file"):
            target.revive()
        with pytest.raises(WriteFailed, match="No such file"):
            target.write(0, b"x")
        (scratch / "away").rename(spec.path)
        target.write(0, b"x")
        target.flush()
        assert target.read(0, 1) == b"x"


_HOLDER = """
import sys
from pathlib import Path
from qemu_remus.core.target_spec import TargetSpec
from qemu_remus.storage.qemu_images import prepare_image
target = prepare_image(TargetSpec(sys.argv[1], "qcow2"), 1 << 20, overwrite=False, sparse=False, on_lost=print)
print(target.daemon, flush=True)
sys.stdin.read()
"""


def test_a_controller_that_is_killed_takes_its_daemon_along(scratch: Path) -> None:
    spec = TargetSpec(str(scratch / "image"), "qcow2")
    with subprocess.Popen(
        [sys.executable, "-c", _HOLDER, spec.location], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        with pytest.raises(TargetInUse):
            reopen_image(spec, 1 << 20, sparse=False, on_lost=print)
        holder.kill()
        holder.wait()
        # at once: its daemon may be dying still
        reopen_image(spec, 1 << 20, sparse=False, on_lost=print).close()
    # its locks go before it does
    see(partial(gone, pid))


def test_nothing_is_left_of_a_daemon_that_was_ended(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = scratch / ("a rather long name for a directory " * 5)
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    with prepared(TargetSpec(str(scratch / "image"), "qcow2")) as target:
        pid = target.daemon
        assert pid is not None
        assert list(place.iterdir()) == []
    assert gone(pid)
    assert list(place.iterdir()) == []


# --- NBD, devices, full file systems ---------------------------------------------------------------------------------


@contextmanager
def nbd_server(image: Path, place: Path, *options: str) -> Iterator[None]:
    with subprocess.Popen(
        ["qemu-nbd", "-t", "-f", "raw", "-x", "copy of a", "-k", str(place), *options, str(image)]
    ) as server:
        see(partial(listens, place))
        yield
        server.terminate()
        server.wait()
    place.unlink(missing_ok=True)


def test_an_nbd_export_is_a_target(scratch: Path) -> None:
    backing, place = scratch / "backing", scratch / "nbd.sock"
    backing.write_bytes(bytes(SIZE + MIB))
    spec = TargetSpec(f"nbd+unix:///copy%20of%20a?socket={place}", "nbd")
    model = bytearray(SIZE)
    with nbd_server(backing, place):
        with prepared(spec) as target:
            assert not target.created
            scribble(target, model, 8)
            target.flush()
            assert target.read(0, SIZE) == model
        with pytest.raises(TargetHoldsData):
            prepare(spec)
        with pytest.raises(TargetTooSmall):
            prepare(spec, SIZE + 2 * MIB, overwrite=True)
        target = reopen_image(spec, SIZE, sparse=False, on_lost=print)
        scribble(target, model, 9)
        target.flush()
    with pytest.raises(StorageError):
        scribble_and_flush(target, bytearray(model), 10)
    target.reset_after_failure()
    with pytest.raises(WriteFailed, match="Failed to connect"):
        scribble(target, bytearray(model), 10)
    with nbd_server(backing, place):
        scribble(target, model, 10)
        target.flush()
        target.close()
    assert backing.read_bytes() == model + bytes(MIB)
    with nbd_server(backing, place, "-r"), pytest.raises(TargetUnsuitable):
        prepare(spec, overwrite=True)
    with pytest.raises(TargetUnsuitable, match="No such file"):
        prepare(spec)


@pytest.fixture
def device(scratch: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    backing = scratch / "device"
    with backing.open("wb") as file:
        file.truncate(64 * MIB)
    made = subprocess.run(
        ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False, timeout=TIMEOUT
    )
    if made.returncode:
        pytest.skip(f"no loop device to be had: {made.stderr.strip()}")
    path = Path(made.stdout.strip())
    yield path
    subprocess.run(["losetup", "--detach", str(path)], check=True, timeout=TIMEOUT)


def test_an_image_is_made_in_a_block_device_that_holds_nothing(device: Path, scratch: Path) -> None:
    spec = TargetSpec(str(device), "qcow2")
    model = bytearray(SIZE)
    with prepared(spec) as target:
        assert not target.created
        scribble(target, model, 11)
        target.flush()
    with pytest.raises(TargetHoldsData):
        prepare(spec)
    with prepared(spec, overwrite=True) as target:
        assert target.read(0, SIZE) == model
    device.write_bytes(b"\x77" * MIB)
    with pytest.raises(TargetUnsuitable, match="holds no image"):
        prepare(spec)
    with prepared(spec, overwrite=True) as target:
        assert target.read(0, SIZE) == bytes(SIZE)


def test_a_full_file_system_is_said_and_what_was_flushed_stays(scratch: Path) -> None:
    with small_file_system(scratch / "images", 48 * MIB) as storage:
        spec = TargetSpec(str(storage.path / "image"), "qcow2")
        with pytest.raises(NoSpace, match="No space left"):
            prepare(spec, 128 * MIB)
        assert list(storage.path.iterdir()) == []
        model = bytearray(SIZE)
        with prepared(spec, sparse=True) as target:
            target.write(0, b"\x31" * MIB)
            model[:MIB] = b"\x31" * MIB
            target.flush()
            storage.fill(MIB)
            with pytest.raises(NoSpace, match="No space left"):
                write_and_flush(target, 2 * MIB, b"\x32" * 8 * MIB)
            with pytest.raises(NoSpace, match="takes nothing more"):
                target.flush()
            storage.empty()
            target.reset_after_failure()
            target.write(2 * MIB, b"\x32" * 8 * MIB)
            model[2 * MIB : 10 * MIB] = b"\x32" * 8 * MIB
            target.flush()
        assert contents(spec, scratch) == model
