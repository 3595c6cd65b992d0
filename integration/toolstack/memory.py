"""The guest's memory: what of it has changed since the last checkpoint, found by comparing, and a copy of it.

Owns the mapping of the VM's memory file and the image beside it. Nothing about checkpoints' numbers, or about who gets
the image, may enter. QEMU maps the same file shared (``memory-backend-file,share=on``): while the VM is stopped, and
nothing is sent to its ports, the file is its memory.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PAGE: Final = 4096
"""Bytes that count as changed when one of them is."""
_CHUNK: Final = 256 << 10
"""Bytes that are compared at once; only in those that differ are pages looked at."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcmp.restype = ctypes.c_int
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED: Final = ctypes.c_void_p(-1).value


@dataclass(frozen=True, slots=True)
class Run:
    """Adjacent pages that have changed.

    :param start: first byte, a multiple of :data:`PAGE`.
    :param length: bytes, a multiple of :data:`PAGE`.
    """

    start: int
    length: int


class MemoryImage:
    """A copy of a VM's memory, and which of its pages are owed to the holder of an older copy.

    :meth:`capture` makes the image equal to the memory. What it had to change is *owed* from then on, until
    :meth:`settle` says that the other side has this image. An image that the other side has lost, or has thrown away,
    thus needs no undoing: what was owed stays owed, beside what changes later.

    All of it blocks; one thread at a time, but for :meth:`capture`, which several may do for different parts.

    :param path: QEMU's memory file, with its full size.
    :ivar size: bytes.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self._live = 0
        try:
            self.size = os.fstat(self._fd).st_size
            self._live = _map(self._fd, self.size)
        finally:
            if not self._live:
                os.close(self._fd)
        self._map = mmap.mmap(-1, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._view = memoryview(self._map)
        self._image = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._owed = bytearray(self.size // PAGE)
        # chunks in which the image may be anything but zero
        self._used = bytearray(self.size // _CHUNK)

    def close(self) -> None:
        """Give both mappings back; nothing works afterwards."""
        if self._live:
            _libc.munmap(self._live, self.size)
            self._live = 0
            os.close(self._fd)
            self._view.release()

    def parts(self, count: int) -> list[range]:
        """The memory in so many parts for :meth:`capture`, about equal."""
        step = -(-self.size // (count * _CHUNK)) * _CHUNK
        return [range(start, min(start + step, self.size)) for start in range(0, self.size, step)]

    def capture(self, part: range) -> None:
        """Make this part of the image equal to the memory's; what differed is owed.

        The result is of one instant only where the memory does not change meanwhile. To capture a running VM is of use
        all the same: it makes the capture that counts, soon afterwards, shorter.

        :param part: bytes, from :meth:`parts`.
        """
        memcmp, live, image = _libc.memcmp, self._live, self._image
        self._note_used(part)
        chunk = part.start // _CHUNK - 1
        while (chunk := self._used.find(1, chunk + 1, part.stop // _CHUNK)) >= 0:
            start = chunk * _CHUNK
            if memcmp(live + start, image + start, _CHUNK):
                self._capture_pages(start)

    def _note_used(self, part: range) -> None:
        """Memory that the guest has never touched is a hole in the file: zero, as the image is from the beginning."""
        at = part.start
        while at < part.stop:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            if start >= part.stop:
                return
            at = os.lseek(self._fd, start, os.SEEK_HOLE)
            first, last = start // _CHUNK, -(-min(at, part.stop) // _CHUNK)
            self._used[first:last] = b"\1" * (last - first)

    def _capture_pages(self, chunk: int) -> None:
        memcmp, live, image = _libc.memcmp, self._live, self._image
        owed, run = self._owed, -1
        for at in range(chunk, chunk + _CHUNK, PAGE):
            if memcmp(live + at, image + at, PAGE):
                owed[at // PAGE] = 1
                if run < 0:
                    run = at
            elif run >= 0:
                ctypes.memmove(image + run, live + run, at - run)
                run = -1
        if run >= 0:
            ctypes.memmove(image + run, live + run, chunk + _CHUNK - run)

    def owed(self, *, limit: int = 1 << 20) -> Iterator[Run]:
        """What is owed, in order, in runs of at most ``limit`` bytes."""
        end = 0
        while (page := self._owed.find(1, end)) >= 0:
            end = self._owed.find(0, page)
            if end < 0:
                end = len(self._owed)
            end = min(end, page + limit // PAGE)
            yield Run(page * PAGE, (end - page) * PAGE)

    @property
    def owed_bytes(self) -> int:
        """How much is owed."""
        return self._owed.count(1) * PAGE

    def read(self, run: Run) -> memoryview:
        """A part of the image; what it shows changes with the next :meth:`capture`."""
        return self._view[run.start : run.start + run.length]

    def owe_all(self) -> None:
        """The other side has nothing: all is owed that may be other than zero."""
        share = _CHUNK // PAGE
        self._owed = bytearray(b"".join(bytes((used,)) * share for used in self._used))

    def settle(self) -> None:
        """The other side has the image as it is now: nothing is owed."""
        self._owed = bytearray(len(self._owed))


def _map(fd: int, size: int) -> int:
    """Map it read-only and return the address: Python's own mapping gives none, unless it may be written."""
    if not size or size % _CHUNK:
        raise ValueError(f"{size} bytes are no memory's size")
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address is None or address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "the memory file cannot be mapped")
    return int(address)
