"""Exit codes, and errors as a person sees them.  The table in docs/cli.md is the contract; a test compares them."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import TextIO

from qemu_remus.core import errors
from qemu_remus.core.errors import QemuRemusError
from qemu_remus.core.text import one_line


class ExitCode(IntEnum):
    """What the command's end means to a script."""

    OK = 0
    """Done as asked. Of ``primary`` and ``secondary``: ended because they were told to, everything cleaned up."""
    FAILURE = 1
    """It was tried and failed; the message says what is still safe."""
    USAGE = 2
    """It cannot be done as asked: wrong arguments, or disks that are not there or not fit. Nothing was started."""
    NOT_PROTECTED = 3
    """Of ``status``: the VM is not protected at the moment. Of ``probe``: it cannot be protected as it is."""
    REFUSED = 4
    """The controller, or the peer, refused; nothing was changed."""
    UNREACHABLE = 5
    """Nobody there: no such socket, nobody listening, somebody else's socket, or no answer."""
    EPOCH_LOST = 6
    """Of ``epoch``: the epoch is lost, a later one carries its changes; drop the memory of that checkpoint too."""
    IN_DOUBT = 7
    """Of ``epoch``: it is not known whether the epoch counts. Of ``failover``: one is in doubt; nothing was changed."""
    DIFFERENT = 8
    """Of ``verify``: the copy differs from the VM's disks, and not all of that was repaired."""
    INTERRUPTED = 130
    """Ctrl-C, where there was nothing to clean up."""


_CODES: tuple[tuple[type[QemuRemusError], ExitCode], ...] = (
    (errors.ConfigError, ExitCode.USAGE),
    (errors.TargetUnsuitable, ExitCode.USAGE),
    (errors.StoreLocked, ExitCode.USAGE),
    (errors.CapabilityMissing, ExitCode.USAGE),
    (errors.TimedOut, ExitCode.FAILURE),
    (errors.CommandNotFound, ExitCode.REFUSED),
    (errors.NotProtected, ExitCode.REFUSED),
    (errors.NotConsistent, ExitCode.REFUSED),
    (errors.CommitInDoubt, ExitCode.IN_DOUBT),
    (errors.EpochLost, ExitCode.EPOCH_LOST),
    (errors.OutOfOrder, ExitCode.REFUSED),
    (errors.Refused, ExitCode.REFUSED),
    (errors.PeerRefused, ExitCode.REFUSED),
    (errors.VersionMismatch, ExitCode.REFUSED),
    (errors.ControlUnreachable, ExitCode.UNREACHABLE),
    (errors.QemuUnreachable, ExitCode.UNREACHABLE),
    (errors.NotQmp, ExitCode.UNREACHABLE),
    (errors.PeerUnreachable, ExitCode.UNREACHABLE),
    (errors.PeerSilent, ExitCode.UNREACHABLE),
    # After its subclass VersionMismatch. It ends a primary only before the first checkpoint: no secondary is there.
    (errors.RemoteProtocolError, ExitCode.UNREACHABLE),
)


def exit_code(error: BaseException) -> ExitCode:
    """The exit code of an error, or of the first of a group."""
    first = next(leaves(error))
    if isinstance(first, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    for kind, code in _CODES:
        if isinstance(first, kind):
            return code
    return ExitCode.FAILURE


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors of a group, ours before defects; of anything else, itself."""
    found = [error]
    while any(isinstance(item, BaseExceptionGroup) for item in found):
        found = [
            leaf for item in found for leaf in (item.exceptions if isinstance(item, BaseExceptionGroup) else (item,))
        ]
    yield from sorted(found, key=lambda item: not isinstance(item, QemuRemusError))


def report_error(error: BaseException, out: TextIO) -> None:
    """Print each error once, in a line of its own."""
    for line in dict.fromkeys(describe(leaf) for leaf in leaves(error) if not isinstance(leaf, KeyboardInterrupt)):
        print(line, file=out)


def describe(error: BaseException) -> str:
    """An error as ``error: what. Safe. Hint.``"""
    if isinstance(error, QemuRemusError) and not isinstance(error, errors.InternalError):
        return "error: " + ". ".join([one_line(error.what), *map(_sentence, filter(None, (error.safe, error.hint)))])
    return (
        f"error: {type(error).__name__}: {one_line(str(error))}. This is a defect of qemu-remus: please report it, "
        "with the output of the same command with --debug"
    )


def _sentence(text: str) -> str:
    line = one_line(text)
    return line[:1].upper() + line[1:]
