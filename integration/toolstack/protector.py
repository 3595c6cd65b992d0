"""Whole-VM checkpoints of a plain QEMU: the order of their steps, and what each failure means.

Owns the protecting side of the reference toolstack.  Disks are the controllers', through their toolstack interface;
memory is kept by a backup (:mod:`integration.toolstack.backup`); output is held by
:class:`~integration.toolstack.output.OutputBuffer`.

Memory and disks of a checkpoint carry one number.  What may be restored, and when:

- memory N is *complete* only when disk N is staged, so memory is never offered that the disks have lost;
- memory N-1 goes only when N is known to be committed, so whichever of them the disks end at is there;
- output goes only then, too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

import outcome
import trio

from integration.qmp import Qmp
from integration.toolstack.backup import BackupLink, BackupRefused
from integration.toolstack.memory import MemoryImage
from integration.toolstack.output import OutputBuffer
from qemu_remus.core.errors import CommitInDoubt, ControlError, ControlUnreachable, EpochLost, OutOfOrder, TimedOut

_SHARES: Final = 2
"""Threads that compare memory; more do not make it faster, since it waits for memory."""
_QEMU_TIMEOUT: Final = 10.0
_FIRST_WAIT: Final = 0.05
_LONGEST_WAIT: Final = 1.0


class Step(Enum):
    """The steps of a checkpoint, in order."""

    PREPARE = "prepare-epoch"
    STOP = "stop"
    START = "start-new-epoch"
    CAPTURE = "device state and memory"
    RESUME = "cont"
    SEND = "memory staged on the backup"
    FINISH = "finish-disk-sync"
    COMPLETE = "memory complete on the backup"
    COMMIT = "commit-epoch"
    RELEASE = "output released"
    SETTLE = "older memory let go"


@dataclass(frozen=True, slots=True)
class Moment:
    """Before a step, or after it."""

    step: Step
    after: bool

    def __str__(self) -> str:
        return f"{'after' if self.after else 'before'} {self.step.value}"


MOMENTS: Final = tuple(Moment(step, after) for step in Step for after in (False, True))

Hook = Callable[[Moment, int | None], Awaitable[None]]
"""Called at every moment, with the checkpoint's number, or None as long as it has none. What it raises, the checkpoint
raises: as at any failure the VM is resumed, and the epoch given up where that is still possible."""


class DiskCheckpoint(Protocol):
    """What is used of :class:`qemu_remus.toolstack.Checkpoint`."""

    @property
    def epoch(self) -> int:
        """Its number."""

    async def finish(self, *, timeout: float = ...) -> None:
        """Wait until it is staged."""

    async def commit(self, *, timeout: float = ...) -> None:
        """Let it count."""


class Toolstack(Protocol):
    """What is used of :class:`qemu_remus.toolstack.Toolstack`; a test without disks to replicate has its own."""

    async def prepare(self, *, timeout: float = ...) -> None:
        """Before the pause."""

    def checkpoint(self, *, pause: bool = ..., timeout: float = ...) -> AbstractAsyncContextManager[DiskCheckpoint]:
        """In the pause; leaving it without a commit aborts it, unless in doubt."""

    async def abort(self, epoch: int, *, timeout: float = ...) -> None:
        """Give one up whose first abort did not come through."""


class Vm(Protocol):
    """What is used of :class:`integration.machine.Machine`."""

    @property
    def qmp(self) -> Qmp:
        """QEMU."""

    def input_held(self) -> AbstractAsyncContextManager[None]:
        """Send the guest nothing meanwhile."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Numbers of one checkpoint.

    :param pause: seconds between sending ``stop`` and the answer to ``cont``.
    :param capture: seconds of these for device state and memory.
    :param memory_bytes: of memory sent, at most.
    """

    epoch: int
    pause: float
    capture: float
    memory_bytes: int


class Protector:
    """Takes checkpoints of one VM. One task at a time.

    Whatever happens, the VM is running again when a method returns or raises, if it was running before and QEMU is
    there; and output is released only after the commit of the checkpoint that follows it. An error that is not an
    answer about the epoch leaves its memory on the backup as it is: to offer what the disks cannot reach does no harm.

    :param vm: started with ``ram``, as :func:`integration.machine.start_machine` does.
    :param ram: its memory file; the device state goes to a file beside it.
    :param backup: with this protector's memory, or any older: its first checkpoint builds on nothing.
    :param hook: for tests, see :data:`Hook`.
    :param commit_limit: seconds for which a commit in doubt is asked about.
    :ivar backup: may be replaced, after BackupLost, by a new link to the same backup.
    :ivar committed: the last checkpoint that was acknowledged, None before the first.
    :ivar figures: of the last checkpoint whose pause is over.
    """

    def __init__(
        self,
        vm: Vm,
        ram: Path,
        toolstack: Toolstack,
        backup: BackupLink,
        output: OutputBuffer,
        *,
        hook: Hook | None = None,
        commit_limit: float = 30.0,
    ) -> None:
        self._vm = vm
        self._toolstack = toolstack
        self.backup = backup
        self._output = output
        self._hook = hook
        self._commit_limit = commit_limit
        self._image = MemoryImage(ram)
        self._device_state = ram.with_name(f"{ram.name}.device-state")
        self._compared = False
        #: what the backup has, and what the image owes is the difference to
        self._base: int | None = None
        self._begun: int | None = None
        self._doubtful: DiskCheckpoint | None = None
        self.committed: int | None = None
        self.figures: Figures | None = None

    @property
    def in_doubt(self) -> int | None:
        """The checkpoint whose commit was sent and not answered, None for none."""
        return None if self._doubtful is None else self._doubtful.epoch

    def close(self) -> None:
        """Give the memory's mapping back. The VM goes on as it is."""
        self._image.close()

    async def run(self, interval: float) -> NoReturn:
        """Take checkpoints for ever, one every ``interval`` seconds, or as fast as it goes where that is too slow.

        A refusal, such as during a resync, is met by trying again at the next one; output is held meanwhile.

        :raise ControlUnreachable: when the controller is gone.
        :raise BackupLost: when the backup is gone.
        :raise EOFError: when QEMU is gone.
        """
        while True:
            following = trio.current_time() + interval
            with suppress(ControlError):
                await self.checkpoint()
            await trio.sleep_until(following)

    async def checkpoint(self) -> int | None:
        """Take one checkpoint, and return its number when it is committed and its output released.

        :return: None when the epoch was lost, on its way or at its end: the guest was paused, no more, and the next
            checkpoint carries all of it.
        :raise ControlError: when the controller refuses to begin (NotProtected, OutOfOrder, TimedOut).
        :raise CommitInDoubt: when the commit was sent, and nothing came of asking about it; the next call asks again
            before anything else. Memory of this checkpoint and of the last one stay.
        :raise ControlUnreachable: when the controller is gone, and no commit is in doubt.
        :raise BackupLost: when the backup is gone.
        :raise BackupRefused: when it will not have a checkpoint that builds on nothing.
        :raise QmpError: when QEMU refuses something.
        :raise EOFError: when QEMU is gone.
        """
        await self._resolve()
        if not self._compared:
            # once over all of it while the VM runs, so that the first pause is not much longer than the others
            await self._compare()
            self._compared = True
        async with self._step(Step.PREPARE, None):
            await self._prepare()
        pause = _Pause(self._vm)
        disks: DiskCheckpoint | None = None
        try:
            async with self._step(Step.STOP, None):
                await pause.begin()
            await self._at(Step.START, None)
            async with self._toolstack.checkpoint() as disks:
                self._begun = disks.epoch
                try:
                    await self._at(Step.START, disks.epoch, after=True)
                    device_state = await self._capture(disks.epoch, pause)
                finally:
                    await pause.end()
                await self._send(disks.epoch, device_state)
                await self._finish(disks)
                await self._decide(disks)
        except EpochLost:
            if disks is not None:
                await self._drop(disks.epoch)
            return None
        finally:
            await pause.end()
        return self.committed

    async def _resolve(self) -> None:
        """Learn what became of the last commit, before there is another."""
        if self._doubtful is not None:
            epoch = self._doubtful.epoch
            try:
                await self._decide(self._doubtful)
            except EpochLost:
                await self._drop(epoch)

    async def _drop(self, epoch: int) -> None:
        # it may be there half, staged, or complete; what it carried is still owed
        with suppress(BackupRefused):
            await self.backup.drop(epoch)

    async def _prepare(self) -> None:
        try:
            await self._toolstack.prepare()
        except OutOfOrder:
            if self._begun is None:
                raise
            # an abort of ours has not come through
            await self._toolstack.abort(self._begun)
            await self._toolstack.prepare()

    async def _capture(self, epoch: int, pause: _Pause) -> bytes:
        began = trio.current_time()
        async with self._step(Step.CAPTURE, epoch):
            # the one writes a file, the other waits for memory: beside each other
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._compare)
                saved = await outcome.acapture(_save_device_state, self._vm.qmp, self._device_state)
            saved.unwrap()
            self._output.close_epoch(epoch)
        took = trio.current_time() - began
        async with self._step(Step.RESUME, epoch):
            await pause.end()
        self.figures = Figures(epoch, pause.seconds, took, self._image.owed_bytes)
        return await trio.to_thread.run_sync(self._device_state.read_bytes)

    async def _compare(self) -> None:
        async with trio.open_nursery() as nursery:
            for part in self._image.parts(_SHARES):
                nursery.start_soon(trio.to_thread.run_sync, self._image.capture, part)

    async def _send(self, epoch: int, device_state: bytes) -> None:
        async with self._step(Step.SEND, epoch):
            try:
                await self.backup.stage(epoch, self._image, device_state, base=self._base)
            except BackupRefused as error:
                if self._base is None:
                    raise
                # not the backup that we know, or not its store: all of it, next time
                self._base = None
                self._image.owe_all()
                raise EpochLost(f"the backup refuses the memory of checkpoint {epoch}: {error}") from error

    async def _finish(self, disks: DiskCheckpoint) -> None:
        async with self._step(Step.FINISH, disks.epoch):
            try:
                await disks.finish()
            except TimedOut as error:
                raise EpochLost(f"the disks of checkpoint {disks.epoch} are not staged in time") from error
        async with self._step(Step.COMPLETE, disks.epoch):
            await self.backup.complete(disks.epoch)

    async def _decide(self, disks: DiskCheckpoint) -> None:
        """Commit it, and do all that depends on it."""
        epoch = disks.epoch
        async with self._step(Step.COMMIT, epoch):
            await self._commit(disks)
        self.committed = self._base = epoch
        self._image.settle()
        async with self._step(Step.RELEASE, epoch):
            self._output.release(epoch)
        async with self._step(Step.SETTLE, epoch):
            await self.backup.committed(epoch)

    async def _commit(self, disks: DiskCheckpoint) -> None:
        """Ask until the answer is certain, or for as long as is allowed: then it stays in doubt."""
        deadline = trio.current_time() + self._commit_limit
        wait = _FIRST_WAIT
        while True:
            doubtful, self._doubtful = self._doubtful, disks
            try:
                await disks.commit()
            except (CommitInDoubt, TimedOut):
                if trio.current_time() >= deadline:
                    raise
            except ControlUnreachable as error:
                if not error.in_doubt and doubtful is None:
                    self._doubtful = None
                    raise
                if trio.current_time() >= deadline:
                    raise
            except EpochLost:
                self._doubtful = None
                raise
            except ControlError:
                # it was not even tried
                self._doubtful = doubtful
                raise
            else:
                self._doubtful = None
                return
            await trio.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    @asynccontextmanager
    async def _step(self, step: Step, epoch: int | None) -> AsyncIterator[None]:
        await self._at(step, epoch)
        yield
        await self._at(step, epoch, after=True)

    async def _at(self, step: Step, epoch: int | None, *, after: bool = False) -> None:
        if self._hook:
            await self._hook(Moment(step, after), epoch)


