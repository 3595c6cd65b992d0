"""The guardian: a small process beside the controller that ends it when it hangs, and makes good what its end left.

It owns a second way to QEMU for one purpose: ``cont``. It knows nothing of epochs, disks or nodes, and imports nothing
but the standard library, so that it starts in a few hundredths of a second, stays small, and shares no bug with the
controller that it watches. It is started by file name as ``python -I -S guardian.py`` (``python -m`` works too).

The controller (:mod:`qemu_remus.qemu.guardian_client`) holds the other end of a ``SOCK_SEQPACKET`` socket pair; one
packet is one message, in ASCII:

====================  ==============  ========================================================================
controller            guardian        meaning
====================  ==============  ========================================================================
(started)             ``ready``       signals are set, the socket is being read
``alive``                             the event loop runs; said :data:`SIGNS` times within the patience
``arm SECONDS``       ``armed``       a pause of our own is about to begin, and may last so long
``disarm``                            it is over: ``cont`` was answered
``stay``              ``staying``     the pause is final: the VM is to stay paused, whatever becomes of the controller
``resume``            ``resumed`` or  the controller lost its QMP connection inside the pause: resume now
                      ``failed WHY``
``farewell``                          an orderly end follows: everything is taken out
(end of file)                         the controller is gone
====================  ==============  ========================================================================

============================  =========================================================
what happened                 what the guardian does
============================  =========================================================
deadline passed while armed   SIGKILL the controller (it hangs); the rest as if it had died
silence beyond the patience   the same: every message is a sign of life
death while armed             resume the VM; then as below
death without farewell        become the clean-up command that it was started with; the
                              controller's bitmaps in QEMU are for its restart to find
end of file after farewell    exit; the VM is not touched
============================  =========================================================

**Who stood still.** Time counts against the controller only while the guardian itself runs. It looks at the clock
:data:`SIGNS` times within the patience; a look that comes late by more than such an interval means that the whole
machine stood still (a suspended laptop, a VM, a frozen group of processes) or that nobody gets any processor time. The
silence is counted anew from there, and the deadline of a pause moves by as much.

To resume means: connect to QMP, ask ``query-status``, and send ``cont`` only where the answer is ``paused``, which is
what ``stop`` leaves behind. A VM that stopped for another reason (an I/O error, a panic, a migration) is left alone,
and so is every pause outside the armed time. Between ``arm`` and the controller's ``stop`` lie some tens of
microseconds: a pause by somebody else who hits just them, with a controller that dies in them as well, is the one
foreign pause that is taken for our own.

QEMU serves one client per QMP socket, so the guardian is served as soon as the dead controller's connection is closed,
and ahead of anybody who comes later. For the clean-up it waits in that queue for a few seconds only: where somebody
else is connected, that is most likely a restarted controller, which cleans up by itself.
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
STAYING: Final = b"staying"
ARMED: Final = b"armed"
RESUMED: Final = b"resumed"
FAILED: Final = b"failed"
ALIVE: Final = b"alive"
DISARM: Final = b"disarm"
STAY: Final = b"stay"
RESUME: Final = b"resume"
FAREWELL: Final = b"farewell"

SIGNS: Final = 10
"""Signs of life that a controller gives, and looks that the guardian takes at the clock, within the patience."""

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

_QUEUE_LIMIT: Final = 10.0
"""Seconds to wait for QEMU's greeting before a clean-up."""


def arm_message(seconds: float) -> bytes:
    """The message that arms the guardian for a pause of at most ``seconds``."""
    return b"arm %.3f" % seconds


class Verdict(Enum):
    """What is to be done now."""

    WAIT = "wait"
    KILL = "kill"
    RESUME = "resume"
    CLEAN_UP = "clean-up"
    EXIT = "exit"


