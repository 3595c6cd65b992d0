"""The arguments by which ``qemu-remus secondary`` is told where the copies go, and what ``--help`` says of them."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_targets(command: argparse.ArgumentParser) -> None:
    """Add them; :mod:`qemu_remus.config` reads them."""
    command.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="NAME=[FORMAT:]PATH",
        dest="disks",
        help="the image file or block device that holds the copy of disk NAME; once for each disk, and for each that "
        "the VM may get later. A file that is not there is made, at the size of the primary's disk. Without FORMAT it "
        "is raw; a relative PATH with a colon begins with ./",
    )
    command.add_argument(
        "--disk-dir",
        type=Path,
        metavar="DIR",
        help="make the images of all other disks in this directory, as NAME.img",
    )
    command.add_argument(
        "--target-option",
        action="append",
        default=[],
        metavar="NAME=KEY=VALUE",
        dest="target_options",
        help="an option with which the image of disk NAME is made, as 'qemu-img create -o' takes it; repeatable",
    )
    command.add_argument(
        "--target-secret",
        action="append",
        default=[],
        metavar="NAME=FILE",
        dest="target_secrets",
        help="the file that holds the passphrase of disk NAME's image, byte for byte, so without a line's end; for "
        "luks, and qcow2 that is to be encrypted",
    )
