"""Which disks go on being protected when the VM's disks change: known again by their device, the others never left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from qemu_remus.core.errors import GraphChanged
from qemu_remus.core.model import DiskName, EpochNumber, NodeName, PairName, QdevPath
from qemu_remus.qemu import epoch
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.nodes import filter_node
from qemu_remus.qemu.survey import Findings, choose_again, news, signature
from tests.test_qemu_disks import OLD


def disk(name: str, *, node: str = "", size: int = 1 << 20, **fields: Any) -> VmDisk:
    return VmDisk(
        name=DiskName(name),
        device="",
        qdev=QdevPath(f"/machine/peripheral/{name}/virtio-backend"),
        node=NodeName(node or f"{name}-node"),
        size=size,
        read_only=False,
        removable=False,
        driver="raw",
        filename=f"/images/{name}",
        iothread=False,
        **fields,
    )


A, B, C = disk("a"), disk("b"), disk("c")


def again(
    *present: VmDisk, known: tuple[VmDisk, ...] = (A, B), wanted: Mapping[DiskName, NodeName] | None = None, **more: Any
) -> Findings:
    return choose_again(known, present, wanted, OLD, **more)


def test_the_same_disks_are_the_same_in_whatever_order_qemu_names_them() -> None:
    found = again(B, A)
    assert found == Findings((A, B))
    assert news((A, B), found) == ""


def test_a_new_one_comes_last_and_one_that_is_gone_is_missed() -> None:
    found = again(C, B)
    assert found.disks == (B, C)
    assert news((A, B), found) == "disk a is gone; disk c (1048576 bytes) is new"


def test_a_disk_on_another_node_is_the_same_disk() -> None:
    moved = replace(A, node=NodeName("overlay"))
    found = again(moved, B)
    assert found.disks == (moved, B)
    assert "disk a is on node overlay instead of a-node" in news((A, B), found)


def test_a_name_of_the_operators_is_kept_whatever_qemu_calls_it() -> None:
    known = replace(A, name=DiskName("root"))
    grown = replace(A, size=2 << 20)
    found = again(grown, C, known=(known,), wanted={DiskName("root"): A.node})
    assert found.disks == (replace(grown, name=DiskName("root")),)
    assert news((known,), found) == "disk root has 2097152 bytes, where it had 1048576"


@pytest.mark.parametrize("handle", ["c-node", "c"])
def test_a_disk_that_was_asked_for_comes_back(handle: str) -> None:
    found = again(A, B, C, wanted={DiskName("a"): A.node, DiskName("x"): NodeName(handle)})
    assert [one.name for one in found.disks] == ["a", "b", "x"]


def test_a_disk_that_cannot_be_protected_does_not_stop_the_others() -> None:
    nameless = replace(C, node=NodeName(""))
    found = again(A, replace(B, read_only=True), nameless)
    assert found.disks == (A,)
    assert {one.name for one in found.outside} == {"b", "c"}
    assert "no name" in found.outside[1].reason
    assert "disk b is not protected any more: it is read-only" in news((A, B), found)


def test_what_nobody_expects_to_be_protected_is_not_spoken_of() -> None:
    assert again(A, B, replace(C, removable=True), replace(disk("d"), size=0)).outside == ()


def test_a_disk_that_is_left_out_is_said_to_be() -> None:
    found = again(A, B, C, leave_out={DiskName("c")})
    assert found.disks == (A, B)
    assert [one.name for one in found.outside] == ["c"]


def test_two_of_one_name_are_not_both_protected() -> None:
    twin = replace(disk("z"), name=DiskName("a"))
    found = again(A, twin)
    assert found.disks == (A,)
    assert [one.node for one in found.outside] == ["z-node"]


# --- seeing a change -------------------------------------------------------------------------------------------------


def entry(one: VmDisk, *, node: str = "", **fields: Any) -> dict[str, Any]:
    inserted = {"node-name": node or one.node, "ro": one.read_only, "image": {"virtual-size": one.size}}
    return {"qdev": one.qdev, "removable": False, "inserted": inserted, **fields}


def test_our_own_filter_is_no_change() -> None:
    over = filter_node(PairName("vm"), A.name, EpochNumber(7))
    assert signature([entry(A, node=over), entry(B)], (A, B)) == signature([entry(A), entry(B)], (A, B))


@pytest.mark.parametrize(
    "after",
    [
        [entry(A)],
        [entry(A), entry(B), entry(C)],
        [entry(A, node="overlay"), entry(B)],
        [entry(replace(A, size=4096)), entry(B)],
        [entry(replace(A, read_only=True)), entry(B)],
        [entry(A), {"qdev": B.qdev, "removable": False}],
    ],
    ids=["gone", "new", "moved", "resized", "read-only", "no medium"],
)
def test_every_change_is_seen(after: list[dict[str, Any]]) -> None:
    assert signature(after, (A, B)) != signature([entry(A), entry(B)], (A, B))


def test_a_medium_that_is_changed_in_a_cdrom_drive_is_none_of_our_business() -> None:
    before = [entry(A), entry(C, removable=True)]
    assert signature(before, (A,)) == signature([entry(A)], (A,))


@pytest.mark.parametrize("size", [512, 2 << 20])
def test_a_disk_of_another_size_is_noticed_at_the_next_checkpoint(size: int) -> None:
    looks = epoch.look_at_devices([entry(replace(A, size=size))])
    with pytest.raises(GraphChanged, match=f"disk a has {size} bytes, where it had 1048576"):
        epoch.check_graph([A], looks)
