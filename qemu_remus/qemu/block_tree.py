"""QEMU's block graph below each disk of the guest, as trees that can be read and drawn.

Pure: made from the answers to ``query-named-block-nodes`` and, where QEMU has it, ``x-debug-query-block-graph``, which
also shows who else uses a node.  What is ours is told by its name alone (:mod:`qemu_remus.qemu.nodes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from qemu_remus.core.model import NodeName
from qemu_remus.core.text import one_line, size
from qemu_remus.qemu.nodes import BitmapIdentity, Kind, is_ours, kind_of

_DEPTH: Final = 64
"""A chain of backing files can be long; a graph that never ends is none."""

FILTERS: Final = frozenset(
    {
        "blkdebug",
        "blklogwrites",
        "blkreplay",
        "blkverify",
        "commit_top",
        "compress",
        "copy-before-write",
        "copy-on-read",
        "mirror_top",
        "preallocate",
        "replication",
        "snapshot-access",
        "throttle",
    }
)
"""Drivers that hold no data of their own: what is written to them arrives below."""

_OURS: Final[Mapping[Kind, str]] = {
    Kind.FILTER: "replication filter",
    Kind.FLEECE: "fleece",
    Kind.ACCESS: "the checkpoint's view",
    Kind.EXPORT: "export",
}


@dataclass(frozen=True, slots=True)
class TreeBitmap:
    """A dirty bitmap.

    :param granularity: bytes that one bit stands for.
    :param dirty: bytes marked.
    :param ours: made by a qemu-remus.
    :param inconsistent: QEMU was not closed cleanly; it can only be removed.
    :param busy: an export or a job has it.
    """

    name: str
    granularity: int
    dirty: int
    ours: bool
    recording: bool = False
    persistent: bool = False
    inconsistent: bool = False
    busy: bool = False


@dataclass(frozen=True, slots=True)
class TreeNode:
    """One node of the block graph, with everything below it.

    :param edge: what it is to the node above: ``file``, ``backing``, ...; empty for the one that the device has.
    :param filename: as QEMU names it; empty for a node that is no file, such as ``null-co``.
    :param size: bytes, as whoever reads it sees it.
    :param allocated: bytes that it takes where it is stored; None where QEMU does not say.
    :param filter: it holds no data of its own.
    :param ours: made by a qemu-remus.
    :param corrupt: qcow2 says that its metadata is damaged.
    :param users: who uses it besides the node above, or the device: other devices, nodes, exports, jobs.
    :param writers: those of ``users`` that may write.
    """

    edge: str
    node: NodeName
    driver: str
    filename: str
    size: int
    allocated: int | None
    read_only: bool
    filter: bool
    ours: bool
    corrupt: bool
    bitmaps: tuple[TreeBitmap, ...]
    users: tuple[str, ...]
    writers: tuple[str, ...]
    children: tuple[TreeNode, ...]

    def walk(self) -> Iterator[TreeNode]:
        """This node and all below it, in the order in which they are drawn."""
        yield self
        for child in self.children:
            yield from child.walk()

    def files(self) -> tuple[str, ...]:
        """Names of the files and devices below it that the guest's writes go to; backing files and fleeces do not."""
        below = [child for child in self.children if child.edge not in ("backing", "target")]
        if below:
            return tuple(name for child in below for name in child.files())
        return (self.filename,) if self.filename else ()


@dataclass(frozen=True, slots=True)
class _Edge:
    name: str
    child: str
    write: bool


class BlockTrees:
    """Makes the trees.

    :param named_nodes: the answer to ``query-named-block-nodes`` with ``flat``.
    :param block_graph: the answer to ``x-debug-query-block-graph``; None where QEMU has none.
    """

    def __init__(self, named_nodes: Iterable[Mapping[str, Any]], block_graph: Mapping[str, Any] | None = None) -> None:
        self._nodes = {node["node-name"]: node for node in named_nodes if "node-name" in node}
        self._edges: dict[str, list[_Edge]] = {}
        self._users: dict[str, list[tuple[str, _Edge]]] = {}
        for node in self._nodes.values():
            for child in node.get("children", ()):
                if "node-name" in child:
                    self._add(node["node-name"], _Edge(child["child"], child["node-name"], write=False))
        if block_graph is not None:
            self._read(block_graph)

    def _read(self, graph: Mapping[str, Any]) -> None:
        self._edges.clear()
        self._users.clear()
        names = {node["id"]: node["name"] for node in graph["nodes"]}
        nodes = {node["id"] for node in graph["nodes"] if node["type"] == "block-driver"}
        kinds = {node["id"]: node["type"] for node in graph["nodes"]}
        for edge in graph["edges"]:
            child = names.get(edge["child"], "")
            link = _Edge(edge["name"], child, write="write" in edge.get("perm", ()))
            if edge["parent"] in nodes:
                self._add(names[edge["parent"]], link)
            else:
                kind = "job " if kinds.get(edge["parent"]) == "block-job" else ""
                self._users.setdefault(child, []).append((kind + names.get(edge["parent"], ""), link))

    def _add(self, parent: str, edge: _Edge) -> None:
        self._edges.setdefault(parent, []).append(edge)
        self._users.setdefault(edge.child, []).append((parent, edge))

    def below(self, node: str, device: Sequence[str] = ()) -> TreeNode | None:
        """The tree of the node that a device has; None where QEMU does not show the node.

        :param device: the names under which the block graph may show that device itself.
        """
        if node not in self._nodes:
            return None
        return self._tree(node, "", frozenset(device), _DEPTH)

    def _tree(self, name: str, edge: str, above: frozenset[str], depth: int) -> TreeNode:
        info = self._nodes.get(name, {})
        image = info.get("image", {})
        users = [(user, link) for user, link in self._users.get(name, ()) if user not in above]
        below = sorted(self._edges.get(name, ()), key=lambda link: (link.name != "file", link.name))
        return TreeNode(
            edge=edge,
            node=NodeName(name),
            driver=info.get("drv", "?"),
            filename=_filename(info),
            size=image.get("virtual-size", 0),
            allocated=image.get("actual-size"),
            read_only=info.get("ro", False),
            filter=info.get("drv", "") in FILTERS,
            ours=is_ours(name),
            corrupt=bool(image.get("format-specific", {}).get("data", {}).get("corrupt", False)),
            bitmaps=tuple(_bitmap(entry) for entry in info.get("dirty-bitmaps", ()) if entry.get("name")),
            users=tuple(user or "somebody without a name" for user, _ in users),
            writers=tuple(user or "somebody without a name" for user, link in users if link.write),
            children=tuple(
                self._tree(link.child, link.name, frozenset({name}), depth - 1)
                for link in below
                if depth > 0 and link.child
            ),
        )


