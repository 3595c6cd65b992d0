"""What a push has in QEMU between two readings: for each disk that is read by it, the nodes over its two files, put in
and taken out by the disk's name.

What may not enter: how they are used (:mod:`qemu_remus.qemu.push`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog
import trio

from qemu_remus.core.errors import CommandFailed, DiskUnsupported, QemuError, StorageError
from qemu_remus.core.model import DiskName, NodeName, PairName
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.capabilities import Capabilities
from qemu_remus.qemu.client import PeerCredentials, QmpClient
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.fleece import FleeceFile
from qemu_remus.qemu.staging import Staging

_log = structlog.get_logger(__name__)


class Stagings:
    """Every staging that is in; see :meth:`close`.

    :param directory: QEMU must be able to open files in it.
    :param process: QEMU.
    :param needed: whether a disk is read by push.
    """

    def __init__(
        self,
        client: QmpClient,
        pair: PairName,
        directory: Path,
        process: PeerCredentials,
        *,
        needed: Callable[[VmDisk], bool],
    ) -> None:
        self._client = client
        self._pair = pair
        self._directory = directory
        self._process = process
        self._needed = needed
        self._there: dict[DiskName, Staging] = {}

    def serves(self, disk: VmDisk) -> bool:
        """Whether a disk is read by push."""
        return disk.name in self._there

    def of(self, disk: VmDisk) -> Staging:
        """A disk's; it has one where :meth:`serves` says so."""
        return self._there[disk.name]

    def fits(self, disk: VmDisk) -> bool:
        """Whether a disk has what it needs."""
        there = self._there.get(disk.name)
        return there is not None and there.disk == disk if self._needed(disk) else there is None

    async def put_in(self, disk: VmDisk) -> None:
        """Give a disk what it needs; what an older one of its name had is taken out.

        :raise StorageError: when a file cannot be made, or QEMU cannot open it.
        :raise QemuError: when QEMU does not answer, or holds on to the older one's.
        """
        await self.take_out(disk.name)
        if not self._needed(disk):
            return
        arguments = (self._directory, self._pair, disk, self._process)
        # Before a node is known to be there: that may be in doubt.
        staging = self._there[disk.name] = await trio.to_thread.run_sync(Staging.make, *arguments)
        await self._add(staging.data_node, staging.data)
        await self._add(staging.bitmaps_node, staging.bitmaps)

    async def _add(self, node: NodeName, file: FleeceFile) -> None:
        try:
            await self._client.execute(commands.blockdev_add_file(node, str(file.path)))
        except CommandFailed as error:
            raise StorageError(
                f"QEMU cannot open the file {file.path}: {error.desc}",
                safe="the VM was not touched",
                hint="let QEMU's user reach that directory, also through SELinux or AppArmor, or name another one "
                "(--fleece-dir)",
            ) from error
        # QEMU has it open from here on, and no crash of anybody leaves a file behind.
        await trio.to_thread.run_sync(file.unlink)

    async def take_out(self, name: DiskName) -> None:
        """Take out what a disk has, if anything.

        :raise QemuError: when QEMU does not let it go, or does not answer; it can be tried again.
        """
        staging = self._there.get(name)
        if staging is None:
            return
        if not self._client.closed.is_set():
            nodes = epoch.bitmaps_by_node(await self._client.execute(commands.query_named_block_nodes()))
            for node in (staging.map_node, staging.bitmaps_node, staging.data_node):
                if node in nodes:
                    await self._client.execute(commands.blockdev_del(node))
        self._there.pop(name).close()

    async def close(self) -> list[str]:
        """Take all of them out.

        :return: what did not go, with the reason.
        """
        left = []
        for name in list(self._there):
            try:
                await self.take_out(name)
            except QemuError as error:
                left.append(f"staging of disk {name}: {error}")
        for staging in self._there.values():
            staging.close()
        self._there.clear()
        return left


def see_that_push_is_there(capabilities: Capabilities) -> None:
    """Where QEMU's NBD server is somebody else's.

    :raise DiskUnsupported: when this QEMU cannot do without it.
    """
    if not capabilities.push:
        raise DiskUnsupported(
            "QEMU's NBD server is in use by somebody else, a QEMU process has only one, and this one has no push",
            safe="it was left as it is",
            hint="let its user end (query-block-exports shows who; nbd-server-stop stops it), then start again",
        )
    _log.warning("QEMU's NBD server is somebody else's: its disks are read by push, which copies more")
