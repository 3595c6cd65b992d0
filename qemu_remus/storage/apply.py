"""Redo: bring committed epochs from the journal into the images. No decision about which, or when, is taken here.

Every extent is a whole content, so that doing it again, or again from an earlier epoch on, gives the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, Protocol

from qemu_remus.core.errors import InternalError, NoSpace, StorageError, WriteFailed
from qemu_remus.core.model import EpochNumber
from qemu_remus.storage.files import Buffer
from qemu_remus.storage.journal import Journal


class Writable(Protocol):
    """What is asked of a target; :class:`qemu_remus.storage.targets.Target` has it."""

    def write(self, offset: int, data: Buffer) -> None: ...

    def zero(self, offset: int, length: int) -> None: ...

    def flush(self) -> None: ...


def apply_epochs(journal: Journal, epochs: Sequence[EpochNumber], targets: Sequence[Writable | None]) -> int:
    """Write committed epochs to the images, in order, and flush all of these.

    When this returns, the superblock may say that the last one is applied, and after that the journal may be trimmed.
    Memory: one record of the journal.

    :param epochs: from :attr:`Journal.unapplied`, beginning with its first.
    :param targets: one per disk, in the order that extents refer to; None for a disk that none of them writes to.
    :return: bytes of data written, zeroes not counted.
    :raise NoSpace, WriteFailed: an image could not be written: parts of the epochs may be in it. Once the cause is
        gone, reset the targets and apply again from the same epoch on.
    :raise JournalDamaged: an epoch cannot be read back.
    """
    written = 0
    try:
        for epoch in epochs:
            for extents, data in journal.read_epoch(epoch):
                position = 0
                for extent in extents:
                    target = targets[extent.disk] if extent.disk < len(targets) else None
                    if target is None:
                        raise InternalError(f"epoch {epoch} writes to disk {extent.disk} of {len(targets)}")
                    if extent.zero:
                        target.zero(extent.offset, extent.length)
                    else:
                        target.write(extent.offset, data[position : position + extent.length])
                        position += extent.length
                written += position
        for target in targets:
            if target is not None:
                target.flush()
    except (NoSpace, WriteFailed) as error:
        _pass_on(error)
    return written


def _pass_on(error: StorageError) -> NoReturn:
    raise type(error)(
        error.what, safe="the journal keeps every committed epoch that is not in the images yet", hint=error.hint
    ) from error