class _Pause:
    """One pause of the VM, which we end if we began it.

    :ivar seconds: how long it was, from before ``stop`` to after ``cont``.
    """

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._stack = AsyncExitStack()
        self._stopped = False
        self._began = 0.0
        self.seconds = 0.0

    async def begin(self) -> None:
        """Stop the VM, and see that nothing moves in it any more."""
        running = (await _execute(self._vm.qmp, "query-status"))["running"]
        await self._stack.enter_async_context(self._vm.input_held())
        self._began = trio.current_time()
        self._stopped = running
        await _execute(self._vm.qmp, "stop")
        # one turn more of QEMU's loop: what had been sent to a port before is then taken in, or stays in the socket
        if (await _execute(self._vm.qmp, "query-status"))["running"]:
            raise EpochLost("somebody else has resumed the VM")

    async def end(self) -> None:
        """Let it run again; nothing happens where it does already."""
        stopped, self._stopped = self._stopped, False
        try:
            if stopped:
                await _execute(self._vm.qmp, "cont")
                self.seconds = trio.current_time() - self._began
        finally:
            await self._stack.aclose()


async def _execute(qmp: Qmp, command: str, arguments: dict[str, Any] | None = None) -> Any:
    """Not to be cancelled halfway: nobody would know whether QEMU has done it."""
    with trio.CancelScope(shield=True):
        return await qmp.execute(command, arguments, timeout=_QEMU_TIMEOUT)


async def _save_device_state(qmp: Qmp, path: Path) -> None:
    # the one command of a stock QEMU that saves the devices, leaves the disks active and sends nothing of the memory
    await _execute(qmp, "xen-save-devices-state", {"filename": str(path), "live": False})
