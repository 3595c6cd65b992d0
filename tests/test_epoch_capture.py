"""Checkpoints on a fake QEMU: in at the right moment, out whatever happens, and no change ever forgotten.

Rules: after every test's fault the VM is in the state in which its owner wants it, its devices have their own nodes,
and every block that the guest wrote is in some bitmap of ours. ``Rig.see_harmless`` says so in one place.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
import trio
import trio.testing

from qemu_remus.core.errors import (
    CheckpointVoid,
    CommandFailed,
    CommandInDoubt,
    DiskUnsupported,
    EpochLost,
    FleeceTooSmall,
    GraphChanged,
    QemuError,
    QemuRemusError,
)
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import DiskName, EpochNumber, Generation, pair_name
from qemu_remus.nbd.batches import Batch
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.attachment import Attachment, open_attachment
from qemu_remus.qemu.capabilities import Capabilities, query_capabilities
from qemu_remus.qemu.client import SILENCE_LIMIT, QmpClient
from qemu_remus.qemu.discover import discover
from qemu_remus.qemu.disks import VmDisk, choose_disks
from qemu_remus.qemu.fleece import FleeceFile
from qemu_remus.qemu.guardian_client import Guardian
from qemu_remus.qemu.nodes import BitmapIdentity, Kind, export_id, kind_of
from qemu_remus.qemu.transport import Transport
from tests.fake_qemu import VIRTIO, FakeQemu, Refusal
from tests.faulty_qmp import Fault, FaultyQmp
from tests.qmp_validation import OLD_AND_NEW

PAIR = pair_name("web")
GENERATION = Generation(UUID(int=7))
BLOCK = 4096


def identity(number: int) -> BitmapIdentity:
    return BitmapIdentity(PAIR, GENERATION, None, EpochNumber(number))


def named(number: int) -> Callable[[object], BitmapIdentity]:
    """Names the bitmap that takes over whatever is found."""
    return lambda _: identity(number)


class FakeGuardian:
    """Says what it was asked for, and resumes the fake."""

    def __init__(self, qemu: FakeQemu) -> None:
        self._qemu = qemu
        self.calls: list[str] = []

    async def arm(self, seconds: float = 0.0) -> None:
        assert seconds > 0
        self.calls.append("arm")

    def disarm(self) -> None:
        self.calls.append("disarm")

    async def resume_now(self, timeout: float = 0.0) -> None:
        self.calls.append("resume")
        self._qemu.execute("cont", {})


@dataclass
class Rig:
    """A VM with disks a and b, attached and tracked in bitmap 1."""

    qemu: FakeQemu
    client: FaultyQmp
    attachment: Attachment
    guardian: FakeGuardian

    async def capture(self, *, pause: bool = True, finished: int = 1) -> Any:
        return await self.attachment.capture(identity(finished), identity(finished + 1), pause=pause)

    def see_harmless(self, written: set[int], *, status: str = "running") -> None:
        assert self.qemu.aborted == ""
        assert self.qemu.status == status
        assert [device.node for device in self.qemu.devices.values()] == ["a-node", "b-node"]
        assert [name for name in self.qemu.nodes if kind_of(name) in (Kind.FILTER, Kind.ACCESS)] == []
        assert self.qemu.exports == {}
        assert written <= recorded(self.qemu, "a-node")


def recorded(qemu: FakeQemu, node: str) -> set[int]:
    """Blocks that are in some bitmap of ours."""
    return set[int]().union(*(bitmap.dirty for bitmap in qemu.nodes[node].bitmaps.values()))


@asynccontextmanager
async def attached(
    qemu: FakeQemu, directory: Path, *, guardian: FakeGuardian | None = None, track: bool = True
) -> AsyncIterator[Rig]:
    async with qemu.connect() as plain, attach(qemu, plain, directory, guardian or FakeGuardian(qemu)) as rig:
        if track:
            await rig.attachment.start_tracking(identity(1))
        yield rig


@asynccontextmanager
async def attach(qemu: FakeQemu, plain: QmpClient, directory: Path, guardian: FakeGuardian) -> AsyncIterator[Rig]:
    client = FaultyQmp(plain)
    capabilities = await query_capabilities(plain)
    disks = choose_disks(await discover(plain, capabilities), None, capabilities)
    async with open_attachment(
        client.as_client(),
        capabilities,
        PAIR,
        disks,
        fleece_dir=directory,
        runtime_dir=directory,
        guardian=cast(Guardian, guardian),
    ) as attachment:
        yield Rig(qemu, client, attachment, guardian)


@pytest.fixture(params=OLD_AND_NEW)
def qemu(request: pytest.FixtureRequest) -> Any:
    with FakeQemu(request.param) as fake:
        for name in "ab":
            fake.add_disk(f"{name}-node", VIRTIO.format(name))
        yield fake


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the mock clock, which takes a wait for a thread for one that nobody ends, and jumps over it."""

    async def run_here(act: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return act(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", run_here)


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


async def test_a_merge_keeps_every_change_and_one_bitmap(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        capture = await rig.capture()
        qemu.write("a-node", BLOCK, 1)
        await rig.attachment.release(capture)
        del qemu.nodes["b-node"].bitmaps[identity(1).name]
        await rig.attachment.merge_back([identity(1), identity(2)], named(3))
        qemu.write("a-node", 2 * BLOCK, 1)
        assert await rig.attachment.bitmaps() == dict.fromkeys(
            map(DiskName, "ab"), (epoch.Tracked(identity(3), recording=True),)
        )
        assert recorded(qemu, "a-node") == {0, 1, 2}


async def test_a_merge_of_a_bitmap_that_is_in_use_changes_nothing(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.nodes["b-node"].bitmaps[identity(1).name].busy = 1
        with pytest.raises(CommandFailed, match="in use"):
            await rig.attachment.merge_back([identity(1)], named(2))
        assert set((await rig.attachment.bitmaps()).values()) == {(epoch.Tracked(identity(1), recording=True),)}
        qemu.nodes["b-node"].bitmaps[identity(1).name].busy = 0
        await rig.attachment.remove_bitmaps(identity(1))
        await rig.attachment.remove_bitmaps(identity(1))
        assert set((await rig.attachment.bitmaps()).values()) == {()}


class Sources:
    """Stands for the transport: notes what is read."""

    def __init__(self) -> None:
        self.read: list[tuple[int, str, int]] = []

    def enters_graph(self, disk: VmDisk) -> bool:
        return False

    @asynccontextmanager
    async def read_ahead(self, index: int, disk: VmDisk, bitmap: epoch.BitmapLook) -> AsyncIterator[Any]:
        self.read.append((index, bitmap.name, bitmap.count))

        async def stream() -> AsyncIterator[Batch]:
            yield Batch((Extent(index, 0, BLOCK, zero=True),), bytearray())

        yield stream()


async def ahead(rig: Rig, *, skip: tuple[int, ...] = ()) -> list[tuple[int, str, int]]:
    """What is read of bitmap 1: disks, bitmaps, bytes."""
    sources = Sources()
    rig.attachment._transport = cast(Transport, sources)
    async with rig.attachment.read_ahead(identity(1), skip=skip) as batches:
        disks = [batch.extents[0].disk async for batch in batches]
    assert disks == [index for index, _, _ in sources.read]
    return sources.read


async def test_a_rotation_loses_no_write_while_the_guest_runs(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.before["transaction"] = lambda: qemu.write("a-node", 0, 1)
        qemu.after["transaction"] = lambda: qemu.write("a-node", BLOCK, 1)
        await rig.attachment.rotate(identity(1), identity(2))
        bitmaps = qemu.nodes["a-node"].bitmaps
        assert bitmaps[identity(1).name].dirty == {0}
        assert bitmaps[identity(2).name].dirty == {1}
        assert "stop" not in qemu.commands()
        expected = (epoch.Tracked(identity(1), recording=False), epoch.Tracked(identity(2), recording=True))
        assert await rig.attachment.bitmaps() == dict.fromkeys(map(DiskName, "ab"), expected)
        rig.see_harmless({0, 1})


async def test_a_rotation_without_the_bitmap_that_it_ends_begins_none(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("a-node", 0, 1)
        del qemu.nodes["b-node"].bitmaps[identity(1).name]
        with pytest.raises(CommandFailed):
            await rig.attachment.rotate(identity(1), identity(2))
        assert (await rig.attachment.bitmaps())[DiskName("a")] == (epoch.Tracked(identity(1), recording=True),)
        rig.see_harmless({0})


async def test_what_a_finished_bitmap_holds_is_read_disk_after_disk(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        for number, node in enumerate(("a-node", "b-node"), 1):
            qemu.write(node, 0, number * BLOCK)
        await rig.attachment.rotate(identity(1), identity(2))
        name = identity(1).name
        assert await ahead(rig) == [(0, name, BLOCK), (1, name, 2 * BLOCK)]
        assert await ahead(rig, skip=(0,)) == [(1, name, 2 * BLOCK)]
        assert await ahead(rig, skip=(0, 1)) == []


async def test_a_disk_without_changes_is_not_read_ahead(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("b-node", 0, BLOCK)
        await rig.attachment.rotate(identity(1), identity(2))
        assert [index for index, _, _ in await ahead(rig)] == [1]


async def test_a_bitmap_lost_before_it_is_read_ahead_is_not_an_empty_one(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        qemu.write("b-node", 0, BLOCK)
        await rig.attachment.rotate(identity(1), identity(2))
        del qemu.nodes["b-node"].bitmaps[identity(1).name]
        with pytest.raises(GraphChanged, match="disk b has lost its dirty bitmap"):
            await ahead(rig)
        # A disk that is compared needs none.
        assert await ahead(rig, skip=(1,)) == []


async def test_a_merge_names_the_new_bitmap_by_what_is_there_at_that_moment(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        await rig.attachment.rotate(identity(1), identity(2))
        del qemu.nodes["b-node"].bitmaps[identity(1).name]
        seen: list[Mapping[DiskName, tuple[epoch.Tracked, ...]]] = []

        def into(found: Mapping[DiskName, tuple[epoch.Tracked, ...]]) -> BitmapIdentity:
            seen.append(found)
            return identity(3)

        before = await rig.attachment.bitmaps()
        await rig.attachment.merge_back([identity(1), identity(2)], into)
        assert seen == [before]
        assert [len(found) for found in seen[0].values()] == [2, 1]
        assert set((await rig.attachment.bitmaps()).values()) == {(epoch.Tracked(identity(3), recording=True),)}


async def test_both_bitmaps_of_an_epoch_are_removed_together(qemu: FakeQemu, directory: Path) -> None:
    async with attached(qemu, directory) as rig:
        await rig.attachment.rotate(identity(1), identity(2))
        await rig.attachment.rotate(identity(2), identity(3))
        await rig.attachment.remove_bitmaps(identity(1), identity(2))
        assert qemu.commands()[-1] == "transaction"
        left = {(epoch.Tracked(identity(3), recording=True),)}
        assert set((await rig.attachment.bitmaps()).values()) == left
        await rig.attachment.remove_bitmaps(identity(2), identity(1))
        assert set((await rig.attachment.bitmaps()).values()) == left


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


def list_fleeces(directory: Path) -> list[Path]:
    return list(directory.glob("*.fleece"))


def directory_entries(directory: Path) -> list[Path]:
    return list(directory.iterdir())
