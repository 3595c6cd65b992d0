"""From a configuration to a running controller, and back: attach to QEMU, run, and take everything out again.

Owns the order in which things are opened and closed, and what a cancellation means: a request to stop, no more.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from qemu_remus.core.errors import ConfigError, PeerRefused, RefusalCode
from qemu_remus.core.settings import PrimaryConfig
from qemu_remus.primary.controller import PrimaryController
from qemu_remus.qemu.attachment import Attachment, open_attachment
from qemu_remus.qemu.capabilities import query_capabilities
from qemu_remus.qemu.client import QmpClient, open_qmp
from qemu_remus.qemu.discover import discover
from qemu_remus.qemu.disks import choose_disks
from qemu_remus.qemu.guardian_client import start_guardian
from qemu_remus.qemu.shutdown import Ending, hold_end, is_attached
from qemu_remus.qemu.survey import Surveyor
from qemu_remus.storage.memory import PrimaryMemory, open_memory


async def run_primary(config: PrimaryConfig) -> None:
    """Protect one VM until cancelled; a cancellation ends the epoch under way and cleans up first.

    :raise ConfigError: when the disks asked for cannot be protected.
    :raise QemuError: when QEMU cannot be reached, lacks something, or has gone.
    :raise PeerRefused: when the secondary refuses this pair for good, or has been given the VM by a switch-over.
    :raise StorageError: when the state directory cannot be used.
    """
    with open_memory(config.state_dir, config.pair) as memory:
        _check_not_handed_over(config, memory)
        async with _attached(config) as (client, attachment, surveyor, ending):
            await _until_cancelled(PrimaryController(config, memory, client, attachment, surveyor, ending))


def _check_not_handed_over(config: PrimaryConfig, memory: PrimaryMemory) -> None:
    """Refuse where the VM was handed over to the secondary: this host's disks are its past.

    :raise PeerRefused: as the secondary itself would.
    """
    handover = memory.handover
    if handover is not None and handover.done:
        raise PeerRefused(
            f"this VM was handed over to the secondary at checkpoint {handover.target} (generation "
            f"{handover.generation} began there): its present is on that host, this host's disks are its past",
            RefusalCode.FAILED_OVER,
            safe="nothing was started or changed",
            hint="end the VM that is paused here. To protect it where it runs now, make this host its secondary, over "
            f"the old disks: qemu-remus secondary --store {config.state_dir} --force-discard "
            f"{memory.superblock.generation}",
        )


@asynccontextmanager
async def _attached(
    config: PrimaryConfig,
) -> AsyncIterator[tuple[QmpClient, Attachment, Surveyor, Ending | None]]:
    for directory in (config.fleece_dir, config.runtime_dir):
        _make_directory(directory)
    async with open_qmp(config.qmp) as client:
        caps = await query_capabilities(client)
        present = await discover(client, caps)
        disks = choose_disks(present, config.disks, caps)
        left = await is_attached(client, config.pair)
        async with (
            start_guardian(config.qmp, config.pair, patience=config.watchdog_seconds) as guardian,
            open_attachment(
                client,
                caps,
                config.pair,
                disks,
                fleece_dir=config.fleece_dir,
                runtime_dir=config.runtime_dir,
                guardian=guardian,
                fleece_memory=config.fleece_memory_bytes,
            ) as attachment,
            # A toolstack takes the checkpoints that it wants, and a VM that is off has no memory to go with them.
            hold_end(
                client, wanted=config.commit_at_shutdown and config.interval_seconds is not None, left=left
            ) as ending,
        ):
            yield client, attachment, Surveyor(client, caps, attachment, config.disks, present), ending


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
