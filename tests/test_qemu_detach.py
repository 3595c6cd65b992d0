"""Detach: from every half-way state all of ours comes out and nothing else is touched.

Half-way states are made by doing what the controller does, up to each step, and stopping there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
import trio
import trio.testing

from qemu_remus.core.errors import CommandInDoubt, QemuUnreachable
from qemu_remus.core.model import DiskName, EpochNumber, Generation, NodeName, PairName, QdevPath
from qemu_remus.qemu import cleanup, commands
from qemu_remus.qemu.client import PeerCredentials, open_qmp
from qemu_remus.qemu.commands import Command
from qemu_remus.qemu.detach import DetachReport, detach
from qemu_remus.qemu.epoch import look_name
from qemu_remus.qemu.nbd_server import socket_path
from qemu_remus.qemu.nodes import BitmapIdentity, access_node, export_id, filter_node, fleece_node
from tests.fake_qemu import VIRTIO, FakeQemu
from tests.qmp_validation import OLD_AND_NEW, floor

PAIR = PairName("web")
OTHER = PairName("other")
GENERATION = Generation(UUID(int=7))
QDEV = QdevPath(VIRTIO.format("vda"))
DISK = NodeName("disk1")


def steps(tmp_path: Path, peer: PeerCredentials, pair: PairName = PAIR, name: str = "vda") -> list[Command]:
    """All that a controller does for one disk, from start to reading, in its order."""
    disk, epoch = DiskName(name), EpochNumber(5)
    finished = BitmapIdentity(pair, GENERATION, EpochNumber(4), epoch)
    following = BitmapIdentity(pair, GENERATION, epoch, EpochNumber(6))
    fleece, above, access = fleece_node(pair, disk), filter_node(pair, disk, epoch), access_node(pair, disk, epoch)
    return [
        commands.nbd_server_start(str(socket_path(tmp_path, pair, peer))),
        commands.blockdev_add_file(fleece, "/fleece"),
        commands.bitmap_add(DISK, finished.name),
        commands.bitmap_add(DISK, following.name),
        commands.bitmap_disable(DISK, finished.name),
        commands.blockdev_add_filter(above, disk=DISK, target=fleece, bitmap=finished.name),
        commands.qom_set_drive(QDEV, above),
        commands.blockdev_add_snapshot_access(access, filter_node=above),
        commands.block_export_add_nbd(export_id(pair, disk, epoch), access, "x", bitmaps=[(DISK, finished.name)]),
    ]


STEPS = 9


@pytest.fixture(params=OLD_AND_NEW)
def fake(request: pytest.FixtureRequest) -> Iterator[FakeQemu]:
    with FakeQemu(request.param) as qemu:
        qemu.add_disk("disk1", QDEV)
        qemu.add_disk("disk2", VIRTIO.format("vdb"))
        qemu.put_over(VIRTIO.format("vdb"), "throttle0", "throttle")
        for node in ("disk1", "disk2"):
            qemu.execute("block-dirty-bitmap-add", {"node": node, "name": "libvirt-backup"})
        yield qemu


def run(fake: FakeQemu, todo: list[Command]) -> None:
    for command in todo:
        fake.execute(command.name, dict(command.arguments))
    fake.log.clear()


def assert_untouched(fake: FakeQemu) -> None:
    assert fake.aborted == ""
    assert fake.devices[QDEV].node == "disk1"
    assert fake.devices[VIRTIO.format("vdb")].node == "throttle0"
    assert set(fake.nodes["disk1"].bitmaps) == set(fake.nodes["disk2"].bitmaps) == {"libvirt-backup"}
    assert set(fake.nodes) == {"disk1", "disk2", "throttle0"}


async def detached(fake: FakeQemu, pair: PairName | None = PAIR, *, keep_tracking: bool = False) -> DetachReport:
    async with fake.connect() as client:
        return await detach(client, pair, keep_tracking=keep_tracking)


@pytest.mark.parametrize("pair", [PAIR, None], ids=["one-pair", "all"])
@pytest.mark.parametrize("done", range(STEPS + 1))
async def test_every_half_way_state_is_cleaned(
    fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials, done: int, pair: PairName | None
) -> None:
    todo = steps(tmp_path, qemu)
    assert len(todo) == STEPS
    run(fake, todo[:done])
    report = await detached(fake, pair)
    assert report.ok
    assert report.left == ()
    assert fake.ours() == []
    assert fake.nbd is None
    assert_untouched(fake)
    assert bool(report.removed) == (done > 0)


@pytest.mark.parametrize("when", ["hang_up_before", "hang_up_after"])
@pytest.mark.parametrize(
    "at", ["block-export-del", "blockdev-del", "qom-set", "nbd-server-stop", "block-dirty-bitmap-remove"]
)
async def test_a_detach_that_was_cut_off_is_completed_by_another(
    fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials, at: str, when: str
) -> None:
    run(fake, steps(tmp_path, qemu))
    getattr(fake, when).add(at)
    async with fake.connect() as client:
        with pytest.raises(CommandInDoubt):
            await detach(client, PAIR)
    getattr(fake, when).clear()
    assert (await detached(fake)).ok
    assert fake.ours() == []
    assert fake.nbd is None
    assert_untouched(fake)


async def test_detach_twice_finds_nothing_the_second_time(
    fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials
) -> None:
    run(fake, steps(tmp_path, qemu))
    await detached(fake)
    fake.log.clear()
    report = await detached(fake)
    assert report == DetachReport(ok=True, removed=(), left=())
    assert report.lines() == ["there was nothing of ours in this QEMU"]
    assert fake.commands() == ["qmp_capabilities"]


async def test_users_come_out_before_what_they_use(fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials) -> None:
    run(fake, steps(tmp_path, qemu))
    report = await detached(fake)
    assert fake.commands() == [
        "qmp_capabilities",
        "block-export-del",
        "blockdev-del",
        "qom-set",
        "blockdev-del",
        "blockdev-del",
        "nbd-server-stop",
        "block-dirty-bitmap-remove",
        "block-dirty-bitmap-remove",
    ]
    assert len(report.lines()) == len(report.removed) == 8
    assert f"device {QDEV}, which has its disk node disk1 again" in "\n".join(report.lines())


async def test_tracking_can_be_kept(fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials) -> None:
    run(fake, steps(tmp_path, qemu))
    assert (await detached(fake, keep_tracking=True)).ok
    assert all(BitmapIdentity.parse(name) for name in fake.ours())
    assert len(fake.ours()) == 2
    assert fake.devices[QDEV].node == "disk1"


async def test_a_look_that_was_cut_short_goes_although_tracking_is_kept(fake: FakeQemu) -> None:
    tracking = BitmapIdentity(PAIR, Generation(UUID(int=7)), EpochNumber(3), EpochNumber(4))
    for name in (tracking.name, look_name(tracking).name):
        fake.execute("block-dirty-bitmap-add", {"node": "disk1", "name": name})
    assert (await detached(fake, keep_tracking=True)).ok
    assert fake.ours() == [tracking.name]


async def test_another_pairs_things_stay(fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials) -> None:
    run(fake, steps(tmp_path, qemu, OTHER))
    before = fake.ours()
    report = await detached(fake, PAIR)
    assert report.removed == ()
    assert fake.ours() == before
    assert fake.nbd is not None


async def test_a_device_that_has_its_disk_already_is_never_set_again(
    fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials
) -> None:
    """Setting it again aborts QEMU."""
    run(fake, steps(tmp_path, qemu)[:6])
    assert (await detached(fake)).ok
    assert "qom-set" not in fake.commands()
    assert fake.aborted == ""


async def test_a_refused_swap_leaves_the_filter_in_place_and_says_so(
    fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials
) -> None:
    run(fake, steps(tmp_path, qemu))
    fake.refuse("qom-set", "Permission conflict on node 'disk1'")
    report = await detached(fake)
    above = filter_node(PAIR, DiskName("vda"), EpochNumber(5))
    assert not report.ok
    assert fake.devices[QDEV].node == above
    assert above in fake.nodes
    assert any("Permission conflict" in left.why and left.hint for left in report.left)
    assert any(line.startswith(f"LEFT {above}: Permission conflict") for line in report.lines())
    # The next attempt, once the reason is gone, takes out the rest.
    assert (await detached(fake)).ok
    assert fake.ours() == []
    assert_untouched(fake)


@pytest.mark.parametrize("driver", ["qcow2", "throttle"])
async def test_a_node_that_somebody_put_over_our_filter_is_not_touched(
    fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials, driver: str
) -> None:
    run(fake, steps(tmp_path, qemu))
    fake.put_over(QDEV, "overlay", driver)
    report = await detached(fake)
    above = filter_node(PAIR, DiskName("vda"), EpochNumber(5))
    assert not report.ok
    assert fake.devices[QDEV].node == "overlay"
    assert "qom-set" not in fake.commands()
    assert {left.name for left in report.left} == {above, fleece_node(PAIR, DiskName("vda"))}
    assert fake.exports == {}


async def test_a_refused_removal_is_reported_and_the_rest_goes_on(
    fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials
) -> None:
    run(fake, steps(tmp_path, qemu))
    fake.refuse("block-dirty-bitmap-remove", "Bitmap is currently in use")
    report = await detached(fake)
    assert [left.why for left in report.left] == ["Bitmap is currently in use"]
    assert fake.ours() == [report.left[0].name]


async def test_an_export_that_does_not_end_is_reported(
    fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials, autojump_clock: trio.testing.MockClock
) -> None:
    run(fake, steps(tmp_path, qemu))
    name = export_id(PAIR, DiskName("vda"), EpochNumber(5))
    fake.stuck.add(name)
    report = await detached(fake)
    assert not report.ok
    assert (name, "it did not end within 10 s") in [(left.name, left.why) for left in report.left]
    assert fake.nbd is not None


async def test_our_job_is_cancelled_and_anothers_is_not(fake: FakeQemu) -> None:
    ours = export_id(PAIR, DiskName("vda"), EpochNumber(5))
    for job in (ours, "libvirt-mirror"):
        fake.jobs[job] = {"id": job, "type": "backup", "status": "running", "current-progress": 0, "total-progress": 1}
    report = await detached(fake)
    assert report.removed == (f"job {ours}",)
    assert [name for name in fake.commands() if name.startswith("job-")] == ["job-cancel", "job-dismiss"]
    assert list(fake.jobs) == ["libvirt-mirror"]


async def test_an_nbd_server_that_somebody_else_started_goes_on(fake: FakeQemu, tmp_path: Path) -> None:
    fake.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": str(tmp_path / "libvirt.sock")}}})
    await detached(fake, None)
    assert fake.nbd is not None


async def test_our_nbd_server_goes_on_while_somebody_elses_export_is_in_it(
    fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials
) -> None:
    run(fake, steps(tmp_path, qemu))
    fake.execute("block-export-add", {"type": "nbd", "id": "theirs", "node-name": "disk2"})
    report = await detached(fake)
    assert not report.ok
    assert "in use by theirs" in report.left[0].why
    assert fake.nbd is not None
    assert list(fake.exports) == ["theirs"]


async def test_a_filter_that_hides_its_disk_is_left(tmp_path: Path, qemu: PeerCredentials) -> None:
    """A QEMU that shows the children in neither of the two ways."""
    with FakeQemu(floor()) as fake:
        fake.add_disk("disk1", QDEV)
        await see_hidden(fake, tmp_path, qemu)


async def see_hidden(fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials) -> None:
    run(fake, steps(tmp_path, qemu))
    fake.schema = [entry for entry in fake.schema if entry["name"] != "x-debug-query-block-graph"]
    report = await detached(fake)
    assert not report.ok
    assert any("does not show what is below" in left.why for left in report.left)
    assert fake.devices[QDEV].node == filter_node(PAIR, DiskName("vda"), EpochNumber(5))
    assert "qom-set" not in fake.commands()


@pytest.fixture
def qemu() -> PeerCredentials:
    """The process that the fake QEMU's sockets belong to."""
    return PeerCredentials(os.getpid(), os.getuid(), os.getgid())


