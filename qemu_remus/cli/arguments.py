"""What several commands' arguments have in common."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from qemu_remus.core.settings import DEFAULT_HEARTBEAT_TIMEOUT_SECONDS, DEFAULT_PAIR

EXITS: Final = """\
exit codes: 0 done; 1 failed; 2 cannot be done as asked; 3 the VM is not protected (status, probe); 4 refused;
5 nobody there; 6 the epoch is lost (epoch); 7 a commit is in doubt (epoch, failover); 8 the copy differs (verify);
130 interrupted
"""


def new_command(commands: Any, name: str, runs: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    """A command with what all have: its help, its exit codes, ``--debug``."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[:1].upper() + summary[1:] + ".",
        epilog=f"{epilog}\n{EXITS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.set_defaults(runs=runs)
    command.add_argument("--debug", action="store_true", help="show a traceback with an error")
    return command


def add_pair(command: argparse.ArgumentParser) -> None:
    """The option that names the pair."""
    command.add_argument(
        "--pair",
        default=DEFAULT_PAIR,
        metavar="NAME",
        help="name of the pair, the same on both hosts (default %(default)s)",
    )


def add_json(command: argparse.ArgumentParser) -> None:
    """The option for programs."""
    command.add_argument("--json", action="store_true", help="print JSON, for programs")


def add_qmp(command: argparse.ArgumentParser, help_text: str) -> None:
    """QEMU's QMP socket."""
    command.add_argument("--qmp", required=True, type=Path, metavar="PATH", help=help_text)


def add_logging(command: argparse.ArgumentParser) -> None:
    """The options of a controller's log."""
    command.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="form of the log on standard error (default text)",
    )
    command.add_argument("-v", "--verbose", action="store_true", help="log every step")


def add_heartbeat(command: argparse.ArgumentParser) -> None:
    """The option of both ends of the link."""
    command.add_argument(
        "--heartbeat-timeout",
        type=float,
        default=DEFAULT_HEARTBEAT_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="take the other controller for lost when it is silent for longer (default %(default)g)",
    )
