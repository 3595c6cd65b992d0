"""Arguments and help of ``qemu-remus switchover``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qemu_remus.cli.arguments import add_json, add_pair, new_command
from qemu_remus.cli.values import epoch, waiting


def add_switchover(commands: Any) -> None:
    """``qemu-remus switchover``."""
    command = new_command(
        commands,
        "switchover",
        "switchover:switchover",
        "hand the running VM over to the secondary, without losing a write; on the primary",
        """\
The VM is paused, all that it has written is committed on the secondary, and the secondary's disks are made ready to
start the VM from there. The VM here stays paused for good, and the primary's controller ends. Where it fails before the
secondary was told, the VM runs on.

Exit code 7: whether the secondary has taken over is not known; the VM stays paused until the secondary has been asked.
The same command again waits for that. Resume the VM by hand (cont) only where the secondary can never take over.

The way back: 'qemu-remus primary' on the new host, and here 'qemu-remus secondary --overwrite' with the old images and
a new store; only what differs is sent.

example:
  qemu-remus switchover
""",
    )
    add_pair(command)
    command.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        help="the primary's control socket (default: that of the pair)",
    )
    command.add_argument(
        "--epoch",
        type=epoch,
        metavar="N",
        help="with a toolstack, which has paused the VM at checkpoint N and committed it; without one, the controller "
        "pauses the VM and takes its last checkpoint",
    )
    command.add_argument(
        "--timeout",
        type=waiting,
        default=60.0,
        metavar="SECONDS",
        help="how long it may take until the secondary is told; then the VM is resumed (default %(default)g)",
    )
    add_json(command)
