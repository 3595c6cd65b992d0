"""The secondary's controller over loopback, with a primary that says its lines: comparisons of all kinds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from uuid import UUID

import pytest
import trio

from qemu_remus.core import messages as m
from qemu_remus.core.comparison import all_differ, digest_blocks
from qemu_remus.core.errors import RefusalCode, StorageError
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import Base, DiskName, DiskSpec, DiskState, EpochNumber, Generation, PairName, Role
from qemu_remus.core.settings import Address, SecondaryConfig
from qemu_remus.core.target_spec import raw_target
from qemu_remus.core.wire import digest_update
from qemu_remus.link import Link, connect, open_link
from qemu_remus.secondary import applier, retry
from qemu_remus.secondary.controller import SecondaryController
from qemu_remus.storage import files
from qemu_remus.storage.files import Handle, OsFiles
from qemu_remus.storage.store import Store

from .message_strategies import hello

BLOCK = 4096
SIZE = 5 * BLOCK + 512
ZEROES = bytes(SIZE)
DISKS = (DiskSpec(DiskName("vda"), SIZE),)
GENERATION = Generation(UUID(int=7))
E1, E2, E3, E4 = map(EpochNumber, (1, 2, 3, 4))
HANGS = 60.0
"""Seconds after which a test has shown that nobody answers."""


def configured(tmp_path: Path) -> SecondaryConfig:
    store_path = tmp_path / "store"
    store_path.mkdir(exist_ok=True)
    disks = {DiskName("vda"): raw_target(tmp_path / "vda")}
    return SecondaryConfig(PairName("vm"), Address("127.0.0.1", 0), store_path, disks, tmp_path / "control")


@contextmanager
def secondary_store(tmp_path: Path) -> Iterator[Store]:
    """The store as its next controller finds it."""
    store = Store.open(configured(tmp_path))
    try:
        yield store
    finally:
        store.close()


@asynccontextmanager
async def secondary(tmp_path: Path) -> AsyncIterator[Address]:
    """A controller without a control socket, and where it listens."""
    config = configured(tmp_path)
    store = Store.open(config)
    try:
        controller = SecondaryController(config, store)
        with trio.fail_after(HANGS):
            async with trio.open_nursery() as nursery:
                listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
                nursery.start_soon(controller._engine)
                nursery.start_soon(controller._applier.run)
                nursery.start_soon(controller._retry.run)
                nursery.start_soon(trio.serve_listeners, controller._serve, listeners)
                yield Address("127.0.0.1", listeners[0].socket.getsockname()[1])
                nursery.cancel_scope.cancel()
    finally:
        store.close()


@asynccontextmanager
async def primary(address: Address, *, committed: Base = None) -> AsyncIterator[Link]:
    """A primary's end of a link, after the hellos."""
    disks = tuple(replace(disk, base=committed) for disk in DISKS)
    begun = committed is not None
    ours = hello(
        Role.PRIMARY,
        disks=disks,
        generation=GENERATION if begun else None,
        committed=committed,
        highest_epoch=committed or 0,
        disk_state=DiskState.UP_TO_DATE if begun else DiskState.INCONSISTENT,
    )
    async with open_link(await connect(address.host, address.port), Role.PRIMARY) as link:
        await link.send(ours)
        assert isinstance(await heard(link), m.Hello)
        yield link


async def heard(link: Link) -> m.Message:
    while isinstance(message := await link.receive(), m.Heartbeat):
        pass
    return message


def question(content: bytes, offset: int = 0) -> m.CompareBlocks:
    return m.CompareBlocks(0, offset, BLOCK, digest_blocks(content, BLOCK))


def answer(*differing: int, offset: int = 0) -> m.BlocksDiffer:
    return m.BlocksDiffer(0, offset, bytes([sum(1 << block for block in differing)]))


async def send_epoch(link: Link, epoch: EpochNumber, base: Base, *writes: tuple[int, bytes], commit: bool) -> None:
    await link.send(m.EpochBegin(epoch, base))
    digest = 0
    for block, fill in writes:
        message = m.EpochExtents(epoch, (Extent(0, block * BLOCK, BLOCK),), fill * BLOCK)
        digest = digest_update(digest, message)
        await link.send(message)
    await link.send(m.EpochEnd(epoch, len(writes), len(writes) * BLOCK, digest, commit))


async def sync(link: Link) -> None:
    """A full copy of zeroes, committed as checkpoint 1."""
    await link.send(m.SyncBegin(GENERATION, DISKS))
    assert await heard(link) == m.SyncReady((True,))
    await link.send(m.SyncFlush(1))
    assert await heard(link) == m.SyncFlushed(1)
    await send_epoch(link, E1, None, commit=True)
    assert await heard(link) == m.Committed(E1)


def after(*writes: tuple[int, bytes]) -> bytes:
    content = bytearray(ZEROES)
    for block, fill in writes:
        content[block * BLOCK : (block + 1) * BLOCK] = fill * BLOCK
    return bytes(content)


