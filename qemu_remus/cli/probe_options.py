"""The arguments of ``qemu-remus probe``, and its help; a part of :mod:`qemu_remus.cli.parser`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

SUMMARY: Final = "say whether a VM can be protected as it is, and what to do where not; changes nothing"
EPILOG: Final = """\
Shows QEMU and the host around it, and each disk with its block graph. What is in the way is marked X, what should be
known !, each with the next step. With the options that 'primary' will be given it answers for those.

examples:
  qemu-remus probe --qmp /run/vm/qmp.sock
  qemu-remus probe --qmp /run/vm/qmp.sock --fleece-dir /dev/shm --secondary 10.0.0.2:7400
"""


def add_to(command: argparse.ArgumentParser) -> None:
    """Add them."""
    command.add_argument(
        "--secondary",
        metavar="HOST:PORT",
        help="see also whether a secondary answers there; it logs that a connection ended",
    )
    command.add_argument(
        "--capture", type=Path, metavar="FILE", help="only write QEMU's schema to FILE, in the form of qmp_schemas/"
    )
    for option, metavar in (("--state-dir", "DIR"), ("--fleece-dir", "DIR"), ("--control", "PATH")):
        command.add_argument(option, type=Path, metavar=metavar, help="as for 'primary'")
    command.add_argument("--fleece-memory", metavar="SIZE", help="as for 'primary'")
    command.add_argument(
        "--disk", action="append", default=[], metavar="NAME=NODE", dest="disks", help="as for 'primary'"
    )
