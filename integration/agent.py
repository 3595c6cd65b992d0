"""The host's end of the guest's agent: runs commands in the guest and follows their output line by line.

The protocol is in ``integration/guest/init``. Owns the socket of the guest's virtio port.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

_numbers = itertools.count(1)

#: Newest lines of a job's output that are kept.
KEPT_LINES = 5000


class GuestError(Exception):
    """A command in the guest failed, or the guest is gone."""


class Job:
    """A command that runs, or ran, in the guest.

    :ivar lines: its newest lines of output, both streams.
    :ivar status: its exit status (128 + signal where one ended it); None while it runs or when the guest has gone.
    """

    def __init__(self, command: str) -> None:
        self.command = command
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.status: int | None = None
        self.lost = False
        self._changed = trio.Event()

    @property
    def ended(self) -> bool:
        """No more output will come: it has ended, or the guest has gone."""
        return self.lost or self.status is not None

    @property
    def output(self) -> str:
        """All kept lines."""
        return "\n".join(self.lines)

    async def wait_until(self, condition: Callable[[Job], bool], *, timeout: float = 60.0) -> None:
        """Wait until the condition holds; it is tried after every line and at the end.

        :raise GuestError: when the job ends and it does not hold.
        :raise TimeoutError: after ``timeout`` seconds.
        """
        with trio.move_on_after(timeout):
            while not condition(self):
                if self.ended:
                    raise GuestError(f"{self.command!r} ended with {self.status} too early:\n{self.output}")
                await self._changed.wait()
            return
        raise TimeoutError(f"{self.command!r} in the guest: not within {timeout:g} s; its output:\n{self.output}")

    def _feed(self, kind: str, text: str) -> None:
        if kind == "=":
            self.status = int(text)
        else:
            self.lines.append(text)
        self._wake()

    def _lose(self) -> None:
        if self.status is None:
            self.lost = True
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class Agent:
    """One running guest.

    :param stream: connected to the guest's port; :meth:`receive` must be run, and closes it.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._sending = trio.Lock()
        self._jobs: dict[str, Job] = {}
        self._boots = 0
        self._changed = trio.Event()
        self.gone = trio.Event()

    async def ready(self, *, boots: int = 1) -> None:
        """Wait until the guest has come up so many times, resets and reboots counted.

        :raise GuestError: when it ends before.
        """
        while self._boots < boots:
            if self.gone.is_set():
                raise GuestError("the guest ended before it was up")
            await self._changed.wait()

    async def start(self, command: str) -> Job:
        """Start a shell command in the guest; it runs until it ends or is killed by name with :meth:`run`.

        :raise GuestError: when the guest has gone.
        """
        if self.gone.is_set():
            raise GuestError("the guest has gone")
        if "\n" in command:
            raise ValueError("a command for the guest must be one line")
        job = Job(command)
        # a guest that goes on from a checkpoint still has jobs of other agents
        key = f"{os.getpid()}.{next(_numbers)}"
        self._jobs[key] = job
        async with self._sending:
            await self._stream.send_all(f"{key} {command}\n".encode())
        return job

    async def run(self, command: str, *, timeout: float = 60.0, check: bool = True) -> str:
        """Run a shell command in the guest to its end and return its output, both streams.

        :param check: a status other than 0 is an error.
        :raise GuestError: when it fails, or the guest ends.
        :raise TimeoutError: after ``timeout`` seconds; the command goes on.
        """
        job = await self.start(command)
        await job.wait_until(lambda job: job.ended, timeout=timeout)
        if job.lost:
            raise GuestError(f"the guest ended during {command!r}")
        if check and job.status:
            raise GuestError(f"{command!r} in the guest ended with {job.status}:\n{job.output}")
        return job.output

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """Send the guest nothing during the block; whoever wants to waits."""
        async with self._sending:
            yield

    def adopt(self, other: Agent) -> None:
        """Follow the jobs of the same guest's earlier life, on another QEMU: from now on their output comes here."""
        for key, job in other._jobs.items():
            if job.status is None:
                job.lost = False
                self._jobs[key] = job

    async def receive(self) -> None:
        """Task: sort the guest's lines, until it ends; closes the connection."""
        buffer = b""
        try:
            async with self._stream:
                while data := await self._stream.receive_some(65536):
                    *lines, buffer = (buffer + data).split(b"\n")
                    for line in lines:
                        self._line(line.decode(errors="replace"))
        except trio.BrokenResourceError:
            pass
        finally:
            self.gone.set()
            self._wake()
            for job in self._jobs.values():
                job._lose()

    def _line(self, line: str) -> None:
        key, _, rest = line.partition(" ")
        if key == "0":
            self._boots += 1
            self._wake()
        elif key in self._jobs:
            self._jobs[key]._feed(rest[:1], rest[2:])

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
