"""A disk's target, whatever it is: the one interface behind which raw files and devices are written by ourselves, and
everything else by QEMU's storage daemon.

Owns only which of the two it is.
"""

from __future__ import annotations

from typing import Protocol

from qemu_remus.core.target_spec import NBD, TargetSpec
from qemu_remus.storage.daemon_target import DaemonTarget, Lost
from qemu_remus.storage.files import Buffer
from qemu_remus.storage.qemu_images import prepare_image, reopen_image
from qemu_remus.storage.targets import prepare_target, reopen_target


class OpenTarget(Protocol):
    """An open and locked target; see :class:`qemu_remus.storage.targets.Target` for what its calls promise."""

    size: int
    created: bool

    def write(self, offset: int, data: Buffer) -> None: ...

    def zero(self, offset: int, length: int) -> None: ...

    def read(self, offset: int, length: int) -> bytes: ...

    def is_hole(self, offset: int, length: int) -> bool: ...

    def flush(self) -> None: ...

    def resize(self, size: int) -> None: ...

    def reset_after_failure(self) -> None: ...

    def close(self) -> None: ...


def prepare_any(spec: TargetSpec, size: int, *, overwrite: bool, sparse: bool, on_lost: Lost) -> OpenTarget:
    """Open a target for a new copy of a disk, creating it where it is missing.

    :param size: bytes of the disk.
    :param on_lost: hears of a daemon that ends by itself, in another thread.
    :raise StorageError: as :func:`qemu_remus.storage.targets.prepare_target`.
    """
    if spec.needs_qemu:
        return prepare_image(spec, size, overwrite=overwrite, sparse=sparse, on_lost=on_lost)
    return prepare_target(spec.path, size, overwrite=overwrite, sparse=sparse)


def reopen_any(spec: TargetSpec, size: int, *, room: int, sparse: bool, on_lost: Lost) -> OpenTarget:
    """Open a target that was prepared earlier.

    :param room: bytes that it may have instead, where it was being made larger.
    :raise StorageError: as :func:`qemu_remus.storage.targets.reopen_target`.
    """
    if spec.needs_qemu:
        return reopen_image(spec, size, room=room, sparse=sparse, on_lost=on_lost)
    return reopen_target(spec.path, size, room=room, sparse=sparse)


def is_there(spec: TargetSpec) -> bool:
    """Whether there is something under its name already."""
    return spec.format == NBD or spec.path.exists()


def revive(target: OpenTarget) -> bool:
    """Have a target that works, if only its daemon is missing; whether another one was started.

    :raise StorageError: it cannot be.
    """
    return isinstance(target, DaemonTarget) and target.revive()


__all__ = ["OpenTarget", "is_there", "prepare_any", "reopen_any", "revive"]
