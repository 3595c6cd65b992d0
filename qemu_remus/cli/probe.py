"""``qemu-remus probe``: can this VM be protected, and if not, what is to be done.  Changes nothing anywhere."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

import trio

from qemu_remus.cli.exits import ExitCode, leaves
from qemu_remus.config import parse_address, parse_assignments, parse_size, places
from qemu_remus.core.errors import ConfigError, LinkError
from qemu_remus.core.model import NodeName, Role, pair_name
from qemu_remus.core.qapi import to_qmp
from qemu_remus.core.settings import Address
from qemu_remus.core.wire import parse_banner
from qemu_remus.qemu import schema
from qemu_remus.qemu.capabilities import query_schema, version_text
from qemu_remus.qemu.client import open_qmp
from qemu_remus.qemu.probe import probe as look_at
from qemu_remus.qemu.probe_model import Finding, Intent, Level, ProbeReport
from qemu_remus.qemu.probe_text import plain, render

_SECONDARY_TIMEOUT: Final = 5.0


def probe(options: argparse.Namespace) -> int:
    """Print what was found; the exit code says yes or no. Or keep the schema."""
    if options.capture:
        return _capture(options.qmp, options.capture)
    secondary = None if options.secondary is None else parse_address(options.secondary, "--secondary")
    report = trio.run(_probe, options.qmp, _intent(options), secondary)
    if options.json:
        print(json.dumps(to_qmp(report), indent=2))
    else:
        width = min(100, shutil.get_terminal_size((100, 24)).columns - 1)
        for line in render(report, width=width):
            print(line if _shows(line) else plain(line))
    return ExitCode.OK if report.ok else ExitCode.NOT_PROTECTED


def _capture(qmp: Path, file: Path) -> int:
    captured = trio.run(_schema, qmp)
    try:
        file.write_text(schema.render(captured))
    except OSError as error:
        what = f"the schema cannot be written to {file}: {error.strerror}"
        raise ConfigError(what, safe="QEMU was only asked", hint="name another file") from error
    print(f"schema of QEMU {version_text(captured.version)} written to {file}")
    return ExitCode.OK


async def _schema(qmp: Path) -> schema.Captured:
    async with open_qmp(qmp) as client:
        return await query_schema(client)


def _shows(line: str) -> bool:
    try:
        line.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _intent(options: argparse.Namespace) -> Intent:
    """What ``primary`` would be told, with its defaults.

    :raise ConfigError: when it would refuse the options.
    """
    pair = pair_name(options.pair)
    here = places(os.environ, os.geteuid())
    state: Path = options.state_dir or here.state / f"{pair}.primary"
    fleece: Path = options.fleece_dir or state / "fleece"
    control: Path | None = options.control
    if control is None and here.runtime is not None:
        control = here.control(pair, Role.PRIMARY)
    nodes = {disk: NodeName(node) for disk, node in parse_assignments(options.disks, "NAME=NODE").items()}
    memory = None if options.fleece_memory is None else parse_size(options.fleece_memory, "--fleece-memory")
    runtime = None if control is None else control.absolute().parent
    return Intent(nodes or None, fleece.absolute(), runtime, memory)


async def _probe(qmp: Path, intent: Intent, secondary: Address | None) -> ProbeReport:
    async with open_qmp(qmp) as client:
        report = await look_at(client, intent)
    if intent.runtime_dir is None:
        finding = Finding(
            Level.WARN,
            "socket",
            "there is no default place for a control socket, since XDG_RUNTIME_DIR is not set",
            "give primary one with --control PATH",
        )
        report = _with(report, finding)
    return report if secondary is None else _with(report, await _ask(secondary))


def _with(report: ProbeReport, finding: Finding) -> ProbeReport:
    return replace(report, ok=report.ok and finding.level is not Level.NO, findings=(*report.findings, finding))


async def _ask(address: Address) -> Finding:
    """Whether a secondary answers: it sends its banner before anything else."""
    try:
        with trio.fail_after(_SECONDARY_TIMEOUT):
            await _read_banner(address)
    except trio.TooSlowError:
        text, hint = (
            f"{address} did not answer like a secondary within {_SECONDARY_TIMEOUT:g} s",
            "see that it is the secondary's --listen address, and that no firewall swallows the packets",
        )
    except OSError as error:
        cause = next(leaves(error.__cause__ or error))
        why = getattr(cause, "strerror", "") or str(cause)
        text, hint = f"{address} cannot be connected to: {why}", "start the secondary there; see the firewall"
    except (LinkError, ConfigError) as error:
        text, hint = error.what, error.hint
    else:
        return Finding(Level.OK, "secondary", f"{address} answers as a secondary of this version")
    return Finding(Level.NO, "secondary", text, hint)


async def _read_banner(address: Address) -> None:
    received = b""
    async with await trio.open_tcp_stream(address.host, address.port) as stream:
        while parse_banner(received) is None:
            data = await stream.receive_some(256)
            if not data:
                raise OSError(0, "it closed the connection at once")
            received += data
