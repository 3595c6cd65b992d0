"""For toolstacks in Python: the control sockets' commands as typed calls, and a checkpoint as an ``async with`` block.

Owns nothing of a checkpoint but what was asked about it: whether leaving the block may still give it up.  What the
commands do and when they may come: docs/control.md.  It needs trio, and imports none of the controllers.

::

    async with open_toolstack(Path("/run/qemu-remus/vm.primary.sock")) as disks:
        while True:
            await disks.prepare()
            try:
                vm.pause()
                async with disks.checkpoint() as checkpoint:
                    memory = vm.capture(checkpoint.epoch)
                    vm.resume()
                    await backup.store(memory)
                    await checkpoint.finish()
                    await backup.complete(memory)
                    await checkpoint.commit()
                vm.release_output(checkpoint.epoch)
            except EpochLost:
                await backup.drop_incomplete()
            finally:
                vm.resume()  # where it still stands
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from enum import Enum
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import msgspec
import trio

from qemu_remus.control_client import ControlClient, connect_control
from qemu_remus.core.commands import (
    AbortArguments,
    CommitArguments,
    EpochDone,
    EpochStarted,
    FailoverArguments,
    FailoverResult,
    FinishArguments,
    MemoryReceived,
    MemoryReceivedArguments,
    Nothing,
    PrepareArguments,
    StartArguments,
)
from qemu_remus.core.errors import (
    CommandNotFound,
    ControlUnreachable,
    EpochLost,
    NotProtected,
    OutOfOrder,
    QemuRemusError,
    Refused,
)
from qemu_remus.core.model import EpochNumber
from qemu_remus.core.qapi import from_qmp, to_qmp
from qemu_remus.core.report import Report

__all__ = ["Backup", "Checkpoint", "Toolstack", "open_backup", "open_toolstack"]

MARGIN: Final = 5.0
"""Seconds that a controller's answer may take beyond the time-out that it was given itself."""

ABORT_TIMEOUT: Final = 10.0
"""Seconds for the ``abort-epoch`` that leaving a checkpoint's block may need."""

_NOT_COMMITTING: Final = (CommandNotFound, EpochLost, NotProtected, OutOfOrder, Refused)
"""Answers to a first ``commit-epoch`` that mean that no commit was begun."""

_T = TypeVar("_T")


class _Controller:
    """Commands to one controller, each on a connection that no other command is under way on.

    One connection is kept for the next command. A command that is given up takes its connection with it, and two at a
    time need two.
    """

    def __init__(self, control: Path, timeout: float) -> None:
        self._control = control
        self._timeout = timeout
        self._idle: ControlClient | None = None

    async def status(self) -> Report:
        """The controller's report.

        :raise ControlUnreachable: as for every command.
        """
        return await self._ask("query-replication", Nothing(), Report, timeout=10.0)

    async def _ask(self, name: str, arguments: object, kind: type[_T], *, timeout: float) -> _T:
        async with self._connection() as client:
            return await self._ask_on(client, name, arguments, kind, timeout=timeout)

    async def _ask_on(
        self, client: ControlClient, name: str, arguments: object, kind: type[_T], *, timeout: float
    ) -> _T:
        answer: Any = await client.execute(name, to_qmp(arguments), timeout=timeout + MARGIN)
        try:
            return from_qmp(kind, answer)
        except msgspec.ValidationError as error:
            raise ControlUnreachable(
                f"the answer of the controller on {self._control} to {name} cannot be read: {error}",
                hint="use the qemu_remus that the controller is of",
                in_doubt=True,
            ) from error

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[ControlClient]:
        client, self._idle = self._idle, None
        try:
            if client is None or not await client.is_alive():
                client = await connect_control(self._control, timeout=self._timeout)
            yield client
        finally:
            if client is not None:
                self._put_back(client)

    def _put_back(self, client: ControlClient) -> None:
        if self._idle is None and not client.closed:
            self._idle = client
        else:
            client.close()

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Self]:
        try:
            async with self._connection():
                pass
            yield self
        finally:
            if self._idle is not None:
                self._idle.close()
                self._idle = None


