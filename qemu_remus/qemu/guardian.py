"""The guardian: a small process that resumes a VM whose controller was killed, or hangs, inside its own pause.

It owns a second way to QEMU for one purpose: ``cont``. It knows nothing of epochs, disks or nodes, and imports nothing
but the standard library, so that it starts in a few hundredths of a second, stays small, and shares no bug with the
controller that it watches. It is started by file name as ``python -I -S guardian.py`` (``python -m`` works too).

The controller (:mod:`qemu_remus.qemu.guardian_client`) holds the other end of a ``SOCK_SEQPACKET`` socket pair; one
packet is one message, in ASCII:

====================  ==============  ========================================================================
controller            guardian        meaning
====================  ==============  ========================================================================
(started)             ``ready``       signals are set, the socket is being read
``arm SECONDS``       ``armed``       a pause of our own is about to begin, and may last so long
``disarm``                            it is over: ``cont`` was answered
``resume``            ``resumed`` or  the controller lost its QMP connection inside the pause: resume now
                      ``failed WHY``
(end of file)                         the controller is gone
====================  ==============  ========================================================================

============================  =========================================================
what happened                 what the guardian does
============================  =========================================================
end of file while armed       resume the VM, exit
deadline passed while armed   SIGKILL the controller (it hangs), resume the VM, exit
end of file while not armed   exit; the VM is not touched
============================  =========================================================

To resume means: connect to QMP, ask ``query-status``, and send ``cont`` only where the answer is ``paused``, which is
what ``stop`` leaves behind. A VM that stopped for another reason (an I/O error, a panic, a migration) is left alone,
and so is every pause outside the armed time. Between ``arm`` and the controller's ``stop`` lie some tens of
microseconds: a pause by somebody else who hits just them, with a controller that dies in them as well, is the one
foreign pause that is taken for our own.

QEMU serves one client per QMP socket, so the guardian is served as soon as the dead controller's connection is closed,
and ahead of anybody who comes later.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

MESSAGE_LIMIT: Final = 512
"""Longest message in either direction, in bytes."""

READY: Final = b"ready"
ARMED: Final = b"armed"
RESUMED: Final = b"resumed"
FAILED: Final = b"failed"
DISARM: Final = b"disarm"
RESUME: Final = b"resume"

DEFAULT_RESUME_LIMIT: Final = 600.0
"""Seconds for which a VM that should be resumed is tried for. QEMU may be hung, or its socket in use by somebody."""

_REPLY_LIMIT: Final = 30.0
"""Seconds that QEMU may take over one reply before the guardian connects anew."""

_RETRY: Final = 0.05
"""Seconds between two attempts."""

_LINE_LIMIT: Final = 1 << 20
"""Bytes of one QMP message. What is asked here has answers of some 200."""

_DEATH_LIMIT: Final = 5.0
"""Seconds to wait for a killed controller to be gone; the QMP socket is waited for in any case."""


def arm_message(seconds: float) -> bytes:
    """The message that arms the guardian for a pause of at most ``seconds``."""
    return b"arm %.3f" % seconds


class Verdict(Enum):
    """What is to be done now."""

    WAIT = "wait"
    EXIT = "exit"
    RESUME = "resume"
    KILL_AND_RESUME = "kill-and-resume"


@dataclass(slots=True)
class Watch:
    """Armed or not, and until when: the whole state of the guardian.

    :param deadline: monotonic seconds; None while not armed.
    """

    deadline: float | None = None

    def receive(self, message: bytes, now: float) -> bytes | None:
        """Take one message; ``resume`` is not for here, since it changes nothing.

        :return: the answer to send, if there is one.
        :raise ValueError: when it is none of ours.
        """
        if message == DISARM:
            self.deadline = None
            return None
        word, _, number = message.partition(b" ")
        if word != b"arm":
            raise ValueError(f"not a message: {message!r}")
        self.deadline = now + float(number)
        return ARMED

    def verdict(self, *, gone: bool, now: float) -> Verdict:
        """Decide.

        :param gone: the controller has ended.
        """
        if gone:
            return Verdict.EXIT if self.deadline is None else Verdict.RESUME
        if self.deadline is not None and now >= self.deadline:
            return Verdict.KILL_AND_RESUME
        return Verdict.WAIT

    def time_left(self, now: float) -> float | None:
        """Seconds until the deadline, at least 0; None while not armed."""
        return None if self.deadline is None else max(0.0, self.deadline - now)


class ResumeFailed(Exception):
    """The VM could not be resumed, or nobody knows. The text says why."""


class _Qmp:
    """One QMP conversation, blocking, with a deadline on every byte. Any failure is an OSError or a ValueError."""

    def __init__(self, path: str, deadline: float) -> None:
        self._deadline = deadline
        self._buffer = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._arm_timeout(_REPLY_LIMIT)
            self._socket.connect(path)
            self._greet()
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def _greet(self) -> None:
        # While somebody else is connected QEMU leaves us waiting for the greeting: keep the place in the queue.
        if "QMP" not in self._line(None):
            raise ValueError("no QMP greeting")
        self.execute("qmp_capabilities")

    def execute(self, name: str) -> Any:
        self._arm_timeout(_REPLY_LIMIT)
        self._socket.sendall(json.dumps({"execute": name, "id": name}).encode() + b"\r\n")
        while True:
            message = self._line(_REPLY_LIMIT)
            if "error" in message:
                raise ValueError(f"{name}: {message['error'].get('desc')}")
            if "return" in message:
                return message["return"]

    def _line(self, limit: float | None) -> dict[str, Any]:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _LINE_LIMIT:
                raise ValueError("an endless line")
            self._arm_timeout(limit)
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionResetError("QEMU closed the connection")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("not a QMP message")  # noqa: TRY004 - one kind of failure is enough here
        return message

    def _arm_timeout(self, limit: float | None) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no time left")
        self._socket.settimeout(left if limit is None else min(left, limit))


def resume(path: str, limit: float) -> str:
    """Resume the VM behind a QMP socket if it is paused, trying again until it is known to be done.

    A ``cont`` whose reply is lost is followed by another look at the status, never by an assumption.

    :param limit: seconds to go on trying.
    :return: the VM's status as it was found: ``running``, ``paused`` (it runs now), or another, which was left alone.
    :raise ResumeFailed: when the limit has passed, or QEMU is gone.
    """
    deadline = time.monotonic() + limit
    while True:
        try:
            return _resume_once(path, deadline)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            # A QEMU that lives listens on for as long as it lives, whoever is connected.
            raise ResumeFailed(f"nobody listens on {path} any more: QEMU has ended") from error
        except (OSError, ValueError) as error:
            if time.monotonic() + _RETRY >= deadline:
                raise ResumeFailed(f"{path}: {error}") from error
        time.sleep(_RETRY)


def _resume_once(path: str, deadline: float) -> str:
    qmp = _Qmp(path, deadline)
    try:
        status = qmp.execute("query-status")["status"]
        if status == "paused":
            qmp.execute("cont")
        return str(status)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an answer to query-status: {error}") from error
    finally:
        qmp.close()


class _Loop:
    """The guardian's one loop, over the controller's socket and its pidfd."""

    def __init__(self, control: socket.socket, controller: int, path: str, limit: float) -> None:
        self._control = control
        self._controller = controller
        self._path = path
        self._limit = limit
        self._watch = Watch()
        self._gone = False

    def run(self) -> int:
        self._answer(READY)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._controller, select.POLLIN)
        while True:
            verdict = self._watch.verdict(gone=self._gone, now=time.monotonic())
            if verdict is not Verdict.WAIT:
                break
            left = self._watch.time_left(time.monotonic())
            ready = poll.poll(None if left is None else left * 1000 + 1)
            self._drain()
            if any(fd == self._controller for fd, _ in ready):
                self._gone = True
        if verdict is Verdict.EXIT:
            return 0
        if verdict is Verdict.KILL_AND_RESUME:
            _log("the controller did not end its pause in time: killing it")
            self._kill()
        return 0 if self._resume() == RESUMED else 1

    def _drain(self) -> None:
        """Take every message that is there: what a controller said before it died still counts."""
        while not self._gone:
            try:
                message = self._control.recv(MESSAGE_LIMIT, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                self._gone = True
            elif message == RESUME:
                self._answer(self._resume())
            else:
                try:
                    answer = self._watch.receive(message, time.monotonic())
                except ValueError as error:
                    _log(str(error))
                    continue
                if answer is not None:
                    self._answer(answer)

    def _answer(self, message: bytes) -> None:
        with contextlib.suppress(OSError):
            self._control.send(message[:MESSAGE_LIMIT], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._controller, signal.SIGKILL)
        poll = select.poll()
        poll.register(self._controller, select.POLLIN)
        poll.poll(_DEATH_LIMIT * 1000)

    def _resume(self) -> bytes:
        try:
            status = resume(self._path, self._limit)
        except ResumeFailed as error:
            _log(f"could not resume the VM: {error}")
            return FAILED + b" " + str(error).encode("ascii", "replace")
        if status == "paused":
            _log("resumed the VM, which its controller had left paused")
        return RESUMED


def _log(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"qemu-remus guardian[{os.getpid()}]: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Guard one controller until it ends.

    :return: 0 where nothing was to do or the VM runs again, 1 where it could not be resumed.
    """
    parser = argparse.ArgumentParser(prog="guardian", description="Started by qemu-remus primary, never by hand.")
    parser.add_argument("--qmp", required=True, help="QEMU's QMP socket")
    parser.add_argument("--control-fd", required=True, type=int, help="our end of the socket pair")
    parser.add_argument("--controller-fd", required=True, type=int, help="a pidfd of the controller")
    parser.add_argument("--resume-limit", type=float, default=DEFAULT_RESUME_LIMIT, help="seconds")
    options = parser.parse_args(arguments)
    # Ctrl-C and a service manager's SIGTERM reach the whole group: whoever guards outlives the controller, and its end
    # shows as the end of file.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=options.control_fd) as control:
        return _Loop(control, options.controller_fd, options.qmp, options.resume_limit).run()


if __name__ == "__main__":
    sys.exit(main())
