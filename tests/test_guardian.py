"""The guardian against a fake QMP server: what it resumes, what it must never touch, and that it is really there.

The guardian is a real process here, and so is the controller that it kills (a ``sleep``); only QEMU is played. Nothing
waits for a time to pass except where a deadline is what is tested, and those are a tenth of a second.
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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qemu_remus.core.errors import QemuError
from qemu_remus.qemu import guardian, guardian_client
from qemu_remus.qemu.guardian import ResumeFailed, Verdict, Watch, arm_message, resume
from qemu_remus.qemu.guardian_client import start_guardian

LIMIT = 10.0
"""Seconds after which a test gives up on a process; never waited for where all is well."""


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
            with client, client.makefile("rb") as lines:
                client.sendall(b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": []}}\r\n')
                for line in lines:
                    reply = self._answer(json.loads(line)["execute"])
                    if reply is None:
                        break
                    # Real QEMUs send events whenever they like.
                    client.sendall(b'{"event": "X", "timestamp": {"seconds": 0, "microseconds": 0}}\r\n' + reply)

    def _answer(self, name: str) -> bytes | None:
        self.commands.append(name)
        if name == "query-status":
            return json.dumps({"return": {"status": self.status, "running": self.status == "running"}}).encode() + b"\n"
        if name == "cont":
            if self._drops:
                self._drops -= 1
                return None
            if self._refuse:
                return b'{"error": {"class": "GenericError", "desc": "not now"}}\n'
            self.status = "running"
        return b'{"return": {}}\n'


@contextmanager
def fake_qmp(tmp_path: Path, status: str, **options: int) -> Iterator[FakeQmp]:
    server = FakeQmp(tmp_path / "qmp", status, **options)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()


@contextmanager
def guarding(qmp: Path, controller: int) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A guardian over some other process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pidfd = os.pidfd_open(controller)
    arguments = ["--qmp", str(qmp), "--control-fd", str(theirs.fileno()), "--controller-fd", str(pidfd)]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guardian.__file__, *arguments, "--resume-limit", "5"],
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


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that can be killed."""
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def arm(control: socket.socket, seconds: float) -> None:
    control.send(arm_message(seconds))
    assert control.recv(100) == guardian.ARMED


@pytest.mark.parametrize(
    ("deadline", "gone", "verdict"),
    [
        (None, False, Verdict.WAIT),
        (None, True, Verdict.EXIT),
        (11.0, False, Verdict.WAIT),
        (10.0, False, Verdict.KILL_AND_RESUME),
        (11.0, True, Verdict.RESUME),
        (9.0, True, Verdict.RESUME),
    ],
)
def test_only_an_armed_guardian_acts(deadline: float | None, gone: bool, verdict: Verdict) -> None:
    assert Watch(deadline).verdict(gone=gone, now=10.0) is verdict


def test_arming_again_moves_the_deadline_and_disarming_takes_it_away() -> None:
    watch = Watch()
    assert watch.receive(arm_message(2.5), now=100.0) == guardian.ARMED
    assert watch.deadline == pytest.approx(102.5)
    watch.receive(arm_message(10), now=102.0)
    assert watch.time_left(now=102.0) == pytest.approx(10)
    assert watch.receive(guardian.DISARM, now=103.0) is None
    assert watch.time_left(now=103.0) is None


@pytest.mark.parametrize("message", [b"", b"arm", b"arm x", b"hello 1"])
def test_a_message_of_nobody_changes_nothing(message: bytes) -> None:
    watch = Watch(5.0)
    with pytest.raises(ValueError, match=r"not a message|to float"):
        watch.receive(message, now=1.0)
    assert watch.deadline == 5.0


def test_resume_continues_a_paused_vm(tmp_path: Path) -> None:
    with fake_qmp(tmp_path, "paused") as qmp:
        assert resume(str(qmp.path), LIMIT) == "paused"
        assert qmp.status == "running"


@pytest.mark.parametrize("status", ["running", "io-error", "guest-panicked", "postmigrate", "prelaunch", "shutdown"])
def test_resume_leaves_every_other_stop_alone(tmp_path: Path, status: str) -> None:
    with fake_qmp(tmp_path, status) as qmp:
        assert resume(str(qmp.path), LIMIT) == status
        assert "cont" not in qmp.commands


def test_a_cont_whose_reply_is_lost_is_followed_by_another_look(tmp_path: Path) -> None:
    with fake_qmp(tmp_path, "paused", drop_on_cont=2) as qmp:
        assert resume(str(qmp.path), LIMIT) == "paused"
        assert qmp.connections == 3
        assert qmp.status == "running"


def test_a_refused_cont_is_reported_at_the_limit(tmp_path: Path) -> None:
    with fake_qmp(tmp_path, "paused", refuse_cont=True) as qmp, pytest.raises(ResumeFailed, match="not now"):
        resume(str(qmp.path), 0.1)


def test_a_qemu_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ResumeFailed, match="has ended"):
        resume(str(tmp_path / "nothing"), LIMIT)


