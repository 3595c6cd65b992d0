"""NBD exports of ours, made for as long as something is read, and gone when that has ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from qemu_remus.core.errors import CommandFailed, QemuError
from qemu_remus.core.model import BitmapName, NodeName
from qemu_remus.qemu import commands
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.commands import ExportDelMode

_GONE_LIMIT: Final = 10.0
"""Seconds until an export must be gone; QEMU waits for requests that are in flight on the host's disk."""


async def drop_export(client: QmpClient, export: str) -> None:
    """Take an export out, whoever is connected to it, and wait until it is gone; none of that name is fine.

    :raise QemuError: when it is still there after some seconds, or QEMU does not answer.
    """
    with client.subscribe("BLOCK_EXPORT_DELETED") as events:
        # Refused: it is not there, or is going already; the look tells.
        with suppress(CommandFailed):
            await client.execute(commands.block_export_del(export, ExportDelMode.HARD))
        with trio.move_on_after(_GONE_LIMIT):
            if not await _is_there(client, export):
                return
            async for event in events:
                if event.data.get("id") == export:
                    return
    raise QemuError(
        f"QEMU does not let go of NBD export {export}",
        safe="the VM goes on",
        hint="see with query-block-exports who uses it",
    )


async def _is_there(client: QmpClient, export: str) -> bool:
    return any(entry["id"] == export for entry in await client.execute(commands.query_block_exports()))


@asynccontextmanager
async def exported(
    client: QmpClient, export: str, node: NodeName, *, bitmaps: Sequence[tuple[NodeName, BitmapName]] = ()
) -> AsyncIterator[str]:
    """Export a node, read-only, under a name that is its id as well, for as long as the context lasts.

    :param bitmaps: offered with it, and busy meanwhile.
    :raise CommandFailed: when QEMU refuses.
    """
    try:
        await client.execute(commands.block_export_add_nbd(export, node, export, bitmaps=bitmaps))
        yield export
    finally:
        if not client.closed.is_set():
            with trio.move_on_after(2 * _GONE_LIMIT) as scope:
                scope.shield = True
                await drop_export(client, export)
