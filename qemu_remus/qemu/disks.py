"""The VM's disks, as QEMU's query replies show them, and which of them are to be protected.

Pure parsing and choosing; the queries are sent by :mod:`qemu_remus.qemu.discover`.  A disk here is a guest's device: a
node that no device uses is not a disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from qemu_remus.core.errors import ConfigError, DiskUnsupported, UnknownDisk
from qemu_remus.core.model import NAME_LIMIT, DiskName, NodeName, QdevPath
from qemu_remus.qemu.capabilities import Capabilities, version_text
from qemu_remus.qemu.faults import Fault
from qemu_remus.qemu.nodes import Kind, clashing, is_ours, kind_of

_NO_NODE: Final = NodeName("")
# virtio's are called "virtio-backend", usb-storage's has a path of its own
_PERIPHERAL: Final = re.compile(r"/machine/peripheral/([^/]+)(?:/.*)?\Z")
# Their writes are ioctls: bitmaps do not see them, and a filter fails them.
_PASS_THROUGH: Final = frozenset({"scsi-block", "scsi-generic"})
_FORBIDDEN: Final = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class VmDisk:
    """A guest's device that can hold a disk.

    :param name: its name in the pair; by default the device's.
    :param device: the id of its ``-drive``; empty where there is none.
    :param qdev: what to give to ``qom-set``; empty where no device uses the drive.
    :param node: the node that is the disk: what the device has, or what is below our filter where that is in.
        Empty where there is no medium, or where what is below our filter cannot be seen.
    :param size: bytes.
    :param removable: the medium can be taken out: CD-ROM, floppy, SD card.
    :param driver: the format of ``node``, or of our filter where that is in.
    :param filename: for people.
    :param iothread: whether its I/O runs in a thread of its own; None where that could not be found out.
    :param model: its device's type; empty where QEMU does not say.
    :param cdrom: removable, and with a tray.
    :param hidden_below: our filter, where that is in and what is below it cannot be seen; else empty.
    """

    name: DiskName
    device: str
    qdev: QdevPath
    node: NodeName
    size: int
    read_only: bool
    removable: bool
    driver: str
    filename: str
    iothread: bool | None = None
    model: str = ""
    cdrom: bool = False
    hidden_below: NodeName = _NO_NODE


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a disk cannot be protected.

    :param hint: what to do about it.
    :param quiet: it is of a kind that nobody expects to be protected, and is passed over where no disk was named.
    """

    what: str
    hint: str
    quiet: bool


def below_filters(
    named_nodes: Iterable[Mapping[str, Any]], block_graph: Mapping[str, Any] | None = None
) -> dict[NodeName, NodeName]:
    """The disk node below each of our filters.

    :param named_nodes: the answer to ``query-named-block-nodes`` with ``flat``; from QEMU 10.1 on it suffices.
    :param block_graph: the answer to ``x-debug-query-block-graph``, where QEMU has it.
    :return: by the filter's name; a filter of which nothing shows the child is missing.
    """
    found: dict[NodeName, NodeName] = {}
    if block_graph is not None:
        names = {node["id"]: node["name"] for node in block_graph["nodes"] if node["type"] == "block-driver"}
        for edge in block_graph["edges"]:
            parent = names.get(edge["parent"], "")
            if kind_of(parent) is Kind.FILTER and edge["name"] == "file" and edge["child"] in names:
                found[NodeName(parent)] = NodeName(names[edge["child"]])
    for node in named_nodes:
        if kind_of(node.get("node-name", "")) is Kind.FILTER:
            for child in node.get("children", ()):
                if child["child"] == "file" and "node-name" in child:
                    found[NodeName(node["node-name"])] = NodeName(child["node-name"])
    return found


