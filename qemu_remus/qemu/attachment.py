"""Everything that we have in one QEMU while a controller runs: fleeces, NBD server, bitmaps, one captured checkpoint.

:func:`open_attachment` finds what a crashed predecessor left and takes it out before it puts anything in; at its end
the guest's devices have their own nodes, and of ours only the bitmaps stay. One checkpoint at a time is captured, read
and released; the caller decides about bitmaps and their identities.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from qemu_remus.core.errors import CommandFailed, QemuError, StorageError
from qemu_remus.core.model import DiskName, NodeName, PairName
from qemu_remus.nbd.batches import Batch
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.capabilities import Capabilities, Feature
from qemu_remus.qemu.capture import Capturer
from qemu_remus.qemu.client import PeerCredentials, QmpClient
from qemu_remus.qemu.detach import detach
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.epoch import Capture
from qemu_remus.qemu.fleece import FleeceFile
from qemu_remus.qemu.guardian_client import DEFAULT_PAUSE_LIMIT, Guardian
from qemu_remus.qemu.nbd_server import start_server, stop_server
from qemu_remus.qemu.nodes import BitmapIdentity, fleece_node, is_ours
from qemu_remus.qemu.process import qemu_process
from qemu_remus.qemu.transport import Pull, Transport, one_after_the_other

CBW_TIMEOUT: Final = 2
"""Seconds for which a slow fleece may hold up a guest's write, once per epoch; then the snapshot is given up."""

_CLOSE_LIMIT: Final = 30.0
"""Seconds that taking everything out may take at the end."""

_log = structlog.get_logger(__name__)


