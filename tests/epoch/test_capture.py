"""Checkpoints on a fake QEMU: in at the right moment, out whatever happens, and no change ever forgotten."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import trio
import trio.testing

from qemu_remus.core.errors import (
    CheckpointVoid,
    FleeceTooSmall,
    GraphChanged,
    QemuError,
    QemuRemusError,
)
from qemu_remus.qemu import commands
from qemu_remus.qemu.fleece import FleeceFile
from tests.epoch.rig import (
    BLOCK,
    FakeGuardian,
    attached,
    identity,
    named,
    recorded,
)
from tests.fake_qemu import VIRTIO, FakeQemu, Refusal
from tests.faulty_qmp import Fault


def since_capture(qemu: FakeQemu) -> list[str]:
    names = [name for name, _ in qemu.log]
    return names[names.index("stop") :]


async def test_a_checkpoint_is_a_filter_under_the_disks_that_changed(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 5 * BLOCK, 2 * BLOCK)
        capture = await rig.capture()
        (disk,) = capture.disks
        assert (disk.index, disk.dirty_bytes, disk.granularity) == (0, 2 * BLOCK, BLOCK)
        assert capture.dirty_bytes == 2 * BLOCK
        assert qemu.status == "running"
        a, b = qemu.devices.values()
        assert (a.node, b.node) == (disk.filter, "b-node")
        assert qemu.nodes[disk.access].children == {"file": disk.filter}
        assert rig.guardian.calls == ["arm", "disarm"]
        # What the guest writes now belongs to the next epoch alone.
        qemu.write("a-node", 9 * BLOCK, 1)
        bitmaps = qemu.nodes["a-node"].bitmaps
        assert bitmaps[identity(1).name].dirty == {5, 6}
        assert bitmaps[identity(2).name].dirty == {9}
        await rig.attachment.release(capture)
        rig.see_harmless({5, 6, 9})


async def test_no_time_is_spent_in_the_pause_on_what_can_be_done_outside(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        for node in ("a-node", "b-node"):
            qemu.write(node, 0, 1)
        await rig.capture()
        names = since_capture(qemu)
        pause = names[: names.index("cont") + 1]
        assert pause == ["stop", "transaction", "blockdev-add", "qom-set", "blockdev-add", "qom-set", "cont"]


async def test_an_epoch_of_nothing_gets_no_filter(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        capture = await rig.capture()
        assert capture.disks == ()
        assert "blockdev-add" not in since_capture(qemu)
        await rig.attachment.release(capture)
        rig.see_harmless(set())


async def test_a_first_write_just_before_the_pause_is_not_missed(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:

        def the_guest_writes() -> None:
            qemu.write("a-node", 3 * BLOCK, 1)
            qemu.write("b-node", BLOCK, 1)

        qemu.before["stop"] = the_guest_writes
        capture = await rig.capture()
        assert [disk.index for disk in capture.disks] == [0, 1]
        assert qemu.nodes["a-node"].bitmaps[identity(1).name].dirty == {3}


@pytest.mark.parametrize("dirty", ["a", "ab"])
@pytest.mark.parametrize("fault", [Fault.REFUSE, Fault.DOUBT])
async def test_a_fault_at_any_command_leaves_nothing_behind(
    qemu: FakeQemu, directory: Path, fault: Fault, dirty: str
) -> None:
    failures = 0
    async with attached(qemu, directory) as rig:
        written: set[int] = set()
        for point in count():
            current = 2 * point + 3
            qemu.write("a-node", point % 200 * BLOCK, BLOCK)
            written.add(point % 200)
            if "b" in dirty:
                qemu.write("b-node", point * BLOCK, BLOCK)
            found = set().union(*(await rig.attachment.bitmaps()).values())
            old = sorted((one.identity for one in found), key=lambda one: one.epoch)
            await rig.attachment.merge_back(old, named(current))
            rig.client.arm(fault, point)
            try:
                capture = await rig.capture(finished=current)
            except QemuRemusError:
                failures += 1
            else:
                # The fault was not in the way; a capture that holds has everything in.
                assert len(capture.disks) == len(dirty)
            rig.client.disarm()
            await rig.attachment.prepare()
            rig.see_harmless(written)
            if not rig.client.struck:
                break
    assert failures > 8


@pytest.mark.parametrize("moment", ["hang_up_before", "hang_up_after"])
@pytest.mark.parametrize("command", ["stop", "block-dirty-bitmap-disable", "qom-set", "cont"])
async def test_a_connection_lost_in_the_pause_is_the_guardians_call(
    qemu: FakeQemu, directory: Path, command: str, moment: str
) -> None:
    del qemu.devices[VIRTIO.format("b")], qemu.nodes["b-node"]
    guardian = FakeGuardian(qemu)
    async with attached(qemu, directory, guardian=guardian) as rig:
        qemu.write("a-node", 0, 1)
        getattr(qemu, moment).add(command)
        with pytest.raises(QemuError):
            await rig.capture()
    assert qemu.status == "running"
    assert guardian.calls[-1] == "disarm"
    if (command, moment) != ("cont", "hang_up_after"):
        assert "resume" in guardian.calls
    # The next controller finds what is left, and takes it out.
    getattr(qemu, moment).clear()
    async with attached(qemu, directory, track=False) as rig:
        assert recorded(qemu, "a-node") == {0}
        assert [device.node for device in qemu.devices.values()] == ["a-node"]
        assert await rig.attachment.dirty_bytes() >= BLOCK


async def test_a_cancelled_capture_resumes_the_vm_and_takes_the_filter_out(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        with trio.CancelScope() as scope:
            qemu.after["stop"] = scope.cancel
            await rig.capture()
        assert scope.cancelled_caught
        rig.see_harmless({0})


async def test_a_pause_of_somebody_else_is_used_and_left_alone(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        qemu.execute("stop", {})
        capture = await rig.capture()
        assert [disk.index for disk in capture.disks] == [0]
        assert qemu.status == "paused"
        assert "cont" not in qemu.commands()
        assert rig.guardian.calls == []
        await rig.attachment.release(capture)
        rig.see_harmless({0}, status="paused")


async def test_a_pause_that_somebody_else_begins_at_the_same_moment_is_not_ended(
    qemu: FakeQemu, directory: Path
) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)

        def somebody_stops() -> None:
            qemu.status = "paused"

        qemu.before["stop"] = somebody_stops
        with pytest.raises(CheckpointVoid, match="somebody else paused"):
            await rig.capture()
        assert "cont" not in qemu.commands()
        rig.see_harmless({0}, status="paused")


async def test_a_pause_that_somebody_else_begins_after_we_looked_is_used_and_left_alone(
    qemu: FakeQemu, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)

        async def stopped_meanwhile(seconds: float = 0.0) -> None:
            qemu.execute("stop", {})
            # its event comes before the reply
            await rig.client.execute(commands.query_status())

        monkeypatch.setattr(rig.guardian, "arm", stopped_meanwhile)
        capture = await rig.capture()
        assert [disk.index for disk in capture.disks] == [0]
        assert "cont" not in qemu.commands()
        await rig.attachment.release(capture)
        rig.see_harmless({0}, status="paused")


async def test_a_guest_that_powers_off_inside_the_pause_is_not_resumed_and_its_checkpoint_counts(
    qemu: FakeQemu, directory: Path
) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)

        def powered_off() -> None:
            qemu.status = "shutdown"
            raise Refusal("Resetting required")

        qemu.before["cont"] = powered_off
        capture = await rig.capture()
        assert [disk.index for disk in capture.disks] == [0]
        await rig.attachment.release(capture)
        rig.see_harmless({0}, status="shutdown")


@pytest.mark.parametrize("pause", [True, False])
async def test_a_vm_that_is_resumed_under_us_voids_the_checkpoint(qemu: FakeQemu, directory: Path, pause: bool) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        if not pause:
            qemu.execute("stop", {})
        qemu.before["qom-set"] = lambda: qemu._do_cont()
        with pytest.raises(CheckpointVoid, match="resumed the VM"):
            await rig.capture(pause=pause)
        rig.see_harmless({0})


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["transaction", "blockdev-add", "qom-set"])
async def test_a_resume_at_any_moment_before_the_last_filter_is_in_voids_the_checkpoint(
    qemu: FakeQemu, directory: Path, name: str, when: str
) -> None:
    """The event comes right before the reply to a command of the pause, or after the one before it."""
    hooks = {"before": qemu.before, "after": qemu.after}[when]
    async with attached(qemu, directory) as rig:
        for node in ("a-node", "b-node"):
            qemu.write(node, 0, 1)
        # its namesakes before the pause are not meant
        qemu.after["stop"] = lambda: hooks.update({name: qemu._do_cont})
        with pytest.raises(CheckpointVoid, match="resumed the VM"):
            await rig.capture()
        assert name not in hooks, f"no {name} in the pause"
        rig.see_harmless({0})


@pytest.mark.parametrize("status", ["running", "suspended"])
async def test_a_toolstack_that_has_not_paused_the_vm_gets_no_checkpoint(
    qemu: FakeQemu, directory: Path, status: str
) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        qemu.status = status
        with pytest.raises(CheckpointVoid, match=f"the VM is {status}"):
            await rig.capture(pause=False)
        rig.see_harmless({0}, status=status)


async def test_a_node_of_another_tool_is_not_bypassed(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        device = next(iter(qemu.devices.values()))
        device.node = "b-node"
        with pytest.raises(GraphChanged, match="disk a"):
            await rig.capture()
        device.node = "a-node"
        assert "stop" not in qemu.commands()
        rig.see_harmless({0})


async def test_a_bitmap_that_somebody_removed_is_missed_before_the_vm_is_paused(
    qemu: FakeQemu, directory: Path
) -> None:
    async with attached(qemu, directory) as rig:
        del qemu.nodes["b-node"].bitmaps[identity(1).name]
        with pytest.raises(GraphChanged, match="disk b has lost its dirty bitmap"):
            await rig.capture()
        assert "stop" not in qemu.commands()


async def test_a_fleece_that_is_too_small_is_known_before_the_pause(
    qemu: FakeQemu, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FleeceFile, "free_space", lambda _: 65535)
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 16 * BLOCK)
        with pytest.raises(FleeceTooSmall, match="65536 bytes of fleece, and 65535 are free"):
            await rig.capture()
        assert "stop" not in qemu.commands()
        rig.see_harmless(set(range(16)))
        assert len(qemu.nodes["a-node"].bitmaps) == 2


async def test_neighbouring_blocks_are_counted_exactly_before_a_fleece_is_called_too_small(
    qemu: FakeQemu, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FleeceFile, "free_space", lambda _: 65536)
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 16 * BLOCK)
        capture = await rig.capture()
        assert capture.dirty_bytes == 16 * BLOCK
        assert sorted(qemu.nodes["a-node"].bitmaps) == [identity(1).name, identity(2).name]


async def test_release_may_be_called_again_and_after_nothing(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        capture = await rig.capture()
        await rig.attachment.release(capture)
        before = len(qemu.log)
        await rig.attachment.release(capture)
        assert qemu.commands()[before:] == []
        rig.see_harmless({0})


async def test_an_overlay_on_our_filter_is_named_and_the_next_checkpoint_waits_for_it(
    qemu: FakeQemu, directory: Path
) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        capture = await rig.capture()
        device = next(iter(qemu.devices.values()))
        overlay = qemu._node(capture.disks[0].filter)
        qemu.nodes["overlay"] = type(overlay)("overlay", "qcow2", overlay.size, children={"file": overlay.name})
        device.node = "overlay"
        for attempt in (rig.attachment.release(capture), rig.capture(finished=2)):
            with pytest.raises(QemuError, match=capture.disks[0].filter):
                await attempt
        del qemu.nodes["overlay"]
        device.node = overlay.name
        await rig.attachment.prepare()
        rig.see_harmless({0})
