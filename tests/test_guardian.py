"""The guardian against a fake QMP server: whom it kills, what it resumes, what it must never touch, and that it is
there.

The guardian is a real process here, and so is the controller that it kills (a ``sleep``); only QEMU is played. Nothing
waits for a time to pass except where a deadline is what is tested, and those are some tenths of a second. Who is killed
for silence, and who must not be, is played over a clock of the test's own.
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

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core.errors import QemuError
from qemu_remus.core.model import PairName
from qemu_remus.qemu import guardian, guardian_client
from qemu_remus.qemu.guardian import SIGNS, ResumeFailed, Verdict, Watch, arm_message, resume
from qemu_remus.qemu.guardian_client import Guardian, start_guardian

LIMIT = 60.0
"""Seconds after which a test gives up on a process; never waited for where all is well."""

PATIENCE = 8.0
"""Seconds of silence that are too long, where the clock is the test's."""

PAIR = PairName("web")


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
            with client, client.makefile("rb") as lines, suppress(BrokenPipeError):  # it may have given up waiting
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


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that can be killed."""
    with subprocess.Popen(["sleep", "100"]) as process:
        yield process
        process.kill()


def arm(control: socket.socket, seconds: float) -> None:
    control.send(arm_message(seconds))
    assert control.recv(100) == guardian.ARMED


def a_watch(*, deadline: float | None = None, heard: float = 0.0, parted: bool = False) -> Watch:
    return Watch(PATIENCE, heard=heard, due=heard, deadline=deadline, parted=parted)


@pytest.mark.parametrize(
    ("deadline", "parted", "gone", "verdict"),
    [
        (None, False, False, Verdict.WAIT),
        (None, False, True, Verdict.CLEAN_UP),
        (None, True, True, Verdict.EXIT),
        (5.0, False, False, Verdict.WAIT),
        (4.0, False, False, Verdict.KILL),
        (5.0, False, True, Verdict.RESUME),
        (3.0, False, True, Verdict.RESUME),
        (5.0, True, True, Verdict.RESUME),
    ],
)
def test_what_is_to_be_done(deadline: float | None, parted: bool, gone: bool, verdict: Verdict) -> None:
    assert a_watch(deadline=deadline, parted=parted).verdict(gone=gone, now=4.0) is verdict


def test_silence_beyond_the_patience_is_death_unless_it_was_announced() -> None:
    assert a_watch().verdict(gone=False, now=PATIENCE - 0.001) is Verdict.WAIT
    assert a_watch().verdict(gone=False, now=PATIENCE) is Verdict.KILL
    assert a_watch(parted=True).verdict(gone=False, now=10 * PATIENCE) is Verdict.WAIT


@pytest.mark.parametrize("message", [guardian.ALIVE, guardian.DISARM, arm_message(1000), guardian.FAREWELL])
def test_every_message_is_a_sign_of_life(message: bytes) -> None:
    watch = a_watch()
    watch.receive(message, now=7.0)
    assert watch.verdict(gone=False, now=7.0 + PATIENCE - 0.001) is Verdict.WAIT


def killed_at(signs: Iterable[float], *, still: tuple[float, float] = (0.0, 0.0), until: float = 200.0) -> float | None:
    """Play a guardian's life.

    :param signs: when the controller gives signs of life.
    :param still: from when to when the whole machine stands still, the guardian with it.
    :return: when it would kill the controller; None: not until ``until``.
    """
    watch = Watch.begin(PATIENCE, 0.0)
    coming = sorted(signs)
    now = 0.0
    while now < until:
        due = now + watch.sleep(now)
        now = min([due, *coming[:1]])
        if still[0] <= now < still[1]:
            now = still[1]
        watch.look(now)
        while coming and coming[0] <= now:
            coming.pop(0)
            watch.receive(guardian.ALIVE, now)
        if watch.verdict(gone=False, now=now) is Verdict.KILL:
            return now
    return None


@given(st.lists(st.floats(0.0, PATIENCE * 0.999), max_size=100))
def test_a_busy_controller_whose_signs_come_late_is_not_killed(gaps: list[float]) -> None:
    signs = [sum(gaps[: end + 1]) for end in range(len(gaps))]
    assert killed_at(signs, until=signs[-1] if signs else 0.0) is None


@given(st.floats(0.0, PATIENCE * 0.999))
def test_a_controller_that_falls_silent_is_killed_when_the_patience_is_over(last: float) -> None:
    killed = killed_at([last])
    assert killed is not None
    assert PATIENCE - 0.001 <= killed - last <= PATIENCE + PATIENCE / SIGNS


@given(st.floats(0.01, PATIENCE * 0.999), st.floats(PATIENCE / SIGNS * 2.001, 1e6), st.floats(0.0, PATIENCE * 0.999))
def test_a_machine_that_stood_still_is_no_silence_of_the_controllers(begin: float, length: float, late: float) -> None:
    """Nor is it where the controller had been silent for a while before, and takes its time afterwards."""
    end = begin + length
    assert killed_at([end + late], still=(begin, end), until=end + late) is None
    killed = killed_at([], still=(begin, end), until=end + 2 * PATIENCE)
    assert killed is not None
    assert PATIENCE - 0.001 <= killed - end <= PATIENCE + PATIENCE / SIGNS


def test_a_pause_in_which_the_machine_stood_still_may_last_longer_by_as_much() -> None:
    watch = Watch.begin(PATIENCE, 0.0)
    watch.receive(arm_message(2.0), 0.0)
    watch.due = 0.5
    watch.look(100.5)
    assert watch.verdict(gone=False, now=100.5) is Verdict.WAIT
    assert watch.deadline == pytest.approx(102.0)
    # a look that is a little late is no standstill
    watch.due = 101.0
    watch.look(101.5)
    assert watch.deadline == pytest.approx(102.0)


def test_arming_again_moves_the_deadline_and_disarming_takes_it_away() -> None:
    watch = Watch.begin(1000.0, 100.0)
    assert watch.receive(arm_message(2.5), now=100.0) == guardian.ARMED
    assert watch.deadline == pytest.approx(102.5)
    assert watch.sleep(now=102.0) == pytest.approx(0.5)
    watch.receive(arm_message(10), now=102.0)
    assert watch.sleep(now=102.0) == pytest.approx(10)
    assert watch.sleep(now=113.0) == 0
    assert watch.receive(guardian.DISARM, now=103.0) is None
    assert watch.deadline is None


@pytest.mark.parametrize("message", [b"", b"arm", b"arm x", b"hello 1"])
def test_a_message_of_nobody_changes_nothing(message: bytes) -> None:
    watch = a_watch(deadline=5.0)
    with pytest.raises(ValueError, match=r"not a message|to float"):
        watch.receive(message, now=1.0)
    assert watch == a_watch(deadline=5.0)


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


def test_a_controller_that_hangs_outside_of_a_pause_is_killed_and_cleaned_up_after(
    tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    """The VM is paused, by its operator, and stays so."""
    done = tmp_path / "done"
    with (
        fake_qmp(tmp_path, "paused") as qmp,
        guarding(qmp.path, bystander.pid, patience=0.3, command=["/usr/bin/touch", done]) as (_, process),
    ):
        os.kill(bystander.pid, signal.SIGSTOP)
        assert process.wait(LIMIT) == 0
        assert bystander.wait(LIMIT) == -signal.SIGKILL
        assert qmp.commands == ["qmp_capabilities"]
        assert done.exists()


def test_a_death_inside_a_pause_is_cleaned_up_after_once_the_vm_runs(
    tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    done = tmp_path / "done"
    with (
        fake_qmp(tmp_path, "paused") as qmp,
        guarding(qmp.path, bystander.pid, command=["/usr/bin/touch", done]) as (control, process),
    ):
        arm(control, LIMIT)
        bystander.kill()
        assert process.wait(LIMIT) == 0
        assert qmp.status == "running"
        assert done.exists()


def test_after_a_farewell_nothing_is_cleaned_up(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    done = tmp_path / "done"
    with (
        fake_qmp(tmp_path, "running") as qmp,
        guarding(qmp.path, bystander.pid, command=["/usr/bin/touch", done]) as (control, process),
    ):
        control.send(guardian.FAREWELL)
        bystander.kill()
        assert process.wait(LIMIT) == 0
        assert qmp.connections == 0
        assert not done.exists()


def test_where_qemu_has_ended_there_is_nothing_to_clean_up(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    done = tmp_path / "done"
    with guarding(tmp_path / "nothing", bystander.pid, command=["/usr/bin/touch", done]) as (_, process):
        bystander.kill()
        assert process.wait(LIMIT) == 0
        assert not done.exists()


def test_where_qemu_serves_somebody_else_the_clean_up_is_left_to_them(
    tmp_path: Path, bystander: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guardian, "_QUEUE_LIMIT", 0.1)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it cleaned up"))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pidfd = os.pidfd_open(bystander.pid)
    try:
        with fake_qmp(tmp_path, "running") as qmp, socket.socket(socket.AF_UNIX) as restarted, ours, theirs:
            restarted.connect(str(qmp.path))
            assert restarted.recv(100)
            bystander.kill()
            loop = guardian._Loop(theirs, pidfd, str(qmp.path), patience=LIMIT, limit=LIMIT, command=["/bin/true"])
            assert loop.run() == 0
            assert qmp.connections == 1
    finally:
        os.close(pidfd)


def test_a_clean_up_that_cannot_be_run_shows_in_the_exit_code(
    tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    with (
        fake_qmp(tmp_path, "running") as qmp,
        guarding(qmp.path, bystander.pid, command=[tmp_path / "no-python"]) as (_, process),
    ):
        bystander.kill()
        assert process.wait(LIMIT) == 1


async def test_it_is_armed_before_arm_returns_and_gone_after_the_block(tmp_path: Path) -> None:
    with fake_qmp(tmp_path, "running") as qmp:
        async with start_guardian(qmp.path, PAIR) as guard:
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
    async with start_guardian(tmp_path / "qmp", PAIR) as guard:
        first = guard.pid
        assert first is not None
        kill_and_see_it_dead(first)
        guard.disarm()
        await guard.arm()
        assert guard.pid not in (None, first)
        assert guard.restarts == 1


async def test_a_killed_guardian_is_replaced_though_no_pause_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a toolstack pauses the VM, nobody ever arms it."""
    monkeypatch.setattr(guardian, "SIGNS", 1000)  # here, not in its process: signs come fast
    async with start_guardian(tmp_path / "qmp", PAIR) as guard:
        first = guard.pid
        assert first is not None
        kill_and_see_it_dead(first)
        with trio.fail_after(LIMIT):
            while guard.pid in (None, first):
                await trio.testing.wait_all_tasks_blocked(0.01)
        await guard.arm()
        guard.disarm()
        assert guard.restarts == 1


