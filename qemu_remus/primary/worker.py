"""A task that is there already when work comes: to begin one and end it, twice in each checkpoint, costs as much as
some of the work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

Job = Callable[[], Awaitable[None]]


class Worker:
    """Does one job after another, as they come."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._given: trio.Event | None = None

    def take(self, job: Job) -> bool:
        """Take a job, unless it has one, or does not run: whoever hears False does it in another way."""
        if self._given is None or self._job is not None:
            return False
        self._job = job
        self._given.set()
        return True

    async def run(self) -> None:
        """Task: work until cancelled; what a job raises ends it."""
        while True:
            self._given = trio.Event()
            await self._given.wait()
            assert self._job is not None
            await self._job()
            self._job = None