async def test_a_full_copy_is_told_what_the_images_hold_at_that_moment(tmp_path: Path) -> None:
    async with secondary(tmp_path) as address, primary(address) as link:
        await link.send(m.SyncBegin(GENERATION, DISKS))
        assert await heard(link) == m.SyncReady((True,))
        await link.send(question(after((2, b"x"))))
        await link.send(m.SyncExtents((Extent(0, 2 * BLOCK, BLOCK),), b"x" * BLOCK))
        await link.send(question(after((2, b"x"), (4, b"y"))))
        await link.send(question(ZEROES[4 * BLOCK :], 4 * BLOCK))
        assert [await heard(link) for _ in range(3)] == [answer(2), answer(4), answer(offset=4 * BLOCK)]


async def test_an_epoch_is_told_what_the_last_checkpoint_holds_although_it_is_not_in_the_images_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing is applied but for somebody who waits.
    monkeypatch.setattr(applier, "APPLY_INTERVAL", 3600.0)
    async with secondary(tmp_path) as address, primary(address) as link:
        await sync(link)
        await send_epoch(link, E2, E1, (3, b"b"), commit=True)
        assert await heard(link) == m.Committed(E2)
        assert (tmp_path / "vda").read_bytes() == ZEROES
        await link.send(m.EpochBegin(E3, E2))
        await link.send(m.EpochExtents(E3, (Extent(0, 0, BLOCK),), b"c" * BLOCK))
        await link.send(question(ZEROES))
        assert await heard(link) == answer(3)
        assert (tmp_path / "vda").read_bytes() == after((3, b"b"))


async def test_questions_without_an_answer_do_not_keep_the_images_from_their_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the queue full, neither the engine nor the applier may wait for room in it.
    monkeypatch.setattr(applier, "APPLY_INTERVAL", 3600.0)
    monkeypatch.setattr("qemu_remus.secondary.controller.QUEUE_LIMIT", 1)
    monkeypatch.setattr("qemu_remus.storage.store.APPLY_AT_ONCE", 1)
    async with secondary(tmp_path) as address, primary(address) as link:
        await sync(link)
        for epoch, base in ((E2, E1), (E3, E2)):
            await send_epoch(link, epoch, base, (epoch, b"b"), commit=True)
            assert await heard(link) == m.Committed(epoch)
        await link.send(m.EpochBegin(E4, E3))
        for _ in range(20):
            await link.send(question(ZEROES))
        assert [await heard(link) for _ in range(20)] == [answer(2, 3)] * 20


async def test_what_is_in_doubt_since_another_link_differs(tmp_path: Path) -> None:
    async with secondary(tmp_path) as address, primary(address) as link:
        await sync(link)
        await send_epoch(link, E2, E1, (3, b"b"), commit=False)
        assert await heard(link) == m.EpochStaged(E2)
        await link.send(m.Goodbye(RefusalCode.SHUTTING_DOWN, "done"))
    async with secondary(tmp_path) as address, primary(address, committed=E1) as link:
        await link.send(m.EpochBegin(E3, E1))
        await link.send(question(ZEROES))
        assert await heard(link) == answer(3)


async def test_an_image_that_became_too_small_refuses_the_epoch_and_keeps_the_link(tmp_path: Path) -> None:
    async with secondary(tmp_path) as address, primary(address) as link:
        await sync(link)
        with (tmp_path / "vda").open("r+b") as image:
            image.truncate(BLOCK)
        await link.send(m.EpochBegin(E2, E1))
        await link.send(question(ZEROES))
        await link.send(question(ZEROES))
        refused = await heard(link)
        assert isinstance(refused, m.EpochRefused)
        assert (refused.epoch, refused.code) == (E2, RefusalCode.STORAGE_FAILED)
        assert "smaller" in refused.text
        cannot_tell = m.BlocksDiffer(0, 0, all_differ(6))
        assert [await heard(link) for _ in range(2)] == [cannot_tell] * 2
        await send_epoch(link, E3, E1, commit=True)
        assert await heard(link) == m.Committed(E3)


async def test_an_image_that_cannot_be_written_ends_the_link_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applier, "APPLY_INTERVAL", 3600.0)
    async with secondary(tmp_path) as address, primary(address) as link:
        await sync(link)
        await send_epoch(link, E2, E1, (3, b"b"), commit=True)
        assert await heard(link) == m.Committed(E2)

        def fail(*arguments: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("qemu_remus.storage.targets.write_all", fail)
        await link.send(m.EpochBegin(E3, E2))
        await link.send(question(ZEROES))
        refused = await heard(link)
        assert isinstance(refused, m.EpochRefused)
        assert "Input/output error" in refused.text
        assert await heard(link) == m.BlocksDiffer(0, 0, all_differ(6))
        goodbye = await heard(link)
        assert isinstance(goodbye, m.Goodbye)
        assert goodbye.code is RefusalCode.STORAGE_FAILED


# --- storage that works again ----------------------------------------------------------------------------------------


@pytest.fixture
def retried_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "RETRY_FIRST", 0.01)
    monkeypatch.setattr(retry, "RETRY_LIMIT", 0.01)