async def test_signs_of_life_are_given_whatever_becomes_of_the_body(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while a cancelled controller cleans up, shielded, for longer than the patience; then comes the farewell."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def start(self: Guardian) -> None:
        self._socket = ours

    monkeypatch.setattr(Guardian, "start", start)
    with theirs:
        with trio.CancelScope() as body:
            async with start_guardian("", PAIR, patience=PATIENCE):
                body.cancel()
                with trio.CancelScope(shield=True):
                    await trio.sleep(3 * PATIENCE + 0.001)
                await trio.lowlevel.checkpoint()
        assert body.cancelled_caught
        messages = list(iter(lambda: theirs.recv(100), b""))
    assert messages == [guardian.ALIVE] * 3 * SIGNS + [guardian.FAREWELL]


async def test_a_guardian_that_does_not_answer_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_guardian(tmp_path / "qmp", PAIR) as guard:
        first = guard.pid
        assert first is not None
        os.kill(first, signal.SIGSTOP)
        replace = Guardian._replace

        async def replace_patiently(self: Guardian) -> None:
            monkeypatch.setattr(guardian_client, "_ANSWER_LIMIT", LIMIT)
            await replace(self)

        # Short for the one that hangs, and not for the one that takes its place.
        monkeypatch.setattr(guardian_client, "_ANSWER_LIMIT", 0.3)
        monkeypatch.setattr(Guardian, "_replace", replace_patiently)
        await guard.arm()
        assert guard.pid != first
        assert guard.restarts == 1


def test_a_controller_that_dies_after_it_has_made_its_pause_final_leaves_the_vm_paused(
    tmp_path: Path, bystander: subprocess.Popen[bytes]
) -> None:
    with fake_qmp(tmp_path, "paused") as qmp, guarding(qmp.path, bystander.pid) as (control, process):
        arm(control, LIMIT)
        control.send(guardian.STAY)
        assert control.recv(100) == guardian.STAYING
        control.close()
        assert process.wait(LIMIT) == 0
        assert qmp.status == "paused"


async def test_a_guardian_that_is_replaced_in_a_long_pause_knows_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # it is us whom it guards: no short patience, but signs that come fast
    monkeypatch.setattr(guardian, "SIGNS", 1000)
    with fake_qmp(tmp_path, "paused") as qmp:
        async with start_guardian(qmp.path, PAIR) as guard:
            await guard.arm(LIMIT)
            first = guard.pid
            assert first is not None
            kill_and_see_it_dead(first)
            with trio.fail_after(60):
                while guard.restarts == 0:  # noqa: ASYNC110 - it is found dead by itself
                    await trio.sleep(0.01)
                async with guard._turn:
                    pass
        # the body has ended inside its pause
        assert qmp.status == "running"


async def test_a_guardian_that_does_not_say_that_it_stands_down_is_ended_and_the_vm_stays_paused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_qmp(tmp_path, "paused") as qmp:
        async with start_guardian(qmp.path, PAIR) as guard:
            await guard.arm(LIMIT)
            first = guard.pid
            assert first is not None
            os.kill(first, signal.SIGSTOP)
            monkeypatch.setattr(guardian_client, "_ANSWER_LIMIT", 0.3)
            await guard.stand_down()
            assert guard.pid not in (None, first)
        assert qmp.status == "paused"
        assert qmp.connections == 0


async def test_no_guardian_no_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with start_guardian(tmp_path / "qmp", PAIR) as guard:
        assert guard.pid is not None
        kill_and_see_it_dead(guard.pid)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
        with pytest.raises(QemuError, match="cannot be started"):
            await guard.arm()


async def test_a_controller_that_lost_qmp_in_its_pause_can_have_the_vm_resumed(tmp_path: Path) -> None:
    with fake_qmp(tmp_path, "paused") as qmp:
        async with start_guardian(qmp.path, PAIR) as guard:
            await guard.arm()
            await guard.resume_now(LIMIT)
            assert qmp.status == "running"
            guard.disarm()
            await guard.arm()
            guard.disarm()
            assert guard.restarts == 0


async def test_a_failed_resume_is_told_to_the_controller(tmp_path: Path) -> None:
    async with start_guardian(tmp_path / "nothing", PAIR) as guard:
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