class Attachment:
    """What we have in one QEMU; made by :func:`open_attachment`. One task at a time."""

    def __init__(
        self,
        client: QmpClient,
        pair: PairName,
        disks: tuple[VmDisk, ...],
        *,
        fleeces: Sequence[FleeceFile],
        capturer: Capturer,
        transport: Transport,
    ) -> None:
        self.disks = disks
        """In the order that extents' disk numbers refer to."""
        self._client = client
        self._pair = pair
        self._fleeces = fleeces
        self._capturer = capturer
        self._transport = transport
        self._clean = True

    # --- bitmaps

    async def bitmaps(self) -> dict[DiskName, tuple[BitmapIdentity, ...]]:
        """The pair's bitmaps on each disk, oldest epoch first.

        :raise QemuError: when QEMU does not answer.
        """
        nodes = epoch.bitmaps_by_node(await self._client.execute(commands.query_named_block_nodes()))
        return {disk.name: epoch.identities(self._pair, nodes.get(disk.node, {})) for disk in self.disks}

    async def dirty_bytes(self) -> int:
        """Bytes that the pair's bitmaps hold at this moment, of all disks together.

        :raise QemuError: when QEMU does not answer.
        """
        nodes = epoch.bitmaps_by_node(await self._client.execute(commands.query_named_block_nodes()))
        looks = [nodes.get(disk.node, {}) for disk in self.disks]
        return sum(look[one.name].count for look in looks for one in epoch.identities(self._pair, look))

    async def start_tracking(self, identity: BitmapIdentity) -> None:
        """Begin to record the changes of all disks in a new bitmap.

        :raise CommandFailed: when QEMU refuses; no disk has it then.
        :raise QemuError: when QEMU does not answer.
        """
        await self._client.execute(commands.transaction(epoch.rotation(self.disks, None, identity)))

    async def merge_back(self, old: Sequence[BitmapIdentity], into: BitmapIdentity) -> None:
        """Fold bitmaps into one that records from now on, and remove them: nothing that they hold is lost.

        :param old: those that a disk does not have are passed over.
        :param into: begun where it is not there yet. Whoever calls gives it the oldest base of them all.
        :raise CommandFailed: when QEMU refuses, say because one is still exported; nothing was changed.
        :raise QemuError: when QEMU does not answer.
        """
        nodes = epoch.bitmaps_by_node(await self._client.execute(commands.query_named_block_nodes()))
        actions = epoch.merging(self.disks, nodes, old, into)
        if actions:
            await self._client.execute(commands.transaction(actions))

    async def remove_bitmap(self, identity: BitmapIdentity) -> None:
        """Remove a bitmap from every disk that has it.

        :raise CommandFailed: when QEMU refuses; it is still on all of them.
        :raise QemuError: when QEMU does not answer.
        """
        nodes = epoch.bitmaps_by_node(await self._client.execute(commands.query_named_block_nodes()))
        actions = [
            commands.bitmap_remove_action(disk.node, identity.name)
            for disk in self.disks
            if identity.name in nodes.get(disk.node, {})
        ]
        if actions:
            await self._client.execute(commands.transaction(actions))

    # --- one checkpoint

    async def prepare(self) -> None:
        """See that nothing of an earlier checkpoint is in the way of the next one.

        :raise QemuError: when something is and does not go, naming it; or when QEMU does not answer.
        :raise StorageError: when a fleece cannot be emptied.
        """
        if self._clean:
            return
        left = await self._capturer.take_out()
        if left:
            raise QemuError(
                f"an earlier checkpoint's {', '.join(left)} cannot be taken out of QEMU",
                safe="the VM goes on, and its changes stay recorded",
                hint="another tool uses it (a backup, a snapshot): let that end",
            )
        await trio.to_thread.run_sync(self._empty_fleeces)
        self._clean = True

    async def capture(self, finished: BitmapIdentity, following: BitmapIdentity, *, pause: bool) -> Capture:
        """Capture a checkpoint: see :meth:`qemu_remus.qemu.capture.Capturer.capture`, and :meth:`prepare`.

        Its data can be read until :meth:`release`. After a failure ask :meth:`bitmaps` which there are.
        """
        await self.prepare()
        self._clean = False
        return await self._capturer.capture(finished, following, pause=pause)

    def read(self, capture: Capture) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """What the changed blocks hold at the checkpoint, disk after disk, each in ascending order.

        ::

            async with attachment.read(capture) as batches:
                async for batch in batches:
                    ...

        The iterator raises :class:`SnapshotBroken` when the snapshot was given up for the guest's sake,
        :class:`NbdError` when reading fails in another way, and :class:`QemuError` when QEMU does not export a disk.
        """
        return one_after_the_other([partial(self._transport.read, capture, disk) for disk in capture.disks])

    def read_live(self, index: int) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """What a disk holds at this moment, changing under the reader, in ascending order; errors as :meth:`read`.

        :param index: in :attr:`disks`.
        """
        return one_after_the_other([partial(self._transport.read_live, index, self.disks[index])])

    async def release(self, capture: Capture) -> None:
        """Give the guest's devices their own nodes back and empty the fleeces. May be called again, and after failures.

        :raise QemuError: as :meth:`prepare`, which the next capture calls again.
        :raise StorageError: when a fleece cannot be emptied.
        """
        if capture.disks or not self._clean:
            self._clean = self._clean and not capture.disks
            await self.prepare()

    def _empty_fleeces(self) -> None:
        for fleece in self._fleeces:
            if fleece.allocated():
                fleece.empty()

    async def _leave(self) -> None:
        """Take out what checkpoints have put in, at the end."""
        left = await self._capturer.take_out()
        if left:
            _log.warning("something of ours stays in QEMU; run qemu-remus detach later", nodes=left)


