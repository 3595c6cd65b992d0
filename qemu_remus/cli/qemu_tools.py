"""``qemu-remus detach``: talks to a QEMU itself, without a controller."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import trio

from qemu_remus.cli.exits import ExitCode
from qemu_remus.core.model import PairName, pair_name
from qemu_remus.core.qapi import to_qmp
from qemu_remus.qemu.client import open_qmp
from qemu_remus.qemu.detach import DetachReport
from qemu_remus.qemu.detach import detach as take_out
from qemu_remus.qemu.shutdown import let_end, was_held


def detach(options: argparse.Namespace) -> int:
    """Take out of a QEMU what is ours; a success only if nothing of it is left."""
    pair = None if options.pair is None else pair_name(options.pair)
    report = trio.run(_detach, options.qmp, pair)
    if options.json:
        print(json.dumps(to_qmp(report), indent=2))
    else:
        print("\n".join(report.lines()))
    return ExitCode.OK if report.ok else ExitCode.FAILURE


async def _detach(path: str, pair: PairName | None) -> DetachReport:
    async with open_qmp(path) as client:
        held = await was_held(client, pair)
        report = await take_out(client, pair)
        if held and await let_end(client):
            return replace(report, removed=(*report.removed, "QEMU itself, whose guest had powered off"))
        return report
