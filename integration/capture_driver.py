"""A controller of one checkpoint, for tests that end it in the middle: ``python -m integration.capture_driver ...``.

Prints the guardian's process id on a line, captures a checkpoint with a pause of its own, or does other work, and dies,
or stops itself, at the point that it was told; where the point does not come it takes everything out and exits with 0.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from uuid import UUID

import trio

from qemu_remus.core.model import EpochNumber, Generation, pair_name
from qemu_remus.core.settings import DEFAULT_WATCHDOG_SECONDS
from qemu_remus.nbd.batches import Batch
from qemu_remus.qemu.attachment import open_attachment
from qemu_remus.qemu.capabilities import query_capabilities
from qemu_remus.qemu.client import open_qmp
from qemu_remus.qemu.discover import discover
from qemu_remus.qemu.disks import choose_disks
from qemu_remus.qemu.guardian_client import start_guardian
from qemu_remus.qemu.nodes import BitmapIdentity
from tests.faulty_qmp import Fault, FaultyQmp


async def _main(options: argparse.Namespace) -> None:
    pair = pair_name("driver")
    generation = Generation(options.generation)
    async with open_qmp(options.qmp) as plain:
        client = FaultyQmp(plain)
        capabilities = await query_capabilities(plain)
        disks = choose_disks(await discover(plain, capabilities), None, capabilities)
        async with (
            start_guardian(options.qmp, pair, patience=options.patience) as guardian,
            open_attachment(
                client.as_client(),
                capabilities,
                pair,
                disks,
                fleece_dir=options.directory,
                runtime_dir=options.directory,
                guardian=guardian,
                pause_limit=options.pause_limit,
            ) as attachment,
        ):
            print(guardian.pid, flush=True)
            finished = BitmapIdentity(pair, generation, None, EpochNumber(options.epoch))
            following = BitmapIdentity(pair, generation, None, EpochNumber(options.epoch + 1))
            old = {one.identity for found in (await attachment.bitmaps()).values() for one in found}
            await attachment.merge_back(sorted(old, key=lambda one: one.epoch), lambda _: finished)
            client.arm(Fault(options.fault), int(options.point) if options.point.isdigit() else options.point)
            if options.work == "live":
                await _read(attachment.read_live(0))
            else:
                capture = await attachment.capture(finished, following, pause=True)
                if options.work == "capture":
                    client.disarm()
                else:
                    await _read(attachment.read(capture))
                await attachment.release(capture)
            client.disarm()


async def _read(reading: AbstractAsyncContextManager[AsyncIterator[Batch]]) -> None:
    async with reading as batches:
        async for _ in batches:
            pass


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--qmp", type=Path, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--generation", type=UUID, required=True)
    parser.add_argument("--epoch", type=int, required=True)
    parser.add_argument("--fault", required=True, choices=[Fault.KILL.value, Fault.STOP.value])
    parser.add_argument("--point", required=True, help="a number, or a command's name: see tests/faulty_qmp.py")
    parser.add_argument("--pause-limit", type=float, default=10.0)
    parser.add_argument(
        "--work",
        choices=["capture", "epoch", "live"],
        default="capture",
        help="capture a checkpoint; read it too, and take it out, all with the fault; or read the first disk as it is",
    )
    parser.add_argument("--patience", type=float, default=DEFAULT_WATCHDOG_SECONDS)
    trio.run(_main, parser.parse_args())


if __name__ == "__main__":
    main()
