"""The guardian from the controller's side: it is there before each pause, and whatever becomes of it is made good."""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

from qemu_remus.core.errors import QemuError
from qemu_remus.qemu import guardian, guardian_client
from qemu_remus.qemu.guardian import SIGNS
from qemu_remus.qemu.guardian_client import Guardian, start_guardian
from tests.guardian.rig import LIMIT, PAIR, PATIENCE, fake_qmp, kill_and_see_it_dead


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
