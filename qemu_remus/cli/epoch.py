"""``qemu-remus epoch STEP``: one step of a checkpoint, for toolstacks whose hooks are shell scripts."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from qemu_remus.cli.exits import ExitCode
from qemu_remus.config import find_control, places
from qemu_remus.core.commands import EpochDone, EpochStarted, MemoryReceived, Nothing
from qemu_remus.core.errors import CommandNotFound, CommitInDoubt, ControlUnreachable
from qemu_remus.core.model import EpochNumber, Role, pair_name
from qemu_remus.core.qapi import to_qmp
from qemu_remus.toolstack import open_backup, open_toolstack


def prepare(options: argparse.Namespace) -> int:
    """Let nothing of the last epoch be in the way of the next one."""

    async def step(path: Path) -> tuple[object, str]:
        async with open_toolstack(path) as toolstack:
            await toolstack.prepare(timeout=options.timeout)
        return Nothing(), "ready for the next epoch"

    return _run(options, Role.PRIMARY, step)


def start(options: argparse.Namespace) -> int:
    """Capture the disks; print the number alone, for ``n=$(qemu-remus epoch start)``."""

    async def step(path: Path) -> tuple[object, str]:
        async with open_toolstack(path) as toolstack:
            try:
                begun = await toolstack.start(pause=options.pause, timeout=options.timeout)
            except ControlUnreachable as error:
                if not error.in_doubt:
                    raise
                raise ControlUnreachable(
                    error.what,
                    hint="an epoch may have been begun: `qemu-remus status` has its number, as captured, for "
                    "`qemu-remus epoch abort`",
                    in_doubt=True,
                ) from error
        return EpochStarted(begun.epoch, begun.dirty_bytes, begun.pause_ms), str(begun.epoch)

    return _run(options, Role.PRIMARY, step)


def finish(options: argparse.Namespace) -> int:
    """Wait until the epoch is staged."""
    number = EpochNumber(options.epoch)

    async def step(path: Path) -> tuple[object, str]:
        async with open_toolstack(path) as toolstack:
            await toolstack.finish(number, timeout=options.timeout)
        return EpochDone(number), f"epoch {number} is staged on the secondary"

    return _run(options, Role.PRIMARY, step)


def commit(options: argparse.Namespace) -> int:
    """Commit the epoch; an outcome that is not known has one exit code, whyever it is not."""
    number = EpochNumber(options.epoch)

    async def step(path: Path) -> tuple[object, str]:
        async with open_toolstack(path) as toolstack:
            try:
                await toolstack.commit(number, timeout=options.timeout)
            except ControlUnreachable as error:
                if not error.in_doubt:
                    raise
                raise CommitInDoubt(
                    f"whether epoch {number} is committed is not known: {error.what}",
                    safe="the secondary keeps the checkpoint before, and this one if it was staged",
                    hint="release no output, keep both memories, and give the same command again; or, where the "
                    "primary is lost, name both to `qemu-remus failover`",
                ) from error
        return EpochDone(number), f"epoch {number} is committed; the output up to it may be released"

    return _run(options, Role.PRIMARY, step)


def abort(options: argparse.Namespace) -> int:
    """Give the epoch up."""
    number = EpochNumber(options.epoch)

    async def step(path: Path) -> tuple[object, str]:
        async with open_toolstack(path) as toolstack:
            await toolstack.abort(number, timeout=options.timeout)
        return EpochDone(number), f"epoch {number} is given up; a later one carries its changes"

    return _run(options, Role.PRIMARY, step)


def received(options: argparse.Namespace) -> int:
    """Tell the secondary that a checkpoint's memory is there."""
    number = EpochNumber(options.epoch)

    async def step(path: Path) -> tuple[object, str]:
        async with open_backup(path) as backup:
            committed = await backup.memory_received(number, timeout=options.timeout)
        text = f"epoch {number} is committed" if committed else f"epoch {number} is committed as soon as it is staged"
        return MemoryReceived(number, committed), text

    return _run(options, Role.SECONDARY, step)


def _run(options: argparse.Namespace, role: Role, step: Callable[[Path], Awaitable[tuple[object, str]]]) -> int:
    path: Path = options.control or find_control(places(os.environ, os.geteuid()), pair_name(options.pair), (role,))
    answer, text = trio.run(_told, step, path, role)
    print(json.dumps(to_qmp(answer)) if options.json else text)
    return ExitCode.OK


async def _told(step: Callable[[Path], Awaitable[tuple[object, str]]], path: Path, role: Role) -> tuple[object, str]:
    try:
        return await step(path)
    except CommandNotFound as error:
        wanted = "a primary with --toolstack" if role is Role.PRIMARY else "a secondary"
        raise CommandNotFound(
            f"the controller on {path} is not {wanted}",
            safe="nothing was changed",
            hint="`qemu-remus epoch received` is for the host that holds the copy, the other steps for the VM's host",
        ) from error
