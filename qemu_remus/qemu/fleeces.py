"""The fleeces of one attachment: for each disk a file of ours, and one in memory where that can be had, and QEMU's
nodes over them, put in and taken out by the disk's name.

What may not enter: filters, which use them, and when a fleece may be emptied or taken out.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import structlog
import trio

from qemu_remus.core.errors import CommandFailed, QemuError, StorageError
from qemu_remus.core.model import DiskName, NodeName, PairName
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.client import PeerCredentials, QmpClient
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.fleece import FleeceFile
from qemu_remus.qemu.nodes import fleece_node

_log = structlog.get_logger(__name__)


class Fleeces:
    """Every fleece that is in; see :meth:`close`.

    :param directory: QEMU must be able to open files in it.
    :param process: QEMU.
    :param memory: there are to be fleeces in memory, too.
    """

    def __init__(
        self, client: QmpClient, pair: PairName, directory: Path, process: PeerCredentials, *, memory: bool
    ) -> None:
        self._client = client
        self._pair = pair
        self._directory = directory
        self._process = process
        self._memory = memory and client.passes_descriptors
        self._files: dict[NodeName, FleeceFile] = {}
        self._sizes: dict[DiskName, int] = {}

    @property
    def in_memory(self) -> bool:
        """Every disk has a fleece in memory."""
        nodes = [fleece_node(self._pair, name, in_memory=True) for name in self._sizes]
        return bool(nodes) and all(node in self._files for node in nodes)

    def free_space(self) -> int:
        """Bytes that the fleeces in files may still take. Blocks."""
        files = (self._files.get(fleece_node(self._pair, name)) for name in self._sizes)
        return next((file.free_space() for file in files if file is not None), 0)

    def allocated(self) -> int:
        """Bytes that those in files have taken. Blocks."""
        files = (self._files.get(fleece_node(self._pair, name)) for name in self._sizes)
        return sum(file.allocated() for file in files if file is not None)

    def empty(self) -> None:
        """Give all space back. Blocks.

        :raise StorageError: when the file system fails to.
        """
        for file in list(self._files.values()):
            if file.allocated():
                file.empty()

    def fits(self, disk: VmDisk) -> bool:
        """Whether a disk has a fleece of its size."""
        return self._sizes.get(disk.name) == disk.size

    async def put_in(self, disk: VmDisk) -> None:
        """Give a disk its fleeces; older ones of its name are taken out.

        :raise StorageError: when the file cannot be made, or QEMU cannot open it.
        :raise QemuError: when QEMU does not answer, or holds on to the older one.
        """
        await self.take_out(disk.name)
        # Before a node is known to be there: that may be in doubt.
        self._sizes[disk.name] = disk.size
        arguments = (self._directory, self._pair, disk.name, disk.size, self._process)
        node = fleece_node(self._pair, disk.name)
        file = self._files[node] = await trio.to_thread.run_sync(FleeceFile.make, *arguments)
        try:
            await self._client.execute(commands.blockdev_add_file(node, str(file.path)))
        except CommandFailed as error:
            raise StorageError(
                f"QEMU cannot open the fleece file {file.path}: {error.desc}",
                safe="the VM was not touched",
                hint="let QEMU's user reach that directory, also through SELinux or AppArmor, or name another one "
                "(--fleece-dir)",
            ) from error
        # QEMU has it open from here on, and no crash of anybody leaves a file behind.
        await trio.to_thread.run_sync(file.unlink)
        if self._memory:
            await self._put_in_memory(disk)

    async def _put_in_memory(self, disk: VmDisk) -> None:
        """Where QEMU cannot be handed one, the files serve by themselves, those of the other disks too."""
        node = fleece_node(self._pair, disk.name, in_memory=True)
        try:
            file = self._files[node] = FleeceFile.in_memory(disk.size)
            given = await self._client.execute_with(commands.add_fd(), file.descriptor)
            fdset = int(given["fdset-id"])
            try:
                await self._client.execute(commands.blockdev_add_file(node, f"/dev/fdset/{fdset}"))
            finally:
                # The node has a duplicate; nothing is left when that goes.
                await self._client.execute(commands.remove_fd(fdset))
        except (CommandFailed, StorageError) as error:
            _log.warning("no memory for what the guest overwrites; files serve for it", reason=str(error))
            self._memory = False
            await self._take_out(node)

    async def take_out(self, name: DiskName) -> None:
        """Take a disk's fleeces out, if it has any.

        :raise QemuError: when QEMU does not let one go, or does not answer; it can be tried again.
        """
        await self._take_out(fleece_node(self._pair, name, in_memory=True))
        await self._take_out(fleece_node(self._pair, name))
        self._sizes.pop(name, None)

    async def _take_out(self, node: NodeName) -> None:
        if node not in self._files:
            return
        if not self._client.closed.is_set() and await self._is_there(node):
            await self._client.execute(commands.blockdev_del(node))
        self._files.pop(node).close()

    async def _is_there(self, node: NodeName) -> bool:
        return node in epoch.bitmaps_by_node(await self._client.execute(commands.query_named_block_nodes()))

    async def close(self) -> list[str]:
        """Take all of them out.

        :return: what did not go, with the reason.
        """
        left = []
        for node in list(self._files):
            try:
                await self._take_out(node)
            except QemuError as error:
                left.append(f"node {node}: {error}")
        for file in self._files.values():
            with suppress(OSError):
                file.close()
        self._files.clear()
        return left
