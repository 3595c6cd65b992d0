"""A guardian as a real process over a played QEMU.

The controller that it kills is a real process, too (a ``sleep``); only QEMU is played. Nothing waits for a time to pass
except where a deadline is what is tested, and those are some tenths of a second.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qemu_remus.core.model import PairName
from qemu_remus.qemu import guardian
from qemu_remus.qemu.guardian import arm_message

LIMIT = 60.0
"""Seconds after which a test gives up on a process; never waited for where all is well."""

PATIENCE = 8.0
"""Seconds of silence that are too long, where the clock is the test's."""

PAIR = PairName("web")


STRAYS = (
    b'{"event": "X", "timestamp": {"seconds": 0, "microseconds": 0}}\r\n'
    b'{"return": {"status": "a predecessor\'s"}, "id": "old.1"}\r\n'
    b'{"id": "old.2", "error": {"class": "GenericError", "desc": "a predecessor\'s"}}\r\n'
)
"""What may come at any time: QEMU sends events when it likes, and answers the client before us on our connection, even
before it greets us."""


class FakeQmp:
    """A QMP server of few words, one client after the other, in a thread."""

    def __init__(self, path: Path, status: str, *, drop_on_cont: int = 0, refuse_cont: bool = False) -> None:
        self.path = path
        self.status = status
        self.commands: list[str] = []
        self.connections = 0
        self._drops = drop_on_cont
        self._refuse = refuse_cont
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(LIMIT)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with client, client.makefile("rb") as lines, suppress(ConnectionError):  # it may have given up waiting
                client.sendall(STRAYS + b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}\r\n')
                for line in lines:
                    command = json.loads(line)
                    reply = self._answer(command["execute"])
                    if reply is None:
                        break
                    client.sendall(STRAYS + json.dumps(reply | {"id": command["id"]}).encode() + b"\r\n")

    def _answer(self, name: str) -> dict[str, Any] | None:
        self.commands.append(name)
        if name == "query-status":
            return {"return": {"status": self.status, "running": self.status == "running"}}
        if name == "cont":
            if self._drops:
                self._drops -= 1
                return None
            if self._refuse:
                return {"error": {"class": "GenericError", "desc": "not now"}}
            self.status = "running"
        return {"return": {}}


@contextmanager
def fake_qmp(tmp_path: Path, status: str, **options: int) -> Iterator[FakeQmp]:
    server = FakeQmp(tmp_path / "qmp", status, **options)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()


@contextmanager
def guarding(
    qmp: Path, controller: int, *, patience: float = 1000.0, command: Iterable[str | Path] = ()
) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A guardian over some other process.

    :param command: what it becomes after a death without farewell.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pidfd = os.pidfd_open(controller)
    arguments = ["--qmp", str(qmp), "--control-fd", str(theirs.fileno()), "--controller-fd", str(pidfd)]
    arguments += ["--patience", str(patience), "--resume-limit", "5", "--", *map(str, command)]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guardian.__file__, *arguments],
        pass_fds=(theirs.fileno(), pidfd),
        stderr=subprocess.DEVNULL,
    )
    theirs.close()
    os.close(pidfd)
    ours.settimeout(LIMIT)
    try:
        assert ours.recv(100) == guardian.READY
        yield ours, process
    finally:
        ours.close()
        process.kill()
        process.wait()


def arm(control: socket.socket, seconds: float) -> None:
    control.send(arm_message(seconds))
    assert control.recv(100) == guardian.ARMED


def kill_and_see_it_dead(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(LIMIT * 1000)
    finally:
        os.close(pidfd)
