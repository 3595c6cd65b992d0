"""Which image or NBD export QEMU's storage daemon may write a copy to, and making new images with ``qemu-img``.

Owns the rules by which such a target is accepted, which are those of raw ones (:mod:`qemu_remus.storage.targets`) as
far as they can be.  Its life afterwards is :mod:`qemu_remus.storage.daemon_target`'s.  Calls block.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from qemu_remus.core.errors import (
    ConfigError,
    StorageError,
    TargetHoldsData,
    TargetInUse,
    TargetTooLarge,
    TargetTooSmall,
    TargetUnsuitable,
)
from qemu_remus.core.target_spec import IMAGE_FORMATS, NBD, TargetSpec
from qemu_remus.storage.blockdev import create_arguments, info_arguments, option_names_arguments
from qemu_remus.storage.daemon_target import DaemonTarget, Lost
from qemu_remus.storage.files import is_no_space, storage_error, sync_directory
from qemu_remus.storage.programs import QEMU_IMG, STORAGE_DAEMON, need_programs, run_program
from qemu_remus.storage.targets import device_holds_data

CREATE_TIMEOUT: Final = 3600.0
"""Seconds that making an image may take: all of its space may have to be written."""

LOOK_TIMEOUT: Final = 60.0
"""Seconds for looking at one."""

_SECTOR: Final = 512
_STEP: Final = 1 << 20
_ENDS: Final = 16 << 20
_SAMPLE: Final = 64 << 10
_SAMPLES: Final = 4096

_UNCHANGED: Final = "it was not changed"
_NO_FILE: Final = "no file was left"
_OVERWRITE: Final = "say --overwrite if its contents may go, or name another target"
_OPTION_NAME: Final = re.compile(r"^  ([a-z0-9_.-]+)=<", re.MULTILINE)

_IN_PLACE: Final = frozenset({"vmdk"})
"""Formats whose images name their own files."""


_BUSY: Final = "Unable to get accurate CPU usage"
"""What qemu-img says where the processor was taken from it while it timed a passphrase's derivation."""

_CREATE_TRIES: Final = 10


def check_images(specs: Iterable[TargetSpec]) -> None:
    """See that this host has what such targets need, before anything is begun.

    :raise ConfigError: a program is missing, QEMU does not know a format or an option, or a secret cannot be read.
    """
    for spec in specs:
        if not spec.needs_qemu:
            continue
        need_programs([STORAGE_DAEMON, QEMU_IMG], f"the target {spec}")
        if spec.secret is not None:
            _check_secret(spec, spec.secret)
        if spec.format in IMAGE_FORMATS:
            _check_options(spec)


def prepare_image(spec: TargetSpec, size: int, *, overwrite: bool, sparse: bool, on_lost: Lost) -> DaemonTarget:
    """Open a target for a new copy of a disk, creating the image where it is missing.

    An image that is there has to be of the format and size; so has one in a block device that holds data, while one
    that holds none gets an image made in it.  With ``overwrite`` the contents stay until they are written over, but for
    a block device without such an image, in which one is made.

    :param size: bytes of the disk.
    :raise TargetUnsuitable: as :func:`qemu_remus.storage.targets.prepare_target`.
    :raise StorageError: an image cannot be made.
    """
    if spec.format != NBD and size % _SECTOR:
        raise TargetUnsuitable(
            f"the disk has {size} bytes, and {spec} can hold multiples of {_SECTOR} only",
            safe="nothing was changed",
            hint="name a raw file as this disk's target",
        )
    created, ours, device = False, False, False
    if spec.format != NBD:
        mode = _mode(spec)
        device = mode is not None and stat.S_ISBLK(mode)
        if mode is None:
            _create(spec, size, sparse=sparse)
            # What is encrypted reads as anything where nothing was written.
            created, ours = not spec.encrypted, True
        elif not _accept(spec, size, overwrite=overwrite, device=device):
            # Space cannot be reserved in a device: all of it is there.
            _make(spec, spec.location, size, sparse=True)
            ours = True
    target = DaemonTarget(spec, size, created=created, sparse=sparse, device=device, on_lost=on_lost)
    try:
        target.open()
        if not ours and not overwrite:
            _see_empty(target)
    except BaseException:
        target.close()
        raise
    return target


