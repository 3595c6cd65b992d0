"""A pause of ours that outlasts one checkpoint: a planned switch-over's.

Owned here: that a VM which we paused runs again, whatever becomes of us, until :meth:`Hold.stand` has made the pause
final; and that from there on nobody of ours resumes it unasked.  Why it is paused is the caller's business.
"""

from __future__ import annotations

from typing import Final

import structlog
import trio

from qemu_remus.core.errors import CommandFailed, CommandInDoubt, QemuError
from qemu_remus.qemu import commands
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.guardian_client import DEFAULT_PAUSE_LIMIT, Guardian

_REPLY_LIMIT: Final = 5.0
"""Seconds that QEMU may take over one command. ``stop`` waits for the host's disks."""

_RESUME_LIMIT: Final = 120.0
"""Seconds for which a VM that should run is told to; the guardian takes over then."""

_log = structlog.get_logger(__name__)


class Hold:
    """The pause of one VM. One task at a time.

    :param guardian: resumes the VM should this process end before the pause is final; None: nobody does.
    """

    def __init__(self, client: QmpClient, guardian: Guardian | None) -> None:
        self._client = client
        self._guardian = guardian
        self._ours = False

    async def take(self, seconds: float) -> bool:
        """Pause the VM.

        :param seconds: that the pause may last; the guardian allows a little more, then ends us and the pause.
        :return: whether it is we who paused it; a VM that is paused already stays so, and is not ours to resume.
        :raise QemuError: it cannot be paused; it is as it was, or runs.
        """
        status = await self._status()
        if status == "paused":
            return False
        if status != "running":
            raise QemuError(
                f"the VM is {status}", safe="it was left so", hint="switch over when it is running, or paused"
            )
        if self._guardian is not None:
            await self._guardian.arm(seconds + DEFAULT_PAUSE_LIMIT)
        with trio.CancelScope(shield=True):
            self._ours = True
            try:
                await self._client.execute(commands.stop(), timeout=_REPLY_LIMIT)
            except QemuError:
                await self.let_run()
                raise
        return True

    async def stand(self) -> None:
        """Make the pause final: from here on only :meth:`let_run` ends it, also should this process end.

        :raise QemuError: it is not known that the guardian would leave the VM paused.
        """
        if self._guardian is not None:
            await self._guardian.stand_down()
        self._ours = False

    async def let_run(self) -> None:
        """Resume a paused VM, trying until it is known to run; a VM in any other state is left alone.

        :raise QemuError: that cannot be known; the guardian goes on trying where it can.
        """
        with trio.CancelScope(shield=True):
            await self._let_run()
            self._ours = False
            if self._guardian is not None:
                self._guardian.disarm()

    async def let_go(self) -> None:
        """At the end of everything: resume the VM where we paused it and the pause was not made final."""
        if self._ours:
            await self.let_run()

    async def _status(self, *, insist: bool = False) -> str:
        return str((await self._client.execute(commands.query_status(), insist=insist))["status"])

    async def _let_run(self) -> None:
        with trio.move_on_after(_RESUME_LIMIT):
            while not self._client.closed.is_set():
                await self._arm_anew()
                try:
                    if await self._status(insist=True) == "paused":
                        await self._client.execute(commands.cont(), timeout=_REPLY_LIMIT, insist=True)
                except CommandFailed:
                    raise
                except QemuError as error:
                    _log.warning("it is not known yet that the VM runs; trying on", error=str(error))
                else:
                    return
        if self._guardian is None:
            raise CommandInDoubt("cont", "the connection was lost in the pause", hint="look at the VM, and resume it")
        await self._guardian.resume_now()

    async def _arm_anew(self) -> None:
        """QEMU may be slow, and we are here to see it: no reason to be killed."""
        if self._guardian is not None:
            try:
                await self._guardian.arm()
            except QemuError as error:
                _log.warning("nobody would resume the VM should this controller end now", error=str(error))