def test_a_controller_that_dies_in_its_pause_gets_the_vm_resumed(
    tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    with fake_qmp(tmp_path, "paused") as qmp, guarding(qmp.path, bystander.pid) as (control, process):
        arm(control, LIMIT)
        control.close()
        assert process.wait(LIMIT) == 0
        assert qmp.status == "running"


def test_a_controller_that_dies_outside_a_pause_leaves_the_vm_as_it_is(
    tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    """The VM is paused, by its operator: that is none of the guardian's business."""
    with fake_qmp(tmp_path, "paused") as qmp, guarding(qmp.path, bystander.pid) as (control, process):
        arm(control, LIMIT)
        control.send(guardian.DISARM)
        control.close()
        assert process.wait(LIMIT) == 0
        assert qmp.connections == 0


def test_the_end_of_the_process_counts_even_where_its_socket_lives_on(
    tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    with fake_qmp(tmp_path, "paused") as qmp, guarding(qmp.path, bystander.pid) as (control, process):
        arm(control, LIMIT)
        bystander.kill()
        assert process.wait(LIMIT) == 0
        assert qmp.status == "running"


def test_what_a_controller_said_before_it_died_still_counts(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    """The disarm is in the socket and unread when the process dies."""
    with fake_qmp(tmp_path, "paused") as qmp, guarding(qmp.path, bystander.pid) as (control, process):
        arm(control, LIMIT)
        os.kill(process.pid, signal.SIGSTOP)
        control.send(guardian.DISARM)
        bystander.kill()
        bystander.wait()
        os.kill(process.pid, signal.SIGCONT)
        control.close()
        assert process.wait(LIMIT) == 0
        assert qmp.connections == 0


def test_a_controller_that_hangs_in_its_pause_is_killed_at_the_deadline(
    tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    with fake_qmp(tmp_path, "paused") as qmp, guarding(qmp.path, bystander.pid) as (control, process):
        os.kill(bystander.pid, signal.SIGSTOP)
        arm(control, 0.1)
        assert process.wait(LIMIT) == 0
        assert bystander.wait(LIMIT) == -signal.SIGKILL
        assert qmp.status == "running"


def test_ctrl_c_and_sigterm_do_not_end_the_guard(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    with fake_qmp(tmp_path, "paused") as qmp, guarding(qmp.path, bystander.pid) as (control, process):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
        arm(control, LIMIT)
        control.close()
        assert process.wait(LIMIT) == 0
        assert qmp.status == "running"


def test_a_vm_that_cannot_be_resumed_shows_in_the_exit_code(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    with guarding(tmp_path / "nothing", bystander.pid) as (control, process):
        arm(control, LIMIT)
        control.close()
        assert process.wait(LIMIT) == 1


async def test_it_is_armed_before_arm_returns_and_gone_after_the_block(tmp_path: Path) -> None:
    with fake_qmp(tmp_path, "running") as qmp:
        async with start_guardian(qmp.path) as guard:
            pid = guard.pid
            assert pid is not None
            assert os.getsid(pid) == pid
            await guard.arm()
            guard.disarm()
            await guard.arm(5.0)
            guard.disarm()
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert qmp.connections == 0


async def test_a_killed_guardian_is_replaced_before_the_next_pause(tmp_path: Path) -> None:
    async with start_guardian(tmp_path / "qmp") as guard:
        first = guard.pid
        assert first is not None
        kill_and_see_it_dead(first)
        guard.disarm()
        await guard.arm()
        assert guard.pid not in (None, first)
        assert guard.restarts == 1


async def test_a_guardian_that_does_not_answer_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_guardian(tmp_path / "qmp") as guard:
        first = guard.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        # Short for the one that hangs; the one that takes its place answers within it as well.
        monkeypatch.setattr(guardian_client, "_ANSWER_LIMIT", 0.3)
        await guard.arm()
        assert guard.pid != first
        assert guard.restarts == 1


async def test_no_guardian_no_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_guardian(tmp_path / "qmp") as guard:
        assert guard.pid is not None
        kill_and_see_it_dead(guard.pid)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
        with pytest.raises(QemuError, match="cannot be started"):
            await guard.arm()


async def test_a_controller_that_lost_qmp_in_its_pause_can_have_the_vm_resumed(tmp_path: Path) -> None:
    with fake_qmp(tmp_path, "paused") as qmp:
        async with start_guardian(qmp.path) as guard:
            await guard.arm()
            await guard.resume_now(LIMIT)
            assert qmp.status == "running"
            guard.disarm()
            await guard.arm()
            guard.disarm()
            assert guard.restarts == 0


async def test_a_failed_resume_is_told_to_the_controller(tmp_path: Path) -> None:
    async with start_guardian(tmp_path / "nothing") as guard:
        await guard.arm()
        with pytest.raises(QemuError, match="has ended"):
            await guard.resume_now(LIMIT)
        guard.disarm()


def kill_and_see_it_dead(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(LIMIT * 1000)
    finally:
        os.close(pidfd)
