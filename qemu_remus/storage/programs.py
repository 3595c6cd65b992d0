"""QEMU's programs as child processes: they end when we do, whatever ends us, and what they say is kept for the error.

Owns starting, watching and ending.  What the programs are to do may not enter.  Calls block.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from qemu_remus.core.errors import ConfigError, StorageError
from qemu_remus.storage import launch

STORAGE_DAEMON: Final = "qemu-storage-daemon"
QEMU_IMG: Final = "qemu-img"

_PACKAGES: Final = {
    STORAGE_DAEMON: "Debian 12: qemu-system-common; later: qemu-utils; Fedora: qemu-storage-daemon",
    QEMU_IMG: "Debian: qemu-utils; Fedora: qemu-img",
}

_SAID_LIMIT: Final = 4096
"""Bytes of what a program said last that are kept."""


def need_programs(names: Iterable[str], what: str) -> None:
    """See that programs are installed.

    :param what: what needs them, for the error.
    :raise ConfigError: one is not.
    """
    for name in names:
        if shutil.which(name) is None:
            raise ConfigError(
                f"{what} needs the program {name}, which is not installed on this host",
                hint=f"install its package ({_PACKAGES.get(name, name)}), or name a raw file or a block device",
            )


def run_program(
    command: Sequence[str], *, timeout: float, refused: Callable[[str], StorageError] = StorageError
) -> str:
    """Run a program to its end: its standard output.

    :param timeout: seconds, after which it is killed.
    :param refused: makes the error of what it said.
    :raise StorageError: it failed, with what it said; or it took too long.
    """
    try:
        done = subprocess.run(
            _launched(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
            env=_environment(),
            start_new_session=True,
            umask=0o077,  # what it makes holds the guest's data
        )
    except subprocess.TimeoutExpired:
        raise StorageError(f"{command[0]} did not end within {timeout:g} s") from None
    except OSError as error:
        raise StorageError(f"{command[0]} cannot be started: {error.strerror}") from error
    if done.returncode:
        said = _one_line(done.stderr, command[0]) or f"it ended with {done.returncode}"
        raise refused(f"{command[0]} refused: {said}")
    return done.stdout.decode(errors="replace")


class Child:
    """A program that runs until it is ended. Made by :func:`start_child`.

    A thread of its own starts it and waits for its end: the kernel takes the end of the thread that started it for the
    end of its parent.

    :ivar served: whoever started it has had it at work; nothing here depends on it.
    """

    def __init__(self, command: Sequence[str], pass_fds: Sequence[int], on_end: Callable[[Child], None]) -> None:
        self._command = command
        self._pass_fds = pass_fds
        self._on_end = on_end
        self._popen: subprocess.Popen[bytes] | None = None
        self._error: OSError | None = None
        self._started = threading.Event()
        self._ended = threading.Event()
        self._said = b""
        self._wanted = False
        self.served = False
        self._thread = threading.Thread(target=self._live, name=command[0], daemon=True)

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._popen is not None
        return self._popen.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return not self._ended.is_set()

    @property
    def said(self) -> str:
        """What it said last on its standard error, in one line; whole when it has ended."""
        return _one_line(self._said, self._command[0])

    @property
    def how(self) -> str:
        """How it ended, with what it said."""
        code = self._popen.returncode if self._popen is not None else None
        status = "" if code is None else f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        return ": ".join(part for part in (status, self.said) if part)

    def end(self, patience: float) -> None:
        """End it in good order by SIGTERM; by SIGKILL where that takes longer than ``patience`` seconds, or with 0."""
        self._wanted = True
        if self._popen is None:
            return
        if patience:
            with suppress(OSError):
                self._popen.terminate()
            if self._ended.wait(patience):
                return
        with suppress(OSError):
            self._popen.kill()
        # What hangs in the kernel goes when the kernel lets it; nobody can do more.
        self._ended.wait(5.0)

    def wait(self, patience: float) -> bool:
        """Whether it has ended within so many seconds."""
        return self._ended.wait(patience)

    def _start(self) -> None:
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error

    def _live(self) -> None:
        try:
            self._popen = subprocess.Popen(
                _launched(self._command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=self._pass_fds,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is for us: it is ended when we are done with it
                umask=0o077,
            )
        except OSError as error:
            self._error = error
            return
        finally:
            self._started.set()
        assert self._popen.stderr is not None
        with self._popen.stderr as stderr:
            while part := os.read(stderr.fileno(), _SAID_LIMIT):
                self._said = (self._said + part)[-_SAID_LIMIT:]
        self._popen.wait()
        unasked = not self._wanted
        self._ended.set()
        if unasked:
            self._on_end(self)


def start_child(
    command: Sequence[str], *, pass_fds: Sequence[int] = (), on_end: Callable[[Child], None] = lambda child: None
) -> Child:
    """Start a program.

    :param on_end: called in another thread when it has ended and nobody has asked it to.
    :raise StorageError: it cannot be started.
    """
    child = Child(command, pass_fds, on_end)
    try:
        child._start()
    except OSError as error:
        raise StorageError(f"{command[0]} cannot be started: {error.strerror}") from error
    return child


def _launched(command: Sequence[str]) -> list[str]:
    return [sys.executable, "-I", "-S", str(Path(launch.__file__)), str(os.getpid()), *command]


def _environment() -> dict[str, str]:
    return os.environ | {"LC_ALL": "C"}


def _one_line(said: bytes, program: str) -> str:
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    return "; ".join(line.removeprefix(f"{program}: ") for line in lines)
