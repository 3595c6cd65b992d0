"""``qemu-remus status``: ask a controller for its report, once or every second."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from qemu_remus.cli.exits import ExitCode
from qemu_remus.config import find_control, places
from qemu_remus.control_client import ControlClient, open_control
from qemu_remus.core.errors import ControlUnreachable
from qemu_remus.core.model import Role, pair_name
from qemu_remus.core.report import Report
from qemu_remus.status import display_for, render, style_for

_PERIOD: Final = 1.0


def status(options: argparse.Namespace) -> int:
    """Print the report; the exit code says whether the VM is protected."""
    path: Path = options.control or find_control(
        places(os.environ, os.geteuid()), pair_name(options.pair), (Role.PRIMARY, Role.SECONDARY)
    )
    if not options.watch:
        return trio.run(_once, path, options.json)
    last = _Last()
    # Ctrl-C is the usual end of watching.
    with contextlib.suppress(KeyboardInterrupt):
        trio.run(_watch, path, options.json, last)
    return last.code


class _Last:
    code: ExitCode = ExitCode.INTERRUPTED


def wants_colour() -> bool:
    """Whether standard output takes colours, and nobody said otherwise (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


async def _once(path: Path, as_json: bool) -> ExitCode:
    async with open_control(path) as client:
        answer, report = await _query(client, path)
    if as_json:
        print(json.dumps(answer, indent=2))
    else:
        width = shutil.get_terminal_size((100, 24)).columns - 1
        print("\n".join(render(report, width=width, style=style_for(sys.stdout, colour=wants_colour()))))
    return _code(report)


async def _watch(path: Path, as_json: bool, last: _Last) -> None:
    async with open_control(path) as client:
        if as_json:
            while True:
                answer, report = await _query(client, path)
                last.code = _code(report)
                print(json.dumps(answer), flush=True)
                await trio.sleep(_PERIOD)
        display = display_for(sys.stdout, colour=wants_colour())
        while True:
            _, report = await _query(client, path)
            last.code = _code(report)
            display.show(report)
            await trio.sleep(_PERIOD)


async def _query(client: ControlClient, path: Path) -> tuple[Any, Report]:
    answer = await client.execute("query-replication")
    try:
        return answer, Report.from_json(answer)
    except (msgspec.ValidationError, AttributeError) as error:
        raise ControlUnreachable(
            f"the report of the controller on {path} cannot be read: {error}",
            hint="use the qemu-remus that the controller is of",
        ) from error


def _code(report: Report) -> ExitCode:
    return ExitCode.OK if report.protected else ExitCode.NOT_PROTECTED