@dataclass(slots=True)
class Watch:
    """What is known of the controller: the whole state of the guardian. All times are monotonic seconds.

    :param patience: seconds of silence after which the controller hangs, more than 0.
    :param heard: when it was heard last, or since when its silence counts.
    :param due: when the guardian means to look next.
    :param deadline: when a pause of its own must be over; None outside of one.
    :param parted: it has announced an orderly end.
    """

    patience: float
    heard: float
    due: float
    deadline: float | None = None
    parted: bool = False

    @classmethod
    def begin(cls, patience: float, now: float) -> Watch:
        """The watch over a controller that has just started us."""
        return cls(patience, heard=now, due=now + patience / SIGNS)

    def look(self, now: float) -> None:
        """Take note of the time, before anything else that is done at it: has the guardian stood still?"""
        late = now - self.due
        if late > self.patience / SIGNS:
            self.heard = now
            if self.deadline is not None:
                self.deadline += late

    def receive(self, message: bytes, now: float) -> bytes | None:
        """Take one message; ``resume`` is not for here, since it changes nothing.

        :return: the answer to send, if there is one.
        :raise ValueError: when it is none of ours.
        """
        answer = None
        if message == DISARM:
            self.deadline = None
        elif message == STAY:
            # Answered: a guardian that has already decided otherwise must not be believed to have heard it.
            self.deadline = None
            answer = STAYING
        elif message == FAREWELL:
            self.parted = True
        elif message != ALIVE:
            word, _, number = message.partition(b" ")
            if word != b"arm":
                raise ValueError(f"not a message: {message!r}")
            self.deadline = now + float(number)
            answer = ARMED
        self.heard = now
        return answer

    def verdict(self, *, gone: bool, now: float) -> Verdict:
        """Decide.

        :param gone: the controller has ended.
        """
        if gone:
            if self.deadline is not None:
                return Verdict.RESUME
            return Verdict.EXIT if self.parted else Verdict.CLEAN_UP
        if self.deadline is not None and now >= self.deadline:
            return Verdict.KILL
        if not self.parted and now - self.heard >= self.patience:
            return Verdict.KILL
        return Verdict.WAIT

    def sleep(self, now: float) -> float:
        """Seconds until the next look, at least 0."""
        self.due = now + self.patience / SIGNS
        if self.deadline is not None:
            self.due = min(self.due, max(now, self.deadline))
        return self.due - now


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
        # An event, or the reply to a command of the controller that died, may still come before it.
        while "QMP" not in (message := self._line(None)):
            if not message.keys() & {"event", "return", "error"}:
                raise ValueError("no QMP greeting")
        self.execute("qmp_capabilities")

    def execute(self, name: str) -> Any:
        self._arm_timeout(_REPLY_LIMIT)
        self._socket.sendall(json.dumps({"execute": name, "id": name}).encode() + b"\r\n")
        while True:
            message = self._line(_REPLY_LIMIT)
            if message.get("id") != name:
                continue
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
    """The guardian's one loop, over the controller's socket and its pidfd.

    :param limit: seconds for which a VM that should run is tried for.
    :param command: what cleans up behind a controller that died; empty for nothing.
    """

    def __init__(
        self, control: socket.socket, controller: int, path: str, *, patience: float, limit: float, command: list[str]
    ) -> None:
        self._control = control
        self._controller = controller
        self._path = path
        self._limit = limit
        self._command = command
        self._watch = Watch.begin(patience, time.monotonic())
        self._gone = False

    def run(self) -> int:
        self._answer(READY)
        verdict = self._wait()
        if verdict is Verdict.KILL:
            why = "is silent" if self._watch.deadline is None else "did not end its pause in time, or is silent"
            _log(f"the controller {why}: killing it")
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._controller, signal.SIGKILL)
            self._has_ended(_DEATH_LIMIT)
            verdict = self._watch.verdict(gone=True, now=time.monotonic())
        if verdict is Verdict.RESUME:
            if self._resume() != RESUMED:
                return 1
            self._watch.deadline = None
            verdict = self._watch.verdict(gone=True, now=time.monotonic())
        if verdict is Verdict.CLEAN_UP and self._command:
            return self._clean_up()
        return 0

    def _wait(self) -> Verdict:
        """Watch until there is something to do."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._controller, select.POLLIN)
        while True:
            now = time.monotonic()
            self._watch.look(now)
            self._drain()
            verdict = self._watch.verdict(gone=self._gone, now=now)
            if verdict is not Verdict.WAIT:
                return verdict
            ready = poll.poll(self._watch.sleep(time.monotonic()) * 1000 + 1)
            if any(fd == self._controller for fd, _ in ready):
                # What it said before counts, and then no more comes.
                self._drain()
                self._gone = True

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

    def _has_ended(self, limit: float) -> bool:
        """Whether the controller has ended, waiting for it if it must."""
        poll = select.poll()
        poll.register(self._controller, select.POLLIN)
        return bool(poll.poll(limit * 1000))

    def _resume(self) -> bytes:
        try:
            status = resume(self._path, self._limit)
        except ResumeFailed as error:
            _log(f"could not resume the VM: {error}")
            return FAILED + b" " + str(error).encode("ascii", "replace")
        if status == "paused":
            _log("resumed the VM, which its controller had left paused")
        return RESUMED

    def _clean_up(self) -> int:
        """Become the clean-up, unless QEMU is gone or serves somebody else; does not return then."""
        if not self._has_ended(self._limit):
            _log("the controller does not die: what it has in QEMU stays there")
            return 1
        try:
            _Qmp(self._path, time.monotonic() + _QUEUE_LIMIT).close()
        except (OSError, ValueError) as error:
            _log(f"no clean-up after the controller's end, since QEMU is gone or serves somebody else: {error}")
            return 0
        _log("the controller died: taking out what it left in QEMU, except for its bitmaps")
        try:
            os.execv(self._command[0], self._command)
        except OSError as error:
            _log(f"cannot run {self._command[0]}: {error}")
        return 1


def _log(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"qemu-remus guardian[{os.getpid()}]: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Guard one controller until it ends.

    :return: 0 where nothing was to do or all is well again, 1 where the VM could not be resumed or cleaned.
    """
    parser = argparse.ArgumentParser(prog="guardian", description="Started by qemu-remus primary, never by hand.")
    parser.add_argument("--qmp", required=True, help="QEMU's QMP socket")
    parser.add_argument("--control-fd", required=True, type=int, help="our end of the socket pair")
    parser.add_argument("--controller-fd", required=True, type=int, help="a pidfd of the controller")
    parser.add_argument("--patience", required=True, type=float, help="seconds of silence until it is killed")
    parser.add_argument("--resume-limit", type=float, default=DEFAULT_RESUME_LIMIT, help="seconds")
    parser.add_argument("command", nargs="*", help="clean-up after a death without farewell; a full path and arguments")
    options = parser.parse_args(arguments)
    # Ctrl-C and a service manager's SIGTERM reach the whole group: whoever guards outlives the controller, and its end
    # shows as the end of file.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for fd in (options.control_fd, options.controller_fd):
        os.set_inheritable(fd, False)
    with socket.socket(fileno=options.control_fd) as control:
        return _Loop(
            control,
            options.controller_fd,
            options.qmp,
            patience=options.patience,
            limit=options.resume_limit,
            command=options.command,
        ).run()


if __name__ == "__main__":
    sys.exit(main())
