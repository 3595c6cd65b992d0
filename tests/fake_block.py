"""The block graph of the fake QEMU: nodes, devices, bitmaps, filters, exports, jobs, and what QEMU refuses.

Owns the model and its commands (``_do_NAME``); knows neither connections nor time. What is modelled is what qemu-remus
uses, and ``integration/test_fake_qemu.py`` compares it with real QEMUs, command for command; what is not modelled is an
error of the test that sends it. What would abort QEMU is :class:`Abort`.
"""

from __future__ import annotations

import copy
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qemu_remus.qemu.schema import Schema

READ, WRITE, UNCHANGED, RESIZE = "consistent read", "write", "write unchanged", "resize"
ALL = frozenset({READ, WRITE, UNCHANGED, RESIZE})
Permissions = tuple[frozenset[str], frozenset[str]]
"""What a user of a node does with it, and what it lets others do; QEMU's ``include/block/block-common.h``."""

CLUSTER = 65536

VIRTIO = "/machine/peripheral/{}/virtio-backend"


class Refusal(Exception):
    """QEMU says no."""

    def __init__(self, desc: str, qmp_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.qmp_class = qmp_class


class Abort(Exception):
    """QEMU dies."""


@dataclass
class Bitmap:
    """A dirty bitmap; ``dirty`` holds the numbers of its dirty granules."""

    granularity: int
    recording: bool = True
    persistent: bool = False
    busy: int = 0
    read_only: bool = False
    """It is of an image that is only read: nothing may come into it."""
    dirty: set[int] = field(default_factory=set)


@dataclass
class Node:
    """A block node; ``children`` by QEMU's name of the edge."""

    name: str
    driver: str
    size: int
    read_only: bool = False
    filename: str = ""
    children: dict[str, str] = field(default_factory=dict)
    bitmaps: dict[str, Bitmap] = field(default_factory=dict)
    data: bytearray | None = None
    """What a disk holds, where a test has given it something; then jobs copy it."""
    readable: set[int] | None = None
    """Of a filter: the numbers of the clusters that its snapshot holds; None for all."""


def clusters_of(bitmap: Bitmap, size: int) -> set[int]:
    """The numbers of the clusters, of those that filters and jobs copy, that a bitmap touches.

    :param size: of the bitmap's node.
    """
    touched: set[int] = set()
    for granule in bitmap.dirty:
        start = granule * bitmap.granularity
        last = min(start + bitmap.granularity, size) - 1
        touched.update(range(start // CLUSTER, last // CLUSTER + 1))
    return touched


@dataclass
class Device:
    """A guest's device and the node that it has; None without a medium."""

    qdev: str
    device: str
    node: str | None
    removable: bool = False
    tray: bool = False
    properties: dict[str, Any] = field(default_factory=dict)


class FakeBlock:
    """The part of a QEMU that :class:`tests.fake_qemu.FakeQemu` adds a wire to.

    :ivar has: whether the schema has a path.
    """

    def __init__(self, schema: Schema) -> None:
        self.has = schema.has
        self.nodes: dict[str, Node] = {}
        self.devices: dict[str, Device] = {}
        self.qom: dict[str, dict[str, Any]] = {"/machine": {"type": "pc-q35-7.2-machine"}}
        self.exports: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.nbd: socket.socket | None = None
        self.nbd_path = ""
        self.stuck: set[str] = set()
        """Exports and jobs that never end when asked to."""

    def emit(self, event: str, **data: Any) -> None:
        """An event."""
        raise NotImplementedError

    # --- what tests do to it

    def add_disk(
        self,
        node: str,
        qdev: str,
        *,
        device: str = "",
        size: int = 1 << 20,
        read_only: bool = False,
        driver: str = "raw",
        iothread: str = "",
        filename: str = "",
    ) -> None:
        """A disk with its device; ``qdev`` as ``query-block`` names it."""
        self.nodes[node] = Node(node, driver, size, read_only, filename or f"/images/{node.strip('#')}.img")
        properties = {"type": "virtio-blk-device", "iothread": iothread, "parent_bus": "/machine/peripheral/x/bus"}
        self.devices[qdev] = Device(qdev, device, node, properties=properties)
        self.qom[qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"] = properties

    def put_over(self, qdev: str, name: str, driver: str = "qcow2") -> None:
        """Another tool puts a node over whatever the device has: an overlay, a throttle."""
        device = self.devices[qdev]
        assert device.node is not None
        below = self.nodes[device.node]
        edge = "backing" if driver == "qcow2" else "file"
        self.nodes[name] = Node(name, driver, below.size, filename=f"/images/{name}", children={edge: below.name})
        device.node = name

    def write(self, node: str, offset: int, length: int) -> None:
        """The guest writes to a disk: its recording bitmaps see it."""
        for bitmap in self.nodes[node].bitmaps.values():
            if bitmap.recording:
                last = (offset + length - 1) // bitmap.granularity
                bitmap.dirty.update(range(offset // bitmap.granularity, last + 1))

    def guest_write(self, qdev: str, offset: int, length: int) -> None:
        """The guest writes: through what is over the disk, down to it."""
        name = self.devices[qdev].node
        while name is not None:
            self.write(name, offset, length)
            name = self.nodes[name].children.get("file")

    def ours(self) -> list[str]:
        """All that a qemu-remus made: nodes, bitmaps, exports, jobs."""
        names = [*self.nodes, *self.exports, *self.jobs, *(b for node in self.nodes.values() for b in node.bitmaps)]
        return sorted(name for name in names if name.startswith("qemu-remus"))

    # the device tree

    def _properties(self, path: str) -> dict[str, Any]:
        if path not in self.qom:
            raise Refusal(f"Device '{path}' not found", "DeviceNotFound")
        return self.qom[path]

    def _do_qom_list(self, path: str) -> Any:
        return [{"name": name, "type": "str"} for name in self._properties(path)]

    def _do_qom_get(self, path: str, property: str) -> Any:
        properties = self._properties(path)
        if property not in properties:
            raise Refusal(f"Property '{properties['type']}.{property}' not found")
        return properties[property]

    def _do_qom_set(self, path: str, property: str, value: str) -> Any:
        self._properties(path)
        device = next(d for d in self.devices.values() if path.endswith(d.qdev))
        if property != "drive":
            raise Refusal(f"the fake knows no property {property}")
        if value == device.node:
            raise Abort("qom-set drive with the node that is attached already")
        before, device.node = device.node, self._node(value).name
        try:
            self._see_permitted()
        except Refusal:
            device.node = before
            raise
        return {}

    # nodes

    def _node(self, name: str) -> Node:
        if name not in self.nodes:
            raise Refusal(f"Cannot find device='{name}' nor node-name='{name}'")
        return self.nodes[name]

    def _users(self, name: str) -> list[str]:
        users = [device.qdev for device in self.devices.values() if device.node == name]
        users += [node.name for node in self.nodes.values() if name in node.children.values()]
        return users + [entry["id"] for entry in self.exports.values() if entry["node-name"] == name]

    def _see_permitted(self) -> None:
        """:raise Refusal: when two users of one node do not bear each other."""
        cache: dict[str, list[tuple[str, Permissions]]] = {}
        for name in self.nodes:
            users = self._permissions(name, cache)
            for user, (wanted, _) in users:
                for other, (_, shared) in users:
                    if user != other and not wanted <= shared:
                        what = ", ".join(sorted(wanted - shared))
                        raise Refusal(
                            f"Permission conflict on node '{name}': permissions '{what}' are both required by {user}"
                            f" and unshared by {other}"
                        )

    def _permissions(self, name: str, cache: dict[str, list[tuple[str, Permissions]]]) -> list[tuple[str, Permissions]]:
        """The users of a node, with what they do and what they bear."""
        if name not in cache:
            cache[name] = [
                # a device that may resize bears that somebody else does; share-rw is off
                (device.qdev, (frozenset({READ, WRITE}), ALL - {WRITE}))
                for device in self.devices.values()
                if device.node == name
            ]
            cache[name] += [
                (entry["id"], (frozenset({READ}), ALL)) for entry in self.exports.values() if entry["node-name"] == name
            ]
            for parent in self.nodes.values():
                for edge, child in parent.children.items():
                    if child == name:
                        cache[name].append((f"{parent.name}/{edge}", self._of_parent(parent, edge, cache)))
        return cache[name]

    def _of_parent(self, parent: Node, edge: str, cache: dict[str, list[tuple[str, Permissions]]]) -> Permissions:
        if edge == "target":
            return frozenset({WRITE}), ALL - {RESIZE}
        if parent.driver == "snapshot-access":
            # it reads past the filter's own children
            return frozenset(), ALL
        users = self._permissions(parent.name, cache)
        wanted = frozenset[str]().union(*(wanted for _, (wanted, _) in users))
        shared = ALL.intersection(*(shared for _, (_, shared) in users))
        if parent.driver == "copy-before-write" and users:
            return wanted | ({READ} if WRITE in wanted else set()), shared - {WRITE, RESIZE} | {UNCHANGED}
        return wanted, shared | {UNCHANGED}

    def _do_blockdev_add(self, driver: str, node_name: str, **options: Any) -> Any:
        if node_name in self.nodes:
            raise Refusal(f"Duplicate nodes with node-name='{node_name}'")
        if len(node_name) > 31:
            raise Refusal("Node name too long")
        if driver == "file":
            path = Path(options["filename"])
            size = path.stat().st_size if path.exists() else 1 << 40
            self.nodes[node_name] = Node(node_name, driver, size, filename=options["filename"])
            return {}
        below = self._node(options["file"])
        children = {"file": below.name}
        readable = None
        if driver == "copy-before-write":
            children["target"] = self._node(options["target"]).name
            if "bitmap" in options:
                owner = self._node(options["bitmap"]["node"])
                bitmap = self._bitmap(owner.name, options["bitmap"]["name"], change=True)
                readable = clusters_of(bitmap, owner.size)
        elif driver != "snapshot-access":
            raise AssertionError(f"the fake QEMU does not know driver {driver}: teach it")
        self.nodes[node_name] = Node(
            node_name, driver, below.size, filename=below.filename, children=children, readable=readable
        )
        try:
            self._see_permitted()
        except Refusal:
            del self.nodes[node_name]
            raise
        return {}

    def _do_blockdev_del(self, node_name: str) -> Any:
        if node_name not in self.nodes:
            raise Refusal(f"Failed to find node with node-name='{node_name}'")
        if self._users(node_name):
            raise Refusal(f"Node {node_name} is in use")
        del self.nodes[node_name]
        return {}

    def _info(self, node: Node) -> dict[str, Any]:
        info: dict[str, Any] = {
            "node-name": node.name,
            "drv": node.driver,
            "ro": node.read_only,
            "file": node.filename,
            "image": {"virtual-size": node.size, "filename": node.filename, "format": node.driver},
        }
        bitmaps = [
            {
                "name": name,
                # the last one counts whole, whatever the disk's end
                "count": len(b.dirty) * b.granularity,
                "granularity": b.granularity,
                "recording": b.recording,
                "busy": b.busy > 0,
                "persistent": b.persistent,
            }
            for name, b in node.bitmaps.items()
        ]
        if node.driver == "copy-before-write":
            nameless: dict[str, object] = {
                "count": 0,
                "granularity": 65536,
                "recording": False,
                "busy": False,
                "persistent": False,
            }
            bitmaps += [nameless, dict(nameless)]
        if bitmaps:
            info["dirty-bitmaps"] = bitmaps
        if self.has("query-named-block-nodes/ret-type/children"):
            info["children"] = [{"child": edge, "node-name": child} for edge, child in node.children.items()]
        return info

    def _do_query_block(self) -> Any:
        entries = []
        for device in self.devices.values():
            entry: dict[str, Any] = {
                "device": device.device,
                "locked": False,
                "removable": device.removable,
                "type": "unknown",
            }
            if device.qdev:
                entry["qdev"] = device.qdev
            if device.tray:
                entry["tray_open"] = False
            if device.node is not None:
                entry["inserted"] = self._info(self.nodes[device.node])
            entries.append(entry)
        return entries

    def _do_query_named_block_nodes(self, flat: bool = False) -> Any:
        assert flat, "without flat, the answer grows with the depth of the graph"
        return [self._info(node) for node in self.nodes.values()]

    def _do_x_debug_query_block_graph(self) -> Any:
        ids = {name: index for index, name in enumerate(self.nodes, start=1)}
        nodes = [{"id": index, "type": "block-driver", "name": name} for name, index in ids.items()]
        edges = [
            {"name": edge, "parent": ids[node.name], "child": ids[child], "perm": [], "shared-perm": []}
            for node in self.nodes.values()
            for edge, child in node.children.items()
        ]
        for index, device in enumerate(self.devices.values(), start=len(ids) + 1):
            nodes.append({"id": index, "type": "block-backend", "name": device.device or device.qdev})
            if device.node is not None:
                root = {"name": "root", "parent": index, "child": ids[device.node], "perm": [], "shared-perm": []}
                edges.append(root)
        return {"nodes": nodes, "edges": edges}

    # bitmaps

    def _bitmap(self, node: str, name: str, *, change: bool = False, alter: bool = False) -> Bitmap:
        """
        :param change: it must not be in use.
        :param alter: nor be of an image that is only read.
        """
        bitmaps = self._node(node).bitmaps
        if name not in bitmaps:
            raise Refusal(f"Dirty bitmap '{name}' not found")
        if (change or alter) and bitmaps[name].busy:
            raise Refusal(f"Bitmap '{name}' is currently in use by another operation and cannot be used")
        if alter and bitmaps[name].read_only:
            raise Refusal(f"Bitmap '{name}' is readonly and cannot be modified")
        return bitmaps[name]

    def _do_transaction(self, actions: list[dict[str, Any]]) -> Any:
        # the same bitmaps as they were: exports hold on to them
        before = {
            name: [(key, bitmap, copy.deepcopy(vars(bitmap))) for key, bitmap in node.bitmaps.items()]
            for name, node in self.nodes.items()
        }
        doomed: list[tuple[str, str]] = []
        try:
            for action in actions:
                data = {key.replace("-", "_"): value for key, value in action["data"].items()}
                if action["type"] == "block-dirty-bitmap-remove":
                    # it goes when all has succeeded; until then its name is taken, and nothing may be done with it
                    self._bitmap(**data, alter=True).busy += 1
                    doomed.append((data["node"], data["name"]))
                else:
                    getattr(self, "_do_" + action["type"].replace("-", "_"))(**data)
        except Refusal:
            for name, bitmaps in before.items():
                for _, bitmap, fields in bitmaps:
                    vars(bitmap).update(fields)
                self.nodes[name].bitmaps = {key: bitmap for key, bitmap, _ in bitmaps}
            raise
        for node, name in doomed:
            del self.nodes[node].bitmaps[name]
        return {}

    def _do_block_dirty_bitmap_add(
        self, node: str, name: str, granularity: int = 65536, disabled: bool = False, persistent: bool = False
    ) -> Any:
        if name in self._node(node).bitmaps:
            raise Refusal(f"Bitmap already exists: {name}")
        if persistent and self.nodes[node].driver != "qcow2":
            raise Refusal("Block format does not support persistent bitmaps")
        self.nodes[node].bitmaps[name] = Bitmap(granularity, recording=not disabled, persistent=persistent)
        return {}

    def _do_block_dirty_bitmap_disable(self, node: str, name: str) -> Any:
        self._bitmap(node, name, change=True).recording = False
        return {}

    def _do_block_dirty_bitmap_clear(self, node: str, name: str) -> Any:
        self._bitmap(node, name, alter=True).dirty.clear()
        return {}

    def _do_block_dirty_bitmap_remove(self, node: str, name: str) -> Any:
        self._bitmap(node, name, alter=True)
        del self.nodes[node].bitmaps[name]
        return {}

    def _do_block_dirty_bitmap_merge(self, node: str, target: str, bitmaps: list[Any]) -> Any:
        into = self._bitmap(node, target, alter=True)
        if not bitmaps:
            raise Abort("nothing is merged into a bitmap, in a transaction")
        named = [(node, one) if isinstance(one, str) else (one["node"], one["name"]) for one in bitmaps]
        # all of them or none
        sources = [self._bitmap(owner, name, change=True) for owner, name in named]
        if any(self.nodes[owner].size != self.nodes[node].size for owner, _ in named):
            raise Refusal("Bitmaps are of different sizes and can't be merged")
        for source in sources:
            for granule in source.dirty:
                start = granule * source.granularity
                last = (min(start + source.granularity, self.nodes[node].size) - 1) // into.granularity
                into.dirty.update(range(start // into.granularity, last + 1))
        return {}

    # NBD

    def _do_nbd_server_start(self, addr: dict[str, Any]) -> Any:
        if self.nbd is not None:
            raise Refusal("NBD server already running")
        self.nbd_path = addr["data"]["path"]
        self.nbd = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.nbd.bind(self.nbd_path)
        self.nbd.listen(8)
        return {}

    def _do_nbd_server_stop(self) -> Any:
        if self.nbd is None:
            raise Refusal("NBD server not running")
        for export in [name for name, entry in self.exports.items() if entry["type"] == "nbd"]:
            self._drop_export(export)
        self._stop_nbd()
        return {}

    def _stop_nbd(self) -> None:
        if self.nbd is not None:
            self.nbd.close()
            Path(self.nbd_path).unlink(missing_ok=True)
            self.nbd = None

    def _do_block_export_add(self, id: str, type: str, node_name: str, **options: Any) -> Any:
        if self.nbd is None:
            raise Refusal("NBD server not running")
        if id in self.exports:
            raise Refusal(f"Block export id '{id}' is already in use")
        name = options.get("name", self._node(node_name).name)
        if any(entry["name"] == name for entry in self.exports.values()):
            raise Refusal(f"NBD server already has export named '{name}'")
        bitmaps = [self._bitmap(entry["node"], entry["name"], change=True) for entry in options.get("bitmaps", [])]
        for bitmap in bitmaps:
            bitmap.busy += 1
        self.exports[id] = {
            "id": id,
            "type": type,
            "node-name": node_name,
            "shutting-down": False,
            "name": name,
            "bitmaps": bitmaps,
        }
        return {}

    def _do_block_export_del(self, id: str, mode: str = "safe") -> Any:
        if id not in self.exports:
            raise Refusal(f"Export '{id}' is not found")
        if id not in self.stuck:
            self._drop_export(id)
        return {}

    def _drop_export(self, name: str) -> None:
        for bitmap in self.exports.pop(name)["bitmaps"]:
            bitmap.busy -= 1
        self.emit("BLOCK_EXPORT_DELETED", id=name)

    def _do_query_block_exports(self) -> Any:
        return [
            {key: value for key, value in entry.items() if key not in ("bitmaps", "name")}
            for entry in self.exports.values()
        ]

    # jobs

    def _do_query_jobs(self) -> Any:
        return list(self.jobs.values())

    def _do_job_cancel(self, id: str) -> Any:
        if id not in self.jobs:
            raise Refusal("Job not found")
        if self.jobs[id]["status"] == "concluded":
            raise Refusal(f"Job '{id}' in state 'concluded' cannot accept command verb 'cancel'")
        if id not in self.stuck:
            self.end_job(id, "Operation canceled")
        return {}

    def _do_job_dismiss(self, id: str) -> Any:
        if id not in self.jobs:
            raise Refusal("Job not found")
        if self.jobs[id]["status"] != "concluded":
            raise Refusal(f"Job '{id}' in state 'running' cannot accept command verb 'dismiss'")
        del self.jobs[id]
        self.emit("JOB_STATUS_CHANGE", id=id, status="null")
        return {}

    def end_job(self, id: str, error: str = "") -> None:
        """A job comes to its end."""
        self.jobs[id]["status"] = "concluded"
        if error:
            self.jobs[id]["error"] = error
        self.emit("JOB_STATUS_CHANGE", id=id, status="concluded")
