"""Who is connected to a Unix socket: asked when a QMP socket, which serves one client at a time, does not answer us.

The kernel tells by netlink which two sockets are a connection (sock_diag(7), ``linux/unix_diag.h``), and
``/proc/PID/fd`` whose they are, as far as we may look.  Only asks, and never fails: what cannot be learned is not told.
Blocks for some file reads.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_DUMP: Final = 0x301
"""``NLM_F_REQUEST | NLM_F_DUMP``."""
_HEADER: Final = struct.Struct("=IHHII")
_REQUEST: Final = struct.Struct("=BBHIIIII")
_MESSAGE: Final = struct.Struct("=BBBBIII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_SHOW_NAME: Final = 0x1
_SHOW_PEER: Final = 0x4
_NAME: Final = 0
_PEER: Final = 2
_ESTABLISHED: Final = 1
_LIMIT: Final = 1.0
"""Seconds to wait for the kernel."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that is connected.

    :param command: its command line, shortened.
    """

    pid: int
    command: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})" if self.command else f"process {self.pid}"


def holders_of(path: Path, proc: Path = Path("/proc")) -> tuple[Holder, ...]:
    """The processes connected to whoever listens on ``path``; we are not among them."""
    try:
        table = list(_sockets())
    except OSError:
        return ()
    wanted = os.fsencode(path)
    # One that nobody has accepted yet, such as ours, has no inode.
    peers = {peer for inode, name, peer in table if name == wanted and inode and peer}
    return tuple(holder for holder in _processes(peers, proc) if holder.pid != os.getpid())


def _sockets() -> Iterator[tuple[int, bytes, int]]:
    """Inode, name and peer's inode of every connected Unix socket."""
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, 1 << _ESTABLISHED, 0, _SHOW_NAME | _SHOW_PEER, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as link:
        link.settimeout(_LIMIT)
        link.send(_HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _DUMP, 1, 0) + request)
        while True:
            data = link.recv(1 << 16)
            while len(data) >= _HEADER.size:
                length, kind, _, _, _ = _HEADER.unpack_from(data)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR) or length < _HEADER.size:
                    return
                yield _parse(data[_HEADER.size : length])
                data = data[(length + 3) & ~3 :]


def _parse(message: bytes) -> tuple[int, bytes, int]:
    inode = _MESSAGE.unpack_from(message)[4]
    name, peer, rest = b"", 0, message[_MESSAGE.size :]
    while len(rest) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(rest)
        value = rest[_ATTRIBUTE.size : length]
        if kind == _NAME:
            name = value.rstrip(b"\0")
        elif kind == _PEER and len(value) >= 4:
            peer = int.from_bytes(value[:4], sys.byteorder)
        rest = rest[max((length + 3) & ~3, _ATTRIBUTE.size) :]
    return inode, name, peer


def _processes(inodes: set[int], proc: Path) -> Iterator[Holder]:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    if not wanted:
        return
    for process in proc.iterdir():
        if not process.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            if any(_target(entry) in wanted for entry in (process / "fd").iterdir()):
                yield Holder(int(process.name), _command(process))


def _target(entry: Path) -> str:
    try:
        return str(entry.readlink())
    except OSError:
        return ""


def _command(process: Path) -> str:
    words = (process / "cmdline").read_bytes().split(b"\0")
    text = " ".join(word.decode(errors="replace") for word in words if word)
    return text if len(text) <= 60 else text[:57] + "..."