def list_disks(
    query_block: Iterable[Mapping[str, Any]], below: Mapping[NodeName, NodeName] | None = None
) -> tuple[VmDisk, ...]:
    """Read the answer to ``query-block``.

    :param below: what :func:`below_filters` found.
    :return: in QEMU's order; ``iothread`` and ``model`` are not known yet.
    """
    taken: set[str] = set()
    return tuple(_disk(entry, below or {}, taken) for entry in query_block)


def _disk(entry: Mapping[str, Any], below: Mapping[NodeName, NodeName], taken: set[str]) -> VmDisk:
    inserted: Mapping[str, Any] = entry.get("inserted") or {}
    attached = NodeName(inserted.get("node-name", ""))
    node = below.get(attached, _NO_NODE) if kind_of(attached) is Kind.FILTER else attached
    qdev, device = entry.get("qdev", ""), entry.get("device", "")
    return VmDisk(
        name=_unique(_default_name(qdev, device, node), taken),
        device=device,
        qdev=QdevPath(qdev),
        node=node,
        size=inserted.get("image", {}).get("virtual-size", 0),
        read_only=inserted.get("ro", False),
        removable=entry.get("removable", False),
        driver=inserted.get("drv", ""),
        filename=_filename(inserted),
        cdrom="tray_open" in entry,
        hidden_below=attached if attached and not node else _NO_NODE,
    )


def _filename(inserted: Mapping[str, Any]) -> str:
    name: str = inserted.get("file", "")
    # A "json:" name describes a whole tree; the image's own name is shorter, and no worse for a person.
    return inserted.get("image", {}).get("filename", name) if name.startswith("json:") else name


def _default_name(qdev: str, device: str, node: str) -> str:
    if qdev and not qdev.startswith("/"):
        return qdev
    match = _PERIPHERAL.match(qdev)
    if match:
        return match.group(1)
    return device or node


def _unique(wish: str, taken: set[str]) -> DiskName:
    base = _FORBIDDEN.sub("-", wish).strip("-_")[: NAME_LIMIT - 4] or "disk"
    name, count = base, 1
    while name in taken:
        count += 1
        name = f"{base}-{count}"
    taken.add(name)
    return DiskName(name)


def obstacle(disk: VmDisk, capabilities: Capabilities) -> Obstacle | None:
    """Why a disk cannot be protected; None where it can."""
    if not disk.qdev:
        return Obstacle("no device of the guest uses it", "attach it with -device or device_add", quiet=True)
    if disk.removable:
        kind = "it is a CD-ROM drive" if disk.cdrom else "its medium is removable"
        return Obstacle(kind, "put what must survive on a disk that is not removable", quiet=True)
    if disk.hidden_below:
        return Obstacle(
            f"its replication filter {disk.hidden_below} is in, and this QEMU does not show what is below it",
            "restart the VM, or put the disk's node back with qom-set and run qemu-remus detach",
            quiet=False,
        )
    if not disk.node:
        if disk.size:
            return Obstacle("its node has no name", "start the VM with node-name= for it", quiet=False)
        return Obstacle("it has no medium", "give it one", quiet=True)
    if disk.model in _PASS_THROUGH:
        return Obstacle(
            f"its device, {disk.model}, hands the guest's SCSI commands to the host's disk past QEMU's block layer,"
            " where nobody sees what they change",
            "give the guest the same disk as scsi-hd",
            quiet=False,
        )
    if disk.read_only:
        return Obstacle("it is read-only, so there is nothing to replicate", "copy it once, by hand", quiet=True)
    if is_ours(disk.node):
        return Obstacle(f"its node {disk.node} is one of ours", "run qemu-remus detach first", quiet=False)
    if disk.size <= 0:
        return Obstacle("it is empty (0 bytes)", "resize it, or leave it out", quiet=True)
    if needs_push(disk, capabilities) and not capabilities.push:
        version = version_text(capabilities.version)
        if disk.iothread:
            what = (
                f"its I/O runs in an iothread, where QEMU {version} aborts when it is exported, and push is not there"
            )
        else:
            what = f"whether its I/O runs in an iothread cannot be seen, and QEMU {version} has no push"
        return Obstacle(what, "use QEMU 10.0 or later, or start the VM without iothread= for this disk", quiet=False)
    return None


