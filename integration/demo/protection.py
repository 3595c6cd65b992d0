"""The checkpoints: taken one after the other, measured, and ended by a blow amid one of them.

Owns the numbers and the blow.  How a checkpoint is taken is :mod:`integration.toolstack`'s.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from integration.controller import Controller
from integration.demo.facts import Failed, Measured
from integration.machine import Machine
from integration.toolstack import MOMENTS, BackupLink, Moment, OutputBuffer, Protector, Step
from integration.witness import Account
from qemu_remus.core.errors import ControlError, NotProtected
from qemu_remus.toolstack import Checkpoint, Toolstack


class Outside:
    """Somebody out there who reads what the VM says, record by record.

    :ivar account: what was read.
    """

    def __init__(self) -> None:
        self.account = Account()
        self._rest = b""

    def take(self, data: bytes) -> None:
        """Read what was let out; every line is whole when a checkpoint's output is."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self.account.enter(line.decode(errors="replace"))

    @property
    def torn(self) -> bool:
        """Whether it ends inside a line."""
        return bool(self._rest)


class _Watched:
    """The toolstack's interface, passed through; it remembers what each start of an epoch answered."""

    def __init__(self, inner: Toolstack) -> None:
        self._inner = inner
        self.last: Checkpoint | None = None

    async def prepare(self, *, timeout: float = 10.0) -> None:
        await self._inner.prepare(timeout=timeout)

    @asynccontextmanager
    async def checkpoint(self, *, pause: bool = False, timeout: float = 10.0) -> AsyncIterator[Checkpoint]:
        async with self._inner.checkpoint(pause=pause, timeout=timeout) as begun:
            self.last = begun
            yield begun

    async def abort(self, epoch: int, *, timeout: float = 10.0) -> None:
        await self._inner.abort(epoch, timeout=timeout)


class Protection:
    """The protecting side: a toolstack on the primary's host.

    :ivar measured: every committed checkpoint.
    :ivar missed: checkpoints that were lost or refused; the next one carried what they had.
    :ivar captured: the newest checkpoint of which it is known that the VM was captured; 0 for none.
    :ivar released: the newest checkpoint whose output was let out; 0 for none.
    """

    def __init__(
        self,
        machine: Machine,
        ram: Path,
        primary: Controller,
        toolstack: Toolstack,
        backup: BackupLink,
        output: OutputBuffer,
    ) -> None:
        self._machine = machine
        self._primary = primary
        self._watched = _Watched(toolstack)
        self._protector = Protector(machine, ram, self._watched, backup, output, hook=self._on_step)
        self._running = trio.CancelScope()
        self._ended = trio.Event()
        self._strike_at: Moment | None = None
        self.measured: list[Measured] = []
        self.missed = 0
        self.captured = 0
        self.released = 0
        self._blow = ""

    @property
    def committed(self) -> int:
        """The newest checkpoint whose commit was acknowledged; 0 for none."""
        return self._protector.committed or 0

    async def first(self) -> bool:
        """Take the first checkpoint, if it can be taken yet: it carries all of the memory."""
        try:
            return await self._take()
        except NotProtected:
            return False

    async def run(self, interval: float) -> None:
        """Task: a checkpoint every ``interval`` seconds, until the blow.

        :raise BackupLost: when the backup is gone.
        :raise ControlUnreachable: when the primary controller is gone unasked.
        :raise EOFError: when QEMU is.
        """
        try:
            with self._running:
                while True:
                    following = trio.current_time() + interval
                    try:
                        taken = await self._take()
                    except ControlError:
                        taken = False
                    self.missed += not taken
                    await trio.sleep_until(following)
        except Exception:
            # what the dying host's toolstack finds broken around it, nobody hears
            if not self._blow:
                raise
        finally:
            self._protector.close()
            self._ended.set()

    async def _take(self) -> bool:
        epoch = await self._protector.checkpoint()
        figures, disks = self._protector.figures, self._watched.last
        if epoch is None:
            return False
        if not figures or not disks or figures.epoch != epoch or disks.epoch != epoch:
            raise Failed(f"checkpoint {epoch} has figures of another: {figures}")
        self.measured.append(
            Measured(
                epoch,
                pause=figures.pause,
                disk_pause=disks.pause_ms / 1000,
                capture=figures.capture,
                memory_bytes=figures.memory_bytes,
                disk_bytes=disks.dirty_bytes,
            )
        )
        return True

    async def strike(self) -> str:
        """SIGKILL to QEMU and to the primary controller at any moment of a checkpoint; this side ends with them.

        :return: which moment it was.
        """
        self._strike_at = random.choice(MOMENTS)
        with trio.move_on_after(60):
            await self._ended.wait()
        if not self._blow:
            raise Failed(f"no checkpoint came to {self._strike_at} within 60 s")
        await self._machine.process.wait()
        await self._primary.process.wait()
        return self._blow

    async def _on_step(self, moment: Moment, epoch: int | None) -> None:
        if moment == Moment(Step.START, after=True):
            self.captured = epoch or 0
        elif moment == Moment(Step.RELEASE, after=True):
            self.released = epoch or 0
        if moment == self._strike_at:
            self._machine.process.kill()
            self._primary.process.kill()
            self._running.cancel()
            self._blow = (
                f"{moment} of checkpoint {epoch}" if epoch else f"{moment} of the checkpoint after {self.captured}"
            )
            await trio.lowlevel.checkpoint()
