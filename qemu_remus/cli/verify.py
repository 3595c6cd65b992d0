"""``qemu-remus verify``: have a primary compare the copy with the VM's disks, and show what it finds."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from qemu_remus.cli.exits import ExitCode
from qemu_remus.config import find_control, parse_size, places
from qemu_remus.control_client import open_control
from qemu_remus.core.commands import VERIFY_RATE_LEAST, VerifyArguments, VerifyStarted
from qemu_remus.core.errors import CommandNotFound, ConfigError, ControlUnreachable, OutOfOrder
from qemu_remus.core.model import Role, disk_name, pair_name
from qemu_remus.core.qapi import from_qmp, to_qmp
from qemu_remus.core.report import Report, VerifyReport, VerifyState
from qemu_remus.status import size, verify_numbers

_PERIOD: Final = 0.25
"""Seconds between two looks at how far it is."""

_LINE_PERIOD: Final = 5.0
"""Seconds between two lines about it, where standard error is no terminal."""


def verify(options: argparse.Namespace) -> int:
    """Verify, showing the progress, and print what was found; the exit code says whether the copy is good."""
    rate = 0
    if options.rate is not None:
        rate = parse_size(options.rate, "--rate")
        if rate < VERIFY_RATE_LEAST:
            raise ConfigError(f"--rate {options.rate} is too slow", hint="give at least 64K")
    disks = tuple(disk_name(name) for name in options.disks)
    path: Path = options.control or find_control(
        places(os.environ, os.geteuid()), pair_name(options.pair), (Role.PRIMARY,)
    )
    if options.cancel:
        trio.run(_cancel, path)
        print("the verification is being ended", file=sys.stderr)
        return ExitCode.OK
    arguments = VerifyArguments(disks, options.repair, rate)
    result, interrupted = trio.run(_verify, path, arguments)
    if options.json:
        print(json.dumps(to_qmp(result), indent=2))
    else:
        print("\n".join(render(result)))
    return exit_code(result, interrupted=interrupted)


def exit_code(result: VerifyReport, *, interrupted: bool) -> ExitCode:
    """What the end of a verification means to a script."""
    if interrupted:
        return ExitCode.INTERRUPTED
    if result.state is not VerifyState.COMPLETED:
        return ExitCode.FAILURE
    return ExitCode.DIFFERENT if result.repaired_bytes < result.differing_bytes else ExitCode.OK


def render(result: VerifyReport) -> list[str]:
    """The result for a person, as lines."""
    head = {
        VerifyState.COMPLETED: "verified",
        VerifyState.CANCELLED: "ended early",
        VerifyState.FAILED: "FAILED",
    }.get(result.state, result.state.value)
    lines = [f"{head}: {size(result.done_bytes)} of {size(result.total_bytes)} on {', '.join(result.disks)}"]
    if result.reason:
        lines.append(f"  {result.reason}")
    if result.rewritten_bytes:
        lines.append(
            f"  {size(result.rewritten_bytes)} could not be compared, as the guest wrote them each time; the epochs "
            "send them anew"
        )
    if not result.differing_ranges:
        found = "the copy is the same as the VM's disks"
        return [*lines, f"  {found}" if result.state is VerifyState.COMPLETED else "  no differences so far"]
    lines.append(f"  DIFFERENT: {size(result.differing_bytes)} in {result.differing_ranges} ranges")
    width = max(len(one.disk) for one in result.ranges)
    lines += [f"    {one.disk:<{width}}  {one.offset}  {one.length}" for one in result.ranges]
    if result.ranges_truncated:
        lines.append(f"    ... and more: only {len(result.ranges)} are listed")
    if result.repaired_bytes >= result.differing_bytes:
        lines.append("  all of it was sent anew, and is committed: repaired")
    elif result.repaired_bytes:
        lines.append(f"  {size(result.repaired_bytes)} of it was sent anew, and is committed")
    elif not result.repair:
        lines.append("  nothing was changed; with --repair it is sent anew")
    return lines


async def _cancel(path: Path) -> None:
    async with open_control(path) as client:
        try:
            await client.execute("verify-cancel")
        except CommandNotFound as error:
            raise _no_primary(path) from error


def _no_primary(path: Path) -> CommandNotFound:
    return CommandNotFound(
        f"the controller on {path} is not a primary",
        safe="nothing was changed",
        hint="verify is for the host where the VM runs",
    )


async def _verify(path: Path, arguments: VerifyArguments) -> tuple[VerifyReport, bool]:
    """The result, and whether it was ended early by a signal."""
    show = _progress_for(sys.stderr)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with open_control(path) as client:
            try:
                answer = await client.execute("verify", to_qmp(arguments))
            except CommandNotFound as error:
                raise _no_primary(path) from error
            started = from_qmp(VerifyStarted, answer)
            interrupted = False
            while True:
                result = _result(await client.execute("query-replication"), path, started.number)
                if result.state not in (VerifyState.RUNNING, VerifyState.SUSPENDED):
                    show(None)
                    return result, interrupted
                show(result)
                with trio.move_on_after(_PERIOD) as pause:
                    await anext(signals)
                if not pause.cancelled_caught and not interrupted:
                    interrupted = True
                    await _end(path)


async def _end(path: Path) -> None:
    async with open_control(path) as client:
        # Refused, it has just ended by itself.
        with contextlib.suppress(OutOfOrder):
            await client.execute("verify-cancel")


def _result(answer: Any, path: Path, number: int) -> VerifyReport:
    try:
        result = Report.from_json(answer).verify
    except (msgspec.ValidationError, AttributeError) as error:
        raise ControlUnreachable(
            f"the report of the controller on {path} cannot be read: {error}",
            hint="use the qemu-remus that the controller is of",
        ) from error
    if result is None or result.number != number:
        raise ControlUnreachable(
            "the verification's result is gone: another one has begun since, or the controller was started anew",
            hint="verify again",
        )
    return result


def _progress_for(out: Any) -> Callable[[VerifyReport | None], None]:
    """Shows how far it is, in place on a terminal and now and then elsewhere; None: it has ended."""
    terminal = out.isatty()
    last = float("-inf")

    def show(result: VerifyReport | None) -> None:
        nonlocal last
        if result is None:
            if terminal:
                print("\r\x1b[K", end="", file=out, flush=True)
            return
        now = trio.current_time()
        if not terminal and now - last < _LINE_PERIOD:
            return
        last = now
        line = verify_numbers(result)
        print(f"\r\x1b[K{line}" if terminal else line, end="" if terminal else "\n", file=out, flush=True)

    return show
