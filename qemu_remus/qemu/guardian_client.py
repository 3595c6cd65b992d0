"""The controller's side of the guardian: start it, give it signs of life, arm it around each pause of our own.

It owns the guardian's process, which is started again when it died, and our end of the socket pair. What the guardian
does, and what the two say to each other, is told in :mod:`qemu_remus.qemu.guardian`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import structlog
import trio

from qemu_remus.core.errors import QemuError
from qemu_remus.core.model import PairName
from qemu_remus.core.settings import DEFAULT_WATCHDOG_SECONDS
from qemu_remus.qemu import guardian as protocol

DEFAULT_PAUSE_LIMIT: Final = 10.0
"""Seconds that a pause of our own may last before the guardian kills the controller and resumes the VM."""

_START_LIMIT: Final = 10.0
"""Seconds from starting a guardian until it must be ready."""

_ANSWER_LIMIT: Final = 2.0
"""Seconds in which a guardian that runs must acknowledge that it is armed; else it is replaced."""

_END_LIMIT: Final = 2.0
"""Seconds that a guardian may take to exit after our end of the socket was closed."""

_CLEAN_UP: Final = "qemu_remus.qemu.cleanup"
"""The module that the guardian runs when we have died; see there."""

_log = structlog.get_logger(__name__)


class _Lost(Exception):
    """The guardian does not answer: it died, or hangs."""


class Guardian:
    """A running guardian. Use :func:`start_guardian`; one task at a time.

    Arming is acknowledged before a pause begins, so that no pause is ever entered on trust; that round trip, some
    100 µs, is not part of the pause. Disarming is a write into a socket and waits for nothing.
    """

    def __init__(self, qmp_path: str, pair: PairName, patience: float, resume_limit: float) -> None:
        self._qmp_path = qmp_path
        self._pair = pair
        self._patience = patience
        self._resume_limit = resume_limit
        # Whoever finds it dead replaces it; nobody else asks it anything meanwhile.
        self._turn = trio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._restarts = 0
        self._armed_until: float | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the guardian; None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def restarts(self) -> int:
        """How often a guardian had to be replaced because it had died or did not answer."""
        return self._restarts

    async def arm(self, seconds: float = DEFAULT_PAUSE_LIMIT) -> None:
        """Announce a pause of ours. Returns when the guardian has said that it is armed.

        A guardian that died, or does not answer, is replaced first. Arming an armed guardian moves its deadline.

        :param seconds: how long the pause may last from now, more than 0.
        :raise QemuError: when no guardian can be brought to answer. Do not pause the VM then.
        """
        async with self._turn:
            until = trio.current_time() + seconds
            try:
                await self._ask(protocol.arm_message(seconds), protocol.ARMED, _ANSWER_LIMIT)
            except _Lost:
                await self._replace()
            else:
                self._armed_until = until
                return
            try:
                await self._ask(protocol.arm_message(seconds), protocol.ARMED, _ANSWER_LIMIT)
            except _Lost as error:
                raise QemuError(
                    f"the guardian does not answer: {error}",
                    safe="the VM was not paused",
                    hint="without a guardian no checkpoint is taken; see whether the host is short of memory or "
                    "processes",
                ) from error
            self._armed_until = until

    def disarm(self) -> None:
        """Say that the pause is over. Never blocks; a guardian that has died meanwhile is found by the next arm."""
        self._armed_until = None
        self._tell(protocol.DISARM)

    async def stand_down(self) -> None:
        """Say that the VM is to stay paused, whatever becomes of us. Returns when that is certain.

        A guardian that does not answer may be about to kill us and to resume the VM: it is ended, and another one,
        which knows of no pause, takes its place.

        :raise QemuError: when it is not certain.
        """
        async with self._turn:
            self._armed_until = None
            try:
                await self._ask(protocol.STAY, protocol.STAYING, _ANSWER_LIMIT)
            except _Lost:
                await self._replace()

    async def resume_now(self, timeout: float = 30.0) -> None:
        """Have the guardian resume the VM, because our own QMP connection was lost inside the pause.

        The guardian stays armed: :meth:`disarm` it afterwards.

        :param timeout: seconds to wait for it.
        :raise QemuError: when it could not, or nobody knows; the VM may be paused.
        """
        async with self._turn:
            try:
                await self._ask(protocol.RESUME, protocol.RESUMED, timeout)
            except _Lost as error:
                raise QemuError(
                    f"the VM may be paused, and the guardian could not resume it: {error}",
                    hint="look at the VM's status, and resume it (cont)",
                ) from error

    async def give_signs(self) -> None:
        """Tell it again and again that our event loop runs, until cancelled; replace it when it has died."""
        alone = False
        while True:
            await trio.sleep(self._patience / protocol.SIGNS)
            told = self._socket
            if self._tell(protocol.ALIVE):
                continue
            async with self._turn:
                if self._socket is not told:
                    continue  # it was replaced meanwhile
                try:
                    await self._replace()
                except QemuError as error:
                    if not alone:
                        _log.warning("nobody watches over this controller; trying on", error=str(error))
                    alone = True
                else:
                    alone = False

    async def start(self) -> None:
        """Start the process and wait until it is ready.

        :raise QemuError: when it cannot be started or does not get ready.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = await trio.to_thread.run_sync(self._spawn, theirs.fileno())
            except OSError as error:
                ours.close()
                raise QemuError(f"the guardian cannot be started: {error}") from error
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self._socket = ours
        try:
            await self._receive(protocol.READY, _START_LIMIT)
        except _Lost as error:
            await self._stop(kill=True)
            raise QemuError(f"the guardian does not start: {error}") from error

    async def close(self) -> None:
        """Say that we end in good order, and let it exit; kill it if it does not."""
        self._tell(protocol.FAREWELL)
        await self._stop(kill=False)

    def _spawn(self, control: int) -> subprocess.Popen[bytes]:
        controller = os.pidfd_open(os.getpid())
        try:
            return subprocess.Popen(
                [
                    sys.executable,
                    *("-I", "-S", protocol.__file__),
                    *("--qmp", self._qmp_path),
                    *("--control-fd", str(control)),
                    *("--controller-fd", str(controller)),
                    *("--patience", str(self._patience)),
                    *("--resume-limit", str(self._resume_limit)),
                    "--",
                    *(sys.executable, "-m", _CLEAN_UP, "--qmp", self._qmp_path, "--pair", self._pair),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(control, controller),
                start_new_session=True,
            )
        finally:
            os.close(controller)

    def _tell(self, message: bytes) -> bool:
        """Send what needs no answer; whether it was taken. A full buffer means a guardian that does not read."""
        if self._socket is None:
            return False
        try:
            self._socket.send(message, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    async def _replace(self) -> None:
        await self._stop(kill=True)
        self._restarts += 1
        await self.start()
        if self._armed_until is None:
            return
        # In a long pause of ours: whoever comes now must know of it.
        left = max(self._armed_until - trio.current_time(), 0.001)
        try:
            await self._ask(protocol.arm_message(left), protocol.ARMED, _ANSWER_LIMIT)
        except _Lost as error:
            raise QemuError(f"the guardian does not answer: {error}") from error

    async def _ask(self, message: bytes, expected: bytes, timeout: float) -> None:
        if self._socket is None:
            raise _Lost("it does not run")
        try:
            # A full buffer means a guardian that does not read; that is an OSError too.
            self._socket.send(message, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise _Lost(str(error)) from error
        await self._receive(expected, timeout)

    async def _receive(self, expected: bytes, timeout: float) -> None:
        assert self._socket is not None
        try:
            with trio.fail_after(timeout):
                await trio.lowlevel.wait_readable(self._socket.fileno())
            answer = self._socket.recv(protocol.MESSAGE_LIMIT)
        except trio.TooSlowError as error:
            raise _Lost(f"no answer within {timeout:g} s") from error
        except OSError as error:
            raise _Lost(str(error)) from error
        if answer != expected:
            raise _Lost(answer.decode("ascii", "replace") or "it has ended")

    async def _stop(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        control, self._socket = self._socket, None
        if kill and process is not None:
            # Before its socket is closed, which it would take for our end.
            process.kill()
        if control is not None:
            control.close()
        if process is None:
            return
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(process.wait, _END_LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                await trio.to_thread.run_sync(process.wait)


@asynccontextmanager
async def start_guardian(
    qmp_path: str | Path,
    pair: PairName,
    *,
    patience: float = DEFAULT_WATCHDOG_SECONDS,
    resume_limit: float = protocol.DEFAULT_RESUME_LIMIT,
) -> AsyncIterator[Guardian]:
    """Run a guardian beside this process, in a session of its own, for as long as the context lasts.

    A context that is left, whatever the reason, is an orderly end: what is in QEMU must have been taken out by then.

    :param qmp_path: the QMP socket that the controller uses; the guardian connects to it only when that has lost it.
    :param pair: whose nodes and exports are taken out of QEMU if this process dies.
    :param patience: seconds for which our event loop may stand still before the guardian kills us.
    :param resume_limit: seconds for which it goes on trying to resume a VM.
    :raise QemuError: when it cannot be started.
    """
    guardian = Guardian(str(qmp_path), pair, patience, resume_limit)
    await guardian.start()
    # What cancels the body must not silence us: cleaning up, shielded, may take longer than the patience.
    signs = trio.CancelScope(shield=True)

    async def give_signs() -> None:
        with signs:
            await guardian.give_signs()

    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_signs)
        try:
            yield guardian
        except BaseException as error:  # carried out of the nursery by hand, which would wrap it in a group
            failure = error
        finally:
            signs.cancel()
            await guardian.close()
    if failure is not None:
        raise failure
