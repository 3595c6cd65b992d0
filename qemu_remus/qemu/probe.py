"""The doctor: what a QEMU, its disks and the host around it allow, each lack with what to do about it.

:func:`probe` only asks: QMP queries, and looks at /proc, /sys and directories; nothing is changed anywhere.  What the
answers mean is decided by :func:`qemu_remus.qemu.probe_checks.evaluate`, which is pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import trio

from qemu_remus.core.errors import CommandFailed
from qemu_remus.core.model import DiskName
from qemu_remus.qemu import commands
from qemu_remus.qemu.block_tree import BlockTrees, TreeNode
from qemu_remus.qemu.capabilities import Capabilities, Feature, query_capabilities
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.commands import Command
from qemu_remus.qemu.discover import discover
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.host import look_at_host
from qemu_remus.qemu.probe_checks import evaluate
from qemu_remus.qemu.probe_model import Intent, Observations, ProbeReport, WriteRate
from qemu_remus.qemu.process import qemu_process

SAMPLE_SECONDS: Final = 0.5
"""For so long a running guest's writes are counted."""


async def probe(client: QmpClient, intent: Intent | None = None, *, sample: float = SAMPLE_SECONDS) -> ProbeReport:
    """Ask a QEMU what it is and what its disks allow; nothing is changed.

    :param intent: what ``qemu-remus primary`` would be told.
    :param sample: seconds for which a running guest's writes are counted; 0: they are not.
    :raise QemuUnreachable: when it does not answer.
    """
    return evaluate(await _Doctor(client, await query_capabilities(client)).look(intent or Intent(), sample))


class _Doctor:
    def __init__(self, client: QmpClient, capabilities: Capabilities) -> None:
        self._client = client
        self._capabilities = capabilities

    async def look(self, intent: Intent, sample: float) -> Observations:
        status = (await self._ask(commands.query_status(), {})).get("status", "")
        before, began = await self._written(), trio.current_time()
        try:
            disks = await discover(self._client, self._capabilities)
        except CommandFailed:
            disks = ()
        devices = await self._ask(commands.query_block(), [])
        nodes = await self._ask(commands.query_named_block_nodes(), [])
        trees = BlockTrees(nodes, await self._ask(commands.query_block_graph(), None))
        look = partial(look_at_host, fleece_memory=intent.fleece_memory)
        host = await trio.to_thread.run_sync(
            look, await qemu_process(self._client), intent.fleece_dir, intent.runtime_dir
        )
        seen = Observations(
            capabilities=self._capabilities,
            intent=intent,
            package=self._client.package,
            name=(await self._ask(commands.query_name(), {})).get("name", ""),
            machine=await self._ask(commands.qom_get("/machine", "type"), ""),
            status=status,
            kvm=await self._kvm(),
            disks=disks,
            trees=_trees(trees, disks, devices),
            devices={disk.name: disk.model for disk in disks},
            peripherals=await self._peripherals(),
            io_status={disk.name: _entry(disk, devices).get("io-status", "ok") for disk in disks},
            nodes=nodes,
            exports=await self._ask(commands.query_block_exports(), []),
            jobs=await self._ask(commands.query_jobs(), []),
            sockets=await self._sockets(),
            host=host,
        )
        if status != "running" or sample <= 0 or before is None:
            return seen
        await trio.sleep_until(began + sample)
        return _with_writes(seen, before, await self._written(), trio.current_time() - began)

    async def _ask(self, command: Command, default: Any) -> Any:
        try:
            return await self._client.execute(command)
        except CommandFailed:
            # An older QEMU lacks the command: the report must come all the same.
            return default

    async def _kvm(self) -> bool | None:
        if Feature.ACCELERATORS in self._capabilities:
            accelerators = await self._ask(commands.query_accelerators(), {})
            return accelerators["enabled"] == "kvm" if accelerators else None
        enabled: bool | None = (await self._ask(commands.query_kvm(), {})).get("enabled")
        return enabled

    async def _peripherals(self) -> dict[str, str]:
        """Types of the devices that were asked for, by id; those without one by their place."""
        found = {}
        for path in ("/machine/peripheral", "/machine/peripheral-anon"):
            for entry in await self._ask(commands.qom_list(path), []):
                if entry["type"].startswith("child<"):
                    found[entry["name"]] = entry["type"][6:-1]
        return found

    async def _sockets(self) -> str:
        queries = (commands.query_chardev(), commands.query_vnc(), commands.query_spice())
        return "\n".join([json.dumps(await self._ask(query, None)) for query in queries])

    async def _written(self) -> tuple[int, int] | None:
        """Operations and bytes that the guest has written since QEMU started."""
        entries = await self._ask(commands.query_blockstats(), None)
        if entries is None:
            return None
        stats = [entry.get("stats", {}) for entry in entries]
        return sum(one.get("wr_operations", 0) for one in stats), sum(one.get("wr_bytes", 0) for one in stats)


def _with_writes(
    seen: Observations, before: tuple[int, int], after: tuple[int, int] | None, seconds: float
) -> Observations:
    if after is None or seconds <= 0:
        return seen
    operations, written = (max(0, new - old) / seconds for old, new in zip(before, after, strict=True))
    return replace(seen, writes=WriteRate(operations, written))


def _entry(disk: VmDisk, devices: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The disk's entry in the answer to ``query-block``."""
    found = (one for one in devices if (one.get("qdev", ""), one.get("device", "")) == (disk.qdev, disk.device))
    return next(found, {})


def _trees(
    trees: BlockTrees, disks: Sequence[VmDisk], devices: Sequence[Mapping[str, Any]]
) -> dict[DiskName, TreeNode]:
    found = {}
    for disk in disks:
        top = _entry(disk, devices).get("inserted", {}).get("node-name", "")
        tree = trees.below(top, (disk.qdev, disk.device, disk.qdev.removesuffix("/virtio-backend").rpartition("/")[2]))
        if tree is not None:
            found[disk.name] = tree
    return found
