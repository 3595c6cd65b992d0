"""What a push uses of the fake QEMU: bitmaps in files, backup jobs, and what an iothread does not bear.

A node that is added over a disk in an iothread of a running guest is the end of QEMU, as in 7.2. Bitmaps are stored in
files as :mod:`qemu_remus.qemu.bitmap_file` has them. Disks have contents only where a test gives them some; then backup
jobs copy them, at once.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from qemu_remus.qemu import bitmap_file
from qemu_remus.qemu.schema import Schema
from tests.fake_block import CLUSTER, Abort, Bitmap, FakeBlock, Node, Refusal, clusters_of


def _pread(file: int, length: int, offset: int) -> bytes:
    return os.pread(file, length, offset)


class FakePush(FakeBlock):
    """A block graph with all of it."""

    def __init__(self, schema: Schema) -> None:
        super().__init__(schema)
        self.job_errors: list[str] = []
        """What the next jobs end with."""
        self.endless: set[str] = set()
        """Jobs that do not end by themselves."""
        self.not_stored: Counter[str] = Counter()
        """How often a bitmap of this name is not stored; QEMU says nothing then."""
        self._files: dict[str, int] = {}

    def close_files(self) -> None:
        """At the end."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _do_blockdev_add(self, driver: str, node_name: str, **options: Any) -> Any:
        if driver != "file":
            below = self._node(options["file"])
            if getattr(self, "status", "") == "running" and self._in_iothread(below.name):
                raise Abort(f"{node_name} was added over {below.name}, in an iothread of a running guest")
            if driver == "qcow2" and node_name not in self.nodes:
                self.nodes[node_name] = self._qcow2(node_name, below, read_only=options.get("read_only", False))
                return {}
        answer = super()._do_blockdev_add(driver, node_name, **options)
        if driver == "file" and (path := Path(options["filename"])).is_file():
            # It is unlinked soon.
            self._files[node_name] = os.open(path, os.O_RDWR)
        return answer

    def _do_blockdev_del(self, node_name: str) -> Any:
        node = self.nodes.get(node_name)
        answer = super()._do_blockdev_del(node_name)
        assert node is not None
        if node.driver == "qcow2" and not node.read_only:
            self._store(node)
        if node_name in self._files:
            os.close(self._files.pop(node_name))
        return answer

    def _in_iothread(self, name: str) -> bool:
        """Whether a device in an iothread uses the node, or what is over it."""
        for device in self.devices.values():
            if device.node == name:
                return bool(device.properties.get("iothread"))
        return any(self._in_iothread(node.name) for node in self.nodes.values() if node.children.get("file") == name)

    def _qcow2(self, name: str, below: Node, *, read_only: bool) -> Node:
        file = self._files.get(below.name)
        header = b"" if file is None else os.pread(file, 4096, 0)
        if file is None or header[:4] != b"QFI\xfb":
            raise Refusal("Image is not in qcow2 format")
        node = Node(name, "qcow2", int.from_bytes(header[24:32], "big"), read_only, children={"file": below.name})
        if read_only:
            found = bitmap_file.read_bitmap(partial(_pread, file), node.size, "map", 65536)
            dirty = {
                granule
                for offset, length in found.ranges()
                for granule in range(offset // 65536, (offset + length - 1) // 65536 + 1)
            }
            node.bitmaps["map"] = Bitmap(65536, recording=False, persistent=True, read_only=True, dirty=dirty)
        return node

    def _store(self, node: Node) -> None:
        file = self._files[node.children["file"]]
        for name, bitmap in node.bitmaps.items():
            if not bitmap.persistent:
                continue
            if self.not_stored[name] > 0:
                self.not_stored[name] -= 1
                continue
            ranges = [(granule * bitmap.granularity, bitmap.granularity) for granule in sorted(bitmap.dirty)]
            for offset, data in bitmap_file.image_with(node.size, name, bitmap.granularity, ranges):
                os.pwrite(file, data, offset)

    def _do_blockdev_backup(
        self, job_id: str, device: str, target: str, sync: str, bitmap: str, x_perf: dict[str, Any], **_: Any
    ) -> Any:
        if job_id in self.jobs:
            raise Refusal(f"Job ID '{job_id}' already in use")
        source, into = self._node(device), self._node(target)
        if source.size != into.size:
            raise Refusal("Source and target image have different sizes")
        marked = self._bitmap(device, bitmap, change=True)
        assert source.driver == "snapshot-access", "jobs read snapshots and nothing else"
        assert sync == "bitmap"
        assert x_perf["max-chunk"] == 65536, "QEMU 7.2 answers wrong across the snapshot's clusters"
        progress = {"current-progress": 0, "total-progress": 1}
        self.jobs[job_id] = {"id": job_id, "type": "backup", "status": "running", **progress}
        self.emit("JOB_STATUS_CHANGE", id=job_id, status="running")
        if job_id in self.endless:
            return {}
        error = self._copy(source, marked, into)
        self.end_job(job_id, self.job_errors.pop(0) if self.job_errors else error)
        return {}

    def _copy(self, source: Node, marked: Bitmap, into: Node) -> str:
        """What a job does to the end; what it ends with."""
        below = self._node(source.children["file"])
        clusters = clusters_of(marked, source.size)
        if below.driver != "copy-before-write":
            return os.strerror(errno.ENOTSUP) if clusters else ""
        if below.readable is not None and not clusters <= below.readable:
            return os.strerror(errno.EACCES)
        disk = self._node(below.children["file"])
        if disk.data is not None and into.name in self._files:
            for cluster in sorted(clusters):
                at = cluster * CLUSTER
                os.pwrite(self._files[into.name], disk.data[at : at + CLUSTER], at)
        return ""
