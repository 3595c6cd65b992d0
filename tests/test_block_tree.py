"""The block graph as trees: nothing that is there is left out, whose it is is said, and any graph can be drawn."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qemu_remus.qemu.block_tree import BlockTrees, TreeNode, draw

OURS = "qemu-remus-01234567-f0123000001"
OUR_BITMAP = "qemu-remus.p.00000000000000000000000000000abc.none.7"


def node(name: str, driver: str = "raw", filename: str = "/img/a", **more: Any) -> dict[str, Any]:
    image = {"virtual-size": 1 << 30, "actual-size": 1 << 20, "filename": filename}
    return {"node-name": name, "drv": driver, "ro": False, "image": image, **more}


def graph(*edges: tuple[str, str, str], devices: dict[str, str] | None = None, jobs: tuple[str, ...] = ()) -> Any:
    """``x-debug-query-block-graph`` of ``(parent, edge, child)`` and of devices with the node that they have."""
    ids: dict[str, int] = {}
    types: dict[str, str] = {}
    users = devices or {}
    for parent, _, child in edges:
        types.setdefault(parent, "block-driver")
        types.setdefault(child, "block-driver")
    for device, child in users.items():
        types[device] = "block-job" if device in jobs else "block-backend"
        types.setdefault(child, "block-driver")
    for name in types:
        ids[name] = len(ids) + 1
    links = [*edges, *((device, "root", child) for device, child in users.items())]
    return {
        "nodes": [{"id": ids[name], "type": kind, "name": name} for name, kind in types.items()],
        "edges": [
            {"parent": ids[parent], "name": edge, "child": ids[child], "perm": ["write"], "shared-perm": []}
            for parent, edge, child in links
        ],
    }


def tree(nodes: list[dict[str, Any]], top: str, edges: Any = None, *device: str) -> TreeNode:
    found = BlockTrees(nodes, edges).below(top, device)
    assert found is not None
    return found


def test_a_chain_with_a_backing_file_is_drawn_as_a_tree() -> None:
    nodes = [
        node("disk", "qcow2", "/img/top.qcow2"),
        node("file", "file", "/img/top.qcow2"),
        node("base", "raw", "/img/base.raw", ro=True),
        node("base-file", "file", "/img/base.raw", ro=True),
    ]
    edges = graph(("disk", "backing", "base"), ("base", "file", "base-file"), ("disk", "file", "file"))
    assert draw(tree(nodes, "disk", edges)) == [
        "disk              qcow2",
        "├─ file           file, /img/top.qcow2, 1.0 GiB, 1.0 MiB in use",
        "└─ backing: base  raw, read-only",
        "   └─ base-file   file, /img/base.raw, 1.0 GiB, 1.0 MiB in use, read-only",
    ]


def test_the_files_that_the_guest_writes_to_are_those_below_file() -> None:
    nodes = [node(name, filename=f"/img/{name}") for name in ("disk", "top", "base", "fleece")]
    edges = graph(("disk", "file", "top"), ("disk", "backing", "base"), ("disk", "target", "fleece"))
    assert tree(nodes, "disk", edges).files() == ("/img/top",)


def test_what_is_ours_is_told_from_what_is_somebody_elses() -> None:
    bitmaps = [
        {"name": OUR_BITMAP, "granularity": 4096, "count": 8192, "recording": True},
        {"name": "nightly", "granularity": 65536, "count": 0, "persistent": True, "busy": True},
        {"name": "old", "inconsistent": True, "persistent": True},
        {"granularity": 65536, "count": 0},
    ]
    nodes = [node(OURS, "copy-before-write"), node("disk") | {"dirty-bitmaps": bitmaps}]
    lines = draw(tree(nodes, OURS, graph((OURS, "file", "disk"))))
    assert "our replication filter" in lines[0]
    assert [line.split(None, 1)[1] for line in lines[2:]] == [
        "bitmap of pair p, epoch 7  ours, 8.0 KiB dirty by 4.0 KiB, recording",
        "bitmap nightly             somebody else's, 0 B dirty by 64.0 KiB, not recording, persistent, in use",
        "bitmap old                 somebody else's, INCONSISTENT, persistent",
    ]


def test_filters_of_others_and_corrupt_images_are_said_to_be_so() -> None:
    corrupt = {"type": "qcow2", "data": {"corrupt": True}}
    image = {"virtual-size": 1, "filename": "", "format-specific": corrupt}
    nodes = [node("top", "throttle"), {"node-name": "disk", "drv": "qcow2", "image": image}]
    first, second = draw(tree(nodes, "top", graph(("top", "file", "disk"))))
    assert "throttle, filter" in first
    assert "CORRUPT" in second


def test_other_users_of_a_node_are_named_and_the_device_itself_is_not() -> None:
    edges = graph(("other", "file", "disk"), devices={"/machine/vda": "disk", "vdb": "disk", "mirror": "disk"},
                  jobs=("mirror",))  # fmt: skip
    found = tree([node("disk")], "disk", edges, "/machine/vda")
    assert set(found.users) == {"other", "vdb", "job mirror"}
    assert "also used by" in draw(found)[0]


def test_without_the_experimental_query_the_children_in_the_nodes_serve() -> None:
    top = node("disk", children=[{"child": "file", "node-name": "file"}, {"child": "odd"}])
    assert [one.node for one in tree([top, node("file", "file")], "disk").walk()] == ["disk", "file"]


def test_a_node_that_is_not_shown_has_no_tree() -> None:
    assert BlockTrees([node("disk")]).below("") is None
    assert BlockTrees([node("disk")]).below("gone") is None


def test_a_name_cannot_command_the_terminal() -> None:
    (line,) = draw(tree([node("disk", filename="/img/\x1b[2Ja\nb")], "disk"))
    assert line.isprintable()


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["file", "backing", "x"]), st.integers(0, 5)), max_size=7))
def test_any_graph_can_be_drawn(pairs: list[tuple[int, str, int]]) -> None:
    # QEMU's graph has no cycles; children have greater numbers here.
    edges = graph(*((f"n{low}", edge, f"n{high}") for low, edge, high in pairs if low < high), devices={"vda": "n0"})
    lines = draw(tree([node(f"n{number}") for number in range(6)], "n0", edges, "vda"))
    assert lines
    assert all(line.isprintable() for line in lines)


def test_a_graph_that_never_ends_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qemu_remus.qemu.block_tree._DEPTH", 5)
    edges = graph(("a", "file", "b"), ("b", "file", "a"))
    assert len(draw(tree([node("a"), node("b")], "a", edges))) == 6
