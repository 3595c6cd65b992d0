"""The arguments of every command, and what ``--help`` says.

Owns argparse.  Nothing outside of this package sees a Namespace: each command's module is handed one, reads it once
and goes on with typed settings.
"""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_remus import __version__
from qemu_remus.core.settings import DEFAULT_HEARTBEAT_TIMEOUT_SECONDS, DEFAULT_INTERVAL_SECONDS, DEFAULT_PAIR

_OVERVIEW = """\
Keep a running QEMU virtual machine's disks on a second host, always at one complete checkpoint. The VM is not
restarted, and QEMU is not patched.

  on the second host   qemu-remus secondary --listen 10.0.0.2:7400 --store /srv/vm --disk disk0=/srv/vm/disk0.raw
  where the VM runs    qemu-remus primary --qmp /run/vm/qmp.sock --peer 10.0.0.2:7400
  on either            qemu-remus status
  when the VM is lost  qemu-remus failover          (on the second host; prints the disks to start it from)
"""

_EXITS = """\
exit codes: 0 done; 1 failed; 2 cannot be done as asked; 3 the VM is not protected (status, probe); 4 refused;
5 nobody there; 130 interrupted
"""


@dataclass(frozen=True, slots=True)
class Invocation:
    """One command, ready to run.

    :param run: does it and returns the exit code.
    :param debug: errors are to come with a traceback.
    """

    run: Callable[[], int]
    debug: bool


def parse(argv: Sequence[str] | None) -> Invocation:
    """Read the arguments; prints and exits by itself on ``--help`` and on wrong ones, as argparse does."""
    options = build_parser().parse_args(argv)
    module, function = str(options.runs).split(":")

    def run() -> int:
        command: Callable[[argparse.Namespace], int] = getattr(
            importlib.import_module(f"qemu_remus.cli.{module}"), function
        )
        return command(options)

    return Invocation(run, options.debug)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="qemu-remus", description=_OVERVIEW, epilog=_EXITS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_secondary, _add_primary, _add_status, _add_failover, _add_detach, _add_probe, _add_demo):
        add(commands)
    return parser


def _command(commands: Any, name: str, runs: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[:1].upper() + summary[1:] + ".",
        epilog=f"{epilog}\n{_EXITS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(runs=runs)
    command.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return command


def _add_pair(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--pair",
        default=DEFAULT_PAIR,
        metavar="NAME",
        help="name of the pair, the same on both hosts (default %(default)s)",
    )


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON, for programs")


def _add_qmp(command: argparse.ArgumentParser, help_text: str) -> None:
    command.add_argument("--qmp", required=True, type=Path, metavar="PATH", help=help_text)


def _add_logging(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="form of the log on standard error (default text)",
    )
    command.add_argument("-v", "--verbose", action="store_true", help="log every step")


def _add_heartbeat(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--heartbeat-timeout",
        type=float,
        default=DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="take the other controller for lost when it is silent for longer (default %(default)g)",
    )


def _add_secondary(commands: Any) -> None:
    command = _command(
        commands,
        "secondary",
        "controllers:secondary",
        "keep the copy of a VM's disks; run this on the second host, before 'primary'",
        """\
It goes on until it is stopped (Ctrl-C or SIGTERM), and takes up its work again when it is started with the same
--store.

example, two disks; the images are made when the primary connects:
  qemu-remus secondary --listen 10.0.0.2:7400 --store /srv/vm \\
      --disk disk0=/srv/vm/disk0.raw --disk disk1=/dev/vg0/vm-disk1
""",
    )
    command.add_argument(
        "--listen",
        required=True,
        metavar="HOST:PORT",
        help="where the primary connects to; the connection is not encrypted: use a network of its own, or a tunnel",
    )
    command.add_argument(
        "--store",
        required=True,
        type=Path,
        metavar="DIR",
        help="directory for the journal and what must be remembered; on storage that honours fsync",
    )
    command.add_argument(
        "--disk",
        action="append",
        required=True,
        metavar="NAME=PATH",
        dest="disks",
        help="the image file or block device that holds the copy of disk NAME; once for each disk. A file that is not "
        "there is made, at the size of the primary's disk",
    )
    _add_pair(command)
    command.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        help="control socket (default: one named after the pair)",
    )
    command.add_argument(
        "--sparse",
        action="store_true",
        help="do not reserve the space of images that are made; then a full file system can stop the replication",
    )
    command.add_argument(
        "--overwrite",
        action="store_true",
        help="use targets that hold data, or are files larger than the primary's disk",
    )
    command.add_argument(
        "--journal-limit",
        metavar="SIZE",
        help="most space that the journal may take, such as 512M or 8G (default 4G)",
    )
    _add_heartbeat(command)
    _add_logging(command)


