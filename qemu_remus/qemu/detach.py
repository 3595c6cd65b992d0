"""Take everything that is ours out of a QEMU, from whatever state a controller left it in, and nothing else.

What is there decides, never what somebody remembers, so it may be repeated at will.  The order is that of use, users
first: jobs, exports, ``snapshot-access`` nodes, filters (the device gets its disk node back), fleeces and what a push
has beside them, QEMU's NBD
server if a controller of ours started it, dirty bitmaps.  What QEMU refuses to let go is left and reported.

- ``qom-set drive`` is sent only to a device that has our filter at that moment: any other node was put there by
  somebody else, and giving a device the node that it has already aborts QEMU.
- Something that was put over our filter (an overlay, a throttle) is not touched; the filter then has to stay below it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from qemu_remus.core.errors import CommandFailed, CommandInDoubt, QemuError, QemuUnreachable
from qemu_remus.core.model import BitmapName, NodeName, PairName, QdevPath
from qemu_remus.qemu import commands
from qemu_remus.qemu.capabilities import Capabilities, query_capabilities
from qemu_remus.qemu.client import QmpClient
from qemu_remus.qemu.commands import Command, ExportDelMode
from qemu_remus.qemu.discover import read_graph
from qemu_remus.qemu.events import EventStream
from qemu_remus.qemu.jobs import end_jobs
from qemu_remus.qemu.nbd_server import find_our_server, socket_path
from qemu_remus.qemu.nodes import Kind, is_a_look, is_ours, kind_of
from qemu_remus.qemu.process import qemu_process

_GONE_WITHIN: Final = 10.0
"""Seconds that an export may take to end; a job has as many."""


@dataclass(frozen=True, slots=True)
class LeftOver:
    """Something of ours that could not be taken out.

    :param name: its name in QEMU.
    :param why: what QEMU said, or what we saw.
    :param hint: what to do.
    """

    name: str
    why: str
    hint: str


@dataclass(frozen=True, slots=True)
class DetachReport:
    """What was done.

    :param ok: nothing that should have gone is left.
    :param removed: one line for each thing that was taken out, in that order.
    """

    ok: bool
    removed: tuple[str, ...]
    left: tuple[LeftOver, ...]

    def lines(self) -> list[str]:
        """The report for a person."""
        lines = [f"removed {what}" for what in self.removed]
        lines += [f"LEFT {left.name}: {left.why}. {left.hint}" for left in self.left]
        return lines or ["there was nothing of ours in this QEMU"]


async def detach(client: QmpClient, pair: PairName | None, *, keep_tracking: bool = False) -> DetachReport:
    """Take out what is ours.

    :param pair: only what belongs to this pair; None for all.
    :param keep_tracking: leave the dirty bitmaps, so that a later start can send the difference.
    :raise CommandInDoubt: when the connection is lost on the way; run it again.
    :raise QemuUnreachable: the same, between two commands.
    """
    work = _Detach(client, await query_capabilities(client), pair)
    with client.subscribe("BLOCK_EXPORT_DELETED") as events:
        await work.jobs()
        await work.exports(events)
    await work.nodes(Kind.ACCESS, "snapshot-access node")
    await work.filters()
    await work.nodes(Kind.FLEECE, "fleece")
    await work.nodes(Kind.MAP, "bitmap image")
    await work.nodes(Kind.MAP_FILE, "bitmap file")
    await work.nodes(Kind.STAGING, "staging file")
    await work.nbd_server()
    await work.bitmaps(tracking=not keep_tracking)
    return DetachReport(not work.left, tuple(work.removed), tuple(work.left))


@dataclass(slots=True)
class _Detach:
    client: QmpClient
    capabilities: Capabilities
    pair: PairName | None
    removed: list[str] = field(default_factory=list)
    left: list[LeftOver] = field(default_factory=list)

    def _ours(self, name: str) -> bool:
        return is_ours(name, self.pair)

    async def _try(self, command: Command, *, name: str, what: str, hint: str) -> bool:
        try:
            await self.client.execute(command)
        except CommandFailed as error:
            self.left.append(LeftOver(name, error.desc, hint))
            return False
        self.removed.append(what)
        return True

    async def _wait_until_gone(
        self, names: set[str], there: Callable[[], Awaitable[set[str]]], events: EventStream, hint: str
    ) -> None:
        remaining = names
        with trio.move_on_after(_GONE_WITHIN):
            while remaining := names & await there():
                try:
                    await anext(events)
                except StopAsyncIteration:
                    break
        self.left += [LeftOver(name, f"it did not end within {_GONE_WITHIN:g} s", hint) for name in sorted(remaining)]

    async def jobs(self) -> None:
        there = [job["id"] for job in await self.client.execute(commands.query_jobs()) if self._ours(job["id"])]
        if not there:
            return
        try:
            await end_jobs(self.client, self._ours)
        except QemuError as error:
            if isinstance(error, CommandInDoubt | QemuUnreachable):
                raise
        left = {job["id"]: job for job in await self.client.execute(commands.query_jobs())}
        self.removed += [f"job {job}" for job in there if job not in left]
        hint = "look at it with query-jobs, then run this again"
        why = f"it did not end within {_GONE_WITHIN:g} s"
        self.left += [LeftOver(job, why, hint) for job in there if job in left]

    async def exports(self, events: EventStream) -> None:
        async def there() -> set[str]:
            entries = await self.client.execute(commands.query_block_exports())
            return {entry["id"] for entry in entries if self._ours(entry["id"])}

        hint = "look at it with query-block-exports, then run this again"
        asked = {
            export
            for export in sorted(await there())
            if await self._try(
                commands.block_export_del(export, ExportDelMode.HARD),
                name=export,
                what=f"NBD export {export}",
                hint=hint,
            )
        }
        if asked:
            await self._wait_until_gone(asked, there, events, hint)

    async def _names(self, kind: Kind) -> list[NodeName]:
        entries = await self.client.execute(commands.query_named_block_nodes())
        names = sorted({NodeName(entry.get("node-name", "")) for entry in entries})
        return [name for name in names if self._ours(name) and kind_of(name) is kind]

    async def nodes(self, kind: Kind, what: str) -> None:
        for name in await self._names(kind):
            await self._try(
                commands.blockdev_del(name),
                name=name,
                what=f"{what} {name}",
                hint="end what uses it (query-block-exports, query-jobs), then run this again",
            )

    async def filters(self) -> None:
        for name in await self._names(Kind.FILTER):
            if await self._unplug(name):
                await self._try(
                    commands.blockdev_del(name),
                    name=name,
                    what=f"replication filter {name}",
                    hint="another tool has put a node over it, which was left alone: take that out (an overlay with"
                    " block-commit), then run this again",
                )

    async def _unplug(self, name: NodeName) -> bool:
        """Give every device that has the filter the disk node below it."""
        # Read anew for each filter: the node that a device has must be known as of this moment.
        graph = await read_graph(self.client, self.capabilities)
        devices = [
            QdevPath(entry.get("qdev", ""))
            for entry in graph.devices
            if (entry.get("inserted") or {}).get("node-name") == name
        ]
        disk = graph.below.get(name)
        for qdev in devices:
            if disk is None or not qdev:
                self.left.append(
                    LeftOver(
                        name,
                        "this QEMU does not show what is below it" if disk is None else "no device path is known",
                        "put the disk's own node back with qom-set, then run this again",
                    )
                )
                return False
            put_back = await self._try(
                commands.qom_set_drive(qdev, disk),
                name=name,
                what=f"replication filter from device {qdev}, which has its disk node {disk} again",
                hint=f"device {qdev} keeps it; the guest's I/O goes through it to {disk} unchanged. Find out what uses"
                " the disk (query-block, query-jobs), then run this again",
            )
            if not put_back:
                return False
        return True

    async def nbd_server(self) -> None:
        qemu = await qemu_process(self.client)
        path = await trio.to_thread.run_sync(find_our_server, qemu)
        if path is None or (self.pair is not None and path != socket_path(path.parent, self.pair, qemu)):
            return
        users = [
            entry["id"] for entry in await self.client.execute(commands.query_block_exports()) if entry["type"] == "nbd"
        ]
        if users:
            self.left.append(
                LeftOver(
                    f"QEMU's NBD server on {path}",
                    f"it is in use by {', '.join(users)}",
                    "when that has ended, stop it with nbd-server-stop, or run this again",
                )
            )
            return
        await self._try(
            commands.nbd_server_stop(),
            name=f"QEMU's NBD server on {path}",
            what=f"QEMU's NBD server on {path}",
            hint="look at it with query-block-exports, then run this again",
        )

    async def bitmaps(self, *, tracking: bool) -> None:
        """Remove bitmaps.

        :param tracking: also those that track changes; else only what a look at one of them has left.
        """
        entries = await self.client.execute(commands.query_named_block_nodes())
        for entry in entries:
            node = NodeName(entry.get("node-name", ""))
            for bitmap in entry.get("dirty-bitmaps", ()):
                name = BitmapName(bitmap.get("name", ""))
                if not self._ours(name) or not (tracking or is_a_look(name)):
                    continue
                await self._try(
                    commands.bitmap_remove(node, name),
                    name=name,
                    what=f"dirty bitmap {name} of node {node}",
                    hint="end what uses it (query-block-exports, query-jobs), then run this again",
                )