@asynccontextmanager
async def open_attachment(
    client: QmpClient,
    capabilities: Capabilities,
    pair: PairName,
    disks: tuple[VmDisk, ...],
    *,
    fleece_dir: Path,
    runtime_dir: Path,
    guardian: Guardian | None,
    pause_limit: float = DEFAULT_PAUSE_LIMIT,
) -> AsyncIterator[Attachment]:
    """Attach to a QEMU: clean up after a predecessor, start the NBD server, give every disk its fleece.

    At the end filters, exports, fleeces and the NBD server are taken out, shielded from cancellation and with a
    deadline; what does not go then is logged. The bitmaps stay.

    :param disks: from ``choose_disks``.
    :param fleece_dir: absolute; holds the fleeces, which QEMU must be able to open.
    :param runtime_dir: absolute; holds the NBD server's socket, which QEMU makes.
    :param guardian: None: the VM is never paused by us, or nobody resumes it if we die.
    :param pause_limit: seconds after which the guardian ends a pause of ours, and us.
    :raise DiskUnsupported: when somebody else uses QEMU's NBD server.
    :raise StorageError: when a fleece cannot be made.
    :raise QemuError: when QEMU refuses or does not answer.
    """
    report = await detach(client, pair, keep_tracking=True)
    stuck = [left for left in report.left if is_ours(left.name, pair)]
    if stuck:
        raise QemuError(
            f"{stuck[0].name}, left by an earlier controller, cannot be taken out of QEMU: {stuck[0].why}",
            safe="the VM goes on",
            hint=stuck[0].hint,
        )
    process = await qemu_process(client)
    inside = AsyncExitStack()
    try:
        yield await _attach(
            client, process, capabilities, pair, disks, fleece_dir, runtime_dir, guardian, pause_limit, inside
        )
    finally:
        with trio.move_on_after(_CLOSE_LIMIT) as scope:
            scope.shield = True
            await inside.aclose()
        if scope.cancelled_caught:
            _log.warning("QEMU did not let us take everything out; run qemu-remus detach later")


async def _attach(
    client: QmpClient,
    process: PeerCredentials,
    capabilities: Capabilities,
    pair: PairName,
    disks: tuple[VmDisk, ...],
    fleece_dir: Path,
    runtime_dir: Path,
    guardian: Guardian | None,
    pause_limit: float,
    inside: AsyncExitStack,
) -> Attachment:
    """Put in what is needed; whatever went in is taken out again by ``inside``, whether the rest goes in or not."""

    def at_end(what: str, act: Callable[..., Awaitable[object]], *arguments: object) -> None:
        inside.push_async_callback(_take_out, client, what, act, *arguments)

    server = await start_server(client, process, runtime_dir, pair)
    at_end("the NBD server", stop_server, client)
    files = []
    for disk in disks:
        file = await trio.to_thread.run_sync(FleeceFile.make, fleece_dir, pair, disk.name, disk.size, process)
        inside.callback(file.close)
        files.append(file)
        node = fleece_node(pair, disk.name)
        # Before it is known to be there: its outcome may be in doubt.
        at_end(f"node {node}", _delete_node, client, node)
        await _add_fleece(client, node, file)
    capturer = Capturer(
        client,
        pair,
        disks,
        free_space=files[0].free_space if files else lambda: 0,
        cbw_timeout=CBW_TIMEOUT if Feature.CBW_TIMEOUT in capabilities else None,
        guardian=guardian,
        pause_limit=pause_limit,
    )
    attachment = Attachment(client, pair, disks, fleeces=files, capturer=capturer, transport=Pull(client, pair, server))
    at_end("a checkpoint", attachment._leave)
    return attachment


async def _add_fleece(client: QmpClient, node: NodeName, file: FleeceFile) -> None:
    try:
        await client.execute(commands.blockdev_add_file(node, str(file.path)))
    except CommandFailed as error:
        raise StorageError(
            f"QEMU cannot open the fleece file {file.path}: {error.desc}",
            safe="the VM was not touched",
            hint="let QEMU's user reach that directory, also through SELinux or AppArmor, or name another one "
            "(--fleece-dir)",
        ) from error
    # QEMU has it open from here on, and no crash of anybody leaves a file behind.
    await trio.to_thread.run_sync(file.unlink)


async def _delete_node(client: QmpClient, node: NodeName) -> None:
    if node in epoch.bitmaps_by_node(await client.execute(commands.query_named_block_nodes())):
        await client.execute(commands.blockdev_del(node))


async def _take_out(client: QmpClient, what: str, act: Callable[..., Awaitable[object]], *arguments: object) -> None:
    """One step at the end; what fails is logged, and the next step is taken."""
    if client.closed.is_set():
        return
    try:
        await act(*arguments)
    except QemuError as error:
        _log.warning("something of ours stays in QEMU; run qemu-remus detach later", what=what, error=str(error))
