"""From a configuration to a running controller, and back: attach to QEMU, run, and take everything out again.

Owns the order in which things are opened and closed, and what a cancellation means: a request to stop, no more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from qemu_remus.core.errors import ConfigError
from qemu_remus.core.settings import PrimaryConfig
from qemu_remus.primary.controller import PrimaryController
from qemu_remus.qemu.attachment import Attachment, open_attachment
from qemu_remus.qemu.capabilities import query_capabilities
from qemu_remus.qemu.client import QmpClient, open_qmp
from qemu_remus.qemu.discover import discover
from qemu_remus.qemu.disks import VmDisk, choose_disks
from qemu_remus.qemu.guardian_client import start_guardian
from qemu_remus.storage.memory import open_memory


async def run_primary(config: PrimaryConfig) -> None:
    """Protect one VM until cancelled; a cancellation ends the epoch under way and cleans up first.

    :raise ConfigError: when the disks asked for cannot be protected.
    :raise QemuError: when QEMU cannot be reached, lacks something, or has gone.
    :raise PeerRefused: when the secondary refuses this pair for good.
    :raise StorageError: when the state directory cannot be used.
    """
    with open_memory(config.state_dir, config.pair) as memory:
        async with _attached(config) as (client, disks, attachment):
            await _until_cancelled(PrimaryController(config, memory, client, disks, attachment))


@asynccontextmanager
async def _attached(config: PrimaryConfig) -> AsyncIterator[tuple[QmpClient, tuple[VmDisk, ...], Attachment]]:
    for directory in (config.fleece_dir, config.runtime_dir):
        _make_directory(directory)
    async with open_qmp(config.qmp) as client:
        caps = await query_capabilities(client)
        disks = choose_disks(await discover(client, caps), config.disks, caps)
        async with (
            start_guardian(config.qmp) as guardian,
            open_attachment(
                client,
                caps,
                config.pair,
                disks,
                fleece_dir=config.fleece_dir,
                runtime_dir=config.runtime_dir,
                guardian=guardian,
            ) as attachment,
        ):
            yield client, disks, attachment


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the directory {directory} cannot be made: {error.strerror or error}",
            safe="nothing was started",
            hint="choose another one with --fleece-dir, --state-dir or --control",
        ) from error


async def _until_cancelled(controller: PrimaryController) -> None:
    """Run the controller; turn a cancellation from outside into a request to stop, so that nothing is cut short."""
    stop = trio.Event()

    async def wait_for_cancellation() -> None:
        try:
            await trio.sleep_forever()
        finally:
            stop.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_cancellation)
        with trio.CancelScope(shield=True):
            await controller.run(stop)
        nursery.cancel_scope.cancel()
