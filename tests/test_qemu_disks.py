"""Reading the VM's disks from QEMU's answers, and choosing among them: nothing writable is left out silently."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from qemu_remus.core.errors import ConfigError, DiskUnsupported, UnknownDisk
from qemu_remus.core.model import DiskName, EpochNumber, NodeName, PairName, QdevPath, disk_name
from qemu_remus.qemu.capabilities import PUSH, Capabilities, Feature, query_capabilities
from qemu_remus.qemu.discover import discover, in_iothread
from qemu_remus.qemu.disks import VmDisk, below_filters, choose_disks, list_disks, needs_push, obstacle
from qemu_remus.qemu.nodes import filter_node, fleece_node
from tests.fake_qemu import VIRTIO, Device, FakeQemu
from tests.qmp_validation import OLD_AND_NEW

OLD = Capabilities((7, 2, 22), frozenset(Feature))
NO_PUSH = Capabilities((7, 2, 22), frozenset(Feature) - PUSH)
NEW = Capabilities((10, 0, 0), frozenset(Feature))
PAIR = PairName("p")
FILTER = filter_node(PAIR, DiskName("vda"), EpochNumber(3))


def entry(
    node: str = "",
    *,
    qdev: str = "",
    device: str = "",
    size: int = 1 << 20,
    tray: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """One element of the answer to ``query-block``, with the members that QEMU 7.2 sends."""
    answer: dict[str, Any] = {"device": device, "locked": False, "removable": False, "type": "unknown", **more}
    if qdev:
        answer["qdev"] = qdev
    if tray:
        answer["tray_open"] = False
    if node:
        answer["inserted"] = {
            "node-name": node,
            "drv": "raw",
            "ro": False,
            "file": f"/img/{node}",
            "image": {"virtual-size": size, "filename": f"/img/{node}", "format": "raw"},
        }
    return answer


def one(**more: Any) -> VmDisk:
    disk = VmDisk(
        DiskName("vda"), "", QdevPath("vda"), NodeName("n"), 1 << 20, False, False, "raw", "/img/n", iothread=False
    )
    return replace(disk, **more)


@pytest.fixture(params=OLD_AND_NEW)
def fake(request: pytest.FixtureRequest) -> Iterator[FakeQemu]:
    with FakeQemu(request.param) as qemu:
        yield qemu


@pytest.mark.parametrize(
    ("query", "name"),
    [
        (entry("#block1", qdev="/machine/unattached/device[19]", device="ide0-hd0"), "ide0-hd0"),
        (entry("#block1", qdev="/machine/peripheral/usb1/usb1.0/legacy[0]"), "usb1"),
        (entry("#block1", qdev="/machine/peripheral-anon/device[3]/virtio-backend", device="vd1"), "vd1"),
        (entry("disk2", qdev=VIRTIO.format("vda")), "vda"),
        (entry("disk3", qdev="sd0"), "sd0"),
        (entry("disk3", qdev="/machine/peripheral/nvme0"), "nvme0"),
        (entry("xvda-raw", qdev="/machine/xen-bus/xen-disk[0]"), "xvda-raw"),
        (entry("#block1", qdev="/machine/unattached/device[1]"), "block1"),
        (entry("n", device="drive-ide0.0:0"), "drive-ide0-0-0"),
        (entry("n", device="..."), "disk"),
        (entry("n", device="x" * 200), "x" * 60),
    ],
)
def test_a_disk_is_named_after_its_device(query: dict[str, Any], name: str) -> None:
    (disk,) = list_disks([query])
    assert disk.name == name
    assert disk_name(disk.name) == disk.name


def test_two_disks_never_share_a_name() -> None:
    disks = list_disks([entry("a", device="d.1"), entry("b", device="d-1"), entry("c", device="d_1", qdev="d.1")])
    assert [disk.name for disk in disks] == ["d-1", "d-1-2", "d-1-3"]


def test_all_that_query_block_says_of_a_disk_is_read() -> None:
    (disk,) = list_disks([entry("disk3", qdev="sd0", size=300 * 2**20 + 22_016)])
    assert disk == VmDisk(
        DiskName("sd0"),
        "",
        QdevPath("sd0"),
        NodeName("disk3"),
        300 * 2**20 + 22_016,
        read_only=False,
        removable=False,
        driver="raw",
        filename="/img/disk3",
    )


def test_a_whole_tree_is_shown_by_its_images_name() -> None:
    query = entry("n", qdev="sd0")
    query["inserted"]["file"] = 'json:{"driver": "qcow2"}'
    assert list_disks([query])[0].filename == "/img/n"


@pytest.mark.parametrize(
    ("disk", "what", "quiet"),
    [
        (one(qdev=QdevPath("")), "no device of the guest", True),
        (one(removable=True, cdrom=True, node=NodeName(""), size=0), "CD-ROM", True),
        (one(removable=True), "removable", True),
        (one(node=NodeName(""), size=0), "no medium", True),
        (one(node=NodeName("")), "no name", False),
        (one(read_only=True), "read-only", True),
        (one(node=NodeName(""), hidden_below=FILTER), "does not show what is below", False),
        (one(node=NodeName(FILTER)), "one of ours", False),
        (one(size=0), "empty", True),
        (one(model="scsi-block"), "scsi-block, hands the guest's SCSI commands", False),
        (one(model="scsi-generic", read_only=True), "scsi-generic, hands the guest's SCSI commands", False),
    ],
)
def test_what_cannot_be_protected_says_why_and_what_to_do(disk: VmDisk, what: str, quiet: bool) -> None:
    problem = obstacle(disk, OLD)
    assert problem is not None
    assert what in problem.what
    assert problem.hint
    assert problem.quiet is quiet
    # Asked for by name, even what is usually passed over is an error.
    with pytest.raises(DiskUnsupported, match=r"disk mine .* cannot be protected"):
        choose_disks([replace(disk, device="it")], {DiskName("mine"): NodeName("it")}, OLD)


@pytest.mark.parametrize("iothread", [True, False, None])
def test_an_iothread_takes_push_before_10_0_and_is_no_obstacle(iothread: bool | None) -> None:
    assert obstacle(one(iothread=iothread), NEW) is obstacle(one(iothread=iothread), OLD) is None
    assert not needs_push(one(iothread=iothread), NEW)
    assert needs_push(one(iothread=iothread), OLD) is (iothread is not False)


@pytest.mark.parametrize(("iothread", "what"), [(True, "QEMU 7.2.22 aborts"), (None, "cannot be seen")])
def test_an_iothread_where_there_is_no_push_is_an_obstacle(iothread: bool | None, what: str) -> None:
    problem = obstacle(one(iothread=iothread), NO_PUSH)
    assert problem is not None
    assert what in problem.what
    assert "QEMU 10.0" in problem.hint
    assert not problem.quiet
    assert obstacle(one(iothread=False), NO_PUSH) is None


def test_without_a_choice_all_writable_disks_are_taken_in_qemus_order() -> None:
    disks = [
        one(name=DiskName("b")),
        one(name=DiskName("cd"), removable=True, cdrom=True),
        one(name=DiskName("ro"), read_only=True),
        one(name=DiskName("a")),
    ]
    assert [disk.name for disk in choose_disks(disks, None, OLD)] == ["b", "a"]


def test_a_writable_disk_is_never_left_out_silently() -> None:
    with pytest.raises(DiskUnsupported, match=r"disk bad .*iothread"):
        choose_disks([one(), one(name=DiskName("bad"), iothread=True)], None, NO_PUSH)


def test_a_vm_without_a_writable_disk_is_refused() -> None:
    with pytest.raises(UnknownDisk, match="no writable disk"):
        choose_disks([one(read_only=True)], None, OLD)


@pytest.mark.parametrize("handle", ["node1", "drive1", "/machine/x", "name1"])
def test_a_disk_may_be_named_by_node_drive_device_or_default_name(handle: str) -> None:
    disk = one(name=DiskName("name1"), device="drive1", qdev=QdevPath("/machine/x"), node=NodeName("node1"))
    (chosen,) = choose_disks([one(), disk], {DiskName("root"): NodeName(handle)}, OLD)
    assert chosen == replace(disk, name=DiskName("root"))


def test_an_unknown_disk_is_refused_with_a_list_of_those_there_are() -> None:
    with pytest.raises(UnknownDisk) as caught:
        choose_disks([one()], {DiskName("root"): NodeName("nope")}, OLD)
    assert "'nope'" in str(caught.value)
    assert "vda (node n)" in str(caught.value)


def test_one_disk_cannot_be_named_twice() -> None:
    with pytest.raises(ConfigError, match="a and b are the same disk"):
        choose_disks([one()], {DiskName("a"): NodeName("n"), DiskName("b"): NodeName("vda")}, OLD)


def test_names_that_qemu_could_not_tell_apart_are_refused() -> None:
    disks = [one(name=DiskName(f"disk{number}"), qdev=QdevPath(f"d{number}")) for number in range(2000)]
    with pytest.raises(ConfigError, match="same name in QEMU"):
        choose_disks(disks, None, OLD)


# --- what is below a filter


def test_the_disk_below_our_filter_is_seen_in_either_of_qemus_answers() -> None:
    block_graph = {
        "nodes": [
            {"id": 1, "type": "block-backend", "name": "/machine/peripheral/vda/virtio-backend"},
            {"id": 2, "type": "block-driver", "name": FILTER},
            {"id": 4, "type": "block-driver", "name": "disk2"},
            {"id": 5, "type": "block-driver", "name": "fleece"},
            {"id": 6, "type": "block-driver", "name": "throttle"},
        ],
        "edges": [
            {"name": "root", "parent": 1, "child": 2},
            {"name": "file", "parent": 2, "child": 4},
            {"name": "target", "parent": 2, "child": 5},
            {"name": "file", "parent": 6, "child": 4},
        ],
    }
    named = [{"node-name": FILTER, "children": [
        {"child": "target", "node-name": "fleece"}, {"child": "file", "node-name": "disk2"}
    ]}, {"node-name": "throttle", "children": [{"child": "file", "node-name": "disk2"}]}]  # fmt: skip
    assert below_filters([], block_graph) == below_filters(named) == {FILTER: "disk2"}
    (disk,) = list_disks([entry(FILTER, qdev="vda")], below_filters(named))
    assert (disk.node, disk.hidden_below) == ("disk2", "")


def test_a_filter_that_hides_its_disk_is_told_apart_from_an_empty_drive() -> None:
    (disk,) = list_disks([entry(FILTER, qdev="vda")])
    assert (disk.node, disk.hidden_below) == ("", FILTER)


# --- asking


async def test_a_disk_that_is_passed_through_is_known_by_its_device_and_refused(fake: FakeQemu) -> None:
    fake.add_disk("disk1", VIRTIO.format("vda"))
    fake.add_disk("disk2", "sg0")
    fake.qom["/machine/peripheral/sg0"] = {"type": "scsi-block", "parent_bus": "/machine/peripheral/hba/hba.0"}
    async with fake.connect() as client:
        capabilities = await query_capabilities(client)
        disks = await discover(client, capabilities)
    assert [disk.model for disk in disks] == ["virtio-blk-device", "scsi-block"]
    with pytest.raises(DiskUnsupported, match=r"sg0 .*scsi-block"):
        choose_disks(disks, None, capabilities)
    assert [disk.name for disk in choose_disks(disks, {DiskName("a"): NodeName("disk1")}, capabilities)] == ["a"]


async def test_disks_are_discovered_through_our_filter(fake: FakeQemu) -> None:
    fake.add_disk("disk1", VIRTIO.format("vda"))
    fake.devices["cd"] = Device("cd", "ide1-cd0", None, removable=True, tray=True)
    fake.qom["/machine/peripheral/cd"] = {"type": "ide-cd"}
    async with fake.connect() as client:
        capabilities = await query_capabilities(client)
        before = await discover(client, capabilities)
        fake.execute(
            "blockdev-add", {"driver": "file", "node-name": fleece_node(PAIR, DiskName("vda")), "filename": "f"}
        )
        fake.execute(
            "blockdev-add",
            {
                "driver": "copy-before-write",
                "node-name": FILTER,
                "file": "disk1",
                "target": fleece_node(PAIR, DiskName("vda")),
            },
        )
        fake.execute("qom-set", {"path": VIRTIO.format("vda"), "property": "drive", "value": FILTER})
        after = await discover(client, capabilities)
    assert [(disk.name, disk.node, disk.iothread) for disk in after] == [
        ("vda", "disk1", False),
        ("cd", "", False),
    ]
    assert after == (replace(before[0], driver="copy-before-write"), before[1])


@pytest.mark.parametrize(
    ("tree", "answer"),
    [
        ({"d": {"type": "virtio-blk-device", "iothread": "/objects/io0"}}, True),
        ({"d": {"type": "virtio-blk-device", "iothread": "", "parent_bus": "/machine/peripheral/h/bus"}}, False),
        ({"d": {"type": "virtio-blk-device", "iothread": "", "iothread-vq-mapping": [{"iothread": "a"}]}}, True),
        ({"d": {"type": "virtio-blk-device", "iothread": "", "iothread-vq-mapping": []}}, False),
        (
            {
                "d": {"type": "scsi-hd", "parent_bus": "/machine/peripheral/h/h.0"},
                "h": {"type": "virtio-scsi-device", "iothread": "/objects/io0"},
            },
            True,
        ),
        (
            {
                "d": {"type": "scsi-hd", "parent_bus": "/machine/peripheral/h/h.0"},
                "h": {"type": "virtio-scsi-device", "iothread": ""},
            },
            False,
        ),
        (
            {
                "d": {"type": "ide-hd", "parent_bus": "/machine/peripheral/h/ide.0"},
                "h": {"type": "piix3-ide", "parent_bus": "/machine/peripheral/p/pci.0"},
                "p": {"type": "pci-bridge"},
            },
            False,
        ),
        ({"d": {"type": "xen-disk", "iothread": ""}}, True),
        ({"d": {"type": "scsi-hd", "parent_bus": "/machine/peripheral/gone/h.0"}}, None),
        ({}, None),
    ],
)
async def test_an_iothread_is_found_at_the_device_or_its_controller(
    fake: FakeQemu, tree: dict[str, dict[str, Any]], answer: bool | None
) -> None:
    for name, properties in tree.items():
        fake.qom[f"/machine/peripheral/{name}"] = properties
    async with fake.connect() as client:
        assert await in_iothread(client, "d") is answer
