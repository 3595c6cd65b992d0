"""The toolstack's client against a real control server over Unix sockets, its handlers played by the test.

Nothing here sleeps: time-outs are the mock clock's.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from qemu_remus import control, toolstack
from qemu_remus.control_client import ControlClient
from qemu_remus.core.commands import (
    AbortArguments,
    CommitArguments,
    EpochDone,
    EpochWasLost,
    EventName,
    FailoverArguments,
    FailoverResult,
    FinishArguments,
    MemoryReceived,
    MemoryReceivedArguments,
    PrepareArguments,
    StartArguments,
)
from qemu_remus.core.errors import (
    CommandNotFound,
    CommitInDoubt,
    ControlError,
    ControlUnreachable,
    EpochLost,
    NotConsistent,
    NotProtected,
    OutOfOrder,
    QemuRemusError,
    Refused,
    SnapshotBroken,
    TimedOut,
)
from qemu_remus.core.model import EpochNumber, PairName
from qemu_remus.toolstack import MARGIN, Checkpoint, Toolstack, open_backup, open_toolstack
from tests.fake_controller import REPORT, SEVEN, Controller, Waiting


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return Controller(tmp_path / "control.sock")


@asynccontextmanager
async def connected(controller: Controller) -> AsyncIterator[Toolstack]:
    async with controller.serving(), open_toolstack(controller.path) as disks:
        yield disks


async def cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()


# --- the commands


async def test_a_checkpoint_from_prepare_to_commit(controller: Controller) -> None:
    async with connected(controller) as disks:
        await disks.prepare(timeout=3)
        async with disks.checkpoint(pause=True, timeout=4) as checkpoint:
            assert (checkpoint.epoch, checkpoint.dirty_bytes, checkpoint.pause_ms) == (7, 8192, 2.5)
            await checkpoint.finish(timeout=5)
            await checkpoint.commit(timeout=6)
            assert checkpoint.committed
    assert controller.asked == ["prepare-epoch", "start-new-epoch", "finish-disk-sync", "commit-epoch"]
    assert controller.arguments == {
        "prepare-epoch": PrepareArguments(3),
        "start-new-epoch": StartArguments(pause=True, timeout=4),
        "finish-disk-sync": FinishArguments(SEVEN, 5),
        "commit-epoch": CommitArguments(SEVEN, 6),
    }


async def test_a_restarted_toolstack_goes_on_by_number(controller: Controller) -> None:
    async with connected(controller) as disks:
        assert await disks.status() == REPORT
        await disks.finish(7, timeout=1)
        await disks.commit(7, timeout=2)
        await disks.abort(7, timeout=3)
    assert controller.arguments["finish-disk-sync"] == FinishArguments(SEVEN, 1)
    assert controller.arguments["commit-epoch"] == CommitArguments(SEVEN, 2)
    assert controller.arguments["abort-epoch"] == AbortArguments(SEVEN, 3)


@pytest.mark.parametrize("committed", [True, False])
async def test_the_backups_side(controller: Controller, committed: bool) -> None:
    controller.answers["memory-received"] = MemoryReceived(SEVEN, committed)
    async with controller.serving(), open_backup(controller.path) as backup:
        assert await backup.memory_received(7) is committed
        assert await backup.failover([8, 7], force=True) == FailoverResult(SEVEN)
        assert await backup.status() == REPORT
    assert controller.arguments["memory-received"] == MemoryReceivedArguments(SEVEN)
    assert controller.arguments["failover"] == FailoverArguments((EpochNumber(8), SEVEN), force=True)


@pytest.mark.parametrize(
    "error",
    [NotProtected("x"), NotConsistent("x"), OutOfOrder("x"), Refused("x"), TimedOut("x"), EpochLost("x")],
    ids=lambda error: type(error).__name__,
)
async def test_a_refused_start_is_an_error_of_its_class_and_leaves_nothing_to_abort(
    controller: Controller, error: QemuRemusError
) -> None:
    controller.instead["start-new-epoch"] = [error]
    async with connected(controller) as disks:
        with pytest.raises(type(error)):
            async with disks.checkpoint():
                pytest.fail("the block was entered")
    assert controller.asked == ["start-new-epoch"]


async def test_every_cause_of_a_lost_epoch_is_an_epoch_lost(controller: Controller) -> None:
    controller.instead["finish-disk-sync"] = [SnapshotBroken("the fleece is full", hint="make it larger")]
    async with connected(controller) as disks:
        with pytest.raises(EpochLost, match=r"the fleece is full\. Make it larger"):
            async with disks.checkpoint() as checkpoint:
                await checkpoint.finish()


async def test_nobody_there_is_said_when_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ControlUnreachable, match="there is no control socket") as caught:
        async with open_toolstack(tmp_path / "nobody"):
            pass
    assert not caught.value.in_doubt


# --- leaving the block


async def test_leaving_without_a_commit_aborts(controller: Controller) -> None:
    async with connected(controller) as disks, disks.checkpoint() as checkpoint:
        await checkpoint.finish()
    assert controller.asked[-1] == "abort-epoch"
    assert controller.arguments["abort-epoch"].epoch == 7


async def test_an_error_in_the_block_aborts_and_is_passed_on(controller: Controller) -> None:
    async with connected(controller) as disks:
        with pytest.raises(ZeroDivisionError):
            async with disks.checkpoint():
                raise ZeroDivisionError
    assert controller.asked == ["start-new-epoch", "abort-epoch"]


async def test_what_is_committed_is_not_aborted_by_a_later_error(controller: Controller) -> None:
    async with connected(controller) as disks:
        with pytest.raises(ZeroDivisionError):
            async with disks.checkpoint() as checkpoint:
                await commit_and_fail(checkpoint)
    assert controller.asked == ["start-new-epoch", "commit-epoch"]


async def commit_and_fail(checkpoint: Checkpoint) -> None:
    await checkpoint.commit()
    raise ZeroDivisionError


async def test_what_was_aborted_by_hand_is_not_aborted_again(controller: Controller) -> None:
    async with connected(controller) as disks, disks.checkpoint() as checkpoint:
        await checkpoint.abort()
    assert controller.asked == ["start-new-epoch", "abort-epoch"]


async def test_an_abort_by_hand_that_failed_is_tried_again(controller: Controller) -> None:
    controller.instead["abort-epoch"] = [TimedOut("busy")]
    async with connected(controller) as disks:
        with pytest.raises(TimedOut):
            async with disks.checkpoint() as checkpoint:
                await checkpoint.abort()
    assert controller.asked == ["start-new-epoch", "abort-epoch", "abort-epoch"]


async def test_an_abort_that_fails_is_raised_where_nothing_else_is(controller: Controller) -> None:
    controller.instead["abort-epoch"] = [Refused("not now")]
    async with connected(controller) as disks:
        with pytest.raises(Refused, match="not now"):
            async with disks.checkpoint():
                pass


async def test_an_abort_that_fails_does_not_hide_the_blocks_own_error(controller: Controller) -> None:
    controller.instead["abort-epoch"] = [Refused("not now")]
    async with connected(controller) as disks:
        with pytest.raises(ZeroDivisionError) as caught:
            async with disks.checkpoint():
                raise ZeroDivisionError
    assert caught.value.__notes__ == ["and epoch 7 could not be aborted: not now"]


async def test_an_abort_that_is_not_answered_ends_in_time(
    controller: Controller, autojump_clock: trio.testing.MockClock
) -> None:
    controller.instead["abort-epoch"] = [trio.sleep_forever]
    async with connected(controller) as disks:
        with trio.CancelScope() as scope:
            async with disks.checkpoint():
                scope.cancel()
                before = trio.current_time()
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert 0 < trio.current_time() - before <= 15


# --- in doubt


@pytest.mark.parametrize(
    "error",
    [CommitInDoubt("x"), TimedOut("x"), ControlError("x"), NotConsistent("x")],
    ids=lambda error: type(error).__name__,
)
async def test_a_commit_that_may_have_been_done_is_not_aborted(controller: Controller, error: QemuRemusError) -> None:
    controller.instead["commit-epoch"] = [error]
    async with connected(controller) as disks:
        with pytest.raises(type(error)):
            async with disks.checkpoint() as checkpoint:
                await checkpoint.commit()
        assert checkpoint.in_doubt
    assert controller.asked == ["start-new-epoch", "commit-epoch"]


@pytest.mark.parametrize(
    "error",
    [OutOfOrder("x"), Refused("x"), NotProtected("x"), EpochLost("x"), CommandNotFound("x")],
    ids=lambda error: type(error).__name__,
)
async def test_a_commit_that_was_not_begun_is_aborted(controller: Controller, error: QemuRemusError) -> None:
    controller.instead["commit-epoch"] = [error]
    async with connected(controller) as disks:
        with pytest.raises(type(error)):
            async with disks.checkpoint() as checkpoint:
                await checkpoint.commit()
        assert not checkpoint.in_doubt
    assert controller.asked == ["start-new-epoch", "commit-epoch", "abort-epoch"]


async def test_a_controller_that_ends_in_the_middle_of_a_commit_leaves_it_in_doubt(controller: Controller) -> None:
    async def end() -> None:
        nursery.cancel_scope.cancel()
        await trio.sleep_forever()

    controller.instead["commit-epoch"] = [end]
    async with controller.serving() as nursery, open_toolstack(controller.path) as disks:
        # The controller's end must not be the client's.
        with trio.CancelScope(shield=True), pytest.raises(ControlUnreachable) as caught:
            async with disks.checkpoint() as checkpoint:
                await checkpoint.commit()
    assert caught.value.in_doubt
    assert checkpoint.in_doubt
    assert not hasattr(caught.value, "__notes__")
    assert controller.asked == ["start-new-epoch", "commit-epoch"]


async def test_a_commit_that_could_not_be_sent_is_not_in_doubt(controller: Controller) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(controller.server.serve)
        async with open_toolstack(controller.path) as disks:
            checkpoint = await disks.start()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_until_gone(controller.path)
                with pytest.raises(ControlUnreachable) as caught:
                    await checkpoint.commit()
    assert not caught.value.in_doubt
    assert not checkpoint.in_doubt
    assert controller.asked == ["start-new-epoch"]


async def test_a_commit_into_a_connection_that_has_just_ended_is_not_in_doubt(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def alive_a_moment_ago(_: object) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    monkeypatch.setattr(ControlClient, "is_alive", alive_a_moment_ago)
    async with trio.open_nursery() as nursery:
        await nursery.start(controller.server.serve)
        async with open_toolstack(controller.path) as disks:
            checkpoint = await disks.start()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_until_gone(controller.path)
                with pytest.raises(ControlUnreachable) as caught:
                    await checkpoint.commit()
    assert not caught.value.in_doubt
    assert not checkpoint.in_doubt


async def wait_until_gone(path: Path) -> None:
    with trio.fail_after(20):
        while await trio.Path(path).exists():
            await trio.testing.wait_all_tasks_blocked()


async def test_a_commit_in_doubt_is_settled_by_asking_again(controller: Controller) -> None:
    controller.instead["commit-epoch"] = [CommitInDoubt("link lost"), OutOfOrder("not now")]
    async with connected(controller) as disks:
        with pytest.raises(CommitInDoubt):
            async with disks.checkpoint() as checkpoint:
                await checkpoint.commit()
        with pytest.raises(OutOfOrder):
            await checkpoint.commit()
        assert checkpoint.in_doubt, "an answer about the second attempt says nothing about the first"
        await checkpoint.commit()
        assert checkpoint.committed


async def test_a_commit_in_doubt_that_turns_out_to_be_lost_is_one_no_more(controller: Controller) -> None:
    controller.instead["commit-epoch"] = [CommitInDoubt("link lost"), EpochLost("the secondary has not got it")]
    async with connected(controller) as disks:
        with pytest.raises(EpochLost):
            async with disks.checkpoint() as checkpoint:
                await commit_until_answered(checkpoint)
        assert not checkpoint.in_doubt
        assert not checkpoint.committed


async def commit_until_answered(checkpoint: Checkpoint) -> None:
    while True:
        try:
            return await checkpoint.commit()
        except CommitInDoubt:
            assert checkpoint.in_doubt


# --- cancellation


async def test_cancelled_while_the_epoch_starts_it_is_aborted_once_its_number_is_known(
    controller: Controller, nursery: trio.Nursery
) -> None:
    starting = Waiting()
    controller.instead["start-new-epoch"] = [starting]
    async with connected(controller) as disks:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_when, starting.begun, scope)
            nursery.start_soon(answer_once_all_waits, starting)
            async with disks.checkpoint():
                pytest.fail("the block was entered")
    assert scope.cancelled_caught
    assert controller.asked == ["start-new-epoch", "abort-epoch"]


async def answer_once_all_waits(waiting: Waiting) -> None:
    await waiting.begun.wait()
    await trio.testing.wait_all_tasks_blocked()
    waiting.go_on.set()


async def test_a_start_by_hand_gives_the_number_although_cancelled(
    controller: Controller, nursery: trio.Nursery
) -> None:
    starting = Waiting()
    controller.instead["start-new-epoch"] = [starting]
    async with connected(controller) as disks:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_when, starting.begun, scope)
            nursery.start_soon(answer_once_all_waits, starting)
            checkpoint = await disks.start()
        assert scope.cancel_called
        assert checkpoint.epoch == 7


async def test_cancelled_before_it_starts_no_epoch_is_begun(controller: Controller) -> None:
    async with connected(controller) as disks:
        with trio.CancelScope() as scope:
            scope.cancel()
            await disks.start()
        assert scope.cancelled_caught
    assert controller.asked == []


async def test_cancelled_in_the_block_it_is_aborted(controller: Controller) -> None:
    async with connected(controller) as disks:
        with trio.CancelScope() as scope:
            async with disks.checkpoint():
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
    assert controller.asked == ["start-new-epoch", "abort-epoch"]


async def test_cancelled_while_it_waits_for_the_disks_it_is_aborted_without_waiting_for_them(
    controller: Controller, nursery: trio.Nursery
) -> None:
    finishing = Waiting()
    controller.instead["finish-disk-sync"] = [finishing]
    async with connected(controller) as disks:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_when, finishing.begun, scope)
            async with disks.checkpoint() as checkpoint:
                await checkpoint.finish()
        assert scope.cancelled_caught
        # The answer that was not waited for is nobody else's.
        assert await disks.status() == REPORT
        assert not finishing.go_on.is_set()
    assert controller.asked == ["start-new-epoch", "finish-disk-sync", "abort-epoch", "query-replication"]


async def test_cancelled_while_it_commits_nothing_is_aborted(controller: Controller, nursery: trio.Nursery) -> None:
    committing = Waiting()
    controller.instead["commit-epoch"] = [committing]
    async with connected(controller) as disks:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_when, committing.begun, scope)
            async with disks.checkpoint() as checkpoint:
                await checkpoint.commit()
        assert scope.cancelled_caught
        assert checkpoint.in_doubt
        await checkpoint.commit()
        assert checkpoint.committed
    assert controller.asked == ["start-new-epoch", "commit-epoch", "commit-epoch"]


async def test_cancelled_before_the_commit_is_sent_it_is_aborted(controller: Controller) -> None:
    async with connected(controller) as disks:
        with trio.CancelScope() as scope:
            async with disks.checkpoint() as checkpoint:
                scope.cancel()
                await checkpoint.commit()
        assert scope.cancelled_caught
        assert not checkpoint.in_doubt
    assert controller.asked == ["start-new-epoch", "abort-epoch"]


async def test_cancelled_while_it_aborts_by_hand_it_is_aborted_again(
    controller: Controller, nursery: trio.Nursery
) -> None:
    aborting = Waiting()
    controller.instead["abort-epoch"] = [aborting]
    async with connected(controller) as disks:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_when, aborting.begun, scope)
            async with disks.checkpoint() as checkpoint:
                await checkpoint.abort()
        assert scope.cancelled_caught
    assert controller.asked == ["start-new-epoch", "abort-epoch", "abort-epoch"]


async def test_cancelled_while_it_prepares_the_next_command_gets_its_own_answer(
    controller: Controller, nursery: trio.Nursery
) -> None:
    preparing = Waiting()
    controller.instead["prepare-epoch"] = [preparing]
    async with connected(controller) as disks:
        with trio.CancelScope() as scope:
            nursery.start_soon(cancel_when, preparing.begun, scope)
            await disks.prepare()
        assert scope.cancelled_caught
        assert (await disks.start()).epoch == 7


# --- connections and time


async def test_a_status_is_answered_while_a_commit_waits(controller: Controller, nursery: trio.Nursery) -> None:
    committing = Waiting()
    controller.instead["commit-epoch"] = [committing]
    async with connected(controller) as disks:
        checkpoint = await disks.start()
        async with trio.open_nursery() as both:
            both.start_soon(checkpoint.commit)
            await committing.begun.wait()
            assert await disks.status() == REPORT
            committing.go_on.set()
        assert checkpoint.committed
        with trio.fail_after(20):
            while len(controller.server._clients) > 1:
                await trio.testing.wait_all_tasks_blocked()


async def test_a_restarted_controller_is_connected_to_again(controller: Controller) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(controller.server.serve)
        async with open_toolstack(controller.path) as disks:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await wait_until_gone(controller.path)
                async with controller.serving():
                    await disks.prepare()
    assert controller.asked == ["prepare-epoch"]


async def test_a_connection_dropped_for_its_unread_events_is_replaced(
    controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "QUEUE_LIMIT", 4)
    flood = EpochWasLost(PairName("vm"), SEVEN, "x" * 100_000)
    async with connected(controller) as disks:
        for _ in range(8):
            controller.server.emit(EventName.EPOCH_LOST, flood)
        with trio.fail_after(20):
            while controller.server._clients:
                await trio.testing.wait_all_tasks_blocked()
        await disks.prepare()


async def test_events_between_commands_do_not_pile_up(controller: Controller) -> None:
    lost = EpochWasLost(PairName("vm"), SEVEN, "x" * 50_000)
    async with connected(controller) as disks:
        [client] = controller.server._clients
        for _ in range(50):
            controller.server.emit(EventName.EPOCH_LOST, lost)
            await disks.prepare()
        assert controller.server._clients == {client}


async def test_the_controllers_time_out_comes_before_the_clients(
    controller: Controller, autojump_clock: trio.testing.MockClock
) -> None:
    async def too_slow() -> None:
        await trio.sleep(30 + MARGIN / 2)
        raise TimedOut("the epoch is not staged after 30 s", hint="ask again")

    controller.instead["finish-disk-sync"] = [too_slow, trio.sleep_forever]
    async with connected(controller) as disks:
        with pytest.raises(TimedOut, match="Ask again"):
            await disks.finish(7, timeout=30)
        before = trio.current_time()
        with pytest.raises(ControlUnreachable, match="no answer to finish-disk-sync within 35 s") as caught:
            await disks.finish(7, timeout=30)
        assert caught.value.in_doubt
        assert trio.current_time() - before == pytest.approx(30 + MARGIN, abs=1)


async def test_a_controller_of_another_kind_of_answers_is_not_believed(controller: Controller) -> None:
    controller.answers["start-new-epoch"] = EpochDone(SEVEN)
    async with connected(controller) as disks:
        with pytest.raises(ControlUnreachable, match="cannot be read") as caught:
            await disks.start()
    assert caught.value.in_doubt


@pytest.mark.parametrize("reply", [{"return": {}, "id": 99}, {"error": {"class": "Refused", "desc": "x"}, "id": 99}])
async def test_an_answer_to_another_command_is_never_taken_for_this_ones(tmp_path: Path, reply: Any) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        greeting = {"QMP": {"version": {"package": "qemu-remus 9"}, "capabilities": []}}
        for line in (greeting, {"return": {}, "id": 1}, reply):
            await stream.send_all(json.dumps(line).encode() + b"\r\n")
            await stream.receive_some(4096)

    path = tmp_path / "control.sock"
    async with trio.open_nursery() as nursery:
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(path))
        listener.listen()
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        async with open_toolstack(path) as disks:
            with pytest.raises(ControlUnreachable) as caught:
                await disks.prepare()
        nursery.cancel_scope.cancel()
    assert caught.value.in_doubt


def test_the_abort_that_leaving_needs_is_bounded_as_documented() -> None:
    assert toolstack.ABORT_TIMEOUT + MARGIN <= 15