class Toolstack(_Controller):
    """A primary that was started with ``--toolstack``; :func:`open_toolstack` makes it.

    Every method raises :class:`~qemu_remus.core.errors.ControlUnreachable` when the controller cannot be asked; with
    ``in_doubt``, it was asked and what came of it is unknown. A later call connects again. Time-outs are in seconds,
    more than 0 and at most 86,400; the controller observes them, and its answer is waited for a little longer.
    """

    async def prepare(self, *, timeout: float = 10.0) -> None:
        """Before the VM is paused: let nothing of the last epoch be in the way of the next one.

        :raise NotProtected: when no checkpoint can be taken at the moment.
        :raise OutOfOrder: when an epoch is under way.
        :raise TimedOut: when the last epoch's transfer takes longer; nothing was changed.
        """
        await self._ask("prepare-epoch", PrepareArguments(timeout), Nothing, timeout=timeout)

    async def start(self, *, pause: bool = False, timeout: float = 10.0) -> Checkpoint:
        """While the VM is paused: capture its disks. The VM may resume when this returns.

        A cancellation takes effect only after the answer, so that no epoch is begun whose number nobody knows: the
        caller must finish and commit it, or abort it. After TimedOut or a ControlUnreachable in doubt one may have been
        begun: ``status()`` has its number (``checkpoint.captured``), for :meth:`abort`.

        :param pause: the controller stops and resumes QEMU itself around it; for a guest whose toolstack has paused it
            without QEMU's knowledge.
        :raise NotProtected: when no checkpoint can be taken at the moment.
        :raise EpochLost: when the capture failed: a later epoch carries the changes. Drop the memory, resume the VM.
        :raise OutOfOrder: when an epoch is under way, or the VM runs.
        :raise TimedOut: when it takes longer; what was begun goes on.
        """
        async with self._connection() as client:
            await trio.lowlevel.checkpoint_if_cancelled()
            with trio.CancelScope(shield=True):
                started = await self._ask_on(
                    client, "start-new-epoch", StartArguments(pause, timeout), EpochStarted, timeout=timeout
                )
        return Checkpoint(self, started)

    @asynccontextmanager
    async def checkpoint(self, *, pause: bool = False, timeout: float = 10.0) -> AsyncIterator[Checkpoint]:
        """:meth:`start`, and ``abort-epoch`` where the block is left without a commit.

        However it is left, by an exception and by cancellation too, the epoch is then committed, or given up, or its
        commit is *in doubt*: :meth:`Checkpoint.commit` was begun and its outcome is not known (CommitInDoubt,
        ControlUnreachable in doubt, any other error that does not exclude it, or a cancellation while it waited).
        Nothing is aborted then, because a commit that may have happened cannot be taken back. The caller must keep
        the memory of this checkpoint *and* of the one before, release no output, and repeat ``commit()`` on the same
        object until it is answered; or, where the primary is lost, name both to the secondary's failover.

        The abort is shielded from cancellation and takes at most a quarter of a minute. Where the block raised, an
        error of the abort is only noted on its exception; else it is raised. The epoch is then still under way: the
        next start answers OutOfOrder until :meth:`abort` is done.

        :raise QemuRemusError: as :meth:`start` does, before the block is entered.
        """
        begun = await self.start(pause=pause, timeout=timeout)
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            yield begun
        except BaseException as error:
            try:
                await begun._leave()
            except QemuRemusError as failure:
                error.add_note(f"and epoch {begun.epoch} could not be aborted: {failure}")
            raise
        else:
            await begun._leave()

    async def finish(self, epoch: int, *, timeout: float = 30.0) -> None:
        """:meth:`Checkpoint.finish` by number, for a toolstack that was restarted."""
        arguments = FinishArguments(EpochNumber(epoch), timeout)
        await self._ask("finish-disk-sync", arguments, EpochDone, timeout=timeout)

    async def commit(self, epoch: int, *, timeout: float = 30.0) -> None:
        """:meth:`Checkpoint.commit` by number, for a toolstack that was restarted."""
        arguments = CommitArguments(EpochNumber(epoch), timeout)
        await self._ask("commit-epoch", arguments, EpochDone, timeout=timeout)

    async def abort(self, epoch: int, *, timeout: float = 10.0) -> None:
        """:meth:`Checkpoint.abort` by number, for a toolstack that was restarted."""
        arguments = AbortArguments(EpochNumber(epoch), timeout)
        await self._ask("abort-epoch", arguments, EpochDone, timeout=timeout)


class _Stage(Enum):
    OPEN = "open"
    IN_DOUBT = "in doubt"
    COMMITTED = "committed"
    ABORTED = "aborted"


