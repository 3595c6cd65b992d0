"""What is decided about an epoch before anything is sent: pure functions over QEMU's answers."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.core.errors import ConfigError, GraphChanged
from qemu_remus.core.model import BitmapName, DiskName, EpochNumber, Generation, NodeName, QdevPath, pair_name
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.client import PeerCredentials
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.epoch import BitmapLook, DeviceLook
from qemu_remus.qemu.nbd_server import listening_paths, socket_path
from qemu_remus.qemu.nodes import WINDOW, BitmapIdentity, access_node, filter_node, map_node, scratch_bitmap
from qemu_remus.qemu.process import owner_of

PAIR = pair_name("web")
GENERATION = Generation(UUID(int=7))
GIB = 1 << 30


def identity(number: int, *, pair: str = "web") -> BitmapIdentity:
    return BitmapIdentity(pair_name(pair), GENERATION, None, EpochNumber(number))


def disk(name: str, size: int = GIB) -> VmDisk:
    qdev = QdevPath(f"/machine/peripheral/{name}/virtio-backend")
    return VmDisk(DiskName(name), name, qdev, NodeName(f"{name}-node"), size, False, False, "raw", "", False)


def look(*names: str, count: int = 4096) -> dict[BitmapName, BitmapLook]:
    return {BitmapName(name): BitmapLook(BitmapName(name), count, 4096, True, False) for name in names}


A, B = disk("a"), disk("b")


@pytest.mark.parametrize(
    ("size", "granularity"),
    [(512, 4096), (100 * GIB, 4096), (128 * GIB, 4096), (128 * GIB + 1, 8192), (2048 * GIB, 65536)],
)
def test_granularity_grows_with_the_disk_beyond_128_gib(size: int, granularity: int) -> None:
    assert epoch.granularity_for(size) == granularity


@given(st.integers(1, 1 << 55))
def test_no_bitmap_has_more_bits_than_can_be_merged_quickly(size: int) -> None:
    granularity = epoch.granularity_for(size)
    assert granularity in commands.BITMAP_GRANULARITIES
    assert -(-size // granularity) <= 1 << 25


@given(st.sets(st.integers(0, 300)), st.sampled_from([4096, 65536, 131072]), st.integers(1, 300 * 4096))
def test_the_fleece_bound_covers_every_cluster_that_a_dirty_block_touches(
    blocks: set[int], granularity: int, size: int
) -> None:
    dirty = {block for block in blocks if block * granularity < size}
    count = sum(min(granularity, size - block * granularity) for block in dirty)
    clusters = {
        cluster
        for block in dirty
        for cluster in range(
            block * granularity // epoch.CLUSTER, -(-min((block + 1) * granularity, size) // epoch.CLUSTER)
        )
    }
    assert len(clusters) * epoch.CLUSTER <= epoch.fleece_bound(size, count, granularity)


def test_a_write_between_two_actions_is_recorded_twice_and_never_zero_times() -> None:
    actions = [(action.type, action.data["name"]) for action in epoch.rotation([A], identity(1), identity(2))]
    assert actions == [
        ("block-dirty-bitmap-add", identity(2).name),
        ("block-dirty-bitmap-disable", identity(1).name),
    ]


def test_merging_adds_before_it_merges_and_removes_only_what_was_merged() -> None:
    nodes = {A.node: look(identity(1).name, identity(2).name, "other-tools"), B.node: look(identity(2).name)}
    actions = epoch.merging([A, B], nodes, [identity(1), identity(2)], identity(3))
    assert [(action.data["node"], action.type.removeprefix("block-dirty-bitmap-")) for action in actions] == [
        ("a-node", "add"),
        ("a-node", "merge"),
        ("a-node", "remove"),
        ("a-node", "remove"),
        ("b-node", "add"),
        ("b-node", "merge"),
        ("b-node", "remove"),
    ]
    assert all("other-tools" not in str(action.data) for action in actions)


def test_merging_into_a_bitmap_that_is_there_neither_adds_nor_removes_it() -> None:
    actions = epoch.merging(
        [A], {A.node: look(identity(1).name, identity(3).name)}, [identity(1), identity(3)], identity(3)
    )
    assert [action.type for action in actions] == ["block-dirty-bitmap-merge", "block-dirty-bitmap-remove"]
    assert actions[0].data["bitmaps"] == [identity(1).name]


def test_a_disk_whose_node_is_gone_has_nothing_to_merge() -> None:
    assert epoch.merging([A], {}, [identity(1)], identity(2)) == []


def test_a_disk_without_any_of_the_old_bitmaps_just_begins_the_new_one() -> None:
    (action,) = epoch.merging([A], {A.node: {}}, [identity(1)], identity(2))
    assert action.type == "block-dirty-bitmap-add"


def test_removal_gives_back_a_node_only_where_our_filter_is() -> None:
    ours, access = filter_node(PAIR, A.name, EpochNumber(4)), access_node(PAIR, A.name, EpochNumber(4))
    theirs = filter_node(pair_name("db"), B.name, EpochNumber(4))
    devices: dict[str, DeviceLook] = {A.qdev: DeviceLook(ours, {}), B.qdev: DeviceLook(NodeName("overlay"), {})}
    nodes = dict.fromkeys([ours, access, theirs, A.node, B.node, NodeName("overlay")], look())
    steps = epoch.removal(PAIR, [A, B], devices, nodes)
    assert [(step.name, *step.arguments.values()) for step in steps] == [
        ("blockdev-del", access),
        ("qom-set", A.qdev, "drive", A.node),
        ("blockdev-del", ours),
    ]


def test_a_device_that_has_its_own_node_never_gets_it_again() -> None:
    """QEMU would abort."""
    stray = filter_node(PAIR, A.name, EpochNumber(4))
    steps = epoch.removal(PAIR, [A], {A.qdev: DeviceLook(A.node, {})}, {stray: {}, A.node: {}})
    assert [step.name for step in steps] == ["blockdev-del"]


def test_what_a_push_was_cut_short_in_is_removed_after_the_filter() -> None:
    window = scratch_bitmap(PAIR, WINDOW).name
    ours, image = filter_node(PAIR, A.name, WINDOW), map_node(PAIR, A.name)
    nodes = {ours: look(), image: look("map"), A.node: look(window, identity(1).name), B.node: look(identity(1).name)}
    steps = epoch.removal(PAIR, [A, B], {A.qdev: DeviceLook(ours, {})}, nodes)
    assert [(step.name, *step.arguments.values()) for step in steps] == [
        ("blockdev-del", image),
        ("qom-set", A.qdev, "drive", A.node),
        ("blockdev-del", ours),
        ("block-dirty-bitmap-remove", A.node, window),
    ]
    assert epoch.inserted_nodes(PAIR, nodes) == sorted([ours, image])


def test_a_device_with_a_bare_id_is_the_one_below_peripheral() -> None:
    answer = [{"device": "", "qdev": "ide0", "inserted": {"node-name": "n"}}]
    assert epoch.look_at_devices(answer) == {"/machine/peripheral/ide0": DeviceLook(NodeName("n"), {})}


@pytest.mark.parametrize(
    ("devices", "says"),
    [
        ({}, "disk a is gone"),
        ({A.qdev: DeviceLook(None, {})}, "disk a is gone"),
        ({A.qdev: DeviceLook(NodeName("snap1"), {})}, "snap1, where a-node was expected"),
    ],
)
def test_a_changed_graph_is_named(devices: dict[str, DeviceLook], says: str) -> None:
    with pytest.raises(GraphChanged, match=says):
        epoch.check_graph([A], devices)


def test_a_bitmap_removed_behind_our_back_is_not_an_empty_one() -> None:
    devices: dict[str, DeviceLook] = {
        A.qdev: DeviceLook(A.node, look(identity(1).name)),
        B.qdev: DeviceLook(B.node, {}),
    }
    with pytest.raises(GraphChanged, match="disk b has lost its dirty bitmap"):
        epoch.dirty_disks([A, B], devices, identity(1))


def test_a_bitmap_that_only_counted_clusters_is_never_taken_for_a_record() -> None:
    names = [
        identity(10).name,
        identity(9).name,
        scratch_bitmap(PAIR, EpochNumber(9)).name,
        identity(3, pair="db").name,
    ]
    assert epoch.identities(PAIR, [*map(BitmapName, names), BitmapName("x")]) == (identity(9), identity(10))


NET_UNIX = """\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 20137 /run/qr/qemu-remus-nbd-0123abcd-77.sock
0000000000000000: 00000003 00000000 00000000 0001 03 20138 /run/qr/qemu-remus-nbd-0123abcd-77.sock
0000000000000000: 00000002 00000000 00010000 0001 01 20139 /run/x y/qemu-remus-nbd-00000000-1.sock
0000000000000000: 00000002 00000000 00010000 0001 01 20140 /run/other.sock
0000000000000000: 00000002 00000000 00010000 0001 01 20141
"""


def test_only_listening_sockets_with_our_names_are_candidates() -> None:
    assert [path.parent.name for path in listening_paths(NET_UNIX)] == ["qr", "x y"]


def test_a_socket_path_that_is_too_long_is_refused_before_qemu_sees_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="107 bytes"):
        socket_path(tmp_path / ("y" * 80), PAIR, PeerCredentials(1, 0, 0))


def test_a_threads_owner_is_the_process_with_its_effective_ids(tmp_path: Path) -> None:
    proc = tmp_path
    (proc / "71").mkdir()
    (proc / "71" / "status").write_text("Name:\tCPU 0/TCG\nTgid:\t70\nUid:\t0\t64055\t0\t0\nGid:\t0\t64056\t0\t0\n")
    assert owner_of(71, proc) == PeerCredentials(70, 64055, 64056)
    assert owner_of(72, proc) is None
