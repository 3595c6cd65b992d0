"""The guardian as a process: whom it kills, what it resumes, what it must never touch, and after whom it cleans up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from qemu_remus.qemu import guardian
from qemu_remus.qemu.guardian import ResumeFailed, resume
from tests.guardian.rig import LIMIT, arm, fake_qmp, guarding


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
