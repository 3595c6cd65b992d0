"""``qemu-remus switchover``: hand a running VM over to its secondary, without losing a write."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, Final

import trio

from qemu_remus.cli.exits import ExitCode
from qemu_remus.config import find_control, places
from qemu_remus.control_client import open_control
from qemu_remus.core.commands import SwitchoverArguments, SwitchoverResult
from qemu_remus.core.errors import CommandNotFound, CommitInDoubt, ControlUnreachable
from qemu_remus.core.model import EpochNumber, Role, pair_name
from qemu_remus.core.qapi import from_qmp, to_qmp

_PATIENCE: Final = 10.0
"""Seconds beyond the command's own time-out until the controller counts as not answering."""


def switchover(options: argparse.Namespace) -> int:
    """Switch over and print the checkpoint; 0 only where the secondary's disks are free for use."""
    epoch = None if options.epoch is None else EpochNumber(options.epoch)
    path: Path = options.control or find_control(
        places(os.environ, os.geteuid()), pair_name(options.pair), (Role.PRIMARY,)
    )
    answer = trio.run(_switch_over, path, SwitchoverArguments(epoch=epoch, timeout=options.timeout))
    result = from_qmp(SwitchoverResult, answer)
    print(json.dumps(answer, indent=2) if options.json else render(result))
    return ExitCode.OK if result.complete else ExitCode.FAILURE


async def _switch_over(path: Path, arguments: SwitchoverArguments) -> Any:
    async with open_control(path) as client:
        try:
            return await client.execute("switchover", to_qmp(arguments), timeout=arguments.timeout + _PATIENCE)
        except CommandNotFound as error:
            raise CommandNotFound(
                f"the controller on {path} is not a primary",
                safe="nothing was changed",
                hint="switchover is for the host where the VM runs; when that is lost, use failover on the other",
            ) from error
        except ControlUnreachable as error:
            if not error.in_doubt:
                raise
            raise CommitInDoubt(
                f"the answer was lost: {error.what}",
                safe="the VM runs on, or the secondary has taken over, or the VM is left paused until that is known; "
                "two VMs never run",
                hint="ask both sides with 'qemu-remus status'; start the primary's controller again if it has ended",
            ) from error


def render(result: SwitchoverResult) -> str:
    """The result for a person."""
    done = f"handed over: the secondary's disks hold checkpoint {result.checkpoint}"
    if result.complete:
        return f"{done}, flushed and free for use; generation {result.generation}. The VM here stays paused: end it"
    return (
        f"{done}, and are not free for use yet; generation {result.generation}. The VM here stays paused: end it. "
        "'qemu-remus failover' on the secondary goes on, and says when they are"
    )
