"""Behind a controller that died: take out of its QEMU what it left there, but for the bitmaps, and say what was done.

Run as ``python -m qemu_remus.qemu.cleanup`` by the guardian, which becomes this when its controller has died without
farewell (:mod:`qemu_remus.qemu.guardian`); it may import what the guardian may not. All that is decided is
:func:`qemu_remus.qemu.detach.detach`'s: the guest's devices get their own nodes back, exports, filters, fleeces and our
NBD server go, and the tracking stays for a restarted controller to find. And QEMU ends with its guest again, as it did
without us (:mod:`qemu_remus.qemu.shutdown`): at once, where that has powered off meanwhile.

That controller does the same at its start. QEMU serves one client per QMP socket, so that the two never work at once:
whoever comes second finds nothing left to do. Where somebody is connected already we give up; where it waits for us, it
waits for as long as a clean-up takes, some hundredths of a second.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

import trio

from qemu_remus.core.errors import QemuRemusError, QemuUnreachable
from qemu_remus.core.model import PairName, pair_name
from qemu_remus.qemu.client import open_qmp
from qemu_remus.qemu.detach import DetachReport, detach
from qemu_remus.qemu.shutdown import let_end, was_held

_LIMIT: Final = 30.0
"""Seconds for all of it, not counting a command that QEMU has begun."""


async def clean_up(qmp: str | Path, pair: PairName, *, greeting: float = 5.0) -> DetachReport:
    """Take out what belongs to a pair, except for its bitmaps.

    :param qmp: QEMU's QMP socket.
    :param greeting: seconds that QEMU may take to greet us.
    :raise QemuError: when it does not, because it serves somebody else or is gone; or when it does not go on answering.
    """
    with trio.move_on_after(_LIMIT):
        async with open_qmp(qmp, connect_timeout=greeting) as client:
            held = await was_held(client, pair)
            report = await detach(client, pair, keep_tracking=True)
            if held and await let_end(client):
                return replace(report, removed=(*report.removed, "QEMU itself, whose guest had powered off"))
            return report
    raise QemuUnreachable(f"QEMU took more than {_LIMIT:g} s over it", safe="the VM goes on")


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        print(f"qemu-remus clean-up[{os.getpid()}]: {line}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Clean up once.

    :return: 0 where nothing of the pair's but its bitmaps is left, 1 where something is, or nobody knows.
    """
    parser = argparse.ArgumentParser(prog="cleanup", description="Started by the guardian, never by hand.")
    parser.add_argument("--qmp", required=True, help="QEMU's QMP socket")
    parser.add_argument("--pair", required=True, help="name of the pair")
    options = parser.parse_args(arguments)
    try:
        report = trio.run(clean_up, options.qmp, pair_name(options.pair))
    except QemuRemusError as error:
        _say([f"what is left in QEMU stays until a restart, or qemu-remus detach: {error}"])
        return 1
    _say(report.lines() if report.removed or report.left else ["nothing was left"])
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