def _add_primary(commands: Any) -> None:
    command = _command(
        commands,
        "primary",
        "controllers:primary",
        "protect a running VM; run this where its QEMU runs",
        """\
QEMU needs a QMP socket that nobody else is connected to: start it with
  -qmp unix:/run/vm/qmp.sock,server=on,wait=off

It goes on until it is stopped (Ctrl-C or SIGTERM). The VM runs on then, with one dirty bitmap per disk left in QEMU, so
that the next start sends only the difference; 'qemu-remus detach' takes those out too.

examples:
  qemu-remus primary --qmp /run/vm/qmp.sock --peer 10.0.0.2:7400
  qemu-remus primary --qmp /run/vm/qmp.sock --peer 10.0.0.2:7400 --disk disk0=drive-virtio0 --interval 500
""",
    )
    _add_qmp(command, "QEMU's QMP socket, one that nobody else is connected to")
    command.add_argument("--peer", required=True, metavar="HOST:PORT", help="where the secondary listens")
    _add_pair(command)
    command.add_argument(
        "--disk",
        action="append",
        default=[],
        metavar="NAME=NODE",
        dest="disks",
        help="protect only these disks: NAME as on the secondary, NODE its node in QEMU; once for each disk. Without "
        "this, all writable disks of the VM, named after their device ('qemu-remus probe' lists them)",
    )
    command.add_argument(
        "--interval",
        type=float,
        default=DEFAULT_INTERVAL_SECONDS * 1000,
        metavar="MS",
        help="milliseconds from one checkpoint to the next (default %(default)g)",
    )
    command.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="directory for what must be remembered (default: one of the pair's, under /var/lib/qemu-remus for root)",
    )
    command.add_argument(
        "--fleece-dir",
        type=Path,
        metavar="DIR",
        help="directory for what the guest overwrites while an epoch is sent; QEMU must be able to open files there, "
        "and fast storage pays (default: in the state directory)",
    )
    command.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        help="control socket (default: one named after the pair)",
    )
    _add_heartbeat(command)
    command.add_argument(
        "--allow-inconsistent-resync",
        action="store_true",
        help="where a resync is too big for the secondary's journal, send it straight into the images: until it is "
        "complete, the secondary cannot take over",
    )
    _add_logging(command)


def _add_status(commands: Any) -> None:
    command = _command(
        commands,
        "status",
        "status:status",
        "say whether the VM is protected, and how far the copy is; on either host",
        """\
examples:
  qemu-remus status --watch
  qemu-remus status --control /run/qemu-remus/vm.primary.sock --json
  qemu-remus status > /dev/null || echo "the VM is not protected"
""",
    )
    _add_pair(command)
    command.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        help="the controller's control socket (default: that of the pair's here)",
    )
    command.add_argument("--watch", action="store_true", help="go on, once a second, until Ctrl-C")
    _add_json(command)


def _add_failover(commands: Any) -> None:
    command = _command(
        commands,
        "failover",
        "failover:failover",
        "make the copy's disks ready to start the VM from; on the secondary, when the primary is lost",
        """\
See to it first that the primary's VM is off: two VMs must never run.

The disks are brought to one checkpoint, flushed and released; the exit code is 0 only when that is done. After a crash
or a time-out, give the same command again: it goes on.

examples:
  qemu-remus failover
  qemu-remus failover --checkpoint 812 --checkpoint 811     (a toolstack that has the memory of both)
""",
    )
    _add_pair(command)
    command.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        help="the secondary's control socket (default: that of the pair)",
    )
    which = command.add_mutually_exclusive_group()
    which.add_argument(
        "--checkpoint",
        type=int,
        action="append",
        default=[],
        metavar="N",
        dest="checkpoints",
        help="a checkpoint whose memory can be restored; more than one: newest first, and the newest that the disks "
        "can reach is taken. Without this, the last committed one",
    )
    which.add_argument(
        "--last-committed",
        action="store_true",
        help="take the last committed checkpoint although a later epoch is in doubt: that one is given up",
    )
    command.add_argument("--force", action="store_true", help="fail over although the primary is still connected")
    command.add_argument(
        "--timeout",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for the disks; the failover goes on after it (default %(default)g)",
    )
    _add_json(command)


def _add_detach(commands: Any) -> None:
    command = _command(
        commands,
        "detach",
        "qemu_tools:detach",
        "take everything of ours out of a QEMU, after a crash too, and nothing else",
        """\
The VM runs on, unprotected. Stop the primary controller first. Without its dirty bitmaps the next protection starts
with comparing or copying whole disks.

example:
  qemu-remus detach --qmp /run/vm/qmp.sock
""",
    )
    _add_qmp(command, "QEMU's QMP socket")
    command.add_argument("--pair", metavar="NAME", help="only what belongs to this pair (default: all pairs)")
    _add_json(command)


def _add_probe(commands: Any) -> None:
    command = _command(
        commands,
        "probe",
        "qemu_tools:probe",
        "say whether a QEMU and its disks can be protected, and what to do where not; changes nothing",
        """\
example:
  qemu-remus probe --qmp /run/vm/qmp.sock
""",
    )
    _add_qmp(command, "QEMU's QMP socket")
    _add_json(command)


def _add_demo(commands: Any) -> None:
    _command(
        commands,
        "demo",
        "demo:demo",
        "show it all on this machine: a VM under load, killed, and its copy started and checked",
        "It needs QEMU and a source tree of qemu-remus, takes a few minutes, and leaves nothing behind.\n",
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a time")
    return value
