"""The arguments of ``qemu-remus resize``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qemu_remus.cli.arguments import add_json, add_pair, new_command
from qemu_remus.cli.values import waiting


def add_resize(commands: Any) -> None:
    """The command's arguments and help."""
    command = new_command(
        commands,
        "resize",
        "resize:resize",
        "make a disk of a protected VM larger; on the primary",
        """\
QEMU refuses its own block_resize while an epoch is being sent. This waits for a moment between two epochs, resizes the
disk, and goes on; the copy gets the size with the next checkpoint. A disk cannot be made smaller.

example:
  qemu-remus resize disk0 40G
""",
    )
    command.add_argument("disk", metavar="DISK", help="its name, as 'qemu-remus status' shows it")
    command.add_argument("size", metavar="SIZE", help="its new size, such as 21474836480, 20G or 512M")
    add_pair(command)
    command.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        help="the primary's control socket (default: that of the pair)",
    )
    command.add_argument(
        "--timeout",
        type=waiting,
        default=30.0,
        metavar="SECONDS",
        help="how long to wait for the moment (default %(default)g)",
    )
    add_json(command)
