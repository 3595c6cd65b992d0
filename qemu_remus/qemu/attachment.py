"""Everything that we have in one QEMU while a controller runs: fleeces, NBD server, bitmaps, one captured checkpoint.

:func:`open_attachment` finds what a crashed predecessor left and takes it out before it puts anything in; at its end
the guest's devices have their own nodes, and of ours only the bitmaps stay, whose identities are the caller's business.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from qemu_remus.core.errors import CheckpointVoid, CommandFailed, QemuError
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import BitmapName, DiskName, NodeName, PairName
from qemu_remus.nbd.batches import Batch, Run
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.bitmap_look import written
from qemu_remus.qemu.capabilities import Capabilities, Feature
from qemu_remus.qemu.capture import Capturer
from qemu_remus.qemu.client import PeerCredentials, QmpClient
from qemu_remus.qemu.detach import detach
from qemu_remus.qemu.disks import VmDisk, adding_needs_pause, is_continued, needs_push
from qemu_remus.qemu.epoch import BitmapLook, Capture, Tracked
from qemu_remus.qemu.events import EventStream
from qemu_remus.qemu.fleeces import Fleeces
from qemu_remus.qemu.guardian_client import DEFAULT_PAUSE_LIMIT, Guardian
from qemu_remus.qemu.hold import Hold
from qemu_remus.qemu.memory_room import memory_room
from qemu_remus.qemu.nbd_server import start_server, stop_server
from qemu_remus.qemu.nodes import BitmapIdentity, is_ours
from qemu_remus.qemu.process import qemu_process
from qemu_remus.qemu.push import Push
from qemu_remus.qemu.stagings import Stagings, see_that_push_is_there
from qemu_remus.qemu.transport import ByDisk, Pull, Transport, one_after_the_other
from qemu_remus.qemu.window import WindowCapturer

CBW_TIMEOUT: Final = 1
"""Seconds for which a slow fleece may hold up a guest's write, once per epoch; then the snapshot is given up."""

_CLOSE_LIMIT: Final = 30.0
"""Seconds that taking everything out may take at the end."""

_Nodes = Mapping[NodeName, Mapping[BitmapName, BitmapLook]]

_log = structlog.get_logger(__name__)


