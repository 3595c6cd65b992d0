"""A QMP client that goes wrong on purpose, at the n-th command: it fails it, loses the connection, or ends its process.

Counting begins with :meth:`FaultyQmp.arm`. One point is *before* a command (all before it in the same write were sent
and answered); one more per write is *sent*: all of it was sent and nothing was answered.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from enum import Enum
from typing import Any, cast

import trio
import trio.testing

from qemu_remus.core.errors import CommandFailed, CommandInDoubt, QemuUnreachable
from qemu_remus.qemu.client import Done, Failed, InDoubt, Outcome, QmpClient
from qemu_remus.qemu.commands import Command


class Fault(Enum):
    """What happens at the chosen point."""

    REFUSE = "refuse"
    """QEMU refuses this command and runs the others."""
    DOUBT = "doubt"
    """The command runs; its reply, and those of the rest of the write, do not come in time."""
    KILL = "kill"
    """Our process gets SIGKILL."""
    STOP = "stop"
    """Our process gets SIGSTOP."""


class FaultyQmp:
    """Stands in for a :class:`QmpClient`; everything that is not overridden here is the client's."""

    def __init__(self, client: QmpClient) -> None:
        self._client = client
        self._fault: Fault | None = None
        self._point: int | str = -1
        self.passed = 0
        """Points that have been passed since :meth:`arm`."""
        self.names: list[str] = []
        """The commands of these points; ``sent`` for the end of a write."""
        self.struck = False

    def arm(self, fault: Fault | None, point: int | str) -> None:
        """Go wrong at this point, once.

        :param fault: None: only count.
        :param point: a number from 0 on, or a command: the point before the one that follows it in its write.
        """
        self._fault, self._point = fault, point
        self.passed, self.names, self.struck = 0, [], False

    def disarm(self) -> None:
        """Be faithful from now on."""
        self._fault = None

    def as_client(self) -> QmpClient:
        """For callers that want the real thing."""
        return cast(QmpClient, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def execute(self, command: Command, *, timeout: float = 10.0, insist: bool = False) -> Any:
        (outcome,) = await self.execute_many([command], timeout=timeout, insist=insist)
        match outcome:
            case Done(value=value):
                return value
            case Failed(error=refused):
                raise refused
            case InDoubt(error=doubt, why=why):
                if command.changes_state:
                    raise doubt
                raise QemuUnreachable(why)

    async def execute_many(
        self, commands: Sequence[Command], *, timeout: float = 10.0, insist: bool = False
    ) -> list[Outcome]:
        if self.struck and self._fault in (Fault.KILL, Fault.STOP):
            await trio.sleep_forever()
        at = self._strikes(commands)
        if at is None:
            return await self._client.execute_many(commands, timeout=timeout, insist=insist)
        self.struck = True
        if self._fault is Fault.REFUSE:
            return await self._refuse(commands, min(at, len(commands) - 1))
        if self._fault is Fault.DOUBT:
            outcomes = await self._client.execute_many(commands, timeout=timeout, insist=insist)
            lost = [InDoubt(CommandInDoubt(one.name, "the test lost it"), "the test lost it") for one in commands[at:]]
            return [*outcomes[:at], *lost]
        if at < len(commands):
            await self._client.execute_many(commands[:at], timeout=timeout)
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._client.execute_many, commands)
                await trio.testing.wait_all_tasks_blocked()
                self._die()
        self._die()
        raise AssertionError("unreachable")

    def _strikes(self, commands: Sequence[Command]) -> int | None:
        """Where in this write the fault is; its length for the point *sent*; None: not in it."""
        names = [command.name for command in commands]
        first = self.passed
        self.passed += len(names) + 1
        self.names += [*names, "sent"]
        if self._fault is None or self.struck:
            return None
        if isinstance(self._point, str):
            return names.index(self._point) + 1 if self._point in names else None
        return self._point - first if first <= self._point < self.passed else None

    async def _refuse(self, commands: Sequence[Command], at: int) -> list[Outcome]:
        # The refused one is left out, so that what follows meets a QEMU in which it has not happened.
        before = await self._client.execute_many(commands[:at]) if at else []
        refused = Failed(CommandFailed(commands[at].name, "GenericError", "the test says no"), self._client.order)
        after = await self._client.execute_many(commands[at + 1 :])
        return [*before, refused, *after]

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL if self._fault is Fault.KILL else signal.SIGSTOP)
