"""The arguments of ``qemu-remus verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qemu_remus.cli.arguments import add_json, add_pair, new_command


def add_verify(commands: Any) -> None:
    """The command's arguments and help."""
    command = new_command(
        commands,
        "verify",
        "verify:verify",
        "compare the copy with the VM's disks, while the VM runs and replication goes on; on the primary",
        """\
Every block is compared by its hash with the secondary's last checkpoint. What the guest is writing at the moment is no
difference. It ends when everything was compared; Ctrl-C ends it early. What differs is listed, one range a line: the
disk, the first byte and the length, in bytes.

examples:
  qemu-remus verify
  qemu-remus verify --disk disk0 --rate 20M --repair
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
        "--disk",
        action="append",
        default=[],
        metavar="NAME",
        dest="disks",
        help="only this disk; may be given again (default: all disks)",
    )
    command.add_argument("--repair", action="store_true", help="send what differs anew, and say what was repaired")
    command.add_argument(
        "--rate",
        metavar="BYTES/S",
        help="read no more than so much a second, such as 20M (default: the primary's --rate, or 64M)",
    )
    command.add_argument(
        "--cancel", action="store_true", help="end the verification that is under way, whoever has begun it"
    )
    add_json(command)