def needs_push(disk: VmDisk, capabilities: Capabilities) -> bool:
    """Whether a disk must not be exported, so that its data have to leave QEMU by a job."""
    return disk.iothread is not False and not capabilities.pull_safe_in_iothread


def adding_needs_pause(disk: VmDisk, capabilities: Capabilities) -> bool:
    """Whether a node that is added over a disk while the guest runs ends QEMU."""
    return disk.iothread is not False and capabilities.has_fault(Fault.IOTHREAD_GRAPH)


def is_continued(before: VmDisk | None, disk: VmDisk) -> bool:
    """What was recorded of a disk until now is true of it still."""
    return before is not None and before.node == disk.node and before.size <= disk.size


def choose_disks(
    disks: Sequence[VmDisk], wanted: Mapping[DiskName, NodeName] | None, capabilities: Capabilities
) -> tuple[VmDisk, ...]:
    """The disks to protect, in the order of ``wanted``, or of the VM.

    :param disks: all that the VM has.
    :param wanted: pair names and what they stand for: a node name, or else a device's or drive's id.  None: every disk
        but those that are removable, read-only, empty or unused.
    :raise CapabilityMissing: when QEMU lacks what protecting any disk needs.
    :raise UnknownDisk: when the VM has no such disk, or none at all that could be protected.
    :raise DiskUnsupported: when one of them cannot be protected; no writable disk is left out silently.
    :raise ConfigError: when one disk was named twice, or two names cannot be told apart in QEMU.
    """
    capabilities.require()
    if wanted is None:
        chosen = []
        for disk in disks:
            problem = obstacle(disk, capabilities)
            if problem is None:
                chosen.append(disk)
            elif not problem.quiet:
                raise _unsupported(disk, problem)
        if not chosen:
            raise UnknownDisk(
                "the VM has no writable disk", safe="nothing was started", hint="qemu-remus probe says what it has"
            )
        return _distinct(chosen)
    chosen = [replace(_find(disks, handle), name=name) for name, handle in wanted.items()]
    for index, disk in enumerate(chosen):
        twin = next((other for other in chosen[:index] if other.qdev == disk.qdev and other.node == disk.node), None)
        if twin is not None:
            raise ConfigError(
                f"{twin.name} and {disk.name} are the same disk {disk.node}", hint="name each disk of the VM once"
            )
        problem = obstacle(disk, capabilities)
        if problem is not None:
            raise _unsupported(disk, problem)
    return _distinct(chosen)


def _distinct(chosen: Sequence[VmDisk]) -> tuple[VmDisk, ...]:
    clash = clashing(disk.name for disk in chosen)
    if clash is not None:
        raise ConfigError(
            f"disks {clash[0]} and {clash[1]} would get nodes of the same name in QEMU",
            safe="nothing was started",
            hint="give one of them another name with --disk NAME=NODE",
        )
    return tuple(chosen)


def _find(disks: Sequence[VmDisk], handle: str) -> VmDisk:
    for attribute in ("node", "device", "qdev", "name"):
        found = [disk for disk in disks if handle and getattr(disk, attribute) == handle]
        if found:
            return found[0]
    known = ", ".join(f"{disk.name} (node {disk.node or 'none'})" for disk in disks) or "none"
    raise UnknownDisk(
        f"the VM has no disk {handle!r}",
        safe="nothing was started",
        hint=f"its disks are: {known}; qemu-remus probe says more",
    )


def _unsupported(disk: VmDisk, problem: Obstacle) -> DiskUnsupported:
    return DiskUnsupported(
        f"disk {disk.name} (node {disk.node or 'none'}) cannot be protected: {problem.what}",
        safe="the VM was left as it is",
        hint=f"{problem.hint}; or name the disks to protect with --disk",
    )