# --- after a controller's death


@pytest.mark.parametrize("done", range(STEPS + 1))
async def test_a_clean_up_leaves_the_bitmaps_and_other_pairs_alone(
    fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials, done: int
) -> None:
    run(fake, steps(tmp_path, qemu)[:done])
    tracking = [name for name in fake.ours() if name.startswith("qemu-remus.")]
    fake.execute("blockdev-add", dict(commands.blockdev_add_file(fleece_node(OTHER, DiskName("x")), "/x").arguments))
    async with trio.open_nursery() as nursery:
        await nursery.start(fake.listen, tmp_path / "qmp")
        assert (await cleanup.clean_up(tmp_path / "qmp", PAIR)).ok
        nursery.cancel_scope.cancel()
    assert fake.ours() == sorted([*tracking, fleece_node(OTHER, DiskName("x"))])
    assert fake.devices[QDEV].node == "disk1"
    assert fake.aborted == ""


async def test_a_clean_up_gives_way_to_a_restarted_controller(
    fake: FakeQemu, tmp_path: Path, qemu: PeerCredentials
) -> None:
    run(fake, steps(tmp_path, qemu))
    async with trio.open_nursery() as nursery:
        await nursery.start(fake.listen, tmp_path / "qmp")
        async with open_qmp(tmp_path / "qmp"):
            with pytest.raises(QemuUnreachable, match="somebody else"):
                await cleanup.clean_up(tmp_path / "qmp", PAIR, greeting=0.05)
        nursery.cancel_scope.cancel()
    assert fake.commands() == ["qmp_capabilities"]


def test_a_clean_up_without_a_qemu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cleanup.main(["--qmp", str(tmp_path / "nothing"), "--pair", PAIR]) == 1
    assert "cannot connect" in capsys.readouterr().err
