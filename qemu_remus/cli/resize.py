"""``qemu-remus resize``: make a disk of a protected VM larger."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import trio

from qemu_remus.cli.exits import ExitCode
from qemu_remus.config import find_control, parse_size, places
from qemu_remus.control_client import open_control
from qemu_remus.core.commands import ResizeArguments
from qemu_remus.core.errors import CommandNotFound, ConfigError
from qemu_remus.core.model import Role, disk_name, pair_name
from qemu_remus.core.qapi import to_qmp

_SECTOR = 512
_PATIENCE = 5.0
"""Seconds beyond the controller's own time-out until its answer counts as lost."""


def resize(options: argparse.Namespace) -> int:
    """Resize, and print what size the disk has."""
    size = parse_size(options.size, "SIZE")
    if size <= 0 or size % _SECTOR:
        raise ConfigError(
            f"a disk cannot have {size} bytes", safe="nothing was changed", hint=f"give a multiple of {_SECTOR} bytes"
        )
    arguments = ResizeArguments(disk_name(options.disk), size, options.timeout)
    path: Path = options.control or find_control(
        places(os.environ, os.geteuid()), pair_name(options.pair), (Role.PRIMARY,)
    )
    answer = trio.run(_resize, path, arguments)
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        print(f"disk {answer['disk']} has {answer['size']} bytes; its copy follows with the next checkpoint")
    return ExitCode.OK


async def _resize(path: Path, arguments: ResizeArguments) -> Any:
    async with open_control(path) as client:
        try:
            return await client.execute("resize", to_qmp(arguments), timeout=arguments.timeout + _PATIENCE)
        except CommandNotFound as error:
            raise CommandNotFound(
                f"the controller on {path} is not a primary",
                safe="nothing was changed",
                hint="resize is for the host where the VM runs; the copy follows by itself",
            ) from error
