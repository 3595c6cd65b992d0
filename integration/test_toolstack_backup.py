"""The backup of the memory: never a mixture of two checkpoints, and none lost that was promised, whatever ends it.

No VM here: a file of random pages stands for its memory. Crashes are of two kinds: the store is left at any one of its
system calls and opened again; and the backup's process gets SIGKILL between two steps, or amid one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from integration.toolstack import (
    BackupLost,
    BackupRefused,
    MemoryImage,
    open_backup_link,
    start_backup,
    wire,
)
from integration.toolstack.memory import PAGE
from integration.toolstack.store import MemoryStore, StoreError
from integration.toolstack.wire import Kind

SIZE = 1 << 20


class Memory:
    """A memory that changes, and what it was at each checkpoint."""

    def __init__(self, directory: Path, size: int = SIZE) -> None:
        self.path = directory / "ram"
        with self.path.open("wb") as file:
            file.truncate(size)
        self.image = MemoryImage(self.path)
        self.at: dict[int, bytes] = {}
        self._random = random.Random(4)

    def work(self) -> None:
        """Change some pages, one of them to zeroes."""
        with self.path.open("r+b") as file:
            for index in range(12):
                file.seek(self._random.randrange(self.image.size // PAGE) * PAGE + self._random.choice((0, 1, 4000)))
                file.write(bytes(96) if index == 0 else self._random.randbytes(96))

    def capture(self, epoch: int) -> None:
        """The VM stands still."""
        self.image.capture(range(self.image.size))
        self.at[epoch] = self.path.read_bytes()

    def frames(self, epoch: int, base: int | None) -> Iterator[wire.Frame]:
        """What is sent of it."""
        yield wire.parse(wire.begin(epoch, self.image.size, base))
        yield wire.parse(wire.frame(Kind.DEVICE, epoch, device_state(epoch)))
        count = 2
        for run in self.image.owed(limit=64 << 10):
            yield wire.parse(wire.pages(epoch, [(run.start, self.image.read(run))]))
            count += 1
        yield wire.parse(wire.end(epoch, count))


def device_state(epoch: int) -> bytes:
    return f"devices at {epoch}".encode()


def stage(store: MemoryStore, memory: Memory, epoch: int, base: int | None) -> None:
    memory.work()
    memory.capture(epoch)
    first, *between, last = memory.frames(epoch, base)
    incoming = store.begin(first)
    for frame in between:
        incoming.add(frame)
    incoming.stage(last)


def restored(store: MemoryStore, directory: Path, epoch: int) -> tuple[bytes, bytes]:
    memory, devices = directory / "restored", directory / "restored-devices"
    store.restore(epoch, memory, devices)
    return memory.read_bytes(), devices.read_bytes()


def check_all(store: MemoryStore, memory: Memory, directory: Path) -> tuple[int, ...]:
    """Every checkpoint that is offered is what it was; returns them."""
    offered = store.checkpoints()
    for epoch in offered:
        assert restored(store, directory, epoch) == (memory.at[epoch], device_state(epoch)), epoch
    return offered


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    memory = Memory(tmp_path)
    yield memory
    memory.image.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[MemoryStore]:
    store = MemoryStore(tmp_path / "store")
    yield store
    store.close()


def test_what_is_owed_is_exactly_what_was_changed_and_not_yet_settled(memory: Memory) -> None:
    memory.image.capture(range(SIZE))
    assert memory.image.owed_bytes == 0
    with memory.path.open("r+b") as file:
        for offset in (0, 5 * PAGE + 4095, 6 * PAGE, SIZE - 1):
            file.seek(offset)
            file.write(b"\1")
    memory.image.capture(range(SIZE))
    found = [(run.start // PAGE, run.length // PAGE) for run in memory.image.owed()]
    assert found == [(0, 1), (5, 2), (SIZE // PAGE - 1, 1)]
    assert bytes(memory.image.read(next(memory.image.owed()))) == b"\1" + bytes(PAGE - 1)
    memory.image.settle()
    with memory.path.open("r+b") as file:
        file.seek(2 * PAGE)
        file.write(b"\2")
    memory.image.capture(range(SIZE))
    assert [run.start for run in memory.image.owed()] == [2 * PAGE]


def test_memory_that_became_a_hole_again_is_owed_as_zeroes(memory: Memory) -> None:
    memory.path.write_bytes(b"\1" * SIZE)
    memory.image.capture(range(SIZE))
    memory.image.settle()
    with memory.path.open("r+b") as file:
        file.truncate(0)
        file.truncate(SIZE)
    memory.image.capture(range(SIZE))
    assert memory.image.owed_bytes == SIZE
    assert bytes(memory.image.read(next(memory.image.owed()))) == bytes(SIZE)


def test_checkpoint_before_stays_until_its_successor_counts(store: MemoryStore, memory: Memory, tmp_path: Path) -> None:
    stage(store, memory, 1, None)
    assert store.checkpoints() == ()
    store.complete(1)
    assert check_all(store, memory, tmp_path) == (1,)
    store.committed(1)
    memory.image.settle()
    stage(store, memory, 2, 1)
    assert check_all(store, memory, tmp_path) == (1,)
    store.complete(2)
    assert check_all(store, memory, tmp_path) == (2, 1)
    store.committed(2)
    assert check_all(store, memory, tmp_path) == (2,)


def test_dropped_checkpoints_changes_come_with_the_next(store: MemoryStore, memory: Memory, tmp_path: Path) -> None:
    stage(store, memory, 1, None)
    store.complete(1)
    store.committed(1)
    memory.image.settle()
    stage(store, memory, 2, 1)
    store.drop(2)
    stage(store, memory, 3, 1)
    store.complete(3)
    store.drop(3)
    assert check_all(store, memory, tmp_path) == (1,)
    stage(store, memory, 4, 1)
    store.complete(4)
    assert check_all(store, memory, tmp_path) == (4, 1)


def test_steps_out_of_order_are_refused_and_change_nothing(store: MemoryStore, memory: Memory, tmp_path: Path) -> None:
    stage(store, memory, 5, None)
    store.complete(5)
    wrong: list[Callable[[], None]] = [
        lambda: stage(store, memory, 5, None),
        lambda: stage(store, memory, 6, 4),
        lambda: store.complete(6),
        lambda: store.committed(6),
        lambda: store.restore(6, tmp_path / "x", tmp_path / "y"),
    ]
    for step in wrong:
        with pytest.raises(StoreError):
            step()
    first, second, *_, last = memory.frames(7, 5)
    incoming = store.begin(first)
    with pytest.raises(StoreError, match="not whole"):
        incoming.stage(last)
    store.begin(next(memory.frames(8, 5)))
    with pytest.raises(StoreError, match="given up"):
        incoming.add(second)
    with pytest.raises(StoreError, match="in use"):
        MemoryStore(tmp_path / "store")
    assert store.checkpoints() == (5,)


class Crash(Exception):
    """The process is gone."""


@contextmanager
def crash_at(call: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The ``call``-th system call that changes something on disk, of those of the store, is not done, nor any later."""
    made = [0]

    def counted(real: Any) -> Any:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            made[0] += 1
            if made[0] >= call:
                raise Crash
            return real(*arguments, **named)

        return wrapper

    with monkeypatch.context() as patch:
        for owner, name in ((os, "pwrite"), (os, "fsync"), (Path, "rename"), (Path, "unlink"), (Path, "write_bytes")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield made


@dataclass
class Promises:
    """What the store has acknowledged.

    :ivar kept: must be offered.
    :ivar gone: must not be.
    """

    kept: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)


