"""``qemu-remus failover``: have a secondary make its disks ready to start the VM from."""

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
from qemu_remus.core.commands import FailoverArguments, FailoverResult
from qemu_remus.core.errors import CommandNotFound, ConfigError
from qemu_remus.core.model import EpochNumber, Role, pair_name
from qemu_remus.core.qapi import from_qmp, to_qmp


def failover(options: argparse.Namespace) -> int:
    """Fail over and print the checkpoint that the disks hold; returns only when they are flushed and released."""
    if any(number < 1 for number in options.checkpoints):
        raise ConfigError("checkpoints are numbered from 1")
    arguments = FailoverArguments(
        checkpoints=tuple(EpochNumber(number) for number in options.checkpoints),
        last_committed=options.last_committed,
        force=options.force,
    )
    path: Path = options.control or find_control(
        places(os.environ, os.geteuid()), pair_name(options.pair), (Role.SECONDARY,)
    )
    answer = trio.run(_failover, path, arguments, options.timeout)
    if options.json:
        print(json.dumps(answer, indent=2))
    else:
        print("\n".join(render(from_qmp(FailoverResult, answer))))
    return ExitCode.OK


async def _failover(path: Path, arguments: FailoverArguments, timeout: float) -> Any:
    async with open_control(path) as client:
        try:
            return await client.execute("failover", to_qmp(arguments), timeout=timeout)
        except CommandNotFound as error:
            raise CommandNotFound(
                f"the controller on {path} is not a secondary",
                safe="nothing was changed",
                hint="failover is for the host that holds the copy",
            ) from error


def render(result: FailoverResult) -> list[str]:
    """The result for a person, as lines."""
    lines = [f"failed over: the disks hold checkpoint {result.checkpoint}, flushed and free for use"]
    width = max((len(disk.name) for disk in result.disks), default=0)
    lines += [f"  {disk.name:<{width}}  {disk.target or ''}".rstrip() for disk in result.disks]
    return lines
