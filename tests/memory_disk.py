"""A disk in memory that loses, tears and reorders whatever was not synced: the other side of ``storage.files.Files``.

Rules, all of them as hostile as POSIX allows:

- Data and size of a file are on the device after a sync of that file; names after a sync of their directory.
- At a power cut every 512-byte sector written since is there or not, by itself; and a 4 KiB block that was being
  written may come out as noise, durable neighbours in it included (drives write larger units than they promise).
- Changes to a directory that were not synced are there or not, each by itself; one rename is one change.
- A sync that fails leaves the pages clean: reads go on showing the new contents until the cache is dropped, and no
  later sync tries again.

:meth:`MemoryDisk.cut_power_at` ends the run inside the n-th operation from now with :class:`PowerCut`, which is no
``Exception``, so that nobody survives it by accident.  Every choice comes from one ``random.Random``.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qemu_remus.storage.files import Buffer, Handle

SECTOR = 512
BLOCK = 4096


class PowerCut(BaseException):
    """The machine is off."""


@dataclass(eq=False)
class File:
    """Contents as a process sees them, as the device has them, and the writes between the two."""

    seen: bytearray = field(default_factory=bytearray)
    device: bytearray = field(default_factory=bytearray)
    writes: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        _put(self.seen, offset, data)
        self.writes.append((offset, data))

    def reach_device(self) -> None:
        """All that is dirty, and only that: what a failed sync lost stays lost."""
        for offset, data in self.writes:
            _put(self.device, offset, data)
        self.writes.clear()
        if len(self.device) < len(self.seen):
            self.device.extend(bytes(len(self.seen) - len(self.device)))

    def reach_device_partly(self, rng: random.Random) -> None:
        """What a power cut, or a sync that fails, makes of it."""
        share = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        tear = rng.choice((0.0, 0.0, 0.3))
        torn: set[int] = set()
        for offset, data in self.writes:
            start = offset
            while start < offset + len(data):
                stop = min(offset + len(data), start - start % SECTOR + SECTOR)
                if rng.random() < share:
                    _put(self.device, start, data[start - offset : stop - offset])
                elif rng.random() < tear:
                    torn.add(start // BLOCK)
                start = stop
        if len(self.device) < len(self.seen) and rng.random() < share:
            self.device.extend(bytes(len(self.seen) - len(self.device)))
        for block in torn:
            self._make_noise(rng, block)
        self.writes.clear()

    def _make_noise(self, rng: random.Random, block: int) -> None:
        end = min(len(self.device), (block + 1) * BLOCK)
        if end <= block * BLOCK:
            return
        start, stop = block * BLOCK, end
        if rng.random() < 0.5:
            start = rng.randrange(start, end)
            stop = rng.randint(start, end)
        self.device[start:stop] = rng.randbytes(stop - start)


@dataclass(eq=False)
class Directory:
    """Names as a process sees them, as the device has them, and the changes between the two."""

    seen: dict[str, Node] = field(default_factory=dict)
    device: dict[str, Node] = field(default_factory=dict)
    changes: list[dict[str, Node | None]] = field(default_factory=list)

    def change(self, change: dict[str, Node | None]) -> None:
        _change(self.seen, change)
        self.changes.append(change)

    def reach_device(self) -> None:
        for change in self.changes:
            _change(self.device, change)
        self.changes.clear()

    def reach_device_partly(self, rng: random.Random) -> None:
        share = rng.choice((0.0, 0.5, 1.0))
        self.changes = [change for change in self.changes if rng.random() < share]
        self.reach_device()


Node = File | Directory


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _change(names: dict[str, Node], change: dict[str, Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class MemoryDisk:
    """``Files`` on a disk in memory; the root directory ``/`` is there.

    :ivar calls: how often each operation was called.
    :ivar operations: how many operations that change anything there were in all.
    """

    def __init__(self, rng: random.Random | None = None, *, capacity: int | None = None) -> None:
        self.rng = rng or random.Random(0)
        self.capacity = capacity
        self.calls: Counter[str] = Counter()
        self.operations = 0
        self._root = Directory()
        self._open: dict[int, File] = {}
        self._next_handle = 3
        self._cut_at: int | None = None
        self._off = False
        self._faults: dict[str, list[int]] = {}

    # --- what a test does to it --------------------------------------------------------------------------------------

    def cut_power_at(self, operation: int | None) -> None:
        """Cut the power inside the ``operation``-th changing operation from now (1: the next one); None: never."""
        self._cut_at = None if operation is None else self.operations + operation

    def fail_next(self, operation: str, error: int) -> None:
        """Let the next call of ``pwrite``, ``fsync``, ``fdatasync``, ``allocate``, ... fail; several calls add up."""
        self._faults.setdefault(operation, []).append(error)

    def power_cycle(self) -> None:
        """Cut the power now, if it is not cut yet, and switch on again."""
        self._cycle(self._root)
        self.restart()
        self._off = False
        self._cut_at = None
        self._faults.clear()

    def restart(self) -> None:
        """The process ended, the machine runs on: files are closed, the cache stays."""
        self._open.clear()

    def copy(self) -> MemoryDisk:
        """The same disk once more, with nothing open and no faults waiting; only for a disk where all is synced."""
        twin = MemoryDisk(random.Random(0), capacity=self.capacity)
        twin._root = _copy(self._root)
        return twin

    def file(self, path: Path) -> File:
        """To look at it, or to damage it."""
        node = self._find(path)
        assert isinstance(node, File)
        return node

    def damage(self, path: Path, offset: int, data: bytes) -> None:
        """Change bytes in place, cache and device."""
        file = self.file(path)
        _put(file.seen, offset, data)
        _put(file.device, offset, data)

    def truncate(self, path: Path, size: int) -> None:
        """Cut a file, cache and device."""
        file = self.file(path)
        del file.seen[size:]
        del file.device[size:]

    @property
    def open_files(self) -> int:
        """Handles that were not closed."""
        return len(self._open)

    # --- Files -------------------------------------------------------------------------------------------------------

    def open(self, path: Path, *, create: bool = False) -> Handle:
        parent = self._directory(path.parent)
        node = parent.seen.get(path.name)
        if create:
            if node is not None:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
            node = File()
            self._step("open")
            parent.change({path.name: node})
        elif not isinstance(node, File):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        handle = self._next_handle
        self._next_handle += 1
        self._open[handle] = node
        return Handle(handle)

    def close(self, handle: Handle) -> None:
        if not self._off:
            del self._open[handle]

    def size(self, handle: Handle) -> int:
        return len(self._get(handle).seen)

    def pread(self, handle: Handle, length: int, offset: int) -> bytes:
        self.calls["pread"] += 1
        self._fault("pread")
        return bytes(self._get(handle).seen[offset : offset + length])

    def pwrite(self, handle: Handle, buffers: Sequence[Buffer], offset: int) -> None:
        file = self._get(handle)
        data = b"".join(bytes(buffer) for buffer in buffers)
        growth = max(0, offset + len(data) - len(file.seen))
        try:
            self._step("pwrite")
            self._take(growth)
        except BaseException:
            file.write(offset, data[: self.rng.randint(0, len(data))])
            raise
        file.write(offset, data)

    def allocate(self, handle: Handle, size: int) -> None:
        file = self._get(handle)
        self._step("allocate")
        self._take(max(0, size - len(file.seen)))
        if len(file.seen) < size:
            file.seen.extend(bytes(size - len(file.seen)))

    def fsync(self, handle: Handle) -> None:
        self._sync(self._get(handle), "fsync")

    def fdatasync(self, handle: Handle) -> None:
        self._sync(self._get(handle), "fdatasync")

    def drop_cache(self, handle: Handle) -> None:
        file = self._get(handle)
        dirty = list(file.writes)
        size = len(file.seen)
        file.seen[:] = file.device
        if dirty and len(file.seen) < size:
            file.seen.extend(bytes(size - len(file.seen)))
        for offset, data in dirty:
            _put(file.seen, offset, data)

    def make_directory(self, path: Path) -> None:
        parent = self._directory(path.parent)
        if path.name not in parent.seen:
            self._step("make_directory")
            parent.change({path.name: Directory()})

    def sync_directory(self, path: Path) -> None:
        directory = self._directory(path)
        self._step("sync_directory")
        directory.reach_device()

    def list(self, path: Path) -> list[str]:
        node = self._find(path)
        return list(node.seen) if isinstance(node, Directory) else []

    def rename(self, old: Path, new: Path) -> None:
        parent = self._directory(old.parent)
        assert parent is self._directory(new.parent), "only within a directory"
        node = parent.seen[old.name]
        self._step("rename")
        parent.change({old.name: None, new.name: node})

    def unlink(self, path: Path) -> None:
        parent = self._directory(path.parent)
        if not isinstance(parent.seen.get(path.name), File):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        self._step("unlink")
        parent.change({path.name: None})

    def remove_directory(self, path: Path) -> None:
        parent = self._directory(path.parent)
        if self._directory(path).seen:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        self._step("remove_directory")
        parent.change({path.name: None})

    # --- inside ------------------------------------------------------------------------------------------------------

    def _step(self, operation: str) -> None:
        if self._off:
            raise PowerCut
        self.calls[operation] += 1
        self.operations += 1
        if self.operations == self._cut_at:
            self._off = True
            raise PowerCut
        self._fault(operation)

    def _fault(self, operation: str) -> None:
        faults = self._faults.get(operation)
        if faults:
            number = faults.pop(0)
            raise OSError(number, os.strerror(number))

    def _take(self, growth: int) -> None:
        if self.capacity is not None and growth and growth > self.capacity - _size(self._root):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _sync(self, file: File, operation: str) -> None:
        try:
            self._step(operation)
        except OSError:
            file.reach_device_partly(self.rng)
            raise
        file.reach_device()

    def _get(self, handle: Handle) -> File:
        if self._off:
            raise PowerCut
        return self._open[handle]

    def _find(self, path: Path) -> Node | None:
        if self._off:
            raise PowerCut
        node: Node | None = self._root
        for part in path.parts[1:]:
            if not isinstance(node, Directory):
                return None
            node = node.seen.get(part)
        return node

    def _directory(self, path: Path) -> Directory:
        node = self._find(path)
        if not isinstance(node, Directory):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return node

    def _cycle(self, node: Node) -> None:
        node.reach_device_partly(self.rng)
        if isinstance(node, Directory):
            node.seen = dict(node.device)
            for child in node.seen.values():
                self._cycle(child)
        else:
            node.seen[:] = node.device


def _size(node: Node) -> int:
    return len(node.seen) if isinstance(node, File) else sum(_size(child) for child in node.seen.values())


def _copy(node: Directory) -> Directory:
    names: dict[str, Node] = {
        name: _copy(child) if isinstance(child, Directory) else File(bytearray(child.seen), bytearray(child.seen))
        for name, child in node.seen.items()
    }
    return Directory(dict(names), dict(names))
