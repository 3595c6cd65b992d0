"""The backup's memory checkpoints: durable, whole or not there, and with the one before until its successor counts.

Owns one directory.  Nothing about who sends, or about disks, may enter.  All of it blocks, one thread at a time.

A directory holds, for checkpoint numbers N:

- ``N.incoming``: frames as they come; worth nothing, removed at the next start;
- ``N.staged``: the checkpoint's frames (see :mod:`integration.toolstack.wire`), whole and durable;
- ``N.complete``: the same, and it may be restored: its disks are staged as well;
- ``image.N``: the whole memory at checkpoint N, whose ``N.complete`` stays for the device state's sake;
- ``image.E-N``: the image on its way from E to N. The pages between are being written into it, so it is neither;
  but they are whole contents, and to write them again from their files, which are still there, gives N.

Each change of state is one rename. A complete checkpoint is restorable when its pages build on zeroes, on the image, or
on another restorable one: so N and N-1 both are, until N is committed and the image moves on to N.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from integration.toolstack import wire
from integration.toolstack.wire import Frame, Kind, WireError

_CHECKPOINT: Final = re.compile(r"(\d+)\.(incoming|staged|complete)")
_IMAGE: Final = re.compile(r"image\.(\d+)(?:-(\d+))?")
_NEW_IMAGE: Final = "image.new"


class StoreError(Exception):
    """What was asked for cannot be done; nothing was changed."""


class Incoming:
    """A checkpoint that is being received. Made by :meth:`MemoryStore.begin`."""

    def __init__(self, store: MemoryStore, epoch: int, first: Frame) -> None:
        self._store = store
        self.epoch = epoch
        self._count = 0
        self._path = store.path(epoch, "incoming")
        self._file = self._path.open("xb")
        self._write(first)

    def add(self, frame: Frame) -> None:
        """Take the next frame.

        :raise StoreError: when it is none of this checkpoint's, or another one was begun meanwhile.
        """
        self._check_open()
        if frame.epoch != self.epoch or frame.kind not in (Kind.DEVICE, Kind.PAGES):
            raise StoreError(f"a frame {frame.kind.name} of epoch {frame.epoch} amid checkpoint {self.epoch}")
        self._write(frame)

    def stage(self, last: Frame) -> None:
        """It is whole: make it durable.

        :raise StoreError: when it is not whole, or another one was begun meanwhile.
        """
        self._check_open()
        if last.epoch != self.epoch or wire.parse_end(last) != self._count:
            raise StoreError(f"checkpoint {self.epoch} is not whole: {self._count} frames came")
        self._write(last)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._store._staged(self)

    def discard(self) -> None:
        """It will not become whole; nothing happens where it is staged or discarded already."""
        if not self._file.closed:
            self._file.close()
            self._path.unlink()

    def close(self) -> None:
        """Close its file."""
        self._file.close()

    def _check_open(self) -> None:
        if self._file.closed:
            raise StoreError(f"checkpoint {self.epoch} was given up")

    def _write(self, frame: Frame) -> None:
        self._file.write(frame.raw)
        self._count += 1


class MemoryStore:
    """An open store; opening one finishes what a crash left half done.

    :param directory: made where it is not there; one for each VM's history.
    :raise StoreError: when another process has it open.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._incoming: Incoming | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = (directory / "lock").open("wb")
        try:
            self._take()
            self._recover()
        except BaseException:
            self._lock.close()
            raise

    def close(self) -> None:
        """Let another process have it; what is being received is of no use any more."""
        if self._incoming:
            self._incoming.close()
        self._lock.close()

    def path(self, epoch: int, state: str) -> Path:
        """File of a checkpoint in a state."""
        return self._directory / f"{epoch}.{state}"

    def checkpoints(self) -> tuple[int, ...]:
        """Numbers of those that can be restored, the newest first."""
        complete = self._numbers("complete")
        return tuple(epoch for epoch in sorted(complete, reverse=True) if self._chain(epoch) is not None)

    def begin(self, first: Frame) -> Incoming:
        """Receive a checkpoint; whatever was received before and not completed is dropped.

        :raise StoreError: when its number is not above all others, or what it builds on is not here.
        """
        _, base = wire.parse_begin(first)
        known = self.checkpoints()
        if not first.epoch or (known and first.epoch <= known[0]):
            raise StoreError(f"checkpoint {first.epoch} after {known[0] if known else 0}")
        if base is not None and base not in known:
            raise StoreError(f"checkpoint {first.epoch} builds on {base}, and there is {known or 'none'}")
        if self._incoming:
            self._incoming.discard()
        for epoch in self._numbers("staged"):
            self.path(epoch, "staged").unlink()
        self._incoming = Incoming(self, first.epoch, first)
        return self._incoming

    def complete(self, epoch: int) -> None:
        """Its disks are staged: it may be restored from now on. Nothing happens where it may be already.

        :raise StoreError: when it is not staged.
        """
        if self.path(epoch, "complete").exists():
            return
        if not self.path(epoch, "staged").exists():
            raise StoreError(f"checkpoint {epoch} is not staged")
        self.path(epoch, "staged").rename(self.path(epoch, "complete"))
        self._sync()

    def drop(self, epoch: int) -> None:
        """Forget a checkpoint; nothing happens where there is none.

        :raise StoreError: when it is the image's, or another one builds on it.
        """
        others = [other for other in self._numbers("complete") if other != epoch]
        if epoch == self._image_epoch() or any(self._base(other) == epoch for other in others):
            raise StoreError(f"checkpoint {epoch} is needed")
        for state in ("complete", "staged"):
            self.path(epoch, state).unlink(missing_ok=True)
        self._sync()

    def committed(self, epoch: int) -> None:
        """It counts: bring the image there and let older ones go. Nothing happens where the image is there already.

        :raise StoreError: when it cannot be restored.
        """
        at = self._image_epoch()
        if at is not None and at >= epoch:
            return
        chain = self._chain(epoch)
        if chain is None:
            raise StoreError(f"checkpoint {epoch} cannot be restored: there is {self.checkpoints() or 'none'}")
        image = self._directory / f"image.{epoch}"
        if self._base(chain[0]) is None:
            moving = self._directory / _NEW_IMAGE
            moving.write_bytes(b"")
        else:
            moving = self._directory / f"image.{at}-{epoch}"
            (self._directory / f"image.{at}").rename(moving)
            self._sync()
        self._write_pages(chain, moving)
        moving.rename(image)
        self._sync()
        self._remove_older(epoch)

    def restore(self, epoch: int, memory: Path, device_state: Path) -> None:
        """Write a checkpoint's memory and device state to two new files; the store keeps it.

        :raise StoreError: when it cannot be restored.
        """
        chain = self._chain(epoch)
        if chain is None:
            raise StoreError(f"checkpoint {epoch} cannot be restored: there is {self.checkpoints() or 'none'}")
        if chain[0] == self._image_epoch():
            _copy_sparse(self._directory / f"image.{chain[0]}", memory)
            chain = chain[1:]
        elif (base := self._base(chain[0])) is not None:
            _copy_sparse(self._directory / f"image.{base}", memory)
        else:
            memory.write_bytes(b"")
        self._write_pages(chain, memory, durable=False)
        state = [bytes(frame.payload) for frame in self._frames(epoch) if frame.kind is Kind.DEVICE]
        device_state.write_bytes(b"".join(state))

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreError(f"{self._directory} is in use") from error

    def _recover(self) -> None:
        for epoch in self._numbers("incoming"):
            self.path(epoch, "incoming").unlink()
        (self._directory / _NEW_IMAGE).unlink(missing_ok=True)
        for path in list(self._directory.iterdir()):
            if (match := _IMAGE.fullmatch(path.name)) and match[2]:
                old, new = int(match[1]), int(match[2])
                self._write_pages(self._links(new, old), path)
                path.rename(self._directory / f"image.{new}")
                self._sync()
        if (at := self._image_epoch()) is not None:
            self._remove_older(at)

    def _remove_older(self, epoch: int) -> None:
        for path in list(self._directory.iterdir()):
            match = _CHECKPOINT.fullmatch(path.name) or _IMAGE.fullmatch(path.name)
            if match and int(match[1]) < epoch:
                path.unlink()

    def _staged(self, incoming: Incoming) -> None:
        self.path(incoming.epoch, "incoming").rename(self.path(incoming.epoch, "staged"))
        self._sync()

    def _numbers(self, state: str) -> set[int]:
        found = (_CHECKPOINT.fullmatch(path.name) for path in self._directory.iterdir())
        return {int(match[1]) for match in found if match and match[2] == state}

    def _image_epoch(self) -> int | None:
        found = (_IMAGE.fullmatch(path.name) for path in self._directory.iterdir())
        return max((int(match[1]) for match in found if match and not match[2]), default=None)

    def _chain(self, epoch: int) -> list[int] | None:
        """Checkpoints whose pages, in this order, make ``epoch``: on the image, or on zeroes; None: they do not."""
        at = self._image_epoch()
        if epoch == at:
            return [epoch]
        try:
            return self._links(epoch, at)
        except StoreError:
            return None

    def _links(self, epoch: int, image: int | None) -> list[int]:
        chain: list[int] = []
        at: int | None = epoch
        while at is not None and at != image:
            if not self.path(at, "complete").exists():
                raise StoreError(f"checkpoint {epoch} needs {at}, which is not here")
            chain.append(at)
            at = self._base(at)
        return chain[::-1]

    def _base(self, epoch: int) -> int | None:
        with self.path(epoch, "complete").open("rb") as file:
            _, base = wire.parse_begin(_read_frame(file))
        return base

    def _frames(self, epoch: int) -> Iterator[Frame]:
        with self.path(epoch, "complete").open("rb") as file:
            count = 0
            while (found := _read_frame(file)).kind is not Kind.END:
                yield found
                count += 1
            if wire.parse_end(found) != count:
                raise WireError(f"checkpoint {epoch} in {self._directory} is damaged")

    def _write_pages(self, chain: list[int], image: Path, *, durable: bool = True) -> None:
        with image.open("r+b", buffering=0) as file:
            for epoch in chain:
                for found in self._frames(epoch):
                    if found.kind is Kind.BEGIN:
                        file.truncate(wire.parse_begin(found)[0])
                    elif found.kind is Kind.PAGES:
                        for offset, data in wire.parse_pages(found):
                            os.pwrite(file.fileno(), data, offset)
            if durable:
                os.fsync(file.fileno())

    def _sync(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _read_frame(file: BinaryIO) -> Frame:
    header = file.read(wire.HEADER.size)
    if len(header) < wire.HEADER.size:
        raise WireError("a checkpoint's file ends too early")
    return wire.parse(header + file.read(wire.payload_length(header)))


def _copy_sparse(source: Path, target: Path) -> None:
    """Copy a file, its holes left as holes."""
    with source.open("rb") as old, target.open("wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        at = 0
        while at < size:
            try:
                start = os.lseek(old.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            os.lseek(new.fileno(), start, os.SEEK_SET)
            while start < at:
                start += os.sendfile(new.fileno(), old.fileno(), start, at - start)