class Checkpoint:
    """One checkpoint of the VM, and the epoch of its disks that ends with it; :meth:`Toolstack.start` makes it.

    :ivar epoch: its number; the memory checkpoint must carry it too.
    :ivar dirty_bytes: what the epoch changed on the disks.
    :ivar pause_ms: milliseconds that the VM had to stand still for it.
    """

    def __init__(self, toolstack: Toolstack, started: EpochStarted) -> None:
        self._toolstack = toolstack
        self.epoch = started.epoch
        self.dirty_bytes = started.dirty_bytes
        self.pause_ms = started.pause_ms
        self._stage = _Stage.OPEN

    @property
    def committed(self) -> bool:
        """Whether a commit was acknowledged."""
        return self._stage is _Stage.COMMITTED

    @property
    def in_doubt(self) -> bool:
        """Whether a commit was begun and its outcome is not known."""
        return self._stage is _Stage.IN_DOUBT

    async def finish(self, *, timeout: float = 30.0) -> None:
        """Wait until the epoch is staged: durable on the secondary, and not yet decided on.

        Only then may the backup call the memory of this checkpoint complete, unless it keeps the one before too.

        :raise EpochLost: when it failed: a later epoch carries its changes. Drop the memory of this checkpoint.
        :raise CommitInDoubt: when the link was lost, and whether the epoch is staged is not known: ask again, or abort.
        :raise OutOfOrder: when this epoch is not under way.
        :raise TimedOut: when it takes longer; it goes on, and may be waited for again.
        """
        await self._toolstack.finish(self.epoch, timeout=timeout)

    async def commit(self, *, timeout: float = 30.0) -> None:
        """Decide that this checkpoint counts, once the backup can restore its memory, and wait until that is durable.

        Then the VM's output up to it may be released. May be repeated: what is committed is answered as done.

        :raise EpochLost: when it is known not to be committed: a later epoch carries its changes. Drop the memory of
            this checkpoint.
        :raise CommitInDoubt: when the commit was sent and its outcome is not known; see :meth:`Toolstack.checkpoint`.
        :raise OutOfOrder: when the epoch is not staged yet, or not under way.
        """
        toolstack = self._toolstack
        async with toolstack._connection() as client:
            await trio.lowlevel.checkpoint_if_cancelled()
            before, self._stage = self._stage, _Stage.IN_DOUBT
            try:
                arguments = CommitArguments(self.epoch, timeout)
                await toolstack._ask_on(client, "commit-epoch", arguments, EpochDone, timeout=timeout)
            except EpochLost:
                # Known for certain, after a doubtful attempt too.
                self._stage = _Stage.OPEN
                raise
            except _NOT_COMMITTING:
                # It says nothing about an earlier attempt.
                self._stage = before
                raise
            except ControlUnreachable as error:
                if not error.in_doubt:
                    self._stage = before
                raise
            self._stage = _Stage.COMMITTED

    async def abort(self, *, timeout: float = 10.0) -> None:
        """Give the epoch up; a later one carries its changes. Drop the memory of this checkpoint.

        :raise CommitInDoubt: when a commit was begun, which cannot be taken back; or when it is not known whether the
            secondary has dropped the epoch: repeat it.
        :raise OutOfOrder: when this epoch is not under way, or is committed.
        :raise TimedOut: when it takes longer; it may be repeated.
        """
        await self._toolstack.abort(self.epoch, timeout=timeout)
        self._stage = _Stage.ABORTED

    async def _leave(self) -> None:
        if self._stage is not _Stage.OPEN:
            return
        with trio.CancelScope(shield=True):
            await self.abort(timeout=ABORT_TIMEOUT)


class Backup(_Controller):
    """A secondary; :func:`open_backup` makes it. ControlUnreachable as for :class:`Toolstack`."""

    async def memory_received(self, epoch: int, *, timeout: float = 30.0) -> bool:
        """Say that the memory of this checkpoint is complete here, so that it may be committed.

        :param timeout: seconds for the answer.
        :return: whether the checkpoint is committed, durably; else it will be as soon as it is staged.
        :raise Refused: after a failover.
        """
        arguments = MemoryReceivedArguments(EpochNumber(epoch))
        return (await self._ask("memory-received", arguments, MemoryReceived, timeout=timeout)).committed

    async def failover(
        self,
        checkpoints: Sequence[int] = (),
        *,
        last_committed: bool = False,
        force: bool = False,
        timeout: float = 600.0,
    ) -> FailoverResult:
        """Make the disks ready for use at one checkpoint; the answer says which, and where they are.

        After a ControlUnreachable repeat it with the same arguments: it goes on.

        :param checkpoints: whose memory can be restored, newest first; not together with ``last_committed``.
        :param last_committed: take the last committed one although a later epoch is in doubt.
        :param force: although the primary is connected. See to it that its VM is off.
        :param timeout: seconds for the answer; the failover goes on after it.
        :raise NotConsistent: when the disks can reach none of them.
        :raise CommitInDoubt: when an epoch is in doubt and neither it nor ``last_committed`` was named.
        :raise Refused: when the primary is connected, or a failover to another checkpoint was begun.
        """
        arguments = FailoverArguments(tuple(map(EpochNumber, checkpoints)), last_committed, force)
        return await self._ask("failover", arguments, FailoverResult, timeout=timeout)


@asynccontextmanager
async def open_toolstack(control: Path, *, timeout: float = 5.0) -> AsyncIterator[Toolstack]:
    """Connect to a primary.

    :param control: its control socket.
    :param timeout: seconds for making a connection.
    :raise ControlUnreachable: when there is no controller.
    """
    async with Toolstack(control, timeout)._open() as toolstack:
        yield toolstack


@asynccontextmanager
async def open_backup(control: Path, *, timeout: float = 5.0) -> AsyncIterator[Backup]:
    """Connect to a secondary; otherwise as :func:`open_toolstack`."""
    async with Backup(control, timeout)._open() as backup:
        yield backup
