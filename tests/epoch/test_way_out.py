"""The way out of QEMU, on a fake one: at the end, after a refusal, and while it hangs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from qemu_remus.core.errors import (
    CheckpointVoid,
    CommandInDoubt,
    DiskUnsupported,
    EpochLost,
)
from qemu_remus.core.model import DiskName, EpochNumber
from qemu_remus.qemu.capabilities import Capabilities
from qemu_remus.qemu.client import SILENCE_LIMIT
from qemu_remus.qemu.nodes import Kind, export_id, kind_of
from tests.epoch.rig import (
    PAIR,
    FakeGuardian,
    Rig,
    attach,
    attached,
    directory_entries,
    identity,
    list_fleeces,
    recorded,
)
from tests.fake_qemu import FakeQemu


async def test_only_the_bitmaps_stay_at_the_end(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        assert [kind_of(name) for name in qemu.ours() if kind_of(name)] == [Kind.FLEECE, Kind.FLEECE]
        assert not list_fleeces(directory)
        qemu.write("a-node", 0, 1)
        await rig.capture()
        qemu.execute(
            "block-export-add",
            {"id": export_id(PAIR, DiskName("a"), EpochNumber(1)), "type": "nbd", "node-name": "a-node"},
        )
    rig.see_harmless({0})
    assert qemu.ours() == sorted(identity(number).name for number in (1, 1, 2, 2))
    assert qemu.nbd is None
    assert list(directory_entries(directory)) == []


async def test_an_export_of_somebody_else_keeps_the_nbd_server(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory):
        qemu.execute("block-export-add", {"id": "theirs", "type": "nbd", "node-name": "b-node"})
    assert list(qemu.exports) == ["theirs"]
    assert qemu.nbd is not None
    async with attached(qemu, directory, track=False) as rig:
        # It is known to be ours by where it listens, and used again.
        assert (await rig.capture()).disks == ()


async def test_an_nbd_server_of_somebody_else_is_left_alone_and_the_vm_refused_where_there_is_no_push(
    qemu: FakeQemu, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Capabilities, "push", False)
    path = str(directory / "theirs.sock")
    qemu.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": path}}})
    async with qemu.connect() as plain:
        with pytest.raises(DiskUnsupported, match="only one"):
            async with attach(qemu, plain, directory, FakeGuardian(qemu)):
                pass
    assert qemu.nbd is not None
    assert qemu.ours() == []


async def test_a_step_that_qemu_refuses_says_what_it_was(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        qemu.refuse("qom-set", "Conflicts with use by a backup")
        with pytest.raises(EpochLost, match="refused qom-set: Conflicts with use by a backup") as caught:
            await rig.capture()
        assert "The VM runs" in str(caught.value)
        rig.see_harmless({0})


async def test_what_cannot_be_undone_is_named_in_the_error(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        qemu.before["qom-set"] = lambda: qemu._do_cont()
        qemu.refuse("blockdev-del", "Node is in use")
        with pytest.raises(CheckpointVoid) as caught:
            await rig.capture()
        assert "still in QEMU" in caught.value.safe
        await rig.attachment.prepare()
        rig.see_harmless({0})


async def test_a_qemu_that_does_not_answer_is_told_to_resume_until_it_does(
    qemu: FakeQemu, directory: Path, autojump_clock: Any
) -> None:
    """Meanwhile the guardian is kept from ending a controller that is there and waits."""
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        qemu.write("b-node", 0, 1)
        qemu.mute = {"cont"}
        qemu.before["cont"] = lambda: qemu.before.update(cont=qemu.mute.clear)
        capture = await rig.capture()
        assert len(capture.disks) == 2
        assert rig.guardian.calls == ["arm", "arm", "disarm"]
        assert qemu.status == "running"


@pytest.mark.usefixtures("no_threads")
async def test_a_qemu_that_hangs_in_our_pause_is_told_to_resume_whatever_else_it_has_not_answered(
    qemu: FakeQemu, directory: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with attached(qemu, directory) as rig, trio.open_nursery() as nursery:
        qemu.write("a-node", 0, 1)
        qemu.after["stop"] = qemu.hang
        nursery.start_soon(_fail_to_capture, rig)
        await trio.sleep(60)
        qemu.go_on()
        await trio.testing.wait_all_tasks_blocked()
        assert qemu.status == "running"
        # Each time it is told it has its time to answer, and the guardian knows.
        assert qemu.commands().count("cont") == rig.guardian.calls.count("arm") > 2
        rig.see_harmless({0})


async def _fail_to_capture(rig: Rig) -> None:
    with pytest.raises(CommandInDoubt):
        await rig.capture()


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("captured", [False, True])
async def test_the_way_out_of_a_qemu_that_hangs_is_waited_for_once(
    qemu: FakeQemu, directory: Path, autojump_clock: trio.testing.MockClock, *, captured: bool
) -> None:
    async with qemu.connect() as client:
        async with attach(qemu, client, directory, FakeGuardian(qemu)) as rig:
            await rig.attachment.start_tracking(identity(1))
            qemu.write("a-node", 0, 1)
            if captured:
                await rig.capture()
            qemu.hang()
            with pytest.raises(CommandInDoubt):
                await rig.attachment.start_tracking(identity(9))
            began, told = trio.current_time(), len(qemu.log)
        assert trio.current_time() - began == pytest.approx(SILENCE_LIMIT)
        qemu.go_on()
        await trio.testing.wait_all_tasks_blocked()
        # Of all that is there to be taken out, only the first look has been sent.
        assert [name for name, _ in qemu.log[told:]] == ["transaction", "query-jobs", "query-block-exports"]
        assert recorded(qemu, "a-node") == {0}


@pytest.mark.usefixtures("no_threads")
async def test_a_qemu_that_goes_on_in_time_is_left_clean(
    qemu: FakeQemu, directory: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        async with attached(qemu, directory) as rig:
            qemu.write("a-node", 0, 1)
            await rig.capture()
            qemu.hang()
            with pytest.raises(CommandInDoubt):
                await rig.attachment.start_tracking(identity(9))
            nursery.start_soon(_go_on_later, qemu)
        assert qemu.commands()[-1] == "nbd-server-stop"
        rig.see_harmless({0})


async def _go_on_later(qemu: FakeQemu) -> None:
    await trio.sleep(SILENCE_LIMIT - 1)
    qemu.go_on()
