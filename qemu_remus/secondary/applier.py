"""Brings committed epochs into the images, in the background, and lets others wait for that.

Owns when it is done, and who hears of it.  What may not enter: which epochs are committed (the machine's), how they are
written (:mod:`qemu_remus.storage`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeVar

import structlog
import trio

from qemu_remus.core import secondary_machine as machine
from qemu_remus.core.errors import NoSpace, RefusalCode, StorageError
from qemu_remus.core.model import EpochNumber

APPLY_INTERVAL: Final = 0.25
"""Seconds for which committed epochs are collected: what several of them have written is written once."""

APPLY_AT_ONCE_BYTES: Final = 32 << 20
"""A backlog that does not wait: a failover has to."""

PATIENCE: Final = 300.0
"""Seconds in which some committed epochs must have come into the images, for somebody who waits for them: the largest
is as large as the journal."""

_log = structlog.get_logger("secondary")
_T = TypeVar("_T")


class Images(Protocol):
    """What is asked of a store; :class:`qemu_remus.storage.store.Store` has it."""

    failing_over: bool

    @property
    def backlog(self) -> tuple[EpochNumber, ...]: ...

    @property
    def backlog_bytes(self) -> int: ...

    @property
    def images_current(self) -> bool: ...

    @property
    def poisoned(self) -> bool: ...

    def apply_some(self) -> EpochNumber | None: ...

    def revive_targets(self) -> int: ...


class Applier:
    """One task, :meth:`run`, and those who wake it or wait for it.

    :param post: takes events to the engine, which may be waiting for us: while it does, nobody empties this channel.
    """

    def __init__(self, store: Images, post: trio.MemorySendChannel[machine.Event]) -> None:
        self._store = store
        self._post = post
        self._wanted = trio.Event()
        self._urgent = trio.Event()
        self._progress = trio.Event()
        self._failure: StorageError | None = None
        self._lost = False

    def target_lost(self, what: str) -> None:
        """What writes a target has ended by itself: see that there is another one, now and not when it is needed."""
        _log.error("the target cannot be written at the moment", reason=what)
        self._lost = True
        self._wanted.set()
        self._urgent.set()

    def wake(self) -> None:
        """There is something to apply."""
        self._wanted.set()
        if self._store.backlog_bytes > APPLY_AT_ONCE_BYTES:
            self._urgent.set()

    async def run(self) -> None:
        """Apply until cancelled."""
        if self._store.backlog:
            self._wanted.set()
        try:
            while True:
                await self._wanted.wait()
                self._wanted = trio.Event()
                with trio.move_on_after(APPLY_INTERVAL):
                    await self._urgent.wait()
                self._urgent = trio.Event()
                await self._apply_all()
        finally:
            # The engine finishes what it is at; it must not wait for us.
            self._failure = StorageError("the secondary is being stopped", safe="the journal keeps everything")
            self._progress.set()

    async def _apply_all(self) -> None:
        news: machine.Event | None = None
        if self._lost and not self._store.failing_over and not await self._revive():
            return
        while self._store.backlog and not self._store.failing_over:
            try:
                applied = await trio.to_thread.run_sync(self._store.apply_some)
                self._failure = None
            except StorageError as error:
                self._failure = error
                _log.error("an image cannot be written", reason=str(error))
                news = machine.ApplyFailed(str(error))
            else:
                if applied is None:
                    break
                news = machine.Applied(applied)
            # First whoever waits: it may be the engine, and then there is no room for news before it goes on.
            self._progress.set()
            self._progress = trio.Event()
            if self._failure is not None:
                break
            news = self._tell(news)
        if news is not None:
            await self._post.send(news)

    async def _revive(self) -> bool:
        self._lost = False
        try:
            started = await trio.to_thread.run_sync(self._store.revive_targets)
        except StorageError as error:
            _log.error("a target cannot be written", reason=str(error))
            # Nothing need be waiting to be applied: only opening everything again shows that it works.
            await self._post.send(machine.StoreFailed(RefusalCode.STORAGE_FAILED, str(error), lasting=True))
            return False
        if started:
            _log.warning("the target can be written again", started=started)
        return True

    def _tell(self, news: machine.Event | None) -> machine.Event | None:
        """Post it if there is room now; else return it: later news say more."""
        if news is not None:
            try:
                self._post.send_nowait(news)
            except (trio.WouldBlock, trio.BrokenResourceError):
                return news
        return None

    async def with_room(self, work: Callable[[], _T]) -> _T:
        """Do, in a thread, what needs room in the journal: what is committed makes some as it gets applied.

        :raise StorageError: as the work does, or nothing was applied in time. NoSpace: nothing is left to be applied.
        """
        while True:
            progress, backlog = self._progress, self._store.backlog
            try:
                return await trio.to_thread.run_sync(work)
            except NoSpace:
                if not backlog or self._store.poisoned or self._failure is not None:
                    raise
            await self._wait(progress)

    async def caught_up(self) -> None:
        """Wait until the images hold the last committed checkpoint.

        :raise StorageError: they cannot be written, or nothing was applied in time.
        """
        while not self._store.images_current:
            if self._failure is not None:
                raise StorageError(
                    f"the images cannot be brought to the last checkpoint: {self._failure.what}",
                    safe=self._failure.safe,
                    hint=self._failure.hint,
                )
            await self._wait(self._progress)

    async def _wait(self, progress: trio.Event) -> None:
        self._wanted.set()
        self._urgent.set()
        with trio.move_on_after(PATIENCE):
            await progress.wait()
            return
        raise StorageError(
            f"nothing could be brought into the images for {PATIENCE:.0f} seconds",
            safe="the journal keeps everything",
            hint="look at the host's kernel log for the targets' errors, and at their load",
        )
