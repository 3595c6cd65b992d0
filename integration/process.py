"""Child processes that end when we do, whatever ends us, and whose end can be waited for in trio.

Owns starting, signalling and waiting. Nothing about what the processes are may enter.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has ended.

    :param status: exit status, negative for the signal that ended it.
    """

    command: tuple[str, ...]
    status: int
    out: str
    err: str

    def check(self) -> Finished:
        """:raise AssertionError: when it failed."""
        if self.status:
            raise AssertionError(f"{' '.join(self.command)} ended with {self.status}:\n{self.out}{self.err}")
        return self


class Process:
    """A running or ended child process.

    Its output goes to files: nobody has to read it for the child to go on, and it is there after a crash.

    :ivar pid: its process id, its own until :meth:`wait` has returned.
    :ivar out: file with its standard output.
    :ivar err: file with its standard error; may be the same.
    """

    def __init__(self, popen: subprocess.Popen[bytes], command: Sequence[str], out: Path, err: Path) -> None:
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)
        self.pid = popen.pid
        self.command = tuple(command)
        self.out = out
        self.err = err

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for the signal that ended it; None while it runs."""
        return self._popen.poll()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.returncode is None

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens where it has ended already."""
        if self.running:
            self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL."""
        self.signal(signal.SIGKILL)

    async def wait(self, timeout: float = 30.0) -> int:
        """Wait for its end.

        :param timeout: seconds.
        :return: exit status, negative for the signal that ended it.
        :raise TimeoutError: when it still runs then.
        """
        with trio.move_on_after(timeout):
            if self.running:
                await trio.lowlevel.wait_readable(self._pidfd)
            return self._popen.wait()
        raise TimeoutError(f"{self.command[0]} (pid {self.pid}) has not ended within {timeout:g} s")

    def tail(self, lines: int = 30) -> str:
        """The last lines that it wrote, for an error message."""
        text = self.err.read_text(errors="replace")
        if self.out != self.err:
            text = self.out.read_text(errors="replace") + text
        return "\n".join(text.splitlines()[-lines:])

    def _close(self) -> None:
        os.close(self._pidfd)


@asynccontextmanager
async def start_process(
    command: Sequence[str],
    *,
    out: Path,
    err: Path | None = None,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    grace: float = 0.0,
) -> AsyncIterator[Process]:
    """Run a command for the length of the block.

    It is killed when the thread that started it ends, thus also when the whole test run is killed. Must be called from
    the main thread, as in trio it is: a worker thread of trio ends when it is idle.

    :param grace: seconds between SIGTERM and SIGKILL at the block's end; with 0 SIGKILL comes at once.
    """
    err = err or out
    with out.open("ab") as out_file, err.open("ab") as err_file:
        popen = subprocess.Popen(  # noqa: ASYNC220 - a worker thread as parent would take the child with it
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=err_file,
            env=None if environment is None else os.environ | dict(environment),
            pass_fds=pass_fds,
            # Ctrl-C is for us alone: we end our children in our own order
            process_group=0,
        )
    process = Process(popen, command, out, err)
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            try:
                if grace:
                    process.signal(signal.SIGTERM)
                    await process.wait(grace)
            except TimeoutError:
                pass
            finally:
                process.kill()
                await process.wait()
                process._close()


@asynccontextmanager
async def background() -> AsyncIterator[trio.Nursery]:
    """A nursery whose tasks are cancelled at the block's end, and which passes on a lone exception as it is."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from None
        raise


def children(pid: int, word: str = "") -> list[int]:
    """Process ids of a process' children, in order: those that have this word in their command lines.

    What comes or goes meanwhile does no harm. Its threads are not asked: where one ends, its children go to another.
    """
    processes = [entry for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    found = [entry for entry in processes if _stat(entry)[1:2] == [str(pid)] and word in _read(entry / "cmdline")]
    return sorted(int(entry.name) for entry in found)


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    return state_of(Path(f"/proc/{pid}")) in {"", "X", "Z"}


def state_of(entry: Path) -> str:
    """The state of a process or thread, by its directory in ``/proc``, as in ``ps``; empty where it has ended."""
    return "".join(_stat(entry)[:1])


def listens(path: Path) -> bool:
    """Whether somebody listens on a Unix socket: it is there a moment before anybody does."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def _stat(entry: Path) -> list[str]:
    """State, parent and so on; nothing where it has ended."""
    return _read(entry / "stat").rpartition(")")[2].split()


def open_files(pid: int) -> list[str]:
    """What a process has open, deleted files too."""
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        # closed since it was listed
        with suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return found


def _read(path: Path) -> str:
    """A file of ``/proc``; empty where what it is about has ended, before the opening or before the reading."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


async def run(
    command: Sequence[str], *, scratch: Path, timeout: float = 60.0, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run a command to its end.

    :param scratch: an existing directory for its output.
    :param timeout: seconds, then it is killed.
    :raise TimeoutError: when it had to be killed.
    """
    directory = scratch / f"run-{next(_numbers)}"
    directory.mkdir()
    out, err = directory / "out", directory / "err"
    async with start_process(command, out=out, err=err, environment=environment) as process:
        status = await process.wait(timeout)
    return Finished(tuple(command), status, out.read_text(errors="replace"), err.read_text(errors="replace"))
