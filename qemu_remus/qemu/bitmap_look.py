"""Looks at what a dirty bitmap holds while it records: QEMU exports none that does, so that a copy is made for it.

Owns that copy, which never outlives the look.  What may not enter: whose bitmaps they are, and what the look is for.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import trio

from qemu_remus.core.errors import CommandFailed
from qemu_remus.core.extents import Extent
from qemu_remus.core.model import BitmapName
from qemu_remus.nbd.batches import Run
from qemu_remus.qemu import commands, epoch
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.disks import VmDisk
from qemu_remus.qemu.nodes import BitmapIdentity
from qemu_remus.qemu.transport import Transport

_REMOVE_LIMIT: Final = 10.0
"""Seconds that QEMU may take to remove a bitmap."""


async def written(
    client: QmpClient, transport: Transport, disk: VmDisk, recording: BitmapIdentity, part: Extent
) -> tuple[Extent, ...]:
    """See :meth:`qemu_remus.qemu.attachment.Attachment.written`."""
    name = epoch.look_name(recording).name
    granularity = epoch.granularity_for(disk.size)
    look = commands.transaction(
        [
            commands.bitmap_add_action(disk.node, name, granularity=granularity, disabled=True),
            commands.bitmap_merge_action(disk.node, name, [recording.name]),
        ]
    )
    try:
        try:
            await client.execute(look)
        except CommandFailed:
            # A look that was cut short may have left it behind; a second refusal has another reason.
            await _forget(client, disk, name)
            nodes = epoch.bitmaps_by_node(await client.execute(commands.query_named_block_nodes()))
            epoch.confirmed(disk, nodes.get(disk.node, {}), recording)
            await client.execute(look)
        runs = await transport.find_dirty(disk, name, Run(part.offset, part.length), granularity)
    finally:
        with trio.move_on_after(_REMOVE_LIMIT) as scope:
            scope.shield = True
            await _forget(client, disk, name)
    return tuple(Extent(part.disk, run.offset, run.length) for run in runs)


async def _forget(client: QmpClient, disk: VmDisk, name: BitmapName) -> None:
    if not client.closed.is_set():
        with suppress(CommandFailed):
            await client.execute(commands.bitmap_remove(disk.node, name))
