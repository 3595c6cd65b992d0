"""The queries behind :mod:`qemu_remus.qemu.disks`: what the VM's disks are, and in which thread their I/O runs.

Only queries; QEMU is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from qemu_remus.core.errors import CommandFailed
from qemu_remus.core.model import NodeName
from qemu_remus.qemu import commands
from qemu_remus.qemu.capabilities import Capabilities, Feature
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.disks import VmDisk, below_filters, list_disks

_BUS_DEPTH: Final = 3
"""How many controllers up an iothread is looked for: a SCSI disk has it at its HBA."""


@dataclass(frozen=True, slots=True)
class BlockGraph:
    """QEMU's block graph at one moment, as far as we need it.

    :param devices: the answer to ``query-block``.
    :param nodes: the answer to ``query-named-block-nodes`` with ``flat``.
    :param below: the disk node below each of our filters.
    """

    devices: list[Mapping[str, Any]]
    nodes: list[Mapping[str, Any]]
    below: Mapping[NodeName, NodeName]


async def read_graph(client: QmpClient, capabilities: Capabilities) -> BlockGraph:
    """Query the block graph.

    :raise QemuUnreachable: when QEMU does not answer.
    """
    devices = await client.execute(commands.query_block())
    nodes = await client.execute(commands.query_named_block_nodes())
    graph = None
    if Feature.NODE_CHILDREN not in capabilities and Feature.BLOCK_GRAPH in capabilities:
        graph = await client.execute(commands.query_block_graph())
    return BlockGraph(devices, nodes, below_filters(nodes, graph))


async def discover(client: QmpClient, capabilities: Capabilities) -> tuple[VmDisk, ...]:
    """All devices of the VM that can hold a disk, in QEMU's order, whether they can be protected or not.

    :raise QemuUnreachable: when QEMU does not answer.
    """
    graph = await read_graph(client, capabilities)
    disks = list_disks(graph.devices, graph.below)
    return tuple([await _with_device(client, disk) if disk.qdev else disk for disk in disks])


async def _with_device(client: QmpClient, disk: VmDisk) -> VmDisk:
    """A disk with what its device says."""
    iothread = await in_iothread(client, disk.qdev)
    try:
        model = str(await client.execute(commands.qom_get(commands.qom_path(disk.qdev), "type")))
    except CommandFailed:
        model = ""
    return replace(disk, iothread=iothread, model=model)


async def in_iothread(client: QmpClient, qdev: str) -> bool | None:
    """Whether a device's I/O runs in an iothread: its own property, or that of the controller that it hangs on.

    :param qdev: as ``query-block`` names it.
    :return: None where QEMU does not say.
    """
    path = commands.qom_path(qdev)
    try:
        for _ in range(_BUS_DEPTH):
            properties = {entry["name"]: entry["type"] for entry in await client.execute(commands.qom_list(path))}
            if str(await client.execute(commands.qom_get(path, "type"))).startswith("xen-"):
                # A Xen disk always has one, also where the toolstack named none.
                return True
            for name in ("iothread", "iothread-vq-mapping"):
                if name in properties and await _is_set(client, path, name):
                    return True
            if "iothread" in properties or "parent_bus" not in properties:
                return False
            bus = await client.execute(commands.qom_get(path, "parent_bus"))
            path = str(bus).rpartition("/")[0]
            if not path:
                return False
    except CommandFailed:
        return None
    return False


async def _is_set(client: QmpClient, path: str, name: str) -> bool:
    value = await client.execute(commands.qom_get(path, name))
    return bool(value)