def reopen_image(spec: TargetSpec, size: int, *, room: int = 0, sparse: bool, on_lost: Lost) -> DaemonTarget:
    """Open a target that was prepared earlier.

    :param room: bytes that an image may have instead, where it was being made larger; the target has what it has.
    :raise TargetUnsuitable: as :func:`qemu_remus.storage.targets.reopen_target`.
    """
    device = False
    if spec.format != NBD:
        mode = _mode(spec)
        if mode is None:
            raise TargetUnsuitable(
                f"the target {spec} is gone",
                hint="bring it back as it was; without it, this secondary needs a full sync into an empty store",
            )
        device = stat.S_ISBLK(mode)
        if size < room:
            size = min(max(size, int(_info(spec)["virtual-size"])), room)
    target = DaemonTarget(spec, size, created=False, sparse=sparse, device=device, on_lost=on_lost)
    try:
        target.open()
    except BaseException:
        target.close()
        raise
    return target


# --- what is there ---------------------------------------------------------------------------------------------------


def _mode(spec: TargetSpec) -> int | None:
    """What kind of file it is; None: there is none."""
    try:
        mode = spec.path.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TargetUnsuitable(
            f"the target {spec} cannot be looked at: {error.strerror}",
            safe=_UNCHANGED,
            hint="see that the path is right and that this user may write to it",
        ) from error
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise TargetUnsuitable(
            f"the target {spec} is neither a file nor a block device",
            safe=_UNCHANGED,
            hint="name an image file or a block device",
        )
    return mode


def _accept(spec: TargetSpec, size: int, *, overwrite: bool, device: bool) -> bool:
    """Whether what is there can be used as it is; False: it is a device in which an image may be made.

    :raise TargetUnsuitable: neither.
    """
    if device:
        empty = not device_holds_data(spec.path)
        if empty:
            return False
    try:
        found = _info(spec)
    except TargetInUse:
        raise
    except StorageError as error:
        if device and overwrite:
            return False
        raise TargetUnsuitable(
            f"the target {spec} is there and holds no image of this format{_seems(spec)}: {error.what}",
            safe=_UNCHANGED,
            hint=_OVERWRITE
            if device
            else f"name it as what it is, or remove the file: it is then created as {spec.format}",
        ) from error
    specific = found.get("format-specific", {}).get("data", {})
    if "backing-filename" in found:
        raise TargetUnsuitable(
            f"the target {spec} needs another image, {found['backing-filename']}, and is no copy of a disk by itself",
            safe=_UNCHANGED,
            hint="remove it, or flatten it with 'qemu-img convert'",
        )
    if specific.get("corrupt"):
        raise TargetUnsuitable(
            f"the target {spec} is marked as corrupt",
            safe=_UNCHANGED,
            hint="remove it: it is then created anew; or repair it with 'qemu-img check -r all'",
        )
    length = int(found["virtual-size"])
    if length != size:
        wrong = TargetTooSmall if length < size else TargetTooLarge
        raise wrong(
            f"the target {spec} has {length} bytes; the primary's disk has {size}",
            safe=_UNCHANGED,
            hint="remove the image: it is then created with the right size",
        )
    return True


def _seems(spec: TargetSpec) -> str:
    """Of what format it is, as far as QEMU can tell; for an error."""
    with suppress(StorageError, ValueError, KeyError):
        found = json.loads(
            run_program([QEMU_IMG, *info_arguments(spec, spec.location, probe=True)], timeout=LOOK_TIMEOUT)
        )
        if found["format"] != "raw":
            return f", but one of {found['format']}"
    return ""


def _info(spec: TargetSpec, file: str | None = None) -> dict[str, Any]:
    text = run_program([QEMU_IMG, *info_arguments(spec, file or spec.location)], timeout=LOOK_TIMEOUT, refused=_refused)
    found: dict[str, Any] = json.loads(text)
    return found


def _refused(said: str) -> StorageError:
    if "Failed to get" in said and "lock" in said:
        return TargetInUse(
            f"another process uses the target: {said}",
            safe=_UNCHANGED,
            hint="end it first (a VM must never run on a target while this secondary does), or name another target",
        )
    if "No space left on device" in said:
        return storage_error(OSError(28, said), "making the image", safe=_NO_FILE)
    return TargetUnsuitable(said)


def _see_empty(target: DaemonTarget) -> None:
    if _holds_data(target):
        raise TargetHoldsData(f"the target {target.spec} holds data", safe=_UNCHANGED, hint=_OVERWRITE)


