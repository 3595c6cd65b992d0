"""``qemu-remus retry-storage``: have a secondary look at once whether its store and images can be written again."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import trio

from qemu_remus.cli.exits import ExitCode
from qemu_remus.config import find_control, places
from qemu_remus.control_client import open_control
from qemu_remus.core.commands import StorageWorks
from qemu_remus.core.errors import CommandNotFound
from qemu_remus.core.model import Role, pair_name
from qemu_remus.core.qapi import from_qmp


def retry_storage(options: argparse.Namespace) -> int:
    """Try again now, and say whether it works."""
    path: Path = options.control or find_control(
        places(os.environ, os.geteuid()), pair_name(options.pair), (Role.SECONDARY,)
    )
    answer = trio.run(_retry_storage, path, options.timeout)
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        works = from_qmp(StorageWorks, answer)
        held = "no checkpoint yet" if works.committed is None else f"checkpoint {works.committed}"
        print(f"the secondary's storage works; it holds {held} ({works.disk.value})")
    return ExitCode.OK


async def _retry_storage(path: Path, timeout: float) -> Any:
    async with open_control(path) as client:
        try:
            return await client.execute("retry-storage", {}, timeout=timeout)
        except CommandNotFound as error:
            raise CommandNotFound(
                f"the controller on {path} is not a secondary",
                safe="nothing was changed",
                hint="retry-storage is for the host that holds the copy",
            ) from error
