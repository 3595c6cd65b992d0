"""A QEMU for tests without one: its QMP, and as much of its block graph as we touch.

Every command is checked against a captured schema first; a violation fails the test. What QEMU would refuse is refused,
in QEMU's words where code looks at them; what would abort QEMU ends the connection and is told in ``aborted``. Tests
make it go wrong on purpose with :meth:`FakeQemu.refuse`, ``mute``, ``hang_up_before`` and ``hang_up_after``.

Rules: it keeps no time and never waits; events come before the reply of the command that causes them, except for
``BLOCK_EXPORT_DELETED``, which comes after it, as in QEMU.
"""

from __future__ import annotations

import copy
import json
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import trio
import trio.testing

from qemu_remus.qemu.client import PeerCredentials, QmpClient, open_qmp_over
from tests.qmp_validation import QEMU_SCHEMAS, Validator, load

GREETING: dict[str, Any] = {
    "QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "fake"}, "capabilities": ["oob"]}
}
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
    busy: int = 0
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


@dataclass
class Device:
    """A guest's device and the node that it has; None without a medium."""

    qdev: str
    device: str
    node: str | None
    removable: bool = False
    tray: bool = False
    properties: dict[str, Any] = field(default_factory=dict)


class FakeQemu:
    """One QEMU process, as far as QMP goes. ``with`` it, so that its NBD socket is closed."""

    def __init__(self, schema: Path = QEMU_SCHEMAS[0]) -> None:
        self.schema = load(schema)
        self._validator = Validator(schema)
        self.status = "running"
        self.nodes: dict[str, Node] = {}
        self.devices: dict[str, Device] = {}
        self.qom: dict[str, dict[str, Any]] = {"/machine": {"type": "pc-q35-7.2-machine"}}
        self.exports: dict[str, dict[str, Any]] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.nbd: socket.socket | None = None
        self.nbd_path = ""
        self.aborted = ""
        self.log: list[tuple[str, dict[str, Any]]] = []
        """Every command that came, in order, with its arguments."""
        self.mute: set[str] = set()
        """Commands that are done and never answered."""
        self.hang_up_before: set[str] = set()
        self.hang_up_after: set[str] = set()
        """Commands at which the connection ends, before or after they are done, without a reply."""
        self.stuck: set[str] = set()
        """Exports and jobs that never end when asked to."""
        self._refusals: Counter[tuple[str, str]] = Counter()
        self._pending: list[dict[str, Any]] = []
        self._stream: trio.abc.Stream | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_nbd()

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

    def refuse(self, command: str, desc: str = "refused by the test", *, times: int = 1) -> None:
        """Refuse the next commands of a name."""
        self._refusals[command, desc] += times

    def write(self, node: str, offset: int, length: int) -> None:
        """The guest writes to a disk: its recording bitmaps see it."""
        for bitmap in self.nodes[node].bitmaps.values():
            if bitmap.recording:
                last = (offset + length - 1) // bitmap.granularity
                bitmap.dirty.update(range(offset // bitmap.granularity, last + 1))

    def ours(self) -> list[str]:
        """All that a qemu-remus made: nodes, bitmaps, exports, jobs."""
        names = [*self.nodes, *self.exports, *self.jobs, *(b for node in self.nodes.values() for b in node.bitmaps)]
        return sorted(name for name in names if name.startswith("qemu-remus"))

    def commands(self, *, queries: bool = False) -> list[str]:
        """Names of the commands that came, without the queries."""
        return [name for name, _ in self.log if queries or not name.startswith(("query-", "qom-get", "qom-list", "x-"))]

    # --- the wire

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Serve one client until either end closes the connection."""
        self._stream = stream
        buffer = b""
        async with stream:
            try:
                await self._send(GREETING)
                while data := await stream.receive_some():
                    buffer += data
                    *lines, buffer = buffer.split(b"\n")
                    for line in lines:
                        if not await self._answer(json.loads(line)):
                            return
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def _answer(self, message: dict[str, Any]) -> bool:
        name = message["execute"]
        if name in self.hang_up_before:
            return False
        try:
            reply = {"return": self.execute(name, message.get("arguments", {})), "id": message["id"]}
        except Refusal as refusal:
            reply = {"error": {"class": refusal.qmp_class, "desc": refusal.desc}, "id": message["id"]}
        except Abort as abort:
            self.aborted = str(abort)
            return False
        late = [event for event in self._pending if event["event"] == "BLOCK_EXPORT_DELETED"]
        early = [event for event in self._pending if event["event"] != "BLOCK_EXPORT_DELETED"]
        self._pending.clear()
        await self._send(*early)
        if name in self.hang_up_after:
            return False
        await self._send(*([] if name in self.mute else [reply]), *late)
        return True

    async def _send(self, *messages: dict[str, Any]) -> None:
        if self._stream is not None and messages:
            await self._stream.send_all(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    def emit(self, event: str, **data: Any) -> None:
        """An event, sent with the next reply."""
        self._pending.append(
            {"event": event, "data": data, "timestamp": {"seconds": 1_700_000_000, "microseconds": 500_000}}
        )

    async def emit_now(self, event: str, **data: Any) -> None:
        """An event, sent at once."""
        self.emit(event, **data)
        await self._send(*self._pending)
        self._pending.clear()

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[QmpClient]:
        """A client that is connected to this QEMU."""
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.serve, theirs)
            async with open_qmp_over(ours, PeerCredentials(0, 0, 0), name="the fake") as client:
                yield client

    async def listen(self, path: Path, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve clients on a Unix socket, one at a time, as a QMP monitor does."""
        with trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            await listener.bind(str(path))
            listener.listen(1)
            task_status.started()
            while True:
                connection, _ = await listener.accept()
                await self.serve(trio.SocketStream(connection))

    # --- commands

    def execute(self, name: str, arguments: dict[str, Any]) -> Any:
        """Do one command.

        :raise Refusal: when QEMU says no.
        :raise Abort: when QEMU dies of it.
        """
        self._validator.command(name, arguments)
        self.log.append((name, arguments))
        for command, desc in list(self._refusals):
            if command == name and self._refusals[command, desc] > 0:
                self._refusals[command, desc] -= 1
                raise Refusal(desc)
        handler: Callable[..., Any] | None = getattr(self, "_do_" + name.replace("-", "_"), None)
        if handler is None:
            raise AssertionError(f"the fake QEMU does not know {name}: teach it")
        return handler(**{key.replace("-", "_"): value for key, value in arguments.items()})

    def _do_qmp_capabilities(self) -> dict[str, Any]:
        return {}

    def _do_query_version(self) -> Any:
        return GREETING["QMP"]["version"]

    def _do_query_qmp_schema(self) -> Any:
        return self.schema

    def _do_query_kvm(self) -> Any:
        return {"enabled": False, "present": True}

    def _do_query_status(self) -> Any:
        return {"status": self.status, "running": self.status == "running", "singlestep": False}

    def _do_query_cpus_fast(self) -> Any:
        # Its threads are ours, as is the socket of its NBD server.
        return [
            {"cpu-index": 0, "qom-path": "/machine/unattached/device[0]", "thread-id": os.getpid(), "target": "x86_64"}
        ]

    def _do_stop(self) -> Any:
        if self.status == "running":
            self.status = "paused"
            self.emit("STOP")
        return {}

    def _do_cont(self) -> Any:
        if self.status == "paused":
            self.status = "running"
            self.emit("RESUME")
        return {}

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
        node = self._node(value)
        for parent in self.nodes.values():
            if parent.driver == "copy-before-write" and parent.children["file"] == node.name:
                others = [user for user in self._users(parent.name) if user != device.qdev]
                if others:
                    raise Refusal(f"Permission conflict on node '{node.name}': {parent.name} is used by {others}")
        device.node = value
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

    def _do_blockdev_add(self, driver: str, node_name: str, **options: Any) -> Any:
        if node_name in self.nodes:
            raise Refusal(f"Duplicate nodes with node-name='{node_name}'")
        if len(node_name) > 31:
            raise Refusal("Node name too long")
        if driver == "file":
            self.nodes[node_name] = Node(node_name, driver, 1 << 40, filename=options["filename"])
            return {}
        below = self._node(options["file"])
        children = {"file": below.name}
        if driver == "copy-before-write":
            children["target"] = self._node(options["target"]).name
            if any(n.driver == driver and n.children["file"] == below.name for n in self.nodes.values()):
                raise Refusal(f"Permission conflict on node '{below.name}'")
            if "bitmap" in options:
                self._bitmap(options["bitmap"]["node"], options["bitmap"]["name"])
        elif driver == "snapshot-access":
            if below.driver != "copy-before-write":
                raise Refusal(f"Node {below.name} does not support snapshot access")
        else:
            raise AssertionError(f"the fake QEMU does not know driver {driver}: teach it")
        self.nodes[node_name] = Node(node_name, driver, below.size, filename=below.filename, children=children)
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
                "count": sum(min(b.granularity, node.size - index * b.granularity) for index in b.dirty),
                "granularity": b.granularity,
                "recording": b.recording,
                "busy": b.busy > 0,
                "persistent": False,
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

    def _bitmap(self, node: str, name: str, *, change: bool = False) -> Bitmap:
        bitmaps = self._node(node).bitmaps
        if name not in bitmaps:
            raise Refusal(f"Dirty bitmap '{name}' not found")
        if change and bitmaps[name].busy:
            raise Refusal(f"Bitmap '{name}' is currently in use by another operation and cannot be used")
        return bitmaps[name]

    def _do_transaction(self, actions: list[dict[str, Any]]) -> Any:
        before = {name: copy.deepcopy(node.bitmaps) for name, node in self.nodes.items()}
        try:
            for action in actions:
                handler = getattr(self, "_do_" + action["type"].replace("-", "_"))
                handler(**{key.replace("-", "_"): value for key, value in action["data"].items()})
        except Refusal:
            for name, bitmaps in before.items():
                self.nodes[name].bitmaps = bitmaps
            raise
        return {}

    def _do_block_dirty_bitmap_add(
        self, node: str, name: str, granularity: int = 65536, disabled: bool = False, persistent: bool = False
    ) -> Any:
        assert not persistent
        if name in self._node(node).bitmaps:
            raise Refusal(f"Bitmap already exists: {name}")
        self.nodes[node].bitmaps[name] = Bitmap(granularity, recording=not disabled)
        return {}

    def _do_block_dirty_bitmap_disable(self, node: str, name: str) -> Any:
        self._bitmap(node, name, change=True).recording = False
        return {}

    def _do_block_dirty_bitmap_remove(self, node: str, name: str) -> Any:
        self._bitmap(node, name, change=True)
        del self.nodes[node].bitmaps[name]
        return {}

    def _do_block_dirty_bitmap_merge(self, node: str, target: str, bitmaps: list[str]) -> Any:
        into = self._bitmap(node, target, change=True)
        for name in bitmaps:
            source = self._bitmap(node, name)
            for granule in source.dirty:
                start = granule * source.granularity
                last = (start + source.granularity - 1) // into.granularity
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
        self._node(node_name)
        bitmaps = [self._bitmap(entry["node"], entry["name"], change=True) for entry in options.get("bitmaps", [])]
        if any(bitmap.recording for bitmap in bitmaps):
            raise Refusal("Enabled bitmap incompatible with readonly export")
        for bitmap in bitmaps:
            bitmap.busy += 1
        self.exports[id] = {"id": id, "type": type, "node-name": node_name, "shutting-down": False, "bitmaps": bitmaps}
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
        return [{key: value for key, value in entry.items() if key != "bitmaps"} for entry in self.exports.values()]

    # jobs

    def _do_query_jobs(self) -> Any:
        return list(self.jobs.values())

    def _do_job_cancel(self, id: str) -> Any:
        if id not in self.jobs:
            raise Refusal("Job not found", "DeviceNotActive")
        if id in self.stuck:
            return {}
        del self.jobs[id]
        self.emit("JOB_STATUS_CHANGE", id=id, status="null")
        return {}