@asynccontextmanager
async def reconnected(address: Address, committed: Base) -> AsyncIterator[tuple[Link, m.Hello]]:
    """A primary that comes again and again until it is taken; with the secondary's hello."""
    disks = tuple(replace(disk, base=E1) for disk in DISKS)
    for session in count(2):
        ours = hello(
            Role.PRIMARY,
            session=session,
            disks=disks,
            generation=GENERATION,
            committed=committed,
            highest_epoch=committed or 0,
            disk_state=DiskState.UP_TO_DATE,
        )
        async with open_link(await connect(address.host, address.port), Role.PRIMARY) as link:
            await link.send(ours)
            theirs = await heard(link)
            assert isinstance(theirs, m.Hello)
            if theirs.disk_state is not DiskState.FAILED:
                yield link, theirs
                return


async def test_an_image_that_can_be_written_again_is_brought_up_and_the_primary_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retried_soon: None
) -> None:
    broken = True
    really = files.write_all

    def fail(*arguments: object) -> None:
        if broken:
            raise OSError(28, "No space left on device")
        really(*arguments)  # type: ignore[arg-type]

    async with secondary(tmp_path) as address:
        async with primary(address) as link:
            await sync(link)
            monkeypatch.setattr("qemu_remus.storage.targets.write_all", fail)
            await send_epoch(link, E2, E1, (3, b"b"), commit=True)
            assert await heard(link) == m.Committed(E2)
            goodbye = await heard(link)
            assert isinstance(goodbye, m.Goodbye)
            assert "No space left" in goodbye.text
        assert (tmp_path / "vda").read_bytes() == ZEROES
        broken = False
        async with reconnected(address, E2) as (link, theirs):
            assert theirs.committed == E2
            assert (tmp_path / "vda").read_bytes() == after((3, b"b"))
            await send_epoch(link, E3, E2, (0, b"c"), commit=True)
            assert await heard(link) == m.Committed(E3)


async def test_images_whose_superblock_cannot_be_written_are_applied_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retried_soon: None
) -> None:
    broken = False
    really = OsFiles.rename

    def fail(self: OsFiles, old: Path, new: Path) -> None:
        if broken:
            raise OSError(28, "No space left on device")
        really(self, old, new)

    async with secondary(tmp_path) as address:
        async with primary(address) as link:
            await sync(link)
            monkeypatch.setattr(OsFiles, "rename", fail)
            broken = True
            await send_epoch(link, E2, E1, (3, b"b"), commit=True)
            assert await heard(link) == m.Committed(E2)
            assert isinstance(await heard(link), m.Goodbye)
        broken = False
        async with reconnected(address, E2) as (link, theirs):
            assert theirs.committed == E2


@pytest.mark.parametrize("reached", [False, True])
async def test_a_journal_that_could_not_be_synced_is_read_back_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retried_soon: None, reached: bool
) -> None:
    """The commit's record may have reached the device or not; the journal's file is what it is."""
    really = OsFiles.fdatasync
    failures = 0

    def fail(self: OsFiles, handle: Handle) -> None:
        nonlocal failures
        failures += 1
        if failures > 1:
            really(self, handle)
            return
        if not reached:
            # The pages are dropped, and were never written.
            segment = next((tmp_path / "store" / "journal").rglob("*.segment"))
            with segment.open("r+b") as file:
                length = segment.stat().st_size
                file.seek(before)
                file.write(bytes(length - before))
        raise OSError(5, "Input/output error")

    async with secondary(tmp_path) as address:
        async with primary(address) as link:
            await sync(link)
            segment = next((tmp_path / "store" / "journal").rglob("*.segment"))
            before = len(segment.read_bytes().rstrip(b"\0"))
            before += -before % BLOCK
            monkeypatch.setattr(OsFiles, "fdatasync", fail)
            await send_epoch(link, E2, E1, (3, b"b"), commit=True)
            goodbye = await heard(link)
            assert isinstance(goodbye, m.Goodbye)
            assert goodbye.code is RefusalCode.STORAGE_FAILED
        async with reconnected(address, E1) as (link, theirs):
            assert theirs.committed == (E2 if reached else E1)
            await send_epoch(link, E3, E1, (0, b"c"), commit=True)
            assert await heard(link) == m.Committed(E3)
    with secondary_store(tmp_path) as store:
        assert store.recovered.committed == E3


async def test_a_store_whose_superblock_cannot_be_read_stays_failed_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with secondary_store(tmp_path) as store:
        superblock = tmp_path / "store" / "superblock"
        kept = superblock.read_bytes()
        superblock.unlink()
        with pytest.raises(StorageError, match="superblock"):
            store.reopen()
        assert store.poisoned
        superblock.write_bytes(kept)
        assert store.reopen() == store.recovered
        assert not store.poisoned
