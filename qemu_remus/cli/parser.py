"""The arguments of every command, and what ``--help`` says.

Owns argparse.  Nothing outside of this package sees a Namespace: each command's module is handed one, reads it once
and goes on with typed settings.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_remus import __version__
from qemu_remus.cli import probe_options
from qemu_remus.cli.arguments import EXITS as _EXITS
from qemu_remus.cli.arguments import add_heartbeat as _add_heartbeat
from qemu_remus.cli.arguments import add_json as _add_json
from qemu_remus.cli.arguments import add_logging as _add_logging
from qemu_remus.cli.arguments import add_pair as _add_pair
from qemu_remus.cli.arguments import add_qmp as _add_qmp
from qemu_remus.cli.arguments import new_command as _command
from qemu_remus.cli.resize_arguments import add_resize
from qemu_remus.cli.switchover_arguments import add_switchover
from qemu_remus.cli.targets import add_targets
from qemu_remus.cli.values import epoch, seconds, waiting
from qemu_remus.cli.verify_arguments import add_verify
from qemu_remus.core.settings import DEFAULT_INTERVAL_SECONDS, DEFAULT_WATCHDOG_SECONDS

_OVERVIEW = """\
Keep a running QEMU virtual machine's disks on a second host, always at one complete checkpoint. The VM is not
restarted, and QEMU is not patched.

  on the second host   qemu-remus secondary --listen 10.0.0.2:7400 --store /srv/vm --disk disk0=/srv/vm/disk0.raw
  where the VM runs    qemu-remus primary --qmp /run/vm/qmp.sock --peer 10.0.0.2:7400
  on either            qemu-remus status
  when the VM is lost  qemu-remus failover          (on the second host; prints the disks to start it from)
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
    for add in (
        _add_secondary,
        _add_primary,
        _add_status,
        _add_failover,
        add_switchover,
        _add_retry_storage,
        _add_epoch,
        add_verify,
        add_resize,
        _add_detach,
        _add_probe,
        _add_demo,
    ):
        add(commands)
    return parser


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

other formats and NBD are written by QEMU's storage daemon, which is started and ended as needed:
      --disk disk0=qcow2:/srv/vm/disk0.qcow2 --target-option disk0=cluster_size=64k
      --disk disk1=luks:/srv/vm/disk1.luks --target-secret disk1=/etc/vm/disk1.key
      --disk disk2=nbd+unix:///disk2?socket=/run/nbd.sock --disk disk3=nbd://10.0.0.9/disk3
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
    add_targets(command)
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
        "--force-discard",
        metavar="GENERATION",
        help="give up the data that the store holds, of just this generation (a refusal names it), for a new copy",
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
  qemu-remus primary --qmp /run/vm/qmp.sock --peer 10.0.0.2:7400 --toolstack
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
    driver = command.add_mutually_exclusive_group()
    driver.add_argument(
        "--interval",
        type=float,
        default=DEFAULT_INTERVAL_SECONDS * 1000,
        metavar="MS",
        help="take a checkpoint of the disks by itself, this many milliseconds from one to the next "
        "(default %(default)g); the copy starts as after a power failure",
    )
    driver.add_argument(
        "--toolstack",
        action="store_true",
        help="take no checkpoint by itself: whoever checkpoints the VM's memory asks for each one, by the control "
        "socket, qemu_remus.toolstack or 'qemu-remus epoch', so that disks and memory agree and the VM goes on "
        "from there without a reboot",
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
        help="directory for what the guest overwrites while an epoch is sent, where memory has no room for it; QEMU "
        "must be able to open files there, and fast storage pays (default: in the state directory)",
    )
    command.add_argument(
        "--fleece-memory",
        metavar="SIZE",
        help="most memory for that, such as 512M; 0: none (default: a quarter of what is free, on the host and in "
        "QEMU's control group). An epoch that may need more goes into the directory",
    )
    command.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        help="control socket (default: one named after the pair)",
    )
    _add_heartbeat(command)
    command.add_argument(
        "--watchdog",
        type=float,
        default=DEFAULT_WATCHDOG_SECONDS,
        metavar="SECONDS",
        help="have this controller killed, and what it has in QEMU taken out, when it hangs for longer (default "
        "%(default)g)",
    )
    command.add_argument(
        "--allow-inconsistent-resync",
        action="store_true",
        help="where a resync is too big for the secondary's journal, send it straight into the images: until it is "
        "complete, the secondary cannot take over",
    )
    command.add_argument(
        "--commit-at-shutdown",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="when the guest powers off, have QEMU end only when what the guest wrote last is committed, at the latest "
        "after half a minute (the default; not with --toolstack, nor where QEMU runs with -no-shutdown or the like)",
    )
    command.add_argument(
        "--rate",
        metavar="BYTES/S",
        help="limit the first copy, resyncs and verification to so much a second, such as 50M (default: no limit); "
        "epochs are not limited",
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
        type=seconds,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for the disks; the failover goes on after it (default %(default)g)",
    )
    _add_json(command)


