"""Which disks the VM has now, and which of them go on being protected: looked at again and again while we are attached.

A disk is known again by its device.  It goes on where its node or its size are others; it does not where it cannot be
protected any more, which is said, and is no reason to leave the others.  Pure, but for :class:`Surveyor`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qemu_remus.core.errors import ConfigError, QemuError, UnknownDisk
from qemu_remus.core.model import DiskName, NodeName
from qemu_remus.qemu import commands
from qemu_remus.qemu.attachment import Attachment
from qemu_remus.qemu.capabilities import Capabilities
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.discover import discover
from qemu_remus.qemu.disks import VmDisk, obstacle
from qemu_remus.qemu.nodes import clashing, is_ours

Signature = frozenset[tuple[str, str, int, bool]]
"""Device, node, size and whether it can be written, of every disk that is not removable."""


@dataclass(frozen=True, slots=True)
class Outside:
    """A disk of the VM that is not protected although one would expect it to be.

    :param reason: why not.
    """

    name: DiskName
    node: NodeName
    size: int
    reason: str


@dataclass(frozen=True, slots=True)
class Findings:
    """What the VM has.

    :param disks: to be protected, the known ones first, in their order.
    :param outside: not to be protected.
    """

    disks: tuple[VmDisk, ...]
    outside: tuple[Outside, ...] = ()


def signature(query_block: Iterable[Mapping[str, Any]], known: Sequence[VmDisk]) -> Signature:
    """What tells one set of disks from another, from the answer to ``query-block``; cheap, as it is asked for often.

    :param known: the disks of which filters of ours may be in.
    """
    nodes = {disk.qdev: disk.node for disk in known}
    seen = set()
    for entry in query_block:
        inserted: Mapping[str, Any] = entry.get("inserted") or {}
        qdev, node = entry.get("qdev", ""), NodeName(inserted.get("node-name", ""))
        if not qdev or entry.get("removable"):
            continue
        if is_ours(node):
            node = nodes.get(qdev, node)
        seen.add((qdev, str(node), inserted.get("image", {}).get("virtual-size", 0), not inserted.get("ro", False)))
    return frozenset(seen)


def choose_again(
    known: Sequence[VmDisk],
    present: Sequence[VmDisk],
    wanted: Mapping[DiskName, NodeName] | None,
    capabilities: Capabilities,
    leave_out: Collection[DiskName] = (),
) -> Findings:
    """The disks to protect from now on; see :func:`qemu_remus.qemu.disks.choose_disks` for the first time.

    :param known: those that were protected until now.
    :param present: all that the VM has.
    :param wanted: as there.
    :param leave_out: names of disks that are not to be protected, for a reason that is known.
    """
    names = {disk.qdev: disk.name for disk in known if disk.qdev}
    order = {disk.name: place for place, disk in enumerate(known)}
    chosen: list[VmDisk] = []
    outside: list[Outside] = []
    for disk in present:
        name = names.get(disk.qdev) or (disk.name if wanted is None else _wanted_name(disk, wanted))
        if name is None:
            continue
        named = replace(disk, name=name)
        problem = obstacle(named, capabilities)
        if problem is not None:
            if not problem.quiet or name in order:
                outside.append(Outside(name, disk.node, disk.size, problem.what))
        elif name in leave_out:
            outside.append(Outside(name, disk.node, disk.size, "the secondary cannot take it"))
        elif clashing((*(other.name for other in chosen), name)) or any(other.name == name for other in chosen):
            outside.append(Outside(name, disk.node, disk.size, "another disk has a name too much like it"))
        else:
            chosen.append(named)
    chosen.sort(key=lambda disk: order.get(disk.name, len(order)))
    return Findings(tuple(chosen), tuple(outside))


def _wanted_name(disk: VmDisk, wanted: Mapping[DiskName, NodeName]) -> DiskName | None:
    handles = {disk.node, disk.device, disk.qdev, disk.name} - {""}
    return next((name for name, handle in wanted.items() if handle in handles), None)


def news(before: Sequence[VmDisk], after: Findings) -> str:
    """What is other than before, in words; empty where nothing is."""
    old = {disk.name: disk for disk in before}
    new = {disk.name: disk for disk in after.disks}
    reasons = {one.name: one.reason for one in after.outside}
    parts = []
    for name in dict.fromkeys((*old, *new)):
        was, now = old.get(name), new.get(name)
        if was is None and now is not None:
            parts.append(f"disk {name} ({now.size} bytes) is new")
        elif was is not None and now is None:
            why = f": {reasons[name]}" if name in reasons else ""
            parts.append(f"disk {name} is not protected any more{why}" if why else f"disk {name} is gone")
        elif was is not None and now is not None:
            if was.size != now.size:
                parts.append(f"disk {name} has {now.size} bytes, where it had {was.size}")
            if (was.node, was.qdev) != (now.node, now.qdev):
                parts.append(f"disk {name} is on node {now.node} instead of {was.node}: all of it is compared")
    return "; ".join(parts)


class Surveyor:
    """Looks at the VM's disks and has an attachment follow them.

    :param wanted: as in :func:`choose_again`.
    :param present: all that the VM had when it was attached to.
    """

    def __init__(
        self,
        client: QmpClient,
        capabilities: Capabilities,
        attachment: Attachment,
        wanted: Mapping[DiskName, NodeName] | None,
        present: Sequence[VmDisk],
    ) -> None:
        self.outside: tuple[Outside, ...] = ()
        self._client = client
        self._capabilities = capabilities
        self._attachment = attachment
        self._wanted = wanted
        self._seen: Signature = frozenset(
            (disk.qdev, disk.node, disk.size, not disk.read_only)
            for disk in present
            if disk.qdev and not disk.removable
        )

    async def changed(self) -> bool:
        """Whether anything is other than at the last look.

        :raise QemuError: when QEMU does not answer.
        """
        return signature(await self._client.execute(commands.query_block()), self._attachment.disks) != self._seen

    async def look(self) -> None:
        """From now on, this is what is not new.

        :raise QemuError: when QEMU does not answer.
        """
        self._seen = signature(await self._client.execute(commands.query_block()), self._attachment.disks)

    async def survey(self, leave_out: Collection[DiskName]) -> str:
        """See which disks there are, and have the attachment follow.

        :return: what is other than before, for a person; empty where nothing is, or where another tool does something
            with the graph, so that it cannot be followed now.
        :raise QemuError: when QEMU refuses or does not answer.
        :raise StorageError: when a fleece cannot be made.
        """
        # First: what changes behind this is seen with the next look.
        await self.look()
        try:
            await self._attachment.prepare()
        except QemuError:
            if self._client.closed.is_set():
                raise
            return ""
        before = self._attachment.disks
        present = await discover(self._client, self._capabilities)
        found = choose_again(before, present, self._wanted, self._capabilities, leave_out)
        self.outside = found.outside
        said = news(before, found)
        if found.disks != before:
            await self._attachment.follow(found.disks)
        return said

    async def resize(self, name: DiskName, size: int) -> int:
        """Make a disk larger. Nothing of a checkpoint may be in, as QEMU refuses it then.

        :return: bytes that it has now.
        :raise UnknownDisk: when it is not protected.
        :raise ConfigError: when it would not become larger.
        :raise QemuError: when QEMU refuses or does not answer.
        """
        await self._attachment.prepare()
        disk = next((disk for disk in self._attachment.disks if disk.name == name), None)
        if disk is None:
            raise UnknownDisk(
                f"no disk {name} is protected",
                safe="nothing was changed",
                hint="they are: " + ", ".join(disk.name for disk in self._attachment.disks),
            )
        has = await self._size(disk)
        if size < has:
            raise ConfigError(
                f"disk {name} has {has} bytes: it cannot be made smaller while it is protected",
                safe="nothing was changed",
                hint="a smaller disk needs a new first copy: stop the controllers, resize it, and give the secondary "
                "an empty store",
            )
        if size > has:
            await self._client.execute(commands.block_resize(disk.node, size))
        return await self._size(disk)

    async def _size(self, disk: VmDisk) -> int:
        for entry in await self._client.execute(commands.query_named_block_nodes()):
            if entry.get("node-name") == disk.node:
                size: int = entry["image"]["virtual-size"]
                return size
        raise QemuError(
            f"disk {disk.name} is gone: there is no node {disk.node} any more", safe="the others are protected"
        )


__all__ = ["Findings", "Outside", "Surveyor", "choose_again", "news", "signature"]