def history(store: MemoryStore, memory: Memory, promises: Promises) -> None:
    """Checkpoints of every fate: committed, dropped, in doubt with another one upon it, and from nothing again."""
    base: int | None = None
    for epoch, fate in enumerate(("commit", "commit", "drop", "doubt", "commit", "afresh", ""), 1):
        if fate == "afresh":
            base = None
            memory.image.owe_all()
        stage(store, memory, epoch, base)
        if fate == "drop":
            store.drop(epoch)
            promises.gone.add(epoch)
            continue
        store.complete(epoch)
        promises.kept.add(epoch)
        base = epoch
        memory.image.settle()
        if fate in ("commit", "afresh"):
            # from here on the older ones may go, and when it returns they are gone
            older, promises.kept = promises.kept - {epoch}, {epoch}
            store.committed(epoch)
            promises.gone |= older


def test_crash_at_any_system_call_loses_no_promised_checkpoint_and_mixes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, crashed = 0, True
    while crashed:
        call += 1
        here = tmp_path / str(call)
        here.mkdir()
        memory, promises = Memory(here), Promises()
        store = MemoryStore(here / "store")
        with crash_at(call, monkeypatch):
            try:
                history(store, memory, promises)
                crashed = False
            except Crash:
                pass
        store.close()
        # and one more crash, while the first one's is being made good
        with crash_at(1 + call % 5, monkeypatch), suppress(Crash):
            MemoryStore(here / "store").close()
        store = MemoryStore(here / "store")
        offered = set(check_all(store, memory, here))
        assert promises.kept <= offered, call
        assert not promises.gone & offered, call
        # and it goes on from there
        epoch = max(memory.at, default=0) + 1
        memory.image.owe_all()
        stage(store, memory, epoch, None)
        store.complete(epoch)
        store.committed(epoch)
        assert check_all(store, memory, here) == (epoch,)
        store.close()
        memory.image.close()
    assert call > 60


