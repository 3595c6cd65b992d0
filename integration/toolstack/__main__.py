"""``python -m integration.toolstack backup`` and ``... protect``: either side as a process.

Owns the command lines.
"""

from __future__ import annotations

import argparse
import signal
import socket
import sys
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import trio

from integration.process import background
from integration.qmp import Qmp, open_qmp
from integration.toolstack.backup import BackupLost, BackupRefused, open_backup_link, serve
from integration.toolstack.output import OutputBuffer
from integration.toolstack.protector import Protector
from integration.toolstack.store import StoreError
from qemu_remus.core.errors import QemuRemusError
from qemu_remus.toolstack import open_toolstack


@dataclass(frozen=True, slots=True)
class _Vm:
    """A VM that somebody else has started. What is sent to its ports must not be sent during a pause."""

    qmp: Qmp

    def input_held(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()


async def _protect(options: argparse.Namespace) -> None:
    output = OutputBuffer(_port(options.output), sink=_print)
    async with (
        open_qmp(options.qmp) as qmp,
        open_toolstack(options.control) as toolstack,
        open_backup_link(options.backup) as backup,
        background() as nursery,
    ):
        nursery.start_soon(output.receive)
        await Protector(_Vm(qmp), options.ram, toolstack, backup, output).run(options.interval / 1000)


def _port(where: str) -> socket.socket:
    if where.startswith("fd:"):
        port = socket.socket(fileno=int(where.removeprefix("fd:")))
    else:
        port = socket.socket(socket.AF_UNIX)
        port.connect(where)
    port.setblocking(False)
    return port


def _print(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


async def _until_told(options: argparse.Namespace) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with background() as nursery:
            if options.command == "backup":
                nursery.start_soon(serve, options.directory, options.socket)
            else:
                nursery.start_soon(_protect, options)
            async for _ in signals:
                return


def main() -> int:
    """Run the command; the exit status is 1 where it had to give up."""
    parser = argparse.ArgumentParser(prog="python -m integration.toolstack")
    commands = parser.add_subparsers(dest="command", required=True)
    backup = commands.add_parser("backup", help="keep memory checkpoints")
    backup.add_argument("--directory", type=Path, required=True, help="where to keep them")
    backup.add_argument("--socket", type=Path, required=True, help="where to listen")
    protect = commands.add_parser("protect", help="take checkpoints of a VM; what it may say goes to standard output")
    protect.add_argument("--qmp", type=Path, required=True, help="QMP socket of its QEMU")
    protect.add_argument("--ram", type=Path, required=True, help="its memory file")
    protect.add_argument(
        "--output", required=True, help="socket of its port for output, or fd:NUMBER of a connected one"
    )
    protect.add_argument("--control", type=Path, required=True, help="control socket of its primary controller")
    protect.add_argument("--backup", type=Path, required=True, help="socket of the backup")
    protect.add_argument("--interval", type=float, default=200, help="milliseconds between checkpoints")
    try:
        trio.run(_until_told, parser.parse_args())
    except (QemuRemusError, BackupLost, BackupRefused, StoreError, EOFError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
