"""The control socket's file: made safely, replaced when its owner is dead, removed on exit.

Owns the file system's side only; what is spoken on it is :mod:`qemu_remus.control`'s.  Everything here blocks, for at
most :data:`LOCK_TIMEOUT`: trio runs it in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qemu_remus.core.errors import ConfigError

PATH_LIMIT: Final = 107
"""Longest path of a Unix socket on Linux, in bytes."""

LOCK_TIMEOUT: Final = 5.0
"""Seconds to wait for another controller that makes its socket in the same directory."""

_LOCK_POLL: Final = 0.005
_TEMPORARY: Final = "~"
_BACKLOG: Final = 16


@dataclass(frozen=True, slots=True)
class Claim:
    """A listening socket whose file is ours.

    :param listener: bound, mode 0600, listening, non-blocking.
    """

    path: Path
    listener: socket.socket
    inode: tuple[int, int]

    def release(self) -> None:
        """Remove the file, if it is still the one that we made."""
        with contextlib.suppress(FileNotFoundError):
            if _inode(self.path) == self.inode:
                self.path.unlink()


def check_path(path: Path) -> None:
    """See that a socket can have this path.

    :raise ConfigError: when it is too long.
    """
    length = len(os.fsencode(path)) + len(_TEMPORARY)
    if length > PATH_LIMIT:
        raise ConfigError(
            f"{path} is too long for a Unix socket: {length - len(_TEMPORARY)} bytes",
            hint=f"choose a path of at most {PATH_LIMIT - len(_TEMPORARY)} bytes",
        )


def claim(path: Path) -> Claim:
    """Listen at ``path``, which only this user may connect to.

    The last directory of the path is made, for this user alone, if it is not there.  A socket whose process is dead is
    replaced.

    :raise ConfigError: when somebody listens there already, something else than a socket is there, or the directory
        cannot be used.
    """
    check_path(path)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with _alone_in(path.parent):
            _see_that_free(path)
            return _listen(path)
    except OSError as error:
        raise ConfigError(
            f"the control socket {path} cannot be made: {error.strerror}",
            hint="choose another place with --control",
        ) from error


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keep other controllers out of the directory, so that two do not both find, and replace, the same dead socket."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Ours hold it for some system calls only, but anybody who may open the directory may lock it.
        deadline = time.monotonic() + LOCK_TIMEOUT
        while not _locked(fd):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"another process holds a lock on {directory}", hint="choose another directory with --control"
                )
            time.sleep(_LOCK_POLL)
        yield
    finally:
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _see_that_free(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"{path} is there already and is no socket", safe="it was left alone", hint="choose another --control"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # A full backlog, or a socket that we may not use, is somebody's too; only a refusal says that nobody is there.
        probe.setblocking(False)
        code = probe.connect_ex(os.fspath(path))
    if code != errno.ECONNREFUSED:
        raise ConfigError(
            f"another process listens on {path} already",
            safe="it was left alone",
            hint="is a controller of this pair running? 'qemu-remus status' with this --control asks it",
        )


def _listen(path: Path) -> Claim:
    temporary = Path(f"{path}{_TEMPORARY}")
    temporary.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(os.fspath(temporary))
        # Nobody can connect before listen(), so nobody can connect before this.
        temporary.chmod(0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        inode = _inode(temporary)
        temporary.rename(path)
    except BaseException:
        listener.close()
        temporary.unlink(missing_ok=True)
        raise
    return Claim(path, listener, inode)


def _inode(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
