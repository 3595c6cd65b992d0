"""Holding QEMU's end: only where QEMU would end by itself, and always undone."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from qemu_remus.core.model import PairName
from qemu_remus.qemu import shutdown
from qemu_remus.qemu.client import QmpClient, open_qmp
from qemu_remus.qemu.nodes import fleece_node
from qemu_remus.qemu.shutdown import Ending, ends_with_its_guest, hold_end, is_attached, let_end, may_be_held, was_held
from tests.fake_qemu import FakeQemu, Node

PAIR = PairName("web")


@pytest.mark.parametrize(
    ("line", "ends"),
    [
        ("-m 256 -display none", True),
        ("-m 256 -no-reboot", True),
        ("-action reboot=shutdown,panic=pause", True),
        ("-action shutdown=poweroff", True),
        ("-no-shutdown", False),
        ("--no-shutdown -m 256", False),
        ("-action shutdown=pause", False),
        ("--action reboot=reset,shutdown=pause", False),
        ("-readconfig vm.cfg", False),
        ("-set action.shutdown=pause", False),
        ("-set device.net0.mac=52:54:00:12:34:56", True),
    ],
)
def test_only_a_qemu_that_ends_with_its_guest_is_held(line: str, *, ends: bool) -> None:
    assert ends_with_its_guest(shutdown._normal(line.split())) is ends


async def test_a_qemu_whose_socket_somebody_else_made_is_not_held(tmp_path: Path) -> None:
    with FakeQemu() as qemu:
        async with qemu.connect() as client:
            # its vCPUs' threads are ours, its listener is nobody's
            assert not await may_be_held(client)
        async with trio.open_nursery() as nursery:
            await nursery.start(qemu.listen, tmp_path / "qmp")
            async with open_qmp(tmp_path / "qmp") as client:
                assert client.peer.pid == os.getpid()
                assert await may_be_held(client)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(monkeypatch: pytest.MonkeyPatch, *, ours: bool = True) -> AsyncIterator[tuple[FakeQemu, QmpClient]]:
    async def may(_: QmpClient) -> bool:
        await trio.lowlevel.checkpoint()
        return ours

    monkeypatch.setattr(shutdown, "may_be_held", may)
    with FakeQemu() as qemu:
        async with qemu.connect() as client:
            yield qemu, client


async def test_it_is_held_in_the_block_and_ends_with_its_guest_again_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (qemu, client):
        async with hold_end(client, wanted=True, left=False) as ending:
            assert ending is not None
            assert qemu.shutdown_action == "pause"
        assert (qemu.shutdown_action, qemu.ended) == ("poweroff", False)


async def test_an_error_in_the_block_undoes_it_too_and_comes_out_as_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (qemu, client):
        with pytest.raises(KeyError):
            async with hold_end(client, wanted=True, left=False):
                raise KeyError
        assert qemu.shutdown_action == "poweroff"


@pytest.mark.parametrize(
    ("wanted", "ours", "status", "left"),
    [
        (False, True, "running", False),
        (True, False, "running", False),
        (True, True, "shutdown", False),
    ],
)
async def test_what_is_not_ours_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, *, wanted: bool, ours: bool, status: str, left: bool
) -> None:
    async with connected(monkeypatch, ours=ours) as (qemu, client):
        qemu.status = status
        async with hold_end(client, wanted=wanted, left=left) as ending:
            assert ending is None
        assert "set-action" not in qemu.commands()
        assert not qemu.ended


async def seen(ending: Ending | None) -> None:
    assert ending is not None
    with trio.fail_after(5):
        await ending.came.wait()


async def test_the_guests_end_is_seen_and_qemu_ends_after_the_block(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(monkeypatch) as (qemu, client):
        async with hold_end(client, wanted=True, left=False) as ending:
            qemu.status = "shutdown"
            await qemu.emit_now("SHUTDOWN", guest=True, reason="guest-shutdown")
            await seen(ending)
            assert not qemu.ended
        assert qemu.ended


async def test_a_guest_that_ended_before_a_restart_is_seen_at_once(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(monkeypatch) as (qemu, client):
        qemu.status = "shutdown"
        async with hold_end(client, wanted=True, left=True) as ending:
            await seen(ending)
        assert qemu.ended


async def test_a_qemu_that_was_told_to_end_by_somebody_else_is_no_guests_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (qemu, client), hold_end(client, wanted=True, left=False) as ending:
        assert ending is not None
        await qemu.emit_now("SHUTDOWN", guest=False, reason="host-qmp-quit")
        await trio.testing.wait_all_tasks_blocked()
        assert not ending.came.is_set()


async def test_a_fleece_is_the_mark_of_a_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (qemu, client):
        assert not await is_attached(client, PAIR)
        name = fleece_node(PAIR, "disk0")  # type: ignore[arg-type]
        qemu.nodes[name] = Node(name, "file", 1 << 20)
        assert await is_attached(client, PAIR)
        assert await is_attached(client, None)
        assert not await is_attached(client, PairName("other"))
        assert await was_held(client, PAIR)


async def test_a_guest_that_still_runs_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(monkeypatch) as (qemu, client):
        assert not await let_end(client)
        assert not qemu.ended
        qemu.status = "shutdown"
        assert await let_end(client)
        assert qemu.ended