class Attachment:
    """What we have in one QEMU; made by :func:`open_attachment`. One task, and one checkpoint, at a time."""

    def __init__(
        self,
        client: QmpClient,
        pair: PairName,
        disks: tuple[VmDisk, ...],
        *,
        fleeces: Fleeces,
        stagings: Stagings,
        capturer: Capturer,
        transport: Transport,
        runstate: EventStream,
        hold: Hold,
    ) -> None:
        self.disks = disks
        """In the order that extents' disk numbers refer to."""
        self.hold = hold
        """The VM's pause, for a switch-over."""
        self._client = client
        self._pair = pair
        self._fleeces = fleeces
        self._stagings = stagings
        self._capturer = capturer
        self._transport = transport
        self._runstate = runstate
        self._stopped = False
        self._clean = True

    # --- bitmaps

    async def bitmaps(self) -> dict[DiskName, tuple[Tracked, ...]]:
        """The pair's bitmaps on each disk that can be trusted, oldest epoch first.

        :raise QemuError: when QEMU does not answer.
        """
        return self._tracked(await self._nodes())

    async def _nodes(self) -> _Nodes:
        return epoch.bitmaps_by_node(await self._client.execute(commands.query_named_block_nodes()))

    def _tracked(
        self, nodes: Mapping[NodeName, Mapping[BitmapName, BitmapLook]]
    ) -> dict[DiskName, tuple[Tracked, ...]]:
        return {disk.name: epoch.tracked(self._pair, nodes.get(disk.node, {})) for disk in self.disks}

    async def dirty_bytes(self) -> int:
        """Bytes that the pair's bitmaps hold at this moment, of all disks together.

        :raise QemuError: when QEMU does not answer.
        """
        nodes = await self._nodes()
        looks = [nodes.get(disk.node, {}) for disk in self.disks]
        return sum(look[one.name].count for look in looks for one in epoch.identities(self._pair, look))

    async def start_tracking(self, identity: BitmapIdentity) -> None:
        """Begin to record the changes of all disks in a new bitmap.

        :raise CommandFailed: when QEMU refuses; no disk has it then.
        :raise QemuError: when QEMU does not answer.
        """
        await self._client.execute(commands.transaction(epoch.rotation(self.disks, None, identity)))

    async def rotate(self, finished: BitmapIdentity, following: BitmapIdentity) -> None:
        """End a bitmap and begin the next while the guest runs; a write in between is in both.

        :raise CommandFailed: when QEMU refuses; nothing was changed.
        :raise QemuError: when QEMU does not answer.
        """
        await self._client.execute(commands.transaction(epoch.rotation(self.disks, finished, following)))

    async def clear(self, identity: BitmapIdentity) -> None:
        """Let a bitmap that records forget what it holds, on all disks; it goes on recording.

        :raise CommandFailed: when QEMU refuses, say because a disk does not have it; nothing was changed.
        :raise QemuError: when QEMU does not answer.
        """
        actions = [commands.bitmap_clear_action(disk.node, identity.name) for disk in self.disks]
        await self._client.execute(commands.transaction(actions))

    async def merge_back(
        self, old: Sequence[BitmapIdentity], into: Callable[[Mapping[DiskName, tuple[Tracked, ...]]], BitmapIdentity]
    ) -> None:
        """Fold bitmaps into one that records from now on, and remove them: nothing that they hold is lost.

        :param old: those that a disk does not have are passed over.
        :param into: names that one, from what :meth:`bitmaps` gives at this moment; it is begun where it is not there
            yet.
        :raise CommandFailed: when QEMU refuses, say because one is still exported; nothing was changed.
        :raise QemuError: when QEMU does not answer.
        """
        nodes = await self._nodes()
        actions = epoch.merging(self.disks, nodes, old, into(self._tracked(nodes)))
        if actions:
            await self._client.execute(commands.transaction(actions))

    async def remove_bitmaps(self, *identities: BitmapIdentity) -> None:
        """Remove bitmaps from every disk that has them.

        :raise CommandFailed: when QEMU refuses; all of them are still there.
        :raise QemuError: when QEMU does not answer.
        """
        try:
            # After every epoch they are all there.
            await self._remove([(disk, identity) for disk in self.disks for identity in identities])
        except CommandFailed:
            nodes = await self._nodes()
            there = [(disk, one) for disk in self.disks for one in identities if one.name in nodes.get(disk.node, {})]
            await self._remove(there)

    async def _remove(self, bitmaps: Sequence[tuple[VmDisk, BitmapIdentity]]) -> None:
        actions = [commands.bitmap_remove_action(disk.node, identity.name) for disk, identity in bitmaps]
        if actions:
            await self._client.execute(commands.transaction(actions))

    async def stand_still(self, recording: BitmapIdentity) -> None:
        """See that the VM is paused and has written nothing since a bitmap was begun; then make the pause final.

        :param recording: that bitmap.
        :raise CheckpointVoid: the VM runs, or has run.
        :raise GraphChanged: a disk does not have the bitmap any more.
        :raise QemuError: QEMU or the guardian does not answer.
        """
        nodes = await self._nodes()
        looks = [epoch.confirmed(disk, nodes.get(disk.node, {}), recording) for disk in self.disks]
        written = any(not look.recording or look.count for look in looks)
        if written or not await self._capturer.vm_is_paused():
            raise CheckpointVoid("somebody let the VM run on after its last checkpoint")
        await self.hold.stand()

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
        await trio.to_thread.run_sync(self._fleeces.empty)
        self._clean = True

    async def vm_is_paused(self) -> bool:
        """Whether the guest stands still: at once where its last event says so, since somebody waits for us then.

        :raise QemuError: when QEMU does not answer.
        """
        for event in self._runstate.drain():
            self._stopped = event.name == "STOP"
        if self._stopped and not self._runstate.overflowed:
            return True
        return await self._capturer.vm_is_paused()

    async def capture(self, finished: BitmapIdentity, following: BitmapIdentity, *, pause: bool) -> Capture:
        """Capture a checkpoint: see :meth:`qemu_remus.qemu.capture.Capturer.capture`, and :meth:`prepare`.

        Its data can be read until :meth:`release`. After a failure ask :meth:`bitmaps` which there are.
        """
        await self.prepare()
        self._clean = False
        capture = await self._capturer.capture(finished, following, pause=pause)
        # Where nothing has changed nothing was put in.
        self._clean = not capture.disks
        return capture

    @asynccontextmanager
    async def read(self, capture: Capture) -> AsyncIterator[AsyncIterator[Batch]]:
        """What the changed blocks hold at the checkpoint, disk after disk, each in ascending order.

        ::

            async with attachment.read(capture) as batches:
                async for batch in batches:
                    ...

        The iterator raises :class:`SnapshotBroken` when the snapshot was given up for the guest's sake,
        :class:`NbdError` when reading fails in another way, and :class:`QemuError` when QEMU does not export a disk;
        entering raises :class:`GraphChanged` when another tool has been at the block graph.
        """
        await self._capturer.confirm(capture)
        sources = [partial(self._transport.read, capture, disk) for disk in capture.disks]
        async with one_after_the_other(sources) as batches:
            yield batches

    @asynccontextmanager
    async def read_live(self, index: int, *, start: int = 0) -> AsyncIterator[AsyncIterator[Batch]]:
        """What a disk holds at this moment, changing under the reader, in ascending order; errors as :meth:`read`.

        :param index: in :attr:`disks`.
        :param start: bytes from the disk's start that are left out, a multiple of 64 KiB.
        """
        await self._make_way(index)
        source = partial(self._transport.read_live, index, self.disks[index], start=start)
        async with one_after_the_other([source]) as batches:
            yield batches

    @asynccontextmanager
    async def read_ahead(
        self, finished: BitmapIdentity, *, skip: Collection[int] = ()
    ) -> AsyncIterator[AsyncIterator[Batch]]:
        """What the blocks of a bitmap that records no more hold at this moment, changing under the reader; order and
        errors as :meth:`read`.

        :param finished: ended by :meth:`rotate`.
        :param skip: disks that are left out, by their place.
        :raise GraphChanged: when one of the others does not have the bitmap any more.
        """
        await self._make_way(*range(len(self.disks)))
        nodes = await self._nodes()
        looks = {
            index: epoch.confirmed(disk, nodes.get(disk.node, {}), finished)
            for index, disk in enumerate(self.disks)
            if index not in skip
        }
        sources = [
            partial(self._transport.read_ahead, index, self.disks[index], look)
            for index, look in looks.items()
            if look.count
        ]
        async with one_after_the_other(sources) as batches:
            yield batches

    async def _make_way(self, *live: int) -> None:
        """Before live disks are read. What push puts over them for that, and cannot take out, the next capture will."""
        if any(self._transport.enters_graph(self.disks[index]) for index in live):
            await self.prepare()
            self._clean = False

    @asynccontextmanager
    async def read_part(self, part: Extent) -> AsyncIterator[AsyncIterator[Batch]]:
        """What a part of a disk holds at this moment; order and errors as :meth:`read_live`.

        :param part: its disk is a place in :attr:`disks`.
        """
        disk = self.disks[part.disk]
        await self._make_way(part.disk)
        source = partial(self._transport.read_part, part.disk, disk, Run(part.offset, part.length))
        async with one_after_the_other([source]) as batches:
            yield batches

    async def written(self, recording: BitmapIdentity, part: Extent) -> tuple[Extent, ...]:
        """What a recording bitmap holds of a part of its disk at this moment, in ascending order.

        Every write that a reader may have seen before the call is in it: QEMU marks a block when the write has ended,
        and the transaction waits for those under way.

        :param part: its disk is a place in :attr:`disks`.
        :raise GraphChanged: when the disk does not have the bitmap any more.
        :raise QemuError: when QEMU does not answer.
        :raise NbdError: when the bitmap cannot be read.
        """
        return await written(self._client, self._transport, self.disks[part.disk], recording, part)

    async def release(self, capture: Capture) -> None:
        """Give the guest's devices their own nodes back and empty the fleeces. May be called again, and after failures.

        :raise QemuError: as :meth:`prepare`, which the next capture calls again.
        :raise StorageError: when a fleece cannot be emptied.
        """
        if capture.disks or not self._clean:
            self._clean = self._clean and not capture.disks
            await self.prepare()

    async def follow(self, disks: tuple[VmDisk, ...]) -> None:
        """Have these disks from now on. Nothing of a checkpoint may be in: see :meth:`prepare`.

        A bitmap stays where its disk is on the same node and not smaller; all others of the pair are removed, as
        nobody may take them for a record of what the disk has now.

        :raise QemuError: when QEMU refuses or does not answer; it can be tried again.
        :raise StorageError: when a fleece cannot be made.
        """
        known = {disk.name: disk for disk in self.disks}
        kept = {disk.node for disk in disks if is_continued(known.get(disk.name), disk)}
        stale = [
            commands.bitmap_remove_action(node, name)
            for node, bitmaps in (await self._nodes()).items()
            if node not in kept
            for name in (identity.name for identity in epoch.identities(self._pair, bitmaps))
        ]
        if stale:
            await self._client.execute(commands.transaction(stale))
        for name in known.keys() - {disk.name for disk in disks}:
            await self._stagings.take_out(name)
            await self._fleeces.take_out(name)
        for disk in disks:
            if not self._fleeces.fits(disk):
                await self._fleeces.put_in(disk)
            if not self._stagings.fits(disk):
                await self._stagings.put_in(disk)
        self.disks = disks
        self._capturer.follow(disks, in_memory=self._fleeces.in_memory)

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
    fleece_memory: int | None = 0,
) -> AsyncIterator[Attachment]:
    """Attach to a QEMU: clean up after a predecessor, start the NBD server, give every disk its fleece, and its staging
    where it is read by push.

    At the end filters, exports, jobs, fleeces and the NBD server are taken out, shielded from cancellation and with a
    deadline; what does not go then is logged. The bitmaps stay.

    :param disks: from ``choose_disks``.
    :param fleece_dir: absolute; holds the fleeces, which QEMU must be able to open.
    :param runtime_dir: absolute; holds the NBD server's socket, which QEMU makes.
    :param guardian: None: the VM is never paused by us, or nobody resumes it if we die.
    :param pause_limit: seconds after which the guardian ends a pause of ours, and us.
    :param fleece_memory: most bytes of memory for what the guest overwrites during a transfer, where it finds room
        there; 0: none; None: a part of what is free.
    :raise DiskUnsupported: when somebody else uses QEMU's NBD server, and this QEMU cannot do without it.
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
            client,
            process,
            capabilities,
            pair,
            disks,
            fleece_dir,
            runtime_dir,
            guardian,
            pause_limit,
            fleece_memory,
            inside,
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
    fleece_memory: int | None,
    inside: AsyncExitStack,
) -> Attachment:
    """Put in what is needed; whatever went in is taken out again by ``inside``, whether the rest goes in or not."""

    def at_end(what: str, act: Callable[..., Awaitable[object]], *arguments: object) -> None:
        inside.push_async_callback(_take_out, client, what, act, *arguments)

    server = await start_server(client, process, runtime_dir, pair)
    if server is None:
        see_that_push_is_there(capabilities)
    else:
        at_end("the NBD server", stop_server, client)
    fleeces = Fleeces(client, pair, fleece_dir, process, memory=fleece_memory != 0)
    stagings = Stagings(
        client, pair, fleece_dir, process, needed=lambda disk: server is None or needs_push(disk, capabilities)
    )
    # Before the first is in: whether one is may be in doubt.
    at_end("a fleece", _close_scratch, fleeces)
    at_end("a staging file", _close_scratch, stagings)
    for disk in disks:
        await fleeces.put_in(disk)
        await stagings.put_in(disk)
    capturer = WindowCapturer(
        client,
        pair,
        disks,
        free_space=fleeces.free_space,
        memory=partial(memory_room, process.pid, fleece_memory) if fleeces.in_memory else None,
        cbw_timeout=CBW_TIMEOUT if Feature.CBW_TIMEOUT in capabilities else None,
        guardian=guardian,
        pause_limit=pause_limit,
        fragile=lambda disk: adding_needs_pause(disk, capabilities),
    )
    attachment = Attachment(
        client,
        pair,
        disks,
        fleeces=fleeces,
        stagings=stagings,
        capturer=capturer,
        transport=ByDisk(
            None if server is None else Pull(client, pair, server),
            Push(client, pair, capturer, fleeces=fleeces, stagings=stagings),
        ),
        runstate=inside.enter_context(client.subscribe("STOP", "RESUME")),
        hold=Hold(client, guardian),
    )
    at_end("the VM's pause", attachment.hold.let_go)
    at_end("a checkpoint", attachment._leave)
    return attachment


async def _close_scratch(files: Fleeces | Stagings) -> None:
    for left in await files.close():
        _log.warning("something of ours stays in QEMU; run qemu-remus detach later", what=left)


async def _take_out(client: QmpClient, what: str, act: Callable[..., Awaitable[object]], *arguments: object) -> None:
    """One step at the end; what fails is logged, and the next step is taken."""
    if client.closed.is_set() and act is not _close_scratch:
        return
    try:
        await act(*arguments)
    except QemuError as error:
        _log.warning("something of ours stays in QEMU; run qemu-remus detach later", what=what, error=str(error))