async def test_backup_killed_at_any_step_is_whole_again_and_the_link_says_lost(scratch: Path) -> None:
    memory = Memory(scratch)
    base: int | None = None
    for epoch, moment in enumerate(("begun", "amid", "staged", "complete", "committed", "dropped"), 1):
        memory.work()
        memory.capture(epoch)
        async with start_backup(scratch) as (process, path), open_backup_link(path) as link:
            before = await link.checkpoints()
            if moment in ("begun", "amid"):
                *sent, last = memory.frames(epoch, base)
                for frame in sent[:1] if moment == "begun" else sent:
                    await link._send(frame.raw)
                process.kill()
                with pytest.raises(BackupLost):
                    await link._ask(last.raw, 60)
            else:
                await link.stage(epoch, memory.image, device_state(epoch), base=base)
                if moment in ("complete", "committed"):
                    await link.complete(epoch)
                if moment == "committed":
                    await link.committed(epoch)
                if moment == "dropped":
                    await link.drop(epoch)
                process.kill()
                with pytest.raises(BackupLost):
                    await link.complete(epoch)
        async with start_backup(scratch) as (_, path), open_backup_link(path) as link:
            if moment == "staged":
                await link.complete(epoch)
            offered = await link.checkpoints()
            assert offered == {
                "staged": (epoch, *before),
                "complete": (epoch, *before),
                "committed": (epoch,),
            }.get(moment, before)
            for number in offered:
                target = scratch / f"{epoch}-{number}"
                await link.restore(number, target, target.with_suffix(".devices"))
                assert target.read_bytes() == memory.at[number]
                assert target.with_suffix(".devices").read_bytes() == device_state(number)
        if epoch in offered:
            base = epoch
            memory.image.settle()
    memory.image.close()


async def test_backup_refuses_what_builds_on_nothing_it_has_and_goes_on_serving(scratch: Path) -> None:
    memory = Memory(scratch)
    memory.work()
    memory.capture(1)
    async with start_backup(scratch) as (process, path), open_backup_link(path) as link:
        with pytest.raises(BackupRefused, match="builds on 7"):
            await link.stage(8, memory.image, b"", base=7)
        with pytest.raises(BackupRefused, match="not staged"):
            await link.complete(8)
        await link.stage(8, memory.image, b"", base=None)
        await link.complete(8)
        assert await link.checkpoints() == (8,)
        assert process.running
    memory.image.close()


async def test_second_sender_takes_over_from_one_that_fell_silent(scratch: Path) -> None:
    memory = Memory(scratch)
    memory.work()
    memory.capture(1)

    async with (
        start_backup(scratch) as (_, path),
        open_backup_link(path) as silent,
        open_backup_link(path) as link,
    ):
        *sent, last = memory.frames(1, None)
        for frame in sent:
            await silent._send(frame.raw)
        # one answer on this connection: all before it has been taken in
        assert await silent.checkpoints() == ()
        await link.stage(1, memory.image, b"", base=None)
        with pytest.raises(BackupRefused, match="given up"):
            await silent._ask(last.raw, 60)
        await link.complete(1)
        assert await link.checkpoints() == (1,)
    memory.image.close()