def _add_retry_storage(commands: Any) -> None:
    command = _command(
        commands,
        "retry-storage",
        "storage:retry_storage",
        "have a secondary that could not write try again at once; after making room or mending its disks",
        """\
It does so by itself too, at least every 30 seconds. The primary then connects and sends the difference.

example:
  qemu-remus retry-storage
""",
    )
    _add_pair(command)
    command.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        help="the secondary's control socket (default: that of the pair)",
    )
    command.add_argument(
        "--timeout",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="how long to wait for the answer (default %(default)g)",
    )
    _add_json(command)


def _add_epoch(commands: Any) -> None:
    command = commands.add_parser(
        "epoch",
        help="drive one checkpoint step by step, from a toolstack's hooks; the primary runs with --toolstack",
        description="Drive one checkpoint step by step, from a toolstack's hooks; the primary runs with --toolstack.",
        epilog=f"""\
A checkpoint, with the memory's part as comments; each step only where the one before has succeeded:
  qemu-remus epoch prepare
  # pause the VM
  n=$(qemu-remus epoch start)
  # take the memory's checkpoint $n, resume the VM, send the memory to the backup, which keeps the last one beside it
  qemu-remus epoch finish $n
  # the memory of $n is complete
  qemu-remus epoch commit $n
  # release the output of the VM

Exit code 6: the epoch is lost; drop memory $n, resume the VM if it is still paused, and go on with 'prepare'.
Exit code 7: release nothing, keep both memories, and give the same command again until the answer is another.
Otherwise, where 'finish' or 'commit' has failed: the same command again, or 'epoch abort $n' and drop memory $n.

{_EXITS}""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    steps = command.add_subparsers(title="steps", metavar="STEP", required=True)
    _add_step(steps, "prepare", "let nothing of the last epoch be in the way of the next; while the VM runs", 10.0)
    start = _add_step(steps, "start", "capture the disks and print the epoch's number; while the VM is paused", 10.0)
    start.add_argument(
        "--pause",
        action="store_true",
        help="stop and resume QEMU around it; for a guest that is paused without QEMU's knowledge, or not at all",
    )
    _add_step(steps, "finish", "wait until the epoch is staged on the secondary", 30.0, "N")
    _add_step(steps, "commit", "decide that the checkpoint counts, and wait until that is durable", 30.0, "N")
    _add_step(steps, "abort", "give the epoch up; a later one carries its changes", 10.0, "N")
    _add_step(steps, "received", "on the secondary: say that the memory of checkpoint N is complete there", 30.0, "N")


def _add_step(steps: Any, name: str, summary: str, timeout: float, *operands: str) -> argparse.ArgumentParser:
    example = " ".join(("example:\n  qemu-remus epoch", name, *("812" for _ in operands)))
    command = _command(steps, name, f"epoch:{name}", summary, f"{example}\n")
    for operand in operands:
        command.add_argument("epoch", type=epoch, metavar=operand, help="the number that 'epoch start' printed")
    _add_pair(command)
    command.add_argument(
        "--control",
        type=Path,
        metavar="PATH",
        help="the controller's control socket (default: that of the pair)",
    )
    command.add_argument(
        "--timeout",
        type=waiting,
        default=timeout,
        metavar="SECONDS",
        help="how long to wait for it (default %(default)g)",
    )
    _add_json(command)
    return command


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
    command = _command(commands, "probe", "probe:probe", probe_options.SUMMARY, probe_options.EPILOG)
    _add_qmp(command, "QEMU's QMP socket, one that nobody else is connected to")
    _add_pair(command)
    probe_options.add_to(command)
    _add_json(command)


def _add_demo(commands: Any) -> None:
    _command(
        commands,
        "demo",
        "demo:demo",
        "show it all on this machine: a VM under load, killed, and its copy started and checked",
        "It needs QEMU and a source tree of qemu-remus, takes a few minutes, and leaves nothing behind.\n",
    )