def _holds_data(target: DaemonTarget) -> bool:
    """Whether anything in it is not zero. An NBD export is looked at at both ends and by samples, as a device."""
    size = target.size
    sampled = target.spec.format == NBD and size > 2 * _ENDS
    if not sampled:
        return any(_piece_holds_data(target, start, min(size, start + _STEP)) for start in range(0, size, _STEP))
    ends = (*range(0, _ENDS, _STEP), *range(size - _ENDS, size, _STEP))
    step = max(_ENDS, size // _SAMPLES)
    samples = range(_ENDS, size - _ENDS, step)
    return any(_piece_holds_data(target, start, start + _STEP) for start in ends) or any(
        _piece_holds_data(target, start, start + _SAMPLE) for start in samples
    )


def _piece_holds_data(target: DaemonTarget, start: int, stop: int) -> bool:
    if target.is_hole(start, stop - start):
        return False
    piece = target.read(start, stop - start)
    return piece.count(0) != len(piece)


# --- making one ------------------------------------------------------------------------------------------------------


def _create(spec: TargetSpec, size: int, *, sparse: bool) -> None:
    """Make an image file; where that fails, or we are killed, none of its name is there."""
    path = spec.path
    data_file = dict(spec.options).get("data_file")
    if data_file is not None and os.path.lexists(path.parent / data_file):
        raise TargetHoldsData(
            f"the data file {path.parent / data_file} of the target {spec} is there already",
            safe=_UNCHANGED,
            hint="remove it, or name another: it is made together with the image",
        )
    made = path if spec.format in _IN_PLACE else path.with_name(f".{path.name}.qemu-remus-new")
    try:
        if made != path:
            made.unlink(missing_ok=True)  # of an attempt that was cut off
        _make(spec, str(made), size, sparse=sparse)
        descriptor = os.open(made, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        made.rename(path)
        sync_directory(path.parent)
    except OSError as error:
        _remove(made)
        if is_no_space(error):
            raise storage_error(error, f"creating the target {spec}", safe=_NO_FILE) from error
        raise TargetUnsuitable(
            f"the target {spec} cannot be created: {error.strerror}",
            hint="see that its directory is there and that this user may write to it",
        ) from error
    except BaseException:
        _remove(made)
        if data_file is not None:
            _remove(path.parent / data_file)
        raise


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _run_create(command: list[str]) -> None:
    """Run ``qemu-img create``; on a busy host more than once, since for luks it has to measure how fast it is."""
    for _ in range(_CREATE_TRIES - 1):
        try:
            run_program(command, timeout=CREATE_TIMEOUT, refused=_refused)
        except StorageError as error:
            if _BUSY not in error.what:
                raise
        else:
            return
    run_program(command, timeout=CREATE_TIMEOUT, refused=_refused)


def _make(spec: TargetSpec, file: str, size: int, *, sparse: bool) -> None:
    try:
        _run_create([QEMU_IMG, *create_arguments(spec, file, size, sparse=sparse)])
        found = int(_info(spec, file)["virtual-size"])
    except TargetInUse:
        raise
    except StorageError as error:
        raise type(error)(
            f"the target {spec} cannot be created: {error.what}",
            safe=_NO_FILE if file != spec.location else "",
            hint=error.hint or "see that its directory is there, and that its options are right",
        ) from error
    if found != size:
        raise TargetUnsuitable(
            f"the target {spec} would have {found} bytes; the primary's disk has {size}: its format has no such size",
            safe=_NO_FILE if file != spec.location else "",
            hint="give other options, or name a target of another format",
        )


# --- before anything is begun ----------------------------------------------------------------------------------------


def _check_secret(spec: TargetSpec, secret: Path) -> None:
    try:
        empty = not secret.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the secret of {spec} cannot be read from {secret}: {error.strerror}",
            hint="write the passphrase there, readable for this user only",
        ) from error
    if empty:
        raise ConfigError(f"the secret of {spec} is empty: there is nothing in {secret}")


def _check_options(spec: TargetSpec) -> None:
    try:
        known = set(_OPTION_NAME.findall(run_program([QEMU_IMG, *option_names_arguments(spec)], timeout=LOOK_TIMEOUT)))
    except StorageError as error:
        raise ConfigError(
            f"this host's QEMU cannot make images of the format {spec.format}: {error.what}",
            hint="install a QEMU that can, or name another format",
        ) from error
    for key, _ in spec.options:
        # What QEMU offers for the protocol beneath is not listed.
        if key not in known and key not in _PROTOCOL_OPTIONS:
            raise ConfigError(
                f"images of the format {spec.format} have no option {key}",
                hint=f"'qemu-img create -f {spec.format} -o help' lists those that there are",
            )


_PROTOCOL_OPTIONS: Final = frozenset({"preallocation", "nocow", "extent_size_hint"})