def _filename(info: Mapping[str, Any]) -> str:
    name: str = info.get("image", {}).get("filename", "") or info.get("file", "")
    # A "json:" name describes a tree; the nodes below have the names.
    return "" if name.startswith("json:") else name


def _bitmap(entry: Mapping[str, Any]) -> TreeBitmap:
    return TreeBitmap(
        name=entry["name"],
        granularity=entry.get("granularity", 0),
        dirty=entry.get("count", 0),
        ours=is_ours(entry["name"]),
        recording=entry.get("recording", False),
        persistent=entry.get("persistent", False),
        inconsistent=entry.get("inconsistent", False),
        busy=entry.get("busy", False),
    )


# --- drawing


def draw(tree: TreeNode) -> list[str]:
    """The tree as lines, with box characters; at most some 100 columns where the names allow it."""
    rows = list(_rows(tree, "", "", ""))
    width = min(max(len(left) for left, _ in rows), 44)
    return [one_line_keeping_indent(f"{left:<{width}}  {right}".rstrip()) for left, right in rows]


def one_line_keeping_indent(line: str) -> str:
    """:func:`one_line` of what follows the spaces at the beginning, with runs of spaces kept."""
    return "".join(character if character.isprintable() else "?" for character in line)


def _rows(node: TreeNode, first: str, rest: str, above: str) -> Iterator[tuple[str, str]]:
    edge = f"{node.edge}: " if node.edge not in ("", "file") else ""
    yield f"{first}{edge}{node.node}", _about(node, above)
    items = len(node.bitmaps) + len(node.children)
    for bitmap in node.bitmaps:
        items -= 1
        yield f"{rest}{'├─' if items else '└─'} bitmap {_short(bitmap)}", _about_bitmap(bitmap)
    for child in node.children:
        items -= 1
        yield from _rows(child, rest + ("├─ " if items else "└─ "), rest + ("│  " if items else "   "), node.filename)


def _about(node: TreeNode, above: str) -> str:
    # A format's node has the name of its file, which the line below shows.
    named_below = any(child.filename == node.filename for child in node.children)
    parts = [node.driver]
    if node.ours:
        kind = kind_of(node.node)
        parts.append("ours" if kind is None else f"our {_OURS.get(kind, kind.name.lower())}")
    elif node.filter:
        parts.append("filter")
    if node.filename and not named_below:
        parts.append(one_line(node.filename))
    if not node.children:
        parts.append(size(node.size))
        if node.allocated is not None and node.allocated < node.size:
            parts.append(f"{size(node.allocated)} in use")
    if node.read_only:
        parts.append("read-only")
    if node.corrupt:
        parts.append("CORRUPT")
    if node.users:
        parts.append(f"also used by {', '.join(node.users)}")
    return ", ".join(parts)


def _short(bitmap: TreeBitmap) -> str:
    identity = BitmapIdentity.parse(bitmap.name)
    if identity is None:
        return bitmap.name
    return f"of pair {identity.pair}, epoch {identity.epoch}"


def _about_bitmap(bitmap: TreeBitmap) -> str:
    parts = ["ours" if bitmap.ours else "somebody else's"]
    if bitmap.inconsistent:
        parts.append("INCONSISTENT")
    else:
        parts.append(f"{size(bitmap.dirty)} dirty by {size(bitmap.granularity)}")
        parts.append("recording" if bitmap.recording else "not recording")
    if bitmap.persistent:
        parts.append("persistent")
    if bitmap.busy:
        parts.append("in use")
    return ", ".join(parts)
