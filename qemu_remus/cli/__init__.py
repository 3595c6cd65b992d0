"""The command line: ``qemu-remus COMMAND``.

Owns arguments, exit codes, and how an error reaches a person.  One module per command; what only one command needs is
imported only when it runs, so that ``status`` starts fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qemu_remus.cli.exits import ExitCode, exit_code, report_error
from qemu_remus.cli.parser import parse

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    :param argv: arguments without the program's name; the process's own where it is None.
    :return: the exit code, one of :class:`qemu_remus.cli.exits.ExitCode`.
    """
    invocation = parse(argv)
    try:
        code = invocation.run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone. Nothing more can be said there, and the interpreter must not try on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILURE
    except BaseExceptionGroup as group:
        return _failed(group, debug=invocation.debug)
    except Exception as error:
        return _failed(error, debug=invocation.debug)
    return code


def _failed(error: BaseException, *, debug: bool) -> int:
    if debug:
        raise error
    report_error(error, sys.stderr)
    return exit_code(error)
